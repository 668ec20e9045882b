"""Train a VQRAE (2511.23386): images to discrete tokens in a pretrained encoder's feature space, and back.

    python train.py                                    with the constants below
    python train.py QUANTIZER=simvq BATCH_SIZE=64      with some of them replaced
    torchrun --nproc_per_node=4 train.py               on several GPUs, BATCH_SIZE being that of all together

Stage 1: the encoder is frozen, all else learns. Stage 2: everything learns, and self-distillation keeps the encoder's
features close to the frozen encoder's. Grids and curves go to outputs/<run>/, checkpoints to
checkpoints/<run>/. A run that was stopped resumes after its last epoch; a changed constant is a new run.
"""
import copy
import inspect
import json
import math
import os
import sys
import time
from datetime import timedelta
from errors import one_line_errors
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import plots
import utils
from models import PRETRAINED_DIR, VQRAE, PatchDiscriminator, build_encoder
from optimization import BF16Weights, adamw_and_muon, autocast_layers, load_states, prepare_cpu, take_step
from quantizers import QUANTIZERS, check, fast_bf16
from utils import Dataset, FeatureCache

device = "cuda" if torch.cuda.is_available() else "cpu"
rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))  # torchrun sets them
ranks = int(os.environ.get("WORLD_SIZE", 1))

# images
DATASET = "auto"  # "cifar10", "cifar100", "shapes", or a folder with train/ and test/; "auto": CIFAR-10 or else shapes;
# several, ("cifar10", "cifar10", "photos"): steps alternate between them
IMAGE_SIZE = 32  # pixels a side, of whole images; in brackets, (32,) or (32, 64), of random crops: of several sizes,
# steps take turns, and have fewer of the larger images
FLIP = device == "cuda"  # mirror half of the training images, at random: worth it when each image is seen several times
# encoder and quantizer
ENCODER = "cifar"  # ships with the repository; "dinov2_s" and other pretrained ViTs are downloaded, see RESULTS.md;
# baselines without pretraining, which learn in both stages, from pixels (and LPIPS) alone: "scratch", the same
# architecture, and "cnn" (with GRID = 4)
GRID = 8  # tokens a side of the smallest IMAGE_SIZE: "cifar" was made for IMAGE_SIZE / GRID = 4 pixels a token
QUANTIZER = "ema_vq"  # or "fsq", "simvq", "ddcl"; "none" is the upper bound for all of them
FSQ_LEVELS = (8, 8, 8, 5, 5, 5)  # 64,000 codes; try (8, 6, 5) = 240 or (8, 8, 8) = 512
SIMVQ_CODEBOOK_SIZE = 16384
SIMVQ_CODE_DIM = 8  # width of a code; None: that of the encoder's features, as in SimVQ's paper (VQRAE's: 1,536)
EMA_CODEBOOK_SIZE = 65536
EMA_CODE_DIM = 16  # width of a code: with 8 the PSNR is the same, but z_q tells less of what images show
EMA_REVIVE = True  # dead-code revival: codes that fall out of use start again at tokens of the batch
CODEBOOKS = 1  # of the size above each, not with "ddcl": two of 256 make 65,536 codes
COMBINE = "residual"  # each codebook quantizes what those before it left over; "product": each its own dimensions
RANDOM_DEPTH = 0.0  # quantizer dropout: share of images of which a random number of residual codebooks is used
DDCL_DELTA = 1 / 15  # quantization step of DDCL's four dimensions, in [-1, 1]
DDCL_COMM_WEIGHT = 1e-3  # loss for each bit of the message
ADAPTER_DEPTH = None  # blocks before the quantizer; None: one transformer block behind a ViT, else three convolutional
POST_QUANT_KERNEL = 1  # convolution behind the quantizer, as in Cosmos-Tokenizer; 0: none
DECODER = None  # "conv", "vit"; None: the kind of the encoder
DECODER_WIDTH = None  # None: a ViT encoder's own, else 192. ViT-XL has 1152
DECODER_DEPTH = None  # blocks; None: a ViT encoder's own, else 2 for "conv", 4 for "vit". ViT-XL has 28
DECODER_HEADS = None  # of "vit"; None: a ViT encoder's own, else 3. ViT-XL has 16
# weights of the losses
L2_WEIGHT = 16.0  # pixels in [0, 1] have a variance of about 1/16: the loss is the share of it that is wrong
PERCEPTUAL = "encoder"  # distance in the frozen encoder's features, or "lpips" (downloads VGG16)
PERCEPTUAL_WEIGHT = (0.02, 0.02)  # stage 1, stage 2; more costs PSNR, but images are closer in the encoder's features
GAN_WEIGHT = 0.5 if device == "cuda" else 0.0  # stage 1; costs PSNR in a run as short as a CPU's, see RESULTS.md
GAN_START = 0.5  # after this share of stage 1
PREDICT_WEIGHT = 0.005  # the frozen encoder's features, predicted from z_q: keeps the tokens' meaning
PREDICT_IMAGE = 10.0  # weight of the error of an image's mean features, which is added to that of its tokens' features
DISTILL_WEIGHT = 0.3  # stage 2: the encoder's features, held to the frozen encoder's
# training
STAGES = (1, 2)  # (1,), (1, 2) or (2,)
START_CHECKPOINT = None  # a path: start from its weights; a quantizer that differs starts anew. STAGES = (2,) needs one
EPOCHS = (30, 10) if device == "cuda" else (8, 2)  # of stages 1 and 2; the papers', or 25 to 50 minutes on a CPU
EPOCH_IMAGES = 50_000 if device == "cuda" else 6_250  # an epoch has EPOCH_IMAGES // BATCH_SIZE steps,
# however many datasets and sizes; images are repeated if there are fewer. None: as many as the largest dataset has
EVAL_IMAGES = None if device == "cuda" else 1_000  # test images measured after each epoch (None, and at the end: all)
BATCH_SIZE = 128 if device == "cuda" else 32  # images a step, of all processes together
ACCUMULATE = 1  # micro-batches a step in each process, to save memory; EMA-VQ's codebook is then updated, and the GAN's
# adaptive weight computed, with each of them
PRECISION = "bf16" if fast_bf16(device) else "fp32"  # of training; measuring is in fp32 (a GPU's convolutions: TF32)
OPTIMIZER = "muon"  # for the matrices of the blocks, AdamW for all else; or "adamw" throughout, as in the papers
LEARNING_RATE = (1e-3, 1e-5) if device == "cuda" else (1e-3, 1e-3)  # of each stage, AdamW's; Muon's is twice this
# a change of the next three does not begin a new run
FEATURE_CACHE_GB = 4.0  # device memory for the training images' frozen features (CIFAR-10 in bf16: 1.6; with FLIP 3.3)
IMAGES_GB = 8.0  # datasets up to this size are kept on the device (CIFAR-10: 0.18), others on the host
KEEP_CHECKPOINTS = 2  # epoch_k checkpoints kept of each stage, besides the best
SEED = 0

