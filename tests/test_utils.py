import hashlib
import http.server
import io
import os
import pickle
import re
import shutil
import sys
import tarfile
import threading
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchvision import datasets

import downloads
import plots
import shapes
import utils
from evaluate import linear_probe
from models import VQRAE
from plots import plot_curves, plot_usage, save_grid
from utils import (
    Dataset,
    FeatureCache,
    draw_shapes,
    evaluate,
    load_checkpoint,
    load_dataset,
    load_datasets,
    load_image,
    load_torch,
    psnr,
    read_constants,
    save_checkpoint,
    select_images,
    ssim,
    to_float,
    write_file,
)

SMALL = {"adapter_depth": 1, "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2}

# ---------------------------------------------------------------------------------------------------------------------
# Datasets and cached features


def test_shapes(tmp_path, monkeypatch):
    data = draw_shapes(32, train=200, test=100)
    assert data.name == "shapes" and data.train_images.dtype == torch.uint8
    assert data.train_images.shape == (200, 3, 32, 32)
    assert torch.cat([data.train_labels, data.test_labels]).bincount().tolist() == [30] * 10
    assert torch.equal(draw_shapes(32, train=200, test=100).train_images, data.train_images)
    assert not torch.equal(draw_shapes(32, train=200, test=100, seed=1).train_images, data.train_images)
    assert draw_shapes(50, train=10, test=10).test_images.shape == (10, 3, 50, 50)
    (tmp_path / "shapes.py").write_text("drawn otherwise")
    monkeypatch.setattr(shapes, "__file__", str(tmp_path / "shapes.py"))
    assert draw_shapes(32, train=200, test=100).digest != data.digest  # another run's images


def test_shapes_are_told_from_their_backgrounds_by_brightness():
    data = draw_shapes(32, train=500, test=10)
    circles = data.train_images[data.train_labels == shapes.SHAPES.index("circle")].float()
    inside, corners = circles[..., 15:17, 15:17], circles[..., [0, 0, -1, -1], [0, -1, 0, -1]]
    bright, dark = inside.amin((1, 2, 3)) >= 127, inside.amax((1, 2, 3)) <= 128
    assert (bright | dark).all() and 5 < bright.sum() < 45
    difference = inside.mean((1, 2, 3)) - corners.mean((1, 2))
    assert (difference[bright] > 0).float().mean() > 0.85 and (difference[dark] < 0).float().mean() > 0.85


@pytest.mark.parametrize("shape, area", [
    ("circle", np.pi), ("ring", np.pi * 0.75), ("ellipse", np.pi / 2.2), ("square", 2),
    ("triangle", 3 * np.sqrt(3) / 4), ("hexagon", 3 * np.sqrt(3) / 2), ("star", 5 * 0.42 * np.sin(np.pi / 5)),
    ("cross", 4 * 0.66 - 0.66**2), ("heart", 1 + np.pi / 4)])
def test_shapes_have_the_area_of_their_kind(shape, area):
    y, x = torch.meshgrid(*[torch.linspace(-1.5, 1.5, 601)] * 2, indexing="ij")
    assert (shapes.outline_distance(shape, x, y) < 0).float().mean().item() * 9 == pytest.approx(area, rel=0.02)


def test_folder(folder):
    data = load_dataset(str(folder), 32)
    assert data.name == "folder-tiny" and data.classes == ["star", "triangle"]
    assert data.train_images.shape == (len(data.train_labels), 3, 32, 32)
    expected = {np.array(Image.open(file)).tobytes() for file in (folder / "train" / "triangle").iterdir()}
    triangles = data.train_images[data.train_labels == 1].permute(0, 2, 3, 1)
    assert {image.numpy().tobytes() for image in triangles} == expected
    assert 0.3 < data.train_labels[:20].float().mean() < 0.7  # shuffled, not class by class
    assert torch.equal(load_dataset(str(folder), 32).train_images, data.train_images)


def test_folder_of_linked_classes(folder, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for name in ("star", "triangle"):
            (tmp_path / split / name).symlink_to(folder / split / name)
    linked, original = (load_dataset(str(path), 32).train_labels.bincount() for path in (tmp_path, folder))
    assert torch.equal(linked, original)


def test_folder_without_classes_in_any_mode_and_size(tmp_path, capsys):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i, mode in enumerate(["RGB", "L", "RGBA", "P", "CMYK", "1"]):
            Image.new(mode, (50 + i, 40)).save(tmp_path / split / f"{i}.{'tif' if mode == 'CMYK' else 'png'}")
    (tmp_path / "train" / "broken.png").write_bytes(b"no image")
    content = (tmp_path / "train" / "0.png").read_bytes()
    (tmp_path / "train" / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "train" / "notes.txt").write_text("not an image's name")
    data = load_dataset(str(tmp_path), 24)
    assert data.train_images.shape == (6, 3, 24, 24) and data.train_labels is None and data.classes == []
    out = capsys.readouterr()
    assert "2 of 8 files could not be read" in out.out
    assert "broken.png" in out.out + out.err and "cut.png" in out.out + out.err


def test_folder_is_decoded_once_and_again_when_it_changed(folder, tmp_path, monkeypatch):
    path = tmp_path / "images"
    shutil.copytree(folder, path)
    first = load_dataset(str(path), 16)
    files = set(Path("data").glob("*.uint8"))
    assert {f.name.rsplit("_", 2)[0] for f in files} == {"folder-images_train_16", "folder-images_test_16"}
    with monkeypatch.context() as patch:
        patch.setattr(utils.Image, "open", lambda file, formats: pytest.fail("decoded again"))
        second = load_dataset(os.path.relpath(path), 16)  # the same folder by a relative path
    assert all(torch.equal(a, b) for a, b in zip(first[1:5], second[1:5]))
    load_dataset(str(path), 24)
    shutil.copytree(folder, tmp_path / "other" / "images")
    load_dataset(str(tmp_path / "other" / "images"), 16)
    now = set(Path("data").glob("*.uint8"))
    assert len(now - files) == 4 and files < now  # one file for each size, folder and split
    shutil.rmtree(tmp_path / "other")

    image = next((path / "train" / "star").iterdir())
    Image.new("RGB", (32, 32), "red").save(image)
    changed = load_dataset(str(path), 16)
    assert sum(not torch.equal(a, b) for a, b in zip(first.train_images, changed.train_images)) == 1
    image.unlink()
    assert len(load_dataset(str(path), 16).train_images) == len(first.train_images) - 1
    assert len(list(Path("data").glob("folder-images_train_16_*"))) == 2  # outdated ones are gone


def test_an_incompletely_decoded_folder_is_not_used(folder, monkeypatch):
    def full(file):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(utils.os, "fsync", full)
        with pytest.raises(OSError):
            load_dataset(str(folder), 32)
    assert [f.name for f in Path("data").iterdir()] == ["lock"]
    assert load_dataset(str(folder), 32).train_images.float().std() > 10


def test_folder_as_a_viewer_shows_it(tmp_path):
    pixels = np.zeros((48, 32, 3), np.uint8)
    pixels[:24] = 200  # bright at the top, in a file that says: turn me by 90 degrees
    exif = Image.Exif()
    exif[0x0112] = 6
    for split in ("train", "test"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        Image.fromarray(pixels).rotate(90, expand=True).save(tmp_path / "photos" / split / "a.png", exif=exif)
    images = load_dataset("photos", 16).train_images
    assert (images[0, :, :7] > 150).all() and (images[0, :, 9:] < 50).all()
    images.zero_()  # not in the file that later runs read
    assert (load_dataset("photos", 16).train_images[0, :, :7] > 150).all()


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="DATASET"):
        load_dataset(str(tmp_path / "nowhere"), 32)
    with pytest.raises(ValueError, match="none there can be read"):
        load_dataset(str(tmp_path), 32)
    for path in ("train/cat", "train/dog", "test/cat"):
        (tmp_path / path).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / path / "a.png")
    with pytest.raises(ValueError, match="same class folders"):
        load_dataset(str(tmp_path), 32)
    (tmp_path / "train/a.png").write_bytes((tmp_path / "train/cat/a.png").read_bytes())
    with pytest.raises(ValueError, match="all in class folders"):
        load_dataset(str(tmp_path), 32)


@pytest.fixture
def cifar_on_disk(tmp_path, monkeypatch):
    """Files in CIFAR-10's own format, and torchvision's list of checksums changed to theirs."""
    base = tmp_path / datasets.CIFAR10.base_folder
    base.mkdir()

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    images = np.random.default_rng(0).integers(0, 256, (2, 8, 3072), dtype=np.uint8)
    for i, (attribute, name) in enumerate((("train_list", "data_batch_1"), ("test_list", "test_batch"))):
        md5 = write(name, {"data": images[i], "labels": list(range(8))})
        monkeypatch.setattr(datasets.CIFAR10, attribute, [[name, md5]])
    md5 = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5})
    return tmp_path, images


