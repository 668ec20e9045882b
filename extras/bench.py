"""Time a training step of train.py, in stage 1 and with random weights.

    python -m extras.bench                                             train.py's constants
    python -m extras.bench ENCODER=dinov2_b IMAGE_SIZE=224 GRID=16     some of them replaced

On a GPU the step is also timed compiled, and with CUDA graphs; on a CPU only if COMPILE asks for it.
"""
import statistics
import sys
import time
from functools import partial
from itertools import repeat

import torch

import train
from utils import one_line_errors, read_constants

ROUNDS = 5  # the median of so many steps is printed


def main():
    own = [word for word in sys.argv[1:] if word.startswith("ROUNDS=")]
    train.constants = read_constants(vars(train), [word for word in sys.argv[1:] if word not in own], train.kinds)
    read_constants(globals(), own)
    train.check_constants()
    train.start_process()
    name = torch.cuda.get_device_name() if train.gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}: {train.ENCODER}, {train.QUANTIZER}, {train.BATCH_SIZE} images of "
          f"{train.sizes()[-1]} pixels\n{'COMPILE':15}  ms a step  images/s  compiling, s  GB")
    for mode in ("", "default", "reduce-overhead") if train.gpu else sorted({"", train.COMPILE}):
        print_step(mode)


def print_step(mode: str):
    """Print the time of a step with COMPILE=mode, its rate, the time to compile it, and on a GPU its peak memory."""
    torch.compiler.reset()
    if train.gpu:
        torch.cuda.reset_peak_memory_stats()
    train.COMPILE = mode
    model = train.build_model(pretrained=False).to(train.device).train()
    function = train.compiled(train.losses_and_gradients) if mode else train.losses_and_gradients
    backward = partial(function, model, *train.build_loss_networks(model, pretrained=False))
    optimizers = train.build_optimizers(model, stage=1)
    images = torch.rand(train.BATCH_SIZE // train.ACCUMULATE, 3, *[train.sizes()[-1]] * 2, device=train.device)
    seconds = []
    for _ in range(3 + ROUNDS):  # the first step compiles; the next two record CUDA graphs
        start = time.perf_counter()
        train.train_epoch(model, repeat(images), 0, 1, 1000, backward, None, optimizers, None)
        seconds.append(time.perf_counter() - start)  # train_epoch has waited for the GPU
    step = statistics.median(seconds[3:])
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if train.gpu else "-"
    print(f"{mode or '-':15} {1000 * step:10.1f} {train.BATCH_SIZE / step:9,.0f} {seconds[0] - step:13.0f} {memory:>3}",
          flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
