"""`make stress`: provokes the faults of long runs on shared machines and of bad files, and counts what is lost.

Held is a fault after which the same numbers come out, or which is refused by a message that names the file; lost is
everything else, and must be nothing. Fault by fault, chosen at random from a seed that is printed.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
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
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count, cycle, islice
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"

import nbformat
import numpy as np
import pooch
import torch
import toy
from safetensors.torch import save_file
from standins import member, packed, write_oxford, write_svhn
from torchvision.datasets import MNIST, SVHN, Flowers102

from dmvae_lib import DMVAE, DMVAEError, PairedData, Schedule, files, train
from dmvae_lib.paper import pages, reproduce, runs, tables
from dmvae_lib.paper.data import digits, features, flowers
from dmvae_lib.paper.rows.digits import judge
from dmvae_lib.paper.runs import Run, Setting

ROOT = Path(__file__).resolve().parents[1]
LONG, SHORT = 400, 8  # updates
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = {DMVAEError: 3, MemoryError: 4, KeyboardInterrupt: 130}  # of a process that raised one
Tries = Iterator[bool]  # of each try, whether it was held

# --- a small run, whose two judges are runs too ---------------------------------------------------------------------

runs.train = partial(train, checkpoint_seconds=0)  # a checkpoint at every update, also in a worker's process


def plan(profile) -> Schedule:
    return Schedule(profile.steps, batch_size=8, log_every=3)


ROW = replace(toy.ROW, schedule=plan)


def place_of(folder: Path, steps: int = SHORT) -> Setting:
    return toy.place_in(folder, name="stress", steps=steps, classifier_steps=3)


def judges(place: Setting) -> list[Run]:
    return [Run(judge(ROW.data, name), 0, place) for name in ROW.data.modalities]


def train_in(folder: Path, steps: int = SHORT) -> None:
    Run(ROW, 0, place_of(folder, steps)).train()


def finished(folder: Path) -> dict[str, object]:
    """{path: content} of all that was made in the folder, but for when and how fast (of which a checkpoint keeps account),
    and a notebook's random names."""

    def lasting(members: dict) -> dict:
        return {key: value for key, value in members.items() if key not in ("made", "seconds", "sha256", "id")}

    files_there = [path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "checkpoint.pt")]
    return {
        str(path.relative_to(folder)): json.loads(path.read_bytes(), object_hook=lasting)
        if path.suffix in (".json", ".ipynb")
        else re.sub(rb"at commit `.*?`, [\dTZ:-]+\.", b"", path.read_bytes())  # of a profile's page
        for path in files_there
    }


def same(folder: Path, expected: dict[str, object]) -> bool:
    """Whether that was made there, bit for bit, and nothing is left beside it."""
    found = finished(folder)
    differ = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if differ:
        print("lost:", folder, *differ, flush=True)
    return not differ


def held(load: Callable[[], object], expected: object, *names: str) -> bool:
    """Whether `load` gives what is expected, or raises a DMVAEError that has one of the names."""
    try:
        return load() == expected
    except DMVAEError as error:
        return any(name in str(error) for name in names)
    except Exception:
        traceback.print_exc(file=sys.stdout)
        return False


# --- faults of processes --------------------------------------------------------------------------------------------


def start(function: Callable, *arguments) -> int:
    """The id of a forked process that calls the function, and ends with 0 or with the code of what was raised."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        function(*arguments)
        code = 0
    except BaseException as error:
        code = CODES.get(type(error), 1)
        if code == 1:
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
    finally:
        os._exit(code)


def end(process: int) -> int:
    """The exit status of a process, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill(process: int, after: float, number: int = signal.SIGKILL) -> int:
    """Kills a process after so many seconds, unless it ends before; its exit status."""
    until, ended = time.monotonic() + after, os.WEXITED | os.WNOHANG | os.WNOWAIT
    while time.monotonic() < until and os.waitid(os.P_PID, process, ended) is None:
        time.sleep(0.001)
    os.kill(process, number)
    return end(process)


def places(folder: Path) -> Iterator[Path]:
    return (folder / str(number) for number in count())


def undisturbed(folder: Path, steps: int = SHORT) -> dict[str, object]:
    assert end(start(train_in, folder, steps)) == 0
    return finished(folder)


