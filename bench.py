"""Time and memory of what this repository claims to be fast, against the ordinary way to do it.

    python bench.py                             everything, ten minutes on two cores; on a GPU, with a run of train.py
    python bench.py "BENCHMARKS=('search',)"    one or some of them
    python bench.py "BENCHMARKS=('race',)"      time to quality, which takes hours and is not among the above

Each line of the first four runs two things in turn, ROUNDS times, and prints the medians of their times and of their
ratio, with its range. On a GPU, DINOv2 is measured, too, with random weights, which makes no difference here.
"""
import contextlib
import csv
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from errors import one_line_errors
from itertools import accumulate
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler logs that it starts and stops

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor
from vector_quantize_pytorch import SimVQ as LibrarySimVQ
from vector_quantize_pytorch import VectorQuantize

from models import VQRAE
from optimization import BF16Weights
from quantizers import EMAVQ, Quantizer, SimVQ, check, fast_bf16
from utils import FeatureCache, draw_shapes, evaluate, load_dataset, read_constants, to_float

BENCHMARKS = ("training", "utilisation", "search", "tokenizing", "start", "scaling", "run")  # and "race": see below
ROUNDS = 5
BATCH_SIZE = 64
BATCHES = 4  # of training, in each timing
CODEBOOKS = ((16384, 1536), (8192, 768), (1024, 64), (16384, 8))  # size and code dim, for the search
TOKENS = 8192  # of the search, as one image and as 32
DATASET = "cifar10"  # of start, run and race
SCALING_DATASET = "shapes"  # of scaling: has as many training images as the largest of SCALING
SCALING = (5_000, 15_000, 50_000)  # images in an epoch
GOALS = (26, 27, 28)  # of race: PSNR in dB on all test images
RACE_IMAGES = (3_000, 6_000, 10_000, 20_000, 40_000, 60_000, 100_000)  # training images of a run, ascending
RACE_SEEDS = 3
RACE_SECONDS = 900  # no longer runs after one that took longer
RACE = {"train.py, EMA-VQ of 65,536 codes": "",
        "ordinary loop, the library's VQ of 8,192": None,  # ordinary_loop below; its search takes 30 s a step in 65,536
        "CNN from scratch, FSQ, 16 tokens": "ENCODER=cnn QUANTIZER=fsq GRID=4 ADAPTER_DEPTH=0 POST_QUANT_KERNEL=0 "
                                            "BATCH_SIZE=128 LEARNING_RATE=(3e-4,3e-4)"}  # of 256 bits an image in all
device = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parent


