"""Each quantizer against its definition, written again, and against vector-quantize-pytorch."""
import copy
import inspect
import itertools
import json
import math
import re
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import vector_quantize_pytorch as library
from conftest import SEED, refused
from scipy.optimize import brentq

import quantizers
from quantizers import DDCL, EMAVQ, FSQ, QUANTIZERS, MatchedSimVQ, SimVQ, build_quantizer

DIM = 12
OURS = {"fsq": {"levels": [8, 6, 5]}, "ddcl": {"delta": 1 / 5}, "simvq": {"codebook_size": 4096, "code_dim": 8},
        "simvq_cosine": {"codebook_size": 500, "code_dim": 4}, "simvq_matched": {"codebook_size": 500},
        "ema_vq": {"codebook_size": 64, "code_dim": 6}, "residual_vq": {"codebook_size": 16, "code_dim": 6},
        "product_vq": {"codebooks": 3, "codebook_size": 16, "code_dim": 6}}
TWO = {"codebook_size": 16, "num_quantizers": 2}
LIBRARY = {"VectorQuantize": {"codebook_size": 64}, "SimVQ": {"codebook_size": 64}, "FSQ": {"levels": [8, 5, 5]},
           "ResidualVQ": {"codebook_size": (16, 32), "num_quantizers": 2}, "ResidualLFQ": TWO, "ResidualSimVQ": TWO,
           "lfq": {"codebook_size": 64}, "bsq": {"codebook_size": 64}, "residual_fsq": {"levels": [4, 3, 3]},
           "rotation_vq": {"codebook_size": 64, "code_dim": 4}}


def build(kind):
    name, options = (kind, {}) if kind in QUANTIZERS else ("library", {"kind": kind})
    return build_quantizer(name, DIM, **options, **(OURS | LIBRARY)[kind])


@pytest.fixture(params=[*OURS, *LIBRARY])
def quantizer(request):
    return build(request.param)


def exact_distances(x, codebook):
    """Distances (N, K) of x (N, D) and codes (K, D), by differences in fp64."""
    return (x.double()[:, None] - codebook.double()).square().sum(2).sqrt()


def test_fsq_takes_the_nearest_code_of_a_table():
    steps = [[2 * i / (n - 1) - 1 for i in range(n)] for n in (8, 6, 5)]  # -1 to 1 in 8, 6 and 5 levels
    table = torch.tensor([(a, b, c) for c, b, a in itertools.product(*reversed(steps))])  # a changes fastest
    fsq, z = FSQ(3, [8, 6, 5]), torch.randn(200, 3)
    assert torch.allclose(fsq.get_codebook_entry(torch.arange(240)), table, atol=1e-6)
    z_q, loss, indices = fsq(z[None])
    nearest = table[exact_distances(z.tanh(), table).argmin(1)]
    assert torch.equal(table[indices[0]], nearest) and loss == 0
    assert fsq(torch.full((1, 1, 3), math.nan))[0].isnan().all()  # train mode does not look at values
    assert torch.allclose(z_q[0], nearest, atol=1e-6)


def test_ddcl_error_is_uniform_and_independent_of_the_input_and_the_gradient_that_of_the_expectation():
    ddcl, z = DDCL(4, delta=1 / 5), 0.5 * torch.randn(1, 400_000, 4)
    x = torch.tanh(z)
    error = (ddcl(z)[0] - x) * 5  # in steps of delta
    assert error.abs().max() < 0.501
    for some in (error, error[x.abs() < 1 / 20], error[x > 0.5]):  # near a level and elsewhere alike
        fractions = torch.histc(some, 10, -0.5, 0.5) / some.numel()
        deviation = (0.1 * 0.9 / some.numel()) ** 0.5  # of a binomial distribution
        assert (fractions - 0.1).abs().max() < 6 * deviation
    z, x = torch.full((1, 100_000, 4), 0.3, requires_grad=True), math.tanh(0.3)
    ddcl(z)[0].pow(3).sum().backward()
    expected = (3 * x**2 + ddcl.delta**2 / 4) * (1 - x**2)  # that of x^3 + x delta^2 / 4, the expectation of (x + e)^3
    assert (z.grad.mean() - expected).abs() < 6 * z.grad.std() / z.numel() ** 0.5


