"""Banks of oriented kernels learned from photographs, and a small CNN that reads codes in place of pixels.

First: log-Gabor banks of narrow, wide and mixed orientation bandwidths, as given and learned, on crops of scikit-learn's two
sample photographs that were not learned from: objective, active coefficients a pixel, PSNR, and the bandwidths that came of it.
Then: scikit-learn's digits read by one small CNN as pixels, as plain responses of a bank (as many channels as codes have), and
as sparse codes on it, with the same training for all, over three seeds, on clean and on noisy digits.
Needs scikit-learn and pillow; takes a few minutes.

    python examples/oriented_codes.py
"""

import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import nn

from rarefy.latents.coding.convolutional import convolution, convolutional_codes, even_bank, reconstructed
from rarefy.latents.coding.learned_bank import PARAMETERS, learn_bank, objective
from rarefy.latents.coding.patches import whitened

SIDE, WEIGHT, CROP = 13, 0.8, 48
BANKS = {"narrow": (12, [9.0]), "mixed": (6, [9.0, 30.0]), "wide": (12, [30.0])}        # orientations, bandwidths: 12 pairs each
DIGIT_SIDE, DIGIT_WEIGHT, EPOCHS, BATCH, TRAIN = 5, 0.1, 20, 64, 1000
NOISES = (0.0, 0.5, 1.0)


def crops(seed):
    """[4, 48, 48] whitened, two from each photograph."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for image in load_sample_images().images:
        picture = whitened(torch.tensor(image).double().mean(-1))
        for _ in range(2):
            i, j = (int(torch.randint(n - CROP, (1,), generator=g)) for n in picture.shape)
            out.append(picture[i : i + CROP, j : j + CROP])
    return torch.stack(out)


def photographs() -> None:
    learn_from, held_out = crops(0), crops(1)
    for name, arguments in BANKS.items():
        banks = {"given": even_bank(*arguments)}
        for what, learned in (("bandwidths learned", ["bandwidth"]), ("all learned", PARAMETERS)):
            made = learn_bank(learn_from, banks["given"], SIDE, WEIGHT, learned=learned, rounds=25)
            banks[what] = made.bank
            print(f"{name}, {what}: objective where it was learned {made.losses[0]:.1f} -> {min(made.losses):.1f}")
        for what, bank in banks.items():
            kernels = bank.kernels(SIDE).float()
            codes = convolutional_codes(held_out, kernels, WEIGHT, tolerance=0.02, most=200).codes
            error = float((held_out - reconstructed(codes, kernels)).square().mean())
            psnr = 10 * torch.log10((held_out.amax() - held_out.amin()) ** 2 / error)
            width = bank.bandwidth.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
            print(f"  {what:>18}: held-out objective {float(objective(held_out, codes, kernels, WEIGHT)):.1f}, "
                  f"{float((codes != 0).sum()) / held_out.numel():.3f} active a pixel, {psnr:.1f} dB; bandwidths (quartiles) "
                  + " ".join(f"{w:.0f}" for w in width.tolist()) + " degrees")


def network(channels, seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 4, 10))


def trained(x, y, seed):
    """The network after EPOCHS of Adam."""
    model, g = network(x.shape[1], seed), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for at in torch.randperm(len(x), generator=g).split(BATCH):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[at]), y[at]).backward()
            optimiser.step()
    return model


def readings(train):
    """name -> function from pictures [N, 8, 8] to what the network reads [N, C, 8, 8]; a bank may learn from `train`."""
    out = {"pixels": lambda x: x[:, None]}
    banks = {"homogeneous": even_bank(8, [15.0], 0.25), "mixed": even_bank(4, [15.0, 40.0], 0.25)}
    banks["learned"] = learn_bank(train[:200], banks["mixed"], DIGIT_SIDE, DIGIT_WEIGHT, rounds=15).bank
    for name, bank in banks.items():
        kernels = bank.kernels(DIGIT_SIDE).float()
        responses = lambda x, kernels=kernels: convolution(kernels, (8, 8)).pull(x.flatten(1)).view(len(x), -1, 8, 8)
        codes = lambda x, kernels=kernels: convolutional_codes(x, kernels, DIGIT_WEIGHT, tolerance=0.01, most=60).codes
        out |= {f"responses, {name}": responses} if name == "mixed" else {}
        out[f"codes, {name}"] = codes
    return out


def digits() -> None:
    pixels, label = load_digits(return_X_y=True)
    every, y = torch.tensor(pixels, dtype=torch.float32).view(-1, 8, 8) / 8 - 1, torch.tensor(label)
    right, full = {}, {}
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(every), generator=g)
        train, test = order[:TRAIN], order[TRAIN:]
        noise = torch.randn(len(test), 8, 8, generator=g)
        for name, read in readings(every[train]).items():
            x = read(every[train])
            scale = x.std()
            model = trained(x / scale, y[train], seed)
            full.setdefault(name, []).append(float((x != 0).float().mean()))
            for sigma in NOISES:
                with torch.no_grad():
                    hit = model(read(every[test] + sigma * noise) / scale).argmax(-1) == y[test]
                right.setdefault((name, sigma), []).append(float(hit.float().mean()))
    print(f"digits: accuracy over 3 seeds (lowest to highest), noise on test digits of standard deviation {NOISES}")
    for name, shares in full.items():
        shown = "   ".join(f"{sum(v) / 3:.1%} ({min(v):.1%} to {max(v):.1%})" for v in (right[name, sigma] for sigma in NOISES))
        print(f"  {name:>18}: {shown}; {sum(shares) / 3:.1%} of what the network reads is not 0")


if __name__ == "__main__":
    photographs()
    digits()
