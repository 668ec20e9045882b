"""Metrics of utils.py, and extras/: measuring, codecs, tables of runs, cells, the encoder's making."""
import json
import math
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SEED, refused
from PIL import Image
from scipy.linalg import sqrtm
from skimage.metrics import structural_similarity

import train
from data import Dataset, draw_shapes, load_dataset
from extras import cells, codecs, compare, measure, pretrain
from extras.measure import frechet_distance, linear_probe, load_judges
from models import PRETRAINED_DIR, VQRAE, ConvEncoder, load_checkpoint, save_checkpoint
from quantizers import EMAVQ, FSQ, QUANTIZERS, build_quantizer
from utils import evaluate, psnr, read_constants, ssim

SHIPPED = PRETRAINED_DIR / "vqrae_fsq.pt"


def small(encoder="cnn", quantizer="fsq", options={"levels": [4, 3]}, **more):
    """A VQRAE for 16 x 16 images in 4 x 4 tokens, of 12 codes unless told otherwise."""
    return VQRAE(encoder, quantizer, options, 16, 4, decoder_width=32, decoder_depth=1, **more)


def noise(count=7):
    return torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8)


@pytest.mark.parametrize("count, size", [(3, 20), (1, 1100)])  # SSIM of the larger image is measured in two strips
def test_psnr_and_ssim_of_uint8_or_floats_and_of_no_others(count, size):
    a = draw_shapes(count, size)[0]
    b = (a / 255 + 0.2 * torch.randn(a.shape)).clamp(0, 1).mul(255).byte()
    mse = (a / 255 - b / 255).square().mean((1, 2, 3))
    similarities = [structural_similarity(x.numpy(), y.numpy(), channel_axis=0, data_range=1, gaussian_weights=True,
                                          sigma=1.5, use_sample_covariance=False) for x, y in zip(a / 255, b / 255)]
    for images, targets in ((a, b), (a / 255, b / 255)):
        torch.testing.assert_close(psnr(images, targets), -10 * mse.log10())
        torch.testing.assert_close(ssim(images, targets), torch.tensor(similarities), atol=2e-5, rtol=0)
    assert psnr(a, a).tolist() == [100] * count
    for metric, images, message in ((psnr, noise().float(), "images"), (ssim, noise()[..., :10], "11 x 11")):
        with refused(message):
            metric(images, images)
        with refused("equal shapes"):
            metric(noise(4), noise(1))


def test_a_frechet_distance_is_its_formula():
    a, b = torch.randn(50, 5).double(), torch.randn(40, 5).double() @ torch.randn(5, 5).double() + 1
    root = sqrtm((a.T.cov() @ b.T.cov()).numpy())
    expected = (a.mean(0) - b.mean(0)).square().sum() + (a.T.cov() + b.T.cov()).trace() - 2 * root.trace().real
    assert frechet_distance(a.float(), b.float()) == pytest.approx(expected.item(), rel=1e-3)
    x = 100 * torch.randn(10, 768)  # fewer images than features; 2 x has the covariance 4 C
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(x, 2 * x) == pytest.approx((x.mean(0).square() + x.var(0)).sum().item(), rel=1e-6)


def test_a_probe_learns_from_training_images_and_their_statistics():
    y = (torch.arange(200) % 40 == 0).long()  # one class is rare
    x = torch.stack([100.0 * y - 100, torch.zeros(200)], 1) + torch.randn(200, 2)
    x *= 1e-4  # unless standardised, the penalty forbids weights so large
    assert linear_probe(x, y, x[:50], y[:50]) == 1
    assert linear_probe(x, y, x[y == 1], y[y == 1]) == 1
    assert linear_probe(x, y, x[:4], torch.tensor([1, 0, 1, 0])) == 0.75


