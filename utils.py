"""Constants, datasets, cached features, metrics, plots and checkpoints."""
import ast
import csv
import difflib
import hashlib
import io
import math
import os
import random
import socket
import sys
import zipfile
from collections.abc import Iterable
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision import datasets
from torchvision.models import VGG16_Weights
from torchvision.utils import make_grid
from tqdm import tqdm

import shapes
from models import VQRAE, Conv, reachable
from quantizers import Quantizer, check

# ---------------------------------------------------------------------------------------------------------------------
# Constants


def read_constants(namespace: dict, arguments: list[str] | None = None) -> dict:
    """Replace constants in `namespace` by NAME=value arguments (None: the command line's) and return all constants.

    `python train.py QUANTIZER=simvq BATCH_SIZE=64` does what editing the two lines would. Values are Python literals;
    anything else is a string. Raises ValueError for an unknown name.
    """
    types = int | float | str | tuple | list | None
    constants = {name: value for name, value in namespace.items() if name.isupper() and isinstance(value, types)}
    for argument in sys.argv[1:] if arguments is None else arguments:
        name, sign, text = argument.partition("=")
        similar = ", ".join(difflib.get_close_matches(name.upper(), constants, n=3))
        check(sign and name in constants, "argument", argument,
              "NAME=value" + (f" with a NAME such as {similar}" if similar else ""))
        try:
            constants[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            constants[name] = text
    namespace.update(constants)
    return constants


def digest(constants: dict) -> str:
    """The first six hexadecimal digits of a hash of the constants."""
    return hashlib.sha256(repr(sorted(constants.items())).encode()).hexdigest()[:6]


def seed_everything(*numbers: int):
    """Seed Python, NumPy and torch with a hash of these numbers."""
    seed = int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# Datasets: one uint8 tensor for each split, batched by indexing


class Dataset(NamedTuple):
    """A dataset in memory. Labels are None where a folder has no classes."""

    name: str  # part of every run's name, so that runs on different datasets have different outputs
    train_images: Tensor  # (N, 3, H, W) uint8
    train_labels: Tensor | None  # (N,) int64
    test_images: Tensor
    test_labels: Tensor | None
    classes: list[str]


DATASETS = {"auto": "CIFAR-10 or else shapes", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "shapes": "drawn here"}


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


def load_cifar(name: str, image_size: int, data_dir: str) -> Dataset:
    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        train = source(data_dir, train=True)  # verifies the files' checksums
    except RuntimeError:
        if not reachable(source.url):
            raise RuntimeError(f"{name} is not in {data_dir}/ and {source.url} cannot be reached") from None
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(15)  # torchvision sets no time-out: a stalled download would never end
        try:
            train = source(data_dir, train=True, download=True)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(f"{name} could not be downloaded from {source.url} ({error})") from None
        finally:
            socket.setdefaulttimeout(timeout)
    test = source(data_dir, train=False)
    images = [torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous() for split in (train, test)]
    if image_size != 32:
        images = [torch.cat([F.interpolate(batch.float(), image_size, mode="bicubic", antialias=True)
                             .round().clamp(0, 255).byte() for batch in split.split(1000)]) for split in images]
    return Dataset(name, images[0], torch.tensor(train.targets), images[1], torch.tensor(test.targets), train.classes)


def load_folder(path: Path, image_size: int, data_dir: str) -> Dataset:
    """Read path/train and path/test, each with one folder per class or with images alone.

    Images are converted to RGB, resized, cropped at the centre and shuffled with a fixed seed: the first thousand are a
    fair sample. Files that cannot be read are named and skipped. Each split is decoded once, into a file in data_dir
    that later runs map into memory, so that a dataset may be larger than memory.
    Raises ValueError where a split has no readable image, or the splits' classes differ.
    """
    path = path.resolve()
    name = f"folder-{path.name}"
    path_digest = hashlib.sha256(str(path).encode()).hexdigest()[:6]  # tells apart folders of the same name
    splits, classes = [], None
    for split in ("train", "test"):
        root = path / split
        files = (Path(folder, file) for folder, _, names in os.walk(root, followlinks=True) for file in names)
        files = sorted(f for f in files if f.suffix.lower() in Image.registered_extensions() and f.is_file())
        random.Random(0).shuffle(files)
        class_of = [f.relative_to(root).parts[0] if f.parent != root else None for f in files]
        split_classes = sorted(set(class_of) - {None})
        check(classes in (None, split_classes), "DATASET", str(path),
              f"the same class folders in train/ and test/, not {classes} and {split_classes}")
        classes = split_classes
        check(not classes or None not in class_of, "DATASET", str(path), f"{root}: all in class folders, or none")
        images, readable = decode_files(files, image_size, Path(data_dir), f"{name}_{split}_{image_size}_{path_digest}")
        check(len(images), "DATASET", str(path), f"images in {root}, but none there can be read")
        splits += [images, torch.tensor([classes.index(label) for label in class_of])[readable] if classes else None]
    return Dataset(name, *splits, classes)


def decode_files(files: list[Path], image_size: int, data_dir: Path, name: str) -> tuple[Tensor, Tensor]:
    """Images (n, 3, image_size, image_size) uint8, mapped from a file in data_dir; which of `files` they are (N,) bool.

    The file is made unless it exists for the same paths, sizes and times of change. It holds the images, one after the
    other, then a byte for each of `files` that says whether it could be read.
    """
    def decode(file: Path) -> bytes:
        try:
            with Image.open(file) as image:
                image = ImageOps.exif_transpose(image).convert("RGB")
            image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
            return np.asarray(image).transpose(2, 0, 1).tobytes()
        except Exception as error:  # Pillow raises nearly anything for a broken file
            tqdm.write(f"skipping {file}: {error}")
            return b""

    state = ["EXIF", *((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)]  # how it is decoded, and what
    decoded = data_dir / f"{name}_{hashlib.sha256(repr(state).encode()).hexdigest()[:12]}.uint8"
    if not decoded.exists():
        for outdated in data_dir.glob(f"{name}_*.uint8"):  # made before the folder changed
            outdated.unlink(missing_ok=True)  # another process may delete it at the same time
        readable = bytearray()
        with open_atomically(decoded, f".{os.getpid()}.tmp") as output, ThreadPool() as pool:
            for start in tqdm(range(0, len(files), 1024), f"decoding {name}", unit=" batches", leave=False):
                decoded_images = pool.map(decode, files[start : start + 1024])  # not all files at once, for memory
                output.writelines(decoded_images)
                readable.extend(map(bool, decoded_images))
            output.write(readable)
    size = decoded.stat().st_size
    mapped = torch.from_file(str(decoded), shared=False, size=size, dtype=torch.uint8) if size else torch.ByteTensor()
    images, readable = mapped.split([size - len(files), len(files)])
    if not readable.all():
        print(f"{name}: {(readable == 0).sum()} of {len(files)} files could not be read and were skipped")
    return images.view(-1, 3, image_size, image_size), readable.bool()


def draw_shapes(image_size: int, train: int = 50_000, test: int = 10_000, seed: int = 0) -> Dataset:
    """Drawn images of the ten kinds in shapes.py, image_size pixels a side."""
    check(image_size >= 1, "image_size", image_size, "1 or more")
    images, labels = shapes.draw(train + test, image_size, seed)
    return Dataset("shapes", images[:train], labels[:train], images[train:], labels[train:], shapes.SHAPES)


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


# ---------------------------------------------------------------------------------------------------------------------
# Cached features


class FeatureCache:
    """A frozen encoder's features of the training images, and of mirrored ones as in select_images, on its own device.

    fill() computes those of an epoch that are not there yet; [] looks a batch up. In bf16 under autocast or in fp32, as
    the training around it. Above limit_gb nothing is kept, and [] computes each batch.
    """

    def __init__(self, encoder: nn.Module, images: Tensor, limit_gb: float, dtype: torch.dtype, flip: bool = False):
        self.encoder, self.images, self.dtype = encoder, images, dtype
        self.device = next(encoder.parameters()).device
        count = len(images) * (2 if flip else 1)
        self.gigabytes = count * encoder.dim * encoder.grid**2 * dtype.itemsize / 1e9
        self.kept = None
        if self.gigabytes <= limit_gb:
            self.kept = torch.empty((count, encoder.grid, encoder.grid, encoder.dim), dtype=dtype, device=self.device)
            self.missing = torch.ones(count, dtype=torch.bool)  # on the host, where looking at it costs nothing

    def fill(self, batches: Tensor):
        """batches (n, B), on the CPU: compute the features of each batch that has a missing image.

        A whole batch at a time: a resumed run, which has none of them, then computes the same numbers.
        """
        if self.kept is None:
            return
        for index in tqdm([index for index in batches if self.missing[index].any()], "encoding", leave=False):
            features = self.compute(index.to(self.images.device))
            self.kept[index.to(self.device)] = features.permute(0, 2, 3, 1)
            self.missing[index] = False

    def __getitem__(self, index: Tensor) -> Tensor:
        """index (B,), on the images' device -> features (B, C, h, w), fp32"""
        if self.kept is None:
            return self.compute(index).float()
        return self.kept[index.to(self.device)].float().permute(0, 3, 1, 2)

    @torch.no_grad()
    def compute(self, index: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.encoder(to_float(select_images(self.images, index).to(self.device))).to(self.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Optimization


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024): a matrix's update is its momentum U S V^T with all singular values set to about 1,
    U V^T, so that rare directions move as much as common ones, scaled to the RMS of AdamW's updates (2502.16982).

    Computes what torch.optim.Muon(adjust_lr_fn="match_rms_adamw") does, but for many matrices in few kernel launches:
    on a GPU it is these that small matrices take time for.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            if not matrices:
                continue
            gradients = [p.grad for p in matrices]
            for p in matrices:
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in matrices]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
            orthogonalize(updates, pad=updates[0].is_cuda)  # a CPU's time goes to arithmetic: padding would only cost
            torch._foreach_mul_(updates, [-group["lr"] * 0.2 * math.sqrt(max(p.shape)) for p in matrices])
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, updates)


def orthogonalize(matrices: list[Tensor], pad: bool):
    """Make matrices nearly orthogonal, in place: five Newton-Schulz steps in bf16 take all singular values towards 1.

    Matrices of one shape are computed together; with `pad` those of similar ones, too, with zeros, which stay zeros.
    """
    stacks = {}
    for matrix in matrices:
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
        key = (len(wide) - 1).bit_length() if pad else wide.shape  # up to the next power of two
        stacks.setdefault(key, []).append(wide)
    for stack in stacks.values():
        rows, columns = (max(matrix.shape[side] for matrix in stack) for side in (0, 1))
        x = torch.zeros(len(stack), rows, columns, dtype=torch.bfloat16, device=stack[0].device)
        torch._foreach_copy_([padded[: len(matrix), : matrix.shape[1]] for padded, matrix in zip(x, stack)], stack)
        x.div_(x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7))
        for _ in range(5):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
        torch._foreach_copy_(stack, [padded[: len(matrix), : matrix.shape[1]] for padded, matrix in zip(x, stack)])


