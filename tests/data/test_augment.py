import colorsys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpetr.data import (
    Compose,
    HPetrImageProcessor,
    KeepRatioResize,
    OneOf,
    PhotometricDistortion,
    RandomAffine,
    RandomCropResize,
    RandomHorizontalFlip,
    RandomResize,
    Sample,
)
from hpetr.data.augment import mosaic

FLIP_INDEX = [0, 2, 1, 4, 3]  # K = 5
FIELDS = ("image", "keypoints", "boxes", "areas", "class_labels", "ignore_boxes")


def make_sample(height=120, width=160, people=4, seed=0, margin=0.0):
    """Random people whose keypoints, at least `margin` of a side from the border, are all labelled but the last."""
    rng = np.random.default_rng(seed)
    keypoints = np.zeros((people, 5, 3), np.float32)
    keypoints[..., :2] = rng.uniform(margin, 1 - margin, (people, 5, 2)) * (width, height)
    keypoints[..., 2] = rng.integers(1, 3, (people, 5))
    keypoints[:, 4] = 0
    labelled = keypoints[:, :4, :2]
    return Sample(
        image=rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        keypoints=keypoints,
        boxes=np.concatenate([labelled.min(1), labelled.max(1)], axis=1),
        areas=rng.uniform(10, 1000, people).astype(np.float32),
        class_labels=np.arange(people),
        ignore_boxes=np.array([[10, 20, 50, 60]], np.float32),
        image_id=1,
        path=Path("a.png"),
    )


def sample_with_a_dot(x, y, height=120, width=160):
    """One person whose only labelled keypoint, 1, is at x, y, and a bright dot on black there."""
    sample = make_sample(height, width, people=1)
    sample.keypoints[:] = 0
    sample.keypoints[0, 1] = (x, y, 2)
    sample.boxes[:] = (x - 5, y - 5, x + 5, y + 5)
    sample.image[:] = 0
    center = (round(x * 256 - 128), round(y * 256 - 128))  # OpenCV counts from the center of the first pixel
    cv2.circle(sample.image, center, 3 * 256, (255, 255, 255), cv2.FILLED, cv2.LINE_AA, 8)
    return sample


def centroid(image):
    weights = image[..., 0].astype(float)
    ys, xs = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    return np.array([(xs * weights).sum(), (ys * weights).sum()]) / weights.sum()


def all_transforms():
    return [
        RandomHorizontalFlip(0.5, FLIP_INDEX),
        RandomResize(range(40, 141), 140),
        RandomCropResize(RandomResize([40, 50, 60], 420), RandomResize(range(40, 141), 140), (38, 60), (38, 60)),
        RandomAffine(30, shear=5, scale=(0.5, 1.5)),
        PhotometricDistortion(),
        KeepRatioResize(80, 133),
    ]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), people=st.integers(0, 4), which=st.integers(0, 5))
def test_every_transform_keeps_the_invariants(seed, people, which):
    sample = make_sample(people=people, seed=seed)
    before = {name: getattr(sample, name).copy() for name in FIELDS}
    result = all_transforms()[which](sample, np.random.default_rng(seed))
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(sample, name), before[name])  # the input is left alone
        assert getattr(result, name).dtype == before[name].dtype
    height, width = result.image.shape[:2]
    count = len(result.keypoints)
    assert result.boxes.shape == (count, 4)
    assert result.areas.shape == result.class_labels.shape == (count,)
    labelled = result.keypoints[..., 2] > 0
    assert labelled.any(axis=1).all()
    assert (np.diff(result.class_labels) > 0).all()  # those who are left keep their order
    assert (result.keypoints[~labelled] == 0).all()
    for boxes in (result.boxes, result.ignore_boxes):
        assert (boxes >= 0).all()
        assert (boxes[:, [0, 2]] <= width).all()
        assert (boxes[:, [1, 3]] <= height).all()
        assert (boxes[:, 2:] >= boxes[:, :2]).all()
    assert (result.keypoints[..., :2] <= (width, height)).all()


