"""Train a VQRAE (2511.23386): images to discrete tokens in a pretrained encoder's feature space, and back.

    python train.py                                    with the constants below
    python train.py QUANTIZER=simvq BATCH_SIZE=64      with some of them replaced
    torchrun --nproc_per_node=4 train.py               on several GPUs, BATCH_SIZE being that of all together

Stage 1: the encoder is frozen; adapter, quantizer and decoder learn. Stage 2: everything learns, and the encoder is held to
what it was. Look at outputs/<run>/ while it runs; checkpoints go to checkpoints/<run>/. A run that was
stopped goes on after its last epoch; a changed constant is a new run.
"""
import copy
import hashlib
import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from models import FROM_SCRATCH, VQRAE, PatchDiscriminator, build_encoder
from quantizers import QUANTIZERS, check, fast_bf16
from utils import (
    DATASETS,
    Dataset,
    FeatureCache,
    digest,
    evaluate,
    load_checkpoint,
    load_dataset,
    load_lpips,
    load_torch,
    pick,
    plot_curves,
    plot_usage,
    read_constants,
    save_checkpoint,
    save_grid,
    save_torch,
    seed_everything,
    to_float,
    write_csv,
    write_file,
)

device = "cuda" if torch.cuda.is_available() else "cpu"
rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))  # torchrun sets them
ranks = int(os.environ.get("WORLD_SIZE", 1))

# images
DATASET = "auto"  # "cifar10", "cifar100", "shapes", or a folder with train/ and test/; "auto": CIFAR-10 or else shapes
IMAGE_SIZE = 32
FLIP = device == "cuda"  # mirror half of the training images, at random; of use where each comes many times, as in a GPU's schedule
# encoder and quantizer
ENCODER = "cifar"  # ships with the repository; "dinov2_s" and other pretrained ViTs are downloaded, see README; as baselines,
# "scratch" is the same architecture untrained and "cnn" a plain CNN (with GRID = 4): they learn in both stages, from pixels
GRID = 8  # tokens a side: 8 x 8 = 64 tokens an image
QUANTIZER = "fsq"  # "fsq", "simvq", "ema_vq", "ddcl"; "none" is the ceiling for them all
FSQ_LEVELS = (8, 8, 8, 5, 5, 5)  # 64,000 codes; try (8, 6, 5) = 240 or (8, 8, 8) = 512
SIMVQ_CODEBOOK_SIZE = 16384
SIMVQ_CODE_DIM = 8  # numbers in a code; None: as many as the encoder's features have, as in the papers
EMA_CODEBOOK_SIZE = 8192
EMA_CODE_DIM = 16
EMA_REVIVE = True  # codes that fall out of use start again at tokens of the batch
DDCL_DELTA = 1 / 15  # step of DDCL's four numbers in [-1, 1]
DDCL_COMM_WEIGHT = 1e-3  # a bit of message costs this much
ADAPTER_DEPTH = None  # blocks before the quantizer; None: one transformer block behind a ViT, else three of convolutions
POST_QUANT_KERNEL = 1  # convolution behind the quantizer, as in Cosmos-Tokenizer; 0: none
NORMALIZE = False  # decode from features normalised with the mean and spread of a batch of the encoder's
DECODER = None  # "conv", "vit"; None: the kind that the encoder is of
# None: the encoder's own where it is a ViT, else 192, 2 for "conv" or 4 for "vit", 3. ViT-XL is 1152, 28, 16
DECODER_WIDTH = None
DECODER_DEPTH = None
DECODER_HEADS = None
# losses, as weights
L2_WEIGHT = 16.0  # pixels in [0, 1] have a variance of about 1/16: puts all losses on one scale
PERCEPTUAL = "encoder"  # distance in the frozen encoder's features, or "lpips" (downloads VGG16)
PERCEPTUAL_WEIGHT = (0.02, 0.02)  # stage 1, stage 2; more makes images less sharp but, to the encoder, more alike, see README
GAN_WEIGHT = 0.5 if device == "cuda" else 0.0  # stage 1; in so short a run as a CPU's it only costs, see README
GAN_START = 0.5  # after this share of stage 1
PREDICT_WEIGHT = 0.015  # the frozen features, predicted from z_q: what keeps the tokens' meaning
PREDICT_IMAGE = 10.0  # within it, how much an image's mean features count beside each token's own
DISTILL_WEIGHT = 0.3  # stage 2: the features themselves, held to the frozen encoder's
# training
STAGES = (1, 2)  # (1,), (1, 2) or (2,)
START_CHECKPOINT = None  # a path: weights to begin with, of a checkpoint of the same model; STAGES = (2,) needs one
EPOCHS = (30, 10) if device == "cuda" else (8, 2)  # of stage 1 and stage 2; the papers', or some minutes on a laptop
EPOCH_IMAGES = None if device == "cuda" else 6_250  # how many make an epoch; None: all
EVAL_IMAGES = None if device == "cuda" else 1_000  # test images measured after each epoch (None, and at the end: all)
BATCH_SIZE = 128 if device == "cuda" else 32  # images a step, of all processes together
ACCUMULATE = 1  # parts in which each process takes its share of a batch, where that is too large for its memory; EMA-VQ's
# codebook moves with each part
PRECISION = "bf16" if fast_bf16(device) else "fp32"  # bf16 is half to a tenth as fast where a CPU only emulates it; either way
# measured in fp32 (in whose convolutions a GPU rounds to TF32)
OPTIMIZER = "muon"  # for the matrices of transformer and convolution blocks, AdamW for all else; or "adamw" throughout, as in the papers
LEARNING_RATE = (1e-3, 1e-5) if device == "cuda" else (1e-3, 1e-3)  # of each stage; warm-up, cosine decay
FEATURE_CACHE_GB = 4.0  # device memory for the frozen features of the training images (CIFAR-10 in bf16: 1.6; FLIP doubles it, fp32 too); 0: none
IMAGES_GB = 8.0  # images up to this size are kept on the device (CIFAR-10: 0.18), others on the host
KEEP_CHECKPOINTS = 2  # epoch_k checkpoints kept of each stage, besides the best
SEED = 0


