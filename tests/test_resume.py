"""Runs that are killed, and what is left of them: each in a process of its own, that SIGKILL ends."""
import csv
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import random
import resource
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from utils import load_torch

ROOT = Path(__file__).resolve().parents[1]
processes = multiprocessing.get_context("forkserver")  # imports torch and the rest once for all of them
processes.set_forkserver_preload(["models", "utils", "runpy", "torchmetrics.image.lpip"])

ARGUMENTS = ["PRECISION=fp32", "EPOCHS=(2, 2)", "BATCH_SIZE=32", "EVAL_IMAGES=32", "EMA_CODEBOOK_SIZE=64",
             "SIMVQ_CODEBOOK_SIZE=256", "ADAPTER_DEPTH=0", "DECODER_WIDTH=64", "DECODER_DEPTH=1", "DECODER_HEADS=2",
             "GAN_WEIGHT=0.1", "FLIP=True", "EPOCH_IMAGES=None"]


def count_down(function, calls, then):
    """The function, with `then` called first at its calls-th call (from 1)."""
    left = [calls]

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            then(*args)
        return function(*args, **kwargs)

    return counted


def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def half_write_and_kill(file):
    os.ftruncate(file, os.fstat(file).st_size // 2)
    kill()


def child(folder, arguments, where, calls, script="train.py"):
    """The script, killed at the calls-th time that it comes to the place `where`."""
    import models
    import utils

    os.chdir(folder)
    with open("log", "a") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    if where == "step":
        torch.nn.utils.clip_grad_norm_ = count_down(torch.nn.utils.clip_grad_norm_, calls, kill)
    if where == "evaluation":
        utils.ssim = count_down(utils.ssim, calls, kill)
    if where == "write":
        os.fsync = count_down(os.fsync, calls, half_write_and_kill)
    if where == "rename":
        os.replace = count_down(os.replace, calls, kill)
    if where == "stage 2":
        models.VQRAE.set_stage = count_down(models.VQRAE.set_stage, calls, kill)
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def start(folder, arguments, where=None, calls=0, script="train.py"):
    folder.mkdir(exist_ok=True)
    process = processes.Process(target=child, args=(folder, arguments, where, calls, script))
    process.start()
    return process


def exit_code(process):
    process.join(300)
    assert process.exitcode is not None, "hangs"
    return process.exitcode


def same(a, b):
    """Equal bit for bit, through all dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def outcome(folder):
    """What a run leaves: last.pt without its timings, metrics.csv without them, results.json."""
    outputs, = (folder / "outputs").iterdir()
    last = load_torch(folder / "checkpoints" / outputs.name / "last.pt")
    table = list(csv.DictReader(open(outputs / "metrics.csv")))
    for row in [*table, *last["history"]]:
        del row["seconds"], row["images_per_second"]
    return last, table, json.loads((outputs / "results.json").read_text())


@pytest.fixture(scope="module")
def reference(request, tmp_path_factory, folder):
    """The arguments of a run with this quantizer, what it leaves when nothing stops it, and how long it takes."""
    path = tmp_path_factory.mktemp("reference")
    two = f"DATASET=('{folder}','{shutil.copytree(folder, path / 'other')}')"
    options = [two if option == "DATASETS=2" else option for option in request.param.split()]
    arguments = [f"DATASET={folder}", *ARGUMENTS, f"QUANTIZER={options[0]}", *options[1:]]
    begin = time.time()
    assert exit_code(start(path, arguments)) == 0, (path / "log").read_text()
    return arguments, outcome(path), time.time() - begin


def finish_and_compare(path, reference):
    arguments, expected, _ = reference
    assert exit_code(start(path, arguments)) == 0, (path / "log").read_text()
    assert same(outcome(path), expected)
    names = {f.name for f in [*(path / "outputs").rglob("*.*"), *(path / "checkpoints").rglob("*.*")]}
    assert len([name for name in names if name.endswith(".pt")]) == 7
    assert not any(name.endswith(".tmp") for name in names)


# 2 steps an epoch, and files: two of decoded images, then each epoch grid, table, plot, best, epoch_k, last.pt
@pytest.mark.parametrize("reference", ["ddcl"], indirect=True)  # its dither draws random numbers
@pytest.mark.parametrize("where, calls, epoch", [
    ("write", 1, 0), ("step", 4, 1), ("evaluation", 2, 1), ("write", 12, 1), ("write", 14, 1), ("rename", 14, 1),
    ("stage 2", 4, 2)])
def test_a_killed_run_ends_as_if_nothing_had_been(where, calls, epoch, reference, tmp_path):
    assert exit_code(start(tmp_path, reference[0], where, calls)) == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not list(tmp_path.rglob("results.json"))
    finish_and_compare(tmp_path, reference)
    assert (f"resuming after stage 1, epoch {epoch}" in (tmp_path / "log").read_text()) == (epoch > 0)


# its random depths, too, and so does the revival of EMA-VQ's codes
@pytest.mark.parametrize("reference", ["ema_vq CODEBOOKS=2 RANDOM_DEPTH=0.5", "fsq IMAGE_SIZE=(16,32) GRID=4"],
                         indirect=True)
def test_a_killed_run_with_what_is_rare_ends_as_if_nothing_had_been(reference, tmp_path):
    assert exit_code(start(tmp_path, reference[0], "step", 4)) == -signal.SIGKILL, (tmp_path / "log").read_text()
    finish_and_compare(tmp_path, reference)


@pytest.mark.slow
@pytest.mark.parametrize("reference", [
    "ddcl", "ema_vq", "simvq", "simvq CODEBOOKS=2 COMBINE=product", "ema_vq CODEBOOKS=2 RANDOM_DEPTH=0.5",
    "fsq DATASETS=2 IMAGE_SIZE=(16,32) GRID=4 BATCH_SIZE=16"], indirect=True)
@pytest.mark.parametrize("number", range(4))
def test_killed_at_any_moment(number, reference, tmp_path):
    arguments, _, seconds = reference
    process = start(tmp_path, arguments)
    time.sleep(random.Random(number).uniform(0, seconds))
    process.kill()
    assert exit_code(process) in (0, -signal.SIGKILL)
    finish_and_compare(tmp_path, reference)


@pytest.fixture(scope="module")
def generated(tmp_path_factory, folder):
    """As `reference`, of generate.py."""
    arguments = [f"DATASET={folder}", "PRECISION=fp32", "EPOCHS=3", "BATCH_SIZE=32", "DIM=32", "DEPTH=1", "STEPS=2",
                 "SAMPLES=20", "EVAL_IMAGES=32"]
    path = tmp_path_factory.mktemp("generated")
    begin = time.time()
    assert exit_code(start(path, arguments, script="generate.py")) == 0, (path / "log").read_text()
    return arguments, (outcome(path), prior_of(path)), time.time() - begin


def prior_of(path):
    return load_torch(*path.glob("checkpoints/*/prior.pt"))["prior"]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_generate_killed_at_any_moment(number, generated, tmp_path):
    arguments, expected, seconds = generated
    process = start(tmp_path, arguments, script="generate.py")
    time.sleep(random.Random(number).uniform(0, seconds))
    process.kill()
    assert exit_code(process) in (0, -signal.SIGKILL)
    assert exit_code(start(tmp_path, arguments, script="generate.py")) == 0, (tmp_path / "log").read_text()
    assert same((outcome(tmp_path), prior_of(tmp_path)), expected)
    assert not [*tmp_path.glob("outputs/**/*.tmp"), *tmp_path.glob("checkpoints/**/*.tmp")]


def test_ctrl_c_says_what_is_saved(tmp_path, folder):
    process = start(tmp_path, [f"DATASET={folder}", *ARGUMENTS, "EPOCHS=(1000, 1)"])
    while not list(tmp_path.glob("checkpoints/*/last.pt")):
        assert process.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.05)
    for _ in range(5):  # Python drops an interrupt that arrives in a destructor, such as a plot's: press again
        if process.is_alive():
            os.kill(process.pid, signal.SIGINT)
            process.join(60)
    assert exit_code(process) == 1
    log = (tmp_path / "log").read_text()
    assert "stopped" in log and "last.pt" in log and "goes on" in log and "Traceback" not in log


def limited(folder, arguments, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # as a disk that is full: a write fails midway
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    child(folder, arguments, None, 0)


def test_a_full_disk_leaves_the_checkpoint_that_was(tmp_path, folder):
    arguments = [f"DATASET={folder}", *ARGUMENTS, "EPOCHS=(3, 1)", "STAGES=(1,)"]
    assert exit_code(start(tmp_path, arguments, "step", 5)) == -signal.SIGKILL
    last, = tmp_path.glob("checkpoints/*/last.pt")
    before, best = last.read_bytes(), last.with_name("ema_vq_stage1_best.pt").stat().st_size
    assert len(before) > best + 2**20  # so that last.pt is the one that does not fit
    process = processes.Process(target=limited, args=(tmp_path, arguments, best + 2**20))
    process.start()
    assert exit_code(process) == 1
    line = (tmp_path / "log").read_text().splitlines()[-1]
    assert line.startswith("train.py: ") and "File too large" in line and "last.pt" in line
    assert last.read_bytes() == before
    assert exit_code(start(tmp_path, arguments)) == 0


class MallInfo2(ctypes.Structure):
    """What glibc's mallinfo2 returns"""
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks",
                                                     "fsmblks", "uordblks", "fordblks", "keepcost")]


