"""A server that speaks enough of W&B's protocol for `wandb beta sync`, and keeps what it is sent."""

import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Server(http.server.ThreadingHTTPServer):
    """Keeps what it is sent of one project.

    As W&B's own server does, it tells how many lines of history a run has, and wandb appends to them.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.history: dict[str, list[dict[str, Any]]] = {}  # run id -> lines, each the values of a step
        self.summary: dict[str, dict[str, Any]] = {}
        self.config: dict[str, dict[str, Any]] = {}
        self.files: set[str] = set()
        self.asked: list[str] = []  # paths of all requests

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that hang up: wandb does."""

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "createRunFiles" in query:
            urls = [{"name": name, "uploadUrl": f"{self.address}/file/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": urls}}
        if "createArtifact(" in query:
            sequence = {"id": "sequence", "latestArtifact": None}
            artifact = {"id": "artifact", "state": "PENDING", "artifactSequence": sequence}
            return {"createArtifact": {"artifact": artifact}}
        if "createArtifactManifest(" in query:
            file = {"id": "file", "uploadUrl": f"{self.address}/file/manifest", "uploadHeaders": []}
            return {"createArtifactManifest": {"artifactManifest": {"id": "manifest", "file": file}}}
        if "createArtifactFiles(" in query:
            about = {"uploadHeaders": [], "storagePath": "path", "artifact": {"id": "artifact"}}
            edges = [
                {"node": {"name": name, "uploadUrl": f"{self.address}/file/artifact/{name}", **about}}
                for name in (file["name"] for file in variables["input"]["artifactFiles"])
            ]
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if "commitArtifact(" in query:
            return {"commitArtifact": {"artifact": {"id": "artifact"}}}
        if "upsertBucket" in query:
            run = variables["name"]
            self.config[run] = json.loads(variables.get("config") or "null") or self.config.get(run, {})
            project = {"id": "project", "name": "clbench", "entity": {"id": "entity", "name": "team"}}
            bucket = {"id": "run", "name": run, "displayName": run, "sweepName": None, "project": project}
            bucket["historyLineCount"] = len(self.history.get(run, []))
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        return {"serverInfo": {"features": []}}

    def stream(self, run: str, files: dict[str, Any]) -> None:
        lines = self.history.setdefault(run, [])
        sent = files.get("wandb-history.jsonl", {"offset": len(lines), "content": []})
        lines[sent["offset"] : sent["offset"] + len(sent["content"])] = map(json.loads, sent["content"])
        for text in files.get("wandb-summary.json", {"content": []})["content"]:
            self.summary[run] = json.loads(text)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        self.server.asked.append(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            answer = {"data": self.server.graphql(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(body).get("files") or {})
        elif self.path.startswith("/file/"):
            self.server.files.add(self.path.removeprefix("/file/"))
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_PUT = do_POST

    def log_message(self, *_: object) -> None: ...


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
