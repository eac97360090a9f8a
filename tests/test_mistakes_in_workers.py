"""A file that a DataLoader's worker cannot use is one sentence, too, not the worker's traceback."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from baton import cli
from baton.backbones.factory import create_backbone
from baton.mistakes import sentence

BRIEF = [
    "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--run.wandb=false", "--run.name=r",
    "--model.backbone=wide_resnet", "--model.backbone_kwargs={depth: 10, width: 1}", "--data.num_workers=1",
    "--data.batch_size=2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("BATON_TRACEBACK", raising=False)


def complaint(args, capsys):
    assert cli.main(["fit", *args, *BRIEF]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("baton: error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("baton: error: ")


def picture(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.numpy()).save(path)


def test_a_mask_with_a_class_too_many(tmp_path, capsys):
    for split in ("train", "val", "test"):
        for number in range(4):
            picture(tmp_path / split / "images" / f"{number}.png", torch.full((20, 24, 3), 9, dtype=torch.uint8))
            picture(tmp_path / split / "masks" / f"{number}.png", torch.full((20, 24), number, dtype=torch.uint8))
    said = complaint(["--model=Segmentation", "--data=MaskFolder", "--data.root=.", "--data.num_classes=3"], capsys)
    where = Path("train", "masks", "3.png")
    assert said.startswith(f"The mask {where} has the value 3, but the classes are 0 to 2 and 255 is ignored: correct")


def test_an_image_that_is_cut_off(tmp_path, capsys):
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            for number in range(2):
                noise = torch.randint(0, 256, (24, 24, 3), dtype=torch.uint8)
                picture(tmp_path / split / name / f"{number}.png", noise)
    broken = tmp_path / "train" / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:300])
    said = complaint(["--model=Classification", "--data=ImageFolder", "--data.root=.", "--data.image_size=16"], capsys)
    assert said.startswith(f"Cannot read the image {Path('train', 'dog', '1.png')}: ")


class Failing(Dataset):
    """Fails as Baton's code does, or as its defects would."""

    def __init__(self, ours):
        self.ours = ours

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return create_backbone("no_such_network") if self.ours else int("x")


@pytest.mark.parametrize("ours", [True, False])
def test_any_sentence_of_ours_is_passed_on_and_no_defect(ours):
    with pytest.raises(ValueError, match="Caught ValueError in DataLoader worker") as caught:
        next(iter(DataLoader(Failing(ours), num_workers=1)))
    said = sentence(caught.value)
    assert said is None if not ours else said.startswith("Expected the name of a backbone, but got 'no_such_network',")
