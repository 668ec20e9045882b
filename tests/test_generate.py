"""extras/generate.py: bits, what a prior sees, guidance, sampling, and runs on a few images."""
import contextlib
import math
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import refused, write_images

import extras.generate as module
import utils
from data import Dataset
from extras.generate import Prior, load_prior, measure_bits
from models import PRETRAINED_DIR, VQRAE, save_checkpoint
from quantizers import split_indices

both_orders = pytest.mark.parametrize("order", ["raster", "masked"])


def random_prior(order="masked", sizes=(4, 3, 2), grid=(2, 3)):
    prior = Prior(list(sizes), list(grid), 2, 16, 1, order)  # of two classes
    for p in prior.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return prior


def probabilities(prior, indices, masked):
    """The distributions (M, codes) of an image's M masked tokens, each a product over digits."""
    codes = split_indices(torch.arange(math.prod(prior.sizes)), prior.sizes)
    z = prior.features(split_indices(indices.flatten(1), prior.sizes), masked, torch.tensor([1]))[masked]
    z, p = z[:, None].expand(-1, len(codes), -1), 1
    for k, head in enumerate(prior.heads):
        p = p * head(z).softmax(2)[:, range(len(codes)), codes[:, k]]
        if k < len(prior.embed_earlier):
            z = z + prior.embed_earlier[k](codes[:, k])
    return p


@torch.no_grad()
@both_orders
def test_bits_are_the_mean_of_masked_tokens_for_all_tokens(order):
    prior, indices, masked = random_prior(order), torch.randint(24, (1, 2, 3)), torch.tensor([[1, 0, 1, 1, 0, 1]]) > 0
    p = probabilities(prior, indices, masked).gather(1, indices.view(6, 1)[masked[0]])
    torch.testing.assert_close(prior(indices, masked, torch.tensor([1])), -6 * p.log2().mean()[None], rtol=1e-4, atol=0)


@torch.no_grad()
def test_bits_in_raster_order_are_exact():
    prior, grids = random_prior("raster", (3, 2), (2, 2)), torch.cartesian_prod(*[torch.arange(6)] * 4)
    bits = prior(grids.view(-1, 2, 2), torch.ones_like(grids).bool(), torch.ones(len(grids)).long())
    torch.testing.assert_close((0.5**bits).sum(), torch.tensor(1.0), rtol=1e-4, atol=0)  # of all 1,296 grids


@torch.no_grad()
@both_orders
def test_samples_have_the_models_distribution(order):
    """Two tokens of four codes are drawn in two steps. Without an order either may be the first."""
    prior, zeros = random_prior(order, sizes=(2, 2), grid=(1, 2)), torch.zeros(1, 1, 2).long()
    first, second = probabilities(prior, zeros, torch.tensor([[True, True]]))
    given_first = torch.stack([probabilities(prior, zeros + x, torch.tensor([[False, True]]))[0] for x in range(4)])
    given_second = torch.stack([probabilities(prior, zeros + x, torch.tensor([[True, False]]))[0] for x in range(4)], 1)
    forwards, backwards = first[:, None] * given_first, second * given_second
    expected = forwards if prior.raster else (forwards + backwards) / 2
    x, y = prior.generate(torch.ones(40_000).long(), steps=2, guidance=1.0).flatten(1).T
    counts = torch.bincount(x * 4 + y, minlength=16).view(4, 4) / 40_000
    torch.testing.assert_close(counts, expected, atol=0.015, rtol=0)  # six standard deviations


def test_masks_have_all_numbers_of_tokens_and_all_tokens_equally_often():
    masks = random_prior(grid=(2, 2)).draw_masks(40_000)
    assert masks.sum(1).bincount().tolist() == pytest.approx([0] + [10_000] * 4, abs=1)
    torch.testing.assert_close(masks.float().mean(0), torch.full((4,), 5 / 8), atol=0.015, rtol=0)  # six deviations


@torch.no_grad()
@both_orders
def test_a_prior_sees_the_label_its_place_and_the_tokens_that_its_order_allows(order):
    prior, masked = random_prior(order, grid=(3, 4)).double(), torch.arange(12).expand(12, 12) % 3 == 0
    features = prior.features(torch.zeros(12, 12, 3).long(), masked, torch.zeros(12).long())
    digits = torch.eye(12).long()[..., None].expand(-1, -1, 3)  # image i has another token i
    seen = ~torch.isclose(prior.features(digits, masked, torch.zeros(12).long()), features, rtol=0, atol=1e-9).all(2)
    expected = torch.ones(12, 12).triu(1).bool() if prior.raster else ~masked.T  # (12, 12): token i, by token j
    assert torch.equal(seen, expected)
    other_label = prior.features(torch.zeros(12, 12, 3).long(), masked, torch.ones(12).long())
    assert not torch.isclose(other_label, features, atol=1e-4).all(2).any() and (torch.pdist(features[0]) > 1e-3).all()


