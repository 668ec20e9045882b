"""train.py and optimization.py: losses, optimizers, batches, start checkpoints, constants, and the files of a run."""
import copy
import csv
import functools
import itertools
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch._inductor.config
import torch.nn.functional as F
from conftest import SMALL
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

import models
import muon
import train
import utils
from data import list_split, load_dataset
from models import VQRAE, PatchDiscriminator, build_encoder, load_checkpoint
from utils import evaluate, load_torch

TINY = [*SMALL, "IMAGE_SIZE=16", "GRID=4", "BATCH_SIZE=4", "EPOCH_IMAGES=8", "EVAL_IMAGES=4", "EPOCHS=(1, 1)"]
CONSTANTS = {name: value for name, value in vars(train).items()
             if name.isupper() and isinstance(value, (int, float, str, tuple))}


@pytest.fixture
def main(folder, monkeypatch):
    """main("NAME=value", ...) runs train.py in this process, with a TINY model. Returns its folder in outputs/."""
    monkeypatch.setattr(utils, "plot_curves", lambda path, *_: path.touch())  # `trained` has real ones

    def run(*arguments):
        vars(train).update(CONSTANTS)
        utils.read_constants(vars(train), [f"DATASET={folder}", *TINY])  # as if the file said so
        before = {*Path("outputs").glob("*")}
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with utils.one_line_errors():
            train.main()
        return next(iter({*Path("outputs").glob("*")} - before), None)

    yield run
    vars(train).update(CONSTANTS)


def table(outputs):
    """The rows of metrics.csv, as numbers."""
    rows = csv.DictReader((outputs / "metrics.csv").read_text().splitlines())
    return [{name: float(value) for name, value in row.items()} for row in rows]


def checkpoint(outputs, name):
    """The path of a run's checkpoint such as "stage1_best"."""
    return next(Path("checkpoints", outputs.name).glob(f"*_{name}.pt"))


@pytest.fixture
def parts(monkeypatch):
    """parts(stage) -> a model, what objective takes, and what it returns; with weights that no two losses share."""
    for name, value in (("PERCEPTUAL", (0.7, 0.4)), ("DISTILL", 0.9), ("GAN", 0.5)):
        monkeypatch.setattr(train, f"{name}_WEIGHT", value)

    def build(stage, lpips=None, gan=False):
        model = VQRAE("cifar", "simvq", {"codebook_size": 64}, 16, 4, decoder_width=32, decoder_depth=1)
        with torch.no_grad():  # weights that begin as zeros would stop gradients, and the encoder equals its teacher
            for p in [*model.parameters()][:: 1 if stage == 2 else 2]:
                p += 0.02 * torch.randn_like(p)
            model.decoder.head.weight *= 4  # some pixels are out of range
        teacher = build_encoder("cifar", 4).eval().requires_grad_(False)
        images, critic = torch.rand(5, 3, 16, 16), PatchDiscriminator(16).requires_grad_(False) if gan else None
        if gan:
            critic.layers[-1].weight.mul_(20)  # some logits are beyond -1 and 1
            critic.layers[-1].bias.sub_(critic(images).mean())
        decode, outputs = model.decode, []
        monkeypatch.setattr(model, "decode", lambda z_q: outputs.append(decode(z_q)) or outputs[0])
        losses = train.objective(model.set_stage(stage).train(), images, teacher, lpips, critic)
        return model, images, teacher, critic, losses, *outputs

    return build


