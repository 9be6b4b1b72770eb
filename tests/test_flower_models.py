"""Modalities known by their features, and every row of Table 2: losses against loops, gradients, learning, evaluation."""

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sklearn.mixture import GaussianMixture
from torch import nn

from dmvae_lib import DMVAE, JMVAE, MMVAE, MVAE, TELBO, DMVAEError, Modality, PairedData, Schedule, matching_loss, train
from dmvae_lib.metrics import average_precision_at_k, rank1
from dmvae_lib.paper import published
from dmvae_lib.paper.data import Splits
from dmvae_lib.paper.networks import GROUPS, JointEncoder, TextFeatures, trim
from dmvae_lib.paper.profiles import get_profile
from dmvae_lib.paper.retrieval import class_bootstrap, embed, evaluate_retrieval, pair_scores, rerank
from dmvae_lib.paper.rows import word2vec, word_cnn, word_cnn_rnn
from dmvae_lib.paper.rows.cmpm_cmpc import CMPMCMPC, project
from dmvae_lib.paper.rows.flower_dmvae import CROSS_TERMS, FlowerDMVAE
from dmvae_lib.paper.rows.flowers import FLOWER_DMVAE, FLOWERS, PARTS, TABLE2, objective, retrieval_of
from dmvae_lib.paper.rows.gmm_hglmm import GMMHGLMM, HybridMixture, principal_axes
from dmvae_lib.paper.rows.iatv import IATV, pair_loss, remember
from dmvae_lib.paper.rows.joint_embedding import ranking
from dmvae_lib.paper.rows.timam import TIMAM, reverse_gradient
from dmvae_lib.paper.rows.triplet import Triplet

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGE_DIM, TOKEN_DIM, STEPS = 12, 8, 9
CLASSES = (41, 43, 50, 77)
WEIGHTS = {"image": 0.5, "text": 1.5}
SMALL = {
    "Word2Vec": lambda: built(word2vec),
    "WordCNN": lambda: built(word_cnn),
    "WordCNNRNN": lambda: built(word_cnn_rnn),
    "Triplet": lambda: Triplet(IMAGE_DIM, TOKEN_DIM, dim=10, margin=0.2),
    "IATV": lambda: IATV(IMAGE_DIM, TOKEN_DIM, CLASSES, dim=10, temperature=0.1),
    "CMPMCMPC": lambda: CMPMCMPC(IMAGE_DIM, TOKEN_DIM, CLASSES, dim=10, classification=1.5),
    "TIMAM": lambda: TIMAM(IMAGE_DIM, TOKEN_DIM, CLASSES, dim=10, adversarial=0.1),
    "FlowerDMVAE": lambda: FlowerDMVAE(IMAGE_DIM, TOKEN_DIM, 6, WEIGHTS, private_dims={"image": 2, "text": 1}),
}


def captions(n, generator, dim=TOKEN_DIM, shortest=2):
    """(n, STEPS, dim) token embeddings of various lengths, zero after the last token, and the lengths."""
    lengths = torch.randint(shortest, STEPS + 1, (n,), generator=generator)
    tokens = torch.randn(n, STEPS, dim, generator=generator)
    return tokens * (torch.arange(STEPS) < lengths[:, None])[..., None], lengths


