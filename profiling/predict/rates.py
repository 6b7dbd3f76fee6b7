"""The numbers that the model rests on: one table, each row with its source, and the pipe of every instruction."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

GUIDE = "CUDA programming guide, throughput of native instructions"


@dataclass(frozen=True)
class Rates:
    """Of one target. Cycles of a pipe are for one warp instruction on a quarter of a multiprocessor."""

    multiprocessors: int = 132  # H200 data sheet
    clock: float = 1.75e9  # assumed: boost under load
    dram: float = 4.3e12  # bytes/s read and written: device copy measured on an H200 (as bench/whole.py)
    l2: float = 8.5e12  # bytes/s to all multiprocessors: assumed, +-30 %
    products: float = 790e12  # bf16 FLOP/s: matrix product measured on an H200 (as bench/whole.py)
    node: float = 1.2e-6  # s that a node of a CUDA graph adds: assumed
    dram_latency: float = 700e-9  # s: assumed
    l2_latency: int = 300  # cycles: assumed
    l1_latency: int = 40  # cycles, L1 and shared memory: assumed
    atomic_latency: int = 600  # cycles, there and back: assumed, twice the L2's
    barrier: int = 20  # cycles after the last warp has come: assumed
    sfu_latency: int = 20  # cycles, special functions, conversions, shuffles: assumed
    fma: float = 1  # FFMA, FADD, FMUL, HFMA2: 128 lanes a cycle (GUIDE)
    alu: float = 2  # integer, logic, compare, select, min/max, pack: 64 lanes a cycle (GUIDE)
    imad: float = 2  # 64 lanes a cycle (GUIDE)
    imad_wide: float = 4  # IMAD.WIDE and .HI: assumed, half of it
    special: float = 8  # MUFU, POPC: 16 lanes a cycle (GUIDE); F2F, I2F, F2I: assumed alike
    fp64: float = 2  # DFMA: 64 lanes a cycle (GUIDE)
    dmma: float = 64  # DMMA.16x8x16, 2048 products: 67 TFLOP/s by the data sheet
    hmma: float = 6.5  # HMMA.16816 (bf16, 2048 products): assumed, 62 % of wgmma's rate
    hgmma: float = 1.2  # HGMMA.64xNx16 takes N / 2 cycles by the data sheet; times this to meet `products`
    lsu: float = 4  # at least, and 32 bytes a cycle: 128 bytes a cycle and multiprocessor (GUIDE)
    redux: float = 8  # 16 lanes a cycle (GUIDE)


RATES = {
    90: Rates(),
    # A100 SXM 80 GB: data sheet; 90 % of its bandwidth and 85 % of its 312 TFLOP/s assumed.
    80: Rates(108, 1.41e9, 1.8e12, 4.5e12, 265e12, dram_latency=600e-9, fp64=4, dmma=128, hmma=8),
    # B200: data sheet; 85 % of its bandwidth and 75 % of its 2.25 PFLOP/s assumed. No fp64 tensor instruction.
    100: replace(Rates(), multiprocessors=148, clock=1.85e9, dram=6.8e12, l2=12e12, products=1690e12),
}

FMA = {"FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2", "HFMA2", "HADD2", "HMUL2"}
SPECIAL = {"MUFU", "F2F", "I2F", "F2I", "FRND", "POPC", "FLO", "BREV", "S2R", "S2UR"}
FP64 = {"DFMA", "DADD", "DMUL", "DSETP"}
ATOMIC = {"ATOM", "ATOMG", "ATOMS", "RED"}
GLOBAL = {"LDG", "LD", "LDGSTS", "LDL"}
SHARED = {"LDS", "LDSM", "STS", "STSM", "SHFL", "LDC", "LDCU", "MATCH"}
MEMORY = GLOBAL | ATOMIC | SHARED | {"STG", "ST", "STL"}
CONTROL = {"BRA", "EXIT", "BSSY", "BSYNC", "BAR", "NOP", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "WARPSYNC", "RET", "CALL",
           "YIELD", "SYNCS", "FENCE", "MEMBAR", "ERRBAR", "CCTL", "BREAK", "ELECT", "UTMALDG", "UTMASTG", "UTCBAR",
           "UBLKCP", "UTMACMDFLUSH", "UTMACCTL", "UTMAPF", "B2R", "WARPGROUPSET", "USETMAXREG", "ACQBULK"}  # fmt: skip
UNIFORM = re.compile(r"^(U[A-Z]|R2UR|VOTEU|REDUX)")
TENSOR = {"HGMMA", "QGMMA", "IGMMA", "BGMMA", "HMMA", "IMMA", "DMMA", "UTCHMMA", "UTCQMMA"}
PIPES = ("tensor", "fma", "alu", "imad", "fp64", "special", "lsu", "uniform", "issue")


def products(opcode: str, r: Rates) -> float:
    """Cycles of a tensor-core instruction: by its shape."""
    name, *suffixes = opcode.split(".")
    shape = next((s for s in suffixes if re.fullmatch(r"\d+x\d+x\d+", s)), "")
    if name == "DMMA":
        m, n, k = map(int, (shape or "8x8x4").split("x"))
        return r.dmma * m * n * k / 2048
    if name in ("HMMA", "IMMA"):
        wide = 2 if "TF32" in suffixes else 1
        k = 16 if any(s.startswith("16816") for s in suffixes) else 32 if "16832" in suffixes else 8
        return r.hmma * (k / 16 if k < 32 else 1) * wide
    if name.startswith("UTC"):
        return 1.0  # shapes stand in a descriptor: `products` of the whole launch bounds it instead
    n = int(shape.split("x")[1]) if shape else 64
    return n / 2 * r.hgmma


def width(opcode: str) -> int:
    """Bytes a thread moves by a memory instruction."""
    if opcode.startswith(("LDSM", "STSM")):
        return 4 * int(opcode.rpartition(".")[2]) if opcode.rpartition(".")[2].isdigit() else 4
    bits = re.search(r"\.(?:LTC\w+\.)?U?(8|16|32|64|128|256)\b", opcode)
    return int(bits[1]) // 8 if bits else 4


def pipe(opcode: str, r: Rates) -> tuple[str, float]:
    """(pipe, cycles of it) for an opcode with its suffixes."""
    name = opcode.partition(".")[0]
    if name in TENSOR:
        return "tensor", products(opcode, r)
    if name in FMA:
        return "fma", r.fma
    if name in ("IMAD", "IDP"):
        return "imad", r.imad_wide if "WIDE" in opcode or ".HI" in opcode else r.imad
    if name in FP64:
        return "fp64", r.fp64
    if name in SPECIAL:
        return "special", r.special
    if name == "REDUX" or name == "CREDUX":
        return "special", r.redux
    if name in MEMORY:
        return "lsu", max(r.lsu, width(opcode)) if name not in ("LDC", "LDCU", "SHFL") else r.lsu
    if name in CONTROL:
        return "issue", 0.0
    if UNIFORM.match(name):
        return "uniform", 2.0
    return "alu", r.alu


def latency(name: str, cycles: float, dram: float, r: Rates) -> float:
    """Cycles until the scoreboard of an instruction of variable latency is set."""
    if name in GLOBAL:
        return dram
    if name in ATOMIC:
        return r.atomic_latency if name != "ATOMS" else 2 * r.l1_latency
    if name in SHARED:
        return r.l1_latency if name != "SHFL" else r.sfu_latency
    return r.sfu_latency + cycles
