"""Tools of developers: the offline compiler and its lock, planted faults, tuning, the sanitizer."""
