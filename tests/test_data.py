"""data.py: how an image is read, folders, broken files, image files and batches, CIFAR-10, drawn shapes."""
import gc
import io
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SEED, refused
from PIL import Image, ImageCms, features

import data as module
from data import CIFAR10, SHAPES, ImageFiles, draw_shapes, fit, load_batches, load_dataset, read_image, to_float

RED, GREEN, BLUE = [200, 0, 0], [0, 200, 0], [0, 0, 200]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux shows processes and files in /proc")


def write_images(root, colours):
    """Files of 8 x 8 pixels, "train/cat/a": RED as root/train/cat/a.png. Returns root as text."""
    for name, colour in colours.items():
        Path(root, name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), tuple(colour)).save(Path(root, f"{name}.png"))
    return str(root)


def load(folder, size=8):
    """load_dataset as in a new process: one that lives keeps a folder's list of files."""
    module.list_split.cache_clear()
    return load_dataset(str(folder), size)


def random_pixels(*shape):
    return np.random.default_rng(SEED).integers(0, 256, shape, dtype=np.uint8)


def to_tensor(pixels):
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


# How an image is read

def test_an_image_is_read_as_a_viewer_shows_it():
    """Upright as in its EXIF, in 8-bit RGB from any mode and format."""
    pixels, exif = random_pixels(7, 12, 3), Image.Exif()
    stored = [pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1], pixels.transpose(1, 0, 2), np.rot90(pixels),
              pixels[::-1, ::-1].transpose(1, 0, 2), np.rot90(pixels, -1)]
    for orientation, turned in enumerate(stored, 1):
        exif[0x0112] = orientation
        for kind in ("png", "tif"):
            Image.fromarray(np.ascontiguousarray(turned)).save(f"a.{kind}", exif=exif)
            assert torch.equal(read_image(f"a.{kind}"), to_tensor(pixels))
    assert torch.equal(module.load_image("a.png"), to_tensor(pixels)[None] / 255)
    for mode, kind in zip(("RGB", "L", "CMYK", "1", "P", "CMYK", "RGB"), "jpg jpg jpg png png tif webp".split()):
        Image.fromarray(pixels).convert(mode).save(f"a.{kind}")
        assert torch.equal(read_image(f"a.{kind}"), to_tensor(Image.open(f"a.{kind}").convert("RGB")))


@pytest.mark.parametrize("alpha, expected", [(0, [255, 255, 255]), (51, [224, 244, 204]), (255, [100, 200, 0])])
def test_a_transparent_image_is_on_white(alpha, expected):
    image = Image.new("RGBA", (4, 4), (100, 200, 0, alpha))
    image.save("a.png")
    image.convert("RGB").quantize(2).save("palette.png", transparency=bytes([alpha]))
    Image.new("LA", (4, 4), (100, alpha)).save("grey.png")
    read = [read_image(f"{name}.png")[:, 0, 0].tolist() for name in ("a", "palette", "grey")]
    assert np.abs(np.subtract(read, [expected, expected, expected[:1] * 3])).max() <= 1


