"""Atoms learned from photographs look like the receptive fields of simple cells: Gabor functions of every orientation.

Sparse coding of whitened patches of scikit-learn's two sample photographs, once for each penalty that rarefy has. Draws the
atoms of the convex and of the l0 penalty with how their orientations are spread, and held-out error against the number of
active atoms for all penalties. Needs scikit-learn and pillow; takes a few minutes.

    python examples/natural_images.py --out docs/pictures
"""

import argparse
import base64
import struct
import zlib
from pathlib import Path

import torch
from sklearn.datasets import load_sample_images

import rarefy
from rarefy.latents.coding.gabor import fit_gabors
from rarefy.latents.coding.patches import patches, whitened
from rarefy.latents.coding.sparse_coding import SparseCoding
from rarefy.plots import GREY, frontier_svg

SIDE, ATOMS = 10, 128
WEIGHTS = {"soft": 1.3, "two_thirds": 1.1, "half": 1.0, "cel0": 1.0, "hard": 0.8}      # about 6 of 128 atoms active a patch


def learned(rows, penalty, weight):
    """A dictionary of signed codes. Codes need not be exact to learn from."""
    method = SparseCoding(
        SIDE**2, ATOMS, weight=weight, penalty=penalty, positive_codes=False, exact=False, most=60, tolerance=1e-3, seed=1)
    rarefy.train({penalty: method}, rarefy.TensorStream(rows, 256), rarefy.Recipe(steps=500, lr=0.01))
    return method.eval()


def read_at(method, weight):
    """The same atoms, with codes solved for at another weight."""
    other = SparseCoding(**{**method.arguments, "weight": weight, "most": 200, "tolerance": 1e-4})
    other.load_state_dict(method.state_dict())
    return other.eval()


def png(grey):
    """A grey picture [H, W] of bytes as a data URI."""
    rows = b"".join(b"\0" + bytes(row) for row in grey.tolist())
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 0)
    body = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(body).decode()


def mosaic(atoms, across=16):
    """Atoms side by side, each from black through mid-grey (0) to white by its own largest value."""
    tiles = torch.nn.functional.pad((atoms / atoms.abs().amax(-1, keepdim=True)).view(-1, SIDE, SIDE), (1, 1, 1, 1), value=-1.0)
    rows = tiles.view(-1, across, SIDE + 2, SIDE + 2).transpose(1, 2).reshape(-1, across * (SIDE + 2))
    return ((rows + 1) * 127.5).round().to(torch.uint8)


def panel(name, method, left):
    """The atoms, by orientation, and below them how many there are of each orientation."""
    atoms = method.W_dec_FD.detach()
    fit = fit_gabors(atoms)
    good = fit.r2 > 0.7
    size = 368 / (16 * (SIDE + 2))
    height = ATOMS // 16 * (SIDE + 2) * size
    picture = png(mosaic(atoms[fit.orientation.argsort()]))
    say = lambda x, y, text, anchor="start", weight=400: (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{GREY}" text-anchor="{anchor}" font-weight="{weight}">{text}</text>')
    out = [say(left, 16, name, weight=700), f'<image x="{left}" y="26" width="368" height="{height:.0f}" '
           f'style="image-rendering:pixelated" href="{picture}"/>']
    bins = torch.histc(fit.orientation[good], 12, 0, 180).tolist()
    floor, scale = height + 26 + 92, 60 / max(bins)
    for i, count in enumerate(bins):
        out.append(f'<rect x="{left + 4 + i * 30}" y="{floor - count * scale:.1f}" width="26" height="{count * scale:.1f}" fill="{GREY}"/>')
        out.append(say(left + 17 + i * 30, floor - count * scale - 4, f"{count:.0f}", "middle"))
        out.append(say(left + 17 + i * 30, floor + 16, f"{i * 15 + 7.5:.0f}°", "middle"))
    fine = torch.isfinite(fit.octaves) & good
    stats = (f"{int(good.sum())} of {len(atoms)} atoms fit a Gabor (R² above 0.7, median {fit.r2.median():.2f}); medians: "
             f"{fit.frequency[good].median():.2f} cycles/pixel, {fit.octaves[fine].median():.1f} octaves, aspect {fit.aspect[good].median():.1f}")
    print(f"{name}: {stats}; orientations {bins}")
    for line, text in enumerate((stats[: stats.index(";") + 1], stats[stats.index(";") + 2 :])):
        out.append(say(left, floor + 40 + 17 * line, text))
    return out, floor + 66


def points(method, penalty, weight, rows):
    """Held-out error and active atoms of one dictionary read at weights around the one it was learned at."""
    for factor in (0.25, 0.5, 1, 2, 4):
        other = read_at(method, weight * factor)
        with torch.no_grad():
            error = float((other(rows) - rows).square().sum() / (rows - rows.mean(0)).square().sum())
            count = float(other.select(rows).count.float().mean())
        print(f"{penalty:>10}  weight {weight * factor:5.2f}  {count:5.2f} of {ATOMS} atoms active  FVU {error:.3f}")
        yield {"method": penalty, "role": "method", "metrics": {"l0": {"mean": count}, "fvu": {"mean": error}}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the two pictures")
    out = parser.parse_args().out
    pictures = [whitened(torch.tensor(image).double().mean(-1)) for image in load_sample_images().images]
    bands = [p[: p.shape[0] * 3 // 4] for p in pictures], [p[p.shape[0] * 3 // 4 :] for p in pictures]
    rows, held_out = patches(bands[0], SIDE, 30_000), patches(bands[1], SIDE, 2_000, seed=1)       # lower quarters are never learned from
    methods = {penalty: learned(rows, penalty, weight) for penalty, weight in WEIGHTS.items()}
    found = [point for penalty, weight in WEIGHTS.items() for point in points(methods[penalty], penalty, weight, held_out)]
    unit = {"unit": "atom", "x": {"key": "l0", "label": "atoms active a patch"},
            "y": {"key": "fvu", "label": "variance unexplained on held-out patches", "better": "low"}, "points": found}
    out.mkdir(parents=True, exist_ok=True)
    (out / "natural_images_error.svg").write_text(frontier_svg(unit), encoding="utf-8")
    left, height = panel("ℓ1 (soft)", methods["soft"], 0)
    right, _ = panel("ℓ0 (hard)", methods["hard"], 392)
    (out / "natural_images.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height:.0f}" role="img" font-family="system-ui, sans-serif" '
        'font-size="11.5"><title>Atoms learned from photographs, and their orientations</title>\n' + "\n".join(left + right) + "\n</svg>\n",
        encoding="utf-8")


if __name__ == "__main__":
    main()
