"""Draw what quantizers do to vectors of two numbers: which part of the plane becomes which code.

    python -m extras.cells    writes outputs/cells.png, in under a minute

Each quantizer has 64 codes, and learns for STEPS steps between two linear maps that start as the identity.
"""
import sys

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from quantizers import Quantizer, build_quantizer
from utils import one_line_errors, read_constants, save_figure

STEPS = 400
examples = {
    "EMA-VQ": ("ema_vq", dict(codebook_size=64, decay=0.9, project=False)),
    "FSQ, 8 x 8": ("fsq", dict(levels=(8, 8))),
    "SimVQ, matched": ("simvq_matched", dict(codebook_size=64, project=False)),
    "residual EMA-VQ, 8 + 8": ("residual_vq", dict(codebooks=2, codebook_size=8, decay=0.9, project=False))}


def draw_vectors(count: int) -> Tensor:
    """Vectors (count, 2) along a spiral: dense inside, sparse outside."""
    turn, noise = 1 + 8 * torch.rand(count, 1).square(), torch.randn(count, 2)
    return torch.cat([turn.cos(), turn.sin()], 1) * turn / 8 + 0.06 * noise


def learn(name: str, options: dict) -> Quantizer:
    torch.manual_seed(0)
    quantizer = build_quantizer(name, 2, **options)
    quantizer.project_in, quantizer.project_out = maps = nn.Linear(2, 2), nn.Linear(2, 2)
    for layer in maps:
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(quantizer.parameters(), 1e-2)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / STEPS)
        x = draw_vectors(1024)[None]
        output, loss, _ = quantizer(x)
        optimizer.zero_grad()
        (F.mse_loss(output, x) + loss).backward()
        optimizer.step()
    return quantizer.eval()


@torch.no_grad()
def draw(axes, title: str, quantizer: Quantizer, vectors: Tensor):
    """Draw vectors (N, 2), all codes, and each code's cell: what becomes it."""
    side = torch.linspace(-1.3, 1.3, 300)
    plane = torch.cartesian_prod(side, side).flip(1)[None]  # (1, 90000, 2): (x, y), row by row
    cells = quantizer(plane)[2].view(300, 300) * 7 % 20  # one of tab20's 20 colours
    axes.imshow(cells.numpy(), "tab20", alpha=0.3, extent=(-1.3, 1.3) * 2, origin="lower", interpolation="nearest")
    output, _, indices = quantizer(vectors[None])
    codes, used = quantizer.get_codebook_entry(torch.arange(quantizer.codebook_size)), indices.unique()
    axes.scatter(*vectors[:1500].T.numpy(), s=2, c="grey")
    axes.scatter(*codes.T.numpy(), s=12, c="none", edgecolors="black")
    axes.scatter(*codes[used].T.numpy(), s=12, c="black")
    title = f"{title}\nerror {F.mse_loss(output[0], vectors):.4f}, {len(used)} of {len(codes)} codes used"
    axes.set(title=title, xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), xticks=[], yticks=[])


def main():
    read_constants(globals(), sys.argv[1:])
    torch.manual_seed(0)
    vectors = draw_vectors(5000)
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    figure.supxlabel("grey: vectors; black: codes, hollow if unused; colours: what becomes a code; error: mean squared")
    for axes, (title, (name, options)) in zip(figure.subplots(1, len(examples)), examples.items()):
        draw(axes, title, learn(name, options), vectors)
    save_figure("outputs/cells.png", figure)


if __name__ == "__main__":
    with one_line_errors():
        main()