def test_ddcl_loss_bounds_the_expected_length_of_the_message():
    ddcl, z = DDCL(4, comm_weight=0.5), torch.randn(1, 9, 4)
    bits = torch.log2(2 * 15 * torch.tanh(z).abs() + 1).sum(-1).mean()
    assert torch.allclose(ddcl(z)[1], 0.5 * bits)
    message = quantizers.split_indices(ddcl(z.expand(5000, -1, -1))[2], (31,) * 4) - 15
    assert torch.log2(2 * message.abs() + 1).sum(-1).mean() < bits


def check_update(before, after, x, indices):
    """A step with tokens x (N, D) and their indices follows EMA-VQ's formula. Returns how many codes restart."""
    x, size, distances = x.detach().double(), before.codebook_size, exact_distances(x.detach(), before.codebook)
    assert torch.allclose(distances.gather(1, indices[:, None])[:, 0], distances.amin(1), atol=1e-3)  # the nearest
    w = max(9 / (before.steps.item() + 10), 1 - before.decay)
    chosen = F.one_hot(indices, size).double()
    counts = (1 - w) * before.token_counts + w * chosen.sum(0)
    sums = (1 - w) * before.token_counts[:, None].double() * before.codebook + w * chosen.T @ x
    codes = torch.where(counts[:, None] > 0, sums / counts[:, None], before.codebook.double())
    mean = (1 - w) * before.mean_count.double() + w * len(x) / size
    dead = counts < 0.1 * mean
    dead = torch.where((counts - 0.1 * mean).abs() < 1e-5, after.token_counts > 0.15 * mean, dead)  # by rounding
    dead &= dead.cumsum(0) <= len(x)
    counts[dead], codes[dead] = 0.2 * mean, after.codebook[dead].double()
    least, chosen = exact_distances(codes[dead], x).min(1)
    assert (least < 1e-5).all() and len(chosen.unique()) == len(chosen)  # no two dead codes at one token
    torch.testing.assert_close(after.token_counts.double(), counts, rtol=3e-6, atol=1e-5)
    torch.testing.assert_close(after.codebook.double(), codes, rtol=3e-6, atol=1e-5)
    return dead.sum()


def test_ema_update_follows_the_formula():
    ema = EMAVQ(6, 40, decay=0.3, project=False)  # the last weights are its 0.7
    for tokens in (3, 25, 3, 30, 30, 1, 1, 200):
        before = copy.deepcopy(ema)
        x = ema.codebook[torch.arange(tokens) % 8] + 0.01 * torch.randn(tokens, 6)
        restarts = check_update(before, ema, x, ema(x[None])[2][0])
        assert before.steps > 0 or restarts == 3  # of all dead codes as many as there are tokens


@pytest.mark.parametrize("name", ["residual_vq", "product_vq"])
def test_each_of_several_codebooks_is_an_ema_codebook(name):
    several = build_quantizer(name, 6, codebooks=3, codebook_size=8, project=False)
    for _ in range(3):
        before, z = copy.deepcopy(several), torch.randn(2, 20, 6, requires_grad=True)
        z_q, loss, indices = several(z)
        codes, losses = torch.zeros(40, 6), 0
        for i, (old, new) in enumerate(zip(before.stages, several.stages)):
            channels = slice(None) if name == "residual_vq" else slice(2 * i, 2 * i + 2)
            x, digits = (z.flatten(0, 1) - codes)[:, channels], indices.flatten() // 8**i % 8
            check_update(old, new, x, digits)
            codes[:, channels] += old.codebook[digits]
            losses += 0.25 * (x - old.codebook[digits]).square().mean()
            if name == "residual_vq":  # the first codebooks decode alone
                torch.testing.assert_close(before.indices_to_codes(indices, depth=i + 1).flatten(0, 1), codes)
        assert torch.allclose(z_q.flatten(0, 1), codes, atol=1e-6) and torch.allclose(loss, losses, atol=1e-6)
        assert torch.allclose(torch.autograd.grad(loss, z)[0], torch.autograd.grad(losses, z)[0], atol=1e-6)
    for depth in ((0, 4) if name == "residual_vq" else (1,)):
        with refused("^depth = "):
            several.indices_to_codes(indices, depth=depth)


