"""Train a VQRAE (2511.23386): images to discrete tokens in a pretrained encoder's feature space, and back.

    python train.py                             with the constants below
    python train.py QUANTIZER=simvq EPOCHS=6    with some of them replaced
    torchrun --nproc_per_node=4 train.py        on several GPUs, which share BATCH_SIZE

    stage  learns                        losses
    1      all but a pretrained encoder  L2, perceptual, quantizer; with GAN_WEIGHT a GAN in the second half
    2      all                           the first three, and self-distillation

Pictures go to outputs/<run>/, a stage's best and last two checkpoints to checkpoints/<run>/. The same command resumes a
run after its last finished epoch. Another constant or another dataset makes another run.
"""
import inspect
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from itertools import cycle, islice
from pathlib import Path

# OpenMP's waiting threads spin, which slows a busy machine. With GOMP_SPINCOUNT, which torch's import reads, they soon
# sleep. Beside one busy program, on two cores, a step takes 2.3 s instead of 4.2 s. Alone it takes 0.9 s, either way.
if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

import utils
from data import Dataset, ImageFiles, find_dataset, load_batches, load_dataset
from models import VQRAE, PatchDiscriminator, build_encoder, load_checkpoint, save_checkpoint
from muon import adamw_and_muon, take_step
from quantizers import QUANTIZERS, InputError, check, errors_as, require
from utils import average, evaluate, fast_bf16, first_process_first, progress

# images
DATASET = "auto"  # "cifar10", "shapes", a folder with train/ and test/, or "auto": CIFAR-10, or else shapes
IMAGE_SIZE = 32  # pixels a side; a tuple, (32,) or (32, 64), asks for random crops, one size a step
# encoder
ENCODER = "cifar"  # ships with the repository; "dinov3_s" and others are downloaded; "cnn" learns from scratch
ENCODER_LAYERS = 0  # how many last layers of a ViT are summed, or last feature maps of others joined; 0: all
GRID = 8  # tokens a side of the smallest IMAGE_SIZE; with "cifar" a token should cover 4 x 4 pixels
# quantizer
QUANTIZER = "ema_vq"  # or "fsq", "simvq" (with a computed map; the paper's is "simvq_learned"), "ddcl", "residual_vq",
#               "product_vq", "residual_fsq", "lfq", "bsq", "rotation_vq", "library"; "none": the best possible PSNR
CODEBOOK_SIZE = 65536  # codes in a codebook; "fsq", "ddcl", "residual_fsq" and "library" have their own constants
CODE_DIM = 16  # how many numbers a learned code has; 0: as many as the encoder's features
EMA_DECAY = 0.99  # for the moving averages of "ema_vq", "simvq", "residual_vq", "product_vq" and "rotation_vq"
COMMITMENT = 0.25  # weight of the commitment loss; "lfq", "bsq" and "library" have their own
CODEBOOKS = 2  # how many "residual_vq", "product_vq" and "residual_fsq" have; CODEBOOK_SIZE = 256 suits two
FSQ_LEVELS = (8, 8, 8, 5, 5, 5)  # 64,000 codes; try (8, 6, 5) = 240 or (8, 8, 8) = 512
DDCL_DELTA = 1 / 15  # quantization step of numbers in [-1, 1]
DDCL_COMM_WEIGHT = 1e-3  # weight of a token's bits
LIBRARY = {"kind": "ResidualLFQ", "codebook_size": 256, "num_quantizers": 2}  # a class of vector-quantize-pytorch
# decoder
POST_QUANT_KERNEL = 1  # size of the convolution after the quantizer, as in Cosmos-Tokenizer; 0: none
POST_QUANT_NORM = False  # a norm after it
DECODER_WIDTH = 0  # 0: a ViT encoder's own, and 192 behind other encoders; ViT-XL has 1152
DECODER_DEPTH = 0  # 0: a ViT encoder's own, and 2 behind other encoders; ViT-XL has 28
DECODER_HEADS = 0  # 0: a ViT encoder's own; other encoders have a decoder without heads; ViT-XL has 16
# losses
PERCEPTUAL = "encoder"  # distance in the frozen encoder's features ("cnn" has none), or "lpips", which downloads VGG16
PERCEPTUAL_WEIGHT = (0.02, 0.02)  # in stages 1 and 2; a higher weight lowers PSNR, and brings features closer
DISTILL_WEIGHT = 0.1  # stage 2: the encoder's features against the frozen encoder's; a lower weight raises PSNR
GAN_WEIGHT = 0.0  # in stage 1's second half; try 0.5: on CIFAR-10 it costs 0.03 to 0.09 dB, and pictures look alike
# training
STAGES = (1, 2)  # or (1,), or (2,)
START_CHECKPOINT = ""  # training begins with this file's model, which these constants have to describe
ACCUMULATE = 1  # micro-batches a step, to save memory; codebooks move with each
OPTIMIZER = "muon"  # Muon for the blocks' matrices and AdamW for the rest, or "adamw" for all, as in the papers
SEED = 0
COMPILE = ""  # on a GPU "default" or, with CUDA graphs, "reduce-overhead"; compiling takes minutes
# defaults for a GPU and for a CPU; a pair is for stages 1 and 2, a single number for both
DEVICE = ""  # "": CUDA's GPU, or else the CPU; "cpu" or "cuda:1" chooses; "mps" and "xpu" are untested
device = utils.choose_device(DEVICE)  # it looks at the command line, too: the defaults below depend on the device
gpu = device.startswith("cuda")
EPOCHS = (30, 10) if gpu else (6, 4)
EPOCH_IMAGES = 50_000 if gpu else 6_250  # 0: all training images
BATCH_SIZE = 128 if gpu else 32  # images a step, over all processes and micro-batches
LEARNING_RATE = (1e-3, 1e-4) if gpu else (1e-3, 1e-3)  # AdamW's; Muon's is twice this
FLIP = gpu  # mirror half of the training images, which helps if they repeat
EVAL_IMAGES = 0 if gpu else 1_000  # test images measured after an epoch; 0: all, as at the end

