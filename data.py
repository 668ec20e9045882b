"""Datasets: CIFAR-10, folders of images, drawn shapes. Image files and batches."""
import contextlib
import errno
import functools
import io
import math
import os
import shutil
import socket
import sys
import unicodedata
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
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import CenterCrop, InterpolationMode, PILToTensor, RandomResizedCrop, Resize
from tqdm import tqdm

from quantizers import InputError, check, errors_as, require
from utils import digest, progress, replace_file, to_float

DATASETS = ("auto", "cifar10", "shapes")
DECODE_GB = 30  # larger training sets, at the training size, stay in their files and give random crops
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "AVIF")  # others of Pillow are refused: EPS contains code
PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # parts of a PNG; all others are metadata


class Dataset(NamedTuple):
    """Images (N, 3, H, W), uint8, and labels (N,), int64, which are None if the images lie in no class folders."""

    train_images: "Tensor | ImageFiles"
    train_labels: Tensor | None
    test_images: Tensor
    test_labels: Tensor | None
    classes: list[str]


class ImageFiles:
    """Images that stay in their files. images[:n] reads the first n, a DataLoader gets random crops."""

    device = "cpu"  # as of a tensor of images

    def __init__(self, files: list[Path], size: int, labels: Tensor | None = None):
        # workers share this array's memory; a list would be copied, as reading changes its items' reference counts
        self.files = np.array(files, str)
        self.size = size
        self.labels = torch.zeros(len(files)) if labels is None else labels  # without labels, all are of one class
        self.broken = torch.zeros(len(files), dtype=torch.bool).share_memory_()  # all workers see it
        self.reported = 0

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, part: slice) -> Tensor:
        """uint8 images (N, 3, size, size), resized and cropped at their centre."""
        images = torch.stack([fit(self.read_or_next(i), self.size) for i in range(len(self))[part]])
        self.report()
        return images

    def __getitems__(self, samples: list[tuple[int, int]]) -> list[Tensor]:
        """A DataLoader calls this for a batch: random crops (3, size, size) of images i, for each (i, size)."""
        crops = []
        for i, size in samples:
            image = self.read_or_next(i)
            least = min(1, size**2 / image[0].numel())  # the share of the area that size x size pixels have
            crops.append(RandomResizedCrop(size, (least, 1), interpolation=InterpolationMode.BICUBIC)(image))
        return crops

    def read(self, i: int) -> Tensor | None:
        """Image i (3, H, W), or None if its file is broken."""
        if self.broken[i]:
            return None
        try:
            return read_image(str(self.files[i]))
        except InputError as error:
            # The system's errors, which have a number, say nothing about the image: the file may be gone. Only EINVAL
            # is the image's: it names a place in the file that cannot be.
            of_system = getattr(error.__cause__, "errno", None) not in (None, errno.EINVAL)
            require(not of_system, f"{error}. Files must stay readable until the run ends.")
            require(not isinstance(error.__cause__, MemoryError), f"{error}. The memory is full.")
            self.broken[i] = True
            if self.broken.sum() > len(self) / 100:
                self.report(f" The last error: {error}")  # raises
            return None

    def read_or_next(self, i: int) -> Tensor:
        """Image i (3, H, W), or the next image of its class that can be read."""
        for step in range(len(self)):
            j = (i + step) % len(self)
            image = self.read(j) if self.labels[j] == self.labels[i] else None
            if image is not None:
                return image
        raise InputError(f"{self.files[i]} cannot be read, nor any other image of its class.")

    def report(self, reason: str = ""):
        """Say which images are broken, unless it has been said. InputError if more than 1 % are."""
        count = int(self.broken.sum())
        names = ", ".join(self.files[self.broken.numpy()][:10])
        message = f"{count:,} of {len(self):,} images cannot be read: {names}"
        require(count <= len(self) / 100, f"{message}. Remove them: at most 1 % may be broken.{reason}")
        if count > self.reported:
            tqdm.write(f"{message}. They are skipped.")
            self.reported = count


