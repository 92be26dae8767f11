"""Training by several processes, started as users start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hpetr.recipe import recipe_yaml
from hpetr.train import train
from training_runs import TINY, small_recipe


def torchrun(processes: int, recipe: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, "-m", "hpetr.cli", "train", str(recipe), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    extra = ["train.ema=0.9", "train.eval_every=2", f"data.val.annotations={TINY}", "train.keep=1", "train.epochs=1.5"]
    path.write_text(recipe_yaml(small_recipe(tmp_path / "run", "train.total_batch_size=4", *extra)))
    return path


def test_two_processes_do_what_one_does(recipe_file: Path, tmp_path: Path) -> None:
    """The same pictures in the same steps: losses, figures and weights differ by rounding alone."""
    from hpetr.recipe import load_recipe

    result = torchrun(2, recipe_file, f"output={tmp_path / 'two'}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("checkpoint: ") == 1, result.stdout
    one = train(load_recipe(recipe_file, [f"output={tmp_path / 'one'}"]))
    logs = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()][:-1]
        for folder in (one, tmp_path / "two")
    ]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    for alone, shared in zip(*logs, strict=True):
        assert alone.keys() == shared.keys()
        for name in alone.keys() - {"step_seconds"}:
            assert shared[name] == pytest.approx(alone[name], rel=2e-3, abs=1e-4), name
    alone, shared = (load_file(folder / "model.safetensors") for folder in (one, tmp_path / "two"))
    for name, tensor in alone.items():
        assert (tensor - shared[name]).abs().max() < 2e-3, name


SHARDED = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_runs import SMALL_MODEL

from hpetr import HPetrConfig, HPetrForPoseEstimation
from hpetr.training.trainer import whole_copy

dist.init_process_group("gloo")
torch.manual_seed(0)
model = HPetrForPoseEstimation(HPetrConfig.preset("h-petr-nano", **SMALL_MODEL)).eval()
pictures = torch.randn(1 + dist.get_rank(), 3, 64, 64)
with torch.no_grad():
    expected = model(pictures).poses
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
copy = whole_copy(model, torch.device("cpu"))
assert type(next(model.parameters())) is not type(next(copy.parameters()))
with torch.no_grad():
    for _ in range(1 + dist.get_rank()):  # no process waits for the other
        assert torch.equal(copy(pictures).poses, expected)
dist.destroy_process_group()
"""


def test_a_sharded_model_is_evaluated_as_a_whole_one(tmp_path: Path) -> None:
    """FSDP itself needs GPUs in accelerate; its sharding, and the copy that evaluations take, work here too."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr


def test_bad_input_is_one_line_of_all_processes(recipe_file: Path) -> None:
    result = torchrun(2, recipe_file, "train.total_batch_size=3")
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: train.total_batch_size is 3, expected a multiple of 2 processes x 1 pictures",
    ]
    result = torchrun(2, recipe_file, "data.train.0.limit=1", "train.total_batch_size=2")
    assert "error: data.train: 1 pictures for 2 processes, expected at least one each" in result.stderr
    assert result.stderr.count("error: data.train") == 1
