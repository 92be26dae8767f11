import cv2
import numpy as np
import pytest
from PIL import Image

from hpetr.errors import InputError
from hpetr.poses.draw import MIDDLE
from hpetr.poses.skeleton import COCO
from hpetr.training.recipe import Recipe
from hpetr.training.show_data import LEFT, PADDING, RIGHT, _cell, write_grid
from paths import TINY

ANNOTATIONS = TINY / "annotations.json"


def make_recipe(**augment):
    return Recipe.model_validate(
        {
            "output": "unused",
            "model": {"preset": "h-petr-nano"},
            "data": {"train": [{"annotations": ANNOTATIONS}]},
            "augment": {"short_sides": [96, 128], "long_side": 160, **augment},
            "processor": {"image_mean": [0.3, 0.4, 0.5], "pad_size_divisor": 32},
            "train": {"epochs": 1, "total_batch_size": 2},
        }
    )


@pytest.mark.parametrize("suffix", [".jpg", ".PNG"])
def test_grid_shows_as_many_images_as_asked_for(tmp_path, suffix):
    recipe = make_recipe(crop_short_sides=[100], crop=[90, 90], rotation=30, photometric=True)
    output = write_grid(recipe, tmp_path / "new" / f"grid{suffix}", images=7)  # tiny-coco has fewer: further epochs
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    with Image.open(output) as grid:
        assert grid.format == ("JPEG" if suffix == ".jpg" else "PNG")
        width, height = grid.size
    assert width == 3 * 406 + 6  # three columns and three rows for seven
    assert height == 3 * 428 + 6


def test_seed_chooses_and_repeats(tmp_path):
    recipe = make_recipe(rotation=20)
    first, again, other = (
        write_grid(recipe, tmp_path / f"{number}.png", 4, seed).read_bytes() for number, seed in enumerate((5, 5, 6))
    )
    assert first == again
    assert first != other


def test_the_pixels_are_the_networks(tmp_path):
    """Grey where an image ends, and the image's own colors elsewhere, whatever mean and deviation are."""
    recipe = make_recipe(flip=0.0)
    grid = np.asarray(Image.open(write_grid(recipe, tmp_path / "a.png", 4)))
    assert (grid == PADDING).all(axis=-1).any()
    for color in (LEFT, RIGHT):
        assert (grid == color).all(axis=-1).sum() > 20


def test_sides_of_a_cell():
    """A person seen from behind, whose left is on the image's left: the left limbs are drawn there."""
    person = np.zeros((17, 3), np.float32)
    for index, name in enumerate(COCO.names):
        x = 20 if "left" in name else 60 if "right" in name else 40
        person[index] = (x, 5 + 4 * index, 2)
    labels = {
        "keypoints": person[None],
        "boxes": np.array([[15, 2, 65, 75]], np.float32),
        "ignore_boxes": np.array([[70, 10, 78, 30]], np.float32),
    }
    cell = _cell(np.zeros((80, 80, 3), np.uint8), labels, COCO, "a.jpg", "80x80, 1 person")
    scene = cell[:400]  # enlarged five times

    def center(color):
        _, xs = np.nonzero((scene == color).all(axis=-1))
        assert len(xs) > 50
        return xs.mean() / 5

    assert center(LEFT) < 25
    assert center(RIGHT) > 55
    assert 30 < center(MIDDLE) < 50
    edge = cv2.inRange(scene[:, 350:352], (255, 90, 255), (255, 90, 255)).any(axis=1)
    assert 0.3 < edge[50:150].mean() < 0.8  # the ignored box is dashed


def test_long_and_foreign_names_fit():
    labels = {"keypoints": np.zeros((0, 17, 3)), "boxes": np.zeros((0, 4)), "ignore_boxes": np.zeros((0, 4))}
    cell = _cell(np.zeros((64, 64, 3), np.uint8), labels, COCO, "ü" * 200 + ".jpg", "64x64, 0 people")
    assert (cell[400:, 390:] == 250).all()  # nothing is cut off at the right


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("a.gif", {}, r"a\.gif: expected a file to write that ends in \.jpg or \.jpeg or \.png"),
        ("a.png", {"images": 0}, "at least 1 image"),
        ("a.png", {"seed": -1}, "seed of at least 0"),
    ],
)
def test_bad_arguments(tmp_path, name, arguments, message):
    with pytest.raises(InputError, match=message):
        write_grid(make_recipe(), tmp_path / name, **arguments)
    assert not (tmp_path / name).exists()


def test_an_image_of_the_data_is_not_replaced(tmp_path):
    output = tmp_path / "linked.jpg"
    image = next((TINY / "images").iterdir())
    before = image.read_bytes()
    output.symlink_to(image)
    with pytest.raises(InputError, match=r"linked\.jpg: is one of the inputs"):
        write_grid(make_recipe(), output)
    assert image.read_bytes() == before
