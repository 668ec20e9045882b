"""extras/generate.py: the bound in bits, digits, guidance, sampling, and runs on a few images."""
import contextlib
import itertools
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import refused, write_images
from torch.utils._pytree import tree_leaves

import extras.generate as module
import utils
from data import Dataset
from extras.generate import Prior, draw_masks, load_prior, measure_bits
from models import PRETRAINED_DIR, VQRAE, save_checkpoint
from quantizers import QUANTIZERS, ProductVQ, split_indices


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
        features, p = features.expand(len(codes), -1), 1
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
def test_samples_have_the_models_distribution():
    """Two tokens of four codes are filled in two steps. Either may be the first."""
    prior = random_prior(sizes=(2, 2), grid=(1, 2))
    zeros = torch.zeros(1, 1, 2).long()
    first, second = probabilities(prior, zeros, torch.tensor([[True, True]]))
    given_first = torch.stack([probabilities(prior, zeros + x, torch.tensor([[False, True]]))[0] for x in range(4)])
    given_second = torch.stack([probabilities(prior, zeros + x, torch.tensor([[True, False]]))[0] for x in range(4)], 1)
    expected = (first[:, None] * given_first + second * given_second) / 2
    x, y = prior.generate(torch.ones(40_000).long(), steps=2, guidance=1.0).flatten(1).T
    counts = torch.bincount(x * 4 + y, minlength=16).view(4, 4) / 40_000
    torch.testing.assert_close(counts, expected, atol=0.015, rtol=0)  # six standard deviations


def test_masks_have_all_numbers_of_tokens_and_all_tokens_equally_often():
    masks = draw_masks(40_000, 4)
    assert masks.sum(1).bincount().tolist() == pytest.approx([0] + [10_000] * 4, abs=1)
    torch.testing.assert_close(masks.float().mean(0), torch.full((4,), 5 / 8), atol=0.015, rtol=0)  # six deviations


@torch.no_grad()
def test_a_digit_depends_on_the_digits_before_it():
    prior, features, digits = random_prior(), torch.randn(5, 16), torch.zeros(5, 3).long()
    for k in range(3):
        logits = prior.logits(k, features, digits)
        changes = [prior.logits(k, features, digits + one) for one in torch.eye(3).long()]
        assert [torch.equal(changed, logits) for changed in changes] == [False] * k + [True] * (3 - k)


@torch.no_grad()
def test_features_depend_on_known_tokens_the_label_and_the_place():
    prior, digits, label = random_prior(), torch.zeros(2, 6, 3).long(), torch.tensor([0, 0])
    masked = torch.arange(12).view(2, 6) % 3 == 0
    features = prior.features(digits, masked, label)
    assert torch.equal(prior.features(digits + masked[..., None], masked, label), features)
    for changed in ((digits, masked, label + 1), (digits + ~masked[..., None], masked, label)):
        assert not torch.isclose(prior.features(*changed), features, atol=1e-4).all(1).any()
    unknown = prior.features(digits, masked.new_ones(2, 6), label)[:6]
    assert (torch.pdist(unknown) > 1e-3).all()


@pytest.fixture
def coin(monkeypatch):
    """A prior of one digit. The odds of 1 are e with the class, and even without. Step n draws the number n."""
    prior = Prior([2], [1, 4], 1, 16, 1)
    prior.odds = []  # of each step
    prior.features = lambda digits, masked, labels: (labels[:, None] == 0).float().expand_as(masked)[masked]
    prior.logits = lambda k, features, digits: F.pad(features[:, None], (1, 0))

    def multinomial(p, count):
        prior.odds.append((p[:, 1] / p[:, 0]).mean().item())
        return torch.full((len(p), 1), len(prior.odds))

    monkeypatch.setattr(torch, "multinomial", multinomial)
    return prior


def test_guidance_rises_over_the_steps(coin):
    coin.generate(torch.tensor([0]), steps=4, guidance=3.0)
    assert coin.odds == pytest.approx([math.exp(scale) for scale in (1.5, 2.5, 3.5, 4.5)], rel=1e-4)


