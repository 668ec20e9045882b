"""Make images: train a prior, which predicts a checkpoint's tokens, then measure its bits and its samples.

    python -m extras.generate                                     tokens of vqrae_fsq.pt
    python -m extras.generate CHECKPOINT=<path> DATASET=shapes    tokens of another checkpoint

In training any number of an image's tokens is masked. The prior predicts them from the others and the class
(absorbing-state diffusion, MD4, 2406.04329). A new image is a grid of masked tokens, which are filled in a few steps.

Samples go to outputs/<run>/, prior.pt goes to checkpoints/<run>/. The same command resumes a run.
"""
import json
import math
import os
import sys
import time
from pathlib import Path

# OpenMP's waiting threads shall sleep soon, as in train.py.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import utils
from data import DECODE_GB, Dataset, find_dataset, load_dataset
from extras.measure import frechet_distance, linear_probe, load_judges, pooled_features
from models import PRETRAINED_DIR, VQRAE, ResidualBlock, TransformerBlock, load_checkpoint
from muon import adamw_and_muon, take_step
from quantizers import InputError, Quantizer, check, join_indices, require, split_indices
from utils import device, progress, to_float

gpu = device == "cuda"
CHECKPOINT = str(PRETRAINED_DIR / "vqrae_fsq.pt")  # a file of train.py
DATASET = "auto"  # as in train.py
FLIP = True  # mirror half of the training images
# model
DIM = 192  # width
DEPTH = 3  # pairs of a convolutional and a transformer block
# training
EPOCHS = 200 if gpu else 6
BATCH_SIZE = 128 if gpu else 32
LEARNING_RATE = 1e-3 if gpu else 2e-3  # AdamW's; Muon's is twice this
DROP_LABEL = 0.1  # fraction of images whose class is hidden, which guidance needs
EVAL_IMAGES = 1_000  # test images measured after an epoch; at the end all are
SEED = 0
# sampling
STEPS = 16  # to fill an image's tokens
GUIDANCE = 4.0  # 1: none; with more, samples are more like their class
TEMPERATURE = 1.0
SAMPLES = 10_000  # measured at the end

kinds = {str: "CHECKPOINT DATASET", bool: "FLIP", float: "LEARNING_RATE DROP_LABEL GUIDANCE TEMPERATURE",
         int: "DIM DEPTH EPOCHS BATCH_SIZE EVAL_IMAGES SEED STEPS SAMPLES"}
autocast = torch.autocast(device, torch.bfloat16, enabled=utils.fast_bf16(device))
most_codes = 4_096  # of a codebook: an image shows few tokens, and each code has to be seen often


