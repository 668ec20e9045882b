"""evaluate.py on small checkpoints and images."""
import hashlib
import json
import runpy
import subprocess
import sys
from importlib.machinery import ModuleSpec
from io import BytesIO
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from models import VQRAE, build_encoder
from prior import build_prior, measure_bits
from utils import draw_shapes, load_checkpoint, psnr, save_checkpoint, save_torch, to_float

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def shipped(tmp_path, monkeypatch, folder):
    """evaluate.py's command line, with checkpoints/pretrained elsewhere and the network out of reach."""
    monkeypatch.setattr(evaluate, "PRETRAINED_DIR", tmp_path / "pretrained")
    monkeypatch.setattr(evaluate, "RECORDS", tmp_path / "pretrained" / "results.json")
    monkeypatch.setattr("utils.reachable", lambda url: False)
    monkeypatch.setattr(evaluate, "reachable", lambda url: False)
    for name, value in {"SHIP": False, "DATASET": "cifar10", "TRAIN_IMAGES": None, "CODECS": None,
                        "PRIOR": None, "DEPTHS": None, "SEARCH": 0, "IMAGE_WEIGHT": 0.0, "BATCH_SIZE": 250}.items():
        monkeypatch.setattr(evaluate, name, value)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", f"DATASET={folder}", *map(str, arguments)])
        evaluate.main()

    return run


def small_checkpoint(path, levels=(8, 6, 5), **metadata):
    torch.manual_seed(0)
    model = VQRAE("cifar", "fsq", {"levels": levels}, decoder_width=64, decoder_depth=1, decoder_heads=2)
    save_checkpoint(path, model.eval(), metrics={"images_per_second": 123.0}, **metadata)


def test_residual_scales_ship_exactly(shipped, tmp_path):  # in 8 bits finer levels would lie beside their grid
    model = VQRAE("cifar", "fsq", {"levels": (8, 6, 5), "codebooks": 2}, decoder_width=64, decoder_depth=1)
    save_checkpoint(tmp_path / "model.pt", model.eval(), metrics={"dataset": "shapes"})
    copy = load_checkpoint(evaluate.ship(tmp_path / "model.pt"))
    assert torch.equal(copy.quantizer.scales, model.quantizer.scales)


