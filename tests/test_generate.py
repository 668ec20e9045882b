"""extras/generate.py: the bound in bits, digits, guidance and sampling, and runs of the script on a few images."""
import contextlib
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from PIL import Image
from torch.utils._pytree import tree_leaves

import extras.generate as module
import utils
from data import Dataset, load_dataset
from extras.generate import Prior, build_prior, draw_masks, load_prior, measure_bits
from extras.measure import frechet_distance
from models import PRETRAINED_DIR, VQRAE, load_checkpoint, save_checkpoint
from quantizers import build_quantizer, split_indices


def random_prior(sizes=(4, 3, 2), grid=(2, 3), classes=2):
    prior = Prior(list(sizes), list(grid), classes, 16, 1)
    for p in prior.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return prior


# The model

def probabilities(prior, indices, masked):
    """The distributions (M, codes) of an image's M masked tokens, each a product over digits."""
    codes = split_indices(torch.arange(math.prod(prior.sizes)), prior.sizes)
    digits, rows = split_indices(indices.flatten(1), prior.sizes), []
    for features in prior.features(digits, masked, torch.tensor([1])):
        features, p = features.expand(len(codes), -1, -1), 1
        for k in range(len(prior.sizes)):
            p = p * prior.logits(k, features, codes).softmax(1).gather(1, codes[:, k : k + 1])[:, 0]
        rows.append(p)
    return torch.stack(rows)


@torch.no_grad()
def test_the_bound_is_the_mean_over_all_orders():
    """Four tokens can follow each other in 24 orders. Each order gives bits; the bound is their mean."""
    prior, indices = random_prior(sizes=(3, 2), grid=(1, 4)), torch.randint(6, (1, 1, 4))
    expected = bound = 0
    for order in itertools.permutations(range(4)):
        masked = torch.ones(1, 4, dtype=torch.bool)
        for token in order:
            p = probabilities(prior, indices, masked)[masked[0, :token].sum()]
            torch.testing.assert_close(p.sum(), torch.tensor(1.0))
            expected -= p[indices[0, 0, token]].log2() / 24
            masked[0, token] = False
    for places in itertools.product([False, True], repeat=4):
        if any(places):  # each number of masked tokens is as likely
            bits = prior(indices, torch.tensor([places]), torch.tensor([1]))
            bound += bits[0] / math.comb(4, sum(places)) / 4
    torch.testing.assert_close(bound, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2])
def test_samples_have_the_models_distribution(steps):
    """Two tokens of four codes are independent if filled in one step. In two steps, either may be the first."""
    prior = random_prior(sizes=(2, 2), grid=(1, 2))
    zeros = torch.zeros(1, 1, 2).long()
    first, second = probabilities(prior, zeros, torch.tensor([[True, True]]))
    given_first = [probabilities(prior, zeros + x, torch.tensor([[False, True]]))[0] for x in range(4)]
    given_second = [probabilities(prior, zeros + x, torch.tensor([[True, False]]))[0] for x in range(4)]
    expected = first[:, None] * second
    if steps == 2:
        expected = (first[:, None] * torch.stack(given_first) + second * torch.stack(given_second, 1)) / 2
    x, y = prior.generate(torch.ones(40_000).long(), steps=steps, guidance=1.0).flatten(1).T
    counts = torch.bincount(x * 4 + y, minlength=16).view(4, 4) / 40_000
    torch.testing.assert_close(counts, expected, atol=0.015, rtol=0)  # six standard deviations


def test_masks_have_all_numbers_of_tokens_and_all_tokens_equally_often():
    masks = draw_masks(40_000, 4)
    numbers = masks.sum(1)
    assert torch.equal(numbers.bincount(), torch.tensor([0, 10_000, 10_000, 10_000, 10_000]))
    for number in (1, 2, 3):
        share = masks[numbers == number].float().mean(0)
        torch.testing.assert_close(share, torch.full((4,), number / 4), atol=0.03, rtol=0)  # six standard deviations


