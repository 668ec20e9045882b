"""Compare checkpoints with JPEG, WebP and AVIF at equal bits.

    python -m extras.codecs                           the shipped checkpoints, on 961 of CIFAR-10's test images
    python -m extras.codecs <path> PHOTOS=photos      a checkpoint on photographs, each encoded whole

Codecs encode small images as one picture, so that headers do not count. AVIF is tuned for the PSNR "of MSE",
JPEG and WebP for the eye. Figures are interpolated between a codec's files of two neighbouring qualities.
"to AVIF" is the mean difference from AVIF's PSNR at equal bits, "+-" its standard error.
"""
import bisect
import functools
import io
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from data import find_images, load_dataset, read_image
from extras import measure
from quantizers import InputError, check, errors_as
from utils import device, evaluate, one_line_errors, progress, psnr, ssim

DATASET = "cifar10"  # or another of train.py's
PHOTOS = ""  # a folder of photographs, instead of DATASET
COUNT = 961  # at most; of DATASET a square number, for one picture
codec_options = {
    "JPEG": {"optimize": True, "progressive": True, "subsampling": "4:4:4"}, "WebP": {"method": 6},
    "AVIF": {"subsampling": "4:4:4", "speed": 2, "advanced": {"tune": "psnr"}}}  # 0.5 dB more than by default
columns = {**measure.measured_columns, "bits a pixel": ("bits_a_pixel", ".3f"), "to AVIF": ("difference", "+.2f"),
           "+-": ("error", ".2f")}


def main():
    models = measure.load_models(globals())
    check(COUNT >= 1, f"COUNT = {COUNT}, allowed: 1 or more")
    for name, model in models.items():
        check(model.quantizer.codebook_size, f"{name} has no codes, so its images have no size in bits.")
    if PHOTOS:
        pictures = photographs(max(11, *(model.token_size for model in models.values())))
    else:
        images = load_dataset(DATASET, max(model.config["image_size"] for model in models.values())).test_images
        pictures = [images[: math.isqrt(min(COUNT, len(images))) ** 2]]
    figures = defaultdict(list)  # of each row's pictures: bits, pixels, PSNR (B,), SSIM (B,)
    for images in pictures:
        for name, model in models.items():
            _, counts, decoded = evaluate(model.to(device), images, measure.batch_size(images))
            bits, pixels = int(counts.sum()) * math.log2(model.quantizer.codebook_size), images[:, 0].numel()
            figures[name].append((bits, pixels, psnr(decoded, images), ssim(decoded, images)))
            for codec in codec_options:
                codec_bits, psnrs, ssims = interpolate(images, codec, bits)
                figures[f"{codec}, as {name}"].append((codec_bits, pixels, psnrs, ssims))
    check(figures, f"PHOTOS={PHOTOS} has no images to compare.")
    rows = {}
    for name in models:
        for row in (name, *(f"{codec}, as {name}" for codec in codec_options)):
            rows[row] = average(figures[row], figures[f"AVIF, as {name}"])
    print(measure.format_table(rows, columns, "images from"))


def photographs(least: int) -> Iterator[Tensor]:
    """uint8 images (1, 3, H, W) in PHOTOS. A warning names broken ones, or with a side below `least`."""
    for file in progress(find_images(PHOTOS)[:COUNT], "photographs"):
        try:
            image = read_image(file)
            check(min(image.shape[1:]) >= least, f"{file} has a side below the {least} pixels that are needed")
        except InputError as error:
            warnings.warn(f"{error}. It is left out.")
        else:
            yield image[None]


def interpolate(images: Tensor, codec: str, bits: float) -> tuple[float, Tensor, Tensor]:
    """A codec's bits, PSNR (n * n,) and SSIM (n * n,), between the file just below so many bits and the one above.

    Files nearly always grow with their quality. If all are larger or smaller than `bits`, the nearest file counts.
    """
    # the first quality with as large a file, or 100
    above = 2 + bisect.bisect_left(range(2, 100), bits, key=lambda quality: 8 * len(encode(images, codec, quality)))
    files = [encode(images, codec, quality) for quality in (above - 1, above)]
    low, high = (8 * len(file) for file in files)
    decoded = [decode(file, len(images)) for file in files]
    figures = [torch.stack([psnr(x, images), ssim(x, images)]) for x in decoded]
    share = min(1.0, max(0.0, (bits - low) / max(1, high - low)))
    return low + share * (high - low), *torch.lerp(*figures, share)


@functools.lru_cache(100)  # several checkpoints ask for the same files
def encode(images: Tensor, codec: str, quality: int) -> bytes:
    """The file of images, uint8 (n * n, 3, H, W), as one picture."""
    picture, file = make_grid(images, math.isqrt(len(images)), padding=0), io.BytesIO()
    with errors_as(InputError, f"{codec} cannot encode {picture.shape[2]} x {picture.shape[1]} pixels"):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, codec, quality=quality, **codec_options[codec])
    return file.getvalue()


def decode(file: bytes, count: int) -> Tensor:
    """A file of encode -> its `count` = n * n images, uint8 (n * n, 3, H, W)."""
    n, picture = math.isqrt(count), np.array(Image.open(io.BytesIO(file)).convert("RGB"))
    images = torch.from_numpy(picture).unflatten(1, (n, -1)).unflatten(0, (n, -1))  # (n, H, n, W, 3)
    return images.permute(0, 2, 4, 1, 3).flatten(0, 1)


def average(pictures: list[tuple], avif: list[tuple]) -> dict[str, float]:
    """A row's figures, from each picture's bits, pixels, PSNR (B,) and SSIM (B,), and AVIF's."""
    bits, pixels, each, similarity = zip(*pictures)
    each, avif_each = torch.cat(each).double(), torch.cat([psnrs for _, _, psnrs, _ in avif])
    difference, mse = each - avif_each, 10 ** (each / -10)
    figures = {"bits": sum(bits) / len(each), "bits_a_pixel": sum(bits) / sum(pixels), "psnr": each.mean().item(),
               "psnr_of_mse": -10 * mse.mean().log10().item(), "ssim": torch.cat(similarity).mean().item(),
               "difference": difference.mean().item()}
    if len(each) > 1:
        figures["error"] = (difference.std() / len(each) ** 0.5).item()
    return figures


if __name__ == "__main__":
    with one_line_errors():
        main()
