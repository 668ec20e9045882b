"""utils.py without its class Run: constants, grids and plots, checkpoints."""
import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image
from safetensors.torch import load_file, save_file

import models
import utils
from quantizers import FSQ, build_quantizer

CONSTANTS = {"__doc__": "Doc.", "NAME": "fsq", "SIZE": 32, "RATE": 1e-3, "EPOCHS": (3, 1), "RATES": (1.0,), "path": 1,
             "LAST": None}


@pytest.mark.parametrize("argument, expected", [
    ("NAME=a=b", "a=b"), ("NAME=32", "32"), ("NAME='fsq'", "'fsq'"), ("SIZE=64", 64), ("SIZE=0", 0), ("RATE=2", 2),
    ("RATE=1e-4", 1e-4), ("RATE=1/15", 1 / 15), ("RATE=3 / 0.5", 6.0), ("RATES=(1/3, 2)", (1 / 3, 2)),
    ("EPOCHS=(2,)", (2,)), ("EPOCHS=5", 5)])
def test_a_constant_is_replaced(argument, expected, capsys):
    namespace, name = dict(CONSTANTS), argument.partition("=")[0]
    constants = utils.read_constants(namespace, [argument])
    assert constants[name] == expected and type(constants[name]) is type(expected)
    assert namespace == CONSTANTS | {name: expected} and list(constants) == ["NAME", "SIZE", "RATE", "EPOCHS", "RATES"]
    with pytest.raises(SystemExit, match="^$"):
        Path("a.py").write_text("# one\nNAME = 2  # words\nX = 1\n# two\nRATE = f(3)\n# no heading\n\n")
        utils.read_constants(CONSTANTS | {"__file__": "a.py"}, ["--help"])
    assert capsys.readouterr().out == "Doc.\n# one\nNAME = 'fsq'  # words\n# two\nRATE = 0.001\n"


@pytest.mark.parametrize("argument, message", [
    ("SIZ=64", "argument = 'SIZ=64', allowed: NAME=value with a NAME such as SIZE$"), ("size=64", "such as SIZE$"),
    ("SIZE", "NAME=value"), ("path=2", "NAME=value"), ("LAST=2", "NAME=value"), ("SIZE=-1", "SIZE = -1, allowed: int"),
    ("SIZE=3.5", "int"), ("SIZE=(16, 32)", "int"), ("SIZE='64'", "int"), ("SIZE=large", "int"), ("SIZE=True", "int"),
    ("RATE=1e999", "float"), ("RATE=1/0", "float"), ("RATE=-1/2", "float"), ("SIZE=64/2", "int"),
    ("EPOCHS=(2, -1)", "int"), ("EPOCHS=()", "int")])
def test_a_constant_that_cannot_be(argument, message):
    namespace = dict(CONSTANTS)
    with refused(message):
        utils.read_constants(namespace, ["NAME=simvq", argument])
    assert namespace == CONSTANTS


@pytest.mark.parametrize("error, message", [
    (ValueError("Caught in worker\nTraceback\nValueError: SIZE = 0\n"), "SIZE = 0"), (ValueError("a"), "a"),
    (FileNotFoundError(2, "No such file", "a"), "[Errno 2] No such file: 'a'"),
    (KeyboardInterrupt(), "stop; go on"), (torch.OutOfMemoryError("Out of memory. Tried to\nhave"), "Out of memory")])
def test_an_error_ends_the_script_in_one_line(error, message, monkeypatch):
    monkeypatch.setattr("sys.argv", ["folder/train.py"])
    with pytest.raises(SystemExit) as end, utils.one_line_errors("stop; go on"):
        raise error
    assert end.value.code == f"train.py: {message}"  # such a text Python prints to stderr, and ends with code 1
    with pytest.raises(TypeError), utils.one_line_errors():
        raise TypeError  # a mistake in the code keeps its traceback


def test_a_digest_stands_for_a_value_in_every_process():
    assert utils.digest(("a", 1)) == "391d545b6971"  # runs are found by it
    draws = [utils.seed_everything(*numbers) or torch.rand(()).item() for numbers in ((0,), (1,), (0, 1), (1, 0), (0,))]
    assert draws[0] == draws[4] and len(set(draws)) == 4