kinds = {  # types, which are checked in this file and on the command line; constants of your own keep theirs
    str: "DATASET ENCODER QUANTIZER PERCEPTUAL START_CHECKPOINT OPTIMIZER COMPILE DEVICE",
    bool: "POST_QUANT_NORM FLIP",
    int: "ENCODER_LAYERS GRID CODEBOOK_SIZE CODE_DIM CODEBOOKS POST_QUANT_KERNEL DECODER_WIDTH DECODER_DEPTH "
         "DECODER_HEADS ACCUMULATE SEED EPOCH_IMAGES BATCH_SIZE EVAL_IMAGES",
    float: "EMA_DECAY COMMITMENT DDCL_DELTA DDCL_COMM_WEIGHT DISTILL_WEIGHT GAN_WEIGHT",
    int | tuple[int, int]: "EPOCHS",
    int | tuple[int, ...]: "IMAGE_SIZE",
    float | tuple[float, float]: "PERCEPTUAL_WEIGHT LEARNING_RATE",
    tuple[int, ...]: "FSQ_LEVELS STAGES",
    dict: "LIBRARY",
}
bf16 = False  # whether training uses bf16; start_process() looks whether it is fast here, metrics are in fp32
rank, ranks = int(os.getenv("RANK", 0)), int(os.getenv("WORLD_SIZE", 1))  # torchrun sets both


