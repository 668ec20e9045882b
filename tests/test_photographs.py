"""photographs.py, on two small images of different sizes."""
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import photographs
from models import VQRAE
from utils import draw_shapes, load_checkpoint, load_image, save_checkpoint, save_torch


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(photographs, "PHOTOS", None)
        monkeypatch.setattr(photographs, "COUNT", None)
        monkeypatch.setattr(photographs, "SEARCH", 0)
        monkeypatch.setattr(sys, "argv", ["photographs.py", *map(str, arguments)])
        photographs.main()

    (tmp_path / "photos").mkdir()
    for name, (height, width) in {"a": (45, 70), "b": (64, 33)}.items():
        image = draw_shapes(70, train=1, test=1).train_images[0, :, :height, :width]
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "photos" / f"{name}.png")
    save_checkpoint(tmp_path / "a.pt", VQRAE(quantizer_options={"levels": [8, 6, 5]}, decoder_width=64,
                                             decoder_depth=1).eval())
    return run


def test_photographs(run, tmp_path, capsys):
    Image.new("RGB", (5, 50)).save(tmp_path / "photos" / "0 narrow.png")
    Image.new("RGB", (16500, 12)).save(tmp_path / "photos" / "wide.png")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"")
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "a.pt", tmp_path / "other" / "b.pt")  # its name in the table is its path
    run(f"PHOTOS={tmp_path / 'photos'}", tmp_path / "a.pt", tmp_path / "other" / "b.pt")
    printed = capsys.readouterr()
    for name in ("0 narrow.png", "wide.png", "broken.jpg"):
        assert f"{name}'" in printed.out + printed.err
    assert "\n2 photographs of" in f"\n{printed.out}" and not list((tmp_path / "other").glob("*.png"))
    rows = dict(re.findall(r"^\| (.+?) +\| +([\d. |]+)\|$", printed.out, re.M))
    bits, psnr, _ = map(float, rows["cifar fsq, stage 1"].split("|"))
    model, expected = load_checkpoint(tmp_path / "a.pt"), []
    for file in (tmp_path / "photos").glob("?.png"):
        image = load_image(file)
        with torch.no_grad():
            error = (model(image)[0] - image).square().mean().item()
        height, width = image.shape[2:]
        tokens = math.ceil(height / 4) * math.ceil(width / 4)
        expected.append((tokens * math.log2(240) / (height * width), -10 * math.log10(error)))
    assert (bits, psnr) == pytest.approx(tuple(np.mean(expected, 0)), abs=0.006)
    assert {"JPEG", "WebP", "AVIF"} <= rows.keys()

    run(f"PHOTOS={tmp_path / 'photos'}", tmp_path / "a.pt", "SEARCH=2")
    printed = capsys.readouterr().out
    searched, = re.findall(r"^\| cifar fsq, stage 1 +\| +[\d.]+ +\| +([\d.]+) ", printed, re.M)
    assert float(searched) > psnr and "tokens from search.py, 2 sweeps" in printed
    assert Image.open("outputs/photographs/JPEG.png").size in ((140, 45), (66, 64))


def test_names_that_are_longer_than_a_files(run, tmp_path):
    for name, differs in (("a", "x"), ("b", "\u56fe" * 100), ("c", "\u56fe" * 101)):  # three bytes each
        save_checkpoint(tmp_path / f"{name}.pt", load_checkpoint(tmp_path / "a.pt"), constants={"DATASET": differs})
    run(f"PHOTOS={tmp_path / 'photos'}", "COUNT=1", *(tmp_path / f"{name}.pt" for name in "abc"))
    assert len(list(Path("outputs", "photographs").glob("cifar fsq*.png"))) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError, MemoryError, OSError])
def test_what_was_measured_before_it_was_stopped_is_printed(error, run, tmp_path, monkeypatch, capsys):
    encode, encoded = photographs.encode_montage, []

    def stop(images, codec, quality):
        encoded.append(codec)
        if codec == "JPEG" and "WebP" in encoded:  # the second photograph's
            raise error
        return encode(images, codec, quality)

    monkeypatch.setattr(photographs, "encode_montage", stop)
    with pytest.raises(SystemExit, match="^1$"):
        run(f"PHOTOS={tmp_path / 'photos'}", tmp_path / "a.pt")
    printed = capsys.readouterr()
    assert "stopped before" in printed.err and "b.png" in printed.err
    assert "\n1 photographs of" in f"\n{printed.out}" and "| AVIF" in printed.out


def test_stopped_before_the_first(run, tmp_path, monkeypatch, capsys):
    def stop(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(photographs, "load_image", stop)
    with pytest.raises(SystemExit, match="^1$"):
        run(f"PHOTOS={tmp_path / 'photos'}", tmp_path / "a.pt")
    assert "stopped before" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["PHOTOS=nowhere", "COUNT=0", "SEARCH=-1", "PHOTOS=outputs"])
def test_what_is_no_photographs(run, wrong, tmp_path):
    (tmp_path / "outputs").mkdir()
    with pytest.raises(SystemExit, match=rf"^photographs.py: {wrong.split('=')[0]} = [^\n]*$"):
        run(f"PHOTOS={tmp_path / 'photos'}", wrong, tmp_path / "a.pt")
    with pytest.raises(SystemExit, match=r"^photographs.py: checkpoint [^\n]*$"):
        run(f"PHOTOS={tmp_path / 'photos'}", "b.pt")
    save_torch(tmp_path / "last.pt", {"stage": 1, "epoch": 1})  # what a run resumes from
    with pytest.raises(SystemExit, match=r"^photographs.py: checkpoint .*last.pt.*has not all of config[^\n]*$"):
        run(f"PHOTOS={tmp_path / 'photos'}", tmp_path / "last.pt")
    with pytest.raises(SystemExit, match=r"^photographs.py: .*COUNTS[^\n]*$"):
        run(f"PHOTOS={tmp_path / 'photos'}", "COUNTS=3")
