"""Generate images: train a masked diffusion model over a checkpoint's tokens, and measure what they cost in bits.

    python -m extras.generate                                     the tokens of vqrae_fsq.pt
    python -m extras.generate CHECKPOINT=<path> DATASET=shapes    those of another checkpoint

Masked tokens, any number of them, are predicted from the others and the class: absorbing-state discrete diffusion
(MD4, 2406.04329). Samples go to outputs/<run>/, prior.pt to checkpoints/<run>/. The same command resumes a run.
"""
import json
import math
import os
import sys
import time
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # as in train.py
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import utils
from data import DECODE_GB, Dataset, find_dataset, load_dataset
from extras.measure import frechet_distance, linear_probe, load_judges, pooled_features
from models import PRETRAINED_DIR, VQRAE, ResidualBlock, TransformerBlock, load_checkpoint, load_model
from muon import adamw_and_muon, take_step
from quantizers import Quantizer, check, join_indices, split_indices
from utils import device, fast_bf16, prepare_cpu, to_float

gpu = device == "cuda"
CHECKPOINT = str(PRETRAINED_DIR / "vqrae_fsq.pt")  # of train.py
DATASET = "auto"  # as in train.py
FLIP = True  # mirror half of the training images
# model
DIM = 192  # width
DEPTH = 3  # pairs of a convolutional and a transformer block
# training
EPOCHS = 200 if gpu else 6
BATCH_SIZE = 128 if gpu else 32
LEARNING_RATE = 1e-3 if gpu else 2e-3  # AdamW's; Muon's is twice this
DROP_LABEL = 0.1  # fraction of images whose class is hidden, for guidance
EVAL_IMAGES = 1_000  # test images measured after each epoch; at the end: all
SEED = 0
# sampling
STEPS = 16  # to fill an image's tokens
GUIDANCE = 4.0  # 1: none. More makes samples more like their class
TEMPERATURE = 1.0
SAMPLES = 10_000  # for Fréchet distance and probe

autocast = torch.autocast(device, torch.bfloat16, enabled=fast_bf16(device))
most_codes, code_dim = 2**17, 16  # Prior knows at most so many codes, by 16 principal components


