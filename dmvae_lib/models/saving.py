"""Models on disk and on the Hugging Face Hub: weights as safetensors, configuration as JSON; no pickle, no code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, TypeVar

import torch
from safetensors.torch import load_model, save
from torch import nn

from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import atomic_write, read_json, sha256, verify, write_json

Model = TypeVar("Model", bound="Saved")
WEIGHTS, CONFIG = "model.safetensors", "config.json"
CARD = """---
library_name: dmvae_lib
tags: [multimodal, vae]
---

# {model} of {modalities}

A multimodal variational autoencoder, saved by dmvae_lib. `config.json` says what it was built from,
`model.safetensors` holds its weights.

{how}
"""
OWN_NETWORKS = """The encoders and decoders are code and not in here: load it with networks of the same architecture,

    modalities = {name: Modality(encoder, decoder, private_dim, weight, likelihood), ...}
    model = %s.from_pretrained("this repository", modalities, revision="a commit")"""


class Saved(nn.Module):
    """Saving and loading for a `MultimodalVAE`."""

    def save(self, folder: str | Path, precision: torch.dtype | None = None) -> None:
        """Writes model.safetensors and config.json into `folder`, each whole or not at all.
        precision: in which weights are written, as torch.float16 for half the size; None: as they are. `load` gives
        float32 either way. Raises DMVAEError for a folder that cannot be written."""
        folder = Path(folder)
        once = {name for name, _ in (*self.named_parameters(), *self.named_buffers())}  # networks may be shared
        weights = {name: values.contiguous() for name, values in self.state_dict().items() if name in once}
        if precision is not None:
            weights = {name: x.to(precision) if x.is_floating_point() else x for name, x in weights.items()}
        with atomic_write(folder / WEIGHTS) as temporary:
            temporary.write_bytes(save(weights))  # safetensors' own writer hides what is wrong with the disk
        about = {"about": self.about} if self.about else {}
        seal = {"library": version("dmvae_lib"), "sha256": sha256(folder / WEIGHTS)}
        write_json(folder / CONFIG, _description(self) | about | seal)

    @classmethod
    def load(cls, folder: str | Path, modalities: Mapping[str, Any] | None = None, **networks: nn.Module) -> Self:
        """The model that `save` wrote into `folder`, on the CPU, ready for inference.

        modalities: {name: Modality} with encoders and decoders of the same architecture; their weights are replaced.
        networks: other modules that the model is built from (`joint_encoder`).

        Raises DMVAEError, naming what differs, for modalities that are not those that were saved, and for files that
        are missing, damaged or of another model.
        """
        config = read_config(folder)
        if config["model"] != cls.__name__:
            raise DMVAEError(f"{folder} holds a model {config['model']}; load it with {config['model']}.load.")
        given: dict[str, Any] = {} if modalities is None else {"modalities": modalities}
        try:
            model = cls(**given, **config["arguments"], **networks)
        except TypeError as error:
            raise DMVAEError(
                f"{cls.__name__}.load, {folder}: {error}. The networks are code and not in the file: give the "
                "modalities, and whatever other network the model was built from, as when it was built."
            ) from error
        return load_weights(model, folder)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        modalities: Mapping[str, Any] | None = None,
        *,
        revision: str | None = None,
        **options: Any,
    ) -> Self:
        """`load` from a folder, or from a repository of the Hub at `revision`: a commit pins it, a branch moves.
        options: `load`'s other networks, and options of huggingface_hub.snapshot_download (token, cache_dir, …)."""
        networks = {name: value for name, value in options.items() if isinstance(value, nn.Module)}
        where = {name: value for name, value in options.items() if name not in networks}
        return cls.load(fetched(source, revision=revision, **where), modalities, **networks)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "A model of dmvae_lib",
    ) -> str:
        """Uploads what `save` writes, and a card, to a repository of the Hub (owner/name), made if it is not there.
        revision: a branch; None: the default one. Returns the commit, which as `revision` loads just this model."""
        from huggingface_hub import HfApi  # here, because it takes long to import

        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            self.save(folder)
            Path(folder, "README.md").write_text(self.card(), encoding="utf-8")
            api.create_repo(repo_id, private=private, exist_ok=True)
            made = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
            )
            return made.oid

    def card(self) -> str:
        """The Hub's README.md: what the model is and how to load it."""
        model = type(self).__name__
        ours = '    model = dmvae_lib.paper.pretrained("this repository", revision="a commit")'
        how = ours if "row" in self.about else OWN_NETWORKS % model
        return CARD.format(model=model, modalities=" and ".join(self.names), how=how)


def fetched(source: str | Path, **options: Any) -> Path:
    """`source` if it is a folder, else the folder of that Hub repository's two files; options: snapshot_download's."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=[WEIGHTS, CONFIG], **options))
    except (OSError, ValueError) as error:  # not found, no access, no network, or no name of a repository
        raise DMVAEError(
            f"cannot load {str(source)!r}: it is no folder here, and the Hub says: {str(error).strip()} "
            "Check the path, or the repository (owner/name), its revision and the network."
        ) from error


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a saved model. Raises DMVAEError if it is missing or is not one of this library's."""
    path, repair = Path(folder) / CONFIG, f"Give a folder that `save` wrote, with {CONFIG} and {WEIGHTS}."
    config = read_json(path, repair)
    if not {"model", "modalities", "arguments", "sha256"} <= set(config):
        raise DMVAEError(f"{path} describes no model of this library. {repair}")
    return config


def load_weights(model: Model, folder: str | Path) -> Model:
    """`model` with the weights, and the `about`, saved in `folder`, ready for inference.
    Raises DMVAEError for a model unlike the saved one, naming what."""
    config, path = read_config(folder), Path(folder) / WEIGHTS
    saved, given = _flat(config), _flat(_description(model))
    unlike = [
        f"{key}: saved {saved.get(key, 'nothing')}, given {given.get(key, 'nothing')}"
        for key in sorted(saved | given)
        if saved.get(key) != given.get(key)
    ]
    if unlike:
        raise DMVAEError(f"{folder} holds another model: {'; '.join(unlike)}. Give it what it was built from.")
    verify(path, config["sha256"])
    try:
        load_model(model, path)
    except RuntimeError as error:
        raise DMVAEError(f"{path} does not fit these networks: {error}. Give networks of the saved shapes.") from error
    model.about = config.get("about", {})
    return model.eval()


def _description(model: Saved) -> dict[str, Any]:
    modalities = {
        name: {
            "private_dim": int(model.private_dims[name]),
            "weight": float(model.weights[name]),
            "likelihood": model.likelihoods[name].name,
            "features": name in model.features,
        }
        for name in model.names
    }
    return {"model": type(model).__name__, "modalities": modalities, "arguments": model.arguments}


def _flat(config: Mapping[str, Any]) -> dict[str, str]:
    """What must be equal, as {"audio private_dim": "1", …}."""
    return {
        f"{name} {key}".strip(): json.dumps(value)
        for name, values in (*config["modalities"].items(), ("", config["arguments"]))
        for key, value in values.items()
    }
