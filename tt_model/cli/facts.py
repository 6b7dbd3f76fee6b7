"""What a run depends on besides its settings, by hash: kept in its folder, and compared when it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..files import read_object, write_text

FACTS = "run.json"
# What --accept names, and the facts behind it. "settings" are those of the optimizer and the schedule.
KINDS = {
    "data": ("data", "held_out", "tokens", "held_out_tokens"),
    "model": ("model", "weights", "denoiser"),
    "code": ("code",),
}
ACCEPTED = ("settings", *KINDS)
_OF = {fact: kind for kind, facts in KINDS.items() for fact in facts}


def weights_digest(folder: str | Path) -> str:
    """A hash of a model's files of weights, whole, in the order of their names."""
    from ..checkpoint.folder import Folder

    whole = hashlib.sha256()
    files = Folder(folder)
    for path in sorted({stored.file for stored in files.tensors.values()}):
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def code_digest() -> str:
    """The versions of this program and of torch, and a hash of the source of both packages."""
    import torch

    from .. import __version__

    whole = hashlib.sha256()
    for package in ("tt_kernels", "tt_model"):
        spec = find_spec(package)
        assert spec is not None  # both are installed together
        for root in spec.submodule_search_locations or ():
            for path in sorted(Path(root).rglob("*.py")):
                whole.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return f"twotower {__version__} {whole.hexdigest()[:16]}, torch {torch.__version__}"


def read_facts(out: Path) -> dict[str, Any] | None:
    """What run.json says; None when there is none. ValueError for a file that is something else."""
    return read_object(out / FACTS) if (out / FACTS).is_file() else None


def steps_logged(out: Path) -> int:
    """How many steps a run has saved."""
    log = out / "log.jsonl"
    return len(log.read_text(encoding="utf-8").splitlines()) if log.is_file() else 0


def same_run(
    out: Path, facts: dict[str, Any], *, resumed: bool, accept: Collection[str], store: bool = True
) -> dict[str, list]:
    """Compare what a run depends on with what it began with, and note it unless `store` is False.

    Returns (name: [old, new]) of what has changed since the run began and `accept` allows.
    Raises ValueError, with what changed and how to go on, for a change that it does not.
    """
    changed: dict[str, list] = {}
    was = read_facts(out) if resumed else None
    if was is not None:
        changed = _changes(was, json.loads(json.dumps(facts)))  # through JSON, as `was` went: tuples become lists
        kinds = {_OF.get(name, "") for name in changed}
        if refused := kinds - set(accept):
            what = "; ".join(f"{name} was {old}, now {now}" for name, (old, now) in changed.items())
            how = "use a new folder"
            if "" not in refused:
                how += f", or go on from its state with it (--accept {' '.join(k for k in KINDS if k in kinds)})"
            raise ValueError(f"{out}: this run began otherwise ({what}); {how}")
        changes = was.get("changes", []) + ([{"after_step": steps_logged(out)} | changed] if changed else [])
        facts = was | facts | ({"changes": changes} if changes else {})
    if store:
        write_text(out / FACTS, json.dumps(facts, indent=1) + "\n")
    return changed


def _changes(was: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, list]:
    changed: dict[str, list] = {}
    for name, now in facts.items():
        old = was.get(name, now)
        if isinstance(now, dict) and isinstance(old, dict):
            changed |= {f"{name}.{k}": [old.get(k), v] for k, v in now.items() if old.get(k) != v}
        elif old != now:
            changed[name] = [old, now]
    return changed
