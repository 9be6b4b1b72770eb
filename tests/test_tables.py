"""Tables, claims and results/ are views of the ledger: what is in it, by whom, and what is left out."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from torch import nn

from dmvae_lib import DMVAEError, Schedule
from dmvae_lib.files import seal, sha256
from dmvae_lib.paper import published
from dmvae_lib.paper.data import DataSet
from dmvae_lib.paper.figures import curves, embedding
from dmvae_lib.paper.profiles import get_profile
from dmvae_lib.paper.published import MEASURES, Claim
from dmvae_lib.paper.rows.row import Row
from dmvae_lib.paper.runs import Run, Setting
from dmvae_lib.paper.tables import Results, check, compare, ledger, median, readable, table


def build(data, splits, *, size=1):
    return nn.Linear(size, size)


def schedule(profile):
    return Schedule(profile.steps)


def evaluate(run):
    raise AssertionError("a table evaluates nothing")


def load(*_, **__):
    raise AssertionError("a table loads no data")


DATA = DataSet("letters", ("a", "b"), load)
ROWS = {title: Row(title.lower(), title, DATA, build, schedule, evaluate) for title in ("One", "Two", "Three")}


@pytest.fixture
def place(tmp_path):
    return Setting(get_profile("quick"), runs=tmp_path / "runs", results=tmp_path / "results" / "quick")


def record(place, row, seed, joint, fingerprint="0123", **changed):
    """A run's entry, put into the ledger as if it had been trained."""
    run = Run(row, seed, place)
    entry = {"row": row.name, "seed": seed, "config": run.config, "data": {"train": "89ab", "test": fingerprint}}
    run.entry_path.parent.mkdir(parents=True, exist_ok=True)
    run.entry_path.write_text(json.dumps(seal(entry | {"scores": {"joint": joint}} | changed)))
    return run


# --- the ledger and tables of it --------------------------------------------------------------------------------------


def test_a_table_has_every_seed_of_the_rows_present_configuration_and_no_other(place):
    for seed, joint in enumerate((0.40, 0.44, 0.48)):
        record(place, ROWS["One"], seed, joint)
    record(place, ROWS["Two"], 0, 0.9)
    record(place, replace(ROWS["Two"], version=2), 1, 0.1)
    record(place, replace(ROWS["Three"], options={"size": 2}), 0, 0.1)
    found = table(ROWS, replace(place, seeds=1), {"One": {"joint": 44.7}})
    assert found["seeds"].to_dict() == {("One", "Joint"): 3, ("Two", "Joint"): 1, ("Three", "Joint"): 0}
    assert found.loc[("One", "Joint"), "mean"] == pytest.approx(44) and found.loc[("Two", "Joint"), "mean"] == 90
    assert found.attrs["runs"] == ["one-0.json", "one-1.json", "one-2.json", "two-0.json"]
    assert readable(found).loc["Three"].tolist() == ["–", "–", "–"]
    assert table(ROWS, place, seeds=range(1)).loc[("One", "Joint"), "mean"] == pytest.approx(40)


def test_a_profile_without_results_and_a_validation_split_have_ledgers_of_their_own(place):
    record(place, ROWS["One"], 0, 0.4)
    for other in (replace(place, evaluation="validation"), replace(place, profile=get_profile("smoke"))):
        assert ledger(other) == {}
        record(other, ROWS["One"], 0, 0.6)
        assert table(ROWS, other).loc[("One", "Joint"), "mean"] == 60
    assert table(ROWS, place).loc[("One", "Joint"), "mean"] == 40


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text.replace("0.4", "0.9"), lambda text: "[]"])
def test_a_damaged_entry_is_named_with_what_to_do(place, damage):
    path = record(place, ROWS["One"], 0, 0.4).entry_path
    path.write_text(damage(path.read_text()))
    with pytest.raises(DMVAEError, match=r"one-0.json .*(damaged|expected an object).*git checkout.*make reproduce"):
        table(ROWS, place)


