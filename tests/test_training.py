"""The training loop: same seed same weights, resuming, stopping, refusing to go on with numbers that are not finite."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dmvae_lib import DMVAE, MMVAE, MVAE, DMVAEError, Modality, PairedData, Schedule, train
from dmvae_lib.files import read_sealed, write_sealed
from dmvae_lib.models import Terms
from dmvae_lib.training import _tensor_float32, batches, model_objective, resolve_device, resolve_precision

PLAN = Schedule(steps=12, batch_size=8, log_every=3)

pytestmark = pytest.mark.usefixtures("one_thread")


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


def trained(folder=None, objective=model_objective, plan=PLAN, seed=0, **options):
    """(weights, history) of the model of seed 0."""
    fresh = model()
    torch.seed()  # what the caller's generator does must not matter
    history = train(fresh, data(), plan, seed, "cpu", folder, objective, **options)
    return weights(fresh), history


def doing(at, action):
    """The model's objective, which calls `action` before the updates `at`, counted from 1; `.calls` counts all."""

    def objective(*arguments) -> Terms:
        objective.calls += 1
        if objective.calls in at:
            action()
        return model_objective(*arguments)

    objective.calls = 0
    return objective


class Stop(Exception):
    pass


def stopping():
    raise Stop


# --- seeds, batches, what an update is ----------------------------------------------------------------------------


