"""Apply each mutant to a copy of the tree and run its op's tests, in Triton's interpreter, or in ttsem where only that
sees it: all must make them fail."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.mutants import Mutant, all_mutants

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("tt_kernels", "tests", "cards", "tools")
TESTS = ("tests/kernels/test_kernels.py", "tests/kernels/test_ops.py")
TTSEM = importlib.util.find_spec("ttsem")


def mutated(source: str, mutant: Mutant) -> str:
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file}: {mutant.old!r} occurs {source.count(mutant.old)} times, expected once")
    return source.replace(mutant.old, mutant.new)


def run_tests(op: str, test: str, sanitize: bool, mutant: Mutant | None = None) -> subprocess.CompletedProcess[str]:
    """An op's tests, or the one that is named, on a copy of the tree, with the mutant's fault in it or as it is."""
    chosen = [f"tests/kernels/{test}"] if test else [*TESTS, "-k", op]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        shutil.copy(ROOT / "pyproject.toml", tree)
        for name in COPIED:
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            file = tree / mutant.file
            file.write_text(mutated(file.read_text(), mutant))
        path, switch = [str(tree)], "TRITON_INTERPRET"
        if sanitize:
            chosen += ["-p", "tools.sanitize", "-m", "sanitize"]
            path, switch = [*path, str(tree / "tests"), str(Path(TTSEM.origin).parents[1])], "TT_KERNELS_ON_CPU"
        env = {switch: "1", "PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": str(tree / "cache")}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *chosen]
        quiet = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True)
        return subprocess.run(command, cwd=tree, env=os.environ | env, **quiet)


def survives(mutant: Mutant) -> str | None:
    """None if the tests fail, as they should; else what happened."""
    done = run_tests(mutant.op, mutant.test, mutant.sanitize, mutant)
    if done.returncode == 1 or done.returncode < 0:  # a fault that writes where it must not may kill the process
        return None
    return "survives" if done.returncode == 0 else f"pytest exits with {done.returncode}:\n{done.stdout[-2000:]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="AREA", help="files of tools/mutants (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    areas = all_mutants()
    if unknown := set(options.only or ()) - set(areas):
        parser.error(f"no area is called {', '.join(sorted(unknown))}; there are {', '.join(areas)}")
    chosen = [m for area in options.only or areas for m in areas[area]]
    if TTSEM is None and any(mutant.sanitize for mutant in chosen):
        parser.error("faults that only ttsem can see need it on PYTHONPATH, as `make mutants` puts it there")
    failed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        wanted = sorted({(m.op if not m.test else "", m.test, m.sanitize) for m in chosen})
        for names, done in zip(wanted, pool.map(lambda names: run_tests(*names), wanted), strict=True):
            if done.returncode:
                tests = "".join(names[:2])
                print(f"the tests of {tests!r} fail without any fault planted:\n{done.stdout[-2000:]}", file=sys.stderr)
                return 1
        for mutant, outcome in zip(chosen, pool.map(survives, chosen), strict=True):
            failed += outcome is not None
            print(f"{'caught' if outcome is None else 'MISSED'}  {mutant.op:22s} {mutant.fault}", flush=True)
            if outcome not in (None, "survives"):
                print(outcome)
    print(f"{len(chosen) - failed} of {len(chosen)} caught")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
