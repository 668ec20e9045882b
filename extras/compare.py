"""Train the quantizers at equal bits a token, and write a table and a figure.

    python -m extras.compare                             all of LINES, with train.py's constants
    python -m extras.compare "BITS=(16,)" DATASET=...    some sizes; other arguments go to train.py

outputs/quantizers.md and .png grow with each run. The same command resumes.
"""
import json
import math
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

from evaluate import COLUMNS, format_table
from quantizers import check
from utils import load_checkpoint, one_line_errors, read_constants, replace_file, save_figure

BITS = (10, 13, 16, 20)
LINES = {  # constants of train.py, and what {} is at about so many bits a token
    "EMA-VQ": ("QUANTIZER=ema_vq CODEBOOK_SIZE={}", {10: 1024, 13: 8192, 16: 65536}),
    "FSQ": ("QUANTIZER=fsq FSQ_LEVELS={}",
            {10: "(8,5,5,5)", 13: "(8,8,5,5,5)", 16: "(8,8,8,5,5,5)", 20: "(8,8,8,8,8,6,5)"}),
    "DDCL": ("QUANTIZER=ddcl DDCL_DELTA={}", {10: 0.5, 13: 0.25, 16: 0.125, 20: 0.0667}),
    "SimVQ": ("QUANTIZER=simvq CODEBOOK_SIZE={}", {10: 1024, 13: 8192, 16: 65536}),
    "residual EMA-VQ": ("CODEBOOKS=2 CODEBOOK_SIZE={}", {10: 32, 13: 90, 16: 256, 20: 1024}),
    "product EMA-VQ": ("CODEBOOKS=2 COMBINE=product CODEBOOK_SIZE={}", {10: 32, 13: 90, 16: 256, 20: 1024}),
}


def main():
    arguments, rows = [word for word in sys.argv[1:] if not word.startswith("BITS=")], {}
    read_constants(globals(), [word for word in sys.argv[1:] if word not in arguments])
    for bits in BITS:
        for line, (constants, values) in LINES.items():
            if bits in values:
                run = train([*arguments, *constants.format(values[bits]).split()])
                rows[f"{line} {values[bits]}"] = {"line": line, **measure_run(run)}
                table = format_table(rows, {"a token": ("token_bits", ".1f"), **COLUMNS}, "quantizer")
                with replace_file("outputs/quantizers.md") as temporary:
                    temporary.write_text(f"{table}\n")
                plot(rows)
    print(f"\n{table}\n\nsee outputs/quantizers.md and .png")


def train(arguments: list[str]) -> str:
    """Run train.py. Returns the run's name, from the last line."""
    process = subprocess.Popen([sys.executable, "train.py", *arguments], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        print(line, end="", flush=True)
    check(process.wait() == 0, "train.py", arguments, "a run that ends well; the same command resumes")
    return line.partition("outputs/")[2].partition("/")[0]


def measure_run(run: str) -> dict:
    """The results of a finished run, with its bits a token and their entropy."""
    results = json.loads(Path("outputs", run, "results.json").read_text())
    codes = load_checkpoint(max(Path("checkpoints", run).glob("*_best.pt"))).quantizer.codebook_size
    return results | {"token_bits": math.log2(codes), "entropy": math.log2(results["perplexity"])}


def plot(rows: dict[str, dict]):
    """PSNR over bits a token, a line for each of LINES."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for line in LINES:
        points = sorted((row["token_bits"], row["psnr"]) for row in rows.values() if row["line"] == line)
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", label=line)
    axes.set(xlabel="bits a token", ylabel="PSNR, dB")
    axes.legend()
    save_figure(Path("outputs/quantizers.png"), figure)


if __name__ == "__main__":
    with one_line_errors():
        main()