def test_shipped_figures_are_printed_again_and_compared(shipped, tmp_path, capsys, monkeypatch):
    half, records = tmp_path / "pretrained" / "vqrae_fsq.pt", tmp_path / "pretrained" / "results.json"
    other = {"vqrae_simvq": {"images": {"training": "0" * 12, "test": "0" * 12}, "figures": {"psnr": 27.0}}}
    records.parent.mkdir()
    records.write_text(json.dumps(other))
    small_checkpoint(tmp_path / "run" / "fsq_stage1_best.pt")
    shipped(tmp_path / "run" / "fsq_stage1_best.pt", "SHIP=True")
    assert half.stat().st_size < 0.35 * (tmp_path / "run" / "fsq_stage1_best.pt").stat().st_size
    first = capsys.readouterr().out
    written = json.loads(records.read_text())
    assert {name: written[name] for name in other} == other  # shipped on other images, and kept
    evaluate.SHIP = False
    shipped()
    second = capsys.readouterr().out
    assert second.startswith(first.rstrip("\n")) and "vqrae_fsq: as recorded" in second

    figures = written["vqrae_fsq"]["figures"]
    data = evaluate.load_dataset(str(evaluate.DATASET), 32)
    model, images = load_checkpoint(half), to_float(data.test_images)
    with torch.no_grad():
        indices = model.encode_to_indices(images)
        reconstructions = model.decode_from_indices(indices)
    assert figures["psnr"] == pytest.approx(psnr(reconstructions, images).mean().item(), abs=1e-3)
    assert figures["usage"] == pytest.approx(len(indices.unique()) / 240)
    assert figures["tokens"] == 64 and figures["bits"] == pytest.approx(64 * np.log2(240))
    assert figures["images_per_second"] == 123
    assert 0 < figures["probe_z"] <= 1 and 0 < figures["probe_z_q"] <= 1 and 0 < figures["probe_predicted"] <= 1
    assert "| -    " in second and "LPIPS" in second  # not to be had, and so not given

    written["vqrae_fsq"]["figures"]["frechet"] -= 5
    records.write_text(json.dumps(written))
    with pytest.raises(SystemExit, match="1"):
        shipped()
    assert "vqrae_fsq: frechet is" in capsys.readouterr().out
    records.write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="1"):
        shipped()
    assert "vqrae_fsq: not compared, it has no record" in capsys.readouterr().out
    written["vqrae_fsq"]["images"]["test"] = "0" * 12
    records.write_text(json.dumps(written))
    shipped()
    assert "of other images" in capsys.readouterr().out
    measure, searched = evaluate.measure, []
    monkeypatch.setattr(evaluate, "measure", lambda *args: searched.append(measure(*args)) or searched[-1])
    shipped("SEARCH=2")
    printed = capsys.readouterr().out
    assert "of tokens from search.py, 2 sweeps" in printed and "vqrae_fsq:" not in printed
    assert searched[0][0]["psnr"] > figures["psnr"] and not torch.equal(searched[0][2], indices)
    shipped("SEARCH=2", "IMAGE_WEIGHT=100")
    assert "2 sweeps with IMAGE_WEIGHT = 100" in capsys.readouterr().out
    with_weight = evaluate.search_dataset(model, data.test_images, 2, image_weight=100)
    assert torch.equal(searched[1][2], with_weight) and not torch.equal(with_weight, searched[0][2])
    for wrong in ("SEARCH=0", "IMAGE_WEIGHT=-1"):
        with pytest.raises(SystemExit, match="evaluate.py: IMAGE_WEIGHT = "):
            shipped(wrong)


@pytest.mark.parametrize("name", ["vqrae_ema_vq", "vqrae_fsq", "vqrae_simvq"])
def test_every_recorded_figure_is_compared(name, capsys):
    records = json.loads((ROOT / "checkpoints" / "pretrained" / "results.json").read_text())
    recorded, images = records[name]["figures"], records[name]["images"]

    def verdict(**changed):
        same = evaluate.compare(name, recorded | changed, records, images)
        return same, capsys.readouterr().out.removeprefix(f"{name}: ").rstrip("\n")

    assert verdict() == (True, "as recorded")
    assert verdict(psnr=recorded["psnr"] - 0.009, perplexity=recorded["perplexity"] * 1.0009) == (True, "as recorded")
    for key, was in recorded.items():
        for value in ("ddcl",) if isinstance(was, str) else (1.01 * was + 0.02, 0.99 * was - 0.02, float("nan")):
            assert verdict(**{key: value}) == (False, f"{key} is {value} and was {was}")
        others = {k: v for k, v in recorded.items() if k != key}
        assert not evaluate.compare(name, others, records, images) and f"{key} is nan" in capsys.readouterr().out

    figures = dict(recorded)
    recorded["lpips"] = 0.1
    assert verdict(lpips=0.102) == (False, "lpips is 0.102 and was 0.1")
    assert evaluate.compare(name, figures, records, images)
    assert capsys.readouterr().out == f"{name}: as recorded, lpips not compared\n"


def test_figures_are_measured_without_tf32():
    code = "import torch, evaluate; print(torch.backends.cudnn.allow_tf32)"  # True would round convolutions to 10 bits
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT) == "False\n"


