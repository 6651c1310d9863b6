"""Sparse coding: codes by solving for them on a fixed dictionary, and what is built from such solvers."""
