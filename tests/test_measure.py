"""Metrics in utils.py and extras/measure.py: figures against their formulas, on small models and images."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import refused, run_script
from skimage.metrics import structural_similarity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import extras.measure as module
import train
from data import Dataset, draw_shapes
from extras.generate import build_prior
from extras.measure import COLUMNS, format_table, frechet_distance, linear_probe, load_judges, load_models, measure
from models import PRETRAINED_DIR, VQRAE, build_encoder, save_checkpoint
from muon import adamw_and_muon, take_step
from utils import evaluate, psnr, ssim

SHIPPED = PRETRAINED_DIR / "vqrae_fsq.pt"


def small(encoder="cnn", quantizer="fsq", options={"levels": [4, 3]}, **more):
    """A VQRAE for 16 x 16 images in 4 x 4 tokens, of 12 codes unless told otherwise."""
    return VQRAE(encoder, quantizer, options, 16, 4, decoder_width=32, decoder_depth=1, **more)


def noise(count=7):
    return torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8)


def test_psnr_and_ssim_of_uint8_or_floats():
    """PSNR by its formula, SSIM as scikit-image has it."""
    a = draw_shapes(3, 20)[0]
    b = (a / 255 + 0.2 * torch.randn(a.shape)).clamp(0, 1).mul(255).byte()
    similarities = [structural_similarity(x.numpy(), y.numpy(), channel_axis=0, data_range=1, gaussian_weights=True,
                                          sigma=1.5, use_sample_covariance=False) for x, y in zip(a / 255, b / 255)]
    for images, targets in ((a, b), (a / 255, b / 255)):
        mse = (a / 255 - b / 255).square().mean((1, 2, 3))
        torch.testing.assert_close(psnr(images, targets), -10 * mse.log10())
        torch.testing.assert_close(ssim(images, targets), torch.tensor(similarities), atol=1e-4, rtol=0)
    assert psnr(a, a).tolist() == [100] * 3


def test_frechet_distance_is_its_formula():
    """|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)); the last has the trace of (A^(1/2) B A^(1/2))^(1/2)."""
    a, b = torch.randn(50, 5).double(), torch.randn(40, 5).double() @ torch.randn(5, 5).double() + 1
    values, vectors = torch.linalg.eigh(a.T.cov())
    root = vectors * values.sqrt() @ vectors.T  # of A
    trace = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * trace
    assert frechet_distance(a.float(), b.float()) == pytest.approx(expected.item(), rel=1e-3)
    assert frechet_distance(a.float(), a.float()) == pytest.approx(0, abs=1e-3)


def test_a_probe_learns_from_training_images_and_their_statistics():
    y = (torch.arange(200) % 40 == 0).long()  # one class is rare, and its features lie at 0 instead of -100
    x = torch.stack([100.0 * y - 100, torch.zeros(200)], 1) + torch.randn(200, 2)
    assert linear_probe(x, y, x[:50], y[:50]) == linear_probe(x, y, x[y == 1], y[y == 1]) == 1  # also of one class
    assert linear_probe(x, y, x, 1 - y) == 0 and linear_probe(x, y, x[:4], torch.tensor([1, 0, 1, 0])) == 0.75


@torch.no_grad()
def test_metrics_are_what_one_computes_by_hand():
    """PSNR is of clamped images, and batches of any size give the same. The model stays in its mode."""
    model, images = small(), noise()
    model.decoder.head.weight.data *= 50
    z_q, _, indices = model.encode(images / 255)
    output = model.train().decode(z_q)
    assert output.min() < 0 and output.max() > 1
    output, counts = output.clamp(0, 1), indices.flatten().bincount(minlength=12)
    mse, p = (output - images / 255).square().mean((1, 2, 3)), counts[counts > 0] / indices.numel()
    expected = {"psnr": (-10 * mse.log10()).mean().item(), "psnr_of_mse": -10 * math.log10(mse.mean()),
                "ssim": ssim(output, images / 255).mean().item(), "usage": len(p) / 12,
                "perplexity": math.exp(-(p * p.log()).sum())}
    for training, batch_size in ((True, 3), (False, 250)):
        metrics, found, reconstructions = evaluate(model.train(training), images, batch_size)
        assert metrics == pytest.approx(expected, rel=1e-3) and model.training == training
        assert torch.equal(found, counts) and reconstructions.dtype == torch.uint8
        assert (reconstructions - output * 255).abs().max() <= 0.51  # rounded
    given = evaluate(model.eval(), images, 3, indices.flip(0))[2]
    assert (given - model.decode_from_indices(indices.flip(0)) * 255).abs().max() <= 0.51


def fingerprint(train_x, train_y, test_x, test_y):
    """A number that depends on each argument of linear_probe, and stands for its accuracy."""
    weighed = (1 + train_y)[:, None] * train_x, (3 + test_y)[:, None] * test_x
    return sum(x.square().mean().item() for x in weighed)


@pytest.mark.parametrize("options", [("cifar",), ("cnn", "none", {}), ("vit_tiny_patch16_224",)], ids=str)
@torch.no_grad()
def test_measured_figures(options, monkeypatch):
    """Bits count codes; judges see images and reconstructions; probes get mean features of TRAIN_IMAGES images."""
    monkeypatch.setattr(module, "TRAIN_IMAGES", 30)
    monkeypatch.setattr(module, "batch_size", lambda images: 16)
    monkeypatch.setattr(module, "linear_probe", fingerprint)
    vit = {"encoder_layers": 2, "pretrained": False, "decoder_heads": 2} if "vit" in options[0] else {}
    model, (images, labels) = small(*options, **vit).eval(), draw_shapes(50, 16)
    data = Dataset(images[:35], labels[:35], images[35:], labels[35:], [*"0123456789"])
    expected, _, output = evaluate(model, data.test_images)
    codes = model.quantizer.codebook_size
    if codes:
        expected |= {"bits": 16 * math.log2(codes), "ratio": 24 * 256 / (16 * math.log2(codes)),
                     "entropy": math.log2(expected["perplexity"])}
    maps = {"z": model.encoder(images / 255)}
    maps["z_q"] = model.quantize(maps["z"])[0]
    if vit:
        maps["last_layer"] = model.encoder(images / 255, with_last=True)[1]
    pictures = evaluate(model, images)[2]
    for name, encoder in (("cifar", "cifar"), ("lite0", "efficientnet_lite0")):
        judge = build_encoder(encoder, 4, 0)
        real, found = judge(images / 255), judge(pictures / 255)
        maps |= {f"image_{name}": real, f"reconstruction_{name}": found}
        expected[f"distance_{name}"] = (real - found)[35:].square().mean().item()
        expected[f"frechet_{name}"] = frechet_distance(real[35:].mean((2, 3)), found[35:].mean((2, 3)))
    for name, z in maps.items():
        x = z.mean((2, 3))
        expected[f"probe_{name}"] = fingerprint(x[:30], labels[:30], x[35:], labels[35:])
    assert measure(model, data, load_judges(4, 16)) == pytest.approx(expected, rel=0.01)


def test_what_cannot_be_measured_is_left_out(monkeypatch):
    """One code has no bits, one image no covariance, one class no probe; without its package there is no Lite0."""
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    data = Dataset(noise(3), torch.zeros(3).long(), noise(1), torch.zeros(1).long(), ["a"])
    figures = measure(small("cnn", "ema_vq", {"codebook_size": 1}).eval(), data, load_judges(4, 16))
    assert figures.keys() == {"psnr", "psnr_of_mse", "ssim", "usage", "perplexity", "bits", "entropy", "distance_cifar"}
    assert figures["bits"] == 0 and all(math.isfinite(x) for x in figures.values())


class WithoutFp64(TorchDispatchMode):
    """As on Apple's GPUs: no tensor may be in fp64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for x in tree_leaves((args, kwargs, result)):
            assert getattr(x, "dtype", None) != torch.float64, function
        return result


