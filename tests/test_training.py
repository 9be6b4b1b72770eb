"""The training loop: same seed same weights, resuming, refusing to go on with numbers that are not finite."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from dmvae_lib import DMVAE, DMVAEError, Modality
from dmvae_lib.data import PairedData
from dmvae_lib.models import MVAE, Terms
from dmvae_lib.training import Job, Schedule, batches, resolve_device, same_update, train, train_side_by_side

PLAN = Schedule(steps=12, batch_size=8, log_every=3)


def data(n: int = 40) -> PairedData:
    generator = torch.Generator().manual_seed(0)
    items = {"a": torch.rand(n, 6, generator=generator), "b": torch.rand(n, 4, generator=generator)}
    labels = torch.arange(n) % 5
    return PairedData.pair(items, {name: labels for name in items}, permutations=3)


def model(seed: int = 0) -> DMVAE:
    torch.manual_seed(seed)
    return DMVAE(
        {
            name: Modality(nn.Sequential(nn.Linear(d, 8), nn.Dropout(0.1), nn.Linear(8, 6)), nn.Linear(3, d), 1)
            for name, d in {"a": 6, "b": 4}.items()
        },
        shared_dim=2,
    )


def weights(trained: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trained.parameters()])


def test_same_seed_same_weights_other_seed_others():
    first, again, other = model(), model(), model()
    histories = [train(m, data(), PLAN, seed, "cpu") for m, seed in ((first, 3), (again, 3), (other, 4))]
    assert torch.equal(weights(first), weights(again)) and histories[0].equals(histories[1])
    assert not torch.equal(weights(first), weights(other))


def test_training_leaves_the_callers_generator_alone_and_lowers_the_loss():
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    history = train(model_under_test := model(), data(), Schedule(steps=200, batch_size=8), 0, "cpu")
    torch.manual_seed(11)
    assert torch.equal(torch.rand(1), expected) and not model_under_test.training
    assert history["total"].iloc[-1] < history["total"].iloc[0]
    assert list(history.index) == list(range(20, 201, 20)) and "b<-a/log_likelihood" in history


def test_side_by_side_each_becomes_what_it_would_alone(tmp_path):
    plans = [PLAN, replace(PLAN, steps=17, anneal_steps=5), PLAN]
    alone = [model(seed) for seed in range(3)]
    histories = [train(m, data(), plan, seed, "cpu") for seed, (m, plan) in enumerate(zip(alone, plans))]
    train(begun := model(2), data(), replace(PLAN, steps=6), 2, "cpu")  # moves the global generators in between
    together = [model(seed) for seed in range(3)]
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    jobs = [Job(m, data(), plan, seed, tmp_path / str(seed)) for seed, (m, plan) in enumerate(zip(together, plans))]
    for mine, other in zip(histories, train_side_by_side(jobs, "cpu", checkpoint_seconds=0)):
        assert mine.equals(other)
    assert all(torch.equal(weights(a), weights(b)) for a, b in zip(alone, together))
    assert not torch.equal(weights(begun), weights(together[2])) and torch.equal(torch.rand(1), expected)


def test_side_by_side_each_goes_on_from_its_own_checkpoint(tmp_path):
    alone = [model(seed) for seed in range(2)]
    histories = [train(m, data(), PLAN, seed, "cpu") for seed, m in enumerate(alone)]
    fails = failing(2 * PLAN.steps - 5)
    jobs = [Job(model(seed), data(), PLAN, seed, tmp_path / str(seed), fails) for seed in (0, 1)]
    with pytest.raises(Stop):
        train_side_by_side(jobs, "cpu", checkpoint_seconds=0)
    (tmp_path / "1" / "checkpoint.pt").unlink()  # the second starts anew, beside the first one's last updates
    jobs = [Job(model(9), data(), PLAN, 0, tmp_path / "0"), Job(model(1), data(), PLAN, 1)]
    for history, job, other, its in zip(train_side_by_side(jobs, "cpu"), jobs, alone, histories):
        assert history.equals(its) and torch.equal(weights(job.model), weights(other))


def failing(stop: int):
    """An objective that raises Stop when it is called for the `stop`-th time, by whichever model."""
    calls = itertools.count(1)

    def objective(m, batch, labels, beta) -> Terms:
        if next(calls) == stop:
            raise Stop
        return m.loss(batch, beta=beta)

    return objective


def test_terms_that_only_some_updates_have_are_averaged_over_those():
    """MVAE draws other subsets of three modalities at every update."""
    names = ("a", "b", "c")
    items, labels = {name: torch.rand(40, 6) for name in names}, dict.fromkeys(names, torch.arange(40) % 5)
    trained = MVAE({name: Modality(nn.Linear(6, 4), nn.Linear(2, 6), 0) for name in names}, 2, random_subsets=1)
    pairs = PairedData.pair(items, labels, permutations=2)
    history = train(trained, pairs, Schedule(30, 8, log_every=30), device="cpu")
    assert {f"elbo({pair})/kl" for pair in ("a,b", "a,c", "b,c")} < set(history.columns)
    assert history.notna().to_numpy().all()


def test_updates_are_the_same_up_to_a_twentieth_of_their_way():
    start, plain = [torch.zeros(3), torch.zeros(2)], [torch.ones(3), -torch.ones(2)]
    assert same_update([torch.full((3,), 1.01), -torch.ones(2)], start, plain)
    assert not same_update([torch.full((3,), 1.2), -torch.ones(2)], start, plain)
    assert not same_update(start, start, plain)


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [4, 7, 11])
def test_an_interrupted_run_ends_with_the_weights_and_history_of_an_undisturbed_one(tmp_path, stop):
    undisturbed = model()
    history = train(undisturbed, data(), PLAN, 0, "cpu")
    calls = 0

    def interrupted(m, batch, labels, beta) -> Terms:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise Stop
        return m.loss(batch, beta=beta)

    with pytest.raises(Stop):
        train(model(), data(), PLAN, 0, "cpu", tmp_path, interrupted, checkpoint_seconds=0)
    assert (tmp_path / "checkpoint.pt").exists() and calls == stop
    resumed = model(seed=99)  # its weights must come from the checkpoint
    steps = []

    def counting(m, batch, labels, beta) -> Terms:
        steps.append(beta)
        return m.loss(batch, beta=beta)

    again = train(resumed, data(), PLAN, 0, "cpu", tmp_path, counting, checkpoint_seconds=0)
    assert torch.equal(weights(resumed), weights(undisturbed)) and again.equals(history)
    assert len(steps) == PLAN.steps - (stop - 1) // PLAN.log_every * PLAN.log_every  # it did go on, not start anew


def test_each_epoch_uses_every_pair_at_most_once_in_an_order_of_its_own():
    pairs = data()
    stream = batches(pairs, 8, seed=0, start=0)
    per_epoch = len(pairs) // 8
    first = torch.cat([next(stream) for _ in range(per_epoch)])
    second = torch.cat([next(stream) for _ in range(per_epoch)])
    assert first.unique().numel() == len(first) == per_epoch * 8 and not torch.equal(first, second)
    late = batches(pairs, 8, seed=0, start=per_epoch + 2)
    assert torch.equal(next(late), second[16:24])  # a resumed run sees the batches it would have seen


def test_the_weight_of_the_kls_is_annealed():
    betas = []

    def record(m, batch, labels, beta) -> Terms:
        betas.append(beta)
        return m.loss(batch, beta=beta)

    train(model(), data(), Schedule(steps=6, batch_size=8, anneal_steps=4), 0, "cpu", objective=record)
    assert betas == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    calls = 0

    def exploding(m, batch, labels, beta) -> Terms:
        nonlocal calls
        calls += 1
        terms = m.loss(batch, beta=beta)
        if calls == 8:
            terms.parts["b<-a/kl_shared"] = terms.parts["b<-a/kl_shared"] * torch.inf
        return terms

    with pytest.raises(DMVAEError, match="step 8: not finite: b<-a/kl_shared"):
        train(model(), data(), PLAN, 0, "cpu", tmp_path, exploding, checkpoint_seconds=0)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 6


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for content in (b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(
            DMVAEError, match="checkpoint.pt .* is truncated or damaged.*Delete it to train this run anew"
        ):
            train(model(), data(), PLAN, 0, "cpu", tmp_path)


def test_bad_device_and_too_few_pairs():
    for device in ("gpu", "cuda:99"):
        with pytest.raises(DMVAEError, match=f"device '{device}'.*'auto', 'cpu'"):
            resolve_device(device)
    with pytest.raises(DMVAEError, match="fewer than one batch of 1000"):
        train(model(), data(), Schedule(steps=1, batch_size=1000), 0, "cpu")


def test_chunks_of_a_batch_give_the_batchs_gradient_and_terms():
    def squared(model, batch, labels, beta):
        error = (model(batch["a"])[:, :4] - batch["b"]).square().sum(-1).mean()
        return Terms(error, {"error": error})

    def trained(chunks: int):
        torch.manual_seed(0)
        network = nn.Linear(6, 6)
        history = train(
            network, data(), Schedule(steps=12, batch_size=8, log_every=3, chunks=chunks), 0, "cpu", None, squared
        )
        return weights(network), history

    (whole, expected), (parts, found) = trained(1), trained(3)  # 3 + 3 + 2 pairs
    assert torch.allclose(whole, parts, atol=1e-5)
    torch.testing.assert_close(torch.tensor(found.values), torch.tensor(expected.values), rtol=1e-5, atol=1e-6)