def flowers(images_per_class=15, noise=0.5, seed=0):
    """Each class has a direction that its image features and its captions' words share, in noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(len(CLASSES), TOKEN_DIM, generator=torch.Generator().manual_seed(3))
    directions = directions / directions.norm(dim=-1, keepdim=True) * 3
    kind = torch.arange(len(CLASSES)).repeat_interleave(images_per_class)
    image = noise * torch.randn(len(kind), IMAGE_DIM, generator=generator)
    image[:, :TOKEN_DIM] += directions[kind]
    text, _ = captions(2 * len(kind), generator)
    text = torch.where(text != 0, noise * text + directions[kind.repeat_interleave(2)][:, None], 0)
    labels, pairs = torch.tensor(CLASSES)[kind], torch.arange(2 * len(kind))
    return PairedData(
        items={"image": image, "text": text},
        index={"image": pairs // 2, "text": pairs},
        item_labels={"image": labels, "text": labels.repeat_interleave(2)},
    )


def small_batch(n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text, _ = captions(n, generator)
    labels = torch.tensor(CLASSES)[torch.tensor([0, 1, 0, 2, 3, 1])[:n]]
    return {"image": torch.randn(n, IMAGE_DIM, generator=generator), "text": text}, labels


def built(row):
    return row.build(None, SimpleNamespace(train=flowers(1)), retrieval_hidden=10, margin=1.0)


def made(name):
    torch.manual_seed(0)
    return SMALL[name]()


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def unit(a):
    return [x / math.sqrt(dot(a, a)) for x in a]


# --- a modality known by its features -------------------------------------------------------------------------------


class Counted(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x).tanh()


def featured(model=DMVAE, private=1, **options):
    """ "plain" is read as it is, "rich" through features of 3 dimensions."""
    torch.manual_seed(0)

    def modality(dim, features=None):
        return Modality(
            nn.Linear(dim, 2 * private + 4), nn.Linear(private + 2, dim), private, 2.0, "gaussian", features
        )

    return model({"plain": modality(4), "rich": modality(3, Counted(5, 3))}, 2, **options).double()


RAW = {
    name: torch.randn(6, d, generator=torch.Generator().manual_seed(d)).double()
    for name, d in (("plain", 4), ("rich", 5))
}


def test_features_stand_for_the_modality_in_encoder_and_reconstruction():
    """The same loss as that of a model without features on features(x)."""
    model, bare = featured(), featured()
    bare.features = nn.ModuleDict()
    values = {"plain": RAW["plain"], "rich": model.features["rich"](RAW["rich"])}
    losses = []
    for one, batch in ((model, RAW), (bare, values)):
        torch.manual_seed(1)
        losses.append(one.loss(batch).flat())
    assert losses[0].keys() == losses[1].keys()
    for name, value in losses[0].items():
        assert value.item() == pytest.approx(losses[1][name].item()), name
    assert model.cross_generate({"plain": RAW["plain"]}, "rich", n=2).shape == (2, 6, 3)


def gradient_with_target(hold):
    """Of Eq. 3 by the features' weights, the target being the features' values, held constant or not."""
    model = featured()
    layer = model.features["rich"]
    values = layer(RAW["rich"])
    model.features = nn.ModuleDict()
    posterior = model.infer({"plain": RAW["plain"], "rich": values})
    targets = {"plain": RAW["plain"], "rich": values.detach() if hold else values}
    torch.manual_seed(1)
    return torch.autograd.grad(model.bounds(posterior._replace(targets=targets)).total, layer.weight)[0]


def test_features_are_computed_once_and_their_target_is_a_constant():
    model = featured()
    layer = model.features["rich"]
    torch.manual_seed(1)
    found = torch.autograd.grad(model.loss(RAW).total, layer.weight)[0]
    assert layer.calls == 1
    torch.testing.assert_close(found, gradient_with_target(hold=True))
    assert (gradient_with_target(hold=False) - found).abs().max() > 1e-3


@pytest.mark.parametrize(
    "model, options",
    [
        (MVAE, {}),
        (MMVAE, {"particles": 2}),
        (JMVAE, {"joint_encoder": ("plain", "rich")}),
        (TELBO, {"joint_encoder": ("plain", "rich")}),
    ],
)
def test_every_model_takes_a_modality_with_features(model, options):
    if "joint_encoder" in options:
        torch.manual_seed(0)
        options = {"joint_encoder": JointEncoder({"plain": nn.Linear(4, 3), "rich": nn.Linear(5, 3)}, 6, 2)}
    instance = featured(model, private=0, **options)
    terms = instance.loss(RAW)
    terms.total.backward()
    assert terms.total.isfinite() and instance.features["rich"].weight.grad.abs().sum() > 0


def test_features_that_reject_their_input_are_named():
    with pytest.raises(DMVAEError, match=r"features of 'rich' reject .*\(6, 4\)"):
        featured().infer({"rich": RAW["plain"]})
    with pytest.raises(DMVAEError, match="'rich' holds values that are not finite"):
        featured().infer({"rich": RAW["rich"] * torch.nan})


# --- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_padding_and_the_rest_of_the_batch_change_no_embedding(name):
    model = made(name).eval()
    tokens, lengths = captions(5, torch.Generator().manual_seed(1))
    together = model.embed_text(F.pad(tokens, (0, 0, 0, 4)))
    alone = torch.cat([model.embed_text(caption[None, :length]) for caption, length in zip(tokens, lengths)])
    torch.testing.assert_close(together, alone)
    assert model.embed_image(torch.randn(5, IMAGE_DIM)).shape == together.shape == (5, together.shape[1])


def test_captions_of_like_length_together_are_each_as_alone():
    """Enough of them for all groups; one of the longest is last and first among the sorted."""
    torch.manual_seed(0)
    features = TextFeatures(TOKEN_DIM, 6)
    tokens, lengths = captions(3 * GROUPS + 1, torch.Generator().manual_seed(1))
    assert lengths.unique().numel() > 3
    alone = torch.cat([features(caption[None, :length]) for caption, length in zip(tokens, lengths)])
    torch.testing.assert_close(features(tokens), alone)
    torch.testing.assert_close(features(tokens), features.maximum(*trim(tokens)))


def test_sizes_of_the_papers_networks():
    model = FlowerDMVAE(2048, 768, 512, WEIGHTS)
    assert sum(p.numel() for p in model.encoders["image"].parameters()) == 2049 * 2 * (64 + 3)
    assert sum(p.numel() for p in model.encoders["text"].parameters()) == 1025 * 2 * (64 + 3)
    batch = {"image": torch.rand(2, 2048), "text": captions(2, torch.Generator().manual_seed(0), 768)[0]}
    with torch.no_grad():
        assert model.reconstruct(batch, "text").shape == (2, 1024) and model.reconstruct(batch, "image").shape == (
            2,
            2048,
        )
        assert model.infer(batch).private["text"].mean.shape == (2, 3)
        assert torch.equal(model.embed_text(batch["text"]), model.infer({"text": batch["text"]}).joint.mean)


# --- each loss against the formula ----------------------------------------------------------------------------------


def hinges(score, labels, margin):
    """Means over pairs of classes k != n of both directions' hinges; score(m, n) of image m and text n."""
    one, other = [], []
    for n, label in enumerate(labels):
        for k, different in enumerate(labels):
            if label != different:
                one.append(max(0.0, margin + score(n, k) - score(n, n)))
                other.append(max(0.0, margin + score(k, n) - score(n, n)))
    return sum(one) / len(one), sum(other) / len(other)


@pytest.mark.parametrize("name", ["Word2Vec", "WordCNN", "WordCNNRNN"])
def test_structured_joint_embedding_is_a_hinge_on_dot_products_with_texts_and_images_of_other_classes(name):
    model, (batch, labels) = made(name), small_batch()
    image, text = model.embed_image(batch["image"]).tolist(), model.embed_text(batch["text"]).tolist()
    expected = hinges(lambda m, n: dot(image[m], text[n]), labels.tolist(), 1.0)
    terms = model.loss(batch, labels)
    assert (terms.others["image"].item(), terms.others["text"].item()) == pytest.approx(expected, rel=1e-5)
    assert terms.total.item() == pytest.approx(sum(expected), rel=1e-5) and abs(expected[0] - expected[1]) > 1e-3


