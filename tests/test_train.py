"""train.py and muon.py: losses, optimizers, batches, start checkpoints, constants, and the files of a run."""
import copy
import csv
import itertools
import json
import math
import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SEED, refused
from PIL import Image
from torch import nn
from torchvision.models.vgg import VGG, VGG16_Weights

import models
import muon
import train
import utils
from data import load_dataset
from models import PRETRAINED_DIR, VQRAE, PatchDiscriminator, build_encoder, load_checkpoint, save_checkpoint
from utils import evaluate, load_torch

START = {"START_CHECKPOINT": f"{PRETRAINED_DIR}/vqrae_ema_vq.pt", "STAGES": [2]}
FSQ = {"QUANTIZER": "fsq", "START_CHECKPOINT": f"{PRETRAINED_DIR}/vqrae_fsq.pt"}


def table(outputs):
    rows = csv.DictReader((outputs / "metrics.csv").read_text().splitlines())
    return [{name: float(value) for name, value in row.items()} for row in rows]


def checkpoint(outputs, name):
    return next(Path("checkpoints", outputs.name).glob(f"*_{name}.pt"))


def small_model(quantizer="simvq", stage=1):
    """A model for 16 x 16 pixels, five images, and the frozen encoder, in stage 2 another."""
    model = VQRAE("cifar", quantizer, {}, 16, 4, decoder_width=32, decoder_depth=1).set_stage(stage).train()
    with torch.no_grad():  # weights that begin as zeros would stop gradients
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p) * p.requires_grad
    teacher = build_encoder("cifar", 4).eval().requires_grad_(False)
    return model, torch.rand(5, 3, 16, 16), model.encoder if stage == 1 else teacher


@pytest.mark.parametrize("stage, own", [(1, True), (2, True), (2, False)])
def test_the_loss_is_the_weighted_sum_of_all_losses(stage, own, change):
    change(train, PERCEPTUAL_WEIGHT=0.7, DISTILL_WEIGHT=0.9, GAN_WEIGHT=0.5)
    model, images, frozen = small_model(stage=stage)
    network = frozen if own else nn.Conv2d(3, 5, 1).requires_grad_(False)  # of the perceptual loss
    critic = nn.Conv2d(3, 1, 1)
    nn.init.constant_(critic.weight, 8)
    nn.init.constant_(critic.bias, -12)  # logits of images lie between -12 and 12
    losses = train.objective(model, images, frozen, network, critic)
    z_q, quantizer_loss, _ = model.encode(images)
    output = model.decode(z_q)
    real, fake = critic(images), critic(output)
    expected = {"l2_loss": F.mse_loss(output, images), "quantizer_loss": quantizer_loss, "gan_loss": -fake.mean(),
                "discriminator_loss": ((1 - real).relu().mean() + (1 + fake).relu().mean()) / 2,
                "perceptual_loss": F.mse_loss(network(output)[[0, 2, 4]], network(images)[[0, 2, 4]]),
                "distill_loss": F.mse_loss(model.encoder(images), frozen(images)) if stage == 2 else torch.tensor(0.0)}
    l2, gan = [torch.autograd.grad(expected[name], model.decoder.head.weight, retain_graph=True)[0].norm()
               for name in ("l2_loss", "gan_loss")]
    weights = {"l2_loss": 16, "quantizer_loss": 1, "perceptual_loss": 0.7, "distill_loss": 0.9,
               "gan_loss": 0.5 * 16 * l2 / (gan + 1e-4)}  # as if both had one norm at the decoder's last layer
    expected["loss"] = sum(weight * expected[name] for name, weight in weights.items())
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-5)
    learning = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected["loss"], learning, retain_graph=True)
    gradients += torch.autograd.grad(expected["discriminator_loss"], [*critic.parameters()])
    (losses["loss"] + losses["discriminator_loss"]).backward()  # each part learns from its own loss alone
    found = tuple(p.grad for p in [*learning, *critic.parameters()])
    torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-5)
    assert all(gradient.any() for gradient in gradients)  # each parameter learns


