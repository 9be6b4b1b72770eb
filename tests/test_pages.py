"""The pages on results/: each artefact with its checksum, key and runs, and nothing that is not in the files."""

import hashlib
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import test_tables
from matplotlib.figure import Figure
from test_tables import ROWS, record

from dmvae_lib import DMVAEError
from dmvae_lib.files import read_json, sha256
from dmvae_lib.paper.pages import BEGIN, END, index, manifest, provenance, readme_results, write_pages
from dmvae_lib.paper.profiles import get_profile
from dmvae_lib.paper.tables import Results, compare

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted(path.parent for path in (ROOT / "results").glob("*/manifest.json") if "@" not in path.parent.name)
place = test_tables.place  # the fixture


@pytest.fixture
def readme(place):
    """The README beside results/, which has the marks."""
    place.results.mkdir(parents=True)
    path = place.results.parents[1] / "README.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return path


def test_whatever_writes_an_artefact_shows_it_on_the_pages(place, readme):
    """An index that only one of four commands wrote once showed another command's table as it had been."""
    for share in (0.25, 0.75):
        made = compare({"a": [{"joint": share}]}, {"a": {"joint": 44.7}})
        for name in ("table1", "independent"):
            Results(place, "benchmarks/independent.py").table(name, made, f"{name}: coherence. By | MultiVae.")
        page = (place.results.parent / "README.md").read_text()
        assert page == index(place.results.parent) and page.count(f"{100 * share:.1f} *(44.7)*") == 2
        digest = sha256(place.results / "independent.csv")
        assert "**[independent](quick/README.md#independent)** independent: coherence · `" + digest[:12] in page
        assert (place.results / "README.md").read_text() == provenance(place.results)
        shown = readme.read_text()
        assert shown.startswith("before\n") and shown.endswith("after\n") and "old" not in shown
        assert f"{100 * share:.1f} *(44.7)*" in shown and "By | MultiVae. Profile quick, 1 seed, percent." in shown


def test_an_artefact_leads_to_its_runs_its_picture_and_an_entry_to_cite(place):
    runs = [record(place, replace(ROWS["One"], name="one-more"), seed, 0.4) for seed in range(2)]
    Results(place, "03_table1").frame("t", pd.DataFrame({"a": ["x|y"]}), "T at 5 %, a_b.", runs)
    Results(place, "03_table1").figure("picture", Figure(), "P.", runs[:1])
    page, own = index(place.results.parent), provenance(place.results)
    assert "one-more [0](quick/runs/one-more-0.json) [1](quick/runs/one-more-1.json)" in page
    assert (
        '| <img src="quick/picture.png" width="120" alt="picture"> | **[picture](quick/README.md#picture)** P' in page
    )
    assert "one-more [0](runs/one-more-0.json) [1](runs/one-more-1.json)" in own and "![picture](picture.png)" in own
    assert "@misc{dmvae_lib-quick-t," in own and r"title = {T at 5 \%, a\_b. Profile quick.}" in own
    content = (place.results / "t.csv").read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    assert f"swh:1:cnt:{git}}}" in own and f"note = {{SHA-256 {hashlib.sha256(content).hexdigest()}}}" in own


def test_the_address_to_cite_is_the_files_name_in_git(place):
    Results(place, "n").frame("t", pd.DataFrame({"a": [1]}), "T.")
    named = subprocess.run(["git", "hash-object", place.results / "t.csv"], capture_output=True, text=True, check=True)
    assert f"swh:1:cnt:{named.stdout.strip()}" in provenance(place.results)


def test_a_file_that_is_not_the_one_that_was_made_is_marked_and_no_number_of_it_is_in_the_readme(place, readme):
    results = Results(place, "03_table1")
    results.table("table1", compare({"a": [{"joint": 0.5}]}, {"a": {"joint": 44.7}}), "Table 1: it.")
    for file in (csv := place.results / "table1.csv", place.results / "table1.md"):
        file.write_text(file.read_text().replace("50.0", "99.9"))
    results.frame("other", pd.DataFrame({"a": [1]}), "Other.")
    assert "**changed since: table1.csv, table1.md**" in index(place.results.parent)
    assert f"| [{csv.name}]({csv.name}) | `" in provenance(place.results) and "**changed since**" in provenance(
        place.results
    )
    for page in (readme.read_text(), index(place.results.parent), provenance(place.results)):
        assert "99.9" not in page
    assert "Table 1" not in readme.read_text()


def test_the_readme_shows_each_table_from_the_profile_nearest_to_the_papers_data(place, readme):
    assert readme_results(place.results.parent).startswith("No profile has results")
    subset = replace(place, profile=get_profile("subset"), results=place.results.with_name("subset"))
    for where, share in ((place, 0.5), (subset, 0.25)):
        made = compare({"a": [{"joint": share}], "b": [{"joint": 0.1}]}, {"a": {"joint": 44.7}})
        Results(where, "n").table("table1", made, "Table 1: it.")
    other = compare({"a": [{"joint": 0.75}]}, {"a": {"joint": 12.0}})
    Results(place, "n").table("table3", other, "Table 3: of one profile alone.")
    assert "75.0 *(12)*" in readme.read_text() and "Profile quick, 1 seed" in readme.read_text()
    assert "25.0 *(44.7)*" in readme.read_text() and "50.0" not in readme.read_text()
    assert "**[Table 1: it](results/subset/README.md#table1).** Profile subset, 1 seed" in readme.read_text()
    assert re.search(r"^\| b +\| 10.0 +\|", readme.read_text(), re.M)  # which the paper lacks
    (subset.results / "table1.csv").unlink()
    write_pages(place.results.parent)
    assert "50.0 *(44.7)*" in readme.read_text() and "Profile `quick` (stand-ins" in readme.read_text()


