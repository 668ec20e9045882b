"""Measure checkpoints: how well their tokens keep the image, and what it shows.

    python evaluate.py                                        the shipped ones, compared with their recorded figures
                                                              where the images are the same (see RESULTS.md)
    python evaluate.py checkpoints/<run>/fsq_stage*_best.pt   your own; with NAME=value for the constants below
    python evaluate.py CODECS=outputs/codecs.png              with JPEG, WebP and AVIF at the same bits beside them
    python evaluate.py CODECS=... PRIOR=<prior.pt>            and the bits that tokens take under what generate.py made
    python evaluate.py DEPTHS=outputs/depths.png <checkpoint>     from the first few of residual codebooks, too
    python evaluate.py SEARCH=16                              of tokens that search.py improves: takes hours, and
                                                              once stopped the same command goes on
    python evaluate.py SEARCH=16 IMAGE_WEIGHT=10              the same, keeping what they tell of a whole image

Prints a table of reconstructions and one of tokens, measured in fp32. LPIPS and rFID are torchmetrics' own, and "-"
where their networks cannot be had; two distances in the shipped encoder's features need no download.
"""
import bisect
import functools
import hashlib
import importlib.util
import io
import json
import math
import re
import sys
from collections.abc import Callable
from errors import one_line_errors
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageFile
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from downloads import reachable
from models import PRETRAINED_DIR, VQRAE, build_encoder
from plots import save_figure
from prior import load_prior, measure_bits
from quantizers import check
from search import search_dataset
from utils import (
    Dataset,
    checkpoint_version,
    evaluate,
    find_images,
    hash_file,
    load_checkpoint,
    load_dataset,
    load_lpips,
    load_torch,
    not_in_names,
    psnr,
    read_constants,
    save_torch,
    ssim,
    to_float,
    write_file,
)

DATASET = "cifar10"  # one of the names in train.py; of a checkpoint of several IMAGE_SIZEs, in the smallest
TRAIN_IMAGES = None  # training images that probes learn from and usage is counted over; None: all
BATCH_SIZE = 250
CODECS = None  # a path: plot PSNR over bits an image there, of the checkpoints and of JPEG, WebP and AVIF
PRIOR = None  # with CODECS, a path: a prior that generate.py made, with which its tokenizer's tokens take fewer bits
DEPTHS = None  # a path: draw images there from the first of residual codebooks, the first two and so on
SEARCH = 0  # sweeps of search.py over the test images' tokens; 0: the encoder's own, which probes always learn from
IMAGE_WEIGHT = 0.0  # of search.py: 10 keeps what an image's mean features tell, for some PSNR
SHIP = False  # True: put 8-bit copies into checkpoints/pretrained and record their figures there

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # all figures of this file are of fp32, on a GPU, too
montage_side = 31  # images a side, at most, of the picture that codecs get: they have a largest size
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
RATE_COLUMNS = {"bits an image": "bits:,.0f", "PSNR": "psnr:.2f", "SSIM": "ssim:.4f"}
DEPTH_COLUMNS = {"bits a token": "bits:.1f", "PSNR": "psnr:.2f", "SSIM": "ssim:.4f"}
CODEC_OPTIONS = {"JPEG": {"optimize": True, "progressive": True, "subsampling": "4:4:4"},  # Pillow's, besides quality
                 "WebP": {"method": 6},
                 "AVIF": {"subsampling": "4:4:4", "speed": 2, "advanced": {"tune": "psnr"}}}  # 0.5 dB over its defaults
# codecs that learned on CIFAR-10, on its original test images, as published: bits an image and PSNR
PUBLISHED = {"BMS hyperprior (by 2201.12904)": ((764, 26.83), (1139, 29.50)),
             "CST (by 2201.12904)": ((568, 24.53), (1352, 31.82)),
             "RECOMBINER (2309.17182)": ((896, 28.1), (1024, 28.8))}