class Prior(nn.Module):
    """The distribution of a grid of tokens, with or without a class.

    A token has one digit, its index in a codebook, or several: FSQ's levels, or indices in several codebooks.
    It enters as the sum of its digits' embeddings, and a masked token as a learned vector. Digits depend on each
    other, so each is predicted from the blocks' output and the digits before it (NADE, 1605.02226).
    """

    def __init__(self, sizes: list[int], grid: list[int], classes: int, dim: int, depth: int):
        """sizes: how many values each digit has; grid: (h, w); classes: 0 without labels."""
        super().__init__()
        self.config = dict(sizes=sizes, grid=grid, classes=classes, dim=dim, depth=depth)
        self.sizes, self.grid, self.classes, self.tokens = tuple(sizes), tuple(grid), classes, math.prod(grid)
        starts = [sum(sizes[:k]) for k in range(len(sizes))]  # each digit's first row in a table of all digits
        self.register_buffer("starts", torch.tensor(starts), persistent=False)
        self.embed = nn.Parameter(torch.randn(sum(sizes), dim) * 0.1)
        self.embed_label = nn.Embedding(classes + 1, dim)  # the last row stands for no class
        self.position = nn.Parameter(torch.randn(self.tokens, dim) * 0.02)
        self.mask = nn.Parameter(torch.randn(dim) * 0.02)
        blocks = []
        for _ in range(depth):
            blocks += [ResidualBlock(dim, dim * 2 // 3), TransformerBlock(dim, math.ceil(dim / 64))]
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(dim)
        self.project = nn.Linear(dim, len(sizes) * dim)
        self.from_earlier = nn.Parameter(torch.randn(sum(sizes), len(sizes) * dim) * 0.1)
        self.heads = nn.ModuleList(nn.Linear(dim, size) for size in sizes)
        for p in self.heads.parameters():  # at first all digits are equally likely
            nn.init.zeros_(p)

    def split(self, indices: Tensor) -> Tensor:
        """indices (B, h, w) -> digits (B, N, k)."""
        return split_indices(indices.flatten(1).to(self.mask.device, torch.int64), self.sizes)

    def look_up(self, table: Tensor, digits: Tensor) -> Tensor:
        """The sums (..., dim) of a table's rows for the first digits (..., n). table: (sum of sizes, dim)."""
        return F.embedding(digits + self.starts[: digits.shape[-1]], table).sum(-2)

    def features(self, digits: Tensor, masked: Tensor, labels: Tensor) -> Tensor:
        """digits (B, N, k), masked (B, N) bool, labels (B,) -> features (M, k, dim) of the M masked tokens."""
        z = torch.where(masked[..., None], self.mask, self.look_up(self.embed, digits))
        z = z + self.position + self.embed_label(labels)[:, None]
        z = self.blocks(z.mT.unflatten(2, self.grid)).flatten(2).mT
        return self.project(self.norm(z[masked])).unflatten(1, (len(self.sizes), -1))

    def logits(self, k: int, features: Tensor, digits: Tensor) -> Tensor:
        """features (M, k, dim), digits (M, k) -> logits (M, sizes[k]) of digit k, given the digits before it."""
        table = self.from_earlier.chunk(len(self.sizes), 1)[k]
        return self.heads[k](F.gelu(features[:, k] + self.look_up(table, digits[:, :k]))).float()

    def forward(self, digits: Tensor, masked: Tensor, labels: Tensor) -> Tensor:
        """The mean bits of an image's masked tokens, times its number of tokens (B,). Arguments as in `features`.

        Each image needs a masked token. The mean over draw_masks bounds -log2 p(tokens | label) from above: this is
        MD4's bound in continuous time, or the mean over all orders of tokens (any-order models, 2110.02037).
        """
        targets, features = digits[masked], self.features(digits, masked, labels)
        nats = sum(F.cross_entropy(self.logits(k, features, targets), targets[:, k], reduction="none")
                   for k in range(len(self.sizes)))  # a token's digits together
        nats = nats.new_zeros(masked.shape).masked_scatter(masked, nats)
        return nats.sum(1) / masked.sum(1) * (self.tokens / math.log(2))

    def generate(self, labels: Tensor, **options) -> Tensor:
        """labels (B,) -> indices (B, h, w) of new images. The options are those of `fill`."""
        mask = torch.ones(len(labels), *self.grid, dtype=torch.bool)
        return self.fill(mask.long(), mask, labels, **options)

    @torch.no_grad()
    def fill(self, indices: Tensor, mask: Tensor, labels: Tensor | None = None, steps: int = 16,
             guidance: float = 4.0, temperature: float = 1.0) -> Tensor:
        """indices (B, h, w), with new ones where mask (B, h, w) is True, given the others and labels (B,).

        Tokens are filled in a random order. Later steps fill more tokens, which then depend less on each other
        (MaskGIT's square schedule, 2202.04200). Arguments may be lists.
        labels: numbers of classes; `classes` itself, as None for all images, stands for no class
        guidance: the mean classifier-free scale (2207.12598), which rises from about 1 (Muse, 2301.00704)
        InputError for other shapes or ranges.
        """
        indices, mask = torch.as_tensor(indices), torch.as_tensor(mask)
        none, codes = torch.full((len(indices),), self.classes), math.prod(self.sizes)
        labels = none if labels is None else torch.as_tensor(labels).cpu()
        valid = indices.numel() and indices.shape[1:] == self.grid and 0 <= indices.min() <= indices.max() < codes
        check(valid, "indices", tuple(indices.shape), f"(B, {self.grid[0]}, {self.grid[1]}), whole numbers below {codes}")
        valid = labels.shape == none.shape and 0 <= labels.min() <= labels.max() <= self.classes
        check(valid, "labels", labels.tolist(), f"{len(none)} whole numbers from 0 to {self.classes}")
        check(mask.shape == indices.shape and mask.dtype == torch.bool, "mask", tuple(mask.shape), "bool, as indices")
        check(steps >= 1 and guidance >= 1 and temperature > 0, "steps, guidance, temperature",
              (steps, guidance, temperature), "1 or more, 1 or more, above 0")

        digits, masked = self.split(indices), mask.flatten(1).to(self.mask.device)
        count = masked.sum(1, keepdim=True)
        # an image's masked tokens get the places 0, 1, ... in its random order
        places = torch.rand(masked.shape, device=masked.device).masked_fill(~masked, 2).argsort(1).argsort(1)
        steps = count.clamp(max=steps)  # (B, 1): an image with few masked tokens takes fewer
        conditions = [labels] if guidance == 1 or torch.equal(labels, none) else [labels, none]
        for step in range(1, int(steps.max()) + 1):
            filled = (count * (step / steps) ** 2).clamp(min=step)  # after this step
            chosen = masked & (places < filled)
            scale = (1 + (guidance - 1) * (2 * step - 1) / steps).expand_as(chosen)[chosen][:, None]
            features = []
            for condition in conditions:
                features.append(self.features(digits, masked, condition.to(masked.device))[chosen[masked]])
            drawn = torch.zeros_like(digits[chosen])
            for k in range(len(self.sizes)):
                logits = [self.logits(k, z, drawn) for z in features]  # with the class and, if there are two, without
                guided = logits[-1] + scale * (logits[0] - logits[-1])
                drawn[:, k] = torch.multinomial((guided / temperature).softmax(1), 1)[:, 0]
            digits[chosen] = drawn
            masked = masked & ~chosen
        return join_indices(digits, self.sizes).view(indices.shape)


def digit_sizes(quantizer: Quantizer) -> list[int]:
    """How many values each digit of this quantizer's indices has. InputError if a prior cannot predict them."""
    sizes = list(getattr(quantizer, "levels", quantizer.codebook_sizes))
    most = max(sizes, default=0)
    require(0 < most <= most_codes, f"A prior predicts codebooks of 1 to {most_codes:,} codes, and this tokenizer's "
            f"{quantizer.config['quantizer']!r} has {most:,}. Train one with QUANTIZER=fsq, ddcl, residual_vq, "
            f"product_vq or residual_fsq, or with CODEBOOK_SIZE={most_codes}.")
    return sizes


def build_prior(quantizer: Quantizer, grid: list[int], classes: int, dim: int, depth: int) -> Prior:
    """An untrained prior of this quantizer's tokens."""
    return Prior(digit_sizes(quantizer), grid, classes, dim, depth)


def load_prior(path: str | Path) -> Prior:
    """The prior in a file of this script, in eval mode. InputError for another or a damaged file."""
    content = utils.load_torch(path, "config", "model")
    with utils.errors_as(InputError, f"The checkpoint {path} does not fit this code"):
        config, weights = content["config"], content["model"]
        prior = Prior(*(config[name] for name in ("sizes", "grid", "classes", "dim", "depth")))
        if "embed.weight" in weights:  # the shipped file is older, and has two empty tensors more
            weights["embed"] = weights.pop("embed.weight").T
            weights = {name: weight for name, weight in weights.items() if weight.numel()}
        prior.load_state_dict(weights)
        require(all(p.isfinite().all() for p in prior.parameters()), "its weights are not finite")
    return prior.eval()


# Bits

def draw_masks(count: int, tokens: int, generator: torch.Generator | None = None) -> Tensor:
    """(count, tokens) bool, with 1 to `tokens` True in a row. The numbers are evenly spread, for less variance."""
    ratio = (torch.randperm(count, generator=generator) + torch.rand(1, generator=generator)) / count % 1
    places = torch.rand(count, tokens, generator=generator).argsort(1)
    return places < (ratio * tokens).long()[:, None] + 1


@torch.no_grad()
def measure_bits(prior: Prior, indices: Tensor, labels: Tensor, masks: int = 8) -> float:
    """The bound in bits an image, in fp32: the mean over indices (N, h, w) with labels (N,), with `masks` masks each.

    Masks are the same in each call.
    """
    bits, generator, device = [], torch.Generator().manual_seed(0), prior.mask.device
    batches = list(zip(indices.split(250), labels.split(250)))
    for batch, given in progress(batches * masks, "measuring"):
        masked = draw_masks(len(batch), prior.tokens, generator)
        bits.append(prior(prior.split(batch), masked.to(device), given.to(device)))
    return torch.cat(bits).mean().item()


# Training

def objective(prior: Prior, indices: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """indices (B, h, w), labels (B,) -> the loss and the bound, in bits a token, under random masks.

    The loss is the cross-entropy of all masked tokens, as in MaskGIT. The bound weights it by 1 / mask ratio.
    """
    labels = labels.masked_fill(torch.rand(len(labels)) < DROP_LABEL, prior.classes)
    masked = draw_masks(len(labels), prior.tokens).to(device)
    with autocast:
        bits = prior(prior.split(indices), masked, labels.to(device)) / prior.tokens
    return (bits * masked.float().mean(1)).mean(), bits.detach().mean()


def train(prior: Prior, vqrae: VQRAE, tokens: dict[str, Tensor], data: Dataset, run: utils.Run, constants: dict):
    """Train from the first epoch or where the run was stopped. Each epoch writes samples and a checkpoint."""
    optimizers = adamw_and_muon(prior, ("blocks.",), LEARNING_RATE)
    state, steps = {"prior": prior, **optimizers}, len(data.train_labels) // BATCH_SIZE
    print(" epoch   bits a token: training    test  images/s  seconds")
    for epoch in range(run.resume(state), EPOCHS + 1):
        utils.seed_everything(SEED, epoch)  # an epoch is the same in a resumed run
        start, bits = time.time(), []
        order = torch.randperm(len(data.train_labels)).split(BATCH_SIZE)[:steps]
        for step, index in enumerate(progress(order, f"epoch {epoch}/{EPOCHS}"), (epoch - 1) * steps):
            version = torch.randint(len(tokens["train"]), (BATCH_SIZE,))  # the image or, with FLIP, its mirror image
            loss, bound = objective(prior, tokens["train"][version, index], data.train_labels[index])
            loss.backward()
            take_step(optimizers, step, EPOCHS * steps)
            prior.zero_grad()
            bits.append(bound)
        seconds, bits = time.time() - start, torch.stack(bits).mean().item()
        require(math.isfinite(bits), f"The bits of epoch {epoch} are {bits}: try a lower LEARNING_RATE.")
        test_bits = measure_bits(prior, tokens["test"][:EVAL_IMAGES], data.test_labels[:EVAL_IMAGES], 1) / prior.tokens
        row = {"epoch": epoch, "bits": bits, "test_bits": test_bits, "seconds": seconds}
        print(f"{epoch:6} {bits:24.3f} {test_bits:7.3f} {steps * BATCH_SIZE / seconds:9,.0f} {seconds:8.0f}", flush=True)
        run.check_folder()
        classes = torch.arange(min(max(prior.classes, 1), 10))
        utils.save_grid(run.outputs / f"epoch_{epoch:03}.png", sample(prior, vqrae, classes.repeat(6)), len(classes))
        weights = {name: weight.half() for name, weight in prior.state_dict().items()}
        content = {"config": prior.config, "model": weights, "metrics": row, "constants": constants}
        utils.save_torch(run.checkpoints / "prior.pt", content)
        run.save(row, state)


def tokenize(vqrae: VQRAE, images: Tensor, mirrored: bool = False) -> Tensor:
    """uint8 images (N, 3, H, W), perhaps mirrored -> indices (N, h, w)."""
    indices = []
    for batch in progress(images.split(250), "tokenizing"):
        batch = to_float((batch.flip(3) if mirrored else batch).to(device))
        indices.append(vqrae.encode_to_indices(batch).cpu())
    return torch.cat(indices)


def load_tokens(vqrae: VQRAE, data: Dataset, path: Path) -> dict[str, Tensor]:
    """Indices of "test" (N, h, w) and of "train" (1, N, h, w) or, with mirror images, (2, N, h, w), kept in a file."""
    if not path.exists():
        train = [tokenize(vqrae, data.train_images, mirrored) for mirrored in (False, True)[: 1 + FLIP]]
        utils.save_torch(path, {"train": torch.stack(train), "test": tokenize(vqrae, data.test_images)})
    return utils.load_torch(path, "train", "test")


# Samples

@torch.no_grad()
def sample(prior: Prior, vqrae: VQRAE, labels: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) of classes (B,)."""
    images = []
    for batch in progress(labels.split(250), "sampling"):
        with autocast:
            indices = prior.generate(batch, steps=STEPS, guidance=GUIDANCE, temperature=TEMPERATURE)
        images.append((vqrae.decode_from_indices(indices) * 255).round().byte().cpu())
    return torch.cat(images)


def measure(prior: Prior, vqrae: VQRAE, tokens: dict[str, Tensor], data: Dataset, run: utils.Run):
    """Write results.json, which ends a run: bits an image, Fréchet distances by load_judges, and a probe's accuracy.

    Samples and as many training images are compared with test images. The probe learns "cifar"'s features.
    """
    labels, test = data.test_labels, data.test_images
    results = {"nominal_bits": prior.tokens * math.log2(vqrae.quantizer.codebook_size),
               "bits": measure_bits(prior, tokens["test"], torch.full_like(labels, prior.classes)),
               "bits_given_class": measure_bits(prior, tokens["test"], labels)}
    utils.seed_everything(SEED)
    classes = labels[torch.randint(len(labels), (SAMPLES,))]  # as frequent as in the test images
    samples, judges = sample(prior, vqrae, classes), load_judges(vqrae.token_size, test.shape[-1])
    for name, judge in judges.items():
        expected = pooled_features(judge, test)
        for suffix, images in {"": samples, "_of_training": data.train_images[:SAMPLES]}.items():
            results[f"frechet_{name}{suffix}"] = frechet_distance(expected, pooled_features(judge, images))
    if prior.classes > 1:
        features = pooled_features(judges["cifar"], data.train_images)
        for name, images, y in (("test", test, labels), ("samples", samples, classes)):
            seen = pooled_features(judges["cifar"], images)
            results[f"probe_{name}"] = linear_probe(features, data.train_labels.to(device), seen, y.to(device))
    with utils.replace_file(run.outputs / "results.json") as draft:
        draft.write_text(json.dumps(results, indent=2), "utf-8")
    print(*(f"{name:25} {value:10,.3f}" for name, value in results.items()), f"see {run.outputs}/", sep="\n")


# Set-up

def main():
    if not gpu:
        utils.prepare_cpu()
    constants = utils.read_constants(globals(), sys.argv[1:], kinds)
    check(0 < DROP_LABEL < 1, "DROP_LABEL", DROP_LABEL, "between 0 and 1")
    check(TEMPERATURE > 0, "TEMPERATURE", TEMPERATURE, "above 0")
    check(DIM > 1 and DIM % math.ceil(DIM / 64) == 0, "DIM", DIM, "a multiple of 64")
    least = {"DEPTH": 1, "EPOCHS": 1, "BATCH_SIZE": 1, "EVAL_IMAGES": 1, "STEPS": 1, "GUIDANCE": 1, "SAMPLES": 2}
    for name, value in least.items():
        check(constants[name] >= value, name, constants[name], f"{value} or more")
    vqrae = load_checkpoint(CHECKPOINT)
    digit_sizes(vqrae.quantizer)  # a wrong quantizer is refused before images are read
    dataset, files = find_dataset(DATASET)
    constants |= {"CHECKPOINT": Path(CHECKPOINT).name, "DATASET": Path(dataset).resolve().name}  # wherever they are
    key = utils.digest((constants, files, os.path.getmtime(CHECKPOINT)))
    run = utils.Run(f"prior_{constants['DATASET']}_{vqrae.config['quantizer']}_{key}")
    if run.finished:
        print(f"This run is finished: see {run.outputs}/. For another, change a constant, or SEED if code changed.")
        return
    data = load_dataset(dataset, vqrae.config["image_size"])
    check(isinstance(data.train_images, Tensor), "DATASET", DATASET, f"{DECODE_GB} GB of images at most")
    count, tested = len(data.train_images), len(data.test_images)
    require(min(count, tested) > 1, f"{count} training and {tested} test images are too few: a Fréchet distance needs two.")
    check(BATCH_SIZE <= count, "BATCH_SIZE", BATCH_SIZE, f"at most the {count} training images")
    if data.train_labels is None:  # the only label is 0, which stands for no class
        data = data._replace(train_labels=torch.zeros(count).long(), test_labels=torch.zeros(tested).long())
    utils.seed_everything(SEED)
    prior = build_prior(vqrae.quantizer, [vqrae.config["grid"]] * 2, len(data.classes), DIM, DEPTH).to(device)
    print(f"{run.name}: {count:,} training and {tested:,} test images, "
          f"{sum(p.numel() for p in prior.parameters()) / 1e6:.1f} M parameters, {device}", flush=True)
    tokens = load_tokens(vqrae.to(device), data, run.checkpoints / "tokens.pt")
    train(prior, vqrae, tokens, data, run, constants)
    measure(load_prior(run.checkpoints / "prior.pt").to(device), vqrae, tokens, data, run)


if __name__ == "__main__":
    with utils.one_line_errors("stopped; the same command goes on after the last epoch above"):
        main()
