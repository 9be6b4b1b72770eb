"""Trust: nothing lost, nothing corrupted, nothing let in. `make stress` provokes more of each fault."""

import ast
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import stress
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmvae_lib import DMVAEError, files, runs, source
from dmvae_lib.data import features
from dmvae_lib.models import Terms
from dmvae_lib.training import train

ROOT = Path(__file__).resolve().parents[1]
SHORT = stress.SHORT


pytestmark = pytest.mark.usefixtures("one_thread")


# --- a share of the stress ----------------------------------------------------------------------------------------


def provoke(*options: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "tests" / "stress.py", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_nothing_is_lost_in_a_share_of_the_stress():
    found = provoke("--share", "0.125", "--only", "^(?!.*reproduce)")
    (kills,) = re.findall(r"random moment .*\| (\d+) \| \d+ \| 0 \|", found)
    (tried,) = re.findall(r"^\| all \| (\d+) \| \d+ \| 0 \|$", found, re.M)
    assert int(kills) >= 5 and int(tried) > 80


def test_reproduce_goes_on_after_a_kill():
    assert "| 1 | 1 | 0 |" in provoke("--share", "0.1", "--only", "reproduce")


# --- interrupts ---------------------------------------------------------------------------------------------------


def trained(folder=None, objective=None, **options):
    torch.manual_seed(0)
    model = stress.small_model()
    objective = {} if objective is None else {"objective": objective}
    history = train(model, stress.small_data(), SHORT, 0, "cpu", folder, **objective, **options)
    return torch.cat([values.flatten() for values in model.state_dict().values()]), history


def signalling(number, at):
    def objective(model, batch, labels, beta) -> Terms:
        objective.calls += 1
        if objective.calls in at:
            signal.raise_signal(number)
        return model.loss(batch, beta=beta)

    objective.calls = 0
    return objective


@pytest.fixture(autouse=True)
def interruptible():
    """Processes that a shell starts in the background ignore SIGINT, and so would these tests."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def test_an_interrupt_waits_for_the_end_of_the_row_and_loses_nothing(tmp_path, capsys):
    usual, objective = signal.getsignal(signal.SIGINT), signalling(signal.SIGINT, [4])
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, objective)
    assert objective.calls == 6 and signal.getsignal(signal.SIGINT) is usual  # rows of three updates
    assert "Stopping at the end of this row" in capsys.readouterr().err
    weights, history = trained(tmp_path)
    expected, expected_history = trained()
    assert torch.equal(weights, expected) and history.equals(expected_history)


def test_a_second_interrupt_acts_at_once_and_so_does_one_without_a_folder(tmp_path):
    for folder, at, calls in ((tmp_path, [4, 5], 5), (None, [2], 2)):
        objective = signalling(signal.SIGINT, at)
        with pytest.raises(KeyboardInterrupt):
            trained(folder, objective)
        assert objective.calls == calls


def test_a_handler_that_goes_on_does_not_pass_a_part_of_the_run_for_the_whole(tmp_path):
    usual = signal.signal(signal.SIGTERM, lambda *_: None)  # as a scheduler's worker may have
    try:
        with pytest.raises(KeyboardInterrupt, match="stopped after update 6"):
            trained(tmp_path, signalling(signal.SIGTERM, [4]))
    finally:
        signal.signal(signal.SIGTERM, usual)


def test_training_in_a_thread_leaves_signals_alone(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(trained(tmp_path)[0]))
    thread.start()
    thread.join()
    assert torch.equal(found[0], trained()[0])


def test_seconds_are_those_of_all_parts(tmp_path):
    def slow(model, batch, labels, beta) -> Terms:
        time.sleep(0.05)
        return model.loss(batch, beta=beta)

    stopping = signalling(signal.SIGINT, [4])
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, lambda *arguments: (slow(*arguments), stopping(*arguments))[1])
    _, history = trained(tmp_path)
    assert history.attrs["seconds"] > 6 * 0.05


# --- numbers that go wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [8, SHORT.steps])
def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, at):
    def exploding(model, batch, labels, beta) -> Terms:
        exploding.calls += 1
        terms = model.loss(batch, beta=beta)
        if exploding.calls == at:
            first = next(model.parameters())
            terms = replace(terms, total=terms.total + (first - first.detach()).square().sum().sqrt())  # 0, slope 0/0
        return terms

    exploding.calls = 0
    with pytest.raises(
        DMVAEError, match=rf"step ({at + 1}: not finite.*gradient of the step before|{at}: the loss is)"
    ):
        trained(tmp_path, exploding, checkpoint_seconds=0)
    weights, _ = trained(tmp_path)  # from the last good one
    assert torch.equal(weights, trained()[0])


# --- whose checkpoint, whose evaluation -----------------------------------------------------------------------------


@pytest.mark.parametrize("other", [{"identity": "another"}, {"seed": 1}, {"plan": replace(SHORT, learning_rate=0.1)}])
def test_another_runs_checkpoint_is_refused(tmp_path, other):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, signalling(signal.SIGINT, [4]), identity="one")
    plan, seed, identity = other.get("plan", SHORT), other.get("seed", 0), other.get("identity", "one")
    with pytest.raises(DMVAEError, match="checkpoint.pt cannot be used.*of a run with another.*Delete it"):
        train(stress.small_model(), stress.small_data(), plan, seed, "cpu", tmp_path, identity=identity)


def test_an_evaluation_is_made_anew_when_its_code_changes_and_refused_when_it_was_moved(tmp_path):
    path = tmp_path / "run-a" / "measure.json"
    calls = []

    def one():
        calls.append(1)
        return {"share": 0.25, "none": float("nan")}

    assert runs.computed_once(path, one, one)["share"] == runs.computed_once(path, one, one)[
        "share"
    ] == 0.25 and calls == [1]

    def other():
        return {"share": 0.5}

    assert runs.computed_once(path, other, other) == {"share": 0.5}
    moved = tmp_path / "run-b" / "measure.json"
    moved.parent.mkdir()
    path.rename(moved)
    with pytest.raises(DMVAEError, match="was made as run-a/measure.json, for another run.*Delete it"):
        runs.computed_once(moved, other, other)


# --- the source ---------------------------------------------------------------------------------------------------


@pytest.fixture
def edited(monkeypatch):
    """Replaces text in the library's source, as this process would have imported it."""

    def edit(module, old, new):
        assert old in source.IMPORTED[module]
        monkeypatch.setitem(source.IMPORTED, module, source.IMPORTED[module].replace(old, new))
        monkeypatch.delitem(source.PATHS, module, raising=False)

    return edit


def test_a_change_of_the_mathematics_trains_anew_and_a_comment_does_not(tmp_path, edited):
    place = stress.place_of(tmp_path)
    first = stress.small_run(place)
    edited("dmvae_lib.distributions", "def product_of_experts(", "# a comment\ndef product_of_experts(")
    assert stress.small_run(place).folder == first.folder
    edited("dmvae_lib.report", "import json", "import json as another_name")
    assert stress.small_run(place).folder == first.folder
    assert not source.changed(first.info["config"]["code"])
    edited("dmvae_lib.models.dmvae", "return ", "return 2 * ")
    assert stress.small_run(place).folder != first.folder
    assert source.changed(first.info["config"]["code"]) == ["dmvae_lib.models.dmvae"]


def test_what_this_process_has_not_imported_has_not_changed():
    code = (
        "import sys, dmvae_lib.source as source\n"
        "name = 'dmvae_lib.flower_experiments:run_flower'\n"
        "assert 'dmvae_lib.flower_experiments' not in sys.modules\n"
        "print(source.changed({name: source._now(name), 'dmvae_lib.gone:build': '0', 'dmvae_lib.runs:gone': '0'}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.split() == ["['dmvae_lib.gone:build',", "'dmvae_lib.runs:gone']"], found.stderr


def test_a_run_names_what_it_trains_with_and_not_what_reports(tmp_path):
    code = stress.small_run(stress.place_of(tmp_path)).info["config"]["code"]
    for name in ("distributions", "networks", "training", "models.dmvae", "models.base", "data.pairing"):
        assert f"dmvae_lib.{name}" in code
    assert not [name for name in code if re.search("report|plots|metrics|flowers|reproduce|mmvae", name)]
    assert any(":" in name for name in code)  # what makes the model counts by itself


def test_a_notebooks_own_functions_count_with_and_without_their_source():
    def digests(code: str) -> dict:
        names = {"__name__": "notebook", "torch": torch}
        exec(code, names)  # there is no source, as in a shell: the bytecode counts
        return source.source_digests(names["make"])

    code = "def make():\n    return torch.nn.Linear(3, 1)\n"
    assert set(digests(code)) == {"notebook:make"}
    for old, new in (("3, 1", "4, 1"), ("Linear(3, 1)", "Linear(3, 1).double()")):
        assert digests(code.replace(old, new)) != digests(code)
    assert digests(code + "other = 5\n") == digests(code)


def test_a_library_that_was_edited_after_it_was_imported_is_refused(tmp_path, monkeypatch):
    copy = tmp_path / "distributions.py"
    copy.write_text(source.IMPORTED["dmvae_lib.distributions"] + "\n# a comment\n")
    monkeypatch.setitem(source.PATHS, "dmvae_lib.distributions", copy)
    assert source.source_digests("dmvae_lib.models.dmvae")
    copy.write_text(source.IMPORTED["dmvae_lib.distributions"] + "\nadded = 1\n")
    with pytest.raises(DMVAEError, match="distributions.py has changed since it was imported; start Python"):
        source.source_digests("dmvae_lib.models.dmvae")


def test_features_are_made_by_the_code_that_their_number_stands_for():
    """If this fails: raise features.PIPELINE if features come out otherwise now, then correct the digests here."""
    parts = (
        "image_features",
        "token_embeddings",
        "Descriptor",
        "_Pooled",
        "_image_network",
        "_small_bert",
        "decode_image",
    )
    found = [source.python_digest(inspect.getsource(getattr(features, part))) for part in parts]
    assert (features.PIPELINE, found) == (1, FEATURES)


FEATURES = [
    "21f818115c3d",
    "e2a2a2c0994b",
    "36d22274ad81",
    "116c8ed48283",
    "916deb8eed65",
    "39456f6836e6",
    "436825a1ab46",
]


# --- nothing foreign runs -----------------------------------------------------------------------------------------


def test_nothing_is_unpickled_and_no_foreign_code_is_asked_for():
    for path in {*(ROOT / "dmvae_lib").rglob("*.py")} - {
        ROOT / "dmvae_lib" / "cluster.py"
    }:  # Dask's messages are pickles
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}, path
            if isinstance(node, ast.Call):
                name, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert name not in ("eval", "exec", "compile", "os.system", "pd.read_pickle"), path
                assert name != "torch.load" or options.get("weights_only") == "True", path
                assert not name.endswith("get_state_dict") or options.get("weights_only") == "True", path
                assert name != "np.load" or options.get("allow_pickle") == "False", path
                assert not name.endswith("extractall") or "filter" in options, path
                assert options.get("trust_remote_code", "False") == "False" and "shell" not in options, path
    assert re.fullmatch("[0-9a-f]{40}", features.BERT_REVISION)


def test_cached_torchvision_weights_that_are_damaged_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    kept = tmp_path / "checkpoints" / "squeezenet1_0-b66bff10.pth"
    kept.parent.mkdir()
    kept.write_bytes(b"half of it")
    with pytest.raises(DMVAEError, match="squeezenet1_0-b66bff10.pth is truncated or damaged.*Delete it"):
        features.image_features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "squeezenet1_0", progress=False)


