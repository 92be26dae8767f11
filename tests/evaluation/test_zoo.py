"""Which official checkpoint a file is, and the table of published figures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import golden_inputs
from hpetr import HPetrConfig, HPetrForPoseEstimation, HPetrImageProcessor
from hpetr.checkpoints.folder import save_checkpoint
from hpetr.checkpoints.official import identify, load_official, weight_shapes
from hpetr.cli.main import app
from hpetr.data.dataset import open_dataset
from hpetr.errors import InputError
from hpetr.evaluation.zoo import PUBLISHED, evaluate_zoo, find_checkpoints, load_zoo_model
from paths import GOLDEN, TINY

KEYS = json.loads((GOLDEN / "official_keys.json").read_text())


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return golden_inputs.fill(KEYS["petr-r50"])


def official_shapes(preset: str) -> dict[str, tuple[int, ...]]:
    """With the buffers of an official file that are no weights left out."""
    with torch.device("meta"):
        return weight_shapes({name: torch.empty(shape) for name, shape in KEYS[preset].items()})


@pytest.mark.parametrize("preset", KEYS)
def test_official_names_tell_the_model(preset: str) -> None:
    assert identify(official_shapes(preset), "model.pth") == preset


@pytest.mark.parametrize("preset", PUBLISHED)
def test_own_names_tell_the_model(preset: str) -> None:
    with torch.device("meta"):
        model = HPetrForPoseEstimation(HPetrConfig.preset(preset))
    assert identify(weight_shapes(model.state_dict()), "folder", official=False) == preset


def test_other_models_are_named_with_what_does_not_fit() -> None:
    heatmap = {"bbox_head.fc_hm.bias": (14,), "bbox_head.fc_hm.weight": (14, 256)}
    misfit = r"nearest, h-petr-r50, 2 tensors do not fit.*\(14, 256\), expected \(17, 256\)"
    with pytest.raises(InputError, match=misfit):
        identify(official_shapes("h-petr-r50") | heatmap, "x.pth")
    more = official_shapes("petr-r50") | {"head.bias": (3,)}
    with pytest.raises(InputError, match=r"x.pth: .* unexpected tensor 'head.bias'"):
        identify(more, "x.pth")


def test_official_file_is_loaded_by_its_tensors_alone(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "swin_epoch_100.pth"
    torch.save({"meta": {"epoch": 100}, "state_dict": state}, path)
    preset, model, processor = load_zoo_model(path, "cpu", num_keypoints=17)
    assert preset == "petr-r50"
    assert not model.training
    assert processor.size == {"shortest_edge": 800, "longest_edge": 1333}
    torch.testing.assert_close(model.heatmap_head.bias, state["bbox_head.fc_hm.bias"])
    with pytest.raises(InputError, match=r"petr-r50 has 17 keypoints, the data 14"):
        load_zoo_model(path, "cpu", num_keypoints=14)


def test_table_of_a_folder(state: dict[str, torch.Tensor], checkpoint: Path, tmp_path: Path) -> None:
    """One model of the zoo, small images for speed; the others are reported and counted."""
    zoo = tmp_path / "zoo"
    processor = HPetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    save_checkpoint(load_official(state, "petr-r50"), processor, zoo / "mine")
    shutil.copytree(checkpoint, zoo / "nano")
    (zoo / "half.pth").write_bytes(b"PK")
    (zoo / "notes.txt").touch()
    output = tmp_path / "zoo.json"
    arguments = ["eval", "--zoo", str(zoo), str(TINY), "--limit", "2", "--output", str(output)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (row,) = (line for line in done.stdout.splitlines() if "petr-r50" in line)
    written = json.loads(output.read_text())
    (score,) = written["checkpoints"]
    ap = score["AP"]
    assert row.split() == ["mine", "petr-r50", f"{ap:.4f}", "0.693", "(0.688)", f"{ap - 0.693:+.4f}"]
    assert score["preset"] == "petr-r50"
    assert score["difference"] == pytest.approx(ap - 0.693)
    assert (score["images"], score["protocol"], score["processes"]) == (2, "coco", 1)
    assert [Path(entry["checkpoint"]).name for entry in written["left_out"]] == ["half.pth", "nano"]
    assert "half.pth" in done.stderr
    assert "nano: is none of the zoo's models" in done.stderr
    assert "2 of 3 checkpoints left out: half.pth, nano" in done.stderr


def test_nothing_to_evaluate(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such folder"):
        find_checkpoints(tmp_path / "nowhere")
    with pytest.raises(InputError, match="nothing to evaluate"):
        find_checkpoints(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "nano")
    steps: list[int] = []
    dataset = open_dataset(TINY / "annotations.json", limit=1)
    with pytest.raises(InputError, match=r"none of 1 checkpoints can be evaluated; the first: .*nano"):
        evaluate_zoo(find_checkpoints(tmp_path), dataset, "cpu", progress=steps.append)
    assert steps == [1]


@pytest.mark.parametrize("arguments", [["--zoo", "folder", "checkpoint", "data"], ["data"]])
def test_zoo_stands_in_the_checkpoints_place(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["eval", *arguments])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: eval: ")
    assert len(done.stderr.strip().splitlines()) == 1
