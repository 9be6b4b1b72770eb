"""Runs and their ledger: trained once, resumed exactly, replaced when the configuration is another, never mixed up."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from toy import MVAE_ROW, OPTIONS, ROW, TOY, load, place_in

from dmvae_lib import DMVAEError
from dmvae_lib.files import seal
from dmvae_lib.paper import pretrained, runs
from dmvae_lib.paper.profiles import get_profile
from dmvae_lib.paper.rows import TABLE1
from dmvae_lib.paper.rows.row import train_pairs
from dmvae_lib.paper.runs import Run, setting, train_rows
from dmvae_lib.paper.workers import train_all
from dmvae_lib.training import model_objective

pytestmark = pytest.mark.usefixtures("one_thread")
TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return place_in(tmp_path_factory.mktemp("project"))


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("trained")

    monkeypatch.setattr(runs, "train", refuse)


def same(one, other) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def trained(run: Run) -> bool:
    """Whether this call trained it."""
    done = []
    usual, runs.train = runs.train, lambda *arguments, **options: done.append(1) or usual(*arguments, **options)
    try:
        replace(run).train()
    finally:
        runs.train = usual
    return bool(done)


# --- trained once ---------------------------------------------------------------------------------------------------


def test_a_run_is_trained_once_then_loaded_with_the_same_weights(place, no_training, monkeypatch):
    monkeypatch.undo()
    first = Run(ROW, 0, place).train()
    monkeypatch.setattr(runs, "train", None)  # training again would fail
    again = Run(ROW, 0, place)
    assert same(first.model, again.model) and not first.model.training and not again.model.training
    assert first.history.equals(again.history) and list(again.history.index) == [20, 40]
    assert first.entry == again.entry
    assert {path.name for path in first.folder.iterdir()} - {".lock"} == {
        *("model.safetensors", "history.csv", "entry.json", "identity", "checkpoint.pt")
    }


def test_the_ledgers_entry_says_what_made_the_run(place):
    run = Run(ROW, 0, place)
    entry = json.loads(run.entry_path.read_text())
    assert run.entry_path == place.results / "runs" / "toy-dmvae-0.json" and entry == run.entry
    assert entry["config"] == ROW.config(place.profile, 0) and entry == seal(entry)
    splits = place.splits(TOY)
    assert entry["data"] == {"train": splits.train.fingerprint, "test": splits.test.fingerprint}
    made = entry["made"]
    assert made["packages"]["torch"] == torch.__version__.split("+")[0] and made["precision"] == "float32"
    assert made["threads"] == 1 and made["device"] == "cpu" and len(made["cpu"]) > 2
    assert entry["curve"]["updates"] == [20, 40] and len(entry["curve"]["total"]) == 2
    for judge in entry["judges"].values():
        assert 0 <= judge["accuracy"] <= 1 and len(judge["sha256"]) == 64


def test_scores_come_from_the_ledger_without_weights_or_data(place, tmp_path, monkeypatch):
    Run(ROW, 0, place).train()
    elsewhere = replace(place, runs=tmp_path)  # as after git clone
    monkeypatch.setattr(runs, "_splits", None)
    begun = time.perf_counter()
    found = Run(ROW, 0, elsewhere).scores
    assert time.perf_counter() - begun < 0.1 and set(found) == {"left->top", "top->left", "joint"}
    assert [run.scores for run in train_rows([ROW], elsewhere)] == [found]
    assert not list(tmp_path.iterdir())


def test_the_rows_of_a_table_are_trained_where_the_ledger_lacks_them(tmp_path):
    place = place_in(tmp_path, steps=2)
    first = Run(ROW, 0, place).train().entry
    found = train_rows([ROW, MVAE_ROW], replace(place, seeds=2))
    assert [(run.row, run.seed) for run in found] == [(row, seed) for row in (ROW, MVAE_ROW) for seed in (0, 1)]
    assert all(run.entry_path.exists() for run in found) and found[0].entry == first


def test_a_model_that_is_not_here_is_trained_and_its_entry_replaces_the_ledgers(tmp_path, monkeypatch):
    place = place_in(tmp_path / "one")
    first = Run(ROW, 0, place).train().entry
    elsewhere = Run(ROW, 0, replace(place, runs=tmp_path / "two"))
    assert elsewhere.entry == first
    monkeypatch.setattr(runs, "commit", lambda: "another")
    assert elsewhere.model is not None and elsewhere.entry["made"]["commit"] == "another"
    assert json.loads(elsewhere.entry_path.read_text()) == elsewhere.entry
    assert elsewhere.entry["files"] == first["files"]  # the same machine, so the same weights


# --- what makes another run -----------------------------------------------------------------------------------------


def test_an_entry_of_another_configuration_is_never_used(tmp_path):
    place = place_in(tmp_path)
    run = Run(ROW, 0, place).train()
    for other in (
        Run(replace(ROW, version=2), 0, place),
        Run(replace(ROW, options=OPTIONS | {"without": ["left<-top"]}), 0, place),
        Run(ROW, 0, replace(place, profile=replace(place.profile, steps=20))),
    ):
        assert other.folder == run.folder and other.recorded() is None
        assert trained(other) and not trained(other)
        assert other.recorded()["config"] == other.config and run.recorded() is None
    assert trained(run) and trained(replace(run, seed=1)) and not trained(run)


def test_other_data_are_another_run(tmp_path):
    place = place_in(tmp_path)
    run = Run(ROW, 0, place).train()

    def longer(*arguments, **options):
        splits = load(*arguments, **options)
        return replace(splits, train=splits.test)

    other = replace(run, row=replace(ROW, data=replace(TOY, load=longer)))
    assert other.config == run.config and trained(other) and not trained(other)
    assert other.entry["data"]["train"] == run.entry["data"]["test"]


def test_an_edit_of_the_source_leaves_a_run_as_it_is(tmp_path, monkeypatch):
    """What %autoreload does in a notebook: the function is another object, with other source, and nothing is stale."""
    source = "from dmvae_lib.paper.rows.digits import dmvae\n\ndef build(data, splits, *, {0}):\n    {1}"
    path = tmp_path / "my_rows.py"
    arguments = "shared_dim, private_dims, weights, width, initialise"
    body = "return dmvae(data, splits, {})".format(", ".join(f"{a}={a}" for a in arguments.split(", ")))
    path.write_text(source.format(arguments, body))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("my_rows")
    run = Run(replace(ROW, name="edited", build=module.build), 0, place_in(tmp_path)).train()
    path.write_text("# a comment\n" + source.format(arguments, "made = " + body[7:] + "\n    return made"))
    importlib.invalidate_caches()
    os.utime(path, (0, 0))
    importlib.reload(module)
    edited = replace(run, row=replace(run.row, build=module.build))
    assert edited.row.build is not run.row.build and edited.recorded() == run.entry
    assert not trained(edited) and same(edited.model, run.model)


def test_a_checkpoint_of_another_configuration_gives_way_with_a_line_that_says_so(tmp_path, capsys):
    place = place_in(tmp_path)
    stopping = Run(replace(ROW, objective=partial(stopped, at=15)), 0, place)
    with pytest.raises(KeyboardInterrupt):
        stopping.train()
    assert (stopping.folder / "checkpoint.pt").exists() and not stopping.entry_path.exists()
    other = Run(replace(ROW, options=OPTIONS | {"without": ["left<-top"]}), 0, place).train()
    assert "checkpoint.pt is of another configuration or other data of toy-dmvae, seed 0" in capsys.readouterr().err
    undisturbed = Run(other.row, 0, place_in(tmp_path / "undisturbed"))
    assert same(other.model, undisturbed.model)


# --- interrupted ------------------------------------------------------------------------------------------------------


def stopped(model, batch, labels, observed, beta, at):
    """The model's objective; the update number `at` of the process gets a SIGTERM."""
    stopped.calls += 1
    if stopped.calls == at:
        signal.raise_signal(signal.SIGTERM)
    return model_objective(model, batch, labels, observed, beta)


