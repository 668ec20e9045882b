"""FSQ, DDCL, SimVQ, EMA-VQ, residual and product codebooks, and vector-quantize-pytorch's, behind one interface.

    quantizer = build_quantizer("fsq", dim=256)
    z_q, loss, indices = quantizer(z)       # z and z_q (B, C, H, W) or (B, N, C), indices (B, H, W) or (B, N)
    quantizer.indices_to_codes(indices)     # z_q again, in eval mode exactly the same numbers
    quantizer.codes_to_indices(z_q)         # the indices again
    quantizer.get_codebook_entry(indices)   # (N,) -> (N, C)
    quantizer.codebook_size                 # the number of codes, of all codebooks together

Here a token is the vector of C numbers at one position of the grid. project_in maps it to code_dim numbers, the
nearest code replaces these, and project_out maps the code to z_q. code_dim=0 makes codes as wide as tokens, and so does
project=False, which leaves out both maps. "simvq" is our variant of SimVQ, and "simvq_learned" is the paper's.
Copy this file into your project, and add the loss to yours. It needs torch alone (Library: vector-quantize-pytorch).
"""
import contextlib
import importlib
import inspect
import math
from abc import ABC, abstractmethod
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Quantized = tuple[Tensor, Tensor, Tensor]  # codes or z_q, loss, indices


class Quantizer(nn.Module, ABC):
    """What all quantizers share: shapes, maps and checks. A quantizer of your own defines `quantize` and `lookup`.

    A token has one index. With several codebooks it is i_0 + size_0 (i_1 + size_1 (...)), where the digit i_k is the
    token's index in codebook k.
    `config` holds the name and the options with which build_quantizer builds the same quantizer.
    """

    residual = False  # whether the codebooks' codes add up, so that the first few can be decoded alone

    def __new__(cls, *arguments, **options):  # records the options, so that no subclass has to write its config
        quantizer = super().__new__(cls)
        quantizer.config = config_of(cls, arguments, options)
        return quantizer

    def __init__(self, dim: int, code_dim: int, codebook_sizes: tuple[int, ...], project: bool = True):
        super().__init__()
        self.dim = dim
        self.code_dim = code_dim if project and code_dim else dim
        sizes = (dim, self.code_dim, *codebook_sizes)
        valid = all(type(n) is int and n > 0 for n in sizes) and math.prod(codebook_sizes) < 2**62
        check(valid, "dim, code_dim, codebook sizes", sizes, "integers from 1, below 2**62 codes in all")
        self.codebook_sizes, self.codebook_size = codebook_sizes, math.prod(codebook_sizes)
        self.project_in = nn.Linear(dim, self.code_dim) if project else nn.Identity()
        self.project_out = nn.Linear(self.code_dim, dim) if project else nn.Identity()

    @abstractmethod
    def quantize(self, x: Tensor) -> Quantized:
        """x (B, N, code_dim) -> codes (B, N, code_dim) with x's gradient, loss (scalar), indices (B, N)."""

    @abstractmethod
    def lookup(self, indices: Tensor) -> Tensor:
        """indices (B, N) in [0, codebook_size) -> codes (B, N, code_dim)."""

    def forward(self, z: Tensor) -> Quantized:
        """z (B, C, H, W) or (B, N, C) -> z_q (z's shape, fp32), loss (scalar), indices (B, H, W) or (B, N), int64.

        z_q's gradient reaches z. InputError for another shape and, in eval mode, for NaNs or magnitudes above 1e12.
        Train mode does not look at values, as it would wait for the GPU: a NaN reaches your loss and the codebook.
        """
        tokens, shape = to_tokens(z, self.dim, "z")
        if not self.training:
            check_range(tokens, -1e12, 1e12, "z")
        with torch.autocast(z.device.type, enabled=False):  # bf16 would round distances and codes
            codes, loss, indices = self.quantize(self.project_in(tokens))
            return to_grid(self.project_out(codes), shape), loss, indices.view(shape)

    def indices_to_codes(self, indices: Tensor, depth: int | None = None) -> Tensor:
        """indices (B, H, W) or (B, N) -> z_q (B, C, H, W) or (B, N, C). InputError as in check_indices.

        depth: how many residual codebooks are summed, beginning with the first; None: all
        """
        valid = depth is None or (self.residual and depth in range(1, len(self.codebook_sizes) + 1))
        check(valid, "depth", depth, "None, or 1 to the number of residual codebooks")
        indices = self.check_indices(indices, 2, 3)
        options = {} if depth is None else {"depth": depth}  # the lookup of residual codebooks alone takes a depth
        with torch.autocast(indices.device.type, enabled=False):
            codes = self.lookup(indices.flatten(1), **options)
            return to_grid(self.project_out(codes), indices.shape)

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        """indices (N,) -> z_q (N, C). InputError as in check_indices."""
        return self.indices_to_codes(self.check_indices(indices, 1)[None])[0]

    @torch.no_grad()
    def codes_to_indices(self, z_q: Tensor) -> Tensor:
        """z_q (B, C, H, W) or (B, N, C) -> indices of the nearest codes (B, H, W) or (B, N).

        InputError for another shape, for NaNs or magnitudes above 1e12, and for a quantizer of more than 2**24 codes.
        """
        tokens, shape = to_tokens(z_q, self.dim, "z_q")
        return nearest_index(self, tokens).view(shape)

    def check_indices(self, indices: Tensor, *dims: int) -> Tensor:
        """Indices, as a tensor, a list or an array -> an int64 tensor on the quantizer's device.

        dims: how many dimensions they may have; none given: any number
        InputError for another number of dimensions, for other types, and for indices outside [0, codebook_size).
        """
        indices = torch.as_tensor(indices)
        integers = not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
        require(integers, f"indices are {indices.dtype}, but integers are needed.")
        require(not dims or indices.ndim in dims, f"indices have the shape {tuple(indices.shape)}, but "
                f"{' or '.join(map(str, dims))} dimensions are needed.")
        indices = indices.to([*self.parameters(), *self.buffers(), indices][0].device).long()
        check_range(indices, 0, self.codebook_size - 1, "indices")
        return indices

    def _apply(self, function, recurse: bool = True):
        """to(), half() and others call this. It keeps the weights' dtype: rounded, they would give other indices."""
        return super()._apply(lambda x: keep_type(x, function(x)), recurse)


