"""Objectives where modalities of some items are missing: against each item's own complete sub-model."""

import math
from itertools import combinations

import pytest
import torch
from torch import nn

from dmvae_lib import DMVAE, JMVAE, MMVAE, MVAE, DMVAEError, Modality
from dmvae_lib.distributions import DiagonalGaussian, Laplace, laplace

NAMES = ("a", "b", "c", "d", "e")
FEATURES, SHARED = 3, 2


def private_dim(kind, name):
    return 1 + NAMES.index(name) % 2 if kind is DMVAE else 0


def networks(kind, name):
    torch.manual_seed(NAMES.index(name))
    p = private_dim(kind, name)
    encoder = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 2 * p + 2 * SHARED))
    return encoder.double(), nn.Linear(p + SHARED, FEATURES).double()


def model_of(kind, names, nets, **options):
    likelihood = laplace(0.75) if kind is MMVAE else "gaussian"
    weights = {name: 1.0 + NAMES.index(name) for name in names}
    modalities = {n: Modality(*nets[n], private_dim(kind, n), weights[n], likelihood) for n in names}
    options = {"particles": 4} | options if kind is MMVAE else options
    return kind(modalities, SHARED, **options).double()


def with_gaps(masks, seed=0):
    """Random values of modalities a, b, …, of which those that the masks, (N, B), leave out are NaN; and the masks."""
    generator = torch.Generator().manual_seed(seed)
    observed = dict(zip(NAMES, masks))
    batch = {n: torch.randn(len(mask), FEATURES, generator=generator).double() for n, mask in observed.items()}
    return {n: x.masked_fill(~observed[n][:, None], math.nan) for n, x in batch.items()}, observed


def incomplete(n, items=9, seed=0):
    """Random masks, something observed of every item, one item complete."""
    masks = torch.rand(n, items, generator=torch.Generator().manual_seed(seed)) < 0.5
    masks[torch.arange(items) % n, torch.arange(items)] = True
    masks[:, 0] = True
    return with_gaps(masks, seed)


def never_together(a, b):
    """Three modalities of which two never meet: each item has one of them, and the third or not."""
    item = torch.arange(9)
    masks = (item % 3 > 0).repeat(3, 1)
    masks[a], masks[b] = item % 2 == 0, item % 2 == 1
    return with_gaps(masks)


@pytest.fixture
def noise(monkeypatch):
    """Samples are deterministic functions of the distribution, so that sub-models draw what the whole model draws."""

    def fixed(self, generator=None, n=None):
        scale = (0.5 * self.logvar).exp() if isinstance(self, DiagonalGaussian) else self.scale
        k = torch.arange(1 if n is None else n, dtype=self.mean.dtype).view(-1, *(1,) * self.mean.dim())
        z = self.mean + (0.7 * (k + 1).sin()) * scale
        return z[0] if n is None else z

    monkeypatch.setattr(DiagonalGaussian, "rsample", fixed)
    monkeypatch.setattr(Laplace, "rsample", fixed)


CASES = {f"random masks, N = {n}": incomplete(n) for n in range(1, 6)}
CASES |= {f"{NAMES[a]} and {NAMES[b]} never meet": never_together(a, b) for a, b in combinations(range(3), 2)}
CASES["each item has one of three"] = with_gaps(torch.eye(3).repeat(1, 3).bool())


