"""MMVAE: Laplace experts, their mixture and prior, the importance-weighted bound, and DReG's gradient."""

import math
from itertools import combinations

import pytest
import torch
from torch import nn

from dmvae_lib import MMVAE, DMVAEError, Modality
from dmvae_lib.distributions import Laplace, Mixture, laplace

NAMES = ("a", "b", "c")


def linear_mmvae(n=2, particles=3, shared_dim=2, features=3):
    """N modalities of 3 features with affine encoders and decoders, weights 1, 2, ..., and an uneven prior."""
    torch.manual_seed(0)
    modalities = {
        name: Modality(
            nn.Linear(features, 2 * shared_dim), nn.Linear(shared_dim, features), 0, 1.0 + i, likelihood=laplace(0.75)
        )
        for i, name in enumerate(NAMES[:n])
    }
    model = MMVAE(modalities, shared_dim, particles).double()
    with torch.no_grad():
        model.prior_logits.copy_(torch.linspace(-0.5, 0.5, shared_dim))
    return model


def data(n, batch=4, features=3):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(batch, features, generator=generator, dtype=torch.float64) for name in NAMES[:n]}


@pytest.fixture
def drawn(monkeypatch):
    """Every sample that a Laplace gives during the test, in order."""
    samples, rsample = [], Laplace.rsample
    monkeypatch.setattr(Laplace, "rsample", lambda *a, **k: samples.append(rsample(*a, **k)) or samples[-1])
    return samples


def gradients(value, module):
    return torch.autograd.grad(value, list(module.parameters()), retain_graph=True)


def assert_all_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def log_weights(model, batch, samples, hold_q):
    """log w of given samples, (N, K, B), written out from the densities; hold_q: q's parameters are constants."""
    z = torch.stack(list(samples))
    scale = model.prior_logits.softmax(0) * model.shared_dim
    log_p = (-z.abs() / scale - (2 * scale).log()).sum(-1)
    for name, x in batch.items():
        error = (x - model.decoders[name](z)).abs() / 0.75
        log_p = log_p + model.weights[name] * (-error - math.log(1.5)).sum(-1)
    densities = []
    for name, x in batch.items():
        mean, logits = model.encoders[name](x).chunk(2, -1)
        scale = logits.softmax(-1) * model.shared_dim + 1e-6
        if hold_q:
            mean, scale = mean.detach(), scale.detach()
        densities.append((-(z - mean).abs() / scale - (2 * scale).log()).sum(-1).exp())
    return log_p - (sum(densities) / len(densities)).log()


# --- distributions -------------------------------------------------------------------------------------------


def test_mixture_draws_every_expert_equally_often_and_all_dimensions_from_one():
    centres = [torch.full((2,), c, dtype=torch.float64) for c in (-100.0, 0.0, 100.0)]
    mixture = Mixture([Laplace(c, torch.ones(2, dtype=torch.float64)) for c in centres])
    nearest = (mixture.rsample(torch.Generator().manual_seed(0), n=30_000) / 100).round()
    assert (nearest[:, 0] == nearest[:, 1]).all()
    for c in (-1, 0, 1):
        assert abs((nearest[:, 0] == c).double().mean() - 1 / 3) < 0.014  # five standard errors


def test_scales_of_prior_and_experts_sum_to_the_dimension():
    model = linear_mmvae(2, shared_dim=5)
    torch.testing.assert_close(model.prior_distribution().scale.sum().item(), 5.0)
    for q in model.infer(data(2)).shared.values():
        torch.testing.assert_close(q.scale.sum(-1), torch.full((4,), 5 + 5e-6, dtype=torch.float64))


def test_prior_samples_are_laplace_with_the_learnt_scale():
    model = linear_mmvae(2, shared_dim=3)
    z = model.prior(200_000, torch.Generator().manual_seed(0))
    scale = model.prior_logits.softmax(0) * 3
    assert z.shape == (200_000, 3)
    assert ((z.abs().mean(0) / scale - 1).abs() < 0.012).all()  # five standard errors
    assert ((z.mean(0) / scale).abs() < 0.016).all()