def test_an_entry_under_another_runs_name_is_refused(place):
    path = record(place, ROWS["One"], 0, 0.4).entry_path
    path.rename(path.with_name("one-1.json"))
    with pytest.raises(DMVAEError, match=r"one-1.json is the entry of one, seed 0, not its own"):
        ledger(place)


def test_entries_on_different_test_data_are_not_put_into_one_table(place):
    record(place, ROWS["One"], 0, 0.4)
    record(place, ROWS["Two"], 2, 0.4, fingerprint="4567")
    with pytest.raises(DMVAEError, match="one-0.json was scored on the test data 0123 and two-2.json on 4567.*SEEDS=3"):
        table(ROWS, place)
    assert table({"One": ROWS["One"]}, place).attrs["data"] == {"letters": "0123"}
    other = replace(ROWS["Two"], data=replace(DATA, name="digits"))  # each data set has a test split of its own
    record(place, other, 2, 0.4, fingerprint="4567")
    assert table({"One": ROWS["One"], "Two": other}, place)["seeds"].tolist() == [1, 1]


def test_the_mean_and_spread_over_seeds_stand_beside_the_papers_number():
    values = {"DMVAE": [{"joint": 0.40}, {"joint": 0.44}], "extra": [{"joint": 0.1}, {"joint": 0.1}]}
    found = compare(values, {"DMVAE": {"joint": 44.7}})
    row = found.loc[("DMVAE", "Joint")]
    assert row["mean"] == pytest.approx(42) and row["sd"] == pytest.approx(8**0.5) and row["seeds"] == 2
    assert row["difference"] == pytest.approx(-2.7) and pd.isna(found.loc[("extra", "Joint"), "paper"])
    shown = readable(found)
    assert shown.loc["DMVAE", ("Joint", "ours")] == "42.0 ± 2.8" and shown.loc["extra", ("Joint", "paper")] == "–"
    assert list(compare({"a": [{"b->c": 0.5}]}, {}).index) == [("a", "b->c")]  # a measure that the paper lacks


def test_a_claim_holds_by_the_means_and_is_marked_within_the_spread():
    scores = {"A": (0.50, 0.58), "B": (0.40, 0.50), "C": (0.2, 0.2)}
    values = {row: [{"joint": share} for share in shares] for row, shares in scores.items()}
    pairs = [("A", "B", 1.0), ("B", "A", 1.0), ("A", "C", 2.0), ("A", "C", 3.0), ("A", "D", 1.0)]
    claims = [Claim(f"{a} {b} {factor}", (a, "joint"), (b, "joint"), factor) for a, b, factor in pairs]
    found = check(claims, compare(values | {"D": []}, {}))
    assert found["here"].tolist() == [
        "holds, within the spread of seeds",  # 54 > 45, standard deviations of 5.7 and 7.1
        "does not hold, within the spread of seeds",
        "holds",  # 54 > 40
        "does not hold",  # 54 < 60 by more than 5.7
        "no runs",
    ]
    assert found["means"].tolist()[2:] == ["A 54.0 > 2 × C 20.0", "A 54.0 > 3 × C 20.0", "A 54.0 > D –"]
    single = {row: seeds[:1] for row, seeds in values.items()}
    assert check(claims[:1], compare(single, {}))["here"].item() == "holds"  # one seed has no spread


def test_the_papers_own_numbers_fulfil_the_papers_claims():
    for name, rows in (("table1", published.TABLE1), ("table2", published.TABLE2), ("table3", published.TABLE3)):
        shares = {row: [{measure: percent / 100 for measure, percent in of.items()}] for row, of in rows.items()}
        assert set(check(published.CLAIMS[name], compare(shares, {}))["here"]) == {"holds"}, name


def test_figures_are_made_from_the_median_run(place):
    runs = [record(place, ROWS["One"], seed, joint) for seed, joint in enumerate((0.9, 0.1, 0.5, 0.6))]
    assert median(runs[:3]).seed == 2 and median(runs).seed == 2 and median(runs[:1]).seed == 0


# --- results/ ---------------------------------------------------------------------------------------------------------


