"""The scripts of extras/: measuring, codecs, tables of runs, cells, and how the encoder was made."""
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from PIL import Image
from test_measure import noise, small

import train
import utils
from data import draw_shapes, load_dataset
from extras import cells, codecs, compare, measure, pretrain
from models import PRETRAINED_DIR, ConvEncoder, load_checkpoint, save_checkpoint
from quantizers import build_quantizer
from utils import evaluate, psnr

SHIPPED = PRETRAINED_DIR / "vqrae_fsq.pt"


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """run(module, *arguments, NAME=value, ...) runs a script on `folder`, and returns the rows of its table."""
    monkeypatch.setattr(codecs, "CODECS", {"AVIF": {"speed": 10}})

    def run(module, *arguments, **values):
        for name, value in {"DATASET": str(folder), **values}.items():
            monkeypatch.setattr(module, name, value, raising=False)
        monkeypatch.setattr("sys.argv", ["script", *map(str, arguments)])
        module.main()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        table = [re.split(r" *\| *", line)[1:-1] for line in lines]
        return {row[0]: dict(zip(table[0], row)) for row in table[2:]}

    return run


def test_measure_finds_what_the_run_measured(run, trained):
    best, = trained.glob("checkpoints/*/*stage2_best.pt")
    results = json.loads(next(trained.glob("outputs/*/results.json")).read_text())
    row = run(measure, best, TRAIN_IMAGES=0)[str(best)]
    assert float(row["PSNR"]) == pytest.approx(results["psnr"], abs=0.011)
    assert (row["bits"], row["ratio"]) == ("384", "64.0")  # 64 tokens of 6 bits; 24 * 32 * 32 / 384


@pytest.mark.parametrize("script, quantizer, values, message", [
    (measure, "fsq", {"IMAGE_SIZE": 8}, "IMAGE_SIZE = 8"), (measure, "fsq", {"METRICS": "fid"}, "METRICS = 'fid'"),
    (codecs, "fsq", {"COUNT": 0}, "COUNT = 0"), (codecs, "fsq", {"PHOTOS": "."}, "no images"),
    (codecs, "none", {}, "no codes")])
def test_what_cannot_be_measured_is_refused_before_the_work(script, quantizer, values, message, run, monkeypatch):
    monkeypatch.setattr(script, "load_dataset", None)
    save_checkpoint("small.pt", small("cnn", quantizer, {}))
    with refused(message):
        run(script, "small.pt", **values)


# Codecs

def test_codecs_get_one_picture_and_give_back_each_image():
    images = draw_shapes(9, 32)[0][..., :24]
    rows = [torch.cat([*row], 2) for row in images.split(3)]
    Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).numpy()).save("a.jpg", quality=95, **codecs.CODECS["JPEG"])
    file = codecs.encode(images, "JPEG", 95)
    assert file == Path("a.jpg").read_bytes()
    assert (codecs.decode(file, 9).float() - images).square().mean((1, 2, 3)).max() < 100


@pytest.mark.parametrize("share", [-99, 0.0, 0.25, 1.0, 99])
def test_a_codec_has_the_bits_of_the_tokens_between_two_of_its_files(share):
    """Far below or above all files, the first or the last counts."""
    images, files = draw_shapes(9, 32)[0], []
    for quality in {-99: (1, 2), 99: (99, 100)}.get(share, (50, 51)):
        file = codecs.encode(images, "JPEG", quality)
        files.append((8 * len(file), psnr(codecs.decode(file, 9), images)))
    (low, psnrs_low), (high, psnrs_high) = files
    bits, psnrs, _ = codecs.interpolate(images, "JPEG", low + share * (high - low))
    share = min(max(share, 0), 1)
    assert bits == low + share * (high - low)
    torch.testing.assert_close(psnrs, torch.lerp(psnrs_low, psnrs_high, share))


@pytest.mark.parametrize("size", [(9, 40), (40, 2**14)])
def test_a_photograph_that_cannot_be_compared_is_named_before_the_work(size, monkeypatch):
    monkeypatch.setattr(codecs, "PHOTOS", ".")
    Image.new("RGB", size).save("a.png")
    with refused("a.png has sides of"):
        next(codecs.photographs(11))


def test_the_figures_of_codecs_are_their_formulas():
    """Two pictures of one and two images: bits are means over images, and the error that of a mean of three."""
    own, avif = torch.tensor([30.0, 20, 10]), torch.tensor([31.0, 22, 13])
    figures = codecs.average([(100, 50, own[:1], own[:1] / 100), (200, 250, own[1:], own[1:] / 100)],
                             [(1, 1, avif[:1], None), (1, 1, avif[1:], None)])
    mse = (1e-3 + 1e-2 + 1e-1) / 3
    assert figures == pytest.approx({"bits": 100, "bits_a_pixel": 1, "psnr": 20, "psnr_of_mse": -10 * math.log10(mse),
                                     "ssim": 0.2, "difference": -2, "error": 1 / math.sqrt(3)})


def test_avif_gets_as_many_bits_as_the_tokens(run, folder):
    """Of 5 images, 2 x 2 are in one picture."""
    table, images = run(codecs, SHIPPED, COUNT=5), load_dataset(str(folder), 32).test_images[:4]
    own, avif = table[str(SHIPPED)], table[f"AVIF, as {SHIPPED}"]
    output, bits = evaluate(load_checkpoint(SHIPPED), images)[2], 64 * math.log2(64_000)
    assert float(own["PSNR"]) == pytest.approx(psnr(output, images).mean().item(), abs=0.011)
    assert own["bits"] == avif["bits"] == f"{bits:,.0f}"
    assert float(own["to AVIF"]) == pytest.approx(float(own["PSNR"]) - float(avif["PSNR"]), abs=0.02)


