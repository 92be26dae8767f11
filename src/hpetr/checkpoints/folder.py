"""Find, load and write checkpoint folders; errors are one line each."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hpetr.checkpoints.card import Evaluation, model_card, write_card
from hpetr.errors import InputError, first_line
from hpetr.model.config import HPetrConfig
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.image_processor import HPetrImageProcessor

Model = TypeVar("Model", bound=PreTrainedModel)
BUNDLED = "h-petr-nano"
CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
HUB_FILES = (CONFIG, PROCESSOR, "model*.safetensors", INDEX)
# In front of OWNER/NAME or OWNER/NAME@REVISION. Without it a misspelt folder would be looked for on the network.
SCHEME = "hf://"
FLOATS = ("F64", "F32", "F16", "BF16")  # names of safetensors
# Problems of tensors.
MISSING, EXTRA, WRONG = "is missing", "belongs to no module", "has another shape"


@contextmanager
def one_line(before: str, after: str = "") -> Iterator[None]:
    """Raise any exception as an InputError with the first line of its message; libraries raise many kinds."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{before}{first_line(error)}{after}") from error


def is_hub_place(place: object) -> bool:
    """Return whether a checkpoint's name asks for the hub."""
    return isinstance(place, str) and place.startswith(SCHEME)


def download(place: str, patterns: Sequence[str] = HUB_FILES) -> Path:
    """Return the local folder of a hub repository, filled from the hub or its cache.

    Args:
        place: `OWNER/NAME` or `OWNER/NAME@REVISION`, with `SCHEME` in front or without.
        patterns: of the files' names.

    Raises:
        InputError: no such repository, or no network and nothing in the cache.
    """
    repository, _, revision = place.removeprefix(SCHEME).partition("@")
    hint = f"`hf download {repository}{f' --revision {revision}' if revision else ''} --local-dir FOLDER` elsewhere"
    with one_line("the Hugging Face hub gave nothing (", f"); without network, run {hint}"):
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))


def bundled_checkpoint() -> Path:
    """Return the folder of the checkpoint that comes with the package."""
    return Path(str(resources.files("hpetr"))) / "weights" / BUNDLED


def resolve_checkpoint(checkpoint: str | os.PathLike[str] | None) -> Path:
    """Return the local folder of a checkpoint.

    Args:
        checkpoint: a folder, `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`; None or its name for the bundled one.

    Raises:
        InputError: there is no such folder, or the hub gives none.
    """
    if is_hub_place(checkpoint):
        with one_line(f"{checkpoint}: "):
            return download(str(checkpoint))
    if checkpoint is None or (str(checkpoint) == BUNDLED and not Path(BUNDLED).exists()):
        checkpoint = bundled_checkpoint()
    folder = Path(checkpoint)
    if os.path.isdir(folder):
        with one_line(f"{folder}: cannot be read (", ")"):
            os.listdir(folder)
        return folder
    found = "is a file" if os.path.exists(folder) else "no such folder"
    hint = "; `hpetr convert` makes one of an official .pth" if folder.suffix in {".pth", ".pt"} else ""
    raise InputError(f"{folder}: {found}, expected a checkpoint folder with {CONFIG} and {WEIGHTS}{hint}")


