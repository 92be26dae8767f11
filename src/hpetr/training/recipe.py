"""Training recipes: one YAML file of plain values, checked completely before any work starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from hpetr.errors import InputError, suggestion
from hpetr.model.image_processor import HPetrImageProcessor


class Strict(BaseModel):
    """Base of all sections. Unknown keys are errors: a misspelt learning rate must not become the default."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


RECIPES = Path(__file__).resolve().parent / "recipes"
BACKBONE_WEIGHTS = ("imagenet", "movenet")  # names of weights that a backbone starts from


class ModelRecipe(Strict):
    """The model and its initial weights."""

    preset: str
    options: dict[str, Any] = Field(default={}, description="overrides of the preset, see HPetrConfig")
    weights: str = Field(
        default="none", description="'imagenet' or 'movenet' (the backbone's), 'none', or a checkpoint's folder"
    )
    backbone_weights: str | None = Field(
        default=None, description="another source of the backbone's weights: hub id, folder or file"
    )

    @model_validator(mode="after")
    def _one_start(self) -> ModelRecipe:
        if self.backbone_weights is not None and self.weights not in ("none", *BACKBONE_WEIGHTS):
            raise ValueError("backbone_weights has no effect beside the weights of a checkpoint, expected one of them")
        return self


class DataSource(Strict):
    """Labelled images: a COCO or CrowdPose keypoint JSON, or a YOLO-pose `data.yaml`."""

    annotations: Path
    images: Path | None = Field(default=None, description="JSON: default the folder `images` beside the annotations")
    split: str | None = Field(default=None, description="YOLO-pose: train, val or test")
    area_of_box: float | None = Field(default=None, gt=0, description="area of a person = this share of its box")
    limit: int | None = Field(default=None, ge=1, description="the first images only")
    only_with_people: bool = Field(
        default=False, description="leave out images without annotations, as the published runs do"
    )
    repeat: int = Field(default=1, ge=1, description="how often an epoch sees each image")
    unlabelled: Literal["unknown", "absent"] = Field(
        default="unknown",
        description="meaning of a keypoint without label for a model with keypoint_scores: unknown, or not visible",
    )


class DataRecipe(Strict):
    """Images to train on and, optionally, to evaluate on during training."""

    train: list[DataSource] = Field(min_length=1)
    val: DataSource | None = None
    sigmas: list[float] | None = Field(default=None, description="of OKS, one a keypoint; default: the data's")


class SideRange(Strict):
    """All whole numbers of pixels in a range, both ends included."""

    first: int = Field(ge=32, alias="from")
    last: int = Field(ge=32, alias="to")

    @model_validator(mode="after")
    def _ascending(self) -> SideRange:
        if self.last < self.first:
            raise ValueError(f"to is {self.last}, expected at least from = {self.first}")
        return self


# The tags choose one of the two by the value's form, so that an error describes that one alone.
_SIDE_TAGS = ("list of pixels", "from and to")
Sides = Annotated[
    Annotated[list[int], Field(min_length=1), Tag(_SIDE_TAGS[0])] | Annotated[SideRange, Tag(_SIDE_TAGS[1])],
    Discriminator(lambda value: _SIDE_TAGS[isinstance(value, dict | SideRange)]),
]


class AugmentRecipe(Strict):
    """Augmentation; the published training pipeline (PETR, CVPR 2022)."""

    short_sides: Sides = Field(description="short side drawn from these pixels: a list, or {from: 400, to: 1400}")
    long_side: int = Field(ge=32, description="limit of the long side, pixels")
    crop_short_sides: list[int] = Field(default=[], description="short side before a random crop; [] = no crops")
    crop: tuple[int, int] = Field(default=(384, 600), description="height and width of the crop")
    flip: float = Field(default=0.5, ge=0, le=1)
    rotation: float = Field(default=0.0, ge=0, le=180, description="degrees, either way")
    shear: float = Field(default=0.0, ge=0, lt=90, description="degrees, either way, along x and along y")
    photometric: bool = False
    mosaic: float = Field(default=0.0, ge=0, le=1, description="share of images joined with three others")


