"""Attention over a structure that is more than a mask of positions: phases, summaries, searches, training-time patterns."""
