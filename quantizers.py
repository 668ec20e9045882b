"""FSQ, SimVQ, EMA-VQ and DDCL behind one interface.

    quantizer = build_quantizer("fsq", dim=256)
    z_q, loss, indices = quantizer(z)          # z, z_q (B, C, H, W) or (B, N, C); indices (B, H, W) or (B, N)
    quantizer.indices_to_codes(indices)        # z_q again: in eval mode the same numbers, exactly
    quantizer.codes_to_indices(z_q)            # and back
    quantizer.get_codebook_entry(indices)      # (N,) -> (N, C)
    quantizer.codebook_size

This file needs torch and vector-quantize-pytorch alone, so that it can be copied into other projects. There: keep quantizers in
fp32, whatever the model around them is in; add loss to your own; and expect torch.compile to break its graph at the checks.
"""
import math
from abc import ABC, abstractmethod
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ as LibraryFSQ
from vector_quantize_pytorch import SimVQ as LibrarySimVQ
from vector_quantize_pytorch import VectorQuantize


def fast_bf16(device: torch.device | str) -> bool:
    """Whether the device has units for bf16. Where it has none, bf16 is emulated: on a CPU up to ten times slower than fp32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """The codes, exactly, with the gradient of z. (The usual z + (codes - z) rounds, and would not equal the codes.)"""
    return codes + (z - z.detach()) if torch.is_grad_enabled() else codes


def argmax(scores: Tensor) -> Tensor:
    """scores.argmax(1) of scores (N, K): first the group of entries, then the place in it. A CPU finds largest values with vector
    instructions, but not their places: where K is a thousand or more, and a multiple of 128, this takes a fifth to a third of the time."""
    size = math.gcd(scores.shape[1], 128)
    if size < 32 or scores.shape[1] < 512:
        return scores.argmax(1)
    groups = scores.unflatten(1, (-1, size))
    best = groups.amax(2).argmax(1)
    return best * size + groups[torch.arange(len(scores), device=scores.device), best].argmax(1)


@torch.no_grad()
def nearest_code(x: Tensor, codebook: Tensor, block: int | None = None, half: bool | None = None, exact: bool = False) -> Tensor:
    """Index (N,) of the code of codebook (K, D) with the smallest Euclidean distance to each row of x (N, D), in fp32 (if
    torch.set_float32_matmul_precision, which may round to TF32, is left alone).

    |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2), so the nearest code maximises x.c - |c|^2 / 2: one matrix product, made in
    blocks of `block` numbers (by default what suits a CPU's cache or a GPU's cores), so that the whole N x K matrix
    never exists. half: search in bf16, several times as fast, and rank the eight best of each token again by their
    distances in fp32; a token for which rounding could have hidden the nearest code from these eight is searched again
    in fp32. None: from 128 numbers a code on, where bf16 is fast. exact: ranked again in any case, where nearly equal codes have
    to be told apart.
    """
    shapes, types = (tuple(x.shape), tuple(codebook.shape)), (x.dtype, codebook.dtype)
    check(x.ndim == codebook.ndim == 2 and x.shape[1] == codebook.shape[1] and codebook.numel() > 0, "x and codebook", shapes, "(N, D) and (K, D)")
    check(types in [(torch.float32,) * 2, (torch.float64,) * 2], "x and codebook", types, "both float32 or both float64")
    half = x.shape[1] >= 128 and fast_bf16(x.device) if half is None else half
    size = block or (2**26 if x.is_cuda else 2**22 if half else 2**20)
    # seen from the middle of the tokens: what all share tells no code from another, and costs digits, of which bf16 has few
    centre = x.mean(0)
    codes = torch.empty_like(codebook, dtype=torch.bfloat16 if half else x.dtype)
    squares, lost = x.new_empty(len(codebook)), x.new_empty(len(codebook))  # squared lengths of codes, and of what rounding takes off
    rows = max(1, 2**19 // x.shape[1])
    for at in range(0, len(codebook), rows):
        part = slice(at, at + rows)
        centred = codebook[part] - centre
        codes[part] = centred
        squares[part] = centred.square().sum(1)
        lost[part] = (centred - codes[part]).square().sum(1)
    shift = squares.median() / 2 if half else 0.0
    bias = shift - squares / 2
    rounded_bias = bias.to(codes.dtype)
    longest, most_lost, bias_error = squares.max().sqrt(), lost.max().sqrt(), (bias - rounded_bias).abs().max()
    indices, unsure = [], []
    chunks = x.split(max(1, size // len(codebook)))
    # one memory for all chunks: to be given new pages can take longer than a narrow product
    kept = codes.new_empty(len(chunks[0]), len(codebook))
    for chunk in chunks:
        tokens = chunk - centre
        rounded = tokens.to(codes.dtype)
        scores = torch.addmm(rounded_bias, rounded, codes.T, out=kept[: len(chunk)])
        if not (half or exact):
            indices.append(argmax(scores))
            continue
        highest, candidates = scores.topk(min(8, len(codebook)))
        distances = []
        few = 4096 if x.is_cuda else 64  # so that the codes looked up stay in a CPU's cache
        for some, near in zip(chunk.split(few), candidates.split(few)):
            distances.append((some[:, None] - codebook[near]).square().sum(-1))
        distance, best = torch.cat(distances).min(1)
        indices.append(candidates.gather(1, best[:, None])[:, 0])
        if half:
            # a code that is no candidate scored no more than the last of them did, and rounding took no more from it than:
            last = highest[:, -1].to(x.dtype)
            error = ((tokens - rounded).norm(dim=1) * longest + rounded.to(x.dtype).norm(dim=1) * most_lost
                     + bias_error + 2**-8 * last.abs())
            score = shift + (tokens.square().sum(1) - distance) / 2
            unsure.append(~(score >= last + 1.1 * error))  # a tenth more for rounding within the product; NaN is unsure
    indices = torch.cat(indices)
    if half:
        again = torch.cat(unsure).nonzero()[:, 0]
        del codes, kept, scores  # their memory is needed again
        if len(again):
            indices[again] = nearest_code(x[again], codebook, block, half=False, exact=True)
    return indices


class Quantizer(nn.Module, ABC):
    """What the four have in common: layouts, checks, fp32, and the way from indices to codes.

    A quantizer defines quantize(x), on tokens x (N, C) in fp32, and get_codebook_entry(indices).
    """

    def __init__(self, dim: int, codebook_size: int):
        super().__init__()
        self.dim = dim
        self.codebook_size = codebook_size

    @abstractmethod
    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens x (N, C) -> z_q (N, C), loss (scalar), indices (N,)"""

    @abstractmethod
    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        """indices (N,) in [0, codebook_size) -> codes (N, C). ValueError where one is out of range."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize z (B, C, H, W) or (B, N, C), of any floating type.

        Returns z_q (z's shape, fp32), loss (scalar >= 0) and indices (B, H, W) or (B, N), int64. In eval mode z_q equals
        indices_to_codes(indices) exactly; the gradient of z_q reaches z in both modes.

        Raises ValueError for another shape, a wrong number of channels, a NaN or infinity in z, or weights not in fp32.
        """
        tokens, layout = self._to_tokens(z, "z")
        with torch.autocast(z.device.type, enabled=False):  # bf16 would round distances, and codes with them
            z_q, loss, indices = self.quantize(tokens)
            if not self.training and self.codebook_size:
                with torch.no_grad():
                    codes = self.get_codebook_entry(indices)
                z_q = straight_through(z_q, codes)
        return self._from_tokens(z_q, layout), loss, indices.view(layout)

    @property
    def device(self) -> torch.device:
        return next((t.device for t in chain(self.parameters(), self.buffers())), torch.device("cpu"))  # "none" has neither

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """indices (B, H, W) or (B, N) -> codes (B, C, H, W) or (B, N, C). ValueError where one is out of range."""
        check(isinstance(indices, Tensor), "indices", type(indices).__name__, "a tensor")
        if indices.ndim not in (2, 3):
            raise ValueError(f"indices have shape {tuple(indices.shape)}, allowed are (B, N) and (B, H, W)")
        with torch.autocast(self.device.type, enabled=False):
            codes = self.get_codebook_entry(indices.flatten())
        return self._from_tokens(codes, indices.shape)

    @torch.no_grad()
    def codes_to_indices(self, z_q: Tensor) -> Tensor:
        """Codes (B, C, H, W) or (B, N, C), as forward or indices_to_codes gave them -> indices (B, H, W) or (B, N).

        FSQ and DDCL give back the very indices; SimVQ and EMA-VQ those of the same codes (two may be equal).
        """
        tokens, layout = self._to_tokens(z_q, "z_q")
        with torch.autocast(z_q.device.type, enabled=False):
            return self._tokens_to_indices(tokens).view(layout)

    def _tokens_to_indices(self, tokens: Tensor) -> Tensor:
        codebook = self.get_codebook_entry(torch.arange(self.codebook_size, device=tokens.device))
        return nearest_code(tokens, codebook, exact=True)

    def _check_indices(self, indices: Tensor) -> Tensor:
        check(isinstance(indices, Tensor), "indices", type(indices).__name__, "a tensor")
        if indices.ndim != 1:
            raise ValueError(f"indices have shape {tuple(indices.shape)}, allowed is (N,)")
        if indices.dtype.is_floating_point or indices.dtype in (torch.bool, torch.complex64, torch.complex128):
            raise ValueError(f"indices have type {indices.dtype}, allowed are integers")
        indices = indices.long().to(self.device)  # tokens read from a file are of few bytes, and on the CPU
        if indices.numel():
            low, high = torch.stack(indices.aminmax()).tolist()
            if not 0 <= low <= high < self.codebook_size:
                raise ValueError(f"indices run from {low} to {high}, allowed are 0 to {self.codebook_size - 1}")
        return indices

    def _to_tokens(self, z: Tensor, name: str) -> tuple[Tensor, torch.Size]:
        check(isinstance(z, Tensor), name, type(z).__name__, "a tensor")
        if z.ndim not in (3, 4) or not z.numel():
            raise ValueError(f"{name} has shape {tuple(z.shape)}, allowed are (B, {self.dim}, H, W) and (B, N, {self.dim}), none of them 0")
        if not z.dtype.is_floating_point:
            raise ValueError(f"{name} has type {z.dtype}, allowed are floating-point numbers")
        types = {t.dtype for t in chain(self.parameters(), self.buffers()) if t.is_floating_point()} - {torch.float32}
        if types:
            raise ValueError(f"this quantizer's weights are {types.pop()}, allowed is torch.float32: call its float()")
        if z.ndim == 4:
            z = z.permute(0, 2, 3, 1)
        if z.shape[-1] != self.dim:
            raise ValueError(f"{name} has {z.shape[-1]} channels, this quantizer has dim {self.dim}")
        z = z.float()  # numbers that are too large for it are infinite here
        if not torch.stack(z.aminmax()).isfinite().all():  # two numbers to look at rather than all
            raise ValueError(f"{name} has a NaN or infinity in it")
        return z.reshape(-1, self.dim), z.shape[:-1]

    def _from_tokens(self, tokens: Tensor, layout: torch.Size) -> Tensor:
        z = tokens.view(*layout, self.dim)
        return z.permute(0, 3, 1, 2) if len(layout) == 3 else z