def test_lpips_sees_all_images_clamped(change, monkeypatch):
    monkeypatch.setattr(VGG16_Weights, "get_state_dict", lambda *_, **__: {})
    monkeypatch.setattr(VGG, "load_state_dict", lambda *_: None)  # random weights stay
    change(train, PERCEPTUAL="lpips")
    model, images, frozen = small_model("none")  # rounding cannot move a token
    _, lpips = train.build_loss_networks(model)
    model.decoder.head.weight.data *= 20  # most pixels are out of range
    losses = []
    for weight in (0.7, 0.0):
        change(train, PERCEPTUAL_WEIGHT=weight)
        losses.append(train.objective(model, images, frozen, lpips, None)["perceptual_loss"])
    output = model.decode(model.encode(images)[0])
    expected = lpips(2 * output.clamp(0, 1) - 1, 2 * images - 1).mean()
    torch.testing.assert_close(losses[0], expected)
    assert expected > 0 and losses[1] == 0  # with weight 0 it is not computed


def test_the_learning_rate_rises_and_falls_as_a_cosine():
    weight, rates = nn.Parameter(torch.zeros(1)), []
    optimizer = torch.optim.SGD([weight], lr=8.0)
    weight.grad = torch.ones(1)
    for step in range(100):
        muon.take_step({"sgd": optimizer}, step, 100)
        rates.append(optimizer.param_groups[0]["lr"])
    expected = [1.6, 3.2, 4.8, 6.4, *(4 + 4 * math.cos(math.pi * step / 100) for step in range(4, 100))]
    assert rates == pytest.approx(expected) and weight.item() == pytest.approx(-sum(expected), rel=1e-4)


