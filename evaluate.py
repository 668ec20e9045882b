"""Measure checkpoints: what their tokens keep of the image, and of its meaning.

    python evaluate.py                                          the shipped ones, against the figures they were shipped with
    python evaluate.py checkpoints/<run>/fsq_stage*_best.pt     your own; with NAME=value for the constants below

Prints the two tables of the README, in fp32. LPIPS and rFID are torchmetrics' own and "-" where their networks cannot be
had; beside them stand two distances in the shipped encoder's features, under names of their own.
"""
import hashlib
import importlib.util
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from models import PRETRAINED_DIR, VQRAE, build_encoder, reachable
from quantizers import check
from utils import (
    Dataset,
    evaluate,
    linear_probe,
    load_checkpoint,
    load_dataset,
    load_lpips,
    load_torch,
    read_constants,
    save_figure,
    save_torch,
    to_float,
    write_file,
)

DATASET = "cifar10"  # as in train.py
TRAIN_IMAGES = None  # training images that probes learn from and usage is counted over; None: all
BATCH_SIZE = 250
CURVE = None  # a path: plot PSNR against probes there, a line for each quantizer, a point for each PREDICT_WEIGHT
SHIP = False  # True: put 16-bit copies into checkpoints/pretrained and record their figures there

device = "cuda" if torch.cuda.is_available() else "cpu"
RECORD = PRETRAINED_DIR / "results.json"
TOLERANCE = {"psnr": 0.01, "ssim": 0.001, "usage": 0.001, "train_usage": 0.001, "probe_z": 0.001, "probe_z_q": 0.001, "probe_predicted": 0.001}
IMAGE_COLUMNS = {"PSNR": "psnr:.2f", "SSIM": "ssim:.4f", "LPIPS": "lpips:.4f", "rFID": "rfid:.2f",
                   "Fréchet distance, encoder": "frechet:.3f", "feature distance": "feature_distance:.4f"}
TOKEN_COLUMNS = {"tokens": "tokens:d", "bits": "bits:.0f", "used, test": "usage:.1%", "perplexity, test": "perplexity:,.0f",
                 "used, training": "train_usage:.1%", "perplexity, training": "train_perplexity:,.0f", "probe z": "probe_z:.1%",
                 "probe z_q": "probe_z_q:.1%", "probe predicted": "probe_predicted:.1%", "quantizer": "quantizer_kb:,.0f kB",
                 "images/s": "images_per_second:,.0f"}


def main():
    torch.backends.cudnn.allow_tf32 = False  # fp32 on a GPU, too
    try:
        paths = [Path(argument) for argument in sys.argv[1:] if "=" not in argument]
        read_constants(globals(), [argument for argument in sys.argv[1:] if "=" in argument])
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {"images": None, "figures": {}}
        check(isinstance(BATCH_SIZE, int) and BATCH_SIZE >= 1, "BATCH_SIZE", BATCH_SIZE, "a whole number of 1 or more")
        check(TRAIN_IMAGES is None or isinstance(TRAIN_IMAGES, int) and TRAIN_IMAGES >= 1, "TRAIN_IMAGES", TRAIN_IMAGES, "None or 1 or more")
        check(isinstance(SHIP, bool) and not (SHIP and TRAIN_IMAGES), "SHIP", SHIP, "False, or True with TRAIN_IMAGES = None")
        paths = paths or sorted(PRETRAINED_DIR.glob("vqrae_*.pt"))
        check(paths, "checkpoints", str(PRETRAINED_DIR), "vqrae_*.pt there, or paths as arguments")
        # whatever is wrong with one is said before an hour is spent on the others
        configs = {str(path): load_checkpoint(path).config for path in paths}
        sizes, quantizers = ({path: config[name] for path, config in configs.items()} for name in ("image_size", "quantizer"))
        check(len(set(sizes.values())) == 1, "checkpoints", sizes, "images of one size")
        check(not SHIP or len(set(quantizers.values())) == len(paths), "checkpoints", quantizers, "with SHIP = True, one of each quantizer")
        data = load_dataset(DATASET, sizes[str(paths[0])])
        check(len(data.test_images) >= 2, "DATASET", DATASET, "two test images or more, for a Fréchet distance")
        check(CURVE is None or isinstance(CURVE, str) and data.train_labels is not None, "CURVE", CURVE, "None, or a path where images have classes to probe")
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    if TRAIN_IMAGES:
        data = data._replace(train_images=data.train_images[:TRAIN_IMAGES],
                             train_labels=None if data.train_labels is None else data.train_labels[:TRAIN_IMAGES])
    if SHIP:
        paths = [ship(path) for path in paths]
    hashes = {split: hashlib.sha256(images.numpy()).hexdigest()[:12]
                for split, images in (("training", data.train_images), ("test", data.test_images))}
    judge = build_encoder("cifar", 8).eval().to(device)

    figures = {name: measure(path, data, judge) for name, path in named(paths).items()}
    for columns in (IMAGE_COLUMNS, TOKEN_COLUMNS):
        print_table(figures, columns)
    print(f"{data.name}: {len(data.train_images):,} training images (sha256 {hashes['training']}...) and "
          f"{len(data.test_images):,} test images ({hashes['test']}...)")
    if SHIP:
        others = record["figures"] if record["images"] == hashes else {}
        write_file(RECORD, json.dumps({"images": hashes, "figures": others | figures}, indent=2).encode())
    if CURVE:
        plot_curve(Path(CURVE), figures)
    if not SHIP:
        compare(figures, record, hashes)


