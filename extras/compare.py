"""Train quantizers at equal bits a token, and write a table.

    python -m extras.compare                      all lines below, as in RESULTS.md's table
    python -m extras.compare QUANTIZER=sign       a quantizer of yours, beside this table
    python -m extras.compare QUANTIZER=sign,fsq   also FSQ on the same images

A run of 80 steps takes one or two minutes. Arguments for train.py, such as EPOCHS=8, replace those of `setting`.
RESULTS.md's images are JPEG copies of CIFAR-10, whose own pixels have about 0.6 dB less.
outputs/quantizers.md gets a row after each line. The same command resumes.
"""
import inspect
import json
import math
import re
import subprocess
import sys
from pathlib import Path

from data import load_dataset
from extras import measure
from models import load_checkpoint
from quantizers import QUANTIZERS, check
from utils import digest_file, one_line_errors, read_constants, replace_file

QUANTIZER = ""  # names, separated by commas; "": those of all lines
DATASET = "cifar10"  # or another of train.py's
PROBE_IMAGES = 1_000  # training images for probes, test images for probes and Fréchet distances
BITS = (10, 13, 16)
SEEDS = (0,)  # with several, figures are means
setting = ("STAGES=(1,) EPOCHS=4 EPOCH_IMAGES=640 BATCH_SIZE=32 LEARNING_RATE=1e-3 FLIP=False EVAL_IMAGES=100 "
           "PERCEPTUAL_WEIGHT=0.0 DECODER_WIDTH=96 DECODER_DEPTH=1")
columns = {"PSNR": ("psnr", ".2f"), "max - min": ("psnr_range", ".2f"), **measure.measured_columns}
sizes = {10: 1024, 13: 8192, 16: 65536}
pairs = {10: 32, 13: 90, 16: 256}
lines = {  # QUANTIZER and other constants of train.py, and what * stands for, by bits a token
    "EMA-VQ": ("ema_vq CODEBOOK_SIZE=*", sizes),
    "FSQ": ("fsq FSQ_LEVELS=*", {10: "(8,5,5,5)", 13: "(8,8,5,5,5)", 16: "(8,8,8,5,5,5)"}),
    "DDCL": ("ddcl DDCL_DELTA=*", {10: 0.5, 13: 0.25, 16: 0.125}),
    "SimVQ, matched": ("simvq_matched CODEBOOK_SIZE=*", sizes),
    "SimVQ": ("simvq CODEBOOK_SIZE=*", sizes),
    "SimVQ, cosine": ("simvq_cosine CODEBOOK_SIZE=*", sizes),
    "residual EMA-VQ": ("residual_vq CODEBOOKS=2 CODEBOOK_SIZE=*", pairs),
    "product EMA-VQ": ("product_vq CODEBOOKS=2 CODEBOOK_SIZE=*", pairs),
    "LFQ": ("lfq CODEBOOK_SIZE=*", sizes),
    "BSQ": ("bsq CODEBOOK_SIZE=*", sizes),
    "rotation-trick VQ": ("rotation_vq EMA_DECAY=0.8 CODEBOOK_SIZE=*", sizes),
    "residual FSQ": ("residual_fsq CODEBOOKS=2 FSQ_LEVELS=*", {10: "(4,4,2)", 13: "(3,3,3,3)", 16: "(4,4,4,4)"}),
    # its decay is 0.8; codes below 0.1 of the mean usage (2,048 tokens a step) are dead, as in ours
    "the library's EMA-VQ": (
        'library LIBRARY={"kind":"VectorQuantize","code_dim":16,"rotation_trick":False,"codebook_size":*}',
        {10: '1024,"threshold_ema_dead_code":0.2', 13: '8192,"threshold_ema_dead_code":0.025',
         16: '65536,"threshold_ema_dead_code":0.003'}),
    "the library's SimVQ": ('library LIBRARY={"kind":"SimVQ","code_dim":16,"codebook_size":*}', sizes)}


