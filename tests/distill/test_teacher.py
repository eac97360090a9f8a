"""A teacher is the network that was handed over, sees with its own statistics, and belongs to nobody's parameters."""

import copy

import pytest
import torch
import torch.nn.functional as F

from baton.distill.attention import Attention
from baton.distill.teacher import Teacher, regressor
from baton.handover import load_backbone, read_source
from baton.losses import attention_map
from tiny import hand_over, same, state

TINY = {"depth": 10, "width": 2}
OWN = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


def test_it_says_what_its_network_says_of_images_normalised_its_own_way(tmp_path, capsys):
    location = hand_over(tmp_path / "t", cfg=OWN, **TINY)
    teacher, expected = Teacher(location), load_backbone(location)
    assert "teacher wide_resnet, 47 of 47 tensors" in capsys.readouterr().out
    assert same(state(teacher.network), state(expected))
    images = torch.rand(2, 3, 9, 7)
    naive = torch.stack([(images[:, c] - OWN["mean"][c]) / OWN["std"][c] for c in range(3)], dim=1)
    teacher.tap(["group2"])
    with torch.no_grad():
        logits, (features,) = teacher(images)
        torch.testing.assert_close(logits, expected(naive))
        torch.testing.assert_close(features, expected.forward_intermediates(naive, intermediates_only=True)[1])
    assert not any(module.training for module in teacher.network.modules())
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    assert teacher.sha256 == read_source(location).sha256


def test_it_is_no_module_and_copies_share_it(tmp_path):
    teacher = Teacher(hand_over(tmp_path / "t", **TINY))
    holder = torch.nn.Module()
    holder.teacher = teacher
    assert not list(holder.parameters())
    assert not holder.state_dict()
    assert copy.deepcopy(holder).teacher is teacher


def test_it_follows_the_student(tmp_path):
    teacher = Teacher(hand_over(tmp_path / "t", **TINY))
    teacher.follow(torch.zeros(1, dtype=torch.float64))
    logits, _ = teacher(torch.rand(1, 3, 8, 8, dtype=torch.float64))
    assert logits.dtype == torch.float64
    network = teacher.network.to(memory_format=torch.channels_last)
    teacher.channels_last = True
    assert teacher.normalize(torch.rand(2, 3, 8, 8).double()).is_contiguous(memory_format=torch.channels_last)
    assert network.stem.weight.dtype == torch.float64


def test_what_is_no_teacher_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no classifier: name a run that classifies"):
        Teacher(hand_over(tmp_path / "headless", classes=0, **TINY))
    with pytest.raises(FileNotFoundError, match="There is no"):
        Teacher(str(tmp_path / "nowhere"))
    teacher = Teacher(hand_over(tmp_path / "t", classes=["cat", "dog", "bird"], **TINY))
    with pytest.raises(ValueError, match="has 3 classes, the student has 10, so that its class scores say nothing"):
        teacher.check_classes(10, None)
    with pytest.raises(ValueError, match="knows the classes cat, dog, bird, the data have dog, cat, bird"):
        teacher.check_classes(3, ["dog", "cat", "bird"])
    teacher.check_classes(3, ["cat", "dog", "bird"])
    teacher.check_classes(3, None)
    teacher.check_same(None)
    teacher.check_same(teacher.lineage)
    with pytest.raises(ValueError, match=r"is not the one this run began with \('old', abcdefabcdef…\)"):
        teacher.check_same({"source": "old", "sha256": "abcdefabcdefabc"})


def test_images_of_another_size_are_refused(tmp_path):
    teacher = Teacher(hand_over(tmp_path / "t", "vit_tiny_patch16_224", embed_dim=12, depth=1, num_heads=1))
    message = (
        r"cannot look at images of 32 x 16 pixels \(Input height \(32\) doesn't match model \(224\)\): give images"
    )
    with pytest.raises(ValueError, match=message):
        teacher.check_images(torch.rand(1, 3, 32, 16))
    teacher.check_images(torch.rand(1, 3, 224, 224))


@pytest.mark.parametrize("wanted", [["kd"], ["at", "hint"], ["kd", "at", "hint", "gradient"]])
def test_it_answers_what_it_is_asked(wanted, tmp_path):
    teacher, expected = Teacher(hand_over(tmp_path / "t", cfg=OWN, **TINY)), load_backbone(str(tmp_path / "t"))
    teacher.tap(["group1", "group3"])
    images, targets = torch.rand(2, 3, 9, 7, requires_grad=True), torch.tensor([0, 2])
    student = [torch.zeros(2, 1, 4, 7), torch.zeros(2, 1, 9, 9)]
    answers = teacher.answers(images, targets, student, wanted, Attention())
    assert answers.keys() == set(wanted)
    assert not any(each.requires_grad for tensors in answers.values() for each in tensors)
    logits, maps = teacher(images)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), images)
    attention = [attention_map(maps[0], size=(4, 7)).view(2, 4, 7), attention_map(maps[1]).view(2, 3, 2)]
    for name, tensors in {"kd": [logits], "hint": maps, "at": attention, "gradient": [gradient]}.items():
        for ours, theirs in zip(answers.get(name, []), tensors, strict=name in wanted):
            torch.testing.assert_close(ours, theirs)
    assert torch.equal(logits, expected(teacher.normalize(images)))


def test_a_regressor_only_where_channels_differ():
    assert isinstance(regressor(4, 4), torch.nn.Identity)
    assert regressor(4, 6)(torch.rand(2, 4, 3, 5)).shape == (2, 6, 3, 5)
