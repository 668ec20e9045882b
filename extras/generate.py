"""Make images: train a prior, a model of a checkpoint's tokens. Measure its bits and its samples.

    python -m extras.generate                      tokens of vqrae_fsq.pt
    python -m extras.generate CHECKPOINT=<path>    tokens of another checkpoint

ORDER=raster predicts each token from the class and the tokens before it, row by row. Its bits are exact.
ORDER=masked predicts masked tokens from the others (MD4, 2406.04329), so it fills holes.
Samples and figures go to outputs/<run>/, prior.pt to checkpoints/<run>/. The same command resumes.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

import utils
from data import Dataset, load_dataset
from extras.measure import frechet_distance, linear_probe, load_judges, pooled_features
from models import PRETRAINED_DIR, VQRAE, ResidualBlock, TransformerBlock, load_checkpoint, load_model, shorten
from muon import adamw_and_muon, take_step
from quantizers import FSQ, check, check_range, join_indices, split_indices
from utils import device, progress, to_float

gpu = device == "cuda"
CHECKPOINT = str(PRETRAINED_DIR / "vqrae_fsq.pt")  # the tokenizer
DATASET = "auto"  # as in train.py
ORDER = "raster"  # or "masked", which fills holes
DIM = 192  # the prior's width
DEPTH = 3  # pairs of a convolutional and a transformer block
# training
EPOCHS = 200 if gpu else 13
BATCH_SIZE = 128 if gpu else 64
LEARNING_RATE = 1e-3 if gpu else 3e-3  # AdamW's; Muon's is twice this
SEED = 0
# samples
STEPS = 32  # to fill an image's tokens with ORDER=masked
GUIDANCE = 3.0  # 1: none; with more, samples are more like their class
SAMPLES = 2_000  # judged after each third of the training

autocast = torch.autocast(device, torch.bfloat16, enabled=utils.fast_bf16(device))


class CausalConv(nn.Conv2d):
    """A 3 x 3 convolution that sees the three tokens above, the left one and, with `centre`, the token itself."""

    memory = None  # or, if x is one token (B, C, 1, 1), `fill`'s dict: "grid", "place", and what layers saw

    def __init__(self, dim_in: int, dim_out: int, centre: bool = True):
        super().__init__(dim_in, dim_out, (2, 3), padding=1)  # a repeated border would show later tokens
        self.register_buffer("taps", torch.tensor([[1.0, 1, 1], [1, centre, 0]]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.taps
        if not self.memory:
            return self._conv_forward(x, weight, self.bias)[:, :, :-1]  # without a row below the grid
        (h, w), (row, column) = self.memory["grid"], self.memory["place"]
        inputs = self.memory.setdefault(self, x.new_zeros(*x.shape[:2], h + 1, w + 2))
        inputs[:, :, row + 1, column + 1] = x[..., 0, 0]
        return F.conv2d(inputs[:, :, row : row + 2, column : column + 3], weight, self.bias)


class CausalAttention(Attention):
    def forward(self, x: Tensor, **_) -> Tensor:
        if not self.memory:
            return super().forward(x, is_causal=True)
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).transpose(1, 3)  # (B, heads, 3, 1, dim / heads)
        qkv = self.memory[self] = torch.cat([self.memory[self], qkv], 3) if self in self.memory else qkv
        q, k, v = qkv.unbind(2)
        return self.proj(F.scaled_dot_product_attention(q[:, :, -1:], k, v).transpose(1, 2).flatten(2))


class Prior(nn.Module):
    """The distribution of an image's tokens, with or without its class.

    sizes: how many values each digit of a token has: the codebook's size, or FSQ's levels, or several codebooks'
    grid: (h, w); classes: 0 without labels; order: as ORDER
    A head predicts each digit from the network's output and the token's earlier digits (NADE, 1605.02226).
    """

    def __init__(self, sizes: list[int], grid: list[int], classes: int, dim: int, depth: int, order: str = "masked"):
        super().__init__()
        self.config = dict(sizes=sizes, grid=grid, classes=classes, dim=dim, depth=depth, order=order)
        self.raster = {"raster": True, "masked": False}[order]
        self.sizes, self.grid, self.classes, self.token_count = tuple(sizes), tuple(grid), classes, math.prod(grid)
        self.most_images = max(1, 250 * 64 // self.token_count)  # in one forward pass
        self.embed = nn.ModuleList(nn.Embedding(size, dim) for size in sizes)
        self.embed_earlier = nn.ModuleList(nn.Embedding(size, dim) for size in sizes[:-1])
        for table in (*self.embed, *self.embed_earlier):
            nn.init.normal_(table.weight, std=0.1)
        self.embed_label = nn.Embedding(classes + 1, dim)  # the last row is no class
        self.position = nn.Parameter(torch.randn(self.token_count, dim) * 0.02)
        blocks, hidden, heads = [], dim * 2 // 3, math.ceil(dim / 64)
        for _ in range(depth):
            residual, transformer = ResidualBlock(dim, hidden), TransformerBlock(dim, heads)
            if self.raster:
                residual.conv1, residual.conv2 = CausalConv(dim, hidden), CausalConv(hidden, dim)
                nn.init.zeros_(residual.conv2.weight)
                transformer[0].attn = CausalAttention(dim, heads, qkv_bias=True)
            blocks += [residual, transformer]
        self.first = CausalConv(dim, dim, centre=False) if self.raster else None
        self.mask = None if self.raster else nn.Parameter(torch.randn(dim) * 0.02)
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(dim)
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, n)) for n in sizes)
        self.to(memory_format=torch.channels_last)  # convolutions are faster

    def features(self, digits: Tensor, masked: Tensor, labels: Tensor, memory: dict | None = None) -> Tensor:
        """digits (B, N, K), masked (B, N), labels (B,) -> features (B, N, dim), or (B, 1, dim) at memory["place"]."""
        z = sum(embed(digit) for embed, digit in zip(self.embed, digits.unbind(-1)))
        if self.raster:  # self.first does not see the token before a row's first
            z = self.first(z.mT.unflatten(2, self.grid)).flatten(2).mT + F.pad(z[:, :-1], (0, 0, 1, 0))
        else:
            z = torch.where(masked[..., None], self.mask, z)
        z = (z + self.position + self.embed_label(labels)[:, None]).mT.unflatten(2, self.grid)
        if memory:
            row, column = memory["place"]
            z = z[:, :, row : row + 1, column : column + 1]
        for layer in self.blocks.modules():
            layer.memory = memory
        return self.norm(self.blocks(z).flatten(2).mT)

    def forward(self, indices: Tensor, masked: Tensor, labels: Tensor) -> Tensor:
        """indices (B, h, w), masked (B, N), True in each row, labels (B,) -> N times a masked token's mean bits (B,).

        With all masked, in raster order this is -log2 p(tokens | label). A masked prior's mean over draw_masks is MD4's
        bound: the mean over all orders of predicting tokens one by one (2110.02037).
        """
        digits = split_indices(indices.flatten(1), self.sizes).to(self.position.device)
        masked, labels = masked.to(digits.device), labels.to(digits.device)
        z, targets, nats = self.features(digits, masked, labels)[masked], digits[masked], 0
        for k, target in enumerate(targets.unbind(1)):
            nats = nats + F.cross_entropy(self.heads[k](z).float(), target, reduction="none")
            z = z + self.embed_earlier[k](target) if k < len(self.embed_earlier) else z
        nats = nats.new_zeros(masked.shape).masked_scatter(masked, nats)
        return nats.sum(1) / masked.sum(1) * (self.token_count / math.log(2))

    def draw_masks(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(count, N) bool, tokens to predict: a raster prior's are all, else 1 to N, equally often (2107.00630)."""
        if self.raster:
            return torch.ones(count, self.token_count, dtype=torch.bool)
        ratio = (torch.randperm(count, generator=generator) + torch.rand(1, generator=generator)) / count
        ranks = torch.rand(count, self.token_count, generator=generator).argsort(1)
        return ranks < 1 + (ratio * self.token_count).long()[:, None]

    def generate(self, labels: Tensor, **options) -> Tensor:
        """labels (B,) -> indices (B, h, w) of new images. The options are those of `fill`."""
        indices = torch.zeros(len(labels), *self.grid, dtype=torch.int64)
        return self.fill(indices, torch.ones_like(indices, dtype=torch.bool), labels, **options)

    @torch.no_grad()
    def fill(self, indices: Tensor, mask: Tensor, labels: Tensor | None = None, steps: int = 32,
             guidance: float = 3.0) -> Tensor:
        """indices (B, h, w), new where mask (B, h, w) is True, given the others and labels (B,).

        A raster prior goes on after the last known token. A masked one fills any, in random order, more with each step
        (MaskGIT's square schedule, 2202.04200). InputError for other shapes, ranges or masks.
        labels: classes from 0; None or the number `classes` is no class
        guidance: the mean classifier-free scale (2207.12598); it rises with the steps (Muse, 2301.00704)
        """
        indices, mask = torch.as_tensor(indices), torch.as_tensor(mask)
        none = torch.full((len(indices),), self.classes, device=self.position.device)
        labels = none if labels is None else torch.as_tensor(labels, device=none.device)
        shapes, wanted = [tuple(x.shape) for x in (indices, mask, labels)], (len(indices) or 1, *self.grid)
        types = mask.dtype == torch.bool and not (indices.is_floating_point() or labels.is_floating_point())
        check(types and shapes == [wanted, wanted, wanted[:1]], f"Take indices {wanted}, bools {wanted} and labels "
              f"{wanted[:1]}, not {shapes} of {indices.dtype}, {mask.dtype}, {labels.dtype}.")
        check_range(indices, 0, math.prod(self.sizes) - 1, "indices")
        check_range(labels, 0, self.classes, "labels")
        check(isinstance(steps, int) and steps > 0 and 1 <= guidance < math.inf,
              f"steps, guidance = {steps, guidance}, allowed: 1 or more, steps whole")
        digits = split_indices(indices.flatten(1).long(), self.sizes).to(self.position.device)
        masked = mask.flatten(1).to(digits.device)
        count, memory = masked.sum(1, keepdim=True), {}  # (B, 1)
        if self.raster:
            check(not (masked[:, :-1] & ~masked[:, 1:]).any(),
                  "A raster prior fills only tokens after the last known one. Take a prior of ORDER=masked.")
            steps, memory = self.token_count, {"grid": self.grid}
            places, count = torch.arange(steps, device=masked.device), torch.full_like(count, steps)
        else:  # each masked token's place in a random order: argsort's argsort gives ranks
            places = torch.rand(masked.shape, device=masked.device).masked_fill(~masked, 2).argsort(1).argsort(1)
        most = count.clamp(max=steps)  # (B, 1)
        given = torch.stack([labels] if guidance == 1 or torch.equal(labels, none) else [labels, none])  # (1 or 2, B)
        for step in range(1, int(most.max()) + 1):
            chosen = masked & (places < (count * (step / most) ** 2).clamp(min=step))  # in raster order one
            if self.raster:
                memory["place"] = divmod(step - 1, self.grid[1])
            inputs = digits.repeat(len(given), 1, 1), masked.repeat(len(given), 1), given.flatten()
            z = self.features(*inputs, memory).expand(-1, self.token_count, -1)  # with memory of one token
            z = z.unflatten(0, given.shape)[:, chosen]  # (1 or 2, M, dim)
            scale = (1 + (guidance - 1) * (2 * step - 1) / most).expand_as(chosen)[chosen][:, None]
            drawn = torch.zeros_like(digits[chosen])
            for k, head in enumerate(self.heads):
                logits = head(z).float()
                guided = logits[-1] + scale * (logits[0] - logits[-1])
                drawn[:, k] = torch.multinomial(guided.softmax(1), 1)[:, 0]
                z = z + self.embed_earlier[k](drawn[:, k]) if k < len(self.embed_earlier) else z
            digits[chosen] = drawn
            masked = masked & ~chosen
        memory.clear()  # layers still hold it
        return join_indices(digits, self.sizes).view(indices.shape)


