"""utils.py without its metrics and its class Run: constants, errors, files, pictures. And checkpoints of models.py."""
import copy
import io
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SEED, refused
from PIL import Image

import models
import utils
from quantizers import InputError
from utils import load_torch, read_constants, replace_file, save_torch

CONSTANTS = {"__doc__": "Doc.", "NAME": "fsq", "SIZE": 32, "RATE": 1e-3, "EPOCHS": (3, 1), "LEVELS": [8, 5],
             "OPTIONS": {"a": 1}, "FLIP": True, "path": 1, "Class": int}
KINDS = {int | tuple[int, int]: "EPOCHS", tuple[int, ...]: "LEVELS", float: "RATE"}


# Constants

@pytest.mark.parametrize("argument, expected", [
    ("NAME=a=b", "a=b"), ("NAME=32", "32"), ("NAME='fsq'", "'fsq'"), ("SIZE=64", 64), ("SIZE=0", 0), ("RATE=2", 2),
    ("RATE=1e-4", 1e-4), ("EPOCHS=5", 5), ("EPOCHS=[2, 1]", (2, 1)), ("LEVELS=(4,)", (4,)), ("FLIP=False", False),
    ("OPTIONS={'b': [2]}", {"b": [2]})])
def test_an_argument_replaces_a_constant_by_a_value_of_its_type(argument, expected):
    namespace, name = dict(CONSTANTS), argument.partition("=")[0]
    constants = read_constants(namespace, [argument], KINDS)
    assert constants[name] == expected and type(constants[name]) is type(expected)
    assert namespace == CONSTANTS | {"LEVELS": (8, 5), name: expected}  # a list is as good as a tuple
    assert list(constants) == ["NAME", "SIZE", "RATE", "EPOCHS", "LEVELS", "OPTIONS", "FLIP"]


@pytest.mark.parametrize("argument, message", [
    ("SIZ=64", "argument = 'SIZ=64', allowed: NAME=value,.* such as SIZE$"), ("size=64", "such as SIZE$"),
    ("SIZE", "NAME=value"), ("path=2", "NAME=value"), ("RATE=1e999", "RATE = inf"), ("RATE=1_000/5", "'1_000/5'"),
    ("EPOCHS=(2, -1)", "EPOCHS = "), ("EPOCHS=(1, 1, 1)", "EPOCHS = "), ("EPOCHS=()", "EPOCHS = ")])
def test_an_argument_that_is_no_constant_or_no_value(argument, message):
    namespace = dict(CONSTANTS)
    with refused(message):
        read_constants(namespace, ["NAME=simvq", argument], KINDS)
    assert namespace == CONSTANTS


@pytest.mark.parametrize("name, value", [
    ("RATE", math.inf), ("RATE", "1e-3"), ("RATE", True), ("EPOCHS", 1.5), ("LEVELS", 8), ("LEVELS", np.ones(2))])
def test_the_file_passes_the_checks_of_the_command_line(name, value):
    with refused(f"^{name} = "):
        read_constants(CONSTANTS | {name: value}, [], KINDS)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_prints_headings_constants_and_their_comments(flag, capsys):
    Path("a.py").write_text("# one\nNAME = 2  # words\nX = 1\n# two\nRATE = f(3)\n# no heading\n\n")
    with pytest.raises(SystemExit):
        read_constants(CONSTANTS | {"__file__": "a.py"}, [flag])
    assert capsys.readouterr().out == "Doc.\n# one\nNAME = 'fsq'  # words\n# two\nRATE = 0.001\n"


# Errors and terminals

@pytest.mark.parametrize("error, message", [
    (InputError("Caught in worker\nOriginal Traceback\nInputError: SIZE = 0\n"), "SIZE = 0"), (InputError("a"), "a"),
    (FileNotFoundError(2, "No such file", "a"), "[Errno 2] No such file: 'a'"),
    (KeyboardInterrupt(), "stop; go on"), (torch.OutOfMemoryError("Out of memory. Tried to\nhave"), "Out of memory")])
def test_an_error_that_a_person_can_mend_ends_the_script_in_one_line(error, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["folder/train.py"])
    with pytest.raises(SystemExit) as end, utils.one_line_errors("stop; go on"):
        raise error
    assert end.value.code == f"train.py: {message}"  # Python prints such a text to stderr, and ends with code 1


@pytest.mark.parametrize("error", [ValueError("a"), TypeError("a"), RuntimeError("a")])
def test_a_mistake_in_code_keeps_its_traceback(error):
    with pytest.raises(type(error)) as raised, utils.one_line_errors():
        raise error
    assert raised.value is error
    with refused("^The file cannot be read: a$") as raised, utils.errors_as(InputError, "The file cannot be read"):
        raise error
    assert raised.value.__cause__ is error