@torch.no_grad()
def test_a_digit_depends_on_the_digits_before_it():
    prior, features, digits = random_prior(), torch.randn(5, 3, 16), torch.zeros(5, 3).long()
    for k in range(3):
        logits = prior.logits(k, features, digits)
        assert logits.shape == (5, prior.sizes[k])
        changes = [prior.logits(k, features, digits + one) for one in torch.eye(3).long()]
        assert [torch.equal(changed, logits) for changed in changes] == [False] * k + [True] * (3 - k)


@torch.no_grad()
def test_features_depend_on_known_tokens_and_the_label():
    prior, digits, label = random_prior(), torch.zeros(2, 6, 3).long(), torch.tensor([0, 0])
    masked = torch.arange(12).view(2, 6) % 3 == 0
    features = prior.features(digits, masked, label)
    assert features.shape == (4, 3, 16)
    assert torch.equal(prior.features(digits + masked[..., None], masked, label), features)
    for changed in ((digits, masked, label + 1), (digits + ~masked[..., None], masked, label)):
        assert not torch.isclose(prior.features(*changed), features, atol=1e-4).all(2).any()
    first, second = (prior.features(digits + one, masked, label) for one in torch.eye(3).long()[:2])
    assert not torch.isclose(first, second, atol=1e-4).all(2).any()  # each digit has its own embeddings


class Coin(Prior):
    """One digit. The odds of 1 are e with the class, and even without. `seen` has the masked tokens of each step."""

    def __init__(self):
        super().__init__([2], [1, 4], 1, 16, 1)
        self.seen = []

    def features(self, digits, masked, labels):
        self.seen.append(masked)
        return (labels[:, None] == 0).float().expand_as(masked)[masked]

    def logits(self, k, features, digits):
        return F.pad(features[:, None], (1, 0))


def test_guidance_rises_over_the_steps(monkeypatch):
    """With guidance 3 in four steps, the scales are 1.5, 2.5, 3.5 and 4.5; a temperature of 0.5 doubles logits."""
    prior, scales = Coin(), []

    def multinomial(p, count):
        scales.extend(((p[:, 1] / p[:, 0]).log() / 2).tolist())
        return torch.zeros(len(p), 1).long()

    monkeypatch.setattr(torch, "multinomial", multinomial)
    mask = torch.tensor([[[True, True, True, True]], [[False, True, False, True]]])  # the second takes two steps
    prior.fill(mask.long(), mask, torch.tensor([0, 0]), steps=4, guidance=3.0, temperature=0.5)
    assert scales == pytest.approx([1.5, 2.0, 2.5, 4.0, 3.5, 4.5], rel=1e-4)


