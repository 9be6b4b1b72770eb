"""One training loop for every model: seeded, resumable, several side by side, its history kept as a table."""

from __future__ import annotations

import io
import math
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dmvae_lib.data.pairing import PairedData
from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import read_sealed, write_sealed
from dmvae_lib.models.base import Terms

Objective = Callable[[nn.Module, dict[str, Tensor], Tensor, float], Terms]
Logged = tuple[tuple[str, ...], Tensor]  # an update's terms: their names, their values (T,)


@dataclass(frozen=True)
class Schedule:
    """How long and how to train, with Adam.

    steps: updates in total; batch_size: pairs in each; anneal_steps: updates over which the weight of the KLs
    rises linearly from 0 to 1 (0: it is 1 from the start); log_every: updates per row of the history; chunks: parts of
    the batch that go through the model one after the other, to bound the memory; the gradient stays the batch's, for
    an objective that is a mean over pairs.
    """

    steps: int
    batch_size: int = 100
    learning_rate: float = 1e-3
    anneal_steps: int = 0
    log_every: int = 20
    chunks: int = 1


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" is the first GPU if there is one, else the CPU. Raises DMVAEError for a device this machine lacks."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DMVAEError(
            f"device {device!r} cannot be used here ({str(error).splitlines()[0]}); "
            "give 'auto', 'cpu', or an accelerator that torch sees, such as 'cuda:0'."
        ) from None
    return resolved


def model_objective(model: nn.Module, batch: dict[str, Tensor], labels: Tensor, beta: float) -> Terms:
    """The model's own loss; labels are not used."""
    return model.loss(batch, beta=beta)


def batches(data: PairedData, batch_size: int, seed: int, start: int) -> Iterator[Tensor]:
    """Rows of `data` for steps start, start + 1, …: every epoch is a fresh permutation fixed by (seed, epoch).

    The last, incomplete batch of an epoch is dropped.
    """
    per_epoch = len(data) // batch_size
    if per_epoch == 0:
        raise DMVAEError(f"the data holds {len(data)} pairs, fewer than one batch of {batch_size}.")
    step, order = start, None
    while True:
        epoch, position = divmod(step, per_epoch)
        if order is None or position == 0:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(len(data), generator=generator).to(data.labels.device)
        yield order[position * batch_size : (position + 1) * batch_size]
        step += 1


@dataclass(frozen=True)
class Job:
    """A model to train, and what on: `train`'s parameters of the same names."""

    model: nn.Module
    data: PairedData
    schedule: Schedule
    seed: int = 0
    directory: str | Path | None = None
    objective: Objective = model_objective
    description: str = "training"
    identity: str = ""


def train(
    model: nn.Module,
    data: PairedData,
    schedule: Schedule,
    seed: int = 0,
    device: str | torch.device = "auto",
    directory: str | Path | None = None,
    objective: Objective = model_objective,
    description: str = "training",
    checkpoint_seconds: float = 30.0,
    identity: str = "",
    capture: bool = True,
) -> pd.DataFrame:
    """Trains `model` in place and returns the history: one row per `log_every` updates, each term's mean over them.

    directory: keeps `checkpoint.pt` there; a later call with the same arguments goes on from it, and on the CPU
        ends with the weights and history of a run that was never interrupted. An interrupt (Ctrl-C, a notebook's stop
        button) or SIGTERM then waits for the end of the history's row, so that nothing is lost; a second does not.
    objective: (model, batch, labels, beta) -> Terms.
    identity: what else makes this run this one, beside schedule, seed and data; another's checkpoint is refused.
    capture: on a GPU, make the update one CUDA graph (`_Lane`) where that is possible. The objective is then called for
        the first few updates alone, with beta as a tensor: an objective with a state of its own needs capture=False.

    Dropout and latent samples draw from torch's global generators, seeded here and restored to the caller afterwards.
    `history.attrs["seconds"]` is the time all parts of the run took. Raises DMVAEError when a term or a weight is not
    finite, naming step and term, and for a checkpoint that is damaged or another run's; the last good checkpoint stays.
    """
    job = Job(model, data, schedule, seed, directory, objective, description, identity)
    (history,) = train_side_by_side([job], device, checkpoint_seconds, capture)
    return history


