"""A headless Chromium, driven over its debugging pipe: what a page does, as the browser sees it."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
MISSING = "Chromium is not installed: apt-get install chromium"


class Tab:
    """One page. `asked`, `errors` and `dialogs` fill while it loads and runs."""

    def __init__(self, writes: int, reads: int) -> None:
        self._writes, self._reads, self._number, self._rest = writes, reads, 0, b""
        self._session: str | None = None
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.dialogs: list[str] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> Any:
        """Send a command of the DevTools protocol and wait for its answer."""
        self._number += 1
        mine = self._number  # an answer to a dialog may take a number in between
        message = {"id": mine, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while True:
            got = self._next(60.0)
            assert got is not None, f"Chromium does not answer {method}"
            if got.get("id") == mine:
                assert "error" not in got, got
                return got["result"]

    def go(self, address: str) -> None:
        """Open a page and wait until its script has drawn it."""
        self("Page.navigate", url=address)
        self.wait("document.documentElement.dataset.drawn === 'yes'")

    def run(self, script: str) -> Any:
        """What an expression is in the page."""
        return self("Runtime.evaluate", expression=script, returnByValue=True)["result"].get(
            "value"
        )

    def wait(self, script: str, seconds: float = 30.0) -> None:
        """Until an expression is true in the page."""
        until = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < until, f"never true: {script}\n{self.errors}"
            time.sleep(0.05)

    def _next(self, seconds: float) -> dict[str, Any] | None:
        until = time.monotonic() + seconds
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reads], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return None
            self._rest += os.read(self._reads, 1 << 20)
        raw, self._rest = self._rest.split(b"\0", 1)
        got: dict[str, Any] = json.loads(raw)
        self._note(got.get("method"), got.get("params", {}))
        return got

    def _note(self, method: str | None, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.errors.append(str(params["args"]))
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])
            self._number += 1
            answer = {"id": self._number, "method": "Page.handleJavaScriptDialog"}
            answer |= {"params": {"accept": False}, "sessionId": self._session}
            os.write(self._writes, json.dumps(answer).encode() + b"\0")


@contextlib.contextmanager
def tab(folder: Path) -> Iterator[Tab]:
    """A new browser with an empty page; its profile goes into ``folder``."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()

    def at_3_and_4() -> None:
        spare = os.dup(theirs_out)  # 3 may be what is now called theirs_out
        os.dup2(theirs_in, 3)
        os.dup2(spare, 4)
        for descriptor in (3, 4):  # dup2 onto itself would leave it to be closed at exec
            os.set_inheritable(descriptor, True)

    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}", "about:blank"]
    browser = subprocess.Popen(
        command,
        preexec_fn=at_3_and_4,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Tab(ours_out, ours_in)
    finally:
        browser.terminate()
        browser.wait(20)
        os.close(ours_out)
        os.close(ours_in)
