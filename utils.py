"""Constants of the command line, datasets, grids and plots, runs and checkpoints."""
import ast
import contextlib
import csv
import difflib
import functools
import hashlib
import math
import os
import shutil
import socket
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import CenterCrop, InterpolationMode, RandomResizedCrop, Resize
from torchvision.utils import make_grid
from tqdm import tqdm

from extras import shapes
from models import VQRAE, check_images
from quantizers import check


def read_constants(namespace: dict, arguments: list[str]) -> dict:
    """Replace constants in `namespace` by NAME=value arguments, and return all; --help prints them.

    ValueError for an unknown name, a negative number, or another type than in the file.
    """
    constants = {k: v for k, v in namespace.items() if k.isupper() and isinstance(v, (int, float, str, tuple))}
    if "--help" in arguments:
        print(namespace["__doc__"], *(f"{name} = {value!r}" for name, value in constants.items()), sep="\n")
        sys.exit()
    for argument in arguments:
        name, sign, value = argument.partition("=")
        similar = difflib.get_close_matches(name.upper(), constants, n=3) or constants
        check(sign and name in constants, "argument", argument, f"NAME=value with a NAME such as {', '.join(similar)}")
        if not isinstance(constants[name], str):
            several = isinstance(constants[name], tuple)
            old = constants[name][0] if several else constants[name]
            with contextlib.suppress(SyntaxError, ValueError):
                value = ast.literal_eval(value)
            numbers = value if isinstance(value, tuple) and (several or name == "IMAGE_SIZE") else [value]
            kinds = (float, int) if isinstance(old, float) else (type(old),)
            valid = numbers and all(type(n) in kinds and 0 <= n < math.inf for n in numbers)
            check(valid, name, value, f"{kinds[0].__name__}, such as {old}")
        constants[name] = value
    namespace.update(constants)
    return constants


@contextlib.contextmanager
def one_line_errors(stopped: str = "stopped"):
    """End the script in one line at wrong input, a failing file, a full GPU or Ctrl-C."""
    try:
        yield
    except (ValueError, OSError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        message = stopped if isinstance(error, KeyboardInterrupt) else str(error).partition(". Tried to")[0]
        sys.exit(f"{os.path.basename(sys.argv[0])}: {message}")


def digest(value: object) -> str:
    """A hash of this value: twelve hexadecimal characters."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def seed_everything(*numbers: int):
    """Seed torch's random generators with a hash of these numbers."""
    torch.manual_seed(int(digest(numbers), 16))


# ----------------------------------------
# Datasets: a tensor of uint8 images for each split, or the files of a large folder

DATASETS = ("auto", "cifar10", "shapes")
DECODE_GB = 30  # above this, training images are read from their files


class Dataset(NamedTuple):
    """Images (N, 3, H, W), uint8, and labels (N,), int64, None where a folder has no classes."""

    train_images: "Tensor | ImageFiles"
    train_labels: Tensor | None
    test_images: Tensor
    test_labels: Tensor | None
    classes: list[str]


class ImageFiles(torch.utils.data.Dataset):
    """Images that stay in their files: images[:n] are the first n, images[i, size] is a random crop of one."""

    device = "cpu"

    def __init__(self, files: list[Path], size: int):
        self.files, self.size = np.array([str(file) for file in files]), size  # each worker would copy a list

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: slice | tuple[int, int]) -> Tensor:
        if isinstance(key, slice):
            return torch.stack([fit(read_image(file), self.size) for file in self.files[key]])
        i, size = key
        try:
            image = read_image(self.files[i])
        except ValueError as error:
            tqdm.write(f"{error}; the next image is used")
            return self[(i + 1) % len(self), size]
        least = min(1, size**2 / image[0].numel())  # of the image's area: a crop at full resolution
        return RandomResizedCrop(size, (least, 1))(image)


def find_dataset(name: str, data_dir: str = "data") -> tuple[str, str]:
    """A dataset's name, for "auto" too, and a digest of a folder's files."""
    check(name in DATASETS or Path(name).is_dir(), "DATASET", name, f"{', '.join(DATASETS)}, or a folder with train/")
    if name == "auto":
        try:
            load_cifar10(data_dir)
            name = "cifar10"
        except OSError as error:
            print(f"{error}; taking DATASET=shapes instead")
            name = "shapes"
    return name, "" if name in DATASETS else digest([list_split(name, split)[2] for split in ("train", "test")])


