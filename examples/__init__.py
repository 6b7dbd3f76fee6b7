"""Programs of a page, each an op or two in somebody's own model."""
