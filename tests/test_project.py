"""The project's own promises: one set of versions, notebooks that can be run and are committed executed."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from packaging.requirements import Requirement

from dmvae_lib.files import verify
from dmvae_lib.paper import pretrained, published
from dmvae_lib.paper.profiles import get_profile
from dmvae_lib.paper.rows import ROWS
from dmvae_lib.paper.runs import setting
from dmvae_lib.paper.tables import ledger, table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted(path.parent for path in (ROOT / "results").glob("*/manifest.json") if "@" not in path.parent.name)
MODELS = sorted(path.parent for path in (ROOT / "results").glob("*/models/*/config.json"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Names that conda-forge spells differently, by their name on PyPI.
CONDA_NAMES = {"torch": "pytorch", "huggingface-hub": "huggingface_hub"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(python: str | None = None) -> dict[str, list[str]]:
    """The versions of each locked package: all, or those for Linux with this Python."""
    versions: dict[str, list[str]] = {}
    for line in re.findall(r"^[\w.-]+==.+", (ROOT / "requirements.lock").read_text(), re.M):
        pin = Requirement(line)
        place = {"python_full_version": f"{python}.0", "sys_platform": "linux", "platform_machine": "x86_64"}
        if python is None or pin.marker is None or pin.marker.evaluate(place):
            versions.setdefault(normal(pin.name), []).append(str(pin.specifier).removeprefix("=="))
    return versions


def declared() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    return {normal(re.match(r"[\w.-]+", line)[0]): line for line in lines}


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def test_the_lock_satisfies_the_declared_ranges():
    for name, line in declared().items():
        least = release(line.split(">=")[1])
        assert name in locked(), f"{name} is declared but not locked; run `make lock`"
        assert all(release(version) >= least for version in locked()[name]), f"{name}: {locked()[name]}, {line}"


def test_environment_yml_gives_the_locks_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = dict(line.split("=") for line in environment["dependencies"] if isinstance(line, str) and "=" in line)
    (by_pip,) = [line["pip"] for line in environment["dependencies"] if isinstance(line, dict)]  # not on conda-forge
    conda |= dict(line.split("==") for line in by_pip if "==" in line)
    pins = locked(conda["python"])
    for name in declared():
        assert [conda[CONDA_NAMES.get(name, name)]] == pins[name], name
    unknown = set(conda) - {CONDA_NAMES.get(name, name) for name in declared()} - {"python", "pip"}
    assert not unknown, f"in environment.yml, not in pyproject.toml: {unknown}"


def test_a_wheel_works_outside_the_checkout(tmp_path):
    """The core, the paper's rows and saved weights; with its types, and without what is the repository's alone."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "dmvae_lib", source / "dmvae_lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    how = [
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
        "--wheel-dir",
        tmp_path,
        source,
    ]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *how], check=True)
    (wheel,) = tmp_path.glob("dmvae_lib-*.whl")
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        files.extractall(tmp_path / "installed")
    assert "dmvae_lib/py.typed" in names and {name.split("/")[0].split("-")[0] for name in names} == {"dmvae_lib"}
    code = """
import sys, torch, dmvae_lib
from dmvae_lib.paper import pretrained
from dmvae_lib.paper.rows import ROWS
from dmvae_lib.paper.runs import Run, setting
assert dmvae_lib.__file__.startswith(sys.argv[1])
Run(ROWS["dmvae"], 0, setting("smoke")).model.save("weights")
drawn = pretrained("weights").cross_generate({"mnist": torch.rand(2, 1, 28, 28)}, target="svhn", n=1)
assert drawn.shape == (1, 2, 3, 32, 32)
"""
    (outside := tmp_path / "outside").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "installed"], check=True, cwd=outside, env=environment)


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: "/".join(folder.parts[-3:]))
def test_published_weights_are_a_run_of_the_ledger_as_its_row_is_now(folder):
    run = pretrained(folder).about["run"]
    entry = json.loads((folder.parents[1] / "runs" / f"{run['row']}-{run['seed']}.json").read_text())
    assert run == entry["config"] == ROWS[run["row"]].config(get_profile(entry["profile"]), run["seed"])


def test_subsets_weights_load_by_their_name():
    drawn = pretrained("dmvae-mnist-svhn").cross_generate({"mnist": torch.rand(2, 1, 28, 28)}, target="svhn", n=3)
    assert drawn.shape == (3, 2, 3, 32, 32)