@pytest.mark.parametrize("name", ["auto", "cifar10"])
def test_cifar_from_disk(name, cifar_on_disk, monkeypatch):
    path, images = cifar_on_disk
    monkeypatch.setattr(utils, "reachable", lambda url: pytest.fail("the network was asked"))
    data = load_dataset(name, 32, str(path))
    assert data.name == "cifar10" and data.classes == list("abcdefghij")
    assert np.array_equal(data.train_images.numpy(), images[0].reshape(8, 3, 32, 32))
    assert np.array_equal(data.test_images.numpy(), images[1].reshape(8, 3, 32, 32))
    assert data.train_labels.tolist() == list(range(8))
    assert load_dataset(name, 48, str(path)).train_images.shape == (8, 3, 48, 48)


def test_cifar_out_of_reach(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils, "reachable", lambda url: False)
    monkeypatch.setattr(utils, "draw_shapes", lambda size: draw_shapes(size, train=10, test=10))
    for name in ("cifar10", "cifar100"):
        with pytest.raises(RuntimeError, match="cannot be reached"):
            load_dataset(name, 32, str(tmp_path))
    assert load_dataset("auto", 32, str(tmp_path)).name == "shapes"
    message = capsys.readouterr().out
    assert message.count("\n") == 1 and "cannot be reached" in message and "shapes" in message


