"""Files that are whole or absent, and what they say: atomic writing, locks, checksums and downloads."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from dmvae_lib.errors import DMVAEError

# What an OSError that is raised while writing says about the folder, not about the writer's own code.
FOLDER_ERRORS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file system takes no file that large; choose another folder",
    errno.EACCES: "the folder is not writable; change its permissions or choose another folder",
    errno.EPERM: "the folder is not writable; change its permissions or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    errno.EEXIST: "a part of the path is a file, not a folder; choose another path",
    errno.EISDIR: "the path is a folder; give a file name inside it",
    errno.ENOLCK: "the file system has no locks; choose another folder, or have locks enabled",
    errno.EOPNOTSUPP: "the file system has no locks; choose another folder, or have locks enabled",
}


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there becomes `path` when the block ends well.

    A reader, or a run that is cut off, sees the old file or the new one, never half of one, and once the block has
    ended the new one outlives a loss of power. If the block raises, the temporary file is removed and `path` stays as
    it was; a process that is killed leaves it (`remove_leftovers`). Parent folders are created. The temporary name
    keeps the suffix, by which many writers choose the format.

    Raises DMVAEError for a full disk, a read-only folder, a path that cannot be a file, or a block that wrote nothing.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if not temporary.is_file():
            raise DMVAEError(f"cannot write {path}: the block wrote nothing to the temporary path; write to it.")
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        _replace(temporary, path)
    except OSError as error:
        if error.errno not in FOLDER_ERRORS:
            raise
        raise DMVAEError(f"cannot write {path}: {FOLDER_ERRORS[error.errno]}, then run again ({error}).") from error
    finally:
        remove(temporary)


def _replace(source: Path, target: Path) -> None:
    """Renames, and has the folder written to the disk too: else a loss of power could undo the renaming."""
    os.replace(source, target)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Removes the temporary files that killed processes left in a folder; hold its lock, so that none is in use."""
    for path in Path(folder).glob(".*-????????*"):
        if re.fullmatch(r"\..+-[0-9a-f]{8}(\.\w+)?", path.name):
            remove(path)


@contextmanager
def locked(folder: str | os.PathLike, work: str) -> Iterator[None]:
    """Only one process, or thread, at a time is in such a block for a folder; the others wait, and say so on stderr.

    work: what the message says that the other is doing. The lock is the operating system's on the file folder/.lock,
    so it ends with its holder, however that ends; the file stays and means nothing by itself. A network file system
    must pass flock on to its server, as NFS and Lustre do unless told otherwise, for machines to exclude each other.
    The same thread may enter again.

    Raises DMVAEError for a folder that cannot be written or locked.
    """
    lock = FileLock(Path(folder, ".lock"), is_singleton=True)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            print(f"Waiting for another process: {work}, in {folder} …", file=sys.stderr, flush=True)
            lock.acquire(poll_interval=0.2)
    except OSError as error:
        if error.errno not in FOLDER_ERRORS:
            raise
        raise DMVAEError(f"cannot write {folder}: {FOLDER_ERRORS[error.errno]}, then run again ({error}).") from error
    try:
        yield
    finally:
        lock.release()


def remove(path: Path) -> None:
    """Removes a file if it is there and may be removed."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # the folder is gone or not ours: the error that led here says more than this one would


def _digest(path: str | os.PathLike, algorithm: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, algorithm).hexdigest()
    except OSError as error:
        raise DMVAEError(f"cannot read {path}: {error.strerror}; check the path, or fetch the file again.") from error


def sha256(path: str | os.PathLike) -> str:
    """The file's SHA-256, 64 hexadecimal digits. Raises DMVAEError for a file that cannot be read."""
    return _digest(path, "sha256")


def md5(path: str | os.PathLike) -> str:
    """The file's MD5, 32 hexadecimal digits. Raises DMVAEError for a file that cannot be read."""
    return _digest(path, "md5")


def verify(path: str | os.PathLike, digest: str, repair: str = "Delete it and fetch it again.") -> None:
    """Checks a file against its SHA-256 (64 digits) or MD5 (32 digits). repair: what the error says to do.

    Raises DMVAEError for a file that is missing or has another digest.
    """
    if len(digest) not in (32, 64):
        raise DMVAEError(f"verify: digest {digest!r} is neither an MD5 (32 digits) nor a SHA-256 (64 digits).")
    name, found = ("MD5", md5(path)) if len(digest) == 32 else ("SHA-256", sha256(path))
    if found != digest.lower():
        raise DMVAEError(
            f"{path} ({os.path.getsize(path):,} bytes) has {name} {found}, expected {digest}: it is truncated, damaged "
            f"or another version. {repair}"
        )


