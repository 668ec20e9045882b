"""prior.py on made-up tokens, and generate.py itself on a few images."""
import fcntl
import itertools
import json
import math
import os
import runpy
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import utils
from models import VQRAE
from prior import Prior, build_prior, code_dim, draw_masks, load_prior, measure_bits, training_loss
from quantizers import build_quantizer
from utils import load_checkpoint, load_torch, save_checkpoint, save_torch

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "checkpoints" / "pretrained"
SMALL = ["EPOCHS=2", "BATCH_SIZE=32", "DIM=32", "DEPTH=1", "STEPS=3", "SAMPLES=20", "EVAL_IMAGES=32"]


def random_prior(sizes=(4, 3, 2), grid=(2, 3), classes=2, **options):
    """Small, and with predictions that are not uniform."""
    prior = Prior(list(sizes), list(grid), classes, 16, 1, knows_codes=True, **options).eval()
    for weight in (prior.codes, *[head.weight for head in prior.heads]):
        torch.nn.init.normal_(weight, std=1.0)
    return prior


@pytest.mark.parametrize("classes", [0, 5])
def test_an_untrained_prior_gives_the_nominal_bits(classes):
    prior = build_prior(build_quantizer("fsq", 8), [4, 5], classes, 32, 1)
    digits = prior.to_digits(torch.randint(64_000, (6, 4, 5)))
    labels = torch.randint(classes + 1, (6,))
    bits = prior(digits, draw_masks(6, 20), labels)
    torch.testing.assert_close(bits, torch.full((6,), 20 * math.log2(64_000)))


def made_up_tokens(count):
    """Indices (count, 2, 2) of digits (4, 2), labels, and the entropy in bits an image given the label.

    The first token's first digit has the odds 8 : 4 : 2 : 2 (1.75 bits), its second digit equals the first's parity 7
    times in 8. The other tokens have the same first digit, one more in class 1 (mod 4), and a second digit of 1 bit.
    """
    labels = torch.randint(2, (count,))
    first = torch.multinomial(torch.tensor([8.0, 4, 2, 2]), count, replacement=True)
    flipped = (torch.rand(count) < 1 / 8).long()
    tokens = [first + 4 * (first % 2 ^ flipped)]
    tokens += [(first + labels) % 4 + 4 * torch.randint(2, (count,)) for _ in range(3)]
    return torch.stack(tokens, 1).view(-1, 2, 2), labels, 1.75 + 7 / 8 * math.log2(8 / 7) + 3 / 8 + 3


def test_the_trained_bound_is_the_entropy():
    prior = Prior([4, 2], [2, 2], 2, 32, 1)
    optimizer = torch.optim.AdamW(prior.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, 600)
    for _ in range(600):
        indices, labels, _ = made_up_tokens(128)
        masked = draw_masks(128, 4)
        loss = training_loss(prior(prior.to_digits(indices), masked, labels), masked)
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
    indices, labels, entropy = made_up_tokens(20_000)
    with torch.no_grad():
        bits = prior(prior.to_digits(indices), draw_masks(20_000, 4), labels).mean().item()
    assert bits == pytest.approx(entropy, rel=0.02)


def test_all_masked_tokens_weigh_alike_in_training():
    prior, masked = random_prior(), torch.rand(9, 6) < torch.linspace(0.1, 1, 9)[:, None]
    masked[:, 0] = True  # from one token or so to all
    digits, labels = prior.to_digits(torch.randint(24, (9, 2, 3))), torch.randint(3, (9,))
    logits = prior.logits(prior.features(digits, masked, labels), digits[masked])
    nats = sum(F.cross_entropy(part, digits[masked][:, k], reduction="sum") for k, part in enumerate(logits))
    torch.testing.assert_close(training_loss(prior(digits, masked, labels), masked), nats / math.log(2) / 9)


