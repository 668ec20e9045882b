"""VQRAE: what it promises of images and indices, its stages, files and memory. Then its encoders and decoders."""
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import matplotlib.cbook
import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, SEED, refused
from safetensors.torch import load_file, save_file

import models
from data import load_image
from models import ENCODERS, PRETRAINED_DIR, VQRAE, PatchDiscriminator, build_encoder, in_strips, load_checkpoint
from quantizers import QUANTIZERS, InputError

TINY = {"depth": 3, "embed_dim": 32, "num_heads": 2}
OPTIONS = {"fsq": {"levels": [8, 6, 5]}, "simvq": {"codebook_size": 64}, "simvq_learned": {"codebook_size": 64},
           "ema_vq": {"codebook_size": 64, "code_dim": 8}, "ddcl": {},
           "residual_vq": {"codebook_size": 16, "code_dim": 8}}
WIDTHS = {"dinov2_s": 384, "dinov2_b": 768, "siglip_l": 1024, "siglip2_b": 768, "siglip2_so400m": 1152, "mae_b": 768,
          "dinov3_s": 384, "dinov3_b": 768, "eva02_base_patch14_224": 768, "vit_pe_core_base_patch16_224": 768,
          "efficientnet_lite0": 752, "dinov3_convnext_t": 2880, "resnet50": 4864}


def build(encoder="cifar", quantizer="fsq", **options):
    """A small VQRAE in eval mode, whose blocks do something: they start as the identity."""
    options = {"grid": 4 if encoder == "cnn" else 8, "decoder_width": 32, "decoder_depth": 1} | options
    model = VQRAE(encoder, quantizer, OPTIONS[quantizer], **options)
    model(torch.rand(3, 3, 32, 32))  # a training step, so that EMA-VQ has a codebook
    for name, parameter in model.named_parameters():
        if name.endswith("conv2.weight"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def save_vit(architecture, path, **options):
    """Save a small ViT of timm's, all its weights random, as its users do: config.json and model.safetensors."""
    model = timm.create_model(architecture, **TINY, **options).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    timm.models.save_for_hf(model, path, model_args=TINY | options, safe_serialization=True)
    return f"local-dir:{path}"


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    torch.manual_seed(SEED)
    return save_vit("vit_small_patch14_reg4_dinov2", tmp_path_factory.mktemp("vit"), img_size=32, patch_size=8)


@pytest.fixture(params=["cifar", "cnn", "vit"])
def encoder(request, vit):
    return vit if request.param == "vit" else request.param


def normalized(z, channels):
    return (z - z.mean(channels, keepdim=True)) / (z.var(channels, correction=0, keepdim=True) + 1e-5).sqrt()


def photograph(rows=slice(None), columns=slice(None)):
    return load_image(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))[..., rows, columns]


# Images and indices

@pytest.mark.parametrize("quantizer", OPTIONS)
def test_decoding_indices_is_the_forward_pass(quantizer):
    model, images = build(quantizer=quantizer), torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        reconstructions, loss, indices = model(images)
        assert reconstructions.shape == images.shape and indices.shape == (3, 8, 8) and loss.shape == ()
        assert len(indices.unique()) > 1
        assert torch.equal(model.encode_to_indices(images), indices)
        assert torch.equal(model.decode_from_indices(indices), reconstructions)
        assert torch.equal(model.features_from_indices(indices), model.encoder(reconstructions))
        z_q, _, _ = model.encode(images)
        assert torch.equal(z_q, model.quantizer(model.adapter(model.encoder(images)))[0])


def test_the_first_codebook_decodes_alone():
    model, indices = build(quantizer="residual_vq"), torch.randint(256, (2, 8, 8))
    for decode in (model.decode_from_indices, model.features_from_indices):
        assert torch.equal(decode(indices, depth=2), decode(indices))
        coarse = decode(indices, depth=1)
        assert not torch.equal(coarse, decode(indices))
        assert torch.equal(coarse, decode(indices % 16, depth=1))  # an index is i_1 + 16 i_2