def test_triplet_is_a_hinge_on_cosines():
    model, (batch, labels) = made("Triplet"), small_batch()
    image = [unit(row) for row in model.embed_image(batch["image"]).tolist()]
    text = [unit(row) for row in model.embed_text(batch["text"]).tolist()]
    expected = hinges(lambda m, n: dot(image[m], text[n]), labels.tolist(), 0.2)
    terms = model.loss(batch, labels)
    assert (terms.others["image"].item(), terms.others["text"].item()) == pytest.approx(expected, rel=1e-4)
    assert abs(expected[0] - expected[1]) > 1e-4


def test_mean_word_of_word2vec():
    model, (batch, _) = made("Word2Vec"), small_batch()
    tokens = batch["text"]
    means = torch.stack([caption[caption.abs().sum(1) > 0].mean(0) for caption in tokens])
    torch.testing.assert_close(model.embed_text(tokens), model.text[1](means))


def softmax_loss(features, weights, labels):
    """Mean of -log of the label's share of exp(feature . unit weight)."""
    total = 0.0
    for feature, label in zip(features, labels):
        scores = [dot(feature, unit(weight)) for weight in weights]
        total -= scores[label] - math.log(sum(math.exp(score) for score in scores))
    return total / len(features)


def test_cmpm_cmpc_is_equation_4_and_classification_of_projections():
    model, (batch, labels) = made("CMPMCMPC"), small_batch()
    image, text = model.embed_image(batch["image"]), model.embed_text(batch["text"])
    index, weights = [CLASSES.index(label) for label in labels.tolist()], model.classifier.weight.tolist()

    def projections(x, y):
        return [[dot(a, unit(b)) * value for value in unit(b)] for a, b in zip(x.tolist(), y.tolist())]

    assert torch.allclose(project(image, text), torch.tensor(projections(image, text)), atol=1e-6)
    matching = matching_loss(image, text, labels)
    expected = {
        "matching(image)": matching[0].item(),
        "matching(text)": matching[1].item(),
        "classification(image)": 1.5 * softmax_loss(projections(image, text), weights, index),
        "classification(text)": 1.5 * softmax_loss(projections(text, image), weights, index),
    }
    terms = model.loss(batch, labels)
    assert {name: value.item() for name, value in terms.others.items()} == pytest.approx(expected, rel=1e-4)
    assert terms.total.item() == pytest.approx(sum(expected.values()), rel=1e-4)


def test_cmpm_cmpc_normalises_each_dimension_over_the_batch():
    model, (batch, _) = made("CMPMCMPC").double(), small_batch()
    raw = model.image[0](batch["image"].double())
    found = model.embed_image(batch["image"].double())
    torch.testing.assert_close(found, (raw - raw.mean(0)) / (raw.var(0, unbiased=False) + 1e-5).sqrt())
    text = model.embed_text(batch["text"].double())
    torch.testing.assert_close(text.mean(0), torch.zeros(10).double(), atol=1e-9, rtol=0)


def test_timam_is_identification_equation_4_and_a_discriminator():
    model, (batch, labels) = made("TIMAM"), small_batch()
    image, text = model.embed_image(batch["image"]), model.embed_text(batch["text"])
    index, weights = [CLASSES.index(label) for label in labels.tolist()], model.classifier.weight.tolist()
    is_image = [model.discriminator(x).sigmoid().flatten().tolist() for x in (image, text)]
    surprise = [-math.log(p) for p in is_image[0]] + [-math.log(1 - p) for p in is_image[1]]
    matching = matching_loss(image, text, labels)
    expected = {
        "identity(image)": softmax_loss(image.tolist(), weights, index),
        "identity(text)": softmax_loss(text.tolist(), weights, index),
        "matching(image)": matching[0].item(),
        "matching(text)": matching[1].item(),
        "discriminator": model.adversarial * sum(surprise) / len(surprise),
    }
    terms = model.loss(batch, labels)
    assert {name: value.item() for name, value in terms.others.items()} == pytest.approx(expected, rel=1e-4)
    assert terms.total.item() == pytest.approx(sum(expected.values()), rel=1e-4)


def test_timams_embeddings_climb_what_the_discriminator_descends():
    """The discriminator's own gradient is that of its cross-entropy; the embeddings get the opposite one."""
    model, (batch, labels) = made("TIMAM"), small_batch()
    image, text = model.embed(batch, labels)
    logits = model.discriminator(torch.cat([image, text]))[:, 0]
    plain = model.adversarial * F.binary_cross_entropy_with_logits(logits, torch.arange(12).lt(6).float())
    reversed_ = model.loss(batch, labels).others["discriminator"]
    assert reversed_.item() == pytest.approx(plain.item())
    for module, sign in ((model.discriminator, 1), (model.image, -1), (model.text, -1)):
        parameters = list(module.parameters())
        found = torch.autograd.grad(reversed_, parameters, retain_graph=True)
        for one, other in zip(found, torch.autograd.grad(plain, parameters, retain_graph=True)):
            torch.testing.assert_close(one, sign * other, atol=1e-7, rtol=1e-4)
            assert one.abs().sum() > 0
    x = torch.randn(5, requires_grad=True)
    assert torch.equal(reverse_gradient(x), x) and torch.equal(
        torch.autograd.grad(reverse_gradient(x).sum(), x)[0], -torch.ones(5)
    )


