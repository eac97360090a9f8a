import pytest

from baton.data.folders import find_classes, find_images, find_splits, label_images


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names(root):
    return [file.removeprefix(f"{root}/") for file in find_images(root)]


def test_images_are_found_at_any_depth_in_a_fixed_order_without_the_hidden(tmp_path):
    touch(tmp_path, "b.PNG", "a.jpg", "z/2.webp", "m/1.tiff", "m/n/ü x.jpeg", "notes.txt", ".x.jpg", ".git/y.jpg")
    assert names(tmp_path) == ["a.jpg", "b.PNG", "m/1.tiff", "m/n/ü x.jpeg", "z/2.webp"]


def test_splits(tmp_path):
    touch(tmp_path, "cat/a.jpg", "dog/b.jpg")
    assert find_splits(tmp_path) == {"train": tmp_path}
    touch(tmp_path, "x/train/cat/a.jpg", "x/test/cat/a.jpg", "x/notes/a.txt", "x/loose.jpg")
    assert find_splits(tmp_path / "x") == {"train": tmp_path / "x/train", "test": tmp_path / "x/test"}


def test_wrong_splits_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none does not exist"):
        find_splits(tmp_path / "none")
    touch(tmp_path, "train/a/a.jpg", "valid/a/a.jpg")
    with pytest.raises(ValueError, match="has a train folder and images in valid beside it"):
        find_splits(tmp_path)
    touch(tmp_path, "x/val/a/a.jpg")
    with pytest.raises(ValueError, match="has a val or test folder, but no train folder"):
        find_splits(tmp_path / "x")


def test_classes_are_the_folders_sorted(tmp_path):
    touch(tmp_path, "dog/a.jpg", "Äpfel und Birnen/x/a.jpg", "cat/a.jpg", ".hidden/a.jpg", "readme.md")
    assert find_classes(tmp_path) == ["cat", "dog", "Äpfel und Birnen"]
    assert find_classes(tmp_path, labelled=False) == []


def test_loose_images_or_a_single_folder_have_no_labels(tmp_path):
    touch(tmp_path, "flat/a.jpg", "flat/empty/notes.txt")
    assert find_classes(tmp_path / "flat") == []
    assert find_classes(tmp_path) == []
    assert find_classes(tmp_path, labelled=True) == ["flat"]
    with pytest.raises(ValueError, match="labelled=true needs a folder for each class"):
        find_classes(tmp_path / "flat", labelled=True)


def test_a_mixture_no_images_and_an_empty_class_are_explained(tmp_path):
    touch(tmp_path, "mixed/cat/a.jpg", "mixed/b.jpg", "none/notes.txt", "gap/cat/a.jpg", "gap/dog/a.jpg", "gap/emu/a")
    with pytest.raises(ValueError, match=r"mixes class folders \(cat\) and loose images \(b.jpg\)"):
        find_classes(tmp_path / "mixed")
    for labelled in (None, True, False):
        with pytest.raises(ValueError, match=r"none holds no images; expected files that end in \.jpg"):
            find_classes(tmp_path / "none", labelled)
    with pytest.raises(ValueError, match=f"The class folder {tmp_path}/gap/emu holds no images"):
        find_classes(tmp_path / "gap")


def test_targets_are_places_in_the_training_classes(tmp_path):
    touch(tmp_path, "val/c/1.jpg", "val/a/2.jpg", "val/a/0.jpg")
    files, targets = label_images(tmp_path / "val", ["a", "b", "c"])
    assert [file[-7:] for file in files] == ["a/0.jpg", "a/2.jpg", "c/1.jpg"]
    assert targets == [0, 0, 2]
    assert label_images(tmp_path / "val", [])[1] == [-1, -1, -1]
    with pytest.raises(ValueError, match="holds classes that the training images lack: c"):
        label_images(tmp_path / "val", ["a", "b"])