def unproject(z: Tensor, linear: nn.Module) -> Tensor:
    """Undo a linear layer that maps few numbers to many: z (N, C) -> (N, D), D <= C"""
    if isinstance(linear, nn.Identity):
        return z
    return (z - linear.bias) @ torch.linalg.pinv(linear.weight).T


class FSQ(Quantizer):
    """Finite scalar quantization (Mentzer et al., 2309.15505): each of len(levels) numbers is rounded to a few levels.

    The codebook is the grid of all level combinations: nothing to learn, nothing to collapse. Good choices of levels:
    [8, 6, 5] = 240, [8, 8, 8] = 512, [7, 5, 5, 5] = 875, [8, 5, 5, 5] = 1,000, [8, 6, 6, 5] = 1,440 and
    [8, 8, 8, 5, 5, 5] = 64,000 codes. The loss is 0.
    """

    def __init__(self, dim: int, levels: list[int] = (8, 8, 8, 5, 5, 5)):
        check(isinstance(levels, (list, tuple)) and levels and all(isinstance(n, int) and 2 <= n <= 2**16 for n in levels),
              "levels", levels, "whole numbers from 2 to 2**16")
        check(math.prod(levels) <= 2**24, "levels", levels, "at most 2**24 codes in all")
        check(dim >= len(levels), "dim", dim, f"at least one channel for each of the {len(levels)} levels")
        super().__init__(dim, math.prod(levels))
        # preserve_symmetry (2411.19842, section 3.2) spaces even numbers of levels evenly around zero; the default does not
        self.fsq = LibraryFSQ(list(levels), dim=dim, preserve_symmetry=True)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        levels = self.fsq.quantize(self.fsq.project_in(x))
        return self.fsq.project_out(levels), x.new_zeros(()), self._levels_to_indices(levels.detach())

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        return self.fsq.project_out(self.fsq.implicit_codebook[self._check_indices(indices)])

    def _tokens_to_indices(self, tokens: Tensor) -> Tensor:
        return self._levels_to_indices(unproject(tokens, self.fsq.project_out))  # near enough to levels to round

    def _levels_to_indices(self, levels: Tensor) -> Tensor:
        """Numbers (N, len(levels)) at or near levels in [-1, 1] -> indices (N,). (The library adds up in fp32, which from some six
        million codes on rounds an index to the next.)"""
        return (levels.clamp(-1, 1) + 1).mul((self.fsq._levels - 1) / 2).round().long().mul(self.fsq._basis).sum(-1)