def test_names_of_checkpoints_that_differ_in_constants_or_in_none():
    def save(name, quantizer, **constants):
        config = {"encoder": "cifar", "quantizer": quantizer}
        save_torch(Path(name), {"config": config, "stage": 1, "model": {}, "constants": constants})

    save("a.pt", "fsq", SEED=0, PREDICT_WEIGHT=0.1)
    save("b.pt", "fsq", SEED=1, PREDICT_WEIGHT=0.2)
    save("c.pt", "fsq", SEED=1, PREDICT_WEIGHT=0.2)
    save("d.pt", "simvq", SEED=0)
    save("e.pt", "simvq", SEED=0)
    names = evaluate.name_checkpoints([Path(name) for name in ("a.pt", "b.pt", "c.pt", "d.pt", "e.pt")])
    assert list(names) == ["cifar fsq, stage 1", "cifar fsq, stage 1, SEED=1, PREDICT_WEIGHT=0.2", "c.pt",
                           "cifar simvq, stage 1", "e.pt"]


SEVERAL = {"quantizer": "ema_vq", "quantizer_options": {"codebooks": 2, "codebook_size": 16, "code_dim": 8}}


@pytest.mark.parametrize("options", [{"quantizer": "none"}, {"encoder": "scratch"} | SEVERAL])
def test_baselines_have_dashes_where_there_is_nothing_to_measure(options, shipped, tmp_path, capsys):
    model = VQRAE(**options, decoder_width=64, decoder_depth=1, decoder_heads=2)
    save_checkpoint(tmp_path / "baseline.pt", model.eval())
    shipped(tmp_path / "baseline.pt")
    printed = capsys.readouterr().out
    images, tokens = [line.split("|") for line in printed.splitlines() if ", stage 1" in line]
    if options["quantizer"] == "none":  # bits, use and perplexity of no codes
        assert all(cell.strip() == "-" for cell in tokens[3:8]) and "%" in tokens[8]
    else:  # no pretrained features to predict
        assert tokens[10].strip() == "-" and "%" in tokens[9]
        assert "| perplexity 1, test | perplexity 2, test |" in printed
        assert all(1 <= int(cell) <= 16 for cell in tokens[-3:-1]) and tokens[3].strip() == "512"  # 64 tokens of 8 bits


def test_fewer_training_images_and_bad_constants(shipped, tmp_path, capsys):
    for weight in (0.0, 0.5):
        small_checkpoint(tmp_path / f"{weight}.pt", constants={"PREDICT_WEIGHT": weight})
    scratch = VQRAE("scratch", decoder_width=64, decoder_depth=1, decoder_heads=2).eval()
    save_checkpoint(tmp_path / "scratch.pt", scratch, constants={"PREDICT_WEIGHT": 0.1})
    shipped(*[tmp_path / name for name in ("0.0.pt", "scratch.pt", "0.5.pt")], "TRAIN_IMAGES=20")
    printed = capsys.readouterr().out
    assert ": 20 training images" in printed
    for name in ("cifar fsq, stage 1 ", "scratch fsq, stage 1 ", "cifar fsq, stage 1, PREDICT_WEIGHT=0.5 "):
        assert printed.count(f"| {name}") == 2
    for path in (True, 3, tmp_path, "codecs.pdf"):  # a .pdf would hold a PNG
        with pytest.raises(SystemExit, match="evaluate.py: CODECS"):
            shipped(tmp_path / "0.0.pt", f"CODECS={path}")
    with pytest.raises(SystemExit, match="evaluate.py: DEPTHS"):
        shipped(tmp_path / "0.0.pt", f"DEPTHS={tmp_path}", "CODECS=None")
    with pytest.raises(SystemExit, match="evaluate.py: BATCH_SIZE = True"):
        shipped(tmp_path / "0.0.pt", "BATCH_SIZE=True", "DEPTHS=None")
    with pytest.raises(SystemExit, match="evaluate.py: SHIP"):
        shipped(tmp_path / "0.0.pt", "SHIP=True", "TRAIN_IMAGES=20", "BATCH_SIZE=250")
    with pytest.raises(SystemExit, match="evaluate.py: SHIP = True, allowed: .*PRIOR = None"):
        shipped(tmp_path / "0.0.pt", "SHIP=True", "TRAIN_IMAGES=None", "CODECS=codecs.png", "PRIOR=prior.pt")
    with pytest.raises(SystemExit, match="evaluate.py: SHIP"):
        shipped(tmp_path / "0.0.pt", "SHIP=false")
    with pytest.raises(SystemExit, match="evaluate.py: TRAIN_IMAGES = 1"):  # a probe needs a standard deviation
        shipped(tmp_path / "0.0.pt", "SHIP=False", "TRAIN_IMAGES=1", "CODECS=None", "PRIOR=None")
    with pytest.raises(SystemExit, match="evaluate.py: DATASET = 2024"):
        shipped(tmp_path / "0.0.pt", "DATASET=2024", "SHIP=False", "TRAIN_IMAGES=None")
    with pytest.raises(SystemExit, match="evaluate.py: checkpoints .*one of each quantizer"):
        shipped(tmp_path / "0.0.pt", tmp_path / "0.5.pt", "SHIP=True", "TRAIN_IMAGES=None")
    save_checkpoint(tmp_path / "large.pt", VQRAE(image_size=64, grid=16, decoder_width=64, decoder_depth=1).eval())
    with pytest.raises(SystemExit, match="evaluate.py: checkpoints .*images of one size"):
        shipped(tmp_path / "0.0.pt", tmp_path / "large.pt", "SHIP=False")


