"""Pretrain a small ViT, six blocks of 192 on patches of 4 x 4 pixels, for the table of encoder layers in RESULTS.md.

    python -m extras.vit                        with CIFAR-10's labels
    python -m extras.vit MASKED=True            as a masked autoencoder (He et al., 2111.06377)
    python train.py ENCODER=local-dir:outputs/vit_labels

writes OUT/vit_labels or OUT/vit_masked, in timm's format.
"""
import json
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from evaluate import device, linear_probe
from extras.pretrain import augment
from optimization import adamw_and_muon, fast_bf16, prepare_cpu, take_step
from utils import load_dataset, one_line_errors, read_constants, to_float

DATASET = "cifar10"
MASKED = False
EPOCHS = 60
BATCH_SIZE = 256
LEARNING_RATE = 1e-3
OUT = "outputs"

model_args = {"img_size": 32, "patch_size": 4, "depth": 6, "class_token": False, "global_pool": "avg", "fc_norm": False}


class MaskedAutoencoder(nn.Module):
    """A quarter of the patches is encoded, and the others' pixels are predicted, each patch normalised."""

    def __init__(self, vit: nn.Module, dim: int = 128):
        super().__init__()
        self.vit, self.embed = vit, nn.Linear(vit.embed_dim, dim)
        self.mask, self.position = nn.Parameter(torch.randn(dim) * 0.02), nn.Parameter(torch.randn(1, 64, dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(dim, 4, qkv_bias=True) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 48)

    def forward(self, images: Tensor) -> Tensor:
        target = F.layer_norm(F.unfold(images, 4, stride=4).mT, (48,), eps=1e-3)
        order = torch.rand(len(images), 64, device=images.device).argsort(1)
        place = order.argsort(1)[..., None]  # of each patch; the first 16 are seen
        z = self.vit.patch_embed(images) + self.vit.pos_embed
        z = z.gather(1, order[:, :16, None].expand(-1, -1, z.shape[2]))
        z = self.embed(self.vit.norm(self.vit.blocks(z)))
        z = torch.cat([z, self.mask.to(z.dtype).expand(len(images), 48, -1)], 1)
        z = z.gather(1, place.expand(-1, -1, z.shape[2])) + self.position
        error = (self.head(self.norm(self.blocks(z))).float() - target).square().mean(2)
        return error[place[..., 0] >= 16].mean()


@torch.no_grad()
def features(vit: nn.Module, images: Tensor) -> Tensor:
    """uint8 images (N, 3, 32, 32) -> mean features (N, 192)."""
    return torch.cat([vit.forward_features((to_float(x.to(device)) - 0.5) / 0.25).mean(1) for x in images.split(500)])


def main():
    prepare_cpu()
    read_constants(globals(), sys.argv[1:])
    data = load_dataset(DATASET)
    images, labels = data.train_images.to(device), data.train_labels.to(device)
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=10, **model_args)
    model = (MaskedAutoencoder(vit) if MASKED else vit).to(device)
    optimizers = adamw_and_muon(model, ("blocks.", "vit.blocks."), LEARNING_RATE)
    steps_per_epoch, start = len(images) // BATCH_SIZE, time.time()
    for epoch in range(EPOCHS):
        model.train()
        order = torch.randperm(len(images), device=device)[: steps_per_epoch * BATCH_SIZE].view(-1, BATCH_SIZE)
        for step, index in enumerate(order, epoch * steps_per_epoch):
            mirrored = torch.rand(BATCH_SIZE, device=device) < 0.5
            x = (augment(to_float(images[index]), mirrored, pad=3) - 0.5) / 0.25
            with torch.autocast(device, torch.bfloat16, enabled=fast_bf16(device)):
                output = model(x)
            loss = output if MASKED else F.cross_entropy(output.float(), labels[index], label_smoothing=0.1)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            take_step(optimizers, step, EPOCHS * steps_per_epoch)
            model.zero_grad()
        if epoch % 10 == 9 or epoch == EPOCHS - 1:
            vit.eval()
            accuracy = linear_probe(features(vit, data.train_images), labels, features(vit, data.test_images),
                                    data.test_labels.to(device))
            print(f"epoch {epoch + 1}  loss {loss:.4f}  probe {accuracy:.4f}  {time.time() - start:.0f} s", flush=True)
    folder = Path(OUT, "vit_masked" if MASKED else "vit_labels")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: w.contiguous().cpu() for name, w in vit.state_dict().items()}, folder / "model.safetensors")
    pretrained_cfg = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 32, 32], "num_classes": 10}
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "num_classes": 10,
                                                    "model_args": model_args, "pretrained_cfg": pretrained_cfg}))


if __name__ == "__main__":
    with one_line_errors():
        main()