def objective(model: VQRAE, images: Tensor, teacher: nn.Module | None, lpips: nn.Module | None,
              discriminator: nn.Module | None, perceptual_weight: float, distill_weight: float,
              gan_weight: float) -> dict[str, Tensor]:
    """Returns {name: scalar}: each loss before its weight, and as "loss" the weighted sum that the model minimises.

    images (B, 3, H, W) in [0, 1]
    teacher: another encoder, frozen, with the pretrained weights; None if the encoder learns from scratch
    lpips: LPIPS's network, or None if the perceptual loss compares the teacher's features
    discriminator: None without a GAN; it minimises "discriminator_loss"
    """
    with torch.no_grad():
        teacher_z = teacher(images) if teacher else None  # features (B, C, h, w)
    z = teacher_z if model.encoder_frozen else model.encoder(images)  # a frozen encoder has the teacher's weights
    z_q, quantizer_loss, _ = model.quantize(z)
    output = model.decode(z_q, images.shape[2:])
    l2_loss = F.mse_loss(output, images)
    perceptual_loss = distill_loss = gan_loss = discriminator_loss = torch.zeros_like(l2_loss)
    if teacher:
        distill_loss = model.compute_distillation_loss(z, teacher_z)  # 0 while the encoder is frozen
    if perceptual_weight and lpips:
        perceptual_loss = lpips(output.clamp(0, 1), images, normalize=True).mean()
    elif perceptual_weight and teacher:  # every second image is enough, and saves time
        perceptual_loss = F.mse_loss(teacher(output[::2]), teacher_z[::2])
    pixel_loss = 16 * l2_loss  # 1/16 is about the variance of pixels
    loss = pixel_loss + perceptual_weight * perceptual_loss + quantizer_loss + distill_weight * distill_loss
    if discriminator:
        # Both losses share this pass. losses_and_gradients differentiates each by its own network's parameters alone.
        real, fake = discriminator(torch.cat([images, output])).float().chunk(2)
        gan_loss = -fake.mean()
        discriminator_loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2  # it wants real > 1, fake < -1
        # At the decoder's last layer, both losses' gradients get the same norm (VQGAN, 2012.09841, equation 7).
        last_layer = model.decoder.head.weight
        l2_gradient = torch.autograd.grad(pixel_loss, last_layer, retain_graph=True)[0]
        gan_gradient = torch.autograd.grad(gan_loss, last_layer, retain_graph=True)[0]
        balance = (l2_gradient.norm() / (gan_gradient.norm() + 1e-4)).clamp(max=1e4)
        loss = loss + gan_weight * balance * gan_loss
    return dict(loss=loss, l2_loss=l2_loss, perceptual_loss=perceptual_loss, quantizer_loss=quantizer_loss,
                distill_loss=distill_loss, gan_loss=gan_loss, discriminator_loss=discriminator_loss)


