"""data.py: how an image is read, folders, broken files, batches, CIFAR-10 and drawn shapes."""
import errno
import io
import multiprocessing
import os
import shutil
import socket
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import SEED, refused, write_images
from PIL import Image, ImageCms, features
from torchvision.transforms.v2 import RandomResizedCrop

import data as module
from data import SHAPES, ImageFiles, draw_shapes, fit, load_batches, load_dataset, load_image, read_image

RED, BLUE = [200, 0, 0], [0, 0, 200]


def random_pixels(*shape):
    return np.random.default_rng(SEED).integers(0, 256, shape, dtype=np.uint8)


def to_tensor(pixels):
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def load(folder):
    """Load a folder as a new process does: one that lives keeps the list of its files."""
    module.list_split.cache_clear()
    return load_dataset(str(folder), 8)


def colours(images):
    """The colour in the middle of each image."""
    return images[:, :, 4, 4].tolist()


# How an image is read

@pytest.mark.parametrize("mode, kind", [
    ("RGB", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("1", "png"), ("P", "png"), ("RGB", "webp")])
def test_an_image_of_any_mode_and_format_is_read_in_rgb(mode, kind):
    Image.fromarray(random_pixels(7, 12, 3)).convert(mode).save(f"a.{kind}")
    expected = to_tensor(Image.open(f"a.{kind}").convert("RGB")) / 255
    assert torch.equal(load_image(f"a.{kind}"), expected[None])


@pytest.mark.parametrize("kind", ["png", "tif"])
@pytest.mark.parametrize("orientation, turns", [(1, 0), (3, 2), (6, 1), (8, -1)])
def test_an_image_is_upright_as_its_exif_says(orientation, turns, kind):
    pixels, exif = random_pixels(7, 12, 3), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(np.rot90(pixels, turns))).save(f"a.{kind}", exif=exif)
    assert torch.equal(read_image(f"a.{kind}"), to_tensor(pixels))


def test_a_transparent_image_is_on_white():
    """An alpha of 51 is a fifth: a red of 100 becomes 0.2 * 100 + 0.8 * 255 = 224."""
    image = Image.new("RGBA", (4, 4), (100, 200, 0, 51))
    image.save("a.png")
    image.convert("RGB").quantize(2).save("palette.png", transparency=bytes([51]))
    for name in ("a.png", "palette.png"):
        assert read_image(name)[:, 0, 0].tolist() == pytest.approx([224, 244, 204], abs=1)


