"""What each part of the method and of its training gives at toy scale: docs/experiments.md."""
