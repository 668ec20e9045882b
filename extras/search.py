"""Search for the tokens that decode best. The encoder gives a first guess.

    python -m extras.search                   prints what it gains, 0.6 to 0.7 dB
    indices = search_tokens(vqrae, images)    instead of vqrae.encode_to_indices(images)

Codecs search, learned ones too (1906.01223, 2006.04240); bits and decoder stay the same. Tokens form four sets, with
one of each 2 x 2 in a set. A set's tokens move at once, against the gradient of the error, to the nearest code there. A
move is kept if the error of the 3 x 3 tokens around it has fallen.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import load_dataset, to_float
from evaluate import device, psnr, read_arguments
from models import VQRAE, check_images
from optimization import fast_bf16, prepare_cpu
from quantizers import check
from utils import load_checkpoint, one_line_errors

DATASET = "cifar10"
COUNT = 500  # test images
SWEEPS = 8


@torch.no_grad()
def search_tokens(vqrae: VQRAE, images: Tensor, sweeps: int = 8, feature_weight: float = 5e-4) -> Tensor:
    """images (B, 3, H, W) in [0, 1], of any size -> indices (B, h, w), int64. Each sweep tries every token once.

    The error is that of pixels, squared, plus feature_weight times that of features predicted from tokens. An image
    whose error does not fall keeps the encoder's tokens.
    """
    quantizer, side, images = vqrae.quantizer, vqrae.token_size, check_images(images)
    check(not vqrae.training and quantizer.codebook_size, "vqrae", type(quantizer).__name__, "with codes, in eval mode")
    few = max(1, 2**14 * side**2 // images[0, 0].numel())  # images at a time, for memory
    if len(images) > few:
        return torch.cat([search_tokens(vqrae, some, sweeps, feature_weight) for some in images.split(few)])
    z_q, _, indices = vqrae.encode(images)
    first_indices, (h, w), (height, width) = indices, indices.shape[1:], images.shape[2:]
    features = vqrae.encoder(images, with_last=True)[1] if vqrae.predictor else None

    def measure(z_q: Tensor) -> Tensor:
        """The error (B, 1, h, w) of each token. Their mean is that of pixels, also where tokens are cut."""
        errors = (vqrae.decode(z_q, (height, width)).float() - images).square().mean(1, keepdim=True)
        errors = F.avg_pool2d(errors, side, ceil_mode=True, divisor_override=1) * (h * w / (height * width))
        if features is not None:
            difference = vqrae.predict_features(z_q).float() - features
            errors = errors + feature_weight * difference.square().mean(1, keepdim=True)
        return errors

    # project_out maps codes into a subspace of z_q: tokens move in it
    linear = quantizer.project_out
    columns = getattr(linear, "weight", torch.eye(z_q.shape[1], device=z_q.device))
    basis, inverse = torch.linalg.qr(columns).Q, torch.linalg.pinv(columns)

    def differentiate(z_q: Tensor) -> tuple[Tensor, Tensor]:
        """Errors, and the gradient of their sum (B, n, h, w), in `basis`."""
        z_q = z_q.detach().requires_grad_()
        with torch.enable_grad(), torch.autocast(z_q.device.type, torch.bfloat16, enabled=fast_bf16(z_q.device.type)):
            errors = measure(z_q)
            gradient, = torch.autograd.grad(errors.sum(), z_q)
        return errors.detach(), torch.einsum("bchw,cn->bnhw", gradient, basis)

    first_errors = measure(z_q).mean((2, 3))
    errors, gradient = differentiate(z_q)
    # each token's step adapts: at first it is an eighth of the codes' distance from their mean
    codes = quantizer.get_codebook_entry(torch.arange(512, device=z_q.device) * quantizer.codebook_size // 512)
    spread = (codes - codes.mean(0)).norm(dim=1).mean()
    step = torch.ones_like(errors) * spread / 8
    for _ in tqdm(range(sweeps), "searching", leave=False):
        for row, column in ((0, 0), (1, 1), (0, 1), (1, 0)):
            of_set = ..., slice(row, None, 2), slice(column, None, 2)
            if not indices[of_set].numel():
                continue  # there is one row or column
            move = gradient / gradient.norm(dim=1, keepdim=True).mean((2, 3), keepdim=True).clamp(min=1e-30)
            target = z_q - torch.einsum("bnhw,cn->bchw", step * move, basis)
            target = (target[of_set].permute(0, 2, 3, 1) - getattr(linear, "bias", 0)) @ inverse.T
            tried, tried_z_q = indices.clone(), z_q.clone()
            tried[of_set] = quantizer.nearest(target)
            tried_z_q[of_set] = quantizer.indices_to_codes(tried[of_set])
            tried_errors, tried_gradient = differentiate(tried_z_q)
            rise, moved = F.avg_pool2d(tried_errors - errors, 3, 1, 1), (tried != indices)[:, None]
            better, worse = moved & (rise < 0), moved & (rise >= 0)
            indices, z_q = torch.where(better[:, 0], tried, indices), torch.where(better, tried_z_q, z_q)
            # not decoded again: near an undone move, errors and gradients stay as before
            undone = F.max_pool2d(worse.float(), 3, 1, 1) > 0
            errors, gradient = torch.where(undone, errors, tried_errors), torch.where(undone, gradient, tried_gradient)
            step[of_set] *= torch.where(worse, 0.8, torch.where(moved, 1.0, 1.2))[of_set]
            step = step.minimum(4 * spread)  # at the edge of the codes it would grow for ever
    improved = measure(z_q).mean((2, 3)) < first_errors
    return torch.where(improved[..., None], indices, first_indices)


def main():
    prepare_cpu()
    for path in read_arguments(globals()):
        model, psnrs = load_checkpoint(path).to(device), []
        for batch in load_dataset(DATASET, model.config["image_size"]).test_images[:COUNT].split(50):
            batch = to_float(batch.to(device))
            guess, found = model.encode_to_indices(batch), search_tokens(model, batch, SWEEPS)
            psnrs.append(torch.stack([psnr(model.decode_from_indices(indices), batch) for indices in (guess, found)]))
        before, after = torch.cat(psnrs, 1).mean(1)
        print(f"{path.stem}, {COUNT} images of {DATASET}: {before:.2f} dB, searched {after:.2f} dB", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
