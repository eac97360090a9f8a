"""How many classes, which names, and metrics over them."""

import pytest
import torch

from baton.labels import data_of, find_classes, top_accuracies, with_errors
from baton.supervised import Classification, LinearProbes
from tiny import WRN, Arrays, trainer


def attached(task, data, stage):
    """The task as it is while a trainer builds it for a stage."""
    runner = trainer()
    runner.datamodule, task.trainer = data, runner
    runner.state.fn = stage
    data.setup()
    return task


@pytest.mark.parametrize("cls", [Classification, LinearProbes])
def test_classes_come_from_the_data_or_the_user(cls):
    names = ["class 0", "class 1", "class 2"]
    task = attached(cls(**WRN), Arrays(), None)
    assert find_classes(task, None) == (3, names)
    assert find_classes(task, 3) == (3, names)
    assert find_classes(task, 7) == (7, None)
    with pytest.raises(ValueError, match=r"model.num_classes=2 is too few: the data have 3 classes\.$"):
        find_classes(task, 2)
    alone = cls(**WRN)
    assert data_of(alone) is None
    assert find_classes(alone, 4) == (4, None)
    with pytest.raises(ValueError, match=rf"^{cls.__name__} needs labelled data of at least two classes"):
        find_classes(alone, None)


@pytest.mark.parametrize(
    ("stage", "looked_at"),
    [("fit", {"train", "val"}), ("validate", {"val"}), ("test", {"test"}), ("predict", set())],
)
def test_samples_that_are_compared_have_a_class(stage, looked_at):
    from lightning.pytorch.trainer.states import TrainerFn

    for split in ("train", "val", "test"):
        task = attached(Classification(**WRN), Arrays(20, val=9, test=11), TrainerFn(stage))
        targets = getattr(data_of(task), f"{split}_set").targets
        targets[2] = -1
        if split in looked_at:
            said = f"but 1 of {len(targets)} in the {split} split have none"
            with pytest.raises(ValueError, match=said):
                find_classes(task, None)
        else:
            assert find_classes(task, None)[0] == 3


@pytest.mark.parametrize("classes", [2, 5, 6, 9])
def test_top_accuracies_and_errors(classes):
    torch.manual_seed(0)
    scores, targets = torch.randn(40, classes), torch.randint(classes, (40,))
    metrics = top_accuracies(classes, "_x")
    assert metrics.keys() == ({"accuracy_x", "accuracy_top5_x"} if classes > 5 else {"accuracy_x"})
    for metric in metrics.values():
        metric.update(scores, targets)
    values = with_errors({name: metric.compute() for name, metric in metrics.items()})
    for top, name in ((1, "x"), (5, "top5_x")):
        if top == 1 or classes > 5:
            hits = sum(targets[i] in scores[i].argsort(descending=True)[:top] for i in range(40))
            assert values[f"accuracy_{name}"].item() == pytest.approx(hits / 40)
            assert values[f"error_{name}"].item() == pytest.approx(1 - hits / 40)
