"""Checkpoints beside JPEG, WebP and AVIF at equal bits.

    python -m extras.codecs                                    the shipped checkpoints, on CIFAR-10's test images
    python -m extras.codecs <checkpoint> PHOTOS=my_photos      on photographs, each encoded whole

Codecs get small images in one picture, so that headers do not count. They minimise the error "of MSE". "to AVIF" is
the mean difference from AVIF's PSNR at nearly equal bits, with its standard error. "class in": as in evaluate.py.
"""
import io
import math
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

import evaluate
from data import find_images, load_dataset, read_image
from evaluate import COLUMNS, device, format_table, psnr, ssim
from models import VQRAE
from quantizers import check
from utils import load_checkpoint, one_line_errors

DATASET = "cifar10"
PHOTOS = ""  # a folder, instead of DATASET
COUNT = 961  # at most: 31 x 31 images in one picture, or photographs
TRAIN_IMAGES = 3_000  # at most, from which the probes of judges learn
CODECS = {"JPEG": {"optimize": True, "progressive": True, "subsampling": "4:4:4"}, "WebP": {"method": 6},
          "AVIF": {"subsampling": "4:4:4", "speed": 2, "advanced": {"tune": "psnr"}}}  # 0.5 dB more than by default
TABLE = {**COLUMNS, "a pixel": ("bits_a_pixel", ".3f"), "to AVIF": ("difference", "+.2f"), "+-": ("error", ".2f")}
Encoded = tuple[float, Tensor, Tensor]  # bits, uint8 images (n * n, 3, H, W) of one picture, and the decoded ones


def main():
    rows = {}
    for path in evaluate.read_arguments(globals()):
        model = load_checkpoint(path).to(device)
        data = None if PHOTOS else load_dataset(DATASET, model.config["image_size"])
        test = encode_all(path, model, [square(data.test_images, COUNT)] if data else photographs())
        rows |= {row: average(encoded, test[f"AVIF, as {path}"]) for row, encoded in test.items()}
        if data and data.train_labels is not None:
            train = encode_all(path, model, [square(data.train_images, TRAIN_IMAGES)])
            for name, judge in evaluate.load_judges(model.token_size, data)[0].items():
                def accuracy(row: str, part: int) -> float:
                    x, test_x = (evaluate.pooled_features(judge, encoded[row][0][part]) for encoded in (train, test))
                    labels, test_labels = data.train_labels[: len(x)], data.test_labels[: len(test_x)]
                    return evaluate.linear_probe(x, labels.to(device), test_x, test_labels.to(device))

                rows[path][f"image_{name}"] = accuracy(path, 1)
                for row in test:
                    rows[row][f"picture_{name}"] = accuracy(row, 2)
    print(format_table(rows, TABLE, "images from"))


def photographs() -> Iterable[Tensor]:
    """uint8 images (1, 3, H, W) of PHOTOS."""
    files = find_images(PHOTOS)[:COUNT]
    check(files, "PHOTOS, COUNT", (PHOTOS, COUNT), "a folder with images, 1 or more")
    return (read_image(file)[None] for file in files)


def square(images: Tensor, count: int) -> Tensor:
    """The first n * n images, `count` at most."""
    return images[: math.isqrt(min(count, len(images))) ** 2]


def encode_all(path: str, model: VQRAE, pictures: Iterable[Tensor]) -> dict[str, list[Encoded]]:
    """By tokens, and by each codec in as many bits: of each row an Encoded for each picture, uint8 (n * n, 3, H, W)."""
    results = defaultdict(list)
    for images in tqdm(pictures, "pictures"):
        _, counts, decoded = evaluate.evaluate(model, images)
        bits = int(counts.sum()) * math.log2(model.quantizer.codebook_size)
        results[path].append((bits, images, decoded))
        for codec in CODECS:
            results[f"{codec}, as {path}"].append(encode_to_bits(images, codec, bits))
    return results


def encode(images: Tensor, codec: str, quality: int) -> Encoded:
    n, file = math.isqrt(len(images)), io.BytesIO()
    picture = Image.fromarray(make_grid(images, n, padding=0).permute(1, 2, 0).numpy())
    picture.save(file, codec, quality=quality, **CODECS[codec])
    decoded = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).unflatten(1, (n, -1)).unflatten(0, (n, -1))
    return 8 * file.getbuffer().nbytes, images, decoded.permute(0, 2, 4, 1, 3).flatten(0, 1)


def encode_to_bits(images: Tensor, codec: str, bits: float) -> Encoded:
    """As `encode`, at the quality, found by bisection, that comes nearest to `bits`."""
    low, high = 1, 100
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if encode(images, codec, middle)[0] < bits else (low, middle)
    return min((encode(images, codec, q) for q in (low, high)), key=lambda encoded: abs(encoded[0] - bits))


def average(results: list[Encoded], avif: list[Encoded]) -> dict:
    """A row's figures, over the images of all its pictures."""
    def of_each(measure, results):
        return torch.cat([measure(x, y) for _, x, y in results]).double()

    each, bits = of_each(psnr, results), sum(bits for bits, _, _ in results)
    mse = 10 ** (each / -10)
    difference = each - of_each(psnr, avif)
    return dict(bits=bits / len(each), bits_a_pixel=bits / sum(x[:, 0].numel() for _, x, _ in results),
                psnr=each.mean().item(), psnr_of_mse=-10 * mse.mean().log10().item(),
                ssim=of_each(ssim, results).mean().item(), difference=difference.mean().item(),
                error=(difference.std() / len(difference) ** 0.5).item())


if __name__ == "__main__":
    with one_line_errors():
        main()
