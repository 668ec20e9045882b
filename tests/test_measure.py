"""Metrics in utils.py and extras/measure.py: figures against their formulas, on small models and images."""
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SEED, refused
from scipy.linalg import sqrtm
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision.models import VGG16_Weights

import extras.measure as module
from data import Dataset, draw_shapes
from extras.measure import frechet_distance, linear_probe, load_judges, load_models, measure
from models import PRETRAINED_DIR, VQRAE
from utils import evaluate, psnr, ssim

SHIPPED = PRETRAINED_DIR / "vqrae_fsq.pt"


def small(encoder="cnn", quantizer="fsq", options={"levels": [4, 3]}, **more):
    """A VQRAE for 16 x 16 images in 4 x 4 tokens, of 12 codes unless told otherwise."""
    return VQRAE(encoder, quantizer, options, 16, 4, decoder_width=32, decoder_depth=1, **more)


def noise(count=7):
    return torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8)


def test_psnr_and_ssim_of_uint8_or_floats():
    a = draw_shapes(3, 20)[0]
    b = (a / 255 + 0.2 * torch.randn(a.shape)).clamp(0, 1).mul(255).byte()
    mse = (a / 255 - b / 255).square().mean((1, 2, 3))
    similarities = [structural_similarity(x.numpy(), y.numpy(), channel_axis=0, data_range=1, gaussian_weights=True,
                                          sigma=1.5, use_sample_covariance=False) for x, y in zip(a / 255, b / 255)]
    for images, targets in ((a, b), (a / 255, b / 255)):
        torch.testing.assert_close(psnr(images, targets), -10 * mse.log10())
        torch.testing.assert_close(ssim(images, targets), torch.tensor(similarities), atol=1e-4, rtol=0)
    assert psnr(a, a).tolist() == [100] * 3


def test_ssim_of_a_large_image_is_the_mean_of_its_strips():
    a, b = torch.rand(2, 1, 3, 1100, 1000)  # a strip has 1,048 rows of windows
    _, whole = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    torch.testing.assert_close(ssim(a, b), whole[..., 5:-5, 5:-5].mean((1, 2, 3)))


def test_a_frechet_distance_is_its_formula():
    """It is |mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)) with covariances A and B."""
    a, b = torch.randn(50, 5).double(), torch.randn(40, 5).double() @ torch.randn(5, 5).double() + 1
    root = sqrtm((a.T.cov() @ b.T.cov()).numpy())
    expected = (a.mean(0) - b.mean(0)).square().sum() + (a.T.cov() + b.T.cov()).trace() - 2 * root.trace().real
    assert frechet_distance(a.float(), b.float()) == pytest.approx(expected.item(), rel=1e-3)
    assert frechet_distance(a.float(), a.float()) == pytest.approx(0, abs=1e-3)


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
    counts = indices.flatten().bincount(minlength=12)
    p = counts[counts > 0] / indices.numel()
    expected = {"psnr": (-10 * mse.log10()).mean().item(), "psnr_of_mse": -10 * math.log10(mse.mean()),
                "ssim": ssim(output, images / 255).mean().item(), "usage": len(p) / 12,
                "perplexity": math.exp(-(p * p.log()).sum())}
    metrics, found, reconstructions = evaluate(model.train(), images, batch_size=3)
    assert metrics == pytest.approx(expected, rel=1e-3) and model.training
    assert torch.equal(found, counts) and (reconstructions - output * 255).abs().max() <= 0.51  # rounded


def fingerprint(train_x, train_y, test_x, test_y):
    """A number that depends on each argument of linear_probe, and stands for its accuracy."""
    weighed = (1 + train_y)[:, None] * train_x, (3 + test_y)[:, None] * test_x
    return sum(x.square().mean().item() for x in weighed)


@torch.no_grad()
def test_measured_figures(monkeypatch):
    """Judges see images and reconstructions. Probes get mean features of TRAIN_IMAGES images."""
    monkeypatch.setattr(module, "TRAIN_IMAGES", 10)
    monkeypatch.setattr(module, "batch_size", lambda images: 8)
    monkeypatch.setattr(module, "linear_probe", fingerprint)
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
    assert measure(model, data, judges) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("quantizer, options, bits", [
    ("ema_vq", {"codebook_size": 1}, {"bits", "entropy"}), ("none", {}, set())])
def test_what_cannot_be_measured_is_left_out(quantizer, options, bits, monkeypatch):
    """One code has no ratio, one image no covariance, one class no probe."""
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    data = Dataset(noise(3), torch.zeros(3).long(), noise(1), torch.zeros(1).long(), ["a"])
    figures = measure(small("cnn", quantizer, options), data, load_judges(16))
    assert figures.keys() == {"psnr", "psnr_of_mse", "ssim", "usage", "perplexity", "distance_cifar"} | bits
    assert all(map(math.isfinite, figures.values()))


def test_the_fields_metrics_compare_images_with_rounded_reconstructions():
    judges = {"rfid": lambda images: images[..., :1, :1],
              "lpips": lambda images, others: (255 * others - (255 * others).round()).abs()}  # how far from rounded
    model, images, labels = small().eval(), noise(3), torch.tensor([0, 1, 0])
    figures = measure(model, Dataset(images, labels, images, labels, [*"ab"]), judges)
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
    assert [*load_models(constants)] == [word] and constants == {"TRAIN_IMAGES": 5, "DATASET": "cifar10"}


@pytest.mark.parametrize("metric, images, message", [
    (psnr, noise().float(), "images"), (ssim, noise()[..., :10], "11 x 11")])
def test_images_that_cannot_be_measured_are_refused(metric, images, message):
    with refused(message):
        metric(images, images)
    with refused("equal shapes"):
        metric(noise(4), noise(1))
