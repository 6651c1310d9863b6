"""Judge the built-in model on files it never saw, beside baselines on the same bytes; write card.json and MODEL_CARD.md.

    python scripts/card_builtin.py build/builtin                                    # the finished model
    python scripts/card_builtin.py build/builtin --checkpoint latest.pt --out /tmp  # one in training

Files are scored whole, each from an end-of-text token; a token is scored once, with at least 512 tokens of context
where the file has them.
"""
import argparse
import gzip
import hashlib
import json
import lzma
import math
import time
from pathlib import Path

import numpy as np
import torch
from source_corpus import PACKAGES, read_split
from train_builtin import TOKENS_A_STEP, config
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from rarefy.fidelity import ratio_interval
from rarefy.tasks.induction import induction_score

CONTEXT, STRIDE, CHUNK = 1024, 512, 1 << 22
PROMPTS = (
    'def read_lines(path):\n    """Return the lines of a file."""\n    with open(',
    "import os\nimport sys\n\nclass Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "for i in range(10):\n    if i % 2 == 0:\n        print(",
)


def open_model(folder: Path, checkpoint: str | None, tokenizer):
    if checkpoint is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), None
    state = torch.load(folder / checkpoint, weights_only=True)
    model = LlamaForCausalLM(config(len(tokenizer), tokenizer.eos_token_id))
    model.load_state_dict(state["model"])
    return model.eval(), state["step"]


def sample_files(held, tokenizer, max_tokens: int):
    """Held-out files in a fixed shuffled order, whole, until they hold `max_tokens`."""
    files, total = [], 0
    for i in np.random.default_rng(2).permutation(len(held)):
        ids = tokenizer.backend_tokenizer.encode(held[i].text, add_special_tokens=False).ids
        files.append((held[i].name, held[i].text.encode(), [tokenizer.eos_token_id, *ids]))
        total += len(ids)
        if total >= max_tokens:
            break
    return files


@torch.no_grad()
def model_nats(model, ids: list[int]) -> float:
    """Summed loss of every token after the first, in overlapping windows."""
    total, scored, at = 0.0, 1, 0
    while scored < len(ids):
        window = torch.tensor([ids[at : at + CONTEXT]])
        logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
        nats = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none").double()
        total += float(nats[scored - at - 1 :].sum())
        scored, at = at + window.shape[1], at + STRIDE
    return total


class Bigram:
    """Bigram counts shrunk towards unigrams: p(b|a) = (count(ab) + k p(b)) / (count(a) + k), p(b) add-one.

    k is chosen on the last hundredth of the training tokens, which is not counted.
    """

    def __init__(self, stream: np.ndarray, vocab: int) -> None:
        cut = len(stream) * 99 // 100
        self.vocab = vocab
        one = np.bincount(stream[:cut], minlength=vocab) + 1.0
        self.unigram = one / one.sum()
        self.pairs = np.zeros(vocab * vocab, dtype=np.int32)
        for at in range(0, cut - 1, CHUNK):
            piece = stream[at : min(at + CHUNK, cut - 1) + 1].astype(np.int64)
            self.pairs += np.bincount(piece[:-1] * vocab + piece[1:], minlength=vocab * vocab).astype(np.int32)
        self.before = self.pairs.reshape(vocab, vocab).sum(1)
        held = stream[cut:].astype(np.int64)
        self.k = min((10.0**e for e in np.arange(0, 5.1, 0.5)), key=lambda k: self.nats(held, k).sum())

    def nats(self, ids: np.ndarray, k: float | None = None) -> np.ndarray:
        k = self.k if k is None else k
        count = self.pairs[ids[:-1] * self.vocab + ids[1:]]
        return -np.log((count + k * self.unigram[ids[1:]]) / (self.before[ids[:-1]] + k))

    def unigram_nats(self, ids: np.ndarray) -> np.ndarray:
        return -np.log(self.unigram[ids[1:]])


def figure(nats: list[float], tokens: list[int], size: list[int]) -> dict:
    loss = ratio_interval(torch.tensor(nats), torch.tensor(tokens))
    bits = ratio_interval(torch.tensor(nats, dtype=torch.float64) / math.log(2), torch.tensor(size))
    return {
        "nats_per_token": round(loss.mean, 4), "nats_per_token_95": [round(loss.low, 4), round(loss.high, 4)],
        "bits_per_byte": round(bits.mean, 4), "bits_per_byte_95": [round(bits.low, 4), round(bits.high, 4)],
    }