@pytest.mark.parametrize("cosine", [False, True])
def test_simvq_is_the_librarys(cosine):
    ours = SimVQ(8, 300, project=False, cosine=cosine)
    scale = (lambda x: F.normalize(x, dim=-1)) if cosine else torch.clone  # vectors and codes have length 1
    transform = lambda codes: scale(ours.code_transform(codes))  # noqa: E731
    theirs = library.SimVQ(8, 300, codebook_transform=transform, rotation_trick=False)
    theirs.frozen_codebook.copy_(ours.frozen_codebook)
    z = ours.lookup(torch.arange(300)[None]).detach() + 0.01 * torch.randn(1, 300, 8)
    (z_q, loss, _), (expected, _, their_loss) = ours(z.requires_grad_()), theirs(scale(z))
    assert torch.allclose(z_q, expected, atol=1e-5)
    losses = loss, 8 * their_loss  # squared distances instead of means over 8 numbers
    for weight in (z, ours.code_transform.weight):
        gradients = [torch.autograd.grad(x, weight, retain_graph=True)[0] for x in losses]
        assert torch.allclose(*losses, rtol=1e-3) and torch.allclose(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("width, rank", [(16, 16), (96, 12)])
def test_matched_codes_are_those_of_a_gaussian_channel_and_stay_alive(width, rank):
    """Eigenvalues and a root finder give the definition in fp64. Six steps find it."""
    spread = torch.randn(rank, width) * torch.exp(-torch.arange(rank) / 6)[:, None]
    simvq, x = MatchedSimVQ(width, 1024, project=False), (3 + torch.randn(1, 8192, rank) @ spread).requires_grad_()
    for _ in range(6):
        z_q, loss, indices = simvq(x)
    variances, axes = torch.linalg.eigh(simvq.covariance.double())
    powers = variances.clamp(min=0)
    s = brentq(lambda s: (1 + powers / s).log().sum().item() / 2 - math.log(1024), 1e-6, 1e3)  # the noise
    assert simvq.noise_ratio * simvq.variance() == pytest.approx(s, rel=1e-3)
    expected = axes * (variances**2 / (variances + s)) @ axes.T
    a, atol = simvq.code_transform.weight.double(), 2e-3 * expected.abs().max().item()
    assert torch.allclose(a @ a.T / width, expected, atol=atol)
    p = torch.bincount(indices.flatten(), minlength=1024) / indices.numel()
    assert (p > 0).float().mean() > 0.9 and torch.special.entr(p).sum().exp() > 0.7 * 1024
    losses = loss, 0.25 * (x - z_q.detach()).square().mean() / x.detach()[0].var(0, correction=0).mean()  # relative
    gradients = [torch.autograd.grad(each, x)[0] for each in losses]
    assert torch.allclose(*losses, rtol=1e-3) and torch.allclose(*gradients, rtol=1e-3, atol=1e-9)


def test_matched_simvq_keeps_the_mean_and_covariance_of_all_tokens():
    """Step k of n weighs decay^(n - k). Tokens far from zero lose no digits."""
    steps = torch.randn(5, 40, 6) * torch.arange(1.0, 6)[:, None, None]
    tokens = (64 * (10_000 + steps)).round() / 64  # numbers that fp32 has
    simvq = MatchedSimVQ(6, 50, decay=0.8, project=False)
    for x in tokens:
        simvq(x[None])
    x = tokens.double().flatten(0, 1)
    weights = 0.8 ** torch.arange(4.0, -1, -1).double().repeat_interleave(40)
    assert torch.allclose(simvq.code_transform.bias.double(), (weights @ x) / weights.sum(), rtol=1e-6)
    covariance = torch.cov(x.T, correction=0, aweights=weights)
    assert torch.allclose(simvq.covariance.double(), covariance, rtol=1e-3, atol=1e-3)


def test_indices_give_z_q_again_bit_for_bit_in_any_precision_and_an_image_is_its_pixels_row_by_row(quantizer):
    z = torch.randn(3, DIM, 4, 5).bfloat16().float()
    z_q, loss, indices = quantizer.eval()(z)
    assert z_q.shape == z.shape and indices.shape == (3, 4, 5) and loss.shape == () and len(indices.unique()) > 1
    assert torch.equal(quantizer.indices_to_codes(indices), z_q)
    assert torch.equal(quantizer.codes_to_indices(z_q), indices)
    sequence, _, flat = quantizer(z.flatten(2).mT)
    assert torch.equal(sequence, z_q.flatten(2).mT) and torch.equal(flat, indices.flatten(1))
    assert torch.allclose(quantizer.get_codebook_entry(indices.flatten()), sequence.flatten(0, 1), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):  # it computes in fp32
        assert torch.equal(quantizer(z.bfloat16())[0], z_q) and torch.equal(quantizer.indices_to_codes(indices), z_q)
        assert torch.equal(quantizer.codes_to_indices(z_q), indices)
    assert torch.equal(quantizer.half()(z.bfloat16())[0], z_q)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("kind", OURS)
def test_the_gradient_of_z_q_passes_as_if_nothing_were_quantized(kind, mode):
    quantizer, weight = build(kind), torch.randn(2, 9, DIM)
    z = torch.randn(2, 9, DIM, requires_grad=True)
    x = quantizer.project_in(z)
    x = torch.tanh(x) if isinstance(quantizer, FSQ) else quantizer.scale(x) if kind == "simvq_cosine" else x
    outputs = quantizer.train(mode)(z)[0], quantizer.project_out(x)
    gradients = [torch.autograd.grad((out * weight).sum(), z)[0] for out in outputs]
    assert gradients[0].abs().sum() > 0 and torch.allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_results_are_finite_for_equal_tokens_tokens_on_a_line_and_the_largest(quantizer):
    line, largest = torch.randn(1, 99, 1) * torch.randn(DIM), 1e12 * torch.randn(1, 99, DIM).sign()
    for z in (torch.ones(1, 9, DIM), line, largest):
        for mode in [True] * 20 + [False]:
            z_q, loss, _ = quantizer.train(mode)(z)
            assert loss.isfinite() and z_q.isfinite().all()


@pytest.mark.parametrize("offset", [0, 10_000])
@pytest.mark.parametrize("tokens, codes", [(600, 4096), (500, 30), (1, 1), (9, 4100)])  # the first in two blocks
def test_nearest_code_is_that_of_brute_force_in_fp64(tokens, codes, offset):
    x, codebook = offset + torch.randn(tokens, 5), offset + torch.randn(codes, 5)
    found, distances = quantizers.nearest_code(x, codebook), exact_distances(x, codebook)
    actual = distances.gather(1, found[:, None])[:, 0]
    assert torch.allclose(actual, distances.amin(1), rtol=1e-3, atol=1e-4)


def test_codes_that_stand_twice_or_close_together_have_their_indices_again():
    fsq, indices = build_quantizer("fsq", 1), torch.randint(64_000, (1, 500))  # fp32's scores do not tell all apart
    z_q = fsq.indices_to_codes(indices)
    found = fsq.codes_to_indices(z_q)
    assert torch.equal(fsq.indices_to_codes(found), z_q) and (found == indices).float().mean() > 0.98
    ema = EMAVQ(1, 9000, project=False)  # a block of 8,192 codes, and a smaller one
    ema.codebook.copy_(torch.arange(9000)[:, None] % 50)
    assert ema.codes_to_indices(torch.arange(50.0).view(1, 50, 1)).tolist() == [[*range(50)]]


@pytest.mark.parametrize("kind", [*OURS, "lfq"])
def test_an_exported_quantizer_takes_any_batch_height_and_width(kind):
    quantizer, axes = build(kind).eval(), dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(quantizer, (torch.randn(2, DIM, 4, 5),), dynamic_shapes=(axes,)).module()
    z = torch.randn(3, DIM, 9, 2)
    torch.testing.assert_close(exported(z), quantizer(z), rtol=0, atol=1e-5)


def test_memory_does_not_grow_with_tokens_times_codes():
    simvq, z_q = build_quantizer("simvq", 4, codebook_size=5000, code_dim=4).eval(), torch.randn(1, 4, 50, 50)
    with torch.profiler.profile(profile_memory=True) as profile:
        simvq.codes_to_indices(z_q)
        simvq(z_q)
    assert max(event.cpu_memory_usage for event in profile.events()) <= 2**23  # all distances would take 50 MB


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name != "library"])
def test_config_rebuilds_a_quantizer(name):
    quantizer, z = build_quantizer(name, DIM, **(OURS | LIBRARY).get(name, {})).eval(), torch.randn(1, 2, DIM)
    config = json.loads(json.dumps(quantizer.config))
    other = build_quantizer(config["quantizer"], DIM, **config["quantizer_options"])
    other.load_state_dict(quantizer.state_dict())
    for same in (other, copy.deepcopy(quantizer)):
        assert same.config == quantizer.config and torch.equal(same.eval()(z)[0], quantizer(z)[0])


