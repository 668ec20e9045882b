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
from conftest import ROOT, SMALL, run_script
from torch import nn

import train
from utils import Run, load_torch, save_torch

processes = multiprocessing.get_context("forkserver")  # imports torch once for all of them
processes.set_forkserver_preload(["train", "torchmetrics.image.lpip"])
TINY = [*SMALL, "IMAGE_SIZE=16", "GRID=4", "BATCH_SIZE=8", "EPOCH_IMAGES=16", "EVAL_IMAGES=4"]


def child(folder, arguments, event, count, environment):
    """train.py in `folder`, killed before its count-th step, or before the count-th file whose name ends in `event`."""
    import models
    import muon
    import utils

    utils.plot_curves = utils.plot_usage = lambda path, *_: path.touch()  # they take longer than training does here
    os.chdir(folder)
    os.environ |= environment
    with open("log", "a") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    remaining, seen, step, replace = [event] * count, {"norms": []}, muon.take_step, os.replace

    def reach(where):
        if remaining and str(where).endswith(event):
            remaining.pop()
            remaining or os.kill(os.getpid(), signal.SIGKILL)

    muon.take_step = lambda *arguments: (reach("step"), step(*arguments))
    os.replace = lambda old, new: (reach(new), replace(old, new))
    if environment:  # of several processes: what they end with is kept
        quantize, judge, clip = models.VQRAE.quantize, models.PatchDiscriminator.forward, nn.utils.clip_grad_norm_
        muon.fast_bf16 = lambda device: False
        models.VQRAE.quantize = lambda self, z: (seen.setdefault("model", self), quantize(self, z))[1]
        models.PatchDiscriminator.forward = lambda self, x: (seen.setdefault("discriminator", self), judge(self, x))[1]
        nn.utils.clip_grad_norm_ = lambda *args: seen["norms"].append(clip(*args)) or seen["norms"][-1]
    sys.argv = ["train.py", *arguments]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    if "model" in seen:
        states = {name: x.state_dict() if isinstance(x, nn.Module) else torch.stack(x) for name, x in seen.items()}
        torch.save(states, f"rank{environment['RANK']}.pt")


def start(folder, arguments, event="", count=0, environment={}):
    folder.mkdir(exist_ok=True)
    process = processes.Process(target=child, args=(folder, arguments, event, count, environment))
    process.start()
    return process


def exit_code(process):
    process.join(300)
    return process.exitcode


def outcome(folder):
    """What a run leaves, without its times: metrics.csv, results.json, names of files; and last.pt's numbers."""
    outputs, = (folder / "outputs").iterdir()
    rows = csv.DictReader((outputs / "metrics.csv").read_text().splitlines())
    rows = [{**row, "seconds": 0, "images_per_second": 0} for row in rows]
    last = load_torch(folder / "checkpoints" / outputs.name / "last.pt")
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.name not in ("log", "lock")}
    state = {name: part.get("state", part) for name, part in last.items() if isinstance(part, dict)}
    return rows, (outputs / "results.json").read_text(), files, (last["stage"], last["epoch"]), state


KILLS = [  # each is of the run that the one before left, and after it the epoch at which the next goes on
    ("stage1_best.pt", 1, None), ("last.pt", 1, None), ("step", 4, (1, 1)), ("step", 4, (1, 2)),
    ("metrics.csv", 2, (2, 1)), ("results.json", 1, (2, 2))]


@pytest.mark.parametrize("options, kills", [
    ("EPOCHS=(2,2) CODEBOOKS=2 RANDOM_DEPTH=0.5 GAN_WEIGHT=0.5", KILLS),
    ("EPOCHS=2 STAGES=(1,) IMAGE_SIZE=(16,24)", [("step", 3, (1, 1))]),  # workers read the files
    ("EPOCHS=2 STAGES=(1,) QUANTIZER=rotation_vq", [("step", 3, (1, 1))])], ids=["all", "workers", "library"])
def test_a_run_killed_again_and_again_ends_as_if_nothing_had_been(options, kills, folder, tmp_path):
    """Bit for bit, with all that draws random numbers."""
    arguments = [f"DATASET={folder}", *TINY, "FLIP=True", *options.split()]
    assert exit_code(start(tmp_path / "whole", arguments)) == 0, (tmp_path / "whole" / "log").read_text()
    for event, count, saved in kills:
        code = exit_code(start(tmp_path / "killed", arguments, event, count))
        assert code == -signal.SIGKILL, (tmp_path / "killed" / "log").read_text()
        last = [load_torch(path) for path in tmp_path.glob("killed/checkpoints/*/last.pt")]
        assert [(file["stage"], file["epoch"]) for file in last] == ([saved] if saved else [])
    assert exit_code(start(tmp_path / "killed", arguments)) == 0
    (*expected, whole), (*found, killed) = (outcome(tmp_path / name) for name in ("whole", "killed"))
    assert found == expected and len(whole) == 5  # model, two optimizers, discriminator and its optimizer
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
    assert Path("outputs/a/metrics.csv").read_text() == "stage,epoch\n2,3\n2,4\n"


def test_a_run_goes_on_in_one_process_alone():
    run = Run("a")
    with pytest.raises(ValueError, match="goes on in another process, or checkpoints/a "):
        Run("a")
    Run("a", first_process=False), Run("b")  # the other processes of torchrun, and other runs
    Path("checkpoints/a/last.pt.1.tmp").touch()
    run.lock.release()
    Run("a")
    assert not Path("checkpoints/a/last.pt.1.tmp").exists()  # what a killed process was writing


