"""Run in the lab: start mtetool's commands again and again on a VMM, and end them at bad moments.

`python3 -m tests.lab.torture PID DEATHS SEED SNAPSHOT` prints a line of JSON for each harm to the
VMM and, at the end, a summary. Commands run in forked children, from main() on, so thousands of
deaths take minutes. Every other command dies at a random step (see `mtetool.attach.steps`), the
others after a random time: by SIGKILL, SIGTERM, SIGINT or SIGHUP, or because the pipe that they
write to is closed; or they are stopped, by SIGSTOP or SIGTSTP, and not continued before the VMM
is as it was.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from mtetool.attach import steps
from tests.lab.deaths import mappings, names, settled, state

_STOPS = ("STOP", "TSTP")
_SIGNALS = (*_STOPS, *_STOPS, "KILL", "KILL", "KILL", "TERM", "INT", "HUP", "PIPE")
# Loaded once, before any child is forked.
_LOADED = (
    "mtetool.__main__",
    "mtetool.cli.save",
    "mtetool.cli.restore",
    "mtetool.cli.enable",
    "mtetool.backends.kvm.guest",
    "mtetool.flows.restore",
    "mtetool.flows.save",
)


@dataclass
class Command:
    """A command line, the steps that it goes through, and how long it takes."""

    words: list[str]
    steps: list[tuple[str, int]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Vmm:
    """The VMM, and how it was before anything happened to it."""

    pid: int
    before: dict[str, object]
    harm: dict[str, object] | None = None

    def is_left_alone(self, but: str = "") -> None:
        """Wait until the VMM is as it was; if that does not happen, set `harm` to its state."""
        self.harm = self.harm or settled(self.pid, self.before, but)


def commands(pid: int, snapshot: str) -> list[Command]:
    """Return the commands that are started on the VMM, as real command lines."""
    guest = f"kvm:{pid}"
    lines = (
        f"save {guest} -o /tmp/torture.out --force --range 0x40000000:64M",
        f"save {guest} -o - --range 0x40000000:64M",
        f"save {guest} -o /tmp/torture.out --force --freeze --range 0x40000000:64M",
        f"restore {snapshot} {guest}",
        f"enable {guest}",
        "list",
    )
    return [Command(line.split()) for line in lines]


def become(command: Command, out: int) -> None:
    """Run the command in this child process; does not return."""
    from mtetool.__main__ import main

    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(null, 2)
    sys.argv = ["mtetool", *command.words]
    status = 70
    try:
        status = main()
    finally:
        os._exit(status)


def start(command: Command, hook: steps.Hook | None = None) -> tuple[int, int]:
    """Start a command; return its process and the reading end of its output pipe."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        # In a process group of its own: SIGTSTP does not stop an orphaned group.
        os.setpgid(0, 0)
        os.close(reading)
        steps.on_step(hook)
        become(command, writing)
    os.close(writing)
    return child, reading


def drain(reading: int) -> None:
    """Read a command's output to its end, as a good neighbour does."""
    while os.read(reading, 1 << 16):
        pass
    os.close(reading)


def learn(command: Command) -> None:
    """Run the command once, undisturbed, and note its steps."""
    listing, noting = os.pipe()
    os.set_blocking(listing, False)
    began = time.monotonic()
    with open(noting, "wb", buffering=0) as note:  # noqa: PTH123 - a descriptor

        def hook(name: str) -> None:
            note.write(name.encode() + b"\n")

        child, reading = start(command, hook)
    text, done = b"", 0
    while not done:
        done, _ = os.waitpid(child, os.WNOHANG)
        for fd in (listing, reading):
            os.set_blocking(fd, False)
            with suppress(BlockingIOError):
                data = os.read(fd, 1 << 20)
                text += data if fd == listing else b""
        time.sleep(0.002)
    command.seconds = time.monotonic() - began
    with suppress(BlockingIOError):
        while data := os.read(listing, 1 << 20):
            text += data
    for fd in (listing, reading):
        os.close(fd)
    seen = Counter[str]()
    for name in text.decode().split():
        seen[name] += 1
        command.steps.append((name, seen[name]))


def die(command: Command, chance: random.Random, name: str, vmm: Vmm) -> str:
    """Start the command and end it with that signal; return the step ("time": a random time)."""
    at_step = command.steps and chance.random() < 0.5 and name != "PIPE"
    step, nth = _draw(command, chance) if at_step else ("time", 0)
    hook = steps.fault(f"{name}@{step}:{nth}") if at_step else None
    child, reading = start(command, hook)
    if not at_step:
        time.sleep(chance.uniform(0.0, 1.1) * command.seconds)
    if name == "PIPE":
        os.close(reading)
    elif not at_step:
        os.kill(child, signal.Signals[f"SIG{name}"])
    if name in _STOPS:
        reader = threading.Thread(target=drain, args=(reading,))
        reader.start()
        os.waitid(os.P_PID, child, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
        # Before it is continued. (A command that holds nothing keeps its guard.)
        vmm.is_left_alone(but="guards")
        os.kill(child, signal.SIGCONT)
        reader.join()
    elif name != "PIPE":
        drain(reading)
    os.waitpid(child, 0)
    return step


def _draw(command: Command, chance: random.Random) -> tuple[str, int]:
    # The name first: a step that comes once is then drawn as often as one that comes many times.
    name = chance.choice(sorted({name for name, _ in command.steps}))
    return chance.choice([step for step in command.steps if step[0] == name])


def main() -> None:
    """Run the campaign."""
    pid, deaths, seed, snapshot = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    chance = random.Random(seed)  # noqa: S311 - no secret
    # Run ahead of the guest's busy vCPUs; otherwise this takes hours.
    os.nice(-15)
    for module in _LOADED:
        import_module(module)
    kinds = commands(pid, snapshot)
    drawn = [chance.choice(kinds) for _ in range(deaths)]
    for command in kinds:
        if command in drawn:
            learn(command)
    vmm = Vmm(pid, state(pid))
    by_signal, by_step, most_left = Counter[str](), Counter[str](), 0
    for number, command in enumerate(drawn):
        # Even a short campaign has both stops.
        name = _STOPS[number] if number < len(_STOPS) else chance.choice(_SIGNALS)
        step = die(command, chance, name, vmm)
        by_signal[name] += 1
        by_step[step] += 1
        vmm.is_left_alone()
        if vmm.harm is not None:
            harm = {"death": number, "command": command.words, "signal": name, "step": step}
            print(json.dumps({"harmed": harm, "before": vmm.before, "after": vmm.harm}), flush=True)
            break
        most_left = max(most_left, mappings(pid))
    learn(kinds[0])  # attaching once more removes what the last command left
    result = {
        "deaths": sum(by_signal.values()),
        "by_signal": by_signal,
        "by_step": by_step,
        "steps": sorted({step for command in kinds for step, _ in command.steps}),
        "steps_of_a_cycle": sorted(set(names(pid))),
        "seconds": {" ".join(command.words[:1]): command.seconds for command in kinds},
        "most_mappings_left": most_left,
        "mappings_in_the_end": mappings(pid),
        "files_left": [path.name for path in Path("/tmp").glob(".torture*")],
    }
    print(json.dumps({"done": result}))


if __name__ == "__main__":
    main()
