"""Warnings, before a VMM starts, about what MTE will break of it."""

from __future__ import annotations

from collections.abc import Sequence

from mtetool.errors import MteUnsupportedError
from mtetool.vmm.qemu_options import ReadConfig
from mtetool.words import counted, quoted

# A command line can have thousands of options.
_MOST = 4
_QUOTED_MAX = 80


def warnings(words: Sequence[str], read_config: ReadConfig) -> list[MteUnsupportedError]:
    """Return what MTE may break of a QEMU's command line: a few warnings; the rest is counted.

    `read_config` returns the text of a `-readconfig` file. Raises nothing.
    """
    # Loaded only here: other VMMs do not need it.
    from mtetool.vmm import mte_limits

    if not mte_limits.qemu(words):
        return []
    from mtetool.vmm.taggable import ThisHost

    found = mte_limits.limits(words, read_config, ThisHost())
    texts = [f"{quoted(each.what, _QUOTED_MAX)}: {each.why}" for each in found[:_MOST]]
    if more := found[_MOST:]:
        texts[-1] += f"; {counted(len(more), 'other option')} may end it too"
    hint = "find out what MTE does not go with: man mtetool-exec"
    return [MteUnsupportedError(text, hint=hint if text is texts[-1] else None) for text in texts]
