"""Constants of the command line, grids and plots, runs and checkpoints."""
import ast
import contextlib
import csv
import difflib
import hashlib
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.utils import save_image

from models import VQRAE, errors_as, load_weights
from quantizers import check


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


def load_model(path: str | Path, kind: type[nn.Module], **options) -> tuple[nn.Module, dict]:
    """A model of this kind, in eval mode, with a file's config and weights, and the file's content.

    ValueError unless weights fit and are finite. A weight may be a pair: 8-bit numbers and a scale for each row.
    """
    content = load_torch(path, "config", "model")
    with errors_as(ValueError, f"checkpoint {path} does not fit this code"):
        if content["config"].get("quantizer") == "simvq" and "quantizer.moments" not in content["model"]:
            content["config"]["quantizer_options"].setdefault("transform", "cosine")  # a file of older code
        model = kind(**content["config"], **options)
        model.load_state_dict({n: w[0] * w[1].float() if type(w) is tuple else w for n, w in content["model"].items()})
        check(all(w.isfinite().all() for w in model.state_dict().values()), "weights", "not finite", "finite numbers")
    return model.eval(), content


def save_checkpoint(path: str | Path, model: VQRAE, **metadata):
    """Write a self-describing checkpoint: config, weights and metadata such as metrics."""
    model = next(m for m in model.modules() if isinstance(m, VQRAE))  # in DDP or torch.compile
    quantizer = getattr(model.quantizer, "config", None)
    check(quantizer, "model.quantizer", type(model.quantizer).__name__, "one made by build_quantizer")
    weights = {name.replace("_orig_mod.", ""): w.cpu() for name, w in model.state_dict().items()}
    save_torch(path, {"config": model.config | quantizer, "stage": model.stage, "model": weights, **metadata})


def load_checkpoint(path: str | Path) -> VQRAE:
    """The VQRAE of a checkpoint of train.py, in eval mode, built from its config without a download.

    ValueError for a damaged or different file. Its metadata: load_torch(path).
    """
    model, content = load_model(path, VQRAE, pretrained=False)
    check(content.get("stage") in (1, 2), "checkpoint", str(path), "one of train.py")
    return model.set_stage(content["stage"])
