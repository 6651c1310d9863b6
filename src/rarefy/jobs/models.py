"""Opening a model and its text, with everything checked before long work starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


@dataclass
class Text:
    """Packed text for fitting and for judging; no document is in both."""

    fit: list[Any]
    judge: list[Any]
    fit_names: list[str]
    judge_docs: list[Any]
    """In the order of the batches' document numbers."""

    @property
    def judge_names(self) -> list[str]:
        """Names of the documents judged on."""
        return [d.name for d in self.judge_docs]


def read_text(spec: str, opened: Opened, *, context: int, fit_tokens: int, judge_tokens: int, batch: int = 8) -> Text:
    """Documents of `spec`, split by name into text to fit on and text to judge on, packed into contexts."""
    from ..builtin.corpus import documents, pack, split

    longest = getattr(opened.model.config, "max_position_embeddings", context)
    if not 8 <= context <= longest:
        raise BadInput(f"context={context} must be in 8..{longest}, what the model was built for")
    held_out = 0.05 if spec == "stdlib" else 0.1
    fit_docs, judge_docs = split(documents(spec), held_out=held_out, seed=0)
    if not judge_docs or not fit_docs:
        both = [*fit_docs, *judge_docs]
        if len(both) < 2:
            raise BadInput(f"data {spec!r} holds {len(both)} document; at least two are needed, one to fit on and one to judge on")
        middle = max(1, len(both) // 10)
        fit_docs, judge_docs = both[middle:], both[:middle]
    judge_docs = _mixed(judge_docs)
    fit = list(pack(_mixed(fit_docs), opened.tokenizer, context, batch, max_tokens=fit_tokens or None))
    each = max(context // 2, 2 * judge_tokens // len(judge_docs)) if judge_tokens else None
    judge = list(pack(judge_docs, opened.tokenizer, context, batch, max_tokens=judge_tokens or None, each=each))
    read = 1 + max(int(b.doc.max()) for b in judge)
    return Text(fit, judge, [d.name for d in fit_docs], judge_docs[:read])


def _mixed(docs: list[Any]) -> list[Any]:
    """Documents in an order that does not follow their folders, so that the first ones are a fair sample."""
    import hashlib

    return sorted(docs, key=lambda d: hashlib.sha256(d.name.encode()).digest())