def recovers(folder: Path, expected: dict[str, object], steps: int = SHORT) -> bool:
    """Whether one more process ends the run as if nothing had happened."""
    return end(start(train_in, folder, steps)) == 0 and same(folder, expected)


def kills(folder: Path, chance: random.Random) -> Tries:
    begun = time.monotonic()
    expected = undisturbed(folder / "undisturbed", LONG)
    whole = time.monotonic() - begun
    for place in places(folder):
        codes = []
        for _ in range(chance.randint(1, 8)):
            process = start(train_in, place, LONG)
            codes.append(kill(process, chance.uniform(0, whole / 3), chance.choice(SIGNALS)))
        allowed = {0, -signal.SIGKILL, -signal.SIGTERM, CODES[KeyboardInterrupt]}
        right = set(codes) <= allowed and recovers(place, expected, LONG)
        yield from [right for code in codes if code]


def kills_at_file_operations(folder: Path, chance: random.Random) -> Tries:
    def killed_at(place: Path, fatal: int) -> None:
        done = count(1)

        def counted(operation: Callable, *arguments):
            if next(done) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments)

        os.fsync, os.replace = partial(counted, os.fsync), partial(counted, os.replace)
        train_in(place)
        (folder / "counted").write_text(str(next(done)))

    assert end(start(killed_at, folder / "undisturbed", 0)) == 0
    expected, last = finished(folder / "undisturbed"), int((folder / "counted").read_text())
    for fatal in chance.sample(range(1, last), last - 1):
        place = folder / str(fatal)
        yield end(start(killed_at, place, fatal)) == -signal.SIGKILL and recovers(place, expected)


def memory_errors(folder: Path, chance: random.Random) -> Tries:
    expected, usual = undisturbed(folder / "undisturbed"), DMVAE.loss

    def failing(place: Path, fatal: int) -> None:
        calls = count(1)

        def loss(self, *arguments, **options):
            if next(calls) == fatal:
                raise MemoryError
            return usual(self, *arguments, **options)

        DMVAE.loss = loss
        train_in(place)

    for place in places(folder):
        yield end(start(failing, place, chance.randint(1, SHORT))) == CODES[MemoryError] and recovers(place, expected)


def full_disks(folder: Path, chance: random.Random) -> Tries:
    """A limit on the size of files: a write beyond it fails as on a full disk."""
    expected = undisturbed(folder / "undisturbed")

    def limited(place: Path, size: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        train_in(place)

    for place in places(folder):
        kill(start(train_in, place), chance.uniform(0, 0.2))
        before = {path: path.read_bytes() for path in place.rglob("checkpoint.pt")}
        code = end(start(limited, place, chance.randint(1, 4_000)))
        kept = all(path.read_bytes() == content for path, content in before.items() if path.exists())
        yield (code == 0 or code == CODES[DMVAEError] and kept) and recovers(place, expected)


def three_at_once(folder: Path, chance: random.Random) -> Tries:
    """Three processes, one run; in every second try one of them is killed. Each training is done once."""
    expected = undisturbed(folder / "undisturbed")

    def noted(place: Path) -> None:
        usual = runs.train

        def noting(*arguments, **options):
            with open(place.with_suffix(".note"), "a") as notes:
                notes.write("x")
            time.sleep(0.05)  # so that the others come in the middle
            return usual(*arguments, **options)

        runs.train = noting
        train_in(place)

    for number, place in enumerate(places(folder)):
        codes, processes = [], [start(noted, place) for _ in range(3)]
        if number % 2:
            codes.append(kill(processes.pop(chance.randrange(3)), chance.uniform(0, 0.2)))
        codes += [end(process) for process in processes]
        again = codes.count(-signal.SIGKILL)
        trained = len(place.with_suffix(".note").read_text())  # the model and its two judges
        # A kill while a judge trains cuts off two trainings, the judge's and its run's; both go on from checkpoints.
        yield sorted(codes)[again:] == [0] * (3 - again) and trained <= 3 + 2 * again and same(place, expected)


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
    (folder / "README.md").write_text(f"{pages.BEGIN}\n{pages.END}\n")
    parameters = nbformat.v4.new_code_cell('profile = "quick"', metadata={"tags": ["parameters"]})
    cells = [parameters, nbformat.v4.new_code_cell(NOTEBOOK)]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})
    nbformat.write(notebook, folder / "notebooks" / "01_stress.ipynb")
    return folder


