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

import pytest
import torch
from conftest import ROOT, SEED, SMALL, refused, run_script
from torch import nn

import muon
import train
import utils
from utils import Run, load_torch, save_torch

processes = multiprocessing.get_context("forkserver")  # imports torch once for all of them
processes.set_forkserver_preload(["train", "torchmetrics.image.lpip"])
TINY = [*SMALL, "IMAGE_SIZE=16", "GRID=4", "BATCH_SIZE=8", "EPOCH_IMAGES=16", "EVAL_IMAGES=4", f"SEED={SEED}"]


def child(folder, arguments, event, environment):
    """train.py in `folder`, killed before the file whose name ends in `event` gets this name.

    With an environment it is one of several processes. It keeps all that they average, and the model.
    """
    averages, models, replace, average, build = [], [], os.replace, utils.average, muon.adamw_and_muon

    def rename(draft, path):
        if event and str(path).endswith(event):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(draft, path)

    def record_average(tensors):
        average(tensors)
        averages.append(torch.cat([x.flatten() for x in tensors]))

    def record_model(model, *arguments):
        models.append(model)
        return build(model, *arguments)

    os.chdir(folder)
    os.environ |= environment
    with open("log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    utils.plot_curves = utils.plot_usage = lambda path, *_: path.touch()  # they take longer than training does here
    os.replace, utils.average, muon.adamw_and_muon = rename, record_average, record_model
    sys.argv = ["train.py", *arguments]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    if environment and models:
        torch.save({"averages": averages, **models[-1].state_dict()}, f"rank{environment['RANK']}.pt")


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


def train_ranks(folder, arguments, ranks):
    """What each process of a run averaged and learned."""
    codes = start_ranks([folder] * ranks, arguments)
    assert codes == [0] * ranks, (folder / "log").read_text()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


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


KILLS = {  # before which file each run is killed that goes on with the last one's, and the epoch that is then saved
    "stage1_best.pt": None, "last.pt": None, "stage1_epoch_002.png": (1, 1), "stage2_epoch_001.png": (1, 2),
    "stage2_epoch_2.pt": (2, 1), "results.json": (2, 2)}
ONCE = {"stage1_epoch_002.png": (1, 1)}


@pytest.mark.parametrize("options, kills", [
    ("EPOCHS=(2,2) QUANTIZER=residual_vq CODEBOOKS=2 GAN_WEIGHT=0.5", KILLS),
    ("EPOCHS=2 STAGES=(1,) QUANTIZER=ema_vq IMAGE_SIZE=(16,24)", ONCE),  # workers read the files
    ("EPOCHS=2 STAGES=(1,) QUANTIZER=rotation_vq", ONCE)], ids=["all", "workers", "library"])
def test_a_run_killed_again_and_again_ends_as_if_nothing_had_been(options, kills, folder, tmp_path):
    """Bit for bit, with all that draws random numbers."""
    arguments = [f"DATASET={folder}", *TINY, "FLIP=True", *options.split()]
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


def test_resume_gives_the_stage_that_was_stopped_its_state_and_no_other():
    run, model, other = Run("a"), nn.Linear(2, 2), nn.Linear(2, 2)
    assert (run.stage, run.epoch, run.history, run.resume({"model": model}, 1)) == (0, 0, [], 1)
    for epoch in (3, 4):
        run.save({"stage": 2, "epoch": epoch}, {"model": model})
    again, before = Run("a", first_process=False), other.weight.clone()
    assert (again.stage, again.epoch, [row["epoch"] for row in again.history]) == (2, 4, [3, 4])
    assert again.resume({"model": other}, 1) == 1 and torch.equal(other.weight, before)
    assert again.resume({"model": other}, 2) == 5 and torch.equal(other.weight, model.weight)


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


@pytest.mark.parametrize("again", [False, True])
def test_a_run_whose_folder_is_removed_stops(again):
    run = Run("a")
    shutil.rmtree("checkpoints")
    other = Run("a") if again else None
    with refused("checkpoints/a was removed while this run was using it"):
        train.save_epoch(run, {"stage": 1, "epoch": 1}, None, {}, None, None)
    assert not Path("outputs").exists() and (other is None or other.epoch == 0)


def test_a_run_does_not_resume_with_other_layers():
    Run("a").save({"epoch": 1}, {"model": nn.Linear(2, 2)})
    with refused("last.pt does not fit this code. Change SEED"):
        Run("a", first_process=False).resume({"model": nn.Linear(2, 3)})


def test_a_last_pt_that_is_damaged_or_of_another_run_is_refused():
    for name in ("a", "b"):
        Run(name).save({"epoch": 1}, {"model": nn.Linear(2, 2)})
    last = Path("checkpoints/a/last.pt")
    content, middle = last.read_bytes(), last.stat().st_size // 2
    for damaged in (content[:middle], content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]):
        last.write_bytes(damaged)
        with refused("checkpoints/a/last.pt cannot be read"):
            Run("a", first_process=False)
    shutil.copy("checkpoints/b/last.pt", last)
    with refused("checkpoints/a/last.pt belongs to the run b"):
        Run("a", first_process=False)


