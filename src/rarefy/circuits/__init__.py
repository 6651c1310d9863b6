"""Circuits: which units of a model act on which others, and by how much."""
