"""`make reproduce`: what it trains, what becomes of a notebook, and how its numbers stand beside the committed ones."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import test_tables
import toy
from hypothesis import given
from hypothesis import strategies as st
from papermill.translators import PythonTranslator
from test_tables import ROWS, record

from dmvae_lib import DMVAEError
from dmvae_lib.paper import reproduce
from dmvae_lib.paper.data import DataSet
from dmvae_lib.paper.pages import BEGIN, END
from dmvae_lib.paper.profiles import get_profile
from dmvae_lib.paper.rows import JUDGES
from dmvae_lib.paper.rows import ROWS as PAPERS_ROWS
from dmvae_lib.paper.rows.digits import judge
from dmvae_lib.paper.runs import setting
from dmvae_lib.paper.tables import table

ROOT = Path(__file__).resolve().parents[1]
PYTHON = {"language_info": {"name": "python"}}
place = test_tables.place  # the fixture


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=tester", "-c", "user.email=tester@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True)


@pytest.fixture
def committed(place, monkeypatch):
    """A project whose HEAD has three seeds of row One and one of Two."""
    monkeypatch.setattr(reproduce, "TABLES", {"Table 1": ROWS})
    for seed, joint in enumerate((0.40, 0.44, 0.48)):  # a standard deviation of 4
        record(place, ROWS["One"], seed, joint)
    record(place, ROWS["Two"], 0, 0.9)
    project = place.results.parents[1]
    git(project, "init", "-q")
    git(project, "add", "results")
    git(project, "commit", "-qm", "results")
    return place


# --- beside the committed numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint, verdict", [(0.53, "yes"), (0.54, "no"), (0.35, "yes"), (0.34, "no")])
def test_a_cell_agrees_within_two_standard_deviations_of_the_difference(committed, joint, verdict):
    """44 ± 2 · 4 · sqrt(1/3 + 1/1) = 44 ± 9.24."""
    record(committed, ROWS["One"], 0, joint)
    cells, _ = reproduce.comparison(committed)
    one = cells.loc[("Table 1", "One", "Joint")]
    assert (one["committed"], one["n"], one["here"], one["m"]) == (pytest.approx(44), 3, pytest.approx(100 * joint), 1)
    assert one["difference"] == pytest.approx(100 * joint - 44) and one["agrees"] == verdict
    assert one["by chance"] == pytest.approx(0.1835, abs=1e-4)  # of Student's t with 2 degrees of freedom


def test_more_seeds_here_narrow_what_agrees(committed):
    """44 ± 2 · 4 · sqrt(1/3 + 1/3) = 44 ± 6.53."""
    for seed in range(3):
        record(committed, ROWS["One"], seed, 0.51)
    cells, _ = reproduce.comparison(replace(committed, seeds=3))
    assert cells.loc[("Table 1", "One", "Joint"), ["m", "agrees"]].tolist() == [3, "no"]


def test_one_committed_seed_or_none_is_no_ground_for_a_verdict(committed):
    record(committed, ROWS["Two"], 0, 0.1)
    record(committed, ROWS["Three"], 0, 0.1)
    cells, _ = reproduce.comparison(committed)
    assert cells.loc[("Table 1", "Two", "Joint"), ["committed", "here", "agrees"]].tolist() == [90, 10, "–"]
    assert cells.loc[("Table 1", "Three", "Joint"), ["n", "agrees"]].tolist() == [0, "–"]


def test_numbers_of_another_kind_of_machine_are_judged_too(committed):
    """Whose drawn images differ in rounding, and so in their fingerprint."""
    record(committed, ROWS["One"], 0, 0.51, fingerprint="4567")
    cells, _ = reproduce.comparison(committed)
    assert cells.loc[("Table 1", "One", "Joint"), "agrees"] == "yes"


def test_a_one_seed_reproduction_leaves_the_other_seeds_in_the_table(committed):
    record(committed, ROWS["One"], 0, 0.41)
    assert table(ROWS, replace(committed, seeds=1)).loc[("One", "Joint"), ["seeds", "each"]].tolist() == [
        *(3, "41.00 44.00 48.00")
    ]


def test_the_comparison_is_printed_and_kept(committed):
    record(committed, ROWS["One"], 0, 0.80)
    text = reproduce.compare_with_committed(committed)
    kept = committed.runs / "quick" / "comparison.csv"
    assert "0 of 1 cells agree" in text and "comparison.csv" in text and "80.0" in text
    assert "Table 1,One,Joint,44.0000,4.0000,3,80.0000,1,36.0000,no" in kept.read_text()


def test_without_committed_numbers_it_says_why(place, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "TABLES", {"Table 1": ROWS})
    record(place, ROWS["One"], 0, 0.4)
    assert "HEAD has no results/quick/runs" in reproduce.compare_with_committed(place)  # no repository at all
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-qm", "nothing", "--allow-empty")
    assert "HEAD has no results/quick/runs" in reproduce.compare_with_committed(place)
    git(tmp_path, "add", "results")
    git(tmp_path, "commit", "-qm", "results")
    monkeypatch.setattr(reproduce, "TABLES", {"Table 1": {"One": replace(ROWS["One"], version=2)}})
    assert "other configurations" in reproduce.compare_with_committed(place)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no git" in reproduce.compare_with_committed(place)
    smoke = replace(place, profile=get_profile("smoke"))
    assert "keeps no results" in reproduce.compare_with_committed(smoke)


# --- what is trained ---------------------------------------------------------------------------------------------------


def test_judges_come_first_and_once_and_every_row_with_every_seed(place, monkeypatch):
    monkeypatch.setattr("dmvae_lib.paper.runs.Setting.splits", lambda *_: None)
    asked = [(run.row.name, run.seed) for run in reproduce.runs_of(replace(place, seeds=2))]
    judges = [row.name for row in JUDGES]
    assert asked[: len(judges)] == [(name, 0) for name in judges]
    for name in PAPERS_ROWS.keys() - set(judges):
        assert [seed for row, seed in asked if row == name] == [0, 1]
    assert len(asked) == len(set(asked))


def test_data_that_are_missing_are_an_error_before_anything_is_trained(place, monkeypatch):
    def missing(*_, **__):
        raise DMVAEError("no files")

    row = replace(ROWS["One"], data=DataSet("far", ("a",), missing))
    monkeypatch.setattr(reproduce, "ROWS", {row.name: row})
    monkeypatch.setattr(reproduce, "train_all", lambda *_: pytest.fail("trained"))
    with pytest.raises(DMVAEError, match="no files"):
        reproduce.reproduce(place)


NOTEBOOK = """
import toy
from pathlib import Path
from dmvae_lib.paper.runs import Run
from dmvae_lib.paper.tables import Results, table

