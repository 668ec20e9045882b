"""Datasets: CIFAR-10, folders of images, drawn shapes. Image files and batches."""
import contextlib
import functools
import io
import math
import os
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, features
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import CenterCrop, InterpolationMode, PILToTensor, RandomResizedCrop, Resize
from tqdm import tqdm

from quantizers import check
from utils import digest, errors_as, replace_file, to_float

DATASETS = ("auto", "cifar10", "shapes")
DECODE_GB = 30  # above this, training images are read from their files
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM")  # Pillow has others: EPS is code to run
FORMATS += ("AVIF",) if features.check("avif") else ()


class Dataset(NamedTuple):
    """Images (N, 3, H, W), uint8, and labels (N,), int64, None where a folder has no classes."""

    train_images: "Tensor | ImageFiles"
    train_labels: Tensor | None
    test_images: Tensor
    test_labels: Tensor | None
    classes: list[str]


class ImageFiles:
    """Images that stay in their files: images[:n] are the first n, images[i, size] a random crop of one."""

    device = "cpu"

    def __init__(self, files: list[Path], size: int):
        self.files = np.array(files, str)  # each worker would copy a list
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: slice | tuple[int, int]) -> Tensor:
        if isinstance(key, slice):
            return torch.stack([fit(read_image(file), self.size) for file in self.files[key]])
        i, size = key
        try:
            image = read_image(self.files[i])
        except ValueError as error:
            check(os.path.exists(self.files[i]), "DATASET", str(self.files[i]), "files that stay until the run ends")
            tqdm.write(f"{error}; the next image is used")
            return self[(i + 1) % len(self), size]
        least = min(1, size**2 / image[0].numel())  # of the image's area: a crop at full resolution
        return RandomResizedCrop(size, (least, 1))(image)


def find_dataset(name: str) -> tuple[str, str]:
    """A dataset's name, for "auto" too, and a digest of a folder's files."""
    check(name in DATASETS or Path(name).is_dir(), "DATASET", name, f"{', '.join(DATASETS)}, or a folder with train/")
    if name == "auto":
        try:
            load_cifar10()
            name = "cifar10"
        except OSError as error:
            print(f"{error}; taking DATASET=shapes instead")
            name = "shapes"
    return name, "" if name in DATASETS else digest([list_split(name, split)[2] for split in ("train", "test")])


def load_dataset(name: str, image_size: int | tuple[int, ...] = 32) -> Dataset:
    """Images of one of DATASETS, or of a folder with train/ and test/ (or val/), image_size pixels a side.

    Several sizes are for random crops of a folder's training images; test images have the largest. ValueError for an
    unknown name or a folder without images, OSError without CIFAR-10.
    """
    name, _ = find_dataset(name)
    if name not in DATASETS:
        return load_folder(name, image_size)
    check(isinstance(image_size, int), "IMAGE_SIZE", image_size, f"one number with DATASET={name}")
    if name == "shapes":
        images, labels = draw_shapes(60_000, image_size)
        return Dataset(images[:50_000], labels[:50_000], images[50_000:], labels[50_000:], [*SHAPES])
    train, test = load_cifar10()
    images = [fit(torch.from_numpy(split.data).movedim(3, 1).contiguous(), image_size) for split in (train, test)]
    return Dataset(images[0], torch.tensor(train.targets), images[1], torch.tensor(test.targets), train.classes)


def load_cifar10() -> list[CIFAR10]:
    socket.setdefaulttimeout(15)  # a server may not answer
    with errors_as(OSError, "CIFAR-10 is not in data/ and cannot be downloaded"):
        return [CIFAR10("data", train, download=True) for train in (True, False)]


def find_images(folder: Path) -> list[Path]:
    """All image files below a folder, sorted. Prints what is ignored: other files, folders that cannot be read."""
    files, errors = [], []
    seen = {Path(folder).resolve(), *Path(folder).resolve().parents}  # links to them, or twice to one, are not followed
    for root, folders, names in os.walk(folder, followlinks=True, onerror=errors.append):
        found = {Path(root, name).resolve(): name for name in sorted(folders)}
        folders[:] = [name for path, name in found.items() if path not in seen and name[0] != "."]
        seen.update(found)
        files += [Path(root, name) for name in names if name[0] != "."]  # Jupyter and macOS hide copies
    formats = Image.registered_extensions()  # by suffix
    images = [f for f in files if formats.get(f.suffix.lower()) in FORMATS]
    others = Counter(f.suffix for f in {*files} - {*images})
    for reason in (*errors, *(f"{count} files {kind or 'without suffix'}" for kind, count in sorted(others.items()))):
        print(f"ignored in {folder}: {reason}")
    return sorted(images)


