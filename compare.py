"""The quantizers at equal bits a token: trains each of them at several sizes, and writes a table and a figure.

    python compare.py                                             all of LINES, each as train.py does by default
    python compare.py "BITS=(16,)" DATASET=photos EPOCH_IMAGES=10000    some sizes; other constants go to train.py

outputs/quantizers.md and .png have the rows of this command, and grow with each run. Finished runs are found again, so
that the same command goes on where it was stopped, and a size added to LINES takes one more run. A token's bits are
log2 of the number of codes.
"""
import functools
import json
import re
import subprocess
import sys
from errors import one_line_errors
from pathlib import Path

from matplotlib.figure import Figure

from evaluate import device, format_table, limit_training, measure
from plots import save_figure
from quantizers import check
from utils import load_dataset, load_torch, read_constants, write_file

BITS = (10, 13, 16, 20)  # which sizes of LINES to train
TRAIN_IMAGES = 10_000  # that the probes learn from
# each line of the figure: constants of train.py, and what {} stands for in them at about so many bits a token (of
# 2**20 codes in one codebook the search takes too long)
LINES = {
    "EMA-VQ": ("QUANTIZER=ema_vq EMA_CODE_DIM=16 EMA_CODEBOOK_SIZE={}", {10: 1024, 13: 8192, 16: 65536}),
    "FSQ": ("QUANTIZER=fsq FSQ_LEVELS={}",
            {10: (8, 5, 5, 5), 13: (8, 8, 5, 5, 5), 16: (8, 8, 8, 5, 5, 5), 20: (8, 8, 8, 8, 8, 6, 5)}),
    "DDCL": ("QUANTIZER=ddcl DDCL_DELTA={}", {10: 0.5, 13: 0.25, 16: 0.125, 20: 0.0667}),
    "SimVQ": ("QUANTIZER=simvq SIMVQ_CODE_DIM=8 SIMVQ_CODEBOOK_SIZE={}", {10: 1024, 13: 8192, 16: 65536}),
    "SimVQ, code dim 16": ("QUANTIZER=simvq SIMVQ_CODE_DIM=16 SIMVQ_CODEBOOK_SIZE={}", {16: 65536}),
    "residual EMA-VQ, two codebooks": (
        "QUANTIZER=ema_vq CODEBOOKS=2 COMBINE=residual EMA_CODE_DIM=16 EMA_CODEBOOK_SIZE={}",
        {10: 32, 13: 90, 16: 256, 20: 1024}),
    "product EMA-VQ, two codebooks": (
        "QUANTIZER=ema_vq CODEBOOKS=2 COMBINE=product EMA_CODE_DIM=8 EMA_CODEBOOK_SIZE={}",
        {10: 32, 13: 90, 16: 256, 20: 1024}),
}
COLUMNS = {"bits": "token_bits:.1f", "PSNR": "psnr:.2f", "SSIM": "ssim:.4f", "probe z_q": "probe_z_q:.1%",
           "probe predicted": "probe_predicted:.1%", "perplexity": "perplexity:,.0f", "usage": "usage:.1%",
           "quantizer": "quantizer_mb:.2f MB", "images/s": "images_per_second:,.0f"}
ROOT = Path(__file__).resolve().parent
load_dataset = functools.cache(load_dataset)


def main():
    own = [argument for argument in sys.argv[1:] if argument.startswith(("BITS=", "TRAIN_IMAGES="))]
    arguments = [argument for argument in sys.argv[1:] if argument not in own]
    one = {"DATASET": "auto", "IMAGE_SIZE": 32}
    with one_line_errors(ValueError):
        read_constants(globals(), own)
        sizes = sorted({bits for _, values in LINES.values() for bits in values})
        check(isinstance(BITS, (tuple, list)) and BITS and all(bits in sizes for bits in BITS), "BITS", BITS,
              f"some of {sizes}, such as (16,)")
        check(type(TRAIN_IMAGES) is int and TRAIN_IMAGES >= 2, "TRAIN_IMAGES", TRAIN_IMAGES, "2 or more")
        for argument in arguments:
            if argument.startswith(("DATASET=", "IMAGE_SIZE=")):
                several = [isinstance(value, tuple | list) for value in read_constants(one.copy(), [argument]).values()]
                check(not any(several), "argument", argument, "one dataset and size")
    rows = {}
    for bits in BITS:
        for line, (constants, values) in LINES.items():
            if bits in values:
                of_row = [constant.format(values[bits]) for constant in constants.split()]
                name = train([*arguments, *of_row])
                rows[f"{line}: {values[bits]}"] = {"line": line, **measure_run(name)}
                table = format_table(rows, COLUMNS, "quantizer")
                write_file(Path("outputs", "quantizers.md"), f"{table}\n".encode())
                plot(Path("outputs", "quantizers.png"), rows)
    print(f"\n{table}\n\nsee outputs/quantizers.md and .png")


def train(arguments: list[str]) -> str:
    """Run train.py, and return the run's name, which its first lines say."""
    print("\ntrain.py", *arguments, flush=True)
    command, name = [sys.executable, ROOT / "train.py", *arguments], None
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        print(line, end="", flush=True)
        if match := re.match(r"(.+): [\d,]+ training and [\d,]+ test images", line):
            name = match[1]
    if process.wait():
        sys.exit("compare.py: this run failed; runs before it are kept, and the same command goes on from there")
    return name


def measure_run(name: str) -> dict:
    """The figures of a finished run's last stage, of all test images; kept in its outputs/, as they take a while."""
    path = Path("outputs", name, f"figures_{TRAIN_IMAGES}.json")
    if not path.exists():
        stage = json.loads(Path("outputs", name, "results.json").read_text())["stage"]
        checkpoint = next(Path("checkpoints", name).glob(f"*_stage{stage}_best.pt"), None)
        check(checkpoint, f"checkpoint of stage {stage}", name, f"one: delete outputs/{name} to train anew")
        content = load_torch(checkpoint)
        data = load_dataset(content["constants"]["DATASET"], content["config"]["image_size"])
        trained_on = json.loads(Path("outputs", name, "constants.json").read_text())["DATASET"][0]
        check(data.digest == trained_on[-1], "DATASET", content["constants"]["DATASET"], f"the images of {name}")
        data = limit_training(data._replace(test_images=data.test_images.to(device)), TRAIN_IMAGES)
        figures, *_ = measure(checkpoint, data, {})
        figures["token_bits"] = figures["bits"] / figures["tokens"]
        figures["quantizer_mb"] = figures["quantizer_kb"] / 1e3
        write_file(path, json.dumps(figures, indent=2).encode())
    return json.loads(path.read_text())


def plot(path: Path, rows: dict[str, dict]):
    """PSNR over bits a token, a line for each of LINES."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for i, line in enumerate(LINES):
        points = sorted((row["token_bits"], row["psnr"]) for row in rows.values() if row["line"] == line)
        if points:  # a line has its colour whatever BITS are
            axes.plot([bits for bits, _ in points], [psnr for _, psnr in points], "o-", color=f"C{i}", label=line)
    axes.set(xlabel="bits a token", ylabel="PSNR, dB")
    axes.legend()
    save_figure(path, figure)


if __name__ == "__main__":
    try:
        with one_line_errors(ValueError, RuntimeError, OSError, note="; what was finished before is kept",
                             full="is another program on it?"):
            main()
    except KeyboardInterrupt:
        sys.exit("\ncompare.py: stopped; the same command goes on from there")
