"""Runs of train.py that are killed, run twice at a time, or shared by two processes."""
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, refused
from torch import nn
from torch.distributed.elastic.utils.distributed import get_free_port

import train
import utils
from utils import Run, load_torch, save_torch

processes = multiprocessing.get_context("forkserver")  # imports torch once for all of them
processes.set_forkserver_preload(["train", "torchmetrics.image.lpip"])
STEPS = [*TINY, "BATCH_SIZE=8", "EPOCH_IMAGES=16"]


def child(folder, arguments, event, environment):
    """Run train.py in `folder`. It is killed before the file whose name ends in `event` gets this name."""
    replace = os.replace

    def rename(draft, path):
        if event and str(path).endswith(event):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(draft, path)

    os.chdir(folder)
    os.environ |= environment
    with open("log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    utils.plot_curves = utils.plot_usage = lambda path, *_: path.touch()  # they take longer than training does here
    os.replace = rename
    sys.argv = ["train.py", *arguments]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def run(folders, arguments, event=""):
    """Run train.py in a process for each folder, with what torchrun sets for it. Returns their exit codes."""
    shared = {"WORLD_SIZE": str(len(folders)), "MASTER_ADDR": "localhost", "MASTER_PORT": str(get_free_port())}
    started = []
    for rank, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(processes.Process(target=child, args=(folder, arguments, event, environment)))
        started[-1].start()
    for process, folder in zip(started, folders):
        process.join(300)
        print((folder / "log").read_text())  # pytest shows it if the test fails
    codes = [process.exitcode for process in started]  # a process that hangs has the code None
    for process in started:
        process.kill()
    return codes


def outcome(folder):
    """What a run leaves, without its times: its rows, results.json, names of files, last.pt's state."""
    outputs, = (folder / "outputs").iterdir()
    last = load_torch(folder / "checkpoints" / outputs.name / "last.pt")
    for row in last["history"]:
        del row["seconds"], row["images_per_second"]
    left = ("log", "lock", ".draft")  # a killed process leaves its draft
    files = {path.relative_to(folder) for path in folder.rglob("*") if not path.name.endswith(left)}
    state = {name: part.get("state", part) for name, part in last.items() if isinstance(part, dict)}
    return last["history"], (outputs / "results.json").read_text(), files, state


@pytest.mark.parametrize("options, kills", [
    ("EPOCHS=2 QUANTIZER=rotation_vq GAN_WEIGHT=0.5", {  # the library draws random numbers, too
        "last.pt": None, "stage1_epoch_002.png": (1, 1), "stage2_epoch_001.png": (1, 2), "results.json": (2, 2)}),
    ("EPOCHS=2 STAGES=(1,) CROP_SIZES=(16,24)", {"stage1_epoch_002.png": (1, 1)})], ids=["all", "workers"])
def test_a_run_killed_again_ends_as_if_nothing_had_been(options, kills, folder, tmp_path):
    """Bit for bit. kills: {the file before which a run is killed: the (stage, epoch) that is saved by then}"""
    arguments = [f"DATASET={folder}", *STEPS, "FLIP=True", *options.split()]
    assert run([tmp_path / "whole"], arguments) == [0]
    for event, saved in kills.items():
        assert run([tmp_path / "killed"], arguments, event) == [-signal.SIGKILL]
        last = [load_torch(path) for path in tmp_path.glob("killed/checkpoints/*/last.pt")]
        assert [(file["stage"], file["epoch"]) for file in last] == ([saved] if saved else [])
    assert run([tmp_path / "killed"], arguments) == [0]
    (*expected, whole), (*found, killed) = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
    assert found == expected
    assert whole.keys() == {"model", "discriminator", "gan_optimizer", "adamw", "muon"}
    torch.testing.assert_close(killed, whole, rtol=0, atol=0)


def test_a_run_goes_on_in_one_process_alone():
    run = Run("a")
    with refused("checkpoints/a/lock is locked: perhaps another process trains this run"):
        Run("a")
    Run("a", first_process=False)  # the other processes of torchrun
    Run("b")
    run.lock.release()
    Run("a")


def test_a_checkpoint_that_is_damaged_or_of_another_model_or_run_is_refused():
    Run("a").save({"epoch": 1}, {"model": nn.Linear(2, 2)})
    with refused("last.pt does not fit this code. Change SEED"):
        Run("a", first_process=False).resume({"model": nn.Linear(2, 3)})
    content = Path("checkpoints/a/last.pt").read_bytes()
    Path("checkpoints/b").mkdir()
    for damaged, message in ((content[:-9], "does not load. If it is damaged, delete it to begin anew"),
                             (content, "belongs to the run a")):
        Path("checkpoints/b/last.pt").write_bytes(damaged)
        with refused(f"checkpoints/b/last.pt {message}"):
            Run("b", first_process=False)
    save_torch("checkpoints/a/fsq_stage2_best.pt", {"run": "b"})
    with refused("The checkpoint .*fsq_stage2_best.pt is not from this run"):
        train.finish(Run("a", first_process=False), SimpleNamespace(config={"quantizer": "fsq"}), None)


def test_two_processes_learn_what_one_learns(folder, tmp_path):
    """One process takes four micro-batches a step, two processes two each: the same sums."""
    arguments = [f"DATASET={folder}", *STEPS, "QUANTIZER=fsq", "STAGES=(1,)", "GAN_WEIGHT=0.5", "LEARNING_RATE=0"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run([one], [*arguments, "ACCUMULATE=4"]) == [0] and run([two] * 2, [*arguments, "ACCUMULATE=2"]) == [0, 0]
    assert (two / "log").read_text().count("2 x cpu") == 1  # one process speaks
    states = [outcome(path)[-1] for path in (one, two)]
    for optimizer, average in (("adamw", "exp_avg"), ("muon", "momentum"), ("gan_optimizer", "exp_avg")):
        expected, found = [torch.cat([x[average].flatten() for x in state[optimizer].values()]) for state in states]
        # two orders of four summands differ by 6 x 2^-24 of their magnitudes, which hardly cancel 200 times
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_both_processes_end_where_the_first_finds_a_mistake(tmp_path):
    assert run([tmp_path] * 2, ["DATASET=missing", *TINY]) == [1, 1]
    log = (tmp_path / "log").read_text()
    assert log.count("train.py: There is no folder missing/train") == 2 and "Traceback" not in log
