"""`make site`: README, notebooks and results as static pages, without JavaScript and without a network.

Equations become MathML when the site is built; every link is checked.
"""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from string import Template
from urllib.parse import quote, unquote

import nbformat
from latex2mathml.converter import convert
from nbconvert.filters.highlight import Highlight2HTML
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

from dmvae_lib.errors import DMVAEError

ROOT = Path(__file__).resolve().parents[1]

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="${root}style.css">
</head>
<body>
<nav><a href="${root}index.html">dmvae_lib</a> <a href="${root}results/index.html">Results</a>
<details><summary>Notebooks</summary>
$contents
</details></nav>
<main>
$body
</main>
</body>
</html>
""")

STYLE = """
body { margin: 0; font: 17px/1.6 system-ui, sans-serif; color: #1c1c1c; background: #fff; overflow-wrap: break-word }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: .6rem 1rem; background: #eef2f6 }
nav details { flex: 1 } nav ol { margin: .3rem 0; padding-left: 0; list-style: none }
main { max-width: 50rem; margin: 0 auto; padding: 0 1rem 3rem }
h1, h2, h3 { line-height: 1.25; margin-top: 2em } h1 { margin-top: 1em }
a { color: #0b57a4 } .anchor-link { display: none }
img { max-width: 100%; height: auto }
pre, .table, math[display=block] { overflow: auto hidden; max-width: 100% } math[display=block] { padding: .3em 0 }
pre { padding: .6rem .8rem; font-size: .82em; line-height: 1.45; background: #f5f6f8; border-radius: 4px }
.output pre { background: none; border-left: 3px solid #ccd5de; border-radius: 0 }
code { font-size: .88em; background: #f5f6f8 } pre code { font-size: 1em }
.table { margin-block: 1em } table { border-collapse: collapse; font-size: .85em } th, td { padding: .25em .7em; text-align: left; vertical-align: top }
tr { border-bottom: 1px solid #dde3e9 } .dataframe td, .dataframe th { white-space: nowrap }
.links { font-size: .9em }
"""


class Renderer(IPythonRenderer):
    """Markdown with equations in MathML, GitHub's anchors at the headings, and every link led through `lead`."""

    def __init__(self, lead: Callable[[str], str]):
        super().__init__(escape=False)
        self.lead = lead

    def inline_math(self, body: str) -> str:
        return convert(body)

    def block_math(self, body: str) -> str:
        return convert(body, display="block")

    def heading(self, text: str, level: int, **attrs) -> str:
        words = re.sub(r"[^\w\s-]", "", _plain(text)).lower()
        return f'<h{level} id="{words.replace(" ", "-")}">{text}</h{level}>\n'

    def link(self, text: str, url: str, title: str | None = None) -> str:
        return super().link(text, self.lead(url), title)

    def image(self, text: str, url: str, title: str | None = None) -> str:
        return super().image(text, self.lead(url), title)

    def block_html(self, html: str) -> str:
        return "" if html.lstrip().startswith("<!--") else html


def markdown(text: str, lead: Callable[[str], str] = str) -> str:
    """A Markdown text's HTML, its links and images as `lead` gives them."""
    return _scrolling(MarkdownWithMath(renderer=Renderer(lead)).render(text))


def _plain(html: str) -> str:
    return re.sub("<.*?>", "", html)


def _scrolling(html: str) -> str:
    return html.replace("<table", '<div class="table"><table').replace("</table>", "</table></div>")


def notebook_body(notebook: nbformat.NotebookNode, stem: str, folder: Path, lead: Callable[[str], str] = str) -> str:
    """A notebook's cells and outputs as HTML; its figures become stem_1.png, … in `folder`; `lead`: as `markdown`."""
    highlight, parts, heading, figures = Highlight2HTML(pygments_lexer="python"), [], stem, 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ (.*)", cell.source, re.M) or [heading])[-1]
            parts.append(markdown(cell.source, lead))
            continue
        parts.append(highlight(cell.source))
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                figures += 1
                picture = folder / f"{stem}_{figures}.png"
                picture.write_bytes(base64.b64decode(data["image/png"]))
                shown = f'<img src="{picture.name}" alt="{escape(heading)}: figure" loading="lazy">'
            elif "text/html" in data:
                shown = _scrolling(data["text/html"])
            else:
                shown = f"<pre>{escape(data.get('text/plain') or output.get('text', ''))}</pre>"
            parts.append(f'<div class="output">{shown}</div>')
    return "\n".join(parts)


def repository(root: Path) -> str | None:
    """owner/name on GitHub of the checkout's remote "origin", if it has one."""
    try:
        command = ["git", "-C", str(root), "remote", "get-url", "origin"]
        address = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?$", address)
    return found[1] if found else None


def run_links(name: str, address: str | None) -> str:
    """Where a notebook can be run: a copy to download and, for a repository on GitHub, Binder and Colab."""
    links = {"download": name}
    if address:
        links["run on Binder"] = f"https://mybinder.org/v2/gh/{address}/HEAD?labpath=notebooks/{name}"
        links["run on Colab"] = f"https://colab.research.google.com/github/{address}/blob/gh-pages/notebooks/{name}"
    return '<p class="links">' + " · ".join(f'<a href="{url}">{text}</a>' for text, url in links.items()) + "</p>\n"


def for_colab(notebook: nbformat.NotebookNode, address: str | None) -> nbformat.NotebookNode:
    """The notebook with a first cell that installs the library where there is none."""
    copy = nbformat.from_dict(notebook)
    if address:
        install = nbformat.v4.new_code_cell(f"%pip install --quiet git+https://github.com/{address}", id="install")
        copy.cells = [install, *copy.cells]
    return copy


def build(root: Path, site: Path) -> list[Path]:
    """Writes the site anew and returns its pages. Raises DMVAEError for a link that leads nowhere."""
    shutil.rmtree(site, ignore_errors=True)
    address = repository(root)
    notebooks = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    pages = {f"notebooks/{path.name}": f"notebooks/{path.stem}.html" for path in notebooks}
    pages |= {"README.md": "index.html", "results/README.md": "results/index.html"}
    pages |= {"CONTRIBUTING.md": "contributing.html"} if (root / "CONTRIBUTING.md").exists() else {}
    bodies: dict[str, str] = {}
    for source, target in pages.items():
        (site / target).parent.mkdir(parents=True, exist_ok=True)
        lead = partial(_led, source=source, target=target, pages=pages, root=root, site=site)
        if source.endswith(".md"):
            bodies[source] = markdown((root / source).read_text(), lead)
            continue
        notebook, path = nbformat.read(root / source, as_version=4), Path(source)
        body = notebook_body(notebook, path.stem, (site / target).parent, lead)
        bodies[source] = body.replace("</h1>\n", "</h1>\n" + run_links(path.name, address), 1)
        nbformat.write(for_colab(notebook, address), site / source)
    titles = {source: _plain(re.findall(r"<h1.*?>(.*?)</h1>", body)[0]) for source, body in bodies.items()}
    for source, target in pages.items():
        up = "../" * target.count("/")
        entries = [f'<li><a href="{up}{pages[s]}">{titles[s]}</a></li>' for s in pages if s.endswith(".ipynb")]
        contents = "<ol>\n" + "\n".join(entries) + "\n</ol>"
        page = PAGE.substitute(title=titles[source], root=up, contents=contents, body=bodies[source])
        (site / target).write_text(page)
    (site / "style.css").write_text(STYLE + HtmlFormatter().get_style_defs(".highlight"))
    (site / ".nojekyll").touch()
    made = [site / target for target in pages.values()]
    broken = [problem for page in made for problem in broken_links(page, site)]
    if broken:
        raise DMVAEError("links that lead nowhere: " + "; ".join(broken) + ". Correct them in the page's source.")
    return made


def _led(url: str, source: str, target: str, pages: dict[str, str], root: Path, site: Path) -> str:
    """A link in `source`, as it reads in `target`: to another page, or to a file of the project, which comes along.

    A folder comes along as a page that lists its files: a site of pages has nothing else to show for it.
    """
    path, mark, fragment = url.partition("#")
    if not path or re.match(r"\w+:", path):
        return url
    place = normpath(join(dirname(source), unquote(path)))
    if place not in pages and (root / place).is_file():
        (site / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / place, site / place)
    elif place not in pages and (root / place).is_dir():
        (site / place).mkdir(parents=True, exist_ok=True)
        files = sorted(file for file in (root / place).iterdir() if file.is_file() and not file.name.startswith("."))
        for file in files:
            shutil.copyfile(file, site / place / file.name)
        items = "".join(f'<li><a href="{quote(file.name)}">{escape(file.name)}</a></li>\n' for file in files)
        head = '<!doctype html>\n<meta charset="utf-8">\n'
        listing = f"{head}<title>{escape(place)}</title>\n<h1>{escape(place)}</h1>\n<ul>\n{items}</ul>\n"
        place = join(place, "index.html")
        (site / place).write_text(listing)
    return relpath(pages.get(place, place), dirname(target) or ".") + mark + fragment


class Links(HTMLParser):
    """Collects a page's anchors, `ids`, and where its links and images lead, `targets`."""

    def __init__(self, page: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif name in ("href", "src") and value and not re.match(r"\w+:", value):
                self.targets.append(unquote(value))


def broken_links(page: Path, site: Path) -> list[str]:
    """What a page of the site refers to within the site, and is not there."""
    found = []
    for target in Links(page).targets:
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page.resolve()
        if not file.is_relative_to(site.resolve()) or not file.is_file():
            found.append(f"{page.relative_to(site)} -> {target}")
        elif fragment and file.suffix == ".html" and fragment not in Links(file).ids:
            found.append(f"{page.relative_to(site)} -> {target} (no such heading)")
    return found


def main() -> None:
    site = ROOT / "build" / "site"
    try:
        made = build(ROOT, site)
    except DMVAEError as error:
        sys.exit(f"\n{error}")
    print(f"{len(made)} pages in build/site; open build/site/index.html.")


if __name__ == "__main__":
    main()
