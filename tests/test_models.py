import copy
import json

import pytest
import timm
import torch
import torch.nn.functional as F

import models
from models import PRETRAINED_DIR, VQRAE, ConvEncoder, PatchDiscriminator, TimmEncoder, build_encoder
from quantizers import QUANTIZERS

OPTIONS = {"fsq": {"levels": [8, 6, 5]}, "simvq": {"codebook_size": 256, "code_dim": 8},
           "ema_vq": {"codebook_size": 64, "code_dim": 8}, "ddcl": {}}


def build(quantizer="fsq", **options):
    options = {"decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2} | options
    return VQRAE("cifar", quantizer, OPTIONS[quantizer], **options)


# ---------------------------------------------------------------------------------------------------------------------
# Encoders


def test_shipped_encoder():
    file = PRETRAINED_DIR / "cifar_encoder.pt"
    assert file.stat().st_size < 12e6
    torch.load(file, weights_only=True)
    recipe = json.loads(file.with_suffix(".json").read_text())
    assert recipe["DATASET"] and recipe["linear_probe_accuracy"] > 0.85
    z = build_encoder("cifar", 8)(torch.rand(2, 3, 32, 32))
    assert z.shape == (2, 256, 8, 8)
    assert z.mean(1).abs().max() < 1e-5 and (z.var(1, correction=0) - 1).abs().max() < 1e-3
    assert build_encoder("cifar", 8)(torch.rand(2, 3, 64, 50)).shape == (2, 256, 8, 8)  # resized to its input


def test_folding_the_norms_changes_nothing():
    encoder = ConvEncoder(fused=False)
    encoder(torch.rand(64, 3, 32, 32))  # sets running statistics
    encoder.eval()
    images = torch.rand(4, 3, 32, 32)
    expected = encoder(images)
    fused = copy.deepcopy(encoder).fuse()
    assert torch.allclose(fused(images), expected, atol=1e-4)
    assert ConvEncoder().state_dict().keys() == fused.state_dict().keys()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_224.mae", "vit_base_patch16_siglip_256.v2_webli",
                                  "vit_small_patch14_reg4_dinov2.lvd142m"])
def test_timm_features_are_the_last_blocks_patch_tokens(name, monkeypatch):
    # a stand-in two blocks deep of each family, its weights random: the very blocks, followed by layer_norm
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, **kwargs, depth=2))
    encoder = TimmEncoder(name, grid=4, pretrained=False).eval()
    images = torch.rand(2, 3, 32, 32)
    x = F.interpolate(images, (encoder.size,) * 2, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    vit = encoder.vit
    tokens = vit._pos_embed(vit.patch_embed((x - encoder.mean) / encoder.std))[:, :]
    for block in vit.blocks:
        tokens = block(vit.norm_pre(tokens) if block is vit.blocks[0] else tokens)
    expected = F.layer_norm(tokens[:, -16:], tokens.shape[-1:])
    z = encoder(images)
    assert z.shape == (2, encoder.dim, 4, 4) and not list(vit.norm.parameters())
    assert torch.allclose(z.flatten(2).transpose(1, 2), expected, atol=1e-4)


def test_decoder_follows_a_vit_encoder():
    model = VQRAE("vit_tiny_patch16_224", "fsq", OPTIONS["fsq"], image_size=32, grid=4, pretrained=False)
    assert model.decoder.position.shape == (16, 192) and len(model.decoder.blocks) == 12
    assert model.decoder.blocks[0].attn.num_heads == 3
    assert model(torch.rand(1, 3, 32, 32))[0].shape == (1, 3, 32, 32)


def test_unknown_encoder_names_the_nearest():
    with pytest.raises(ValueError, match="nearest: dinov2_s"):
        build_encoder("dinov2s", 8)
    for name in ("resnet50", "levit_128", "samvit_base_patch16", "vit_small_patch16_18x2_224"):
        with pytest.raises(ValueError, match="ENCODER"):
            build_encoder(name, 8, pretrained=False)


def test_weights_out_of_reach(monkeypatch):
    monkeypatch.setattr(models, "reachable", lambda url: False)
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *args: None)
    with pytest.raises(RuntimeError, match='vit_small_patch14_dinov2.*ENCODER = "cifar"'):
        build_encoder("dinov2_s", 8)


# ---------------------------------------------------------------------------------------------------------------------
# VQRAE


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_decoding_indices_is_the_forward_pass(quantizer):
    model = build(quantizer)
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


