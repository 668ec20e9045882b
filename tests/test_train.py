"""train.py and muon.py: losses, optimizers, batches, start checkpoints, constants, and the files of a run."""
import copy
import csv
import functools
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, SEED, SMALL, run_script
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

import muon
import train
import utils
from data import ImageFiles, list_split, load_dataset
from models import PRETRAINED_DIR, VQRAE, PatchDiscriminator, build_encoder, load_checkpoint, save_checkpoint
from utils import evaluate, load_torch

TINY = [*SMALL, "IMAGE_SIZE=16", "GRID=4", "BATCH_SIZE=4", "EPOCH_IMAGES=8", "EVAL_IMAGES=4", "EPOCHS=(1, 1)",
        f"SEED={SEED}"]
CONSTANTS = {name: value for name, value in vars(train).items() if name.isupper() and utils.is_plain(value)}


@pytest.fixture
def main(folder, monkeypatch):
    """main("NAME=value", ...) runs train.py in this process, with a TINY model. Returns its folder in outputs/."""
    monkeypatch.setattr(utils, "plot_curves", lambda path, *_: path.touch())  # the fixture `trained` has real ones

    def run(*arguments):
        for name, value in (CONSTANTS | {"bf16": False}).items():
            monkeypatch.setattr(train, name, value)
        utils.read_constants(vars(train), [f"DATASET={folder}", *TINY], train.kinds)  # as if the file said so
        before = {*Path("outputs").glob("*")}
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with utils.one_line_errors():
            train.main()
        return next(iter({*Path("outputs").glob("*")} - before), None)

    return run


def table(outputs):
    """The rows of metrics.csv, as numbers."""
    rows = csv.DictReader((outputs / "metrics.csv").read_text().splitlines())
    return [{name: float(value) for name, value in row.items()} for row in rows]


def checkpoint(outputs, name):
    """The path of a run's checkpoint such as "stage1_best"."""
    return next(Path("checkpoints", outputs.name).glob(f"*_{name}.pt"))


def small_model(quantizer="simvq_learned", stage=1):
    """A model for 16 x 16 pixels, five images, and the frozen encoder. In stage 2 it differs from the model's."""
    model = VQRAE("cifar", quantizer, {}, 16, 4, decoder_width=32, decoder_depth=1).set_stage(stage).train()
    with torch.no_grad():  # weights that begin as zeros would stop gradients
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p) * p.requires_grad
    return model, torch.rand(5, 3, 16, 16), build_encoder("cifar", 4).eval().requires_grad_(False)


# Optimizers and losses

def test_the_learning_rate_rises_and_falls_as_a_cosine():
    weight, rates = nn.Parameter(torch.zeros(1)), []
    optimizers = {"first": torch.optim.SGD([weight], lr=8.0), "second": torch.optim.SGD([weight], lr=2.0)}
    weight.grad = torch.ones(1)
    for step in range(100):
        muon.take_step(optimizers, step, 100)
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers.values()])
    scale = [0.2, 0.4, 0.6, 0.8, *(0.5 + 0.5 * math.cos(math.pi * step / 100) for step in range(4, 100))]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(scale)[:, None] * torch.tensor([8.0, 2.0]))
    assert weight.item() == pytest.approx(-10 * sum(scale), rel=1e-4)  # both took each step