def losses_and_gradients(model: VQRAE, teacher: nn.Module | None, lpips: nn.Module | None, images: Tensor,
                         discriminator: nn.Module | None) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
    """A micro-batch's losses, and the gradients of the model's and then the discriminator's parameters.

    A gradient is None where the loss does not depend on a parameter. Unlike loss.backward(), this stores no gradients:
    so torch.compile makes one graph of the forward and the backward pass.
    """
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        losses = objective(model, images, teacher, lpips, discriminator, stage_value(PERCEPTUAL_WEIGHT, model.stage),
                           DISTILL_WEIGHT, GAN_WEIGHT)
    gradients = torch.autograd.grad(losses["loss"] / ACCUMULATE, parameters(model), allow_unused=True,
                                    retain_graph=discriminator is not None)
    if discriminator:
        gradients += torch.autograd.grad(losses["discriminator_loss"] / ACCUMULATE, parameters(discriminator))
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def train_epoch(model: VQRAE, batches: Iterator[Tensor], epoch: int, epochs: int, steps: int, compute: Callable,
                discriminator: nn.Module, optimizers: dict, gan_optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Train epoch `epoch` of `epochs`, which has `steps` steps. Returns the mean of each loss, over all processes.

    batches: images (B, 3, size, size) in [0, 1]
    compute: (images, discriminator or None) -> what losses_and_gradients returns
    """
    log, total = [], epochs * steps
    for step in progress(range((epoch - 1) * steps, epoch * steps), f"stage {model.stage} epoch {epoch}/{epochs}"):
        gan_on = model.stage == 1 and GAN_WEIGHT > 0 and step >= total / 2
        learning = parameters(model) + (parameters(discriminator) if gan_on else [])
        for images in islice(batches, ACCUMULATE):
            losses, gradients = compute(images, discriminator if gan_on else None)
            add_gradients(learning, gradients)
            log.append(torch.stack([*losses.values()]))
        average([p.grad for p in learning if p.grad is not None])  # over all processes
        nn.utils.clip_grad_norm_(parameters(model), 1.0)
        take_step(optimizers, step, total)
        if gan_on:
            gan_optimizer.step()
        for p in learning:
            p.grad = None
    means = torch.stack(log).mean(0)
    average([means])
    return dict(zip(losses, means.tolist()))


def train_stage(stage: int, model: VQRAE, teacher: nn.Module | None, lpips: nn.Module | None, data: Dataset,
                run: utils.Run):
    """Train one stage, from its start or where the run was stopped. Each epoch is measured and saved."""
    model.set_stage(stage).train()
    utils.seed_everything(SEED, stage)
    discriminator = PatchDiscriminator(sizes()[0]).to(device)  # also without a GAN: all runs save the same parts
    optimizers = build_optimizers(model, stage)
    gan_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.9), fused=True)
    state = {"model": model, "discriminator": discriminator, "gan_optimizer": gan_optimizer, **optimizers}
    function = compiled(losses_and_gradients) if COMPILE else losses_and_gradients
    compute = partial(function, model, teacher, lpips)
    epochs = stage_value(EPOCHS, stage)
    steps = (EPOCH_IMAGES or len(data.train_images)) // BATCH_SIZE
    first_epoch = run.resume(state, stage)  # it also loads the state, if this stage was begun before
    for epoch in range(first_epoch, epochs + 1):
        utils.seed_everything(SEED, stage, epoch, rank)  # a resumed run sees the same batches
        start = time.time()
        batches = epoch_batches(data.train_images, stage, epoch, steps)
        losses = train_epoch(model, batches, epoch, epochs, steps, compute, discriminator, optimizers, gan_optimizer)
        seconds = time.time() - start
        finite = math.isfinite(losses["loss"]) and all(x.isfinite().all() for x in model.state_dict().values())
        require(finite, f"The loss of stage {stage}, epoch {epoch}, is {losses['loss']}, and weights may be infinite: "
                        "try a lower LEARNING_RATE.")
        if rank == 0:
            tested = data.test_images[: EVAL_IMAGES or None]
            metrics, _, output = evaluate(model, tested, micro_batch_size())
            row = {"stage": stage, "epoch": epoch, **losses, **metrics,
                   "images_per_second": steps * BATCH_SIZE / seconds, "seconds": seconds}
            save_epoch(run, row, model, state, tested[:8], output[:8])
            print("{stage:6} {epoch:6} {loss:9.4f} {psnr:6.2f} {ssim:7.4f} {usage:11.1%} {perplexity:11,.0f} "
                  "{images_per_second:9,.0f} {seconds:8.0f}".format(**row), flush=True)
            if len(run.history) == 1:  # after the first epoch; one of stage 2 takes about 1.4 times as long
                times = sum(stage_value(EPOCHS, each) * (1.4 if each > stage else 1) for each in STAGES)
                print(f"the whole run takes about {(time.time() - start) / 60 * times:.1f} minutes", flush=True)


# Gradients, batches, optimizers

def parameters(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn."""
    return [p for p in network.parameters() if p.requires_grad]


def add_gradients(learning: list[nn.Parameter], gradients: tuple[Tensor | None, ...]):
    """Add a micro-batch's gradients to p.grad."""
    for p, gradient in zip(learning, gradients):
        if gradient is not None and p.grad is not None:
            p.grad += gradient
        elif gradient is not None:  # copied if others follow: a CUDA graph's next run would overwrite it
            p.grad = gradient.clone() if ACCUMULATE > 1 else gradient


def compiled(function: Callable) -> Callable:
    """The function, compiled into one graph for each stage, with and without a GAN, and for each size of images."""
    torch._dynamo.config.trace_autograd_ops = True  # the function includes the backward pass
    torch._dynamo.config.recompile_limit = 8 * len(sizes())  # 8 is torch's own limit
    return torch.compile(function, fullgraph=True, dynamic=False, mode=COMPILE)


def epoch_batches(images: Tensor | ImageFiles, stage: int, epoch: int, steps: int) -> Iterator[Tensor]:
    """This process's micro-batches (B, 3, size, size) of an epoch. A small dataset repeats."""
    generator = torch.Generator().manual_seed(SEED * 10**5 + stage * 10**4 + epoch)  # equal in all processes
    passes = math.ceil(steps * BATCH_SIZE / len(images))
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(passes)]).to(images.device)
    order = order[: steps * BATCH_SIZE].view(steps, ranks, ACCUMULATE, -1)
    batches = []
    for micro_batches, size in zip(order[:, rank], cycle(sizes())):  # a step's indices (ACCUMULATE, B)
        batches += [(index, size) for index in micro_batches]
    return load_batches(images, batches, FLIP, device)


def micro_batch_size() -> int:
    """How many images a process takes at a time."""
    return BATCH_SIZE // (ranks * ACCUMULATE)


