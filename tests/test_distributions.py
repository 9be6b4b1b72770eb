"""Distributions against numerical integration, sampling and torch.distributions (Sec. 3 and 4.2)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmvae_lib import DiagonalGaussian, DMVAEError, product_of_experts
from dmvae_lib.distributions import Laplace, Mixture, bernoulli, gaussian, laplace

GRID = torch.linspace(-30, 30, 600_001, dtype=torch.float64)


def normal(mean, logvar) -> DiagonalGaussian:
    return DiagonalGaussian(torch.tensor(mean, dtype=torch.float64), torch.tensor(logvar, dtype=torch.float64))


def density(q, grid=GRID):
    return q.log_prob(grid[:, None]).exp()


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("experts", [[(0.7, -0.5)], [(1.0, 0.0), (-2.0, 1.0)], [(0.3, -1.0), (0.9, 0.4), (-1.5, -2.0)]])
def test_product_of_experts_is_the_normalised_product_of_densities(experts, prior):
    experts = [normal([mean], [logvar]) for mean, logvar in experts]
    product = math.prod(density(expert) for expert in experts) * (density(normal([0.0], [0.0])) if prior else 1)
    product = product / torch.trapezoid(product, GRID)
    assert torch.allclose(density(product_of_experts(experts, prior)), product, atol=1e-9)


def test_product_of_experts_is_stable_where_precisions_overflow():
    for low, high in [(-20.0, 20.0), (-20.0, -20.0), (20.0, 20.0)]:
        experts = [DiagonalGaussian(torch.tensor([m]), torch.tensor([v])) for m, v in [(3.0, low), (-1.0, high)]]
        product = product_of_experts(experts)
        precision = math.exp(-low) + math.exp(-high) + 1
        assert product.mean.item() == pytest.approx((3 * math.exp(-low) - math.exp(-high)) / precision, rel=1e-5)
        assert product.logvar.item() == pytest.approx(-math.log(precision), abs=1e-5)
    wild = [DiagonalGaussian(torch.tensor([m]), torch.tensor([v])) for m, v in [(3.0, -200.0), (-1.0, 200.0)]]
    assert product_of_experts(wild).mean.item() == pytest.approx(3.0)  # exp(200) is infinite in float32


numbers = st.floats(-5, 5)


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=5), st.randoms())
def test_product_of_experts_does_not_depend_on_the_order(experts, random):
    shuffled = random.sample(experts, len(experts))
    one, other = (product_of_experts([normal([m], [v]) for m, v in order]) for order in (experts, shuffled))
    assert torch.allclose(one.mean, other.mean) and torch.allclose(one.logvar, other.logvar)
    assert one.logvar <= min(v for _, v in experts) + 1e-9  # a product is never less certain than an expert


def test_product_of_experts_refuses_nothing_and_unequal_shapes():
    with pytest.raises(DMVAEError, match="no expert"):
        product_of_experts([])
    with pytest.raises(DMVAEError, match="same shape"):
        product_of_experts([normal([0.0], [0.0]), normal([0.0, 1.0], [0.0, 1.0])])
    with pytest.raises(DMVAEError, match="same shape"):
        DiagonalGaussian(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize("mean, logvar", [(0.0, 0.0), (1.3, -0.7), (-2.0, 1.1)])
def test_kl_to_the_prior_equals_the_integral(mean, logvar):
    q, p = normal([mean], [logvar]), normal([0.0], [0.0])
    integrand = density(q) * (q.log_prob(GRID[:, None]) - p.log_prob(GRID[:, None]))
    assert q.kl().item() == pytest.approx(torch.trapezoid(integrand, GRID).item(), abs=1e-9)


def test_kl_between_gaussians_equals_torch_and_sums_over_the_last_axis():
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    q, p = DiagonalGaussian(a, b), DiagonalGaussian(c, d)
    reference = torch.distributions.kl_divergence(
        torch.distributions.Normal(a, (b / 2).exp()), torch.distributions.Normal(c, (d / 2).exp())
    ).sum(-1)
    assert torch.allclose(q.kl(p), reference)
    assert torch.allclose(q.kl(), q.kl(DiagonalGaussian.standard(5, 3, like=a)))
    assert DiagonalGaussian(torch.zeros(5, 0), torch.zeros(5, 0)).kl().tolist() == [0] * 5  # no private space


def test_samples_have_the_stated_moments_and_carry_gradients():
    generator = torch.Generator().manual_seed(1)
    q = normal([1.0, -2.0], [math.log(4.0), math.log(0.25)])
    z = q.rsample(generator, 200_000)
    assert torch.allclose(z.mean(0), q.mean, atol=0.02)
    assert torch.allclose(z.std(0), torch.tensor([2.0, 0.5], dtype=torch.float64), rtol=0.01)
    mean, logvar = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    noise = DiagonalGaussian(mean, logvar).rsample(torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(noise.sum(), [mean, logvar])
    assert torch.allclose(gradients[0], torch.ones(3)) and torch.allclose(gradients[1], noise.detach() / 2)


def test_log_prob_equals_torch():
    q, z = normal([0.5, -1.0], [0.3, -2.0]), torch.tensor([[0.1, 0.2], [3.0, -1.0]], dtype=torch.float64)
    reference = torch.distributions.Normal(q.mean, (q.logvar / 2).exp()).log_prob(z).sum(-1)
    assert torch.allclose(q.log_prob(z), reference)


def test_laplace_and_mixture():
    one = Laplace(torch.tensor([0.5], dtype=torch.float64), torch.tensor([1.5], dtype=torch.float64))
    two = Laplace(torch.tensor([-4.0], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64))
    mixture = Mixture([one, two])
    assert torch.trapezoid(density(mixture), GRID).item() == pytest.approx(1, abs=1e-6)
    assert torch.allclose(density(mixture), (density(one) + density(two)) / 2)
    z = mixture.rsample(torch.Generator().manual_seed(0), 200_000)
    assert (z < -2.5).double().mean().item() == pytest.approx(0.5 + 0.25 * math.exp(-2), abs=0.01)
    z = one.rsample(torch.Generator().manual_seed(0), 200_000)
    assert z.mean().item() == pytest.approx(0.5, abs=0.02)
    assert (z - 0.5).abs().mean().item() == pytest.approx(1.5, rel=0.01)


@pytest.mark.parametrize(
    "likelihood, reference",
    [
        (bernoulli(), lambda p, x: -torch.nn.functional.binary_cross_entropy_with_logits(p, x, reduction="none")),
        (gaussian(0.3), lambda p, x: torch.distributions.Normal(p, 0.3).log_prob(x)),
        (laplace(0.75), lambda p, x: torch.distributions.Laplace(p, 0.75).log_prob(x)),
    ],
)
def test_likelihoods_equal_torch(likelihood, reference):
    generator = torch.Generator().manual_seed(0)
    params = 8 * torch.randn(50, generator=generator, dtype=torch.float64)
    x = torch.rand(50, generator=generator, dtype=torch.float64)
    assert torch.allclose(likelihood.log_prob(params, x), reference(params, x), atol=1e-7)


def test_bernoulli_is_finite_for_extreme_logits():
    extreme = bernoulli().log_prob(torch.tensor([-1e4, 1e4]), torch.tensor([0.0, 1.0]))
    assert np.allclose(extreme.numpy(), 0)
