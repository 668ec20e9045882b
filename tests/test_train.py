"""train.py itself, on a few images."""
import csv
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from models import VQRAE, AirbenchEncoder, PatchDiscriminator, build_encoder
from utils import FeatureCache, draw_shapes, load_checkpoint, load_torch, save_torch, seed_everything

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["EPOCHS=(2, 1)", "BATCH_SIZE=32", "EVAL_IMAGES=32", "GAN_WEIGHT=0", "SIMVQ_CODEBOOK_SIZE=256",
         "EMA_CODEBOOK_SIZE=256", "ADAPTER_DEPTH=1", "DECODER_WIDTH=64", "DECODER_DEPTH=1",
         "DECODER_HEADS=2", "EPOCH_IMAGES=None"]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(...) runs train.py with these constants in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        torch.manual_seed(123)  # what happened before makes no difference
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

    return run


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("quantizer", ["fsq", "simvq", "ema_vq", "ddcl"])
def test_two_stages(quantizer, train, folder, capsys):
    arguments = [f"DATASET={folder}", f"QUANTIZER={quantizer}", *SMALL]
    train(*arguments)
    outputs, = Path("outputs").iterdir()
    checkpoints = Path("checkpoints", outputs.name)
    assert outputs.name.startswith(f"folder-tiny_cifar_{quantizer}_")
    for name in ("stage1_epoch_001.png", "stage1_epoch_002.png", "stage2_epoch_001.png", "final.png", "usage.png",
                 "curves.png"):
        assert min(Image.open(outputs / name).size) > 100
    table = rows(outputs / "metrics.csv")
    assert [(row["dataset"], row["stage"], row["epoch"]) for row in table] == [
        ("folder-tiny", "1", "1"), ("folder-tiny", "1", "2"), ("folder-tiny", "2", "1")]
    weights = {"l2": 16, "perceptual": 0.02, "quantizer": 1, "predict": 0.005, "distill": 0.3}
    for row in table:
        weighted = sum(weight * float(row[f"{name}_loss"]) for name, weight in weights.items())
        assert float(row["loss"]) == pytest.approx(weighted, rel=1e-3)
        assert 5 < float(row["psnr"]) < 40 and -1 < float(row["ssim"]) < 1 and float(row["images_per_second"]) > 0
        assert 0 < float(row["usage"]) <= 1 and float(row["perplexity"]) >= 1 and float(row["predict_loss"]) > 0
        assert (float(row["distill_loss"]) > 0) == (row["stage"] == "2")
    assert float(table[1]["loss"]) < float(table[0]["loss"])
    assert {f.name for f in checkpoints.iterdir()} == {
        f"{quantizer}_stage1_best.pt", f"{quantizer}_stage1_epoch_1.pt", f"{quantizer}_stage1_epoch_2.pt",
        f"{quantizer}_stage2_best.pt", f"{quantizer}_stage2_epoch_1.pt", "last.pt", "lock"}
    original = build_encoder("cifar", 4).state_dict()
    for stage, changed in ((1, False), (2, True)):
        model = load_checkpoint(checkpoints / f"{quantizer}_stage{stage}_best.pt")
        assert model.stage == stage and not model.training
        assert any(not torch.equal(v, original[k]) for k, v in model.encoder.state_dict().items()) == changed
        output = model.decode_from_indices(model.encode_to_indices(torch.rand(1, 3, 32, 32)))
        assert output.shape == (1, 3, 32, 32)

    capsys.readouterr()
    train(*arguments)  # the same constants: nothing is trained again
    assert "finished" in capsys.readouterr().out and rows(outputs / "metrics.csv") == table
    train(*arguments, "SEED=1", "STAGES=(1,)")  # others: another run, and this one's files stay
    assert len(list(Path("outputs").iterdir())) == 2 and rows(outputs / "metrics.csv") == table


def test_several_sizes_and_datasets(train, folder, tmp_path, capsys):
    for split in ("train", "test"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        pixels = draw_shapes(60, train=40, test=1).train_images
        for i, image in enumerate(pixels):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "photos" / split / f"{i}.png")
    train(f"DATASET={(str(folder), str(tmp_path / 'photos'))}", "IMAGE_SIZE=(32, 48)", *SMALL)
    outputs, = Path("outputs").iterdir()
    assert outputs.name.startswith("folder-tiny+folder-photos_cifar_ema_vq_")
    labels = ["folder-tiny 32x32", "folder-photos 32x32", "folder-photos 48x48"]  # images are not enlarged
    for row in rows(outputs / "metrics.csv"):
        psnr = [float(row[f"psnr, {label}"]) for label in labels]
        assert float(row["psnr"]) == pytest.approx(sum(psnr) / 3) and len(set(psnr)) == 3
    grids = [Image.open(outputs / f"final_{label}.png").size for label in labels]
    assert grids[0] == grids[1] != grids[2]
    model = load_checkpoint(next(Path("checkpoints", outputs.name).glob("*stage2_best.pt")))
    assert model.token_size == 4
    assert all(f"{label}, all " in capsys.readouterr().out for label in labels[:1])


