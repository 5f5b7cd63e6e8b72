"""The quickstart notebook runs, and shows the report and a chart."""

import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs/quickstart.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # committed without
    started = time.perf_counter()
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    print(f"{time.perf_counter() - started:.0f} s")
    nbformat.write(notebook, tmp_path / "executed.ipynb")
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("iframe" in data.get("text/html", "") and "chart-influence" in data["text/html"] for data in shown)
    assert any("application/vnd.plotly.v1+json" in data for data in shown)
    assert (tmp_path / "runs/quickstart/selected.jsonl").is_file()
