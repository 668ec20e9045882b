import copy
import json
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

import downloads
import models
from models import ENCODERS, PRETRAINED_DIR, VQRAE, AirbenchEncoder, PatchDiscriminator, build_encoder
from pretrain import augment, initialize
from utils import load_checkpoint, load_torch, save_checkpoint, save_torch

OPTIONS = {"fsq": {"levels": [8, 6, 5]}, "simvq": {"codebook_size": 256, "code_dim": 8},
           "ema_vq": {"codebook_size": 64, "code_dim": 8}, "ddcl": {}}
SEVERAL = {"codebook_size": 16, "code_dim": 8, "codebooks": 2}


SMALL = {"adapter_depth": 1, "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2}


def build(quantizer="fsq", quantizer_options=None, **options):
    arguments = {"encoder": "cifar"} | SMALL | options
    return VQRAE(quantizer=quantizer, quantizer_options=quantizer_options or OPTIONS.get(quantizer), **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Encoders


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:1000], lambda data: b"version https://git-lfs",
                                    lambda data: data[:50_000] + bytes([data[50_000] ^ 1]) + data[50_001:]],
                         ids=["empty", "cut", "a pointer of git-lfs", "one bit"])
def test_a_damaged_encoder_is_named(damage, tmp_path, monkeypatch):
    (tmp_path / "cifar_encoder.pt").write_bytes(damage((PRETRAINED_DIR / "cifar_encoder.pt").read_bytes()))
    monkeypatch.setattr("models.PRETRAINED_DIR", tmp_path)
    with pytest.raises(ValueError, match=r"^checkpoint .*cifar_encoder.pt cannot be read: [^\n]*$"):
        build_encoder("cifar", 4)


def test_shipped_encoder():
    file = PRETRAINED_DIR / "cifar_encoder.pt"
    assert file.stat().st_size < 12e6
    torch.load(file, weights_only=True)
    recipe = json.loads(file.with_suffix(".json").read_text())
    assert recipe["DATASET"] and recipe["linear_probe_accuracy"] > 0.85
    z = build_encoder("cifar", 4)(torch.rand(2, 3, 32, 32))
    assert z.shape == (2, 256, 8, 8)
    assert z.mean(1).abs().max() < 1e-5 and (z.var(1, correction=0) - 1).abs().max() < 1e-3
    assert build_encoder("cifar", 4)(torch.rand(2, 3, 64, 50)).shape == (2, 256, 16, 13)  # padded to whole tokens
    assert build_encoder("cifar", 8)(torch.rand(2, 3, 64, 50)).shape == (2, 256, 8, 7)  # and resized to its input


def test_folding_the_norms_changes_nothing():
    encoder = AirbenchEncoder(fused=False)
    encoder(torch.rand(16, 3, 32, 32))  # sets running statistics
    encoder.eval()
    images = torch.rand(4, 3, 32, 32)
    expected = encoder(images)
    fused = models.fuse(copy.deepcopy(encoder))
    assert torch.allclose(fused(images), expected, atol=1e-4)
    assert AirbenchEncoder().state_dict().keys() == fused.state_dict().keys()


def test_whitening():
    """The filters' responses to the patches that they were computed from are uncorrelated and of variance 1."""
    images = F.interpolate(torch.rand(200, 3, 16, 16), 32, mode="bicubic").clamp(0, 1)
    encoder = AirbenchEncoder(fused=False)
    initialize(encoder, images)
    with torch.no_grad():
        responses = F.conv2d((images - 0.5) / 0.25, encoder.whiten.weight).transpose(0, 1).flatten(1)
    half = len(responses) // 2
    assert torch.equal(responses[:half], -responses[half:])
    second_moments = responses[:half] @ responses[:half].T / responses.shape[1]
    assert torch.allclose(second_moments, torch.eye(half), atol=0.1)