def main():
    with one_line_errors(ValueError, RuntimeError, OSError):
        checkpoints, data, records = set_up()
    hashes = {split: hashlib.sha256(images.numpy()).hexdigest()[:12]
              for split, images in (("training", data.train_images), ("test", data.test_images))}
    data = data._replace(test_images=data.test_images.to(device))  # the training images may be too many
    networks = load_networks(data.test_images.shape[-1])

    figures, reconstructions, indices = {}, {}, {}
    for name, path in checkpoints.items():
        figures[name], images, indices[name] = measure(path, data, networks)
        reconstructions[name] = images[: montage_side**2].cpu().clone()  # not a view of all of them
    each = dict.fromkeys(key for values in figures.values() for key in values if key.startswith("perplexity_"))
    columns_of_each = {f"{key.replace('_', ' ')}, test": f"{key}:,.0f" for key in each}  # of several codebooks
    for columns in (IMAGE_COLUMNS, TOKEN_COLUMNS | columns_of_each):
        print(format_table(figures, columns), end="\n\n")
    if SEARCH:
        print(f"of tokens from search.py, {SEARCH} sweeps with IMAGE_WEIGHT = {IMAGE_WEIGHT}; usage in training images "
              "and probes from the encoder's\n")
    print(f"{data.name}: {len(data.train_images):,} training images (sha256 {hashes['training']}...) and "
          f"{len(data.test_images):,} test images ({hashes['test']}...)")
    if SHIP:
        records |= {name: {"images": hashes, "figures": values} for name, values in figures.items()}
        write_file(RECORDS, json.dumps(records, indent=2).encode())
    if CODECS:
        count, suffix = montage_width(data.test_images) ** 2, ", searched" if SEARCH else ""
        bits = {name + suffix: figures[name].get("bits") for name in figures}
        reconstructions = {name + suffix: images for name, images in reconstructions.items()}
        for name, path in checkpoints.items() if SEARCH else ():  # beside them, the encoder's own tokens
            *_, images = evaluate(load_checkpoint(path).to(device), data.test_images[:count], BATCH_SIZE)
            bits[name], reconstructions[name] = bits[name + suffix], images.cpu()
        if PRIOR:
            name, prior = find_tokenizer(checkpoints), load_prior(PRIOR).to(device)
            shown, no_class = f"{name}{suffix}, with its prior", torch.full((count,), prior.classes)
            bits[shown] = measure_bits(prior, indices[name][:count], no_class)
            reconstructions[shown] = reconstructions[name + suffix]
        compare_codecs(Path(CODECS), data, reconstructions, bits)
    if DEPTHS:
        compare_depths(Path(DEPTHS), data, checkpoints, indices)
    shipped = [name for name, path in checkpoints.items() if path.resolve().parent == PRETRAINED_DIR]
    if not (SHIP or SEARCH or all([compare(name, figures[name], records, hashes) for name in shipped])):
        sys.exit(1)


