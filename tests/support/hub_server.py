"""A model hub on this machine: what huggingface_hub's client asks for, and faults on demand."""

import base64
import hashlib
import json
import re
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_test"


@dataclass
class Repository:
    """Commits by their id, each a whole tree, and branches that name one."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    downloads: int = 0

    def commit_id(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None

    @property
    def tags(self) -> set[str]:
        """As the Hub makes them of the model card's metadata."""
        card = self.commits[self.branches["main"]].get("README.md", b"").decode()
        _, _, rest = card.partition("---\n")
        data = yaml.safe_load(rest.partition("---")[0]) or {}
        base = data.get("base_model")
        return {*data.get("tags", ()), *([f"base_model:{base}"] if base else ())}

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        tree = {**self.commits[self.branches[branch]], **files}
        name = hashlib.sha1(f"{len(self.commits)}{sorted(tree)}".encode()).hexdigest()
        self.commits[name], self.branches[branch] = tree, name
        return name


class Hub:
    """The server, in a thread of its own; a context manager.

    Attributes:
        repositories: By ``organisation/name``.
        requests: ``(method, path, Range header)`` of every request.
        faults: For a file name, what happens to its next downloads: a status such as 500, ``"cut"``
            (the connection closes before the end) or ``"flip"`` (the last bit is another).
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = defaultdict(Repository)
        self.requests: list[tuple[str, str, str | None]] = []
        self.faults: dict[str, list[int | str]] = defaultdict(list)
        self.large_files: dict[str, bytes] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo]
        return repository.commits[repository.commit_id(revision)]


_ROUTES = []


def _route(method: str, pattern: str):
    def add(function):
        _ROUTES.append((method, re.compile(pattern + "$"), function))
        return function

    return add


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def handle_any(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for method, pattern, function in _ROUTES:
            match = pattern.match(path)
            if match and self.command in method.split():
                return self._with_repository(function, *match.groups())
        return self.error(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def _with_repository(self, function, repo: str | None = None, *rest: str):
        if repo is None:
            return function(self, *rest)
        known = self.hub.repositories.get(repo)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not allowed and (known is None or known.private):
            return self.error(401, None)
        if known is None:
            return self.error(404, "RepoNotFound")
        return function(self, known, *rest)

    def reply(self, body: bytes, status: int = 200, **headers: str):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, values, status: int = 200):
        self.reply(json.dumps(values).encode(), status, Content_Type="application/json")

    def error(self, status: int, code: str | None, **headers: str):
        if code is not None:
            headers["X_Error_Code"] = code
        self.reply(b"{}", status, **headers)

    def log_message(self, *_):
        pass

    @_route("POST", "/api/repos/create")
    def create(self):
        values = json.loads(self.body)
        repo = f"{values.get('organization') or 'me'}/{values['name']}"
        exists = repo in self.hub.repositories
        if not exists:
            private = values.get("private") or values.get("visibility") == "private"
            self.hub.repositories[repo] = Repository(private=bool(private))
        self.json({"url": f"{self.hub.url}/{repo}"}, 409 if exists else 200)

    @_route("GET", "/api/whoami-v2")
    def whoami(self):
        self.json({"name": "me", "type": "user", "orgs": [], "auth": {}})

    @_route("POST", "/api/validate-yaml")
    def validate(self):
        self.json({"errors": [], "warnings": []})

    @_route("POST", "/api/models/([^/]+/[^/]+)/branch/(.+)")
    def branch(self, repository, name):
        exists = name in repository.branches
        repository.branches.setdefault(name, repository.branches["main"])
        self.json({}, 409 if exists else 200)

    @_route("POST", "/api/models/([^/]+/[^/]+)/preupload/(.+)")
    def preupload(self, repository, revision):
        files = json.loads(self.body)["files"]
        for file in files:
            large = file["path"].endswith((".safetensors", ".bin"))
            file |= {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        self.json({"files": files})

    @_route("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
    def batch(self, repository):
        objects = json.loads(self.body)["objects"]
        for found in objects:
            if found["oid"] not in self.hub.large_files:
                found["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{found['oid']}"}}
        self.json({"transfer": "basic", "objects": objects})

    @_route("PUT", "/lfs/[0-9a-f]+")
    def put(self):
        self.hub.large_files[self.path.removeprefix("/lfs/")] = self.body
        self.reply(b"")

    @_route("POST", "/api/models/([^/]+/[^/]+)/commit/(.+)")
    def commit(self, repository, revision):
        files = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
        commit = repository.commit(revision, files)
        url = f"{self.hub.url}/me/x/commit/{commit}"
        self.json({"commitUrl": url, "commitOid": commit, "success": True})

    @_route("GET", "/api/models")
    def listing(self):
        """Repositories whose cards have all tags that are asked for, most downloaded first."""
        query = parse_qs(urlsplit(self.path).query)
        wanted = {tag for tags in query.get("filter", []) for tag in tags.split(",")}
        found = []
        for name, repository in self.hub.repositories.items():
            if not repository.private and wanted <= repository.tags:
                found.append({"id": name, "downloads": repository.downloads})
        if query.get("sort") == ["downloads"]:
            found.sort(key=lambda model: -model["downloads"])
        self.json(found[: int(query.get("limit", ["1000"])[0])])

    @_route("GET", "/api/models/([^/]+/[^/]+)(?:/revision/(.+))?")
    def info(self, repository, revision):
        commit = repository.commit_id(revision or "main")
        if commit is None:
            return self.error(404, "RevisionNotFound")
        names = [{"rfilename": name} for name in repository.commits[commit]]
        return self.json({"id": "me/x", "sha": commit, "siblings": names, "tags": []})

    @_route("GET", "/api/models/([^/]+/[^/]+)/tree/([^/]+)")
    def tree(self, repository, revision):
        files = repository.commits[repository.commit_id(revision)]
        self.json(
            [
                {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                for name, data in files.items()
            ]
        )

    @_route("GET HEAD", "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
    def resolve(self, repository, revision, name):
        commit = repository.commit_id(revision)
        if commit is None:
            return self.error(404, "RevisionNotFound")
        data = repository.commits[commit].get(name)
        if data is None:
            return self.error(404, "EntryNotFound", X_Repo_Commit=commit)
        headers = {"ETag": f'"{_oid(data)}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        faults = self.hub.faults[name]
        fault = faults.pop(0) if faults and self.command == "GET" else None
        if isinstance(fault, int):
            return self.error(fault, None)
        if fault == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        status = 200
        if start:
            first, size = int(start[1]), len(data)
            data, status = data[first:], 206
            headers["Content_Range"] = f"bytes {first}-{size - 1}/{size}"
        if fault == "cut":
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data[: len(data) * 7 // 8])
            self.close_connection = True
            return None
        return self.reply(data, status, **headers)


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