@pytest.mark.parametrize("transform", all_transforms(), ids=lambda transform: type(transform).__name__)
def test_a_seed_fixes_the_result(transform):
    first, second = (transform(make_sample(), np.random.default_rng(5)) for _ in range(2))
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 300))
def test_flip_twice_is_identity(seed, width):
    sample = make_sample(width=width, seed=seed)
    flip = RandomHorizontalFlip(1.0, FLIP_INDEX)
    rng = np.random.default_rng(0)
    twice = flip(flip(sample, rng), rng)
    np.testing.assert_array_equal(twice.image, sample.image)
    np.testing.assert_allclose(twice.keypoints, sample.keypoints, atol=1e-3)
    np.testing.assert_allclose(twice.boxes, sample.boxes, atol=1e-3)
    np.testing.assert_allclose(twice.areas, sample.areas)


def test_flip_maps_the_left_joint_to_the_right_joint():
    sample = make_sample(people=1)
    flipped = RandomHorizontalFlip(1.0, FLIP_INDEX)(sample, np.random.default_rng(0))
    left, right = 1, 2
    assert flipped.keypoints[0, right] == pytest.approx(sample.keypoints[0, left] * (-1, 1, 1) + (160, 0, 0))
    assert (flipped.keypoints[0, 3] == 0).all()  # its partner 4 is not labelled
    assert flipped.ignore_boxes.tolist() == [[110, 20, 150, 60]]


class Given:
    """Random numbers that are not: every `uniform` is this share of the way from the one limit to the other."""

    def __init__(self, share):
        self.share = share

    def uniform(self, low, high, size=None):
        value = low + self.share * (high - low)
        return value if size is None else np.full(size, value)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(angle=st.floats(-30, 30), seed=st.integers(0, 2**32 - 1))
def test_rotating_there_and_back_returns_the_keypoints(angle, seed):
    sample = make_sample(seed=seed, margin=0.3)
    rotate = RandomAffine(30)
    turned = rotate(sample, Given((angle + 30) / 60))
    back = rotate(turned, Given((30 - angle) / 60))
    np.testing.assert_allclose(back.keypoints, sample.keypoints, atol=0.5)
    np.testing.assert_allclose(back.areas, sample.areas, rtol=1e-5)


def test_a_positive_angle_turns_clockwise_about_the_center():
    sample = make_sample(height=100, width=100, people=1)
    sample.keypoints[0, :4, :2] = [[50, 50], [90, 50], [50, 10], [60, 60]]
    result = RandomAffine(30)(sample, Given(1.0))  # 30 degrees; y points down
    cosine, sine = 40 * np.cos(np.pi / 6), 40 * 0.5
    expected = [[50, 50], [50 + cosine, 50 + sine], [50 + sine, 50 - cosine]]
    np.testing.assert_allclose(result.keypoints[0, :3, :2], expected, atol=1e-3)


def test_shear_moves_both_axes_by_the_tangent():
    sample = make_sample(height=100, width=100, people=1)
    sample.keypoints[0, :4, :2] = [[50, 50], [50, 90], [90, 50], [60, 60]]
    result = RandomAffine(0, shear=2)(sample, Given(1.0))
    shift = 40 * np.tan(np.deg2rad(2))
    expected = [[50, 50], [50 + shift, 90], [90, 50 + shift]]
    np.testing.assert_allclose(result.keypoints[0, :3, :2], expected, atol=1e-3)


@pytest.mark.parametrize(
    "transform",
    [
        RandomAffine(30, shear=5, scale=(0.8, 1.2), fill=(0, 0, 0)),
        RandomHorizontalFlip(1.0, FLIP_INDEX),
        RandomResize(range(60, 301), 1000),
        RandomCropResize(RandomResize([120], 1000), RandomResize(range(80, 201), 1000), (110, 110), (140, 140)),
        Compose([RandomAffine(20, fill=(0, 0, 0)), RandomHorizontalFlip(1.0, FLIP_INDEX), KeepRatioResize(90, 200)]),
    ],
    ids=["affine", "flip", "resize", "crop", "compose"],
)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(x=st.floats(55, 105), y=st.floats(40, 80), seed=st.integers(0, 2**32 - 1))
def test_the_image_moves_exactly_as_the_keypoints_do(transform, x, y, seed):
    result = transform(sample_with_a_dot(x, y), np.random.default_rng(seed))
    labelled = result.keypoints[0, result.keypoints[0, :, 2] > 0, :2]
    assert len(labelled) == 1
    assert np.abs(centroid(result.image) - labelled[0]).max() < 0.5


