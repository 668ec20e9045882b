"""Measure checkpoints: how well their tokens keep the image, and what it shows.

    python evaluate.py                                        the shipped ones, compared with their recorded figures
                                                              where the images are the same (see RESULTS.md)
    python evaluate.py checkpoints/<run>/fsq_stage*_best.pt   your own; with NAME=value for the constants below

Prints a table of reconstructions and one of tokens, measured in fp32. LPIPS and rFID are torchmetrics' own, and "-"
where their networks cannot be had; two distances in the shipped encoder's features need no download.
"""
import hashlib
import importlib.util
import json
import math
import re
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

DATASET = "cifar10"  # the same names as in train.py
TRAIN_IMAGES = None  # training images that probes learn from and usage is counted over; None: all
BATCH_SIZE = 250
CURVE = None  # a path: plot PSNR against probes there, a line for each quantizer, a point for each PREDICT_WEIGHT
SHIP = False  # True: put 16-bit copies into checkpoints/pretrained and record their figures there

device = "cuda" if torch.cuda.is_available() else "cpu"
RECORDS = PRETRAINED_DIR / "results.json"  # {checkpoint: {"images": hash of each split, "figures": {name: value}}}
# how far a figure may be from its record, a perplexity relative to it; figures that are not here must be equal
TOLERANCE = {"psnr": 0.01, "ssim": 0.001, "lpips": 0.001, "rfid": 0.02, "frechet": 0.001, "feature_distance": 0.0001,
             "usage": 0.001, "perplexity": 0.001, "train_usage": 0.001, "train_perplexity": 0.001,
             "probe_z": 0.001, "probe_z_q": 0.001, "probe_predicted": 0.001}
IMAGE_COLUMNS = {"PSNR": "psnr:.2f", "SSIM": "ssim:.4f", "LPIPS": "lpips:.4f", "rFID": "rfid:.2f",
                 "Fréchet distance, encoder": "frechet:.3f", "feature distance": "feature_distance:.4f"}
TOKEN_COLUMNS = {"tokens": "tokens:d", "bits": "bits:.0f",
                 "usage, test": "usage:.1%", "perplexity, test": "perplexity:,.0f",
                 "usage, training": "train_usage:.1%", "perplexity, training": "train_perplexity:,.0f",
                 "probe z": "probe_z:.1%", "probe z_q": "probe_z_q:.1%", "probe predicted": "probe_predicted:.1%",
                 "quantizer": "quantizer_kb:,.0f kB", "images/s": "images_per_second:,.0f"}


def main():
    torch.backends.cudnn.allow_tf32 = False  # fp32 on a GPU, too
    try:
        paths, data, records = set_up()
    except torch.OutOfMemoryError:  # a RuntimeError, but no mistake in the arguments
        raise
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    if SHIP:
        paths = [ship(path) for path in paths]
    checkpoints = name_checkpoints(paths)
    hashes = {split: hashlib.sha256(images.numpy()).hexdigest()[:12]
              for split, images in (("training", data.train_images), ("test", data.test_images))}
    data = data._replace(test_images=data.test_images.to(device))  # the training images may be too many
    reference_encoder = build_encoder("cifar", 8).eval().to(device)

    figures = {name: measure(path, data, reference_encoder) for name, path in checkpoints.items()}
    each = dict.fromkeys(key for values in figures.values() for key in values if key.startswith("perplexity_"))
    columns_of_each = {f"{key.replace('_', ' ')}, test": f"{key}:,.0f" for key in each}  # of several codebooks
    for columns in (IMAGE_COLUMNS, TOKEN_COLUMNS | columns_of_each):
        print_table(figures, columns)
    print(f"{data.name}: {len(data.train_images):,} training images (sha256 {hashes['training']}...) and "
          f"{len(data.test_images):,} test images ({hashes['test']}...)")
    if SHIP:
        records |= {name: {"images": hashes, "figures": values} for name, values in figures.items()}
        write_file(RECORDS, json.dumps(records, indent=2).encode())
    if CURVE:
        plot_curve(Path(CURVE), figures)
    shipped = [name for name, path in checkpoints.items() if path.resolve().parent == PRETRAINED_DIR and not SHIP]
    if not all([compare(name, figures[name], records, hashes) for name in shipped]):
        sys.exit(1)


