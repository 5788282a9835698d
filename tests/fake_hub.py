"""A hub on localhost: repos held in memory, every request noted; enough of it to list and download."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]


@dataclass
class FakeRepo:
    """Commits by hash, revisions (branches, tags) by name."""

    commits: dict[str, Files] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.revisions.get(revision)


def read_directory(directory: Path) -> Files:
    """Return a directory's files, for serving it as a commit."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


class FakeHub:
    """A server, running inside a `with` block; `url` is what HF_ENDPOINT must be."""

    def __init__(self) -> None:
        self.repos: dict[str, FakeRepo] = {}
        self.requests: Counter[tuple[str, str]] = Counter()
        #: Called once, after the request of that path is answered: a test can change the repo in between.
        self.afterwards: dict[str, Callable[[], object]] = {}
        fake = self

        class BoundRequest(_Request):
            hub = fake

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), BoundRequest)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def commit(self, repo_id: str, files: Files | Path, revision: str = "main", *, is_gated: bool = False) -> str:
        """Add a commit, point `revision` at it, and return its hash."""
        repo = self.repos.setdefault(repo_id, FakeRepo(is_gated=is_gated))
        commit = hashlib.sha1(f"{repo_id} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[commit] = read_directory(files) if isinstance(files, Path) else files
        repo.revisions[revision] = commit
        return commit

    def take_requests(self) -> Counter[tuple[str, str]]:
        """Return the count of each (method, path) since the last call, and forget them."""
        taken, self.requests = self.requests, Counter()
        return taken


class _Request(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests[self.command, unquote(path)] += 1
        self._answer([unquote(part) for part in path.strip("/").split("/")])
        self.hub.afterwards.pop(unquote(path), lambda: None)()

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, parts: list[str]) -> None:
        is_listing = parts[:2] == ["api", "models"]
        owner, name, verb, revision, *rest = [*(parts[2:] if is_listing else parts), "", "", "", ""]
        repo = self.hub.repos.get(f"{owner}/{name}")
        commit = repo.resolve(revision) if repo else None
        if repo is None:
            self._refuse(404, "RepoNotFound")
        elif commit is None:
            self._refuse(404, "RevisionNotFound")
        elif is_listing:
            self._list(f"{owner}/{name}", verb, commit)
        elif repo.is_gated:
            self._refuse(401, "GatedRepo")
        else:
            self._send_file(commit, repo.commits[commit], "/".join(filter(None, rest)))

    def _list(self, repo_id: str, verb: str, commit: str) -> None:
        files = self.hub.repos[repo_id].commits[commit]
        reply: object = {
            "id": repo_id,
            "sha": commit,
            "siblings": [{"rfilename": path, "size": len(content)} for path, content in files.items()],
        }
        if verb == "tree":
            reply = [
                {"type": "file", "path": path, "size": len(content), "oid": _etag(content)}
                for path, content in files.items()
            ]
        self._send(200, json.dumps(reply).encode(), {"Content-Type": "application/json"})

    def _send_file(self, commit: str, files: Files, path: str) -> None:
        if path not in files:
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
            return
        self._send(200, files[path], {"X-Repo-Commit": commit, "ETag": f'"{_etag(files[path])}"'})

    def _refuse(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent: a test's output is its own."""


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
