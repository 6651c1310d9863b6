"""The papers' own patterns, a function each, by domain: text, pictures, points, documents. All are words that `parse` reads."""

from . import documents, pictures, points, text
from .example import Example

EXAMPLES: dict[str, Example] = {one.name: one for one in (*text.EXAMPLES, *pictures.EXAMPLES, *points.EXAMPLES, *documents.EXAMPLES)}
"""By the name of their card, patterns/<name>: laid over a sequence of any length of 64 or more, with made-up metadata."""

__all__ = ["EXAMPLES", "Example"]