def test_the_lab_listens_to_this_machine_alone_and_wants_a_token(tmp_path):
    (line,) = re.findall(r"^lab:.*\n\t\$\(BIN\)/(jupyter lab .*)$", (ROOT / "Makefile").read_text(), re.M)
    command = line.replace("jupyter", f"{sys.executable} -m jupyter", 1).split() + ["--no-browser", "--port=0"]
    command += ["--allow-root"] * (os.geteuid() == 0)
    environment = {**os.environ, "JUPYTER_RUNTIME_DIR": str(tmp_path), "JUPYTER_CONFIG_DIR": str(tmp_path)}
    environment.pop("JUPYTER_TOKEN", None)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 300
        while not (found := [path for path in tmp_path.glob("jpserver-*.json") if path.stat().st_size]):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        about = json.loads(found[0].read_text())
        url = f"http://127.0.0.1:{about['port']}/api/contents"
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(url, timeout=120)
        assert len(about["token"]) >= 32
        assert urllib.request.urlopen(f"{url}?token={about['token']}", timeout=120).status == 200
        with pytest.raises(OSError):  # 127.0.0.2 is this machine too, and would answer a server that listens to all
            socket.create_connection(("127.0.0.2", about["port"]), timeout=5)
    finally:
        process.terminate()
        process.wait(20)