@pytest.mark.parametrize("quantizer, options", [
    ("fsq", {"levels": (4, 3)}), ("ddcl", {}), ("simvq", {"codebook_size": 16}), ("ema_vq", {"codebook_size": 16}),
    ("simvq_learned", {"codebook_size": 16}), ("residual_vq", {"codebook_size": 16, "codebooks": 2}),
    ("lfq", {"codebook_size": 16}), ("residual_fsq", {"levels": (4, 3), "num_quantizers": 2})], ids=str)
def test_nothing_needs_fp64_so_that_a_device_without_it_serves(quantizer, options):
    model, images = small("cifar", quantizer, options), noise(4)
    with pytest.raises(AssertionError), WithoutFp64():
        images.double()
    with WithoutFp64():
        optimizers = adamw_and_muon(model, ("adapter.",), 1e-3)
        losses = train.objective(model.train(), images / 255, build_encoder("cifar", 4).eval(), None, None, 0.1, 0, 0)
        losses["loss"].backward()
        take_step(optimizers, 1, 10)
        model.eval()
        indices = model.encode_to_indices(images / 255)
        z_q = model.quantizer.indices_to_codes(indices)
        assert torch.equal(model.quantizer.indices_to_codes(model.quantizer.codes_to_indices(z_q)), z_q)
        model.features_from_indices(indices)
        evaluate(model, images)
        if model.quantizer.codebook_size < 1000:
            build_prior(model.quantizer, [4, 4], 2, 16, 1).eval().generate(torch.arange(2))