@pytest.mark.parametrize("size, zoom", [(32, 4), (200, 1)])
def test_a_grid_goes_row_by_row_and_enlarges_small_images(size, zoom):
    pixels, side = np.random.default_rng(0).integers(0, 256, (5, size, size, 3), dtype=np.uint8), size * zoom + 2
    utils.save_grid(Path("new/grid.png"), torch.from_numpy(pixels).permute(0, 3, 1, 2), columns=3)
    expected, cells = np.full((2 * side + 2, 3 * side + 2, 3), 255), pixels.repeat(zoom, 1).repeat(zoom, 2)
    for i in range(5):
        expected[i // 3 * side + 2 :, i % 3 * side + 2 :][: side - 2, : side - 2] = cells[i]
    assert np.array_equal(np.array(Image.open("new/grid.png")), expected)


def test_reconstructions_stand_below_their_images(monkeypatch):
    grids = []
    monkeypatch.setattr(utils, "save_grid", lambda _, images, columns: grids.append((images.tolist(), columns)))
    for count in (3, 9):  # an incomplete row is left out, unless it is the only one
        utils.save_pairs(Path("a.png"), torch.arange(count), torch.arange(10, 10 + count), columns=4)
    assert grids == [([0, 1, 2, 10, 11, 12], 3), ([*range(4), *range(10, 14), *range(4, 8), *range(14, 18)], 4)]


def test_plots(monkeypatch):
    figures, save_figure = [], utils.save_figure
    monkeypatch.setattr(utils, "save_figure", lambda path, figure: figures.append(figure) or save_figure(path, figure))
    history = [{"stage": 1 + (i > 1), "epoch": i, "rec_loss": 1 / (i + 1), "gan_loss": 0, "psnr": 20 + i, "ssim": 0.5,
                "usage": 0.3, "perplexity": 2.5} for i in range(3)]
    utils.plot_usage(Path("usage.png"), torch.tensor([0, 3, 0, 5, 1] + [0] * 5), history[0], "a$_$b")
    utils.plot_curves(Path("curves.png"), history, "a$_$b")
    (usage,), panels = figures[0].axes, figures[1].axes
    assert [line.get_xydata().tolist() for line in usage.lines] == [[[1, 5], [2, 3], [3, 1]], [[10, 0], [10, 1]]]
    assert [line.get_label() for line in panels[0].lines[:-1]] == ["rec_loss"]  # what is always 0 is left out
    assert panels[1].lines[0].get_xydata().tolist() == [[1, 20], [2, 21], [3, 22]]
    assert [list(axes.lines[-1].get_xdata()) for axes in panels] == [[2.5, 2.5]] * 5  # the end of stage 1
    assert Image.open("usage.png").format == Image.open("curves.png").format == "PNG"


@pytest.mark.parametrize("error, raised", [
    (OSError(28, "No space left"), OSError), (RuntimeError("torch: no space left"), OSError),
    (ValueError("wrong"), ValueError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_nobody_reads_half_a_file(error, raised):
    utils.save_torch("new/a", {"old": 1})
    with pytest.raises(raised, match="^new/a could.*o space left" if raised is OSError else None):
        with utils.replace_file("new/a") as temporary:
            temporary.write_text("half")
            assert utils.load_torch("new/a") == {"old": 1}
            raise error
    assert os.listdir("new") == ["a"] and utils.load_torch("new/a") == {"old": 1}


def test_a_file_that_is_no_checkpoint(capsys):
    good = {"config": {"a": [1]}, "model": {"w": torch.arange(5000.0)}, "stage": 1}
    utils.save_torch("good.pt", good), torch.save({"config": {}}, "keys.pt")
    assert torch.equal(utils.load_torch("good.pt", "config", "model")["model"]["w"], good["model"]["w"])
    content = Path("good.pt").read_bytes()
    Path("flipped.pt").write_bytes(content.replace(torch.tensor([100.0, 101]).numpy().tobytes(), bytes(8)))
    Path("cut.pt").write_bytes(content[: len(content) // 2]), Path("text.pt").write_text("hello")
    malicious = type("Malicious", (), {"__reduce__": lambda self: (print, ("code was run",))})()
    torch.save(good | {"config": malicious}, "malicious.pt"), torch.save([1], "list.pt")
    for name in ("flipped", "cut", "text", "malicious", "keys", "list", "missing"):
        with refused(f"^checkpoint {name}.pt cannot be read: ."):
            utils.load_torch(f"{name}.pt", "config", "model")
    assert "code was run" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = models.VQRAE("cifar", "fsq", {"levels": [8, 5]}, decoder_width=32, decoder_depth=1).set_stage(2)
    path = tmp_path_factory.mktemp("saved") / "a.pt"
    models.save_checkpoint(path, model, metrics={"psnr": 20.0}, epoch=3)
    return model.eval(), path


def test_a_checkpoint_needs_nothing_else(saved, monkeypatch):
    """It has the model's config, weights and stage, and what is told of it. Pairs are weights of 8 bits."""
    monkeypatch.setattr(models, "PRETRAINED_DIR", Path("nowhere"))
    model, images, name = models.load_checkpoint(saved[1]), torch.rand(2, 3, 32, 32), "decoder.head.weight"
    assert not model.training and model.stage == 2 and model.config == saved[0].config
    assert torch.equal(model(images)[0], saved[0](images)[0])
    _, content = models.load_model(saved[1], models.VQRAE, pretrained=False)
    assert (content["metrics"], content["epoch"], content["stage"]) == ({"psnr": 20.0}, 3, 2)
    weight = content["model"][name]
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    content["model"][name] = (scale, (weight / scale).round().to(torch.int8))
    utils.save_torch("small.pt", content)
    assert ((models.load_checkpoint("small.pt").state_dict()[name] - weight).abs() <= scale * 0.51).all()


def test_a_wrapped_model_and_another_quantizer_are_saved(saved):
    model = copy.deepcopy(saved[0])
    model.decoder = torch.compile(model.decoder)
    models.save_checkpoint("compiled.pt", torch.compile(model))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    models.save_checkpoint("parallel.pt", torch.nn.parallel.DistributedDataParallel(copy.deepcopy(saved[0])))
    torch.distributed.destroy_process_group()
    for name in ("compiled.pt", "parallel.pt"):
        weights, expected = models.load_checkpoint(name).state_dict(), saved[0].state_dict()
        assert weights.keys() == expected.keys() and all(torch.equal(weights[n], expected[n]) for n in expected)
    for options in ({"name": "fsq", "levels": [5, 8]}, {"name": "ema_vq", "codebooks": 2, "codebook_size": 16}):
        model.quantizer = build_quantizer(dim=256, **options).eval()
        models.save_checkpoint("other.pt", model)
        z, again = torch.randn(1, 256, 8, 8), models.load_checkpoint("other.pt").quantizer
        assert torch.equal(again(z)[0], model.quantizer(z)[0])
    model.quantizer = FSQ(256, [8, 5])
    with refused("^model.quantizer = 'FSQ', allowed: one made by build_quantizer"):
        models.save_checkpoint("direct.pt", model)
    assert not Path("direct.pt").exists()


def test_a_model_is_shared_as_the_ecosystem_does(saved):
    saved[0].save_pretrained("shared")
    again, images = models.VQRAE.from_pretrained("shared"), torch.rand(2, 3, 32, 32)
    assert torch.equal(again(images)[0], saved[0](images)[0]) and again.config == saved[0].config
    file = Path("shared/model.safetensors")
    weights, content = load_file(file), file.read_bytes()
    for damage in (lambda: file.write_bytes(content[:-9]), lambda: save_file({**weights, "more": torch.ones(1)}, file),
                   lambda: save_file({name: weight * torch.nan for name, weight in weights.items()}, file),
                   lambda: file.write_bytes(content) and Path("shared/config.json").write_text('{"grid": 7}'),
                   Path("shared/config.json").unlink):
        damage()
        with refused("^shared cannot be read: ."):
            models.VQRAE.from_pretrained("shared")


@pytest.mark.parametrize("part, change", [
    ("model", {"decoder.head.weight": torch.full((3, 32, 3, 3), torch.nan)}), ("model", {"more": torch.zeros(1)}),
    ("model", {"quantizer.project_in.bias": torch.tensor([0, torch.inf])}), ("config", {"decoder_width": 64}),
    ("config", {"grid": 7}), ("config", {"nonsense": 1}), ("config", {"grid": [[8]]}), ("config", {"quantizer": "fqs"}),
    ("config", {"encoder": "x" * 10**6}), ("config", {"quantizer_options": {"levels": [[[8] * 10**5], 5]}})])
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(part, change, saved):
    content = utils.load_torch(saved[1])
    utils.save_torch("bad.pt", content | {part: content[part] | change})
    with refused("^checkpoint bad.pt does not fit this code: ."):
        models.load_checkpoint("bad.pt")