def test_iatvs_cross_entropy_compares_with_the_other_modalitys_memory():
    model, (batch, labels) = made("IATV"), small_batch()
    torch.manual_seed(5)
    for memory in (model.image_memory, model.text_memory):
        memory.copy_(F.normalize(torch.randn_like(memory), dim=-1))
    image, text = model.embed_image(batch["image"]).tolist(), model.embed_text(batch["text"]).tolist()
    index = [CLASSES.index(label) for label in labels.tolist()]

    def scaled(rows):
        return [[value / model.temperature for value in unit(row)] for row in rows]

    expected = [softmax_loss(scaled(image), model.text_memory.tolist(), index)]
    expected += [softmax_loss(scaled(text), model.image_memory.tolist(), index)]
    terms = model.loss(batch, labels)
    assert [terms.others[f"identity({name})"].item() for name in ("image", "text")] == pytest.approx(expected, rel=1e-4)
    assert terms.total.item() == pytest.approx(sum(value.item() for value in terms.others.values()))


def test_iatvs_memory_takes_the_mean_of_each_class_in_the_batch_and_keeps_the_others():
    memory = torch.eye(3)
    remember(memory, torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.6, 0.0, 0.8]]), torch.tensor([2, 2, 0]))
    half = 0.5**0.5
    torch.testing.assert_close(memory, torch.tensor([[0.6, 0.0, 0.8], [0.0, 1.0, 0.0], [0.0, half, half]]))
    model, (batch, labels) = made("IATV"), small_batch()
    model.eval().loss(batch, labels)
    assert model.image_memory.abs().sum() == 0  # evaluation leaves the memories alone
    model.train().loss(batch, labels).total.backward()
    expected = F.normalize(F.normalize(model.embed_image(batch["image"]), dim=-1)[[0, 2]].mean(0), dim=-1)
    torch.testing.assert_close(model.image_memory[0], expected.detach())


def test_iatvs_second_stage_learns_from_pairs_and_the_hardest_of_other_classes():
    logits = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    cosine = torch.tensor([[0.9, 0.99, 0.1], [0.9, 0.1, 0.2], [0.3, 0.4, 0.5]])
    # images 0 and 1 are of one class: image 0's and 1's only rival is caption 2; image 2's hardest is caption 1
    negatives = [3.0, 6.0, 8.0]
    # captions 0 and 1: image 2; caption 2: image 1
    negatives += [7.0, 8.0, 6.0]
    expected = sum(math.log1p(math.exp(-x)) for x in (1.0, 5.0, 9.0)) / 3
    expected += sum(math.log1p(math.exp(x)) for x in negatives) / 6
    assert pair_loss(logits, cosine, torch.tensor([0, 0, 1])).item() == pytest.approx(expected)
    only = sum(math.log1p(math.exp(-x)) for x in (1.0, 5.0, 9.0)) / 3
    assert pair_loss(logits, cosine, torch.zeros(3)).item() == pytest.approx(only)


def test_iatvs_co_attention_on_one_pair_at_a_time():
    model, (batch, _) = made("IATV"), small_batch()
    stage = model.co_attention
    found = model.match(batch["image"][:2], batch["text"])
    assert found.shape == (2, 6)
    for i in range(2):
        for j, caption in enumerate(batch["text"]):
            image, words = stage.image(batch["image"][i]), stage.words(caption[caption.abs().sum(1) > 0])
            attention = (words @ image / math.sqrt(128)).softmax(0)
            embeddings = model.embed_image(batch["image"][i]), model.embed_text(caption[None])[0]
            expected = 10 * F.cosine_similarity(*embeddings, dim=0) + stage.head(image * (attention @ words))
            assert found[i, j].item() == pytest.approx(expected.item(), abs=1e-4)


def cosine_of(model, batch):
    image, text = model.embed_image(batch["image"]), model.embed_text(batch["text"])
    return F.cosine_similarity(image[:, None], text[None], dim=-1)


def test_iatvs_stages_share_no_gradient():
    model, (batch, labels) = made("IATV"), small_batch()
    gradients = torch.autograd.grad(
        model.loss(batch, labels).others["match"], list(model.parameters()), allow_unused=True
    )
    reached = {name.split(".")[0] for (name, _), g in zip(model.named_parameters(), gradients) if g is not None}
    assert reached == {"co_attention", "scale"}
    match = pair_loss(model.match(batch["image"], batch["text"]), cosine_of(model, batch), labels)
    assert model.loss(batch, labels).others["match"].item() == pytest.approx(match.item())


def test_batch_of_one_class_has_no_rivals():
    batch, _ = small_batch()
    labels = torch.full((6,), CLASSES[0])
    assert [value.item() for value in ranking(torch.randn(6, 6), labels, 1.0).values()] == [0, 0]
    for name in SMALL:
        model = made(name)
        total = model.loss(batch, labels).total
        total.backward()
        assert total.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()), name


# --- DMVAE and its switches -----------------------------------------------------------------------------------------


def terms_of(**options):
    torch.manual_seed(0)
    options = {"private_dims": {"image": 2, "text": 1}} | options
    model = FlowerDMVAE(IMAGE_DIM, TOKEN_DIM, 6, WEIGHTS, **options)
    batch, labels = small_batch()
    torch.manual_seed(1)
    return model.loss(batch, labels)


MATCHING = {"matching(image)", "matching(text)"}


