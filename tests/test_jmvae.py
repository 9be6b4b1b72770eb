"""JMVAE and TELBO: their terms against closed forms, inference from every subset, where gradients go."""

import math
from itertools import combinations

import pytest
import torch
from torch import nn

from dmvae_lib import JMVAE, TELBO, DMVAEError, Modality

NAMES = ("a", "b", "c")
MODELS = (JMVAE, TELBO)


class AffineJoint(nn.Module):
    """One affine map of all modalities' features."""

    def __init__(self, n, shared_dim):
        super().__init__()
        self.linear = nn.Linear(3 * n, 2 * shared_dim)

    def forward(self, batch):
        return self.linear(torch.cat(list(batch.values()), -1))


def linear_model(model_class, n=2, shared_dim=2, **options):
    """N modalities of 3 features with affine networks, weights 1, 2, ..."""
    torch.manual_seed(0)
    modalities = {
        name: Modality(nn.Linear(3, 2 * shared_dim), nn.Linear(shared_dim, 3), 0, 1.0 + i, likelihood="gaussian")
        for i, name in enumerate(NAMES[:n])
    }
    return model_class(modalities, shared_dim, AffineJoint(n, shared_dim), **options).double()


def data(n, batch=4):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(batch, 3, generator=generator, dtype=torch.float64) for name in NAMES[:n]}


def kl_by_hand(mean, logvar, other_mean=0.0, other_logvar=None):
    other = torch.zeros_like(logvar) if other_logvar is None else other_logvar
    ratio = (logvar - other).exp()
    return 0.5 * (ratio + (mean - other_mean) ** 2 / other.exp() - 1 - ratio.log()).sum(-1).mean()


def expected_log_likelihood(decoder, x, mean, logvar):
    """E[log N(x; Wz + b, I)] for z ~ N(mean, exp(logvar)), in closed form."""
    error = (x - decoder(mean)).square() + logvar.exp() @ decoder.weight.T.square()
    return -0.5 * (error + math.log(2 * math.pi)).sum(-1).mean()


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("subset", [s for size in (1, 2, 3) for s in combinations(NAMES, size)])
def test_posterior_of_every_subset(model_class, subset):
    model, batch = linear_model(model_class, 3), data(3)
    observed = {name: batch[name] for name in subset}
    posterior = model.infer(observed)
    statistics = {name: model.encoders[name](x).chunk(2, -1) for name, x in observed.items()}
    for name, (mean, logvar) in statistics.items():
        torch.testing.assert_close(posterior.shared[name].mean, mean)
        torch.testing.assert_close(posterior.shared[name].logvar, logvar)
    if len(subset) == 3:
        mean, logvar = model.joint_encoder(batch).chunk(2, -1)
    elif len(subset) == 2:
        precision = 1 + sum((-logvar).exp() for _, logvar in statistics.values())
        mean = sum(mean * (-logvar).exp() for mean, logvar in statistics.values()) / precision
        logvar = -precision.log()
    else:
        mean, logvar = statistics[subset[0]]
    torch.testing.assert_close(posterior.joint.mean, mean)
    torch.testing.assert_close(posterior.joint.logvar, logvar)
    assert model.cross_generate(observed, "c", n=5).shape == (5, 4, 3)


@pytest.mark.parametrize("model_class", MODELS)
def test_the_order_of_the_batch_does_not_matter_to_the_joint_network(model_class):
    model, batch = linear_model(model_class, 2), data(2)
    backwards = dict(reversed(batch.items()))
    torch.testing.assert_close(model.infer(backwards).joint.mean, model.infer(batch).joint.mean)


@pytest.mark.parametrize("model_class", MODELS)
def test_joint_bound_equals_the_closed_form_of_the_linear_gaussian_case(model_class):
    model, one = linear_model(model_class), data(2, batch=1)
    with torch.no_grad():
        terms = model.loss({name: x.expand(100_000, -1) for name, x in one.items()})
        mean, logvar = model.joint_encoder(one).chunk(2, -1)
        torch.testing.assert_close(terms.kls["joint"], kl_by_hand(mean, logvar))
        for name, weight in (("a", 1.0), ("b", 2.0)):
            expected = weight * expected_log_likelihood(model.decoders[name], one[name], mean, logvar)
            # the log-likelihood's standard deviation is near 1 to 4: 0.06 is five standard errors of 100,000 rows
            assert abs(terms.log_likelihoods[f"{name}<-joint"] - expected) < 0.06