def test_muon_is_that_of_torch(monkeypatch):
    """A step changes each matrix as torch's Muon does, also a convolution's, except for the rounding of bf16."""
    monkeypatch.setattr(muon, "fast_bf16", lambda device: True)  # torch's Muon is in bf16 everywhere
    theirs = [nn.Parameter(torch.randn(shape)) for shape in ((8, 72), (8, 40), (72, 8), (10, 30), (16, 16), (8, 40))]
    ours = copy.deepcopy([theirs[0].detach().view(8, 8, 3, 3).requires_grad_(), *theirs[1:]])
    unused, options = nn.Parameter(torch.ones(3, 3)), {"lr": 0.1, "weight_decay": 0.5}
    optimizer = muon.Muon([*ours, unused], **options)
    reference = torch.optim.Muon(theirs, **options, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        before = [p.detach().clone() for p in theirs]
        for a, b in zip(ours, theirs):
            b.grad = torch.randn_like(b)
            a.data, a.grad = b.detach().view_as(a).clone(), b.grad.view_as(a).clone()
        optimizer.step()
        reference.step()
        for a, b, start in zip(ours, theirs, before):
            assert (a.view_as(b) - b).norm() < 0.03 * (b - start).norm()
    assert torch.equal(unused, torch.ones(3, 3))  # a matrix without a gradient stays


@pytest.mark.parametrize("stage", [1, 2])
def test_the_loss_is_the_weighted_sum_of_all_losses(stage):
    model, images, teacher = small_model(stage=stage)
    critic = nn.Conv2d(3, 1, 1)
    nn.init.constant_(critic.weight, 8)
    nn.init.constant_(critic.bias, -12)  # logits of images lie between -12 and 12
    losses = train.objective(model, images, teacher, None, critic, perceptual_weight=0.7, distill_weight=0.9,
                             gan_weight=0.5)
    z_q, quantizer_loss, _ = model.encode(images)
    output = model.decode(z_q)
    real, fake = critic(images), critic(output)
    expected = {
        "l2_loss": F.mse_loss(output, images), "quantizer_loss": quantizer_loss, "gan_loss": -fake.mean(),
        "perceptual_loss": F.mse_loss(teacher(output)[[0, 2, 4]], teacher(images)[[0, 2, 4]]),
        "distill_loss": F.mse_loss(model.encoder(images), teacher(images)) if stage == 2 else torch.tensor(0.0),
        "discriminator_loss": ((1 - real).relu().mean() + (1 + fake).relu().mean()) / 2}
    torch.testing.assert_close({name: losses[name] for name in expected}, expected, rtol=1e-3, atol=1e-5)
    norms = {}  # the GAN's gradient at the decoder's last layer gets the norm of the L2 loss's
    for name in ("l2_loss", "gan_loss"):
        norms[name] = torch.autograd.grad(losses[name], model.decoder.head.weight, retain_graph=True)[0].norm()
    weights = {"l2_loss": 16, "quantizer_loss": 1, "perceptual_loss": 0.7, "distill_loss": 0.9,
               "gan_loss": 0.5 * 16 * norms["l2_loss"] / (norms["gan_loss"] + 1e-4)}
    torch.testing.assert_close(losses["loss"], sum(weights[name] * losses[name] for name in weights))


def test_each_loss_teaches_the_parts_that_it_should():
    model, images, teacher = small_model(stage=2)
    losses = train.objective(model, images, teacher, None, PatchDiscriminator(16), 0.7, 0.9, 0.5)
    names, learning = zip(*model.named_parameters())
    reached = {}
    for loss in ("loss", "l2_loss", "perceptual_loss", "gan_loss", "quantizer_loss", "distill_loss"):
        gradients = torch.autograd.grad(losses[loss], learning, retain_graph=True, allow_unused=True)
        reached[loss] = {name.split(".")[0] for name, gradient in zip(names, gradients)
                         if gradient is not None and gradient.abs().max() > 0}
    tokens = {"encoder", "adapter", "quantizer"}
    image = {*tokens, "post_quant_conv", "decoder"}
    assert reached == {"loss": image, "l2_loss": image, "perceptual_loss": image, "gan_loss": image,
                       "quantizer_loss": tokens, "distill_loss": {"encoder"}}


def test_lpips_sees_all_images_clamped(main, torch_home):
    lpips = LearnedPerceptualImagePatchSimilarity("vgg").net
    model, images, teacher = small_model()
    model.decoder.head.weight.data *= 20  # most pixels are out of range
    loss = train.objective(model, images, teacher, lpips, None, 0.7, 0.9, 0.0)["perceptual_loss"]
    output = model.decode(model.encode(images)[0])
    torch.testing.assert_close(loss, lpips(2 * output.clamp(0, 1) - 1, 2 * images - 1).mean())
    assert torch.autograd.grad(loss, model.decoder.head.weight)[0].norm() > 0
    first, second = table(main("PERCEPTUAL=lpips", "PERCEPTUAL_WEIGHT=(0.1, 0)", "EPOCH_IMAGES=4"))
    assert first["perceptual_loss"] > 0 and second["perceptual_loss"] == 0  # with weight 0 it is not computed


@pytest.fixture(scope="module")
def small_vit(tmp_path_factory):
    """A ViT in a folder, as ENCODER takes it: 3 blocks of 32, patches of 4 x 4 pixels."""
    torch.manual_seed(SEED)
    path, name = tmp_path_factory.mktemp("vit"), "vit_tiny_patch16_224"
    shape = {"img_size": 32, "patch_size": 4, "depth": 3, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
    save_file({n: 5 * w for n, w in timm.create_model(name, **shape).state_dict().items()}, path / "model.safetensors")
    images = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 32, 32], "num_classes": 0}
    config = {"architecture": name, "num_classes": 0, "model_args": shape, "pretrained_cfg": images}
    (path / "config.json").write_text(json.dumps(config))
    return f"local-dir:{path}"


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("encoder", ["cifar", "vit"])
def test_muon_gets_the_matrices_of_blocks_and_adamw_all_else(encoder, optimizer, small_vit, monkeypatch):
    """Embeddings, maps into and out of blocks, and vectors are AdamW's."""
    monkeypatch.setattr(train, "OPTIMIZER", optimizer)
    monkeypatch.setattr(train, "LEARNING_RATE", (0.5, 0.25))
    model = VQRAE(small_vit if encoder == "vit" else encoder, post_quant_kernel=3, decoder_depth=1, pretrained=False)
    others = ("encoder", "quantizer", "decoder.head", "decoder.proj")
    for stage, rate in ((1, 0.5), (2, 0.25)):
        names = {id(p): name for name, p in model.set_stage(stage).named_parameters() if p.requires_grad}
        matrices = {name for name, p in model.named_parameters() if p.ndim > 1 and not name.startswith(others)}
        expected = {"adamw": {*names.values()} - matrices, "muon": matrices}
        optimizers = train.build_optimizers(model, stage)
        found = {kind: {names[id(p)] for p in x.param_groups[0]["params"]} for kind, x in optimizers.items()}
        assert found == (expected if optimizer == "muon" else {"adamw": {*names.values()}})
        assert optimizers["adamw"].defaults["lr"] == rate and optimizers[optimizer].defaults["lr"] in (rate, 2 * rate)


