import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from baton.data.decoding import (
    UnreadableImageError,
    centre_crop,
    decode,
    random_resized_crop,
    resize_shorter,
    squash,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (21, 33, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)


def png_of_16_bits(path, values):
    """Write a 16-bit PNG by hand: PIL cannot write RGB of that depth."""
    height, width, channels = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize(
    "name", ["a.jpg", "a.JPEG", "a.png", "a.webp", "a.bmp", "a.tif", "a.tiff", "mit Leerzeichen ü 図.png", "ü 図.jpg"]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_format_and_name_decodes_as_with_pil(tmp_path, name, mode):
    RGB.convert(mode).save(tmp_path / name)
    decoded = decode(tmp_path / name)
    assert (decoded.dtype, decoded.shape) == (torch.uint8, (3, 21, 33))
    with Image.open(tmp_path / name) as image:
        difference = (decoded.int() - as_tensor(image.convert("RGB")).int()).abs().max()
    assert difference <= (2 if name.endswith(("jpg", "JPEG")) else 0)  # two builds of libjpeg may round differently


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_is_converted(tmp_path, name):
    RGB.resize((16, 16)).convert("CMYK").save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.mode == "CMYK"
        expected = as_tensor(image.convert("RGB"))
    assert (decode(tmp_path / name).int() - expected.int()).abs().max() <= 2


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[274] = orientation
    plain = Image.fromarray(np.kron(PIXELS[:4, :6], np.ones((8, 8, 1), np.uint8)))
    plain.save(path, exif=exif, **({"quality": 98, "subsampling": 0} if suffix == "jpg" else {"lossless": True}))
    turns = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90,
    }  # fmt: skip
    expected = torch.from_numpy(turns[orientation](np.array(plain)).copy()).permute(2, 0, 1)
    decoded = decode(path)
    assert decoded.shape == expected.shape
    assert (decoded.float() - expected.float()).abs().mean() <= (5 if suffix == "jpg" else 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, channels):
    values = np.random.default_rng(1).integers(0, 65536, (9, 7, channels)).astype(np.uint16)
    values[0, :2] = [[0] * channels, [65535] * channels]
    png_of_16_bits(tmp_path / "a.png", values)
    expected = torch.from_numpy((values >> 8).astype(np.uint8)).permute(2, 0, 1).expand(3, -1, -1)
    assert torch.equal(decode(tmp_path / "a.png"), expected)
    if channels == 1:
        Image.fromarray(values[..., 0]).save(tmp_path / "a.tif")
        assert torch.equal(decode(tmp_path / "a.tif"), expected)


def test_palettes_are_looked_up_and_transparency_shows_white(tmp_path):
    palette = RGB.quantize(16)
    palette.save(tmp_path / "p.png")
    assert torch.equal(decode(tmp_path / "p.png"), as_tensor(palette.convert("RGB")))
    palette.save(tmp_path / "t.png", transparency=5)
    colours, index = np.array(palette.convert("RGB")), np.array(palette)
    colours[index == 5] = 255
    assert (index == 5).any()
    assert torch.equal(decode(tmp_path / "t.png"), as_tensor(colours))


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_alpha_is_composited_over_white(tmp_path, suffix):
    alpha = np.random.default_rng(2).integers(0, 256, (21, 33, 1), dtype=np.uint8)
    alpha[0, :2, 0] = 0, 255
    Image.fromarray(np.dstack([PIXELS, alpha])).save(tmp_path / f"a.{suffix}", lossless=True, exact=True)
    share = alpha / 255
    expected = torch.from_numpy(PIXELS * share + 255 * (1 - share)).permute(2, 0, 1)
    decoded = decode(tmp_path / f"a.{suffix}")
    assert (decoded.double() - expected).abs().max() <= 1
    assert decoded[:, 0, 0].tolist() == [255] * 3
    assert decoded[:, 0, 1].tolist() == PIXELS[0, 1].tolist()


def test_one_bit_and_a_wrong_suffix(tmp_path):
    bits = RGB.convert("1")
    bits.save(tmp_path / "a.png")
    assert torch.equal(decode(tmp_path / "a.png"), as_tensor(bits.convert("RGB")))
    RGB.save(tmp_path / "b.png")
    (tmp_path / "b.png").rename(tmp_path / "b.jpg")
    assert torch.equal(decode(tmp_path / "b.jpg"), as_tensor(RGB))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.tif"])
def test_a_truncated_file_is_an_error_with_its_path(tmp_path, name):
    RGB.save(tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[: -(tmp_path / name).stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"Cannot read the image {tmp_path}/{name}: .*\.$") as caught:
        decode(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_no_image_is_an_error_with_its_path(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=f"Cannot read the image {tmp_path}/a.jpg: "):
        decode(tmp_path / "a.jpg")


def test_floats_and_missing_files_are_errors(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="32-bit pixels"):
        decode(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="No such file"):
        decode(tmp_path / "b.tif")


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise UnreadableImageError("Cannot read the image x.jpg: it is broken.")


@pytest.mark.slow
def test_the_sentence_survives_a_worker():
    with pytest.raises(ValueError, match=r"^Cannot read the image x.jpg: it is broken\.$"):
        next(iter(DataLoader(Broken(), num_workers=1)))
    error = UnreadableImageError("a sentence")
    assert str(pickle.loads(pickle.dumps(error))) == "a sentence"


def test_crops_equal_torchvisions():
    image = as_tensor(RGB)
    assert torch.equal(squash(image, 15), v2.Resize((15, 15))(image))
    for size, resize in ((15, 15), (9, 14), (40, 45)):
        expected = v2.CenterCrop(size)(v2.functional.resize(image, [resize, round(33 * resize / 21)]))
        assert torch.equal(centre_crop(image, size, resize), expected)
    assert centre_crop(image[:, :, :1], 9, 9).shape == (3, 9, 9)


@pytest.mark.parametrize(("height", "width", "expected"), [(21, 33, (14, 22)), (33, 21, (22, 14)), (7, 7, (14, 14))])
def test_the_shorter_side_gets_its_length_and_the_shape_stays(height, width, expected):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    resized = resize_shorter(image, 14)
    assert resized.shape == (3, *expected)
    assert torch.equal(resized, v2.Resize(list(expected))(image))
    assert torch.equal(resize_shorter(image, min(height, width)), image)


def test_random_crops_keep_to_their_ranges_and_follow_the_generator():
    row, column = torch.meshgrid(torch.arange(100), torch.arange(80), indexing="ij")
    image = torch.stack([row, column, row]).to(torch.uint8)
    areas, shapes, tops = [], [], []
    for seed in range(300):
        crop = random_resized_crop(image, 100, (0.3, 0.6), (3 / 4, 4 / 3), np.random.default_rng(seed)).float()
        h, w = (crop[c].amax() - crop[c].amin() + 1 for c in (0, 1))
        areas.append(h * w / 8000)
        shapes.append(w / h)
        tops.append(crop[0].amin() / (100 - h))
    areas, shapes, tops = (torch.tensor(values) for values in (areas, shapes, tops))
    assert 0.27 < areas.min() < 0.33 < 0.57 < areas.max() < 0.63
    assert 0.7 < shapes.min() < 0.8 < 1.25 < shapes.max() < 1.4
    assert (shapes.log().mean().abs() < 0.05) & (abs(areas.mean() - 0.45) < 0.02) & (abs(tops.mean() - 0.5) < 0.06)
    again = random_resized_crop(image, 100, (0.3, 0.6), (3 / 4, 4 / 3), np.random.default_rng(299)).float()
    assert torch.equal(crop, again)


def test_an_extreme_shape_falls_back_to_the_centre():
    image = torch.arange(90, dtype=torch.uint8).expand(3, 2, 90)
    crop = random_resized_crop(image, 2, (1.0, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0))
    assert 43 <= crop.min() <= crop.max() <= 47