loss_names = ("loss", "l2_loss", "perceptual_loss", "quantizer_loss", "predict_loss", "distill_loss", "gan_loss",
              "discriminator_loss")  # columns of metrics.csv


def main():
    with one_line_errors(ValueError, RuntimeError, OSError, quiet=rank > 0):
        start_process()
        constants = utils.read_constants(globals())
        check_constants()
        check_memory(build_model(False, meta=True))  # what does not fit fails here, before anything is downloaded
        names = [DATASET]
        if rank > 0:
            dist.broadcast_object_list(names)  # the first process downloads and decodes; the others wait for it
        lpips = utils.load_lpips().to(device) if PERCEPTUAL == "lpips" else None
        utils.seed_everything(SEED)
        model = build_model()
        teacher = build_teacher(model)
        data = utils.load_datasets(names[0], IMAGE_SIZE)
        if DATASET == "auto":
            constants["DATASET"] = names[0] = data[0].name
        if ranks > 1 and rank == 0:
            dist.broadcast_object_list(names)
        most = max(len(part.train_images) for part in data)
        check(BATCH_SIZE <= (EPOCH_IMAGES or most), "BATCH_SIZE", BATCH_SIZE, f"at most the {most} training images")
        run = Run(constants, data)
    images = ", ".join(dict.fromkeys(f"{len(part.train_images):,} training and {len(part.test_images):,} test images "
                                     f"of {part.label}" for part in data))
    say(f"{run.name}: {images}, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {ranks} x {device}")
    if run.finished:
        return say(f"this run is finished: see {run.outputs} and {run.checkpoints}, or change a constant for another")
    if run.saved["stage"]:
        say(f"resuming after stage {run.saved['stage']}, epoch {run.saved['epoch']}")

    splits = {part.name: (part.train_images, part.test_images) for part in data}  # which several sizes share
    if sum(images.nbytes for split in splits.values() for images in split) <= IMAGES_GB * 1e9:
        splits = {name: (train.to(device), test.to(device)) for name, (train, test) in splits.items()}
        data = [part._replace(train_images=splits[part.name][0], test_images=splits[part.name][1]) for part in data]
    dtype = torch.bfloat16 if PRECISION == "bf16" else torch.float32
    caches, free = {}, FEATURE_CACHE_GB
    for label, part in {part.label: part for part in data}.items():
        caches[label] = cache = FeatureCache(teacher, part, device, free, dtype, FLIP)
        if cache.gigabytes > free > 0:
            say(f"the frozen features take {cache.gigabytes:.1f} GB, more than is left of FEATURE_CACHE_GB = "
                f"{FEATURE_CACHE_GB}, and are computed anew in each step")
        free -= cache.gigabytes if cache.gigabytes <= free else 0
    features = [caches[part.label] for part in data]
    tested = sum(len(images[:EVAL_IMAGES]) for images in {part.label: part.test_images for part in data}.values())
    say(f"PSNR, SSIM, codes used and perplexity are of {tested:,} test images:\n"
        " stage  epoch      loss   PSNR    SSIM  codes used  perplexity  images/s  seconds")
    try:
        for stage in STAGES:
            if stage >= run.saved["stage"]:
                train_stage(stage, model, teacher, lpips, features, data, run)
    except KeyboardInterrupt:
        saved = f"{run.last} has all epochs above, and the same command goes on from there"
        sys.exit(f"\ntrain.py: stopped; {saved if run.last.exists() else 'no epoch was finished, so nothing is saved'}")
    if rank == 0:
        try:
            run.measure_best(data)
        except ValueError as error:
            sys.exit(f"train.py: {error}; delete {run.last} to train anew")


