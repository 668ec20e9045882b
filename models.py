"""Encoders, decoders, VQRAE and patch discriminator.

    images (B, 3, H, W) in [0, 1], padded to h x w whole tokens
      -> encoder                      features z (B, C, h, w)
      -> adapter, quantizer           z_q (B, C, h, w), loss, indices (B, h, w)    VQRAE.quantize; from images: encode
           -> post_quant_conv, decoder    images (B, 3, H, W), cropped             VQRAE.decode
           -> predictor                   features (B, C, h, w)                    VQRAE.predict_features
"""
import difflib
import math
import re
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, RotaryEmbeddingCat
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from downloads import weights_file
from quantizers import build_quantizer, check

PRETRAINED_DIR = Path(__file__).resolve().parent / "checkpoints" / "pretrained"


# ---------------------------------------------------------------------------------------------------------------------
# Encoders: images (B, 3, H, W) in [0, 1] -> features (B, dim, h, w), normalised over dim (except those of "cnn").
# A token stands for token_size x token_size pixels of the image, and patch x patch of the encoder's input.

# Short names of some of timm's pretrained encoders. Any other plain ViT is given by its name in timm.
ENCODERS = {
    "dinov2_s": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_b": "vit_base_patch14_dinov2.lvd142m",
    "siglip_l": "vit_large_patch16_siglip_256.webli",
    "siglip2_b": "vit_base_patch16_siglip_256.v2_webli",
    "siglip2_so400m": "vit_so400m_patch14_siglip_224.v2_webli",
    "mae_b": "vit_base_patch16_224.mae",
    "internvit_300m": "vit_intern300m_patch14_448.ogvl_dist",
}

FROM_SCRATCH = ("scratch", "cnn")  # baselines: the shipped encoder's architecture; the CNN of small repositories


def build_encoder(name: str, token_size: int, pretrained: bool = True) -> nn.Module:
    """A pretrained encoder: "cifar", which ships with the repository, one of ENCODERS, or any plain ViT by its name in
    timm; or one of FROM_SCRATCH, which starts from random weights and learns in both stages.

    pretrained: False leaves the weights random, to be loaded from a checkpoint.
    Raises ValueError for an unknown name, RuntimeError where pretrained weights are neither on disk nor downloadable.
    """
    if name in ("cifar", *FROM_SCRATCH):
        encoder = CNNEncoder(token_size) if name == "cnn" else AirbenchEncoder(token_size, fused=name == "cifar")
        if name == "cifar" and pretrained:
            from utils import load_torch  # here, because utils.py imports this module
            encoder.load_state_dict(load_torch(PRETRAINED_DIR / "cifar_encoder.pt"))
        return encoder.to(memory_format=torch.channels_last)  # convolutions run 1.1 to 1.5 times as fast on a CPU
    known = ["cifar", *FROM_SCRATCH, *ENCODERS, *timm.list_models("*vit*", pretrained=True)]
    similar = ", ".join(difflib.get_close_matches(name, known, n=3)) or "none"
    is_vit = timm.is_model(name) and timm.models.is_model_in_modules(name, {"vision_transformer"})
    check(name in ENCODERS or is_vit, "ENCODER", name,
          f'"cifar", {", ".join((*ENCODERS, *FROM_SCRATCH))} or a ViT of timm (nearest: {similar})')
    return TimmEncoder(ENCODERS.get(name, name), token_size, pretrained)


def resize(images: Tensor, token_size: int, patch: int) -> Tensor:
    """images (B, 3, H, W), padded by reflection to h x w tokens of token_size pixels, and resized to `patch` pixels a
    token -> (B, 3, h * patch, w * patch)"""
    height, width = images.shape[-2:]
    h, w = math.ceil(height / token_size), math.ceil(width / token_size)
    if (height, width) != (h * token_size, w * token_size):
        images = F.pad(images, (0, w * token_size - width, 0, h * token_size - height), mode="reflect")
    if token_size == patch:
        return images
    size = h * patch, w * patch
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def layer_norm(z: Tensor) -> Tensor:
    """LayerNorm without affine over the channels of z (B, C, h, w), as at the end of RAE's encoders (2510.11690)."""
    return F.layer_norm(z.permute(0, 2, 3, 1).float(), z.shape[1:2]).permute(0, 3, 1, 2)