def test_each_size_has_its_turn_though_an_epoch_has_one_step(train, tmp_path, monkeypatch):
    for split, count in (("train", 33), ("test", 2)):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for i, image in enumerate(draw_shapes(60, train=count, test=1).train_images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "photos" / split / f"{i}.png")
    sizes, select = [], FeatureCache.select
    monkeypatch.setattr(FeatureCache, "select", lambda self, i: sizes.append(x := select(self, i)) or x)
    train(f"DATASET={tmp_path / 'photos'}", "IMAGE_SIZE=(32, 48)", *SMALL, "EPOCHS=(3, 1)")
    assert [batch.shape[-1] for batch in sizes] == [32, 48, 32, 32]
    table = rows(next(Path("outputs").glob("*/metrics.csv")))
    trained_on = [float(row["images_per_second"]) * float(row["seconds"]) for row in table]
    assert trained_on == pytest.approx([len(batch) for batch in sizes])  # not what was drawn for sizes without a turn


def test_several_codebooks(train, folder, capsys):
    arguments = [f"DATASET={folder}", *SMALL, "QUANTIZER=ema_vq", "EMA_CODEBOOK_SIZE=16", "CODEBOOKS=2",
                 "EPOCHS=(1, 1)"]
    train(*arguments, "STAGES=(1,)")
    first, = Path("checkpoints").iterdir()
    checkpoint, = first.glob("*_stage1_best.pt")
    row, = rows(Path("outputs", first.name, "metrics.csv"))
    model = load_checkpoint(checkpoint)
    assert model.quantizer.codebook_sizes == (16, 16) and model.quantizer.random_depth == 0
    assert 1 <= float(row["perplexity_1"]) <= 16 and 1 <= float(row["perplexity_2"]) <= 16
    assert 0 < float(row["usage_2"]) <= 1 and float(row["perplexity"]) <= 256
    results = json.loads(Path("outputs", first.name, "results.json").read_text())
    assert {"perplexity_1", "perplexity_2", "usage_1", "usage_2"} <= results.keys()
    train(*arguments, "STAGES=(2,)", f"START_CHECKPOINT={checkpoint}", "RANDOM_DEPTH=0.5")  # the model is the same
    capsys.readouterr()
    train(*arguments, "STAGES=(2,)", f"START_CHECKPOINT={checkpoint}", "CODEBOOKS=1")
    assert capsys.readouterr().out.count("the quantizer starts anew") == 1


@pytest.mark.parametrize("arguments", [["QUANTIZER=none"], ["ENCODER=scratch", "GAN_WEIGHT=0.1"],
                                       ["ENCODER=cnn", "GRID=4", "ADAPTER_DEPTH=0", "QUANTIZER=fsq"]], ids=str)
def test_baselines(arguments, train, folder):
    train(f"DATASET={folder}", *SMALL, "EPOCHS=(8, 1)", *arguments)
    outputs, = Path("outputs").iterdir()
    table = rows(outputs / "metrics.csv")
    losses = [float(row["loss"]) for row in table]
    assert losses[7] < losses[0] and (float(table[0]["predict_loss"]) > 0) == (arguments == ["QUANTIZER=none"])
    assert (outputs / "final.png").exists() and (outputs / "usage.png").exists() == (arguments != ["QUANTIZER=none"])


@pytest.mark.parametrize("size, grid", [(64, 16), (256, 16)])
def test_larger_images(size, grid, train, tmp_path):
    data = draw_shapes(size, train=8, test=4)
    for split, images in (("train", data.train_images), ("test", data.test_images)):
        (tmp_path / "large" / split).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "large" / split / f"{i}.png")
    train("DATASET=large", *SMALL, f"IMAGE_SIZE={size}", f"GRID={grid}", "BATCH_SIZE=4", "GAN_WEIGHT=0.1")
    outputs, = Path("outputs").iterdir()
    assert len(rows(outputs / "metrics.csv")) == 3
    model = load_checkpoint(Path("checkpoints", outputs.name, "ema_vq_stage2_best.pt"))
    assert model.encode_to_indices(torch.rand(1, 3, size, size)).shape == (1, grid, grid)