def compressors(files) -> dict:
    squeeze = {"gzip -9": lambda b: gzip.compress(b, 9), "xz -9e": lambda b: lzma.compress(b, preset=9 | lzma.PRESET_EXTREME)}
    whole, size = b"".join(b for _, b, _ in files), sum(len(b) for _, b, _ in files)
    return {
        name: {
            "bits_per_byte_file_by_file": round(8 * sum(len(f(b)) for _, b, _ in files) / size, 4),
            "bits_per_byte_concatenated": round(8 * len(f(whole)) / size, 4),
        }
        for name, f in squeeze.items()
    }


def by_package(files, nats: list[float], bigram_nats: list[float]) -> dict:
    """Bits a byte for each package: vendored and copied code makes some far easier than others."""
    out = {}
    for package in PACKAGES:
        mine = [i for i, (name, *_) in enumerate(files) if name.startswith(package + "/")]
        if mine:
            size = sum(len(files[i][1]) for i in mine)
            out[package] = {
                "files": len(mine), "bytes": size, "nats_per_token": round(sum(nats[i] for i in mine) / sum(len(files[i][2]) - 1 for i in mine), 4),
                "model": round(sum(nats[i] for i in mine) / math.log(2) / size, 4),
                "bigram": round(sum(bigram_nats[i] for i in mine) / math.log(2) / size, 4),
                "xz -9e, file by file": compressors([files[i] for i in mine])["xz -9e"]["bits_per_byte_file_by_file"],
            }
    return out


@torch.no_grad()
def write_python(model, tokenizer, prompt: str) -> str:
    torch.manual_seed(0)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=True, temperature=0.7, top_p=0.9,
                         pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0, 1:], skip_special_tokens=True)


def training(folder: Path, step: int | None) -> dict:
    """Tokens and minutes from the log; seconds restart with each run, so the runs' last entries are added up."""
    rows = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    rows = [r for r in rows if step is None or r["step"] <= step]
    ends = [a["seconds"] for a, b in zip(rows, rows[1:], strict=False) if b["seconds"] < a["seconds"]] + [rows[-1]["seconds"]]
    return {
        "steps": rows[-1]["step"], "tokens": rows[-1]["step"] * TOKENS_A_STEP, "minutes": round(sum(ends) / 60, 1),
        "last_training_loss": round(float(np.mean([r["loss"] for r in rows[-10:]])), 4),
        "corpus": PACKAGES, "held_out": json.loads((folder / "held_out.json").read_text()),
    }


def judge(folder: Path, checkpoint: str | None, max_tokens: int, progress=print) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, step = open_model(folder, checkpoint, tokenizer)
    files = sample_files(read_split()[1], tokenizer, max_tokens)
    tokens, size = [len(ids) - 1 for *_, ids in files], [len(b) for _, b, _ in files]
    progress(f"{len(files)} held-out files, {sum(tokens)} tokens, {sum(size)} bytes")
    began, nats = time.time(), []
    for number, (_, _, ids) in enumerate(files):
        nats.append(model_nats(model, ids))
        if number % 20 == 19:
            progress(f"{number + 1} files, {sum(nats) / sum(tokens[: number + 1]):.3f} nats a token, {time.time() - began:.0f} s")
    bigram = Bigram(np.load(folder / "train_tokens.npy", mmap_mode="r"), len(tokenizer))
    arrays = [np.array(ids) for *_, ids in files]
    bigram_nats = [float(bigram.nats(a).sum()) for a in arrays]
    # Neither the commonest tokens (line breaks, commas) nor the rare ones, whose embeddings are hardly trained.
    pool = [i for i in np.argsort(-bigram.unigram)[8:2048].tolist() if i != tokenizer.eos_token_id]
    induction = induction_score(model, pool, period=64, batch=32, start=tokenizer.eos_token_id)
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.float().contiguous().numpy().tobytes())
    return {
        "schema": 1, "name": "rarefy built-in Python model", "checkpoint_step": step, "weights_sha256": digest.hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()), "config": {k: getattr(model.config, k) for k in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")},
        "evaluated_on": {"files": len(files), "tokens": sum(tokens), "bytes": sum(size), "of_held_out": "fixed random sample, whole files"},
        "model": figure(nats, tokens, size),
        "baselines": {
            "unigram": figure([float(bigram.unigram_nats(a).sum()) for a in arrays], tokens, size),
            "bigram": {**figure(bigram_nats, tokens, size), "k": bigram.k}, **compressors(files),
        },
        "by_package": by_package(files, nats, bigram_nats),
        "induction": {name: [round(v, 4) for v in (i.mean, i.low, i.high)] for name, i in vars(induction).items()},
        "training": training(folder, step),
        "samples": [{"prompt": p, "text": write_python(model, tokenizer, p)} for p in PROMPTS],
    }