def set_up() -> tuple[dict[str, Path], Dataset, dict]:
    """The checkpoints, by name, and constants of the command line, checked, with the dataset and the recorded figures.
    With SHIP, the checkpoints are those in checkpoints/pretrained, just written."""
    paths = read_arguments(globals())
    try:
        records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    except ValueError as error:
        raise ValueError(f"{RECORDS} cannot be read: {error}") from None
    check(type(BATCH_SIZE) is int and BATCH_SIZE >= 1, "BATCH_SIZE", BATCH_SIZE, "a whole number of 1 or more")
    check(TRAIN_IMAGES is None or type(TRAIN_IMAGES) is int and TRAIN_IMAGES >= 2, "TRAIN_IMAGES", TRAIN_IMAGES,
          "None or 2 or more")
    check(isinstance(SHIP, bool) and not (SHIP and (TRAIN_IMAGES or SEARCH or PRIOR)), "SHIP", SHIP,
          "False, or True with TRAIN_IMAGES = None, SEARCH = 0 and PRIOR = None")
    check(type(SEARCH) is int and SEARCH >= 0, "SEARCH", SEARCH, "a whole number of 0 or more")
    check(type(IMAGE_WEIGHT) in (int, float) and 0 <= IMAGE_WEIGHT <= (1e6 if SEARCH else 0), "IMAGE_WEIGHT",
          IMAGE_WEIGHT, "0 to 1e6, 0 without SEARCH")
    for name, path in (("CODECS", CODECS), ("DEPTHS", DEPTHS)):
        valid = path is None or isinstance(path, str) and path.endswith(".png") and not Path(path).is_dir()
        check(valid, name, path, "None, or the path of a .png")
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)  # where that fails, before anything is measured
    check(CODECS is None or CODECS != DEPTHS, "DEPTHS", DEPTHS, "another file than CODECS")
    configs = {str(path): load_checkpoint(path).config for path in paths}  # finds a broken file before measuring others
    sizes = {path: config["image_size"] for path, config in configs.items()}
    check(len(set(sizes.values())) == 1, "checkpoints", sizes, "images of one size")
    quantizers = {path: config["quantizer"] for path, config in configs.items()}
    check(not SHIP or len(set(quantizers.values())) == len(paths), "checkpoints", quantizers,
          "with SHIP = True, one of each quantizer")
    data = limit_training(load_dataset(DATASET, sizes[str(paths[0])]), TRAIN_IMAGES)
    check(min(len(data.train_images), len(data.test_images)) >= 2, "DATASET", DATASET,
          "two images or more in each split: a probe and a Fréchet distance need a variance")
    if PRIOR is not None:
        check(CODECS is not None and isinstance(PRIOR, str), "PRIOR", PRIOR, "None, or with CODECS a path")
        load_prior(PRIOR)
    checkpoints = name_checkpoints([ship(path) for path in paths] if SHIP else paths)
    if PRIOR is not None:
        find_tokenizer(checkpoints)
    return checkpoints, data, records


def read_arguments(constants: dict) -> list[Path]:
    """Take a script's `constants` from the command line. Returns the paths of checkpoints there, or those that ship."""
    given = [argument for argument in sys.argv[1:] if re.match("[A-Z_]+=", argument)]
    read_constants(constants, given)
    paths = [Path(argument) for argument in sys.argv[1:] if argument not in given]
    paths = paths or sorted(PRETRAINED_DIR.glob("vqrae_*.pt"))
    check(paths, "checkpoints", str(PRETRAINED_DIR), "vqrae_*.pt there, or paths as arguments")
    return paths


def name_checkpoints(paths: list[Path]) -> dict[str, Path]:
    """Each checkpoint by its name in the tables: of a shipped one the file's, of others encoder, quantizer and stage.

    Where an earlier one has that name, the constants in which this one differs from it follow: "cifar fsq, stage 1",
    then "cifar fsq, stage 1, SEED=1". If that name is taken, too, or no constant differs, the path is the name.
    """
    checkpoints, constants = {}, {}
    for path in paths:
        content = load_torch(path, "config", "stage", "model")
        constants[path] = content.get("constants", {})
        config = content["config"]
        name = f"{config['encoder']} {config['quantizer']}, stage {content['stage']}"
        if path.resolve().parent == PRETRAINED_DIR:
            name = path.stem
        if name in checkpoints:
            earlier = constants[checkpoints[name]]
            name += "".join(f", {k}={v}" for k, v in constants[path].items()
                            if k not in not_in_names and v != earlier.get(k))
        checkpoints[str(path) if name in checkpoints else name] = path
    return checkpoints


def find_tokenizer(checkpoints: dict[str, Path]) -> str:
    """The name of the one that PRIOR was trained for."""
    trained_for = load_torch(PRIOR, "prior", "constants")["constants"].get("tokenizer")
    for name, path in checkpoints.items():
        if hash_file(path) == trained_for:
            return name
    raise ValueError(f"PRIOR = {PRIOR!r}, allowed: one that was trained for one of {', '.join(checkpoints)}")