@functools.cache
def list_split(folder: str, split: str) -> tuple[list[Path], list[str], str]:
    """A split's images in random order, the class folder of each or "", and a digest of names, sizes, times."""
    root = Path(folder, "val" if split == "test" and not Path(folder, "test").exists() else split)
    files = [*np.random.default_rng(0).permutation(find_images(root))]
    check(files, "DATASET", folder, f"a folder with images in {root}")
    classes = [f.relative_to(root).parts[0] if f.parent != root else "" for f in files]
    check(all(classes) or not any(classes), "DATASET", folder, f"{root}: all in class folders, or none")
    return files, classes, digest([(str(f.absolute()), f.stat().st_size, f.stat().st_mtime) for f in files])


def load_folder(folder: str, image_size: int | tuple[int, ...]) -> Dataset:
    """Training images stay in their files for crops of several sizes, or if they would take more than DECODE_GB."""
    size = int(np.max(image_size))
    files, names, _ = list_split(folder, "train")
    classes, labels = np.unique(names, return_inverse=True)
    test_classes, test_labels = np.unique(list_split(folder, "test")[1], return_inverse=True)
    alone = sorted({*classes} ^ {*test_classes})
    check(not alone, "DATASET", folder, f"the same class folders in both splits; in one only: {', '.join(alone[:9])}")
    large = not isinstance(image_size, int) or len(files) * 3 * size**2 > DECODE_GB * 1e9
    train_images = ImageFiles(files, size) if large else decode(folder, "train", size)
    test_images = decode(folder, "test", size)
    if not any(names):
        return Dataset(train_images, None, test_images, None, [])
    return Dataset(train_images, torch.tensor(labels), test_images, torch.tensor(test_labels), classes.tolist())


def decode(folder: str, split: str, size: int) -> Tensor:
    """A folder's split (N, 3, size, size), decoded once, into a file mapped into memory."""
    def decode_one(file: Path) -> bytes:
        try:
            return fit(read_image(file), size).numpy().tobytes()
        except ValueError as error:
            broken.append(str(error))
            return b""

    def write():
        shape = (len(files), 3, size, size)
        free, needed = shutil.disk_usage(path.parent).free, math.prod(shape)
        check(needed < free, "free disk space", free, f"{needed} bytes")
        # in order, and mapped once it has its name: Windows renames no file that is open or mapped
        with replace_file(path) as draft, draft.open("wb") as file, ThreadPool(cores()) as pool:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for image in tqdm(pool.imap(decode_one, files), "decoding", len(files), leave=False):
                file.write(image)
            check(not broken, "DATASET", folder, f"one without these {len(broken)} files: {'; '.join(broken)}")

    files, _, state = list_split(folder, split)
    broken = []
    path = Path("data", f"{Path(folder).resolve().name}_{split}_{size}_{state}.npy")
    path.parent.mkdir(exist_ok=True)
    lock = path.parent / "lock"
    try:
        with FileLock(lock):  # another process may decode the same
            for draft in path.parent.glob("*.tmp"):  # of a process that was killed
                draft.unlink()
            if not path.exists():
                write()
    finally:
        with contextlib.suppress(OSError):  # on Windows, while others wait
            lock.unlink()
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def cores() -> int:
    """How many CPU cores this process may use: in a container, fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def read_image(path: str | Path) -> Tensor:
    """An image file -> (3, H, W), uint8, in sRGB, rotated by its EXIF, on white where transparent."""
    with errors_as(ValueError, f"image {str(path)!r} cannot be read"), Image.open(path, formats=FORMATS) as image:
        image = ImageOps.exif_transpose(image)
        check(image.mode[0] not in "IF", "mode", image.mode, "8 bits a channel")
        if image.has_transparency_data:
            profile = image.info.get("icc_profile")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            image.info["icc_profile"] = profile
        return PILToTensor()(to_srgb(image, path)).contiguous()


def to_srgb(image: Image.Image, path: str | Path) -> Image.Image:
    """The image in RGB, converted from its colour profile, a phone's Display P3 for instance, if it is not sRGB."""
    plain, profile = image.convert("RGB"), image.info.get("icc_profile")
    if not profile:
        return plain
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return plain
        image = image if image.mode in ("RGB", "L", "CMYK") else plain
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (OSError, ImageCms.PyCMSError) as error:
        tqdm.write(f"{path}: its colour profile is ignored, it cannot be read: {error}")
        return plain


