"""Constants of the command line, grids and plots, runs and checkpoints."""
import ast
import contextlib
import csv
import difflib
import hashlib
import math
import os
import re
import statistics
import sys
import zipfile
from collections.abc import Iterator
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

from quantizers import check, check_range

device = "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def errors_as(kind: type[Exception], message: str):
    """Any error of the body becomes this kind, in one line: libraries raise many for a bad file."""
    try:
        yield
    except Exception as error:
        raise kind(f"{message}: {' '.join(str(error).split())[:300] or type(error).__name__}") from None


def load_weights(path: str | Path) -> object:
    """What torch.save wrote into a file, on the CPU. An error if a checksum is wrong: torch.load looks at none."""
    with zipfile.ZipFile(path) as archive:
        check(not archive.testzip(), "checksum", "wrong", "an undamaged file")
    return torch.load(path, "cpu", weights_only=True)


def read_constants(namespace: dict, arguments: list[str]) -> dict:
    """Replace constants in `namespace` by NAME=value arguments, and return all; --help prints them.

    A fraction, 1/15, is a number, too. ValueError for an unknown name, a negative number or another type.
    """
    constants = {k: v for k, v in namespace.items() if k.isupper() and isinstance(v, (int, float, str, tuple))}
    if "--help" in arguments:
        print(namespace["__doc__"])
        source = Path(namespace["__file__"]).read_text("utf-8")
        for heading, name, comment in re.findall(r"(?m)^(# .*\n)?([A-Z_]+) = .*?(  # .*)?$", source):
            if name in constants:
                print(f"{heading}{name} = {constants[name]!r}{comment}")
        sys.exit()
    for argument in arguments:
        name, sign, value = argument.partition("=")
        similar = difflib.get_close_matches(name.upper(), constants) or constants
        check(sign and name in constants, "argument", argument, f"NAME=value with a NAME such as {', '.join(similar)}")
        if not isinstance(constants[name], str):
            several = isinstance(constants[name], tuple)
            old = constants[name][0] if several else constants[name]
            with contextlib.suppress(SyntaxError, ValueError, ZeroDivisionError):
                value = re.sub(r"([\d.]+) */ *([\d.]+)", lambda m: str(float(m[1]) / float(m[2])), value)
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
        message = message.rpartition("\nValueError: ")[2].strip()  # without a DataLoader worker's traceback
        sys.exit(f"{Path(sys.argv[0]).name}: {message}")


def digest(value: object) -> str:
    """A value's hash: twelve hexadecimal digits."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def seed_everything(*numbers: int):
    """Seed torch with a hash of these numbers."""
    torch.manual_seed(int(digest(numbers), 16))


# Devices and processes

def fast_bf16(device: str) -> bool:
    """Whether bf16 is faster than fp32. Emulated, it takes up to ten times as long; in Intel's AVX-512, twice."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities() if device == "cpu" else {}
    return cpu.get("amx_bf16", False) or cpu.get("avx512_bf16", False) and "Intel" not in cpu.get("cpu_name", "")


def prepare_cpu():
    """Deterministic arithmetic, and zeros for slow numbers below 1e-38. Call this before threads start.

    Attention of models built from now on is not fused: on a CPU its backward pass is slow in bf16.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_flush_denormal(True)
    set_fused_attn(False)


@contextlib.contextmanager
def first_process_first():
    """The first process runs the body while the others wait; then they do. After an error there, nobody waits."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else None
    if rank:
        dist.barrier()
    yield
    if rank == 0:
        dist.barrier()


def average(tensors: list[Tensor]):
    """Replace each tensor by its mean over all processes."""
    if dist.is_available() and dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()


# Images and metrics

def check_images(images: Tensor, values: bool = True) -> Tensor:
    """images in fp32. ValueError unless they are floating-point numbers (B, 3, H, W) and, if `values`, in [0, 1]."""
    valid = images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point() and images.numel()
    check(valid, "images", (tuple(images.shape), images.dtype), "floating-point numbers of shape (B, 3, H, W)")
    if values:
        check_range(images, 0, 1, "images")
    return images.float()


