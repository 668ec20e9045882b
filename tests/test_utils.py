"""utils.py: constants, errors, files, a picture. Checkpoints of models.py."""
import copy
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

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
             "OPTIONS": {"a": 1}, "FLIP": True, "BIAS": -1.5, "NOTHING": None, "path": 1, "Class": int}


@pytest.mark.parametrize("argument, expected", [
    ("NAME=a=b", "a=b"), ("NAME=32", "32"), ("NAME=~/a.pt", str(Path.home() / "a.pt")), ("SIZE=64", 64),
    ("RATE=2", 2.0), ("RATE=1e-4", 1e-4), ("EPOCHS=5", 5), ("EPOCHS=[2, 1]", (2, 1)), ("BIAS=-2", -2.0),
    ("LEVELS=(4,)", (4,)), ("FLIP=False", False), ("OPTIONS={'b': [2]}", {"b": [2]}), ("NOTHING=(1,)", (1,)),
    ("NOTHING=None", None)])
def test_an_argument_replaces_a_constant_by_a_value_of_its_type(argument, expected):
    namespace, name = dict(CONSTANTS), argument.partition("=")[0]
    constants = read_constants(namespace, [argument])
    assert constants[name] == expected and type(constants[name]) is type(expected)
    assert namespace == CONSTANTS | {"LEVELS": (8, 5), name: expected}  # a list is as good as a tuple
    assert constants.keys() == {name for name in CONSTANTS if name.isupper()}


@pytest.mark.parametrize("argument, message", [
    ("SIZ=64", "argument = 'SIZ=64', allowed: NAME=value,.* such as SIZE$"), ("size=64", "such as SIZE$"),
    ("SIZE", "NAME=value"), ("path=2", "NAME=value"), ("SIZE=1.5", "SIZE = 1.5, allowed: int, like 32"),
    ("RATE=1_000/5", "'1_000/5', allowed: float"), ("EPOCHS=1.5", "EPOCHS = 1.5, allowed: int"), ("FLIP=1", "FLIP = 1"),
    ("LEVELS=8.5", "LEVELS = 8.5"), ("OPTIONS=[1]", "OPTIONS = "), ("BIAS=None", "BIAS = None")])
def test_an_argument_that_is_no_constant_or_no_value_changes_nothing(argument, message):
    namespace = dict(CONSTANTS)
    with refused(message):
        read_constants(namespace, ["NAME=simvq", argument])
    assert namespace == CONSTANTS


@pytest.mark.parametrize("error, message", [
    (InputError("Caught in worker\nOriginal Traceback\nInputError: SIZE = 0\n"), "SIZE = 0"), (InputError("a"), "a"),
    (FileNotFoundError(2, "No such file", "a"), "[Errno 2] No such file: 'a'"),
    (KeyboardInterrupt(), "stop; go on"), (torch.OutOfMemoryError("Out of memory. Tried to\nhave"), "Out of memory")])
def test_an_error_that_a_person_can_mend_ends_the_script_in_one_line(error, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["folder/train.py"])
    with pytest.raises(SystemExit) as end, utils.one_line_errors("stop; go on"):
        raise error
    assert end.value.code == f"train.py: {message}"  # Python prints such a text to stderr, and ends with code 1
    with pytest.raises(ZeroDivisionError), utils.one_line_errors():  # a mistake in the code shows file and line
        print(1 / 0)


@pytest.mark.parametrize("terminal, disabled, shown", [(True, "", True), (True, "1", False), (False, "", False)])
def test_a_progress_bar_is_for_terminals(terminal, disabled, shown, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TQDM_DISABLE", disabled)
    assert [*utils.progress(range(3), "decoding")] == [0, 1, 2]
    assert ("decoding" in stream.getvalue()) == shown


@pytest.mark.parametrize("error, raised", [
    (OSError(28, "No space left"), OSError), (RuntimeError("a mistake"), RuntimeError),
    (KeyboardInterrupt(), KeyboardInterrupt)])
def test_nobody_reads_half_a_file(error, raised, change):
    save_torch("new/a", {"old": 1})
    with pytest.raises(raised, match="^new/a could.*o space left" if raised is OSError else None):
        with replace_file("new/a") as draft, replace_file("new/a") as other:
            draft.write_text("half")
            assert load_torch("new/a") == {"old": 1} and draft != other  # of another process
            raise error
    change(torch, save=Mock(side_effect=RuntimeError("PytorchStreamWriter failed writing file")))  # on a full disk
    with pytest.raises(OSError, match="^new/a could not be written: .*failed writing"):
        save_torch("new/a", {})
    assert os.listdir("new") == ["a"] and load_torch("new/a") == {"old": 1}


def test_code_is_its_hash_and_comments_and_the_scripts_constants_are_not(monkeypatch):
    code = "NAME = 1\n\ndef f():\n    return NAME\n"
    monkeypatch.setattr(utils, "__file__", str(Path("utils.py").resolve()))
    monkeypatch.setattr(sys, "argv", [str(Path("train.py").resolve())])
    modules = {name: SimpleNamespace(__file__=str(Path(name).resolve())) for name in ("train.py", "data.py", "x/y.py")}
    Path("x").mkdir()  # a folder that is not the repository's

    def digest(**changed):
        for name in modules:
            Path(name).write_text(changed.get(Path(name).stem, code))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "modules", modules)
            return utils.digest_code()
    first = digest()
    comment = code.replace("():", "():  # a comment").replace("    return", "\n    return")
    assert digest(train=comment, data=comment) == digest(train=code.replace("1", "2")) == digest(y="X = 1") == first
    for changed in (code.replace("NAME\n", "-NAME\n"), code.replace("return", "yield")):
        assert digest(train=changed) != first != digest(data=changed)
    assert digest(data=code.replace("1", "2")) != first