def reproduce_once(scheduler: str | None) -> None:
    """In a small project: `make reproduce` with small runs in place of the paper's."""
    place = replace(place_of(Path.cwd()), seeds=2)
    reproduce.runs_of = lambda place: [*judges(place), *(Run(ROW, seed, place) for seed in range(place.seeds))]
    reproduce.TABLES = {"Table 1": {"DMVAE": ROW}}
    reproduce.reproduce(place, scheduler)


def killed_reproductions(folder: Path, chance: random.Random) -> Tries:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def begin(place: Path, scheduler: str | None) -> subprocess.Popen:
        # Not as the main module, so that a worker finds the row's functions by their module's name.
        command = [sys.executable, "-c", f"import stress; stress.reproduce_once({scheduler!r})"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=place, env=environment, start_new_session=True, **quiet)

    def ends(process: subprocess.Popen) -> bool:
        errors = process.communicate()[1]
        print(errors.decode()[-2000:] if process.returncode else "", end="", flush=True)
        return process.returncode == 0

    begun = time.monotonic()
    assert ends(begin(small_project(folder / "undisturbed"), None))
    whole, expected = time.monotonic() - begun, finished(folder / "undisturbed")
    for place in map(small_project, places(folder)):
        killed = 0
        for _ in range(chance.randint(1, 4)):
            process = begin(place, chance.choice([None, "local:2"]))
            try:
                process.communicate(timeout=chance.uniform(0.1, 0.9) * whole)
            except subprocess.TimeoutExpired:
                # A scheduler signals all of a job's processes, a kernel short of memory one of them.
                (os.killpg if chance.random() < 0.5 else os.kill)(process.pid, chance.choice(SIGNALS))
                process.communicate()
                killed += process.returncode != 0
        yield from [ends(begin(place, chance.choice([None, "local:2"]))) and same(place, expected)] * killed


# --- corruption -----------------------------------------------------------------------------------------------------


def damage(content: bytes, others: list[bytes], chance: random.Random) -> bytes:
    digits_at = [place for place, byte in enumerate(content) if 48 <= byte < 58]
    kinds = ["truncate", "flip", "flip", "empty", "overwrite"] + ["swap"] * bool(others) + ["digit"] * bool(digits_at)
    damaged, place = bytearray(content), chance.randrange(len(content))
    match chance.choice(kinds):
        case "truncate":
            return content[:place]
        case "flip":
            damaged[place] ^= 1 << chance.randrange(8)
        case "overwrite":
            damaged[place : place + 512] = bytes(len(damaged[place : place + 512]))
        case "digit":  # what turns one number into another, and leaves the file one that can be read
            place = chance.choice(digits_at)
            damaged[place] = 48 + (damaged[place] - 48 + chance.randrange(1, 10)) % 10
        case "swap":
            return chance.choice(others)
        case "empty":
            return b""
    return bytes(damaged)


def corrupted(paths: list[Path], load: Callable[[], object], chance: random.Random) -> Tries:
    """Damages one of the files, loads, and puts it back."""
    expected, contents = load(), {path: path.read_bytes() for path in paths}
    while True:
        path = chance.choice(paths)
        whole = contents[path]
        content = damage(whole, [other for other in contents.values() if other != whole], chance)
        if content != whole:
            path.write_bytes(content)
            right = held(load, expected, path.name, str(path.parent))
            if not right:
                print(f"lost: {path}, {len(content):,} of {len(whole):,} bytes", flush=True)
            yield right
            path.write_bytes(whole)


def two_runs(place: Setting) -> list[Run]:
    return [Run(ROW, seed, place).train() for seed in (0, 1)]