@pytest.mark.parametrize("again", [False, True])
def test_a_run_whose_folder_is_removed_stops(again):
    run = Run("a")
    shutil.rmtree("checkpoints")
    other = Run("a") if again else None
    with pytest.raises(ValueError, match="checkpoints/a.*folder that exists until"):
        train.save_epoch(run, {"stage": 1, "epoch": 1}, None, {}, None, None)
    assert not Path("outputs").exists() and (other is None or other.epoch == 0)


def test_a_run_does_not_resume_with_other_layers():
    Run("a").save({"epoch": 1}, {"model": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="last.pt does not fit this code, change SEED: [^\n]+$"):
        Run("a", first_process=False).resume({"model": nn.Linear(2, 3)})


def test_a_last_pt_that_is_damaged_or_of_another_run_is_refused():
    for name in ("a", "b"):
        Run(name).save({"epoch": 1}, {"model": nn.Linear(2, 2)})
    last = Path("checkpoints/a/last.pt")
    content, middle = last.read_bytes(), last.stat().st_size // 2
    for damaged in (content[:middle], content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]):
        last.write_bytes(damaged)
        with pytest.raises(ValueError, match="^checkpoint checkpoints/a/last.pt cannot be read: "):
            Run("a", first_process=False)
    shutil.copy("checkpoints/b/last.pt", last)
    with pytest.raises(ValueError, match="^run = 'checkpoints/a/last.pt', allowed: "):
        Run("a", first_process=False)


def test_the_best_checkpoint_of_another_run_is_refused(trained, folder, monkeypatch):
    [shutil.copytree(trained / name, name) for name in ("outputs", "checkpoints")]
    results, = Path("outputs").glob("*/results.json")
    results.unlink()
    best, = Path("checkpoints").glob("*/ema_vq_stage2_best.pt")
    save_torch(best, load_torch(best) | {"run": "b"})
    monkeypatch.setattr(sys, "argv", ["train.py", f"DATASET={folder}", *SMALL, "EPOCHS=(2, 1)"])
    with pytest.raises(SystemExit, match=f"^train.py: checkpoint = '{best}', allowed: "):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def environments(ranks):
    """What torchrun sets for each of its processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def launch(folder, arguments, ranks):
    """What the processes of a run printed, and what each of them kept."""
    started = [start(folder, arguments, environment=environment) for environment in environments(ranks)]
    codes, log = [exit_code(process) for process in started], (folder / "log").read_text()
    assert codes == [0] * ranks, log
    return log, [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


def test_two_processes_learn_what_one_learns(folder, tmp_path):
    arguments = [f"DATASET={folder}", *TINY, "QUANTIZER=fsq", "OPTIMIZER=adamw", "LEARNING_RATE=1e-4",
                 "EPOCHS=(1, 1)", "ACCUMULATE=2"]
    _, (one,) = launch(tmp_path / "one", arguments, 1)
    log, two = launch(tmp_path / "two", arguments, 2)
    assert log.count("2 x cpu") == 1  # one process speaks
    torch.testing.assert_close(two[0], two[1], rtol=0, atol=0)
    torch.testing.assert_close(two[0], one, rtol=2e-3, atol=2e-4)
    for a, b in zip(*(outcome(tmp_path / name)[0] for name in ("one", "two"))):
        assert [*map(float, a.values())] == pytest.approx([*map(float, b.values())], rel=1e-2)


@pytest.mark.parametrize("random_depth", [0.0, 0.5])
def test_two_processes_share_codebooks_and_discriminator(random_depth, folder, tmp_path):
    arguments = [f"DATASET={folder}", *TINY, "CODEBOOKS=2", f"RANDOM_DEPTH={random_depth}", "GAN_WEIGHT=0.5",
                 "FLIP=True", "EPOCHS=(1, 1)"]
    _, (first, second) = launch(tmp_path, arguments, 2)  # model, discriminator, gradients' norms
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_both_processes_of_a_finished_run_end(trained, folder, tmp_path):
    shutil.copytree(trained / "outputs", "outputs")
    arguments = [f"DATASET={folder}", *SMALL, "EPOCHS=(2, 1)"]
    assert [exit_code(p) for p in [start(tmp_path, arguments, environment=e) for e in environments(2)]] == [0, 0]


def test_both_processes_end_where_the_first_finds_a_mistake(folder, tmp_path):
    arguments = [f"DATASET={folder}", *TINY, "BATCH_SIZE=100", "EPOCH_IMAGES=0"]
    assert [exit_code(p) for p in [start(tmp_path, arguments, environment=e) for e in environments(2)]] == [1, 1]
    assert "train.py: BATCH_SIZE = 100, allowed: at most the 90 images" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_torchrun(folder):
    command = ["torch.distributed.run", "--nproc_per_node=2", "--standalone", ROOT / "train.py", f"DATASET={folder}"]
    done = run_script(".", *command, *TINY, "EPOCHS=(1, 1)")
    assert done.returncode == 0 and done.stdout.count("2 x cpu") == 1, done.stderr
    assert [*Path("outputs").glob("*/results.json")]
