"""`make stress`: provokes the faults of long runs on shared machines and of bad files, and counts what is lost.

Held is a fault after which the same numbers come out, or which is refused by a message that names the file; lost is
everything else, and must be nothing. Fault by fault, chosen at random from a seed that is printed.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"

import nbformat
import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from scipy.io import savemat
from torch import nn

from dmvae_lib import DMVAE, DMVAEError, Modality, files, report, reproduce, runs
from dmvae_lib.data import PairedData, digits, features, flowers
from dmvae_lib.profiles import get_profile
from dmvae_lib.training import Schedule, train, train_side_by_side

ROOT = Path(__file__).resolve().parents[1]
LONG, SHORT = Schedule(steps=400, batch_size=8, log_every=4), Schedule(steps=12, batch_size=8, log_every=3)
RUN = ("model.safetensors", "history.csv")  # what must be the same bit for bit


# --- a small run -------------------------------------------------------------------------------------------------


def small_data() -> PairedData:
    generator = torch.Generator().manual_seed(0)
    items = {"a": torch.rand(60, 6, generator=generator), "b": torch.rand(60, 4, generator=generator)}
    return PairedData.pair(items, {name: torch.arange(60) % 5 for name in items}, permutations=3)


def small_model() -> DMVAE:
    def encoder(inputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 8), nn.Dropout(0.1), nn.Linear(8, 6))

    return DMVAE({name: Modality(encoder(n), nn.Linear(3, n), 1) for name, n in {"a": 6, "b": 4}.items()}, shared_dim=2)


def place_of(folder: Path) -> runs.Setting:
    profile = replace(get_profile("smoke"), name="stress", writes_results=True)
    return runs.Setting(profile, device="cpu", runs=folder / "runs", results=folder / "results" / "stress")


def small_training(place: runs.Setting, plan: Schedule = SHORT, seed: int = 0) -> runs.Training:
    return runs.Training(small_model, small_data(), plan, seed, place, "small", {})


def small_run(place: runs.Setting, plan: Schedule = SHORT, seed: int = 0) -> runs.Run:
    return small_training(place, plan, seed).run()


def measure(run: runs.Run) -> dict[str, float]:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        return {"joint": 1 / (1 + run.model.loss(small_data().batch(torch.arange(20))).total.item() ** 2)}


def finished(folder: Path) -> list[bytes]:
    (run,) = [path.parent for path in folder.rglob("run.json")]
    left = [path.name for path in run.iterdir() if path.name not in (*RUN, "run.json", ".lock")]
    return [(run / name).read_bytes() for name in RUN] + left


# --- processes ---------------------------------------------------------------------------------------------------


def start(function: Callable, *arguments) -> int:
    """The id of a forked process that calls the function, and ends with 0, with 3 for a DMVAEError, else with 1."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        runs.train_side_by_side = functools.partial(train_side_by_side, checkpoint_seconds=0)
        function(*arguments)
        code = 0
    except DMVAEError:
        code = 3
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
    finally:
        os._exit(code)