def corrupted_checkpoints(folder: Path, chance: random.Random) -> Tries:
    place = place_of(folder / "stopped")
    for run in judges(place):
        run.train()
    for seed in (0, 1):
        calls = count()

        def stopped(model, batch, labels, observed, beta, calls=calls):
            if next(calls) == SHORT // 2:
                raise InterruptedError
            return model.loss(batch, observed, beta)

        with suppress(InterruptedError):
            Run(replace(ROW, objective=stopped), seed, place).train()

    def load() -> dict[str, object]:
        shutil.rmtree(folder / "resumed", ignore_errors=True)
        shutil.copytree(folder / "stopped", folder / "resumed")
        two_runs(place_of(folder / "resumed"))
        return finished(folder / "resumed")

    return corrupted(sorted(folder.rglob("checkpoint.pt")), load, chance)


def corrupted_runs(folder: Path, chance: random.Random) -> Tries:
    made = two_runs(place_of(folder))

    def load() -> list:
        found = [replace(run) for run in made]  # copies, which have loaded nothing yet
        weights = [[values.tolist() for values in run.model.state_dict().values()] for run in found]
        return [weights, [run.history.to_csv() for run in found], [run.scores for run in found]]

    names = (runs.WEIGHTS, runs.HISTORY, runs.ENTRY)
    return corrupted([run.folder / name for run in made for name in names], load, chance)


def corrupted_ledger(folder: Path, chance: random.Random) -> Tries:
    place = place_of(folder)
    made = two_runs(place)

    def by_runs() -> list:
        return [replace(run).scores for run in made]

    def by_tables() -> list:
        tables.table({"DMVAE": ROW}, place)
        return [tables.ledger(place)[ROW.name, run.seed]["scores"] for run in made]

    return corrupted([run.entry_path for run in made], lambda: chance.choice([by_runs, by_tables])(), chance)


def corrupted_results(folder: Path, chance: random.Random) -> Tries:
    place = place_of(folder)
    for run in two_runs(place):
        table = tables.table({"DMVAE": ROW}, place, {"DMVAE": {"joint": 44.7}}, [run.seed])
        tables.Results(place, "03_table1").table(f"table{run.seed}", table, "A table: of one seed.")

    def load() -> tuple:
        page = pages.index(place.results.parent)
        if changed := [line for line in page.splitlines() if "**changed since" in line]:
            raise DMVAEError("\n".join(changed))
        return page

    return corrupted([path for path in place.results.iterdir() if path.is_file()], load, chance)


