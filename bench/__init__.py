"""Measurements: speed against peers and against the hardware, and what the models write. Nothing imports this."""
