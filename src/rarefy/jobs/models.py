"""Opening a model and its text, with everything checked before long work starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..builtin.corpus import Text, text
from ..errors import BadInput


@dataclass
class Opened:
    """A model with its tokenizer and what is known of it."""

    model: Any
    tokenizer: Any
    info: Any

    def card(self) -> dict[str, Any]:
        """What a report says about it."""
        config = self.model.config
        return {
            "name": self.info.name, "revision": self.info.revision, "sha256": self.info.sha256,
            "params": self.info.n_params, "layers": config.num_hidden_layers, "d_model": config.hidden_size,
            "vocab": config.vocab_size,
        }


def open_for_work(spec: str) -> Opened:
    """The model, on as many threads as there are cores."""
    from ..hub import open_model

    model, tokenizer, info = open_model(spec)
    return Opened(model, tokenizer, info)


def list_sites(spec: str, pattern: str) -> list[dict[str, Any]]:
    """Sites of a model as plain records."""
    from ..site import sites

    model = open_for_work(spec).model
    return [{"name": s.name, "kind": s.kind, "d": s.d, "module": s.module_path} for s in sites(model, pattern).values()]


def read_text(spec: str, opened: Opened, *, context: int, fit_tokens: int, judge_tokens: int, batch: int = 8) -> Text:
    """Documents of `spec`, split by name into text to fit on and text to judge on, packed into contexts."""
    longest = getattr(opened.model.config, "max_position_embeddings", context)
    if not 8 <= context <= longest:
        raise BadInput(f"context={context} must be in 8..{longest}, what the model was built for")
    return text(spec, opened.tokenizer, context=context, fit_tokens=fit_tokens, judge_tokens=judge_tokens, batch=batch)