@pytest.mark.parametrize("kind", [DMVAE, MVAE, MMVAE])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_each_items_own_sub_model(kind, case, noise):
    """An item with the modalities O observed counts what the model of O alone would; with one, its self-reconstruction."""
    batch, observed = CASES[case]
    n = len(batch)
    nets = {name: networks(kind, name) for name in NAMES[:n]}
    model = model_of(kind, NAMES[:n], nets)
    terms, by_item = model.loss(batch, observed, beta=0.7), []
    for i in range(len(batch["a"])):
        names = [name for name in NAMES[:n] if observed[name][i]]
        without = () if kind is not DMVAE or len(names) > 1 or n == 1 else (f"{names[0]}<-joint",)
        item_model = model_of(kind, names, nets, **({"without": without} if without else {}))
        by_item.append(item_model.loss({name: batch[name][i : i + 1] for name in names}, beta=0.7).total)
    torch.testing.assert_close(terms.total, torch.stack(by_item).mean(), rtol=1e-12, atol=1e-12)
    weights = [*model.encoders.parameters(), *model.decoders.parameters()]
    found = torch.autograd.grad(terms.total, weights, materialize_grads=True)
    expected = torch.autograd.grad(torch.stack(by_item).mean(), weights, materialize_grads=True)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [DMVAE, MVAE, MMVAE])
def test_the_joint_posterior_is_that_of_what_is_observed_of_each_item(kind):
    model = model_of(kind, NAMES[:3], {name: networks(kind, name) for name in NAMES[:3]})
    batch, observed = incomplete(3)
    whole, z = model.infer(batch, observed).joint, torch.randn(9, SHARED, dtype=torch.float64)
    for i in range(9):
        names = [name for name in NAMES[:3] if observed[name][i]]
        alone = model.infer({name: batch[name][i : i + 1] for name in names}).joint
        torch.testing.assert_close(whole.mean[i], alone.mean[0])
        torch.testing.assert_close(whole.log_prob(z)[i], alone.log_prob(z[i : i + 1])[0])


def test_a_mixture_draws_from_what_is_observed_alone():
    model = model_of(MMVAE, NAMES[:3], {name: networks(MMVAE, name) for name in NAMES[:3]})
    batch, observed = incomplete(3)
    joint = model.infer(batch, observed).joint
    drawn = joint.rsample(torch.Generator().manual_seed(0), 20_000).mean(0)
    torch.testing.assert_close(drawn, joint.mean, atol=0.06, rtol=0)


@pytest.mark.parametrize("kind", [DMVAE, MVAE, MMVAE])
def test_where_everything_is_observed_nothing_changes_to_the_last_digit(kind):
    model = model_of(kind, NAMES[:3], {name: networks(kind, name) for name in NAMES[:3]})
    batch = {name: torch.randn(6, FEATURES, dtype=torch.float64) for name in NAMES[:3]}
    totals = []
    for observed in (None, {}, {"b": torch.ones(6, dtype=torch.bool)}, dict.fromkeys(batch, torch.ones(6).bool())):
        torch.manual_seed(0)
        totals.append(model.loss(batch, observed).total)
    assert len({total.item() for total in totals}) == 1


@pytest.mark.parametrize("kind", [DMVAE, MVAE, MMVAE])
def test_missing_values_touch_neither_loss_nor_gradient(kind):
    model = model_of(kind, NAMES[:3], {name: networks(kind, name) for name in NAMES[:3]})
    batch, observed = incomplete(3)
    found = []
    for value in (math.nan, math.inf, 1e30, 0.0):
        filled = {name: x.masked_fill(~observed[name][:, None], value) for name, x in batch.items()}
        torch.manual_seed(0)
        total = model.loss(filled, observed).total
        found.append([total, *torch.autograd.grad(total, list(model.parameters()))])
        assert all(value.isfinite().all() for value in found[-1])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("kind", [DMVAE, MVAE, MMVAE])
@pytest.mark.parametrize("a, b", combinations(range(3), 2))
def test_two_modalities_that_never_meet_train_all_networks_through_the_third(kind, a, b):
    model = model_of(kind, NAMES[:3], {name: networks(kind, name) for name in NAMES[:3]})
    terms = model.loss(*never_together(a, b))
    terms.total.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.encoders.parameters())
    if kind is DMVAE:  # no item has a bound between the two
        crossed = [terms.flat()[f"log_likelihood({NAMES[i]}<-{NAMES[j]})"] for i, j in ((a, b), (b, a))]
        assert all(value == 0 for value in crossed)


