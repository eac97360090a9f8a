import re

import numpy as np
import pytest
from PIL import Image

from baton.chain_pictures import (
    common_rows,
    draw,
    draw_common_rows_once,
    last_picture,
    missing_picture,
    pictures_of,
    write_pictures,
)
from baton.chain_table_file import Sheet

SHEET = Sheet("reconstruction", 3, {"SAE": "sae", "SWWAE": "swwae", "$x_1$ alone": "alone"})


def random_image(seed, height=8, width=8):
    """Pixels of which no two rows are alike, and none of which is white."""
    return np.random.default_rng(seed).integers(0, 200, (height, width, 3), dtype=np.uint8)


def grid(*rows, padding=2):
    """Rows of images as the tasks draw them: each image with a white border."""
    count, (height, width, _) = len(rows[0]), rows[0][0].shape
    step, stride = height + padding, width + padding
    pixels = np.full((step * len(rows) + padding, stride * count + padding, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = padding + i * step, padding + j * stride
            pixels[top : top + height, left : left + width] = image
    return pixels


IMAGES = [random_image(seed) for seed in range(4)]


def picture(seed, images=IMAGES):
    """The images, and below them what a network with this seed makes of them."""
    size = images[0].shape[:2]
    return grid(images, [random_image(100 + 10 * seed + number, *size) for number in range(len(images))])


def labels(strips):
    return [label for label, _ in strips]


def test_rows_that_pictures_begin_with_are_drawn_once_on_top():
    first, second = picture(1), picture(2)
    strips = draw_common_rows_once([("a", first), ("b", None), ("c", second)])
    assert labels(strips) == ["images", "a", "b", "c"]
    images, a, nothing, c = (pixels for _, pixels in strips)
    assert nothing is None
    assert np.array_equal(images, grid(IMAGES))
    for whole, rest in ((first, a), (second, c)):
        assert np.array_equal(np.concatenate([images, rest]), whole)  # no row is lost, none is shown twice


def test_pictures_of_other_images_or_another_size_stay_whole():
    others = [random_image(50 + number) for number in range(4)]
    larger = [random_image(60 + number, 16, 16) for number in range(4)]
    given = [("other", picture(1, others)), ("a", picture(2)), ("larger", picture(3, larger)), ("b", picture(4))]
    strips = draw_common_rows_once(given)
    assert labels(strips) == ["images", "other", "a", "larger", "b"]
    assert [len(pixels) for _, pixels in strips] == [12, 22, 10, 38, 10]
    assert np.array_equal(strips[0][1], grid(IMAGES))


def test_the_largest_group_of_pictures_that_begin_alike_is_taken_and_of_equal_ones_the_first():
    others = [random_image(50 + number) for number in range(4)]
    pair, three = [picture(number, others) for number in (1, 2)], [picture(number) for number in (3, 4, 5)]
    given = [(str(number), pixels) for number, pixels in enumerate([*pair, *three])]
    assert np.array_equal(draw_common_rows_once(given)[0][1], grid(IMAGES))
    assert np.array_equal(draw_common_rows_once(given[:4])[0][1], grid(others))


def test_equal_pictures_are_drawn_whole_unless_a_third_shares_their_beginning_only():
    same = picture(1)
    assert labels(draw_common_rows_once([("a", same), ("b", same.copy())])) == ["a", "b"]
    strips = draw_common_rows_once([("a", same), ("b", same.copy()), ("c", picture(2))])
    assert [(label, len(pixels)) for label, pixels in strips] == [("images", 12), ("a", 10), ("b", 10), ("c", 10)]


@pytest.mark.parametrize("strips", [[], [("a", None)], [("a", None), ("b", None)], [("a", picture(1))]])
def test_fewer_than_two_pictures_have_nothing_in_common(strips):
    assert draw_common_rows_once(strips) == strips


def test_common_rows_are_counted_to_the_last_row_that_all_pictures_share():
    corrupted = [random_image(70 + number) for number in range(4)]
    results = [[random_image(100 * seed + number) for number in range(4)] for seed in (1, 2, 3)]
    two, one = (grid(IMAGES, corrupted, result) for result in results[:2]), grid(IMAGES, results[2], results[0])
    first, second = two
    assert common_rows([first, second]) == len(grid(IMAGES, corrupted))  # denoising: the same noise, too
    assert common_rows([first, second, one]) == len(grid(IMAGES))


def test_without_a_border_the_common_rows_are_all_rows_that_are_the_same():
    top, bottoms = random_image(1, 5, 30), [random_image(seed, 6, 30) for seed in (2, 3)]
    assert common_rows([np.concatenate([top, bottom]) for bottom in bottoms]) == 5


def test_a_border_a_heading_and_black_margins_are_no_common_images():
    digits = [[np.pad(random_image(seed, 4, 4), ((2, 2), (2, 2), (0, 0)))] * 3 for seed in range(4)]
    assert common_rows([grid(digits[0], digits[1]), grid(digits[2], digits[3])]) == 0  # two rows of margins are alike
    assert common_rows([grid(digits[0], digits[1]), grid(digits[0], digits[2])]) == len(grid(digits[0]))
    heading, white = random_image(5, 5, 40), np.full((2, 40, 3), 255, np.uint8)
    plots = [np.concatenate([white, heading, white, random_image(seed, 100, 40)]) for seed in (6, 7)]
    assert common_rows(plots) == 0


def test_the_last_picture_is_that_of_the_last_epoch(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, name in enumerate(
        ("colors_epoch_0009", "colors_epoch_9999", "colors_epoch_10000", "all_colors_epoch_20000", "colors")
    ):
        Image.fromarray(random_image(number)).save(folder / f"{name}.png")
    assert pictures_of(tmp_path) == {
        "all_colors": folder / "all_colors_epoch_20000.png",
        "colors": folder / "colors_epoch_10000.png",
    }
    assert np.array_equal(last_picture(tmp_path, "colors"), random_image(2))
    assert last_picture(tmp_path, "color") is None
    assert (pictures_of(tmp_path / "no run"), last_picture(tmp_path / "no run", "colors")) == ({}, None)


@pytest.mark.parametrize("damage", [lambda data: data[:60], lambda data: b"", lambda data: data[:50] + data[51:]])
def test_a_damaged_picture_is_named(damage, tmp_path):
    file = run(tmp_path, picture(1), "colors") / "pictures/colors_epoch_0002.png"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(file))} is damaged: delete it, and the sheet shows the picture bef"
    ):
        last_picture(tmp_path, "colors")