def load_prior(path: str | Path) -> Prior:
    """The prior in a file, in eval mode. InputError for another or a damaged file."""
    return load_model(path, Prior)


@torch.no_grad()
def measure_bits(prior: Prior, indices: Tensor, labels: Tensor) -> float:
    """Mean bits of indices (N, h, w), told their labels (N,). A masked prior takes up to eight masks each."""
    bits, generator = [], torch.Generator().manual_seed(0)
    masks = 1 if prior.raster else min(8, math.ceil(10_000 / len(indices)))
    batches = [*zip(indices.split(prior.most_images), labels.split(prior.most_images))]
    for batch, given in progress(batches * masks, "measuring"):
        bits.append(prior(batch, prior.draw_masks(len(batch), generator), given))
    return torch.cat(bits).mean().item()


def train(prior: Prior, vqrae: VQRAE, tokens: dict[str, Tensor], data: Dataset, run: utils.Run, constants: dict):
    """Train, or what is left of it. Each epoch is measured and saved."""
    optimizers = adamw_and_muon(prior, ("first.", "blocks."), LEARNING_RATE)
    state, steps = {"prior": prior, **optimizers}, math.ceil(len(data.train_labels) / BATCH_SIZE)  # of an epoch
    judges = {name: (judge, *(pooled_features(judge, x) for x in (data.train_images, data.test_images)))
              for name, judge in load_judges(data.test_images.shape[3]).items()}
    for epoch in range(run.resume(state), EPOCHS + 1):
        utils.seed_everything(SEED, epoch)  # the same in a resumed run
        log = []
        order = torch.randperm(len(data.train_labels)).tensor_split(steps)
        for step, index in enumerate(progress(order, f"epoch {epoch}/{EPOCHS}"), (epoch - 1) * steps):
            labels = data.train_labels[index].masked_fill(torch.rand(len(index)) < 0.1, prior.classes)  # for guidance
            masked = prior.draw_masks(len(index))
            mirrored = torch.randint(2, (len(index),))
            with autocast:
                bits = prior(tokens["train"][mirrored, index], masked, labels)
            (bits / prior.token_count * masked.float().mean(1).to(device)).mean().backward()  # tokens weigh alike
            take_step(optimizers, step, EPOCHS * steps)
            prior.zero_grad()
            log.append(bits.detach())
        bits = torch.cat(log).mean().item()
        check(math.isfinite(bits), f"Epoch {epoch} ended with {bits} bits: try a lower LEARNING_RATE.")
        row = {"epoch": epoch, "training_bits": bits, "bits": measure_bits(prior, tokens["test"], data.test_labels)}
        if epoch * 3 // EPOCHS > (epoch - 1) * 3 // EPOCHS:
            row |= judge_samples(prior, vqrae, data, judges)
        print(f"epoch {epoch}: {bits:.1f} bits an image in training, {row['bits']:.1f} in test", flush=True)
        classes = torch.arange(min(max(prior.classes, 1), 10))
        utils.save_grid(run.outputs / f"epoch_{epoch:03}.png", sample(prior, vqrae, classes.repeat(6)), len(classes))
        model = {name: shorten(weight.cpu()) for name, weight in prior.state_dict().items()}  # matrices in 8 bits
        utils.save_torch(run.checkpoints / "prior.pt", {"config": prior.config, "model": model, "constants": constants})
        run.save(row, state)
    run.finish(run.history[-1])
    print(*(f"{name:25} {value:10,.3f}" for name, value in run.history[-1].items()), f"see {run.outputs}/", sep="\n")


