"""Where and how things run, and what is kept of it: runs/ holds every trained model with all that made it."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from safetensors.torch import load, save
from torch import nn
from tqdm.auto import tqdm

from dmvae_lib.data.digits import Digits, load_digits
from dmvae_lib.data.pairing import PairedData
from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import (
    atomic_write,
    check_seal,
    locked,
    read_json,
    remove,
    remove_leftovers,
    seal,
    sha256,
    verify,
    write_json,
)
from dmvae_lib.profiles import Profile, get_profile
from dmvae_lib.source import source_digests
from dmvae_lib.training import Schedule, model_objective, resolve_device, train

OPTIONS: dict[str, dict[str, Any]] = {  # of the commands, by the names of `setting`'s parameters
    "profile": {"default": "quick", "help": "smoke, quick, subset or paper; subset@0.05: a share of it"},
    "seeds": {"default": 1, "type": int, "help": "how many seeds: 0, 1, …"},
    "device": {"default": "auto", "help": "auto, cpu, cuda, cuda:1, …"},
    "data": {"default": "data", "help": "folder of the data files"},
}
PACKAGES = ("dmvae_lib", "torch", "torchvision", "transformers", "numpy", "scikit-learn", "pandas", "matplotlib")


@dataclass(frozen=True)
class Setting:
    """Where and how experiments run: the parameters of every notebook.

    evaluation: "test", or "validation" to hold out part of the training data and leave the test data alone.
    """

    profile: Profile
    seeds: int = 1
    device: str = "auto"
    data: Path = Path("data")
    runs: Path = Path("runs")
    results: Path = Path("results")
    evaluation: str = "test"

    @property
    def digits(self) -> Digits:
        """The profile's digits, loaded once per process."""
        return _digits(self.profile.digits, str(self.data), self.evaluation, self.profile.permutations)


def setting(
    profile: str = "quick", seeds: int = 1, device: str = "auto", data: str = "data", evaluation: str = "test"
) -> Setting:
    """The setting of a notebook; relative paths are relative to the project's folder.

    Raises DMVAEError for an unknown profile or device, for no seed, and for values of another kind.
    """
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        raise DMVAEError(f"seeds={seeds!r}; expected how many seeds to run, a whole number of at least 1.")
    if not isinstance(data, (str, Path)) or "\0" in str(data):
        raise DMVAEError(f"data={data!r}; expected the path of the folder that holds the data files.")
    chosen = get_profile(profile)
    resolve_device(device)
    root = project_folder()
    places = {"runs": root / "runs", "results": root / "results" / chosen.name}
    return Setting(chosen, seeds, device, root / data, evaluation=evaluation, **places)


def command_line(description: str | None, *options: str) -> argparse.ArgumentParser:
    """A command's parser, with these of OPTIONS."""
    parser = argparse.ArgumentParser(description=description)
    for name in options:
        parser.add_argument(f"--{name}", **OPTIONS[name])
    return parser


def project_folder() -> Path:
    """The nearest folder, from the working directory upwards, that holds notebooks/ and a Makefile; else here."""
    here = Path.cwd()
    found = (
        folder for folder in (here, *here.parents) if (folder / "notebooks").is_dir() and (folder / "Makefile").exists()
    )
    return next(found, here)


@lru_cache(maxsize=2)
def _digits(source: str, root: str, evaluation: str, permutations: int) -> Digits:
    return load_digits(source, root, evaluation, permutations)


@dataclass(frozen=True)
class Run:
    """A trained model with its history (`train`), its folder, and what made it (`info`, also in run.json)."""

    model: nn.Module
    history: pd.DataFrame
    folder: Path
    info: dict = field(repr=False)