def watched(folder, arguments):
    import utils

    write_csv = utils.write_csv
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo2

    def watch(path, rows):
        gc.collect()
        memory = mallinfo2()
        megabytes = (memory.uordblks + memory.hblkhd) / 1e6  # small pieces in use, and large ones
        with open("memory", "a") as file:
            print(megabytes, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), file=file)
        write_csv(path, rows)

    os.chdir(folder)
    utils.write_csv = watch
    child(folder, arguments, None, 0)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.33"), reason="asks glibc 2.33 or later how much is in use")
def test_memory_stays_as_it_is_over_100_epochs(tmp_path, folder):
    arguments = [f"DATASET={folder}", *ARGUMENTS, "EPOCHS=(100, 1)", "STAGES=(1,)"]
    process = processes.Process(target=watched, args=(tmp_path, arguments))
    process.start()
    process.join(1200)
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-1000:]
    lines = (tmp_path / "memory").read_text().splitlines()
    memory, handles, threads = zip(*(map(float, line.split()) for line in lines))
    assert len(memory) == 100
    # of what is in use, not of what the allocator keeps: that swings by 5 %, with the sizes of plots
    growth = max(memory[80:]) - min(memory[20:40])
    assert growth < 6, f"{growth:.1f} MB more after 60 epochs"  # 2.8 MB measured, of 260: 2.4 of them at once
    assert len(set(handles[20:])) == 1 and len(set(threads[20:])) == 1
    assert len(list(tmp_path.glob("checkpoints/*/*.pt"))) == 4  # best, two epochs, last: the others are pruned