def test_colour_profiles_are_converted_to_srgb(capsys):
    """Pixels of another space, here with red and green exchanged by hand, look as a viewer shows them."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tmp_").replace(b"gXYZ", b"rXYZ").replace(b"tmp_", b"gXYZ").replace(
        "sRGB".encode("utf-16-be"), "abcd".encode("utf-16-be"))
    image, plain = Image.new("RGB", (4, 4), (200, 30, 60)), [200, 30, 60]
    for profile, expected in ((srgb, plain), (swapped, [30, 200, 60]), (b"no profile", plain)):
        for kind in ("png", "webp"):
            image.save(f"a.{kind}", icc_profile=profile, lossless=True)
            assert np.abs(np.subtract(read_image(f"a.{kind}")[:, 0, 0].tolist(), expected)).max() <= 2
    assert "a.webp: its colour profile" in capsys.readouterr().out
    image.convert("RGBA").save("b.png", icc_profile=swapped)
    assert np.abs(np.subtract(read_image("b.png")[:, 0, 0].tolist(), [30, 200, 60])).max() <= 2


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("kind, content", [
    (b"eXIf", b"garbage"), (b"pHYs", b"short"), (b"tEXt", None),
    (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**21))), (b"iCCP", b"icc\0\0" + zlib.compress(bytes(2**22)))])
def test_no_chunk_of_metadata_makes_a_png_a_bad_image(kind, content, end):
    """Too large, wrong, or without a checksum (None), before the pixels or behind them."""
    image, exif, file = Image.fromarray(random_pixels(4, 6, 3)), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(file, "PNG", exif=exif if kind != b"eXIf" else None)
    checksum = zlib.crc32(kind + content).to_bytes(4, "big") if content else b"none"
    content, plain = content or b"a\0b", file.getvalue()
    at = len(plain) - 12 if end else 33  # before the last chunk, or behind the first
    Path("a.png").write_bytes(plain[:at] + len(content).to_bytes(4, "big") + kind + content + checksum + plain[at:])
    assert torch.equal(read_image("a.png"), to_tensor(image if kind == b"eXIf" else np.rot90(np.array(image), -1)))


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_an_exif_that_cannot_be_rewritten_still_turns_the_image(kind):
    orientation, resolution = struct.pack("<HHII", 0x0112, 3, 1, 6), struct.pack("<HHII", 0x011A, 10, 1, 38)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + orientation + resolution + bytes(4) + struct.pack("<ii", -1, 0)  # -1/0
    Image.new("RGB", (6, 4), "red").save(f"a.{kind}", exif=exif)
    assert read_image(f"a.{kind}").shape == (3, 6, 4)  # by 90 degrees


@pytest.mark.parametrize("kind", ["jpg", "webp", pytest.param("avif", marks=pytest.mark.skipif(
    not features.check("avif"), reason="this Pillow reads no AVIF"))])
def test_an_exif_that_cannot_be_read_is_ignored(kind, tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "maker"
    file = tmp_path / f"a.{kind}"
    Image.new("RGB", (6, 4), "red").save(file, exif=exif)
    file.write_bytes(file.read_bytes().replace(b"MM\0*", b"bad!"))
    image = read_image(file).float()
    assert module.find_images(tmp_path) == [file] and (image[0] > 240).all() and (image[1:] < 15).all()


def test_a_file_that_is_no_image_of_8_bits(monkeypatch):
    """Another format is refused whatever its name; Pillow would run a program for EPS."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: pytest.fail("a program was run"))
    Path("eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    Image.new("L", (8, 8)).save("gif.png", "GIF")
    Image.new("F", (8, 8)).save("float.tif")
    Image.new("I;16", (8, 8)).save("deep.png")
    Image.fromarray(random_pixels(40, 40, 3)).save("cut.png")
    os.truncate("cut.png", 3000)  # of 5000 bytes
    for name in ("eps.png", "gif.png", "deep.png", "float.tif", "cut.png", "missing.png"):
        with refused(f"^image '{name}' cannot be read: {'.*8 bits' if name in ('deep.png', 'float.tif') else '.'}"):
            module.load_image(name)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [11, 20])
def test_an_image_above_pillows_limit_is_a_broken_file(side, monkeypatch):
    """Pillow itself only warns up to twice the limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (side, side)).save("a.png")
    with refused("^image 'a.png' cannot be read: .* pixels"):
        read_image("a.png")


@pytest.mark.parametrize("height, width", [(40, 90), (90, 40), (20, 20), (10, 14), (8, 400)])
def test_an_image_is_resized_and_cropped_at_its_centre(height, width):
    image = Image.fromarray(random_pixels(6, 6, 3)).resize((width, height), Image.Resampling.BICUBIC)
    w, h = (side * 20 // min(height, width) for side in (width, height))
    centre = (w - 20) // 2, (h - 20) // 2, (w + 20) // 2, (h + 20) // 2
    expected = image.resize((w, h), Image.Resampling.BICUBIC).crop(centre)  # Pillow smooths before it leaves pixels out
    fitted = fit(to_tensor(image).expand(2, 3, height, width), 20)
    assert fitted.dtype == torch.uint8 and torch.equal(fit(to_tensor(image), 20), fitted[0])
    assert (fitted.int() - to_tensor(expected).int()).abs().max() <= 1


def test_a_strip_of_pixels_takes_little_memory():
    """Resized as a whole, 3,000 x 1 pixels would have 3 x 256 x 768,000 numbers."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert fit(torch.zeros(3, 1, 3000, dtype=torch.uint8), 256).shape == (3, 256, 256)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


