"""FSQ, DDCL, SimVQ, EMA-VQ, residual and product codebooks, and vector-quantize-pytorch's, behind one interface.

    quantizer = build_quantizer("fsq", dim=256)
    z_q, loss, indices = quantizer(z)       # z and z_q (B, C, H, W) or (B, N, C), indices (B, H, W) or (B, N)
    quantizer.indices_to_codes(indices)     # z_q again, in eval mode exactly the same numbers
    quantizer.codes_to_indices(z_q)         # the indices again; of codes that are equal, the first one's
    quantizer.get_codebook_entry(indices)   # (N,) -> (N, C)
    quantizer.codebook_size                 # the number of codes; with several codebooks, the product of their sizes

A vector is the C numbers at one position. project_in maps it to code_dim numbers, the nearest code replaces these, and
project_out maps the code to z_q. code_dim=0 makes codes as wide as vectors; project=False also omits both maps.
Copy this file into your project, and add the loss to yours. It needs torch alone (Library: vector-quantize-pytorch).
With TF32 (torch.set_float32_matmul_precision) a GPU may take a code that is only nearly the nearest.
"""
import contextlib
import math
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Quantized = tuple[Tensor, Tensor, Tensor]  # codes or z_q, loss, indices


class Quantizer(nn.Module):
    """What all quantizers share: shapes, maps and checks. A quantizer of your own defines two methods:

        quantize(x): vectors (B, N, code_dim) -> codes with x's gradient, loss (scalar), indices (B, N)
        lookup(indices): (B, N) in [0, codebook_size) -> codes (B, N, code_dim)
    With several codebooks an index joins their indices, as in split_indices.
    """

    residual = False  # True: codebooks' codes add up, and lookup takes a depth
    config = None  # the name and options given to build_quantizer, for checkpoints

    def __init__(self, dim: int, code_dim: int, codebook_sizes: tuple[int, ...], project: bool = True):
        super().__init__()
        self.dim = dim
        self.code_dim = code_dim if project and code_dim else dim
        sizes = (dim, self.code_dim, *codebook_sizes)
        valid = all(type(n) is int and n > 0 for n in sizes) and math.prod(codebook_sizes) < 2**62
        check(valid, f"dim, code_dim, codebook sizes = {sizes!r:.300}, allowed: integers from 1, below 2**62 codes")
        self.codebook_sizes, self.codebook_size = codebook_sizes, math.prod(codebook_sizes)
        self.project_in = nn.Linear(dim, self.code_dim) if project else nn.Identity()
        self.project_out = nn.Linear(self.code_dim, dim) if project else nn.Identity()

    def forward(self, z: Tensor) -> Quantized:
        """z (B, C, H, W) or (B, N, C) -> z_q (z's shape, fp32), loss (scalar), indices (B, H, W) or (B, N), int64.

        z_q's gradient reaches z. InputError for another shape and, in eval mode, for NaNs or magnitudes above 1e12.
        In train mode the check would wait for the GPU, so a NaN reaches your loss and the codebook.
        """
        vectors, shape = to_vectors(z, self.dim, "z")
        if not self.training:
            check_range(vectors, -1e12, 1e12, "z")
        with torch.autocast(z.device.type, enabled=False):  # bf16 would round distances and codes
            codes, loss, indices = self.quantize(self.project_in(vectors))
            return to_grid(self.project_out(codes), shape), loss, indices.view(shape)

    def indices_to_codes(self, indices: Tensor, depth: int | None = None) -> Tensor:
        """indices (B, H, W) or (B, N) -> z_q (B, C, H, W) or (B, N, C). InputError as in check_indices.

        depth: how many residual codebooks are summed, beginning with the first; None: all
        """
        valid = depth is None or (self.residual and depth in range(1, len(self.codebook_sizes) + 1))
        check(valid, f"depth = {depth!r:.300}, allowed: None, or 1 to the number of residual codebooks")
        indices = self.check_indices(indices, 2, 3)
        with torch.autocast(indices.device.type, enabled=False):
            codes = self.lookup(indices.flatten(1), depth) if depth else self.lookup(indices.flatten(1))
            return to_grid(self.project_out(codes), indices.shape)

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        """indices (N,) -> z_q (N, C). InputError as in check_indices."""
        return self.indices_to_codes(self.check_indices(indices, 1)[None])[0]

    @torch.no_grad()
    def codes_to_indices(self, z_q: Tensor) -> Tensor:
        """z_q -> indices of the nearest codes, shapes as in forward. InputError also for more than 2**24 codes."""
        vectors, shape = to_vectors(z_q, self.dim, "z_q")
        check_range(vectors, -1e12, 1e12, "z_q")
        check(self.codebook_size <= 2**24, f"{self.codebook_size:,} codes are too many to find the nearest.")
        vectors = vectors.to("cpu", torch.float64)  # fp64 tells small distances apart; some GPUs lack it
        least, indices = torch.inf, 0  # the smallest distance so far, and its code
        for block in torch.arange(self.codebook_size).split(2**13):  # blocks bound the memory
            entries = self.get_codebook_entry(block).to(vectors)
            nearest = nearest_code(vectors, entries)
            distances = torch.linalg.vector_norm(vectors - entries[nearest], dim=-1)
            indices = torch.where(distances < least, block[nearest], indices)
            least = distances.clamp(max=least)
        return indices.to(z_q.device).view(shape)

    def check_indices(self, indices: Tensor, *dims: int) -> Tensor:
        """A tensor, list or array -> int64. dims: allowed numbers of dimensions; none: any. InputError for others."""
        check(self.codebook_size, "The quantizer 'none' has no indices to decode.")
        indices = torch.as_tensor(indices)
        integers = not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
        check(integers and (not dims or indices.ndim in dims), f"indices are {indices.dtype} {tuple(indices.shape)}, "
              f"but integers of {' or '.join(map(str, dims)) or 'any number of'} dimensions are needed.")
        indices = indices.to([*self.parameters(), *self.buffers(), indices][0].device).long()
        check_range(indices, 0, self.codebook_size - 1, "indices")
        return indices

    def _apply(self, function, recurse: bool = True):
        """to(), half() and others call this. Weights keep their dtype: rounded, they give other codes."""
        return super()._apply(lambda x: x.to(function(x).device), recurse)