def test_frechet_distance_is_its_formula():
    reference_encoder = build_encoder("cifar", 4).eval()
    images = draw_shapes(32, train=300, test=300).train_images
    others = (images.float() * 0.8).round().byte()
    figures = evaluate.measure_distances(images, others, {"encoder": reference_encoder})
    with torch.no_grad():
        z = [reference_encoder(to_float(x)) for x in (images, others)]
        expected = ((z[0] - z[1]) ** 2).mean().item()
    a, b = (features.mean((2, 3)).double().numpy() for features in z)
    # |mu_a - mu_b|^2 + trace(A + B - 2 (A B)^(1/2)); the trace of the root is the sum of the roots of AB's eigenvalues
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    frechet = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    assert figures["frechet"] == pytest.approx(frechet, rel=1e-3) and figures["frechet"] > 0.1
    assert figures["feature_distance"] == pytest.approx(expected, rel=1e-4)
    same = evaluate.measure_distances(images, images, {"encoder": reference_encoder})
    assert same["frechet"] == pytest.approx(0, abs=1e-3)


def test_rfid_whose_download_breaks_off_is_left_out(monkeypatch, capsys):
    def break_off(feature):
        raise OSError("connection reset")

    modules = {name: ModuleType(name) for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3")}
    for name, module in modules.items():
        module.__spec__, module.URL_INCEPTION_V3 = ModuleSpec(name, None), "https://inception"
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("utils.reachable", lambda url: False)
    monkeypatch.setattr(evaluate, "reachable", lambda url: True)
    monkeypatch.setattr(evaluate, "FrechetInceptionDistance", break_off)
    assert evaluate.load_networks(32).keys() == {"encoder"}
    printed = capsys.readouterr().out
    assert "no rFID: connection reset\nno LPIPS: " in printed and printed.count("\n") == 2


def test_codecs_and_pictures_that_are_not_to_be_had(monkeypatch, capsys):
    Image.init()
    monkeypatch.delitem(Image.SAVE, "AVIF", raising=False)
    assert evaluate.available_codecs() == ["JPEG", "WebP"] and "no AVIF" in capsys.readouterr().out
    monkeypatch.setattr(evaluate, "CODEC_OPTIONS", {})
    images = torch.zeros(16, 3, 12, 5000, dtype=torch.uint8)  # four side by side are more than the widest WebP
    data = evaluate.Dataset("wide", images, None, images, None, [], 5000)
    evaluate.compare_codecs(Path("codecs.png"), data, {"a": images}, {"a": 100.0})
    assert "9 test images of wide" in capsys.readouterr().out


def test_damaged_records_are_named(shipped, tmp_path):
    small_checkpoint(tmp_path / "a.pt")
    evaluate.RECORDS.parent.mkdir()
    evaluate.RECORDS.write_text('{"vqrae_fsq": ')
    with pytest.raises(SystemExit, match="^evaluate.py: .*results.json cannot be read: Expecting value"):
        shipped(tmp_path / "a.pt")


@pytest.mark.parametrize("quality", [50, 100])
def test_codecs_encode_noise(quality):  # Pillow's own room for a JPEG is too small for it
    noise = torch.randint(256, (1, 3, 600, 600), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    bits, decoded = evaluate.encode_montage(noise, "JPEG", quality)
    assert bits > 2 * 600 * 600 and decoded.shape == noise.shape


def test_codecs_get_one_picture_at_the_tokens_bits(shipped, folder, tmp_path, capsys, monkeypatch):
    small_checkpoint(tmp_path / "small.pt", (8, 8, 8, 5))  # more than each codec's smallest file
    bits = 64 * np.log2(2560)
    drawn = []
    monkeypatch.setattr(evaluate, "save_figure", lambda path, figure: drawn.append(figure))
    shipped(tmp_path / "small.pt", "CODECS=codecs.png")
    tables = capsys.readouterr().out
    rows = {cells[1].strip(): [float(cell.replace(",", "")) for cell in cells[2:5]]
            for cells in (line.split("|") for line in tables[tables.index("| images from"):].splitlines()[2:6])}
    assert "\n36 test images of folder-tiny; codecs" in tables

    images = evaluate.load_dataset(str(folder), 32).test_images[:36].permute(0, 2, 3, 1).numpy()
    montage = Image.new("RGB", (192, 192))
    for i, image in enumerate(images):
        montage.paste(Image.fromarray(image), (i % 6 * 32, i // 6 * 32))

    def encode(codec, quality):
        file = BytesIO()
        montage.save(file, codec, quality=quality, **evaluate.CODEC_OPTIONS[codec])
        picture = np.asarray(Image.open(file).convert("RGB"), float)
        decoded = np.stack([picture[i // 6 * 32 :][:32, i % 6 * 32 :][:, :32] for i in range(36)])
        errors = ((decoded - images) ** 2).mean((1, 2, 3)) / 255**2
        return 8 * len(file.getvalue()) / 36, (-10 * np.log10(errors)).mean()

    sizes = {quality: encode("JPEG", quality)[0] for quality in range(1, 101)}
    assert f"JPEG, quality {min(sizes, key=lambda quality: abs(sizes[quality] - bits))}" in rows
    assert rows.pop("cifar fsq, stage 1")[0] == round(bits)
    for name, (size, decibels, similarity) in rows.items():
        codec, quality = name.split(", quality ")
        expected = encode(codec, int(quality))
        assert size == round(expected[0]) == pytest.approx(bits, rel=0.1)
        assert decibels == pytest.approx(expected[1], abs=0.006) and 0.5 < similarity < 1

    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn[0].axes[0].lines}
    assert lines["BMS hyperprior (by 2201.12904), as published of originals"] == [[764, 26.83], [1139, 29.50]]
    assert lines["CST (by 2201.12904), as published of originals"] == [[568, 24.53], [1352, 31.82]]
    assert lines["RECOMBINER (2309.17182), as published of originals"] == [[896, 28.1], [1024, 28.8]]
    assert lines["cifar fsq, stage 1"][0][0] == pytest.approx(bits)
    for codec in evaluate.CODEC_OPTIONS:  # more bits, less error
        assert len(lines[codec]) == 5 and np.all(np.diff(lines[codec], axis=0) > 0)


def test_residual_codebooks_are_measured_and_drawn_one_by_one(shipped, folder, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluate, "save_figure", lambda path, figure: drawn.append(figure))
    small_checkpoint(tmp_path / "one.pt")
    model = VQRAE(**SEVERAL, decoder_width=64, decoder_depth=1).eval()
    save_checkpoint(tmp_path / "two.pt", model)
    shipped(tmp_path / "one.pt", tmp_path / "two.pt", "DEPTHS=depths.png", "BATCH_SIZE=20")
    tables = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.splitlines() if ", first " in line]

    test = evaluate.load_dataset(str(folder), 32).test_images
    indices = model.encode_to_indices(to_float(test))
    reconstructions = [model.decode_from_indices(indices, codebooks=depth) for depth in (1, 2)]
    decibels = [psnr(images, to_float(test)).mean().item() for images in reconstructions]
    assert abs(decibels[0] - decibels[1]) > 0.01
    name = "cifar ema_vq, stage 1, first"
    assert [row[:2] for row in rows] == [[f"{name} 1", "4.0"], [f"{name} 2", "8.0"]]
    assert [float(row[2]) for row in rows] == pytest.approx(decibels, abs=0.006)

    (axes,), = [figure.axes for figure in drawn]  # of the checkpoint that has several codebooks
    picture = torch.from_numpy(np.array(axes.images[0].get_array()))
    for place, images in enumerate((test, *((images * 255).round().byte() for images in reconstructions))):
        row = picture[34 * place + 2 :][:32, 2:].unfold(1, 32, 34)  # twelve images (32, 12, 3, 32)
        assert torch.equal(row.permute(1, 2, 0, 3), images[:12])
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["images"] + [f"{bits} bits\n{value:.2f} dB" for bits, value in zip((4, 8), decibels)]

    (tmp_path / "file").touch()
    for wrong in (f"CODECS={tmp_path}/file/a.png", f"CODECS={tmp_path}/a.png DEPTHS={tmp_path}/a.png"):
        with pytest.raises(SystemExit, match="^evaluate.py: "):  # before anything is measured
            shipped(tmp_path / "one.pt", "BATCH_SIZE=250", *wrong.split())
    assert "PSNR" not in capsys.readouterr().out

    shipped(tmp_path / "one.pt", "BATCH_SIZE=250", "CODECS=None", "DEPTHS=depths.png")
    assert "no depths: no checkpoint" in capsys.readouterr().out and len(drawn) == 1


def test_figures_of_jpeg_copies_say_so_and_missing_codecs_are_named(tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluate, "save_figure", lambda path, figure: drawn.append(figure))
    monkeypatch.setattr(evaluate, "DATASET", str(tmp_path))
    monkeypatch.delitem(Image.SAVE, "AVIF", raising=False)
    data = draw_shapes(16, train=4, test=4)._replace(name="folder-copies")
    (tmp_path / "test").mkdir()
    for suffix, said in (("png", False), ("JPG", True)):
        (tmp_path / "test" / f"0.{suffix}").touch()
        evaluate.compare_codecs(Path("codecs.png"), data, {"a": data.test_images}, {"a": 200.0, "none": None})
        assert ("JPEG copies" in drawn[-1].axes[0].get_title()) == said
    assert "no AVIF: Pillow was built without it" in capsys.readouterr().out
    assert [line.get_label() for line in drawn[0].axes[0].lines] == ["JPEG", "WebP", "a"]  # published: of 32 x 32
    evaluate.compare_codecs(Path("codecs.png"), data, {"none": data.test_images}, {"none": None})
    assert "no codecs: no checkpoint" in capsys.readouterr().out and len(drawn) == 2


@pytest.mark.parametrize("where", ["load_dataset", "load_lpips"])
def test_a_full_gpu_memory_is_no_missing_network_or_dataset(where, folder, tmp_path, monkeypatch):
    class Full(torch.nn.Module):
        def forward(self, *args, **options):
            raise torch.OutOfMemoryError("CUDA out of memory")

    small_checkpoint(tmp_path / "small.pt")
    monkeypatch.setattr("downloads.reachable", lambda url: False)
    monkeypatch.setattr(f"utils.{where}", Full() if where == "load_dataset" else Full)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "small.pt"), f"DATASET={folder}"])
    with pytest.raises(SystemExit, match="evaluate.py: the GPU's memory is full"):
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")


def test_a_wrong_checkpoint_is_one_line(shipped, tmp_path):
    Path(tmp_path / "text.pt").write_text("hello")
    for path in ("nowhere.pt", tmp_path / "text.pt", "lr=0.1/fsq_stage1_best.pt"):
        with pytest.raises(SystemExit, match="evaluate.py: checkpoint"):
            shipped(path)


def test_a_priors_bits_stand_beside_codecs(shipped, folder, tmp_path, capsys):
    small_checkpoint(tmp_path / "small.pt")
    model = load_checkpoint(tmp_path / "small.pt")
    with torch.no_grad():
        indices = model.encode_to_indices(to_float(evaluate.load_dataset(str(folder), 32).test_images))
    prior, bits = build_prior(model.quantizer, [8, 8], 2, dim=16, depth=1), 0
    for head, digits in zip(prior.heads, prior.to_digits(indices).flatten(0, 1).unbind(1)):  # how often each occurs
        p = (digits.bincount(minlength=len(head.bias)) + 1e-3) / len(digits)
        head.bias.data = p.log()
        bits -= 64 * p[digits].log2().mean().item()
    tokenizer = hashlib.sha256((tmp_path / "small.pt").read_bytes()).hexdigest()
    for name, of in (("prior.pt", tokenizer), ("other.pt", "0" * 64)):
        content = {"config": prior.config, "prior": prior.state_dict(), "constants": {"tokenizer": of}}
        save_torch(tmp_path / name, content)
    shipped(tmp_path / "small.pt", f"CODECS={tmp_path / 'codecs.png'}", f"PRIOR={tmp_path / 'prior.pt'}")
    rows = [line.split("|")[1:5] for line in capsys.readouterr().out.splitlines() if "stage 1" in line]
    (_, nominal, *plain), (name, estimated, *figures) = rows[-2:]
    assert name.strip() == "cifar fsq, stage 1, with its prior" and plain == figures and int(nominal) == 506
    assert bits < 0.99 * 64 * np.log2(240)
    assert float(estimated.replace(",", "")) == pytest.approx(bits, rel=0.02)
    shown = measure_bits(prior, indices[:36], torch.full((36,), 2))  # of the 38, those in the picture
    assert float(estimated.replace(",", "")) == round(shown)
    assert round(shown) != round(measure_bits(prior, indices, torch.full((38,), 2)))
    shipped(tmp_path / "small.pt", "SEARCH=1")  # the encoder's tokens beside those that were searched for
    rows = [[cell.strip() for cell in line.split("|")[1:5]]
            for line in capsys.readouterr().out.splitlines() if "stage 1" in line]
    (name, _, searched, _), own, (longer_name, with_prior, *_) = rows[-3:]
    assert (name, longer_name) == ("cifar fsq, stage 1, searched", "cifar fsq, stage 1, searched, with its prior")
    assert own == ["cifar fsq, stage 1", "506", *(figure.strip() for figure in plain)]
    assert float(searched) > float(own[2]) and with_prior != estimated.strip()
    content["prior"] = {}
    save_torch(tmp_path / "broken.pt", content | {"constants": {"tokenizer": tokenizer}})
    with pytest.raises(SystemExit, match="evaluate.py: prior .*broken.pt does not fit"):  # before anything is measured
        shipped(tmp_path / "small.pt", f"PRIOR={tmp_path / 'broken.pt'}")
    for path in (tmp_path / "other.pt", tmp_path / "small.pt", tmp_path / "none.pt", 3):
        with pytest.raises(SystemExit, match="evaluate.py: .*(PRIOR|small.pt|none.pt)"):
            shipped(tmp_path / "small.pt", f"PRIOR={path}")
    with pytest.raises(SystemExit, match="evaluate.py: PRIOR = .*with CODECS a path"):
        shipped(tmp_path / "small.pt", f"PRIOR={tmp_path / 'prior.pt'}", "CODECS=None")
