"""Coherence, Rank-1, AP@k, the Fréchet distance and the matching loss (Eq. 4) on cases solved by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dmvae_lib import DMVAEError
from dmvae_lib.metrics import (
    average_precision_at_k,
    chance,
    coherence,
    cross_coherence,
    frechet_distance,
    joint_coherence,
    rank1,
)
from dmvae_lib.models import matching_loss
from dmvae_lib.pairing import PairedData

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = st.integers(0, 2**31)
X, Y = [1.0, 0.0], [0.0, 1.0]


def tensors(*values):
    return [torch.tensor(value) for value in values]


# --- coherence ------------------------------------------------------------------------------------------------------


def test_chance_by_frequencies_and_by_the_commonest_class():
    (labels,) = tensors([3, 3, 1, 0])
    assert chance(labels) == (0.375, 0.5)


def test_cross_coherence_is_the_share_of_agreement_with_the_labels():
    predicted, labels = tensors([3, 1, 4, 1], [3, 1, 4, 5])
    assert cross_coherence(predicted, labels) == 0.75
    assert cross_coherence(torch.stack([predicted, labels]), labels) == 0.875  # several syntheses of each item


def test_joint_coherence_needs_all_classifiers_to_agree():
    one, two, three = tensors([0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 0, 0])
    assert joint_coherence(one, two) == 0.75
    assert joint_coherence(one, two, three) == 0.5  # the last item: two and three agree, one does not
    assert joint_coherence(three, two, one) == 0.5


@given(st.integers(1, 40), st.integers(1, 6), st.integers(2, 4), SEEDS)
def test_coherence_is_a_share_and_takes_samples_in_any_order(n, classes, modalities, seed):
    generator = torch.Generator().manual_seed(seed)
    predicted = [torch.randint(classes, (n,), generator=generator) for _ in range(modalities)]
    order = torch.randperm(n, generator=generator)
    for share in (joint_coherence, lambda *values: cross_coherence(values[0], values[1])):
        found = share(*predicted)
        assert 0 <= found <= 1 and share(*(values[order] for values in predicted)) == found
        assert share(predicted[0], predicted[0]) == 1


class Echo(nn.Module):
    """A stand-in of N modalities: what it generates is the source's class, `shift` more in the target: coherence is known."""

    def __init__(self, shift):
        super().__init__()
        self.shift, self.names = shift, tuple(shift)
        self.weight = nn.Parameter(torch.zeros(1))

    def cross_generate(self, batch, target, n=1, generator=None):
        ((_, x),) = batch.items()
        return (x + self.shift[target])[None]

    def sample(self, n, generator=None):
        code = torch.randint(10, (n, 1), generator=generator).float()
        return {name: code + shift for name, shift in self.shift.items()}


class Judge(nn.Module):
    def forward(self, x):
        return nn.functional.one_hot(x[:, 0].round().long() % 10, 10).float()


def judged(shift, observed=None, labels=None):
    labels = torch.arange(10).repeat(250) if labels is None else labels
    items = {name: labels[:, None].float() for name in shift}
    data = PairedData.aligned(items, labels, observed)
    return coherence(Echo(shift), data, dict.fromkeys(shift, Judge()), samples=1_500)


@pytest.mark.parametrize(("shift", "share"), [(0, 1.0), (1, 0.0)])
def test_coherence_counts_the_classes_that_survive(shift, share):
    assert judged({"a": 0, "b": shift}) == {"a->b": share, "b->a": 1.0, "joint": share}


def test_coherence_is_of_every_ordered_pair_of_modalities():
    shares = judged({"a": 0, "b": 0, "c": 3})
    assert shares.pop("joint") == 0  # c disagrees with the two others, which agree
    assert shares == {"a->b": 1, "b->a": 1, "a->c": 0, "b->c": 0, "c->a": 1, "c->b": 1}


def test_coherence_leaves_out_a_source_that_is_missing():
    """A missing source is handed out as zeros: it would look like class 0, right for a tenth of the observations."""
    labels = torch.arange(10).repeat(250)
    shares = judged({"a": 0, "b": 0}, {"a": torch.arange(2_500) < 1_100}, labels)
    assert shares["a->b"] == 1 and shares["b->a"] == 1


def test_coherence_without_labels_or_a_classifier_says_so():
    data = PairedData.aligned({"a": torch.zeros(3, 1), "b": torch.zeros(3, 1)})
    with pytest.raises(DMVAEError, match="no labels"):
        coherence(Echo({"a": 0, "b": 0}), data, {"a": Judge(), "b": Judge()})
    with pytest.raises(DMVAEError, match="no classifiers of b"):
        coherence(Echo({"a": 0, "b": 0}), data, {"a": Judge()})


