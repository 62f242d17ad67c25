"""A stand-in for the Hugging Face Hub: what `huggingface_hub` asks of it to download."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.repos`: (kind, name) -> {commit: {path: bytes}}, the newest commit last."""

    def do_GET(self):
        self.server.requests.append(self.path)
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        kind, name, what, revision, rest = self._split(path)
        commits = self.server.repos.get((kind, name))
        if commits is None:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        commit = list(commits)[-1] if revision in ("", "main") else revision
        if commit not in commits:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = commits[commit]
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self._json({"id": name, "sha": commit, "siblings": siblings})
        if what == "tree":
            return self._json(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": self._etag(data)}
                    for path, data in files.items()
                ]
            )
        if rest not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{self._etag(files[rest])}"'}
        self._send(200, files[rest], headers)

    do_HEAD = do_GET

    def _split(self, path):
        """Returns kind, name, what is asked for, the revision, and the path in the repository."""
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            kind = parts[1]
            name = "/".join(parts[2:4])
            what = parts[4] if len(parts) > 4 else "revision"
            return kind, name, what, "/".join(parts[5:6]), ""
        kind = "datasets" if parts[0] == "datasets" else "models"
        parts = parts[kind == "datasets" :]
        return kind, "/".join(parts[:2]), "resolve", parts[3], "/".join(parts[4:])

    def _etag(self, data):
        return hashlib.sha1(data).hexdigest()

    def _json(self, value):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status, body, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve(repos):
    """Yields a running server; `url`, `repos` and `requests` are its attributes."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repos = repos
    server.requests = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
