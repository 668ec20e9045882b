"""generate.py: the prior on made-up tokens, and runs of the script on a few images."""
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import extras.generate as module
import models
import utils
from data import Dataset, load_dataset
from extras.generate import Prior, build_prior, code_dim, load_prior, measure_bits
from extras.measure import frechet_distance, linear_probe
from models import PRETRAINED_DIR, build_encoder
from quantizers import build_quantizer, join_indices, split_indices


@pytest.fixture
def small(monkeypatch):
    """Constants for seconds, restored afterwards, and fp32."""
    values = {"DIM": 32, "DEPTH": 1, "EPOCHS": 2, "BATCH_SIZE": 30, "DROP_LABEL": 0.3, "STEPS": 2, "SAMPLES": 20}
    for name in filter(str.isupper, [*vars(module)]):
        monkeypatch.setattr(module, name, values.get(name, getattr(module, name)))
    monkeypatch.setattr(module, "autocast", torch.autocast("cpu", enabled=False))


def random_prior(sizes=(4, 3, 2), grid=(2, 3), classes=2):
    prior = Prior(list(sizes), list(grid), classes, 16, 1, knows_codes=True)
    for weight in (*prior.parameters(), prior.codes):
        torch.nn.init.normal_(weight, std=0.5)
    return prior


class Optimal(Prior):
    """Knows the joint distribution (3, 4, 4) of two tokens, of two sub-indices below 2: of two classes, and of both."""

    def __init__(self):
        super().__init__([2, 2], [1, 2], 2, 16, 1)
        joint = torch.distributions.Dirichlet(torch.full((2, 16), 0.2)).sample().clamp(min=1e-4).view(2, 4, 4)
        self.joint = F.normalize(torch.cat([joint, joint.mean(0, keepdim=True)]), p=1, dim=(1, 2))

    def features(self, x, masked, labels):
        """The distribution (4,) of each masked token, given the other unless that is masked, too."""
        joint, (first, second), image = self.joint[labels], join_indices(x, self.sizes).T, torch.arange(len(x))
        given, alone = (joint[image, :, second], joint[image, first]), (joint.sum(2), joint.sum(1))
        return torch.where(masked.flip(1)[..., None], torch.stack(alone, 1), torch.stack(given, 1))[masked]

    def logits(self, features, x):
        table = features.view(-1, 2, 2)  # second sub-index, first
        return [table.sum(1).log(), table[torch.arange(len(table)), :, x[:, 0]].log()]


def test_bits_and_samples_of_an_optimal_model():
    """Its bound is the entropy. Tokens filled one by one follow the joint distribution; at once, they are independent.
    """
    prior, tokens, bits = Optimal(), torch.cartesian_prod(torch.arange(4), torch.arange(4)), []
    masks = torch.tensor([[True, True], [True, True], [True, False], [False, True]])  # one or two tokens: as often
    for label, joint in enumerate(prior.joint):
        bound = [prior(prior.split(tokens[:, None]), mask.expand(16, 2), torch.tensor([label] * 16)) for mask in masks]
        torch.testing.assert_close(joint.flatten() @ torch.stack(bound).mean(0), -(joint * joint.log2()).sum())
    for steps, expected in ((2, prior.joint[1]), (1, prior.joint[1].sum(1)[:, None] * prior.joint[1].sum(0))):
        first, second = prior.generate(torch.ones(40_000).long(), steps=steps, guidance=1.0).flatten(1).T
        counts = torch.bincount(first * 4 + second, minlength=16).view(4, 4) / 40_000
        torch.testing.assert_close(counts, expected, atol=0.012, rtol=0)
    labels = torch.randint(2, (2000,))
    indices, state = tokens[torch.multinomial(prior.joint.flatten(1)[labels], 1)], torch.get_rng_state()
    for given in (labels, torch.full_like(labels, 2), 1 - labels):  # right, hidden and wrong
        bits.append(measure_bits(prior, indices, given))
        assert bits[-1] == pytest.approx(-prior.joint[given, *indices[:, 0].T].log2().mean().item(), rel=0.02)
    assert bits[0] + 0.2 < bits[1] < bits[2] - 0.2 and torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_what_a_prediction_depends_on():
    """Unmasked tokens, the label, and a token's earlier sub-indices; nothing else."""
    prior, x, label = random_prior(), torch.zeros(2, 6, 3).long(), torch.tensor([0, 0])
    masked = torch.arange(12).view(2, 6) % 3 == 0
    features = prior.features(x, masked, label)
    assert torch.equal(prior.features(x + masked[..., None], masked, label), features)
    for other in (prior.features(x, masked, label + 1), prior.features(x + ~masked[..., None], masked, label)):
        assert other.shape == (4, 16) and not torch.isclose(other, features, atol=1e-4).all(1).any()
    for k, logits in enumerate(prior.logits(features, x[masked])):
        changed = [prior.logits(features, x[masked] + one)[k] for one in torch.eye(3).long()]
        assert [torch.equal(logits, other) for other in changed] == [False] * k + [True] * (3 - k)
    torch.nn.init.zeros_(prior.embed_code.weight)  # codes enter as well as one-hot vectors
    assert not torch.isclose(prior.features(x, masked, label), features, atol=1e-4).all(1).any()


