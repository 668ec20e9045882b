"""Each quantizer against its definition, written again in plain loops or fp64, and against vector-quantize-pytorch."""
import ast
import copy
import inspect
import itertools
import math
import pickle
import sys
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import vector_quantize_pytorch as library
from conftest import SEED, refused
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import quantizers
from quantizers import DDCL, EMAVQ, FSQ, QUANTIZERS, InputError, MatchedSimVQ, Quantizer, SimVQ, build_quantizer

DIM = 12
KINDS = {"fsq": {"levels": [8, 6, 5]}, "ddcl": {"delta": 1 / 5}, "simvq": {"codebook_size": 500},
         "simvq, wide": {"code_dim": 40}, "simvq_learned": {"codebook_size": 500, "code_dim": 8},
         "simvq_learned, cosine": {"codebook_size": 500, "code_dim": 8, "cosine": True},
         "ema_vq": {"codebook_size": 64, "code_dim": 6}, "ema_vq, no maps": {"codebook_size": 64, "project": False},
         "residual_vq": {"codebook_size": 16, "code_dim": 6},
         "product_vq": {"codebooks": 3, "codebook_size": 16, "code_dim": 6}}


def build(kind, dim=DIM, **options):
    return build_quantizer(kind.partition(",")[0], dim, **KINDS[kind] | options)


