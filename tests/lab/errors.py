"""What can go wrong around the lab, apart from a command that fails inside it."""

from __future__ import annotations


class LabError(Exception):
    """The lab cannot be built or booted; the message is one sentence for the user."""


class MissingToolError(LabError):
    """A program that the machine lacks, with the Debian package that has it."""

    def __init__(self, tool: str, package: str) -> None:
        super().__init__(f"the lab needs {tool}; install the Debian package {package}")
        self.tool = tool
        self.package = package


class MachineLost(LabError):  # noqa: N818 - it is the state of a machine, reported as such
    """The machine is gone or no longer answers: says nothing about the command that ran on it."""

    def __init__(self, reason: str, console_tail: str = "") -> None:
        super().__init__(f"the lab machine was lost: {reason}")
        self.reason = reason
        self.console_tail = console_tail

    def __str__(self) -> str:
        head = super().__str__()
        if not self.console_tail:
            return head
        return f"{head}\n--- end of its console ---\n{self.console_tail}"