def main():
    own = [word for word in sys.argv[1:] if word.partition("=")[0] in {"-h", "--help", *globals()}]
    others = [word for word in sys.argv[1:] if word not in own]
    read_constants(globals(), own)
    rows = {}
    for line, words in choose_runs():
        arguments = [f"DATASET={DATASET}", *setting.split(), *words.split()]
        runs = [run_and_measure([*arguments, f"SEED={seed}", *others]) for seed in SEEDS]
        figures = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
        if len(runs) > 1:
            figures["psnr_range"] = max(run["psnr"] for run in runs) - min(run["psnr"] for run in runs)
        rows[f"{line}, {figures['token_bits']:.1f} bits"] = figures
        table = measure.format_table(rows, columns, "quantizer")
        with replace_file("outputs/quantizers.md") as draft:
            draft.write_text(f"{table}\n", "utf-8")
    print(f"\n{table}\n\nsee outputs/quantizers.md")
    if QUANTIZER and not any(f"{word.partition('=')[0]}=" in setting for word in others):
        print(f"\n{beside_stored(rows)}")


def choose_runs() -> list[tuple[str, str]]:
    """For each run, its line and its constants of train.py."""
    registered, runs = [name for name in QUANTIZERS if name != "none"], []
    names = QUANTIZER.split(",") if QUANTIZER else registered
    check({*names} <= {*registered}, f"QUANTIZER = {QUANTIZER!r}, allowed: names of {', '.join(registered)}")
    check({*BITS} <= {*sizes}, f"BITS = {BITS}, allowed: 10, 13 and 16")
    for name in names:  # without a line it runs once, or with each of `sizes` as codebook_size
        sized = "codebook_size" in inspect.signature(QUANTIZERS[name]).parameters
        own = (f"{name} CODEBOOK_SIZE=*", sizes) if sized else (name, {BITS[0]: ""})
        chosen = {line: x for line, x in lines.items() if x[0].split()[0] == name} or {name: own}
        for line, (words, values) in chosen.items():
            runs += [(line, f"QUANTIZER={words.replace('*', str(values[bits]))}") for bits in BITS if bits in values]
    return runs


def beside_stored(rows: dict[str, dict]) -> str:
    """RESULTS.md's PSNR at equal bits, and these rows', each in the column of the nearest bits."""
    text = (Path(__file__).parents[1] / "RESULTS.md").read_text("utf-8").split("## Which quantizer at equal bits?")[1]
    psnrs = {}
    for line, *row in re.findall(r"(?m)^\| ([^|]+) \| ([\d.]+) / ([\d.]+) / ([\d.]+) \|", text.split("\n## ")[0]):
        psnrs[line] = dict(zip(sizes, map(float, row)))
    for name, row in rows.items():
        psnrs[f"HERE: {name}"] = {min(sizes, key=lambda bits: abs(bits - row["token_bits"])): row["psnr"]}
    return measure.format_table(psnrs, {f"{bits} bits": (bits, ".2f") for bits in sizes}, "PSNR, RESULTS.md")


def run_and_measure(arguments: list[str]) -> dict[str, float]:
    """Run train.py, unless this run is finished, and measure it, unless its figures are there."""
    with subprocess.Popen([sys.executable, "train.py", *arguments], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
    check(process.returncode == 0, f"train.py {' '.join(arguments)} failed, see above. The same command resumes.")
    run = re.search(r"see outputs.([^/\\]+)", line)[1]
    # the run's name does not depend on the code that measures it
    file = Path("outputs", run, f"compared_{PROBE_IMAGES}_{digest_file(measure.__file__)}.json")
    if not file.exists():
        figures = json.dumps(measure_run(run))  # outside: replace_file takes any OSError for one of writing
        with replace_file(file) as draft:
            draft.write_text(figures)
    return json.loads(file.read_text())


def measure_run(run: str) -> dict[str, float]:
    """A finished run's results, its bits a token, and figures of PROBE_IMAGES images."""
    results = json.loads(Path("outputs", run, "results.json").read_text("utf-8"))
    files = Path("checkpoints", run).glob("*_best.pt")
    model = load_checkpoint(max(files, default=f"checkpoints/{run}/*_best.pt"))  # the last stage's
    size, crop_sizes = (results["constants"][name] for name in ("IMAGE_SIZE", "CROP_SIZES"))
    data = load_dataset(DATASET, size, tuple(crop_sizes))
    parts = {name: part[:PROBE_IMAGES] for name, part in zip(data._fields[:4], data) if part is not None}
    figures = measure.measure(model, data._replace(**parts), measure.load_judges(data.test_images.shape[-1]))
    figures |= {name: figure for name, figure in results.items() if isinstance(figure, float)}
    return figures | dict(token_bits=math.log2(model.quantizer.codebook_size), entropy=math.log2(figures["perplexity"]))


if __name__ == "__main__":
    with one_line_errors():
        main()