def train_side_by_side(
    jobs: Sequence[Job],
    device: str | torch.device = "auto",
    checkpoint_seconds: float = 30.0,
    capture: bool = True,
) -> list[pd.DataFrame]:
    """`train` for several jobs at once, an update of each in turn, so that a GPU has always one of them at hand.

    Each has random numbers, a stream and a checkpoint of its own, and becomes what it would alone; `seconds` is its
    share of the time. Parameters and errors as of `train`.
    """
    device = resolve_device(device)
    placed = {id(job.data): job.data.to(device) for job in jobs}
    begun = time.monotonic()
    lanes = [_Lane(job, placed[id(job.data)], device, capture) for job in jobs]
    running = [lane for lane in lanes if not lane.finished]
    names = " and ".join(dict.fromkeys(job.description for job in jobs))
    total, initial = sum(job.schedule.steps for job in jobs), sum(lane.step for lane in lanes)
    bar = tqdm(total=total, initial=initial, desc=names, unit="step", leave=False)
    try:
        with bar, _interrupts_kept(any(lane.checkpoint for lane in lanes)) as interrupts:
            while running:
                for lane in running:
                    lane.update()
                stop, ended = bool(interrupts), [lane for lane in running if lane.row_is_full()]
                for lane in ended:
                    bar.update(len(lane.pending))
                    lane.end_row()
                    rate = (bar.format_dict["rate"] or 0.0) * lane.job.schedule.batch_size
                    bar.set_postfix_str(f"loss {lane.rows[-1]['total']:.1f}, {rate:.0f} pairs/s")
                    alone = len(lanes) == 1  # else one that is finished waits for the others
                    due = time.monotonic() - lane.saved > checkpoint_seconds or (lane.finished and not alone)
                    if lane.checkpoint and (stop or due):
                        lane.save(lane.checkpoint, (time.monotonic() - begun) / len(jobs))
                running = [lane for lane in running if not (lane.finished or (stop and lane in ended))]
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # nothing is freed that a stream still works on
    for lane in lanes:
        if not lane.finished:
            raise KeyboardInterrupt(f"stopped after update {lane.step}, which is in {lane.checkpoint}")
    return [lane.history((time.monotonic() - begun) / len(jobs)) for lane in lanes]