def test_training_is_what_the_table_of_stages_says(main, folder, monkeypatch):
    """Both stages as a plain loop: AdamW at the stage's rate, clipped gradients, the GAN after half of stage 1."""
    monkeypatch.setattr(train, "fast_bf16", lambda device: False)
    outputs = main("QUANTIZER=fsq", "OPTIMIZER=adamw", "EPOCHS=(2, 1)", "GAN_WEIGHT=0.5", "EPOCH_IMAGES=12",
                   "LEARNING_RATE=(2e-3, 5e-4)", "PERCEPTUAL_WEIGHT=(0.3, 0.2)", "DISTILL_WEIGHT=0.1")
    images, rows, norms = load_dataset(str(folder), 16).train_images, table(outputs), []
    utils.seed_everything(SEED)
    model, teacher = train.build_model(), build_encoder("cifar", 4).eval().requires_grad_(False)
    for stage, rate, epochs, perceptual_weight in ((1, 2e-3, 2, 0.3), (2, 5e-4, 1, 0.2)):
        model.set_stage(stage).train()
        utils.seed_everything(SEED, stage)
        critic, log = PatchDiscriminator(16), []
        learning = [p for p in model.parameters() if p.requires_grad]
        adamw = torch.optim.AdamW(learning, betas=(0.9, 0.95), fused=True)
        gan_adamw = torch.optim.AdamW(critic.parameters(), 2e-4, (0.5, 0.9), fused=True)
        for step in range(3 * epochs):
            if step % 3 == 0:
                batches = train.epoch_batches(images, stage, step // 3 + 1, 3)
            gan = stage == 1 and step >= 3
            losses = train.objective(model, next(batches), teacher, None, critic if gan else None, perceptual_weight,
                                     distill_weight=0.1, gan_weight=0.5)
            adamw.zero_grad()
            gan_adamw.zero_grad()
            if gan:
                losses["discriminator_loss"].backward(inputs=[*critic.parameters()], retain_graph=True)
            losses["loss"].backward(inputs=learning)
            norms.append(nn.utils.clip_grad_norm_(learning, 1.0))
            adamw.param_groups[0]["lr"] = rate * (0.5 + 0.5 * math.cos(math.pi * step / (3 * epochs)))
            adamw.step()
            if gan:
                gan_adamw.step()
            log.append([losses[name].item() for name in ("loss", "gan_loss", "discriminator_loss")])
        weights = load_torch(checkpoint(outputs, f"stage{stage}_epoch_{epochs}"))["model"]
        torch.testing.assert_close(model.state_dict(), weights, rtol=1e-4, atol=1e-4)
        logged = [[row["loss"], row["gan_loss"], row["discriminator_loss"]] for row in rows if row["stage"] == stage]
        torch.testing.assert_close(torch.tensor(logged), torch.tensor(log).view(-1, 3, 3).mean(1), rtol=1e-3, atol=1e-4)
    assert max(norms) > 1  # some were clipped


def test_accumulated_micro_batches_have_the_gradient_of_one_batch(monkeypatch):
    model, images, teacher = small_model("none", stage=2)
    monkeypatch.setattr(train, "bf16", False)
    learning, sums = train.parameters(model), []
    for micro_batches in ([images[:4]], [images[:2], images[2:4]]):
        monkeypatch.setattr(train, "ACCUMULATE", len(micro_batches))
        model.zero_grad()
        for batch in micro_batches:
            _, gradients = train.losses_and_gradients(model, teacher, None, batch, None)
            train.add_gradients(learning, gradients)
        sums.append(torch.cat([p.grad.flatten() for p in learning]))
    assert (sums[0] - sums[1]).norm() < 1e-3 * sums[0].norm()


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_a_run_ends_before_it_saves_what_is_not_finite(what, main, monkeypatch):
    train_epoch = train.train_epoch

    def break_epoch_2(model, batches, first_step, *arguments):
        losses = train_epoch(model, batches, first_step, *arguments)
        if first_step > 0 and what == "weights":
            model.decoder.head.bias.data.fill_(math.nan)
        return losses | {"loss": math.inf} if first_step > 0 and what == "loss" else losses

    monkeypatch.setattr(train, "train_epoch", break_epoch_2)
    with pytest.raises(SystemExit, match="^train.py: The loss of stage 1, epoch 2, is .*LEARNING_RATE"):
        main("EPOCHS=3")
    last, = Path("checkpoints").glob("*/last.pt")
    assert load_torch(last)["epoch"] == 1 and len([*last.parent.glob("*.pt")]) == 3
    assert load_checkpoint(*last.parent.glob("*_best.pt")).stage == 1


# Batches

@pytest.fixture
def shown(monkeypatch):
    """shown(...) -> which images are in each batch of an epoch. Pixels of image i are i."""
    images = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16)

    def batches(stage=1, epoch=1, steps=5, **constants):
        defaults = dict(BATCH_SIZE=4, ACCUMULATE=1, FLIP=False, SEED=SEED, IMAGE_SIZE=16, rank=0, ranks=1)
        for name, value in (defaults | constants).items():
            monkeypatch.setattr(train, name, value)
        return [(x[:, 0, 0, 0] * 255).round().int().tolist() for x in train.epoch_batches(images, stage, epoch, steps)]

    return batches


