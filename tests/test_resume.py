"""Runs of train.py that are killed, run twice at a time, or shared by two processes: what they leave in the end."""
import csv
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, TINY, refused, run_script
from torch import nn

import muon
import train
import utils
from utils import Run, load_torch, save_torch

processes = multiprocessing.get_context("forkserver")  # imports torch once for all of them
processes.set_forkserver_preload(["train", "torchmetrics.image.lpip"])
STEPS = [*TINY, "BATCH_SIZE=8", "EPOCH_IMAGES=16"]


def child(folder, arguments, event, environment):
    """train.py in `folder`, killed before the file whose name ends in `event` gets this name.

    With an environment it is one of several processes, and keeps its model.
    """
    models, replace, build = [], os.replace, muon.adamw_and_muon

    def rename(draft, path):
        if event and str(path).endswith(event):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(draft, path)

    def record_model(model, *arguments):
        models.append(model)
        return build(model, *arguments)

    os.chdir(folder)
    os.environ |= environment
    with open("log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    utils.plot_curves = utils.plot_usage = lambda path, *_: path.touch()  # they take longer than training does here
    os.replace, muon.adamw_and_muon = rename, record_model
    sys.argv = ["train.py", *arguments]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    if environment and models:
        torch.save(models[-1].state_dict(), f"rank{environment['RANK']}.pt")


def start(folder, arguments, event="", environment={}):
    folder.mkdir(exist_ok=True)
    process = processes.Process(target=child, args=(folder, arguments, event, environment))
    process.start()
    return process


def exit_code(process):
    """None for a process that hangs."""
    process.join(300)
    code = process.exitcode
    process.kill()
    return code


def start_ranks(folders, arguments):
    """A process in each folder, with what torchrun sets for it. Returns their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(len(folders)), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    environments = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(len(folders))]
    started = [start(folder, arguments, environment=environment) for folder, environment in zip(folders, environments)]
    return [exit_code(process) for process in started]


def outcome(folder):
    """What a run leaves, without its times: metrics.csv, results.json, names of files; and last.pt's numbers."""
    outputs, = (folder / "outputs").iterdir()
    rows = [*csv.DictReader((outputs / "metrics.csv").read_text().splitlines())]
    for row in rows:
        del row["seconds"], row["images_per_second"]
    last = load_torch(folder / "checkpoints" / outputs.name / "last.pt")
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.name not in ("log", "lock")}
    state = {name: part.get("state", part) for name, part in last.items() if isinstance(part, dict)}
    return rows, (outputs / "results.json").read_text(), files, (last["stage"], last["epoch"]), state


AGAIN = {  # before which file each run is killed that goes on with the last one's, and the epoch that is then saved
    "last.pt": None, "stage1_epoch_002.png": (1, 1), "stage2_epoch_001.png": (1, 2), "results.json": (2, 2)}


@pytest.mark.parametrize("options, kills", [
    ("EPOCHS=2 QUANTIZER=rotation_vq GAN_WEIGHT=0.5", AGAIN),  # the library draws random numbers, too
    ("EPOCHS=2 STAGES=(1,) IMAGE_SIZE=(16,24)", {"stage1_epoch_002.png": (1, 1)})], ids=["all", "workers"])
def test_a_run_killed_again_and_again_ends_as_if_nothing_had_been(options, kills, folder, tmp_path):
    """Bit for bit, with all that draws random numbers."""
    arguments = [f"DATASET={folder}", *STEPS, "FLIP=True", *options.split()]
    assert exit_code(start(tmp_path / "whole", arguments)) == 0, (tmp_path / "whole" / "log").read_text()
    for event, saved in kills.items():
        code = exit_code(start(tmp_path / "killed", arguments, event))
        assert code == -signal.SIGKILL, (tmp_path / "killed" / "log").read_text()
        last = [load_torch(path) for path in tmp_path.glob("killed/checkpoints/*/last.pt")]
        assert [(file["stage"], file["epoch"]) for file in last] == ([saved] if saved else [])
    assert exit_code(start(tmp_path / "killed", arguments)) == 0
    (*expected, whole), (*found, killed) = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
    assert found == expected
    assert whole.keys() == {"model", "discriminator", "gan_optimizer", "adamw", "muon"}
    torch.testing.assert_close(killed, whole, rtol=0, atol=0)


def test_a_run_goes_on_in_one_process_alone():
    run = Run("a")
    with refused("checkpoints/a cannot be locked: perhaps another process trains this run"):
        Run("a")
    Run("a", first_process=False)  # the other processes of torchrun
    Run("b")
    Path("checkpoints/a/last.pt.1.tmp").touch()
    run.lock.release()
    Run("a")
    assert not Path("checkpoints/a/last.pt.1.tmp").exists()  # what a killed process was writing


