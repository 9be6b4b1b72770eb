"""One training loop for every model: seeded, resumable, its history kept as a table."""

from __future__ import annotations

import io
import math
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import read_sealed, write_sealed
from dmvae_lib.models.base import Batch, Terms
from dmvae_lib.pairing import PairedData

if TYPE_CHECKING:
    import pandas as pd

NOT_FINITE = (
    "A checkpoint from before, if one was written, is kept; lower the learning rate, standardise the data, or look at "
    "the likelihood or objective, and the gradient of the step before."
)
Objective = Callable[[nn.Module, Batch, Tensor | None, Mapping[str, Tensor] | None, float], Terms]


@dataclass(frozen=True)
class Schedule:
    """How long and how to train, with Adam.

    steps: updates in total.
    batch_size: observations (pairs, tuples) in each update.
    learning_rate: Adam's; its other constants are PyTorch's.
    anneal_steps: updates over which the weight of the KLs rises linearly to 1; 0: it is 1 from the start.
    log_every: updates per row of the history, which holds each term's mean over them.
    chunks: parts of the batch that go through the model one after the other, to bound the memory; the gradient stays
        the batch's, for an objective that is a mean over observations.
    precision: of the networks, while they train. "float32"; "bfloat16", where weights, optimiser and the objective's
        own arithmetic stay in float32 (torch.autocast); "auto": bfloat16 where the device multiplies it faster (CPUs
        with avx512_bf16 or AMX, GPUs from compute capability 8.0 on), else float32. On a GPU float32 products of
        matrices are TensorFloat32's, inputs rounded to 10 bits, sums in float32; "float32-exact": they are not.

    Raises DMVAEError for counts below 1 (anneal_steps: below 0) and an unknown precision.
    """

    steps: int
    batch_size: int = 100
    learning_rate: float = 1e-3
    anneal_steps: int = 0
    log_every: int = 20
    chunks: int = 1
    precision: str = "float32"

    def __post_init__(self):
        for name, least in (("steps", 1), ("batch_size", 1), ("anneal_steps", 0), ("log_every", 1), ("chunks", 1)):
            if getattr(self, name) < least:
                raise DMVAEError(f"Schedule: {name}={getattr(self, name)}; expected at least {least}.")
        if self.precision not in ("float32", "float32-exact", "bfloat16", "auto"):
            expected = "float32, float32-exact, bfloat16 or auto"
            raise DMVAEError(f"Schedule: precision={self.precision!r}; expected {expected}.")