@pytest.mark.parametrize(
    "options, gone",
    [
        ({"matching": 0.0}, lambda name: name in MATCHING),
        ({"evidence": False}, lambda name: name not in MATCHING | {"total"}),
        ({"without": CROSS_TERMS}, lambda name: "image<-text" in name or "text<-image" in name),
    ],
)
def test_a_switch_removes_exactly_its_terms(options, gone):
    full, part = terms_of().flat(), terms_of(**options).flat()
    assert len(full) == 1 + 18 + 2 and part.keys() == {name for name in full if not gone(name)}
    assert 1 < len(part) < len(full)
    shared_terms = [name for name in part if "kl" in name or name in MATCHING]  # no samples: equal to the digit
    assert all(part[name] == full[name] for name in shared_terms)


def test_total_is_the_negated_equation_3_and_the_weighted_equation_4():
    one, terms = terms_of(), terms_of(matching=2.5)
    expected = {name: 2.5 * value.item() for name, value in one.others.items()}
    assert one.others.keys() == MATCHING
    assert {name: value.item() for name, value in terms.others.items()} == pytest.approx(expected, rel=1e-6)
    bounds = sum(value.item() for value in terms.kls.values()) - sum(v.item() for v in terms.log_likelihoods.values())
    assert terms.total.item() == pytest.approx(bounds + sum(expected.values()), rel=1e-5)
    alone = terms_of(matching=2.5, evidence=False)
    assert alone.total.item() == pytest.approx(sum(expected.values()), rel=1e-6)


def test_matching_compares_the_means_that_are_evaluated():
    model, (batch, labels) = made("FlowerDMVAE"), small_batch()
    expected = matching_loss(model.embed_image(batch["image"]), model.embed_text(batch["text"]), labels)
    terms = model.loss(batch, labels)
    assert [terms.others[name].item() for name in sorted(MATCHING)] == pytest.approx(
        [v.item() for v in expected], rel=1e-5
    )


def test_matching_compares_the_pairs_of_which_both_items_are_there():
    model, (batch, labels) = made("FlowerDMVAE"), small_batch()
    there = torch.tensor([True, False, True, True, True, True])
    whole = {name: x[there] for name, x in batch.items()}
    broken = batch | {"text": batch["text"].clone().index_fill_(0, torch.tensor([1]), torch.nan)}
    found, expected = model.loss(broken, labels, {"text": there}), model.loss(whole, labels[there])
    for name in MATCHING:
        torch.testing.assert_close(found.others[name], expected.others[name])


def test_without_private_spaces():
    terms = terms_of(private_dims={"image": 0, "text": 0})
    private = [value.item() for name, value in terms.kls.items() if name.endswith("/private")]
    assert private == [0.0] * 6 and terms.total.isfinite()
    assert all(value > 0 for name, value in terms_of().kls.items() if name.endswith("/private"))


# --- GMM + HGLMM ----------------------------------------------------------------------------------------------------


