"""A stand-in for the W&B server on loopback: what wandb 0.31 asks for in an online run, a resumed run and ``wandb sync``,
what ``wandb.Api`` asks to read a project, and what wandb-workspaces 0.4 asks to save a view.

``file_stream`` lines go to the offset they are sent with, as on the real server: what is sent again replaces what was there.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "k" * 40


def use(monkeypatch, home, url: str | None = None):
    """Make wandb use this server with a key, or none of both, and keep it out of the user's home."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(home / name))
    if url is not None:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)


def forget():
    """Let the next run read the settings anew, which wandb does once in a process."""
    if "wandb" in sys.modules:
        with contextlib.suppress(ConnectionError):  # its process was killed
            sys.modules["wandb"].teardown()


class Server:
    """``with Server() as server``: ``server.url``, ``server.runs[id]``; ``server.behaviour`` changes what it does from then on.

    behaviour: "serve"; "hang" takes every request and never answers; an int answers each with that HTTP status;
    "lose" answers all but the metrics, which get 403.
    """

    def __init__(self, behaviour: str | int = "serve"):
        self.behaviour = behaviour
        self.runs: dict[str, Run] = {}
        self.views: dict[str, dict] = {}
        self.alerts: list[dict] = []
        self.operations: list[str] = []
        self.released = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_state": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.released.set()
        self._http.shutdown()
        self._http.server_close()

    def run(self, name: str) -> Run:
        return self.runs.setdefault(name, Run())


