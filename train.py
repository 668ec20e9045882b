"""Train a VQRAE (2511.23386): images to discrete tokens in a pretrained encoder's feature space, and back.

    python train.py                             with the constants below
    python train.py QUANTIZER=fsq EPOCHS=6      with some of them replaced
    torchrun --nproc_per_node=4 train.py        on several GPUs, which share BATCH_SIZE

    stage  learns                        losses
    1      all but a pretrained encoder  L2, perceptual, quantizer; with GAN_WEIGHT a GAN in the second half
    2      all                           the first three, and self-distillation

Pictures go to outputs/<run>/, a stage's best and last two checkpoints to checkpoints/<run>/. The same command resumes
after the last finished epoch. Other constants, another dataset or changed code make another run.
"""
import inspect
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

# OpenMP's waiting threads would spin, which slows a busy machine. torch's import reads this.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

import utils
from data import Dataset, ImageFiles, load_batches, load_dataset
from models import VQRAE, PatchDiscriminator, build_encoder, load_checkpoint, save_checkpoint
from muon import adamw_and_muon, take_step
from quantizers import QUANTIZERS, InputError, check, errors_as
from utils import evaluate, fast_bf16, first_process_first, progress

# device
DEVICE = ""  # "": CUDA's GPU, or else the CPU; or "cpu", "cuda:1"; "mps" and "xpu" are untested
# some defaults below depend on it, so the command line's DEVICE is read here
device = dict(word.split("=", 1) for word in sys.argv if "=" in word).get("DEVICE", DEVICE) or utils.device
gpu = device.startswith("cuda")
# images
DATASET = "auto"  # CIFAR-10, or else shapes; "cifar10", "shapes", or a folder with train/ and test/
IMAGE_SIZE = 32  # pixels a side
CROP_SIZES = ()  # (32, 64): train on random crops of a folder's photographs, one size a step
# encoder
ENCODER = "cifar"  # it ships; "dinov3_s" and others are downloaded; "cnn" learns from scratch
ENCODER_LAYERS = 0  # how many last layers of a ViT, or feature maps of others, are used; 0: all
GRID = 8  # tokens a side of an image; with "cifar" a token should cover 4 x 4 pixels
# quantizer
QUANTIZER = "ema_vq"  # or "fsq", "simvq", "ddcl", others of QUANTIZERS; "none": the best possible PSNR
CODEBOOK_SIZE = 65536  # "fsq", "ddcl", "residual_fsq" and "library" have constants of their own
CODE_DIM = 16  # how many numbers a learned code has; 0: as many as a feature
EMA_DECAY = 0.99  # of the quantizers' moving averages
COMMITMENT = 0.25  # the commitment loss's weight; "lfq", "bsq" and "library" have their own
CODEBOOKS = 2  # of "residual_vq", "product_vq", "residual_fsq"; two suit CODEBOOK_SIZE = 256
FSQ_LEVELS = (8, 8, 8, 5, 5, 5)  # 64,000 codes; try (8, 6, 5) = 240 or (8, 8, 8) = 512
DDCL_DELTA = 1 / 15  # a step between two values in [-1, 1]
DDCL_COMM_WEIGHT = 1e-3  # weight of a token's bits
LIBRARY = {"kind": "ResidualLFQ", "codebook_size": 256, "num_quantizers": 2}  # of vector-quantize-pytorch
# decoder
POST_QUANT_KERNEL = 1  # size of the convolution after the quantizer; 0: none
POST_QUANT_NORM = False  # a norm after it
DECODER_WIDTH = 0  # 0: a ViT encoder's, behind others 192; ViT-XL has 1152
DECODER_DEPTH = 0  # 0: a ViT encoder's, behind others 2; ViT-XL has 28
DECODER_HEADS = 0  # 0: a ViT encoder's; ViT-XL has 16
# losses
PERCEPTUAL = "encoder"  # the frozen encoder's features, another's ("cifar"), or "lpips" (VGG16); "": none
PERCEPTUAL_WEIGHT = (0.02, 0.02)  # in stages 1 and 2, or a number for both; more lowers PSNR
DISTILL_WEIGHT = 0.1  # stage 2: keeps the encoder's features; less raises PSNR
GAN_WEIGHT = 0.0  # in stage 1's second half; 0.5 costs 0.03 to 0.09 dB, and pictures look the same
# training
STAGES = (1, 2)  # or (1,), or (2,)
START_CHECKPOINT = ""  # the file that training begins with; these constants have to describe it
ACCUMULATE = 1  # micro-batches a step, to save memory
OPTIMIZER = "muon"  # for most matrices behind the encoder, AdamW for the rest; or "adamw" for all, as in papers
SEED = 0
COMPILE = ""  # on a GPU "default" or, with CUDA graphs, "reduce-overhead"
# EPOCHS and LEARNING_RATE: for stages 1 and 2, or a number for both
EPOCHS = (30, 10) if gpu else (6, 4)
EPOCH_IMAGES = 50_000 if gpu else 6_250  # 0: all training images
BATCH_SIZE = 128 if gpu else 32  # images a step, over all processes and micro-batches
LEARNING_RATE = (1e-3, 1e-4) if gpu else (1e-3, 1e-3)  # AdamW's; Muon's is twice this
FLIP = gpu  # mirror half of the images, which helps if epochs repeat them
EVAL_IMAGES = 10_000 if gpu else 1_000  # measured after an epoch; 0: all, as at the end