place = toy.place_in(Path.cwd(), learning_curve=(), complete=())
rows = {"DMVAE": toy.ROW}
assert [Run(row, seed, place).entry["seed"] for row in rows.values() for seed in range(seeds)] == list(range(seeds))
Results(place, "01_toy").table("table1", table(rows, place, {"DMVAE": {"joint": 44.7}}), "Table 1: of toys.")
"""


def test_a_reproduction_ends_with_the_pages_and_the_comparison_and_trains_nothing_twice(tmp_path, monkeypatch, capsys):
    place = toy.place_in(tmp_path, learning_curve=(), complete=())
    cells = [nbformat.v4.new_code_cell('profile = ""\nseeds = 1', metadata={"tags": ["parameters"]})]
    notebook = nbformat.v4.new_notebook(cells=[*cells, nbformat.v4.new_code_cell(NOTEBOOK)], metadata=PYTHON)
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / "01_toy.ipynb")
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}\n")
    judges = {name: judge(toy.TOY, name) for name in toy.TOY.modalities}
    monkeypatch.setattr(reproduce, "JUDGES", tuple(judges.values()))
    monkeypatch.setattr(reproduce, "ROWS", {row.name: row for row in (*judges.values(), toy.ROW)})
    monkeypatch.setattr(reproduce, "TABLES", {"Table 1": {"DMVAE": toy.ROW}})
    monkeypatch.setattr(reproduce, "project_folder", lambda: tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "tests")))

    reproduce.reproduce(replace(place, seeds=3), None)
    assert "beside no committed ones" in capsys.readouterr().out
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "results")
    git(tmp_path, "commit", "-qm", "three seeds")
    written = {path.name: path.read_bytes() for path in (place.results / "runs").glob("*.json")}
    assert set(written) == {f"toy-classifier-{name}-0.json" for name in judges} | {
        f"toy-dmvae-{n}.json" for n in range(3)
    }

    shutil.rmtree(place.runs)  # another machine, which has the committed entries and no weights
    reproduce.reproduce(place, None)  # with one seed
    assert {path.parent.name for path in place.runs.glob("*/*/model.safetensors")} == {
        *(f"toy-classifier-{name}-0" for name in judges),
        "toy-dmvae-0",
    }
    again = {path.name: path.read_bytes() for path in (place.results / "runs").glob("*.json")}
    assert {name for name in written if again[name] != written[name]} <= {
        path.name for path in place.results.glob("runs/*-0.json")
    }
    assert "3 of 3 cells agree" in capsys.readouterr().out
    assert "Profile toys, 3 seeds, percent" in (place.results.parent / "README.md").read_text()  # not one seed's table
    assert "toy-dmvae [0](toys/runs/toy-dmvae-0.json) [1]" in (place.results.parent / "README.md").read_text()

    monkeypatch.setattr("dmvae_lib.paper.runs.train", lambda *_, **__: pytest.fail("trained again"))
    reproduce.train_all(reproduce.runs_of(place), None)


# --- the command and the notebooks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--profile", "fast"], ["--seeds", "0"], ["--device", "tpu9"]])
def test_a_wrong_option_is_one_clear_line(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reproduce", *words])
    monkeypatch.setattr(reproduce, "train_all", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit) as stopped:
        reproduce.main()
    (line,) = str(stopped.value).strip().splitlines()
    assert words[1] in line


def test_an_interrupt_says_that_the_same_command_goes_on(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["reproduce", "--profile", "smoke"])
    monkeypatch.setattr(reproduce, "reproduce", interrupted)
    with pytest.raises(SystemExit, match="the same command goes on"):
        reproduce.main()


def test_an_executed_notebook_has_its_outputs_and_nothing_of_when_and_where(place, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "project_folder", lambda: tmp_path)
    monkeypatch.setattr(reproduce, "write_pages", lambda results: None)
    cells = [
        nbformat.v4.new_code_cell("profile = 'quick'\nseeds = 1", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_markdown_cell(
            "![a picture](../docs/figures/model.svg), [itself](01_one.ipynb#top), [away](gone.md)"
        ),
        nbformat.v4.new_code_cell("import sys\nprint(profile, seeds)\nprint('slow', file=sys.stderr)\nprint('end')"),
    ]
    for folder in ("notebooks", "docs/figures"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "docs" / "figures" / "model.svg").touch()
    source = tmp_path / "notebooks" / "01_one.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=PYTHON), source)
    place = replace(place, seeds=2, data=tmp_path / "data")
    reproduce.execute_all(place)
    made = nbformat.read(place.results / "notebooks" / "01_one.ipynb", as_version=4)
    (output,) = made.cells[-1].outputs
    assert output.text == "quick 2\nend\n"
    (links,) = [cell.source for cell in made.cells if cell.cell_type == "markdown"]
    picture, itself, away = re.findall(r"\((.*?)\)", links)
    executed = place.results / "notebooks" / "01_one.ipynb"
    assert (executed.parent / picture).resolve() == (tmp_path / "docs" / "figures" / "model.svg").resolve()
    assert (executed.parent / itself).resolve() == source.resolve().with_name("01_one.ipynb#top") and away == "gone.md"
    assert reproduce.relinked(links, executed, source) == cells[1].source, "and back"
    text = json.dumps(made)
    assert "papermill" not in text and '"execution"' not in text and str(tmp_path) not in text


def test_a_notebook_that_fails_leaves_the_former_one(monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "project_folder", lambda: tmp_path)
    cells = [nbformat.v4.new_code_cell("1 / 0")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "one.ipynb")
    target = tmp_path / "results" / "one.ipynb"
    target.parent.mkdir()
    target.write_text("the former")
    with pytest.raises(reproduce.papermill.PapermillExecutionError, match="ZeroDivisionError"):
        reproduce.execute(tmp_path / "one.ipynb", target, {})
    assert target.read_text() == "the former" and list(target.parent.iterdir()) == [target]


@given(st.one_of(st.text(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none()))
def test_notebook_parameters_are_values_not_code(value):
    names = ("profile", "seeds", "device", "data")
    text = PythonTranslator.codify(dict.fromkeys(names, value), "Parameters")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return  # refused
    assert all(isinstance(node, ast.Assign) for node in tree.body)
    assert [(node.targets[0].id, ast.literal_eval(node.value)) for node in tree.body] == [
        (name, value) for name in names
    ]


NASTY = [
    'quick"; import os; os.system("true")  #',
    "quick'\nimport os\n'",
    "../../quick",
    "quick@0.5/../..",
    "quick\0",
    "",
    3,
]


@pytest.mark.parametrize("value", NASTY)
def test_values_of_parameters_that_are_none_are_refused(value):
    with pytest.raises(DMVAEError, match="profile"):
        setting(value)
    with pytest.raises(DMVAEError, match="device"):
        setting(device=value)
    with pytest.raises(DMVAEError, match="seeds"):
        setting(seeds=value if isinstance(value, str) else True)
    with pytest.raises(DMVAEError, match="data"):
        setting(data=3 if isinstance(value, int) else f"{value}\0")
