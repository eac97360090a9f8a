import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from baton.data.decoding import decode
from baton.data.mask_files import PADDING, MaskFileSet, UnusableMaskError, read_mask
from baton.data.masks import IGNORE

SHAPES = [(9, 14), (21, 12), (13, 13), (30, 17)]
VOID = 4


@pytest.fixture
def files(tmp_path):
    """Images of odd sizes with masks of classes 0 … 3 and ignored pixels, stored as 4."""
    generator = np.random.default_rng(0)
    images, masks = [], []
    for number, shape in enumerate(SHAPES):
        images.append(str(tmp_path / f"{number}.bmp"))
        masks.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(images[-1])
        Image.fromarray(generator.integers(0, 5, shape, dtype=np.uint8)).save(masks[-1])
    return images, masks


def dataset(files, size=(8, 10), **options):
    return MaskFileSet(*files, 4, size, **{"ignore_value": VOID, **options})


def pair(files, number):
    """Image and mask (height, width, …) as arrays, ignored pixels as `IGNORE`."""
    mask = np.array(Image.open(files[1][number]))
    return np.array(Image.open(files[0][number])), np.where(mask == VOID, IGNORE, mask)


def padded(image, mask, height, width):
    """Naive: paste into a canvas."""
    height, width = max(height, len(mask)), max(width, len(mask[0]))
    canvas, outside = np.tile(np.array(PADDING, np.uint8), (height, width, 1)), np.full((height, width), IGNORE)
    canvas[: len(mask), : len(mask[0])], outside[: len(mask), : len(mask[0])] = image, mask
    return canvas, outside


def same(batch, expected):
    images, masks = batch
    assert (images.dtype, masks.dtype) == (torch.uint8, torch.uint8)
    for image, mask, (known, classes) in zip(images, masks, expected, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), known)
        assert np.array_equal(mask.numpy(), classes)


def test_whole_images_are_padded_to_the_largest_of_their_batch(files):
    whole = dataset(files, crop="whole")
    for chosen, (height, width) in (([1, 0], (21, 14)), ([0, 3, 2], (30, 17)), ([2], (13, 13))):
        same(whole.__getitems__(chosen), [padded(*pair(files, number), height, width) for number in chosen])
    image, mask = whole[3]
    assert (image.shape, mask.shape) == ((3, *SHAPES[3]), SHAPES[3])
    assert whole.targets.tolist() == [-1] * 4


def test_the_centre_is_cut_out_and_small_images_are_padded(files):
    expected = []
    for number in range(4):
        image, mask = padded(*pair(files, number), 15, 13)
        top, left = (len(mask) - 15) // 2, (len(mask[0]) - 13) // 2
        expected.append((image[top : top + 15, left : left + 13], mask[top : top + 15, left : left + 13]))
    same(dataset(files, (15, 13), crop="center").__getitems__(range(4)), expected)


def test_a_random_crop_is_a_window_of_image_and_mask_and_every_window_occurs(files):
    random = dataset(files, (8, 10))
    windows = set()
    for epoch in range(100):
        random.set_epoch(epoch)
        image, mask = (values.numpy() for values in random[0])
        matching = [
            (top, left)
            for top in range(2)
            for left in range(5)
            if np.array_equal(image.transpose(1, 2, 0), pair(files, 0)[0][top : top + 8, left : left + 10])
            and np.array_equal(mask, pair(files, 0)[1][top : top + 8, left : left + 10])
        ]
        assert len(matching) == 1
        windows.add(matching[0])
    assert len(windows) == 10


@pytest.mark.parametrize("factor", [0.5, 1.3, 2.0])
def test_images_and_masks_are_scaled_by_the_same_factor(files, factor):
    """With a window as large as the scaled image, nothing is cropped."""
    for number, (height, width) in enumerate(SHAPES):
        size = (round(height * factor), round(width * factor))
        image, mask = dataset(files, size, scale=(factor, factor))[number]
        assert torch.equal(image, functional.resize(decode(files[0][number]), list(size), antialias=True))
        # The class of the pixel that covers the centre of the new one.
        rows = ((np.arange(size[0]) + 0.5) * height / size[0]).astype(int)
        columns = ((np.arange(size[1]) + 0.5) * width / size[1]).astype(int)
        assert np.array_equal(mask.numpy(), pair(files, number)[1][rows][:, columns])


def test_the_factor_is_uniform_and_the_rest_of_the_window_is_ignored(files):
    random = dataset(files, (45, 45), scale=(0.5, 1.5))
    heights = []
    for epoch in range(300):
        random.set_epoch(epoch)
        image, mask = random[3]
        outside = (image == torch.tensor(PADDING)[:, None, None]).all(0)
        rows, columns = int((~outside).any(1).sum()), int((~outside).any(0).sum())
        assert (mask[rows:] == IGNORE).all()
        assert (mask[:, columns:] == IGNORE).all()
        assert (mask[:rows, :columns] != IGNORE).any(1).all()
        assert abs(rows / columns - 30 / 17) < 0.12
        heights.append(rows)
    counts, _ = np.histogram(heights, bins=[15, 21, 27, 33, 39, 46])
    assert counts.min() > 30


