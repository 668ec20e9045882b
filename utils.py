"""Errors, constants, devices and processes, images and metrics, pictures, files and runs."""
import ast
import contextlib
import csv
import difflib
import hashlib
import json
import math
import os
import re
import sys
import uuid
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

from quantizers import InputError, check, check_range, count_processes, errors_as, sum_of_processes

device = "cuda" if torch.cuda.is_available() else "cpu"  # train.py's DEVICE may choose another


# Errors

@contextlib.contextmanager
def one_line_errors(stopped: str = "stopped"):
    """End a script in one line for wrong input, a failing file, a full GPU, Ctrl-C. Others keep their traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may lack a letter
    script = Path(sys.argv[0]).name
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"{script}: {stopped}")
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        message = str(error).partition(". Tried to")[0]  # torch lists how its memory is used
        if "Original Traceback" in message:  # from a DataLoader's worker, "InputError: ..." at its end
            message = message.strip().splitlines()[-1].partition("Error: ")[2]
        sys.exit(f"{script}: {message}")


# Constants

def read_constants(namespace: dict, arguments: list[str]) -> dict:
    """Replace a script's constants by NAME=value arguments. Returns all of them. -h and --help print their lines.

    A constant is a name in the script's globals(), in capitals, with a plain value. An argument keeps its type, but one
    number may stand for a pair, and a list becomes a tuple. InputError for an unknown name or another type.
    """
    if "-h" in arguments or "--help" in arguments:
        source = Path(namespace["__file__"]).read_text("utf-8")
        print(namespace["__doc__"], *re.findall("(?m)^(?:# .*\n)?[A-Z][A-Z0-9_]* = .*$", source), sep="\n")
        sys.exit()
    in_file = {name: unify(x) for name, x in namespace.items() if name.isupper() and is_plain(x)}
    constants = dict(in_file)
    for argument in arguments:
        name, sign, value = argument.partition("=")
        similar = difflib.get_close_matches(name.upper(), constants) or constants
        check(sign and name in constants, f"argument = {argument!r}, allowed: NAME=value, without spaces or dashes, "
              f"with a NAME such as {', '.join(similar)}")
        old, kind = in_file[name], type(in_file[name])
        if kind is not str:
            with contextlib.suppress(SyntaxError, ValueError, TypeError):  # refused below
                value = ast.literal_eval(value)
        value = unify(value)
        if kind is tuple and len(old) == 2 and not isinstance(value, tuple):
            kind = type(old[0])
        value = float(value) if kind is float and type(value) is int else value
        check(old is None or type(value) is kind, f"{name} = {value!r:.300}, allowed: {kind.__name__}, like {old!r}")
        constants[name] = value
    namespace.update(constants)
    return constants


def is_plain(value: object) -> bool:
    """Whether a value is a number, a text, or a list or dict of such values."""
    with contextlib.suppress(SyntaxError, ValueError):
        return ast.literal_eval(repr(value)) == value
    return False


def unify(value: object) -> object:
    """A list as a tuple, and a text's leading "~" as the home folder."""
    return tuple(value) if isinstance(value, list) else os.path.expanduser(value) if isinstance(value, str) else value


# Devices and processes

def fast_bf16(device: str) -> bool:
    """Whether bf16 is faster than fp32: on most GPUs, AMD's AVX-512 with bf16, and Intel's AMX."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    allowed = torch.backends.cpu.get_cpu_capability() == "AVX512"  # not if ATEN_CPU_CAPABILITY forbids it
    cpu = torch.cpu.get_capabilities() if device.startswith("cpu") and allowed else {}
    return cpu.get("amx_bf16", False) or (cpu.get("avx512_bf16", False) and "Intel" not in cpu.get("cpu_name", ""))


def prepare_cpu():
    """Make arithmetic deterministic and fast, before threads start and models are built."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_flush_denormal(True)  # numbers below 1e-38 are slow
    set_fused_attn(False)  # its backward pass is slow in bf16


@contextlib.contextmanager
def first_process_first():
    """Run the body in the first process, then in the others."""
    rank = dist.get_rank() if count_processes() > 1 else None
    if rank:
        dist.barrier()
    try:
        yield
    finally:
        if rank == 0:
            dist.barrier()


def average(tensors: list[Tensor]):
    """Replace tensors by their means over all processes, which exchange them in one message."""
    if count_processes() > 1:
        means = sum_of_processes(torch.cat([x.flatten() for x in tensors])) / count_processes()
        parts = means.split([x.numel() for x in tensors])
        torch._foreach_copy_(tensors, [part.view(x.shape) for part, x in zip(parts, tensors)])


def progress(iterable: Iterable, text: str) -> tqdm:
    """Show a progress bar in the first process's terminal, unless TQDM_DISABLE=1."""
    hidden = os.getenv("TQDM_DISABLE") or int(os.getenv("RANK", 0)) > 0
    return tqdm(iterable, text, leave=False, disable=hidden or None)  # None hides it from log files


# Images and metrics

