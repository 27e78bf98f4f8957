"""A stand-in for the Hub's API, as far as huggingface_hub needs it to push and to fetch, in memory."""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

LARGE = (".safetensors", ".gguf", "tokenizer.json")
TOKEN = "hf_" + "aB3dE5gH7j" * 3

Answer = tuple[int, dict[str, Any]]


@dataclass
class Repo:
    """One repository: its files as they stand, and the titles of its commits."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: list[str] = field(default_factory=lambda: ["initial commit"])

    @property
    def head(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


@dataclass
class Hub:
    """The state of the stand-in.

    Attributes:
        account: what ``whoami`` answers.
        repos: by name.
        stored: contents of large-file storage by sha256, committed or not.
        requests: method and path of every request, in order.
        fail: may answer a request instead of the stand-in.
    """

    account: dict[str, Any] = field(
        default_factory=lambda: {
            "type": "user",
            "name": "jane",
            "orgs": [{"name": "acme", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}],
            "auth": {"accessToken": {"role": "write"}},
        }
    )
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    fail: Callable[[str, str], Answer | None] = lambda method, path: None

    def wrote(self) -> bool:
        """Whether any request could have changed something."""
        return any(method not in ("GET", "HEAD") for method, _ in self.requests)

    def uploads(self) -> list[str]:
        """The sha256 of every large file whose content was sent."""
        return [path.removeprefix("/lfs/") for method, path in self.requests if method == "PUT" and "/lfs/" in path]

    def download(self, name: str, folder: Path) -> Path:
        """Write a repository's files to a folder."""
        for path, content in self.repos[name].files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return folder


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: two would wait 40 ms for each other
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def handle_one(self) -> None:
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path))
        failure = self.hub.fail(self.command, path)
        if failure is not None:
            self.answer(*failure)
        elif path.startswith("/lfs/"):
            self.hub.stored[path.removeprefix("/lfs/")] = body
            self.answer(200, {})
        elif path == "/":
            self.answer(200, {})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        elif path == "/api/whoami-v2":
            self.answer(200, self.hub.account)
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        else:
            self.about_repo(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one  # noqa: N815

    def create(self, wish: dict[str, Any]) -> None:
        name = f"{wish['organization']}/{wish['name']}"
        if name in self.hub.repos:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        self.hub.repos[name] = Repo(private=wish["visibility"] == "private")
        self.answer(200, {"url": f"{self.hub.url}/{name}"})

    def about_repo(self, path: str, body: bytes) -> None:
        found = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(\.git)?(?:/(.*))?", path)
        assert found is not None, path
        repo, rest = self.hub.repos.get(found[1]), found[3] or ""
        if repo is None:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif rest.startswith("resolve/"):
            self.resolve(repo, rest.split("/", 2)[2])
        elif rest.startswith("tree/"):
            self.answer(200, tree(repo))
        elif rest.startswith("preupload/"):
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": mode(name), "shouldIgnore": False, "oid": None} for name in names]
            self.answer(200, {"files": files})
        elif rest == "info/lfs/objects/batch":
            self.answer(200, {"transfer": "basic", "objects": [self.wanted(o) for o in json.loads(body)["objects"]]})
        elif rest.startswith("commit/"):
            self.commit(repo, [json.loads(line) for line in body.splitlines()], found[1])
        elif rest == "settings":
            repo.private = json.loads(body)["visibility"] == "private"
            self.answer(200, {})
        elif rest == "auth-check/write":
            self.answer(200, {})
        else:
            self.answer(200, {"id": found[1], "sha": repo.head, "private": repo.private, "siblings": siblings(repo)})

    def wanted(self, item: dict[str, Any]) -> dict[str, Any]:
        """What the client has to do for a large file: nothing if its content is stored."""
        if item["oid"] in self.hub.stored:
            return item
        return item | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}

    def commit(self, repo: Repo, lines: list[dict[str, Any]], name: str) -> None:
        header, changes = lines[0]["value"], lines[1:]
        if header.get("parentCommit") not in (None, repo.head):
            self.answer(412, {"error": "the repository has changed"})
            return
        for change in changes:
            value = change["value"]
            if change["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.stored[value["oid"]]
            else:
                del repo.files[value["path"]]
        repo.commits.append(header["summary"])
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{repo.head}", "commitOid": repo.head})

    def resolve(self, repo: Repo, name: str) -> None:
        content = repo.files.get(name)
        if content is None:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        etag = hashlib.sha256(content).hexdigest() if mode(name) == "lfs" else git_hash(content)
        self.send(200, content, {"X-Repo-Commit": repo.head, "ETag": f'"{etag}"'})

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(body).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def mode(name: str) -> str:
    """How the Hub stores a file."""
    return "lfs" if name.endswith(LARGE) else "regular"


def git_hash(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def siblings(repo: Repo) -> list[dict[str, Any]]:
    """The files of a repository as ``model_info`` lists them."""
    found = []
    for name, content in repo.files.items():
        entry = {"rfilename": name, "size": len(content), "blobId": git_hash(content)}
        if mode(name) == "lfs":
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        found.append(entry)
    return found


def tree(repo: Repo) -> list[dict[str, Any]]:
    """The same as ``list_repo_tree`` lists them."""
    found = []
    for file in siblings(repo):
        entry = {"type": "file", "path": file["rfilename"], "size": file["size"], "oid": file["blobId"]}
        if lfs := file.get("lfs"):
            entry["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
        found.append(entry)
    return found


@contextmanager
def serving() -> Iterator[Hub]:
    """A stand-in that answers at ``hub.url``."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
