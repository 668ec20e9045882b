"""Metrics of utils.py, and the scripts of extras/: measuring, codecs, tables of runs, cells, the encoder's making."""
import json
import math
import os
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import SEED, refused
from PIL import Image
from scipy.linalg import sqrtm
from skimage.metrics import structural_similarity
from torchvision.models import VGG16_Weights

import train
import utils
from data import Dataset, draw_shapes, load_dataset
from extras import cells, codecs, compare, measure, pretrain
from extras.measure import frechet_distance, linear_probe, load_judges
from models import PRETRAINED_DIR, VQRAE, ConvEncoder, load_checkpoint, save_checkpoint
from quantizers import build_quantizer
from utils import evaluate, psnr, ssim

SHIPPED = PRETRAINED_DIR / "vqrae_fsq.pt"


def small(encoder="cnn", quantizer="fsq", options={"levels": [4, 3]}, **more):
    """A VQRAE for 16 x 16 images in 4 x 4 tokens, of 12 codes unless told otherwise."""
    return VQRAE(encoder, quantizer, options, 16, 4, decoder_width=32, decoder_depth=1, **more)


def noise(count=7):
    return torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8)


@pytest.mark.parametrize("count, size", [(3, 20), (1, 1100)])  # SSIM of the larger image is measured in two strips
def test_psnr_and_ssim_of_uint8_or_floats(count, size):
    a = draw_shapes(count, size)[0]
    b = (a / 255 + 0.2 * torch.randn(a.shape)).clamp(0, 1).mul(255).byte()
    mse = (a / 255 - b / 255).square().mean((1, 2, 3))
    similarities = [structural_similarity(x.numpy(), y.numpy(), channel_axis=0, data_range=1, gaussian_weights=True,
                                          sigma=1.5, use_sample_covariance=False) for x, y in zip(a / 255, b / 255)]
    for images, targets in ((a, b), (a / 255, b / 255)):
        torch.testing.assert_close(psnr(images, targets), -10 * mse.log10())
        torch.testing.assert_close(ssim(images, targets), torch.tensor(similarities), atol=2e-5, rtol=0)
    assert psnr(a, a).tolist() == [100] * count


def test_a_frechet_distance_is_its_formula():
    """It is |mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)) with covariances A and B."""
    a, b = torch.randn(50, 5).double(), torch.randn(40, 5).double() @ torch.randn(5, 5).double() + 1
    root = sqrtm((a.T.cov() @ b.T.cov()).numpy())
    expected = (a.mean(0) - b.mean(0)).square().sum() + (a.T.cov() + b.T.cov()).trace() - 2 * root.trace().real
    assert frechet_distance(a.float(), b.float()) == pytest.approx(expected.item(), rel=1e-3)


def test_a_probe_learns_from_training_images_and_their_statistics():
    y = (torch.arange(200) % 40 == 0).long()  # one class is rare, and its features lie at 0 instead of -100
    x = torch.stack([100.0 * y - 100, torch.zeros(200)], 1) + torch.randn(200, 2)
    x *= 1e-4  # unless standardised, the penalty forbids weights so large
    assert linear_probe(x, y, x[:50], y[:50]) == 1
    assert linear_probe(x, y, x[y == 1], y[y == 1]) == 1
    assert linear_probe(x, y, x[:4], torch.tensor([1, 0, 1, 0])) == 0.75


@torch.no_grad()
def test_metrics_are_what_one_computes_by_hand():
    """They are of clamped images, in eval mode. The model stays in its mode."""
    model, images = small().eval(), noise()
    model.decoder.head.weight.data *= 50
    z_q, _, indices = model.encode(images / 255)
    output = model.decode(z_q).clamp(0, 1)
    mse = (output - images / 255).square().mean((1, 2, 3))
    counts, usage, perplexity = model.get_codebook_usage(indices)
    expected = {"psnr": (-10 * mse.log10()).mean().item(), "psnr_of_mse": -10 * math.log10(mse.mean()),
                "ssim": ssim(output, images / 255).mean().item(), "usage": usage, "perplexity": perplexity}
    metrics, found, reconstructions = evaluate(model.train(), images, batch_size=3)
    assert metrics == pytest.approx(expected, rel=1e-3) and model.training
    assert torch.equal(found, counts) and (reconstructions - output * 255).abs().max() <= 0.51  # rounded


