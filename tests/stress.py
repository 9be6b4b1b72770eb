"""`make stress`: provokes the faults of long runs on shared machines and of bad files, and counts what is lost.

Held is a fault after which the same numbers come out, or which is refused by a message that names the file; lost is
everything else, and must be nothing. Fault by fault, chosen at random from a seed that is printed.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import io
import json
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
import pooch
import torch
import toy
from PIL import Image
from safetensors.torch import save_file
from scipy.io import savemat
from torchvision import datasets

from dmvae_lib import DMVAE, DMVAEError, PairedData, Schedule, files
from dmvae_lib.paper import reproduce, runs, tables
from dmvae_lib.paper.data import digits, features, flowers
from dmvae_lib.paper.profiles import Profile
from dmvae_lib.paper.rows.digits import judge
from dmvae_lib.paper.runs import Run, Setting
from dmvae_lib.training import train

ROOT = Path(__file__).resolve().parents[1]
LONG, SHORT = 400, 8  # updates


# --- a small run, whose two judges are runs too ---------------------------------------------------------------------

runs.train = functools.partial(train, checkpoint_seconds=0)  # a checkpoint at every update, also in a worker's process


def plan(profile: Profile) -> Schedule:
    return Schedule(profile.steps, batch_size=8, log_every=3)


ROW = replace(toy.ROW, schedule=plan)


def place_of(folder: Path, steps: int = SHORT) -> Setting:
    return toy.place_in(folder, name="stress", steps=steps, classifier_steps=3)


def run_in(folder: Path, steps: int = LONG) -> None:
    Run(ROW, 0, place_of(folder, steps)).train()


def finished(folder: Path) -> dict[str, object]:
    """Everything below the folder, which must come out the same bit for bit, but for when and how fast it was made."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(x) for key, x in value.items() if key not in ("made", "seconds", "sha256")}
        return value

    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        if path.suffix == ".json":
            found[str(path.relative_to(folder))] = plain(json.loads(path.read_text()))
        elif path.suffix == ".ipynb":
            cells = nbformat.read(path, as_version=4).cells
            found[str(path.relative_to(folder))] = [cell.get("outputs") for cell in cells]
        elif path.is_file() and path.name != ".lock":
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def same(folder: Path, expected: dict[str, object]) -> bool:
    """Whether that came out; what differs is printed."""
    found = finished(folder)
    differ = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
    if differ:
        print(f"lost: {folder}: {', '.join(sorted(differ))}", flush=True)
    return not differ


# --- processes ------------------------------------------------------------------------------------------------------


def start(function: Callable, *arguments) -> int:
    """The id of a forked process that calls the function, and ends with 0, with 3 for a DMVAEError, else with 1."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
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


def undisturbed(folder: Path, steps: int) -> dict[str, object]:
    assert end(start(run_in, folder, steps)) == 0
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
        lost += in_this if not same(place, expected) else 0
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
        lost += end(start(run_in, place, SHORT)) != 0 or not same(place, expected)
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
        code = end(start(failing, place, chance.randint(1, SHORT)))
        lost += code != 130 or end(start(run_in, place, SHORT)) != 0 or not same(place, expected)
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
        lost += not right or end(start(run_in, place, SHORT)) != 0 or not same(place, expected)
    return tries, lost


def three_at_once(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    """Three processes, one run; in every second try one of them is killed. Each training is done once."""
    expected = undisturbed(folder / "undisturbed", SHORT)

    def noted(place: Path) -> None:
        usual = runs.train

        def noting(*arguments, **options):
            with open(folder / f"{place.name}.note", "a") as notes:
                notes.write("x")
            time.sleep(0.05)  # so that the others come in the middle
            return usual(*arguments, **options)

        runs.train = noting
        run_in(place, SHORT)

    lost = 0
    for number in range(tries):
        place = folder / str(number)
        processes = [start(noted, place) for _ in range(3)]
        if number % 2:
            time.sleep(chance.uniform(0, 0.2))
            os.kill(chance.choice(processes), signal.SIGKILL)
        codes = [end(process) for process in processes]
        killed = codes.count(-signal.SIGKILL)
        trained = len((folder / f"{number}.note").read_text())  # the model and its two judges
        lost += sorted(codes)[killed:] != [0] * (3 - killed) or trained > 3 + killed or not same(place, expected)
    return tries, lost


# --- make reproduce -------------------------------------------------------------------------------------------------

NOTEBOOK = """
import stress
from pathlib import Path
from dmvae_lib.paper.tables import Results, table

