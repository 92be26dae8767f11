"""Training: recipe to checkpoint, through transformers' Trainer."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import torch
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from hpetr.checkpoints.backbone_weights import copy_weights, load_backbone_weights, prepare_backbone
from hpetr.checkpoints.card import CARD, is_own_text
from hpetr.checkpoints.folder import build_on_meta, config_from, load_checkpoint
from hpetr.data.check import shared_images
from hpetr.data.dataset import NO_FLIPS, PoseDataset
from hpetr.errors import InputError, first_line, suggestion
from hpetr.images.files import check_writable
from hpetr.inference import processes
from hpetr.model.config import HPetrConfig
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.poses.skeleton import Skeleton
from hpetr.training.callbacks import Console, RunCallback, StopOnSignal
from hpetr.training.data import TrainingSet, build_transform, common_skeleton, mean_color, open_data
from hpetr.training.recipe import BACKBONE_WEIGHTS, Recipe
from hpetr.training.report import draw_samples, write_report
from hpetr.training.run import (
    Interrupted,
    Say,
    check_same_run,
    checkpoint_to_resume,
    clear_unfinished,
    own_folder,
    restore_log,
    say,
    write_recipe,
)
from hpetr.training.trainer import PoseTrainer

REPORT_IMAGES = 8


def train(recipe: Recipe, resume: str | Path | None = None) -> Path:
    """Run a recipe and return the folder of the trained checkpoint; under torchrun, as one of its processes.

    The folder holds the trained model (of the last step; the averaged weights if the recipe asks for an average),
    `best/` (of the best AP, with validation data), `checkpoint-N/` to resume from, `log.jsonl`, `recipe.yaml` and
    `report.html`.

    Args:
        recipe: see `load_recipe`.
        resume: "auto" = the newest checkpoint of the recipe's output if there is one, or a checkpoint's folder.

    Raises:
        InputError: bad recipe or data, before any training; an image that cannot be read, or a checkpoint that cannot
            be written, during it.
        FloatingPointError: a loss became NaN or infinite; names the images and the terms.
        Interrupted: Ctrl+C or SIGTERM; a checkpoint was written after the step.
    """
    trainer, checkpoint = processes.together(lambda: prepare(recipe, resume))
    stop = StopOnSignal()
    trainer.add_callback(stop)
    with own_folder(recipe.output, active=trainer.args.should_save):
        if trainer.args.should_save:
            clear_unfinished(recipe.output)
            restore_log(recipe.output, checkpoint)
            write_recipe(recipe)
        try:
            with stop.watch():
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            if number := max(processes.gather(stop.number)):
                raise Interrupted(recipe.output, number)
            if trainer.val is not None and trainer.evaluation() is None:
                trainer.evaluate()
            return _finish(trainer, recipe)
        except KeyboardInterrupt as error:
            if trainer.args.should_save:
                clear_unfinished(recipe.output)
            raise error if isinstance(error, Interrupted) else Interrupted(recipe.output, signal.SIGINT) from None
        except InputError as error:
            # The message of a process that loads images has its traceback in front.
            problem = InputError(str(error).rsplit("InputError: ", 1)[-1].strip())
            problem.alone = True
            raise problem from error


def prepare(recipe: Recipe, resume: str | Path | None) -> tuple[PoseTrainer, Path | None]:
    """Do everything that can fail before the first step.

    Returns:
        The trainer, and the checkpoint to resume from.

    Raises:
        InputError: see `train`.
    """
    arguments = training_arguments(recipe)
    tell = say if arguments.process_index == 0 else None
    checkpoint = checkpoint_to_resume(recipe.output, resume, tell)
    set_seed(recipe.train.seed)
    cv2.setNumThreads(0)  # the workers are the parallelism; OpenCV's own threads would compete with the model's
    data, val, skeleton = open_training(recipe, tell)
    for key, images in (("train", data), ("val", val)):
        if images is not None and len(images) < arguments.world_size:
            raise InputError(
                f"data.{key}: {len(images)} images for {arguments.world_size} processes, expected at least one each"
            )
    model = build_model(recipe, skeleton, data.datasets[0].class_names, checkpoint, tell)
    if arguments.should_save:
        check_writable(recipe.output)
    _freeze(model, recipe)
    if checkpoint is None:
        prepare_backbone(model)
    if recipe.train.gradient_checkpointing:
        with warnings.catch_warnings():
            # Newer releases have another name for it, the oldest supported one does not.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
    transformers_logging.disable_progress_bar()  # of the writing of every single file
    trainer = PoseTrainer(recipe.train, model, recipe.processor.build(), data, val, arguments)
    for unwanted in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(unwanted)
    trainer.add_callback(RunCallback(trainer))
    trainer.add_callback(Console(terminal=sys.stderr.isatty()))
    if recipe.train.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.train.patience))
    return trainer, checkpoint


def open_training(recipe: Recipe, tell: Say | None = None) -> tuple[TrainingSet, PoseDataset | None, Skeleton]:
    """Open the recipe's training images, augmented, and validation images; return them with their skeleton.

    Args:
        tell: called with a line about each data set and each warning; None keeps silent.

    Raises:
        InputError: a source is not valid or empty, or two skeletons disagree.
    """
    tell = tell or (lambda line: None)
    datasets = [open_data(source) for source in recipe.data.train]
    val = None if recipe.data.val is None else open_data(recipe.data.val)
    every = datasets if val is None else [*datasets, val]
    skeleton = common_skeleton(every, sigmas_given=recipe.data.sigmas is not None)
    if recipe.data.sigmas is not None:
        if len(recipe.data.sigmas) != skeleton.num_keypoints:
            raise InputError(f"data.sigmas: {len(recipe.data.sigmas)} numbers, expected {skeleton.num_keypoints}")
        skeleton = replace(skeleton, sigmas=tuple(recipe.data.sigmas))
    for source, dataset in zip(recipe.data.train, datasets, strict=True):
        left_out = int((~dataset.has_people).sum()) if source.only_with_people else 0
        note = f"; {left_out:,} images without people left out" if left_out else ""
        tell(f"train: {source.annotations}: {dataset.report}{note}")
    if val is not None:
        val.skeleton = skeleton
        tell(f"val: {val.path}: {val.report}")
    for warning in dict.fromkeys(warning for dataset in every for warning in dataset.warnings):
        tell(f"warning: {warning}")
    if recipe.augment.flip and not skeleton.can_flip:
        tell(f"warning: {datasets[0].path}: {NO_FLIPS}")
    if not sum(dataset.report.people for dataset in datasets):
        raise InputError(f"data.train: no person with labelled keypoints in {datasets[0].path}, expected some to learn")
    if val is not None:
        if not val.report.people:
            raise InputError(f"data.val: no person with labelled keypoints in {val.path}, expected people to find")
        if shared := shared_images(datasets, val):
            some = ", ".join(path.name for path in shared[:3]) + (", ..." if len(shared) > 3 else "")
            tell(f"warning: {len(shared)} of {len(val)} images of val are in train too: {some}; its AP will flatter")
    transform = build_transform(recipe.augment, recipe.processor, skeleton)
    mosaics, fill = recipe.augment.mosaic, mean_color(recipe.processor)
    data = TrainingSet(datasets, recipe.data.train, transform, recipe.train.seed, mosaics, fill)
    return data, val, skeleton


def build_model(
    recipe: Recipe, skeleton: Skeleton, class_names: list[str], checkpoint: Path | None = None, tell: Say | None = None
) -> HPetrForPoseEstimation:
    """Build the recipe's model for the data's skeleton and classes, with the weights it starts from.

    Args:
        checkpoint: of the run that is resumed; its weights will replace these, so the backbone's are not loaded.
        tell: called with a line about the weights; None keeps silent.

    Raises:
        InputError: an unknown preset or option, weights that are missing or do not fit, or the checkpoint is of another
            run.
    """
    data_options = {
        "num_keypoints": skeleton.num_keypoints,
        "skeleton": skeleton.to_dict(),
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: label for label, name in enumerate(class_names)},
    }
    start = None
    if recipe.model.weights in ("none", *BACKBONE_WEIGHTS):
        config = HPetrConfig.preset(recipe.model.preset, **{**data_options, **recipe.model.options})
    else:
        start, _ = load_checkpoint(recipe.model.weights, "cpu")
        config = config_from({**start.config.to_dict(), **data_options, **recipe.model.options}, "model.options")
    if checkpoint is not None:
        check_same_run(checkpoint, recipe, config)
    try:
        build_on_meta(config)
    except InputError as error:
        raise InputError(f"model.options: {error}") from error
    model = HPetrForPoseEstimation(config)
    source = recipe.model.backbone_weights or recipe.model.weights
    if checkpoint is None and source != "none":
        if start is not None:
            loaded = f"{recipe.model.weights}: {copy_weights(start, model)}"
        else:
            loaded = load_backbone_weights(model, source)
        if tell is not None:
            tell(f"weights: {loaded}")
    return model


def _freeze(model: HPetrForPoseEstimation, recipe: Recipe) -> None:
    """Exclude parameters from training, by `backbone_lr_factor` and `only`."""
    if recipe.train.backbone_lr_factor == 0 and recipe.train.backbone_relative_lr is None:
        model.backbone.body.requires_grad_(False)
        if model.backbone.prior is not None:
            model.backbone.prior.requires_grad_(False)
    if only := recipe.train.only:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name.startswith(tuple(only)))
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise InputError(f"train.only: {only}, expected beginnings of names of parameters, as joint_decoder.")


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Return transformers' arguments of a recipe.

    Raises:
        InputError: the batch cannot be shared by the processes, a package is missing, or an argument is unknown or
            the recipe's own.
    """
    settings = recipe.train
    count = int(os.environ.get("WORLD_SIZE", "1"))
    batch = settings.batch_size or max(settings.total_batch_size // count, 1)
    if settings.total_batch_size % (batch * count):
        raise InputError(
            f"train.total_batch_size is {settings.total_batch_size}, expected a multiple of {count} processes x "
            f"{batch} images"
        )
    for package in settings.report_to:
        if find_spec(package) is None:
            raise InputError(f"train.report_to: {package} is not installed: pip install {package}")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(recipe.output / "tensorboard")
    os.environ["WANDB_DIR"] = str(recipe.output)
    ours: dict[str, Any] = dict(
        output_dir=str(recipe.output),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=settings.total_batch_size // (batch * count),
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip if settings.tensor_clip is None else float("inf"),
        use_cpu=not torch.cuda.is_available(),
        bf16=settings.precision == "bfloat16",
        seed=settings.seed,
        data_seed=settings.seed,
        dataloader_num_workers=settings.workers,
        dataloader_persistent_workers=settings.workers > 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,  # it would wait for the device in every step, and hide what must stop the run
        save_steps=settings.save_every,
        eval_strategy="steps" if settings.eval_every and recipe.data.val is not None else "no",
        eval_steps=settings.eval_every or None,
        metric_for_best_model="AP",
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=list(settings.report_to) or "none",
    )
    _check_arguments(settings.arguments, ours, averaged=settings.ema is not None)
    try:
        arguments = TrainingArguments(**ours, **settings.arguments)
        _ = arguments.device
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise InputError(f"train: {first_line(error)}") from error
    if arguments.n_gpu > 1:
        # transformers would spread the batch over all GPUs by DataParallel, which cannot split lists of labels.
        arguments._n_gpu = 1
        say(
            f"one of {torch.cuda.device_count()} GPUs is used; "
            "for all of them: torchrun --nproc_per_node gpu -m hpetr train ..."
        )
    return arguments


def _check_arguments(extra: dict[str, Any], ours: dict[str, Any], *, averaged: bool) -> None:
    """Raise `InputError` for arguments of a recipe that are unknown, its own, or of no use on this machine."""
    known = {field.name for field in fields(TrainingArguments)}
    for name in extra:
        if name not in known:
            hint = suggestion(name, known, "expected one of transformers' TrainingArguments")
            raise InputError(f"train.arguments: unknown argument {name!r}, {hint}")
        if name in ours:
            raise InputError(f"train.arguments: {name!r} is set by the recipe's own keys")
    if _deepspeed_stage(extra.get("deepspeed")) > 2:
        raise InputError(
            "train.arguments: deepspeed's stage 3 builds the model in pieces, which take no weights to start from; "
            "expected stage 1 or 2, or fsdp"
        )
    sharding = [name for name in ("fsdp", "deepspeed") if extra.get(name)]
    if sharding and not torch.cuda.is_available():
        raise InputError(f"train.arguments: {sharding[0]} needs GPUs, and there is none here")
    if sharding and averaged:
        raise InputError(f"train.ema: cannot average what {sharding[0]} spreads over processes, expected null")


def _deepspeed_stage(config: Any) -> int:
    """Return ZeRO's stage in DeepSpeed's configuration: a dict, the path of a JSON, or None."""
    if isinstance(config, str):
        try:
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"train.arguments: deepspeed: {config}: cannot be read as JSON ({error})") from None
    values = config.get("zero_optimization") if isinstance(config, dict) else None
    return values.get("stage", 0) if isinstance(values, dict) else 0


def _finish(trainer: PoseTrainer, recipe: Recipe) -> Path:
    """Write the trained model beside the run's checkpoints, and the report."""
    final = trainer.write_trained("final")
    model = trainer.trained()
    if trainer.args.should_save:
        for path in sorted(final.iterdir()):
            if path.name != CARD or not is_own_text(recipe.output):
                path.replace(recipe.output / path.name)
        clear_unfinished(recipe.output)
        samples = draw_samples(model, trainer.processor, trainer.val or trainer.data.datasets[0], REPORT_IMAGES)
        write_report(recipe.output, recipe, trainer.data.datasets, trainer.val, samples)
    trainer.accelerator.wait_for_everyone()
    return recipe.output
