"""Constants, datasets, cached features, metrics and checkpoints."""
import ast
import contextlib
import csv
import difflib
import glob
import hashlib
import http.client
import io
import math
import os
import pickle
import random
import re
import reprlib
import sys
import time
import urllib.request
import warnings
import zipfile
import zlib
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from filelock import AcquireReturnProxy, FileLock, Timeout
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.models import VGG16_Weights
from torchvision.transforms.v2 import RandomResizedCrop
from tqdm import tqdm

import shapes
from downloads import reachable
from models import VQRAE
from quantizers import check


def read_constants(namespace: dict, arguments: list[str] | None = None) -> dict:
    """Replace constants in `namespace` by NAME=value arguments (None: the command line's) and return all constants.

    `python train.py QUANTIZER=simvq BATCH_SIZE=64` does what editing the two lines would. Values are Python literals;
    anything else is a string. Raises ValueError for an unknown name, or a value that is_plain() refuses.
    """
    others = type | ModuleType | Path | dict  # that have names in capitals, too
    constants = {name: value for name, value in namespace.items() if name.isupper() and not isinstance(value, others)}
    for argument in sys.argv[1:] if arguments is None else arguments:
        name, sign, text = argument.partition("=")
        similar = ", ".join(difflib.get_close_matches(name.upper(), constants, n=3))
        check(sign and name in constants, "argument", argument,
              "NAME=value" + (f" with a NAME such as {similar}" if similar else ""))
        try:
            constants[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            constants[name] = text
    for name, value in constants.items():  # NumPy's numbers would make checkpoints that load_torch refuses
        check(is_plain(value), name, reprlib.repr(value)[:100], "numbers, text, True, False, None, or some in ()")
    namespace.update(constants)
    return constants


def check_ranges(constants: dict, **ranges: tuple):
    """ValueError unless each of these constants is a number in its range (low, high), whole where high is."""
    for name, (low, high) in ranges.items():
        valid = type(constants[name]) in (int, type(high)) and low <= constants[name] <= high
        check(valid, name, constants[name], f"{'whole ' * (type(high) is int)}numbers from {low} to {high}")


def is_plain(value: object, depth: int = 3) -> bool:
    """Whether a value is a short one of Python's own types, such as literals have, which takes no time to print."""
    if type(value) in (tuple, list, dict):
        values = [*value, *value.values()] if type(value) is dict else value
        return depth > 0 and len(value) <= 100 and all(is_plain(v, depth - 1) for v in values)
    if type(value) is str:
        return len(value) <= 4096
    return value is None or type(value) in (bool, int, float) and abs(value) <= 2**63


def digest(value: object) -> str:
    """Twelve hexadecimal digits that tell this value from others."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def seed_everything(*numbers: int):
    """Seed torch, the only random generator in use, with a hash of these numbers."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4]))


# ---------------------------------------------------------------------------------------------------------------------
# Datasets: one uint8 tensor for each split, batched by indexing

class Dataset(NamedTuple):
    """A dataset in memory. Labels are None where a folder has no classes. If `size` is smaller than the images,
    training takes random crops of that size, at random scales, and testing the images' centres."""

    name: str  # part of every run's name, so that runs on different datasets have different outputs
    train_images: Tensor  # (N, 3, H, W) uint8
    train_labels: Tensor | None  # (N,) int64
    test_images: Tensor
    test_labels: Tensor | None
    classes: list[str]
    size: int
    digest: str = ""  # of a folder's files: their names, sizes and times of change

    @property
    def label(self) -> str:
        return f"{self.name} {self.size}x{self.size}"

    def test_crops(self) -> Tensor:
        """The centres (N, 3, size, size) of the test images"""
        start = (self.test_images.shape[-1] - self.size) // 2
        return self.test_images[..., start : start + self.size, start : start + self.size]


FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")  # not EPS: that is a program
DATASETS = ("auto", "cifar10", "cifar100", "shapes")  # "auto": CIFAR-10 or else shapes, which are drawn here


def load_dataset(name: str, image_size: int, data_dir: str = "data") -> Dataset:
    """Images of "cifar10", "cifar100", "shapes" or a folder, image_size pixels a side.

    "auto" is CIFAR-10 where it is on disk or can be downloaded, else "shapes", after a line that says so.
    Raises ValueError for an unknown name, RuntimeError where the dataset is not on disk and cannot be downloaded.
    """
    check(isinstance(image_size, int) and image_size >= 1, "image_size", image_size, "a whole number of 1 or more")
    if name in ("auto", "cifar10", "cifar100"):
        try:
            return load_cifar("cifar10" if name == "auto" else name, image_size, data_dir)
        except RuntimeError as error:
            if name != "auto":
                raise
            print(f'DATASET = "auto": {error}; taking drawn images instead, "shapes"')
    if name in ("auto", "shapes"):
        return draw_shapes(image_size)
    check(isinstance(name, str) and Path(name).is_dir(), "DATASET", name,
          f"{', '.join(DATASETS)} or a folder with train/ and test/ in it")
    return load_folder(Path(name), image_size, data_dir)


def load_datasets(names: str | tuple[str, ...], sizes: int | tuple[int, ...], data_dir: str = "data") -> list[Dataset]:
    """Each dataset named, in each of the sizes that its images have, for training on several of either. One that is
    named twice is there twice, and has twice as many of the steps.

    CIFAR-10 takes part in sizes up to 32, a folder up to the median of its images' shorter sides, to which smaller ones
    are enlarged. They are kept at up to four times the largest size, to take crops at random scales from. With one name
    and one size alone: whole images, resized as load_dataset does.
    """
    if isinstance(names, str) and isinstance(sizes, int):
        return [load_dataset(names, sizes, data_dir)]
    data, sides = {}, {}
    names = [names] if isinstance(names, str) else names
    sizes = [sizes] if isinstance(sizes, int) else sorted(sizes)
    for name in dict.fromkeys(names):
        known = {"cifar10": 32, "cifar100": 32, "shapes": max(sizes)}
        size = sides[name] = known.get(name) or median_side(Path(name, "train"))
        fitting = [n for n in sizes if n <= size]
        check(fitting, "IMAGE_SIZE", sizes, f"sizes of which one is at most {size}, that of the images of {name}")
        whole = load_dataset(name, min(size, 4 * max(sizes)), data_dir)
        data[name] = [whole._replace(size=n) for n in fitting]
    left = set(sizes) - {part.size for parts in data.values() for part in parts}
    check(not left, "IMAGE_SIZE", sorted(left), f"sizes up to that of images, their median shorter side: {sides}")
    labels = {parts[0].name for parts in data.values()}
    check(len(labels) == len(data), "DATASET", names, "folders of different names")
    return [part for name in names for part in data[name]]


def median_side(folder: Path) -> int:
    """The median of the shorter sides of a folder's images, in pixels, of about 100 of them"""
    sides, files = [], find_images(folder)
    for file in files[:: len(files) // 100 + 1]:  # decoding names those that are broken, or have too many pixels
        with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"), \
                Image.open(file, formats=FORMATS) as image:
            sides.append(min(image.size))
    check(sides, "DATASET", str(folder), "a folder with images that can be read")
    return int(np.median(sides))


def load_cifar(name: str, image_size: int, data_dir: str) -> Dataset:
    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        train = source(data_dir, train=True)  # verifies the files' checksums
    except RuntimeError:
        archive = Path(data_dir, source.filename)
        if not check_integrity(archive, source.tgz_md5):
            download(source.url, archive, "md5", source.tgz_md5, f"{name} is not in {data_dir}/")
        train = source(data_dir, train=True, download=True)  # unpacks it
    test = source(data_dir, train=False)
    images = [torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous() for split in (train, test)]
    if image_size != 32:
        images = [torch.cat([F.interpolate(batch.float(), image_size, mode="bicubic", antialias=True)
                             .round().clamp(0, 255).byte() for batch in split.split(1000)]) for split in images]
    return Dataset(name, images[0], torch.tensor(train.targets), images[1], torch.tensor(test.targets), train.classes,
                   image_size)


def load_folder(path: Path, image_size: int, data_dir: str) -> Dataset:
    """Read path/train and path/test, each with one folder per class or with images alone.

    Images are converted to RGB, resized, cropped at the centre and shuffled with a fixed seed: the first thousand are a
    fair sample. Files that cannot be read are named and skipped. Each split is decoded once, into a file in data_dir
    that later runs map into memory, so that a dataset may be larger than memory.
    Raises ValueError where a split has no readable image, or the splits' classes differ.
    """
    path = path.resolve()
    name = "folder-" + re.sub(r"[^\w.-]", "_", path.name)  # it is part of file names, and of titles in plots
    splits, classes, states = [], None, []
    for split in ("train", "test"):
        root = path / split
        files = find_images(root)
        random.Random(0).shuffle(files)
        class_of = [f.relative_to(root).parts[0] if f.parent != root else None for f in files]
        split_classes = sorted(set(class_of) - {None})
        check(classes in (None, split_classes), "DATASET", str(path),
              f"the same class folders in train/ and test/, not {classes} and {split_classes}")
        classes = split_classes
        check(not classes or None not in class_of, "DATASET", str(path), f"{root}: all in class folders, or none")
        states.append(digest([(str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]))
        decoded = Path(data_dir, f"{name}_{split}_{image_size}_{digest(str(path))}_{states[-1]}.uint8")
        images, readable = decode_files(files, image_size, decoded)
        check(len(images), "DATASET", str(path), f"images in {root}, but none there can be read")
        splits += [images, torch.tensor([classes.index(label) for label in class_of])[readable] if classes else None]
    return Dataset(name, *splits, classes, image_size, digest(states))


def find_images(root: Path) -> list[Path]:
    """All files below root that have an image's name, sorted. Links to folders are followed, to each folder once."""
    extensions = {extension for extension, kind in Image.registered_extensions().items() if kind in FORMATS}
    files, visited = [], {os.path.realpath(folder) for folder in (root, *root.parents)}
    for folder, subfolders, names in os.walk(root, followlinks=True):
        files += [Path(folder, name) for name in names]
        found = {os.path.realpath(Path(folder, name)): name for name in subfolders}
        subfolders[:] = [name for path, name in found.items() if path not in visited]
        visited.update(found)
    return sorted(f for f in files if f.suffix.lower() in extensions and f.is_file())


def decode_files(files: list[Path], image_size: int, decoded: Path) -> tuple[Tensor, Tensor]:
    """Images (n, 3, image_size, image_size) uint8, mapped from the file `decoded`, and which of `files` they are (N,).

    That file is made unless it is there and intact. It holds the images, one after the other, then a byte for each of
    `files` that says whether it could be read, then a checksum.
    """
    def decode(file: Path) -> bytes:
        try:
            image = ImageOps.fit(open_image(file), (image_size, image_size), Image.Resampling.BICUBIC)
            return np.asarray(image).transpose(2, 0, 1).tobytes()
        except Exception as error:  # Pillow raises nearly anything for a broken file
            tqdm.write(f"skipping {str(file)!r}: {summarize(error)}")
            return b""

    def write():
        readable, checksum = bytearray(), 0
        refused = warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning)  # may be a bomb
        with open_atomically(decoded) as output, ThreadPool() as pool, refused:
            for start in tqdm(range(0, len(files), 1024), f"decoding {name}", unit=" batches", leave=False):
                images = pool.map(decode, files[start : start + 1024])  # not all files at once, for memory
                readable.extend(map(bool, images))
                checksum = zlib.crc32(b"".join(images), checksum)
                output.writelines(images)
            output.write(readable + zlib.crc32(readable, checksum).to_bytes(4))

    def read() -> Tensor | None:
        size = decoded.stat().st_size if decoded.exists() else 0
        if size < len(files) + 4:
            return None
        content = torch.from_file(str(decoded), shared=False, size=size, dtype=torch.uint8)
        return content[:-4] if zlib.crc32(content[:-4].numpy()) == int.from_bytes(content[-4:].numpy()) else None

    name = decoded.name.rsplit("_", 1)[0]
    content = read()
    if content is None:
        with lock_folder(decoded.parent, wait=True):
            content = read()  # another process may have made it meanwhile
            if content is None:
                for outdated in decoded.parent.glob(f"{glob.escape(name)}_*"):  # or left by a process that was killed
                    outdated.unlink()
                write()
                content = read()
    images, readable = content.split([len(content) - len(files), len(files)])
    if not readable.all():
        print(f"{name}: {(readable == 0).sum()} of {len(files)} files could not be read and were skipped")
    return images.view(-1, 3, image_size, image_size), readable.bool()


def load_image(path: str | Path) -> Tensor:
    """An image file of any size -> (1, 3, H, W) in [0, 1]. ValueError where it cannot be read."""
    check(isinstance(path, str | Path) and Path(path).is_file(), "image", str(path), "the path of an existing file")
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):  # it was asked for
            return to_float(torch.from_numpy(np.array(open_image(Path(path)))).permute(2, 0, 1)[None])
    except Exception as error:  # Pillow raises nearly anything for a broken file
        raise ValueError(f"image {str(path)!r} cannot be read: {summarize(error)}") from None


def open_image(file: Path) -> Image.Image:
    """In RGB and upright, as a viewer shows it: transparency on white, 16-bit grey from 0 to 65535, floats 0 to 1."""
    with open(file, "rb") as opened, Image.open(opened, formats=FORMATS) as image:  # by its path, Pillow 13 maps a TIFF
        image = ImageOps.exif_transpose(image)  # into memory, and scrambles one that is to be turned
    if image.mode[0] in "IF":
        grey, white = np.asarray(image, np.float32), 1 if image.mode == "F" else 65535
        grey = np.where(grey == image.info.get("transparency"), white, grey)  # a PNG's one transparent value
        check(0 <= grey.min() and grey.max() <= white, "grey", f"{grey.min():g} to {grey.max():g}", f"0 to {white}")
        image = Image.fromarray((grey / white * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def draw_shapes(image_size: int, train: int = 50_000, test: int = 10_000, seed: int = 0) -> Dataset:
    """Drawn images of the ten kinds in shapes.py, image_size pixels a side."""
    images, labels = shapes.draw(train + test, image_size, seed)
    return Dataset("shapes", images[:train], labels[:train], images[train:], labels[train:], shapes.SHAPES, image_size,
                   hash_file(shapes.__file__))


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float in [0, 1]"""
    return images.float() / 255


def select_images(images: Tensor, index: Tensor) -> Tensor:
    """images (N, 3, H, W) and index (B,) on their device, from 0 to 2 N - 1 -> images (B, 3, H, W).

    An index i >= N means image i - N mirrored, left and right exchanged: one number tells which image to use and
    whether to flip it, and finds its features in FeatureCache.
    """
    selected = images[index % len(images)]
    return torch.where((index >= len(images)).view(-1, 1, 1, 1), selected.flip(3), selected)


class FeatureCache:
    """Batches of a dataset's training images, with a frozen encoder's features, which are kept on its device.

    fill() computes those of an epoch that are not there yet; [] gives a batch. In bf16 under autocast or in fp32, as
    the training around it. Above limit_gb, and for random crops, nothing is kept, and [] computes each batch.
    encoder None: no features.
    """

    def __init__(self, encoder: nn.Module | None, data: Dataset, device: str, limit_gb: float, dtype: torch.dtype,
                 flip: bool = False):
        self.encoder, self.images, self.device, self.dtype = encoder, data.train_images, torch.device(device), dtype
        stored, self.kept, self.gigabytes = self.images.shape[-1], None, 0.0
        self.crop = None if data.size == stored else RandomResizedCrop(data.size, ((data.size / stored)**2, 1), (1, 1))
        if encoder is None or self.crop:
            return
        count = len(self.images) * (2 if flip else 1)
        side = math.ceil(data.size / encoder.token_size)
        self.gigabytes = count * encoder.dim * side**2 * dtype.itemsize / 1e9
        if self.gigabytes <= limit_gb:
            self.kept = torch.empty((count, side, side, encoder.dim), dtype=dtype, device=self.device)
            self.missing = torch.ones(count, dtype=torch.bool)  # on the host, where looking at it costs nothing

    def fill(self, batches: Tensor):
        """batches (n, B), on the CPU: compute the features of each batch that has a missing image, whole, so that a
        resumed run, which has none of them, computes the same numbers."""
        if self.kept is None:
            return
        for index in tqdm(batches, "encoding", leave=False):
            if self.missing[index].any():
                features = self.encode(self.select(index.to(self.images.device)))
                self.kept[index.to(self.device)] = features.permute(0, 2, 3, 1)
                self.missing[index] = False

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """index (B,), on the images' device -> images (B, 3, size, size) in [0, 1], features (B, C, h, w), fp32"""
        images = self.select(index)
        if self.encoder is None:
            return images, None
        if self.kept is None:
            return images, self.encode(images).float()
        return images, self.kept[index.to(self.device)].float().permute(0, 3, 1, 2)

    def select(self, index: Tensor) -> Tensor:
        images = select_images(self.images, index).to(self.device)
        return to_float(torch.stack([self.crop(image) for image in images]) if self.crop else images)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.encoder(images).to(self.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics

def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image (B,), in dB; both (B, 3, H, W), clamped to [0, 1]. At most 100: one
    image without any error would make the mean infinite."""
    check(images.shape == targets.shape, "images", tuple(images.shape), f"the targets' shape {tuple(targets.shape)}")
    return peak_signal_noise_ratio(images.clamp(0, 1), targets.clamp(0, 1), data_range=1.0, dim=(1, 2, 3),
                                   reduction="none").clamp(max=100)


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Structural similarity of each image (B,), in [-1, 1]; both (B, 3, H, W), clamped to [0, 1]: the mean over
    Gaussian windows of 11x11 pixels within the image, as the original SSIM; torchmetrics' own includes padded ones."""
    check(images.shape == targets.shape, "images", tuple(images.shape), f"the targets' shape {tuple(targets.shape)}")
    check(min(images.shape[-2:]) > 10, "images", tuple(images.shape), "images of 11x11 pixels or more")
    _, similarity = structural_similarity_index_measure(images.clamp(0, 1), targets.clamp(0, 1), data_range=1.0,
                                                        reduction="none", return_full_image=True)
    return similarity[..., 5:-5, 5:-5].mean((1, 2, 3))


@torch.no_grad()
def evaluate(model: VQRAE, images: Tensor, batch_size: int = 250, indices: Tensor | None = None,
             codebooks: int | None = None) -> tuple:
    """Reconstruct uint8 images (N, 3, H, W) from indices (N, h, w), computed unless given; codebooks: how many to use.

    Returns the metrics (psnr in dB, ssim, usage in [0, 1], perplexity; the last two 0 without a quantizer; usage_1 and
    so on of each of several codebooks), counts (see VQRAE.get_codebook_usage) and reconstructions (N, 3, H, W), uint8.
    """
    check(images.dtype == torch.uint8 and len(images), "images", (tuple(images.shape), images.dtype), "some, uint8")
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums, tokens, reconstructions = torch.zeros(2, device=device), [], []
    for i, batch in enumerate(tqdm(images.split(batch_size), "measuring", leave=False)):
        targets = to_float(batch.to(device))
        if model.quantizer.codebook_size:
            tokens += [model.encode_to_indices(targets) if indices is None else indices[i * batch_size :][:batch_size]]
            output = model.decode_from_indices(tokens[-1], codebooks, targets.shape[2:]).float()
        else:
            output = model(targets)[0].float()
        sums += torch.stack([psnr(output, targets).sum(), ssim(output, targets).sum()])
        reconstructions.append((output * 255).round().byte().to(images.device))
    counts, usage, perplexity = model.get_codebook_usage(torch.cat(tokens)) if tokens else (torch.zeros(0), 0.0, 0.0)
    metrics = dict(zip(("psnr", "ssim"), (sums / len(images)).tolist())) | {"usage": usage, "perplexity": perplexity}
    sizes = model.quantizer.codebook_sizes
    for i in range(len(sizes) if len(sizes) > 1 else 0):
        _, metrics[f"usage_{i + 1}"], metrics[f"perplexity_{i + 1}"] = model.get_codebook_usage(torch.cat(tokens), i)
    model.train(was_training)
    return metrics, counts, torch.cat(reconstructions)


def load_lpips() -> nn.Module:
    """LPIPS (1801.03924) on VGG16: called with two batches (B, 3, H, W) in [0, 1] and normalize=True, it gives the
    distance of each pair. RuntimeError where torchvision's VGG16 is not on disk and cannot be downloaded."""
    url = VGG16_Weights.IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if not path.exists():  # its name ends in the first digits of its hash
        download(url, path, "sha256", path.stem.split("-")[1], 'LPIPS needs it, PERCEPTUAL = "encoder" does not')
    return LearnedPerceptualImagePatchSimilarity("vgg").net


# ---------------------------------------------------------------------------------------------------------------------
# Files and checkpoints

not_in_names = ("FEATURE_CACHE_GB", "IMAGES_GB", "KEEP_CHECKPOINTS")  # constants that may change while a run goes on
checkpoint_version = 2  # 1, which files do not say: blocks with their norm first, up to commit 83cca06


@contextlib.contextmanager
def open_atomically(path: Path):
    """Open a file for writing that gets its name when it is complete: no reader and no killed run has half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # that of a full disk does not name the file
        raise OSError(error.errno, f"{error.strerror}", str(path)) if error.errno else error from None
    finally:  # after an error or Ctrl-C, what was written may be large
        temporary.unlink(missing_ok=True)


def lock_folder(folder: Path, wait: bool = False) -> AcquireReturnProxy:
    """A folder's lock, until a with statement or this process ends. If another process has it: wait, or ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock", mode=0o666, is_singleton=True)  # for any user who may write there
    with contextlib.suppress(Timeout):
        return lock.acquire(blocking=False)
    check(wait, "run", str(folder), "one that is not going on elsewhere: end that, or wait")
    print(f"waiting for another process to decode images into {folder}/", flush=True)
    return lock.acquire()


def lock_run(outputs: Path, checkpoints: Path) -> AcquireReturnProxy:
    """Make a run's two folders, lock them as lock_folder does, and remove what a killed process left unfinished."""
    outputs.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(checkpoints)
    for leftover in (*outputs.glob("*.tmp"), *checkpoints.glob("*.tmp")):
        leftover.unlink()
    return lock


def hash_file(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def download(url: str, path: Path, algorithm: str, checksum: str, reason: str):
    """Download a file whose hash begins with `checksum`. RuntimeError where the server cannot be reached, is silent for
    15 seconds, sends less than 10 kB a second, or sends another file; its message ends with `reason`."""
    try:
        if not reachable(url):
            raise OSError("it cannot be reached")
        with urllib.request.urlopen(url, timeout=15) as source, open_atomically(path) as file, \
                tqdm(desc=path.name, total=source.length, unit="B", unit_scale=True, leave=False) as progress:
            start, received, content = time.time(), 0, hashlib.new(algorithm)
            while block := source.read1(2**20):
                file.write(block), content.update(block), progress.update(len(block))
                received += len(block)
                if received < 10_000 * (time.time() - start - 30):
                    raise OSError("the server sends less than 10 kB a second")
            if not content.hexdigest().startswith(checksum):
                raise OSError("what came is broken off, or another file")
    except (OSError, http.client.HTTPException) as error:
        raise RuntimeError(f"{url} could not be downloaded: {error}. {reason}") from None


def write_file(path: Path, content: bytes):
    with open_atomically(path) as file:
        file.write(content)


def write_csv(path: Path, rows: list[dict]):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader(), writer.writerows(rows)
    write_file(path, text.getvalue().encode())


def save_torch(path: Path, content: dict):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getbuffer())


def summarize(error: Exception) -> str:
    """An error's text in one line, in characters that any terminal shows."""
    line = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in line[:300])


def load_torch(path: str | Path, *keys: str) -> dict:
    """Load a dict with these keys, of tensors and plain values, from torch.save. ValueError for any other file."""
    check(isinstance(path, str | Path) and Path(path).is_file(), "checkpoint", str(path), "an existing file")
    try:
        verified = io.BytesIO()
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(verified, "w") as copy:
            records = archive.infolist()
            if sum(record.file_size for record in records) > Path(path).stat().st_size:
                raise ValueError("it is compressed")  # and may be much larger than memory
            for record in records:  # reading verifies checksums; torch does not, and would trust the directory
                copy.writestr(record.filename, archive.read(record))
        verified.seek(0)
        content = torch.load(verified, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not content.keys() >= set(keys):
            raise ValueError(f"it has not all of {', '.join(keys)}")
        return content
    except pickle.UnpicklingError:
        raise ValueError(f"checkpoint {path} cannot be read: it holds more than tensors and plain values") from None
    except Exception as error:  # zipfile, zlib and torch raise many kinds for a broken file
        raise ValueError(f"checkpoint {path} cannot be read: {summarize(error)}") from None


def save_checkpoint(path: Path, model: VQRAE, **metadata):
    """Write a self-describing checkpoint: the model's config and weights, and `metadata`, such as its metrics."""
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    save_torch(path, {"version": checkpoint_version, "config": model.config, "stage": model.stage, "model": weights,
                      **metadata})


@torch.inference_mode(False)  # weights made in inference mode could not be searched or trained with
def load_checkpoint(path: str | Path) -> VQRAE:
    """The VQRAE of a checkpoint written by train.py, in eval mode, built from its own config and without any download.

    Raises ValueError for a file that is broken or no such checkpoint. Metadata (metrics, constants): load_torch(path).
    """
    content = load_torch(path, "config", "stage", "model")
    config, weights = content["config"], content["model"]
    try:
        check(type(config) is dict and is_plain(config), "config", type(config).__name__, "a dict of short values")
        depths = [config.get(name) or 0 for name in ("adapter_depth", "decoder_depth")]
        check(max(depths) <= len(weights), "adapter_depth, decoder_depth", depths, f"{len(weights)} or less")
        said = {"local": True, "norm_first": False}  # options that are gone; the first of version 2 have them
        version = content.get("version", 2 if said.items() <= config.items() else 1)
        check(version == checkpoint_version, "version", version, "2: 1 is that of commit 83cca06 and earlier")
        config = config if "version" in content else {k: v for k, v in config.items() if k not in said}
        with torch.device("meta"):  # without memory: the config may ask for more than there is
            expected = VQRAE(**config, pretrained=False).state_dict()
        check(weights.keys() == expected.keys(), "weights", len(weights), f"the model's {len(expected)}")
        for name, tensor in expected.items():
            stored, scale = weights[name] if isinstance(weights[name], tuple) else (weights[name], None)
            if scale is not None and stored.shape == tensor.shape and len(scale) == scale.numel() == len(stored):
                stored = weights[name] = stored * scale.float()  # 8-bit numbers with a scale for each row
            same = stored.shape == tensor.shape and stored.is_floating_point() == tensor.is_floating_point()
            same &= stored.untyped_storage().nbytes() >= stored.nbytes  # not one number expanded to many
            check(same, name, (tuple(stored.shape), stored.dtype), f"{tuple(tensor.shape)}, {tensor.dtype}")
            check(stored.isfinite().all(), name, "NaN or infinity", "finite numbers")
        model = VQRAE(**config, pretrained=False)
        model.load_state_dict(weights)
        return model.set_stage(content["stage"]).eval()
    except Exception as error:  # a config of nonsense may lead anywhere
        raise ValueError(f"checkpoint {path} does not fit this code: {summarize(error)}") from None
