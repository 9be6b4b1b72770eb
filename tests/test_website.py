"""The site: equations without scripts, links that lead where they say, and no page with one that does not."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from dmvae_lib import DMVAEError

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "docs"))

from website import Links, broken_links, build, markdown, repository, run_links  # noqa: E402

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
README = """# Title

[notebook](notebooks/01_one.ipynb), [its end](notebooks/01_one.ipynb#what-is-seen-twice), [licence](LICENSE),
[results](results/README.md)

| a | b |
|---|---|
| `$x` | $z_s$ |
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "results" / "quick").mkdir(parents=True)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "LICENSE").write_text("MIT")
    (tmp_path / "results" / "README.md").write_text(
        "# Results\n\n![t](quick/t.png) by [01](../notebooks/01_one.ipynb)\n"
    )
    (tmp_path / "results" / "quick" / "t.png").write_bytes(b"png")
    picture = nbformat.v4.new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"})
    text = nbformat.v4.new_output("stream", text="1 < 2\n")
    cells = [
        nbformat.v4.new_markdown_cell("# 01 · One\n\n$$a \\mid b$$\n\nBack to [the start](../README.md#title)."),
        nbformat.v4.new_code_cell("print('1 < 2')", outputs=[text, picture]),
        nbformat.v4.new_markdown_cell("## What is seen, *twice*"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "01_one.ipynb")
    return tmp_path


def test_pages_show_figures_outputs_and_equations_without_scripts(project):
    site = project / "site"
    assert len(build(project, site)) == 3
    page = (site / "notebooks" / "01_one.html").read_text()
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in page and "$$" not in page
    assert "1 &lt; 2" in page and '<img src="01_one_1.png" alt="01 · One: figure"' in page
    assert (site / "notebooks" / "01_one_1.png").read_bytes().startswith(b"\x89PNG")
    assert "<script" not in page
    assert "<title>01 · One</title>" in page


def test_links_between_sources_become_links_between_pages(project):
    site = project / "site"
    build(project, site)
    assert {
        "notebooks/01_one.html",
        "notebooks/01_one.html#what-is-seen-twice",
        "LICENSE",
        "results/index.html",
    } <= set(Links(site / "index.html").targets)
    assert "../index.html#title" in Links(site / "notebooks" / "01_one.html").targets
    assert {"quick/t.png", "../notebooks/01_one.html"} <= set(Links(site / "results" / "index.html").targets)
    assert (site / "results" / "quick" / "t.png").read_bytes() == b"png"


@pytest.mark.parametrize("link", ["nowhere.md", "notebooks/01_one.ipynb#no-heading", "../outside.txt"])
def test_a_link_that_leads_nowhere_stops_the_build_by_its_name(project, link):
    (project / "README.md").write_text(README + f"\n[broken]({link})\n")
    with pytest.raises(DMVAEError, match=f"index.html -> .*{link.split('/')[-1].replace('.ipynb', '.html')}"):
        build(project, project / "site")


def test_a_missing_picture_is_a_broken_link(tmp_path):
    (tmp_path / "page.html").write_text('<img src="gone.png"> <a href="https://example.org">elsewhere</a>')
    assert broken_links(tmp_path / "page.html", tmp_path) == ["page.html -> gone.png"]


def test_code_is_not_taken_for_an_equation():
    assert markdown("`$x$` costs $x$").count("<math") == 1


@pytest.mark.parametrize(
    "address", ["https://github.com/some/one.git", "git@github.com:some/one.git", "https://github.com/some/one"]
)
def test_binder_and_colab_follow_the_checkouts_own_address(project, address):
    subprocess.run(["git", "init", "-q", project], check=True)
    assert repository(project) is None
    subprocess.run(["git", "-C", project, "remote", "add", "origin", address], check=True)
    assert repository(project) == "some/one"
    build(project, project / "site")
    targets = (project / "site" / "notebooks" / "01_one.html").read_text()
    assert "https://mybinder.org/v2/gh/some/one/HEAD?labpath=notebooks/01_one.ipynb" in targets
    assert "https://colab.research.google.com/github/some/one/blob/gh-pages/notebooks/01_one.ipynb" in targets
    copy = nbformat.read(project / "site" / "notebooks" / "01_one.ipynb", as_version=4)
    assert copy.cells[0].source == "%pip install --quiet git+https://github.com/some/one"


def test_without_an_address_there_is_a_download_alone(project):
    assert run_links("01_one.ipynb", None).count("href") == 1
    build(project, project / "site")
    copy = nbformat.read(project / "site" / "notebooks" / "01_one.ipynb", as_version=4)
    assert "install" not in copy.cells[0].source


def test_a_link_to_a_folder_leads_to_a_list_of_its_files(project):
    (project / "README.md").write_text(README + "\n[all of quick](results/quick)\n")
    site = project / "site"
    build(project, site)
    assert "results/quick/index.html" in Links(site / "index.html").targets
    assert Links(site / "results" / "quick" / "index.html").targets == ["t.png"]


def test_the_site_of_this_repository_has_no_link_that_leads_nowhere(tmp_path):
    made = build(ROOT, tmp_path / "site")  # which raises for one
    notebooks = {path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    assert {path.stem for path in made} >= notebooks | {"index", "contributing"}
    linked = [(page, target) for page in made for target in Links(page).targets]
    assert len(linked) > 300 and not [page for page in made if broken_links(page, tmp_path / "site")]
