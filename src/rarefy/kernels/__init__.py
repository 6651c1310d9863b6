"""One folder an operation: reference.py defines it, the others are faster, __init__.py chooses."""
