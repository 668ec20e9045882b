"""Train a checkpoint's decoder on tokens that search.py finds, of which it has never seen any.

    python refine.py CHECKPOINT=checkpoints/<run>/ema_vq_stage2_best.pt DATASET=cifar10

Tokens of some training images are searched for, once, and kept in data/. From these, and from the encoder's own for
every other pair of images, learn what comes after them: the linear layer from a code's few numbers to z_q, the
convolution behind it, decoder and predictor. Encoder, adapter and codebook stay, and so do the tokens that an image is
encoded to. The losses are those of the checkpoint's training, without a GAN. Writes
checkpoints/<run>/<quantizer>_refined.pt; a run that was stopped goes on.
"""
import math
import sys
from errors import one_line_errors
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import utils
from models import PRETRAINED_DIR, VQRAE, build_encoder
from optimization import BF16Weights, adamw_and_muon, load_states, prepare_cpu, take_step
from quantizers import check, fast_bf16
from search import search_dataset, search_tokens
from utils import FeatureCache, to_float

device = "cuda" if torch.cuda.is_available() else "cpu"

CHECKPOINT = str(PRETRAINED_DIR / "vqrae_ema_vq.pt")  # of train.py
DATASET = "auto"  # one of the names in train.py, or several: then random crops, in equal shares
FLIP = True  # take mirrored images, too
IMAGES = 12_000  # training images whose tokens are searched for: 22 minutes on a core
SWEEPS = 4  # of the search, here and in measuring
EPOCHS = 7  # over these images: 27 minutes on a core
BATCH_SIZE = 32
LEARNING_RATE = 5e-4  # AdamW's; Muon's, for the matrices of the blocks, is twice this; warm-up, cosine decay
PRECISION = "bf16" if fast_bf16(device) else "fp32"
EVAL_IMAGES = 200  # test images measured before, and after each epoch
SEED = 0


def main():
    if device == "cpu":
        prepare_cpu()
    with one_line_errors(ValueError, RuntimeError, OSError):
        constants = utils.read_constants(globals())
        check_constants()
        vqrae, content = utils.load_checkpoint(CHECKPOINT).to(device), utils.load_torch(CHECKPOINT, "constants")
        stored = content["constants"]
        for name in ("L2_WEIGHT", "PREDICT_WEIGHT", "PREDICT_IMAGE", "PERCEPTUAL_WEIGHT"):
            check(name in stored, "CHECKPOINT", CHECKPOINT, f"one of train.py, which keeps the {name} of its training")
        check(vqrae.quantizer.codebook_size and not vqrae.from_scratch, "CHECKPOINT", CHECKPOINT,
              "one with a pretrained encoder and a quantizer")
        for name, allowed in {"PERCEPTUAL": "encoder", "RANDOM_DEPTH": 0}.items():  # other losses would unlearn them
            check(stored.get(name, allowed) == allowed, "CHECKPOINT", CHECKPOINT, f"one made with {name} = {allowed!r}")
        data = utils.load_datasets(DATASET, vqrae.config["image_size"])
        shipped = PRETRAINED_DIR / f"{vqrae.config['encoder']}_encoder.pt"  # or pretrain.py's
        constants |= {"CHECKPOINT": utils.hash_file(CHECKPOINT),
                      "encoder_weights": utils.hash_file(shipped) if shipped.exists() else None,
                      "DATASET": [(d.name, d.digest, d.train_images.shape[-1]) for d in data]}  # larger ones: crops
        outputs = Path("checkpoints", f"refined_{vqrae.config['quantizer']}_{utils.digest(constants)}")
        lock = utils.lock_run(outputs, outputs)  # what must not be written fails here, not after an hour
        utils.seed_everything(SEED)
        images, objective = draw_images(data), Objective(vqrae, stored)
        last = outputs / "last.pt"
        saved = utils.load_torch(last, "epoch") if last.exists() else {"epoch": 0}
        dataset = content.get("metrics", {}).get("dataset", data[0].name)  # its figures are those of another decoder
        metadata = {"constants": stored, "metrics": {"dataset": dataset}}
    try:
        with lock:
            tokens = [vqrae.encode_to_indices(to_float(batch.to(device))) for batch in images.split(250)]
            tokens = torch.stack([torch.cat(tokens), search_dataset(vqrae, images, SWEEPS)])
            train(objective, metadata, images, tokens, data[0].test_crops()[:EVAL_IMAGES], last, saved)
    except KeyboardInterrupt:
        sys.exit("\nrefine.py: stopped; the same command goes on after the last tokens, or the last epoch")