def sizes() -> list[int]:
    """The sizes of training images, pixels a side, the smallest first."""
    return [IMAGE_SIZE] if isinstance(IMAGE_SIZE, int) else sorted(IMAGE_SIZE)


def stage_value(value: object, stage: int) -> object:
    """A constant's value in this stage: stage_value((30, 10), 2) is 10. A single number is for both stages."""
    return value[stage - 1] if isinstance(value, tuple) else value


def build_optimizers(model: VQRAE, stage: int) -> dict[str, torch.optim.Optimizer]:
    """A stage's optimizers by their names: Muon for matrices and kernels in `blocks`, AdamW for the rest."""
    blocks = ("adapter.", "post_quant_conv.", "decoder.layers.", "decoder.blocks.")
    return adamw_and_muon(model, blocks if OPTIMIZER == "muon" else (), stage_value(LEARNING_RATE, stage))


# The model and the networks of its losses

def quantizer_options() -> dict:
    """The constants that QUANTIZER's class takes, under the names of its arguments."""
    batch_tokens = micro_batch_size() * (GRID * sizes()[-1] // sizes()[0]) ** 2  # of the largest images
    if QUANTIZER == "library":
        return LIBRARY
    if QUANTIZER == "residual_fsq":
        return dict(levels=FSQ_LEVELS, num_quantizers=CODEBOOKS)
    if QUANTIZER in ("lfq", "bsq"):
        # Their entropy compares a fraction of the tokens with all codes: at most 2**24 pairs, which bounds the memory,
        # but at least two of the smallest images' tokens.
        fraction = max(2**24 / CODEBOOK_SIZE / batch_tokens, 2 / (micro_batch_size() * GRID**2))
        return dict(codebook_size=CODEBOOK_SIZE, frac_per_sample_entropy=min(1.0, fraction))
    if QUANTIZER == "rotation_vq":  # as in EMAVQ, codes with less than 0.1 of the mean usage are dead
        return dict(codebook_size=CODEBOOK_SIZE, code_dim=CODE_DIM, decay=EMA_DECAY, commitment_weight=COMMITMENT,
                    threshold_ema_dead_code=0.1 * ranks * batch_tokens / CODEBOOK_SIZE)
    options = dict(codebook_size=CODEBOOK_SIZE, code_dim=CODE_DIM, decay=EMA_DECAY, commitment_cost=COMMITMENT,
                   codebooks=CODEBOOKS, levels=FSQ_LEVELS, delta=DDCL_DELTA, comm_weight=DDCL_COMM_WEIGHT)
    names = inspect.signature(QUANTIZERS[QUANTIZER]).parameters
    return {name: value for name, value in options.items() if name in names}


def build_model(pretrained: bool = True) -> VQRAE:
    """The constants' model, with START_CHECKPOINT's weights if there is one. pretrained: False leaves them random.

    InputError if the constants contradict each other, or START_CHECKPOINT's model.
    """
    model = VQRAE(encoder=ENCODER, quantizer=QUANTIZER, quantizer_options=quantizer_options(), image_size=sizes()[0],
                  grid=GRID, encoder_layers=ENCODER_LAYERS, post_quant_kernel=POST_QUANT_KERNEL,
                  post_quant_norm=POST_QUANT_NORM, decoder_width=DECODER_WIDTH, decoder_depth=DECODER_DEPTH,
                  decoder_heads=DECODER_HEADS, pretrained=pretrained and not START_CHECKPOINT)
    check(all(size % model.token_size == 0 for size in sizes()), "IMAGE_SIZE", IMAGE_SIZE,
          f"multiples of a token's {model.token_size} pixels")
    if START_CHECKPOINT:
        with torch.device("cpu"):  # main() builds a first model on the meta device
            start = load_checkpoint(START_CHECKPOINT)
        check(start.stage <= STAGES[0], "START_CHECKPOINT", START_CHECKPOINT, 'a file of stage 1, or "STAGES=(2,)"')
        check(start.token_size == model.token_size, "IMAGE_SIZE / GRID", model.token_size,
              f"{start.token_size} with START_CHECKPOINT")
        free = {"image_size", "grid", "quantizer_options"}  # the options are compared one by one
        free |= {"frac_per_sample_entropy", "threshold_ema_dead_code"}  # these follow from BATCH_SIZE
        known = start.config | start.config["quantizer_options"]
        for name, value in (model.config | model.config["quantizer_options"]).items():
            check(name in free or value == known.get(name), name.upper(), value,
                  f"{known.get(name)} with START_CHECKPOINT = {START_CHECKPOINT}")
        if pretrained:  # without, the model is on the meta device and has no weights
            model.load_state_dict(start.state_dict())
    return model


def build_loss_networks(model: VQRAE, pretrained: bool = True) -> tuple[nn.Module | None, nn.Module | None]:
    """Returns the teacher and LPIPS's network. Each is None where objective's docstring says so."""
    teacher = lpips = None
    if not model.from_scratch:
        teacher = build_encoder(ENCODER, model.token_size, ENCODER_LAYERS, pretrained)
        teacher = teacher.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        if START_CHECKPOINT and STAGES[0] == 1:  # stage 1 uses the teacher's features instead of the encoder's
            own = model.encoder.state_dict()
            equal = all(torch.equal(weight, own[name].to(device)) for name, weight in teacher.state_dict().items())
            require(equal, f"The encoder in {START_CHECKPOINT} is not the pretrained {ENCODER}, whose features stage 1 "
                    "takes. Choose \"STAGES=(2,)\".")
    if PERCEPTUAL == "lpips":
        with errors_as(OSError, "PERCEPTUAL = 'lpips' needs the weights of torchvision's VGG16, which do not load"):
            lpips = LearnedPerceptualImagePatchSimilarity("vgg").net.to(device)
    return teacher, lpips


# Set-up and files

def main():
    """Train with the constants above, or NAME=value from the command line."""
    constants = utils.read_constants(globals(), sys.argv[1:], kinds)  # it also sets the constants above
    check_constants(constants)
    with errors_as(InputError, "The constants do not fit into results.json"):
        json.dumps(constants)
    start_process()
    with torch.device("meta"):  # without weights: a wrong constant fails before any download
        config = build_model(pretrained=False).config
    with first_process_first():  # it downloads the images, the others find them
        dataset, files = find_dataset(DATASET)
    constants["DATASET"] = Path(dataset).resolve().name  # a folder may move: `files` says what is in it
    key = utils.digest((sorted(constants.items()), files, START_CHECKPOINT and utils.digest_file(START_CHECKPOINT)))
    name = f"{constants['DATASET']}_{Path(config['encoder']).name.replace(':', '_')}_{config['quantizer']}_{key}"
    run = utils.Run(name, rank == 0)
    utils.check_agreement("the run", (name, run.finished, run.stage, run.epoch))
    if run.finished:
        print(f"This run is finished: see {run.outputs}/. For another, change a constant, or SEED if code changed.")
        return
    with first_process_first():  # it decodes the images
        data = load_dataset(dataset, IMAGE_SIZE)
    most = EPOCH_IMAGES or len(data.train_images)
    check(BATCH_SIZE <= most, "BATCH_SIZE", BATCH_SIZE, f"at most the {most} images of an epoch")
    utils.seed_everything(SEED)
    with first_process_first():  # it downloads weights
        model = build_model().to(device)
        teacher, lpips = build_loss_networks(model)
    model.constants = constants
    if isinstance(data.train_images, Tensor) and data.train_images.nbytes < 8e9:
        data = data._replace(train_images=data.train_images.to(device))  # so that batches need not be copied there
    print(f"{name}: {len(data.train_images):,} training and {len(data.test_images):,} test images, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {ranks} x {device}")
    if run.stage:
        print(f"resuming after stage {run.stage}, epoch {run.epoch}")
    print(f"PSNR, SSIM, codes used and perplexity are of {len(data.test_images[: EVAL_IMAGES or None]):,} test images\n"
          " stage  epoch      loss   PSNR    SSIM  codes used  perplexity  images/s  seconds", flush=True)
    for stage in STAGES:
        if stage >= run.stage:
            train_stage(stage, model, teacher, lpips, data, run)
    if rank == 0:
        finish(run, model, data)
    if ranks > 1:
        dist.destroy_process_group()


def start_process():
    """Prepare this process's GPU or CPU, and connect the processes of torchrun, of which the first alone prints.

    It sets `device` and `bf16`. InputError without the device.
    """
    global device, bf16
    with errors_as(InputError, f"DEVICE = {DEVICE!r}, allowed: a device that torch finds here, one for each process"):
        chosen = torch.device(device)
        device = chosen.type  # from now on without the GPU's number
        if gpu:
            torch.cuda.set_device(int(os.getenv("LOCAL_RANK", chosen.index or 0)))
        torch.zeros(1, device=device)
    bf16 = fast_bf16(device)
    if device == "cpu":
        utils.prepare_cpu()
    if ranks > 1:  # the others may wait a day while the first downloads and decodes
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(days=1))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")


