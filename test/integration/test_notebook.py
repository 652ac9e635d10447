"""docs/first_detector.ipynb is stored without results, and all of it runs in a real Jupyter kernel."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

REPO = Path(__file__).resolve().parents[2]
NOTEBOOK = REPO / "docs" / "first_detector.ipynb"

# Put behind the cell of settings: the same way on little data, with a head that is not trained yet.
SMALLER = """
EPOCHS = 1
MADE = {"num_train": 12, "num_val": 4}
SETTINGS = {"image_size": [64, 64], "batch_size": 4, "workers": 0, "device": "cpu", "max_steps": 2}
"""
# Put behind the last cell. Without a threshold, as so short a training finds nothing that reaches one.
MEASURE = """
def values(found):
    return {"names": found.names, "scores": found.scores.tolist(), "boxes": found.boxes_xyxy.tolist()}

print(json.dumps({
    "folder": str(run.folder),
    "AP": run.metrics["run"]["best_AP"],
    "torch": [values(found) for found in effdet.load(run.checkpoint, device="cpu").predict(IMAGES)],
    "onnx": [values(found) for found in effdet.load("model.onnx").predict(IMAGES)],
    "shown": [best.path, len(rows), sum(map(len, results))],
}))
"""


def cells_of(kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def test_it_is_stored_without_results():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells_of("code"))
    links = [text for cell in cells_of("markdown") for line in cell["source"] for text in line.split("](")[1:]]
    pages = [text.partition(")")[0] for text in links]
    assert pages and all((NOTEBOOK.parent / page).is_file() for page in pages)


@pytest.mark.slow
def test_it_runs_from_data_to_onnx(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for name in ("onnx", "onnxruntime"):
        pytest.importorskip(name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    (settings,) = [at for at, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    notebook.cells.insert(settings + 1, nbformat.v4.new_code_cell(SMALLER))
    notebook.cells.append(nbformat.v4.new_code_cell(MEASURE))
    work = tmp_path / "work"
    work.mkdir()
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(work)}}).execute()

    by_id = {cell.id: cell.get("outputs", []) for cell in notebook.cells}
    printed = {
        name: "".join(output.text for output in outputs if output.output_type == "stream")
        for name, outputs in by_id.items()
    }
    codes = [name for name, text in printed.items() if "\x1b" in text or "\b" in text]
    assert not codes, f"what only a terminal understands: {codes}"
    for name in ("metrics", "predict"):
        assert any("image/png" in output.get("data", {}) for output in by_id[name]), name
    for name in ("train", "validate"):
        assert "AP" in printed[name] and "12" in printed["data"], name

    seen = json.loads(printed[notebook.cells[-1].id].splitlines()[-1])
    assert math.isfinite(seen["AP"]) and 0 <= seen["AP"] <= 1
    validated = json.loads((work / "validated" / "metrics.json").read_text())
    assert validated["stats"]["AP"] == pytest.approx(seen["AP"], abs=1e-6)
    path, rows, found = seen["shown"]
    assert rows == found == len(json.loads((work / "found.json").read_text()))
    with Image.open(work / "found.jpg") as drawn, Image.open(work / path) as source:
        assert drawn.size == source.size and drawn.format == "JPEG"
    assert len(seen["torch"]) == len(seen["onnx"]) == 4 and all(one["scores"] for one in seen["torch"])
    for one, other in zip(seen["torch"], seen["onnx"], strict=True):
        assert one["names"] == other["names"]
        np.testing.assert_allclose(one["scores"], other["scores"], atol=1e-5)
        np.testing.assert_allclose(one["boxes"], other["boxes"], atol=1e-2)