def test_areas_scale_with_the_square_of_the_scale():
    sample = make_sample(height=100, width=200)
    resized = RandomResize([250], 10_000)(sample, np.random.default_rng(0))
    assert resized.image.shape == (250, 500, 3)
    np.testing.assert_allclose(resized.areas, sample.areas * 2.5**2, rtol=1e-6)
    np.testing.assert_allclose(resized.boxes, sample.boxes * 2.5, rtol=1e-5)
    np.testing.assert_allclose(resized.ignore_boxes, sample.ignore_boxes * 2.5)
    affine = RandomAffine(0, scale=(0.5, 0.5))(sample, np.random.default_rng(0))
    np.testing.assert_allclose(affine.areas, sample.areas * 0.25, rtol=1e-5)


def test_people_who_leave_are_dropped_and_keypoints_outside_are_unlabelled():
    sample = make_sample(height=100, width=100, people=2)
    sample.keypoints[0, :4, :2] = [[5, 5], [50, 50], [51, 51], [95, 95]]
    sample.keypoints[1, :4, :2] = 2
    sample.boxes[:] = [[5, 5, 95, 95], [1, 1, 3, 3]]
    sample.ignore_boxes = np.array([[0, 0, 10, 10], [30, 30, 60, 60]], np.float32)
    shrink_view = RandomAffine(0, scale=(2, 2))
    result = shrink_view(sample, np.random.default_rng(0))  # shows 25..75 of the image
    assert result.class_labels.tolist() == [0]
    expected = np.zeros((5, 3))
    expected[1:3] = sample.keypoints[0, 1:3]
    expected[2, :2] = 52
    np.testing.assert_allclose(result.keypoints[0], expected, atol=1e-4)
    assert result.boxes.tolist() == [[0, 0, 100, 100]]
    assert result.ignore_boxes.tolist() == [[10, 10, 70, 70]]


@pytest.mark.parametrize(("fill", "pixel"), [({}, [124, 116, 104]), ({"fill": (127.0, 10, 0)}, [127, 10, 0])])
def test_rotation_fills_with_the_mean(fill, pixel):
    sample = make_sample()
    sample.image[:] = 0
    result = RandomAffine(30, **fill)(sample, np.random.default_rng(3))
    assert result.image.shape == sample.image.shape
    assert result.image[0, 0].tolist() == pixel


def test_random_resize_stays_within_its_sides():
    rng = np.random.default_rng(0)
    shorts = {min(RandomResize(range(40, 61), 1000)(make_sample(), rng).image.shape[:2]) for _ in range(200)}
    assert shorts == set(range(40, 61))
    assert max(RandomResize([100], 110)(make_sample(), rng).image.shape[:2]) == 110


def test_crop_takes_the_whole_side_where_the_image_is_smaller():
    crop = RandomCropResize(RandomResize([100], 1000), RandomResize([50], 1000), (384, 384), (60, 60))
    assert crop(make_sample(), np.random.default_rng(0)).image.shape == (83, 50, 3)  # a cut of 100 x 60


def test_one_of_takes_each_of_its_transforms():
    one_of = OneOf([KeepRatioResize(40, 1000), KeepRatioResize(60, 1000)])
    rng = np.random.default_rng(0)
    assert {one_of(make_sample(), rng).image.shape[0] for _ in range(20)} == {40, 60}


def test_photometric_distortion_changes_colors_within_its_limits():
    sample = make_sample()
    sample.image[:] = (100, 120, 140)
    rng = np.random.default_rng(0)
    distort = PhotometricDistortion(swap_channels=0)
    results = np.array([distort(sample, rng).image[0, 0] for _ in range(300)])
    assert results.min() >= (100 - 32) * 0.5 - 30
    assert results.max() <= (140 + 32) * 1.5 + 30
    assert results.std(axis=0).min() > 15
    assert (results == (100, 120, 140)).all(axis=1).any()  # one in sixteen leaves the image as it is