def find_dataset(name: str) -> tuple[str, str]:
    """The name of a dataset that exists, and a digest of a folder's file names and sizes, "" for others.

    "auto" becomes "cifar10" or "shapes". The digest stays as it is if the folder moves. InputError for another name.
    """
    name = os.path.expanduser(name)
    check(name in DATASETS or Path(name).is_dir(), "DATASET", name, f"{', '.join(DATASETS)}, or a folder with train/")
    if name == "auto":
        try:
            load_cifar10()  # to see whether it works
            name = "cifar10"
        except OSError as error:
            print(f"{error}; taking DATASET=shapes instead")
            name = "shapes"
    if name in DATASETS:
        return name, ""
    return name, digest([list_split(name, split)[2] for split in ("train", "test")])


def load_dataset(name: str, image_size: int | tuple[int, ...] = 32) -> Dataset:
    """Images of one of DATASETS, or of a folder with train/ and test/ (or val/), image_size pixels a side.

    With several sizes, or above DECODE_GB, training images give random crops. Test images have the largest size.
    InputError for an unknown name or a folder without images, OSError without CIFAR-10.
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
    """CIFAR-10's training and test images, downloaded to data/ unless they are there. OSError if that fails."""
    with contextlib.suppress(RuntimeError):  # they are not there, or not whole
        return [CIFAR10("data", train) for train in (True, False)]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(15)  # a server may not answer
    try:
        # another process may download it
        with FileLock("data/lock"), errors_as(OSError, "CIFAR-10 is not in data/ and cannot be downloaded"):
            return [CIFAR10("data", train, download=True) for train in (True, False)]
    finally:
        socket.setdefaulttimeout(timeout)


def find_images(folder: str | Path) -> list[Path]:
    """All image files below a folder, sorted, without hidden ones (".name"), of which Jupyter and macOS make copies.

    Prints what else is ignored: other files, and folders that cannot be read.
    """
    folder = Path(os.path.expanduser(folder))
    files, errors, seen = [], [], {*folder.resolve().parents}  # each folder is read once, and no link leads above
    starts = [folder]
    for start in starts:  # links join this list: a folder is read under its own name before links to it are followed
        for root, folders, names in os.walk(start, onerror=errors.append):  # it follows no links itself
            if Path(root).resolve() in seen:
                folders.clear()
                continue
            seen.add(Path(root).resolve())
            folders[:] = sorted(name for name in folders if name[0] != ".")
            files += [Path(root, name) for name in names if name[0] != "."]
            starts += [Path(root, name) for name in folders if os.path.islink(Path(root, name))]
    formats = Image.registered_extensions()  # {".jpg": "JPEG", ...}
    # a link may lead nowhere
    images = [file for file in files if formats.get(file.suffix.lower()) in FORMATS and file.exists()]
    others = Counter(file.suffix for file in {*files} - {*images})
    for reason in (*errors, *(f"files {kind or 'without suffix'}: {count}" for kind, count in sorted(others.items()))):
        print(f"ignored in {folder}: {reason}")
    # Unicode writes é as one character or two, and systems differ
    return sorted(images, key=lambda file: unicodedata.normalize("NFC", str(file)).split(os.sep))


@functools.cache
def list_split(folder: str, split: str) -> tuple[list[Path], list[str], str]:
    """The files of "train" or "test" in random order, each one's class folder or "", and a digest for the run's name.

    All are as at the first call. InputError without images, or if only some lie in class folders.
    """
    root = Path(folder, split)
    if split == "test" and not root.exists():
        root = Path(folder, "val")
    require(root.is_dir(), f"The folder {folder} has no folder {split}/.")
    files = [*np.random.default_rng(0).permutation(find_images(root))]
    require(files, f"{root} has no images. Wanted are {', '.join(FORMATS)}, in class folders or without.")
    names = [unicodedata.normalize("NFC", file.relative_to(root).as_posix()) for file in files]
    classes = [name.split("/")[0] if "/" in name else "" for name in names]
    require(all(classes) or not any(classes), f"{root} has images in class folders and beside them. Move the latter.")
    return files, classes, digest([(name, file.stat().st_size) for name, file in zip(names, files)])


