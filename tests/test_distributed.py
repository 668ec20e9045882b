"""train.py under torchrun, as two processes on the CPU."""
import csv
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
processes = multiprocessing.get_context("forkserver")  # imports torch and the rest once for all of them
processes.set_forkserver_preload(["models", "utils", "runpy", "torchmetrics.image.lpip"])

ARGUMENTS = ["EPOCHS=(2, 1)", "BATCH_SIZE=32", "EVAL_IMAGES=32", "EMA_CODEBOOK_SIZE=64", "SIMVQ_CODEBOOK_SIZE=256",
             "ADAPTER_DEPTH=1", "DECODER_WIDTH=64", "DECODER_DEPTH=1", "DECODER_HEADS=2", "EPOCH_IMAGES=None"]

# train.py with each process's model written to a file of its own at the end, or with one process killed
WATCHED = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
import torch
import models

rank, seen = int(os.environ["RANK"]), []
set_stage = models.VQRAE.set_stage
models.VQRAE.set_stage = lambda self, stage: (seen.append(self), set_stage(self, stage))[1]
clip, steps = torch.nn.utils.clip_grad_norm_, []

def clip_or_die(*args):
    steps.append(1)
    if rank == 1 and len(steps) == {die_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return clip(*args)

torch.nn.utils.clip_grad_norm_ = clip_or_die
destroy = torch.distributed.destroy_process_group

def save_and_destroy():
    for model in [m for m in seen if m.stage == 2 and m.training][-1:]:
        torch.save(model.state_dict(), f"rank{{rank}}.pt")
    print("the group is left")
    destroy()

torch.distributed.destroy_process_group = save_and_destroy
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


REVIVE = """
import os, sys
sys.path.insert(0, {root!r})
import torch
from quantizers import EMAVQ

torch.manual_seed(0)
quantizer = EMAVQ(6, codebook_size=100)  # before there is a process group
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(1 + rank)
for _ in range(4):
    quantizer(torch.randn(1, 30 - 10 * rank, 6))
torch.save(quantizer.state_dict(), f"rank{{rank}}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()  # its threads, still there at the end, now and then abort the process
"""

# train.py where the first process cannot reach CIFAR-10, and the second could
OFFLINE = """
import os, runpy, sys
sys.path.insert(0, {root!r})
import utils

def load_cifar(*args):
    if os.environ["RANK"] == "1":
        raise SystemExit("the second process looked for itself")
    raise RuntimeError("no network")

draw_shapes = utils.draw_shapes
utils.load_cifar, utils.draw_shapes = load_cifar, lambda size: draw_shapes(size, train=64, test=40)
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


def torchrun(cwd, script, arguments):
    """The script under torchrun itself: its exit code, and what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    done = subprocess.run([*command, script, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def child(rank, port, cwd, script, arguments):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                   "MASTER_PORT": str(port)}
    os.chdir(cwd)
    with open("log", "a") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def launch(cwd, script, arguments):
    """As torchrun does it, but in processes that have imported torch already: the highest exit code, and the log."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [processes.Process(target=child, args=(rank, port, cwd, script, arguments)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    return max(abs(process.exitcode) for process in ranks), (cwd / "log").read_text()


def table(cwd):
    path, = cwd.glob("outputs/*/metrics.csv")
    with open(path) as file:
        return [{k: float(v) for k, v in row.items() if k not in ("dataset", "seconds", "images_per_second")}
                for row in csv.DictReader(file)]


@pytest.mark.parametrize("quantizer, options", [
    ("fsq", []), ("simvq", ["ACCUMULATE=2"]), ("ema_vq", ["EMA_REVIVE=False"])])
def test_two_processes_learn_what_one_learns(quantizer, options, tmp_path, folder, monkeypatch):
    # Muon orthogonalizes in bf16 where that is faster on a CPU, whatever PRECISION says: sums in another order would
    # then show in the third digit, as they do where a hardly trained encoder learns at a high rate
    arguments = [f"DATASET={folder}", f"QUANTIZER={quantizer}", *ARGUMENTS, "PRECISION=fp32", "OPTIMIZER=adamw",
                 "LEARNING_RATE=(1e-3, 1e-4)", "GAN_WEIGHT=0", *options]
    (tmp_path / "two").mkdir()
    code, log = launch(tmp_path / "two", ROOT / "train.py", arguments)
    assert code == 0, log
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    one, two = table(tmp_path), table(tmp_path / "two")
    assert len(one) == 3
    for a, b in zip(one, two):
        # rounding moves a figure by up to 0.15 %, "usage" by a whole code of some twenty; gradients or codes that are
        # not shared by the processes move SSIM by more than 3 %, or usage and perplexity by more than 60 %
        assert a.pop("usage") == pytest.approx(b.pop("usage"), rel=0.1)
        assert a == pytest.approx(b, rel=5e-3, abs=1e-4)
    assert log.count("2 x cpu") == 1  # one process speaks


@pytest.mark.parametrize("quantizer", ["ema_vq CODEBOOKS=2 RANDOM_DEPTH=0.5", "simvq"])
def test_all_processes_hold_the_same_model_with_everything_on(quantizer, tmp_path, folder):
    (tmp_path / "watched.py").write_text(WATCHED.format(root=str(ROOT), die_at=0))
    arguments = [f"DATASET={folder}", *f"QUANTIZER={quantizer}".split(), *ARGUMENTS, "GAN_WEIGHT=0.1", "GAN_START=0.2",
                 "ACCUMULATE=2"]
    code, log = launch(tmp_path, tmp_path / "watched.py", arguments)
    assert code == 0, log
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    first, second, _ = table(tmp_path)
    assert first["discriminator_loss"] > 0 and second["loss"] < first["loss"]
    if quantizer == "simvq":  # once more, when there is nothing to do
        code, log = launch(tmp_path, tmp_path / "watched.py", arguments)
        assert code == 0 and "this run is finished" in log and log.count("the group is left") == 4


def test_ema_revives_every_code_at_a_token_of_its_own(tmp_path):
    (tmp_path / "revive.py").write_text(REVIVE.format(root=str(ROOT)))
    code, log = launch(tmp_path, tmp_path / "revive.py", [])
    assert code == 0, log
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(one[k], two[k]) for k in one)
    codes, = (values for name, values in one.items() if name.endswith("_codebook.embed"))
    sizes, = (values for name, values in one.items() if name.endswith("cluster_size"))
    assert codes[0].unique(dim=0).shape[0] == 100 and sizes.min() >= 0.1 * 50 / 100


def test_all_processes_learn_from_the_images_that_the_first_found(tmp_path):
    (tmp_path / "offline.py").write_text(OFFLINE.format(root=str(ROOT)))
    code, log = launch(tmp_path, tmp_path / "offline.py", ["DATASET=auto", *ARGUMENTS, "GAN_WEIGHT=0", "STAGES=(1,)"])
    assert code == 0, log
    assert log.count("drawn images instead") == 1 and len(table(tmp_path)) == 2


def test_a_process_that_dies_ends_the_run(tmp_path, folder):
    (tmp_path / "watched.py").write_text(WATCHED.format(root=str(ROOT), die_at=4))
    code, _ = torchrun(tmp_path, tmp_path / "watched.py", [f"DATASET={folder}", *ARGUMENTS, "GAN_WEIGHT=0"])
    assert code != 0 and len(table(tmp_path)) == 1 and not list(tmp_path.glob("outputs/*/results.json"))


def test_a_wrong_constant_is_said_once(tmp_path, folder):
    code, log = launch(tmp_path, ROOT / "train.py", [f"DATASET={folder}", "BATCH_SIZE=33"])
    assert code != 0
    assert log.count("train.py: BATCH_SIZE = 33, allowed: a multiple of processes times ACCUMULATE = 2 x 1") == 1