# Folders

def test_labels_are_those_of_the_class_folders_in_alphabetical_order(tmp_path, monkeypatch):
    colours = {"dog": RED, "ant": GREEN, "cat": BLUE}
    files = {f"{split}/{name}/{i}": colours[name] for name in colours for split in ("train", "val") for i in range(9)}
    path = write_images(tmp_path / "pets", files)
    Path(path, "train/cat").rename("cats")
    Path(path, "train/cat").symlink_to(Path("cats").absolute())
    monkeypatch.setenv("HOME", str(tmp_path))
    data = load("~/pets")
    assert data.classes == ["ant", "cat", "dog"] and torch.equal(load(path).train_labels, data.train_labels)
    for images, labels in (data[:2], data[2:4]):
        assert images.shape == (27, 3, 8, 8) and labels.dtype == torch.int64 and labels.bincount().tolist() == [9] * 3
        assert labels.diff().ne(0).sum() > 6 and images[:, :, 4, 4].tolist() == [(GREEN, BLUE, RED)[i] for i in labels]


def test_two_spellings_of_an_accent_are_one_class(tmp_path):
    """macOS may write é as e and an accent (NFD)."""
    path = write_images(tmp_path, {"train/caf\u00e9/a": RED, "train/cafe\u0301/b": RED, "test/cafe\u0301/a": RED})
    data = load(path)
    assert data.classes == ["caf\u00e9"] and data.train_labels.tolist() == [0, 0] and data.test_labels.tolist() == [0]


@pytest.mark.parametrize("files, message", [
    ("test/a", "no folder train/"), ("train/a", "no folder test/"), ("train/x/a test/a", "same class folders"),
    ("train/x/a train/y/a val/x/a", "same class folders.* y"), ("train/x/a train/a test/x/a", "beside them")])
def test_a_folder_that_is_no_dataset(files, message, tmp_path):
    with refused(message):
        load(write_images(tmp_path, dict.fromkeys(files.split(), RED)))


@pytest.mark.parametrize("name, size, constant", [("cifar100", 8, "DATASET"), ("shapes", (32, 64), "IMAGE_SIZE")])
def test_a_wrong_name_or_size_of_a_dataset(name, size, constant):
    with refused(f"{constant} = .*, allowed: "):  # several sizes are for folders
        load(name, size)


def test_folders_are_read_once_and_files_of_all_suffixes(tmp_path, capsys):
    """Links to the same folder, in circles, or to a folder above end; JPEG's rare suffixes and upper case are read."""
    path = Path(write_images(tmp_path / "pets", dict.fromkeys(("train/ant/a", "train/cat/b", "test/ant/c"), RED)))
    for link, target in (("train/ant/up", "train"), ("train/ant/top", ""), ("train/ant/c", "train/cat"),
                         ("train/cat/a", "train/ant"), ("train/cat/self", "train/cat")):
        (path / link).symlink_to(path / target)
    for name in ("c.jfif", "d.JPE", "e.PNG", "f.gif", "._g.png"):
        Image.new("RGB", (8, 8)).save(path / "train/cat" / name)
    found = [str(file.relative_to(path / "train")) for file in module.find_images(path / "train")]
    assert found == ["ant/a.png", "cat/b.png", "cat/c.jfif", "cat/d.JPE", "cat/e.PNG"]
    assert capsys.readouterr().out.endswith(": 1 files .gif\n")


