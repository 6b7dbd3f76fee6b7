"""Faults that the interpreter does not see, or only by chance: it runs programs in their order, in memory without
bounds, and not in bf16."""

MUTANTS = {
    ("ssd_chunk", "ssm/ssd_chunk_launch.py", "test_states.py"): [
        ("raced", "initial = Slots.of(read_slots(initial.ptr, initial.indices, b, own=True))", "pass")
    ],
    (
        "route",
        "moe/route_kernels.py",
        "test_kernels.py::test_matches_reference[route-T37-D520-E13-K3-torch.bfloat16]",
    ): [
        (
            "the last tile sorts, not the last program (race)",
            "tl.atomic_add(tickets_ptr + tiles, 1) == tiles - 1:",
            "(tl.atomic_add(tickets_ptr + tiles, 1) >= 0) & (tile == tiles - 1):",
        ),
        ("a ticket that orders nothing (race)", "(tickets_ptr + tile, 1)", '(tickets_ptr + tile, 1, sem="relaxed")'),
        (
            "ends of experts that there are not, in the last program's sorting (write outside)",
            "ends, mask=e < E)\n    first = ",
            "ends)\n    first = ",
        ),
    ],
    ("route", "moe/route_kernels.py", "test_route_bounds.py::test_lists_by_launches_of_their_own[13]"): [
        (
            "ends of experts that there are not (write outside)",
            "    if tl.program_id(0) == 0:\n        tl.store(out.offsets + e, ends, mask=e < E)",
            "    if tl.program_id(0) == 0:\n        tl.store(out.offsets + e, ends)",
        ),
    ],
    # The interpreter's products are exact to fp32, those of tensor cores are not.
    ("route", "moe/route_choice.py", "test_route_bounds.py::test_neighbours_of_a_batch[5-1-4.0-True]"): [
        ("the products' error forgotten", "(0.25 * error + _SCORE)", "_SCORE")
    ],
    ("route", "moe/route_kernels.py", "test_route_bounds.py::test_neighbours_of_a_batch[5-1-4.0-True]"): [
        ("lengths of x forgotten", "tl.sqrt(error) * tl.sqrt(most)", "tl.sqrt(most)")
    ],
    ("route", "moe/route_backward.py", "test_kernels.py::test_matches_reference[route-T3-D5-E8-K3-torch.bfloat16]"): [
        (
            "logits that nobody chose get no gradient, not one of 0 (memory that nobody wrote)",
            "rest, mask=(rows < T)[:, None] & (e < E)",
            "rest, mask=(rows < T)[:, None] & (e < 0)",
        )
    ],
    (
        "append_attention",
        "attention/context_attention_kernels.py",
        "test_kernels.py::test_matches_reference[append_attention-B2-L3-Hq4-Hkv2-P5-S9-page_size4-torch.bfloat16]",
    ): [("keys of tokens that there are not (read outside)", "offs_p), mask=mask)  # [", "offs_p))  # [")],
    (
        "ssd_chunk",
        "ssm/lang.py",
        "test_kernels.py::test_matches_reference[ssd_chunk-b2-L7-H4-P3-G2-N5-Q4-torch.bfloat16]",
    ): [
        ("bits of bf16 taken for a number", "tl.uint16).to(tl.bfloat16, bitcast=True", "tl.uint16).to(tl.bfloat16"),
        ("bf16 cut to the bits of fp16", "0xFFFF0000 if dtype == tl.bfloat16 else 0xFFFFE000", "0xFFFFE000"),
        (
            "what the first product takes as bf16 is not taken off (missing bf16 cast)",
            "rest = b - leading_bits(b, a.dtype)",
            "rest = b",
        ),
    ],
}