def same_state(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def exact_distances(x, codebook):
    """Distances (N, K) of x (N, D) and codes (K, D), by differences in fp64."""
    return (x.double()[:, None] - codebook.double()).square().sum(2).sqrt()


# Each quantizer is its paper's

def test_fsq_table_by_hand():
    steps = [[2 * i / (n - 1) - 1 for i in range(n)] for n in (8, 6, 5)]  # -1 to 1 in 8, 6 and 5 levels
    table = [(a, b, c) for c, b, a in itertools.product(*reversed(steps))]  # the first number changes fastest
    fsq = FSQ(3, [8, 6, 5])
    assert fsq.codebook_size == 240
    assert torch.allclose(fsq.get_codebook_entry(torch.arange(240)), torch.tensor(table), atol=1e-6)
    assert torch.equal(fsq.codes_to_indices(torch.tensor([table])), torch.arange(240)[None])


def test_fsq_is_the_librarys():
    ours, theirs = FSQ(6), library.FSQ([8, 8, 8, 5, 5, 5], preserve_symmetry=True)
    z = torch.randn(2, 200, 6, requires_grad=True)
    (z_q, _, indices), (expected, expected_indices) = ours(z), theirs(z)
    same = indices == expected_indices  # a number between two levels may be rounded differently
    assert same.float().mean() > 0.99 and torch.allclose(z_q[same], expected[same], atol=1e-6)
    gradients = [torch.autograd.grad(out[same].square().sum(), z)[0] for out in (z_q, expected)]
    assert torch.allclose(*gradients, atol=1e-5)


def test_ddcl_error_is_uniform_and_independent_of_the_input():
    ddcl, z = DDCL(4), 0.5 * torch.randn(1, 20_000, 4)
    x = torch.tanh(z)
    error = (ddcl(z)[0] - x) * 15  # in steps of delta
    assert error.abs().max() < 0.501
    for some in (error, error[x.abs() < 1 / 60], error[x > 0.5]):  # near a level and elsewhere alike
        fractions = torch.histc(some, 10, -0.5, 0.5) / some.numel()
        deviation = (0.1 * 0.9 / some.numel()) ** 0.5  # of a binomial distribution
        assert (fractions - 0.1).abs().max() < 6 * deviation
    correlation = torch.corrcoef(torch.stack([error.flatten(), x.flatten()]))[0, 1]
    assert correlation.abs() < 6 / error.numel() ** 0.5


def test_ddcl_gradient_is_that_of_the_expectation():
    # With e uniform in (-d/2, d/2), the expectation of f(x + e) = (x + e)^3 is x^3 + x d^2 / 4.
    ddcl, z = DDCL(4, delta=1 / 2), torch.full((1, 100_000, 4), 0.3, requires_grad=True)
    ddcl(z)[0].pow(3).sum().backward()
    x = math.tanh(0.3)
    expected = (3 * x**2 + 0.5**2 / 4) * (1 - x**2)
    assert (z.grad.mean() - expected).abs() < 6 * z.grad.std() / z.numel() ** 0.5


def test_ddcl_loss_bounds_the_expected_length_of_the_message():
    ddcl, z = DDCL(4, comm_weight=0.5), torch.randn(1, 9, 4)
    bits = torch.log2(2 * 15 * torch.tanh(z).abs() + 1).sum(-1).mean()
    assert torch.allclose(ddcl(z)[1], 0.5 * bits)
    # |m| is one of the two integers next to |x| / delta, so that its variance is at most 1/4
    message = quantizers.split_indices(ddcl(z.expand(5000, -1, -1))[2], (31,) * 4) - 15
    mean = message.double().mean(0)
    assert torch.allclose(mean, torch.tanh(z[0]).double() * 15, atol=6 * (0.25 / 5000) ** 0.5)
    assert torch.log2(2 * message.abs() + 1).sum(-1).mean() < bits


def check_update(before, after, x):
    """Hold a step with tokens x (N, D) to the formula, code by code. Returns how many codes restart."""
    x, w, size = x.detach().double(), max(9 / (before.steps.item() + 10), 1 - before.decay), before.codebook_size
    mean = (1 - w) * before.mean_count.item() + w * len(x) / size
    nearest, restarts = exact_distances(x, before.codebook).argmin(1), 0
    for i in range(size):
        tokens = x[nearest == i]
        count = (1 - w) * before.token_counts[i].double() + w * len(tokens)
        total = (1 - w) * before.token_counts[i].double() * before.codebook[i].double() + w * tokens.sum(0)
        code = total / count if count > 0 else before.codebook[i].double()
        dead = count < 0.1 * mean
        if abs(count - 0.1 * mean) < 1e-5:  # rounding decides
            dead = after.token_counts[i] > 0.15 * mean
        if dead and restarts < len(x):
            restarts += 1
            code = after.codebook[i].double()
            assert torch.isclose(x, code, rtol=1e-6).all(1).any()
            count = count.new_tensor(0.2 * mean)
        for actual, expected in ((after.token_counts, count), (after.codebook, code)):
            assert torch.allclose(actual[i].double(), expected, rtol=3e-6, atol=1e-5)
    return restarts


@pytest.mark.parametrize("offset", [0, 10_000])
def test_ema_update_follows_the_formula(offset):
    quantizer, restarts = EMAVQ(6, 10, decay=0.6, project=False), []
    quantizer.codebook += offset
    for tokens in (25, 3, 30, 30, 1, 1, 200, 200):
        before = copy.deepcopy(quantizer)
        # tokens lie near codes 0 to 7: the two others are dead at first
        x = quantizer.codebook[torch.arange(tokens) % 8] + 0.01 * torch.randn(tokens, 6)
        quantizer(x[None])
        restarts.append(check_update(before, quantizer, x))
    assert restarts[:2] == [2, 0]
    few, x = EMAVQ(6, 10, project=False), torch.randn(1, 3, 6)
    before = copy.deepcopy(few)
    few(x)
    assert check_update(before, few, x[0]) == 3  # of at least seven dead codes as many as there are tokens


def test_ema_vq_is_the_librarys():
    ours = EMAVQ(6, 10, decay=0.8, project=False)
    theirs = library.VectorQuantize(6, 10, decay=0.8, rotation_trick=False)
    book = theirs._codebook
    ours.codebook.copy_(torch.randn(10, 6))
    ours.token_counts.fill_(30)
    ours.steps.fill_(1000)  # the library's averages have the last weight from the start
    book.embed[0], book.cluster_size[0], book.embed_avg[0] = ours.codebook, ours.token_counts, 30 * ours.codebook
    for _ in range(3):
        z = torch.randn(2, 30, 6, requires_grad=True)
        (z_q, loss, _), (expected, _, their_loss) = ours(z), theirs(z)
        assert torch.allclose(z_q, expected, atol=1e-5)
        gradients = [torch.autograd.grad(x, z)[0] for x in (loss, 0.25 * their_loss.sum())]
        assert torch.allclose(loss, 0.25 * their_loss.sum(), atol=1e-5) and torch.allclose(*gradients, atol=1e-6)
        assert torch.allclose(ours.codebook, theirs.codebook, atol=1e-5)
        assert torch.allclose(ours.token_counts, book.cluster_size[0], atol=1e-5)


@pytest.mark.parametrize("width, rank", [(16, 16), (64, 64), (96, 12)])
def test_matched_codes_are_those_of_a_gaussian_channel_and_stay_alive(width, rank):
    """Tokens are Gaussian and have unequal variances. Eigenvalues and bisection give the definition in fp64."""
    spread = torch.randn(rank, width) * torch.exp(-torch.arange(rank) / 6)[:, None]
    simvq = MatchedSimVQ(width, 1024, project=False)
    for _ in range(15):
        _, _, indices = simvq(3 + torch.randn(1, 8192, rank) @ spread)
    variances, axes = torch.linalg.eigh(simvq.covariance.double())
    low, high = 1e-6, 1e3
    for _ in range(100):
        s = (low * high) ** 0.5
        nats = (1 + variances.clamp(min=0) / s).log().sum() / 2
        low, high = (s, high) if nats > math.log(1024) else (low, s)
    expected = axes * (variances**2 / (variances + s)) @ axes.T
    a = simvq.code_transform.weight.double()
    assert torch.allclose(a @ a.T / width, expected, atol=2e-3 * expected.abs().max().item())
    p = torch.bincount(indices.flatten(), minlength=1024) / indices.numel()
    assert (p > 0).float().mean() > 0.9 and torch.special.entr(p).sum().exp() > 0.7 * 1024


def test_matched_simvq_keeps_the_mean_and_covariance_of_all_tokens():
    """Step k of n weighs decay^(n - k). Tokens far from zero lose no digits."""
    steps = 9.0 + torch.randn(5, 40, 6) * torch.arange(1.0, 6)[:, None, None]
    for offset in (0, 10_000):
        simvq = MatchedSimVQ(6, 50, decay=0.8, project=False)
        tokens = (64 * (offset + steps)).round() / 64  # numbers that fp32 has
        for x in tokens:
            simvq(x[None])
        x, weights = tokens.double().flatten(0, 1), 0.8 ** torch.arange(4.0, -1, -1).double().repeat_interleave(40)
        assert torch.allclose(simvq.mean.double(), (weights @ x) / weights.sum(), rtol=1e-6)
        expected = torch.cov(x.T, correction=0, aweights=weights)
        assert torch.allclose(simvq.covariance.double(), expected, rtol=1e-3, atol=1e-3)


def test_the_loss_of_matched_codes_is_relative_to_the_tokens_variance():
    simvq, z = MatchedSimVQ(6, 50, project=False), torch.randn(1, 40, 6, requires_grad=True)
    z_q, loss, _ = simvq(z)
    error = (z - z_q.detach()).square().mean() / torch.cov(z[0].T, correction=0).trace() * 6
    assert torch.allclose(loss, 1.25 * error, rtol=1e-4)  # its first part would move the codes
    gradient, expected = torch.autograd.grad(loss, z)[0], 0.25 * 2 * (z - z_q) / z.numel() / simvq.variance()
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["one", "equal", "rank 1"])
def test_matched_codes_of_few_directions_stay_finite(kind):
    tokens = {"one": torch.randn(1, 1, 16), "equal": 9 + torch.randn(1, 1, 16).expand(4, 9, 16),
              "rank 1": 5 + torch.randn(1, 99, 1) * torch.randn(16)}[kind]
    for codes in (1, 64):
        simvq = MatchedSimVQ(16, codes, project=False)
        for _ in range(50):
            z_q, loss, _ = simvq(tokens)
            assert loss.isfinite() and all(w.isfinite().all() for w in simvq.state_dict().values())
    spread = (tokens - tokens.mean((0, 1))).square().mean()
    assert (z_q - tokens).square().mean() < 0.1 * spread + 1e-6