def test_a_class_is_built_under_its_name_and_code_dim_0_is_the_tokens_width():
    for kind, name in ((FSQ, "fsq"), (type("Own", (FSQ,), {}), "Own")):
        config = build_quantizer(kind, DIM, levels=[8, 5]).config
        assert config == {"quantizer": name, "quantizer_options": {"levels": (8, 5)}}
    for name, maps in itertools.product(("simvq", "residual_vq"), (4, 0)):
        quantizer = build_quantizer(name, DIM, codebook_size=10, code_dim=0, project=maps > 0)
        assert quantizer.code_dim == DIM and sum("project" in name for name in quantizer.state_dict()) == maps


def test_without_a_quantizer_tokens_pass():
    nothing, z = build_quantizer("none", DIM), torch.randn(2, DIM, 3, 4, requires_grad=True)
    z_q, loss, indices = nothing(z)
    assert torch.equal(z_q, z) and z_q.requires_grad and loss == 0 and indices.shape == (2, 3, 4)
    with refused("'none' has no indices"):
        nothing.indices_to_codes(indices)


@pytest.mark.parametrize("name, options", [
    ("fsq", {"dim": 0}), ("fsq", {"levels": [8, 1]}), ("fsq", {"levels": []}), ("fsq", {"levels": 512}),
    ("fsq", {"levels": [64] * 11}), ("ddcl", {"delta": 0.3}), ("ddcl", {"delta": 0}), ("ddcl", {"delta": 15}),
    ("ema_vq", {"codebook_size": True}), ("simvq", {"codebook_size": 64.0}), ("simvq_matched", {"decay": 1}),
    ("ema_vq", {"code_dim": -1}), ("ema_vq", {"decay": 0.0}), ("residual_vq", {"codebooks": 0}),
    ("product_vq", {"codebooks": 3, "code_dim": 16}), ("library", {"kind": "LFQ", "levels": 8}),
    ("library", {"kind": "GroupedResidualVQ"}), ("library", {"kind": "ResidualLFQ", **TWO, "spherical": True}),
    ("lfq", {"codebook_size": 4, "num_codebooks": 2}), ("rotation_vq", {"codebook_size": 4, "heads": 2})])
