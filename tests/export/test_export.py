"""Exported models: PyTorch's numbers at any size and batch, and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from hpetr import HPetrConfig, HPetrForPoseEstimation, HPetrImageProcessor, InputError, PosePredictor, PoseResult
from hpetr.checkpoints.folder import save_checkpoint
from hpetr.cli.main import app
from hpetr.export.onnx_graph import halve
from hpetr.export.write import describe, export_model, to_openvino
from hpetr.images.pixels import normalize_and_pad, resize_image
from hpetr.images.read import load_image
from hpetr.inference.open import open_predictor
from hpetr.runtime import ExportedPredictor
from hpetr.runtime.description import KEY, ModelDescription
from hpetr.runtime.engine import load_engine
from paths import EXAMPLES
from tiny_model import TINY, TINY_RESNET

PHOTOS = sorted(EXAMPLES.glob("*.jpg"))
# The bundled model's design, and the published one; sizes that are no multiples of anything are the latter's alone.
NANO = {
    "num_keypoints": 5,
    "keypoint_scores": True,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "joint_decoder_layers": 1,
    "num_queries": 20,
    "num_poses": 10,
    "d_model": 32,
    "num_heads": 4,
}
PUBLISHED = {**TINY, "encoder_layers": 1, "joint_decoder_layers": 1, "num_labels": 2}
# Tracing as one program takes minutes with more levels and layers.
SHORT = {
    **PUBLISHED,
    "decoder_layers": 1,
    "num_feature_levels": 2,
    "backbone_config": {**TINY_RESNET, "out_features": ["stage3", "stage4"]},
}
DIVISORS = {"nano": 32, "published": 1, "short": 32}
CONFIGS = {"nano": HPetrConfig.preset("h-petr-nano", **NANO), "published": HPetrConfig(**PUBLISHED)}
CONFIGS["short"] = HPetrConfig(**SHORT)
TOLERANCE = {"atol": 2e-5, "rtol": 0}  # of shares of an image: 0.01 pixels of 500


def make_model(name: str) -> HPetrForPoseEstimation:
    torch.manual_seed(3)
    model = HPetrForPoseEstimation(CONFIGS[name]).eval()
    for parameter_name, parameter in model.named_parameters():
        # The zeros of a fresh model, and features that fade within the backbone, would hide mistakes.
        if any(part in parameter_name for part in ("heads.", "score_head", "sampling_offsets", "prior")):
            torch.nn.init.normal_(parameter, std=0.05)
        elif "backbone.body" in parameter_name and parameter.dim() == 4:
            torch.nn.init.kaiming_normal_(parameter)
    return model


class Exported:
    """A model, its checkpoint and its ONNX file."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.model = name, make_model(name)
        self.processor = HPetrImageProcessor(
            {"shortest_edge": 160, "longest_edge": 224}, pad_size_divisor=DIVISORS[name], threshold=0.0
        )
        self.checkpoint, self.file = folder / name, folder / f"{name}.onnx"
        save_checkpoint(self.model, self.processor, self.checkpoint)
        export_model(self.model, self.processor, self.file, name=name)


