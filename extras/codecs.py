"""Checkpoints beside JPEG, WebP and AVIF at equal bits.

    python -m extras.codecs                                    the shipped checkpoints, on CIFAR-10's test images
    python -m extras.codecs <checkpoint> PHOTOS=my_photos      on photographs, each encoded whole

Codecs get small images in one picture, so that headers do not count. They minimise the error "of MSE". "to AVIF" is
the mean difference from AVIF's PSNR at nearly equal bits, with its standard error. "class in": as in measure.py;
training images are coded at the quality that was found for the test images.
"""
import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from data import Dataset, find_images, load_dataset, read_image
from extras import measure
from extras.measure import COLUMNS, format_table
from models import VQRAE, load_checkpoint
from quantizers import check
from utils import device, evaluate, one_line_errors, psnr, ssim

DATASET = "cifar10"
PHOTOS = ""  # a folder, instead of DATASET
COUNT = 961  # at most: 31 x 31 images in one picture, or photographs
TRAIN_IMAGES = 3_000  # at most, from which the probes of judges learn
CODECS = {"JPEG": {"optimize": True, "progressive": True, "subsampling": "4:4:4"}, "WebP": {"method": 6},
          "AVIF": {"subsampling": "4:4:4", "speed": 2, "advanced": {"tune": "psnr"}}}  # 0.5 dB more than by default
TABLE = {**COLUMNS, "a pixel": ("bits_a_pixel", ".3f"), "to AVIF": ("difference", "+.2f"), "+-": ("error", ".2f")}


class Encoded(NamedTuple):
    """Images of one picture: its bits, uint8 (n * n, 3, H, W), the same decoded, and the quality, for codecs."""
    bits: float
    images: Tensor
    decoded: Tensor
    quality: int = 0


def main():
    rows = {}
    for path in measure.read_arguments(globals()):
        model = load_checkpoint(path).to(device)
        data = None if PHOTOS else load_dataset(DATASET, model.config["image_size"])
        test = encode_all(path, model, [square(data.test_images, COUNT)] if data else photographs())
        rows |= {row: average(encoded, test[f"AVIF, as {path}"]) for row, encoded in test.items()}
        if data and data.train_labels is not None:
            images = square(data.train_images, TRAIN_IMAGES)
            train = {path: evaluate(model, images)[2]}
            for codec in CODECS:
                row = f"{codec}, as {path}"
                train[row] = encode(images, codec, test[row][0].quality).decoded
            for name, judge in measure.load_judges(model.token_size, data)[0].items():
                rows[path][f"image_{name}"] = probe(judge, data, images, test[path][0].images)
                for row, decoded in train.items():
                    rows[row][f"picture_{name}"] = probe(judge, data, decoded, test[row][0].decoded)
    print(format_table(rows, TABLE, "images from"))


def photographs() -> Iterable[Tensor]:
    """uint8 images (1, 3, H, W) of PHOTOS."""
    files = find_images(PHOTOS)[:COUNT]
    check(files, "PHOTOS, COUNT", (PHOTOS, COUNT), "a folder with images, 1 or more")
    return (read_image(file)[None] for file in files)


def square(images: Tensor, count: int) -> Tensor:
    """The first n * n images, `count` at most."""
    return images[: math.isqrt(min(count, len(images))) ** 2]


def probe(judge: Callable, data: Dataset, train_images: Tensor, test_images: Tensor) -> float:
    """Accuracy in [0, 1] of the first labels of data, from what a judge sees in uint8 images (n * n, 3, H, W)."""
    x, test_x = (measure.pooled_features(judge, images) for images in (train_images, test_images))
    labels, test_labels = data.train_labels[: len(x)], data.test_labels[: len(test_x)]
    return measure.linear_probe(x, labels.to(device), test_x, test_labels.to(device))


def encode_all(path: str, model: VQRAE, pictures: Iterable[Tensor]) -> dict[str, list[Encoded]]:
    """By tokens, and by each codec in as many bits: of each row an Encoded for each picture, uint8 (n * n, 3, H, W)."""
    results = defaultdict(list)
    for images in tqdm(pictures, "pictures"):
        _, counts, decoded = evaluate(model, images)
        bits = int(counts.sum()) * math.log2(model.quantizer.codebook_size)
        results[path].append(Encoded(bits, images, decoded))
        for codec in CODECS:
            results[f"{codec}, as {path}"].append(encode_to_bits(images, codec, bits))
    return results


def encode(images: Tensor, codec: str, quality: int) -> Encoded:
    n, file = math.isqrt(len(images)), io.BytesIO()
    picture = Image.fromarray(make_grid(images, n, padding=0).permute(1, 2, 0).numpy())
    picture.save(file, codec, quality=quality, **CODECS[codec])
    decoded = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).unflatten(1, (n, -1)).unflatten(0, (n, -1))
    return Encoded(8 * file.getbuffer().nbytes, images, decoded.permute(0, 2, 4, 1, 3).flatten(0, 1), quality)


def encode_to_bits(images: Tensor, codec: str, bits: float) -> Encoded:
    """As `encode`, at the quality, found by bisection, that comes nearest to `bits`."""
    low, high = 1, 100
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if encode(images, codec, middle).bits < bits else (low, middle)
    return min((encode(images, codec, q) for q in (low, high)), key=lambda encoded: abs(encoded.bits - bits))


def average(results: list[Encoded], avif: list[Encoded]) -> dict:
    """A row's figures, over the images of all its pictures."""
    def of_each(measure, results):
        return torch.cat([measure(encoded.images, encoded.decoded) for encoded in results]).double()

    each, bits = of_each(psnr, results), sum(encoded.bits for encoded in results)
    mse = 10 ** (each / -10)
    difference = each - of_each(psnr, avif)
    return dict(bits=bits / len(each), bits_a_pixel=bits / sum(x.images[:, 0].numel() for x in results),
                psnr=each.mean().item(), psnr_of_mse=-10 * mse.mean().log10().item(),
                ssim=of_each(ssim, results).mean().item(), difference=difference.mean().item(),
                error=(difference.std() / len(difference) ** 0.5).item())


if __name__ == "__main__":
    with one_line_errors():
        main()