def set_up() -> tuple[list[Path], Dataset, dict]:
    """The checkpoints and constants of the command line, checked, with the dataset and the recorded figures."""
    constants = [argument for argument in sys.argv[1:] if re.match("[A-Z_]+=", argument)]
    paths = [Path(argument) for argument in sys.argv[1:] if argument not in constants]
    read_constants(globals(), constants)
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    check(type(BATCH_SIZE) is int and BATCH_SIZE >= 1, "BATCH_SIZE", BATCH_SIZE, "a whole number of 1 or more")
    check(TRAIN_IMAGES is None or type(TRAIN_IMAGES) is int and TRAIN_IMAGES >= 2, "TRAIN_IMAGES", TRAIN_IMAGES,
          "None or 2 or more")
    check(isinstance(SHIP, bool) and not (SHIP and TRAIN_IMAGES), "SHIP", SHIP,
          "False, or True with TRAIN_IMAGES = None")
    paths = paths or sorted(PRETRAINED_DIR.glob("vqrae_*.pt"))
    check(paths, "checkpoints", str(PRETRAINED_DIR), "vqrae_*.pt there, or paths as arguments")
    configs = {str(path): load_checkpoint(path).config for path in paths}  # finds a broken file before measuring others
    sizes = {path: config["image_size"] for path, config in configs.items()}
    check(len(set(sizes.values())) == 1, "checkpoints", sizes, "images of one size")
    quantizers = {path: config["quantizer"] for path, config in configs.items()}
    check(not SHIP or len(set(quantizers.values())) == len(paths), "checkpoints", quantizers,
          "with SHIP = True, one of each quantizer")
    data = load_dataset(DATASET, sizes[str(paths[0])])
    if TRAIN_IMAGES:
        labels = None if data.train_labels is None else data.train_labels[:TRAIN_IMAGES]
        data = data._replace(train_images=data.train_images[:TRAIN_IMAGES], train_labels=labels)
    check(min(len(data.train_images), len(data.test_images)) >= 2, "DATASET", DATASET,
          "two images or more in each split: a probe and a Fréchet distance need a variance")
    is_file_name = isinstance(CURVE, str) and not Path(CURVE).is_dir()
    check(CURVE is None or is_file_name and data.train_labels is not None, "CURVE", CURVE,
          "None, or a file's path where images have classes to probe")
    return paths, data, records


def name_checkpoints(paths: list[Path]) -> dict[str, Path]:
    """Each checkpoint by its name in the tables: of a shipped one the file's, of others encoder, quantizer and stage.

    Where an earlier one has that name, the constants in which this one differs from it follow: "cifar fsq, stage 1",
    then "cifar fsq, stage 1, SEED=1". If that name is taken, too, or no constant differs, the path is the name.
    """
    checkpoints, constants = {}, {}
    for path in paths:
        content = load_torch(path)
        constants[path] = content.get("constants", {})
        config = content["config"]
        name = f"{config['encoder']} {config['quantizer']}, stage {content['stage']}"
        if path.resolve().parent == PRETRAINED_DIR:
            name = path.stem
        if name in checkpoints:
            earlier = constants[checkpoints[name]]
            name += "".join(f", {k}={v}" for k, v in constants[path].items() if v != earlier.get(k))
        checkpoints[str(path) if name in checkpoints else name] = path
    return checkpoints