def straight_through(x: Tensor, codes: Tensor) -> Tensor:
    """The codes, with x's gradient (1308.3432). The usual x + (codes - x).detach() would round the codes."""
    return codes.detach() + (x - x.detach())


class FSQ(Quantizer):
    """Finite scalar quantization (Mentzer et al., 2309.15505): each of a few numbers is rounded to one of a few levels.

    Eight levels are -3.5, -2.5, ..., 3.5, and five are -2, ..., 2, all scaled to lie from -1 to 1 (2411.19842, section
    3.2). Each combination of levels is a code. None is learned, so none collapses, and the loss is 0. The paper takes
    (8, 6, 5), (8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 8, 8, 6, 5) and the default. If dim is len(levels), there are no maps.
    """

    def __init__(self, dim: int | None = None, levels: list[int] = (8, 8, 8, 5, 5, 5)):
        valid = isinstance(levels, (list, tuple)) and levels and all(isinstance(n, int) and n > 1 for n in levels)
        check(valid, f"levels = {levels!r:.300}, allowed: a list of integers from 2")
        dim = len(levels) if dim is None else dim
        super().__init__(dim, len(levels), (math.prod(levels),), project=dim != len(levels))
        self.levels = tuple(levels)
        self.register_buffer("top_levels", torch.tensor(levels) - 1, persistent=False)

    def quantize(self, x: Tensor) -> Quantized:
        x = x.tanh()
        digits = self.nearest_levels(x)
        return straight_through(x, self.codes(digits)), x.new_zeros(()), join_indices(digits, self.levels)

    def nearest_levels(self, x: Tensor) -> Tensor:
        return ((x + 1) / 2 * self.top_levels).round().long()  # from 0, for x in [-1, 1]

    def codes(self, digits: Tensor) -> Tensor:
        return 2 * digits / self.top_levels - 1

    def lookup(self, indices: Tensor) -> Tensor:
        return self.codes(split_indices(indices, self.levels))