def load_folder(folder: str, image_size: int | tuple[int, ...]) -> Dataset:
    """load_dataset for a folder. Training images stay in their files for several sizes, and above DECODE_GB."""
    size = int(np.max(image_size))
    files, folders, _ = list_split(folder, "train")
    classes, labels = np.unique(folders, return_inverse=True)
    test_classes, test_labels = np.unique(list_split(folder, "test")[1], return_inverse=True)
    labels, test_labels = torch.tensor(labels), torch.tensor(test_labels)
    alone = sorted({*classes} ^ {*test_classes})
    require(not alone, f"{folder}: both splits need the same class folders. Only one has "
            f"{', '.join(name or 'images outside them' for name in alone[:9])}.")
    if not isinstance(image_size, int) or len(files) * 3 * size**2 > DECODE_GB * 1e9:
        train_images = ImageFiles(files, size, labels)
    else:
        train_images, labels = decode(folder, "train", size, labels)
    test_images, test_labels = decode(folder, "test", size, test_labels)
    if not any(folders):
        return Dataset(train_images, None, test_images, None, [])
    return Dataset(train_images, labels, test_images, test_labels, classes.tolist())


def decode(folder: str, split: str, size: int, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A split's readable images (N, 3, size, size), decoded once into a file mapped into memory, and their labels."""
    files, _, _ = list_split(folder, split)
    with errors_as(InputError, f"{folder} has lost files, which must stay until the run ends"):
        stats = [(file, file.stat()) for file in files]
    state = digest([(str(file.absolute()), stat.st_size, stat.st_mtime_ns) for file, stat in stats])
    images = ImageFiles(files, size)
    path = Path("data", f"{Path(folder).resolve().name}_{split}_{size}_{state}.bin")
    with FileLock(path.parent / "lock"):  # another process may decode the same folder
        for draft in path.parent.glob("*.tmp"):  # a killed process leaves its draft
            with contextlib.suppress(OSError):  # on Windows, while a virus scanner reads it
                draft.unlink()
        if not path.exists():
            write_decoded(path, images)
    content = torch.from_numpy(np.memmap(path, mode="c"))  # "c" leaves the file as it is, whatever is written
    images.broken = content[-len(files) :].bool()  # the pixels of all images precede them
    images.report()
    return content[: -len(files)].view(-1, 3, size, size), labels[~images.broken]


def write_decoded(path: Path, images: ImageFiles):
    """Write the pixels of all readable images, then a byte for each file: whether it is broken."""
    def pixels(i: int) -> bytes:
        image = images.read(i)
        return b"" if image is None else fit(image, images.size).numpy().tobytes()

    needed, free = len(images) * 3 * images.size**2, shutil.disk_usage(path.parent).free
    require(needed < free, f"{path} needs {needed:,} bytes, but its disk has {free:,} left.")
    # A plain file, which decode maps after it is renamed: Windows renames no file that is mapped.
    with replace_file(path) as draft, draft.open("wb") as file, ThreadPool(cores()) as pool:
        # in parts of 1,000, so that few images wait in memory while a slow disk writes
        for part in progress(torch.arange(len(images)).split(1000), "decoding"):
            file.writelines(pool.map(pixels, part.tolist()))
        file.write(images.broken.numpy().tobytes())


def cores() -> int:
    """How many CPU cores this process may use: in a container, fewer than the machine has."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, math.ceil(int(quota) / int(period)))
    return count


def read_image(path: str | Path) -> Tensor:
    """An image file -> (3, H, W), uint8, in sRGB, rotated by its EXIF, on white where transparent.

    Metadata that cannot be read are ignored. InputError for a broken file, for grey values of more than 8 bits, and
    above Pillow's limit of pixels.
    """
    with errors_as(InputError, f"image {str(path)!r} cannot be read"):
        image = load_pixels(path)
        with contextlib.suppress(Exception):  # Pillow rotates the image, then may fail to rewrite a broken EXIF
            ImageOps.exif_transpose(image, in_place=True)
        require(image.mode[0] not in "IF", "it has more than 8 bits a channel")  # modes I, I;16 and F
        profile = image.info.get("icc_profile")
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return PILToTensor()(to_srgb(image, profile, path)).contiguous()


def load_pixels(path: str | Path) -> Image.Image:
    """Open an image, without its metadata if Pillow stops at them."""
    try:
        return open_image(path)
    except Exception:  # Pillow's errors are of many kinds; this one is raised again if nothing below helps
        with open(path, "rb") as file:
            content = file.read(2**30)  # no photograph is larger
        # keep only the orientation (eXIf) and the colour profile (iCCP), then the orientation alone, then nothing
        for chunks in ([b"eXIf", b"iCCP"], [b"eXIf"], []):
            with contextlib.suppress(Exception):
                return open_image(io.BytesIO(leave_out_metadata(content, chunks)))
        raise


def open_image(file: str | Path | io.BytesIO) -> Image.Image:
    """The decoded image. InputError above Pillow's limit of pixels, and Pillow's errors."""
    with Image.open(file, formats=FORMATS) as image:
        limit = Image.MAX_IMAGE_PIXELS or math.inf
        require(math.prod(image.size) <= limit, f"it has {image.width} x {image.height} pixels, more than {limit:,}")
        image.load()
    return image


def leave_out_metadata(content: bytes, chunks: list[bytes]) -> bytes:
    """A PNG file reduced to its pixels and these chunks. Other files, such as AVIF, lose their EXIF."""
    if not content.startswith(b"\x89PNG"):
        return content.replace(b"Exif", b"none")  # a name that no decoder knows
    kept, start = bytearray(content[:8]), 8
    while start < len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")  # length, name, data, checksum
        if content[start + 4 : start + 8] in (*PIXEL_CHUNKS, *chunks):
            kept += content[start:end]
        start = end
    return bytes(kept)


def to_srgb(image: Image.Image, profile: bytes | None, path: str | Path) -> Image.Image:
    """The image in sRGB. Another colour profile, such as a phone's Display P3, is converted."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else None
        description = ImageCms.getProfileDescription(source) if source else "sRGB"
        if "sRGB" not in description or "linear" in description.lower():
            mode = {"GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space, "RGB")  # the profile's
            image = image if image.mode == mode else image.convert(mode)
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except Exception as error:
        tqdm.write(f"{path}: its colour profile cannot be read and is ignored: {error}")
    return image.convert("RGB")


def load_image(path: str | Path) -> Tensor:
    """An image file of any size -> (1, 3, H, W) in [0, 1]. InputError if missing or broken."""
    return to_float(read_image(path)[None])


def fit(images: Tensor, size: int) -> Tensor:
    """Images (..., 3, H, W), uint8, resized and cropped at their centre -> (..., 3, size, size)."""
    sides = images.shape[-2:]
    if max(sides) > 4 * min(sides):  # resized as a whole, 30,000 x 1 pixels would take gigabytes
        images = CenterCrop([min(side, 4 * min(sides)) for side in sides])(images)
    return CenterCrop(size)(Resize(size, InterpolationMode.BICUBIC)(images))


def load_batches(images: Tensor | ImageFiles, batches: list[tuple[Tensor, int]], flip: bool,
                 device: str) -> Iterator[Tensor]:
    """For each (index (B,), size), images (B, 3, size, size) in [0, 1] on `device`. flip: half are mirrored."""
    source = load_crops(images, batches) if isinstance(images, ImageFiles) else (images[i] for i, _ in batches)
    for batch in source:
        batch = to_float(batch.to(device))
        mirrored = torch.rand_like(batch[:, :1, :1, :1]) < (0.5 if flip else 0)  # (B, 1, 1, 1)
        yield torch.where(mirrored, batch.flip(3), batch)


def load_crops(images: ImageFiles, batches: list[tuple[Tensor, int]]) -> Iterator[Tensor]:
    """For each (index (B,), size), uint8 crops (B, 3, size, size). A worker on each core, up to 16, reads them."""
    samples = [[(i, size) for i in index.tolist()] for index, size in batches]
    workers = min(16, cores() // int(os.getenv("LOCAL_WORLD_SIZE", 1)))  # torchrun sets it
    # forked: the workers of a forkserver, Python 3.14's default on Linux, would outlive a run that is killed
    start = "fork" if workers and sys.platform == "linux" else None
    loader = DataLoader(images, batch_sampler=samples, num_workers=workers, multiprocessing_context=start)
    for number, batch in enumerate(loader, 1):
        if number == len(samples):  # now, since train_epoch asks for no more, and nothing would run after the loop
            images.report()
        yield batch


# Drawn images of ten shapes, for training without a download

SHAPES = "●⚪◗▲■⬢★✚♥⚡"  # in matplotlib's font


def draw_shapes(count: int, size: int) -> tuple[Tensor, Tensor]:
    """uint8 images (count, 3, size, size) and labels (count,), indices in SHAPES. Each shape is drawn equally often."""
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 2 * size)
    masks = []
    for shape in SHAPES:
        image = Image.new("L", (2 * size, 2 * size))  # draw_batch averages 2 x 2 pixels
        ImageDraw.Draw(image).text((size, size), shape, 255, font, anchor="mm")
        masks.append(PILToTensor()(image) / 255)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randperm(count, generator=generator) % len(SHAPES)
    return torch.cat([draw_batch(torch.stack(masks)[batch], generator) for batch in labels.split(1000)]), labels


def draw_batch(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Shapes (B, 1, 2 size, 2 size) in [0, 1] -> uint8 images (B, 3, size, size): moved, turned, scaled, coloured."""
    size = masks.shape[-1] // 2

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        """Random numbers (B, *shape)."""
        return low + (high - low) * torch.rand(len(masks), *shape, generator=generator)

    def texture() -> Tensor:
        """(B, 3, size, size) in [0, 1]: two colours mixed by a gradient, stripes or checks, or evenly."""
        x, angle = torch.linspace(-1, 1, size), uniform(0, 2 * np.pi, 1, 1)
        y = x[:, None]
        rotated = torch.stack([angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y], 1)
        frequencies = uniform(-6, 12, 2, 1, 1).clamp(min=0)  # a third are 0: one 0 makes stripes, two one colour
        waves = (frequencies * rotated + uniform(0, 2 * np.pi, 2, 1, 1)).sin()
        return torch.lerp(uniform(0, 1, 3, 1, 1), uniform(0, 1, 3, 1, 1), (waves.prod(1, keepdim=True) + 1) / 2)

    x, y = uniform(-0.3, 0.3, 2).T
    turn = torch.polar(uniform(1, 1.6), uniform(0, 2 * np.pi))  # maps the image to the shape, so above 1 it shrinks
    affine = torch.stack([turn.real, -turn.imag, x, turn.imag, turn.real, y], 1).view(-1, 2, 3)
    moved = F.grid_sample(masks, F.affine_grid(affine, masks.shape, align_corners=False), align_corners=False)
    coverage = F.avg_pool2d(moved, 2)  # anti-aliased
    background = texture()
    dark = background.mean((1, 2, 3), keepdim=True) < 0.5
    foreground = (texture() + dark) / 2  # bright on dark, dark on bright
    noise = F.interpolate(uniform(-0.15, 0.15, 3, 5, 5), size, mode="bicubic", align_corners=True)
    return torch.lerp(background + noise, foreground, coverage).clamp(0, 1).mul(255).round().byte()