def measure(path: Path, data: Dataset, reference_encoder: nn.Module) -> dict:
    """All figures that one checkpoint can have. reference_encoder: the shipped one, for distances in its features."""
    model, content = load_checkpoint(path).to(device), load_torch(path)
    train, test = tokenize(model, data.train_images, path.name), tokenize(model, data.test_images, path.name)
    metrics, _, reconstructions = evaluate(model, data.test_images, BATCH_SIZE, test["indices"])
    figures = {"tokens": model.config["grid"] ** 2, **metrics}
    if model.quantizer.codebook_size:
        figures["bits"] = figures["tokens"] * math.log2(model.quantizer.codebook_size)
        _, figures["train_usage"], figures["train_perplexity"] = model.get_codebook_usage(train["indices"])
    else:
        del figures["usage"], figures["perplexity"]
    figures["quantizer_kb"] = sum(t.nbytes for t in [*model.quantizer.parameters(), *model.quantizer.buffers()]) / 1e3
    for key in ("images_per_second", "pictures_per_second"):  # older checkpoints, such as the shipped, have the second
        if key in content.get("metrics", {}):
            figures["images_per_second"] = content["metrics"][key]
    figures["quantizer"] = model.config["quantizer"]
    if "constants" in content and not model.from_scratch:
        figures["predict_weight"] = content["constants"]["PREDICT_WEIGHT"]

    figures |= measure_distances(data.test_images, reconstructions, reference_encoder)
    if data.train_labels is not None:
        train_labels, test_labels = data.train_labels.to(device), data.test_labels.to(device)
        untrained = {"predicted"} if figures.get("predict_weight") == 0 else set()
        for name in train.keys() - {"indices"} - untrained:
            figures[f"probe_{name}"] = linear_probe(train[name], train_labels, test[name], test_labels)
    return figures


@torch.no_grad()
def tokenize(model: VQRAE, images: Tensor, name: str) -> dict[str, Tensor]:
    """The indices (N, h, w) of uint8 images (N, 3, H, W), and each one's means (N, C) of its features z, of z_q and,
    where the model has a predictor, of the features predicted from z_q."""
    outputs = []
    for batch in tqdm(images.split(BATCH_SIZE), f"tokenizing for {name}", leave=False):
        z = model.encoder(to_float(batch.to(device)))
        z_q, _, indices = model.quantize(z)
        outputs.append({"indices": indices, "z": z.mean((2, 3)), "z_q": z_q.mean((2, 3))})
        if not model.from_scratch:
            outputs[-1]["predicted"] = model.predict_features(z_q).mean((2, 3))
    return {key: torch.cat([output[key] for output in outputs]) for key in outputs[0]}


@torch.no_grad()
def measure_distances(originals: Tensor, reconstructions: Tensor, reference_encoder: nn.Module) -> dict[str, float]:
    """Between uint8 images (N, 3, H, W): LPIPS and rFID where they can be had; in features of reference_encoder, the
    Fréchet distance of their means over an image and the mean squared distance of the features themselves."""
    pairs = list(zip(originals.split(BATCH_SIZE), reconstructions.split(BATCH_SIZE)))
    identity = nn.Identity()  # torchmetrics is given features instead of images
    identity.num_features = reference_encoder.dim
    frechet, total = FrechetInceptionDistance(identity).to(device), 0
    for pair in pairs:
        z = [reference_encoder(to_float(images)) for images in pair]
        frechet.update(z[0].mean((2, 3)), real=True)
        frechet.update(z[1].mean((2, 3)), real=False)
        total = total + F.mse_loss(*z) * len(z[0])
    figures = {"frechet": frechet.compute().item(), "feature_distance": total.item() / len(originals)}
    if inception_available():
        try:
            rfid = FrechetInceptionDistance(2048)
        except (OSError, RuntimeError) as error:  # a download that breaks off, or a file that is not what it should be
            print(f"no rFID: {error}")
        else:
            rfid = rfid.to(device)
            for original, reconstruction in pairs:
                rfid.update(original, real=True)
                rfid.update(reconstruction, real=False)
            figures["rfid"] = rfid.compute().item()
    try:
        lpips = load_lpips()
    except RuntimeError as error:
        reason, *_ = str(error).split(";")  # what follows is how to train without it
        print(f"no LPIPS: {reason}")
    else:  # outside of `try`: a full GPU memory is a RuntimeError, too
        lpips = lpips.to(device)
        sums = [lpips(to_float(a), to_float(b), normalize=True).sum() for a, b in pairs]
        figures["lpips"] = sum(sums).item() / len(originals)
    return figures


