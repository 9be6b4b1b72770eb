"""Experiments as data: training or loading, evaluation, tables, all on the embedded digits and a few steps."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn

from dmvae_lib import DMVAEError, runs
from dmvae_lib import experiments as ex
from dmvae_lib.report import Results, compare, index, readable


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    return replace(runs.setting("smoke", device="cpu"), runs=folder / "runs", results=folder / "results" / "smoke")


def test_a_run_is_trained_once_then_loaded_with_the_same_weights(place, monkeypatch):
    first = ex.run(ex.DMVAE_DIGITS, 0, place)
    monkeypatch.setattr(runs, "train_side_by_side", None)  # training again would fail
    again = ex.run(ex.DMVAE_DIGITS, 0, place)
    for one, other in zip(first.model.parameters(), again.model.parameters()):
        assert torch.equal(one, other)
    assert first.history.equals(again.history) and not first.model.training
    assert first.info["config"]["data"] == place.digits.train.fingerprint
    assert not (first.folder / "checkpoint.pt").exists()


def test_another_seed_switch_or_schedule_is_another_run(place):
    base = ex.run(ex.DMVAE_DIGITS, 0, place).folder
    others = [
        ex.run(ex.DMVAE_DIGITS, 1, place).folder,
        ex.run(replace(ex.DMVAE_DIGITS, without=("svhn<-mnist",)), 0, place).folder,
        ex.run(ex.DMVAE_DIGITS, 0, replace(place, profile=replace(place.profile, steps=3))).folder,
    ]
    assert len({base, *others}) == 4


def test_a_learning_curve_trains_on_the_first_images_alone(place, monkeypatch):
    seen = []
    usual = runs.train_side_by_side
    monkeypatch.setattr(runs, "train_side_by_side", lambda jobs, *rest: seen.extend(job.data for job in jobs) or usual(jobs, *rest))  # fmt: skip
    ((first, item),) = ex.learning_curve(place).items()
    made = item.run()
    assert first == 500 and made.info["config"]["name"] == "dmvae-first-500"
    (data,), whole = seen, place.digits.train
    assert torch.equal(data.items["svhn"], whole.items["svhn"][:500]) and data.index["svhn"].max() < 500
    assert torch.equal(data.items["mnist"], whole.items["mnist"])
    assert made.info["hash"] != ex.run(ex.DMVAE_DIGITS, 0, place).info["hash"]


def test_a_damaged_run_is_named(place):
    made = ex.run(ex.DMVAE_DIGITS, 5, place)
    weights = made.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        DMVAEError, match=r"seed5.*model.safetensors .*SHA-256.*Delete the folder .*seed5.* to train it anew"
    ):
        ex.run(ex.DMVAE_DIGITS, 5, place)


def test_unknown_profile_model_device_and_seeds():
    with pytest.raises(DMVAEError, match="unknown profile 'fast'.*smoke, quick, subset, paper"):
        runs.setting("fast")
    with pytest.raises(DMVAEError, match="device 'tpu9'"):
        runs.setting(device="tpu9")
    with pytest.raises(DMVAEError, match="seeds=0"):
        runs.setting(seeds=0)
    with pytest.raises(DMVAEError, match="unknown model 'GAN'"):
        ex.build(ex.Experiment("x", model="GAN"), runs.setting("smoke").profile)


class Echo(nn.Module):
    """A stand-in model whose cross-generated item is the source's digit plus an offset: coherence is known."""

    names = ("mnist", "svhn")

    def __init__(self, offset: int):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(float(offset)))

    def cross_generate(self, batch, target, n=1, generator=None):
        ((_, x),) = batch.items()
        return (x + self.offset)[None]

    def sample(self, n, generator=None):
        code = torch.randint(10, (n, 1), generator=generator).float()
        return {"mnist": code, "svhn": (code + self.offset) % 10}


class Judge(nn.Module):
    def forward(self, x):
        return nn.functional.one_hot((x[:, 0].round().long()) % 10, 10).float()


@pytest.mark.parametrize("offset, expected", [(0, 1.0), (1, 0.0)])
def test_coherence_counts_the_digits_that_survive(offset, expected):
    labels = torch.arange(10).repeat(50)
    items = {name: labels[:, None].float() for name in Echo.names}
    data = ex.PairedData.pair(items, {name: labels for name in items}, permutations=2)
    result = ex.coherence(Echo(offset), data, {name: Judge() for name in Echo.names}, samples=300)
    assert result == {"mnist->svhn": expected, "svhn->mnist": expected, "joint": expected}


