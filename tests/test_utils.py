"""utils.py without its class Run: constants, datasets, image files, grids and plots, checkpoints."""
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image

import evaluate
import models
import utils
from extras import shapes

CONSTANTS = {"__doc__": "Doc.", "NAME": "fsq", "SIZE": 32, "RATE": 1e-3, "EPOCHS": (3, 1), "path": 1, "LAST": None}
RED, GREEN, BLUE = [200, 0, 0], [0, 200, 0], [0, 0, 200]


def refused(message):
    """A ValueError of one short line in which the regular expression `message` is found."""
    return pytest.raises(ValueError, match=rf"^(?=.*{message})[^\n]{{1,600}}\Z")


def write_images(root, colours):
    """Files of 8 x 8 pixels, "train/cat/a": RED as root/train/cat/a.png. Returns root as text."""
    for name, colour in colours.items():
        Path(root, name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), tuple(colour)).save(Path(root, f"{name}.png"))
    return str(root)


def load(folder, size=8):
    """load_dataset as in a new process: one that lives keeps a folder's list of files."""
    utils.list_split.cache_clear()
    return utils.load_dataset(str(folder), size)


def random_pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def to_tensor(pixels):
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


@pytest.mark.parametrize("argument, expected", [
    ("NAME=a=b", "a=b"), ("NAME=32", "32"), ("NAME='fsq'", "'fsq'"), ("SIZE=64", 64), ("SIZE=0", 0), ("RATE=2", 2),
    ("RATE=1e-4", 1e-4), ("EPOCHS=(2,)", (2,)), ("EPOCHS=5", 5)])
def test_a_constant_is_replaced(argument, expected, capsys):
    namespace, name = dict(CONSTANTS), argument.partition("=")[0]
    constants = utils.read_constants(namespace, [argument])
    assert constants[name] == expected and type(constants[name]) is type(expected)
    assert namespace == CONSTANTS | {name: expected} and list(constants) == ["NAME", "SIZE", "RATE", "EPOCHS"]
    with pytest.raises(SystemExit, match="^$"):
        utils.read_constants(dict(CONSTANTS), ["--help"])
    assert capsys.readouterr().out == "Doc.\nNAME = 'fsq'\nSIZE = 32\nRATE = 0.001\nEPOCHS = (3, 1)\n"


@pytest.mark.parametrize("argument, message", [
    ("SIZ=64", "argument = 'SIZ=64', allowed: NAME=value with a NAME such as SIZE$"), ("size=64", "such as SIZE$"),
    ("SIZE", "NAME=value"), ("path=2", "NAME=value"), ("LAST=2", "NAME=value"), ("SIZE=-1", "SIZE = -1, allowed: int"),
    ("SIZE=3.5", "int"), ("SIZE=(16, 32)", "int"), ("SIZE='64'", "int"), ("SIZE=large", "int"), ("SIZE=True", "int"),
    ("RATE=1e999", "float"), ("EPOCHS=(2, -1)", "int"), ("EPOCHS=()", "int")])
def test_a_constant_that_cannot_be(argument, message):
    namespace = dict(CONSTANTS)
    with refused(message):
        utils.read_constants(namespace, ["NAME=simvq", argument])
    assert namespace == CONSTANTS