@pytest.mark.parametrize("stage, perceptual, distilled", [(1, 0.7, False), (2, 0.4, True)])
def test_the_loss_is_the_weighted_sum_of_all_losses(stage, perceptual, distilled, parts):
    model, images, teacher, discriminator, losses, output = parts(stage, gan=True)
    of_l2, of_gan = (torch.autograd.grad(losses[name], model.decoder.head.weight, retain_graph=True)[0].norm()
                     for name in ("l2_loss", "gan_loss"))  # the GAN's gradient there gets the norm of the L2 loss's
    weights = {"l2": 16, "perceptual": perceptual, "quantizer": 1, "distill": 0.9, "gan": 0.5 * 16 * of_l2 / of_gan}
    weighted = {name: (weight * losses[f"{name}_loss"]).item() for name, weight in weights.items()}
    assert losses["loss"].item() == pytest.approx(sum(weighted.values()), rel=1e-4) and len(losses) == 7
    assert {name for name in weights if abs(weighted[name]) < 1e-3} == (set() if distilled else {"distill"})
    above, below = (1 - discriminator(images)).relu(), (1 + discriminator(output)).relu()  # hinge losses
    assert 0 < (above == 0).float().mean() < 1 > (below == 0).float().mean() > 0
    expected = {"l2_loss": F.mse_loss(output, images), "gan_loss": -discriminator(output).mean(),
                "discriminator_loss": (above.mean() + below.mean()) / 2,
                "perceptual_loss": F.mse_loss(teacher(output)[[0, 2, 4]], teacher(images)[[0, 2, 4]]),
                "distill_loss": F.mse_loss(model.encoder(images), teacher(images)) * distilled}
    torch.testing.assert_close({name: losses[name] for name in expected}, expected)
    losses["loss"].backward()
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert ("encoder" in learning) == distilled and len(learning) == 4 + distilled


def test_each_loss_teaches_the_parts_that_it_should(parts):
    model, *_, losses, _ = parts(2, gan=True)
    reached = {}
    for name, loss in [*losses.items()][:-1]:  # the discriminator's is for the discriminator alone
        learning = {parameter: p for parameter, p in model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, [*learning.values()], retain_graph=True, allow_unused=True)
        reached[name] = {parameter.split(".")[0] for parameter, g in zip(learning, gradients)
                         if g is not None and g.abs().max() > 0}
    tokens = {"encoder", "adapter", "quantizer"}
    image = {*tokens, "post_quant_conv", "decoder"}
    assert reached == {"loss": image, "l2_loss": image, "perceptual_loss": image, "gan_loss": image,
                       "quantizer_loss": tokens, "distill_loss": {"encoder"}}


def test_lpips_sees_all_images_clamped(parts, main, torch_home):
    lpips = LearnedPerceptualImagePatchSimilarity("vgg").net
    model, images, _, _, losses, output = parts(1, lpips)
    expected = lpips(2 * output.clamp(0, 1) - 1, 2 * images - 1).mean()
    assert output.min() < 0 and expected > 1e-3
    torch.testing.assert_close(losses["perceptual_loss"], expected)
    gradient, = torch.autograd.grad(losses["perceptual_loss"], model.decoder.head.weight)
    assert gradient.norm() > 0
    first, second = table(main("PERCEPTUAL=lpips", "PERCEPTUAL_WEIGHT=(0.1, 0)", "EPOCH_IMAGES=4"))
    assert first["perceptual_loss"] > 1e-3 and second["perceptual_loss"] == 0  # of weight 0, it is not computed


def test_the_learning_rate_rises_and_falls_as_a_cosine():
    weight, rates = nn.Parameter(torch.zeros(1)), []
    optimizers = {"first": torch.optim.SGD([weight], lr=8.0), "second": torch.optim.SGD([weight], lr=2.0)}
    weight.grad = torch.ones(1)
    for step in range(100):
        muon.take_step(optimizers, step, 100)
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers.values()])
    scale = [0.2, 0.4, 0.6, 0.8, *(0.5 + 0.5 * math.cos(math.pi * step / 100) for step in range(4, 100))]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(scale)[:, None] * torch.tensor([8.0, 2.0]))
    assert weight.item() == pytest.approx(-10 * sum(scale), rel=1e-4)


@pytest.fixture(scope="module")
def small_vit(tmp_path_factory):
    """A ViT in a folder, as ENCODER takes it: 3 blocks of 32, patches of 4 x 4 pixels."""
    path, name = tmp_path_factory.mktemp("vit"), "vit_tiny_patch16_224"
    shape = {"img_size": 32, "patch_size": 4, "depth": 3, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
    save_file({n: 5 * w for n, w in timm.create_model(name, **shape).state_dict().items()}, path / "model.safetensors")
    images = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 32, 32], "num_classes": 0}
    config = {"architecture": name, "num_classes": 0, "model_args": shape, "pretrained_cfg": images}
    (path / "config.json").write_text(json.dumps(config))
    return f"local-dir:{path}"


