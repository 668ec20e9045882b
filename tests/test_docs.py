"""What the texts and explore.ipynb show runs as printed.

    python tests/test_docs.py cifar10-jpeg      executes the notebook on images of this dataset, and keeps its outputs
"""
import os
import re
import sys

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

from quantizers import QUANTIZERS

TEXTS = {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "RESULTS.md", "docs/SETTINGS.md")}


def execute(dataset, folder):
    """The notebook, executed in `folder` on images from `dataset`."""
    notebook = nbformat.read(ROOT / "explore.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    source = cell.source
    assert '"auto"' in source
    cell.source = source.replace('"auto"', repr(str(dataset)))
    NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": folder}}).execute()
    cell.source = source
    return notebook


def test_the_notebook_runs_and_shows_what_comes_out(folder, tmp_path):
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    stored = nbformat.read(ROOT / "explore.ipynb", as_version=4)
    for notebook in (stored, execute(folder, tmp_path)):
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert {kind for output in outputs for kind in output.get("data", {})} >= {"image/png", "image/jpeg"}
        assert notebook is not stored or all(output.get("name") != "stderr" for output in outputs)  # these name paths


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", "".join(TEXTS.values()), re.DOTALL))
def test_a_python_block_runs(block, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "sign", None)  # so that README's class is gone after the test
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    for psnr in re.findall(r"# ([\d.]+) dB", block):
        printed = re.search(r"[\d.]+", capsys.readouterr().out)[0]
        assert f"{float(printed):.1f}" == psnr


def test_train_takes_readmes_quantizer(main, monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "sign", None)
    block, = (x for x in re.findall(r"```python\n(.*?)```", TEXTS["README.md"], re.DOTALL) if "class Sign" in x)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert (main("QUANTIZER=sign") / "results.json").exists()


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
    nbformat.write(execute(sys.argv[1], ROOT), ROOT / "explore.ipynb")
