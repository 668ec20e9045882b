"""Time what this repository claims to be fast against the ordinary way to do it.

    python bench.py

Each line times two things in turn, ROUNDS times, and prints their medians and the median and range of their ratios.
"""
import copy
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image, to_tensor

from models import VQRAE
from quantizers import nearest_code
from utils import FeatureCache, draw_shapes, read_constants, to_float

ROUNDS = 5
BATCH_SIZE = 64
BATCHES = 4  # of training, in each timing
SEARCHES = ((16384, 1536), (8192, 768), (1024, 64))  # codes and their width, for 8,192 tokens
read_constants(globals())
device = "cuda" if torch.cuda.is_available() else "cpu"


def seconds(run: Callable[[], object]) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name: str, ordinary: Callable[[], object], ours: Callable[[], object]):
    ordinary(), ours()  # warm-up
    times = [(seconds(ordinary), seconds(ours)) for _ in range(ROUNDS)]
    ratios = [a / b for a, b in times]
    medians = [statistics.median(column) for column in zip(*times)]
    print(f"{name:52} {medians[0] * 1000:9.1f} {medians[1] * 1000:9.1f} {statistics.median(ratios):6.2f} "
          f"{min(ratios):5.2f}-{max(ratios):.2f}", flush=True)


class Files(Dataset):
    """Pictures as an image folder's data set gives them, less the reading: PIL, transforms, one at a time."""

    def __init__(self, images: torch.Tensor):
        self.images = [to_pil_image(image) for image in images]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return to_tensor(self.images[i])


def training():
    """Stage 1 with L2 and feature prediction: DataLoader, fp32 and an encoder in each step, or as train.py does it."""
    images = draw_shapes(32, train=BATCH_SIZE * BATCHES, test=10).train_images
    model = VQRAE().to(device).train()
    teacher = copy.deepcopy(model.encoder).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    fused = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    loader = DataLoader(Files(images), BATCH_SIZE, shuffle=True, num_workers=2, persistent_workers=True)
    on_device = images.to(device)
    features = FeatureCache(teacher, on_device, 4.0)

    def step(batch, z, optimizer):
        z_q, loss, _ = model.quantize(z)
        loss = loss + F.mse_loss(model.decode(z_q), batch) + sum(model.compute_distillation_loss(z, z_q, z))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def ordinary():
        for batch in loader:
            batch = batch.to(device)
            with torch.no_grad():
                z = teacher(batch)
            step(batch, z, optimizer)

    def ours():
        for index in torch.randperm(len(images), device=device).split(BATCH_SIZE):
            with torch.autocast(device, torch.bfloat16):
                step(to_float(on_device[index]), features[index], fused)

    compare(f"stage 1, {len(images)} pictures (bf16, features kept, no workers)", ordinary, ours)


@torch.no_grad()
def searches():
    """The nearest of many codes: cdist and argmin, as vector-quantize-pytorch's SimVQ does it, and nearest_code."""
    for codes, width in SEARCHES:
        codebook = F.normalize(torch.randn(codes, width, device=device), dim=-1)
        x = F.normalize(torch.randn(8192, width, device=device), dim=-1)
        for items in (1, 32):
            batch = x.view(items, -1, width)
            same = (torch.cdist(batch, codebook).argmin(-1).flatten() == nearest_code(x, codebook)).float().mean()
            compare(f"{codes:,} x {width:,} codes, {items} x {8192 // items:,} tokens ({same:.2%} equal)",
                    lambda: torch.cdist(batch, codebook).argmin(-1), lambda: nearest_code(x, codebook))


@torch.no_grad()
def tokenizing():
    """What quantizing adds to the encoder, and looking codes up to the decoder: ratios near 1 mean nothing."""
    print(f"\n{'':52} {'tokens':>9} {'bare':>9} {'ratio':>6} {'range':>10}")
    images = torch.rand(BATCH_SIZE, 3, 32, 32, device=device)
    for name, options in (("fsq", {}), ("simvq", {"code_dim": 16}), ("ema_vq", {"code_dim": 16}), ("ddcl", {})):
        model = VQRAE(quantizer=name, quantizer_options=options, adapter_depth=0).to(device).eval()
        z_q, _, indices = model.encode(images)
        compare(f"encode_to_indices / encoder, {name}", lambda: model.encode_to_indices(images), lambda: model.encoder(images))
        compare(f"decode_from_indices / decode, {name}", lambda: model.decode_from_indices(indices), lambda: model.decode(z_q))


if __name__ == "__main__":
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, medians of {ROUNDS} rounds, in milliseconds\n")
    print(f"{'':52} {'ordinary':>9} {'ours':>9} {'ratio':>6} {'range':>10}")
    training()
    searches()
    tokenizing()
