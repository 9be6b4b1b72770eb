"""A saved model is the model, and a folder that does not hold it is refused by name of what is wrong."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dmvae_lib import DMVAE, JMVAE, MMVAE, MVAE, TELBO, DMVAEError, Modality
from dmvae_lib.experiments import DIGITS, build, load_experiment
from dmvae_lib.models.flowers import FlowerDMVAE
from dmvae_lib.networks import JointEncoder
from dmvae_lib.profiles import get_profile

SHARED = 2


def modalities(private=1, hidden=5, **changes):
    def mlp(inputs, outputs):
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

    def one(size, weight):
        networks = mlp(size, 2 * private + 2 * SHARED), mlp(private + SHARED, size)
        return Modality(*networks, **{"private_dim": private, "weight": weight, "likelihood": "gaussian"} | changes)

    return {"audio": one(4, 2.0), "video": one(3, 1.0)}


def joint_encoder():
    return JointEncoder({"audio": nn.Linear(4, 3), "video": nn.Linear(3, 3)}, 6, SHARED, 4)


BATCH = {"audio": torch.randn(6, 4), "video": torch.randn(6, 3)}
MODELS = {  # each with constructor arguments that are not the defaults
    "DMVAE": lambda: DMVAE(modalities(), SHARED, without={"audio<-joint", "video<-audio/kl_shared"}),
    "MVAE": lambda: MVAE(modalities(0), SHARED),
    "MMVAE": lambda: MMVAE(modalities(0), SHARED, particles=3),
    "JMVAE": lambda: JMVAE(modalities(0), SHARED, joint_encoder(), alpha=0.3),
    "TELBO": lambda: TELBO(modalities(0), SHARED, joint_encoder(), {"audio": 0.5}),
}


def loss(model, batch=BATCH):
    torch.manual_seed(0)
    return model.loss(batch).total.item()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_loaded_has_the_saved_objective_and_weights(name, tmp_path):
    model = MODELS[name]().eval()
    model.save(tmp_path / "new" / "folder")
    networks = {"joint_encoder": joint_encoder()} if name in ("JMVAE", "TELBO") else {}
    again = type(model).load(tmp_path / "new" / "folder", modalities(1 if name == "DMVAE" else 0), **networks)
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


@pytest.mark.parametrize("experiment", DIGITS, ids=lambda experiment: experiment.name)
def test_the_librarys_own_digit_models_need_no_networks(experiment, tmp_path):
    profile = replace(get_profile("quick"), width=0.1, particles=2, weights=(7.0, 3.0))
    model = build(experiment, profile).eval()
    model.save(tmp_path)
    again = load_experiment(tmp_path)
    assert json.dumps(again.experiment) == json.dumps(model.experiment)
    batch = {"mnist": torch.rand(3, 1, 28, 28), "svhn": torch.rand(3, 3, 32, 32)}
    assert loss(again, batch) == loss(model, batch)


def test_the_flower_model_needs_no_networks(tmp_path):
    model = FlowerDMVAE(5, 6, 4, (1, 2), 7, 8, (0.3, 0.4), matching=2.0, without=["image<-text"]).eval()
    model.save(tmp_path)
    again = FlowerDMVAE.load(tmp_path)
    batch, labels = {"image": torch.randn(4, 5), "text": torch.randn(4, 3, 6)}, torch.tensor([0, 0, 1, 1])
    totals = []
    for one in (model, again):
        torch.manual_seed(0)
        totals.append(one.loss(batch, labels).total.item())
    assert totals[0] == totals[1]


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


def test_a_model_of_another_class_and_one_of_no_experiment(folder):
    with pytest.raises(DMVAEError, match="holds a model DMVAE; load it with DMVAE.load"):
        MVAE.load(folder, modalities(0))
    with pytest.raises(DMVAEError, match="no experiment's; load it with DMVAE.load"):
        load_experiment(folder)


def test_missing_damaged_and_foreign_files(folder, tmp_path_factory):
    with pytest.raises(DMVAEError, match="config.json cannot be read .No such file"):
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
        with pytest.raises(DMVAEError, match="config.json cannot be read"):
            DMVAE.load(folder, modalities())


def test_saving_over_a_model_leaves_the_new_one_or_a_checked_mixture(folder, monkeypatch):
    """Cut off between the two files, the folder is refused, not taken for the old model nor for the new one."""
    import dmvae_lib.models.saving as saving

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
