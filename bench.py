"""Time and memory of what this repository claims to be fast, against the ordinary way to do it.

    python bench.py                        everything, ten minutes on two cores; on a GPU, with a whole run of train.py
    python bench.py "PARTS=('search',)"    of "training", "utilisation", "search", "tokenizing", "start", "scaling", "run"

Each line of the first four parts runs two things in turn, ROUNDS times, and prints their medians and the median and range of their
ratios. On a GPU, DINOv2 is measured, too, with random weights, which makes no difference here.
"""
import copy
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler tells of its own doings

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
from quantizers import EMAVQ, SimVQ, check, fast_bf16
from utils import FeatureCache, draw_shapes, read_constants, to_float

PARTS = ("training", "utilisation", "search", "tokenizing", "start", "scaling", "run")
ROUNDS = 5
BATCH_SIZE = 64
BATCHES = 4  # of training, in each timing
CODEBOOKS = ((16384, 1536), (8192, 768), (1024, 64), (16384, 8))  # codes and their width, for the search
TOKENS = 8192  # of the search, as one image and as 32
DATASET = "cifar10"  # of the start and the run
SCALING = (5_000, 15_000, 50_000)  # images in an epoch
device = "cuda" if torch.cuda.is_available() else "cpu"


def seconds(run: Callable[[], object]) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(run: Callable[[], object]) -> float:
    """MB of tensors that the run, warm, holds at its worst moment beyond what was there before it, of which it must free nothing."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate((event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())), initial=0)) / 1e6


def heading(title: str, first: str, second: str, memory: bool = False):
    print(f"\n{title:52} {first:>10} {second:>10} {'ratio':>6} {'range':>12}" + ("     peak memory" if memory else ""))


def compare(name: str, first: Callable[[], object], second: Callable[[], object], memory: bool = False):
    first(), second()  # warm-up
    times = [(seconds(first), seconds(second)) for _ in range(ROUNDS)]
    ratios = [a / b for a, b in times]
    medians = [statistics.median(column) * 1000 for column in zip(*times)]
    line = f"{name:52} {medians[0]:7.1f} ms {medians[1]:7.1f} ms {statistics.median(ratios):6.2f} {f'{min(ratios):.2f}-{max(ratios):.2f}':>12}"
    if memory:
        line += f"  {peak_memory(first):5.0f} to {peak_memory(second):.0f} MB"
    print(line, flush=True)


def trainer(stage: int, encoder: str = "cifar", image_size: int = 32, grid: int = 8) -> tuple[nn.Module, Callable[[Tensor, Tensor], None]]:
    """The frozen encoder, and train.py's step (images, its features) with all of its losses but the GAN's."""
    import train

    train.ENCODER, train.IMAGE_SIZE, train.GRID = encoder, image_size, grid
    model = train.build_model(pretrained=encoder == "cifar").set_stage(stage).train()  # others' weights make no difference here
    teacher = copy.deepcopy(model.encoder).eval().requires_grad_(False)
    objective = train.Objective(stage, model, teacher, None)
    optimizers = train.build_optimizers(model, 1e-5)

    def step(images: Tensor, z: Tensor):
        losses, _ = objective(images, z, None)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    return teacher, step


def training():
    """Stage 1 of train.py with its losses: ImageFolder, DataLoader, fp32 and the encoder in each step, or as it does it."""
    import train

    precision = "bf16" if fast_bf16(device) else "fp32"
    heading("stage 1", "ordinary", "ours")
    count = BATCH_SIZE * BATCHES
    images = draw_shapes(32, train=count, test=10).train_images
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "shapes").mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(Path(folder, "shapes", f"{i}.png"))
        loader = DataLoader(ImageFolder(folder, ToTensor()), BATCH_SIZE, shuffle=True, num_workers=2, persistent_workers=True)
        on_device = images.to(device)
        for encoder in ("cifar", "dinov2_s") if device == "cuda" else ("cifar",):
            teacher, step = trainer(1, encoder)
            features = FeatureCache(teacher, on_device, 4.0)

            def ordinary():
                train.PRECISION = "fp32"
                for batch, _ in loader:
                    batch = batch.to(device)
                    with torch.no_grad():
                        z = teacher(batch)
                    step(batch, z)

            def ours():
                train.PRECISION = precision
                for index in torch.randperm(count).split(BATCH_SIZE):
                    step(to_float(on_device[index.to(device)]), features[index])

            compare(f"{count} images, {encoder}", ordinary, ours)


def utilisation():
    """A step of train.py beside one matrix product with as many multiplications and additions in the same precision: the
    ratio is the share of the product's speed that the step reaches (in fp32 on a CPU, where convolutions have faster kernels than
    torch's product, more than 1). On a GPU, with profiles of what takes its time."""
    import train

    torch.backends.cudnn.allow_tf32 = False  # the product is without it, too
    heading(f"a step of {BATCH_SIZE} images", "product", "step")
    models = [("cifar", 32, 8)] + [("dinov2_b", 256, 16)] * (device == "cuda")
    for encoder, size, grid in models:
        for precision, stage in (("fp32", 1), ("bf16", 1), ("bf16", 2)):
            train.PRECISION = precision
            teacher, step = trainer(stage, encoder, size, grid)
            images = torch.rand(BATCH_SIZE, 3, size, size, device=device)
            with torch.no_grad():
                z = teacher(images)
            with FlopCounterMode(display=False) as counter:
                step(images, z)
            width = 4096
            rows = counter.get_total_flops() // (2 * width**2)
            a, b = (torch.randn(n, width, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32) for n in (rows, width))
            compare(f"{encoder}, {precision}, stage {stage}, {counter.get_total_flops() / 1e9 / BATCH_SIZE:.2f} GFLOP an image",
                    lambda: a @ b, lambda: step(images, z))
            if device == "cuda":
                with profile() as profiler:
                    step(images, z)
                    torch.cuda.synchronize()
                print(profiler.key_averages().table(sort_by="self_device_time_total", row_limit=8, max_name_column_width=60))
    torch.backends.cudnn.allow_tf32 = True  # as it was, and as train.py has it