def fingerprint(train_x, train_y, test_x, test_y):
    """A number that depends on each argument of linear_probe, and stands for its accuracy."""
    weighed = (1 + train_y)[:, None] * train_x, (3 + test_y)[:, None] * test_x
    return sum(x.square().mean().item() for x in weighed)


@torch.no_grad()
def test_figures_are_of_images_reconstructions_and_features(change):
    """Judges see images and reconstructions. Probes get mean features of TRAIN_IMAGES images."""
    change(measure, TRAIN_IMAGES=10, batch_size=lambda images: 8, linear_probe=fingerprint)
    model = small("vit_tiny_patch16_224", encoder_layers=2, pretrained=False, decoder_heads=2).eval()
    images, labels = draw_shapes(21, 16)
    data = Dataset(images[:12], labels[:12], images[12:], labels[12:], [*"0123456789"])
    expected, bits = evaluate(model, data.test_images)[0], 16 * math.log2(12)
    expected |= {"bits": bits, "ratio": 24 * 256 / bits, "entropy": math.log2(expected["perplexity"])}
    z, last_layer = model.encoder(images / 255, with_last=True)
    features = {"z": z, "last_layer": last_layer, "z_q": model.quantize(z)[0]}
    judges, reconstructions = load_judges(16), evaluate(model, images)[2] / 255
    for name, judge in judges.items():
        real, found = judge(images / 255), judge(reconstructions)
        features |= {f"image_{name}": real, f"reconstruction_{name}": found}
        expected[f"distance_{name}"] = (real - found)[12:].square().mean().item()
        expected[f"frechet_{name}"] = frechet_distance(real[12:].mean((2, 3)), found[12:].mean((2, 3)))
    for name, z in features.items():
        x = z.mean((2, 3))
        expected[f"probe_{name}"] = fingerprint(x[:10], labels[:10], x[12:], labels[12:])
    assert measure.measure(model, data, judges) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("quantizer, options, bits", [
    ("ema_vq", {"codebook_size": 1}, {"bits", "entropy"}), ("none", {}, set())])
def test_what_cannot_be_measured_is_left_out(quantizer, options, bits, monkeypatch):
    """One code has no ratio, one image no covariance, one class no probe."""
    monkeypatch.setattr(measure, "find_spec", lambda name: None)
    data = Dataset(noise(3), torch.zeros(3).long(), noise(1), torch.zeros(1).long(), ["a"])
    figures = measure.measure(small("cnn", quantizer, options), data, load_judges(16))
    assert figures.keys() == {"psnr", "psnr_of_mse", "ssim", "usage", "perplexity", "distance_cifar"} | bits
    assert all(map(math.isfinite, figures.values()))


def test_the_fields_metrics_compare_images_with_rounded_reconstructions():
    judges = {"rfid": lambda images: images[..., :1, :1],
              "lpips": lambda images, others: (255 * others - (255 * others).round()).abs()}  # how far from rounded
    model, images, labels = small().eval(), noise(3), torch.tensor([0, 1, 0])
    figures = measure.measure(model, Dataset(images, labels, images, labels, [*"ab"]), judges)
    a, b = images / 255, evaluate(model, images)[2] / 255
    assert figures["distance_lpips"] < 1e-3
    assert figures["frechet_rfid"] == pytest.approx(frechet_distance(a[..., 0, 0], b[..., 0, 0]), rel=0.05)
    assert "probe_image_rfid" not in figures


