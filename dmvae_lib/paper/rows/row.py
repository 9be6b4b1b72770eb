"""`Row`: a line of the paper's tables as data: how its model is built, trained and evaluated."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from torch import nn

from dmvae_lib.errors import DMVAEError
from dmvae_lib.pairing import PairedData
from dmvae_lib.paper.profiles import Profile
from dmvae_lib.training import Objective, Schedule, model_objective

if TYPE_CHECKING:
    from dmvae_lib.paper.data import DataSet, Splits


def train_pairs(splits: Splits) -> PairedData:
    """What most rows are trained on: all training pairs."""
    return splits.train


@dataclass(frozen=True)
class Row:
    """One row of a table. Its functions are a module's own, so that workers of other processes find them.

    name: unique, and fit for a file's name; title: as the table writes it.
    build(data, splits, **arguments): the model, with fresh weights from torch's global generator.
    schedule(profile): its budget. objective: what is minimised. evaluate(run):
        {"scores": {measure: share}, ...}, as JSON takes it; the rest is kept in the entry as it is.
    options: arguments of `build`; from_profile: the profile's fields that it takes too, by name. An option goes before
        the profile's value. `weights`, lambda of Eq. 3, come from the data set where `build` takes them.
    select(splits): what it is trained on. fit(model, pairs, seed): in place of training by gradients.
    version: raised when the row's mathematics changes, so that its runs are trained again. So does whatever else is in
        `config`; what the row's functions do is not, and belongs into the name or the version.

    Raises DMVAEError for a name unfit for a file, and for options that `build` does not take or lacks.
    """

    name: str
    title: str
    data: DataSet
    build: Callable[..., nn.Module]
    schedule: Callable[[Profile], Schedule]
    evaluate: Callable[[Any], dict]
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    from_profile: tuple[str, ...] = ()
    objective: Objective = model_objective
    select: Callable[[Splits], PairedData] = train_pairs
    fit: Callable[[nn.Module, PairedData, int], object] | None = None
    version: int = 1

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.name):
            raise DMVAEError(f"row {self.name!r}: expected a name of a-z, 0-9, - and ., which becomes a file's.")
        if unknown := set(self.from_profile) - {part.name for part in fields(Profile)}:
            raise DMVAEError(f"row {self.name!r}: a profile has no {', '.join(sorted(unknown))}.")
        takes = self._build_takes()
        given = {*self.options, *self.from_profile}
        if unused := given - takes.keys():
            raise DMVAEError(
                f"row {self.name!r}: {self.build.__name__} does not use {', '.join(sorted(unused))}; "
                f"its options are {', '.join(takes)}."
            )
        needed = {name for name, part in takes.items() if part.default is part.empty} - {"weights"}
        if lacking := [name for name in takes if name in needed - given]:
            raise DMVAEError(f"row {self.name!r}: {self.build.__name__} needs {', '.join(lacking)}; add it to options.")

    def _build_takes(self) -> dict[str, inspect.Parameter]:
        _, _, *rest = inspect.signature(self.build).parameters.values()
        return {parameter.name: parameter for parameter in rest}

    def arguments(self, profile: Profile) -> dict[str, Any]:
        """What `build` takes beside data set and splits. Raises DMVAEError for a source without weights."""
        given = {name: getattr(profile, name) for name in self.from_profile} | dict(self.options)
        if "weights" in self._build_takes() and "weights" not in given:
            if profile.source not in self.data.weights:
                raise DMVAEError(
                    f"row {self.name!r}: data set {self.data.name!r} has no weights (lambda of Eq. 3) for source "
                    f"{profile.source!r}; add them to the data set, or to the row's options."
                )
            given["weights"] = dict(self.data.weights[profile.source])
        return given

    def model(self, splits: Splits, profile: Profile) -> nn.Module:
        """A new model; its `about`, which `save` keeps, has all that `pretrained` needs to build it again."""
        arguments = self.arguments(profile)
        model = self.build(self.data, splits, **arguments)
        shapes = {name: list(items.shape[1:]) for name, items in splits.train.items.items()}
        labels = splits.train.labels
        classes = [] if labels is None else labels.unique().tolist()
        about = {"row": self.name, "arguments": arguments, "shapes": shapes, "classes": classes}
        # What prepares data of one's own for the model: the flowers' feature networks and their scale.
        about["facts"] = {name: value for name, value in splits.facts.items() if isinstance(value, (str, float))}
        model.about = json.loads(json.dumps(about))
        return model

    def config(self, profile: Profile, seed: int) -> dict[str, Any]:
        """All that decides a run, as JSON gives it back; what it is trained on has a fingerprint beside it.

        The precision is, as device and threads are, how a run was made, not what it is: its entry has it there.
        """
        schedule = asdict(self.schedule(profile))
        del schedule["precision"]
        about = {"row": self.name, "version": self.version, "seed": seed, "data": self.data.name}
        about |= {"source": profile.source, "permutations": profile.permutations}
        about |= {"arguments": self.arguments(profile), "schedule": schedule}
        return json.loads(json.dumps(about))
