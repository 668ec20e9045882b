"""Each quantizer against its definition, written again in plain loops or fp64, and against vector-quantize-pytorch."""
import ast
import copy
import inspect
import itertools
import math
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import vector_quantize_pytorch as library
from torch import nn

import quantizers
from quantizers import DDCL, EMAVQ, FSQ, SimVQ, build_quantizer, join_indices, split_indices

DIM = 12
EMA = {"name": "ema_vq", "codebook_size": 16, "code_dim": 6}
KINDS = {"fsq": {"name": "fsq", "levels": [8, 6, 5]}, "ddcl": {"name": "ddcl", "delta": 1 / 5},  # 11**4 codes
         "simvq": {"name": "simvq", "codebook_size": 500}, "simvq wide": {"name": "simvq", "code_dim": 40},
         "learned": {"name": "simvq", "codebook_size": 500, "code_dim": 8, "transform": "learned"},
         "cosine": {"name": "simvq", "codebook_size": 500, "code_dim": 8, "transform": "cosine"},
         "ema_vq": EMA | {"codebook_size": 64},
         "ema_vq of all channels": EMA | {"code_dim": None}, "residual": EMA | {"codebooks": 2},
         "product": EMA | {"codebooks": 3, "combine": "product"}}


def build(kind, dim=DIM, **options):
    return build_quantizer(dim=dim, **KINDS[kind] | options)