def load_tokens(vqrae: VQRAE, data: Dataset, path: Path) -> dict[str, Tensor]:
    """Indices of "test" images (N, h, w), and of "train" (2, N, h, w), also mirrored, kept in a file."""
    def tokenize(images, mirror=()):
        batches = progress(images.split(250), "tokenizing")
        return torch.cat([vqrae.encode_to_indices(to_float(x.to(device)).flip(mirror)).cpu() for x in batches])

    if not path.exists():
        train = torch.stack([tokenize(data.train_images), tokenize(data.train_images, mirror=(3,))])
        utils.save_torch(path, {"train": train, "test": tokenize(data.test_images)})
    return utils.load_torch(path, "train", "test")


@torch.no_grad()
def sample(prior: Prior, vqrae: VQRAE, labels: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) of classes (B,)."""
    images = []
    for batch in progress(labels.split(prior.most_images), "sampling"):
        with autocast:
            indices = prior.generate(batch, steps=STEPS, guidance=GUIDANCE)
        images.append((vqrae.decode_from_indices(indices) * 255).round().byte().cpu())
    return torch.cat(images)


def judge_samples(prior: Prior, vqrae: VQRAE, data: Dataset, judges: dict[str, tuple]) -> dict[str, float]:
    """Fréchet distances from test images, and how often a probe sees a sample's class."""
    utils.seed_everything(SEED)
    classes = data.test_labels[torch.randint(len(data.test_labels), (SAMPLES,))]  # as frequent as in test images
    samples, figures = sample(prior, vqrae, classes), {}
    for name, (judge, train_x, test_x) in judges.items():
        figures[f"frechet_{name}"] = frechet_distance(test_x, x := pooled_features(judge, samples))
        if len(train_x) >= SAMPLES:
            figures[f"frechet_{name}_of_training"] = frechet_distance(test_x, train_x[:SAMPLES])
        if prior.classes > 1:
            figures[f"class_{name}"] = linear_probe(train_x, data.train_labels.to(device), x, classes.to(device))
    return figures