def test_files_and_folders_that_cannot_be_used_are_named(tmp_path, capsys, monkeypatch):
    path, scan = write_images(tmp_path / "photos", dict.fromkeys(("x/a", "b"), RED)), os.scandir
    for name in ("a.txt", "b.txt", "LICENSE"):
        Path(path, name).write_text("no image")
    monkeypatch.setattr(os, "scandir", lambda folder: scan(f"{folder}/gone" if str(folder).endswith("x") else folder))
    assert module.find_images(path) == [Path(path, "b.png")]
    printed = capsys.readouterr().out
    assert "2 files .txt" in printed and "1 files without" in printed and "/x" in printed


def test_a_folder_is_decoded_once_and_again_when_it_changes(tmp_path, monkeypatch):
    """The decoded file depends on a folder's place and times, a run's key on names and sizes alone."""
    read, decoded, keys = read_image, [], []

    def record(file):
        decoded.append(file)
        return read(file)

    def count(folder, size=8):  # how many images are decoded
        decoded.clear()
        images = load(folder, size).train_images
        keys.append(module.find_dataset(folder)[1])
        assert (images[:, 0] == 200).all()
        images.zero_()  # not in the file
        return len(decoded)

    monkeypatch.setattr(module, "read_image", record)
    path = write_images(tmp_path / "photos", dict.fromkeys(("train/a", "train/b", "test/a"), RED))
    assert [count(path), count("photos"), count(path, 4), count(path, 4)] == [3, 0, 3, 0]
    os.utime(f"{path}/test/a.png", (1, 1))
    assert count(path) == 1  # the training images are those of before
    shutil.copytree(path, "other/photos")
    assert count("other/photos") == 3 and len(set(keys)) == 1
    os.truncate(f"{path}/train/a.png", os.path.getsize(f"{path}/train/a.png") - 1)  # the pixels are still there
    assert count(path) == 2
    Path(path, "train/a.png").rename(f"{path}/train/c.png")
    assert count(path) == 2 and len(set(keys)) == 3


def test_a_full_disk_is_an_error_of_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = write_images(tmp_path / "photos", {f"{split}/{i}": RED for split in ("train", "test") for i in range(9)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"^data/photos_train_.* could not be written: [^\n]*too large[^\n]*$"):
            load(path, 64)  # 9 x 3 x 64 x 64 bytes
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [*Path("data").glob("*.bin*")]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 99, 1))
    with refused("needs 1,728 bytes.* 1 left"):
        load(path)


@LINUX
def test_nothing_has_a_draft_open_or_mapped_when_it_is_renamed(tmp_path, monkeypatch):
    """Windows renames no such file. The drafts of a process that was killed are removed."""
    path, replace = write_images(tmp_path / "photos", dict.fromkeys(("train/a", "test/a"), RED)), os.replace

    def check_replace(old, new):
        held = [str(link.resolve()) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        assert str(Path(old).resolve()) not in held and str(old) not in Path("/proc/self/maps").read_text()
        replace(old, new)

    monkeypatch.setattr(os, "replace", check_replace)
    Path("data").mkdir()
    Path("data/photos_train_8_0.bin.1.tmp").write_bytes(b"half")
    load(path)
    assert len([*Path("data").glob("*.bin")]) == 2 and not [*Path("data").glob("*.tmp")]


# Broken files, image files and batches

@pytest.fixture
def pets(tmp_path):
    """200 training and 2 test images of two classes; one training image is broken."""
    colours = {"cat": RED, "dog": BLUE}
    files = {f"train/{name}/{i}": colours[name] for name in colours for i in range(100)}
    path = Path(write_images(tmp_path / "pets", files | {f"test/{name}/0": colours[name] for name in colours}))
    (path / "train/dog/7.png").write_bytes(b"broken")
    return path


def test_broken_files_are_left_out_of_decoded_images_and_labels(pets, capsys):
    for _ in range(2):  # decoded; read again
        data = load(pets)
        assert data.train_images.shape == (199, 3, 8, 8) and data.train_labels.bincount().tolist() == [100, 99]
        assert data.train_images[:, :, 4, 4].tolist() == [(RED, BLUE)[i] for i in data.train_labels]
        assert re.search("1 of 200 images cannot be read: .*dog/7.png", capsys.readouterr().out)


def test_an_image_of_its_class_takes_a_broken_files_place(pets, monkeypatch, capsys):
    """Rows and labels of image files stay the same, and whoever reads them says what is broken."""
    monkeypatch.setattr(module, "cores", lambda: 2)
    monkeypatch.setattr(module, "DECODE_GB", 0)
    images, labels, *_ = load(pets)
    expected = [(RED, BLUE)[i] for i in labels]
    batch = next(load_batches(images, [(torch.arange(200), 8)], False, "cpu"))
    assert (batch * 255)[:, :, 4, 4].round().tolist() == expected
    assert "1 of 200 images cannot be read" in capsys.readouterr().out
    images = ImageFiles(images.files, 8, labels)
    assert images[:200][:, :, 4, 4].tolist() == expected and "1 of 200 images" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["train/dog/[0-5].png", "train/*/*.png"])