def run(folder, pixels, name="reconstruction"):
    """A run that has drawn this in its second and last epoch."""
    (folder / "pictures").mkdir(parents=True)
    for epoch, drawn in ((1, pixels // 2), (2, pixels)):
        Image.fromarray(drawn).save(folder / f"pictures/{name}_epoch_{epoch:04d}.png")
    return folder


def occurrences(sheet, pixels, factor):
    """How often the enlarged pixels stand in the sheet, exactly."""
    large = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    (height, width), found = large.shape[:2], 0
    # A corner that occurs nowhere else is looked for first: the first pixel that is not of the border.
    y, x = np.argwhere((large != 255).any(axis=2))[0]
    for top, left in np.argwhere((sheet == large[y, x]).all(axis=2)) - (y, x):
        found += top >= 0 and left >= 0 and np.array_equal(sheet[top : top + height, left : left + width], large)
    return found


def test_the_sheet_shows_every_picture_in_whole_pixels_and_the_images_once(tmp_path):
    small = picture(1), picture(2)
    assert small[0].shape == (22, 42, 3)
    wide = random_image(9, 40, 1000)
    runs = {"sae": run(tmp_path / "1", small[0]), "swwae": run(tmp_path / "2", small[1])}
    write_pictures("demo", SHEET, {**runs, "alone": run(tmp_path / "3", wide)}, tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "pictures.png").convert("RGB"))
    assert occurrences(sheet, grid(IMAGES), 8) == 1
    assert [occurrences(sheet, pixels[12:], 8) for pixels in small] == [1, 1]
    assert occurrences(sheet, wide, 1) == 1
    assert sheet.shape[1] < 1300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "pictures.png"]