# --- inference -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset", [s for size in (1, 2, 3) for s in combinations(NAMES, size)])
def test_posterior_of_every_subset_is_the_mixture_of_its_experts(subset):
    model, batch = linear_mmvae(3), data(3)
    posterior = model.infer({name: batch[name] for name in subset})
    z = torch.randn(4, 2, dtype=torch.float64)
    densities = []
    for name in subset:
        mean, logits = model.encoders[name](batch[name]).chunk(2, -1)
        torch.testing.assert_close(posterior.shared[name].mean, mean)
        scale = 2 * logits.softmax(-1) + 1e-6
        densities.append(((-(z - mean).abs() / scale).exp() / (2 * scale)).prod(-1))
    torch.testing.assert_close(posterior.joint.log_prob(z).exp(), sum(densities) / len(subset))
    assert model.cross_generate({name: batch[name] for name in subset}, "c", n=5).shape == (5, 4, 3)


def test_sample_shapes():
    assert {name: x.shape for name, x in linear_mmvae(3).sample(7).items()} == dict.fromkeys(NAMES, (7, 3))


# --- the bound -----------------------------------------------------------------------------------------------


def test_bound_equals_plain_python_on_the_same_samples(drawn):
    model, batch = linear_mmvae(2, particles=3), data(2, batch=2)
    terms = model.loss(batch, beta=0.7)

    def log_laplace(value, mean, scale):
        return sum(-abs(v - m) / s - math.log(2 * s) for v, m, s in zip(value, mean, scale, strict=True))

    def softmax_times_dimension(logits):
        return [len(logits) * math.exp(a) / sum(math.exp(b) for b in logits) for a in logits]

    prior_scale = softmax_times_dimension(model.prior_logits.tolist())
    bounds, likelihoods, divergences = [], {"a": [], "b": []}, []
    for z_m in drawn[:2]:
        for row in range(2):
            weights = []
            for k in range(3):
                z = z_m[k, row].tolist()
                density, log_likelihood = 0.0, 0.0
                for name, weight in (("a", 1.0), ("b", 2.0)):
                    x = batch[name][row]
                    statistics = model.encoders[name](x).tolist()
                    scale = [s + 1e-6 for s in softmax_times_dimension(statistics[2:])]
                    density += math.exp(log_laplace(z, statistics[:2], scale)) / 2
                    mean = model.decoders[name](torch.tensor(z, dtype=torch.float64)).tolist()
                    likelihoods[name].append(weight * log_laplace(x.tolist(), mean, [0.75] * 3))
                    log_likelihood += likelihoods[name][-1]
                divergences.append(math.log(density) - log_laplace(z, [0, 0], prior_scale))
                weights.append(math.exp(log_likelihood - 0.7 * divergences[-1]))
            bounds.append(math.log(sum(weights) / 3))
    mean = {"kl(joint)": divergences, **{f"log_likelihood({name}<-joint)": v for name, v in likelihoods.items()}}
    expected = {name: sum(values) / len(values) for name, values in mean.items()} | {"total": -sum(bounds) / 4}
    elbo = sum(expected[f"log_likelihood({name}<-joint)"] for name in "ab") - 0.7 * expected["kl(joint)"]
    expected["importance weighting"] = elbo - sum(bounds) / 4
    assert {name: value.item() for name, value in terms.flat().items()} == pytest.approx(expected, rel=1e-9)