@pytest.mark.parametrize("encoder, count", [("cifar", 16), ("vit", 9)])
def test_muon_gets_the_matrices_of_blocks_and_adamw_all_else(encoder, count, small_vit, monkeypatch):
    model = VQRAE(small_vit if encoder == "vit" else encoder, post_quant_kernel=3, decoder_depth=1, pretrained=False)
    name_of, others = {p: name for name, p in model.named_parameters()}, ("quantizer", "decoder.head", "decoder.proj")
    matrices = {name for p, name in name_of.items() if p.ndim > 1 and not name.startswith(("encoder", *others))}
    assert len(matrices) == count
    monkeypatch.setattr(train, "LEARNING_RATE", (0.5, 0.25))
    for stage, rate in ((1, 0.5), (2, 0.25)):
        learning = {name for name, p in model.set_stage(stage).named_parameters() if p.requires_grad}
        for kind, expected in (("muon", matrices), ("adamw", set())):
            monkeypatch.setattr(train, "OPTIMIZER", kind)
            adamw, *muon = train.build_optimizers(model, stage).values()
            names = [{name_of[p] for p in optimizer.param_groups[0]["params"]} for optimizer in (adamw, *muon)]
            assert isinstance(adamw, torch.optim.AdamW) and len(muon) == (kind == "muon")
            assert names == [learning - expected, expected][: 1 + len(muon)]
            assert [optimizer.defaults["lr"] for optimizer in (adamw, *muon)] == [rate, 2 * rate][: 1 + len(muon)]


def test_muon_is_that_of_torch(monkeypatch):
    monkeypatch.setattr(muon, "fast_bf16", lambda device: True)  # torch's Muon is in bf16 everywhere
    theirs = [nn.Parameter(torch.randn(shape)) for shape in ((8, 72), (8, 40), (72, 8), (10, 30), (16, 16))]
    ours = copy.deepcopy([theirs[0].detach().view(8, 8, 3, 3).requires_grad_(), *theirs[1:]])  # one of a convolution
    unused, options = nn.Parameter(torch.ones(3, 3)), {"lr": 0.1, "weight_decay": 0.5}
    optimizer = muon.Muon([*ours, unused], **options)
    torchs = torch.optim.Muon(theirs, **options, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        before = [p.detach().clone() for p in theirs]
        for a, b in zip(ours, theirs):
            b.grad = torch.randn_like(b)
            a.data, a.grad = b.detach().view_as(a).clone(), b.grad.view_as(a).clone()
        optimizer.step(), torchs.step()
        for a, b, start in zip(ours, theirs, before):
            assert (a.view_as(b) - b).norm() < 0.03 * (b - start).norm()  # bf16, with sums in another order
    assert torch.equal(unused, torch.ones(3, 3))  # a matrix without a gradient stays


def test_training_is_what_the_table_of_stages_says(main, folder, monkeypatch):
    """Both stages as a plain loop: AdamW at the stage's rate, clipped gradients, the GAN after half of stage 1."""
    monkeypatch.setattr(train, "bf16", False)
    outputs = main("QUANTIZER=fsq", "OPTIMIZER=adamw", "EPOCHS=(2, 1)", "GAN_WEIGHT=0.5", "EPOCH_IMAGES=12",
                   "LEARNING_RATE=(2e-3, 5e-4)")
    images, rows, norms = load_dataset(str(folder), 16).train_images, table(outputs), []
    utils.seed_everything(0)
    model, teacher = train.build_model(), build_encoder("cifar", 4).eval().requires_grad_(False)
    for stage, rate, epochs in ((1, 2e-3, 2), (2, 5e-4, 1)):
        model.set_stage(stage).train()
        utils.seed_everything(0, stage)
        critic, names, log = PatchDiscriminator(16), ("loss", "gan_loss", "discriminator_loss"), []
        adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, (0.9, 0.95), fused=True)
        gan_adamw = torch.optim.AdamW(critic.parameters(), 2e-4, (0.5, 0.9), fused=True)
        batches = [x for epoch in range(epochs) for x in train.epoch_batches(images, stage, epoch + 1, 3)]
        for step, x in enumerate(batches):
            gan_on = stage == 1 and step >= 3
            losses = train.objective(model, x, teacher, None, critic if gan_on else None)
            model.zero_grad()
            if gan_on:
                gradients = torch.autograd.grad(losses["discriminator_loss"], [*critic.parameters()], retain_graph=True)
            losses["loss"].backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            adamw.param_groups[0]["lr"] = rate * (0.5 + 0.5 * math.cos(math.pi * step / len(batches)))
            adamw.step()
            if gan_on:
                for p, p.grad in zip(critic.parameters(), gradients):
                    pass
                gan_adamw.step()
            log.append([losses[name].item() for name in names])
        weights = load_torch(checkpoint(outputs, f"stage{stage}_epoch_{epochs}"))["model"]
        torch.testing.assert_close(model.state_dict(), weights, rtol=1e-4, atol=1e-5)
        logged = torch.tensor([[row[name] for name in names] for row in rows if row["stage"] == stage])
        torch.testing.assert_close(logged, torch.tensor(log).view(-1, 3, 3).mean(1), rtol=1e-4, atol=1e-5)
    assert max(norms) > 1  # some were clipped