class DDCL(FSQ):
    """Differentiable discrete communication (Freed et al., AAAI 2020; 2511.01554): subtractive dither of step delta.

    project_in and tanh turn a vector into four numbers x in [-1, 1]. Encoder and decoder share noise u, uniform in
    [-delta/2, delta/2]. The encoder sends a whole number m = round((x + u) / delta), and the decoder computes
    m delta - u. The error, m delta - u - x, is uniform and independent of x, so x's gradient is exact. In eval mode u
    is 0, and codes are FSQ's with 2 / delta + 1 levels. The loss is comm_weight times log2(2 |x| / delta + 1), summed
    over numbers, averaged over vectors: as |x| / delta = E |m|, by Jensen at least m's mean bits, E log2(2 |m| + 1).
    """

    def __init__(self, dim: int | None = None, delta: float = 1 / 15, comm_weight: float = 1e-3):
        steps = round(1 / delta) if isinstance(delta, (int, float)) and 0.03 < delta <= 1 else 0
        valid = 0 < steps <= 32 and abs(delta - 1 / steps) < 1e-4
        check(valid, f"delta = {delta!r:.300}, allowed: 1, 1/2, 1/3, ..., 1/32, to four decimals")
        super().__init__(dim, [2 * steps + 1] * 4)
        self.delta, self.comm_weight = 1 / steps, comm_weight

    def quantize(self, x: Tensor) -> Quantized:
        x = x.tanh()
        dither = (torch.rand_like(x) - 0.5) * self.delta if self.training else 0
        digits = self.nearest_levels((x + dither).clamp(-1, 1))  # m + 1 / delta; as |x| <= 1, clamping changes no m
        received = straight_through(x, self.codes(digits) - dither)
        bits = (2 * x.abs() / self.delta + 1).log2().sum(-1).mean()
        return received, self.comm_weight * bits, join_indices(digits, self.levels)


