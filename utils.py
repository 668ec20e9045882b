"""What all modules share: errors, constants, devices and processes, images and metrics, pictures, files and runs."""
import ast
import contextlib
import csv
import difflib
import hashlib
import math
import os
import re
import sys
import time
import types
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock
from matplotlib.figure import Figure
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchvision.utils import save_image
from tqdm import tqdm

from quantizers import InputError, check, check_range, count_processes, errors_as, require, sum_of_processes

device = "cuda" if torch.cuda.is_available() else "cpu"  # train.py's DEVICE may choose another for its run


# Errors

@contextlib.contextmanager
def one_line_errors(stopped: str = "stopped"):
    """End a script in one line where its user can do something: wrong input, a failing file, a full GPU, Ctrl-C.

    Any other error is a mistake in the code, perhaps in the user's own. Its traceback shows the file and the line.
    stopped: the message after Ctrl-C
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a letter that the terminal lacks must not lose a table
    script = Path(sys.argv[0]).name
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"{script}: {stopped}")
    except BrokenPipeError:  # as in `train.py --help | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes there once more when it ends
        sys.exit(1)
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        message = str(error).partition(". Tried to")[0]  # torch lists how its memory is used
        if "Original Traceback" in message:  # a DataLoader's worker sends it, "InputError: ..." at its end
            message = message.strip().splitlines()[-1].partition("Error: ")[2]
        sys.exit(f"{script}: {message}")


# Constants

def read_constants(namespace: dict, arguments: list[str], kinds: dict | None = None) -> dict:
    """Replace a script's constants by NAME=value arguments. Returns all constants; -h and --help print them.

    namespace: the script's globals(). Each name in capitals with a plain value is a constant.
    kinds: {type: "NAME NAME ..."}. A constant that it does not name has the type of its value in the file.
    A "~" at the beginning of a text stands for the home folder.
    Values in the file and on the command line pass the same checks. InputError for an unknown name, for another type,
    and for a negative or infinite number, unless it stands in a dict.
    """
    named = {name: kind for kind, names in (kinds or {}).items() for name in names.split()}
    constants = {name: x for name, x in namespace.items() if name in named or name.isupper() and is_plain(x)}
    kind_of = {name: type(value) for name, value in constants.items()} | named
    for name in named:
        similar = difflib.get_close_matches(name, [other for other in constants if other not in named])
        require(name in constants, f"The constant {name} is missing in the file. Perhaps "
                f"{' or '.join(similar) or 'its line'} is misspelt.")
    if "-h" in arguments or "--help" in arguments:
        print_help(namespace, constants)
        sys.exit()
    for argument in arguments:
        name, sign, text = argument.partition("=")
        similar = difflib.get_close_matches(name.upper(), constants) or constants
        check(sign and name in constants, "argument", argument,
              f"NAME=value, without spaces or dashes, with a NAME such as {', '.join(similar)}")
        constants[name] = text  # a text that is no value stays, and is refused below
        if kind_of[name] is not str:
            with contextlib.suppress(SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
                constants[name] = ast.literal_eval(text)
    for name, value in constants.items():
        value = tuple(value) if isinstance(value, list) else value
        kind = tuple if kind_of[name] in (list, set) else kind_of[name]  # a set is refused, as it has no order
        check(fits(value, kind), name, value, describe(kind))
        if kind is float or float in getattr(kind, "__args__", ()):  # 3 and 3.0 are one run
            value = tuple(map(float, value)) if isinstance(value, tuple) else float(value)
        constants[name] = os.path.expanduser(value) if isinstance(value, str) else value
    namespace.update(constants)
    return constants


def is_plain(value: object) -> bool:
    """Whether a value can be written down in a file: a number, a text, or a list or dict of such values."""
    try:
        return ast.literal_eval(repr(value)) == value
    except (SyntaxError, ValueError):
        return False


def fits(value: object, kind: object) -> bool:
    """Whether a constant's value is of its type, such as int | tuple[int, int]. No number may be negative."""
    if isinstance(kind, types.UnionType):
        return any(fits(value, option) for option in kind.__args__)
    if isinstance(kind, types.GenericAlias):  # tuple[int, int] has two numbers, tuple[int, ...] one or more
        inner, last = kind.__args__
        size = len(value) if isinstance(value, tuple) else 0
        return (size == 2 or last is ... and size > 0) and all(fits(x, inner) for x in value)
    if kind in (int, float):
        return type(value) in {int, kind} and 0 <= value <= sys.float_info.max  # True's type is bool, not int
    return type(value) is kind


