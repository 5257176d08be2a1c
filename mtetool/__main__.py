"""`mtetool`, `python -m mtetool`: the one place that turns errors into text and exit status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise

from mtetool import signals
from mtetool.errors import (
    STATUS_HOST,
    STATUS_OK,
    HostIoError,
    MtetoolError,
    NoMemoryError,
    SignalError,
    host_error,
)
from mtetool.words import printable

STATUS_CLOSED_PIPE = 128 + signal.SIGPIPE


class InternalError(MtetoolError):
    """A bug in mtetool: an unexpected exception."""

    id = "internal"
    status = STATUS_HOST


def main() -> int:
    """Run the command line in `sys.argv`; return the exit status, or die by a signal received.

    The statuses are those of mtetool(1), EXIT STATUS. If MTETOOL_DEBUG is set and not empty,
    errors are printed with a traceback.
    """
    arguments = sys.argv[1:]
    _take_closed_descriptors()
    try:
        with signals.raising():
            status = _guarded(lambda: _flushed(_run(arguments)), arguments)
            _drop_unwritten()
            return status
    except SignalError as caught:
        number, word = caught.number, caught.word
    # The exception is gone, and with it what its frames held open: cleanup happens now.
    if word is not None:
        _report(word, arguments)
    return _die_by(number)


def _take_closed_descriptors() -> None:
    """Open each of the descriptors 0, 1 and 2 that the caller left closed.

    Otherwise the next file to be opened would get its number. As glibc does for setuid programs
    (csu/check_fds.c), each is opened the wrong way round, so that reading or writing it fails
    with EBADF: a result that is lost is not a success. Standard error accepts anything, because
    there is nowhere to report a failure.
    """
    for fd, name, flags, mode in (
        (0, "stdin", os.O_WRONLY, "r"),
        (1, "stdout", os.O_RDONLY, "w"),
        (2, "stderr", os.O_WRONLY, "w"),
    ):
        # Not inherited: a program that mtetool becomes finds them closed, as it would alone.
        if getattr(sys, name) is None and _is_closed(fd):
            null = os.open(os.devnull, flags)
            if null != fd:
                os.dup2(null, fd, inheritable=False)
                os.close(null)
            setattr(sys, name, os.fdopen(fd, mode, closefd=False))


def _is_closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False


def _run(arguments: Sequence[str]) -> int:
    # Imported here, so that an import that fails or is interrupted is handled too.
    import click

    from mtetool.cli import ClosedPipeError, group

    if "_MTETOOL_COMPLETE" in os.environ:
        from mtetool.cli import completing

        completing.register()
    # The default (strict) would end a listing with a traceback at the first odd file name.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        result = group.main(list(arguments), prog_name="mtetool", standalone_mode=False)
    except click.Abort:
        raise SignalError(signal.SIGINT) from None
    except click.ClickException as error:
        raise _usage_error(error) from error
    except ClosedPipeError:
        return STATUS_CLOSED_PIPE
    return result if isinstance(result, int) else STATUS_OK


def _usage_error(error: Exception) -> MtetoolError:
    import re

    from click import ClickException, UsageError

    from mtetool import errors

    message = error.format_message() if isinstance(error, ClickException) else str(error)
    # It contains words of the command line as `repr` shows them.
    message = re.sub(r"(?<!\\)\\udc([89a-f][0-9a-f])", r"\\x\1", message)
    context = error.ctx if isinstance(error, UsageError) else None
    path = context.command_path if context else "mtetool"
    return errors.UsageError(message, hint=f"{path} --help")


def _guarded(run: Callable[[], int], arguments: Sequence[str]) -> int:
    """Return the status of `run`; print what it raises, except signals, on standard error."""
    try:
        return run()
    except BrokenPipeError:
        return STATUS_CLOSED_PIPE
    except MtetoolError as error:
        return _report(error, arguments)
    except MemoryError:
        return _report(_no_memory(), arguments)
    except OSError as error:
        return _report(_from_os_error(error), arguments)
    except ImportError as error:
        return _report(_not_loaded(error), arguments)
    except Exception as error:  # noqa: BLE001 - the last resort of the whole program
        return _report(_internal(error), arguments)


def _from_os_error(error: OSError) -> MtetoolError:
    """Return the error for an OSError that no other code has handled."""
    named = isinstance(error.filename, str | bytes)
    return host_error(error, os.fsdecode(error.filename) if named else "this host failed")


def _no_memory() -> NoMemoryError:
    return NoMemoryError("this host has no memory left for that", hint="use a smaller --range")


def _not_loaded(error: ImportError) -> MtetoolError:
    """Return the error for a module that is not there, or that could not be read."""
    return HostIoError(
        f"a part of mtetool could not be loaded: {error}",
        hint="if its disk is sound, install mtetool again",
    )


def _internal(error: Exception) -> InternalError:
    kind = type(error).__name__
    return InternalError(
        f"this should not happen: {kind}: {error}"
        if str(error)
        else f"this should not happen: {kind}",
        hint="set MTETOOL_DEBUG=1 to see where, and please report it",
    )


def _report(error: MtetoolError, arguments: Sequence[str]) -> int:
    if os.environ.get("MTETOOL_DEBUG"):
        import traceback

        traceback.print_exc()
    parts = _as_json(error) if wants_json(arguments) else ["\n".join(map(printable, error.lines()))]
    # The reader may be gone; the status still reports the failure.
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.writelines(parts)
        sys.stderr.write("\n")
        sys.stderr.flush()
    return error.exit_status


def _as_json(error: MtetoolError) -> Iterable[str]:
    from mtetool.streaming import json_parts

    return json_parts(error.document())


def wants_json(arguments: Sequence[str]) -> bool:
    """Return whether a command line asks for JSON, without parsing it.

    A command line that cannot be parsed must be answered in JSON too, so this looks at its words.
    """
    words = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    outputs = [after for word, after in pairwise(words) if word == "--output"]
    forms = {"json", "jsonl"}
    outputs += [word.removeprefix("--output=") for word in words if word.startswith("--output=")]
    return "--json" in words or bool(forms & set(outputs))


def _flushed(status: int) -> int:
    """Flush, then return `status`: a result that did not arrive is not a result."""
    try:
        _flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise host_error(error, "standard output") from error
    return status


def _flush() -> None:
    # None where an embedding program has no standard output.
    if sys.stdout is not None:
        sys.stdout.flush()


def _drop_unwritten() -> None:
    """Flush standard output, or else point it at /dev/null.

    The interpreter flushes once more at its end, and would complain. A failure here has
    occurred before, and was reported then.
    """
    try:
        _flush()
    except (OSError, ValueError):
        _drop_stdout()


def _drop_stdout() -> None:
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _die_by(number: int) -> int:
    """Die by the signal itself: only then does Ctrl-C also end a loop in the shell."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
    _drop_stdout()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    return 128 + number  # where the signal is blocked


if __name__ == "__main__":
    sys.exit(main())
