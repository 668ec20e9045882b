"""FSQ, SimVQ, EMA-VQ, DDCL, residual and product codebooks, and vector-quantize-pytorch's, behind one interface.

    quantizer = build_quantizer("fsq", dim=256)
    z_q, loss, indices = quantizer(z)       # z, z_q (B, C, H, W) or (B, N, C); indices (B, H, W) or (B, N)
    quantizer.indices_to_codes(indices)     # z_q again: in eval mode the same numbers, exactly
    quantizer.codes_to_indices(z_q)         # and back
    quantizer.get_codebook_entry(indices)   # (N,) -> (N, C)
    quantizer.codebook_size

A token is a position of the grid: its C numbers, or its index. project_in maps the C numbers to code_dim numbers,
one of codebook_size codes is picked for them, and project_out maps it to z_q. code_dim 0 means C; None: no maps.
This file needs torch alone: copy it into your project, and add the loss to yours.
"""
import copy
import importlib
import math
from abc import ABC, abstractmethod
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Quantized = tuple[Tensor, Tensor, Tensor]  # codes or z_q, loss, indices


def check(ok: bool, name: str, value: object, allowed: str):
    """Unless ok, ValueError in one line: name, value and what is allowed."""
    if not ok:
        raise ValueError(f"{name} = {value!r:.300}, allowed: {allowed}")


def check_range(x: Tensor, low: float, high: float, name: str):
    """ValueError unless x is in [low, high]. No check while torch compiles or exports: x has no values."""
    if not torch.compiler.is_compiling() and x.numel():
        least, most = torch.stack(x.aminmax()).tolist()  # a NaN makes both NaN, and the comparison False
        check(low <= least <= most <= high, f"range of {name}", (least, most), f"{low:,} to {high:,}")


