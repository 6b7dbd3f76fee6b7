"""Files as people have them: text that begins with a byte order mark, git-LFS pointers in place of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")


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