def test_the_lock_names_no_place():
    assert not re.search(r"://|@", (ROOT / "requirements.lock").read_text())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_executed_without_errors_or_paths_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not re.search(r"/(home|root|Users|work|tmp)/", path.read_text()), "a path of somebody's machine"
    assert "widget-view" not in path.read_text() and "widgets" not in notebook.metadata


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_one_parameters_cell_and_compare_something_with_nbval(path):
    notebook = nbformat.read(path, as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    (parameters,) = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert [line.split(" = ")[0] for line in parameters.splitlines()] == ["profile", "seeds", "device", "data"]
    assert any("nbval-check-output" in tag for tag in tags)


# --- numbers in the notebooks' text: a run's belong into outputs, which are made anew --------------------------------

NO_RESULTS = (
    re.compile(  # code, formulas, links, headings; what the paper's parts and the notebooks are called; years; names
        r"`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|^#+ [\d ·]*|\(\d(?:\.\d)?\)|"
        r"\b(?:[Ss]ec|[Ff]ig|[Ee]q|[Tt]able|[Ff]igure|[Ss]ection|[Nn]otebook|[Ee]quation)s?\.? ?"
        r"\d[\d.]*[a-z]?(?:[,–-]? ?(?:and|to|or)? ?\d[\d.]*[a-z]?)*|"
        r"\bet al\. \d{4}|\b[A-Za-z]+[-@]\d+(?:\.\d+)?",
        re.S | re.M,
    )
)
PROTOCOL = {
    *("95", "50"),  # percent of an interval; AP@50's images
    *("-1", "3", "10", "64"),  # Fig. 4's steps of MNIST's code; sizes of the paper's latent spaces
    *("8", "9"),  # of the captions and images in Figs. 6 and 7, how many are right
    *("0", "1"),
}


def typed(cells) -> list[str]:
    """Numbers in the text of a notebook's cells that are neither the paper's, nor the protocol's, nor in its code."""
    papers = [of for table in (published.TABLE1, published.TABLE2, published.TABLE3) for of in table.values()]
    known = PROTOCOL | {form for of in papers for percent in of.values() for form in (f"{percent:g}", f"{percent:.1f}")}
    number = re.compile(r"(?<![\w.])[−-]?\d[\d,]*(?:\.\d+)?(?!\w)")
    code = " ".join(cell.source for cell in cells if cell.cell_type == "code")
    known |= {literal.replace("_", "") for literal in re.findall(r"(?<![\w.])\d[\d_]*(?:\.\d+)?(?!\w)", code)}
    found = []
    for cell in cells:
        text = NO_RESULTS.sub(" ", cell.source) if cell.cell_type == "markdown" else ""
        for match in number.finditer(text):
            bare = match[0].replace("−", "-").replace(",", "")
            if not {bare, bare.lstrip("-")} & known:
                found.append(f"{match[0]} in “…{text[max(0, match.start() - 40) : match.end() + 20]}…”")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_number_that_a_run_makes_is_typed_into_the_text(path):
    assert not typed(nbformat.read(path, as_version=4).cells), "compute it, or say where the paper has it"


def test_what_counts_as_a_typed_number():
    def of(text, code=""):
        return len(typed([nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell(code)]))

    assert of("DMVAE is right in 41.5 % of the pairs, 12 points above MMVAE.") == 2
    assert of("The judge is right on 1,940 images; a fall by −3.7.") == 2
    assert (
        of("# 07 · Table 2\n\nTables 1, 2 and 3, Figs. 4 and 5 (Sec. 5.1), notebooks 03 and 12; Shi et al. 2019") == 0
    )
    assert of("The paper has 88.1 and 17.03; $x_2 = 7.7$, `n=77`, Oxford-102, AP@50, 95 % intervals") == 0
    assert of("from −2.5 to 2.5", "steps = torch.linspace(-2.5, 2.5, 9)") == 0


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_committed_results_are_the_files_their_manifest_lists(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    listed = {name: digest for entry in manifest.values() for name, digest in entry["files"].items()}
    others = {"README.md", "manifest.json", ".lock"}
    assert {path.name for path in folder.iterdir() if path.is_file()} - others == set(listed)
    for name, digest in listed.items():
        verify(folder / name, digest)
    used = {run for entry in manifest.values() for run in entry["runs"]}
    assert used <= {path.name for path in (folder / "runs").glob("*.json")}
    ledger(setting(folder.name))  # whose seals hold


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_committed_rows_of_a_data_set_were_seen_by_the_same_judges(folder):
    seen: dict[tuple[str, str], dict[str, list[str]]] = {}
    for (row, seed), entry in ledger(setting(folder.name)).items():
        for modality, judge in entry.get("judges", {}).items():
            by = seen.setdefault((entry["config"]["data"], modality), {})
            by.setdefault(judge["sha256"], []).append(f"{row}-{seed}")
    several = {what: by for what, by in seen.items() if len(by) > 1}
    assert not several, f"train these anew beside one judge: {several}"


@pytest.mark.parametrize("folder", [f for f in RESULTS if (f / "runs").exists()], ids=lambda folder: folder.name)
def test_committed_ledgers_have_rows_as_they_are_now(folder):
    """All of quick's; a larger profile's may be under way."""
    counted = table({name: row for name, row in ROWS.items()}, setting(folder.name))["seeds"].groupby("row").max()
    there = {path.stem.rpartition("-")[0] for path in (folder / "runs").glob("*.json")}
    expected = [name for name in ROWS if folder.name == "quick" or name in there]
    assert not [name for name in expected if not counted[name]], f"run `make reproduce PROFILE={folder.name}`"