@pytest.fixture
def interrupted_server(cifar_on_disk, tmp_path_factory, monkeypatch):
    """CIFAR-10's archive on a local server that closes the connection halfway at first."""
    path, images = cifar_on_disk
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(path / datasets.CIFAR10.base_folder, datasets.CIFAR10.base_folder)
    content, requests = archive.getvalue(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200), self.send_header("Content-Length", str(len(content))), self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            requests.append(self.path)
            self.wfile.write(content[: len(content) // 2] if len(requests) <= 1 else content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    yield tmp_path_factory.mktemp("data"), images
    server.shutdown()


def test_an_interrupted_download_is_not_used(interrupted_server):
    path, images = interrupted_server
    with pytest.raises(RuntimeError, match="could not be downloaded"):
        load_dataset("cifar10", 32, str(path))
    data = load_dataset("cifar10", 32, str(path))  # downloads again, and verifies
    assert np.array_equal(data.train_images.numpy(), images[0].reshape(8, 3, 32, 32))


def test_a_damaged_dataset_is_not_used(cifar_on_disk, monkeypatch):
    path, _ = cifar_on_disk
    monkeypatch.setattr(utils, "reachable", lambda url: False)
    batch = path / datasets.CIFAR10.base_folder / "data_batch_1"
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(RuntimeError, match="cannot be reached"):
        load_dataset("cifar10", 32, str(path))


def test_reachable_has_a_time_out(monkeypatch):
    def drop_packets(*args, **kwargs):
        time.sleep(3)
        return io.BytesIO()

    monkeypatch.setattr(downloads.urllib.request, "urlopen", drop_packets)
    start = time.time()
    assert not downloads.reachable("https://example.org", seconds=0.2)
    assert time.time() - start < 2


def test_an_address_that_is_none_cannot_be_reached(recwarn):
    assert not downloads.reachable("example.org", seconds=5)  # without https://
    assert not recwarn  # of an exception in a thread


def test_features_are_computed_once():
    class Encoder(torch.nn.Module):
        dim, token_size, seen = 4, 4, 0

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images):
            self.seen += len(images)
            return images[:, :1, :2, :2].repeat(1, 4, 1, 1)

    images = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
    dataset = Dataset("noise", images, None, images, None, [], 8)
    both = torch.cat([images, images.flip(3)])
    # of two batches each
    epochs = torch.tensor([[[1, 3, 5], [0, 2, 4]], [[5, 1, 3], [4, 6, 0]], [[6, 4, 2], [2, 1, 0]]])
    # a batch with a missing image is computed as a whole, and each batch where nothing is kept
    for limit, dtype, seen in ((1.0, torch.bfloat16, 9), (1.0, torch.float32, 9), (0.0, torch.bfloat16, 18)):
        encoder = Encoder()
        features = FeatureCache(encoder, dataset, "cpu", limit, dtype)
        for batches in epochs:
            features.fill(batches)
            for index in batches:
                expected = Encoder()(to_float(images[index]))
                batch, z = features[index]
                assert torch.equal(batch, to_float(images[index]))
                assert torch.allclose(z, expected, atol=2e-3 if dtype == torch.bfloat16 else 0)
        assert encoder.seen == seen
    encoder = Encoder()  # an epoch that repeats a small dataset
    FeatureCache(encoder, dataset, "cpu", 1.0, torch.float32).fill(torch.arange(10).view(2, 5).repeat(3, 1))
    assert encoder.seen == 10
    encoder = Encoder()
    features = FeatureCache(encoder, dataset, "cpu", 1.0, torch.float32, flip=True)
    for batches in torch.tensor([[[1, 13, 5], [11, 3, 15]], [[13, 5, 1], [3, 15, 11]]]):
        features.fill(batches)
        for index in batches:  # a mirrored image has features of its own
            assert torch.equal(features[index][1], Encoder()(to_float(both[index])))
    assert encoder.seen == 6


def test_loading_one_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 12, 3), dtype=np.uint8)
    upright = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    Image.fromarray(pixels).rotate(90, expand=True).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(load_image(tmp_path / "a.png"), upright)
    for exif[0x0112], angle in ((6, 90), (8, -90)):
        Image.fromarray(pixels[..., 0]).rotate(angle, expand=True).save(tmp_path / "turned.tiff", exif=exif)
        assert torch.equal(load_image(tmp_path / "turned.tiff"), upright[:, :1].expand(1, 3, 7, 12))
    grey = pixels[..., 0].astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert torch.allclose(load_image(tmp_path / "grey.png"), upright[:, :1].expand(1, 3, 7, 12), atol=1e-3)
    alpha = np.concatenate([pixels, np.zeros_like(pixels[..., :1])], 2)
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    assert (load_image(tmp_path / "alpha.png") == 1).all()
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    levels = np.linspace(0, 1, 84, dtype=np.float32).reshape(7, 12)
    Image.fromarray(levels).save(tmp_path / "floats.tiff")
    assert torch.allclose(load_image(tmp_path / "floats.tiff"), torch.from_numpy(levels), atol=3e-3)
    Image.fromarray(levels * 255).save(tmp_path / "bright.tiff")
    Image.fromarray(levels * np.nan).save(tmp_path / "nan.tiff")
    for name in ("broken.png", "missing.png", "bright.tiff", "nan.tiff"):
        with pytest.raises(ValueError, match=name) as error:
            load_image(tmp_path / name)
        assert "\n" not in str(error.value)
    with open(tmp_path / "a.png", "rb") as file, pytest.raises(ValueError, match="path of an existing file"):
        load_image(file)