constant_of = {  # a quantizer's option: its constant
    "codebook_size": "CODEBOOK_SIZE", "code_dim": "CODE_DIM", "decay": "EMA_DECAY", "commitment_cost": "COMMITMENT",
    "codebooks": "CODEBOOKS", "levels": "FSQ_LEVELS", "delta": "DDCL_DELTA", "comm_weight": "DDCL_COMM_WEIGHT",
    "commitment_weight": "COMMITMENT", "num_quantizers": "CODEBOOKS"}  # the last two for build_model's messages
bf16 = False  # start_process() sets it if bf16 is fast; metrics are in fp32
rank, ranks = int(os.getenv("RANK", 0)), int(os.getenv("WORLD_SIZE", 1))  # torchrun sets both


def objective(model: VQRAE, images: Tensor, frozen: nn.Module | None, perceptual: nn.Module | None,
              discriminator: nn.Module | None) -> dict[str, Tensor]:
    """{name: scalar}: each loss before its weight, and as "loss" the weighted sum that the model minimises.

    images (B, 3, H, W) in [0, 1]; of the three networks each may be None
    frozen: the pretrained encoder before training, in stage 1 the model's own
    perceptual: the network whose features the perceptual loss compares, or LPIPS
    discriminator: minimises "discriminator_loss"
    """
    frozen_z = frozen(images) if frozen else None  # (B, C, h, w)
    z = frozen_z if frozen is model.encoder else model.encoder(images)
    z_q, quantizer_loss, _ = model.quantize(z)
    output = model.decode(z_q, images.shape[2:])
    l2_loss = F.mse_loss(output, images)
    perceptual_loss = distill_loss = gan_loss = discriminator_loss = torch.zeros_like(l2_loss)
    if frozen:
        distill_loss = model.compute_distillation_loss(z, frozen_z)  # 0 in stage 1
    perceptual_weight = stage_value(PERCEPTUAL_WEIGHT, model.stage)
    if perceptual_weight and PERCEPTUAL == "lpips":
        perceptual_loss = perceptual(output.clamp(0, 1), images, normalize=True).mean()
    elif perceptual_weight and perceptual:  # half of the images are enough
        target = frozen_z[::2] if perceptual is frozen else perceptual(images[::2])
        perceptual_loss = F.mse_loss(perceptual(output[::2]), target)
    pixel_loss = 16 * l2_loss  # 1/16 is about the variance of pixels
    loss = pixel_loss + perceptual_weight * perceptual_loss + quantizer_loss + DISTILL_WEIGHT * distill_loss
    if discriminator:
        weights = {name: p.detach() for name, p in discriminator.named_parameters()}  # for the model's gradient alone
        gan_loss = -torch.func.functional_call(discriminator, weights, output).float().mean()
        real, fake = discriminator(torch.cat([images, output.detach()])).float().chunk(2)
        discriminator_loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2  # real > 1, fake < -1
        # at the last layer, the GAN's gradient gets the norm of the pixels' (VQGAN, 2012.09841, eq. 7, has LPIPS)
        pixel_norm, gan_norm = (torch.autograd.grad(x, model.decoder.head.weight, retain_graph=True)[0].norm()
                                for x in (pixel_loss, gan_loss))
        balance = (pixel_norm / (gan_norm + 1e-4)).clamp(max=1e4)
        loss = loss + GAN_WEIGHT * balance * gan_loss
    return dict(loss=loss, l2_loss=l2_loss, perceptual_loss=perceptual_loss, quantizer_loss=quantizer_loss,
                distill_loss=distill_loss, gan_loss=gan_loss, discriminator_loss=discriminator_loss)


