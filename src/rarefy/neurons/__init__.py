"""Neurons: which inputs of a linear layer are used for each row."""