@pytest.mark.parametrize("size", [(8, 8), (9, 15), (33, 30), (32, 128)])
def test_images_of_any_size_are_reflected_to_whole_tokens(encoder, size):
    model, images = build(encoder), torch.rand(2, 3, *size)
    n = model.token_size
    h, w = (math.ceil(side / n) for side in size)
    whole = F.pad(images, (0, w * n - size[1], 0, h * n - size[0]), mode="reflect")
    with torch.no_grad():
        reconstructions, _, indices = model(images)
    assert reconstructions.shape == images.shape and indices.shape == (2, h, w)
    assert torch.equal(model.encode_to_indices(whole), indices)
    assert torch.equal(model.decode_from_indices(indices, size=size), reconstructions)
    assert torch.equal(model.decode_from_indices(indices)[..., : size[0], : size[1]], reconstructions)
    for wrong in ((h * n + 1, w * n), (h * n, w * n - n)):
        with refused(f"size = .* does not fit {h} x {w} tokens"):
            model.decode_from_indices(indices, size=wrong)


@pytest.mark.parametrize("images", [torch.rand(1, 3, 3, 32), torch.rand(1, 1, 32, 32), torch.rand(3, 32, 32),
                                    torch.rand(1, 3, 32, 32) + 0.5, torch.rand(1, 3, 32, 32) - 0.5,
                                    torch.full((1, 3, 32, 32), math.nan), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)])
def test_refused_images(images):
    model = build()
    for function in (model, model.encode_to_indices):
        with refused("[Ii]mages "):
            function(images)


def test_indices_as_lists_and_arrays_and_of_other_shapes():
    model, grid = build(), torch.arange(64).view(1, 8, 8)
    shapes = one_image, flat = grid[0], grid.view(1, 64).numpy()
    for method, given, wrong_shapes in (
            (model.decode_from_indices, grid, shapes), (model.features_from_indices, grid, shapes),
            (model.get_codebook_usage, one_image, []), (model.quantizer.get_codebook_entry, grid.flatten(), [flat])):
        for same in (given.tolist(), given.numpy().astype(np.uint16)):
            assert torch.equal(method(same)[0], method(given)[0])
        for wrong in (*wrong_shapes, given + 177, (given - 1).tolist(), given / 2):  # 240 codes
            with refused("indices "):
                method(wrong)


def test_indices_need_eval_mode():
    with refused(r"Call model.eval\(\)"):
        build().train().encode_to_indices(torch.rand(1, 3, 32, 32))


def test_codebook_usage_by_hand():
    counts, usage, perplexity = build().get_codebook_usage(torch.tensor([[[0, 0], [3, 3]], [[7, 7], [239, 0]]]))
    assert counts.shape == (240,) and counts[[0, 3, 7, 239]].tolist() == [3, 2, 2, 1] and counts.sum() == 8
    assert usage == 4 / 240 and perplexity == pytest.approx(math.prod((8 / n) ** (n / 8) for n in (3, 2, 2, 1)))


def test_codebook_usage_of_more_codes_than_can_be_counted():
    model = VQRAE("cifar", "residual_vq", {"codebook_size": 4096, "codebooks": 5}, pretrained=False)
    counts, usage, perplexity = model.get_codebook_usage(torch.tensor([7, 2**59, 7, 0]))
    assert sorted(counts.tolist()) == [1, 1, 2] and usage == 3 / 2**60 and perplexity == pytest.approx(8**0.5)


# Large images and many images

@pytest.mark.parametrize("shape", [(1, 171, 3), (60, 3, 3)], ids=["large", "many"])
def test_large_and_many_images_are_processed_in_parts(shape, encoder, monkeypatch):
    """Each part is bounded, and results are the whole's. A ViT's tokens see all of an image, which is then one part."""
    (count, h, w), sizes = shape, []
    model = build(encoder, decoder_depth=2, post_quant_kernel=3)
    images = torch.rand(count, 3, h * model.token_size - 2, w * model.token_size)
    with torch.no_grad():
        indices = model.encode(images)[2]
        whole = model.decode(model.quantizer.indices_to_codes(indices))
        z = model.encoder(whole)
    model.encoder.register_forward_hook(lambda module, x, z: sizes.append(z[:, 0].numel()))
    model.decoder.register_forward_hook(lambda module, z, y: sizes.append(z[0][:, 0].numel()))
    monkeypatch.setattr(in_strips, "__defaults__", (100,))
    assert (model.encode_to_indices(images) == indices).float().mean() > 0.99  # rounding may decide between codes
    assert torch.allclose(model.decode_from_indices(indices), whole, atol=1e-4)
    assert torch.allclose(model.features_from_indices(indices), z, atol=1e-3)
    if count > 1:
        assert max(sizes) <= 100
    elif model.encoder_radius:  # a strip has 4 radii of rows at least, and one above and one below
        assert max(sizes) <= 6 * model.encoder_radius * w < h * w


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


