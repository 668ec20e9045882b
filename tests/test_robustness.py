"""Clumsy and hostile input: files that are damaged, huge or not what they seem, slow servers, two runs at once."""
import enum
import fcntl
import http.server
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.request
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

import train
import utils
from models import VQRAE
from plots import plot_usage
from utils import (
    Dataset,
    load_checkpoint,
    load_dataset,
    load_datasets,
    load_torch,
    open_atomically,
    read_constants,
    save_checkpoint,
)

endless = [0]
for _ in range(64):
    endless = [endless, endless]  # 65 lists, and 2**64 numbers to print


@pytest.mark.parametrize("value", [
    tuple(np.logspace(-3, -5, 2)), np.float64(0.1), np.int64(3), enum.IntEnum("Stage", "ONE TWO").TWO, float("nan"),
    namedtuple("Pair", "a b")(1, 2), {1, 2}, 10**20, endless], ids=lambda value: type(value).__name__)
def test_constants_are_plain_values(value):
    with pytest.raises(ValueError, match="RATE = .*allowed") as error:
        read_constants({"RATE": value, "Path": Path, "np": np, "FILE": Path("a"), "CLASS": Path}, [])
    assert len(str(error.value)) < 300


# ---------------------------------------------------------------------------------------------------------------------
# Folders of images


def one_folder(path, content=None, name="a.png"):
    """A dataset of one image in each split, and one more in train/ with this content."""
    for split in ("train", "test"):
        (path / split).mkdir(parents=True)
        Image.new("RGB", (8, 8), "blue").save(path / split / "first.png")
    if isinstance(content, Image.Image):
        content.save(path / "train" / name)
    elif content is not None:
        (path / "train" / name).write_bytes(content)
    return path


def decoded_colour(path):
    """The colour at the centre of train/'s image that is not blue."""
    images = load_dataset(str(path), 8).train_images[:, :, 4, 4]
    return next(colour for colour in images.tolist() if colour != [0, 0, 255])


hidden = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
clear = Image.fromarray(np.full((8, 8), 300, np.uint16))
clear.info["transparency"] = 300


@pytest.mark.parametrize("image, name, colour", [
    (Image.fromarray(np.full((8, 8), 32768, np.uint16)), "a.png", 128),
    (Image.fromarray(np.full((8, 8), 32768, np.uint16)), "a.tif", 128),
    (Image.fromarray(np.full((8, 8), 0.25, np.float32)), "a.tif", 64),
    (hidden, "a.png", 255), (hidden.convert("LA"), "a.png", 255), (clear, "a.png", 255)],
    ids=["16-bit PNG", "16-bit TIFF", "float TIFF", "RGBA", "LA", "16-bit PNG, one value transparent"])
def test_images_are_converted_as_a_viewer_shows_them(image, name, colour, tmp_path):
    assert decoded_colour(one_folder(tmp_path / "photos", image, name)) == [colour] * 3


