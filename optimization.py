"""Muon, the schedule of learning rates, a CPU's arithmetic, and layers' weights cast to bf16 all at once: how a step of
train.py and generate.py learns more, takes less time, and comes out the same each time."""
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from models import Conv
from quantizers import Quantizer, fast_bf16


def prepare_cpu():
    """Arithmetic that is the same each time, which costs nothing on a CPU, and zeros for numbers below 1e-38. Gradients
    become such where GELU's input is near -12, and convolutions of them in fp32 took up to eight times as long. To be
    called first: threads that run already would not hear of it."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_flush_denormal(True)


def warmup_cosine(step: int, steps: int) -> float:
    """The share of a learning rate in step 0 to steps - 1: rises over the first twentieth, then falls to nearly 0."""
    return min((step + 1) / max(1, steps // 20), 0.5 + 0.5 * math.cos(math.pi * step / steps))


def take_step(optimizers: list[torch.optim.Optimizer], step: int, steps: int):
    """A step of each optimizer, at warmup_cosine's share of the learning rate that it was made with"""
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * warmup_cosine(step, steps)
        optimizer.step()


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024): a matrix's update is its momentum U S V^T with all singular values set to about 1,
    U V^T, so that rare directions move as much as common ones, scaled to the RMS of AdamW's updates (2502.16982).

    Computes what torch.optim.Muon(adjust_lr_fn="match_rms_adamw") does, but for many matrices in few products and sums:
    on a GPU it is launching these that small matrices take time for.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            if not matrices:
                continue
            gradients = [p.grad for p in matrices]
            for p in matrices:
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in matrices]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
            orthogonalize(updates, few_launches=updates[0].is_cuda)
            torch._foreach_mul_(updates, [-group["lr"] * 0.2 * math.sqrt(max(p.shape)) for p in matrices])
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, updates)


def adamw_and_muon(model: nn.Module, blocks: tuple[str, ...], learning_rate: float) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon at twice its rate for the matrices of those layers whose names begin with one of `blocks`."""
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in learning.items() if name.startswith(blocks) and p.ndim == 2}
    others = [p for name, p in learning.items() if name not in matrices]
    optimizers = [torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)]
    return optimizers + ([Muon(matrices.values(), 2 * learning_rate, weight_decay=0.01)] if matrices else [])


def orthogonalize(matrices: list[Tensor], few_launches: bool):
    """Make matrices nearly orthogonal, in place: five Newton-Schulz steps take all singular values towards 1. They need
    no more than bf16; where that would be slower, fp32 is taken.

    Matrices of one shape are computed together. few_launches: those of similar ones, too, with zeros, which stay zeros;
    else, as a CPU's time goes to arithmetic, wide ones by newton_schulz_of_wide.
    """
    stacks = {}
    for matrix in matrices:
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
        key = (len(wide) - 1).bit_length() if few_launches else wide.shape  # up to the next power of two
        stacks.setdefault(key, []).append(wide)
    for stack in stacks.values():
        rows, columns = (max(matrix.shape[side] for matrix in stack) for side in (0, 1))
        dtype = torch.bfloat16 if fast_bf16(stack[0].device) else torch.float32
        x = torch.zeros(len(stack), rows, columns, dtype=dtype, device=stack[0].device)
        torch._foreach_copy_([padded[: len(matrix), : matrix.shape[1]] for padded, matrix in zip(x, stack)], stack)
        x.div_(x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7))
        squarish = columns < 2 * rows  # then it is as much arithmetic
        x = newton_schulz(x) if few_launches or squarish else newton_schulz_of_wide(x)
        torch._foreach_copy_(stack, [padded[: len(matrix), : matrix.shape[1]] for padded, matrix in zip(x, stack)])


def newton_schulz(x: Tensor) -> Tensor:
    """Five steps X <- (a I + b X X^T + c (X X^T)^2) X for matrices x (K, m, n) of norm 1, with Muon's a, b and c."""
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def newton_schulz_of_wide(x: Tensor) -> Tensor:
    """The same by products of m x m matrices: a step is X <- P X, hence X X^T <- P X X^T P, so that the P of several
    steps can be multiplied first. A 3 x 3 convolution's matrices, n = 9 m, so take a third of the time in fp32."""
    def polynomial(gram: Tensor) -> Tensor:
        p = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        p.diagonal(dim1=1, dim2=2).add_(3.4445)
        return p

    for steps in (5,) if x.dtype == torch.float32 else (3, 2):  # five at once in bf16: rounding errors would grow
        gram = x @ x.mT
        product = p = polynomial(gram)
        for _ in range(steps - 1):
            gram = p @ gram @ p
            p = polynomial(gram)
            product = p @ product
        x = product @ x
    return x


class ToBF16(torch.autograd.Function):
    """fp32 tensors to bf16 in few kernel launches, and their gradients back to fp32."""

    @staticmethod
    def forward(ctx, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        copies = [torch.empty_like(tensor, dtype=torch.bfloat16) for tensor in tensors]
        torch._foreach_copy_(copies, tensors)
        return tuple(copies)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [gradient for gradient in gradients if gradient is not None]
        copies = [torch.empty_like(gradient, dtype=torch.float32) for gradient in given]
        torch._foreach_copy_(copies, given)
        copies = iter(copies)
        return tuple(None if gradient is None else next(copies) for gradient in gradients)


def autocast_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers of a module, by name, whose weights autocast casts to bf16: all convolutions and linear layers but
    the quantizer's own."""
    quantizers = tuple(f"{name}." for name, part in module.named_modules() if isinstance(part, Quantizer))
    return {name: part for name, part in module.named_modules()
            if isinstance(part, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, Conv)) and not name.startswith(quantizers)}


class BF16Weights(nn.Module):
    """A module called with its layers' weights in bf16, cast all at once: autocast casts each by itself, two kernel
    launches for each weight and step. The results are the same, and gradients arrive at the fp32 weights (together, at
    the end of the backward pass: of several GPUs, DistributedDataParallel then sends them all at once).

    Layers named `head` are left to autocast: one node of autograd's graph casts all others, so that the gradient of one
    of them alone, as the adaptive weight of a GAN asks for the head's, would go through the whole network.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.names = [f"{name}.{kind}" for name, layer in autocast_layers(module).items() if not name.endswith(".head")
                      for kind, weight in layer.named_parameters() if weight.requires_grad]

    def forward(self, *arguments):
        weights = ToBF16.apply(*map(self.module.get_parameter, self.names))
        return torch.func.functional_call(self.module, dict(zip(self.names, weights)), arguments)


def load_states(parts: dict[str, nn.Module | torch.optim.Optimizer], saved: dict, path: Path):
    """Load each part from what `saved`, the content of a run's file, has under its name, and drop it there. Ends the
    program where that does not fit."""
    try:
        for name, part in parts.items():
            part.load_state_dict(saved.pop(name))
    except torch.OutOfMemoryError:  # a RuntimeError, too
        raise
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError):
        sys.exit(f"{Path(sys.argv[0]).name}: {path} was written by another version of this code: check that out, or "
                 "delete the file to begin anew")