def test_muon_is_that_of_torch(monkeypatch):
    """Steps change each matrix as torch's Muon does, also a convolution's, except for the rounding of bf16."""
    monkeypatch.setattr(muon, "fast_bf16", lambda device: True)  # torch's Muon is in bf16 everywhere
    theirs = [nn.Parameter(torch.randn(shape)) for shape in ((8, 72), (8, 40), (72, 8), (10, 30), (16, 16), (8, 40))]
    ours = copy.deepcopy([theirs[0].detach().view(8, 8, 3, 3).requires_grad_(), *theirs[1:]])
    unused, options = nn.Parameter(torch.ones(3, 3)), {"lr": 0.1, "weight_decay": 0.5}
    optimizer = muon.Muon([*ours, unused], **options)
    reference = torch.optim.Muon(theirs, **options, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    before = copy.deepcopy(theirs)
    for _ in range(5):
        for a, b in zip(ours, theirs):
            b.grad = torch.randn_like(b)
            a.grad = b.grad.view_as(a).clone()
        optimizer.step()
        reference.step()
    for a, b, start in zip(ours, theirs, before):
        assert (a.view_as(b) - b).norm() < 0.03 * (b - start).norm()
    assert torch.equal(unused, torch.ones(3, 3))  # a matrix without a gradient stays


@pytest.mark.parametrize("encoder, stage, rate", [
    ("cifar", 1, 0.5), ("cifar", 2, 0.25), ("vit_tiny_patch16_224", 1, 0.5)])
def test_muon_gets_the_matrices_of_blocks_and_adamw_all_else(encoder, stage, rate, change):
    change(train, LEARNING_RATE=(0.5, 0.25), OPTIMIZER="muon")
    model = VQRAE(encoder, post_quant_kernel=3, decoder_depth=1, pretrained=False).set_stage(stage)
    optimizers = train.build_optimizers(model, stage)
    for name, p in model.named_parameters():
        found = [kind for kind, x in optimizers.items() if any(p is other for other in x.param_groups[0]["params"])]
        matrix = p.ndim > 1 and not name.startswith(("encoder", "quantizer", "decoder.head", "decoder.proj"))
        assert found == ["muon" if matrix else "adamw"] * p.requires_grad, name
    assert optimizers["adamw"].defaults["lr"] == rate and optimizers["muon"].defaults["lr"] == 2 * rate


@pytest.mark.parametrize("name, size, crops, ranks, value", [  # a batch has 2,048 tokens, with the larger crops 8,192
    ("rotation_vq", 1024, (), 1, 0.2), ("rotation_vq", 1024, (), 2, 0.2), ("lfq", 2**10, (), 1, 1),
    ("lfq", 2**16, (), 1, 256 / 2048), ("lfq", 2**24, (), 1, 2 / 2048), ("lfq", 2**14, (64, 32), 1, 1024 / 8192)])
def test_options_that_follow_from_the_batch(name, size, crops, ranks, value, change):
    change(train, QUANTIZER=name, CODEBOOK_SIZE=size, CROP_SIZES=crops, ranks=ranks, BATCH_SIZE=32)
    option = "frac_per_sample_entropy" if name == "lfq" else "threshold_ema_dead_code"
    assert train.quantizer_options()[option] == pytest.approx(value)


def test_training_is_what_the_table_of_stages_says(main, folder, change):
    """A plain loop does the same: clipped gradients, the stage's constants, a GAN in stage 1's second half."""
    change(train, fast_bf16=lambda device: False)
    outputs = main("QUANTIZER=fsq", "OPTIMIZER=adamw", "EPOCHS=(2, 1)", "GAN_WEIGHT=0.5",
                   "LEARNING_RATE=(2e-3, 5e-4)", "PERCEPTUAL_WEIGHT=(0.3, 0.2)", "DISTILL_WEIGHT=0.1")
    images, rows, norms = load_dataset(str(folder), 16).train_images, table(outputs), []
    utils.seed_everything(SEED)
    model, teacher = train.build_model(), build_encoder("cifar", 4).eval().requires_grad_(False)
    teacher.to(memory_format=torch.channels_last)
    for stage, epochs, rate in ((1, 2, 2e-3), (2, 1, 5e-4)):
        model.set_stage(stage).train()
        utils.seed_everything(SEED, stage)
        critic, learning = PatchDiscriminator(16), [p for p in model.parameters() if p.requires_grad]
        adamw = torch.optim.AdamW(learning, betas=(0.9, 0.95), fused=True)
        gan_adamw = torch.optim.AdamW(critic.parameters(), 2e-4, (0.5, 0.9), fused=True)
        for epoch in range(1, epochs + 1):
            gan, log = (stage, epoch) == (1, 2), []
            for step, batch in enumerate(train.stage_batches(images, stage, [epoch], 2), 2 * epoch - 2):
                losses = train.objective(model, batch, teacher, teacher, critic if gan else None)
                if gan:
                    losses["discriminator_loss"].backward(inputs=[*critic.parameters()])
                losses["loss"].backward(inputs=learning)
                log.append(torch.stack([*losses.values()]).detach())
                norms.append(nn.utils.clip_grad_norm_(learning, 1.0))
                adamw.param_groups[0]["lr"] = rate * (0.5 + 0.5 * math.cos(math.pi * step / (2 * epochs)))
                for optimizer in (adamw, gan_adamw):
                    optimizer.step()
                    optimizer.zero_grad()
            expected, row = torch.stack(log).mean(0).tolist(), rows.pop(0)
            assert [row[name] for name in losses] == pytest.approx(expected, rel=1e-3, abs=1e-4)
        weights = load_torch(checkpoint(outputs, f"stage{stage}_epoch_{epochs}"))["model"]
        torch.testing.assert_close(model.state_dict(), weights, rtol=1e-4, atol=1e-4)
    assert max(norms) > 1  # some were clipped


def test_micro_batches_have_the_gradient_of_one_batch(main, change):
    change(train, fast_bf16=lambda device: False)
    sums = []
    for count in (1, 2):
        outputs = main("QUANTIZER=none", f"ACCUMULATE={count}", "EPOCH_IMAGES=4", "STAGES=(1,)", "LEARNING_RATE=0")
        last = load_torch(f"checkpoints/{outputs.name}/last.pt")
        moments = [*last["adamw"]["state"].values(), *last["muon"]["state"].values()]
        sums.append(torch.cat([x.get("exp_avg", x.get("momentum")).flatten() for x in moments]))  # parts of gradients
    assert (sums[0] - sums[1]).norm() < 1e-3 * sums[0].norm() and not (outputs / "usage.png").exists()  # without codes


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


def test_best_is_the_epoch_of_the_highest_psnr_of_its_stage(main, folder, monkeypatch, capsys):
    """The last two epochs are kept, too. results.json measures the best, and ends the run."""
    psnrs, options = iter([3.0, 5.0, 4.0, 2.0, 1.0]), "QUANTIZER=product_vq CODEBOOKS=4 CODEBOOK_SIZE=16 ACCUMULATE=2"
    monkeypatch.setattr(utils, "psnr", lambda images, _: torch.full((len(images),), next(psnrs, 0.0)))
    arguments = [*options.split(), "EPOCHS=(3, 2)", "EPOCH_IMAGES=4", "EVAL_IMAGES=2", "PERCEPTUAL="]
    outputs = main(*arguments)
    assert len(re.findall("(?m)^ +[12] +[123] ", capsys.readouterr().out)) == 5  # a line for each epoch
    for stage, epoch, kept in ((1, 2, "23"), (2, 1, "12")):
        best, same = (load_torch(checkpoint(outputs, f"stage{stage}_{x}")) for x in ("best", f"epoch_{epoch}"))
        assert best["run"] == outputs.name and best["metrics"] == same["metrics"]
        torch.testing.assert_close(best["model"], same["model"], rtol=0, atol=0)
        files = Path("checkpoints", outputs.name).glob(f"*stage{stage}_epoch_*")
        assert sorted(path.stem[-1] for path in files) == [*kept]
    results, images = json.loads((outputs / "results.json").read_text()), load_dataset(str(folder), 16).test_images
    names, rows = ("stage1_best", "stage2_epoch_2", "stage2_best"), table(outputs)
    for name, count, figures in zip(names, (2, 2, None), (rows[1], rows[4], results)):
        model = load_checkpoint(checkpoint(outputs, name))
        expected = evaluate(model, images[:count], 4)[0] | {"psnr": figures["psnr"]}
        assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert (model.quantizer.codebook_size, model.stage) == (16**4, figures.get("stage", 2))
    last = evaluate(load_checkpoint(checkpoint(outputs, "stage2_epoch_2")), images, 4)[0]
    assert results["ssim"] != pytest.approx(last["ssim"], abs=1e-6) and results["run"] == outputs.name
    assert not any(row["perceptual_loss"] for row in rows)
    assert main(*arguments) is None and "This run is finished" in capsys.readouterr().out


def test_a_run_that_diverges_ends_before_it_saves_and_within_100_steps(main, change, capsys):
    with pytest.raises(SystemExit, match=r"^train.py: In .* step 1, the loss is \d.* weights .*LEARNING_RATE"):
        main("LEARNING_RATE=1e300", "EPOCH_IMAGES=4")  # the loss of the only step is finite
    assert not [*Path("checkpoints").glob("*/*.pt")]
    calls = itertools.count(1)  # a NaN comes in the second epoch, and the first one's files stay
    change(train, objective=lambda model, *_: dict.fromkeys(
        ("loss", "discriminator_loss"), model.decoder.head.bias.sum() + (math.nan if next(calls) > 210 else 1)))
    with pytest.raises(SystemExit, match="^train.py: In stage 1, epoch 2, .* nan"):
        main("OPTIMIZER=adamw", "EPOCH_IMAGES=410", "BATCH_SIZE=2", "EPOCHS=3")
    assert next(calls) == 306 and re.search(r"(?m)^ +1 +1 +[\d.]+ +\(step 200 of 205\)$", capsys.readouterr().out)
    assert load_torch(*Path("checkpoints").glob("*/last.pt"))["epoch"] == 1


def test_an_epoch_shows_each_image_once_in_an_order_of_its_own(change):
    images = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16)

    def shown(stage=1, epochs=(1,), steps=5, seed=SEED):  # in their order; pixels of image i are i
        change(train, SEED=seed, BATCH_SIZE=4, FLIP=False, IMAGE_SIZE=16)
        return (torch.cat([*train.stage_batches(images, stage, epochs, steps)])[:, 0, 0, 0] * 255).round().tolist()
    orders = [shown(**options) for options in ({}, {"epochs": (2,)}, {"stage": 2}, {"seed": SEED + 1})]
    twice = shown(steps=10)  # a small dataset is shown again, of a large one a part
    for order in (*orders, twice[:20], twice[20:]):
        assert sorted(order) == [*range(20)]
    assert shown() == orders[0] and shown(steps=3) == orders[0][:12] and shown(epochs=(1, 2)) == sum(orders[:2], [])
    assert len({*map(tuple, orders)}) == 4


