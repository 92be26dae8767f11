"""Checkpoints of any content: configurations, weights, official files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import inputs, mutated, mutated_bytes, success_or_one_line

from hpetr import HPetrImageProcessor, PosePredictor
from hpetr.checkpoints.folder import CONFIG, PROCESSOR, WEIGHTS, load_config, save_checkpoint
from hpetr.checkpoints.official import read_official
from tiny_model import tiny_model

IMAGE = np.random.default_rng(0).integers(0, 255, (40, 52, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "tiny"
    processor = HPetrImageProcessor({"shortest_edge": 48, "longest_edge": 64}, threshold=0.0)
    save_checkpoint(tiny_model(num_keypoints=3, d_model=64), processor, folder)
    return folder


@pytest.fixture(scope="module")
def folder(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("changed")


def use(whole: Path, folder: Path, name: str, content: bytes) -> None:
    """Predict with a checkpoint one of whose files has this content."""
    for file in (CONFIG, PROCESSOR, WEIGHTS):
        (folder / file).write_bytes(content if file == name else (whole / file).read_bytes())
    result = PosePredictor(folder, device="cpu")(IMAGE)
    assert np.isfinite(result.keypoints).all()
    json.dumps(result.to_coco(1), allow_nan=False)


def test_the_whole_checkpoint_is_taken(whole: Path, folder: Path) -> None:
    use(whole, folder, CONFIG, (whole / CONFIG).read_bytes())


@inputs(12, 10_000)
@given(data=st.data())
def test_config(whole: Path, folder: Path, data: st.DataObject) -> None:
    content = data.draw(mutated(json.loads((whole / CONFIG).read_text())))
    with success_or_one_line("config.json, values"):
        use(whole, folder, CONFIG, json.dumps(content).encode())


@inputs(10, 5_000)
@given(data=st.data())
def test_config_bytes(whole: Path, folder: Path, data: st.DataObject) -> None:
    content = data.draw(mutated_bytes((whole / CONFIG).read_bytes(), 1, letters=True))
    with success_or_one_line("config.json, bytes"):
        (folder / CONFIG).write_bytes(content)
        load_config(folder)


@inputs(8, 5_000)
@given(data=st.data())
def test_processor(whole: Path, folder: Path, data: st.DataObject) -> None:
    content = data.draw(mutated(json.loads((whole / PROCESSOR).read_text())))
    with success_or_one_line("preprocessor_config.json, values"):
        use(whole, folder, PROCESSOR, json.dumps(content).encode())


@inputs(10, 10_000)
@given(data=st.data())
def test_weights(whole: Path, folder: Path, data: st.DataObject) -> None:
    content = (whole / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    content = data.draw(mutated_bytes(content, 2, first=header))
    with success_or_one_line("model.safetensors, bytes"):
        use(whole, folder, WEIGHTS, content)


@inputs(10, 3_000)
@given(data=st.data())
def test_index_of_weights(whole: Path, folder: Path, data: st.DataObject) -> None:
    names = data.draw(mutated({"metadata": {"total_size": 8}, "weight_map": {"a": WEIGHTS, "b": "c.safetensors"}}))
    with success_or_one_line("model.safetensors.index.json, values"):
        for file in (CONFIG, PROCESSOR):
            (folder / file).write_bytes((whole / file).read_bytes())
        (folder / WEIGHTS).unlink(missing_ok=True)
        index = folder / f"{WEIGHTS}.index.json"
        index.write_text(json.dumps(names))
        try:
            PosePredictor(folder, device="cpu")
        finally:
            index.unlink()


def saved(content: Any, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


OFFICIAL = {"meta": {"epoch": 1}, "state_dict": {"a.weight": torch.ones(3, 2), "b.bias": torch.zeros(2).half()}}


@pytest.mark.parametrize("zipped", [True, False])
@inputs(15, 20_000)
@given(data=st.data())
def test_official(folder: Path, zipped: bool, data: st.DataObject) -> None:
    content = data.draw(mutated_bytes(saved(OFFICIAL, zipped), 3))
    path = folder / "official.pth"
    path.write_bytes(content)
    with success_or_one_line(f".pth, bytes ({'zip' if zipped else 'old form'})"):
        read_official(path)
