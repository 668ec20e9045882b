"""What the texts and explore.ipynb show runs as printed.

    python tests/test_docs.py cifar10-jpeg      executes the notebook on images of this dataset, and keeps its outputs
"""
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

from quantizers import QUANTIZERS

TEXTS = {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "RESULTS.md", "docs/SETTINGS.md")}


def execute(dataset: str, folder: Path) -> tuple[nbformat.NotebookNode, list]:
    """The notebook, executed in `folder` on images from `dataset`, and its code cells."""
    notebook = nbformat.read(ROOT / "explore.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    source = code[0].source
    code[0].source = source.replace('"auto"', repr(str(dataset)))
    assert code[0].source != source
    NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": folder}}).execute()
    code[0].source = source
    return notebook, code


def test_the_notebook_runs(folder, tmp_path):
    stored = nbformat.read(ROOT / "explore.ipynb", as_version=4).cells
    outputs = [cell.outputs for cell in stored if cell.cell_type == "code"]
    assert all(outputs)  # a reader on the web sees what comes out
    assert all(output.get("name") != "stderr" for cell in outputs for output in cell)  # warnings name paths
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    _, code = execute(folder, tmp_path)  # no download, and few images
    kinds = [kind for cell in code for output in cell.outputs for kind in output.get("data", {})]
    assert "image/png" in kinds and "image/jpeg" in kinds


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", "".join(TEXTS.values()), re.DOTALL))
def test_a_python_block_runs(block, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "sign", None)  # so that README's class is gone after the test
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    for psnr in re.findall(r"# ([\d.]+) dB", block):
        printed = re.search(r"[\d.]+", capsys.readouterr().out)[0]
        assert f"{float(printed):.1f}" == psnr


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md", "docs/SETTINGS.md", "docs/NOTES.md", "explore.ipynb"])
def test_links_lead_to_files(name):
    for link in re.findall(r"]\(([^)#:]+)(?:#[\w-]*)?\)", (ROOT / name).read_text()):
        assert (ROOT / name).parent.joinpath(link).exists(), link


@pytest.mark.parametrize("name", TEXTS)
def test_commands_name_constants_and_quantizers_that_exist(name):
    """Each NAME=value of a command is a constant of its script."""
    text = TEXTS[name].replace("\\\n", " ")
    for script, arguments in re.findall(r"(train\.py|-m extras\.\w+)([^`#\n]*)", text):
        file = ROOT / (script if script.endswith(".py") else script[3:].replace(".", "/") + ".py")
        known = file.read_text("utf-8")
        if script == "-m extras.compare":  # which passes them on
            known += (ROOT / "train.py").read_text("utf-8")
        for constant, value in re.findall(r"\b([A-Z][A-Z_]+)=(\w*)", arguments):
            assert re.search(rf"^{constant} = ", known, re.MULTILINE), f"{script} {constant}"
            assert constant != "QUANTIZER" or value in QUANTIZERS, value


if __name__ == "__main__":
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}  # no progress bars in outputs
    executed, _ = execute(sys.argv[1], ROOT)
    nbformat.write(executed, ROOT / "explore.ipynb")
