"""bench.py, small, in this process."""
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import bench as module

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bench(monkeypatch):
    """bench(...) runs bench.py with these constants."""
    import train

    for name in ("ENCODER", "IMAGE_SIZE", "GRID", "PRECISION"):  # bench.py sets them
        monkeypatch.setattr(train, name, getattr(train, name))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
        runpy.run_path(str(ROOT / "bench.py"), run_name="__main__")

    return run


def test_bench_prints_its_tables(bench, folder, capsys):
    precision = "bf16" if module.fast_bf16("cpu") else "fp32"
    bench("ROUNDS=1", "BATCHES=1", "BATCH_SIZE=8", "CODEBOOKS=((64, 8),)", "TOKENS=256", "SCALING=(64,)",
          f"SCALING_DATASET={folder}", f"DATASET={folder}")
    printed = capsys.readouterr().out
    for line in ("8 images", "cifar, fp32, stage 1", f"cifar, {precision}, stage 2",
                 "SimVQ 64 x 8, 1 x 256, 100.00% equal", "EMA-VQ 64 x 8, 32 x 8",
                 "encode_to_indices, and encoder: ddcl", "encode_to_indices, and encoder + product: ema_vq",
                 "start to first step", "python train.py: not timed"):
        assert line in printed
    assert re.search(r"^ +64 +[\d.]+ s +\d+ microseconds", printed, re.MULTILINE)
    assert not Path("outputs").exists() and not Path("checkpoints").exists()  # runs that are timed are not kept


def test_an_unknown_benchmark_is_one_line(bench):
    with pytest.raises(SystemExit, match=r"^bench.py: BENCHMARKS = 'search', allowed: some of"):
        bench("BENCHMARKS=search")
    with pytest.raises(SystemExit, match=r"^bench.py: ROUNDS = 0, allowed: 1 or more"):
        bench("ROUNDS=0", "BENCHMARKS=()")
    with pytest.raises(SystemExit, match=r"^bench.py: TOKENS = 1000, allowed: a multiple of 32"):
        bench("TOKENS=1000", "BENCHMARKS=()")
    with pytest.raises(SystemExit, match=r"^bench.py: DATASET = 'nowhere', allowed: .*a folder"):
        bench("DATASET=nowhere", "BENCHMARKS=('race',)")
    with pytest.raises(SystemExit, match=r"^bench.py: CODEBOOKS = \(1024, 64\), allowed: pairs, as"):
        bench("CODEBOOKS=(1024, 64)", "BENCHMARKS=()")
    with pytest.raises(SystemExit, match=r"^bench.py: SCALING = 5000, allowed: numbers"):
        bench("SCALING=5000", "BENCHMARKS=()")
    with pytest.raises(SystemExit, match=r"^bench.py: GOALS = 26, allowed: numbers"):
        bench("GOALS=26", "BENCHMARKS=()")
    with pytest.raises(SystemExit, match=r"^bench.py: RACE_SEEDS = 0, allowed: 1 or more"):
        bench("RACE_SEEDS=0", "BENCHMARKS=()")
    for wrong in ("BENCHMARKS=()", "DATASET=5", "SCALING_DATASET=None"):
        with pytest.raises(SystemExit, match=f"^bench.py: {wrong.split('=')[0]} = "):
            bench(wrong)
    with pytest.raises(SystemExit, match=r"^bench.py: BENCHMARKS = \(\[1\],\), allowed: some of"):
        bench("BENCHMARKS=([1],)")
    with pytest.raises(SystemExit, match=r"^bench.py: argument = 'ROUND=1', allowed: .*ROUNDS"):
        bench("ROUND=1")


def test_a_run_that_fails_is_one_line(bench, folder, capsys):
    with pytest.raises(SystemExit, match="^1$"):
        bench("BENCHMARKS=('scaling',)", "SCALING=(1,)", f"SCALING_DATASET={folder}")
    assert capsys.readouterr().out.endswith("\nscaling: train.py: EPOCH_IMAGES = 1, allowed: None, or at least "
                                            "BATCH_SIZE = 32\n")


def test_a_goal_of_the_race_is_of_the_shortest_runs_that_reach_it(monkeypatch, folder, capsys):
    results = {("ours", 10): [(1, 20), (9, 26.5), (2, 26.0)], ("ours", 20): [(4, 27), (5, 26.9), (6, 28.1)],
               ("ours", 30): [(7, 28), (7, 28), (7, 28)], ("slow", 10): [(901, 20.0)] * 3}
    names = {"ours": "ours", "slow": None}
    monkeypatch.setattr(module, "RACE", names)
    monkeypatch.setattr(module, "RACE_IMAGES", (10, 20, 30, 40))
    monkeypatch.setattr(module, "DATASET", str(folder))
    monkeypatch.setattr(module, "race_once", lambda constants, images, seed: results[constants or "slow", images][seed])
    module.race()
    rows = [line.split() for line in capsys.readouterr().out.strip().splitlines()[1:]]
    assert rows == [["ours", "10", "2.0", "26.00", "26", "dB"], ["ours", "20", "5.0", "27.00", "27", "dB"],
                    ["ours", "30", "7.0", "28.00", "28", "dB"], ["slow", "10", "901.0", "20.00"]]


def test_runs_of_the_race(monkeypatch, folder, tmp_path, capsys):
    monkeypatch.setattr(module, "DATASET", str(folder))
    taken, psnr = module.race_once(f"{module.RACE['CNN from scratch, FSQ, 16 tokens']} BATCH_SIZE=32", 32, 0)
    assert 1 < taken < 600 and 5 < psnr < 30 and [path.name for path in tmp_path.iterdir()] == ["data"]
    module.ordinary_loop(str(folder), "64", "0")
    assert 5 < float(capsys.readouterr().out.removeprefix("PSNR")) < 30


def test_the_library_of_the_race_is_a_quantizer():
    quantizer = module.LibraryVQ(16, 32, 8, tokens=64).train()
    z = torch.randn(4, 16, 4, 4, requires_grad=True)
    z_q, loss, _ = quantizer(z)
    (z_q.sum() + loss).backward()
    assert loss.ndim == 0 and loss > 0 and z.grad.abs().sum() > 0
    z_q, _, indices = quantizer.eval()(z)
    assert torch.equal(z_q, quantizer.indices_to_codes(indices)) and len(indices.unique()) > 8