def check_images(images: Tensor, values: bool = True) -> Tensor:
    """Images in fp32. InputError unless they are floats (B, 3, H, W) and, if `values`, in [0, 1]."""
    check(isinstance(images, Tensor), f"Images must be a tensor, not {type(images).__name__}.")
    valid = images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point() and images.numel()
    check(valid, f"Images must be floats (B, 3, H, W), not {images.dtype} {tuple(images.shape)}.")
    if values:
        check_range(images, 0, 1, "images")
    return images.float()


def to_float(images: Tensor) -> Tensor:
    """Images (B, 3, H, W), uint8 or in [0, 1] already -> in [0, 1]. InputError for others."""
    whole = images.dtype == torch.uint8
    return check_images(images.float() / 255 if whole else images, values=not whole)


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratios (B,) in dB, at most 100, of images (B, 3, H, W), uint8 or in [0, 1]."""
    check(images.shape == targets.shape, f"PSNR compares equal shapes, not {images.shape} and {targets.shape}.")
    return peak_signal_noise_ratio(to_float(images), to_float(targets), data_range=1.0, dim=(1, 2, 3),
                                   reduction="none").clamp(max=100)


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Structural similarities (B,) in [-1, 1] of images (B, 3, H, W), uint8 or in [0, 1], of 11 x 11 pixels or more."""
    check(images.shape == targets.shape, f"SSIM compares equal shapes, not {images.shape} and {targets.shape}.")
    height, width = images.shape[2:]
    check(min(height, width) > 10, f"SSIM needs images of 11 x 11 pixels or more, not {tuple(images.shape)}.")
    total, rows = 0, max(1, 2**20 // (len(images) * width))  # rows at a time, to bound the memory
    for top in range(0, height - 10, rows):
        strips = [to_float(x[:, :, top : top + rows + 10]) for x in (images, targets)]
        _, maps = structural_similarity_index_measure(*strips, data_range=1.0, reduction="none", return_full_image=True)
        total = total + maps[..., 5:-5, 5:-5].sum((1, 2, 3))  # torchmetrics pads the border
    return total / (3 * (height - 10) * (width - 10))


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, batch_size: int = 250, indices: Tensor | None = None,
             keep: int | None = None) -> tuple[dict, Tensor, Tensor]:
    """Reconstruct uint8 images (N, 3, H, W) with a VQRAE, and measure the result before it is rounded.

    indices: the images' tokens (N, h, w), if known
    keep: how many reconstructions are returned; None: all
    Returns metrics, how often each code was used, and reconstructions, uint8 (keep, 3, H, W). psnr and ssim are means
    over images, psnr_of_mse is of their mean squared error. InputError for other images.
    """
    check(images.dtype == torch.uint8 and len(images), f"Take uint8 images, not {len(images)} of {images.dtype}.")
    training, device = model.training, next(model.parameters()).device
    tokens, figures, reconstructions = [], [], torch.empty_like(images[:keep])
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
        kept = reconstructions[batch]
        kept.copy_((output[: len(kept)] * 255).round())
    model.train(training)
    mean_psnr, mse, mean_ssim = torch.cat(figures, 1).cpu().double().mean(1).tolist()
    counts, usage, perplexity = model.get_codebook_usage(torch.cat(tokens)) if tokens else (torch.zeros(0), 0.0, 0.0)
    metrics = dict(psnr=mean_psnr, psnr_of_mse=-10 * math.log10(max(mse, 1e-10)), ssim=mean_ssim, usage=usage,
                   perplexity=perplexity)
    return metrics, counts, reconstructions


# Pictures