def test_an_epoch_shows_each_image_once_in_an_order_of_its_own(shown):
    orders = [sum(shown(**change), []) for change in ({}, {"epoch": 2}, {"stage": 2}, {"SEED": SEED + 1})]
    twice = sum(shown(steps=10), [])  # a small dataset is shown again, of a large one a part
    for order in (*orders, twice[:20], twice[20:]):
        assert sorted(order) == [*range(20)]
    assert sum(shown(), []) == orders[0] and sum(shown(steps=3), []) == orders[0][:12]
    assert len({*map(tuple, orders)}) == 4


def test_processes_and_micro_batches_share_the_images_of_a_step(shown):
    first, second = (shown(rank=rank, ranks=2, ACCUMULATE=2) for rank in (0, 1))
    for step, batch in enumerate(shown()):
        micro_batches = first[2 * step : 2 * step + 2] + second[2 * step : 2 * step + 2]
        assert sum(micro_batches, []) == batch and {*map(len, micro_batches)} == {1}


def test_crops_of_several_sizes_take_turns(folder, monkeypatch):
    """A step has one size. Test images have the largest."""
    for name, value in {"IMAGE_SIZE": (24, 16), "BATCH_SIZE": 4, "ACCUMULATE": 2, "FLIP": True}.items():
        monkeypatch.setattr(train, name, value)
    data = load_dataset(str(folder), (24, 16))
    shapes = [batch.shape for batch in train.epoch_batches(data.train_images, 1, 1, steps=3)]
    assert shapes == [(2, 3, size, size) for size in (16, 16, 24, 24, 16, 16)]
    assert data.test_images.shape[2:] == (24, 24)


# What a run leaves

def test_a_run_leaves_figures_pictures_and_checkpoints(trained):
    outputs, = (trained / "outputs").iterdir()
    rows = table(outputs)
    assert [(row["stage"], row["epoch"], row["distill_loss"] > 0) for row in rows] == [(1, 1, 0), (1, 2, 0), (2, 1, 1)]
    assert rows[0].keys() >= {"loss", "l2_loss", "psnr", "ssim", "usage", "perplexity", "images_per_second", "seconds"}
    assert rows[0]["images_per_second"] * rows[0]["seconds"] == pytest.approx(90)  # all training images
    images = {"curves", "usage", "final", "stage1_epoch_001", "stage1_epoch_002", "stage2_epoch_001"}
    assert {path.stem for path in outputs.glob("*.png") if min(Image.open(path).size) > 100} == images
    assert {path.stem for path in trained.glob("checkpoints/*/*.pt")} == {
        "last", *(f"ema_vq_stage{x}" for x in ("1_best", "1_epoch_1", "1_epoch_2", "2_best", "2_epoch_1"))}
    assert json.loads((outputs / "results.json").read_text())["constants"]["EPOCHS"] == [2, 1]


