"""explore.ipynb, from top to bottom, as a newcomer would run it."""
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]


def test_notebook_runs(folder, tmp_path, monkeypatch):
    notebook = nbformat.read(ROOT / "explore.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code)  # a reader on the web sees what comes out
    assert all(output.get("name") != "stderr" for cell in code for output in cell.outputs)  # warnings name paths
    code[0].source = code[0].source.replace('"auto"', repr(str(folder)))  # no download, and few images
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    assert "folder-tiny, fsq" in "".join(output.get("text", "") for output in code[0].outputs)
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) >= 8