class Run(NamedTuple):
    """What a run is known by, and where its files go. The same constants find the same files again."""

    name: str
    constants: dict
    outputs: Path
    checkpoints: Path


def main():
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            sys.exit(f"train.py: nproc_per_node is more than {local_rank}, allowed: {torch.cuda.device_count()}, the GPUs that there are")
        torch.cuda.set_device(local_rank)
    else:
        torch.use_deterministic_algorithms(True)  # costs nothing here
        torch.utils.deterministic.fill_uninitialized_memory = False
    if ranks > 1:
        # while the first process decodes images or measures, the others wait: ten minutes, the default, may be too few
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=1))

    # what there is to learn from, and the model
    try:
        constants = read_constants(globals())
        check_constants()
        build_model(pretrained=False)  # each constant meets what it is for, before anything is downloaded
        dataset = [DATASET]
        if rank > 0:
            dist.broadcast_object_list(dataset)  # the first process downloads and decodes; the others find it done
        lpips = load_lpips().to(device) if PERCEPTUAL == "lpips" else None
        seed_everything(SEED)
        model = build_model()
        teacher = None  # of an encoder from scratch, which has nothing to be true to
        if not model.from_scratch:  # the encoder as it was before stage 2, for both stages
            teacher = copy.deepcopy(model.encoder) if model.stage == 1 else build_encoder(ENCODER, GRID).to(device)
            teacher.eval().requires_grad_(False)
        data = load_dataset(dataset[0], IMAGE_SIZE)
        if DATASET == "auto":
            constants["DATASET"] = dataset[0] = data.name
        if ranks > 1 and rank == 0:
            dist.broadcast_object_list(dataset)
        check(len(data.train_images) >= BATCH_SIZE, "BATCH_SIZE", BATCH_SIZE, f"at most the {len(data.train_images)} training images")

        content = {"training images": len(data.train_images), "test images": len(data.test_images)}  # a folder may grow or shrink
        if START_CHECKPOINT is not None:  # and a file may change
            content["START_CHECKPOINT"] = hashlib.sha256(Path(START_CHECKPOINT).read_bytes()).hexdigest()
        name = f"{data.name}_{ENCODER}_{QUANTIZER}_{digest(constants | content)}"
        run = Run(name, constants, Path("outputs", name), Path("checkpoints", name))
        last = run.checkpoints / "last.pt"
        saved = load_torch(last) if last.exists() else {"stage": 0, "epoch": 0, "history": []}
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(1 if rank > 0 and isinstance(error, ValueError) else f"train.py: {error}")  # a wrong constant, once for all
    say(f"{name}: {len(data.train_images):,} training and {len(data.test_images):,} test images, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {ranks} x {device}")
    if (run.outputs / "results.json").exists():
        return say(f"this run is finished: see {run.outputs} and {run.checkpoints}, or change a constant for another")
    if saved["stage"]:
        say(f"going on after stage {saved['stage']}, epoch {saved['epoch']}")

    if data.train_images.nbytes + data.test_images.nbytes <= IMAGES_GB * 1e9:
        data = data._replace(train_images=data.train_images.to(device), test_images=data.test_images.to(device))
    features = None
    if teacher is not None:
        features = FeatureCache(teacher, data.train_images, FEATURE_CACHE_GB, torch.bfloat16 if PRECISION == "bf16" else torch.float32, FLIP)
    if NORMALIZE and START_CHECKPOINT is None:
        model.set_normalization(features[shuffled(len(data.train_images), BATCH_SIZE, 0)[: BATCH_SIZE // (ranks * ACCUMULATE)]])

    # the two stages
    say(f"PSNR to perplexity of {len(data.test_images[:EVAL_IMAGES]):,} test images:\n"
        " stage  epoch      loss   PSNR    SSIM  codes used  perplexity  images/s  seconds")
    try:
        for stage in STAGES:
            if stage >= saved["stage"]:
                train_stage(stage, model, teacher, lpips, features, data, run, saved)
    except KeyboardInterrupt:
        sys.exit("\ntrain.py: stopped; " + (f"{last} has all up to the last line above, and the same command goes on from there"
                                            if last.exists() else "no epoch was finished, so nothing is saved"))

    # what came of it: the last stage's best epoch, on all test images
    if rank == 0:
        best = load_checkpoint(run.checkpoints / f"{QUANTIZER}_stage{STAGES[-1]}_best.pt").to(device)
        metrics, counts, reconstructions = evaluate(best, data.test_images, BATCH_SIZE // (ranks * ACCUMULATE))
        save_grid(run.outputs / "final.png", data.test_images[:64], reconstructions[:64], columns=16)
        if len(counts):
            plot_usage(run.outputs / "usage.png", counts, metrics, f"{name}, {len(data.test_images):,} test images")
        say(f"all {len(data.test_images):,} test images: PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.4f}, "
            f"{metrics['usage']:.1%} of codes used, perplexity {metrics['perplexity']:,.0f}\nsee {run.outputs}/ and {run.checkpoints}/")
        results = {"run": name, "stage": STAGES[-1], "test_images": len(data.test_images), **metrics}
        write_file(run.outputs / "results.json", json.dumps(results, indent=2).encode())


def say(line: str):
    """Print, from the first process alone."""
    if rank == 0:
        print(line, flush=True)


def build_model(pretrained: bool = True) -> VQRAE:
    """The model that the constants describe, or that of START_CHECKPOINT if they fit it."""
    options = {"fsq": {"levels": list(FSQ_LEVELS)},
               "simvq": {"codebook_size": SIMVQ_CODEBOOK_SIZE, "code_dim": SIMVQ_CODE_DIM},
               "ema_vq": {"codebook_size": EMA_CODEBOOK_SIZE, "code_dim": EMA_CODE_DIM, "revive": EMA_REVIVE},
               "ddcl": {"delta": DDCL_DELTA, "comm_weight": DDCL_COMM_WEIGHT},
               "none": {}}[QUANTIZER]
    model = VQRAE(ENCODER, QUANTIZER, options, IMAGE_SIZE, GRID, ADAPTER_DEPTH, POST_QUANT_KERNEL, NORMALIZE,
                  DECODER, DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS, pretrained=pretrained and START_CHECKPOINT is None)
    if START_CHECKPOINT is not None:
        loaded = load_checkpoint(START_CHECKPOINT)
        differ = [f"{name} is {loaded.config[name]!r} there and {value!r} here"
                  for name, value in model.config.items() if loaded.config[name] != value]
        check(not differ, "START_CHECKPOINT", START_CHECKPOINT, "a checkpoint made with these constants: " + "; ".join(differ))
        check(loaded.stage <= STAGES[0], "START_CHECKPOINT", START_CHECKPOINT, "a checkpoint of stage 1, or else STAGES = (2,)")
        model = loaded
    return model.to(device)


def train_stage(stage: int, model: VQRAE, teacher: nn.Module | None, lpips: nn.Module | None, features: FeatureCache | None,
                data: Dataset, run: Run, saved: dict):
    """Train one stage and leave its grids, curves and checkpoints; `saved` is where an earlier run of it stopped."""
    model.set_stage(stage).train()
    count = min(EPOCH_IMAGES or len(data.train_images), len(data.train_images))
    steps_per_epoch = count // BATCH_SIZE
    steps = EPOCHS[stage - 1] * steps_per_epoch
    optimizers = build_optimizers(model, LEARNING_RATE[stage - 1])
    warmup = max(1, steps // 20)
    schedules = [torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))) for optimizer in optimizers]
    seed_everything(SEED, stage)
    discriminator = PatchDiscriminator(IMAGE_SIZE).to(device)
    gan_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.9), fused=True)
    gan_start = GAN_START * steps if stage == 1 and GAN_WEIGHT > 0 else math.inf

    state = {"model": model, "discriminator": discriminator, "gan_optimizer": gan_optimizer}
    for i, parts in enumerate(zip(optimizers, schedules)):
        state[f"optimizer_{i}"], state[f"schedule_{i}"] = parts
    first_epoch, history = 1, saved["history"]
    if saved["stage"] == stage:
        try:
            for name, part in state.items():
                part.load_state_dict(saved.pop(name))
        except (RuntimeError, KeyError, ValueError):
            sys.exit(f"train.py: {run.checkpoints / 'last.pt'} is of other code than this: go back to that, or delete it to begin anew")
        first_epoch = saved["epoch"] + 1

    def place(step: int) -> str:
        return f"stage {stage}, epoch {step // steps_per_epoch + 1}, step {step % steps_per_epoch + 1}"

    objective, judge = Objective(stage, model, teacher, lpips), discriminator
    if ranks > 1:  # gradients are averaged over processes; codebooks keep themselves equal
        objective = DistributedDataParallel(objective, broadcast_buffers=False)
        judge = DistributedDataParallel(discriminator, broadcast_buffers=False)
    for epoch in range(first_epoch, EPOCHS[stage - 1] + 1):
        seed_everything(SEED, stage, epoch, rank)  # so that an epoch is the same whether or not the run was stopped before it
        start, sums = time.time(), 0
        order = shuffled(len(data.train_images), count, epoch - 1 + (stage - 1) * EPOCHS[0])
        batches = order.split(BATCH_SIZE)[:steps_per_epoch]
        progress = tqdm(batches, f"stage {stage} epoch {epoch}/{EPOCHS[stage - 1]}", leave=False, disable=rank > 0)
        for step, batch in enumerate(progress, (epoch - 1) * steps_per_epoch):
            parts = batch.chunk(ranks * ACCUMULATE)[rank * ACCUMULATE :][:ACCUMULATE]
            for index in parts:
                images = to_float(pick(data.train_images, index).to(device))
                teacher_z = features[index] if features else None
                if ranks > 1:  # the last part's backward pass sends the gradients of all
                    objective.require_backward_grad_sync = judge.require_backward_grad_sync = index is parts[-1]
                discriminator.requires_grad_(False)
                try:
                    losses, output = objective(images, teacher_z, discriminator if step >= gan_start else None)
                except ValueError as error:  # features that are not finite
                    sys.exit(f"train.py: {error}, at {place(step)}; checkpoints of earlier epochs are in {run.checkpoints}")
                (losses["loss"] / ACCUMULATE).backward()
                if step >= gan_start:
                    discriminator.requires_grad_(True)
                    with torch.autocast(device, torch.bfloat16, enabled=PRECISION == "bf16"):
                        real, fake = judge(torch.cat([images, output.detach()])).float().chunk(2)
                    losses["discriminator_loss"] = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2  # hinge
                    (losses["discriminator_loss"] / ACCUMULATE).backward()
                sums = sums + torch.stack([value.detach() for value in losses.values()])
            gradient = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not (gradient + sums.sum()).isfinite():
                bad = [name for name, value in zip(losses, sums) if not value.isfinite()] or ["the gradient"]
                sys.exit(f"train.py: {', '.join(bad)} not finite at {place(step)}; checkpoints of earlier epochs are in {run.checkpoints}")
            for part in (*optimizers, *schedules):
                part.step()
            model.zero_grad(set_to_none=True)
            if step >= gan_start:
                gan_optimizer.step()
                gan_optimizer.zero_grad(set_to_none=True)
        sums = sums / (len(batches) * ACCUMULATE * ranks)
        if ranks > 1:
            dist.all_reduce(sums)
        seconds = time.time() - start
        if rank > 0:
            continue

        metrics, _, reconstructions = evaluate(model, data.test_images[:EVAL_IMAGES], BATCH_SIZE // (ranks * ACCUMULATE))
        row = {"dataset": data.name, "stage": stage, "epoch": epoch, **dict(zip(losses, sums.tolist())), **metrics,
               "images_per_second": len(batches) * BATCH_SIZE / seconds, "seconds": seconds}
        history.append(row)
        say(f"{stage:6} {epoch:6} {row['loss']:9.4f} {row['psnr']:6.2f} {row['ssim']:7.4f} {row['usage']:11.1%} "
            f"{row['perplexity']:11,.0f} {row['images_per_second']:11,.0f} {seconds:8.0f}")
        save_grid(run.outputs / f"stage{stage}_epoch_{epoch:03}.png", data.test_images[:8], reconstructions[:8], columns=4)
        write_csv(run.outputs / "metrics.csv", history)
        plot_curves(run.outputs / "curves.png", history, [*losses, "psnr", "ssim"], run.name)
        plot_curves(run.outputs / "usage_curve.png", history, ["usage", "perplexity"], run.name)

        facts = {"epoch": epoch, "metrics": row, "constants": run.constants}
        if row["psnr"] == max(r["psnr"] for r in history if r["stage"] == stage):
            save_checkpoint(run.checkpoints / f"{QUANTIZER}_stage{stage}_best.pt", model, **facts)
        if KEEP_CHECKPOINTS:
            save_checkpoint(run.checkpoints / f"{QUANTIZER}_stage{stage}_epoch_{epoch}.pt", model, **facts)
            (run.checkpoints / f"{QUANTIZER}_stage{stage}_epoch_{epoch - KEEP_CHECKPOINTS}.pt").unlink(missing_ok=True)
        save_torch(run.checkpoints / "last.pt", {"stage": stage, "epoch": epoch, "history": history,
                                                 **{name: part.state_dict() for name, part in state.items()}})


def build_optimizers(model: VQRAE, learning_rate: float) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon (Jordan et al., 2024) for the matrices of the blocks around the quantizer, scaled to AdamW's size of
    steps (2502.16982) and at twice its rate. The encoder has AdamW alone: a pretrained one is only to be tuned."""
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in learning.items()
                if OPTIMIZER == "muon" and p.ndim == 2
                and name.startswith(("adapter.", "predictor.", "post_quant_conv.", "decoder.layers.", "decoder.blocks."))}
    others = [p for name, p in learning.items() if name not in matrices]
    optimizers = [torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices.values(), lr=2 * learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimizers


class Objective(nn.Module):
    """What a step minimises. A module, so that DistributedDataParallel can stand around it."""

    def __init__(self, stage: int, model: VQRAE, teacher: nn.Module | None, lpips: nn.Module | None):
        super().__init__()
        self.stage, self.model, self.teacher, self.lpips = stage, model, teacher, lpips

    def forward(self, images: Tensor, teacher_z: Tensor | None, discriminator: nn.Module | None) -> tuple[dict[str, Tensor], Tensor]:
        """All loss parts, with their weighted sum as "loss", and the reconstructions (B, 3, H, W).

        images (B, 3, H, W) in [0, 1]; teacher_z (B, C, h, w): the frozen encoder's features of them, None where there is
        none, and with it no loss in features; discriminator: None as long as the GAN is off.
        """
        with torch.autocast(device, torch.bfloat16, enabled=PRECISION == "bf16"):
            z = teacher_z if self.model.frozen else self.model.encoder(images)
            z_q, quantizer_loss, _ = self.model.quantize(z)
            output = self.model.decode(z_q)
            l2_loss = F.mse_loss(output, images)
            perceptual_loss = distill_loss = predict_loss = torch.zeros_like(l2_loss)
            if self.teacher is not None:
                distill_loss, predict_loss = self.model.compute_distillation_loss(z, z_q, teacher_z, PREDICT_IMAGE)
            perceptual_weight = PERCEPTUAL_WEIGHT[self.stage - 1]
            if perceptual_weight and self.lpips is not None:
                perceptual_loss = self.lpips(output.clamp(0, 1), images, normalize=True).mean()
            elif perceptual_weight and self.teacher is not None:
                perceptual_loss = F.mse_loss(self.teacher(output), teacher_z)
            image_loss = L2_WEIGHT * l2_loss + perceptual_weight * perceptual_loss
            loss = image_loss + quantizer_loss + PREDICT_WEIGHT * predict_loss + DISTILL_WEIGHT * distill_loss
            gan_loss = torch.zeros_like(loss)
            if discriminator is not None:
                gan_loss = -discriminator(output).float().mean()
                # both losses weigh the same at the decoder's last layer (VQGAN, 2012.09841, equation 7)
                sizes = [torch.autograd.grad(part, self.model.decoder.head.weight, retain_graph=True)[0].norm()
                         for part in (image_loss, gan_loss)]
                loss = loss + GAN_WEIGHT * (sizes[0] / (sizes[1] + 1e-4)).clamp(max=1e4) * gan_loss
        return {"loss": loss, "l2_loss": l2_loss, "perceptual_loss": perceptual_loss, "quantizer_loss": quantizer_loss,
                "predict_loss": predict_loss, "distill_loss": distill_loss, "gan_loss": gan_loss,
                "discriminator_loss": torch.zeros_like(loss)}, output


def shuffled(n: int, count: int, epoch: int) -> Tensor:
    """The epoch-th `count` indices (epoch from 0) of an endless stream of shuffled passes over n images, for utils.pick."""
    def one_pass(number: int) -> Tensor:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(SEED * 100_003 + number))
        if FLIP:  # in each pass a half of them, and in the next the other
            mirrored = torch.randint(2, (n,), generator=torch.Generator().manual_seed(SEED * 100_003 + number // 2))
            order += n * (mirrored[order] ^ number % 2)
        return order

    passes = range(epoch * count // n, ((epoch + 1) * count - 1) // n + 1)
    return torch.cat([one_pass(number) for number in passes])[epoch * count - passes[0] * n :][:count]


def check_constants():
    """ValueError, naming the constant, its value and what is allowed, before anything is downloaded."""
    def whole(value, low):
        return isinstance(value, int) and not isinstance(value, bool) and value >= low

    def real(value, low, high=math.inf):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high

    def pair(value, ok):
        return isinstance(value, (tuple, list)) and len(value) == 2 and all(ok(v) for v in value)

    for name in ("DATASET", "ENCODER", "QUANTIZER"):
        check(isinstance(globals()[name], str), name, globals()[name], "a name in quotes")
    check(DATASET in DATASETS or Path(DATASET).is_dir(), "DATASET", DATASET,
          ", ".join(f'"{name}"' for name in DATASETS) + " or a folder with train/ and test/ in it")
    for name in ("IMAGE_SIZE", "GRID", "BATCH_SIZE", "ACCUMULATE"):
        check(whole(globals()[name], 1), name, globals()[name], "a whole number of 1 or more")
    check(IMAGE_SIZE >= 16, "IMAGE_SIZE", IMAGE_SIZE, "16 or more")
    check(IMAGE_SIZE % GRID == 0, "GRID", GRID, f"a divisor of IMAGE_SIZE = {IMAGE_SIZE}")
    check(QUANTIZER in QUANTIZERS, "QUANTIZER", QUANTIZER, ", ".join(f'"{name}"' for name in QUANTIZERS))
    check(isinstance(FSQ_LEVELS, (tuple, list)) and FSQ_LEVELS and all(whole(n, 2) and n <= 2**16 for n in FSQ_LEVELS)
          and math.prod(FSQ_LEVELS) <= 2**24, "FSQ_LEVELS", FSQ_LEVELS,
          "whole numbers from 2 to 2**16, such as (8, 8, 8, 5, 5, 5), and at most 2**24 codes in all")
    for name in ("SIMVQ_CODEBOOK_SIZE", "EMA_CODEBOOK_SIZE"):
        check(whole(globals()[name], 2), name, globals()[name], "a whole number of 2 or more")
    check(real(DDCL_DELTA, 1 / 32, 1) and abs(1 / DDCL_DELTA - round(1 / DDCL_DELTA)) < 1e-2, "DDCL_DELTA", DDCL_DELTA,
          "1 / n for a whole n from 1 to 32 (on the command line 0.0667 for 1 / 15)")
    check(ADAPTER_DEPTH is None or whole(ADAPTER_DEPTH, 0), "ADAPTER_DEPTH", ADAPTER_DEPTH, "None or a whole number of 0 or more")
    check(POST_QUANT_KERNEL == 0 or whole(POST_QUANT_KERNEL, 1) and POST_QUANT_KERNEL % 2, "POST_QUANT_KERNEL",
          POST_QUANT_KERNEL, "0 or an odd number")
    check(BATCH_SIZE % (ranks * ACCUMULATE) == 0, "BATCH_SIZE", BATCH_SIZE, f"a multiple of processes times ACCUMULATE = {ranks} x {ACCUMULATE}")
    check(PRECISION in ("bf16", "fp32"), "PRECISION", PRECISION, '"bf16", "fp32"')
    check(OPTIMIZER in ("muon", "adamw"), "OPTIMIZER", OPTIMIZER, '"muon", "adamw"')
    for name in ("FLIP", "NORMALIZE", "EMA_REVIVE"):
        check(isinstance(globals()[name], bool), name, globals()[name], "True or False")
    check(not (NORMALIZE and ENCODER in FROM_SCRATCH), "NORMALIZE", NORMALIZE, f"False with ENCODER = {ENCODER!r}, whose features change")
    for name in ("DECODER_WIDTH", "DECODER_DEPTH", "DECODER_HEADS", "SIMVQ_CODE_DIM", "EMA_CODE_DIM",
                 "EPOCH_IMAGES", "EVAL_IMAGES"):
        check(globals()[name] is None or whole(globals()[name], 1), name, globals()[name], "None or a whole number of 1 or more")
    check(EPOCH_IMAGES is None or EPOCH_IMAGES >= BATCH_SIZE, "EPOCH_IMAGES", EPOCH_IMAGES, f"None, or at least BATCH_SIZE = {BATCH_SIZE}")
    for name in ("L2_WEIGHT", "GAN_WEIGHT", "PREDICT_WEIGHT", "PREDICT_IMAGE", "DISTILL_WEIGHT", "DDCL_COMM_WEIGHT", "FEATURE_CACHE_GB", "IMAGES_GB"):
        check(real(globals()[name], 0), name, globals()[name], "a number of 0 or more")
    check(PERCEPTUAL in ("encoder", "lpips"), "PERCEPTUAL", PERCEPTUAL, '"encoder", "lpips"')
    check(pair(PERCEPTUAL_WEIGHT, lambda v: real(v, 0)), "PERCEPTUAL_WEIGHT", PERCEPTUAL_WEIGHT, "two numbers of 0 or more")
    check(real(GAN_START, 0, 1), "GAN_START", GAN_START, "0 to 1")
    check(tuple(STAGES) in ((1,), (1, 2), (2,)) if isinstance(STAGES, (tuple, list)) else False, "STAGES", STAGES, "(1,), (1, 2), (2,)")
    check(isinstance(START_CHECKPOINT, str) and Path(START_CHECKPOINT).is_file() or START_CHECKPOINT is None and 1 in STAGES,
          "START_CHECKPOINT", START_CHECKPOINT, "the path of a file, in quotes, or, with 1 in STAGES, None")
    check(pair(EPOCHS, lambda v: whole(v, 1)), "EPOCHS", EPOCHS, "two whole numbers of 1 or more")
    check(pair(LEARNING_RATE, lambda v: real(v, 1e-12)), "LEARNING_RATE", LEARNING_RATE, "two numbers above 0")
    check(whole(KEEP_CHECKPOINTS, 0), "KEEP_CHECKPOINTS", KEEP_CHECKPOINTS, "a whole number of 0 or more")
    check(whole(SEED, 0) and SEED < 2**31, "SEED", SEED, "a whole number from 0 to 2**31 - 1")


if __name__ == "__main__":
    try:
        main()
        if ranks > 1:
            dist.barrier()
            dist.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit("\ntrain.py: stopped")
    except torch.OutOfMemoryError:
        sys.exit("train.py: the GPU's memory is full: try more ACCUMULATE, or less BATCH_SIZE, FEATURE_CACHE_GB or IMAGES_GB")
    except OSError as error:  # a full disk, a folder that must not be written
        sys.exit(f"train.py: {error}; files written before are whole, and the same command goes on from them")