def corrupted_features(folder: Path, chance: random.Random) -> Tries:
    features.IMAGE_SHARD = 2
    images = torch.randint(256, (6, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    load = partial(features.image_features, images, "descriptor", cache=folder)
    load()
    return corrupted(sorted(folder.glob("*.bin")), lambda: load().tolist(), chance)


def write_digits(folder: Path) -> None:
    """Files in MNIST's and SVHN's formats, drawn here; their checksums take the published ones' place."""
    raw, svhn = folder / "MNIST" / "raw", folder / "svhn"
    raw.mkdir(parents=True)
    SVHN.split_list.update(write_svhn(svhn, 20))
    generator = np.random.default_rng(0)
    for split, n in (("train", 30), ("t10k", 20)):
        images = generator.integers(256, size=(n, 28, 28), dtype=np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", np.arange(n, dtype=np.uint8) % 10)):
            header = np.array([0x800 + values.ndim, *values.shape], ">i4").tobytes()
            (raw / f"{split}-{kind}-ubyte").write_bytes(header + values.tobytes())
    digits.MNIST_SHA256 = {path.name: files.sha256(path) for path in raw.iterdir()}
    arrays = {"X": np.zeros((10_000, 32, 32, 3), np.uint8), "y": np.arange(10_000, dtype=np.uint8) % 10}
    arrays["X"][:, 0, 0, 0] = generator.integers(256, size=10_000)
    np.savez_compressed(svhn / "test_32x32_first10000.npz", **arrays)
    digits.SUBSET = {name: (values.shape, hashlib.md5(values).hexdigest()) for name, values in arrays.items()}


def corrupted_digits(folder: Path, chance: random.Random) -> Tries:
    write_digits(folder)

    def load() -> list:
        found = [digits.load(source, folder, permutations=1) for source in ("subset", "full")]
        return [(splits.train.fingerprint, splits.test.fingerprint) for splits in found]

    return corrupted([*folder.glob("MNIST/raw/*"), *folder.glob("svhn/*")], load, chance)


def oxford(root: Path, **options) -> tuple:
    found = flowers.load_oxford(root, **options)
    return found.captions, found.labels.tolist(), found.classes, [path.read_bytes() for path in found.images]


def corrupted_flowers(folder: Path, chance: random.Random) -> Tries:
    """What has no published checksum is listed in a MANIFEST.sha256 beside it, which is damaged too."""
    Flowers102._file_dict.update(write_oxford(folder))
    (folder / "weights").mkdir()
    save_file({"weight": torch.rand(50)}, folder / flowers.SQUEEZENET)
    paths = [path for pattern in flowers.UNPUBLISHED for path in folder.glob(pattern)]
    listed = folder / "MANIFEST.sha256"
    listed.write_text("".join(f"{files.sha256(path)}  {path.relative_to(folder)}\n" for path in paths))
    return corrupted([*paths, listed, folder / "flowers-102" / "imagelabels.mat"], partial(oxford, folder), chance)


def tampered_pairings(folder: Path, chance: random.Random) -> Tries:
    """One item of one pair is another: refused, or another fingerprint and so another run."""
    data = place_of(folder).splits(ROW.data).train

    def alike(index: dict[str, torch.Tensor]) -> bool:
        return PairedData(data.items, index, data.item_labels).fingerprint == data.fingerprint

    while True:
        index = {name: values.clone() for name, values in data.index.items()}
        values, row = index[chance.choice(data.names)], chance.randrange(len(data))
        values[row] = (values[row] + chance.choice([-200, 1, 5, 60, 200])) % chance.choice([150, 10_000])
        if not all(torch.equal(index[name], data.index[name]) for name in index):
            yield held(partial(alike, index), False, "PairedData: ")


# --- downloads and archives -----------------------------------------------------------------------------------------

FAULTS = ("drop", "wrong", "longer", "page", "empty", "404", "500", "redirect", "file", "loop", "hang up", "noise")


class FaultyServer(BaseHTTPRequestHandler):
    """Serves the server's files {name: bytes}; with the one named `spoilt` goes wrong what `fault` says."""

    def do_GET(self):
        name, page = self.path.strip("/"), b"<html>log in</html>"
        fault, body = self.server.fault if name == self.server.spoilt else "", self.server.files.get(name, page)
        if fault == "hang up":
            return
        if fault == "noise":
            self.wfile.write(b"what is HTTP?\r\n\r\n")
        moved = {"redirect": "/page", "file": f"file://{__file__}", "loop": self.path}
        body = {"wrong": body[:-1] + b"!", "longer": body + b"more", "page": page, "empty": b""}.get(fault, body)
        self.send_response(int(fault) if fault.isdigit() else 302 if fault in moved else 200)
        self.send_header("Location", moved.get(fault, self.path))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.chance.randrange(len(body))] if fault == "drop" else body)

    def log_message(self, *arguments):
        pass


def serve(chance: random.Random) -> tuple[ThreadingHTTPServer, str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FaultyServer)
    server.files, server.chance, server.fault, server.spoilt = {}, chance, "", ""
    server.handle_error = lambda *_: None  # of a client that went away
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


def downloads(folder: Path, chance: random.Random) -> Tries:
    """After each fault the data are right or refused, and a good server then gives them; nothing else is left."""
    (server, url), source = serve(chance), folder / "source"
    write_digits(source)
    Flowers102._file_dict.update(write_oxford(source))
    numbers = {f"{path.name}.gz": gzip.compress(path.read_bytes()) for path in source.glob("MNIST/raw/*")}
    MNIST.mirrors = [f"{url}/"]
    MNIST.resources = [(name, hashlib.md5(content).hexdigest()) for name, content in numbers.items()]
    numbers |= {path.name: path.read_bytes() for path in source.glob("svhn/*.mat")}
    for entry in SVHN.split_list.values():
        entry[0] = f"{url}/{entry[1]}"
    captions = packed(source / flowers.CAPTION_FOLDER, flowers.CAPTION_FOLDER)
    images = packed(source / "flowers-102" / "jpg", "jpg")
    plants = {path.name: path.read_bytes() for path in source.glob("flowers-102/*.mat")}
    plants |= {"captions.tar.gz": captions, "102flowers.tgz": images}
    Flowers102._file_dict["image"] = ("102flowers.tgz", hashlib.md5(images).hexdigest())
    Flowers102._download_url_prefix = f"{url}/"
    server.files = numbers | plants

    def get_digits(root: Path) -> tuple:
        splits = digits.load("full", root, permutations=1)
        return splits.train.fingerprint, splits.test.fingerprint

    def get_flowers(root: Path) -> tuple:
        if not (root / flowers.CAPTION_FOLDER).exists():
            flowers.fetch_captions(f"{url}/captions.tar.gz", hashlib.sha256(captions).hexdigest(), root)
        return oxford(root, download=True)

    ways = [(get, served, get(source)) for get, served in ((get_digits, numbers), (get_flowers, plants))]
    for root, server.fault in zip(places(folder), cycle(FAULTS)):
        get, served, expected = chance.choice(ways)
        server.spoilt = chance.choice(list(served))
        right = held(partial(get, root), expected, str(root))
        if not right:
            print(f"lost: {server.spoilt}, {server.fault}", flush=True)
        server.spoilt = ""
        yield right and held(partial(get, root), expected) and not list(root.rglob(".*"))


def archives(folder: Path, chance: random.Random) -> Tries:
    """Archives with members that point outside, links and devices, whose checksum is right: refused, or harmless."""
    (server, url), source = serve(chance), folder / flowers.CAPTION_FOLDER
    source.mkdir()
    (source / "classes.txt").touch()

    outside, link = folder / "outside", f"{source.name}/link"
    evil = [
        [member(f"{source.name}/../../../outside")],
        [member(str(outside))],
        [member(link, tarfile.SYMTYPE, "../../outside")],
        [member(link, tarfile.SYMTYPE, "classes.txt")],
        [member(link, tarfile.SYMTYPE, str(folder)), member(f"{link}/outside")],
        [member(link, tarfile.LNKTYPE, "../outside")],
        *([member(link, kind)] for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)),
    ]
    for place, members in zip(places(folder), evil):
        server.files["archive"] = packed(source, source.name, *members)
        digest = hashlib.sha256(server.files["archive"]).hexdigest()
        right = held(partial(flowers.fetch_captions, f"{url}/archive", digest, place), place / source.name, str(place))
        beside = {path.name for path in place.rglob("*")} - {source.name, "classes.txt"}
        yield right and not beside and not outside.exists()


