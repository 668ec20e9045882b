"""VQRAE: images and indices, stages, files and memory. Then its encoders and decoders."""
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import matplotlib.cbook
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, SEED, refused
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import models
from data import load_image
from models import ENCODERS, PRETRAINED_DIR, VQRAE, PatchDiscriminator, build_encoder, in_strips, load_checkpoint
from quantizers import FSQ, QUANTIZERS, InputError, build_quantizer
from utils import psnr

SETTINGS = (ROOT / "docs/SETTINGS.md").read_text("utf-8")
OPTIONS = {"fsq": {"levels": [8, 6, 5]}, "simvq": {"codebook_size": 240}, "simvq_matched": {"codebook_size": 240},
           "ema_vq": {"codebook_size": 240, "code_dim": 8}, "residual_vq": {"codebook_size": 16, "code_dim": 8}}


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
    """Save a small random ViT of timm's: config.json and model.safetensors."""
    options |= {"depth": 3, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8}
    model = timm.create_model(architecture, **options)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    timm.models.save_for_hf(model, path, model_args=options, safe_serialization=True)
    return f"local-dir:{path}"


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    torch.manual_seed(SEED)
    return save_vit("vit_small_patch14_reg4_dinov2", tmp_path_factory.mktemp("vit"))


@pytest.fixture(params=["cifar", "cnn", "vit"])
def encoder(request, vit):
    return vit if request.param == "vit" else request.param