@torch.no_grad()
def test_metrics_are_what_one_computes_by_hand_before_rounding_to_8_bits(change):
    model, images = small().eval(), noise()
    model.decoder.head.weight.data *= 50  # far out of range
    z_q, _, indices = model.encode(images / 255)
    output = model.decode(z_q).clamp(0, 1)
    mse = (output - images / 255).square().mean((1, 2, 3))
    counts, usage, perplexity = model.get_codebook_usage(indices)
    expected = {"psnr": (-10 * mse.log10()).mean().item(), "psnr_of_mse": -10 * math.log10(mse.mean()),
                "ssim": ssim(output, images / 255).mean().item(), "usage": usage, "perplexity": perplexity}
    metrics, found, reconstructions = evaluate(model.train(), images, batch_size=3)
    assert metrics == pytest.approx(expected, rel=1e-3) and model.training
    assert torch.equal(found, counts) and (reconstructions - output * 255).abs().max() <= 0.51  # rounded
    images = images.clamp(10, 240)
    change(model, decode_from_indices=lambda indices, size: (images + 0.4) / 255)  # 56 dB; rounded, it would be gone
    assert evaluate(model, images)[0]["psnr"] == pytest.approx(20 * math.log10(255 / 0.4), abs=0.01)


def fingerprint(train_x, train_y, test_x, test_y):
    """A number that depends on each argument of linear_probe, and stands for its accuracy."""
    weighed = (1 + train_y)[:, None] * train_x, (3 + test_y)[:, None] * test_x
    return sum(x.square().mean().item() for x in weighed)


@torch.no_grad()
def test_figures_are_of_images_reconstructions_and_features(change):
    """Judges see images and rounded reconstructions. Probes get mean features of TRAIN_IMAGES images."""
    change(measure, TRAIN_IMAGES=10, batch_size=lambda images: 8, linear_probe=fingerprint)
    model = small("vit_tiny_patch16_224", encoder_layers=2, pretrained=False, decoder_heads=2).eval()
    images, labels = draw_shapes(21, 16)
    data = Dataset(images[:12], labels[:12], images[12:], labels[12:], [*"0123456789"])
    expected, bits = evaluate(model, data.test_images)[0], 16 * math.log2(12)
    expected |= {"bits": bits, "ratio": 24 * 256 / bits, "entropy": math.log2(expected["perplexity"])}
    z, last_layer = model.encoder(images / 255, with_last=True)
    features = {"z": z, "last_layer": last_layer, "z_q": model.quantize(z)[0]}
    judges, reconstructions = load_judges(16), evaluate(model, images)[2]
    judges["rfid"] = lambda images: images[..., :1, :1]
    for name, judge in judges.items():
        real, found = judge(images / 255), judge(reconstructions / 255)
        expected[f"distance_{name}"] = (real - found)[12:].square().mean().item()
        expected[f"frechet_{name}"] = frechet_distance(real[12:].mean((2, 3)), found[12:].mean((2, 3)))
        if name != "rfid":  # the field's metrics have no probes
            features |= {f"image_{name}": real, f"reconstruction_{name}": found}
    for name, z in features.items():
        x = z.mean((2, 3))
        expected[f"probe_{name}"] = fingerprint(x[:10], labels[:10], x[12:], labels[12:])
    judges["lpips"] = lambda images, others: 1 + (255 * others - (255 * others).round()).abs()  # 1 if they are rounded
    assert measure.measure(model, data, judges) == pytest.approx(expected | {"distance_lpips": 1}, rel=0.01)


def test_what_cannot_be_measured_is_left_out(monkeypatch):
    """Without codes there are no bits, of one image no covariance, of one class no probe."""
    monkeypatch.setattr(measure, "find_spec", lambda name: None)
    data = Dataset(noise(3), torch.zeros(3).long(), noise(1), torch.zeros(1).long(), ["a"])
    figures = measure.measure(small("cnn", "none", {}), data, load_judges(16))
    assert figures.keys() == {"psnr", "psnr_of_mse", "ssim", "usage", "perplexity", "distance_cifar"}
    assert all(map(math.isfinite, figures.values()))