def test_more_than_a_hundredth_of_broken_files_is_refused(broken, pets, monkeypatch):
    for file in pets.glob(broken):
        file.write_bytes(b"broken")
    sentence = r"3 of 200 images cannot be read: .*1 % .*The last error: image '.*png' cannot be read: cannot identify"
    monkeypatch.setattr(module, "cores", lambda: 1)
    with pytest.raises(ValueError, match=f"^{sentence}"):
        load(pets)
    assert not [*Path("data").glob("*.bin*")]  # what was decoded so far is not taken for the whole
    files = [str(file) for file in pets.glob("train/*/*.png")]
    with pytest.raises(ValueError, match=f"^{sentence}"):
        ImageFiles(files, 8)[:200]
    with pytest.raises(ValueError, match=sentence):  # a worker's
        list(load_batches(ImageFiles(files, 8), [(torch.arange(200), 8)], False, "cpu"))
    gc.collect()  # the error's traceback keeps the worker


def test_at_most_ten_broken_files_are_named(capsys):
    images = ImageFiles([Path(f"{i}.png") for i in range(5000)], 8)
    images.broken[:30] = True
    images.report()
    images.report()  # which says nothing new
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "30 of 5,000" in printed and printed.count(".png") == 10


def test_a_file_that_is_gone_is_not_broken(pets):
    images = ImageFiles([*pets.glob("train/cat/*.png")], 8)
    shutil.rmtree(pets)  # as a drive that is gone, not one file after the other
    with refused("is gone"):
        images[:1]


def test_a_mistake_in_a_dataset_of_ones_own_shows_where_it_is(folder, monkeypatch):
    class Mistaken(ImageFiles):
        def read(self, i):
            return self.no_such_name

    monkeypatch.setattr(module, "cores", lambda: 1)
    images = Mistaken([*folder.rglob("*.png")], 8)
    with pytest.raises(AttributeError, match=r"(?s)test_data.py.*self\.no_such_name"):
        next(load_batches(images, [(torch.arange(4), 8)], False, "cpu"))
    gc.collect()


