"""Notebook 12 in a browser: it opens on published weights without training, and what is moved and typed is answered."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import nbformat
import pytest
import torch
from browser import Page, chromium, needs_chromium, soon

from dmvae_lib.pairing import PairedData
from dmvae_lib.paper.data import Splits
from dmvae_lib.paper.profiles import SMOKE
from dmvae_lib.paper.rows.digits import DMVAE_ROW
from dmvae_lib.paper.rows.flowers import FLOWER_DMVAE

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"mnist": (1, 28, 28), "svhn": (3, 32, 32)}, {"image": (320,), "text": (30, 128)}
TOKEN = "a-token-of-this-test"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose notebook is of profile smoke, with untrained models published for it."""
    root = tmp_path_factory.mktemp("project")
    notebook = nbformat.read(ROOT / "notebooks" / "12_explorer.ipynb", as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.tags:
            cell.source = cell.source.replace('"quick"', '"smoke"')
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (root / "notebooks").mkdir()
    nbformat.write(notebook, root / "notebooks" / "12_explorer.ipynb")
    (root / "Makefile").touch()
    for name, row, shapes in zip(("dmvae-mnist-svhn", "dmvae-flowers"), (DMVAE_ROW, FLOWER_DMVAE), SHAPES):
        pairs = PairedData.aligned({n: torch.zeros(40, *shape) for n, shape in shapes.items()}, torch.arange(40))
        torch.manual_seed(0)
        row.model(Splits(pairs, pairs, {}, "embedded", {"scale": 1.0}), SMOKE).save(
            root / "results" / "smoke" / "models" / name
        )
    return root


@pytest.fixture(scope="module")
def lab(project):
    """The address of a JupyterLab on the project's notebooks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={TOKEN}"]
    options += ["--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={project / 'notebooks'}"]
    options += ["--allow-root"] if os.name == "posix" and os.getuid() == 0 else []
    with open(project / "lab.log", "wb") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, cwd=project, stdout=log, stderr=log)
        try:
            soon(lambda: urlopen(f"http://127.0.0.1:{port}/api/status?token={TOKEN}", timeout=30).status == 200)
            yield f"http://127.0.0.1:{port}/lab/tree/12_explorer.ipynb?token={TOKEN}&reset"
        finally:
            server.terminate()
            server.wait(30)


def pixels(page: Page, which: str) -> str:
    """The bytes of an image widget's picture."""
    return page.run(f"fetch(document.querySelector('{which}').src).then(r => r.bytes()).then(b => b.toBase64())")


def changes(page: Page, which: str, before: str, seconds: float = 60) -> bool:
    until = time.monotonic() + seconds
    while (same := pixels(page, which) == before) and time.monotonic() < until:
        time.sleep(0.1)
    return not same


@needs_chromium
def test_the_explorer_opens_without_training_and_answers_what_is_moved_and_typed(lab, project):
    digit, end = "img.drawn-mnist", ".of-end button:nth-child(1)"
    with chromium() as page:
        page.open(lab, 1280, 1400)
        page.wait("document.querySelector('.jp-Notebook h1')", 300)
        page.click(".jp-Notebook h1")
        kernel = "jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status"
        page.wait(f"{kernel} == 'idle'", 300)
        page.run("void jupyterapp.commands.execute('notebook:run-all-cells')")
        page.wait(f"document.querySelector('{digit}')?.src", 300)
        assert not page.run("[...document.querySelectorAll('.jp-CodeCell .jp-Editor')].some(e => e.checkVisibility())")

        page.run(f"document.querySelector('{digit}').closest('.widget-vbox').querySelector('.noUi-handle').focus()")
        before = pixels(page, digit)
        page.press("PageUp", 33)
        assert changes(page, digit, before), "a private code's slider"

        page.click(end)
        page.wait(f"document.querySelector('{end}').matches('.mod-active')")
        page.run("document.querySelector('.walk .noUi-handle').focus()")
        before = pixels(page, digit)
        page.press("PageUp", 33)
        assert changes(page, digit, before), "the walk's slider"

        page.wait("document.querySelector('.score')?.innerText", 300)
        before = page.run("document.querySelector('.score').innerText")
        page.run("document.querySelector('.caption input').select()")
        page.call("Input.insertText", text="a small flower with round blue petals")
        page.press("Enter", 13)
        page.wait(f"document.querySelector('.score').innerText != {before!r}")
        assert not page.errors
    assert not (project / "runs" / "smoke").exists(), "nothing is trained"
