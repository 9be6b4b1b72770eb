"""DMVAE's objective, Eq. 3, and inference, Sec. 4.2 and 4.3, on cases solved by hand."""

import math

import pytest
import torch
from torch import nn

from dmvae_lib import DMVAE, DiagonalGaussian, DMVAEError, Modality, product_of_experts
from dmvae_lib.distributions import Likelihood
from dmvae_lib.paper.networks import mnist_decoder, mnist_encoder, svhn_decoder, svhn_encoder

PRIVATE_LOGVAR, SHARED_LOGVAR = -1.0, -0.5


class LinearEncoder(nn.Module):
    """x (B, 1) -> private mean a x, private log-variance, shared mean b x, shared log-variance (the same for all x)."""

    def __init__(self, a: float, b: float):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (a, b))

    def forward(self, x):
        one = torch.ones_like(x)
        return torch.cat([self.a * x, PRIVATE_LOGVAR * one, self.b * x, SHARED_LOGVAR * one], -1)


class LinearDecoder(nn.Module):
    """[z_p, z_s] -> c z_p + d z_s."""

    def __init__(self, c: float, d: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([c, d], dtype=torch.float64))

    def forward(self, z):
        return z @ self.weight[:, None]


COEFFICIENTS = {"one": (0.8, 0.5, 1.1, 0.6), "two": (-0.4, 0.9, 0.7, -0.3), "three": (0.2, -0.6, -0.9, 1.2)}
WEIGHTS = {"one": 3.0, "two": 0.5, "three": 2.0}


def linear_model(names, **options) -> DMVAE:
    modalities = {
        name: Modality(
            LinearEncoder(*COEFFICIENTS[name][:2]),
            LinearDecoder(*COEFFICIENTS[name][2:]),
            private_dim=1,
            weight=WEIGHTS[name],
            likelihood="gaussian",
        )
        for name in names
    }
    return DMVAE(modalities, shared_dim=1, **options).double()


def kl(mean, variance):
    return 0.5 * (mean**2 + variance - 1 - math.log(variance))


def terms_by_hand(values: dict[str, float]) -> dict[str, float]:
    """Eq. 3 in closed form for the linear-Gaussian model: E[(x - c z_p - d z_s)^2] splits into bias and variance."""
    private_variance, shared_variance = math.exp(PRIVATE_LOGVAR), math.exp(SHARED_LOGVAR)
    shared = {name: (COEFFICIENTS[name][1] * x, shared_variance) for name, x in values.items()}
    precision = 1 + len(values) / shared_variance
    shared["joint"] = (sum(mean / shared_variance for mean, _ in shared.values()) / precision, 1 / precision)
    expected = {}
    for target, x in values.items():
        a, _, c, d = COEFFICIENTS[target]
        for source, (mean, variance) in shared.items():
            squared = (x - c * a * x - d * mean) ** 2 + c**2 * private_variance + d**2 * variance
            expected[f"log_likelihood({target}<-{source})"] = -0.5 * WEIGHTS[target] * (math.log(2 * math.pi) + squared)
            expected[f"kl({target}<-{source}/private)"] = kl(a * x, private_variance)
            expected[f"kl({target}<-{source}/shared)"] = kl(mean, variance)
    return expected


@pytest.mark.parametrize("names", [["one"], ["one", "two"], ["one", "two", "three"]])
def test_every_term_of_equation_3_on_a_linear_gaussian_case(names):
    values = dict(zip(names, (0.9, -1.4, 0.5)))
    model, copies = linear_model(names), 400_000
    torch.manual_seed(0)
    with torch.no_grad():
        terms = model.loss({name: torch.full((copies, 1), x, dtype=torch.float64) for name, x in values.items()})
    expected = terms_by_hand(values)
    found = {name: value.item() for name, value in terms.flat().items()}
    assert found.keys() == {"total", *expected} and len(expected) == 3 * len(names) * (len(names) + 1)
    for name, value in expected.items():
        tolerance = 0.02 if name.startswith("log_likelihood") else 1e-9  # Monte Carlo, or exact
        assert found[name] == pytest.approx(value, abs=tolerance), name
    signs = {name: -1 if name.startswith("log_likelihood") else 1 for name in expected}
    assert found["total"] == pytest.approx(sum(signs[name] * found[name] for name in expected))


def test_one_private_sample_serves_all_reconstructions_of_a_modality():
    """With d = 0 the decoder sees z_p alone, so the three reconstructions of each modality must be equal."""
    model = linear_model(["one", "two"])
    with torch.no_grad():
        for name in model.names:
            model.decoders[name].weight[1] = 0
        terms = model.loss({name: torch.ones(5, 1, dtype=torch.float64) for name in model.names})
    for target in model.names:
        values = {terms.log_likelihoods[f"{target}<-{source}"].item() for source in ("joint", "one", "two")}
        assert len(values) == 1


