"""Experiments as data: training or loading, evaluation, tables, all on the embedded digits and a few steps."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dmvae_lib import DMVAEError, runs
from dmvae_lib import experiments as ex


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
