"""A real chain, killed at ten random moments and started again, ends with the numbers of an undisturbed one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

CHAIN = f"""
name: tiny
seeds: [0, 1]
set:
  data.size: 16
  data.val_length: 30
  data.test_length: 30
  run.checkpoint_every: 2
  trainer.callbacks: [{{class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {{decay: 0.9}}}}]
stages:
  pretrain:
    recipe: {ROOT}/configs/ssl_tasks/denoising_shapes.yaml
    set: {{data.length: 200, trainer.max_epochs: 3}}
  finetune:
    recipe: {ROOT}/configs/supervised/few_labels_shapes.yaml
    init_from: pretrain
    set: {{data.labels_per_class: 6, trainer.max_epochs: 4, trainer.check_val_every_n_epoch: 1}}
  scratch:
    recipe: {ROOT}/configs/supervised/few_labels_shapes.yaml
    set:
      model.backbone: wrn_16_1
      model.backbone_kwargs: {{drop_rate: 0.3}}
      data.labels_per_class: 6
      trainer.max_epochs: 4
      trainer.check_val_every_n_epoch: 1
table: {{metric: test/error, rows: {{scratch: scratch, fine-tuned: finetune}}}}
"""


def start(folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "baton", "chain", str(folder / "tiny.yaml"), "--root", str(folder / "runs")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def outcome(folder: Path) -> dict:
    models = sorted((folder / "runs").rglob("model/config.json"))
    records = {str(path.relative_to(folder)): json.loads(path.read_text())["baton"] for path in models}
    rows = {str(path.relative_to(folder)): path.read_text() for path in sorted((folder / "runs").rglob("metrics.csv"))}
    return {
        "weights": {path: record["sha256"] for path, record in records.items()},
        "metrics": {path: record["metrics"] for path, record in records.items()},
        "rows": rows,
        "table": (folder / "runs/tiny/table.csv").read_text(),
    }


@pytest.mark.slow
def test_ten_kills(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
        (folder / "tiny.yaml").write_text(CHAIN)
    began = time.monotonic()
    assert start(whole).wait() == 0
    length = time.monotonic() - began
    draw, kills = random.Random(0), 0
    while kills < 10:
        chain = start(broken)
        try:
            code = chain.wait(timeout=draw.uniform(0.1, 0.45) * length)
        except subprocess.TimeoutExpired:
            chain.send_signal(signal.SIGKILL)
            chain.wait()
            kills += 1
            continue
        assert code == 0
        break
    assert kills == 10, "the chain was through before it could be killed often enough"
    assert start(broken).wait() == 0
    assert outcome(broken) == outcome(whole)
