"""One training loop for every model: seeded, resumable, with its history kept as a table."""

from __future__ import annotations

import io
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dmvae_lib.data.pairing import PairedData
from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import read_sealed, write_sealed
from dmvae_lib.models.base import Terms

Objective = Callable[[nn.Module, dict[str, Tensor], Tensor, float], Terms]


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
) -> pd.DataFrame:
    """Trains `model` in place and returns the history: one row per `log_every` updates, each term's mean over them.

    directory: keeps `checkpoint.pt` there; a later call with the same arguments goes on from it, and on the CPU
        ends with the weights and history of a run that was never interrupted. An interrupt (Ctrl-C, a notebook's stop
        button) or SIGTERM then waits for the end of the history's row, so that nothing is lost; a second does not.
    objective: (model, batch, labels, beta) -> Terms.
    identity: what else makes this run this one, beside schedule, seed and data; another's checkpoint is refused.

    Dropout and latent samples draw from torch's global generators, seeded here and restored to the caller afterwards.
    `history.attrs["seconds"]` is the time all parts of the run took. Raises DMVAEError when a term or a weight is not
    finite, naming step and term, and for a checkpoint that is damaged or another run's; the last good checkpoint stays.
    """
    device = resolve_device(device)
    checkpoint = Path(directory) / "checkpoint.pt" if directory is not None else None
    about = {"schedule": asdict(schedule), "seed": seed, "identity": identity}
    if checkpoint is not None:
        about["data"] = data.fingerprint
    model.to(device).train()
    data = data.to(device)
    labels = data.labels
    optimiser = torch.optim.Adam(model.parameters(), schedule.learning_rate, fused=True)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        step, before, begun = 0, 0.0, time.monotonic()
        rows: list[dict[str, float]] = []
        if checkpoint is not None and checkpoint.exists():
            step, rows, before = _restore(checkpoint, about, model, optimiser, device)
        stream = batches(data, schedule.batch_size, seed, step)
        pending: list[dict[str, Tensor]] = []
        saved = time.monotonic()
        bar = tqdm(total=schedule.steps, initial=step, desc=description, unit="step", leave=False)
        with bar, _interrupts_kept(checkpoint is not None) as interrupts:
            while step < schedule.steps:
                rows_of_batch = next(stream)
                beta = min(1.0, (step + 1) / schedule.anneal_steps) if schedule.anneal_steps else 1.0
                optimiser.zero_grad(set_to_none=True)
                logged: dict[str, Tensor] = {}
                for part in rows_of_batch.chunk(schedule.chunks):
                    terms, share = (
                        objective(model, data.batch(part), labels[part], beta),
                        len(part) / len(rows_of_batch),
                    )
                    (share * terms.total).backward()
                    for name, value in {"total": terms.total, **terms.parts}.items():
                        logged[name] = logged.get(name, 0.0) + share * value.detach()
                optimiser.step()
                step += 1
                pending.append(logged)
                if len(pending) == schedule.log_every or step == schedule.steps:
                    rows.append(_summary(pending, step))
                    bar.update(len(pending))
                    rate = bar.format_dict["rate"] or 0.0
                    bar.set_postfix_str(f"loss {rows[-1]['total']:.1f}, {rate * schedule.batch_size:.0f} pairs/s")
                    pending = []
                    if checkpoint is not None and (interrupts or time.monotonic() - saved > checkpoint_seconds):
                        seconds = before + time.monotonic() - begun
                        _save(checkpoint, about, step, rows, seconds, model, optimiser, device)
                        saved = time.monotonic()
                    if interrupts:
                        break
        if step < schedule.steps:
            raise KeyboardInterrupt(f"stopped after update {step}, which is in {checkpoint}")
    _check_weights(model, step)
    model.eval()
    history = pd.DataFrame(rows).set_index("step")
    history.attrs["seconds"] = before + time.monotonic() - begun
    return history


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


def _summary(pending: list[dict[str, Tensor]], step: int) -> dict[str, float]:
    """The mean of each term over the pending steps; read from the device once for all of them."""
    names = list(pending[0])
    values = torch.stack([torch.stack([row[name] for name in names]) for row in pending]).double().cpu()
    finite = values.isfinite()
    if not finite.all():
        first = int((~finite).any(1).nonzero()[0])
        bad = ", ".join(name for name, good in zip(names, finite[first]) if not good)
        raise DMVAEError(
            f"step {step - len(pending) + first + 1}: not finite: {bad}. A checkpoint from before, if one was written, is "
            "kept; lower the learning rate, or look at the data and likelihood of that term and at the gradient of the "
            "step before."
        )
    return {"step": step, **dict(zip(names, values.mean(0).tolist()))}


def _check_weights(model: nn.Module, step: int) -> None:
    """Adam turns a gradient that is not finite into weights that are not, before any term of the loss can show it."""
    bad = [name for name, values in model.named_parameters() if not values.isfinite().all()]
    if bad:
        raise DMVAEError(
            f"step {step}: the loss is finite, but {len(bad)} weights are not, first {bad[0]}: a gradient was not. A "
            "checkpoint from before, if one was written, is kept; lower the learning rate, or look at the objective."
        )


def _save(path: Path, about: dict, step: int, rows: list, seconds: float, model: nn.Module, optimiser, device) -> None:
    _check_weights(model, step)
    state = {
        "about": about,
        "step": step,
        "history": rows,
        "seconds": seconds,
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "cpu_generator": torch.get_rng_state(),
        "cuda_generator": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_sealed(path, buffer.getvalue())


def _restore(path: Path, about: dict, model: nn.Module, optimiser, device: torch.device) -> tuple[int, list, float]:
    repair = "Delete it to train this run anew."
    content = read_sealed(path, f"The checkpoint cannot be used. {repair}")
    try:
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        if state["about"] != about:
            different = ", ".join(key for key in about if state["about"].get(key) != about[key])
            raise DMVAEError(f"it is of a run with another {different}")
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["cpu_generator"].cpu())
        if state["cuda_generator"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_generator"].cpu(), device)
    except Exception as error:  # another model's weights, another version's checkpoint: torch raises many kinds
        raise DMVAEError(
            f"checkpoint {path} cannot be used ({type(error).__name__}: {str(error)[:200]}). {repair}"
        ) from error
    return state["step"], state["history"], state["seconds"]
