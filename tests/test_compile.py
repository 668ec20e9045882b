"""COMPILE: a compiled step is the same step, in few graphs, and its errors show themselves. Slow tests use Inductor."""
import copy
import functools
import traceback

import pytest
import torch
import torch._inductor.config
from conftest import SEED

import quantizers
import train
from models import VQRAE, PatchDiscriminator, build_encoder


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """What train.py sets stays within a test. Without bf16, rounding errors are small."""
    monkeypatch.setattr(train, "fast_bf16", lambda device: False)
    torch.compiler.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True), torch._inductor.config.patch(fallback_random=True):
        yield  # Inductor would draw other random numbers than an eager step


def use_backend(monkeypatch, backend):
    """torch.compile calls backend(graph, inputs, mode=...) from now on."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))


def test_a_compiled_run_is_the_same_run_in_three_graphs(main, monkeypatch):
    """Both stages, two micro-batches a step, a GAN in the second step: the same gradients and losses."""
    averages, graphs, average = [], [], train.average

    def record(tensors):
        average(tensors)
        averages.append(torch.cat([x.flatten() for x in tensors]))

    def backend(graph, inputs, mode):
        """Runs the graph as it is. As in a CUDA graph, each run writes its results to the same memory."""
        graphs.append(mode)
        memory = []

        def run(*arguments):
            outputs = graph(*arguments)
            if not memory:
                memory.extend(x.clone() if isinstance(x, torch.Tensor) else x for x in outputs)
            for kept, output in zip(memory, outputs):
                if isinstance(output, torch.Tensor):
                    kept.copy_(output)
            return tuple(memory)

        return run

    monkeypatch.setattr(train, "average", record)
    use_backend(monkeypatch, backend)
    arguments = ["QUANTIZER=fsq", "ACCUMULATE=2", "GAN_WEIGHT=0.5", "LEARNING_RATE=0"]
    main(*arguments)
    main(*arguments, "COMPILE=reduce-overhead")
    assert graphs == ["reduce-overhead"] * 3  # stage 1 without and with the GAN, and stage 2
    assert len(averages) == 12  # in each run and stage the gradients of two steps, and the losses
    for expected, found in zip(averages[:6], averages[6:]):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("kind", ["ddcl", "simvq", "ema_vq", "residual_vq"])
def test_a_step_of_a_quantizer_compiles_to_one_graph(kind):
    quantizer, z, results = quantizers.build_quantizer(kind, 6), torch.randn(2, 9, 6), []
    for step in (copy.deepcopy(quantizer), torch.compile(quantizer, backend="eager", fullgraph=True)):
        torch.manual_seed(SEED)
        results.append(step(z)[:2])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)


SLOW = [pytest.param(*case, "inductor", marks=pytest.mark.slow) for case in (("ema_vq", 1), ("fsq", 2))]


# "aot_eager_decomp_partition" traces as Inductor does, and runs eagerly
@pytest.mark.parametrize("kind, stage, backend", [("ema_vq", 1, "aot_eager_decomp_partition"), *SLOW])
def test_a_compiled_step_is_the_same_step(kind, stage, backend, monkeypatch):
    """In stage 1 with a GAN: the same losses, gradients and moving averages."""
    for name, value in {"GAN_WEIGHT": 0.5, "COMPILE": "default", "device": "cpu", "bf16": False}.items():
        monkeypatch.setattr(train, name, value)
    use_backend(monkeypatch, backend)
    options = {"codebook_size": 64, "code_dim": 6} if "vq" in kind else {}
    model = VQRAE("cifar", kind, options, 16, 4, decoder_width=32, decoder_depth=1).set_stage(stage).train()
    teacher, critic = build_encoder("cifar", 4).eval().requires_grad_(False), PatchDiscriminator(16)
    images, results = torch.rand(4, 3, 16, 16), []
    for function in (train.losses_and_gradients, train.compiled(train.losses_and_gradients)):
        part, judge = copy.deepcopy((model, critic))
        torch.manual_seed(SEED)
        # one step: after it several codes may restart at one token, and rounding decides which of them is nearest
        losses, gradients = function(part, teacher, None, images, judge if stage == 1 else None)
        results.append((losses, gradients, dict(part.named_buffers())))
    assert len(results[0][1]) > 50
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-6)


def test_a_mistake_in_a_compiled_step_shows_file_and_line(main, monkeypatch):
    """As in a quantizer of one's own, which compiling meets before the first step."""
    class Mistaken(quantizers.FSQ):
        def quantize(self, x):
            return x @ torch.ones(7, 7)  # six numbers do not fit seven

    monkeypatch.setitem(quantizers.QUANTIZERS, "mistaken", Mistaken)
    use_backend(monkeypatch, "eager")
    with pytest.raises(RuntimeError) as error:
        main("QUANTIZER=mistaken", "COMPILE=default")
    text = "".join(traceback.format_exception(error.value))
    assert __file__ in text and "x @ torch.ones(7, 7)" in text


def test_a_gpu_without_memory_for_a_compiled_step_says_so(main, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    use_backend(monkeypatch, lambda graph, inputs, **options: full)
    with pytest.raises(SystemExit, match="^train.py: CUDA out of memory$"):
        main("COMPILE=default")