def to_float(images: Tensor) -> Tensor:
    """Images (B, 3, H, W), uint8 or in [0, 1] already -> in [0, 1]. ValueError for others."""
    return images.float() / 255 if images.dtype == torch.uint8 else check_images(images)


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratios (B,) in dB, 100 at most, of images (B, 3, H, W), uint8 or in [0, 1]."""
    return peak_signal_noise_ratio(to_float(images), to_float(targets), data_range=1.0, dim=(1, 2, 3),
                                   reduction="none").clamp(max=100)


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Structural similarities (B,) in [-1, 1] of images (B, 3, H, W), uint8 or in [0, 1]."""
    check(min(images.shape[2:]) > 10, "images", tuple(images.shape), "11x11 pixels or more")
    _, similarity = structural_similarity_index_measure(to_float(images), to_float(targets), data_range=1.0,
                                                        reduction="none", return_full_image=True)
    return similarity[..., 5:-5, 5:-5].mean((1, 2, 3))  # without torchmetrics' padding


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, batch_size: int = 250,
             indices: Tensor | None = None) -> tuple[dict, Tensor, Tensor]:
    """Reconstruct uint8 images (N, 3, H, W) from their indices (N, h, w), computed unless given.

    Returns metrics, VQRAE.get_codebook_usage's counts, uint8 images (N, 3, H, W). Several codebooks add usage_1, ...
    """
    check(images.dtype == torch.uint8 and len(images), "images", (tuple(images.shape), images.dtype), "N > 0, uint8")
    training, device = model.training, next(model.parameters()).device
    tokens, figures, reconstructions = [], [], []
    try:
        model.eval()
        for start in tqdm(range(0, len(images), batch_size), "measuring", leave=False):
            batch = slice(start, start + batch_size)
            targets = to_float(images[batch].to(device))
            if model.quantizer.codebook_size:
                tokens.append(model.encode_to_indices(targets) if indices is None else indices[batch])
                output = model.decode_from_indices(tokens[-1], size=targets.shape[2:])
            else:
                output = model(targets)[0]
            mse = (output - targets).square().mean((1, 2, 3))
            figures.append(torch.stack([psnr(output, targets), mse, ssim(output, targets)]))
            reconstructions.append((output * 255).round().byte().to(images.device))
    finally:
        model.train(training)
    mean_psnr, mse, mean_ssim = map(statistics.fmean, torch.cat(figures, 1).tolist())
    counts, usage, perplexity = model.get_codebook_usage(torch.cat(tokens)) if tokens else (torch.zeros(0), 0.0, 0.0)
    metrics = dict(psnr=mean_psnr, psnr_of_mse=-10 * math.log10(max(mse, 1e-10)), ssim=mean_ssim, usage=usage,
                   perplexity=perplexity)
    number = len(model.quantizer.codebook_sizes)
    for k in range(number if number > 1 else 0):
        metrics[f"usage_{k + 1}"] = model.get_codebook_usage(torch.cat(tokens), k)[1]
    return metrics, counts, torch.cat(reconstructions)


# Grids and plots

