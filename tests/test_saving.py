"""A saved model is the model, and a folder that does not hold it is refused by name of what is wrong."""

import re
import resource
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dmvae_lib import DMVAE, JMVAE, MMVAE, MVAE, TELBO, DMVAEError, Modality, models
from dmvae_lib.models import MultimodalVAE, saving

SHARED = 2


def modalities(private=1, hidden=5, **changes):
    def mlp(inputs, outputs):
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

    def one(size, weight):
        networks = mlp(size, 2 * private + 2 * SHARED), mlp(private + SHARED, size)
        return Modality(*networks, **{"private_dim": private, "weight": weight, "likelihood": "gaussian"} | changes)

    return {"audio": one(4, 2.0), "video": one(3, 1.0)}


class Together(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Linear(7, 2 * SHARED)

    def forward(self, batch):
        return self.network(torch.cat([batch["audio"], batch["video"]], -1))


def joint_encoder():
    return Together()


BATCH = {"audio": torch.randn(6, 4), "video": torch.randn(6, 3)}
MODELS = {  # each with constructor arguments that are not the defaults
    "DMVAE": lambda: DMVAE(modalities(), SHARED, without={"audio<-joint", "kl(video<-audio/shared)"}),
    "MVAE": lambda: MVAE(modalities(0), SHARED),
    "MMVAE": lambda: MMVAE(modalities(0), SHARED, particles=3),
    "JMVAE": lambda: JMVAE(modalities(0), SHARED, joint_encoder(), alpha=0.3),
    "TELBO": lambda: TELBO(modalities(0), SHARED, joint_encoder(), {"audio": 0.5}),
}


def loss(model, batch=BATCH):
    torch.manual_seed(0)
    return model.loss(batch).total.item()


def test_every_model_of_the_library_is_saved_below():
    exported = [value for value in vars(models).values() if isinstance(value, type)]
    known = {kind for kind in exported if issubclass(kind, MultimodalVAE) and kind is not MultimodalVAE}
    assert {type(make()) for make in MODELS.values()} == known


@pytest.mark.parametrize("name", MODELS)
def test_what_is_loaded_has_the_saved_objective_and_weights(name, tmp_path):
    model = MODELS[name]().eval()
    model.save(tmp_path / "new" / "folder")
    networks = {"joint_encoder": joint_encoder()} if name in ("JMVAE", "TELBO") else {}
    again = type(model).from_pretrained(
        tmp_path / "new" / "folder", modalities(1 if name == "DMVAE" else 0), **networks
    )
    assert loss(again) == loss(model)
    assert not again.training


def test_three_modalities_and_shared_networks(tmp_path):
    def three():
        first, second = modalities().values()
        return {"left": first, "right": replace(first, weight=1.0), "third": second}  # left and right: one encoder

    model = DMVAE(three(), SHARED)
    model.save(tmp_path)
    again = DMVAE.load(tmp_path, three())
    batch = {"left": torch.randn(6, 4), "right": torch.randn(6, 4), "third": torch.randn(6, 3)}
    assert loss(again, batch) == loss(model, batch)


def test_what_is_known_about_a_model_is_saved_with_it(tmp_path):
    about = {"row": "dmvae", "seed": 3, "profile": {"name": "quick", "width": 0.5}}
    model = DMVAE(modalities(), SHARED)
    model.about = about
    model.save(tmp_path)
    assert saving.read_config(tmp_path)["about"] == about
    assert DMVAE.load(tmp_path, modalities()).about == about  # which are not the constructor's: the networks are


def test_the_card_says_how_to_load_the_model():
    model = DMVAE(modalities(), SHARED)
    assert 'DMVAE.from_pretrained("this repository", modalities, revision=' in model.card()
    assert "# DMVAE of audio and video" in model.card() and "pretrained(" in model.card()
    model.about = {"row": "dmvae"}
    assert 'dmvae_lib.paper.pretrained("this repository"' in model.card() and "Modality(" not in model.card()


@pytest.fixture
def folder(tmp_path):
    DMVAE(modalities(), SHARED).save(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "given, message",
    [
        (lambda: modalities(private=2), "audio private_dim: saved 1, given 2"),
        (lambda: modalities(weight=3.0), "audio weight: saved 2.0, given 3.0; video weight: saved 1.0, given 3.0"),
        (lambda: modalities(likelihood="laplace"), r'saved "gaussian\(1\)", given "laplace\(1\)"'),
        (lambda: {"audio": modalities()["audio"]}, "video private_dim: saved 1, given nothing"),
        (lambda: modalities(hidden=6), r"does not fit these networks.*encoders.audio.0.weight"),
        (lambda: None, "modalities.* are code and not in the file: give the modalities"),
    ],
)
def test_other_modalities_are_refused_by_name(given, message, folder):
    with pytest.raises(DMVAEError, match=re.compile(message, re.S)):
        DMVAE.load(folder, given())


def test_a_model_of_another_class(folder):
    with pytest.raises(DMVAEError, match="holds a model DMVAE; load it with DMVAE.load"):
        MVAE.load(folder, modalities(0))


def test_missing_damaged_and_foreign_files(folder, tmp_path_factory):
    with pytest.raises(DMVAEError, match="cannot read .*config.json: No such file"):
        DMVAE.load(folder / "elsewhere", modalities())
    weights = folder / "model.safetensors"
    save_file({key: value + 1 for key, value in load_file(weights).items()}, weights)
    with pytest.raises(DMVAEError, match="model.safetensors .* has SHA-256"):
        DMVAE.load(folder, modalities())
    weights.unlink()
    with pytest.raises(DMVAEError, match="cannot read .*model.safetensors"):
        DMVAE.load(folder, modalities())
    for text in ("{", "[]", '{"architectures": ["BertModel"]}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(DMVAEError, match="config.json (cannot be read|holds a JSON list|describes no model)"):
            DMVAE.load(folder, modalities())


def test_a_disk_that_takes_no_more_is_said_so(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(DMVAEError, match="cannot write .*model.safetensors: .*choose another folder"):
            DMVAE(modalities(), SHARED).save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_saving_over_a_model_leaves_the_new_one_or_a_checked_mixture(folder, monkeypatch):
    """Cut off between the two files, the folder is refused, not taken for the old model nor for the new one."""

    def cut_off(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(saving, "_description", cut_off)
        DMVAE(modalities(), SHARED).save(folder)
    with pytest.raises(DMVAEError, match="SHA-256"):
        DMVAE.load(folder, modalities())
    DMVAE(modalities(), SHARED).save(folder)
    DMVAE.load(folder, modalities())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