def test_later_steps_fill_more_tokens_in_a_random_order():
    prior = Coin()
    prior.generate(torch.zeros(2000).long(), steps=2, guidance=1.0)
    all_tokens, rest = prior.seen
    assert all_tokens.all() and (rest.sum(1) == 3).all()  # half of the steps fill a quarter of the tokens
    torch.testing.assert_close((~rest).float().mean(0), torch.full((4,), 0.25), atol=0.06, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
def test_fill_keeps_what_is_not_masked_and_does_not_see_what_is(steps):
    prior, indices, mask = random_prior(), torch.randint(24, (30, 2, 3)), torch.rand(30, 2, 3) < 0.5
    results = []
    for hidden, labels in ((indices, None), (indices.masked_fill(mask, 5), torch.full((30,), 2))):  # 2: no class
        torch.manual_seed(1)
        results.append(prior.fill(hidden, mask, labels, steps))
    assert torch.equal(*results)
    assert torch.equal(results[0][~mask], indices[~mask]) and not torch.equal(results[0], indices)


@pytest.mark.parametrize("options, name", [
    ({"indices": torch.zeros(2, 1, 3).long()}, "indices"), ({"indices": torch.full((2, 2, 3), 24)}, "0 to 23"),
    ({"mask": torch.ones(2, 2, 3)}, "mask"), ({"labels": [0]}, "labels"), ({"labels": [0, 3]}, "labels.*0 to 2"),
    ({"guidance": 0.5}, "guidance"), ({"steps": 0}, "steps"), ({"temperature": 0}, "temperature")], ids=str)
def test_fill_refuses_other_shapes_and_ranges(options, name):
    given = {"indices": torch.zeros(2, 2, 3).long(), "mask": torch.ones(2, 2, 3, dtype=torch.bool)}
    with refused(name):
        random_prior().fill(**given | options)


# Quantizers and files

@pytest.mark.parametrize("name, options, sizes", [
    ("ema_vq", {"codebook_size": 64}, (64,)), ("fsq", {"levels": [4, 3, 2]}, (4, 3, 2)), ("ddcl", {}, (31,) * 4),
    ("residual_vq", {"codebook_size": 16, "codebooks": 3}, (16,) * 3)], ids=str)
def test_a_token_has_a_digit_for_each_codebook_or_level(name, options, sizes):
    quantizer = build_quantizer(name, 48, **options)
    prior = build_prior(quantizer, [1, 600], 0, 16, 1)
    assert prior.sizes == sizes
    indices = torch.arange(600).view(1, 1, 600) * 1_529 % quantizer.codebook_size
    mask = torch.zeros(1, 1, 600, dtype=torch.bool)
    for given in ((indices, mask), (indices.tolist(), mask.tolist(), [0]), (indices.numpy(), mask.numpy())):
        assert torch.equal(prior.fill(*given), indices)


@pytest.mark.parametrize("name, options", [("ema_vq", {}), ("lfq", {"codebook_size": 8192}), ("none", {})])
def test_a_quantizer_without_small_codebooks_is_refused_by_a_sentence_that_names_others(name, options):
    with refused("4,096 codes.*fsq, .*residual_vq"):
        build_prior(build_quantizer(name, 16, **options), [4, 4], 0, 16, 1)


def test_the_prior_that_ships_draws_images_with_the_checkpoint_that_ships():
    prior, vqrae = load_prior(PRETRAINED_DIR / "prior.pt"), load_checkpoint(PRETRAINED_DIR / "vqrae_fsq.pt")
    images = vqrae.decode_from_indices(prior.generate(torch.arange(10), steps=4))
    assert images.shape == (10, 3, 32, 32) and images.std() > 0.1


@pytest.mark.parametrize("file, kept", [("prior.pt", -1000), ("vqrae_fsq.pt", None)])
def test_a_damaged_file_and_one_of_another_model_are_refused(file, kept):
    Path("prior.pt").write_bytes((PRETRAINED_DIR / file).read_bytes()[:kept])
    with refused("prior.pt (cannot be read|does not fit)"):
        load_prior("prior.pt")


# Training, measuring, runs

def test_training_sees_each_image_once_an_epoch(monkeypatch):
    """Half of the images are mirrored, and a tenth of the labels is hidden. All masked tokens weigh alike."""
    batches = []

    class Recorder(Prior):
        def forward(self, *arguments):
            batches.append(arguments)
            return super().forward(*arguments)

    def take_step(optimizers, step, total):
        indices, masked, given = batches[-1]
        tokens = indices.flatten(1)
        logits = prior.logits(0, prior.features(tokens[..., None], masked, given), tokens[masked][:, None])
        loss = F.cross_entropy(logits, tokens[masked], reduction="sum") / math.log(2) / masked.numel()
        expected, = torch.autograd.grad(loss, prior.heads[0].bias)
        torch.testing.assert_close(prior.heads[0].bias.grad, expected)

    for name, value in {"take_step": take_step, "BATCH_SIZE": 100, "EPOCHS": 2, "autocast": contextlib.nullcontext(),
                        "measure_bits": lambda *arguments, masks: 0.0,
                        "sample": lambda prior, vqrae, labels: torch.zeros(len(labels), 3, 16, 16).byte()}.items():
        monkeypatch.setattr(module, name, value)
    prior, labels = Recorder([2400], [2, 2], 5, 16, 1), torch.randint(5, (1200,))
    tokens = torch.arange(2400).view(2, -1, 1, 1).expand(-1, -1, 2, 2)  # they tell the image; mirrored ones are higher
    data = Dataset(None, labels, None, labels, [])
    module.train(prior, None, {"train": tokens, "test": tokens[0]}, data, utils.Run("run"), {})
    images = torch.cat([indices[:, 0, 0] for indices, _, _ in batches])
    given = torch.cat([given for *_, given in batches])
    epochs = (images % 1200).view(2, 1200)
    assert (epochs.sort().values == torch.arange(1200)).all() and not torch.equal(*epochs)
    assert torch.equal(given[given < 5], labels[images % 1200][given < 5])
    assert 0.05 < (given == 5).float().mean() < 0.15 and 0.42 < (images >= 1200).float().mean() < 0.58  # 8 deviations


def test_samples_and_training_images_are_compared_with_test_images(monkeypatch):
    """By a judge that sees mean colours: classes 0 and 1 are dark and bright, but all samples are bright."""
    prior, vqrae, labels = random_prior(), VQRAE("cifar", "fsq", {"levels": [4, 3, 2]}, 16, 4), torch.arange(40) % 2
    noise = torch.randint(100, (3, 40, 3, 16, 16))
    train, test, samples = (noise + 100 * torch.stack([labels, labels, torch.ones(40)])[..., None, None, None]).byte()
    tokens, data = {"test": torch.randint(24, (40, 2, 3))}, Dataset(train, labels, test, labels, ["dark", "bright"])
    monkeypatch.setattr(module, "sample", lambda prior, vqrae, labels: samples[: len(labels)])
    monkeypatch.setattr(module, "load_judges", lambda *sizes: {"colours": torch.nn.Identity()})
    monkeypatch.setattr(module, "SAMPLES", 30)
    module.measure(prior, vqrae, tokens, data, utils.Run("run"))
    results = json.loads(Path("outputs/run/results.json").read_text())
    train, test, samples = ((images / 255).mean((2, 3)) for images in (train, test, samples))
    utils.seed_everything(module.SEED)
    classes = labels[torch.randint(40, (30,))]
    assert results == pytest.approx({
        "nominal_bits": 6 * math.log2(24),
        "bits": measure_bits(prior, tokens["test"], torch.full((40,), 2)),
        "bits_given_class": measure_bits(prior, tokens["test"], labels),
        "frechet_colours": frechet_distance(test, samples[:30]),
        "frechet_colours_of_training": frechet_distance(test, train[:30]),
        "probe_colours": (classes == 1).float().mean().item(),  # the class that samples look like
        "probe_colours_of_test": 1.0}, rel=1e-3)


def save_tokenizer(quantizer="ema_vq", **options):
    """Write tokenizer.pt, an untrained model of 16 x 16 pixels and 4 x 4 tokens."""
    torch.manual_seed(0)
    model = VQRAE("cifar", quantizer, options or {"codebook_size": 64}, 16, 4, decoder_width=32, decoder_depth=1)
    save_checkpoint("tokenizer.pt", model)


@pytest.fixture
def main(folder, monkeypatch):
    """main("NAME=value", ...) runs two short epochs in fp32, and returns the run's two folders."""
    constants = {name: value for name, value in vars(module).items() if name.isupper()}
    small = ["CHECKPOINT=tokenizer.pt", f"DATASET={folder}", "DIM=64", "DEPTH=1", "EPOCHS=2", "BATCH_SIZE=30",
             "STEPS=2", "SAMPLES=20"]
    monkeypatch.setattr(module, "autocast", contextlib.nullcontext())

    def run(*arguments):
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)
        monkeypatch.setattr("sys.argv", ["generate.py", *small, *arguments])
        module.main()
        outputs, = Path("outputs").iterdir()
        return outputs, Path("checkpoints", outputs.name)

    return run