def main():
    if not gpu:
        utils.prepare_cpu()
    constants = utils.read_constants(globals(), sys.argv[1:])
    check(ORDER in ("raster", "masked"), f"ORDER = {ORDER!r}, allowed: 'raster' or 'masked'")
    least = dict(DIM=64, DEPTH=1, EPOCHS=1, BATCH_SIZE=1, LEARNING_RATE=0, STEPS=1, GUIDANCE=1, SAMPLES=2)
    for name, low in least.items():
        check(low <= constants[name] < math.inf, f"{name} = {constants[name]}, allowed: {low} or more")
    check(DIM % 64 == 0, f"DIM = {DIM}, allowed: a multiple of 64")
    vqrae = load_checkpoint(CHECKPOINT).to(device)
    quantizer = vqrae.quantizer
    sizes = list(quantizer.levels if isinstance(quantizer, FSQ) else quantizer.codebook_sizes)  # levels are digits
    check(0 < max(sizes, default=0) <= 4096, f"A prior predicts codebooks of 1 to 4,096 codes, not {sizes}: take "
          "QUANTIZER=fsq, ddcl, residual_vq, product_vq or residual_fsq, or a small CODEBOOK_SIZE.")
    data = load_dataset(DATASET, vqrae.config["image_size"])
    check(isinstance(data.train_images, Tensor), f"{DATASET = }, too large: see data.py's DECODE_GB")
    count, tested = len(data.train_images), len(data.test_images)
    check(min(count, tested) > 1, f"{DATASET} has {count} training and {tested} test images, not two of each.")
    # contents and a name, as files may move
    constants |= {"CHECKPOINT": utils.digest_file(CHECKPOINT), "DATASET": Path(data.name).resolve().name}
    key = utils.digest((sorted(constants.items()), data.digest, utils.digest_code()))
    run = utils.Run(f"prior_{constants['DATASET']}_{vqrae.config['quantizer']}_{key}")
    if run.finished:
        return print(f"This run is finished: see {run.outputs}/. Another SEED makes another run.")
    if data.train_labels is None:  # label 0 stands for none
        data = data._replace(train_labels=torch.zeros(count).long(), test_labels=torch.zeros(tested).long())
    utils.seed_everything(SEED)
    prior = Prior(sizes, [vqrae.config["grid"]] * 2, len(data.classes), DIM, DEPTH, ORDER).to(device)
    print(f"{run.name}: {count:,} training and {tested:,} test images, {device}", flush=True)
    train(prior, vqrae, load_tokens(vqrae, data, run.checkpoints / "tokens.pt"), data, run, constants)


if __name__ == "__main__":
    with utils.one_line_errors("stopped; the same command resumes"):
        main()