def test_a_file_that_is_no_checkpoint_is_refused_and_runs_no_code(capsys):
    malicious = type("Malicious", (), {"__reduce__": lambda self: (print, ("code was run",))})()
    for name, value in {"malicious": {"config": malicious, "model": 1}, "list": [1], "keys": {"config": {}},
                        "good": {"config": {}, "model": torch.arange(5000.0)}}.items():
        torch.save(value, f"{name}.pt")
    content = Path("good.pt").read_bytes()
    Path("flipped.pt").write_bytes(content.replace(torch.tensor([100.0, 101]).numpy().tobytes(), bytes(8)))
    Path("cut.pt").write_bytes(content[:-9])
    Path("text.pt").write_text("hello")
    for name in ("flipped", "cut", "text", "malicious", "keys", "list", "missing"):
        with refused(f"^The checkpoint {name}.pt cannot be read: ."):
            load_torch(f"{name}.pt", "config", "model")
    assert "code was run" not in capsys.readouterr().out


def test_a_grid_has_images_in_the_upper_rows_and_reconstructions_in_the_lower():
    """Small images are enlarged to 128 pixels, with a border of 2. An incomplete row is left out."""
    images, output = torch.randint(256, (2, 5, 3, 32, 32), dtype=torch.uint8)
    utils.save_pairs(Path("new/grid.png"), images, output, columns=2)
    grid = torch.from_numpy(np.array(Image.open("new/grid.png"))).permute(2, 0, 1)
    for row, pair in enumerate((images[:2], images[2:4], output[:2], output[2:4])):
        for column, image in enumerate(pair):
            cell = grid[:, 130 * row + 2 :, 130 * column + 2 :][:, :128, :128]
            assert torch.equal(cell, image.repeat_interleave(4, 1).repeat_interleave(4, 2))
    assert grid.shape == (3, 4 * 130 + 2, 2 * 130 + 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and a checkpoint of it."""
    torch.manual_seed(SEED)
    model = models.VQRAE("cifar", "simvq_matched", {"codebook_size": 40}, decoder_width=32, decoder_depth=1, stage=2)
    model.quantizer.covariance.copy_(torch.cov(torch.randn(16, 99) * torch.logspace(-2, 2, 16)[:, None]))
    path = tmp_path_factory.mktemp("saved") / "a.pt"
    models.save_checkpoint(path, model)
    return model.eval(), path


def test_a_checkpoint_needs_nothing_else_and_a_small_one_a_quarter_of_its_size(saved, monkeypatch):
    monkeypatch.setattr(models, "PRETRAINED_DIR", Path("nowhere"))
    model, images = models.load_checkpoint(saved[1]), torch.rand(2, 3, 32, 32)
    assert not model.training and model.stage == 2 and model.config == saved[0].config
    assert torch.equal(model(images)[0], saved[0](images)[0])
    models.save_checkpoint("small.pt", saved[0], small=True)
    assert os.path.getsize("small.pt") < 0.3 * saved[1].stat().st_size
    found = models.load_checkpoint("small.pt").state_dict()
    assert torch.equal(found.pop("quantizer.covariance"), saved[0].quantizer.covariance)  # 8 bits would spoil it
    for name, rounded in found.items():
        weight = saved[0].state_dict()[name]
        steps = 127 if weight.ndim > 1 else 2**10  # 8 bits and a scale for each row, or 16 bits
        rows = zip(rounded, weight) if weight.ndim > 1 else [(rounded, weight)]
        assert all((a - b).abs().max() <= 0.51 * b.abs().max() / steps for a, b in rows), name
    for large in (torch.tensor([131_072, 1]), torch.tensor([70_000.0, 1]), torch.tensor(70_001.0)):
        assert torch.equal(models.shorten(large), large)  # 16 bits cannot hold them


def test_a_compiled_or_wrapped_model_is_saved_as_it_is_and_another_network_is_refused(saved):
    with refused("A checkpoint holds a VQRAE, not a Linear"):
        models.save_checkpoint("model.pt", torch.nn.Linear(1, 1))
    model = copy.deepcopy(saved[0])
    model.decoder = torch.compile(model.decoder)
    models.save_checkpoint("compiled.pt", torch.nn.Sequential(torch.compile(model)))
    found = models.load_checkpoint("compiled.pt").state_dict()
    torch.testing.assert_close(found, saved[0].state_dict(), rtol=0, atol=0)


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
    ("config", {"decoder_width": 64}), ("config", {"grid": [8]}), ("config", {"nonsense": 1}),
    ("config", {"encoder": "x" * 10**6}), ("config", {"quantizer_options": {"codebook_size": [[8] * 10**5]}})])
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(part, change, saved):
    content = load_torch(saved[1])
    save_torch("bad.pt", content | {part: content[part] | change})
    with refused("^The checkpoint bad.pt does not fit this code: ."):
        models.load_checkpoint("bad.pt")


def test_bf16_is_not_fast_where_torch_may_not_use_its_instructions(change):
    change(torch.cpu, get_capabilities=lambda: {"amx_bf16": True})
    for allowed in ("AVX512", "AVX2"):
        change(torch.backends.cpu, get_cpu_capability=lambda: allowed)
        assert utils.fast_bf16("cpu") == (allowed == "AVX512")