def straight_through(x: Tensor, codes: Tensor) -> Tensor:
    """The codes, with x's gradient (1308.3432). The usual x + (codes - x).detach() is not exact."""
    return codes.detach() + (x - x.detach())


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """Indices (...) of the codes in codebook (K, D) nearest to vectors x (..., D), by Euclidean distance.

    |x - c|^2 is least where x.c - |c|^2 / 2 is largest: a matrix product, in chunks of 16 MB on a CPU, 1 GB on a GPU.
    Both are taken from the codes' mean first: far from zero, fp32 would round the differences away.
    """
    center = codebook.detach().mean(0)
    x, codebook = x.detach() - center, codebook.detach() - center  # not by no_grad, which torch.jit.trace ignores
    bias = torch.linalg.vector_norm(codebook, dim=1).square() / -2  # without a temporary copy
    size, tokens = math.gcd(len(codebook), 256), x.flatten(0, -2)
    rows = max(1, (2**28 if x.is_cuda else 2**22) // len(codebook))
    exported = torch.compiler.is_exporting() or torch.jit.is_tracing()  # without a loop, for any number of tokens
    chunks = [tokens] if exported else tokens.split(rows)
    scores, found = None, []
    for chunk in chunks:  # the best group of `size` codes, then its best: three times as fast as one argmax
        out = None if scores is None else scores[: len(chunk)]  # reused: new memory costs as much as the product
        scores = torch.addmm(bias, chunk, codebook.T, out=out)
        groups = scores.unflatten(1, (-1, size))
        best = groups.amax(2, keepdim=True).argmax(1, keepdim=True)
        found.append(best[:, 0, 0] * size + groups.gather(1, best.expand(-1, -1, size))[:, 0].argmax(1))
    return torch.cat(found).view(x.shape[:-1])


def sum_of_processes(x: Tensor) -> Tensor:
    """x summed over the processes of torchrun; x itself in one process."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


def split_indices(indices: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """indices (...) -> sub-indices (..., k) in mixed radix: index = i_0 + sizes[0] (i_1 + sizes[1] (i_2 + ...))."""
    return torch.stack([indices // math.prod(sizes[:k]) % size for k, size in enumerate(sizes)], -1)


def join_indices(sub_indices: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Inverse of split_indices: sub-indices (..., k) -> indices (...)."""
    return sum(index * math.prod(sizes[:k]) for k, index in enumerate(sub_indices.unbind(-1)))


class Quantizer(nn.Module, ABC):
    """Shapes, checks and projections of all quantizers. Each defines `quantize` and `lookup`."""

    residual = False  # whether the first few codebooks can be decoded alone

    def __init__(self, dim: int, code_dim: int | None, codebook_sizes: tuple[int, ...]):
        super().__init__()
        self.dim, self.code_dim = dim, code_dim or dim
        self.codebook_sizes, self.codebook_size = codebook_sizes, math.prod(codebook_sizes)
        sizes = (dim, self.code_dim, *codebook_sizes)
        valid = all(isinstance(n, int) and n > 0 for n in sizes) and self.codebook_size < 2**62
        check(valid, "dim, code_dim, codebook sizes", sizes, "integers from 1, below 2**62 codes in all")
        self.project_in = nn.Identity() if code_dim is None else nn.Linear(dim, self.code_dim)
        self.project_out = nn.Identity() if code_dim is None else nn.Linear(self.code_dim, dim)

    def _apply(self, fn, recurse: bool = True):
        """half(), bfloat16() and double() leave a quantizer in fp32: a code's index needs its digits."""
        return super()._apply(lambda x: y if (y := fn(x)).dtype == x.dtype else x.to(y.device), recurse)

    @abstractmethod
    def quantize(self, x: Tensor) -> Quantized:
        """x (B, N, code_dim) -> codes (B, N, code_dim) with x's gradient, loss (scalar), indices (B, N)."""

    @abstractmethod
    def lookup(self, indices: Tensor) -> Tensor:
        """indices (...) in [0, codebook_size) -> codes (..., code_dim)."""

    def forward(self, z: Tensor) -> Quantized:
        """z (B, C, H, W) or (B, N, C) -> z_q (z's shape, fp32), loss (scalar >= 0), indices (B, H, W) or (B, N), int64.

        z_q's gradient reaches z. In train mode codes of EMA-VQ and matched SimVQ move, and DDCL adds noise.
        ValueError for another shape and, in eval mode, for NaNs or magnitudes above 1e12. Train mode does not look at
        values, so as not to wait for the device: look at your loss, which a NaN reaches.
        """
        tokens, shape = self._to_tokens(z, "z", values=not self.training)
        with torch.autocast(z.device.type, enabled=False):  # bf16 would round distances and codes
            codes, loss, indices = self.quantize(self.project_in(tokens))
            return self._to_grid(self.project_out(codes), shape), loss, indices.view(shape)

    def indices_to_codes(self, indices: Tensor, codebooks: int | None = None) -> Tensor:
        """indices (B, H, W) or (B, N) -> z_q (B, C, H, W) or (B, N, C).
        codebooks: how many residual ones, from the first; None: all."""
        valid = codebooks is None or self.residual and codebooks in range(1, len(self.codebook_sizes) + 1)
        check(valid, "codebooks", codebooks, "None; with residual codebooks 1 to their number")
        indices = self.check_indices(indices, 2, 3)
        with torch.autocast(indices.device.type, enabled=False):
            codes = self.lookup(indices.flatten(1), *([codebooks] if codebooks else []))
            return self._to_grid(self.project_out(codes), indices.shape)

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        """indices (N,) -> z_q (N, C)."""
        return self.indices_to_codes(self.check_indices(indices, 1)[None])[0]

    @torch.no_grad()
    def codes_to_indices(self, z_q: Tensor) -> Tensor:
        """Inverse of indices_to_codes, by comparison with each code. ValueError beyond 2**24 codes."""
        check(0 < self.codebook_size <= 2**24, "codebook_size", self.codebook_size, "1 to 2**24 here")
        tokens, shape = self._to_tokens(z_q, "z_q")
        best, indices = torch.inf, 0
        for some in torch.arange(self.codebook_size, device=z_q.device).split(2**13):
            codes = self.get_codebook_entry(some)
            center = codes.mean(0)
            scores = (tokens - center) @ (codes - center).T - (codes - center).square().sum(1) / 2
            few = scores.topk(min(8, len(some)))[1]  # a product's rounding hides which is nearest, differences do not
            distance, index = (tokens[..., None, :] - codes[few]).square().sum(3).min(2)
            indices = torch.where(distance < best, some[few.gather(2, index[..., None])[..., 0]], indices)
            best = distance.clamp(max=best)
        return indices.view(shape)

    def check_indices(self, indices: Tensor, *dims: int) -> Tensor:
        """indices, a list or array too, as int64 on the quantizer's device. ValueError unless in [0, codebook_size),
        and of an ndim among dims, if given."""
        indices = torch.as_tensor(indices)
        valid = not (indices.is_floating_point() or indices.dtype == torch.bool)
        check(valid, "dtype of indices", indices.dtype, "integers")
        allowed = " or ".join(("(N,)", "(B, N)", "(B, h, w)")[n - 1] for n in dims)
        check(not dims or indices.ndim in dims, "shape of indices", tuple(indices.shape),
              f"{allowed}: reshape them; indices[None] makes a batch of one image")
        own = [*self.parameters(), *self.buffers(), indices]
        indices = indices.to(own[0].device).long()
        check_range(indices, 0, self.codebook_size - 1, "indices")
        return indices

    def _to_tokens(self, z: Tensor, name: str, values: bool = True) -> tuple[Tensor, torch.Size]:
        """z (B, C, H, W) or (B, N, C) -> tokens (B, N, C), fp32, and the shape of their indices."""
        valid = isinstance(z, Tensor) and z.ndim in (3, 4) and z.numel() and z.is_floating_point()
        check(valid, name, getattr(z, "shape", type(z)), "floats (B, C, H, W) or (B, N, C)")
        tokens = (z.movedim(1, 3) if z.ndim == 4 else z).float()
        check(tokens.shape[-1] == self.dim, f"channels of {name}", tokens.shape[-1], f"the quantizer's {self.dim}")
        if values:
            check_range(tokens, -1e12, 1e12, name)
        return tokens.flatten(1, -2), tokens.shape[:-1]

    def _to_grid(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        z = tokens.view(*shape, self.dim)
        return z.movedim(3, 1) if len(shape) == 3 else z


class FSQ(Quantizer):
    """Finite scalar quantization (Mentzer et al., 2309.15505): each of a few numbers is rounded to one of a few levels.

    All combinations are codes. None is learned, so none collapses; the loss is 0. Levels lie symmetrically from -1 to 1
    (2411.19842, section 3.2). Good choices: [8, 6, 5] = 240 codes, [8, 8, 8] = 512, [8, 5, 5, 5] = 1,000,
    [8, 8, 8, 5, 5, 5] = 64,000.
    """

    def __init__(self, dim: int | None = None, levels: list[int] = (8, 8, 8, 5, 5, 5)):
        valid = isinstance(levels, (list, tuple)) and levels and all(isinstance(n, int) and n > 1 for n in levels)
        check(valid, "levels", levels, "a list of integers from 2")
        n = len(levels)
        super().__init__(n if dim is None else dim, None if dim in (None, n) else n, (math.prod(levels),))
        self.levels = tuple(levels)  # the sizes of sub-indices
        self.register_buffer("steps", torch.tensor(levels) - 1, persistent=False)

    def quantize(self, x: Tensor) -> Quantized:
        x = x.tanh()
        indices = self.nearest(x)
        return straight_through(x, self.lookup(indices)), x.new_zeros(()), indices

    def nearest(self, codes: Tensor) -> Tensor:
        return join_indices(((codes.clamp(-1, 1) + 1) / 2 * self.steps).round().long(), self.levels)

    def lookup(self, indices: Tensor) -> Tensor:
        return 2 * split_indices(indices, self.levels) / self.steps - 1


class DDCL(FSQ):
    """Differentiable discrete communication (Freed et al., AAAI 2020; 2511.01554): subtractive dither of step delta.

    A token becomes four numbers x in [-1, 1]. Training draws u ~ U(-delta/2, delta/2), sends m = round((x + u) / delta)
    and receives m delta - u: its error is uniform and independent of x, so x's gradient is exact. In eval mode u = 0:
    codes are FSQ's with 2 / delta + 1 levels. The loss, comm_weight times log2(2 |x| / delta + 1) bits, summed over the
    four, bounds the message's expected length: E log2(2 |m| + 1) <= log2(2 E|m| + 1) by Jensen.
    """

    def __init__(self, dim: int | None = None, delta: float = 1 / 15, comm_weight: float = 1e-3):
        steps = round(1 / delta) if isinstance(delta, (int, float)) and 0.031 < delta <= 1 else 0
        check(steps and abs(1 / delta - steps) < 0.06, "delta", delta, "1, 1/2, 1/3, ..., 1/32")
        super().__init__(dim, [2 * steps + 1] * 4)
        self.delta, self.comm_weight = 1 / steps, comm_weight

    def quantize(self, x: Tensor) -> Quantized:
        x = x.tanh()
        dither = (torch.rand_like(x) - 0.5) * self.delta if self.training else 0
        indices = self.nearest(x + dither)
        received = straight_through(x, self.lookup(indices) - dither)
        bits = (2 * x.abs() / self.delta + 1).log2().sum(-1).mean()
        return received, self.comm_weight * bits, indices


class SimVQ(Quantizer):
    """SimVQ (Zhu et al., 2411.02038): a frozen random codebook g, seen through one map: code e_i = A g_i + m.

    The map moves all codes, used or not. `transform` names its source:
    - "matched": the tokens' running mean m and covariance C. Codes of any width stay in use.
    - "learned": gradient descent, without m, as in the paper; "cosine": the same with tokens and codes normalised.
      Wide codes collapsed here: A follows the tokens' few strongest directions, and tokens follow the codes.

    Matched codes are distributed like best guesses of Gaussian tokens seen in noise (Cover and Thomas, chapter 9). K
    codes tell tokens apart down to noise of variance s, where 1/2 log det(I + C / s) = log K. The guesses' covariance
    is C (C + s I)^-1 C. Directions weaker than the noise get hardly any codes. For tokens of equal variances this is
    Shannon's random code (section 10.3).
    """

    def __init__(self, dim: int, codebook_size: int = 16384, code_dim: int | None = 16, transform: str = "matched",
                 decay: float = 0.99, commitment_cost: float = 0.25):
        check(transform in ("matched", "learned", "cosine"), "transform", transform, '"matched", "learned" or "cosine"')
        check(0 < decay < 1, "decay", decay, "between 0 and 1")
        super().__init__(dim, code_dim, (codebook_size,))
        n, matched = self.code_dim, transform == "matched"
        check(transform != "cosine" or n > 1, "code_dim", n, "2 or more: normalised, others are -1 or 1")
        self.transform, self.decay, self.commitment_cost = transform, decay, commitment_cost
        self.register_buffer("frozen_codebook", torch.randn(codebook_size, n) * n**-0.5)  # g
        self.code_transform = nn.Linear(n, n, bias=matched).requires_grad_(not matched)  # A and m
        if matched:
            self.register_buffer("moments", torch.zeros(n + 1, n + 1))  # of (tokens minus a recent m, 1), squared
            self.register_buffer("variance", torch.ones(()))  # of the tokens' numbers, on average
            self.register_buffer("noise_ratio", torch.ones(()))  # s / variance

    def quantize(self, x: Tensor) -> Quantized:
        x = self.normalize(x)
        if self.transform == "matched" and self.training:
            self.match(x.flatten(0, 1))
        indices = nearest_code(x, self.lookup(slice(None)))  # of all codes
        codes = self.lookup(indices)
        # squared errors of codes (constant if matched) and tokens, the commitment: summed, or relative to variance
        loss = F.mse_loss(codes, x.detach()) + self.commitment_cost * F.mse_loss(x, codes.detach())
        scale = 1 / self.variance if self.transform == "matched" else self.code_dim
        return straight_through(x, codes), scale * loss, indices

    def lookup(self, indices: Tensor) -> Tensor:
        return self.normalize(self.code_transform(self.frozen_codebook[indices]))

    def normalize(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.transform == "cosine" else x

    @torch.no_grad()
    def match(self, x: Tensor):
        """Set A and m from moving averages, equal in all processes, of the moments of tokens x (N, code_dim)."""
        mean, first = self.code_transform.bias, sum_of_processes(F.pad(x, (0, 1), value=1).mean(0))
        mean.copy_(torch.where(self.moments[-1, -1] > 0, mean, first[:-1] / first[-1]))
        x = F.pad(x - mean, (0, 1), value=1)  # around m: around zero, far tokens would have no variance in fp32
        moments = sum_of_processes(x.T @ x / len(x))
        shift = torch.eye(len(moments), device=x.device)  # of the old moments to today's m
        shift[:-1, -1] = -self.moments[:-1, -1] / self.moments[-1, -1].clamp(min=1e-30)
        self.moments.copy_(torch.lerp(shift @ self.moments @ shift.T, moments, 1 - self.decay))
        second, step = (self.moments / self.moments[-1, -1])[:, :-1].split(self.code_dim)
        cov = second - step.T * step
        self.variance.copy_(cov.diagonal().mean().clamp(min=1e-10))
        s = (self.noise_ratio * self.variance).maximum(1e-6 * second.trace())  # above the rounding of C
        factor, _ = torch.linalg.cholesky_ex(cov + s.expand(self.code_dim).diag())
        root = torch.linalg.solve_triangular(factor, cov, upper=False)  # A' but for g's scale
        self.code_transform.weight.copy_(self.code_dim**0.5 * root.T)
        mean += step[0]
        # a Newton step for log s, for the next step of training
        excess = factor.diagonal().log().sum() - self.code_dim / 2 * s.log() - math.log(self.codebook_size)
        slope = torch.linalg.solve_triangular(factor.T, root, upper=True).trace() / 2
        self.noise_ratio.mul_((excess / slope).clamp(-1, 1).exp()).clamp_(1e-6, 1e6)


class EMAVQ(Quantizer):
    """VQ-VAE with moving averages (1711.00937, appendix A.1; 1906.00446): the nearest code by Euclidean distance.

    A step has n_i tokens at code i, with the sum s_i:
        N_i = decay N_i + (1 - decay) n_i        m_i = decay m_i + (1 - decay) s_i        e_i = m_i / N_i
    Laplace smoothing adds 1e-5 to N_i, little if a code has well above 1e-4 tokens. The loss is the commitment loss.
    With n the moving average of a step's tokens a code, codes with N_i below 0.1 n, at first nearly all, are dead: they
    restart at random tokens, N_i = 0.2 n.
    """

    def __init__(self, dim: int, codebook_size: int = 65536, code_dim: int | None = 16, decay: float = 0.99,
                 commitment_cost: float = 0.25):
        check(0 < decay < 1, "decay", decay, "between 0 and 1")
        super().__init__(dim, code_dim, (codebook_size,))
        self.decay, self.commitment_cost = decay, commitment_cost
        self.register_buffer("codebook", torch.randn(codebook_size, self.code_dim) * self.code_dim**-0.5)  # e
        self.register_buffer("token_sums", torch.zeros_like(self.codebook))  # m
        self.register_buffer("token_counts", torch.zeros(codebook_size))  # N
        self.register_buffer("mean_count", torch.zeros(()))  # n; 0 before the first step

    def quantize(self, x: Tensor) -> Quantized:
        indices = nearest_code(x, self.codebook)
        codes = self.lookup(indices)
        if self.training:
            self.update(x.flatten(0, 1), indices.flatten())
        return straight_through(x, codes), self.commitment_cost * F.mse_loss(x, codes), indices

    def lookup(self, indices: Tensor) -> Tensor:
        return self.codebook[indices]

    def _load_from_state_dict(self, state: dict, prefix: str, *args):
        state.setdefault(f"{prefix}mean_count", torch.zeros(()))  # in files of older code there is none
        super()._load_from_state_dict(state, prefix, *args)

    @torch.no_grad()
    def update(self, x: Tensor, indices: Tensor):
        """A step of the moving averages, equal in all processes, by tokens x (N, code_dim) at codes `indices` (N,)."""
        counts = sum_of_processes(torch.zeros_like(self.token_counts).index_add_(0, indices, x.new_ones(len(x))))
        sums = sum_of_processes(torch.zeros_like(self.token_sums).index_add_(0, indices, x))
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.token_counts.lerp_(counts, 1 - self.decay)
        self.token_sums.lerp_(sums, 1 - self.decay)
        total = self.token_counts.sum()
        smoothed = (self.token_counts + 1e-5) / (total + 1e-5 * self.codebook_size) * total
        codes = self.token_sums / smoothed[:, None]

        mean = self.mean_count.lerp_(counts.mean(), torch.where(self.mean_count > 0, 1 - self.decay, 1))
        dead = self.token_counts < 0.1 * mean
        number = dead.cumsum(0) - 1  # of the dead, from 0: each restarts at another token
        dead &= number < counts.sum() / processes
        order = torch.rand_like(x[:, 0]).argsort()
        tokens = x[order[number % len(x)]]  # for all codes, not the dead alone: no shape depends on values
        if processes > 1:  # process 0's, by a sum: torch.compile does not know dist.broadcast
            tokens = sum_of_processes(tokens * (dist.get_rank() == 0))
        self.codebook.copy_(torch.where(dead[:, None], tokens, codes))
        self.token_sums.copy_(torch.where(dead[:, None], 0.2 * mean * tokens, self.token_sums))
        self.token_counts.masked_fill_(dead, 0.2 * mean)


class MultiCodebook(Quantizer):
    """Several EMA-VQ codebooks: two of 256 codes make 65,536. An index has a sub-index for each.

    "residual" (2107.03312, 2203.01941): each quantizes what those before it leave, and their codes add up. "product"
    (Jegou et al., PAMI 2011): each quantizes some dimensions. random_depth: fraction of training images decoded from a
    random number of first codebooks, as indices_to_codes can.
    """

    def __init__(self, dim: int, codebooks: int, combine: str = "residual", random_depth: float = 0.0,
                 codebook_size: int = 256, code_dim: int | None = 16, **options):
        check(isinstance(codebooks, int) and codebooks > 0, "codebooks", codebooks, "an integer from 1")
        check(combine in ("residual", "product"), "combine", combine, '"residual" or "product"')
        super().__init__(dim, code_dim, (codebook_size,) * codebooks)
        self.residual, self.random_depth = combine == "residual", random_depth
        check(0 <= random_depth <= self.residual, "random_depth", random_depth, '0 to 1, 0 with "product"')
        n = self.code_dim
        check(self.residual or n % codebooks == 0, "code_dim", n, f"a multiple of {codebooks}")
        width = n if self.residual else n // codebooks
        self.codebooks = nn.ModuleList(EMAVQ(width, codebook_size, None, **options) for _ in range(codebooks))
        # the dimensions of each
        self.parts = [slice(n)] * codebooks if self.residual else [slice(i, i + width) for i in range(0, n, width)]

    def quantize(self, x: Tensor) -> Quantized:
        depth = torch.full((x.shape[0], 1, 1), len(self.codebooks), device=x.device)  # of each image
        if self.training and self.random_depth:
            random = torch.randint_like(depth, 1, len(self.codebooks) + 1)
            depth = torch.where(torch.rand_like(x[:, :1, :1]) < self.random_depth, random, depth)
        codes, output = torch.zeros_like(x), torch.zeros_like(x)
        indices, loss = [], 0
        for i, (codebook, part) in enumerate(zip(self.codebooks, self.parts)):
            code, codebook_loss, index = codebook.quantize((x - codes)[..., part])
            codes[..., part] += code.detach()
            output = torch.where(depth > i, codes, output)
            indices.append(index)
            loss += codebook_loss
        return straight_through(x, output), loss, join_indices(torch.stack(indices, -1), self.codebook_sizes)

    def lookup(self, indices: Tensor, codebooks: int | None = None) -> Tensor:
        sub_indices = split_indices(indices, self.codebook_sizes).unbind(-1)[:codebooks]
        codes = torch.zeros(*indices.shape, self.code_dim, device=indices.device)
        for codebook, part, index in zip(self.codebooks, self.parts, sub_indices):
            codes[..., part] += codebook.lookup(index)
        return codes


class NoQuantizer(Quantizer):
    """Tokens pass unchanged: the upper bound of all quantizers. codebook_size is 0."""

    def __init__(self, dim: int):
        super().__init__(dim, None, ())
        self.codebook_size = 0

    def quantize(self, x: Tensor) -> Quantized:
        return x, x.new_zeros(()), x.new_zeros(x.shape[:2], dtype=torch.int64)

    def lookup(self, indices: Tensor, *_) -> Tensor:
        raise ValueError("quantizer = 'none', allowed: one that has codes")

    check_indices = lookup


class Library(Quantizer):
    """A quantizer of the package vector-quantize-pytorch: its class `kind`, with that class's own arguments.

    An index has a sub-index for each codebook; in train mode, with quantize_dropout, it is of no use. LFQ's loss, an
    entropy, may be negative. code_dim None: the class projects tokens itself, if it has to. options: plain values, for
    checkpoints. arguments: those of its forward in training and evaluation, such as LFQ's inv_temperature.
    """

    def __init__(self, dim: int, kind: str, code_dim: int | None = None, arguments: dict | None = None, **options):
        try:
            library = importlib.import_module("vector_quantize_pytorch")
        except ImportError:
            raise ValueError("quantizer = 'library', allowed: after pip install vector-quantize-pytorch") from None
        kinds = [name for name in dir(library) if isinstance(getattr(library, name), type)]
        check(kind in kinds, "kind", kind, ", ".join(kinds))
        options = {name: tuple(x) if isinstance(x, list) else x for name, x in options.items()}  # JSON has no tuples
        try:
            with torch.device("cpu"), torch.no_grad():  # some cannot be built on the meta device
                z = torch.linspace(-1, 1, 2 * (code_dim or dim)).view(1, 2, -1)
                module = getattr(library, kind)(dim=z.shape[2], **options)
                twin = copy.deepcopy(module).eval()  # a copy is tried: k-means starts from z
                z_q, indices, *_ = twin(z, **arguments or {})
                find = "get_output_from_indices" if hasattr(twin, "get_output_from_indices") else "indices_to_codes"
                codes = getattr(twin, find)(indices)
            assert codes.shape == z_q.shape == z.shape and torch.allclose(codes, z_q, atol=1e-5), f"{find}: other codes"
        except Exception as error:  # of any kind: what a class refuses, or does not have
            raise ValueError(f"{kind} = {options!r:.300}, allowed: what this class takes: {error!r:.300}") from None
        sizes = getattr(module, "codebook_sizes", getattr(module, "codebook_size", options.get("codebook_size")))
        sizes = tuple(sizes) if isinstance(sizes, (tuple, list)) else (sizes,)  # of a group's codebooks, or of each
        super().__init__(dim, code_dim, sizes * (indices.numel() // 2 // len(sizes)))
        self.module, self.find, self.kind, self.arguments = module, find, kind, arguments or {}
        self.layout, self.groups = indices.ndim, len(indices) if indices.ndim == 4 else 1

    def quantize(self, x: Tensor) -> Quantized:
        check(self.kind == "LFQ" or not torch.compiler.is_exporting(), "quantizer", self.kind, "LFQ in an export")
        codes, indices, *loss = self.module(x, **self.arguments)
        loss = loss[0].sum() if loss else x.new_zeros(())  # of several codebooks one each
        indices = indices.movedim(0, 2) if self.layout == 4 else indices  # (groups, B, N, q)
        indices = join_indices(indices.long().reshape(*x.shape[:2], -1), self.codebook_sizes)
        return codes if self.training else straight_through(x, self.lookup(indices)), loss, indices

    def lookup(self, indices: Tensor) -> Tensor:
        check(self.kind == "LFQ" or not torch.compiler.is_exporting(), "quantizer", self.kind, "LFQ in an export")
        groups = split_indices(indices, self.codebook_sizes).unflatten(2, (self.groups, -1)).movedim(2, 0)
        return getattr(self.module, self.find)({2: groups[0, ..., 0], 3: groups[0], 4: groups}[self.layout])


QUANTIZERS = {"fsq": FSQ, "simvq": SimVQ, "ema_vq": EMAVQ, "ddcl": DDCL, "none": NoQuantizer, "library": Library,
              # LFQ's weights: of a short search (RESULTS.md); BSQ's temperature: its authors', the library's is 100
              "lfq": partial(Library, kind="LFQ", entropy_loss_weight=1e-3, commitment_loss_weight=0.25),
              "bsq": partial(Library, kind="LFQ", spherical=True, arguments={"inv_temperature": 1.0}),
              "rotation_vq": partial(Library, kind="VectorQuantize", rotation_trick=True, threshold_ema_dead_code=2),
              "residual_fsq": partial(Library, kind="ResidualFSQ")}


def build_quantizer(name: str, dim: int, codebooks: int = 1, **options) -> Quantizer:
    """One of QUANTIZERS for tokens of dim channels. options: of its constructor."""
    check(name in QUANTIZERS, "quantizer", name, ", ".join(QUANTIZERS))
    check(codebooks == 1 or name == "ema_vq", "codebooks", codebooks, '1, or more with "ema_vq"')
    kind = QUANTIZERS[name]
    if codebooks != 1:
        kind, options["codebooks"] = MultiCodebook, codebooks
    quantizer = kind(dim, **options)
    quantizer.config = {"quantizer": name, "quantizer_options": options}  # VQRAE's arguments, for checkpoints
    return quantizer
