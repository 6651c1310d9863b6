"""What the tests of the command line share: a tiny model, text, and what a command left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

CONTEXT = 32


@dataclass
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))

    @property
    def line(self) -> str:
        """Standard error, which must be one line."""
        assert self.err.count("\n") == 1 and self.err.endswith("\n"), self.err
        return self.err[:-1]


Run = Callable[..., Answer]


def refuses(answer: Answer, *parts: str) -> None:
    """Held to the rule for bad input: one line with these parts in it, exit code 2, nothing on standard output but stages."""
    assert answer.code == 2, answer
    assert answer.line.startswith("rarefy: ") and "Traceback" not in answer.err
    for part in parts:
        assert part in answer.line, answer.line


def save_byte_tokenizer(folder: Path) -> None:
    """A token a byte, and <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)} | {"<s>": 256}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tf.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>").save_pretrained(folder)


def build_tiny() -> Any:
    """Two layers, 32 wide, with grouped-query attention; norms and weights away from their trivial starts."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = tf.LlamaForCausalLM(tf.LlamaConfig(
            vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, bos_token_id=256, eos_token_id=None, pad_token_id=None,
        ))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4).add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def words(seed: int, lines: int) -> str:
    """Text with some order in it."""
    g = torch.Generator().manual_seed(seed)
    vocabulary = ["alpha", "beta = 3", "for i in range(9):", "    return x", "# note", "'text'", "gamma(delta)"]
    return "\n".join(vocabulary[int(i)] for i in torch.randint(len(vocabulary), (lines,), generator=g)) + "\n"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every name below a folder, and the bytes of the files."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
