"""MultiVae, given our networks, computes our objectives: so a difference between the trained models is no artefact."""

import math
from dataclasses import replace

import independent
import pytest
import torch
from standins import make_certain

from dmvae_lib import PairedData, Schedule
from dmvae_lib.distributions import Laplace
from dmvae_lib.paper.data import Splits
from dmvae_lib.paper.profiles import get_profile
from dmvae_lib.paper.rows.digits import TABLE1
from dmvae_lib.paper.runs import Run, Setting
from dmvae_lib.training import batches

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def installed(one_thread):
    pytest.importorskip("multivae")


def tiny(row, **sizes):
    torch.manual_seed(0)
    items = {"mnist": torch.rand(30, 1, 28, 28), "svhn": torch.rand(30, 3, 32, 32)}
    data = PairedData.pair(items, dict.fromkeys(items, torch.arange(30) % 10), permutations=1)
    return row.model(Splits(data, data, {}, "embedded"), replace(get_profile("quick"), width=0.125, **sizes)), data


def their_trainer(model, data):
    """MultiVae's, for one update by 10 pairs."""
    return independent.multivae_trainer(model, independent.Pairs(data, Schedule(1, batch_size=10), 3), 10, CPU)


def losses(model, data):
    """Ours and theirs of the same pairs, which their loader shuffles."""
    trainer = their_trainer(model, data)
    model.eval(), trainer.model.eval()
    ours = model.loss(data.batch(next(batches(data, 10, 3, 0)))).total
    return ours.item(), trainer.model(next(iter(trainer.train_loader))).loss.item()


def test_dmvae_is_eq_3_when_nothing_is_drawn():
    model, data = tiny(TABLE1["DMVAE"])
    make_certain(model)
    with torch.no_grad():
        ours, theirs = losses(model, data)
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_mmvae_is_the_looser_bound_with_its_gradient_when_the_same_is_drawn(monkeypatch):
    model, data = tiny(TABLE1["MMVAE"], particles=4)
    trainer = their_trainer(model, data)
    model.double(), trainer.model.double()
    batch = next(iter(trainer.train_loader))
    batch.data = {name: x.double() for name, x in batch.data.items()}
    drawn = [torch.distributions.Laplace(0.0, 1.0).sample((4, 10, model.shared_dim)).double() for _ in model.names]
    for laplace, mean in ((Laplace, "mean"), (torch.distributions.Laplace, "loc")):
        draws = iter(drawn)  # one for each modality's expert, in turn

        def rsample(q, *_, n=0, mean=mean, draws=draws):
            return getattr(q, mean) + q.scale * next(draws)

        monkeypatch.setattr(laplace, "rsample", rsample)
    ours, theirs = model.loss(batch.data).total, trainer.model(batch).loss / 10  # theirs is the batch's sum
    # Theirs is -sum_k w~_k log w_k, whose gradient is DReG's too; the bound lies log K less the entropy of w~ below it.
    # Of pixels summed, one particle has nearly all the weight, so that the entropy is small.
    assert 0 <= theirs.item() + math.log(model.particles) - ours.item() <= 1e-5 * ours.item()
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (ours, theirs)]
    for mine, other in zip(*gradients):
        assert (mine - other).norm() < 1e-5 * mine.norm()


@pytest.mark.parametrize("row", independent.OURS)
def test_it_trains_our_model_in_place_and_each_pair_once(row):
    model, data = tiny(independent.OURS[row], particles=2)
    before = {name: value.clone() for name, value in model.named_parameters()}
    independent.fit(Schedule(steps=2, batch_size=10, learning_rate=1e-2), CPU, model, data, 0)
    assert not [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    rows = independent.Pairs(data, Schedule(steps=3, batch_size=10), 0).rows
    assert sorted(rows.tolist()) == list(range(30))


def test_its_row_leaves_an_entry_of_its_own_scored_as_ours_is(tmp_path):
    """Networks, pairs and budget are the row's own: what decides a run differs in the name alone."""
    model, data = tiny(TABLE1["DMVAE"])
    profile = replace(get_profile("smoke"), width=0.125, batch_size=10)
    place = Setting(profile, device="cpu", runs=tmp_path / "runs", results=tmp_path / "results")
    ours = replace(
        TABLE1["DMVAE"], evaluate=lambda run: {"scores": {"parameters": sum(map(torch.numel, run.model.parameters()))}}
    )
    theirs = independent.theirs(ours, place)
    assert (theirs.name, theirs.evaluate) == ("multivae-dmvae", ours.evaluate)
    configs = [row.config(profile, 0) for row in (ours, theirs)]
    assert {key for key in configs[0] if configs[0][key] != configs[1][key]} == {"row"}
    run = Run(theirs, 0, place)
    entry = run.entry
    assert run.history.empty  # our loop had no part in it
    assert entry["row"] == "multivae-dmvae" and entry["title"].startswith("DMVAE, MultiVae ")
    assert entry["scores"] == {"parameters": sum(map(torch.numel, model.parameters()))}
