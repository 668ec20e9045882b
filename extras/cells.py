"""Draw what each quantizer does to vectors of two numbers: which part of the plane becomes which code.

    python -m extras.cells    writes outputs/cells.png, in under a minute

Each quantizer of about 64 codes (6 bits) learns STEPS steps, between two linear maps that start as the identity.
"""
import sys

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from quantizers import build_quantizer, check
from utils import one_line_errors, read_constants, save_figure

STEPS = 400
BATCH_SIZE = 1024
KINDS = {
    "EMA-VQ": ("ema_vq", dict(codebook_size=64, code_dim=None, decay=0.9)),
    "SimVQ, matched": ("simvq", dict(codebook_size=64, code_dim=None)),
    "SimVQ, learned": ("simvq", dict(codebook_size=64, code_dim=None, transform="learned")),
    "FSQ, 8 x 8": ("fsq", dict(levels=[8, 8])),
    "DDCL, 3 x 3 x 3 x 3": ("ddcl", dict(delta=1, comm_weight=1e-4)),
    "residual, 8 + 8": ("ema_vq", dict(codebooks=2, codebook_size=8, code_dim=None, decay=0.9)),
    "product, 8 x 8": ("ema_vq", dict(codebooks=2, codebook_size=8, code_dim=None, decay=0.9,
                                     combine="product")),
    "rotation-trick VQ": ("rotation_vq", dict(codebook_size=64, decay=0.9)),
    "LFQ": ("lfq", dict(codebook_size=64, entropy_loss_weight=0.01)),
    "BSQ": ("bsq", dict(codebook_size=64)),
}


def draw_vectors(count: int) -> Tensor:
    """Vectors (count, 2) along a spiral: dense inside, sparse outside."""
    turn, noise = 1 + 8 * torch.rand(count, 1).square(), torch.randn(count, 2)
    return torch.cat([turn.cos(), turn.sin()], 1) * turn / 8 + 0.06 * noise


class Autoencoder(nn.Module):
    """Vectors (N, 2) -> their reconstructions (N, 2), the quantizer's loss, and indices (N,)."""

    def __init__(self, name: str, options: dict):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(2, 2), nn.Linear(2, 2)
        self.quantizer = build_quantizer(name, 2, **options)
        for layer in (self.encoder, self.decoder):
            nn.init.eye_(layer.weight), nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z_q, loss, indices = self.quantizer(self.encoder(x)[None])
        return self.decoder(z_q[0]), loss, indices[0]


def learn(name: str, options: dict) -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(name, options)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / STEPS)
        x = draw_vectors(BATCH_SIZE)
        output, loss, _ = model(x)
        (F.mse_loss(output, x) + loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def main():
    read_constants(globals(), sys.argv[1:])
    check(STEPS >= 1 and BATCH_SIZE >= 1, "STEPS, BATCH_SIZE", (STEPS, BATCH_SIZE), "1 or more")
    side, vectors = np.linspace(-1.3, 1.3, 300), draw_vectors(5000)
    plane = torch.from_numpy(np.stack(np.meshgrid(side, side), -1)).float().flatten(0, 1)
    figure = Figure(figsize=(15, 6.4), layout="constrained")
    for axes, (title, (name, options)) in zip(figure.subplots(2, 5).flat, KINDS.items()):
        with torch.enable_grad():
            model = learn(name, options)
        output, _, indices = model(vectors)
        used = indices.unique()
        codes = model.decoder(model.quantizer.get_codebook_entry(used))
        cells = model(plane)[2].view(300, 300) * 7 % 20  # neighbours in other colours
        axes.imshow(cells.numpy(), "tab20", alpha=0.3, extent=(-1.3, 1.3) * 2, origin="lower", interpolation="nearest")
        axes.scatter(*vectors[:1500].T.numpy(), s=2, c="grey")
        axes.scatter(*codes.T.numpy(), s=12, c="black")
        error = F.mse_loss(output, vectors)
        axes.set(title=f"{title}\nerror {error:.4f}, {len(used)} of {model.quantizer.codebook_size} codes",
                 xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), xticks=[], yticks=[])
        print(f"{title:22} mean squared error {error:.4f}, {len(used)} of {model.quantizer.codebook_size} codes used")
    save_figure("outputs/cells.png", figure)


if __name__ == "__main__":
    with one_line_errors():
        main()