def test_later_steps_fill_more_tokens_in_a_random_order(coin):
    first = (coin.generate(torch.zeros(2000).long(), steps=2, guidance=1.0)[:, 0] == 1).float()
    assert (first.sum(1) == 1).all()  # half of the steps fill a quarter of the tokens
    torch.testing.assert_close(first.mean(0), torch.full((4,), 0.25), atol=0.06, rtol=0)  # six deviations


@pytest.mark.parametrize("steps", [1, 2, 10_000])
def test_fill_keeps_what_is_not_masked_and_does_not_see_what_is(steps):
    prior, indices, mask = random_prior(), torch.randint(24, (30, 2, 3)), torch.rand(30, 2, 3) < 0.5
    results = []
    for hidden in (indices, indices.masked_fill(mask, 5)):
        torch.manual_seed(1)
        results.append(prior.fill(hidden, mask, steps=steps))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0][~mask], indices[~mask])


@pytest.mark.parametrize("options, name", [
    ({"indices": torch.zeros(2, 1, 3).long()}, "indices"), ({"indices": torch.full((2, 2, 3), 24)}, "0 to 23"),
    ({"indices": torch.full((2, 2, 3), 0.7)}, "float32"), ({"labels": [0, 3]}, "labels.*0 to 2"),
    ({"labels": [0.9, 1.7]}, "float32"), ({"guidance": 0.5}, "guidance"), ({"guidance": math.inf}, "guidance"),
    ({"steps": 6.4}, "whole"), ({"steps": math.inf}, "whole")], ids=str)
def test_fill_refuses_other_shapes_and_ranges(options, name):
    given = {"indices": torch.zeros(2, 2, 3).long(), "mask": torch.ones(2, 2, 3, dtype=torch.bool)}
    with refused(name):
        random_prior().fill(**given | options)


# Training, measuring, runs

def test_training_sees_each_image_once_an_epoch(change):
    """Some are mirrored, and some labels are hidden: 5 is no class. Masked tokens weigh alike."""
    prior, run, steps = Prior([240], [2, 2], 5, 16, 1), utils.Run("run"), []
    prior.forward = Mock(wraps=prior.forward)  # it keeps the arguments of all calls

    def check_gradient(optimizers, step, total):
        steps.append((step, total))
        indices, masked, labels = prior.forward.call_args.args
        bits = Prior.forward(prior, indices, masked, labels) / prior.token_count * masked.sum(1)
        expected, = torch.autograd.grad(bits.sum() / masked.numel(), prior.mask)
        torch.testing.assert_close(prior.mask.grad, expected)

    change(module, BATCH_SIZE=50, EPOCHS=4, take_step=check_gradient, autocast=contextlib.nullcontext(),
           load_judges=lambda *arguments: {}, judge_samples=lambda *arguments: {"judged": 1},
           measure_bits=lambda prior, indices, labels: labels.item(),
           sample=lambda prior, vqrae, labels: torch.zeros(len(labels), 3, 16, 16).byte())
    tokens = torch.arange(240).view(2, 120, 1, 1).expand(-1, -1, 2, 2)  # they tell the image; mirrored ones are higher
    data = Dataset(None, torch.arange(120) % 5, torch.zeros(1, 3, 16, 16), torch.tensor([3]), [])
    module.train(prior, None, {"train": tokens, "test": tokens[0]}, data, run, {})
    assert [(row["bits"], row["bits_given_class"]) for row in run.history] == [(5, 3)] * 4
    assert [row["epoch"] for row in run.history if "judged" in row] == [2, 3, 4]  # after each third
    assert steps == [(step, 12) for step in range(12)]
    indices, masked, given = map(torch.cat, zip(*(call.args for call in prior.forward.call_args_list)))
    assert {*masked.sum(1).tolist()} == {1, 2, 3, 4}
    images = indices[:, 0, 0]
    epochs = (images % 120).view(4, 120)
    assert (epochs.sort()[0] == torch.arange(120)).all() and not torch.equal(epochs[0], epochs[1])
    assert torch.equal(given[given < 5], (images % 5)[given < 5])
    assert 15 < (given == 5).sum() < 81  # five deviations around 48
    assert 185 < (images >= 120).sum() < 295  # and around 240