def limit_training(data: Dataset, count: int | None) -> Dataset:
    """The dataset with its first `count` training images; None: all."""
    labels = None if data.train_labels is None else data.train_labels[:count]
    return data._replace(train_images=data.train_images[:count], train_labels=labels)


def reference_encoder(image_size: int) -> nn.Module:
    """What distances between images are measured with: the shipped encoder, with which most models are trained."""
    return build_encoder("cifar", max(1, image_size // 8)).eval().to(device)


@torch.no_grad()
def pooled_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W) -> the mean of each one's features (N, C)"""
    batches = tqdm(images.split(BATCH_SIZE), "encoding", leave=False)
    return torch.cat([encoder(to_float(batch.to(device))).mean((2, 3)) for batch in batches])


def load_networks(image_size: int) -> dict[str, nn.Module]:
    """What distances between images are measured with: an "encoder", the same in all tables, and, where they can be
    had, "lpips" and "rfid"."""
    def load_inception() -> nn.Module:
        if importlib.util.find_spec("torch_fidelity") is None:
            raise RuntimeError("torchmetrics computes it with torch-fidelity, which is not installed")
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        weights = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)
        if not weights.exists() and not reachable(URL_INCEPTION_V3):
            raise RuntimeError(f"{URL_INCEPTION_V3} cannot be reached")
        return FrechetInceptionDistance(2048)

    networks = {"encoder": reference_encoder(image_size)}
    for name, load in (("rFID", load_inception), ("LPIPS", load_lpips)):
        try:
            networks[name.lower()] = load()
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError) as error:  # also a download that breaks off, or a file that is not what it was
            reason, *_ = str(error).split(";")  # what follows is how to train without it
            print(f"no {name}: {reason}")
    return {name: network.to(device) for name, network in networks.items()}


def measure(path: Path, data: Dataset, networks: dict[str, nn.Module]) -> tuple[dict, Tensor, Tensor]:
    """All figures that one checkpoint can have, and of the test images its reconstructions (N, 3, H, W), uint8, and
    indices (N, h, w). networks: those of load_networks."""
    model, content = load_checkpoint(path).to(device), load_torch(path)
    predict_weight = content.get("constants", {}).get("PREDICT_WEIGHT")  # 0: the predictor learned nothing
    train = tokenize(model, data.train_images, path.name)
    test = tokenize(model, data.test_images, path.name, SEARCH, 0.0 if predict_weight == 0 else 5e-4)
    metrics, _, reconstructions = evaluate(model, data.test_images, BATCH_SIZE, test["indices"])
    figures = {"tokens": model.config["grid"] ** 2, **metrics}
    if model.quantizer.codebook_size:
        figures["bits"] = figures["tokens"] * math.log2(model.quantizer.codebook_size)
        _, figures["train_usage"], figures["train_perplexity"] = model.get_codebook_usage(train["indices"])
    else:
        del figures["usage"], figures["perplexity"]
    figures["quantizer_kb"] = sum(t.nbytes for t in [*model.quantizer.parameters(), *model.quantizer.buffers()]) / 1e3
    if "images_per_second" in content.get("metrics", {}):
        figures["images_per_second"] = content["metrics"]["images_per_second"]
    figures["quantizer"] = model.config["quantizer"]
    if predict_weight is not None and not model.from_scratch:
        figures["predict_weight"] = predict_weight

    figures |= measure_distances(data.test_images, reconstructions, networks) if networks else {}
    if data.train_labels is not None:
        train_labels, test_labels = data.train_labels.to(device), data.test_labels.to(device)
        untrained = {"predicted"} if figures.get("predict_weight") == 0 else set()
        for name in train.keys() - {"indices"} - untrained:
            figures[f"probe_{name}"] = linear_probe(train[name], train_labels, test[name], test_labels)
    return figures, reconstructions, test["indices"]


