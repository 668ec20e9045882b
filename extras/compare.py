"""Train quantizers at equal bits a token, or with 16,384 codes of several widths, and write a table.

    python -m extras.compare                                           all of bit_lines, with train.py's constants
    python -m extras.compare "BITS=(16,)" DATASET=...                  these bits alone; other arguments go to train.py
    python -m extras.compare "SEEDS=(0, 1, 2)" DATASET=...             rows near the best are means of three runs
    python -m extras.compare "WIDTHS=(8,16,64,256,1536)" DATASET=...   all of width_lines

outputs/quantizers.md gets a row after each training. The same command resumes, another one begins the table anew.
"max - min" is the range of the seeds' PSNR.
"""
import json
import math
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from data import Dataset, load_dataset
from extras.measure import format_table, load_judges, measure, measured_columns
from models import load_checkpoint
from quantizers import check, require
from utils import one_line_errors, read_constants, replace_file

DATASET = "cifar10"  # or another of train.py's
PROBE_IMAGES = 2_000  # so many training images for probes, and test images for probes and Fréchet distances
BITS = (10, 13, 16)
WIDTHS = ()  # numbers of a code, to be compared instead of BITS
SEEDS = (0,)  # after the first, only lines within 0.5 dB of the best at their size are run again
columns = {"bits a token": ("token_bits", ".1f"), "PSNR": ("psnr", ".2f"), "max - min": ("psnr_range", ".2f"),
           **measured_columns, "perplexity": ("perplexity", ",.0f")}
sizes = {10: 1024, 13: 8192, 16: 65536}
pairs = {10: 32, 13: 90, 16: 256}
bit_lines = {  # constants of train.py, and what stands for * at about so many bits a token
    "EMA-VQ": ("QUANTIZER=ema_vq CODEBOOK_SIZE=*", sizes),
    "FSQ": ("QUANTIZER=fsq FSQ_LEVELS=*", {10: "(8,5,5,5)", 13: "(8,8,5,5,5)", 16: "(8,8,8,5,5,5)"}),
    "DDCL": ("QUANTIZER=ddcl DDCL_DELTA=*", {10: 0.5, 13: 0.25, 16: 0.125}),
    "SimVQ, matched": ("QUANTIZER=simvq CODEBOOK_SIZE=*", sizes),
    "residual EMA-VQ": ("QUANTIZER=residual_vq CODEBOOKS=2 CODEBOOK_SIZE=*", pairs),
    "product EMA-VQ": ("QUANTIZER=product_vq CODEBOOKS=2 CODEBOOK_SIZE=*", pairs),
    "LFQ": ("QUANTIZER=lfq CODEBOOK_SIZE=*", sizes),
    "BSQ": ("QUANTIZER=bsq CODEBOOK_SIZE=*", sizes),
    "rotation-trick VQ": ("QUANTIZER=rotation_vq EMA_DECAY=0.8 CODEBOOK_SIZE=*", sizes),
    "residual FSQ": ("QUANTIZER=residual_fsq CODEBOOKS=2 FSQ_LEVELS=*",
                     {10: "(4,4,2)", 13: "(3,3,3,3)", 16: "(4,4,4,4)"}),
    # its decay is 0.8; with a CPU's 2,048 tokens a step, codes are dead as in ours: on a GPU take BATCH_SIZE=32
    "the library's EMA-VQ": (
        'QUANTIZER=library LIBRARY={"kind":"VectorQuantize","code_dim":16,"rotation_trick":False,"codebook_size":*}',
        {10: '1024,"threshold_ema_dead_code":0.2', 13: '8192,"threshold_ema_dead_code":0.025',
         16: '65536,"threshold_ema_dead_code":0.003'}),
    "the library's SimVQ": ('QUANTIZER=library LIBRARY={"kind":"SimVQ","code_dim":16,"codebook_size":*}', sizes),
}
width_lines = {"SimVQ, matched": ("QUANTIZER=simvq CODEBOOK_SIZE=16384 CODE_DIM=*", {}),
               "SimVQ, learned": ("QUANTIZER=simvq_learned CODEBOOK_SIZE=16384 CODE_DIM=*", {}),
               "EMA-VQ": ("QUANTIZER=ema_vq CODEBOOK_SIZE=16384 CODE_DIM=*", {})}