def test_features_that_are_not_kept_make_no_difference(train, folder):
    train(f"DATASET={folder}", *SMALL, "EPOCHS=(1, 1)", "FEATURE_CACHE_GB=0", "FLIP=True")
    first, = Path("outputs").iterdir()
    for folder_of_runs in ("outputs", "checkpoints"):  # or the second is the same run: memory is no part of its name
        Path(folder_of_runs).rename(f"first_{folder_of_runs}")
    train(f"DATASET={folder}", *SMALL, "EPOCHS=(1, 1)", "FLIP=True")
    second, = Path("outputs").iterdir()
    assert first.name == second.name
    psnr = [[float(row["psnr"]) for row in rows(Path(path, first.name, "metrics.csv"))]
            for path in ("first_outputs", "outputs")]
    assert psnr[0] == pytest.approx(psnr[1], abs=0.05)


@pytest.mark.parametrize("flip", [False, True])
def test_a_pass_shows_each_image_once(flip, monkeypatch):
    import train as script

    monkeypatch.setattr(script, "FLIP", flip)
    epochs = [script.shuffled(1000, 250, epoch) for epoch in range(8)]
    for order in (torch.cat(epochs[:4]), torch.cat(epochs[4:])):
        assert sorted((order % 1000).tolist()) == list(range(1000))
        assert 400 < (order >= 1000).sum() < 600 if flip else (order < 1000).all()
    assert len(torch.cat(epochs).unique()) == (2000 if flip else 1000)  # and two passes each way round
    assert torch.equal(script.shuffled(1000, 2000, 0), torch.cat(epochs))  # an epoch of more images than there are
    assert torch.equal(script.shuffled(1000, 1000, 1), torch.cat(epochs[4:]))
    assert not torch.equal(torch.cat(epochs[4:]), torch.cat(epochs[:4]))


def test_a_small_dataset_has_as_many_steps_as_a_large_one(train, folder):
    train(f"DATASET={folder}", *SMALL, "EPOCHS=(1, 1)", "EPOCH_IMAGES=192", "STAGES=(1,)")  # of 96 images
    last, = Path("checkpoints").glob("*/last.pt")
    state = load_torch(last)["optimizer_0"]["state"]
    assert {int(values["step"]) for values in state.values()} == {6}


