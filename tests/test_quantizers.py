"""Each quantizer against its definition, written out anew here, and against the library where it has one."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from vector_quantize_pytorch import SimVQ as LibrarySimVQ
from vector_quantize_pytorch import VectorQuantize

import quantizers
from quantizers import DDCL, EMAVQ, FSQ, SimVQ, build_quantizer, nearest_code, straight_through

DIM = 32
OPTIONS = {"fsq": {}, "simvq": {"codebook_size": 512}, "ema_vq": {"codebook_size": 64, "code_dim": 8}, "ddcl": {}}
LAYOUTS = {"images": (3, DIM, 4, 5), "sequences": (3, 7, DIM)}


def build(name, **options):
    return build_quantizer(name, DIM, **(OPTIONS[name] | options))


@pytest.mark.parametrize("shape", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ["fsq", "simvq", "ema_vq", "ddcl"])
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
    assert indices.unique().numel() > 10  # the tokens are told apart
    assert torch.equal(quantizer.indices_to_codes(indices), z_q)
    with torch.no_grad():
        assert torch.equal(quantizer(z)[0], z_q)
    back = quantizer.codes_to_indices(z_q)
    assert torch.equal(quantizer.indices_to_codes(back), z_q)
    if name in ("fsq", "ddcl"):
        assert torch.equal(back, indices)
    entries = quantizer.get_codebook_entry(indices.flatten())
    tokens = z_q.permute(0, 2, 3, 1) if len(shape) == 4 else z_q
    assert torch.equal(entries.view(tokens.shape), tokens)


@pytest.mark.parametrize("name", ["fsq", "simvq", "ema_vq", "ddcl"])
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
@pytest.mark.parametrize("name", ["fsq", "simvq", "ema_vq", "ddcl"])
def test_gradient_reaches_the_input(name, mode):
    quantizer = build(name).train(mode)
    z = torch.randn(2, DIM, 3, 3, requires_grad=True)
    quantizer(z)[0].square().sum().backward()
    assert (z.grad.abs().amax(1) > 0).all()


@pytest.mark.parametrize("name", ["fsq", "simvq"])
def test_parameters_have_the_same_gradient_in_eval_mode(name):
    quantizer = build(name)
    z = torch.randn(2, DIM, 3, 3)
    gradients = []
    for mode in (True, False):
        quantizer.train(mode).zero_grad()
        z_q, loss, _ = quantizer(z)
        (z_q.square().sum() + loss).backward()
        gradients.append([p.grad.clone() for p in quantizer.parameters()])
    for in_training, in_eval in zip(*gradients):
        assert in_training.abs().sum() > 0 and torch.allclose(in_training, in_eval, atol=1e-5)


@pytest.mark.parametrize("name", ["fsq", "simvq", "ema_vq", "ddcl"])
def test_bf16_autocast_changes_nothing(name):
    quantizer = build(name)
    z = torch.randn(4, DIM, 4, 4)
    quantizer(z)
    quantizer.eval()
    expected = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        z_q, loss, indices = quantizer(z)
        again = quantizer.indices_to_codes(indices)
    assert torch.equal(z_q, expected[0]) and torch.equal(indices, expected[2]) and torch.equal(again, z_q)


@settings(deadline=None, max_examples=60, derandomize=True)  # the same examples each time: a run of the tests can be repeated
@given(levels=st.lists(st.integers(2, 9), min_size=1, max_size=5), batch=st.integers(1, 3), height=st.integers(1, 4), width=st.integers(1, 4),
       extra=st.integers(0, 9), image=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
       scale=st.floats(0, 1e4), name=st.sampled_from(["fsq", "simvq", "ema_vq", "ddcl"]), seed=st.integers(0, 2**31))
@example(levels=[4], batch=1, height=1, width=1, extra=0, image=False, dtype=torch.float64, scale=1.2e-38, name="ema_vq", seed=0)
def test_what_holds_for_all_shapes_levels_and_types(levels, batch, height, width, extra, image, dtype, scale, name, seed):
    torch.manual_seed(seed)
    dim = max(len(levels), 4) + extra
    options = {"fsq": {"levels": levels}, "simvq": {"codebook_size": math.prod(levels), "code_dim": len(levels)},
               "ema_vq": {"codebook_size": math.prod(levels)}, "ddcl": {"delta": 1 / levels[0]}}[name]
    quantizer = build_quantizer(name, dim, **options)
    shape = (batch, dim, height, width) if image else (batch, height * width, dim)
    z = (torch.randn(shape) * scale).to(dtype).clamp(-6e4, 6e4).requires_grad_()
    for mode in (True, False):
        z_q, loss, indices = quantizer.train(mode)(z)
        assert z_q.shape == shape and z_q.dtype == torch.float32 and indices.dtype == torch.int64
        assert indices.shape == ((batch, height, width) if image else (batch, height * width))
        assert 0 <= indices.min() and indices.max() < quantizer.codebook_size and loss >= 0 and loss.isfinite() and z_q.isfinite().all()
    codes = quantizer.indices_to_codes(indices)
    assert torch.equal(z_q, codes)
    order = torch.randperm(batch)
    back, alone = quantizer.codes_to_indices(codes), quantizer(z[order])[2]  # one image's tokens are no other's matter
    if name in ("fsq", "ddcl"):
        assert torch.equal(back, indices) and torch.equal(alone, indices[order])
    else:  # nearest among codes that are equal, or nearer to each other than the squares of fp32 can tell
        channels = 1 if image else 2
        for found, expected in ((back, codes), (alone, codes[order])):
            distance = (quantizer.indices_to_codes(found) - expected).norm(dim=channels)
            assert (distance <= 1e-3 * expected.norm(dim=channels) + 1e-18).all()
    gradient, = torch.autograd.grad(z_q.square().sum() + loss, z)
    assert gradient.shape == z.shape and gradient.isfinite().all()


@pytest.mark.parametrize("name, options, message", [
    ("fsp", {}, "quantizer"), ("fsq", {"levels": [8, 1]}, "levels"), ("fsq", {"levels": []}, "levels"), ("fsq", {"levels": [2**17]}, "levels"),
    ("fsq", {"levels": [64] * 6}, "levels"), ("fsq", {"levels": [3] * 40}, "levels|dim"),
    ("simvq", {"codebook_size": 1}, "codebook_size"), ("simvq", {"code_dim": 0}, "code_dim"),
    ("ema_vq", {"codebook_size": 0}, "codebook_size"), ("ema_vq", {"decay": 1.0}, "decay"),
    ("fsq", {"levels": 512}, "levels"), ("simvq", {"codebook_size": 64.0}, "codebook_size"), ("ema_vq", {"code_dim": 8.0}, "code_dim"),
    ("ddcl", {"delta": 0.3}, "delta"), ("ddcl", {"delta": 0}, "delta"), ("ddcl", {"comm_weight": -1}, "comm_weight"),
])
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_quantizer(name, DIM, **options)


@pytest.mark.parametrize("name", ["fsq", "simvq", "ema_vq", "ddcl"])
def test_indices_of_any_whole_type(name):  # tokens are kept in few bytes
    quantizer = build(name)
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int32):
        assert torch.equal(quantizer.get_codebook_entry(torch.arange(9).to(dtype)), quantizer.get_codebook_entry(torch.arange(9)))
    with pytest.raises(ValueError, match="run from -1 to 5"):
        quantizer.get_codebook_entry(torch.tensor([-1, 5], dtype=torch.int16))


@pytest.mark.parametrize("name", ["fsq", "simvq", "ema_vq", "ddcl"])
def test_weights_in_another_type_are_refused(name):
    with pytest.raises(ValueError, match="weights are torch.bfloat16, allowed is torch.float32"):
        build(name).bfloat16()(torch.randn(2, 9, DIM))


def test_straight_through_is_exact():
    z, codes = torch.randn(1000, requires_grad=True), torch.randn(1000) * 1e3
    out = straight_through(z, codes)
    assert torch.equal(out, codes)
    out.sum().backward()
    assert torch.equal(z.grad, torch.ones(1000))


def test_search_is_in_bf16_where_that_is_fast_alone(monkeypatch):
    types, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **options: (types.append(args[1].dtype), addmm(*args, **options))[1])
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("quantizers.fast_bf16", lambda device: fast)
        types.clear()
        nearest_code(torch.randn(10, 128), torch.randn(20, 128))
        assert types[0] == expected


@pytest.mark.parametrize("count", [30, 544, 1024])  # of codes: searched one by one, in groups of 32, and of 128
@pytest.mark.parametrize("block", [1, 2000, None])
def test_nearest_code(block, count):
    x, codebook = torch.randn(50, 8), torch.randn(count, 8) * torch.rand(count, 1)
    for exact in (False, True):
        assert torch.equal(nearest_code(x, codebook, block, exact=exact), torch.cdist(x, codebook).argmin(1))


@pytest.mark.parametrize("half", [True, False])
def test_nearest_of_more_codes_than_are_prepared_at_once(half):
    codebook = torch.randn(1100, 1024)
    assert torch.equal(nearest_code(codebook, codebook, half=half), torch.arange(1100))


def in_fp64(x, codebook):
    return torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


@pytest.mark.parametrize("length, middle", [(None, 0), (20, 0), (20, 100)])
def test_nearest_of_wide_codes_is_that_of_fp64(length, middle):
    codebook, x = torch.randn(2048, 256), torch.randn(1000, 256)
    if length is None:
        codebook, x = F.normalize(codebook, dim=-1), F.normalize(x, dim=-1)
    else:
        codebook, x = codebook * length + middle, x * length + middle
    expected = in_fp64(x, codebook)
    rounded = (x.bfloat16() @ codebook.bfloat16().T - codebook.bfloat16().square().sum(1) / 2).argmax(1)
    assert (rounded != expected).any()  # bf16 alone would find another code for some tokens
    assert torch.equal(nearest_code(x, codebook, half=True), expected)


def test_tokens_whose_nearest_code_bf16_could_hide_are_searched_in_fp32(monkeypatch):
    crowds = torch.randn(20, 1, 256)
    codebook = torch.cat([(crowds + 0.01 * torch.randn(20, 50, 256)).flatten(0, 1), torch.randn(200, 256)])  # fifty nearly equal codes each
    x = torch.cat([codebook[1000:], (crowds + 0.01 * torch.randn(20, 10, 256)).flatten(0, 1)])
    x = x + 0.001 * torch.randn(x.shape)
    calls = []
    monkeypatch.setattr(quantizers, "nearest_code", lambda *args, **options: calls.append(args[0]) or nearest_code(*args, **options))
    assert torch.equal(nearest_code(x, codebook, half=True), in_fp64(x, codebook))
    assert len(calls) == 1 and torch.equal(calls[0], x[200:])  # those in a crowd, and no others


def test_rounding_that_hides_the_nearest_code_is_noticed():
    # what bf16 does at worst: the token's and some codes' numbers all lie in the middle between two bf16 numbers
    number = 1 + 2**-8
    token = torch.zeros(192)
    token[:128], token[128] = number, 1
    x = torch.stack([token, -token])

    def code(start, next):
        c = torch.zeros(192)
        c[:128], c[128] = start, next
        c[129] = (133 - c.square().sum()).sqrt()
        return c

    codes = torch.stack([code(1.0, 0.6953125), *[code(1.0, 0.6953125 - i / 1000) for i in range(1, 9)], code(number, 0.484375)])
    codebook = torch.cat([codes, -codes])
    assert torch.equal(nearest_code(x, codebook, half=True), in_fp64(x, codebook))


@pytest.mark.parametrize("codes, width", [(100, 8), (1024, 64), (1024, 256)])
@pytest.mark.parametrize("options", [{}, {"exact": True}, {"half": True}])
def test_a_code_far_from_all_others_hides_none(codes, width, options):
    codebook, x = torch.randn(codes, width), torch.randn(300, width)
    codebook[-1] = 1e5
    assert torch.equal(nearest_code(x, codebook, **options), in_fp64(x, codebook))
    assert torch.equal(nearest_code(codebook[:90], codebook, **options), torch.arange(90))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e300])
def test_what_is_not_finite_is_refused(value):
    z = torch.zeros(1, 4, DIM, dtype=torch.float64)
    z[0, 2, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        build("fsq")(z)


def test_simvq_keeps_its_codebook_until_the_map_changes():
    quantizer = build("simvq").eval()
    with torch.no_grad():
        first = quantizer.codebook
        assert quantizer.codebook is first
        quantizer.simvq.code_transform.weight.mul_(torch.randn(DIM, 1))
        second = quantizer.codebook
        assert not torch.allclose(first, second)
        quantizer.load_state_dict(build("simvq").state_dict())
        assert not torch.allclose(quantizer.codebook, second)
    assert quantizer.codebook.requires_grad
    for fused in (True, False):
        optimizer = torch.optim.AdamW(quantizer.parameters(), lr=0.1, fused=fused)
        z_q, loss, indices = quantizer.train()(torch.randn(2, 9, DIM))
        (z_q.sum() + loss).backward()
        optimizer.step()
        with torch.no_grad():
            assert torch.equal(quantizer.eval().codebook, F.normalize(quantizer.simvq.codebook, dim=-1))
    maps = []
    quantizer.simvq.code_transform.register_forward_hook(lambda *args: maps.append(1))
    with torch.no_grad():
        for _ in range(3):
            z_q, _, indices = quantizer(torch.randn(2, 9, DIM))
            quantizer.indices_to_codes(indices)
    assert not maps  # the codebook is mapped once, not at each call
    for assign in (False, True):
        state = quantizer.state_dict() | {"simvq.frozen_codebook": torch.randn(512, DIM)}
        quantizer.load_state_dict(state, assign=assign)
        with torch.no_grad():
            assert torch.equal(quantizer.codebook, F.normalize(quantizer.simvq.codebook, dim=-1))
    with torch.inference_mode():
        assert build("simvq").eval().codebook.shape == (512, DIM)


# ---------------------------------------------------------------------------------------------------------------------
# FSQ


@pytest.mark.parametrize("levels, size", [([8, 8, 8, 5, 5, 5], 64000), ([8, 8, 8], 512), ([8, 6, 5], 240), ([7, 5, 5, 5], 875),
                                          ([8, 5, 5, 5], 1000), ([8, 6, 6, 5], 1440)])
def test_fsq_sizes(levels, size):
    assert build_quantizer("fsq", 16, levels=levels).codebook_size == size


@pytest.mark.parametrize("levels", [[200] * 3, [2**16]])
def test_fsq_has_exact_indices_however_many_codes_it_has(levels):
    fsq = FSQ(len(levels), levels=levels)
    indices = torch.cat([torch.randint(fsq.codebook_size, (1, 20000)), torch.tensor([[0, fsq.codebook_size - 1]])], dim=1)
    codes = fsq.indices_to_codes(indices)
    assert torch.equal(fsq.codes_to_indices(codes), indices)
    inside = codes.mul(1 - 1e-6).double().atanh().float()  # tanh brings each near enough to its level
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


def test_simvq_finds_what_the_library_finds():
    simvq = SimVQ(DIM, codebook_size=40)

    class Normalized(nn.Module):
        def forward(self, codes):
            return F.normalize(simvq.simvq.code_transform(codes), dim=-1)

    library = LibrarySimVQ(DIM, 40, codebook_transform=Normalized())
    library.frozen_codebook.copy_(simvq.simvq.frozen_codebook)
    z = torch.randn(3, 20, DIM)
    _, indices, _ = library(F.normalize(simvq.project_in(z), dim=-1))
    assert torch.equal(simvq(z)[2], indices)


def test_simvq_learns_its_map_and_not_its_codebook():
    simvq = SimVQ(DIM, codebook_size=40, code_dim=6)
    z = torch.randn(2, 9, DIM)
    learned = simvq.simvq.code_transform.weight, simvq.project_in.weight
    z_q, loss, indices = simvq(z)
    gradients = torch.autograd.grad(z_q.square().sum() + loss, learned)

    codes = F.normalize(simvq.simvq.frozen_codebook @ learned[0].T, dim=-1)[indices]
    x = F.normalize(simvq.project_in(z), dim=-1)
    z_q = simvq.project_out(codes.detach() + x - x.detach())
    loss = (codes - x.detach()).square().sum(-1).mean() + 0.25 * (x - codes.detach()).square().sum(-1).mean()
    for gradient, defined in zip(gradients, torch.autograd.grad(z_q.square().sum() + loss, learned)):
        assert gradient.abs().sum() > 0 and torch.allclose(gradient, defined, rtol=1e-4, atol=1e-6)
    gradient, = torch.autograd.grad(simvq(z)[1], learned[0], create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):  # its own gradient is not there, and must not seem to be
        gradient.sum().backward()
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


def test_ema_codebook_rests_in_eval_mode():
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
    assert quantizer.vq._codebook.cluster_size.min() >= 0.1 * 30 / 100  # by now all have had their turn


def test_ema_dead_codes_start_again_at_tokens():
    quantizer = EMAVQ(6, codebook_size=10)
    z = torch.randn(1, 200, 6) + 50  # far from every code
    quantizer(z)
    is_token = (quantizer.vq.codebook[:, None] == z).all(-1).any(1)
    assert is_token.sum() >= 9  # all but the one that won every token
    for _ in range(5):
        indices = quantizer(z)[2]
    assert indices.unique().numel() == 10
    quantizer.vq._codebook.embed_avg[0, 3] = 1e4  # a code far from every token decays to nothing, and comes back
    quantizer.vq._codebook.update_ema()
    for _ in range(400):
        quantizer(z)
    assert quantizer.vq.codebook.max() < 100


# ---------------------------------------------------------------------------------------------------------------------
# DDCL


def ddcl_plain(**options):
    """DDCL that sees and gives its four numbers themselves: z -> tanh -> quantized."""
    quantizer = DDCL(4, **options)
    for linear in (quantizer.project_in, quantizer.project_out):
        nn.init.eye_(linear.weight), nn.init.zeros_(linear.bias)
    return quantizer


def test_ddcl_error_is_uniform_and_does_not_depend_on_the_number():
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


def test_ddcl_loss_is_the_length_of_the_message_in_bits():
    quantizer = ddcl_plain(comm_weight=0.5)
    z = torch.randn(1, 9, 4)
    bits = torch.log2(2 * torch.tanh(z).abs() * 15 + 1).sum(-1).mean()
    assert torch.allclose(quantizer(z)[1], 0.5 * bits)


def test_ddcl_eval_rounds_without_dither():
    quantizer = ddcl_plain().eval()
    z = torch.randn(1, 100, 4)
    z_q, _, indices = quantizer(z)
    message = (torch.tanh(z) * 15).round()
    assert torch.allclose(z_q, message / 15, atol=1e-6)
    digits = (message + 15).long()
    assert torch.equal(indices, digits[..., 0] + 31 * digits[..., 1] + 31**2 * digits[..., 2] + 31**3 * digits[..., 3])
    assert quantizer.codebook_size == 31**4


def test_ddcl_training_draws_anew():
    quantizer = ddcl_plain()
    z = torch.randn(1, 100, 4)
    assert not torch.equal(quantizer(z)[0], quantizer(z)[0])
