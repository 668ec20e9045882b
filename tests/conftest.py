"""A seed, an empty folder for each test, a small folder of images, and one small run of train.py."""
import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SEED = int(os.getenv("TEST_SEED", "0"))  # of all random numbers in tests: each test holds for any seed
ENVIRONMENT = dict(os.environ)  # what test_gpu.py starts its processes with
# On a CPU results can be compared bit for bit. This is set before any test imports torch.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["PYTHONPATH"] = str(ROOT)
sys.path.insert(0, str(ROOT))

SMALL = ["CODEBOOK_SIZE=64", "DECODER_WIDTH=32", "DECODER_DEPTH=1", "EPOCH_IMAGES=0", "EVAL_IMAGES=0", "BATCH_SIZE=10"]
TINY = [*SMALL, "IMAGE_SIZE=16", "GRID=4", "BATCH_SIZE=4", "EPOCH_IMAGES=8", "EVAL_IMAGES=4", "EPOCHS=1", f"{SEED=}"]


def run_script(folder, script, *arguments, environment=os.environ):
    """Run a script, "train.py" or "extras.measure", in `folder`: its exit code, stdout and stderr."""
    name = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    environment = environment | {"PYTHONIOENCODING": "ascii"}  # a terminal may lack a letter
    command = [sys.executable, *name, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@contextlib.contextmanager
def refused(message):
    """An InputError of one short line in which the regular expression `message` is found."""
    from quantizers import InputError

    with pytest.raises(InputError) as error:
        yield
    text = str(error.value)
    assert re.search(message, text) and "\n" not in text and 0 < len(text) <= 600, text


def write_images(root, names, colour=(200, 0, 0)):
    """Write images of 8 x 8 pixels: root/train/cat/a.png for "train/cat/a"."""
    for name in names:
        file = Path(root, f"{name}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), tuple(colour)).save(file)


@pytest.fixture(autouse=True)
def reproducible(tmp_path, monkeypatch):
    """Each test starts with the same random state, in an empty folder, and without utils.prepare_cpu."""
    import timm
    import torch

    torch.manual_seed(SEED)
    torch.set_flush_denormal(False)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    timm.layers.set_fused_attn(True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def change(monkeypatch):
    """change(owner, name=value, ...) gives a module's names other values for a test."""
    return lambda owner, **values: [monkeypatch.setattr(owner, name, value) for name, value in values.items()]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small folder of drawn images, 32 pixels a side: 2 classes, 90 training and 38 test images."""
    from data import SHAPES, draw_shapes

    path = tmp_path_factory.mktemp("images") / "föto"
    images, labels = draw_shapes(640, 32)
    for label in (0, 9):  # a disc, a bolt
        for number, i in enumerate((labels == label).nonzero()[:, 0].tolist()):
            file = path / ("train" if number < 45 else "test") / SHAPES[label] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(file)
    return path


@pytest.fixture(scope="session")
def trained(folder, tmp_path_factory):
    """The folder in which train.py has finished a small run of both stages, with EMA-VQ."""
    path = tmp_path_factory.mktemp("trained")
    done = run_script(path, "train.py", f"DATASET={folder}", *SMALL, "EPOCHS=(2, 1)")
    assert done.returncode == 0 and "%|" not in done.stderr, done.stderr  # a bar would fill a log file
    return path


@pytest.fixture
def main(folder, change, monkeypatch):
    """main("NAME=value", ...) runs train.py with a TINY model. Returns its folder in outputs/."""
    import train
    import utils

    constants = {name: value for name, value in vars(train).items() if name.isupper() or name == "bf16"}
    monkeypatch.setattr(utils, "plot_curves", lambda path, *_: path.touch())  # the fixture `trained` has real ones

    def run(*arguments):
        change(train, **constants)
        before = {*Path("outputs").glob("*")}
        monkeypatch.setattr(sys, "argv", ["train.py", f"DATASET={folder}", *TINY, *arguments])
        with utils.one_line_errors():
            train.main()
        return next(iter({*Path("outputs").glob("*")} - before), None)

    return run
