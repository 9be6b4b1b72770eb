"""One training loop for every model: seeded, resumable, with its history kept as a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dmvae_lib.data.pairing import PairedData
from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import atomic_write
from dmvae_lib.models.base import Terms

Objective = Callable[[nn.Module, dict[str, Tensor], Tensor, float], Terms]


@dataclass(frozen=True)
class Schedule:
    """How long and how to train, with Adam.

    steps: updates in total; batch_size: pairs in each; anneal_steps: updates over which the weight of the KLs
    rises linearly from 0 to 1 (0: it is 1 from the start); log_every: updates per row of the history.
    """

    steps: int
    batch_size: int = 100
    learning_rate: float = 1e-3
    anneal_steps: int = 0
    log_every: int = 20


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
) -> pd.DataFrame:
    """Trains `model` in place and returns the history: one row per `log_every` updates, each term's mean over them.

    directory: keeps `checkpoint.pt` there; a later call with the same arguments goes on from it, and on the CPU
        ends with the weights and history of a run that was never interrupted.
    objective: (model, batch, labels, beta) -> Terms.

    Dropout and latent samples draw from torch's global generators, seeded here and restored to the caller afterwards.
    Raises DMVAEError when a term is not finite, naming step and term; the last good checkpoint stays.
    """
    device = resolve_device(device)
    checkpoint = Path(directory) / "checkpoint.pt" if directory is not None else None
    model.to(device).train()
    data = data.to(device)
    labels = data.labels
    optimiser = torch.optim.Adam(model.parameters(), schedule.learning_rate)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        step, rows = 0, list[dict[str, float]]()
        if checkpoint is not None and checkpoint.exists():
            step, rows = _restore(checkpoint, model, optimiser, device)
        stream = batches(data, schedule.batch_size, seed, step)
        pending: list[dict[str, Tensor]] = []
        saved = time.monotonic()
        bar = tqdm(total=schedule.steps, initial=step, desc=description, unit="step", leave=False)
        with bar:
            while step < schedule.steps:
                rows_of_batch = next(stream)
                beta = min(1.0, (step + 1) / schedule.anneal_steps) if schedule.anneal_steps else 1.0
                terms = objective(model, data.batch(rows_of_batch), labels[rows_of_batch], beta)
                optimiser.zero_grad(set_to_none=True)
                terms.total.backward()
                optimiser.step()
                step += 1
                pending.append({"total": terms.total.detach(), **{k: v.detach() for k, v in terms.parts.items()}})
                if len(pending) == schedule.log_every or step == schedule.steps:
                    rows.append(_summary(pending, step))
                    bar.update(len(pending))
                    rate = bar.format_dict["rate"] or 0.0
                    bar.set_postfix_str(f"loss {rows[-1]['total']:.1f}, {rate * schedule.batch_size:.0f} pairs/s")
                    pending = []
                    if checkpoint is not None and time.monotonic() - saved > checkpoint_seconds:
                        _save(checkpoint, step, rows, model, optimiser, device)
                        saved = time.monotonic()
    model.eval()
    return pd.DataFrame(rows).set_index("step")


def _summary(pending: list[dict[str, Tensor]], step: int) -> dict[str, float]:
    """The mean of each term over the pending steps; read from the device once for all of them."""
    names = list(pending[0])
    values = torch.stack([torch.stack([row[name] for name in names]) for row in pending]).double().cpu()
    finite = values.isfinite()
    if not finite.all():
        first = int((~finite).any(1).nonzero()[0])
        bad = ", ".join(name for name, good in zip(names, finite[first]) if not good)
        raise DMVAEError(
            f"step {step - len(pending) + first + 1}: not finite: {bad}. A checkpoint from before, if one was written, is kept; "
            "lower the learning rate, or look at the data and likelihood of that term."
        )
    return {"step": step, **dict(zip(names, values.mean(0).tolist()))}


def _save(path: Path, step: int, rows: list, model: nn.Module, optimiser, device: torch.device) -> None:
    state = {
        "step": step,
        "history": rows,
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "cpu_generator": torch.get_rng_state(),
        "cuda_generator": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    with atomic_write(path) as temporary, open(temporary, "wb") as file:  # a handle: torch hides a full disk's errno
        torch.save(state, file)


def _restore(path: Path, model: nn.Module, optimiser, device: torch.device) -> tuple[int, list]:
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["cpu_generator"].cpu())
        if state["cuda_generator"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_generator"].cpu(), device)
    except Exception as error:  # a truncated archive, another model's weights: torch raises many kinds
        raise DMVAEError(
            f"checkpoint {path} cannot be read ({type(error).__name__}: {str(error)[:200]}); "
            "delete it to train this run anew."
        ) from error
    return state["step"], state["history"]