def add_gradients(*arguments) -> dict[str, Tensor]:
    """Add a micro-batch's gradients to .grad. Takes objective's arguments, returns its losses."""
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        losses = objective(*arguments)
    ((losses["loss"] + losses["discriminator_loss"]) / ACCUMULATE).backward()
    return {name: loss.detach() for name, loss in losses.items()}


def train_stage(stage: int, model: VQRAE, teacher: nn.Module | None, perceptual: nn.Module | None, data: Dataset,
                run: utils.Run):
    """Train one stage, or what is left of it. Each epoch is measured and saved."""
    model.set_stage(stage).train()
    utils.seed_everything(SEED, stage)
    frozen = model.encoder if model.encoder_frozen else teacher
    perceptual = frozen if PERCEPTUAL == "encoder" else perceptual  # None for "cnn"
    discriminator = PatchDiscriminator(sizes()[0]).to(device)  # fits the smallest crops; each run saves one
    optimizers = build_optimizers(model, stage)
    gan_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.9), fused=True)
    state = {"model": model, "discriminator": discriminator, "gan_optimizer": gan_optimizer, **optimizers}
    compute = torch.compile(add_gradients, fullgraph=True, dynamic=False, mode=COMPILE) if COMPILE else add_gradients
    epochs = stage_value(EPOCHS, stage)
    steps = (EPOCH_IMAGES or len(data.train_images)) // BATCH_SIZE  # of an epoch
    first_epoch = run.resume(state, stage)  # it loads the state of a stage that was begun
    batches = stage_batches(data.train_images, stage, range(first_epoch, epochs + 1), steps)
    for epoch in range(first_epoch, epochs + 1):
        utils.seed_everything(SEED, stage, epoch, rank)  # the same in a resumed run
        start, log = time.perf_counter(), []
        for step in (bar := progress(range(1, steps + 1), f"stage {stage} epoch {epoch}/{epochs}")):
            done = (epoch - 1) * steps + step - 1  # steps that this stage has taken
            gan_on = stage == 1 and GAN_WEIGHT > 0 and done >= epochs * steps / 2
            for _ in range(ACCUMULATE):
                losses = compute(model, next(batches), frozen, perceptual, discriminator if gan_on else None)
                log.append(torch.stack([*losses.values()]))
                learning = [p for p in (*model.parameters(), *discriminator.parameters()) if p.grad is not None]
                if COMPILE and ACCUMULATE > 1:  # a CUDA graph's next run overwrites gradients
                    for p in learning:
                        p.grad = p.grad.clone()
            utils.average([p.grad for p in learning])  # over all processes
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            take_step(optimizers, done, epochs * steps)
            gan_optimizer.step()
            for p in learning:
                p.grad = None
            if step % 100 == 0 or step == steps:  # seldom: it waits for the GPU
                finite = torch.stack([x.isfinite().all() for x in (log[-1], *model.state_dict().values())]).all()
                check(finite, f"In stage {stage}, epoch {epoch}, step {step}, the loss is {log[-1][0]:.4f}, or weights "
                      "are not finite: try a lower LEARNING_RATE.")
                if step < steps:
                    bar.write(f"{stage:6} {epoch:6} {log[-1][0]:9.4f}   (step {step} of {steps})")
                    sys.stdout.flush()
        means = torch.stack(log).mean(0)
        utils.average([means])
        losses, seconds = dict(zip(losses, means.tolist())), time.perf_counter() - start
        if rank == 0:
            tested = data.test_images[: EVAL_IMAGES or None]
            metrics, _, output = evaluate(model, tested, micro_batch_size(), keep=8)
            row = {"stage": stage, "epoch": epoch, **losses, **metrics,
                   "images_per_second": steps * BATCH_SIZE / seconds, "seconds": seconds}
            save_epoch(run, row, model, state, tested[:8], output)
            print("{stage:6} {epoch:6} {loss:9.4f} {psnr:6.2f} {ssim:7.4f} {usage:11.1%} {perplexity:11,.0f} "
                  "{images_per_second:9,.0f} {seconds:8.0f}".format(**row), flush=True)
            if len(run.history) == 1:  # an epoch of stage 2 takes about 1.4 times as long
                times = sum(stage_value(EPOCHS, each) * (1.4 if each > stage else 1) for each in STAGES)
                print(f"the whole run takes about {(time.perf_counter() - start) / 60 * times:.1f} minutes", flush=True)


