"""What `analysis` says of codes whose answer is known."""

import pytest
import torch
from torch import nn

from dmvae_lib.analysis import distinct_codes, linear_probe, linear_r2, mixing, neighbour_agreement, posterior_means
from dmvae_lib.models import DMVAE, Modality
from dmvae_lib.pairing import PairedData

pytestmark = pytest.mark.usefixtures("one_thread")


def tensors(*values):
    return [torch.tensor(value) for value in values]


def test_neighbours_of_modalities_that_lie_in_one_another_and_apart():
    a, near, far = tensors([[0.0], [10.0], [20.0]], [[0.1], [10.1], [20.1]], [[100.0], [101.0], [102.0]])
    assert mixing({"a": a, "b": near}) == 1 and mixing({"a": a, "b": far}) == 0
    a, b, labels = tensors([[0.0], [10.0], [1.0]], [[0.0], [10.0], [1.2]], [0, 1, 0])
    assert neighbour_agreement({"a": a, "b": b}, labels) == pytest.approx(4 / 6)  # the paired item is passed over


def test_linear_probe_reads_a_class_that_lies_on_a_line_and_none_that_does_not():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(600, 2, generator=generator)
    side, quadrants = (codes.sum(1) > 0).long(), ((codes > 0).sum(1) == 1).long()
    assert linear_probe(codes[:400], side[:400], codes[400:], side[400:]) > 0.97
    assert abs(linear_probe(codes[:400], quadrants[:400], codes[400:], quadrants[400:]) - 0.5) < 0.1  # an exclusive or


def test_linear_probe_of_no_codes_answers_the_class_most_common_in_training():
    train, test = torch.zeros(5, 0), torch.zeros(4, 0)
    assert linear_probe(train, torch.tensor([7, 7, 7, 2, 2]), test, torch.tensor([2, 2, 2, 7])) == 0.25


def test_linear_r2_is_the_share_of_the_variance_that_a_line_explains():
    """y = 3 x0 - x1 + 5 + noise: of the variance 10 + 10 half is the noise's. A code that is constant changes nothing."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.cat([torch.randn(4_000, 2, generator=generator), torch.ones(4_000, 1)], 1)
    noise = 10**0.5 * torch.randn(4_000, 1, generator=generator)
    values = 3 * codes[:, :1] - codes[:, 1:2] + 5 + noise
    halves = codes[:2_000], values[:2_000], codes[2_000:], values[2_000:]
    assert linear_r2(*halves) == pytest.approx(0.5, abs=0.03)
    exact = torch.cat([values - noise, torch.zeros(4_000, 1)], 1)
    assert linear_r2(codes[:2_000], exact[:2_000], codes[2_000:], exact[2_000:]) == pytest.approx(1)
    assert abs(linear_r2(noise[:2_000], codes[:2_000, :2], noise[2_000:], codes[2_000:, :2])) < 0.01
    assert linear_r2(codes[:2_000, :0], values[:2_000], codes[:2_000, :0], values[:2_000]) == pytest.approx(0)


def model(a=1, b=2):
    """Linear networks on 4 numbers each."""
    sizes = {"a": a, "b": b}
    torch.manual_seed(0)
    return DMVAE({n: Modality(nn.Linear(4, 2 * p + 6), nn.Linear(p + 3, 4), p) for n, p in sizes.items()}, 3)


def test_posterior_means_are_inference_s_in_the_rows_asked_for():
    dmvae, items = model(), {name: torch.rand(2_500, 4) for name in "ab"}
    rows = torch.randperm(2_500, generator=torch.Generator().manual_seed(1))[:2_100]  # more than it takes at once
    found = posterior_means(dmvae, PairedData.aligned(items), rows)
    expected = dmvae.infer({name: x[rows] for name, x in items.items()})
    for name in "ab":
        torch.testing.assert_close(found["private"][name], expected.private[name].mean.detach())
        torch.testing.assert_close(found["shared"][name], expected.shared[name].mean.detach())
    torch.testing.assert_close(found["shared"]["joint"], expected.joint.mean.detach())


def test_posterior_means_of_what_is_missing_are_the_priors_and_the_joint_goes_without():
    dmvae, items = model(), {name: torch.rand(6, 4) for name in "ab"}
    there = torch.arange(6) > 2
    items["b"][~there] = float("nan")
    found = posterior_means(dmvae, PairedData.aligned(items, observed={"b": there}))
    assert (found["shared"]["b"][~there] == 0).all() and (found["shared"]["b"][there] != 0).all()
    torch.testing.assert_close(found["shared"]["joint"][~there], found["shared"]["a"][~there])


def test_distinct_codes_of_one_dimension_are_the_papers_steps():
    assert distinct_codes(model(), "a").tolist() == [[-1], [0], [1], [2], [3]]


def test_distinct_codes_are_the_extremes_and_each_far_from_the_others():
    """A decoder that shows one private number: the first two codes are the ends of what was drawn, the third between."""
    dmvae = model()
    with torch.no_grad():
        dmvae.decoders["b"].weight.zero_()
        dmvae.decoders["b"].bias.zero_()
        dmvae.decoders["b"].weight[:, 0] = 1.0
    drawn = dmvae.private_prior("b", 512, generator=torch.Generator().manual_seed(0))[:, 0]
    first, second, third = distinct_codes(dmvae, "b", n=3)[:, 0].tolist()
    assert sorted([first, second]) == [drawn.min().item(), drawn.max().item()]
    assert abs(torch.tensor(third).sigmoid() - (drawn.min().sigmoid() + drawn.max().sigmoid()) / 2) < 0.02