class Run:
    """What the server holds of one run."""

    def __init__(self):
        self.info: dict = {}
        self.config: dict = {}
        self.files: dict[str, bytes] = {}
        self.lines: dict[str, dict[int, str]] = {}
        self.exit_code: int | None = None

    def stream(self, files: dict) -> None:
        for name, chunk in files.items():
            at = self.lines.setdefault(name, {})
            at.update({chunk["offset"] + i: line for i, line in enumerate(chunk["content"])})

    @property
    def history(self) -> list[dict]:
        return [json.loads(line) for _, line in sorted(self.lines.get("wandb-history.jsonl", {}).items())]

    @property
    def steps(self) -> list[int]:
        return [row["_step"] for row in self.history]

    @property
    def summary(self) -> dict:
        lines = self.lines.get("wandb-summary.json", {})
        return json.loads(lines[max(lines)]) if lines else {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: Server

    def log_message(self, *args):
        pass

    def _answer(self, value, status: int = 200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _handle(self):
        state = self.server_state
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if state.behaviour == "hang":
            state.released.wait()
            self.close_connection = True
        elif isinstance(state.behaviour, int):
            self._answer({"errors": [{"message": "no"}]}, state.behaviour)
        elif self.path.endswith("/file_stream"):
            self._stream(json.loads(body))
        elif self.command == "PUT":
            _, _, name, path = self.path.split("/", 3)
            state.run(name).files[path] = body
            self._answer({})
        elif self.path == "/graphql":
            self._answer({"data": self._operation(json.loads(body))})
        else:
            self._answer({})

    def handle(self):
        with contextlib.suppress(ConnectionError):  # clients that are killed, or give up
            super().handle()

    do_GET = do_PUT = do_POST = _handle

    def _stream(self, sent):
        if self.server_state.behaviour == "lose":
            return self._answer({"error": "no"}, 403)
        run = self.server_state.run(self.path.split("/")[-2])
        run.stream(sent.get("files") or {})
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")
        return self._answer({"exitcode": None, "limits": {}})

    def _operation(self, request):
        query, variables = request.get("query", ""), request.get("variables") or {}
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = request.get("operationName") or (found[1] if found else "?")
        self.server_state.operations.append(operation)
        return _ANSWERS.get(operation, lambda *_: {})(self, variables)

    def _viewer(self, variables):
        viewer = {"id": "1", "entity": "me", "username": "me", "name": "me", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer, "serverInfo": {"features": []}}

    def _upsert(self, variables):
        name = variables["name"]
        new = name not in self.server_state.runs
        run = self.server_state.run(name)
        run.info |= {k: v for k, v in variables.items() if v is not None}
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        project = {"id": "p", "name": variables.get("project"), "entity": {"id": "e", "name": "me"}}
        bucket = {
            "id": name,
            "name": name,
            "displayName": run.info.get("displayName") or name,
            "config": json.dumps(run.config),
            "historyLineCount": len(run.history),
            "project": project,
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def _resume(self, variables):
        run = self.server_state.runs.get(variables["name"])
        bucket = None
        if run is not None:
            tail = list(run.lines.get("wandb-history.jsonl", {}).values())[-1:]
            bucket = {
                "id": variables["name"],
                "name": variables["name"],
                "summaryMetrics": json.dumps(run.summary),
                "displayName": run.info.get("displayName"),
                "logLineCount": 0,
                "historyLineCount": len(run.history),
                "eventsLineCount": 0,
                "historyTail": json.dumps(tail),
                "eventsTail": "[]",
                "config": json.dumps(run.config),
                "tags": run.info.get("tags") or [],
                "notes": None,
                "wandbConfig": json.dumps({"t": 1}),
            }
        return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}, "bucket": bucket}}

    def _run_files(self, variables):
        host, run = f"http://{self.headers['Host']}", variables.get("run")
        files = [{"name": name, "uploadUrl": f"{host}/upload/{run}/{name}"} for name in variables.get("files", [])]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    def _artifact_type(self, variables):
        return {"project": {"artifact": None}}

    def _artifact(self, variables):
        artifact = {"id": "1", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def _alert(self, variables):
        self.server_state.alerts.append(variables)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _save_view(self, variables):
        views = self.server_state.views
        new = variables["name"] not in views
        views[variables["name"]] = variables
        return {"upsertView": {"view": {"id": f"V{variables['name']}", "name": variables["name"]}, "inserted": new}}

    def _view(self, variables):
        view = self.server_state.views.get(variables["viewName"])
        node = {"id": "V", "displayName": view["displayName"], "spec": view["spec"]} if view else None
        return {"project": {"allViews": {"edges": [{"node": node}] if node else []}}}

    def _runs(self, variables):
        group = json.loads(variables["filters"]).get("group")
        found = {
            name: run for name, run in self.server_state.runs.items() if group in (None, run.info.get("groupName"))
        }
        nodes = [{"node": {"projectId": 1, **_node(name, run)}, "cursor": name} for name, run in found.items()]
        runs = {"edges": nodes, "pageInfo": {"endCursor": None, "hasNextPage": False}}
        there = variables["project"] in {run.info.get("project") for run in self.server_state.runs.values()}
        return {
            "project": {"internalId": "1", "runCount": len(nodes), "readOnly": False, "runs": runs} if there else None
        }

    def _keys(self, variables):
        run = self.server_state.runs[variables["name"]]
        return {"project": {"run": {"historyKeys": _node(variables["name"], run)["historyKeys"]}}}

    def _live(self, variables):
        live = [{"_step": step} for step in self.server_state.runs[variables["runName"]].steps]
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": live}}}}

    def _history(self, variables):
        rows = self.server_state.runs[variables["run"]].history
        page = [row for row in rows if variables["minStep"] <= row["_step"] < variables["maxStep"]]
        page = [{k: "NaN" if v != v else v for k, v in row.items()} for row in page]  # as W&B writes it
        return {"project": {"run": {"history": [json.dumps(row) for row in page]}}}


def _node(name: str, run: Run) -> dict:
    return {
        "id": name,
        "name": name,
        "displayName": run.info.get("displayName"),
        "group": run.info.get("groupName"),
        "tags": run.info.get("tags") or [],
        "state": {None: "running", 0: "finished"}.get(run.exit_code, "failed"),
        "config": json.dumps(run.config),
        "summaryMetrics": json.dumps(run.summary),
        "systemMetrics": "{}",
        "historyLineCount": len(run.history),
        "historyKeys": {"lastStep": max(run.steps, default=0), "keys": {}},
        "createdAt": "2026-01-01T00:00:00",
        "user": {"name": "me", "username": "me"},
    }


_ANSWERS = {
    "GetDefaultEntity": _Handler._viewer,
    "NotifyScriptableRunAlert": _Handler._alert,
    "UpsertView2": _Handler._save_view,
    "View": _Handler._view,
    "Runs": _Handler._runs,
    "RunHistoryKeys": _Handler._keys,
    "RunParquetHistory": _Handler._live,
    "HistoryPage": _Handler._history,
    "Viewer": _Handler._viewer,
    "ServerFeaturesQuery": _Handler._viewer,
    "UpsertBucket": _Handler._upsert,
    "RunResumeStatus": _Handler._resume,
    "CreateRunFiles": _Handler._run_files,
    "ArtifactType": _Handler._artifact_type,
    "CreateArtifact": _Handler._artifact,
}
