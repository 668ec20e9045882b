"""How the shipped encoder was made: a small convolutional network learns CIFAR-10's classes and its pixels.

    python pretrain.py

writes checkpoints/pretrained/cifar_encoder.pt (16-bit weights, BatchNorm folded in) and, beside it,
cifar_encoder.json with the recipe and what was measured. train.py only loads them. (Those that ship had their last five
epochs in a second run: RESULTS.md.)

Most of the recipe is airbench's (2404.00498, github.com/KellerJordan/cifar10-airbench): the network, whitened input,
convolutions that start as the identity, label smoothing, alternating flips, Muon with weights of fixed norm.
"""
import json
import math
import os
import sys
import time
from errors import one_line_errors
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from evaluate import device, linear_probe, pooled_features
from models import AirbenchEncoder, ConvNorm, fuse
from optimization import Muon, prepare_cpu
from quantizers import check, fast_bf16
from utils import check_ranges, load_dataset, read_constants, save_torch, to_float, write_file

# data
DATASET = "cifar10"  # or a folder of the same images, with train/<class>/ and test/<class>/
# training: some three minutes an epoch on a 2-core CPU
EPOCHS = 16
BATCH_SIZE = 500
LEARNING_RATE = (0.1, 5e-3)  # of Muon, for the deep convolutions, and of AdamW, for all else; both are constant for the
# first half of the steps, after a warm-up over 50, and then fall to 0
LABEL_SMOOTHING = 0.2
PIXEL_WEIGHT = 1.0  # of the pixels' squared error, read off each token by one linear layer; 0: classes alone
SEED = 0
OUT = "checkpoints/pretrained"  # where cifar_encoder.pt and cifar_encoder.json go


def augment(images: Tensor, mirror: Tensor, pad: int = 2) -> Tensor:
    """Images (B, 3, H, W) shifted by up to `pad` pixels (borders reflected), those in `mirror` (B,) bool mirrored."""
    (b, _, h, w), device = images.shape, images.device
    padded = F.pad(images, (pad,) * 4, mode="reflect")
    y = torch.randint(2 * pad + 1, (b, 1), device=device) + torch.arange(h, device=device)
    x = torch.randint(2 * pad + 1, (b, 1), device=device) + torch.arange(w, device=device)
    x = torch.where(mirror[:, None], x.flip(1), x)
    image = torch.arange(b, device=device)[:, None, None]
    return padded[image, :, y[:, :, None], x[:, None]].permute(0, 3, 1, 2)


