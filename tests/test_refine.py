"""refine.py, on a small model and a few images."""
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import refine
import search
import utils
from models import VQRAE
from utils import load_checkpoint, load_dataset, load_torch, save_checkpoint, to_float

DEFAULTS = {name: value for name, value in vars(refine).items() if name.isupper()}
WEIGHTS = {"L2_WEIGHT": 16.0, "PREDICT_WEIGHT": 0.01, "PREDICT_IMAGE": 10.0, "PERCEPTUAL_WEIGHT": (0.0, 0.01)}
PARTS = {"fsq": {"levels": [8, 6, 5]}, "ema_vq": {"codebook_size": 64, "code_dim": 8},
         "residual": {"codebook_size": 16, "code_dim": 8, "codebooks": 2}}


@pytest.fixture
def run(folder, monkeypatch):
    def run(name="ema_vq", *arguments):
        if not Path(f"{name}.pt").exists():
            model = VQRAE(quantizer=name.replace("residual", "ema_vq"), quantizer_options=PARTS[name], decoder_width=32,
                          decoder_depth=1, decoder_heads=2, adapter_depth=1, post_quant_kernel=1)
            model(to_float(load_dataset(str(folder), 32).train_images))  # in train mode: EMA-VQ's codes become tokens
            save_checkpoint(Path(f"{name}.pt"), model.set_stage(2), constants=WEIGHTS,
                            metrics={"dataset": "tiny", "psnr": 1.0})  # the decoder's before, and not to be kept
        for constant, value in DEFAULTS.items():
            monkeypatch.setattr(refine, constant, value)
        small = [f"CHECKPOINT={name}.pt", f"DATASET={folder}", "IMAGES=40", "SWEEPS=1", "EPOCHS=3", "EVAL_IMAGES=8"]
        monkeypatch.setattr(sys, "argv", ["refine.py", *small, "LEARNING_RATE=1e-3", *arguments])
        refine.main()
        path, = Path("checkpoints").glob(f"refined_*/{'ema_vq' if name == 'residual' else name}_refined.pt")
        return path

    return run


@pytest.mark.parametrize("name", PARTS)
def test_only_what_follows_the_tokens_learns(name, run, folder, capsys):
    path = run(name)
    before, after = load_checkpoint(f"{name}.pt"), load_checkpoint(path)
    images = to_float(load_dataset(str(folder), 32).test_images)
    assert torch.equal(after.encode_to_indices(images), before.encode_to_indices(images))
    learned = ("decoder.", "predictor.", "post_quant_conv.", "quantizer.project_out.", "quantizer.fsq.project_out.")
    old = before.state_dict()
    for key, value in after.state_dict().items():
        assert torch.equal(value, old[key]) != (key.startswith(learned)), key
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[:6].strip().isdigit()]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    for column in (-2, -1):
        assert float(rows[-1][column]) > float(rows[0][column]) + 0.5, rows
    assert all(float(row[-1]) >= float(row[-2]) for row in rows)
    content = load_torch(path)
    assert content["constants"] == WEIGHTS and content["metrics"] == {"dataset": "tiny"} and content["stage"] == 2