@pytest.mark.filterwarnings("ignore")  # the library's
@pytest.mark.parametrize("options", [
    "fsq", "simvq", "simvq_learned", "ddcl ACCUMULATE=2", "none", "ema_vq", "residual_vq", "product_vq CODEBOOKS=4",
    "lfq", "bsq", "rotation_vq", "residual_fsq FSQ_LEVELS=(2,2)", 'library LIBRARY={"kind":"LFQ","codebook_size":16}'])
def test_a_run_of_both_stages_ends_with_the_figures_of_its_best_checkpoint(options, main, folder):
    """Each quantizer trains. EVAL_IMAGES are measured after an epoch, and all at the end."""
    quantizer, *more = options.split()
    outputs = main(f"QUANTIZER={quantizer}", "CODEBOOK_SIZE=16", *more)
    images, rows = load_dataset(str(folder), 16).test_images, table(outputs)
    results = json.loads((outputs / "results.json").read_text())
    assert outputs.name.startswith(f"tiny_cifar_{quantizer}_") and results["run"] == outputs.name
    files = [("stage1_epoch_1", images[:4], rows[0]), ("stage2_epoch_1", images[:4], rows[1]),
             ("stage2_best", images, results)]
    for name, measured, figures in files:
        model = load_checkpoint(checkpoint(outputs, name))
        expected, *_ = evaluate(model, measured, 4)
        assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-3)
        assert model.config["quantizer"] == quantizer and model.stage == figures.get("stage", 2)
    assert (outputs / "usage.png").exists() == (quantizer != "none")
    assert (rows[0]["quantizer_loss"] == 0) == (quantizer in ("fsq", "none", "residual_fsq"))


def test_best_is_the_epoch_of_the_highest_psnr_of_its_stage(main, monkeypatch, capsys):
    """The last two epochs of a stage are kept, too. After the first epoch one reads how long the run will take."""
    psnrs, clock, train_epoch = iter([3.0, 5.0, 4.0, 2.0, 1.0]), [0], train.train_epoch

    def take_a_minute(*arguments):
        clock[0] += 60
        return train_epoch(*arguments)

    monkeypatch.setattr(utils, "psnr", lambda images, _: torch.full((len(images),), next(psnrs, 0.0)))
    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: clock[0]))
    monkeypatch.setattr(train, "train_epoch", take_a_minute)
    outputs = main("EPOCHS=(3, 2)", "EPOCH_IMAGES=4")
    assert "the whole run takes about 5.8 minutes" in capsys.readouterr().out  # 3 and 2 x 1.4
    assert [row["psnr"] for row in table(outputs)] == [3, 5, 4, 2, 1]
    for stage, epoch, kept in ((1, 2, "23"), (2, 1, "12")):
        best, same = (load_torch(checkpoint(outputs, f"stage{stage}_{x}")) for x in ("best", f"epoch_{epoch}"))
        assert (best["stage"], best["metrics"]["epoch"], best["run"]) == (stage, epoch, outputs.name)
        torch.testing.assert_close(best["model"], same["model"], rtol=0, atol=0)
        files = Path("checkpoints", outputs.name).glob(f"*stage{stage}_epoch_*")
        assert sorted(path.stem[-1] for path in files) == [*kept]
    monkeypatch.setattr(train, "load_dataset", lambda *_: pytest.fail("loaded data for a finished run"))
    assert main("EPOCHS=(3, 2)", "EPOCH_IMAGES=4") is None and "This run is finished" in capsys.readouterr().out


# Encoders and start checkpoints

def test_a_cnn_learns_in_both_stages_without_a_teacher(main):
    outputs = main("ENCODER=cnn", "IMAGE_SIZE=32", "GRID=4", "EPOCHS=(2, 1)")
    assert all(row["perceptual_loss"] == row["distill_loss"] == 0 for row in table(outputs))
    files = [load_torch(checkpoint(outputs, name)) for name in ("stage1_epoch_1", "stage1_epoch_2", "stage2_epoch_1")]
    for before, after in itertools.pairwise(file["model"] for file in files):
        assert all((before[name] != after[name]).any() for name in before if name.startswith("encoder."))


def test_a_vit_is_held_to_the_sum_of_its_layers(main, small_vit, monkeypatch):
    calls, objective = [], train.objective

    def spy(*arguments):
        calls.append(arguments)
        return objective(*arguments)

    monkeypatch.setattr(train, "objective", spy)
    outputs = main(f"ENCODER={small_vit}", "ENCODER_LAYERS=2", "LEARNING_RATE=(1e-3, 0)")
    _, images, teacher, *_ = calls[0]
    one, two = (build_encoder(small_vit, 4, layers).eval()(images) for layers in (1, 2))
    encoder = load_checkpoint(checkpoint(outputs, "stage1_best")).encoder
    torch.testing.assert_close(encoder(images), two, atol=1e-3, rtol=1e-3)
    assert F.mse_loss(teacher.float()(images), two) < 0.1 * F.mse_loss(one, two)  # the teacher may be in bf16
    assert table(outputs)[1]["distill_loss"] < 0.1 * F.mse_loss(one, two)  # nothing moved with LEARNING_RATE 0


