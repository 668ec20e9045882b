"""Search for the tokens that an image is decoded from best. The encoder's own are only a first guess.

    indices = search_tokens(vqrae, images)      instead of vqrae.encode_to_indices(images): 0.6 to 0.8 dB more
    indices = search_dataset(vqrae, images)     of many images, which takes hours: what was found is kept

Codecs search, and learned ones do (1906.01223, 2006.04240): bits and decoder stay what they are. The grid is split into
four sets, one token of each 2 x 2 in each. In turns, all tokens of a set are tried at once: each moves against the
gradient of the error, to the nearest code there, and stays if the error of the 3 x 3 tokens around it has fallen.
"""
import contextlib
import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from models import VQRAE, check_images, in_strips
from quantizers import check, fast_bf16
from utils import hash_file, load_torch, save_torch, to_float

torch.set_flush_denormal(True)  # for gradients on a CPU, see optimization.prepare_cpu: now, before its threads start
strip_tokens = 2**14  # of a strip, about, besides the reach above and below; its rows are four times the reach or more


def search_tokens(vqrae: VQRAE, images: Tensor, sweeps: int = 16, feature_weight: float = 5e-4,
                  image_weight: float = 0.0) -> Tensor:
    """images (B, 3, H, W) in [0, 1], of any size -> indices (B, h, w), int64. In each sweep every token is tried once.

    The error is the mean squared error of pixels plus feature_weight times that of the features predicted from the
    tokens (if the model predicts any) against its own encoder's; to the latter, image_weight times the error of the
    features' mean over the image is added. With a feature_weight of 5e-4 predicted features stay about as good as those
    of the encoder's tokens, with 0 they become worse; with an image_weight of 10 their mean keeps what it tells of the
    image, for 0.1 or 0.2 dB. An image, or a strip of a large one, whose error is not smaller in the end keeps the
    encoder's tokens. ValueError for images or options out of range, a model that has no codes, or one in train mode.
    """
    images = check_images(images)
    check(not vqrae.training, "vqrae", "in train mode", "one in eval mode")
    check(vqrae.quantizer.codebook_size > 0, "quantizer", vqrae.config["quantizer"], "one that has codes")
    check(type(sweeps) is int and sweeps >= 1, "sweeps", sweeps, "a whole number of 1 or more")
    for name, weight in (("feature_weight", feature_weight), ("image_weight", image_weight)):
        check(isinstance(weight, int | float) and 0 <= weight <= 1e6, name, weight, "0 to 1e6")
    tokens = max(1, images.shape[2] * images.shape[3] // vqrae.token_size**2)
    return torch.cat([in_strips(lambda strip: search_strip(vqrae, strip, sweeps, feature_weight, image_weight),
                                part, vqrae.token_size, 1, vqrae.encoder_reach, strip_tokens)
                      for part in images.split(max(1, strip_tokens // tokens))])


@torch.inference_mode(False)  # gradients are needed even where the caller turned them off
@torch.no_grad()
def search_strip(vqrae: VQRAE, images: Tensor, sweeps: int, feature_weight: float, image_weight: float) -> Tensor:
    """As search_tokens, all at once."""
    quantizer = vqrae.quantizer
    images = images.clone()  # one made in inference mode takes no part in gradients
    z_q, _, indices = vqrae.encode(images)
    features = vqrae.encoder(images) if feature_weight and not vqrae.from_scratch else None
    (height, width), (h, w), patch = images.shape[2:], indices.shape[1:], vqrae.token_size
    first, first_indices = z_q, indices

    def measure(z_q: Tensor) -> tuple[Tensor, Tensor]:
        """Of each token, the error of its pixels (B, h, w), and its predicted features less the true (B, C, h, w)"""
        errors = (vqrae.decode(z_q, (height, width)).float() - images).square().mean(1, keepdim=True)
        errors = F.avg_pool2d(F.pad(errors, (0, w * patch - width, 0, h * patch - height)), patch)[:, 0]
        errors = errors * (h * w * patch**2 / (height * width))  # where tokens are cut: their mean is that of pixels
        if features is None:
            return errors, torch.zeros_like(errors)[:, None]
        return errors, vqrae.predict_features(z_q).float() - features

    def total(errors: Tensor, gaps: Tensor) -> Tensor:
        """The error (B,) of each image"""
        of_features = gaps.square().mean((1, 2, 3)) + image_weight * gaps.mean((2, 3)).square().mean(1)
        return errors.mean((1, 2)) + feature_weight * of_features

    # codes are made of n numbers by a linear layer: moves are in the space of its columns, where codes are
    columns = getattr(quantizer.project_out, "weight", torch.eye(z_q.shape[1], device=z_q.device))
    basis = torch.linalg.qr(columns).Q  # (C, n)

    def differentiate(z_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `measure` returns, and the gradient of the errors (B, n, h, w), in `basis`"""
        z_q = z_q.detach().requires_grad_()
        with torch.enable_grad(), torch.autocast(z_q.device.type, torch.bfloat16, enabled=fast_bf16(z_q.device)):
            errors, gaps = measure(z_q)
            gradient, = torch.autograd.grad(total(errors, gaps).sum(), z_q)
        return errors.detach(), gaps.detach(), torch.einsum("bchw,cn->bnhw", gradient, basis)

    def around(values: Tensor) -> Tensor:
        """The mean of 3 x 3 tokens' values (B, h, w)"""
        return F.avg_pool2d(values[:, None], 3, 1, 1)[:, 0]

    errors, gaps, gradient = differentiate(z_q)
    # how far each token moves at a try, which it learns: at first an eighth of how far codes are from their mean
    some = torch.randint(quantizer.codebook_size, (512,), generator=torch.Generator().manual_seed(0))
    codes = quantizer.get_codebook_entry(some)
    spread = (codes - codes.mean(0)).norm(dim=1).mean()
    step = torch.full_like(errors, 0.125) * spread
    for _ in tqdm(range(sweeps), "searching", leave=False):
        for top, left in ((0, 0), (1, 1), (0, 1), (1, 0)):
            turn = ..., slice(top, None, 2), slice(left, None, 2)  # the tokens whose turn it is
            if not indices[turn].numel():  # of a single row or column
                continue
            move = gradient / gradient.norm(dim=1, keepdim=True).mean((2, 3), keepdim=True).clamp(min=1e-30)
            target = z_q - torch.einsum("bnhw,cn->bchw", step[:, None] * move, basis)
            tried, tried_z_q = indices.clone(), z_q.clone()
            tried[turn] = quantizer.codes_to_indices(target[turn], exact=False)
            tried_z_q[turn] = quantizer.indices_to_codes(tried[turn])
            tried_errors, tried_gaps, tried_gradient = differentiate(tried_z_q)
            moved = tried != indices
            # What each move adds to the error. Of n tokens n / 4 move at once, most to where the mean falls short: if
            # no other token's features changed, by convexity
            # n |mean + sum of changes / n|^2 - n |mean|^2 <= sum of (2 mean change + |change|^2 / 4)
            mean, change = gaps.mean((2, 3), keepdim=True), tried_gaps - gaps
            of_mean = 2 * mean * change + change.square() / 4
            of_features = (tried_gaps.square() - gaps.square() + image_weight * of_mean).mean(1)
            better = moved & (around(tried_errors - errors + feature_weight * of_features) < 0)
            worse = moved & ~better
            indices, z_q = torch.where(better, tried, indices), torch.where(better[:, None], tried_z_q, z_q)
            # not decoded again: near a move that was undone errors and gradients stay as before it, elsewhere they are
            # those of the trial, or nearly
            undone = F.max_pool2d(worse[:, None].float(), 3, 1, 1) > 0
            errors = torch.where(undone[:, 0], errors, tried_errors)
            gaps, gradient = torch.where(undone, gaps, tried_gaps), torch.where(undone, gradient, tried_gradient)
            step[turn] *= torch.where(worse, 0.8, torch.where(moved, 1.0, 1.2))[turn]
            step = step.minimum(4 * spread)  # that of a token at the edge of the codes would grow for ever
    improved = total(*measure(z_q)) < total(*measure(first))
    return torch.where(improved[:, None, None], indices, first_indices)


def search_dataset(vqrae: VQRAE, images: Tensor, sweeps: int = 16, feature_weight: float = 5e-4,
                   image_weight: float = 0.0) -> Tensor:
    """search_tokens of uint8 images (N, 3, H, W) -> (N, h, w), int64, 250 at a time. They are kept in data/ as they are
    found, and the same call, after one that was stopped, goes on from there."""
    check(images.dtype == torch.uint8, "images", images.dtype, "uint8")
    device = next(vqrae.parameters()).device
    # the file's name is of all that tokens depend on, with the text of the modules that find them
    modules = [hash_file(Path(__file__).with_name(name)) for name in ("search.py", "models.py", "quantizers.py")]
    weights = float(feature_weight), float(image_weight)
    options = vqrae.config, tuple(images.shape), sweeps, *weights, fast_bf16(device), modules
    content = hashlib.sha256(repr(options).encode())
    for value in (images, *vqrae.state_dict().values()):
        content.update(value.cpu().flatten().view(torch.uint8).numpy())  # numpy has no bf16
    path, tokens, batches = Path("data", f"searched_{content.hexdigest()[:12]}.pt"), [], images.split(250)
    with contextlib.suppress(ValueError):  # there is no such file, or a broken one
        tokens = list(load_torch(path, "tokens")["tokens"].split(250))
    for batch in tqdm(batches[len(tokens) :], "searching for tokens", len(batches), initial=len(tokens), leave=False):
        tokens.append(search_tokens(vqrae, to_float(batch.to(device)), sweeps, feature_weight, image_weight).cpu())
        try:
            save_torch(path, {"tokens": torch.cat(tokens)})
        except OSError as error:  # a full disk, or another user's data/
            tqdm.write(f"what is found is not kept: {error}")
    return torch.cat(tokens).to(device)