@torch.no_grad()
def test_one_token_after_the_other_has_the_features_of_the_whole_grid():
    prior, digits = random_prior("raster", grid=(3, 4)).double(), torch.randint(2, (5, 12, 3))
    inputs, memory, found = (digits, digits[..., 0] > 1, torch.tensor([0, 1, 2, 0, 1])), {"grid": (3, 4)}, []
    for place in range(12):
        memory["place"] = divmod(place, 4)
        found.append(prior.features(*inputs, memory))
    torch.testing.assert_close(torch.cat(found, 1), prior.features(*inputs))


@pytest.fixture
def coin(monkeypatch):
    """coin(order) has one digit. The odds of 1 are e with the class, and even without. Step n draws the number n."""
    odds = []  # of each step
    monkeypatch.setattr(torch, "multinomial", lambda p, _: odds.append(p[:, 1] / p[:, 0]) or torch.full_like(
        p[:, :1], len(odds), dtype=torch.int64))

    def build(order):
        prior, prior.odds = Prior([2], [1, 4], 1, 16, 1, order), odds
        prior.features = lambda digits, masked, labels, _: (labels == 0).float().view(-1, 1, 1).expand(*masked.shape, 1)
        prior.heads = torch.nn.ModuleList([torch.nn.ConstantPad1d((1, 0), 0)])
        return prior

    return build


@both_orders
def test_guidance_rises_over_the_steps(order, coin):
    prior = coin(order)
    prior.generate(torch.tensor([0]), steps=4, guidance=3.0)
    assert torch.cat(prior.odds).log().tolist() == pytest.approx([1.5, 2.5, 3.5, 4.5], rel=1e-4)


def test_later_steps_fill_more_tokens_in_a_random_order(coin):
    first = (coin("masked").generate(torch.zeros(2000).long(), steps=2, guidance=1.0)[:, 0] == 1).float()
    assert (first.sum(1) == 1).all()  # half of the steps fill a quarter of the tokens
    torch.testing.assert_close(first.mean(0), torch.full((4,), 0.25), atol=0.06, rtol=0)  # six deviations


def test_a_raster_prior_goes_on_after_the_known_tokens(coin):
    mask = torch.arange(4).view(1, 1, 4) >= torch.tensor([0, 2, 4]).view(3, 1, 1)  # so many are known
    filled = coin("raster").fill(torch.zeros(3, 1, 4).long(), mask, steps=2)
    assert filled[:, 0].tolist() == [[1, 2, 3, 4], [0, 0, 3, 4], [0, 0, 0, 0]]
    mask[0, 0, 2] = False
    with refused("after the last known one.*ORDER=masked"):
        coin("raster").fill(torch.zeros(3, 1, 4).long(), mask)


@pytest.mark.parametrize("order, steps", [("raster", 1), ("masked", 1), ("masked", 2), ("masked", 10_000)])
def test_fill_keeps_what_is_not_masked_and_does_not_see_what_is(order, steps):
    prior, indices, mask = random_prior(order), torch.randint(24, (30, 2, 3)), torch.rand(30, 2, 3) < 0.5
    mask = mask.flatten(1).sort()[0].view_as(mask) if prior.raster else mask
    results = []
    for hidden in (indices, indices.masked_fill(mask, 5)):
        torch.manual_seed(1)
        results.append(prior.fill(hidden, mask, steps=steps))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0][~mask], indices[~mask])


@pytest.mark.parametrize("options, name", [
    ({"indices": torch.zeros(2, 1, 3).long()}, "indices"), ({"indices": torch.full((2, 2, 3), 24)}, "0 to 23"),
    ({"indices": torch.full((2, 2, 3), 0.7)}, "float32"), ({"labels": [0, 3]}, "labels.*0 to 2"),
    ({"labels": [0.9, 1.7]}, "float32"), ({"guidance": 0.5}, "guidance"), ({"steps": 6.4}, "whole")], ids=str)
def test_fill_refuses_other_shapes_and_ranges(options, name):
    given = {"indices": torch.zeros(2, 2, 3).long(), "mask": torch.ones(2, 2, 3, dtype=torch.bool)}
    with refused(name):
        random_prior().fill(**given | options)