def save_grid(path: Path, images: Tensor, columns: int):
    """Write uint8 images (N, 3, H, W) as a grid, row by row. Small images are enlarged."""
    zoom = max(1, 128 // images.shape[-1])
    with replace_file(path) as draft:
        save_image(nn.Upsample(scale_factor=zoom)(images / 255), draft, format="PNG", nrow=columns, pad_value=1)


def save_pairs(path: Path, images: Tensor, reconstructions: Tensor, columns: int):
    """Write uint8 images (N, 3, H, W) as a grid, and their reconstructions below."""
    columns = min(columns, len(images))
    count = len(images) // columns * columns  # an incomplete last row is left out
    save_grid(path, torch.cat([images[:count], reconstructions[:count]]), columns)


def save_figure(path: Path, figure: Figure):
    """Write a figure as a PNG file."""
    with replace_file(path) as draft:
        figure.savefig(draft, dpi=120, format="png")


def plot_usage(path: Path, counts: Tensor, metrics: dict, title: str):
    """Plot how often each code was used, the most used first, from evaluate's counts and metrics."""
    used = counts[counts > 0].sort(descending=True)[0].cpu()
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.loglog(range(1, len(used) + 1), used)
    axes.axvline(round(len(used) / metrics["usage"]), c="grey", ls=":")  # counts may lack unused codes
    axes.set(xlabel="code, by rank (dotted: the codebook's size)", ylabel="times used")
    summary = f"{metrics['usage']:.1%} of codes used, perplexity {metrics['perplexity']:,.0f}"
    axes.set_title(f"{title}\n{summary}", size=9, parse_math=False)
    save_figure(path, figure)


def plot_curves(path: Path, history: list[dict], title: str):
    """Plot the losses together, and each metric alone, over epochs. Stage 1 ends at the dotted line."""
    losses = [name for name in history[0] if name.endswith("_loss") and any(row[name] for row in history)]
    figure = Figure(figsize=(16, 3.2), layout="constrained")
    figure.suptitle(title, size=10, parse_math=False)
    panels = [losses, ["psnr"], ["ssim"], ["usage"], ["perplexity"]]
    for axes, names in zip(figure.subplots(1, len(panels)), panels):
        for name in names:
            axes.plot(range(1, len(history) + 1), [row[name] for row in history], ".-", label=name)
        axes.set(title="losses, before their weights" if names == losses else names[0], xlabel="epoch")
        axes.axvline(sum(row["stage"] == 1 for row in history) + 0.5, c="grey", ls=":")
        if names == losses:
            axes.set_yscale("symlog", linthresh=1e-3)  # a loss may be 0, a GAN's or LFQ's negative
            axes.legend(fontsize=7)
    save_figure(path, figure)


# Files and runs

def digest(value: object) -> str:
    """A value's hash: twelve hexadecimal digits."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def digest_file(path: str | Path) -> str:
    """The hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def digest_code() -> str:
    """The hash of the repository's code that is running, without comments and the script's constants."""
    root, code = Path(__file__).resolve().parent, []
    files = {Path(x.__file__).resolve() for x in [*sys.modules.values()] if getattr(x, "__file__", None)}
    for file in sorted(x for x in files if x.parent in (root, root / "extras") and x.is_file()):
        text = ast.unparse(ast.parse(file.read_text("utf-8")))
        if file == Path(sys.argv[0]).resolve():  # the run's name depends on them already
            text = re.sub("(?m)^[A-Z0-9_]+ = .*", "", text)
        code.append(text)
    return digest(code)


def seed_everything(*numbers: int):
    """Seed torch with a hash of these numbers."""
    torch.manual_seed(int(digest(numbers), 16))


@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Give a draft's path, and rename it to `path` once written. OSError if that fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.draft")  # no other process writes to it
    try:
        yield draft
        os.replace(draft, path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        draft.unlink(missing_ok=True)


def save_torch(path: str | Path, content: dict):
    """Write what load_torch reads. OSError as in replace_file."""
    with replace_file(path) as draft, errors_as(OSError, "torch.save failed"):  # a full disk is a RuntimeError
        torch.save(content, draft)


def load_torch(path: str | Path, *keys: str) -> dict:
    """A dict with these keys, from torch.save. InputError for another or damaged file."""
    with errors_as(InputError, f"The checkpoint {path} cannot be read"):
        with zipfile.ZipFile(path) as archive:  # torch.load checks no checksum
            check(not archive.testzip(), "its checksum is wrong")
        content = torch.load(path, "cpu", weights_only=True)
        complete = isinstance(content, dict) and content.keys() >= {*keys}
        check(complete, f"it is a file of another kind, without {', '.join(keys)}")
        return content


class Run:
    """A run's folders outputs/<name>/ and checkpoints/<name>/, locked for one process, and its progress.

    stage, epoch: the last that an earlier process finished, 0 without one. history: a row for each finished epoch.
    InputError if another process trains it, or last.pt is damaged or of another run.
    """

    def __init__(self, name: str, first_process: bool = True):
        self.name = name
        self.outputs, self.checkpoints = Path("outputs", name), Path("checkpoints", name)
        self.finished = (self.outputs / "results.json").exists()
        self.last = self.checkpoints / "last.pt"
        self.lock = FileLock(self.checkpoints / "lock")
        if first_process and not self.finished:
            with errors_as(InputError, f"{self.lock.lock_file} is locked: perhaps another process trains this run"):
                self.lock.acquire(blocking=False)
        self.saved = {"run": name, "stage": 0, "epoch": 0, "history": []}
        if self.last.exists() and not self.finished:
            with errors_as(InputError, f"{self.last} does not load. If it is damaged, delete it to begin anew"):
                self.saved = load_torch(self.last, *self.saved.keys())
            check(self.saved["run"] == name, f"{self.last} belongs to the run {self.saved['run']}. Delete it.")
        self.stage, self.epoch, self.history = (self.saved[key] for key in ("stage", "epoch", "history"))

    def resume(self, state: dict, stage: int = 1) -> int:
        """The epoch with which this stage goes on. Loads `state`, {name: module or optimizer}, unless it is 1."""
        if self.stage != stage:
            return 1
        with errors_as(InputError, f"{self.last} does not fit this code. Change SEED to start a new run"):
            for name, module in state.items():
                module.load_state_dict(self.saved[name])
                del self.saved[name]  # frees the memory
        return self.epoch + 1

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

    def finish(self, results: dict):
        """Write results.json, with which the run is finished."""
        with replace_file(self.outputs / "results.json") as draft:
            draft.write_text(json.dumps(results, indent=2), "utf-8")