# Stages and losses

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
    with refused("stage = 3"):
        model.set_stage(3)


def test_stage_2_keeps_the_statistics_of_batchnorm():
    model, images = build("efficientnet_lite0", encoder_layers=2), torch.rand(2, 3, 32, 32)
    z = model.set_stage(2).train().encoder(images)
    assert torch.equal(model.encoder(images), z) and torch.equal(model.eval().encoder(images), z)
    assert torch.allclose(build_encoder("efficientnet_lite0", 4, 2)(images), z, atol=1e-4)


def test_distillation_loss():
    z, teacher_z = torch.randn(2, 2, 256, 4, 4).requires_grad_()
    distill = build().compute_distillation_loss(z, teacher_z)
    assert torch.allclose(distill, (z - teacher_z).square().mean())
    gradients = torch.autograd.grad(distill, (z, teacher_z), allow_unused=True)
    assert torch.allclose(gradients[0], 2 * (z - teacher_z) / z.numel()) and gradients[1] is None


@pytest.mark.parametrize("kernel, norm", [(0, False), (1, False), (3, False), (0, True), (3, True)])
def test_post_quant_conv_and_norm(kernel, norm):
    model, z_q = build(post_quant_kernel=kernel, post_quant_norm=norm), torch.randn(1, 256, 3, 4)
    assert [tuple(p.shape) for p in model.post_quant_conv.parameters()] == ([(256, 256, kernel, kernel), (256,)]
                                                                            if kernel else [])
    z = model.post_quant_conv(z_q)
    expected = model.decoder(normalized(z, 1) if norm else z).clamp(0, 1)
    assert torch.allclose(model.decode(z_q), expected, atol=1e-3)


def test_decode_clamps_in_eval_mode_alone():
    model, z_q = build(), torch.randn(1, 256, 8, 8)
    model.decoder.head.weight.data *= 20  # far out of range
    images = model.train().decode(z_q)
    assert images.min() < 0 and images.max() > 1 and torch.equal(model.eval().decode(z_q), images.clamp(0, 1))


@pytest.mark.parametrize("options", [
    {"encoder": "dinov2s"}, {"encoder": "xcit_nano_12_p16_224"}, {"encoder": "mixer_s16_224"},
    {"encoder": "vit_small_patch16_18x2_224"}, {"encoder": "resnet18", "encoder_layers": 6},
    {"encoder": "vit_tiny_patch16_224", "encoder_layers": 13}, {"grid": 5}, {"grid": 0}, {"post_quant_kernel": 2},
    {"image_size": 48}, {"encoder": "vit_tiny_patch16_224", "decoder_width": 100}], ids=str)
def test_refused_options(options):
    with refused("^[^\n]+ = [^\n]+, allowed: "):
        VQRAE(**options, pretrained=False)


# Files

@pytest.fixture
def hub(monkeypatch):
    """A stand-in of huggingface.co: the folder hub/."""
    def upload_folder(self, *, repo_id, folder_path, **options):
        shutil.copytree(folder_path, Path("hub", repo_id))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, **options: SimpleNamespace(**options))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download",
                        lambda *, repo_id, filename, **options: str(Path("hub", repo_id, filename)))


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_a_model_travels_by_the_hub_with_its_stage_and_constants(way, hub):
    model, images = build().set_stage(2), torch.rand(1, 3, 32, 32)
    model.constants = {"SEED": 3, "DATASET": "shapes"}
    if way == "push_to_hub":
        model.push_to_hub("me/model", private=True)
    else:
        model.save_pretrained("saved", push_to_hub=True, repo_id="me/model")
    again = VQRAE.from_pretrained("me/model")
    assert (again.stage, again.constants, again.config) == (2, model.constants, model.config)
    assert torch.equal(again(images)[0], model(images)[0]) and not again.training


