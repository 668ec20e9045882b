import os
import sys
from pathlib import Path

import pytest
from PIL import Image

ENVIRONMENT = dict(os.environ)  # what test_gpu.py starts its processes with
# results are compared bit for bit and between processes: on a CPU; set before any test imports torch
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(autouse=True)
def reproducible(tmp_path, monkeypatch):
    """Each test starts with the same random state, in an empty folder, and without optimization.prepare_cpu."""
    import torch

    torch.manual_seed(0)
    torch.set_flush_denormal(False)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small folder of drawn images: 2 classes, 90 training and 38 test images."""
    from utils import draw_shapes

    path = tmp_path_factory.mktemp("images") / "tiny"
    data = draw_shapes(32, train=480, test=160)
    splits = {"train": (data.train_images, data.train_labels), "test": (data.test_images, data.test_labels)}
    for split, (images, labels) in splits.items():
        for label in (3, 6):
            (path / split / data.classes[label]).mkdir(parents=True)
            for i in (labels == label).nonzero()[:, 0].tolist():
                image = Image.fromarray(images[i].permute(1, 2, 0).numpy())
                image.save(path / split / data.classes[label] / f"{i}.png")
    return path