@both_orders
def test_training_sees_each_image_once_an_epoch(order, change):
    """Some are mirrored, and some labels are hidden: 5 is no class. Masked tokens weigh alike."""
    prior, run, steps = Prior([240], [2, 2], 5, 16, 1, order), utils.Run("run"), []
    prior.forward = Mock(wraps=prior.forward)  # it keeps the arguments of all calls

    def check_gradient(optimizers, step, total):
        steps.append((step, total))
        indices, masked, labels = prior.forward.call_args.args
        bits = Prior.forward(prior, indices, masked, labels) / prior.token_count * masked.sum(1)
        expected, = torch.autograd.grad(bits.sum() / masked.numel(), prior.position)
        torch.testing.assert_close(prior.position.grad, expected)

    change(module, BATCH_SIZE=50, EPOCHS=4, take_step=check_gradient, autocast=contextlib.nullcontext(),
           load_judges=lambda *_: {}, judge_samples=lambda *_: {"judged": 1}, measure_bits=lambda *x: x[2].item(),
           sample=lambda prior, vqrae, labels: torch.zeros(len(labels), 3, 16, 16).byte())
    tokens = torch.arange(240).view(2, 120, 1, 1).expand(-1, -1, 2, 2)  # they tell the image; mirrored ones are higher
    data = Dataset(None, torch.arange(120) % 5, torch.zeros(1, 3, 16, 16), torch.tensor([3]), [])
    module.train(prior, None, {"train": tokens, "test": tokens[0]}, data, run, {})
    assert [row["bits"] for row in run.history] == [3] * 4
    assert [row["epoch"] for row in run.history if "judged" in row] == [2, 3, 4]  # after each third
    assert steps == [(step, 12) for step in range(12)]
    indices, masked, given = map(torch.cat, zip(*(call.args for call in prior.forward.call_args_list)))
    assert {*masked.sum(1).tolist()} == ({4} if prior.raster else {1, 2, 3, 4})
    images = indices[:, 0, 0]
    epochs = (images % 120).view(4, 120)
    assert (epochs.sort()[0] == torch.arange(120)).all() and not torch.equal(epochs[0], epochs[1])
    assert torch.equal(given[given < 5], (images % 5)[given < 5])
    assert 15 < (given == 5).sum() < 81  # five deviations around 48
    assert 185 < (images >= 120).sum() < 295  # and around 240


def test_samples_and_training_images_are_compared_with_test_images(change):
    """A judge sees mean colours. Classes 0 and 1 are black and white, and all samples are white."""
    labels = torch.arange(40) % 2
    images = (255 * labels).byte().view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    change(module, SAMPLES=30, sample=lambda prior, vqrae, labels: images[1:2].expand(len(labels), -1, -1, -1))
    data, colours = Dataset(images, labels, images, labels, []), images[:, :, 0, 0] / 255
    judges = {"colours": (torch.nn.Identity(), colours + 2, colours)}  # training images have other features
    results = module.judge_samples(random_prior(), None, data, judges)
    assert 0 < results["class_colours"] < 1  # all look like class 0, and both were wanted
    # shifts of 1/2 and 2 in three channels, and a variance of 1/4 * 40/39 against none
    assert results["frechet_colours"] == pytest.approx(3 / 4 * (1 + 40 / 39), rel=1e-3)
    assert results["frechet_colours_of_training"] == pytest.approx(3 * 2**2, abs=0.3)


@both_orders
def test_bits_are_the_mean_over_images_and_masks(order, change):
    """A raster prior needs one pass, and its masks hide all 6 tokens. A masked one hides 3.5 in the mean."""
    forward = Mock(side_effect=lambda indices, masked, labels: indices[:, 0, 0] + labels.float() + masked.sum(1))
    prior, indices, labels = random_prior(order), torch.randint(24, (600, 2, 3)), torch.arange(600) % 2
    prior.forward = forward
    expected = indices[:, 0, 0].float().mean() + 0.5 + (6 if prior.raster else 3.5)
    assert measure_bits(prior, indices, labels) == pytest.approx(expected.item(), rel=1e-3)
    assert forward.call_count == (1 if prior.raster else 8)


def test_the_priors_that_ship_have_learned_the_tokens_of_the_file_that_ships():
    for path in PRETRAINED_DIR.glob("prior*.pt"):
        constants = utils.load_torch(path, "constants")["constants"]  # another decoder, as NOTES says, has its tokens
        assert constants["CHECKPOINT"] == utils.load_torch(PRETRAINED_DIR / "vqrae_fsq.pt", "tokens_of")["tokens_of"]
        assert load_prior(path).raster == (constants.get("ORDER") == "raster")  # the oldest file names no order


