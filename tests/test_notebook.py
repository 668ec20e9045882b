"""explore.ipynb, from top to bottom, as a newcomer would run it."""
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]


def test_notebook_runs():
    notebook = nbformat.read(ROOT / "explore.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code[1:])  # a reader on the web sees what comes out
    code[0].source = code[0].source.replace('"auto"', '"shapes"')  # no network asked, and nothing left in data/
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": ROOT}}).execute()
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) >= 8
