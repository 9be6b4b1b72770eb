"""Tables, claims and results/ are views of the ledger: what is in it, by whom, and what is left out."""

import json
import math
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
from dmvae_lib.paper.figures import by_pairs, curves, embedding
from dmvae_lib.paper.profiles import get_profile
from dmvae_lib.paper.published import CHANCE, MEASURES, Claim
from dmvae_lib.paper.rows import TABLE1, TABLE2, TABLE3
from dmvae_lib.paper.rows.row import Row
from dmvae_lib.paper.runs import Run, Setting, setting
from dmvae_lib.paper.tables import Results, check, compare, ledger, median, readable, table, two_judges, versus, which
from dmvae_lib.paper.tables import curves as curves_of


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
    run.entry_path.write_text(json.dumps(seal(entry | {"scores": {"joint": joint}, "seconds": 1.0} | changed)))
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


def test_entries_of_several_kinds_of_machine_stand_in_one_table(place):
    """Drawn images and features differ between them in rounding: the fingerprint of the same data is another."""
    record(place, ROWS["One"], 0, 0.4)
    record(place, ROWS["One"], 1, 0.6, fingerprint="4567")
    assert table({"One": ROWS["One"]}, place)["mean"].tolist() == [pytest.approx(50)]


def test_the_mean_and_spread_over_seeds_stand_beside_the_papers_number():
    values = {"DMVAE": [{"joint": 0.40}, {"joint": 0.44}], "extra": [{"joint": 0.1}, {"joint": 0.1}]}
    found = compare(values, {"DMVAE": {"joint": 44.7}})
    row = found.loc[("DMVAE", "Joint")]
    assert row["mean"] == pytest.approx(42) and row["sd"] == pytest.approx(8**0.5) and row["seeds"] == 2
    assert row["difference"] == pytest.approx(-2.7) and pd.isna(found.loc[("extra", "Joint"), "paper"])
    shown = readable(found)
    assert shown.loc["DMVAE", ("Joint", "ours")] == "42.0 ± 2.8" and shown.loc["extra", ("Joint", "paper")] == "–"
    assert list(compare({"a": [{"b->c": 0.5}]}, {}).index) == [("a", "b->c")]  # a measure that the paper lacks


def verdicts(place, claims, **shares):
    """check() on entries: One=(0.5, 0.6) are the joint coherence of seeds 0 and 1; None: no run of that seed."""
    for title, of_seeds in shares.items():
        for seed, share in enumerate(of_seeds):
            if share is not None:
                record(place, ROWS[title], seed, share, chance={"joint": 0.2}, strong={"scores": {"joint": 1 - share}})
    return check(claims, table(ROWS, place))


ONE_ABOVE_TWO = Claim("above", "Table 1", ("One", "joint"), ("Two", "joint"))


def test_a_claim_is_decided_by_the_interval_of_the_differences_seed_by_seed(place):
    """By hand: differences of 10, 11, 12 points have mean 11, standard deviation 1, t(2) = 4.303: 11 +- 2.484."""
    scores = {"One": (0.50, 0.71, 0.92), "Two": (0.40, 0.60, 0.80)}  # far apart, but not seed by seed
    row = verdicts(place, [ONE_ABOVE_TWO], **scores).iloc[0]
    assert row["difference [95 %]"] == "+11.0 [+8.5, +13.5]" and row["verdict"] == "confirmed" and row["seeds"] == 3
    assert (row["here"], row["against"], row["claimed"]) == ("71.0", "60.0", "> 0")
    backwards = ONE_ABOVE_TWO._replace(cell=("Two", "joint"), than=("One", "joint"))
    assert check([backwards], table(ROWS, place))["verdict"].item() == "refuted"
    assert check([ONE_ABOVE_TWO], table(ROWS, place), "strong")["verdict"].item() == "refuted"