@pytest.mark.parametrize("encoder, quantizer, grid", [("cifar", "ema_vq", 4), ("cnn", "fsq", 2),
                                                     ("cifar", "rotation_vq", 4)])
def test_a_start_checkpoint_goes_on_at_another_size(encoder, quantizer, grid, main):
    """The constants describe the same model. With images twice as large, GRID is twice as large, too."""
    constants = f"ENCODER={encoder} QUANTIZER={quantizer} FSQ_LEVELS=(5,5) DECODER_WIDTH=64 DECODER_DEPTH=2".split()
    first = main(*constants, f"GRID={grid}", "STAGES=(1,)")
    start = load_checkpoint(checkpoint(first, "stage1_best"))
    shutil.copy(checkpoint(first, "stage1_best"), "start.pt")
    outputs = main(*constants, "STAGES=(2,)", "START_CHECKPOINT=start.pt", "LEARNING_RATE=0.0", "IMAGE_SIZE=32",
                   f"GRID={2 * grid}", "BATCH_SIZE=8")  # a library quantizer's options may depend on BATCH_SIZE
    model = load_checkpoint(checkpoint(outputs, "stage2_best"))
    assert model.config == start.config | {"image_size": 32, "grid": 2 * grid}
    for (name, p), before in zip(model.named_parameters(), start.parameters()):
        assert torch.equal(p, before), name
    if quantizer == "ema_vq":
        assert (model.quantizer.codebook != start.quantizer.codebook).any()  # its moving averages go on


@pytest.mark.parametrize("quantizer", ["ema_vq", "fsq"])
def test_a_shipped_file_goes_on_with_the_constants_as_they_stand(quantizer, monkeypatch):
    start = PRETRAINED_DIR / f"vqrae_{quantizer}.pt"
    for name, value in {"QUANTIZER": quantizer, "START_CHECKPOINT": str(start), "STAGES": (2,)}.items():
        monkeypatch.setattr(train, name, value)
    assert train.build_model().config["quantizer"] == quantizer


def test_lpips_without_its_weights_is_one_sentence(monkeypatch):
    def fail(_):
        raise OSError("no connection")

    monkeypatch.setattr(train, "LearnedPerceptualImagePatchSimilarity", fail)
    monkeypatch.setattr(train, "PERCEPTUAL", "lpips")
    with pytest.raises(OSError, match="VGG16, which do not load: no connection"):
        train.build_loss_networks(VQRAE("cnn", "fsq", image_size=16, grid=4))


def test_stage_1_refuses_an_encoder_that_was_trained(main):
    """Its features come from the frozen encoder, the model's would be others."""
    model = VQRAE("cifar", "fsq", {}, 16, 4, 0, decoder_width=32, decoder_depth=1)
    arguments = ["QUANTIZER=fsq", "START_CHECKPOINT=start.pt", "EPOCH_IMAGES=4"]
    save_checkpoint("start.pt", model)
    assert main(*arguments, "STAGES=(1,)")
    next(model.encoder.parameters()).data += 0.1
    save_checkpoint("start.pt", model)
    with pytest.raises(SystemExit, match="^train.py: The encoder in start.pt was trained.*STAGES="):
        main(*arguments)
    assert main(*arguments, "STAGES=(2,)")


# Constants, in the file and on the command line

@pytest.fixture
def edited(folder):
    """edited(NAME=value, ...) writes a copy of train.py in which these constants have these values."""
    def edit(code="", **constants):
        text = (ROOT / "train.py").read_text("utf-8")
        for name, value in {"DATASET": str(folder), **constants}.items():
            line, found = f"{name} = {value!r}", re.search(rf"(?m)^{name} = .*", text)
            text = text.replace(found[0], line) if found else text.replace("SEED = 0", f"SEED = 0\n{line}")
        last = 'if __name__ == "__main__":'
        Path("train.py").write_text(text.replace(last, f"{code}\n{last}"), "utf-8")

    return edit


@pytest.fixture
def begin(edited, monkeypatch):
    """begin(*arguments, **constants) starts an edited train.py: the run's name, or the error's line."""
    def start(*arguments, **constants):
        edited(**constants)
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        monkeypatch.setattr(utils, "Run", lambda name, first_process: sys.exit(name))
        with pytest.raises(SystemExit) as end:
            runpy.run_path("train.py", run_name="__main__")
        return end.value.code

    return start


