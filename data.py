"""Datasets: CIFAR-10, folders of images, drawn shapes. Image files and batches."""
import hashlib
import os
import shutil
import socket
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import CenterCrop, InterpolationMode, PILToTensor, RandomResizedCrop, Resize

from quantizers import InputError, check, errors_as
from utils import digest, digest_file, progress, replace_file, to_float

DATASETS = ("auto", "cifar10", "shapes")  # "auto" is CIFAR-10, or drawn shapes if it cannot be downloaded
SHAPES = "●⚪◗▲■⬢★✚♥⚡"  # in matplotlib's font
DECODE_GB = 30  # larger training sets stay in their files, and give random crops
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "AVIF")  # of Pillow's others, EPS contains code
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Dataset(NamedTuple):
    """Images (N, 3, H, W), uint8, and labels (N,), int64, or None without class folders."""

    train_images: "Tensor | ImageFiles"
    train_labels: Tensor | None
    test_images: Tensor
    test_labels: Tensor | None
    classes: list[str]
    name: str = ""  # "cifar10", "shapes", or the folder's path
    digest: str = ""  # of a folder's pixels and labels, or of its files


def load_dataset(name: str, image_size: int = 32, crop_sizes: tuple[int, ...] = ()) -> Dataset:
    """Images of one of DATASETS, or of a folder with train/ and test/ (or val/), image_size pixels a side.

    crop_sizes: a folder's training images give random crops of these sizes, test images have the largest
    InputError for an unknown name or a folder without images, OSError without CIFAR-10.
    """
    if name not in DATASETS:
        return load_folder(Path(name).expanduser(), image_size, crop_sizes)
    check(not crop_sizes, f"CROP_SIZES = {crop_sizes} needs a folder of photographs, but DATASET = {name!r}.")
    if name != "shapes":
        try:
            return load_cifar10(image_size)
        except OSError as error:
            if name == "cifar10":
                raise
            print(f"{error}; taking DATASET=shapes instead")
    images, labels = draw_shapes(60_000, image_size)
    return Dataset(images[:50_000], labels[:50_000], images[50_000:], labels[50_000:], [*SHAPES], "shapes")


