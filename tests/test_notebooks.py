"""The notebooks run from top to bottom on a finished chain."""

from pathlib import Path

import pytest

from baton import cli

ROOT = Path(__file__).parent.parent

CHAIN = """
name: tiny
seeds: [0, 1]
set: {{data.size: 16, data.val_length: 20, data.test_length: 20, run.wandb: false}}
stages:
  pretrain:
    recipe: {root}/configs/ssl_tasks/denoising_shapes.yaml
    set: {{data.length: 60, trainer.max_epochs: 1}}
  finetune:
    recipe: {root}/configs/supervised/few_labels_shapes.yaml
    init_from: pretrain
    set: {{trainer.max_epochs: 2, trainer.check_val_every_n_epoch: 1}}
table: {{metric: test/error, rows: {{fine-tuned: finetune}}}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    (tmp_path / "tiny.yaml").write_text(CHAIN.format(root=ROOT))
    assert cli.main(["chain", str(tmp_path / "tiny.yaml"), "--root", str(tmp_path / "runs")]) == 0
    monkeypatch.setenv("BATON_CHAIN", str(tmp_path / "runs/tiny"))
    cells = nbformat.read(notebook, as_version=4)
    NotebookClient(cells, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    shown = [
        output for cell in cells.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(shown) >= 3  # the table's plot, the curves, the reconstructions
