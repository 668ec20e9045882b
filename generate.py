"""Generate images: train a masked diffusion model over a checkpoint's tokens, and measure what they cost in bits.

    python generate.py                                  tokens of vqrae_fsq.pt, with the constants below
    python generate.py CHECKPOINT=checkpoints/<run>/fsq_stage2_best.pt DATASET=shapes

Some of an image's tokens are masked, any number of them, and predicted from the others and the class: absorbing-state
discrete diffusion (MD4, 2406.04329), in prior.py. Grids of samples go to outputs/<run>/, the model to
checkpoints/<run>/prior.pt. A run that was stopped resumes after its last epoch; a finished one is measured again, with
the present constants of sampling.
"""
import contextlib
import hashlib
import json
import math
import sys
import time
from errors import one_line_errors
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import plots
import utils
from evaluate import frechet_distance, linear_probe, pooled_features, reference_encoder
from models import PRETRAINED_DIR, VQRAE
from optimization import BF16Weights, adamw_and_muon, load_states, prepare_cpu, take_step
from prior import Prior, batch_size, build_prior, draw_masks, load_prior, measure_bits, training_loss
from quantizers import check, fast_bf16
from utils import Dataset, select_images, to_float

device = "cuda" if torch.cuda.is_available() else "cpu"

# tokens
CHECKPOINT = str(PRETRAINED_DIR / "vqrae_fsq.pt")  # of train.py; prior.pt was made for this one
DATASET = "auto"  # one of the names in train.py
FLIP = True  # mirror half of the training images, at random
# model
DIM = 192  # width of the model
DEPTH = 3  # pairs of a convolutional and a transformer block
# training
EPOCHS = 200 if device == "cuda" else 6  # 80 minutes on one CPU core, some 45 on two, with measuring
BATCH_SIZE = 128 if device == "cuda" else 32  # in few epochs more steps count for more than larger batches
LEARNING_RATE = 1e-3 if device == "cuda" else 2e-3  # AdamW's; of Muon, for matrices, twice this; warm-up, cosine decay
DROP_LABEL = 0.1  # share of images whose class the model is not told, for guidance
PRECISION = "bf16" if fast_bf16(device) else "fp32"
EVAL_IMAGES = 1_000  # test images whose bits are measured after each epoch; at the end: all
SEED = 0
# sampling: not part of a run's name
STEPS = 16  # in which an image's tokens are filled
GUIDANCE = 4.0  # on average: it rises from step to step. 1: none; more makes samples more like their class
TEMPERATURE = 1.0
SAMPLES = 10_000  # for the Fréchet distance and the probe