def words(n=400, seed=0):
    """Clusters in 3-d, Gaussian in the first dimension, Laplacian in the others."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(n, 3, generator=generator, dtype=torch.float64) - 0.5
    x = -u.sign() * (1 - 2 * u.abs()).log()
    x[:, 0] = torch.randn(n, generator=generator, dtype=torch.float64)
    return x + 6 * torch.randint(2, (n, 1), generator=generator)


@pytest.mark.parametrize("hybrid", [False, True])
def test_expectation_maximisation_increases_the_likelihood(hybrid):
    history = HybridMixture(4, 3, hybrid).double().fit(words(), iterations=15)
    assert len(history) == 16 and history[-1] > history[0] + 0.01
    assert all(after >= before - 1e-6 for before, after in pairwise(history))


def test_the_hybrid_finds_which_dimensions_are_laplacian():
    mixture = HybridMixture(2, 3, hybrid=True).double()
    better = mixture.fit(words(4_000), iterations=10)[-1]
    assert mixture.laplacian.tolist() == [[False, True, True]] * 2
    assert better > HybridMixture(2, 3, hybrid=False).double().fit(words(4_000), iterations=10)[-1]
    expected = {tuple([0.0] * 3), tuple([6.0] * 3)}
    assert {tuple(row) for row in mixture.location.round().abs().tolist()} == expected


def test_the_density_is_normalised_and_of_the_named_families():
    mixture = HybridMixture(2, 2, hybrid=True).double()
    mixture.weight.copy_(torch.tensor([0.3, 0.7]))
    mixture.location.copy_(torch.tensor([[0.0, 1.0], [-1.0, 2.0]]))
    mixture.scale.copy_(torch.tensor([[0.5, 1.5], [2.0, 0.7]]))
    mixture.laplacian.copy_(torch.tensor([[True, False], [False, True]]))
    x = torch.randn(5, 2, dtype=torch.float64)
    family = {True: torch.distributions.Laplace, False: torch.distributions.Normal}
    for k in range(2):
        log_prob = sum(
            family[mixture.laplacian[k, d].item()](mixture.location[k, d], mixture.scale[k, d]).log_prob(x[:, d])
            for d in range(2)
        )
        torch.testing.assert_close(mixture.log_joint(x)[:, k], log_prob + mixture.weight[k].log())


def test_the_gaussian_mixture_takes_the_steps_of_scikit_learns():
    x, mixture = words(), HybridMixture(3, 3, hybrid=False).double()
    mixture.fit(x, iterations=0)  # k-means
    start = {"weights_init": mixture.weight.numpy().copy(), "means_init": mixture.location.numpy().copy()}
    start["precisions_init"] = mixture.scale.numpy() ** -2.0
    reference = GaussianMixture(3, covariance_type="diag", max_iter=5, tol=0, reg_covar=0, **start)
    with pytest.warns(Warning, match="converge"):
        reference.fit(x.numpy())
    mixture.fit(x, iterations=5)
    assert mixture.location.flatten().tolist() == pytest.approx(reference.means_.flatten().tolist(), abs=1e-8)
    assert mixture.scale.square().flatten().tolist() == pytest.approx(
        reference.covariances_.flatten().tolist(), abs=1e-8
    )


def test_weighted_median_of_a_laplacian():
    """Values 0, 1, 10 of which 0.2, 0.6, 0.2 belong to the one component; four of six values are 10."""
    mixture = HybridMixture(1, 1, hybrid=True).double()
    x = torch.tensor([[10.0], [0.0], [10.0], [10.0], [1.0], [10.0]], dtype=torch.float64)
    share = torch.tensor([[0.05], [0.2], [0.05], [0.05], [0.6], [0.05]], dtype=torch.float64)
    mixture.maximise(x, share / 2, x.argsort(0))
    assert mixture.laplacian.item() and mixture.location.item() == 1.0
    assert mixture.scale.item() == pytest.approx(0.2 * 1 + 0.2 * 9)


def test_fisher_vectors_are_gradients_of_the_log_likelihood():
    """Against finite differences by location and scale; what is left is 1 / sqrt of the Fisher information."""
    mixture = HybridMixture(2, 3, hybrid=True).double()
    mixture.fit(words(), iterations=5)
    assert mixture.laplacian.any() and not mixture.laplacian.all()
    tokens = torch.stack([words(6, 1), words(6, 2)])
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    found = mixture.fisher_vectors(tokens, mask).view(2, 2, 2, 3)  # caption, component, location or scale, dimension

    def mean_log_likelihood():
        log_likelihood = mixture.log_joint(tokens).logsumexp(-1)
        return (log_likelihood * mask).sum(1) / mask.sum(1)

    step = 1e-6
    for which, parameter in enumerate((mixture.location, mixture.scale)):
        for k in range(2):
            for d in range(3):
                parameter[k, d] += step
                above = mean_log_likelihood()
                parameter[k, d] -= 2 * step
                below = mean_log_likelihood()
                parameter[k, d] += step
                gradient = (above - below) / (2 * step)
                information = 2.0 if which == 1 and not mixture.laplacian[k, d] else 1.0
                scale = mixture.scale[k, d] / (mixture.weight[k] * information).sqrt()
                torch.testing.assert_close(found[:, k, which, d], gradient * scale, rtol=1e-5, atol=1e-7)


def test_fisher_vectors_have_zero_mean_and_nearly_unit_variance_under_the_mixture():
    """What the division by the Fisher information is for: words drawn from a well-separated mixture."""
    mixture = HybridMixture(1, 2, hybrid=True).double()
    mixture.laplacian[0, 1] = True
    generator = torch.Generator().manual_seed(0)
    gauss = torch.randn(100_000, 1, 1, generator=generator, dtype=torch.float64)
    u = torch.rand(100_000, 1, 1, generator=generator, dtype=torch.float64) - 0.5
    laplace = -u.sign() * (1 - 2 * u.abs()).log()
    vectors = mixture.fisher_vectors(torch.cat([gauss, laplace], -1), torch.ones(100_000, 1, dtype=torch.bool))
    torch.testing.assert_close(vectors.mean(0), torch.zeros(4).double(), atol=0.02, rtol=0)
    torch.testing.assert_close(vectors.T.cov(), torch.eye(4).double(), atol=0.03, rtol=0)


def small_gmm(**options):
    """Fewer components than classes: where a class is a component, its words' gradients vanish on average."""
    sizes = {"dim": 3, "components": 2, "word_dim": 4, "text_dim": 8, "image_dim_reduced": 6, "iterations": 5}
    return GMMHGLMM(IMAGE_DIM, TOKEN_DIM, **(sizes | options))


