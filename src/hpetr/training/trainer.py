"""transformers' Trainer with this method's loss terms, learning rates, evaluation and whole checkpoints."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import rotate_checkpoints

from hpetr.checkpoints.card import Evaluation, data_name
from hpetr.checkpoints.folder import open_as_others, save_checkpoint
from hpetr.data.collate import PoseCollator
from hpetr.data.dataset import PoseDataset
from hpetr.errors import InputError, first_line
from hpetr.evaluation.evaluate import evaluate
from hpetr.inference.torch_predictor import default_batch_size
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.image_processor import HPetrImageProcessor
from hpetr.training.data import EpochSampler, TrainingSet
from hpetr.training.optimizer import SteadyAdamW, parameter_groups, schedule_factor
from hpetr.training.recipe import TrainRecipe
from hpetr.training.run import BEST, EVAL_PREFIX, UNFINISHED, publish

AVERAGE = "average.safetensors"  # the averaged weights, beside model.safetensors in a checkpoint


@contextmanager
def _one_line(checkpoint: str | None, part: str) -> Iterator[None]:
    """Turn any error of torch's readers on a broken file of a checkpoint into an `InputError`."""
    try:
        yield
    except Exception as error:
        reason = f"cannot be read ({first_line(error)})"
        if isinstance(error, pickle.UnpicklingError):
            reason = "holds pickled objects other than tensors or is broken; nothing in it was executed"
        raise InputError(f"resume {checkpoint}: the {part} {reason}") from error


def obey_main_process(worker: int) -> None:
    """Make a process that loads images end with the main process alone, not by a signal to all processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parents_signal, daemon=True).start()


def _wait_for_parents_signal() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def weight_average(model: torch.nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of the weights.

    Its decay grows with the number n of steps, (1 + n) / (10 + n), up to `decay`: a short run would otherwise average
    mostly over its random start.
    """

    def update(averaged: Any, current: Any, count: Any) -> None:
        now = min(decay, (1 + int(count)) / (10 + int(count)))  # the count lies on the host
        torch._foreach_lerp_(averaged, current, 1 - now)

    return AveragedModel(model, multi_avg_fn=update)


