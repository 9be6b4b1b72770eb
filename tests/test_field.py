"""The field's benchmarks: PolyMNIST and CdSprites+ are made by their rules, rows and measures are what they say."""

import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import field
import numpy as np
import pytest
import torch
from torch import nn

from dmvae_lib import DMVAE, DMVAEError, Modality, PairedData, Schedule, train
from dmvae_lib.metrics import coherence_by_given
from dmvae_lib.paper.data import Splits
from dmvae_lib.paper.data import cdsprites as sprites
from dmvae_lib.paper.data import polymnist as poly
from dmvae_lib.paper.data.digits import handwritten
from dmvae_lib.paper.data.embedded_digits import VERSIONS
from dmvae_lib.paper.profiles import get_profile
from dmvae_lib.paper.rows import cdsprites, polymnist
from dmvae_lib.paper.rows.cdsprites import CDSPRITES_ROWS
from dmvae_lib.paper.rows.polymnist import MISSING, POLYMNIST_ROWS, first, incomplete, one_source
from dmvae_lib.paper.rows.successors import SUCCESSORS, SUCCESSORS_MISSING
from dmvae_lib.paper.runs import Run, Setting

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = poly.MODALITIES
TINY = replace(get_profile("quick"), width=0.125)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def embedded(cache):
    return poly.load("embedded", cache=cache)


def noise(n: int, seed: int = 0) -> PairedData:
    generator = torch.Generator().manual_seed(seed)
    return PairedData.aligned(
        {name: torch.rand(n, 3, 28, 28, generator=generator) for name in NAMES}, torch.arange(n) % 10
    )


def tiny(row):
    torch.manual_seed(0)
    data = noise(40)
    return row.model(Splits(data, data, {}, "embedded"), TINY), data


# --- PolyMNIST ------------------------------------------------------------------------------------------------------