def test_the_best_checkpoint_of_another_run_is_refused(trained, folder, monkeypatch):
    for name in ("outputs", "checkpoints"):
        shutil.copytree(trained / name, name)
    results, = Path("outputs").glob("*/results.json")
    results.unlink()
    best, = Path("checkpoints").glob("*/ema_vq_stage2_best.pt")
    save_torch(best, load_torch(best) | {"run": "b"})
    monkeypatch.setattr(sys, "argv", ["train.py", f"DATASET={folder}", *SMALL, "EPOCHS=(2, 1)"])
    with pytest.raises(SystemExit, match=f"^train.py: The checkpoint {best} is not from this run"):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def test_two_processes_learn_what_one_learns(folder, tmp_path):
    """One process takes four micro-batches a step, and two processes take two each: the same sums in another order."""
    arguments = [f"DATASET={folder}", *TINY, "QUANTIZER=fsq", "GAN_WEIGHT=0.5", "EPOCHS=1", "LEARNING_RATE=0"]
    one, = train_ranks(tmp_path / "one", [*arguments, "ACCUMULATE=4"], 1)
    first, second = train_ranks(tmp_path / "two", [*arguments, "ACCUMULATE=2"], 2)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert (tmp_path / "two" / "log").read_text().count("2 x cpu") == 1  # one process speaks
    assert len(one["averages"]) == 6  # in each stage the gradients of two steps, and the losses
    for expected, found in zip(one["averages"], first["averages"]):
        # Two orders of four summands differ by 6 x 2^-24 of their magnitudes. Magnitudes cancel, but hardly 20 times.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


LIBRARY = {"kind": "VectorQuantize", "codebook_size": 16, "kmeans_init": True, "threshold_ema_dead_code": 1}


@pytest.mark.parametrize("options", [
    ["QUANTIZER=ema_vq", "GAN_WEIGHT=0.5"], ["QUANTIZER=residual_vq"], ["QUANTIZER=simvq"],
    ["QUANTIZER=library", f"LIBRARY={LIBRARY}"]], ids=lambda options: options[0])
def test_two_processes_share_codebooks_and_discriminator(options, folder, tmp_path):
    """Each process sees images of its own, but all learn the same, and codebooks count the tokens of all."""
    arguments = [f"DATASET={folder}", *TINY, "FLIP=True", "EPOCHS=1", *options]
    first, second = train_ranks(tmp_path, arguments, 2)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for name, counts in first.items():
        if name.endswith("cluster_size"):  # a step has 8 images of 4 x 4 tokens; a dead code restarts with a count of 1
            assert 128 <= counts.sum().item() <= 128 + 4 * 16


def test_processes_that_do_not_share_a_disk_end_at_once(folder, tmp_path):
    """The first would resume after an epoch, and the second start anew."""
    arguments = [f"DATASET={folder}", *TINY, "EPOCHS=2"]
    assert exit_code(start(tmp_path / "first", arguments, "stage1_epoch_002.png")) == -signal.SIGKILL
    assert start_ranks([tmp_path / "first", tmp_path / "second"], arguments) == [1, 1]
    for name in ("first", "second"):
        *_, line = (tmp_path / name / "log").read_text().splitlines()
        assert line.startswith("train.py: Processes do not agree on the run: ") and "a common disk" in line
    assert not [*tmp_path.glob("second/outputs/*")]


def test_both_processes_of_a_finished_run_end(trained, folder, tmp_path):
    shutil.copytree(trained / "outputs", "outputs")
    assert start_ranks([tmp_path] * 2, [f"DATASET={folder}", *SMALL, "EPOCHS=(2, 1)"]) == [0, 0]
    assert (tmp_path / "log").read_text().count("This run is finished") == 1


def test_both_processes_end_where_the_first_finds_a_mistake(folder, tmp_path):
    assert start_ranks([tmp_path] * 2, [f"DATASET={folder}", *TINY, "BATCH_SIZE=100", "EPOCH_IMAGES=0"]) == [1, 1]
    assert "train.py: BATCH_SIZE = 100, allowed: at most the 90 images" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_torchrun(folder):
    command = ["torch.distributed.run", "--nproc_per_node=2", "--standalone", ROOT / "train.py", f"DATASET={folder}"]
    done = run_script(".", *command, *TINY, "EPOCHS=1")
    assert done.returncode == 0 and done.stdout.count("2 x cpu") == 1, done.stderr
    assert [*Path("outputs").glob("*/results.json")]
