"""data.py: CIFAR-10, drawn shapes, folders of images, image files and batches."""
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image, ImageCms, features

import data as module
from data import CIFAR10, SHAPES, ImageFiles, draw_shapes, fit, load_batches, load_dataset, read_image, to_float
from utils import save_grid, save_torch

RED, GREEN, BLUE = [200, 0, 0], [0, 200, 0], [0, 0, 200]


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
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def to_tensor(pixels):
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


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
    read, decoded, digests = read_image, [], []
    monkeypatch.setattr(module, "read_image", lambda file: decoded.append(file) or read(file))

    def count(folder, size=8):  # how many images are decoded
        decoded.clear()
        images = load(folder, size).train_images
        digests.append(module.find_dataset(folder)[1])
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


def test_nothing_has_a_draft_open_or_mapped_when_it_is_renamed(tmp_path, monkeypatch):
    """Windows renames no such file. The drafts of a process that was killed are removed."""
    path, replace, seen = write_images(tmp_path / "photos", dict.fromkeys(("train/a", "test/a"), RED)), os.replace, []

    def check_replace(old, new):
        held = [str(link.resolve()) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        assert str(Path(old).resolve()) not in held and str(old) not in Path("/proc/self/maps").read_text()
        seen.append(Path(new).suffix)
        replace(old, new)

    monkeypatch.setattr(os, "replace", check_replace)
    Path("data").mkdir(), Path("data/photos_train_8_0.npy.1.tmp").write_bytes(b"half")
    load(path)
    save_torch("a.pt", {}), save_grid("a.png", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 1)
    assert seen == [".npy", ".npy", ".pt", ".png"] and {file.suffix for file in Path("data").iterdir()} == {".npy"}


def test_a_disk_that_fills_is_an_error_of_one_line_and_leaves_nothing_behind(tmp_path):
    path = write_images(tmp_path / "photos", {f"{split}/{i}": RED for split in ("train", "test") for i in range(9)})
    code = """import resource, signal, sys; from data import load_dataset
signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try: load_dataset(sys.argv[1], 8)
except OSError as error: print(error)"""
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert re.fullmatch("data/photos_train_8_.*npy could not be written: .*too large.*\n", done.stdout), done.stderr
    assert not [*Path("data").iterdir()]


def test_workers_start_as_on_windows_and_macos_too(folder, monkeypatch):
    monkeypatch.setattr(module, "cores", lambda: 1), monkeypatch.setattr(module, "DECODE_GB", 0)
    images, batches = load(folder, 32).train_images, [(torch.arange(4), 16)]
    monkeypatch.setattr(sys, "platform", "darwin"), monkeypatch.setattr(sys.modules["__main__"], "__file__", "")
    default = multiprocessing.get_start_method()
    try:
        multiprocessing.set_start_method("spawn", force=True)
        assert [batch.shape for batch in load_batches(images, batches, False, "cpu")] == [(4, 3, 16, 16)]
    finally:
        multiprocessing.set_start_method(default, force=True)


def test_only_the_cores_that_the_process_may_use_are_counted():
    code = "import os; from data import cores; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(cores())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"


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
    (streamed, labels, test, *_), index, loaded = load(folder, 32), torch.randperm(90), []
    assert isinstance(streamed, ImageFiles) and len(streamed) == 90 and torch.equal(streamed[:7], data[0][:7])
    assert torch.equal(labels, data.train_labels) and torch.equal(test, data.test_images)
    batches = list(zip(index.split(40), (32, 16, 24)))
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        loaded.append(list(load_batches(streamed, batches, False, "cpu")))
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
    Path(file).unlink()
    with refused("^DATASET = .*files that stay"):  # of a drive that is gone, not one by one
        images[1, 8]


def test_batches_of_which_half_are_mirrored():
    images, index = torch.from_numpy(random_pixels(400, 3, 4, 6)), torch.arange(400).flip(0)
    plain, mixed = (next(load_batches(images, [(index, 6)], flip, "cpu")) for flip in (False, True))
    assert torch.equal(plain, images.flip(0) / 255) and torch.equal(to_float(plain.double()), plain)
    same, mirrored = (mixed == plain).all((1, 2, 3)), (mixed == plain.flip(3)).all((1, 2, 3))
    assert (same | mirrored).all() and 150 < mirrored.sum() < 250
    with refused("range of images"):  # no uint8, and not in [0, 1]
        to_float(images.float())


def test_an_image_is_read_as_a_viewer_shows_it():
    """Upright as in its EXIF, in 8-bit RGB from any mode and format, on white where it is transparent."""
    pixels, exif = random_pixels(7, 12, 3), Image.Exif()
    for exif[0x0112], stored in enumerate((
            pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1], pixels.transpose(1, 0, 2), np.rot90(pixels),
            pixels[::-1, ::-1].transpose(1, 0, 2), np.rot90(pixels, -1)), 1):
        Image.fromarray(np.ascontiguousarray(stored)).save("a.png", exif=exif)
        assert torch.equal(read_image("a.png"), to_tensor(pixels))
    assert torch.equal(module.load_image("a.png"), to_tensor(pixels)[None] / 255)
    for mode, kind in zip(("RGB", "L", "CMYK", "1", "P", "CMYK", "RGB"), "jpg jpg jpg png png tif webp".split()):
        Image.fromarray(pixels).convert(mode).save(f"a.{kind}")
        assert torch.equal(read_image(f"a.{kind}"), to_tensor(Image.open(f"a.{kind}").convert("RGB")))
    for alpha, expected in ((0, (255, 255, 255)), (51, (224, 244, 204)), (255, (100, 200, 0))):
        image = Image.new("RGBA", (4, 4), (100, 200, 0, alpha))
        image.save("a.png"), image.convert("RGB").quantize(2).save("palette.png", transparency=bytes([alpha]))
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
    assert "profile is ignored" in capsys.readouterr().out
    image.convert("RGBA").save("b.png", icc_profile=swapped)
    assert np.abs(np.subtract(read_image("b.png")[:, 0, 0].tolist(), [30, 200, 60])).max() <= 2


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_a_format_like_the_others(tmp_path):
    Image.new("RGB", (8, 8), tuple(RED)).save(tmp_path / "a.avif", quality=100)
    assert module.find_images(tmp_path) and abs(read_image(tmp_path / "a.avif")[0, 0, 0] - 200) < 4


