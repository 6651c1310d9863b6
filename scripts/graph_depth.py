"""Depth of graph networks on a planted heterophilic graph: FDGATII, without each of its two devices, and a plain GAT.

    python scripts/graph_depth.py [--nodes 600] [--steps 150] [--seeds 3]

Four classes; an edge into a node of class c comes from class c + 1 with probability 0.8 and from its own with 0.05, so that neighbours are
seldom alike; features are a class mean under noise. Prints accuracy on held-out nodes (mean and 1.96 standard errors over graphs) and the
spread of the last layer (0 where all nodes are alike), in docs/structured-attention.md.
"""
import argparse

import torch
from torch.nn.functional import cross_entropy

from rarefy.attention.structured.graph import FDGATII, spread

CLASSES, FEATURES, DEGREE, NOISE = 4, 16, 8, 2.5
ARMS = {
    "FDGATII": {}, "without initial residual": {"alpha": 0.0}, "without identity mapping": {"lam": None},
    "static attention": {"form": "static"}, "GAT": {"alpha": 0.0, "lam": None, "form": "static"},
}
DEPTHS = (2, 4, 8, 16)


def planted(nodes, seed):
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(nodes) % CLASSES
    x = torch.randn(CLASSES, FEATURES, generator=generator)[label] + NOISE * torch.randn(nodes, FEATURES, generator=generator)
    into = torch.arange(nodes).repeat_interleave(DEGREE)
    chance = torch.full((CLASSES,), 0.15 / (CLASSES - 2))
    chance[0], chance[1] = 0.05, 0.8
    wanted = (label[into] + chance.multinomial(len(into), True, generator=generator)) % CLASSES
    source = torch.randint(nodes // CLASSES, (len(into),), generator=generator) * CLASSES + wanted
    own = torch.arange(nodes)
    return x, torch.stack([torch.cat([source, own]), torch.cat([into, own])]), label, torch.rand(nodes, generator=generator) < 0.5


def trained(arm, layers, nodes, steps, seed):
    x, edges, label, held = planted(nodes, seed)
    model = FDGATII(FEATURES, CLASSES, width=32, layers=layers, dropout=0.2, seed=seed, **arm)
    torch.manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), 5e-3, weight_decay=5e-4)
    for _ in range(steps):
        optimiser.zero_grad()
        cross_entropy(model(x, edges)[~held], label[~held]).backward()
        optimiser.step()
    with torch.no_grad():
        states = model.eval().states(x, edges)
        return (model.leave(states[-1])[held].argmax(-1) == label[held]).float().mean().item(), spread(states[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("nodes", 600), ("steps", 150), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| layers | " + " | ".join(map(str, DEPTHS)) + " |\n|---|" + "---|" * len(DEPTHS), flush=True)
    for name, arm in ARMS.items():
        cells = []
        for layers in DEPTHS:
            got = torch.tensor([trained(arm, layers, options.nodes, options.steps, seed) for seed in range(options.seeds)])
            mean, error = got.mean(0).tolist(), 1.96 * float(got[:, 0].std()) / options.seeds**0.5
            cells.append(f"{mean[0]:.2f} ± {error:.2f} ({mean[1]:.2f})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
