"""A run as a page that follows it, served to this machine only."""

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, final

from learnables.arguments import require_path, require_whole
from learnables.errors import LearnablesError, RunError
from learnables.report.html import content_security_policy, render
from learnables.watching.run import Run
from learnables.watching.sinks.escape import html


@final
class LivePage:
    """Serve a run on localhost; the page draws itself anew when the run goes on.

    Requests that name another host are refused, so that no page of a stranger can read the run
    through the reader's browser (DNS rebinding). Nothing can be written.

    Args:
        path: The run's folder or database.
        port: 0 for any that is free.

    Raises:
        ArgumentError: ``path`` is no path, ``port`` no whole number.
        RunError: The port cannot be had.

    Attributes:
        port: The port it is served on.
        address: The address to open.
    """

    def __init__(self, path: "Path | str", port: int = 0) -> None:
        require_path(path, "path", wanted="the folder of a run", mend='LivePage("runs/run")')
        port = require_whole(port, "port", least=0)
        self._path = Path(path)
        self._lock = threading.Lock()
        self._page, self._drawn, self._cost = "", (0.0, -1), 0.0
        self._closed = threading.Event()
        handler = type("Handler", (_Handler,), {"live": self})
        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        except (OSError, OverflowError) as error:
            raise RunError(
                "the page cannot be served on this port",
                where=f"127.0.0.1:{port}",
                found=str(error),
                wanted="a port that is free, or 0 for any that is",
                mend=f"learnables watch {self._path} --port 0",
            ) from error
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.address = f"http://127.0.0.1:{self.port}/"

    def serve(self) -> None:
        """Answer until `close` is called from another thread, or Ctrl-C."""
        with contextlib.suppress(KeyboardInterrupt):
            self._server.serve_forever(poll_interval=0.2)
        self.close()

    @contextlib.contextmanager
    def running(self) -> Iterator["LivePage"]:
        """Serve from a thread for the length of a ``with``."""
        thread = threading.Thread(target=self.serve, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self.close()

    def close(self) -> None:
        """Let go of the port; open pages keep what they show."""
        self._closed.set()
        self._server.server_close()

    def page(self) -> str:
        """The page as of now; drawn again only where the run has changed."""
        with self._lock:
            now = self.version()
            if now != self._drawn:
                begun = time.perf_counter()
                try:
                    self._page = render(Run(self._path), live=True)
                except LearnablesError as error:
                    self._page = f"<!doctype html><title>…</title><pre>{html(str(error))}</pre>"
                self._drawn, self._cost = now, time.perf_counter() - begun
            return self._page

    def version(self) -> tuple[float, int]:
        """Changes whenever the run is written to."""
        folder = self._path if self._path.is_dir() else self._path.parent
        states = [p.stat() for p in folder.glob("run*.db*") if not p.name.endswith("-shm")]
        return (max([s.st_mtime for s in states] or [0.0]), sum(s.st_size for s in states))

    def changes(self) -> Iterator[bool]:
        """True when there is something new, False every now and then to keep the line open.

        New is what is not on the page as it was last drawn: the run may go on between the moment
        a reader gets the page and the moment that reader listens.
        """
        seen, told = self._drawn, time.monotonic()
        while not self._closed.wait(max(1.0, 5 * self._cost)):  # drawing takes a fifth at most
            now = self.version()
            if now != seen:
                seen, told = now, time.monotonic()
                yield True
            elif time.monotonic() - told > 10:
                told = time.monotonic()
                yield False


class _Handler(BaseHTTPRequestHandler):
    live: LivePage
    server_version, sys_version = "learnables", ""

    def do_GET(self) -> None:
        """The page, its events, or nothing."""
        port = self.live.port
        if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            self._answer(403, "text/plain", "this page is for this machine only")
        elif self.path == "/":
            self._answer(200, "text/html; charset=utf-8", self.live.page())
        elif self.path == "/events":
            self._stream()
        else:
            self._answer(404, "text/plain", "nothing here")

    def _answer(self, status: int, kind: str, text: str) -> None:
        body = text.encode("utf-8", "backslashreplace")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", content_security_policy(live=True))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(b": following\n\n")
            for changed in self.live.changes():
                self.wfile.write(b"data: changed\n\n" if changed else b": still here\n\n")
                self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal shows the run."""