def train_stage(stage: int, model: VQRAE, teacher: nn.Module | None, lpips: nn.Module | None,
                features: list[FeatureCache], data: list[Dataset], run: "Run"):
    """Train one stage, from its first epoch or where `run` was stopped, and leave grids, curves and checkpoints."""
    model.set_stage(stage).train()
    steps_per_epoch = (EPOCH_IMAGES or max(len(part.train_images) for part in data)) // BATCH_SIZE
    turns = math.ceil(steps_per_epoch / len(data))  # of each dataset and size, one after the other
    steps = EPOCHS[stage - 1] * steps_per_epoch
    optimizers = build_optimizers(model, LEARNING_RATE[stage - 1])
    utils.seed_everything(SEED, stage)
    discriminator = PatchDiscriminator(data[0].size).to(device)
    gan_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.9), fused=True)
    gan_start = math.ceil(GAN_START * steps) if stage == 1 and GAN_WEIGHT > 0 else math.inf

    state = {"model": model, "discriminator": discriminator, "gan_optimizer": gan_optimizer}
    state |= {f"optimizer_{i}": optimizer for i, optimizer in enumerate(optimizers)}
    first_epoch = 1
    if run.saved["stage"] == stage:
        load_states(state, run.saved, run.last)
        first_epoch = run.saved["epoch"] + 1
    objective, discriminate = Objective(stage, model, teacher, lpips), discriminator
    if PRECISION == "bf16":
        objective, discriminate = BF16Weights(objective), BF16Weights(discriminator)
    share = torch.tensor(1 / ACCUMULATE, device=device)  # of a micro-batch in the gradient
    discriminate_ddp = discriminate
    if ranks > 1:  # gradients are averaged over processes; codebooks keep themselves equal
        known = inspect.signature(DistributedDataParallel).parameters  # torch 2.14 has a new name for this option
        option = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
        objective = DistributedDataParallel(objective, **option)
        discriminate_ddp = DistributedDataParallel(discriminate, **option)

    for epoch in range(first_epoch, EPOCHS[stage - 1] + 1):
        utils.seed_everything(SEED, stage, epoch, rank)  # an epoch is the same in a run that was resumed before it
        place, start, seen = f"stage {stage}, epoch {epoch}", time.time(), 0
        orders = []  # of each dataset and size: this process's share of its turns (turns, micro-batches, images)
        for i, part in enumerate(data):
            shape = turns, ranks, ACCUMULATE, micro_batch_size(part.size)
            order = shuffled(len(part.train_images), math.prod(shape), epoch - 1 + (stage - 1) * EPOCHS[0], i)
            order = order.view(shape)[:, rank]
            features[i].fill(order.flatten(0, 1))
            orders.append(order.to(part.train_images.device))
        log = torch.zeros(steps_per_epoch, len(loss_names) + 1, device=device)  # a row a step: losses, gradient's norm
        progress = tqdm(range(steps_per_epoch), f"stage {stage} epoch {epoch}/{EPOCHS[stage - 1]}", leave=False,
                        disable=rank > 0)
        for step in progress:
            done = (epoch - 1) * steps_per_epoch + step
            turn, number = done % len(data), step // len(data)
            gan = done >= gan_start
            for i, index in enumerate(orders[turn][number]):
                images, teacher_z = features[turn][index]
                seen += len(images)
                if ranks > 1:  # the last micro-batch's backward pass sends the gradients of all
                    last = i == ACCUMULATE - 1
                    objective.require_backward_grad_sync = discriminate_ddp.require_backward_grad_sync = last
                discriminator.requires_grad_(False)
                try:
                    losses, output = objective(images, teacher_z, discriminate if gan else None)
                except ValueError as error:  # from the quantizer: features that are not finite
                    exit_if_not_finite(log, place)
                    sys.exit(f"train.py: {error}, at {place}, step {step + 1}; checkpoints of earlier epochs are kept")
                losses["loss"].backward(share)
                if gan:
                    discriminator.requires_grad_(True)
                    with torch.autocast(device, torch.bfloat16, enabled=PRECISION == "bf16"):
                        real, fake = discriminate_ddp(torch.cat([images, output.detach()])).float().chunk(2)
                    losses["discriminator_loss"] = F.relu(1 + torch.stack([-real, fake])).mean()  # hinge
                    losses["discriminator_loss"].backward(share)
                log[step, :-1] += torch.stack([losses[name].detach() for name in loss_names])
            log[step, -1] = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            take_step(optimizers, done, steps)
            model.zero_grad()
            if gan:
                gan_optimizer.step()
                gan_optimizer.zero_grad()
            if step % 50 == 49 or step == steps_per_epoch - 1:  # not each step: looking at a value waits for the GPU
                exit_if_not_finite(log, place)

        gan_steps = min(max(epoch * steps_per_epoch - gan_start, 0), steps_per_epoch)
        losses, seconds = mean_losses(log, gan_steps), time.time() - start
        if rank == 0:
            measured = measure(model, data, EVAL_IMAGES)
            row = {"dataset": run.dataset, "stage": stage, "epoch": epoch, **losses, **mean_metrics(measured),
                   "images_per_second": ranks * seen / seconds, "seconds": seconds}
            run.save_epoch(row, model, state, measured)
            say(f"{stage:6} {epoch:6} {row['loss']:9.4f} {row['psnr']:6.2f} {row['ssim']:7.4f} {row['usage']:11.1%} "
                f"{row['perplexity']:11,.0f} {row['images_per_second']:9,.0f} {seconds:8.0f}")