def main():
    names = {"-h", "--help", "DATASET", "PROBE_IMAGES", "BITS", "WIDTHS", "SEEDS"}
    own = [word for word in sys.argv[1:] if word.partition("=")[0] in names]
    others = [word for word in sys.argv[1:] if word not in own]  # train.py checks them
    read_constants(globals(), own, {str: "DATASET", int: "PROBE_IMAGES", tuple[int, ...]: "BITS SEEDS"})
    check({*BITS} <= {*sizes}, "BITS", BITS, "10, 13 and 16")
    check(PROBE_IMAGES >= 2, "PROBE_IMAGES", PROBE_IMAGES, "2 or more")
    check(all(type(width) is int and width > 0 for width in WIDTHS), "WIDTHS", WIDTHS, "numbers of a code, from 1")
    lines, points = (width_lines, WIDTHS) if WIDTHS else (bit_lines, BITS)
    varied = {"SEED", *re.findall(r"\b([A-Z_]+)=", str(lines))}  # the constants that lines set
    for word in others:
        check(word.partition("=")[0] not in varied, "argument", word, "a constant that the lines and SEEDS leave alone")
    rows = {}
    for point in points:
        runs = defaultdict(list)
        for seed in SEEDS:
            best = max((results[0]["psnr"] for results in runs.values()), default=0)  # of the first seed
            for line, (words, values) in lines.items():
                name, value = f"{line}, {point} {'numbers' if WIDTHS else 'bits'}", str(values.get(point, point))
                if runs[name] and runs[name][0]["psnr"] < best - 0.5:
                    continue
                arguments = [f"DATASET={DATASET}", *others, *words.replace("*", value).split()]
                figures = run_and_measure([*arguments, f"SEED={seed}"])
                runs[name].append(figures)
                rows[name] = average(runs[name])
                table = format_table(rows, columns, "quantizer")
                with replace_file("outputs/quantizers.md") as draft:
                    draft.write_text(f"{table}\n", "utf-8")
    print(f"\n{table}\n\nsee outputs/quantizers.md")


def run_and_measure(arguments: list[str]) -> dict:
    """Run train.py, unless this run is finished, and measure it, unless its figures are there."""
    run = train_run(arguments)
    file = Path("outputs", run, f"compared_{PROBE_IMAGES}.json")
    if not file.exists():
        figures = json.dumps(measure_run(run))  # outside, as replace_file says that any OSError is of writing
        with replace_file(file) as draft:
            draft.write_text(figures)
    return json.loads(file.read_text())


def train_run(arguments: list[str]) -> str:
    """Run train.py. Returns the run's name, from its last line."""
    with subprocess.Popen([sys.executable, "train.py", *arguments], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
    require(process.returncode == 0, f"train.py {' '.join(arguments)} failed, see above. The same command resumes.")
    return re.search(r"see outputs.([^/\\]+)", line)[1]


def measure_run(run: str) -> dict:
    """A finished run's results, of all test images, its bits a token, and figures of PROBE_IMAGES images."""
    results = json.loads(Path("outputs", run, "results.json").read_text("utf-8"))
    files = sorted(Path("checkpoints", run).glob("*_best.pt"))
    require(files, f"checkpoints/{run} has lost its *_best.pt. Delete outputs/{run}, and the same command trains it.")
    model = load_checkpoint(files[-1])  # the last stage's
    image_size = int(np.max(results["constants"]["IMAGE_SIZE"]))  # of several the largest, as train.py measures
    parts = load_dataset(DATASET, image_size)
    # [:n] also reads images that stay in files; a folder may have no labels
    data = Dataset(*(part if part is None else part[:PROBE_IMAGES] for part in parts))
    figures = measure(model, data, load_judges(image_size))
    return figures | results | {"token_bits": math.log2(model.quantizer.codebook_size),
                                "entropy": math.log2(results["perplexity"])}


def average(runs: list[dict]) -> dict:
    """The means of several runs' figures, and the range of their PSNR."""
    common = set.intersection(*({*run} for run in runs))  # a judge that was installed meanwhile has measured some alone
    names = [name for name in runs[0] if name in common and isinstance(runs[0][name], (int, float))]
    figures = {name: statistics.fmean(run[name] for run in runs) for name in names}
    if len(runs) > 1:
        psnrs = [run["psnr"] for run in runs]
        figures["psnr_range"] = max(psnrs) - min(psnrs)
    return figures


if __name__ == "__main__":
    with one_line_errors():
        main()