def test_options_that_build_no_quantizer_are_refused_with_their_value(name, options):
    with refused(" = .*, allowed: | does not work with |ResidualLFQ has indices that do not decode"):
        build_quantizer(name, **{"dim": DIM} | options).eval()(torch.randn(2, 9, DIM))


@pytest.mark.parametrize("message, method, arguments", [
    ("z is .*, allowed: floats", "forward", [
        torch.zeros(2, 9, DIM + 1), torch.zeros(2, DIM), torch.zeros(2, 9, DIM).long(), torch.zeros(0, 9, DIM), [0.0]]),
    ("The values of z range", "forward", [torch.full((1, 1, DIM), math.nan), torch.full((1, 1, DIM), 2e12)]),
    ("The values of z_q range", "codes_to_indices", [torch.full((1, 1, DIM), math.nan)]),
    ("codes are too many", "codes_to_indices", [torch.zeros(1, 1, DIM)]),  # 2**25
    ("The values of indices range", "indices_to_codes", [[[2**25]], [[-1, 0]]]),
    ("indices are ", "indices_to_codes", [[[True]], [0], [[0.5]], [[1j]]]),
    ("indices are ", "get_codebook_entry", [[[0]]]),
    ("There are no indices", "indices_to_codes", [torch.zeros(0, 9).long()])])
