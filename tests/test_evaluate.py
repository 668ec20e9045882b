"""evaluate.py on small checkpoints and images."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

import evaluate
from models import VQRAE, build_encoder
from utils import draw_shapes, load_checkpoint, psnr, save_checkpoint, to_float


@pytest.fixture
def shipped(tmp_path, monkeypatch, folder):
    """evaluate.py's command line, with checkpoints/pretrained elsewhere and the network out of reach."""
    monkeypatch.setattr(evaluate, "PRETRAINED_DIR", tmp_path / "pretrained")
    monkeypatch.setattr(evaluate, "RECORD", tmp_path / "pretrained" / "results.json")
    monkeypatch.setattr("utils.reachable", lambda url: False)
    monkeypatch.setattr(evaluate, "inception_at_hand", lambda: False)
    monkeypatch.setattr(evaluate, "SHIP", False)
    monkeypatch.setattr(evaluate, "DATASET", "cifar10")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", f"DATASET={folder}", *map(str, arguments)])
        evaluate.main()

    return run


def small_checkpoint(path, **facts):
    torch.manual_seed(0)
    model = VQRAE("cifar", "fsq", {"levels": [8, 6, 5]}, decoder_width=64, decoder_depth=1, decoder_heads=2)
    save_checkpoint(path, model.eval(), metrics={"images_per_second": 123.0}, **facts)


def test_shipped_figures_are_printed_again_and_compared(shipped, tmp_path, capsys):
    small_checkpoint(tmp_path / "run" / "fsq_stage1_best.pt")
    shipped(tmp_path / "run" / "fsq_stage1_best.pt", "SHIP=True")
    half, record = tmp_path / "pretrained" / "vqrae_fsq.pt", tmp_path / "pretrained" / "results.json"
    assert half.stat().st_size < 0.6 * (tmp_path / "run" / "fsq_stage1_best.pt").stat().st_size
    first = capsys.readouterr().out
    evaluate.SHIP = False
    shipped()
    second = capsys.readouterr().out
    assert second.startswith(first.rstrip("\n")) and "vqrae_fsq: as recorded" in second

    figures = json.loads(record.read_text())["figures"]["vqrae_fsq"]
    data = evaluate.load_dataset(str(evaluate.DATASET), 32)
    model, images = load_checkpoint(half), to_float(data.test_images)
    with torch.no_grad():
        indices = model.encode_to_indices(images)
        assert figures["psnr"] == pytest.approx(psnr(model.decode_from_indices(indices), images).mean().item(), abs=1e-3)
        assert figures["usage"] == pytest.approx(len(indices.unique()) / 240)
    assert figures["tokens"] == 64 and figures["bits"] == pytest.approx(64 * np.log2(240)) and figures["images_per_second"] == 123
    assert 0 < figures["probe_z"] <= 1 and 0 < figures["probe_z_q"] <= 1 and 0 < figures["probe_predicted"] <= 1
    assert "| -    " in second and "LPIPS" in second  # not to be had, and so not given

    tampered = json.loads(record.read_text())
    tampered["figures"]["vqrae_fsq"]["psnr"] += 0.02
    record.write_text(json.dumps(tampered))
    with pytest.raises(SystemExit):
        shipped()
    assert "psnr is" in capsys.readouterr().out
    tampered["images"]["test"] = "0" * 12
    record.write_text(json.dumps(tampered))
    shipped()
    assert "of other images" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"quantizer": "none"}, {"encoder": "scratch"}])
def test_baselines_have_dashes_where_there_is_nothing_to_measure(options, shipped, tmp_path, capsys):
    model = VQRAE(**options, decoder_width=64, decoder_depth=1, decoder_heads=2)
    save_checkpoint(tmp_path / "baseline.pt", model.eval())
    shipped(tmp_path / "baseline.pt")
    images, tokens = [line.split("|") for line in capsys.readouterr().out.splitlines() if ", stage 1" in line]
    if "quantizer" in options:  # bits, use and perplexity of no codes
        assert all(cell.strip() == "-" for cell in tokens[3:8]) and "%" in tokens[8]
    else:  # no pretrained features to predict
        assert tokens[10].strip() == "-" and "%" in tokens[9]