def straight_through(x: Tensor, codes: Tensor) -> Tensor:
    """The codes, with x's gradient (1308.3432). The usual x + (codes - x).detach() would round the codes."""
    return codes.detach() + (x - x.detach())


# Quantizers without a codebook

class FSQ(Quantizer):
    """Finite scalar quantization (Mentzer et al., 2309.15505): each of a few numbers is rounded to one of a few levels.

    Each combination of levels is a code. No code is learned, so none collapses, and the loss is 0. Levels lie
    symmetrically from -1 to 1 (2411.19842, section 3.2). Good choices: [8, 6, 5] = 240 codes, [8, 8, 8] = 512,
    [8, 5, 5, 5] = 1,000, [8, 8, 8, 5, 5, 5] = 64,000. Tokens with len(levels) channels need no maps.
    """

    def __init__(self, dim: int | None = None, levels: list[int] = (8, 8, 8, 5, 5, 5)):
        valid = isinstance(levels, (list, tuple)) and levels and all(isinstance(n, int) and n > 1 for n in levels)
        check(valid, "levels", levels, "a list of integers from 2")
        dim = len(levels) if dim is None else dim
        super().__init__(dim, len(levels), (math.prod(levels),), project=dim != len(levels))
        self.levels = tuple(levels)
        self.register_buffer("top_levels", torch.tensor(levels) - 1, persistent=False)

    def quantize(self, x: Tensor) -> Quantized:
        x = x.tanh()
        indices = self.nearest(x)
        return straight_through(x, self.lookup(indices)), x.new_zeros(()), indices

    def nearest(self, x: Tensor) -> Tensor:
        """x (B, N, code_dim) -> indices (B, N) of the nearest codes."""
        digits = ((x.clamp(-1, 1) + 1) / 2 * self.top_levels).round().long()  # DDCL's noise may lead outside [-1, 1]
        return join_indices(digits, self.levels)

    def lookup(self, indices: Tensor) -> Tensor:
        return 2 * split_indices(indices, self.levels) / self.top_levels - 1