stopped.calls = 0


@pytest.fixture(autouse=True)
def stoppable():
    """Stops as Ctrl-C does, in processes too that a shell started in the background."""
    stopped.calls = 0
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, usual)


def killed(model, batch, labels, observed, beta):
    stopped.calls += 1
    if stopped.calls == 25:
        os.kill(os.getpid(), signal.SIGKILL)
    return model_objective(model, batch, labels, observed, beta)


KILLED = """
import sys
from functools import partial
from pathlib import Path
from test_runs import ROW, Run, killed, place_in, replace, runs
runs.train = partial(runs.train, checkpoint_seconds=0.0)
Run(replace(ROW, objective=killed), 0, place_in(Path(sys.argv[1]))).train()
"""


def test_a_killed_run_goes_on_and_ends_with_the_weights_of_one_that_was_not(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    updates = []

    def counted(*arguments):
        updates.append(1)
        return model_objective(*arguments)

    run = Run(replace(ROW, objective=counted), 0, place_in(tmp_path / "killed"))
    assert (run.folder / "checkpoint.pt").exists() and not (run.folder / "entry.json").exists()
    undisturbed = Run(ROW, 0, place_in(tmp_path / "undisturbed"))
    assert same(run.model, undisturbed.model) and run.history.equals(undisturbed.history)
    assert len(updates) == 40 - 24


def test_a_run_goes_on_where_its_budget_is_raised_and_starts_anew_where_it_is_lowered(tmp_path, capsys):
    """With the weights of one that had the larger budget from the start."""
    place, updates = place_in(tmp_path), []

    def counted(*arguments):
        updates.append(1)
        return model_objective(*arguments)

    def budget(steps):
        return Run(replace(ROW, objective=counted, schedule=partial(of_steps, steps=steps)), 0, place)

    first = budget(16).train()
    longer = budget(40).train()
    assert len(updates) == 40 and longer.recorded() and budget(16).recorded() is None
    assert same(longer.model, Run(ROW, 0, place_in(tmp_path / "undisturbed")).model)
    assert capsys.readouterr().err.count("is replaced") == 0
    assert same(budget(16).train().model, first.model) and len(updates) == 40 + 16
    assert "checkpoint.pt is of another configuration" in capsys.readouterr().err


def of_steps(profile, steps):
    return replace(ROW.schedule(profile), steps=steps)


@pytest.mark.parametrize("at", ["weights", "history", "evaluation"])
def test_a_run_cut_off_after_its_last_update_is_not_trained_again(tmp_path, at, monkeypatch):
    """Whatever was written, there is no entry yet; the checkpoint of a stop in the last updates has the rest."""
    run = Run(replace(ROW, objective=partial(stopped, at=40)), 0, place_in(tmp_path))
    usual = runs.sha256 if at == "evaluation" else runs.atomic_write

    def cut(path, *rest):
        if at in ("evaluation", Path(path).stem.replace("model", "weights")):
            raise KeyboardInterrupt
        return usual(path, *rest)

    monkeypatch.setattr(runs, "sha256" if at == "evaluation" else "atomic_write", cut)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    monkeypatch.undo()
    assert not run.entry_path.exists() and not (run.folder / "entry.json").exists()
    assert same(Run(ROW, 0, run.setting).model, Run(ROW, 0, place_in(tmp_path / "undisturbed")).model)


def test_a_run_cut_off_while_it_replaces_another_leaves_neither_with_the_weights_of_the_other(tmp_path, monkeypatch):
    place = place_in(tmp_path)
    first = Run(ROW, 0, place).train()
    monkeypatch.setattr(runs, "sha256", None)  # fails after weights and history are written
    with pytest.raises(TypeError):
        Run(replace(ROW, options=OPTIONS | {"without": ["left<-top"]}), 0, place).train()
    monkeypatch.undo()
    assert same(Run(ROW, 0, place).model, first.model)


NOTED = """
import os, sys
from dataclasses import replace
from pathlib import Path
from test_runs import ROW, Run, model_objective, place_in
where = Path(sys.argv[1])

def noted(model, *rest):
    with open(where / "updates", "a") as file:
        file.write(f"{os.getpid()} ")
    return model_objective(model, *rest)

run = Run(replace(ROW, objective=noted), 0, place_in(where)).train()
print(run.entry["files"]["model.safetensors"])
"""


def test_two_processes_train_a_run_once(tmp_path):
    command = [sys.executable, "-c", NOTED, str(tmp_path)]
    options = {"cwd": TESTS, "stdout": subprocess.PIPE, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    processes = [subprocess.Popen(command, **options) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in processes]
    updates = (tmp_path / "updates").read_text().split()
    assert len(updates) == 40 and len(set(updates)) == 1 and said[0] == said[1] != b""


# --- damage ---------------------------------------------------------------------------------------------------------


def test_damaged_files_are_named_with_what_to_do(tmp_path):
    run = Run(ROW, 0, place_in(tmp_path)).train()
    ledger, weights, local = run.entry_path, run.folder / "model.safetensors", run.folder / "entry.json"
    whole = {path: path.read_bytes() for path in (ledger, weights, local)}
    for damage in (whole[ledger][:-40], whole[ledger].replace(b'"seed": 0', b'"seed": 1'), b"", b"[]"):
        ledger.write_bytes(damage)
        with pytest.raises(DMVAEError, match=r"toys/runs/toy-dmvae-0.json.*git checkout -- .*or delete it"):
            print(Run(ROW, 0, run.setting).scores)
    ledger.write_bytes(whole[ledger])
    for path in (weights, local):
        path.write_bytes(whole[path][:100])
        with pytest.raises(DMVAEError, match=rf"{path.name}.*Delete the folder .*toy-dmvae-0 to train the run anew"):
            print(Run(ROW, 0, run.setting).model)
        path.write_bytes(whole[path])
    assert same(Run(ROW, 0, run.setting).model, run.model)


# --- profiles and splits --------------------------------------------------------------------------------------------


def test_validation_has_a_place_of_its_own_and_every_run_its_curve_of_validation_scores(tmp_path):
    place = place_in(tmp_path, validate_every=8)
    validation = Run(ROW, 0, replace(place, evaluation="validation")).train()
    assert validation.folder == tmp_path / "runs" / "toys-validation" / "toy-dmvae-0"
    assert validation.entry_path.parent == validation.folder and not place.results.exists()
    curve = validation.entry["curve"]
    assert curve["updates"] == [8, 16, 24, 32, 40] and curve["left->top"][-1] == pytest.approx(
        validation.scores["left->top"], 1e-5
    )
    test = Run(ROW, 0, place).train()
    assert same(test.model, validation.model) and test.entry["data"]["test"] != validation.entry["data"]["test"]
    assert test.entry["curve"] == curve and test.scores != validation.scores


def test_a_profile_that_writes_no_results_keeps_its_entries_in_its_folder(tmp_path):
    place = place_in(tmp_path, writes_results=False)
    run = Run(ROW, 0, place).train()
    assert not place.results.exists() and run.entry_path == run.folder / "entry.json" and run.recorded() == run.entry


# --- many runs ------------------------------------------------------------------------------------------------------


def failing(model, batch, labels, observed, beta):
    raise DMVAEError("step 3: not finite: kl.")


def test_a_failure_names_its_run_and_the_others_are_trained(tmp_path):
    place = place_in(tmp_path)
    bad = Run(replace(ROW, name="bad", objective=failing), 1, place)
    good = Run(ROW, 0, place)
    with pytest.raises(DMVAEError, match="1 of 2 runs failed:\nbad, seed 1: step 3: not finite: kl."):
        train_all([bad, good, bad])
    assert good.recorded() and "model" not in good.__dict__


def fit(model, pairs, seed):
    with torch.no_grad():
        for values in model.parameters():
            values.fill_(seed + len(pairs) / 1000)


def test_a_row_that_is_fitted_has_no_updates(tmp_path):
    run = Run(replace(ROW, name="fitted", fit=fit), 2, place_in(tmp_path))
    pairs = train_pairs(run.setting.splits(TOY))
    assert all((values == 2 + len(pairs) / 1000).all() for values in run.model.parameters())
    assert len(run.history) == 0 and run.entry["curve"] == {"updates": []}
    assert same(Run(run.row, 2, run.setting).model, run.model)


# --- models ---------------------------------------------------------------------------------------------------------


def test_two_trainings_of_the_paper_networks_are_bit_identical(tmp_path):
    """The path of profile quick, convolutions and dropout included, for fewer updates."""
    place = setting("smoke", device="cpu")
    row = replace(TABLE1["DMVAE"], evaluate=unscored)
    made = [Run(row, 0, replace(place, runs=tmp_path / name)) for name in ("one", "two")]
    assert same(made[0].model, made[1].model) and made[0].history.equals(made[1].history)


def unscored(run):
    return {"scores": {}}


def test_mvae_stays_finite_over_five_seeds(tmp_path):
    profile = replace(get_profile("smoke"), steps=30, learning_rate=1e-2)  # ten times the paper's rate
    place = replace(setting("smoke", device="cpu"), profile=profile, runs=tmp_path)
    for seed in range(5):
        history = Run(replace(TABLE1["MVAE"], evaluate=unscored), seed, place).history
        assert history.notna().all().all()


@pytest.mark.parametrize("row", [ROW, MVAE_ROW], ids=lambda row: row.name)
def test_a_saved_rows_model_is_made_again(tmp_path, row):
    model = Run(row, 0, place_in(tmp_path)).model
    model.save(tmp_path / "saved")
    again = pretrained(tmp_path / "saved", row=row)
    assert same(model, again) and again.about == model.about and not again.training
    with pytest.raises(DMVAEError, match=f"made by row '{row.name}'; give it as `row`"):
        pretrained(tmp_path / "saved")


def test_a_saved_model_of_the_paper_needs_no_row(tmp_path):
    place = setting("smoke", device="cpu")
    model = TABLE1["MMVAE"].model(place.splits(TABLE1["MMVAE"].data), place.profile)
    model.save(tmp_path)
    again = pretrained(tmp_path)
    assert same(model, again) and type(again) is type(model) and again.about["row"] == "mmvae"
    model.about = {}
    model.save(tmp_path)
    with pytest.raises(DMVAEError, match="holds a model that no row made, or load it with MMVAE.load"):
        pretrained(tmp_path)
    with pytest.raises(DMVAEError, match="does not say its arguments, classes, shapes"):
        pretrained(tmp_path, TABLE1["MMVAE"])