def test_images_that_would_take_too_much_memory_stay_in_their_files(folder, monkeypatch):
    """They come in the same order, and whole where they are no larger than a crop."""
    monkeypatch.setattr(module, "cores", lambda: 2)
    monkeypatch.setattr(module, "DECODE_GB", 90 * 3 * 32**2 / 1e9)
    data = load(folder, 32)
    for split, images, labels in (("train", *data[:2]), ("test", *data[2:4])):
        for label, name in enumerate(data.classes):
            expected = sorted(np.array(Image.open(file)).tolist() for file in (folder / split / name).iterdir())
            assert sorted(images[labels == label].permute(0, 2, 3, 1).tolist()) == expected
    monkeypatch.setattr(module, "DECODE_GB", module.DECODE_GB - 1e-9)
    streamed, labels, test, *_ = load(folder, 32)
    assert isinstance(streamed, ImageFiles) and len(streamed) == 90 and torch.equal(streamed[:7], data[0][:7])
    assert torch.equal(labels, data.train_labels) and torch.equal(test, data.test_images)
    index, loaded = torch.randperm(90), []
    batches = list(zip(index.split(40), (32, 16, 24)))
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        loaded.append(list(load_batches(streamed, batches, False, "cpu")))
    assert [tuple(batch.shape) for batch in loaded[0]] == [(40, 3, 32, 32), (40, 3, 16, 16), (10, 3, 24, 24)]
    assert torch.equal(loaded[0][0], data.train_images[index[:40]] / 255)
    assert all(torch.equal(a, b) for a, b in zip(*loaded[:2])) and not torch.equal(loaded[0][1], loaded[2][1])


def test_random_crops(tmp_path):
    """An image's red is x and its green is y, so that a crop shows how large it is and where."""
    y, x = np.mgrid[:64, :64].astype(np.uint8) * 4
    Image.fromarray(np.stack([x, y, 0 * x], 2)).save("a.png")
    crops = torch.stack(ImageFiles(["a.png"], 16).__getitems__([(0, 16)] * 400)) / 4
    width, height = (crops[:, 0, 8, -2] - crops[:, 0, 8, 1]) / 13, (crops[:, 1, -2, 8] - crops[:, 1, 1, 8]) / 13
    area = width * height  # in the image's pixels, of a pixel of the crop: from 1 to 16, with sides of 3 to 4 at most
    assert 0.8 < area.min() < 2 and 13 < area.max() < 16.5 and (width / height).log().abs().max() < 0.35


def test_batches_of_which_half_are_mirrored():
    images, index = torch.from_numpy(random_pixels(400, 3, 4, 6)), torch.arange(400).flip(0)
    plain, mixed = (next(load_batches(images, [(index, 6)], flip, "cpu")) for flip in (False, True))
    assert torch.equal(plain, images.flip(0) / 255) and torch.equal(to_float(plain.double()), plain)
    same, mirrored = (mixed == plain).all((1, 2, 3)), (mixed == plain.flip(3)).all((1, 2, 3))
    assert (same | mirrored).all() and 150 < mirrored.sum() < 250  # within five standard deviations, of 10


def test_workers_start_as_on_windows_and_macos_too(folder, monkeypatch):
    monkeypatch.setattr(module, "cores", lambda: 1)
    monkeypatch.setattr(module, "DECODE_GB", 0)
    images, batches = load(folder, 32).train_images, [(torch.arange(4), 16)]
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "")
    default = multiprocessing.get_start_method()
    try:
        multiprocessing.set_start_method("spawn", force=True)
        assert [batch.shape for batch in load_batches(images, batches, False, "cpu")] == [(4, 3, 16, 16)]
    finally:
        multiprocessing.set_start_method(default, force=True)


@LINUX
def test_a_killed_run_leaves_no_workers(folder):
    """Also where Python would start them by a forkserver, as Python 3.14 does."""
    Path("run.py").write_text("""import multiprocessing, sys, torch, data
if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    data.cores = lambda: 2
    for batch in data.load_batches(data.ImageFiles(sys.argv[1:], 8), [(torch.arange(4), 8)] * 10**5, False, "cpu"):
        print("a batch", flush=True)
""")
    files = map(str, folder.rglob("*.png"))
    run = subprocess.Popen([sys.executable, "run.py", *files], stdout=subprocess.PIPE, start_new_session=True)

    def living():  # processes of the run's session; a zombie, Z, has ended
        fields = [stat.rpartition(")")[2].split() for stat in map(read_or_nothing, Path("/proc").glob("[0-9]*/stat"))]
        return [state for state, _, _, session, *_ in filter(None, fields) if session == str(run.pid) and state != "Z"]

    try:
        assert run.stdout.readline() == b"a batch\n" and len(living()) >= 3
        run.kill()
        run.wait()
        deadline = time.monotonic() + 60  # workers look for their parent every few seconds
        while living() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not living()
    finally:
        if living():
            os.killpg(run.pid, signal.SIGKILL)
        run.stdout.close()