def test_samples_and_training_images_are_compared_with_test_images(change):
    """A judge sees mean colours. Classes 0 and 1 are black and white, and all samples are white.

    Training images have other features: they lie at 2 and 3, and so does the judge's classifier.
    """
    labels = torch.arange(40) % 2
    images = (255 * labels).byte().view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    change(module, SAMPLES=30, sample=lambda prior, vqrae, labels: images[1:2].expand(len(labels), -1, -1, -1))
    data, colours = Dataset(images, labels, images, labels, []), images[:, :, 0, 0] / 255
    judges = {"colours": (torch.nn.Identity(), colours + 2, colours)}
    results = module.judge_samples(random_prior(), None, data, judges)
    assert 0 < results["class_colours"] < 1  # all look like class 0, and both were wanted
    # shifts of 1/2 and 2 in three channels, and a variance of 1/4 * 40/39 against none
    assert results["frechet_colours"] == pytest.approx(3 / 4 * (1 + 40 / 39), rel=1e-3)
    assert results["frechet_colours_of_training"] == pytest.approx(3 * 2**2, abs=0.3)


def test_bits_are_the_mean_over_images_and_masks():
    def prior(indices, masked, labels):
        return indices[:, 0, 0] + labels.float() + masked.sum(1)  # 3.5 of 6 tokens in the mean

    prior.token_count, prior.most_images = 6, 200
    indices, labels = torch.randint(24, (600, 2, 3)), torch.arange(600) % 2
    expected = indices[:, 0, 0].float().mean() + 0.5 + 3.5
    assert measure_bits(prior, indices, labels) == pytest.approx(expected.item(), rel=1e-3)


def test_samples_are_decoded_images_of_their_classes():
    """Here an index is the label plus steps plus guidance, and an image is an index."""
    prior = SimpleNamespace(most_images=200, generate=lambda labels, steps, guidance: labels + steps + guidance)
    vqrae = SimpleNamespace(decode_from_indices=lambda indices: indices / 255)
    labels = torch.arange(600) % 200
    expected = labels + module.STEPS + module.GUIDANCE
    assert module.sample(prior, vqrae, labels).tolist() == expected.tolist()


# The script

def test_the_prior_that_ships_has_learned_the_tokens_of_the_file_that_ships():
    constants = utils.load_torch(PRETRAINED_DIR / "prior.pt", "constants")["constants"]
    assert constants["CHECKPOINT"] == utils.digest_file(PRETRAINED_DIR / "vqrae_fsq.pt")


@pytest.fixture
def main(folder, change, monkeypatch):
    """main("NAME=value", ...) runs two short epochs on tokens of an untrained model. Returns the run's folders."""
    change(module, CHECKPOINT="tokenizer.pt", DATASET=str(folder), DIM=64, DEPTH=1, EPOCHS=2, BATCH_SIZE=30, STEPS=2,
           GUIDANCE=3.0, SAMPLES=20, load_judges=lambda *sizes: {"colours": torch.nn.Identity()})
    model = VQRAE("cifar", "ema_vq", {"codebook_size": 64}, 16, 4, decoder_width=32, decoder_depth=1)
    save_checkpoint("tokenizer.pt", model)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["generate.py", *arguments])
        module.main()
        for outputs in Path("outputs").glob("*"):
            return outputs, Path("checkpoints", outputs.name)

    return run


