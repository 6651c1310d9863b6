"""What is there without a network: a small language model of Python and the standard library as text."""
