"""Make images: train a prior, a model of a checkpoint's tokens, and measure its bits and its samples.

    python -m extras.generate                                     tokens of vqrae_fsq.pt
    python -m extras.generate CHECKPOINT=<path> DATASET=shapes    tokens of another checkpoint

The prior predicts masked tokens, any number of them, from the others and the class (MD4, 2406.04329).
Samples and figures go to outputs/<run>/, prior.pt goes to checkpoints/<run>/. The same command resumes a run.
"""
import json
import math
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:  # train.py says why
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import utils
from data import DECODE_GB, Dataset, find_dataset, load_dataset
from extras.measure import frechet_distance, linear_probe, load_judges, pooled_features
from models import PRETRAINED_DIR, VQRAE, ResidualBlock, TransformerBlock, load_checkpoint, load_model
from muon import adamw_and_muon, take_step
from quantizers import Quantizer, check, check_range, join_indices, require, split_indices
from utils import device, progress, to_float

gpu = device == "cuda"
CHECKPOINT = str(PRETRAINED_DIR / "vqrae_fsq.pt")
DATASET = "auto"  # as in train.py
# model
DIM = 192  # width
DEPTH = 3  # pairs of a convolutional and a transformer block
# training
EPOCHS = 200 if gpu else 6
BATCH_SIZE = 128 if gpu else 32
LEARNING_RATE = 1e-3 if gpu else 2e-3  # AdamW's; Muon's is twice this
SEED = 0
# samples
STEPS = 16  # to fill an image's tokens
GUIDANCE = 4.0  # 1: none; with more, samples are more like their class
SAMPLES = 2_000  # measured after each epoch

kinds = {str: "CHECKPOINT DATASET", float: "LEARNING_RATE GUIDANCE",
         int: "DIM DEPTH EPOCHS BATCH_SIZE SEED STEPS SAMPLES"}
autocast = torch.autocast(device, torch.bfloat16, enabled=utils.fast_bf16(device))
most_codes = 4_096  # in a codebook: of more, most would be seen too rarely


