"""On a GPU, if there is one, in processes of their own: all other tests hide it."""
import json
import re
import shutil

import pytest
from conftest import ENVIRONMENT, ROOT, SMALL, run_script

pytestmark = pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no GPU")


@pytest.mark.parametrize("options", [
    "fsq", "simvq_matched", "ema_vq", "ddcl", "residual_vq", "ema_vq COMPILE=reduce-overhead ACCUMULATE=2"])
def test_both_stages_and_their_measurement(options, folder, tmp_path):
    """A run with a GAN and mirrored images ends; extras.measure finds what the run measured."""
    arguments = [f"DATASET={folder}", *SMALL, "EPOCHS=(2, 1)", "GAN_WEIGHT=0.1", "FLIP=True",
                 *f"QUANTIZER={options}".split()]
    done = run_script(tmp_path, "train.py", *arguments, environment=ENVIRONMENT)
    assert done.returncode == 0 and "1 x cuda" in done.stdout, done.stderr
    results, = (tmp_path / "outputs").glob("*/results.json")
    best, = (tmp_path / "checkpoints").glob("*/*_stage2_best.pt")
    printed = run_script(tmp_path, "extras.measure", best, f"DATASET={folder}", environment=ENVIRONMENT).stdout
    row = re.search(r"stage2_best.pt +\| +([\d.]+)", printed)
    assert float(row[1]) == pytest.approx(json.loads(results.read_text())["psnr"], abs=0.02)  # TF32 rounds


STEP = """
import sys, torch, train, utils
from muon import take_step
utils.read_constants(vars(train), sys.argv[1:])
model, images = train.build_model().cuda().train(), torch.rand(8, 3, 32, 32).cuda()
teacher, _ = train.build_loss_networks(model)
for stage in (1, 2):
    optimizers = train.build_optimizers(model.set_stage(stage), stage)
    for mode in ("default", "error"):  # the first step makes the optimizers' state
        torch.cuda.set_sync_debug_mode(mode)
        frozen = model.encoder if stage == 1 else teacher
        train.add_gradients(model, images, frozen, frozen, None)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        take_step(optimizers, 0, 10)
        model.zero_grad()
    torch.cuda.set_sync_debug_mode("default")
"""


@pytest.mark.parametrize("options", ["fsq", "simvq", "simvq_matched", "ema_vq", "ddcl", "residual_vq CODEBOOKS=3"])
def test_a_step_never_waits_for_the_gpu(options, tmp_path):
    (tmp_path / "step.py").write_text(STEP)
    arguments = f"CODEBOOK_SIZE=256 QUANTIZER={options}".split()
    done = run_script(tmp_path, tmp_path / "step.py", *arguments, environment=ENVIRONMENT | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