class MappedCodes(torch.autograd.Function):
    """Rows (N, D) of a codebook c = W f / |W f| that is already there, with the gradient of its map W: to compute them anew for
    it would cost a tenth of the whole step where codes are wide, and to keep the whole way to c several codebooks of memory."""

    @staticmethod
    def forward(ctx, weight: Tensor, frozen: Tensor, codebook: Tensor, lengths: Tensor, indices: Tensor) -> Tensor:
        codes = codebook[indices]
        ctx.save_for_backward(frozen, codes, lengths[indices], indices)
        return codes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        frozen, codes, lengths, indices = ctx.saved_tensors
        along = torch.linalg.vecdot(gradient, codes)[:, None]  # what would change the length, and not the code
        gradient = torch.addcmul(gradient, along, codes, value=-1).div_(lengths)
        return gradient.T @ frozen[indices], None, None, None, None


class SimVQ(Quantizer):
    """SimVQ (Zhu et al., 2411.02038): a frozen random codebook seen through one learned linear map.

    A gradient to the map moves every code, used or not, so that none is left behind. Codes have code_dim numbers (None: dim), to
    which the input is projected. Unlike the paper's, both stand on the unit sphere: nearest means the highest cosine similarity.
    """

    def __init__(self, dim: int, codebook_size: int = 16384, code_dim: int | None = None):
        check(isinstance(codebook_size, int) and codebook_size >= 2, "codebook_size", codebook_size, "a whole number of 2 or more")
        check(code_dim is None or isinstance(code_dim, int) and code_dim >= 1, "code_dim", code_dim, "None or a whole number of 1 or more")
        super().__init__(dim, codebook_size)
        code_dim = code_dim or dim
        self.project_in = nn.Linear(dim, code_dim)
        self.simvq = LibrarySimVQ(code_dim, codebook_size)
        self._kept = None
        self.project_out = nn.Linear(code_dim, dim)

    @property
    def codebook(self) -> Tensor:
        """(codebook_size, code_dim), of length 1. (A get_codebook_entry without this map decodes what nobody trained.)

        Without gradients, in eval mode, it is kept until the map changes.
        """
        if self.training or torch.is_grad_enabled():
            return F.normalize(self.simvq.codebook, dim=-1)
        weight, frozen = self.simvq.code_transform.weight, self.simvq.frozen_codebook
        version = None if frozen.is_inference() else frozen._version
        # the map is compared number by number: a fused optimizer changes a weight without counting its version up
        if self._kept is None or self._kept[0] is not frozen or self._kept[1] != version or not torch.equal(self._kept[2], weight):
            self._kept = frozen, version, weight.clone(), F.normalize(self.simvq.codebook, dim=-1)
        return self._kept[3]

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # the library's own forward would copy the codebook for each image; its loss is the one below
        x = F.normalize(self.project_in(x), dim=-1)
        if self.training or torch.is_grad_enabled():
            with torch.no_grad():
                codebook = self.simvq.codebook
                lengths = codebook.norm(dim=1, keepdim=True).clamp_min(1e-12)
                codebook.div_(lengths)  # in place: of wide codes, each copy is 100 MB
                indices = nearest_code(x, codebook)
            codes = MappedCodes.apply(self.simvq.code_transform.weight, self.simvq.frozen_codebook, codebook, lengths, indices)
            del codebook  # or it would be there beside all that follows
        else:
            indices = nearest_code(x, self.codebook)
            codes = self.codebook[indices]
        # squared distances on the sphere, 2 - 2 cos: the codes come to the tokens, the tokens (less so) to the codes
        commitment = self.simvq.input_to_quantize_commit_loss_weight
        loss = x.shape[1] * (F.mse_loss(codes, x.detach()) + commitment * F.mse_loss(x, codes.detach()))
        return self.project_out(straight_through(x, codes.detach())), loss, indices

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        indices = self._check_indices(indices)
        return self.project_out(self.codebook[indices])


