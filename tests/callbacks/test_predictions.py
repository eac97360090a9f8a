"""Predictions are written in the order of the data, whatever the processes."""

import numpy as np
import pandas as pd
import pytest
import torch

from baton.callbacks.predictions import PredictionWriter, _interleave
from baton.data.loading import evaluation_loader
from baton.ssl_tasks import Denoising
from baton.supervised import Classification, Segmentation
from tiny import WRN, Arrays, MaskArrays, trainer


@pytest.mark.parametrize("total", [5, 8, 21])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_shards_are_put_back_in_order(total, replicas):
    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return total

        def __getitems__(self, indices):
            return torch.tensor(indices), torch.tensor(indices)

    parts = []
    for rank in range(replicas):
        loader = evaluation_loader(Numbers(), 2, num_replicas=replicas, rank=rank)
        parts.append(torch.cat([images for images, _ in loader]))
    assert _interleave(parts).tolist() == list(range(total))
    stacked = _interleave([part[:, None].expand(-1, 2) for part in parts])
    assert stacked.tolist() == [[number, number] for number in range(total)]


def test_a_classification_gives_a_table(tmp_path):
    data = Arrays(8, test=11, batch_size=4)
    task = Classification(**WRN)
    trainer(callbacks=[PredictionWriter(str(tmp_path / "p"))]).predict(task, datamodule=data)
    table = pd.read_csv(tmp_path / "p/predictions.csv", index_col="index")
    images, targets = data.test_set.__getitems__(range(11))
    with torch.no_grad():
        logits = task.eval().backbone(task.normalize(images.float() / 255))
    assert table["target"].tolist() == targets.tolist()
    assert table["prediction"].tolist() == logits.argmax(1).tolist()
    assert np.allclose(table["probability"], logits.softmax(1).amax(1), atol=1e-5)
    assert table["class"].tolist() == [f"class {index}" for index in logits.argmax(1)]
    assert not (tmp_path / "p/predictions.npz").exists()


def test_images_go_to_an_archive(tmp_path):
    data = Arrays(8, test=5, batch_size=2)
    trainer(callbacks=[PredictionWriter(str(tmp_path))]).predict(Denoising(**WRN), datamodule=data)
    table = pd.read_csv(tmp_path / "predictions.csv")
    archive = np.load(tmp_path / "predictions.npz")
    assert archive["reconstruction"].shape == (5, 3, 16, 16)
    clean = data.test_set.images.numpy() / 255
    assert np.allclose(table["mse"], ((archive["reconstruction"] - clean) ** 2).mean((1, 2, 3)), rtol=1e-4)


def test_masks_of_images_of_different_sizes(tmp_path):
    """Each batch as large as its largest image; pixels beyond have no class."""

    class Sizes(MaskArrays):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            images, masks = super().on_after_batch_transfer(batch, dataloader_idx)
            rows, columns = 12 + int(masks[0, 0, 0] != 0), 8 + self.step
            self.step += 4
            return images[:, :, :rows, :columns], masks[:, :rows, :columns]

    data = Sizes(8, test=5, batch_size=2)
    data.step = 0
    data.setup()
    data.test_set.masks[:] = 1
    data.test_set.masks[0] = 0
    task = Segmentation(num_classes=3, **WRN)
    trainer(callbacks=[PredictionWriter(str(tmp_path))]).predict(task, datamodule=data)
    archive, table = np.load(tmp_path / "predictions.npz"), pd.read_csv(tmp_path / "predictions.csv")
    assert archive["prediction"].shape == archive["target"].shape == (5, 13, 16)
    assert archive["prediction"].dtype == np.uint8
    sizes = [(12, 8), (12, 8), (13, 12), (13, 12), (13, 16)]
    for number, (rows, columns) in enumerate(sizes):
        inside = archive["prediction"][number, :rows, :columns]
        assert (inside < 3).all()
        assert (archive["prediction"][number] == 255).sum() == 13 * 16 - rows * columns
        right = (inside == archive["target"][number, :rows, :columns]).mean()
        assert table["pixel_accuracy"][number] == pytest.approx(right)
    assert list(table) == ["index", "pixel_accuracy", "mean_iou"]


@pytest.mark.parametrize("part", [False, True])
def test_paths_stand_first_where_images_are_files(tmp_path, part):
    class Files(Arrays):
        def sources(self):
            splits = super().sources()
            for name, split in zip("abc", splits, strict=True):
                if split is not None:
                    split.files = np.array([b"%s %d.png" % (name.encode(), number) for number in range(len(split))])
            return splits

    data = Files(20, val_size=6) if part else Files(8, test=5, batch_size=2)
    trainer(callbacks=[PredictionWriter(str(tmp_path))]).predict(Classification(num_classes=3, **WRN), datamodule=data)
    table = pd.read_csv(tmp_path / "predictions.csv", index_col="index")
    assert table.columns[0] == "path"
    numbers = data.val_set.indices if part else range(5)
    assert table["path"].tolist() == [f"{'a' if part else 'c'} {number}.png" for number in numbers]
