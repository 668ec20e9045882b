"""Train a VQRAE (2511.23386): images to discrete tokens in a pretrained encoder's feature space, and back.

    python train.py                             with the constants below
    python train.py QUANTIZER=simvq EPOCHS=6    with some of them replaced; a pair may be one number
    torchrun --nproc_per_node=4 train.py        on several GPUs, BATCH_SIZE is their total

    stage  learns                        losses
    1      all but a pretrained encoder  L2, perceptual, quantizer; with GAN_WEIGHT a GAN in the second half
    2      all                           the first three, and self-distillation

Grids and curves go to outputs/<run>/, the best and the last two checkpoints of a stage to checkpoints/<run>/. The same
command resumes a run after its last finished epoch. Another constant or dataset makes another run.
"""
import ast
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import cycle, islice
from pathlib import Path

# before torch is imported: OpenMP's waiting threads soon sleep. Beside one busy program on two cores a step then takes
# 2.3 s instead of 4.1, on a quiet machine as long as ever, 0.9 s; if they sleep at once ("passive"), 2.1 and 1.3 s
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from tqdm import tqdm

import utils
from data import Dataset, ImageFiles, find_dataset, load_batches, load_dataset
from models import VQRAE, PatchDiscriminator, build_encoder, load_checkpoint, save_checkpoint
from muon import adamw_and_muon, take_step
from quantizers import QUANTIZERS, check
from utils import average, errors_as, evaluate, fast_bf16, first_process_first, prepare_cpu

gpu = torch.cuda.is_available()
device = "cuda" if gpu else "cpu"  # until main() reads DEVICE

# images
DATASET = "auto"  # "cifar10", "shapes", a folder with train/ and test/, or "auto": CIFAR-10, or else shapes
IMAGE_SIZE = 32  # pixels a side of resized images; a tuple, (32,) or (32, 64): of random crops, one size a step
# encoder
ENCODER = "cifar"  # shipped; "dinov3_s" and others are downloaded; "cnn" learns from scratch
ENCODER_LAYERS = 0  # how many last layers of a ViT are summed, or last strides of others concatenated; 0: all
GRID = 8  # tokens a side of the smallest IMAGE_SIZE; with "cifar" one for 4 x 4 pixels
# quantizer
QUANTIZER = "ema_vq"  # or "fsq", "simvq", "ddcl", "lfq", "bsq", "rotation_vq", "residual_fsq"; "none" bounds their PSNR
LIBRARY = "ResidualLFQ(codebook_size=256, num_quantizers=2)"  # of "library": a class of vector-quantize-pytorch
CODEBOOK_SIZE = 65536  # of all but "fsq", "ddcl", "residual_fsq" and "library"
CODE_DIM = 16  # dimension of codes of "ema_vq", "simvq" and "rotation_vq"; 0: the encoder's width
SIMVQ_TRANSFORM = "matched"  # codes follow the tokens' moments; "learned", as in the paper, or "cosine" may collapse
EMA_DECAY = 0.99  # of the moving averages of "ema_vq", "simvq" and "rotation_vq"; for a hundred steps 0.8
COMMITMENT = 0.25  # weight of their commitment loss
CODEBOOKS = 1  # of "ema_vq" and "residual_fsq"; try 2 or 4 with CODEBOOK_SIZE = 256
COMBINE = "residual"  # each codebook quantizes what remains; "product": some dimensions each
RANDOM_DEPTH = 0.0  # fraction of images decoded from the first few residual codebooks, to decode coarse to fine
FSQ_LEVELS = (8, 8, 8, 5, 5, 5)  # 64,000 codes; try (8, 6, 5) = 240 or (8, 8, 8) = 512
DDCL_DELTA = 1 / 15  # quantization step of numbers in [-1, 1]
DDCL_COMM_WEIGHT = 1e-3  # weight of the bits of a token
# decoder
POST_QUANT_KERNEL = 1  # convolution after the quantizer, as in Cosmos-Tokenizer; 0: none
POST_QUANT_NORM = False  # a norm after it
DECODER_WIDTH = 0  # 0: as a ViT encoder, else 192; ViT-XL: 1152
DECODER_DEPTH = 0  # 0: as a ViT encoder, else 2; ViT-XL: 28
DECODER_HEADS = 0  # 0: as a ViT encoder; ViT-XL: 16
# losses; pairs are for stages 1 and 2
PERCEPTUAL = "encoder"  # distance in the frozen encoder's features, or "lpips" (downloads VGG16)
PERCEPTUAL_WEIGHT = (0.02, 0.02)  # more: lower PSNR, features closer to the image's
DISTILL_WEIGHT = 0.1  # stage 2: the encoder's features against the frozen one's; less: higher PSNR
GAN_WEIGHT = 0.0  # try 0.5; here it costs 0.03 to 0.09 dB, and grids look alike
# training
STAGES = (1, 2)  # or (1,), or (2,)
START_CHECKPOINT = ""  # continue with its model: the constants from ENCODER to DECODER_HEADS are not used
ACCUMULATE = 1  # micro-batches a step, to save memory. Codes of "ema_vq" and matched "simvq" move with each
OPTIMIZER = "muon"  # for matrices of blocks, AdamW for all else; or "adamw", as in the papers
SEED = 0
# on a GPU and on a CPU
EPOCHS = (30, 10) if gpu else (6, 4)
EPOCH_IMAGES = 50_000 if gpu else 6_250  # 0: all training images
BATCH_SIZE = 128 if gpu else 32  # images a step, of all processes and micro-batches
LEARNING_RATE = (1e-3, 1e-4) if gpu else (1e-3, 1e-3)  # AdamW's; Muon's is twice this
COMPILE = ""  # on a GPU "default" or, with CUDA graphs, "reduce-overhead"; compiling takes minutes
FLIP = gpu  # mirror half of the training images; helps if they repeat
EVAL_IMAGES = 0 if gpu else 1_000  # test images measured after an epoch; 0: all, as at the end
DEVICE = ""  # CUDA's GPU, or else the CPU; others by name, untested: "mps", "xpu"