def test_table_beside_the_paper_and_its_manifest(place, tmp_path):
    values = {"DMVAE": [{"joint": 0.40}, {"joint": 0.44}], "extra": [{"joint": 0.1}, {"joint": 0.1}]}
    table = compare(values, {"DMVAE": {"joint": 44.7}})
    row = table.loc[("DMVAE", "Joint")]
    assert row["mean"] == pytest.approx(42) and row["sd"] == pytest.approx(8**0.5) and row["seeds"] == 2
    assert row["difference"] == pytest.approx(-2.7) and pd.isna(table.loc[("extra", "Joint"), "paper"])
    shown = readable(table)
    assert shown.loc["DMVAE", ("Joint", "ours")] == "42.0 ± 2.8" and shown.loc["extra", ("Joint", "paper")] == "–"

    made = ex.run(ex.DMVAE_DIGITS, 0, place)
    keeping = replace(place, profile=replace(place.profile, writes_results=True), results=tmp_path / "quick")
    Results(keeping, "03_table1").table("table1", table, "Table 1.", [made])
    assert {path.name for path in keeping.results.iterdir()} == {
        *("table1.csv", "table1.md", "table1.tex", "manifest.json", "configurations.json", ".lock")
    }
    entry = json.loads((keeping.results / "manifest.json").read_text())["table1"]
    assert entry["runs"][0]["configuration"] == made.info["hash"] and entry["notebook"] == "notebooks/03_table1.ipynb"
    assert r"\toprule" in (keeping.results / "table1.tex").read_text()
    assert "42.0 ± 2.8" in index(tmp_path) and "table1.csv" in (tmp_path / "README.md").read_text()
    Results(place, "03_table1").table("table1", table, "Table 1.", [made])
    assert not place.results.exists()  # profile smoke keeps nothing


def test_a_share_of_a_profiles_updates():
    quick, part = ex.get_profile("quick"), ex.get_profile("quick@0.05")
    assert (part.steps, part.particle_steps) == (round(0.05 * quick.steps), round(0.05 * quick.particle_steps))
    assert part.classifier_steps == quick.classifier_steps and part.name == "quick@0.05"  # the judges stay as they are
    for bad in ("quick@0", "quick@2", "quick@half"):
        with pytest.raises(DMVAEError, match=r"quick@.*\(0, 1\]"):
            ex.get_profile(bad)


def test_unknown_modality_of_a_classifier(place):
    with pytest.raises(DMVAEError, match="unknown modality 'cifar'"):
        ex.classifier("cifar", place)


def test_two_trainings_of_the_paper_networks_are_bit_identical(place, tmp_path):
    """The whole path of profile quick, convolutions and dropout included, for fewer updates."""
    plan = replace(place.profile, steps=15)
    made = [ex.run(ex.DMVAE_DIGITS, 0, replace(place, profile=plan, runs=tmp_path / name)) for name in ("one", "two")]
    for one, other in zip(made[0].model.parameters(), made[1].model.parameters()):
        assert torch.equal(one, other)
    assert made[0].history.equals(made[1].history)


def test_mvae_stays_finite_over_five_seeds(place):
    profile = replace(place.profile, steps=30, learning_rate=1e-2)  # ten times the paper's rate
    for seed in range(5):
        history = ex.run(ex.TABLE1["MVAE"], seed, replace(place, profile=profile)).history
        assert history.notna().all().all()


def test_latex_tables_compile_in_their_captions(place, tmp_path):
    keeping = replace(place, profile=replace(place.profile, writes_results=True), results=tmp_path)
    table = compare({"MVAE": [{"mnist->svhn": 0.5}]}, {"MVAE": {"mnist->svhn": 9.5}})
    Results(keeping, "03_table1").table("t", table, "Table 1: accuracy 95.8%, 100.0% & more.")
    tex, md = (tmp_path / "t.tex").read_text(), (tmp_path / "t.md").read_text()
    assert not [line for line in tex.splitlines() if "%" in line.replace(r"\%", "") or "→" in line]
    assert r"\caption{accuracy 95.8\%, 100.0\% \& more." in tex
    assert "+40.5" in md and "50.0" in md
