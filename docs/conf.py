"""`make site`: README, notebooks as committed, results and the reference as pages in build/site that need no network.

Sphinx reads the repository itself (`sphinx-build -c docs . build/site`), so that every link between its files is also a
link between pages, and fails the build where it leads nowhere. MathJax is in the site, as one file that draws equations without fonts.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import mathjax
from sphinx.application import Sphinx
from sphinx.errors import SphinxError

ROOT = Path(__file__).resolve().parents[1]
MATHJAX = Path(mathjax.__file__).parent / "static" / "mathjax" / "es5" / "tex-svg-full.js"
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # the reference is of this checkout


def repository(root: Path) -> str | None:
    """owner/name on GitHub of the checkout's remote "origin", if it has one: a fork's own."""
    try:
        command = ["git", "-C", str(root), "remote", "get-url", "origin"]
        address = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?$", address)
    return found[1] if found else None


ADDRESS = repository(ROOT)

project = "dmvae_lib"
author = "The dmvae_lib authors"
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "notebooks/[0-9]*.ipynb"]
include_patterns += [
    "results/*/models/*/README.md",
    "results/quick/benchmark.md",
    "results/quick/runs_per_hour.md",
    "results/subset/parity.md",
]
include_patterns += ["results/README.md", "results/*/README.md", "results/*/notebooks/*.ipynb", "benchmarks/README.md"]
exclude_patterns = [".*", "build", "runs", "data"]  # not even looked into
suppress_warnings = ["toc.not_included"]  # those of a profile are reached from results/
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "play"]

nb_execution_mode = "off"
nb_ipywidgets_js = {}
myst_enable_extensions = ["dollarmath", "amsmath", "html_image"]
myst_heading_anchors = 4
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
default_role = "code"  # the docstrings' `names`

html_theme = "furo"
pygments_style, pygments_dark_style = "github-light", "github-dark"
html_title = "dmvae_lib"
html_css_files = ["site.css"]
html_static_path = ["static", str(MATHJAX)]
mathjax_path = MATHJAX.name
html_favicon = "static/favicon.svg"
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
if ADDRESS:
    html_baseurl = "https://{}.github.io/{}/".format(*ADDRESS.split("/"))
    html_theme_options = {
        "source_repository": f"https://github.com/{ADDRESS}",
        "source_branch": "main",
        "source_directory": "",
    }

CONTENTS = """

```{toctree}
:hidden:
:caption: Notebooks
:glob:
notebooks/*
```

```{toctree}
:hidden:
:caption: Results
results/README
docs/play
benchmarks/README
```

```{toctree}
:hidden:
:caption: Using it
docs/running
docs/speed
docs/trust
CONTRIBUTING
CHANGELOG
```

```{toctree}
:hidden:
:caption: Reference
docs/core
docs/paper
```
"""


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_to_source)
    app.connect("autodoc-process-docstring", plain)
    app.connect("build-finished", finish)


def add_to_source(app: Sphinx, name: str, source: list[str]) -> None:
    """The contents under the README, which GitHub need not show; under a notebook's title, where it can be run."""
    if name == root_doc:
        source[0] += CONTENTS
    elif name.startswith("notebooks/"):
        notebook = json.loads(source[0])
        first = notebook["cells"][0]
        title, *rest = "".join(first["source"]).split("\n")
        first["source"] = "\n".join([title, "", run_links(Path(name).name + ".ipynb", ADDRESS), *rest])
        source[0] = json.dumps(notebook)


def run_links(name: str, address: str | None) -> str:
    """HTML: a notebook's copy to download and, for a repository on GitHub, Binder and Colab."""
    links = {"download": name}
    if address:
        links["run on Binder"] = f"https://mybinder.org/v2/gh/{address}/HEAD?labpath=notebooks/{name}"
        links["run on Colab"] = f"https://colab.research.google.com/github/{address}/blob/gh-pages/notebooks/{name}"
    anchors = " · ".join(f'<a href="{url}">{text}</a>' for text, url in links.items())
    return f'<p class="run-links">{anchors}</p>\n'