def end(process: int) -> int:
    """The exit status of a process, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run_in(folder: Path, plan: Schedule = LONG) -> None:
    small_run(place_of(folder), plan)


def undisturbed(folder: Path, plan: Schedule) -> list[bytes]:
    assert end(start(run_in, folder, plan)) == 0
    return finished(folder)


# --- faults of processes: each function gives (tried, lost) ---------------------------------------------------------


def kills(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    begun = time.monotonic()
    expected = undisturbed(folder / "undisturbed", LONG)
    whole, lost, round_, killed = time.monotonic() - begun, 0, 0, 0
    while killed < tries:
        place, in_this = folder / str(round_), 0
        while killed < tries or in_this:
            process = start(run_in, place)
            if killed < tries:
                time.sleep(chance.uniform(0, whole / 3))
                os.kill(process, chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            code = end(process)
            killed, in_this = killed + (code != 0), in_this + (code != 0)
            if code == 0:
                break
            if code not in (-signal.SIGKILL, -signal.SIGTERM, 130):
                lost += 1
                break
        lost += in_this if finished(place) != expected else 0
        round_ += 1
    return killed, lost


def kills_at_file_operations(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    expected = undisturbed(folder / "undisturbed", SHORT)

    def killed_at(place: Path, fatal: int) -> None:
        done = 0

        def counted(operation: Callable) -> Callable:
            def call(*arguments):
                nonlocal done
                done += 1
                if done == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return operation(*arguments)

            return call

        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
        run_in(place, SHORT)

    tried = lost = 0
    for fatal in range(1, tries + 1):
        place = folder / str(fatal)
        if end(start(killed_at, place, fatal)) == 0:
            break  # there are no more operations
        tried += 1
        lost += end(start(run_in, place, SHORT)) != 0 or finished(place) != expected
    return tried, lost


def memory_errors(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    expected = undisturbed(folder / "undisturbed", SHORT)
    usual = DMVAE.loss

    def failing(place: Path, fatal: int) -> None:
        calls = 0

        def loss(self, *arguments, **options):
            nonlocal calls
            calls += 1
            if calls == fatal:
                raise MemoryError
            return usual(self, *arguments, **options)

        DMVAE.loss = loss
        try:
            run_in(place, SHORT)
        except MemoryError:
            raise KeyboardInterrupt from None

    lost = 0
    for number in range(tries):
        place = folder / str(number)
        code = end(start(failing, place, chance.randint(1, SHORT.steps)))
        lost += code != 130 or end(start(run_in, place, SHORT)) != 0 or finished(place) != expected
    return tries, lost


def full_disks(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    """A limit on the size of files: a write beyond it fails as on a full disk."""
    expected = undisturbed(folder / "undisturbed", SHORT)

    def limited(place: Path, size: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        run_in(place, SHORT)

    lost = 0
    for number in range(tries):
        place = folder / str(number)
        process = start(run_in, place, SHORT)
        time.sleep(chance.uniform(0, 0.2))
        os.kill(process, signal.SIGKILL)
        end(process)
        before = {path: path.read_bytes() for path in place.rglob("checkpoint.pt")}
        code = end(start(limited, place, chance.randint(1, 4_000)))
        kept = all(path.read_bytes() == content for path, content in before.items() if path.exists())
        right = code == 3 and kept or code == 0
        lost += not right or end(start(run_in, place, SHORT)) != 0 or finished(place) != expected
    return tries, lost


def two_at_once(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    """Three processes, one run; in every second try one of them is killed. The work is done once."""
    expected = undisturbed(folder / "undisturbed", SHORT)

    def noted(place: Path) -> None:
        usual = runs.train_side_by_side

        def noting(*arguments, **options):
            (place / f"trained-{os.getpid()}").touch()
            time.sleep(0.05)  # so that the others come in the middle
            return usual(*arguments, **options)

        runs.train_side_by_side = noting
        run_in(place, SHORT)

    lost = 0
    for number in range(tries):
        place = folder / str(number)
        place.mkdir(parents=True)
        processes = [start(noted, place) for _ in range(3)]
        if number % 2:
            time.sleep(chance.uniform(0, 0.2))
            os.kill(chance.choice(processes), signal.SIGKILL)
        codes = [end(process) for process in processes]
        killed = codes.count(-signal.SIGKILL)
        trained = len(list(place.glob("trained-*")))
        lost += sorted(codes)[killed:] != [0] * (3 - killed) or trained > 1 + killed or finished(place) != expected
    return tries, lost


# --- make reproduce ------------------------------------------------------------------------------------------------

NOTEBOOK = """
import stress
from dmvae_lib.runs import computed_once
from dmvae_lib.report import Results, compare
from pathlib import Path