def load_image(path: str | Path) -> Tensor:
    """An image file of any size -> (1, 3, H, W) in [0, 1]. ValueError if missing or broken."""
    return to_float(read_image(path)[None])


def fit(images: Tensor, size: int) -> Tensor:
    """Images (..., 3, H, W), uint8, resized and cropped at their centre -> (..., 3, size, size)."""
    return CenterCrop(size)(Resize(size, InterpolationMode.BICUBIC)(images))


def load_batches(images: Tensor | ImageFiles, batches: list[tuple[Tensor, int]], flip: bool, device: str) -> Iterator:
    """For each (index (B,), size), images (B, 3, size, size) in [0, 1] on `device`. flip: half are mirrored."""
    source = (images[index] for index, _ in batches)
    if isinstance(images, ImageFiles):
        samples = [[(i, size) for i in index.tolist()] for index, size in batches]
        workers = cores() // int(os.getenv("LOCAL_WORLD_SIZE", 1))  # torchrun sets it
        # forked: the workers of a forkserver, Python 3.14's default on Linux, would outlive a run that is killed
        start = "fork" if workers and sys.platform == "linux" else None
        source = DataLoader(images, batch_sampler=samples, num_workers=workers, multiprocessing_context=start)
    for batch in source:
        batch = to_float(batch.to(device))
        yield torch.where(torch.rand_like(batch[:, :1, :1, :1]) < flip / 2, batch.flip(3), batch)


# Drawn images of ten shapes, for training without a download

SHAPES = "●⚪◗▲■⬢★✚♥⚡"  # in matplotlib's font


def draw_shapes(count: int, size: int) -> tuple[Tensor, Tensor]:
    """uint8 images (count, 3, size, size) and labels (count,), indices in SHAPES, equally many of each."""
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 2 * size)
    masks = []
    for shape in SHAPES:
        image = Image.new("L", (2 * size, 2 * size))
        ImageDraw.Draw(image).text((size, size), shape, 255, font, anchor="mm")
        masks.append(PILToTensor()(image) / 255)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randperm(count, generator=generator) % len(SHAPES)
    return torch.cat([draw_batch(torch.stack(masks)[batch], generator) for batch in labels.split(1000)]), labels


def draw_batch(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Shapes (B, 1, 2 size, 2 size) in [0, 1] -> uint8 images (B, 3, size, size): moved, turned, scaled, coloured."""
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(masks), *shape, generator=generator)

    def texture() -> Tensor:
        """(B, 3, size, size) in [0, 1]: two colours mixed by a gradient, stripes or checks, or in one mixture."""
        x, angle = torch.linspace(-1, 1, size), uniform(0, 2 * np.pi, 1, 1)
        axes = torch.stack([angle.cos() * x - angle.sin() * x[:, None], angle.sin() * x + angle.cos() * x[:, None]], 1)
        waves = (uniform(-6, 12, 2, 1, 1).clamp(min=0) * axes + uniform(0, 2 * np.pi, 2, 1, 1)).sin()
        return torch.lerp(uniform(0, 1, 3, 1, 1), uniform(0, 1, 3, 1, 1), (waves.prod(1, keepdim=True) + 1) / 2)

    size, (x, y) = masks.shape[-1] // 2, uniform(-0.3, 0.3, 2).T
    turn = torch.polar(uniform(1, 1.6), uniform(0, 2 * np.pi))  # from the image to the shape: above 1 it shrinks
    affine = torch.stack([turn.real, -turn.imag, x, turn.imag, turn.real, y], 1).view(-1, 2, 3)
    moved = F.grid_sample(masks, F.affine_grid(affine, masks.shape, align_corners=False), align_corners=False)
    coverage = F.avg_pool2d(moved, 2)  # anti-aliased
    background = texture()
    dark = background.mean((1, 2, 3), keepdim=True) < 0.5
    foreground = (texture() + dark) / 2  # bright on dark, dark on bright
    noise = F.interpolate(uniform(-0.15, 0.15, 3, 5, 5), size, mode="bicubic", align_corners=True)
    return torch.lerp(background + noise, foreground, coverage).clamp(0, 1).mul(255).round().byte()