def test_every_modality_has_every_digit_once_and_a_tuples_are_of_its_class():
    labels = torch.randint(10, (1_000,), generator=torch.Generator().manual_seed(0))
    several = [poly.partners(labels, [900, 100], torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    for index in several:
        assert torch.equal(index.sort().values, torch.arange(1_000)) and torch.equal(labels[index], labels)
        assert index[:900].max() < 900  # no digit of the held-out fold
    # independent: the same digit in two modalities as often as chance has it, once a class and fold
    assert (several[0] == several[1]).sum() < 60 and (several[0] == torch.arange(1_000)).sum() < 60


def test_an_image_is_a_crop_of_its_texture_inverted_where_the_digit_exceeds_128():
    digits = torch.tensor([0, 128, 129, 255], dtype=torch.uint8).repeat(196).view(1, 1, 28, 28).repeat(20, 1, 1, 1)
    picture = poly.texture("grain")  # of which no two rows of a crop are alike
    drawn = poly.on_texture(digits, picture, torch.Generator().manual_seed(0)).long()
    bright = digits > 128
    plain = torch.where(bright, 255 - drawn, drawn)
    corners = set()
    for image in plain:
        windows = picture.long().unfold(1, 28, 1).unfold(2, 28, 1)  # (3, 229, 229, 28, 28)
        ((y, x),) = (windows[:, :, :, 0] == image[:, None, None, 0]).all(-1).all(0).nonzero()[:1].tolist()
        corners.add((y, x))
        assert torch.equal(windows[:, y, x], image)
    assert len(corners) == 20


def test_textures_are_always_the_same_unlike_each_other_and_seldom_mid_grey():
    pictures = {name: poly.texture(name) for name in NAMES}
    for name, picture in pictures.items():
        assert picture.shape == (3, poly.SIDE, poly.SIDE) and torch.equal(picture, poly.texture(name))
        contrast = (2 * picture.float() / 255 - 1).abs().amax(0)  # of a pixel and its inverse, in its strongest channel
        assert (contrast > 0.25).float().mean() > 0.85, name
    spectra = [torch.fft.rfft2(p.float().mean(0)).abs().flatten()[1:] for p in pictures.values()]
    spectra = torch.stack([spectrum / spectrum.norm() for spectrum in spectra])
    assert (spectra @ spectra.T - torch.eye(5)).max() < 0.95


def test_the_embedded_tuples_and_their_validation_split(cache, embedded):
    train, test = handwritten("embedded", Path("."))
    assert torch.equal(embedded.train.labels, train[1]) and torch.equal(embedded.test.labels, test[1])
    held = poly.load("embedded", cache=cache, evaluation="validation")
    kept = len(held.train)
    assert kept + len(held.test) == len(train[1]) and kept % VERSIONS == 0
    assert len(held.test) == pytest.approx(0.1 * len(train[1]), abs=VERSIONS)
    assert np.array_equal(held.test.items["grain"], embedded.train.items["grain"][kept:])


def test_kept_images_are_mapped_the_same_as_drawn_ones_and_refused_when_damaged(tmp_path, monkeypatch, embedded):
    few = tuple((images[:60], labels[:60]) for images, labels in handwritten("embedded", Path(".")))
    monkeypatch.setattr(poly, "handwritten", lambda *_: few)
    drawn, kept = poly.load("embedded"), poly.load("embedded", cache=tmp_path)
    assert isinstance(kept.train.items["smooth"], np.memmap) and kept.train.items["smooth"].dtype == np.uint8
    assert drawn.train.fingerprint == kept.train.fingerprint and drawn.test.fingerprint == kept.test.fingerprint
    monkeypatch.setattr(poly, "_draw", lambda *_: pytest.fail("drawn again"))
    assert poly.load("embedded", cache=tmp_path).train.fingerprint == kept.train.fingerprint
    path = tmp_path / "polymnist-embedded" / f"test-blobs-{poly.VERSION}.npy"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DMVAEError, match="test-blobs.*Delete the folder .*to draw the images anew"):
        poly.load("embedded", cache=tmp_path)


def test_unknown_networks():
    with pytest.raises(DMVAEError, match="no networks 'telbo'"):
        poly.build_networks("telbo", "grain", 1, 1, 1.0, "pytorch")


def test_nothing_else_in_the_library_names_its_modalities():
    library = Path(poly.__file__).parents[2]
    naming = [
        path for path in library.rglob("*.py") if '"grain"' in (text := path.read_text("utf-8")) or '"blobs"' in text
    ]
    assert naming == [Path(poly.__file__)]
    core = [path for path in library.rglob("*.py") if "paper" not in path.relative_to(library).parts]
    assert not [
        path
        for path in core
        if "polymnist" in path.read_text("utf-8").lower().replace("(the protocol of polymnist", "")
    ]


# --- rows -----------------------------------------------------------------------------------------------------------


def test_eq_3_of_five_modalities_has_thirty_bounds_and_the_variant_five():
    model, data = tiny(POLYMNIST_ROWS["DMVAE"])
    batch = data.batch(torch.arange(4))
    assert len(model.loss(batch).log_likelihoods) == 5 * 6
    assert set(one_source(model, batch, None, None, 1.0).log_likelihoods) == {f"{name}<-drawn" for name in NAMES}
    with pytest.raises(DMVAEError, match="one source per target: items are missing"):
        one_source(model, batch, None, {}, 1.0)


def test_one_source_per_target_is_eq_3_on_average():
    """Posteriors of almost no variance, so that the sources alone are drawn."""
    torch.manual_seed(0)

    def modality():
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(3, 8))
        nn.init.zeros_(encoder[1].weight[[2, 3, 6, 7]])
        encoder[1].bias.data[[2, 3, 6, 7]] = -20.0
        return Modality(encoder, nn.Linear(4, 3), 2, likelihood="gaussian", weight=2.0)

    model = DMVAE({name: modality() for name in "abc"}, 2).double()
    with torch.no_grad():
        for name in "abc":
            model.encoders[name][1].weight[[2, 3, 6, 7]] = 0
    batch = {name: torch.randn(500, 3, dtype=torch.float64) for name in "abc"}
    full = model.loss(batch, beta=0.5)
    drawn = [one_source(model, batch, None, None, 0.5) for _ in range(200)]
    for part in ("log_likelihoods", "kls"):
        expected = sum(value.item() for value in getattr(full, part).values())
        found = [sum(value.item() for value in getattr(terms, part).values()) for terms in drawn]
        error = np.std(found) / len(found) ** 0.5
        assert abs(fmean(found) - expected) < 4 * error and error < 0.02 * abs(expected)


def test_entries_are_missing_at_their_rate_but_no_tuple_is_empty():
    data = noise(2_000)
    for share in (0.2, 0.5, 0.95):
        gone = incomplete(Splits(data, data, {}, "embedded"), share)
        masks = torch.stack(list(gone.observed.values()))
        assert masks.any(0).all()
        expected = share - share**5 / 5  # the spared ones
        assert (~masks).float().mean().item() == pytest.approx(expected, abs=0.01)
        assert torch.equal(masks, torch.stack(list(incomplete(Splits(data, data, {}, ""), share).observed.values())))
    assert [row.name for row in MISSING.values()] == [
        *(
            "polymnist-dmvae-missing20",
            "polymnist-dmvae-missing50",
            "polymnist-mvae-missing20",
            "polymnist-mvae-missing50",
        )
    ]