def test_images_are_shifted_and_mirrored():
    image = torch.arange(3 * 32 * 32.0).view(1, 3, 32, 32)
    mirror = torch.arange(100) % 2 == 0
    shifted = augment(image.expand(100, 3, 32, 32), mirror, pad=2)
    crops = F.pad(image, (2, 2, 2, 2), mode="reflect").unfold(2, 32, 1).unfold(3, 32, 1)[0].permute(1, 2, 0, 3, 4)
    seen = set()
    for result, mirrored in zip(shifted, mirror):
        same = (crops == (result.flip(2) if mirrored else result)).all((2, 3, 4)).nonzero()
        assert len(same) == 1
        seen.add(tuple(same[0].tolist()))
    assert len(seen) == 25


@pytest.fixture
def small(monkeypatch):
    """Stand-ins for timm's encoders: two blocks of 64 channels, all else (patches, tokens, norms) as it is."""
    create, size = timm.create_model, {"depth": 2, "embed_dim": 64, "num_heads": 4}
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, **kwargs, **size))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """cache(name, state) writes weights where the hub's client keeps them; the network is not used."""
    monkeypatch.setattr(downloads, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(downloads, "reachable", lambda url: False)

    def write(name, state):
        hub_id = timm.get_pretrained_cfg(ENCODERS[name]).hf_hub_id
        repository = tmp_path / "hub" / ("models--" + hub_id.replace("/", "--"))
        for folder in ("refs", "blobs", "snapshots/0123abc"):
            (repository / folder).mkdir(parents=True, exist_ok=True)
        (repository / "refs/main").write_text("0123abc")
        save_file(state, repository / "blobs/f00")
        (repository / "snapshots/0123abc/model.safetensors").unlink(missing_ok=True)
        (repository / "snapshots/0123abc/model.safetensors").symlink_to("../../blobs/f00")

    return write


def timm_model(name):
    """The stand-in at its native image size, with every parameter random, those of norms and scales too."""
    model = timm.create_model(ENCODERS[name], pretrained=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


@pytest.mark.parametrize("name", ENCODERS)
def test_pretrained_features_are_the_last_blocks_patch_tokens(name, small, cache):
    source = timm_model(name)
    cache(name, source.state_dict())
    size, patch = source.patch_embed.img_size[0], source.patch_embed.patch_size[0]
    images = torch.rand(1, 3, size, size)
    with torch.no_grad():
        z = build_encoder(name, patch).eval()(images)
        mean, std = (torch.tensor(source.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        tokens = source.norm_pre(source.patch_drop(source._pos_embed(source.patch_embed((images - mean) / std))))
        for block in source.blocks:
            tokens = block(tokens)
        tokens = tokens[:, source.num_prefix_tokens :]
        expected = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert z.shape == (1, source.embed_dim, size // patch, size // patch)
    assert torch.allclose(z.flatten(2).transpose(1, 2), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["dinov2_s", "siglip2_b", "mae_b", "internvit_300m"])
def test_position_embeddings_are_resampled_as_timm_does(name, small, cache):
    source = timm_model(name)
    cache(name, source.state_dict())
    encoder = build_encoder(name, 4).eval()
    prefix = 0 if source.no_embed_class else source.num_prefix_tokens
    for height, width in ((32, 32), (20, 44)):
        h, w = height // 4, width // 4
        patch = encoder.patch
        fixed = timm.create_model(ENCODERS[name], img_size=(h * patch, w * patch)).eval()
        positions = resample_abs_pos_embed(source.pos_embed, (h, w), num_prefix_tokens=prefix)
        fixed.load_state_dict(source.state_dict() | {"pos_embed": positions})
        fixed.norm = torch.nn.LayerNorm(64, elementwise_affine=False)
        images = torch.rand(1, 3, height, width)
        resized = F.interpolate(images, (h * patch, w * patch), mode="bicubic", antialias=True).clamp(0, 1)
        with torch.no_grad():
            tokens = fixed.forward_features((resized - encoder.mean) / encoder.std)[:, fixed.num_prefix_tokens :]
            assert torch.allclose(encoder(images), tokens.transpose(1, 2).unflatten(2, (h, w)), atol=1e-4)


@pytest.mark.parametrize("name", ["dinov2_s", "siglip2_b"])
@pytest.mark.parametrize("damage", ["removed", "renamed", "reshaped", "cut"])
def test_unfitting_weights_are_an_error(name, damage, small, cache, tmp_path):
    state = timm_model(name).state_dict()
    key = "blocks.1.mlp.fc1.weight"
    weight = state.pop(key)
    cache(name, state | {"removed": {}, "renamed": {"blocks.1.mlp.fc3.weight": weight},
                         "reshaped": {key: weight[:-1].clone()}, "cut": {key: weight}}[damage])
    if damage == "cut":
        blob, = (tmp_path / "hub").glob("*/blobs/f00")
        blob.write_bytes(blob.read_bytes()[:-1000])
    with pytest.raises(RuntimeError, match=r"siglip|dinov2") as error:
        build_encoder(name, 4)
    assert "\n" not in str(error.value) and (key in str(error.value) or damage == "cut")


def one_step_of_each_stage(model, images):
    """Encode, decode from indices, and take a training step of each stage."""
    with torch.no_grad():
        indices = model.eval().encode_to_indices(images)
        assert indices.shape == (len(images), *(size // model.token_size for size in images.shape[2:]))
        assert model.decode_from_indices(indices).shape == images.shape
        teacher_z = model.encoder(images)
    for stage in (1, 2):
        model.set_stage(stage).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        z = teacher_z if stage == 1 else model.encoder(images)
        z_q, quantizer_loss, _ = model.quantize(z)
        loss = F.mse_loss(model.decode(z_q), images) + quantizer_loss
        loss = loss + F.mse_loss(z, teacher_z) + model.compute_prediction_loss(z_q, teacher_z)
        loss.backward()
        weights = [next(module.parameters()) for module in (model.encoder, model.decoder)]
        before = [weight.detach().clone() for weight in weights]
        optimizer.step()
        assert [not torch.equal(a, b) for a, b in zip(before, weights)] == [stage == 2, True] and loss.isfinite()
        del optimizer
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", ENCODERS)
def test_stand_in_of_each_encoder_learns(name, small):
    model = VQRAE(name, "fsq", OPTIONS["fsq"], grid=4, pretrained=False, **SMALL)
    one_step_of_each_stage(model, torch.rand(2, 3, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_each_encoder_learns_at_its_true_size(name):
    """With a decoder as wide and deep as itself; up to 14 GB (siglip2_so400m)."""
    model = VQRAE(name, "fsq", image_size=32, grid=8, pretrained=False)
    assert len(model.decoder.blocks) == model.encoder.depth >= 12
    one_step_of_each_stage(model, torch.rand(2, 3, 32, 32))


def test_decoder_follows_a_vit_encoder(small):
    model = VQRAE("vit_tiny_patch16_224", "fsq", OPTIONS["fsq"], image_size=32, grid=4, pretrained=False)
    assert model.decoder.project_in.out_features == 64 and len(model.decoder.blocks) == 2
    assert model.decoder.blocks[0].attn.num_heads == 4
    assert model(torch.rand(1, 3, 32, 32))[0].shape == (1, 3, 32, 32)


@pytest.mark.slow
def test_a_step_in_the_papers_setting():
    """SigLIP-L at 256 pixels, SimVQ 16,384 x 1,536 behind an adapter, a decoder as large as the encoder: 12 GB for a
    step of two images, nearly all of it weights, gradients and AdamW's averages."""
    options = {"codebook_size": 16384, "code_dim": 1536}
    model = VQRAE("siglip_l", "simvq", options, image_size=256, grid=16, pretrained=False)
    one_step_of_each_stage(model, torch.rand(2, 3, 256, 256))


def test_unknown_encoder_names_the_nearest():
    with pytest.raises(ValueError, match="nearest: dinov2_s"):
        build_encoder("dinov2s", 8)
    for name in ("resnet50", "levit_128", "samvit_base_patch16", "vit_small_patch16_18x2_224"):
        with pytest.raises(ValueError, match="ENCODER"):
            build_encoder(name, 8, pretrained=False)


def test_weights_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setattr(downloads, "reachable", lambda url: False)
    monkeypatch.setattr(downloads, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match='vit_small_patch14_dinov2.*ENCODER = "cifar"'):
        build_encoder("dinov2_s", 8)


# ---------------------------------------------------------------------------------------------------------------------
# VQRAE


@pytest.mark.parametrize("quantizer, options", [*OPTIONS.items(), ("fsq", {"codebooks": 2}), ("simvq", SEVERAL),
                                                ("ema_vq", SEVERAL | {"combine": "product"})], ids=str)
def test_decoding_indices_is_the_forward_pass(quantizer, options):
    model = build(quantizer, options)
    images = torch.rand(3, 3, 32, 32)
    model(images)  # a training step, so that EMA-VQ has a codebook
    model.eval()
    with torch.no_grad():
        output, loss, indices = model(images)
        z_q, _, _ = model.encode(images)
        assert indices.shape == (3, 8, 8) and indices.unique().numel() > 1
        assert torch.equal(model.encode_to_indices(images), indices)
        assert torch.equal(model.decode_from_indices(indices), output)
        assert torch.equal(model.features_from_indices(indices), model.predict_features(z_q))
    assert output.shape == images.shape and 0 <= output.min() and output.max() <= 1 and loss.shape == ()


def test_decoding_from_the_first_codebooks():
    model = build("ema_vq", SEVERAL)
    model(torch.rand(3, 3, 32, 32))
    indices = model.eval().encode_to_indices(torch.rand(2, 3, 32, 32))
    with torch.no_grad():
        for decode in (model.decode_from_indices, model.features_from_indices):
            assert torch.equal(decode(indices, codebooks=2), decode(indices))
            first = decode(indices, codebooks=1)
            assert torch.equal(first, decode(indices % 16, codebooks=1)) and not torch.equal(first, decode(indices))
    with pytest.raises(ValueError, match="codebooks = 3"):
        model.decode_from_indices(indices, codebooks=3)
    with pytest.raises(ValueError, match="codebooks = 1"):
        build().decode_from_indices(indices % 240, codebooks=1)


def test_without_quantizer_and_adapter_the_features_are_decoded():
    model = build("none", adapter_depth=0).eval()
    images = torch.rand(2, 3, 32, 32)
    z_q, loss, indices = model.encode(images)
    assert torch.equal(z_q, model.encoder(images)) and loss == 0 and indices.shape == (2, 8, 8)
    with pytest.raises(ValueError, match="none"):
        model.decode_from_indices(indices)


@pytest.mark.parametrize("encoder, grid", [("scratch", 8), ("cnn", 4)])
def test_baselines_from_scratch_learn_in_both_stages(encoder, grid):
    images = torch.rand(2, 3, 32, 32)
    for name in ("fsq", "ddcl", "none"):
        model = VQRAE(encoder, name, OPTIONS.get(name), grid=grid, **SMALL | {"adapter_depth": 0})
        for stage in (1, 2):
            model.set_stage(stage).train()
            output, loss, indices = model(images)
            (F.mse_loss(output, images) + loss).backward()
            assert output.shape == images.shape and indices.shape == (2, grid, grid)
            weights = [next(module.parameters()) for module in (model.encoder, model.decoder)]
            assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in weights)
        with pytest.raises(ValueError, match="ENCODER"):
            model.predict_features(torch.rand(1, 256, grid, grid))
    with pytest.raises(ValueError, match="GRID"):
        VQRAE("cnn", grid=8)


@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_post_quant_conv(kernel):
    model = build(post_quant_kernel=kernel).eval()
    assert sum(p.numel() for p in model.post_quant_conv.parameters()) == (kernel**2 * 256 * 256 + 256 if kernel else 0)
    z_q = torch.randn(1, 256, 8, 8)
    expected = model.decoder(model.post_quant_conv(z_q)).clamp(0, 1)
    assert torch.equal(model.decode(z_q), expected)
    with pytest.raises(ValueError, match="POST_QUANT_KERNEL"):
        build(post_quant_kernel=2)


def test_convolution_with_a_matrix_of_weights():
    conv = models.Conv(5, 7)
    x = torch.randn(2, 5, 6, 6)
    patches = F.unfold(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3)
    patches = patches.unflatten(1, (5, 9)).transpose(1, 2).flatten(1, 2)  # channels by pixel
    expected = (conv.weight @ patches + conv.bias[:, None]).unflatten(2, (6, 6))
    assert conv.weight.ndim == 2 and torch.allclose(conv(x), expected, atol=1e-5)


def test_no_drift_silences_a_block():
    """What a block adds still depends on its input when all its hidden channels have drifted far below zero."""
    x, block = torch.randn(2, 16, 6, 6), models.ResidualBlock(16, 24)
    assert torch.equal(block(x), x) and len(block.norm.weight) == 24
    nn.init.normal_(block.conv2.weight)
    nn.init.constant_(block.conv1.bias, -100)
    assert (block(x) - x).std() > 0.1


@pytest.mark.parametrize("written, loads", [
    ({"version": 2}, True), ({"version": 3}, False), ({"version": 2, "norm_first": True}, False), ({}, False),
    ({"local": True}, False), ({"local": False}, False),
    ({"local": True, "norm_first": True}, False), ({"local": False, "norm_first": False}, False),
    ({"local": True, "norm_first": False}, True),  # the first with today's blocks, before there were versions
])
def test_checkpoints_of_other_blocks_are_refused(written, loads, tmp_path):
    model = build().eval()
    nn.init.normal_(model.adapter[0].conv2.weight)
    save_checkpoint(tmp_path / "model.pt", model)
    content, images = load_torch(tmp_path / "model.pt"), torch.rand(1, 3, 32, 32)
    content["config"] |= {name: value for name, value in written.items() if name != "version"}
    del content["version"]
    save_torch(tmp_path / "model.pt", content | {k: v for k, v in written.items() if k == "version"})
    if loads:
        assert torch.equal(load_checkpoint(tmp_path / "model.pt").encode(images)[0], model.encode(images)[0])
    else:
        with pytest.raises(ValueError, match="model.pt does not fit this code: (version = [13]|.*norm_first)"):
            load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("image_size, grid", [(32, 8), (32, 4), (32, 32), (64, 8)])
def test_conv_decoder(image_size, grid):
    model = build(image_size=image_size, grid=grid, adapter_depth=0)
    images = torch.rand(2, 3, image_size, image_size)
    output = model(images)[0]
    assert output.shape == images.shape
    output.square().mean().backward()
    assert all(p.grad is not None for p in model.decoder.parameters())


def test_decoder_and_adapter_kinds(small):
    assert len(build(adapter_depth=None).adapter) == 3 and isinstance(build().adapter[0], models.ResidualBlock)
    assert isinstance(build().decoder, models.ConvDecoder)
    assert isinstance(build(decoder="vit").decoder, models.ViTDecoder)
    model = VQRAE("dinov2_s", decoder="conv", decoder_depth=1, pretrained=False)
    assert isinstance(model.decoder, models.ConvDecoder) and isinstance(model.adapter, models.OnGrid)
    for options in ({"decoder": "cnn"}, {"encoder": "cnn", "grid": 4, "decoder": "vit"},
                    {"image_size": 48, "grid": 8, "decoder": "conv"}):
        with pytest.raises(ValueError, match="DECODER"):
            VQRAE(**options)


# ---------------------------------------------------------------------------------------------------------------------
# Images of any size


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (33, 30), (32, 128)])
@pytest.mark.parametrize("options", [{}, {"decoder": "vit", "decoder_heads": 2}, {"encoder": "cnn", "grid": 4}])
def test_any_size(size, options):
    model = build(**options).eval()
    images = torch.rand(2, 3, *(max(n, model.token_size) for n in size))
    grid = tuple(math.ceil(n / model.token_size) for n in images.shape[2:])
    with torch.no_grad():
        reconstructions, _, indices = model(images)
        assert reconstructions.shape == images.shape and indices.shape == (2, *grid)
        assert torch.equal(model.encode_to_indices(images), indices)
        assert torch.equal(model.decode_from_indices(indices, size=images.shape[2:]), reconstructions)
        assert model.decode_from_indices(indices).shape[2:] == tuple(n * model.token_size for n in grid)
        if not model.from_scratch:
            assert model.features_from_indices(indices).shape == (2, 256, *grid)
    padded = F.pad(images, (0, -images.shape[3] % model.token_size, 0, -images.shape[2] % model.token_size), "reflect")
    assert torch.equal(model.encode_to_indices(padded), indices)


def test_any_size_with_a_vit(small):
    model = VQRAE("dinov2_s", "fsq", OPTIONS["fsq"], image_size=32, grid=8, pretrained=False).eval()
    images = torch.rand(1, 3, 18, 49)
    with torch.no_grad():
        indices = model.encode_to_indices(images)
        assert indices.shape == (1, 5, 13)
        assert model.decode_from_indices(indices, size=(18, 49)).shape == images.shape


@pytest.mark.parametrize("encoder, grid", [("cifar", 8), ("cnn", 4), ("dinov2_s", 8)])
def test_strips_equal_the_whole(encoder, grid, monkeypatch, small):
    """With blocks that do something (they start as the identity), and borders of strips where they may be."""
    vit = encoder == "dinov2_s"  # of its images no strips are made
    model = build(encoder=encoder, grid=grid, decoder_depth=2, adapter_depth=1 if vit else 3, post_quant_kernel=3,
                  decoder="conv" if vit else None, decoder_width=32, pretrained=not vit).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("conv2.weight"):
                parameter.normal_(std=0.02)
        images = torch.rand(1, 3, 171 * model.token_size - 2, 3 * model.token_size)
        indices = model.encode(images)[2]
        whole = model.decode(model.quantizer.indices_to_codes(indices), images.shape[2:])
        strips = []
        monkeypatch.setattr(models, "tqdm", lambda tops, *args, **kwargs: strips.append(tops) or tops)
        monkeypatch.setattr(models.in_strips, "__defaults__", (100,))
        assert (model.encode_to_indices(images) == indices).float().mean() > 0.99  # rounding may decide between codes
        assert torch.allclose(model.decode_from_indices(indices, size=images.shape[2:]), whole, atol=1e-5)
    assert len(strips) == 2 - vit and min(map(len, strips)) > 1


def test_a_token_sees_no_further_than_its_reach():
    model = build(decoder_depth=2, adapter_depth=3, post_quant_kernel=3).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("conv2.weight"):
                parameter.normal_(std=0.02)
    for function, x, reach, rows in (
            (lambda x: model.adapter(model.encoder(x)), torch.rand(1, 3, 240, 16), model.encoder_reach, 4),
            (model.decode, torch.randn(1, 256, 60, 4), model.decoder_reach, 1)):
        x.requires_grad_()
        y = function(x)
        token = slice(30, 31) if rows == 4 else slice(120, 124)
        gradient, = torch.autograd.grad(y[:, :, token].sum(), x)
        seen = (gradient.abs().sum((0, 1, 3)) > 0).nonzero() // rows - 30
        assert seen.abs().max() <= reach and seen.abs().max() > reach / 2


@pytest.mark.parametrize("size", [(31, 32), (37, 32), (32, 33)])
def test_a_size_that_does_not_fit_the_indices(size):
    model = build().eval()
    decode = model.decode_from_indices
    indices = torch.zeros(1, 9, 8, dtype=torch.int64)
    assert decode(indices, size=(33, 29)).shape == decode(indices, size=[np.int64(33), 29]).shape == (1, 3, 33, 29)
    with pytest.raises(ValueError, match="size"):
        decode(indices, size=size)


def modules_that_learn(model, images):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    teacher_z = torch.randn(len(images), 256, 8, 8)
    z = model.encoder(images)
    z_q, loss, _ = model.quantize(z)
    (model.decode(z_q).sum() + loss + model.compute_prediction_loss(z_q, teacher_z)).backward()
    optimizer.step()
    return {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_set_stage():
    model = build("simvq", post_quant_kernel=1).train()
    images = torch.rand(2, 3, 32, 32)
    learned = {"adapter", "quantizer", "post_quant_conv", "decoder", "predictor"}
    model.set_stage(1)
    assert not model.encoder.training and model.decoder.training
    model.eval().train()
    assert not model.encoder.training  # train() leaves the frozen encoder in eval mode
    assert modules_that_learn(model, images) == learned
    model.set_stage(2)
    assert model.encoder.training
    assert modules_that_learn(model, images) == learned | {"encoder"}
    with pytest.raises(ValueError, match="stage"):
        model.set_stage(3)


def test_prediction_loss():
    model = build().eval()
    z_q, teacher_z = torch.randn(2, 256, 8, 8, requires_grad=True), torch.randn(2, 256, 8, 8)
    loss = model.compute_prediction_loss(z_q, teacher_z)
    assert torch.allclose(loss, (model.predict_features(z_q) - teacher_z).square().mean())
    means = (model.predict_features(z_q) - teacher_z).mean((2, 3)).square().mean()
    assert torch.allclose(model.compute_prediction_loss(z_q, teacher_z, 10.0), loss + 10 * means)
    loss.backward()
    assert z_q.grad.abs().sum() > 0


def test_codebook_usage_counted_by_hand():
    counts, usage, perplexity = build().get_codebook_usage(torch.tensor([[[0, 0], [3, 3]], [[7, 7], [239, 239]]]))
    assert counts.shape == (240,) and counts[[0, 3, 7, 239]].tolist() == [2, 2, 2, 2] and counts.sum() == 8
    assert usage == pytest.approx(4 / 240) and perplexity == pytest.approx(4)
    assert build().get_codebook_usage(torch.zeros(5, dtype=torch.long))[2] == pytest.approx(1)


def test_usage_of_several_codebooks_and_without_a_table_of_all_codes():
    model = build("ema_vq", SEVERAL | {"codebook_size": 4096, "codebooks": 5})
    digits = torch.tensor([[0, 4095, 0, 0, 9], [0, 1, 0, 0, 9], [0, 4095, 0, 0, 9], [5, 1, 0, 0, 9]])
    indices = model.quantizer.join_indices(digits)
    assert model.quantizer.codebook_size == 2**60 and indices.max() > 2**48
    counts, usage, perplexity = model.get_codebook_usage(indices)
    assert sorted(counts.tolist()) == [1, 1, 2] and usage == 3 / 2**60 and perplexity == pytest.approx(8**0.5)
    for codebook, (used, expected) in enumerate(((2, 4 / 27**0.25), (2, 2), (1, 1), (1, 1), (1, 1))):
        counts, usage, perplexity = model.get_codebook_usage(indices, codebook)
        assert counts.shape == (4096,) and usage == used / 4096 and perplexity == pytest.approx(expected)


@pytest.mark.parametrize("size", [32, 64, 256])
def test_discriminator_has_a_logit_per_patch(size):
    logits = PatchDiscriminator(size)(torch.rand(1, 3, size, size))
    assert logits.shape == (1, 1, 7, 7)


def test_a_vit_decoder_knows_where_its_tokens_are():
    torch.manual_seed(0)
    decoder, z, order = models.ViTDecoder(16, 1, 32, 2, 2).eval(), torch.randn(1, 16, 4, 4), torch.randperm(16)
    pixels, shuffled = decoder(z).flatten(2), decoder(z.flatten(2)[..., order].view(z.shape)).flatten(2)
    assert not torch.allclose(pixels[..., order], shuffled, atol=1e-3)  # a token for a pixel: nothing else tells
    for block in decoder.blocks:  # and only relative to each other: without attention, nowhere
        torch.nn.init.zeros_(block.attn.proj.weight)
    pixels, shuffled = decoder(z).flatten(2), decoder(z.flatten(2)[..., order].view(z.shape)).flatten(2)
    assert torch.allclose(pixels[..., order], shuffled, atol=1e-5)
