"""`mtetool probe`: can this host do it."""

from __future__ import annotations

from dataclasses import asdict

import click

from mtetool.cli.options import report_option
from mtetool.cli.render import print_json, say
from mtetool.errors import STATUS_GUEST, STATUS_OK


@click.command("probe")
@report_option
def command(output: str) -> int:
    """Say whether this host can copy tags of KVM guests, and what stands in the way.

    Status 0 when it can, 4 when it cannot.
    """
    from mtetool.flows.probe import Row, able, judge
    from mtetool.vmm.host import host_facts

    facts = host_facts()
    rows: list[Row] = judge(facts)
    good = able(rows)
    if output == "json":
        print_json(
            {
                "schema": "mtetool.probe/1",
                "able": good,
                "mte": facts.mte if facts.machine == "aarch64" else False,
                "page_size_bytes": facts.page_size_bytes,
                "rows": [asdict(row) for row in rows],
            }
        )
    else:
        width = max(len(row.title) for row in rows)
        for row in rows:
            say(f"{row.state:<8} {row.title:<{width}}  {row.value}")
            if row.hint and row.state != "ok":
                say(f"{'':<8} {'':<{width}}  try: {row.hint}")
        say("this host can copy tags" if good else "this host cannot copy tags of KVM guests")
    return STATUS_OK if good else STATUS_GUEST
