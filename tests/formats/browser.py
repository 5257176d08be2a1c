"""A report in a real browser: `make browser`. It needs Debian's package chromium.

Chromium is driven through a pipe (its descriptors 3 and 4), by the keys that a user presses; the
pictures go to the directory that is named, or to a temporary one.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.cli.running import BASE, KIB, make_guest, run, set_tag

_FLAGS = "--headless --no-sandbox --disable-gpu --remote-debugging-pipe --window-size=1200,1400"


class Browser:
    """A browser with one page."""

    def __init__(self, directory: Path) -> None:
        theirs, self._out = os.pipe()
        self._in, answers = os.pipe()
        script = f'exec chromium {_FLAGS} --user-data-dir="$1" 3<&{theirs} 4>&{answers}'
        self._process = subprocess.Popen(
            ["sh", "-c", script, "sh", directory / "profile"],
            pass_fds=(theirs, answers),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(answers)
        self._unread, self._number, self._session = b"", 0, ""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self.ask("Page.enable")

    def ask(self, method: str, **parameters: Any) -> Any:
        """Call a method of the DevTools protocol."""
        self._number += 1
        call = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            call["sessionId"] = self._session
        os.write(self._out, json.dumps(call).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _message(self) -> Any:
        while b"\0" not in self._unread:
            received = os.read(self._in, 1 << 16)
            assert received, "the browser ended"
            self._unread += received
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is loaded."""
        self.ask("Page.navigate", url=url)
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press keys, by their names, or write texts of one letter."""
        for key in keys:
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            code = {"Enter": 13, "Tab": 9}.get(key, 0)
            # As a keyboard does it: a page can keep the character from coming.
            for kind in ("rawKeyDown", *(("char",) if text else ()), "keyUp"):
                more = {"text": text} if kind == "char" else {}
                self.ask(
                    "Input.dispatchKeyEvent",
                    type=kind,
                    key=key,
                    windowsVirtualKeyCode=code,
                    **more,
                )

    def picture(self, path: Path) -> None:
        """Save what the page looks like."""
        data = self.ask("Page.captureScreenshot")["data"]
        path.write_bytes(base64.b64decode(data))

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def _here(browser: Browser) -> str:
    return str(browser.value("document.getElementById('here').textContent"))


def main(directory: Path) -> None:
    """Open a report, search and move by keys, in light and dark; print what the page says."""
    guest = make_guest(directory / "guest", seed=3)
    other = make_guest(directory / "other", seed=3)
    set_tag(directory / "other", BASE + 64 * KIB, 16, 1)
    set_tag(directory / "guest", BASE + 64 * KIB, 16, 2)
    page = directory / "report.html"
    assert run("report", guest, "--against", other, "-o", page, "--force").status == 0
    browser = Browser(directory)
    try:
        browser.open(page.as_uri())
        for scheme in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            browser.ask("Emulation.setEmulatedMedia", features=[feature])
            browser.press("/", *f"{BASE + 20 * KIB:#x}", "Enter")
            assert _here(browser).startswith(f"{BASE + 20 * KIB:#x}  tag"), _here(browser)
            browser.press("ArrowRight", "ArrowRight", "ArrowLeft", "+", "-")
            assert _here(browser).startswith(f"{BASE + 24 * KIB:#x}  tag"), _here(browser)
            browser.press("n")
            print(f"{scheme}: {_here(browser)}")
            assert _here(browser).startswith(f"{BASE + 64 * KIB:#x}")
            assert _here(browser).endswith("differs")
            browser.picture(directory / f"{scheme}.png")
        colour = browser.value("getComputedStyle(document.body).backgroundColor")
        print(f"dark background: {colour}")
        browser.press("/", *"nowhere", "Enter")
        print(_here(browser))
        assert "is not an address" in _here(browser)
    finally:
        browser.end()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            main(Path(scratch))
