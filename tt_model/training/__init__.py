"""Training: data, objectives, schedule, and the loop with its saved state."""