def test_same_seed_same_weights_other_seed_others():
    (first, history), (again, its_history), (other, _) = (trained(seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and history.equals(its_history)
    assert not torch.equal(first, other)


def test_training_leaves_the_callers_generator_alone_and_lowers_the_loss():
    under_test = model()
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    history = train(under_test, data(), Schedule(steps=200, batch_size=8), 0, "cpu")
    assert torch.equal(torch.rand(1), expected) and not under_test.training
    assert history["total"].iloc[-1] < history["total"].iloc[0]
    assert history.index.name == "step" and list(history.index) == list(range(20, 201, 20))
    assert {"log_likelihood(b<-a)", "kl(b<-a/shared)", "kl(b<-joint/private)"} < set(history.columns)


def test_an_update_is_adams_on_the_batchs_gradient():
    pairs, found, expected = data(), nn.Linear(6, 4), nn.Linear(6, 4)
    expected.load_state_dict(found.state_dict())

    def squared(network, batch, labels, observed, beta) -> Terms:
        return Terms(others={"error": (network(batch["a"]) - batch["b"]).square().sum(-1).mean()})

    train(found, pairs, Schedule(steps=40, batch_size=8, learning_rate=0.01), 5, "cpu", objective=squared)
    optimiser = torch.optim.Adam(expected.parameters(), 0.01)
    for rows in itertools.islice(batches(pairs, 8, 5, 0), 40):
        optimiser.zero_grad()
        squared(expected, pairs.batch(rows), None, None, 1.0).total.backward()
        optimiser.step()
    torch.testing.assert_close(weights(found), weights(expected))


def test_each_epoch_uses_every_pair_at_most_once_in_an_order_of_its_own():
    pairs = PairedData.aligned({"a": torch.rand(44, 2)})
    stream = batches(pairs, 8, seed=0, start=0)
    per_epoch = len(pairs) // 8
    first = torch.cat([next(stream) for _ in range(per_epoch)])
    second = torch.cat([next(stream) for _ in range(per_epoch)])
    for epoch in (first, second):
        assert epoch.unique().numel() == len(epoch) == per_epoch * 8 < len(pairs)
    assert not torch.equal(first, second)
    late = batches(pairs, 8, seed=0, start=per_epoch + 2)
    assert torch.equal(next(late), second[16:24])  # a resumed run sees the batches it would have seen
    other = batches(pairs, 8, seed=1, start=0)
    assert not torch.equal(torch.cat([next(other) for _ in range(per_epoch)]), first)


def test_the_weight_of_the_kls_is_annealed():
    betas = []

    def record(m, batch, labels, observed, beta) -> Terms:
        betas.append(beta)
        return m.loss(batch, beta=beta)

    train(model(), data(), Schedule(steps=6, batch_size=8, anneal_steps=4), 0, "cpu", objective=record)
    assert betas == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_chunks_of_a_batch_give_the_batchs_gradient_and_terms():
    def squared(network, batch, labels, observed, beta) -> Terms:
        return Terms(others={"error": (network(batch["a"])[:, :4] - batch["b"]).square().sum(-1).mean()})

    def in_chunks(chunks: int):
        torch.manual_seed(0)
        network = nn.Linear(6, 6)
        history = train(network, data(), replace(PLAN, chunks=chunks), 0, "cpu", None, squared)
        return weights(network), history

    (whole, expected), (parts, found) = in_chunks(1), in_chunks(3)  # 3 + 3 + 2 pairs
    assert torch.allclose(whole, parts, atol=1e-5)
    torch.testing.assert_close(torch.tensor(found.values), torch.tensor(expected.values), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunks", [1, 3])
def test_the_objective_gets_labels_and_masks_of_its_rows(chunks):
    n = torch.arange(64)
    items = {"a": n[:, None].float() / 64, "b": n[:, None].float() / 64}
    there = n % 3 > 0
    seen = []

    def objective(network, batch, labels, observed, beta) -> Terms:
        row = (batch["a"][:, 0] * 64).long()
        assert torch.equal(labels, row % 5) and torch.equal(observed["b"], row % 3 > 0)
        seen.append(row)
        return Terms(others={"error": network(batch["a"]).square().mean()})

    pairs = PairedData.aligned(items, labels=n % 5, observed={"b": there})
    train(nn.Linear(1, 1), pairs, Schedule(8, 8, chunks=chunks), 0, "cpu", objective=objective)
    assert torch.equal(torch.cat(seen).sort().values, n)

    def without(network, batch, labels, observed, beta) -> Terms:
        assert labels is None and observed is None
        return Terms(others={"error": network(batch["a"]).square().mean()})

    train(nn.Linear(1, 1), PairedData.aligned(items), Schedule(2, 8), 0, "cpu", objective=without)


def test_a_missing_item_is_left_out_whatever_its_values():
    there = torch.arange(40) % 2 == 0
    ends = []
    for value, observed in ((float("nan"), {"b": there}), (0.0, {"b": there}), (0.0, None)):
        items = {"a": torch.rand(40, 6, generator=torch.Generator().manual_seed(0)), "b": torch.full((40, 4), 0.25)}
        items["b"][~there] = value
        fresh = model()
        train(fresh, PairedData.aligned(items, observed=observed), PLAN, 0, "cpu")
        ends.append(weights(fresh))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[1], ends[2])


def test_labels_are_used_by_no_model():
    items = {"a": torch.rand(24, 6), "b": torch.rand(24, 4)}
    found = []
    for labels in (None, torch.arange(24) % 3):
        fresh = model()
        train(fresh, PairedData.aligned(items, labels), PLAN, 0, "cpu")
        found.append(weights(fresh))
    assert torch.equal(*found)


@pytest.mark.parametrize("wrong", [[1, 2], {"a": torch.rand(9, 6)}, DataLoader(TensorDataset(torch.rand(9, 6)))])
def test_what_is_no_paired_data_is_named_with_what_to_pass(wrong):
    with pytest.raises(DMVAEError, match=rf"the data are a {type(wrong).__name__}; expected PairedData.*aligned"):
        train(model(), wrong, PLAN)


def test_terms_that_only_some_updates_have_are_averaged_over_those():
    """MVAE draws other subsets of three modalities at every update."""
    names = ("a", "b", "c")
    items, labels = {name: torch.rand(40, 6) for name in names}, dict.fromkeys(names, torch.arange(40) % 5)
    several = MVAE({name: Modality(nn.Linear(6, 4), nn.Linear(2, 6), 0) for name in names}, 2, random_subsets=1)
    updates = []

    def recording(m, batch, labels, observed, beta) -> Terms:
        terms = m.loss(batch, beta=beta)
        updates.append({name: value.item() for name, value in terms.flat().items()})
        return terms

    pairs = PairedData.pair(items, labels, permutations=2)
    history = train(several, pairs, Schedule(30, 8, log_every=30), device="cpu", objective=recording)
    assert history.notna().to_numpy().all() and len({tuple(terms) for terms in updates}) == 3
    assert set(history.columns) == set().union(*updates)
    for name, mean in history.loc[30].items():
        values = [terms[name] for terms in updates if name in terms]
        assert mean == pytest.approx(sum(values) / len(values))
    each = train(several, pairs, Schedule(5, 8, log_every=1), device="cpu")
    assert each["total"].notna().all() and each.isna().any().any()  # a term is missing where no update had it


# --- resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [4, 6, 7, 11, 12])
def test_an_interrupted_run_ends_with_the_weights_and_history_of_an_undisturbed_one(tmp_path, stop):
    expected, history = trained()
    with pytest.raises(Stop):
        trained(tmp_path, doing([stop], stopping), checkpoint_seconds=0)
    resumed, objective = model(seed=99), doing([], stopping)  # its weights must come from the checkpoint
    again = train(resumed, data(), PLAN, 0, "cpu", tmp_path, objective, checkpoint_seconds=0)
    assert torch.equal(weights(resumed), expected) and again.equals(history)
    assert objective.calls == PLAN.steps - (stop - 1)  # it did go on, not start anew


@pytest.mark.parametrize("kind", [DMVAE, MVAE, MMVAE])
def test_an_interrupted_run_on_incomplete_data_goes_on_to_the_bit(tmp_path, kind):
    item = torch.arange(40)
    items = {"a": torch.rand(40, 6), "b": torch.rand(40, 4)}
    items["a"][item % 3 == 0] = float("nan")
    gaps = PairedData.aligned(items, observed={"a": item % 3 > 0, "b": item % 3 != 1})

    def fresh(seed):
        torch.manual_seed(seed)
        private = 1 if kind is DMVAE else 0
        sizes = {"a": 6, "b": 4}
        nets = {n: (nn.Linear(d, 2 * private + 4), nn.Linear(private + 2, d)) for n, d in sizes.items()}
        return kind({n: Modality(*of, private, likelihood="gaussian") for n, of in nets.items()}, 2)

    expected, resumed = fresh(0), fresh(99)
    history = train(expected, gaps, PLAN, 0, "cpu")
    with pytest.raises(Stop):
        train(fresh(0), gaps, PLAN, 0, "cpu", tmp_path, doing([7], stopping), checkpoint_seconds=0)
    again = train(resumed, gaps, PLAN, 0, "cpu", tmp_path)
    assert torch.equal(weights(resumed), weights(expected)) and again.equals(history)


KILLED = """
import os, signal, sys, pathlib
sys.path.insert(0, {tests!r})
from test_training import doing, trained
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
trained(pathlib.Path({folder!r}), doing([{at}], kill), checkpoint_seconds=0)
"""


def test_a_killed_process_is_gone_on_from_by_the_next(tmp_path):
    for at in (5, 4):  # the second begins at update 5
        code = KILLED.format(tests=os.path.dirname(__file__), folder=str(tmp_path), at=at)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    objective = doing([], stopping)
    found, history = trained(tmp_path, objective)
    expected, expected_history = trained()
    assert torch.equal(found, expected) and history.equals(expected_history) and objective.calls == 5


def test_seconds_are_those_of_all_parts(tmp_path):
    slow, stopped = doing(range(5), lambda: time.sleep(0.05)), signalling(signal.SIGINT, [4])
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, lambda *arguments: (slow(*arguments), stopped(*arguments))[1])
    _, history = trained(tmp_path)
    assert 4 * 0.05 < history.attrs["seconds"] < 30


@pytest.mark.parametrize(
    "other",
    [{"identity": "another"}, {"seed": 1}, {"plan": replace(PLAN, learning_rate=0.1)}, {"evaluate_every": 2}],
    ids=lambda other: next(iter(other)),
)
def test_another_runs_checkpoint_is_refused(tmp_path, other):
    with pytest.raises(Stop):
        trained(tmp_path, doing([4], stopping), checkpoint_seconds=0, identity="one")
    what = {"plan": "schedule"}.get(*other, *other)
    with pytest.raises(DMVAEError, match=f"checkpoint.pt cannot be used.*of a run with another {what}.*Delete it"):
        trained(tmp_path, **{"identity": "one"} | other)
    trained(tmp_path, identity="one")


def test_a_checkpoint_of_other_data_or_another_model_is_refused(tmp_path):
    with pytest.raises(Stop):
        trained(tmp_path, doing([4], stopping), checkpoint_seconds=0)
    with pytest.raises(DMVAEError, match="of a run with another data"):
        train(model(), data(45), PLAN, 0, "cpu", tmp_path)
    with pytest.raises(DMVAEError, match="checkpoint.pt cannot be used .RuntimeError.*Delete it"):
        train(nn.Linear(6, 6), data(), PLAN, 0, "cpu", tmp_path)


def test_a_finished_training_goes_on_where_more_steps_are_asked_for(tmp_path):
    trained(tmp_path, plan=replace(PLAN, steps=5))
    objective = doing([], stopping)
    assert torch.equal(trained(tmp_path, objective)[0], trained()[0]) and objective.calls == PLAN.steps - 5
    with pytest.raises(DMVAEError, match=f"checkpoint.pt cannot be used.*it has {PLAN.steps} updates, more than 5"):
        trained(tmp_path, plan=replace(PLAN, steps=5))


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for content in (b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(
            DMVAEError, match="checkpoint.pt .* is truncated or damaged.*Delete it to train this run anew"
        ):
            trained(tmp_path)
    write_sealed(path, b"whole, but no checkpoint")
    with pytest.raises(DMVAEError, match="checkpoint.pt cannot be used.*Delete it to train this run anew"):
        trained(tmp_path)


# --- signals ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def interruptible():
    """Processes that a shell starts in the background ignore SIGINT, and so would these tests."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def signalling(number, at):
    return doing(at, lambda: signal.raise_signal(number))


@pytest.mark.parametrize("at", [1, 4, 6, 12])
def test_an_interrupt_waits_for_the_end_of_the_update_and_loses_nothing(tmp_path, capsys, at):
    usual, objective = signal.getsignal(signal.SIGINT), signalling(signal.SIGINT, [at])
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, objective)
    assert objective.calls == at and signal.getsignal(signal.SIGINT) is usual
    assert "Stopping after this update" in capsys.readouterr().err
    again = doing([], stopping)
    found, history = trained(tmp_path, again)
    expected, expected_history = trained()
    assert torch.equal(found, expected) and history.equals(expected_history) and again.calls == PLAN.steps - at


def test_a_second_interrupt_acts_at_once(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise Stop

    with pytest.raises(Stop):
        trained(tmp_path, doing([4], twice))
    assert not (tmp_path / "checkpoint.pt").exists()


def test_an_interrupt_without_a_folder_acts_at_once():
    def once():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise Stop

    with pytest.raises(Stop):
        trained(None, doing([4], once))


def test_a_handler_that_goes_on_does_not_pass_a_part_of_the_run_for_the_whole(tmp_path):
    usual = signal.signal(signal.SIGTERM, lambda *_: None)  # as a scheduler's worker may have
    try:
        with pytest.raises(KeyboardInterrupt, match="stopped after update 4, which is in .*checkpoint.pt"):
            trained(tmp_path, signalling(signal.SIGTERM, [4]))
    finally:
        signal.signal(signal.SIGTERM, usual)


def test_training_in_a_thread_leaves_signals_alone(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(trained(tmp_path)[0]))
    thread.start()
    thread.join()
    assert torch.equal(found[0], trained()[0])


# --- numbers that go wrong ----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    def exploding(*arguments) -> Terms:
        exploding.calls += 1
        terms = model_objective(*arguments)
        if exploding.calls == 8:
            terms.kls["b<-a/shared"] *= torch.inf
        return terms

    for folder in (None, tmp_path):
        exploding.calls = 0
        with pytest.raises(DMVAEError, match=r"step 8: not finite: total, kl\(b<-a/shared\)"):
            trained(folder, exploding, checkpoint_seconds=0)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 7 and all(values.isfinite().all() for values in state["model"].values())
    assert torch.equal(trained(tmp_path)[0], trained()[0])


@pytest.mark.parametrize("at", [8, PLAN.steps])
@pytest.mark.parametrize("checkpoint_seconds", [0, 30])
def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path, at, checkpoint_seconds
):
    def exploding(m, *arguments) -> Terms:
        exploding.calls += 1
        terms = model_objective(m, *arguments)
        if exploding.calls == at:
            first = next(m.parameters())
            terms.others["slope"] = (first - first.detach()).square().sum().sqrt()  # 0, slope 0/0
        return terms

    exploding.calls = 0
    message = rf"step ({at + 1}: not finite.*gradient of the step before|{at}: the loss is finite, but)"
    with pytest.raises(DMVAEError, match=message):
        trained(tmp_path, exploding, checkpoint_seconds=checkpoint_seconds)
    assert torch.equal(trained(tmp_path)[0], trained()[0])  # from the last good one


def test_values_that_the_model_cannot_take_are_named_before_the_first_update():
    items = {"a": 3 * torch.rand(40, 6), "b": torch.rand(40, 4)}
    objective = doing([], stopping)
    with pytest.raises(DMVAEError, match="'a' holds values in .* a Bernoulli likelihood needs"):
        train(model(), PairedData.aligned(items), PLAN, 0, "cpu", objective=objective)
    assert objective.calls == 0


def test_bad_device_schedule_and_too_few_pairs():
    for device in ("gpu", "cuda:99"):
        with pytest.raises(DMVAEError, match=f"device '{device}'.*'auto', 'cpu'"):
            resolve_device(device)
    with pytest.raises(DMVAEError, match="fewer than one batch of 1000"):
        train(model(), data(), Schedule(steps=1, batch_size=1000), 0, "cpu")
    for name, value in (("steps", 0), ("batch_size", 0), ("log_every", 0), ("chunks", 0), ("anneal_steps", -1)):
        with pytest.raises(DMVAEError, match=f"Schedule: {name}={value}; expected at least"):
            replace(PLAN, **{name: value})
    with pytest.raises(DMVAEError, match="precision='float16'; expected float32, float32-exact, bfloat16 or auto"):
        Schedule(1, precision="float16")


# --- precision ----------------------------------------------------------------------------------------------------


class Product(nn.Linear):
    """Notes the dtype it computes in."""

    def forward(self, x):
        out = super().forward(x)
        self.computed = out.dtype
        return out


def test_bfloat16_is_the_networks_alone_and_trains_as_float32_does():
    ends, histories = [], []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        encoder = Product(6, 6)
        one = DMVAE({"a": Modality(encoder, nn.Linear(3, 6), 1), "b": Modality(nn.Linear(4, 6), nn.Linear(3, 4), 1)}, 2)
        start = weights(one)
        seen = []

        def recording(m, batch, labels, observed, beta) -> Terms:
            terms = m.loss(batch, observed, beta)
            seen.extend(value.dtype for value in terms.flat().values())  # noqa: B023
            return terms

        history = train(one, data(), replace(PLAN, steps=60, precision=precision), 0, "cpu", objective=recording)
        assert encoder.computed == getattr(torch, precision) and set(seen) == {torch.float32}
        assert all(parameter.dtype == torch.float32 for parameter in one.parameters())
        assert history.attrs["precision"] == precision
        ends.append(weights(one) - start)
        histories.append(torch.tensor(history["total"].values))
    assert not torch.equal(*ends)
    assert (ends[0] - ends[1]).norm() < 0.05 * ends[0].norm()
    torch.testing.assert_close(*histories, rtol=1e-2, atol=0)


def test_auto_is_bfloat16_where_the_processor_multiplies_it(monkeypatch):
    cpu = torch.device("cpu")
    for known, expected in (
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({}, "float32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known)
        assert resolve_precision("auto", cpu) == expected
        assert [resolve_precision(name, cpu) for name in ("float32", "bfloat16")] == ["float32", "bfloat16"]
    for capability, expected in (((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert resolve_precision("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize("began, moved", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_run_goes_on_in_the_precision_it_began_with(tmp_path, monkeypatch, began, moved):
    def on(precision):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": precision == "bfloat16"})

    plan = replace(PLAN, precision="auto")
    on(began)
    expected, _ = trained(plan=plan)
    with pytest.raises(Stop):
        trained(tmp_path, doing([8], stopping), plan, checkpoint_seconds=0)
    on(moved)
    found, history = trained(tmp_path, plan=plan)
    assert torch.equal(found, expected) and history.attrs["precision"] == began
    assert trained(plan=plan)[1].attrs["precision"] == moved
    with pytest.raises(Stop):
        trained(tmp_path / "chosen", doing([8], stopping), replace(plan, precision=began), checkpoint_seconds=0)
    assert trained(tmp_path / "chosen", plan=replace(plan, precision=moved))[1].attrs["precision"] == began


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision, expected", [("float32", "high"), ("float32-exact", "highest")])
def test_float32_on_a_gpu_is_tensor_float32_unless_exact_and_the_callers_setting_comes_back(precision, expected):
    seen = []

    def objective(*arguments) -> Terms:
        seen.append(torch.get_float32_matmul_precision())
        return model_objective(*arguments)

    before, outside = torch.get_float32_matmul_precision(), torch.cuda.get_rng_state()
    train(model(), data(), replace(PLAN, precision=precision), 0, "cuda", objective=objective)
    assert set(seen) == {expected} and torch.get_float32_matmul_precision() == before
    assert torch.equal(torch.cuda.get_rng_state(), outside)


def test_how_float32_is_multiplied_is_given_back():
    def state():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = state()
    for allowed, expected in ((True, ("high", True)), (False, ("highest", False))):
        with _tensor_float32(allowed):
            assert state() == expected
    assert state() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_on_a_gpu_goes_on_from_its_checkpoint(tmp_path, precision):
    plan, ends = replace(PLAN, precision=precision), []
    for folder, objective in ((None, model_objective), (tmp_path, doing([8], stopping)), (tmp_path, model_objective)):
        fresh = model()
        try:
            train(fresh, data(), plan, 0, "cuda", folder, objective, checkpoint_seconds=0)
            ends.append(weights(fresh))
        except Stop:
            pass
    torch.testing.assert_close(*ends)


# --- evaluation ---------------------------------------------------------------------------------------------------


def drawing(m) -> dict[str, float]:
    """An evaluation that uses up random numbers; what it finds depends on the weights and on its first draw."""
    assert not m.training and not torch.is_grad_enabled()
    return {"drawn": torch.rand(100).sum().item(), "first weight": next(m.parameters()).flatten()[0].item()}


def test_an_evaluation_ends_a_row_and_does_not_disturb_the_training():
    expected, plain = trained()
    found, history = trained(evaluate=drawing, evaluate_every=4)
    assert torch.equal(found, expected)
    assert list(history.index) == [3, 4, 6, 8, 9, 12]
    assert list(history.index[history["drawn"].notna()]) == [4, 8, 12]
    assert history["drawn"].nunique() == 1 and history["first weight"].nunique() == 3  # the same noise each time
    assert history.loc[12, "first weight"] == found[0]
    lengths = torch.tensor([3, 1, 2, 2, 1, 3])
    for name in plain:  # the rows are means over the updates since the row before
        assert history[name] @ lengths.numpy() / 12 == pytest.approx(plain[name].mean())
    assert list(trained(evaluate=drawing)[1]["drawn"].notna()) == [False, False, False, True]


@pytest.mark.parametrize("stop", [5, 9, 10])
def test_a_run_with_evaluations_resumes_exactly(tmp_path, stop):
    options = {"evaluate": drawing, "evaluate_every": 4, "checkpoint_seconds": 0}
    expected, history = trained(**options)
    with pytest.raises(Stop):
        trained(tmp_path, doing([stop], stopping), **options)
    found, again = trained(tmp_path, **options)
    assert torch.equal(found, expected) and again.equals(history)


def test_the_checkpoint_is_whole_and_holds_no_code(tmp_path):
    with pytest.raises(Stop):
        trained(tmp_path, doing([5], stopping), checkpoint_seconds=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt"]
    read_sealed(tmp_path / "checkpoint.pt", "")
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4