def main():
    if device == "cpu":
        prepare_cpu()
    with one_line_errors(ValueError, RuntimeError, OSError):
        constants = utils.read_constants(globals())
        check_constants()
        vqrae = utils.load_checkpoint(CHECKPOINT).to(device)
        data = utils.load_dataset(DATASET, vqrae.config["image_size"])
        check(BATCH_SIZE <= len(data.train_images), "BATCH_SIZE", BATCH_SIZE, f"at most {len(data.train_images)}")
        check(len(data.test_images) > 1, "DATASET", DATASET, "two test images or more: a distance needs a variance")
        if data.train_labels is None:  # the one label there is: no class
            data = data._replace(train_labels=torch.zeros(len(data.train_images), dtype=torch.int64),
                                 test_labels=torch.zeros(len(data.test_images), dtype=torch.int64))
        utils.seed_everything(SEED)
        grid = [data.size // vqrae.token_size] * 2
        prior = build_prior(vqrae.quantizer, grid, len(data.classes), DIM, DEPTH).to(device)
        tokens = load_tokens(vqrae, data)
        content = hashlib.sha256(b"".join(part.numpy().tobytes() for part in tokens.values()))
        constants |= {"CHECKPOINT": Path(CHECKPOINT).name, "DATASET": data.name, "content": content.hexdigest()[:12],
                      "labels": utils.digest((data.classes, data.train_labels.tolist(), data.test_labels.tolist())),
                      "tokenizer": utils.hash_file(CHECKPOINT)}
        drawn_with = {name: constants.pop(name) for name in ("STEPS", "GUIDANCE", "TEMPERATURE", "SAMPLES")}
        name = f"prior_{data.name}_{vqrae.config['quantizer']}_{utils.digest(constants)}"
        outputs, last = Path("outputs", name), Path("checkpoints", name, "last.pt")
        lock = utils.lock_run(outputs, last.parent)  # what must not be written fails here, not after an epoch
        saved = utils.load_torch(last, "epoch", "history") if last.exists() else {"epoch": 0, "history": []}
    print(f"{name}: {len(data.train_images):,} training and {len(data.test_images):,} test images, {prior.tokens} "
          f"tokens, {vqrae.quantizer.codebook_size:,} codes, {sum(p.numel() for p in prior.parameters()) / 1e6:.1f} M "
          f"parameters, {device}", flush=True)
    if saved["epoch"]:
        print(f"resuming after epoch {saved['epoch']}")
    try:
        with lock:
            train(prior, vqrae, tokens, data, saved, last, constants)
            measure(load_prior(last.with_name("prior.pt")).to(device), vqrae, tokens, data, outputs, drawn_with)
    except KeyboardInterrupt:
        sys.exit(f"\ngenerate.py: stopped; the same command goes on after epoch {saved['epoch']}")
    except ValueError as error:
        sys.exit(f"generate.py: {error}; {last.parent}/ keeps what was trained")


def load_tokens(vqrae: VQRAE, data: Dataset) -> dict[str, Tensor]:
    """The indices (N, h, w) of training images, "train" (with FLIP mirrored ones after them), and "test" images, made
    once and kept in data/, with a hash of checkpoint, images and code in their name."""
    code = [utils.hash_file(Path(__file__).with_name(name)) for name in ("models.py", "quantizers.py")]
    content = hashlib.sha256(Path(CHECKPOINT).read_bytes() + bytes([FLIP]) + "".join(code).encode())
    for images in (data.train_images, data.test_images):
        content.update(images.numpy())
    path = Path("data", f"tokens_{content.hexdigest()[:12]}.pt")
    with contextlib.suppress(ValueError):  # there is no such file, or a broken one
        return utils.load_torch(path, "train", "test")
    tokens, dtype = {}, torch.int32 if vqrae.quantizer.codebook_size <= 2**31 else torch.int64
    for split, images, copies in (("train", data.train_images, 1 + FLIP), ("test", data.test_images, 1)):
        batches = torch.arange(copies * len(images)).split(max(1, 2**18 // data.size**2))
        batches = tqdm(batches, f"tokenizing {split} images", leave=False)
        tokens[split] = torch.cat([vqrae.encode_to_indices(to_float(select_images(images, index).to(device)))
                                   .to("cpu", dtype) for index in batches])
    with contextlib.suppress(OSError):  # another user's data/ may be read-only, or the disk full
        utils.save_torch(path, tokens)
    return tokens


def train(prior: Prior, vqrae: VQRAE, tokens: dict, data: Dataset, saved: dict, last: Path, constants: dict):
    """Train from the epoch after saved["epoch"], and leave a grid of samples, a table and checkpoints after each."""
    outputs, labels, history = Path("outputs", last.parent.name), data.train_labels, saved["history"]
    steps_per_epoch = len(labels) // BATCH_SIZE
    steps = EPOCHS * steps_per_epoch
    optimizers = adamw_and_muon(prior, ("blocks.",), LEARNING_RATE)
    state = {"prior": prior} | {f"optimizer_{i}": optimizer for i, optimizer in enumerate(optimizers)}
    objective = BF16Weights(prior) if PRECISION == "bf16" else prior
    if saved["epoch"]:
        load_states(state, saved, last)
        save_prior(prior, last.with_name("prior.pt"), history[-1], constants)  # should it have been lost
    print(" epoch   bits a token: training    test  images/s  seconds")
    for epoch in range(saved["epoch"] + 1, EPOCHS + 1):
        utils.seed_everything(SEED, epoch)  # an epoch is the same in a run that was resumed before it
        start, losses = time.time(), []
        order = torch.randperm(len(labels))[: steps_per_epoch * BATCH_SIZE].view(-1, BATCH_SIZE)
        for done, index in enumerate(tqdm(order, f"epoch {epoch}/{EPOCHS}", leave=False), (epoch - 1) * len(order)):
            copy = len(labels) * torch.randint(1 + FLIP, (BATCH_SIZE,))
            given = labels[index].masked_fill(torch.rand(BATCH_SIZE) < DROP_LABEL, prior.classes)
            masked = draw_masks(BATCH_SIZE, prior.tokens).to(device)
            with torch.autocast(device, torch.bfloat16, enabled=PRECISION == "bf16"):
                digits = prior.to_digits(tokens["train"][index + copy])
                each = objective(digits, masked, given.to(device)) / prior.tokens
            training_loss(each, masked).backward()
            take_step(optimizers, done, steps)
            prior.zero_grad()
            losses.append(each.detach().mean())
        bits, seconds = torch.stack(losses).mean().item(), time.time() - start
        test_bits = measure_bits(prior, tokens["test"][:EVAL_IMAGES], data.test_labels[:EVAL_IMAGES]) / prior.tokens
        if not math.isfinite(bits + test_bits):
            sys.exit(f"generate.py: the loss is not finite in epoch {epoch}; checkpoints of earlier epochs are kept")
        row = {"epoch": epoch, "bits": bits, "test_bits": test_bits, "images_per_second": order.numel() / seconds,
               "seconds": seconds}
        print(f"{epoch:6} {bits:24.3f} {test_bits:7.3f} {row['images_per_second']:9,.0f} {seconds:8.0f}", flush=True)
        history.append(row)
        utils.write_csv(outputs / "metrics.csv", history)
        classes = torch.arange(min(max(prior.classes, 1), 10))  # a column for each
        images = sample(prior, vqrae, classes.repeat(8))
        plots.save_grid(outputs / f"epoch_{epoch:03}.png", *images.chunk(2), columns=len(classes))
        save_prior(prior, last.with_name("prior.pt"), row, constants)
        parts = {name: part.state_dict() for name, part in state.items()}
        utils.save_torch(last, {"epoch": epoch, "history": history, **parts})
        saved["epoch"] = epoch


def save_prior(prior: Prior, path: Path, metrics: dict, constants: dict):
    """In 16-bit numbers, 6 MB by default; load_prior reads it."""
    weights = {k: v.half() if v.is_floating_point() else v for k, v in prior.state_dict().items()}
    utils.save_torch(path, {"config": prior.config, "prior": weights, "metrics": metrics, "constants": constants})


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

@torch.no_grad()
def sample(prior: Prior, vqrae: VQRAE, labels: Tensor, indices: Tensor | None = None,
           mask: Tensor | None = None) -> Tensor:
    """uint8 images (B, 3, H, W) of classes (B,), from indices (B, h, w) with those drawn anew where mask is True, or
    all of them."""
    images, options = [], {"steps": STEPS, "guidance": GUIDANCE, "temperature": TEMPERATURE}
    for i in tqdm(torch.arange(len(labels)).split(batch_size(prior)), "sampling", leave=False):
        with torch.autocast(device, torch.bfloat16, enabled=PRECISION == "bf16"):
            filled = (prior.generate(labels[i], **options) if mask is None
                      else prior.fill(indices[i], mask[i], labels[i], **options))
        images.append((vqrae.decode_from_indices(filled) * 255).round().byte().cpu())
    return torch.cat(images)


def measure(prior: Prior, vqrae: VQRAE, tokens: dict, data: Dataset, outputs: Path, drawn_with: dict):
    """Bits, samples and their distance from test images, in the features of the shipped encoder; results.json."""
    labels, test = data.test_labels, tokens["test"]
    results = {**drawn_with, "tokens": prior.tokens,
               "nominal_bits": prior.tokens * math.log2(vqrae.quantizer.codebook_size),
               "bits": measure_bits(prior, test, torch.full_like(labels, prior.classes)),
               "bits_given_class": measure_bits(prior, test, labels)}
    utils.seed_everything(SEED)
    classes = labels[torch.randint(len(labels), (SAMPLES,))]  # as frequent as in the test images
    samples = sample(prior, vqrae, classes)
    encoder = reference_encoder(samples.shape[-1])
    features = [pooled_features(encoder, images) for images in (data.train_images, data.test_images, samples)]
    results["frechet"] = frechet_distance(features[1], features[2])
    probes = ""
    if prior.classes:
        for name, x, y in (("probe_test", features[1], labels), ("probe_samples", features[2], classes)):
            results[name] = linear_probe(features[0], data.train_labels.to(device), x, y.to(device))
        probes = f", probe {results['probe_samples']:.1%} (test images {results['probe_test']:.1%})"
    nearest = torch.cdist(features[2][:20], features[0]).argmin(1).cpu()
    plots.save_grid(outputs / "nearest.png", samples[:20], data.train_images[nearest], columns=20)

    originals, mask = data.test_images[:8], torch.zeros(len(test[:8]), *prior.grid, dtype=torch.bool)
    top, left = (side // 4 for side in prior.grid)
    mask[:, top : prior.grid[0] - top, left : prior.grid[1] - left] = True  # a hole of half the height and width
    pixels = F.interpolate(mask[:, None].float(), originals.shape[-2:]).bool()
    fillings = [sample(prior, vqrae, labels[:8], test[:8], mask) for _ in range(4)]
    rows = torch.cat([originals, originals.masked_fill(pixels, 128), *fillings])  # in all, six
    plots.save_grid(outputs / "inpainting.png", *rows.chunk(2), columns=len(originals))
    utils.write_file(outputs / "results.json", json.dumps(results, indent=2).encode())
    print(f"bits an image {results['bits']:.1f} ({results['bits'] / prior.tokens:.3f} a token), given its class "
          f"{results['bits_given_class']:.1f} ({results['bits_given_class'] / prior.tokens:.3f}), nominal "
          f"{results['nominal_bits']:.1f}\n{SAMPLES:,} samples: Fréchet distance in the shipped encoder's features "
          f"{results['frechet']:.3f}{probes}\nsee {outputs}/")


def check_constants():
    """ValueError, naming the constant, its value and what is allowed, before anything is read."""
    utils.check_ranges(
        globals(), DIM=(2, 4096), DEPTH=(1, 100), EPOCHS=(1, 10**6), BATCH_SIZE=(1, 10**6), STEPS=(1, 10**5),
        EVAL_IMAGES=(1, 10**9), SAMPLES=(20, 10**6), SEED=(0, 2**31 - 1), LEARNING_RATE=(1e-12, 1e3),
        TEMPERATURE=(0.01, 100.0), GUIDANCE=(1.0, 1e3), DROP_LABEL=(0.01, 0.99))
    check(DIM < 64 or DIM % 64 == 0, "DIM", DIM, "a multiple of 64, or less")
    check(type(FLIP) is bool, "FLIP", FLIP, "True or False")
    check(PRECISION in ("bf16", "fp32"), "PRECISION", PRECISION, '"bf16", "fp32"')


if __name__ == "__main__":
    with one_line_errors(OSError, note="; files written before are whole, and the same command goes on from them",
                         full="try less BATCH_SIZE, or end other programs there"):
        main()