@torch.no_grad()
def tokenize(model: VQRAE, images: Tensor, name: str, sweeps: int = 0,
             feature_weight: float = 5e-4) -> dict[str, Tensor]:
    """The indices (N, h, w) of uint8 images (N, 3, H, W), and each one's means (N, C) of its features z, of z_q and,
    where the model has a predictor, of the features predicted from z_q. sweeps, feature_weight: of search.py."""
    batches, outputs = images.split(BATCH_SIZE), []
    searched = [None] * len(batches)
    if sweeps and model.quantizer.codebook_size:
        searched = search_dataset(model, images, sweeps, feature_weight, IMAGE_WEIGHT).split(BATCH_SIZE)
    for batch, indices in zip(tqdm(batches, f"tokenizing for {name}", leave=False), searched):
        z = model.encoder(to_float(batch.to(device)))
        if indices is None:
            z_q, _, indices = model.quantize(z)
        else:
            z_q = model.quantizer.indices_to_codes(indices)
        outputs.append({"indices": indices, "z": z.mean((2, 3)), "z_q": z_q.mean((2, 3))})
        if not model.from_scratch:
            outputs[-1]["predicted"] = model.predict_features(z_q).mean((2, 3))
    return {key: torch.cat([output[key] for output in outputs]) for key in outputs[0]}


@torch.no_grad()
def measure_distances(originals: Tensor, reconstructions: Tensor, networks: dict[str, nn.Module]) -> dict[str, float]:
    """Between uint8 images (N, 3, H, W): LPIPS and rFID where `networks` has theirs; in features of its "encoder", the
    Fréchet distance of their means over an image and the mean squared distance of the features themselves."""
    pairs = list(zip(originals.split(BATCH_SIZE), reconstructions.split(BATCH_SIZE)))
    means, total = ([], []), 0
    for pair in pairs:
        z = [networks["encoder"](to_float(images)) for images in pair]
        for features, of_images in zip(means, z):
            features.append(of_images.mean((2, 3)))
        total = total + F.mse_loss(*z) * len(z[0])
    figures = {"frechet": frechet_distance(*map(torch.cat, means)), "feature_distance": total.item() / len(originals)}
    if "rfid" in networks:
        networks["rfid"].reset()
        for original, reconstruction in pairs:
            networks["rfid"].update(original, real=True)
            networks["rfid"].update(reconstruction, real=False)
        figures["rfid"] = networks["rfid"].compute().item()
    if "lpips" in networks:
        sums = [networks["lpips"](to_float(a), to_float(b), normalize=True).sum() for a, b in pairs]
        figures["lpips"] = sum(sums).item() / len(originals)
    return figures


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Between features (N, C) and (M, C), both N and M at least 2."""
    identity = nn.Identity()  # torchmetrics is given features instead of images
    identity.num_features = real.shape[1]
    distance = FrechetInceptionDistance(identity).to(real.device)
    distance.update(real, real=True)
    distance.update(generated, real=False)
    return distance.compute().item()


def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Test accuracy in [0, 1] of logistic regression on standardised features x (N, C) with labels y (N,). A test label
    without training images counts as an error. With one training image or class, every test image is assigned to it."""
    for x, y, name in ((train_x, train_y, "train_x"), (test_x, test_y, "test_x")):
        check(x.ndim == 2 and len(x) == len(y) > 0 and x.shape[1] == train_x.shape[1], name, tuple(x.shape),
              "(N, C) with a label each, N at least 1")
    mean, std = train_x.mean(0), train_x.std(0, correction=min(1, len(train_x) - 1)) + 1e-6  # one image: 0, not NaN
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    probe = nn.Linear(train_x.shape[1], int(train_y.max()) + 1, device=train_x.device)
    nn.init.zeros_(probe.weight), nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(train_x), train_y) + 1e-4 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (probe(test_x).argmax(1) == test_y).float().mean().item()


