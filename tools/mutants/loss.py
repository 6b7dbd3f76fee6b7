"""Faults in the loss as it runs on a GPU."""

MUTANTS = {
    (
        "linear_cross_entropy",
        "loss/linear_cross_entropy.py",
        "test_linear_cross_entropy.py::test_parts_of_a_vocabulary_are_the_whole",
    ): [
        ("targets of earlier parts", "here = (local >= 0) & ", "here = "),
        (
            "what is not masked has a gradient",
            "torch.where(rows.mask.unsqueeze(-1), dhidden.mul_(share), 0)",
            "dhidden.mul_(share)",
        ),
        ("the target as any token", " - here.unsqueeze(-1).to(p.dtype)", ""),
        ("the mean of all tokens", "self.mask.sum().clamp(min=1)", "self.mask.numel() + 0 * self.mask.sum()"),
        ("the last part's sum alone", "torch.logaddexp(lse, logits.logsumexp(-1))", "logits.logsumexp(-1)"),
        ("the last part's gradient alone", "dhidden += _product", "dhidden = _product"),
    ],
    (
        "linear_cross_entropy",
        "loss/linear_cross_entropy.py",
        "test_linear_cross_entropy.py::test_gradients_of_16_bits_are_rounded_once",
    ): [("a softmax of 16 bits", "[first, probabilities.sub_(first).to(like.dtype)]", "[first]")],
    (
        "linear_cross_entropy",
        "loss/linear_cross_entropy.py",
        "test_linear_cross_entropy.py::test_what_is_not_masked_is_not_read[parts]",
    ): [("NaN of what is not masked", "torch.where(mask.unsqueeze(-1), hidden, 0), weight", "hidden, weight")],
}