def describe(kind: object) -> str:
    """A constant's type in words."""
    if isinstance(kind, types.UnionType):
        return " or ".join(map(describe, kind.__args__))
    if isinstance(kind, types.GenericAlias):
        several = "a tuple such as (1,) or (1, 2)" if kind.__args__[-1] is ... else "a pair"
        return f"{several}, each {describe(kind.__args__[0])}"
    words = {int: "a whole number from 0", float: "a number from 0", bool: "True or False", str: "a text"}
    return words.get(kind, f"a {kind.__name__}")


def print_help(namespace: dict, constants: dict):
    """Print a script's docstring, and its constants with their headings and comments."""
    print(namespace["__doc__"])
    source = Path(namespace["__file__"]).read_text("utf-8")
    # a line with a comment perhaps, then the constant with a comment perhaps
    for heading, name, comment in re.findall(r"(?m)^(# .*\n)?([A-Z][A-Z_0-9]*) = .*?(  # .*)?$", source):
        if name in constants:
            print(f"{heading}{name} = {constants[name]!r}{comment}", flush=True)  # here a closed pipe is still caught


# Devices and processes

def choose_device(name: str) -> str:
    """The device of DEVICE=... on the command line, else `name`, else CUDA's GPU or the CPU."""
    for argument in sys.argv[1:]:
        if argument.startswith("DEVICE="):
            name = argument.removeprefix("DEVICE=")
    return str(name or device)


def fast_bf16(device: str) -> bool:
    """Whether bf16 is faster than fp32. Emulated bf16 takes up to ten times as long, Intel's AVX-512 bf16 twice."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities() if device.startswith("cpu") else {}
    return cpu.get("amx_bf16", False) or (cpu.get("avx512_bf16", False) and "Intel" not in cpu.get("cpu_name", ""))


def prepare_cpu():
    """Make arithmetic deterministic and fast, also in models built from now on. Call it before threads start."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would fill each new tensor with NaN
    torch.set_flush_denormal(True)  # numbers below 1e-38, which are slow, become 0
    set_fused_attn(False)  # the backward pass of fused attention is slow in bf16


@contextlib.contextmanager
def first_process_first():
    """Run the body in the first process, then in the others. If it fails in the first, they try it all the same."""
    several = count_processes() > 1
    if several and dist.get_rank() > 0:
        dist.barrier()
    try:
        yield
    finally:
        if several and dist.get_rank() == 0:
            dist.barrier()


def average(tensors: list[Tensor]):
    """Replace tensors by their means over all processes, which exchange them in one message."""
    if count_processes() > 1:
        means = sum_of_processes(torch.cat([x.flatten() for x in tensors])) / count_processes()
        parts = means.split([x.numel() for x in tensors])
        torch._foreach_copy_(tensors, [part.view(x.shape) for part, x in zip(parts, tensors)])


def check_agreement(name: str, value: object):
    """InputError in all processes unless they have the same value."""
    if count_processes() > 1:
        values = [None] * count_processes()
        dist.all_gather_object(values, value)
        require(len({*values}) == 1, f"Processes do not agree on {name}: {values}. They need a common disk.")


def progress(iterable: Iterable, text: str) -> tqdm:
    """Show a progress bar, but not in a log file, in the other processes of torchrun, or with TQDM_DISABLE=1."""
    hidden = os.getenv("TQDM_DISABLE") or int(os.getenv("RANK", 0)) > 0
    return tqdm(iterable, text, leave=False, disable=hidden or None)  # None hides it unless a terminal shows it