place = stress.place_of(Path.cwd())
results = Results(place, "01_stress")
results.table("table1", table({"DMVAE": stress.ROW}, place, {"DMVAE": {"joint": 44.7}}), "Table 1: under stress.")
run = stress.Run(stress.ROW, 0, place)
results.frame("curve", run.history, "A curve: under stress.", [run])
"""


def small_project(folder: Path) -> Path:
    (folder / "notebooks").mkdir(parents=True)
    (folder / "Makefile").touch()
    (folder / "README.md").write_text(f"{tables.BEGIN}\n{tables.END}\n")
    parameters = nbformat.v4.new_code_cell('profile = "quick"', metadata={"tags": ["parameters"]})
    cells = [parameters, nbformat.v4.new_code_cell(NOTEBOOK)]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "3"}})
    nbformat.write(notebook, folder / "notebooks" / "01_stress.ipynb")
    return folder


def reproduce_once(scheduler: str | None) -> None:
    """In a small project: `make reproduce` with small runs in place of the paper's."""
    place = replace(place_of(Path.cwd()), seeds=2)
    judges = [Run(judge(ROW.data, name), 0, place) for name in ROW.data.modalities]
    reproduce.runs_of = lambda place: [*judges, *(Run(ROW, seed, place) for seed in range(place.seeds))]
    reproduce.TABLES = {"Table 1": {"DMVAE": ROW}}
    reproduce.reproduce(place, scheduler)