# --- locks, seals, records ----------------------------------------------------------------------------------------


def test_one_thread_at_a_time_is_in_a_folder_and_may_enter_again(tmp_path, capsys):
    inside, most = [], []

    def work():
        with files.locked(tmp_path / "new", "counting"), files.locked(tmp_path / "new", "counting again"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5 and "Waiting for another process: counting" in capsys.readouterr().err


def test_a_folder_that_cannot_be_locked_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(DMVAEError, match="cannot write .*file/below.*not a folder"),
        files.locked(tmp_path / "file/below", ""),
    ):
        pass


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    with pytest.raises(ZeroDivisionError), files.atomic_write(tmp_path / "model.safetensors") as temporary:
        left = [temporary, temporary.with_suffix("")]
        raise ZeroDivisionError
    kept = [tmp_path / name for name in (".lock", "a-01234567.csv", ".hidden-file", ".git-keep.txt")]
    for path in left + kept:
        path.touch()
    files.remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)), st.data())  # fmt: skip
def test_a_seal_holds_for_what_was_sealed_and_breaks_with_every_change(value, data):
    entry = json.loads(json.dumps(files.seal({"value": value, "sha": 1})))
    assert files.check_seal(entry, "it", "") is entry
    key = data.draw(st.sampled_from(sorted(entry)))
    for damaged in ({**entry, key: "other"}, {k: v for k, v in entry.items() if k != key}, {**entry, "more": 1}):
        with pytest.raises(DMVAEError, match="it is damaged"):
            files.check_seal(damaged, "it", "")


def test_files_without_published_checksums_are_held_to_an_earlier_day_or_to_the_folders_manifest(tmp_path):
    (tmp_path / "data").mkdir()
    one, record = tmp_path / "data" / "one.txt", tmp_path / "cache" / "record.sha256"
    one.write_text("one")
    check = lambda: files.verify_unchanged(tmp_path / "data", ["*.txt"], record)  # noqa: E731
    check()
    (tmp_path / "data" / "two.txt").write_text("two")
    check()
    assert [line.split()[1] for line in record.read_text().splitlines()] == ["one.txt", "two.txt"]
    one.write_text("onf")
    with pytest.raises(DMVAEError, match="one.txt .*SHA-256.*Fetch it again; or, if the change is meant"):
        check()
    (tmp_path / "data" / "MANIFEST.sha256").write_text(f"{files.sha256(one)}  ./one.txt\n{'0' * 64} *two.txt\n")
    with pytest.raises(DMVAEError, match="two.txt"):
        check()
    (tmp_path / "data" / "MANIFEST.sha256").write_text("no checksums")
    with pytest.raises(DMVAEError, match="MANIFEST.sha256 is no list of checksums"):
        check()
