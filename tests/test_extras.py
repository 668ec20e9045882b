"""extras/: the search for tokens, codecs, tables of runs, timing, and how the encoder was made."""
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
import utils
from data import draw_shapes, load_dataset
from evaluate import psnr, ssim
from extras import bench, codecs, compare, pretrain, search
from models import PRETRAINED_DIR, ConvEncoder

SHIPPED, PRIOR = PRETRAINED_DIR / "vqrae_fsq.pt", PRETRAINED_DIR / "prior.pt"


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


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (33, 21), (4, 5)], ids=str)
def test_searched_tokens_are_never_worse(size):
    """In pixels, for images of any size. With more feature_weight they are better in features."""
    vqrae, images = utils.load_checkpoint(SHIPPED), F.interpolate(draw_shapes(4, 32)[0] / 255, size)
    tokens = [vqrae.encode_to_indices(images)] + [search.search_tokens(vqrae, images, 2, w) for w in (0, 0.02)]
    errors = [(vqrae.decode_from_indices(x, size=size) - images).square().mean((1, 2, 3)) for x in tokens]
    distances = [(vqrae.features_from_indices(x) - vqrae.encoder(images)).square().mean() for x in tokens]
    assert tokens[1].shape == tokens[0].shape and tokens[1].dtype == torch.int64
    assert (errors[1] <= errors[0]).all() and errors[1].mean() < 0.96 * errors[0].mean()
    assert distances[2] < 0.97 * min(distances[:2])


def test_codecs_get_one_picture_and_the_nearest_bits():
    images = draw_shapes(9, 32)[0][..., :24]
    bits, originals, decoded = codecs.encode(images, "JPEG", 95)
    assert originals is images and (decoded.float() - images).square().mean((1, 2, 3)).max() < 100  # each in its place
    picture = torch.cat([torch.cat([*row], 2) for row in images.split(3)], 1).permute(1, 2, 0).numpy()
    codecs.Image.fromarray(picture).save("picture.jpg", "JPEG", quality=95, **codecs.CODECS["JPEG"])
    assert bits == 8 * os.path.getsize("picture.jpg")
    sizes = torch.tensor([codecs.encode(images, "JPEG", quality)[0] for quality in range(1, 101)])
    for bits in (1, 20_000, 30_000, int(sizes[60]) + 1, 10**6):
        assert codecs.encode_to_bits(images, "JPEG", bits)[0] == sizes[(sizes - bits).abs().argmin()]


def test_figures_of_codecs_by_hand():
    pictures = [draw_shapes(n, 32)[0][:, :, :16, :size] for n, size in ((4, 16), (1, 32))]
    ours, avif = ([(bits, x, (x / 255 * a + b).mul(255).byte()) for x in pictures]
                  for bits, a, b in ((100, 0.9, 0), (120, 0.5, 0.2)))
    mse = [torch.cat([(x / 255 - y / 255).square().mean((1, 2, 3)) for _, x, y in rows]) for rows in (ours, avif)]
    difference = 10 * (mse[1] / mse[0]).log10()
    assert codecs.average(ours, avif) == pytest.approx({
        "bits": 200 / 5, "bits_a_pixel": 200 / (4 * 256 + 512), "psnr": -10 * mse[0].log10().mean().item(),
        "psnr_of_mse": -10 * mse[0].mean().log10().item(), "difference": difference.mean().item(),
        "ssim": torch.cat([ssim(x, y) for _, x, y in ours]).mean().item(),
        "error": difference.std().item() / math.sqrt(5)}, rel=1e-4)


def test_the_scripts_of_codecs_and_search(run, folder, monkeypatch):
    monkeypatch.setattr(codecs, "CODECS", {"AVIF": codecs.CODECS["AVIF"]})
    own, avif, bounded, _ = run(codecs, SHIPPED, COUNT=5, SEARCH=1, PRIOR=str(PRIOR))[2:]
    vqrae, images = utils.load_checkpoint(SHIPPED), load_dataset(str(folder), 32).test_images[:4] / 255  # 2 x 2
    tokens = vqrae.encode_to_indices(images), search.search_tokens(vqrae, images, 1)
    before, after = (psnr((vqrae.decode_from_indices(x) * 255).round() / 255, images).mean().item() for x in tokens)
    bits = codecs.measure_bits(codecs.load_prior(PRIOR), tokens[1], torch.full((4,), 10))
    assert own[0] == "vqrae_fsq, searched" and own[1] == f"{64 * math.log2(64_000):,.0f}" and own[3] == f"{after:.2f}"
    assert bounded[:2] == [f"{own[0]}, with its prior", f"{bits:,.0f}"] and avif[0] == f"AVIF, as {own[0]}"
    encoded = codecs.encode_to_bits((images * 255).round().byte(), "AVIF", 4 * 64 * math.log2(64_000))
    assert avif[1] == f"{encoded[0] / 4:,.0f}" != f"{codecs.encode(encoded[1], 'AVIF', 50)[0] / 4:,.0f}"
    assert float(own[6]) == pytest.approx(float(own[3]) - float(avif[3]), abs=0.011)
    (line,), = run(search, SHIPPED, COUNT=4, SWEEPS=1)
    assert [*map(float, re.findall(r"(\S+) dB", line))] == pytest.approx([before, after], abs=0.02) and before < after


