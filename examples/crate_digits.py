"""CRATE on scikit-learn's digits: do layers compress and sparsify, as their derivation says they should?

8 x 8 digits as 16 tokens of 2 x 2 pixels. Prints the test accuracy and, for every layer of the trained and of the untrained
model, the coding rate of the tokens within the layer's subspaces after attention and the fraction of entries not 0 after the
ISTA step. Needs scikit-learn; takes about a minute.

    python examples/crate_digits.py
"""

import torch
from sklearn.datasets import load_digits

from rarefy.latents.coding.crate import Crate

EPOCHS, BATCH = 40, 128


def digits():
    """(tokens [N, 16, 4], labels [N])."""
    pixels, label = load_digits(return_X_y=True)
    picture = torch.tensor(pixels, dtype=torch.float32).view(-1, 8, 8) / 8 - 1
    return picture.unfold(1, 2, 2).unfold(2, 2, 2).reshape(len(picture), 16, 4), torch.tensor(label)


def trained(model, x, y, seed):
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=EPOCHS * (len(x) // BATCH))
    for _ in range(EPOCHS):
        for at in torch.randperm(len(x), generator=generator)[: len(x) // BATCH * BATCH].split(BATCH):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(x[at]), y[at]).backward()
            optimiser.step()
            schedule.step()
    return model


def main() -> None:
    x, y = digits()
    train, test = slice(0, 1400), slice(1400, None)
    for seed in range(3):
        model = Crate(4, 16, 10, d=48, layers=4, heads=4, seed=seed)
        before = model.measured(x[test])
        trained(model, x[train], y[train], seed)
        with torch.no_grad():
            right = (model(x[test]).argmax(-1) == y[test]).float().mean()
        print(f"seed {seed}: accuracy {right:.1%} on {len(y[test])} held-out digits")
        for layer, (then, now) in enumerate(zip(before, model.measured(x[test]), strict=True)):
            both = "   ".join(f"{name.replace('_', ' ')} {then[name]:6.3f} -> {now[name]:6.3f}" for name in now)
            print(f"  layer {layer}, untrained -> trained:   {both}")


if __name__ == "__main__":
    main()
