"""Train the built-in model: a small Llama of Python source, on CPU, in about an hour on two cores.

    python scripts/train_tokenizer.py --out build/builtin
    python scripts/train_builtin.py --out build/builtin --steps 2600
    python scripts/card_builtin.py build/builtin

Interrupted runs go on from the last checkpoint in --out. Checkpoints along the way (for studies over training) are kept
in --out/track as folders that rarefy opens:

    rarefy track latents/topk build/builtin/track/step-* --site layers.3.resid_post
"""
import argparse
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from source_corpus import read_split
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

TOKENS_A_STEP = 8192
SHORT, LONG = 256, 1024            # context: short for the first part of training, then long
LONG_FROM, DECAY_FROM = 0.65, 0.6  # fractions of all steps
TRACK = "50,100,200,400,800,1600,2600"


def config(vocab: int, eos: int, hidden: int = 256, layers: int = 6) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=eos, eos_token_id=eos, pad_token_id=eos,
    )


def token_stream(out: Path, tokenizer, eos: int) -> np.ndarray:
    """Training files in a shuffled order, one end-of-text token before each."""
    cache = out / "train_tokens.npy"
    if not cache.exists():
        train, _ = read_split()
        order = np.random.default_rng(0).permutation(len(train))
        encoded = tokenizer.backend_tokenizer.encode_batch_fast([train[i].text for i in order])
        np.save(cache, np.concatenate([np.array([eos, *e.ids], dtype=np.uint16) for e in encoded]))
    return np.load(cache)


def batch_at(stream: np.ndarray, step: int, context: int) -> torch.Tensor:
    """Step's tokens: a pure function of (step, context), each window used once before any is used twice."""
    windows = len(stream) // (LONG + 1)
    order = np.random.default_rng(1).permutation(windows)
    rows = [order[(step * (TOKENS_A_STEP // LONG) + i) % windows] for i in range(TOKENS_A_STEP // LONG)]
    x = np.stack([stream[r * (LONG + 1) : r * (LONG + 1) + LONG] for r in rows]).astype(np.int64)
    return torch.from_numpy(x).view(-1, context)


def rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 40, max(0.02, (steps - step) / (steps * (1 - DECAY_FROM))))


def save(out: Path, name: str, model, optimisers, step: int) -> None:
    part = out / f"{name}.tmp"
    torch.save({"model": model.state_dict(), "optimisers": [o.state_dict() for o in optimisers], "step": step}, part)
    os.replace(part, out / name)


def save_track(out: Path, model, tokenizer, step: int) -> None:
    """A checkpoint along the way: bfloat16, with config and tokenizer, complete or not there."""
    folder, part = out / "track" / f"step-{step:05d}", out / "track" / f".tmp-{step}"
    if not folder.exists():
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        tensors = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--track", default=TRACK, help="steps at which a checkpoint is kept, separated by commas")
    parser.add_argument("--hidden", type=int, default=256, help="width, a multiple of 128; with --layers for smaller models")
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    track = {int(step) for step in args.track.split(",") if step}

    tokenizer = AutoTokenizer.from_pretrained(args.out)
    stream = token_stream(args.out, tokenizer, tokenizer.eos_token_id)
    model = LlamaForCausalLM(config(len(tokenizer), tokenizer.eos_token_id, args.hidden, args.layers))
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimisers = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01, momentum=0.95),
                  torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)]
    base = [o.param_groups[0]["lr"] for o in optimisers]
    start, latest = 0, args.out / "latest.pt"
    if latest.exists():
        state = torch.load(latest, weights_only=True)
        model.load_state_dict(state["model"])
        for o, s in zip(optimisers, state["optimisers"], strict=True):
            o.load_state_dict(s)
        start = state["step"]

    @torch.compile
    def loss_of(x_BT):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x_BT, use_cache=False).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1).float(), x_BT[:, 1:].flatten())

    log = (args.out / "train_log.jsonl").open("a")
    began = time.time()
    for step in range(start, args.steps):
        context = LONG if step >= LONG_FROM * args.steps else SHORT
        for o, lr in zip(optimisers, base, strict=True):
            o.param_groups[0]["lr"] = lr * rate(step, args.steps)
        loss = loss_of(batch_at(stream, step, context))
        loss.backward()
        for o in optimisers:
            o.step()
            o.zero_grad(set_to_none=False)
        done = step + 1
        if done % 10 == 0:
            record = {"step": done, "loss": round(loss.item(), 4), "context": context,
                      "seconds": round(time.time() - began), "tokens": done * TOKENS_A_STEP}
            print(json.dumps(record), file=log, flush=True)
        if done % 100 == 0 or done == args.steps:
            save(args.out, "latest.pt", model, optimisers, done)
        if done in track:
            save_track(args.out, model, tokenizer, done)
    model.to(torch.bfloat16).save_pretrained(args.out)
    assert load_file(args.out / "model.safetensors"), "the saved model must open again"


if __name__ == "__main__":
    main()