def read_or_nothing(path):
    try:
        return path.read_text()
    except OSError:  # it has just ended
        return ""


@pytest.mark.parametrize("cpus, files, count", [
    (1, {}, 1), (8, {}, 8), (8, {"cpu.max": "max 100000"}, 8), (8, {"cpu.max": "250000 100000"}, 3),
    (2, {"cpu.max": "400000 100000"}, 2), (8, {"cpu.max": "10000 100000"}, 1),
    (8, {"cpu.cfs_quota_us": "200000", "cpu.cfs_period_us": "100000"}, 2),
    (8, {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, 8)])
def test_only_the_cores_that_the_process_may_use_are_counted(cpus, files, count, monkeypatch):
    """By affinity, and by a container's quota: microseconds in each period."""
    def read_text(path):
        if path.name not in files:
            raise FileNotFoundError(path)
        return f"{files[path.name]}\n"

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cpus)), raising=False)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert module.cores() == count


# CIFAR-10 and drawn shapes

def test_cifar_from_disk_or_drawn_images(monkeypatch, capsys):
    """Files in CIFAR-10's own format are read. Without them "auto", alone, takes drawn images instead, and tells so."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: os.path.exists(path))
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:1/cifar")  # nobody listens there
    base, images = Path("data", CIFAR10.base_folder), random_pixels(12, 3, 32, 32)
    base.mkdir(parents=True)
    for i, (name, _) in enumerate(CIFAR10.train_list + CIFAR10.test_list):
        (base / name).write_bytes(pickle.dumps({"data": images[2 * i :][:2].reshape(2, -1), "labels": [i, 9 - i]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    for name in ("auto", "cifar10"):
        train, labels, test, test_labels, classes = load_dataset(name)
        assert np.array_equal(torch.cat([train, test]), images) and len(train) == 10 and classes == list("abcdefghij")
        assert labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5] and test_labels.tolist() == [5, 4]
    assert torch.equal(load_dataset(name, 24).test_images, fit(test, 24))
    (base / "test_batch").unlink()
    with pytest.raises(OSError, match="^CIFAR-10 is not in .*/ and cannot be downloaded: "):
        load_dataset("cifar10")
    assert socket.getdefaulttimeout() is None  # the user's sockets wait as before
    monkeypatch.setattr(module, "draw_shapes", lambda n, size: (torch.arange(n), -torch.arange(n)))
    *drawn, classes = load_dataset("auto")
    assert re.search("^CIFAR-10 .* cannot be downloaded: .*DATASET=shapes instead\n$", capsys.readouterr().out)
    expected = *torch.arange(60_000).split(50_000), *(-torch.arange(60_000)).split(50_000)  # images, labels
    assert all(torch.equal(drawn[i], expected[j]) for i, j in enumerate((0, 2, 1, 3))) and classes == [*SHAPES]


def test_drawn_images():
    images, labels = draw_shapes(500, 32)
    assert all(torch.equal(a, b) for a, b in zip(draw_shapes(500, 32), (images, labels)))
    assert images.dtype == torch.uint8 and images.shape == (500, 3, 32, 32) and images.max() - images.min() == 255
    assert labels.bincount().tolist() == [50] * 10
    circles = images[labels == SHAPES.index("●")].float()  # bright on dark, or dark on bright
    inside, corner = circles[:, :, 15, 15].mean(1), circles[..., [0, 0, 31, 31], [0, 31, 0, 31]].mean((1, 2))
    assert ((inside > 127) == (inside > corner)).float().mean() > 0.85
