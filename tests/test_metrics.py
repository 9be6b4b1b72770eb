"""Coherence, Rank-1, AP@k and the matching loss (Eq. 4) on cases solved by hand."""

import math

import pytest
import torch

from dmvae_lib import DMVAEError
from dmvae_lib.analysis import mixing, neighbour_agreement
from dmvae_lib.metrics import average_precision_at_k, chance, cross_coherence, joint_coherence, rank1
from dmvae_lib.models import matching_loss

X, Y = [1.0, 0.0], [0.0, 1.0]


def tensors(*values):
    return [torch.tensor(value) for value in values]


# --- coherence ------------------------------------------------------------------------------------------------------


def test_chance_by_frequencies_and_by_the_commonest_class():
    (labels,) = tensors([3, 3, 1, 0])
    assert chance(labels) == (0.375, 0.5)


def test_neighbours_of_modalities_that_lie_in_one_another_and_apart():
    a, near, far = tensors([[0.0], [10.0], [20.0]], [[0.1], [10.1], [20.1]], [[100.0], [101.0], [102.0]])
    assert mixing({"a": a, "b": near}) == 1 and mixing({"a": a, "b": far}) == 0
    a, b, labels = tensors([[0.0], [10.0], [1.0]], [[0.0], [10.0], [1.2]], [0, 1, 0])
    assert neighbour_agreement({"a": a, "b": b}, labels) == pytest.approx(4 / 6)  # the paired item is passed over


def test_cross_coherence_is_the_share_of_agreement_with_the_labels():
    predicted, labels = tensors([3, 1, 4, 1], [3, 1, 4, 5])
    assert cross_coherence(predicted, labels) == 0.75
    assert cross_coherence(torch.stack([predicted, labels]), labels) == 0.875  # several syntheses of each item


def test_joint_coherence_needs_all_classifiers_to_agree():
    one, two, three = tensors([0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 0, 0])
    assert joint_coherence(one, two) == 0.75
    assert joint_coherence(one, two, three) == 0.5  # the last item: two and three agree, one does not
    assert joint_coherence(three, two, one) == 0.5


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


def test_order_of_items_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (60, 90))
    image_labels, text_labels = (torch.randint(5, (n,), generator=generator) for n in (60, 90))
    found = rank1(image, image_labels, text, text_labels)
    precision = average_precision_at_k(text, text_labels, image, image_labels, 10)
    i, t = (torch.randperm(n, generator=generator) for n in (60, 90))
    assert rank1(image[i], image_labels[i], text[t], text_labels[t]) == found
    assert average_precision_at_k(text[t], text_labels[t], image[i], image_labels[i], 10) == pytest.approx(precision)
    assert 0 < found < 1 and 0 < precision < 1


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
        (lambda: matching_loss(torch.ones(2, 3), torch.ones(2, 4), torch.zeros(2)), r"\(2, 4\)"),
        (lambda: matching_loss(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(3)), r"\(3,\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(DMVAEError, match=message):
        call()


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