# --- Rank-1 ---------------------------------------------------------------------------------------------------------


def test_rank1_compares_by_cosine_not_by_dot_product():
    """The second class's text is longer: its dot product with the first image is larger, its cosine smaller."""
    image, text = tensors([[2.0, 0.5], [0.0, 3.0]], [X, [5.0, 5.0]])
    labels = torch.tensor([4, 9])
    assert image[0] @ text[1] > image[0] @ text[0]
    assert rank1(image, labels, text, labels) == 1.0


def test_rank1_averages_the_text_of_each_class():
    """The image is closest to one caption of class 1, but to the mean of class 0's."""
    image, image_labels = tensors([[1.0, 0.2]], [0])
    text, text_labels = tensors([[1.0, 0.1], [1.0, 0.5], [1.0, 0.2], Y, Y], [0, 0, 1, 1, 1])
    assert rank1(image, image_labels, text, text_labels) == 1.0
    assert rank1(image, torch.tensor([1]), text, text_labels) == 0.0


def test_rank1_averages_features_before_their_lengths_are_removed():
    """Class 0: (4, 0) and (0, 1) average to a direction near x; of unit vectors the mean would lie at 45 degrees."""
    text, text_labels = tensors([[4.0, 0.0], Y, [1.0, 0.8]], [0, 0, 1])
    image, image_labels = tensors([[1.0, 0.3]], [0])
    assert rank1(image, image_labels, text, text_labels) == 1.0


def test_rank1_weighs_images_not_classes():
    image, image_labels = tensors([X, X, X, Y], [7, 7, 7, 3])  # class 3's only image lies with class 7
    text, text_labels = tensors([X, [-1.0, 0.0]], [7, 3])
    image[3] = torch.tensor([1.0, 0.1])
    assert rank1(image, image_labels, text, text_labels) == 0.75


def test_a_tie_goes_to_the_smaller_class_id():
    image, text = tensors([[1.0, 1.0]], [Y, X])
    for label, expected in ((2, 1.0), (5, 0.0)):
        assert rank1(image, torch.tensor([label]), text, torch.tensor([5, 2])) == expected
        assert rank1(image, torch.tensor([label]), text, torch.tensor([2, 5])) == expected


# --- AP@k -----------------------------------------------------------------------------------------------------------


def on_the_circle(*degrees):
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], -1)


def test_average_precision_is_precision_among_the_k_nearest_by_class():
    image, image_labels = on_the_circle(0, 10, 20, 70, 80, 90), torch.tensor([0, 0, 1, 1, 1, 0])
    text, text_labels = on_the_circle(0, 90), torch.tensor([0, 1])
    expected = {1: (1, 0), 2: (2 / 2, 1 / 2), 3: (2 / 3, 2 / 3), 6: (3 / 6, 3 / 6)}  # of class 0 and of class 1
    for k, shares in expected.items():
        assert average_precision_at_k(text, text_labels, image, image_labels, k) == pytest.approx(sum(shares) / 2)


def test_lengths_of_images_do_not_count():
    image, image_labels = on_the_circle(0, 30), torch.tensor([0, 1])
    image[1] *= 100
    assert average_precision_at_k(on_the_circle(0), torch.tensor([0]), image, image_labels, 1) == 1.0


def test_a_class_of_fewer_than_k_images_cannot_reach_one():
    """Classes of 30 and 90 images, perfectly separated: (30/50 + 50/50) / 2, each class counted once."""
    image = torch.cat([on_the_circle(*[0] * 30), on_the_circle(*[90] * 90)])
    image_labels = torch.tensor([0] * 30 + [1] * 90)
    text, text_labels = on_the_circle(1, -1, 91, 89, 90), torch.tensor([0, 0, 1, 1, 1])
    assert average_precision_at_k(text, text_labels, image, image_labels) == pytest.approx(0.8)
    assert rank1(image, image_labels, text, text_labels) == 1.0