class Prior(nn.Module):
    """The distribution of an image's tokens, with or without its class.

    A token has one digit, its index in a codebook, or several: FSQ's levels, or indices in several codebooks.
    Digits depend on each other: each is predicted from the network's output and the digits before it (1605.02226).
    """

    def __init__(self, sizes: list[int], grid: list[int], classes: int, dim: int, depth: int, **older):
        """sizes: the number of values of each digit; grid: (h, w); classes: 0 without labels."""
        super().__init__()
        self.config = dict(sizes=sizes, grid=grid, classes=classes, dim=dim, depth=depth)
        self.sizes, self.grid, self.classes, self.tokens = tuple(sizes), tuple(grid), classes, math.prod(grid)
        self.starts = [sum(sizes[:k]) for k in range(len(sizes))]  # tables have digit k's rows from starts[k] on
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

    def embed_digits(self, digits: Tensor, table: Tensor) -> Tensor | int:
        """The first digits (..., n) of tokens -> the sums (..., dim) of their rows in a table."""
        return sum(F.embedding(digit + start, table) for digit, start in zip(digits.unbind(-1), self.starts))

    def features(self, digits: Tensor, masked: Tensor, labels: Tensor) -> Tensor:
        """digits (B, N, k), masked (B, N) bool, labels (B,) -> features (M, k, dim) of the M masked tokens."""
        z = torch.where(masked[..., None], self.mask, self.embed_digits(digits, self.embed))
        z = z + self.position + self.embed_label(labels)[:, None]
        z = self.blocks(z.mT.unflatten(2, self.grid)).flatten(2).mT
        return self.project(self.norm(z[masked])).unflatten(1, (len(self.sizes), -1))

    def logits(self, k: int, features: Tensor, digits: Tensor) -> Tensor:
        """features (M, k, dim), digits (M, k) -> logits (M, sizes[k]) of digit k, given the digits before it."""
        earlier = self.embed_digits(digits[:, :k], self.from_earlier.chunk(len(self.sizes), 1)[k])
        return self.heads[k](F.gelu(features[:, k] + earlier)).float()

    def forward(self, indices: Tensor, masked: Tensor, labels: Tensor) -> Tensor:
        """indices (B, h, w), masked (B, N), labels (B,) -> the mean bits of an image's masked tokens, times N (B,).

        Averaged over draw_masks, this is a bound on -log2 p(tokens | label): the mean over all orders in which tokens
        can follow each other (2110.02037), or MD4's bound in continuous time.
        """
        digits = split_indices(indices.flatten(1), self.sizes).to(self.mask.device)
        masked, labels = masked.to(digits.device), labels.to(digits.device)
        targets, features, nats = digits[masked], self.features(digits, masked, labels), 0
        for k in range(len(self.sizes)):
            nats = nats + F.cross_entropy(self.logits(k, features, targets), targets[:, k], reduction="none")
        nats = nats.new_zeros(masked.shape).masked_scatter(masked, nats)
        return nats.sum(1) / masked.sum(1) * (self.tokens / math.log(2))

    def generate(self, labels: Tensor, **options) -> Tensor:
        """labels (B,) -> indices (B, h, w) of new images. The options are those of `fill`."""
        mask = torch.ones(len(labels), *self.grid, dtype=torch.bool)
        return self.fill(mask.long(), mask, labels, **options)

    @torch.no_grad()
    def fill(self, indices: Tensor, mask: Tensor, labels: Tensor | None = None, steps: int = 16,
             guidance: float = 4.0, temperature: float = 1.0) -> Tensor:
        """indices (B, h, w) with new ones where mask (B, h, w) is True, given the others and labels (B,).

        The order is random. Later steps fill more tokens (MaskGIT's square schedule, 2202.04200). Lists serve as well.
        labels: classes from 0; None or the number `classes` stands for no class
        guidance: the mean classifier-free scale (2207.12598), which rises from about 1 (Muse, 2301.00704)
        InputError for other shapes or ranges.
        """
        indices, mask = torch.as_tensor(indices), torch.as_tensor(mask)
        none = torch.full((len(indices),), self.classes, device=self.mask.device)
        labels = none if labels is None else torch.as_tensor(labels, device=none.device)
        shapes, grid = [tuple(x.shape) for x in (indices, mask, labels)], (len(indices), *self.grid)
        require(len(indices) and mask.dtype == torch.bool and shapes == [grid, grid, grid[:1]],
                f"indices, mask (bool) and labels must be {grid}, {grid} and {grid[:1]}, not {shapes}, {mask.dtype}.")
        check_range(indices, 0, math.prod(self.sizes) - 1, "indices")
        check_range(labels, 0, self.classes, "labels")
        check(steps >= 1 and guidance >= 1 and temperature > 0, "steps, guidance, temperature",
              (steps, guidance, temperature), "1 or more, 1 or more, above 0")

        digits = split_indices(indices.flatten(1).long(), self.sizes).to(self.mask.device)
        masked = mask.flatten(1).to(digits.device)
        count = masked.sum(1, keepdim=True)  # (B, 1)
        # places 0, 1, ... of an image's masked tokens in its random order
        places = torch.rand(masked.shape, device=masked.device).masked_fill(~masked, 2).argsort(1).argsort(1)
        steps = count.clamp(max=steps)  # few tokens take fewer steps
        conditions = [labels] if guidance == 1 or torch.equal(labels, none) else [labels, none]
        for step in range(1, int(steps.max()) + 1):
            chosen = masked & (places < (count * (step / steps) ** 2).clamp(min=step))
            features = [self.features(digits, masked, given)[chosen[masked]] for given in conditions]
            scale = (1 + (guidance - 1) * (2 * step - 1) / steps).expand_as(chosen)[chosen][:, None]
            drawn = torch.zeros_like(digits[chosen])
            for k in range(len(self.sizes)):
                logits = [self.logits(k, z, drawn) for z in features]
                guided = logits[-1] + scale * (logits[0] - logits[-1])
                drawn[:, k] = torch.multinomial((guided / temperature).softmax(1), 1)[:, 0]
            digits[chosen] = drawn
            masked = masked & ~chosen
        return join_indices(digits, self.sizes).view(indices.shape)

    def _load_from_state_dict(self, state: dict, prefix: str, *arguments):
        if "embed.weight" in state:  # the shipped file is older, with more arguments and tensors
            state["embed"] = state.pop("embed.weight").T
            del state["to_sorted"], state["from_sorted"]
        super()._load_from_state_dict(state, prefix, *arguments)


def build_prior(quantizer: Quantizer, grid: list[int], classes: int, dim: int, depth: int) -> Prior:
    """A prior of this quantizer's tokens. InputError for a codebook that is too large."""
    sizes = list(getattr(quantizer, "levels", quantizer.codebook_sizes))
    most = max(sizes, default=0)
    require(0 < most <= most_codes, f"A prior predicts codebooks of 1 to {most_codes:,} codes, not {most:,}: train a "
            "tokenizer with QUANTIZER=fsq, ddcl, residual_vq, product_vq or residual_fsq, or a small CODEBOOK_SIZE.")
    return Prior(sizes, grid, classes, dim, depth)


def load_prior(path: str | Path) -> Prior:
    """The prior in a file of this script, in eval mode. InputError for another or a damaged file."""
    return load_model(path, Prior)


