"""FSQ, SimVQ, EMA-VQ, DDCL, and residual and product codebooks behind one interface.

    quantizer = build_quantizer("fsq", dim=256)
    z_q, loss, indices = quantizer(z)          # z, z_q (B, C, H, W) or (B, N, C); indices (B, H, W) or (B, N)
    quantizer.indices_to_codes(indices)        # z_q again: in eval mode the same numbers, exactly
    quantizer.codes_to_indices(z_q)            # and back
    quantizer.get_codebook_entry(indices)      # (N,) -> (N, C)
    quantizer.codebook_size

Here a token is one position of the grid: its vector before quantization, and its code after it. This file needs
torch and vector-quantize-pytorch only, so that it can be copied into other projects. There, keep the quantizer in fp32,
whatever the rest of the model is in, and add its loss. Under torch.compile the checks break graphs.
"""
import math
from abc import ABC, abstractmethod
from itertools import chain

import torch
import torch.nn.functional as F
import vector_quantize_pytorch as library
from torch import Tensor, nn


def check(ok: bool, name: str, value: object, allowed: str):
    """ValueError with a line that names what is wrong, its value and what is allowed, unless ok"""
    if not ok:
        raise ValueError(f"{name} = {value!r}, allowed: {allowed}")


class Quantizer(nn.Module, ABC):
    """The interface: layouts of z, checks, fp32, and codes from indices. Each quantizer defines what is abstract."""

    def __init__(self, dim: int, codebook_size: int):
        super().__init__()
        self.dim = dim
        self.codebook_size = codebook_size
        self.codebook_sizes = (codebook_size,)
        self.depths = ()  # what indices_to_codes takes for `codebooks`

    @abstractmethod
    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens x (N, C), fp32 -> z_q (N, C), loss (scalar), indices (N,)"""

    @abstractmethod
    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        """indices (N,) in [0, codebook_size) -> codes (N, C). ValueError where one is out of range."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize z (B, C, H, W) or (B, N, C), of any floating type.

        Returns z_q (z's shape, fp32), loss (scalar >= 0) and indices (B, H, W) or (B, N), int64. In eval mode z_q is
        exactly indices_to_codes(indices). The gradient of z_q reaches z in both modes. ValueError for another shape, a
        NaN, an infinity or a magnitude above 1e12 in z, or weights that are not in fp32.
        """
        tokens, layout = self._to_rows(z, "z")
        with torch.autocast(z.device.type, enabled=False):  # bf16 would round distances and codes
            z_q, loss, indices = self.quantize(tokens)
            if not self.training and self.codebook_size:
                with torch.no_grad():
                    codes = self.get_codebook_entry(indices)
                z_q = straight_through(z_q, codes)
        return self._from_rows(z_q, layout), loss, indices.view(layout)

    @property
    def device(self) -> torch.device:
        return next(chain(self.parameters(), self.buffers()), torch.empty(0)).device  # "none" has no tensors: CPU

    def indices_to_codes(self, indices: Tensor, codebooks: int | None = None) -> Tensor:
        """indices (B, H, W) or (B, N) -> codes (B, C, H, W) or (B, N, C). ValueError where one is out of range.
        codebooks: of residual codebooks, use the first few alone; None: all."""
        check(codebooks in (None, *self.depths), "codebooks", codebooks, f"None, or of residual ones {[*self.depths]}")
        valid = isinstance(indices, Tensor) and indices.ndim in (2, 3)
        check(valid, "indices", getattr(indices, "shape", type(indices)), "a tensor of shape (B, N) or (B, H, W)")
        with torch.autocast(self.device.type, enabled=False):
            depth = {} if codebooks is None else {"codebooks": codebooks}
            return self._from_rows(self.get_codebook_entry(indices.flatten(), **depth), indices.shape)

    @torch.no_grad()
    def codes_to_indices(self, z_q: Tensor, exact: bool = True) -> Tensor:
        """The inverse of indices_to_codes. Of codes that are equal, as may be in SimVQ and EMA-VQ, any index.
        exact: False is faster, and takes any z_q: it undoes project_out, and finds the code nearest to the result (with
        several codebooks, in one after the other). Where code_dim exceeds dim, it may find another code than z_q's."""
        rows, layout = self._to_rows(z_q, "z_q")
        with torch.autocast(z_q.device.type, enabled=False):
            return self._codes_to_indices(rows, exact).view(layout)

    def split_indices(self, indices: Tensor, sizes: tuple[int, ...] | None = None) -> Tensor:
        """indices (...) -> the index in each codebook (..., k), as the digits of a number, the least significant first:
        index = d_0 + sizes[0] (d_1 + sizes[1] (d_2 + ...)). Of residual codebooks the first is the coarsest. sizes:
        None for codebook_sizes; FSQ's levels for their digits."""
        sizes = sizes or self.codebook_sizes
        return torch.stack([indices.long() // math.prod(sizes[:i]) % n for i, n in enumerate(sizes)], -1)

    def join_indices(self, digits: Tensor, sizes: tuple[int, ...] | None = None) -> Tensor:
        """The inverse of split_indices: digits (..., k) -> indices (...). ValueError where one is out of range."""
        sizes = sizes or self.codebook_sizes
        indices = sum(d.long() * math.prod(sizes[:i]) for i, d in enumerate(digits.unbind(-1)))
        valid = digits.shape[-1] == len(sizes) and torch.equal(self.split_indices(indices, sizes), digits.long())
        check(valid, "digits", tuple(digits.shape), f"(..., {len(sizes)}), each below {sizes}")
        return indices

    def _codes_to_indices(self, z_q: Tensor, exact: bool) -> Tensor:
        if not exact:
            return nearest_code(unproject(z_q, self.project_out), self.codebook)
        codebook = self.get_codebook_entry(torch.arange(self.codebook_size, device=z_q.device))
        return nearest_code(z_q, codebook, exact=True)

    def _check_indices(self, indices: Tensor) -> Tensor:
        valid = isinstance(indices, Tensor) and indices.ndim == 1
        check(valid, "indices", getattr(indices, "shape", type(indices)), "a tensor of shape (N,)")
        check("int" in str(indices.dtype), "type of indices", indices.dtype, "integers")
        indices = indices.long().to(self.device)  # stored indices are of a smaller type, and on the CPU
        if indices.numel():
            low, high = torch.stack(indices.aminmax()).tolist()
            valid = 0 <= low <= high < self.codebook_size
            check(valid, "range of indices", (low, high), f"0 to {self.codebook_size - 1}")
        return indices

    def _to_rows(self, z: Tensor, name: str) -> tuple[Tensor, torch.Size]:
        valid = isinstance(z, Tensor) and z.ndim in (3, 4) and z.numel() > 0
        check(valid, name, getattr(z, "shape", type(z)), "a tensor of shape (B, C, H, W) or (B, N, C), none 0")
        check(z.is_floating_point(), f"type of {name}", z.dtype, "floating-point numbers")
        types = {t.dtype for t in chain(self.parameters(), self.buffers()) if t.is_floating_point()} - {torch.float32}
        check(not types, "type of the quantizer's weights", types, "torch.float32: call its float()")
        z = (z.permute(0, 2, 3, 1) if z.ndim == 4 else z).float()  # fp64 beyond the range of fp32 becomes infinite
        check(z.shape[-1] == self.dim, f"channels of {name}", z.shape[-1], f"the quantizer's dim, {self.dim}")
        low, high = torch.stack(z.aminmax()).tolist()
        # sums of squares have to stay finite. With a NaN, both are NaN, and the comparison is False
        check(-1e12 <= low <= high <= 1e12, f"range of {name}", (low, high), "-1e12 to 1e12, no NaN or infinity")
        return z.reshape(-1, self.dim), z.shape[:-1]

    def _from_rows(self, rows: Tensor, layout: torch.Size) -> Tensor:
        z = rows.view(*layout, self.dim)
        return z.permute(0, 3, 1, 2) if len(layout) == 3 else z


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """The codes, with the gradient of z. The usual z + (codes - z).detach() would round and not equal the codes."""
    return codes + (z - z.detach()) if torch.is_grad_enabled() else codes


class FSQ(Quantizer):
    """Finite scalar quantization (Mentzer et al., 2309.15505): of a few dimensions, each is rounded to a few levels.

    The codebook is the grid of all combinations: nothing to learn, nothing to collapse, and a loss of 0. Good choices:
    [8, 6, 5] = 240, [8, 8, 8] = 512, [7, 5, 5, 5] = 875, [8, 5, 5, 5] = 1,000, [8, 8, 8, 5, 5, 5] = 64,000 codes.
    """

    def __init__(self, dim: int, levels: list[int] = (8, 8, 8, 5, 5, 5)):
        valid = isinstance(levels, (list, tuple)) and all(isinstance(n, int) and 2 <= n <= 2**16 for n in levels)
        check(valid and levels, "levels", levels, "a list of whole numbers from 2 to 2**16")
        check(math.prod(levels) <= 2**24, "levels", levels, "at most 2**24 codes in all")
        check(dim >= len(levels), "dim", dim, f"at least one channel for each of the {len(levels)} levels")
        super().__init__(dim, math.prod(levels))
        self.levels = tuple(levels)  # sizes of an index's digits
        with torch.device("cpu"):  # the library reads numbers back, which are not to be had on "meta"
            self.fsq = library.FSQ(list(levels), dim=dim, preserve_symmetry=True)  # symmetric: 2411.19842, section 3.2

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        levels = self.fsq.quantize(self.fsq.project_in(x))
        return self.project_out(levels), x.new_zeros(()), self._levels_to_indices(levels.detach())

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        return self.project_out(self.fsq.implicit_codebook[self._check_indices(indices)])

    def _codes_to_indices(self, z_q: Tensor, exact: bool) -> Tensor:
        return self._levels_to_indices(unproject(z_q, self.project_out))

    project_out = property(lambda self: self.fsq.project_out)

    def _levels_to_indices(self, levels: Tensor) -> Tensor:
        digits = (levels.clamp(-1, 1) + 1).mul((self.fsq._levels - 1) / 2).round().long()
        return digits.mul(self.fsq._basis).sum(-1)  # the library adds them up in fp32: wrong from 6 million codes on


class SimVQ(Quantizer):
    """SimVQ (Zhu et al., 2411.02038): the codebook is a frozen random one times a learned matrix.

    A gradient of the matrix moves all codes, used or not, so that few die; tokens' gradients pass straight through. z
    is projected to code_dim dimensions (None: dim), those of codes. Unlike in the paper, both are normalized: the
    nearest code has the highest cosine similarity.
    """

    def __init__(self, dim: int, codebook_size: int = 16384, code_dim: int | None = None):
        code_dim = check_codebook(dim, codebook_size, code_dim, 2)  # codes of one number are -1 or 1, without gradient
        super().__init__(dim, codebook_size)
        self.project_in = nn.Linear(dim, code_dim)
        self.simvq = library.SimVQ(code_dim, codebook_size)
        self.project_out = nn.Linear(code_dim, dim)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # the library's forward would copy the codebook for each image; its loss is the one below divided by code_dim
        x = F.normalize(self.project_in(x), dim=-1)
        indices = nearest_code(x, self.codebook)
        codes = self._codes(indices)
        # squared distances, 2 - 2 cos: codes move towards tokens, and tokens (with a smaller weight) towards codes
        commitment = self.simvq.input_to_quantize_commit_loss_weight
        loss = x.shape[1] * (F.mse_loss(codes, x.detach()) + commitment * F.mse_loss(x, codes.detach()))
        return self.project_out(straight_through(x, codes.detach())), loss, indices

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        return self.project_out(self._codes(self._check_indices(indices)))

    @property
    @torch.no_grad()
    def codebook(self) -> Tensor:
        codebook = self.simvq.codebook
        return F.normalize(codebook, dim=-1, out=codebook)  # in place: it may take 100 MB

    def _codes(self, indices: Tensor) -> Tensor:
        # mapped once more, with a gradient: through the whole codebook, autograd would keep several copies of that
        return F.normalize(self.simvq.code_transform(self.simvq.frozen_codebook[indices]), dim=-1)


class EMAVQ(Quantizer):
    """VQ-VAE with exponential moving averages (1711.00937, appendix A.1; 1906.00446): nearest Euclidean code.

    N_i <- decay N_i + (1 - decay) n_i,  m_i <- decay m_i + (1 - decay) sum of the n_i tokens at code i,  e_i = m_i/N_i
    with Laplace smoothing of N_i (by 1e-5: far less than N_i for codebooks well below 2**20). Dead-code revival: a code
    used less than a tenth of the average is replaced by a random token, with a fifth of the average usage: it soon is
    the mean of its tokens, or dead again. State and smoothing are the library's; not so search and sums (its distances
    and one-hot vectors are matrices of tokens x codes) and revival (it may use one token for many codes). forward in
    train mode updates the codebook, equally in all processes; torch.utils.checkpoint would update it twice.
    """

    def __init__(self, dim: int, codebook_size: int = 8192, code_dim: int | None = None, decay: float = 0.99,
                 commitment_cost: float = 0.25, revive: bool = True):
        code_dim = check_codebook(dim, codebook_size, code_dim, 1)
        check(isinstance(decay, float) and 0 < decay < 1, "decay", decay, "a number between 0 and 1")
        valid = isinstance(commitment_cost, (int, float)) and 0 <= commitment_cost < math.inf
        check(valid, "commitment_cost", commitment_cost, "a number of 0 or more")
        super().__init__(dim, codebook_size)
        self.commitment_cost, self.revive = commitment_cost, revive
        self.project_in = nn.Linear(dim, code_dim) if code_dim != dim else nn.Identity()
        self.vq = library.VectorQuantize(code_dim, codebook_size=codebook_size, decay=decay, sync_codebook=False)
        if revive:
            self.vq._codebook.cluster_size.zero_()  # all codes start dead: the tokens of the first steps replace them
            self.vq._codebook.embed_avg.zero_()
        self.project_out = nn.Linear(code_dim, dim) if code_dim != dim else nn.Identity()

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.project_in(x)
        indices = nearest_code(x, self.codebook)
        codes = self.codebook[indices]  # a copy from before the update
        if self.training:
            self.update(x.detach(), indices)
        loss = self.commitment_cost * F.mse_loss(x, codes)
        return self.project_out(straight_through(x, codes)), loss, indices

    @torch.no_grad()
    def update(self, x: Tensor, indices: Tensor):
        """One EMA step of the codebook, from tokens x (N, code_dim) and the indices (N,) of their codes."""
        ema = self.vq._codebook
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
        sum_over_ranks = torch.distributed.all_reduce if distributed else lambda values: None  # in place
        counts = x.new_zeros(self.codebook_size).index_add_(0, indices, x.new_ones(len(x)))  # bincount waits for a GPU
        sum_over_ranks(counts)
        ema.cluster_size[0].lerp_(counts, 1 - ema.decay)
        # all ranks hold the same m: each adds its tokens to its share, decay * m / ranks, so that the sum over ranks is
        # decay * m + (1 - decay) * sum of all tokens
        ema.embed_avg[0].mul_(ema.decay / ranks).index_add_(0, indices, x, alpha=1 - ema.decay)
        sum_over_ranks(ema.embed_avg)
        ema.update_ema()
        average = counts.sum() / self.codebook_size
        dead = (ema.cluster_size[0] < 0.1 * average).nonzero()[:, 0]
        if self.revive and len(dead):
            # each rank revives its share of the dead codes, none with the same token; if it has too few, the rest later
            rows = torch.arange(rank, len(dead), ranks, device=x.device)[: len(x)]
            tokens = x.new_zeros(len(dead), x.shape[1] + 1)  # the last column is 1 where there is a token
            tokens[rows] = F.pad(x[torch.randperm(len(x), device=x.device)[: len(rows)]], (0, 1), value=1.0)
            sum_over_ranks(tokens)
            tokens, revived = tokens[:, :-1], tokens[:, -1:] > 0
            for state, value in ((ema.embed, tokens), (ema.embed_avg, tokens * average / 5),
                                 (ema.cluster_size.unsqueeze(-1), average / 5)):
                state[0, dead] = torch.where(revived, value, state[0, dead])

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        return self.project_out(self.codebook[self._check_indices(indices)])

    codebook = property(lambda self: self.vq.codebook)  # (codebook_size, code_dim)


class DDCL(Quantizer):
    """Differentiable discrete communication (Freed et al., AAAI 2020; 2511.01554): subtractive dither of step delta.

    Each token becomes four values x in [-1, 1]. Training draws u ~ U(-delta/2, delta/2), sends the integer
    m = round((x + u) / delta) and receives m delta - u: x plus a uniform error independent of x, so that the gradient
    of x is exact (straight_through adds that error; only in eval mode, where u = 0, is it an estimator).

    The loss is comm_weight times the sum over the four of log2(2 |x| / delta + 1). In training it bounds the expected
    bits of the message, as the paper counts them: log2(2 |m| + 1) for an integer m, the logarithm of how many integers
    are no larger (not the length of a code). m is one of the two integers next to x / delta, and x / delta on average:
    E|m| = |x| / delta. The logarithm is concave, so its mean is at most log2(2 E|m| + 1) (Jensen's inequality).
    """

    def __init__(self, dim: int, delta: float = 1 / 15, comm_weight: float = 1e-3):
        valid = isinstance(delta, (int, float)) and 0.03 < delta <= 1
        valid = valid and abs(1 / delta - round(1 / delta)) < 0.06 and round(1 / delta) <= 32  # 0.0667: 1/15
        check(valid, "delta", delta, "1/n for a whole n: 1, 1/2, ..., 1/32")
        valid = isinstance(comm_weight, (int, float)) and 0 <= comm_weight < math.inf
        check(valid, "comm_weight", comm_weight, "a number of 0 or more")
        check(dim >= 4, "dim", dim, "at least 4")
        self.steps = round(1 / delta)  # messages are integers from -steps to steps
        self.levels = (2 * self.steps + 1,) * 4  # sizes of an index's digits
        super().__init__(dim, math.prod(self.levels))
        self.delta = 1 / self.steps
        self.comm_weight = comm_weight
        self.project_in = nn.Linear(dim, 4)
        self.project_out = nn.Linear(4, dim)
        self.register_buffer("basis", self.levels[0] ** torch.arange(4), persistent=False)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.tanh(self.project_in(x))
        dither = (torch.rand_like(x) - 0.5) * self.delta if self.training else torch.zeros_like(x)
        message = ((x + dither) / self.delta).detach().round().clamp(-self.steps, self.steps)
        received = straight_through(x, message * self.delta - dither)  # x + error, with the gradient of x
        bits = torch.log2(2 * x.abs() / self.delta + 1).sum(-1).mean()
        indices = ((message.long() + self.steps) * self.basis).sum(-1)
        return self.project_out(received), self.comm_weight * bits, indices

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        message = self.split_indices(self._check_indices(indices), self.levels) - self.steps
        return self.project_out(message * self.delta)

    def _codes_to_indices(self, z_q: Tensor, exact: bool) -> Tensor:
        message = (unproject(z_q, self.project_out) / self.delta).round().clamp(-self.steps, self.steps)
        return ((message.long() + self.steps) * self.basis).sum(-1)


class MultiCodebook(Quantizer):
    """Several codebooks of one kind: two of 256 codes make 65,536. The digits of a token's index are its indices there.

    combine "residual" (SoundStream, 2107.03312; RQ-VAE, 2203.01941): each codebook quantizes what those before it left
    over, and a code is the sum of theirs; to decode from the first few alone, set random_depth, the share of training
    images that use a random number of them. "product" (Jegou et al., PAMI 2011): each quantizes some dimensions.

    The codebooks are the classes above. The library's ResidualVQ takes several times as long on a CPU, as its search
    does (bench.py), and autocast changes its indices. Residual FSQ bounds its values once, and each stage's levels are
    closer by a factor of `levels`: in all, an FSQ of levels**codebooks. SimVQ normalizes tokens once, before the first
    stage; all codes of a stage have one learned length (`scales`), so that the code of the highest cosine similarity is
    still the nearest.
    """

    random_depth, images = 0.0, 1

    def __init__(self, kind: type[Quantizer], dim: int, codebooks: int, combine: str, code_dim: int | None = None,
                 **options):
        residual, combinations = combine == "residual", ("residual", "product")[: 1 if kind is FSQ else 2]
        check(kind in (FSQ, SimVQ, EMAVQ), "codebooks", codebooks, '1, or more with "fsq", "simvq" or "ema_vq"')
        check(isinstance(codebooks, int) and 1 <= codebooks < 63, "codebooks", codebooks, "a whole number from 1 to 62")
        check(combine in combinations, "combine", combine, ", ".join(f'"{name}"' for name in combinations))
        finer = [2 if residual and kind is SimVQ else 1]  # how much shorter a stage's codes are, at first
        if kind is FSQ:
            finer = FSQ(dim, **options).levels  # one for each dimension
            most = max(finer)
            check(most**codebooks <= 2**16, "codebooks", codebooks, f"{most}**codebooks levels in all, 2**16 at most")
        code_dim = len(finer) if kind is FSQ else dim if code_dim is None else code_dim
        valid = isinstance(code_dim, int) and (residual or code_dim % codebooks == 0)
        check(valid, "code_dim", code_dim, f"a whole number, for a product a multiple of codebooks = {codebooks}")
        width = code_dim if residual else code_dim // codebooks
        parts = [kind(width, **options) for _ in range(codebooks)]
        sizes = tuple(part.codebook_size for part in parts)
        check(math.prod(sizes) < 2**63, "codebooks", codebooks, f"fewer than 2**63 codes in all, of {sizes[0]:,} each")
        super().__init__(dim, math.prod(sizes))
        self.codebook_sizes, self.depths = sizes, range(1, codebooks + 1) if residual else ()
        self.kind, self.width, self.residual, self.parts = kind, width, residual, nn.ModuleList(parts)
        for part in parts:  # vectors are projected and bounded once
            part.project_in = part.project_out = nn.Identity()
            if kind is FSQ:
                part.fsq.bound_hard_clamp = True
        scales = torch.tensor(finer).float() ** -torch.arange(codebooks)[:, None]
        self.scales = nn.Parameter(scales, requires_grad=kind is SimVQ)
        self.project_in = nn.Linear(dim, code_dim) if code_dim != dim else nn.Identity()
        self.project_out = nn.Linear(code_dim, dim) if code_dim != dim else nn.Identity()

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.images = len(z) if isinstance(z, Tensor) and z.ndim else 1  # an image's tokens use equally many codebooks
        return super().forward(z)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.project_in(x)
        if self.kind is FSQ:  # half a step beyond the outermost levels: they get as wide an interval as others
            limit = 1 + 1 / (self.parts[0].fsq._levels - 1)
            x = limit * torch.tanh(x / limit)
        elif self.kind is SimVQ:
            x = F.normalize(x.unflatten(1, (-1, self.width)), dim=-1).flatten(1)
        random = self.training and self.random_depth
        depth = torch.full((self.images if random else 1,), len(self.parts))  # on the CPU: a GPU would be waited for
        if random:
            shallow = torch.rand(depth.shape) < self.random_depth
            shallow[0] = False  # no codebook goes without tokens
            depth = torch.where(shallow, torch.randint(1, len(self.parts) + 1, depth.shape), depth)
        depth = depth.repeat_interleave(len(x) // len(depth))
        codes, indices, loss = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.int64, device=x.device), 0
        for i, (part, scale) in enumerate(zip(self.parts, self.scales)):
            rows = (depth > i).nonzero()[:, 0].to(x.device)  # tokens that use this codebook
            chunk = slice(None) if self.residual else slice(i * self.width, (i + 1) * self.width)
            left = (x - codes.detach())[rows, chunk]
            code, part_loss, index = part.quantize(left / scale.detach())
            codes[rows, chunk] += code.detach() * scale
            indices[rows] += index * math.prod(self.codebook_sizes[:i])  # 0 where the codebook is not used
            loss = loss + part_loss
        return self.project_out(straight_through(x, codes)), loss, indices

    def get_codebook_entry(self, indices: Tensor, codebooks: int | None = None) -> Tensor:
        digits = self.split_indices(self._check_indices(indices)).unbind(-1)[:codebooks]
        return self.project_out(sum(self._stage_codes(i, digit) for i, digit in enumerate(digits)))

    def _stage_codes(self, i: int, digits: Tensor) -> Tensor:
        codes = self.parts[i].get_codebook_entry(digits) * self.scales[i]
        return codes if self.residual else F.pad(codes, (i * self.width, (len(self.parts) - 1 - i) * self.width))

    def _codes_to_indices(self, z_q: Tensor, exact: bool) -> Tensor:
        if not exact:
            left, digits = unproject(z_q, self.project_out), []
            for i, part in enumerate(self.parts):
                chunk = left if self.residual else left[:, i * self.width : (i + 1) * self.width]
                digits.append(part._codes_to_indices(chunk / self.scales[i], exact))
                left = left - self._stage_codes(i, digits[-1])
            return self.join_indices(torch.stack(digits, 1))
        # Beam search: the code nearest to a sum of codes need not be one of them. So the `beam` nearest go on to the
        # next codebook, and so on. The widest beam has all sums of up to 2**24 codes; for most tokens a few are enough.
        size = self.codebook_sizes[0]
        codebooks = [self._stage_codes(i, torch.arange(size, device=z_q.device)) for i in range(len(self.parts))]
        found = torch.zeros(len(z_q), dtype=torch.int64, device=z_q.device)
        for n, (code, vector) in enumerate(zip(z_q, unproject(z_q, self.project_out))):
            for beam in (8, 8 + 2**18 // size, 8 + 2**24 // size):
                sums, left = found.new_zeros(1), vector[None]  # each candidate's index, and what it leaves over
                for i, codebook in enumerate(codebooks):
                    distances = torch.cdist(left, codebook).flatten()
                    best = distances.topk(min(beam, len(distances)), largest=False).indices
                    candidates, digits = best // size, best % size
                    sums, left = sums[candidates] + digits * size**i, left[candidates] - codebook[digits]
                error, best = (self.get_codebook_entry(sums) - code).square().sum(1).min(0)
                found[n] = sums[best]
                if error <= 1e-11 * code.square().sum():  # but for rounding, the code itself
                    break
        return found


class NoQuantizer(Quantizer):
    """Tokens unchanged: the upper limit for all others. Its codebook_size is 0 and it has no codes."""

    def __init__(self, dim: int):
        super().__init__(dim, 0)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, x.new_zeros(()), torch.zeros(len(x), dtype=torch.int64, device=x.device)

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        raise ValueError('quantizer = "none" has no codes, allowed for them: "fsq", "simvq", "ema_vq", "ddcl"')

    def _codes_to_indices(self, z_q: Tensor, exact: bool) -> Tensor:
        return self.get_codebook_entry(z_q)


QUANTIZERS = {"fsq": FSQ, "simvq": SimVQ, "ema_vq": EMAVQ, "ddcl": DDCL, "none": NoQuantizer}


def build_quantizer(name: str, dim: int, codebooks: int = 1, combine: str = "residual", **options) -> Quantizer:
    """One of "fsq", "simvq", "ema_vq", "ddcl" and "none", for tokens of dim channels, or MultiCodebook with several
    codebooks of it; options, such as codebook_size, go to its constructor."""
    check(name in QUANTIZERS, "quantizer", name, ", ".join(f'"{n}"' for n in QUANTIZERS))
    check(isinstance(dim, int) and dim >= 1, "dim", dim, "a whole number of 1 or more")
    kind = QUANTIZERS[name]
    return kind(dim, **options) if codebooks == 1 else MultiCodebook(kind, dim, codebooks, combine, **options)


def check_codebook(dim: int, codebook_size: int, code_dim: int | None, smallest_dim: int) -> int:
    code_dim = dim if code_dim is None else code_dim
    for name, value, smallest in (("codebook_size", codebook_size, 2), ("code_dim", code_dim, smallest_dim)):
        check(isinstance(value, int) and value >= smallest, name, value, f"a whole number of {smallest} or more")
    return code_dim


def unproject(z: Tensor, linear: nn.Module) -> Tensor:
    """Undo a linear layer from few dimensions to many: z (N, C) -> (N, D); where D > C, the shortest that gives z"""
    return z if isinstance(linear, nn.Identity) else (z - linear.bias) @ torch.linalg.pinv(linear.weight).T


# ---------------------------------------------------------------------------------------------------------------------
# Search for the nearest code

@torch.no_grad()
def nearest_code(x: Tensor, codebook: Tensor, exact: bool = False, bf16: bool | None = None) -> Tensor:
    """Index (N,) of the code of codebook (K, D) with the smallest Euclidean distance to each token of x (N, D).

    Both fp32 or both fp64; TF32 (torch.set_float32_matmul_precision) would round scores. exact: rank the best eight by
    distances, which tells nearly equal codes apart. bf16: search in bf16 first; None: where that is much faster.
    """
    valid = x.ndim == codebook.ndim == 2 and x.shape[1] == codebook.shape[1] and codebook.numel() > 0
    valid = valid and x.dtype == codebook.dtype and x.dtype in (torch.float32, torch.float64)
    given = [(tuple(t.shape), t.dtype) for t in (x, codebook)]
    check(valid, "x and codebook", given, "(N, D) and (K, D), both float32 or both float64")
    if bf16 is None:
        bf16 = x.shape[1] >= 128 and fast_bf16(x.device)
    if not bf16:
        by_cells = len(x) >= 512 and len(codebook) >= 4096 and x.shape[1] <= 32 and not (exact or x.is_cuda)
        with torch.autocast(x.device.type, enabled=False):  # bf16 would round what cells are left out by
            return search_by_cells(x, codebook) if by_cells else search_fp32(x, codebook, exact)
    indices, proven = search_bf16(x, codebook)
    if not proven.all():
        indices[~proven] = search_fp32(x[~proven], codebook, exact=True)
    return indices


def fast_bf16(device: torch.device | str) -> bool:
    """Whether the device computes faster in bf16 than in fp32. Emulated, as on most laptops, bf16 is up to ten times
    slower, and half as fast in the AVX-512 of Intel's CPUs: those need AMX, which virtual machines may hide."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch have none: fp32
    return cpu.get("amx_bf16", False) or cpu.get("avx512_bf16", False) and "Intel" not in cpu.get("cpu_name", "")


def origin_near(codebook: Tensor) -> Tensor:
    """A point (D,) to measure from: distances stay what they are, and fp32 rounds smaller numbers less. A median, of up
    to 128 codes, is near most codes even if some are far away; a mean is not."""
    return codebook[:: len(codebook) // 128 + 1].median(0).values


def search_fp32(x: Tensor, codebook: Tensor, exact: bool) -> Tensor:
    """As |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2), the nearest has the largest x.c - |c|^2 / 2: a matrix product."""
    origin = origin_near(codebook)
    codes = codebook - origin
    bias = torch.cat([rows.square().sum(1) for rows in codes.split(max(1, 2**19 // codes.shape[1]))]) / -2
    chunks = x.split(max(1, (2**26 if x.is_cuda else 2**20) // len(codes)))  # of scores that fit a CPU's cache
    memory = codes.new_empty(len(chunks[0]), len(codes))  # reused: new pages can take longer than a narrow product
    indices = []
    for chunk in chunks:  # of scores the max, not argmax, which takes several times as long on a CPU
        scores = torch.addmm(bias, chunk - origin, codes.T, out=memory[: len(chunk)])
        best = scores.topk(min(8, len(codes))).indices if exact else scores.max(1, keepdim=True).indices
        indices.append(nearest_candidate(chunk, codebook, best)[0] if exact else best[:, 0])
    return torch.cat(indices)


def search_by_cells(x: Tensor, codebook: Tensor) -> Tensor:
    """What search_fp32 finds, from a few of the codes: a large codebook of narrow codes, on a CPU.

    Every 512th code is a centre a_j; its cell is the codes nearer to it than to other centres. If a_i is the centre
    nearest to token t, the codes of cell j lie beyond the plane half-way between a_i and a_j, whose distance from t is
        (s_i - s_j) / |a_i - a_j|,    s_j = t.a_j - |a_j|^2 / 2
    Cell i is searched first, then the cells whose plane is no farther from t than the best code of cell i: of 65,536
    trained 16-dimensional codes, about a tenth. (In many more dimensions, all planes are nearer than any code.)
    """
    origin = origin_near(codebook)
    x, codes = x - origin, codebook - origin
    squares, lengths = x.square().sum(1, keepdim=True), codes.square().sum(1, keepdim=True)
    slacks = 3 * (x.shape[1] + 1) * torch.finfo(x.dtype).eps * (squares + lengths.max())  # rounding of s_i - s_j
    x, codes = F.pad(x, (0, 1), value=1.0), torch.cat([codes, lengths / -2], 1)  # a product of them is a score
    centres = codes[::512]
    apart = torch.cdist(centres[:, :-1], centres[:, :-1], compute_mode="donot_use_mm_for_euclid_dist").clamp(min=1e-30)
    cell_of = torch.cat([(F.pad(c, (0, 1), value=1.0) @ centres.T).max(1).indices for c in codes[:, :-1].split(2**13)])
    order = cell_of.argsort(stable=True)
    cells = codes[order].split(cell_of.bincount(minlength=len(centres)).tolist())
    largest = max(map(len, cells))
    size = min(len(x), 2**13, 2**24 // largest)  # tokens at a time
    memory = x.new_empty(size * largest)
    indices = []
    for tokens, square, slack in zip(x.split(size), squares.split(size), slacks.split(size)):
        to_centres = tokens @ centres.T
        nearest, own = to_centres.max(1, keepdim=True)
        planes = (nearest - to_centres - slack) / apart[own[:, 0]]
        best, index = torch.full_like(square[:, 0], -torch.inf), torch.zeros_like(own[:, 0])
        due = torch.zeros_like(planes, dtype=torch.bool).scatter_(1, own, True)
        for _ in range(2):  # the own cells, then those within reach
            cell, token = due.T.nonzero().unbind(1)
            start = 0
            for members, rows in zip(cells, token.split(cell.bincount(minlength=len(cells)).tolist())):
                if len(members) and len(rows):
                    scores = memory[: len(rows) * len(members)].view(len(rows), -1)
                    highest = torch.mm(tokens[rows], members.T, out=scores).amax(1)
                    better = (highest > best[rows]).nonzero()[:, 0]
                    best[rows[better]] = highest[better]
                    index[rows[better]] = start + scores[better].max(1).indices
                start += len(members)
            reach = (square - 2 * best[:, None] + slack).clamp(min=0).sqrt()
            due = (planes <= reach).scatter_(1, own, False)
        indices.append(order[index])
    return torch.cat(indices)


def search_bf16(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Shortlist and re-rank: nearest_code in bf16, and whether each index (N,) is proven to be right.

    The codes of a token's eight highest bf16 scores, its shortlist, are ranked by distances in fp32. For token t and
    code c, relative to the origin, and any constant `shift`, the exact score
        s = t.c + bias = shift + (|t|^2 - |t - c|^2) / 2,    bias = shift - |c|^2 / 2
    is highest for the nearest code; shift = median(|c|^2) / 2 brings bias near 0, where bf16 rounds less. Computed is
    s' = t'.c' + bias', where ' means rounded to bf16, whose 8 significant bits change a number by up to 2**-8 of it; s'
    is rounded, too. Codes off the shortlist have s' <= last, the lowest on it, and hence (Cauchy-Schwarz)
        s <= last + error,    error = |t - t'| |c| + |t'| |c - c'| + |bias - bias'| + 2**-8 |last|,
    with the largest |c|, |c - c'| and |bias - bias'|, sums being in fp32 (hence the switch, for GPUs). The best is
    proven if its s is no less.
    """
    origin = origin_near(codebook)
    codes = torch.empty_like(codebook, dtype=torch.bfloat16)
    squares, errors = x.new_empty(2, len(codes))  # |c|^2 and |c - c'|^2
    size = max(1, 2**19 // x.shape[1])  # codes at a time: centred in fp32, all would take three times the memory
    for code, rounded, square, error in zip(*(t.split(size) for t in (codebook, codes, squares, errors))):
        centred = code - origin
        rounded.copy_(centred)
        square.copy_(centred.square().sum(1))
        error.copy_((centred - rounded).square().sum(1))
    shift = squares.median() / 2
    bias = shift - squares / 2
    rounded_bias = bias.bfloat16()
    bias_error, code_norm, code_error = (bias - rounded_bias).abs().max(), squares.max().sqrt(), errors.max().sqrt()
    chunks = x.split(max(1, (2**26 if x.is_cuda else 2**22) // len(codes)))
    memory = codes.new_empty(len(chunks[0]), len(codes))
    indices, proven = [], []
    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums in fp32
    for chunk in chunks:
        tokens = chunk - origin
        rounded = tokens.bfloat16()
        scores = torch.addmm(rounded_bias, rounded, codes.T, out=memory[: len(chunk)])
        highest, shortlist = scores.topk(min(8, len(codes)))
        nearest, distance = nearest_candidate(chunk, codebook, shortlist)
        score = shift + (tokens.square().sum(1) - distance) / 2
        last = highest[:, -1].to(x.dtype)
        error = ((tokens - rounded).norm(dim=1) * code_norm + rounded.to(x.dtype).norm(dim=1) * code_error
                 + bias_error + 2**-8 * last.abs())
        indices.append(nearest)
        proven.append(score >= last + 1.1 * error)  # 1.1: sums in fp32 round, too. False for NaN
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced
    return torch.cat(indices), torch.cat(proven)


def nearest_candidate(x: Tensor, codebook: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest (N,) of each token's candidates (N, n), indices of codes, and its squared distance |x - c|^2."""
    size = 4096 if x.is_cuda else 64  # tokens at a time: their codes stay in a CPU's cache
    distances = [(t[:, None] - codebook[i]).square().sum(-1) for t, i in zip(x.split(size), candidates.split(size))]
    distance, best = torch.cat(distances).min(1)
    return candidates.gather(1, best[:, None])[:, 0], distance
