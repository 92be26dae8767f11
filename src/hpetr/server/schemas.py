"""The JSON of the API, as its OpenAPI description shows it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from hpetr.poses.result import PoseResult

PIXEL_DIGITS, SCORE_DIGITS = 3, 6
# Lists of a fixed length: few readers of an OpenAPI description understand prefixItems, the form of tuples.
Edge = Annotated[list[int], Field(min_length=2, max_length=2)]
Box = Annotated[list[float], Field(min_length=4, max_length=4)]


class NoParameters(BaseModel, extra="forbid"):
    """Query of an address without parameters."""


class Parameters(NoParameters):
    """Query of a prediction."""

    threshold: float | None = Field(
        None, ge=0, le=1, description="Poses with a higher score are returned. Default: the model's own."
    )
    keypoint_threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Keypoints with a lower score are not drawn, and do not count in boxes. Default: the model's own.",
    )
    format: Literal["json", "image"] | None = Field(
        None, description="`image` returns the image with the poses drawn. Default: as the header `Accept` asks for."
    )


class Size(BaseModel):
    """Pixels of the image after rotation by EXIF."""

    width: int
    height: int


class Keypoint(BaseModel):
    """One keypoint, in pixels of the image from its top left corner."""

    name: str
    x: float
    y: float
    score: float = Field(description="0..1")


class Pose(BaseModel):
    """One person, animal, ..."""

    score: float = Field(description="0..1")
    label: str = Field(description="Name of the class.")
    box: Box = Field(description="Left, top, right, bottom of the keypoints that count.")
    keypoints: list[Keypoint] = Field(description="In the order of `keypoint_names`.")


class Prediction(BaseModel):
    """The poses of one image, best first."""

    model: str
    image: Size
    threshold: float = Field(description="All poses have a higher score.")
    keypoint_threshold: float = Field(description="Keypoints with a lower score do not count in boxes.")
    keypoint_names: list[str]
    edges: list[Edge] = Field(description="Limbs, as pairs of indices into the keypoints from 0.")
    poses: list[Pose]


class ModelInfo(BaseModel):
    """The model and the limits of the server."""

    model: str
    classes: list[str]
    keypoint_names: list[str]
    edges: list[Edge] = Field(description="Limbs, as pairs of indices into the keypoints from 0.")
    threshold: float = Field(description="Used when a request has none.")
    keypoint_threshold: float = Field(description="Used when a request has none.")
    max_poses: int = Field(description="Maximum number of poses in an image.")
    max_bytes: int = Field(description="Of an upload.")
    max_pixels: int = Field(description="Of an image.")
    timeout: float = Field(description="Seconds.")
    device: str
    version: str = Field(description="Of hpetr.")


class Health(BaseModel):
    """Whether images are taken."""

    status: str


class Problem(BaseModel):
    """The reason why there are no poses."""

    kind: str = Field(description="One word for programs.")
    detail: str = Field(description="One sentence for people.")


def to_prediction(result: PoseResult, model: str, class_names: list[str], threshold: float) -> Prediction:
    """Return a result in the form of the API, coordinates rounded to a thousandth of a pixel."""
    names = result.skeleton.names
    columns = [
        values.astype(float).round(digits).tolist()
        for values, digits in zip(
            (result.scores, result.boxes, result.keypoints, result.keypoint_scores),
            (SCORE_DIGITS, PIXEL_DIGITS, PIXEL_DIGITS, SCORE_DIGITS),
            strict=True,
        )
    ]
    poses = [
        Pose(
            score=score,
            label=class_names[label] if label < len(class_names) else str(label),
            box=box,
            keypoints=[
                Keypoint(name=name, x=x, y=y, score=keypoint_score)
                for name, (x, y), keypoint_score in zip(names, keypoints, keypoint_scores, strict=True)
            ],
        )
        for label, score, box, keypoints, keypoint_scores in zip(result.labels.tolist(), *columns, strict=True)
    ]
    height, width = result.image_size
    return Prediction(
        model=model,
        image=Size(width=width, height=height),
        threshold=threshold,
        keypoint_threshold=result.keypoint_threshold,
        keypoint_names=list(names),
        edges=[list(edge) for edge in result.skeleton.edges],
        poses=poses,
    )