bf16 = fast_bf16(device)  # in training; metrics are in fp32
rank, ranks = int(os.getenv("RANK", 0)), int(os.getenv("WORLD_SIZE", 1))  # by torchrun


def objective(model: VQRAE, images: Tensor, teacher: nn.Module | None, lpips: nn.Module | None,
              discriminator: nn.Module | None) -> dict[str, Tensor]:
    """All losses: the model minimises "loss", a weighted sum, the discriminator "discriminator_loss".

    images (B, 3, H, W) in [0, 1]; teacher: the frozen encoder, None for "cnn"; discriminator: None without a GAN.
    """
    with torch.no_grad():
        teacher_z = teacher(images) if teacher else None  # features (B, C, h, w)
    z = teacher_z if model.frozen else model.encoder(images)  # in stage 1 the encoder is the teacher
    z_q, quantizer_loss, _ = model.quantize(z)
    output = model.decode(z_q)
    l2_loss = F.mse_loss(output, images)
    perceptual_loss = distill_loss = gan_loss = discriminator_loss = torch.zeros_like(l2_loss)
    if teacher:
        distill_loss = model.compute_distillation_loss(z, teacher_z)
    weight = stage_value(PERCEPTUAL_WEIGHT, model.stage)
    if weight and lpips:
        perceptual_loss = lpips(output.clamp(0, 1), images, normalize=True).mean()
    elif weight and teacher:  # on half of the images, to save time
        perceptual_loss = F.mse_loss(teacher(output[::2]).float(), teacher_z[::2])
    loss = 16 * l2_loss + weight * perceptual_loss  # 1/16 is about the variance of pixels
    loss = loss + quantizer_loss + DISTILL_WEIGHT * distill_loss
    if discriminator:
        real, fake = discriminator(torch.cat([images, output])).float().chunk(2)
        gan_loss = -fake.mean()
        discriminator_loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2  # hinge loss: above 1, below -1
        # its gradient at the decoder's last layer gets the norm of the L2 loss's (VQGAN, 2012.09841, eq. 7: with LPIPS)
        norms = [torch.autograd.grad(term, model.decoder.head.weight, retain_graph=True)[0].norm()
                 for term in (16 * l2_loss, gan_loss)]
        loss = loss + GAN_WEIGHT * (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4) * gan_loss
    return dict(loss=loss, l2_loss=l2_loss, perceptual_loss=perceptual_loss, quantizer_loss=quantizer_loss,
                distill_loss=distill_loss, gan_loss=gan_loss, discriminator_loss=discriminator_loss)