@pytest.mark.parametrize("name, options, sizes", [
    ("fsq", {"levels": [4, 3, 2]}, (4, 3, 2)), ("ddcl", {}, (31,) * 4), ("simvq", {"codebook_size": 300}, (15, 20)),
    ("ema_vq", {"codebook_size": 16, "codebooks": 3}, (16,) * 3), ("ema_vq", {"codebook_size": 512}, (16, 32)),
    ("ema_vq", {"codebook_size": 64, "codebooks": 3}, (64,) * 3)], ids=str)
@torch.no_grad()
def test_sub_indices_of_each_quantizer(name, options, sizes):
    """Codes are known up to 2**17, but for a rotation, shift and scale. Near codes share a cluster. With the query 2 q,
    and -1 for the squared length, logits are -|mean of codes - q|^2."""
    quantizer = build_quantizer(name, 8, **options)
    size, prior = quantizer.codebook_size, build_prior(quantizer, [1, 600], 0, 16, 1)
    indices = torch.arange(600).view(1, 1, 600) * 7 % size
    x, all_x = prior.split(indices)[0], split_indices(torch.arange(size), sizes)
    assert prior.sizes == sizes and len(x.unique(dim=0)) == min(size, 600)
    mask = torch.zeros(1, 1, 600).bool()
    for given in ((indices, mask), (indices.tolist(), mask.tolist(), [0]), (indices.numpy(), mask.numpy())):
        assert torch.equal(prior.fill(*given), indices)
    assert prior.config["knows_codes"] == (name in ("ema_vq", "simvq") and size <= 2**17)
    for token in (0, 7, 99) if prior.config["knows_codes"] else ():
        codes, known = quantizer.get_codebook_entry(indices[0, 0]), prior.codes[join_indices(x, sizes)]
        distances = [torch.cdist(z, z) / z.var(0).sum().sqrt() for z in (codes, known)]
        torch.testing.assert_close(*distances, atol=0.01, rtol=1e-3)
        for k, head in enumerate(prior.heads):
            head.bias[-code_dim - 1 :] = torch.cat([2 * known[5], -torch.ones(1)])
            alike = (all_x[:, :k] == x[token, :k]).all(1)  # in the sub-indices before
            means = torch.stack([prior.codes[alike & (all_x[:, k] == i)].mean(0) for i in range(sizes[k])])
            logits, expected = prior.logits(torch.zeros(600, 16), x)[k][token], -(means - known[5]).square().sum(1)
            torch.testing.assert_close(logits.log_softmax(0), expected.log_softmax(0), atol=1e-3, rtol=1e-4)
    if len(prior.to_sorted):
        assert sum(codes[x[:, 0] == i].var(0).sum() for i in range(sizes[0])) / sizes[0] < 0.7 * codes.var(0).sum()


def test_fill_keeps_what_is_not_masked():
    """In any number of steps. Masked tokens have no effect, and no labels are the last."""
    prior, indices, mask = random_prior(), torch.randint(24, (30, 2, 3)), torch.rand(30, 2, 3) < 0.5
    for steps in (1, 2, 5, 50):
        filled = prior.fill(indices, mask, None, steps)
        assert torch.equal(filled[~mask], indices[~mask]) and (filled[mask] != indices[mask]).float().mean() > 0.5
    results = [torch.manual_seed(1) and prior.fill(hidden, mask, labels) for hidden, labels in (
        (indices, None), (indices.masked_fill(mask, 5), torch.full((30,), 2)))]
    assert torch.equal(*results)