class DDCL(FSQ):
    """Differentiable discrete communication (Freed et al., AAAI 2020; 2511.01554): subtractive dither of step delta.

    project_in and tanh turn a token into four numbers x in [-1, 1]. Encoder and decoder share noise u, uniform in
    [-delta/2, delta/2]. The encoder sends a whole number m = round((x + u) / delta), and the decoder computes
    m delta - u. The error, m delta - u - x, is uniform and independent of x, so x's gradient is exact. In eval mode u
    is 0, and codes are FSQ's with 2 / delta + 1 levels. The loss is comm_weight times log2(2 |x| / delta + 1), summed
    over the four numbers and averaged over tokens. It bounds the expected length of m in bits, E log2(2 |m| + 1), from
    above, by Jensen's inequality and E|m| = |E m| = |x| / delta, as m never has the opposite sign of x.
    """

    def __init__(self, dim: int | None = None, delta: float = 1 / 15, comm_weight: float = 1e-3):
        steps = round(1 / delta) if isinstance(delta, (int, float)) and 0.03 < delta <= 1 else 0
        valid = 0 < steps <= 32 and abs(delta - 1 / steps) < 1e-4
        check(valid, "delta", delta, "1, 1/2, 1/3, ..., 1/32, to four decimals")
        super().__init__(dim, [2 * steps + 1] * 4)
        self.delta, self.comm_weight = 1 / steps, comm_weight

    def quantize(self, x: Tensor) -> Quantized:
        x = x.tanh()
        dither = (torch.rand_like(x) - 0.5) * self.delta if self.training else 0
        indices = self.nearest(x + dither)
        received = straight_through(x, self.lookup(indices) - dither)
        bits = (2 * x.abs() / self.delta + 1).log2().sum(-1).mean()
        return received, self.comm_weight * bits, indices


# Quantizers with codebooks

class SimVQ(Quantizer):
    """SimVQ (Zhu et al., 2411.02038): a frozen random codebook, seen through one linear map that is learned.

    The map moves all codes, used or not. In our runs wide codes collapsed even so: the map follows the tokens' few
    strongest directions, and tokens follow the codes.
    """

    def __init__(self, dim: int, codebook_size: int = 16384, code_dim: int = 16, commitment_cost: float = 0.25,
                 project: bool = True):
        super().__init__(dim, code_dim, (codebook_size,), project)
        self.commitment_cost = commitment_cost
        self.register_buffer("frozen_codebook", torch.randn(codebook_size, self.code_dim) * self.code_dim**-0.5)
        self.code_transform = nn.Linear(self.code_dim, self.code_dim, bias=False)

    def quantize(self, x: Tensor) -> Quantized:
        indices = nearest_code(x, self.code_transform(self.frozen_codebook))
        codes = self.lookup(indices)
        loss = F.mse_loss(codes, x.detach()) + self.commitment_cost * F.mse_loss(x, codes.detach())
        # the paper's loss is a sum over a code's numbers, mse_loss their mean
        return straight_through(x, codes), self.code_dim * loss, indices

    def lookup(self, indices: Tensor) -> Tensor:
        return self.code_transform(self.frozen_codebook[indices])


