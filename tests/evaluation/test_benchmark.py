"""The benchmark: stages of the real path add up, and its numbers agree with `hpetr info`. No speed is asserted."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from hpetr import HPetrConfig, InputError
from hpetr.checkpoints.folder import load_checkpoint
from hpetr.cli.main import app
from hpetr.evaluation.benchmark import (
    OTHER,
    STAGES,
    Benchmark,
    ByteCounter,
    Stage,
    StageMeter,
    benchmark,
    count_flops,
    profile_stages,
)
from hpetr.evaluation.info import model_info
from hpetr.images.read import load_image
from hpetr.model.stages import stage
from paths import EXAMPLES

IMAGE = EXAMPLES / "000000000785.jpg"
NETWORK = ("backbone and neck", "encoder", "proposals", "pose decoder", "joint decoder")


def hpetr(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["benchmark", *(str(argument) for argument in arguments)])


def test_stages_of_the_bundled_model(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    done = hpetr("h-petr-nano", "--size", "96x128", "--repeats", 3, "--threads", 1, "--device", "cpu", "--json", file)
    assert done.exit_code == 0, done.output
    numbers = json.loads(file.read_text())
    assert numbers.keys() == {field.name for field in fields(Benchmark)}
    assert (numbers["image"], numbers["input"]) == ([192, 256], [96, 128])
    assert (numbers["weights"], numbers["batch"], numbers["repeats"], numbers["threads"]) == ("checkpoint", 1, 3, 1)

    stages = {entry["name"]: entry for entry in numbers["stages"]}
    assert tuple(stages) == (*STAGES, OTHER)
    for entry in numbers["stages"]:
        assert entry.keys() == {field.name for field in fields(Stage)}
        seconds = entry["seconds"]
        assert 0 < seconds["lower_quartile"] <= seconds["median"] <= seconds["upper_quartile"]
    assert numbers["images_per_second"] == pytest.approx(1 / numbers["whole"]["median"])

    # What is counted: all FLOPs of `hpetr info`, in the network's stages only.
    assert {name for name, entry in stages.items() if entry["flops"]} == set(NETWORK)
    assert sum(entry["flops"] for entry in stages.values()) == model_info("h-petr-nano", (96, 128)).flops
    for name, entry in stages.items():
        rate = (entry["flops"] + entry["sampling_flops"]) / entry["seconds"]["median"]
        expected = rate / numbers["matrix_rate"] if name in NETWORK else None
        assert entry["matrix_share"] == pytest.approx(expected)
    assert all(stages[name]["bytes"] > 0 and stages[name]["copy_share"] > 0 for name in NETWORK)
    assert stages["decode"]["bytes"] == 0
    assert stages["decode"]["copy_share"] is None
    assert 0 < numbers["loaded_bytes"] <= numbers["peak_bytes"]

    for name in (*STAGES, OTHER, "whole", "images per second", "peak memory", "GFLOP/s"):
        assert name in done.stdout


def test_batch_of_a_checkpoint_on_an_image(checkpoint: Path) -> None:
    done: list[int] = []
    result = benchmark(str(checkpoint), batch=2, repeats=1, device="cpu", image=IMAGE, progress=done.append)
    assert len(done) == 4
    assert result.image == load_image(IMAGE).shape[:2] == (425, 640)
    assert result.input == (128, 192)  # both limits of the checkpoint's processor
    assert result.images_per_second == pytest.approx(2 / result.whole.median)
    model, _ = load_checkpoint(checkpoint, "cpu")
    assert sum(s.flops for s in result.stages) == sum(
        f[0] for f in count_flops(model.config, 2, *result.input).values()
    )


def test_preset_gets_random_weights_and_leaves_the_random_numbers() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    result = benchmark("petr-r50", (64, 96), repeats=1, device="cpu")
    assert torch.equal(torch.rand(3), expected)
    assert (result.weights, result.input) == ("random", (64, 96))


def test_sampling_is_counted_by_its_formula() -> None:
    config = HPetrConfig.preset("h-petr-nano", encoder_layers=2, decoder_layers=1, joint_decoder_layers=1)
    config.num_queries, config.num_poses = 10, 5
    numbers = count_flops(config, 3, 64, 64)
    tokens = sum((64 // stride) ** 2 for stride in (8, 16, 32)[config.encoder_first_level :])
    points = config.num_feature_levels * config.d_model  # a level's point in all heads reads d_model channels
    assert config.num_feature_levels == 3
    assert numbers["encoder"][1] == 2 * 3 * tokens * points * config.num_points * 8
    assert numbers["pose decoder"][1] == 3 * 10 * points * config.num_keypoints * 8
    assert numbers["joint decoder"][1] == 3 * 5 * config.num_keypoints * points * config.num_points * 8
    assert numbers["proposals"][1] == 0


def test_stages_divide_time_and_counts() -> None:
    total = 0

    def work() -> None:
        nonlocal total
        for name, cost in (("encoder", 1), ("joint decoder", 10), ("encoder", 100)):
            with stage(name):
                total += cost
        total += 1000
        torch.ones(3)

    with StageMeter(lambda: total) as meter:
        work()
    assert meter.sums() == {"encoder": 101, "joint decoder": 10, OTHER: 1000}
    seconds = profile_stages(work, torch.device("cpu"))
    assert seconds.keys() == {"encoder", "joint decoder", OTHER}
    assert all(value > 0 for value in seconds.values())


def test_bytes_of_operators() -> None:
    x = torch.ones(10, 4)
    with ByteCounter() as counter:
        y = x.t().reshape(2, 20)  # the transposed tensor is copied, reading and writing 160 bytes
        assert counter.total == 320
        y.view(40)[3:]
        assert counter.total == 320
        y.add_(1)
        assert counter.total == 640
        torch.zeros(1).expand(10, 4) + x  # 4 bytes written, 4 and 160 read, 160 written
        assert counter.total == 640 + 4 + 4 + 160 + 160


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "0x128"], "size is 0x128, expected a positive height and width"),
        (["--size", "128"], "--size 128: expected HEIGHTxWIDTH"),
        (["petr-r5"], "petr-r5: neither a checkpoint folder nor a preset, expected one of petr-r50,"),
        (["model.onnx"], "model.onnx: is an exported model, expected a checkpoint folder or a preset"),
        (["--batch", "0"], "batch is 0, expected at least 1"),
        (["--repeats", "-1"], "repeats is -1, expected at least 1"),
        (["--threads", "0"], "threads is 0, expected at least 1"),
        (["--device", "cuda:99"], "device cuda:99: not available here"),
        (["--image", "none.jpg"], "none.jpg: no such file"),
        (["--json", str(IMAGE / "x.json")], "cannot be used as output folder"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    done = hpetr(*arguments)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_broken_image_is_named(tmp_path: Path) -> None:
    file = tmp_path / "half.jpg"
    file.write_bytes(cv2.imencode(".jpg", np.zeros((64, 64, 3), np.uint8))[1].tobytes()[:200])
    with pytest.raises(InputError, match=r"half\.jpg: .*(truncated|not an image)"):
        benchmark(image=file)