def test_photometric_distortion_turns_the_hue():
    sample = make_sample()
    sample.image[:] = (200, 100, 100)
    distort = PhotometricDistortion(brightness=0, contrast=(1, 1), saturation=(1, 1), hue=18, swap_channels=0)
    greens, blues = zip(
        *(distort(sample, np.random.default_rng(s)).image[0, 0, 1:].tolist() for s in range(60)), strict=True
    )
    assert max(greens) <= 100 + 100 * 18 / 60 + 1
    assert max(greens) > 120
    assert max(blues) > 120
    assert min(greens + blues) == 100


def published_color(rgb, shift, before, saturation, after):
    """One pixel, 0..255, by the definition in the standard library."""
    red, green, blue = (max(0.0, (value + shift) * before) for value in rgb)
    hue, strength, value = colorsys.rgb_to_hsv(red, green, blue)
    result = np.array([value - (value - c) * saturation for c in colorsys.hsv_to_rgb(hue, strength, value)])
    return np.clip(result * after, 0, 255)


def test_photometric_distortion_follows_the_published_steps():
    """All pixels of a result come from one combination of steps, and every combination occurs."""
    sample = make_sample(6, 8)
    distort = PhotometricDistortion(brightness=0, contrast=(1.4, 1.4), saturation=(1.5, 1.5), hue=0, swap_channels=0)
    contrasts = ((1, 1), (1.4, 1), (1, 1.4))
    combinations = [(before, saturation, after) for before, after in contrasts for saturation in (1, 1.5)]
    pixels = sample.image.reshape(-1, 3)
    expected = np.array([[published_color(rgb, 0, *combination) for rgb in pixels] for combination in combinations])
    seen = set()
    for seed in range(60):
        result = distort(sample, np.random.default_rng(seed)).image.reshape(-1, 3)
        errors = np.abs(expected - result).max(axis=(1, 2))  # (combinations,)
        assert errors.min() <= 0.51
        seen |= set(np.flatnonzero(errors <= 0.51))
    assert seen == set(range(len(combinations)))


def test_channel_swap_is_a_permutation_of_the_channels():
    sample = make_sample()
    swap = PhotometricDistortion(brightness=0, contrast=(1, 1), saturation=(1, 1), hue=0, swap_channels=1)
    orders = set()
    for seed in range(60):
        image = swap(sample, np.random.default_rng(seed)).image
        order = tuple(
            next(old for old in range(3) if (image[..., new] == sample.image[..., old]).all()) for new in range(3)
        )
        orders.add(order)
    assert len(orders) == 6


def test_evaluation_resize_is_the_processors():
    sample = make_sample(97, 131)
    resized = KeepRatioResize(80, 133)(sample)
    processor = HPetrImageProcessor(
        size={"shortest_edge": 80, "longest_edge": 133}, image_mean=[0] * 3, image_std=[1] * 3
    )
    values = processor(sample.image, return_tensors="np")["pixel_values"][0]  # (3, H, W)
    assert resized.image.shape[:2] == values.shape[1:]
    np.testing.assert_array_equal(np.rint(values.transpose(1, 2, 0) * 255), resized.image)


def test_mosaic_shows_four_images_with_their_people_in_place():
    """Dots come out where their keypoints say; areas scale with the square; nobody leaves their quarter."""
    sizes, dots = [(120, 160), (200, 100), (80, 80), (150, 170)], [(30, 40), (60, 150), (40.5, 40.5), (100, 20)]
    samples = [sample_with_a_dot(*dot, *size) for dot, size in zip(dots, sizes, strict=True)]
    result = mosaic(samples, fill=(0, 0, 0))
    side = round(np.mean([160, 200, 80, 170]))
    assert result.image.shape == (2 * side, 2 * side, 3)
    assert len(result.keypoints) == len(result.boxes) == len(result.areas) == len(result.class_labels) == 4
    assert len(result.ignore_boxes) == 4
    for place, (sample, size) in enumerate(zip(samples, sizes, strict=True)):
        left, top = place % 2 * side, place // 2 * side
        x, y = result.keypoints[place, 1, :2]
        np.testing.assert_allclose(
            centroid(result.image[top : top + side, left : left + side]), (x - left, y - top), atol=0.5
        )
        np.testing.assert_allclose(result.areas[place], sample.areas[0] * (side / max(size)) ** 2, rtol=0.03)
        assert (result.keypoints[place, [0, 2, 3, 4]] == 0).all()
