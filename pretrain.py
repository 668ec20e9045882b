"""How the shipped encoder was made: a small convolutional network learns CIFAR-10's classes and its pixels.

    python pretrain.py OUT=first
    python pretrain.py START=first/cifar_encoder.pt EPOCHS=10 LEARNING_RATE=0.1 CUTOUT=7

The second, which goes on from the first with stronger augmentation, writes checkpoints/pretrained/cifar_encoder.pt
(16-bit weights, BatchNorm folded in) and, beside it, cifar_encoder.json with both recipes and what was measured. Run
once, by us; train.py only loads the result.
"""
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models import ConvEncoder, ConvNorm
from quantizers import check, fast_bf16
from utils import linear_probe, load_dataset, read_constants, save_torch, to_float, write_file

# data
DATASET = "cifar10"  # or a folder of the same images, with train/<class>/ and test/<class>/
# training: 14 epochs keep a 2-core CPU busy for 40 minutes
START = None  # an encoder to go on from; None: start anew
EPOCHS = 14
BATCH_SIZE = 256
LEARNING_RATE = 0.2  # SGD's peak, reached after a fifth of the steps, then down to 0
CUTOUT = 0  # side of the square that is greyed out in each image, in pixels
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.1
PIXEL_WEIGHT = 1.0  # of the pixels' squared error, read off each token by one linear layer; 0: classes alone
SEED = 0
OUT = "checkpoints/pretrained"  # where cifar_encoder.pt and cifar_encoder.json go


def augment(images: Tensor, pad: int = 4, cutout: int = 0) -> Tensor:
    """Images (B, 3, H, W) shifted by up to `pad` pixels (borders reflected), half of them mirrored, each with a square
    of `cutout` pixels a side greyed out."""
    (b, _, h, w), device = images.shape, images.device
    padded = F.pad(images, (pad,) * 4, mode="reflect")
    y = torch.randint(2 * pad + 1, (b, 1), device=device) + torch.arange(h, device=device)
    x = torch.randint(2 * pad + 1, (b, 1), device=device) + torch.arange(w, device=device)
    x = torch.where(torch.rand(b, 1, device=device) < 0.5, x, x.flip(1))
    image = torch.arange(b, device=device)[:, None, None]
    images = padded[image, :, y[:, :, None], x[:, None]].permute(0, 3, 1, 2)
    offsets = [torch.arange(n, device=device) - torch.randint(n, (b, 1), device=device) + cutout // 2 for n in (h, w)]
    rows, columns = [(offset >= 0) & (offset < cutout) for offset in offsets]
    return torch.where((rows[:, :, None] & columns[:, None])[:, None], 0.5, images)


@torch.no_grad()
def unfuse(encoder: ConvEncoder, images: Tensor):
    """Put BatchNorms behind the convolutions into which they were folded, without changing the features of images
    (B, 3, 32, 32)."""
    def on_first_pass(module, _, x):
        mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3))
        size = module.conv.weight.flatten(1).norm(dim=1)
        module.norm = nn.BatchNorm2d(len(mean))
        module.norm.weight.copy_(std)
        module.norm.bias.copy_(mean)
        module.norm.running_mean.copy_((mean - module.conv.bias) / size)
        module.norm.running_var.copy_((std / size) ** 2)
        module.conv.weight.div_(size.view(-1, 1, 1, 1))  # to length 1, so that the learning rate means what it meant
        module.conv.bias = None

    hooks = [m.register_forward_hook(on_first_pass) for m in encoder.modules() if isinstance(m, ConvNorm)]
    encoder(images)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def pooled_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """uint8 images (N, 3, 32, 32) -> the mean of each one's 8x8 features (N, 256), in fp32"""
    return torch.cat([encoder(to_float(batch)).mean((2, 3)) for batch in images.split(500)])