def test_accumulated_micro_batches_have_the_gradient_of_one_batch(main, monkeypatch):
    monkeypatch.setattr(train, "bf16", False)
    norms, clip = [], nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *args: norms.append(clip(*args).item()))
    main("QUANTIZER=fsq", "STAGES=(1,)"), main("QUANTIZER=fsq", "STAGES=(1,)", "ACCUMULATE=2")
    assert len(norms) == 4 and norms[:2] == pytest.approx(norms[2:], rel=1e-3)


EMA = {"codebook_size": 64, "code_dim": 6}
KINDS = {"fsq": {}, "simvq": {"codebook_size": 64}, "ddcl": {}, "none": {}, "ema_vq": EMA,
         "residual": EMA | {"codebooks": 2, "random_depth": 0.5},
         "product": EMA | {"codebooks": 2, "combine": "product"}}
FAST, CASES = [("fsq", 1, "aot"), ("residual", 2, "aot")], [(kind, stage, "aot") for kind in KINDS for stage in (1, 2)]
SLOW = [case for case in CASES + [("ema_vq", 1, "inductor"), ("fsq", 2, "inductor")] if case not in FAST]


@torch._inductor.config.patch(fallback_random=True)  # Inductor would draw other numbers than an eager step
@pytest.mark.parametrize("kind, stage, backend", FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW])
def test_a_compiled_step_is_the_same_step(kind, stage, backend, monkeypatch):
    """One graph, forward and backward, in stage 1 with a GAN: the same losses, gradients and moving averages."""
    torch.compiler.reset()
    monkeypatch.setattr(train, "GAN_WEIGHT", 0.5), monkeypatch.setattr(train, "bf16", False)
    monkeypatch.setattr(train, "COMPILE", "default")
    backend = {"aot": "aot_eager_decomp_partition"}.get(backend, backend)  # traces as Inductor does, and runs eagerly
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    quantizer = "ema_vq" if "codebooks" in KINDS[kind] else kind
    model = VQRAE("cifar", quantizer, KINDS[kind], 16, 4, decoder_width=32, decoder_depth=1).set_stage(stage).train()
    teacher, critic = build_encoder("cifar", 4).eval().requires_grad_(False), PatchDiscriminator(16)
    images, results = torch.rand(4, 3, 16, 16), []
    for function in (train.add_gradients, train.compiled(train.add_gradients)):
        parts = copy.deepcopy([model, critic])
        for _ in range(2):
            [part.zero_grad() for part in parts]
            torch.manual_seed(0)
            losses = function(parts[0], images, teacher, None, parts[1] if stage == 1 else None)
        gradients = {name: p.grad for part in parts for name, p in part.named_parameters() if p.grad is not None}
        results.append((losses, gradients, dict(parts[0].named_buffers())))
    assert len(results[0][1]) > 50
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-6)


