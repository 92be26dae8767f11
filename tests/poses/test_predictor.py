"""What every predictor takes and gives, with a network that finds one person at the brightest pixel."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpetr import InputError, PoseResult, Skeleton
from hpetr.images.pixels import Resize
from hpetr.poses.predictor import Predictor


class BrightestPixel(Predictor):
    """One person of two keypoints with the scores 0.8 and 0.4 at the brightest pixel, with a score of 0.6."""

    threshold, keypoint_threshold = 0.3, 0.3
    skeleton = Skeleton.generic(2)
    default_batch_size = 2
    num_poses = 1
    device_name = "cpu"
    resize = Resize(64, 128)

    def __init__(self) -> None:
        self.class_names, self.batches = ["light"], list[int]()

    def predict(self, images: Sequence[np.ndarray], threshold: float | None = None) -> list[PoseResult]:
        self.batches.append(len(images))
        results = []
        for image in images:
            assert (image.dtype, image.shape[2]) == (np.uint8, 3)
            y, x = np.unravel_index(image.sum(axis=2).argmax(), image.shape[:2])
            result = PoseResult(
                keypoints=np.array([[[x, y], [x + 1, y + 1]]]),
                keypoint_scores=np.array([[0.8, 0.4]]),
                scores=np.array([0.6]),
                boxes=np.array([[x, y, x + 1, y + 1]]),
                labels=np.array([0]),
                skeleton=self.skeleton,
                image_size=image.shape[:2],
            )
            results.append(result[result.scores > (self.threshold if threshold is None else threshold)])
        return results


def light_at(x: int, y: int) -> np.ndarray:
    image = np.zeros((20, 30, 3), np.uint8)
    image[y, x] = 255
    return image


PLACES = [(3, 4), (10, 2), (29, 19), (0, 0), (7, 7)]


def places(results: Sequence[PoseResult]) -> list[tuple[int, int]]:
    return [tuple(map(int, result.keypoints[0, 0])) for result in results]


def as_tensor(images: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).movedim(3, 1)  # (B, 3, H, W)


def encoded(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_one_image_of_any_kind_gives_one_result(tmp_path: Path) -> None:
    image, path = light_at(3, 4), tmp_path / "a.png"
    path.write_bytes(encoded(image))
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    with path.open("rb") as file:
        for source in (
            image,
            path,
            str(path),
            path.read_bytes(),
            file,
            io.BytesIO(path.read_bytes()),
            tensor,
            tensor / 255,
        ):
            result = BrightestPixel()(source)
            assert places([result]) == [(3, 4)]
            assert result.path == (path if isinstance(source, str | Path) else None)


@pytest.mark.parametrize("batch_size", [None, 1, 3, np.int64(4)])
@pytest.mark.parametrize("make", [list, tuple, np.stack, as_tensor])
def test_several_images_give_a_list(make, batch_size: int | None) -> None:
    predictor = BrightestPixel()
    results = predictor(make([light_at(*place) for place in PLACES]), batch_size)
    assert isinstance(results, list)
    assert places(results) == PLACES
    assert max(predictor.batches) == (batch_size or 2)
    assert predictor([]) == []


def test_a_generator_gives_a_generator() -> None:
    read: list[tuple[int, int]] = []

    def images() -> Iterator[np.ndarray]:
        for place in PLACES:
            read.append(place)
            yield light_at(*place)

    results = BrightestPixel()(images(), batch_size=2)
    assert isinstance(results, Iterator)
    assert read == []
    assert places([next(results)]) == PLACES[:1]
    assert read == PLACES[:2], "no more is read than one batch"
    assert places(list(results)) == PLACES[1:]
    results = BrightestPixel()(images())
    assert places([next(results)]) == PLACES[:1]
    assert len(results) == 4
    assert places(list(results)) == PLACES[1:]
    assert len(results) == 0


def test_thresholds_of_a_call() -> None:
    predictor, image = BrightestPixel(), light_at(3, 4)
    assert [len(predictor(image, threshold=value)) for value in (0, 0.5, np.float32(0.7), 1)] == [1, 1, 0, 0]
    for results in ([predictor(image, keypoint_threshold=0.5)], predictor([image], keypoint_threshold=0.5)):
        assert results[0].found.tolist() == [[True, False]]
        assert results[0].boxes.tolist() == [[3, 4, 3, 4]]
    assert predictor(image).found.all()
    assert len(list(predictor(iter([image] * 3), threshold=0.7)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5, expected at least 1"),
        ({"threshold": 1.5}, r"threshold is 1.5, expected a number in 0..1"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": "0.3"}, "threshold is '0.3'"),
        ({"keypoint_threshold": -1}, r"keypoint_threshold is -1, expected a number in 0..1"),
    ],
)
def test_arguments_out_of_range(arguments: dict, message: str) -> None:
    for images in (light_at(1, 1), [light_at(1, 1)], iter([light_at(1, 1)])):
        with pytest.raises(InputError, match=message):
            BrightestPixel()(images, **arguments)


@pytest.mark.parametrize("images", [None, 3, {1: 2}, [None], b"", "https://example.org/a.jpg", io.StringIO("a")])
def test_what_is_no_image(images) -> None:
    with pytest.raises(InputError, match=r"expected|image"):
        BrightestPixel()(images)


def test_size_in_the_network() -> None:
    assert BrightestPixel().network_size(480, 640) == (64, 85)