def test_a_photograph_is_measured_whole(run):
    Image.new("RGB", (36, 48), "red").save("a.png")
    row = run(codecs, SHIPPED, PHOTOS=".")[str(SHIPPED)]
    bits = math.log2(64_000)
    assert row["bits"] == f"{9 * 12 * bits:,.0f}" and row["bits a pixel"] == f"{bits / 16:.3f}"


# Tables of runs

def test_a_row_is_the_mean_of_a_line_trained_with_each_seed(run, monkeypatch):
    """A line that is half a decibel behind the best after the first seed is not run again."""
    commands = []

    def run_and_measure(arguments):
        commands.append(arguments[1:])
        return {"psnr": 20.0 + len(commands), "run": "a name has no mean"}

    monkeypatch.setattr(compare, "run_and_measure", run_and_measure)
    lines = {"DDCL": ("QUANTIZER=ddcl", {10: 0.5}), "FSQ": ("FSQ_LEVELS=*", {10: "(8,)"})}
    monkeypatch.setattr(compare, "LINES", lines)
    table = run(compare, "EPOCHS=3", BITS=(10,), SEEDS=(3, 4))
    assert [" ".join(command) for command in commands] == [
        "EPOCHS=3 QUANTIZER=ddcl SEED=3", "EPOCHS=3 FSQ_LEVELS=(8,) SEED=3", "EPOCHS=3 FSQ_LEVELS=(8,) SEED=4"]
    assert [row["PSNR"] for row in table.values()] == ["21.00", "22.50"]
    assert table["FSQ, 10 bits"]["max - min"] == "1.00"


@pytest.mark.parametrize("word, values, message", [
    ("SEED=3", {}, "'SEED=3', allowed"), ("QUANTIZER=fsq", {}, "'QUANTIZER=fsq', allowed"),
    ("FLIP=True", {"PROBE_IMAGES": 0}, "PROBE_IMAGES = 0")])
def test_a_table_refuses_constants_before_the_work(word, values, message, run):
    """Its lines and seeds set SEED, QUANTIZER and others themselves."""
    with refused(message):
        run(compare, word, **values)


def test_a_run_of_the_table_is_measured_once(trained, folder, monkeypatch):
    shutil.copytree(trained, ".", dirs_exist_ok=True)
    results, = Path("outputs").glob("*/results.json")
    for name, value in {"DATASET": str(folder), "PROBE_IMAGES": 10, "train_run": lambda _: results.parent.name}.items():
        monkeypatch.setattr(compare, name, value)
    figures = compare.run_and_measure([])
    assert figures["token_bits"] == 6 and figures["psnr"] == json.loads(results.read_text())["psnr"]
    assert 0 <= figures["probe_z_q"] <= 1
    monkeypatch.setattr(compare, "measure_run", None)
    assert compare.run_and_measure([]) == figures


@pytest.mark.parametrize("line", compare.LINES)
def test_the_lines_have_as_many_bits_as_their_columns_say(line, monkeypatch):
    words, values = compare.LINES[line]
    for bits, value in values.items():
        constants = utils.read_constants(dict(vars(train)), words.replace("*", str(value)).split(), train.kinds)
        for name, constant in constants.items():
            monkeypatch.setattr(train, name, constant)
        quantizer = build_quantizer(train.QUANTIZER, 32, **train.quantizer_options())
        assert math.log2(quantizer.codebook_size) == pytest.approx(bits, abs=0.8)


def test_a_run_that_fails_ends_the_table_in_a_sentence():
    Path("train.py").write_text("print('see outputs/data_fsq_1/. Done.')")
    assert compare.train_run(["SEED=1"]) == "data_fsq_1"
    Path("train.py").write_text("raise SystemExit('train.py: no')")
    with refused("train.py SEED=1 failed"):
        compare.train_run(["SEED=1"])


# Cells, and how the encoder was made

def test_cells_are_drawn_for_each_quantizer(run):
    run(cells, STEPS=2)
    assert Path("outputs/cells.png").exists()


@torch.no_grad()
def test_the_first_filters_whiten():
    """Their outputs are uncorrelated, and of variance v / (v + 0.0005) for a principal component of variance v."""
    images, encoder = draw_shapes(200, 32)[0] / 255, ConvEncoder()
    pretrain.initialize(encoder, images)
    white, negative = encoder.whiten((images - 0.5) / 0.25)[..., 1:-1, 1:-1].transpose(0, 1).flatten(1).chunk(2)
    moments = white @ white.T / white.shape[1]
    torch.testing.assert_close(moments, moments.diag().diag(), atol=1e-3, rtol=0)
    patches = F.unfold((images - 0.5) / 0.25, 3).transpose(0, 1).flatten(1)
    v = torch.linalg.eigvalsh(patches @ patches.T / patches.shape[1]).flip(0)[:12]
    torch.testing.assert_close(moments.diag(), v / (v + 0.0005), atol=1e-3, rtol=0)
    torch.testing.assert_close(white, -negative)


def test_pretraining_writes_an_encoder_with_its_batch_norms_folded_in(run, monkeypatch):
    written, save_encoder, images = [], pretrain.save_encoder, noise(4) / 255

    def save(encoder):
        written.append(encoder(images))
        save_encoder(encoder)

    monkeypatch.setattr(pretrain, "save_encoder", save)
    monkeypatch.setattr(pretrain, "linear_probe", lambda *features: 0.25)
    run(pretrain, EPOCHS=1, BATCH_SIZE=45, OUT="out")
    encoder = ConvEncoder()
    encoder.load_state_dict(torch.load("out/cifar_encoder.pt"))
    torch.testing.assert_close(encoder(images), written[0], atol=0.05, rtol=0.05)  # 16 bits
