"""`make site`: pages that need no network, whose links lead somewhere, and which a browser shows as they are meant."""

import importlib.util
import json
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import chromium, needs_chromium

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "site"
PAGES = ["index", "notebooks/02_training_on_digits", "notebooks/04_figures_4_and_5", "results/README", "docs/core"]


@pytest.fixture(scope="module")
def conf():
    """docs/conf.py as a module."""
    spec = importlib.util.spec_from_file_location("site_conf", ROOT / "docs" / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site():
    """The pages as `make site` left them, of the sources as they are; `make test` builds them first."""
    if not (SITE / "searchindex.js").exists():
        pytest.skip("no build/site here; `make site` makes it")
    return SITE


@pytest.mark.parametrize(
    "address", ["https://github.com/some/one.git", "git@github.com:some/one.git", "https://github.com/some/one"]
)
def test_binder_and_colab_follow_the_checkouts_own_address(conf, tmp_path, address):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert conf.repository(tmp_path) is None
    subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", address], check=True)
    assert conf.repository(tmp_path) == "some/one"
    links = conf.run_links("01_one.ipynb", "some/one")
    assert "https://mybinder.org/v2/gh/some/one/HEAD?labpath=notebooks/01_one.ipynb" in links
    assert "https://colab.research.google.com/github/some/one/blob/gh-pages/notebooks/01_one.ipynb" in links
    copy = json.loads(conf.for_colab('{"cells": [{"source": "1"}]}', "some/one"))
    assert [cell["source"] for cell in copy["cells"]] == ["%pip install --quiet git+https://github.com/some/one", "1"]


def test_without_an_address_there_is_a_download_alone(conf):
    assert conf.run_links("01_one.ipynb", None).count("href") == 1
    assert json.loads(conf.for_colab('{"cells": []}', None)) == {"cells": []}


def test_a_link_that_leads_nowhere_is_found_by_its_page(conf, tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="b.html#end"></a><img src="gone.png"><a href="#no"></a>'
    )
    (tmp_path / "b.html").write_text('<a href="a.html#top"></a><a href="https://example.org">elsewhere</a>')
    expected = ["a.html -> #no (no such heading)", "a.html -> b.html#end (no such heading)", "a.html -> gone.png"]
    assert list(conf.broken_links(tmp_path)) == expected


def test_a_docstring_becomes_lists_equations_and_plain_text(conf):
    lines = ["What it is * 2:", "", "    a |b|", "", "one, two: shapes,", "    (*, d).", "Raises `x*`."]
    conf.plain(None, "class", "name", None, None, lines)
    expected = "What it is \\* 2:\n\n::\n\n    a |b|\n\n- ``one, two``: shapes,\n  (\\*, d).\n\nRaises `x*`."
    assert re.sub("\n{3,}", "\n\n", "\n".join(lines)) == expected


def test_a_link_to_nowhere_in_a_source_stops_the_build_by_its_name(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("conf.py", "static"):
        (tmp_path / "docs" / name).symlink_to(ROOT / "docs" / name)
    text = "# Title\n\n[one](docs/nowhere.md), [two](https://example.org)\n"
    (tmp_path / "README.md").write_text(text)
    options = ["--fail-on-warning", "--keep-going", "--conf-dir", tmp_path / "docs", "-D", "exclude_patterns=.*,build"]
    command = [sys.executable, "-m", "sphinx", "--quiet", *options, tmp_path, tmp_path / "build"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode != 0 and "docs/nowhere.md" in made.stderr


def test_the_pages_ask_for_nothing_outside_the_site(site):
    for page in site.rglob("*.html"):
        outside = re.findall(
            r"<(?:script|img|link|iframe)[^>]*(?:src|href)=\"(?:https?:)?//[^\"]+", page.read_text("utf-8")
        )
        assert not [tag for tag in outside if 'rel="canonical"' not in tag], page


def test_every_notebook_and_each_module_has_its_place(site):
    for source in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        assert (site / "notebooks" / f"{source.stem}.html").exists() and (site / "notebooks" / source.name).exists()
    reference = (site / "docs" / "core.html").read_text("utf-8") + (site / "docs" / "paper.html").read_text("utf-8")
    for name in (
        "models.dmvae.DMVAE",
        "pairing.PairedData.aligned",
        "training.train",
        "metrics.rank1",
        "paper.runs.Run",
    ):
        assert f'id="dmvae_lib.{name}"' in reference, name
    assert "notebooks/01_data_pairing.html" in (site / "llms.txt").read_text()


@pytest.fixture(scope="module")
def served(site):
    """The site's address on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def page():
    with chromium() as found:
        yield found


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280, 1920])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_the_pages(served, page, width, dark):
    for name in PAGES:
        page.open(f"{served}/{name}.html", width, dark=dark)
        page.run("window.MathJax && MathJax.startup.promise.then(() => true)")
        shots = ROOT / "build" / "screenshots"
        shots.mkdir(parents=True, exist_ok=True)
        page.screenshot(shots / f"{name.replace('/', '-')}-{width}-{'dark' if dark else 'light'}.png")
        assert not page.errors, (name, page.errors)
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than {width} px"
        text = page.run("document.querySelector('article').innerText")
        code = page.run("[...document.querySelectorAll('article pre, article code')].map(e => e.innerText).join('\\n')")
        raw = {
            found
            for found in re.findall(r"\$[^$\n]*\\\w+|\\(?:frac|mid|sum|mathcal|lambda)\b", text)
            if found not in code
        }
        assert not raw, f"{name}: an equation that is not rendered, {raw}"
        shade = page.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
        assert (sum(shade) < 200) == dark, name


@needs_chromium
def test_the_search_finds_what_is_written(served, page):
    page.open(f"{served}/search.html?q=product+of+experts")
    for name in ("02_training_on_digits", "docs/core"):  # the results come one after the other
        page.wait(f"document.querySelector('#search-results li a[href*=\"{name}\"]')")
    assert not page.errors
