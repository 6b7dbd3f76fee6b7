"""How the threads of a CPU wait for each other: set before torch, and the OpenMP in it, are loaded."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from statistics import median

# Any of these says what the user wants; OMP_NUM_THREADS says nothing about waiting.
_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_LOAD = Path("/proc/loadavg")
# Turns of a waiting loop before a thread sleeps. libgomp's own 300000 are some 10 ms: where another process has the
# core that the last thread needs, each of a pass's hundred loops costs that much.
_SPINS = "10000"


def set_waiting() -> None:
    """Choose how OpenMP's threads wait, unless the user has, or torch is there already.

    On a machine where others compute, they sleep at once, so that the thread that is waited for gets a core; on a quiet
    one they spin, but briefly: waking a thread takes longer than a small model's loops. What is computed is the same.
    Two cores, the bundled model, 96 tokens: quiet 0.64 s by default, 0.66 s so, 1.52 s asleep; beside five to seven
    busy processes 41 to 54 s by default, 8 to 30 s so, 2.6 to 6.3 s asleep.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _CHOICES):
        return
    if others_compute():
        os.environ["OMP_WAIT_POLICY"] = "passive"
    else:
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def others_compute() -> bool:
    """Whether another thread of this machine is running or waiting for a core, in most of a few looks; False where the
    system does not say."""
    found = []
    try:
        for _ in range(5):
            found.append(int(_LOAD.read_text().split()[3].partition("/")[0]) - 1)  # without this process
            time.sleep(0.002)
    except (OSError, ValueError, IndexError):
        return False
    return median(found) >= 1