def test_rfid_resizes_as_torch_fidelity_does(monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    def draw_weights(network, weights):
        torch.manual_seed(SEED)
        for weight in network.parameters():
            if weight.ndim > 1:
                torch.nn.init.kaiming_normal_(weight)
    monkeypatch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", draw_weights)
    images = noise(2)
    found = load_judges(16, "rfid")["rfid"](images / 255)[..., 0, 0]
    expected, = fidelity.FeatureExtractorInceptionV3("inception", ["2048"])(images)
    assert (found - expected).norm() < 1e-3 * (expected[0] - expected[1]).norm()
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(OSError, match=r"^METRICS=rfid: [^\n]*$"):
        load_judges(16, "rfid")


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """run(module, *arguments, NAME=value, ...) runs a script, and returns its table's rows."""
    monkeypatch.setattr(codecs, "codec_options", {"AVIF": {"speed": 10}})

    def run(module, *arguments, **values):
        for name, value in {"DATASET": str(folder), **values}.items():
            monkeypatch.setattr(module, name, value, raising=False)
        monkeypatch.setattr("sys.argv", ["script", *map(str, arguments)])
        module.main()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        table = [re.split(r" *\| *", line)[1:-1] for line in lines]
        return {row[0]: dict(zip(table[0], row)) for row in table[2:]}

    return run


def test_measure_finds_what_the_run_measured(run, trained):
    best, = trained.glob("checkpoints/*/*stage2_best.pt")
    results = json.loads(next(trained.glob("outputs/*/results.json")).read_text())
    row = run(measure, best, TRAIN_IMAGES=0)[str(best)]
    assert float(row["PSNR"]) == pytest.approx(results["psnr"], abs=0.011)
    assert (row["bits"], row["ratio"]) == ("384", "64.0")  # 64 tokens of 6 bits; 24 * 32 * 32 / 384


@pytest.mark.parametrize("script, word, values, message", [
    (measure, "fsq.pt", {"IMAGE_SIZE": 8}, "IMAGE_SIZE = 8"), (codecs, "fsq.pt", {"COUNT": 0}, "COUNT = 0"),
    (measure, "fsq.pt", {"METRICS": "fid"}, "METRICS = .fid"), (codecs, "fsq.pt", {"PHOTOS": "."}, "no images"),
    (codecs, "none.pt", {}, "no codes"), (compare, "QUANTIZER=none", {}, "QUANTIZER = 'none'"),
    (compare, "QUANTIZER=fsq", {"BITS": (9,)}, "BITS = .9")])
def test_what_cannot_be_measured_is_refused_before_the_work(script, word, values, message, run, monkeypatch):
    monkeypatch.setattr(script, "load_dataset", None)
    for quantizer in ("fsq", "none"):
        save_checkpoint(f"{quantizer}.pt", small("cnn", quantizer, {}))
    with refused(message):
        run(script, word, **values)


@pytest.mark.parametrize("share", [-99, 0.0, 0.25, 1.0, 99])  # far below or above, the first or the last file counts
def test_a_codec_has_the_bits_of_the_tokens_between_two_of_its_files(share):
    images, files = draw_shapes(9, 32)[0][..., :24], []
    for quality in {-99: (1, 2), 99: (99, 100)}.get(share, (50, 51)):
        file = codecs.encode(images, "JPEG", quality)
        files.append((8 * len(file), psnr(codecs.decode(file, 9), images)))
    (low, psnrs_low), (high, psnrs_high) = files
    assert psnrs_low.min() > 15  # each image comes back in its place
    bits, psnrs, _ = codecs.interpolate(images, "JPEG", low + share * (high - low))
    share = min(max(share, 0), 1)
    assert bits == low + share * (high - low)
    torch.testing.assert_close(psnrs, torch.lerp(psnrs_low, psnrs_high, share))


def test_the_figures_of_codecs_are_their_formulas():
    """Of two pictures of one and two images, bits are means over images."""
    own, avif = torch.tensor([30.0, 20, 10]), torch.tensor([31.0, 22, 13])
    figures = codecs.average([(100, 50, own[:1], own[:1] / 100), (200, 250, own[1:], own[1:] / 100)],
                             [(1, 1, avif[:1], None), (1, 1, avif[1:], None)])
    mse = (1e-3 + 1e-2 + 1e-1) / 3
    assert figures == pytest.approx({"bits": 100, "bits_a_pixel": 1, "psnr": 20, "psnr_of_mse": -10 * math.log10(mse),
                                     "ssim": 0.2, "difference": -2, "error": 1 / math.sqrt(3)})


def test_avif_gets_as_many_bits_as_the_tokens(run, folder):
    table, images = run(codecs, SHIPPED, COUNT=5), load_dataset(str(folder), 32).test_images[:4]  # 2 x 2 in a picture
    own, avif = table[str(SHIPPED)], table[f"AVIF, as {SHIPPED}"]
    output, bits = evaluate(load_checkpoint(SHIPPED), images)[2], 64 * math.log2(64_000)
    assert float(own["PSNR"]) == pytest.approx(psnr(output, images).mean().item(), abs=0.011)
    assert own["bits"] == avif["bits"] == f"{bits:,.0f}"
    assert float(own["to AVIF"]) == pytest.approx(float(own["PSNR"]) - float(avif["PSNR"]), abs=0.02)


def test_a_photograph_is_measured_whole(run, monkeypatch):
    for name, size in {"a": (36, 48), "b": (9, 40)}.items():
        Image.new("RGB", size, "red").save(f"{name}.png")
    Path("c.png").write_text("no image")
    shutil.copy(SHIPPED, "epoch=3.pt")  # as Lightning names its files
    monkeypatch.setenv("HOME", str(Path.cwd()))  # a "~" in quotes is not replaced by the shell
    with pytest.warns(match="b.png has a side below the 11"), pytest.warns(match="c.png"):
        row = run(codecs, "~/epoch=3.pt", "PHOTOS=.", PHOTOS="")["~/epoch=3.pt"]
    bits = math.log2(64_000)
    assert row["bits"] == f"{9 * 12 * bits:,.0f}" and row["bits a pixel"] == f"{bits / 16:.3f}"


def test_a_row_is_the_mean_of_a_line_trained_with_each_seed(run, change):
    figures = [{"psnr": x, "token_bits": 9.97} for x in (22.0, 23.0)]
    change(compare, run_and_measure=Mock(side_effect=figures), setting="EPOCHS=4 FLIP=False")
    row = run(compare, "EPOCHS=3", "QUANTIZER=fsq", DATASET="a", BITS=(10,), SEEDS=(3, 4))["FSQ, 10.0 bits"]
    assert [" ".join(call.args[0]) for call in compare.run_and_measure.call_args_list] == [
        f"DATASET=a EPOCHS=4 FLIP=False QUANTIZER=fsq FSQ_LEVELS=(8,5,5,5) SEED={seed} EPOCHS=3" for seed in (3, 4)]
    assert (row["PSNR"], row["max - min"]) == ("22.50", "1.00")


def test_a_quantizer_of_ones_own_is_compared_at_all_bits_if_it_can(change, monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "sign", FSQ)
    monkeypatch.setitem(QUANTIZERS, "mine", EMAVQ)
    change(compare, QUANTIZER="sign,mine,fsq", BITS=(13, 16))
    assert [(line, words.removeprefix("QUANTIZER=")) for line, words in compare.choose_runs()] == [
        ("sign", "sign"), ("mine", "mine CODEBOOK_SIZE=8192"), ("mine", "mine CODEBOOK_SIZE=65536"),
        ("FSQ", "fsq FSQ_LEVELS=(8,8,5,5,5)"), ("FSQ", "fsq FSQ_LEVELS=(8,8,8,5,5,5)")]


@pytest.mark.parametrize("argument, shown", [("CODE_DIM=8", True), ("EPOCHS=8", False)])  # RESULTS.md has 4 epochs
def test_a_row_stands_beside_results_where_bits_are_nearest(argument, shown, change, monkeypatch, capsys):
    change(compare, run_and_measure=lambda arguments: {"psnr": 21.5, "token_bits": 12.0})
    monkeypatch.setattr("sys.argv", ["compare", "QUANTIZER=lfq", "BITS=(10,)", argument])
    compare.main()
    printed = capsys.readouterr().out
    assert bool(re.search(r"LFQ, 12.0 bits +\| - +\| 21.50 +\| - ", printed)) == shown
    for line in ("EMA-VQ", "FSQ"):
        stored = re.search(rf"\n\| {line} \| ([\d./ ]+) \|", (ROOT / "RESULTS.md").read_text("utf-8"))
        psnrs = stored[1].replace(" / ", r" +\| ")
        assert bool(re.search(rf"\| {line} +\| {psnrs} +\|", printed)) == shown


def test_a_run_of_the_table_is_measured_once_and_a_failed_one_ends_it(trained, folder, change):
    shutil.copytree(trained, ".", dirs_exist_ok=True)
    file, = Path("outputs").glob("*/results.json")
    results = json.loads(file.read_text())
    results["constants"]["CROP_SIZES"] = [32, 64]  # images then have the largest size, as in train.py
    file.write_text(json.dumps(results))
    Path("train.py").write_text(f"print('see outputs/{file.parent.name}/ and more')")
    change(compare, DATASET=str(folder), PROBE_IMAGES=10)
    figures = compare.run_and_measure([])
    assert (figures["token_bits"], figures["bits"], figures["psnr"]) == (6, 16 * 16 * 6, results["psnr"])
    assert 0 <= figures["probe_z_q"] <= 1
    change(compare, measure_run=lambda run: {"psnr": 1.0})
    assert compare.run_and_measure([]) == figures
    change(measure, __file__="train.py")  # as if extras/measure.py had changed
    assert compare.run_and_measure([]) == {"psnr": 1.0}
    Path("train.py").write_text("raise SystemExit('train.py: no')")
    with refused("train.py SEED=1 failed"):
        compare.run_and_measure(["SEED=1"])


@pytest.mark.parametrize("line", compare.lines)
def test_the_lines_have_as_many_bits_as_their_columns_say(line, change):
    words, values = compare.lines[line]
    for bits, value in values.items():
        change(train, **read_constants(dict(vars(train)), f"QUANTIZER={words}".replace("*", str(value)).split()))
        quantizer = build_quantizer(train.QUANTIZER, 32, **train.quantizer_options())
        assert math.log2(quantizer.codebook_size) == pytest.approx(bits, abs=0.8)


def test_cells_show_all_codes_and_unused_ones_hollow(run):
    run(cells, STEPS=2)
    assert Path("outputs/cells.png").exists()
    quantizer, axes = build_quantizer("fsq", 2, levels=[3, 2]), Mock()
    cells.draw(axes, "FSQ", quantizer, torch.tensor([[9.0, 9], [9, -9], [8, 8]]))
    hollow, filled = axes.scatter.call_args_list[-2:]
    assert (len(hollow.args[0]), hollow.kwargs["c"], len(filled.args[0]), filled.kwargs["c"]) == (6, "none", 2, "black")


def test_pretraining_writes_an_encoder_that_whitens_with_its_batch_norms_folded_in(run, change, folder):
    """The first filters give a principal component of variance v the variance v / (v + 0.0005)."""
    written, save, images = [], pretrain.save_encoder, noise(4) / 255
    change(pretrain, save_encoder=lambda encoder: written.append(encoder(images)) or save(encoder),
           linear_probe=lambda *features: 0.25)
    run(pretrain, EPOCHS=1, BATCH_SIZE=45, OUT="out")
    encoder = ConvEncoder()
    encoder.load_state_dict(torch.load("out/cifar_encoder.pt"))
    torch.testing.assert_close(encoder(images), written[0], atol=0.05, rtol=0.05)  # 16 bits
    filters, negative = encoder.whiten.weight.detach().flatten(1).chunk(2)
    patches = F.unfold((load_dataset(str(folder)).train_images / 255 - 0.5) / 0.25, 3).mT.flatten(0, 1)
    covariance = patches.T @ patches / len(patches)
    v = torch.linalg.eigvalsh(covariance).flip(0)[:12]
    torch.testing.assert_close(filters @ covariance @ filters.T, (v / (v + 0.0005)).diag(), atol=3e-3, rtol=0)
    assert torch.equal(filters, -negative)
