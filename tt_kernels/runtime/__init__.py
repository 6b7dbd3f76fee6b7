"""What every op shares: registration and dispatch, checks, launches, helpers inside kernels."""
