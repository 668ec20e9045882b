"""evaluate.py: figures against their formulas, on small models and images."""
import json
import math
import re
from pathlib import Path

import pytest
import torch
from skimage.metrics import structural_similarity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import extras.measure as module
import train
from data import Dataset, draw_shapes
from extras.generate import build_prior
from extras.measure import COLUMNS, format_table, frechet_distance, linear_probe, measure
from models import VQRAE, build_encoder, save_checkpoint
from muon import adamw_and_muon, take_step
from utils import evaluate, psnr, ssim


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


@torch.no_grad()
def test_metrics_are_what_one_computes_by_hand():
    """PSNR is of clamped images, and batches of any size give the same. The model stays in its mode."""
    model, images = small(), noise()
    model.decoder.head.weight.data *= 20
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
        assert metrics == pytest.approx(expected, rel=1e-4) and model.training == training
        assert torch.equal(found, counts) and reconstructions.dtype == torch.uint8
        assert (reconstructions - output * 255).abs().max() <= 0.501  # rounded
    given = evaluate(model, images, 3, indices.flip(0))[2]
    assert torch.equal(given, (model.decode_from_indices(indices.flip(0)) * 255).round().byte())


class WithoutFp64(TorchDispatchMode):
    """As on Apple's GPUs: no tensor may be in fp64. Operations are collected."""

    operations = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for x in tree_leaves((args, kwargs, result)):
            assert getattr(x, "dtype", None) != torch.float64, function
        self.operations.add(str(function))
        return result


@pytest.mark.parametrize("quantizer, options", [
    ("fsq", {"levels": (4, 3)}), ("ddcl", {}), ("simvq", {"codebook_size": 16}), ("ema_vq", {"codebook_size": 16}),
    ("simvq", {"codebook_size": 16, "transform": "cosine"}), ("ema_vq", {"codebook_size": 16, "codebooks": 2}),
    ("lfq", {"codebook_size": 16}), ("residual_fsq", {"levels": (4, 3), "num_quantizers": 2})], ids=str)
def test_nothing_needs_fp64_so_that_a_device_without_it_serves(quantizer, options):
    model, images = small("cifar", quantizer, options), noise(4)
    with WithoutFp64() as mode:
        optimizers = adamw_and_muon(model, ("adapter.",), 1e-3)
        losses = train.objective(model.train(), images / 255, build_encoder("cifar", 4).eval(), None, None)
        losses["loss"].backward()
        take_step(optimizers, 1, 10)
        model.eval()
        indices = model.encode_to_indices(images / 255)
        z_q = model.quantizer.indices_to_codes(indices)
        assert torch.equal(model.quantizer.indices_to_codes(model.quantizer.codes_to_indices(z_q)), z_q)
        model.features_from_indices(indices), model.get_codebook_usage(indices), evaluate(model, images)
        if model.quantizer.codebook_size < 1000:
            build_prior(model.quantizer, [4, 4], 2, 16, 1).eval().generate(torch.arange(2))
    print(*sorted(mode.operations), sep="\n")
    assert len(mode.operations) > 50


def test_frechet_distance_is_its_formula():
    """|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)); the last has the trace of (A^(1/2) B A^(1/2))^(1/2)."""
    a, b = torch.randn(50, 5).double(), torch.randn(40, 5).double() @ torch.randn(5, 5).double() + 1
    values, vectors = torch.linalg.eigh(a.T.cov())
    root = vectors * values.sqrt() @ vectors.T  # of A
    trace = torch.linalg.eigvalsh(root @ b.T.cov() @ root).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * trace
    assert frechet_distance(a.float(), b.float()) == pytest.approx(expected.item(), rel=1e-3)
    assert frechet_distance(a.float(), a.float()) == pytest.approx(0, abs=1e-3)


