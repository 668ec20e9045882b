"""data.py: how an image is read, folders, broken files, batches, CIFAR-10 and drawn shapes."""
import multiprocessing
import os
import shutil
import socket
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SEED, refused, write_images
from PIL import Image
from torchvision.transforms.v2 import RandomResizedCrop

import data as module
from data import SHAPES, ImageFiles, draw_shapes, fit, load_batches, load_dataset, load_image, read_image

RED, BLUE = [200, 0, 0], [0, 0, 200]


def random_pixels(*shape):
    return np.random.default_rng(SEED).integers(0, 256, shape, dtype=np.uint8)


def to_tensor(pixels):
    """(..., H, W, 3) -> (..., 3, H, W)."""
    return torch.from_numpy(np.array(pixels)).movedim(-1, -3)


def colours(images):
    """The colour in the middle of each image."""
    return images[:, :, 4, 4].tolist()


@pytest.fixture
def files(folder):
    """The small folder's images, in their files."""
    files = sorted(folder.rglob("*.png"))
    return ImageFiles(files, 8, torch.zeros(len(files)))


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


@pytest.mark.parametrize("mode, kind, reason", [("L", "GIF", ""), ("F", "TIFF", "8 bits"), ("I;16", "PNG", "8 bits")])
def test_other_formats_and_more_bits_are_refused(mode, kind, reason):
    """A format is known by its content: of EPS, Pillow would run the code."""
    Image.new(mode, (8, 8)).save("a.png", kind)
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
    with torch.profiler.profile(profile_memory=True) as profile:
        assert fit(torch.zeros(3, 1, 3000, dtype=torch.uint8), 256).shape == (3, 256, 256)
    assert max(event.cpu_memory_usage for event in profile.events()) < 10**7


# Folders

def test_labels_are_those_of_the_class_folders_in_alphabetical_order(tmp_path, monkeypatch):
    """Images are in random order, and may lie in val/ and in "~"."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, colour in (("dog", RED), ("café", BLUE)):
        write_images("pets", [f"{split}/{name}/{i}" for split in ("train", "val") for i in range(20)], colour)
    data = load_dataset("~/pets", 8)
    assert data.classes == ["café", "dog"] and data.name == str(tmp_path / "pets")
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        assert colours(images) == [(BLUE, RED)[label] for label in labels]
        assert labels.bincount().tolist() == [20, 20] and labels.diff().ne(0).sum() > 1


@pytest.mark.parametrize("files, message", [
    ("test/a", "no folder photos/train.*auto"), ("train/a", "no folder photos/val"),
    ("train/x/a train/y/a val/x/a", "same class folders.* y"), ("train/x/a train/a test/x/a", "beside them")])
def test_a_folder_that_is_no_dataset_is_refused(files, message):
    write_images("photos", files.split())
    with refused(message):
        load_dataset("photos", 8)


def test_each_folder_is_read_once_and_pipes_are_not():
    """Links may lead to the same folder, in circles, above, or nowhere."""
    write_images("pets", ["train/ant/a", "train/cat/b", "train/cat/old/d", "train/.store/e", "test/c"])
    for link, target in (("ant/up", "train"), ("ant/top", ""), ("ant/cat", "train/cat"), ("zebra", "train/cat"),
                         ("fox", "train/.store")):
        Path("pets/train", link).symlink_to(Path("pets", target).absolute())
    Path("pets/train/ant/b.png").symlink_to("nowhere.png")
    os.mkfifo("pets/train/ant/pipe.png")  # whoever opens it waits for a writer
    files = [file.as_posix() for file in module.find_images("pets/train")]
    assert files == [f"pets/train/{name}.png" for name in ("ant/a", "cat/b", "cat/old/d", "fox/e")]


def test_rare_suffixes_are_read_and_others_counted_in_one_line(tmp_path, capsys):
    for name in ("a.jfif", "b.JPE", "c.PNG", "d.gif", "e.gif", "._f.png"):  # the last is a copy that macOS hides
        Image.new("RGB", (8, 8)).save(name)
    for i in range(300):
        Path(f"photo.jpg?id={i}").touch()
    assert [file.name for file in module.find_images(tmp_path)] == ["a.jfif", "b.JPE", "c.PNG"]
    printed = capsys.readouterr().out
    assert "302 files" in printed and "'.gif': 2" in printed and printed.count("\n") == 1 and len(printed) < 400


def test_a_folder_is_decoded_once_and_again_when_it_changes(monkeypatch):
    """Nothing else in data/ is locked, changed or deleted: it is the user's."""
    write_images("photos", ["train/a", "test/a"])
    write_images("data", ["mine.tmp"])
    data = load_dataset("photos", 8)
    data.train_images.zero_()  # in memory alone
    assert data.train_labels is data.test_labels is None
    assert sorted(file.suffix for file in Path("data").iterdir()) == [".bin", ".bin", ".png"]
    monkeypatch.setattr(module, "read_image", None)
    assert (load_dataset("photos", 8).train_images[:, 0] == 200).all()
    os.utime("photos/train/a.png", (1, 1))
    with pytest.raises(TypeError, match="NoneType"):
        load_dataset("photos", 8)