def test_a_large_photograph_is_loaded_without_a_warning_and_skipped_in_a_folder(tmp_path, monkeypatch):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for name, side in (("large", 12), ("small", 8)):
            Image.new("RGB", (side, side)).save(tmp_path / split / f"{name}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow warns of more, and refuses twice as many
    with warnings.catch_warnings(record=True) as caught:
        assert load_image(tmp_path / "train" / "large.png").shape == (1, 3, 12, 12)
    assert not caught and len(load_dataset(str(tmp_path), 8, str(tmp_path / "data")).train_images) == 1


def test_random_crops_are_parts_of_their_images_at_random_scales():
    """Of an image whose red is x and whose green is y, both from 0 to 1, a crop shows where it is and how large."""
    y, x = torch.meshgrid(torch.linspace(0, 255, 64), torch.linspace(0, 255, 64), indexing="ij")
    image = torch.stack([x, y, torch.zeros(64, 64)]).round().byte()
    dataset = Dataset("ramps", image.expand(400, 3, 64, 64), None, image[None], None, [], 16)
    crops, features = FeatureCache(None, dataset, "cpu", 1.0, torch.float32)[torch.arange(400)]
    assert crops.shape == (400, 3, 16, 16) and features is None
    horizontal = (crops[:, 0, 8, -1] - crops[:, 0, 8, 0]) * 63 / 15  # pixels of the image for a pixel of the crop
    vertical = (crops[:, 1, -1, 8] - crops[:, 1, 0, 8]) * 63 / 15
    assert torch.allclose(horizontal, vertical, atol=0.3)
    assert horizontal.min() < 1.5 and horizontal.max() > 3 and len(crops[:, 0, 8, 8].unique()) > 50
    assert (dataset.test_crops() == image[:, 24:40, 24:40]).all()


def test_datasets_in_the_sizes_that_their_images_have(tmp_path):
    for folder, side in (("small", 40), ("large", 200)):
        for split in ("train", "test"):
            (tmp_path / folder / split).mkdir(parents=True)
            for i in range(3):
                pixels = np.random.default_rng(i).integers(0, 256, (side, side + 30 * i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / split / f"{i}.png")
    small, large = (str(tmp_path / name) for name in ("small", "large"))
    data = load_datasets((small, large), (32, 48), str(tmp_path))
    assert [part.label for part in data] == ["folder-small 32x32", "folder-large 32x32", "folder-large 48x48"]
    assert [part.train_images.shape[-1] for part in data] == [40, 192, 192]  # 4 * 48 at most
    assert len(load_datasets((small, small, large), (32, 48), str(tmp_path))) == 4
    whole, = load_datasets(large, 32, str(tmp_path))
    assert whole.train_images.shape[-1] == whole.size == 32
    with pytest.raises(ValueError, match="IMAGE_SIZE.*40"):
        load_datasets(small, (64, 128), str(tmp_path))
    with pytest.raises(ValueError, match=r"IMAGE_SIZE = \[64\]"):  # not left out in silence
        load_datasets((small, small), (32, 64), str(tmp_path))


def test_selecting_images_and_mirrored_images():
    images = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
    both = torch.cat([images, images.flip(3)])
    index = torch.randperm(20)
    assert torch.equal(select_images(images, index), both[index])
    assert torch.equal(select_images(images, torch.arange(10)), images)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def test_psnr_and_ssim_agree_with_scikit_image():
    data = draw_shapes(32, train=8, test=8)
    targets = to_float(data.train_images)
    images = targets + torch.randn_like(targets) * torch.linspace(0.02, 0.2, 8).view(-1, 1, 1, 1)
    for i in range(8):
        a, b = images[i].clamp(0, 1).permute(1, 2, 0).double().numpy(), targets[i].permute(1, 2, 0).double().numpy()
        assert psnr(images, targets)[i].item() == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1), abs=1e-3)
        expected = structural_similarity(b, a, data_range=1, channel_axis=2, gaussian_weights=True, sigma=1.5,
                                         use_sample_covariance=False)
        assert ssim(images, targets)[i].item() == pytest.approx(expected, abs=1e-3)
    assert (psnr(targets, targets) == 100).all()  # not infinite


