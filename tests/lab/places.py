"""Run in the lab: find a guest's memory in its VMM, confirmed by the kernel.

`python3 -m tests.lab.places PID [PATH]` prints JSON: the places (ipa, size, address), those that
QEMU's monitor at PATH reports, the number of probes, how many of them were guesses, and the time;
and whether the same pages of the guest's memory existed before and after. With a monitor,
`confirmed` are the places found if those that it reports are tried first, and `confirming` is the
number of probes for that.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from mtetool.attach.session import Session
from mtetool.backends.kvm import memslots
from mtetool.backends.kvm.guest import open_kvm
from mtetool.backends.kvm.placing import Guess
from mtetool.guest import GuestOptions, Memslot
from mtetool.spans import Place
from mtetool.vmm.monitors import open_given
from tests.lab.existing import large_memory


def main() -> None:
    """Find the places, and print the results."""
    pid = int(sys.argv[1])
    told: list[Place] | None = None
    layout: tuple[Memslot, ...] = ()
    if len(sys.argv) > 2:
        with open_given(pid, Path(sys.argv[2])) as monitor:
            told, layout = monitor.host_addresses(), monitor.memslots()
    questions: list[int] = []
    guesses: list[Guess] = []
    ioctl, confirms = Session.ioctl, memslots._Asking.confirms

    def counted(self: Session, fd: int, request: int, argument: bytes | int) -> int:
        result = ioctl(self, fd, request, argument)
        questions.append(result)
        return result

    def noted(self: memslots._Asking, guess: Guess) -> bool:
        guesses.append(guess)
        return confirms(self, guess)

    with open_kvm(str(pid), GuestOptions()) as guest:
        assert guest.vm.has_mte
        session = guest.vm.session
        Session.ioctl = counted  # type: ignore[method-assign]
        memslots._Asking.confirms = noted  # type: ignore[method-assign]
        before = large_memory(pid)
        slots = memslots.memslots_of(session, guest.vm.fd)
        n_layout = len(questions)
        began = time.monotonic()
        places = memslots.places_of(session, guest.vm.fd, slots)
        seconds = time.monotonic() - began
        n_places = len(questions) - n_layout
        confirmed = memslots.places_of(session, guest.vm.fd, layout, told) if told else []
        n_confirming = len(questions) - n_layout - n_places
        after = large_memory(pid)
        assert memslots.memslots_of(session, guest.vm.fd) == slots
    # The kernel refused every probe, so none changed anything.
    assert all(result < 0 for result in questions)
    result = {
        "places": places,
        "told": told,
        "layout_questions": n_layout,
        "questions": n_places,
        "confirmed": confirmed,
        "confirming": n_confirming,
        "guesses": len(guesses),
        "seconds": round(seconds, 3),
        "same": before == after,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
