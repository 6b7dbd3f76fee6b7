"""Programs that a model wrote, run apart from us: each in a process, a temporary folder and limits of its own."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tt_model.training.boilerplate import parse, program

CHILD = Path(__file__).with_name("exercise.py")
SECONDS = 5  # of CPU time; on the clock three times as many, as the machine may be busy
MEGABYTES = 512


def task_of(header: str) -> dict[str, Any]:
    """What `exercise` is told of a specification: plain values."""
    spec = parse(header)
    task = asdict(spec) | {"support": ""}
    for field, known in zip(task["fields"], spec.fields, strict=True):
        field |= {"required": known.required, "value": known.value}
    if spec.kind == "tests":
        task["support"] = program(str(replace(spec, kind="class")))
    return task


def run(header: str, code: str, *, seconds: int = SECONDS, megabytes: int = MEGABYTES) -> str:
    """Use a program as its specification says, in a process of its own; what went wrong, or nothing."""
    secret = secrets.token_hex(16)
    given = {"task": task_of(header), "code": code, "seconds": seconds, "megabytes": megabytes, "secret": secret}
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            answer, _ = child.communicate(json.dumps(given).encode(), timeout=3 * seconds)
        except subprocess.TimeoutExpired:
            return f"more than {3 * seconds} s"
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()
    line = answer.decode(errors="replace")
    if not line.startswith(secret):
        name = signal.Signals(-child.returncode).name if child.returncode < 0 else f"status {child.returncode}"
        return f"ended early: {name}"
    return line.removeprefix(secret).strip("\n")


def run_all(
    pairs: Iterable[tuple[str, str]], *, workers: int | None = None, advance: Callable[[], Any] = lambda: None
) -> dict[tuple[str, str], str]:
    """`run` of every different pair of header and code."""
    distinct: Sequence[tuple[str, str]] = list(dict.fromkeys(pairs))

    def one(pair: tuple[str, str]) -> str:
        try:
            return run(*pair)
        finally:
            advance()

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return dict(zip(distinct, pool.map(one, distinct), strict=True))