def search():
    """A training step of quantizer alone, forward and backward, ours and vector-quantize-pytorch's own module (straight-through,
    as ours)."""
    heading(f"{TOKENS:,} tokens quantized, forward and backward", "library", "ours", memory=True)
    for codes, width in CODEBOOKS:
        x = torch.randn(1, TOKENS, width, device=device)
        ours = SimVQ(width, codes).to(device)
        ours.project_in, ours.project_out = nn.Identity(), nn.Identity()

        class Normalize(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return F.normalize(x, dim=-1)

        library = LibrarySimVQ(width, codes, nn.Sequential(ours.simvq.code_transform, Normalize()), rotation_trick=False).to(device)
        library.frozen_codebook = ours.simvq.frozen_codebook
        ema = EMAVQ(width, codes, revive=False).to(device)
        library_ema = VectorQuantize(width, codes, decay=0.99, rotation_trick=False).to(device)
        for name, theirs, mine in (("SimVQ", lambda z: library(F.normalize(z, dim=-1)), ours), ("EMA-VQ", library_ema, ema)):
            for items in (1, 32):
                z = x.view(items, -1, width)

                def run(quantize: Callable, loss_at: int):
                    leaf = z.clone().requires_grad_()
                    out = quantize(leaf)
                    (out[0].sum() + out[loss_at].sum()).backward()

                same = ""
                if name == "SimVQ":  # EMA-VQ's two have other codebooks, for each makes its own
                    with torch.no_grad():
                        same = f", {(theirs(z)[1] == mine(z)[2]).float().mean().item():.2%} equal"
                compare(f"{name} {codes:,} x {width:,}, {items} x {TOKENS // items:,}{same}",
                        lambda: run(theirs, 2), lambda: run(mine, 1), memory=True)


@torch.no_grad()
def tokenizing():
    """What quantizing adds to the encoder (and, where codes are searched, to one product of tokens and codes), and looking
    codes up to the decoder."""
    import train

    heading(f"{BATCH_SIZE} images, no adapter", "tokens", "bare")
    images = torch.rand(BATCH_SIZE, 3, 32, 32, device=device)
    for name, options in (("fsq", {}), ("ddcl", {}), ("simvq", {"code_dim": train.SIMVQ_CODE_DIM}), ("ema_vq", {"code_dim": train.EMA_CODE_DIM})):
        model = VQRAE(quantizer=name, quantizer_options=options, adapter_depth=0).to(device).eval()
        z_q, _, indices = model.encode(images)
        bare = lambda: model.encoder(images)
        if name in ("simvq", "ema_vq"):
            width = options["code_dim"]
            codes, x = torch.randn(model.quantizer.codebook_size, width, device=device), torch.randn(indices.numel(), width, device=device)
            parts = x.split((2**26 if device == "cuda" else 2**20) // len(codes))  # as the search takes them
            kept = x.new_empty(len(parts[0]), len(codes))
            bare = lambda: (model.encoder(images), [torch.mm(part, codes.T, out=kept[: len(part)]) for part in parts])
        compare(f"encode_to_indices, and encoder{' + product' if name in ('simvq', 'ema_vq') else ''}: {name}",
                lambda: model.encode_to_indices(images), bare)
        compare(f"decode_from_indices, and decode: {name}", lambda: model.decode_from_indices(indices), lambda: model.decode(z_q))


FIRST_STEP = """
import sys, time
import torch
imported = time.time()
sys.path.insert(0, {root!r})
def first_step(*args):
    print("seconds", time.time() - imported, file=sys.stderr)
    sys.stderr.flush()
    import os
    os._exit(0)
torch.nn.utils.clip_grad_norm_ = first_step
sys.argv = ["train.py", *sys.argv[1:]]
import runpy
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


def last_line(done: subprocess.CompletedProcess) -> str:
    """What a script that failed said last"""
    return done.stderr.strip().rpartition("\n")[2]


def start():
    """From `python train.py` to its first step with the images on disk, beyond importing torch."""
    root = str(Path(__file__).resolve().parent)
    done = [subprocess.run([sys.executable, "-c", FIRST_STEP.format(root=root), f"DATASET={DATASET}", "SEED=31415"], capture_output=True, text=True)
            for _ in range(ROUNDS)]
    if any("seconds" not in run.stderr for run in done):
        return print(f"\nstart: {last_line(done[0])}")
    times = [float(run.stderr.rpartition("seconds")[2]) for run in done]
    print(f"\nstart to first step, beyond importing torch: {statistics.median(times):.1f} s ({min(times):.1f}-{max(times):.1f})")


def scaling():
    """Seconds of an epoch over its images, from runs of train.py with a small decoder."""
    print("\nimages in an epoch, and seconds of the second epoch")
    root = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as folder:
        for count in SCALING:
            subprocess.run([sys.executable, root / "train.py", "DATASET=shapes", f"EPOCH_IMAGES={count}", "EPOCHS=(2, 1)", "STAGES=(1,)",
                            "DECODER_WIDTH=64", "DECODER_DEPTH=1", "ADAPTER_DEPTH=0", "GAN_WEIGHT=0", "PERCEPTUAL_WEIGHT=(0, 0)",
                            "FEATURE_CACHE_GB=0", "KEEP_CHECKPOINTS=0", "EVAL_IMAGES=100"], cwd=folder, check=True, capture_output=True)
            table, = Path(folder, "outputs").glob("*/metrics.csv")
            names, *_, last = [line.split(",") for line in table.read_text().splitlines()]
            taken = float(dict(zip(names, last))["seconds"])
            print(f"{count:10,} {taken:8.1f} s {taken / count * 1e6:8.0f} microseconds an image", flush=True)
            for file in table.parent.iterdir():
                file.unlink()
            table.parent.rmdir()


def run():
    """Seconds of train.py on DATASET, all other constants as they are, from start to end. On a GPU alone: a CPU takes many minutes, and
    train.py prints them."""
    if device != "cuda":
        return print("\npython train.py: not timed on a CPU")
    root = Path(__file__).resolve().parent
    Path("data").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "data").symlink_to(Path("data").resolve())
        dataset = Path(DATASET).resolve() if Path(DATASET).is_dir() else DATASET
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, root / "train.py", f"DATASET={dataset}"], cwd=folder, capture_output=True, text=True)
        taken = time.perf_counter() - begun
    print("\npython train.py: " + (last_line(done) if done.returncode else f"{taken:.0f} s, with the download if there was one"))


def machine() -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")] \
        if Path("/proc/cpuinfo").exists() else [platform.processor()]
    return f"{model[0]}, {torch.get_num_threads()} of {os.cpu_count()} cores"


if __name__ == "__main__":
    parts = {part.__name__: part for part in (training, utilisation, search, tokenizing, start, scaling, run)}
    try:
        read_constants(globals())
        check(isinstance(PARTS, (tuple, list)) and set(PARTS) <= parts.keys(), "PARTS", PARTS, f"some of {tuple(parts)}, such as ('search',)")
    except ValueError as error:
        sys.exit(f"bench.py: {error}")
    print(f"{machine()}, torch {torch.__version__}, medians of {ROUNDS} rounds")
    for part in PARTS:
        parts[part]()
        torch.cuda.empty_cache()  # what the next part's own processes need