def test_a_tie_between_images_goes_to_the_first():
    image = on_the_circle(*[45] * 40)
    labels = torch.arange(40).lt(3).long()  # the first three are of class 1
    assert average_precision_at_k(on_the_circle(0), torch.tensor([1]), image, labels, 3) == 1.0
    assert average_precision_at_k(on_the_circle(0), torch.tensor([1]), image, labels.flip(0), 3) == 0.0


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 5), st.integers(1, 8), SEEDS)
def test_retrieval_measures_are_shares_and_take_samples_in_any_order(images, texts, classes, width, seed):
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (images, texts))
    image_labels, text_labels = (torch.randint(classes, (n,), generator=generator) for n in (images, texts))
    i, t = (torch.randperm(n, generator=generator) for n in (images, texts))
    k = int(torch.randint(1, images + 1, (), generator=generator))
    one = rank1(image, image_labels, text, text_labels)
    precision = average_precision_at_k(text, text_labels, image, image_labels, k)
    assert 0 <= one <= 1 and 0 <= precision <= 1
    if width > 1:  # in one dimension every cosine is 1 or -1, and a tie goes to the first
        assert rank1(image[i], image_labels[i], text[t], text_labels[t]) == pytest.approx(one)
        found = average_precision_at_k(text[t], text_labels[t], image[i], image_labels[i], k)
        assert found == pytest.approx(precision)


ONE = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: cross_coherence(torch.zeros(3), torch.zeros(2)), "one length.*3.*2"),
        (lambda: cross_coherence(torch.zeros(0), torch.zeros(0)), "at least 1"),
        (lambda: joint_coherence(torch.zeros(3)), "at least two modalities; found 1"),
        (lambda: joint_coherence(torch.zeros(3), torch.zeros(2)), r"predicted\[0\]': 3, 'predicted\[1\]': 2"),
        (lambda: rank1(torch.ones(2, 3), ONE, torch.ones(1, 3), ONE), "2.*1"),
        (lambda: rank1(torch.ones(1, 3), ONE, torch.ones(2, 3), ONE), "'text': 2, 'text_labels': 1"),
        (lambda: rank1(torch.ones(1, 3), ONE, torch.ones(0, 3), ONE[:0]), "at least 1"),
        (lambda: rank1(torch.ones(1, 3), ONE, torch.ones(1, 4), ONE), r"image .*\(1, 3\).*text .*\(1, 4\)"),
        (lambda: rank1(torch.ones(1, 3), ONE, torch.nan * torch.ones(1, 3), ONE), "text features .* not finite"),
        (lambda: average_precision_at_k(torch.ones(1, 3), ONE, torch.ones(1, 3), ONE), "k=50.*found 1"),
        (lambda: average_precision_at_k(torch.ones(1, 3), ONE, torch.ones(1, 3), ONE, 0), "k=0"),
        (lambda: frechet_distance(torch.ones(2, 3), torch.ones(2, 4)), r"\(2, 3\) and \(2, 4\)"),
        (lambda: frechet_distance(torch.ones(1, 3), torch.ones(2, 3)), "two or more of each"),
        (lambda: frechet_distance(torch.nan * torch.ones(2, 3), torch.ones(2, 3)), "not finite"),
        (lambda: matching_loss(torch.ones(2, 3), torch.ones(2, 4), torch.zeros(2)), r"\(2, 4\)"),
        (lambda: matching_loss(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(3)), r"\(3,\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(DMVAEError, match=message):
        call()


# --- Fréchet distance -----------------------------------------------------------------------------------------------


def with_moments(mean, covariance, n=200, seed=0):
    """(n, d) features whose sample mean and covariance are exactly these."""
    mean, covariance = (torch.as_tensor(value, dtype=torch.float64) for value in (mean, covariance))
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (n - 1)), x.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def random_covariance(d, seed):
    x = torch.randn(d, 2 * d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.T / d


def test_frechet_distance_of_gaussians_whose_covariances_commute():
    """|mu_a - mu_b|^2 + the sum of (sigma_a - sigma_b)^2, here 9 + 16 + (1 - 3)^2 + (2 - 5)^2."""
    a = with_moments([0.0, 1.0], [[1.0, 0.0], [0.0, 4.0]])
    b = with_moments([3.0, -3.0], [[9.0, 0.0], [0.0, 25.0]], n=300, seed=1)
    assert frechet_distance(a, b) == pytest.approx(25 + 4 + 9, rel=1e-12)


def test_frechet_distance_of_gaussians_whose_covariances_do_not_commute():
    """In two dimensions tr (C_a C_b)^(1/2) = sqrt(tr(C_a C_b) + 2 sqrt(det(C_a C_b)))."""
    one = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    two = torch.tensor([[1.0, -0.6], [-0.6, 3.0]], dtype=torch.float64)
    root = ((one @ two).trace() + 2 * torch.det(one @ two).sqrt()).sqrt()
    expected = (one.trace() + two.trace() - 2 * root).item()
    assert (one @ two - two @ one).abs().max() > 0.5
    assert frechet_distance(with_moments([1.0, 2.0], one), with_moments([1.0, 2.0], two, seed=1)) == pytest.approx(
        expected
    )


def test_frechet_distance_of_equal_sets_is_zero_also_with_fewer_items_than_features():
    for n in (5, 500):
        x = 1e3 * torch.randn(n, 40, generator=torch.Generator().manual_seed(n))
        assert frechet_distance(x, x.flip(0)) < 1e-9 * x.double().var(0).sum()


def test_frechet_distance_is_symmetric_and_a_common_rotation_and_shift_do_not_change_it():
    a, b = (with_moments(torch.full((6,), float(seed)), random_covariance(6, seed), seed=seed) for seed in (1, 2))
    rotation = torch.linalg.qr(random_covariance(6, 3)).Q
    found = frechet_distance(a, b)
    assert found > 6 and frechet_distance(b, a) == pytest.approx(found, rel=1e-10)
    assert frechet_distance(a @ rotation + 7, b @ rotation + 7) == pytest.approx(found, rel=1e-10)


def test_frechet_distance_of_one_feature_in_single_precision():
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [16.0]])  # variances 2 and 18
    assert frechet_distance(a, b) == pytest.approx(12**2 + (18**0.5 - 2**0.5) ** 2, rel=1e-12)