def main():
    try:
        constants = read_constants(globals())
        check(START is None or Path(START).is_file() and Path(START).with_suffix(".json").is_file(), "START", START,
              "None, or an encoder that this script has written")
        data = load_dataset(DATASET, image_size=32)
        check(data.train_labels is not None, "DATASET", DATASET, "a folder with a folder per class in train/ and test/")
        for name, low in {"EPOCHS": 1, "BATCH_SIZE": 1, "CUTOUT": 0, "SEED": 0}.items():
            check(type(constants[name]) is int and constants[name] >= low, name, constants[name],
                  f"a whole number of {low} or more")
        for name in ("LEARNING_RATE", "WEIGHT_DECAY", "LABEL_SMOOTHING", "PIXEL_WEIGHT"):
            check(type(constants[name]) in (int, float) and constants[name] >= 0, name, constants[name], "0 or more")
        check(BATCH_SIZE <= len(data.train_images), "BATCH_SIZE", BATCH_SIZE, "at most the number of images")
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"pretrain.py: {error}")
    torch.manual_seed(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = data.train_images.to(device), data.train_labels.to(device)

    encoder = ConvEncoder(fused=START is not None)
    if START:
        encoder.load_state_dict(torch.load(START, weights_only=True))
        unfuse(encoder, to_float(data.train_images[torch.randperm(len(data.train_images))[:1000]]))
    encoder = encoder.to(device, memory_format=torch.channels_last)
    class_head = nn.Linear(encoder.dim, len(data.classes)).to(device)
    pixel_head = nn.Conv2d(encoder.dim, 3 * encoder.patch**2, 1).to(device)
    if START:  # heads that know nothing yet would lead the encoder astray; at zero they tell it nothing
        for head in (class_head, pixel_head):
            nn.init.zeros_(head.weight)
    parameters = [*encoder.parameters(), *class_head.parameters(), *pixel_head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True)
    steps = EPOCHS * (len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(step / (0.2 * steps), (steps - step) / (0.8 * steps)))

    start = time.time()
    for epoch in range(1, EPOCHS + 1):
        encoder.train()
        sums = torch.zeros(2, device=device)
        order = torch.randperm(len(images), device=device)
        batches = order[: len(images) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE)
        for index in tqdm(batches, f"epoch {epoch}/{EPOCHS}", leave=False):
            batch = augment(to_float(images[index]), cutout=CUTOUT).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device, torch.bfloat16, enabled=fast_bf16(device)):
                z = encoder(batch)
                logits, pixels = class_head(z.mean((2, 3))), pixel_head(z)
            class_loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=LABEL_SMOOTHING)
            pixel_loss = F.mse_loss(F.pixel_shuffle(pixels.float(), encoder.patch), (batch - 0.5) / 0.25)
            optimizer.zero_grad(set_to_none=True)
            (class_loss + PIXEL_WEIGHT * pixel_loss).backward()
            optimizer.step()
            schedule.step()
            sums += torch.stack([class_loss, pixel_loss]).detach()
        encoder.eval()
        with torch.no_grad():
            guesses = class_head(pooled_features(encoder, data.test_images.to(device))).argmax(1).cpu()
        class_loss, pixel_loss = (sums / len(batches)).tolist()
        accuracy = (guesses == data.test_labels).float().mean()
        print(f"epoch {epoch:3}  class loss {class_loss:.4f}  pixel loss {pixel_loss:.5f}  "
              f"test accuracy {accuracy:.4f}  {time.time() - start:6.0f} s", flush=True)

    # 16-bit weights, and every figure measured on exactly these
    encoder = encoder.fuse().half().float()
    probe = linear_probe(pooled_features(encoder, images), labels,
                         pooled_features(encoder, data.test_images.to(device)), data.test_labels.to(device))
    recipe = {name: value for name, value in constants.items() if name != "OUT"}
    recipe |= {"DATASET": data.name, "linear_probe_accuracy": round(probe, 4), "seconds": round(time.time() - start),
               "parameters": sum(p.numel() for p in encoder.parameters()), "device": device}
    if START:
        recipe["START"] = json.loads(Path(START).with_suffix(".json").read_text())
    weights = {name: value.half().contiguous().cpu() for name, value in encoder.state_dict().items()}
    save_torch(Path(OUT, "cifar_encoder.pt"), weights)
    write_file(Path(OUT, "cifar_encoder.json"), (json.dumps(recipe, indent=2) + "\n").encode())
    print(f"linear probe {probe:.4f}, wrote {OUT}/cifar_encoder.pt")


if __name__ == "__main__":
    main()