def as_argument(name, value):
    return f"{name}={value}" if name in train.kinds[str].split() else f"{name}={value!r}"


def test_a_constant_means_the_same_in_the_file_and_on_the_command_line(begin):
    """A list is as good as a tuple. Every other value makes another run."""
    run = begin(QUANTIZER="fsq", FSQ_LEVELS=[8, 6, 5])
    assert run == begin("QUANTIZER=fsq", FSQ_LEVELS=(8, 6, 5)) == begin("QUANTIZER=fsq", "FSQ_LEVELS=[8,6,5]")
    changes = [{"FSQ_LEVELS": [8, 8, 8]}, {"MY_LIST": [1]}, {"MY_LIST": [2]}, {"LIBRARY": {"kind": "no such class"}}]
    names = [begin(**({"QUANTIZER": "fsq", "FSQ_LEVELS": [8, 6, 5]} | change)) for change in changes]
    assert len({run, *names}) == 5 and all(name.startswith("tiny_cifar_fsq_") for name in names)


@pytest.mark.parametrize("name, value", [
    ("FSQ_LEVELS", "6"), ("FSQ_LEVELS", [8, 6.5]), ("EPOCHS", [1, 1, 1]), ("EPOCHS", "many"), ("EPOCHS", 0),
    ("LEARNING_RATE", [1e-3, -1e-4]), ("EPOCH_IMAGES", -1), ("FLIP", 1), ("LIBRARY", ["LFQ"]), ("STAGES", 1),
    ("STAGES", [2, 1]), ("QUANTIZER", "vq"), ("COMPILE", "on"), ("OPTIMIZER", "sgd"), ("PERCEPTUAL", "vgg"),
    ("START_CHECKPOINT", "a.pt"), ("SEED", 1753000000000000000), ("BATCH_SIZE", 0), ("BATCH_SIZE", 99999),
    ("ACCUMULATE", 0), ("CODEBOOK_SIZE", 1), ("CODEBOOKS", 0), ("EMA_DECAY", 1.0), ("POST_QUANT_KERNEL", 2),
    ("ENCODER", "cifra"), ("GRID", 0), ("GRID", 5), ("IMAGE_SIZE", [32, 50]), ("DATASET", "none"), ("DEVICE", "tpu")])
def test_a_wrong_constant_is_named_with_its_value(name, value, begin):
    """In one line, before a run begins, whether it stands in the file or on the command line."""
    line = begin(**{name: value})
    assert line.startswith(f"train.py: {name} = {tuple(value) if isinstance(value, list) else value!r}, allowed: ")
    assert "\n" not in line and line == begin(as_argument(name, value))


@pytest.mark.parametrize("constants, message", [
    ({"STAGES": [2]}, "STAGES = (2,)"), ({"ACCUMULATE": 3}, "BATCH_SIZE = 32"),
    ({"IMAGE_SIZE": 96}, "IMAGE_SIZE / GRID = 12"), ({"QUANTIZER": "ddcl", "DDCL_DELTA": 0.3}, "delta = 0.3"),
    ({"QUANTIZER": "fsq", "FSQ_LEVELS": [8, 1]}, "levels = "), ({"QUANTIZER": "library", "LIBRARY": {}}, "LIBRARY = "),
    ({"QUANTIZER": "product_vq", "CODEBOOKS": 3}, "code_dim = 16"), ({"QUANTIZER": "lfq", "CODEBOOK_SIZE": 60}, "LFQ "),
    ({"QUANTIZER": "library", "LIBRARY": {"kind": "VQ"}}, "kind = 'VQ'"),
    ({"QUANTIZER": "library", "LIBRARY": {"kind": "LFQ", "size": 8}}, "LFQ ")])
def test_constants_that_do_not_fit_each_other_end_in_one_line(constants, message, begin):
    line = begin(**constants)
    assert line.startswith(f"train.py: {message}") and "\n" not in line


@pytest.mark.parametrize("name, value, message", [
    ("QUANTIZER", "lfq", "QUANTIZER = 'lfq', allowed: fsq"), ("ENCODER", "cnn", "ENCODER = 'cnn', allowed: cifar"),
    ("FSQ_LEVELS", [8, 8], "QUANTIZER_OPTIONS = {'levels': (8, 8)}"), ("GRID", 4, "IMAGE_SIZE / GRID = 8, allowed: 4"),
    ("DECODER_WIDTH", 64, "DECODER_WIDTH = 64, allowed: 192"), ("STAGES", [1], "START_CHECKPOINT = 'start.pt', ")])
