"""search.py: tokens that an image is decoded from better than from the encoder's."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import search
from models import PRETRAINED_DIR, VQRAE
from search import search_dataset, search_tokens
from utils import draw_shapes, load_checkpoint, psnr, to_float

QUANTIZERS = {
    "fsq": {}, "ddcl": {}, "simvq": {"codebook_size": 512, "code_dim": 8},
    "ema_vq": {"codebook_size": 256, "code_dim": 8}, "residual fsq": {"levels": [4, 4, 4], "codebooks": 2},
    "residual simvq": {"codebook_size": 32, "code_dim": 8, "codebooks": 2},
    "product ema_vq": {"codebook_size": 32, "code_dim": 8, "codebooks": 2},
    "residual ema_vq": {"codebook_size": 32, "code_dim": 8, "codebooks": 2},
}


def build(name="fsq", **options):
    *combine, kind = name.split()
    quantizer = QUANTIZERS[name] | ({"combine": combine[0]} if combine else {})
    options = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "adapter_depth": 1} | options
    model = VQRAE(quantizer=kind, quantizer_options=quantizer, **options)
    model(images(16))  # in train mode: EMA-VQ's codes become tokens
    return model.eval()


def images(count, height=32, width=32):
    return F.interpolate(to_float(draw_shapes(32, train=count, test=1).train_images), (height, width))


@torch.no_grad()
def errors(model, originals, indices):
    output = model.decode_from_indices(indices, size=originals.shape[2:])
    return (output - originals).square().mean((1, 2, 3))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_no_image_gets_worse_and_the_mean_gets_better(name):
    model, originals = build(name), images(6)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    first = model.encode_to_indices(originals)
    found = search_tokens(model, originals, sweeps=4, feature_weight=0)
    assert found.shape == first.shape and found.dtype == torch.int64 and not torch.equal(found, first)
    before, after = errors(model, originals, first), errors(model, originals, found)
    assert (after <= before).all() and (after < before).sum() > 1  # a decoder that has not learned hardly listens
    assert torch.equal(found, search_tokens(model, originals, sweeps=4, feature_weight=0))
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_search_flushes_denormal_numbers_in_all_threads():
    """Gradients that have them are slow on a CPU; a thread that runs already would keep them."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import search, torch; torch.set_num_threads(2); "
            "print((torch.full((10**6,), 1e-38) * 0.1).view(torch.int32).count_nonzero().item())")
    assert subprocess.check_output([sys.executable, "-c", code, str(PRETRAINED_DIR.parents[1])], text=True) == "0\n"