def model_objective(
    model: nn.Module, batch: Batch, labels: Tensor | None, observed: Mapping[str, Tensor] | None, beta: float
) -> Terms:
    """The model's own loss; labels are not used."""
    return model.loss(batch, observed=observed, beta=beta)


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
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
) -> pd.DataFrame:
    """Trains `model` in place and returns the history: its index is "step", its columns are the terms' flat names.

    A row is the mean of each term over the updates since the row before, or over those among them that had the term.

    directory: keeps `checkpoint.pt` there, written every `checkpoint_seconds` and at the end; a later call with the same
        arguments, or with more steps, goes on from it, in the precision it began with, and on the CPU ends bit for bit
        with the weights of a run that was never interrupted, or had as many steps from the start. Ctrl-C (a notebook's
        stop button) or SIGTERM then waits for the end of the update and a checkpoint, so that nothing is lost; a second
        one does not wait.
    objective: (model, batch, labels (B,) or None, observed {name: (B,) bool} or None, beta) -> Terms.
    identity: what else makes this run this one, beside schedule, seed and data; another's checkpoint is refused.
    evaluate: called with the model in evaluation mode, without gradients, every `evaluate_every` updates (0: never) and
        after the last; a row of the history ends there and has its values as further columns.

    Batches, dropout, latent samples depend on `seed` alone: torch's global generators are seeded here, anew for each
    evaluation, and given back to the caller as they were. history.attrs: "seconds", the time that all parts of the run
    took, and "precision", as `resolve_precision` says.

    Raises DMVAEError for data that are no PairedData, for values in the first batch that the model cannot take (its
    `check`), when a term or a weight is not finite, naming step and term, and for a checkpoint that is damaged or
    another run's; the last good one stays.
    """
    import pandas as pd  # here, because it takes long to import

    if not isinstance(data, PairedData):
        expected = "expected PairedData, as PairedData.aligned({name: tensor or array, ...}) makes it"
        raise DMVAEError(f"train: the data are a {type(data).__name__}; {expected}.")
    device = resolve_device(device)
    model.to(device).train()
    optimiser = torch.optim.Adam(model.parameters(), schedule.learning_rate, fused=True)
    state = _State(model, optimiser, _generators(device), resolve_precision(schedule.precision, device))
    checkpoint = None if directory is None else Path(directory) / "checkpoint.pt"
    if checkpoint is not None:
        plan = {name: value for name, value in asdict(schedule).items() if name not in ("precision", "steps")}
        about: dict[str, Any] = {"schedule": plan}
        about |= {"seed": seed, "identity": identity, "evaluate_every": evaluate_every}
        state.about = about | {"data": data.fingerprint}
        if checkpoint.exists():
            state.restore(checkpoint, device, schedule.steps)
    data = data.to(device)
    labels = data.labels
    order = batches(data, schedule.batch_size, seed, state.step)
    if hasattr(model, "check"):
        first = next(batches(data, schedule.batch_size, seed, state.step))
        model.check(data.batch(first), data.masks(first))

    begun = saved = time.monotonic()
    stop, gpus = False, [device] if device.type == "cuda" else []
    bar = tqdm(total=schedule.steps, initial=state.step, desc=description, unit="step", leave=False)
    with bar, _stop_requests(checkpoint is not None) as requests, torch.random.fork_rng(gpus), ExitStack() as after:
        if gpus:
            after.enter_context(_tensor_float32(state.precision != "float32-exact"))
        state.seed(seed)
        for generator, values in zip(state.generators, state.generator_states):
            generator.set_state(values)
        while state.step < schedule.steps and not stop:
            step = state.step + 1
            beta = min(1.0, step / schedule.anneal_steps) if schedule.anneal_steps else 1.0
            rows = next(order)
            optimiser.zero_grad()
            logged: dict[str, Tensor] = {}
            for part in rows.chunk(schedule.chunks):
                of_part = None if labels is None else labels[part]
                with torch.autocast(device.type, torch.bfloat16, enabled=state.precision == "bfloat16"):
                    terms = objective(model, data.batch(part), of_part, data.masks(part), beta)
                share = len(part) / len(rows)
                (share * terms.total).backward()
                for name, value in terms.flat().items():
                    value = share * value.detach()
                    logged[name] = logged[name] + value if name in logged else value
            optimiser.step()
            state.step = step
            state.pending.append(logged)
            bar.update()

            last = step == schedule.steps
            due = evaluate if last or (evaluate_every > 0 and step % evaluate_every == 0) else None
            if step % schedule.log_every == 0 or due is not None or last:
                row = state.end_row()
                if due is not None:
                    model.eval()
                    with torch.no_grad(), torch.random.fork_rng(gpus):
                        state.seed(seed)
                        row.update({name: float(value) for name, value in due(model).items()})
                    model.train()
                rate = (bar.format_dict["rate"] or 0.0) * schedule.batch_size
                bar.set_postfix_str(f"loss {row['total']:.1f}, {rate:.0f} pairs/s", refresh=False)
            stop = bool(requests)
            if checkpoint is not None and (stop or last or time.monotonic() - saved > checkpoint_seconds):
                state.save(checkpoint, time.monotonic() - begun)
                saved = time.monotonic()
    if state.step < schedule.steps:  # stopped, but whoever handles the signal goes on
        raise KeyboardInterrupt(f"stopped after update {state.step}, which is in {checkpoint}")
    state.check_weights()
    optimiser.zero_grad()
    model.eval()
    history = pd.DataFrame(state.rows).set_index("step")
    history.attrs |= {"seconds": state.seconds + time.monotonic() - begun, "precision": state.precision}
    return history


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


def resolve_precision(precision: str, device: torch.device) -> str:
    """`Schedule.precision`, with what "auto" means on this device: "bfloat16" or "float32"."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    can = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bfloat16" if can.get("avx512_bf16") or can.get("amx_bf16") else "float32"


@contextmanager
def _tensor_float32(allowed: bool) -> Iterator[None]:
    """Whether a GPU's float32 matrix products and convolutions round their inputs; the caller's settings come back."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def batches(data: PairedData, batch_size: int, seed: int, start: int) -> Iterator[Tensor]:
    """Rows of `data`, (batch_size,), for updates start + 1, start + 2, …, on its device.
    Every epoch is a fresh permutation fixed by (seed, epoch); its last, incomplete batch is dropped."""
    per_epoch = len(data) // batch_size
    if per_epoch == 0:
        raise DMVAEError(f"{len(data)} observations are fewer than one batch of {batch_size}; lower batch_size.")
    epoch, position = divmod(start, per_epoch)
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(data), generator=generator).to(data.device)
        yield from order[: per_epoch * batch_size].split(batch_size)[position:]
        epoch, position = epoch + 1, 0


