"""A headless Chromium that a test drives: the DevTools protocol over two pipes."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = ("headless", "no-sandbox", "remote-debugging-pipe", "hide-scrollbars", "no-first-run", "disable-sync")
_QUIET = ("disable-background-networking", "disable-component-update", "disable-quic")
_SOFTWARE = ("use-gl=angle", "use-angle=swiftshader", "enable-unsafe-swiftshader")


class Page:
    """A page in a browser; `call` sends any command of the protocol."""

    def __init__(self, commands, answers):
        self._commands, self._answers, self._asked, self._session = commands, answers, 0, {}
        self._unread = b""
        self.errors = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": parameters, **self._session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := json.loads(self._message())).get("id") != self._asked:
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(answer["params"]["exceptionDetails"])
            elif answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["level"] == "error":
                self.errors.append(answer["params"]["entry"])
        assert "error" not in answer, answer
        return answer["result"]

    def value(self, expression):
        """What a JavaScript expression gives, awaited."""
        got = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def open(self, url, expression, seconds=100):
        """Goes to a page and waits until an expression holds there."""
        self.call("Page.navigate", url=url)
        self.until(expression, seconds)

    def until(self, expression, seconds=100):
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, (expression, self.errors, self.value("document.body.innerText"))
            time.sleep(0.1)

    def mouse(self, kind, x, y, buttons=1):
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=buttons, clickCount=1)

    def click(self, selector):
        x, y = self.value(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
            f"(document.querySelector('{selector}').getBoundingClientRect())"
        )
        self.mouse("mousePressed", x, y)
        self.mouse("mouseReleased", x, y, 0)

    def key(self, name):
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def screenshot(self):
        """The page as a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def _message(self):
        while b"\0" not in self._unread:
            piece = os.read(self._answers, 1 << 16)
            assert piece, "the browser is gone"
            self._unread += piece
        message, self._unread = self._unread.split(b"\0", 1)
        return message


@contextlib.contextmanager
def browser(folder, width, height):
    """A `Page` of that size; pictures are drawn in software."""
    commands, answers = folder / "commands", folder / "answers"
    os.mkfifo(commands)
    os.mkfifo(answers)
    flags = [f"--{flag}" for flag in (*_FLAGS, *_QUIET, *_SOFTWARE, f"user-data-dir={folder / 'profile'}")]
    started = ["sh", "-c", 'exec "$@" 3<commands 4>answers', "sh", PROGRAM, *flags, f"--window-size={width},{height}"]
    process = subprocess.Popen(started, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        there, back = os.open(commands, os.O_WRONLY), os.open(answers, os.O_RDONLY)
        try:
            page = Page(there, back)
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            page.call("Emulation.setDeviceMetricsOverride", **metrics)
            yield page
        finally:
            os.close(there)
            os.close(back)
    finally:
        process.terminate()
        process.wait(20)