def draw_images(data: list[utils.Dataset]) -> Tensor:
    """IMAGES training images or crops (N, 3, H, W), uint8, of all datasets in equal shares, in a random order"""
    drawn = []
    for part in data:
        available = len(part.train_images) * (1 + FLIP)
        cache = FeatureCache(None, part, "cpu", 0.0, torch.float32)
        index = torch.cat([torch.randperm(available) for _ in range(IMAGES // (available * len(data)) + 1)])
        batches = index[: math.ceil(IMAGES / len(data))].split(250)
        drawn += [(cache.select(batch) * 255).round().byte() for batch in batches]
    images = torch.cat(drawn)
    return images[torch.randperm(len(images))[:IMAGES]]


class Objective(nn.Module):
    """What a step minimises: train.py's losses of a stage in which only what follows the tokens learns."""

    def __init__(self, vqrae: VQRAE, loss_weights: dict):
        super().__init__()
        self.vqrae, self.loss_weights = vqrae, loss_weights
        encoder = build_encoder(vqrae.config["encoder"], vqrae.token_size).to(device)
        self.teacher = encoder.eval().requires_grad_(False)

    def forward(self, images: Tensor, indices: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1], indices (B, h, w) -> loss"""
        with torch.autocast(device, torch.bfloat16, enabled=PRECISION == "bf16"):
            with torch.no_grad():
                features = self.teacher(images)
            z_q = self.vqrae.quantizer.indices_to_codes(indices)
            output, weights = self.vqrae.decode(z_q), self.loss_weights
            predict_loss = self.vqrae.compute_prediction_loss(z_q, features, weights["PREDICT_IMAGE"])
            perceptual_loss = F.mse_loss(self.teacher(output[::2]), features[::2])  # half of them: half the time
            return (weights["L2_WEIGHT"] * F.mse_loss(output, images) + weights["PREDICT_WEIGHT"] * predict_loss
                    + weights["PERCEPTUAL_WEIGHT"][self.vqrae.stage - 1] * perceptual_loss)


def train(objective: Objective, metadata: dict, images: Tensor, tokens: Tensor, test_images: Tensor, last: Path,
          saved: dict):
    """Train, from where a run was stopped (`saved`, the content of `last`), and leave a checkpoint after each epoch."""
    vqrae = objective.vqrae.requires_grad_(False)
    for part in (vqrae.decoder, vqrae.post_quant_conv, vqrae.predictor, vqrae.quantizer.project_out):
        part.requires_grad_(True)
    optimizers = adamw_and_muon(vqrae, ("predictor.", "post_quant_conv.", "decoder.layers.", "decoder.blocks."),
                                LEARNING_RATE)
    state = {"vqrae": vqrae} | {f"optimizer_{i}": optimizer for i, optimizer in enumerate(optimizers)}
    steps_per_epoch = len(images) // BATCH_SIZE
    searched = torch.arange(BATCH_SIZE) // 2 % 2  # two images with the encoder's tokens, two with searched ones
    objective = BF16Weights(objective) if PRECISION == "bf16" else objective
    learning = sum(p.numel() for p in vqrae.parameters() if p.requires_grad)
    print(f"{last.parent.name}: {len(images):,} images, {learning:,} parameters learn; PSNR of "
          f"{len(test_images)} test images\n epoch    loss   encoder's tokens   searched")

    def save(epoch: int):
        utils.save_checkpoint(last.with_name(f"{vqrae.config['quantizer']}_refined.pt"), vqrae, **metadata, epoch=epoch)

    if saved["epoch"]:
        load_states(state, saved, last)
        save(saved["epoch"])  # should it have been lost
    else:
        print("{:6} {:7} {:18.2f} {:10.2f}".format(0, "", *measure(vqrae, test_images)), flush=True)
    for epoch in range(saved["epoch"] + 1, EPOCHS + 1):
        utils.seed_everything(SEED, epoch)  # an epoch is the same in a run that was resumed before it
        vqrae.train()  # without clamping to [0, 1], which stops gradients
        losses, order = [], torch.randperm(len(images))[: steps_per_epoch * BATCH_SIZE].view(-1, BATCH_SIZE)
        for done, index in enumerate(tqdm(order, f"epoch {epoch}/{EPOCHS}", leave=False), (epoch - 1) * len(order)):
            loss = objective(to_float(images[index].to(device)), tokens[searched, index])
            loss.backward()
            nn.utils.clip_grad_norm_(vqrae.parameters(), 1.0)
            take_step(optimizers, done, EPOCHS * steps_per_epoch)
            vqrae.zero_grad()
            losses.append(loss.detach())
        loss = torch.stack(losses).mean().item()
        if not (math.isfinite(loss) and all(p.isfinite().all() for p in vqrae.parameters())):
            sys.exit(f"refine.py: loss or weights are not finite in epoch {epoch}; the checkpoint of the one before is "
                     "kept")
        print("{:6} {:7.4f} {:18.2f} {:10.2f}".format(epoch, loss, *measure(vqrae, test_images)), flush=True)
        save(epoch)
        utils.save_torch(last, {"epoch": epoch, **{name: part.state_dict() for name, part in state.items()}})
    print(f"see {last.parent}/")


def measure(vqrae: VQRAE, test_images: Tensor) -> list[float]:
    """Mean PSNR of reconstructions from the encoder's tokens, and from searched ones"""
    searched = search_tokens(vqrae.eval(), to_float(test_images.to(device)), SWEEPS)
    return [utils.evaluate(vqrae, test_images, indices=tokens)[0]["psnr"] for tokens in (None, searched)]


def check_constants():
    """ValueError, naming the constant, its value and what is allowed, before anything is read."""
    utils.check_ranges(globals(), IMAGES=(4, 10**7), SWEEPS=(1, 10**4), EPOCHS=(1, 10**6), EVAL_IMAGES=(1, 10**6),
                       BATCH_SIZE=(4, IMAGES), SEED=(0, 2**31 - 1), LEARNING_RATE=(1e-12, 1e3))
    valid = isinstance(DATASET, str | tuple | list) and DATASET and all(isinstance(name, str) for name in DATASET)
    check(valid, "DATASET", DATASET, "a dataset's name, or several in ()")
    check(type(FLIP) is bool, "FLIP", FLIP, "True or False")
    check(PRECISION in ("bf16", "fp32"), "PRECISION", PRECISION, '"bf16", "fp32"')


if __name__ == "__main__":
    with one_line_errors(OSError, note="; files written before are whole, and the same command goes on from them",
                         full="try less BATCH_SIZE"):
        main()