def test_the_readme_names_the_best_competitors_and_each_claim_that_is_not_confirmed(place, readme):
    shares = {"Weak": 0.1, "Papers": 0.2, "Ours": 0.9, "DMVAE": 0.5}
    paper = {"Weak": 1.0, "Papers": 70.0, "Ours": 2.0, "DMVAE": 60.0}
    made = compare({row: [{"rank1": s}] for row, s in shares.items()}, {row: {"rank1": p} for row, p in paper.items()})
    Results(place, "n").table("table2", made, "Table 2: it.")
    rows = re.findall(r"^\| (\w+) ", readme_results(place.results.parent, {"table2": 1}), re.M)
    assert rows == ["Papers", "Ours", "DMVAE"]
    claims = {"A above B": "refuted", "A above C": "confirmed", "A above D": "confirmed", "A above E": "not decided"}
    frame = pd.DataFrame({"claim": claims.keys(), "in": ["Table 2"] * 4, "verdict": claims.values()}).set_index("claim")
    frame.loc["what a figure shows"] = ["Fig. 6", "confirmed"]
    frame.loc["what it would show everywhere"] = ["beyond Fig. 6", "refuted"]
    Results(place, "n").frame("table2_claims", frame, "Claims.")
    said = "- **3 confirmed**: A above C; A above D; what a figure shows.\n- **1 refuted**: A above B.\n"
    said += "- **1 not decided**: A above E.\n- **1 refuted (beyond the paper)**: what it would show"
    assert said in readme.read_text()
    said = "3 confirmed, 1 refuted, 1 not decided, 1 refuted (beyond the paper). "
    assert f"**The paper's claims**: on drawn stand-ins {said}" in readme.read_text()
    Results(place, "n").frame("table2_claims", frame.rename(columns={"verdict": "here"}), "Claims.")
    assert "confirmed" not in readme.read_text()


def test_the_readmes_picture_and_its_caption_are_those_nearest_to_the_papers_data(place, readme):
    Results(place, "n").figure("fig4b", Figure(), "Figure 4b: drawn")
    Results(place, "n").table("table1", compare({"a": [{"joint": 0.5}]}, {}), "Table 1: it.")
    assert "(results/quick/fig4b.png)\n\n*Figure 4b: drawn Profile quick.*" in readme.read_text()
    subset = replace(place, profile=get_profile("subset"), results=place.results.with_name("subset"))
    Results(subset, "n").figure("fig4b", Figure(), "Figure 4b: real.")
    assert "(results/subset/fig4b.png)" in readme.read_text() and "quick/fig4b" not in readme.read_text()


def test_a_readme_without_the_marks_is_named(place, readme):
    readme.write_text("mine")
    with pytest.raises(DMVAEError, match="README.md lacks the marks"):
        Results(place, "n").frame("t", pd.DataFrame({"a": [1]}), "T.")


def test_a_rehearsals_results_are_on_no_page(place):
    rehearsal = replace(place, results=place.results.with_name("quick@0.05"))
    Results(rehearsal, "n").table("table1", compare({"a": [{"joint": 0.5}]}, {}), "Table 1: it.")
    assert "## Profile" not in index(place.results.parent)


# --- the committed pages ----------------------------------------------------------------------------------------------


def test_the_committed_pages_are_those_of_the_committed_files():
    shown = (ROOT / "results" / "README.md").read_text("utf-8")
    assert shown == index(ROOT / "results"), "dmvae_lib.paper.pages.write_pages puts it right"
    assert len(shown.splitlines()) <= 250 and "changed since" not in shown


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_every_checksum_on_a_committed_page_is_that_of_the_file_beside_it(folder):
    page = (folder / "README.md").read_text("utf-8")
    assert page == provenance(folder), "dmvae_lib.paper.pages.write_pages puts it right"
    listed = dict(re.findall(r"^\| (?:\[|`)([\w.-]+)(?:\].*?|`) \| `([0-9a-f]{64})` \|$", page, re.M))
    made = {path.name for path in folder.iterdir() if path.is_file()} - {"README.md", "manifest.json", ".lock"}
    assert listed.keys() == made
    for name, digest in listed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert len(re.findall(r"^@misc\{dmvae_lib-", page, re.M)) == len(json.loads((folder / "manifest.json").read_text()))


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_no_committed_artefact_is_older_than_a_run_that_it_names(folder):
    trained = {path.name: read_json(path, "")["made"]["finished"] for path in (folder / "runs").glob("*.json")}
    for name, entry in manifest(folder).items():
        later = [run for run in entry["runs"] if trained[run] > entry["made"]["finished"]]
        assert not later, f"{name} is older than {', '.join(later)}: execute {entry['notebook']} once more"
