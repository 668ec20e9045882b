"""A masked discrete diffusion model over a VQRAE's tokens, trained by generate.py.

    vqrae = load_checkpoint("checkpoints/pretrained/vqrae_fsq.pt")
    prior = load_prior("checkpoints/pretrained/prior.pt", "checkpoints/pretrained/vqrae_fsq.pt")
    images = vqrae.decode_from_indices(prior.generate(torch.arange(10)))     one image of each class
    prior.fill(indices, mask, labels)                                        tokens where mask is True, drawn anew
"""
import math
import reprlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models import OnGrid, ResidualBlock, transformer
from quantizers import Quantizer, check
from utils import hash_file, load_torch, summarize

whole_numbers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
most_codes = 2**17  # of which a prior knows where they lie: 4 MB of its file
code_dim = 16  # principal components of a code that it knows


class Prior(nn.Module):
    """The distribution of a grid of tokens, given a class or not.

    A token is its digits: FSQ's levels, its indices in several codebooks, or those of its code's place in one large
    codebook, which is sorted (build_prior). Unmasked tokens enter as the sum of their digits' embeddings, masked ones
    as one learned vector. Of a masked token, digit k is predicted from the blocks' output and the digits before it (as
    in NADE, 1605.02226): the digits of a token depend on each other most, and are never drawn independently, as the
    tokens of one step are. Masking digits one by one (2505.18495, 2603.19232), each predicted by a head of its own,
    took 0.1 bits a token more in one pair of short runs, near what chance can do.

    FSQ's digits are a code's coordinates; those of learned codes do not say which codes are alike. With knows_codes,
    therefore, an unmasked token enters with a linear map of its code, too, and a digit's head gives a query of code_dim
    + 1 numbers as well: to the logit of each value is added the query's product with m, the mean of all codes that
    begin with the digits before and this value, and with m's squared length. (A query of 2x and -1 adds minus the
    squared distance from x to m, up to a constant.)
    """

    def __init__(self, sizes: list[int], grid: list[int], classes: int, dim: int = 192, depth: int = 3,
                 codebook_size: int = 0, knows_codes: bool = False):
        """sizes: of the digits; grid: height and width in tokens; classes: 0 without any. codebook_size: of a single
        large codebook, whose codes are sorted; else 0. build_prior writes the codes into a prior that knows them."""
        arguments = dict(locals())
        super().__init__()
        self.config = {k: v for k, v in arguments.items() if k not in ("self", "__class__")}
        self.codebook_sizes, self.grid, self.classes, self.tokens = tuple(sizes), tuple(grid), classes, math.prod(grid)
        self.register_buffer("number_of", torch.arange(codebook_size))  # of a code: its place
        self.register_buffer("code_of", torch.zeros(math.prod(sizes) if codebook_size else 0, dtype=torch.int64))
        self.embed = nn.Linear(sum(sizes), dim, bias=False)
        self.embed_label = nn.Embedding(classes + 1, dim)  # the last: no class is given
        self.position = nn.Parameter(torch.randn(self.tokens, dim) * 0.02)
        self.mask = nn.Parameter(torch.randn(dim) * 0.02)
        pairs = [(ResidualBlock(dim, dim * 2 // 3), OnGrid(*transformer(dim, 1, -(-dim // 64)))) for _ in range(depth)]
        self.blocks = nn.Sequential(*sum(pairs, ()))
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, len(sizes) * dim)
        self.from_digits = nn.Parameter(torch.randn(sum(sizes), len(sizes) * dim) * 0.1)
        digit = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))  # that a row of from_digits is of
        earlier = digit[:, None] < torch.arange(len(sizes)).repeat_interleave(dim)
        self.register_buffer("earlier", earlier, persistent=False)
        self.heads = nn.ModuleList(nn.Linear(dim, size + knows_codes * (code_dim + 1)) for size in sizes)
        for head in self.heads:  # at first all digits are equally likely
            nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        if knows_codes:
            self.register_buffer("codes", torch.zeros(math.prod(sizes), code_dim))  # by their digits
            self.embed_code = nn.Linear(code_dim, dim, bias=False)

    split_indices, join_indices = Quantizer.split_indices, Quantizer.join_indices  # into and from codebook_sizes

    def to_digits(self, indices: Tensor) -> Tensor:
        """indices (B, h, w) -> digits (B, N, k). ValueError for another grid, or indices out of range."""
        check(isinstance(indices, Tensor), "indices", type(indices), "a tensor")
        weights = self.mask.dtype
        check(weights == torch.float32, "type of the prior's weights", weights, "torch.float32: call its float()")
        valid = tuple(indices.shape[1:]) == self.grid and len(indices) > 0 and indices.dtype in whole_numbers
        check(valid, "indices", (tuple(indices.shape), indices.dtype), f"(B, *{self.grid}), whole numbers")
        size, low, high = len(self.number_of) or math.prod(self.codebook_sizes), *map(int, indices.aminmax())
        check(0 <= low and high < size, "indices", (low, high), f"0 to {size - 1}")
        indices = indices.flatten(1).long().to(self.mask.device)
        return self.split_indices(self.number_of[indices] if len(self.number_of) else indices)

    def one_hot(self, digits: Tensor) -> Tensor:
        """digits (..., k) -> (..., sum of sizes), k of them 1"""
        starts = digits.new_tensor([0, *self.codebook_sizes[:-1]]).cumsum(0)
        zeros = torch.zeros(*digits.shape[:-1], sum(self.codebook_sizes), device=digits.device)
        return zeros.scatter_(-1, digits + starts, 1)

    def places(self, digits: Tensor) -> Tensor:
        """digits (..., k) -> (..., k): what join_indices makes of the first, the first two and so on; unchecked, for a
        check waits for a GPU in each step"""
        return (digits * digits.new_tensor([1, *self.codebook_sizes[:-1]]).cumprod(0)).cumsum(-1)

    def features(self, digits: Tensor, masked: Tensor, labels: Tensor) -> Tensor:
        """digits (B, N, k), masked (B, N) bool, labels (B,), `classes` for none -> of masked tokens alone, (M, dim)"""
        x = self.embed(self.one_hot(digits))
        if self.config["knows_codes"]:
            x = x + self.embed_code(self.codes[self.places(digits)[..., -1]])
        x = torch.where(masked[..., None], self.mask, x)
        x = x + self.position + self.embed_label(labels)[:, None]
        x = self.blocks(x.mT.unflatten(2, self.grid)).flatten(2).mT
        return self.norm(x.flatten(0, 1).index_select(0, masked.flatten().nonzero()[:, 0]))

    def logits(self, features: Tensor, digits: Tensor) -> list[Tensor]:
        """features (M, dim), digits (M, k) -> the logits (M, size) of each digit, on which only earlier digits act"""
        hidden = self.project(features) + self.one_hot(digits) @ (self.from_digits * self.earlier)
        hidden = F.gelu(hidden).chunk(len(self.heads), 1)
        logits = [head(part).float() for head, part in zip(self.heads, hidden)]
        if self.config["knows_codes"]:
            earlier = F.pad(self.places(digits), (1, 0))
            for k, size in enumerate(self.codebook_sizes):
                means = self.codes.view(-1, size, math.prod(self.codebook_sizes[:k]), code_dim).mean(0)
                means = torch.cat([means, means.square().sum(2, keepdim=True)], 2)
                means = (means - means.mean(0))[:, earlier[:, k]]  # the same odds, by smaller numbers
                of_digit, query = logits[k].split([size, code_dim + 1], 1)
                with torch.autocast(query.device.type, enabled=False):  # in bf16 codes would be rounded
                    logits[k] = of_digit + torch.einsum("md,smd->ms", query, means)
        return logits

    def forward(self, digits: Tensor, masked: Tensor, labels: Tensor) -> Tensor:
        """As `features`, one token or more being masked in each image -> (B,), N times the mean bits of masked tokens.

        Their mean over draw_masks is MD4's continuous-time bound on -log2 p(tokens | label), with a mask ratio t
        uniform in [0, 1] and weight 1/t (2406.04329), in the form of any-order models: the number of masked
        tokens uniform in 1 to N (2110.02037). It is what tokens cost that are filled one by one.
        """
        targets = digits[masked]
        logits = self.logits(self.features(digits, masked, labels), targets)
        nats = sum(F.cross_entropy(part, digit, reduction="none") for part, digit in zip(logits, targets.unbind(1)))
        each = torch.zeros(masked.shape, device=nats.device).masked_scatter(masked, nats)
        return each.sum(1) / masked.sum(1) * (self.tokens / math.log(2))

    def check_labels(self, labels: object, count: int) -> Tensor:
        """as_labels, where they are `count` of this prior's; ValueError otherwise"""
        labels = as_labels(labels)
        check(len(labels) == count and 0 <= labels.min() and labels.max() <= self.classes, "labels",
              reprlib.repr(labels.tolist()), f"{count} whole numbers from 0 to {self.classes}, the last for no class")
        return labels

    def generate(self, labels: Tensor, **options) -> Tensor:
        """labels (B,), `classes` for none -> indices (B, h, w) of new images; options: `steps` and so on of `fill`"""
        labels = as_labels(labels)
        mask = torch.ones(len(labels), *self.grid, dtype=torch.bool)
        return self.fill(mask.long(), mask, labels, **options)

    @torch.no_grad()
    def fill(self, indices: Tensor, mask: Tensor, labels: Tensor | None = None, steps: int = 16,
             guidance: float = 4.0, temperature: float = 1.0) -> Tensor:
        """Indices (B, h, w), those where mask (B, h, w) is True drawn anew, given the others and labels (B,).

        Tokens are filled in random order, one or more in each step, and more in later ones, as they depend less on each
        other then (MaskGIT's square schedule, 2202.04200): with steps = h * w one by one. labels: the number
        `classes` is no class, and None is that for all. guidance: classifier-free (2207.12598, whose w is guidance -
        1), logits without a class plus a scale times what the class adds. The scale rises in equal steps, as in Muse
        (2301.00704), from little more than 1 where there are many, so that the first tokens are drawn freely, and is
        `guidance` on average over an image's steps (over its tokens more: 5 for 4 in 16 steps); 1 is none. ValueError
        for another grid, indices, labels or options out of range.
        """
        digits, device = self.to_digits(indices), self.mask.device
        valid = isinstance(mask, Tensor) and mask.shape == indices.shape and mask.dtype == torch.bool
        check(valid, "mask", getattr(mask, "shape", type(mask)), f"{tuple(indices.shape)} of True and False")
        none = torch.full((len(indices),), self.classes)
        labels = none if labels is None else self.check_labels(labels, len(indices))
        check(type(steps) is int and steps >= 1, "steps", steps, "a whole number of 1 or more")
        for name, value, low, high in (("guidance", guidance, 1, 1000), ("temperature", temperature, 0.01, 100)):
            check(isinstance(value, int | float) and low <= value <= high, name, value, f"{low} to {high}")
        masked, count = mask.flatten(1).to(device), mask.flatten(1).sum(1, keepdim=True).to(device)
        turn = torch.rand(masked.shape, device=device).masked_fill(~masked, 2).argsort(1).argsort(1)
        steps = count.clamp(max=steps)  # of each image
        conditions = [labels] if guidance == 1 or torch.equal(labels, none) else [labels, none]
        for step in range(1, int(steps.max()) + 1):
            chosen = masked & (turn < (count * (step / steps) ** 2).clamp(min=step))
            scale = (1 + (guidance - 1) * (2 * step - 1) / steps).expand_as(chosen)[chosen][:, None]
            features = [self.features(digits, masked, given.to(device))[chosen[masked]] for given in conditions]
            drawn = digits.new_zeros(len(features[0]), len(self.heads))
            for k in range(len(self.heads)):
                logits, *unconditional = (self.logits(part, drawn)[k] for part in features)
                if unconditional:
                    logits = unconditional[0] + scale * (logits - unconditional[0])
                drawn[:, k] = torch.multinomial((logits / temperature).softmax(1), 1)[:, 0]
            digits[chosen] = drawn
            masked = masked & ~chosen
        filled = self.join_indices(digits)
        return (self.code_of[filled] if len(self.code_of) else filled).view(indices.shape)