def plain(app: Sphinx, what: str, name: str, of: object, options: object, lines: list[str]) -> None:
    """A docstring as the project writes them, to reStructuredText.

    "name: what it is" is an item of a list, indented lines after an empty one are equations or code, and a star or a bar
    is a product or a condition, not markup.
    """
    written: list[str] = []
    item = block = False
    for number, line in enumerate(lines):
        before, block = block, line.startswith(" ") and (block or not lines[number - 1])
        if block:
            written += ["::", ""] * (not before) + [line]
            continue
        if not line or before:
            written.append("")
            item = False
        found = re.match(r"([a-z_]\w*(?:\(.*?\))?(?:, [a-z_]\w*)*)(: | -> )(?=\S)", line) if number else None
        parts = re.split(r"(`[^`]*`)", line[found.end() :] if found else line)
        parts[::2] = [re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
        text = "".join(parts).strip()
        if found:
            written += ["", f"- ``{found[1]}``{found[2]}{text}"]
        elif line.startswith(" "):  # the last line goes on
            written.append("  " * item + text)
        else:
            written += ["", text] if item else [text]
        item = bool(found) or item and line.startswith(" ")
    lines[:] = written


# --- what is beside the pages -----------------------------------------------------------------------------------------


def finish(app: Sphinx, error: Exception | None) -> None:
    """index.html, notebooks to download, llms.txt, sitemap.xml; then every link within the site is checked."""
    if error or app.builder.name != "html":
        return
    site = Path(app.outdir)
    shutil.copyfile(site / "README.html", site / "index.html")
    (site / ".nojekyll").touch()
    shutil.rmtree(site / "_sources", ignore_errors=True)
    for source in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        (site / "notebooks" / source.name).write_text(for_colab(source.read_text("utf-8"), ADDRESS), "utf-8")
    titles = {name: app.env.titles[name].astext() for name in sorted(app.env.found_docs)}
    pages = "\n".join(f"- [{title}]({name}.html)" for name, title in titles.items())
    about = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["description"]
    (site / "llms.txt").write_text(f"# {project}\n\n> {about}\n\n{pages}\n", "utf-8")
    if ADDRESS:
        urls = "".join(f"<url><loc>{app.config.html_baseurl}{name}.html</loc></url>\n" for name in titles)
        head = '<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n'
        (site / "sitemap.xml").write_text(f"{head}{urls}</urlset>\n", "utf-8")
    if broken := list(broken_links(site)):
        raise SphinxError("links that lead nowhere: " + "; ".join(broken) + ". Correct them in the page's source.")


def for_colab(text: str, address: str | None) -> str:
    """A notebook's JSON with a first cell that installs the library where there is none."""
    notebook = json.loads(text)
    if address:
        install = {"cell_type": "code", "id": "install", "metadata": {}, "outputs": [], "execution_count": None}
        install["source"] = f"%pip install --quiet git+https://github.com/{address}"
        notebook["cells"].insert(0, install)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


class Links(HTMLParser):
    """A page's anchors, `ids`, and where its links and images lead within the site, `targets`."""

    def __init__(self, page: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.targets: set[str] = set()
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif name in ("href", "src") and value and not re.match(r"\w+:|//", value):
                self.targets.add(unquote(value))


def broken_links(site: Path) -> Iterator[str]:
    """What pages of the site refer to within the site, and is not there: also from raw HTML, which Sphinx leaves alone."""
    pages = {page.resolve(): Links(page) for page in site.rglob("*.html") if "_static" not in page.parts}
    for page, links in pages.items():
        for target in sorted(links.targets):
            path, _, fragment = target.partition("#")
            file = (page.parent / path.partition("?")[0]).resolve() if path else page
            here = f"{page.relative_to(site.resolve())} -> {target}"
            if not file.is_file():
                yield here
            elif fragment and file in pages and fragment not in pages[file].ids:
                yield f"{here} (no such heading)"