def inception_available() -> bool:
    """Whether FID's own Inception network is installed (torch-fidelity), with weights on disk or within reach."""
    if importlib.util.find_spec("torch_fidelity") is None:
        print("no rFID: torchmetrics computes it with torch-fidelity, which is not installed")
        return False
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    weights = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)
    if weights.exists() or reachable(URL_INCEPTION_V3):
        return True
    print(f"no rFID: {URL_INCEPTION_V3} cannot be reached")
    return False


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
    """PSNR against the accuracy of the probes: a line for each quantizer, a point for each PREDICT_WEIGHT.

    Left out are baselines from scratch, which predict no features, and predictors of weight 0, which learned nothing.
    """
    figures = {name: values for name, values in figures.items() if {"predict_weight", "probe_z_q"} <= values.keys()}
    if not figures:
        return print("no curve: no checkpoint here predicts features with a PREDICT_WEIGHT of its own")
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    titles = {"probe_z_q": "z_q", "probe_predicted": "features predicted from the tokens"}
    for axes, (key, title) in zip(figure.subplots(1, 2, sharex=True, sharey=True), titles.items()):
        axes.set(xlabel="PSNR, dB", ylabel="accuracy of a linear probe", title=title)
        best = max(values["probe_z"] for values in figures.values())
        axes.axhline(best, color="grey", linestyle=":", label="the encoder's own features")
        for quantizer in dict.fromkeys(values["quantizer"] for values in figures.values()):
            points = sorted((values["predict_weight"], values["psnr"], values[key])
                            for values in figures.values() if values["quantizer"] == quantizer and key in values)
            axes.plot([point[1] for point in points], [point[2] for point in points], marker="o", label=quantizer)
            for weight, *xy in points:  # below its point, and so below the dotted line
                axes.annotate(f"{weight:g}", xy, xytext=(5, -11), textcoords="offset points", fontsize=8)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(title="at each point its PREDICT_WEIGHT")
    save_figure(path, figure)


def ship(path: Path) -> Path:
    """A copy with 16-bit weights, half the size, as checkpoints/pretrained/vqrae_<quantizer>.pt"""
    content = load_torch(path)
    if "constants" in content:
        content["constants"]["DATASET"] = content["metrics"]["dataset"]  # instead of a path on this machine
    content["model"] = {name: value.half() if value.is_floating_point() else value
                        for name, value in content["model"].items()}
    copy = PRETRAINED_DIR / f"vqrae_{content['config']['quantizer']}.pt"
    save_torch(copy, content)
    return copy


def compare(name: str, figures: dict, records: dict, hashes: dict) -> bool:
    """Print where a shipped checkpoint's figures differ from its record, unless that is of other images.

    False where they differ or there is no record. Figures that only one of both has, such as an LPIPS that cannot be
    had here, are named.
    """
    if name not in records:
        print(f"{name}: not compared, it has no record in {RECORDS.name}")
        return False
    if records[name]["images"] != hashes:
        print(f"{name}: not compared, its record is of other images: {records[name]['images']}")
        return True
    recorded, differences = records[name]["figures"], []
    unavailable = {"lpips", "rfid"} & (recorded.keys() - figures.keys())
    for key in [key for key in recorded if key not in unavailable]:
        was, value = recorded[key], figures.get(key, math.nan)
        base = key.rstrip("_0123456789")  # of one codebook: perplexity_1
        tolerance = TOLERANCE.get(base, 0) * (was if base.endswith("perplexity") else 1)
        if value != was and not (tolerance and abs(value - was) <= tolerance):
            differences.append(f"{key} is {value} and was {was}")
    verdict = "; ".join(differences) or "as recorded"
    uncompared = sorted(unavailable | figures.keys() - recorded.keys())
    print(f"{name}: {verdict}" + "".join(f", {key} not compared" for key in uncompared))
    return not differences


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError:
        sys.exit("evaluate.py: the GPU's memory is full: try less BATCH_SIZE")