def test_a_colour_profile_is_converted_to_srgb(capsys):
    """A profile that names sRGB's red green, and its green red, exchanges the two. A broken one is ignored."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tmp_").replace(b"gXYZ", b"rXYZ").replace(b"tmp_", b"gXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "abcd".encode("utf-16-be"))  # its description
    linear = swapped.replace("abcd built-in".encode("utf-16-be"), "sRGB   linear".encode("utf-16-be"))
    for profile, red, green in ((srgb, 200, 30), (swapped, 30, 200), (linear, 30, 200), (b"broken", 200, 30)):
        for mode in ("RGB", "RGBA"):
            Image.new(mode, (4, 4), (200, 30, 60)).save("a.png", icc_profile=profile)
            assert read_image("a.png")[:, 0, 0].tolist() == pytest.approx([red, green, 60], abs=2)
    assert "a.png: its colour profile" in capsys.readouterr().out


def test_a_grey_profile_is_converted_also_with_transparency(capsys):
    """In this one numbers are proportional to light. sRGB shows x with 1.055 x^(1 / 2.4) - 0.055."""
    white = b"XYZ " + bytes(4) + bytes.fromhex("0000f6d6000100000000d32d")
    name = b"desc" + bytes(7) + b"\5grey\0" + bytes(79)
    tags = {b"wtpt": white, b"kTRC": b"curv" + bytes(8), b"desc": name}
    table, body = len(tags).to_bytes(4, "big"), b""
    for tag, content in tags.items():
        table += tag + (168 + len(body)).to_bytes(4, "big") + len(content).to_bytes(4, "big")  # 168 = 128 + 4 + 3 * 12
        body += content
    head = bytes(4) + bytes.fromhex("02100000") + b"mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(28) + white[8:]
    profile = (168 + len(body)).to_bytes(4, "big") + head + bytes(128 - 4 - len(head)) + table + body
    for mode, pixel in (("L", 100), ("LA", (100, 255))):
        Image.new(mode, (4, 4), pixel).save("a.png", icc_profile=profile)
        grey = 255 * (1.055 * (100 / 255) ** (1 / 2.4) - 0.055)
        assert read_image("a.png")[:, 0, 0].tolist() == pytest.approx([grey] * 3, abs=1)
    assert "profile" not in capsys.readouterr().out


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("kind, content", [
    (b"eXIf", b"garbage"), (b"pHYs", b"short"), (b"tEXt", None),
    (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**21))), (b"iCCP", b"icc\0\0" + zlib.compress(bytes(2**22)))])
def test_a_png_with_bad_metadata_is_read(kind, content, behind):
    """They are wrong, too large, or without a checksum (None), before the pixels or behind them."""
    pixels, exif, file = random_pixels(4, 6, 3), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # a quarter turn, which has to be read still
    Image.fromarray(pixels).save(file, "PNG", exif=None if kind == b"eXIf" else exif)
    checksum = zlib.crc32(kind + content).to_bytes(4, "big") if content else b"none"
    content = content or b"a\0b"
    chunk = len(content).to_bytes(4, "big") + kind + content + checksum
    start = len(file.getvalue()) - 12 if behind else 33  # the last chunk has 12 bytes; the first one ends at 33
    Path("a.png").write_bytes(file.getvalue()[:start] + chunk + file.getvalue()[start:])
    assert torch.equal(read_image("a.png"), to_tensor(pixels if kind == b"eXIf" else np.rot90(pixels, -1)))


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_an_exif_that_cannot_be_rewritten_still_turns_the_image(kind):
    orientation, resolution = struct.pack("<HHII", 0x0112, 3, 1, 6), struct.pack("<HHII", 0x011A, 10, 1, 38)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + orientation + resolution + bytes(4) + struct.pack("<ii", -1, 0)  # -1/0
    Image.new("RGB", (6, 4), "red").save(f"a.{kind}", exif=exif)
    assert read_image(f"a.{kind}").shape == (3, 6, 4)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_an_exif_that_stops_pillow_is_left_out():
    exif, file = Image.Exif(), Path("a.avif")
    exif[0x010F] = "maker"
    Image.new("RGB", (6, 4), "red").save(file, exif=exif)
    file.write_bytes(file.read_bytes().replace(b"MM\0*", b"bad!"))
    assert read_image(file)[:, 2, 3].tolist() == pytest.approx([255, 0, 0], abs=15)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("mode, side, kind, reason", [
    ("L", 8, "GIF", ""), ("F", 8, "TIFF", "8 bits"), ("I;16", 8, "PNG", "8 bits"), ("L", 11, "PNG", "pixels")])
def test_other_formats_more_bits_and_too_many_pixels_are_refused(mode, side, kind, reason, monkeypatch):
    """A format is known by its content: of EPS, Pillow would run the code. Above its limit it only warns."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new(mode, (side, side)).save("a.png", kind)
    with refused(f"^image 'a.png' cannot be read: .*{reason}"):
        read_image("a.png")


@pytest.mark.parametrize("height, width, rounding", [(40, 90, 1), (90, 40, 1), (20, 20, 1), (10, 14, 1), (8, 400, 2)])
def test_an_image_is_resized_as_pillow_does_and_cropped_at_its_centre(height, width, rounding):
    """A strip such as the last is cropped before it is resized, too."""
    image = Image.fromarray(random_pixels(6, 6, 3)).resize((width, height), Image.Resampling.BICUBIC)
    w, h = width * 20 // min(height, width), height * 20 // min(height, width)
    centre = (w - 20) // 2, (h - 20) // 2, (w + 20) // 2, (h + 20) // 2
    expected = image.resize((w, h), Image.Resampling.BICUBIC).crop(centre)
    difference = fit(to_tensor(image), 20).int() - to_tensor(expected).int()
    assert difference.abs().max() <= rounding


def test_a_strip_of_pixels_takes_little_memory():
    """Resized as a whole, 3,000 x 1 pixels would have 3 x 256 x 768,000 numbers."""
    with torch.profiler.profile(profile_memory=True) as profile:
        assert fit(torch.zeros(3, 1, 3000, dtype=torch.uint8), 256).shape == (3, 256, 256)
    assert max(event.cpu_memory_usage for event in profile.events()) < 10**7


# Folders

