"""Keys and key blocks: which of them each query attends to."""