class MatchedSimVQ(SimVQ):
    """SimVQ whose map is computed instead of learned, so that codes of any width stay in use.

    A code is A g + m, with a frozen random g and the tokens' running mean m. A follows from the tokens' covariance C:
    1. The index of one of K codes carries at most log K nats about a token.
    2. If tokens are Gaussian, a token plus noise of variance s carries log det(I + C / s) / 2 nats about the token
       (Cover and Thomas, chapter 9). We choose the s for which this is log K.
    3. The best estimate of the token from its noisy copy has the covariance C (C + s I)^-1 C. We choose A so that codes
       have this covariance. Along directions in which tokens vary less than the noise, codes hardly differ.
    If tokens vary equally in all directions, this is the random code of Shannon's rate-distortion theorem (10.3).
    """

    def __init__(self, dim: int, codebook_size: int = 16384, code_dim: int = 16, decay: float = 0.99,
                 commitment_cost: float = 0.25, project: bool = True):
        check(0 < decay < 1, "decay", decay, "between 0 and 1")
        super().__init__(dim, codebook_size, code_dim, commitment_cost, project)  # its frozen codebook is g
        self.decay, n = decay, self.code_dim
        self.code_transform = nn.Linear(n, n).requires_grad_(False)  # A and m
        self.register_buffer("mean", torch.zeros(n))  # m, which the bias repeats
        self.register_buffer("covariance", torch.eye(n))  # C
        self.register_buffer("total_weight", torch.zeros(()))  # the sum of all steps' weights so far, 1 - decay**steps
        self.register_buffer("noise_ratio", torch.ones(()))  # s, divided by the tokens' variance

    def quantize(self, x: Tensor) -> Quantized:
        if self.training:
            self.update(x.flatten(0, 1))
        indices = nearest_code(x, self.code_transform(self.frozen_codebook))
        codes = self.lookup(indices)
        # The codes follow the tokens' scale. Divided by the variance, the loss does not fall when all tokens shrink.
        loss = self.commitment_cost * F.mse_loss(x, codes) / self.variance()
        return straight_through(x, codes), loss, indices

    def variance(self) -> Tensor:
        """The variance of a token's numbers, averaged over them."""
        return self.covariance.diagonal().mean().clamp(min=1e-10)

    @torch.no_grad()
    def update(self, x: Tensor):
        """Follow tokens x (N, code_dim) with the moving averages, equal in all processes, and match A and m to them."""
        self.total_weight.lerp_(torch.ones_like(self.total_weight), 1 - self.decay)
        rate = (1 - self.decay) / self.total_weight  # 1 in the first step, which forgets the initial values
        x = x - self.mean  # centred, as fp32 would round the squares of tokens far from zero
        shift = sum_of_processes(x.mean(0)) / count_processes()
        x = x - shift
        covariance = sum_of_processes(x.T @ x / len(x)) / count_processes()
        # law of total covariance: the mean of the old and new covariance, and the covariance of their two means
        self.covariance.lerp_(covariance + (1 - rate) * shift.outer(shift), rate)
        self.mean += rate * shift

        # A g has the covariance A A' / n (' transposes), as g's n numbers have the variance 1 / n. A = sqrt(n) R' makes
        # it R' R, which is C (C + s I)^-1 C for R = L^-1 C and L L' = C + s I.
        n, s = self.code_dim, self.noise_ratio * self.variance()
        # unlike cholesky, cholesky_ex does not wait for the GPU to look for an error
        factor, _ = torch.linalg.cholesky_ex(self.covariance + s * torch.eye(n, device=x.device))  # L
        root = torch.linalg.solve_triangular(factor, self.covariance, upper=False)  # R
        self.code_transform.weight.copy_(n**0.5 * root.T)
        self.code_transform.bias.copy_(self.mean)
        # A step of Newton's method moves log s towards log det(I + C / s) / 2 = log K. The slope, which is minus the
        # derivative by log s, is half the trace of (C + s I)^-1 C.
        excess = factor.diagonal().log().sum() - n / 2 * s.log() - math.log(self.codebook_size)
        slope = torch.linalg.solve_triangular(factor.T, root, upper=True).trace() / 2
        self.noise_ratio.mul_((excess / slope.clamp(min=1e-9)).clamp(-1, 1).exp())
        self.noise_ratio.clamp_(1e-6 * n, 1e6)  # so that C + s I stays positive definite in fp32


class EMAVQ(Quantizer):
    """VQ-VAE with moving averages (1711.00937, appendix A.1; 1906.00446): the nearest code by Euclidean distance.

    In step t = 0, 1, ... code e_i gets n_i tokens with the sum s_i. Then N_i and e_i become
        N_i = (1 - w) N_i + w n_i        e_i = e_i + w (s_i - n_i e_i) / N_i
    This is the papers' e_i = m_i / N_i with m_i = (1 - w) m_i + w s_i, but nothing has to keep m_i. The weight w is
    9 / (t + 10), but at least 1 - decay, so that the first steps, when nothing has settled, are soon forgotten. A code
    without tokens stays where it is, until it is dead. The loss is the commitment loss.

    mean_count is the same moving average, of the number of tokens per code. A code with N_i below 0.1 mean_count is
    dead. It restarts at a random token, with N_i = 0.2 mean_count. At first nearly all codes of a large codebook are
    dead. A step restarts at most as many as a process has tokens on average. Several may restart at the same token.
    """

    def __init__(self, dim: int, codebook_size: int = 65536, code_dim: int = 16, decay: float = 0.99,
                 commitment_cost: float = 0.25, project: bool = True):
        check(0 < decay < 1, "decay", decay, "between 0 and 1")
        super().__init__(dim, code_dim, (codebook_size,), project)
        self.decay, self.commitment_cost = decay, commitment_cost
        self.register_buffer("codebook", torch.randn(codebook_size, self.code_dim) * self.code_dim**-0.5)  # e
        self.register_buffer("token_counts", torch.zeros(codebook_size))  # N
        self.register_buffer("mean_count", torch.zeros(()))  # moving average of n_i, averaged over all codes
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
        """Follow tokens x (N, code_dim), which have the codes `indices` (N,). All processes do the same step."""
        counts = sum_of_processes(torch.zeros_like(self.token_counts).index_add_(0, indices, x.new_ones(len(x))))
        sums = sum_of_processes(torch.zeros_like(self.codebook).index_add_(0, indices, x))
        weight = (9 / (self.steps + 10)).clamp(min=1 - self.decay)
        self.steps += 1
        self.token_counts.lerp_(counts, weight)
        self.mean_count.lerp_(counts.mean(), weight)
        change = weight * (sums - counts[:, None] * self.codebook)
        self.codebook += change / self.token_counts[:, None].clamp(min=1e-20)  # not 0 / 0 without any token so far

        dead = self.token_counts < 0.1 * self.mean_count
        dead &= dead.cumsum(0) <= counts.sum() / count_processes()  # cumsum numbers the dead codes from 1
        # each code draws a token, dead or not: compiled code needs shapes that do not depend on values
        tokens = x[torch.randint(len(x), dead.shape, device=x.device)]
        if count_processes() > 1:  # all take process 0's tokens: torch.compile knows no broadcast, but sums
            tokens = sum_of_processes(tokens * (dist.get_rank() == 0))
        self.token_counts.masked_fill_(dead, 0.2 * self.mean_count)
        self.codebook.copy_(torch.where(dead[:, None], tokens, self.codebook))