def test_more_particles_tighten_the_bound_towards_the_evidence():
    model, one = linear_mmvae(2, shared_dim=1), data(2, batch=1)
    grid = torch.linspace(-40, 40, 80_001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        for name in one:
            model.weights[name] = 1.0  # weighted likelihoods have no evidence
        log_joint = model.prior_distribution().log_prob(grid)
        for name, x in one.items():
            log_joint = log_joint + model.log_prob(name, model.decoders[name](grid), x.expand(len(grid), -1))
        evidence = torch.trapezoid(log_joint.exp(), grid[:, 0]).log()
        bounds = []
        for model.particles in (1, 3, 100):
            bounds.append(-model.loss({name: x.expand(10_000, -1) for name, x in one.items()}).total)
    assert bounds[0] + 0.05 < bounds[1] and bounds[1] + 0.02 < bounds[2] < evidence
    assert evidence - bounds[2] < 0.02


# --- DReG ----------------------------------------------------------------------------------------------------


def test_encoder_gradient_is_dregs_written_out(drawn):
    model, batch = linear_mmvae(2, particles=3), data(2)
    total = model.loss(batch).total
    experts = drawn[:2]
    leaves = [z.detach().requires_grad_() for z in experts]
    log_w = log_weights(model, batch, leaves, hold_q=True)
    weight = log_w.detach().softmax(1)
    by_sample = torch.autograd.grad(log_w.sum(), leaves)
    for m, name in enumerate(batch):
        outer = weight[m].square()[..., None] * by_sample[m] / (2 * len(batch["a"]))  # means over N and B
        expected = torch.autograd.grad(experts[m], list(model.encoders[name].parameters()), -outer, retain_graph=True)
        assert_all_close(gradients(total, model.encoders[name]), expected)


def test_encoder_gradient_of_one_expert_is_unbiased():
    """Against central differences of the bound itself with common samples, whose expectation is its gradient."""
    model, rows, step = linear_mmvae(1, particles=4), 200_000, 1e-4
    batch = {"a": data(1, batch=1)["a"].expand(rows, -1)}
    bias = model.encoders["a"].bias  # two means, two logits of the scale
    dreg = -torch.autograd.grad(model.loss(batch).total, bias)[0]
    for i in range(4):
        bounds = []
        for shift in (step, -step):
            with torch.no_grad():
                bias[i] += shift
                torch.manual_seed(1)
                bounds.append(-model.loss(batch).total)
                bias[i] -= shift
        difference = (bounds[0] - bounds[1]) / (2 * step)
        # both are means over 200,000 rows, with standard errors near 0.003
        assert abs(difference) > 0.1
        assert abs(dreg[i] - difference) < 0.02


def test_encoder_gradient_with_one_particle_is_the_path_derivative_of_the_elbo(drawn):
    model, batch = linear_mmvae(2, particles=1), data(2)
    total = model.loss(batch).total
    path = -log_weights(model, batch, drawn[:2], hold_q=True).mean()
    for name in batch:
        assert_all_close(gradients(total, model.encoders[name]), gradients(path, model.encoders[name]))


def test_encoder_gradient_with_one_particle_is_unbiased_for_the_mixture(drawn):
    model, rows = linear_mmvae(2, particles=1), 200_000
    batch = {name: x.expand(rows, -1) for name, x in data(2, batch=1).items()}
    total = model.loss(batch).total
    full = -log_weights(model, batch, drawn[:2], hold_q=False).mean()  # the score term, of expectation 0, included
    for name in batch:
        found, expected = (gradients(value, model.encoders[name])[1] for value in (total, full))  # of the bias
        assert (expected.abs() > 0.05).all()
        assert ((found - expected).abs() < 0.006).all()  # five standard errors


def test_decoder_and_prior_gradients_are_those_of_the_bound(drawn):
    for particles in (1, 3):
        drawn.clear()
        model, batch = linear_mmvae(2, particles=particles), data(2)
        total = model.loss(batch).total
        log_w = log_weights(model, batch, [z.detach() for z in drawn[:2]], hold_q=True)
        # one particle: the ELBO, a plain mean
        bound = log_w.mean() if particles == 1 else (log_w.exp().mean(1)).log().mean()
        for module in (*model.decoders.values(), nn.ParameterList([model.prior_logits])):
            assert_all_close(gradients(total, module), gradients(-bound, module))


def test_evaluation_without_gradients_gives_the_same_bound():
    model, batch = linear_mmvae(), data(2)
    torch.manual_seed(0)
    trained = model.loss(batch).total
    torch.manual_seed(0)
    with torch.no_grad():
        torch.testing.assert_close(model.loss(batch).total, trained.detach())


def test_errors():
    with pytest.raises(DMVAEError, match="MMVAE has no private codes"):
        MMVAE({"a": Modality(nn.Linear(3, 6), nn.Linear(3, 3), 1)}, 2)
    with pytest.raises(DMVAEError, match="particles=0"):
        linear_mmvae(particles=0)
    with pytest.raises(DMVAEError, match="the batch lacks b"):
        linear_mmvae(2).loss(data(1))
    with pytest.raises(DMVAEError, match=r"returned shape \(4, 3\), expected \(4, 4\)"):
        model = linear_mmvae(2)
        model.encoders["a"] = nn.Linear(3, 3).double()
        model.infer(data(1))
