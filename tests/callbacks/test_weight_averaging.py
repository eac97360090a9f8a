"""Lightning's weight averaging: the averaged weights are what is evaluated and handed over."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors.torch import load_file
from torch.optim.swa_utils import get_ema_avg_fn

from baton import cli
from baton.handover import load_backbone
from baton.optim import Optimizer, keep_equal_values
from baton.supervised import Classification, LinearProbes
from baton.task import Task
from tiny import Arrays, fit, same, state


@pytest.mark.parametrize("val", [0, 9])
def test_the_averaged_weights_are_handed_over(val, tmp_path, monkeypatch):
    weights = []

    def record(self, *args):
        weights.append({name: value.detach().double().clone() for name, value in self.backbone.state_dict().items()})

    monkeypatch.setattr(Task, "on_train_batch_end", record, raising=False)
    code = cli.main([
        "fit", "--model=Classification", "--model.backbone=wide_resnet",
        "--model.backbone_kwargs={depth: 10, width: 1}",
        "--data=Shapes", "--data.size=16", "--data.length=20", f"--data.val_length={val}", "--data.test_length=12",
        "--data.batch_size=8", "--trainer.max_epochs=3", "--trainer.accelerator=cpu",
        "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging", "--trainer.callbacks.decay=0.7",
        f"--run.root={tmp_path}", "--run.name=r", "--run.wandb=false", "--run.test=true",
    ])  # fmt: skip
    assert code == 0
    assert len(weights) == 9
    average = weights[0]
    for step in weights[1:]:
        average = {name: 0.7 * value + 0.3 * step[name] for name, value in average.items()}
    handed = load_file(tmp_path / "r/model/model.safetensors")
    assert handed.keys() == average.keys()
    for name, value in handed.items():
        if value.is_floating_point():
            assert torch.allclose(value.double(), average[name], atol=1e-5), name
    assert not torch.allclose(handed["fc.weight"].double(), weights[-1]["fc.weight"], atol=1e-4)

    # The metric beside the weights is theirs.
    from baton.data import Shapes
    from baton.handover import read_source

    data = Shapes(size=16, length=20, val_length=val, test_length=12)
    data.setup()
    images, targets = data.test_set.__getitems__(range(12))
    backbone = load_backbone(str(tmp_path / "r"))
    mean, std = (torch.tensor(backbone.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        wrong = backbone((images / 255 - mean) / std).argmax(1) != targets
    record = read_source(tmp_path / "r").record
    assert record["metrics"]["test/error"] == pytest.approx(wrong.double().mean().item(), abs=1e-6)


@pytest.mark.parametrize("cls", [LinearProbes, Classification])
def test_averaging_leaves_what_is_frozen_bit_identical(cls):
    torch.manual_seed(0)
    options = {"protocol": "linear_probe"} if cls is Classification else {}
    task = cls(
        backbone="wide_resnet", backbone_kwargs={"depth": 10, "width": 1, "drop_rate": 0.3},
        optimizer=Optimizer("momentum", 0.05), **options,
    )  # fmt: skip
    before = {name: value for name, value in state(task.backbone).items() if not name.startswith("fc.")}
    statistics = task.mean.clone(), task.std.clone()
    fit(task, Arrays(60, val=8), 3, callbacks=[EMAWeightAveraging(decay=0.9)])
    after = state(task.backbone)
    assert same(before, {name: after[name] for name in before})
    assert all(map(torch.equal, statistics, (task.mean, task.std)))


def test_only_equal_values_are_kept():
    plain = get_ema_avg_fn(0.9)
    options = keep_equal_values({"avg_fn": plain, "use_buffers": True})
    assert keep_equal_values(options) is options
    assert keep_equal_values({"use_buffers": True}) == {"use_buffers": True}
    torch.manual_seed(0)
    values, others = torch.randn(1000), torch.randn(1000)
    assert torch.equal(options["avg_fn"](values, values, 3), values)
    assert not torch.equal(plain(values, values, 3), values)
    assert torch.equal(options["avg_fn"](values, others, 3), plain(values, others, 3))
