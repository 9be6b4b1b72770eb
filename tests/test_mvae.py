"""MVAE: the product with the prior, the sub-sampled bounds against closed forms, and its stability."""

from itertools import combinations

import pytest
import torch
from torch import nn

from dmvae_lib import MVAE, DMVAEError, Modality
from dmvae_lib.models.mvae import LOGVAR_RANGE

NAMES = ("a", "b", "c", "d")


def linear_mvae(n, shared_dim=2, features=3, likelihood="gaussian", **options):
    """N modalities of 3 features with affine encoders and decoders, weights 1, 2, ..."""
    torch.manual_seed(0)
    modalities = {
        name: Modality(
            nn.Linear(features, 2 * shared_dim), nn.Linear(shared_dim, features), 0, 1.0 + i, likelihood=likelihood
        )
        for i, name in enumerate(NAMES[:n])
    }
    return MVAE(modalities, shared_dim, **options).double()


def data(names, batch=4, features=3):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(batch, features, generator=generator, dtype=torch.float64) for name in names}


def product_by_hand(model, batch):
    """Mean and variance of N(0, I) times the experts, from precisions."""
    statistics = [model.encoders[name](x).chunk(2, -1) for name, x in batch.items()]
    precision = 1 + sum((-logvar).exp() for _, logvar in statistics)
    return sum(mean * (-logvar).exp() for mean, logvar in statistics) / precision, 1 / precision


@pytest.mark.parametrize("subset", [s for size in (1, 2, 3) for s in combinations(NAMES[:3], size)])
def test_posterior_of_every_subset_is_the_product_with_the_prior(subset):
    model, batch = linear_mvae(3), data(subset)
    posterior = model.infer(batch)
    mean, variance = product_by_hand(model, batch)
    torch.testing.assert_close(posterior.joint.mean, mean)
    torch.testing.assert_close(posterior.joint.logvar.exp(), variance)
    for name in subset:
        torch.testing.assert_close(posterior.shared[name].mean, model.infer({name: batch[name]}).joint.mean)
        torch.testing.assert_close(posterior.shared[name].logvar, model.infer({name: batch[name]}).joint.logvar)


def test_bounds_equal_the_closed_form_of_the_linear_gaussian_case():
    model, rows = linear_mvae(2), 100_000
    one = data(("a", "b"), batch=1)
    with torch.no_grad():
        terms = model.loss({name: x.expand(rows, -1) for name, x in one.items()})
        for subset in (("a", "b"), ("a",), ("b",)):
            source = "joint" if len(subset) == 2 else subset[0]
            mean, variance = product_by_hand(model, {name: one[name] for name in subset})
            kl = 0.5 * (mean**2 + variance - 1 - variance.log()).sum()
            torch.testing.assert_close(terms.kls[source], kl)
            for name in subset:
                # E[(x - Wz - b)^2] = (x - W mean - b)^2 + diag(W diag(variance) W'), z ~ N(mean, diag(variance))
                decoder = model.decoders[name]
                error = (one[name] - decoder(mean)).square() + variance @ decoder.weight.T.square()
                expected = model.weights[name] * -0.5 * (error + torch.log(torch.tensor(2 * torch.pi))).sum()
                # the log-likelihood's standard deviation is near 1: 0.02 is six standard errors of 100,000 rows
                assert abs(terms.log_likelihoods[f"{name}<-{source}"] - expected) < 0.02


@pytest.mark.parametrize("n", [1, 2, 3])
def test_terms_are_the_full_set_and_every_modality_alone(n):
    names = NAMES[:n]
    terms = linear_mvae(n).loss(data(names))
    alone = names if n > 1 else ()  # one modality alone is the full set
    assert set(terms.kls) == {"joint", *alone}
    assert set(terms.log_likelihoods) == {f"{name}<-joint" for name in names} | {f"{name}<-{name}" for name in alone}


def test_total_is_beta_times_divergences_minus_log_likelihoods():
    terms = linear_mvae(2).loss(data(("a", "b")), beta=0.3)
    divergences = sum(terms.kls[source] for source in ("joint", "a", "b"))
    likelihoods = sum(terms.log_likelihoods[name] for name in ("a<-joint", "b<-joint", "a<-a", "b<-b"))
    torch.testing.assert_close(terms.total, 0.3 * divergences - likelihoods)


def test_random_subsets_are_distinct_proper_and_drawn_anew():
    model, batch = linear_mvae(4, random_subsets=3), data(NAMES)
    proper = {",".join(s) for size in (2, 3) for s in combinations(NAMES, size)}
    always = {*NAMES, "joint"}
    draws = [frozenset(model.loss(batch).kls) for _ in range(30)]
    assert all(always < draw and len(draw - always) == 3 and draw - always <= proper for draw in draws)
    assert frozenset.union(*draws) - always == proper


def test_bound_of_a_random_subset_uses_its_own_posterior():
    model, batch = linear_mvae(3, random_subsets=3), data(NAMES[:3])
    terms = model.loss(batch)
    for subset in combinations(NAMES[:3], 2):
        mean, variance = product_by_hand(model, {name: batch[name] for name in subset})
        kl = 0.5 * (mean**2 + variance - 1 - variance.log()).sum(-1).mean()
        torch.testing.assert_close(terms.kls[",".join(subset)], kl)


def test_each_modality_is_encoded_once_however_many_subsets():
    model, calls = linear_mvae(4, random_subsets=5), []
    for name, encoder in model.encoders.items():
        encoder.register_forward_hook(lambda *_, name=name: calls.append(name))
    model.loss(data(NAMES))
    assert sorted(calls) == list(NAMES)


def test_experts_log_variances_stay_in_the_stated_range():
    model, batch = linear_mvae(1), data("a")
    with torch.no_grad():
        model.encoders["a"].weight.zero_()
        model.encoders["a"].bias.copy_(torch.tensor([5.0, 5.0, -1e6, 1e6]))
    variance = model.infer(batch).joint.logvar.exp()[0]
    low, high = (torch.tensor(bound, dtype=torch.float64).exp() for bound in LOGVAR_RANGE)
    torch.testing.assert_close(variance, torch.stack([low / (1 + low), high / (1 + high)]))


def test_training_stays_finite_from_extreme_statistics():
    model = linear_mvae(2, likelihood="bernoulli").float()
    with torch.no_grad():
        for encoder in model.encoders.values():
            encoder.weight.mul_(1e4)  # log-variances in the thousands, of both signs
    batch = {name: x.round().float() for name, x in data(("a", "b"), batch=32).items()}
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    for step in range(300):
        optimiser.zero_grad()
        total = model.loss(batch, beta=step / 300).total
        total.backward()
        assert total.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimiser.step()


def test_synthesis_shapes():
    model, batch = linear_mvae(3), data(("a",))
    assert model.cross_generate(batch, "b", n=5).shape == (5, 4, 3)
    assert {name: x.shape for name, x in model.sample(7).items()} == dict.fromkeys(NAMES[:3], (7, 3))


def test_errors():
    with pytest.raises(DMVAEError, match=r"no private codes, found private_dim \{'a': 1\}"):
        MVAE({"a": Modality(nn.Linear(3, 6), nn.Linear(3, 3), 1)}, 2)
    for n, subsets in ((2, 1), (3, 4), (1, 1), (3, -1)):
        with pytest.raises(DMVAEError, match="random_subsets"):
            linear_mvae(n, random_subsets=subsets)
    with pytest.raises(DMVAEError, match="the batch lacks b"):
        linear_mvae(2).loss(data("a"))