# --- the table ------------------------------------------------------------------------------------------------------

FAULTS_OF = {  # description: (function, most tries); processes are forked first, before this one has run a backward pass
    "training killed at a random moment (SIGKILL, SIGTERM, SIGINT)": (kills, 40),
    "training killed at each file operation": (kills_at_file_operations, 100),
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
    print(f"seed {seed}", flush=True)
    lines, all_tries = ["| fault | tried | held | lost |", "|---|---|---|---|"], []

    def line(name: str, tries: list[bool]) -> str:
        lines.append(f"| {name} | {len(tries)} | {sum(tries)} | {len(tries) - sum(tries)} |")
        return lines[-1]

    for name, (function, most) in chosen.items():
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            found = function(Path(folder), random.Random(f"{seed} {name}"))
            tries = list(islice(found, max(1, round(options.share * most))))
        all_tries += tries
        print(line(name, tries), f"{time.monotonic() - begun:.0f} s", flush=True)
    print(line("all", all_tries))
    if options.write:
        with files.atomic_write(options.write) as temporary:
            temporary.write_text("\n".join([TITLE, *lines, ""]))
    sys.exit(not all(all_tries))


TITLE = """# Trust

What `make stress` found when it last wrote this page. It provokes each fault at random and looks at what comes of it.
Held: the same weights, history, entries and tables, bit for bit, came out after all; or the fault was refused before
use, by a message that names the file and the way to repair it. Lost is everything else. Models and data are small, so
that there can be many tries: a run is one model and the two classifiers that judge it; `make reproduce` runs with two
models, trained in one process or by two workers, and one notebook; data files are drawn in the real formats.
"""

if __name__ == "__main__":
    main()