def test_a_table_has_dashes_and_no_empty_columns():
    rows = {"first": {"psnr": 20.126, "usage": 0.5}, "b": {"psnr": 9, "bits": 1024}}
    lines = format_table(rows, COLUMNS, "name").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["name", "PSNR", "bits", "usage"] and set(lines[1]) == set("| -")
    assert cells[2:] == [["first", "20.13", "-", "50.0%"], ["b", "9.00", "1,024", "-"]]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("word", ["epoch=3.pt", "DATASET=2", "~/best.pt"])
def test_a_word_that_names_a_file_is_a_path(word, monkeypatch):
    """Lightning's names contain "="; a "~" in quotes is not replaced by the shell."""
    monkeypatch.setenv("HOME", os.getcwd())
    monkeypatch.setenv("USERPROFILE", os.getcwd())
    shutil.copy(SHIPPED, word.removeprefix("~/"))
    monkeypatch.setattr("sys.argv", ["measure", word, "TRAIN_IMAGES=5"])
    constants = {"TRAIN_IMAGES": 1, "DATASET": "cifar10"}
    assert [*load_models(constants)] == [word] and constants == {"TRAIN_IMAGES": 5, "DATASET": "cifar10"}


def test_without_a_path_the_shipped_checkpoints_are_measured(monkeypatch):
    monkeypatch.setattr("sys.argv", ["measure"])
    assert [*load_models({})] == ["vqrae_ema_vq", "vqrae_fsq", "vqrae_simvq"]
    monkeypatch.setattr("sys.argv", ["measure", "missing.pt"])
    with refused("missing.pt"):
        load_models({})


def test_the_script_prints_what_the_run_measured_in_any_encoding(folder, trained):
    """Where a terminal has no é, the table shows a question mark. The head of the table and the row are complete."""
    best, = trained.glob("checkpoints/*/*stage2_best.pt")
    results = json.loads(next(trained.glob("outputs/*/results.json")).read_text())
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = run_script(".", "extras.measure", best, f"DATASET={folder}", "TRAIN_IMAGES=20", environment=environment)
    assert done.returncode == 0, done.stderr
    head, *_, names, _, row = done.stdout.splitlines()
    row = dict(zip(*(re.split(r" *\| *", line)[1:-1] for line in (names, row))))
    assert "38 test images" in head and "Fr?chet, cifar" in row and row["checkpoint"] == str(best)
    assert float(row["PSNR"]) == pytest.approx(results["psnr"], abs=0.011)
    assert float(row["SSIM"]) == pytest.approx(results["ssim"], abs=0.0011)
    assert (row["bits"], row["ratio"]) == ("384", "64.0")  # 64 tokens of 6 bits; 24 * 32 * 32 / 384


