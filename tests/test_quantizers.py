"""Each quantizer against its definition, implemented here again, and against the library's where there is one."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from vector_quantize_pytorch import GroupedResidualVQ, ResidualFSQ, ResidualVQ, VectorQuantize
from vector_quantize_pytorch import SimVQ as LibrarySimVQ

import quantizers
from quantizers import DDCL, EMAVQ, FSQ, SimVQ, build_quantizer, fast_bf16, nearest_code, search_bf16, straight_through

DIM = 32
OPTIONS = {"fsq": {}, "simvq": {"codebook_size": 512}, "ema_vq": {"codebook_size": 64, "code_dim": 8}, "ddcl": {}}
SEVERAL = {"residual fsq": {"levels": [8, 6, 5]}, "residual simvq": {"codebook_size": 32, "code_dim": 8},
           "product simvq": {"codebook_size": 32, "code_dim": 8},
           "residual ema_vq": {"codebook_size": 16, "code_dim": 8},
           "product ema_vq": {"codebook_size": 16, "code_dim": 8}}  # of two codebooks each
NAMES = [*OPTIONS, *SEVERAL]
EXACT = ("fsq", "ddcl", "residual fsq")  # no two codes are equal: codes_to_indices gives the same indices
LAYOUTS = {"images": (3, DIM, 4, 5), "sequences": (3, 7, DIM)}


def build(name, **options):
    if name in OPTIONS:
        return build_quantizer(name, DIM, **(OPTIONS[name] | options))
    combine, kind = name.split()
    return build_quantizer(kind, DIM, **({"codebooks": 2, "combine": combine} | SEVERAL[name] | options))


@pytest.mark.parametrize("name", ["simvq", "ema_vq"])
def test_round_trip_of_codes_wider_than_features(name):
    quantizer = build(name, code_dim=2 * DIM)
    z = torch.randn(4, 7, DIM)
    quantizer(z)
    z_q = quantizer.eval()(z)[0]
    assert torch.equal(quantizer.indices_to_codes(quantizer.codes_to_indices(z_q)), z_q)


@pytest.mark.parametrize("name", NAMES)
def test_quantize_alone(name):
    quantizer, x = build(name).eval(), torch.randn(5, DIM)
    quantizer(torch.randn(4, 3, DIM))  # has no say in what follows
    z_q, _, indices = quantizer.quantize(x)
    assert torch.equal(indices, quantizer(x[None])[2][0]) and torch.allclose(z_q, quantizer(x[None])[0][0], atol=1e-5)


@pytest.mark.parametrize("shape", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, shape):
    quantizer = build(name)
    z = torch.randn(shape)
    quantizer(z)  # a training step, so that EMA-VQ has a codebook
    quantizer.eval()
    z_q, loss, indices = quantizer(z)
    assert z_q.shape == shape and z_q.dtype == torch.float32
    assert loss.shape == () and loss >= 0
    assert indices.dtype == torch.int64 and indices.shape == ((3, 4, 5) if len(shape) == 4 else (3, 7))
    assert 0 <= indices.min() and indices.max() < quantizer.codebook_size
    assert indices.unique().numel() > 10  # different tokens have different codes
    assert torch.equal(quantizer.indices_to_codes(indices), z_q)
    with torch.no_grad():
        assert torch.equal(quantizer(z)[0], z_q)
    back = quantizer.codes_to_indices(z_q)
    assert torch.equal(quantizer.indices_to_codes(back), z_q)
    if name in EXACT:
        assert torch.equal(back, indices)
    if "residual" not in name or "fsq" in name:  # else a sum's own codes need not be the nearest, one after the other
        near = quantizer.codes_to_indices(z_q + 1e-4 * torch.randn(shape), exact=False)
        assert torch.allclose(quantizer.indices_to_codes(near), z_q, atol=0.01)
    assert torch.equal(quantizer.join_indices(quantizer.split_indices(indices)), indices)
    entries = quantizer.get_codebook_entry(indices.flatten())
    tokens = z_q.permute(0, 2, 3, 1) if len(shape) == 4 else z_q
    assert torch.equal(entries.view(tokens.shape), tokens)


@pytest.mark.parametrize("name", NAMES)
def test_both_layouts_are_the_same_tokens(name):
    quantizer = build(name)
    z = torch.randn(2, DIM, 3, 3)
    quantizer(z)
    quantizer.eval()
    z_q, _, indices = quantizer(z)
    z_q2, _, indices2 = quantizer(z.flatten(2).transpose(1, 2))
    assert torch.equal(indices.flatten(1), indices2)
    assert torch.equal(z_q.flatten(2).transpose(1, 2), z_q2)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_the_input(name, mode):
    quantizer = build(name).train(mode)
    z = torch.randn(2, DIM, 3, 3, requires_grad=True)
    quantizer(z)[0].square().sum().backward()
    assert (z.grad.abs().amax(1) > 0).all()


@pytest.mark.parametrize("name", [name for name in NAMES if "fsq" in name or "simvq" in name])
def test_parameters_have_the_same_gradient_in_eval_mode(name):
    quantizer = build(name)
    z = torch.randn(2, DIM, 3, 3)
    gradients = []
    for mode in (True, False):
        quantizer.train(mode).zero_grad()
        z_q, loss, _ = quantizer(z)
        (z_q.square().sum() + loss).backward()
        gradients.append([p.grad.clone() for p in quantizer.parameters() if p.requires_grad])
    for in_training, in_eval in zip(*gradients):
        assert in_training.abs().sum() > 0 and torch.allclose(in_training, in_eval, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_autocast_changes_nothing(name):
    quantizer = build(name)
    z = torch.randn(4, DIM, 4, 4)
    quantizer(z)
    quantizer.eval()
    expected = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        z_q, loss, indices = quantizer(z)
        codes = quantizer.indices_to_codes(indices)
    assert torch.equal(z_q, expected[0]) and torch.equal(indices, expected[2]) and torch.equal(codes, z_q)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@settings(deadline=None, max_examples=60, derandomize=True)  # the same examples in each run
@given(levels=st.lists(st.integers(2, 9), min_size=1, max_size=5), batch=st.integers(1, 3), height=st.integers(1, 4),
       width=st.integers(1, 4), extra=st.integers(0, 9), image=st.booleans(), dtype=st.sampled_from(DTYPES),
       scale=st.floats(0, 1e4), name=st.sampled_from(NAMES), codebooks=st.integers(2, 3), seed=st.integers(0, 2**31))
@example(levels=[4], batch=1, height=1, width=1, extra=0, image=False, dtype=torch.float64, scale=1.2e-38,
         name="ema_vq", codebooks=2, seed=0)
def test_properties_for_all_shapes_levels_and_types(levels, batch, height, width, extra, image, dtype, scale, name,
                                                    codebooks, seed):
    torch.manual_seed(seed)
    dim = max(len(levels), 4) + extra
    *combine, kind = name.split()
    several = {"codebooks": codebooks, "combine": combine[0]} if combine else {}
    if combine:
        dim, levels = dim * codebooks, levels[:3]
    code_dim = (len(levels) + 1) * several.get("codebooks", 1)
    options = {"fsq": {"levels": levels}, "simvq": {"codebook_size": math.prod(levels), "code_dim": code_dim},
               "ema_vq": {"codebook_size": math.prod(levels)}, "ddcl": {"delta": 1 / levels[0]}}[kind]
    quantizer = build_quantizer(kind, dim, **options, **several)
    quantizer.random_depth = 0.5 * (combine == ["residual"])
    shape = (batch, dim, height, width) if image else (batch, height * width, dim)
    z = (torch.randn(shape) * scale).to(dtype).clamp(-6e4, 6e4).requires_grad_()
    for mode in (True, False):
        z_q, loss, indices = quantizer.train(mode)(z)
        assert z_q.shape == shape and z_q.dtype == torch.float32 and indices.dtype == torch.int64
        assert indices.shape == ((batch, height, width) if image else (batch, height * width))
        assert 0 <= indices.min() and indices.max() < quantizer.codebook_size
        assert loss >= 0 and loss.isfinite() and z_q.isfinite().all()
    codes = quantizer.indices_to_codes(indices)
    assert torch.equal(z_q, codes)
    order = torch.randperm(batch)
    back, reordered = quantizer.codes_to_indices(codes), quantizer(z[order])[2]  # images do not affect each other
    if name in EXACT:
        assert torch.equal(back, indices) and torch.equal(reordered, indices[order])
    else:  # another index only of a code that is equal, or so near that squared distances in fp32 are equal
        channels = 1 if image else 2
        for actual, expected in ((back, codes), (reordered, codes[order])):
            distance = (quantizer.indices_to_codes(actual) - expected).norm(dim=channels)
            assert (distance <= 1e-3 * expected.norm(dim=channels) + 1e-18).all()
    gradient, = torch.autograd.grad(z_q.square().sum() + loss, z)
    assert gradient.shape == z.shape and gradient.isfinite().all()


@pytest.mark.parametrize("name, options, message", [
    ("fsp", {}, "quantizer"), ("fsq", {"levels": [8, 1]}, "levels"), ("fsq", {"levels": []}, "levels"),
    ("fsq", {"levels": [2**17]}, "levels"), ("fsq", {"levels": 512}, "levels"), ("fsq", {"levels": [64] * 6}, "levels"),
    ("fsq", {"levels": [3] * 40}, "levels|dim"), ("simvq", {"codebook_size": 1}, "codebook_size"),
    ("simvq", {"codebook_size": 64.0}, "codebook_size"), ("simvq", {"code_dim": 0}, "code_dim"),
    ("simvq", {"code_dim": 1}, "code_dim = 1, allowed: a whole number of 2 or more"),
    ("simvq", {"dim": 1}, "code_dim = 1"), ("ema_vq", {"codebook_size": 0}, "codebook_size"),
    ("ema_vq", {"code_dim": 0}, "code_dim"), ("ema_vq", {"code_dim": 8.0}, "code_dim"),
    ("ema_vq", {"decay": 1.0}, "decay"), ("ema_vq", {"decay": "0.9"}, "decay"),
    ("ema_vq", {"commitment_cost": None}, "commitment_cost"), ("ddcl", {"comm_weight": "1"}, "comm_weight"),
    ("ddcl", {"delta": None}, "delta"), ("ddcl", {"comm_weight": math.inf}, "comm_weight"),
    ("ddcl", {"delta": 0.3}, "delta"), ("ddcl", {"delta": 0}, "delta"),
    ("ddcl", {"delta": 1 / 33}, "delta"), ("ddcl", {"comm_weight": -1}, "comm_weight"),
    ("ema_vq", {"codebooks": 0}, "codebooks = 0"), ("ema_vq", {"codebooks": 2.0}, "codebooks = 2.0"),
    ("simvq", {"codebooks": 5}, r"codebooks = 5, allowed: fewer than 2\*\*63 codes in all, of 16,384 each"),
    ("ema_vq", {"codebooks": 10**9}, "codebooks = 1000000000"), ("fsq", {"codebooks": 6}, "codebooks = 6, .*levels"),
    ("fsq", {"codebooks": 62, "levels": [2]}, "codebooks = 62, .*levels"),
    ("ddcl", {"codebooks": 2}, "codebooks = 2, allowed: 1"), ("none", {"codebooks": 2}, "codebooks = 2, allowed: 1"),
    ("ema_vq", {"codebooks": 2, "combine": "sum"}, "combine = 'sum', allowed: \"residual\", \"product\""),
    ("fsq", {"codebooks": 2, "combine": "product"}, "combine = 'product', allowed: \"residual\""),
    ("ema_vq", {"codebooks": 3, "combine": "product"}, "code_dim = 32, .*a multiple of codebooks = 3"),
    ("simvq", {"codebooks": 3, "combine": "product", "code_dim": 8}, "code_dim = 8, .*a multiple of codebooks = 3"),
    ("simvq", {"codebooks": 8, "combine": "product", "code_dim": 8, "codebook_size": 4}, "code_dim = 1, "),
    ("ema_vq", {"codebooks": 2, "code_dim": 0}, "code_dim = 0"),
    ("ema_vq", {"codebooks": 2, "code_dim": "8"}, "code_dim = '8'"),
    ("fsq", {"codebooks": 2, "levels": 8}, "levels = 8"),
])
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        build_quantizer(name, **{"dim": DIM} | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_indices_of_all_integer_types(name):  # they are stored in few bytes
    quantizer = build(name)
    expected = quantizer.get_codebook_entry(torch.arange(9))
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int32):
        assert torch.equal(quantizer.get_codebook_entry(torch.arange(9).to(dtype)), expected)
    with pytest.raises(ValueError, match=r"range of indices = \(-1, 5\), allowed: 0 to \d+$"):
        quantizer.get_codebook_entry(torch.tensor([-1, 5], dtype=torch.int16))


@pytest.mark.parametrize("name", NAMES)
def test_weights_in_another_type_are_refused(name):
    with pytest.raises(ValueError, match=r"weights = {torch.bfloat16}, allowed: torch.float32"):
        build(name).bfloat16()(torch.randn(2, 9, DIM))


def test_straight_through_is_exact():
    z, codes = torch.randn(1000, requires_grad=True), torch.randn(1000) * 1e3
    out = straight_through(z, codes)
    assert torch.equal(out, codes)
    out.sum().backward()
    assert torch.equal(z.grad, torch.ones(1000))


@pytest.mark.parametrize("fast, cpu", [
    (True, {"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}),
    (False, {"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}),
    (True, {"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}),
    (False, {"cpu_name": "AMD EPYC", "avx512_bf16": False, "amx_bf16": False}),
    (False, {"cpu_name": "Apple M1", "neon": True})])
def test_bf16_is_fast_where_there_are_fast_units_for_it(fast, cpu, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert fast_bf16("cpu") is fast


def test_search_is_in_bf16_only_where_that_is_fast(monkeypatch):
    types, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: types.append(args[1].dtype) or addmm(*args, **kwargs))
    for fast, width, expected in ((True, 128, torch.bfloat16), (False, 128, torch.float32), (True, 64, torch.float32)):
        monkeypatch.setattr("quantizers.fast_bf16", lambda device: fast)
        types.clear()
        nearest_code(torch.randn(10, width), torch.randn(20, width))
        assert types[0] == expected


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("count", [30, 1024])
def test_nearest_code(count, exact):
    x, codebook = torch.randn(3000, 8), torch.randn(count, 8) * torch.rand(count, 1)  # several chunks of tokens
    assert torch.equal(nearest_code(x, codebook, exact), torch.cdist(x, codebook).argmin(1))


def codebooks_by_cells():
    """By name, tokens and codes for search_by_cells, and which share of the codes it may look at."""
    torch.manual_seed(0)
    tokens, codes = torch.randn(2, 9000, 3)  # more than one piece of the tokens
    yield "cells tell codes apart", tokens, codes, 0.3
    yield "every code is in reach of some token", torch.randn(600, 32), torch.randn(5000, 32), 1.1
    yield "codes that are equal", tokens[:600], codes[:50].repeat(100, 1), 1.1
    yield "all codes are equal", tokens[:600], codes[:1].repeat(5000, 1), 1.1
    yield "far from the origin", tokens + 1000, codes + 1000, 0.3
    far = codes.clone()
    far[-1] = 1e5
    yield "a far code", torch.cat([tokens, far[-1:]]), far, 1.1
    yield "tokens are codes", codes, codes, 0.3
    yield "double precision", tokens.double(), codes.double(), 0.3
    crowded = torch.randn(20480, 3)
    crowded[::512] = 3 + 1e-4 * torch.randn(40, 3)
    yield "centres that nearly coincide", tokens, crowded, 1.1
    border = torch.zeros(4096, 1)
    border[::512, 0] = 1.45 * torch.tensor([1, 0.99, 0.98, 0.97, 0.96, -1, -1 + 2.6e-5, -1 + 5.2e-5])
    border[1], border[2] = -1.4231109619140625, -1.4156
    yield "a code on the border of cells", border[1:2].repeat(512, 1), border, 1.1


@pytest.mark.parametrize("case", [*codebooks_by_cells()], ids=lambda case: case[0])
def test_search_by_cells_finds_what_an_exhaustive_search_finds(case, monkeypatch):
    _, x, codebook, share = case
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: products.append(len(a) * b.shape[1]) or mm(a, b, out=out))
    found = nearest_code(x, codebook)
    assert 0 < sum(products) <= share * len(x) * len(codebook)
    distances = torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    excess = distances.gather(1, found[:, None])[:, 0] - distances.amin(1)
    origin = codebook.median(0).values
    rounding = (x - origin).square().sum(1) + (codebook - origin).square().sum(1).median()
    assert (excess <= 1e-6 * rounding).all()


def test_search_by_cells_is_exact_under_autocast():
    x, codebook = torch.randn(9000, 2), torch.randn(40000, 2)
    expected = nearest_code(x, codebook)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_code(x, codebook), expected)


@pytest.mark.parametrize("bf16", [True, False])
def test_nearest_of_codes_prepared_in_several_pieces(bf16):
    codebook = torch.randn(1100, 1024)
    x = codebook[::10]
    assert torch.equal(nearest_code(x, codebook, bf16=bf16), torch.arange(0, 1100, 10))


def nearest_in_fp64(x, codebook):
    return torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


@pytest.mark.parametrize("length, mean", [(None, 0), (20, 0), (20, 100)])
def test_bf16_search_of_wide_codes_is_that_of_fp64(length, mean):
    codebook, x = torch.randn(2048, 256), torch.randn(500, 256)
    if length is None:
        codebook, x = F.normalize(codebook, dim=-1), F.normalize(x, dim=-1)
    else:
        codebook, x = codebook * length + mean, x * length + mean
    expected = nearest_in_fp64(x, codebook)
    rounded = (x.bfloat16() @ codebook.bfloat16().T - codebook.bfloat16().square().sum(1) / 2).argmax(1)
    assert (rounded != expected).any()  # a search in bf16 alone is wrong for some tokens
    assert torch.equal(nearest_code(x, codebook, bf16=True), expected)
    assert search_bf16(x, codebook)[1].float().mean() > 0.9  # and hardly any token is searched again


def test_tokens_whose_nearest_code_bf16_may_hide_are_searched_in_fp32(monkeypatch):
    centres = torch.randn(20, 1, 256)
    crowds = (centres + 0.01 * torch.randn(20, 50, 256)).flatten(0, 1)  # of fifty nearly equal codes each
    codebook = torch.cat([crowds, torch.randn(200, 256)])
    x = torch.cat([codebook[1000:], (centres + 0.01 * torch.randn(20, 10, 256)).flatten(0, 1)])
    x = x + 0.001 * torch.randn(x.shape)
    calls, search = [], quantizers.search_fp32
    monkeypatch.setattr(quantizers, "search_fp32", lambda x, *args, **kw: calls.append(x) or search(x, *args, **kw))
    assert torch.equal(nearest_code(x, codebook, bf16=True), nearest_in_fp64(x, codebook))
    assert len(calls) == 1 and torch.equal(calls[0], x[200:])  # the tokens in a crowd, and no others


def test_rounding_that_hides_the_nearest_code_is_noticed():
    # the worst case for bf16: all numbers of the tokens and of some codes are half-way between two bf16 numbers
    half_way = 1 + 2**-8
    token = torch.zeros(192)
    token[:128], token[128] = half_way, 1
    x = torch.stack([token, -token])

    def code(first, second):
        c = torch.zeros(192)
        c[:128], c[128] = first, second
        c[129] = (133 - c.square().sum()).sqrt()
        return c

    others = [code(1.0, 0.6953125 - i / 1000) for i in range(9)]
    codes = torch.stack([*others, code(half_way, 0.484375)])
    codebook = torch.cat([codes, -codes])
    assert torch.equal(nearest_code(x, codebook, bf16=True), nearest_in_fp64(x, codebook))


@pytest.mark.parametrize("codes, width", [(100, 8), (1024, 64), (512, 256)])
@pytest.mark.parametrize("options", [{"bf16": False}, {"bf16": False, "exact": True}, {"bf16": True}])
def test_far_codes_and_far_tokens_do_not_change_the_nearest_code_of_others(codes, width, options):
    codebook, x = torch.randn(codes, width), torch.randn(200, width)
    codebook[-1] = 1e5
    assert torch.equal(nearest_code(x, codebook, **options), nearest_in_fp64(x, codebook))
    assert torch.equal(nearest_code(codebook[:90], codebook, **options), torch.arange(90))
    x = torch.cat([codebook[:4], codebook[-1:]])  # one token of five is far: so is the mean of the tokens
    assert torch.equal(nearest_code(x, codebook, **options), torch.tensor([0, 1, 2, 3, codes - 1]))


def test_ema_vq_round_trip_with_a_far_code():
    quantizer = EMAVQ(16, codebook_size=1024).eval()
    quantizer.vq._codebook.embed[0, -1] = 3e4
    indices = torch.tensor([[0, 1, 2, 3, 1023]])
    assert torch.equal(quantizer.codes_to_indices(quantizer.indices_to_codes(indices)), indices)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e300, 1e18, -1e18])
def test_values_that_are_not_finite_or_too_large_are_refused(value):
    z = torch.zeros(1, 4, DIM, dtype=torch.float64)
    z[0, 2, 3] = value
    with pytest.raises(ValueError, match="range of z = .*, allowed: -1e12 to 1e12, no NaN or infinity"):
        build("fsq")(z)


@pytest.mark.parametrize("name", NAMES)
def test_results_are_finite_up_to_the_largest_input(name):
    quantizer = build(name)
    z = torch.randn(8, 64, DIM).sign() * 1e12
    for mode in (True, False):
        z_q, loss, indices = quantizer.train(mode)(z)
        assert loss.isfinite() and z_q.isfinite().all()
    assert quantizer.indices_to_codes(indices).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# FSQ


@pytest.mark.parametrize("levels, size", [([8, 8, 8, 5, 5, 5], 64000), ([8, 8, 8], 512), ([8, 6, 5], 240),
                                          ([7, 5, 5, 5], 875), ([8, 5, 5, 5], 1000), ([8, 6, 6, 5], 1440)])
def test_fsq_sizes(levels, size):
    assert build_quantizer("fsq", 16, levels=levels).codebook_size == size


@pytest.mark.parametrize("levels", [[200] * 3, [2**16]])
def test_fsq_indices_are_exact_with_millions_of_codes(levels):
    fsq = FSQ(len(levels), levels=levels)
    indices = torch.randint(fsq.codebook_size, (1, 20000))
    indices[0, :2] = torch.tensor([0, fsq.codebook_size - 1])
    codes = fsq.indices_to_codes(indices)
    assert torch.equal(fsq.codes_to_indices(codes), indices)
    inside = codes.mul(1 - 1e-6).double().atanh().float()  # so that tanh is nearest to the same level
    assert levels == [2**16] or torch.equal(fsq(inside)[2], indices)


def test_fsq_rounds_to_the_nearest_of_evenly_spaced_symmetric_levels():
    fsq = FSQ(2, levels=[8, 5])
    z = torch.randn(4, 500, 2) * 2
    z_q = fsq(z)[0]
    for channel, values in enumerate([torch.arange(8) - 3.5, torch.arange(5) - 2.0]):
        values = values / values.max()
        nearest = (torch.tanh(z[..., channel, None]) - values).abs().argmin(-1)
        assert torch.allclose(z_q[..., channel], values[nearest], atol=1e-6)
        assert nearest.unique().numel() == len(values)


def test_fsq_gradient_is_that_of_tanh():
    fsq = FSQ(2, levels=[8, 5])
    z = torch.randn(1, 100, 2, requires_grad=True)
    fsq(z)[0].sum().backward()
    assert torch.allclose(z.grad, 1 - torch.tanh(z.detach()) ** 2, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# SimVQ


def test_simvq_against_its_definition():
    simvq = SimVQ(DIM, codebook_size=40, code_dim=6)
    z = torch.randn(1, 30, DIM)
    z_q, loss, indices = simvq(z)
    codes = F.normalize(simvq.simvq.frozen_codebook @ simvq.simvq.code_transform.weight.T, dim=-1)
    x = F.normalize(z[0] @ simvq.project_in.weight.T + simvq.project_in.bias, dim=-1)
    cosine = x @ codes.T
    assert torch.equal(indices[0], cosine.argmax(1))
    assert torch.allclose(z_q[0], simvq.project_out(codes[cosine.argmax(1)]), atol=1e-6)
    assert torch.allclose(loss, 1.25 * (2 - 2 * cosine.max(1).values).mean(), atol=1e-6)


def test_simvq_indices_are_the_librarys():
    simvq = SimVQ(DIM, codebook_size=40)

    class Normalized(nn.Module):
        def forward(self, codes):
            return F.normalize(simvq.simvq.code_transform(codes), dim=-1)

    library = LibrarySimVQ(DIM, 40, codebook_transform=Normalized())
    library.frozen_codebook.copy_(simvq.simvq.frozen_codebook)
    z = torch.randn(3, 20, DIM)
    _, indices, _ = library(F.normalize(simvq.project_in(z), dim=-1))
    assert torch.equal(simvq(z)[2], indices)


def test_simvq_learns_its_matrix_and_not_its_frozen_codebook():
    simvq = SimVQ(DIM, codebook_size=40, code_dim=6)
    z = torch.randn(2, 9, DIM)
    learned = simvq.simvq.code_transform.weight, simvq.project_in.weight
    z_q, loss, indices = simvq(z)
    gradients = torch.autograd.grad(z_q.square().sum() + loss, learned)

    codes = F.normalize(simvq.simvq.frozen_codebook @ learned[0].T, dim=-1)[indices]
    x = F.normalize(simvq.project_in(z), dim=-1)
    z_q = simvq.project_out(codes.detach() + x - x.detach())
    loss = (codes - x.detach()).square().sum(-1).mean() + 0.25 * (x - codes.detach()).square().sum(-1).mean()
    for gradient, expected in zip(gradients, torch.autograd.grad(z_q.square().sum() + loss, learned)):
        assert gradient.abs().sum() > 0 and torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    assert "simvq.frozen_codebook" in dict(simvq.named_buffers())
    assert not simvq.simvq.frozen_codebook.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# EMA-VQ


def ema_vq(**options):
    quantizer = EMAVQ(6, codebook_size=10, revive=False, **options)
    return quantizer, quantizer.vq._codebook


def test_ema_update_and_laplace_smoothing_follow_the_formula():
    quantizer, book = ema_vq(decay=0.9)
    x = torch.randn(50, 6)
    sizes, sums, before = book.cluster_size[0].clone(), book.embed_avg[0].clone(), quantizer.vq.codebook.clone()
    z_q, loss, indices = quantizer(x[None])
    nearest = torch.cdist(x, before).argmin(1)
    assert torch.equal(indices[0], nearest)
    assert torch.equal(z_q[0].detach(), before[nearest])
    assert torch.allclose(loss, 0.25 * (x - before[nearest]).square().mean())
    n = torch.tensor([(nearest == k).sum() for k in range(10)])
    m = torch.stack([x[nearest == k].sum(0) for k in range(10)])
    sizes, sums = 0.9 * sizes + 0.1 * n, 0.9 * sums + 0.1 * m
    smoothed = (sizes + 1e-5) / (sizes.sum() + 10 * 1e-5) * sizes.sum()
    assert torch.allclose(quantizer.vq.codebook, sums / smoothed[:, None], atol=1e-6)


def test_ema_update_is_the_librarys():
    quantizer, book = ema_vq(decay=0.8)
    library = VectorQuantize(6, 10, decay=0.8, threshold_ema_dead_code=0)
    library._codebook.load_state_dict(book.state_dict())
    for _ in range(3):
        z = torch.randn(2, 30, 6)
        _, _, indices = quantizer(z)
        _, expected, _ = library(z)
        assert torch.equal(indices, expected)
        assert torch.allclose(quantizer.vq.codebook, library.codebook, atol=1e-6)


def test_ema_codebook_does_not_change_in_eval_mode():
    quantizer, _ = ema_vq()
    before = quantizer.vq.codebook.clone()
    quantizer.eval()(torch.randn(1, 50, 6))
    assert torch.equal(quantizer.vq.codebook, before)


def test_ema_revives_no_two_codes_at_one_token():
    quantizer = EMAVQ(6, codebook_size=100)
    for step in range(4):
        z = torch.randn(1, 30, 6)
        quantizer(z)
        is_token = (quantizer.vq.codebook[:, None] == z).all(-1)  # (codes, tokens)
        assert is_token.sum(0).max() == 1 and (is_token.sum() == 30 or step > 1)
    assert quantizer.vq._codebook.cluster_size.min() >= 0.1 * 30 / 100  # by now all have been revived


def test_ema_dead_codes_start_again_at_tokens():
    quantizer = EMAVQ(6, codebook_size=10)
    z = torch.randn(1, 200, 6) + 50  # far from all codes
    quantizer(z)
    is_token = (quantizer.vq.codebook[:, None] == z).all(-1).any(1)
    assert is_token.sum() >= 9  # all but the one that was nearest to all tokens
    for _ in range(5):
        indices = quantizer(z)[2]
    assert indices.unique().numel() == 10
    quantizer.vq._codebook.embed_avg[0, 3] = 1e4  # a code far from all tokens: its usage decays until it is revived
    quantizer.vq._codebook.update_ema()
    with torch.no_grad():
        for _ in range(400):
            quantizer(z)
    assert quantizer.vq.codebook.max() < 100


def test_a_revived_code_soon_is_the_mean_of_its_tokens():
    """It starts with a fifth of the average usage, so that the tokens of the first steps have most of the weight."""
    quantizer = EMAVQ(6, codebook_size=10)
    quantizer(torch.randn(1, 1000, 6))
    assert torch.allclose(quantizer.vq._codebook.cluster_size, torch.tensor(100 / 5))
    z = torch.randn(1, 200, 6).repeat(1, 5, 1)
    codes = quantizer.vq.codebook.clone()
    for _ in range(25):
        quantizer(z)
    indices = quantizer(z)[2]
    means = torch.stack([z[indices == i].mean(0) for i in range(10)])
    left = (quantizer.vq.codebook - means).norm(dim=1) / (codes - means).norm(dim=1)
    assert left.nanmedian() < 0.6  # 0.48; with the average usage it would be 0.75


# ---------------------------------------------------------------------------------------------------------------------
# DDCL


def ddcl_plain(**options):
    """DDCL without projections: z -> tanh -> quantized."""
    quantizer = DDCL(4, **options)
    for linear in (quantizer.project_in, quantizer.project_out):
        nn.init.eye_(linear.weight), nn.init.zeros_(linear.bias)
    return quantizer


def test_ddcl_error_is_uniform_and_independent_of_the_input():
    quantizer = ddcl_plain()
    z = torch.randn(1, 20_000, 4) * 0.5
    error = (quantizer(z)[0] - torch.tanh(z)) / quantizer.delta
    assert error.abs().max() <= 0.5 + 1e-4
    assert abs(error.mean()) < 0.01 and abs(error.var() - 1 / 12) < 0.002
    assert abs(torch.corrcoef(torch.stack([error.flatten(), torch.tanh(z).flatten()]))[0, 1]) < 0.02


def test_ddcl_gradient_is_that_of_the_expectation():
    # E f(x + e) for f(x) = x^3, e uniform on (-d/2, d/2), is x^3 + x d^2 / 4: its derivative is 3 x^2 + d^2 / 4
    quantizer = ddcl_plain(delta=1 / 2)
    z = torch.full((1, 200_000, 4), 0.3, requires_grad=True)
    quantizer(z)[0].pow(3).sum().backward()
    x = math.tanh(0.3)
    expected = (3 * x**2 + 0.25 / 4) * (1 - x**2)
    assert abs(z.grad.mean().item() - expected) < 2e-3


def test_ddcl_loss_bounds_the_expected_length_of_the_message():
    quantizer = ddcl_plain(comm_weight=0.5)
    z = torch.randn(1, 9, 4)
    bits = torch.log2(2 * torch.tanh(z).abs() * 15 + 1).sum(-1).mean()
    assert torch.allclose(quantizer(z)[1], 0.5 * bits)
    indices = quantizer(z.expand(20_000, -1, -1))[2]  # of message m: one of the two integers next to x / delta
    message = indices[..., None] // quantizer.basis % 31 - 15
    assert torch.allclose(message.abs().double().mean(0), torch.tanh(z[0]).abs().double() * 15, atol=0.02)  # E|m|
    length = torch.log2(2 * message.abs() + 1).sum(-1).mean()
    assert 0.9 * bits < length < bits


def test_ddcl_eval_rounds_without_dither():
    quantizer = ddcl_plain().eval()
    z = torch.randn(1, 100, 4)
    z_q, _, indices = quantizer(z)
    message = (torch.tanh(z) * 15).round()
    assert torch.allclose(z_q, message / 15, atol=1e-6)
    digits = (message + 15).long()
    assert torch.equal(indices, digits[..., 0] + 31 * digits[..., 1] + 31**2 * digits[..., 2] + 31**3 * digits[..., 3])
    assert quantizer.codebook_size == 31**4


def test_ddcl_draws_new_noise_in_each_training_step():
    quantizer = ddcl_plain()
    z = torch.randn(1, 100, 4)
    assert not torch.equal(quantizer(z)[0], quantizer(z)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Several codebooks


def several(kind, dim, **options):
    """Two codebooks on all channels, without projections, whose codes are far enough apart for every library."""
    return build_quantizer(kind, dim, **{"codebooks": 2, "codebook_size": 20} | options)


@pytest.mark.parametrize("codebooks", [2, 3])
def test_residual_codebooks_are_the_librarys(codebooks):
    quantizer = several("ema_vq", 6, codebooks=codebooks, revive=False, decay=0.8)
    library = ResidualVQ(dim=6, num_quantizers=codebooks, codebook_size=20, decay=0.8, threshold_ema_dead_code=0)
    for part, layer in zip(quantizer.parts, library.layers):
        layer._codebook.load_state_dict(part.vq._codebook.state_dict())
    for mode in (True, True, False):  # two updates of the codebooks
        z = torch.randn(2, 30, 6)
        z_q, loss, indices = quantizer.train(mode)(z)
        expected, digits, losses = library.train(mode)(z)
        assert torch.equal(quantizer.split_indices(indices), digits)
        assert torch.allclose(z_q, expected, atol=1e-6)
        assert not mode or torch.allclose(loss, 0.25 * losses.sum(), atol=1e-6)
    assert torch.allclose(quantizer.indices_to_codes(indices), library.get_output_from_indices(digits), atol=1e-6)
    library.quantize_dropout = True  # or else it refuses to leave codebooks out
    for k in quantizer.depths:
        expected = library.get_output_from_indices(digits[..., :k])
        assert torch.allclose(quantizer.indices_to_codes(indices, codebooks=k), expected, atol=1e-6)


def test_product_codebooks_are_the_librarys():
    quantizer = several("ema_vq", 6, combine="product", revive=False, decay=0.8)
    library = GroupedResidualVQ(dim=6, groups=2, num_quantizers=1, codebook_size=20, decay=0.8,
                                threshold_ema_dead_code=0)
    for part, residual in zip(quantizer.parts, library.rvqs):
        residual.layers[0]._codebook.load_state_dict(part.vq._codebook.state_dict())
    for mode in (True, True, False):
        z = torch.randn(2, 30, 6)
        z_q, loss, indices = quantizer.train(mode)(z)
        expected, digits, losses = library.train(mode)(z)
        assert torch.equal(quantizer.split_indices(indices), digits[..., 0].permute(1, 2, 0))
        assert torch.allclose(z_q, expected, atol=1e-6)
        assert not mode or torch.allclose(loss, 0.25 * losses.sum(), atol=1e-6)


@pytest.mark.parametrize("codebooks", [2, 3])
def test_residual_fsq_is_the_librarys(codebooks):
    quantizer = build_quantizer("fsq", 3, levels=[8, 5, 2], codebooks=codebooks)
    library = ResidualFSQ(levels=[8, 5, 2], dim=3, num_quantizers=codebooks)
    z = torch.randn(4, 500, 3)
    z_q, _, indices = quantizer(z)
    expected, digits = library(z)
    assert torch.equal(quantizer.split_indices(indices), digits.long())
    assert torch.allclose(z_q, expected, atol=1e-6)


def test_residual_fsq_is_an_fsq_of_more_levels():
    quantizer = build_quantizer("fsq", 2, levels=[8, 5], codebooks=2)
    z = torch.randn(1, 500, 2) * 2
    z_q, _, indices = quantizer(z)
    digits = quantizer.split_indices(indices, (8, 5) * 2).view(1, 500, 2, 2)  # (stage, number)
    for channel, n in enumerate((8, 5)):
        edge = n / (n - 1)
        fine = ((torch.tanh(z[..., channel] / edge) + 1) / 2 * n**2).long()  # 64 and 25 cells of one width
        assert torch.equal(digits[..., 0, channel] * n + digits[..., 1, channel], fine)
        assert torch.allclose(z_q[..., channel], edge * ((2 * fine + 1) / n**2 - 1), atol=1e-6)
    assert fine.unique().numel() == 25


def test_residual_simvq_against_its_definition():
    quantizer = build_quantizer("simvq", DIM, codebook_size=40, code_dim=6, codebooks=2)
    z = torch.randn(1, 30, DIM)
    with torch.no_grad():
        quantizer.scales.copy_(torch.tensor([[0.9], [0.4]]))
    z_q, loss, indices = quantizer(z)
    x = F.normalize(quantizer.project_in(z[0]), dim=-1)
    total, losses = torch.zeros_like(x), 0
    for part, scale, digit in zip(quantizer.parts, (0.9, 0.4), quantizer.split_indices(indices[0]).unbind(-1)):
        codes = F.normalize(part.simvq.frozen_codebook @ part.simvq.code_transform.weight.T, dim=-1)
        nearest = torch.cdist(x - total, scale * codes).argmin(1)  # codes of one length: also the most similar
        assert torch.equal(digit, nearest)
        losses = losses + 1.25 * (F.normalize(x - total, dim=-1) - codes[nearest]).square().sum(-1).mean()
        total = total + scale * codes[nearest]
    assert torch.allclose(z_q[0], quantizer.project_out(total), atol=1e-6) and torch.allclose(loss, losses, atol=1e-5)
    gradient, = torch.autograd.grad(z_q.square().sum(), quantizer.scales)
    assert (gradient.abs() > 0).all()


def test_digits_of_an_index():
    quantizer = several("ema_vq", 4, codebooks=3, codebook_size=10)
    indices = torch.tensor([[0, 7], [123, 999]])
    assert quantizer.codebook_sizes == (10, 10, 10) and quantizer.codebook_size == 1000
    assert quantizer.split_indices(indices).tolist() == [[[0, 0, 0], [7, 0, 0]], [[3, 2, 1], [9, 9, 9]]]
    assert torch.equal(quantizer.join_indices(quantizer.split_indices(indices).to(torch.uint8)), indices)
    for wrong in ([[0, 0, 10]], [[-1, 0, 0]], [[0, 0]], [[0, 0, 0, 0]], [[]]):
        with pytest.raises(ValueError, match=r"digits = .*allowed: \(..., 3\), each below \(10, 10, 10\)") as error:
            quantizer.join_indices(torch.tensor(wrong, dtype=torch.int64))
        assert "\n" not in str(error.value)
    fsq = FSQ(3, levels=[8, 6, 5])
    levels = fsq.split_indices(torch.arange(240), (8, 6, 5))
    assert fsq.codebook_sizes == (240,) and torch.equal(levels, fsq.fsq.indices_to_level_indices(torch.arange(240)))
    assert torch.equal(fsq.join_indices(levels, (8, 6, 5)), torch.arange(240))


@pytest.mark.parametrize("name", NAMES)
def test_first_codebooks_alone(name):
    quantizer = build(name).eval()
    indices = torch.randint(quantizer.codebook_size, (2, 3, 4))
    if not name.startswith("residual"):
        with pytest.raises(ValueError, match="codebooks = 1, allowed: None"):
            quantizer.indices_to_codes(indices, codebooks=1)
        return
    first, both = (quantizer.indices_to_codes(indices, codebooks=k) for k in (1, 2))
    assert torch.equal(both, quantizer.indices_to_codes(indices)) and not torch.equal(first, both)
    assert torch.equal(first, quantizer.indices_to_codes(indices % quantizer.codebook_sizes[0], codebooks=1))
    codes = quantizer.parts[0].get_codebook_entry(quantizer.split_indices(indices)[..., 0].flatten())
    expected = quantizer.project_out(quantizer.scales[0] * codes).view(2, 3, 4, DIM).permute(0, 3, 1, 2)
    assert torch.equal(first, expected)
    for wrong in (0, 3, -1, "all"):
        with pytest.raises(ValueError, match=rf"codebooks = {wrong!r}, allowed: None.*\[1, 2\]"):
            quantizer.indices_to_codes(indices, codebooks=wrong)


def test_each_codebook_makes_the_error_smaller():
    for kind, options in (("ema_vq", {"codebook_size": 16}), ("fsq", {"levels": [4, 4, 4, 4]})):
        quantizer = build_quantizer(kind, 4, codebooks=3, **options)
        for _ in range(100):
            quantizer(torch.randn(1, 500, 4))
        z = torch.randn(1, 500, 4)
        indices = quantizer.eval()(z)[2]
        target = torch.tanh(z * 0.75) / 0.75 if kind == "fsq" else z
        errors = [(quantizer.indices_to_codes(indices, codebooks=k) - target).square().mean() for k in (1, 2, 3)]
        assert errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1]


def test_random_depth_is_drawn_for_each_image_and_only_in_training():
    quantizer = several("ema_vq", 8, codebooks=3, revive=False)
    quantizer.random_depth = 0.5
    z = torch.randn(400, 8, 2, 2)
    before = [part.vq._codebook.cluster_size.sum() for part in quantizer.parts]
    tables = [part.vq.codebook.clone() for part in quantizer.parts]
    z_q, _, indices = quantizer(z)
    depth = torch.zeros(400, dtype=torch.int64)
    x, total = z.permute(0, 2, 3, 1), torch.zeros(400, 2, 2, 8)
    for i, table in enumerate(tables):
        codes = table[torch.cdist((x - total).reshape(-1, 8), table).argmin(1)].view(x.shape)
        total = total + codes
        same = (z_q.permute(0, 2, 3, 1) - total).abs().flatten(1).amax(1) < 1e-5
        depth[same] = i + 1
    assert (depth > 0).all() and depth[0] == 3  # all tokens of an image have its depth
    shares = depth.bincount(minlength=4)[1:] / 400
    assert torch.allclose(shares, torch.tensor([1, 1, 4]) / 6, atol=0.08)
    for i, (part, size) in enumerate(zip(quantizer.parts, before)):  # the others' tokens do not move the codebook
        tokens = 4 * (depth > i).sum()
        assert torch.allclose(part.vq._codebook.cluster_size.sum(), 0.99 * size + 0.01 * tokens, rtol=1e-4)
    assert (quantizer.split_indices(indices)[depth == 1][..., 1:] == 0).all()
    quantizer.eval()
    z_q, _, indices = quantizer(z)
    quantizer.random_depth = 0.0
    assert torch.equal(quantizer(z)[0], z_q)


def test_random_depth_1_uses_each_number_of_codebooks_equally():
    for name in ("residual fsq", "residual simvq"):
        quantizer = build(name)
        quantizer.random_depth = 1.0
        z = torch.randn(300, 1, DIM)
        full = build(name)
        full.load_state_dict(quantizer.state_dict())
        same = torch.isclose(full(z)[0], quantizer(z)[0], atol=1e-6).all(-1)
        assert 0.4 < same.float().mean() < 0.6


@pytest.mark.parametrize("kind, options", [
    ("ema_vq", {"codebook_size": 256, "codebooks": 3}), ("ema_vq", {"codebook_size": 2048}),
    ("ema_vq", {"codebook_size": 4096, "combine": "product"}), ("simvq", {"codebook_size": 1024, "codebooks": 3}),
    ("simvq", {"codebook_size": 1024, "codebooks": 4, "combine": "product"}), ("fsq", {"levels": [8, 8, 8, 5, 5, 5]}),
    ("fsq", {"levels": [8, 6, 5], "codebooks": 5})], ids=str)
def test_codes_of_millions_give_their_indices(kind, options):
    quantizer = build_quantizer(kind, DIM, **{"codebooks": 2} | options | ({} if kind == "fsq" else {"code_dim": 16}))
    assert 2**20 < quantizer.codebook_size < 2**63
    for _ in range(3):
        quantizer(torch.randn(1, 4096, DIM))
    z = torch.randn(1, 12, DIM)
    z_q, _, indices = quantizer.eval()(z)
    any_indices = torch.randint(quantizer.codebook_size, (1, 12))  # also what no search would have combined
    for indices in (indices, any_indices):
        codes = quantizer.indices_to_codes(indices)
        back = quantizer.codes_to_indices(codes)
        assert torch.equal(quantizer.indices_to_codes(back), codes) and (kind != "fsq" or torch.equal(back, indices))


def test_one_codebook_is_the_quantizer_itself():
    for name in OPTIONS:
        quantizer = build(name, codebooks=1)
        assert type(quantizer) is type(build(name)) and quantizer.state_dict().keys() == build(name).state_dict().keys()