def test_fewer_training_images_and_the_curve(shipped, tmp_path, capsys, monkeypatch):
    for weight in (0.0, 0.5):
        small_checkpoint(tmp_path / f"{weight}.pt", constants={"PREDICT_WEIGHT": weight})
    monkeypatch.setattr(evaluate, "TRAIN_IMAGES", None)
    monkeypatch.setattr(evaluate, "CURVE", None)
    drawn = []
    monkeypatch.setattr(evaluate, "save_figure", lambda path, figure: drawn.append((path, figure)))
    save_checkpoint(tmp_path / "scratch.pt", VQRAE("scratch", decoder_width=64, decoder_depth=1, decoder_heads=2).eval(), constants={"PREDICT_WEIGHT": 0.1})
    shipped(tmp_path / "0.0.pt", tmp_path / "scratch.pt", tmp_path / "0.5.pt", "TRAIN_IMAGES=20", f"CURVE={tmp_path}/curve.png")
    printed = capsys.readouterr().out
    assert ": 20 training images" in printed
    for name in ("cifar fsq, stage 1 ", "scratch fsq, stage 1 ", "cifar fsq, stage 1, PREDICT_WEIGHT=0.5 "):
        assert printed.count(f"| {name}") == 2
    (path, figure), = drawn
    assert path == tmp_path / "curve.png" and [text.get_text() for text in figure.axes[0].texts] == ["0", "0.5"]
    encoder, line = figure.axes[1].lines
    assert line.get_label() == "fsq" and len(line.get_xdata()) == 1  # the predictor of weight 0 was never trained
    assert len(figure.axes[0].lines[1].get_xdata()) == 2 and encoder.get_ydata()[0] >= 0.4
    shipped(tmp_path / "scratch.pt")
    assert "no curve" in capsys.readouterr().out and len(drawn) == 1
    with pytest.raises(SystemExit, match="evaluate.py: CURVE"):
        shipped(tmp_path / "0.0.pt", "CURVE=3")
    with pytest.raises(SystemExit, match="evaluate.py: SHIP"):
        shipped(tmp_path / "0.0.pt", "SHIP=True", "TRAIN_IMAGES=20")
    with pytest.raises(SystemExit, match="evaluate.py: SHIP"):
        shipped(tmp_path / "0.0.pt", "SHIP=false")
    with pytest.raises(SystemExit, match="evaluate.py: DATASET = 2024"):
        shipped(tmp_path / "0.0.pt", "DATASET=2024", "SHIP=False", "TRAIN_IMAGES=None")
    with pytest.raises(SystemExit, match="evaluate.py: checkpoints .*one of each quantizer"):
        shipped(tmp_path / "0.0.pt", tmp_path / "0.5.pt", "SHIP=True", "TRAIN_IMAGES=None")
    save_checkpoint(tmp_path / "large.pt", VQRAE(image_size=64, grid=16, decoder_width=64, decoder_depth=1).eval())
    with pytest.raises(SystemExit, match="evaluate.py: checkpoints .*images of one size"):
        shipped(tmp_path / "0.0.pt", tmp_path / "large.pt", "SHIP=False", "CURVE=None")


def test_frechet_distance_is_its_formula():
    judge = build_encoder("cifar", 8).eval()
    images = draw_shapes(32, train=300, test=300).train_images
    others = (images.float() * 0.8).round().byte()
    found = evaluate.distances(images, others, judge)
    with torch.no_grad():
        a, b = (judge(to_float(x)).mean((2, 3)).double().numpy() for x in (images, others))
        expected = ((judge(to_float(images)) - judge(to_float(others))) ** 2).mean().item()
    # |mu_a - mu_b|^2 + trace(A + B - 2 (A B)^(1/2)), the trace of the root being the sum of the roots of AB's eigenvalues
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    frechet = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    assert found["frechet"] == pytest.approx(frechet, rel=1e-3) and found["frechet"] > 0.1
    assert found["feature_distance"] == pytest.approx(expected, rel=1e-4)
    assert evaluate.distances(images, images, judge)["frechet"] == pytest.approx(0, abs=1e-3)


def test_rfid_whose_download_breaks_off_is_left_out(monkeypatch, capsys):
    def either(feature):
        return FrechetInceptionDistance(feature) if isinstance(feature, torch.nn.Module) else (_ for _ in ()).throw(OSError("connection reset"))

    monkeypatch.setattr("utils.reachable", lambda url: False)
    monkeypatch.setattr(evaluate, "inception_at_hand", lambda: True)
    monkeypatch.setattr(evaluate, "FrechetInceptionDistance", either)
    images = draw_shapes(32, train=4, test=4).train_images
    found = evaluate.distances(images, images, build_encoder("cifar", 8).eval())
    assert "frechet" in found and "rfid" not in found and "no rFID: connection reset" in capsys.readouterr().out


def test_a_wrong_checkpoint_is_one_line(shipped, tmp_path):
    Path(tmp_path / "text.pt").write_text("hello")
    for path in ("nowhere.pt", tmp_path / "text.pt"):
        with pytest.raises(SystemExit, match="evaluate.py: checkpoint"):
            shipped(path)
