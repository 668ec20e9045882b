"""Train quantizers at equal bits a token, or with 16,384 codes of several widths, and write a table and a figure.

    python -m extras.compare                                           all of LINES, with train.py's constants
    python -m extras.compare "BITS=(16,)" DATASET=...                  some sizes; other arguments go to train.py
    python -m extras.compare "WIDTHS=(8,16,64,256,1536)" DATASET=...   all of WIDTH_LINES

outputs/quantizers.md and .png grow with each run. The same command resumes. "GB": the most memory of the process.
"""
import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

from data import Dataset, load_dataset
from extras.measure import COLUMNS, format_table, load_judges, measure
from models import load_checkpoint
from quantizers import check
from utils import one_line_errors, read_constants, replace_file, save_figure

DATASET = "cifar10"  # or another of train.py's
PROBE_IMAGES = 2_000  # for training the probes, and for testing them and judges
WIDTHS = (0,)  # numbers of a code, to be compared instead of BITS
BITS = (10, 13, 16, 20)
TABLE = {"a token": ("token_bits", ".1f"), **COLUMNS, "perplexity": ("perplexity", ",.0f"),
         "ms a step": ("milliseconds", ",.0f"), "GB": ("memory", ".1f")}
SIZES = {10: 1024, 13: 8192, 16: 65536}
LINES = {  # constants of train.py, and what {} is at about so many bits a token
    "EMA-VQ": ("QUANTIZER=ema_vq CODEBOOK_SIZE={}", SIZES),
    "FSQ": ("QUANTIZER=fsq FSQ_LEVELS={}",
            {10: "(8,5,5,5)", 13: "(8,8,5,5,5)", 16: "(8,8,8,5,5,5)", 20: "(8,8,8,8,8,6,5)"}),
    "DDCL": ("QUANTIZER=ddcl DDCL_DELTA={}", {10: 0.5, 13: 0.25, 16: 0.125, 20: 0.0667}),
    "SimVQ, matched": ("QUANTIZER=simvq CODEBOOK_SIZE={}", SIZES),
    "residual EMA-VQ": ("CODEBOOKS=2 CODEBOOK_SIZE={}", {10: 32, 13: 90, 16: 256, 20: 1024}),
    "product EMA-VQ": ("CODEBOOKS=2 COMBINE=product CODEBOOK_SIZE={}", {10: 32, 13: 90, 16: 256, 20: 1024}),
    "LFQ": ("QUANTIZER=lfq CODEBOOK_SIZE={}", SIZES),
    "BSQ": ("QUANTIZER=bsq CODEBOOK_SIZE={}", SIZES),
    "rotation-trick VQ": ("QUANTIZER=rotation_vq CODEBOOK_SIZE={}", SIZES),
    "residual FSQ": ("QUANTIZER=residual_fsq CODEBOOKS=2 FSQ_LEVELS={}", {10: "(4,4,2)", 13: "(3,3,3,3)",
                                                                            16: "(4,4,4,4)"}),
    "the library's EMA-VQ": (  # its decay is 0.8; dead are codes below 0.1 of the mean usage, as in ours
        "QUANTIZER=library LIBRARY=VectorQuantize(code_dim=16,rotation_trick=False,codebook_size={})",
        {10: "1024,threshold_ema_dead_code=0.2", 13: "8192,threshold_ema_dead_code=0.025",
         16: "65536,threshold_ema_dead_code=0.003"}),
    "the library's FSQ": ("QUANTIZER=library LIBRARY=FSQ(levels={})", {10: "[8,5,5,5]", 13: "[8,8,5,5,5]",
                                                                     16: "[8,8,8,5,5,5]"}),
    "the library's SimVQ": ("QUANTIZER=library LIBRARY=SimVQ(codebook_size={},code_dim=16)", SIZES),
}
WIDTH_LINES = {"SimVQ, matched": "QUANTIZER=simvq", "SimVQ, cosine": "QUANTIZER=simvq SIMVQ_TRANSFORM=cosine",
               "SimVQ, learned": "QUANTIZER=simvq SIMVQ_TRANSFORM=learned", "EMA-VQ": "QUANTIZER=ema_vq"}