@pytest.mark.parametrize("kind", [DMVAE, MVAE, MMVAE])
def test_networks_see_what_counts_and_nothing_else(kind):
    """Nothing that is missing, and no reconstruction from what is missing, comes into a batch norm or costs time."""
    model, (batch, observed) = (
        model_of(kind, NAMES[:2], {name: networks(kind, name) for name in NAMES[:2]}),
        incomplete(2),
    )
    seen = {}
    for part in ("encoders", "decoders"):
        for name, network in getattr(model, part).items():
            network.register_forward_hook(
                lambda _, x, y, key=(part, name): seen.update({key: seen.get(key, 0) + len(y)})
            )
    model.loss(batch, observed)
    both = int((observed["a"] & observed["b"]).sum())
    for name in "ab":
        there = int(observed[name].sum())
        alone = there - both
        counted = {DMVAE: alone + 3 * both, MVAE: alone + 2 * both, MMVAE: 4 * (alone + 2 * both)}[kind]
        assert seen["encoders", name] == there and seen["decoders", name] == counted


def test_a_batch_that_lacks_a_modality_altogether():
    model = model_of(DMVAE, NAMES[:2], {name: networks(DMVAE, name) for name in NAMES[:2]})
    batch = {"a": torch.randn(4, FEATURES).double(), "b": torch.full((4, FEATURES), math.nan).double()}
    terms = model.loss(batch, {"b": torch.zeros(4, dtype=torch.bool)}).flat()
    assert {name for name, value in terms.items() if value != 0} == {
        "total", "log_likelihood(a<-a)", "kl(a<-a/private)", "kl(a<-a/shared)"
    }  # fmt: skip


def test_random_subsets_count_where_they_are_a_part_of_what_is_observed(noise):
    nets = {name: networks(MVAE, name) for name in NAMES[:4]}
    model = model_of(MVAE, NAMES[:4], nets, random_subsets=10)  # all of them
    batch, observed = incomplete(4, items=12, seed=3)
    by_item = []
    for i in range(12):
        names = [name for name in NAMES[:4] if observed[name][i]]
        every = len([s for size in range(2, len(names)) for s in combinations(names, size)])
        item_model = model_of(MVAE, names, nets, random_subsets=every)
        by_item.append(item_model.loss({name: batch[name][i : i + 1] for name in names}).total)
    torch.testing.assert_close(model.loss(batch, observed).total, torch.stack(by_item).mean())


@pytest.mark.parametrize("kind", [DMVAE, MVAE, MMVAE])
def test_what_is_missing_is_drawn_from_what_is_there(kind):
    """Each item's synthesis is that of a batch of it alone with its own modalities: masks select, values do not matter."""
    model = model_of(kind, NAMES[:3], {name: networks(kind, name) for name in NAMES[:3]})
    batch, observed = never_together(0, 1)
    given, masks = {n: batch[n] for n in "ab"}, {n: observed[n] for n in "ab"}
    drawn = model.cross_generate(given, "c", 4_000, generator=torch.Generator().manual_seed(0), observed=masks).mean(0)
    for i in range(9):
        own = {n: x[i : i + 1] for n, x in given.items() if masks[n][i]}
        alone = model.cross_generate(own, "c", 4_000, generator=torch.Generator().manual_seed(1)).mean(0)
        torch.testing.assert_close(drawn[i], alone[0], atol=0.1, rtol=0)


def test_reconstructing_a_missing_item_fills_it_in_with_the_priors_private_code(noise):
    model = model_of(DMVAE, NAMES[:2], {name: networks(DMVAE, name) for name in NAMES[:2]})
    batch, observed = incomplete(2)
    filled = model.reconstruct(batch, "b", observed=observed)
    for i in (~observed["b"]).nonzero().flatten().tolist():
        shared = model.infer({"a": batch["a"][i : i + 1]}).joint.rsample()
        private = DiagonalGaussian.standard(1, model.private_dims["b"], like=shared).rsample()
        torch.testing.assert_close(filled[i], model.mean("b", private, shared)[0])


# --- log-likelihood -----------------------------------------------------------------------------------------