# Batches and optimizers

def stage_batches(images: Tensor | ImageFiles, stage: int, epochs: range, steps: int) -> Iterator[Tensor]:
    """This process's micro-batches (B, 3, size, size)."""
    def indices() -> Iterator[tuple[Tensor, int, int]]:
        passes = math.ceil(steps * BATCH_SIZE / len(images))
        for epoch in epochs:
            seed = SEED * 10**5 + stage * 10**4 + epoch
            generator = torch.Generator().manual_seed(seed)
            order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(passes)])
            order = order[: steps * BATCH_SIZE].to(images.device).view(steps, ranks, ACCUMULATE, micro_batch_size())
            for step in range(steps):
                for index in order[step, rank]:
                    yield index, sizes()[step % len(sizes())], seed * 10**6 + step  # the seed of its crops

    return load_batches(images, indices(), FLIP, device)


def micro_batch_size() -> int:
    """How many images a process takes at a time."""
    return BATCH_SIZE // (ranks * ACCUMULATE)


def sizes() -> list[int]:
    """The sides of training images, the smallest first."""
    return sorted(CROP_SIZES) or [IMAGE_SIZE]


def stage_value(value: object, stage: int) -> object:
    """A constant's value in this stage: stage_value((30, 10), 2) is 10."""
    return value[stage - 1] if isinstance(value, tuple) else value


def build_optimizers(model: VQRAE, stage: int) -> dict[str, torch.optim.Optimizer]:
    """A stage's optimizers, {name: optimizer}."""
    blocks = ("adapter.", "post_quant_conv.", "decoder.layers.", "decoder.blocks.")
    return adamw_and_muon(model, blocks if OPTIMIZER == "muon" else (), stage_value(LEARNING_RATE, stage))


# The model and the networks of its losses