def test_the_bound_is_the_mean_over_orders():
    prior = random_prior(grid=(1, 3))
    digits, label = torch.tensor([[[3, 2, 1], [0, 1, 0], [2, 0, 1]]]), torch.tensor([1])

    def bits(order):  # of tokens filled one by one
        total = 0
        for i, token in enumerate(order):
            masked = torch.tensor([[place in order[i:] for place in range(3)]])
            logits = prior.logits(prior.features(digits, masked, label), digits[masked])
            row = sorted(order[i:]).index(token)
            total -= sum(part.log_softmax(1)[row, digits[0, token, k]].item() for k, part in enumerate(logits))
        return total / math.log(2)

    orders = list(itertools.permutations(range(3)))
    masks = [torch.tensor([[place in chosen for place in range(3)]])
             for n in (1, 2, 3) for chosen in itertools.combinations(range(3), n) for _ in range(6 // math.comb(3, n))]
    with torch.no_grad():
        bound = sum(prior(digits, masked, label).item() for masked in masks) / len(masks)
        assert bound == pytest.approx(sum(map(bits, orders)) / len(orders), rel=1e-5)
    drawn = torch.cat([draw_masks(64, 3) for _ in range(100)]).sum(1).bincount() / 6400
    torch.testing.assert_close(drawn, torch.tensor([0, 1, 1, 1]) / 3, atol=0.01, rtol=0)
    assert len({draw_masks(64, 64)[0].sum().item() for _ in range(50)}) > 10  # whichever row an image is in


def test_sampling_token_by_token_reproduces_the_joint_distribution(monkeypatch):
    joint = torch.distributions.Dirichlet(torch.full((4, 4), 0.3)).sample()  # of two tokens of digits (2, 2)
    joint = joint / joint.sum()
    prior = Prior([2, 2], [1, 2], 0, 16, 1).eval()

    # the exact conditionals: features are the distribution (4,) of a masked token given the other, unless masked, too
    def features(digits, masked, labels):
        other = prior.join_indices(digits).flip(1)
        given = torch.stack([joint.T[other[:, 0]], joint[other[:, 1]]], 1)  # of the first given the second; converse
        alone = torch.stack([joint.sum(1), joint.sum(0)]).expand_as(given)
        return torch.where(masked.flip(1)[..., None], alone, given)[masked]

    def logits(features, digits):
        table = features.view(-1, 2, 2)  # second digit, first digit
        return [table.sum(1).log(), table[torch.arange(len(table)), :, digits[:, 0]].log()]

    monkeypatch.setattr(prior, "features", features), monkeypatch.setattr(prior, "logits", logits)
    tokens = prior.generate(torch.zeros(40_000, dtype=torch.int64), steps=2).view(-1, 2)
    counts = torch.bincount(tokens[:, 0] * 4 + tokens[:, 1], minlength=16).view(4, 4) / 40_000
    torch.testing.assert_close(counts, joint, atol=0.01, rtol=0)
    tokens = prior.generate(torch.zeros(40_000, dtype=torch.int64), steps=1).view(-1, 2)  # at once: independent
    counts = torch.bincount(tokens[:, 0] * 4 + tokens[:, 1], minlength=16).view(4, 4) / 40_000
    torch.testing.assert_close(counts, joint.sum(1)[:, None] * joint.sum(0), atol=0.01, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 5, 6, 50])
def test_fill_keeps_what_is_not_masked(steps):
    prior = random_prior()
    indices, mask = torch.randint(24, (30, 2, 3)), torch.rand(30, 2, 3) < 0.5
    mask[0], mask[1] = False, True
    filled = prior.fill(indices, mask, torch.randint(2, (30,)), steps)
    assert torch.equal(filled[~mask], indices[~mask]) and not torch.equal(filled[mask], indices[mask])
    assert torch.equal(prior.fill(indices, mask & False, None, steps), indices)
    torch.manual_seed(1)
    filled = prior.fill(indices, mask, None, steps)
    torch.manual_seed(1)
    assert torch.equal(prior.fill(indices.masked_fill(mask, 5), mask, None, steps), filled)  # they have no effect


def test_guidance_and_temperature():
    prior = random_prior(grid=(1, 1), sizes=(4,))
    torch.nn.init.normal_(prior.embed_label.weight)
    empty, masked = torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    with torch.no_grad():
        given, free = (prior.logits(prior.features(empty, masked, torch.tensor([y])), empty[0])[0] for y in (1, 2))
    for guidance, temperature in ((1.0, 1.0), (2.0, 1.0), (3.0, 2.0)):
        p = ((free + guidance * (given - free)) / temperature).softmax(1)[0]
        drawn = prior.generate(torch.ones(20_000, dtype=torch.int64), guidance=guidance, temperature=temperature)
        torch.testing.assert_close(drawn.flatten().bincount(minlength=4) / 20_000, p, atol=0.015, rtol=0)


def test_guidance_rises_to_its_mean_and_beyond(monkeypatch):
    prior, scales = random_prior(grid=(1, 4), sizes=(2,), classes=1), []

    def multinomial(p, count):  # of a class's logits 0 and 1, and 0 and 0 without a class
        scales.append((p[:, 1] / p[:, 0]).log().tolist())
        return torch.zeros(len(p), 1, dtype=torch.int64)

    monkeypatch.setattr(prior, "features",
                        lambda digits, masked, labels: (labels[:1] == 0).float().expand(masked.sum(), 1))
    monkeypatch.setattr(prior, "logits", lambda features, digits: [F.pad(features, (1, 0))])
    monkeypatch.setattr(torch, "multinomial", multinomial)
    mask = torch.tensor([[[True, True, True, True]], [[False, True, False, True]]])  # of the second fewer, in two steps
    prior.fill(mask.long(), mask, torch.tensor([0, 0]), steps=4, guidance=3.0)
    assert sum(scales, []) == pytest.approx([1.5, 2.0, 2.5, 4.0, 3.5, 4.5], rel=1e-4)


@pytest.mark.parametrize("name, options, sizes", [
    ("fsq", {}, (8, 8, 8, 5, 5, 5)), ("ddcl", {}, (31,) * 4),
    ("ema_vq", {"codebook_size": 16, "codebooks": 3}, (16,) * 3), ("ema_vq", {"codebook_size": 512}, (16, 16, 2)),
    ("ema_vq", {"codebook_size": 64, "codebooks": 3}, (64,) * 3),
    ("simvq", {"codebook_size": 300, "code_dim": 4}, (16, 16, 2)),
    ("fsq", {"levels": [3, 2], "codebooks": 2}, (6, 6))], ids=str)
def test_digits_of_each_quantizer(name, options, sizes):
    quantizer = build_quantizer(name, 8, **options).eval()
    prior = build_prior(quantizer, [2, 5], 0, 16, 1)
    assert prior.codebook_sizes == sizes
    assert prior.config["knows_codes"] == (not hasattr(quantizer, "levels") and math.prod(sizes) <= 2**17)
    indices = torch.randint(quantizer.codebook_size, (40, 2, 5))
    digits = prior.to_digits(indices)
    assert digits.shape == (40, 10, len(sizes)) and (digits < torch.tensor(sizes)).all()
    assert torch.equal(prior.fill(indices, torch.zeros_like(indices, dtype=torch.bool)), indices)
    assert 0 <= prior.generate(torch.zeros(9, dtype=torch.int64)).max() < quantizer.codebook_size


@pytest.mark.parametrize("name, options", [("ema_vq", {"codebook_size": 256}), ("simvq", {"codebook_size": 64}),
                                           ("ema_vq", {"codebook_size": 8, "codebooks": 2}),
                                           ("fsq", {"levels": [4, 3], "codebooks": 2})], ids=str)
def test_a_query_tells_codes_by_their_distance(name, options):
    quantizer = build_quantizer(name, 8, **options).eval()
    prior, size = build_prior(quantizer, [1, quantizer.codebook_size], 0, 16, 1), quantizer.codebook_size
    codes = quantizer.get_codebook_entry(torch.arange(size)).detach()
    digits = prior.to_digits(torch.arange(size).view(1, 1, size))[0]
    query = prior.codes[prior.join_indices(digits[:1])[0]]  # of the first code
    for head in prior.heads:
        head.bias.data[-code_dim - 1 :] = torch.cat([2 * query, -torch.ones(1)])
    scale = prior.codes.var(0).sum() / codes.var(0).sum()
    logits = prior.logits(torch.zeros(size, 16), digits)
    for token in (0, 7, size - 1):
        alike = torch.ones(size, dtype=torch.bool)  # in the digits before
        for k, digit in enumerate(digits[token]):
            means = torch.stack([codes[alike & (digits[:, k] == value)].mean(0) for value in range(len(logits[k][0]))])
            expected = -scale * (means - codes[0]).square().sum(1)
            torch.testing.assert_close(logits[k][token].log_softmax(0), expected.log_softmax(0), atol=1e-3, rtol=1e-4)
            alike &= digits[:, k] == digit


def test_bf16_does_not_round_codes():
    prior = build_prior(build_quantizer("ema_vq", 8, codebook_size=256), [1, 256], 0, 16, 1)
    for head in prior.heads:
        head.bias.data = torch.randn_like(head.bias).bfloat16().float()
    arguments = torch.zeros(256, 16), prior.to_digits(torch.arange(256).view(1, 1, 256))[0]
    with torch.autocast("cpu", torch.bfloat16):
        logits = prior.logits(*arguments)
    torch.testing.assert_close(logits, prior.logits(*arguments), atol=1e-4, rtol=0)


def test_codes_of_one_cluster_are_alike():
    quantizer = build_quantizer("simvq", 8, codebook_size=256, code_dim=4).eval()
    prior = build_prior(quantizer, [1, 256], 0, 16, 1)
    clusters = prior.to_digits(torch.arange(256).view(1, 1, 256))[0, :, 0]
    codes = quantizer.get_codebook_entry(torch.arange(256)).detach()
    assert clusters.bincount().tolist() == [16] * 16
    within = sum(codes[clusters == i].var(0).sum() for i in range(16)) / 16
    assert within < 0.4 * codes.var(0).sum()


@pytest.mark.parametrize("call, names", [
    (lambda p, i, m: p.fill(i[:, :1], m, None), "indices"),
    (lambda p, i, m: p.fill(i + 24, m, None), "0 to 23"),
    (lambda p, i, m: p.fill(i - 1, m, None), "indices"),
    (lambda p, i, m: p.fill(i, m[:1], None), "mask"),
    (lambda p, i, m: p.fill(i, m.long(), None), "mask"),
    (lambda p, i, m: p.fill(i.float(), m, None), "indices"),
    (lambda p, i, m: p.fill(i[:0], m[:0], None), "indices"),
    (lambda p, i, m: p.fill(i, m, torch.tensor([0, 3])), "labels"),
    (lambda p, i, m: p.fill(i, m, torch.tensor([0])), "labels"),
    (lambda p, i, m: p.generate(torch.tensor([-1])), "labels"),
    (lambda p, i, m: p.generate(torch.tensor([0.5])), "labels"),
    (lambda p, i, m: p.generate(3), "labels"),
    (lambda p, i, m: p.generate(None), "labels"),
    (lambda p, i, m: p.generate(["cat"]), "labels"),
    (lambda p, i, m: p.fill(i, m, [None, None]), "labels"),
    (lambda p, i, m: measure_bits(p, i, torch.tensor([0])), "labels"),
    (lambda p, i, m: measure_bits(p, i, torch.tensor([0, 11])), "labels"),
    (lambda p, i, m: p.fill(i.to(torch.uint16), m), "indices"),
    (lambda p, i, m: p.half().fill(i, m), "torch.float16"),
    (lambda p, i, m: p.fill(i, m, None, 2, "4"), "guidance"),
    (lambda p, i, m: p.fill(i, m, None, 2, 4, None), "temperature"),
    (lambda p, i, m: p.fill(i.tolist(), m), "indices"),
    (lambda p, i, m: p.fill(i, m.tolist()), "mask"),
    (lambda p, i, m: load_prior(SHIPPED / "prior.pt", "nowhere.pt"), "nowhere.pt"),
    (lambda p, i, m: p.fill(i, m, None, 0), "steps"),
    (lambda p, i, m: p.fill(i, m, None, 2.5), "steps"),
    (lambda p, i, m: p.fill(i, m, None, 2.0), "steps"),
    (lambda p, i, m: p.fill(i, m, None, 2, 0), "guidance"),
    (lambda p, i, m: p.fill(i, m, None, 2, math.inf), "guidance"),
    (lambda p, i, m: p.fill(i, m, None, 2, 1, 0), "temperature"),
    (lambda p, i, m: load_prior("nowhere.pt"), "nowhere.pt"),
    (lambda p, i, m: load_prior(SHIPPED / "vqrae_fsq.pt"), "prior"),
    (lambda p, i, m: load_prior(SHIPPED / "prior.pt", SHIPPED / "vqrae_simvq.pt"), "the vqrae_fsq.pt that"),
    (lambda p, i, m: build_prior(build_quantizer("none", 8), [2, 2], 0), "quantizer"),
    (lambda p, i, m: build_prior(build_quantizer("ema_vq", 8, codebook_size=2**14, codebooks=2), [2, 2], 0), "8,192"),
])
def test_bad_input_is_named_in_one_line(call, names):
    with pytest.raises(ValueError, match=names) as error:
        call(random_prior(), torch.zeros(2, 2, 3, dtype=torch.int64), torch.ones(2, 2, 3, dtype=torch.bool))
    assert "\n" not in str(error.value) and "allowed" in str(error.value)


@pytest.fixture
def generate(monkeypatch):
    """generate(...) runs generate.py with these constants in the folder one is in."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
        torch.manual_seed(123)  # what happened before makes no difference
        runpy.run_path(str(ROOT / "generate.py"), run_name="__main__")

    yield run
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("argument", [
    "EPOCHS=0", "DIM=100", "DEPTH=1.5", "BATCH_SIZE=True", "BATCH_SIZE=1000", "LEARNING_RATE=0", "DROP_LABEL=0",
    "SEED=-1", "STEPS=0", "GUIDANCE=-1", "TEMPERATURE=0", "SAMPLES=1", "FLIP=1", "PRECISION=fp64",
    "CHECKPOINT=nowhere.pt", "DATASET=nowhere", "EVAL_IMAGES=None", "DEPHT=2",
    "STEPS=10000000", "GUIDANCE=1e+18", "TEMPERATURE=1e-40", "DEPTH=100000000", "SAMPLES=1000000000000",
    "CHECKPOINT=3"])
def test_a_wrong_constant_is_named_in_one_line(argument, generate, folder):
    with pytest.raises(SystemExit) as error:
        generate(f"DATASET={folder}", argument)
    name, value = argument.split("=")
    line = str(error.value)
    assert line.startswith("generate.py: ") and "allowed" in line and "\n" not in line and value in line
    assert name in line or name == "CHECKPOINT"
    assert not Path("outputs").exists() and not Path("checkpoints").exists()


def test_a_run_and_one_that_was_stopped(generate, folder, tmp_path, monkeypatch, capsys):
    arguments = [f"DATASET={folder}", *SMALL]
    generate(*arguments)
    outputs, = Path("outputs").iterdir()
    checkpoints = Path("checkpoints", outputs.name)
    for name in ("epoch_001.png", "epoch_002.png", "nearest.png", "inpainting.png"):
        assert min(Image.open(outputs / name).size) > 100
    results = json.loads((outputs / "results.json").read_text())
    assert results["nominal_bits"] == pytest.approx(64 * math.log2(64_000))
    assert 0.9 * results["nominal_bits"] < results["bits"] < 1.01 * results["nominal_bits"]
    assert results["frechet"] > 0 and 0 <= results["probe_samples"] <= 1 and 0.5 < results["probe_test"] <= 1
    prior = load_prior(checkpoints / "prior.pt")
    shipped = load_checkpoint(SHIPPED / "vqrae_fsq.pt")
    assert shipped.decode_from_indices(prior.generate(torch.tensor([0, 1]))).shape == (2, 3, 32, 32)

    line = capsys.readouterr().out.splitlines()[-2]
    leftover = outputs / "epoch_002.png.123.tmp"
    leftover.write_bytes(b"")
    with open(checkpoints / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another process does
        with pytest.raises(SystemExit, match="^generate.py: .*going on elsewhere"):
            generate(*arguments)
    assert leftover.exists()
    generate(*arguments, "GUIDANCE=1")  # finished: measured again, with other samples
    assert json.loads((outputs / "results.json").read_text())["bits"] == results["bits"]
    again = capsys.readouterr().out
    assert not leftover.exists()
    assert "resuming after epoch 2" in again and line not in again

    content = (checkpoints / "last.pt").read_bytes()
    saved = load_torch(checkpoints / "last.pt")
    for left in ({"epoch": 1}, saved | {"prior": [1]}, {k: v for k, v in saved.items() if k != "optimizer_1"}):
        utils.save_torch(checkpoints / "last.pt", left)
        with pytest.raises(SystemExit, match="^generate.py: .*last.pt.*"):
            generate(*arguments)
    (checkpoints / "last.pt").write_bytes(content)

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    with monkeypatch.context() as patch:
        patch.setattr("optimization.Muon.load_state_dict", full)
        with pytest.raises(SystemExit, match="^generate.py: the GPU's memory is full"):  # not: of other code
            generate(*arguments)
    cached, = Path("data").glob("tokens_*.pt")
    for path in (checkpoints / "prior.pt", cached):  # both are made again
        path.write_bytes(b"broken")
    generate(*arguments)
    assert json.loads((outputs / "results.json").read_text()) == results
    assert load_prior(checkpoints / "prior.pt").config == prior.config
    assert load_torch(cached).keys() == {"train", "test"}
    hash_file = utils.hash_file
    with monkeypatch.context() as patch:  # a comment in models.py: tokens are made again, and the run is the same
        patch.setattr(utils, "hash_file", lambda path: hash_file(path) + "edited" * str(path).endswith("models.py"))
        generate(*arguments)
    assert len(list(Path("data").glob("tokens_*.pt"))) == 2 and len(list(Path("checkpoints").iterdir())) == 1

    stopped = tmp_path / "stopped"
    stopped.mkdir()
    monkeypatch.chdir(stopped)
    writes, replace = [], os.replace

    def stop_at_second_epoch(*paths):
        writes.append(paths)
        if "epoch_002" in str(paths[1]):
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", stop_at_second_epoch)
    with pytest.raises(SystemExit, match="after epoch 1"):
        generate(*arguments)
    monkeypatch.setattr(os, "replace", replace)
    generate(*arguments)
    runs = [load_torch(path / checkpoints / "last.pt") for path in (tmp_path, stopped)]
    for run in runs:
        for row in run["history"]:
            del row["seconds"], row["images_per_second"]
    assert runs[0]["history"] == runs[1]["history"]
    flat = [torch.utils._pytree.tree_leaves(run) for run in runs]
    assert len(flat[0]) == len(flat[1]) > 50
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*flat))
    assert Counter(path.suffix for path in stopped.rglob("*.*")).keys().isdisjoint({".tmp"})

    relabelled = Path(shutil.copytree(folder, Path("relabelled") / folder.name))
    for split in ("train", "test"):  # the same images in the same order, of a class with another name
        first = min((relabelled / split).iterdir())
        first.rename(first.with_name(f"{first.name}_"))
    generate(f"DATASET={relabelled}", *SMALL)
    new, = set(Path("checkpoints").iterdir()) - {checkpoints}
    constants = [load_torch(path / "prior.pt")["constants"] for path in (checkpoints, new)]
    assert {name for name in constants[0] if constants[0][name] != constants[1][name]} == {"labels"}


def test_images_without_classes_and_of_another_grid(generate, folder, tmp_path, monkeypatch):
    options = {"codebook_size": 300}
    model = VQRAE(quantizer="ema_vq", quantizer_options=options, grid=4, adapter_depth=0, decoder_width=64)
    save_checkpoint(tmp_path / "model.pt", model.eval())
    for split in ("train", "test"):
        Path("flat", split).mkdir(parents=True)
        for i, file in enumerate((folder / split).rglob("*.png")):
            if split == "train" or i < 6:  # fewer test images than are shown
                os.link(file, Path("flat", split, f"{i}.png"))
    save = utils.save_torch

    def save_torch(path, content):  # as if data/ were another user's
        if path.parent.name == "data":
            raise PermissionError(13, "Permission denied", str(path))
        save(path, content)

    monkeypatch.setattr(utils, "save_torch", save_torch)
    generate("DATASET=flat", f"CHECKPOINT={tmp_path / 'model.pt'}", *SMALL, "EPOCHS=1")
    assert not list(Path("data").glob("*.pt"))
    results, = (json.loads(path.read_text()) for path in Path("outputs").rglob("results.json"))
    assert results["tokens"] == 16 and results["bits"] == results["bits_given_class"]
    for i in range(1, 6):
        Path("flat", "test", f"{i}.png").unlink()
    with pytest.raises(SystemExit, match="DATASET = 'flat', allowed: two test images"):
        generate("DATASET=flat", f"CHECKPOINT={tmp_path / 'model.pt'}", *SMALL)


@pytest.mark.parametrize("config", [[1], "x", None, {"sizes": [4]}, random_prior(classes=3).config,
                                    random_prior().config | {"dim": 0}])
def test_a_damaged_prior_is_named_in_one_line(config, tmp_path):
    prior = random_prior()
    save_torch(tmp_path / "prior.pt", {"config": config, "prior": prior.state_dict()})
    with pytest.raises(ValueError, match="^prior .*prior.pt does not fit this code: .") as error:
        load_prior(tmp_path / "prior.pt")
    assert "\n" not in str(error.value)
    next(prior.parameters()).data.fill_(math.nan)
    save_torch(tmp_path / "prior.pt", {"config": prior.config, "prior": prior.state_dict()})
    with pytest.raises(ValueError, match="does not fit this code: .* = 'NaN or infinity', allowed: finite numbers"):
        load_prior(tmp_path / "prior.pt")


def test_the_prior_that_ships_is_of_the_checkpoint_that_ships():
    assert (SHIPPED / "prior.pt").stat().st_size < 12e6
    torch.manual_seed(0)
    prior = load_prior(SHIPPED / "prior.pt", SHIPPED / "vqrae_fsq.pt")
    indices = prior.generate(torch.tensor([0] * 8 + [8] * 8))  # aeroplanes and ships
    images = load_checkpoint(SHIPPED / "vqrae_fsq.pt").decode_from_indices(indices)
    assert images.shape == (16, 3, 32, 32)
    blue, red = images[:, 2].mean(), images[:, 0].mean()  # skies and seas
    assert blue > red + 0.03