def test_compile_is_one_graph_in_the_mode_it_names(main, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: calls.append((function, options)) or function)
    main("COMPILE=reduce-overhead")
    assert calls == [(train.add_gradients, {"fullgraph": True, "dynamic": False, "mode": "reduce-overhead"})] * 2


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_what_is_not_finite_ends_the_run_in_one_line_and_is_not_saved(what, main, monkeypatch):
    """A loss, or weights after the last step. The checkpoints are those of the epoch before."""
    steps, take_step, objective = [], train.take_step, train.objective

    def broken_step(optimizers, *args):
        take_step(optimizers, *args)
        steps.append(1)
        if what == "weights" and len(steps) == 4:  # the last of epoch 2
            optimizers["adamw"].param_groups[0]["params"][0].data.fill_(math.nan)

    def broken_objective(*args):
        losses = objective(*args)
        return {name: loss + (math.inf if what == "loss" and len(steps) == 2 else 0) for name, loss in losses.items()}

    monkeypatch.setattr(train, "take_step", broken_step), monkeypatch.setattr(train, "objective", broken_objective)
    value = "inf|nan" if what == "loss" else r"\d\.\d+"
    with pytest.raises(SystemExit, match=f"^train.py: loss of stage 1, epoch 2 = ({value}), allowed: a finite [^\n]+$"):
        main("EPOCHS=3")
    last, = Path("checkpoints").glob("*/last.pt")
    assert load_torch(last)["epoch"] == 1 and len([*last.parent.glob("*.pt")]) == 3
    assert load_checkpoint(*last.parent.glob("*_best.pt")).stage == 1


@pytest.fixture
def shown(monkeypatch):
    """shown(...) -> the batches of an epoch; pixels of image i are i on its left, and 200 on its right."""
    images = torch.full((20, 3, 16, 16), 200, dtype=torch.uint8)
    images[..., :8] = torch.arange(20)[:, None, None, None]

    def batches(stage=1, epoch=1, steps=5, **constants):
        defaults = {"BATCH_SIZE": 4, "ACCUMULATE": 1, "FLIP": False, "SEED": 0, "IMAGE_SIZE": 16, "rank": 0, "ranks": 1}
        [monkeypatch.setattr(train, name, value) for name, value in (defaults | constants).items()]
        return [(x[:, 0, 0, [0, -1]] * 255).round().int() for x in train.epoch_batches(images, stage, epoch, steps)]

    return batches


def test_an_epoch_shows_each_image_once_in_an_order_of_its_own(shown):
    changes = ({}, {"epoch": 2}, {"stage": 2}, {"SEED": 1}, {}, {"steps": 3}, {"steps": 10})
    *orders, again, part, twice = (torch.cat(shown(**change))[:, 0].tolist() for change in changes)
    for order in (*orders, twice[:20], twice[20:]):  # a small dataset is shown again, of a large one a part
        assert sorted(order) == [*range(20)]
    assert again == orders[0] and part == orders[0][:12] and len({*map(tuple, orders)}) == 4


def test_processes_and_micro_batches_share_the_images_of_a_step(shown):
    parts = [shown(rank=rank, ranks=2, ACCUMULATE=2) for rank in (0, 1)]
    assert all(len(x) == 1 for part in parts for x in part)
    for step, batch in enumerate(shown()):
        assert torch.equal(torch.cat([x for part in parts for x in part[2 * step : 2 * step + 2]]), batch)


def test_what_a_run_leaves(trained):
    outputs, = (trained / "outputs").iterdir()
    rows = table(outputs)
    assert " ".join(rows[0]) == (
        "stage epoch loss l2_loss perceptual_loss quantizer_loss distill_loss gan_loss discriminator_loss "
        "psnr psnr_of_mse ssim usage perplexity images_per_second seconds")
    assert [(row["stage"], row["epoch"], row["distill_loss"] > 0) for row in rows] == [(1, 1, 0), (1, 2, 0), (2, 1, 1)]
    assert rows[1]["loss"] < rows[0]["loss"] and rows[0]["images_per_second"] * rows[0]["seconds"] == pytest.approx(90)
    images = {"curves", "usage", "final", "stage1_epoch_001", "stage1_epoch_002", "stage2_epoch_001"}
    assert {path.stem for path in outputs.glob("*.png") if min(Image.open(path).size) > 100} == images
    assert {path.stem for path in trained.glob("checkpoints/*/*.pt")} == {
        "last", *(f"ema_vq_stage{x}" for x in ("1_best", "1_epoch_1", "1_epoch_2", "2_best", "2_epoch_1"))}
    assert json.loads((outputs / "results.json").read_text())["constants"]["EPOCHS"] == [2, 1]


@pytest.mark.parametrize("options", [
    "fsq", "simvq", "ddcl", "none", "ema_vq CODEBOOKS=2 CODEBOOK_SIZE=8 RANDOM_DEPTH=0.5"])