class ToBF16(torch.autograd.Function):
    """fp32 tensors to bf16 in few kernel launches, and their gradients back to fp32."""

    @staticmethod
    def forward(ctx, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        copies = [torch.empty_like(tensor, dtype=torch.bfloat16) for tensor in tensors]
        torch._foreach_copy_(copies, tensors)
        return tuple(copies)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [gradient for gradient in gradients if gradient is not None]
        copies = [torch.empty_like(gradient, dtype=torch.float32) for gradient in given]
        torch._foreach_copy_(copies, given)
        copies = iter(copies)
        return tuple(None if gradient is None else next(copies) for gradient in gradients)


def autocast_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers of a module, by name, whose weights autocast casts to bf16: all convolutions and linear layers but
    the quantizer's own."""
    quantizers = tuple(f"{name}." for name, part in module.named_modules() if isinstance(part, Quantizer))
    return {name: part for name, part in module.named_modules()
            if isinstance(part, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, Conv)) and not name.startswith(quantizers)}


class BF16Weights(nn.Module):
    """A module called with its layers' weights in bf16, cast all at once: autocast casts each by itself, two kernel
    launches for each weight and step. The results are the same, and gradients arrive at the fp32 weights (together, at
    the end of the backward pass: of several GPUs, DistributedDataParallel then sends them all at once).

    Layers named `head` are left to autocast: one node of autograd's graph casts all others, so that the gradient of one
    of them alone, as the adaptive weight of a GAN asks for the head's, would go through the whole network.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.names = [f"{name}.{kind}" for name, layer in autocast_layers(module).items() if not name.endswith(".head")
                      for kind, weight in layer.named_parameters() if weight.requires_grad]

    def forward(self, *arguments):
        weights = ToBF16.apply(*map(self.module.get_parameter, self.names))
        return torch.func.functional_call(self.module, dict(zip(self.names, weights)), arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image (B,), in dB; both (B, 3, H, W), clamped to [0, 1]. At most 100: one
    image without any error would make the mean infinite."""
    check(images.shape == targets.shape, "images", tuple(images.shape), f"the targets' shape {tuple(targets.shape)}")
    return peak_signal_noise_ratio(images.clamp(0, 1), targets.clamp(0, 1), data_range=1.0, dim=(1, 2, 3),
                                   reduction="none").clamp(max=100)


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Structural similarity of each image (B,), in [-1, 1]; both (B, 3, H, W), clamped to [0, 1].

    The mean over Gaussian windows of 11x11 pixels within the image, as the original SSIM; torchmetrics' own mean
    includes padded ones.
    """
    check(images.shape == targets.shape, "images", tuple(images.shape), f"the targets' shape {tuple(targets.shape)}")
    check(min(images.shape[-2:]) > 10, "images", tuple(images.shape), "images of 11x11 pixels or more")
    _, similarity = structural_similarity_index_measure(images.clamp(0, 1), targets.clamp(0, 1), data_range=1.0,
                                                        reduction="none", return_full_image=True)
    return similarity[..., 5:-5, 5:-5].mean((1, 2, 3))


@torch.no_grad()
def evaluate(model: VQRAE, images: Tensor, batch_size: int = 250, indices: Tensor | None = None) -> tuple:
    """Reconstruct uint8 images (N, 3, H, W) from their tokens: indices (N, h, w), computed unless given.

    Returns the metrics (psnr in dB, ssim, usage in [0, 1], perplexity; the last two 0 without a quantizer, and with
    several codebooks also usage_1, perplexity_1, ... of each), how often each code was used (codebook_size,; see
    VQRAE.get_codebook_usage), and the reconstructions (N, 3, H, W), uint8.
    """
    check(images.dtype == torch.uint8 and len(images) > 0, "images", f"{tuple(images.shape)} {images.dtype}",
          "at least one image, uint8")
    was_training = model.training
    model.eval()
    device = model.feature_mean.device
    sums, tokens, reconstructions = torch.zeros(2, device=device), [], []
    for i, batch in enumerate(tqdm(images.split(batch_size), "measuring", leave=False)):
        targets = to_float(batch.to(device))
        if model.quantizer.codebook_size:
            tokens += [model.encode_to_indices(targets) if indices is None else indices[i * batch_size :][:batch_size]]
            output = model.decode_from_indices(tokens[-1]).float()
        else:
            output = model(targets)[0].float()
        sums += torch.stack([psnr(output, targets).sum(), ssim(output, targets).sum()])
        reconstructions.append((output * 255).round().byte().to(images.device))
    counts, usage, perplexity = model.get_codebook_usage(torch.cat(tokens)) if tokens else (torch.zeros(0), 0.0, 0.0)
    metrics = dict(zip(("psnr", "ssim"), (sums / len(images)).tolist())) | {"usage": usage, "perplexity": perplexity}
    codebooks = len(model.quantizer.codebook_sizes)
    for i in range(codebooks if codebooks > 1 else 0):
        _, metrics[f"usage_{i + 1}"], metrics[f"perplexity_{i + 1}"] = model.get_codebook_usage(torch.cat(tokens), i)
    model.train(was_training)
    return metrics, counts, torch.cat(reconstructions)


def load_lpips() -> nn.Module:
    """LPIPS (1801.03924) on VGG16: called with two batches (B, 3, H, W) in [0, 1] and normalize=True, it gives the
    distance of each pair. RuntimeError where torchvision's VGG16 is not on disk and cannot be downloaded."""
    weights = VGG16_Weights.IMAGENET1K_V1.url
    if not Path(torch.hub.get_dir(), "checkpoints", Path(weights).name).exists() and not reachable(weights):
        raise RuntimeError(f'LPIPS needs {weights}, which cannot be reached; PERCEPTUAL = "encoder" needs no download')
    try:
        return LearnedPerceptualImagePatchSimilarity("vgg").net
    except OSError as error:
        raise RuntimeError(f"LPIPS needs {weights}, which could not be downloaded ({error})") from None