def train_or_load(
    make: Callable[[], nn.Module],
    data: PairedData,
    plan: Schedule,
    seed: int,
    setting: Setting,
    name: str,
    config: dict,
    objective: Callable = model_objective,
    fit: Callable[[nn.Module], object] | None = None,
) -> Run:
    """The model `make()` trained on `data`, in runs/<profile>/<name>/seed<seed>-<configuration's hash>/.

    fit: fits the model in closed form or by EM; it then takes the place of `train`, and the history is empty.

    A finished run is loaded, an interrupted one goes on from its checkpoint; while one process trains it, others wait.
    The hash covers the configuration, the schedule, the data's fingerprint, the library's version, and the source of
    the model, the training, `make` and `objective` or `fit` (`source_digests`): after a change to any of it the run is
    trained anew in a folder of its own, and the old one stays. Changes to comments, to tables' rows, or to what
    evaluates and reports leave it as it is.

    Raises DMVAEError for a run whose files are not, byte for byte, those that were written.
    """
    config = config | {
        "name": name,
        "seed": seed,
        "schedule": asdict(plan),
        "data": data.fingerprint,
        "library": version("dmvae_lib"),
    }
    device = resolve_device(setting.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = make()
    parts = {type(part) for part in model.modules()}
    config["code"] = source_digests(make, fit or objective, *parts, "dmvae_lib.networks", "dmvae_lib.training")
    config = json.loads(json.dumps(config))  # as run.json will give it back
    digest = configuration_hash(config)
    folder = setting.runs / setting.profile.name / name / f"seed{seed}-{digest}"
    weights, table, record = folder / "model.safetensors", folder / "history.csv", folder / "run.json"
    if not record.exists():  # written last: a run without it is not finished
        with locked(folder, f"training {name}, seed {seed}"):
            if not record.exists():
                remove_leftovers(folder)
                started = time.monotonic()
                if fit is None:
                    description = f"{name}, seed {seed}"
                    history = train(model, data, plan, seed, device, folder, objective, description, identity=digest)
                else:
                    fit(model)
                    history = pd.DataFrame(index=pd.Index([], name="step"))
                seconds = history.attrs.get("seconds", time.monotonic() - started)  # of all parts of a resumed run
                with atomic_write(weights) as temporary:  # safetensors' own writer hides a full disk's errno
                    temporary.write_bytes(save({key: value.contiguous() for key, value in model.state_dict().items()}))
                with atomic_write(table) as temporary:
                    history.to_csv(temporary)
                info = {"config": config, "hash": digest, "seconds": round(seconds, 1)}
                info |= {"files": {path.name: sha256(path) for path in (weights, table)}} | provenance(device)
                write_json(record, seal(info))
    remove(folder / "checkpoint.pt")
    repair = f"Delete the folder {folder} to train it anew."
    info = check_seal(read_json(record, repair), str(record), repair)
    if info["config"] != config:
        raise DMVAEError(f"{record} is another run's, {info['config']['name']} with hash {info['hash']}. {repair}")
    verify(weights, info["files"][weights.name], repair)
    verify(table, info["files"][table.name], repair)
    try:
        model.load_state_dict(load(weights.read_bytes()))
        history = pd.read_csv(table, index_col="step")
    except Exception as error:  # verified, so written by another version of safetensors or pandas
        raise DMVAEError(f"run {folder} cannot be read ({type(error).__name__}: {error}). {repair}") from error
    return Run(model.to(device).eval(), history, folder, info)


def configuration_hash(config: dict) -> str:
    """12 hexadecimal digits by which a run's folder and the manifest name its configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def provenance(device: torch.device) -> dict:
    """What an artefact needs beside its configuration to be made again: versions, commit, device, time."""
    return {
        "packages": {package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@lru_cache
def _commit() -> str | None:
    """The commit of the project's checkout, with "+" if it has uncommitted changes to the library."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed package, or no git


def computed_once(path: Path, compute: Callable[[], dict], *source: str | Callable) -> dict:
    """What `compute()` returns, kept as JSON at `path` and read from there the next time.

    It is computed anew when `source`, which computes it (`source_digests`), has changed since. What the path's name
    does not say, and the source does not, must not matter. Raises DMVAEError for a file that is damaged, or was
    put there from elsewhere.
    """
    about = {"about": f"{path.parent.name}/{path.name}", "code": source_digests(*source)}
    if (kept := _kept(path, about)) is None:
        with locked(path.parent, f"computing {path.name}"):
            if (kept := _kept(path, about)) is None:
                kept = seal(about | {"value": compute()})
                write_json(path, kept)
    return kept["value"]


def _kept(path: Path, about: dict) -> dict | None:
    if not path.exists():
        return None
    repair = "Delete it; it is computed anew."
    kept = check_seal(read_json(path, repair), str(path), repair)
    if kept["about"] != about["about"]:
        raise DMVAEError(f"{path} was made as {kept['about']}, for another run or data. {repair}")
    return kept if kept["code"] == about["code"] else None


class Item(NamedTuple):
    """A piece of work, `work()`: trains a run or loads it, in any process that sees the same folders."""

    name: str
    seed: int
    work: Callable[[], Run]

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    def run(self) -> Run:
        """The run. Raises DMVAEError that names experiment and seed."""
        try:
            return self.work()
        except DMVAEError as error:
            raise DMVAEError(f"{self}: {error}") from error


def run_items(items: Sequence[Item], scheduler: str | None = None) -> dict[tuple[str, int], Run]:
    """Every item's run, by name and seed: trained one after the other here, or by `cluster.train`, then loaded here."""
    if scheduler:
        from dmvae_lib import cluster

        cluster.train(items, scheduler)
    bar = tqdm(items, desc="runs", unit="run", leave=False, disable=len(items) == 1)
    return {(item.name, item.seed): item.run() for item in bar}