def linear_gaussian():
    """Two modalities, each x_i = C_i z_pi + D_i z_s + noise: the evidence is a Gaussian's."""
    torch.manual_seed(0)
    nets = {n: (nn.Linear(FEATURES, 2 + 2 * SHARED), nn.Linear(1 + SHARED, FEATURES)) for n in "ab"}
    model = DMVAE({n: Modality(*nets[n], 1, likelihood="gaussian") for n in "ab"}, SHARED).double()
    x = {n: 0.5 * torch.randn(5, FEATURES, dtype=torch.float64) for n in "ab"}
    return model, x


def evidence(model, x):
    names = list(x)
    size = FEATURES * len(names)
    mean = torch.cat([model.decoders[n].bias for n in names])
    loading = torch.zeros(size, len(names) + SHARED, dtype=torch.float64)
    for i, n in enumerate(names):
        rows = slice(i * FEATURES, (i + 1) * FEATURES)
        loading[rows, i], loading[rows, len(names) :] = model.decoders[n].weight[:, 0], model.decoders[n].weight[:, 1:]
    covariance = loading @ loading.T + torch.eye(size, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(mean, covariance)
    return normal.log_prob(torch.cat([x[n] for n in names], -1))


@torch.no_grad()
def test_log_likelihood_rises_to_the_evidence_of_a_linear_gaussian_model():
    model, x = linear_gaussian()
    exact = evidence(model, x)
    torch.manual_seed(0)
    few = torch.stack([model.log_likelihood(x, samples=1) for _ in range(400)]).mean(0)
    many = model.log_likelihood(x, samples=800_000, at_once=100_000)
    assert (few < exact - 0.05).all()
    torch.testing.assert_close(many, exact, atol=0.05, rtol=0)


@torch.no_grad()
def test_log_likelihood_of_what_is_observed():
    model, x = linear_gaussian()
    observed = {"b": torch.tensor([True, False, True, False, True])}
    torch.manual_seed(0)
    found = model.log_likelihood(x, 800_000, observed, at_once=100_000)
    expected = torch.where(observed["b"], evidence(model, x), evidence(model, {"a": x["a"]}))
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "observed, message",
    [
        ({"z": torch.ones(9).bool()}, "'z' is not in the batch"),
        ({"a": torch.ones(9)}, r"expected \(9,\), torch.bool"),
        ({"a": torch.ones(3).bool()}, r"observed\['a'\] has shape \(3,\)"),
        ({"a": torch.arange(9) > 2, "b": torch.arange(9) > 1}, "nothing is observed of 2 items, first item 0"),
    ],
)
def test_bad_masks_are_named(observed, message):
    model = model_of(DMVAE, NAMES[:2], {name: networks(DMVAE, name) for name in NAMES[:2]})
    with pytest.raises(DMVAEError, match=message):
        model.loss({name: torch.zeros(9, FEATURES).double() for name in NAMES[:2]}, observed)


def test_observed_values_are_still_checked():
    model = model_of(DMVAE, NAMES[:2], {name: networks(DMVAE, name) for name in NAMES[:2]})
    batch = {name: torch.zeros(4, FEATURES).double() for name in NAMES[:2]}
    batch["b"][1] = math.nan
    model.loss(batch, {"b": torch.tensor([True, False, True, True])})
    with pytest.raises(DMVAEError, match="'b' holds values that are not finite"):
        model.loss(batch, {"b": torch.tensor([True, True, False, True])})


def test_a_joint_network_takes_complete_items_alone():
    modalities = {n: Modality(nn.Linear(3, 4), nn.Linear(2, 3), 0) for n in "ab"}

    class Joint(nn.Module):
        def forward(self, batch):
            return torch.zeros(len(batch["a"]), 4)

    with pytest.raises(DMVAEError, match="joint network needs every modality"):
        JMVAE(modalities, 2, Joint()).loss(
            {n: torch.rand(3, 3) for n in "ab"}, {"a": torch.tensor([True, False, True])}
        )