def resolve_device(device: str | torch.device) -> torch.device:
    """Return a device; "auto" is the first CUDA GPU if there is one, else the CPU.

    Raises:
        InputError: no such device here, or one that cannot compute.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with one_line(f"device {device!s}: not available here (", ")"):
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
        if chosen.type == "meta":
            raise ValueError("tensors on it hold no numbers")
    return chosen


def load_checkpoint(
    checkpoint: str | os.PathLike[str] | None, device: str | torch.device = "auto"
) -> tuple[HPetrForPoseEstimation, HPetrImageProcessor]:
    """Load the model of a checkpoint, in eval mode on the device, and its processor.

    Only safetensors are read: a pickled weight file can run code, and is refused unopened.

    Args:
        checkpoint: see `resolve_checkpoint`.
        device: see `resolve_device`.

    Raises:
        InputError: the folder is missing, incomplete, of another model type, or its weights are truncated or do not
            fit its configuration.
    """
    folder = resolve_checkpoint(checkpoint)
    chosen = resolve_device(device)
    config = load_config(folder)
    files = weight_files(folder)
    processor = load_processor(folder)
    _check_stored(folder, config, files)
    with one_line(f"{folder / WEIGHTS}: cannot be read, truncated? (", ")"):
        model, misfits = read_weights(HPetrForPoseEstimation, folder, config)
    _refuse(folder, misfits)
    _check_finite(folder, model)
    return model.eval().to(chosen), processor


def load_config(folder: Path) -> HPetrConfig:
    """Load the folder's configuration.

    Raises:
        InputError: it is missing, not JSON, of another model type, or not valid.
    """
    return config_from(read_config(folder, HPetrConfig.model_type), str(folder / CONFIG))


def read_config(folder: Path, model_type: str) -> dict[str, Any]:
    """Read a folder's config.json.

    Raises:
        InputError: it is missing, not JSON, or of another model type.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder}: has no {CONFIG}, expected a checkpoint folder of {model_type}")
    with one_line(f"{path}: cannot be read as JSON (", ")"):
        values = json.loads(path.read_text(encoding="utf-8"))
    found = values.get("model_type") if isinstance(values, dict) else None
    if found != model_type:
        hint = "; a checkpoint of hpetr belongs in model.weights" if found == HPetrConfig.model_type else ""
        raise InputError(f"{path}: model_type is {found!r}, expected {model_type!r}{hint}")
    return values


def config_from(values: dict[str, Any], where: str) -> HPetrConfig:
    """Return the configuration of a dict; an InputError about its values begins with `where`."""
    with one_line(f"{where}: "):
        return HPetrConfig.from_dict(values)


def load_processor(folder: Path) -> HPetrImageProcessor:
    """Load the folder's image processor.

    Raises:
        InputError: it is missing or not valid.
    """
    if not (folder / PROCESSOR).is_file():
        raise InputError(f"{folder}: has no {PROCESSOR}, expected it beside {CONFIG} (processor.save_pretrained)")
    expected = HPetrImageProcessor.__name__
    with one_line(f"{folder / PROCESSOR}: "):
        kind = json.loads((folder / PROCESSOR).read_text(encoding="utf-8")).get("image_processor_type", expected)
        if kind != expected:
            raise ValueError(f"image_processor_type is {kind!r}, expected {expected!r}")
        return HPetrImageProcessor.from_pretrained(folder, local_files_only=True)


def build_on_meta(config: HPetrConfig) -> HPetrForPoseEstimation:
    """Build a model whose tensors have names and shapes but no memory.

    Raises:
        InputError: no model can be built of this configuration.
    """
    with one_line("config: no model can be built of it (", ")"), torch.device("meta"):
        return HPetrForPoseEstimation(config)