def test_canonical_variates_of_the_fitted_pairs_are_white_and_correlate_in_order():
    data, model = flowers(), small_gmm()
    history = model.fit(data)
    assert history.keys() == {"gmm", "hglmm"} and all(len(values) == 6 for values in history.values())
    batch = data.batch(torch.arange(len(data)))
    image, text = model.embed_image(batch["image"]).double(), model.embed_text(batch["text"]).double()
    torch.testing.assert_close(image.T.cov(), torch.eye(3).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(text.T.cov(), torch.eye(3).double(), atol=1e-3, rtol=0)
    cross = torch.cat([image, text], 1).T.corrcoef()[:3, 3:]
    torch.testing.assert_close(cross, torch.diag(cross.diagonal()), atol=1e-2, rtol=0)
    found = cross.diagonal()
    assert found[0] > 0.9 and (found[:-1] >= found[1:] - 1e-3).all() and found[-1] > 0


def test_fit_repeats_with_a_seed_and_survives_being_saved():
    one, other = small_gmm(), small_gmm()
    assert one.fit(flowers(), seed=1) == other.fit(flowers(), seed=1)
    loaded = small_gmm()
    loaded.load_state_dict(one.state_dict())
    tokens = flowers().items["text"][:4]
    assert torch.equal(loaded.embed_text(tokens), one.embed_text(tokens))


# --- learning and evaluation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_every_row_learns_directions_that_images_and_captions_share(name):
    model, test = made(name), flowers(seed=1)
    before = evaluate_retrieval(model, test, k=15)["scores"]
    history = train(model, flowers(), Schedule(120, 24, 1e-2, log_every=20), device="cpu", objective=objective)
    assert history["total"].iloc[-1] < history["total"].iloc[0]
    after = evaluate_retrieval(model, test, k=15)["scores"]
    assert after["rank1"] > 0.9 and after["ap15"] > 0.9 and sum(after.values()) > sum(before.values())


def test_gmm_hglmm_finds_directions_that_images_and_captions_share():
    model = small_gmm()
    model.fit(flowers(images_per_class=40))
    scores = evaluate_retrieval(model, flowers(seed=1), k=15)["scores"]
    assert scores["rank1"] > 0.9 and scores["ap15"] > 0.9


class Given(nn.Module):
    """Embeddings that are the items themselves; captions: their first token."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def embed_image(self, x):
        return x

    def embed_text(self, tokens):
        return tokens[:, 0]


class Judged(Given):
    """A second stage that prefers captions whose second token has the image's first coordinate."""

    def match(self, image, tokens):
        return -10 * (image[:, None, 0] - tokens[None, :, 1, 0]).abs() + 5


def random_data(n=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([2, 5, 8])[torch.randint(3, (n,), generator=generator)]
    image = torch.randn(n, 4, generator=generator)
    text = image.repeat_interleave(2, 0)[:, None] + torch.randn(2 * n, 2, 4, generator=generator)
    pairs = torch.arange(2 * n)
    return PairedData(
        items={"image": image, "text": text},
        index={"image": pairs // 2, "text": pairs},
        item_labels={"image": labels, "text": labels.repeat_interleave(2)},
    )


def test_evaluation_is_that_of_the_metrics_on_all_items_and_by_class():
    data = random_data()
    image, text = embed(Given(), data, batch_size=7)
    assert torch.equal(image, data.items["image"]) and torch.equal(text, data.items["text"][:, 0])
    labels, text_labels = data.item_labels["image"], data.item_labels["text"]
    result = evaluate_retrieval(Given(), data, k=7)
    scores = result["scores"]
    assert scores["rank1"] == pytest.approx(rank1(image, labels, text, text_labels))
    assert scores["ap7"] == pytest.approx(average_precision_at_k(text, text_labels, image, labels, 7))
    assert [row["class"] for row in result["per_class"]] == [2, 5, 8]
    for row in result["per_class"]:
        own, own_text = labels == row["class"], text_labels == row["class"]
        assert row["images"] == own.sum()
        assert row["rank1"] == pytest.approx(rank1(image[own], labels[own], text, text_labels))
        assert row["ap7"] == pytest.approx(
            average_precision_at_k(text[own_text], text_labels[own_text], image, labels, 7)
        )
    for measure, value in scores.items():
        low, high = result[f"{measure}_interval"]
        assert low <= value <= high and low < high
    assert 0 < scores["rank1"] < 1


def test_bootstrap_over_classes():
    """Two classes, shares 0 of 1 and 3 of 3: a draw has (0, 0), (0, 1) twice, (1, 1), so 0, 3/4 or 1."""
    assert class_bootstrap(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 3.0])) == [0.0, 1.0]
    assert class_bootstrap(torch.tensor([2.0, 4.0]), torch.tensor([4.0, 8.0])) == [0.5, 0.5]
    images = torch.tensor([1.0, 9.0]).repeat(100)  # the small classes fail, the large ones do not: 0.9 of the images
    low, high = class_bootstrap(torch.tensor([0.0, 9.0]).repeat(100), images)
    assert 0.85 < low < 0.9 < high < 0.95
    total = torch.rand(400, generator=torch.Generator().manual_seed(0))
    low, high = class_bootstrap(total, torch.ones(400))
    error = 1.96 * (total.std() / 20).item()  # the central limit theorem's
    assert (high - low) / 2 == pytest.approx(error, rel=0.05) and (high + low) / 2 == pytest.approx(
        total.mean().item(), abs=0.002
    )


def test_reranking_reorders_the_top_hits_alone():
    similarity, scores = torch.tensor([[0.9, 0.8, 0.1, 0.7]]), torch.tensor([[0.2, 0.6, 0.99, 0.4]])
    assert rerank(similarity, scores, 3, dim=1).argsort(1, descending=True).tolist() == [[1, 3, 0, 2]]
    assert rerank(similarity.T, scores.T, 2, dim=0).argsort(0, descending=True).T.tolist() == [[1, 0, 3, 2]]


def test_second_stage_scores_are_means_over_the_captions_of_a_class():
    data, model = random_data(), Judged()
    scores = pair_scores(model, data, torch.tensor([2, 5, 8]), batch_size=5)
    for column, label in enumerate((2, 5, 8)):
        chosen = data.items["text"][data.item_labels["text"] == label]
        expected = torch.stack([model.match(x[None], chosen)[0].sigmoid().mean() for x in data.items["image"]])
        torch.testing.assert_close(scores[:, column], expected)


def test_evaluation_uses_the_second_stage():
    """With three classes all are among the hits, so that the second stage alone decides."""
    data = random_data()
    found, scores = (
        evaluate_retrieval(Judged(), data, k=5)["scores"],
        pair_scores(Judged(), data, torch.tensor([2, 5, 8])),
    )
    right = torch.tensor([2, 5, 8])[scores.argmax(1)] == data.item_labels["image"]
    assert found["rank1"] == pytest.approx(right.double().mean().item())
    assert found["rank1"] != evaluate_retrieval(Given(), data, k=5)["scores"]["rank1"]


# --- the rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", FLOWERS, ids=lambda row: row.name)
def test_every_row_builds_for_the_datas_sizes_at_the_profiles_width(row):
    data, profile = flowers(), replace(get_profile("smoke"), retrieval_hidden=6)
    torch.manual_seed(0)
    model = row.build(row.data, Splits(data, data, {}, "embedded"), **row.arguments(profile))
    if row.fit is not None:
        assert row.schedule(profile) == row.schedule(get_profile("paper"))  # no budget of updates decides its runs
        return
    assert row.schedule(profile).steps == profile.retrieval_steps and row.schedule(profile).batch_size == 64
    rows = torch.arange(0, len(data), 5)
    terms = row.objective(model, data.batch(rows), data.labels[rows], None, 1.0)
    assert terms.total.requires_grad and terms.total.isfinite()
    assert model.embed_image(data.items["image"][:3]).shape == model.embed_text(data.items["text"][:3]).shape


def test_table_2_has_the_papers_rows_in_its_order_and_two_of_ours():
    ours = ["matching loss alone", "DMVAE without matching loss"]
    assert list(TABLE2) == [*published.TABLE2, *ours]


def test_parts_of_dmvae_differ_in_what_their_names_say():
    data, profile = flowers(), replace(get_profile("smoke"), retrieval_hidden=6)
    found = {}
    for title, row in {
        title: row for title, row in (TABLE2 | PARTS).items() if row.build is TABLE2["DMVAE"].build
    }.items():
        model = row.build(row.data, Splits(data, data, {}, "embedded"), **row.arguments(profile))
        found[title] = (model.evidence, model.matching, model.private_dims, model.without)
    whole, three = FLOWER_DMVAE.options["matching"], {"image": 3, "text": 3}
    assert found == {
        "DMVAE": (True, whole, three, frozenset()),
        "matching loss alone": (False, whole, three, frozenset()),
        "DMVAE without matching loss": (True, 0.0, three, frozenset()),
        "without private spaces": (True, whole, {"image": 0, "text": 0}, frozenset()),
        "without cross terms": (True, whole, three, {"image<-text", "text<-image"}),
    }


def test_a_run_is_evaluated_on_the_test_split():
    data, other = random_data(n=60), random_data(n=60, seed=1)
    setting = SimpleNamespace(splits=lambda data_set: Splits(other, data, {}, "embedded"))
    run = SimpleNamespace(model=Given(), setting=setting, row=TABLE2["DMVAE"])
    assert retrieval_of(run) == evaluate_retrieval(Given(), data) != evaluate_retrieval(Given(), other)
    assert retrieval_of(run).keys() == {"scores", "rank1_interval", "ap50_interval", "per_class", "codes"}


def test_the_three_nearest_captions_and_images_of_figures_6_and_7():
    """By hand: an image of class 0, two of class 1, four captions; the third is of class 1 and looks like class 0."""
    captions = torch.tensor([[1, 0.1], [1, 0.2], [0.9, 0.3], [0, 1.0]])
    items = {"image": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), "text": captions[:, None]}
    labels = {"image": torch.tensor([0, 1, 1]), "text": torch.tensor([0, 0, 1, 1])}
    data = PairedData(items, {"image": torch.tensor([0, 1]), "text": torch.tensor([0, 3])}, labels)
    found = evaluate_retrieval(Given(), data, k=1)["codes"]
    assert found["top 3 captions"] == pytest.approx(6 / 9)  # 0 1 and not 2; 3 2 and not 1, twice
    assert found["top 3 images"] == 0.5  # there are only three: one right for two captions, two for two