def test_all_rows_have_one_budget_and_codes_of_one_size():
    rows = [*POLYMNIST_ROWS.values(), *MISSING.values(), *SUCCESSORS.values(), *SUCCESSORS_MISSING.values()]
    for profile in (get_profile(name) for name in ("quick", "subset", "paper")):
        assert len({(row.schedule(profile).steps, row.schedule(profile).batch_size) for row in rows}) == 1
    for row in rows:
        options = row.options
        private = options.get("private_dims", {"": options.get("private_dim", 0)})
        assert {options["shared_dim"] + dim for dim in private.values()} == {64}
    assert len({row.name for row in rows}) == len(rows)


class Oracle(nn.Module):
    """A model of three modalities whose items are one-hot classes. What it draws is the class, of whoever is given; but
    from "b" alone, and from "b" with "c", the next one."""

    names = ("a", "b", "c")

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def cross_generate(self, batch, target, n=1, generator=None):
        drawn = next(iter(batch.values()))
        return (drawn.roll(1, -1) if set(batch) in ({"b"}, {"b", "c"}) else drawn)[None]


def test_coherence_by_the_number_of_given_modalities_on_a_case_solved_by_hand():
    """One given: a<-b and c<-b of six are wrong; two given: a<-b,c of three."""
    labels = torch.arange(12) % 4
    items = nn.functional.one_hot(labels, 4).float()
    data = PairedData.aligned(dict.fromkeys("abc", items), labels)
    found = coherence_by_given(Oracle(), data, dict.fromkeys("abc", nn.Identity()))
    assert found == pytest.approx({"1 given": 4 / 6, "2 given": 2 / 3})
    for of, classifiers, message in (
        (replace(data, observed={"a": labels > 0, "b": labels >= 0, "c": labels >= 0}), "abc", "items are missing"),
        (PairedData.aligned(dict.fromkeys("abc", items)), "abc", "no labels"),
        (data, "ab", "no classifiers of c"),
    ):
        with pytest.raises(DMVAEError, match=f"coherence_by_given: {message}"):
            coherence_by_given(Oracle(), of, dict.fromkeys(classifiers, nn.Identity()))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A profile of seconds; PolyMNIST and CdSprites+ of a few items."""
    folder = tmp_path_factory.mktemp("field")
    profile = replace(get_profile("smoke"), width=0.125, tuple_steps=1, classifier_steps=5, writes_results=True)
    return Setting(profile, device="cpu", runs=folder / "runs", results=folder / "results" / "tiny")


@pytest.fixture
def small(monkeypatch):
    few = tuple((images[:150], labels[:150]) for images, labels in handwritten("embedded", Path(".")))
    monkeypatch.setattr(poly, "handwritten", lambda *_: few)
    monkeypatch.setattr(sprites, "ITEMS", {"train": 150, "test": 30})


def test_a_run_leaves_every_measure_of_the_field(place, small):
    entry = Run(POLYMNIST_ROWS["DMVAE, one source"], 0, place).entry
    assert list(entry["scores"]) == ["1 given", "2 given", "3 given", "4 given", "joint"]
    assert set(entry["probes"]) == {"private", "shared", "joint"} and entry["frechet"] > 0
    assert entry["log_likelihood"] < 0 and set(entry["judges"]) == set(NAMES)
    shared = Run(POLYMNIST_ROWS["MVAE"], 0, place).entry
    assert set(shared["probes"]) == {"shared", "joint"}
    pairs = place.splits(poly.POLYMNIST).test
    assert torch.equal(first(pairs, 7).batch(torch.arange(7))["grain"], pairs.batch(torch.arange(7))["grain"])
    assert len(first(pairs, 10**6)) == len(pairs)
    chosen_by = Run(POLYMNIST_ROWS["MVAE"], 0, replace(place, evaluation="validation")).entry
    assert chosen_by["scores"].keys() == shared["scores"].keys() and "probes" not in chosen_by


# --- CdSprites+ -----------------------------------------------------------------------------------------------------


def test_captions_name_shape_and_size_and_are_read_back():
    assert sprites.CAPTIONS[1] == ("heart", "square", "ellipse")
    assert sprites.CAPTIONS[2] == (*(f"small {s}" for s in sprites.SHAPES), *(f"big {s}" for s in sprites.SHAPES))
    for level, captions in sprites.CAPTIONS.items():
        spelt = sprites.spell(torch.arange(len(captions)), level)
        assert tuple(sprites.read(spelt)) == captions
        reader = sprites.Reader(level)
        assert torch.equal(reader(spelt).argmax(-1), torch.arange(len(captions)))
        spelt[0, 0] = spelt[0, 0].roll(1)  # one letter is wrong
        assert reader(spelt).argmax(-1)[0] == len(captions)


def test_sprites_are_what_their_captions_say(small):
    data = sprites.CDSPRITES[2].load("embedded").train
    batch, labels = data.batch(torch.arange(len(data))), data.labels
    ink = 1 - batch["image"][:, 0]  # (150, 64, 64)
    area = ink.flatten(1).sum(1)
    assert area[labels >= 3].min() > 2 * area[labels < 3].max()  # big, small
    filled = [(ink[labels == label] > 0.4).float().mean(0).sum() for label in range(6)]
    assert min(filled) > 50
    by_shape = [area[labels == label].std() / area[labels == label].mean() for label in range(6)]
    assert max(by_shape) < 0.02  # turned, no more
    again = sprites.CDSPRITES[2].load("subset").train
    assert again.fingerprint == data.fingerprint
    assert sprites.CDSPRITES[2].load("embedded", evaluation="validation").test.fingerprint != data.fingerprint


def test_the_reduced_loss_is_eq_3_minus_the_cross_bounds(small):
    level = CDSPRITES_ROWS[1]
    row, reduced = level.values()
    assert replace(reduced, name=row.name, title=row.title, options=row.options) == row
    splits = sprites.CDSPRITES[1].load("embedded")
    batch, terms = splits.train.batch(torch.arange(8)), {}
    for of in (row, reduced):
        torch.manual_seed(0)
        model = of.model(splits, TINY)
        model.eval()
        torch.manual_seed(1)
        terms[of.name] = model.loss(batch)
    full, less = terms.values()
    crossing = {"image<-caption", "caption<-image"}
    assert full.log_likelihoods.keys() - less.log_likelihoods.keys() == crossing
    assert {name.partition("/")[0] for name in full.kls.keys() - less.kls.keys()} == crossing
    kept = sum(v for k, v in full.kls.items() if k.partition("/")[0] not in crossing)
    kept = kept - sum(v for k, v in full.log_likelihoods.items() if k not in crossing)
    # the reconstructions of a target share one pass, in which the sources' order decides the noise: none is drawn anew
    assert less.total.item() == pytest.approx(kept.item(), rel=1e-5)


def test_a_run_of_sprites_is_judged_by_a_classifier_and_a_reader(place, small):
    entry = Run(next(iter(CDSPRITES_ROWS[1].values())), 0, place).entry
    assert set(entry["scores"]) == {"image->caption", "caption->image", "joint"} and set(entry["judges"]) == {"image"}


# --- MultiVae's models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [*SUCCESSORS.values(), *SUCCESSORS_MISSING.values()], ids=lambda row: row.name)
def test_multivaes_models_are_trained_and_measured_as_ours_are(row):
    pytest.importorskip("multivae.models")
    model, data = tiny(row)
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    pairs = row.select(Splits(data, data, {}, "embedded"))
    train(model, pairs, Schedule(2, 20, 1e-2), device="cpu", objective=row.objective)
    assert not [name for name, value in model.named_parameters() if name in before and torch.equal(value, before[name])]
    batch, draw = data.batch(torch.arange(6)), torch.Generator()
    given = {name: batch[name] for name in NAMES[:2]}
    drawn = [model.cross_generate(given, "edges", 2, generator=draw.manual_seed(seed)) for seed in (0, 0, 1)]
    assert drawn[0].shape == (2, 6, 3, 28, 28) and 0 <= drawn[0].min() <= drawn[0].max() <= 1
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    altered = dict(given, smooth=1 - given["smooth"], stripes=1 - given["stripes"])
    assert not torch.equal(model.cross_generate(altered, "edges", 2, generator=draw.manual_seed(0)), drawn[0])
    assert {name: images.shape for name, images in model.sample(4).items()} == dict.fromkeys(NAMES, (4, 3, 28, 28))
    posterior = model.infer(batch)
    assert posterior.joint.mean.shape == posterior.shared["grain"].mean.shape == (6, row.options["shared_dim"])
    assert posterior.private["grain"].mean.shape == (6, row.options.get("private_dim", 0))
    few = {name: x[:2] for name, x in batch.items()}
    of_five = torch.stack([model.log_likelihood(few, 5, draw.manual_seed(seed)) for seed in range(20)])
    many = model.log_likelihood(few, 200, draw.manual_seed(0))
    assert many.shape == (2,) and (many > of_five.mean(0) - 1).all()  # a bound that rises with the samples


def test_their_mvae_computes_our_objective():
    """Joint and single bounds of the same networks, when nothing is drawn."""
    pytest.importorskip("multivae.models")
    ours, data = tiny(replace(POLYMNIST_ROWS["MVAE"], options={"shared_dim": 64, "initialise": "pytorch"}))
    theirs, _ = tiny(SUCCESSORS["MVAE, MultiVae"])
    theirs.inner.k = 0
    ours.eval(), theirs.eval()
    with torch.no_grad():
        for name in NAMES:
            ours.encoders[name][-1].weight[64:] = 0
            ours.encoders[name][-1].bias[64:] = -9.9  # within MVAE's clamp; hardly any noise
            theirs.inner.encoders[name].network.load_state_dict(ours.encoders[name].state_dict())
            theirs.inner.decoders[name].network.load_state_dict(ours.decoders[name].state_dict())
        batch = data.batch(torch.arange(8))
        assert ours.loss(batch, beta=0.3).total.item() == pytest.approx(
            theirs.loss(batch, beta=0.3).total.item(), rel=1e-3
        )


def test_their_mmvae_plus_counts_all_modalities_in_its_likelihood():
    pytest.importorskip("multivae.models")
    row = SUCCESSORS["MMVAE+"]
    model, data = tiny(replace(row, options={**row.options, "likelihood": "laplace"}))
    batch = data.batch(torch.arange(1))
    whole = model.log_likelihood(batch, 100, torch.Generator().manual_seed(0)).item()
    # untrained, every modality costs about the same: four fifths if one were left out
    one = -(3 * 28 * 28) * (np.log(2 * 0.75) + 0.25 / 0.75)
    assert whole == pytest.approx(5 * one, rel=0.05)


@pytest.mark.parametrize("title", ["DMVAE", "MVAE", "MMVAE", "MoPoE", "MMVAE+"])
def test_a_likelihood_is_of_the_models_decoders(title):
    """A decoder whose weights are all zero draws grey; each likelihood says so in its own nats."""
    if title in SUCCESSORS:
        pytest.importorskip("multivae.models")
    row, white = (POLYMNIST_ROWS | SUCCESSORS)[title], dict.fromkeys(NAMES, torch.ones(2, 3, 28, 28))
    for likelihood, grey in (("bernoulli", np.log(0.5)), ("laplace", -np.log(2 * 0.75) - 0.5 / 0.75)):
        model, _ = tiny(replace(row, options={**row.options, "likelihood": likelihood}))
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "decoder" in name:
                    value.zero_()
        drawn = model.cross_generate({"grain": white["grain"]}, "edges", generator=torch.Generator().manual_seed(0))
        assert drawn.unique().tolist() == [0.5]
        found = model.log_likelihood(white, samples=5, generator=torch.Generator().manual_seed(0))
        assert found.tolist() == pytest.approx([5 * 3 * 28 * 28 * grey] * 2, rel=0.01)


def test_without_the_package_a_row_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "multivae.models", None)
    monkeypatch.setitem(sys.modules, "multivae", None)
    with pytest.raises(DMVAEError, match="the package multivae is not installed; `pip install multivae`"):
        tiny(SUCCESSORS["MoPoE"])
    assert SUCCESSORS["MoPoE"].config(TINY, 0)["arguments"]["kind"] == "MoPoE"  # as data they need no package


def test_make_field_trains_judges_first_then_seed_by_seed():
    place = Setting(get_profile("smoke"), seeds=2)
    runs = [(run.row.name, run.seed) for run in field.runs_of(place, theirs=True)]
    assert len(runs) == len(set(runs)) and [seed for _, seed in runs[:7]] == [0] * 7
    ours = [(run.row.name, run.seed) for run in field.runs_of(place, theirs=False)]
    assert {name for name, _ in runs} - {name for name, _ in ours} == {
        row.name for row in (*SUCCESSORS.values(), *SUCCESSORS_MISSING.values())
    }
    judges = {row.name for row in (*polymnist.JUDGES.values(), *cdsprites.JUDGES.values())}
    assert {name for name, _ in runs[: len(judges)]} == judges
    assert runs.index(("polymnist-multivae-mopoe", 1)) < runs.index(("polymnist-dmvae-missing20", 0))
