"""What Figures 4 and 5 show, as numbers, on models whose codes are known; and the strong judge."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toy import ROW, TOY, place_in

from dmvae_lib import DiagonalGaussian, DMVAEError, PairedData
from dmvae_lib.paper.codes import codes, misread, synthesised
from dmvae_lib.paper.data import Splits
from dmvae_lib.paper.networks import Augment
from dmvae_lib.paper.rows.digits import judged, strong_judges
from dmvae_lib.paper.runs import Run

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = 4


class Known(nn.Module):
    """Items (B, CLASSES + 1): the class, one-hot, and a style. Shared code: the class; private code: the style.

    leaky: the private code is the class. blind: the decoder does not see the "private" or the "shared" code.
    apart: by how much the second modality's shared codes lie away from the first's.
    """

    def __init__(self, leaky=False, blind="", apart=0.0, private=1):
        super().__init__()
        self.names, self.shared_dim, self.private_dims = ("a", "b"), CLASSES, {"a": private, "b": private}
        self.leaky, self.blind, self.apart = leaky, blind, apart
        self.weight = nn.Parameter(torch.zeros(1))

    def infer(self, batch, observed=None):
        def sure(mean):
            return DiagonalGaussian(mean, torch.full_like(mean, -20.0))

        away = {"a": 0.0, "b": self.apart}
        shared = {name: sure(x[:, :CLASSES] + away[name] + 1e-3 * x[:, CLASSES:]) for name, x in batch.items()}
        styles = {n: x[:, :CLASSES].argmax(1, True).float() if self.leaky else x[:, CLASSES:] for n, x in batch.items()}
        private = {name: sure(style[:, : self.private_dims[name]]) for name, style in styles.items()}
        return SimpleNamespace(private=private, shared=shared, joint=next(iter(shared.values())))

    def mean(self, name, private, shared):
        private, shared = (0 * z if part == self.blind else z for part, z in (("private", private), ("shared", shared)))
        lead = torch.broadcast_shapes(private.shape[:-1], shared.shape[:-1])
        return torch.cat([shared.expand(*lead, CLASSES), private.expand(*lead, 1)], -1)

    def cross_generate(self, batch, target, n=1, generator=None):
        return torch.stack([*batch.values()] * n)


def splits_of(n=200):
    labels = torch.arange(n) % CLASSES
    items = {
        name: torch.cat([nn.functional.one_hot(labels, CLASSES).float(), torch.randn(n, 1).clamp(-1, 3)], 1)
        for name in "ab"
    }
    pairs = PairedData.aligned(items, labels)
    return Splits(pairs, pairs, {}, "known")


def read(x):
    return x[:, :CLASSES]


def found(model):
    torch.manual_seed(0)
    return codes(model, splits_of(), {"a": read, "b": read})


def test_a_model_that_keeps_class_and_style_apart_scores_full_marks():
    of = found(Known())
    every = {"identity a->b", "identity b->a", "style a->b", "style b->a", "alignment", "mixing"}
    probes = {"private a", "private b", "shared a", "shared b", "shared joint"}
    assert of["codes"].keys() == every | probes and of["chance"].keys() == every - {"mixing"} | probes
    assert {measure for measure, share in of["codes"].items() if share == 1} >= every - {"mixing"} | {"shared a"}
    assert of["codes"]["private a"] < 0.4 and of["codes"]["mixing"] > 0.3
    assert (
        of["chance"]["identity a->b"] == of["chance"]["private a"] == 1 / CLASSES and of["chance"]["style a->b"] == 0.2
    )


@pytest.mark.parametrize(
    "blind, measure, chance", [("private", "style a->b", 1 / 5), ("shared", "identity a->b", 1 / 4)]
)
def test_a_decoder_that_does_not_see_a_code_is_at_chance(blind, measure, chance):
    assert found(Known(blind=blind))["codes"][measure] == pytest.approx(chance)


def test_a_leak_and_data_sets_that_lie_apart_are_seen():
    assert found(Known(leaky=True))["codes"]["private a"] == 1
    apart = found(Known(apart=9.0))["codes"]
    assert apart["mixing"] == 0 and apart["alignment"] == 1  # arranged alike, and yet apart


def test_figure_4_has_a_style_a_row_or_samples_where_there_are_none():
    batch = splits_of(8).test.batch(torch.arange(8))
    drawn = synthesised(Known(), {"a": batch["a"]}, "b")
    assert drawn.shape == (5, 8, CLASSES + 1) and (drawn[..., -1] == torch.arange(-1.0, 4)[:, None]).all()
    assert torch.equal(drawn[..., :CLASSES].argmax(-1), (torch.arange(8) % CLASSES).expand(5, 8))
    without = Known(private=0)
    assert synthesised(without, {"a": batch["a"]}, "b").shape == (5, 8, CLASSES + 1)
    measures = codes(without, splits_of(), {"a": read, "b": read})["codes"]
    assert not [measure for measure in measures if measure.startswith(("style", "private"))]


def test_the_failures_shown_are_the_first_of_each_class_that_the_judge_misreads():
    pairs = splits_of(40).test  # labels 0 1 2 3 0 1 2 3 …
    kept = pairs.items["a"][:, -1] > 0  # a judge that is wrong where the style is positive, and never on class 2

    def judge(x):
        wrong = (x[:, -1] > 0) & (x[:, :CLASSES].argmax(1) != 2)
        return torch.where(wrong[:, None], x[:, :CLASSES].roll(1, 1), x[:, :CLASSES])

    given, drawn, read = misread(Known(), pairs, judge, "a", "b")
    assert read == [1, 2, None, 0] and (given[2] == 1).all() and (drawn[2] == 1).all()
    for label in (0, 1, 3):
        first = (kept & (pairs.labels == label)).nonzero()[0, 0]
        assert torch.equal(given[label], pairs.items["a"][first])


def test_data_without_classes_are_refused():
    pairs = PairedData.aligned({name: torch.rand(9, 5) for name in "ab"})
    with pytest.raises(DMVAEError, match="compare classes, and these data have none"):
        codes(Known(), Splits(pairs, pairs, {}, "known"), {})


# --- the strong judge -------------------------------------------------------------------------------------------------


def test_augmentation_is_of_training_alone_and_inverts_half_of_the_images():
    x = torch.full((400, 1, 4, 4), 0.1)
    augment = Augment()
    assert torch.equal(augment.eval()(x), x)
    torch.manual_seed(0)
    made = augment.train()(x)
    assert made.shape == x.shape and 0 <= made.min() and made.max() <= 1
    assert 0.4 < (made.mean((1, 2, 3)) > 0.5).double().mean() < 0.6


def test_a_strong_judge_stands_beside_the_usual_one_where_the_profile_has_it(tmp_path):
    place = place_in(tmp_path, strong_steps=60)
    run = Run(ROW, 0, place)
    strong = run.entry["strong"]
    assert strong["scores"].keys() == run.scores.keys() and strong["pairs"] == len(place.splits(TOY).test)
    assert strong["judges"]["left"]["accuracy"] > 0.9
    judges = strong_judges(place, TOY)
    assert strong["judges"]["top"]["sha256"] == judges["top"].entry["files"]["model.safetensors"]
    assert judges["left"].config["schedule"]["steps"] == 60
    assert "strong" not in Run(ROW, 1, replace(place, profile=replace(place.profile, strong_steps=0))).entry
    assert judged(run)["strong"] == strong  # the same images again


def test_what_is_for_choices_is_scored_by_the_usual_judge_alone(tmp_path):
    run = Run(ROW, 0, replace(place_in(tmp_path, strong_steps=2), evaluation="validation"))
    assert not {"strong", "codes", "chance"} & run.entry.keys()