def save_epoch(run: utils.Run, row: dict, model: VQRAE, state: dict, images: Tensor, output: Tensor):
    """Write an epoch's grid of images and output, uint8 (N, 3, H, W), its curves, its checkpoints and state."""
    run.check_folder()
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
    """Measure the last stage's best epoch on all test images. A run with results.json is finished."""
    path = run.checkpoints / f"{model.config['quantizer']}_stage{STAGES[-1]}_best.pt"
    require(utils.load_torch(path, "run")["run"] == run.name, f"The checkpoint {path} is not from this run. Delete it.")
    metrics, counts, output = evaluate(load_checkpoint(path).to(device), data.test_images, micro_batch_size())
    utils.save_pairs(run.outputs / "final.png", data.test_images[:64], output[:64], columns=16)
    if len(counts):
        utils.plot_usage(run.outputs / "usage.png", counts, metrics, run.name)
    with utils.replace_file(run.outputs / "results.json") as draft:
        draft.write_text(json.dumps({"run": run.name, **metrics, "constants": model.constants}, indent=2), "utf-8")
    print(f"all {len(output):,} test images: PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.4f}, "
          f"{metrics['usage']:.1%} of codes used, perplexity {metrics['perplexity']:,.0f}\n"
          f"see {run.outputs}/ and {run.checkpoints}/")