class ProcessorRecipe(Strict):
    """The image processor that training, evaluation and the saved checkpoint share."""

    shortest_edge: int = 800
    longest_edge: int = 1333
    image_mean: tuple[float, float, float] = (123.675 / 255, 116.28 / 255, 103.53 / 255)
    image_std: tuple[float, float, float] = (58.395 / 255, 57.12 / 255, 57.375 / 255)
    pad_size_divisor: int = 1
    threshold: float = 0.3

    def build(self) -> HPetrImageProcessor:
        return HPetrImageProcessor(
            size={"shortest_edge": self.shortest_edge, "longest_edge": self.longest_edge},
            image_mean=self.image_mean,
            image_std=self.image_std,
            pad_size_divisor=self.pad_size_divisor,
            threshold=self.threshold,
        )


class TrainRecipe(Strict):
    """Optimization. Every interval counts optimizer steps."""

    epochs: float = Field(gt=0)
    total_batch_size: int = Field(default=8, ge=1, description="images of an optimizer step, over all processes")
    batch_size: int | None = Field(
        default=None,
        ge=1,
        description="images that go through the network together in a process; gradients accumulate up to the total",
    )
    lr: float = Field(default=2e-4, gt=0)
    backbone_lr_factor: float = Field(default=0.1, ge=0, description="0 = the backbone is not trained")
    backbone_relative_lr: float | None = Field(
        default=None, gt=0, description="the backbone's rate as a share of each tensor's typical weight, not of lr"
    )
    prior_lr_factor: float = Field(default=1.0, ge=0, description="of the prior, with backbone_relative_lr")
    offsets_lr_factor: float = Field(default=0.1, ge=0, description="of sampling_offsets")
    only: list[str] = Field(default=[], description="train only parameters of such beginnings, as joint_decoder.")
    weight_decay: float = Field(default=1e-4, ge=0)
    clip: float = Field(default=0.1, gt=0, description="maximum norm of the gradients")
    tensor_clip: float | None = Field(
        default=None, gt=0, description="clip each tensor's gradient to this multiple of its running norm, not by clip"
    )
    schedule: Literal["step", "cosine"] = "step"
    drops: list[float] = Field(default=[0.8], description="shares of the run after which `step` divides lr by 10")
    warmup_steps: int = Field(default=0, ge=0)
    seed: int = 0
    workers: int = Field(default=2, ge=0, description="processes that load images, for each training process")
    log_every: int = Field(default=20, ge=1)
    save_every: int = Field(default=500, ge=1, description="a multiple of log_every")
    keep: int = Field(default=2, ge=1, description="checkpoints kept for resuming")
    eval_every: int = Field(default=0, ge=0, description="0 = only at the end")
    patience: int | None = Field(default=None, ge=1, description="evaluations without a better AP before the run stops")
    ema: float | None = Field(default=None, gt=0, lt=1, description="decay of an average of the weights, e.g. 0.9998")
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = Field(default=False, description="less memory for about a third more time")
    bucketing: bool = Field(default=True, description="images of similar shape go together, which cuts padding")
    report_to: list[Literal["tensorboard", "wandb"]] = []
    arguments: dict[str, Any] = Field(
        default={}, description="further arguments of transformers' TrainingArguments, e.g. fsdp or deepspeed"
    )

    @model_validator(mode="after")
    def _consistent(self) -> TrainRecipe:
        # The mean loss since the last log is no part of a checkpoint. As every checkpoint follows a log, a resumed run
        # logs the same values as an uninterrupted one.
        if self.save_every % self.log_every:
            raise ValueError(f"save_every is {self.save_every}, expected a multiple of log_every = {self.log_every}")
        if self.patience and not self.eval_every:
            raise ValueError("patience needs evaluations during the run, expected eval_every above 0")
        return self