place = stress.place_of(Path.cwd())
results = Results(place, "01_stress")
runs = [stress.small_run(place, seed=seed) for seed in range(2)]
values = [computed_once(run.folder / "measure.json", lambda: stress.measure(run), stress.measure) for run in runs]
results.table("table1", compare({"DMVAE": values}, {"DMVAE": {"joint": 44.7}}), "Table 1: under stress.", runs)
results.frame("table2", compare({"DMVAE": values[:1]}, {}), "Table 2: under stress.", runs[:1])
"""


def small_project(folder: Path) -> Path:
    (folder / "notebooks").mkdir(parents=True)
    (folder / "Makefile").touch()
    (folder / "README.md").write_text(
        "<!-- results: written by `make reproduce`, do not edit -->\n<!-- end of results -->\n"
    )
    parameters = nbformat.v4.new_code_cell('profile = "quick"', metadata={"tags": ["parameters"]})
    cells = [parameters, nbformat.v4.new_code_cell(NOTEBOOK)]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "3"}})
    nbformat.write(notebook, folder / "notebooks" / "01_stress.ipynb")
    return folder


def checkpointed(place: runs.Setting, seed: int) -> runs.Training:
    """A small training, which writes a checkpoint at every row of its history, in whichever process it runs."""
    runs.train_side_by_side = functools.partial(train_side_by_side, checkpoint_seconds=0)
    return small_training(place, seed=seed)


def train_small(place: runs.Setting, scheduler: str | None) -> None:
    items = [runs.Item("small", seed, functools.partial(checkpointed, place, seed)) for seed in range(2)]
    runs.run_items(items, scheduler)


def reproduce_once(scheduler: str) -> None:
    """In a small project: `make reproduce` with small runs in place of the paper's."""
    reproduce.setting = lambda *_: place_of(Path.cwd())
    reproduce.train_all = train_small
    reproduce.reproduce(argparse.Namespace(**reproduce.DEFAULTS, scheduler=None if scheduler == "none" else scheduler))


def killed_reproductions(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def begin(place: Path, scheduler: str) -> subprocess.Popen:
        command = [sys.executable, str(Path(__file__).resolve()), "--reproduce-once", scheduler]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=place, env=environment, start_new_session=True, **quiet)

    def results(place: Path) -> dict[str, bytes]:
        tables = place.glob("results/stress/table*")
        page = (place / "README.md").read_text() + "".join(report.stale(place / "results" / "stress")["table1"])
        left = {path.name: b"" for path in (place / "results").rglob(".*-*")}
        return {path.name: path.read_bytes() for path in tables} | {"README.md": page.encode()} | left

    begun = time.monotonic()
    process = begin(small_project(folder / "undisturbed"), "none")
    errors = process.communicate()[1]
    assert process.returncode == 0, errors.decode()
    whole, expected = time.monotonic() - begun, results(folder / "undisturbed")
    tried = lost = round_ = 0
    while tried < tries:
        place, in_this = small_project(folder / str(round_)), 0
        round_ += 1
        while True:
            process = begin(place, chance.choice(["none", "local:2"]))
            try:
                process.communicate(timeout=None if tried >= tries else chance.uniform(0.1, 0.9) * whole)
                break
            except subprocess.TimeoutExpired:
                number = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
                # A scheduler signals all of a job's processes, a kernel short of memory one of them.
                (os.killpg if chance.random() < 0.5 else os.kill)(process.pid, number)
                process.communicate()
                killed = process.returncode != 0
                tried, in_this = tried + killed, in_this + killed
        lost += in_this if process.returncode or results(place) != expected else 0
    return tried, lost


# --- corruption ----------------------------------------------------------------------------------------------------


def damage(content: bytes, others: list[bytes], chance: random.Random) -> bytes:
    digits_at = [place for place, byte in enumerate(content) if 48 <= byte < 58]
    kinds = ["truncate", "flip", "flip", "empty", "overwrite"] + ["swap"] * bool(others) + ["digit"] * bool(digits_at)
    match chance.choice(kinds):
        case "truncate":
            return content[: chance.randrange(len(content))]
        case "flip":
            damaged = bytearray(content)
            damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            return bytes(damaged)
        case "digit":  # what turns one number into another, and leaves the file one that can be read
            place = chance.choice(digits_at)
            return (
                content[:place]
                + str((content[place] - 48 + chance.randrange(1, 10)) % 10).encode()
                + content[place + 1 :]
            )
        case "overwrite":
            first = chance.randrange(len(content))
            return content[:first] + bytes(min(512, len(content) - first)) + content[first + 512 :]
        case "swap":
            return chance.choice(others)
    return b""