def test_labels_are_those_of_the_class_folders_in_alphabetical_order(tmp_path, monkeypatch):
    """They are in random order, and may lie in val/ and in "~". é may be one character or, as on macOS, two."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for one, other, colour in (("dog", "dog", RED), ("caf\u00e9", "cafe\u0301", BLUE)):
        for i in range(20):
            write_images("pets", [f"train/{(one, other)[i % 2]}/{i}", f"val/{other}/{i}"], colour)
    data = load("~/pets")
    assert data.classes == ["caf\u00e9", "dog"]
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        assert colours(images) == [(BLUE, RED)[label] for label in labels]
        assert labels.bincount().tolist() == [20, 20] and labels.diff().ne(0).sum() > 1


@pytest.mark.parametrize("files, message", [
    ("test/a", "no folder train/"), ("train/a", "no folder test/"), ("train/x/a test/a", "same class folders"),
    ("train/x/a train/y/a val/x/a", "same class folders.* y"), ("train/x/a train/a test/x/a", "beside them")])
def test_a_folder_that_is_no_dataset_is_refused(files, message):
    write_images("photos", files.split())
    with refused(message):
        load("photos")


def test_each_folder_is_read_once():
    """Links may lead to the same folder, in circles, above, or nowhere. A folder's own name counts, unless hidden."""
    write_images("pets", ["train/ant/a", "train/cat/b", "train/cat/old/d", "train/.store/e", "test/c"])
    for link, target in (("ant/up", "train"), ("ant/top", ""), ("ant/cat", "train/cat"), ("zebra", "train/cat"),
                         ("ant/old", "train/cat/old"), ("fox", "train/.store")):
        Path("pets/train", link).symlink_to(Path("pets", target).absolute())
    Path("pets/train/ant/b.png").symlink_to("nowhere.png")
    files = [file.as_posix() for file in module.find_images("pets/train")]
    assert files == [f"pets/train/{name}.png" for name in ("ant/a", "cat/b", "cat/old/d", "fox/e")]


def test_rare_suffixes_are_read_and_other_files_listed(tmp_path, capsys):
    for name in ("a.jfif", "b.JPE", "c.PNG", "d.gif", "e.gif", "._f.png"):  # the last is a copy that macOS hides
        Image.new("RGB", (8, 8)).save(name)
    Path("LICENSE").write_text("no image")
    assert [file.name for file in module.find_images(tmp_path)] == ["a.jfif", "b.JPE", "c.PNG"]
    printed = capsys.readouterr().out
    assert "files .gif: 2" in printed and "files without suffix: 1" in printed


def test_a_folder_is_decoded_once_and_again_when_it_changes(monkeypatch):
    write_images("photos", ["train/a", "test/a"])
    load("photos").train_images.zero_()  # in memory alone
    monkeypatch.setattr(module, "read_image", None)
    assert (load("photos").train_images[:, 0] == 200).all()
    os.utime("photos/train/a.png", (1, 1))
    with pytest.raises(TypeError, match="NoneType"):
        load("photos")


def test_files_that_are_lost_while_a_process_lives_are_named():
    write_images("photos", ["train/a", "test/a"])
    load("photos")
    os.remove("photos/train/a.png")
    with refused("photos has lost files.*a.png"):
        load_dataset("photos", 8)


# Broken files

@pytest.fixture
def pets():
    """A folder of 200 training and 2 test images, red cats and blue dogs. One training image is broken."""
    for name, colour in (("cat", RED), ("dog", BLUE)):
        write_images("pets", [f"train/{name}/{i}" for i in range(100)] + [f"test/{name}/0"], colour)
    Path("pets/train/cat/99.png").write_bytes(b"broken")  # the last of its class
    return Path("pets")


def test_broken_files_are_left_out_of_decoded_images_and_labels(pets, capsys):
    for _ in range(2):  # decoded, and read again
        data = load(pets)
        assert data.train_labels.bincount().tolist() == [99, 100]
        assert colours(data.train_images) == [(RED, BLUE)[label] for label in data.train_labels]
        assert "1 of 200 images cannot be read: pets/train/cat/99.png" in capsys.readouterr().out


