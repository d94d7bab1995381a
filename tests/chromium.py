"""A headless Chromium for tests, over its debugging protocol."""

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time

import httpx
import pytest


class Page:
    """A page: evaluates JavaScript, clicks, and collects what its console and its log say."""

    def __init__(self, socket):
        self.socket, self.numbers, self.said = socket, itertools.count(1), []

    def call(self, method, **parameters):
        """The result of a command."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.said.append(message["params"])
            if message.get("id") == number:
                return message["result"]

    def value(self, expression):
        """What an expression of JavaScript is."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)["result"].get("value")

    def wait_for(self, expression, seconds=60):
        """Waits until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < deadline, expression
            time.sleep(0.05)

    def click(self, selector):
        """Clicks in the middle of an element, as a mouse does."""
        box = f"JSON.stringify(document.querySelector('{selector}').getBoundingClientRect())"
        at = json.loads(self.value(box))
        where = {"x": at["x"] + at["width"] / 2, "y": at["y"] + at["height"] / 2, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **where)

    def screenshot(self):
        """The page as a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])


@contextlib.contextmanager
def page(folder, url):
    """A page that shows a URL; skips where there is no Chromium."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    websocket = pytest.importorskip("websocket", reason="websocket-client")
    if binary is None:
        pytest.skip("no Chromium")
    flags = "--headless=new --no-sandbox --disable-gpu --remote-debugging-port=0 --window-size=1000,800 --mute-audio".split()
    command = [binary, *flags, "--remote-allow-origins=*", f"--user-data-dir={folder}", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
        try:
            chosen, deadline = folder / "DevToolsActivePort", time.monotonic() + 60
            while not chosen.exists() or not chosen.read_text():
                assert time.monotonic() < deadline, "Chromium does not start"
                time.sleep(0.1)
            targets = httpx.get(f"http://127.0.0.1:{chosen.read_text().split()[0]}/json").json()
            socket = websocket.create_connection(
                next(t for t in targets if t["type"] == "page")["webSocketDebuggerUrl"], timeout=60
            )
            shown = Page(socket)
            for domain in ("Page", "Runtime", "Log"):
                shown.call(f"{domain}.enable")
            shown.call("Page.navigate", url=url)
            yield shown
            socket.close()
        finally:
            browser.kill()