def corrupted(paths: list[Path], load: Callable[[], object], tries: int, chance: random.Random) -> tuple[int, int]:
    """Damages one of the files, loads, and puts it back. `load` must give the same or raise a DMVAEError with its name."""
    expected, lost, tried = load(), 0, 0
    contents = {path: path.read_bytes() for path in paths}
    while tried < tries:
        path = chance.choice(paths)
        others = [content for content in contents.values() if content != contents[path]]
        content = damage(contents[path], others, chance)
        if content == contents[path]:
            continue
        tried += 1
        path.write_bytes(content)
        try:
            held = load() == expected
        except DMVAEError as error:
            held = path.name in str(error) or str(path.parent) in str(error)
        except Exception:
            held = False
            traceback.print_exc(file=sys.stdout)
        if not held:
            print(f"lost: {path}, {len(content):,} of {len(contents[path]):,} bytes", flush=True)
        lost += not held
        path.write_bytes(contents[path])
    return tried, lost


def corrupted_checkpoints(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    class Stop(Exception):
        pass

    def stopped(model, batch, labels, beta):
        stopped.calls += 1
        if stopped.calls > 8:
            raise Stop
        return model.loss(batch, beta=beta)

    def resumed(seed: int, objective: Callable | None = None) -> tuple:
        torch.manual_seed(seed)
        model, data, place = small_model(), small_data(), folder / str(seed)
        options = {} if objective is None else {"objective": objective}
        history = train(model, data, SHORT, seed, "cpu", place, checkpoint_seconds=0, identity=str(seed), **options)
        return [values.tolist() for values in model.state_dict().values()], history.to_csv()

    checkpoints = {}
    for seed in (0, 1):
        stopped.calls = 0
        try:
            resumed(seed, stopped)
        except Stop:
            checkpoints[seed] = (folder / str(seed) / "checkpoint.pt").read_bytes()

    def load() -> tuple:
        result = resumed(0)
        (folder / "1" / "checkpoint.pt").write_bytes(checkpoints[1])
        return result

    path = folder / "0" / "checkpoint.pt"
    tried = lost = 0
    (folder / "0" / "checkpoint.pt").write_bytes(checkpoints[0])
    for _ in range(tries):  # training on rewrites the checkpoint, so each try starts from the first one
        path.write_bytes(checkpoints[0])
        one = corrupted([path, folder / "1" / "checkpoint.pt"], load, 1, chance)
        tried, lost = tried + one[0], lost + one[1]
    return tried, lost


def corrupted_runs(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    place = place_of(folder)
    made = [small_run(place, seed=seed) for seed in (0, 1)]

    def load() -> list:
        loaded = [small_run(place, seed=seed) for seed in (0, 1)]
        return [
            ([values.tolist() for values in run.model.state_dict().values()], run.history.to_csv(), run.info)
            for run in loaded
        ]

    return corrupted([run.folder / name for run in made for name in (*RUN, "run.json")], load, tries, chance)


def corrupted_evaluations(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    place = place_of(folder)
    made = [small_run(place, seed=seed) for seed in (0, 1)]
    paths = [run.folder / "measure.json" for run in made]

    def load() -> list:
        return [runs.computed_once(path, lambda run=run: measure(run), measure) for path, run in zip(paths, made)]

    load()
    return corrupted(paths, load, tries, chance)


def corrupted_results(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    place = place_of(folder)
    results, made = report.Results(place, "03_table1"), [small_run(place, seed=seed) for seed in (0, 1)]
    for number, run in enumerate(made):
        table = report.compare({"DMVAE": [measure(run)]}, {"DMVAE": {"joint": 44.7}})
        results.table(f"table{number}", table, "A table.", [run])

    def load() -> tuple:
        changed = [why for whys in report.stale(place.results).values() for why in whys]
        if changed:
            raise DMVAEError(", ".join(changed))
        return report.read_manifest(place.results), report._configurations(place.results)

    paths = [path for path in place.results.iterdir() if path.name != ".lock"]
    return corrupted(paths, load, tries, chance)


def corrupted_features(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    features.IMAGE_SHARD = 2
    images = torch.randint(256, (6, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def load() -> list:
        return features.image_features(images, "descriptor", cache=folder, progress=False).tolist()

    load()
    return corrupted(sorted(folder.rglob("*.safetensors")), load, tries, chance)


def corrupted_digits(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    """Files in MNIST's and SVHN's formats, drawn here, with their own checksums in place of the published ones."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (folder / "svhn").mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", 30), ("t10k", 20)):
        header = (0x803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        images = generator.integers(256, size=(count, 28, 28), dtype=np.uint8)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = np.arange(count, dtype=np.uint8) % 10
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            (0x801).to_bytes(4, "big") + count.to_bytes(4, "big") + labels.tobytes()
        )
    for path in raw.iterdir():
        digits.MNIST_SHA256[path.name] = files.sha256(path)
    images = np.zeros((10_000, 32, 32, 3), np.uint8)
    images[:, 0, 0, 0] = generator.integers(256, size=10_000)
    labels = np.arange(10_000, dtype=np.uint8) % 10
    npz = folder / "svhn" / "test_32x32_first10000.npz"
    np.savez_compressed(npz, X=images, y=labels)
    digits.SUBSET_MD5.update({"X": hashlib.md5(images).hexdigest(), "y": hashlib.md5(labels).hexdigest()})

    def load() -> tuple:
        data = digits.load_digits("subset", folder, permutations=1, max_per_class=2)
        return data.train.fingerprint, data.test.fingerprint

    return corrupted([*raw.iterdir(), npz], load, tries, chance)


def corrupted_flowers(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    """Oxford-102's layout with eight images, verified as `load_flowers` does."""
    labels, generator = [3, 3, 1, 4, 1, 2, 4, 2], np.random.default_rng(0)
    captions = folder / "cvpr2016_flowers"
    for number, label in enumerate(labels, 1):
        picture = folder / "flowers-102" / "jpg" / f"image_{number:05}.jpg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(256, size=(20, 20, 3), dtype=np.uint8)).save(picture)
        path = captions / "text_c10" / f"class_{label:05}" / f"image_{number:05}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"flower {number}, caption {line}\n" for line in range(10)))
    for name, members in {"trainclasses": (3, 4), "valclasses": (1,), "testclasses": (2,)}.items():
        (captions / f"{name}.txt").write_text("".join(f"class_{number:05}\n" for number in members))
    (folder / "weights").mkdir()
    save_file({"weight": torch.rand(50)}, folder / "weights" / "squeezenet1_0-imagenet.safetensors")
    mat = folder / "flowers-102" / "imagelabels.mat"
    savemat(mat, {"labels": np.array([labels], dtype=np.uint8)})
    torchvision.datasets.Flowers102._file_dict["label"] = (mat.name, files.md5(mat))
    record = folder / "cache" / "record.sha256"

    def load() -> tuple:
        files.verify_unchanged(folder, flowers.UNPUBLISHED, record)
        found = flowers.load_oxford(folder)
        return found.captions, found.labels.tolist(), [path.read_bytes() for path in found.images]

    load()
    paths = [mat, *folder.glob("flowers-102/jpg/*"), *captions.rglob("*.txt"), *folder.glob("weights/*")]
    return corrupted(paths, load, tries, chance)


def tampered_pairings(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    """One item of one pair is another: refused, or another fingerprint and so another run."""
    data, lost = small_data(), 0
    for _ in range(tries):
        index = {name: values.clone() for name, values in data.index.items()}
        values = index[chance.choice(data.names)]
        row = chance.randrange(len(values))
        values[row] = (int(values[row]) + chance.choice([-200, 1, 5, 60, 200])) % chance.choice([60, 10_000])
        same = all(torch.equal(index[name], data.index[name]) for name in index)
        try:
            lost += PairedData(data.items, data.item_labels, index).fingerprint == data.fingerprint and not same
        except DMVAEError:
            pass
    return tries, lost


# --- downloads and archives ------------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 400
FAULTS = (
    "drop",
    "wrong",
    "longer",
    "page",
    "404",
    "500",
    "redirect",
    "redirect-file",
    "loop",
    "slow",
    "norange",
    "shift",
)


class FaultyServer(BaseHTTPRequestHandler):
    """Serves CONTENT; the path's first part says what goes wrong."""

    def do_GET(self):
        fault, wanted = self.path.strip("/").split("-", 1)[0], self.headers.get("Range")
        first = int(wanted[6:-1]) if wanted and fault != "norange" else 0
        if fault in ("404", "500"):
            return self.send_error(int(fault))
        if fault in ("redirect", "loop"):
            target = {"redirect": "/page", "redirect-file": f"file://{__file__}"}.get(self.path.strip("/"), "/loop")
            self.send_response(302)
            self.send_header("Location", target)
            return self.end_headers()
        if first >= len(CONTENT):
            return self.send_error(416)
        body = CONTENT[first:]
        body = {"wrong": body[:-1] + b"!", "longer": body + b"more", "page": b"<html>log in</html>"}.get(fault, body)
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(body)))
        if first:
            begin = first + 1 if fault == "shift" else first
            self.send_header("Content-Range", f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        if fault == "slow":
            self.wfile.write(body[:1000])
            self.wfile.flush()
            self.server.stopped.wait(3)
        elif fault in ("drop", "norange", "shift"):
            self.wfile.write(body[: self.server.chance.randrange(len(body))])
        else:
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except OSError:  # the client went away
            self.close_connection = True


def downloads(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    """After each fault the file is whole or absent, and a good server then gives it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FaultyServer)
    server.stopped, server.chance, server.daemon_threads = threading.Event(), chance, True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, digest, lost = f"http://127.0.0.1:{server.server_port}", hashlib.sha256(CONTENT).hexdigest(), 0
    for number in range(tries):
        path = folder / str(number) / "file"
        try:
            files.fetch(f"{url}/{FAULTS[number % len(FAULTS)]}", path, digest, timeout=0.3, attempts=2)
            held = path.read_bytes() == CONTENT
        except DMVAEError:
            held = not path.exists()
        for _ in range(2):  # bytes of another file that were kept are found out and removed by the first
            try:
                files.fetch(f"{url}/good", path, digest)
            except DMVAEError:
                held = held and not path.exists()
        lost += not (held and path.read_bytes() == CONTENT)
    server.stopped.set()
    server.shutdown()
    return tries, lost


def evil_members() -> dict[str, list[tarfile.TarInfo]]:
    def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, target, 0
        return info

    inside = "cvpr2016_flowers/link"
    return {
        "parent": [member("cvpr2016_flowers/../../evil")],
        "absolute": [member("/tmp/../evil")],
        "symbolic link out": [member(inside, tarfile.SYMTYPE, "../../evil")],
        "symbolic link within": [member(inside, tarfile.SYMTYPE, "other")],
        "written through a link": [member(inside, tarfile.SYMTYPE, "/tmp"), member(f"{inside}/evil")],
        "hard link": [member(inside, tarfile.LNKTYPE, "../evil")],
        "device": [member(inside, tarfile.CHRTYPE)],
        "block device": [member(inside, tarfile.BLKTYPE)],
        "pipe": [member(inside, tarfile.FIFOTYPE)],
    }


def archives(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    """Archives with members that point outside, links and devices, whose checksum is right: nothing is unpacked."""
    lost = 0
    for number, members in enumerate(evil_members().values()):
        root, buffer = folder / str(number) / "data", io.BytesIO()
        root.mkdir(parents=True)
        with tarfile.open(fileobj=buffer, mode="w:gz") as file:
            for info in (tarfile.TarInfo("cvpr2016_flowers/trainclasses.txt"), *members):
                file.addfile(info)
        archive = root / "cvpr2016_flowers.tar.gz"
        archive.write_bytes(buffer.getvalue())
        try:
            flowers.fetch_captions("http://127.0.0.1/unused", files.sha256(archive), root)
            held = False
        except DMVAEError:
            held = [path.name for path in (folder / str(number)).rglob("*") if path.name != ".lock"] == [
                "data",
                archive.name,
            ]
        lost += not held
    return number + 1, lost


# --- the table -------------------------------------------------------------------------------------------------------

FAULTS_OF = {  # description: (function, tries); processes are forked first, before this one has run a backward pass
    "training killed at a random moment (SIGKILL, SIGTERM, SIGINT)": (kills, 40),
    "training killed at each file operation": (kills_at_file_operations, 60),
    "no memory at a random update": (memory_errors, 10),
    "no room on the disk": (full_disks, 20),
    "three processes, one run (half of them: one killed)": (two_at_once, 20),
    "`make reproduce` killed at a random moment": (killed_reproductions, 8),
    "checkpoint damaged": (corrupted_checkpoints, 60),
    "weights, history or record of a run damaged": (corrupted_runs, 100),
    "kept evaluation damaged": (corrupted_evaluations, 40),
    "manifest, configurations, tables damaged": (corrupted_results, 80),
    "feature cache damaged": (corrupted_features, 40),
    "MNIST or SVHN files damaged": (corrupted_digits, 40),
    "flower images, captions, lists or weights damaged": (corrupted_flowers, 60),
    "pairing tampered with": (tampered_pairings, 40),
    "download disturbed": (downloads, 48),
    "archive with links, devices or paths out of its folder": (archives, 9),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the tries")
    parser.add_argument("--seed", type=int, default=None, help="of the choices; another each time without it")
    parser.add_argument("--only", default="", help="faults whose description fits this regular expression")
    parser.add_argument("--write", type=Path, help="also write the table there, as Markdown")
    parser.add_argument("--reproduce-once", metavar="SCHEDULER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background processes ignore it
    if options.reproduce_once:
        return reproduce_once(options.reproduce_once)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    chosen = {name: fault for name, fault in FAULTS_OF.items() if re.search(options.only, name)}
    if not chosen:
        parser.error(f"no fault's description fits {options.only!r}")
    lines = ["| fault | tried | held | lost |", "|---|---|---|---|"]
    totals = [0, 0]
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (function, tries)) in enumerate(chosen.items()):
            place = Path(folder, str(number))
            place.mkdir()
            begun = time.monotonic()
            tried, lost = function(place, max(1, round(options.share * tries)), random.Random(f"{seed} {name}"))
            totals = [totals[0] + tried, totals[1] + lost]
            lines.append(f"| {name} | {tried} | {tried - lost} | {lost} |")
            print(f"{lines[-1]} {time.monotonic() - begun:.0f} s", flush=True)
            shutil.rmtree(place, ignore_errors=True)
    lines.append(f"| all | {totals[0]} | {totals[0] - totals[1]} | {totals[1]} |")
    print(lines[-1])
    if options.write:
        text = "\n".join([TITLE, *lines, ""])
        with files.atomic_write(options.write) as temporary:
            temporary.write_text(text)
    sys.exit(bool(totals[1]))


TITLE = """# Trust

What `make stress` found when it last wrote this page. It provokes each fault at random and looks at what comes of it.
Held: the same weights, history and tables, bit for bit, came out after all; or the fault was refused before use, by a
message that names the file and the way to repair it. Lost is everything else. Models and data are small, so that there
can be many tries: `make reproduce` runs with two models, trained in one process or by two workers, and one notebook;
data files are drawn in the real formats.
"""

if __name__ == "__main__":
    main()