@pytest.mark.parametrize("crop_sizes", [(), (8,)])
def test_the_digest_is_of_images_and_labels(crop_sizes):
    """A copy keeps it. Where training images give crops, their names and sizes count, else their pixels."""
    def changed(action, *files):
        """Whether it changes what a copy of the folder says."""
        shutil.copytree("pets", "copy/pets", copy_function=shutil.copyfile)  # this changes their times
        action(*(f"copy/pets/{file}.bmp" for file in files))
        new = load_dataset("copy/pets", 8, crop_sizes).digest
        shutil.rmtree("copy")
        return new != load_dataset("pets", 8, crop_sizes).digest

    for number, name in enumerate(("train/cat/0", "train/cat/1", "train/dog/0", "test/cat/0", "test/dog/0")):
        Path("pets", name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(f"pets/{name}.bmp")  # BMP: all files have the same size
    assert not changed(lambda: None)
    assert changed(os.replace, "train/cat/1", "train/dog/1") and changed(os.remove, "train/cat/1")
    assert changed(shutil.copyfile, "train/cat/1", "test/cat/0")
    assert changed(shutil.copyfile, "train/cat/1", "train/cat/0") == (not crop_sizes)


# Broken files

@pytest.fixture
def pets():
    """A folder of 200 training and 2 test images, red cats and blue dogs. One training image is broken."""
    for name, colour in (("cat", RED), ("dog", BLUE)):
        write_images("pets", [f"train/{name}/{i}" for i in range(100)] + [f"test/{name}/0"], colour)
    Path("pets/train/cat/99.png").write_bytes(b"broken")  # the last of its class
    return Path("pets")


def test_an_image_of_its_class_takes_a_broken_files_place(pets, monkeypatch):
    """While decoding and in crops. A warning names the file."""
    monkeypatch.setattr(module, "CORES", 1)
    with pytest.warns(UserWarning, match="pets/train/cat/99.png' cannot be read: .*identify"):
        data = load_dataset("pets", 8)
    assert data.train_labels.bincount().tolist() == [100, 100]
    assert colours(data.train_images) == [(RED, BLUE)[label] for label in data.train_labels]
    files = ImageFiles(sorted(pets.glob("train/*/*.png")), 8, torch.arange(200) // 100)
    with pytest.warns(UserWarning, match="99.png"):
        crops = torch.stack(files.__getitems__([(i, 8, SEED) for i in range(200)]))
        batch, = load_batches(files, [(torch.arange(200), 8, SEED)], False, "cpu")  # a worker warns by itself
    assert colours(crops) == colours((batch * 255).round()) == [RED] * 100 + [BLUE] * 100


def test_it_is_the_next_one_that_can_be_read():
    for name, colour in (("b", RED), ("c", BLUE)):
        Image.new("RGB", (8, 8), tuple(colour)).save(f"{name}.png")
    Path("a.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="a.png"):
        for labels, expected in (([0, 0, 0], RED), ([0, 1, 0], BLUE)):
            assert ImageFiles(["a.png", "b.png", "c.png"], 8, labels).read(0)[:, 0, 0].tolist() == expected
        with refused("a.png.* cannot be read"):
            ImageFiles(["a.png", "b.png", "c.png"], 8, [0, 1, 1]).read(0)


@pytest.mark.filterwarnings("ignore:.*cannot be read")
@pytest.mark.parametrize("broken", ["train/dog/[0-1].png", "train/*/*.png"])
def test_more_than_a_hundredth_of_broken_files_is_refused(broken, pets):
    for file in pets.glob(broken):
        file.write_bytes(b"broken")
    with refused("cannot be read|3 of 200 images"):
        load_dataset("pets", 8)
    assert not [*Path("data").glob("*")]  # what was decoded so far is not taken for the whole


def test_a_disk_without_room_is_named_before_the_work(pets, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
    with refused("its disk has 1 left"):
        load_dataset("pets", 8)


# Batches

def test_images_that_would_take_too_much_memory_stay_in_their_files(folder, change):
    """They come in the order of decoded ones, and whole where they are no larger than a crop."""
    decoded = load_dataset(str(folder), 32)
    change(module, DECODE_GB=(90 * 3 * 32**2 - 1) / 1e9, CORES=2)
    images, labels, *_ = load_dataset(str(folder), 32)
    assert isinstance(images, ImageFiles) and torch.equal(images[:7], decoded.train_images[:7])
    assert torch.equal(labels, decoded.train_labels)
    parts = torch.randperm(90).split(45)
    first, second = load_batches(images, [(parts[0], 32, 0), (parts[1], 16, 0)], False, "cpu")
    assert torch.equal(first, decoded.train_images[parts[0]] / 255) and second.shape == (45, 3, 16, 16)


def test_crop_sizes_make_crops_and_test_images_of_the_largest_size(folder):
    data = load_dataset(str(folder), 32, crop_sizes=(16, 24))
    assert isinstance(data.train_images, ImageFiles) and data.test_images.shape == (38, 3, 24, 24)
    with refused("CROP_SIZES.*shapes"):
        load_dataset("shapes", 32, crop_sizes=(16, 24))


def test_a_crop_is_resized_as_a_whole_image_is(monkeypatch):
    monkeypatch.setattr(RandomResizedCrop, "make_params", lambda *_: dict(top=0, left=0, height=40, width=40))
    Image.fromarray(random_pixels(40, 40, 3)).save("a.png")
    crop, = ImageFiles(["a.png"], 16, [0]).__getitems__([(0, 16, SEED)])
    assert torch.equal(crop, fit(read_image("a.png"), 16))


def test_crops_are_of_all_sizes_from_their_own_pixels_to_the_whole_image():
    """An image's red is x and its green is y, so that a crop shows how large it is."""
    y, x = np.mgrid[:64, :64].astype(np.uint8) * 4
    Image.fromarray(np.stack([x, y, 0 * x], 2)).save("a.png")
    crops = ImageFiles(["a.png"], 16, [0]).__getitems__([(0, 16, 400 * SEED + i) for i in range(400)])
    crops = torch.stack(crops) / 4
    width = (crops[:, 0, 8, -2] - crops[:, 0, 8, 1]) / 13
    height = (crops[:, 1, -2, 8] - crops[:, 1, 1, 8]) / 13
    area = width * height  # how many of the image's pixels make one of the crop: 1 to 16
    assert 0.8 < area.min() < 2 and 13 < area.max() < 16.5 and (width / height).log().abs().max() < 0.35


def test_crops_depend_on_image_and_seed_but_not_on_the_number_of_workers(files, change):
    batches = [(torch.tensor(index), 8, seed) for index, seed in (([0, 1], 1), ([2, 3], 1), ([1, 1], 1), ([0, 1], 2))]
    change(module, CORES=1)
    one = [*load_batches(files, batches, False, "cpu")]
    change(module, CORES=2)
    assert all(map(torch.equal, one, load_batches(files, batches, False, "cpu")))
    assert torch.equal(one[2][0], one[0][1]) and torch.equal(one[2][1], one[0][1])
    assert not torch.equal(one[3][0], one[0][0]) and not torch.equal(one[0][0], one[0][1])


def test_workers_live_as_long_as_the_iterator(files, change):
    """`batches` may be endless. No worker has a list of files. Their start draws no random numbers of a step's."""
    change(module, CORES=2)
    taken, workers, random = [], [], []
    batches = (taken.append(seed) or (torch.arange(4), 8, seed) for seed in count())
    iterator = load_batches(files, batches, True, "cpu")
    for _ in range(6):
        torch.manual_seed(SEED)
        next(iterator)
        random.append(torch.rand(1).item())
        workers.append({process.pid for process in multiprocessing.active_children()})
    assert len(taken) <= 12 and len(workers[0]) == 2 and len({*map(frozenset, workers)}) == len({*random}) == 1
    iterator.close()
    assert not multiprocessing.active_children()
    assert not [value for value in vars(files).values() if isinstance(value, list | np.ndarray)]


def test_on_a_gpu_workers_batches_are_pinned_and_copied_without_waiting(files, monkeypatch):
    calls, image = [], torch.zeros(1, 3, 8, 8)
    batch = SimpleNamespace(to=lambda device, non_blocking: calls.append((device, non_blocking)) or image)
    monkeypatch.setattr(module, "DataLoader", lambda *_, pin_memory, **options: calls.append(pin_memory) or [batch])
    for device in ("cuda", "cpu"):
        next(load_batches(files, [], False, device))
    assert calls == [True, ("cuda", True), False, ("cpu", True)]


def test_half_of_a_batch_is_mirrored():
    images, index = torch.from_numpy(random_pixels(400, 3, 4, 6)), torch.arange(400).flip(0)
    plain, = load_batches(images, [(index, 6, 0)], False, "cpu")
    mixed, = load_batches(images, [(index, 6, 0)], True, "cpu")
    assert torch.equal(plain, images[index] / 255)
    same, mirrored = (mixed == plain).all((1, 2, 3)), (mixed == plain.flip(3)).all((1, 2, 3))
    assert (same | mirrored).all() and 150 < mirrored.sum() < 250  # within five standard deviations, of 10


def read_until_killed(images, pipe):
    """Read batches in two workers, each of which also gets this end of a pipe."""
    multiprocessing.set_start_method("forkserver", force=True)  # Python 3.14's default: these would live on
    module.CORES, images.pipe = 2, pipe
    for _ in load_batches(images, ((torch.arange(4), 8, seed) for seed in count()), False, "cpu"):
        pipe.send("a batch")


@pytest.mark.skipif(sys.platform != "linux", reason="others do not fork")
def test_a_killed_run_leaves_no_workers(files, monkeypatch):
    """The pipe ends when no process holds its other end."""
    monkeypatch.setattr("torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL", 0.1)  # they look for their parent
    receiver, sender = multiprocessing.Pipe(duplex=False)
    run = multiprocessing.get_context("fork").Process(target=read_until_killed, args=(files, sender))
    run.start()
    sender.close()
    receiver.recv()
    run.kill()
    with pytest.raises(EOFError):
        while receiver.poll(20):
            receiver.recv()


# CIFAR-10 and drawn shapes

@pytest.mark.parametrize("name, size, parts", [("auto", 24, [140, 2] * 2), ("cifar10", 40, [100, 40, 2])])
def test_cifar_10_is_taken_from_torchvision(name, size, parts, monkeypatch):
    """Above 32 pixels a side, images are resized once, a part at a time, into a file. data/ may be read-only else."""
    pixels, resized = random_pixels(142, 32, 32, 3), []
    train = SimpleNamespace(data=pixels[:140], targets=[2, 0] * 70, classes=["a", "b", "c"])
    test = SimpleNamespace(data=pixels[140:], targets=[1, 1])
    monkeypatch.setattr(module, "CIFAR10", lambda folder, is_train, download: train if is_train else test)
    monkeypatch.setattr(module, "fit", lambda images, size: resized.append(len(images)) or fit(images, size))
    for _ in range(2):
        data = load_dataset(name, size)
        assert torch.equal(torch.cat([data.train_images, data.test_images])[::7], fit(to_tensor(pixels)[::7], size))
        assert (data.train_labels.tolist(), data.test_labels.tolist()) == ([2, 0] * 70, [1, 1])
        assert data[4:] == (["a", "b", "c"], "cifar10", "")
    assert resized == parts and Path("data").exists() == (size > 32)


def test_without_a_network_auto_alone_takes_drawn_images(monkeypatch, capsys):
    monkeypatch.setattr(module.CIFAR10, "url", "http://127.0.0.1:1/cifar")  # nobody listens there
    with pytest.raises(OSError, match="^CIFAR-10 is not in .*/ and cannot be downloaded: "):
        load_dataset("cifar10")
    assert socket.getdefaulttimeout() is None  # the user's sockets wait as before
    assert not [*Path("data").glob("*lock*")]  # another download may go on beside
    monkeypatch.setattr(module, "draw_shapes", lambda count, size: (torch.arange(count), -torch.arange(count)))
    data = load_dataset("auto")
    assert "cannot be downloaded" in capsys.readouterr().out and data.name == "shapes"
    assert torch.equal(torch.cat([data.train_images, data.test_images]), torch.arange(60_000))
    assert len(data.test_labels) == 10_000 and torch.equal(data.train_labels, -data.train_images)


def test_drawn_images_show_each_of_ten_shapes_as_often():
    images, labels = draw_shapes(500, 32)
    assert images.shape == (500, 3, 32, 32) and labels.bincount().tolist() == [50] * 10
    circles = images[labels == SHAPES.index("●")].float()  # bright on dark, or dark on bright
    inside = circles[:, :, 15, 15].mean(1)
    corner = circles[..., [0, 0, 31, 31], [0, 31, 0, 31]].mean((1, 2))
    assert ((inside > 127) == (inside > corner)).float().mean() > 0.85


def test_large_drawn_images_are_drawn_once(monkeypatch):
    first, labels = draw_shapes(120, 40)
    monkeypatch.setattr(module, "draw_batch", None)
    again, same = draw_shapes(120, 40)
    assert first.shape == (120, 3, 40, 40) and torch.equal(first, again) and torch.equal(labels, same)