def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, steps: int = 100) -> float:
    """Test accuracy in [0, 1] of logistic regression on standardised features x (N, C) with labels y (N,). A test label
    without training images counts as an error. With one training image or class, every test image is assigned to it."""
    for x, y, name in ((train_x, train_y, "train_x"), (test_x, test_y, "test_x")):
        check(x.ndim == 2 and len(x) == len(y) > 0 and x.shape[1] == train_x.shape[1], name, tuple(x.shape),
              "(N, C) with a label each, N at least 1")
    mean, std = train_x.mean(0), train_x.std(0, correction=min(1, len(train_x) - 1)) + 1e-6  # one image: 0, not NaN
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    probe = nn.Linear(train_x.shape[1], int(train_y.max()) + 1, device=train_x.device)
    nn.init.zeros_(probe.weight), nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(train_x), train_y) + 1e-4 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (probe(test_x).argmax(1) == test_y).float().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Grids and plots


def save_grid(path: Path, originals: Tensor, reconstructions: Tensor, columns: int):
    """Write a grid of uint8 images (N, 3, H, W): originals in the upper half, their reconstructions below.

    An incomplete last row is left out. Small images are enlarged, each pixel to a square: a viewer would blur them.
    """
    count = min(len(originals), len(reconstructions))
    check(count > 0 and originals.shape[1:] == reconstructions.shape[1:], "originals and reconstructions",
          (tuple(originals.shape), tuple(reconstructions.shape)), "images of one size, at least one")
    columns = min(columns, count)
    count -= count % columns
    zoom = max(1, 128 // originals.shape[-1])
    images = torch.cat([originals[:count], reconstructions[:count]]).cpu()
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    grid = make_grid(images, nrow=columns, padding=2, pad_value=255)
    with open_atomically(path) as file:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(file, "PNG")


def save_figure(path: Path, figure: Figure):
    with open_atomically(path) as file:
        figure.savefig(file, dpi=120)


def plot_usage(path: Path, counts: Tensor, metrics: dict, title: str):
    """Plot how often each code was used, sorted, on logarithmic axes; counts and metrics as evaluate returns them."""
    used = counts[counts > 0].sort(descending=True).values.cpu()
    figure = Figure(figsize=(6, 4))
    axes = figure.add_axes((0.16, 0.12, 0.81, 0.75))
    axes.loglog(range(1, len(used) + 1), used)
    size = round(len(used) / metrics["usage"])  # counts may be of used codes alone
    axes.axvline(size, color="grey", linestyle=":", label=f"codebook size {size:,}")
    axes.set(xlabel="code, by rank", ylabel="times used")
    each = "; ".join(f"{value:,.0f}" for name, value in metrics.items() if name.startswith("perplexity_"))
    title += f"\n{metrics['usage']:.1%} of codes used, perplexity {metrics['perplexity']:,.0f}"
    axes.set_title(title + (f", of each codebook {each}" if each else ""), size=9)
    axes.legend()
    save_figure(path, figure)


def plot_curves(path: Path, history: list[dict], losses: Iterable[str], metrics: Iterable[str], title: str):
    """Plot columns of metrics.csv over the epochs: the losses together, unless they are zero throughout, each metric by
    itself. A dotted line is where stage 2 begins."""
    figure = Figure(figsize=(14, 3.2))
    figure.suptitle(title, x=0.04, y=0.99, ha="left", fontsize=10)
    # fixed margins: an automatic layout would take most of the time, after each epoch
    panels = figure.subplots(1, 1 + len(metrics), width_ratios=[1.3] + [1] * len(metrics),
                             gridspec_kw={"left": 0.17, "right": 0.99, "bottom": 0.15, "top": 0.85, "wspace": 0.3})
    epochs = range(1, len(history) + 1)
    for name in losses:
        if any(row[name] for row in history):
            panels[0].semilogy(epochs, [row[name] or math.nan for row in history], ".-", label=name)
    panels[0].legend(fontsize=8, loc="upper right", bbox_to_anchor=(-0.2, 1))
    panels[0].minorticks_off()
    panels[0].set_title("losses", fontsize=10)
    for axes, name in zip(panels[1:], metrics):
        axes.plot(epochs, [row[name] for row in history], ".-")
        axes.set_title(name, fontsize=10)
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if {row["stage"] for row in history} == {1, 2}:
            axes.axvline(sum(row["stage"] == 1 for row in history) + 0.5, color="grey", linestyle=":")
    save_figure(path, figure)


# ---------------------------------------------------------------------------------------------------------------------
# Files and checkpoints


@contextmanager
def open_atomically(path: Path, suffix: str = ".tmp"):
    """Open a file for writing that gets its name when it is complete: no reader and no killed run has half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + suffix)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # that of a full disk does not name the file
        raise OSError(error.errno, f"{error.strerror or error}", str(path)) from None
    finally:  # after an error or Ctrl-C, what was written may be large
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes):
    with open_atomically(path) as file:
        file.write(content)


def write_csv(path: Path, rows: list[dict]):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


def save_torch(path: Path, content: dict):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getbuffer())


def load_torch(path: str | Path) -> dict:
    """Load a file written by torch.save, tensors and plain values alone. ValueError where it is broken or missing."""
    check(Path(path).is_file(), "checkpoint", str(path), "an existing file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # verifies the checksums, which torch.load does not
        if damaged is not None:
            raise ValueError(f"{damaged} in it is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, zlib and pickle raise many kinds for a broken file
        raise ValueError(f"checkpoint {path} cannot be read: " + str(error).split("\n")[0]) from None


def save_checkpoint(path: Path, model: VQRAE, **metadata):
    """Write a self-describing checkpoint: the model's config and weights, and `metadata`, such as its metrics."""
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    save_torch(path, {"config": model.config, "stage": model.stage, "model": weights, **metadata})


def load_checkpoint(path: str | Path) -> VQRAE:
    """The VQRAE of a checkpoint written by train.py, in eval mode, built from its own config and without any download.

    Raises ValueError for a file that is broken or no such checkpoint. Metadata (metrics, constants): load_torch(path).
    """
    content = load_torch(path)
    check(isinstance(content, dict) and {"config", "stage", "model"} <= content.keys(), "checkpoint", str(path),
          "a checkpoint of train.py's, fsq_stage2_best.pt or the like")
    try:
        model = VQRAE(**content["config"], pretrained=False)
        model.load_state_dict(content["model"])
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"checkpoint {path} does not fit this code: {str(error).splitlines()[0]}") from None
    return model.set_stage(content["stage"]).eval()