class SimVQ(Quantizer):
    """SimVQ (Zhu et al., 2411.02038): a frozen random codebook, seen through one linear map that is learned.

    The map moves all codes, used or not, but wide codes collapsed even so (RESULTS.md). cosine=True first scales
    vectors and codes to length 1 (2110.04627).
    """

    def __init__(self, dim: int, codebook_size: int = 16384, code_dim: int = 16, commitment_cost: float = 0.25,
                 project: bool = True, cosine: bool = False):
        super().__init__(dim, code_dim, (codebook_size,), project)
        self.commitment_cost, self.cosine = commitment_cost, cosine
        self.register_buffer("frozen_codebook", torch.randn(codebook_size, self.code_dim) * self.code_dim**-0.5)
        self.code_transform = nn.Linear(self.code_dim, self.code_dim, bias=False)

    def quantize(self, x: Tensor) -> Quantized:
        x = self.scale(x)
        indices = nearest_code(x, self.scale(self.code_transform(self.frozen_codebook)))
        codes = self.lookup(indices)
        loss = F.mse_loss(codes, x.detach()) + self.commitment_cost * F.mse_loss(x, codes.detach())
        return straight_through(x, codes), self.code_dim * loss, indices  # the paper sums where mse_loss averages

    def lookup(self, indices: Tensor) -> Tensor:
        return self.scale(self.code_transform(self.frozen_codebook[indices]))

    def scale(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.cosine else x


class MatchedSimVQ(SimVQ):
    """Our SimVQ: its map is computed instead of learned, so that codes of any width stay in use.

    A code is A g + m, with a frozen random g and the vectors' running mean m. A follows from their covariance C:
    1. The index of one of K codes carries at most log K nats about a vector.
    2. If vectors are Gaussian, a vector plus noise of variance s carries log det(I + C / s) / 2 nats about the vector
       (Cover and Thomas, chapter 9). We choose the s for which this is log K.
    3. The best estimate of the vector from its noisy copy has the covariance C (C + s I)^-1 C. We choose A so that
       codes have this covariance. Along directions in which vectors vary less than the noise, codes hardly differ.
    """

    def __init__(self, dim: int, codebook_size: int = 16384, code_dim: int = 16, decay: float = 0.99,
                 commitment_cost: float = 0.25, project: bool = True):
        check(0 < decay < 1, f"decay = {decay!r}, allowed: between 0 and 1")
        super().__init__(dim, codebook_size, code_dim, commitment_cost, project)  # its frozen codebook is g
        self.decay, n = decay, self.code_dim
        self.code_transform = nn.Linear(n, n).requires_grad_(False)  # A and m
        self.register_buffer("mean", torch.zeros(n))  # m, of which the bias is a copy
        self.register_buffer("covariance", torch.eye(n))  # C
        self.register_buffer("total_weight", torch.zeros(()))  # 1 - decay**steps
        self.register_buffer("noise_ratio", torch.ones(()))  # s, divided by the vectors' variance

    def quantize(self, x: Tensor) -> Quantized:
        if self.training:
            self.follow(x.flatten(0, 1))
            self.match()
        indices = nearest_code(x, self.code_transform(self.frozen_codebook))
        codes = self.lookup(indices)
        # divided by the variance, the loss does not fall when all vectors shrink
        loss = self.commitment_cost * F.mse_loss(x, codes) / self.variance()
        return straight_through(x, codes), loss, indices

    def variance(self) -> Tensor:
        return self.covariance.diagonal().mean().clamp(min=1e-10)  # averaged over a vector's numbers

    @torch.no_grad()
    def follow(self, x: Tensor):
        """Update m and C, which are equal in all processes, with vectors x (N, code_dim)."""
        self.total_weight.lerp_(torch.ones_like(self.total_weight), 1 - self.decay)
        rate = (1 - self.decay) / self.total_weight  # 1 in the first step
        x = x - self.mean  # far from zero, fp32 would round shift
        shift = sum_of_processes(x.mean(0)) / count_processes()
        x = x - shift
        covariance = sum_of_processes(x.T @ x / len(x)) / count_processes()
        # law of total covariance: the mean of both covariances, and the covariance of both means
        self.covariance.lerp_(covariance + (1 - rate) * shift.outer(shift), rate)
        self.mean += rate * shift

    @torch.no_grad()
    def match(self):
        """Compute A from C and s, and move s towards the one that fits C."""
        # A g has the covariance A A' / n (' transposes), as g's n numbers have the variance 1 / n. A = sqrt(n) R' makes
        # it R' R, which is C (C + s I)^-1 C for R = L^-1 C and L L' = C + s I.
        n, s = self.code_dim, self.noise_ratio * self.variance()
        # cholesky would wait for the GPU to look for an error
        factor, _ = torch.linalg.cholesky_ex(self.covariance + s * torch.eye(n, device=s.device))  # L
        root = torch.linalg.solve_triangular(factor, self.covariance, upper=False)  # R
        self.code_transform.weight.copy_(n**0.5 * root.T)
        self.code_transform.bias.copy_(self.mean)
        # Newton's step towards log det(I + C / s) / 2 = log K, which falls with log s by half of trace((C + s I)^-1 C)
        excess = factor.diagonal().log().sum() - n / 2 * s.log() - math.log(self.codebook_size)
        slope = torch.linalg.solve_triangular(factor.T, root, upper=True).trace() / 2
        self.noise_ratio.mul_((excess / slope.clamp(min=1e-9)).clamp(-1, 1).exp())
        self.noise_ratio.clamp_(1e-6 * n, 1e6)  # so that C + s I stays positive definite in fp32


class EMAVQ(Quantizer):
    """VQ-VAE with moving averages (1711.00937, appendix A.1; 1906.00446): the nearest code by Euclidean distance.

    In step t = 0, 1, ... code e_i gets n_i vectors with the sum s_i. Then N_i and e_i become
        N_i = (1 - w) N_i + w n_i        e_i = e_i + w (s_i - n_i e_i) / N_i
    This is the papers' e_i = m_i / N_i with m_i = (1 - w) m_i + w s_i, but nothing has to keep m_i. The weight w is
    9 / (t + 10), but at least 1 - decay, so that the first steps are soon forgotten. The commitment loss is a mean.

    mean_count is the same average of vectors per code, without restarts. A code with N_i below 0.1 mean_count is dead,
    as nearly all of a large codebook are at first. It restarts at a random vector, with N_i = 0.2 mean_count. A step
    restarts at most as many codes as a process has vectors, each at another vector.
    """

    def __init__(self, dim: int, codebook_size: int = 65536, code_dim: int = 16, decay: float = 0.99,
                 commitment_cost: float = 0.25, project: bool = True):
        check(0 < decay < 1, f"decay = {decay!r}, allowed: between 0 and 1")
        super().__init__(dim, code_dim, (codebook_size,), project)
        self.decay, self.commitment_cost = decay, commitment_cost
        self.register_buffer("codebook", torch.randn(codebook_size, self.code_dim) * self.code_dim**-0.5)  # e
        self.register_buffer("token_counts", torch.zeros(codebook_size))  # N
        self.register_buffer("mean_count", torch.zeros(()))
        self.register_buffer("steps", torch.zeros(()))  # t

    def quantize(self, x: Tensor) -> Quantized:
        indices = nearest_code(x, self.codebook)
        codes = self.lookup(indices)
        if self.training:
            self.update(x.flatten(0, 1), indices.flatten())
        return straight_through(x, codes), self.commitment_cost * F.mse_loss(x, codes), indices

    def lookup(self, indices: Tensor) -> Tensor:
        return self.codebook[indices]

    @torch.no_grad()
    def update(self, x: Tensor, indices: Tensor):
        """Update codes with vectors x (N, code_dim) of codes `indices` (N,). All processes do the same."""
        counts = sum_of_processes(torch.zeros_like(self.token_counts).index_add_(0, indices, x.new_ones(len(x))))
        sums = sum_of_processes(torch.zeros_like(self.codebook).index_add_(0, indices, x))
        weight = (9 / (self.steps + 10)).clamp(min=1 - self.decay)
        self.steps += 1
        self.token_counts.lerp_(counts, weight)
        self.mean_count.lerp_(counts.mean(), weight)
        change = weight * (sums - counts[:, None] * self.codebook)
        self.codebook += change / self.token_counts[:, None].clamp(min=1e-20)  # not 0 / 0

        dead = self.token_counts < 0.1 * self.mean_count
        number = dead.cumsum(0) - 1  # of a dead code, from 0
        dead &= number < counts.sum() / count_processes()  # the mean len(x), equal in all processes
        # for all codes, as compiled code needs shapes that do not depend on values
        vectors = x[torch.randperm(len(x), device=x.device)[number % len(x)]]
        if count_processes() > 1:  # all take process 0's vectors: torch.compile knows sums, but no broadcast
            vectors = sum_of_processes(vectors * (dist.get_rank() == 0))
        self.token_counts.masked_fill_(dead, 0.2 * self.mean_count)
        self.codebook.copy_(torch.where(dead[:, None], vectors, self.codebook))


class MultiCodebook(Quantizer):
    """Several EMA-VQ codebooks. An index has a digit for each: two codebooks of 256 codes make 65,536 codes."""

    def __init__(self, dim: int, codebooks: int = 2, codebook_size: int = 256, code_dim: int = 16,
                 decay: float = 0.99, commitment_cost: float = 0.25, project: bool = True):
        check(isinstance(codebooks, int) and codebooks > 0, f"codebooks = {codebooks!r:.300}, allowed: integers from 1")
        super().__init__(dim, code_dim, (codebook_size,) * codebooks, project)
        shares = 1 if self.residual else codebooks  # of a vector's numbers
        check(self.code_dim % shares == 0, f"code_dim = {self.code_dim}, allowed: a multiple of {codebooks}")
        self.stages = nn.ModuleList(EMAVQ(self.code_dim // shares, codebook_size, 0, decay, commitment_cost, False)
                                    for _ in range(codebooks))

    def quantize(self, x: Tensor) -> Quantized:
        parts, found = [x] * len(self.stages) if self.residual else x.chunk(len(self.stages), -1), []
        for part, stage in zip(parts, self.stages):
            left = part - sum(codes.detach() for codes, *_ in found) if self.residual else part
            found.append(stage.quantize(left))
        codes, losses, digits = zip(*found)
        codes = sum(codes) if self.residual else torch.cat(codes, -1)
        return straight_through(x, codes), sum(losses), join_indices(torch.stack(digits, -1), self.codebook_sizes)

    def lookup(self, indices: Tensor, depth: int | None = None) -> Tensor:
        digits = split_indices(indices, self.codebook_sizes).unbind(-1)[:depth]
        codes = [stage.lookup(digit) for stage, digit in zip(self.stages, digits)]
        return sum(codes) if self.residual else torch.cat(codes, -1)


class ResidualVQ(MultiCodebook):
    """Residual quantization (2107.03312, 2203.01941): each codebook quantizes what those before it leave."""

    residual = True


class ProductVQ(MultiCodebook):
    """Product quantization (Jegou et al., PAMI 2011): each codebook quantizes its own share of the numbers."""


class NoQuantizer(Quantizer):
    """Vectors pass unchanged: no quantizer can reconstruct better. codebook_size is 0."""

    def __init__(self, dim: int):
        super().__init__(dim, 0, (), project=False)
        self.codebook_size = 0

    def quantize(self, x: Tensor) -> Quantized:
        return x, x.new_zeros(()), x.new_zeros(x.shape[:2], dtype=torch.int64)


class Library(Quantizer):
    """vector-quantize-pytorch's class `kind`, with that class's options.

    code_dim 0 leaves out our maps, as these classes have their own. LFQ's loss, an entropy, may be negative.
    `arguments` are for the class's forward. With quantize_dropout, indices in train mode may be negative.
    """

    def __init__(self, dim: int, kind: str, code_dim: int = 0, arguments: dict | None = None, **options):
        kinds = ("VectorQuantize", "SimVQ", "FSQ", "LFQ", "ResidualVQ", "ResidualSimVQ", "ResidualFSQ", "ResidualLFQ")
        check(kind in kinds, f"kind = {kind!r:.300}, allowed: {', '.join(kinds)}")
        with errors_as(InputError, f"{kind} of vector-quantize-pytorch does not work with {options!r:.300}"):
            import vector_quantize_pytorch as library

            module = getattr(library, kind)(dim=code_dim or dim, **options)
            layers = module.layers if kind.startswith("Residual") else [module]
            heads = [getattr(layer, name, 1) for layer in layers for name in ("heads", "num_codebooks")]
            check(max(heads) == 1, "each layer has to have one head and one codebook")
            sizes = tuple(layer.codebook_size for layer in layers)
        super().__init__(dim, code_dim, sizes, project=bool(code_dim))
        self.kind, self.module, self.arguments = kind, module, arguments or {}

    def quantize(self, x: Tensor) -> Quantized:
        codes, indices, *losses = self.module(x, **self.arguments)
        loss = losses[0].sum() if losses else x.new_zeros(())  # of several codebooks
        indices = join_indices(indices.reshape(*x.shape[:2], -1).long(), self.codebook_sizes)
        if not self.training:
            decoded = self.lookup(indices)  # the module's codes may be rounded differently
            same = torch.compiler.is_compiling() or (decoded - codes).abs().max() <= 1e-3 * codes.abs().max()
            check(same, f"With its options {self.kind} has indices that do not decode to its output.")
            codes = straight_through(x, decoded)
        return codes, loss, indices

    def lookup(self, indices: Tensor) -> Tensor:
        if self.kind in ("SimVQ", "FSQ", "LFQ"):
            return self.module.indices_to_codes(indices)
        digits = split_indices(indices, self.codebook_sizes)
        return self.module.get_output_from_indices(indices if self.kind == "VectorQuantize" else digits)


# Errors, shapes, indices, the nearest code, processes

class InputError(ValueError):
    """A mistake in the user's input."""


def check(ok: bool, sentence: str):
    """Raise InputError(sentence) unless ok. The sentence says what happened, and what to do."""
    if not ok:
        raise InputError(sentence)


@contextlib.contextmanager
def errors_as(kind: type[Exception], message: str):
    """Raise `kind`, with a message in one line, for any error of the body."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise kind(f"{message}: {reason:.300}") from error


def check_range(x: Tensor, low: float, high: float, name: str):
    """InputError unless x has values, all in [low, high]. torch.compile and export leave this check out."""
    if not torch.compiler.is_compiling():
        check(x.numel(), f"There are no {name}.")
        least, most = torch.stack(x.aminmax()).tolist()  # with a NaN both are NaN
        check(low <= least <= most <= high,
              f"The values of {name} range from {least:,} to {most:,}, but {low:,} to {high:,} is allowed.")


def to_vectors(z: Tensor, dim: int, name: str) -> tuple[Tensor, torch.Size]:
    """z (B, C, H, W) or (B, N, C) -> vectors (B, N, C), fp32, and their indices' shape. InputError for others."""
    given = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
    valid = isinstance(z, Tensor) and z.ndim in (3, 4) and z.numel() and z.is_floating_point()
    vectors = z.movedim(1, 3) if valid and z.ndim == 4 else z
    check(valid and vectors.shape[-1] == dim, f"{name} is {given}, allowed: floats (B, {dim}, H, W) or (B, N, {dim})")
    return vectors.float().flatten(1, -2), vectors.shape[:-1]


def to_grid(vectors: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of to_vectors: (B, N, C) -> z (B, C, H, W) or (B, N, C), whose indices have this shape."""
    z = vectors.unflatten(1, shape[1:])
    return z.movedim(3, 1) if len(shape) == 3 else z


def split_indices(indices: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """indices (...) -> digits (..., k) in mixed radix: index = i_0 + sizes[0] (i_1 + sizes[1] (i_2 + ...))."""
    return torch.stack([indices // math.prod(sizes[:k]) % size for k, size in enumerate(sizes)], -1)


def join_indices(digits: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The inverse of split_indices: digits (..., k) -> indices (...)."""
    index = 0
    for digit, size in zip(digits.unbind(-1)[::-1], sizes[::-1]):
        index = digit.add(index, alpha=size)  # digit + size * index, as one operation
    return index


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """Indices (...) of the codes in codebook (K, D) nearest to vectors x (..., D), by Euclidean distance.

    |x - c|^2 is least where x.c - |c|^2 / 2 is largest. Both are first centred at the codes' mean: far from zero, fp32
    would round the differences away. Blocks bound the scores to 8 MB on a CPU and 1 GB on a GPU.
    """
    center = codebook.detach().mean(0)
    vectors, codes = x.detach().flatten(0, -2) - center, codebook.detach() - center
    bias = torch.linalg.vector_norm(codes, dim=1).square() / -2  # codes.square() would allocate another codebook
    rows = max(1, (2**30 if x.is_cuda else 2**23) // (x.element_size() * len(codes)))
    # an exported graph takes any number of vectors, but a fixed number of blocks
    blocks = [vectors] if torch.compiler.is_exporting() else vectors.split(rows)
    return torch.cat([best_column(torch.addmm(bias, block, codes.T)) for block in blocks]).view(x.shape[:-1])


def best_column(scores: Tensor) -> Tensor:
    """scores.argmax(1). A CPU is sooner with max, and for many columns with groups of 256."""
    if scores.shape[1] < 4096 or scores.shape[1] % 256:
        return scores.max(1).indices
    groups = scores.unflatten(1, (-1, 256))
    best = groups.amax(2).argmax(1)
    columns = groups.gather(1, best[:, None, None].expand(-1, 1, 256))[:, 0]
    return best * 256 + columns.argmax(1)


def count_processes() -> int:
    """The number of torchrun's processes, or 1."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_of_processes(x: Tensor) -> Tensor:
    """x, summed in place over torchrun's processes."""
    if count_processes() > 1:
        dist.all_reduce(x)
    return x


QUANTIZERS = {
    "fsq": FSQ, "ddcl": DDCL, "simvq": SimVQ, "simvq_cosine": partial(SimVQ, cosine=True),
    "simvq_matched": MatchedSimVQ, "ema_vq": EMAVQ, "residual_vq": ResidualVQ, "product_vq": ProductVQ,
    "none": NoQuantizer, "library": Library,
    # LFQ's weights are from a short search, BSQ's temperature is its authors'
    "lfq": partial(Library, kind="LFQ", codebook_size=65536, entropy_loss_weight=1e-3, commitment_loss_weight=0.25),
    "bsq": partial(Library, kind="LFQ", codebook_size=65536, spherical=True, arguments={"inv_temperature": 1.0}),
    "rotation_vq": partial(Library, kind="VectorQuantize", codebook_size=65536, code_dim=16, rotation_trick=True,
                           threshold_ema_dead_code=2),
    "residual_fsq": partial(Library, kind="ResidualFSQ", levels=(8, 6, 5), num_quantizers=2)}


def build_quantizer(name: str | type[Quantizer], dim: int, **options) -> Quantizer:
    """Build the quantizer of this name in QUANTIZERS, or of this class, for vectors of dim numbers.

    options: its class's arguments. quantizer.config records name and options for checkpoints, with tuples for lists.
    """
    if not isinstance(name, type):
        check_registered(name)
    kind = QUANTIZERS.get(name, name)
    names = [known for known in QUANTIZERS if QUANTIZERS[known] is kind] or [kind.__name__]
    options = {option: tuple(x) if isinstance(x, list) else x for option, x in options.items()}
    quantizer = kind(dim, **options)
    quantizer.config = {"quantizer": names[0], "quantizer_options": options}
    return quantizer


def check_registered(name: str):
    """InputError unless a quantizer has this name."""
    check(name in QUANTIZERS, f"quantizer = {name!r:.300}, allowed: {', '.join(QUANTIZERS)}, or a class of yours, "
          f"registered first: QUANTIZERS[{name!r:.300}] = YourClass")
