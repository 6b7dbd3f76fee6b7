"""Functions of published programs as they stand in their own files, which nobody here has copied."""

from __future__ import annotations
import __future__

import ast
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .base import Unavailable

FOLDER = "TT_PEER_SOURCES"


def published(repository: str, path: str, *names: str, **given: Any) -> SimpleNamespace:
    """Functions of one file of a published repository, without its module: nothing that it imports is loaded.

    Args:
        repository: owner and name; its checkout is a folder of that name in $TT_PEER_SOURCES.
        path:       of the file in there.
        names:      of functions; "A.b" is method b, alone, of a class A without bases.
        given:      globals that they see, beside torch, F, np.inf and math: other noise, say.
    Returns:
        the functions and classes by their names.
    Raises:
        Unavailable where the folder is not named or lacks the file; ValueError for a name that the file lacks.
    """
    folder = os.environ.get(FOLDER)
    if not folder:
        raise Unavailable(f"{FOLDER} is not set: the folder of published programs (docs/decoding.md)")
    file = Path(folder, repository, path)
    if not file.is_file():
        raise Unavailable(f"{FOLDER} has no {repository}/{path}")
    body: list[ast.stmt] = []
    missing = set(names)
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name in missing:
            body.append(node)
            missing.discard(node.name)
        elif isinstance(node, ast.ClassDef):
            methods = [m for m in node.body if isinstance(m, ast.FunctionDef) and f"{node.name}.{m.name}" in missing]
            if methods:
                missing -= {f"{node.name}.{m.name}" for m in methods}
                node.bases, node.keywords, node.decorator_list, node.body = [], [], [], list(methods)
                body.append(node)
    if missing:
        raise ValueError(f"{repository}/{path} has no {', '.join(sorted(missing))}")
    flags = __future__.annotations.compiler_flag  # annotations name types that are not loaded
    code = compile(ast.Module(body, []), str(file), "exec", flags=flags, dont_inherit=True)
    seen = dict(torch=torch, F=torch.nn.functional, np=SimpleNamespace(inf=math.inf), math=math) | given
    exec(code, seen)
    return SimpleNamespace(**{name.partition(".")[0]: seen[name.partition(".")[0]] for name in names})