def check_constants(constants: dict):
    """InputError for a constant with a wrong value. read_constants has checked their types."""
    for name, allowed in {"QUANTIZER": [*QUANTIZERS], "OPTIMIZER": ["muon", "adamw"],
                          "PERCEPTUAL": ["encoder", "lpips"], "COMPILE": ["", "default", "reduce-overhead"],
                          "STAGES": [(1,), (1, 2), (2,)]}.items():
        check(constants[name] in allowed, name, constants[name], ", ".join(map(repr, allowed)))
    for name, least in {"GRID": 1, "BATCH_SIZE": 1, "ACCUMULATE": 1, "CODEBOOKS": 1, "CODEBOOK_SIZE": 2}.items():
        check(constants[name] >= least, name, constants[name], f"{least} or more")
    check(sizes()[0] >= 16, "IMAGE_SIZE", IMAGE_SIZE, "16 or more, for the losses and SSIM")
    valid = all(isinstance(key, str) for key in LIBRARY) and "kind" in LIBRARY and "dim" not in LIBRARY
    check(QUANTIZER != "library" or valid, "LIBRARY", LIBRARY, 'a "kind", and options of this class except "dim"')
    check(0 < EMA_DECAY < 1, "EMA_DECAY", EMA_DECAY, "between 0 and 1")
    check(all(stage_value(EPOCHS, stage) >= 1 for stage in STAGES), "EPOCHS", EPOCHS, "1 or more")
    check(SEED < 10**12, "SEED", SEED, "below 10**12")  # epoch_batches multiplies it, and a seed has 64 bits
    check(BATCH_SIZE % (ranks * ACCUMULATE) == 0, "BATCH_SIZE", BATCH_SIZE,
          f"a multiple of processes x ACCUMULATE = {ranks} x {ACCUMULATE}")
    check(BATCH_SIZE <= EPOCH_IMAGES or not EPOCH_IMAGES, "BATCH_SIZE", BATCH_SIZE, f"at most {EPOCH_IMAGES = }")
    check(not START_CHECKPOINT or os.path.isfile(START_CHECKPOINT), "START_CHECKPOINT", START_CHECKPOINT,
          "a file that exists")
    check(START_CHECKPOINT or 1 in STAGES, "STAGES", STAGES, "(1,) or (1, 2) without a START_CHECKPOINT")


if __name__ == "__main__":
    with utils.one_line_errors("stopped; the same command goes on after the last epoch above"):
        main()