def test_evaluate_is_the_mean_over_images():
    model = VQRAE("cifar", "fsq", {"levels": [8, 6, 5]}, **SMALL).train()
    images = draw_shapes(32, train=30, test=1).train_images
    metrics, counts, reconstructions = evaluate(model, images, batch_size=7)
    assert model.training
    output, _, indices = model.eval()(to_float(images))
    assert metrics["psnr"] == pytest.approx(psnr(output, to_float(images)).mean().item(), abs=1e-3)
    assert metrics["ssim"] == pytest.approx(ssim(output, to_float(images)).mean().item(), abs=1e-4)
    assert counts.sum() == 30 * 64 and metrics["usage"] == indices.unique().numel() / 240
    assert (reconstructions.float() / 255 - output).abs().max() <= 0.5 / 255 + 1e-3


def test_plot_of_the_usage_of_codes_beyond_a_table(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda path, figure: figures.append(figure))
    metrics = {"usage": 3 / 2**40, "perplexity": 2.8, "usage_1": 0.5, "perplexity_1": 4.2, "perplexity_2": 2.0}
    plot_usage(tmp_path / "usage.png", torch.tensor([2, 1, 1]), metrics, "run")
    axes, = figures[0].axes
    assert axes.get_title().endswith("perplexity 3, of each codebook 4; 2")
    assert axes.lines[1].get_label() == f"codebook size {2**40:,}"


