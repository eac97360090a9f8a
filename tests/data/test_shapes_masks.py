import pytest
import torch

from baton.data.shapes import Shapes, ShapesDataset
from baton.data.shapes_masks import ShapesMasks


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_images_are_those_of_shapes_and_masks_hold_the_class_where_the_object_is_visible(split):
    lengths = {"length": 33, "val_length": 12, "test_length": 11}
    data, plain = ShapesMasks(size=17, picture_seed=3, **lengths), Shapes(size=17, picture_seed=3, **lengths)
    data.setup()
    plain.setup()
    dataset, reference = getattr(data, f"{split}_set"), getattr(plain, f"{split}_set")
    indices = [10, 0, 7]
    images, masks = dataset.__getitems__(indices)
    expected, labels = reference.__getitems__(indices)
    assert torch.equal(images, expected)
    visible = ShapesDataset(17, 12, 3, split).masks(indices)
    for mask, label, here in zip(masks, labels.tolist(), visible, strict=True):
        assert mask[here].unique().tolist() == [label + 1]
        assert mask[~here].unique().tolist() == [0]
    assert all(map(torch.equal, dataset.__getitems__(indices), (images, masks)))  # from the cache
    assert len(dataset) == len(reference)


def test_classes_are_named_background_first():
    data = ShapesMasks(size=16, length=40, val_length=0, test_length=10)
    assert data.classes == ["background", *Shapes.classes]
    assert data.num_classes == 11
    counts = data.class_counts()
    assert counts.sum() == 40 * 16 * 16
    assert counts[0] > counts[1:].max()
    assert (counts > 0).all()
    assert data.val_dataloader() == []


def test_a_small_size_is_a_mistake():
    with pytest.raises(ValueError, match="image size of at least 16"):
        ShapesMasks(size=9).setup()