def test_results_are_those_of_the_best_checkpoint(options, main, folder):
    quantizer = options.split()[0]
    outputs = main(*f"QUANTIZER={options}".split())
    images, rows = load_dataset(str(folder), 16).test_images, table(outputs)
    results = json.loads((outputs / "results.json").read_text())
    assert outputs.name.startswith(f"tiny_cifar_{quantizer}_") and results["run"] == outputs.name
    expected, *_ = evaluate(load_checkpoint(checkpoint(outputs, "stage2_best")), images, 4)
    assert expected == pytest.approx({name: results[name] for name in expected}, rel=1e-5)
    for stage in (1, 2):
        model = load_checkpoint(checkpoint(outputs, f"stage{stage}_epoch_1"))
        expected, *_ = evaluate(model, images[:4], 4)  # EVAL_IMAGES
        assert {name: rows[stage - 1][name] for name in expected} == pytest.approx(expected, rel=1e-5)
        assert model.stage == stage and model.config["quantizer"] == quantizer
    assert (outputs / "usage.png").exists() == (quantizer != "none")
    assert (rows[0]["quantizer_loss"] > 0) == (quantizer in ("simvq", "ddcl", "ema_vq"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [
    "lfq CODEBOOK_SIZE=16", "bsq CODEBOOK_SIZE=16", "rotation_vq CODEBOOK_SIZE=16", "residual_fsq CODEBOOKS=2",
    "library LIBRARY=ResidualLFQ(codebook_size=4,num_quantizers=2)"])
def test_the_librarys_quantizers_train_in_both_stages_and_are_shared(options, main):
    outputs = main(*f"QUANTIZER={options}".split(), "FSQ_LEVELS=(4, 3)")
    model, images = load_checkpoint(checkpoint(outputs, "stage2_best")), torch.rand(2, 3, 16, 16)
    assert len(table(outputs)) == 2 and model.quantizer.codebook_size in (16, 144)
    model.save_pretrained("shared")
    assert torch.equal(VQRAE.from_pretrained("shared").encode_to_indices(images), model.encode_to_indices(images))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("argument, message", [
    ("QUANTIZER=lfq CODEBOOK_SIZE=60", "LFQ = .*power of 2"), ("QUANTIZER=bsq CODEBOOKS=2", "codebooks = 2, allowed"),
    ("LIBRARY=LFQ(", "LIBRARY = "), ("LIBRARY=LFQ(dim=8)", "LIBRARY = "), ("LIBRARY=FSQ([8,5])", "LIBRARY = "),
    ("QUANTIZER=library LIBRARY=LFQ", "LIBRARY = "), ("DEVICE=tpu", "DEVICE = 'tpu', "),
    ("QUANTIZER=rotation_vq CODEBOOK_SIZE=16 COMPILE=default", "COMPILE = 'default', allowed: '' if ")])
def test_what_a_quantizer_or_device_does_not_take_is_one_line(argument, message, main, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with pytest.raises(SystemExit, match=rf"^train.py: {message}[^\n]*$"):
        main(*argument.split())


def test_best_is_the_epoch_of_the_highest_psnr_of_its_stage(main, monkeypatch, capsys):
    """And the last two epochs of each stage are kept. After the first one reads how long all will take."""
    psnrs = iter([3.0, 5.0, 4.0, 2.0, 1.0])
    monkeypatch.setattr("utils.psnr", lambda images, _, psnrs=psnrs: torch.full((len(images),), next(psnrs, 0.0)))
    monkeypatch.setattr(train, "time", SimpleNamespace(time=itertools.count(0, 10).__next__))
    outputs = main("EPOCHS=(3, 2)", "EPOCH_IMAGES=4")  # 20 s the first of 3 epochs, with two more of 28
    assert re.findall("whole run takes about (.*)", capsys.readouterr().out) == ["1.9 minutes"]
    assert [row["psnr"] for row in table(outputs)] == [3, 5, 4, 2, 1]
    for stage, epoch, kept in ((1, 2, "23"), (2, 1, "12")):
        best, same = (load_torch(checkpoint(outputs, f"stage{stage}_{x}")) for x in ("best", f"epoch_{epoch}"))
        assert (best["stage"], best["metrics"]["epoch"], best["run"]) == (stage, epoch, outputs.name)
        torch.testing.assert_close(best["model"], same["model"], rtol=0, atol=0)
        files = Path("checkpoints", outputs.name).glob(f"*stage{stage}_epoch_*")
        assert sorted(path.stem[-1] for path in files) == [*kept]
    monkeypatch.setattr(train, "load_dataset", lambda *args: pytest.fail("loaded data for a finished run"))
    assert main("EPOCHS=(3, 2)", "EPOCH_IMAGES=4") is None and "this run is finished" in capsys.readouterr().out


def test_a_cnn_learns_from_the_beginning(main):
    outputs = main("ENCODER=cnn", "IMAGE_SIZE=32", "GRID=4", "EPOCHS=(3, 1)", "EPOCH_IMAGES=16")
    first, _, third, _ = table(outputs)
    assert third["loss"] < first["loss"] and first["perceptual_loss"] == 0  # it has no teacher
    weights = [load_torch(checkpoint(outputs, f"stage1_epoch_{epoch}"))["model"] for epoch in (2, 3)]
    assert not any(torch.equal(x, weights[1][name]) for name, x in weights[0].items() if name.startswith("encoder."))


def test_a_vit_is_held_to_the_sum_of_its_layers(main, small_vit, monkeypatch):
    calls, objective = [], train.objective
    monkeypatch.setattr(train, "objective", lambda *args: calls.append(args) or objective(*args))
    outputs = main(f"ENCODER={small_vit}", "ENCODER_LAYERS=2", "LEARNING_RATE=(1e-3, 0)")
    _, images, teacher, *_ = calls[0]
    both = build_encoder(small_vit, 4, 2).eval()(images)
    encoder = load_checkpoint(checkpoint(outputs, "stage1_best")).encoder
    torch.testing.assert_close(encoder(images), both, atol=1e-4, rtol=1e-4)
    assert F.mse_loss(teacher.float()(images), both) < 1e-3  # the teacher may be in bf16
    assert table(outputs)[1]["distill_loss"] < 1e-3  # rate 0: no distillation


@pytest.mark.parametrize("encoder, quantizer, grid", [("cifar", "ema_vq", 4), ("cnn", "fsq", 2)])
def test_a_start_checkpoint_is_the_model_whatever_the_constants_say(encoder, quantizer, grid, main):
    """Its encoder, quantizer, decoder and token; and at another image size it has another grid."""
    options = {"codebook_size": 64} if quantizer == "ema_vq" else {"levels": (5, 5)}
    start = VQRAE(encoder, quantizer, options, 16, grid, decoder_width=64, decoder_depth=2)
    models.save_checkpoint("start.pt", start)
    outputs = main("STAGES=(2,)", "START_CHECKPOINT=start.pt", "LEARNING_RATE=0.0", "IMAGE_SIZE=32")
    model = load_checkpoint(checkpoint(outputs, "stage2_best"))
    assert model.config == start.config | {"image_size": 32, "grid": 2 * grid}
    assert outputs.name.startswith(f"tiny_{encoder}_{quantizer}_") and table(outputs)[0]["distill_loss"] < 1e-4
    constants = json.loads((outputs / "results.json").read_text())["constants"]
    assert "IMAGE_SIZE" in constants and not constants.keys() & {"ENCODER", "GRID", "QUANTIZER", "DECODER_HEADS"}
    for (name, p), before in zip(model.named_parameters(), start.parameters()):
        assert torch.equal(p, before), name
    if quantizer == "ema_vq":
        assert (model.quantizer.codebook != start.quantizer.codebook).any()  # its EMA goes on


@pytest.mark.parametrize("argument, message", [
    ("STAGES=(1,)", "START_CHECKPOINT = 'start.pt', allowed: one of stage 1"), ("GRID=4", "GRID = 4, allowed: no arg"),
    ("ENCODER=cifar", "ENCODER = 'cifar', allowed: no arg"), ("IMAGE_SIZE=34", "IMAGE_SIZE = 34, allowed: .* 4 pixels"),
    ("DECODER_HEADS=1", "DECODER_HEADS = 1, allowed: no argument with START_CHECKPOINT")])
def test_a_start_checkpoint_refuses_what_it_would_not_use(argument, message, main):
    model = VQRAE("cifar", "fsq", {"levels": (5, 5)}, 16, 4, decoder_width=32, decoder_depth=1)
    models.save_checkpoint("start.pt", model.set_stage(2))
    with pytest.raises(SystemExit, match=f"^train.py: {message}"):
        main("STAGES=(2,)", "START_CHECKPOINT=start.pt", argument)


def test_help_prints_headings_and_comments_of_the_file_with_the_constants_values(main, capsys):
    with pytest.raises(SystemExit):
        main("--help")
    doc, lines = train.__doc__ + "\n# images\nDATASET = ", capsys.readouterr().out
    assert lines.startswith(doc) and "\n# on a GPU and on a CPU\nEPOCHS = (1, 1)\n" in lines
    assert "\nSEED = 0\n" in lines and "\nGRID = 4  # tokens a side of the smallest IMAGE_SIZE; with " in lines
    assert re.findall("^([A-Z_]+) = ", lines, re.MULTILINE) == [*CONSTANTS]


@pytest.mark.parametrize("arguments, name, value", [
    ("QUANTIZER=vq", "QUANTIZER", "'vq'"), ("COMPILE=on", "COMPILE", "'on'"), ("OPTIMIZER=sgd", "OPTIMIZER", "'sgd'"),
    ("PERCEPTUAL=vgg", "PERCEPTUAL", "'vgg'"), ("STAGES=(2, 1)", "STAGES", "(2, 1)"), ("STAGES=1", "STAGES", "1"),
    ("STAGES=(2,)", "START_CHECKPOINT", "''"), ("START_CHECKPOINT=a.pt", "START_CHECKPOINT", "'a.pt'"),
    ("BATCH_SIZE=0", "BATCH_SIZE", "0"), ("BATCH_SIZE=9", "BATCH_SIZE", "9"), ("ACCUMULATE=3", "BATCH_SIZE", "4"),
    ("ACCUMULATE=0", "ACCUMULATE", "0"), ("GRID=0", "GRID", "0"), ("GRID=5", "GRID", "5"),
    ("IMAGE_SIZE=(16, 30)", "IMAGE_SIZE", "(16, 30)"),
    ("IMAGE_SIZE=48", "IMAGE_SIZE / GRID", "12"), ("ENCODER=cifra", "ENCODER", "'cifra'"),
    ("FSQ_LEVELS=(8,1) QUANTIZER=fsq", "levels", "(8, 1)"),
    ("DDCL_DELTA=0.3 QUANTIZER=ddcl", "delta", "0.3"), ("EMA_DECAY=1.0", "EMA_DECAY", "1.0"),
    ("CODEBOOK_SIZE=0", "dim, code_dim, codebook sizes", "(256, 16, 0)"), ("COMBINE=product", "COMBINE", "'product'"),
    ("CODEBOOKS=2 COMBINE=sum", "combine", "'sum'"), ("CODEBOOKS=2 RANDOM_DEPTH=2", "random_depth", "2"),
    ("POST_QUANT_KERNEL=2", "POST_QUANT_KERNEL", "2"), ("LEARNING_RATE=-1", "LEARNING_RATE", "-1"),
    ("EPOCHS=many", "EPOCHS", "'many'"), ("FLIP=1", "FLIP", "1"), ("epochs=3", "argument", "'epochs=3'"),
    ("QUANTIZER", "argument", "'QUANTIZER'"), ("DATASET=nowhere", "DATASET", "'nowhere'")])
def test_a_wrong_constant_ends_in_one_line(arguments, name, value, main, monkeypatch):
    """Before data are loaded: with the constant, its value, and what is allowed."""
    monkeypatch.setattr(train, "load_dataset", lambda *args: pytest.fail("loaded data first"))
    with pytest.raises(SystemExit) as exit:
        main(*arguments.replace(", ", ",").split())
    assert exit.value.code.startswith(f"train.py: {name} = {value}, allowed: ") and "\n" not in exit.value.code
    assert not Path("outputs").exists() and not Path("checkpoints").exists()


def test_another_constant_or_file_makes_another_run(main, folder, monkeypatch):
    names = []
    monkeypatch.setattr(utils, "Run", lambda name, first: names.append(name) or sys.exit())
    shutil.copytree(folder, "tiny")
    for change in ("SEED=0", "SEED=0", "SEED=1", "SEED=0"):
        if len(names) == 3:
            next(Path("tiny").rglob("*.png")).unlink()
            list_split.cache_clear()  # which is for one process
        with pytest.raises(SystemExit):
            main("DATASET=tiny", change)
    assert names[0] == names[1] and len({*names}) == 3
