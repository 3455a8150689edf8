"""A real browser without a screen, for tests: Chromium, spoken to by its DevTools protocol."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import websocket  # of jupyter_server

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One tab. `with Browser(folder) as tab: tab.open(page, 390)`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.number = folder, [], 0

    def __enter__(self) -> "Browser":
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--remote-debugging-port=0",
            "--hide-scrollbars",
        ]
        flags += ["--disable-dev-shm-usage", f"--user-data-dir={self.folder}", "--remote-allow-origins=*"]
        self.process = subprocess.Popen([CHROMIUM, *flags, "about:blank"], stderr=subprocess.DEVNULL)
        began = time.time()
        while not (tabs := self.tabs()):
            assert self.process.poll() is None and time.time() - began < 60, "Chromium doesn't start"
            time.sleep(0.05)
        self.socket = websocket.create_connection(tabs[0]["webSocketDebuggerUrl"], timeout=60)
        for domain in ("Page", "Network", "Runtime"):
            self.do(f"{domain}.enable")
        return self

    def tabs(self) -> list[dict]:
        """Chromium's pages; none as long as it starts."""
        port = self.folder / "DevToolsActivePort"
        if not (port.exists() and port.read_text().count("\n")):
            return []
        address = f"http://127.0.0.1:{port.read_text().splitlines()[0]}/json"
        with suppress(OSError):
            return [tab for tab in json.load(urllib.request.urlopen(address)) if tab["type"] == "page"]
        return []

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)

    def do(self, method: str, **params: object) -> dict:
        """A command's answer; addresses that the page asks for are kept on the way."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            said = json.loads(self.socket.recv())
            if said.get("method") == "Network.requestWillBeSent":
                self.asked.append(said["params"]["request"]["url"])
            if said.get("id") == self.number:
                assert "error" not in said, said
                return said["result"]

    def open(self, page: Path, width: int, *, dark: bool = False, media: str = "screen") -> None:
        """Load a page in a window of that width."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.do("Emulation.setEmulatedMedia", media=media, features=scheme)
        self.asked.clear()
        self.do("Page.navigate", url=page.resolve().as_uri())
        while self.js("document.readyState") != "complete":
            time.sleep(0.02)

    def js(self, expression: str) -> object:
        """The value of an expression in the page."""
        return self.do("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def press(self, key: str) -> None:
        """A key, down and up."""
        code = {"Tab": 9, "Enter": 13, " ": 32}[key]
        text = {"Enter": "\r", " ": " "}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            self.do(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=code,
                **({"text": text} if text and kind == "keyDown" else {}),
            )

    def picture(self, path: Path, whole: bool = True) -> None:
        """A PNG of the page."""
        data = self.do("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