def save_grid(path: Path, images: Tensor, columns: int):
    """Write uint8 images (N, 3, H, W) as a grid, row by row. Small ones are enlarged: a viewer would blur them."""
    zoom = max(1, 128 // images.shape[-1])
    with replace_file(path) as draft:
        save_image(nn.Upsample(scale_factor=zoom)(images / 255), draft, format="PNG", nrow=columns, pad_value=1)


def save_pairs(path: Path, images: Tensor, reconstructions: Tensor, columns: int):
    """As save_grid: each row of images above the row of their reconstructions."""
    count = (len(images) // columns or 1) * columns  # an incomplete row is left out, unless it is the only one
    rows = zip(*(x[:count].split(columns) for x in (images, reconstructions)))
    save_grid(path, torch.cat(sum(rows, ())), min(columns, len(images)))


def save_figure(path: Path, figure: Figure):
    with replace_file(path) as draft:
        figure.savefig(draft, dpi=120, format="png")


def plot_usage(path: Path, counts: Tensor, metrics: dict, title: str):
    """Plot how often each code was used, sorted; counts and metrics: evaluate's."""
    used = counts[counts > 0].sort(descending=True)[0].cpu()
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.loglog(range(1, len(used) + 1), used)
    axes.axvline(round(len(used) / metrics["usage"]), c="grey", ls=":")
    axes.set(xlabel="code, by rank (dotted: the codebook's size)", ylabel="times used")
    axes.set_title(f"{title}\n{metrics['usage']:.1%} of codes used, perplexity {metrics['perplexity']:,.0f}", size=9,
                   parse_math=False)
    save_figure(path, figure)


def plot_curves(path: Path, history: list[dict], title: str):
    """Plot losses together, and each metric alone. Stage 1 ends at the dotted line."""
    losses = [name for name in history[0] if name.endswith("_loss") and any(row[name] for row in history)]
    panels = {"losses, before their weights": losses, "PSNR, dB": ["psnr"], "SSIM": ["ssim"],
              "fraction of codes used": ["usage"], "perplexity": ["perplexity"]}
    figure = Figure(figsize=(16, 3.2), layout="constrained")
    figure.suptitle(title, size=10, parse_math=False)
    for axes, (name, columns) in zip(figure.subplots(1, len(panels)), panels.items()):
        for column in columns:
            axes.plot(range(1, len(history) + 1), [row[column] for row in history], ".-", label=column)
        axes.set(title=name, xlabel="epoch", yscale="symlog" if columns == losses else "linear")
        axes.legend(fontsize=7)
        axes.axvline(sum(row["stage"] == 1 for row in history) + 0.5, c="grey", ls=":")
    save_figure(path, figure)


# Files, runs and checkpoints

@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """The path of a draft, renamed to `path` once written: nobody reads half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield draft
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:  # the latter is torch's on a full disk
        raise OSError(f"{path} could not be written: {error}") from None
    finally:
        draft.unlink(missing_ok=True)


class Run:
    """A run's folders, outputs/<name>/ and checkpoints/<name>/, locked for one process, and progress."""

    def __init__(self, name: str, first_process: bool = True):
        self.name = name
        self.outputs, self.checkpoints = Path("outputs", name), Path("checkpoints", name)
        self.finished = (self.outputs / "results.json").exists()
        self.last = self.checkpoints / "last.pt"
        self.lock = FileLock(self.checkpoints / "lock")
        if first_process and not self.finished:
            with errors_as(ValueError, f"this run goes on in another process, or {self.checkpoints} cannot be locked"):
                self.lock.acquire(blocking=False)
            self.inode = os.stat(self.lock.lock_file).st_ino
            for draft in (*self.outputs.glob("*.tmp"), *self.checkpoints.glob("*.tmp")):
                draft.unlink()
        self.saved = {"run": name, "stage": 0, "epoch": 0, "history": []}
        if self.last.exists():
            self.saved = load_torch(self.last, *self.saved)
            check(self.saved["run"] == name, "run", str(self.last), "this run's last.pt")
        self.stage, self.epoch, self.history = (self.saved[key] for key in ("stage", "epoch", "history"))

    def resume(self, state: dict, stage: int = 1) -> int:
        """The epoch to begin this stage with. If the run was stopped in this stage, `state` is loaded."""
        if self.stage != stage:
            return 1
        with errors_as(ValueError, f"{self.last} does not fit this code, change SEED"):
            for name, module in state.items():
                module.load_state_dict(self.saved.pop(name))
        return self.epoch + 1

    def check_folder(self):
        """ValueError if the folder was removed: it may be another process's by now."""
        kept = os.path.exists(self.lock.lock_file) and os.stat(self.lock.lock_file).st_ino == self.inode
        check(kept, "run", str(self.checkpoints), "a folder that exists until the run ends")

    def save(self, row: dict, state: dict):
        """Add an epoch's row to metrics.csv, and write what resume needs."""
        self.history.append(row)
        with replace_file(self.outputs / "metrics.csv") as draft, draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, row, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.history)
        progress = {"run": self.name, "stage": row.get("stage", 1), "epoch": row["epoch"], "history": self.history}
        save_torch(self.last, progress | {k: v.state_dict() for k, v in state.items()})


def save_torch(path: str | Path, content: dict):
    with replace_file(path) as draft:
        torch.save(content, draft)


def load_torch(path: str | Path, *keys: str) -> dict:
    """A dict with these keys, of tensors and plain values, from torch.save. ValueError for another file."""
    with errors_as(ValueError, f"checkpoint {path} cannot be read"):
        content = load_weights(path)
        check(content.keys() >= set(keys), "content", type(content), f"a dict of {keys}")
        return content
