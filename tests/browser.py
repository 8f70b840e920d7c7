"""A headless Chromium for tests of pages, driven through its debugging pipe.

As a script it takes the README's picture of the page of all leaderboards.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

SECONDS = 60
"""How long anything may take."""


def chromium():
    """Returns the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A page, and what it has asked of the network and complained of.

    Attributes:
        requests: Addresses that were asked for, its own first.
        complaints: Uncaught errors, and what stands in the console.
    """

    def __init__(self, sent, received):
        self._sent, self._received = sent, received
        self._rest, self._count, self._session = b"", 0, None
        self._events = []
        self.requests, self.complaints = [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """Calls a method of the DevTools protocol and returns its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._sent, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, address, width=1280, height=900, dark=False):
        """Opens an address in a window of that size, and waits until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme])
        self._events.clear()
        self.call("Page.navigate", url=address)
        while "Page.loadEventFired" not in self._events:
            self._read()

    def run(self, script):
        """Returns the value of a JavaScript expression."""
        done = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in done, f"{script}: {done['exceptionDetails']}"
        return done["result"].get("value")

    def press(self, key, code):
        """Presses a key, told by its name and its number."""
        text = {"text": "\r"} if key == "Enter" else {}
        given = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        down = ("Input.dispatchKeyEvent", given | text | {"type": "keyDown"})
        self._hear("keyup", down, ("Input.dispatchKeyEvent", given | {"type": "keyUp"}))

    def write(self, text):
        """Writes into the field that has the focus."""
        self._hear("input", ("Input.insertText", {"text": text}))

    def move(self, x, y):
        """Moves the mouse to a place of the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x, y):
        """Clicks on a place of the window."""
        self.move(x, y)
        given = {"x": x, "y": y, "button": "left", "clickCount": 1}
        pressed, released = (
            ("Input.dispatchMouseEvent", given | {"type": kind})
            for kind in ("mousePressed", "mouseReleased")
        )
        self._hear("click", pressed, released)

    def _hear(self, event, *calls):
        """Makes calls, and waits until the page has dealt with the event that they lead to."""
        heard = (
            f"addEventListener('{event}', () => setTimeout(done), {{capture: true, once: true}})"
        )
        self.run(f"void (window.heard = new Promise(done => {heard}))")
        for method, parameters in calls:
            self.call(method, **parameters)
        self.run("window.heard")

    def picture(self, path):
        """Writes what the window shows as a PNG."""
        shot = self.call("Page.captureScreenshot", format="png")
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def _read(self):
        """Returns the next message, and keeps what it tells."""
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._received], [], [], deadline - time.monotonic())
            assert ready, f"Chromium has said nothing for {SECONDS} s"
            read = os.read(self._received, 1 << 20)
            assert read, "Chromium has ended"
            self._rest += read
        told, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(told)
        method, given = message.get("method"), message.get("params", {})
        self._events.append(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(given["exceptionDetails"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(given["args"])
        elif method == "Log.entryAdded":
            self.complaints.append(given["entry"])
        return message


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """Starts a Chromium with one empty page, and ends it."""
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-extensions "
        flags += "--disable-background-networking --disable-component-update --disable-sync "
        flags += f"--remote-debugging-pipe --user-data-dir={folder}"
        # Chromium reads from the descriptor 3 and writes to 4.
        line = f"exec {chromium()} {flags} 3<&{theirs_in} 4>&{theirs_out}"
        process = subprocess.Popen(
            ["bash", "-c", line],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": folder},
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Page(ours_out, ours_in)
        finally:
            os.close(ours_out)  # at the end of its input it ends
            os.close(ours_in)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


if __name__ == "__main__":
    results = Path(__file__).parents[1] / "results"
    with browser() as shown:
        shown.call("Emulation.setScrollbarsHidden", hidden=True)
        shown.open((results / "leaderboard.html").as_uri() + "#protocol=nystrom", 1280, 2040)
        shown.picture(results / "leaderboard-page.png")
