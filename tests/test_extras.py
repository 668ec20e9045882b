"""extras/: codecs, tables of runs, timing, and how the encoder was made."""
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import models
import train
import utils
from data import draw_shapes, load_dataset
from extras import bench, cells, codecs, compare, measure, pretrain
from models import PRETRAINED_DIR, ConvEncoder
from utils import psnr

SHIPPED = PRETRAINED_DIR / "vqrae_fsq.pt"


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """run(module, *arguments, NAME=value, ...) runs a script on `folder`: the lines that it prints, and their cells."""
    def run(module, *arguments, **values):
        for name, value in {"DATASET": str(folder), **values}.items():
            monkeypatch.setattr(module, name, value, raising=False)
        monkeypatch.setattr("sys.argv", ["script", *map(str, arguments)])
        module.main()
        return [re.split(r" *\| *", line.strip("| ")) for line in capsys.readouterr().out.splitlines()]
    return run


def test_codecs_get_one_picture_and_the_nearest_bits():
    images = draw_shapes(9, 32)[0][..., :24]
    bits, originals, decoded, _ = codecs.encode(images, "JPEG", 95)
    assert originals is images and (decoded.float() - images).square().mean((1, 2, 3)).max() < 100  # each in its place
    picture = torch.cat([torch.cat([*row], 2) for row in images.split(3)], 1).permute(1, 2, 0).numpy()
    codecs.Image.fromarray(picture).save("picture.jpg", "JPEG", quality=95, **codecs.CODECS["JPEG"])
    assert bits == 8 * os.path.getsize("picture.jpg")
    sizes = torch.tensor([codecs.encode(images, "JPEG", quality).bits for quality in range(1, 101)])
    for bits in (1, 20_000, 30_000, int(sizes[60]) + 1, 10**6):
        assert codecs.encode_to_bits(images, "JPEG", bits).bits == sizes[(sizes - bits).abs().argmin()]


def test_the_table_of_codecs(run, folder, monkeypatch):
    monkeypatch.setattr(codecs, "CODECS", {"AVIF": codecs.CODECS["AVIF"]})
    names, _, *rows = run(codecs, SHIPPED, COUNT=5)
    own, avif = (dict(zip(names, row)) for row in rows)
    vqrae, data = models.load_checkpoint(SHIPPED), load_dataset(str(folder), 32)
    images = data.test_images[:4]  # 2 x 2
    name, output = os.path.relpath(SHIPPED), utils.evaluate(vqrae, images)[2]
    expected = [name, f"{psnr(output, images).mean():.2f}", f"{64 * math.log2(64_000):,.0f}"]
    assert [own["images from"], own["PSNR"], own["bits"]] == expected and avif["images from"] == f"AVIF, as {name}"
    bits, _, decoded, quality = codecs.encode_to_bits(images, "AVIF", 4 * 64 * math.log2(64_000))
    assert avif["bits"] == f"{bits / 4:,.0f}" != f"{codecs.encode(images, 'AVIF', 50).bits / 4:,.0f}"
    assert float(own["to AVIF"]) == pytest.approx(float(own["PSNR"]) - float(avif["PSNR"]), abs=0.011)
    # a judge learns from training images decoded from the same quality
    train = codecs.square(data.train_images, 3_000)
    train_decoded = codecs.encode(train, "AVIF", quality).decoded
    judge = measure.load_judges(4, data)[0]["cifar"]
    x, test_x = (measure.pooled_features(judge, part) for part in (train_decoded, decoded))
    accuracy = measure.linear_probe(x, data.train_labels[: len(x)], test_x, data.test_labels[:4])
    assert avif["in reconstructions (cifar)"] == f"{accuracy:.1%}" and "in reconstructions (cifar)" in own
    assert avif["class in images (cifar)"] == "-" != own["class in images (cifar)"]