def seconds(run: Callable[[], object]) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(run: Callable[[], object]) -> float:
    """MB of tensors that a warm run allocates at its peak. It must free nothing that was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = (event.nbytes() for event in events if event.name() == "[memory]")  # negative where memory is freed
    return max(accumulate(changes, initial=0)) / 1e6


def print_heading(title: str, first: str, second: str, memory: bool = False):
    print(f"\n{title:52} {first:>10} {second:>10} {'ratio':>6} {'range':>12}" + "     peak memory" * memory)


def compare(name: str, first: Callable[[], object], second: Callable[[], object], memory: bool = False):
    first(), second()  # warm-up
    times = [(seconds(first), seconds(second)) for _ in range(ROUNDS)]
    ratios = [a / b for a, b in times]
    milliseconds = [f"{statistics.median(column) * 1000:7.1f} ms" for column in zip(*times)]
    ratio_range = f"{min(ratios):.2f}-{max(ratios):.2f}"
    line = f"{name:52} {' '.join(milliseconds)} {statistics.median(ratios):6.2f} {ratio_range:>12}"
    if memory:
        line += f"  {peak_memory(first):5.0f} to {peak_memory(second):.0f} MB"
    print(line, flush=True)


def build_training(precision: str, stage: int, encoder: str = "cifar", image_size: int = 32,
                   grid: int = 8) -> tuple[nn.Module, Callable[[Tensor, Tensor], None]]:
    """The frozen encoder, and train.py's step(images, features) with all of its losses but the GAN's."""
    import train

    train.PRECISION, train.ENCODER, train.IMAGE_SIZE, train.GRID = precision, encoder, image_size, grid
    model = train.build_model(pretrained=encoder == "cifar")  # others' weights stay random
    teacher = train.build_teacher(model)
    objective = train.Objective(stage, model.set_stage(stage).train(), teacher, None)
    objective = BF16Weights(objective) if precision == "bf16" else objective
    optimizers = train.build_optimizers(model, 1e-5)

    def step(images: Tensor, z: Tensor):
        train.PRECISION = precision
        losses, _ = objective(images, z, None)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    return teacher, step


def training():
    """Stage 1 with ImageFolder, DataLoader, fp32 and the encoder in each step, against train.py's way."""
    precision = "bf16" if fast_bf16(device) else "fp32"
    print_heading("stage 1", "ordinary", "ours")
    count = BATCH_SIZE * BATCHES
    data = draw_shapes(32, train=count, test=10)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "shapes").mkdir()
        for i, image in enumerate(data.train_images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(Path(folder, "shapes", f"{i}.png"))
        loader = DataLoader(ImageFolder(folder, ToTensor()), BATCH_SIZE, True, num_workers=2, persistent_workers=True)
        data = data._replace(train_images=data.train_images.to(device))
        for encoder in ("cifar", "dinov2_s") if device == "cuda" else ("cifar",):
            fp32_teacher, fp32_step = build_training("fp32", 1, encoder)
            teacher, step = build_training(precision, 1, encoder)
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            features = FeatureCache(teacher, data, device, 4.0, dtype)
            features.fill(torch.arange(count).view(-1, BATCH_SIZE))

            def ordinary():
                for batch, _ in loader:
                    batch = batch.to(device)
                    with torch.no_grad():
                        z = fp32_teacher(batch)
                    fp32_step(batch, z)

            def ours():
                for index in torch.randperm(count).to(device).split(BATCH_SIZE):
                    step(*features[index])

            compare(f"{count} images, {encoder}", ordinary, ours)


def utilisation():
    """A step of train.py, against one matrix product of as many operations in the same precision.

    The ratio is the share of the product's speed that the step reaches; in fp32 on a CPU it is more than 1, as
    convolutions have faster kernels there than torch's product. On a GPU, with a profile of the step.
    """
    torch.backends.cudnn.allow_tf32 = False  # the product is without it, too
    print_heading(f"a step of {BATCH_SIZE} images", "product", "step")
    models = [("cifar", 32, 8)] + [("dinov2_b", 256, 16)] * (device == "cuda")
    fast = "bf16" if fast_bf16(device) else "fp32"
    for encoder, size, grid in models:
        for precision, stage in dict.fromkeys((("fp32", 1), (fast, 1), (fast, 2))):
            teacher, step = build_training(precision, stage, encoder, size, grid)
            images = torch.rand(BATCH_SIZE, 3, size, size, device=device)
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                z = teacher(images).float()
            with FlopCounterMode(display=False) as counter:
                step(images, z)
            width = 4096
            rows = counter.get_total_flops() // (2 * width**2)
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            a, b = (torch.randn(n, width, device=device, dtype=dtype) for n in (rows, width))
            gflop = counter.get_total_flops() / 1e9 / BATCH_SIZE
            compare(f"{encoder}, {precision}, stage {stage}, {gflop:.2f} GFLOP an image",
                    lambda: a @ b, lambda: step(images, z))
            if device == "cuda":
                with profile() as profiler:
                    step(images, z)
                    torch.cuda.synchronize()
                averages = profiler.key_averages()
                print(averages.table(sort_by="self_device_time_total", row_limit=8, max_name_column_width=60))
    torch.backends.cudnn.allow_tf32 = True  # as in train.py


def search():
    """A quantizer's forward and backward pass, ours against vector-quantize-pytorch's; all are straight-through."""
    print_heading(f"{TOKENS:,} tokens quantized, forward and backward", "library", "ours", memory=True)

    class Normalize(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.normalize(x, dim=-1)

    def quantize(quantizer: Callable, z: Tensor, loss_at: int):
        leaf = z.clone().requires_grad_()
        outputs = quantizer(leaf)
        (outputs[0].sum() + outputs[loss_at].sum()).backward()

    for codes, width in CODEBOOKS:
        x = torch.randn(1, TOKENS, width, device=device)
        simvq = SimVQ(width, codes).to(device)
        simvq.project_in, simvq.project_out = nn.Identity(), nn.Identity()
        code_transform = nn.Sequential(simvq.simvq.code_transform, Normalize())
        library_simvq = LibrarySimVQ(width, codes, code_transform, rotation_trick=False).to(device)
        library_simvq.frozen_codebook = simvq.simvq.frozen_codebook
        ema_vq = EMAVQ(width, codes, revive=False).to(device)
        library_ema_vq = VectorQuantize(width, codes, decay=0.99, rotation_trick=False).to(device)
        for name, library, ours in (("SimVQ", lambda z: library_simvq(F.normalize(z, dim=-1)), simvq),
                                    ("EMA-VQ", library_ema_vq, ema_vq)):
            for items in (1, 32):
                z = x.view(items, -1, width)
                equal = ""
                if name == "SimVQ":  # EMA-VQ's two have codebooks of their own
                    with torch.no_grad():
                        equal = f", {(library(z)[1] == ours(z)[2]).float().mean().item():.2%} equal"
                compare(f"{name} {codes:,} x {width:,}, {items} x {TOKENS // items:,}{equal}",
                        lambda: quantize(library, z, 2), lambda: quantize(ours, z, 1), memory=True)


@torch.no_grad()
def tokenizing():
    """What quantizing adds to the encoder (and, where codes are searched, to a product of tokens and codes), and what
    looking up codes adds to the decoder."""
    import train

    print_heading(f"{BATCH_SIZE} images, no adapter", "tokens", "bare")
    images = torch.rand(BATCH_SIZE, 3, 32, 32, device=device)
    codebooks = {"fsq": (0, 0), "ddcl": (0, 0), "simvq": (train.SIMVQ_CODEBOOK_SIZE, train.SIMVQ_CODE_DIM),
                 "ema_vq": (train.EMA_CODEBOOK_SIZE, train.EMA_CODE_DIM)}
    for name, (size, width) in codebooks.items():
        options = {"codebook_size": size, "code_dim": width} if size else {}
        model = VQRAE(quantizer=name, quantizer_options=options, adapter_depth=0).to(device).eval()
        z_q, _, indices = model.encode(images)
        chunks = []
        if width:
            codes = torch.randn(size, width, device=device)
            tokens = torch.randn(indices.numel(), width, device=device)
            chunks = tokens.split((2**26 if device == "cuda" else 2**20) // len(codes))  # as many as search_fp32 takes
            scores = tokens.new_empty(len(chunks[0]), len(codes))

        def encode():
            model.encoder(images)
            for chunk in chunks:
                torch.mm(chunk, codes.T, out=scores[: len(chunk)])

        compare(f"encode_to_indices, and encoder{' + product' if width else ''}: {name}",
                lambda: model.encode_to_indices(images), encode)
        compare(f"decode_from_indices, and decode: {name}",
                lambda: model.decode_from_indices(indices), lambda: model.decode(z_q))


first_step = """
import os, runpy, sys, time
import torch
imported = time.time()
def first_step(*args):
    os.write(2, b"seconds %f" % (time.time() - imported))
    os._exit(0)
torch.nn.utils.clip_grad_norm_ = first_step
sys.path.insert(0, {root!r})
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


def run_python(*arguments: str | Path, folder: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=True)


@contextlib.contextmanager
def empty_folder() -> Iterator[str]:
    """For a run that is not kept; datasets are in its data/, which is that of the present folder."""
    Path("data").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "data").symlink_to(Path("data").resolve())
        yield folder


def train_on(dataset: str) -> str:
    """The argument for it, as seen from any folder"""
    return f"DATASET={Path(dataset).resolve() if Path(dataset).is_dir() else dataset}"


def time_training(*arguments: str) -> tuple[float, dict]:
    """Seconds of train.py on DATASET in an empty folder, from start to end, and what it measured on all test images."""
    with empty_folder() as folder:
        seconds_taken = seconds(lambda: run_python(ROOT / "train.py", train_on(DATASET), *arguments, folder=folder))
        results, = Path(folder, "outputs").glob("*/results.json")
        return seconds_taken, json.loads(results.read_text())


def start():
    """From `python train.py` to its first step with the images on disk, beyond importing torch."""
    code = first_step.format(root=str(ROOT))
    done = []
    for _ in range(ROUNDS):
        with empty_folder() as folder:
            done.append(run_python("-c", code, train_on(DATASET), folder=folder))
    times = [float(run.stderr.rpartition("seconds")[2]) for run in done]
    print(f"\nstart to first step, beyond importing torch: {statistics.median(times):.1f} s "
          f"({min(times):.1f}-{max(times):.1f})")


def scaling():
    """Seconds of an epoch by its number of images, from runs of train.py with a small decoder."""
    print("\nimages in an epoch, and seconds of the second epoch")
    for count in SCALING:
        with empty_folder() as folder:
            run_python(
                ROOT / "train.py", train_on(SCALING_DATASET), f"EPOCH_IMAGES={count}", "EPOCHS=(2, 1)",
                "STAGES=(1,)", "DECODER_WIDTH=64", "DECODER_DEPTH=1", "ADAPTER_DEPTH=0", "GAN_WEIGHT=0",
                "PERCEPTUAL_WEIGHT=(0, 0)", "FEATURE_CACHE_GB=0", "EVAL_IMAGES=100", folder=folder)
            table, = Path(folder, "outputs").glob("*/metrics.csv")
            with open(table) as file:
                *_, last = csv.DictReader(file)
        taken = float(last["seconds"])
        print(f"{count:10,} {taken:8.1f} s {taken / count * 1e6:8.0f} microseconds an image", flush=True)


def run():
    """Seconds of train.py on DATASET with its own constants, from start to end. On a GPU alone: it takes minutes."""
    if device != "cuda":
        return print("\npython train.py: not timed on a CPU")
    print(f"\npython train.py: {time_training()[0]:.0f} s, with the download if there was one")


def race():
    """Seconds from a process's start to GOALS, as cifar10-airbench races; measuring all test images counts.

    A run's learning rate decays to zero over a number of images that is set beforehand: each line has the medians of
    runs of so many images, one for each seed. A goal's time is that of the shortest runs that reach it.
    """
    load_dataset(DATASET, 32)  # a folder is decoded before any run is timed
    print(f"\nrace, medians of {RACE_SEEDS} seeds {'images':>22} {'seconds':>8} {'PSNR':>6}  goals, when first reached")
    for name, constants in RACE.items():
        left = list(GOALS)
        for images in RACE_IMAGES:
            runs = [race_once(constants, images, seed) for seed in range(RACE_SEEDS)]
            taken, psnr = (statistics.median(column) for column in zip(*runs))
            reached = [goal for goal in left if psnr >= goal]
            left = [goal for goal in left if psnr < goal]
            goals = "".join(f"  {goal} dB" for goal in reached)
            print(f"{name:42} {images:8,} {taken:8.1f} {psnr:6.2f}{goals}", flush=True)
            if not left or taken > RACE_SECONDS:
                break


def race_once(constants: str | None, images: int, seed: int) -> tuple[float, float]:
    """Seconds and PSNR of one run of stage 1, of train.py with these constants or, without any, of ordinary_loop."""
    if constants is None:
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import bench; bench.ordinary_loop(*sys.argv[1:])"
        begun = time.perf_counter()
        done = run_python("-c", code, DATASET, str(images), str(seed))
        return time.perf_counter() - begun, float(done.stdout.rpartition("PSNR")[2])
    taken, results = time_training(*constants.split(), f"SEED={seed}", f"EPOCH_IMAGES={images}", "EPOCHS=(1, 1)",
                                   "STAGES=(1,)", "EVAL_IMAGES=1", "KEEP_CHECKPOINTS=0")
    return taken, results["psnr"]


class LibraryVQ(Quantizer):
    """vector-quantize-pytorch's own: codes start by k-means; one used a tenth as often as the average is replaced."""

    def __init__(self, dim: int, codebook_size: int, code_dim: int, tokens: int):
        super().__init__(dim, codebook_size)
        self.vq = VectorQuantize(dim, codebook_size=codebook_size, codebook_dim=code_dim, decay=0.99, kmeans_init=True,
                                 threshold_ema_dead_code=0.1 * tokens / codebook_size)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z_q, indices, loss = self.vq(x[None])
        return z_q[0], loss.sum(), indices[0]

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        return self.vq.get_output_from_indices(indices)


def ordinary_loop(dataset: str, images: str, seed: str, batch_size: int = 32):
    """Train the default model as one would without this repository's ways: the squared error alone, AdamW, fp32, the
    frozen encoder in each step, and LibraryVQ. Prints the PSNR on all test images."""
    torch.manual_seed(int(seed))
    data = load_dataset(dataset, 32)
    model = VQRAE(quantizer="none", post_quant_kernel=1)
    model.quantizer = LibraryVQ(model.encoder.dim, 8192, 8, batch_size * 64)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.95), fused=True)
    steps = int(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.05, cycle_momentum=False)
    for index in torch.randint(len(data.train_images), (steps, batch_size)):
        batch = to_float(data.train_images[index].to(device))
        output, loss, _ = model(batch)
        loss = loss + 16 * F.mse_loss(output, batch)  # the weight of train.py
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    metrics, _, _ = evaluate(model, data.test_images, batch_size)
    print("PSNR", metrics["psnr"])


def machine() -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{name[1] if name else platform.processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


if __name__ == "__main__":
    benchmarks = {f.__name__: f for f in (training, utilisation, search, tokenizing, start, scaling, run, race)}
    with one_line_errors(ValueError):
        constants = read_constants(globals())
        for name in ("ROUNDS", "BATCH_SIZE", "BATCHES", "TOKENS", "RACE_SEEDS"):
            check(type(constants[name]) is int and constants[name] >= 1, name, constants[name], "1 or more")
        valid = isinstance(CODEBOOKS, (tuple, list)) and all(isinstance(pair, (tuple, list)) for pair in CODEBOOKS)
        check(valid and all(len(pair) == 2 for pair in CODEBOOKS), "CODEBOOKS", CODEBOOKS, "pairs, as ((1024, 64),)")
        for name in ("SCALING", "RACE_IMAGES", "GOALS"):
            valid = isinstance(constants[name], (tuple, list)) and all(type(n) in (int, float) for n in constants[name])
            check(valid and constants[name], name, constants[name], "numbers such as (5000,)")
        check(TOKENS % 32 == 0, "TOKENS", TOKENS, "a multiple of 32, the images of search")
        for name in ("DATASET", "SCALING_DATASET"):
            check(isinstance(constants[name], str), name, constants[name], "a name or a folder, in quotes")
        valid = isinstance(BENCHMARKS, (tuple, list)) and BENCHMARKS and all(n in [*benchmarks] for n in BENCHMARKS)
        check(valid, "BENCHMARKS", BENCHMARKS, f"some of {tuple(benchmarks)}, such as ('search',)")
    print(f"{machine()}, torch {torch.__version__}, medians of {ROUNDS} rounds")
    failed = False
    for name in BENCHMARKS:
        try:
            with one_line_errors(ValueError, RuntimeError, OSError, full="try less BATCH_SIZE or TOKENS"):
                benchmarks[name]()
        except subprocess.CalledProcessError as error:
            last_line = (error.stderr.strip().splitlines() or [str(error)])[-1]  # one that was killed says nothing
            print(f"\n{name}: {last_line}")
            failed = True
        torch.cuda.empty_cache()  # for the processes that the next one starts
    if failed:
        sys.exit(1)