@pytest.fixture
def main(folder, change, monkeypatch):
    """main("NAME=value", ...) runs two short epochs on tokens of an untrained model. Returns the run's folders."""
    change(module, CHECKPOINT="tokenizer.pt", DATASET=str(folder), ORDER="raster", DIM=64, DEPTH=1, EPOCHS=2,
           BATCH_SIZE=30, LEARNING_RATE=3e-3, STEPS=2, GUIDANCE=3.0, SAMPLES=20,
           load_judges=lambda *sizes: {"colours": torch.nn.Identity()})
    model = VQRAE("cifar", "ema_vq", {"codebook_size": 64}, 16, 4, decoder_width=32, decoder_depth=1)
    save_checkpoint("tokenizer.pt", model)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["generate.py", *arguments])
        module.main()
        for outputs in Path("outputs").glob("*"):
            return outputs, Path("checkpoints", outputs.name)

    return run


def test_a_run_stopped_in_its_second_epoch_ends_as_a_whole_one(main, monkeypatch):
    outputs, checkpoints = main()
    results, prior = (outputs / "results.json").read_text(), load_prior(checkpoints / "prior.pt")
    whole = utils.load_torch(checkpoints / "last.pt")
    assert prior.classes == 2 and prior.raster
    torch.testing.assert_close(dict(prior.state_dict()), dict(whole["prior"]), rtol=0, atol=0.02)  # of 8 bits
    shutil.rmtree("outputs")
    shutil.rmtree("checkpoints")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils, "save_grid", Mock(side_effect=[None, KeyboardInterrupt]))
        main()
    main()
    assert (outputs / "results.json").read_text() == results and (outputs / "epoch_002.png").exists()
    resumed = utils.load_torch(checkpoints / "last.pt")
    for part in ("history", "prior", "adamw", "muon"):
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)
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


@pytest.mark.parametrize("name, options, sizes", [
    ("ema_vq", {"codebook_size": 64}, (64,)), ("fsq", {"levels": [4, 3, 2]}, (4, 3, 2)), ("ddcl", {}, (31,) * 4),
    ("residual_vq", {"codebook_size": 16, "codebooks": 3}, (16,) * 3)], ids=str)
def test_a_token_has_a_digit_for_each_codebook_or_level(name, options, sizes, main, change):
    change(module, train=Mock(), load_tokens=Mock())
    save_checkpoint("other.pt", VQRAE("cifar", name, options, 16, 4, decoder_width=32, decoder_depth=1))
    main("CHECKPOINT=other.pt")
    prior = module.train.call_args.args[0]
    assert prior.sizes == sizes
    indices = torch.arange(64).view(4, 4, 4) * 1_529 % math.prod(sizes)
    assert torch.equal(prior.fill(indices.tolist(), torch.zeros(4, 4, 4).bool().tolist(), [0] * 4), indices)


def test_images_without_classes_have_a_prior_without_classes(main):
    write_images("photos", ["train/a", "train/b", "test/a", "test/b"])
    outputs, checkpoints = main("DATASET=photos", "EPOCHS=1", "ORDER=masked")
    prior = load_prior(checkpoints / "prior.pt")
    assert prior.classes == 0 and not prior.raster
    assert "class_colours" not in (outputs / "results.json").read_text()


@pytest.mark.parametrize("argument, message", [
    ("ORDER=both", "'raster' or 'masked'"), ("SAMPLES=1", "SAMPLES = 1"), ("GUIDANCE=0.5", "GUIDANCE"),
    ("DIM=130", "DIM.*64"), ("BATCH_SIZE=0", "BATCH_SIZE"), ("CHECKPOINT=gone.pt", "gone.pt"), ("EPOCHS=2.5", "EPOCHS"),
    ("LEARNING_RATE=-1", "LEARNING_RATE"), ("DATASET=few", "2 training and 1 test images"),
    (f"CHECKPOINT={PRETRAINED_DIR}/vqrae_ema_vq.pt", "4,096 codes"), ("CHECKPOINT=none.pt", "fsq, .*residual_vq")])
def test_a_wrong_constant_is_refused_before_training(argument, message, main):
    write_images("few", ["train/a", "train/b", "test/a"])
    save_checkpoint("none.pt", VQRAE("cifar", "none", {}, 16, 4))
    with refused(message):
        main(argument)