def killed_reproductions(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def begin(place: Path, scheduler: str | None) -> subprocess.Popen:
        # Not as the main module, so that a worker finds the row's functions by their module's name.
        command = [sys.executable, "-c", f"import stress; stress.reproduce_once({scheduler!r})"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=place, env=environment, start_new_session=True, **quiet)

    begun = time.monotonic()
    process = begin(small_project(folder / "undisturbed"), None)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors.decode()
    whole, expected = time.monotonic() - begun, finished(folder / "undisturbed")
    tried = lost = round_ = 0
    while tried < tries:
        place, in_this = small_project(folder / str(round_)), 0
        round_ += 1
        while True:
            process = begin(place, chance.choice([None, "local:2"]))
            try:
                errors = process.communicate(timeout=None if tried >= tries else chance.uniform(0.1, 0.9) * whole)[1]
                break
            except subprocess.TimeoutExpired:
                number = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
                # A scheduler signals all of a job's processes, a kernel short of memory one of them.
                (os.killpg if chance.random() < 0.5 else os.kill)(process.pid, number)
                process.communicate()
                killed = process.returncode != 0
                tried, in_this = tried + killed, in_this + killed
        if process.returncode:
            print(errors.decode()[-2000:], flush=True)
        lost += in_this if process.returncode or not same(place, expected) else 0
    return tried, lost


# --- corruption -----------------------------------------------------------------------------------------------------


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
            damaged, place = bytearray(content), chance.choice(digits_at)
            damaged[place] = 48 + (content[place] - 48 + chance.randrange(1, 10)) % 10
            return bytes(damaged)
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


def two_runs(place: Setting) -> list[Run]:
    return [Run(ROW, seed, place).train() for seed in (0, 1)]


def corrupted_checkpoints(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    class Stop(Exception):
        pass

    def stopped(model, batch, labels, observed, beta):
        stopped.calls += 1
        if stopped.calls > 5:
            raise Stop
        return model.loss(batch, observed, beta)

    place = place_of(folder / "stopped")
    for name in ROW.data.modalities:
        Run(judge(ROW.data, name), 0, place).train()
    for seed in (0, 1):
        stopped.calls = 0
        try:
            Run(replace(ROW, objective=stopped), seed, place).train()
        except Stop:
            pass

    def load() -> dict[str, object]:
        shutil.rmtree(folder / "resumed", ignore_errors=True)
        shutil.copytree(folder / "stopped", folder / "resumed")
        two_runs(place_of(folder / "resumed"))
        return finished(folder / "resumed")

    return corrupted(sorted(folder.rglob("checkpoint.pt")), load, tries, chance)


def corrupted_runs(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    made = two_runs(place_of(folder))

    def load() -> list:
        found = [replace(run) for run in made]  # copies, which have loaded nothing yet
        weights = [[values.tolist() for values in run.model.state_dict().values()] for run in found]
        return [weights, [run.history.to_csv() for run in found], [run.scores for run in found]]

    names = (runs.WEIGHTS, runs.HISTORY, runs.ENTRY)
    return corrupted([run.folder / name for run in made for name in names], load, tries, chance)


def corrupted_ledger(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    made = two_runs(place_of(folder))

    def by_runs() -> list:
        return [replace(run).scores for run in made]

    def by_tables() -> list:
        tables.table({"DMVAE": ROW}, made[0].setting)
        entries = tables.ledger(made[0].setting)
        return [entries[ROW.name, run.seed]["scores"] for run in made]

    return corrupted([run.entry_path for run in made], lambda: chance.choice([by_runs, by_tables])(), tries, chance)


def corrupted_results(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    place = place_of(folder)
    for run in two_runs(place):
        table = tables.table({"DMVAE": ROW}, place, {"DMVAE": {"joint": 44.7}}, [run.seed])
        tables.Results(place, "03_table1").table(f"table{run.seed}", table, "A table: of one seed.")

    def load() -> tuple:
        page = tables.index(place.results.parent)
        if changed := [line for line in page.splitlines() if "**changed since**" in line]:
            raise DMVAEError("\n".join(changed))
        return page, tables.readme_tables(place.results.parent, ["table0", "table1"])

    return corrupted([path for path in place.results.iterdir() if path.is_file()], load, tries, chance)


def corrupted_features(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    features.IMAGE_SHARD = 2
    images = torch.randint(256, (6, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def load() -> list:
        return features.image_features(images, "descriptor", cache=folder).tolist()

    load()
    return corrupted(sorted(folder.glob("*.bin")), load, tries, chance)


def write_digits(folder: Path) -> None:
    """Files in MNIST's and SVHN's formats, drawn here; their checksums take the published ones' place."""
    raw, svhn = folder / "MNIST" / "raw", folder / "svhn"
    raw.mkdir(parents=True)
    svhn.mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", 30), ("t10k", 20)):
        images, labels = generator.integers(256, size=(count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels % 10)):
            sizes = b"".join(n.to_bytes(4, "big") for n in (0x800 + values.ndim, *values.shape))
            (raw / f"{split}-{kind}-ubyte").write_bytes(sizes + values.tobytes())
    digits.MNIST_SHA256 = {path.name: files.sha256(path) for path in sorted(raw.iterdir())}
    for split in ("train", "test"):
        path = svhn / f"{split}_32x32.mat"
        images = generator.integers(256, size=(32, 32, 3, 20), dtype=np.uint8)
        savemat(path, {"X": images, "y": np.arange(20, dtype=np.uint8)[:, None] % 10 + 1})
        datasets.SVHN.split_list[split] = ["", path.name, files.md5(path)]
    images, labels = np.zeros((10_000, 32, 32, 3), np.uint8), np.arange(10_000, dtype=np.uint8) % 10
    images[:, 0, 0, 0] = generator.integers(256, size=10_000)
    np.savez_compressed(svhn / "test_32x32_first10000.npz", X=images, y=labels)
    arrays = {"X": images, "y": labels}
    digits.SUBSET = {name: (values.shape, hashlib.md5(values).hexdigest()) for name, values in arrays.items()}


def corrupted_digits(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    write_digits(folder)

    def load() -> list:
        found = [digits.load(source, folder, permutations=1) for source in ("subset", "full")]
        return [(splits.train.fingerprint, splits.test.fingerprint) for splits in found]

    return corrupted([*folder.glob("MNIST/raw/*"), *folder.glob("svhn/*")], load, tries, chance)


def write_flowers(folder: Path) -> None:
    """Oxford-102's layout with eight images; the checksums of its labels and splits take the published ones' place."""
    labels, generator = [3, 3, 1, 4, 1, 2, 4, 2], np.random.default_rng(0)
    images, captions = folder / "flowers-102", folder / flowers.CAPTION_FOLDER
    (images / "jpg").mkdir(parents=True)
    for number, label in enumerate(labels, 1):
        pixels = generator.integers(256, size=(20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / "jpg" / f"image_{number:05}.jpg")
        path = captions / "text_c10" / f"class_{label:05}" / f"image_{number:05}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"flower {number}, caption {line}\n" for line in range(10)))
    for split, members in {"train": (3, 4), "validation": (1,), "test": (2,)}.items():
        (captions / flowers.CLASS_LISTS[split]).write_text("".join(f"class_{number:05}\n" for number in members))
    savemat(images / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    savemat(images / "setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]})
    for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
        datasets.Flowers102._file_dict[key] = (name, files.md5(images / name))


def oxford(root: Path, **options) -> tuple:
    found = flowers.load_oxford(root, **options)
    return found.captions, found.labels.tolist(), found.classes, [path.read_bytes() for path in found.images]


def corrupted_flowers(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    """What has no published checksum is listed in a MANIFEST.sha256 beside it, which is damaged too."""
    write_flowers(folder)
    (folder / "weights").mkdir()
    save_file({"weight": torch.rand(50)}, folder / flowers.SQUEEZENET)
    paths = [path for pattern in flowers.UNPUBLISHED for path in folder.glob(pattern)]
    listed = folder / "MANIFEST.sha256"
    listed.write_text("".join(f"{files.sha256(path)}  {path.relative_to(folder)}\n" for path in paths))
    paths += [listed, folder / "flowers-102" / "imagelabels.mat"]
    return corrupted(paths, lambda: oxford(folder), tries, chance)


def tampered_pairings(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    """One item of one pair is another: refused, or another fingerprint and so another run."""
    data, lost = place_of(folder).splits(ROW.data).train, 0
    for _ in range(tries):
        index = {name: values.clone() for name, values in data.index.items()}
        values = index[chance.choice(data.names)]
        row = chance.randrange(len(values))
        values[row] = (int(values[row]) + chance.choice([-200, 1, 5, 60, 200])) % chance.choice([150, 10_000])
        unchanged = all(torch.equal(index[name], data.index[name]) for name in index)
        try:
            lost += not unchanged and PairedData(data.items, index, data.item_labels).fingerprint == data.fingerprint
        except DMVAEError:
            pass
    return tries, lost


# --- downloads and archives -----------------------------------------------------------------------------------------

FAULTS = ("drop", "wrong", "longer", "page", "empty", "404", "500", "redirect", "redirect-file", "loop", "hang up", "noise")  # fmt: skip


class FaultyServer(BaseHTTPRequestHandler):
    """Serves the server's files {name: bytes}; with the one named `spoilt` goes wrong what `fault` says."""

    def do_GET(self):
        name, served = self.path.strip("/"), self.server
        fault = served.fault if name == served.spoilt else ""
        if fault in ("404", "500") or name not in served.files:
            return self.send_error(int(fault or 404))
        if fault in ("redirect", "redirect-file", "loop"):
            self.send_response(302)
            target = {"redirect": "/page", "redirect-file": f"file://{__file__}", "loop": self.path}[fault]
            self.send_header("Location", target)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if fault == "hang up":
            self.close_connection = True
            return None
        if fault == "noise":
            self.close_connection = True
            return self.wfile.write(b"what is HTTP?\r\n\r\n")
        body = served.files[name]
        other = {"wrong": body[:-1] + b"!", "longer": body + b"more", "page": served.files["page"], "empty": b""}
        body = other.get(fault, body)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "drop":
            self.close_connection = True
            body = body[: served.chance.randrange(len(body))]
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except OSError:  # the client went away
            self.close_connection = True


def serve(chance: random.Random) -> tuple[ThreadingHTTPServer, str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FaultyServer)
    server.files, server.chance, server.daemon_threads = {"page": b"<html>log in</html>"}, chance, True
    server.fault = server.spoilt = ""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


def packed(folder: Path, *members: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        file.add(folder, arcname=folder.name)
        for member in members:
            file.addfile(member)
    return buffer.getvalue()


def downloads(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    """After each fault the data are right or refused, and a good server then gives them; nothing else is left."""
    server, url = serve(chance)
    source = folder / "source"
    write_digits(source)
    write_flowers(source)
    server.files |= {f"{path.name}.gz": gzip.compress(path.read_bytes()) for path in source.glob("MNIST/raw/*")}
    datasets.MNIST.mirrors = [f"{url}/"]
    datasets.MNIST.resources = [
        (f"{name}.gz", hashlib.md5(server.files[f"{name}.gz"]).hexdigest()) for name in digits.MNIST_SHA256
    ]
    server.files |= {path.name: path.read_bytes() for path in source.glob("*/*.mat")}
    for entry in datasets.SVHN.split_list.values():
        entry[0] = f"{url}/{entry[1]}"
    images, captions = packed(source / "flowers-102" / "jpg"), packed(source / flowers.CAPTION_FOLDER)
    server.files |= {"102flowers.tgz": images, "captions.tar.gz": captions}
    datasets.Flowers102._file_dict["image"] = ("102flowers.tgz", hashlib.md5(images).hexdigest())
    datasets.Flowers102._download_url_prefix = f"{url}/"
    digest = hashlib.sha256(captions).hexdigest()

    def get_digits(root: Path) -> tuple:
        splits = digits.load("full", root, permutations=1)
        return splits.train.fingerprint, splits.test.fingerprint

    def get_flowers(root: Path) -> tuple:
        if not (root / flowers.CAPTION_FOLDER).exists():
            flowers.fetch_captions(f"{url}/captions.tar.gz", digest, root)
        return oxford(root, download=True)

    of = {get_flowers: ["102flowers.tgz", "captions.tar.gz", "imagelabels.mat", "setid.mat"]}
    of[get_digits] = [name for name in server.files if name not in [*of[get_flowers], "page"]]
    expected, lost = {get: get(source) for get in of}, 0
    for number in range(tries):
        root, get = folder / str(number), chance.choice(list(of))
        server.fault, server.spoilt = FAULTS[number % len(FAULTS)], chance.choice(of[get])
        try:
            held = get(root) == expected[get]
        except DMVAEError as error:
            held = str(root) in str(error)
        except Exception:
            held = False
            traceback.print_exc(file=sys.stdout)
        if not held:
            print(f"lost: {server.spoilt}, {server.fault}", flush=True)
        server.fault = server.spoilt = ""
        lost += not (held and get(root) == expected[get] and not list(root.rglob(".*")))
    server.shutdown()
    return tries, lost


def evil_members(outside: str) -> list[list[tarfile.TarInfo]]:
    def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, target, 0
        return info

    link = f"{flowers.CAPTION_FOLDER}/link"
    return [
        [member(f"{flowers.CAPTION_FOLDER}/../../../evil")],
        [member(f"{outside}/evil")],
        [member(link, tarfile.SYMTYPE, "../../evil")],
        [member(link, tarfile.SYMTYPE, "other")],
        [member(link, tarfile.SYMTYPE, outside), member(f"{link}/evil")],
        [member(link, tarfile.LNKTYPE, "../evil")],
        [member(link, tarfile.CHRTYPE)],
        [member(link, tarfile.BLKTYPE)],
        [member(link, tarfile.FIFOTYPE)],
    ]


def archives(folder: Path, tries: int, chance: random.Random) -> tuple[int, int]:
    """Archives with members that point outside, links and devices, whose checksum is right: refused, or harmless."""
    server, url = serve(chance)
    source, lost = folder / flowers.CAPTION_FOLDER, 0
    source.mkdir()
    (source / "trainclasses.txt").write_text("class_00001\n")
    for number, members in enumerate(evil_members(str(folder / "outside"))):
        place = folder / str(number)
        server.files["archive"] = packed(source, *members)
        try:
            flowers.fetch_captions(
                f"{url}/archive", hashlib.sha256(server.files["archive"]).hexdigest(), place / "data"
            )
            right = [flowers.CAPTION_FOLDER, "trainclasses.txt"]
        except DMVAEError:
            right = []
        lost += [path.name for path in sorted(place.rglob("*"))] != ["data", *right] or (folder / "outside").exists()
    server.shutdown()
    return number + 1, lost


# --- the table ------------------------------------------------------------------------------------------------------

FAULTS_OF = {  # description: (function, tries); processes are forked first, before this one has run a backward pass
    "training killed at a random moment (SIGKILL, SIGTERM, SIGINT)": (kills, 40),
    "training killed at each file operation": (kills_at_file_operations, 90),
    "no memory at a random update": (memory_errors, 10),
    "no room on the disk": (full_disks, 20),
    "three processes, one run (half of them: one killed)": (three_at_once, 20),
    "`make reproduce` killed at a random moment": (killed_reproductions, 8),
    "checkpoint damaged": (corrupted_checkpoints, 60),
    "weights, history or entry of a run damaged": (corrupted_runs, 100),
    "ledger damaged": (corrupted_ledger, 40),
    "manifest or tables damaged": (corrupted_results, 80),
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
    options = parser.parse_args()
    torch.set_num_threads(1)
    pooch.get_logger().setLevel("ERROR")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background processes ignore it
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
Held: the same weights, history, entries and tables, bit for bit, came out after all; or the fault was refused before
use, by a message that names the file and the way to repair it. Lost is everything else. Models and data are small, so
that there can be many tries: a run is one model and the two classifiers that judge it; `make reproduce` runs with two
models, trained in one process or by two workers, and one notebook; data files are drawn in the real formats.
"""

if __name__ == "__main__":
    main()
