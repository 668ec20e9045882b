"""A training step, as a GPU would meet it: what it launches and waits for, counted on a CPU."""
import collections
import copy
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import optimization
import pretrain
import train
from models import VQRAE, PatchDiscriminator
from optimization import BF16Weights, Muon, autocast_layers

# operations that launch no kernel: another view of the same memory, or new memory
NO_KERNEL = set("""view _unsafe_view t transpose permute expand slice select unsqueeze squeeze detach alias as_strided
split split_with_sizes unbind unfold lift_fresh _reshape_alias empty empty_like empty_strided new_empty
new_empty_strided narrow chunk""".split())


class CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    def launches(self):
        return sum(count for name, count in self.counts.items() if name not in NO_KERNEL)


@pytest.mark.parametrize("quantizer, limit", [("fsq", 475), ("ema_vq", 510)])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_launches_few_kernels(stage, quantizer, limit, monkeypatch):
    """The default model, in stage 1 with the GAN. A GPU casts 34 activations more, around LayerNorm."""
    monkeypatch.setattr(train, "QUANTIZER", quantizer)
    monkeypatch.setattr(train, "EMA_CODEBOOK_SIZE", 8192)  # searched at once, as a GPU does the default's 65,536
    monkeypatch.setattr(train, "PRECISION", "bf16")
    monkeypatch.setattr(train, "GAN_WEIGHT", 0.5)
    orthogonalize = optimization.orthogonalize
    monkeypatch.setattr(optimization, "orthogonalize", lambda matrices, **_: orthogonalize(matrices, few_launches=True))
    model = train.build_model()
    teacher = train.build_teacher(model)
    objective = BF16Weights(train.Objective(stage, model.set_stage(stage).train(), teacher, None))
    discriminator = BF16Weights(PatchDiscriminator(32)) if stage == 1 else None
    optimizers = train.build_optimizers(model, 1e-3)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        z = model.encoder(images)

    def step():
        losses, output = objective(images, z, discriminator)
        losses["loss"].backward()
        if discriminator is not None:
            with torch.autocast("cpu", torch.bfloat16):
                real, fake = discriminator(torch.cat([images, output.detach()])).float().chunk(2)
            ((1 - real).relu().mean() + (1 + fake).relu().mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        objective.zero_grad(set_to_none=True)
        if discriminator is not None:
            discriminator.zero_grad(set_to_none=True)

    step()
    with CountOperations() as counter:
        step()
    assert counter.launches() <= limit, counter.counts


def test_gradients_on_a_cpu_have_no_denormal_numbers():
    """They would make each convolution that they go through several times as slow; GELU's become such near -12."""
    x = torch.linspace(-14, -10, 1000).view(1, 10, 10, 10).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()

    def count_denormals():
        gradient, = torch.autograd.grad((F.gelu(x) * 1e-6).sum(), x)
        bits = gradient.view(torch.int32) & 0x7FFFFFFF  # as integers: comparisons would flush them, too
        return ((bits > 0) & (bits < 0x00800000)).sum()

    assert count_denormals() > 50
    optimization.prepare_cpu()
    assert count_denormals() == 0


def test_the_perceptual_loss_is_of_every_other_image():
    torch.manual_seed(0)
    model = VQRAE("cifar", "fsq", decoder_width=64, decoder_depth=1).train()
    teacher, images = copy.deepcopy(model.encoder), torch.rand(3, 3, 32, 32)
    images[1] = 0
    losses, output = train.Objective(1, model, teacher, None)(images, teacher(images), None)
    with torch.autocast("cpu", torch.bfloat16, enabled=train.PRECISION == "bf16"):
        expected = (teacher(output) - teacher(images)).square()[[0, 2]].mean()
    assert torch.allclose(losses["perceptual_loss"], expected, rtol=0.02)
    assert not torch.allclose(losses["perceptual_loss"], (teacher(output) - teacher(images)).square().mean(), rtol=0.02)


@pytest.mark.parametrize("quantizer, waits", [("fsq", 0), ("simvq", 0), ("ddcl", 0), ("ema_vq", 1)])
def test_a_step_hardly_waits(quantizer, waits, folder, monkeypatch):
    """From step to step nothing is looked at but the quantizer's check of its input (which dispatches nothing on a CPU)
    and EMA-VQ's number of dead codes."""
    operations = [name for name in ("_local_scalar_dense", "nonzero", "bincount", "masked_select")]
    between, counter, clip = [], CountOperations(), nn.utils.clip_grad_norm_

    def count_and_clip(*args):
        between.append(sum(counter.counts[name] for name in operations))
        counter.counts.clear()
        return clip(*args)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", count_and_clip)
    for name, value in {
            "DATASET": str(folder), "QUANTIZER": quantizer, "EPOCHS": (1, 1), "EPOCH_IMAGES": None, "BATCH_SIZE": 16,
            "EVAL_IMAGES": 16, "EMA_CODEBOOK_SIZE": 64, "SIMVQ_CODEBOOK_SIZE": 256, "DECODER_WIDTH": 64,
            "DECODER_DEPTH": 1, "FLIP": True, "GAN_WEIGHT": 0.5, "GAN_START": 0.1}.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with counter:
        train.main()
    assert len(between) == 10 and between[1:5] + between[6:] == [waits] * 8  # after the first step of each stage


def test_weights_cast_at_once_are_those_of_autocast():
    model = VQRAE("cifar", "fsq", decoder_width=64, decoder_depth=1).set_stage(2).train()
    images = torch.rand(4, 3, 32, 32)
    outcomes = []
    for module in (model, BF16Weights(model)):
        with torch.autocast("cpu", torch.bfloat16):
            output, loss, _ = module(images)
        (output.square().mean() + loss).backward()
        outcomes.append([output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    assert len(outcomes[0]) == len(outcomes[1]) > 40
    assert all(torch.equal(a, b) for a, b in zip(*outcomes))
    assert not any(name.startswith("quantizer") for name in autocast_layers(model))


def test_pretrains_muon_is_the_librarys_by_default(monkeypatch):
    monkeypatch.setattr(optimization, "fast_bf16", lambda device: True)
    monkeypatch.setattr(optimization, "newton_schulz_of_wide", optimization.newton_schulz)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((64, 27), (16, 144), (20, 20))]
    librarys = copy.deepcopy(ours)
    for optimizer, matrices in ((pretrain.build_muon(ours, 0.24), ours),
                                (torch.optim.Muon(librarys, lr=0.24, momentum=0.8, weight_decay=0), librarys)):
        for step in range(3):
            for i, matrix in enumerate(matrices):
                matrix.grad = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(10 * step + i))
            optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, librarys))