def test_inputs_of_another_shape_range_or_type_are_refused(message, method, arguments):
    fsq = build_quantizer("fsq", DIM, levels=[2] * 25).eval()
    for argument in arguments:
        with refused(message):
            getattr(fsq, method)(argument)


def test_the_file_needs_torch_alone():
    modules = re.findall(r"^(?:import|from) (\w+)", inspect.getsource(quantizers), re.MULTILINE)
    assert {*modules} - sys.stdlib_module_names == {"torch"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LIBRARY)
def test_z_q_is_the_output_of_the_librarys_class(kind):
    quantizer, z = build(kind), torch.randn(4, DIM, 5, 6, requires_grad=True)
    for mode in (True, True, True, False):
        z_q, loss, _ = quantizer.train(mode)(z)
        assert torch.autograd.grad(z_q.square().sum() + loss, z)[0].any() and loss.shape == ()
    tokens = quantizer.project_in(z.flatten(2).mT)
    theirs = quantizer.project_out(quantizer.module(tokens, **quantizer.arguments)[0])
    assert torch.allclose(z_q.flatten(2).mT, theirs, atol=1e-5)


def test_the_librarys_forward_gets_its_arguments():
    bsq, z = build("bsq"), torch.randn(2, 50, DIM)
    soft, bsq.arguments = bsq(z)[1], {"inv_temperature": 100.0}
    assert soft > bsq(z)[1]  # a softer choice between codes is less certain


def learn(kind, *ranks):
    """The state of a quantizer after each of three steps, with tokens of these processes around two points."""
    tokens = []
    for rank in ranks:
        torch.manual_seed(1000 * SEED + rank)
        count = 40 - 10 * rank if kind == "ema_vq" else 40  # EMA-VQ takes unequal shares
        tokens.append(torch.randn(3, 1, count, 6) + 20 * torch.arange(2).repeat(20)[:count, None])
    torch.manual_seed(SEED)  # all processes start with the same weights
    quantizer, states = build_quantizer(kind, 6, codebook_size=100, project=False), []
    for x in torch.cat(tokens, 2):
        quantizer(x)
        states.append(copy.deepcopy(quantizer.state_dict()))
    return states


def learn_in_a_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    torch.save({kind: learn(kind, rank) for kind in ("ema_vq", "simvq_matched")}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_keep_the_same_codebook_which_learns_from_all_their_tokens(tmp_path):
    torch.multiprocessing.start_processes(learn_in_a_process, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first["simvq_matched"], learn("simvq_matched", 0, 1), rtol=1e-3, atol=1e-3)
    found, expected = first["ema_vq"][0], learn("ema_vq", 0, 1)[0]
    kept = found["token_counts"] > 0.3 * found["mean_count"]  # others have restarted at random tokens
    assert found["codebook"].max() < 30  # not at sums of two processes' tokens
    for name in ("codebook", "token_counts"):
        assert torch.allclose(found[name][kept], expected[name][kept], rtol=1e-4, atol=1e-4)
