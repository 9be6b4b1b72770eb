"""Files are whole or absent."""

import errno
import hashlib
import os
import stat

import pytest

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