@pytest.mark.parametrize("m, n", [(16, 144), (64, 128), (48, 1728)])
@pytest.mark.parametrize("smallest", [0.5, 1e-4])
def test_steps_from_small_matrices_are_newton_schulz_steps(m, n, smallest):
    """In fp32 to rounding, in bf16 to a few per cent more than the ordinary steps in bf16; and both do something:
    singular values between 1 and `smallest` of the largest come to about 1, but the smallest."""
    (u, _), (v, _) = torch.linalg.qr(torch.randn(3, m, m).double()), torch.linalg.qr(torch.randn(3, n, m).double())
    x = u * torch.logspace(0, math.log10(smallest), m, dtype=torch.float64) @ v.mT
    x = x / x.norm(dim=(1, 2), keepdim=True)

    def error(steps, dtype):
        return ((steps(x.to(dtype)).double() - exact).norm() / exact.norm()).item()

    exact = optimization.newton_schulz(x)
    assert exact.shape == x.shape and 0.6 < torch.linalg.svdvals(exact)[:, : m // 3].min() < 1.3
    assert error(optimization.newton_schulz_of_wide, torch.float32) < 1e-3
    plain = error(optimization.newton_schulz, torch.bfloat16)
    assert 0.005 < plain < 0.2 and error(optimization.newton_schulz_of_wide, torch.bfloat16) < 2 * plain + 0.05


def test_muon_takes_wide_matrices_the_fast_way_on_a_cpu_alone(monkeypatch):
    shapes = []
    monkeypatch.setattr(optimization, "newton_schulz_of_wide", lambda x: shapes.append(tuple(x.shape)) or x)
    for few_launches in (False, True):
        optimization.orthogonalize([torch.randn(6, 54), torch.randn(54, 6), torch.randn(6, 6)], few_launches)
        assert shapes == [(2, 6, 54)]


@pytest.mark.parametrize("few_launches, bf16", [(False, True), (True, True), (False, False), (True, False)])
def test_muon_is_the_librarys(few_launches, bf16, monkeypatch):
    monkeypatch.setattr(optimization, "fast_bf16", lambda device: bf16)
    monkeypatch.setattr(optimization, "newton_schulz_of_wide", optimization.newton_schulz)
    orthogonalize = optimization.orthogonalize
    monkeypatch.setattr(optimization, "orthogonalize", lambda matrices, **_: orthogonalize(matrices, few_launches))
    shapes = [(8, 72), (8, 72), (72, 8), (10, 30), (30, 10), (16, 16), (5, 5), (3, 40)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    librarys = copy.deepcopy(ours)
    optimizers = [Muon(ours, 1e-2, weight_decay=0.1),
                  torch.optim.Muon(librarys, 1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
    for step in range(6):
        if step == 3:  # as in a run that is resumed
            state = optimizers[0].state_dict()
            optimizers[0] = Muon(ours, 1e-2, weight_decay=0.1)
            optimizers[0].load_state_dict(state)
        for a, b in zip(ours, librarys):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    # the library's is in bf16. In fp32, or padded, where sums are added up in another order, numbers are rounded to
    # others: 1 % of the updates
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(ours, librarys))
    if not (bf16 and few_launches):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, librarys)) == bf16