def test_linear_probe():
    x, y = torch.randn(600, 8), torch.arange(600) % 3
    x[torch.arange(600), y] += 8
    assert linear_probe(x[:400], y[:400], x[400:], y[400:]) > 0.99
    assert linear_probe(x[:400], y[torch.randperm(400)], x[400:], y[400:]) < 0.6
    labelled = y[:400] < 2  # test images of a class that does not occur in training count as errors
    accuracy = linear_probe(x[:400][labelled], y[:400][labelled], x[400:], y[400:])
    assert accuracy == pytest.approx(2 / 3, abs=0.02)


@pytest.mark.parametrize("count, label", [(1, 0), (1, 3), (50, 0), (50, 3)])
def test_linear_probe_of_a_single_image_or_class(count, label):
    """Every test image is assigned to the only class that there is."""
    train_y = torch.full((count,), label)
    test_y = torch.tensor([0, 0, 3, 3, 7])
    assert linear_probe(torch.rand(count, 4), train_y, torch.rand(5, 4), test_y) == pytest.approx(0.4)


# ---------------------------------------------------------------------------------------------------------------------
# Grids and plots


def test_grid_has_originals_in_its_upper_half(tmp_path):
    originals = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    reconstructions = torch.full_like(originals, 200)
    save_grid(tmp_path / "grid.png", originals, reconstructions, columns=4)
    grid = np.array(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (4 * 130 + 2, 4 * 130 + 2, 3)
    for row, value in enumerate((0, 0, 200, 200)):
        assert (grid[130 * row + 2 : 130 * row + 130, 2:130] == value).all()


def test_grid_of_few_images(tmp_path):
    for n, size in ((3, (3 * 130 + 2, 2 * 130 + 2)), (7, (4 * 130 + 2, 2 * 130 + 2))):
        save_grid(tmp_path / "grid.png", *torch.zeros(2, n, 3, 32, 32, dtype=torch.uint8), columns=4)
        assert Image.open(tmp_path / "grid.png").size == size


def test_curves_of_columns_that_are_not_zero(tmp_path):
    history = [{"stage": 1, "loss": 2.0, "psnr": 20.0, "gan": 0.0}, {"stage": 2, "loss": 1.0, "psnr": 25.0, "gan": 0.0}]
    blue, orange, grey = (31, 119, 180), (255, 127, 14), (128, 128, 128)
    for rows, losses, colours in ((history, ["loss", "gan"], {blue, grey}), (history[:1], ["loss", "gan"], {blue}),
                                  (history, ["loss", "psnr"], {blue, orange, grey})):
        plot_curves(tmp_path / "curves.png", rows, losses, ["psnr"], "title")
        image = np.array(Image.open(tmp_path / "curves.png").convert("RGB"))
        # a line for each loss that is not zero, and a dotted one where stage 2 begins
        assert {colour for colour in (blue, orange, grey) if (image == colour).all(2).sum() > 20} == colours


# ---------------------------------------------------------------------------------------------------------------------
# Constants, files and checkpoints


def test_constants_are_those_at_the_top_of_train():
    import train

    text = Path(train.__file__).read_text().split("class Run")[0]
    constants = read_constants(vars(train), [])
    assert len(constants) > 30 and all(re.search(rf"^{name} = ", text, re.MULTILINE) for name in constants)


def test_constants_from_the_command_line(monkeypatch):
    namespace = {"QUANTIZER": "fsq", "EPOCHS": (30, 10), "SEED": 0, "path": 1}
    monkeypatch.setattr(sys, "argv", ["train.py", "QUANTIZER=simvq", "EPOCHS=(2, 1)"])
    assert read_constants(namespace) == {"QUANTIZER": "simvq", "EPOCHS": (2, 1), "SEED": 0}
    assert namespace["QUANTIZER"] == "simvq"
    monkeypatch.setattr(sys, "argv", ["train.py", "QUANTISER=simvq"])
    with pytest.raises(ValueError, match="QUANTIZER"):
        read_constants(namespace)


@pytest.mark.parametrize("quantizer, options", [
    ("fsq", {"levels": [8, 6, 5]}), ("simvq", {"codebook_size": 64, "code_dim": 8}),
    ("ema_vq", {"codebook_size": 64, "code_dim": 8}), ("ddcl", {})])
def test_checkpoint_restores_the_model(tmp_path, quantizer, options):
    model = VQRAE("cifar", quantizer, options, post_quant_kernel=1, **SMALL)
    images = torch.rand(2, 3, 32, 32)
    model(images)
    model.set_stage(2)
    save_checkpoint(tmp_path / "a.pt", model, metrics={"psnr": 20.0})
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert not loaded.training and loaded.stage == 2 and load_torch(tmp_path / "a.pt")["metrics"] == {"psnr": 20.0}
    assert torch.equal(loaded(images)[0], model.eval()(images)[0])
    assert not list(tmp_path.glob("*.tmp"))


class Malicious:
    def __reduce__(self):
        return print, ("code was run",)


def test_errors_of_broken_checkpoints_name_the_file(tmp_path, capsys):
    model = VQRAE("cifar", "fsq", {"levels": [8, 6, 5]}, **SMALL)
    save_checkpoint(tmp_path / "good.pt", model)
    good = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(good[: len(good) // 2])
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        entry = max(archive.infolist(), key=lambda info: info.file_size)
    flipped = bytearray(good)
    flipped[entry.header_offset + 1000] ^= 1
    (tmp_path / "flipped.pt").write_bytes(flipped)
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weights": torch.ones(2)}, tmp_path / "foreign.pt")
    torch.save({"config": Malicious(), "stage": 1, "model": {}}, tmp_path / "malicious.pt")
    content = torch.load(tmp_path / "good.pt", weights_only=True)
    torch.save(content | {"config": content["config"] | {"grid": 4}}, tmp_path / "unfitting.pt")
    for name in ("unfitting", "missing", "cut", "flipped", "text", "foreign", "malicious"):
        with pytest.raises(ValueError, match=f"{name}.pt"):
            load_checkpoint(tmp_path / f"{name}.pt")
    assert "code was run" not in capsys.readouterr().out


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    write_file(tmp_path / "a", b"old")
    monkeypatch.setattr(utils.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError):
        write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