def named(paths: list[Path]) -> dict[str, Path]:
    """The checkpoints by name: a shipped one's file; of others, encoder, quantizer and stage, and where another before it
    has the same, the constants in which they differ, or else the path."""
    names, constants = {}, {}
    for path in paths:
        content = load_torch(path)
        constants[path] = content.get("constants", {})
        name = path.stem if path.resolve().parent == PRETRAINED_DIR else f"{content['config']['encoder']} {content['config']['quantizer']}, stage {content['stage']}"
        if name in names:
            name += "".join(f", {k}={v}" for k, v in constants[path].items() if v != constants[names[name]].get(k))
        names[name if name not in names else str(path)] = path
    return names


def measure(path: Path, data: Dataset, judge: nn.Module) -> dict:
    """All figures of one checkpoint. judge: the shipped encoder, in whose features two distances are measured."""
    model, content = load_checkpoint(path).to(device), load_torch(path)
    train, test = tokenize(model, data.train_images, path.name), tokenize(model, data.test_images, path.name)
    metrics, _, reconstructions = evaluate(model, data.test_images.to(device), BATCH_SIZE, test["indices"])
    figures = {"tokens": model.config["grid"] ** 2, **metrics}
    if model.quantizer.codebook_size:
        figures["bits"] = figures["tokens"] * math.log2(model.quantizer.codebook_size)
    else:
        del figures["usage"], figures["perplexity"]
    figures["quantizer_kb"] = sum(t.nbytes for t in [*model.quantizer.parameters(), *model.quantizer.buffers()]) / 1e3
    if "metrics" in content:
        speed = content["metrics"]  # older checkpoints, the shipped ones among them, have another name for it
        figures["images_per_second"] = speed.get("images_per_second", speed.get("pictures_per_second"))
    figures["quantizer"] = model.config["quantizer"]
    if "constants" in content and not model.from_scratch:
        figures["predict_weight"] = content["constants"]["PREDICT_WEIGHT"]

    figures |= distances(data.test_images.to(device), reconstructions, judge)
    if model.quantizer.codebook_size:
        _, figures["train_usage"], figures["train_perplexity"] = model.get_codebook_usage(train["indices"])
    if data.train_labels is not None:
        untrained = {"predicted"} if figures.get("predict_weight") == 0 else set()
        for name in train.keys() - {"indices"} - untrained:
            figures[f"probe_{name}"] = linear_probe(train[name], data.train_labels.to(device), test[name], data.test_labels.to(device))
    return figures


@torch.no_grad()
def tokenize(model: VQRAE, images: Tensor, name: str) -> dict[str, Tensor]:
    """The indices (N, h, w) of uint8 images (N, 3, H, W), and the means (N, C) of each one's features z, of z_q and of the
    features predicted from it."""
    parts = {"indices": [], "z": [], "z_q": []} | ({} if model.from_scratch else {"predicted": []})
    for batch in tqdm(images.split(BATCH_SIZE), f"tokenizing for {name}", leave=False):
        z = model.encoder(to_float(batch.to(device)))
        z_q, _, indices = model.quantize(z)
        parts["indices"].append(indices)
        parts["z"].append(z.mean((2, 3)))
        parts["z_q"].append(z_q.mean((2, 3)))
        if "predicted" in parts:
            parts["predicted"].append(model.predict_features(z_q).mean((2, 3)))
    return {name: torch.cat(values) for name, values in parts.items()}


