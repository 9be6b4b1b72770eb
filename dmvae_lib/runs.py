"""Where and how things run, and what is kept of it: runs/ holds every trained model with all that made it."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from itertools import groupby
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
from dmvae_lib.training import Job, Schedule, model_objective, resolve_device, train_side_by_side

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
    def together(self) -> int:
        """How many runs are trained side by side: all seeds on a GPU, one on a CPU, which has no room for a second."""
        return self.seeds if resolve_device(self.device).type == "cuda" else 1

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


@dataclass(frozen=True)
class Training:
    """What makes a run: the model `make()` trained on `data` by `plan` from `seed`, in runs/<profile>/<name>/.

    config: what else made it, as JSON. fit: fits the model in closed form or by EM; it then takes the place of `train`,
    and the history is empty.
    """

    make: Callable[[], nn.Module]
    data: PairedData
    plan: Schedule
    seed: int
    setting: Setting
    name: str
    config: dict
    objective: Callable = model_objective
    fit: Callable[[nn.Module], object] | None = None

    def run(self) -> Run:
        """`train_or_load` of this one."""
        (run,) = train_or_load([self])
        return run


class _Folder:
    """A training's model and the folder that keeps it: <name>/seed<seed>-<configuration's hash>/."""

    def __init__(self, training: Training):
        self.training, seed = training, training.seed
        self.device = resolve_device(training.setting.device)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.model = training.make()
        about = {"name": training.name, "seed": seed, "schedule": asdict(training.plan)}
        about |= {"data": training.data.fingerprint, "library": version("dmvae_lib")}
        parts = {type(part) for part in self.model.modules()}
        made_by = training.fit or training.objective
        about["code"] = source_digests(training.make, made_by, *parts, "dmvae_lib.networks", "dmvae_lib.training")
        self.config = json.loads(json.dumps(training.config | about))  # as run.json will give it back
        self.digest = configuration_hash(self.config)
        place = training.setting.runs / training.setting.profile.name / training.name
        self.path = place / f"seed{seed}-{self.digest}"
        self.weights, self.table = self.path / "model.safetensors", self.path / "history.csv"
        self.record = self.path / "run.json"  # written last: a run without it is not finished

    def __str__(self) -> str:
        return f"{self.training.name}, seed {self.training.seed}"

    def job(self) -> Job:
        made = self.training
        return Job(self.model, made.data, made.plan, made.seed, self.path, made.objective, str(self), self.digest)

    def fitted(self, fit: Callable[[nn.Module], object]) -> pd.DataFrame:
        started = time.monotonic()
        fit(self.model)
        history = pd.DataFrame(index=pd.Index([], name="step"))
        history.attrs["seconds"] = time.monotonic() - started
        return history

    def write(self, history: pd.DataFrame) -> None:
        with atomic_write(self.weights) as temporary:  # safetensors' own writer hides a full disk's errno
            state = {key: value.contiguous() for key, value in self.model.state_dict().items()}
            temporary.write_bytes(save(state))
        with atomic_write(self.table) as temporary:
            history.to_csv(temporary)
        info = {"config": self.config, "hash": self.digest, "seconds": round(history.attrs["seconds"], 1)}
        info |= {"files": {path.name: sha256(path) for path in (self.weights, self.table)}} | provenance(self.device)
        write_json(self.record, seal(info))

    def read(self) -> Run:
        remove(self.path / "checkpoint.pt")
        repair = f"Delete the folder {self.path} to train it anew."
        info = check_seal(read_json(self.record, repair), str(self.record), repair)
        if info["config"] != self.config:
            raise DMVAEError(
                f"{self.record} is another run's, {info['config']['name']} with hash {info['hash']}. {repair}"
            )
        verify(self.weights, info["files"][self.weights.name], repair)
        verify(self.table, info["files"][self.table.name], repair)
        try:
            self.model.load_state_dict(load(self.weights.read_bytes()))
            history = pd.read_csv(self.table, index_col="step")
        except Exception as error:  # verified, so written by another version of safetensors or pandas
            raise DMVAEError(f"run {self.path} cannot be read ({type(error).__name__}: {error}). {repair}") from error
        return Run(self.model.to(self.device).eval(), history, self.path, info)


def train_or_load(trainings: Sequence[Training]) -> list[Run]:
    """The run of each training, of one setting; those that are not there yet are trained side by side.

    A finished run is loaded, an interrupted one goes on from its checkpoint; while one process trains it, others wait.
    The hash in a folder's name covers the configuration, the schedule, the data's fingerprint, the library's version,
    and the source of the model, the training, `make` and `objective` or `fit` (`source_digests`): after a change to any
    of it the run is trained anew in a folder of its own, and the old one stays. Changes to comments, to tables' rows,
    or to what evaluates and reports leave it as it is.

    Raises DMVAEError for a run whose files are not, byte for byte, those that were written.
    """
    folders = [_Folder(training) for training in trainings]
    with ExitStack() as locks:
        for folder in sorted(folders, key=lambda folder: folder.path):
            if not folder.record.exists():
                locks.enter_context(locked(folder.path, f"training {folder}"))
        missing = list({folder.path: folder for folder in folders if not folder.record.exists()}.values())
        for folder in missing:
            remove_leftovers(folder.path)
            if fit := folder.training.fit:
                folder.write(folder.fitted(fit))
        if trained := [folder for folder in missing if not folder.training.fit]:
            histories = train_side_by_side([folder.job() for folder in trained], trained[0].device)
            for folder, history in zip(trained, histories):
                folder.write(history)
    return [folder.read() for folder in folders]


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
    """A piece of work: `training()` says what makes the run, in any process that sees the same folders."""

    name: str
    seed: int
    training: Callable[[], Training]

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    def run(self) -> Run:
        """The run, trained or loaded. Raises DMVAEError that names experiment and seed."""
        (run,) = _run([self])
        return run


def _run(items: Sequence[Item]) -> list[Run]:
    try:
        return train_or_load([item.training() for item in items])
    except (DMVAEError, torch.OutOfMemoryError) as error:
        if len(items) == 1:
            raise DMVAEError(f"{items[0]}: {error}") from error
    runs, failures = [], []  # one after the other, from the checkpoints: the others finish, and what failed is named
    for item in items:
        try:
            runs.append(item.run())
        except DMVAEError as error:
            failures.append(str(error))
    if failures:
        raise DMVAEError("\n".join(failures))
    return runs


def run_items(items: Sequence[Item], scheduler: str | None = None, together: int = 1) -> dict[tuple[str, int], Run]:
    """Every item's run, by name and seed: trained here, or by `cluster.train`, then loaded here.

    together: so many seeds of one name are trained side by side, which fills a GPU.
    """
    if scheduler:
        from dmvae_lib import cluster

        cluster.train(items, scheduler)
    runs: dict[tuple[str, int], Run] = {}
    with tqdm(total=len(items), desc="runs", unit="run", leave=False, disable=len(items) == 1) as bar:
        for _, of_name in groupby(items, key=lambda item: item.name):
            seeds = list(of_name)
            for group in (seeds[first : first + together] for first in range(0, len(seeds), together)):
                runs |= {(item.name, item.seed): run for item, run in zip(group, _run(group))}
                bar.update(len(group))
    return runs