def test_a_letter_that_the_terminal_lacks_is_replaced(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    with utils.one_line_errors():
        print("Fréchet", flush=True)
    assert written.getvalue().split() == [b"Fr?chet"]


@pytest.mark.parametrize("terminal, disabled, shown", [(True, "", True), (True, "1", False), (False, "", False)])
def test_a_progress_bar_is_for_terminals(terminal, disabled, shown, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TQDM_DISABLE", disabled)
    assert [*utils.progress(range(3), "decoding")] == [0, 1, 2]
    assert ("decoding" in stream.getvalue()) == shown


# Files

@pytest.mark.parametrize("error, raised", [
    (OSError(28, "No space left"), OSError), (RuntimeError("torch: no space left"), OSError),
    (ValueError("wrong"), ValueError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_nobody_reads_half_a_file(error, raised):
    save_torch("new/a", {"old": 1})
    with pytest.raises(raised, match="^new/a could.*o space left" if raised is OSError else None):
        with replace_file("new/a") as draft:
            draft.write_text("half")
            assert load_torch("new/a") == {"old": 1}
            raise error
    assert os.listdir("new") == ["a"] and load_torch("new/a") == {"old": 1}


def test_a_file_that_a_virus_scanner_holds_is_written_a_moment_later(monkeypatch):
    waits, rename = [], os.replace

    def replace(draft, path):
        if len(waits) < failures:
            raise PermissionError("held by another process")
        rename(draft, path)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(utils.time, "sleep", waits.append)
    failures = 2
    save_torch("a", {"new": 1})
    assert load_torch("a") == {"new": 1} and len(waits) == 2
    failures = 99
    with pytest.raises(OSError, match="^a could not be written: held by another process"):
        save_torch("a", {"newer": 1})
    assert os.listdir() == ["a"] and sum(waits) >= 2  # seconds; the draft is gone


def test_a_file_that_is_no_checkpoint(capsys):
    good = {"config": {"a": [1]}, "model": {"w": torch.arange(5000.0)}, "stage": 1}
    save_torch("good.pt", good)
    assert torch.equal(load_torch("good.pt", "config", "model")["model"]["w"], good["model"]["w"])
    content = Path("good.pt").read_bytes()
    Path("flipped.pt").write_bytes(content.replace(torch.tensor([100.0, 101]).numpy().tobytes(), bytes(8)))
    Path("cut.pt").write_bytes(content[: len(content) // 2])
    Path("text.pt").write_text("hello")
    malicious = type("Malicious", (), {"__reduce__": lambda self: (print, ("code was run",))})()
    for name, value in {"malicious": good | {"config": malicious}, "list": [1], "keys": {"config": {}}}.items():
        torch.save(value, f"{name}.pt")
    for name in ("flipped", "cut", "text", "malicious", "keys", "list", "missing"):
        with refused(f"^The checkpoint {name}.pt cannot be read: ."):
            load_torch(f"{name}.pt", "config", "model")
    assert "code was run" not in capsys.readouterr().out


def test_a_misspelt_constant_of_the_file_is_missed_by_its_name():
    with refused("EPOCHS is missing in the file.*EPOCS"):
        utils.read_constants({"EPOCS": 1}, [], {int: "EPOCHS"})


def test_a_reader_who_stops_reading_is_no_error():
    """As in `python train.py --help | head -1`."""
    code = "import utils\nwith utils.one_line_errors():\n    for _ in range(10**5): print('a line')"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "a line\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait()


def test_a_digest_stands_for_a_value_in_every_process():
    assert utils.digest(("a", 1)) == "391d545b6971"  # runs are found by it
    draws = []
    for numbers in ((0,), (1,), (0, 1), (1, 0), (0,)):
        utils.seed_everything(*numbers)
        draws.append(torch.rand(()).item())
    assert draws[0] == draws[4] and len({*draws}) == 4


# Pictures

@pytest.mark.parametrize("size, zoom", [(32, 4), (200, 1)])
def test_a_grid_goes_row_by_row_and_enlarges_small_images(size, zoom):
    pixels = np.random.default_rng(SEED).integers(0, 256, (5, size, size, 3), dtype=np.uint8)
    utils.save_grid(Path("new/grid.png"), torch.from_numpy(pixels).permute(0, 3, 1, 2), columns=3)
    side = size * zoom + 2  # an image and a border
    expected, cells = np.full((2 * side + 2, 3 * side + 2, 3), 255), pixels.repeat(zoom, 1).repeat(zoom, 2)
    for i in range(5):
        expected[i // 3 * side + 2 :, i % 3 * side + 2 :][: side - 2, : side - 2] = cells[i]
    assert np.array_equal(np.array(Image.open("new/grid.png")), expected)


def test_reconstructions_stand_below_their_images(monkeypatch):
    """An incomplete row is left out."""
    grids = []
    monkeypatch.setattr(utils, "save_grid", lambda path, images, columns: grids.append(images.tolist()))
    utils.save_pairs(Path("a.png"), torch.arange(5), torch.arange(10, 15), columns=2)
    assert grids == [[0, 1, 10, 11, 2, 3, 12, 13]]


def test_plots(monkeypatch):
    figures, save_figure = [], utils.save_figure

    def keep(path, figure):
        figures.append(figure)
        save_figure(path, figure)

    monkeypatch.setattr(utils, "save_figure", keep)
    row = {"rec_loss": 1, "gan_loss": 0, "ssim": 0.5, "usage": 0.3, "perplexity": 2.5}
    utils.plot_usage(Path("usage.png"), torch.tensor([0, 3, 0, 5, 1] + [0] * 5), row, "a$_$b")
    utils.plot_curves(Path("curves.png"), [{**row, "stage": 1, "psnr": 20}, {**row, "stage": 2, "psnr": 21}], "a$_$b")
    (usage,), (losses, psnr, *_) = figures[0].axes, figures[1].axes
    assert [line.get_xydata().tolist() for line in usage.lines] == [[[1, 5], [2, 3], [3, 1]], [[10, 0], [10, 1]]]
    assert [line.get_label() for line in losses.lines[:-1]] == ["rec_loss"]  # what is always 0 is left out
    assert psnr.lines[0].get_xydata().tolist() == [[1, 20], [2, 21]]
    assert list(psnr.lines[1].get_xdata()) == [1.5, 1.5]  # the end of stage 1
    assert Image.open("usage.png").format == Image.open("curves.png").format == "PNG"


# Checkpoints

@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and a checkpoint of it."""
    torch.manual_seed(SEED)
    model = models.VQRAE("cifar", "fsq", {"levels": [8, 5]}, decoder_width=32, decoder_depth=1, stage=2)
    path = tmp_path_factory.mktemp("saved") / "a.pt"
    models.save_checkpoint(path, model, metrics={"psnr": 20.0}, epoch=3)
    return model.eval(), path


def test_a_checkpoint_needs_nothing_else(saved, monkeypatch):
    """It has the model's config, weights and stage, and metadata. A pair is a weight in 8 bits."""
    monkeypatch.setattr(models, "PRETRAINED_DIR", Path("nowhere"))
    model, images, name = models.load_checkpoint(saved[1]), torch.rand(2, 3, 32, 32), "decoder.head.weight"
    assert not model.training and model.stage == 2 and model.config == saved[0].config
    assert torch.equal(model(images)[0], saved[0](images)[0])
    content = load_torch(saved[1])
    assert (content["metrics"], content["epoch"]) == ({"psnr": 20.0}, 3)
    weight = content["model"][name]
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    content["model"][name] = (scale, (weight / scale).round().to(torch.int8))
    save_torch("small.pt", content)
    assert ((models.load_checkpoint("small.pt").state_dict()[name] - weight).abs() <= scale * 0.51).all()


def test_a_compiled_or_distributed_model_is_saved_as_it_is(saved):
    model = copy.deepcopy(saved[0])
    model.decoder = torch.compile(model.decoder)
    models.save_checkpoint("compiled.pt", torch.compile(model))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        models.save_checkpoint("parallel.pt", torch.nn.parallel.DistributedDataParallel(copy.deepcopy(saved[0])))
    finally:
        torch.distributed.destroy_process_group()
    for name in ("compiled.pt", "parallel.pt"):
        weights, expected = models.load_checkpoint(name).state_dict(), saved[0].state_dict()
        assert weights.keys() == expected.keys() and all(torch.equal(weights[n], expected[n]) for n in expected)


def test_a_damaged_folder_of_a_shared_model_is_refused(saved):
    model = copy.deepcopy(saved[0])
    model.decoder.head.bias.data.fill_(torch.nan)
    model.save_pretrained("nan")
    for folder, file in (("cut", "model.safetensors"), ("other", "config.json")):
        saved[0].save_pretrained(folder)
        Path(folder, file).write_bytes(Path(folder, file).read_bytes()[:-9])
    for folder in ("nan", "cut", "other"):
        with refused(f"^{folder} cannot be read: ."):
            models.VQRAE.from_pretrained(folder)


@pytest.mark.parametrize("part, change", [
    ("model", {"decoder.head.weight": torch.full((3, 32, 3, 3), torch.nan)}), ("model", {"more": torch.zeros(1)}),
    ("model", {"quantizer.project_in.bias": torch.tensor([0, torch.inf])}), ("config", {"decoder_width": 64}),
    ("config", {"grid": 7}), ("config", {"nonsense": 1}), ("config", {"grid": [[8]]}), ("config", {"quantizer": "fqs"}),
    ("config", {"encoder": "x" * 10**6}), ("config", {"quantizer_options": {"levels": [[[8] * 10**5], 5]}})])
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(part, change, saved):
    content = load_torch(saved[1])
    save_torch("bad.pt", content | {part: content[part] | change})
    with refused("^The checkpoint bad.pt does not fit this code: ."):
        models.load_checkpoint("bad.pt")
