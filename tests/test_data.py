"""data.py: how an image is read, folders, broken files, batches, CIFAR-10 and drawn shapes."""
import multiprocessing
import os
import shutil
import socket
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import SEED, refused, write_images
from PIL import Image

import data as module
from data import SHAPES, ImageFiles, draw_shapes, fit, load_batches, load_dataset, load_image, read_image

RED, BLUE = [200, 0, 0], [0, 0, 200]


def random_pixels(*shape):
    return np.random.default_rng(SEED).integers(0, 256, shape, dtype=np.uint8)


def to_tensor(pixels):
    return torch.from_numpy(np.array(pixels)).movedim(-1, -3)


def colours(images):
    return images[:, :, 4, 4].tolist()  # in the middle of each image


@pytest.mark.parametrize("name", ["RGB.png", "L.jpg", "CMYK.jpg", "1.png", "P.png", "RGB.webp"])
def test_an_image_of_any_mode_and_format_is_read_in_rgb(name):
    Image.fromarray(random_pixels(7, 12, 3)).convert(name.split(".")[0]).save(name)
    assert torch.equal(load_image(name)[0], to_tensor(Image.open(name).convert("RGB")) / 255)


@pytest.mark.parametrize("kind", ["png", "tif"])
@pytest.mark.parametrize("orientation, turns", [(1, 0), (3, 2), (6, 1), (8, -1)])
def test_an_image_is_upright_as_its_exif_says(orientation, turns, kind):
    pixels, exif = random_pixels(7, 12, 3), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(np.rot90(pixels, turns))).save(f"a.{kind}", exif=exif)
    assert torch.equal(read_image(f"a.{kind}"), to_tensor(pixels))


def test_a_transparent_image_is_on_white():
    image = Image.new("RGBA", (4, 4), (100, 200, 0, 51))  # an alpha of 51 is a fifth
    image.save("a.png")
    image.convert("RGB").quantize(2).save("palette.png", transparency=bytes([51]))
    for name in ("a.png", "palette.png"):
        assert read_image(name)[:, 0, 0].tolist() == pytest.approx([224, 244, 204], abs=1)


@pytest.mark.parametrize("mode, kind, reason", [("L", "GIF", ""), ("F", "TIFF", "8 bits"), ("I;16", "PNG", "8 bits")])
def test_other_formats_and_more_bits_are_refused(mode, kind, reason):
    """A format is known by its content: of EPS, Pillow would run the code."""
    Image.new(mode, (8, 8)).save("a.png", kind)
    with refused(f"^image 'a.png' cannot be read: .*{reason}"):
        read_image("a.png")