@pytest.mark.parametrize("n", [1, 2, 3])
def test_jmvae_total_and_divergences(n):
    model, batch = linear_model(JMVAE, n, alpha=0.4), data(n)
    terms = model.loss(batch, beta=0.3)
    mean, logvar = model.joint_encoder(batch).chunk(2, -1)
    divergences = {
        f"alpha kl(joint||{name})": 0.4 * kl_by_hand(mean, logvar, *model.encoders[name](x).chunk(2, -1))
        for name, x in batch.items()
    }
    assert set(terms.log_likelihoods) == {f"{name}<-joint" for name in batch} and set(terms.kls) == {"joint"}
    assert set(terms.others) == set(divergences)
    for name, expected in divergences.items():
        torch.testing.assert_close(terms.others[name], expected)
    expected = 0.3 * terms.kls["joint"] + sum(divergences.values()) - sum(terms.log_likelihoods.values())
    torch.testing.assert_close(terms.total, expected)


def test_jmvae_alpha_defaults_to_the_papers():
    assert linear_model(JMVAE).alpha == 0.1


def test_telbo_unimodal_bounds_equal_the_closed_form():
    model, one = linear_model(TELBO, unimodal_weights={"b": 5.0}), data(2, batch=1)
    with torch.no_grad():
        terms = model.loss({name: x.expand(100_000, -1) for name, x in one.items()})
        for name, weight in (("a", 1.0), ("b", 5.0)):  # lambda where gamma is not given
            mean, logvar = model.encoders[name](one[name]).chunk(2, -1)
            torch.testing.assert_close(terms.kls[name], kl_by_hand(mean, logvar))
            expected = weight * expected_log_likelihood(model.decoders[name], one[name], mean, logvar)
            # standard deviations are near 1 and 5: 0.08 is five standard errors of 100,000 rows
            assert abs(terms.log_likelihoods[f"{name}<-{name}"] - expected) < 0.08


@pytest.mark.parametrize("n", [1, 2, 3])
def test_telbo_total(n):
    terms = linear_model(TELBO, n).loss(data(n), beta=0.3)
    names = NAMES[:n]
    assert set(terms.kls) == {"joint", *names}
    assert set(terms.log_likelihoods) == {f"{name}<-{source}" for name in names for source in ("joint", name)}
    expected = 0.3 * sum(terms.kls.values()) - sum(terms.log_likelihoods.values())
    torch.testing.assert_close(terms.total, expected)


def test_telbo_decoders_learn_from_the_joint_bound_alone():
    model = linear_model(TELBO)
    terms = model.loss(data(2))
    for name in ("a", "b"):
        parameters = list(model.decoders[name].parameters())
        found = torch.autograd.grad(terms.total, parameters, retain_graph=True)
        expected = torch.autograd.grad(-terms.log_likelihoods[f"{name}<-joint"], parameters, retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
            assert other.abs().max() > 0


def test_telbo_unimodal_encoders_learn_through_the_fixed_decoders():
    """The gradient of E[log p(x_i | z)] with respect to the encoder's mean is W'(x - Wz - b)."""
    model, one = linear_model(TELBO), data(2, batch=1)
    rows = 100_000
    terms = model.loss({name: x.expand(rows, -1) for name, x in one.items()})
    bias, decoder = model.encoders["a"].bias, model.decoders["a"]
    (found,) = torch.autograd.grad(terms.log_likelihoods["a<-a"], bias)
    mean, _ = model.encoders["a"](one["a"]).chunk(2, -1)
    expected = ((one["a"] - decoder(mean)) @ decoder.weight)[0]
    assert expected.abs().min() > 0.05
    assert (found[:2] - expected).abs().max() < 0.02


@pytest.mark.parametrize("model_class", MODELS)
def test_errors(model_class):
    with pytest.raises(DMVAEError, match=f"{model_class.__name__} has no private codes"):
        model_class({"a": Modality(nn.Linear(3, 6), nn.Linear(3, 3), 1)}, 2, AffineJoint(1, 2))
    with pytest.raises(DMVAEError, match="the batch lacks b"):
        linear_model(model_class).loss(data(1))
    wrong = linear_model(model_class)
    wrong.joint_encoder = AffineJoint(2, 3).double()
    with pytest.raises(DMVAEError, match=r"joint encoder returned shape \(4, 6\), expected \(4, 4\)"):
        wrong.infer(data(2))


def test_errors_of_weights():
    with pytest.raises(DMVAEError, match="alpha=-1"):
        linear_model(JMVAE, alpha=-1)
    for weights in ({"z": 1.0}, {"a": -1.0}):
        with pytest.raises(DMVAEError, match="unimodal_weights"):
            linear_model(TELBO, unimodal_weights=weights)