@pytest.fixture
def photograph():
    return load_image(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


def normalized(z, channels):
    return (z - z.mean(channels, keepdim=True)) / (z.var(channels, correction=0, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("quantizer", OPTIONS)
@torch.no_grad()
def test_decoding_indices_is_the_forward_pass(quantizer):
    model, images = build(quantizer=quantizer), torch.rand(3, 3, 32, 32)
    reconstructions, _, indices = model(images)
    assert len(indices.unique()) > 1 and torch.equal(model.encode_to_indices(images), indices)
    assert torch.equal(model.decode_from_indices(indices), reconstructions)
    assert torch.equal(model.features_from_indices(indices), model.encoder(reconstructions))
    assert torch.equal(model.encode(images)[0], model.quantizer(model.adapter(model.encoder(images)))[0])
    if quantizer == "residual_vq":  # an index is i_1 + 16 i_2, and the first codebook decodes alone
        for decode in (model.decode_from_indices, model.features_from_indices):
            assert torch.equal(decode(indices, depth=1), decode(indices % 16, depth=1))


@pytest.mark.parametrize("size", [(8, 8), (9, 15), (32, 128)])
@torch.no_grad()
def test_images_of_any_size_are_reflected_to_whole_tokens(encoder, size):
    model, images = build(encoder), torch.rand(2, 3, *size)
    n = model.token_size
    h, w = (math.ceil(side / n) for side in size)
    whole = F.pad(images, (0, w * n - size[1], 0, h * n - size[0]), mode="reflect")
    reconstructions, _, indices = model(images)
    assert reconstructions.shape == images.shape and indices.shape == (2, h, w)
    assert torch.equal(model.encode_to_indices(whole), indices)
    assert torch.equal(model.decode_from_indices(indices, size=size), reconstructions)
    for wrong in ((h * n + 1, w * n), (h * n, w * n - n)):
        with refused(f"size = .* does not fit {h} x {w} tokens"):
            model.decode_from_indices(indices, size=wrong)


def test_images_of_another_shape_range_or_type_are_refused():
    image, model = torch.ones(1, 3, 32, 32), build()
    for images in (image[:, :, :3], image[:, :1], image[0], image * 1.5, image * math.nan, image.byte(), image.numpy()):
        with refused("[Ii]mages "):
            model.encode_to_indices(images)


def test_encoding_in_train_mode_is_as_in_eval_mode_and_leaves_all_modes_as_they_were():
    model, images = build(quantizer="ema_vq"), torch.rand(2, 3, 32, 32)
    expected, codebook = model.encode_to_indices(images), model.quantizer.codebook.clone()
    for part in (model.train().decoder, model.quantizer, model.encoder):  # one more module has a mode of its own
        part.train(not part.training)
        modes = [module.training for module in model.modules()]
        assert torch.equal(model.encode_to_indices(images), expected)
        with refused("The values of images"):
            model.encode_to_indices(images + 1)
        assert [module.training for module in model.modules()] == modes and True in modes
    assert torch.equal(model.quantizer.codebook, codebook)


@pytest.mark.parametrize("method", ["decode_from_indices", "features_from_indices", "get_codebook_usage"])
def test_indices_may_be_lists_and_arrays_of_a_batch_of_grids(method):
    function, grid = getattr(build(), method), torch.arange(64).view(1, 8, 8)
    for same in (grid.tolist(), grid.numpy().astype(np.uint16)):
        assert torch.equal(function(same)[0], function(grid)[0])
    for wrong in (grid + 177, grid / 2, grid[0] - 1):  # of 240 codes
        with refused("indices "):
            function(wrong)


@pytest.mark.parametrize("levels, size, counted", [([8, 6, 5], 240, 240), ([64] * 10, 2**60, 4)])
def test_codebook_usage_by_hand(levels, size, counted):
    model = VQRAE("cifar", "fsq", {"levels": levels}, pretrained=False)
    counts, usage, perplexity = model.get_codebook_usage([[0, 0, 3, 3], [7, 7, size - 1, 0]])
    assert sorted(counts[counts > 0].tolist()) == [1, 2, 2, 3] and len(counts) == counted
    assert usage == 4 / size and perplexity == pytest.approx(8 / (3**3 * 2**2 * 2**2) ** (1 / 8))
    with refused("get_codebook_usage needs indices"):
        model.get_codebook_usage()
    expected = model.get_codebook_usage(model.encode_to_indices(torch.rand(1, 3, 9, 8)))
    assert torch.equal(expected[0], model.get_codebook_usage()[0])  # without indices, those of the last images


@pytest.mark.parametrize("shape", [(1, 171, 3), (60, 3, 3)], ids=["large", "many"])
def test_large_and_many_images_are_processed_in_parts(shape, encoder, monkeypatch):
    (count, h, w), sizes, model = shape, [], build(encoder, decoder_depth=2, post_quant_kernel=3)
    images = torch.rand(count, 3, h * model.token_size - 2, w * model.token_size)
    indices = model.encode_to_indices(images)
    decoded, z = model.decode_from_indices(indices), model.features_from_indices(indices)
    model.encoder.register_forward_hook(lambda module, x, z: sizes.append(z[:, 0].numel()))
    model.decoder.register_forward_hook(lambda module, z, y: sizes.append(z[0][:, 0].numel()))
    monkeypatch.setattr(in_strips, "__defaults__", (100,))
    assert (model.encode_to_indices(images) == indices).float().mean() > 0.99  # rounding decides the others
    torch.testing.assert_close(model.decode_from_indices(indices), decoded, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.features_from_indices(indices), z, rtol=0, atol=1e-3)
    if count > 1:
        assert max(sizes) <= 100
    elif model.encoder_radius < math.inf:  # a strip has 4 radii of rows at least
        assert max(sizes) <= 6 * model.encoder_radius * w < h * w


@pytest.mark.parametrize("name", ["cifar", "cnn"])
def test_no_token_sees_beyond_the_radius(name):
    model = build(name)
    images = torch.rand(1, 3, 41 * model.token_size, model.token_size, requires_grad=True)
    for row in (20, 21):  # the deepest grid is half as fine
        z = model.adapter(model.encoder(images))[:, :, row].sum()
        seen = torch.autograd.grad(z, images)[0].unflatten(2, (41, -1)).abs().sum((0, 1, 3, 4)).nonzero()
        assert (seen - row).abs().max() <= model.encoder_radius


@pytest.mark.parametrize("name", ["cifar", "cnn", "resnet18", "random positions"])
def test_an_encoder_learns_by_its_stage_and_gives_the_same_features_in_train_mode(name):
    """timm's BatchNorm would learn statistics, and some ViTs draw random positions."""
    if name == "random positions":
        name = save_vit("vit_small_patch16_dinov3", "vit", rope_rescale_coords=2.0)
    model, images = VQRAE(name, "fsq", grid=2, pretrained=False).eval(), torch.rand(2, 3, 32, 32)
    z = model.encoder(images)
    for stage in (1, 2, 1):
        assert model.set_stage(stage).stage == stage and torch.equal(model.train().encoder(images), z)
        assert {p.requires_grad for p in model.encoder.parameters()} == {stage == 2 or name == "cnn"}


@pytest.mark.parametrize("kernel, norm", [(0, False), (3, False), (0, True), (3, True)])
def test_decoding_is_a_conv_a_norm_the_decoder_and_in_eval_mode_a_clamp(kernel, norm):
    model, z_q = build(post_quant_kernel=kernel, post_quant_norm=norm), torch.randn(1, 256, 3, 4)
    model.decoder.head.weight.data *= 20  # far out of range
    z = model.post_quant_conv(z_q)
    assert torch.equal(z, z_q) == (kernel == 0)
    expected = model.decoder(normalized(z, 1) if norm else z)
    assert expected.min() < 0 and expected.max() > 1
    assert torch.allclose(model.decode(z_q), expected.clamp(0, 1), atol=1e-2)
    assert torch.allclose(model.train().decode(z_q), expected, atol=1e-2)


@pytest.mark.parametrize("options", [
    {"grid": 0}, {"image_size": 48}, {"stage": 3}, {"encoder": "xcit_nano_12_p16_224"}, {"encoder": "mixer_s16_224"},
    {"encoder": "resnet18", "encoder_layers": 6}, {"encoder": "vit_tiny_patch16_224", "encoder_layers": 13},
    {"encoder": "vit_small_patch16_18x2_224"}, {"encoder": "vit_tiny_patch16_224", "decoder_width": 100}], ids=str)
def test_options_that_build_no_model_are_refused_with_their_value(options):
    with refused("^[^\n]+ = [^\n]+, allowed: "):
        VQRAE(**options, pretrained=False)


def test_a_model_travels_by_the_hub_with_its_stage_and_constants(change):
    change(huggingface_hub.HfApi, create_repo=lambda self, **options: SimpleNamespace(**options),
           upload_folder=lambda self, folder_path, **_: shutil.copytree(folder_path, "hub"))
    change(huggingface_hub.hub_mixin, hf_hub_download=lambda filename, **_: str(Path("hub", filename)))
    model, images = build(stage=2, constants={"SEED": 3, "DATASET": "shapes"}), torch.rand(1, 3, 32, 32)
    model.save_pretrained("saved", push_to_hub=True, repo_id="me/model")
    for again in (VQRAE.from_pretrained("saved"), VQRAE.from_pretrained("me/model")):
        assert (again.stage, again.constants, again.config) == (2, model.constants, model.config)
        assert torch.equal(again(images)[0], model(images)[0]) and not again.training


def test_a_quantizer_of_ones_own_is_saved_and_loaded(monkeypatch):
    own = type("Own", (FSQ,), {})
    monkeypatch.setitem(QUANTIZERS, "own", own)
    model, images = build(), torch.rand(2, 3, 32, 32)
    model.quantizer = build_quantizer(own, 256, levels=[3, 2]).eval()
    models.save_checkpoint("own.pt", model)
    again = load_checkpoint("own.pt")
    assert isinstance(again.quantizer, own) and again.config == model.config
    assert torch.equal(again.encode_to_indices(images), model.encode_to_indices(images))
    monkeypatch.delitem(QUANTIZERS, "own")
    for function in (lambda: load_checkpoint("own.pt"), lambda: models.save_checkpoint("lost.pt", model)):
        with refused(r"quantizer = 'own', allowed: .*QUANTIZERS\['own'\] = "):
            function()
    model.quantizer = own(256)  # which works, but nobody recorded its options
    assert model.encode_to_indices(images).shape == (2, 8, 8)
    with refused(r"build its quantizer by build_quantizer\(class, dim"):
        models.save_checkpoint("lost.pt", model)


@pytest.mark.parametrize("path", sorted(PRETRAINED_DIR.glob("vqrae_*.pt")), ids=lambda path: path.stem)
@torch.no_grad()
def test_shipped_models_know_a_photograph(path, photograph):
    model, images = load_checkpoint(path), photograph[..., 100:164, 200:328]
    indices, z = model.encode_to_indices(images), model.encoder(images)
    assert psnr(model.decode_from_indices(indices), images) > 29.5
    assert F.mse_loss(model.features_from_indices(indices), z) < 0.2 * z.var()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_keeps_nearly_all_indices(dtype, photograph):
    """Rounding by a share of eps moves a token into another cell with a probability of a few dozen eps."""
    images = photograph[..., 100:164, 200:328]
    model, half = (load_checkpoint(PRETRAINED_DIR / "vqrae_fsq.pt").to(dtype) for dtype in (torch.float32, dtype))
    expected, _, expected_indices = model(images)
    output, _, indices = half(images.to(dtype))
    assert (indices != expected_indices).float().mean() < 30 * torch.finfo(dtype).eps
    assert (psnr(output, images) - psnr(expected, images)).abs() < 0.2
    assert torch.equal(half.decode_from_indices(half.encode_to_indices(images)), output)
    assert output.dtype == half.features_from_indices(indices).dtype == torch.float32
    resizing = build("cnn", grid=8).to(dtype)
    assert resizing.decode_from_indices(resizing.encode_to_indices(images)).shape == images.shape


@pytest.mark.parametrize("method, x", [
    ("encode_to_indices", torch.rand(1, 3, 285, 17)), ("decode_from_indices", torch.arange(60).view(1, 20, 3))])
@pytest.mark.parametrize("encoder, quantizer", [("cifar", "fsq"), ("cnn", "ema_vq"), ("cnn", "simvq")])
@pytest.mark.skipif(torch.__version__ < "2.14", reason="older versions export pooling of even sizes alone")
@pytest.mark.filterwarnings("ignore")
def test_the_export_in_the_settings_takes_other_sizes(encoder, quantizer, method, x):
    block = re.search(r"## Export.*?```\w*\n(.*?)```", SETTINGS, re.DOTALL)[1]
    if method == "decode_from_indices":  # as the block's comment says
        for old, new in (("encode_to_indices", method), ("rand(2, 3, 32, 40)", "arange(160).view(2, 8, 10)"),
                         ("(0, 2, 3)", "(0, 1, 2)"), ('{"images"', '{"indices"')):
            block = block.replace(old, new)
    model = build(encoder, quantizer)
    if encoder == "cnn":  # this test is about the quantizer
        model.adapter, model.decoder = torch.nn.Identity(), torch.nn.Conv2d(256, 3, 1)
    exec(block, names := {"model": model})
    session, expected = names["session"], model.forward(x)
    output, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for result in (names["program"].module()(x), torch.from_numpy(output)):
        assert result.dtype == expected.dtype and result.shape == expected.shape
        assert ((result - expected).abs() < 1e-4).float().mean() > 0.99  # another order rounds otherwise


def test_shipped_encoder_gives_normalised_features_of_tokens_of_any_size():
    encoder, images = build_encoder("cifar", 4), torch.rand(2, 3, 64, 50)
    z = encoder(images)
    assert z.shape == (2, 256, 16, 13) and torch.allclose(normalized(z, 1), z, atol=1e-3)
    resized = F.interpolate(F.pad(images, (0, 6, 0, 0), "reflect"), (32, 28), mode="bicubic", antialias=True)
    assert torch.allclose(build_encoder("cifar", 8)(images), encoder(resized.clamp(0, 1)), atol=1e-5)


@pytest.mark.parametrize("architecture, layers", [("plain", 1), ("plain", 2), ("plain", 0), ("dinov3", 0)])
@torch.no_grad()
def test_vit_features_are_the_normalised_sum_of_normalised_layers(architecture, layers, vit):
    if architecture == "dinov3":  # with rotary positions
        vit = save_vit("vit_small_patch16_dinov3", "dinov3")
    encoder, images = build_encoder(vit, 4, layers).eval(), torch.rand(2, 3, 32, 32)
    source, outputs = timm.create_model(vit, pretrained=True, img_size=64).eval(), []
    for block in source.blocks:  # class and register tokens are left out
        block.register_forward_hook(lambda module, arguments, output: outputs.append(output[:, 5:]))
    pixels = F.interpolate(images, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)  # a token has 4, a patch 8
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]  # DINOv2's
    source((pixels - mean) / std)
    z, last = encoder(images, with_last=True)
    expected = normalized(sum(normalized(output, -1) for output in outputs[-layers:]), -1)
    assert z.shape == (2, 32, 8, 8) and torch.allclose(z.flatten(2).mT, expected, atol=1e-3)
    assert torch.allclose(last.flatten(2).mT, normalized(outputs[-1], -1), atol=1e-3)


@pytest.mark.parametrize("layers, strides", [(0, [2, 4, 8, 16, 32]), (3, [8, 16, 32]), (1, [32])])
@torch.no_grad()
def test_a_pyramid_has_its_strides_side_by_side(layers, strides):
    encoder, images = build_encoder("resnet18", 16, layers, pretrained=False), torch.rand(2, 3, 48, 80)
    x = F.pad((images - encoder.network.mean) / encoder.network.std, (0, 16, 0, 16), mode="replicate")
    z, outputs, expected = encoder(images), encoder.network.forward_intermediates(x, intermediates_only=True), []
    for stride, output in zip(strides, outputs[-len(strides):]):
        parts = 1 if expected else {2: 4, 8: 2, 32: 1}[stride]
        repeated = output.repeat_interleave(2, 2).repeat_interleave(2, 3) if stride == 32 else output
        means = F.avg_pool2d(repeated, max(1, 16 // stride // parts))
        expected.append(normalized(F.pixel_unshuffle(means, parts), 1))
    assert torch.allclose(z, torch.cat(expected, 1)[..., :3, :5], atol=1e-3) and z.shape[1] == encoder.dim


def test_efficientnet_of_its_pip_package_knows_a_photograph(photograph):
    network = models.load_network(ENCODERS["efficientnet_lite0"], pretrained=True).eval()
    image = F.interpolate(photograph, (224, 224), mode="bicubic", antialias=True)
    assert network((image - network.mean) / network.std).argmax() == 652  # "military uniform"


@pytest.mark.parametrize("name, width", [
    *re.findall(r"^\| `(\w+)` \| \S+ \| \d+ M \| (\d+), ", SETTINGS, re.MULTILINE), ("resnet50", 4864),
    ("eva02_base_patch14_224", 768), ("vit_pe_core_base_patch16_224", 768)])
def test_each_encoder_by_its_name_has_the_width_in_the_settings(name, width):
    with torch.device("meta"):  # without weights
        encoder = build_encoder(name, 16, pretrained=False)
        assert encoder(torch.empty(2, 3, 32, 48)).shape == (2, int(width), 2, 3)


@pytest.mark.parametrize("name", ["dinov2_s", "siglip2_b"])
def test_weights_that_are_incomplete_and_a_model_whose_encoder_is_elsewhere_are_refused(name):
    models.save_checkpoint("model.pt", build(save_vit(ENCODERS[name].split(".")[0], "vit")))
    state = load_file("vit/model.safetensors")
    del state["blocks.1.mlp.fc1.weight"]
    save_file(state, "vit/model.safetensors")
    with pytest.raises(OSError, match=r"^The encoder local-dir:vit does not load[^\n]*$"):
        build_encoder("local-dir:vit", 4)
    shutil.rmtree("vit")
    with refused("model.pt .*local-dir:vit does not load. It needs a folder"):
        load_checkpoint("model.pt")


@pytest.mark.parametrize("name", ["cifar", "dinov2_s", "efficientnet_lite0"])
def test_weights_that_are_damaged_or_cannot_be_downloaded(name, change):
    content = (PRETRAINED_DIR / "cifar_encoder.pt").read_bytes()
    Path("cifar_encoder.pt").write_bytes(content[:10**6] + b"damage" + content[10**6 + 6 :])
    change(models, PRETRAINED_DIR=Path(), find_spec=lambda package: None)
    change(huggingface_hub.constants, HF_HUB_OFFLINE=True, HF_HUB_CACHE="empty")
    message = "cannot be read: its checksum" if name == "cifar" else "does not load.*ENCODER=cifar"
    with pytest.raises((OSError, InputError), match=rf"^The [^\n]*{message}[^\n]*$"):
        build_encoder(name, 4)


def test_a_convolutions_padded_input_stays_channels_last_on_a_gpu(change):
    """Otherwise it is copied. Fake tensors have a device, a shape and strides, but no numbers."""
    change(torch.nn.Conv2d, forward=lambda self, x: x)
    with FakeTensorMode(), torch.device("cuda"):
        padded = models.Conv(8, 8, 3)(torch.empty(2, 8, 5, 6).to(memory_format=torch.channels_last))
    assert padded.shape == (2, 8, 7, 8) and padded.is_contiguous(memory_format=torch.channels_last)


def test_discriminator_has_a_logit_for_each_patch():
    for size, logits in ((16, 3), (32, 7), (64, 7), (256, 7)):
        assert PatchDiscriminator(size)(torch.rand(1, 3, size, size)).shape == (1, 1, logits, logits)