def test_crops_of_several_sizes_take_turns(folder, change):
    change(train, CROP_SIZES=(24, 16), BATCH_SIZE=4, ACCUMULATE=2)
    data = load_dataset(str(folder), 16, (24, 16))
    shapes = [batch.shape for batch in train.stage_batches(data.train_images, 1, [1], steps=3)]
    assert shapes == [(2, 3, size, size) for size in (16, 16, 24, 24, 16, 16)]
    assert data.test_images.shape[2:] == (24, 24)


@pytest.mark.parametrize("perceptual", ["encoder", "cifar"])
def test_a_cnn_learns_in_both_stages_without_a_teacher(perceptual, main):
    outputs = main("ENCODER=cnn", "IMAGE_SIZE=32", "GRID=4", "EPOCHS=(2, 1)", f"PERCEPTUAL={perceptual}")
    found = {(row["perceptual_loss"] > 0, row["distill_loss"]) for row in table(outputs)}
    assert found == {(perceptual == "cifar", 0)}
    files = [load_torch(checkpoint(outputs, name)) for name in ("stage1_epoch_1", "stage1_epoch_2", "stage2_epoch_1")]
    for before, after in itertools.pairwise(file["model"] for file in files):
        assert all((before[name] != after[name]).any() for name in before if name.startswith("encoder."))