@torch.no_grad()
def distances(originals: Tensor, reconstructions: Tensor, judge: nn.Module) -> dict[str, float]:
    """Between uint8 images (N, 3, H, W): LPIPS and rFID where they can be had; in the judge's features, the Fréchet
    distance of their means over an image and the mean squared distance of the features themselves."""
    pairs = list(zip(originals.split(BATCH_SIZE), reconstructions.split(BATCH_SIZE)))
    means = nn.Identity()  # torchmetrics is given features in place of images
    means.num_features = judge.dim
    frechet, total = FrechetInceptionDistance(means).to(device), 0
    for pair in pairs:
        z = [judge(to_float(images)) for images in pair]
        frechet.update(z[0].mean((2, 3)), real=True)
        frechet.update(z[1].mean((2, 3)), real=False)
        total = total + F.mse_loss(*z) * len(z[0])
    found = {"frechet": frechet.compute().item(), "feature_distance": total.item() / len(originals)}
    if inception_at_hand():
        try:
            rfid = FrechetInceptionDistance(2048)
        except (OSError, RuntimeError) as error:  # a download that breaks off, or a file that is not what it should be
            print(f"no rFID: {error}")
        else:
            rfid = rfid.to(device)
            for original, reconstruction in pairs:
                rfid.update(original, real=True)
                rfid.update(reconstruction, real=False)
            found["rfid"] = rfid.compute().item()
    try:
        lpips = load_lpips().to(device)
        sums = [lpips(to_float(a), to_float(b), normalize=True).sum() for a, b in pairs]
        found["lpips"] = sum(sums).item() / len(originals)
    except RuntimeError as error:
        reason, *_ = str(error).split(";")  # what follows is how to train without it
        print(f"no LPIPS: {reason}")
    return found


def inception_at_hand() -> bool:
    """Whether FID's own Inception network is installed (torch-fidelity) and its weights are on disk or can be downloaded."""
    if importlib.util.find_spec("torch_fidelity") is None:
        print("no rFID: torchmetrics computes it with torch-fidelity, which is not installed")
        return False
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    at_hand = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name).exists() or reachable(URL_INCEPTION_V3)
    if not at_hand:
        print(f"no rFID: {URL_INCEPTION_V3} cannot be reached")
    return at_hand


def print_table(figures: dict[str, dict], columns: dict[str, str]):
    """A Markdown table, aligned; "-" for what could not be measured."""
    rows = [["checkpoint", *columns]]
    for name, values in figures.items():
        row = [name]
        for column in columns.values():
            key, form = column.split(":", 1)
            form, _, unit = form.partition(" ")
            value = values.get(key, math.nan)
            row.append("-" if math.isnan(value) else f"{value:{form}} {unit}".strip())
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
    print()


def plot_curve(path: Path, figures: dict[str, dict]):
    """What meaning costs: PSNR against the probes' accuracy, a line for each quantizer, a point for each PREDICT_WEIGHT.

    Baselines from scratch, which predict no features, have no place in it, nor has an untrained predictor (weight 0).
    """
    figures = {name: values for name, values in figures.items() if {"predict_weight", "probe_z_q"} <= values.keys()}
    if not figures:
        return print("no curve: no checkpoint here predicts features with a PREDICT_WEIGHT of its own")
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, key, title in zip(figure.subplots(1, 2, sharex=True, sharey=True), ("probe_z_q", "probe_predicted"), ("z_q", "features predicted from the tokens")):
        axes.set(xlabel="PSNR, dB", ylabel="accuracy of a linear probe", title=title)
        axes.axhline(max(values["probe_z"] for values in figures.values()), color="grey", linestyle=":", label="the encoder's own features")
        for quantizer in dict.fromkeys(values["quantizer"] for values in figures.values()):
            points = sorted((v["predict_weight"], v["psnr"], v[key]) for v in figures.values() if v["quantizer"] == quantizer and key in v)
            axes.plot([p[1] for p in points], [p[2] for p in points], marker="o", label=quantizer)
            for weight, *place in points:
                axes.annotate(f"{weight:g}", place, xytext=(5, -11), textcoords="offset points", fontsize=8)  # below the dotted line
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(title="at each point its PREDICT_WEIGHT")
    save_figure(path, figure)


def ship(path: Path) -> Path:
    """A copy in 16-bit numbers, half the size, as checkpoints/pretrained/vqrae_<quantizer>.pt"""
    content = load_torch(path)
    if "constants" in content:
        content["constants"]["DATASET"] = content["metrics"]["dataset"]  # rather than a folder of this machine's
    content["model"] = {name: value.half() if value.is_floating_point() else value for name, value in content["model"].items()}
    copy = PRETRAINED_DIR / f"vqrae_{content['config']['quantizer']}.pt"
    save_torch(copy, content)
    return copy


def compare(figures: dict[str, dict], record: dict, hashes: dict):
    """Say where figures are not those that were recorded when the checkpoints were shipped."""
    shipped = sorted(figures.keys() & record["figures"].keys())
    if shipped and record["images"] != hashes:
        return print(f"not compared with recorded figures, which are of other images: {record['images']}")
    failed = False
    for name in shipped:
        differ = [f"{key} is {figures[name].get(key, math.nan):.4f} and was {was:.4f}" for key, was in record["figures"][name].items()
                  if key in TOLERANCE and not abs(figures[name].get(key, math.nan) - was) <= TOLERANCE[key]]
        print(f"{name}: " + ("; ".join(differ) if differ else "as recorded"))
        failed = failed or bool(differ)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError:
        sys.exit("evaluate.py: the GPU's memory is full: try less BATCH_SIZE")
