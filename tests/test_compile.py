"""COMPILE: a compiled step is the same step, in few graphs."""
import copy
import functools
import math

import pytest
import torch
import torch._inductor.config

import train
from models import VQRAE, PatchDiscriminator, build_encoder
from utils import load_torch


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """What train.py sets stays within a test. Without bf16, rounding errors are small."""
    monkeypatch.setattr(train, "fast_bf16", lambda device: False)
    torch.compiler.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True), torch._inductor.config.patch(fallback_random=True):
        yield  # Inductor would draw other random numbers than an eager step


@pytest.mark.parametrize("micro_batches, count", [(1, 3), (2, 6)])
def test_a_compiled_run_is_the_same_run_in_few_graphs(micro_batches, count, main, change):
    """Stage 1 without and with the GAN of its second step, and stage 2; a first micro-batch finds no gradients yet."""
    graphs = []

    def backend(graph, inputs, mode):
        """Run the graph as it is, but spoil its last results before: a CUDA graph overwrites them."""
        graphs.append(mode)
        last = []

        def run(*arguments):
            for result in last:
                result.fill_(math.nan)
            results = graph(*arguments)
            last[:] = [x for x in results if isinstance(x, torch.Tensor)]
            return results

        return run

    change(torch, compile=functools.partial(torch.compile, backend=backend))
    arguments = ["QUANTIZER=simvq", f"ACCUMULATE={micro_batches}", "GAN_WEIGHT=0.5", "LEARNING_RATE=0"]
    runs = [main(*arguments), main(*arguments, "COMPILE=reduce-overhead")]
    assert graphs == ["reduce-overhead"] * count
    histories = [load_torch(f"checkpoints/{run.name}/last.pt")["history"] for run in runs]
    for row, expected in zip(*histories):
        losses = [name for name in row if "loss" in name]
        assert [row[name] for name in losses] == pytest.approx([expected[name] for name in losses], rel=1e-4)


# "aot_eager_decomp_partition" traces as Inductor does, and runs eagerly
@pytest.mark.parametrize("kind, stage", [("residual_vq", 1), ("ddcl", 2)])  # EMA-VQ and FSQ are parts of them
def test_a_compiled_step_is_the_same_step(kind, stage, change):
    torch.manual_seed(0)  # with others a max pooling's inputs may tie, and rounding decides
    change(train, GAN_WEIGHT=0.5)
    options = {"codebook_size": 64, "code_dim": 6} if "vq" in kind else {}
    model = VQRAE("cifar", kind, options, 16, 4, decoder_width=32, decoder_depth=1).set_stage(stage).train()
    teacher, critic = build_encoder("cifar", 4).eval().requires_grad_(False), PatchDiscriminator(16)
    images, results = torch.rand(4, 3, 16, 16), []
    compiled = torch.compile(train.add_gradients, fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
    for step in (train.add_gradients, compiled):
        part, judge = copy.deepcopy((model, critic if stage == 1 else None))
        frozen = part.encoder if stage == 1 else teacher
        torch.manual_seed(0)
        # in a second step codes may have restarted at one token, and rounding decides which is nearest
        losses = step(part, images, frozen, frozen, judge)
        parts = torch.nn.ModuleList([part, judge] if judge else [part])
        results.append([losses, {name: p.grad for name, p in parts.named_parameters()}, dict(part.named_buffers())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-6)