class MultiCodebook(Quantizer):
    """Several EMA-VQ codebooks. An index has a digit for each: two codebooks of 256 codes make 65,536 codes."""

    def __init__(self, dim: int, codebooks: int = 2, codebook_size: int = 256, code_dim: int = 16,
                 decay: float = 0.99, commitment_cost: float = 0.25, project: bool = True):
        check(isinstance(codebooks, int) and codebooks > 0, "codebooks", codebooks, "an integer from 1")
        super().__init__(dim, code_dim, (codebook_size,) * codebooks, project)
        n = self.code_dim
        check(self.residual or n % codebooks == 0, "code_dim", n, f"a multiple of {codebooks}")
        width = n if self.residual else n // codebooks
        self.stages = nn.ModuleList(
            EMAVQ(width, codebook_size, 0, decay, commitment_cost, project=False) for _ in range(codebooks))
        # which of a code's numbers each codebook quantizes
        self.parts = [slice(None) if self.residual else slice(i * width, (i + 1) * width) for i in range(codebooks)]

    def quantize(self, x: Tensor) -> Quantized:
        codes, loss, digits = torch.zeros_like(x), 0, []
        for stage, part in zip(self.stages, self.parts):
            rest = (x - codes)[..., part]  # what the codebooks before leave; ProductVQ's codes are still 0 in this part
            stage_codes, stage_loss, stage_indices = stage.quantize(rest)
            codes[..., part] += stage_codes.detach()
            loss = loss + stage_loss
            digits.append(stage_indices)
        return straight_through(x, codes), loss, join_indices(torch.stack(digits, -1), self.codebook_sizes)

    def lookup(self, indices: Tensor, depth: int | None = None) -> Tensor:
        digits = split_indices(indices, self.codebook_sizes)
        codes = torch.zeros(*indices.shape, self.code_dim, device=indices.device)
        for i in range(depth or len(self.stages)):
            codes[..., self.parts[i]] += self.stages[i].lookup(digits[..., i])
        return codes


class ResidualVQ(MultiCodebook):
    """Residual quantization (2107.03312, 2203.01941): each codebook quantizes what those before it leave.

    Codes add up, so the first few codebooks can be decoded alone, coarse to fine: indices_to_codes(indices, depth=1).
    """

    residual = True


class ProductVQ(MultiCodebook):
    """Product quantization (Jegou et al., PAMI 2011): each codebook quantizes its own share of the numbers."""


class NoQuantizer(Quantizer):
    """Tokens pass unchanged, so that no quantizer can reconstruct better. codebook_size is 0."""

    def __init__(self, dim: int):
        super().__init__(dim, 0, (), project=False)
        self.codebook_size = 0

    def quantize(self, x: Tensor) -> Quantized:
        return x, x.new_zeros(()), x.new_zeros(x.shape[:2], dtype=torch.int64)

    def check_indices(self, indices: Tensor, *dims: int) -> Tensor:
        raise InputError("Without a quantizer there are no indices to decode: choose another one than 'none'.")

    def lookup(self, indices: Tensor) -> Tensor:
        return self.check_indices(indices)  # which refuses them