def draw_masks(count: int, tokens: int, generator: torch.Generator | None = None) -> Tensor:
    """(count, tokens) bool, with 1 to `tokens` True in a row, in evenly spread numbers, for less variance."""
    ratio = (torch.randperm(count, generator=generator) + torch.rand(1, generator=generator)) / count % 1
    return torch.rand(count, tokens, generator=generator).argsort(1) < (ratio * tokens).long()[:, None] + 1


@torch.no_grad()
def measure_bits(prior: Prior, indices: Tensor, labels: Tensor) -> float:
    """The bound in bits an image, in fp32: the mean over indices (N, h, w) with labels (N,), and about 10,000 masks."""
    bits, generator, masks = [], torch.Generator().manual_seed(0), min(8, math.ceil(10_000 / len(indices)))
    for batch, given in progress([*zip(indices.split(250), labels.split(250))] * masks, "measuring"):
        bits.append(prior(batch, draw_masks(len(batch), prior.tokens, generator), given))
    return torch.cat(bits).mean().item()


def train(prior: Prior, vqrae: VQRAE, tokens: dict[str, Tensor], data: Dataset, run: utils.Run, constants: dict):
    """Train from the first epoch or where the run was stopped. Each epoch is measured, and writes samples and files."""
    optimizers = adamw_and_muon(prior, ("blocks.",), LEARNING_RATE)
    state, steps = {"prior": prior, **optimizers}, len(data.train_labels) // BATCH_SIZE
    judges = judge_images(vqrae.token_size, data)
    for epoch in range(run.resume(state), EPOCHS + 1):
        utils.seed_everything(SEED, epoch)  # an epoch is the same in a resumed run
        start, log = time.time(), []
        order = torch.randperm(len(data.train_labels)).split(BATCH_SIZE)[:steps]
        for step, index in enumerate(progress(order, f"epoch {epoch}/{EPOCHS}"), (epoch - 1) * steps):
            hidden = torch.rand(BATCH_SIZE) < 0.1  # guidance compares with predictions without a class
            labels = data.train_labels[index].masked_fill(hidden, prior.classes)
            masked = draw_masks(BATCH_SIZE, prior.tokens)
            mirrored = torch.randint(2, (BATCH_SIZE,))
            with autocast:
                bits = prior(tokens["train"][mirrored, index], masked, labels)
            ratio = masked.float().mean(1).to(device)
            (bits / prior.tokens * ratio).mean().backward()  # all masked tokens count alike, as in MaskGIT
            take_step(optimizers, step, EPOCHS * steps)
            prior.zero_grad()
            log.append(bits.detach().mean())
        seconds, bits = time.time() - start, torch.stack(log).mean().item()
        require(math.isfinite(bits), f"Epoch {epoch} ended with {bits} bits: try a lower LEARNING_RATE.")
        row = {"epoch": epoch, "seconds": seconds, "training_bits": bits,
               **measure(prior, vqrae, tokens["test"], data, judges)}
        print(f"epoch {epoch}: {bits:.1f} bits an image in training, {row['bits_given_class']:.1f} in test, "
              f"{seconds:.0f} s", flush=True)
        run.check_folder()
        classes = torch.arange(min(max(prior.classes, 1), 10))
        utils.save_grid(run.outputs / f"epoch_{epoch:03}.png", sample(prior, vqrae, classes.repeat(6)), len(classes))
        model = {name: weight.half() for name, weight in prior.state_dict().items()}
        utils.save_torch(run.checkpoints / "prior.pt", {"config": prior.config, "model": model, "constants": constants})
        run.save(row, state)
    with utils.replace_file(run.outputs / "results.json") as draft:
        draft.write_text(json.dumps(run.history[-1], indent=2), "utf-8")
    print(*(f"{name:25} {value:10,.3f}" for name, value in run.history[-1].items()), f"see {run.outputs}/", sep="\n")


def load_tokens(vqrae: VQRAE, data: Dataset, path: Path) -> dict[str, Tensor]:
    """Indices of "test" images (N, h, w), and of "train" (2, N, h, w), as they are and mirrored. A file keeps them."""
    def tokenize(images: Tensor, mirrored: bool = False) -> Tensor:
        indices = []
        for batch in progress(images.split(250), "tokenizing"):
            batch = to_float(batch.to(device))
            indices.append(vqrae.encode_to_indices(batch.flip(3) if mirrored else batch).cpu())
        return torch.cat(indices)

    if not path.exists():
        train = torch.stack([tokenize(data.train_images, mirrored) for mirrored in (False, True)])
        utils.save_torch(path, {"train": train, "test": tokenize(data.test_images)})
    return utils.load_torch(path, "train", "test")


