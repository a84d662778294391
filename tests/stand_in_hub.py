"""A stand-in for the hub on 127.0.0.1: what huggingface_hub asks of it, no more; and a connection that ends."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_goodtoken"


@dataclass
class Repository:
    """Revisions of a model, each a directory; `access` is open, gated or private."""

    revisions: dict[str, Path]
    access: str = "open"

    def commit(self, revision: str) -> str | None:
        """The commit of a branch or tag, or of itself; None where there is none."""
        commits = {name: hashlib.sha1(name.encode()).hexdigest() for name in self.revisions}
        return commits.get(revision) or next((commit for commit in commits.values() if commit == revision), None)

    def files(self, commit: str) -> dict[str, Path]:
        root = next(path for name, path in self.revisions.items() if self.commit(name) == commit)
        return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}


@dataclass
class Hub:
    """What the stand-in holds. The connection ends where the file `ends_in` would come."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    ends_in: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)  # method, path
    endpoint: str = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            where = urlsplit(self.path)
            hub.asked.append((self.command, where.path))
            parts = [part for part in where.path.split("/") if part]
            listing = parts[:2] == ["api", "models"]
            owner, name, *rest = parts[2:] if listing else parts
            repository = hub.repositories.get(f"{owner}/{name}")
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if repository is None or (repository.access == "private" and not known):
                return self.answer(401 if not known else 404, {"X-Error-Code": "RepoNotFound"})
            if repository.access == "gated" and not known and not listing:
                return self.answer(401, {"X-Error-Code": "GatedRepo"})
            commit = repository.commit(rest[1] if rest else "main")
            if commit is None:
                return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            files = repository.files(commit)
            if not listing:
                return self.send_file(files.get("/".join(rest[2:])), commit)
            if rest[:1] == ["tree"]:
                sizes = {name: path.stat().st_size for name, path in files.items()}
                entries = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
                return self.answer(200, {}, entries)
            entries = [{"rfilename": name} for name in files]
            return self.answer(200, {}, {"id": f"{owner}/{name}", "sha": commit, "siblings": entries})

        do_HEAD = do_GET

        def send_file(self, path: Path | None, commit: str) -> None:
            if path is None:
                return self.answer(404, {"X-Error-Code": "EntryNotFound"})
            data = path.read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit}
            self.answer(200, headers, data, ends=path.name == hub.ends_in)

        def answer(self, status: int, headers: dict[str, str], content: Any = None, *, ends: bool = False) -> None:
            content = {"error": "no"} if content is None else content
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if ends:
                self.close_connection = True
            elif self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