class _Randomness:
    """torch's global generators in a state of their own inside a `with` block, and in the caller's after it.

    A CUDA generator is exchanged as an object: a graph goes on drawing from the one that it was captured with. That of
    another accelerator is seeded, and shared.
    """

    def __init__(self, seed: int, device: torch.device):
        self.cpu = torch.Generator().manual_seed(seed).get_state()
        self.cuda: Any = None  # torch.Generator
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self.default: Any = torch.cuda.default_generators[index]
            self.cuda = self.default.clone_state()
            self.cuda.manual_seed(seed)
        elif device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)

    def __enter__(self) -> None:
        self.outside = torch.get_rng_state()
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            self.outside_cuda = self.default.graphsafe_get_state()
            self.default.graphsafe_set_state(self.cuda)

    def __exit__(self, *_: object) -> None:
        self.cpu = torch.get_rng_state()
        torch.set_rng_state(self.outside)
        if self.cuda is not None:
            self.default.graphsafe_set_state(self.outside_cuda)

    def state(self) -> dict[str, Tensor | None]:
        """Of the CPU's and the GPU's generator."""
        return {"cpu_generator": self.cpu, "cuda_generator": None if self.cuda is None else self.cuda.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises RuntimeError for what is no generator's state."""
        self.cpu = torch.Generator().set_state(state["cpu_generator"].cpu()).get_state()
        if self.cuda is not None and state["cuda_generator"] is not None:
            self.cuda.set_state(state["cuda_generator"].cpu())


class _Lane:
    """A job under way: model, optimiser, random numbers, history.

    On a GPU, updates after the first few are replays of one CUDA graph: gathering the batch, forward and backward pass
    and the optimiser's step, launched as a whole. That is done if an update neither waits for the device nor draws from
    a generator of the CPU, and if the first replay does what the plain update does from the same state. Only the first
    update then looks at the values of its batch.
    """

    def __init__(self, job: Job, data: PairedData, device: torch.device, capture: bool):
        self.job, self.data, self.labels, self.device = job, data, data.labels, device
        self.capture = capture and device.type == "cuda"
        self.model = job.model.to(device).train()
        self.optimiser = torch.optim.Adam(self.model.parameters(), job.schedule.learning_rate, fused=True)
        self.random = _Randomness(job.seed, device)
        self.checkpoint = Path(job.directory) / "checkpoint.pt" if job.directory is not None else None
        self.about = {"schedule": asdict(job.schedule), "seed": job.seed, "identity": job.identity}
        self.step, self.before = 0, 0.0
        self.rows: list[dict[str, float]] = []
        if self.checkpoint is not None:
            self.about["data"] = job.data.fingerprint
            if self.checkpoint.exists():
                _restore(self.checkpoint, self)
        self.batches = batches(data, job.schedule.batch_size, job.seed, self.step)
        self.pending: list[Logged] = []
        self.saved = time.monotonic()
        self.updates, self.ready = 0, False
        self.graph: Any = None  # torch.cuda.CUDAGraph
        self.stream: Any = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def on_stream(self) -> AbstractContextManager:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    @property
    def finished(self) -> bool:
        return self.step >= self.job.schedule.steps

    def row_is_full(self) -> bool:
        return len(self.pending) == self.job.schedule.log_every or self.finished

    def update(self) -> None:
        """The next update; on a GPU it is only enqueued."""
        anneal = self.job.schedule.anneal_steps
        beta = min(1.0, (self.step + 1) / anneal) if anneal else 1.0
        with self.on_stream():
            rows = next(self.batches)
            if self.graph is not None:
                logged = self._replay(rows, beta)
            else:
                with self.random:
                    logged = (self._captured if self.ready else self._watched)(rows, beta)
        self.pending.append(logged)
        self.step += 1

    def _plain(self, rows: Tensor, beta: float | Tensor) -> Logged:
        self.optimiser.zero_grad(set_to_none=True)
        logged: dict[str, Tensor] = {}
        for part in rows.chunk(self.job.schedule.chunks):
            terms = self.job.objective(self.model, self.data.batch(part), self.labels[part], beta)
            share = len(part) / len(rows)
            (share * terms.total).backward()
            for name, value in {"total": terms.total, **terms.parts}.items():
                logged[name] = logged.get(name, 0.0) + share * value.detach()
        self.optimiser.step()
        return tuple(logged), torch.stack(list(logged.values()))

    def _watched(self, rows: Tensor, beta: float) -> Logged:
        """A plain update; on a GPU the second one finds out whether a graph could do it."""
        self.updates += 1
        if not (self.capture and self.updates == 2):
            return self._plain(rows, beta)
        drawn = _cpu_generators()
        with _not_waiting() as waits:
            logged = self._plain(rows, torch.full((), beta, device=self.device))
        self.ready = not waits and drawn == _cpu_generators()
        return logged

    def _captured(self, rows: Tensor, beta: float) -> Logged:
        """This update as the first replay of a graph, or as the plain one where that fails or differs."""
        weights, changed = list(self.model.parameters()), self._changed()
        start, drawn = [value.detach().clone() for value in changed], self.random.cuda.get_state()
        expected = self._plain(rows, beta)
        if len(self._changed()) > len(changed):  # state made inside a graph would be made anew by every replay
            return expected
        plain, then = [value.detach().clone() for value in changed], self.random.cuda.get_state()
        _copy(start, changed)
        self.random.cuda.set_state(drawn)
        self.static_rows, self.static_beta = rows.clone(), torch.full((), beta, device=self.device)
        try:
            self.graph = self._capture()
            logged = self._replay(rows, beta)
            if logged[0] == expected[0] and torch.allclose(logged[1], expected[1], 1e-2, 1e-2):
                if same_update(weights, start, plain):
                    return logged
            why = "a replay does something else"
        except (RuntimeError, DMVAEError) as error:
            why = str(error).partition("\n")[0]
        tqdm.write(f"{self.job.description}: updates are not captured as a graph ({why}).", file=sys.stderr)
        self.graph, self.ready = None, False
        _copy(plain, changed)
        self.random.cuda.set_state(then)
        return expected

    def _capture(self) -> Any:
        graph, (group,) = torch.cuda.CUDAGraph(), self.optimiser.param_groups
        group["capturable"] = True
        try:
            with torch.cuda.graph(graph, stream=self.stream), _not_waiting():
                self.logged = self._plain(self.static_rows, self.static_beta)
        finally:
            group["capturable"] = False
        return graph

    def _changed(self) -> list[Tensor]:
        """All that an update changes."""
        state = [value for values in self.optimiser.state.values() for value in values.values()]
        return [*self.model.parameters(), *self.model.buffers(), *state]

    def _replay(self, rows: Tensor, beta: float) -> Logged:
        self.static_rows.copy_(rows)
        self.static_beta.fill_(beta)
        self.graph.replay()
        names, values = self.logged
        return names, values.clone()

    def end_row(self) -> None:
        """Turns the pending updates' terms into a row of the history, which waits for the device."""
        with self.on_stream():
            self.rows.append(_summary(self.pending, self.step))
        self.pending = []

    def save(self, path: Path, seconds: float) -> None:
        with self.on_stream():
            _save(path, self, self.before + seconds)
        self.saved = time.monotonic()

    def history(self, seconds: float) -> pd.DataFrame:
        """The table of all rows; the model is then ready to be used."""
        _check_weights(self.model, self.step)
        self.model.eval()
        self.optimiser.zero_grad(set_to_none=True)
        history = pd.DataFrame(self.rows).set_index("step")
        history.attrs["seconds"] = self.before + seconds
        return history


def same_update(weights: Sequence[Tensor], start: Sequence[Tensor], plain: Sequence[Tensor]) -> bool:
    """Whether weights went from `start` to where they went in `plain`, but for 5 % of the way."""
    way, apart = (sum((end - one).square().sum() for end, one in zip(plain, ones)) for ones in (start, weights))
    return bool(apart <= 0.05**2 * way)


def _cpu_generators() -> tuple:
    """The states of all from which Python code may draw."""
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state(legacy=False))


