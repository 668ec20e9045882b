"""Compare checkpoints with JPEG, WebP and AVIF at equal bits.

    python -m extras.codecs                                    the shipped checkpoints, on CIFAR-10's test images
    python -m extras.codecs <checkpoint> PHOTOS=my_photos      a checkpoint on photographs, each encoded whole

Codecs encode small images as one picture, so that headers do not count. They minimise the error "of MSE".
"to AVIF" is the mean difference from AVIF's PSNR at nearly equal bits, "+-" its standard error.
"class in" is measured as in extras.measure. Training images have the quality that was found for the test images.
"""
import bisect
import functools
import io
import math
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from data import Dataset, ImageFiles, find_images, load_dataset
from extras import measure
from models import VQRAE
from quantizers import check, require
from utils import device, evaluate, one_line_errors, progress, psnr, ssim

DATASET = "cifar10"  # or another of train.py's
PHOTOS = ""  # a folder of photographs, instead of DATASET
COUNT = 961  # at most so many photographs, or 31 x 31 images in one picture
TRAIN_IMAGES = 3_000  # the judges' probes learn from at most so many
CODECS = {"JPEG": {"optimize": True, "progressive": True, "subsampling": "4:4:4"}, "WebP": {"method": 6},
          "AVIF": {"subsampling": "4:4:4", "speed": 2, "advanced": {"tune": "psnr"}}}  # 0.5 dB more than by default
TABLE = {**measure.COLUMNS, "a pixel": ("bits_a_pixel", ".3f"), "to AVIF": ("difference", "+.2f"),
         "+-": ("error", ".2f")}


def main():
    models = measure.load_models(globals())
    check(COUNT >= 1, "COUNT", COUNT, "1 or more")
    for name, model in models.items():
        require(model.quantizer.codebook_size, f"{name} has no codes, so its images have no size in bits.")
    sizes = {model.config["image_size"] for model in models.values()}
    require(PHOTOS or len(sizes) == 1, f"Compare checkpoints of one image size, not of {sizes}.")
    data = None if PHOTOS else load_dataset(DATASET, sizes.pop())
    figures, accuracies = defaultdict(list), {}
    for images in [square(data.test_images, COUNT)] if data else photographs():
        for name, model in models.items():
            coded = code(name, model.to(device), images)
            for row, (decoded, bits, _) in coded.items():
                figures[row].append((bits, images[:, 0].numel(), psnr(decoded, images), ssim(decoded, images)))
            if data:
                accuracies |= measure_classes(name, model, data, images, coded)
    rows = {}
    for name in models:
        for row in (name, *(f"{codec}, as {name}" for codec in CODECS)):
            rows[row] = average(figures[row], figures[f"AVIF, as {name}"]) | accuracies.get(row, {})
    print(measure.format_table(rows, TABLE, "images from"))


def square(images: Tensor | ImageFiles, count: int) -> Tensor:
    """The first n * n images, at most `count`."""
    return images[: math.isqrt(min(count, len(images))) ** 2]


def photographs() -> Iterator[Tensor]:
    """uint8 images (1, 3, H, W) in PHOTOS. All files are tried before the work: a few may be broken."""
    files = ImageFiles(find_images(PHOTOS)[:COUNT], size=0)
    require(len(files), f"PHOTOS={PHOTOS} has no images.")
    readable = [i for i in range(len(files)) if files.read(i) is not None]
    files.report()
    for i in progress(readable, "photographs"):
        yield files.read(i)[None]


def code(name: str, model: VQRAE, images: Tensor) -> dict[str, tuple[Tensor, float, int]]:
    """Code images as a model's tokens, and with each codec in nearly as many bits.

    Returns decoded images, uint8 (n * n, 3, H, W) as `images`, their bits, and the codec's quality, by rows of TABLE.
    """
    _, counts, decoded = evaluate(model, images, measure.batch_size(images))
    bits = int(counts.sum()) * math.log2(model.quantizer.codebook_size)
    coded = {name: (decoded, bits, 0)}
    for codec in CODECS:
        quality = find_quality(images, codec, bits)
        file = encode(images, codec, quality)
        coded[f"{codec}, as {name}"] = decode(file, len(images)), 8 * len(file), quality
    return coded


@functools.lru_cache(100)  # several checkpoints ask for the same files
def encode(images: Tensor, codec: str, quality: int) -> bytes:
    """The file of images, uint8 (n * n, 3, H, W), as one picture."""
    picture, file = make_grid(images, math.isqrt(len(images)), padding=0), io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, codec, quality=quality, **CODECS[codec])
    return file.getvalue()


def decode(file: bytes, count: int) -> Tensor:
    """A picture's `count` = n * n images, uint8 (n * n, 3, H, W)."""
    n, picture = math.isqrt(count), np.array(Image.open(io.BytesIO(file)).convert("RGB"))
    images = torch.from_numpy(picture).unflatten(1, (n, -1)).unflatten(0, (n, -1))  # (n, H, n, W, 3)
    return images.permute(0, 2, 4, 1, 3).flatten(0, 1)


def find_quality(images: Tensor, codec: str, bits: float) -> int:
    """The quality from 1 to 100 whose file comes nearest to so many bits. Files grow with their quality."""
    def size(quality: int) -> int:
        return 8 * len(encode(images, codec, quality))

    above = bisect.bisect_left(range(2, 100), bits, key=size) + 2
    return min((above - 1, above), key=lambda quality: abs(size(quality) - bits))


def measure_classes(name: str, model: VQRAE, data: Dataset, images: Tensor, coded: dict) -> dict[str, dict]:
    """How much of the class judges find in a model's rows of TABLE, from what `code` returned. {} without classes."""
    train_images = square(data.train_images, TRAIN_IMAGES)
    labels = measure.probe_labels(data, len(train_images))
    if labels is None:
        return {}
    train_decoded = {name: evaluate(model, train_images, measure.batch_size(images))[2]}
    for codec in CODECS:
        row = f"{codec}, as {name}"
        train_decoded[row] = decode(encode(train_images, codec, coded[row][2]), len(train_images))
    test_labels, rows = data.test_labels[: len(images)].to(device), defaultdict(dict)
    for judge, encoder in measure.load_judges(model.token_size, images.shape[-1]).items():
        train, test = measure.pooled_features(encoder, train_images), measure.pooled_features(encoder, images)
        rows[name][f"probe_image_{judge}"] = measure.linear_probe(train, labels, test, test_labels)
        for row, decoded in train_decoded.items():
            train, test = measure.pooled_features(encoder, decoded), measure.pooled_features(encoder, coded[row][0])
            rows[row][f"probe_reconstruction_{judge}"] = measure.linear_probe(train, labels, test, test_labels)
    return rows


def average(pictures: list[tuple], avif: list[tuple]) -> dict[str, float]:
    """A row's figures from each picture's bits, pixels, PSNR (B,) and SSIM (B,), and from AVIF's."""
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
