"""Opening a model and its text, with everything checked before long work starts.

Shape letters: B = windows, T = tokens, D = width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from ..builtin.corpus import Document, Text, documents, text
from ..errors import BadInput, Unsupported
from ..families import config_of
from ..selection import check_finite
from ..site import capture, sites
from .screen import Screen

LEAST_CONTEXT = 8


@dataclass
class Opened:
    """A model with its tokenizer and what is known of it."""

    model: Any
    tokenizer: Any
    info: Any

    def card(self) -> dict[str, Any]:
        """What a report says about it."""
        return {
            "name": self.info.name, "revision": self.info.revision, "sha256": self.info.sha256, "params": self.info.n_params,
            "layers": self.info.n_layers, "d_model": self.info.d_model, "vocab": config_of(self.model).vocab_size,
        }


def open_for_work(spec: str) -> Opened:
    """The model, ready to run."""
    from ..hub import open_model

    model, tokenizer, info = open_model(spec)
    return Opened(model, tokenizer, info)


def opened(spec: str, screen: Screen, *, causal: bool = False) -> Opened:
    """`open_for_work` as a stage that says what was opened.

    Args:
        causal: refuse models that do not predict the next token, by which alone text is judged.
    """
    with screen.stage("open the model") as update:
        found = open_for_work(spec)
        info = found.info
        revision = f" at {info.revision[:12]}" if info.revision else ""
        update(f"{info.name}{revision}, {info.n_params / 1e6:.1f} M parameters, {info.n_layers} layers, sha256 {info.sha256[:12]}")
    if causal and not type(found.model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise Unsupported(f"{info.name} is a {type(found.model).__name__}, which predicts no next token to judge; open a causal language model")
    return found


def list_sites(spec: str, pattern: str) -> list[dict[str, Any]]:
    """Sites of a model as plain records."""
    return [{"name": s.name, "kind": s.kind, "d": s.d, "module": s.module_path} for s in sites(open_for_work(spec).model, pattern).values()]


def read_documents(spec: str, screen: Screen) -> list[Document]:
    """Documents of a --data specification, read before a model is opened so that a wrong one costs nothing."""
    with screen.stage(f"read {spec}") as update:
        found = list(documents(spec))
        update(f"{len(found):,} documents, {sum(len(d.text) for d in found) / 1e6:.1f} M characters")
    return found


def check_context(context: int, **tokens: int) -> None:
    """Raise BadInput for sizes of text that no model could take."""
    if context < LEAST_CONTEXT:
        raise BadInput(f"context={context} must be at least {LEAST_CONTEXT} tokens")
    for name, value in tokens.items():
        if value < 0:
            raise BadInput(f"{name}={value} must be >= 0; 0 reads all")


def read_text(
    spec: str | Iterable[Document], opened: Opened, *, context: int, fit_tokens: int, judge_tokens: int, batch: int = 8,
) -> Text:
    """Documents, split by name into text to fit on and text to judge on, packed into contexts that the model was built for."""
    longest = getattr(config_of(opened.model), "max_position_embeddings", None) or context
    if not LEAST_CONTEXT <= context <= longest:
        raise BadInput(f"context={context} must be in {LEAST_CONTEXT}..{longest}, what the model was built for")
    return text(spec, opened.tokenizer, context=context, fit_tokens=fit_tokens, judge_tokens=judge_tokens, batch=batch)


def cut_text(docs: list[Document], opened: Opened, screen: Screen, *, context: int, fit_tokens: int, judge_tokens: int) -> Text:
    """`read_text` as a stage that says how much it is."""
    with screen.stage("cut it into contexts") as update:
        found = read_text(docs, opened, context=context, fit_tokens=fit_tokens, judge_tokens=judge_tokens)
        tokens, held = (sum(b.input_ids.numel() for b in batches) for batches in (found.fit, found.judge))
        update(f"{tokens:,} tokens to fit on" + (f", {held:,} held out of it to judge on" if judge_tokens != 1 else ""))
    return found


def digest(batches: Sequence[Any]) -> str:
    """Hash of the tokens of packed text, by which a run knows its data again."""
    total = xxhash.xxh3_128()
    for batch in batches:
        total.update(f"{list(batch.input_ids.shape)} ".encode())
        total.update(batch.input_ids.contiguous().numpy().tobytes())
    return total.hexdigest()


@torch.no_grad()
def probe(opened: Opened, found: Text, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """What flows at `names` in one context, [1, T, D]; raises BadInput, naming the place, where the model gives NaN or inf."""
    ids_BT = found.fit[0].input_ids[:1]
    if names:
        got = capture(opened.model, names, input_ids=ids_BT)
        for name, value in got.items():
            check_finite(value, f"activations of {opened.info.name} at {name}")
        return got
    more = {"use_cache": False} if hasattr(config_of(opened.model), "use_cache") else {}
    check_finite(opened.model(input_ids=ids_BT, **more)[0], f"output of {opened.info.name}")      # logits, or the last layer's rows
    return {}
