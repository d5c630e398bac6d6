"""A stand-in for the Hub on loopback: repositories in memory, behind the Hub's HTTP API."""

import base64
import hashlib
import json
import os
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

BRANCH = "main"


class HubServer(ThreadingHTTPServer):
    """Repositories by `kind/owner/name`; each is a list of commits, a commit a dict of path -> content.

    Args:
        failures: answers to give once each, to the next request that matches: (method, pattern of the path, status).
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.objects: dict[str, bytes] = {}  # of large files
        self.failures: list[tuple[str, str, int]] = []
        self.requests: list[tuple[str, str, int]] = []  # method, path, status
        self.settings: dict[str, dict] = {}  # what each repository was created with
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def files(self, name: str, kind: str = "models") -> dict[str, bytes]:
        """The files of the last commit."""
        return self.repositories[f"{kind}/{name}"][-1]

    def environment(self, home) -> dict[str, str]:
        """The environment of a process that takes this server for the Hub."""
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH", "LANG")}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_test",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
        }


class HubRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self):
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            status, headers, content = self.failure(path) or self.answer(path, body)
            self.server.requests.append((self.command, path, status))
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def failure(self, path):
        for failure in self.server.failures:
            method, pattern, status = failure
            if self.command == method and re.search(pattern, path):
                self.server.failures.remove(failure)
                return status, {}, b"try again"
        return None

    def answer(self, path, body):
        for method, pattern, handler in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                return getattr(self, handler)(*match.groups(), body=body)
        return missing("EntryNotFound")

    def create(self, body):
        request = json.loads(body)
        kind = f"{request.get('type', 'model')}s"
        name = f"{request['organization'] or 'me'}/{request['name']}"
        prefix = "" if kind == "models" else f"{kind}/"
        url = {"url": f"{self.server.url}/{prefix}{name}"}
        if f"{kind}/{name}" in self.server.repositories:
            return as_json(url | {"error": "You already created this repo"}, 409)
        self.server.repositories[f"{kind}/{name}"] = [{}]
        self.server.settings[f"{kind}/{name}"] = request
        return as_json(url)

    def validate(self, body):
        """Check the metadata of a card as far as its form is public: YAML, and the types of some fields."""
        match = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        data = yaml.safe_load(match[1]) if match else None
        errors = [] if isinstance(data, dict) else ["the card must start with metadata in YAML"]
        for name, kinds in {"tags": list, "datasets": list, "model-index": list, "base_model": str | list}.items():
            if not errors and not isinstance(data.get(name), kinds | None):
                errors.append(f"{name} must be {kinds}")
        return as_json({"errors": [{"message": error} for error in errors], "warnings": []})

    def preupload(self, repository, body):
        files = json.loads(body)["files"]
        modes = ("lfs" if re.search(r"\.(safetensors|png|pt|pth|bin)$", file["path"]) else "regular" for file in files)
        answers = [
            {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            for file, mode in zip(files, modes, strict=True)
        ]
        return as_json({"files": answers})

    def batch(self, repository, body):
        objects = []
        for item in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/objects/{item['oid']}"}}
            objects.append(item | ({} if item["oid"] in self.server.objects else {"actions": upload}))
        return as_json({"transfer": "basic", "objects": objects})

    def put_object(self, oid, body):
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {}, b"wrong checksum"
        self.server.objects[oid] = body
        return 200, {}, b""

    def commit(self, repository, body):
        commits = self.server.repositories[repository]
        files = dict(commits[-1])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        commits.append(files)
        oid = self.oid(repository)
        url = f"{self.server.url}/{repository.removeprefix('models/')}/commit/{oid}"
        return as_json({"commitUrl": url, "commitOid": oid, "pullRequestUrl": None})

    def info(self, repository, body):
        if repository not in self.server.repositories:
            return missing("RepoNotFound")
        files = self.server.repositories[repository][-1]
        name = repository.split("/", 1)[1]
        return as_json({"id": name, "sha": self.oid(repository), "siblings": [{"rfilename": path} for path in files]})

    def tree(self, repository, folder, body):
        if repository not in self.server.repositories:
            return missing("RepoNotFound")
        files = self.server.repositories[repository][-1]
        inside = [path for path in files if not folder or path.startswith(f"{folder}/")]
        if folder and not inside:
            return missing("EntryNotFound")
        return as_json([{"type": "file", "path": p, "size": len(files[p]), "oid": digest(files[p])} for p in inside])

    def resolve(self, repository, path, body):
        repository = repository if repository.startswith(("datasets/", "spaces/")) else f"models/{repository}"
        if repository not in self.server.repositories:
            return missing("RepoNotFound")
        content = self.server.repositories[repository][-1].get(path)
        if content is None:
            status, headers, text = missing("EntryNotFound")
            return status, headers | {"X-Repo-Commit": self.oid(repository)}, text
        return 200, {"X-Repo-Commit": self.oid(repository), "ETag": f'"{digest(content)}"'}, content

    def oid(self, repository):
        return f"{len(self.server.repositories[repository]):040x}"

    def log_message(self, *args):
        pass


REPOSITORY = r"/api/((?:models|datasets|spaces)/[^/]+/[^/]+)"
ROUTES = [
    (("POST",), r"/api/repos/create", "create"),
    (("POST",), r"/api/validate-yaml", "validate"),
    (("POST",), rf"{REPOSITORY}/preupload/{BRANCH}", "preupload"),
    (("POST",), rf"{REPOSITORY}/commit/{BRANCH}", "commit"),
    (("POST",), r"/(.+)\.git/info/lfs/objects/batch", "batch"),
    (("PUT",), r"/objects/(\w+)", "put_object"),
    (("GET", "HEAD"), rf"{REPOSITORY}/tree/[^/]+(?:/(.+))?", "tree"),
    (("GET", "HEAD"), rf"{REPOSITORY}(?:/revision/[^/]+)?", "info"),
    (("GET", "HEAD"), r"/((?:datasets/|spaces/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", "resolve"),
]


def as_json(value, status=200):
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def missing(code):
    return 404, {"X-Error-Code": code}, b"not found"


def digest(content):
    return hashlib.sha1(content).hexdigest()


@contextmanager
def running_hub():
    """A server that answers while the context lasts."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