def as_labels(labels: object) -> Tensor:
    """Whole numbers (B,), as a tensor or whatever becomes one, as int64 on the CPU; ValueError for anything else."""
    try:
        tensor = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError):  # None, text, rows of several lengths
        tensor = torch.empty(0)
    check(tensor.dtype in whole_numbers and tensor.ndim == 1, "labels", reprlib.repr(labels), "whole numbers (B,)")
    return tensor.long()


def batch_size(prior: Prior) -> int:
    """Images at a time where no gradients are needed"""
    return max(1, 2**14 // prior.tokens)


def training_loss(bits: Tensor, masked: Tensor) -> Tensor:
    """bits (B,), a prior's output; masked (B, N) -> the mean of bits, each times its image's masked share: all masked
    tokens weigh alike, as MaskGIT's do. In the bound a single one weighs as much as all of another image."""
    return (bits * masked.float().mean(1)).mean()


def draw_masks(count: int, tokens: int) -> Tensor:
    """(count, tokens) bool: in each row a random number from 1 to `tokens` of them are masked. The numbers are spread
    evenly over the rows, so that a mean over rows varies less."""
    share = (torch.randperm(count) + torch.rand(1)) / count % 1
    return torch.rand(count, tokens).argsort(1) < (share * tokens).long()[:, None] + 1


@torch.no_grad()
def measure_bits(prior: Prior, indices: Tensor, labels: Tensor) -> float:
    """The bound in bits an image, in fp32: the mean over indices (n, h, w) with labels (n,), each with one mask, always
    the same."""
    device, bits, size = prior.mask.device, [], batch_size(prior)
    labels = prior.check_labels(labels, len(indices))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        for batch, given in zip(tqdm(indices.split(size), "measuring", leave=False), labels.split(size)):
            masked = draw_masks(len(batch), prior.tokens).to(device)
            bits.append(prior(prior.to_digits(batch), masked, given.to(device)))
    return torch.cat(bits).mean().item()


def build_prior(quantizer: Quantizer, grid: list[int], classes: int, dim: int = 192, depth: int = 3) -> Prior:
    """A prior of tokens of this quantizer, which knows its codes unless they are FSQ's or DDCL's, or too many. A single
    codebook's are sorted so that neighbours are alike, and the digits of their places in this order, the first of which
    tell clusters apart, are predicted."""
    size, sizes = quantizer.codebook_size, list(getattr(quantizer, "levels", quantizer.codebook_sizes))
    check(size > 0, "quantizer", type(quantizer).__name__, "one that has codes")
    check(len(sizes) == 1 or sum(sizes) <= 8192, "codebook_sizes", sizes, "8,192 codes or less in all, or one codebook")
    single, bits = len(sizes) == 1, (size - 1).bit_length()
    if single:
        sizes = [16] * (bits // 4) + [2 ** (bits % 4)] * (bits % 4 > 0)
    knows_codes = not hasattr(quantizer, "levels") and math.prod(sizes) <= most_codes
    prior = Prior(sizes, grid, classes, dim, depth, size if single else 0, knows_codes)
    if not (single or knows_codes):
        return prior
    codes = quantizer.get_codebook_entry(torch.arange(size, device=quantizer.device)).detach().cpu()
    codes = codes - codes.mean(0)
    codes = codes @ torch.linalg.eigh(codes.T.cov()).eigenvectors[:, -code_dim:]  # principal components
    if single:
        places = torch.arange(2**bits)
        numbers = prior.join_indices(prior.split_indices(places, sizes[::-1]).flip(1))  # a place's first digit last
        prior.code_of[numbers] = sort_codes(codes, torch.arange(size))[places * size >> bits]  # some twice
        prior.number_of[prior.code_of[numbers]] = numbers
        codes = codes[prior.code_of]
    if knows_codes:
        prior.codes[:, : codes.shape[1]] = codes / codes.square().mean().sqrt()
    return prior


def sort_codes(codes: Tensor, order: Tensor) -> Tensor:
    """Sort `order`, indices of codes (K, D): along the axis on which they vary most, then each half by itself."""
    if len(order) < 2:
        return order
    values = codes[order]
    order = order[values[:, values.var(0).argmax()].argsort()]
    return torch.cat([sort_codes(codes, half) for half in order.tensor_split(2)])


def load_prior(path: str | Path, tokenizer: str | Path | None = None) -> Prior:
    """The prior in a file written by generate.py, in eval mode. tokenizer: the checkpoint whose tokens it is to draw.
    ValueError for a file that is no prior, or one of another checkpoint's tokens."""
    content = load_torch(path)
    check({"config", "prior"} <= content.keys(), "prior", str(path), "a prior.pt")
    if tokenizer is not None:
        check(isinstance(tokenizer, str | Path) and Path(tokenizer).is_file(), "tokenizer", str(tokenizer)[:80],
              "the path of a checkpoint")
        constants = content.get("constants", {})
        check(constants.get("tokenizer") == hash_file(tokenizer), "tokenizer", str(tokenizer),
              f"the {constants.get('CHECKPOINT')} that {path} was trained for")
    try:
        prior = Prior(**content["config"])
        prior.load_state_dict(content["prior"])
        for name, value in prior.state_dict().items():
            check(value.isfinite().all(), name, "NaN or infinity", "finite numbers")
    except Exception as error:  # a config of nonsense may lead anywhere
        raise ValueError(f"prior {path} does not fit this code: {summarize(error)}") from None
    return prior.eval()
