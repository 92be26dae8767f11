"""Checkpoint folders appear whole or not at all; loading them is tested in inference/test_torch_predictor.py."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpetr import HPetrForPoseEstimation, HPetrImageProcessor, InputError
from hpetr.checkpoints.folder import check_new, load_checkpoint, resolve_device, save_checkpoint
from paths import ROOT
from tiny_model import TINY_SWIN, tiny_model

FILES = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]


@pytest.fixture(scope="module")
def model() -> HPetrForPoseEstimation:
    return tiny_model()


class Interrupted(HPetrImageProcessor):
    """A processor that raises while it is saved."""

    error: BaseException

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        raise self.error


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_round_trip(tmp_path: Path, exists: bool, backbone: str) -> None:
    model = tiny_model(**({"backbone_config": TINY_SWIN} if backbone == "swin" else {}))
    folder = tmp_path / "new" / "folder"
    if exists:
        folder.mkdir(parents=True)
    save_checkpoint(model, HPetrImageProcessor(threshold=0.125), folder)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert len({stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}) == 1
    loaded, processor = load_checkpoint(folder, "cpu")
    assert processor.threshold == 0.125
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_link_to_an_empty_folder_is_followed(tmp_path: Path, model: HPetrForPoseEstimation) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_checkpoint(model, HPetrImageProcessor(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == FILES


def test_half_stores_matrices_alone_in_float16(tmp_path: Path, model: HPetrForPoseEstimation) -> None:
    save_checkpoint(model, HPetrImageProcessor(), tmp_path / "half", half=True)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {t.dtype for t in stored.values() if t.ndim > 1} == {torch.float16}
    assert torch.float16 not in {t.dtype for t in stored.values() if t.ndim <= 1}
    assert {p.dtype for p in load_checkpoint(tmp_path / "half", "cpu")[0].parameters()} == {torch.float32}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(28, "No space left on device")])
def test_interrupted_save_leaves_nothing(tmp_path: Path, model: HPetrForPoseEstimation, error: BaseException) -> None:
    processor = Interrupted()
    processor.error = error
    expected = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="No space left on device" if expected is InputError else None):
        save_checkpoint(model, processor, tmp_path / "new" / "deep" / "folder")
    assert list(tmp_path.iterdir()) == []


def test_terminated_process_leaves_nothing(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from hpetr import HPetrImageProcessor
from hpetr.checkpoints.folder import save_checkpoint
from tiny_model import tiny_model

class Terminated(HPetrImageProcessor):
    def to_json_file(self, path):
        print(os.listdir(Path(path).parent), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

save_checkpoint(tiny_model(), Terminated(), Path(sys.argv[2]))
"""
    command = [sys.executable, "-c", code, str(ROOT / "tests"), str(tmp_path / "new" / "folder")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "model.safetensors" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_only_a_new_or_empty_folder_is_written(tmp_path: Path, model: HPetrForPoseEstimation) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    (tmp_path / "file").touch()
    for name in ("full", "file", "file/folder"):
        with pytest.raises(InputError, match="exists already|is not a writable folder"):
            check_new(tmp_path / name)
        with pytest.raises(InputError, match="exists already|is not a writable folder"):
            save_checkpoint(model, HPetrImageProcessor(), tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine.txt"]


def keep_integers(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({name: t.to(torch.int8) if t.ndim > 1 else t for name, t in state.items()}, folder / "model.safetensors")


def name_other_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')


def index_of_another_folder(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        '{"metadata": {}, "weight_map": {"a": "../other.safetensors"}}'
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (keep_integers, r"model.safetensors: tensor '.*' does not hold floating-point numbers \(\d+ such\)"),
        (name_other_processor, "image_processor_type is 'CLIPImageProcessor', expected 'HPetrImageProcessor'"),
        (index_of_another_folder, "model.safetensors.index.json: expected names of files in the folder"),
    ],
)
def test_nothing_is_read_as_something_else(
    tmp_path: Path, model: HPetrForPoseEstimation, damage: Callable[[Path], None], message: str
) -> None:
    save_checkpoint(model, HPetrImageProcessor(), tmp_path / "folder")
    damage(tmp_path / "folder")
    with pytest.raises(InputError, match=message) as error:
        load_checkpoint(tmp_path / "folder", "cpu")
    assert "\n" not in str(error.value)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Drop root's rights to read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("closed", ["folder", "config.json", "model.safetensors", "preprocessor_config.json"])
def test_files_of_another_user(model: HPetrForPoseEstimation, closed: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary).chmod(0o755)
        folder = Path(temporary) / "folder"
        save_checkpoint(model, HPetrImageProcessor(), folder)
        path = folder if closed == "folder" else folder / closed
        path.chmod(0)
        with as_nobody(), pytest.raises(InputError, match="cannot be read|Permission denied") as error:
            load_checkpoint(folder, "cpu")
        path.chmod(0o755)
    assert closed in str(error.value)
    assert "ermission denied" in str(error.value)


@pytest.mark.parametrize("device", ["meta", "cuda:99", "toaster", ""])
def test_devices_that_cannot_compute(device: str) -> None:
    with pytest.raises(InputError, match=f"^device {device}: not available here") as error:
        resolve_device(device)
    assert "\n" not in str(error.value)
