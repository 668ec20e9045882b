"""How the shipped encoder was made: a small convolutional network learns CIFAR-10's classes and pixels.

    python -m extras.pretrain    writes OUT/cifar_encoder.pt, 16-bit weights with BatchNorm folded in

Most of it comes from airbench (2404.00498): the network, whitened input, convolutions that start as the identity,
label smoothing, alternating flips, and Muon with weights of a fixed norm.
"""
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from data import load_dataset
from extras.measure import linear_probe, pooled_features
from models import ConvEncoder, ConvPool
from muon import Muon
from quantizers import check
from utils import device, fast_bf16, one_line_errors, prepare_cpu, progress, read_constants, save_torch, to_float

DATASET = "cifar10"  # or a folder of the same images
EPOCHS = 16  # three minutes each on two CPU cores
BATCH_SIZE = 500
LEARNING_RATE = (0.1, 5e-3)  # Muon's, for the deep convolutions, and AdamW's
SEED = 0
OUT = "outputs/pretrain"


def augment(images: Tensor, mirror: Tensor) -> Tensor:
    """Shift images (B, 3, H, W) by up to two pixels, with reflected borders. Mirror those in `mirror` (B,) bool."""
    count, _, height, width = images.shape
    crops = F.pad(images, (2, 2, 2, 2), "reflect").unfold(2, height, 1).unfold(3, width, 1)  # (B, 3, 5, 5, H, W)
    y, x = torch.randint(5, (2, count), device=images.device)
    shifted = crops[torch.arange(count), :, y, x]
    return torch.where(mirror[:, None, None, None], shifted.flip(3), shifted)


@torch.no_grad()
def initialize(encoder: ConvEncoder, images: Tensor):
    """Let the first filters, which stay fixed, whiten 3 x 3 patches of images (B, 3, H, W).

    Deep convolutions start as the identity. A BatchNorm with a fixed scale follows them and the shallow one.
    """
    weight, patches = encoder.whiten.weight, F.unfold((images - 0.5) / 0.25, 3).mT.flatten(0, 1)
    variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
    components = (components / (variances + 5e-4).sqrt()).T.flip(0)[: len(weight) // 2]  # the largest 12
    weight.copy_(torch.cat([components, -components]).view_as(weight))
    weight.requires_grad = False
    nn.init.zeros_(encoder.whiten.bias)
    for module in encoder.modules():
        if isinstance(module, ConvPool):
            module.norm, module.conv.bias = nn.BatchNorm2d(module.conv.out_channels), None
            module.norm.weight.requires_grad = False
            if module is not encoder.shallow:
                nn.init.dirac_(module.conv.weight[: module.conv.in_channels])
    nn.init.constant_(encoder.deep[-1].norm.weight, 1.34)  # shallow channels then have 0.16 of the variance


def main():
    read_constants(globals(), sys.argv[1:])
    if device == "cpu":
        prepare_cpu()
    data = load_dataset(DATASET)
    check(data.train_labels is not None, f"DATASET={DATASET} has no classes to learn.")
    check(isinstance(LEARNING_RATE, tuple), f"{LEARNING_RATE = }, allowed: a pair")
    steps = len(data.train_images) // BATCH_SIZE  # in an epoch
    torch.manual_seed(SEED)
    images, labels, encoder = data.train_images.to(device), data.train_labels.to(device), ConvEncoder()
    initialize(encoder, to_float(data.train_images[:5000]))
    class_head, pixel_head = nn.Linear(encoder.dim, len(data.classes)), nn.Conv2d(encoder.dim, 3 * encoder.patch**2, 1)
    networks = nn.ModuleList([encoder, class_head, pixel_head]).to(device, memory_format=torch.channels_last)
    filters = [module.conv.weight for module in encoder.deep if isinstance(module, ConvPool)]
    others = [p for p in networks.parameters() if p not in {*filters}]
    # airbench's Muon has updates 0.2 sqrt(n) times smaller, for matrices (m, n) with n >= m
    groups = [{"params": [p], "lr": LEARNING_RATE[0] / (0.2 * p[0].numel() ** 0.5)} for p in filters]
    optimizers = [Muon(groups, lr=LEARNING_RATE[0], momentum=0.8, weight_decay=0),
                  torch.optim.AdamW(others, LEARNING_RATE[1], weight_decay=0)]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(  # a warm-up, then constant, then falling to 0
        optimizer, lambda step: min((step + 1) / 50, 1, 2 - 2 * step / (EPOCHS * steps))) for optimizer in optimizers]
    start, mirror = time.perf_counter(), torch.rand(len(images), device=device) < 0.5
    for epoch in range(1, EPOCHS + 1):
        mirror, total = ~mirror, 0  # alternating flips
        order = torch.randperm(len(images), device=device).split(BATCH_SIZE)[:steps]
        for index in progress(order, f"epoch {epoch}/{EPOCHS}"):
            batch = augment(to_float(images[index]), mirror[index]).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device, torch.bfloat16, enabled=fast_bf16(device)):
                z = encoder(batch)
                logits, pixels = class_head(z.mean((2, 3))), pixel_head(z)
            class_loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=0.2)
            pixel_loss = F.mse_loss(F.pixel_shuffle(pixels.float(), encoder.patch), (batch - 0.5) / 0.25)
            networks.zero_grad()
            (class_loss + pixel_loss).backward()
            for each in (*optimizers, *schedulers):
                each.step()
            for p in filters:  # a fixed norm keeps relative steps equal
                p.data.mul_(len(p) ** 0.5 / p.data.norm())
            total += class_loss.detach()
        print(f"epoch {epoch:3}  class loss {total / steps:.4f}  {time.perf_counter() - start:6.0f} s", flush=True)
    save_encoder(encoder.eval())
    train, test = pooled_features(encoder, images), pooled_features(encoder, data.test_images)
    probe = linear_probe(train, labels, test, data.test_labels.to(device))
    print(f"linear probe {probe:.4f}, wrote {OUT}/cifar_encoder.pt")


def save_encoder(encoder: ConvEncoder):
    """Fold each BatchNorm into its convolution, and write the weights in 16 bits."""
    for module in encoder.modules():
        if isinstance(module, ConvPool):  # BatchNorm's scale is positive, so max pooling may stand between them
            module.conv, module.norm = fuse_conv_bn_eval(module.conv, module.norm), nn.Identity()
    save_torch(f"{OUT}/cifar_encoder.pt", {name: w.half().cpu() for name, w in encoder.state_dict().items()})


if __name__ == "__main__":
    with one_line_errors():
        main()