def test_an_image_of_its_class_takes_a_broken_files_place(pets, monkeypatch, capsys):
    """Whoever reads them, this process or a worker, says what is broken."""
    monkeypatch.setattr(module, "cores", lambda: 1)
    files, labels = sorted(pets.glob("train/*/*.png")), torch.arange(200) // 100
    batch, = load_batches(ImageFiles(files, 8, labels), [(torch.arange(200), 8)], False, "cpu")
    for images in ((batch * 255).round(), ImageFiles(files, 8, labels)[:200]):
        assert colours(images) == [RED] * 100 + [BLUE] * 100
    assert capsys.readouterr().out.count("1 of 200 images cannot be read") == 2


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), OSError(24, "Too many files"), MemoryError()])
def test_an_error_of_the_system_does_not_make_an_image_broken(error, monkeypatch):
    """Only EINVAL does: a TIFF file may say that its pixels lie before its beginning."""
    Path("a.png").touch()
    images = ImageFiles(["a.png"] * 100, 8)
    monkeypatch.setattr(Image, "open", Mock(side_effect=error))
    with refused("'a.png' cannot be read: .*(Files must stay readable|memory is full)"):
        images.read(0)
    assert not images.broken.any()
    monkeypatch.setattr(Image, "open", Mock(side_effect=OSError(errno.EINVAL, "Invalid argument")))
    assert images.read(0) is None and images.broken.tolist() == [True] + [False] * 99