def format_table(figures: dict[str, dict], columns: dict[str, str], first: str = "checkpoint") -> str:
    """A Markdown table, aligned; "-" for what could not be measured. first: the heading of the rows' names"""
    rows = [[first, *columns]]
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
    return "\n".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths))} |" for row in rows)


def available_codecs() -> list[str]:
    """Those of CODEC_OPTIONS that Pillow has; the others are named."""
    Image.init()
    for codec in CODEC_OPTIONS:
        if codec.upper() not in Image.SAVE:
            print(f"no {codec}: Pillow was built without it")
    return [codec for codec in CODEC_OPTIONS if codec.upper() in Image.SAVE]


def encode_montage(images: Tensor, codec: str, quality: int) -> tuple[float, Tensor]:
    """Encode n * n uint8 images (n * n, 3, H, W) side by side, as one picture, so that headers do not count. Returns
    bits an image, and the images decoded."""
    n, (height, width), file = math.isqrt(len(images)), images.shape[2:], io.BytesIO()
    montage = Image.fromarray(make_grid(images, n, padding=0).permute(1, 2, 0).numpy())
    ImageFile.MAXBLOCK = max(ImageFile.MAXBLOCK, 8 * montage.width * montage.height)  # else noise fails as a JPEG
    montage.save(file, codec, quality=quality, **CODEC_OPTIONS[codec])
    decoded = pil_to_tensor(Image.open(file).convert("RGB")).unflatten(2, (n, width)).unflatten(1, (n, height))
    return 8 * file.getbuffer().nbytes / len(images), decoded.permute(1, 3, 0, 2, 4).flatten(0, 1)


def nearest_quality(encode: Callable[[int], tuple[float, Tensor]], bits: float) -> int:
    """The quality from 1 to 100 at which encode's bits are nearest `bits`, by bisection: they grow with the quality."""
    above = 1 + bisect.bisect_left(range(1, 101), bits, key=lambda quality: encode(quality)[0])
    return min({max(above - 1, 1), min(above, 100)}, key=lambda quality: abs(encode(quality)[0] - bits))