@pytest.mark.parametrize("cosine", [False, True])
def test_simvq_is_the_librarys(cosine):
    ours, z = SimVQ(8, 300, cosine=cosine, project=False), torch.randn(2, 100, 8)
    theirs = library.SimVQ(8, 300, codebook_transform=ours.transform, rotation_trick=False)
    theirs.frozen_codebook.copy_(ours.frozen_codebook)
    expected, _, loss = theirs(F.normalize(z, dim=-1) if cosine else z)
    z_q, our_loss, _ = ours(z)
    same = (z_q - expected).abs().amax(2) < 1e-5  # two codes may be equally near
    assert same.float().mean() > 0.99
    if same.all():
        assert torch.allclose(our_loss, 8 * loss, atol=1e-5)  # squared distances instead of means over 8 numbers
        gradients = [torch.autograd.grad(out, ours.code_transform.weight)[0] for out in (our_loss, 8 * loss)]
        assert torch.allclose(*gradients, atol=1e-5)


@pytest.mark.parametrize("name", ["residual_vq", "product_vq"])
def test_each_of_several_codebooks_is_an_ema_codebook(name):
    """A residual codebook sees what those before it leave, a product's its own share of the channels."""
    quantizer = build_quantizer(name, 6, codebooks=3, codebook_size=8, project=False, decay=0.93)
    for _ in range(5):
        before, z = copy.deepcopy(quantizer), torch.randn(1, 40, 6)
        z_q, loss, indices = quantizer(z)
        codes, digits, losses = torch.zeros_like(z[0]), [], 0
        for i, (old, new) in enumerate(zip(before.stages, quantizer.stages)):
            channels = slice(None) if name == "residual_vq" else slice(2 * i, 2 * i + 2)
            x = (z[0] - codes)[:, channels]
            check_update(old, new, x)
            digits.append(exact_distances(x, old.codebook).argmin(1))
            codes[:, channels] += old.codebook[digits[-1]]
            losses += 0.25 * (x - old.codebook[digits[-1]]).square().mean()
        assert torch.equal(indices[0], digits[0] + 8 * digits[1] + 64 * digits[2])
        assert torch.allclose(z_q[0], codes, atol=1e-6) and torch.allclose(loss, losses, atol=1e-6)
    assert quantizer.codebook_sizes == (8, 8, 8) and quantizer.codebook_size == 512