def measure(model: VQRAE, data: list[Dataset], count: int | None) -> dict[str, tuple]:
    """By label, what utils.evaluate returns of `count` test images (None: all), and these (N, 3, H, W), uint8."""
    measured = {}
    for part in {part.label: part for part in data}.values():
        images = part.test_crops()[:count]
        measured[part.label] = *utils.evaluate(model, images, micro_batch_size(part.size)), images
    return measured


def mean_metrics(measured: dict[str, tuple]) -> dict[str, float]:
    """The metrics of all parts of the data, averaged, and with several parts PSNR and SSIM of each."""
    metrics = {label: metrics for label, (metrics, *_) in measured.items()}
    names = next(iter(metrics.values()))
    mean = {name: sum(values[name] for values in metrics.values()) / len(metrics) for name in names}
    each = {f"{name}, {label}": values[name] for label, values in metrics.items() for name in ("psnr", "ssim")}
    return mean | (each if len(metrics) > 1 else {})


class Objective(nn.Module):
    """What a step minimises. A module, so that DistributedDataParallel can wrap it."""

    def __init__(self, stage: int, model: VQRAE, teacher: nn.Module | None, lpips: nn.Module | None):
        super().__init__()
        self.stage, self.model, self.teacher, self.lpips = stage, model, teacher, lpips

    def forward(self, images: Tensor, teacher_z: Tensor | None,
                discriminator: nn.Module | None) -> tuple[dict[str, Tensor], Tensor]:
        """All losses before their weights, their weighted sum as "loss", and the reconstructions (B, 3, H, W).

        images (B, 3, H, W) in [0, 1]; teacher_z (B, C, h, w): the frozen encoder's features of them, None where there
        is no such encoder, and then no loss in its features; discriminator: None as long as the GAN is off.
        """
        with torch.autocast(device, torch.bfloat16, enabled=PRECISION == "bf16"):
            z = teacher_z if self.model.frozen else self.model.encoder(images)  # known, where it is frozen
            z_q, quantizer_loss, _ = self.model.quantize(z)
            output = self.model.decode(z_q)
            l2_loss = F.mse_loss(output, images)
            perceptual_loss = distill_loss = predict_loss = gan_loss = zero = torch.zeros_like(l2_loss)
            if self.teacher is not None:
                distill_loss = F.mse_loss(z, teacher_z)  # 0 in stage 1, where both are the same
                predict_loss = self.model.compute_prediction_loss(z_q, teacher_z, PREDICT_IMAGE)
            perceptual_weight = PERCEPTUAL_WEIGHT[self.stage - 1]
            if perceptual_weight and self.lpips is not None:
                perceptual_loss = self.lpips(output.clamp(0, 1), images, normalize=True).mean()
            elif perceptual_weight and self.teacher is not None:
                perceptual_loss = F.mse_loss(self.teacher(output[::2]), teacher_z[::2])  # half of them: half the time
            image_loss = L2_WEIGHT * l2_loss + perceptual_weight * perceptual_loss
            if discriminator is not None:
                gan_loss = -discriminator(output).float().mean()
                image_loss = self.with_adaptive_weight(image_loss, gan_loss, output)
            loss = image_loss + quantizer_loss + PREDICT_WEIGHT * predict_loss + DISTILL_WEIGHT * distill_loss
        return dict(zip(loss_names, (loss, l2_loss, perceptual_loss, quantizer_loss, predict_loss, distill_loss,
                                     gan_loss, zero))), output

    def with_adaptive_weight(self, image_loss: Tensor, gan_loss: Tensor, output: Tensor) -> Tensor:
        """image_loss + GAN_WEIGHT * weight * gan_loss, both losses functions of output (B, 3, H, W), with the weight at
        which their gradients have one norm at the decoder's last layer (VQGAN, 2012.09841, eq. 7; limits: its code)."""
        last_layer = self.model.decoder.head.weight
        # The gradients at the output are computed once. What is returned has their sum as its gradient there, so that
        # backward() need not go through teacher and discriminator again.
        at_output = [torch.autograd.grad(loss, output)[0] for loss in (image_loss, gan_loss)]  # frees both graphs
        norms = [torch.autograd.grad(output, last_layer, grad, retain_graph=True)[0].norm() for grad in at_output]
        weight = GAN_WEIGHT * (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4)
        value = image_loss.detach() + weight * gan_loss.detach()
        product = (output * (at_output[0] + weight * at_output[1])).sum()  # its gradient at the output is their sum
        return value + (product - product.detach())