class Prior(nn.Module):
    """The distribution of a grid of tokens, given a class or not.

    A token's sub-indices are FSQ's levels, indices in several codebooks, or a cluster of one codebook and an index in
    it. A token enters as the sum of their embeddings, a masked one as a learned vector. As sub-indices depend on each
    other, each is predicted from the blocks' output and the sub-indices before it (NADE, 1605.02226).

    Only FSQ's levels are coordinates: for others knows_codes adds a linear map of the code to the input. It adds to
    logits a predicted query times the mean of all codes with these first sub-indices and the mean's squared length.
    """

    def __init__(self, sizes: list[int], grid: list[int], classes: int, dim: int, depth: int,
                 codebook_size: int = 0, knows_codes: bool = False):
        """sizes: of the sub-indices; grid: (h, w); codebook_size: that of a codebook in clusters, else 0."""
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.config, self.sizes, self.grid, self.classes = config, tuple(sizes), tuple(grid), classes
        self.tokens, number = math.prod(grid), len(sizes)
        for name in ("to_sorted", "from_sorted"):  # the codebook's indices, sorted into clusters, and back
            self.register_buffer(name, torch.arange(codebook_size))
        self.embed = nn.Linear(sum(sizes), dim, bias=False)
        self.embed_label = nn.Embedding(classes + 1, dim)  # the last: no class
        self.position = nn.Parameter(torch.randn(self.tokens, dim) * 0.02)
        self.mask = nn.Parameter(torch.randn(dim) * 0.02)
        pairs = [(ResidualBlock(dim, dim * 2 // 3), TransformerBlock(dim, -(-dim // 64))) for _ in range(depth)]
        self.blocks = nn.Sequential(*sum(pairs, ()))
        self.norm, self.project = nn.LayerNorm(dim), nn.Linear(dim, number * dim)
        self.from_earlier = nn.Parameter(torch.randn(sum(sizes), number * dim) * 0.1)
        row, column = torch.arange(number).repeat_interleave(torch.tensor(sizes)), torch.arange(number * dim) // dim
        self.register_buffer("earlier", row[:, None] < column, persistent=False)
        self.heads = nn.ModuleList(nn.Linear(dim, size + knows_codes * (code_dim + 1)) for size in sizes)
        for p in self.heads.parameters():  # at first all sub-indices are equally likely
            nn.init.zeros_(p)
        if knows_codes:
            self.register_buffer("codes", torch.zeros(math.prod(sizes), code_dim))
            self.embed_code = nn.Linear(code_dim, dim, bias=False)

    def split(self, indices: Tensor) -> Tensor:
        """indices (B, h, w) -> sub-indices x (B, N, k)."""
        indices = indices.flatten(1).to(self.mask.device, torch.int64)
        return split_indices(self.to_sorted[indices] if len(self.to_sorted) else indices, self.sizes)

    def one_hot(self, x: Tensor) -> Tensor:
        """sub-indices (..., k) -> (..., sum of sizes), k of them 1."""
        starts = x.new_tensor([0, *self.sizes[:-1]]).cumsum(0)
        return self.mask.new_zeros(*x.shape[:-1], sum(self.sizes)).scatter_(-1, x + starts, 1)

    def features(self, x: Tensor, masked: Tensor, labels: Tensor) -> Tensor:
        """sub-indices (B, N, k), masked (B, N) bool, labels (B,) -> features of masked tokens (M, dim)."""
        z = self.embed(self.one_hot(x))
        if self.config["knows_codes"]:
            z = z + self.embed_code(self.codes[join_indices(x, self.sizes)])
        z = torch.where(masked[..., None], self.mask, z) + self.position + self.embed_label(labels)[:, None]
        return self.norm(self.blocks(z.mT.unflatten(2, self.grid)).flatten(2).mT[masked])

    def logits(self, features: Tensor, x: Tensor) -> list[Tensor]:
        """features (M, dim), sub-indices (M, k) -> logits (M, size) of each, given the earlier ones."""
        hidden = F.gelu(self.project(features) + self.one_hot(x) @ (self.from_earlier * self.earlier))
        logits = [head(z).float() for head, z in zip(self.heads, hidden.chunk(len(self.heads), 1))]
        for k, size in enumerate(self.sizes if self.config["knows_codes"] else ()):
            before = math.prod(self.sizes[:k])
            means = self.codes.view(-1, size, before, code_dim).mean(0)  # of the codes that begin so
            means = torch.cat([means, means.square().sum(2, keepdim=True)], 2)
            means = (means - means.mean(0))[:, join_indices(x, self.sizes) % before]
            plain, query = logits[k].split([size, code_dim + 1], 1)
            with torch.autocast(query.device.type, enabled=False):  # bf16 would round where codes lie
                logits[k] = plain + torch.einsum("md,smd->ms", query, means)
        return logits

    def forward(self, x: Tensor, masked: Tensor, labels: Tensor) -> Tensor:
        """As `features`, with a masked token or more in each image -> N times the mean bits of masked tokens (B,).

        Its mean over draw_masks is MD4's continuous-time bound on -log2 p(tokens | label), with a mask ratio t uniform
        in [0, 1] and weight 1/t, in the form of any-order models (2110.02037).
        """
        targets = x[masked]
        logits = self.logits(self.features(x, masked, labels), targets)
        nats = sum(F.cross_entropy(z, y, reduction="none") for z, y in zip(logits, targets.mT))
        each = nats.new_zeros(masked.shape).masked_scatter(masked, nats)
        return each.sum(1) / masked.sum(1) * (self.tokens / math.log(2))

    def generate(self, labels: Tensor, **options) -> Tensor:
        """labels (B,) -> indices (B, h, w) of new images; options: as in `fill`."""
        mask = torch.ones(len(labels), *self.grid, dtype=torch.bool)
        return self.fill(mask.long(), mask, labels, **options)

    @torch.no_grad()
    def fill(self, indices: Tensor, mask: Tensor, labels: Tensor | None = None, steps: int = 16,
             guidance: float = 4.0, temperature: float = 1.0) -> Tensor:
        """indices (B, h, w) with new ones where mask (B, h, w) is True, given the others and labels (B,); or lists.

        The order is random. Later steps fill more tokens, which then depend less on each other (MaskGIT's square
        schedule, 2202.04200). labels: `classes` or None is no class. guidance: the mean classifier-free scale
        (2207.12598); it rises from about 1 (Muse, 2301.00704). ValueError for other shapes or ranges.
        """
        indices, mask = torch.as_tensor(indices), torch.as_tensor(mask)
        none, size = torch.full((len(indices),), self.classes), math.prod(self.sizes)
        labels = none if labels is None else torch.as_tensor(labels).cpu()
        valid = indices.shape[1:] == self.grid and 0 <= indices.min() <= indices.max() < size
        check(valid, "indices", tuple(indices.shape), f"(B, *{self.grid}), whole numbers below {size}")
        valid = labels.shape == none.shape and 0 <= labels.min() <= labels.max() <= self.classes
        check(valid, "labels", labels.tolist(), f"{len(none)} whole numbers from 0 to {self.classes}")
        check(mask.shape == indices.shape and mask.dtype == torch.bool, "mask", tuple(mask.shape), "bool, as indices")
        check(steps >= 1 and guidance >= 1 and temperature > 0, "steps, guidance, temperature",
              (steps, guidance, temperature), "1 or more, 1 or more, above 0")

        x, masked = self.split(indices), mask.flatten(1).to(self.mask.device)
        count = masked.sum(1, keepdim=True)
        order = torch.rand(masked.shape, device=masked.device).masked_fill(~masked, 2).argsort(1).argsort(1)
        steps = count.clamp(max=steps)  # of each image
        conditions = [labels] if guidance == 1 or torch.equal(labels, none) else [labels, none]
        for step in range(1, int(steps.max()) + 1):
            chosen = masked & (order < (count * (step / steps) ** 2).clamp(min=step))
            scale = (1 + (guidance - 1) * (2 * step - 1) / steps).expand_as(chosen)[chosen][:, None]
            features = [self.features(x, masked, given.to(masked.device))[chosen[masked]] for given in conditions]
            drawn = torch.zeros_like(x[chosen])
            for k in range(len(self.sizes)):
                logits = [self.logits(z, drawn)[k] for z in features]
                logits = logits[-1] + scale * (logits[0] - logits[-1])
                drawn[:, k] = torch.multinomial((logits / temperature).softmax(1), 1)[:, 0]
            x[chosen] = drawn
            masked = masked & ~chosen
        filled = join_indices(x, self.sizes)
        return (self.from_sorted[filled] if len(self.from_sorted) else filled).view(indices.shape)


def build_prior(quantizer: Quantizer, grid: list[int], classes: int, dim: int, depth: int) -> Prior:
    """A prior of this quantizer's tokens. A single codebook of K codes is sorted into about sqrt(K) clusters."""
    size, sizes = quantizer.codebook_size, list(getattr(quantizer, "levels", quantizer.codebook_sizes))
    check(size > 0, "quantizer", type(quantizer).__name__, "one with codes")
    single, knows_codes = len(sizes) == 1, not hasattr(quantizer, "levels") and size <= most_codes
    if single:
        clusters = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
        sizes = [clusters, size // clusters]
    prior = Prior(sizes, grid, classes, dim, depth, size * single, knows_codes)
    if knows_codes:
        codes = quantizer.get_codebook_entry(torch.arange(size)).detach().cpu()
        codes = codes - codes.mean(0)
        codes = codes @ torch.linalg.eigh(codes.T.cov()).eigenvectors[:, -code_dim:]  # PCA
        if single:  # the cluster is the first sub-index
            prior.from_sorted.copy_(sort_codes(codes, torch.arange(size)).view(sizes).T.flatten())
            prior.to_sorted.copy_(prior.from_sorted.argsort())
            codes = codes[prior.from_sorted]
        prior.codes[:, : codes.shape[1]] = codes / codes.square().mean().sqrt()
    return prior


def sort_codes(codes: Tensor, order: Tensor) -> Tensor:
    """Sort `order`, indices of codes (K, D), along the axis on which they vary most, then each half by itself."""
    if len(order) < 2:
        return order
    order = order[codes[order][:, codes[order].var(0).argmax()].argsort()]
    return torch.cat([sort_codes(codes, half) for half in order.tensor_split(2)])


def load_prior(path: str | Path) -> Prior:
    """The prior in a file of this script, in eval mode. ValueError for any other file."""
    return load_model(path, Prior)[0]


def draw_masks(count: int, tokens: int) -> Tensor:
    """(count, tokens) bool: 1 to `tokens` True a row, in evenly spread numbers, for less variance."""
    ratio = (torch.randperm(count) + torch.rand(1)) / count % 1
    return torch.rand(count, tokens).argsort(1) < (ratio * tokens).long()[:, None] + 1


@torch.no_grad()
def measure_bits(prior: Prior, indices: Tensor, labels: Tensor, masks: int = 8) -> float:
    """The bound in bits an image, in fp32: a mean over indices (N, h, w) with labels (N,), `masks` masks each."""
    bits, device = [], prior.mask.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        for batch, given in tqdm([*zip(indices.split(250), labels.split(250))] * masks, "measuring", leave=False):
            bits.append(prior(prior.split(batch), draw_masks(len(batch), prior.tokens).to(device), given.to(device)))
    return torch.cat(bits).mean().item()


def main():
    if not gpu:
        prepare_cpu()
    constants = utils.read_constants(globals(), sys.argv[1:])
    check(0 < DROP_LABEL < 1, "DROP_LABEL", DROP_LABEL, "between 0 and 1")
    for name, least in {"EPOCHS": 1, "EVAL_IMAGES": 1, "STEPS": 1, "GUIDANCE": 1, "SAMPLES": 2}.items():
        check(constants[name] >= least, name, constants[name], f"{least} or more")
    check(TEMPERATURE > 0, "TEMPERATURE", TEMPERATURE, "above 0")
    check(DIM > 1 and DIM % -(-DIM // 64) == 0, "DIM", DIM, "a multiple of 64")
    vqrae, stat = load_checkpoint(CHECKPOINT), Path(CHECKPOINT).stat()
    dataset, files = find_dataset(DATASET)
    name = utils.digest((constants, dataset, files, stat.st_size, stat.st_mtime_ns))
    run = utils.Run(f"prior_{Path(dataset).resolve().name}_{vqrae.config['quantizer']}_{name}")
    if run.finished:
        print(f"this run is finished: see {run.outputs}/. For another change a constant, or SEED if code changed")
        return
    data = load_dataset(dataset, vqrae.config["image_size"])
    check(isinstance(data.train_images, Tensor), "DATASET", DATASET, f"{DECODE_GB} GB of images at most")
    check(0 < BATCH_SIZE <= len(data.train_images), "BATCH_SIZE", BATCH_SIZE, f"1 to {len(data.train_images)}")
    if data.train_labels is None:  # the one label there is: no class
        labels = [torch.zeros(len(x)).long() for x in (data.train_images, data.test_images)]
        data = data._replace(train_labels=labels[0], test_labels=labels[1])
    utils.seed_everything(SEED)
    prior = build_prior(vqrae.quantizer, [vqrae.config["grid"]] * 2, len(data.classes), DIM, DEPTH).to(device)
    tokens = load_tokens(vqrae.to(device), data, run.checkpoints / "tokens.pt")
    print(f"{run.name}: {len(data.train_images):,} training and {len(data.test_images):,} test images, "
          f"{sum(p.numel() for p in prior.parameters()) / 1e6:.1f} M parameters, {device}", flush=True)
    train(prior, vqrae, tokens, data, run, constants)
    measure(load_prior(run.checkpoints / "prior.pt").to(device), vqrae, tokens, data, run)


def load_tokens(vqrae: VQRAE, data: Dataset, path: Path) -> dict[str, Tensor]:
    """Indices (N, h, w) of "test" and "train" images. With FLIP, mirrored training images follow."""
    def tokenize(images: Tensor, mirrored: bool = False) -> Tensor:
        batches = (to_float(batch.to(device)) for batch in tqdm(images.split(250), "tokenizing", leave=False))
        return torch.cat([vqrae.encode_to_indices(x.flip(3) if mirrored else x).cpu() for x in batches])

    if not path.exists():
        train = torch.cat([tokenize(data.train_images, mirrored) for mirrored in range(1 + FLIP)])
        utils.save_torch(path, {"train": train, "test": tokenize(data.test_images)})
    return utils.load_torch(path, "train", "test")


def train(prior: Prior, vqrae: VQRAE, tokens: dict[str, Tensor], data: Dataset, run: utils.Run, constants: dict):
    """Train from the first epoch or where the run was stopped. Each epoch writes samples and a checkpoint."""
    labels, optimizers = data.train_labels, adamw_and_muon(prior, ("blocks.",), LEARNING_RATE)
    state = {"prior": prior, **optimizers}
    print(" epoch   bits a token: training    test  images/s  seconds")
    for epoch in range(run.resume(state), EPOCHS + 1):
        utils.seed_everything(SEED, epoch)  # an epoch is the same in a resumed run
        start, log = time.time(), []
        order = torch.randperm(len(labels)).split(BATCH_SIZE)[: len(labels) // BATCH_SIZE]
        for step, index in enumerate(tqdm(order, f"epoch {epoch}/{EPOCHS}", leave=False), (epoch - 1) * len(order)):
            copy = len(labels) * torch.randint(1 + FLIP, (BATCH_SIZE,))  # the image, or its mirror image
            given = labels[index].masked_fill(torch.rand(BATCH_SIZE) < DROP_LABEL, prior.classes)
            masked = draw_masks(BATCH_SIZE, prior.tokens).to(device)
            with autocast:
                bits = prior(prior.split(tokens["train"][index + copy]), masked, given.to(device)) / prior.tokens
            (bits * masked.float().mean(1)).mean().backward()  # without the bound's 1/t: MaskGIT's mean cross-entropy
            take_step(optimizers, step, EPOCHS * len(order))
            prior.zero_grad()
            log.append(bits.detach().mean())
        took, bits = time.time() - start, torch.stack(log).mean().item()
        test_bits = measure_bits(prior, tokens["test"][:EVAL_IMAGES], data.test_labels[:EVAL_IMAGES], 1) / prior.tokens
        row = {"epoch": epoch, "bits": bits, "test_bits": test_bits, "seconds": took}
        print(f"{epoch:6} {bits:24.3f} {test_bits:7.3f} {len(order) * BATCH_SIZE / took:9,.0f} {took:8.0f}", flush=True)
        run.check_folder()
        classes = torch.arange(min(max(prior.classes, 1), 10))
        utils.save_grid(run.outputs / f"epoch_{epoch:03}.png", sample(prior, vqrae, classes.repeat(6)), len(classes))
        weights = {name: w.half() if w.is_floating_point() else w for name, w in prior.state_dict().items()}
        content = {"config": prior.config, "model": weights, "metrics": row, "constants": constants}
        utils.save_torch(run.checkpoints / "prior.pt", content)
        run.save(row, state)


@torch.no_grad()
def sample(prior: Prior, vqrae: VQRAE, labels: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) of classes (B,)."""
    images = []
    for some in tqdm(labels.split(250), "sampling", leave=False):
        with autocast:
            indices = prior.generate(some, steps=STEPS, guidance=GUIDANCE, temperature=TEMPERATURE)
        images.append((vqrae.decode_from_indices(indices) * 255).round().byte().cpu())
    return torch.cat(images)


def measure(prior: Prior, vqrae: VQRAE, tokens: dict[str, Tensor], data: Dataset, run: utils.Run):
    """Bits; Fréchet distances of samples, and of as many training images, to test images, by load_judges; a probe's
    accuracy, by "cifar"."""
    labels, test = data.test_labels, tokens["test"]
    results = {"nominal_bits": prior.tokens * math.log2(vqrae.quantizer.codebook_size),
               "bits": measure_bits(prior, test, torch.full_like(labels, prior.classes)),
               "bits_given_class": measure_bits(prior, test, labels)}
    utils.seed_everything(SEED)
    classes = labels[torch.randint(len(labels), (SAMPLES,))]  # as frequent as in the test images
    samples, judges = sample(prior, vqrae, classes), load_judges(vqrae.token_size, data)[0]
    for name, judge in judges.items():
        expected = pooled_features(judge, data.test_images)
        for suffix, images in {"": samples, "_of_training": data.train_images[:SAMPLES]}.items():
            results[f"frechet_{name}{suffix}"] = frechet_distance(expected, pooled_features(judge, images))
    if prior.classes:
        train = pooled_features(judges["cifar"], data.train_images), data.train_labels.to(device)
        for name, images, y in (("test", data.test_images, labels), ("samples", samples, classes)):
            results[f"probe_{name}"] = linear_probe(*train, pooled_features(judges["cifar"], images), y.to(device))
    with utils.replace_file(run.outputs / "results.json") as draft:
        draft.write_text(json.dumps(results, indent=2), "utf-8")
    print(*(f"{name:25} {value:10,.3f}" for name, value in results.items()), f"see {run.outputs}/", sep="\n")


if __name__ == "__main__":
    with utils.one_line_errors("stopped; the same command goes on after the last epoch above"):
        main()
