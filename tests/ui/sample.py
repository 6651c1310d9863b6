"""A report of realistic size and shape from a seeded generator: 16k latents, four frontiers, three training curves."""

from __future__ import annotations

import math
import random
from typing import Any

WORDS = (
    "self . ( ) , : = return def class import from if else elif for in not None True False raise ValueError name path"
    " len str int list dict item key value index result data text line node left right 0 1 2 '' [ ] { } + - * / == != <"
).split(" ")
CONCEPTS = [
    "string literal",
    "function name at def",
    "keyword argument",
    "import path",
    "docstring",
    "closing bracket",
    "comparison",
    "exception raised",
    "loop variable",
    "dunder name",
]


def _metric(mean: float, spread: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - spread, "high": mean + spread}


def _point(method: str, role: str, budget: float, harm: float, rng: random.Random) -> dict[str, Any]:
    fit = harm * (1 + 0.05 * rng.random())
    return {
        "method": method,
        "role": role,
        "budget": budget,
        "density": budget * (0.99 + 0.02 * rng.random()) if role != "dense" else 1.0,
        "metrics": {
            "ce_increase": _metric(fit, 0.06 * fit + 0.002),
            "kl": _metric(fit * 0.9, 0.05 * fit),
            "top1": _metric(1 / (1 + fit * 0.6), 0.008),
        },
        "cost": {
            "flops": 4.2e6 * (0.2 + 0.8 * budget),
            "bytes": 8.4e6 * (0.1 + 0.9 * budget),
            "dense_flops": 4.2e6,
            "dense_bytes": 8.4e6,
            "ms": 1.9 * (0.4 + 0.6 * budget),
            "dense_ms": 1.9,
        },
    }


def _unit(
    unit: str, question: str, verdict: str, methods: dict[str, float], baselines: dict[str, float], rng: random.Random
) -> dict[str, Any]:
    points = [_point("dense", "dense", 1.0, 0.0, rng)]
    for role, group in (("method", methods), ("baseline", baselines)):
        points += [
            _point(name, role, b, scale * (1 / b - 1) ** 1.7, rng)
            for name, scale in group.items()
            for b in (0.3, 0.5, 0.7, 0.9)
        ]
    return {
        "unit": unit,
        "question": question,
        "verdict": verdict,
        "points": points,
        "x": {"key": "density", "label": f"{unit} kept"},
        "y": {"key": "ce_increase", "label": "cross-entropy increase (nats a token)", "better": "low"},
    }


def _dictionaries(rng: random.Random) -> dict[str, Any]:
    unit = _unit(
        "latents",
        "How much of layer 3's residual stream do a few latents hold?",
        "Batch top-k holds most at every L0; the pca baseline of equal rank keeps less than half of it.",
        {},
        {},
        rng,
    )
    for name, role, base in (
        ("latents/topk", "method", 0.11),
        ("latents/batchtopk", "method", 0.095),
        ("latents/jumprelu", "method", 0.1),
        ("latents/l1", "method", 0.16),
        ("pca", "baseline", 0.5),
        ("random directions", "baseline", 0.92),
    ):
        for k in (16, 32, 64, 128):
            point = _point(name, role, k / 16384, base * (32 / k) ** 0.45 * 2, rng)
            point["metrics"]["fvu"] = _metric(base * (32 / k) ** 0.4, 0.01)
            point["metrics"]["loss_recovered"] = _metric(1 - base * (32 / k) ** 0.4 / 2, 0.006)
            unit["points"].append(point)
    unit["y"] = {"key": "fvu", "label": "fraction of variance unexplained", "better": "low"}
    unit["points"][0]["metrics"]["fvu"] = _metric(0.0, 0.0)
    return unit