@pytest.mark.parametrize("batch", [4, 8, 13])
def test_every_loss_is_of_both_kinds_of_tokens(batch, run, monkeypatch):
    """Tokens are told apart by their values: searched ones are all 1, the encoder's 0."""
    compared, quantized = [], []
    for name in ("search_tokens", "search_dataset"):
        monkeypatch.setattr(refine, name, lambda vqrae, images, sweeps: torch.ones(len(images), 8, 8).long())
    monkeypatch.setattr(VQRAE, "encode_to_indices", lambda vqrae, images: torch.zeros(len(images), 8, 8).long())
    forward, teach = refine.Objective.forward, refine.build_encoder

    def log_tokens(objective, images, indices):
        quantized.append(indices[:, 0, 0])
        return forward(objective, images, indices)

    def build_encoder(*arguments):
        encoder = teach(*arguments)
        encoder.register_forward_pre_hook(lambda _, images: compared.append(len(images[0])))
        return encoder

    monkeypatch.setattr(refine.Objective, "forward", log_tokens)
    monkeypatch.setattr(refine, "build_encoder", build_encoder)
    run("ema_vq", f"BATCH_SIZE={batch}", "EPOCHS=1", "PRECISION=fp32")
    assert compared == [batch, (batch + 1) // 2] * (40 // batch)  # targets, then every other reconstruction
    for tokens in quantized:
        for part in (tokens, tokens[::2]):  # the pixels' and the perceptual loss
            assert abs((part == 1).sum() - (part == 0).sum()) <= 2 and part.unique().tolist() == [0, 1], part


def test_a_run_that_was_stopped_goes_on(run, tmp_path, monkeypatch, capsys):
    weights, expected = load_torch(run())["model"], capsys.readouterr().out
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    shutil.copy("ema_vq.pt", stopped)
    monkeypatch.chdir(stopped)
    save, saved = utils.save_torch, []

    def stop(path, content):
        save(path, content)
        saved.append(path.name)
        if saved == [saved[0]] or saved.count("last.pt") == 2:  # the searched tokens, and the second epoch
            raise KeyboardInterrupt

    for module in (utils, search):
        monkeypatch.setattr(module, "save_torch", stop)
    for _ in range(2):
        with pytest.raises(SystemExit, match="^\nrefine.py: stopped; the same command goes on"):
            run()
    for module in (utils, search):
        monkeypatch.setattr(module, "save_torch", save)
    again = load_torch(run())["model"]
    assert all(torch.equal(again[key], value) for key, value in weights.items())
    assert expected.splitlines()[-2] in capsys.readouterr().out
    file, = Path("data").glob("searched_*.pt")
    file.write_bytes(b"broken")  # is made again
    (next(Path("checkpoints").glob("refined_*")) / "last.pt").unlink()
    again = load_torch(run())["model"]
    assert all(torch.equal(again[key], value) for key, value in weights.items()) and os.path.getsize(file) > 100


def test_a_checkpoint_that_was_lost_is_there_again(run):
    path = run()
    weights = load_torch(path)["model"]
    path.unlink()
    again = load_torch(run())["model"]
    assert all(torch.equal(again[key], value) for key, value in weights.items())


def test_weights_that_are_not_finite_are_not_saved(run, monkeypatch):
    take_step = refine.take_step

    def overflow(optimizers, step, steps):
        take_step(optimizers, step, steps)
        if step == steps - 1:  # the last loss was finite
            optimizers[0].param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(refine, "take_step", overflow)
    with pytest.raises(SystemExit, match="^refine.py: loss or weights are not finite in epoch 3"):
        run()
    path, = Path("checkpoints").glob("refined_*/ema_vq_refined.pt")
    assert load_torch(path)["epoch"] == 2


def test_crops_are_another_run_than_whole_images(run, folder):
    run()
    with pytest.raises(ValueError, match="too many values"):  # two runs
        run("ema_vq", f"DATASET=({str(folder)!r},)", "IMAGES=8", "BATCH_SIZE=4")
    run_of = {Path(path).parent.name for path in Path("checkpoints").glob("refined_*/last.pt")}
    assert len(run_of) == 2 and len(list(Path("data").glob("searched_*.pt"))) == 2


@pytest.mark.parametrize("stage", [1, 2])
def test_the_perceptual_weight_is_that_of_the_checkpoints_stage(stage, monkeypatch):
    monkeypatch.setattr(refine, "PRECISION", "fp32")
    vqrae = VQRAE(quantizer_options={"levels": [8, 6, 5]}, decoder_width=32, decoder_depth=1).set_stage(stage).eval()
    losses = {}
    for weights in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        constants = {"L2_WEIGHT": 16.0, "PREDICT_WEIGHT": 0.0, "PREDICT_IMAGE": 0.0, "PERCEPTUAL_WEIGHT": weights}
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        losses[weights] = refine.Objective(vqrae, constants)(images, torch.zeros(2, 8, 8).long()).item()
    changed = [weights for weights, loss in losses.items() if loss != losses[0.0, 0.0]]
    assert changed == [(1.0, 0.0) if stage == 1 else (0.0, 1.0)]


@pytest.mark.parametrize("argument", ["IMAGES=0", "SWEEPS=0", "EPOCHS=1.5", "BATCH_SIZE=41", "FLIP=1", "PRECISION=fp16",
                                      "LEARNING_RATE=0", "DATASET=nowhere", "DATASET=5",
                                      "CHECKPOINT=nowhere.pt", "SIZE=3"])
def test_a_wrong_constant_is_named_in_one_line(argument, run):
    name, value = argument.split("=")
    with pytest.raises(SystemExit) as stopped:
        run("ema_vq", argument)
    line = str(stopped.value)
    assert line.startswith("refine.py: ") and name.lower() in line.lower() and value in line and "\n" not in line
    assert not Path("checkpoints").exists()


def test_a_checkpoint_that_cannot_be_refined(run):
    save_checkpoint(Path("none.pt"), VQRAE(quantizer="none", decoder_width=32, decoder_depth=1), constants=WEIGHTS)
    save_checkpoint(Path("scratch.pt"), VQRAE("scratch", decoder_width=32, decoder_depth=1), constants=WEIGHTS)
    save_checkpoint(Path("bare.pt"), VQRAE(decoder_width=32, decoder_depth=1))
    save_checkpoint(Path("weights.pt"), VQRAE(decoder_width=32, decoder_depth=1), constants={})
    for constants in ({"PERCEPTUAL": "lpips"}, {"RANDOM_DEPTH": 0.5}):
        path = Path(f"{next(iter(constants))}.pt")
        save_checkpoint(path, VQRAE(decoder_width=32, decoder_depth=1), constants=WEIGHTS | constants)
    for name, reason in (("none", "a quantizer"), ("scratch", "pretrained encoder"), ("bare", "constants"),
                         ("weights", "L2_WEIGHT"), ("PERCEPTUAL", "PERCEPTUAL = 'encoder'"),
                         ("RANDOM_DEPTH", "RANDOM_DEPTH = 0")):
        with pytest.raises(SystemExit, match=f"^refine.py: .*{name}.pt.*{reason}[^\n]*$"):
            run("ema_vq", f"CHECKPOINT={name}.pt")


def test_what_cannot_be_read_is_named_before_anything_is_searched(run, monkeypatch):
    path = run("fsq")
    path.with_name("last.pt").write_bytes(b"torn")
    monkeypatch.setattr(refine, "search_dataset", None)
    with pytest.raises(SystemExit, match="^refine.py: checkpoint .*last.pt cannot be read[^\n]*$"):
        run("fsq")

    def unreachable(*arguments):
        raise RuntimeError("weights cannot be downloaded")

    monkeypatch.setattr(refine, "build_encoder", unreachable)
    with pytest.raises(SystemExit, match="^refine.py: weights cannot be downloaded$"):
        run("fsq", "SEED=1")
