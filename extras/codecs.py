"""Checkpoints beside JPEG, WebP and AVIF at equal bits.

    python -m extras.codecs                                    the shipped checkpoints, on CIFAR-10's test images
    python -m extras.codecs <checkpoint> PHOTOS=my_photos      on photographs, each encoded whole

Codecs get small images in one picture, so that headers do not count. They minimise the error "of MSE". "to AVIF" is
the mean difference from AVIF's PSNR at nearly equal bits, with its standard error.
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

from data import find_images, load_dataset, read_image, to_float
from evaluate import COLUMNS, device, format_table, psnr, read_arguments, ssim
from quantizers import check
from utils import load_checkpoint, one_line_errors

DATASET = "cifar10"
PHOTOS = ""  # a folder, instead of DATASET
COUNT = 961  # at most: 31 x 31 images in one picture, or photographs
CODECS = {"JPEG": {"optimize": True, "progressive": True, "subsampling": "4:4:4"}, "WebP": {"method": 6},
          "AVIF": {"subsampling": "4:4:4", "speed": 2, "advanced": {"tune": "psnr"}}}  # 0.5 dB more than by default
TABLE = {**COLUMNS, "a pixel": ("bits_a_pixel", ".3f"), "to AVIF": ("difference", "+.2f"), "+-": ("error", ".2f")}
Encoded = tuple[float, Tensor, Tensor]  # bits, uint8 images (n * n, 3, H, W) of one picture, and the decoded ones


def main():
    rows = {}
    for path in read_arguments(globals()):
        model = load_checkpoint(path).to(device)
        results = defaultdict(list)  # of each row, an Encoded for each picture
        for images in tqdm(pictures(model.config["image_size"]), "pictures"):
            batch = to_float(images.to(device))
            indices = model.encode_to_indices(batch)
            decoded = (model.decode_from_indices(indices, size=batch.shape[2:]).cpu() * 255).round().byte()
            bits = indices.numel() * math.log2(model.quantizer.codebook_size)
            results[path].append((bits, images, decoded))
            for codec in CODECS:
                results[f"{codec}, as {path}"].append(encode_to_bits(images, codec, bits))
        rows |= {row: average(encoded, results[f"AVIF, as {path}"]) for row, encoded in results.items()}
    print(format_table(rows, TABLE, "images from"))


def pictures(size: int) -> Iterable[Tensor]:
    """Groups of uint8 images (n * n, 3, H, W), one picture each."""
    if PHOTOS:
        files = find_images(PHOTOS)[:COUNT]
        check(files, "PHOTOS, COUNT", (PHOTOS, COUNT), "a folder with images, 1 or more")
        return (read_image(file)[None] for file in files)
    images = load_dataset(DATASET, size).test_images
    return [images[: math.isqrt(min(COUNT, len(images))) ** 2]]


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