def test_an_artefact_has_its_files_their_checksums_and_its_runs_in_the_manifest(place):
    runs = [record(place, ROWS["One"], seed, 0.4) for seed in range(2)]
    found = table({"One": ROWS["One"]}, place)
    judge = record(place, ROWS["Two"], 0, 0.99)
    Results(place, "03_table1").table("table1", found, "Table 1.", [judge, runs[0]])
    Results(place, "03_table1").frame("probes", pd.DataFrame({"a": [1]}), "Probes.", runs)
    for name in ("fig4a", "fig8", "curves"):
        Results(place, "benchmarks/bench.py").figure(name, Figure(), "A figure.")
    files = {path.name for path in place.results.iterdir() if path.is_file()}
    made = "table1.csv table1.md table1.tex probes.csv probes.md curves.png fig4a.png fig4a.pdf fig8.png fig8.pdf"
    assert files == {*made.split(), "manifest.json", "README.md"}
    manifest = json.loads((place.results / "manifest.json").read_text())
    entry = manifest["table1"]
    assert entry["runs"] == ["one-0.json", "one-1.json", "two-0.json"]
    assert set(entry["made"]) == {"commit", "dmvae_lib", "finished"}
    assert entry["caption"] == "Table 1. Profile quick, 2 seeds, percent."
    assert entry["notebook"] == "notebooks/03_table1.ipynb" and manifest["curves"]["notebook"] == "benchmarks/bench.py"
    for of in manifest.values():
        assert of["files"] == {name: sha256(place.results / name) for name in of["files"]}


def test_an_artefact_that_is_made_anew_leaves_no_file_of_the_former(place):
    results = Results(place, "03_table1")
    results.table("t", compare({"a": [{"joint": 0.5}]}, {}), "T.")
    results.frame("t", pd.DataFrame({"a": [1]}), "T.")
    assert {path.name for path in place.results.glob("t.*")} == {"t.csv", "t.md"}


def test_nothing_is_written_by_profile_smoke_or_on_a_validation_split(place):
    shown = compare({"a": [{"joint": 0.5}]}, {})
    for other in (replace(place, profile=get_profile("smoke")), replace(place, evaluation="validation")):
        assert Results(other, "03_table1").table("t", shown, "T.").loc["a", ("Joint", "ours")] == "50.0"
    assert not place.results.parent.exists()


def test_latex_tables_compile_in_their_captions(place):
    made = compare({"MVAE": [{"mnist->svhn": 0.5}]}, {"MVAE": {"mnist->svhn": 9.5}})
    Results(place, "n").table("t", made, "Table 1: accuracy 95.8%, 100.0% & more.")
    tex, md = (place.results / "t.tex").read_text(), (place.results / "t.md").read_text()
    assert not [line for line in tex.splitlines() if "%" in line.replace(r"\%", "") or "→" in line]
    assert r"\caption{accuracy 95.8\%, 100.0\% \& more." in tex and r"\toprule" in tex
    assert "+40.5" in md and "50.0" in md and MEASURES["mnist->svhn"] in md


# --- figures ----------------------------------------------------------------------------------------------------------


def test_points_of_any_modalities_have_markers_of_their_own():
    names, labels = ("audio", "video", "text"), np.arange(12)
    points = {name: np.random.default_rng(0).normal(size=(12, 2)) for name in names}
    ax = embedding(points, labels, {name: name.title() for name in names}).axes[0]
    handles = ax.get_legend().legend_handles
    assert len({handle.get_marker() for handle in handles}) == 3 and [h.get_label() for h in handles][0] == "Audio"
    assert sorted(text.get_text() for text in ax.texts) == sorted(map(str, range(12)))


def test_curves_name_the_bound_and_say_where_lambda_weighs():
    history = pd.DataFrame({"log_likelihood(b<-a)": [1.0], "kl(b<-a/private)": [2.0], "total": [3.0]})
    figure = curves(history, {"fit": ["log_likelihood(b<-a)"], "rest": ["kl(b<-a/private)", "total"]})
    labels = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in figure.axes]
    assert labels == [["b<-a"], ["b<-a", "total"]]
    assert [ax.get_ylabel() for ax in figure.axes] == ["nats per pair, times λ", "nats per pair"]
