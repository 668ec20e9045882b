"""lesson.ipynb runs, checks what it says, and stays small. `python tests/test_lesson.py` stores its outputs."""
import os

import nbformat
import pytest
from conftest import ROOT, SEED
from nbclient import NotebookClient

LESSON = ROOT / "lesson.ipynb"


def execute(seed=0, quick=False):
    notebook = nbformat.read(LESSON, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    source, constants = first.source, "\nSEED = 0\nQUICK = False"
    assert constants in source
    first.source = source.replace(constants, f"\nSEED = {seed}\nQUICK = {quick}")
    NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": ROOT}}).execute()
    first.source = source
    return notebook


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_lesson_runs(quick):
    execute(SEED, quick)


def test_the_lesson_is_small_and_stored_as_it_ran():
    cells = [cell for cell in nbformat.read(LESSON, as_version=4).cells if cell.cell_type == "code"]
    lines = [sum(bool(line.strip()) for line in cell.source.split("\n")) for cell in cells]
    assert max(lines) <= 20 and sum(lines) <= 260 and LESSON.stat().st_size <= 700_000
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert all(output.get("name") != "stderr" for cell in cells for output in cell.outputs)  # it would name paths


if __name__ == "__main__":
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}  # no progress bars in outputs
    nbformat.write(execute(), LESSON)