def test_a_start_checkpoint_needs_the_constants_of_its_model(name, value, message, begin):
    """In the file or on the command line."""
    save_checkpoint("start.pt", VQRAE("cifar", "fsq", {"levels": (5, 5)}, encoder_layers=0, stage=2))
    right = {"START_CHECKPOINT": "start.pt", "STAGES": [2], "QUANTIZER": "fsq", "FSQ_LEVELS": [5, 5]}
    assert begin(**right).startswith("tiny_cifar_fsq_")
    line = begin(**right | {name: value})
    assert line.startswith(f"train.py: {message}") and line == begin(as_argument(name, value), **right)


def test_help_prints_each_constant_with_its_comment(main, capsys):
    with pytest.raises(SystemExit):
        main("--help")
    printed = capsys.readouterr().out
    assert printed.startswith(train.__doc__) and "\n# training\nSTAGES = (1, 2)  # " in printed
    assert {*re.findall("^([A-Z_]+) = ", printed, re.MULTILINE)} == {*CONSTANTS}


def test_other_images_make_another_run(folder, begin):
    shutil.copytree(folder, "tiny")
    before = begin(DATASET="tiny")
    next(Path("tiny").rglob("*.png")).unlink()
    list_split.cache_clear()  # which is for one process
    assert before == begin() != begin(DATASET="tiny")


def test_defaults_are_those_of_the_chosen_device(edited, monkeypatch):
    """On a machine with a GPU, DEVICE=cpu trains as a machine without one does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(utils, "device", runpy.run_path(utils.__file__)["device"])
    defaults = []
    for argument, constants in (("SEED=0", {}), ("DEVICE=cpu", {}), ("SEED=0", {"DEVICE": "cpu"})):
        edited(**constants)
        monkeypatch.setattr(sys, "argv", ["train.py", argument])
        defaults.append([runpy.run_path("train.py")[name] for name in ("EPOCHS", "BATCH_SIZE", "FLIP")])
    assert defaults == [[(30, 10), 128, True], [(6, 4), 32, False], [(6, 4), 32, False]]


def test_a_cpu_with_a_number_is_prepared_like_any(begin):
    assert begin(DEVICE="cpu:0").startswith("tiny_") and torch.are_deterministic_algorithms_enabled()


# What a person sees

def test_an_edited_file_trains_and_prints_what_the_terminal_can_show(folder, edited):
    shutil.copytree(folder, "bäume")
    edited(DATASET="bäume", QUANTIZER="fsq", FSQ_LEVELS=[5, 5], EPOCHS=[1, 1], IMAGE_SIZE=16, GRID=4, BATCH_SIZE=4,
           EPOCH_IMAGES=8, EVAL_IMAGES=4, DECODER_WIDTH=32, DECODER_DEPTH=1)
    done = run_script(".", os.path.abspath("train.py"), environment=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout.startswith("b?ume_cifar_fsq_"), done.stderr
    assert done.stderr == ""  # a bar would fill a log file
    constants = json.loads(next(Path("outputs").glob("bäume*/results.json")).read_text())["constants"]
    assert (constants["FSQ_LEVELS"], constants["EPOCHS"]) == ([5, 5], [1, 1])


def test_a_mistake_in_ones_own_quantizer_shows_where_it_is(edited):
    edited("from quantizers import FSQ\n\n\nclass Two(FSQ):\n    def quantize(self, x):\n"
           "        return super().quantize(x)[:2]\n\n\nQUANTIZERS['two'] = Two", QUANTIZER="two", EPOCH_IMAGES=32)
    done = run_script(".", os.path.abspath("train.py"))
    assert done.returncode == 1 and "not enough values to unpack" in done.stderr.splitlines()[-1]
    assert "quantizers.py\", line " in done.stderr and "codes, loss, indices = self.quantize(" in done.stderr


def test_a_mistake_in_a_worker_shows_where_it_is(main, monkeypatch):
    monkeypatch.setattr(ImageFiles, "__getitems__", lambda self, samples: self.no_such_name)
    with pytest.raises(AttributeError, match=r"Original Traceback[\s\S]*test_train.py[\s\S]*no_such_name"):
        main("IMAGE_SIZE=(16,)")


def test_ctrl_c_ends_a_run_in_one_line(folder):
    command = [sys.executable, ROOT / "train.py", f"DATASET={folder}", *TINY, "EPOCHS=99"]
    as_in_a_terminal = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job ignores it
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          preexec_fn=as_in_a_terminal) as process:
        for line in process.stdout:
            if "the whole run takes about" in line:
                process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert process.returncode == 1 and re.fullmatch(r"train.py: stopped; the same command goes on [^\n]+\n", errors)
