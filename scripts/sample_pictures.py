"""Digits somewhere in a larger picture, read at few sampled points or at every cell.

    python scripts/sample_pictures.py [--steps 1000] [--seeds 2]

scikit-learn's digits, 8 x 8, at a random place of a 16 x 16 picture with three scraps of other digits. Two convolutions make a map of its
cells; four queries read it in two rounds, the second from where the first says. Prints accuracy on held-out digits and cells read a query
and round, for docs/structured-attention.md.
"""
import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from rarefy.attention.structured.sampling import Deformable

SIDE, WIDTH, QUERIES, HEADS, POINTS, ROUNDS = 16, 32, 4, 4, 4, 2
ARMS = ("all cells", "points, weights", "points, adaptive", "points that stay in their ring", "points, one round")


def pictures(generator):
    digits, label = load_digits(return_X_y=True)
    digit, label = torch.tensor(digits).float().view(-1, 8, 8) / 16, torch.tensor(label)
    n, order = len(digit), torch.randperm(len(digit), generator=generator)
    digit, label = digit[order], label[order]
    picture = torch.zeros(n, 1, SIDE, SIDE)
    for scrap in range(3):                                                        # corners of 3 x 3 of other digits, before the digit itself
        y, x = (torch.randint(SIDE - 3, (n,), generator=generator) for _ in range(2))
        other = digit[torch.randperm(n, generator=generator)][:, 2 + scrap % 3 : 5 + scrap % 3, 2:5]
        for b in range(n):
            picture[b, 0, y[b] : y[b] + 3, x[b] : x[b] + 3] = other[b]
    y, x = (torch.randint(SIDE - 8, (n,), generator=generator) for _ in range(2))
    for b in range(n):
        picture[b, 0, y[b] : y[b] + 8, x[b] : x[b] + 8] = digit[b]
    return picture, label


class Finder(nn.Module):
    """Queries with reference points over a map of features."""

    def __init__(self, arm):
        super().__init__()
        self.arm, self.rounds = arm, 1 if arm == "points, one round" else ROUNDS
        self.stem = nn.Sequential(nn.Conv2d(1, WIDTH, 5, padding=2), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 5, padding=2), nn.ReLU())
        self.query = nn.Parameter(torch.randn(QUERIES, WIDTH))
        self.at = nn.Parameter(torch.rand(QUERIES, 2))
        self.cell = nn.Parameter(0.1 * torch.randn(WIDTH, SIDE, SIDE))
        mix = "adaptive" if arm == "points, adaptive" else "weights"
        self.read = nn.ModuleList([Deformable(WIDTH, HEADS, POINTS, mix, reach=0.3) for _ in range(self.rounds)])
        if arm == "points that stay in their ring":
            for one in self.read:
                one.offset.requires_grad_(False)
        self.ask = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(self.rounds)])
        self.tell = nn.ModuleList([nn.Linear(WIDTH, 2 * WIDTH) for _ in range(self.rounds)])
        self.move = nn.ModuleList([nn.Linear(WIDTH, 2) for _ in range(self.rounds)])
        self.norm = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(self.rounds)])
        self.leave = nn.Linear(QUERIES * WIDTH, 10)

    def forward(self, picture):
        x = self.stem(picture) + self.cell
        q, at = self.query.expand(len(x), -1, -1), self.at.expand(len(x), -1, -1)
        for n in range(self.rounds):
            if self.arm == "all cells":
                k, v = self.tell[n](x.flatten(2).mT).chunk(2, -1)
                q_, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (self.ask[n](q), k, v))
                q = self.norm[n](q + scaled_dot_product_attention(q_, k, v).transpose(1, 2).flatten(2))
            else:
                q = self.norm[n](q + self.read[n](q, at, x))
                if self.arm != "points that stay in their ring":
                    at = at + 0.3 * self.move[n](q).tanh()
        return self.leave(torch.relu(q).flatten(1))


def accuracy(arm, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    picture, label = pictures(generator)
    held = torch.arange(len(label)) >= 1300
    torch.manual_seed(seed)
    model = Finder(arm)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        some = torch.randint(1300, (32,), generator=generator)
        optimiser.zero_grad()
        cross_entropy(model(picture[some]), label[some]).backward()
        optimiser.step()
    with torch.no_grad():
        return (model(picture[held]).argmax(-1) == label[held]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| reads | accuracy, a seed each | cells a query, head and round |\n|---|---|---|", flush=True)
    for arm in ARMS:
        got = [accuracy(arm, options.steps, seed) for seed in range(options.seeds)]
        cells = SIDE * SIDE if arm == "all cells" else 4 * POINTS
        print(f"| {arm} | {', '.join(f'{x:.2f}' for x in got)} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
