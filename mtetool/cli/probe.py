"""`mtetool probe`: whether this host can copy tags."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mtetool.cli.options import report_option
from mtetool.cli.render import print_json, say
from mtetool.errors import STATUS_GUEST, STATUS_OK

if TYPE_CHECKING:
    from mtetool.flows.probe import Row
    from mtetool.flows.selftest import Report
    from mtetool.vmm.host import HostFacts


@click.command("probe")
@click.option(
    "--selftest", is_flag=True, help="Prove on a scratch VM that this host keeps tags exactly."
)
@report_option
def command(selftest: bool, output: str) -> int:
    """Report whether this host can copy tags of KVM guests, and what stands in the way.

    Status 0 when it can, 4 when it cannot.
    """
    from mtetool.flows.probe import able, judge
    from mtetool.vmm import host

    facts = host.host_facts()
    rows = judge(facts)
    report = _prove(facts) if selftest else None
    good = able(rows) and (report is None or report.passed)
    if output == "json":
        print_json(_document(facts, rows, good, report))
    else:
        _tell(rows)
        if report is not None:
            _tell_selftest(report)
        say("this host can copy tags" if good else "this host cannot copy tags of KVM guests")
    return STATUS_OK if good else STATUS_GUEST


def _prove(facts: HostFacts) -> Report:
    from mtetool.flows import selftest
    from mtetool.vmm.scratch import scratch_vm

    return selftest.selftest(facts, scratch_vm)


def _document(
    facts: HostFacts, rows: list[Row], good: bool, report: Report | None
) -> dict[str, Any]:
    return {
        "schema": "mtetool.probe/1",
        "able": good,
        "mte": facts.mte if facts.machine == "aarch64" else False,
        "page_size_bytes": facts.page_size_bytes,
        "rows": [asdict(row) for row in rows],
        "selftest": None if report is None else _selftest(report),
    }


def _selftest(report: Report) -> dict[str, Any]:
    return {
        "passed": report.passed,
        "not_run": report.not_run,
        "defects": [asdict(defect) for defect in report.defects],
        "rows": [asdict(row) for row in report.rows],
    }


def _tell(rows: list[Row]) -> None:
    width = max(len(row.title) for row in rows)
    for row in rows:
        say(f"{row.state:<8} {row.title:<{width}}  {row.value}")
        if row.hint and row.state != "ok":
            say(f"{'':<8} {'':<{width}}  try: {row.hint}")


def _tell_selftest(report: Report) -> None:
    if report.not_run is not None:
        say(f"the selftest cannot run: {report.not_run}")
        return
    width = max(len(row.title) for row in report.rows)
    for row in report.rows:
        say(f"{row.state:<8} {row.title:<{width}}  {row.answered}")
        if row.state == "no":
            say(f"{'':<8} {'':<{width}}  must be: {row.expected}")
        if row.note is not None:
            say(f"{'':<8} {'':<{width}}  note: {row.note}")
    for defect in report.defects:
        say(f"defect: {defect.text}")
        say(f"  try: {defect.hint}")
    held = sum(row.state in ("ok", "fact") for row in report.rows)
    say(f"selftest: {held} of {len(report.rows)} checks hold")
