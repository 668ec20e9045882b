"""What the texts and the notebooks show runs as printed.

    python tests/test_docs.py                   executes lesson.ipynb, and keeps its outputs
    python tests/test_docs.py cifar10-jpeg      executes explore.ipynb on images of this dataset, and keeps its outputs
"""
import os
import re
import shlex
import sys

import nbformat
import pytest
import torch
from conftest import ROOT, SEED
from nbclient import NotebookClient

import train

TEXTS = {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "RESULTS.md", "docs/SETTINGS.md")}
LESSON = "\nSEED = 0\nQUICK = False"


def execute(name, folder, old, new):
    """Run a notebook in `folder`, with `new` in place of `old` meanwhile."""
    notebook = nbformat.read(ROOT / name, as_version=4)
    cell = next(cell for cell in notebook.cells if old in cell.source)
    source, cell.source = cell.source, cell.source.replace(old, new)
    NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": folder}}).execute()
    cell.source = source
    return notebook


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_lesson_runs(quick):
    execute("lesson.ipynb", ROOT, LESSON, f"\nSEED = {SEED}\nQUICK = {quick}")


def test_the_notebook_runs_and_shows_what_comes_out(folder, tmp_path):
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    stored = nbformat.read(ROOT / "explore.ipynb", as_version=4)
    for notebook in (stored, execute("explore.ipynb", tmp_path, '"auto"', repr(str(folder)))):
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert {kind for output in outputs for kind in output.get("data", {})} >= {"image/png", "image/jpeg"}


def test_notebooks_are_stored_as_they_ran_and_are_small():
    for name in ("explore.ipynb", "lesson.ipynb"):
        cells = [x for x in nbformat.read(ROOT / name, as_version=4).cells if x.cell_type == "code"]
        assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
        assert all(output.get("name") != "stderr" for cell in cells for output in cell.outputs)
    lines = [sum(bool(line.strip()) for line in cell.source.split("\n")) for cell in cells]
    assert max(lines) <= 20 and sum(lines) <= 260 and (ROOT / name).stat().st_size <= 700_000


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", "".join(TEXTS.values()), re.DOTALL))
def test_a_python_block_runs(block, tmp_path, capsys, monkeypatch, main):
    monkeypatch.setitem(train.QUANTIZERS, "sign", None)  # so that README's class is gone after the test
    (tmp_path / "checkpoints/pretrained").parent.mkdir()
    (tmp_path / "checkpoints/pretrained").symlink_to(ROOT / "checkpoints/pretrained")
    exec(block.replace('open("', f'open("{ROOT.as_posix()}/'), {"__name__": ""})
    for psnr in re.findall(r"# ([\d.]+) dB", block):
        assert f"{float(capsys.readouterr().out):.1f}" == psnr
    assert "class Sign" not in block or (main("QUANTIZER=sign") / "results.json").exists()


@pytest.mark.parametrize("name", [*TEXTS, "docs/NOTES.md", "explore.ipynb", "lesson.ipynb"])
def test_links_lead_to_files_and_headings(name):
    for link, heading in re.findall(r"]\(([^)#:]*)#?([\w-]*)\)", (ROOT / name).read_text("utf-8")):
        target = (ROOT / name).parent / link if link else ROOT / name
        titles = re.findall("^#+ (.*)", target.read_text("utf-8"), re.MULTILINE) if heading else [""]
        assert target.exists() and heading in [re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in titles]


def test_commands_name_constants_and_quantizers_that_exist():
    text = "\n".join(TEXTS.values()).replace("\\\n", " ")
    for script, arguments in re.findall(r"(train\.py|-m extras\.\w+)([^`#\n]*)", text):
        files = [script if script == "train.py" else script[3:].replace(".", "/") + ".py"]
        files += ["train.py"] * (script == "-m extras.compare")  # which passes them on
        known = "".join((ROOT / file).read_text("utf-8") for file in files)
        for constant, value in re.findall(r"\b([A-Z][A-Z_]+)=(\$?\w*)", arguments):
            assert re.search(rf"^{constant} = ", known, re.MULTILINE), f"{script} {constant}"
            assert constant != "QUANTIZER" or value in {*train.QUANTIZERS, "sign", "$QUANTIZER"}, value


def test_texts_state_how_large_files_and_models_are(change):
    for links, count in re.findall(r"((?:\[\w+\.py\]\(\w+\.py\)[, ]*)+|extras/ )\((\d+)", TEXTS["README.md"]):
        files = [ROOT / file for file in re.findall(r"\((\w+\.py)", links)] or (ROOT / "extras").glob("*.py")
        assert abs(sum(file.read_text("utf-8").count("\n") for file in files) - int(count)) <= 15, links
    text = TEXTS["docs/SETTINGS.md"].replace("\\\n", " ").replace("$QUANTIZER", "fsq")
    text = text.replace("$XL", re.search('^XL="(.*?)"', text, re.MULTILINE)[1])
    constants = {name: value for name, value in vars(train).items() if name.isupper()}
    constants["VQRAE"] = lambda build=train.VQRAE, **options: build(**options | {"pretrained": False})
    for count, arguments in re.findall(r"(\d+) M parameters.*?train\.py ([^`\n]*)", text, re.DOTALL):
        change(train, **constants)
        train.utils.read_constants(vars(train), shlex.split(arguments))
        with torch.device("meta"):
            assert round(sum(p.numel() for p in train.build_model().parameters()) / 1e6) == int(count), arguments


if __name__ == "__main__":
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}  # no progress bars in outputs
    name, old = ("explore.ipynb", '"auto"') if sys.argv[1:] else ("lesson.ipynb", LESSON)
    nbformat.write(execute(name, ROOT, old, repr(sys.argv[1]) if sys.argv[1:] else old), ROOT / name)