def test_each_of_several_sizes_and_datasets_shows_its_images_equally_often(train, folder, tmp_path, monkeypatch):
    for split in ("train", "test"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for i, image in enumerate(draw_shapes(48, train=40, test=1).train_images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "photos" / split / f"{i}.png")
    shown, get = {}, FeatureCache.__getitem__

    def count(cache, index):
        n = len(cache.images)
        shown.setdefault(n, []).append(torch.bincount(index % n, minlength=n))
        return get(cache, index)

    monkeypatch.setattr(FeatureCache, "__getitem__", count)
    train(f"DATASET={(str(folder), str(tmp_path / 'photos'))}", "IMAGE_SIZE=32", *SMALL, "BATCH_SIZE=16",
          "EPOCHS=(3, 1)", "EPOCH_IMAGES=96")  # four epochs of six steps of 16 images: 192 of each dataset
    counts = {number: set(sum(counts).tolist()) for number, counts in shown.items()}
    assert counts == {90: {2, 3}, 40: {4, 5}}


def test_mirrored_images_have_features_of_their_own(train, folder):
    tables = {}
    for flip in (False, True):
        train(f"DATASET={folder}", *SMALL, "EPOCHS=(1, 1)", "LEARNING_RATE=(1e-9, 1e-9)", f"FLIP={flip}")
        outputs, = set(Path("outputs").iterdir()) - {path for path, _ in tables.values()}
        tables[flip] = outputs, rows(outputs / "metrics.csv")[-1]
    l2, distill = ([float(tables[flip][1][name]) for flip in (False, True)] for name in ("l2_loss", "distill_loss"))
    assert l2[0] != l2[1] and max(distill) < 1e-3  # features of the other way round would be 0.1 or more away


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("encoder", ["cifar", "dinov2_s"])
def test_each_weight_has_one_optimizer(encoder, optimizer, monkeypatch):
    import train as script

    monkeypatch.setattr(script, "OPTIMIZER", optimizer)
    model = VQRAE(encoder, post_quant_kernel=3, decoder_width=64, decoder_depth=1, decoder_heads=2, pretrained=False)
    names = {p: name for name, p in model.named_parameters()}
    for stage in (1, 2):
        optimizers = script.build_optimizers(model.set_stage(stage), 1e-3)
        groups = [[p for group in o.param_groups for p in group["params"]] for o in optimizers]
        assert sorted(names[p] for group in groups for p in group) == sorted(names[p] for p in names if p.requires_grad)
        assert len(groups) == (2 if optimizer == "muon" else 1)
        if optimizer == "muon":
            if encoder == "cifar":  # residual blocks, and in the decoder the convolution before each size's block
                blocks = ["adapter.0", "adapter.1", "adapter.2", "predictor.0", "predictor.1",
                          "decoder.layers.1", "decoder.layers.4", "decoder.layers.7"]
                expected = {f"{block}.{conv}.weight" for block in blocks for conv in ("conv1", "conv2")}
                expected |= {f"decoder.layers.{i}.weight" for i in (0, 2, 5)}
            else:
                expected = {f"{block}.{matrix}.weight" for block in ("adapter.0", "predictor.0", "decoder.blocks.0")
                            for matrix in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
            assert {names[p] for p in groups[1]} == expected | {"post_quant_conv.weight"}


def test_gan_begins_where_it_should(train, folder):
    train(f"DATASET={folder}", *SMALL, "STAGES=(1,)", "GAN_START=0.75", "GAN_WEIGHT=0.1")  # at the last of four steps
    first, second = rows(next(Path("outputs").iterdir()) / "metrics.csv")
    assert float(first["discriminator_loss"]) == 0
    assert 0.8 < float(second["discriminator_loss"]) < 1.2  # a hinge loss at its start; not averaged with other steps
    last, = Path("checkpoints").glob("*/last.pt")
    seed_everything(0, 1)
    untrained, learned = PatchDiscriminator(32).state_dict(), load_torch(last)["discriminator"]
    assert not any(torch.equal(untrained[name], learned[name]) for name in untrained)


def test_gan_and_images_weigh_the_same_at_the_last_layer(monkeypatch):
    import train

    monkeypatch.setattr(train, "GAN_WEIGHT", 0.5)
    monkeypatch.setattr(train, "PRECISION", "fp32")
    torch.manual_seed(0)
    model = VQRAE(decoder_width=64, decoder_depth=1).train()
    images = torch.rand(4, 3, 32, 32)
    discriminator = PatchDiscriminator(32).requires_grad_(False)
    losses, output = train.Objective(1, model, None, None)(images, model.encoder(images).detach(), discriminator)
    of_images, of_gan, of_both = (torch.autograd.grad(loss, model.decoder.head.weight, retain_graph=True)[0]
                                  for loss in (16 * torch.nn.functional.mse_loss(output, images),
                                               -discriminator(output).mean(), losses["loss"]))
    expected = of_images + 0.5 * of_gan * of_images.norm() / of_gan.norm()
    assert of_gan.norm() > 0 and torch.allclose(of_both, expected, rtol=1e-2, atol=1e-3 * expected.abs().max())


def test_a_loss_of_weight_0_is_not_computed(train, folder):
    train(f"DATASET={folder}", *SMALL, "EPOCHS=(1, 1)", "PERCEPTUAL_WEIGHT=(0, 0.1)")
    outputs, = Path("outputs").iterdir()
    first, second = rows(outputs / "metrics.csv")
    assert float(first["perceptual_loss"]) == 0 < float(second["perceptual_loss"])


def test_starting_from_a_checkpoint(train, folder):
    first_run = [f"DATASET={folder}", *SMALL, "KEEP_CHECKPOINTS=1", "QUANTIZER=fsq"]
    train(*first_run, "STAGES=(1,)")
    first, = Path("checkpoints").iterdir()
    names = {f.name for f in first.iterdir()}
    assert names == {"fsq_stage1_best.pt", "fsq_stage1_epoch_2.pt", "last.pt", "lock"}  # epoch_1 is pruned
    checkpoint = first / "fsq_stage1_best.pt"
    train(*first_run, "STAGES=(2,)", f"START_CHECKPOINT={checkpoint}", "LEARNING_RATE=(1e-3, 1e-9)")
    second, = set(Path("checkpoints").iterdir()) - {first}
    stage1, stage2 = load_checkpoint(checkpoint), load_checkpoint(second / "fsq_stage2_best.pt")
    assert stage2.stage == 2
    for weight, start in zip(stage2.parameters(), stage1.parameters()):
        assert torch.allclose(weight, start, atol=1e-4)
    with pytest.raises(SystemExit, match="START_CHECKPOINT.*there and.*here"):
        train(*first_run, "STAGES=(2,)", f"START_CHECKPOINT={checkpoint}", "POST_QUANT_KERNEL=3")
    train(*first_run, "STAGES=(1,)", f"START_CHECKPOINT={checkpoint}", "LEARNING_RATE=(1e-9, 1)", "SEED=1")
    third, = set(Path("checkpoints").iterdir()) - {first, second}
    kept, same = (load_checkpoint(path / "fsq_stage1_best.pt").state_dict() for path in (first, third))
    assert all(torch.allclose(kept[name], same[name], atol=1e-6) for name in kept)
    checkpoint.write_bytes((second / "fsq_stage2_best.pt").read_bytes())  # another file of the same name is another run
    train(*first_run, "STAGES=(2,)", f"START_CHECKPOINT={checkpoint}")
    assert len(list(Path("checkpoints").iterdir())) == 4
    larger = "STAGES=(2,)", f"START_CHECKPOINT={checkpoint}", "IMAGE_SIZE=64"
    with pytest.raises(SystemExit, match="START_CHECKPOINT.*image_size is 32 there and 64 here"):  # 8 pixels a token
        train(*first_run, *larger)
    train(*first_run, *larger, "GRID=16", "LEARNING_RATE=(1e-3, 1e-9)", "SEED=2")
    *_, path = sorted(Path("checkpoints").glob("*/fsq_stage2_best.pt"), key=lambda path: path.stat().st_mtime)
    before, after = load_checkpoint(checkpoint), load_checkpoint(path)
    assert (after.config["image_size"], after.config["grid"]) == (64, 16)
    for weight, start in zip(after.parameters(), before.parameters()):
        assert torch.allclose(weight, start, atol=1e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_checkpoint_with_another_quantizer(stage, train, folder, capsys):
    rates = "LEARNING_RATE=(1e-3, 1e-3)", f"LEARNING_RATE={'(1e-9, 1)' if stage == 1 else '(1, 1e-9)'}"
    train(f"DATASET={folder}", *SMALL, rates[0], f"STAGES={(1, 2)[:stage]}")
    checkpoint, = Path("checkpoints").glob(f"*/ema_vq_stage{stage}_best.pt")
    start = f"START_CHECKPOINT={checkpoint}"
    train(f"DATASET={folder}", *SMALL, rates[1], "QUANTIZER=ddcl", f"STAGES=({stage},)", start)
    assert "the quantizer starts anew" in capsys.readouterr().out
    swapped, = Path("checkpoints").glob(f"*/ddcl_stage{stage}_best.pt")
    before, after = load_checkpoint(checkpoint), load_checkpoint(swapped)
    assert after.config["quantizer"] == "ddcl" and after.stage == stage
    for part in ("encoder", "adapter", "predictor", "decoder"):
        for start, weight in zip(getattr(before, part).parameters(), getattr(after, part).parameters()):
            assert torch.allclose(weight, start, atol=1e-5)
    distance, = {float(row["distill_loss"]) > 1e-6 for row in rows(next(Path("outputs").glob("*ddcl*/metrics.csv")))}
    assert distance == (stage == 2)  # in stage 2 to the encoder as pretrained, not as in the checkpoint


def test_switches_of_training_alone_keep_the_quantizer(train, folder, capsys):
    arguments = [f"DATASET={folder}", *SMALL, "STAGES=(1,)", "EPOCHS=(1, 1)"]
    train(*arguments)
    first, = Path("checkpoints").glob("*/ema_vq_stage1_best.pt")
    train(*arguments, "LEARNING_RATE=(1e-9, 1)", "EMA_REVIVE=False", f"START_CHECKPOINT={first}")
    second, = set(Path("checkpoints").glob("*/ema_vq_stage1_best.pt")) - {first}
    assert "starts anew" not in capsys.readouterr().out
    before, after = load_checkpoint(first).quantizer, load_checkpoint(second)
    assert not after.quantizer.revive and not after.config["quantizer_options"]["revive"]
    torch.testing.assert_close(after.quantizer.project_in.weight, before.project_in.weight, atol=1e-6, rtol=0)


def test_a_run_of_other_code_is_not_gone_on_with(train, folder):
    arguments = [f"DATASET={folder}", *SMALL, "EPOCHS=(1, 1)"]
    train(*arguments)
    last, = Path("checkpoints").glob("*/last.pt")
    original, saved = load_torch(last), load_torch(last)
    saved["model"]["decoder.head.weight"] = saved["model"]["decoder.head.weight"][:1]
    next(Path("outputs").glob("*/results.json")).unlink()
    best = last.with_name("ema_vq_stage1_best.pt")
    for other, words in ((saved, "another version.*delete"), ([], "has not all of stage, epoch, history"),
                         (load_torch(best), "has not all of"), (saved | {"model": None}, "another version")):
        save_torch(last, other)
        with pytest.raises(SystemExit, match=rf"^train.py: .*last.pt .*{words}") as error:
            train(*arguments)
        assert "\n" not in str(error.value.code)
    save_torch(last, original)
    last.with_name("ema_vq_stage2_best.pt").unlink()
    with pytest.raises(SystemExit, match="^train.py: .*ema_vq_stage2_best.pt.*delete .*last.pt"):
        train(*arguments)


def test_going_on_from_stage_2_holds_the_encoder_to_the_pretrained_one(train, folder):
    arguments = [f"DATASET={folder}", *SMALL, "EPOCHS=(1, 1)"]
    train(*arguments, "DISTILL_WEIGHT=0", "LEARNING_RATE=(1e-3, 3e-3)")
    first, = Path("checkpoints").iterdir()
    start = f"START_CHECKPOINT={first / 'ema_vq_stage2_best.pt'}"
    train(*arguments, "STAGES=(2,)", start, "LEARNING_RATE=(1e-3, 1e-9)")
    second, = set(Path("outputs").iterdir()) - {Path("outputs", first.name)}
    row, = rows(second / "metrics.csv")
    assert float(row["distill_loss"]) > 1e-2  # to the encoder that it starts with, it would be 0
    with pytest.raises(SystemExit, match="START_CHECKPOINT.*of stage 1.*STAGES"):
        train(*arguments, "STAGES=(1,)", start)


def test_the_best_checkpoint_is_the_epoch_with_the_best_psnr(train, folder):
    train(f"DATASET={folder}", *SMALL, "STAGES=(1,)", "LEARNING_RATE=(0.03, 1e-5)", "EPOCHS=(5, 1)")
    outputs, = Path("outputs").iterdir()
    best = load_torch(Path("checkpoints", outputs.name, "ema_vq_stage1_best.pt"))
    values = [float(row["psnr"]) for row in rows(outputs / "metrics.csv")]
    assert best["epoch"] == values.index(max(values)) + 1 and best["metrics"]["psnr"] == pytest.approx(max(values))
    assert best["constants"]["QUANTIZER"] == "ema_vq" and best["constants"]["DATASET"] == str(folder)


def test_a_run_goes_on_with_fewer_checkpoints(train, folder, monkeypatch):
    arguments, save = [f"DATASET={folder}", *SMALL, "STAGES=(1,)", "EPOCHS=(4, 1)"], save_torch

    def stop(path, content):
        save(path, content)
        if content.get("epoch") == 3 and path.name == "last.pt":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("utils.save_torch", stop)
        with pytest.raises(SystemExit, match="stopped"):
            train(*arguments, "KEEP_CHECKPOINTS=3")
    run, = Path("checkpoints").iterdir()
    assert len(list(run.glob("*_epoch_*.pt"))) == 3
    train(*arguments, "KEEP_CHECKPOINTS=1")
    assert [path.name for path in run.glob("*_epoch_*.pt")] == ["ema_vq_stage1_epoch_4.pt"]


def test_an_epoch_is_printed_when_it_is_saved(train, folder, monkeypatch, capsys):
    def interrupt(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr("utils.save_torch", interrupt)
    with pytest.raises(SystemExit, match="no epoch was finished"):
        train(f"DATASET={folder}", *SMALL)
    assert not re.search(r"^ +1 +1 ", capsys.readouterr().out, re.MULTILINE)


def test_a_full_disk_ends_in_one_line(train, folder, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("utils.save_torch", full)
    with pytest.raises(SystemExit, match="No space left on device.*last.pt|No space left on device.*best.pt"):
        train(f"DATASET={folder}", *SMALL)


@pytest.mark.parametrize("argument", [
    "DATASET=nowhere", "DATASET=3", "IMAGE_SIZE=8", "IMAGE_SIZE=32.5", "ENCODER=cifra", "ENCODER=1", "GRID=5",
    "GRID=0", "QUANTIZER=vq", "QUANTIZER=['fsq']", "FSQ_LEVELS=(8, 1)", "FSQ_LEVELS=8", "SIMVQ_CODEBOOK_SIZE=1",
    "EMA_CODEBOOK_SIZE=big", "SIMVQ_CODE_DIM=0", "SIMVQ_CODE_DIM=1", "EMA_CODE_DIM=0.5", "DDCL_DELTA=0",
    "DDCL_DELTA=0.3", "DDCL_COMM_WEIGHT=-1", "ADAPTER_DEPTH=-1", "POST_QUANT_KERNEL=2", "FLIP=2",
    "GRID=8 ENCODER=cnn", "DECODER_WIDTH=0", "DECODER_DEPTH=0",
    "DECODER_HEADS=7 DECODER=vit", "DECODER=cnn", "DECODER=vit ENCODER=cnn GRID=4", "DECODER=conv IMAGE_SIZE=48",
    "L2_WEIGHT=-1", "PERCEPTUAL=vgg", "PERCEPTUAL_WEIGHT=0.1", "GAN_WEIGHT=-0.1", "GAN_START=1.5",
    "PREDICT_WEIGHT=no", "PREDICT_IMAGE=-1", "DISTILL_WEIGHT=-1", "STAGES=(2, 1)", "STAGES=1", "STAGES=(2,)",
    "START_CHECKPOINT=a.pt", "EPOCHS=10", "EPOCHS=(0, 1)", "EPOCH_IMAGES=0", "EPOCH_IMAGES=10", "EVAL_IMAGES=0",
    "BATCH_SIZE=0", "BATCH_SIZE=1000 EPOCH_IMAGES=None", "LEARNING_RATE=(1e-3,)", "LEARNING_RATE=(0, 1e-5)",
    "FEATURE_CACHE_GB=-1", "KEEP_CHECKPOINTS=-1", "BATCH_SIZE=9 ACCUMULATE=2", "ACCUMULATE=0", "PRECISION=fp16",
    "OPTIMIZER=sgd", "EMA_REVIVE=1", "IMAGES_GB=-1", "SEED=-1", "QUANTIZER", "NONSENSE=1", "SEED=3000000000",
    "FSQ_LEVELS=(64, 64, 64, 64, 64)", "CODEBOOKS=0", "CODEBOOKS=2.5", "CODEBOOKS=5 QUANTIZER=simvq",
    "CODEBOOKS=70 QUANTIZER=ema_vq", "CODEBOOKS=2 QUANTIZER=ddcl", "CODEBOOKS=2 QUANTIZER=none", "CODEBOOKS=6",
    "CODEBOOKS=3 QUANTIZER=ema_vq COMBINE=product", "COMBINE=sum", "COMBINE=product CODEBOOKS=2 QUANTIZER=fsq",
    "RANDOM_DEPTH=2 CODEBOOKS=2", "RANDOM_DEPTH=0.5", "RANDOM_DEPTH=0.5 CODEBOOKS=2 COMBINE=product QUANTIZER=ema_vq",
    "RANDOM_DEPTH=0.5 CODEBOOKS=2 BATCH_SIZE=4 ACCUMULATE=4",
    "STAGES=(1.0,)", "STAGES=(True,)", "EPOCHS=(10000000000, 1)", "LEARNING_RATE=(1e39, 1)",
    "SEED=99999999999999999999", "IMAGE_SIZE=1048576", "DECODER_WIDTH=100000", "FSQ_LEVELS=(8, 8.0)", "GRID=True",
    "DATASET={}", "L2_WEIGHT=1e400",
])
def test_a_wrong_constant_ends_in_one_line(argument, train, folder, monkeypatch):
    if not argument.startswith(("DATASET", "BATCH_SIZE=1000")):
        monkeypatch.setattr("utils.load_dataset", lambda *args: pytest.fail("looked for data before all was checked"))
    name = argument.split("=")[0]
    given = [] if name == "DATASET" else [f"DATASET={folder}"]
    quantizers = {"DDCL_DELTA": "ddcl", "SIMVQ_CODE_DIM": "simvq", "FSQ_LEVELS": "fsq"}
    quantizer = [f"QUANTIZER={quantizers[name]}"] if name in quantizers else []
    with pytest.raises(SystemExit) as error:
        train(*given, *quantizer, *re.split(r" (?=[A-Z])", argument))
    message = str(error.value.code)
    assert "\n" not in message and message.startswith("train.py: ") and "allowed" in message
    option = {"FSQ_LEVELS": "levels", "DDCL_DELTA": "delta", "SIMVQ_CODE_DIM": "code_dim"}.get(name, name.lower())
    assert name in message or option in message  # of the quantizer
    assert not Path("outputs").exists() and not Path("checkpoints").exists()


def test_nan_stops_the_run_and_is_named(train, folder, monkeypatch):
    monkeypatch.setattr("models.ConvDecoder.forward",
                        lambda self, z: self.head.weight.sum() * torch.full((len(z), 3, 32, 32), torch.inf))
    with pytest.raises(SystemExit, match="l2_loss.*stage 1, epoch 1, step 1"):
        train(f"DATASET={folder}", *SMALL)


def test_full_gpu_memory_ends_in_one_line(train, folder, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("models.ConvDecoder.forward", full)
    with pytest.raises(SystemExit, match="memory is full.*ACCUMULATE") as error:
        train(f"DATASET={folder}", *SMALL)
    assert "\n" not in str(error.value.code)


def test_full_gpu_memory_while_resuming_is_no_other_code(train, folder, monkeypatch):
    arguments = [f"DATASET={folder}", *SMALL, "EPOCHS=(1, 1)"]
    train(*arguments)
    next(Path("outputs").glob("*/results.json")).unlink()

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("models.PatchDiscriminator.load_state_dict", full)
    with pytest.raises(SystemExit, match="memory is full"):
        train(*arguments)
    monkeypatch.setattr("utils.load_dataset", full)
    with pytest.raises(SystemExit, match="memory is full"):
        train(*arguments)


def test_features_that_do_not_fit_are_mentioned(train, folder, capsys):
    train(f"DATASET={folder}", *SMALL, "EPOCHS=(1, 1)", "STAGES=(1,)", "FEATURE_CACHE_GB=0.001")
    assert re.search(r"features take 0.0 GB, more than is left of FEATURE_CACHE_GB = 0.001", capsys.readouterr().out)


def test_lpips_out_of_reach(train, folder, monkeypatch, tmp_path):
    monkeypatch.setattr("utils.reachable", lambda url: False)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(SystemExit, match='vgg16.*cannot be reached.*PERCEPTUAL = "encoder"'):
        train(f"DATASET={folder}", *SMALL, "PERCEPTUAL=lpips")


def test_defaults_spelled_out_are_the_same_model():
    spelled_out = VQRAE(decoder="conv", decoder_width=192, decoder_depth=2, decoder_heads=3, adapter_depth=3)
    assert VQRAE().config == spelled_out.config


def test_pretrain_writes_an_encoder_that_loads(tmp_path, folder, monkeypatch):
    def pretrain(*arguments):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", f"DATASET={folder}", "BATCH_SIZE=32", *arguments])
        runpy.run_path(str(ROOT / "pretrain.py"), run_name="__main__")

    pretrain("EPOCHS=2", f"OUT={tmp_path}")
    AirbenchEncoder().load_state_dict(torch.load(tmp_path / "cifar_encoder.pt", weights_only=True))
    recipe = json.loads((tmp_path / "cifar_encoder.json").read_text())
    assert recipe["EPOCHS"] == 2 and 0 <= recipe["linear_probe_accuracy"] <= 1
    (tmp_path / "file").touch()
    written = (tmp_path / "cifar_encoder.pt").read_bytes()
    with pytest.raises(SystemExit, match="^pretrain.py: the weights are not finite"):
        pretrain("EPOCHS=1", f"OUT={tmp_path}", "LEARNING_RATE=(0.1, 1e18)")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(SystemExit, match=r"^pretrain.py: .*No space left on device: '.*cifar_encoder.pt'$"):
            pretrain("EPOCHS=1", f"OUT={tmp_path}")
    assert (tmp_path / "cifar_encoder.pt").read_bytes() == written
    with pytest.raises(SystemExit, match="^pretrain.py: BATCH_SIZE = 1000, allowed: at most the number of images$"):
        pretrain("BATCH_SIZE=1000")
    monkeypatch.setattr("utils.load_dataset", lambda *args, **kwargs: pytest.fail("looked for data before checking"))
    for wrong in ("EPOCHS=0", "SEED=0.5", "LEARNING_RATE=None", "PIXEL_WEIGHT=x", "OUT=5"):
        with pytest.raises(SystemExit, match=rf"^pretrain.py: {wrong.split('=')[0]} = [^\n]*$"):
            pretrain(wrong)


def test_command_line(tmp_path, folder):
    """As a user runs it: a process of its own, one clear line for a mistake."""
    command = [sys.executable, ROOT / "train.py", "QUANTIZER=fqs"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert run.stderr == 'train.py: QUANTIZER = \'fqs\', allowed: "fsq", "simvq", "ema_vq", "ddcl", "none"\n'