def test_files_that_are_no_images_are_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("a program was run"))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    path = one_folder(tmp_path / "photos", postscript, "evil.jpg")
    (path / "train" / "evil.eps").write_bytes(postscript)
    Image.new("RGB", (40, 40)).save(path / "train" / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (path / "train" / os.fsdecode(b"not \xff UTF-8.png")).write_bytes(b"broken")
    (path / "train" / "\x1b[31mred.png").write_bytes(b"broken")
    assert len(load_dataset(str(path), 8).train_images) == 1
    printed = capsys.readouterr()
    printed = printed.out + printed.err
    assert "4 of 5 files could not be read" in printed and "evil.jpg" in printed and "UTF-8.png" in printed
    assert "bomb.png" in printed and "exceeds limit" in printed and "\x1b" not in printed.replace("\x1b[A", "")


def test_each_folder_is_read_once(tmp_path):
    path = one_folder(tmp_path / "photos")
    (path / "train" / "up").symlink_to(path)
    (path / "train" / "round").symlink_to(path / "train")
    (tmp_path / "other" / "down").mkdir(parents=True)
    shutil.copy(path / "train" / "first.png", tmp_path / "other" / "down")
    (tmp_path / "other" / "down" / "round").symlink_to(tmp_path / "other")
    (path / "train" / "other").symlink_to(tmp_path / "other")
    assert [str(f.relative_to(path / "train")) for f in utils.find_images(path / "train")] == [
        "first.png", "other/down/first.png"]


def test_damaged_decoded_images_are_decoded_again(tmp_path):
    path = one_folder(tmp_path / "photos", Image.new("RGB", (8, 8), "red"))
    expected = load_dataset(str(path), 8).train_images.clone()
    file, = Path("data").glob("*_train_*.uint8")
    content = file.read_bytes()
    for damaged in (bytes(len(content)), content[192:], content[:-1], b"", content[:50] + b"\0" + content[51:]):
        file.write_bytes(damaged)
        assert torch.equal(load_dataset(str(path), 8).train_images, expected)
        assert file.read_bytes() == content


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    path = one_folder(tmp_path / "photos")
    load_dataset(str(path), 8)
    file, = Path("data").glob("*_train_*.uint8")
    file.rename(file.with_name(f"{file.name}.12345.tmp"))
    load_dataset(str(path), 8)
    assert not list(Path("data").glob("*.tmp"))


def test_waiting_for_another_process_is_said(tmp_path, capsys):
    path = one_folder(tmp_path / "photos")
    load_dataset(str(path), 4)
    assert stat.S_IMODE(os.stat("data/lock").st_mode) == 0o666  # other users who may write in data/ lock it, too
    file = open("data/lock")
    fcntl.flock(file, fcntl.LOCK_EX)
    load_dataset(str(path), 4)  # there already: it needs no lock
    threading.Timer(0.3, file.close).start()
    load_dataset(str(path), 8)
    assert capsys.readouterr().out.count("waiting for another process to decode images into data/\n") == 1
    load_dataset(str(path), 16)
    assert "waiting" not in capsys.readouterr().out


def test_decoded_images_may_be_read_only(tmp_path):
    with tempfile.TemporaryDirectory() as folder:  # which another user may enter; pytest's own have one user
        path = one_folder(Path(folder, "photos"))
        expected = load_dataset(str(path), 8, f"{folder}/data").train_images
        Path(folder).chmod(0o755), Path(folder, "data").chmod(0o555)
        user = os.geteuid()
        if user == 0:  # may write everywhere
            os.seteuid(65534)
        try:
            assert not os.access(f"{folder}/data", os.W_OK, effective_ids=True)
            assert torch.equal(load_dataset(str(path), 8, f"{folder}/data").train_images, expected)
            with pytest.raises(PermissionError, match=f"{folder}/data/"):
                load_dataset(str(path), 4, f"{folder}/data")
        finally:
            os.seteuid(user)
            Path(folder, "data").chmod(0o755)


def test_a_folder_is_known_by_its_files(tmp_path, monkeypatch):
    path = one_folder(tmp_path / "photos", Image.new("RGB", (8, 8), "red"))
    name_of_run = []
    for change in (lambda: None, lambda: os.utime(path / "train" / "a.png", (1, 1)),
                   lambda: (path / "train" / "a.png").rename(path / "train" / "b.png")):
        change()
        names = {train.Run({"DATASET": spelling}, [load_dataset(spelling, 8)]).name
                 for spelling in ("photos", "photos/", "./photos", str(path))}
        assert len(names) == 1
        name_of_run += names
    assert len(set(name_of_run)) == 3
    part, = load_datasets("photos", 8)
    crops = part._replace(train_images=part.train_images.repeat(1, 1, 2, 2))  # of 8x8 pixels, from images of 16x16
    assert train.Run({"DATASET": "photos"}, [part]).name != train.Run({"DATASET": "photos"}, [crops]).name
    shutil.copy(train.PRETRAINED_DIR / "cifar_encoder.pt", tmp_path)
    monkeypatch.setattr(train, "PRETRAINED_DIR", tmp_path)
    same = train.Run({"DATASET": "photos"}, [part]).name
    (tmp_path / "cifar_encoder.pt").write_bytes(b"another")  # as pretrain.py writes it
    assert same in name_of_run and train.Run({"DATASET": "photos"}, [part]).name != same


def test_a_folders_name_is_no_mathematics(tmp_path):
    path = one_folder(tmp_path / "us$_x_$eur \u00fc", Image.new("RGB", (8, 8), "red"))
    name = load_dataset(str(path), 8).name
    assert name == "folder-us__x__eur_\u00fc"
    plot_usage(tmp_path / "usage.png", torch.ones(4), {"usage": 1.0, "perplexity": 4.0}, name)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def a_dataset(count):
    images = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    return [Dataset("some", images, None, images, None, [], 8)]


def test_one_process_a_run():
    run = train.Run({"SEED": 0}, a_dataset(1))
    assert len(run.name.rsplit("_", 1)[1]) == 12
    run.lock.lock.release()
    leftover = run.checkpoints / "last.pt.123.tmp"
    leftover.write_bytes(b"")
    with open(run.checkpoints / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another process does
        with pytest.raises(ValueError, match="going on elsewhere"):
            train.Run({"SEED": 0}, a_dataset(1))
        train.Run({"SEED": 1}, a_dataset(1)), train.Run({"SEED": 0}, a_dataset(2))  # others may
    assert leftover.exists()
    train.Run({"SEED": 0}, a_dataset(1))
    train.Run({"SEED": 0}, a_dataset(1))  # once more in this process, as in a notebook
    assert not leftover.exists()


def test_constants_are_compared_when_a_run_is_found():
    run = train.Run({"SEED": 4}, a_dataset(1))
    (run.outputs / "constants.json").write_text('{"SEED": 5200}')  # as if its digest were the same
    (run.outputs / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="constants.json"):
        train.Run({"SEED": 4}, a_dataset(1))


@pytest.mark.parametrize("constants, part", [
    ("DECODER_WIDTH=4096", "decoder"), ("POST_QUANT_KERNEL=255", "post_quant_conv"),
    ("QUANTIZER=ema_vq EMA_CODEBOOK_SIZE=16777216 EMA_CODE_DIM=4096", "quantizer")])
def test_a_model_larger_than_memory_is_not_built(constants, part, monkeypatch):
    for name, value in vars(train).copy().items():
        monkeypatch.setattr(train, name, value)  # to be as before
    monkeypatch.setattr(sys, "argv", ["train.py", *constants.split()])
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if "SIZE" in name else 2 * 10**6)
    with pytest.raises(SystemExit, match=rf"^train.py: gigabytes for the model.* its {part} = \d+, allowed: 8$"):
        train.main()


@pytest.mark.parametrize("script", ["train", "generate", "evaluate", "photographs", "compare", "pretrain", "bench"])
def test_ctrl_c_while_torch_is_imported(script, tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    command = [sys.executable, Path(train.__file__).with_name(f"{script}.py")]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert ended.stdout == "" and ended.stderr == f"\n{script}.py: stopped\n" and ended.returncode == -signal.SIGINT


def test_progress_bars_without_a_stderr(tmp_path):
    code = "import errors\nfrom tqdm import tqdm\nprint(sum(tqdm([1, 2])))"
    command = ["sh", "-c", f"{sys.executable} -c '{code}' 2>&-"]
    ended = subprocess.run(command, cwd=Path(train.__file__).parent, capture_output=True)
    assert ended.stdout == b"3\n"


def test_a_terminal_that_cannot_show_a_letter():
    command = [sys.executable, "-c", "import errors; print('Fr\u00e9chet')"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(command, cwd=Path(train.__file__).parent, env=environment, capture_output=True)
    assert ended.stdout == b"Fr\\xe9chet\n"


@pytest.mark.parametrize("name", ["outputs", "checkpoints"])
def test_a_place_that_cannot_be_written_is_noticed_at_once(name):
    Path(name).write_text("no folder")
    with pytest.raises(OSError, match=name):
        train.Run({"SEED": 0}, a_dataset(1))


def test_two_processes_write_one_file_in_turn(monkeypatch):
    with open_atomically(Path("a")) as first:
        first.write(b"1" * 5000)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with open_atomically(Path("a")) as second:
            second.write(b"2" * 10)
        assert Path("a").read_bytes() == b"2" * 10
    assert Path("a").read_bytes() == b"1" * 5000


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture
def checkpoint():
    torch.manual_seed(0)
    model = VQRAE("cifar", "fsq", {"levels": [8, 6, 5]}, adapter_depth=0, decoder_width=32, decoder_depth=1).eval()
    save_checkpoint(Path("good.pt"), model)
    return torch.load("good.pt", weights_only=True)


def test_one_bit_of_a_checkpoint_makes_no_other_weights(checkpoint):
    """The directory at the end of a file says of each record whether it is a folder, and torch believes it."""
    good = Path("good.pt").read_bytes()
    start = good.index(b"PK\1\2")
    assert struct.unpack("<I", good[start + 38 : start + 42])[0] & 0x10 == 0
    entries = [i for i in range(start, len(good) - 46) if good[i : i + 4] == b"PK\1\2"]
    for entry in entries[2::10]:
        for position, bit in ((38, 0x10), (8, 1), (10, 1), (24, 1), (42, 1)):
            flipped = bytearray(good)
            flipped[entry + position] ^= bit
            Path("flipped.pt").write_bytes(flipped)
            try:
                loaded = load_torch("flipped.pt")["model"]
            except ValueError:
                continue
            assert all(torch.equal(loaded[name], tensor) for name, tensor in checkpoint["model"].items())


def with_weight(change):
    def changed(content):
        content["model"]["decoder.head.weight"] = change(content["model"]["decoder.head.weight"])

    return changed


def with_config(**config):
    return lambda content: content["config"].update(config)


@pytest.mark.parametrize("change, names", [
    (with_weight(lambda w: w * torch.nan), "head.weight"), (with_weight(lambda w: w.int()), "head.weight"),
    (with_weight(lambda w: w > 0), "head.weight"), (with_weight(lambda w: None), "fit"),
    (with_weight(lambda w: torch.zeros(1).expand_as(w)), "head.weight"),
    (with_config(decoder_width=8000), r"\(8000,\)|8000"), (with_config(decoder_depth=10**7), "decoder_depth"),
    (with_config(encoder="vit_giant_patch14_dinov2.lvd142m", decoder="conv"), "weights"),
    (with_config(grid=endless), "config"),
    (with_config(quantizer_options={"levels": endless}), "config"), (with_config(nonsense=1), "nonsense"),
    (with_config(encoder="x" * 10**6), "config"), (lambda content: content.update(config=3), "config"),
    (lambda content: content.update(model=[]), "fit"), (lambda content: content.update(stage="1"), "stage"),
    (lambda content: content.pop("model"), "model")], ids=str)
def test_what_a_checkpoint_may_not_be(change, names, checkpoint):
    change(checkpoint)
    torch.save(checkpoint, "bad.pt")
    start = time.time()
    with pytest.raises(ValueError, match=rf"checkpoint bad.pt .*({names})") as error:
        load_checkpoint("bad.pt")
    assert len(str(error.value)) < 500 and "\n" not in str(error.value) and time.time() - start < 20


def test_a_checkpoint_is_not_compressed(checkpoint):
    torch.save({"zeros": torch.zeros(10**6)}, "plain.pt")
    with zipfile.ZipFile("plain.pt") as plain, zipfile.ZipFile("small.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match="small.pt.*compressed"):
        load_torch("small.pt")


def test_other_files_are_no_checkpoints():
    torch.save({"config": types.SimpleNamespace()}, "objects.pt")
    with pytest.raises(ValueError, match="more than tensors and plain values") as error:
        load_checkpoint("objects.pt")
    assert "weights_only" not in str(error.value)
    with pytest.raises(ValueError, match="checkpoint = 'None'"):
        load_checkpoint(None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_images_of_any_floating_type(dtype, checkpoint):
    model, images = load_checkpoint("good.pt"), torch.rand(2, 3, 32, 32).to(dtype)
    assert torch.equal(model.encode_to_indices(images), model.encode_to_indices(images.float()))


# ---------------------------------------------------------------------------------------------------------------------
# Downloads


@pytest.fixture
def server():
    """A server that promises a megabyte and sends "content", then a byte now and then, or nothing."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200), self.send_header("Content-Length", str(2**20)), self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(b"content")
            while self.path != "/file" and not stopped.wait(0.02):
                if self.path == "/trickle":
                    self.wfile.write(b"x")

        def log_message(self, *args):
            pass

    stopped, http_server = threading.Event(), http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http_server.server_port}"
    stopped.set()
    http_server.shutdown()


@pytest.mark.parametrize("kind, reason", [("trickle", "less than 10 kB a second"), ("silence", "timed out")])
def test_a_slow_server_is_given_up(kind, reason, server, monkeypatch):
    urlopen, now, start = urllib.request.urlopen, time.time, time.time()
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: urlopen(url, timeout=timeout / 15))
    monkeypatch.setattr(utils, "reachable", lambda url: True)
    monkeypatch.setattr(utils.time, "time", lambda: start + 1000 * (now() - start))
    with pytest.raises(RuntimeError, match=f"{kind} could not be downloaded: .*{reason}.*why"):
        utils.download(f"{server}/{kind}", Path("file"), "md5", "0", "why")
    assert not list(Path().glob("file*"))


def test_another_file_than_expected_is_not_kept(server):
    url, checksum = f"{server}/file", "9a0364b9e99bb480dd25e1f0284c8555"
    with pytest.raises(RuntimeError, match="another file"):
        utils.download(url, Path("file"), "md5", "0" + checksum, "why")
    assert not Path("file").exists()
    utils.download(url, Path("file"), "md5", checksum, "why")
    assert Path("file").read_bytes() == b"content"
