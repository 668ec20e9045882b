"""compare.py on small models and images."""
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import compare
from models import VQRAE
from utils import save_checkpoint, write_file


@pytest.fixture
def run(folder, monkeypatch):
    """run(lines, *arguments) runs compare.py on these LINES, with a schedule of seconds."""
    monkeypatch.setattr(compare, "BITS", compare.BITS)
    monkeypatch.setattr(compare, "TRAIN_IMAGES", compare.TRAIN_IMAGES)

    def run(lines, *arguments):
        monkeypatch.setattr(compare, "LINES", lines)
        schedule = ["EPOCH_IMAGES=32", "EPOCHS=(1, 1)", "STAGES=(1,)", "EVAL_IMAGES=1", "KEEP_CHECKPOINTS=0",
                    "DECODER_WIDTH=64", "DECODER_DEPTH=1", "ADAPTER_DEPTH=0", "FEATURE_CACHE_GB=0"]
        monkeypatch.setattr(sys, "argv", ["compare.py", *arguments, f"DATASET={folder}", *schedule])
        compare.main()

    return run


FSQ = {"FSQ": ("QUANTIZER=fsq FSQ_LEVELS={}", {6: (8, 8), 7: (16, 8)})}
EMA_VQ = {"EMA-VQ": ("QUANTIZER=ema_vq EMA_CODE_DIM=8 EMA_CODEBOOK_SIZE={}", {6: 64})}


def test_the_table_and_figure_grow_and_finished_runs_are_kept(run, folder, capfd, monkeypatch):
    drawn, trained, measured, measure = [], [], [], compare.measure

    def second_run(arguments):  # the first is kept; another is as if it were trained
        trained.append(" ".join(arguments[-3:]))
        if "QUANTIZER=fsq" in arguments:
            return first.parent.name
        model = VQRAE("cifar", "ema_vq", {"codebook_size": 64, "code_dim": 8}, decoder_width=64, adapter_depth=0)
        constants = {"DATASET": str(folder), "PREDICT_WEIGHT": 0.1}
        save_checkpoint(Path("checkpoints/new/ema_vq_stage1_best.pt"), model, constants=constants,
                        metrics={"images_per_second": 50.0})
        write_file(Path("outputs/new/results.json"), b'{"stage": 1}')
        write_file(Path("outputs/new/constants.json"), (first.parent / "constants.json").read_bytes())
        return "new"

    monkeypatch.setattr(compare, "save_figure", lambda path, figure: drawn.append(figure))
    monkeypatch.setattr(compare, "measure", lambda path, *rest: measured.append(path) or measure(path, *rest))
    run(FSQ, "BITS=(6,)")
    first, = Path("outputs").glob("*/results.json")
    monkeypatch.setattr(compare, "train", second_run)
    run(FSQ | EMA_VQ, "BITS=(6,)")
    assert trained == ["FEATURE_CACHE_GB=0 QUANTIZER=fsq FSQ_LEVELS=(8, 8)",
                       "QUANTIZER=ema_vq EMA_CODE_DIM=8 EMA_CODEBOOK_SIZE=64"]
    assert len(measured) == 2 and len(drawn) == 3
    monkeypatch.setattr(compare, "TRAIN_IMAGES", 40)  # other probes: not those of before
    compare.measure_run("new")
    compare.measure_run("new")
    assert len(measured) == 3
    monkeypatch.setattr(compare, "TRAIN_IMAGES", 30)
    described = Path("outputs/new/constants.json")
    digest = json.loads(described.read_text())["DATASET"][0][-1]
    described.write_text(described.read_text().replace(digest, "0" * 12))
    with pytest.raises(ValueError, match="^DATASET = .*allowed: the images of new$"):
        compare.measure_run("new")
    Path("checkpoints/new/ema_vq_stage1_best.pt").unlink()
    with pytest.raises(ValueError, match="^checkpoint of stage 1 = 'new', .*delete outputs/new to train anew$"):
        compare.measure_run("new")

    table = Path("outputs", "quantizers.md").read_text()
    assert table in capfd.readouterr().out
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
            for cells in (line.split("|") for line in table.splitlines()[2:])}
    assert list(rows) == ["FSQ: (8, 8)", "EMA-VQ: 64"]
    bits, psnr, ssim, *probes, perplexity, usage, memory, speed = rows["FSQ: (8, 8)"]
    results = json.loads(first.read_text())  # of train.py itself
    for printed, value, digits in ((psnr, results["psnr"], 2), (ssim, results["ssim"], 4),
                                   (perplexity, results["perplexity"], 0)):
        assert float(printed) == pytest.approx(value, abs=1.1 * 10**-digits)
    assert bits == "6.0" and float(speed) > 0 and all(0 < float(probe.rstrip("%")) <= 100 for probe in probes)
    # two linear layers, and FSQ's list of codes, or 64 codes of 8 numbers with their averages
    assert memory == "0.01 MB" and rows["EMA-VQ: 64"][-2:] == ["0.02 MB", "50"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn[-1].axes[0].lines}
    assert lines["FSQ"] == [[6, pytest.approx(float(psnr), abs=0.01)]]
    assert lines["EMA-VQ"] == [[6, pytest.approx(float(rows["EMA-VQ: 64"][1]), abs=0.01)]]


def test_every_size_is_of_about_its_bits(monkeypatch):
    import train

    constants = {name: value for name, value in vars(train).items() if name.isupper()}
    for name, value in constants.items():
        monkeypatch.setattr(train, name, value)
    for line, (arguments, values) in compare.LINES.items():
        for bits, value in values.items():
            vars(train).update(constants)
            of_row = [argument.format(value) for argument in arguments.split()]
            train.utils.read_constants(vars(train), [*of_row, "DECODER_WIDTH=64", "ADAPTER_DEPTH=0"])
            train.check_constants()
            model = train.build_model(pretrained=False)
            assert math.log2(model.quantizer.codebook_size) == pytest.approx(bits, abs=0.8 if line == "DDCL" else 0.1)


def test_wrong_sizes_and_a_run_that_fails_are_one_line(run, tmp_path, monkeypatch):
    for bits in ("BITS=(8,)", "BITS=16", "BITS=()", "BITS=([6],)"):
        with pytest.raises(SystemExit, match=r"^compare.py: BITS = .*, allowed: some of \[6, 7\]"):
            run(FSQ, bits)
    for several in ("DATASET='a','b'", "DATASET=('a',)", "IMAGE_SIZE=32,64", "IMAGE_SIZE=[32]"):
        with pytest.raises(SystemExit, match="^compare.py: argument = .*, allowed: one dataset and size"):
            run(FSQ, "BITS=(6,)", several)
    (tmp_path / "train.py").write_text("raise SystemExit('train.py: no')")
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="^compare.py: this run failed"):
        run(FSQ, "BITS=(6,)")
    with pytest.raises(SystemExit, match="^compare.py: TRAIN_IMAGES = 1, allowed: 2 or more"):
        run(FSQ, "BITS=(6,)", "TRAIN_IMAGES=1")
    monkeypatch.setattr(sys, "argv", ["compare.py", "BITS=(16,)"])
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: open("outputs/figures.json"))
    with pytest.raises(SystemExit, match="^compare.py: .*figures.json"):
        runpy.run_path(compare.__file__, run_name="__main__")