# --- bad input ------------------------------------------------------------------------------------------------------

BATCH, LABELS = small_batch()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: made("Triplet").loss({"image": BATCH["image"]}, LABELS), "'image' , 'text'|'image', 'text'"),
        (lambda: made("Triplet").loss(BATCH, LABELS[:2]), "'labels': 2"),
        (lambda: made("FlowerDMVAE").loss(BATCH, LABELS[:2]), "'labels': 2"),
        (lambda: made("CMPMCMPC").loss(BATCH, LABELS + 1), r"labels \[42, 44, 51, 78\]"),
        (lambda: made("IATV").loss(BATCH, LABELS - 41), r"labels \[0, 2, 9, 36\]"),
        (lambda: FlowerDMVAE(4, 4, 4, WEIGHTS, matching=-1.0), "matching=-1"),
        (lambda: FlowerDMVAE(4, 4, 4, WEIGHTS, matching=0.0, evidence=False), "evidence=False"),
        (lambda: FlowerDMVAE(4, 4, 4, WEIGHTS, without=["image<-smell"]), "image<-smell"),
        (lambda: HybridMixture(5, 2, False).fit(torch.randn(3, 2)), "5 components.*found 3"),
        (lambda: principal_axes(torch.randn(5, 9), 6), "PCA to 6 dimensions from 5 items of 9"),
        (lambda: evaluate_retrieval(Given(), random_data(), k=25), "k=25.*found 24"),
        (
            lambda: evaluate_retrieval(
                Given(),
                PairedData(
                    items={"image": torch.ones(2, 4), "text": torch.ones(1, 1, 4)},
                    index={"image": torch.tensor([0]), "text": torch.tensor([0])},
                    item_labels={"image": torch.tensor([1, 2]), "text": torch.tensor([1])},
                ),
                k=1,
            ),
            r"classes \[2\] have images or captions alone",
        ),
        (
            lambda: evaluate_retrieval(
                Given(), PairedData.aligned({"image": torch.ones(2, 4)}, labels=torch.zeros(2).long())
            ),
            "the data has image",
        ),
        (lambda: replace(TABLE2["Word CNN"], options={"temperature": 0.5}), "does not use temperature"),
        (lambda: replace(TABLE2["GMM+HGLMM"], options={"matching": 1.0}), "does not use matching"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(DMVAEError, match=message):
        call()


def test_the_flowers_dmvae_is_loaded_by_its_class(tmp_path):
    model = FlowerDMVAE(IMAGE_DIM, TOKEN_DIM, 6, WEIGHTS, private_dims={"image": 2, "text": 1})
    model.save(tmp_path)
    again = FlowerDMVAE.load(tmp_path).state_dict()
    assert all(torch.equal(again[name], values) for name, values in model.state_dict().items())
