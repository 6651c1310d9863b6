"""Ground truth without downloads: concepts of Python source, planted dictionaries, associative recall, induction."""