def test_steps_fill_more_and_more_tokens_at_random_and_guidance_rises(monkeypatch):
    prior, odds, seen = random_prior(sizes=(2,), grid=(1, 4), classes=1), [], []
    monkeypatch.setattr(prior, "features", lambda x, masked, labels: seen.append(masked) or (
        (labels[:1] == 0).float().expand(masked.sum(), 1)))  # logits 0 and 1 with a class, 0 and 0 without
    monkeypatch.setattr(prior, "logits", lambda features, x: [F.pad(features, (1, 0))])
    monkeypatch.setattr(torch, "multinomial", lambda p, count: odds.extend((p[:, 1] / p[:, 0]).log().tolist()) or (
        torch.zeros(len(p), 1).long()))
    mask = torch.tensor([[[True, True, True, True]], [[False, True, False, True]]])  # of the second in two steps
    prior.fill(mask.long(), mask, torch.tensor([0, 0]), steps=4, guidance=3.0, temperature=0.5)
    assert [x / 2 for x in odds] == pytest.approx([1.5, 2.0, 2.5, 4.0, 3.5, 4.5], rel=1e-4)
    prior.generate(torch.zeros(64).long(), steps=2, guidance=1.0)
    assert [masked.sum(1).unique().tolist() for masked in seen[-2:]] == [[4], [3]]  # a quarter first, as (1 / 2)**2
    assert seen[-1].sum(0).min() > 32  # any token may be first


def test_training(small, monkeypatch):
    """Each image once an epoch, half mirrored, with its label unless that is dropped. All masked tokens weigh alike."""
    labels, inputs, steps, original = torch.randint(5, (300,)), [], [], module.take_step
    prior = build_prior(build_quantizer("fsq", 8, levels=[30, 20]), [2, 2], 5, 16, 1)
    indices = torch.arange(600).view(-1, 1, 1).expand(-1, 2, 2)  # tokens tell the image; from 300 on, mirrored ones

    def take_step(optimizers, step, total):
        x, masked, given = inputs[-1]
        logits = prior.logits(prior.features(x, masked, given), x[masked])
        nats = sum(F.cross_entropy(z, x[masked][:, k], reduction="sum") for k, z in enumerate(logits))
        parameters = [p for p in prior.parameters() if p.grad is not None]
        expected = torch.autograd.grad(nats / math.log(2) / masked.numel(), parameters)
        torch.testing.assert_close([p.grad for p in parameters], [*expected])
        original(optimizers, step, total), steps.append((step, total))

    monkeypatch.setattr(module, "take_step", take_step), monkeypatch.setattr(module, "EVAL_IMAGES", 20)
    monkeypatch.setattr(module, "sample", lambda prior, vqrae, labels: torch.zeros(len(labels), 3, 16, 16).byte())
    prior.register_forward_pre_hook(lambda _, x: inputs.append(x) if torch.is_grad_enabled() else None)
    data, run = Dataset(None, labels, None, labels[:50], []), utils.Run("run")
    module.train(prior, None, {"train": indices, "test": indices[:50]}, data, run, {})
    images, given = torch.cat([join_indices(x[:, 0], prior.sizes) for x, _, _ in inputs]), torch.cat([*zip(*inputs)][2])
    assert steps == [(step, 20) for step in range(20)]
    epochs = (images % 300).view(2, 300)  # in another order each
    assert (epochs.sort().values == torch.arange(300)).all() and not torch.equal(*epochs)
    assert torch.equal(given[given < 5], labels[images % 300][given < 5])
    assert 0.2 < (given == 5).float().mean() < 0.4 and 0.4 < (images >= 300).float().mean() < 0.6
    bits, saved = measure_bits(prior, indices[:20], labels[:20], 1) / 4, load_prior("checkpoints/run/prior.pt")
    assert run.history[-1]["test_bits"] == pytest.approx(bits) and run.history[-1]["bits"] < math.log2(600)
    torch.testing.assert_close([*saved.parameters()], [p.half().float() for p in prior.parameters()])  # in 16 bits