def load_cifar10(size: int) -> Dataset:
    """CIFAR-10, downloaded to data/ unless it is there. OSError if that fails."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(15)
    try:
        with errors_as(OSError, "CIFAR-10 is not in data/ and cannot be downloaded"):
            train, test = (CIFAR10("data", is_train, download=True) for is_train in (True, False))
    finally:
        socket.setdefaulttimeout(timeout)
    parts = []
    for name, split in (("train", train), ("test", test)):
        pixels = torch.from_numpy(split.data).movedim(3, 1)  # (N, 3, 32, 32)
        images, _ = map_images(f"cifar10_{name}", lambda part: fit(pixels[part], size), len(pixels), size)
        parts += [images, torch.tensor(split.targets)]
    return Dataset(*parts, train.classes, "cifar10")


def load_folder(folder: Path, image_size: int, crop_sizes: tuple[int, ...]) -> Dataset:
    """load_dataset for a folder."""
    name, size = folder.resolve().name, max(crop_sizes, default=image_size)
    files, labels, classes = list_split(folder, "train")
    test_files, test_labels, test_classes = list_split(folder, "test")
    alone = sorted({*classes} ^ {*test_classes})
    check(not alone, f"Only one split of {folder} has the class folders {', '.join(alone[:9])}.")
    images, test_images = ImageFiles(files, size, labels), ImageFiles(test_files, size, test_labels)
    if crop_sizes or len(files) * 3 * size**2 > DECODE_GB * 1e9:
        content = [(file.relative_to(folder).as_posix(), file.stat().st_size) for file in files]
    else:
        images, content = map_images(name, images.__getitem__, len(files), size, files)
    test_images, test_content = map_images(name, test_images.__getitem__, len(test_files), size, test_files)
    key = digest((content, labels.tolist(), test_content, test_labels.tolist()))
    if classes == ["."]:  # no class folders
        labels, test_labels, classes = None, None, []
    return Dataset(images, labels, test_images, test_labels, classes, str(folder), key)


def list_split(folder: Path, split: str) -> tuple[list[Path], Tensor, list[str]]:
    """The files of "train" or "test" in random order, their labels (N,), and class folders, ["."] without any."""
    root = folder / ("val" if split == "test" and not (folder / "test").exists() else split)
    check(root.is_dir(), f"There is no folder {root}. DATASET has train/ and test/, or is one of {DATASETS}.")
    files = [*np.random.default_rng(0).permutation(find_images(root))]
    check(files, f"{root} has no images. Wanted are {', '.join(FORMATS)}, in class folders or without.")
    names = [(file.relative_to(root).parent.parts or ["."])[0] for file in files]
    classes, labels = np.unique(names, return_inverse=True)
    check(len(classes) == 1 or "." not in names, f"{root} has images beside its class folders: move them.")
    return files, torch.tensor(labels), classes.tolist()


def find_images(folder: str | Path) -> list[Path]:
    """All image files below a folder, sorted, without hidden ones (".name"). Prints what else it ignores."""
    files, seen = [], {Path(folder).resolve(), *Path(folder).resolve().parents}
    for root, folders, names in os.walk(folder, onerror=print, followlinks=True):
        # links may lead to the same folder, or in circles: each is read once, by its first name
        found = {Path(root, name).resolve(): name for name in sorted(folders, reverse=True) if name[0] != "."}
        folders[:] = sorted(found[path] for path in found.keys() - seen)
        seen |= found.keys()
        files += [Path(root, name) for name in names if name[0] != "."]
    formats = Image.registered_extensions()  # {".jpg": "JPEG", ...}
    images = [x for x in files if formats.get(x.suffix.lower()) in FORMATS and x.is_file()]  # no named pipe
    others = Counter(file.suffix for file in {*files} - {*images})
    if others:
        print(f"ignored in {folder}: {others.total():,} files, such as {dict(others.most_common(5))}")
    return sorted(images)


def map_images(name: str, read: Callable, count: int, size: int, files: list[Path] = ()) -> tuple[Tensor, str]:
    """uint8 images (count, 3, size, size), mapped from a file in data/, which is written once, and their digest.

    read: a slice -> this part's images
    files: what they are made from; if one of them or this module changes, images are written anew
    Small images without files stay in memory, with the digest "".
    """
    step = 1000 if size <= 32 else 100  # to bound the memory
    parts = (read(slice(i, i + step)) for i in progress(range(0, count, step), "reading images"))
    if not files and size <= 32:
        return torch.cat([*parts]), ""
    state = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    path = Path("data", f"{name}_{size}_{digest((state, digest_file(__file__)))}.bin")
    if not path.exists():
        content_hash = hashlib.sha256()
        with replace_file(path) as draft, draft.open("wb") as file:
            needed, free = count * 3 * size**2, shutil.disk_usage(draft.parent).free
            check(needed < free, f"{path} needs {needed:,} bytes, but its disk has {free:,} left.")
            for part in parts:
                pixels = part.numpy().tobytes()
                content_hash.update(pixels)
                file.write(pixels)
            file.write(content_hash.digest())  # 32 bytes
    content = torch.from_numpy(np.memmap(path, mode="c"))  # "c": writing does not change the file
    return content[:-32].view(count, 3, size, size), bytes(content[-32:].numpy()).hex()


class ImageFiles:
    """Images in their files. images[:n] reads the first n, a DataLoader gets random crops."""

    def __init__(self, files: list[Path], size: int, labels: Tensor):
        # (N, longest path), uint8: workers share a tensor, but would each copy a list
        self.paths = torch.from_numpy(np.array([*map(os.fsencode, files)]).view(np.uint8).reshape(len(files), -1))
        self.size, self.labels = size, labels
        self.device = "cpu"  # as of a tensor of images
        self.broken = set()  # indices of files that were not read

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, part: slice) -> Tensor:
        """uint8 images (N, 3, size, size), cropped at their centre. InputError if over 1 % are broken."""
        with ThreadPool(CORES) as pool:
            images = pool.map(lambda i: fit(self.read(i), self.size).numpy(), range(len(self))[part])
        check(len(self.broken) <= len(self) / 100, f"{len(self.broken)} of {len(self)} images are broken: remove them.")
        return torch.from_numpy(np.stack(images))  # torch.stack's threads would spin while others decode

    def __getitems__(self, samples: list[tuple[int, int, int]]) -> list[Tensor]:
        """A DataLoader's batch: random crops (3, size, size) of images i, for each (i, size, seed)."""
        crops = []
        for i, size, seed in samples:
            image = self.read(i)
            least = min(1, size**2 / image[0].numel())  # a share of the area
            torch.default_generator.manual_seed(int(digest((seed, i)), 16))
            crops.append(RandomResizedCrop(size, (least, 1), interpolation=InterpolationMode.BICUBIC)(image))
        return crops

    def read(self, i: int) -> Tensor:
        """Image i (3, H, W). For a broken file, with a warning, the next image of its class."""
        order = chain(range(i, len(self)), range(i))
        for j in islice((j for j in order if self.labels[j] == self.labels[i]), 10):
            path = os.fsdecode(bytes(self.paths[j].numpy()).rstrip(b"\0"))
            try:
                return read_image(path)
            except InputError as error:
                self.broken.add(j)
                warnings.warn(f"{error}. The next image takes its place.")
        raise InputError(f"{path} cannot be read, nor can those before it in its class.")


def read_image(path: str | Path) -> Tensor:
    """An image file -> (3, H, W), uint8, turned by its EXIF, on white. InputError if broken."""
    with errors_as(InputError, f"image {str(path)!r} cannot be read"), Image.open(path, formats=FORMATS) as image:
        check(image.mode[0] not in "IF", "it has more than 8 bits a channel")  # modes I, I;16 and F
        ImageOps.exif_transpose(image, in_place=True)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return PILToTensor()(image.convert("RGB")).contiguous()