def add_gradients(model: VQRAE, images: Tensor, *networks: nn.Module | None) -> dict[str, Tensor]:
    """A micro-batch's losses, and their backward pass: what COMPILE compiles. networks: objective's last three."""
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        losses = objective(model, images, *networks)
    discriminator = networks[-1]
    learning = [p for p in model.parameters() if p.requires_grad]
    (losses["loss"] / ACCUMULATE).backward(inputs=learning, retain_graph=discriminator is not None)
    if discriminator:
        (losses["discriminator_loss"] / ACCUMULATE).backward(inputs=[*discriminator.parameters()])
    return {name: loss.detach() for name, loss in losses.items()}


def train_stage(stage: int, model: VQRAE, networks: tuple, data: Dataset, run: utils.Run):
    """Train one stage, from its start or where the run was stopped. networks: of build_loss_networks."""
    model.set_stage(stage).train()
    utils.seed_everything(SEED, stage)
    discriminator = PatchDiscriminator(sizes()[0]).to(device)
    gan_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.9), fused=True)
    optimizers = build_optimizers(model, stage)
    state = {"model": model, "discriminator": discriminator, "gan_optimizer": gan_optimizer, **optimizers}
    epochs = stage_value(EPOCHS, stage)
    steps = (EPOCH_IMAGES or len(data.train_images)) // BATCH_SIZE  # of an epoch
    total = epochs * steps
    forward_and_backward = compiled(add_gradients) if COMPILE else add_gradients

    for epoch in range(run.resume(state, stage), epochs + 1):
        utils.seed_everything(SEED, stage, epoch, rank)  # a resumed run sees the same batches
        start, log = time.time(), []
        batches = epoch_batches(data.train_images, stage, epoch, steps)
        for step in tqdm(range((epoch - 1) * steps, epoch * steps), f"stage {stage} epoch {epoch}/{epochs}",
                         leave=False, disable=rank > 0):
            gan_on = stage == 1 and GAN_WEIGHT > 0 and step >= total / 2
            for images in islice(batches, ACCUMULATE):
                losses = forward_and_backward(model, images, *networks, discriminator if gan_on else None)
                log.append(torch.stack([*losses.values()]))
            average([p.grad for p in model.parameters() if p.grad is not None])
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            take_step(optimizers, step, total)
            model.zero_grad()
            if gan_on:
                average([p.grad for p in discriminator.parameters()])
                gan_optimizer.step()
                gan_optimizer.zero_grad()

        seconds = time.time() - start
        means = torch.stack(log).mean(0)
        average([means])
        losses = dict(zip(losses, means.tolist()))
        finite = all(x.isfinite().all() for x in (means, *model.state_dict().values()))
        check(finite, f"loss of stage {stage}, epoch {epoch}", losses["loss"],
              "a finite number, and finite weights; try a lower LEARNING_RATE")
        if rank == 0:
            tested = data.test_images[: EVAL_IMAGES or None]
            metrics, _, output = evaluate(model, tested, BATCH_SIZE // ranks // ACCUMULATE)
            row = {"stage": stage, "epoch": epoch, **losses, **metrics,
                   "images_per_second": steps * BATCH_SIZE / seconds, "seconds": seconds}
            save_epoch(run, row, model, state, tested[:8], output[:8])
            print("{stage:6} {epoch:6} {loss:9.4f} {psnr:6.2f} {ssim:7.4f} {usage:11.1%} {perplexity:11,.0f} "
                  "{images_per_second:9,.0f} {seconds:8.0f}".format(**row), flush=True)
            if len(run.history) == 1:  # an epoch of stage 2 takes about 1.4 times as long
                times = sum(stage_value(EPOCHS, other) * (1.4 if other > stage else 1) for other in STAGES)
                print(f"the whole run takes about {(time.time() - start) / 60 * times:.1f} minutes", flush=True)


# Parts of a step

def compiled(function: Callable) -> Callable:
    """`function` as one graph for each size of images, or an error."""
    torch._dynamo.config.trace_autograd_ops = True  # the backward pass is in it
    torch._dynamo.config.recompile_limit = 4 * len(sizes())  # stages, with and without GAN
    step = torch.compile(function, fullgraph=True, dynamic=False, mode=COMPILE)
    return errors_as(ValueError, f"COMPILE = {COMPILE!r}, allowed: '' if this step does not compile")(step)


def epoch_batches(images: Tensor | ImageFiles, stage: int, epoch: int, steps: int) -> Iterator[Tensor]:
    """This process's micro-batches (B, 3, size, size) of an epoch; a small dataset repeats."""
    generator = torch.Generator().manual_seed(SEED * 10**5 + stage * 10**4 + epoch)  # as in other processes
    passes = -(-steps * BATCH_SIZE // len(images))
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(passes)]).to(images.device)
    order = order[: steps * BATCH_SIZE].view(steps, ranks, ACCUMULATE, -1)[:, rank]
    batches = [(index, size) for step, size in zip(order, cycle(sizes())) for index in step]
    return load_batches(images, batches, FLIP, device)