class EMAVQ(Quantizer):
    """VQ-VAE with exponential moving averages (1711.00937, appendix A.1; 1906.00446): nearest Euclidean code.

    N_i <- decay N_i + (1 - decay) n_i,  m_i <- decay m_i + (1 - decay) sum of the n_i tokens at code i,  e_i = m_i / N_i
    with N_i smoothed after Laplace. A code that falls below a tenth of the average use is dead and starts again at a
    random token, with the average use. State and smoothing are the library's; the search and the sums are made here,
    without its (tokens x codes) distance and one-hot matrices, and revival, without the same token for many codes.

    In train mode forward moves the codebook, in all processes alike: keep it out of torch.utils.checkpoint, which would
    move it twice.
    """

    def __init__(self, dim: int, codebook_size: int = 8192, code_dim: int | None = None, decay: float = 0.99,
                 commitment_cost: float = 0.25, revive: bool = True):
        check(isinstance(codebook_size, int) and codebook_size >= 2, "codebook_size", codebook_size, "a whole number of 2 or more")
        check(code_dim is None or isinstance(code_dim, int) and code_dim >= 1, "code_dim", code_dim, "None or a whole number of 1 or more")
        check(0 < decay < 1, "decay", decay, "between 0 and 1")
        super().__init__(dim, codebook_size)
        code_dim = code_dim or dim
        self.commitment_cost = commitment_cost
        self.revive = revive
        self.project_in = nn.Linear(dim, code_dim) if code_dim != dim else nn.Identity()
        self.vq = VectorQuantize(code_dim, codebook_size=codebook_size, decay=decay, sync_codebook=False)
        if revive:
            self.vq._codebook.cluster_size.zero_()  # all codes start dead: the first tokens that come revive them
            self.vq._codebook.embed_avg.zero_()
        self.project_out = nn.Linear(code_dim, dim) if code_dim != dim else nn.Identity()

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.project_in(x)
        indices = nearest_code(x, self.vq.codebook)
        codes = self.vq.codebook[indices]  # as they are before the update
        if self.training:
            self.update(x.detach(), indices)
        loss = self.commitment_cost * F.mse_loss(x, codes)
        return self.project_out(straight_through(x, codes)), loss, indices

    @torch.no_grad()
    def update(self, x: Tensor, indices: Tensor):
        """One EMA step of the codebook, from tokens x (N, code_dim) and their codes' indices (N,)."""
        book = self.vq._codebook
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if together else (0, 1)

        def add_up(values: Tensor):
            if together:
                torch.distributed.all_reduce(values)

        counts = torch.bincount(indices, minlength=self.codebook_size).to(x)
        add_up(counts)
        book.cluster_size[0].lerp_(counts, 1 - book.decay)
        # each process brings its share of the old averages and its own tokens, so that only the averages are added up
        book.embed_avg[0].mul_(book.decay / ranks).index_add_(0, indices, x, alpha=1 - book.decay)
        add_up(book.embed_avg)
        book.update_ema()
        if self.revive:
            average = counts.sum() / self.codebook_size
            dead = (book.cluster_size[0] < 0.1 * average).nonzero()[:, 0]
            if len(dead):
                # each process has tokens for its share of the dead, no token for two; codes without one wait for the next step
                share = torch.arange(rank, len(dead), ranks, device=x.device)[: len(x)]
                new = x.new_zeros(len(dead), x.shape[1] + 1)  # and whether there is one
                new[share] = F.pad(x[torch.randperm(len(x), device=x.device)[: len(share)]], (0, 1), value=1.0)
                add_up(new)
                found = new[:, -1] > 0
                dead, new = dead[found], new[found, :-1]
                book.embed[0, dead], book.embed_avg[0, dead], book.cluster_size[0, dead] = new, new * average, average

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        indices = self._check_indices(indices)
        return self.project_out(self.vq.codebook[indices])