def load_image(path: str | Path) -> Tensor:
    """An image file of any size -> (1, 3, H, W) in [0, 1]. InputError if missing or broken."""
    return to_float(read_image(path)[None])


def fit(images: Tensor, size: int) -> Tensor:
    """Images (..., 3, H, W), uint8, resized and cropped at their centre -> (..., 3, size, size)."""
    sides = images.shape[-2:]
    if max(sides) > 4 * min(sides):  # resized whole, 30,000 x 1 pixels would take gigabytes
        images = CenterCrop([min(side, 4 * min(sides)) for side in sides])(images)
    return CenterCrop(size)(Resize(size, InterpolationMode.BICUBIC)(images))


def load_batches(images: Tensor | ImageFiles, batches: Iterable[tuple[Tensor, int, int]], flip: bool,
                 device: str) -> Iterator[Tensor]:
    """For each (index (B,), size, seed), images (B, 3, size, size) in [0, 1] on `device`. flip: half are mirrored.

    Image files give random crops, the same for the same image and seed. Up to 16 workers read ahead, so `batches` must
    not use torch's global generator.
    """
    source = (images[index] for index, _, _ in batches)
    if isinstance(images, ImageFiles):
        samples = ([(i, size, seed) for i in index.tolist()] for index, size, seed in batches)
        workers = max(1, min(16, CORES // int(os.getenv("LOCAL_WORLD_SIZE", 1))))  # torchrun sets it
        # a forkserver's workers, Python 3.14's default, would outlive a killed run
        start = "fork" if sys.platform == "linux" else None
        source = DataLoader(images, batch_sampler=samples, num_workers=workers, multiprocessing_context=start,
                            pin_memory=device.startswith("cuda"), generator=torch.Generator())  # not the global one
    for batch in source:
        batch = to_float(batch.to(device, non_blocking=True))
        mirrored = torch.rand_like(batch[:, :1, :1, :1]) < (0.5 if flip else 0)  # (B, 1, 1, 1)
        yield torch.where(mirrored, batch.flip(3), batch)


def draw_shapes(count: int, size: int) -> tuple[Tensor, Tensor]:
    """uint8 images (count, 3, size, size) and labels (count,), indices in SHAPES, all equally often."""
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 2 * size)
    masks = torch.empty(len(SHAPES), 1, 2 * size, 2 * size)
    for mask, shape in zip(masks, SHAPES):
        image = Image.new("L", (2 * size, 2 * size))  # draw_batch averages 2 x 2 pixels
        ImageDraw.Draw(image).text((size, size), shape, 255, font, anchor="mm")
        mask.copy_(PILToTensor()(image) / 255)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randperm(count, generator=generator) % len(SHAPES)
    return map_images(f"shapes_{count}", lambda x: draw_batch(masks[labels[x]], generator), count, size)[0], labels


def draw_batch(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Shapes (B, 1, 2 size, 2 size) in [0, 1] -> uint8 images (B, 3, size, size), moved and coloured."""
    size = masks.shape[-1] // 2

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        """Random numbers (B, *shape)."""
        return low + (high - low) * torch.rand(len(masks), *shape, generator=generator)

    def texture() -> Tensor:
        """(B, 3, size, size) in [0, 1]: two colours mixed by a gradient, stripes or checks, or evenly."""
        x, angle = torch.linspace(-1, 1, size), uniform(0, 2 * np.pi, 1, 1)
        y = x[:, None]
        rotated = torch.stack([angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y], 1)
        frequencies = uniform(-6, 12, 2, 1, 1).clamp(min=0)  # one 0 makes stripes, two a plain colour
        waves = (frequencies * rotated + uniform(0, 2 * np.pi, 2, 1, 1)).sin()
        return torch.lerp(uniform(0, 1, 3, 1, 1), uniform(0, 1, 3, 1, 1), (waves.prod(1, keepdim=True) + 1) / 2)

    x, y = uniform(-0.3, 0.3, 2).T
    turn = torch.polar(uniform(1, 1.6), uniform(0, 2 * np.pi))  # above 1 the shape shrinks
    affine = torch.stack([turn.real, -turn.imag, x, turn.imag, turn.real, y], 1).view(-1, 2, 3)
    moved = F.grid_sample(masks, F.affine_grid(affine, masks.shape, align_corners=False), align_corners=False)
    coverage = F.avg_pool2d(moved, 2)  # anti-aliased
    background = texture()
    dark = background.mean((1, 2, 3), keepdim=True) < 0.5
    foreground = (texture() + dark) / 2
    noise = F.interpolate(uniform(-0.15, 0.15, 3, 5, 5), size, mode="bicubic", align_corners=True)
    return torch.lerp(background + noise, foreground, coverage).clamp(0, 1).mul(255).round().byte()
