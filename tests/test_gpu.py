"""On a GPU, if there is one, in processes of their own: all other tests hide it."""
import json
import re
import shutil

import pytest
from conftest import ENVIRONMENT, SMALL, run_script

pytestmark = pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no GPU")


@pytest.mark.parametrize("quantizer", ["fsq", "simvq", "ema_vq", "ddcl"])
def test_both_stages_and_their_measurement(quantizer, folder, tmp_path):
    """A run with a GAN and mirrored images ends; evaluate.py measures what the run measured."""
    arguments = [f"DATASET={folder}", f"QUANTIZER={quantizer}", *SMALL, "EPOCHS=(2, 1)", "GAN_WEIGHT=0.1", "FLIP=True"]
    done = run_script(tmp_path, "train.py", *arguments, environment=ENVIRONMENT)
    assert done.returncode == 0 and "1 x cuda" in done.stdout, done.stderr
    results, = (tmp_path / "outputs").glob("*/results.json")
    best, = (tmp_path / "checkpoints").glob("*/*_stage2_best.pt")
    printed = run_script(tmp_path, "evaluate.py", best, f"DATASET={folder}", environment=ENVIRONMENT).stdout
    row = re.search(r"stage2_best.pt +\| +([\d.]+)", printed)
    assert float(row[1]) == pytest.approx(json.loads(results.read_text())["psnr"], abs=0.02)  # TF32 rounds