def load_dataset(name: str, image_size: int | tuple[int, ...] = 32, data_dir: str = "data") -> Dataset:
    """Images of one of DATASETS, or of a folder with train/ and test/ (or val/), image_size pixels a side.

    Several sizes are for random crops of a folder's training images; test images have the largest. ValueError for an
    unknown name or a folder without images, OSError without CIFAR-10.
    """
    name, _ = find_dataset(name, data_dir)
    if name not in DATASETS:
        return load_folder(name, image_size, data_dir)
    check(isinstance(image_size, int), "IMAGE_SIZE", image_size, f"one number with DATASET={name}")
    if name == "shapes":
        images, labels = shapes.draw(60_000, image_size)
        return Dataset(images[:50_000], labels[:50_000], images[50_000:], labels[50_000:], shapes.SHAPES)
    train, test = load_cifar10(data_dir)
    images = [fit(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), image_size) for split in (train, test)]
    return Dataset(images[0], torch.tensor(train.targets), images[1], torch.tensor(test.targets), train.classes)


def load_cifar10(data_dir: str) -> list[CIFAR10]:
    socket.setdefaulttimeout(15)  # of a server that does not answer
    try:
        return [CIFAR10(data_dir, train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise OSError(f"CIFAR-10 is not in {data_dir}/ and cannot be downloaded: {error}") from None


def find_images(folder: Path) -> list[Path]:
    """All image files below a folder, sorted. Prints what is ignored: other files, folders that cannot be read."""
    files, errors = [], []
    for root, _, names in os.walk(folder, followlinks=True, onerror=errors.append):
        files += [Path(root, name) for name in names]
    images = [file for file in files if file.suffix.lower() in IMG_EXTENSIONS]
    others = Counter(file.suffix for file in files) - Counter(file.suffix for file in images)
    for reason in (*errors, *(f"{count} files {kind or 'without extension'}" for kind, count in others.items())):
        print(f"ignored in {folder}: {reason}")
    return sorted(images)


@functools.cache
def list_split(folder: str, split: str) -> tuple[list[Path], list[str], str]:
    """A split's images in random order, the class folder of each or "", and a digest of names, sizes, times."""
    root = Path(folder, "val" if split == "test" and not Path(folder, "test").exists() else split)
    files = find_images(root)
    check(files, "DATASET", folder, f"a folder with images in {root}")
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    classes = [file.relative_to(root).parts[0] if file.parent != root else "" for file in files]
    check("" not in classes or set(classes) == {""}, "DATASET", folder, f"{root}: all in class folders, or none")
    return files, classes, digest([(str(f.absolute()), os.path.getsize(f), os.path.getmtime(f)) for f in files])


def load_folder(folder: str, image_size: int | tuple[int, ...], data_dir: str) -> Dataset:
    """Training images stay in their files for crops of several sizes, or where they would take more than DECODE_GB."""
    size, content = image_size if isinstance(image_size, int) else max(image_size), []
    classes = sorted(set(list_split(folder, "train")[1]))
    for split in ("train", "test"):
        files, names, _ = list_split(folder, split)
        check(set(names) == set(classes), "DATASET", folder, "the same class folders in each split")
        large = not isinstance(image_size, int) or len(files) * 3 * size**2 > DECODE_GB * 1e9
        content.append(ImageFiles(files, size) if large and split == "train" else decode(folder, split, size, data_dir))
        content.append(None if classes == [""] else torch.tensor([classes.index(name) for name in names]))
    return Dataset(*content, [] if classes == [""] else classes)


def decode(folder: str, split: str, size: int, data_dir: str) -> Tensor:
    """A folder's split (N, 3, size, size), decoded once, into a file mapped into memory."""
    def try_image(file: Path) -> Tensor | str:
        try:
            return fit(read_image(file), size)
        except ValueError as error:
            return str(error)

    files, _, state = list_split(folder, split)
    path = Path(data_dir, f"{Path(folder).resolve().name}_{split}_{size}_{state}.npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        free = shutil.disk_usage(path.parent).free
        check(len(files) * 3 * size**2 < free, "free disk space", free, f"{len(files) * 3 * size**2} bytes")
        with replace_file(path) as temporary, ThreadPool() as pool:
            images, broken = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(files), 3, size, size)), []
            for i, image in enumerate(tqdm(pool.imap(try_image, files), "decoding", len(files), leave=False)):
                if isinstance(image, str):
                    broken.append(image)
                else:
                    images[i] = image
            check(not broken, "DATASET", folder, f"one without these {len(broken)} files: {'; '.join(broken)}")
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def read_image(path: str | Path) -> Tensor:
    """An image file -> (3, H, W), uint8, rotated as in its EXIF, on white where it is transparent."""
    try:
        with Image.open(path, formats=("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM")) as image:  # EPS is code to run
            image = ImageOps.exif_transpose(image)
            check(image.mode[0] not in "IF", "mode", image.mode, "8 bits a channel")
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except Exception as error:  # Pillow raises nearly anything for a broken file
        raise ValueError(f"image {str(path)!r} cannot be read: {summarize(error)}") from None


def load_image(path: str | Path) -> Tensor:
    """An image file of any size -> (1, 3, H, W) in [0, 1]. ValueError if it is missing or broken."""
    return to_float(read_image(path)[None])


def fit(images: Tensor, size: int) -> Tensor:
    """Images (..., 3, H, W), uint8, resized and cropped at their centre -> (..., 3, size, size)."""
    return CenterCrop(size)(Resize(size, InterpolationMode.BICUBIC)(images))


def to_float(images: Tensor) -> Tensor:
    """Images (B, 3, H, W), uint8 or in [0, 1] already -> in [0, 1]. ValueError for others."""
    return images.float() / 255 if images.dtype == torch.uint8 else check_images(images)


def load_batches(images: Tensor | ImageFiles, batches: list[tuple[Tensor, int]], flip: bool, device: str) -> Iterator:
    """For each (index (B,), size), images (B, 3, size, size) in [0, 1] on `device`. flip: half are mirrored."""
    source = (images[index] for index, _ in batches)
    if isinstance(images, ImageFiles):
        samples = [[(i, size) for i in index.tolist()] for index, size in batches]
        workers = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun sets it
        source = DataLoader(images, batch_sampler=samples, num_workers=workers)
    for batch in source:
        batch = to_float(batch.to(device))
        mirrored = torch.rand(len(batch), 1, 1, 1, device=device) < 0.5 * flip
        yield torch.where(mirrored, batch.flip(3), batch)


# ----------------------------------------
# Grids and plots

def save_grid(path: Path, images: Tensor, columns: int):
    """Write uint8 images (N, 3, H, W) as a grid, row by row. Small ones are enlarged: a viewer would blur them."""
    zoom = max(1, 128 // images.shape[-1])
    images = images.cpu().repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    grid = make_grid(images, nrow=columns, padding=2, pad_value=255)
    with replace_file(path) as temporary:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(temporary, "PNG")


def save_figure(path: Path, figure: Figure):
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def plot_usage(path: Path, counts: Tensor, metrics: dict, title: str):
    """Plot how often each code was used, sorted; counts and metrics: evaluate's."""
    used = counts[counts > 0].sort(descending=True).values.cpu()
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.loglog(range(1, len(used) + 1), used)
    axes.axvline(round(len(used) / metrics["usage"]), color="grey", linestyle=":")
    axes.set(xlabel="code, by rank (dotted: the codebook's size)", ylabel="times used")
    axes.set_title(f"{title}\n{metrics['usage']:.1%} of codes used, perplexity {metrics['perplexity']:,.0f}", size=9)
    save_figure(path, figure)


def plot_curves(path: Path, history: list[dict], title: str):
    """Plot losses together, and each metric by itself. Stage 1 ends at the dotted line."""
    losses = [name for name in history[0] if name.endswith("_loss") and any(row[name] for row in history)]
    panels = {"losses, before their weights": losses, "PSNR, dB": ["psnr"], "SSIM": ["ssim"],
              "fraction of codes used": ["usage"], "perplexity": ["perplexity"]}
    figure = Figure(figsize=(16, 3.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes, (name, columns) in zip(figure.subplots(1, len(panels)), panels.items()):
        for column in columns:
            axes.plot(range(1, len(history) + 1), [row[column] for row in history], ".-", label=column)
        axes.set(title=name, xlabel="epoch", yscale="symlog" if columns == losses else "linear")
        axes.legend(fontsize=7)
        axes.axvline(sum(row["stage"] == 1 for row in history) + 0.5, color="grey", linestyle=":")
    save_figure(path, figure)


# ----------------------------------------
# Files, runs and checkpoints

@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """A temporary path, renamed to `path` once it is written: nobody reads half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises the latter where a disk is full
        raise OSError(f"{path} could not be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


class Run:
    """A run's folders, outputs/<name>/ and checkpoints/<name>/, locked for one process, and progress."""

    def __init__(self, name: str, first_process: bool = True):
        self.name, self.outputs, self.checkpoints = name, Path("outputs", name), Path("checkpoints", name)
        self.finished = (self.outputs / "results.json").exists()
        self.last, self.lock = self.checkpoints / "last.pt", FileLock(self.checkpoints / "lock")
        if first_process and not self.finished:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            try:
                self.lock.acquire(blocking=False)
            except Timeout:
                raise ValueError(f"this run is going on in another process: {self.checkpoints}") from None
            self.inode = os.stat(self.lock.lock_file).st_ino
            for unfinished in (*self.outputs.glob("*.tmp"), *self.checkpoints.glob("*.tmp")):
                unfinished.unlink()
        self.saved = {"run": name, "stage": 0, "epoch": 0, "history": []}
        if self.last.exists():
            self.saved = load_torch(self.last, *self.saved)
            check(self.saved["run"] == name, "run", str(self.last), "the last.pt of this run")
        self.stage, self.epoch, self.history = (self.saved[key] for key in ("stage", "epoch", "history"))

    def resume(self, state: dict, stage: int = 1) -> int:
        """The epoch to begin this stage with. If the run was stopped in it, everything in `state` is loaded."""
        if self.stage != stage:
            return 1
        for name, module in state.items():
            module.load_state_dict(self.saved.pop(name))
        return self.epoch + 1

    def save(self, row: dict, state: dict):
        """Add an epoch's row to metrics.csv, and write what resume needs."""
        kept = os.path.exists(self.lock.lock_file) and os.stat(self.lock.lock_file).st_ino == self.inode
        check(kept, "run", str(self.checkpoints), "a folder that exists until the run ends")
        self.history.append(row)
        with replace_file(self.outputs / "metrics.csv") as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, row, lineterminator="\n")
            writer.writeheader(), writer.writerows(self.history)
        progress = {"run": self.name, "stage": row.get("stage", 1), "epoch": row["epoch"], "history": self.history}
        save_torch(self.last, progress | {name: module.state_dict() for name, module in state.items()})


def save_torch(path: str | Path, content: dict):
    with replace_file(path) as temporary:
        torch.save(content, temporary)


def summarize(error: Exception) -> str:
    """An error's text in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def load_torch(path: str | Path, *keys: str) -> dict:
    """A dict with these keys, of tensors and plain values, from torch.save. ValueError for another file."""
    try:
        with zipfile.ZipFile(path) as archive:
            check(archive.testzip() is None, "checksum", "wrong", "an undamaged file")  # torch looks at none
        content = torch.load(path, map_location="cpu", weights_only=True)
        check(isinstance(content, dict) and content.keys() >= set(keys), "content", type(content), f"a dict of {keys}")
        return content
    except Exception as error:  # zipfile and torch raise many kinds for a broken file
        raise ValueError(f"checkpoint {path} cannot be read: {summarize(error)}") from None


def load_model(path: str | Path, kind: type[nn.Module], **options) -> tuple[nn.Module, dict]:
    """A model of this kind, in eval mode, with a file's config and weights, and the file's content.

    ValueError unless weights fit and are finite. A weight may be a pair: 8-bit numbers, and a scale for each row.
    """
    content = load_torch(path, "config", "model")
    try:
        model = kind(**content["config"], **options)
        weights = {n: w[0] * w[1].float() if isinstance(w, tuple) else w for n, w in content["model"].items()}
        model.load_state_dict(weights)
        check(all(w.isfinite().all() for w in model.state_dict().values()), "weights", "not finite", "finite numbers")
    except Exception as error:  # a wrong config can raise any
        raise ValueError(f"checkpoint {path} does not fit this code: {summarize(error)}") from None
    return model.eval(), content


def save_checkpoint(path: str | Path, model: VQRAE, **metadata):
    """Write a self-describing checkpoint: config, weights, and metadata, such as metrics."""
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    save_torch(path, {"config": model.config, "stage": model.stage, "model": weights, **metadata})


def load_checkpoint(path: str | Path) -> VQRAE:
    """The VQRAE of a checkpoint of train.py, in eval mode, built from its config without any download.

    ValueError for a damaged or different file. Its metadata: load_torch(path).
    """
    model, content = load_model(path, VQRAE, pretrained=False)
    check(content.get("stage") in (1, 2), "checkpoint", str(path), "one of train.py")
    return model.set_stage(content["stage"])
