"""Files that are whole or absent, and what they say: atomic writing, locks and checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dmvae_lib.errors import DMVAEError

# What an OSError that is raised while writing says about the folder, not about the writer's own code.
FOLDER_ERRORS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file system takes no file that large; choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EISDIR: "the path is a folder; give a file name inside it",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "the folder is not writable; make it so, or choose another folder"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a part of the path is a file, not a folder; choose another path"),
    **dict.fromkeys((errno.ENOLCK, errno.EOPNOTSUPP), "the file system has no locks; enable them, or take another"),
}


@contextmanager
def _explained(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FOLDER_ERRORS:
            raise
        raise DMVAEError(f"cannot write {path}: {FOLDER_ERRORS[error.errno]}, then run again ({error}).") from error


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there becomes `path` when the block ends well.

    A reader, or a process that is cut off, sees the old file or the new one, never half of one, and once the block has
    ended the new one outlives a loss of power. If the block raises, the temporary file is removed and `path` stays as
    it was; a process that is killed leaves it (`remove_leftovers`). Parent folders are created. The temporary name
    keeps the suffix, by which many writers choose the format.

    Raises DMVAEError for a full disk, a read-only folder, a path that cannot be a file, or a block that wrote nothing.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if not temporary.is_file():
                raise DMVAEError(f"cannot write {path}: the block wrote nothing to the temporary path; write to it.")
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            if os.name == "posix":  # the folder too, else a loss of power could undo the renaming
                folder = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
    finally:
        with suppress(OSError):  # the folder is gone or not ours: the error that led here says more
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Removes the temporary files that killed processes left in a folder; hold its lock, so that none is in use."""
    for path in Path(folder).glob(".*-????????*"):
        if re.fullmatch(r"\..+-[0-9a-f]{8}(\.\w+)?", path.name):
            path.unlink(missing_ok=True)


@contextmanager
def locked(folder: str | os.PathLike, work: str) -> Iterator[None]:
    """Only one process, or thread, at a time is in such a block for a folder; the others wait, and say so on stderr.

    work: what the message says that the other is doing. The lock is the operating system's on the file folder/.lock
    and ends with its holder, however that ends; a network file system must pass flock on to its server. The same
    thread may enter again. Raises DMVAEError for a folder that cannot be written or locked.
    """
    lock = FileLock(Path(folder, ".lock"), is_singleton=True)
    with _explained(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            print(f"Waiting for another process: {work}, in {folder} …", file=sys.stderr, flush=True)
            lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _reading(path: str | os.PathLike, repair: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DMVAEError(f"cannot read {path}: {error.strerror}. {repair}") from error


def _digest(path: str | os.PathLike, algorithm: str) -> str:
    with _reading(path, "Check the path, or fetch the file again."), open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def sha256(path: str | os.PathLike) -> str:
    """The file's SHA-256, 64 hexadecimal digits. Raises DMVAEError for a file that cannot be read."""
    return _digest(path, "sha256")


def md5(path: str | os.PathLike) -> str:
    """The file's MD5, 32 hexadecimal digits. Raises DMVAEError for a file that cannot be read."""
    return _digest(path, "md5")


def verify(path: str | os.PathLike, digest: str, repair: str = "Delete it and fetch it again.") -> None:
    """Checks a file against its SHA-256 (64 digits) or MD5 (32 digits). repair: what the error says to do.
    Raises DMVAEError for a file that is missing or has another digest."""
    if len(digest) not in (32, 64):
        raise DMVAEError(f"verify: digest {digest!r} is neither an MD5 (32 digits) nor a SHA-256 (64 digits).")
    name, found = ("MD5", md5(path)) if len(digest) == 32 else ("SHA-256", sha256(path))
    if found != digest.lower():
        held = f"{path} ({os.path.getsize(path):,} bytes) has {name} {found}, expected {digest}"
        raise DMVAEError(f"{held}: it is truncated, damaged or another version. {repair}")


def verify_listed(root: str | os.PathLike, patterns: Sequence[str]) -> None:
    """Checks the files below `root` that match against root/MANIFEST.sha256 (as `sha256sum` writes it), if there is
    one.
    For files without published checksums; one that is not listed is not checked. patterns: as Path.glob takes them.
    Raises DMVAEError that names the first file that has changed, and for a list that is none."""
    root, listed = Path(root), Path(root, "MANIFEST.sha256")
    if not listed.is_file():
        return
    lines = listed.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [match for line in lines if (match := re.fullmatch(r"([0-9a-f]{64}) [ *](?:\./)?(.+)", line))]
    if not found or len(found) < len(lines):
        raise DMVAEError(f"{listed} is no list of checksums as `sha256sum` writes it; restore or delete that file.")
    digests = {match[2]: match[1] for match in found}
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        if digest := digests.get(path.relative_to(root).as_posix()):
            verify(path, digest, f"Fetch it again; or, if the change is meant, correct {listed}, which lists it.")


def write_sealed(path: str | os.PathLike, content: bytes) -> None:
    """Writes `content` and, after it, its SHA-256 (32 bytes), by `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content + hashlib.sha256(content).digest())


def read_sealed(path: str | os.PathLike, repair: str) -> bytes:
    """What `write_sealed` wrote. Raises DMVAEError, which ends with `repair`, unless every byte is the one written."""
    with _reading(path, repair):
        raw = Path(path).read_bytes()
    content, digest = raw[:-32], raw[-32:]
    if hashlib.sha256(content).digest() != digest:
        raise DMVAEError(f"{path} ({len(raw):,} bytes) is truncated or damaged: its checksum does not fit. {repair}")
    return content


def seal(entry: dict) -> dict:
    """The entry, as JSON gives it back, with the SHA-256 of all the rest as "sha256"."""
    plain = {key: value for key, value in json.loads(json.dumps(entry)).items() if key != "sha256"}
    return plain | {"sha256": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def check_seal(entry: object, where: str, repair: str) -> dict:
    """A sealed entry, if it is what `seal` made. Raises DMVAEError, which begins with `where` and ends with `repair`."""
    if not isinstance(entry, dict) or entry.get("sha256") != seal(entry)["sha256"]:
        raise DMVAEError(f"{where} is damaged or was changed by hand: its checksum does not fit. {repair}")
    return entry


def read_json(path: str | os.PathLike, repair: str) -> dict:
    """The object in a JSON file. Raises DMVAEError, which ends with `repair`, for anything else."""
    try:
        with _reading(path, repair):
            found = json.loads(Path(path).read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DMVAEError(f"{path} cannot be read as JSON ({error}): it is truncated or damaged. {repair}") from error
    if not isinstance(found, dict):
        raise DMVAEError(f"{path} holds a JSON {type(found).__name__}; expected an object. {repair}")
    return found


def write_json(path: str | os.PathLike, entry: dict) -> None:
    """Writes the entry, by `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(entry, indent=1) + "\n")
