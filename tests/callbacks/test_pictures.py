"""Pictures are written under names that say the epoch, with and without a validation split."""

import numpy as np
import pytest
import torch
from PIL import Image

from baton.callbacks import Pictures
from baton.ssl_tasks import Denoising
from baton.supervised import Classification
from tiny import WRN, Arrays, fit


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("val", [0, 5])
@pytest.mark.parametrize(("every", "epochs"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_names_and_content(val, every, epochs, tmp_path):
    data = Arrays(12, val=val, size=(16, 24), batch_size=4)
    fit(Denoising(**WRN), data, 5, callbacks=[Pictures(every, str(tmp_path / "pictures"))])
    assert names(tmp_path / "pictures") == [f"reconstruction_epoch_{epoch:04d}.png" for epoch in epochs]
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "pictures" / names(tmp_path / "pictures")[-1]))).permute(
        2, 0, 1
    )
    shown = 3 if val else 4  # five validation images are batches of three and two
    assert picture.shape == (3, 3 * 18 + 2, shown * 26 + 2)
    first = picture[:, 2:18, 2:26]
    if val:
        assert (first.int() - data.val_set.images[0].int()).abs().max() <= 1
    else:  # an image of the first training batch
        assert min((first.int() - image.int()).abs().max() for image in data.train_set.images) <= 1


def test_a_task_without_pictures_writes_none(tmp_path):
    fit(Classification(**WRN), Arrays(8, val=4), callbacks=[Pictures(folder=str(tmp_path / "pictures"))])
    assert names(tmp_path / "pictures") == []


def test_the_mode_of_the_network_comes_back(tmp_path):
    modes = []

    class Watched(Denoising):
        def losses(self, batch):
            modes.append((self.training, self.backbone.training))
            return super().losses(batch)

        def pictures(self, batch):
            modes.append("drawn" if not self.training and not torch.is_grad_enabled() else "wrong")
            return super().pictures(batch)

    fit(Watched(**WRN), Arrays(8, batch_size=4), 2, callbacks=[Pictures(folder=str(tmp_path))])
    assert modes == [(True, True), (True, True), "drawn"] * 2
