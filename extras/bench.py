"""Time a training step of train.py beside an ordinary one.

    python -m extras.bench                                             with train.py's constants
    python -m extras.bench ENCODER=dinov2_b IMAGE_SIZE=224 GRID=16     with some of them replaced

Medians of ROUNDS; weights are random. On a GPU steps are timed compiled, too, and with CUDA graphs. Launches are calls
of the driver. "of peak": the multiplications of forward and backward pass, against those of a large matrix product.
"""
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

import train
import utils
from muon import take_step

ROUNDS = 5
COMPILED = train.gpu  # time compiled steps; on a CPU they take minutes to compile, and gain nothing


def seconds(run: Callable) -> float:
    start = time.perf_counter()
    run()
    if train.gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ordinary_gradients(model: nn.Module, images: Tensor, *_):
    output, loss, _ = model(images)
    (16 * F.mse_loss(output, images) + loss).backward()


def steps():
    """Steps of stage 1: fp32 with AdamW and the squared error only, and train.py's."""
    images = torch.rand(train.BATCH_SIZE, 3, *[train.sizes()[-1]] * 2, device=train.device)
    networks = train.build_loss_networks(train.build_model(pretrained=False), pretrained=False)
    side, dtype = 8192 if train.gpu else 1024, torch.bfloat16 if train.bf16 else torch.float32
    matrix = torch.randn(side, side, dtype=dtype, device=train.device)
    peak = 2 * side**3 / min(seconds(lambda: matrix @ matrix) for _ in range(10))
    print(f"\n{f'{train.ENCODER}, {train.QUANTIZER}, {len(images)} images of {images.shape[-1]} pixels':44} ms a step "
          f"launches  images/s  of peak's {peak / 1e9:,.0f} GFLOP/s  GB  compiling, s")
    for mode in ("", "default", "reduce-overhead")[: 1 + COMPILED * (1 + train.gpu)]:
        for name, gradients in (("ordinary", ordinary_gradients), ("train.py", train.add_gradients)):
            train.COMPILE, model = mode, train.build_model(pretrained=False).to(train.device).train()
            ours = name == "train.py"
            optimizers = train.build_optimizers(model, 1) if ours else {"adamw": AdamW(model.parameters(), lr=1e-5)}
            with FlopCounterMode(display=False) as counter:
                gradients(model, images, *networks, None)
            torch.compiler.reset()
            function = train.compiled(gradients) if mode else gradients

            def run():
                function(model, images, *networks, None)
                if ours:
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                take_step(optimizers, 500, 1000)
                model.zero_grad()

            model.zero_grad()
            first = seconds(run)
            run()  # CUDA graphs are recorded
            run()
            step, launches, memory = statistics.median(seconds(run) for _ in range(ROUNDS)), torch.nan, torch.nan
            if train.gpu:
                torch.cuda.reset_peak_memory_stats()
                with torch.profiler.profile() as profile:
                    seconds(run)
                launches = sum(event.count for event in profile.key_averages() if "Launch" in event.key)
                memory = torch.cuda.max_memory_allocated() / 1e9
            print(f"{f'{name} {mode}':44} {1000 * step:9.1f} {launches:8} {len(images) / step:9,.0f} "
                  f"{counter.get_total_flops() / step / peak:8.1%} {memory:19.1f} {first - step:13.0f}", flush=True)


if __name__ == "__main__":
    with utils.one_line_errors():
        own = [word for word in sys.argv[1:] if word.partition("=")[0] in globals()]
        train.constants = utils.read_constants(vars(train), [word for word in sys.argv[1:] if word not in own])
        utils.read_constants(globals(), own)
        train.check_constants()
        train.start_process()
        name = torch.cuda.get_device_name() if train.gpu else f"CPU, {torch.get_num_threads()} threads"
        print(f"{name}, torch {torch.__version__}, medians of {ROUNDS} rounds")
        steps()
