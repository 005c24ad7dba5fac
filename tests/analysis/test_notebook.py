"""The notebooks, run from top to bottom on a small store of real files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from PIL import Image

from contract import rundir

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "analysis" / "notebooks").glob("*.ipynb"))


@pytest.fixture
def filled(output_dir: Path, make_study: Callable[..., Path], make_run: Callable[..., Path]) -> Path:
    """A study with a reported figure, a picture of a run, and attention statistics by block."""
    reported = [{"row": "random encoder", "column": "1-NN", "value": 50.5, "source": "Table 1"}]
    manifest = make_study(reported=reported)
    said = rundir.read_json(manifest)
    metric = "attention/cls_cls"
    said["columns"].append({"name": "cls on itself", "stage": "attention", "metric": metric, "better": "lower"})
    for r, row in enumerate(said["rows"]):
        runs = []
        for seed in range(3):
            made = {"worker": "main_attention_stats", "stage": "attention", "seed": seed, "parents": (f"aaa{r}{seed}",)}
            folder = make_run(f"cc0{r}{seed}", metrics={metric: 0.5 - 0.1 * r + 0.01 * seed}, **made)
            journal = rundir.Journal(folder / rundir.METRICS)
            for block in range(4):
                journal.append({"step": block, "of": 3, "time": 1.7e9, metric: 0.1 * block + 0.01 * seed + 0.1 * r})
            journal.close()
            runs.append({"seed": seed, "identity": folder.name, "worker": made["worker"], "state": "finished"})
        said["cells"].append({"row": row, "column": "cls on itself", "metric": metric, "runs": runs})
    rundir.write_json(manifest, said)
    pictures = output_dir / "main_lmim" / "aaa00" / rundir.FIGURES
    pictures.mkdir()
    Image.new("RGB", (30, 20), "red").save(pictures / "targets.png")
    return output_dir


@pytest.fixture(scope="module")
def kernel() -> Iterator[AsyncKernelManager]:
    """One for all: it is emptied before each notebook, but need not import everything again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        manager = AsyncKernelManager()
        yield manager
        run_sync(manager.shutdown_kernel)(now=True)


@pytest.mark.usefixtures("store_file")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path: Path, filled: Path, kernel: AsyncKernelManager) -> None:
    notebook = nbformat.read(path, as_version=4)
    fresh = f"%reset -f\nimport os\nos.environ['SIGHTLINE_RUNS'] = {str(filled)!r}"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(fresh))
    client = NotebookClient(notebook, timeout=120, km=kernel)
    try:
        client.execute()
    finally:
        client.kc.stop_channels()
    outputs: list[dict[str, Any]] = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    printed = "".join(o.get("text", "") for o in outputs)
    shown = [o["data"] for o in outputs if "data" in o]
    assert not any(re.search("no .* yet", str(data.get("text/plain"))) for data in shown)
    assert not [o for o in outputs if o.get("name") == "stderr" and "tqdm" not in o["text"]]
    assert any("image/png" in data for data in shown)
    if path.stem == "quickstart":
        assert re.search(r"0\.7\d* in MLflow, 0\.7\d* in the run directory", printed)
    elif path.stem == "curves":
        assert (filled / "figures" / "curves" / "train_loss.csv").stat().st_size > 1000
    else:
        assert any("±" in data.get("text/markdown", "") for data in shown)
        assert (filled / "figures" / "demo" / "table.tex").read_text().startswith("% study demo")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert len(cells) <= 12
    assert not any(cell.outputs or cell.execution_count for cell in cells)