@pytest.mark.parametrize("error, message", [
    (ValueError("SIZE = 0"), "SIZE = 0"), (FileNotFoundError(2, "No such file", "a"), "[Errno 2] No such file: 'a'"),
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


def test_cifar_from_disk_or_drawn_images(tmp_path, monkeypatch, capsys):
    """Files in CIFAR-10's own format are read. Without them "auto", alone, takes drawn images instead, and tells so."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: os.path.exists(path))
    monkeypatch.setattr(utils.CIFAR10, "url", "http://127.0.0.1:1/cifar")  # nobody listens there
    base, data_dir, images = tmp_path / utils.CIFAR10.base_folder, str(tmp_path), random_pixels(12, 3, 32, 32)
    base.mkdir()
    for i, (name, _) in enumerate(utils.CIFAR10.train_list + utils.CIFAR10.test_list):
        (base / name).write_bytes(pickle.dumps({"data": images[2 * i :][:2].reshape(2, -1), "labels": [i, 9 - i]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    for name in ("auto", "cifar10"):
        train, labels, test, test_labels, classes = utils.load_dataset(name, 32, data_dir)
        assert np.array_equal(torch.cat([train, test]), images) and len(train) == 10 and classes == list("abcdefghij")
        assert labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5] and test_labels.tolist() == [5, 4]
    assert torch.equal(utils.load_dataset(name, 24, data_dir).test_images, utils.fit(test, 24))
    (base / "test_batch").unlink()
    with pytest.raises(OSError, match="^CIFAR-10 is not in .*/ and cannot be downloaded: "):
        utils.load_dataset("cifar10", 32, data_dir)
    monkeypatch.setattr(shapes, "draw", lambda n, size: (torch.arange(n), -torch.arange(n)))
    *drawn, classes = utils.load_dataset("auto", 32, data_dir)
    assert re.search("^CIFAR-10 .* cannot be downloaded: .*DATASET=shapes instead\n$", capsys.readouterr().out)
    expected = *torch.arange(60_000).split(50_000), *(-torch.arange(60_000)).split(50_000)  # images, labels
    assert all(torch.equal(drawn[i], expected[j]) for i, j in enumerate((0, 2, 1, 3))) and classes == shapes.SHAPES


def test_drawn_images():
    images, labels = shapes.draw(500, 32)
    assert all(torch.equal(a, b) for a, b in zip(shapes.draw(500, 32), (images, labels)))
    assert images.dtype == torch.uint8 and images.shape == (500, 3, 32, 32) and images.max() - images.min() == 255
    assert labels.bincount().tolist() == [50] * 10 and not torch.equal(shapes.draw(500, 32, seed=1)[0], images)
    circles = images[labels == shapes.SHAPES.index("circle")].float()  # bright on dark, or dark on bright
    inside, corner = circles[:, :, 15, 15].mean(1), circles[..., [0, 0, 31, 31], [0, 31, 0, 31]].mean((1, 2))
    assert ((inside > 127) == (inside > corner)).float().mean() > 0.85


def test_labels_are_those_of_the_class_folders_in_alphabetical_order(tmp_path):
    colours = {"dog": RED, "ant": GREEN, "cat": BLUE}
    files = {f"{split}/{name}/{i}": colours[name] for name in colours for split in ("train", "val") for i in range(9)}
    path = write_images(tmp_path / "pets", files)
    Path(path, "train/cat").rename("cats"), Path(path, "train/cat").symlink_to(Path("cats").absolute())
    data = load(path)
    assert data.classes == ["ant", "cat", "dog"] and torch.equal(load(path).train_labels, data.train_labels)
    for images, labels in (data[:2], data[2:4]):
        assert images.shape == (27, 3, 8, 8) and labels.dtype == torch.int64 and labels.bincount().tolist() == [9] * 3
        assert labels.diff().ne(0).sum() > 6 and images[:, :, 4, 4].tolist() == [(GREEN, BLUE, RED)[i] for i in labels]


@pytest.mark.parametrize("files, message", [
    ("test/a", "images in .*train"), ("train/a", "images in .*val"), ("train/x/a test/a", "same class folders"),
    ("train/x/a train/y/a val/x/a", "same class folders"), ("train/x/a train/a test/x/a", "class folders, or none")])
def test_a_folder_that_is_no_dataset(files, message, tmp_path):
    with refused(f"DATASET = '.*{message}"):
        load(write_images(tmp_path, dict.fromkeys(files.split(), RED)))
    for name, size, message in (("cifar100", 8, "DATASET = 'cifar100', allowed"), ("shapes", (32, 64), "IMAGE_SIZE")):
        with refused(message):  # several sizes are for folders
            load(name, size)


def test_what_cannot_be_used_is_said(tmp_path, capsys, monkeypatch):
    """Other files and folders that cannot be read are left out, broken images are listed and refused."""
    path, scan = write_images(tmp_path / "photos", dict.fromkeys(("train/x/a", "train/cut", "val/b"), RED)), os.scandir
    for name in ("a.txt", "b.txt", "LICENSE", "text.JPG"):
        Path(path, "train", name).write_text("no image")
    os.truncate(f"{path}/train/cut.png", 45)
    monkeypatch.setattr(os, "scandir", lambda folder: scan(f"{folder}/gone" if str(folder).endswith("x") else folder))
    with refused("without these 2 files: (?=.*cut.png)(?=.*text.JPG)"):
        load(path)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 3 and "2 files .txt" in printed and "1 files without" in printed and "/x" in printed
    assert not list(Path("data").iterdir())  # what was decoded so far is not taken for the whole


def test_a_folder_is_decoded_once_and_again_when_it_changes(tmp_path, monkeypatch):
    read, decoded, digests = utils.read_image, [], []
    monkeypatch.setattr(utils, "read_image", lambda file: decoded.append(file) or read(file))

    def count(folder, size=8):  # how many images are decoded
        decoded.clear()
        images = load(folder, size).train_images
        digests.append(utils.find_dataset(folder)[1])
        assert (images[:, 0] == 200).all()
        images.zero_()  # not in the file
        return len(decoded)

    path = write_images(tmp_path / "photos", dict.fromkeys(("train/a", "train/b", "test/a"), RED))
    assert [count(path), count("photos"), count(path, 4), count(path, 4)] == [3, 0, 3, 0]
    file = Path(path, "train/a.png")
    for change in (lambda: 0, lambda: os.truncate(file, 200), lambda: file.rename(f"{path}/train/c.png")):
        change(), [os.utime(image, (1, 1)) for image in file.parent.iterdir()]
        assert count(path) == 2  # the test image is that of before
    shutil.copytree(path, "other/photos", copy_function=shutil.copy2)
    assert count("other/photos") == 3  # another folder of this name
    os.utime(f"{path}/test/a.png", (1, 1))
    assert count(path) == 1 and len(set(digests)) == 6 and re.fullmatch("[0-9a-f]{12}", digests[0])


def test_images_that_would_take_too_much_memory_stay_in_their_files(folder, monkeypatch):
    """They come in the same order, and whole where they are no larger than a crop."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(utils, "DECODE_GB", 90 * 3 * 32**2 / 1e9)
    data = load(folder, 32)
    for split, images, labels in (("train", *data[:2]), ("test", *data[2:4])):
        for label, name in enumerate(data.classes):
            expected = sorted(np.array(Image.open(file)).tolist() for file in (folder / split / name).iterdir())
            assert sorted(images[labels == label].permute(0, 2, 3, 1).tolist()) == expected
    monkeypatch.setattr(utils, "DECODE_GB", utils.DECODE_GB - 1e-9)
    (streamed, labels, test, *_), index, loaded = load(folder, 32), torch.randperm(90), []
    assert isinstance(streamed, utils.ImageFiles) and len(streamed) == 90 and torch.equal(streamed[:7], data[0][:7])
    assert torch.equal(labels, data.train_labels) and torch.equal(test, data.test_images)
    batches = list(zip(index.split(40), (32, 16, 24)))
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        loaded.append(list(utils.load_batches(streamed, batches, False, "cpu")))
    assert [tuple(batch.shape) for batch in loaded[0]] == [(40, 3, 32, 32), (40, 3, 16, 16), (10, 3, 24, 24)]
    assert torch.equal(loaded[0][0], data.train_images[index[:40]] / 255)
    assert all(torch.equal(a, b) for a, b in zip(*loaded[:2])) and not torch.equal(loaded[0][1], loaded[2][1])


def test_random_crops_and_the_next_image_for_a_broken_one(tmp_path, capsys):
    """An image's red is x and its green is y, so that a crop shows how large it is and where."""
    data = load(write_images(tmp_path, dict.fromkeys(("train/a", "train/b", "test/a"), BLUE)), (16, 8))
    images, file = data.train_images, data.train_images.files[1]  # the last one
    y, x = np.mgrid[:64, :64].astype(np.uint8) * 4
    Image.fromarray(np.stack([x, y, 0 * x], 2)).save(file)
    assert data.test_images.shape[-1] == images[:1].shape[-1] == 16 and images[1, 8].shape == (3, 8, 8)
    crops = torch.stack([images[1, 16] for _ in range(200)]) / 4
    width, height = (crops[:, 0, 8, -2] - crops[:, 0, 8, 1]) / 13, (crops[:, 1, -2, 8] - crops[:, 1, 1, 8]) / 13
    area = width * height  # in the image's pixels, of a pixel of the crop: from 1 to 16, with sides of 3 to 4 at most
    assert 0.8 < area.min() < 2 and 13 < area.max() < 16.5 and (width / height).log().abs().max() < 0.35
    Path(file).write_bytes(b"broken")
    assert images[1, 8][:, 0, 0].tolist() == images[0, 8][:, 0, 0].tolist() == BLUE
    assert re.search(f"{Path(file).name}.* cannot be read", capsys.readouterr().out)


def test_batches_of_which_half_are_mirrored():
    images, index = torch.from_numpy(random_pixels(400, 3, 4, 6)), torch.arange(400).flip(0)
    plain, mixed = (next(utils.load_batches(images, [(index, 6)], flip, "cpu")) for flip in (False, True))
    assert torch.equal(plain, images.flip(0) / 255) and torch.equal(utils.to_float(plain.double()), plain)
    same, mirrored = (mixed == plain).all((1, 2, 3)), (mixed == plain.flip(3)).all((1, 2, 3))
    assert (same | mirrored).all() and 150 < mirrored.sum() < 250
    with refused("range of images"):  # no uint8, and not in [0, 1]
        utils.to_float(images.float())


def test_an_image_is_read_as_a_viewer_shows_it():
    """Upright as in its EXIF, in 8-bit RGB from any mode and format, on white where it is transparent."""
    pixels, exif = random_pixels(7, 12, 3), Image.Exif()
    for exif[0x0112], stored in enumerate((
            pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1], pixels.transpose(1, 0, 2), np.rot90(pixels),
            pixels[::-1, ::-1].transpose(1, 0, 2), np.rot90(pixels, -1)), 1):
        Image.fromarray(np.ascontiguousarray(stored)).save("a.png", exif=exif)
        assert torch.equal(utils.read_image("a.png"), to_tensor(pixels))
    assert torch.equal(utils.load_image("a.png"), to_tensor(pixels)[None] / 255)
    for mode, kind in zip(("RGB", "L", "CMYK", "1", "P", "CMYK", "RGB"), "jpg jpg jpg png png tif webp".split()):
        Image.fromarray(pixels).convert(mode).save(f"a.{kind}")
        assert torch.equal(utils.read_image(f"a.{kind}"), to_tensor(Image.open(f"a.{kind}").convert("RGB")))
    for alpha, expected in ((0, (255, 255, 255)), (51, (224, 244, 204)), (255, (100, 200, 0))):
        image = Image.new("RGBA", (4, 4), (100, 200, 0, alpha))
        image.save("a.png"), image.convert("RGB").quantize(2).save("palette.png", transparency=bytes([alpha]))
        Image.new("LA", (4, 4), (100, alpha)).save("grey.png")
        read = [utils.read_image(f"{name}.png")[:, 0, 0].tolist() for name in ("a", "palette", "grey")]
        assert np.abs(np.subtract(read, [expected, expected, expected[:1] * 3])).max() <= 1


def test_a_file_that_is_no_image_of_8_bits(monkeypatch):
    """Another format is refused whatever its name; Pillow would run a program for EPS."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: pytest.fail("a program was run"))
    Path("eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    Image.new("L", (8, 8)).save("gif.png", "GIF"), Image.new("F", (8, 8)).save("float.tif")
    Image.new("I;16", (8, 8)).save("deep.png"), Path("empty.png").write_bytes(b"")
    for name in ("eps.png", "gif.png", "deep.png", "float.tif", "empty.png", "missing.png"):
        with refused(f"^image '{name}' cannot be read: {'.*8 bits' if name in ('deep.png', 'float.tif') else '.'}"):
            utils.load_image(name)


@pytest.mark.parametrize("height, width", [(40, 90), (90, 40), (20, 20), (10, 14)])
def test_an_image_is_resized_and_cropped_at_its_centre(height, width):
    image = Image.fromarray(random_pixels(6, 6, 3)).resize((width, height), Image.Resampling.BICUBIC)
    w, h = (side * 20 // min(height, width) for side in (width, height))
    centre = (w - 20) // 2, (h - 20) // 2, (w + 20) // 2, (h + 20) // 2
    expected = image.resize((w, h), Image.Resampling.BICUBIC).crop(centre)  # Pillow smooths before it leaves pixels out
    fitted = utils.fit(to_tensor(image).expand(2, 3, height, width), 20)
    assert fitted.dtype == torch.uint8 and torch.equal(utils.fit(to_tensor(image), 20), fitted[0])
    assert (fitted.int() - to_tensor(expected).int()).abs().max() <= 1


@pytest.mark.parametrize("size, zoom", [(32, 4), (200, 1)])
def test_a_grid_goes_row_by_row_and_enlarges_small_images(size, zoom):
    pixels, side = random_pixels(5, size, size, 3), size * zoom + 2
    utils.save_grid(Path("new/grid.png"), torch.from_numpy(pixels).permute(0, 3, 1, 2), columns=3)
    expected, cells = np.full((2 * side + 2, 3 * side + 2, 3), 255), pixels.repeat(zoom, 1).repeat(zoom, 2)
    for i in range(5):
        expected[i // 3 * side + 2 :, i % 3 * side + 2 :][: side - 2, : side - 2] = cells[i]
    assert np.array_equal(np.array(Image.open("new/grid.png")), expected)


def test_plots(monkeypatch):
    figures, save_figure = [], utils.save_figure
    monkeypatch.setattr(utils, "save_figure", lambda path, figure: figures.append(figure) or save_figure(path, figure))
    history = [{"stage": 1 + (i > 1), "epoch": i, "rec_loss": 1 / (i + 1), "gan_loss": 0, "psnr": 20 + i, "ssim": 0.5,
                "usage": 0.3, "perplexity": 2.5} for i in range(3)]
    utils.plot_usage(Path("usage.png"), torch.tensor([0, 3, 0, 5, 1] + [0] * 5), history[0], "a run")
    utils.plot_curves(Path("curves.png"), history, "a run")
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
    utils.save_checkpoint(path, model, metrics={"psnr": 20.0}, epoch=3)
    return model.eval(), path


def test_a_checkpoint_needs_nothing_else(saved, monkeypatch):
    """It has the model's config, weights and stage, and what is told of it. Pairs are weights of 8 bits."""
    monkeypatch.setattr(models, "PRETRAINED_DIR", Path("nowhere"))
    model, images, name = utils.load_checkpoint(saved[1]), torch.rand(2, 3, 32, 32), "decoder.head.weight"
    assert not model.training and model.stage == 2 and model.config == saved[0].config
    assert torch.equal(model(images)[0], saved[0](images)[0])
    _, content = utils.load_model(saved[1], models.VQRAE, pretrained=False)
    assert (content["metrics"], content["epoch"], content["stage"]) == ({"psnr": 20.0}, 3, 2)
    weight = content["model"][name]
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    content["model"][name] = (scale, (weight / scale).round().to(torch.int8))
    utils.save_torch("small.pt", content)
    assert ((utils.load_checkpoint("small.pt").state_dict()[name] - weight).abs() <= scale * 0.51).all()


@pytest.mark.parametrize("part, change", [
    ("model", {"decoder.head.weight": torch.full((3, 32, 3, 3), torch.nan)}), ("model", {"more": torch.zeros(1)}),
    ("model", {"quantizer.project_in.bias": torch.tensor([0, torch.inf])}), ("config", {"decoder_width": 64}),
    ("config", {"grid": 7}), ("config", {"nonsense": 1}), ("config", {"grid": [[8]]}), ("config", {"quantizer": "fqs"}),
    ("config", {"encoder": "x" * 10**6}), ("config", {"quantizer_options": {"levels": [[[8] * 10**5], 5]}})])
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(part, change, saved):
    content = utils.load_torch(saved[1])
    utils.save_torch("bad.pt", content | {part: content[part] | change})
    with refused("^checkpoint bad.pt does not fit this code: ."):
        utils.load_checkpoint("bad.pt")


@pytest.mark.parametrize("name, decibels", [
    ("ema_vq", 31.24), *(pytest.param(*row, marks=pytest.mark.slow) for row in (("fsq", 30.86), ("simvq", 30.70)))])
def test_a_photograph_in_tokens_of_a_shipped_checkpoint(name, decibels):
    model = utils.load_checkpoint(models.PRETRAINED_DIR / f"vqrae_{name}.pt")
    image = utils.load_image(get_sample_data("grace_hopper.jpg", asfileobj=False))
    reconstruction = model.decode_from_indices(model.encode_to_indices(image), size=image.shape[2:])
    assert evaluate.psnr(reconstruction, image).item() == pytest.approx(decibels, abs=0.02)


def test_the_shipped_checkpoints_decode_indices():
    for name, mean in (("ema_vq", 0.452), ("fsq", 0.766), ("simvq", 0.439)):
        model = utils.load_checkpoint(models.PRETRAINED_DIR / f"vqrae_{name}.pt")
        images = model.decode_from_indices(torch.arange(0, 16384, 256).view(1, 8, 8))
        assert images.shape == (1, 3, 32, 32) and images.mean().item() == pytest.approx(mean, abs=0.005)