@pytest.mark.parametrize(
    "scores, verdict, seeds",
    [
        ({"One": (0.9,), "Two": (0.1,)}, "not decided at this budget", 1),  # however large: one seed has no spread
        ({"One": (0.50, 0.60), "Two": (0.49, 0.58)}, "not decided at this budget", 2),
        ({"One": (0.5, 0.6, None), "Two": (None, 0.5, 0.6)}, "not decided at this budget", 1),
        ({"One": (0.5, 0.6), "Two": ()}, "not measured", 0),
    ],
)
def test_one_seed_wide_intervals_and_missing_runs_decide_nothing(place, scores, verdict, seeds):
    found = verdicts(place, [ONE_ABOVE_TWO], **scores).iloc[0]
    assert found["verdict"] == verdict and found["seeds"] == seeds


@pytest.mark.parametrize(
    "shares, verdict",
    [((0.25, 0.27), "confirmed"), ((0.5, 0.51), "refuted"), ((0.2, 0.4), "not decided at this budget")],
)
def test_a_collapse_is_within_a_margin_of_chance(place, shares, verdict):
    claims = [Claim("collapses", "Table 3", ("One", "joint"), CHANCE, -math.inf, 20.0)]  # 26 +- 13 is below 20 + 20
    found = verdicts(place, claims, One=shares).iloc[0]
    assert (found["verdict"], found["against"], found["claimed"]) == (verdict, "20.0", "< 20")


def test_the_same_is_within_a_margin_and_percent_may_be_given(place):
    same = Claim("same", "Table 2", ("One", "joint"), ("Two", "joint"), -5.0, 5.0)
    half = Claim("most", "Fig. 6", ("One", "joint"), 50.0)
    found = verdicts(place, [same, half], One=(0.60, 0.70, 0.80), Two=(0.59, 0.70, 0.81))
    assert found["verdict"].tolist() == ["confirmed", "not decided at this budget"]
    assert found["claimed"].tolist() == ["-5 to +5", "> 0"]


def test_two_judges_stand_side_by_side_and_where_they_decide_otherwise(place):
    for title, scores in {"One": (0.50, 0.61, 0.72), "Two": (0.40, 0.50, 0.60), "Three": (0.3, 0.4, 0.5)}.items():
        for seed, share in enumerate(scores):
            strong = {"joint": 0.9 - share if title == "One" else share}  # it turns the first row round
            record(place, ROWS[title], seed, share, strong={"scores": strong})
    record(place, ROWS["Two"], 3, 0.99)  # a run that the strong judge has not seen
    scored, turned = two_judges(table(ROWS, place))
    assert scored["Joint"].loc["Two"].to_dict() == {"usual": "50.0 ± 10.0", "strong": "50.0 ± 10.0"}
    assert scored["Joint"].loc["One", "strong"] == "29.0 ± 11.0"
    assert turned.index.tolist() == ["One above Two, Joint", "One above Three, Joint"]
    assert turned["verdict"].tolist() == ["confirmed"] * 2
    assert turned["verdict, strong judge"].tolist() == ["not decided at this budget"] * 2


def test_a_caption_names_the_seed_and_of_how_many(place):
    record(place, ROWS["One"], 2, 0.5)
    assert which(Run(ROWS["One"], 2, place)) == "seed 2, the only one here"
    record(place, ROWS["Two"], 3, 0.1)  # another row's
    for seed, share in ((0, 0.3), (1, 0.9), (4, 0.8)):
        record(place, ROWS["One"], seed, share)
    named = {seed: which(Run(ROWS["One"], seed, place)) for seed in (0, 1, 2, 4)}
    places = {0: "the lowest", 2: "the median", 4: "number 3 from below", 1: "the highest"}
    assert named == {seed: f"seed {seed}, {of} of 4 by their scores" for seed, of in places.items()}


