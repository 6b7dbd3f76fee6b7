"""Faults that the interpreter does not see, or only by chance: it runs programs in their order, in memory without
bounds, and not in bf16."""

from . import Mutant

CONTEXT_ATTENTION_KERNELS = "tt_kernels/attention/context_attention_kernels.py"
LANG = "tt_kernels/ssm/lang.py"
ROUTE_BACKWARD = "tt_kernels/moe/route_backward.py"
ROUTE_KERNELS = "tt_kernels/moe/route_kernels.py"
MATCHES = "tests/kernels/test_kernels.py::test_matches_reference"

MUTANTS = tuple(
    Mutant(op, file, old, new, fault, sanitize=True, test=f"{MATCHES}[{case}-torch.bfloat16]")
    for op, case, file, old, new, fault in (
        (
            "route",
            "route-T37-D300-E13-K3",
            ROUTE_KERNELS,
            "tl.atomic_add(tickets_ptr + tiles, 1) == tiles - 1:",
            "(tl.atomic_add(tickets_ptr + tiles, 1) >= 0) & (tile == tiles - 1):",
            "the last tile sorts, not the last program (race)",
        ),
        (
            "route",
            "route-T37-D300-E13-K3",
            ROUTE_KERNELS,
            "tl.atomic_add(tickets_ptr + tile, 1)",
            'tl.atomic_add(tickets_ptr + tile, 1, sem="relaxed")',
            "a ticket that orders nothing (race)",
        ),
        (
            "route",
            "route-T37-D300-E13-K3",
            ROUTE_KERNELS,
            "    if tl.program_id(0) == 0:\n        tl.store(out.offsets + e, ends, mask=e < E)",
            "    if tl.program_id(0) == 0:\n        tl.store(out.offsets + e, ends)",
            "ends of experts that there are not (write outside)",
        ),
        (
            "route",
            "route-T3-D5-E8-K3",
            ROUTE_BACKWARD,
            "zeros, mask=(rows < T)[:, None] & (e < E)[None, :]",
            "zeros, mask=(rows < T)[:, None] & (e < 0)[None, :]",
            "logits that nobody chose get no gradient, not one of 0 (memory that nobody wrote)",
        ),
        (
            "append_attention",
            "append_attention-B2-L3-Hq4-Hkv2-P5-S9-page_size4",
            CONTEXT_ATTENTION_KERNELS,
            "offs_p), mask=mask)  # [BLOCK_T, BLOCK_P]",
            "offs_p))  # [BLOCK_T, BLOCK_P]",
            "keys of tokens that there are not (read outside)",
        ),
        (
            "ssd_chunk",
            "ssd_chunk-b2-L7-H4-P3-G2-N5-Q4",
            LANG,
            ".to(tl.uint16).to(tl.bfloat16, bitcast=True)",
            ".to(tl.uint16).to(tl.bfloat16)",
            "bits of bf16 taken for a number",
        ),
        (
            "ssd_chunk",
            "ssd_chunk-b2-L7-H4-P3-G2-N5-Q4",
            LANG,
            "0xFFFF0000 if dtype == tl.bfloat16 else 0xFFFFE000",
            "0xFFFFE000",
            "bf16 cut to the bits of fp16",
        ),
        (
            "ssd_chunk",
            "ssd_chunk-b2-L7-H4-P3-G2-N5-Q4",
            LANG,
            "rest = b - leading_bits(b, a.dtype)",
            "rest = b",
            "what the first product takes as bf16 is not taken off (missing bf16 cast)",
        ),
    )
)