def test_a_probe_learns_from_training_images_and_their_statistics():
    y = (torch.arange(200) % 40 == 0).long()  # one class is rare, and its features lie at 0 instead of -100
    x = torch.stack([100.0 * y - 100, torch.zeros(200)], 1) + torch.randn(200, 2)
    assert linear_probe(x, y, x[:50], y[:50]) == linear_probe(x, y, x[y == 1], y[y == 1]) == 1  # also of one class
    assert linear_probe(x, y, x, 1 - y) == 0 and linear_probe(x, y, x[:4], torch.tensor([1, 0, 1, 0])) == 0.75


@pytest.mark.parametrize("options", [("cifar",), ("cnn", "none", {}), ("vit_tiny_patch16_224",)], ids=str)
@torch.no_grad()
def test_measured_figures(options, monkeypatch):
    """Bits, ratio and entropy are of the codes; probes learn from TRAIN_IMAGES of the training images."""
    monkeypatch.setattr(module, "BATCH_SIZE", 16), monkeypatch.setattr(module, "TRAIN_IMAGES", 30)
    vit = {"encoder_layers": 2, "pretrained": False, "decoder_heads": 2} if "vit" in options[0] else {}
    model, (images, _) = small(*options, **vit).eval(), draw_shapes(50, 16)
    labels = torch.arange(50) % 2  # such as nothing tells: a probe that has seen them knows them, another guesses
    data = Dataset(images[:35], labels[:35], images[35:], labels[35:], ["a", "b"])
    figures = measure(model, data, *module.load_judges(4, data))
    (expected, _, output), judged = evaluate(model, data.test_images), {}
    if codes := model.quantizer.codebook_size:
        expected |= {"bits": 16 * math.log2(codes), "ratio": 24 * 256 / (16 * math.log2(codes)),
                     "entropy": math.log2(expected["perplexity"])}
    for name, encoder in (("cifar", "cifar"), ("lite0", "efficientnet_lite0")):
        judge = build_encoder(encoder, 4, 0)  # of all models alike
        real, found = (judge(x / 255) for x in (data.test_images, output))
        expected[f"frechet_{name}"] = frechet_distance(real.mean((2, 3)), found.mean((2, 3)))
        expected[f"distance_{name}"] = (real - found).square().mean().item()
        seen = {"image": images, "picture": evaluate(model, images)[2]}
        for kind, pixels in seen.items():
            z = judge(pixels / 255).mean((2, 3))
            judged[f"{kind}_{name}"] = linear_probe(z[:30], labels[:30], z[35:], labels[35:])
    probes = {name: figures.pop(name) for name in list(figures) if "probe" in name}
    assert {name: figures.pop(name) for name in judged} == pytest.approx(judged, abs=0.07)  # one image of fifteen
    assert figures == pytest.approx(expected, rel=1e-3) and figures["frechet_lite0"] > 0.1
    monkeypatch.setattr(module, "find_spec", lambda name: None)  # no package, no labels
    found = measure(model, data._replace(train_labels=None, test_labels=None), *module.load_judges(4, data))
    assert found.keys() == figures.keys() - {"frechet_lite0", "distance_lite0"}

    z = model.encoder(images / 255)
    z_q = model.quantize(z)[0]
    features = {"z": z, "z_q": z_q}
    features |= {"last_layer": model.encoder(images / 255, with_last=True)[1]} if vit else {}
    means, found = {name: x.mean((2, 3)) for name, x in features.items()}, module.tokenize(model, images)
    torch.testing.assert_close({name: found[name] for name in means}, means, atol=1e-4, rtol=1e-3)
    expected = {f"probe_{name}": linear_probe(x[:30], labels[:30], x[35:], labels[35:]) for name, x in means.items()}
    assert probes == pytest.approx(expected, abs=0.07)  # one image of fifteen


def test_a_table_has_dashes_and_no_empty_columns():
    rows = {"first": {"psnr": 20.126, "usage": 0.5}, "b": {"psnr": 9, "bits": 1024}}
    assert format_table(rows, COLUMNS, "name") == """\
| name  | PSNR  | bits  | usage |
| ----- | ----- | ----- | ----- |
| first | 20.13 | -     | 50.0% |
| b     | 9.00  | 1,024 | -     |"""