@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_post_quant_conv(kernel):
    model = build(post_quant_kernel=kernel).eval()
    assert sum(p.numel() for p in model.post_quant_conv.parameters()) == (kernel**2 * 256 * 256 + 256 if kernel else 0)
    z_q = torch.randn(1, 256, 8, 8)
    expected = model.decoder(model.post_quant_conv(z_q)).clamp(0, 1)
    assert torch.equal(model.decode(z_q), expected)
    with pytest.raises(ValueError, match="POST_QUANT_KERNEL"):
        build(post_quant_kernel=2)


def test_normalization_is_of_the_features_and_in_the_checkpoint():
    model = build(normalize=True).eval()
    z = torch.randn(50, 256, 8, 8) * torch.linspace(0.5, 3, 256).view(-1, 1, 1) + 2
    model.set_normalization(z)
    normalized = (z - model.feature_mean) / model.feature_std
    assert normalized.mean((0, 2, 3)).abs().max() < 1e-4 and (normalized.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert torch.equal(model.decode(z), model.decoder(normalized).clamp(0, 1))
    assert {"feature_mean", "feature_std"} <= model.state_dict().keys()


def parts_that_learn(model, images):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    teacher_z = torch.randn(len(images), 256, 8, 8)
    z = model.encoder(images)
    z_q, loss, _ = model.quantize(z)
    (model.decode(z_q).sum() + loss + sum(model.compute_distillation_loss(z, z_q, teacher_z))).backward()
    optimizer.step()
    return {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_set_stage():
    model = build("simvq", post_quant_kernel=1).train()
    images = torch.rand(2, 3, 32, 32)
    learned = {"adapter", "quantizer", "post_quant_conv", "decoder", "predictor"}
    model.set_stage(1)
    assert not model.encoder.training and model.decoder.training
    model.eval().train()
    assert not model.encoder.training  # train() does not wake the frozen encoder
    assert parts_that_learn(model, images) == learned
    model.set_stage(2)
    assert model.encoder.training
    assert parts_that_learn(model, images) == learned | {"encoder"}
    with pytest.raises(ValueError, match="stage"):
        model.set_stage(3)


def test_distillation_loss():
    model = build().eval()
    z, z_q, teacher_z = (torch.randn(2, 256, 8, 8, requires_grad=True) for _ in range(3))
    kept, predicted = model.compute_distillation_loss(z, z_q, teacher_z.detach())
    assert torch.allclose(kept, (z - teacher_z).square().mean())  # the features before the quantizer
    assert torch.allclose(predicted, (model.predict_features(z_q) - teacher_z).square().mean())
    kept.backward()
    assert torch.allclose(z.grad, 2 * (z - teacher_z).detach() / z.numel()) and z_q.grad is None
    predicted.backward()
    assert z_q.grad.abs().sum() > 0
    assert model.compute_distillation_loss(z, z_q, z)[0] == 0  # stage 1: the encoder is the teacher


def test_codebook_usage_counted_by_hand():
    counts, usage, perplexity = build().get_codebook_usage(torch.tensor([[[0, 0], [3, 3]], [[7, 7], [239, 239]]]))
    assert counts.shape == (240,) and counts[[0, 3, 7, 239]].tolist() == [2, 2, 2, 2] and counts.sum() == 8
    assert usage == pytest.approx(4 / 240) and perplexity == pytest.approx(4)
    assert build().get_codebook_usage(torch.zeros(5, dtype=torch.long))[2] == pytest.approx(1)


@pytest.mark.parametrize("images, message", [
    (torch.rand(3, 32, 32), "shape"), (torch.rand(1, 1, 32, 32), "shape"), (torch.rand(1, 3, 32, 32) * 255, r"\[0, 1\]"),
    (torch.rand(1, 3, 32, 32) - 0.5, r"\[0, 1\]"), (torch.full((1, 3, 32, 32), float("nan")), "nan"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "type"),
])
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        build()(images)


def test_bad_shapes():
    with pytest.raises(ValueError, match="GRID"):
        build(grid=5)
    with pytest.raises(ValueError, match="DECODER_HEADS"):
        build(decoder_heads=5)
    for z_q in (torch.rand(1, 255, 8, 8), torch.rand(1, 256, 4, 4), torch.rand(256, 8, 8)):
        with pytest.raises(ValueError, match="z_q"):
            build().decode(z_q)
    with pytest.raises(ValueError, match="z_q"):
        build().decode_from_indices(torch.zeros(1, 4, 4, dtype=torch.long))


@pytest.mark.parametrize("size", [32, 64, 256])
def test_discriminator_judges_patches(size):
    logits = PatchDiscriminator(size)(torch.rand(1, 3, size, size))
    assert logits.shape == (1, 1, 7, 7)