@pytest.fixture(scope="module", params=["nano", "published"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(request.param, tmp_path_factory.mktemp("exported"))


def assert_equal_poses(found: PoseResult, expected: PoseResult) -> None:
    assert len(found) == len(expected)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(found.keypoints, expected.keypoints, atol=0.05)
    np.testing.assert_allclose(found.keypoint_scores, expected.keypoint_scores, atol=1e-4)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.05)
    assert (found.labels == expected.labels).all()
    assert found.image_size == expected.image_size
    assert found.skeleton == expected.skeleton


def test_network_gives_torchs_numbers(exported: Exported) -> None:
    """Of sizes and batches other than those of the translation, with padding and without."""
    engine, processor = load_engine(exported.file), exported.processor
    for count, (height, width) in ((1, (96, 128)), (1, (160, 224)), (3, (224, 96)), (2, (101, 203))):
        images = [
            resize_image(load_image(path), height - 11 * i, width - 17 * i) for i, path in enumerate(PHOTOS[:count])
        ]
        batch = normalize_and_pad(
            images, processor.image_mean, processor.image_std, processor.pad_size_divisor
        )  # (B, 3, H, W) and (B, H, W)
        found = {name: torch.from_numpy(values) for name, values in engine.run(*batch).items()}
        with torch.inference_mode():
            expected = exported.model(*map(torch.from_numpy, batch))
        for name in ("scores", "poses", "pose_labels"):
            torch.testing.assert_close(found[name], expected[name], **TOLERANCE)
        ones = torch.ones_like(expected.poses[..., 0])
        joints = ones if expected.keypoint_scores is None else expected.keypoint_scores
        torch.testing.assert_close(found["keypoint_scores"], joints, **TOLERANCE)


def test_poses_of_photographs(exported: Exported) -> None:
    ours, theirs = ExportedPredictor(exported.file), PosePredictor(exported.checkpoint, "cpu")
    for batch_size in (1, 2):
        for found, expected in zip(ours(PHOTOS[:3], batch_size), theirs(PHOTOS[:3], batch_size), strict=True):
            assert len(found) > 2
            assert_equal_poses(found, expected)
            assert found.path == expected.path
    assert ours.class_names == theirs.class_names
    assert ours.num_poses == theirs.num_poses
    assert len(ExportedPredictor(exported.file, threshold=1.0)(PHOTOS[0])) == 0


def test_command_line(exported: Exported, tmp_path: Path) -> None:
    """`hpetr predict` gives the same poses of the ONNX file as of the checkpoint."""
    found = {}
    for name, words in (("file", [str(exported.file)]), ("checkpoint", ["--checkpoint", str(exported.checkpoint)])):
        arguments = ["predict", *words, str(PHOTOS[0]), "--output", str(tmp_path / name), "--device", "cpu"]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        found[name] = json.loads((tmp_path / name / "predictions.json").read_text())
    poses = {name: np.array([pose["keypoints"] for pose in content["annotations"]]) for name, content in found.items()}
    np.testing.assert_allclose(poses["file"], poses["checkpoint"], atol=0.05)
    assert found["file"]["categories"] == found["checkpoint"]["categories"]


NO_TORCH = """
import sys

class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "PIL", "supervision", "typer", "onnx"}:
            raise ImportError(f"{name} is not to be imported here")

sys.meta_path.insert(0, Refusal())
from hpetr.runtime.__main__ import main

sys.exit(main(sys.argv[1:]))
"""


def test_runtime_needs_no_torch(exported: Exported) -> None:
    run = subprocess.run(
        [sys.executable, "-c", NO_TORCH, str(exported.file), str(PHOTOS[0]), "--threads", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.splitlines()
    poses = json.loads(line)["poses"]
    expected = PosePredictor(exported.checkpoint, "cpu")(PHOTOS[0])
    np.testing.assert_allclose([pose["score"] for pose in poses], expected.scores, atol=1e-4)
    found = np.array([pose["keypoints"] for pose in poses]).reshape(len(poses), -1, 3)
    np.testing.assert_allclose(found[..., :2], expected.keypoints, atol=0.05)


def test_file_describes_itself(exported: Exported) -> None:
    graph = onnx.load(exported.file)
    onnx.checker.check_model(graph, full_check=True)
    (entry,) = graph.metadata_props
    assert entry.key == KEY
    described = ModelDescription.from_json(entry.value, "model.onnx")
    assert (described.shortest_edge, described.longest_edge) == (160, 224)
    assert described.pad_size_divisor == DIVISORS[exported.name]
    assert described.skeleton.to_dict() == exported.model.config.skeleton
    assert ModelDescription.from_json(described.to_json(), "model.onnx") == described
    named = {
        value.name: [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in graph.graph.input
    }
    assert named == {"pixel_values": ["batch", 3, "height", "width"], "pixel_mask": ["batch", "height", "width"]}
    assert {node.domain for node in graph.graph.node} == {""}
    assert str(Path.home()) not in str(graph.graph.node[:50]), "no traces of this machine"


def test_half_the_file_and_nearly_the_same_poses(exported: Exported, tmp_path: Path) -> None:
    half = tmp_path / "half.onnx"
    graph = onnx.load(exported.file)
    halve(graph)
    onnx.save(graph, half)
    assert half.stat().st_size < 0.7 * exported.file.stat().st_size
    found, expected = ExportedPredictor(half)(PHOTOS[0]), ExportedPredictor(exported.file)(PHOTOS[0])
    assert 0 < np.abs(np.sort(found.scores) - np.sort(expected.scores)).max() < 0.05


def test_openvino(exported: Exported, tmp_path: Path) -> None:
    file = tmp_path / "model.xml"
    description = describe(exported.model, exported.processor, exported.name)
    for path, data in zip(
        (file.with_suffix(".bin"), file), to_openvino(onnx.load(exported.file), description, False), strict=True
    ):
        path.write_bytes(data)
    ours, theirs = ExportedPredictor(file), PosePredictor(exported.checkpoint, "cpu")
    assert ours.description == description
    for found, expected in zip(ours(PHOTOS[:3], 2), theirs(PHOTOS[:3], 2), strict=True):
        assert_equal_poses(found, expected)
    with pytest.raises(InputError, match="this OpenVINO has cpu"):
        ExportedPredictor(file, device="cuda")
    (tmp_path / "model.bin").unlink()
    with pytest.raises(InputError, match="expected it and its .bin beside it"):
        ExportedPredictor(file)


def test_program_of_torch_export(tmp_path: Path) -> None:
    """It holds plain torch operators alone, and takes batches and sizes other than those of the trace."""
    model, file = make_model("short"), tmp_path / "model.pt2"
    processor = HPetrImageProcessor({"shortest_edge": 160, "longest_edge": 224}, pad_size_divisor=DIVISORS["short"])
    export_model(model, processor, file, "torch-export", "short")
    extra = {"hpetr.json": ""}
    program = torch.export.load(file, extra_files=extra)
    assert ModelDescription.from_json(extra["hpetr.json"], "model.pt2").model == "short"
    assert "hpetr." not in program.graph_module.code
    for batch, height, width in ((1, 128, 160), (2, 160, 224), (5, 224, 96)):
        pixels, mask = torch.rand(batch, 3, height, width), torch.ones(batch, height, width).long()
        mask[-1, :, width - 40 :] = 0
        with torch.inference_mode():
            found, expected = program.module()(pixels, mask), model(pixels, mask)
        for name in ("scores", "poses", "pose_labels"):
            torch.testing.assert_close(found[name], expected[name], **TOLERANCE)


def rewritten(exported: Exported, file: Path, **changes: object) -> Path:
    """A copy whose description has other values; None takes one out."""
    graph = onnx.load(exported.file)
    values = json.loads(graph.metadata_props[0].value)
    for key, value in changes.items():
        values[key] = value
        if value is None:
            del values[key]
    graph.metadata_props[0].value = json.dumps(values)
    onnx.save(graph, file)
    return file


def test_bad_files_are_one_line(exported: Exported, tmp_path: Path) -> None:
    data = exported.file.read_bytes()
    (tmp_path / "half.onnx").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.onnx").write_text("no model")
    graph = onnx.load(exported.file)
    del graph.metadata_props[:]
    onnx.save(graph, tmp_path / "foreign.onnx")
    for file, message in (
        (tmp_path / "nowhere.onnx", "no such file, expected an exported model"),
        (tmp_path / "half.onnx", "expected a whole ONNX file"),
        (tmp_path / "text.onnx", "expected a whole ONNX file"),
        (tmp_path / "foreign.onnx", "expected what hpetr export writes"),
        (rewritten(exported, tmp_path / "later.onnx", format=2), "has format 2, expected 1"),
        (rewritten(exported, tmp_path / "less.onnx", num_poses=None), "has no 'num_poses'"),
        (rewritten(exported, tmp_path / "wrong.onnx", num_poses="many"), "expected a whole number of at least 1"),
    ):
        with pytest.raises(InputError, match=message) as error:
            ExportedPredictor(file)
        assert str(file) in str(error.value)
    with pytest.raises(InputError, match="expected auto, cpu or cuda"):
        ExportedPredictor(exported.file, device="tpu")
    with pytest.raises(InputError, match="expected a number in 0..1"):
        ExportedPredictor(exported.file, 2.0)
    with pytest.raises(InputError, match="--precision and --compile are for checkpoints"):
        open_predictor(exported.file, precision="bfloat16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--format", "caffe"], "--format caffe: expected onnx, openvino, torch-export"),
        (
            ["export", "--format", "openvino", "--output", "model.onnx"],
            "model.onnx: expected a file to write that ends in .xml",
        ),
        (["export", "--format", "torch-export", "--half"], "--half: is for onnx and openvino"),
        (["export", "--output", "model.bin"], "model.bin: expected a file to write that ends in .onnx"),
        (["export", "nowhere"], "nowhere: no such folder"),
        (["predict", "model.onnx"], "model.onnx: a model without images"),
        (["predict", "a.onnx", "b.onnx", "photo.jpg"], "2 models (a.onnx, b.onnx), expected one"),
    ],
)
def test_bad_commands_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())