def sizes() -> list[int]:
    return [IMAGE_SIZE] if isinstance(IMAGE_SIZE, int) else sorted(IMAGE_SIZE)


def stage_value(value: object, stage: int) -> object:
    """A constant in this stage: stage_value((30, 10), 2) is 10. A number is for both."""
    return value[stage - 1] if isinstance(value, tuple) else value


def build_optimizers(model: VQRAE, stage: int) -> dict[str, torch.optim.Optimizer]:
    blocks = ("adapter.", "post_quant_conv.", "decoder.layers.", "decoder.blocks.")
    return adamw_and_muon(model, blocks if OPTIMIZER == "muon" else (), stage_value(LEARNING_RATE, stage))


def build_model(pretrained: bool = True) -> VQRAE:
    """The model of START_CHECKPOINT, else that of the constants. pretrained: as in VQRAE."""
    if START_CHECKPOINT:
        with torch.device("cpu"):  # not the meta device
            model = load_checkpoint(START_CHECKPOINT)
        check(model.stage <= STAGES[0], "START_CHECKPOINT", START_CHECKPOINT, 'one of stage 1, or "STAGES=(2,)"')
    else:
        codebook = dict(codebook_size=CODEBOOK_SIZE, code_dim=CODE_DIM, decay=EMA_DECAY, commitment_cost=COMMITMENT)
        tokens, codes = max(1, BATCH_SIZE // (ranks * ACCUMULATE) * GRID**2), max(1, CODEBOOK_SIZE)  # at a time; in all
        # LFQ's entropies compare tokens with all codes: some of the tokens, to save memory. Dead are codes below 0.1 of
        # the mean usage; the library counts from 1, so that with a decay of 0.99 none is for some hundred steps
        part = dict(codebook_size=CODEBOOK_SIZE, frac_per_sample_entropy=min(1.0, 2**24 / (tokens * codes)))
        rotation = dict(codebook_size=CODEBOOK_SIZE, code_dim=CODE_DIM, decay=EMA_DECAY, commitment_weight=COMMITMENT,
                        threshold_ema_dead_code=0.1 * tokens / codes)
        options = {"fsq": dict(levels=FSQ_LEVELS), "ddcl": dict(delta=DDCL_DELTA, comm_weight=DDCL_COMM_WEIGHT),
                   "simvq": dict(transform=SIMVQ_TRANSFORM, **codebook), "ema_vq": codebook, "lfq": part, "bsq": part,
                   "rotation_vq": rotation, "residual_fsq": dict(levels=FSQ_LEVELS, num_quantizers=CODEBOOKS),
                   "library": read_library()}.get(QUANTIZER, {})
        if CODEBOOKS > 1 and QUANTIZER != "residual_fsq":
            options |= dict(codebooks=CODEBOOKS, combine=COMBINE, random_depth=RANDOM_DEPTH)
        model = VQRAE(ENCODER, QUANTIZER, options, sizes()[0], GRID, ENCODER_LAYERS, POST_QUANT_KERNEL, POST_QUANT_NORM,
                      DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS, pretrained)
    check(all(size >= 16 and size % model.token_size == 0 for size in sizes()), "IMAGE_SIZE", IMAGE_SIZE,
          f"16 or more, a multiple of a token's {model.token_size} pixels")
    model.config |= {"image_size": sizes()[0], "grid": sizes()[0] // model.token_size}
    return model


def read_library() -> dict:
    """LIBRARY, a class of vector-quantize-pytorch and its arguments, as options of build_quantizer."""
    with errors_as(ValueError, f"LIBRARY = {LIBRARY!r}, allowed: a call such as LFQ(codebook_size=1024)"):
        call = ast.parse(LIBRARY, mode="eval").body
        names = {word.arg for word in call.keywords}
        check(not call.args and not {None, "dim", "name", "kind"} & names, "arguments", sorted(map(str, names)),
              "NAME=value, without dim")
        return {"kind": call.func.id, **{word.arg: ast.literal_eval(word.value) for word in call.keywords}}


# Set-up and files

def main():
    global constants
    constants = utils.read_constants(globals(), sys.argv[1:])
    check_constants()
    start_process()
    with torch.device("meta"):  # without weights: a wrong constant fails before any download
        config = build_model(pretrained=False).config
    with first_process_first():  # it downloads and decodes, others find its files
        dataset, files = find_dataset(DATASET)
        constants["DATASET"] = Path(dataset).resolve().name
        key = utils.digest((constants, files, START_CHECKPOINT and os.path.getmtime(START_CHECKPOINT)))
        name = f"{constants['DATASET']}_{Path(config['encoder']).name}_{config['quantizer']}_{key}"
        run = utils.Run(name, rank == 0)
        if run.finished:
            print(f"this run is finished: see {run.outputs}/. For another change a constant, or SEED if code changed")
            return
        data = load_dataset(dataset, IMAGE_SIZE)
        most = EPOCH_IMAGES or len(data.train_images)
        check(BATCH_SIZE <= most, "BATCH_SIZE", BATCH_SIZE, f"at most the {most} images of an epoch")
        utils.seed_everything(SEED)
        model = build_model().to(device)
        networks = build_loss_networks(model)
    if isinstance(data.train_images, Tensor) and data.train_images.nbytes < 8e9:
        data = data._replace(train_images=data.train_images.to(device))  # for fast batches
    print(f"{name}: {len(data.train_images):,} training and {len(data.test_images):,} test images, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {ranks} x {device}")
    if run.stage:
        print(f"resuming after stage {run.stage}, epoch {run.epoch}")
    print(f"PSNR, SSIM, codes used, perplexity: of {len(data.test_images[: EVAL_IMAGES or None]):,} test images\n"
          " stage  epoch      loss   PSNR    SSIM  codes used  perplexity  images/s  seconds", flush=True)
    for stage in STAGES:
        if stage >= run.stage:
            train_stage(stage, model, networks, data, run)
    if rank == 0:
        finish(run, model, data)


def start_process():
    """Choose DEVICE, this process's GPU or a CPU's arithmetic, and connect torchrun's processes."""
    global gpu, device, bf16
    if DEVICE:
        with errors_as(ValueError, f"DEVICE = {DEVICE!r}, allowed: one that torch finds here"):
            torch.zeros(1, device=DEVICE)
        device, gpu = DEVICE, DEVICE == "cuda"
        bf16 = fast_bf16(device)
    if gpu:
        gpus, local_ranks = torch.cuda.device_count(), int(os.getenv("LOCAL_WORLD_SIZE", 1))
        check(local_ranks <= gpus, "--nproc_per_node", local_ranks, f"1 to {gpus}, a GPU each")
        torch.cuda.set_device(int(os.getenv("LOCAL_RANK", 0)))
    elif device == "cpu":
        prepare_cpu()
    if ranks > 1:  # others may wait a day for the first
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(days=1))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")


def build_loss_networks(model: VQRAE, pretrained: bool = True) -> tuple[nn.Module | None, nn.Module | None]:
    """The frozen encoder, unless it learns from scratch, and LPIPS if PERCEPTUAL says so."""
    teacher = lpips = None
    if not model.from_scratch:
        teacher = build_encoder(model.config["encoder"], model.token_size, model.config["encoder_layers"], pretrained)
        teacher = teacher.to(device).eval().requires_grad_(False)
        if bf16:
            for layer in teacher.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    layer.bfloat16()  # once, not in each step
    if PERCEPTUAL == "lpips":
        lpips = LearnedPerceptualImagePatchSimilarity("vgg").net.to(device)
    return teacher, lpips


def save_epoch(run: utils.Run, row: dict, model: VQRAE, state: dict, images: Tensor, output: Tensor):
    """Write an epoch's grid, curves and checkpoints."""
    run.check_folder()
    stage, epoch = row["stage"], row["epoch"]
    utils.save_pairs(run.outputs / f"stage{stage}_epoch_{epoch:03}.png", images, output, columns=4)
    utils.plot_curves(run.outputs / "curves.png", [*run.history, row], run.name)
    path = f"{run.checkpoints}/{model.config['quantizer']}_stage{stage}"
    metadata = {"run": run.name, "metrics": row, "constants": constants}
    if row["psnr"] >= max((old["psnr"] for old in run.history if old["stage"] == stage), default=0):
        save_checkpoint(f"{path}_best.pt", model, **metadata)
    save_checkpoint(f"{path}_epoch_{epoch}.pt", model, **metadata)
    run.save(row, state)
    Path(f"{path}_epoch_{epoch - 2}.pt").unlink(missing_ok=True)


def finish(run: utils.Run, model: VQRAE, data: Dataset):
    """Measure the last stage's best epoch on all test images; results.json ends a run."""
    path = run.checkpoints / f"{model.config['quantizer']}_stage{STAGES[-1]}_best.pt"
    check(utils.load_torch(path, "run")["run"] == run.name, "checkpoint", str(path), "one of this run")
    best = load_checkpoint(path).to(device)
    metrics, counts, output = evaluate(best, data.test_images, BATCH_SIZE // ranks // ACCUMULATE)
    utils.save_pairs(run.outputs / "final.png", data.test_images[:64], output[:64], columns=16)
    if len(counts):
        utils.plot_usage(run.outputs / "usage.png", counts, metrics, run.name)
    with utils.replace_file(run.outputs / "results.json") as draft:
        draft.write_text(json.dumps({"run": run.name, **metrics, "constants": constants}, indent=2), "utf-8")
    print(f"all {len(output):,} test images: PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.4f}, "
          f"{metrics['usage']:.1%} of codes used, perplexity {metrics['perplexity']:,.0f}\n"
          f"see {run.outputs}/ and {run.checkpoints}/")


def check_constants():
    """ValueError for a wrong constant."""
    for name, allowed in {"QUANTIZER": QUANTIZERS, "OPTIMIZER": ("muon", "adamw"), "PERCEPTUAL": ("encoder", "lpips"),
                          "COMPILE": ("", "default", "reduce-overhead"), "STAGES": ((1,), (1, 2), (2,))}.items():
        check(constants[name] in allowed, name, constants[name], ", ".join(map(repr, allowed)))
    for name in ("BATCH_SIZE", "ACCUMULATE", "CODEBOOKS"):
        check(constants[name] >= 1, name, constants[name], "1 or more")
    for name in ("EPOCHS", "LEARNING_RATE", "PERCEPTUAL_WEIGHT"):
        value = constants[name]
        check(not isinstance(value, tuple) or len(value) == 2, name, value, "a number, or a pair for both stages")
    if CODEBOOKS == 1 or QUANTIZER != "ema_vq":
        check(RANDOM_DEPTH == 0, "RANDOM_DEPTH", RANDOM_DEPTH, '0 without several codebooks of "ema_vq"')
        check(COMBINE == "residual", "COMBINE", COMBINE, '"residual" without several codebooks of "ema_vq"')
    check(0 < EMA_DECAY < 1, "EMA_DECAY", EMA_DECAY, "between 0 and 1")
    check(all(stage_value(EPOCHS, stage) >= 1 for stage in STAGES), "EPOCHS", EPOCHS, "1 or more")
    check(BATCH_SIZE % (ranks * ACCUMULATE) == 0 and BATCH_SIZE <= (EPOCH_IMAGES or BATCH_SIZE), "BATCH_SIZE",
          BATCH_SIZE, f"a multiple of processes x ACCUMULATE = {ranks} x {ACCUMULATE}, at most EPOCH_IMAGES")
    check(os.path.isfile(START_CHECKPOINT) if START_CHECKPOINT else 1 in STAGES, "START_CHECKPOINT", START_CHECKPOINT,
          'a file, or "" with 1 in STAGES')
    if START_CHECKPOINT:
        names = [*constants]
        for name in names[names.index("ENCODER") : names.index("DECODER_HEADS") + 1]:
            given = any(word.startswith(f"{name}=") for word in sys.argv)
            check(not given, name, constants.pop(name), "no argument with START_CHECKPOINT, whose model is used")


if __name__ == "__main__":
    with utils.one_line_errors("stopped; the same command goes on after the last epoch above"):
        main()