def test_config_builds_the_model_again(encoder):
    model = build(encoder, post_quant_norm=True, encoder_layers=2, decoder_width=0, decoder_depth=0)
    again = VQRAE(**json.loads(json.dumps(model.config)), pretrained=False).eval()
    again.load_state_dict(model.state_dict())
    images = torch.rand(1, 3, 32, 32)
    assert again.config == model.config and torch.equal(again(images)[0], model(images)[0])
    assert model.config["decoder_width"] == (192 if encoder in ("cifar", "cnn") else 32)


def test_a_model_whose_encoder_is_elsewhere_says_what_it_needs(monkeypatch):
    """timm builds such an encoder from its folder or from the hub, although the checkpoint holds its weights."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = build(save_vit("vit_small_patch14_dinov2", "vit", img_size=32, patch_size=8))
    for name in ("local-dir:vit", "hf-hub:me/vit"):
        model.arguments["encoder"] = name
        models.save_checkpoint("model.pt", model)
        model.save_pretrained("saved")
        shutil.rmtree("vit", ignore_errors=True)
        for load, path in ((load_checkpoint, "model.pt"), (VQRAE.from_pretrained, "saved")):
            with refused(f"{path} .*{name} does not load. Its folder, or a connection to the hub, is needed"):
                load(path)


@pytest.fixture
def sign(monkeypatch):
    """README's quantizer of one's own, registered as "sign"."""
    monkeypatch.setitem(QUANTIZERS, "sign", None)  # so that it is gone after the test
    blocks, names = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL), {}
    exec(next(block for block in blocks if "class Sign" in block), names)
    return names["Sign"]


def test_a_quantizer_of_ones_own_is_saved_and_loaded(sign, monkeypatch):
    model, images = build(), torch.rand(2, 3, 32, 32)
    model.quantizer = sign(256, bits=6).eval()
    models.save_checkpoint("sign.pt", model)
    again = load_checkpoint("sign.pt")
    assert torch.equal(again.encode_to_indices(images), model.encode_to_indices(images))
    assert isinstance(again.quantizer, sign) and again.quantizer.codebook_size == 2**6

    monkeypatch.delitem(QUANTIZERS, "sign")
    with refused(r"quantizer = 'sign', allowed: .*QUANTIZERS\['sign'\] = "):
        load_checkpoint("sign.pt")
    model.quantizer = sign(256)
    with refused("quantizer = 'Sign', allowed: "):
        models.save_checkpoint("lost.pt", model)
    assert not Path("lost.pt").exists()


def test_a_mistake_in_ones_own_quantizer_is_no_input_error(sign):
    """The scripts print an InputError in one line. This error keeps its traceback."""
    model = build()
    model.quantizer = sign(256).eval()
    model.quantizer.quantize = lambda x: (x, x.new_zeros(()))  # without indices
    with pytest.raises(ValueError, match="not enough values to unpack") as caught:
        model.encode_to_indices(torch.rand(1, 3, 32, 32))
    assert not isinstance(caught.value, InputError)


def test_files_with_a_predictor_of_older_code_load():
    model = build()
    weights = model.state_dict() | {"predictor.0.conv1.weight": torch.zeros(64, 256, 3, 3)}
    model.load_state_dict(weights)
    with pytest.raises(RuntimeError, match="predicted"):
        model.load_state_dict(weights | {"predicted.weight": torch.zeros(1)})


@pytest.mark.parametrize("name, least", [("ema_vq", 30.4), ("fsq", 29.8), ("simvq", 29.7)])
def test_shipped_models_know_a_photograph(name, least):
    """Its pixels and its features: any change of a shipped layer's meaning shows here."""
    model, images = load_checkpoint(PRETRAINED_DIR / f"vqrae_{name}.pt"), photograph(slice(100, 228), slice(200, 328))
    indices = model.encode_to_indices(images)
    assert -10 * F.mse_loss(model.decode_from_indices(indices), images).log10() > least
    with torch.no_grad():
        z = model.encoder(images)
    assert F.mse_loss(model.features_from_indices(indices), z) < 0.2 * z.var()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_nearly_all_indices(dtype):
    """Rounding by a share of eps moves a token into another cell with a probability of a few dozen eps."""
    path, images = PRETRAINED_DIR / "vqrae_fsq.pt", photograph(slice(100, 228), slice(200, 328))
    model, half = load_checkpoint(path), load_checkpoint(path).to(dtype)
    with torch.no_grad():
        expected, _, expected_indices = model(images)
        reconstructions, _, indices = half(images.to(dtype))
    assert (indices != expected_indices).float().mean() < 30 * torch.finfo(dtype).eps
    decibels = [-10 * F.mse_loss(x, images).log10() for x in (reconstructions, expected)]
    assert abs(decibels[0] - decibels[1]) < 0.2
    assert torch.equal(half.encode_to_indices(images), indices)
    assert torch.equal(half.decode_from_indices(indices), reconstructions)
    assert reconstructions.dtype == half.features_from_indices(indices).dtype == torch.float32