@pytest.mark.parametrize("arguments, message", [
    (["small.pt", str(SHIPPED)], "IMAGE_SIZE = 0"), (["IMAGE_SIZE=8"], "IMAGE_SIZE = 8"), (["METRICS=fid"], "METRICS")])
def test_arguments_are_refused_before_the_work(arguments, message, monkeypatch):
    for name in ("IMAGE_SIZE", "METRICS"):
        monkeypatch.setattr(module, name, getattr(module, name))  # restored at the end
    monkeypatch.setattr(module, "load_dataset", None)
    save_checkpoint("small.pt", small())
    monkeypatch.setattr("sys.argv", ["measure", *arguments])
    with refused(message):
        module.main()


def test_importing_extras_changes_nothing_in_the_process():
    code = ("import os, socket, torch\nbefore = dict(os.environ), socket.getdefaulttimeout()\n"
            "import extras.measure, extras.codecs, extras.compare, extras.cells, extras.pretrain\n"
            "assert before == (dict(os.environ), socket.getdefaulttimeout())")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rfid_and_lpips(torch_home, monkeypatch):
    """Networks of random weights, in the files that torch-fidelity and torchvision load; of the same uint8 images."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    with monkeypatch.context() as patch, torch.device("meta"):
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_: None)
        weights = fidelity.FeatureExtractorInceptionV3("inception", ["2048"]).state_dict()
    for name, weight in weights.items():  # batch norms do nothing; convolutions keep the variance
        scale = math.sqrt(2 / weight[0].numel()) * torch.randn(weight.shape) if weight.ndim > 1 else 1
        weights[name] = torch.ones(weight.shape) * scale * (not name.endswith(("bias", "running_mean")))
    torch.save(weights, torch_home / fidelity.URL_INCEPTION_V3.split("/")[-1])
    monkeypatch.setattr(module, "batch_size", lambda images: 2)  # the last batch is of one image
    monkeypatch.setattr(module, "frechet_distance", lambda a, b: (a.mean(0) - b.mean(0)).square().sum().item())
    model, images = small().eval(), noise(3)
    judges = load_judges(4, 16, "rfid,lpips")
    figures, output = measure(model, Dataset(images, None, images, None, []), judges), evaluate(model, images)[2]
    inception = fidelity.FeatureExtractorInceptionV3("inception", ["2048"])  # resizes as TensorFlow did
    means = [inception(x)[0].mean(0) for x in (images, output)]
    expected = {"frechet_rfid": (means[0] - means[1]).square().sum().item(),
                "distance_lpips": judges["lpips"](images / 255, output / 255).mean().item()}
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=0.01)
    assert min(expected.values()) > 1e-3
    torch.save(Path(), next(torch_home.glob("vgg16*")))  # more than tensors: it could be code
    with pytest.raises(OSError, match="Weights only"):
        load_judges(4, 16, "lpips")
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("metrics", ["lpips", "rfid"])
def test_a_metric_without_its_network_is_an_error_of_one_line(metrics, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: open("offline"))
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(OSError, match="offline|fidelity") as error:
        load_judges(4, 16, metrics)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call, message", [
    (lambda: psnr(noise().float(), noise().float()), "images"), (lambda: evaluate(small(), noise() / 255), "float"),
    (lambda: ssim(noise()[..., :10], noise()[..., :10]), "11 x 11"), (lambda: evaluate(small(), noise(0)), "0 images")])
def test_what_is_refused(call, message):
    with refused(message):
        call()
