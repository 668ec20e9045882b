"""Image grids and plots."""
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from quantizers import check
from utils import open_atomically


def save_grid(path: Path, upper: Tensor, lower: Tensor, columns: int):
    """Write a grid of uint8 images (N, 3, H, W) in two halves, such as originals above and their reconstructions below.

    An incomplete last row is left out. Small images are enlarged, each pixel to a square: a viewer would blur them.
    """
    count = len(upper)
    check(count > 0 and upper.shape == lower.shape, "upper and lower", (tuple(upper.shape), tuple(lower.shape)),
          "as many images of one size, at least one")
    columns = min(columns, count)
    count -= count % columns
    zoom = max(1, 128 // upper.shape[-1])
    images = torch.cat([upper[:count], lower[:count]]).cpu()
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    grid = make_grid(images, nrow=columns, padding=2, pad_value=255)
    with open_atomically(path) as file:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(file, "PNG")


def save_figure(path: Path, figure: Figure):
    with open_atomically(path) as file:
        figure.savefig(file, dpi=120)


def plot_usage(path: Path, counts: Tensor, metrics: dict, title: str):
    """Plot how often each code was used, sorted, on logarithmic axes; counts and metrics as evaluate returns them."""
    used = counts[counts > 0].sort(descending=True).values.cpu()
    figure = Figure(figsize=(6, 4))
    axes = figure.add_axes((0.16, 0.12, 0.81, 0.75))
    axes.loglog(range(1, len(used) + 1), used)
    size = round(len(used) / metrics["usage"])  # counts may be of used codes alone
    axes.axvline(size, color="grey", linestyle=":", label=f"codebook size {size:,}")
    axes.set(xlabel="code, by rank", ylabel="times used")
    each = "; ".join(f"{value:,.0f}" for name, value in metrics.items() if name.startswith("perplexity_"))
    title += f"\n{metrics['usage']:.1%} of codes used, perplexity {metrics['perplexity']:,.0f}"
    axes.set_title(title + (f", of each codebook {each}" if each else ""), size=9)
    axes.legend()
    save_figure(path, figure)


def plot_curves(path: Path, history: list[dict], losses: list[str], metrics: list[str], title: str):
    """Plot columns of metrics.csv over the epochs: the losses together, unless they are zero throughout, each metric by
    itself. A dotted line is where stage 2 begins."""
    figure = Figure(figsize=(14, 3.2))
    figure.suptitle(title, x=0.04, y=0.99, ha="left", fontsize=10)
    # fixed margins: an automatic layout would take most of the time, after each epoch
    panels = figure.subplots(1, 1 + len(metrics), width_ratios=[1.3] + [1] * len(metrics),
                             gridspec_kw={"left": 0.17, "right": 0.99, "bottom": 0.15, "top": 0.85, "wspace": 0.3})
    epochs = range(1, len(history) + 1)
    for name in losses:
        if any(row[name] for row in history):
            panels[0].semilogy(epochs, [row[name] or math.nan for row in history], ".-", label=name)
    panels[0].legend(fontsize=8, loc="upper right", bbox_to_anchor=(-0.2, 1))
    panels[0].minorticks_off()
    panels[0].set_title("losses, before their weights", fontsize=10)
    for axes, name in zip(panels[1:], metrics):
        axes.plot(epochs, [row[name] for row in history], ".-")
        axes.set_title(name, fontsize=10)
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if {row["stage"] for row in history} == {1, 2}:
            axes.axvline(sum(row["stage"] == 1 for row in history) + 0.5, color="grey", linestyle=":")
    save_figure(path, figure)