def test_a_file_that_is_no_image_of_8_bits(monkeypatch):
    """Another format is refused whatever its name; Pillow would run a program for EPS."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: pytest.fail("a program was run"))
    Path("eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    Image.new("L", (8, 8)).save("gif.png", "GIF"), Image.new("F", (8, 8)).save("float.tif")
    Image.new("I;16", (8, 8)).save("deep.png"), Path("empty.png").write_bytes(b"")
    for name in ("eps.png", "gif.png", "deep.png", "float.tif", "empty.png", "missing.png"):
        with refused(f"^image '{name}' cannot be read: {'.*8 bits' if name in ('deep.png', 'float.tif') else '.'}"):
            module.load_image(name)


@pytest.mark.parametrize("height, width", [(40, 90), (90, 40), (20, 20), (10, 14)])
def test_an_image_is_resized_and_cropped_at_its_centre(height, width):
    image = Image.fromarray(random_pixels(6, 6, 3)).resize((width, height), Image.Resampling.BICUBIC)
    w, h = (side * 20 // min(height, width) for side in (width, height))
    centre = (w - 20) // 2, (h - 20) // 2, (w + 20) // 2, (h + 20) // 2
    expected = image.resize((w, h), Image.Resampling.BICUBIC).crop(centre)  # Pillow smooths before it leaves pixels out
    fitted = fit(to_tensor(image).expand(2, 3, height, width), 20)
    assert fitted.dtype == torch.uint8 and torch.equal(fit(to_tensor(image), 20), fitted[0])
    assert (fitted.int() - to_tensor(expected).int()).abs().max() <= 1