@pytest.mark.parametrize("height, width", [(4, 4), (4, 21), (45, 5), (33, 47)])
@pytest.mark.parametrize("options", [{}, {"decoder": "vit"}, {"encoder": "scratch"}], ids=["conv", "vit", "scratch"])
def test_images_of_any_size(height, width, options):
    model, originals = build(**options), images(2, height, width)
    first, found = model.encode_to_indices(originals), search_tokens(model, originals, sweeps=3)
    assert found.shape == first.shape == (2, -(-height // 4), -(-width // 4))
    found = search_tokens(model, originals, sweeps=3, feature_weight=0)
    assert (errors(model, originals, found) <= errors(model, originals, first) * (1 + 1e-6)).all()


def test_a_token_that_is_cut_leaves_the_weight_of_pixels_what_it_is(monkeypatch):
    """The error of an image is the mean of its pixels, also where 5 x 31 of them need 2 x 8 tokens."""
    model, originals, means = build(encoder="scratch"), images(1, 5, 31), []
    monkeypatch.setattr(model, "decode", lambda z_q, size: (1 - originals + 0 * z_q.mean()).clone())
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, x: means.append(loss.item()) or grad(loss, x))
    search_tokens(model, originals, sweeps=1)
    assert means[0] == pytest.approx((1 - 2 * originals).square().mean().item(), rel=1e-5)


def test_large_images_in_strips_and_many_in_parts(monkeypatch):
    model = load_checkpoint(PRETRAINED_DIR / "vqrae_ema_vq.pt")
    tall, many = images(1, 640, 24), images(5)
    own = errors(model, tall, model.encode_to_indices(tall))
    whole = errors(model, tall, search_tokens(model, tall, sweeps=2))
    largest, strip = [], search.search_strip

    def watched(model, x, *rest):
        largest.append(x.shape)
        return strip(model, x, *rest)

    monkeypatch.setattr(search, "search_strip", watched)
    monkeypatch.setattr(search, "strip_tokens", 6 * 45)
    found = search_tokens(model, tall, sweeps=2)
    assert len(largest) > 2 and found.shape == (1, 160, 6)
    assert own - errors(model, tall, found) > 0.9 * (own - whole) > 0.03 * own
    assert search_tokens(model, many, sweeps=1).shape == (5, 8, 8) and largest[-1][0] == 1


def test_one_token_many_sweeps_and_no_gradients_around():
    with torch.inference_mode():
        model, originals = load_checkpoint(PRETRAINED_DIR / "vqrae_fsq.pt"), images(3)[..., 10:14, 10:14]
    first = errors(model, originals, model.encode_to_indices(originals))
    with torch.inference_mode():
        found = search_tokens(model, originals, sweeps=300, feature_weight=0)
    assert (errors(model, originals, found) < first).any()
    alone = search_tokens(model, originals[:1], sweeps=20)
    assert torch.equal(alone, search_tokens(model, originals, sweeps=20)[:1])  # whatever else is in the batch


def test_features_are_kept_by_their_weight():
    model = load_checkpoint(PRETRAINED_DIR / "vqrae_ema_vq.pt")
    originals = images(8)
    z = model.encoder(originals)
    found = {weight: search_tokens(model, originals, 4, weight) for weight in (0, 5e-4, 0.01)}
    with torch.no_grad():
        distances = [F.mse_loss(model.features_from_indices(indices), z) for indices in found.values()]
        quality = [psnr(model.decode_from_indices(indices), originals).mean() for indices in found.values()]
        own = psnr(model(originals)[0], originals).mean()
    assert distances == sorted(distances, reverse=True)
    assert min(quality[:2]) > own + 0.3 and min(quality[:2]) > quality[2]


def test_what_the_mean_of_features_tells_is_kept_by_its_weight():
    model, originals = load_checkpoint(PRETRAINED_DIR / "vqrae_ema_vq.pt"), images(8)
    mean = model.encoder(originals).mean((2, 3))
    found = {weight: search_tokens(model, originals, 4, 5e-4, weight) for weight in (0, 10, 100)}
    with torch.no_grad():
        distances = [F.mse_loss(model.features_from_indices(indices).mean((2, 3)), mean) for indices in found.values()]
        quality = [psnr(model.decode_from_indices(indices), originals).mean() for indices in found.values()]
        own = psnr(model(originals)[0], originals).mean()
    assert distances[1] < 0.8 * distances[0] and distances[2] < distances[1]
    assert quality[0] > quality[1] > own + 0.3


def test_a_search_of_many_images_goes_on_where_it_was_stopped(monkeypatch):
    model, originals = build(), (images(260) * 255).byte()
    save, search_batch, batches = search.save_torch, search.search_tokens, []

    def stop(path, content):
        save(path, content)
        raise KeyboardInterrupt

    def watch(vqrae, images, *args, **kw):
        batches.append(len(images))
        return search_batch(vqrae, images, *args, **kw)

    monkeypatch.setattr(search, "search_tokens", watch)
    monkeypatch.setattr(search, "save_torch", stop)
    with pytest.raises(KeyboardInterrupt):
        search_dataset(model, originals, 1)
    monkeypatch.setattr(search, "save_torch", save)
    found = search_dataset(model, originals, 1)
    assert batches == [250, 10]
    assert torch.equal(found, search_tokens(model, to_float(originals), 1))
    assert torch.equal(found, search_dataset(model, originals, 1)) and batches == [250, 10]
    file, = Path("data").iterdir()
    file.write_bytes(b"broken")
    assert torch.equal(found, search_dataset(model, originals, 1)) and batches == [250, 10] * 2
    next(model.decoder.parameters()).data += 1  # whatever tokens depend on makes another file
    for count, (of, options) in enumerate([(originals, (1,)), (originals[:5], (1,)), (originals[:5], (2,)),
                                           (originals[:5], (2, 1e-3)), (originals[:5], (2, 1e-3, 10.0))], 2):
        search_dataset(model, of, *options)
        assert len(list(Path("data").iterdir())) == count
    search_dataset(model, originals[:5], 2, 1e-3, 10)  # the same weight
    assert len(list(Path("data").iterdir())) == count
    flat = originals[:4].reshape(1, 3, 64, 64)  # the same bytes are other images
    assert search_dataset(model, flat, 2).shape == (1, *(2 * side for side in found.shape[1:]))
    with pytest.raises(ValueError, match="^images = torch.float32, allowed: uint8$"):
        search_dataset(model, to_float(originals), 1)


def test_a_full_disk_does_not_end_a_search_of_many_images(monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(search, "save_torch", full)
    model, originals = build(), (images(3) * 255).byte()
    assert torch.equal(search_dataset(model, originals, 1), search_tokens(model, to_float(originals), 1))
    assert "what is found is not kept: [Errno 28] No space left" in "".join(capsys.readouterr())


def test_what_is_refused():
    model, originals = build(), images(2)
    for call, message in [
        (lambda: search_tokens(model, originals, sweeps=0), "sweeps = 0"),
        (lambda: search_tokens(model, originals, sweeps=True), "sweeps = True"),
        (lambda: search_tokens(model, originals, feature_weight=-1), "feature_weight = -1"),
        (lambda: search_tokens(model, originals, feature_weight="0"), "feature_weight = '0'"),
        (lambda: search_tokens(model, originals, image_weight=-1), "image_weight = -1"),
        (lambda: search_tokens(model, originals * 2), "images = "),
        (lambda: search_tokens(model, originals[0]), "images = "),
        (lambda: search_tokens(model, originals[..., :3]), "images = .*a token"),
        (lambda: search_tokens(model.train(), originals), "vqrae = .*eval mode"),
        (lambda: search_dataset(build().bfloat16(), (originals * 255).byte()), "weights = torch.bfloat16"),
        (lambda: search_tokens(VQRAE(quantizer="none", decoder_width=32).eval(), originals), "quantizer = 'none'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
