"""Parts of a backbone that stay as they are: bit for bit, whatever else is trained, by every kind of task."""

import pytest
import torch
from torch import nn

from baton.backbones import create_backbone
from baton.distill import Distillation
from baton.freezing import modules_to_freeze
from baton.optim import Optimizer
from baton.ssl_tasks import Denoising
from baton.supervised import Classification
from tiny import WRN, Arrays, fit, hand_over, state, trainer

DECAYED = Optimizer("momentum", 0.1, weight_decay=0.1, decay_all=True)


def norms_of(backbone):
    return {name for name, module in backbone.named_modules() if isinstance(module, nn.BatchNorm2d)}


def changed(task, data, epochs=2, **kwargs):
    """Names of the backbone's tensors that training changes, and of all of them."""
    torch.manual_seed(0)
    task.configure_model()
    before = state(task.backbone)
    fit(task, data, epochs, **kwargs)
    after = state(task.backbone)
    return {name for name in before if not torch.equal(before[name], after[name])}, before.keys()


def tensors_of(modules, names):
    return {name for name in names if any(name.startswith(f"{module}.") for module in modules)}


def test_named_modules_keep_every_bit():
    task = Classification(num_classes=3, freeze=["stem", "group1", "group3.0.convs.0"], optimizer=DECAYED, **WRN)
    moved, names = changed(task, Arrays(16, val=8))
    assert moved == names - tensors_of(["stem", "group1", "group3.0.convs.0"], names)


def test_batchnorm_keeps_every_bit_and_all_else_is_trained():
    task = Classification(num_classes=3, freeze_batchnorm=True, optimizer=DECAYED, **WRN)
    moved, names = changed(task, Arrays(16, val=8))
    kept = tensors_of(norms_of(task.backbone), names)
    assert any(name.endswith("running_var") for name in kept)
    assert moved == names - kept
    assert task.train().backbone.training
    assert not any(task.backbone.get_submodule(name).training for name in norms_of(task.backbone))


@pytest.mark.parametrize("steps", [1, 3])
def test_head_first_trains_no_frozen_module_afterwards(steps):
    task = Classification(
        num_classes=3, head_only_steps=steps, freeze=["group1"], freeze_batchnorm=True, optimizer=DECAYED, **WRN
    )
    moved, names = changed(task, Arrays(16, val=8))
    assert moved == names - tensors_of({"group1", *norms_of(task.backbone)}, names)


def test_a_student_and_a_pretext_task_freeze_alike(tmp_path):
    teacher = hand_over(tmp_path / "teacher", depth=10, width=2)
    frozen = {"freeze": ["stem", "group1"], "freeze_batchnorm": True, "optimizer": DECAYED, **WRN}
    student = Distillation(teacher=teacher, num_classes=3, at_weight=10.0, hint_weight=1.0, **frozen)
    for task in (student, Denoising(**frozen)):
        moved, names = changed(task, Arrays(16, val=8))
        kept = tensors_of({"stem", "group1", *norms_of(task.backbone)}, names)
        if task is student:
            assert moved == names - kept
        else:  # it trains the trunk up to its last map alone
            assert moved
            assert moved <= names - kept


def test_it_is_that_of_a_network_whose_norms_never_train():
    """One step by hand, with BatchNorm in evaluation mode."""
    torch.manual_seed(0)
    task = Classification(num_classes=3, freeze_batchnorm=True, optimizer=Optimizer("momentum", 0.1), **WRN)
    task.configure_model()
    twin = create_backbone("wide_resnet", depth=10, width=1, num_classes=3)
    twin.load_state_dict(task.backbone.state_dict())
    data = Arrays(8, batch_size=8)
    data.setup()
    images, targets = data.train_set.__getitems__(range(8))
    nn.functional.cross_entropy(twin.eval()((images.float() / 255 - task.mean) / task.std), targets).backward()
    fit(task, data)
    for (name, ours), theirs in zip(task.backbone.named_parameters(), twin.parameters(), strict=True):
        fixed = name.rpartition(".")[0] in norms_of(twin)
        torch.testing.assert_close(ours, theirs if fixed else theirs - 0.1 * theirs.grad, msg=name)


def test_only_what_is_trained_reaches_the_optimiser():
    task = Classification(freeze=["stem", "group1"], freeze_batchnorm=True, **WRN)
    runner = trainer()
    runner.fit(task, datamodule=Arrays(8))
    given = {id(parameter) for group in runner.optimizers[0].param_groups for parameter in group["params"]}
    assert given == {id(parameter) for parameter in task.parameters() if parameter.requires_grad}
    assert len(given) < len(list(task.parameters()))


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_batchnorm_of_timms_networks_is_found(name):
    """Also where it computes an activation, too."""
    with torch.device("meta"):
        backbone = create_backbone(name)
    found = modules_to_freeze(backbone, [], batchnorm=True)
    assert {id(module) for module in found} == {id(m) for m in backbone.modules() if hasattr(m, "running_var")}
    assert modules_to_freeze(backbone, [], batchnorm=False) == []


def test_mistakes_are_one_sentence():
    wrong = Classification(num_classes=3, freeze=["group11"], **WRN)
    with pytest.raises(ValueError, match=r"has no module 'group11'; the nearest are group1.*\.$"):
        wrong.configure_model()
    with pytest.raises(ValueError, match=r"has no module '%'; it has stem, group1, group2, group3, .*\.$"):
        Classification(num_classes=3, freeze=["%"], **WRN).configure_model()
    with pytest.raises(ValueError, match=r"is set, but the backbone \(NIN\) has none: leave it out\.$"):
        Classification(
            num_classes=3, freeze_batchnorm=True, backbone="nin_thin", backbone_kwargs={"norm": False}
        ).configure_model()
