"""On a GPU, if there is one, in processes of their own: all other tests hide it."""
import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no GPU")


@pytest.mark.parametrize("quantizer", ["fsq", "simvq", "ema_vq", "ddcl"])
def test_both_stages_and_their_measurement(quantizer, folder, tmp_path):
    def script(name, *arguments):
        command = [sys.executable, ROOT / name, *arguments]
        done = subprocess.run(command, cwd=place, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    psnr = []
    for gigabytes in (0, 8):  # images on the host, and on the device: the same run, in two places
        place = tmp_path / str(gigabytes)
        place.mkdir()
        arguments = [f"DATASET={folder}", f"QUANTIZER={quantizer}", "EPOCHS=(2, 1)", "BATCH_SIZE=32", "GAN_WEIGHT=0.1",
                     "FLIP=True", "EPOCH_IMAGES=None", f"IMAGES_GB={gigabytes}"]
        assert "1 x cuda" in script("train.py", *arguments)
        assert "this run is finished" in script("train.py", *arguments)
        newest, = (place / "outputs").iterdir()
        rows = list(csv.DictReader(open(newest / "metrics.csv")))
        assert len(rows) == 3
        psnr.append(float(rows[-1]["psnr"]))
        best = place / "checkpoints" / newest.name / f"{quantizer}_stage2_best.pt"
        measured = json.loads((newest / "results.json").read_text())["psnr"]
        printed = script("evaluate.py", best, f"DATASET={folder}", "BATCH_SIZE=16")
        row = re.search(rf"cifar {quantizer}, stage 2 +\| +([\d.]+)", printed)
        assert float(row[1]) == pytest.approx(measured, abs=0.02)  # train.py's convolutions round to TF32
    assert psnr[0] == pytest.approx(psnr[1], abs=0.5)
