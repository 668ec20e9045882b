import os
import sys
from pathlib import Path

ENVIRONMENT = dict(os.environ)  # as test_gpu.py has it
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: what is compared bit for bit, or between processes, is so on a CPU

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(autouse=True)
def alike(tmp_path, monkeypatch):
    """Each test starts with the same random state, in an empty folder."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small folder of drawn images: 2 classes, 96 to train on and 32 to test on."""
    from utils import draw_shapes

    path = tmp_path_factory.mktemp("images") / "tiny"
    data = draw_shapes(32, train=480, test=160)
    for split, images, labels in (("train", data.train_images, data.train_labels), ("test", data.test_images, data.test_labels)):
        for label in (3, 6):
            (path / split / data.classes[label]).mkdir(parents=True)
            for i in torch.nonzero(labels == label)[:, 0].tolist():
                Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(path / split / data.classes[label] / f"{i}.png")
    return path