def quantizer_options() -> dict:
    """QUANTIZER's options, from the constants."""
    # a micro-batch's tokens, of the smallest and of the largest images
    least, most = (micro_batch_size() * (GRID * size // IMAGE_SIZE) ** 2 for size in (sizes()[0], sizes()[-1]))
    if QUANTIZER == "library":
        return LIBRARY
    if QUANTIZER in ("lfq", "bsq"):
        # all codes are compared with this fraction of the tokens: 2**24 pairs at most, but two tokens, as none give NaN
        fraction = max(2**24 / CODEBOOK_SIZE / most, 2 / least)
        return dict(codebook_size=CODEBOOK_SIZE, frac_per_sample_entropy=min(1.0, fraction))
    if QUANTIZER == "rotation_vq":  # codes with less than 0.1 of the mean usage are dead
        return dict(codebook_size=CODEBOOK_SIZE, code_dim=CODE_DIM, decay=EMA_DECAY, commitment_weight=COMMITMENT,
                    threshold_ema_dead_code=0.1 * ranks * most / CODEBOOK_SIZE)
    if QUANTIZER == "residual_fsq":
        return dict(levels=FSQ_LEVELS, num_quantizers=CODEBOOKS)
    names = inspect.signature(QUANTIZERS[QUANTIZER]).parameters
    return {name: globals()[constant] for name, constant in constant_of.items() if name in names}


def build_model() -> VQRAE:
    """The constants' model, with START_CHECKPOINT's weights. InputError if constants contradict the file."""
    model = VQRAE(encoder=ENCODER, quantizer=QUANTIZER, quantizer_options=quantizer_options(), image_size=IMAGE_SIZE,
                  grid=GRID, encoder_layers=ENCODER_LAYERS, post_quant_kernel=POST_QUANT_KERNEL,
                  post_quant_norm=POST_QUANT_NORM, decoder_width=DECODER_WIDTH, decoder_depth=DECODER_DEPTH,
                  decoder_heads=DECODER_HEADS, pretrained=not START_CHECKPOINT)
    if START_CHECKPOINT:
        start = load_checkpoint(START_CHECKPOINT)
        check(start.stage <= STAGES[0], f'{START_CHECKPOINT = }, allowed: a file of stage 1, or "STAGES=(2,)"')
        check(start.token_size == model.token_size,
              f"IMAGE_SIZE / GRID = {model.token_size}, allowed: {start.token_size} with {START_CHECKPOINT = }")
        # options that are not given have their class's defaults
        default = {name: x.default for name, x in inspect.signature(QUANTIZERS[QUANTIZER]).parameters.items()}
        known, new = (default | x.config | x.config["quantizer_options"] for x in (start, model))
        # images may have another size; the last two options follow from BATCH_SIZE
        free = {"image_size", "grid", "quantizer_options", "frac_per_sample_entropy", "threshold_ema_dead_code"}
        for name, value in (model.config | dict.fromkeys(known) | new).items():
            library = QUANTIZER == "library" and name not in model.config
            constant = "LIBRARY" if library else constant_of.get(name, name.upper())
            check(name in free or value == known.get(name),
                  f"{constant} = {value!r:.300}, allowed: {known.get(name)!r} with {START_CHECKPOINT = }")
        model.load_state_dict(start.state_dict())
    return model


def build_loss_networks(model: VQRAE) -> tuple[nn.Module | None, nn.Module | None]:
    """Stage 2's frozen encoder (None for "cnn"), and objective's `perceptual` unless it is the encoder."""
    teacher = None if model.from_scratch else build_encoder(ENCODER, model.token_size, ENCODER_LAYERS)
    perceptual = None
    if PERCEPTUAL == "lpips":
        with errors_as(OSError, "PERCEPTUAL = 'lpips' needs torchvision's weights of VGG16"):
            perceptual = LearnedPerceptualImagePatchSimilarity("vgg").net
    elif PERCEPTUAL not in ("encoder", ""):
        with errors_as(InputError, f"{PERCEPTUAL = }, allowed: encoder, lpips, or a pretrained network"):
            check(PERCEPTUAL != "cnn", "cnn is not pretrained")
            perceptual = build_encoder(PERCEPTUAL, model.token_size)
    for network in filter(None, (teacher, perceptual)):
        network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return teacher, perceptual


# Set-up and files

def main():
    """Train with these constants, or NAME=value from the command line."""
    constants = utils.read_constants(globals(), sys.argv[1:])  # it sets them
    check_constants(constants)
    start_process()
    utils.seed_everything(SEED)  # all processes build the same model
    with first_process_first():  # it downloads and decodes
        model = build_model().to(device)
        data = load_dataset(DATASET, IMAGE_SIZE, CROP_SIZES)
    most = EPOCH_IMAGES or len(data.train_images)
    check(BATCH_SIZE <= most, f"{BATCH_SIZE = }, allowed: at most an epoch's {most}")
    model.constants = constants | {"DATASET": Path(data.name).resolve().name}  # a folder may move
    start = START_CHECKPOINT and utils.digest_file(START_CHECKPOINT)
    key = utils.digest((sorted(model.constants.items()), data.digest, start, utils.digest_code()))
    name = f"{model.constants['DATASET']}_{Path(ENCODER).name.replace(':', '_')}_{QUANTIZER}_{key}"
    run = utils.Run(name, rank == 0)
    if ranks > 1:
        states = [None] * ranks
        dist.all_gather_object(states, (name, run.finished, run.stage, run.epoch))
        check(len({*states}) == 1, f"Processes do not agree on the run: {states}. They need a common disk.")
    if run.finished:
        return print(f"This run is finished: see {run.outputs}/. Another SEED makes another run.")
    with first_process_first():
        teacher, perceptual = build_loss_networks(model)
    if isinstance(data.train_images, Tensor) and data.train_images.nbytes < 8e9:
        data = data._replace(train_images=data.train_images.to(device))
    print(f"{name}: {len(data.train_images):,} training and {len(data.test_images):,} test images, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {ranks} x {device}")
    if run.stage:
        print(f"resuming after stage {run.stage}, epoch {run.epoch}")
    print(f"PSNR, SSIM, codes used, perplexity: of {len(data.test_images[: EVAL_IMAGES or None]):,} test images\n"
          " stage  epoch      loss   PSNR    SSIM  codes used  perplexity  images/s  seconds", flush=True)
    for stage in STAGES:
        if stage >= run.stage:  # a finished one loads its weights
            train_stage(stage, model, teacher, perceptual, data, run)
    if rank == 0:
        finish(run, model, data)
    if ranks > 1:
        dist.destroy_process_group()


def start_process():
    """Set `device` and `bf16`, connect torchrun's processes. InputError if the device is missing."""
    global device, bf16
    with errors_as(InputError, f"{DEVICE = }, allowed: a device that torch finds, one for each process"):
        chosen = torch.device(device)
        device = chosen.type
        if gpu:
            torch.cuda.set_device(int(os.getenv("LOCAL_RANK", chosen.index or 0)))
        torch.zeros(1, device=device)
    bf16 = fast_bf16(device)
    if COMPILE:  # for each size a graph for stage 1, its GAN and stage 2; torch's limit is 8
        torch._dynamo.config.trace_autograd_ops = True  # for add_gradients
        torch._dynamo.config.recompile_limit = 8 * len(sizes())
    if device == "cpu":
        utils.prepare_cpu()
    if ranks > 1:  # while the first downloads and decodes, the others may wait a day
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(days=1))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")


def save_epoch(run: utils.Run, row: dict, model: VQRAE, state: dict, images: Tensor, output: Tensor):
    """Write an epoch's grid of images and output, uint8 (N, 3, H, W), curves, checkpoints and state."""
    stage, epoch = row["stage"], row["epoch"]
    utils.save_pairs(run.outputs / f"stage{stage}_epoch_{epoch:03}.png", images, output, columns=4)
    utils.plot_curves(run.outputs / "curves.png", [*run.history, row], run.name)
    path = f"{run.checkpoints}/{model.config['quantizer']}_stage{stage}"
    if row["psnr"] >= max((old["psnr"] for old in run.history if old["stage"] == stage), default=0):
        save_checkpoint(f"{path}_best.pt", model, run=run.name, metrics=row)
    save_checkpoint(f"{path}_epoch_{epoch}.pt", model, run=run.name, metrics=row)
    run.save(row, state)
    Path(f"{path}_epoch_{epoch - 2}.pt").unlink(missing_ok=True)


def finish(run: utils.Run, model: VQRAE, data: Dataset):
    """Measure the last stage's best epoch on all test images."""
    path = run.checkpoints / f"{model.config['quantizer']}_stage{STAGES[-1]}_best.pt"
    check(utils.load_torch(path, "run")["run"] == run.name, f"The checkpoint {path} is not from this run. Delete it.")
    metrics, counts, output = evaluate(load_checkpoint(path).to(device), data.test_images, micro_batch_size(), keep=64)
    utils.save_pairs(run.outputs / "final.png", data.test_images[:64], output, columns=16)
    if len(counts):
        utils.plot_usage(run.outputs / "usage.png", counts, metrics, run.name)
    run.finish({"run": run.name, **metrics, "constants": model.constants})
    print(f"all {len(data.test_images):,} test images: PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.4f}, "
          f"{metrics['usage']:.1%} of codes used, perplexity {metrics['perplexity']:,.0f}\n"
          f"see {run.outputs}/ and {run.checkpoints}/")


def check_constants(constants: dict):
    """InputError for a constant with a wrong value."""
    for name, allowed in {"QUANTIZER": [*QUANTIZERS], "OPTIMIZER": ["muon", "adamw"],
                          "COMPILE": ["", "default", "reduce-overhead"], "STAGES": [(1,), (1, 2), (2,)]}.items():
        check(constants[name] in allowed, f"{name} = {constants[name]!r}, allowed: {', '.join(map(repr, allowed))}")
    least = dict(IMAGE_SIZE=16, GRID=1, CODEBOOK_SIZE=2, CODEBOOKS=1, ACCUMULATE=1, SEED=0, EPOCHS=1, EPOCH_IMAGES=0,
                 BATCH_SIZE=1, EVAL_IMAGES=0, COMMITMENT=0.0, PERCEPTUAL_WEIGHT=0.0, DISTILL_WEIGHT=0.0, GAN_WEIGHT=0.0,
                 LEARNING_RATE=0.0)
    for name, low in least.items():
        value, pair = constants[name], name in ("EPOCHS", "LEARNING_RATE", "PERCEPTUAL_WEIGHT")
        values = value if pair and isinstance(value, tuple) else (value, value)
        valid = len(values) == 2 and all(type(x) in (int, type(low)) and low <= x < math.inf for x in values)
        check(valid, f"{name} = {value!r:.300}, allowed: a number from {low}{', or two' if pair else ''}")
    check(all(type(size) is int and size > 7 and size * GRID % IMAGE_SIZE == 0 for size in CROP_SIZES),
          f"{CROP_SIZES = }, allowed: 8 or more, multiples of IMAGE_SIZE / GRID = {IMAGE_SIZE / GRID:g} pixels")
    check(0 < EMA_DECAY < 1, f"{EMA_DECAY = }, allowed: between 0 and 1")
    check(not START_CHECKPOINT or os.path.isfile(START_CHECKPOINT), f"{START_CHECKPOINT = }, allowed: a file")
    check(START_CHECKPOINT or 1 in STAGES, f"{STAGES = }, allowed: (1,) or (1, 2) without a START_CHECKPOINT")
    check(BATCH_SIZE % (ranks * ACCUMULATE) == 0, f"{BATCH_SIZE = }, allowed: multiples of {ranks} x {ACCUMULATE = }")
    with errors_as(InputError, "The constants do not fit into results.json"):
        json.dumps(constants)


if __name__ == "__main__":
    with utils.one_line_errors("stopped; the same command resumes"):
        main()