def test_draws_follow_seed_epoch_and_sample_alone(files):
    sets = [dataset(files, scale=(0.7, 1.9), seed=seed) for seed in (0, 0, 1)]
    batches = [each.__getitems__(range(4)) for each in sets]
    assert all(map(torch.equal, batches[0], batches[1]))
    assert not torch.equal(batches[0][0], batches[2][0])
    assert torch.equal(sets[0].__getitems__([3, 1])[1], batches[0][1][[3, 1]])
    state = torch.get_rng_state()
    sets[0].set_epoch(1)
    assert not torch.equal(sets[0].__getitems__(range(4))[0], batches[0][0])
    assert torch.equal(state, torch.get_rng_state())
    sets[0].set_epoch(0)
    assert torch.equal(sets[0].__getitems__(range(4))[0], batches[0][0])


@pytest.mark.slow
def test_workers_that_live_on_learn_the_epoch(files):
    random = dataset(files)

    class Whole(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return random.__getitems__([2 * index, 2 * index + 1])

    loader = DataLoader(Whole(), batch_size=None, num_workers=2, persistent_workers=True)
    for epoch in (3, 4):
        random.set_epoch(epoch)
        for index, batch in enumerate(loader):
            assert all(map(torch.equal, batch, Whole()[index]))


def test_in_memory_nothing_is_read_again_and_nothing_changes(files):
    random = dataset(files, scale=(0.5, 2.0))
    kept, expected = random.in_memory(), random.__getitems__([2, 0])
    for file in files[0]:
        Image.new("RGB", (1, 1)).save(file)
    assert all(map(torch.equal, kept.__getitems__([2, 0]), expected))
    assert kept.evaluation()[0][0].shape[1:] == SHAPES[0]
    with pytest.raises(ValueError, match="must have the same size"):
        random.__getitems__([0])


def test_evaluation_equals_a_set_without_draws(files):
    for kind in ("whole", "center"):
        plain = dataset(files, crop=kind)
        random = dataset(files, evaluation=kind, scale=(0.5, 2.0))
        assert all(map(torch.equal, random.evaluation().__getitems__(range(4)), plain.__getitems__(range(4))))


def write_png(path, values, bits, colour=0):
    """A PNG of few bits a pixel, after its specification; every row begins with its filter, 0."""
    height, width = values.shape
    planes = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1  # most significant bit first
    rows = np.packbits(planes.reshape(height, width * bits).astype(np.uint8), axis=1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))]
    if colour == 3:
        parts.append((b"PLTE", bytes(range(255, 255 - 3 * 2**bits, -1))))
    parts += [(b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.mark.parametrize("colour", [0, 3], ids=["grey", "palette"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_masks_of_few_bits_hold_their_values(tmp_path, bits, colour):
    values = np.random.default_rng(0).integers(0, 2**bits, (5, 11))
    write_png(tmp_path / "m.png", values, bits, colour)
    assert np.array_equal(read_mask(tmp_path / "m.png").numpy(), values)


def test_masks_of_8_and_16_bits_and_with_palettes(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (7, 5)).astype(np.uint8)
    grey, coloured = Image.fromarray(values), Image.fromarray(values)
    coloured = coloured.convert("P")
    coloured.putdata(values.flatten().tolist())
    coloured.putpalette(np.random.default_rng(1).integers(0, 256, 768).astype(np.uint8).tobytes())
    wide = Image.fromarray(values.astype(np.uint16))
    for image in (grey, coloured, wide):
        image.save(tmp_path / "m.png")
        mask = read_mask(str(tmp_path / "m.png"))
        assert mask.dtype == torch.uint8
        assert np.array_equal(mask.numpy(), values), image.mode


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (Image.new("RGB", (4, 3)), r"m\.png holds colours \(mode RGB\), but a grey or palette PNG was expected"),
        (Image.new("RGBA", (4, 3)), r"m\.png holds colours \(mode RGBA\)"),
        (Image.fromarray(np.full((3, 4), 700, np.uint16)), r"m\.png has the value 700, but classes are at most 254\.$"),
    ],
)
def test_files_that_are_no_masks_are_named(tmp_path, image, said):
    image.save(tmp_path / "m.png")
    with pytest.raises(ValueError, match=said):
        read_mask(tmp_path / "m.png")


def test_broken_masks_are_named(tmp_path):
    (tmp_path / "m.png").write_bytes(b"no image")
    with pytest.raises(UnusableMaskError, match=r"^Cannot read the mask .*m\.png: "):
        read_mask(tmp_path / "m.png")
    with pytest.raises(UnusableMaskError, match=r"^Cannot read the mask .*none\.png: .*No such file"):
        read_mask(tmp_path / "none.png")


def test_masks_that_do_not_fit_are_named_with_what_is_wrong(files):
    Image.new("L", (14, 10)).save(files[1][0])
    with pytest.raises(ValueError, match=r"0\.png has 10 rows of 14 pixels, but its image .*0\.bmp has 9 of 14: both"):
        dataset(files)[0]
    with pytest.raises(ValueError, match=r"1\.png has the value 4, but the classes are 0 to 3 and 255 is ignored"):
        dataset(files, ignore_value=255)[1]
    values = np.zeros(SHAPES[2], np.uint8)
    values[5, 5] = 255
    Image.fromarray(values).save(files[1][2])
    with pytest.raises(
        ValueError, match=r"2\.png has the value 255, but the classes are 0 to 3 and 4 is ignored: corr"
    ):
        dataset(files)[2]


class Broken(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise UnusableMaskError("The mask x.png is wrong.")


@pytest.mark.slow
def test_the_sentence_survives_a_worker():
    with pytest.raises(ValueError, match=r"^The mask x.png is wrong\.$"):
        next(iter(DataLoader(Broken(), num_workers=1)))
    assert str(pickle.loads(pickle.dumps(UnusableMaskError("a sentence")))) == "a sentence"