def montage_width(images: Tensor) -> int:
    """How many of these images (N, 3, H, W) stand side by side, and one below the other, in a codec's picture"""
    return min(montage_side, 16383 // images.shape[-1], math.isqrt(len(images)))  # 16383: WebP's limit


def compare_codecs(path: Path, data: Dataset, reconstructions: dict[str, Tensor], bits: dict[str, float | None]):
    """Print PSNR and SSIM of checkpoints, by name, and of each codec at their bits an image, and plot PSNR over bits.
    reconstructions (N, 3, H, W), uint8, of the first test images; bits: None without a quantizer, and then left out"""
    names = [name for name, value in bits.items() if value]
    if not names:
        return print("no codecs: no checkpoint here has a quantizer")
    n = montage_width(data.test_images)
    originals = data.test_images[: n * n].cpu()

    def distortion(images: Tensor) -> dict[str, float]:
        pairs = [(to_float(a), to_float(b)) for a, b in zip(images.split(BATCH_SIZE), originals.split(BATCH_SIZE))]
        return {f.__name__: torch.cat([f(*pair) for pair in pairs]).mean().item() for f in (psnr, ssim)}

    rows = {name: {"bits": bits[name], **distortion(reconstructions[name][: n * n])} for name in names}
    low, high = min(bits[name] for name in names), max(bits[name] for name in names)
    targets = sorted({bits[name] for name in names} | {0.6 * low, 0.8 * low, 1.25 * high, 1.6 * high})
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    for codec in available_codecs():
        encode, curve = functools.cache(functools.partial(encode_montage, originals, codec)), []
        for target in tqdm(targets, codec, leave=False):
            quality = nearest_quality(encode, target)
            size, decoded = encode(quality)
            curve.append({"bits": size, **distortion(decoded)})
            if low <= target <= high:
                rows[f"{codec}, quality {quality}"] = curve[-1]
        axes.plot([point["bits"] for point in curve], [point["psnr"] for point in curve], ".-", label=codec)
    for name in names:
        axes.plot(rows[name]["bits"], rows[name]["psnr"], "o", label=name.replace("$", r"\$"))  # no mathematics
    if originals.shape[2:] == (32, 32):
        for (name, points), marker in zip(PUBLISHED.items(), "x+*"):
            axes.plot(*zip(*points), f"k{marker}:", label=f"{name}, as published of originals")
    files = find_images(Path(DATASET, "test")) if data.name.startswith("folder-") else []
    copies = ", JPEG copies: easier than originals" if any(f.suffix.lower() in (".jpg", ".jpeg") for f in files) else ""
    title = f"{n * n:,} test images of {data.name}{copies}"
    axes.set(xlabel="bits an image", ylabel="mean PSNR of an image, dB", title=title)
    figure.legend(fontsize=8, loc="outside right upper")
    print(f"\n{title}; codecs have all of them in one picture:\n\n{format_table(rows, RATE_COLUMNS, 'images from')}\n")
    save_figure(path, figure)


def compare_depths(path: Path, data: Dataset, checkpoints: dict[str, Path], indices: dict[str, Tensor]):
    """Print PSNR and SSIM of the test images, of these indices (N, h, w), from the first of residual codebooks, from
    the first two and so on, and draw the first twelve images."""
    models = {name: load_checkpoint(checkpoint) for name, checkpoint in checkpoints.items()}
    models = {name: model.to(device) for name, model in models.items() if model.quantizer.depths}
    if not models:
        return print("no depths: no checkpoint here has residual codebooks")
    rows, columns = {}, min(12, len(data.test_images))
    figure = Figure(figsize=(12, 5.5 * len(models)), layout="constrained")
    for axes, (name, model) in zip(figure.subplots(len(models), squeeze=False)[:, 0], models.items()):
        images, labels = [data.test_images[:columns].cpu()], ["images"]
        for depth in model.quantizer.depths:
            bits = math.log2(math.prod(model.quantizer.codebook_sizes[:depth]))
            metrics, _, reconstructions = evaluate(model, data.test_images, BATCH_SIZE, indices[name], depth)
            rows[f"{name}, first {depth}"] = {"bits": bits, **metrics}
            images.append(reconstructions[:columns].cpu())
            labels.append(f"{bits:.0f} bits\n{metrics['psnr']:.2f} dB")
        grid = make_grid(torch.cat(images), columns, pad_value=255)
        axes.imshow(grid.permute(1, 2, 0), interpolation="nearest")
        axes.set_yticks([grid.shape[1] * (row + 0.5) / len(labels) for row in range(len(labels))], labels)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_title(f"{name}: bits a token, mean PSNR of {len(data.test_images):,} test images", parse_math=False)
        axes.set_xticks([])
    print(f"\n{format_table(rows, DEPTH_COLUMNS, 'codebooks')}\n")
    save_figure(path, figure)


def ship(path: Path) -> Path:
    """A copy of a third of the size, as checkpoints/pretrained/vqrae_<quantizer>.pt: 8-bit matrices of weights, with a
    scale for each row, and 16-bit numbers elsewhere"""
    content = load_torch(path)
    if "constants" in content:
        content["constants"]["DATASET"] = content["metrics"]["dataset"]  # instead of a path on this machine
    model = load_checkpoint(path)
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
    content |= {"version": checkpoint_version, "model": model.state_dict(), "config": model.config}
    for name, value in content["model"].items():
        if name == "quantizer.scales":  # of residual codebooks: FSQ's finer levels are to stay on their grid
            continue
        if name in matrices:
            scale = (value.flatten(1).abs().amax(1) / 127).clamp(min=1e-6).half().view(-1, *[1] * (value.ndim - 1))
            content["model"][name] = (value / scale.float()).round().clamp(-127, 127).to(torch.int8), scale
        elif value.is_floating_point():
            content["model"][name] = value.half()
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
    with one_line_errors(OSError, full="try less BATCH_SIZE"):
        main()
