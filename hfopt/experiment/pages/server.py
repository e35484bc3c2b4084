"""The page of all runs below a root, on this machine alone: read only, and closed to other hosts' pages.

A page from elsewhere can make a browser ask 127.0.0.1, under its own name if it points that name here (DNS rebinding).
So a request must name this server as its host, and come from its own page or from none; no header allows others to
read the answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hfopt.experiment.pages import contents
from hfopt.experiment.pages.document import document
from hfopt.experiment.store import catalogue
from hfopt.experiment.store.format import RUN, RunError
from hfopt.experiment.store.lock import is_held
from hfopt.experiment.store.reader import SavedRun, read_run

_LOCAL = "127.0.0.1"


class Server(ThreadingHTTPServer):
    """Serves the runs below `root` on 127.0.0.1.

    Args:
        root: folder of runs; nothing outside it is read, through links neither.
        port: to listen on; 0 for any free one.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, root: Path, port: int = 0) -> None:
        self.root = root.resolve()
        self._kept: dict[Path, tuple[Any, Any]] = {}
        try:
            super().__init__((_LOCAL, port), _Handler)
        except OSError as error:
            raise OSError(f"port {port} cannot be used ({error.strerror}); choose another one with --port") from error
        self.hosts = {f"{name}:{self.server_port}" for name in (_LOCAL, "localhost")}
        if self.server_port == 80:
            self.hosts |= {_LOCAL, "localhost"}

    @property
    def address(self) -> str:
        """What to type into the browser."""
        return f"http://{_LOCAL}:{self.server_port}/"

    def folders(self) -> Iterator[Path]:
        """The runs below the root whose files lie there too."""
        for folder in catalogue.find_runs(self.root):
            if self._inside(folder):
                yield folder

    def entry(self, folder: Path) -> dict[str, Any]:
        """A line of the list; only what has changed is read again."""
        mark = _mark(folder)
        kept = self._kept.get(folder)
        if kept is None or kept[0] != mark:
            name = folder.relative_to(self.root).as_posix()
            try:
                made = contents.status(read_run(folder), name)
            except (RunError, FileNotFoundError) as error:
                made = {"id": name, "name": name, "state": "damaged", "said": str(error)}
            self._kept[folder] = kept = (mark, made)
        found: dict[str, Any] = kept[1]
        return found

    def run(self, name: str) -> SavedRun:
        """The run of a name; FileNotFoundError if there is none below the root."""
        folder = self.root / name
        if "\0" in name or not name or not self._inside(folder) or not (folder / RUN).is_file():
            raise FileNotFoundError(f"there is no run {name!r} here")
        return read_run(folder)

    def _inside(self, folder: Path) -> bool:
        """Whether a folder and all that is in it lie below the root, links followed."""
        try:
            paths = [folder, *folder.iterdir(), *folder.glob("*/*")]
            return all(path.resolve().is_relative_to(self.root) for path in paths)
        except (OSError, RuntimeError, ValueError):  # a circle of links, a name that is none
            return False


def _mark(folder: Path) -> tuple[Any, ...]:
    """What changes when a run does."""
    return (*map(_stamp, sorted([folder / RUN, *folder.glob("journal-*.jsonl")])), is_held(folder))


def _stamp(path: Path) -> tuple[str, int, int]:
    try:
        found = path.stat()
    except OSError:  # a newer journal has taken its place
        return path.name, 0, 0
    return path.name, found.st_mtime_ns, found.st_size


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "hfopt", ""
    timeout = 60

    def do_GET(self) -> None:
        """The page, the list, a run, or its latest rows."""
        refused = self._refused()
        if refused:
            self._answer(HTTPStatus.FORBIDDEN, {"error": refused})
            return
        asked = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(asked.query).items()}
        try:
            if asked.path == "/":
                page = document(f"runs below {self.server.root.name}", {"live": True, "runs": []})
                self._send(HTTPStatus.OK, "text/html; charset=utf-8", page.encode())
            elif asked.path == "/api/runs":
                self._answer(HTTPStatus.OK, {"runs": [self.server.entry(f) for f in self.server.folders()]})
            elif asked.path == "/api/run":
                name = query.get("name", "")
                self._answer(HTTPStatus.OK, contents.contents(self.server.run(name), name))
            elif asked.path == "/api/rows":
                self._answer(HTTPStatus.OK, self._rows(query))
            else:
                raise FileNotFoundError("there is nothing of this name here")
        except FileNotFoundError as error:
            self._answer(HTTPStatus.NOT_FOUND, {"error": str(error)})
        except ValueError as error:
            self._answer(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        except (RunError, OSError) as error:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)})

    do_HEAD = do_GET

    def _rows(self, query: dict[str, str]) -> dict[str, Any]:
        """The rows behind the last one that the page has; `again` if that row is not the run's any more."""
        name = query.get("name", "")
        try:
            after, finished = int(query["after"]), float(query["finished"])
        except (KeyError, ValueError):
            raise ValueError("name a run, the step after which rows are wanted, and when it was finished") from None
        run = self.server.run(name)
        seen = run.steps[run.steps["step"] == after]
        again = after >= 0 and (len(seen) != 1 or float(seen["finished"][0]) != finished)
        return {**contents.status(run, name), "again": again, **({} if again else contents.rows(run, after))}

    def _refused(self) -> str:
        """Why this request is none of this server's own page or of its user; empty if it is."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0].lower() not in self.server.hosts:
            return f"open {self.server.address} itself: no other name leads here"
        origin = self.headers.get("Origin")
        if origin is not None and origin not in {f"http://{host}" for host in self.server.hosts}:
            return "pages of other hosts read nothing here"
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            return "pages of other hosts read nothing here"
        return ""

    def _answer(self, status: HTTPStatus, value: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(value, allow_nan=False, separators=(",", ":")).encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            try:
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError, TimeoutError):
                self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Say nothing: the terminal shows where the page is."""