def test_a_table_of_runs(run, trained, monkeypatch):
    shutil.copytree(trained, ".", copy_function=os.link, dirs_exist_ok=True)
    (outputs,), commands, figures = Path("outputs").iterdir(), [], []
    process = type("", (), {"stdout": ["     1      1\n", f"see {outputs}/\n"], "pid": os.getpid(),
                            "wait": lambda self: len(commands) // 5})()
    monkeypatch.setattr(compare.subprocess, "Popen", lambda command, **_: commands.append(command[1:]) or process)
    monkeypatch.setattr(compare, "save_figure", lambda path, figure: figures.append(figure))
    names, _, first, *_, last = run(compare, "SEED=3", BITS=(20,))[-8:-2]
    row, results = dict(zip(names, first)), json.loads((outputs / "results.json").read_text())
    assert commands[0][2:] == ["SEED=3", "QUANTIZER=fsq", "FSQ_LEVELS=(8,8,8,8,8,6,5)"] and len(commands) == 4
    assert commands[0][:2] == ["train.py", f"DATASET={compare.DATASET}"]
    assert (row["quantizer"], row["a token"], row["PSNR"]) == ("FSQ (8,8,8,8,8,6,5)", "6.0", f"{results['psnr']:.2f}")
    assert row["entropy"] == f"{math.log2(results['perplexity']):.2f}" and last[0] == "product EMA-VQ 1024"
    assert figures[-1].axes[0].lines[1].get_xydata().tolist() == [[6, results["psnr"]]]
    assert float(row["z_q"].strip("%")) > 50 and row["ms a step"] != "0"  # two classes
    assert sys.platform != "linux" or float(row["GB"]) > 0.1
    assert len(figures[-1].axes[2].lines[0].get_ydata()) == 3  # epochs
    for wrong, message in (({}, "train.py"), ({"BITS": (8,)}, "BITS, WIDTHS")):
        with pytest.raises(ValueError, match=message):
            run(compare, "SEED=3", **wrong)


def test_what_is_timed(monkeypatch, capsys):
    for name, value in {"BATCH_SIZE": 2, "COMPILE": "", "compiled": lambda function: function}.items():
        monkeypatch.setattr(train, name, value)
    for name, value in {"ROUNDS": 3, "COMPILED": True}.items():
        monkeypatch.setattr(bench, name, value)
    bench.steps()
    row = r"^(ordinary|train.py) (default)? +([\d.]+) +nan +([\d,]+) +([\d.]+)% +nan +-?\d+$"
    rows = re.findall(row, capsys.readouterr().out, re.M)
    assert [row[:2] for row in rows] == [(loop, mode) for mode in ("", "default") for loop in ("ordinary", "train.py")]
    for _, _, milliseconds, rate, share in rows:
        assert float(rate.replace(",", "")) == pytest.approx(2000 / float(milliseconds), abs=0.51) and float(share) > 0


def test_cells_of_each_quantizer(run, monkeypatch):
    monkeypatch.setattr(cells, "KINDS", dict([*cells.KINDS.items()][::4]))
    figures = []
    monkeypatch.setattr(cells, "save_figure", lambda path, figure: figures.append(figure))
    rows = run(cells, STEPS=20)
    assert len(rows) == 3 and [axes.get_title().split("\n")[0] for axes in figures[0].axes[:3]] == [*cells.KINDS]
    model = cells.learn("ema_vq", {"codebook_size": 8, "code_dim": None})
    x = cells.draw_vectors(500)
    assert torch.nn.functional.mse_loss(model(x)[0], x) < 0.5 * x.var()


def test_pretraining_writes_what_the_encoder_loads(run, folder, monkeypatch):
    """At first, patches are whitened. In the end BatchNorm is folded into convolutions: outputs stay."""
    seen, initialize, fuse = [], pretrain.initialize, pretrain.fuse_conv_bn_eval
    test = load_dataset(str(folder), 32).test_images[:4] / 255

    def check_start(encoder, images):
        initialize(encoder, images)
        white = encoder.whiten((images - 0.5) / 0.25)[..., 1:-1, 1:-1].transpose(0, 1).flatten(1)
        moments = white[:12] @ white[:12].T / white.shape[1]
        torch.testing.assert_close(moments, moments.diag().diag(), atol=1e-3, rtol=0)
        assert 0.8 < moments.diag()[:4].min() < moments.max() < 1.001  # 1, but for components of nearly none
        seen.append(encoder)

    monkeypatch.setattr(pretrain, "initialize", check_start)
    monkeypatch.setattr(pretrain, "fuse_conv_bn_eval", lambda *a: seen.append(seen[0](test)) or fuse(*a))
    (*_, (line,)), encoder = run(pretrain, EPOCHS=2, BATCH_SIZE=45, OUT="out"), ConvEncoder()
    encoder.load_state_dict(torch.load("out/cifar_encoder.pt"))
    torch.testing.assert_close(encoder(test), seen[1], atol=0.02, rtol=0.01)
    assert re.search("linear probe (0.[5-9]|1.0)", line)