def same_state(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("shape", [(3, DIM, 4, 5), (3, 7, DIM)], ids=["image", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_indices_give_z_q_again_bit_for_bit_and_z_q_its_indices(kind, shape):
    quantizer = build(kind).eval()
    z_q, loss, indices = quantizer(torch.randn(shape))
    assert z_q.shape == shape and z_q.dtype == torch.float32 and loss.shape == () and loss >= 0
    assert indices.shape == ((3, 4, 5) if len(shape) == 4 else (3, 7)) and indices.dtype == torch.int64
    assert 0 <= indices.min() and indices.max() < quantizer.codebook_size and len(indices.unique()) > 5
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
    assert same_state(quantizer, before) == (kind in ("fsq", "ddcl", "learned", "cosine"))


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_it_computes_in_fp32(kind):
    quantizer, z = build(kind).eval(), torch.randn(2, 9, DIM).bfloat16()
    expected, codes = quantizer(z.float()), quantizer.indices_to_codes(torch.arange(16).view(2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(quantizer(z), expected))
        assert torch.equal(quantizer.indices_to_codes(torch.arange(16).view(2, 8)), codes)
        assert torch.equal(quantizer.codes_to_indices(expected[0]), expected[2])
    assert all(torch.equal(a, b) for a, b in zip(copy.deepcopy(quantizer).bfloat16()(z), quantizer(z)))


def loss_by_hand(kind, quantizer, x, codes, indices):
    """The loss of x (B, N, code_dim) at these codes, as the papers write it."""
    if KINDS[kind]["name"] == "simvq":
        scale = 1 / quantizer.variance if quantizer.transform == "matched" else quantizer.code_dim
        return scale * ((codes - x.detach()).square() + 0.25 * (x - codes.detach()).square()).mean()
    if kind == "ddcl":
        return 1e-3 * torch.log2(2 * x.abs() * 5 + 1).sum(-1).mean()
    if kind == "residual":  # a commitment loss of each codebook, in what the ones before it left over
        codes = torch.stack([quantizer.lookup(indices, codebooks=k) for k in (1, 2)])
    losses = {"fsq": 0, "residual": 2, "product": 3}.get(kind, 1)
    return losses * 0.25 * (x - codes).square().mean()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_an_explicit_graph(kind, mode):
    quantizer, z, weight = build(kind), torch.randn(2, 9, DIM, requires_grad=True), torch.randn(2, 9, DIM)
    before = copy.deepcopy(quantizer)  # a training step quantizes with EMA-VQ's codes before their update
    z_q, loss, indices = quantizer.train(mode == "train")(z)
    learned = [name for name, p in quantizer.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad((z_q * weight).sum() + loss, [z, *map(quantizer.get_parameter, learned)])
    if kind.startswith("simvq"):  # and with matched codes after theirs
        before = copy.deepcopy(quantizer)

    x = before.project_in(z)
    x = torch.tanh(x) if kind in ("fsq", "ddcl") else F.normalize(x, dim=-1) if kind == "cosine" else x
    codes = before.lookup(indices)
    if kind == "ddcl" and mode == "train":  # codes with their dither, which the output shows
        inverse = torch.linalg.pinv(before.project_out.weight)
        codes = (z_q - before.project_out.bias) @ inverse.T
    expected_loss = loss_by_hand(kind, before, x, codes, indices)
    expected = before.project_out(x + (codes - x).detach())
    assert torch.allclose(z_q, expected, atol=1e-5) and torch.allclose(loss, expected_loss, atol=1e-6)
    total = (expected * weight).sum() + expected_loss
    for gradient, known in zip(gradients, torch.autograd.grad(total, [z, *map(before.get_parameter, learned)])):
        assert known.abs().sum() > 0 and torch.allclose(gradient, known, rtol=1e-4, atol=1e-5)


def test_straight_through_does_not_round():
    x, codes = torch.randn(1000, requires_grad=True), 1e-3 * torch.randn(1000, requires_grad=True)
    out = quantizers.straight_through(x, codes)
    assert torch.equal(out, codes) and not torch.equal(x + (codes - x).detach(), codes)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.ones(1000))


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_finite_up_to_the_largest_input(kind):
    quantizer = build(kind)
    for mode in (True, False):
        z_q, loss, _ = quantizer.train(mode)(torch.randn(8, 64, DIM).sign() * 1e12)
        assert loss.isfinite() and z_q.isfinite().all()


@pytest.mark.parametrize("x, codes", [(2500, 1000), (3000, 30), (1, 1)])  # the first in chunks of 1048 tokens
def test_nearest_code_is_that_of_brute_force_in_fp64(x, codes):
    x, codebook = torch.randn(2, x, 5), torch.randn(codes, 5) * (0.5 + torch.rand(codes, 1))
    found = quantizers.nearest_code(x, codebook)
    distance = torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert found.shape == x.shape[:2] and (found == distance.argmin(2)).float().mean() > 0.999
    assert (distance.gather(2, found[..., None])[..., 0] - distance.amin(2)).max() < 1e-5


@pytest.mark.parametrize("offset", [0, 100, 1000, 10_000])
def test_vectors_far_from_zero_find_their_codes(offset):
    for dim, codes in ((16, 4096), (256, 1024)):
        x, codebook = (offset + torch.randn(n, dim) for n in (500, codes))
        distance = torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
        found = distance.gather(1, quantizers.nearest_code(x, codebook)[:, None])[:, 0]
        assert (found / distance.amin(1)).max() < 1.0001
    for name in ("simvq", "ema_vq"):
        errors = []
        for center in (0, offset):
            torch.manual_seed(0)
            quantizer = build_quantizer(name, 16, codebook_size=256, code_dim=None)
            for _ in range(60):
                z_q = quantizer(z := center + torch.randn(1, 1024, 16))[0]
            errors.append((z_q - z).square().mean().item())
        assert errors[1] == pytest.approx(errors[0], rel=0.01 if offset <= 1000 else 0.05)


def test_codes_restart_by_the_average_of_steps_of_several_sizes():
    """A code that restarts in a step of few tokens outlives the next of many."""
    quantizer, restarts = EMAVQ(6, 512, None), []
    for step in range(60):
        before = quantizer.codebook.clone()
        quantizer(torch.randn(1, (128, 4096)[step % 2], 6))
        restarts.append(((quantizer.token_counts - 0.2 * quantizer.mean_count).abs() < 1e-6).sum().item())
        assert (quantizer.codebook != before).any()
    assert quantizer.mean_count == pytest.approx(4096 / 2 / 512, rel=0.6) and sum(restarts[-10:]) < 60
    older = quantizer.state_dict()
    del older["mean_count"]
    quantizer.load_state_dict(older)
    assert quantizer.mean_count == 0


LIBRARY = {"VectorQuantize": {"codebook_size": 64}, "SimVQ": {"codebook_size": 64}, "FSQ": {"levels": [8, 5, 5]},
           "LFQ": {"codebook_size": 64}, "ResidualVQ": {"codebook_size": (16, 32), "num_quantizers": 2},
           "ResidualFSQ": {"levels": [8, 5, 5], "num_quantizers": 1},
           "ResidualLFQ": {"codebook_size": 16, "num_quantizers": 2},
           "ResidualSimVQ": {"codebook_size": 16, "num_quantizers": 2},
           "GroupedResidualVQ": {"codebook_size": 8, "num_quantizers": 2, "groups": 2}}
NAMED = {"lfq": {"codebook_size": 64}, "bsq": {"codebook_size": 64}, "residual_fsq": {"levels": [4, 3, 3],
         "num_quantizers": 2}, "rotation_vq": {"codebook_size": 64, "code_dim": 4}}
OTHERS = [("library", {"kind": kind, **options}) for kind, options in LIBRARY.items()] + [*NAMED.items()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, options", OTHERS, ids=[*LIBRARY, *NAMED])
def test_the_librarys_quantizers_behind_our_interface(name, options):
    """Indices, look-up, gradients, saved and loaded, in bf16, with images or sequences."""
    quantizer, z = build_quantizer(name, DIM, **options), torch.randn(4, DIM, 5, 6, requires_grad=True)
    for _ in range(3):
        z_q, loss, indices = quantizer(z)
    (z_q.square().sum() + loss).backward()
    assert z.grad.abs().sum() > 0 and loss.shape == () and z_q.shape == z.shape
    quantizer.eval()
    z_q, loss, indices = quantizer(z)
    assert loss.shape == () and indices.shape == (4, 5, 6) and indices.dtype == torch.int64
    assert 0 <= indices.min() <= indices.max() < quantizer.codebook_size and len(indices.unique()) > 5
    assert torch.equal(quantizer.indices_to_codes(indices), z_q)
    assert torch.autograd.grad(z_q.sum(), z)[0].abs().sum() > 0
    again = quantizer.indices_to_codes(quantizer.codes_to_indices(z_q))
    assert torch.allclose(again, z_q, atol=1e-6)
    assert torch.allclose(quantizer(z.flatten(2).mT)[0], z_q.flatten(2).mT, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(z)[0], z_q)
    assert torch.equal(copy.deepcopy(quantizer).half()(z)[0], z_q)
    other = build_quantizer(quantizer.config["quantizer"], DIM, **quantizer.config["quantizer_options"])
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.eval()(z)[2], indices)
    for wrong in (torch.full((1, 1), quantizer.codebook_size), torch.full((1, 1), -1)):
        with pytest.raises(ValueError, match="^range of indices"):
            quantizer.indices_to_codes(wrong)


@pytest.mark.parametrize("options, message", [
    ({"kind": "PQ"}, "kind = 'PQ', allowed: .*ResidualVQ"), ({"kind": "LFQ", "levels": 8}, "LFQ = .*levels"),
    ({"kind": "LFQ", "codebook_size": 60}, "LFQ = .*power of 2"),
    ({"kind": "LatentQuantize", "levels": [5, 5]}, "LatentQuantize = .*dimension"),
    ({"kind": "FSQ", "levels": [8], "arguments": {"inv_temperature": 1.0}}, "FSQ = .*inv_temperature"),
    ({"kind": "ResidualLFQ", "codebook_size": 4, "num_quantizers": 2, "spherical": True}, "Res.*other codes"),
    ({"kind": "VectorQuantize", "codebook_size": 8, "accept_image_fmap": True}, "VectorQuantize = ")])
def test_what_the_library_does_not_take_is_refused(options, message):
    with pytest.raises(ValueError, match=rf"^{message}[^\n]*$"):
        build_quantizer("library", DIM, **options)


def test_arguments_of_the_librarys_forward():
    z, losses = torch.randn(2, 50, DIM), []
    for temperature in (100.0, 1.0):
        torch.manual_seed(0)
        losses.append(build_quantizer("bsq", DIM, codebook_size=64, arguments={"inv_temperature": temperature})(z)[1])
    assert losses[1] > losses[0]  # a softer choice between codes is less certain


def test_of_the_library_lfq_is_exported_and_others_say_that_they_are_not():
    z, axes = torch.randn(2, 7, DIM), ({0: torch.export.Dim.DYNAMIC},)
    lfq = build_quantizer("lfq", DIM, codebook_size=64).eval()
    exported = torch.export.export(lfq, (z,), dynamic_shapes=axes).module()
    assert torch.equal(exported(z.repeat(3, 1, 1))[2], lfq(z.repeat(3, 1, 1))[2])
    with pytest.raises(ValueError, match="^quantizer = 'VectorQuantize', allowed: LFQ in an export$"):
        torch.export.export(build_quantizer("rotation_vq", DIM, codebook_size=8).eval(), (z,), dynamic_shapes=axes)


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(ValueError, match="pip install vector-quantize-pytorch$"):
        build_quantizer("lfq", DIM)


def test_mixed_radix_and_large_codebooks():
    assert split_indices(torch.tensor([[0, 7, 123]]), (10, 6, 5)).tolist() == [[[0, 0, 0], [7, 0, 0], [3, 0, 2]]]
    assert torch.equal(join_indices(split_indices(torch.arange(300), (10, 6, 5)), (10, 6, 5)), torch.arange(300))
    large = torch.tensor([2**60 - 1, 2**59 + 3])
    assert torch.equal(join_indices(split_indices(large, (4096,) * 5), (4096,) * 5), large)
    with pytest.raises(ValueError, match="codebook_size"):  # too many to compare with each
        build_quantizer("fsq", DIM, levels=[2] * 25).codes_to_indices(torch.zeros(1, 1, DIM))


@pytest.mark.parametrize("options", [
    {"name": "fsp"}, {"name": "fsq", "dim": 0}, {"name": "fsq", "levels": [8, 1]}, {"name": "fsq", "levels": []},
    {"name": "fsq", "levels": 512}, {"name": "fsq", "levels": [64] * 11}, {"name": "fsq", "codebooks": 2},
    {"name": "ddcl", "codebooks": 2}, {"name": "ddcl", "delta": 0.3}, {"name": "ddcl", "delta": 0},
    {"name": "ddcl", "delta": 15}, {"name": "simvq", "codebook_size": 0}, {"name": "simvq", "codebook_size": 64.0},
    {"name": "simvq", "transform": "pca"}, {"name": "simvq", "code_dim": 1, "transform": "cosine"},
    {"name": "simvq", "decay": 1}, {"name": "ema_vq", "code_dim": -1}, {"name": "ema_vq", "decay": 1.0},
    {"name": "ema_vq", "decay": 0.0}, EMA | {"codebooks": 0}, EMA | {"codebooks": 2, "combine": "sum"},
    EMA | {"codebooks": 16, "code_dim": 16}, EMA | {"codebooks": 4, "combine": "product"},
    EMA | {"codebooks": 2, "random_depth": 2}, EMA | {"codebooks": 2, "combine": "product", "random_depth": 0.5}])
def test_refused_options(options):
    with pytest.raises(ValueError, match=r"^[^\n]+ = [^\n]+, allowed: [^\n]+$"):
        build_quantizer(**{"dim": DIM} | options)


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
    with pytest.raises(ValueError, match=r"^[^\n]+ = [^\n]+, allowed: [^\n]+$"):
        getattr(build("fsq").eval(), method)(argument)


@pytest.mark.parametrize("kind", KINDS)
def test_train_mode_does_not_look_at_values(kind):
    assert build(kind)(torch.full((2, 9, DIM), math.nan))[0].isnan().all()


def test_the_file_needs_torch_alone():
    tree = ast.parse(inspect.getsource(quantizers))
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"torch"}


def test_without_a_quantizer_tokens_pass():
    quantizer, z = build_quantizer("none", DIM), torch.randn(2, DIM, 3, 4, requires_grad=True)
    z_q, loss, indices = quantizer(z)
    assert torch.equal(z_q, z) and loss == 0 and indices.shape == (2, 3, 4) and quantizer.codebook_size == 0
    assert torch.equal(torch.autograd.grad(z_q.sum(), z)[0], torch.ones_like(z))
    for function, argument in ((quantizer.indices_to_codes, indices), (quantizer.codes_to_indices, z)):
        with pytest.raises(ValueError, match="allowed: "):
            function(argument)


def test_code_dim_none_quantizes_the_tokens_themselves_and_0_is_their_dim():
    quantizer = build_quantizer("simvq", DIM, codebook_size=10, code_dim=None)
    assert quantizer.code_dim == DIM and isinstance(quantizer.project_in, nn.Identity)
    quantizer = build_quantizer("simvq", DIM, codebook_size=10, code_dim=0)
    assert quantizer.code_dim == DIM and isinstance(quantizer.project_in, nn.Linear)
    for kind, channels in ((FSQ(levels=[8, 8, 8]), 3), (DDCL(), 4)):  # without dim: as many channels as numbers
        z_q, _, indices = kind.eval()(torch.randn(2, channels, 5, 5))
        assert not [*kind.parameters()] and torch.equal(kind.indices_to_codes(indices), z_q)


def test_fsq_table_by_hand():
    steps = [[2 * i / (n - 1) - 1 for i in range(n)] for n in (8, 6, 5)]  # -1 to 1 in 8, 6 and 5 steps
    table = [(a, b, c) for c, b, a in itertools.product(*reversed(steps))]  # the first number changes fastest
    fsq = FSQ(3, [8, 6, 5])
    assert fsq.codebook_size == 240 and torch.allclose(fsq.get_codebook_entry(torch.arange(240)), torch.tensor(table))
    assert torch.equal(fsq.codes_to_indices(torch.tensor([table])), torch.arange(240)[None])


def test_fsq_is_the_librarys():
    ours, theirs = FSQ(6), library.FSQ([8, 8, 8, 5, 5, 5], preserve_symmetry=True)
    z = torch.randn(2, 200, 6, requires_grad=True)
    (z_q, _, indices), (expected, expected_indices) = ours(z), theirs(z)
    assert torch.equal(indices, expected_indices.long()) and torch.allclose(z_q, expected, atol=1e-6)
    gradients = [torch.autograd.grad(out.square().sum(), z)[0] for out in (z_q, expected)]
    assert torch.allclose(*gradients, atol=1e-5)


def test_ddcl_error_is_uniform_and_independent_of_the_input():
    ddcl, z = DDCL(4), 0.5 * torch.randn(1, 20_000, 4)
    x = torch.tanh(z)
    error = (ddcl(z)[0] - x) * 15  # in steps of delta
    assert error.abs().max() < 0.501 and not torch.equal(ddcl(z)[0], ddcl(z)[0])
    for some in (error, error[x.abs() < 1 / 60], error[x > 0.5]):  # near a level and elsewhere alike
        fractions = torch.histc(some, 10, -0.5, 0.5) / some.numel()
        assert (fractions - 0.1).abs().max() < 5 * (0.09 / some.numel()) ** 0.5
    assert abs(torch.corrcoef(torch.stack([error.flatten(), x.flatten()]))[0, 1]) < 0.02


def test_ddcl_gradient_is_that_of_the_expectation():
    # E f(x + e) of f(x) = x^3, with e uniform in (-d/2, d/2), is x^3 + x d^2 / 4
    ddcl, z = DDCL(4, delta=1 / 2), torch.full((1, 100_000, 4), 0.3, requires_grad=True)
    ddcl(z)[0].pow(3).sum().backward()
    x = math.tanh(0.3)
    assert z.grad.mean().item() == pytest.approx((3 * x**2 + 0.5**2 / 4) * (1 - x**2), abs=2e-3)


def test_ddcl_loss_bounds_the_expected_length_of_the_message():
    ddcl, z = DDCL(4, comm_weight=0.5), torch.randn(1, 9, 4)
    bits = torch.log2(2 * 15 * torch.tanh(z).abs() + 1).sum(-1).mean()
    assert torch.allclose(ddcl(z)[1], 0.5 * bits)
    # of the two integers next to x / delta
    message = split_indices(ddcl(z.expand(5000, -1, -1))[2], (31,) * 4) - 15
    assert torch.allclose(message.abs().double().mean(0), torch.tanh(z[0]).abs().double() * 15, atol=0.05)
    assert 0.9 * bits < torch.log2(2 * message.abs() + 1).sum(-1).mean() < bits


@pytest.mark.parametrize("kind", ["learned", "cosine"])
def test_simvq_is_the_librarys(kind):
    ours, z = SimVQ(8, 300, None, kind), torch.randn(2, 100, 8)

    def transform(codes):
        return ours.normalize(ours.code_transform(codes))

    theirs = library.SimVQ(8, 300, codebook_transform=transform, rotation_trick=False)
    theirs.frozen_codebook.copy_(ours.frozen_codebook)
    expected, indices, loss = theirs(F.normalize(z, dim=-1) if kind == "cosine" else z)
    z_q, our_loss, our_indices = ours(z)
    assert torch.equal(our_indices, indices) and torch.allclose(z_q, expected, atol=1e-6)
    assert torch.allclose(our_loss, 8 * loss, atol=1e-6)  # squared distances instead of means over 8 numbers
    gradients = [torch.autograd.grad(out, ours.code_transform.weight)[0] for out in (our_loss, 8 * loss)]
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("width, rank", [(16, 16), (64, 64), (96, 12)])
def test_matched_codes_are_those_of_a_gaussian_channel_and_stay_alive(width, rank):
    """Against the definition in fp64, by eigenvalues and bisection: Gaussian tokens of unequal variances."""
    spread = torch.randn(rank, width) * torch.exp(-torch.arange(rank) / 6)[:, None]
    simvq = SimVQ(width, 1024, None)
    for _ in range(30):
        _, _, indices = simvq(3 + torch.randn(1, 8192, rank) @ spread)
    sums, mean = simvq.moments.double() / simvq.moments[-1, -1], simvq.code_transform.bias.double()
    variances, axes = torch.linalg.eigh(sums[:-1, :-1] - sums[:-1, -1:] * sums[-1, :-1])  # around an earlier mean
    low, high = 1e-6, 1e3
    for _ in range(100):
        s = (low * high) ** 0.5
        low, high = (s, high) if (1 + variances.clamp(min=0) / s).log().sum() > 2 * math.log(1024) else (low, s)
    expected = axes * (variances**2 / (variances + s)) @ axes.T
    actual = simvq.code_transform.weight.double() @ simvq.code_transform.weight.double().T / width
    assert torch.allclose(actual, expected, atol=2e-3 * expected.abs().max().item())
    assert torch.allclose(mean, torch.full_like(mean, 3), atol=0.1)
    p = torch.bincount(indices.flatten(), minlength=1024) / indices.numel()
    assert (p > 0).float().mean() > 0.95 and torch.special.entr(p).sum().exp() > 0.8 * 1024


@pytest.mark.parametrize("tokens", [torch.randn(1, 1, 16), 9 + torch.randn(1, 1, 16).expand(4, 9, 16),
                                    5 + torch.randn(1, 99, 1) * torch.randn(16)], ids=["one", "equal", "rank 1"])
def test_matched_codes_of_few_directions_stay_finite(tokens):
    simvq = SimVQ(16, 64, None)
    for _ in range(50):
        z_q, loss, _ = simvq(tokens)
        assert loss.isfinite() and all(w.isfinite().all() for w in simvq.state_dict().values())
    assert (z_q - tokens).square().mean() < 0.05 * tokens.square().mean()


def check_update(before, after, x):
    """Whether a step with tokens x (N, D) led from before to after: code by code, in fp64. How many were dead."""
    x, decay, average = x.detach().double(), before.decay, len(x) / before.codebook_size
    if before.mean_count > 0:
        average = decay * before.mean_count.item() + (1 - decay) * average
    nearest = torch.cdist(x, before.codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    tokens = [x[nearest == i] for i in range(before.codebook_size)]
    counts = [decay * n + (1 - decay) * len(t) for n, t in zip(before.token_counts.double(), tokens)]
    sums = [decay * m + (1 - decay) * t.sum(0) for m, t in zip(before.token_sums.double(), tokens)]
    dead = [i for i, count in enumerate(counts) if count < 0.1 * average][: len(x)]
    restarts = set()
    for i, (count, m) in enumerate(zip(counts, sums)):
        code = m / ((count + 1e-5) / (sum(counts) + 1e-5 * len(counts)) * sum(counts))  # Laplace smoothing
        if i in dead:
            token = (x.float() == after.codebook[i]).all(1).nonzero()[0, 0].item()
            restarts.add(token)
            count, code = torch.tensor(0.2 * average, dtype=torch.float64), x[token]
            m = count * code
        for actual, expected in ((after.token_counts, count), (after.token_sums, m), (after.codebook, code)):
            assert torch.allclose(actual[i].double(), expected, rtol=1e-5, atol=1e-5)
    assert len(restarts) == len(dead)  # no two codes restart at one token
    return len(dead)


def test_ema_update_follows_the_formula():
    quantizer, dead = EMAVQ(6, 10, None, decay=0.93), []
    for tokens in (25, 3, 30, 30, 1, 1, 200, 200):  # some codes are dead at times
        before, x = copy.deepcopy(quantizer), 3 * torch.randn(1, tokens, 6)
        quantizer(x)
        dead.append(check_update(before, quantizer, x[0]))
    assert 0 in dead and any(0 < n < 10 for n in dead)


def test_ema_vq_is_the_librarys():
    ours, theirs = EMAVQ(6, 10, None, decay=0.8), library.VectorQuantize(6, 10, decay=0.8, rotation_trick=False)
    ours.codebook.copy_(torch.randn(10, 6)), ours.token_counts.fill_(30), ours.token_sums.copy_(30 * ours.codebook)
    book = theirs._codebook
    book.embed[0], book.cluster_size[0], book.embed_avg[0] = ours.codebook, ours.token_counts, ours.token_sums
    for mode in (True, True, True, False):
        z = torch.randn(2, 30, 6, requires_grad=True)
        (z_q, loss, indices), (expected, known, their_loss) = ours.train(mode)(z), theirs.train(mode)(z)
        assert torch.equal(indices, known) and torch.allclose(z_q, expected, atol=1e-6)
        assert not mode or torch.allclose(loss, 0.25 * their_loss.sum(), atol=1e-6)
        assert torch.allclose(ours.codebook, theirs.codebook, atol=1e-5)
        assert torch.allclose(ours.token_counts, book.cluster_size[0], atol=1e-5)


def test_ema_codes_of_several_processes_learn_from_all_their_tokens(monkeypatch):
    """Process 0 sends those at which dead codes restart: of no more codes than each process has tokens, here 3."""
    sent = torch.randn(10, 6)
    quantizer, x = EMAVQ(6, 10, None), torch.randn(1, 3, 6)
    quantizer.token_counts[:5], quantizer.token_sums[:5] = 1, quantizer.codebook[:5]
    alone = copy.deepcopy(quantizer)
    alone(torch.cat([x, x], 1))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    all_reduce = iter([lambda x: x.mul_(2), lambda x: x.mul_(2), lambda x: x.add_(sent)])
    monkeypatch.setattr(dist, "all_reduce", lambda *args: next(all_reduce)(*args))
    quantizer(x)
    dead = (alone.token_counts - 0.2 * 0.6).abs() < 1e-6
    assert 3 < dead.sum() < 10 and torch.equal(quantizer.codebook[dead][:3], sent[dead][:3])
    assert not torch.isin(quantizer.codebook[dead][3:], sent).any()
    assert torch.allclose(quantizer.token_counts[~dead], alone.token_counts[~dead])
    assert torch.allclose(quantizer.codebook[~dead], alone.codebook[~dead], atol=1e-6)


def test_matched_codes_of_several_processes_learn_from_all_their_tokens(monkeypatch):
    quantizer, x = SimVQ(6, 50, None), torch.randn(1, 30, 6)
    alone, others = copy.deepcopy(quantizer), torch.randn(1, 30, 6)
    alone(torch.cat([x, others], 1))

    def all_reduce(total):  # of first, then of second moments around the mean of all
        second = total.ndim == 2
        x = F.pad(others[0] - (quantizer.code_transform.bias if second else 0), (0, 1), value=1.0)
        total += x.T @ x / 30 if second else x.mean(0)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    quantizer(x)
    quantizer.moments /= 2  # a sum over processes, whose scale is of no effect
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(quantizer.buffers(), alone.buffers()))
    assert torch.allclose(quantizer.code_transform.weight, alone.code_transform.weight, atol=1e-4)


@pytest.mark.parametrize("combine", ["residual", "product"])
def test_each_of_several_codebooks_is_an_ema_codebook(combine):
    """Of what the ones before it leave, or of its channels."""
    quantizer = build_quantizer("ema_vq", 6, codebooks=3, combine=combine, codebook_size=8, code_dim=None, decay=0.93)
    for _ in range(5):
        before, z = copy.deepcopy(quantizer), torch.randn(1, 40, 6)
        z_q, loss, indices = quantizer(z)
        codes, sub_indices, losses = torch.zeros_like(z[0]), [], 0
        for i, (old, new) in enumerate(zip(before.codebooks, quantizer.codebooks)):
            channels = slice(None) if combine == "residual" else slice(2 * i, 2 * i + 2)
            x = (z[0] - codes)[:, channels]
            check_update(old, new, x)
            sub_indices.append(torch.cdist(x, old.codebook).argmin(1))
            codes[:, channels] += old.codebook[sub_indices[-1]]
            losses += 0.25 * (x - old.codebook[sub_indices[-1]]).square().mean()
        assert torch.equal(indices[0], sub_indices[0] + 8 * sub_indices[1] + 64 * sub_indices[2])
        assert torch.allclose(z_q[0], codes, atol=1e-6) and torch.allclose(loss, losses, atol=1e-6)
    assert quantizer.codebook_sizes == (8, 8, 8) and quantizer.codebook_size == 512


def test_decoding_from_the_first_codebooks():
    quantizer, indices = build("residual", codebooks=3), torch.randint(16**3, (2, 3, 4))
    codes = torch.zeros(2, 3, 4, 6)
    for k, codebook in enumerate(quantizer.codebooks):
        codes = codes + codebook.codebook[indices // 16**k % 16]
        expected = quantizer.project_out(codes).permute(0, 3, 1, 2)
        assert torch.allclose(quantizer.indices_to_codes(indices, codebooks=k + 1), expected, atol=1e-6)
    assert torch.equal(quantizer.indices_to_codes(indices, codebooks=3), quantizer.indices_to_codes(indices))
    for kind, wrong in (("residual", 0), ("residual", 3), ("product", 1), ("fsq", 1)):
        with pytest.raises(ValueError, match="^codebooks = "):
            build(kind).indices_to_codes(indices % 240, codebooks=wrong)


def test_random_depth_is_drawn_for_each_image_and_only_in_training():
    quantizer, z = build("residual", 6, codebooks=3, random_depth=0.5, code_dim=None), torch.randn(400, 4, 6)
    before = copy.deepcopy(quantizer)
    z_q, loss, indices = quantizer(z)
    full = before.eval()(z)[2]
    sums = torch.stack([before.indices_to_codes(full, codebooks=k) for k in (1, 2, 3)])
    same = ((z_q - sums).abs().amax((2, 3)) < 1e-5).float()  # (3, 400): all tokens of an image have its depth
    depth = same.argmax(0) + 1
    assert same.sum(0).eq(1).all() and depth[0] != depth[1:].min()
    assert torch.allclose(same.mean(1), torch.tensor([1, 1, 4]) / 6, atol=0.08)  # half of them at random
    assert torch.equal(indices, full)
    exported = torch.export.export(before, (z,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    assert torch.equal(exported(z[:7])[2], full[:7])  # of any batch
    rest, losses = z, 0
    for i, (old, new) in enumerate(zip(before.codebooks, quantizer.codebooks)):
        check_update(old, new, rest.flatten(0, 1))  # all images move it, whatever their depth
        losses += 0.25 * (rest - old.codebook[full // 16**i % 16]).square().mean()
        rest = z - sums[i]
    assert torch.allclose(loss, losses, atol=1e-6)
