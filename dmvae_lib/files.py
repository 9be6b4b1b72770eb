"""Files that are whole or absent: atomic writing, checksums and downloads."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

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
}


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there becomes `path` when the block ends well.

    A reader, or a run that is cut off, sees the old file or the new one, never half of one. If the block raises,
    the temporary file is removed and `path` stays as it was. Parent folders are created. The temporary name keeps
    the suffix, by which many writers choose the format.

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
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in FOLDER_ERRORS:
            raise
        raise DMVAEError(f"cannot write {path}: {FOLDER_ERRORS[error.errno]}, then run again ({error}).") from error
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
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


def verify(path: str | os.PathLike, digest: str) -> None:
    """Checks a file against its SHA-256 (64 digits) or MD5 (32 digits).

    Raises DMVAEError for a file that is missing or has another digest.
    """
    if len(digest) not in (32, 64):
        raise DMVAEError(f"verify: digest {digest!r} is neither an MD5 (32 digits) nor a SHA-256 (64 digits).")
    name, found = ("MD5", md5(path)) if len(digest) == 32 else ("SHA-256", sha256(path))
    if found != digest.lower():
        raise DMVAEError(
            f"{path} ({os.path.getsize(path):,} bytes) has {name} {found}, expected {digest}: it is truncated, damaged "
            "or another version. Delete it and fetch it again."
        )


def fetch(url: str, path: str | os.PathLike, sha256: str, timeout: float = 30.0, attempts: int = 3) -> Path:
    """Downloads `url` to `path`, which appears once its SHA-256 has been checked; a good file there is kept.

    What has arrived stays in `path`.part, and the next attempt, or the next run, asks the server for the rest. A server
    that cannot resume sends it all again. timeout: seconds without a byte.

    Raises DMVAEError for a digest that is none, a server that refuses, drops the connection `attempts` times or falls
    silent, for bytes with another digest (they are removed), and for a `path` that holds another file.
    """
    path, part = Path(path), Path(f"{path}.part")
    if not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise DMVAEError(f"fetch: sha256={sha256!r}; expected 64 hexadecimal digits, as its publisher gives them.")
    if path.exists():
        verify(path, sha256)
        return path
    for attempt in range(attempts):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
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
    os.replace(part, path)
    return path


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
