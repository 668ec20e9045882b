"""Wrong input into every public function and method: a ValueError of one line that names the thing and what is allowed.

(train.py's constants have a table of their own in test_train.py, broken files theirs in test_utils.py.)
"""
import copy
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluate import linear_probe
from models import VQRAE, PatchDiscriminator, build_encoder
from plots import save_grid
from quantizers import build_quantizer, nearest_code
from utils import evaluate, load_checkpoint, load_dataset, load_torch, psnr, read_constants, ssim


@pytest.fixture(scope="module")
def model():
    return VQRAE("cifar", "fsq", {"levels": [8, 6, 5]}, decoder_width=64, decoder_depth=1, decoder_heads=2).eval()


images, features = torch.rand(1, 3, 32, 32), torch.randn(1, 256, 8, 8)
tokens = torch.zeros(1, 8, 8, dtype=torch.int64)
MODEL = {
    "images of another rank": (lambda m: m(images[0]), "images"),
    "grey images": (lambda m: m.encode(images[:, :1]), "images"),
    "no images": (lambda m: m.encode_to_indices(images[:0]), "images"),
    "images from 0 to 255": (lambda m: m.encode_to_indices(images * 255), "images"),
    "images below 0": (lambda m: m(images - 0.5), "images"),
    "images with NaN": (lambda m: m(images * torch.nan), "images"),
    "uint8 images": (lambda m: m((images * 255).byte()), "images"),
    "a list of images": (lambda m: m(images.tolist()), "images"),
    "z_q with another width": (lambda m: m.decode(features[:, 1:]), "z_q"),
    "z_q of a size that does not fit": (lambda m: m.decode(features, (28, 33)), "size"),
    "a model in fp64": (lambda m: copy.deepcopy(m).double()(images), "weights"),
    "z_q for a model in fp16": (lambda m: copy.deepcopy(m).half().decode(features), "weights"),
    "an image smaller than a token": (lambda m: m(images[..., :3]), "images"),
    "z_q without a batch": (lambda m: m.decode(features[0]), "z_q"),
    "z_q of integers": (lambda m: m.decode(features.long()), "z_q"),
    "z_q None": (lambda m: m.decode(None), "z_q"),
    "z with another width": (lambda m: m.quantize(features[:, 1:]), "z"),
    "z with infinity": (lambda m: m.quantizer(features / 0), "infinity"),
    "indices of another size": (lambda m: m.decode_from_indices(tokens, size=(32, 36)), "size"),
    "a size of fractions": (lambda m: m.decode_from_indices(tokens, size=(32.0, 31.5)), "size"),
    "a size in text": (lambda m: m.decode(features, size=("32", "32")), "size"),
    "a size of nothing": (lambda m: m.decode_from_indices(tokens, size=(None, None)), "size"),
    "a grid without tokens": (lambda m: m.decode_from_indices(tokens[:, :0]), "none 0"),
    "features of a grid without tokens": (lambda m: m.features_from_indices(tokens[:, :0]), "none 0"),
    "indices without a grid": (lambda m: m.decode_from_indices(tokens.flatten()), "indices"),
    "indices too large": (lambda m: m.decode_from_indices(tokens + 240), "239"),
    "indices below 0": (lambda m: m.features_from_indices(tokens - 1), "indices"),
    "indices with a fraction": (lambda m: m.decode_from_indices(tokens + 0.5), "indices"),
    "a list of indices": (lambda m: m.decode_from_indices(tokens.tolist()), "indices"),
    "features for the predictor": (lambda m: m.predict_features(features[:, :4]), "z_q"),
    "features of two shapes": (lambda m: m.compute_prediction_loss(features, features[:, :1]), "teacher_z"),
    "usage of no indices": (lambda m: m.get_codebook_usage(tokens[:0]), "indices"),
    "usage of indices out of range": (lambda m: m.get_codebook_usage(tokens + 1000), "indices"),
    "usage of a list": (lambda m: m.get_codebook_usage([1, 2]), "indices"),
    "usage of floats": (lambda m: m.get_codebook_usage(features), "indices"),
    "usage of a codebook that is not there": (lambda m: m.get_codebook_usage(tokens, 1), "codebook"),
    "a codebook too many": (lambda m: m.decode_from_indices(tokens, codebooks=1), "codebooks"),
    "stage 3": (lambda m: m.set_stage(3), "stage"),
    "evaluating floats": (lambda m: evaluate(m, images), "images"),
    "evaluating nothing": (lambda m: evaluate(m, images[:0].byte()), "images"),
    "a size that the grid does not divide": (lambda m: VQRAE(image_size=30), "GRID"),
    "a grid of 0": (lambda m: VQRAE(grid=0), "GRID"),
    "an even kernel": (lambda m: VQRAE(post_quant_kernel=2), "POST_QUANT_KERNEL"),
    "an adapter of depth -1": (lambda m: VQRAE(adapter_depth=-1), "ADAPTER_DEPTH"),
    "heads that do not divide": (lambda m: VQRAE(decoder="vit", decoder_heads=5), "DECODER_HEADS"),
    "an unknown encoder": (lambda m: build_encoder("cifra", 8), "nearest: cifar"),
}