def _latents(width: int, rng: random.Random) -> dict[str, Any]:
    tokens = [" " + w if i % 2 else w for i, w in enumerate(WORDS)] + ["\n", "\n    ", "\t", "    "]
    density = [0.0 if rng.random() < 0.06 else 10 ** rng.gauss(-3, 0.7) for _ in range(width)]
    peak = [0.0 if d == 0 else rng.uniform(1, 14) for d in density]
    table: dict[str, list[Any]] = {"density": [round(d, 8) for d in density], "max": [round(p, 3) for p in peak]}
    table["concept"] = [rng.randrange(len(CONCEPTS)) if d and rng.random() < 0.4 else -1 for d in density]
    for name in ("precision", "recall", "f1"):
        table[name] = [round(rng.random() ** 0.6, 4) if c >= 0 else None for c in table["concept"]]
    top: list[dict[str, Any] | None] = []
    for p in peak:
        if not p:
            top.append(None)
            continue
        contexts = []
        for rank in range(4):
            ids = [rng.randrange(len(tokens)) for _ in range(32)]
            acts = [round(max(0.0, p * (rng.random() - 0.72)), 3) for _ in ids]
            pos = rng.randrange(10, 24)
            acts[pos] = round(p * 0.97**rank, 3)
            contexts.append({"tokens": ids, "acts": acts, "pos": pos, "doc": f"json/decoder.py:{rng.randrange(400)}"})
        pairs = sorted(
            ([rng.randrange(len(tokens)), round(rng.gauss(0, 1.2), 3)] for _ in range(14)), key=lambda q: -q[1]
        )
        top.append(
            {
                "logits_up": pairs[:7],
                "logits_down": pairs[:6:-1],
                "contexts": contexts,
                "hist": [int(900 * math.exp(-b / 3) * (0.6 + rng.random())) for b in range(16)],
            }
        )
    return {
        "site": "layers.3.resid_post",
        "method": "latents/batchtopk",
        "width": width,
        "tokens": tokens,
        "concepts": CONCEPTS,
        "table": table,
        "top": top,
    }


def sample_report(width: int = 16384, seed: int = 0) -> dict[str, Any]:
    """A whole report."""
    rng = random.Random(seed)
    curves = []
    for name, floor in (("latents/topk", 0.11), ("latents/batchtopk", 0.095), ("latents/jumprelu", 0.1)):
        step = list(range(0, 2001, 25))
        curves.append(
            {
                "method": name,
                "series": {
                    "step": step,
                    "loss": [floor * 60 + 40 * math.exp(-s / 120) * (1 + 0.1 * rng.random()) for s in step],
                    "fvu": [min(1.0, floor + 0.9 * math.exp(-s / 180) + 0.01 * rng.random()) for s in step],
                    "dead": [int(2000 * (1 - math.exp(-s / 300)) * floor * 4) for s in step],
                    "tokens_per_s": [21000 + 2500 * rng.random() for _ in step],
                },
            }
        )
    units = [
        _dictionaries(rng),
        _unit(
            "weights",
            "How many weights can go before the model says something else?",
            "At 50 % kept weights/sparsegpt is best (+0.05 nats), clearly ahead of weights/wanda (+0.08).",
            {"weights/wanda": 0.08, "weights/sparsegpt": 0.05, "weights/magnitude": 0.16},
            {"weights/random": 3.2},
            rng,
        ),
        _unit(
            "neurons",
            "How few inputs of each linear layer carry a token?",
            "At 30 % kept neurons/cats loses least; thresholds fitted a layer matter more than the score.",
            {"neurons/teal": 0.04, "neurons/cats": 0.03},
            {"neurons/random": 2.1},
            rng,
        ),
        _unit(
            "attention",
            "How few keys does each query need?",
            "Quest and H2O keep 30 % of the keys at less than 0.05 nats; a plain window costs four times that.",
            {"attention/quest": 0.01, "attention/h2o": 0.013, "attention/minference": 0.012},
            {"attention/window": 0.05, "attention/random": 0.7},
            rng,
        ),
    ]
    costs = [
        {
            "what": f"layers.*.{part} with {m}",
            "flops": f * 0.5,
            "dense_flops": f,
            "bytes": f * 1.1,
            "dense_bytes": f * 2,
            "ms": f / 9e6,
            "dense_ms": f / 6e6,
        }
        for part, m, f in (
            ("mlp", "neurons/cats", 3.1e6),
            ("attn", "attention/quest", 9.4e5),
            ("q_proj", "weights/wanda", 1.2e5),
        )
    ]
    return {
        "schema": 1,
        "title": "A small code model, made sparse in four ways",
        "made": {
            "command": "rarefy demo --out runs/demo",
            "versions": {"rarefy": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "seconds": 281.4,
            "machine": "2 cores, 8 GB, no accelerator",
            "date": "2026-11-24T09:30:00Z",
        },
        "model": {
            "name": "builtin",
            "params": 8_400_000,
            "layers": 6,
            "d_model": 256,
            "vocab": 4096,
            "data": "this Python's standard library",
            "heldout": "19,968 tokens of 41 documents",
        },
        "steps": [
            {"name": "open the model", "seconds": 0.41, "note": "safetensors, 33 MB"},
            {"name": "train three dictionaries", "seconds": 190.2, "note": "2,000 steps on one stream"},
            {"name": "measure 44 points", "seconds": 88.0, "note": ""},
        ],
        "units": units,
        "curves": curves,
        "latents": _latents(width, rng),
        "costs": costs,
        "notes": [
            "Intervals are 95 % over documents: tokens of one document are not independent.",
            "Costs are counted a token; times are of one core.",
        ],
    }
