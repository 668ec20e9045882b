"""Muon beside AdamW, and their learning rate."""
import math

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from utils import fast_bf16


def adamw_and_muon(model: nn.Module, blocks: tuple[str, ...], learning_rate: float) -> dict[str, Optimizer]:
    """{"adamw": ..., "muon": ...} for a model's parameters that learn; without "muon" if `blocks` has no matrix.

    Muon takes matrices and kernels whose names begin with one of `blocks`, at twice the learning rate, AdamW the rest.
    """
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (matrices if p.ndim in (2, 4) and name.startswith(blocks) else others).append(p)
    optimizers = {"adamw": AdamW(others, learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)}
    if matrices:
        optimizers["muon"] = Muon(matrices, 2 * learning_rate, weight_decay=0.01)
    return optimizers


def take_step(optimizers: dict[str, Optimizer], step: int, steps: int):
    """Take step 0 to `steps` - 1. The learning rate rises for a twentieth of all steps, then falls as a cosine."""
    scale = min((step + 1) / max(1, steps // 20), 0.5 + 0.5 * math.cos(math.pi * step / steps))
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = scale * optimizer.defaults["lr"]
        optimizer.step()


class Muon(Optimizer):
    """Muon (Jordan et al., 2024): a matrix's update is its momentum with all singular values set to about 1.

    Rare directions then move as much as common ones. Updates are as large as AdamW's (2502.16982), as in
    torch.optim.Muon with "match_rms_adamw". A convolution's kernel (out, in, h, w) is a matrix (out, h * w * in).
    """

    def __init__(self, matrices: list, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            for p in matrices:
                self.state[p] = self.state[p] or {"momentum": torch.zeros_like(p)}
            gradients, momenta = [p.grad for p in matrices], [self.state[p]["momentum"] for p in matrices]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's momentum
            # in this order of columns the matrix of a channels_last kernel is a view, not a copy
            updates = orthogonalize([x.movedim(1, -1).flatten(1) for x in updates])
            # with singular values of 1, m x n numbers have a root mean square of max(m, n)**-0.5; AdamW's is about 0.2
            torch._foreach_mul_(updates, [-0.2 * group["lr"] * max(x.shape) ** 0.5 for x in updates])
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            updates = [x.view_as(p.movedim(1, -1)).movedim(-1, 1) for x, p in zip(updates, matrices)]
            torch._foreach_add_(matrices, updates)


def orthogonalize(matrices: list[Tensor]) -> list[Tensor]:
    """Take all singular values of each matrix towards 1, in place.

    Each of five Newton-Schulz steps takes y to a y + b (y y') y + c (y y')^2 y with Muon's a, b and c. Singular vectors
    stay, and a singular value s becomes a s + b s^3 + c s^5. Matrices of one shape are stacked, for speed.
    """
    stacks = {}
    for x in matrices:
        wide = x if len(x) <= x.shape[1] else x.mT
        stacks.setdefault(wide.shape, []).append(wide)
    dtype = torch.bfloat16 if fast_bf16(matrices[0].device.type) else torch.float32
    for stack in stacks.values():
        y = torch.stack(stack).to(dtype)
        y /= y.norm(dim=(1, 2), keepdim=True) + 1e-7  # now no singular value is above 1
        for _ in range(5):
            gram = y @ y.mT
            y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), y, beta=3.4445)
        torch._foreach_copy_(stack, list(y))
    return matrices