def weight_files(folder: Path) -> list[Path]:
    """Return a folder's safetensors file, or the files that its index names.

    Raises:
        InputError: there is none, or the index is not valid.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        hint = f"; {pickled[0]} is pickled and never loaded" if pickled else ""
        raise InputError(f"{folder}: has no {WEIGHTS}{hint}")
    with one_line(f"{folder / INDEX}: cannot be read (", ")"):
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / Path(name).name for name in names]
    if not files or not all(path.is_file() for path in files):
        raise InputError(f"{folder / INDEX}: expected names of files in the folder")
    return files


def read_weights(kind: type[Model], folder: Path, config: PreTrainedConfig) -> tuple[Model, dict[str, list[str]]]:
    """Load a model from a folder's safetensors, in float32; transformers' exceptions are not translated.

    Returns:
        The model, and by problem the names of tensors that do not fit. Those that the model lacks are random.
    """
    with quiet_transformers():
        loaded: Any = kind.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            dtype=torch.float32,  # the file may be float16 to be small; a CPU computes in float32
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model, report = loaded
    wrong = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    return model, {MISSING: sorted(report["missing_keys"]), EXTRA: sorted(report["unexpected_keys"]), WRONG: wrong}


def _check_stored(folder: Path, config: HPetrConfig, files: Sequence[Path]) -> None:
    """Refuse integers for floats, and less weights than the configuration asks for, before there is memory for them."""
    with one_line(f"{folder / CONFIG}: "):
        expected = build_on_meta(config).state_dict()
    stored: dict[str, list[int]] = {}
    for file in files:
        with one_line(f"{file}: cannot be read (", ")"):
            file.open("rb").close()  # safetensors says of a file without permission that there is none
        with one_line(f"{file}: cannot be read, truncated? (", ")"), safe_open(file, framework="pt") as content:
            slices = {name: content.get_slice(name) for name in content.keys()}
            stored |= {name: one.get_shape() for name, one in slices.items()}
            floats = [name for name in slices if name in expected and expected[name].is_floating_point()]
            wrong = [name for name in floats if slices[name].get_dtype() not in FLOATS]
        _refuse(folder, {"does not hold floating-point numbers": wrong})
    shapes = {name: list(tensor.shape) for name, tensor in expected.items()}
    if sum(map(math.prod, shapes.values())) > sum(map(math.prod, stored.values())):
        wrong = [name for name, shape in shapes.items() if stored.get(name) != shape]
        _refuse(folder, {MISSING: shapes.keys() - stored.keys(), WRONG: wrong})


def _refuse(folder: Path, misfits: Mapping[str, Collection[str]]) -> None:
    for problem, names in misfits.items():
        if names:
            found = f"tensor {min(names)!r} {problem} ({len(names)} such)"
            raise InputError(f"{folder / WEIGHTS}: {found}, expected the weights of {CONFIG}")


def _check_finite(folder: Path, model: HPetrForPoseEstimation) -> None:
    tensors = {name: t for name, t in model.state_dict().items() if t.is_floating_point() and t.numel()}
    largest = torch.stack(torch._foreach_norm(list(tensors.values()), math.inf))
    if not bool(largest.isfinite().all()):
        name = list(tensors)[int((~largest.isfinite()).nonzero()[0])]
        raise InputError(f"{folder / WEIGHTS}: tensor {name!r} holds NaN or infinity, expected finite numbers")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off transformers' progress bars and reports."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def save_checkpoint(
    model: HPetrForPoseEstimation,
    processor: HPetrImageProcessor,
    folder: Path,
    *,
    half: bool = False,
    evaluation: Evaluation | None = None,
    name: str | None = None,
    tags: Sequence[str] = (),
) -> None:
    """Write model, processor and model card as a new checkpoint folder, which appears whole or not at all.

    Args:
        model: on any device.
        processor: of its images.
        folder: does not exist yet, or is empty.
        half: store matrices and convolutions as float16. Vectors stay float32: running variances can pass
            65,504. `load_checkpoint` and `from_pretrained` give a float32 model all the same.
        evaluation: metrics of these weights for the card.
        name: the model's name in the card; None takes the folder's.
        tags: further tags of the card's metadata.

    Raises:
        InputError: the folder exists and is not empty, or cannot be written.
    """
    check_new(folder)
    state = model.state_dict()
    if half:
        state = {key: value.half() if value.ndim > 1 else value for key, value in state.items()}
    card = model_card(model.config, name or folder.resolve().name, model.num_parameters(), evaluation, tags)
    try:
        with _beside(folder) as unfinished:
            with quiet_transformers():
                model.save_pretrained(unfinished, state_dict=state)
            processor.save_pretrained(unfinished)
            write_card(unfinished, card)
            open_as_others(unfinished)
            if folder.exists():  # Windows replaces no folder
                folder.resolve().rmdir()
            unfinished.rename(folder.resolve())
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be written ({first_line(error)})") from error


def check_new(folder: Path) -> None:
    """Check that a checkpoint can be written as this folder, without creating anything.

    Raises:
        InputError: the folder exists and is not empty, or its parent is not writable.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists already, expected a new or empty folder")
    parent = next(path for path in folder.resolve().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: cannot be written ({parent} is not a writable folder)")


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process by an exception, so that temporary folders are removed, unless it has a handler."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """Yield the name of a new folder on the same disk; an error or signal leaves neither it nor new parents behind."""
    final = folder.resolve()
    new = [path for path in final.parents if not path.exists()]
    with exit_on_sigterm():
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent) as temporary:
                yield Path(temporary) / final.name
        except BaseException:
            with suppress(OSError):
                for path in new:
                    path.rmdir()
            raise


def open_as_others(folder: Path) -> None:
    """Give a folder's weights the permissions of its other files; safetensors lets their owner alone read them."""
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / CONFIG, path)