def test_a_run_that_failed_in_its_second_epoch_ends_as_a_whole_one(main, monkeypatch):
    outputs, checkpoints = main()
    results, prior = (outputs / "results.json").read_text(), load_prior(checkpoints / "prior.pt")
    whole, save_grid = utils.load_torch(checkpoints / "last.pt"), utils.save_grid
    assert prior.classes == 2
    torch.testing.assert_close(dict(prior.state_dict()), dict(whole["prior"]), rtol=0, atol=0.02)  # of 8 bits
    shutil.rmtree("outputs")
    shutil.rmtree("checkpoints")

    def fail_in_epoch_2(path, *arguments):
        if path.name == "epoch_002.png":
            raise OSError("the disk is full")
        save_grid(path, *arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(utils, "save_grid", fail_in_epoch_2)
        main()
    main()
    assert (outputs / "results.json").read_text() == results and (outputs / "epoch_002.png").exists()
    resumed = utils.load_torch(checkpoints / "last.pt")
    for a, b in zip(tree_leaves(whole), tree_leaves(resumed), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    monkeypatch.setattr(module, "train", None)
    main()  # a finished run does not train


def test_tokens_are_those_of_images_and_their_mirror_images():
    vqrae, images = VQRAE("cifar", "fsq", {"levels": [4, 3, 2]}, 16, 4).eval(), torch.rand(6, 3, 16, 16)
    images = (images * 255).byte()
    tokens = module.load_tokens(vqrae, Dataset(images, None, images[:2], None, []), Path("tokens.pt"))
    found = torch.cat([*tokens["train"], tokens["test"]])
    expected = vqrae.encode_to_indices(torch.cat([images, images.flip(3), images[:2]]) / 255)
    assert (found == expected).float().mean() > 0.9  # rounding may differ
    assert torch.equal(module.load_tokens(None, None, Path("tokens.pt"))["train"], tokens["train"])  # from the file


class Levels(ProductVQ):
    """A user's quantizer, whose attribute has the name of FSQ's."""

    levels = 4


@pytest.mark.parametrize("name, options, sizes", [
    ("ema_vq", {"codebook_size": 64}, (64,)), ("fsq", {"levels": [4, 3, 2]}, (4, 3, 2)), ("ddcl", {}, (31,) * 4),
    ("own", {"codebook_size": 16, "code_dim": 4}, (16, 16)),
    ("residual_vq", {"codebook_size": 16, "codebooks": 3}, (16,) * 3)], ids=str)
def test_a_token_has_a_digit_for_each_codebook_or_level(name, options, sizes, main, change, monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "own", Levels)
    change(module, train=Mock(), load_tokens=Mock())
    save_checkpoint("other.pt", VQRAE("cifar", name, options, 16, 4, decoder_width=32, decoder_depth=1))
    main("CHECKPOINT=other.pt")
    (prior, *_), = (call.args for call in module.train.call_args_list)
    assert prior.sizes == sizes
    indices = torch.arange(64).view(4, 4, 4) * 1_529 % math.prod(sizes)
    assert torch.equal(prior.fill(indices.tolist(), torch.zeros(4, 4, 4).bool().tolist(), [0] * 4), indices)


def test_images_without_classes_have_a_prior_without_classes(main):
    write_images("photos", ["train/a", "train/b", "test/a", "test/b"])
    outputs, checkpoints = main("DATASET=photos", "EPOCHS=1")
    assert load_prior(checkpoints / "prior.pt").classes == 0
    assert "class_colours" not in (outputs / "results.json").read_text()


@pytest.mark.parametrize("argument, message", [
    ("SAMPLES=1", "SAMPLES = 1"), ("GUIDANCE=0.5", "GUIDANCE"), ("DIM=130", "DIM.*64"), ("BATCH_SIZE=0", "BATCH_SIZE"),
    ("CHECKPOINT=gone.pt", "gone.pt"), ("EPOCHS=2.5", "EPOCHS"), ("DATASET=few", "2 training and 1 test images"),
    (f"CHECKPOINT={PRETRAINED_DIR}/vqrae_ema_vq.pt", "4,096 codes"), ("CHECKPOINT=none.pt", "fsq, .*residual_vq")])
def test_a_wrong_constant_is_refused_before_training(argument, message, main):
    write_images("few", ["train/a", "train/b", "test/a"])
    save_checkpoint("none.pt", VQRAE("cifar", "none", {}, 16, 4))
    with refused(message):
        main(argument)
