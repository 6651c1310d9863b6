"""Latents: dictionaries that write an activation as a sum of few directions."""
