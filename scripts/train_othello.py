"""Train the small model of Othello games that ships with rarefy; see rarefy.tasks.othello. About half an hour on one core.

    python scripts/train_othello.py --out src/rarefy/builtin/othello_files
"""
import argparse
import json
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from rarefy.tasks.othello import SIZE, Games, games

HELD_OUT = 1_000_003
"""Seed of the games that the card's figures are measured on; training uses 1, 2, 3, ..."""


def model() -> LlamaForCausalLM:
    """Four layers of width 128 over the squares, a token that begins a game and one for a game that is over."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=SIZE**2 + 2, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=SIZE**2, bos_token_id=SIZE**2, eos_token_id=SIZE**2 + 1, tie_word_embeddings=False,
    ))


@torch.no_grad()
def measure(net: LlamaForCausalLM, on: Games) -> dict[str, float]:
    """Share of positions whose likeliest next move is legal, probability given to legal moves, and CE next to the best possible."""
    logits = net(input_ids=on.input_ids).logits[..., : SIZE**2].float()
    legal, live = on.legal, on.live
    share = logits.softmax(-1)
    best = legal.gather(-1, share.argmax(-1, keepdim=True))[..., 0]
    even = legal.sum(-1).float()
    ce = cross_entropy(logits[:, :-1][live[:, :-1]], on.input_ids[:, 1:][live[:, :-1]])
    return {
        "legal_top1": float(best[live].float().mean()), "legal_mass": float((share * legal).sum(-1)[live].mean()),
        "ce": float(ce), "ce_of_an_even_choice_among_legal_moves": float(even[:, :-1][live[:, :-1]].log().mean()),
    }


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--out", type=Path, required=True)
    ask.add_argument("--steps", type=int, default=5000)
    ask.add_argument("--batch", type=int, default=128)
    asked = ask.parse_args()
    torch.set_num_threads(1)
    net, began = model(), time.time()
    matrices = [p for n, p in net.named_parameters() if p.ndim == 2 and "layers" in n]
    rest = [p for n, p in net.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    optimisers = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01), torch.optim.AdamW(rest, lr=3e-3, weight_decay=0.0)]
    peaks = [0.02, 3e-3]
    for step in range(asked.steps):
        rate = min(1.0, (step + 1) / 50, (asked.steps - step) / (0.4 * asked.steps))
        for optimiser, peak in zip(optimisers, peaks, strict=True):
            optimiser.param_groups[0]["lr"] = peak * rate
        on = games(asked.batch, seed=step + 1)
        live = on.live[:, :-1]
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(input_ids=on.input_ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1][live].float(), on.input_ids[:, 1:][live])
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        if step % 50 == 0:
            scores = measure(net, games(200, seed=HELD_OUT)) if step % 250 == 0 else ""
            print(step, f"{loss.item():.4f}", f"{time.time() - began:.0f} s", scores, flush=True)
    scores = measure(net.eval(), games(2000, seed=HELD_OUT))
    print(scores)
    assert scores["legal_top1"] > 0.97, "a model that plays illegal moves has not learnt the board"
    net.save_pretrained(asked.out)
    card = {
        **scores, "board": f"{SIZE}x{SIZE}", "trained_on": f"{asked.steps * asked.batch:,} games of random legal moves made by rarefy.tasks.othello",
        "held_out_seed": HELD_OUT, "licence": "Apache-2.0",
    }
    (asked.out / "card.json").write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