def test_rfid_resizes_as_torch_fidelity_does(monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    def draw_weights(network, weights):
        torch.manual_seed(SEED)
        for weight in network.parameters():
            if weight.ndim > 1:
                torch.nn.init.kaiming_normal_(weight)

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", draw_weights)
    images = noise(2)
    found = load_judges(16, "rfid")["rfid"](images / 255)[..., 0, 0]
    expected, = fidelity.FeatureExtractorInceptionV3("inception", ["2048"])(images)
    assert (found - expected).norm() < 1e-3 * (expected[0] - expected[1]).norm()


@pytest.mark.parametrize("metrics, message", [("rfid", "fidelity"), ("lpips", "Weights only")])
def test_a_metric_without_its_network_is_an_error_of_one_line(metrics, message, tmp_path, monkeypatch):
    """A file with more than tensors could be code, and is not run."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    Path("hub/checkpoints").mkdir(parents=True)
    torch.save(Path(), f"hub/checkpoints/{Path(VGG16_Weights.DEFAULT.url).name}")
    with pytest.raises(OSError, match=rf"^[^\n]*{message}"):
        load_judges(16, metrics)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("word", ["epoch=3.pt", "DATASET=2", "~/best.pt"])
def test_a_word_that_names_a_file_is_a_path(word, monkeypatch):
    """Lightning's names contain "="; a "~" in quotes is not replaced by the shell."""
    monkeypatch.setenv("HOME", os.getcwd())
    monkeypatch.setenv("USERPROFILE", os.getcwd())
    shutil.copy(SHIPPED, word.removeprefix("~/"))
    monkeypatch.setattr("sys.argv", ["measure", word, "TRAIN_IMAGES=5"])
    constants = {"TRAIN_IMAGES": 1, "DATASET": "cifar10"}
    assert [*measure.load_models(constants)] == [word] and constants == {"TRAIN_IMAGES": 5, "DATASET": "cifar10"}


@pytest.mark.parametrize("metric, images, message", [
    (psnr, noise().float(), "images"), (ssim, noise()[..., :10], "11 x 11")])
def test_images_that_cannot_be_measured_are_refused(metric, images, message):
    with refused(message):
        metric(images, images)
    with refused("equal shapes"):
        metric(noise(4), noise(1))


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """run(module, *arguments, NAME=value, ...) runs a script on `folder`, and returns the rows of its table."""
    monkeypatch.setattr(codecs, "codec_options", {"AVIF": {"speed": 10}})

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


@pytest.mark.parametrize("script, word, values, message", [
    (measure, "fsq.pt", {"IMAGE_SIZE": (32, 64)}, "IMAGE_SIZE = .*allowed"),
    (measure, "fsq.pt", {"IMAGE_SIZE": 8}, "IMAGE_SIZE = 8"), (codecs, "fsq.pt", {"COUNT": 0}, "COUNT = 0"),
    (codecs, "fsq.pt", {"COUNT": 2.5}, "COUNT = 2.5, allowed"), (codecs, "fsq.pt", {"PHOTOS": None}, "PHOTOS = None"),
    (measure, "fsq.pt", {"METRICS": "fid"}, "METRICS = 'fid'"), (codecs, "fsq.pt", {"PHOTOS": "."}, "no images"),
    (codecs, "none.pt", {}, "no codes"), (compare, "FLIP=True", {"PROBE_IMAGES": 0}, "PROBE_IMAGES = 0"),
    (compare, "FLIP=True", {"PROBE_IMAGES": 9.5}, "PROBE_IMAGES = 9.5, allowed"),
    (compare, "SEED=3", {}, "'SEED=3', allowed"), (compare, "QUANTIZER=fsq", {}, "'QUANTIZER=fsq', allowed")])
def test_what_cannot_be_measured_is_refused_before_the_work(script, word, values, message, run, monkeypatch):
    """The lines and seeds of a table set SEED, QUANTIZER and others themselves."""
    monkeypatch.setattr(script, "load_dataset", None)
    for quantizer in ("fsq", "none"):
        save_checkpoint(f"{quantizer}.pt", small("cnn", quantizer, {}))
    with refused(message):
        run(script, word, **values)


# Codecs

@pytest.mark.parametrize("share", [-99, 0.0, 0.25, 1.0, 99])
def test_a_codec_has_the_bits_of_the_tokens_between_two_of_its_files(share):
    """Far below or above all files, the first or the last counts."""
    images, files = draw_shapes(9, 32)[0][..., :24], []
    for quality in {-99: (1, 2), 99: (99, 100)}.get(share, (50, 51)):
        file = codecs.encode(images, "JPEG", quality)
        files.append((8 * len(file), psnr(codecs.decode(file, 9), images)))
    (low, psnrs_low), (high, psnrs_high) = files
    assert psnrs_low.min() > 15  # each image comes back in its place
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

def test_a_row_is_the_mean_of_a_line_trained_with_each_seed(run, change):
    """A line that is half a decibel behind the best after the first seed is not run again."""
    figures = [{"psnr": x, "run": "a name has no mean"} for x in (21.0, 22.0, 23.0)]
    lines = {"DDCL": ("QUANTIZER=ddcl", {10: 0.5}), "FSQ": ("FSQ_LEVELS=*", {10: "(8,)"})}
    change(compare, run_and_measure=Mock(side_effect=figures), bit_lines=lines)
    table = run(compare, "EPOCHS=3", BITS=(10,), SEEDS=(3, 4))
    assert [" ".join(call.args[0][1:]) for call in compare.run_and_measure.call_args_list] == [
        "EPOCHS=3 QUANTIZER=ddcl SEED=3", "EPOCHS=3 FSQ_LEVELS=(8,) SEED=3", "EPOCHS=3 FSQ_LEVELS=(8,) SEED=4"]
    assert [row["PSNR"] for row in table.values()] == ["21.00", "22.50"]
    assert table["FSQ, 10 bits"]["max - min"] == "1.00"


def test_a_width_that_no_code_has_is_refused(run):
    with refused("WIDTHS = "):
        run(compare, WIDTHS=(16, -3))


def test_a_run_of_the_table_is_measured_once(trained, folder, change, monkeypatch):
    shutil.copytree(trained, ".", dirs_exist_ok=True)
    results, = Path("outputs").glob("*/results.json")
    change(compare, DATASET=str(folder), PROBE_IMAGES=10, train_run=lambda _: results.parent.name)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="^no network"):  # not: could not be written
        patch.setattr(compare, "measure_run", Mock(side_effect=OSError("no network")))
        compare.run_and_measure([])
    figures = compare.run_and_measure([])
    assert figures["token_bits"] == 6 and figures["psnr"] == json.loads(results.read_text())["psnr"]
    assert 0 <= figures["probe_z_q"] <= 1
    change(compare, measure_run=None)
    assert compare.run_and_measure([]) == figures