@torch.no_grad()
def initialize(encoder: AirbenchEncoder, images: Tensor):
    """Fixed filters that whiten the 3x3 patches of images (B, 3, H, W): the 12 largest principal components, with both
    signs. The other convolutions start as the identity, and BatchNorm's scales stay fixed."""
    patches = F.unfold((images - 0.5) / 0.25, 3).transpose(1, 2).flatten(0, 1)
    variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
    components = (components / (variances + 5e-4).sqrt()).T.flip(0)[: len(encoder.whiten.weight) // 2]
    encoder.whiten.weight.copy_(torch.cat([components, -components]).view_as(encoder.whiten.weight))
    encoder.whiten.weight.requires_grad = False
    nn.init.zeros_(encoder.whiten.bias)
    for module in encoder.modules():
        if isinstance(module, ConvNorm):
            module.norm.weight.requires_grad = False
            if module is not encoder.shallow:
                nn.init.dirac_(module.conv.weight[: module.conv.in_channels])
    nn.init.constant_(encoder.deep[-1].norm.weight, 1.34)  # shallow channels then have 0.16 of the features' variance


def main():
    if device == "cpu":
        prepare_cpu()
    with one_line_errors(ValueError, RuntimeError, OSError):
        constants = read_constants(globals())
        check_ranges(constants, EPOCHS=(1, 10**6), BATCH_SIZE=(1, 10**6), SEED=(0, 2**31 - 1), LABEL_SMOOTHING=(0, 1.0),
                     PIXEL_WEIGHT=(0, 1e9))
        rates = isinstance(LEARNING_RATE, (tuple, list)) and [type(rate) in (int, float) for rate in LEARNING_RATE]
        check(rates == [True, True] and min(LEARNING_RATE) > 0, "LEARNING_RATE", LEARNING_RATE, "two numbers above 0")
        check(isinstance(OUT, str), "OUT", OUT, "a folder's path")
        Path(OUT).mkdir(parents=True, exist_ok=True)
        check(os.access(OUT, os.W_OK), "OUT", OUT, "a folder that may be written")
        data = load_dataset(DATASET, image_size=32)
        check(data.train_labels is not None, "DATASET", DATASET, "a folder with a folder per class in train/ and test/")
        check(BATCH_SIZE <= len(data.train_images), "BATCH_SIZE", BATCH_SIZE, "at most the number of images")
    torch.manual_seed(SEED)
    images, labels = data.train_images.to(device), data.train_labels.to(device)

    encoder = AirbenchEncoder(fused=False)
    initialize(encoder, to_float(data.train_images[:5000]))
    encoder = encoder.to(device, memory_format=torch.channels_last)
    class_head = nn.Linear(encoder.dim, len(data.classes)).to(device)
    pixel_head = nn.Conv2d(encoder.dim, 3 * encoder.patch**2, 1).to(device)
    filters = [module.conv.weight for module in encoder.deep if isinstance(module, ConvNorm)]
    # Muon takes matrices: (dim_out, k * k * dim_in), in the same memory, as weights are channels_last
    matrices = [nn.Parameter(as_matrix(weight.detach())) for weight in filters]
    learned = [p for module in (encoder, class_head, pixel_head) for p in module.parameters() if p.requires_grad]
    others = [p for p in learned if all(p is not weight for weight in filters)]
    optimizers = [build_muon(matrices, LEARNING_RATE[0]),
                  torch.optim.AdamW(others, lr=LEARNING_RATE[1], weight_decay=0)]
    steps = EPOCHS * (len(images) // BATCH_SIZE)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 50, 1, 2 - 2 * i / steps))
                 for optimizer in optimizers]

    start = time.time()
    mirror = torch.rand(len(images), device=device) < 0.5
    for epoch in range(1, EPOCHS + 1):
        encoder.train()
        sums = torch.zeros(2, device=device)
        mirror = ~mirror  # alternating flips: two epochs show each image once either way
        order = torch.randperm(len(images), device=device)
        batches = order[: len(images) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE)
        for index in tqdm(batches, f"epoch {epoch}/{EPOCHS}", leave=False):
            batch = augment(to_float(images[index]), mirror[index]).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device, torch.bfloat16, enabled=fast_bf16(device)):
                z = encoder(batch)
                logits, pixels = class_head(z.mean((2, 3))), pixel_head(z)
            class_loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=LABEL_SMOOTHING)
            pixel_loss = F.mse_loss(F.pixel_shuffle(pixels.float(), encoder.patch), (batch - 0.5) / 0.25)
            for parameter in learned:
                parameter.grad = None
            (class_loss + PIXEL_WEIGHT * pixel_loss).backward()
            for weight, matrix in zip(filters, matrices):
                matrix.grad = as_matrix(weight.grad)
            for optimizer, schedule in zip(optimizers, schedules):
                optimizer.step()
                schedule.step()
            with torch.no_grad():  # BatchNorm undoes their norm: a fixed one keeps the learning rate's meaning
                for matrix in matrices:
                    matrix.mul_(len(matrix) ** 0.5 / matrix.norm())
            sums += torch.stack([class_loss, pixel_loss]).detach()
        encoder.eval()
        with torch.no_grad():
            guesses = class_head(pooled_features(encoder, data.test_images)).argmax(1).cpu()
        class_loss, pixel_loss = (sums / len(batches)).tolist()
        accuracy = (guesses == data.test_labels).float().mean()
        print(f"epoch {epoch:3}  class loss {class_loss:.4f}  pixel loss {pixel_loss:.5f}  "
              f"test accuracy {accuracy:.4f}  {time.time() - start:6.0f} s", flush=True)

    # 16-bit weights, and every figure measured on exactly these
    encoder = fuse(encoder).half().float()
    if not all(value.isfinite().all() for value in encoder.state_dict().values()):
        sys.exit("pretrain.py: the weights are not finite, and were not written; try less LEARNING_RATE")
    probe = linear_probe(pooled_features(encoder, images), labels,
                         pooled_features(encoder, data.test_images), data.test_labels.to(device))
    recipe = {name: value for name, value in constants.items() if name != "OUT"}
    recipe |= {"DATASET": data.name, "linear_probe_accuracy": round(probe, 4), "seconds": round(time.time() - start),
               "parameters": sum(p.numel() for p in encoder.parameters()), "device": device}
    weights = {name: value.half().contiguous().cpu() for name, value in encoder.state_dict().items()}
    save_torch(Path(OUT, "cifar_encoder.pt"), weights)
    write_file(Path(OUT, "cifar_encoder.json"), (json.dumps(recipe, indent=2) + "\n").encode())
    print(f"linear probe {probe:.4f}, wrote {OUT}/cifar_encoder.pt")


def build_muon(matrices: list[nn.Parameter], learning_rate: float) -> Muon:
    """Our Muon, faster on a CPU, at rates at which its updates are torch.optim.Muon's by default, those of
    Jordan et al.: orthogonal matrices (m, n) times sqrt(max(1, m / n)), where ours have 0.2 sqrt(max(m, n))."""
    groups = [{"params": [matrix], "lr": learning_rate / (0.2 * math.sqrt(matrix.shape[1]))} for matrix in matrices]
    return Muon(groups, lr=learning_rate, momentum=0.8, weight_decay=0)


def as_matrix(weight: Tensor) -> Tensor:
    """A convolution's weights (dim_out, dim_in, k, k) -> (dim_out, k * k * dim_in)"""
    return weight.permute(0, 2, 3, 1).flatten(1)


if __name__ == "__main__":
    with one_line_errors(OSError, full="try less BATCH_SIZE"):
        main()