def test_rows_are_compared_seed_by_seed(place):
    """Worked out by hand: +10, +11, +12 points, whose interval is 4.303 times the standard error of 1 / sqrt(3)."""
    for seed, (one, two) in enumerate(((0.50, 0.40), (0.61, 0.50), (0.72, 0.60))):
        record(place, ROWS["One"], seed, one)
        record(place, ROWS["Two"], seed, two)
    record(place, ROWS["Three"], 0, 0.7)
    found = versus(table(ROWS, place), [("One", "Two"), ("Two", "Two"), ("Three", "One")], ["joint"])["Joint"]
    assert found.map(str).to_dict() == {
        "One − Two": "+11.0 [+8.5, +13.5] *",
        "Two − Two": "+0.0 [+0.0, +0.0]",
        "Three − One": "+20.0",
    }
    assert [of.decided for of in found] == [True, False, False]
    assert "+11.0 [+8.5, +13.5] *" in found.to_frame().to_html() + str(found)  # as notebooks show it
    assert str(versus(table(ROWS, place), [("One", "Two")], ["nothing"]).iloc[0, 0]) == "–"


def test_the_papers_own_numbers_fulfil_the_papers_claims():
    """Guessing is always the commonest digit, 11.35 % of the paper's test pairs (MNIST's 1,135 ones of 10,000)."""
    papers = {"table1": published.TABLE1, "table2": published.TABLE2, "table3": published.TABLE3}
    told = 0
    for name, claims in published.CLAIMS.items():
        for claim in claims:
            than = {CHANCE: 11.35}.get(claim.than, claim.than) if isinstance(claim.than, str) else claim.than
            row, measure = claim.cell
            cell = papers[name].get(row, {}).get(measure)
            than = papers[name].get(than[0], {}).get(than[1]) if isinstance(than, tuple) else than
            if cell is not None and than is not None:
                assert claim.low < cell - than < claim.high, claim
                told += 1
    assert told == 6 + 9 + 13


def test_the_committed_ledger_measures_what_the_claims_need():
    for name, of_table in (("table1", TABLE1), ("table2", TABLE2), ("table3", TABLE3)):
        entries = {title: Run(row, 0, setting("quick")).recorded() for title, row in of_table.items()}
        for claim in published.CLAIMS[name]:
            for row, measure in (claim.cell, claim.than) if isinstance(claim.than, tuple) else (claim.cell,):
                assert measure in entries[row]["scores"] | entries[row].get("codes", {}), claim
            assert claim.than != CHANCE or measure in entries[row]["chance"]


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
    assert sorted(text.get_text() for text in ax.texts) == sorted(3 * list(map(str, range(12))))


def test_curves_name_the_bound_and_say_where_lambda_weighs():
    history = pd.DataFrame({"log_likelihood(b<-a)": [1.0], "kl(b<-a/private)": [2.0], "total": [3.0]})
    figure = curves(history, {"fit": ["log_likelihood(b<-a)"], "rest": ["kl(b<-a/private)", "total"]})
    labels = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in figure.axes]
    assert labels == [["b<-a"], ["b<-a", "total"]]
    assert [ax.get_ylabel() for ax in figure.axes] == ["nats per pair, times λ", "nats per pair"]


def test_curves_are_the_validation_scores_of_the_ledger_by_pairs_seen(tmp_path):
    from toy import ROW, place_in

    place = place_in(tmp_path, validate_every=20)
    entry = Run(ROW, 0, place).train().entry
    found = curves_of({"toys": ROW, "never trained": replace(ROW, name="toy-other")}, place)
    assert list(found.index) == [("toys", 0, 200), ("toys", 0, 400)]  # batches of 10
    assert found.loc[("toys", 0, 400)].tolist() == [100 * entry["curve"][name][-1] for name in entry["scores"]]
    assert found.attrs["runs"] == [f"{ROW.name}-0.json"]
    assert len(by_pairs(found).axes) == 3
    assert curves_of({"toys": ROW}, place_in(tmp_path / "none")).empty


def test_a_frame_of_two_header_lines_is_written_with_one(place):
    columns = pd.MultiIndex.from_tuples([("Joint", "usual"), ("Joint", "strong")])
    Results(place, "n").frame("judged", pd.DataFrame([[1, 2]], ["One"], columns), "Two judges.")
    table = (place.results / "judged.md").read_text().split("\n\n")[1].splitlines()
    assert [cell.strip() for cell in table[0].split("|")[1:-1]] == ["", "Joint, usual", "Joint, strong"]
