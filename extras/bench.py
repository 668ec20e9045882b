"""Time what this repository claims to be fast.

    python -m extras.bench      a training step, and quantizers: medians of alternate ROUNDS
"""
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import vector_quantize_pytorch as library
from torch import Tensor, nn

import train
import utils
from models import build_encoder
from optimization import take_step
from quantizers import EMAVQ, SimVQ

ROUNDS = 5
BATCH_SIZE = 64
CODEBOOKS = (65536, 16384, 8192)  # sizes, and widths of codes
CODE_DIMS = (16, 1536, 8)
TOKENS = 2048
device = train.device


def seconds(run: Callable) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name: str, first: Callable, second: Callable):
    first(), second()  # warm-up
    times = [(seconds(first), seconds(second)) for _ in range(ROUNDS)]
    a, b = (1000 * statistics.median(column) for column in zip(*times))
    print(f"{name:52} {a:9.1f} ms {b:9.1f} ms {statistics.median(x / y for x, y in times):7.2f}", flush=True)


def step():
    """A step of stage 1, in fp32 with AdamW and the squared error only, against train.py's."""
    print(f"\n{f'stage 1, {BATCH_SIZE} images':52} {'ordinary':>12} {'train.py':>12}   ratio")
    images = torch.rand(BATCH_SIZE, 3, 32, 32, device=device)
    teacher = build_encoder("cifar", 4).to(device).eval().requires_grad_(False)
    models = [train.build_model().to(device).train() for _ in range(2)]
    adamw = torch.optim.AdamW(models[0].parameters(), lr=1e-5)
    optimizers = train.build_optimizers(models[1], 1)

    def ordinary():
        output, loss, _ = models[0](images)
        (16 * F.mse_loss(output, images) + loss).backward()
        adamw.step(), adamw.zero_grad()

    def ours():
        with torch.autocast(device, torch.bfloat16, enabled=train.bf16):
            with torch.no_grad():
                frozen = teacher(images, with_last=True)
            train.objective(models[1], images, teacher, *frozen, None, None)[0]["loss"].backward()
        nn.utils.clip_grad_norm_(models[1].parameters(), 1.0)
        take_step(optimizers, 500, 1000)
        models[1].zero_grad()

    compare("EMA-VQ 65,536 x 16", ordinary, ours)


def quantizers():
    """Forward and backward passes, vector-quantize-pytorch's against ours."""
    print(f"\n{f'{TOKENS:,} tokens, forward and backward':52} {'library':>12} {'ours':>12}   ratio")

    def run(quantizer: nn.Module, x: Tensor, loss_at: int):
        outputs = quantizer(x.clone().requires_grad_())
        (outputs[0].sum() + outputs[loss_at].sum()).backward()

    for size, width in zip(CODEBOOKS, CODE_DIMS):
        x = torch.randn(1, TOKENS, width, device=device)
        for name, theirs, ours in (("EMA-VQ", library.VectorQuantize, EMAVQ), ("SimVQ", library.SimVQ, SimVQ)):
            theirs, ours = theirs(width, size, rotation_trick=False).to(device), ours(width, size, None).to(device)
            compare(f"{name} {size:,} x {width:,}", lambda: run(theirs, x, 2), lambda: run(ours, x, 1))


if __name__ == "__main__":
    with utils.one_line_errors():
        utils.read_constants(globals(), sys.argv[1:])
        name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        print(f"{name}, torch {torch.__version__}, medians of {ROUNDS} rounds")
        step(), quantizers()