def all_terms():
    ones = {name: torch.ones(4, 1, dtype=torch.float64) for name in ("one", "two")}
    return set(linear_model(["one", "two"]).loss(ones).flat())


@pytest.mark.parametrize("without", [["two<-one"], ["one<-two"], ["one<-joint", "two<-joint"], ["one<-one"]])
def test_a_switch_removes_exactly_its_bound(without):
    model = linear_model(["one", "two"], without=without)
    torch.manual_seed(0)
    terms = model.loss({name: torch.ones(4, 1, dtype=torch.float64) for name in model.names})
    gone = {name for name in all_terms() if any(bound in name for bound in without)}
    assert set(terms.flat()) == all_terms() - gone and len(gone) == 3 * len(without)


def test_a_switch_can_remove_one_part():
    """The authors' release zeroes the joint reconstructions and keeps their KLs."""
    without = ["log_likelihood(one<-joint)", "log_likelihood(two<-joint)"]
    model = linear_model(["one", "two"], without=without)
    terms = model.loss({name: torch.ones(4, 1, dtype=torch.float64) for name in model.names})
    assert set(terms.flat()) == all_terms() - set(without)


def test_beta_weighs_every_kl():
    model, batch = linear_model(["one", "two"]), {n: torch.ones(4, 1, dtype=torch.float64) for n in ("one", "two")}
    totals = []
    for beta in (0.0, 1.0, 3.0):
        torch.manual_seed(0)
        totals.append(model.loss(batch, beta=beta).total.item())
    kls = sum(model.loss(batch).kls.values())
    assert totals[1] - totals[0] == pytest.approx(kls.item()) and totals[2] - totals[0] == pytest.approx(3 * kls.item())


@pytest.mark.parametrize("private_dims", [(1, 2), (0, 0)])
def test_gradient_equals_finite_differences(private_dims):
    torch.manual_seed(0)
    sizes = {"one": (3, private_dims[0], "bernoulli"), "two": (4, private_dims[1], "laplace")}
    model = DMVAE(
        {
            name: Modality(
                nn.Sequential(nn.Linear(d, 5), nn.Tanh(), nn.Linear(5, 2 * p + 4)),
                nn.Linear(p + 2, d),
                p,
                2.0,
                likelihood,
            )
            for name, (d, p, likelihood) in sizes.items()
        },
        shared_dim=2,
    ).double()
    batch = {"one": torch.rand(6, 3).double(), "two": torch.randn(6, 4).double()}

    def loss():
        torch.manual_seed(7)
        return model.loss(batch).total

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients):
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter += 1e-6 * direction
            above = loss()
            parameter -= 2e-6 * direction
            below = loss()
            parameter += 1e-6 * direction
        assert ((above - below) / 2e-6).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-6)


# --- inference and synthesis ----------------------------------------------------------------------------------------


def test_missing_mode_inference():
    model = linear_model(["one", "two", "three"])
    x = {name: torch.randn(4, 1, dtype=torch.float64) for name in model.names}
    full = model.infer(x)
    expected = product_of_experts([full.shared[name] for name in model.names], prior=True)
    assert torch.equal(full.joint.mean, expected.mean) and torch.equal(full.joint.logvar, expected.logvar)
    alone = model.infer({"two": x["two"]})
    assert alone.joint is alone.shared["two"] and list(alone.private) == ["two"]  # no prior expert: end of Sec. 4.2
    assert torch.equal(alone.joint.mean, full.shared["two"].mean)
    pair = model.infer({"three": x["three"], "one": x["one"]})
    expected = product_of_experts([full.shared["one"], full.shared["three"]], prior=True)
    assert torch.equal(pair.joint.mean, expected.mean)
    single = linear_model(["one"])  # N = 1: nothing is missing, Eq. 2 applies
    expected = product_of_experts([single.infer({"one": x["one"]}).shared["one"]], prior=True)
    assert torch.equal(single.infer({"one": x["one"]}).joint.mean, expected.mean)


def paper_model(**options) -> DMVAE:
    torch.manual_seed(0)
    return DMVAE(
        {
            "mnist": Modality(mnist_encoder(1, 10), mnist_decoder(1, 10), private_dim=1, weight=50.0),
            "svhn": Modality(svhn_encoder(4, 10), svhn_decoder(4, 10), private_dim=4),
        },
        shared_dim=10,
        **options,
    ).eval()


