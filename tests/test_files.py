"""Files are whole or absent, and say when they have been changed."""

import errno
import hashlib
import json
import os
import stat
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmvae_lib import files
from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import atomic_write, md5, sha256, verify


def test_written_file_appears_whole_with_its_folders(tmp_path):
    path = tmp_path / "new" / "folder" / "table.csv"
    with atomic_write(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".csv"
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["table.csv"]


def test_whoever_reads_the_old_file_meanwhile_reads_all_of_it(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_text("old and whole")
    with open(path, "rb", buffering=0) as reader:
        first = reader.read(3)
        with atomic_write(path) as temporary:
            temporary.write_text("new")
        assert first + reader.read() == b"old and whole" and path.read_text() == "new"


def test_new_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    with atomic_write(tmp_path / "ours") as temporary:
        temporary.touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "ours")}
    assert len(modes) == 1


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), FileNotFoundError("some other file")])
def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "checkpoint.pt"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_write(path) as temporary:
        temporary.write_text("new")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("code", "message"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "not writable")]
)
def test_a_full_or_read_only_disk_is_said_so(tmp_path, code, message, monkeypatch):
    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DMVAEError, match=message), atomic_write(tmp_path / "result.csv") as temporary:
        temporary.write_text("text")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_fills_up_in_the_block_is_said_so(tmp_path):
    with pytest.raises(DMVAEError, match="disk is full"), atomic_write(tmp_path / "result.csv") as temporary:
        temporary.symlink_to("/dev/full")
        with open(temporary, "w") as file:
            file.write("text")
    assert os.listdir(tmp_path) == []


def test_paths_that_cannot_be_files(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DMVAEError, match="not a folder"), atomic_write(tmp_path / "file" / "below"):
        pass
    with pytest.raises(DMVAEError, match="wrote nothing"), atomic_write(tmp_path / "empty"):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(DMVAEError, match="is a folder"), atomic_write(tmp_path / "folder") as temporary:
        temporary.touch()
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_digests_are_the_standard_ones(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")  # the test vector of FIPS 180 and of RFC 1321
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert md5(path) == "900150983cd24fb0d6963f7d28e17f72"
    verify(path, sha256(path).upper())
    verify(path, md5(path))


def test_verify_names_file_digests_and_repair(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(b"abd")
    with pytest.raises(DMVAEError) as error:
        verify(path, hashlib.sha256(b"abc").hexdigest())
    for part in (str(path), sha256(path), hashlib.sha256(b"abc").hexdigest(), "Delete it and fetch it again"):
        assert part in str(error.value)
    with pytest.raises(DMVAEError, match="MD5"):
        verify(path, hashlib.md5(b"abc").hexdigest())
    with pytest.raises(DMVAEError, match="cannot read"):
        verify(tmp_path / "absent", "0" * 64)
    with pytest.raises(DMVAEError, match="neither"):
        verify(path, "abc")


# --- locks and leftovers ------------------------------------------------------------------------------------------


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


def test_a_folder_that_cannot_be_locked_is_an_error_and_the_blocks_own_errors_stay_its_own(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(DMVAEError, match="cannot write .*file/below.*not a folder"),
        files.locked(tmp_path / "file/below", ""),
    ):
        pass
    with pytest.raises(PermissionError), files.locked(tmp_path / "folder", ""):
        raise PermissionError(errno.EACCES, "of another file")


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    with pytest.raises(ZeroDivisionError), files.atomic_write(tmp_path / "model.safetensors") as temporary:
        left = [temporary, temporary.with_suffix("")]
        raise ZeroDivisionError
    kept = [tmp_path / name for name in (".lock", "a-01234567.csv", ".hidden-file", ".git-keep.txt")]
    for path in left + kept:
        path.touch()
    files.remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


# --- seals and lists ----------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON, st.data())
def test_a_seal_holds_for_what_was_sealed_and_breaks_with_every_change(value, data):
    entry = json.loads(json.dumps(files.seal({"value": value, "sha": 1})))
    assert files.check_seal(entry, "it", "") is entry
    key = data.draw(st.sampled_from(sorted(entry)))
    for damaged in ({**entry, key: "other"}, {k: v for k, v in entry.items() if k != key}, {**entry, "more": 1}):
        with pytest.raises(DMVAEError, match="it is damaged"):
            files.check_seal(damaged, "it", "")


@given(st.binary(max_size=200), st.data())
def test_sealed_bytes_come_back_and_any_changed_or_missing_byte_is_seen(tmp_path_factory, content, data):
    path = tmp_path_factory.mktemp("sealed") / "checkpoint.pt"
    files.write_sealed(path, content)
    assert files.read_sealed(path, "") == content
    raw = path.read_bytes()
    at = data.draw(st.integers(0, len(raw) - 1))
    for damaged in (raw[:at], raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]):
        path.write_bytes(damaged)
        with pytest.raises(DMVAEError, match=r"checkpoint.pt .* is truncated or damaged.*Train anew."):
            files.read_sealed(path, "Train anew.")


def test_json_that_is_none_or_no_object_is_named(tmp_path):
    path = tmp_path / "entry.json"
    files.write_json(path, {"a": [1, 0.5]})
    assert files.read_json(path, "") == {"a": [1, 0.5]}
    for text, message in (("{", "cannot be read as JSON"), ("[1]", "holds a JSON list; expected an object")):
        path.write_text(text)
        with pytest.raises(DMVAEError, match=f"entry.json {message}.*Make it again."):
            files.read_json(path, "Make it again.")


def test_files_without_published_checksums_are_held_to_the_folders_own_list(tmp_path):
    (tmp_path / "below").mkdir()
    one, two, listed = tmp_path / "one.txt", tmp_path / "below" / "two.txt", tmp_path / "MANIFEST.sha256"
    one.write_text("one")
    two.write_text("two")
    files.verify_listed(tmp_path, ["*.txt"])  # nothing is listed, nothing is checked
    listed.write_text(f"{sha256(one)}  ./one.txt\n{sha256(two)} *below/two.txt\n{'0' * 64}  absent.txt\n")
    files.verify_listed(tmp_path, ["*.txt", "below/*"])
    two.write_text("twp")
    files.verify_listed(tmp_path, ["*.txt"])
    with pytest.raises(
        DMVAEError, match="two.txt .*SHA-256.*Fetch it again; or, if the change is meant, correct .*MAN"
    ):
        files.verify_listed(tmp_path, ["*.txt", "below/*"])
    for text in ("no checksums", "", f"{sha256(one)}  one.txt\nand more"):
        listed.write_text(text)
        with pytest.raises(DMVAEError, match="MANIFEST.sha256 is no list of checksums"):
            files.verify_listed(tmp_path, ["*.txt"])