class Recipe(Strict):
    """A whole training run, see `hpetr train RECIPE`."""

    output: Path
    model: ModelRecipe
    data: DataRecipe
    augment: AugmentRecipe
    processor: ProcessorRecipe = ProcessorRecipe()
    train: TrainRecipe


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: YAML file, or the name of a recipe in the package, such as `h-petr-nano`. A key `base:` names one other
            recipe, a file relative to it or a name, whose values this one overrides.
        overrides: `key.key=value`, values in YAML; a list's entries count from 0: `data.train.0.limit=16`.

    Raises:
        InputError: names the file, the key and the expected value.
    """
    path = _find(path, Path())
    values = _read(path)
    if (base := values.pop("base", None)) is not None:
        parent = _read(_find(str(base), path.parent))
        if "base" in parent:
            raise InputError(f"{path}: base {base!r} has a base of its own, expected at most one level")
        values = _merge(parent, values)
    for override in overrides or []:
        _override(values, override)
    try:
        recipe = Recipe.model_validate(values)
        recipe_values(recipe)
        return recipe
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: {error.object!r} is half of a surrogate pair, expected text") from None
    except ValidationError as error:
        raise InputError(f"{path}: {_first_problem(error)}") from None


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """Return the whole recipe, defaults included, as plain values."""
    return recipe.model_dump(mode="json", by_alias=True)


def recipe_yaml(recipe: Recipe) -> str:
    """Return the whole recipe, defaults included, as the text of a file that `load_recipe` reads."""
    return yaml.safe_dump(recipe_values(recipe), sort_keys=False, default_flow_style=None, width=100)


def _find(place: str | Path, folder: Path) -> Path:
    """Return the path of a recipe: a file, relative to the folder, or the name of one in the package."""
    path = folder / place
    if os.path.isfile(path) or len(Path(place).parts) != 1:
        return path
    names = [recipe.stem for recipe in RECIPES.glob("*.yaml")]
    if Path(place).suffix not in (".yaml", ".yml") and str(place) not in names:
        raise InputError(f"recipe {place}: no such file, {suggestion(str(place), names, 'expected a YAML file')}")
    packaged = RECIPES / f"{str(place).removesuffix('.yaml')}.yaml"
    return packaged if packaged.is_file() else path


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the recipe ({error.strerror or error})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of recipe keys")
    if path.resolve().parent == RECIPES:  # data that come with the package are named relative to the recipe
        for source in values.get("data", {}).get("train", []):
            if (data := RECIPES / source["annotations"]).is_file():
                source["annotations"] = str(data)
    return values


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r}: expected key=value, e.g. train.lr=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: the value is not YAML") from None
    *parents, last = key.split(".")
    node: Any = values
    for name in parents:
        if isinstance(node, list):
            node = node[_index(node, name, override)]
        elif isinstance(node, dict):
            node = node.setdefault(name, {})
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise InputError(f"override {override!r}: {'.'.join(parents)} has no keys")


def _index(node: list[Any], name: str, override: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise InputError(f"override {override!r}: expected a number below {len(node)} instead of {name!r}")
    return int(name)


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Return the valid keys beside the unknown one that `location` names."""
    model: type[BaseModel] = Recipe
    for part in location[:-1]:
        if isinstance(part, str) and part in model.model_fields:
            annotation = str(model.model_fields[part].annotation)
            model = next((c for c in Strict.__subclasses__() if c.__name__ in annotation), model)
    return list(model.model_fields)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    location = tuple(part for part in problem["loc"] if part not in _SIDE_TAGS)
    key = ".".join(str(part) for part in location)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location)
        hint = suggestion(str(problem["loc"][-1]), known, f"expected one of {', '.join(known)}")
        return f"unknown key {key!r}, {hint}{more}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]}{more}"