# Images and metrics

def check_images(images: Tensor, values: bool = True) -> Tensor:
    """Images in fp32. InputError unless they are floats (B, 3, H, W) and, if `values`, in [0, 1]."""
    require(isinstance(images, Tensor), f"Images must be a tensor, not {type(images).__name__}.")
    valid = images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point() and images.numel()
    require(valid, f"Images must be floats (B, 3, H, W), not {images.dtype} {tuple(images.shape)}.")
    if values:
        check_range(images, 0, 1, "images")
    return images.float()


def to_float(images: Tensor) -> Tensor:
    """Images (B, 3, H, W), uint8 or in [0, 1] already -> in [0, 1]. InputError for others."""
    whole = images.dtype == torch.uint8
    return check_images(images.float() / 255 if whole else images, values=not whole)


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratios (B,) in dB, at most 100, of images (B, 3, H, W), uint8 or in [0, 1]."""
    require(images.shape == targets.shape, f"PSNR compares equal shapes, not {[*images.shape]} and {[*targets.shape]}.")
    return peak_signal_noise_ratio(to_float(images), to_float(targets), data_range=1.0, dim=(1, 2, 3),
                                   reduction="none").clamp(max=100)


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Structural similarities (B,) in [-1, 1] of images (B, 3, H, W), uint8 or in [0, 1], from 11 x 11 pixels on."""
    require(images.shape == targets.shape, f"SSIM compares equal shapes, not {[*images.shape]} and {[*targets.shape]}.")
    images, targets = to_float(images), to_float(targets)
    count, _, height, width = images.shape
    require(min(height, width) > 10, f"SSIM needs images of 11 x 11 pixels or more, not {tuple(images.shape)}.")
    total, rows = 0, max(1, 2**20 // (count * width))  # so many rows of windows at a time, to bound the memory
    for top in range(0, height - 10, rows):
        strips = [x[:, :, top : top + rows + 10] for x in (images, targets)]
        _, similarity = structural_similarity_index_measure(*strips, data_range=1.0, reduction="none",
                                                            return_full_image=True)
        total = total + similarity[..., 5:-5, 5:-5].sum((1, 2, 3))  # without the border, which torchmetrics pads
    return total / (3 * (height - 10) * (width - 10))


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, batch_size: int = 250,
             indices: Tensor | None = None) -> tuple[dict, Tensor, Tensor]:
    """Reconstruct uint8 images (N, 3, H, W) with a VQRAE, and measure the result.

    indices: the images' tokens (N, h, w), if they are known already
    Returns metrics, how often each code was used, and the reconstructions, uint8 (N, 3, H, W). psnr and ssim are means
    over images, psnr_of_mse is the PSNR of the mean squared error of all images. They are measured before rounding to
    uint8. usage and perplexity are get_codebook_usage's. InputError for other images.
    """
    require(images.dtype == torch.uint8 and len(images), f"Take uint8 images, not {len(images)} of {images.dtype}.")
    training, device = model.training, next(model.parameters()).device
    tokens, figures, reconstructions = [], [], torch.empty_like(images)
    try:
        model.eval()
        for start in progress(range(0, len(images), batch_size), "measuring"):
            batch = slice(start, start + batch_size)
            targets = to_float(images[batch].to(device))
            if model.quantizer.codebook_size:  # not with QUANTIZER=none
                tokens.append(model.encode_to_indices(targets) if indices is None else indices[batch])
                output = model.decode_from_indices(tokens[-1], size=targets.shape[2:])
            else:
                output = model(targets)[0]
            mse = (output - targets).square().mean((1, 2, 3))
            figures.append(torch.stack([psnr(output, targets), mse, ssim(output, targets)]))
            reconstructions[batch] = (output * 255).round().byte()
    finally:
        model.train(training)
    mean_psnr, mse, mean_ssim = torch.cat(figures, 1).cpu().double().mean(1).tolist()
    counts, usage, perplexity = model.get_codebook_usage(torch.cat(tokens)) if tokens else (torch.zeros(0), 0.0, 0.0)
    metrics = dict(psnr=mean_psnr, psnr_of_mse=-10 * math.log10(max(mse, 1e-10)), ssim=mean_ssim, usage=usage,
                   perplexity=perplexity)
    return metrics, counts, reconstructions