def test_a_run_whose_folder_is_removed_stops():
    run = Run("a")
    shutil.rmtree("checkpoints")
    for _ in range(2):  # the second time another process has begun the run anew
        with refused("checkpoints/a was removed while this run was using it"):
            train.save_epoch(run, {"stage": 1, "epoch": 1}, None, {}, None, None)
        assert Run("a").epoch == 0 and not Path("outputs").exists()


def test_a_run_does_not_resume_with_other_layers():
    Run("a").save({"epoch": 1}, {"model": nn.Linear(2, 2)})
    with refused("last.pt does not fit this code. Change SEED"):
        Run("a", first_process=False).resume({"model": nn.Linear(2, 3)})


def test_a_last_pt_that_is_damaged_or_of_another_run_is_refused():
    Run("b").save({"epoch": 1}, {"model": nn.Linear(2, 2)})
    content = Path("checkpoints/b/last.pt").read_bytes()
    for damaged, message in ((content[:-9], "cannot be read"), (content, "belongs to the run b")):
        Path("checkpoints/a").mkdir(exist_ok=True)
        Path("checkpoints/a/last.pt").write_bytes(damaged)
        with refused(f"checkpoints/a/last.pt {message}"):
            Run("a", first_process=False)


def test_the_best_checkpoint_of_another_run_is_refused():
    save_torch("checkpoints/a/fsq_stage2_best.pt", {"run": "b"})
    with refused("The checkpoint .*fsq_stage2_best.pt is not from this run"):
        train.finish(Run("a"), SimpleNamespace(config={"quantizer": "fsq"}), None)


# Several processes

def train_ranks(folder, arguments, ranks):
    """The model of each process of a run."""
    codes = start_ranks([folder] * ranks, arguments)
    assert codes == [0] * ranks, (folder / "log").read_text()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


def gradients(folder):
    """The moving averages of gradients in a run's optimizers, an optimizer after the other."""
    *_, last = outcome(folder)
    return [torch.cat([state[average].flatten() for state in last[optimizer].values()])
            for optimizer, average in (("adamw", "exp_avg"), ("muon", "momentum"), ("gan_optimizer", "exp_avg"))]


def test_two_processes_learn_what_one_learns(folder, tmp_path):
    """One process takes four micro-batches a step, and two processes take two each: the same sums in another order."""
    arguments = [f"DATASET={folder}", *STEPS, "QUANTIZER=fsq", "STAGES=(1,)", "GAN_WEIGHT=0.5", "LEARNING_RATE=0"]
    train_ranks(tmp_path / "one", [*arguments, "ACCUMULATE=4"], 1)
    train_ranks(tmp_path / "two", [*arguments, "ACCUMULATE=2"], 2)
    assert (tmp_path / "two" / "log").read_text().count("2 x cpu") == 1  # one process speaks
    for expected, found in zip(gradients(tmp_path / "one"), gradients(tmp_path / "two")):
        # Two orders of four summands differ by 6 x 2^-24 of their magnitudes. Magnitudes cancel, but hardly 200 times.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_two_processes_share_codebooks_and_discriminator(folder, tmp_path):
    """Each process sees images of its own, but all learn the same."""
    options = ["QUANTIZER=residual_vq", "GAN_WEIGHT=0.5", "FLIP=True"]
    first, second = train_ranks(tmp_path, [f"DATASET={folder}", *STEPS, *options], 2)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_processes_that_do_not_share_a_disk_end_at_once(trained, folder, tmp_path):
    """The first would resume after the last epoch, and the second start anew."""
    shutil.copytree(trained, tmp_path / "first")
    next(tmp_path.glob("first/outputs/*/results.json")).unlink()
    folders = [tmp_path / "first", tmp_path / "second"]
    assert start_ranks(folders, [f"DATASET={folder}", *SMALL, "EPOCHS=(2, 1)"]) == [1, 1]
    for path in folders:
        *_, line = (path / "log").read_text().splitlines()
        assert line.startswith("train.py: Processes do not agree on the run: ") and "a common disk" in line
    assert not [*tmp_path.glob("second/outputs/*")]


def test_both_processes_end_where_the_first_finds_a_mistake(folder, tmp_path):
    assert start_ranks([tmp_path] * 2, [f"DATASET={folder}", *TINY, "BATCH_SIZE=100", "EPOCH_IMAGES=0"]) == [1, 1]
    assert "train.py: BATCH_SIZE = 100, allowed: at most the 90 images" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_torchrun(folder):
    command = ["torch.distributed.run", "--nproc_per_node=2", "--standalone", ROOT / "train.py", f"DATASET={folder}"]
    done = run_script(".", *command, *STEPS)
    assert done.returncode == 0 and done.stdout.count("2 x cpu") == 1, done.stderr
    assert [*Path("outputs").glob("*/results.json")]