def test_a_run_of_several_sizes_is_measured_at_the_largest_as_train_does(trained, folder, change):
    shutil.copytree(trained, ".", dirs_exist_ok=True)
    file, = Path("outputs").glob("*/results.json")
    results = json.loads(file.read_text())
    results["constants"]["IMAGE_SIZE"] = [32, 64]
    file.write_text(json.dumps(results))
    change(compare, DATASET=str(folder), PROBE_IMAGES=10)
    assert compare.measure_run(file.parent.name)["bits"] == 16 * 16 * 6
    shutil.rmtree("checkpoints")
    with refused("has lost its .*_best.pt"):
        compare.measure_run(file.parent.name)


@pytest.mark.parametrize("line", compare.bit_lines)
def test_the_lines_have_as_many_bits_as_their_columns_say(line, change):
    words, values = compare.bit_lines[line]
    for bits, value in values.items():
        arguments = words.replace("*", str(value)).split()
        change(train, **utils.read_constants(dict(vars(train)), arguments, train.kinds))
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


def test_pretraining_writes_an_encoder_with_its_batch_norms_folded_in(run, change):
    written, save_encoder, images = [], pretrain.save_encoder, noise(4) / 255

    def save(encoder):
        written.append(encoder(images))
        save_encoder(encoder)

    change(pretrain, save_encoder=save, linear_probe=lambda *features: 0.25)
    run(pretrain, EPOCHS=1, BATCH_SIZE=45, OUT="out")
    encoder = ConvEncoder()
    encoder.load_state_dict(torch.load("out/cifar_encoder.pt"))
    torch.testing.assert_close(encoder(images), written[0], atol=0.05, rtol=0.05)  # 16 bits
