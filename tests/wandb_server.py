"""As much of a Weights & Biases server as one run needs: the real package talks to it over HTTP on this machine."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ENTITY = {"id": "e", "name": "house"}


class FakeWandb:
    """Keeps what it is sent: runs by id, with their rows of history, summary, files and artifacts."""

    def __init__(self):
        self.runs: dict[str, dict] = {}
        self.files: dict[str, bytes] = {}
        self.artifacts: list[dict] = []
        self.asked: list[str] = []
        self.hangs = threading.Event()
        self.over = threading.Event()
        handler = type("Handler", (Handler,), {"house": self})
        self.server = Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()

    def stream(self, run: str, files: dict) -> None:
        for name, part in files.items():
            lines = self.runs[run].setdefault(name, [])
            lines[part["offset"] :] = map(json.loads, part["content"])

    def history(self, run: str) -> list[dict]:
        return self.runs[run].get("wandb-history.jsonl", [])

    def summary(self, run: str) -> dict:
        return (self.runs[run].get("wandb-summary.json") or [{}])[-1]

    def query(self, text: str, v: dict) -> dict:
        name = text.split("{")[0].split("(")[0].split()[1]
        self.asked.append(name)
        return getattr(self, name, lambda v: {})(v)

    def RunResumeStatus(self, v: dict) -> dict:
        run = self.runs.get(v["name"])
        rows, events = ((run or {}).get(f"wandb-{name}.jsonl", []) for name in ("history", "events"))
        bucket = run and {
            "id": v["name"], "name": v["name"], "displayName": v["name"], "config": json.dumps(run["config"]),
            "summaryMetrics": json.dumps(self.summary(v["name"])), "logLineCount": 0, "tags": [], "notes": None,
            "historyLineCount": len(rows), "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsLineCount": len(events), "eventsTail": json.dumps([json.dumps(row) for row in events[-1:]]),
            "wandbConfig": '{"t": 1}',
        }  # fmt: skip
        return {"model": {"id": "p", "name": "p", "entity": ENTITY, "bucket": bucket}}

    def UpsertBucket(self, v: dict) -> dict:
        name = v["name"] or v["id"]
        new = name not in self.runs
        run = self.runs.setdefault(name, {"config": {}})
        run["config"] |= json.loads(v.get("config") or "{}")
        bucket = {
            "id": name, "name": name, "displayName": name, "description": "", "config": json.dumps(run["config"]),
            "sweepName": None, "historyLineCount": len(self.history(name)),
            "project": {"id": "p", "name": "p", "entity": ENTITY},
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def CreateRunFiles(self, v: dict) -> dict:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{v['run']}/{name}"} for name in v["files"]]
        return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": files}}

    def Viewer(self, v: dict) -> dict:
        return {"viewer": {"id": "u", "entity": "house", "username": "house", "flags": "{}", "teams": {"edges": []}}}

    def ServerFeaturesQuery(self, v: dict) -> dict:
        return {"serverInfo": {"features": []}}

    def ArtifactType(self, v: dict) -> dict:
        return {"project": {"artifact": None}}

    def CreateArtifact(self, v: dict) -> dict:
        self.artifacts.append(v["input"])
        sequence = {"id": "s", "latestArtifact": None}
        artifact = {"id": f"a{len(self.artifacts)}", "state": "PENDING", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def upload(self, artifact: str, name: str) -> dict:
        place = {"uploadUrl": f"{self.url}/upload/{artifact}/{name}", "uploadHeaders": []}
        return {"id": "f", "name": name, "displayName": name, "storagePath": name, "artifact": {"id": artifact}} | place

    def CreateArtifactManifest(self, v: dict) -> dict:
        manifest = {"id": v["artifactID"], "file": self.upload(v["artifactID"], v["name"])}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def UpdateArtifactManifest(self, v: dict) -> dict:
        manifest = {"id": v["artifactManifestID"], "file": self.upload(v["artifactManifestID"], "manifest.json")}
        return {"updateArtifactManifest": {"artifactManifest": manifest}}

    def CreateArtifactFiles(self, v: dict) -> dict:
        wanted = v["input"]["artifactFiles"]
        edges = [{"node": self.upload(spec["artifactID"], spec["name"])} for spec in wanted]
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def CommitArtifact(self, v: dict) -> dict:
        return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": "d"}}}

    def ArtifactByID(self, v: dict) -> dict:
        made = self.artifacts[int(v["id"][1:]) - 1]
        project = {"id": "p", "internalId": "i", "name": "p", "entity": ENTITY}
        return {
            "artifact": {
                "__typename": "Artifact", "id": v["id"], "versionIndex": 0, "description": None, "metadata": "{}",
                "artifactSequence": {"__typename": "ArtifactSequence", "id": "s", "name": "model", "project": project},
                "artifactType": {"name": made["artifactTypeName"]}, "ttlDurationSeconds": -1, "ttlIsInherited": False,
                "tags": [], "historyStep": 0, "state": "COMMITTED", "size": 1, "digest": "d", "commitHash": "c",
                "fileCount": 1, "createdAt": "2024-01-01T00:00:00Z", "updatedAt": None, "aliases": [],
            }
        }  # fmt: skip


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that leaves is no error."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    house: FakeWandb

    def log_message(self, *text: object) -> None:
        """Nothing is printed."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.house.hangs.is_set():
            self.close_connection = self.house.over.wait()
            return
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            answer = {"data": self.house.query(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.house.stream(self.path.split("/")[4], json.loads(body).get("files") or {})
        elif self.path.startswith("/upload/"):
            self.house.files[self.path.removeprefix("/upload/")] = body
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST
