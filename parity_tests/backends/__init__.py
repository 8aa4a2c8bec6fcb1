"""Implementations to be held against the reference, each a module as parity_tests/backend.py describes."""