class Library(Quantizer):
    """A quantizer of the package vector-quantize-pytorch: its class `kind`, with that class's options.

    With code_dim 0 there are no maps here: the class projects tokens itself, if it has to. An index has a digit for
    each of its codebooks. LFQ's loss, an entropy, may be negative. `arguments` are those of the class's forward, such
    as LFQ's inv_temperature. With quantize_dropout, indices of train mode are of no use.
    """

    def __init__(self, dim: int, kind: str, code_dim: int = 0, arguments: dict | None = None, **options):
        with errors_as(InputError, "This quantizer needs a package that loads (pip install vector-quantize-pytorch)"):
            library = importlib.import_module("vector_quantize_pytorch")
        kinds = [name for name in dir(library) if isinstance(getattr(library, name), type)]
        check(kind in kinds, "kind", kind, ", ".join(kinds))
        options = {name: tuple(x) if isinstance(x, list) else x for name, x in options.items()}  # JSON has no tuples
        arguments = arguments or {}
        build = partial(getattr(library, kind), dim=code_dim or dim)
        # A copy is tried on two tokens, which shows its indices' shape, and whether they decode to its output. It must
        # not wait for other processes, as k-means and shared statistics do, nor change the random numbers of training.
        unshared = {name: False for name in ("kmeans_init", "sync_affine_param") if name in options}
        with errors_as(InputError, f"{kind} does not work with {options!r:.300}"):
            with torch.device("cpu"), torch.no_grad():  # some classes cannot be built on the meta device
                module = build(**options)
                with torch.random.fork_rng(devices=[]):
                    copy = build(**options | unshared).eval()
                z = torch.linspace(-1, 1, 2 * (code_dim or dim)).view(1, 2, -1)
                z_q, indices, *_ = copy(z, **arguments)
                codes = read_codes(copy, indices)
            same = codes.shape == z_q.shape == z.shape and torch.allclose(codes, z_q, atol=1e-5)
            require(same, "the codes of its indices are not its output")
        size = getattr(module, "codebook_size", options.get("codebook_size"))
        sizes = getattr(module, "codebook_sizes", size)
        # the class names one size for all codebooks, or the sizes of one group's codebooks, and all groups are alike
        sizes = tuple(sizes) if isinstance(sizes, (tuple, list)) else (sizes,)
        codebooks = indices.numel() // 2  # each of the two tokens has an index in each codebook
        super().__init__(dim, code_dim, sizes * (codebooks // len(sizes)), project=bool(code_dim))
        self.kind, self.module, self.arguments = kind, module, arguments
        # The class's indices are (B, N), (B, N, codebooks) or, of grouped codebooks, (groups, B, N, codebooks).
        self.axes, self.groups = indices.ndim, len(indices)  # groups is for indices of four axes alone

    def quantize(self, x: Tensor) -> Quantized:
        exports = self.kind == "LFQ" or not torch.compiler.is_exporting()
        require(exports, f"Of vector-quantize-pytorch's classes LFQ alone can be exported, not {self.kind}.")
        codes, indices, *losses = self.module(x, **self.arguments)
        loss = losses[0].sum() if losses else x.new_zeros(())  # several codebooks have a loss each
        if self.axes == 4:
            indices = indices.movedim(0, 2)
        digits = indices.reshape(*indices.shape[:2], -1).long()  # (B, N, codebooks)
        indices = join_indices(digits, self.codebook_sizes)
        if not self.training:
            codes = straight_through(x, self.lookup(indices))  # exactly what indices_to_codes gives
        return codes, loss, indices

    def lookup(self, indices: Tensor) -> Tensor:
        digits = split_indices(indices, self.codebook_sizes)  # (B, N, codebooks)
        if self.axes == 4:
            digits = digits.unflatten(2, (self.groups, -1)).movedim(2, 0)
        elif self.axes == 2:
            digits = digits[..., 0]
        return read_codes(self.module, digits)


def read_codes(module: nn.Module, indices: Tensor) -> Tensor:
    """Codes (B, N, C) of a module of vector-quantize-pytorch. Indices have the shape that its forward returns."""
    if hasattr(module, "get_output_from_indices"):
        return module.get_output_from_indices(indices)
    return module.indices_to_codes(indices)


# Errors

class InputError(ValueError):
    """A mistake in the user's input. The message says in one line what to change."""


def check(ok: bool, sentence: str, value: object = None, allowed: str | None = None):
    """Unless ok, raise InputError(sentence). The sentence says what happened and what to do."""
    if not ok:
        raise InputError(sentence if allowed is None else f"{sentence} = {value!r:.300}, allowed: {allowed}")


def require(ok: bool, sentence: str):
    """Unless ok, raise InputError(sentence). The sentence says what happened and what to do."""
    if not ok:
        raise InputError(sentence)


@contextlib.contextmanager
def errors_as(kind: type[Exception], message: str):
    """Raise `kind`, with a message in one line, for any error of the body. The error itself stays as its cause."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise kind(f"{message}: {reason:.300}") from error


def check_range(x: Tensor, low: float, high: float, name: str):
    """Raise InputError unless x has values, all in [low, high]. torch.compile and export leave this check out."""
    if not torch.compiler.is_compiling():
        require(x.numel(), f"There are no {name}.")
        least, most = torch.stack(x.aminmax()).tolist()  # a NaN makes both NaN, and the comparison False
        require(low <= least <= most <= high,
                f"The values of {name} range from {least:,} to {most:,}, but {low:,} to {high:,} is allowed.")


# Shapes, indices, the nearest code, processes

def to_tokens(z: Tensor, dim: int, name: str) -> tuple[Tensor, torch.Size]:
    """z (B, C, H, W) or (B, N, C) -> tokens (B, N, C), fp32, and the shape of their indices. InputError for others."""
    if not (isinstance(z, Tensor) and z.ndim in (3, 4) and z.numel() and z.is_floating_point()):
        kind = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise InputError(f"{name} is {kind}, but floats (B, C, H, W) or (B, N, C), at least one, are needed.")
    tokens = (z.movedim(1, 3) if z.ndim == 4 else z).float()
    require(tokens.shape[-1] == dim, f"{name} has {tokens.shape[-1]} channels, but this quantizer was built for {dim}.")
    return tokens.flatten(1, -2), tokens.shape[:-1]


def to_grid(tokens: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of to_tokens: tokens (B, N, C) -> z (B, C, H, W) or (B, N, C), whose indices have this shape."""
    z = tokens.unflatten(1, shape[1:])
    return z.movedim(3, 1) if len(shape) == 3 else z


def split_indices(indices: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """indices (...) -> digits (..., k) in mixed radix: index = i_0 + sizes[0] (i_1 + sizes[1] (i_2 + ...))."""
    return torch.stack([indices // math.prod(sizes[:k]) % size for k, size in enumerate(sizes)], -1)


def join_indices(digits: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The inverse of split_indices: digits (..., k) -> indices (...)."""
    return sum(digit * math.prod(sizes[:k]) for k, digit in enumerate(digits.unbind(-1)))


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """Indices (...) of the codes in codebook (K, D) nearest to vectors x (..., D), by Euclidean distance.

    |x - c|^2 is least where x.c - |c|^2 / 2 is largest. Both are first centred at the codes' mean: far from zero, fp32
    would round the differences away. Blocks bound the scores to 8 MB on a CPU and 1 GB on a GPU.
    """
    center = codebook.detach().mean(0)
    tokens, codes = x.detach().flatten(0, -2) - center, codebook.detach() - center
    bias = torch.linalg.vector_norm(codes, dim=1).square() / -2  # codes.square() would be as large as the codebook
    rows = max(1, (2**28 if x.is_cuda else 2**21) // len(codes))
    # an exported graph takes any number of tokens, so the number of blocks cannot be fixed in it
    blocks = [tokens] if torch.compiler.is_exporting() else tokens.split(rows)
    return torch.cat([grouped_argmax(torch.addmm(bias, block, codes.T)) for block in blocks]).view(x.shape[:-1])


def grouped_argmax(scores: Tensor) -> Tensor:
    """scores.argmax(1) for scores (N, K). It finds the best group of columns, then the best column in this group.

    A CPU finds a maximum faster than its place: for 65,536 codes, nearest_code takes a third of the time. Groups have
    gcd(K, 256) columns, which is 256 if K is a multiple of 256.
    """
    size = math.gcd(scores.shape[1], 256)
    groups = scores.unflatten(1, (-1, size))
    best = groups.amax(2).argmax(1)
    columns = groups.take_along_dim(best[:, None, None], 1)[:, 0]
    return best * size + columns.argmax(1)


def nearest_index(quantizer: Quantizer, tokens: Tensor) -> Tensor:
    """Tokens (B, N, C) -> the indices (B, N) of the nearest z_q. Blocks of codes bound the memory."""
    size = quantizer.codebook_size
    check_range(tokens, -1e12, 1e12, "z_q")
    require(size <= 2**24, f"The nearest of {size:,} codes would take too long to find: at most 2**24 are compared.")
    least = torch.full_like(tokens[..., 0], torch.inf)  # each token's smallest squared distance so far
    indices = torch.zeros_like(least, dtype=torch.int64)
    with torch.autocast(tokens.device.type, enabled=False):
        for block in torch.arange(size, device=tokens.device).split(2**13):
            codes = quantizer.get_codebook_entry(block)
            nearest = nearest_code(tokens, codes)
            distances = (tokens - codes[nearest]).square().sum(-1)
            indices = torch.where(distances < least, block[nearest], indices)
            least = torch.minimum(least, distances)
    return indices


def keep_type(x: Tensor, moved: Tensor) -> Tensor:
    """`moved`, or if its dtype is not x's, x on the device of `moved`."""
    return moved if moved.dtype == x.dtype else x.to(moved.device)


def count_processes() -> int:
    """The number of torchrun's processes, or 1."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_of_processes(x: Tensor) -> Tensor:
    """x, summed in place over torchrun's processes."""
    if count_processes() > 1:
        dist.all_reduce(x)
    return x


# build_quantizer's names. "simvq" is our variant with a matched map, "simvq_learned" is the paper's.

QUANTIZERS = {
    "fsq": FSQ, "ddcl": DDCL, "simvq": MatchedSimVQ, "simvq_learned": SimVQ, "ema_vq": EMAVQ,
    "residual_vq": ResidualVQ, "product_vq": ProductVQ, "none": NoQuantizer, "library": Library,
    # LFQ's loss weights come from a short search (RESULTS.md). BSQ's inverse temperature is its authors'.
    "lfq": partial(Library, kind="LFQ", codebook_size=65536, entropy_loss_weight=1e-3, commitment_loss_weight=0.25),
    "bsq": partial(Library, kind="LFQ", codebook_size=65536, spherical=True, arguments={"inv_temperature": 1.0}),
    "rotation_vq": partial(Library, kind="VectorQuantize", codebook_size=65536, code_dim=16, rotation_trick=True,
                           threshold_ema_dead_code=2),
    "residual_fsq": partial(Library, kind="ResidualFSQ", levels=(8, 6, 5), num_quantizers=2)}


def build_quantizer(name: str, dim: int, **options) -> Quantizer:
    """Build the quantizer of this name in QUANTIZERS for tokens of dim channels. Its class takes the options.

    InputError for an unknown name, or an option's value that the class refuses.
    """
    check_registered(name)
    quantizer = QUANTIZERS[name](dim, **options)
    quantizer.config["quantizer"] = name
    return quantizer


def check_registered(name: str):
    """InputError unless a quantizer has this name."""
    check(name in QUANTIZERS, "quantizer", name, f"{', '.join(QUANTIZERS)}, or a class of yours, registered before you "
          f"build or load it: QUANTIZERS[{name!r}] = YourClass")


def config_of(kind: type[Quantizer], arguments: tuple, options: dict) -> dict:
    """The name and all options, also defaults, with which build_quantizer builds kind(*arguments, **options)."""
    parameters = inspect.signature(kind.__init__).parameters
    names = list(parameters)[1:]  # dim and the options, without self
    named = names and all(parameters[name].kind is not inspect.Parameter.VAR_POSITIONAL for name in names)
    require(named, f"{kind.__name__}.__init__ has to take dim first, and then options by name, which a file keeps.")
    chosen = {name: x.default for name, x in parameters.items() if x.default is not x.empty}
    chosen |= dict(zip(names, arguments)) | options
    # options are compared with those of a file, and a list never equals a tuple
    chosen = {name: tuple(x) if isinstance(x, list) else x for name, x in chosen.items()}
    chosen.pop(names[0], None)  # the model that builds the quantizer knows dim
    known = [name for name in QUANTIZERS if QUANTIZERS[name] is kind]
    return {"quantizer": known[0] if known else kind.__name__, "quantizer_options": chosen}