@pytest.mark.parametrize("call, names", MODEL.values(), ids=MODEL)
def test_model(call, names, model):
    with pytest.raises(ValueError, match=names) as error:
        call(model)
    assert "\n" not in str(error.value) and any(word in str(error.value) for word in ("allowed", "NaN or infinity"))


QUANTIZER = {
    "another width": (lambda q: q(torch.randn(2, 9, 7)), "channels"),
    "one dimension too few": (lambda q: q(torch.randn(2, 8)), "shape"),
    "no tokens": (lambda q: q(torch.randn(0, 3, 8)), "shape"),
    "integers": (lambda q: q(torch.ones(2, 3, 8, dtype=torch.int32)), "type"),
    "a number": (lambda q: q(0.5), "tensor"),
    "codes of another width": (lambda q: q.codes_to_indices(torch.randn(2, 9, 7)), "channels"),
    "codes with NaN": (lambda q: q.codes_to_indices(torch.full((2, 3, 8), torch.nan)), "NaN"),
    "indices of another shape": (lambda q: q.indices_to_codes(torch.tensor([1, 2])), "indices"),
    "entries of another shape": (lambda q: q.get_codebook_entry(torch.tensor([[1, 2]])), "indices"),
    "entries out of range": (lambda q: q.get_codebook_entry(torch.tensor([q.codebook_size])), "indices"),
    "entries of booleans": (lambda q: q.get_codebook_entry(torch.tensor([True])), "indices"),
}


@pytest.mark.parametrize("call, names", QUANTIZER.values(), ids=QUANTIZER)
@pytest.mark.parametrize("name, options", [("fsq", {}), ("simvq", {}), ("ema_vq", {}), ("ddcl", {}),
                                           ("ema_vq", {"codebooks": 4}), ("simvq", {"codebooks": 2}),
                                           ("fsq", {"codebooks": 3})], ids=str)
def test_quantizer(name, options, call, names):
    with pytest.raises(ValueError, match=names) as error:
        call(build_quantizer(name, 8, **options))
    assert "\n" not in str(error.value)


image, labels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
OTHERS = {
    "a search among codes of another width": (lambda: nearest_code(torch.rand(3, 4), torch.rand(5, 6)), "codebook"),
    "grids of different images": (lambda: save_grid(Path("a.png"), image, image[..., :16], columns=2), "upper"),
    "a grid of nothing": (lambda: save_grid(Path("a.png"), image[:0], image[:0], columns=2), "upper"),
    "PSNR of different sizes": (lambda: psnr(images, images[..., :16]), "images"),
    "SSIM of different sizes": (lambda: ssim(images, images[..., :16]), "images"),
    "SSIM of tiny images": (lambda: ssim(images[..., :8], images[..., :8]), "11x11"),
    "a label too few": (lambda: linear_probe(torch.rand(4, 2), labels[:3], torch.rand(4, 2), labels), "train_x"),
    "a probe on nothing": (lambda: linear_probe(torch.rand(4, 2), labels, torch.rand(0, 2), labels[:0]), "test_x"),
    "an unknown dataset": (lambda: load_dataset("cifar", 32), "DATASET"),
    "images of size 0": (lambda: load_dataset("shapes", 0), "image_size"),
    "a checkpoint that is not there": (lambda: load_checkpoint("nowhere.pt"), "nowhere.pt"),
    "a folder for a file": (lambda: load_torch("."), "checkpoint"),
    "an unknown quantizer": (lambda: build_quantizer("vq", 8), "quantizer"),
    "a width of 0": (lambda: build_quantizer("fsq", 0), "dim"),
    "a discriminator of tiny images": (lambda: PatchDiscriminator(4), "image_size"),
    "an empty folder": (lambda: load_dataset(folder_of(0), 32), "DATASET"),
    "a folder of broken images": (lambda: load_dataset(folder_of(3, broken=True), 32), "DATASET"),
    "a constant without a value": (lambda: read_constants({"SEED": 0}), "NAME=value"),
}


def folder_of(n, broken=False):
    for split in ("train", "test"):
        Path("folder", split).mkdir(parents=True)
        for i in range(n):
            path = Path("folder", split, f"{i}.png")
            Image.new("RGB", (8, 8)).save(path)
            if broken:
                path.write_bytes(path.read_bytes()[:20])
    return "folder"


@pytest.mark.parametrize("call, names", OTHERS.values(), ids=OTHERS)
def test_others(call, names, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "SEED"])
    with pytest.raises(ValueError, match=names) as error:
        call()
    assert "\n" not in str(error.value) and "allowed" in str(error.value)


def test_a_folder_of_one_image():
    data = load_dataset(folder_of(1), 32)
    assert len(data.train_images) == len(data.test_images) == 1
