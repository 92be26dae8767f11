"""The JSON of the API, as its OpenAPI description shows it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from hpetr.poses.result import PoseResult

PIXEL_DIGITS, SCORE_DIGITS = 3, 6
# Lists of a fixed length: what is said of tuples (prefixItems) few readers of an OpenAPI description understand.
Edge = Annotated[list[int], Field(min_length=2, max_length=2)]
Box = Annotated[list[float], Field(min_length=4, max_length=4)]


class Size(BaseModel):
    """Pixels of the image after rotation by EXIF."""

    width: int
    height: int


class Keypoint(BaseModel):
    """One joint, in pixels of the image from its top left corner."""

    name: str
    x: float
    y: float
    score: float = Field(description="0..1")


class Pose(BaseModel):
    """One person, animal, ..."""

    score: float = Field(description="0..1")
    label: str = Field(description="Name of the class.")
    box: Box = Field(description="Left, top, right, bottom of the keypoints.")
    keypoints: list[Keypoint] = Field(description="In the order of `keypoint_names`.")


class Prediction(BaseModel):
    """The poses of one image, best first."""

    model: str
    image: Size
    threshold: float = Field(description="All poses have a higher score.")
    keypoint_names: list[str]
    edges: list[Edge] = Field(description="Limbs, as pairs of indices into the keypoints from 0.")
    poses: list[Pose]


class ModelInfo(BaseModel):
    """What the server runs."""

    model: str
    classes: list[str]
    keypoint_names: list[str]
    edges: list[Edge] = Field(description="Limbs, as pairs of indices into the keypoints from 0.")
    threshold: float = Field(description="Taken when a request names none.")
    max_poses: int = Field(description="The network gives at most so many.")
    max_bytes: int = Field(description="Of an upload.")
    max_pixels: int = Field(description="Of an image.")
    timeout: float = Field(description="Seconds.")
    device: str
    version: str = Field(description="Of hpetr.")


class Health(BaseModel):
    """Whether images are taken."""

    status: str


class Problem(BaseModel):
    """Why there are no poses."""

    kind: str = Field(description="One word for programs.")
    detail: str = Field(description="One sentence for people.")


def to_prediction(result: PoseResult, model: str, class_names: list[str], threshold: float) -> Prediction:
    """A result as the API gives it, coordinates to a thousandth of a pixel."""
    names = result.skeleton.names

    def pixel(value: float) -> float:
        return round(float(value), PIXEL_DIGITS)

    poses = [
        Pose(
            score=round(float(score), SCORE_DIGITS),
            label=class_names[label] if label < len(class_names) else str(label),
            box=[pixel(side) for side in box],
            keypoints=[
                Keypoint(
                    name=name,
                    x=pixel(x),
                    y=pixel(y),
                    score=round(float(keypoint_score), SCORE_DIGITS),
                )
                for name, (x, y), keypoint_score in zip(names, keypoints, keypoint_scores, strict=True)
            ],
        )
        for score, label, box, keypoints, keypoint_scores in zip(
            result.scores, result.labels, result.boxes, result.keypoints, result.keypoint_scores, strict=True
        )
    ]
    height, width = result.image_size
    return Prediction(
        model=model,
        image=Size(width=width, height=height),
        threshold=threshold,
        keypoint_names=list(names),
        edges=[list(edge) for edge in result.skeleton.edges],
        poses=poses,
    )
