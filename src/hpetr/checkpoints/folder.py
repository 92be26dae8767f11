"""Checkpoint folders: finding one, and loading it whole or saying in one line what is wrong with it."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from hpetr.checkpoints.hub import download, is_hub_place
from hpetr.errors import InputError
from hpetr.model.config import HPetrConfig
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.image_processor import HPetrImageProcessor

if TYPE_CHECKING:
    import os

    from hpetr.checkpoints.card import Evaluation

BUNDLED = "h-petr-nano"
CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
HUB_FILES = (CONFIG, PROCESSOR, "model*.safetensors", f"{WEIGHTS}.index.json")


def bundled_checkpoint() -> Path:
    """The folder of the checkpoint that comes with the package."""
    return Path(str(files("hpetr"))) / "weights" / BUNDLED


def resolve_checkpoint(checkpoint: str | os.PathLike[str] | None) -> Path:
    """The folder meant: the one given, the bundled one for None and for its name, or of `hf://OWNER/NAME`, with
    `@REVISION` or without, the hub's cache, filled from the hub where it has to be.

    Raises:
        InputError: there is no such folder, or the hub gives none.
    """
    if is_hub_place(checkpoint):
        try:
            return download(str(checkpoint), HUB_FILES)
        except InputError as error:
            raise InputError(f"{checkpoint}: {error}") from error
    if checkpoint is None or (str(checkpoint) == BUNDLED and not Path(BUNDLED).exists()):
        folder = bundled_checkpoint()
    else:
        folder = Path(checkpoint)
    if folder.is_dir():
        return folder
    found = "is a file" if folder.exists() else "no such folder"
    hint = "; `hpetr convert` makes one of an official .pth" if folder.suffix in {".pth", ".pt"} else ""
    raise InputError(f"{folder}: {found}, expected a checkpoint folder with {CONFIG} and {WEIGHTS}{hint}")


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" is the first CUDA GPU where there is one, else the CPU.

    Raises:
        InputError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {device!s}: not available here ({str(error).splitlines()[0]})") from error
    return chosen


def load_checkpoint(
    checkpoint: str | os.PathLike[str] | None, device: str | torch.device = "auto"
) -> tuple[HPetrForPoseEstimation, HPetrImageProcessor]:
    """Model, in eval mode on the device, and processor of a folder that `save_pretrained` wrote.

    Only safetensors are read: a pickled weight file can run code, and is refused unopened.

    Raises:
        InputError: the folder is missing, incomplete, of another model type, or its weights are truncated or do not
            fit its configuration.
    """
    folder = resolve_checkpoint(checkpoint)
    chosen = resolve_device(device)
    config = load_config(folder)
    _check_files(folder)
    processor = load_processor(folder)
    return _load_model(folder, config).eval().to(chosen), processor


def load_config(folder: Path) -> HPetrConfig:
    """The folder's configuration.

    Raises:
        InputError: it is missing, not JSON, of another model type, or not valid.
    """
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder}: has no {CONFIG}, expected a checkpoint folder of hpetr") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({_first_line(error)})") from error
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type != HPetrConfig.model_type:
        raise InputError(f"{path}: model_type is {model_type!r}, expected {HPetrConfig.model_type!r}")
    return config_from(values, str(path))


def config_from(values: dict[str, Any], where: str) -> HPetrConfig:
    """A configuration from its dict; InputError, which begins with `where`, when a value is not valid."""
    try:
        return HPetrConfig.from_dict(values)
    except Exception as error:  # transformers reads keys of its own, each in its way
        raise InputError(f"{where}: {_first_line(error)}") from error


def load_processor(folder: Path) -> HPetrImageProcessor:
    """The folder's image processor.

    Raises:
        InputError: it is missing or not valid.
    """
    if not (folder / PROCESSOR).is_file():
        raise InputError(f"{folder}: has no {PROCESSOR}, expected it beside {CONFIG} (processor.save_pretrained)")
    try:
        return HPetrImageProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers reads keys of its own, each in its way
        raise InputError(f"{folder / PROCESSOR}: {_first_line(error)}") from error


def _check_files(folder: Path) -> None:
    if not any((folder / name).is_file() for name in (WEIGHTS, f"{WEIGHTS}.index.json")):
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
        hint = f"; {pickled[0]} is pickled and never loaded" if pickled else ""
        raise InputError(f"{folder}: has no {WEIGHTS}{hint}")


def build_shapes(config: HPetrConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, without any memory for them.

    Raises:
        InputError: no model can be built of this configuration.
    """
    try:
        with torch.device("meta"):
            return {name: tuple(t.shape) for name, t in HPetrForPoseEstimation(config).state_dict().items()}
    except Exception as error:  # modules check what they are made of, each in its way
        raise InputError(f"config: no model can be built of it ({_first_line(error)})") from error