# --- Eq. 4 ----------------------------------------------------------------------------------------------------------


def loop(query, reference, labels, eps):
    """L_M written from the formula: sums and quotients of Python numbers."""
    total, batch = 0.0, len(query)
    for m in range(batch):
        scores = []
        for n in range(batch):
            norm = math.sqrt(sum(value**2 for value in reference[n]))
            scores.append(sum(a * b / norm for a, b in zip(query[m], reference[n])))
        for n in range(batch):
            p = math.exp(scores[n]) / sum(math.exp(score) for score in scores)
            q = (labels[m] == labels[n]) / sum(labels[m] == other for other in labels)
            total += p * math.log(p / (q + eps))
    return total / batch


def pairs(labels, dim=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(len(labels), dim, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(labels)


LABELS = [[0, 1, 0, 2, 1], [4, 4, 4, 4], [0, 1, 2, 3], [6]]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_matching_loss_equals_the_formula(labels, eps):
    image, text, classes = pairs(labels)
    found = matching_loss(image, text, classes, eps)
    expected = loop(image.tolist(), text.tolist(), labels, eps), loop(text.tolist(), image.tolist(), labels, eps)
    assert [value.item() for value in found] == pytest.approx(expected, rel=1e-10, abs=1e-12)
    if len(labels) > 1:
        assert abs(expected[0] - expected[1]) > 1e-3  # so that a mix-up of the directions would show


@pytest.mark.parametrize("labels", LABELS)
def test_matching_loss_is_the_kullback_leibler_divergence_of_p_from_q(labels):
    """With q + eps in place of q, and normalised: the two differ by log(1 + B eps)."""
    eps = 1e-3
    image, text, classes = pairs(labels)
    same = (classes[:, None] == classes).double()
    q = torch.distributions.Categorical(probs=same / same.sum(1, keepdim=True) + eps)
    for found, (one, other) in zip(matching_loss(image, text, classes, eps), ((image, text), (text, image))):
        p = torch.distributions.Categorical(logits=one @ (other / other.norm(dim=-1, keepdim=True)).T)
        divergence = torch.distributions.kl_divergence(p, q).mean() - math.log1p(len(labels) * eps)
        assert found.item() == pytest.approx(divergence.item(), abs=1e-12)


def test_matching_loss_is_zero_where_p_equals_q():
    """One class only, and equal projections on all texts: p = q = 1/B; log(q / (q + eps)) is what is left."""
    image, text = torch.zeros(4, 3), torch.ones(4, 3)
    for value in matching_loss(image, text, torch.zeros(4)):
        assert value.item() == pytest.approx(-4e-8, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_gradient_of_the_matching_loss_is_finite(scale):
    """Also where p is a single one and q nearly nought."""
    image, text, classes = pairs([0, 1, 0, 2, 1])
    gradients = torch.autograd.grad(sum(matching_loss(image * scale, text * scale, classes)), (image, text))
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in gradients)


def test_gradient_of_the_matching_loss_equals_finite_differences():
    image, text, classes = pairs([0, 1, 0, 2])
    assert torch.autograd.gradcheck(lambda i, t: matching_loss(i, t, classes), (image, text))