def main():
    own = [word for word in sys.argv[1:] if word.partition("=")[0] in {"--help", *globals()}]
    others = [word for word in sys.argv[1:] if word not in own]
    read_constants(globals(), own)
    valid = isinstance(WIDTHS, tuple) and isinstance(BITS, tuple) and {*BITS} <= {10, 13, 16, 20}
    check(valid, "BITS, WIDTHS", (BITS, WIDTHS), "tuples; of bits, 10, 13, 16 or 20")
    rows = {}
    lines, points, x_axis = LINES, BITS, "token_bits"
    if WIDTHS != (0,):
        values = dict(zip(WIDTHS, WIDTHS))
        lines = {line: (f"{words} CODEBOOK_SIZE=16384 CODE_DIM={{}}", values) for line, words in WIDTH_LINES.items()}
        points, x_axis = WIDTHS, "width"
    for point in points:
        for line, (constants, values) in lines.items():
            if point in values:
                run, memory = train_run([f"DATASET={DATASET}", *others, *constants.format(values[point]).split()])
                figures = Path("outputs", run, f"compared_{PROBE_IMAGES}.json")
                if not figures.exists():
                    with replace_file(figures) as draft:
                        draft.write_text(json.dumps(measure_run(run) | memory))
                rows[f"{line} {values[point]}"] = {"line": line, "width": point, **json.loads(figures.read_text())}
                table = format_table(rows, TABLE, "quantizer")
                with replace_file("outputs/quantizers.md") as draft:
                    draft.write_text(f"{table}\n", "utf-8")
                plot(rows, x_axis)
    print(f"\n{table}\n\nsee outputs/quantizers.md and .png")


def train_run(arguments: list[str]) -> tuple[str, dict]:
    """Run train.py. Returns the run's name, from its last line, and on Linux its peak "memory" in GB."""
    process = subprocess.Popen([sys.executable, "train.py", *arguments], stdout=subprocess.PIPE, text=True)
    memory, status = {}, Path(f"/proc/{process.pid}/status")  # wait4's maximum counts this process's memory, too
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith(" ") and status.exists() and (peak := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
            memory["memory"] = int(peak[1]) / 1e6
    check(process.wait() == 0, "train.py", arguments, "a run that ends well; the same command resumes")
    return line.split("/")[1], memory


def measure_run(run: str) -> dict:
    """The results of a finished run, with its bits a token, their entropy, probes, history, and time of a step."""
    results = json.loads(Path("outputs", run, "results.json").read_text())
    history = [*csv.DictReader(Path("outputs", run, "metrics.csv").read_text().splitlines())]
    model = load_checkpoint(max(Path("checkpoints", run).glob("*_best.pt")))
    parts = load_dataset(DATASET, model.config["image_size"])
    data = Dataset(*(part if part is None else part[:PROBE_IMAGES] for part in parts))  # a folder may have no labels
    figures = measure(model, data, load_judges(model.token_size, data)[0], None)
    return figures | results | {
        "token_bits": math.log2(model.quantizer.codebook_size), "entropy": math.log2(results["perplexity"]),
        "history": [float(row["perplexity"]) for row in history],
        "milliseconds": 1000 * results["constants"]["BATCH_SIZE"] / float(history[-1]["images_per_second"])}


def plot(rows: dict[str, dict], x: str):
    """PSNR and perplexity over bits a token or a code's width, and each line's last perplexity over training."""
    figure = Figure(figsize=(16, 5), layout="constrained")
    quality, usage, training = figure.subplots(1, 3)
    for i, line in enumerate(dict.fromkeys(row["line"] for row in rows.values())):
        style = dict(color=f"C{i}", linestyle="-" if i < 6 else "--", marker="os^vDPX<>*hdp"[i % 13], mfc="none")
        points = sorted((row for row in rows.values() if row["line"] == line), key=lambda row: row[x])
        for axes, name in ((quality, "psnr"), (usage, "perplexity")):
            axes.plot([row[x] for row in points], [row[name] for row in points], label=line, **style)
        history = points[-1]["history"]
        training.plot(range(1, len(history) + 1), history, **style)
    label, scale = {"token_bits": ("bits a token", "linear"), "width": ("numbers of a code", "log")}[x]
    quality.set(xlabel=label, ylabel="PSNR, dB", xscale=scale)
    usage.set(xlabel=label, ylabel="perplexity", xscale=scale, yscale="log")
    training.set(xlabel=f"epoch, at the most {label}", ylabel="perplexity", yscale="log")
    training.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*quality.get_legend_handles_labels(), loc="outside right center")
    save_figure(Path("outputs/quantizers.png"), figure)


if __name__ == "__main__":
    with one_line_errors():
        main()