@torch.no_grad()
def sample(prior: Prior, vqrae: VQRAE, labels: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) of classes (B,)."""
    images = []
    for batch in progress(labels.split(250), "sampling"):
        with autocast:
            indices = prior.generate(batch, steps=STEPS, guidance=GUIDANCE)
        images.append((vqrae.decode_from_indices(indices) * 255).round().byte().cpu())
    return torch.cat(images)


def judge_images(token_size: int, data: Dataset) -> dict[str, tuple]:
    """load_judges', each with the mean features of training and test images, and its figures of these true images."""
    judges, train_y, test_y = {}, data.train_labels.to(device), data.test_labels.to(device)
    for name, judge in load_judges(token_size, data.test_images.shape[3]).items():
        train_x, test_x = pooled_features(judge, data.train_images), pooled_features(judge, data.test_images)
        possible = {f"frechet_{name}_of_training": frechet_distance(test_x, train_x[:SAMPLES])}
        if len(train_y.unique()) > 1:
            possible[f"class_{name}_of_test"] = linear_probe(train_x, train_y, test_x, test_y)
        judges[name] = judge, train_x, test_x, possible
    return judges


def measure(prior: Prior, vqrae: VQRAE, indices: Tensor, data: Dataset, judges: dict) -> dict[str, float]:
    """The bits of the test images' indices (N, h, w), and how judge_images' judges see samples.

    Figures "of_training" and "of_test" are of true images: what is possible.
    """
    labels, none = data.test_labels, torch.full_like(data.test_labels, prior.classes)
    figures = {"nominal_bits": prior.tokens * math.log2(vqrae.quantizer.codebook_size),
               "bits": measure_bits(prior, indices, none), "bits_given_class": measure_bits(prior, indices, labels)}
    utils.seed_everything(SEED)
    classes = labels[torch.randint(len(labels), (SAMPLES,))]  # as frequent as in the test images
    samples = sample(prior, vqrae, classes)
    for name, (judge, train_x, test_x, possible) in judges.items():
        x = pooled_features(judge, samples)
        figures[f"frechet_{name}"] = frechet_distance(test_x, x)
        if prior.classes > 1:
            figures[f"class_{name}"] = linear_probe(train_x, data.train_labels.to(device), x, classes.to(device))
        figures |= possible
    return figures


def main():
    if not gpu:
        utils.prepare_cpu()
    constants = utils.read_constants(globals(), sys.argv[1:], kinds)
    for name in ("DEPTH", "EPOCHS", "BATCH_SIZE", "STEPS", "GUIDANCE"):
        check(constants[name] >= 1, name, constants[name], "1 or more")
    check(SAMPLES > 1, "SAMPLES", SAMPLES, "2 or more, which a Fréchet distance needs")
    check(DIM > 0 and DIM % 64 == 0, "DIM", DIM, "a multiple of 64")
    vqrae = load_checkpoint(CHECKPOINT)
    build_prior(vqrae.quantizer, [1, 1], 0, DIM, DEPTH)  # a wrong quantizer fails before images are read
    dataset, files = find_dataset(DATASET)
    constants |= {"CHECKPOINT": Path(CHECKPOINT).name, "DATASET": Path(dataset).resolve().name}
    key = utils.digest((constants, files, os.path.getmtime(CHECKPOINT)))
    run = utils.Run(f"prior_{constants['DATASET']}_{vqrae.config['quantizer']}_{key}")
    if run.finished:
        print(f"This run is finished: see {run.outputs}/. For another, change a constant, or SEED if code changed.")
        return
    data = load_dataset(dataset, vqrae.config["image_size"])
    check(isinstance(data.train_images, Tensor), "DATASET", DATASET, f"{DECODE_GB} GB of images at most")
    count, tested = len(data.train_images), len(data.test_images)
    require(count > 1 and tested > 1, f"{DATASET} has {count} training and {tested} test images, but two are needed.")
    check(BATCH_SIZE <= count, "BATCH_SIZE", BATCH_SIZE, f"at most the {count} training images")
    if data.train_labels is None:  # without classes, label 0 stands for none
        data = data._replace(train_labels=torch.zeros(count).long(), test_labels=torch.zeros(tested).long())
    utils.seed_everything(SEED)
    prior = build_prior(vqrae.quantizer, [vqrae.config["grid"]] * 2, len(data.classes), DIM, DEPTH).to(device)
    print(f"{run.name}: {count:,} training and {tested:,} test images, {device}", flush=True)
    tokens = load_tokens(vqrae.to(device), data, run.checkpoints / "tokens.pt")
    train(prior, vqrae, tokens, data, run, constants)


if __name__ == "__main__":
    with utils.one_line_errors("stopped; the same command goes on after the last epoch above"):
        main()