def test_a_disk_without_room_is_named_before_the_work(pets, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
    with refused("its disk has 1 left"):
        load(pets)


@pytest.mark.parametrize("broken", ["train/dog/[0-5].png", "train/*/*.png"])
def test_more_than_a_hundredth_of_broken_files_is_refused(broken, pets):
    for file in pets.glob(broken):
        file.write_bytes(b"broken")
    with refused("1 %.*The last error: .*cannot identify"):
        load(pets)
    assert not [*Path("data").glob("*.bin*")]  # what was decoded so far is not taken for the whole
    with refused("3 of 200 images"):
        ImageFiles([*pets.glob("train/*/*.png")], 8)[:200]


def test_ten_broken_files_at_most_are_named_once(capsys):
    images = ImageFiles([f"{i}.png" for i in range(5000)], 8)
    images.broken[:30] = True
    for _ in range(2):
        images.report()
    assert capsys.readouterr().out.count(".png") == 10


# Batches

def test_images_that_would_take_too_much_memory_stay_in_their_files(folder, change):
    """They come in the order of decoded ones, and whole where they are no larger than a crop."""
    decoded = load_dataset(str(folder), 32)
    change(module, DECODE_GB=(90 * 3 * 32**2 - 1) / 1e9, cores=lambda: 2)
    images, labels, *_ = load_dataset(str(folder), 32)
    assert isinstance(images, ImageFiles) and torch.equal(images[:7], decoded.train_images[:7])
    assert torch.equal(labels, decoded.train_labels)
    parts = torch.randperm(90).split(45)
    first, second = load_batches(images, [(parts[0], 32), (parts[1], 16)], False, "cpu")
    assert torch.equal(first, decoded.train_images[parts[0]] / 255) and second.shape == (45, 3, 16, 16)


def test_a_crop_is_resized_as_a_whole_image_is(monkeypatch):
    monkeypatch.setattr(RandomResizedCrop, "make_params", lambda *_: dict(top=0, left=0, height=40, width=40))
    Image.fromarray(random_pixels(40, 40, 3)).save("a.png")
    crop, = ImageFiles(["a.png"], 16).__getitems__([(0, 16)])
    assert torch.equal(crop, fit(read_image("a.png"), 16))


def test_crops_are_of_all_sizes_from_their_own_pixels_to_the_whole_image():
    """An image's red is x and its green is y, so that a crop shows how large it is."""
    y, x = np.mgrid[:64, :64].astype(np.uint8) * 4
    Image.fromarray(np.stack([x, y, 0 * x], 2)).save("a.png")
    crops = torch.stack(ImageFiles(["a.png"], 16).__getitems__([(0, 16)] * 400)) / 4
    width = (crops[:, 0, 8, -2] - crops[:, 0, 8, 1]) / 13
    height = (crops[:, 1, -2, 8] - crops[:, 1, 1, 8]) / 13
    area = width * height  # how many of the image's pixels make one of the crop: 1 to 16
    assert 0.8 < area.min() < 2 and 13 < area.max() < 16.5 and (width / height).log().abs().max() < 0.35


def test_half_of_a_batch_is_mirrored():
    images, index = torch.from_numpy(random_pixels(400, 3, 4, 6)), torch.arange(400).flip(0)
    plain, = load_batches(images, [(index, 6)], False, "cpu")
    mixed, = load_batches(images, [(index, 6)], True, "cpu")
    assert torch.equal(plain, images[index] / 255)
    same, mirrored = (mixed == plain).all((1, 2, 3)), (mixed == plain.flip(3)).all((1, 2, 3))
    assert (same | mirrored).all() and 150 < mirrored.sum() < 250  # within five standard deviations, of 10


def read_until_killed(images, pipe):
    """Read batches in two workers, each of which also gets this end of a pipe."""
    multiprocessing.set_start_method("forkserver", force=True)  # Python 3.14's default: these would live on
    module.cores, images.pipe = lambda: 2, pipe
    for _ in load_batches(images, [(torch.arange(4), 8)] * 5000, False, "cpu"):
        pipe.send("a batch")


@pytest.mark.skipif(sys.platform != "linux", reason="others do not fork")
def test_a_killed_run_leaves_no_workers(folder, monkeypatch):
    """The pipe ends when no process holds its other end."""
    monkeypatch.setattr("torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL", 0.1)  # they look for their parent
    receiver, sender = multiprocessing.Pipe(duplex=False)
    arguments = ImageFiles([*folder.rglob("*.png")], 8), sender
    run = multiprocessing.get_context("fork").Process(target=read_until_killed, args=arguments)
    run.start()
    sender.close()
    receiver.recv()
    run.kill()
    with pytest.raises(EOFError):
        while receiver.poll(20):
            receiver.recv()


@pytest.mark.parametrize("cpus, quota, count", [
    (8, None, 8), (8, "max 100000", 8), (8, "250000 100000", 3), (2, "400000 100000", 2)])
def test_only_the_cores_that_the_process_may_use_are_counted(cpus, quota, count, monkeypatch):
    """They are limited by affinity, and by a container's quota: microseconds in each period."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cpus)), raising=False)
    monkeypatch.setattr(module, "Path", lambda name: Path("cpu.max"))
    if quota:
        Path("cpu.max").write_text(quota)
    assert module.cores() == count


# CIFAR-10 and drawn shapes

@pytest.mark.parametrize("name", ["auto", "cifar10"])
def test_cifar_10_is_taken_from_torchvision(name, monkeypatch):
    pixels = random_pixels(5, 32, 32, 3)
    train = SimpleNamespace(data=pixels[:3], targets=[2, 0, 1], classes=["a", "b", "c"])
    test = SimpleNamespace(data=pixels[3:], targets=[1, 1])
    monkeypatch.setattr(module, "CIFAR10", lambda folder, is_train, download=False: train if is_train else test)
    data = load_dataset(name, 24)
    assert torch.equal(data.train_images[2], fit(to_tensor(pixels[2]), 24))
    assert torch.equal(data.test_images[0], fit(to_tensor(pixels[3]), 24))
    assert (data.train_labels.tolist(), data.test_labels.tolist()) == ([2, 0, 1], [1, 1])
    assert not Path("data").exists()  # a folder that is there may be read-only


def test_without_a_network_auto_alone_takes_drawn_images(monkeypatch, capsys):
    monkeypatch.setattr(module.CIFAR10, "url", "http://127.0.0.1:1/cifar")  # nobody listens there
    with pytest.raises(OSError, match="^CIFAR-10 is not in .*/ and cannot be downloaded: "):
        load_dataset("cifar10")
    assert socket.getdefaulttimeout() is None  # the user's sockets wait as before
    monkeypatch.setattr(module, "draw_shapes", lambda count, size: (torch.arange(count), -torch.arange(count)))
    data = load_dataset("auto")
    assert "cannot be downloaded" in capsys.readouterr().out
    assert torch.equal(torch.cat([data.train_images, data.test_images]), torch.arange(60_000))
    assert len(data.test_labels) == 10_000 and torch.equal(data.train_labels, -data.train_images)


def test_drawn_images_show_each_of_ten_shapes_as_often():
    images, labels = draw_shapes(500, 32)
    assert images.shape == (500, 3, 32, 32) and labels.bincount().tolist() == [50] * 10
    circles = images[labels == SHAPES.index("●")].float()  # bright on dark, or dark on bright
    inside = circles[:, :, 15, 15].mean(1)
    corner = circles[..., [0, 0, 31, 31], [0, 31, 0, 31]].mean((1, 2))
    assert ((inside > 127) == (inside > corner)).float().mean() > 0.85