def test_a_run_and_one_that_was_stopped(small, folder, trained, tmp_path, monkeypatch):
    (best,), samples, sample = trained.glob("checkpoints/*/*stage2_best.pt"), [], module.sample
    monkeypatch.setattr("sys.argv", ["extras.generate", f"CHECKPOINT={best}", f"DATASET={folder}"])
    monkeypatch.setattr(module, "sample", lambda *a: samples.append((sample(*a), a[-1])) or samples[-1][0])
    module.main()
    (outputs,), (checkpoints,) = Path("outputs").iterdir(), Path("checkpoints").iterdir()
    tokens, prior = utils.load_torch(checkpoints / "tokens.pt"), load_prior(checkpoints / "prior.pt")
    data, vqrae, results = load_dataset(str(folder), 32), models.load_checkpoint(best), outputs / "results.json"
    train, test, (drawn, classes) = data.train_images / 255, data.test_images / 255, samples[-1]
    for name, images in (("train", torch.cat([train, train.flip(3)])), ("test", test)):  # mirrored ones follow
        assert (vqrae.encode_to_indices(images) == tokens[name]).float().mean() > 0.99
    with torch.no_grad():
        judged = [build_encoder("efficientnet_lite0", 8, 0)(x).mean((2, 3)) for x in (test, drawn / 255, train[:20])]
        real, tested, drawn = (build_encoder("cifar", 4).eval()(x).mean((2, 3)) for x in (train, test, drawn / 255))
    expected = {"nominal_bits": 384, "bits": measure_bits(prior, tokens["test"], torch.full((38,), 2)),
                "bits_given_class": measure_bits(prior, tokens["test"], data.test_labels),
                "frechet_cifar": frechet_distance(tested, drawn),
                "frechet_cifar_of_training": frechet_distance(tested, real[:20]),
                "frechet_lite0": frechet_distance(*judged[:2]),
                "frechet_lite0_of_training": frechet_distance(judged[0], judged[2]),
                "probe_test": linear_probe(real, data.train_labels, tested, data.test_labels),
                "probe_samples": linear_probe(real, data.train_labels, drawn, classes)}
    assert json.loads(results.read_text()) == pytest.approx(expected, rel=1e-3)
    assert abs(expected["bits"] - expected["bits_given_class"]) > 1
    assert len(list(outputs.glob("epoch_00[12].png"))) == 2 and len(classes) == 20 and len(classes.unique()) == 2

    monkeypatch.chdir(tmp_path / "data")
    with monkeypatch.context() as patch, pytest.raises(KeyError):  # at the end of the second epoch
        patch.setattr(utils, "save_grid", lambda path, *_: {"epoch_001.png": 0}[path.name])
        module.main()
    module.main()
    assert results.read_text() == (tmp_path / results).read_text()
    assert samples.clear() or module.main() or not samples  # a finished run draws nothing
    runs = [utils.load_torch(path / checkpoints / "last.pt") for path in (tmp_path, Path())]
    for row in runs[0]["history"] + runs[1]["history"]:
        del row["seconds"]
    pairs = [*zip(*map(tree_leaves, runs), strict=True)]
    assert len(pairs) > 50 and all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("options, name", [
    ({"indices": torch.zeros(2, 1, 3).long()}, "indices"), ({"indices": torch.full((2, 2, 3), 24)}, "below 24"),
    ({"mask": torch.ones(2, 2, 3)}, "mask"), ({"labels": torch.tensor([0, 3])}, "labels"), ({"guidance": 0.5}, "guid")])
def test_what_is_refused(options, name):
    with pytest.raises(ValueError, match=name):
        random_prior().fill(**{"indices": torch.zeros(2, 2, 3).long(), "mask": torch.ones(2, 2, 3).bool()} | options)


@pytest.mark.parametrize("name, value", [("SAMPLES", 1), ("GUIDANCE", 0.5), ("EVAL_IMAGES", 0), ("DIM", 130)])
def test_a_constant_that_would_fail_after_training_is_refused_before(name, value, monkeypatch):
    monkeypatch.setattr(module, name, value), monkeypatch.setattr("sys.argv", ["extras.generate"])
    with pytest.raises(ValueError, match=f"^{name} = "):
        module.main()


def test_the_prior_that_ships_is_of_the_checkpoint_that_ships():
    prior, vqrae = load_prior(PRETRAINED_DIR / "prior.pt"), models.load_checkpoint(PRETRAINED_DIR / "vqrae_fsq.pt")
    images = vqrae.decode_from_indices(prior.generate(torch.arange(10), steps=4))
    assert images.shape == (10, 3, 32, 32) and images.std() > 0.1
    for damaged in ((PRETRAINED_DIR / "prior.pt").read_bytes()[:-1000], (PRETRAINED_DIR / "vqrae_fsq.pt").read_bytes()):
        Path("prior.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match="prior.pt (cannot be read|does not fit)"):
            load_prior("prior.pt")