def test_a_run_that_failed_in_its_second_epoch_ends_as_a_whole_one(main, folder, tmp_path, monkeypatch):
    save_tokenizer()
    outputs, checkpoints = main()
    files = {file.name for file in outputs.iterdir()}
    assert files == {"epoch_001.png", "epoch_002.png", "metrics.csv", "results.json"}
    prior, tokens = load_prior(checkpoints / "prior.pt"), utils.load_torch(checkpoints / "tokens.pt")
    assert prior.sizes == (64,) and prior.classes == 2
    data, vqrae = load_dataset(str(folder), 16), load_checkpoint("tokenizer.pt")
    train, test = data.train_images / 255, data.test_images / 255
    for indices, images in zip((*tokens["train"], tokens["test"]), (train, train.flip(3), test), strict=True):
        assert (vqrae.encode_to_indices(images) == indices).float().mean() > 0.95  # rounding may differ

    save_grid, second = utils.save_grid, tmp_path / "second"

    def fail_in_epoch_2(path, *arguments):
        if path.name == "epoch_002.png":
            raise OSError("the disk is full")
        save_grid(path, *arguments)

    second.mkdir()
    monkeypatch.chdir(second)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(utils, "save_grid", fail_in_epoch_2)
        main(f"CHECKPOINT={tmp_path / 'tokenizer.pt'}")
    main(f"CHECKPOINT={tmp_path / 'tokenizer.pt'}")
    assert (second / outputs / "results.json").read_text() == (tmp_path / outputs / "results.json").read_text()
    whole, resumed = (utils.load_torch(path / checkpoints / "last.pt") for path in (tmp_path, second))
    for row in whole["history"] + resumed["history"]:
        del row["seconds"]
    for a, b in zip(tree_leaves(whole), tree_leaves(resumed), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    monkeypatch.setattr(module, "train", None)
    main(f"CHECKPOINT={tmp_path / 'tokenizer.pt'}")  # a finished run does not train


def images_without_classes(path, count):
    """A folder at this path, with so many training and test images."""
    for split in ("train", "test"):
        (path / split).mkdir()
        for i in range(count):
            Image.new("RGB", (16, 16), (9 * i, 0, 0)).save(path / split / f"{i}.png")
    return path


def test_images_without_classes_have_a_prior_without_classes(main, tmp_path):
    save_tokenizer("fsq", levels=(4, 3))
    outputs, checkpoints = main(f"DATASET={images_without_classes(tmp_path, 2)}", "BATCH_SIZE=2", "EPOCHS=1")
    assert load_prior(checkpoints / "prior.pt").classes == 0
    assert "probe" not in (outputs / "results.json").read_text()


def test_a_single_image_is_refused_before_training(main, tmp_path):
    save_tokenizer()
    with refused("1 training and 1 test images"):
        main(f"DATASET={images_without_classes(tmp_path, 1)}", "BATCH_SIZE=1")


@pytest.mark.parametrize("argument, message", [
    ("SAMPLES=1", "SAMPLES = 1"), ("GUIDANCE=0.5", "GUIDANCE"), ("DIM=130", "DIM.*64"), ("BATCH_SIZE=91", "90"),
    ("CHECKPOINT=gone.pt", "gone.pt"), ("EPOCHS=2.5", "EPOCHS")])
def test_a_wrong_constant_is_refused_before_training(argument, message, main, monkeypatch):
    save_tokenizer()
    with refused(message):
        main(argument)


def test_a_large_codebook_is_refused_before_images_are_read(main, monkeypatch):
    save_tokenizer(codebook_size=5000)
    monkeypatch.setattr(module, "load_dataset", None)
    with refused("4,096 codes, not 5,000"):
        main()