def check_export(program, session, method, x):
    """torch.export and ONNX Runtime compute what the method computes, in another order, which rounds otherwise."""
    output, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = method(x)
    for result in (program.module()(x), torch.from_numpy(output)):
        assert result.dtype == expected.dtype and result.shape == expected.shape
        assert ((result - expected).abs() < 1e-4).float().mean() > 0.99


@pytest.mark.parametrize("name", ["fsq", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ema_vq", "simvq"))])
@pytest.mark.skipif(torch.__version__ < "2.14", reason="older versions export pooling of even sizes alone")
@pytest.mark.filterwarnings("ignore")
def test_the_export_in_the_settings_takes_other_sizes(name):
    block = re.search(r"## Export.*?```\w*\n(.*?)```", (ROOT / "docs/SETTINGS.md").read_text("utf-8"), re.DOTALL)[1]
    model = load_checkpoint(PRETRAINED_DIR / f"vqrae_{name}.pt")
    names = {"model": model, "torch": torch, "onnxruntime": onnxruntime}
    exec(block, names)
    check_export(names["program"], names["session"], model.encode_to_indices, torch.rand(1, 3, 285, 17))

    model.forward, indices = model.decode_from_indices, torch.arange(160).view(2, 8, 10)
    axes = dict.fromkeys((0, 1, 2), torch.export.Dim.DYNAMIC)
    program = torch.export.export(model, (indices,), dynamic_shapes=(axes,))
    torch.onnx.export(program, (indices,), "decode.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession("decode.onnx")
    check_export(program, session, model.decode_from_indices, torch.arange(120).view(1, 40, 3))


# Encoders

def test_shipped_encoder_gives_normalised_features_of_tokens_of_any_size():
    encoder, images = build_encoder("cifar", 4), torch.rand(2, 3, 64, 50)
    weights = torch.load(PRETRAINED_DIR / "cifar_encoder.pt", weights_only=True)
    assert all(torch.equal(w, weights[name]) for name, w in encoder.state_dict().items())
    z = encoder(images)
    assert z.shape == (2, 256, 16, 13) and torch.allclose(normalized(z, 1), z, atol=1e-3)
    resized = F.interpolate(F.pad(images, (0, 6, 0, 0), "reflect"), (32, 28), mode="bicubic", antialias=True)
    assert torch.allclose(build_encoder("cifar", 8)(images), encoder(resized.clamp(0, 1)), atol=1e-5)


@pytest.mark.parametrize("architecture, layers", [("plain", 1), ("plain", 2), ("plain", 0), ("dinov3", 0)])
def test_vit_features_are_the_normalised_sum_of_normalised_layers(architecture, layers, vit):
    """Patch tokens of its last layers, without class and register tokens, and without the final norm's own weights."""
    if architecture == "dinov3":  # with rotary positions
        vit = save_vit("vit_small_patch16_dinov3", "dinov3", img_size=32, patch_size=8)
    encoder, images = build_encoder(vit, 4, layers).eval(), torch.rand(2, 3, 32, 32)
    source, outputs = timm.create_model(vit, pretrained=True, img_size=64).eval(), []
    for block in source.blocks:
        block.register_forward_hook(lambda module, arguments, output: outputs.append(output[:, 5:]))
    pixels = F.interpolate(images, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)  # patches of 8 for tokens of 4
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]  # DINOv2's
    with torch.no_grad():
        source((pixels - mean) / std)
        z, last = encoder(images, with_last=True)
    expected = normalized(sum(normalized(output, -1) for output in outputs[-layers:]), -1)
    assert z.shape == (2, 32, 8, 8) and torch.allclose(z.flatten(2).mT, expected, atol=1e-3)
    assert torch.allclose(last.flatten(2).mT, normalized(outputs[-1], -1), atol=1e-3)
    assert torch.equal(encoder(images), z)


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
    assert torch.allclose(z, torch.cat(expected, 1)[..., :3, :5], atol=1e-3) and z.shape[1] == encoder.dim
    assert encoder(torch.rand(1, 3, 16, 16)).shape == (1, encoder.dim, 1, 1)


def test_efficientnet_of_its_pip_package_knows_a_photograph():
    network = models.load_network(ENCODERS["efficientnet_lite0"], pretrained=True).eval()
    image = F.interpolate(photograph(), (224, 224), mode="bicubic", antialias=True)
    logits = network((image - network.mean) / network.std)
    assert logits.argmax() == 652  # "military uniform"


@pytest.mark.parametrize("name", WIDTHS)
def test_each_encoder_by_its_name(name):
    """On the meta device, on which train.py builds a first model."""
    with torch.device("meta"):
        model = VQRAE(name, "simvq", {"codebook_size": 64, "code_dim": 0}, 256, 16, 0, pretrained=False)
        assert model.encoder(torch.empty(2, 3, 32, 48)).shape == (2, WIDTHS[name], 2, 3)
    assert model.quantizer.code_dim == WIDTHS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDTHS)
def test_each_encoder_learns_at_its_true_size(name):
    """A ViT with a decoder as large as itself; 10 GB of memory at most."""
    assert {*ENCODERS} <= {*WIDTHS}
    learn_both_stages(VQRAE(name, "simvq", {"codebook_size": 16384, "code_dim": 0}, 256, 16, 0, pretrained=False))


@pytest.mark.parametrize("change", ["removed", "renamed", "reshaped", "cut"])
@pytest.mark.parametrize("name", ["dinov2_s", "siglip2_b"])
def test_weights_that_do_not_fit_are_refused(name, change):
    key, file = "blocks.1.mlp.fc1.weight", Path("vit/model.safetensors")
    save_vit(ENCODERS[name].split(".")[0], "vit", img_size=32, patch_size=8)
    state = load_file(file)
    weight = state.pop(key)
    save_file(state | {"renamed": {"fc3": weight}, "reshaped": {key: weight[1:].clone()}}.get(change, {}), file)
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(OSError, match=r"^The encoder local-dir:vit does not load[^\n]*$"):
        build_encoder("local-dir:vit", 4)


@pytest.mark.parametrize("name", ["dinov2_s", "efficientnet_lite0"])
def test_weights_that_cannot_be_downloaded(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "empty")
    monkeypatch.setattr(models, "find_spec", lambda package: None)
    with pytest.raises(OSError, match=rf"^The encoder {ENCODERS[name]} does not load.*ENCODER=cifar[^\n]*$"):
        build_encoder(name, 4)


def test_a_damaged_encoder_is_refused(monkeypatch):
    content = bytearray((PRETRAINED_DIR / "cifar_encoder.pt").read_bytes())
    content[len(content) // 2] ^= 1
    Path("cifar_encoder.pt").write_bytes(content)
    monkeypatch.setattr(models, "PRETRAINED_DIR", Path())
    with pytest.raises(OSError, match=r"cifar_encoder.pt do not load: [^\n]*checksum[^\n]*$"):
        build_encoder("cifar", 4)


def test_importing_the_project_changes_no_setting_of_the_user():
    settings = "(dict(os.environ), socket.getdefaulttimeout(), timm.layers.use_fused_attn())"
    code = f"import os, socket, timm, torch; old = {settings}; import train, extras.generate; assert old == {settings}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Decoders and the discriminator

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
