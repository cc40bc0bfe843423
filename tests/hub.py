"""A hub of one data set on this machine, so that the real loading code is tested without a network."""

import hashlib
import http.server
import json
import threading
from contextlib import contextmanager
from urllib.parse import unquote, urlparse


@contextmanager
def hub(repo, revisions):
    """Serves ``repo`` (org/name); ``revisions``: name -> {file name: bytes}. Yields its address."""
    shas = {name: hashlib.sha1(name.encode()).hexdigest() for name in revisions}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            headers.setdefault("Content-Length", len(body))
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def say(self, found):
            self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

        def files(self, revision):
            name = next((n for n, sha in shas.items() if revision in (n, sha)), None)
            return None if name is None else (shas[name], revisions[name])

        def entry(self, name, content):
            oid = hashlib.sha1(content).hexdigest()
            return {"type": "file", "path": name, "size": len(content), "oid": oid}

        def respond(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlparse(self.path).path)
            for prefix in (f"/api/datasets/{repo}/", f"/datasets/{repo}/"):
                if path.startswith(prefix):
                    verb, _, rest = path.removeprefix(prefix).partition("/")
                    revision, _, name = rest.partition("/")
                    break
            else:
                verb, revision, name = ("revision", "main", "") if path == f"/api/datasets/{repo}" else ("", "", "")
            found = self.files(revision)
            if found is None:
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound" if verb else "RepoNotFound")
            sha, files = found
            if verb == "revision":
                return self.say(
                    {"id": repo, "sha": sha, "siblings": [{"rfilename": n} for n in files], "private": False}
                )
            if verb == "tree":
                return self.say([self.entry(n, c) for n, c in files.items() if n.startswith(name)])
            if verb == "paths-info":
                asked = json.loads(body)["paths"] if body[:1] == b"{" else []
                return self.say([self.entry(n, files[n]) for n in asked if n in files])
            if verb == "resolve" and name in files:
                content = files[name]
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                if (part := self.headers.get("Range")) and self.command == "GET":
                    first, _, last = part.removeprefix("bytes=").partition("-")
                    end = min(int(last or len(content) - 1), len(content) - 1)
                    shown = f"bytes {first}-{end}/{len(content)}"
                    return self.answer(
                        206, content[int(first) : end + 1], ETag=etag, X_Repo_Commit=sha, Content_Range=shown
                    )
                return self.answer(200, content, ETag=etag, X_Repo_Commit=sha, Accept_Ranges="bytes")
            return self.answer(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)

        do_GET = do_HEAD = do_POST = respond

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