# ---------------------------------------------------------------------------------------------------------------------
# What the experiment is built from

def build_model(pretrained: bool = True, meta: bool = False) -> VQRAE:
    """The model that the constants describe, with the weights of START_CHECKPOINT; meta: as shapes alone."""
    options = {"fsq": {"levels": list(FSQ_LEVELS)},
               "simvq": {"codebook_size": SIMVQ_CODEBOOK_SIZE, "code_dim": SIMVQ_CODE_DIM},
               "ema_vq": {"codebook_size": EMA_CODEBOOK_SIZE, "code_dim": EMA_CODE_DIM, "revive": EMA_REVIVE},
               "ddcl": {"delta": DDCL_DELTA, "comm_weight": DDCL_COMM_WEIGHT},
               "none": {}}[QUANTIZER]
    options |= {"codebooks": CODEBOOKS, "combine": COMBINE} if CODEBOOKS > 1 else {}
    with torch.device("meta" if meta else "cpu"):
        model = VQRAE(ENCODER, QUANTIZER, options, sizes()[0], GRID, ADAPTER_DEPTH, POST_QUANT_KERNEL, DECODER,
                      DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS, pretrained=pretrained and START_CHECKPOINT is None)
    if START_CHECKPOINT is not None and not meta:
        loaded = utils.load_checkpoint(START_CHECKPOINT)
        quantizer = {name: model.config[name] for name in ("quantizer", "quantizer_options")}
        if loaded.token_size == model.token_size:  # else both are named below
            loaded.config |= {name: model.config[name] for name in ("image_size", "grid")}
        differ = [f"{name} is {loaded.config[name]!r} there and {value!r} here" for name, value in model.config.items()
                  if loaded.config[name] != value and name not in quantizer]
        check(not differ, "START_CHECKPOINT", START_CHECKPOINT, f"one made with these constants: {'; '.join(differ)}")
        check(loaded.stage <= STAGES[0], "START_CHECKPOINT", START_CHECKPOINT,
              "a checkpoint of stage 1, or else STAGES = (2,)")
        kinds = [(config["quantizer"], {name: value for name, value in config["quantizer_options"].items()
                                        if name not in ("revive", "comm_weight")})  # which change no codes
                 for config in (loaded.config, model.config)]
        if kinds[0] == kinds[1]:
            model.quantizer.load_state_dict(loaded.quantizer.state_dict())
        else:
            say(f"the quantizer starts anew: START_CHECKPOINT has another one, {kinds[0]}")
        loaded.quantizer, loaded.config = model.quantizer, loaded.config | quantizer
        model = loaded
    model.quantizer.random_depth = RANDOM_DEPTH
    return model if meta else model.to(device)


def build_teacher(model: VQRAE) -> nn.Module | None:
    """The frozen encoder, as pretrained; None for an encoder that is trained from scratch."""
    if model.from_scratch:
        return None
    teacher = copy.deepcopy(model.encoder) if model.stage == 1 else build_encoder(ENCODER, model.token_size).to(device)
    if PRECISION == "bf16":  # once, where autocast would cast its weights in each step
        for layer in autocast_layers(teacher).values():
            layer.to(torch.bfloat16)
    return teacher.eval().requires_grad_(False)