def pad(x: Tensor, size: int) -> Tensor:
    """x (B, C, H, W) with `size` more rows and columns on each side, as at its border.

    This replicate padding is closer to a larger image than zeros are: what was learned on small images, where each
    token is near a border, then serves for large ones.
    """
    if size == 0:
        return x
    with torch.autocast(x.device.type, enabled=False):  # autocast would pad in fp32 on a CPU
        return F.pad(x, (size,) * 4, mode="replicate")


class ConvNorm(nn.Module):
    """Convolution, 2x2 max pooling if asked for, and BatchNorm."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int, stride: int = 1, pool: bool = False):
        super().__init__()
        self.padding = kernel // 2 if kernel % 2 else 0
        self.conv = nn.Conv2d(dim_in, dim_out, kernel, stride, bias=False)
        self.pool = nn.MaxPool2d(2, ceil_mode=True) if pool else nn.Identity()
        self.norm = nn.BatchNorm2d(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.pool(self.conv(pad(x, self.padding))))


def fuse(encoder: nn.Module) -> nn.Module:
    """Fold every BatchNorm into its convolution, after pretraining: faster, and no running statistics to go wrong in
    stage 2. (Through the pooling, too: BatchNorm's scale is positive there.)"""
    for module in encoder.modules():
        if isinstance(module, ConvNorm):
            module.conv, module.norm = fuse_conv_bn_eval(module.conv.eval(), module.norm.eval()), nn.Identity()
    return encoder


class AirbenchEncoder(nn.Module):
    """The encoder that ships with the repository, made by pretrain.py: a token for 4x4 pixels.

    Its features are deep and shallow ones, concatenated (as in 2606.11096): 192 channels of a network like airbench's
    (2404.00498), which sees most of a 32x32 image, at half the tokens' resolution, and 64 of a linear patch embedding.
    """

    patch, dim = 4, 256

    def __init__(self, token_size: int = 4, fused: bool = True):
        """fused: True for the shipped weights; False has the BatchNorms that training from scratch needs."""
        super().__init__()
        self.token_size = token_size
        self.whiten = nn.Conv2d(3, 24, 3)
        layers, dim_in = [nn.GELU()], 24
        for width in (64, 256, 384):
            layers += [ConvNorm(dim_in, width, 3, pool=True), nn.GELU(), ConvNorm(width, width, 3), nn.GELU()]
            dim_in = width
        self.deep = nn.Sequential(*layers, ConvNorm(dim_in, self.dim - 64, 1))
        self.shallow = ConvNorm(3, 64, self.patch, stride=self.patch)
        if fused:
            fuse(self)

    def forward(self, images: Tensor) -> Tensor:
        x = (resize(images, self.token_size, self.patch) - 0.5) / 0.25
        shallow = self.shallow(x)
        h, w = shallow.shape[-2:]
        deep = F.interpolate(self.deep(self.whiten(pad(x, 1))), scale_factor=2)[..., :h, :w]
        return layer_norm(torch.cat([deep, shallow], dim=1))


class CNNEncoder(nn.Module):
    """Three strided convolutions and one more: 32x32 images to a 4x4 grid."""

    patch, dim = 8, 256

    def __init__(self, token_size: int):
        super().__init__()
        self.token_size = token_size
        self.layers = nn.Sequential(
            nn.Conv2d(3, 64, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, 128, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(128, 256, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(256, self.dim, 3, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers((resize(images, self.token_size, self.patch) - 0.5) / 0.25).float()


class TimmEncoder(nn.Module):
    """A pretrained ViT of timm's: patch tokens of the last layer, final norm without affine.

    timm resamples the position embeddings to each grid of tokens.
    """

    def __init__(self, name: str, token_size: int, pretrained: bool = True):
        super().__init__()
        patch = re.search(r"patch(\d+)", name)
        check(patch is not None, "ENCODER", name, "ViTs with their patch size in their name")
        self.token_size, self.patch = token_size, int(patch[1])
        weights = {"pretrained_cfg_overlay": {"file": weights_file(name), "custom_load": False}} if pretrained else {}
        try:
            self.vit = timm.create_model(name, pretrained=pretrained, dynamic_img_size=True, **weights)
        except Exception as error:  # a missing or unknown key, another shape, a damaged file
            raise RuntimeError(f"weights of {name} do not load: {' '.join(str(error).split())} ({weights})") from None
        # after loading, because timm does not check that all weights of a SigLIP without its pooling are there
        self.vit.reset_classifier(0, global_pool="")
        self.vit.norm = nn.LayerNorm(self.vit.embed_dim, elementwise_affine=False)
        self.vit.fc_norm = nn.Identity()
        check(hasattr(self.vit.blocks[0], "attn"), "ENCODER", name, "ViTs with one attention a block")
        self.dim, self.depth, self.heads = self.vit.embed_dim, len(self.vit.blocks), self.vit.blocks[0].attn.num_heads
        self.register_buffer("mean", torch.tensor(self.vit.pretrained_cfg["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.vit.pretrained_cfg["std"]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = (resize(images, self.token_size, self.patch) - self.mean) / self.std
        tokens = self.vit.forward_features(x)[:, self.vit.num_prefix_tokens :].float()  # no class or register tokens
        return tokens.transpose(1, 2).unflatten(2, (x.shape[2] // self.patch, x.shape[3] // self.patch))


# ---------------------------------------------------------------------------------------------------------------------
# Blocks and decoders

def transformer(dim: int, depth: int, heads: int, kind: type = Block, **options) -> nn.Sequential:
    """timm's transformer blocks, on tokens (B, N, dim)"""
    blocks = nn.Sequential(*(kind(dim, heads, qkv_bias=True, **options) for _ in range(depth)))
    for block in blocks:  # on a CPU, fused attention has a slow backward pass in bf16: 1.2 times a block's time
        block.attn.fused_attn = torch.cuda.is_available()
    return blocks


class OnGrid(nn.Sequential):
    """Transformer blocks on a grid z (B, C, h, w)."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, z.shape[2:])


class Conv(nn.Module):
    """Convolution that keeps height and width. Its weight is a matrix (dim_out, kernel**2 * dim_in), for Muon."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int = 3):
        super().__init__()
        conv = nn.Conv2d(dim_in, dim_out, kernel)
        self.kernel = kernel
        self.weight = nn.Parameter(conv.weight.detach().permute(0, 2, 3, 1).flatten(1))
        self.bias = nn.Parameter(conv.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # the weight's layout; faster, above all on a CPU
        weight = self.weight.unflatten(1, (self.kernel, self.kernel, -1)).permute(0, 3, 1, 2)
        return F.conv2d(pad(x, self.kernel // 2), weight, self.bias)


class ResidualBlock(nn.Module):
    """Residual block, at first the identity, of two 3x3 convolutions and a norm of the `hidden` channels between them:
    with the norm before both, these drift below zero in training, and GELU silences them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.norm = LayerNorm2d(hidden)
        self.conv1, self.conv2 = Conv(dim, hidden), Conv(hidden, dim)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.gelu(self.norm(self.conv1(x))))


class ConvDecoder(nn.Module):
    """Tokens (B, dim, h, w) to images of token_size pixels a token: `depth` residual blocks at the resolution of the
    tokens, then one after each doubling of it, which halves the channels, to no fewer than 32."""

    def __init__(self, dim: int, token_size: int, width: int, depth: int):
        super().__init__()
        doublings = round(math.log2(token_size))
        check(2**doublings == token_size, "DECODER", "conv",
              f'"vit" where IMAGE_SIZE / GRID = {token_size} is no power of 2')
        layers = [Conv(dim, width, 1), *(ResidualBlock(width, width) for _ in range(depth))]
        for _ in range(doublings):
            narrow = max(width // 2, 32)
            layers += [Conv(width, 4 * narrow, 1), nn.PixelShuffle(2), ResidualBlock(narrow, narrow)]
            width = narrow
        self.layers = nn.Sequential(*layers, LayerNorm2d(width))
        self.head = Conv(width, 3)

    def forward(self, z: Tensor) -> Tensor:
        return 0.5 + 0.25 * self.head(self.layers(z)).float()  # about the mean and standard deviation of pixels


class ViTDecoder(nn.Module):
    """Tokens (B, dim, h, w) to images of token_size pixels a token: transformer blocks, then one patch a token.

    A patch is about twice as wide as a token, and overlapping patches are added up, which avoids seams. Attention sees
    where tokens are relative to each other, on grids of other sizes, too (RoPE-Axial of 2403.13298).
    """

    def __init__(self, dim: int, token_size: int, width: int, depth: int, heads: int):
        super().__init__()
        check(width % (4 * heads) == 0, "DECODER_WIDTH", width, f"a multiple of 4 for each of {heads} DECODER_HEADS")
        overlap = token_size // 2
        self.token_size = token_size
        self.patch = {"kernel_size": token_size + 2 * overlap, "padding": overlap, "stride": token_size}
        self.project_in = nn.Linear(dim, width)
        self.blocks = transformer(width, depth, heads, EvaBlock, num_prefix_tokens=0)
        self.positions = RotaryEmbeddingCat(width // heads, in_pixels=False, temperature=100.0)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3 * self.patch["kernel_size"] ** 2)

    def forward(self, z: Tensor) -> Tensor:
        h, w = z.shape[-2:]
        x, positions = self.project_in(z.flatten(2).transpose(1, 2)), self.positions.get_embed([h, w])
        for block in self.blocks:
            x = block(x, positions)
        patches = self.head(self.norm(x)).float().transpose(1, 2)
        return 0.5 + 0.25 * F.fold(patches, (h * self.token_size, w * self.token_size), **self.patch)


class CNNDecoder(nn.Module):
    """CNNEncoder in reverse."""

    def __init__(self, dim: int, token_size: int):
        super().__init__()
        check(token_size == 8, "IMAGE_SIZE / GRID", token_size, '8 with ENCODER = "cnn"')
        self.layers = nn.Sequential(
            nn.Conv2d(dim, 256, 3, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(256, 128, 4, stride=2, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1), nn.ReLU(),
        )
        self.head = nn.ConvTranspose2d(64, 3, 4, stride=2, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return 0.5 + 0.25 * self.head(self.layers(z)).float()


# ---------------------------------------------------------------------------------------------------------------------
# VQRAE

class VQRAE(nn.Module):
    """A representation autoencoder with a discrete bottleneck (VQRAE, 2511.23386).

    `config` holds the constructor's arguments, which a checkpoint stores to build the model again. (By default the
    quantizer is FSQ, without a convolution after it: train.py's constants say otherwise.)
    """

    def __init__(self, encoder: str = "cifar", quantizer: str = "fsq", quantizer_options: dict | None = None,
                 image_size: int = 32, grid: int = 8, adapter_depth: int | None = None, post_quant_kernel: int = 0,
                 decoder: str | None = None, decoder_width: int | None = None, decoder_depth: int | None = None,
                 decoder_heads: int | None = None, pretrained: bool = True):
        """
        image_size, grid: a token stands for image_size / grid pixels a side, in images of any size
        adapter_depth: blocks before the quantizer; None: one transformer block behind a ViT, else three convolutional
        post_quant_kernel: size of the convolution behind the quantizer, 0 for none
        decoder: "conv", "vit", or None for the encoder's own kind; "cnn" has a decoder of its own
        decoder_width, _depth, _heads: None for the encoder's if it is a ViT; else 192, 2 ("conv") or 4 ("vit"), 3
        pretrained: False leaves the encoder's weights random, to be loaded from a checkpoint
        """
        arguments = dict(locals())
        super().__init__()
        self.config = {k: v for k, v in arguments.items() if k not in ("self", "pretrained", "__class__")}
        check(isinstance(grid, int) and grid >= 1 and image_size % grid == 0, "GRID", grid,
              f"a divisor of IMAGE_SIZE = {image_size}")
        check(adapter_depth is None or adapter_depth >= 0, "ADAPTER_DEPTH", adapter_depth, "None, 0 or more")
        check(post_quant_kernel == 0 or post_quant_kernel % 2 == 1, "POST_QUANT_KERNEL", post_quant_kernel, "0 or odd")
        self.token_size = image_size // grid
        self.encoder = build_encoder(encoder, self.token_size, pretrained)
        dim = self.encoder.dim
        vit = isinstance(self.encoder, TimmEncoder)
        kind = decoder or ("cnn" if encoder == "cnn" else "vit" if vit else "conv")
        kinds = ("cnn",) if encoder == "cnn" else ("conv", "vit")
        check(kind in kinds, "DECODER", decoder, f"None or one of {kinds} with ENCODER = {encoder!r}")
        width = decoder_width or (dim if vit else 192)
        depth = decoder_depth or getattr(self.encoder, "depth", 2 if kind == "conv" else 4)
        heads = decoder_heads or getattr(self.encoder, "heads", 3)

        def blocks(number: int, hidden: int = dim // 2) -> nn.Sequential:  # of the encoder's kind
            if vit:
                return OnGrid(*transformer(dim, number, self.encoder.heads))
            return nn.Sequential(*(ResidualBlock(dim, hidden) for _ in range(number)))

        adapter_depth = (1 if vit else 3) if adapter_depth is None else adapter_depth
        self.config |= {"adapter_depth": adapter_depth, "decoder": kind, "decoder_width": width, "decoder_depth": depth,
                        "decoder_heads": heads}
        self.adapter = blocks(adapter_depth)
        self.quantizer = build_quantizer(quantizer, dim, **(quantizer_options or {}))
        self.from_scratch = encoder in FROM_SCRATCH
        # two narrow convolutional blocks predict better than a wide one: they see more of the neighbouring tokens
        self.predictor = None if self.from_scratch else blocks(1 if vit else 2, dim // 4)
        self.post_quant_conv = Conv(dim, dim, post_quant_kernel) if post_quant_kernel else nn.Identity()
        if kind == "cnn":
            self.decoder = CNNDecoder(dim, self.token_size)
        elif kind == "conv":
            self.decoder = ConvDecoder(dim, self.token_size, width, depth)
        else:
            self.decoder = ViTDecoder(dim, self.token_size, width, depth, heads)
        # Radius of the receptive field in tokens, when images are encoded and when they are decoded; None: unbounded.
        # The shipped encoder: 8; a residual block: 2; after the tokens' resolution, less than 3 in all.
        self.encoder_reach = None if vit else 8 + 2 * adapter_depth
        self.decoder_reach = None if kind == "vit" else 3 + 2 * depth + post_quant_kernel // 2
        self.set_stage(1)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features z (B, C, h, w) -> z_q (B, C, h, w), loss (scalar), indices (B, h, w)"""
        return self.quantizer(self.adapter(self._check_features(z, "z")))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images (B, 3, H, W) in [0, 1], of at least one token -> z_q (B, C, h, w), loss (scalar), indices (B, h, w)

        h = ceil(H / token_size), w = ceil(W / token_size): images are padded by reflection to whole tokens.
        """
        images = check_images(images)
        self._check_weights()
        check(min(images.shape[-2:]) >= self.token_size, "images", tuple(images.shape),
              f"{self.token_size} x {self.token_size} pixels or more, a token")
        return self.quantize(self.encoder(images))

    def decode(self, z_q: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """z_q (B, C, h, w) -> images (B, 3, H, W), clamped to [0, 1] in eval mode: clamping stops gradients

        size: (H, W), that of the images that were encoded; None: that of whole tokens
        """
        height, width = self._image_size(self._check_features(z_q, "z_q"), size)
        images = self.decoder(self.post_quant_conv(z_q))[..., :height, :width]
        return images if self.training else images.clamp(0, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images (B, 3, H, W) in [0, 1] -> reconstructions (B, 3, H, W), loss (scalar), indices (B, h, w)"""
        z_q, loss, indices = self.encode(images)
        return self.decode(z_q, images.shape[-2:]), loss, indices

    @torch.no_grad()
    def encode_to_indices(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> indices (B, h, w), int64. Large images in strips, where the encoder is
        made of convolutions. In train mode EMA-VQ's codebook learns from them, as in forward."""
        return in_strips(lambda x: self.encode(x)[2], check_images(images), self.token_size, 1, self.encoder_reach)

    @torch.no_grad()
    def decode_from_indices(self, indices: Tensor, codebooks: int | None = None,
                            size: tuple[int, int] | None = None) -> Tensor:
        """indices (B, h, w) -> images (B, 3, H, W), coarser ones from the first few of residual codebooks; size as in
        decode. Large images in strips, where the decoder is made of convolutions."""
        valid = isinstance(indices, Tensor) and indices.ndim == 3 and indices.numel() > 0
        check(valid, "indices", getattr(indices, "shape", type(indices)), "a tensor of shape (B, h, w), none 0")
        height, width = self._image_size(indices, size)
        return in_strips(lambda x: self.decode(self.quantizer.indices_to_codes(x, codebooks)), indices, 1,
                         self.token_size, self.decoder_reach)[..., :height, :width]

    def predict_features(self, z_q: Tensor) -> Tensor:
        """z_q (B, C, h, w) -> the frozen encoder's features (B, C, h, w), as predicted from the tokens"""
        check(not self.from_scratch, "ENCODER", self.config["encoder"], "a pretrained one: its features are predicted")
        return self.predictor(self._check_features(z_q, "z_q"))

    def features_from_indices(self, indices: Tensor, codebooks: int | None = None) -> Tensor:
        """indices (B, h, w) -> features (B, C, h, w), as predicted from the tokens; codebooks as above"""
        return self.predict_features(self.quantizer.indices_to_codes(indices, codebooks))

    def compute_prediction_loss(self, z_q: Tensor, teacher_z: Tensor, image_weight: float = 0.0) -> Tensor:
        """Mean squared error of the features predicted from z_q, against the frozen encoder's teacher_z (B, C, h, w),
        plus image_weight times that of each image's mean features."""
        predicted = self.predict_features(z_q).float()
        check(predicted.shape == teacher_z.shape, "teacher_z", tuple(teacher_z.shape), f"{tuple(predicted.shape)}")
        image_loss = F.mse_loss(predicted.mean((2, 3)), teacher_z.mean((2, 3)))
        return F.mse_loss(predicted, teacher_z) + image_weight * image_loss

    @torch.no_grad()
    def get_codebook_usage(self, indices: Tensor, codebook: int | None = None) -> tuple[Tensor, float, float]:
        """indices of any shape -> how often each code is used (codebook_size,), the share of codes used, and the
        perplexity exp(-sum p log p), between 1 and codebook_size. Beyond 2**24 codes, counts are of used codes alone.
        codebook: its place among several, from 0; None: their combinations"""
        check(isinstance(indices, Tensor) and indices.numel(), "indices", type(indices), "a tensor of one or more")
        indices, size = self.quantizer._check_indices(indices.flatten()), self.quantizer.codebook_size
        if codebook is not None:
            check(0 <= codebook < len(self.quantizer.codebook_sizes), "codebook", codebook, "that of one of several")
            indices, size = self.quantizer.split_indices(indices)[:, codebook], self.quantizer.codebook_sizes[codebook]
        small = size <= 2**24
        counts = torch.bincount(indices, minlength=size) if small else indices.unique(return_counts=True)[1]
        used = counts[counts > 0]
        p = used.double() / used.sum()
        return counts, len(used) / size, (-(p * p.log()).sum()).exp().item()

    def set_stage(self, stage: int):
        """Stage 1: a pretrained encoder is frozen and stays in eval mode. Stage 2: everything learns."""
        check(stage in (1, 2), "stage", stage, "1 or 2")
        self.stage = stage
        self.frozen = stage == 1 and not self.from_scratch
        self.encoder.requires_grad_(not self.frozen)
        return self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def _image_size(self, tokens: Tensor, size: tuple[int, int] | None) -> tuple[int, int]:
        """The (H, W) of images of these tokens (..., h, w); ValueError for a size that needs another number of them."""
        grid = tuple(tokens.shape[-2:])
        size = tuple(n * self.token_size for n in grid) if size is None else size
        valid = isinstance(size, (tuple, list)) and all(hasattr(n, "__index__") for n in size)  # also NumPy's integers
        valid = valid and tuple(-(-n // self.token_size) for n in size) == grid
        check(valid, "size", size, f"that of {grid} tokens of {self.token_size} pixels, the last of which may be cut")
        return size

    def _check_features(self, z: Tensor, name: str) -> Tensor:
        valid = isinstance(z, Tensor) and z.ndim == 4 and z.shape[1] == self.encoder.dim and z.numel() > 0
        check(valid, name, getattr(z, "shape", type(z)), f"a tensor of shape (B, {self.encoder.dim}, h, w), none 0")
        check(z.dtype.is_floating_point, name, z.dtype, "a floating-point type")
        self._check_weights()
        return z

    def _check_weights(self):
        weights = self.decoder.head.weight.dtype  # the layer that BF16Weights leaves in fp32
        check(weights == torch.float32, "type of the model's weights", weights, "torch.float32: call its float()")


def in_strips(function: Callable, x: Tensor, rows_in: int, rows_out: int, reach: int | None,
              strip_tokens: int = 3 * 2**16) -> Tensor:
    """function(x) for x (..., H, W), cut into horizontal strips of about strip_tokens tokens, so that memory does not
    grow with the height, and with a progress bar. A row of tokens is rows_in rows of x, rows_out of the result: when
    encoding token_size and 1, when decoding 1 and token_size.

    A strip is computed with `reach` more rows of tokens above and below, the radius of the function's receptive field,
    which makes it equal to that part of the whole; reach None: x at once.
    """
    h, w = (-(-n // rows_in) for n in x.shape[-2:])
    if reach is None or h <= 5 * reach or h * w * len(x) <= strip_tokens:
        return function(x)
    rows = max(strip_tokens // (w * len(x)), 4 * reach) // 2 * 2
    strips = []
    for top in tqdm(range(0, h, rows), "strips", leave=False):
        start = max(0, (top - reach) // 2 * 2)  # even: the encoder's deepest grid has one position for 2 x 2 tokens
        strip = function(x[..., start * rows_in : (top + rows + reach) * rows_in, :])
        strips.append(strip[..., (top - start) * rows_out :, :][..., : rows * rows_out, :])
    return torch.cat(strips, -2)


def check_images(images: Tensor) -> Tensor:
    """Return images in fp32; ValueError unless they are (B, 3, H, W) floats in [0, 1], B at least 1."""
    check(isinstance(images, Tensor), "images", type(images).__name__, "a tensor")
    check(images.ndim == 4 and images.shape[1] == 3 and images.numel(), "images", tuple(images.shape), "(B, 3, H, W)")
    check(images.dtype.is_floating_point, "images", images.dtype, "floating-point numbers in [0, 1]")
    low, high = images.aminmax()
    check(low >= 0 and high <= 1, "images", f"{low:.3g} to {high:.3g}", "numbers in [0, 1]")  # NaN fails, too
    return images.float()


class PatchDiscriminator(nn.Module):
    """PatchGAN (1611.07004): images (B, 3, H, W) -> logits (B, 1, h, w), 7x7 for 32x32 images.

    Two strided layers for 32 pixels (three would leave 3x3 logits), one more each time that the size doubles.
    """

    def __init__(self, image_size: int = 32, width: int = 64):
        super().__init__()
        check(image_size >= 16, "image_size", image_size, "16 or more")
        strided = max(2, round(math.log2(image_size / 8)))
        widths = [3] + [min(width * 2**i, 512) for i in range(strided)]
        layers = []
        for dim_in, dim_out in zip(widths, widths[1:]):
            layers += [nn.Conv2d(dim_in, dim_out, 4, stride=2, padding=1),
                       nn.GroupNorm(8, dim_out) if dim_in > 3 else nn.Identity(), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images * 2 - 1)