@dataclass
class _State:
    """A training under way, and its checkpoint."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    generators: Sequence[torch.Generator]
    precision: str
    about: dict[str, Any] = field(default_factory=dict)  # whose checkpoint it is
    step: int = 0
    seconds: float = 0.0  # that the parts before this one took
    rows: list[dict[str, float]] = field(default_factory=list)  # the history
    pending: list[dict[str, Tensor]] = field(default_factory=list)  # the terms of the row under way, on the device
    generator_states: Sequence[Tensor] = ()

    def seed(self, seed: int) -> None:
        for generator in self.generators:
            generator.manual_seed(seed)

    def end_row(self) -> dict[str, float]:
        """Appends the mean of each term to the history, over the updates that had it (MVAE draws other subsets at each)."""
        updates = self.read()
        names = dict.fromkeys(name for terms in updates for name in terms)
        means = {name: statistics.fmean(terms[name] for terms in updates if name in terms) for name in names}
        self.rows.append({"step": self.step, **means})
        self.pending = []
        return self.rows[-1]

    def read(self) -> list[dict[str, float]]:
        """The pending terms, for which the device is waited for once. Raises DMVAEError for one that is not finite."""
        values = [value for terms in self.pending for value in terms.values()]
        numbers = iter(torch.stack(values).tolist() if values else [])
        updates = [{name: next(numbers) for name in terms} for terms in self.pending]
        for step, terms in enumerate(updates, self.step - len(updates) + 1):
            if bad := [name for name, value in terms.items() if not math.isfinite(value)]:
                raise DMVAEError(f"step {step}: not finite: {', '.join(bad)}. {NOT_FINITE}")
        return updates

    def check_weights(self) -> None:
        """Adam turns a gradient that is not finite into weights that are not, before any term of the loss can show it."""
        bad = [name for name, values in self.model.named_parameters() if not values.isfinite().all()]
        if bad:
            found = f"the loss is finite, but {len(bad)} weights are not, first {bad[0]}: a gradient was not"
            raise DMVAEError(f"step {self.step}: {found}. {NOT_FINITE}")

    def save(self, path: Path, seconds: float) -> None:
        """Writes the checkpoint, whole or not at all. seconds: that this part has taken."""
        self.read()
        self.check_weights()
        state = {
            **{name: getattr(self, name) for name in ("about", "step", "rows", "pending", "precision")},
            "seconds": self.seconds + seconds,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator_states": [generator.get_state() for generator in self.generators],
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_sealed(path, buffer.getvalue())

    def restore(self, path: Path, device: torch.device, steps: int) -> None:
        """Takes up where the checkpoint left. Raises DMVAEError for one that is damaged, another run's or beyond `steps`."""
        repair = "Delete it to train this run anew."
        content = read_sealed(path, f"The checkpoint cannot be used. {repair}")
        try:
            state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
            if different := [name for name in self.about if state["about"].get(name) != self.about[name]]:
                raise DMVAEError(f"it is of a run with another {', '.join(different)}")
            if state["step"] > steps:
                raise DMVAEError(f"it has {state['step']} updates, more than {steps}")
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.generator_states = [values.cpu() for values in state["generator_states"]]
            for name in ("step", "rows", "pending", "precision", "seconds"):
                setattr(self, name, state[name])
        except Exception as error:  # another model's weights, another version's checkpoint: torch raises many kinds
            why = " ".join(str(error).split())[:200]
            raise DMVAEError(f"checkpoint {path} cannot be used ({type(error).__name__}: {why}). {repair}") from error


def _generators(device: torch.device) -> list[torch.Generator]:
    """Torch's global generators, from which a training on this device draws."""
    if device.type != "cuda":
        return [torch.default_generator]
    torch.cuda.init()
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]


@contextmanager
def _stop_requests(keep: bool) -> Iterator[list[int]]:
    """Signals that ask to stop are listed, and sent again when the block has ended; a second one acts at once.
    Only the main thread gets signals, so elsewhere (a worker's thread) this does nothing."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM) if keep and threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    usual = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        came.append(number)
        restore()
        tqdm.write("Stopping after this update, which a checkpoint keeps; once more to stop at once.", file=sys.stderr)

    try:
        for number in usual:
            signal.signal(number, note)
        yield came
    finally:
        restore()
    if came:
        signal.raise_signal(came[0])