def build_optimizers(model: VQRAE, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon is for the blocks around the quantizer; the encoder, pretrained or not, has AdamW alone."""
    blocks = ("adapter.", "predictor.", "post_quant_conv.", "decoder.layers.", "decoder.blocks.")
    return adamw_and_muon(model, blocks if OPTIMIZER == "muon" else (), learning_rate)


def shuffled(n: int, count: int, epoch: int, stream: int = 0) -> Tensor:
    """The indices (count,) of the epoch-th epoch (from 0): numbers epoch * count to (epoch + 1) * count - 1 of an
    endless sequence, pass after pass over n images, each shuffled. `stream`: another sequence, for another dataset.

    With FLIP, an index i of n or more stands for the mirrored image i - n, as in utils.select_images. Passes come in
    pairs: one mirrors each image with probability 1/2, the next those that the first did not.
    """
    def one_pass(number: int) -> Tensor:
        seed = SEED * 100_003 + stream * 1_000_003
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + number))
        if FLIP:
            mirrored = torch.randint(2, (n,), generator=torch.Generator().manual_seed(seed + number // 2))
            order += n * (mirrored[order] ^ number % 2)
        return order

    passes = range(epoch * count // n, ((epoch + 1) * count - 1) // n + 1)
    return torch.cat([one_pass(number) for number in passes])[epoch * count - passes[0] * n :][:count]


# ---------------------------------------------------------------------------------------------------------------------
# Bookkeeping: processes, files and checks

class Run:
    """The files of a run, in outputs/<name>/ and checkpoints/<name>/. The same constants find the same files again."""

    def __init__(self, constants: dict, data: list[Dataset]):
        # a folder is known by its files, wherever it is, checkpoints and encoders by their content
        parts = [[part.label, *part.train_images.shape, len(part.test_images), part.digest] for part in data]
        shipped = PRETRAINED_DIR / "cifar_encoder.pt" if ENCODER == "cifar" else None  # or pretrain.py's
        files = {"START_CHECKPOINT": START_CHECKPOINT, "encoder_weights": shipped}
        content = {k: v for k, v in constants.items() if k not in utils.not_in_names} | {"DATASET": parts}
        content |= {name: utils.hash_file(path) for name, path in files.items() if path}
        description = json.dumps(content, indent=2).encode()
        self.dataset = "+".join(dict.fromkeys(part.name for part in data))
        self.name = f"{self.dataset}_{ENCODER}_{QUANTIZER}_{utils.digest(description)}"
        self.constants = constants
        self.outputs, self.checkpoints = Path("outputs", self.name), Path("checkpoints", self.name)
        self.finished = (self.outputs / "results.json").exists()
        self.last = self.checkpoints / "last.pt"
        described = self.outputs / "constants.json"
        check(not described.exists() or described.read_bytes() == description, "constants of this run",
              str(described), "the same as here: delete that folder")
        if rank == 0 and not self.finished:
            self.lock = utils.lock_run(self.outputs, self.checkpoints)  # of this process, and gone with it
            utils.write_file(described, description)
        if ranks > 1:
            dist.barrier()  # the last of another run's files may just have been written
        nothing = {"stage": 0, "epoch": 0, "history": []}
        self.saved = utils.load_torch(self.last, *nothing) if self.last.exists() else nothing
        self.history = self.saved["history"]

    def save_epoch(self, row: dict, model: VQRAE, state: dict, measured: dict[str, tuple]):
        """Write an epoch's grids of images and reconstructions, the metrics so far with plots, and checkpoints."""
        stage, epoch = row["stage"], row["epoch"]
        self.history.append(row)
        self.save_grids(f"stage{stage}_epoch_{epoch:03}", measured, 8, columns=4)
        utils.write_csv(self.outputs / "metrics.csv", self.history)
        losses = [name for name in loss_names if name != "gan_loss"]  # a mean of logits may be negative: in the table
        metrics = ["psnr", "ssim", "usage", "perplexity"]
        plots.plot_curves(self.outputs / "curves.png", self.history, losses, metrics, self.name)

        metadata = {"epoch": epoch, "metrics": row, "constants": self.constants}
        prefix = f"{QUANTIZER}_stage{stage}"
        if row["psnr"] == max(r["psnr"] for r in self.history if r["stage"] == stage):
            utils.save_checkpoint(self.checkpoints / f"{prefix}_best.pt", model, **metadata)
        if KEEP_CHECKPOINTS:
            utils.save_checkpoint(self.checkpoints / f"{prefix}_epoch_{epoch}.pt", model, **metadata)
        for old in range(1, epoch - KEEP_CHECKPOINTS + 1):
            (self.checkpoints / f"{prefix}_epoch_{old}.pt").unlink(missing_ok=True)
        utils.save_torch(self.last, {"stage": stage, "epoch": epoch, "history": self.history,
                                     **{name: part.state_dict() for name, part in state.items()}})

    def save_grids(self, name: str, measured: dict[str, tuple], count: int, columns: int):
        for label, (_, _, reconstructions, images) in measured.items():
            path = self.outputs / (f"{name}.png" if len(measured) == 1 else f"{name}_{label}.png")
            plots.save_grid(path, images[:count], reconstructions[:count], columns)

    def measure_best(self, data: list[Dataset]):
        """Measure the last stage's best epoch on all test images; results.json then marks a finished run."""
        best = utils.load_checkpoint(self.checkpoints / f"{QUANTIZER}_stage{STAGES[-1]}_best.pt").to(device)
        measured = measure(best, data, None)
        self.save_grids("final", measured, 64, columns=16)
        for label, (metrics, counts, _, images) in measured.items():
            title = f"{label}, all {len(images):,} test images"
            if len(counts) and label == data[0].label:
                plots.plot_usage(self.outputs / "usage.png", counts, metrics, f"{self.name}\n{title}")
            say(f"{title}: PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.4f}, {metrics['usage']:.1%} of codes "
                f"used, perplexity {metrics['perplexity']:,.0f}")
        say(f"see {self.outputs}/ and {self.checkpoints}/")
        count = sum(len(images) for *_, images in measured.values())
        results = {"run": self.name, "stage": STAGES[-1], "test_images": count, **mean_metrics(measured)}
        utils.write_file(self.outputs / "results.json", json.dumps(results, indent=2).encode())


def start_process():
    """This process's GPU, or reproducible arithmetic on a CPU, and its place among the processes of torchrun."""
    if device == "cuda":
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        check(processes <= gpus, "nproc_per_node", processes, f"at most {gpus}, the number of GPUs")
        torch.cuda.set_device(local_rank)
    else:
        prepare_cpu()
    if ranks > 1:
        # while the first process decodes images or measures, the others wait: the default of ten minutes may be too few
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=1))


