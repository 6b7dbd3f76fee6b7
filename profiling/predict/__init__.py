"""A static model of launches: what time each should take, from its machine code. `python -m profiling.predict`."""