def test_a_teacher_has_the_layers_of_the_encoder_and_is_trained(change):
    load = models.load_network
    change(models, load_network=lambda name, pretrained: load(name, False))  # nothing can be downloaded
    change(train, ENCODER="vit_tiny_patch16_224", ENCODER_LAYERS=2)
    model = train.build_model().set_stage(2)
    teacher, _ = train.build_loss_networks(model)
    assert teacher.used_layers == model.encoder.used_layers == 2 and not teacher.training
    for name in ("cnn", "cifra"):
        change(train, PERCEPTUAL=name)
        with refused(f"^PERCEPTUAL = '{name}', allowed: "):
            train.build_loss_networks(model)


@pytest.mark.parametrize("encoder, quantizer, grid, small", [
    ("cifar", "ema_vq", 4, False), ("cifar", "simvq_matched", 4, True), ("cnn", "rotation_vq", 2, False)])
def test_a_start_checkpoint_goes_on_at_another_size(encoder, quantizer, grid, small, main):
    constants = [f"ENCODER={encoder}", f"QUANTIZER={quantizer}", "DECODER_WIDTH=64", "DECODER_DEPTH=2"]
    first = main(*constants, f"GRID={grid}", "STAGES=(1,)")
    save_checkpoint("start.pt", load_checkpoint(checkpoint(first, "stage1_best")), small)
    constants += ["STAGES=(1, 2)" if small else "STAGES=(2,)", "START_CHECKPOINT=start.pt", "LEARNING_RATE=0.0"]
    outputs = main(*constants, "IMAGE_SIZE=32", f"GRID={2 * grid}", "BATCH_SIZE=8")  # which some options depend on
    start, model = load_checkpoint("start.pt"), load_checkpoint(checkpoint(outputs, "stage2_best"))
    assert (model.config["image_size"], model.config["grid"]) == (32, 2 * grid)
    for (name, p), before in zip(model.named_parameters(), start.parameters()):
        assert quantizer == "simvq_matched" and "code_transform" in name or torch.equal(p, before), name
    if quantizer == "ema_vq":
        assert (model.quantizer.codebook != start.quantizer.codebook).any()  # its moving averages go on
    # stage 1 takes the file's own encoder
    assert [row["distill_loss"] > 0 for row in table(outputs)] == ([False, True] if small else [False])


@pytest.fixture
def begin(folder, monkeypatch):
    """begin("NAME=value", NAME=value) starts a train.py. Returns the run's name, or an error."""
    def start(*arguments, **constants):
        text = (ROOT / "train.py").read_text("utf-8")
        for name, value in {"DATASET": str(folder), **constants}.items():
            line, found = f"{name} = {value!r}", re.search(rf"(?m)^{name} = .*", text)
            text = text.replace(found[0], line) if found else text.replace("SEED = 0", f"SEED = 0\n{line}")
        Path("train.py").write_text(text, "utf-8")
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        monkeypatch.setattr(utils, "Run", lambda name, first_process: sys.exit(name))
        with pytest.raises(SystemExit) as end:
            runpy.run_path("train.py", run_name="__main__")
        return end.value.code

    return start


def test_a_constant_means_the_same_in_the_file_and_on_the_command_line(begin):
    run = begin(QUANTIZER="fsq", FSQ_LEVELS=[8, 6, 5])
    assert run == begin("QUANTIZER=fsq", "FSQ_LEVELS=(8,6,5)")
    changes = [{"FSQ_LEVELS": [8, 8, 8]}, {"MY_LIST": [1]}, {"MY_LIST": [2]}, {"LIBRARY": {"kind": "no such class"}}]
    names = [begin(**({"QUANTIZER": "fsq", "FSQ_LEVELS": [8, 6, 5]} | change)) for change in changes]
    assert len({run, *names}) == 5 and all(name.startswith("föto_cifar_fsq_") for name in names)