# Pictures

def save_grid(path: Path, images: Tensor, columns: int):
    """Write uint8 images (N, 3, H, W) as a grid, row by row. Small images are enlarged, or a viewer would blur them."""
    zoom = max(1, 128 // images.shape[-1])
    with replace_file(path) as draft:
        save_image(nn.Upsample(scale_factor=zoom)(images / 255), draft, format="PNG", nrow=columns, pad_value=1)


def save_pairs(path: Path, images: Tensor, reconstructions: Tensor, columns: int):
    """Write a grid with each row of images above the row of their reconstructions. Both are uint8 (N, 3, H, W)."""
    columns = min(columns, len(images))
    rows = len(images) // columns  # an incomplete last row is left out
    pairs = torch.stack([x[: rows * columns].unflatten(0, (rows, columns)) for x in (images, reconstructions)], 1)
    save_grid(path, pairs.flatten(0, 2), columns)  # pairs (rows, 2, columns, 3, H, W)


def save_figure(path: Path, figure: Figure):
    """Write a figure as a PNG file."""
    with replace_file(path) as draft:
        figure.savefig(draft, dpi=120, format="png")


def plot_usage(path: Path, counts: Tensor, metrics: dict, title: str):
    """Plot how often each code was used, the most used first. evaluate gives counts and metrics."""
    used = counts[counts > 0].sort(descending=True)[0].cpu()
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.loglog(range(1, len(used) + 1), used)
    axes.axvline(round(len(used) / metrics["usage"]), c="grey", ls=":")  # a huge codebook's counts lack unused codes
    axes.set(xlabel="code, by rank (dotted: the codebook's size)", ylabel="times used")
    axes.set_title(f"{title}\n{metrics['usage']:.1%} of codes used, perplexity {metrics['perplexity']:,.0f}", size=9,
                   parse_math=False)
    save_figure(path, figure)


def plot_curves(path: Path, history: list[dict], title: str):
    """Plot the losses together, and each metric alone, over epochs. Stage 1 ends at the dotted line."""
    losses = [name for name in history[0] if name.endswith("_loss") and any(row[name] for row in history)]
    panels = {"losses, before their weights": losses, "PSNR, dB": ["psnr"], "SSIM": ["ssim"],
              "fraction of codes used": ["usage"], "perplexity": ["perplexity"]}
    figure = Figure(figsize=(16, 3.2), layout="constrained")
    figure.suptitle(title, size=10, parse_math=False)
    for axes, (name, columns) in zip(figure.subplots(1, len(panels)), panels.items()):
        for column in columns:
            axes.plot(range(1, len(history) + 1), [row[column] for row in history], ".-", label=column)
        axes.set(title=name, xlabel="epoch")
        if columns == losses:
            axes.set_yscale("symlog", linthresh=1e-3)  # a loss may be 0, a GAN's or LFQ's negative
        axes.legend(fontsize=7)
        axes.axvline(sum(row["stage"] == 1 for row in history) + 0.5, c="grey", ls=":")
    save_figure(path, figure)


# Files and runs

def digest(value: object) -> str:
    """A value's hash: twelve hexadecimal digits."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def digest_file(path: str | Path) -> str:
    """The hash of a file's content, which a copy keeps: twelve hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def seed_everything(*numbers: int):
    """Seed torch with a hash of these numbers."""
    torch.manual_seed(int(digest(numbers), 16))


@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Give a draft's path. Once written, it is renamed to `path`: nobody reads half a file. OSError if this fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield draft
        for wait in (0.1, 0.3, 0.6, 1.0):  # on Windows, a virus scanner may hold a file for a moment
            with contextlib.suppress(PermissionError):
                os.replace(draft, path)
                return
            time.sleep(wait)
        os.replace(draft, path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        draft.unlink(missing_ok=True)


def save_torch(path: str | Path, content: dict):
    """Write what load_torch reads. OSError as in replace_file, InputError for NumPy's numbers, paths or functions."""
    with replace_file(path) as draft:
        with errors_as(OSError, "torch.save failed"):  # a full disk is a RuntimeError
            torch.save(content, draft)
        with errors_as(InputError, f"{path} takes tensors, and numbers and texts of Python, or it could not be loaded"):
            torch.load(draft, "meta", weights_only=True)  # this reads no weights, so it takes milliseconds


def load_torch(path: str | Path, *keys: str) -> dict:
    """A dict of tensors and plain values with these keys, from torch.save. InputError for another or damaged file."""
    with errors_as(InputError, f"The checkpoint {path} cannot be read"):
        with zipfile.ZipFile(path) as archive:  # torch.load checks no checksum
            require(not archive.testzip(), "its checksum is wrong")
        content = torch.load(path, "cpu", weights_only=True)
        complete = isinstance(content, dict) and content.keys() >= {*keys}
        require(complete, f"it is a file of another kind, without {', '.join(keys)}")
        return content


class Run:
    """A run's folders outputs/<name>/ and checkpoints/<name>/, locked for one process, and its progress.

    stage, epoch: the last that an earlier process finished, 0 without one. history: a row for each finished epoch.
    InputError if another process holds the lock, or last.pt is damaged or of another run.
    """

    def __init__(self, name: str, first_process: bool = True):
        self.name = name
        self.outputs, self.checkpoints = Path("outputs", name), Path("checkpoints", name)
        self.finished = (self.outputs / "results.json").exists()
        self.last = self.checkpoints / "last.pt"
        self.lock = FileLock(self.checkpoints / "lock")
        if first_process and not self.finished:
            with errors_as(InputError, f"{self.checkpoints} cannot be locked: perhaps another process trains this run"):
                self.lock.acquire(blocking=False)
            self.inode = os.stat(self.lock.lock_file).st_ino  # check_folder compares it
            for draft in (*self.outputs.glob("*.tmp"), *self.checkpoints.glob("*.tmp")):  # of a killed process
                draft.unlink()
        self.saved = {"run": name, "stage": 0, "epoch": 0, "history": []}
        if self.last.exists() and not self.finished:
            with errors_as(InputError, f"{self.last} does not load. If it is damaged, delete it to begin anew"):
                self.saved = load_torch(self.last, *self.saved.keys())
            require(self.saved["run"] == name, f"{self.last} belongs to the run {self.saved['run']}. Delete it.")
        self.stage, self.epoch, self.history = (self.saved[key] for key in ("stage", "epoch", "history"))

    def resume(self, state: dict, stage: int = 1) -> int:
        """The epoch with which this stage begins. Unless it is 1, loads `state`, {name: module or optimizer}."""
        if self.stage != stage:
            return 1
        with errors_as(InputError, f"{self.last} does not fit this code. Change SEED to start a new run"):
            for name, module in state.items():
                module.load_state_dict(self.saved[name])
                del self.saved[name]  # frees the memory
        return self.epoch + 1

    def check_folder(self):
        """InputError if the folder was removed: by now it may belong to another process."""
        kept = os.path.exists(self.lock.lock_file) and os.stat(self.lock.lock_file).st_ino == self.inode
        require(kept, f"The folder {self.checkpoints} was removed while this run was using it. Nothing more is saved.")

    def save(self, row: dict, state: dict):
        """Add an epoch's row to metrics.csv, and write what resume needs."""
        self.history.append(row)
        with replace_file(self.outputs / "metrics.csv") as draft, draft.open("w", newline="", encoding="utf-8") as file:
            names = dict.fromkeys(name for old in self.history for name in old)  # rows may have different figures
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.history)
        content = {"run": self.name, "stage": row.get("stage", 1), "epoch": row["epoch"], "history": self.history}
        save_torch(self.last, content | {name: module.state_dict() for name, module in state.items()})
