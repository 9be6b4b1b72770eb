"""MultiVae, given our networks, computes our objectives: so a difference between the trained models is no artefact."""

from dataclasses import replace

import pytest
import torch

from dmvae_lib import independent
from dmvae_lib.data import PairedData
from dmvae_lib.distributions import Laplace
from dmvae_lib.experiments import DMVAE_DIGITS, TABLE1, build
from dmvae_lib.profiles import get_profile
from dmvae_lib.training import Schedule, batches

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def installed(one_thread):
    pytest.importorskip("multivae")


def tiny(experiment, **sizes):
    torch.manual_seed(0)
    model = build(experiment, replace(get_profile("quick"), width=0.125, **sizes))
    items = {"mnist": torch.rand(30, 1, 28, 28), "svhn": torch.rand(30, 3, 32, 32)}
    return model, PairedData.pair(items, dict.fromkeys(items, torch.arange(30) % 10), permutations=1)


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
    model, data = tiny(DMVAE_DIGITS)
    with torch.no_grad():
        for name, dim in model.private_dims.items():  # posteriors of (almost) no variance: every draw is the mean
            last = model.encoders[name][-1]
            for start, size in ((dim, dim), (2 * dim + model.shared_dim, model.shared_dim)):
                last.weight[start : start + size] = 0
                last.bias[start : start + size] = -30.0
        ours, theirs = losses(model, data)
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_mmvae_is_the_looser_bound():
    model, data = tiny(TABLE1["MMVAE"], particles=300)
    ours, theirs = losses(model, data)
    again, _ = losses(model, data)
    assert ours == pytest.approx(again, rel=2e-3)  # the bound's own noise
    assert ours == pytest.approx(theirs / 10, rel=2e-3)  # theirs is the batch's sum


def test_mmvae_has_the_same_gradient_when_the_same_is_drawn(monkeypatch):
    model, data = tiny(TABLE1["MMVAE"], particles=4)
    trainer = their_trainer(model, data)
    batch = next(iter(trainer.train_loader))
    drawn = [torch.distributions.Laplace(0.0, 1.0).sample((4, 10, model.shared_dim)) for _ in model.names]
    for laplace, mean in ((Laplace, "mean"), (torch.distributions.Laplace, "loc")):
        draws = iter(drawn)  # one for each modality's expert, in turn

        def rsample(q, *_, n=0, mean=mean, draws=draws):
            return getattr(q, mean) + q.scale * next(draws)

        monkeypatch.setattr(laplace, "rsample", rsample)
    gradients = [
        torch.autograd.grad(loss, list(model.parameters()))
        for loss in (model.loss(batch.data).total, trainer.model(batch).loss / 10)
    ]
    for ours, theirs in zip(*gradients):
        assert (ours - theirs).norm() < 1e-3 * ours.norm()


@pytest.mark.parametrize("row", independent.ROWS)
def test_it_trains_our_model_in_place_and_each_pair_once(row):
    model, data = tiny(independent.ROWS[row], particles=2)
    before = {name: value.clone() for name, value in model.named_parameters()}
    independent.fit(data, Schedule(steps=2, batch_size=10, learning_rate=1e-2), 0, CPU, model)
    assert not [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    rows = independent.Pairs(data, Schedule(steps=3, batch_size=10), 0).rows
    assert sorted(rows.tolist()) == list(range(30))