@pytest.mark.parametrize("name, value", [
    ("EPOCHS", [1, 1, 1]), ("EPOCHS", 0), ("EPOCHS", 1.5), ("GAN_WEIGHT", True), ("GAN_WEIGHT", "a"),
    ("LEARNING_RATE", [1e-3, -1e-4]), ("STAGES", [2, 1]), ("STAGES", [2]), ("QUANTIZER", "vq"),
    ("COMPILE", "on"), ("OPTIMIZER", "sgd"), ("START_CHECKPOINT", "a.pt"), ("BATCH_SIZE", 99999), ("ACCUMULATE", 0),
    ("CODEBOOK_SIZE", 1), ("CODEBOOKS", 0), ("EMA_DECAY", 1.0), ("POST_QUANT_KERNEL", 2), ("ENCODER", "cifra"),
    ("GRID", 5), ("CROP_SIZES", [32, 50]), ("CROP_SIZES", [4]), ("EPOCHS", [3]), ("SEED", [1, 2]), ("DEVICE", "tpu"),
    ("ENCODER_LAYERS", 3), ("IMAGE_SIZE", 8)])
def test_a_wrong_constant_is_named_with_its_value(name, value, begin):
    text = repr(tuple(value) if isinstance(value, list) else value)
    assert re.fullmatch(rf"train.py: {name} = {re.escape(text)}, allowed: .+", begin(**{name: value}))


@pytest.mark.parametrize("constants, line", [
    (START, "föto_cifar_ema_vq_"), (START | FSQ, "föto_cifar_fsq_"), (START | {"STAGES": [1]}, "START_CHECKPOINT = "),
    (START | {"QUANTIZER": "fsq"}, "QUANTIZER = 'fsq', allowed: 'ema_vq' with START"),
    (START | {"ENCODER": "cnn"}, "ENCODER = 'cnn', allowed: 'cifar'"), (START | {"CODE_DIM": 8}, "CODE_DIM = 8"),
    (START | {"GRID": 4}, "IMAGE_SIZE / GRID = 8, allowed: 4"), (START | {"DECODER_WIDTH": 64}, "DECODER_WIDTH = 64"),
    ({"MINE": b"bytes"}, "The constants do not fit into results.json: "), ({"DATASET": "none"}, "There is no folder"),
    ({"QUANTIZER": "library", "LIBRARY": {"kind": "VQ"}}, "kind = 'VQ'"),
    ({"QUANTIZER": "fsq", "FSQ_LEVELS": "6"}, "levels = '6', allowed: ")])
def test_constants_that_no_file_or_class_takes_are_refused(constants, line, begin):
    assert begin(**constants).removeprefix("train.py: ").startswith(line)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_prints_each_constant_with_its_comment(flag, main, capsys):
    with pytest.raises(SystemExit):
        main(flag)
    printed = capsys.readouterr().out
    assert printed.startswith(train.__doc__) and "\n# training\nSTAGES = (1, 2)  # " in printed
    constants = {name for name, value in vars(train).items() if name.isupper() and utils.is_plain(value)}
    assert {*re.findall("^([A-Z_]+) = ", printed, re.MULTILINE)} == constants


def test_other_files_images_or_code_make_another_run_and_copies_do_not(folder, begin, change):
    shutil.copytree(folder, "föto", copy_function=shutil.copy)  # with the time of today
    shutil.copy(START["START_CHECKPOINT"], "start.pt")
    start = START | {"START_CHECKPOINT": "start.pt"}
    runs = [begin(**start)]
    os.utime("start.pt", (1, 1))
    assert begin(**start, DATASET="föto") == runs[0]
    file = next(Path("föto/train").rglob("*.png"))
    Image.open(file).rotate(90).save(file)
    runs.append(begin(**start, DATASET="föto"))
    with ZipFile("start.pt", "a") as archive:
        archive.comment = b"another file"
    runs.append(begin(**start))
    change(utils, digest_code=lambda: "other code")
    assert len({*runs, begin(**start)}) == 4
    save_checkpoint("start.pt", VQRAE("cifar", "simvq", {"cosine": True}))
    assert begin(**start, QUANTIZER="simvq", CODEBOOK_SIZE=16384).startswith("train.py: COSINE = False, ")


def test_device_cpu_means_the_same_run_on_a_machine_with_a_gpu(begin, monkeypatch):
    """Its defaults are a CPU's, in the file and on the command line."""
    assert begin(DEVICE="cpu:0").startswith("föto_") and torch.are_deterministic_algorithms_enabled()
    name = begin(DEVICE="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(utils, "device", "cuda")
    assert begin(DEVICE="cpu") == begin("DEVICE=cpu") == name != begin()