def _copy(values: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for value, target in zip(values, into):
            target.copy_(value)


@contextmanager
def _not_waiting() -> Iterator[list[warnings.WarningMessage]]:
    """Lists the warnings of operations that wait for the GPU; checks that would wait are left out."""
    waits: list[warnings.WarningMessage] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in seen:
        if "called a synchronizing" in str(warning.message):
            waits.append(warning)
        elif "prototype feature" not in str(warning.message):  # said of the mode itself
            warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)


@contextmanager
def _interrupts_kept(keep: bool) -> Iterator[list[int]]:
    """Signals that ask to stop are listed, and sent again when the block has ended; a second one acts at once.

    Only the main thread gets signals, so elsewhere (a worker's thread) this does nothing.
    """
    came: list[int] = []
    if not keep or threading.current_thread() is not threading.main_thread():
        yield came
        return

    def note(number: int, frame: object) -> None:
        if came:
            signal.signal(number, usual[number])
            signal.raise_signal(number)
        else:
            came.append(number)
            text = "Stopping at the end of this row of the history, to keep it; once more to stop at once."
            tqdm.write(text, file=sys.stderr)

    usual: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    usual = {number: handler for number, handler in usual.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in usual:
            signal.signal(number, note)
        yield came
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def _summary(pending: Sequence[Logged], step: int) -> dict[str, float]:
    """The mean of each term over the pending updates; read from the device once for all of them."""
    values = torch.cat([values for _, values in pending]).double().cpu().split([len(names) for names, _ in pending])
    updates = [dict(zip(names, one.tolist())) for (names, _), one in zip(pending, values)]
    for number, terms in enumerate(updates, step - len(updates) + 1):
        if bad := [name for name, value in terms.items() if not math.isfinite(value)]:
            raise DMVAEError(
                f"step {number}: not finite: {', '.join(bad)}. A checkpoint from before, if one was written, is kept; "
                "lower the learning rate, or look at the data and likelihood of that term and at the gradient of the "
                "step before."
            )
    return {"step": step, **pd.DataFrame(updates).mean().to_dict()}


def _check_weights(model: nn.Module, step: int) -> None:
    """Adam turns a gradient that is not finite into weights that are not, before any term of the loss can show it."""
    bad = [name for name, values in model.named_parameters() if not values.isfinite().all()]
    if bad:
        raise DMVAEError(
            f"step {step}: the loss is finite, but {len(bad)} weights are not, first {bad[0]}: a gradient was not. A "
            "checkpoint from before, if one was written, is kept; lower the learning rate, or look at the objective."
        )


def _save(path: Path, lane: _Lane, seconds: float) -> None:
    _check_weights(lane.model, lane.step)
    state = {
        "about": lane.about,
        "step": lane.step,
        "history": lane.rows,
        "seconds": seconds,
        "model": lane.model.state_dict(),
        "optimiser": lane.optimiser.state_dict(),
        **lane.random.state(),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_sealed(path, buffer.getvalue())


def _restore(path: Path, lane: _Lane) -> None:
    """Puts the lane where the checkpoint left it."""
    repair = "Delete it to train this run anew."
    content = read_sealed(path, f"The checkpoint cannot be used. {repair}")
    try:
        state = torch.load(io.BytesIO(content), map_location=lane.device, weights_only=True)
        if state["about"] != lane.about:
            different = ", ".join(key for key in lane.about if state["about"].get(key) != lane.about[key])
            raise DMVAEError(f"it is of a run with another {different}")
        lane.model.load_state_dict(state["model"])
        lane.optimiser.load_state_dict(state["optimiser"])
        lane.random.restore(state)
        lane.step, lane.rows, lane.before = state["step"], state["history"], state["seconds"]
    except Exception as error:  # another model's weights, another version's checkpoint: torch raises many kinds
        raise DMVAEError(
            f"checkpoint {path} cannot be used ({type(error).__name__}: {str(error)[:200]}). {repair}"
        ) from error