def verify_unchanged(root: str | os.PathLike, patterns: Sequence[str], record: str | os.PathLike | None) -> None:
    """Checks the files below `root` that match, which have no published checksums, against those of an earlier day.

    These are root/MANIFEST.sha256, where there is one (as `sha256sum` writes it), or else `record`, which the first
    call writes. What was damaged before the first call is so not seen; what is damaged later is. patterns: as
    Path.glob takes them. Raises DMVAEError that names the first file that has changed.
    """
    root = Path(root)
    found = {path.relative_to(root).as_posix(): path for pattern in patterns for path in root.glob(pattern)}
    listed = root / "MANIFEST.sha256"
    if listed.is_file():
        known = _checksums(listed)
    elif record is not None:
        listed = Path(record)
        known = _checksums(listed) if listed.exists() else {}
        new = {name: sha256(found[name]) for name in sorted(found.keys() - known.keys())}
        if new:
            with atomic_write(listed) as temporary:
                temporary.write_text("".join(f"{digest}  {name}\n" for name, digest in (known | new).items()))
    else:
        return
    for name in sorted(found.keys() & known.keys()):
        repair = f"Fetch it again; or, if the change is meant, delete or correct {listed}, which lists it."
        verify(found[name], known[name], repair)


def _checksums(path: Path) -> dict[str, str]:
    """{file: SHA-256} of what `sha256sum` wrote."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DMVAEError(f"the checksums {path} cannot be read ({error}); restore or delete that file.") from error
    pairs = [match for line in lines if (match := re.fullmatch(r"([0-9a-f]{64}) [ *](?:\./)?(.+)", line))]
    if not pairs or len(pairs) < len(lines):
        raise DMVAEError(f"{path} is no list of checksums as `sha256sum` writes it; restore or delete that file.")
    return {match[2]: match[1] for match in pairs}


def write_sealed(path: str | os.PathLike, content: bytes) -> None:
    """Writes `content` and, after it, its SHA-256 (32 bytes), by `atomic_write`."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.write(hashlib.sha256(content).digest())


def read_sealed(path: str | os.PathLike, repair: str) -> bytes:
    """What `write_sealed` wrote. Raises DMVAEError, which ends with `repair`, unless every byte is the one written."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise DMVAEError(f"cannot read {path}: {error.strerror}. {repair}") from error
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
        found = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DMVAEError(f"{path} cannot be read as JSON ({error}): it is truncated or damaged. {repair}") from error
    if not isinstance(found, dict):
        raise DMVAEError(f"{path} holds a JSON {type(found).__name__}; expected an object. {repair}")
    return found


def write_json(path: str | os.PathLike, entry: dict) -> None:
    """Writes the entry, by `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(entry, indent=1) + "\n")


def fetch(url: str, path: str | os.PathLike, sha256: str, timeout: float = 30.0, attempts: int = 3) -> Path:
    """Downloads `url` to `path`, which appears once its SHA-256 has been checked; a good file there is kept.

    What has arrived stays in `path`.part, and the next attempt, or the next run, asks the server for the rest. A server
    that cannot resume sends it all again. timeout: seconds without a byte. Only one process fetches into a folder.

    Raises DMVAEError for a digest that is none, a server that refuses, drops the connection `attempts` times or falls
    silent, for bytes with another digest (they are removed), and for a `path` that holds another file.
    """
    path, part = Path(path), Path(f"{path}.part")
    if not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise DMVAEError(f"fetch: sha256={sha256!r}; expected 64 hexadecimal digits, as its publisher gives them.")
    if not path.exists():
        with locked(path.parent, "downloading"):
            if not path.exists():
                _fetch(url, path, part, sha256, timeout, attempts)
    verify(path, sha256)
    return path


def _fetch(url: str, path: Path, part: Path, sha256: str, timeout: float, attempts: int) -> None:
    for attempt in range(attempts):
        try:
            _download(url, part, timeout)
            break
        except HTTPError as error:
            raise DMVAEError(
                f"cannot fetch {url}: the server says {error.code} {error.reason}; check the URL."
            ) from error
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, OSError) and error.errno in FOLDER_ERRORS:
                raise DMVAEError(f"cannot write {part}: {FOLDER_ERRORS[error.errno]}, then run again.") from error
            if attempt == attempts - 1 or isinstance(error, ValueError):
                held = f"{part.stat().st_size:,} bytes are kept; " if part.exists() else ""
                raise DMVAEError(
                    f"cannot fetch {url} in {attempt + 1} attempts ({error or type(error).__name__}); {held}check URL "
                    "and network and run again."
                ) from error
    found = _digest(part, "sha256")
    if found != sha256.lower():
        size = part.stat().st_size
        part.unlink()
        raise DMVAEError(
            f"{url} gave {size:,} bytes with SHA-256 {found}, expected {sha256}: they are damaged or another version "
            "and have been removed. Run again, or check the URL and the digest."
        )
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    _replace(part, path)


def _download(url: str, part: Path, timeout: float) -> None:
    """Appends to `part` what the server has beyond it, or raises."""
    held = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"Range": f"bytes={held}-"} if held else {})
    try:
        response = urlopen(request, timeout=timeout)
    except HTTPError as error:
        if error.code != 416:
            raise
        return  # nothing beyond what is held: the digest tells whether that is the file
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {held}-")
        length = response.headers.get("Content-Length")
        expected = int(length) if length else None
        received = 0
        bar = tqdm(total=expected, desc=part.stem, unit="B", unit_scale=True, leave=False)
        with open(part, "ab" if resumed else "wb") as file, bar:
            while block := response.read(1 << 20):
                file.write(block)
                received += len(block)
                bar.update(len(block))
        if expected is not None and received < expected:  # read() ends quietly when the connection drops
            raise ConnectionError(f"the connection ended after {received:,} of {expected:,} bytes")
