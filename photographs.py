"""Measure checkpoints on photographs of any size, each encoded whole, beside codecs at the bits of the last checkpoint.

    python photographs.py PHOTOS=my_photos                                        the shipped checkpoints
    python photographs.py PHOTOS=my_photos checkpoints/<run>/fsq_stage2_best.pt   your own
    python photographs.py PHOTOS=my_photos SEARCH=6                               with tokens that search.py finds

Prints bits a pixel, mean PSNR and mean SSIM of all images below the folder PHOTOS, or after Ctrl-C of those that are
done, and writes the first one, beside each of its reconstructions, to outputs/photographs/.
"""
import functools
import math
import sys
from errors import one_line_errors
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm

from evaluate import (
    available_codecs,
    device,
    encode_montage,
    format_table,
    name_checkpoints,
    nearest_quality,
    read_arguments,
)
from models import VQRAE
from quantizers import check
from search import search_tokens
from utils import digest, find_images, load_checkpoint, load_image, psnr, ssim, summarize, to_float

PHOTOS = None  # a folder
SEARCH = 0  # sweeps of search.py; 0: the encoder's own tokens
COUNT = None  # the first so many files, sorted by their paths; None: all


def main():
    with one_line_errors(ValueError, RuntimeError, OSError):
        paths = read_arguments(globals())
        check(isinstance(PHOTOS, str) and Path(PHOTOS).is_dir(), "PHOTOS", PHOTOS, "a folder of photographs")
        check(COUNT is None or type(COUNT) is int and COUNT >= 1, "COUNT", COUNT, "None, or 1 or more")
        check(type(SEARCH) is int and SEARCH >= 0, "SEARCH", SEARCH, "a whole number of 0 or more")
        models = {name: load_checkpoint(path).to(device) for name, path in name_checkpoints(paths).items()}
        sizes = {name: model.quantizer.codebook_size for name, model in models.items()}
        check(all(sizes.values()), "checkpoints", sizes, "with a quantizer")
        files = find_images(Path(PHOTOS))[:COUNT]
        check(files, "PHOTOS", PHOTOS, "a folder with photographs in it")
        smallest, codecs = max(11, *(model.token_size for model in models.values())), available_codecs()
        rows, stopped = {}, False
        try:
            for file in tqdm(files, "photographs"):
                try:
                    image = load_image(file)
                    check(min(image.shape[2:]) >= smallest and max(image.shape[2:]) < 2**14, "height and width",
                          tuple(image.shape[2:]), f"{smallest}, for SSIM and a token, to 16383, for WebP")
                except ValueError as error:
                    tqdm.write(f"skipping {str(file)!r}: {error}")
                    continue
                measure(image.to(device), models, codecs, rows)
        except (KeyboardInterrupt, MemoryError, RuntimeError, ValueError, OSError) as error:  # after hours, perhaps
            print(f"stopped before {str(file)!r}: {summarize(error)}", file=sys.stderr)
            stopped = True
        if stopped and not rows:
            sys.exit(1)
        check(rows, "PHOTOS", PHOTOS, "a folder with photographs that can be measured")
    count = min(map(len, rows.values()))
    means = {name: {key: sum(row[key] for row in each[:count]) / count for key in each[0]}
             for name, each in rows.items()}
    columns = {"bits a pixel": "bits:.3f", "PSNR": "psnr:.2f", "SSIM": "ssim:.4f"}
    searched = f", tokens from search.py, {SEARCH} sweeps" if SEARCH else ""
    print(f"{count} photographs of {PHOTOS}{searched}:\n\n{format_table(means, columns, 'photographs from')}")
    if stopped:
        sys.exit(1)


def measure(image: Tensor, models: dict[str, VQRAE], codecs: list[str], rows: dict[str, list[dict]]):
    """Append bits a pixel, PSNR and SSIM of a photograph (1, 3, H, W) to the rows of each model and codec."""
    pixels = image.shape[2] * image.shape[3]

    def add(name: str, bits: float, reconstruction: Tensor):
        figures = {"bits": bits / pixels, "psnr": psnr(reconstruction, image), "ssim": ssim(reconstruction, image)}
        rows.setdefault(name, []).append({key: float(value) for key, value in figures.items()})
        if len(rows[name]) == 1:
            characters = name.encode()  # there may be more than a file's name can have
            short = name if len(characters) < 200 else f"{characters[:150].decode(errors='ignore')} {digest(name)}"
            path = Path("outputs", "photographs", f"{short.replace('/', '_')}.png")  # or paths
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(torch.cat([image, reconstruction], 3), path)

    for name, model in models.items():
        indices = search_tokens(model, image, SEARCH) if SEARCH else model.encode_to_indices(image)
        bits = indices.numel() * math.log2(model.quantizer.codebook_size)
        add(name, bits, model.decode_from_indices(indices, size=image.shape[2:]))
    for codec in codecs:  # at the last checkpoint's bits
        encode = functools.cache(functools.partial(encode_montage, (image.cpu() * 255).round().byte(), codec))
        size, decoded = encode(nearest_quality(encode, bits))
        add(codec, size, to_float(decoded).to(device))


if __name__ == "__main__":
    with one_line_errors(OSError, full="try fewer checkpoints"):
        main()
