"""Models travel through the Hugging Face Hub: the library's and the Hub's own code against a loopback server."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from dmvae_lib import DMVAE, DMVAEError

SCRIPT = Path(__file__).with_name("hub_client.py")


class FakeHub(BaseHTTPRequestHandler):
    """One repository; each commit is named by the hash of its files, "main" is the last."""

    commits: dict[str, dict[str, bytes]] = {}
    main = ""

    def do_POST(self):
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else b"".join(self._chunks())
        if self.path == "/api/repos/create":
            self._json({"url": f"http://{self.headers['Host']}/tester/model", "id": "tester/model"})
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._json({"files": [file | {"shouldIgnore": False} for file in files]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            contents = {file["path"]: base64.b64decode(file["content"]) for file in files}
            FakeHub.main = _oid(b"".join(contents.values()))
            FakeHub.commits[FakeHub.main] = contents
            url = f"http://{self.headers['Host']}/tester/model/commit/{FakeHub.main}"
            self._json({"commitUrl": url, "commitOid": FakeHub.main})

    def do_GET(self):
        self._get(body=True)

    def do_HEAD(self):
        self._get(body=False)

    def _get(self, body):
        if found := re.fullmatch(r"/api/models/tester/model/(revision|tree)/(\w+)(\?.*)?", self.path):
            commit = FakeHub.main if found[2] == "main" else found[2]
            if commit not in FakeHub.commits:
                return self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
            files = FakeHub.commits[commit].items()
            tree = [{"type": "file", "path": name, "size": len(held), "oid": _oid(held)} for name, held in files]
            siblings = [{"rfilename": name} for name, _ in files]
            return self._json(
                tree if found[1] == "tree" else {"id": "tester/model", "sha": commit, "siblings": siblings}
            )
        if found := re.fullmatch(r"/tester/model/resolve/(\w+)/(.+)", self.path):
            content = FakeHub.commits[found[1]][found[2]]
            headers = {"X-Repo-Commit": found[1], "ETag": f'"{_oid(content)}"'}
            return self._send(200, content, headers, body)
        self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def _json(self, value, status=200, headers=None):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}), True)

    def _send(self, status, content, headers, body):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def log_message(self, *arguments):
        pass


def _oid(content):
    return hashlib.sha1(content).hexdigest()


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    """What hub_client.py printed, run in a process of its own: the Hub's address is read when it is imported."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path_factory.mktemp("hub")),
        "HF_TOKEN": "a-token-of-no-use",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(SCRIPT.parents[1]),
    }
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_pinned_revision_is_loaded_after_a_later_push(answer):
    assert answer["first"] != answer["second"]
    assert answer["pinned"] == answer["first"]
    assert answer["newest"] == answer["second"]


def test_the_card_names_the_model_and_its_modalities(answer):
    (first, *_) = FakeHub.commits.values()
    card = first["README.md"].decode()
    assert "# DMVAE of audio and video" in card and "library_name: dmvae_lib" in card
    assert set(first) == {"README.md", "config.json", "model.safetensors"}


def test_what_the_hub_lacks_is_named(answer):
    assert "cannot load 'tester/model'" in answer["no revision"] and "0000" in answer["no revision"]
    assert "cannot load 'tester/nothing'" in answer["no repository"]


def test_a_source_that_is_neither_a_folder_nor_a_repository():
    with pytest.raises(DMVAEError, match="no folder here, and the Hub says.*owner/name"):
        DMVAE.from_pretrained("some/folder/that/is/not", {})