class DDCL(Quantizer):
    """Differentiable discrete communication (Freed et al., AAAI 2020; 2511.01554): subtractive dither of step delta.

    Four numbers a token, in [-1, 1]. Training adds noise u ~ U(-delta/2, delta/2) to each, rounds to a multiple of
    delta and takes the noise off again: the result is the number plus a uniform error that does not depend on it, so
    that the gradient passes as it is, unbiased, without a straight-through estimator. Eval mode rounds alone.

    The loss is the length of the message, sum of log2(2 |x| / delta + 1) bits a token, times comm_weight: at least the
    expected length of what is sent, for the logarithm is concave (Jensen), and equal to it where x is a multiple of delta.
    """

    numbers = 4

    def __init__(self, dim: int, delta: float = 1 / 15, comm_weight: float = 1e-3):
        check(0 < delta <= 1 and abs(1 / delta - round(1 / delta)) < 1e-2, "delta", delta, "1 / n for a whole n: 1, 1/2, ..., 1/15, ...")
        check(round(1 / delta) <= 32, "delta", delta, "1/32 or more")
        check(comm_weight >= 0, "comm_weight", comm_weight, "0 or more")
        check(dim >= self.numbers, "dim", dim, f"at least {self.numbers}")
        self.steps = round(1 / delta)  # integers run from -steps to steps
        self.values = 2 * self.steps + 1
        super().__init__(dim, self.values**self.numbers)
        self.delta = 1 / self.steps
        self.comm_weight = comm_weight
        self.project_in = nn.Linear(dim, self.numbers)
        self.project_out = nn.Linear(self.numbers, dim)
        self.register_buffer("basis", self.values ** torch.arange(self.numbers), persistent=False)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.tanh(self.project_in(x))
        dither = (torch.rand_like(x) - 0.5) * self.delta if self.training else torch.zeros_like(x)
        message = ((x + dither) / self.delta).detach().round().clamp(-self.steps, self.steps)
        # x plus an error that is a constant to autograd: the gradient of x is that of what is received
        received = straight_through(x, message * self.delta - dither)
        bits = torch.log2(2 * x.abs() / self.delta + 1).sum(-1).mean()
        indices = ((message.long() + self.steps) * self.basis).sum(-1)
        return self.project_out(received), self.comm_weight * bits, indices

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        message = self._check_indices(indices)[:, None] // self.basis % self.values - self.steps
        return self.project_out(message * self.delta)

    def _tokens_to_indices(self, tokens: Tensor) -> Tensor:
        message = (unproject(tokens, self.project_out) / self.delta).round().clamp(-self.steps, self.steps)
        return ((message.long() + self.steps) * self.basis).sum(-1)


class NoQuantizer(Quantizer):
    """Tokens as they are: the ceiling for all others. Its codebook_size is 0, and there are no codes to look up."""

    def __init__(self, dim: int):
        super().__init__(dim, 0)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, x.new_zeros(()), torch.zeros(len(x), dtype=torch.int64, device=x.device)

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        raise ValueError('quantizer = "none" has no codes; allowed for them: "fsq", "simvq", "ema_vq", "ddcl"')


QUANTIZERS = {"fsq": FSQ, "simvq": SimVQ, "ema_vq": EMAVQ, "ddcl": DDCL, "none": NoQuantizer}


def build_quantizer(name: str, dim: int, **options) -> Quantizer:
    """One of "fsq", "simvq", "ema_vq", "ddcl" and "none" for tokens of `dim` channels; options go to its constructor."""
    check(name in QUANTIZERS, "quantizer", name, ", ".join(f'"{n}"' for n in QUANTIZERS))
    check(isinstance(dim, int) and dim >= 1, "dim", dim, "a whole number of 1 or more")
    return QUANTIZERS[name](dim, **options)


def check(ok: bool, name: str, value: object, allowed: str):
    if not ok:
        raise ValueError(f"{name} = {value!r}, allowed: {allowed}")
