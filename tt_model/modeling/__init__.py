"""The model: its mixers, a tower of them, the two towers, and the state that generation carries."""