@pytest.mark.parametrize(("width", "factor"), [(100, 8), (274, 3), (530, 2), (700, 1), (2000, 1)])
def test_small_pictures_are_enlarged_by_whole_numbers(width, factor, tmp_path):
    pixels = random_image(1, 20, width)
    draw("demo", SHEET, [("a", pixels)], tmp_path / "pictures.png")
    sheet = np.asarray(Image.open(tmp_path / "pictures.png").convert("RGB"))
    assert occurrences(sheet, pixels, factor) == 1


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """Draws instead of writing and gives the figure."""
    figures = []
    monkeypatch.setattr("baton.chain_pictures.save_figure", lambda figure, path: figures.append(figure))

    def of(runs, sheet=SHEET, name="demo"):
        write_pictures(name, sheet, runs, tmp_path)
        return figures[-1]

    return of


def texts(figure):
    return [text.get_text() for text in figure.texts]


TITLE = "demo\nlast picture 'reconstruction' of every stage, seed 3"


def test_labels_stand_in_order_of_the_file_and_what_is_missing_says_so(figure, tmp_path):
    runs = {"sae": run(tmp_path / "1", picture(1)), "alone": run(tmp_path / "2", picture(2), name="colors")}
    drawn = figure(runs)  # swwae has not finished, and alone has drawn something else
    assert texts(drawn) == [TITLE, "SAE", "SWWAE", "$x_1$ alone"]
    assert [[text.get_text() for text in axis.texts] for axis in drawn.axes] == [[], ["no data yet"], ["no data yet"]]
    assert [len(axis.images) for axis in drawn.axes] == [1, 0, 0]
    drawn = figure({**runs, "swwae": run(tmp_path / "3", picture(3))})
    assert texts(drawn) == [TITLE, "images", "SAE", "SWWAE", "$x_1$ alone"]
    heights = [text.get_position()[1] for text in drawn.texts]
    assert heights == sorted(heights, reverse=True)
    for label, axis in zip(drawn.texts[1:], drawn.axes, strict=True):
        box = axis.get_position()
        assert label.get_position()[0] < box.x0
        assert box.y0 < label.get_position()[1] < box.y1


@pytest.mark.parametrize("drawn", [False, True])
def test_nothing_overlaps_or_leaves_the_sheet_however_long_the_names_are(figure, drawn, tmp_path):
    rows = {f"{number}, of a row with a label of a great many words " * number: "sae" for number in (1, 2, 9)}
    made = figure({"sae": run(tmp_path / "1", picture(1), "r")} if drawn else {}, Sheet("r", 0, rows), "n" * 90)
    boxes = [text.get_window_extent() for text in made.texts] + [axis.get_window_extent() for axis in made.axes]
    width, height = made.get_size_inches() * made.dpi
    for index, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width + 1
        assert box.y1 <= height + 1
        assert not any(box.overlaps(other) for other in boxes[:index])


def test_a_finished_run_without_the_picture_is_named_with_what_it_has(tmp_path):
    runs = {"swwae": run(tmp_path / "1", picture(1), "colors"), "alone": run(tmp_path / "2", picture(1))}
    assert missing_picture(SHEET, runs) == "swwae with seed 3 has no picture 'reconstruction'; it has colors"
    assert missing_picture(SHEET, {"sae": tmp_path / "3"}).endswith("has no picture 'reconstruction'; it has none")
    assert missing_picture(SHEET, {"alone": runs["alone"]}) == missing_picture(SHEET, {}) == ""