def card_text(card: dict) -> str:
    run, on = card["training"], card["evaluated_on"]
    def row(name, figures):
        low, high = figures["bits_per_byte_95"]
        return f"| {name} | {figures['nats_per_token']:.3f} | {figures['bits_per_byte']:.3f} [{low:.3f}, {high:.3f}] |"
    lines = [
        f"# {card['name']}", "",
        f"A Llama of {card['parameters'] / 1e6:.1f} million parameters (" + ", ".join(f"{k} {v}" for k, v in card["config"].items()) + "), "
        f"trained from scratch by `scripts/train_builtin.py` on {run['tokens'] / 1e6:.1f} million tokens of Python in {run['minutes']:.0f} minutes "
        "on one CPU core. It is there so that every example and test has a real language model without a download; it is no coding assistant.", "",
        "## Text", "", "Python source of installed packages: " + ", ".join(f"{p} ({licence})" for p, licence in run["corpus"].items()) + ".",
        f"{len(run['held_out'])} files were held out by a hash of their names (1 in 20); `card.json` lists them.", "",
        "## Loss on held-out files", "", f"{on['files']} files, {on['tokens']} tokens, {on['bytes']} bytes ({on['of_held_out']}). "
        "In brackets: 95 % interval over files.", "", "| | nats per token | bits per byte |", "|---|---|---|", row("this model", card["model"]),
        row("bigram (interpolated, same tokens)", card["baselines"]["bigram"]), row("unigram (same tokens)", card["baselines"]["unigram"]),
    ]
    for name in ("gzip -9", "xz -9e"):
        b = card["baselines"][name]
        lines += [
            f"| {name}, file by file | | {b['bits_per_byte_file_by_file']:.3f} |",
            f"| {name}, files concatenated | | {b['bits_per_byte_concatenated']:.3f} |",
        ]
    i = card["induction"]
    lines += [
        "", "The bigram and unigram were counted on the model's training tokens; gzip and xz know no training text.", "",
        "Packages differ: much of transformers is copied from file to file, so that held-out files there have near twins in training.", "",
        "| package | files | nats per token | bits per byte | bigram | xz -9e, file by file |", "|---|---|---|---|---|---|",
        *(f"| {p} | {f['files']} | {f['nats_per_token']:.3f} | {f['model']:.3f} | {f['bigram']:.3f} | {f['xz -9e, file by file']:.3f} |"
          for p, f in card["by_package"].items()), "", "## Induction", "",
        f"Random sequences of 64 tokens, twice: {i['first'][0]:.2f} nats the first time, {i['second'][0]:.2f} the second, "
        f"a drop of {i['drop'][0]:.2f} "
        f"[{i['drop'][1]:.2f}, {i['drop'][2]:.2f}].", "", "## Samples", "", "Temperature 0.7, top-p 0.9, seed 0, not selected.",
    ]
    for sample in card["samples"]:
        lines += ["", "~~~python", sample["text"], "~~~"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", help="judge this checkpoint of the folder, in training, not the finished model")
    parser.add_argument("--out", type=Path, help="where to write (default: the folder)")
    parser.add_argument("--max-tokens", type=int, default=600_000)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    card = judge(args.folder, args.checkpoint, args.max_tokens)
    out = args.out or args.folder
    out.mkdir(parents=True, exist_ok=True)
    (out / "card.json").write_text(json.dumps(card, indent=1))
    (out / "MODEL_CARD.md").write_text(card_text(card))
    print(json.dumps({k: card[k] for k in ("model", "baselines", "induction")}, indent=1))


if __name__ == "__main__":
    main()