def test_shapes_and_ranges_of_the_papers_model():
    model = paper_model()
    x, y = torch.rand(6, 1, 28, 28), torch.rand(6, 3, 32, 32)
    posterior = model.infer({"mnist": x, "svhn": y})
    assert posterior.private["mnist"].mean.shape == (6, 1) and posterior.private["svhn"].mean.shape == (6, 4)
    assert posterior.joint.mean.shape == (6, 10)
    generated = model.cross_generate({"mnist": x}, target="svhn", n=5)
    assert generated.shape == (5, 6, 3, 32, 32) and 0 <= generated.min() and generated.max() <= 1
    assert {name: tuple(v.shape) for name, v in model.sample(3).items()} == {
        "mnist": (3, 1, 28, 28),
        "svhn": (3, 3, 32, 32),
    }
    for source in ("joint", "mnist", "svhn"):
        assert model.reconstruct({"mnist": x, "svhn": y}, "svhn", source).shape == y.shape


def test_cross_generation_takes_the_shared_code_from_the_source_and_the_style_from_the_private_code():
    model = linear_model(["one", "two"])
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    codes = torch.tensor([[0.0], [5.0]], dtype=torch.float64)
    made = [model.cross_generate({"one": x}, "two", 2, codes, torch.Generator().manual_seed(s)) for s in (0, 0)]
    assert torch.equal(*made)
    shared = model.infer({"one": x}).joint.rsample(torch.Generator().manual_seed(0), 2)
    _, _, c, d = COEFFICIENTS["two"]
    assert torch.allclose(made[0], c * codes[:, None] + d * shared)


def test_a_likelihood_of_ones_own():
    student = torch.distributions.StudentT(3.0)
    encoder, decoder = LinearEncoder(0.1, 0.2), LinearDecoder(0.3, 0.4)
    model = DMVAE({"x": Modality(encoder, decoder, 1, likelihood=lambda m, x: student.log_prob(x - m))}, 1).double()
    with torch.no_grad():
        model.decoders["x"].weight.zero_()
    x = torch.tensor([[0.7]], dtype=torch.float64)
    assert model.loss({"x": x}).log_likelihoods["x<-x"].item() == pytest.approx(student.log_prob(x).item())
    assert isinstance(model.likelihoods["x"], Likelihood)


# --- bad input ------------------------------------------------------------------------------------------------------

IMAGES = {"mnist": torch.rand(2, 1, 28, 28), "svhn": torch.rand(2, 3, 32, 32)}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.infer({}), "at least one of mnist, svhn"),
        (lambda m: m.infer({"cifar": IMAGES["svhn"]}), "unknown modality 'cifar'.*mnist, svhn"),
        (lambda m: m.infer({"mnist": torch.rand(2, 1, 32, 32)}), r"encoder of 'mnist' rejects .*\(2, 1, 32, 32\)"),
        (lambda m: m.infer({"mnist": 255 * IMAGES["mnist"]}), r"\[0, 1\].*divide"),
        (lambda m: m.infer({"mnist": (255 * IMAGES["mnist"]).byte()}), "dtype torch.uint8"),
        (lambda m: m.infer({"mnist": torch.rand(2)}), r"shape \(2,\); expected \(B, ...\)"),
        (lambda m: m.infer({"svhn": IMAGES["svhn"] * torch.nan}), "'svhn' holds values that are not finite"),
        (lambda m: m.infer({"mnist": IMAGES["mnist"], "svhn": IMAGES["svhn"][:1]}), "same length.*2.*1"),
        (lambda m: m.loss({"mnist": IMAGES["mnist"]}), "lacks svhn"),
        (lambda m: m.cross_generate({"mnist": IMAGES["mnist"]}, "cifar"), "unknown modality 'cifar'"),
        (lambda m: m.cross_generate({"mnist": IMAGES["mnist"]}, "svhn", 2, torch.zeros(2, 3)), r"\(2, 4\)"),
        (lambda m: m.reconstruct({"mnist": IMAGES["mnist"]}, "svhn"), "'svhn' is not in the batch"),
        (lambda m: paper_model(without=["svhn<-cifar"]), "svhn<-cifar"),
        (lambda m: DMVAE({}, 10), "no modality"),
        (lambda m: Modality(nn.Identity(), nn.Identity(), 1, likelihood="poisson"), "poisson.*bernoulli"),
        (lambda m: Modality(nn.Identity(), nn.Identity(), -1), "negative"),
        (lambda m: DMVAE({"mnist": Modality(mnist_encoder(2, 10), mnist_decoder(1, 10), 1)}, 10).infer(
            {"mnist": IMAGES["mnist"]}), r"\(2, 24\), expected \(2, 22\)"),
        (lambda m: DMVAE({"mnist": Modality(mnist_encoder(1, 10), svhn_decoder(1, 10), 1)}, 10).loss(
            {"mnist": IMAGES["mnist"]}), "decoder of 'mnist' returns"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(DMVAEError, match=message):
        call(paper_model())


def test_gaussian_modality_takes_any_finite_values():
    model = linear_model(["one"])
    model.infer({"one": torch.tensor([[-100.0], [100.0]], dtype=torch.float64)})
    assert isinstance(model.infer({"one": torch.ones(1, 1, dtype=torch.float64)}).joint, DiagonalGaussian)
