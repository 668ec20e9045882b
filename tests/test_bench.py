"""bench.py, small, in this process."""
import re
import runpy
import sys
from pathlib import Path

import pytest

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
    bench("ROUNDS=1", "BATCHES=1", "BATCH_SIZE=8", "CODEBOOKS=((64, 8),)", "TOKENS=256", "SCALING=(64,)",
          f"SCALING_DATASET={folder}", f"DATASET={folder}")
    printed = capsys.readouterr().out
    for line in ("8 images", "cifar, fp32, stage 1", "cifar, bf16, stage 2", "SimVQ 64 x 8, 1 x 256, 100.00% equal",
                 "EMA-VQ 64 x 8, 32 x 8", "encode_to_indices, and encoder: ddcl",
                 "encode_to_indices, and encoder + product: ema_vq", "start to first step",
                 "python train.py: not timed"):
        assert line in printed
    assert re.search(r"^ +64 +[\d.]+ s +\d+ microseconds", printed, re.MULTILINE)


def test_an_unknown_benchmark_is_one_line(bench):
    with pytest.raises(SystemExit, match=r"^bench.py: BENCHMARKS = 'search', allowed: some of"):
        bench("BENCHMARKS=search")
    with pytest.raises(SystemExit, match=r"^bench.py: ROUNDS = 0, allowed: 1 or more"):
        bench("ROUNDS=0", "BENCHMARKS=()")
    with pytest.raises(SystemExit, match=r"^bench.py: argument = 'ROUND=1', allowed: .*ROUNDS"):
        bench("ROUND=1")