@pytest.mark.parametrize("height, width, rounding", [(40, 90, 1), (90, 40, 1), (20, 20, 1), (10, 14, 1), (8, 400, 2)])
def test_an_image_is_resized_as_pillow_does_and_cropped_at_its_centre(height, width, rounding):
    image = Image.fromarray(random_pixels(6, 6, 3)).resize((width, height), Image.Resampling.BICUBIC)
    w, h = width * 20 // min(height, width), height * 20 // min(height, width)
    expected = image.resize((w, h), Image.BICUBIC).crop(((w - 20) // 2, (h - 20) // 2, (w + 20) // 2, (h + 20) // 2))
    assert (fit(to_tensor(image), 20).int() - to_tensor(expected).int()).abs().max() <= rounding
    assert fit(torch.zeros(3, 1, 30_000).byte(), 256).shape == (3, 256, 256)  # resized whole, it would take 6 GB


def test_labels_are_those_of_the_class_folders_in_alphabetical_order(monkeypatch):
    monkeypatch.setenv("HOME", os.getcwd())
    for name, colour in (("dog", RED), ("café", BLUE)):
        write_images("pets", [f"{split}/{name}/{i}" for split in ("train", "val") for i in range(20)], colour)
    data = load_dataset("~/pets", 8)
    assert data.classes == ["café", "dog"] and os.path.samefile(data.name, "pets")
    for images, labels in (data[:2], data[2:4]):
        assert colours(images) == [(BLUE, RED)[label] for label in labels]
        assert sum(labels) == 20 and labels.diff().ne(0).sum() > 1  # in random order


@pytest.mark.parametrize("files, message", [
    ("test/a", "no folder photos/train.*auto"), ("train/a", "no folder photos/val"),
    ("train/x/a train/y/a val/x/a", "has the class folders y"), ("train/x/a train/a test/x/a", "beside its")])
def test_a_folder_that_is_no_dataset_is_refused(files, message):
    write_images("photos", files.split())
    with refused(message):
        load_dataset("photos", 8)


def test_images_are_found_once_and_other_files_are_counted_in_one_line(capsys):
    """Links may lead to one folder twice, in circles, above, or nowhere. macOS makes ._e.png."""
    write_images("pets", ["train/ant/a", "train/cat/b", "train/cat/old/d", "train/.store/e", "train/._e", "test/c"])
    for link, target in (("ant/up", "train"), ("ant/top", ""), ("ant/cat", "train/cat"), ("zebra", "train/cat"),
                         ("fox", "train/.store"), ("ant/b.png", "nowhere.png")):
        Path("pets/train", link).symlink_to(Path("pets", target).absolute())
    os.mkfifo("pets/train/ant/pipe.png")  # whoever opens it waits for a writer
    for name in ("a.jfif", "a.JPE", "a.PNG", "a.gif", "b.gif", "c.gif", *(f"a.jpg?id={i}" for i in range(300))):
        Path("pets/train", name).touch()
    files = [file.relative_to("pets/train").as_posix() for file in module.find_images("pets/train")]
    assert files == ["a.JPE", "a.PNG", "a.jfif", "ant/a.png", "cat/b.png", "cat/old/d.png", "fox/e.png"]
    printed = capsys.readouterr().out
    assert "305 files" in printed and "'.gif': 3" in printed and printed.count("\n") == 1 and len(printed) < 400


def test_a_folder_is_decoded_once_and_again_when_it_changes(monkeypatch):
    """Nothing else in data/ is changed or deleted. A full disk is noticed before the work."""
    write_images("photos", ["train/a", "test/a"])
    with monkeypatch.context() as patch, refused("its disk has 1 left"):
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
        load_dataset("photos", 8)
    Path("data/mine.tmp").touch()
    load_dataset("photos", 8)
    monkeypatch.setattr(module, "digest_file", str)  # other code decodes anew
    data = load_dataset("photos", 8)
    assert sorted(file.suffix for file in Path("data").iterdir()) == [".bin"] * 4 + [".tmp"]
    assert data.train_labels is data.test_labels is None and data.train_images.zero_().ndim == 4  # in memory alone
    monkeypatch.setattr(module, "read_image", None)
    assert (load_dataset("photos", 8).train_images[:, 0] == 200).all()
    os.utime("photos/train/a.png", (1, 1))
    with pytest.raises(TypeError, match="NoneType"):
        load_dataset("photos", 8)


@pytest.mark.parametrize("crop_sizes", [(), (8,)])
def test_the_digest_is_of_images_and_labels(crop_sizes):
    """A copy keeps it. Where training images give crops, their names and sizes count, else their pixels."""
    def changed(action, *files):
        shutil.copytree("pets", "copy/pets", copy_function=shutil.copyfile, dirs_exist_ok=True)  # with new times
        action(*(f"copy/pets/{file}.bmp" for file in files))
        return len({load_dataset(folder, 8, crop_sizes).digest for folder in ("copy/pets", "pets")}) == 2
    for number, name in enumerate(("train/cat/0", "train/cat/1", "train/dog/0", "test/cat/0", "test/dog/0")):
        Path("pets", name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(f"pets/{name}.bmp")  # all BMP files have the same size
    assert not changed(str, "train") and changed(shutil.copyfile, "train/cat/1", "test/cat/0")
    assert changed(shutil.copyfile, "train/cat/1", "train/cat/0") == (not crop_sizes)
    assert changed(os.replace, "train/cat/1", "train/dog/+")  # the same pixels, other labels


def test_an_image_of_its_class_takes_a_broken_files_place(monkeypatch):
    monkeypatch.setattr(module, "CORES", 1)
    for name, colour in (("cat", RED), ("dog", BLUE)):
        write_images("pets", [f"train/{name}/{i}" for i in range(100)] + [f"test/{name}/0"], colour)
    Path("pets/train/cat/99.png").write_bytes(b"broken")  # the last of its class
    with pytest.warns(UserWarning, match="pets/train/cat/99.png' cannot be read: .*identify"):
        images, labels, *_ = load_dataset("pets", 8)
    assert labels.bincount().tolist() == [100, 100] and colours(images) == [(RED, BLUE)[label] for label in labels]
    files = ImageFiles(sorted(Path("pets").glob("train/*/*.png")), 8, torch.arange(200) // 100)
    with pytest.warns(UserWarning, match="99.png"):
        crops = torch.stack(files.__getitems__([(i, 8, SEED) for i in range(200)]))
        batch, = load_batches(files, [(torch.arange(200), 8, SEED)], False, "cpu")  # a worker warns by itself
    assert colours(crops) == colours((batch * 255).round()) == [RED] * 100 + [BLUE] * 100
    for broken, message in (("[01]", "3 of 200 images"), ("*", "cannot be read")):
        for file in Path("pets").glob(f"train/dog/{broken}.png"):
            file.write_bytes(b"broken")
        with pytest.warns(UserWarning, match="cannot be read"), refused(message):
            load_dataset("pets", 8)
    assert len([*Path("data").iterdir()]) == 2  # what was decoded last is not taken for the whole


def test_large_sets_and_those_for_crops_of_several_sizes_stay_in_their_files(folder, change):
    decoded = load_dataset(str(folder), 32)
    change(module, DECODE_GB=(90 * 3 * 32**2 - 1) / 1e9, CORES=2)
    images, labels, *_ = load_dataset(str(folder), 32)
    assert isinstance(images, ImageFiles) and torch.equal(images[:7], decoded.train_images[:7])
    assert torch.equal(labels, decoded.train_labels)
    parts = torch.randperm(90).split(45)
    first, second = load_batches(images, [(parts[0], 40, 0), (parts[1], 16, 0)], False, "cpu")
    assert torch.equal(first, fit(decoded.train_images[parts[0]], 40) / 255)  # they are no larger, so not cropped
    assert second.shape == (45, 3, 16, 16)
    data = load_dataset(str(folder), 32, crop_sizes=(16, 24))
    assert isinstance(data.train_images, ImageFiles) and data.test_images.shape == (38, 3, 24, 24)
    with refused("CROP_SIZES.*shapes"):
        load_dataset("shapes", 32, crop_sizes=(16, 24))


def test_crops_are_of_all_sizes_from_their_own_pixels_to_the_whole_image():
    y, x = np.mgrid[:64, :64].astype(np.uint8) * 4  # red is x, green is y
    Image.fromarray(np.stack([x, y, 0 * x], 2)).save("a.png")
    files = ImageFiles(["a.png"], 16, [0])
    crops = torch.stack(files.__getitems__([(0, 16, 400 * SEED + i) for i in range(400)])) / 4
    width = (crops[:, 0, 8, -2] - crops[:, 0, 8, 1]) / 13
    height = (crops[:, 1, -2, 8] - crops[:, 1, 1, 8]) / 13
    area = width * height  # how many of the image's pixels make one of the crop: 1 to 16
    assert 0.8 < area.min() < 2 and 13 < area.max() < 16.5 and (width / height).log().abs().max() < 0.35


def test_crops_depend_on_image_and_seed_but_not_on_the_number_of_workers(folder, change):
    files = ImageFiles([next(folder.rglob("*.png"))] * 4, 8, torch.zeros(4))  # the same image four times
    batches = [(torch.tensor(index), 8, seed) for index, seed in (([0, 1], 1), ([2, 3], 1), ([1, 1], 1), ([0, 1], 2))]
    change(module, CORES=1)
    one = [*load_batches(files, batches, False, "cpu")]
    change(module, CORES=2)
    assert all(map(torch.equal, one, load_batches(files, batches, False, "cpu")))
    assert torch.equal(one[2][0], one[0][1]) and torch.equal(one[2][1], one[0][1])
    assert not torch.equal(one[3][0], one[0][0]) and not torch.equal(one[0][0], one[0][1])


def test_workers_live_as_long_as_the_iterator(folder, change):
    """`batches` may be endless. No worker has a list of files. Their start draws no random numbers of a step's."""
    change(module, CORES=2)
    files, taken, workers, random = ImageFiles(sorted(folder.rglob("*.png")), 8, torch.zeros(128)), [], [], []
    batches = (taken.append(seed) or (torch.arange(4), 8, seed) for seed in count())
    iterator = load_batches(files, batches, True, "cpu")
    for _ in range(6):
        torch.manual_seed(SEED)
        next(iterator)
        random.append(torch.rand(1).item())
        workers.append({process.pid for process in multiprocessing.active_children()})
    assert len(taken) <= 12 and len(workers[0]) == 2 and len({*map(frozenset, workers)}) == len({*random}) == 1
    iterator.close()
    assert not multiprocessing.active_children() and not {list, np.ndarray} & {*map(type, vars(files).values())}
    change(module, DataLoader=(loader := Mock(return_value=[])))
    assert not [*load_batches(files, [], False, "cuda")] and loader.call_args.kwargs["pin_memory"]
    assert loader.call_args.kwargs["multiprocessing_context"] == ("fork" if module.sys.platform == "linux" else None)


def test_half_of_a_batch_is_mirrored():
    images, index = torch.from_numpy(random_pixels(400, 3, 4, 6)), torch.arange(400).flip(0)
    plain, mixed = (next(load_batches(images, [(index, 6, 0)], flip, "cpu")) for flip in (False, True))
    assert torch.equal(plain, images[index] / 255)
    same, mirrored = (mixed == plain).all((1, 2, 3)), (mixed == plain.flip(3)).all((1, 2, 3))
    assert (same | mirrored).all() and 150 < mirrored.sum() < 250  # within five standard deviations, of 10


@pytest.mark.parametrize("name, size, parts", [("auto", 24, [140, 2] * 2), ("cifar10", 40, [100, 40, 2])])
def test_cifar_10_is_taken_from_torchvision(name, size, parts, monkeypatch):
    """Above 32 pixels a side, images are resized once, a part at a time, into a file."""
    pixels, resized = random_pixels(142, 32, 32, 3), []
    train = SimpleNamespace(data=pixels[:140], targets=[2, 0] * 70, classes=["a"])
    test = SimpleNamespace(data=pixels[140:], targets=[1, 1])
    monkeypatch.setattr(module, "CIFAR10", lambda folder, is_train, download: train if is_train else test)
    monkeypatch.setattr(module, "fit", lambda images, size: resized.append(len(images)) or fit(images, size))
    for _ in range(2):
        data = load_dataset(name, size)
        assert torch.equal(torch.cat([data.train_images, data.test_images])[::7], fit(to_tensor(pixels)[::7], size))
        assert data[1].tolist() == [2, 0] * 70 and data[3].tolist() == [1, 1] and data[4:] == (["a"], "cifar10", "")
    assert resized == parts and Path("data").exists() == (size > 32)


def test_without_a_network_auto_alone_takes_drawn_images(monkeypatch, capsys):
    monkeypatch.setattr(module.CIFAR10, "url", "http://127.0.0.1:1/cifar")  # nobody listens there
    with pytest.raises(OSError, match="^CIFAR-10 is not in .*/ and cannot be downloaded: "):
        load_dataset("cifar10")
    assert socket.getdefaulttimeout() is None and not [*Path("data").iterdir()]  # no lock stays, nor a timeout
    monkeypatch.setattr(module, "draw_shapes", lambda count, size: (torch.arange(count), -torch.arange(count)))
    data = load_dataset("auto")
    assert "cannot be downloaded" in capsys.readouterr().out and data.name == "shapes"
    assert torch.equal(torch.cat([data.train_images, -data.test_labels]), torch.arange(60_000))


def test_drawn_images_show_each_of_ten_shapes_as_often(monkeypatch):
    images, labels = draw_shapes(500, 32)
    assert images.shape == (500, 3, 32, 32) and labels.bincount().tolist() == [50] * 10
    circles = images[labels == SHAPES.index("●")].float()  # bright on dark, or dark on bright
    inside = circles[:, :, 15, 15].mean(1)
    corner = circles[..., [0, 0, 31, 31], [0, 31, 0, 31]].mean((1, 2))
    assert ((inside > 127) == (inside > corner)).float().mean() > 0.85
    large, labels = draw_shapes(120, 40)  # those above 32 pixels a side are drawn once, into a file
    monkeypatch.setattr(module, "draw_batch", None)
    assert large.shape == (120, 3, 40, 40) and all(map(torch.equal, draw_shapes(120, 40), (large, labels)))
