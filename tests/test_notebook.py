"""explore.ipynb, from top to bottom, as a newcomer would run it.

    python tests/test_notebook.py cifar10-jpeg      executes it and keeps the outputs, of images from this dataset
"""
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]


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


def test_notebook_runs(folder, tmp_path, monkeypatch):
    stored = nbformat.read(ROOT / "explore.ipynb", as_version=4).cells
    outputs = [cell.outputs for cell in stored if cell.cell_type == "code"]
    assert all(outputs)  # a reader on the web sees what comes out
    assert all(output.get("name") != "stderr" for cell in outputs for output in cell)  # warnings name paths
    pictures = re.findall(r"!\[[^]]*]\(([^)]+)\)", "\n".join(cell.source for cell in stored))
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    _, code = execute(folder, tmp_path)  # no download, and few images
    assert "folder-tiny, " in "".join(output.get("text", "") for output in code[0].outputs)
    kinds = [kind for cell in code for output in cell.outputs for kind in output.get("data", {})]
    assert kinds.count("image/png") >= 8 and kinds.count("image/jpeg") >= 5


if __name__ == "__main__":
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}  # no progress bars in outputs
    executed, _ = execute(sys.argv[1], ROOT)
    nbformat.write(executed, ROOT / "explore.ipynb")
