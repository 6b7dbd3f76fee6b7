"""Files as people have them, with byte order marks or as git-LFS pointers; files and folders that appear whole or not
at all; a folder held against a second process. Standard library only.

What is being written lies beside its target as `.NAME.TOKEN.partial`, locked by the process that fills it. The system
lets go of a lock when its process ends, however it ends, so what a killed process left is told from what a live one is
writing, on every host that shares the file system.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
LOCK = ".lock"  # in a folder that is held: who holds it
_TOKEN = re.compile(r"[0-9a-f]{16}\.partial(\.new)?")
_BUSY = (errno.EWOULDBLOCK, errno.EACCES)
_held: dict[str, int] = {}  # folders that a thread of this process holds


def refuse_pointer(file: Path) -> None:
    """ValueError when `file` is what git leaves in place of a large file that git-LFS has not fetched."""
    with file.open("rb") as opened:
        begins = opened.read(max(map(len, _POINTERS)))
    if begins.startswith(_POINTERS):
        raise ValueError(
            f"{file}: a git-LFS pointer, not the file itself: install git-lfs and run `git lfs pull` in the repository "
            "that it came from"
        )


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark. ValueError when it is a git-LFS pointer or not UTF-8."""
    refuse_pointer(file)
    return file.read_bytes().decode("utf-8-sig")


def read_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds. ValueError, naming the file, for anything else."""
    refuse_pointer(file)
    try:
        values = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values


@contextmanager
def partial(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """An empty file (or folder) of one's own beside `target`, to be filled and renamed; removed if it is still there.

    What killed processes left of the same target is removed first. OSError when it cannot be made.
    """
    prefix = _prefix(target)
    _sweep(target, prefix)
    path = target.with_name(f"{prefix}{secrets.token_hex(8)}.partial")
    # It is locked before it bears the name that others look for.
    unlocked = path.with_name(path.name + ".new")
    if folder:
        unlocked.mkdir()
    else:
        unlocked.open("x").close()
    handle = os.open(unlocked, os.O_RDONLY)
    try:
        with suppress(OSError):  # without locks here nothing is swept up here either
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(unlocked, path)
        yield path
    finally:
        for rest in (unlocked, path):
            _remove(rest)
        os.close(handle)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary file beside `path`, then rename it: readers see the old file or the new one.

    OSError names `path`, also where the system's error names nothing, as for a disk that is full.
    """
    with partial(path) as temporary:
        try:
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        except OSError as error:
            raise named(error, temporary, path) from error


def write_text(path: Path, text: str) -> None:
    """A UTF-8 file, as `write_atomically` writes one."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def named(error: OSError, temporary: Path, target: Path) -> OSError:
    """An error of writing `temporary`, told of `target`. One about another file, as that it is missing, stays."""
    about = [Path(os.fsdecode(f)) for f in (error.filename, error.filename2) if isinstance(f, str | bytes)]
    inside = [path for path in about if path == temporary or temporary in path.parents]
    if error.errno is None or (about and not inside):
        return error
    file = target / inside[-1].relative_to(temporary) if inside else target
    return type(error)(error.errno, error.strerror, str(file))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system that names no file, as for a disk that is full, name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes, and other threads, out of a folder that is being written to.

    A lock that a killed process left is taken over. The same thread may hold a folder again inside.
    Raises BlockingIOError that says who holds it. Warns, and goes on, on a file system without locks.
    """
    key = os.path.realpath(folder)
    if _held.get(key) == threading.get_ident():
        yield
        return
    path = folder / LOCK
    handle = _lock(path)
    try:
        os.ftruncate(handle, 0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}, since {now}\n".encode())
        _held[key] = threading.get_ident()
        yield
    finally:
        _held.pop(key, None)
        path.unlink(missing_ok=True)  # while it is locked: who waits for it sees that it has gone
        os.close(handle)


def _lock(path: Path) -> int:
    """A handle of the lock file, locked."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except FileNotFoundError:
            pass  # its holder let go between our two steps, and removed it
        except OSError as error:
            if error.errno not in _BUSY:
                what = f"{path.parent}: cannot be locked here ({error.strerror}): see that no other run writes to it"
                warnings.warn(what, stacklevel=3)
                return handle
            who = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise BlockingIOError(f"{path.parent}: in use by {who}; wait for it, or use another folder") from None
        os.close(handle)


def _prefix(target: Path) -> str:
    """How the names of a target's partial files begin. A long name is hashed: a file name has at most 255 bytes."""
    name = target.name
    return f".{name if len(os.fsencode(name)) < 200 else hashlib.sha256(os.fsencode(name)).hexdigest()}."


def _sweep(target: Path, prefix: str) -> None:
    """Remove what killed processes left of a target."""
    with suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            if entry.name.startswith(prefix) and _TOKEN.fullmatch(entry.name, len(prefix)):
                with suppress(OSError):
                    if entry.name.endswith(".new") and time.time() - entry.stat().st_mtime < 60:
                        continue  # somebody is about to lock it
                    handle = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW)
                    try:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        _remove(Path(entry.path))
                    finally:
                        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