def test_the_first_residual_codebooks_decode_alone():
    quantizer, indices = build("residual_vq", codebooks=3), torch.randint(16**3, (2, 3, 4))
    codes = torch.zeros(2, 3, 4, 6)
    for k, stage in enumerate(quantizer.stages):
        codes = codes + stage.codebook[indices // 16**k % 16]
        expected = quantizer.project_out(codes).permute(0, 3, 1, 2)
        assert torch.allclose(quantizer.indices_to_codes(indices, depth=k + 1), expected, atol=1e-6)
    assert torch.equal(quantizer.indices_to_codes(indices, depth=3), quantizer.indices_to_codes(indices))
    for kind, wrong in (("residual_vq", 0), ("residual_vq", 3), ("product_vq", 1), ("fsq", 1)):
        with refused("^depth = "):
            build(kind).indices_to_codes(indices % 240, depth=wrong)


# What all have in common

@pytest.mark.parametrize("shape", [(3, DIM, 4, 5), (3, 7, DIM)], ids=["image", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_indices_give_z_q_again_bit_for_bit_and_z_q_its_indices(kind, shape):
    quantizer = build(kind).eval()
    z_q, loss, indices = quantizer(torch.randn(shape))
    assert z_q.shape == shape and z_q.dtype == torch.float32 and loss.shape == () and loss >= 0
    assert indices.shape == ((3, 4, 5) if len(shape) == 4 else (3, 7)) and indices.dtype == torch.int64
    assert 0 <= indices.min() and indices.max() < quantizer.codebook_size
    assert torch.equal(quantizer.indices_to_codes(indices), z_q)
    for stored in (indices.to(torch.int16), indices.numpy().astype(np.uint16), indices.tolist()):
        assert torch.equal(quantizer.indices_to_codes(stored), z_q)
    assert torch.equal(quantizer.codes_to_indices(z_q), indices)
    tokens = z_q.permute(0, 2, 3, 1) if len(shape) == 4 else z_q
    assert torch.allclose(quantizer.get_codebook_entry(indices.flatten()), tokens.reshape(-1, DIM), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_the_sequence_of_its_pixels_row_by_row(kind):
    quantizer, z = build(kind).eval(), torch.randn(2, DIM, 3, 5)
    z_q, loss, indices = quantizer(z)
    for actual, expected in zip(quantizer(z.flatten(2).mT), (z_q.flatten(2).mT, loss, indices.flatten(1))):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_only_moving_averages_move_and_only_in_train_mode(kind):
    quantizer, z = build(kind), torch.randn(2, 9, DIM)
    before = copy.deepcopy(quantizer)
    quantizer.eval()(z)
    assert same_state(quantizer, before) and torch.equal(quantizer(z)[0], quantizer(z)[0])
    quantizer.train()(z)
    assert same_state(quantizer, before) == (kind.partition(",")[0] in ("fsq", "ddcl", "simvq_learned"))


@pytest.mark.parametrize("kind", KINDS)
def test_in_half_precision_it_computes_in_fp32(kind):
    quantizer, z = build(kind).eval(), torch.randn(2, 9, DIM).bfloat16()
    expected, codes = quantizer(z.float()), quantizer.indices_to_codes(torch.arange(16).view(2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(quantizer(z), expected))
        assert torch.equal(quantizer.indices_to_codes(torch.arange(16).view(2, 8)), codes)
        assert torch.equal(quantizer.codes_to_indices(expected[0]), expected[2])
    for converted in (copy.deepcopy(quantizer).bfloat16(), copy.deepcopy(quantizer).half()):
        assert same_state(converted, quantizer)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_z_q_passes_as_if_nothing_were_quantized(kind, mode):
    quantizer, z, weight = build(kind), torch.randn(2, 9, DIM, requires_grad=True), torch.randn(2, 9, DIM)
    z_q, _, _ = quantizer.train(mode == "train")(z)
    x = quantizer.project_in(z)
    if kind in ("fsq", "ddcl"):
        x = torch.tanh(x)
    elif "cosine" in kind:
        x = F.normalize(x, dim=-1)
    gradients = [torch.autograd.grad((out * weight).sum(), z)[0] for out in (z_q, quantizer.project_out(x))]
    assert gradients[0].abs().sum() > 0 and torch.allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_straight_through_does_not_round():
    x, codes = torch.randn(1000, requires_grad=True), 1e-3 * torch.randn(1000, requires_grad=True)
    out = quantizers.straight_through(x, codes)
    assert torch.equal(out, codes) and not torch.equal(x + (codes - x).detach(), codes)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.ones(1000))


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_finite_up_to_the_largest_input_and_a_nan_stays_one(kind):
    quantizer = build(kind)
    for mode in (True, False):
        z_q, loss, _ = quantizer.train(mode)(torch.randn(8, 64, DIM).sign() * 1e12)
        assert loss.isfinite() and z_q.isfinite().all()
    assert quantizer.train()(torch.full((2, 9, DIM), math.nan))[0].isnan().all()  # train mode does not look at values


@pytest.mark.parametrize("kind", ["ddcl", "simvq", "ema_vq", "residual_vq"])
def test_a_training_step_compiles_to_one_graph(kind):
    quantizer, z = build(kind), torch.randn(2, 9, DIM)
    compiled = torch.compile(copy.deepcopy(quantizer), backend="eager", fullgraph=True)
    for _ in range(2):
        results = []
        for step in (quantizer, compiled):
            torch.manual_seed(SEED)
            results.append(step(z))
        (z_q, loss, _), (expected, expected_loss, _) = results
        assert torch.allclose(z_q, expected, atol=1e-5) and torch.allclose(loss, expected_loss, atol=1e-5)


@pytest.mark.parametrize("offset", [0, 10_000])
@pytest.mark.parametrize("tokens, codes", [(600, 4096), (500, 30), (1, 1)])  # the first in blocks of 512 tokens
def test_nearest_code_is_that_of_brute_force_in_fp64(tokens, codes, offset):
    x, codebook = offset + torch.randn(2, tokens // 2 + 1, 5), offset + torch.randn(codes, 5)
    found, distance = quantizers.nearest_code(x, codebook), exact_distances(x.flatten(0, 1), codebook)
    actual = distance.gather(1, found.flatten()[:, None])[:, 0]
    assert found.shape == x.shape[:2] and torch.allclose(actual, distance.amin(1), rtol=1e-3, atol=1e-4)


class LargestTensor(TorchDispatchMode):
    """Keeps the size of the largest tensor that an operation returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **options or {})
        tensors = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numbers = max([self.numbers, *(x.numel() for x in tensors)])
        return result


def test_memory_does_not_grow_with_tokens_times_codes():
    quantizer, z_q = build_quantizer("simvq", 4, codebook_size=5000, code_dim=4).eval(), torch.randn(1, 4, 100, 200)
    with LargestTensor() as largest:
        quantizer.codes_to_indices(z_q)
        quantizer(z_q)
    assert largest.numbers <= 2**21  # all distances would be 10**8 numbers


# Options, and quantizers of one's own

class Sign(Quantizer):
    """Each of `bits` numbers becomes -1 or 1."""

    def __init__(self, dim, bits=6, results=3, labels=()):
        super().__init__(dim, bits, (2**bits,))
        self.results = results

    def lookup(self, indices):
        return (indices[..., None] >> torch.arange(self.code_dim)) % 2 * 2.0 - 1

    def quantize(self, x):
        indices = ((x > 0).long() << torch.arange(self.code_dim)).sum(-1)
        return (quantizers.straight_through(x, self.lookup(indices)), x.new_zeros(()), indices)[: self.results]


def test_a_quantizer_of_ones_own_is_built_by_name_and_keeps_its_options(monkeypatch):
    assert Sign(DIM).config["quantizer"] == "Sign"
    monkeypatch.setitem(QUANTIZERS, "sign", Sign)
    expected = {"quantizer": "sign", "quantizer_options": {"bits": 5, "results": 3, "labels": (1, 2)}}
    sign = Sign(DIM, 5, labels=[1, 2])
    for quantizer in (sign, build_quantizer("sign", DIM, bits=5, labels=[1, 2]), copy.deepcopy(sign),
                      pickle.loads(pickle.dumps(sign))):
        assert quantizer.config == expected
    z_q, _, indices = sign.eval()(torch.randn(2, DIM, 3, 4))
    assert torch.equal(sign.indices_to_codes(indices), z_q) and torch.equal(sign.codes_to_indices(z_q), indices)


def test_a_mistake_in_a_quantizer_of_ones_own_keeps_its_traceback():
    with pytest.raises(ValueError, match="unpack.*expected 3, got 2") as caught:
        Sign(DIM, results=2)(torch.randn(2, 5, DIM))
    assert caught.type is not InputError and caught.traceback[-1].name == "forward"
    with pytest.raises(TypeError) as caught:
        Sign(DIM, results=[])(torch.randn(2, 5, DIM))
    assert str(caught.traceback[-1].path) == __file__


@pytest.mark.parametrize("quantizer", [
    FSQ(DIM, [8, 5]), DDCL(DIM, delta=1 / 4), EMAVQ(DIM, 20), MatchedSimVQ(DIM, 20, 0), SimVQ(DIM, 20, cosine=True),
    quantizers.ResidualVQ(DIM, 3), quantizers.ProductVQ(DIM, project=False), quantizers.NoQuantizer(DIM),
    quantizers.Library(DIM, "LFQ", codebook_size=16)], ids=lambda quantizer: type(quantizer).__name__)
def test_config_rebuilds_a_quantizer_of_each_class(quantizer):
    config = quantizer.config
    other = build_quantizer(config["quantizer"], DIM, **config["quantizer_options"])
    assert type(other) is type(quantizer) and other.config == config
    other.load_state_dict(quantizer.state_dict())
    z = torch.randn(2, 9, DIM)
    assert torch.equal(other.eval()(z)[0], quantizer.eval()(z)[0])
    assert FSQ(DIM, [8, 5]).config == {"quantizer": "fsq", "quantizer_options": {"levels": (8, 5)}}


@pytest.mark.parametrize("name", set(QUANTIZERS) - {"library", "none"})
def test_all_quantizers_have_defaults(name):
    quantizer, z = build_quantizer(name, 256).eval(), torch.randn(1, 2, 256)
    z_q, _, indices = quantizer(z)
    assert torch.allclose(quantizer.indices_to_codes(indices), z_q)


def test_files_of_older_code_load():
    older = EMAVQ(6, 10).state_dict()
    del older["mean_count"], older["steps"]
    quantizer = EMAVQ(6, 10)
    quantizer.load_state_dict(older)
    assert 9 / (quantizer.steps + 10) < 0.01  # it goes on with the last weight, and does not forget its codes


def test_code_dim_0_is_the_tokens_width_and_without_project_there_are_no_maps():
    wide, bare = (build_quantizer("simvq", DIM, codebook_size=10, code_dim=0, project=p) for p in (True, False))
    assert wide.code_dim == bare.code_dim == DIM
    assert isinstance(wide.project_in, nn.Linear) and isinstance(bare.project_in, nn.Identity)
    for quantizer, channels in ((FSQ(levels=[8, 8, 8]), 3), (DDCL(), 4)):  # without dim, as many channels as numbers
        z_q, _, indices = quantizer.eval()(torch.randn(2, channels, 5, 5))
        assert not [*quantizer.parameters()] and torch.equal(quantizer.indices_to_codes(indices), z_q)


def test_without_a_quantizer_tokens_pass():
    quantizer, z = build_quantizer("none", DIM), torch.randn(2, DIM, 3, 4, requires_grad=True)
    z_q, loss, indices = quantizer(z)
    assert torch.equal(z_q, z) and loss == 0 and indices.shape == (2, 3, 4) and quantizer.codebook_size == 0
    assert torch.equal(torch.autograd.grad(z_q.sum(), z)[0], torch.ones_like(z))
    with refused("Without a quantizer"):
        quantizer.indices_to_codes(indices)
    with refused("^codebook_size = 0, allowed"):
        quantizer.codes_to_indices(z)


def test_mixed_radix_and_large_codebooks():
    digits = quantizers.split_indices(torch.tensor([[0, 7, 123]]), (10, 6, 5))
    assert digits.tolist() == [[[0, 0, 0], [7, 0, 0], [3, 0, 2]]]
    for indices, sizes in ((torch.arange(300), (10, 6, 5)), (torch.tensor([2**60 - 1, 2**59 + 3]), (4096,) * 5)):
        assert torch.equal(quantizers.join_indices(quantizers.split_indices(indices, sizes), sizes), indices)
    with refused("codebook_size"):  # too many codes to compare each with a token
        build_quantizer("fsq", DIM, levels=[2] * 25).codes_to_indices(torch.zeros(1, 1, DIM))


@pytest.mark.parametrize("name, options", [
    ("fsp", {}), ("fsq", {"dim": 0}), ("fsq", {"levels": [8, 1]}), ("fsq", {"levels": []}), ("fsq", {"levels": 512}),
    ("fsq", {"levels": [64] * 11}), ("ddcl", {"delta": 0.3}), ("ddcl", {"delta": 0}), ("ddcl", {"delta": 15}),
    ("simvq", {"codebook_size": 0}), ("simvq", {"codebook_size": 64.0}), ("simvq", {"decay": 1}),
    ("simvq_learned", {"code_dim": 1, "cosine": True}), ("ema_vq", {"code_dim": -1}), ("ema_vq", {"decay": 1.0}),
    ("ema_vq", {"decay": 0.0}), ("residual_vq", {"codebooks": 0}), ("residual_vq", {"codebooks": 16}),
    ("product_vq", {"codebooks": 3})])
def test_refused_options(name, options):
    with refused(" = .*, allowed: "):
        build_quantizer(name, **{"dim": DIM} | options)


@pytest.mark.parametrize("method, argument", [
    ("forward", torch.zeros(2, 9, DIM + 1)), ("forward", torch.zeros(2, DIM)), ("forward", torch.zeros(0, 9, DIM)),
    ("forward", torch.zeros(2, 9, DIM, dtype=torch.int64)), ("forward", torch.full((1, 1, DIM), math.nan)),
    ("forward", torch.full((1, 1, DIM), -math.inf)), ("forward", torch.full((1, 1, DIM), 2e12)),
    ("codes_to_indices", torch.zeros(2, DIM)), ("codes_to_indices", torch.full((1, 1, DIM), math.nan)),
    ("indices_to_codes", torch.tensor([[0, 240]])), ("indices_to_codes", torch.tensor([[-1, 0]])),
    ("indices_to_codes", torch.tensor([[0.0]])), ("indices_to_codes", torch.tensor([[True]])),
    ("indices_to_codes", torch.tensor([0])), ("indices_to_codes", [[0.5]]), ("get_codebook_entry", torch.tensor([240])),
    ("get_codebook_entry", [[0]]), ("check_indices", np.array([240])),
])
def test_refused_inputs(method, argument):
    with refused(""):
        getattr(build("fsq").eval(), method)(argument)


def test_the_file_needs_torch_alone():
    tree = ast.parse(inspect.getsource(quantizers))
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"torch"}


# vector-quantize-pytorch behind our interface

LIBRARY = {"VectorQuantize": {"codebook_size": 64}, "SimVQ": {"codebook_size": 64}, "FSQ": {"levels": [8, 5, 5]},
           "LFQ": {"codebook_size": 64}, "ResidualVQ": {"codebook_size": (16, 32), "num_quantizers": 2},
           "ResidualFSQ": {"levels": [8, 5, 5], "num_quantizers": 1},
           "ResidualLFQ": {"codebook_size": 16, "num_quantizers": 2},
           "ResidualSimVQ": {"codebook_size": 16, "num_quantizers": 2},
           "GroupedResidualVQ": {"codebook_size": 8, "num_quantizers": 2, "groups": 2}}
NAMED = {"lfq": {"codebook_size": 64}, "bsq": {"codebook_size": 64}, "residual_fsq": {"levels": [4, 3, 3]},
         "rotation_vq": {"codebook_size": 64, "code_dim": 4}}
OTHERS = [("library", {"kind": kind, **options}) for kind, options in LIBRARY.items()] + [*NAMED.items()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, options", OTHERS, ids=[*LIBRARY, *NAMED])
def test_the_librarys_quantizers_behind_our_interface(name, options):
    quantizer, z = build_quantizer(name, DIM, **options), torch.randn(4, DIM, 5, 6, requires_grad=True)
    for _ in range(3):
        z_q, loss, indices = quantizer(z)
    (z_q.square().sum() + loss).backward()
    assert z.grad.abs().sum() > 0 and loss.shape == () and z_q.shape == z.shape
    quantizer.eval()
    z_q, loss, indices = quantizer(z)
    assert loss.shape == () and indices.shape == (4, 5, 6) and indices.dtype == torch.int64
    assert 0 <= indices.min() <= indices.max() < quantizer.codebook_size and len(indices.unique()) > 5
    tokens = quantizer.project_in(z.flatten(2).mT)
    theirs = quantizer.project_out(quantizer.module(tokens, **quantizer.arguments)[0])
    assert torch.allclose(z_q.flatten(2).mT, theirs, atol=1e-5)  # z_q is the class's own output
    assert torch.equal(quantizer.indices_to_codes(indices), z_q)
    assert torch.autograd.grad(z_q.sum(), z)[0].abs().sum() > 0
    again = quantizer.indices_to_codes(quantizer.codes_to_indices(z_q))
    assert torch.allclose(again, z_q, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(z)[0], z_q)
    assert torch.equal(copy.deepcopy(quantizer).half()(z)[0], z_q)
    other = build_quantizer(quantizer.config["quantizer"], DIM, **quantizer.config["quantizer_options"])
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.eval()(z)[2], indices)
    for wrong in (torch.full((1, 1), quantizer.codebook_size), torch.full((1, 1), -1)):
        with refused("indices range from"):
            quantizer.indices_to_codes(wrong)


@pytest.mark.parametrize("options, message", [
    ({"kind": "PQ"}, "kind = 'PQ', allowed: .*ResidualVQ"), ({"kind": "LFQ", "levels": 8}, "LFQ.*levels"),
    ({"kind": "LFQ", "codebook_size": 60}, "LFQ.*power of 2"),
    ({"kind": "LatentQuantize", "levels": [5, 5]}, "LatentQuantize.*dimension"),
    ({"kind": "FSQ", "levels": [8], "arguments": {"inv_temperature": 1.0}}, "FSQ.*inv_temperature"),
    ({"kind": "ResidualLFQ", "codebook_size": 4, "num_quantizers": 2, "spherical": True}, "not its output"),
    ({"kind": "VectorQuantize", "codebook_size": 8, "accept_image_fmap": True}, "VectorQuantize")])
def test_what_the_library_does_not_take_is_refused(options, message):
    with refused(message) as caught:
        build_quantizer("library", DIM, **options)
    assert options["kind"] == "PQ" or caught.value.__cause__ is not None  # whose traceback tells where


def test_arguments_of_the_librarys_forward():
    z, losses = torch.randn(2, 50, DIM), []
    for temperature in (100.0, 1.0):
        torch.manual_seed(SEED)
        losses.append(build_quantizer("bsq", DIM, codebook_size=64, arguments={"inv_temperature": temperature})(z)[1])
    assert losses[1] > losses[0]  # a softer choice between codes is less certain


def test_of_the_library_lfq_is_exported_and_others_say_that_they_are_not():
    z, axes = torch.randn(2, 7, DIM), ({0: torch.export.Dim.DYNAMIC},)
    lfq = build_quantizer("lfq", DIM, codebook_size=64).eval()
    exported = torch.export.export(lfq, (z,), dynamic_shapes=axes).module()
    assert torch.allclose(exported(z.repeat(3, 1, 1))[0], lfq(z.repeat(3, 1, 1))[0], atol=1e-5)
    with pytest.raises(InputError, match="LFQ in an export"):
        torch.export.export(build_quantizer("rotation_vq", DIM, codebook_size=8).eval(), (z,), dynamic_shapes=axes)


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with refused("pip install vector-quantize-pytorch"):
        build_quantizer("lfq", DIM)


# Two processes against one

SHARED = {"ema": ("ema_vq", {"codebook_size": 100, "project": False}),
          "matched": ("simvq", {"codebook_size": 50, "project": False}),
          "residual": ("residual_vq", {"codebook_size": 16, "project": False}),
          "two means": ("library", {"kind": "VectorQuantize", "codebook_size": 2, "kmeans_init": True,
                                    "threshold_ema_dead_code": 0}),
          "dead codes": ("library", {"kind": "VectorQuantize", "codebook_size": 32, "kmeans_init": True,
                                     "threshold_ema_dead_code": 2})}


def shared_tokens(rank):
    """Tokens (3 steps, 1, 40, 6) of a process, around two points."""
    torch.manual_seed(1000 * SEED + rank)
    return torch.randn(3, 1, 40, 6) + 20 * torch.arange(2).repeat(20)[:, None]


def learn(name, options, tokens):
    """The state of a quantizer after each step. All processes start with the same weights."""
    torch.manual_seed(SEED)
    quantizer = build_quantizer(name, 6, **options)
    return [copy.deepcopy(quantizer.state_dict()) for x in tokens if quantizer(x)]


def learn_in_a_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    if rank == 0:  # a constructor does not wait for other processes
        build_quantizer("library", 6, **SHARED["two means"][1])
    torch.save({kind: learn(*SHARED[kind], shared_tokens(rank)) for kind in SHARED}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """For both processes, the states of the quantizers SHARED after each step."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(learn_in_a_process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("kind", SHARED)
def test_two_processes_keep_the_same_codebook(kind, two_processes):
    for step, other in zip(two_processes[0][kind], two_processes[1][kind]):
        assert all(torch.equal(step[name], other[name]) for name in step)


def test_matched_codes_of_two_processes_learn_from_all_their_tokens(two_processes):
    alone = learn(*SHARED["matched"], torch.cat([shared_tokens(0), shared_tokens(1)], 2))
    for step, expected in zip(two_processes[0]["matched"], alone):
        assert all(torch.allclose(step[name], expected[name], rtol=1e-3, atol=1e-3) for name in step)


def test_ema_codes_of_two_processes_learn_from_all_their_tokens(two_processes):
    """80 tokens leave at least 20 of 100 codes without any. They restart at tokens of process 0."""
    step = two_processes[0]["ema"][0]
    expected = learn(*SHARED["ema"], torch.cat([shared_tokens(0), shared_tokens(1)], 2))[0]
    restarted = torch.isclose(step["token_counts"], 0.2 * step["mean_count"])
    assert restarted.sum() >= 20
    assert exact_distances(step["codebook"][restarted], shared_tokens(0)[0, 0]).amin(1).max() < 1e-4
    others = step["token_counts"] > 0.3 * step["mean_count"]
    for name in ("codebook", "token_counts"):
        assert torch.allclose(step[name][others], expected[name][others], rtol=1e-4, atol=1e-4)


def test_k_means_of_two_processes_finds_the_means_of_all_their_tokens(two_processes):
    tokens = torch.cat([shared_tokens(0), shared_tokens(1)], 2)[0, 0]
    expected = torch.stack([tokens[tokens[:, 0] < 10].mean(0), tokens[tokens[:, 0] > 10].mean(0)])
    found = two_processes[0]["two means"][0]["module._codebook.embed"][0]
    assert torch.allclose(found[found[:, 0].argsort()], expected, atol=1e-3)
