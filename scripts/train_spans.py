"""A small Llama that reduces nested arithmetic and names the spans it needs; accuracy and cache entries read with its masks and without.

    python scripts/train_spans.py [--steps 2000] [--masked 0.5] [--seed 0]

Shape letters: B = expressions, T = tokens.
"""

import argparse
import contextlib
import time

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from rarefy import replaced
from rarefy.attention.trained.span import Span
from rarefy.tasks.arithmetic_spans import LINE, SYNTAX, VOCABULARY, Traces, arithmetic_traces


def train(steps: int, masked: float, most: int, seed: int, width: int = 64, layers: int = 3, tokens: int = 1536) -> LlamaForCausalLM:
    """From scratch on lines of traces; `masked` is the share of steps run under the traces' own masks."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )
    torch.manual_seed(seed)
    model, span = LlamaForCausalLM(config), Span(**SYNTAX)
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    draw, begun = torch.Generator().manual_seed(seed), time.perf_counter()
    for step in range(steps):
        longest = 3 if step < 0.1 * steps else 6 if step < 0.3 * steps else most
        groups = int(torch.randint(2, longest + 1, (1,), generator=draw))
        traces = arithmetic_traces(groups, max(8, tokens // (13 * groups)), seed=1 + seed * steps + step)
        ids = traces.ids_BT
        more = {"attention_mask": span.mask(ids)[:, None]} if torch.rand((), generator=draw) < masked else {}
        logits = model(input_ids=ids, use_cache=False, **more).logits[:, traces.prompt - 1 : -1]
        loss = cross_entropy(logits.flatten(0, 1), ids[:, traces.prompt :].flatten())
        optimiser.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 if step < steps / 2 else 2.05 - 2 * step / steps)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 99:
            print(f"step {step + 1}  loss {loss.item():.4f}  {time.perf_counter() - begun:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def judge(model: LlamaForCausalLM, traces: Traces, masks: bool) -> tuple[torch.Tensor, float, float]:
    """What is written after the prompts, the share of cache entries read in decoding, and seconds."""
    span, begun = Span(**SYNTAX), time.perf_counter()
    with span.reading(model), replaced(model, {"layers.*.attn": span}) if masks else contextlib.nullcontext():
        out = model.generate(
            traces.inputs_BT, attention_mask=torch.ones_like(traces.inputs_BT), max_new_tokens=traces.ids_BT.shape[1] - traces.prompt,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )
    return out, span.measured_density(), time.perf_counter() - begun


def main() -> None:
    """Train, then judge on new expressions."""
    ask = argparse.ArgumentParser()
    for name, value in {"steps": 2000, "masked": 0.5, "seed": 0, "most": 8}.items():
        ask.add_argument(f"--{name}", type=type(value), default=value)
    given = ask.parse_args()
    model = train(given.steps, given.masked, given.most, given.seed)
    for groups in (4, 8):
        traces = arithmetic_traces(groups, 200, seed=-1)
        (free, _, dense_s), (bound, share, sparse_s) = judge(model, traces, False), judge(model, traces, True)
        right = [(ids[:, -1] == traces.answer_B).float().mean().item() for ids in (free, bound)]
        same = (free == bound).all(1).float().mean().item()
        lines = (bound == traces.ids_BT)[:, traces.prompt :].unflatten(1, (-1, LINE)).all(2).float().mean().item()
        print(f"groups {groups}: right {right[0]:.3f} without masks, {right[1]:.3f} with; same text {same:.3f}; lines right {lines:.3f}; "
              f"entries read {share:.3f}; {dense_s:.1f} s and {sparse_s:.1f} s")


if __name__ == "__main__":
    main()