def _check_size(folder: Path, config: HPetrConfig) -> None:
    """Refuse weights that are less than the configuration asks for, before there is memory for what it asks."""
    try:
        expected = build_shapes(config)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from error
    stored: dict[str, list[int]] = {}
    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as content:
            stored |= {name: content.get_slice(name).get_shape() for name in content.keys()}
    if sum(map(math.prod, expected.values())) > sum(map(math.prod, stored.values())):
        missing = expected.keys() - stored.keys()
        wrong = missing or {name for name in expected if list(expected[name]) != list(stored[name])}
        raise InputError(_misfit(folder, "is missing" if missing else "has another shape", wrong))


def _weight_files(folder: Path) -> list[Path]:
    """The file of the weights, or those that its index names, which are all in the folder."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = json.loads((folder / f"{WEIGHTS}.index.json").read_text(encoding="utf-8"))
    names = sorted(set(index["weight_map"].values()))
    if not names or any(Path(name).name != name or not (folder / name).is_file() for name in names):
        raise ValueError(f"{WEIGHTS}.index.json names files that are not in the folder")
    return [folder / name for name in names]


def _misfit(folder: Path, problem: str, names: Collection[str]) -> str:
    return f"{folder / WEIGHTS}: tensor {min(names)!r} {problem} ({len(names)} such), expected the weights of {CONFIG}"


def _load_model(folder: Path, config: HPetrConfig) -> HPetrForPoseEstimation:
    try:
        _check_size(folder, config)
        with quiet_transformers():
            # Tensors that are missing or of another shape are filled with random numbers; the report tells which.
            loaded: Any = HPetrForPoseEstimation.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,  # the file may be float16 to be small; a CPU computes in float32
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except InputError:
        raise
    except Exception as error:  # safetensors, torch and transformers: a file may hold anything
        raise InputError(f"{folder / WEIGHTS}: cannot be read, truncated? ({_first_line(error)})") from error
    model, report = loaded
    for problem, keys in (
        ("is missing", report["missing_keys"]),
        ("belongs to no module", report["unexpected_keys"]),
        ("has another shape", [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]),
    ):
        if keys:
            raise InputError(_misfit(folder, problem, keys))
    _check_finite(folder, model)
    return model


def _check_finite(folder: Path, model: HPetrForPoseEstimation) -> None:
    tensors = {name: t for name, t in model.state_dict().items() if t.is_floating_point() and t.numel()}
    largest = torch.stack(torch._foreach_norm(list(tensors.values()), math.inf))
    if not bool(largest.isfinite().all()):
        name = list(tensors)[int((~largest.isfinite()).nonzero()[0])]
        raise InputError(f"{folder / WEIGHTS}: tensor {name!r} holds NaN or infinity, expected finite numbers")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no reports in the log; what is wrong becomes an error instead."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def save_checkpoint(
    model: HPetrForPoseEstimation,
    processor: HPetrImageProcessor,
    folder: Path,
    *,
    half: bool = False,
    evaluation: Evaluation | None = None,
    name: str | None = None,
) -> None:
    """Write model and processor as a new checkpoint folder, which appears whole or not at all.

    Args:
        half: store matrices and convolutions as float16. Vectors stay float32: running variances can pass
            65,504. `load_checkpoint` and `from_pretrained` give a float32 model all the same.
        evaluation: figures of these weights for the model card.
        name: of the model in its card; None takes the folder's.

    Raises:
        InputError: the folder exists and is not empty, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists already, expected a new or empty folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            unfinished = Path(temporary) / folder.name
            with quiet_transformers():
                state = model.state_dict()
                if half:
                    state = {key: value.half() if value.ndim > 1 else value for key, value in state.items()}
                model.save_pretrained(unfinished, state_dict=state, evaluation=evaluation, name=name)
            processor.save_pretrained(unfinished)
            open_as_others(unfinished)
            if folder.exists():
                folder.rmdir()
            unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        raise InputError(f"{folder}: cannot be written ({reason})") from error


def open_as_others(folder: Path) -> None:
    """Give a folder's weights the permissions of its other files; safetensors lets only the owner read them, whom a
    server or a colleague may not be.
    """
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / CONFIG, path)