def test_a_table_of_runs(run, trained, monkeypatch):
    shutil.copytree(trained, ".", copy_function=os.link, dirs_exist_ok=True)
    (outputs,), commands, figures = Path("outputs").iterdir(), [], []
    process = type("", (), {"stdout": ["all\n", f"see {outputs}/\n"], "wait": lambda self: len(commands) // 5})()
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
    assert len(figures[-1].axes[2].lines[0].get_ydata()) == 3  # epochs
    with pytest.raises(ValueError, match="train.py"):
        run(compare, "SEED=3")


def test_what_is_timed(monkeypatch, capsys):
    first, second = iter([0, 3, 8, 10]), iter([0, 1, 2, 5])  # a warm-up, and three rounds
    for name, value in {"BATCH_SIZE": 2, "COMPILE": "", "compiled": lambda function: function}.items():
        monkeypatch.setattr(train, name, value)
    for name, value in {"ROUNDS": 3, "CODEBOOK_SIZES": (64,), "CODE_DIMS": (8,), "TOKENS": 9, "COMPILED": True}.items():
        monkeypatch.setattr(bench, name, value)
    bench.steps(), bench.quantizers(), monkeypatch.setattr(bench, "seconds", lambda run: run())
    bench.compare("SimVQ", first.__next__, second.__next__)
    printed = capsys.readouterr().out
    rows = re.findall(r"^[ES].+VQ .* +([\d.]+) ms +([\d.]+) ms +([\d.]+)$", printed, re.M)
    assert len(rows) == 3 and rows[2] == ("8000.0", "2000.0", "3.00")
    row = r"^(ordinary|train.py) (default)? +([\d.]+) +nan +([\d,]+) +([\d.]+)% +nan +-?\d+$"
    rows = re.findall(row, printed, re.M)
    assert [row[:2] for row in rows] == [(loop, mode) for mode in ("", "default") for loop in ("ordinary", "train.py")]
    for _, _, milliseconds, rate, share in rows:
        assert float(rate.replace(",", "")) == pytest.approx(2000 / float(milliseconds), abs=0.51) and float(share) > 0


def test_pretraining_writes_what_the_encoder_loads(run, folder, monkeypatch):
    """At first, patches are whitened and deep convolutions are the identity. Images are shifted, and mirrored once in
    two epochs. In the end BatchNorm is folded into convolutions: outputs stay."""
    seen, mirrored, initialize, augment = [], [], pretrain.initialize, pretrain.augment
    test, fuse = load_dataset(str(folder), 32).test_images[:4] / 255, pretrain.fuse_conv_bn_eval

    def check_start(encoder, images):
        initialize(encoder, images)
        white = encoder.whiten((images - 0.5) / 0.25)[..., 1:-1, 1:-1].transpose(0, 1).flatten(1)
        moments, x = white[:12] @ white[:12].T / white.shape[1], torch.rand(2, 64, 4, 4)
        variances = moments.diag()  # 1, but for components of nearly none
        torch.testing.assert_close(moments, variances.diag(), atol=1e-3, rtol=0)
        assert variances[:4].min() > 0.8 and variances.max() < 1.001 and variances.diff().max() < 1e-3  # largest first
        torch.testing.assert_close(white[:12], -white[12:]), torch.testing.assert_close(encoder.deep[3].conv(x), x)
        seen.append(encoder)

    def check_shifts(images, mirror):
        output, around = augment(images, mirror), F.pad(images, (2,) * 4, mode="reflect")
        shifted = torch.where(mirror[:, None, None, None], output.flip(3), output)[:, :, None, None]
        shifts = (around.unfold(2, 32, 1).unfold(3, 32, 1) == shifted).all(-1).all(-1).all(1).nonzero()  # image, y, x
        assert len(shifts[:, 0].unique()) == len(images) and len(shifts[:, 1:].unique(dim=0)) > 15
        mirrored.append(mirror)
        return output

    monkeypatch.setattr(pretrain, "initialize", check_start), monkeypatch.setattr(pretrain, "augment", check_shifts)
    monkeypatch.setattr(pretrain, "fuse_conv_bn_eval", lambda *a: seen.append(seen[0](test)) or fuse(*a))
    (*_, (line,)), encoder = run(pretrain, EPOCHS=2, BATCH_SIZE=45, OUT="out"), ConvEncoder()
    encoder.load_state_dict(torch.load("out/cifar_encoder.pt"))
    torch.testing.assert_close(encoder(test), seen[1], atol=0.02, rtol=0.01)
    assert torch.cat(mirrored).sum() == 90 and re.search("linear probe (0.[5-9]|1.0)", line)