def whole_copy(model: HPetrForPoseEstimation, device: torch.device) -> HPetrForPoseEstimation:
    """Return a model with all the weights of one whose parameters are sharded; all processes call it together."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    copy = HPetrForPoseEstimation(model.config)
    cast(torch.nn.Module, copy).to(device)
    copy.load_state_dict(state)
    return copy.eval()


class PoseTrainer(Trainer):
    """transformers' Trainer for this method.

    Args:
        recipe: the run's `train` section.
        val: data to evaluate on, or None.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        model: HPetrForPoseEstimation,
        processor: HPetrImageProcessor,
        data: TrainingSet,
        val: PoseDataset | None,
        args: TrainingArguments,
    ):
        self.collator = PoseCollator.from_processor(processor)
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collator,
            train_dataset=data,
            eval_dataset=val,
            processing_class=processor,
        )
        self.recipe, self.network, self.processor, self.data, self.val = recipe, model, processor, data, val
        self.output = Path(cast(str, args.output_dir))
        self.sampler = EpochSampler(data, recipe.total_batch_size, recipe.seed, bucketing=recipe.bucketing)
        # Loss terms of the micro-batches since the last log, with the ids and paths of their images. They stay on the
        # device until then: to read them in every step would make a GPU wait.
        self.pending: list[tuple[tuple[str, str], dict[str, torch.Tensor]]] = []
        self.seconds, self.steps = 0.0, 0  # of the steps since the last log, without evaluations and checkpoints
        self.average: AveragedModel | None = None
        if recipe.ema is not None:
            self.average = weight_average(cast(torch.nn.Module, model).to(args.device), recipe.ema)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.sampler

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        # A stopped run ends its step first, for which it may need further images.
        cast(Any, loader).base_dataloader.worker_init_fn = obey_main_process
        return loader

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(cast(torch.nn.Module, model or self.model), self.recipe)
            decay, clip = self.recipe.weight_decay, self.recipe.tensor_clip
            if clip is None:
                self.optimizer = torch.optim.AdamW(groups, weight_decay=decay)
            else:
                self.optimizer = SteadyAdamW(groups, clip, weight_decay=decay)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None):
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                cast(torch.optim.Optimizer, optimizer or self.optimizer),
                lambda step: schedule_factor(step, num_training_steps, self.recipe),
            )
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, paths = (", ".join(map(str, column)) for column in zip(*inputs.pop("images"), strict=True))
        inputs["pixel_values"] = self.collator.normalize(inputs["pixel_values"], inputs["pixel_mask"])
        try:
            output = model(**inputs)
        except FloatingPointError as error:
            self.check_losses()  # an earlier loss may be the reason
            step = self.state.global_step + 1
            raise FloatingPointError(f"step {step}, images {ids}: {error}; files: {paths}") from None
        self.pending.append(((ids, paths), {name: value.detach() for name, value in output.loss_dict.items()}))
        return (output.loss, output) if return_outputs else output.loss

    def check_losses(self) -> dict[str, float]:
        """Return the mean of every loss term since the last log; one copy from the device.

        Raises:
            FloatingPointError: a term is NaN or infinite; names the first step's images and all its terms.
        """
        if not self.pending:
            return {}
        names = list(self.pending[0][1])
        rows = torch.stack([torch.stack([terms[name] for name in names]) for _, terms in self.pending]).float().cpu()
        for ((ids, paths), _), row in zip(self.pending, rows, strict=True):
            if not row.isfinite().all():
                terms = ", ".join(f"{name} = {value:g}" for name, value in zip(names, row.tolist(), strict=True))
                raise FloatingPointError(f"images {ids}: the loss is not finite: {terms}; files: {paths}")
        return dict(zip(names, rows.mean(0).tolist(), strict=True))

    def check_weights(self) -> None:
        """Raise FloatingPointError if a weight is NaN or infinite: such a model must not become a checkpoint."""
        norms = torch._foreach_norm([p.detach() for p in self.trained().parameters()])
        if not bool(torch.stack(norms).isfinite().all()):
            images = self.pending[-1][0][1] if self.pending else "unknown"
            raise FloatingPointError(
                f"step {self.state.global_step}: weights are no longer finite, though the losses were; "
                f"last images: {images}"
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            terms = self.check_losses()
            self.pending.clear()
            if self.args.world_size > 1:
                means = torch.tensor(list(terms.values()), device=self.args.device)
                dist.all_reduce(means)
                terms = dict(zip(terms, (means / self.args.world_size).tolist(), strict=True))
            logs |= {name: round(value, 5) for name, value in terms.items()}
            logs["step_seconds"] = round(self.seconds / max(self.steps, 1), 4)
            self.seconds, self.steps = 0.0, 0
        super().log(logs, *args, **kwargs)

    def trained(self) -> HPetrForPoseEstimation:
        """Return the model that evaluations and the result use: the averaged one if there is an average.

        Of a model whose weights are spread over the processes every process gets a whole copy: an evaluation gives
        processes different numbers of batches, and a spread model would wait for all of them in each.
        """
        if self.average is not None:
            return cast(HPetrForPoseEstimation, self.average.module)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return self.network
        return whole_copy(self.network, self.args.device)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the COCO metrics on the validation data as `eval_AP`, ...; write the best model so far to `best/`."""
        assert self.val is not None
        self.check_losses()
        done, total = 0, len(self.val)

        def progress(images: int) -> None:
            nonlocal done
            done += images
            handler = self.callback_handler
            handler.call_event("on_prediction_step", self.args, self.state, self.control, done=done, total=total)

        result = evaluate(self.trained(), self.processor, self.val, default_batch_size(self.network), progress)
        metrics = {f"eval_{name}": value for name, value in result.metrics.items()}
        self.log(dict(metrics))
        best = self.state.best_metric
        if metrics["eval_AP"] > (-math.inf if best is None else best):
            unfinished = self.write_trained(BEST)
            if self.args.should_save:
                publish(unfinished, self.output / BEST)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluation(self) -> Evaluation | None:
        """Return the metrics of the current weights, None before their evaluation."""
        step = self.state.global_step
        logged = [e for e in self.state.log_history if e["step"] == step and f"{EVAL_PREFIX}AP" in e]
        if self.val is None or not logged:
            return None
        metrics = {k.removeprefix(EVAL_PREFIX): v for k, v in logged[-1].items() if k.startswith(EVAL_PREFIX)}
        return Evaluation(data_name(self.val.path), len(self.val), metrics)

    def write_trained(self, name: str) -> Path:
        """Write the trained model and the processor as a checkpoint folder, not yet in its place; return it."""
        unfinished = self.output / UNFINISHED / name
        model, name = self.trained(), self.output.resolve().name
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
            save_checkpoint(model, self.processor, unfinished, evaluation=self.evaluation(), name=name)
        return unfinished

    def _get_output_dir(self, trial: Any) -> str:
        """Return the folder that checkpoints are written into; they get their place when they are whole."""
        return str(self.output / UNFINISHED)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            (Path(cast(str, output_dir)) / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that nothing reads

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, whole or not at all.

        Raises:
            InputError: it cannot be written, a full disk for example; the last good one stays.
            FloatingPointError: see `check_losses` and `check_weights`.
        """
        self.check_losses()
        self.check_weights()
        # transformers would note the best checkpoint among the unfinished ones, and miss it there on resuming; `best/`
        # keeps it.
        self.state.best_global_step = None
        name = f"checkpoint-{self.state.global_step}"
        unfinished = self.output / UNFINISHED / name
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.average is not None:
                    save_file(self.average.module.state_dict(), unfinished / AVERAGE)
                open_as_others(unfinished)
                publish(unfinished, self.output / name)
                rotate_checkpoints(str(self.output), self.recipe.keep)
        except (OSError, SafetensorError, RuntimeError) as error:
            # torch's writer does not name a full disk: the free space does.
            reason = f"{first_line(error)}; {shutil.disk_usage(self.output).free / 2**20:,.1f} MB free there"
            shutil.rmtree(unfinished, ignore_errors=True)
            raise InputError(
                f"{self.output / name}: the checkpoint cannot be written ({reason}); the ones before it are whole"
            ) from error
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _one_line(resume_from_checkpoint, "weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if self.average is not None:
                self.average.module.load_state_dict(load_file(Path(resume_from_checkpoint) / AVERAGE))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _one_line(checkpoint, "random numbers' state"):
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _one_line(checkpoint, "optimizer's and schedule's state"):
            super()._load_optimizer_and_scheduler(checkpoint)
        if self.average is not None and checkpoint is not None:
            self.average.n_averaged.fill_(self.state.global_step)