def test_the_script_prints_what_the_run_measured(monkeypatch, folder, trained, capsys):
    for name in ("DATASET", "TRAIN_IMAGES", "BATCH_SIZE", "IMAGE_SIZE"):  # restored at the end
        monkeypatch.setattr(module, name, getattr(module, name))
    best, = trained.glob("checkpoints/*/*stage2_best.pt")
    results = json.loads(next(trained.glob("outputs/*/results.json")).read_text())
    monkeypatch.setattr("sys.argv", arguments := ["", str(best), f"DATASET={folder}", "TRAIN_IMAGES=20"])
    module.main()
    head, *_, names, _, row = capsys.readouterr().out.splitlines()
    row = dict(zip(*(re.split(r" *\| *", line)[1:-1] for line in (names, row))))
    assert "38 test images" in head and row["checkpoint"].endswith(str(best.relative_to(trained)))
    assert (row["PSNR"], row["SSIM"]) == (f"{results['psnr']:.2f}", f"{results['ssim']:.4f}")
    assert row["usage"] == f"{results['usage']:.1%}" and (row["bits"], row["ratio"]) == ("384", "64.0")
    save_checkpoint("small.pt", small()), monkeypatch.setattr("sys.argv", [*arguments, "small.pt"])
    with pytest.raises(ValueError, match="IMAGE_SIZE = 0, allowed: not 0"):
        module.main()
    monkeypatch.setattr("sys.argv", [*arguments, "BATCH_SIZE=0"])
    with pytest.raises(ValueError, match="^BATCH_SIZE = 0, allowed: 1 or more$"):
        module.main()
    monkeypatch.setattr("sys.argv", [*arguments, "small.pt", "BATCH_SIZE=20", "IMAGE_SIZE=(16, 24)"])  # at the largest
    module.main()
    *_, first, second = capsys.readouterr().out.splitlines()
    assert "| 216 " in first and f"| {36 * math.log2(12):.0f} " in second  # bits of 6 x 6 tokens


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
    monkeypatch.setattr(module, "BATCH_SIZE", 2)  # the last batch is of one image
    monkeypatch.setattr("torchmetrics.image.fid._compute_fid", lambda mean, _, other, __: (mean - other).square().sum())
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    model, images = small().eval(), noise(3)
    data = Dataset(images, None, images, None, [])
    judges, lpips = module.load_judges(4, data, "rfid,lpips")
    figures, output = measure(model, data, judges, lpips), evaluate(model, images)[2]
    inception = fidelity.FeatureExtractorInceptionV3("inception", ["2048"])  # resizes as TensorFlow did
    means = [inception(x)[0].mean(0) for x in (images, output)]
    expected = {"frechet_rfid": (means[0] - means[1]).square().sum().item(),
                "lpips": lpips(images / 127.5 - 1, output / 127.5 - 1).mean().item()}
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert min(expected.values()) > 1e-3 and list(judges) == ["cifar", "rfid"]
    torch.save(Path(), next(torch_home.glob("vgg16*")))  # more than tensors
    with pytest.raises(OSError, match="Weights only"):
        module.load_judges(4, data, "lpips")


@pytest.mark.parametrize("metrics, message", [("fid", "METRICS = 'fid'"), ("lpips", "offline"), ("rfid", "fidelity")])
def test_a_metric_without_its_network_is_an_error_of_one_line(metrics, message, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: open("offline"))
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises((OSError, ValueError), match=message) as error:
        module.load_judges(4, Dataset(None, None, noise(1), None, []), metrics)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call, message", [
    (lambda: psnr(noise().float(), noise().float()), "images"), (lambda: evaluate(small(), noise() / 255), "uint8"),
    (lambda: ssim(noise()[..., :10], noise()[..., :10]), "11x11"), (lambda: evaluate(small(), noise(0)), "N > 0")])
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