def say(line: str):
    """Print, from the first process alone."""
    if rank == 0:
        print(line, flush=True)


def sizes() -> list[int]:
    return sorted(IMAGE_SIZE) if isinstance(IMAGE_SIZE, (tuple, list)) else [IMAGE_SIZE]


def micro_batch_size(size: int) -> int:
    return max(1, BATCH_SIZE // (ranks * ACCUMULATE) * sizes()[0] ** 2 // size**2)  # as many pixels in each


def exit_if_not_finite(log: Tensor, place: str):
    """End the run where a row of log (steps, losses and norm of the gradient) has a NaN or infinity, and name both."""
    bad = ~log.isfinite()
    if bad.any():
        step = bad.any(1).nonzero()[0].item()
        names = [name for name, is_bad in zip((*loss_names, "the gradient"), bad[step]) if is_bad]
        sys.exit(f"train.py: {', '.join(names)} not finite at {place}, step {step + 1}; checkpoints of earlier epochs "
                 "are kept")


def mean_losses(log: Tensor, gan_steps: int) -> dict[str, float]:
    """An epoch's mean losses, over all processes; the GAN's over the last gan_steps of the log, in which it was on."""
    sums = log[:, :-1].sum(0) / (ranks * ACCUMULATE)
    if ranks > 1:
        dist.all_reduce(sums)
    steps = [max(gan_steps, 1) if name in ("gan_loss", "discriminator_loss") else len(log) for name in loss_names]
    return {name: total / n for name, total, n in zip(loss_names, sums.tolist(), steps)}


def check_constants():
    """ValueError, naming the constant, its value and what is allowed, before anything is downloaded."""
    constants = globals()

    def whole(value, low, high=2**31 - 1):
        return type(value) is int and low <= value <= high

    def real(value, low, high=1e9):
        return type(value) in (int, float) and low <= value <= high

    def pair(value, ok):
        return type(value) in (tuple, list) and len(value) == 2 and all(map(ok, value))

    def check_each(names, ok, allowed):
        for name in names.split():
            check(ok(constants[name]), name, constants[name], allowed)

    check_each("ENCODER", lambda v: type(v) is str, "a name in quotes")
    check_each("GRID BATCH_SIZE ACCUMULATE CODEBOOKS", lambda v: whole(v, 1), "a whole number of 1 or more")
    given = IMAGE_SIZE if isinstance(IMAGE_SIZE, (tuple, list)) else (IMAGE_SIZE,)
    check(given and all(whole(n, 16, 4096) for n in given), "IMAGE_SIZE", IMAGE_SIZE, "16 to 4096, or several of them")
    check_each("SIMVQ_CODEBOOK_SIZE EMA_CODEBOOK_SIZE", lambda v: whole(v, 2, 2**24), "2 to 2**24")
    check_each("KEEP_CHECKPOINTS SEED POST_QUANT_KERNEL", lambda v: whole(v, 0), "a whole number from 0 to 2**31 - 1")
    check_each("DECODER_WIDTH DECODER_DEPTH DECODER_HEADS EMA_CODE_DIM SIMVQ_CODE_DIM",
               lambda v: v is None or whole(v, 1, 4096), "None or 1 to 4096")
    check_each("EPOCH_IMAGES EVAL_IMAGES", lambda v: v is None or whole(v, 1), "None or a whole number of 1 or more")
    check_each("ADAPTER_DEPTH", lambda v: v is None or whole(v, 0, 4096), "None or 0 to 4096")
    check_each("L2_WEIGHT GAN_WEIGHT PREDICT_WEIGHT PREDICT_IMAGE DISTILL_WEIGHT DDCL_COMM_WEIGHT FEATURE_CACHE_GB "
               "IMAGES_GB", lambda v: real(v, 0), "a number from 0 to 1e9")
    check_each("GAN_START RANDOM_DEPTH", lambda v: real(v, 0, 1), "0 to 1")
    check_each("DDCL_DELTA", lambda v: real(v, 0.03, 1), "1 / n for a whole n from 1 to 32")
    check_each("PERCEPTUAL_WEIGHT", lambda v: pair(v, lambda w: real(w, 0)), "two numbers from 0 to 1e9")
    check_each("LEARNING_RATE", lambda v: pair(v, lambda w: real(w, 1e-12)), "two numbers from 1e-12 to 1e9")
    check_each("EPOCHS", lambda v: pair(v, lambda w: whole(w, 1)), "two whole numbers of 1 or more")
    check_each("STAGES", lambda v: v in ((1,), (1, 2), (2,)) and all(type(s) is int for s in v), "(1,), (1, 2), (2,)")
    check_each("FSQ_LEVELS", lambda v: type(v) in (tuple, list), "whole numbers in brackets")
    check_each("FLIP EMA_REVIVE", lambda v: type(v) is bool, "True or False")
    for name, values in {"QUANTIZER": QUANTIZERS, "PRECISION": ("bf16", "fp32"), "OPTIMIZER": ("muon", "adamw"),
                         "PERCEPTUAL": ("encoder", "lpips"), "COMBINE": ("residual", "product")}.items():
        check_each(name, lambda v: type(v) is str and v in values, ", ".join(f'"{value}"' for value in values))
    names = DATASET if isinstance(DATASET, (tuple, list)) else (DATASET,)
    known = [name for name in utils.DATASETS if name != "auto" or given == (IMAGE_SIZE,) and names == (DATASET,)]
    check(names and all(isinstance(name, str) and (name in known or Path(name).is_dir()) for name in names), "DATASET",
          DATASET, f"{', '.join(known)} or a folder with train/ and test/ in it, or several of them")
    check(sizes()[0] % GRID == 0 and not any(n % (sizes()[0] // GRID) for n in sizes()), "GRID", GRID,
          f"a divisor of IMAGE_SIZE = {IMAGE_SIZE}, all of whole tokens, here of {sizes()[0] / GRID:g} pixels")
    check(not RANDOM_DEPTH or CODEBOOKS > 1 and COMBINE == "residual", "RANDOM_DEPTH", RANDOM_DEPTH,
          "0 without residual codebooks")
    check(BATCH_SIZE % (ranks * ACCUMULATE) == 0, "BATCH_SIZE", BATCH_SIZE,
          f"a multiple of processes times ACCUMULATE = {ranks} x {ACCUMULATE}")
    check(not RANDOM_DEPTH or micro_batch_size(sizes()[-1]) > 1, "RANDOM_DEPTH", RANDOM_DEPTH,
          "0 with one image at a time")
    check(EPOCH_IMAGES is None or EPOCH_IMAGES >= BATCH_SIZE, "EPOCH_IMAGES", EPOCH_IMAGES,
          f"None, or at least BATCH_SIZE = {BATCH_SIZE}")
    check_each("START_CHECKPOINT", lambda v: v is None and 1 in STAGES or type(v) is str and Path(v).is_file(),
               "the path of a file, in quotes, or, with 1 in STAGES, None")


def check_memory(model: VQRAE):
    """ValueError where weights, and gradients and one moment of those that learn, exceed memory. model: on "meta" """
    needed = {name: sum(tensor.nbytes for tensor in part.state_dict().values())
              + 2 * sum(p.nbytes for p in part.parameters() if p.requires_grad or 2 in STAGES)
              for name, part in model.named_children()}
    sysconf = getattr(os, "sysconf", lambda name: 2**31)  # Windows has none
    memory = torch.cuda.mem_get_info()[1] if device == "cuda" else sysconf("SC_PHYS_PAGES") * sysconf("SC_PAGE_SIZE")
    check(sum(needed.values()) < memory, f"gigabytes for the model, most of all its {max(needed, key=needed.get)}",
          round(sum(needed.values()) / 1e9), f"{memory / 1e9:.0f}")


if __name__ == "__main__":
    with one_line_errors(OSError, note="; files written before are whole, and the same command goes on from them",
                         full="try more ACCUMULATE, or less BATCH_SIZE, FEATURE_CACHE_GB or IMAGES_GB"):
        main()
        if ranks > 1:
            dist.barrier()
            dist.destroy_process_group()
