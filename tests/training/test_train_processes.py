"""Training by several processes, started as users start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hpetr.training.recipe import recipe_yaml
from hpetr.training.train import train
from training_runs import TINY, small_recipe


def torchrun(processes: int, recipe: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, "-m", "hpetr", "train", str(recipe), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    extra = ["train.ema=0.9", "train.eval_every=2", f"data.val.annotations={TINY}", "train.keep=1", "train.epochs=1.5"]
    path.write_text(recipe_yaml(small_recipe(tmp_path / "run", "train.total_batch_size=4", *extra)))
    return path


@pytest.mark.slow
def test_two_processes_do_what_one_does(recipe_file: Path, tmp_path: Path) -> None:
    """The same images in the same steps: losses, figures and weights differ by rounding alone."""
    from hpetr.training.recipe import load_recipe

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


FSDP = """
import shutil
import sys
from pathlib import Path

import torch.distributed
from accelerate.state import AcceleratorState, DistributedType

import hpetr.training.train
from hpetr.inference import processes
from hpetr.training.recipe import load_recipe

# accelerate shards on GPUs alone and takes every other group of processes for one of copies. Told that this one shards,
# it and torch do on CPUs what they do on GPUs.
plugins, accelerate_init = [], AcceleratorState.__init__


def init(self, *args, fsdp_plugin=None, **kwargs):
    accelerate_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        plugins.append(fsdp_plugin)
    if plugins:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[-1]


arguments_of = hpetr.training.train.training_arguments


def with_fsdp(recipe):
    arguments = arguments_of(recipe)
    arguments.fsdp, arguments.fsdp_config = True, {"version": 2}
    arguments.fsdp_plugin_args = arguments._process_fsdp_args()
    return arguments


AcceleratorState.__init__, hpetr.training.train.training_arguments = init, with_fsdp
recipe, folder, *settings = sys.argv[1:]
first, second = (Path(folder) / name for name in ("sharded", "again"))
processes.join(training=True)
hpetr.training.train.train(load_recipe(recipe, [f"output={first}", *settings]))
if processes.rank() == 0:
    shutil.copytree(first / "checkpoint-1", second / "checkpoint-1")
torch.distributed.barrier()
hpetr.training.train.train(load_recipe(recipe, [f"output={second}", *settings]), resume="auto")
"""


@pytest.mark.slow
def test_a_sharded_run_learns_what_a_whole_one_does_and_goes_on(recipe_file: Path, tmp_path: Path) -> None:
    from hpetr.training.recipe import load_recipe

    script = tmp_path / "fsdp.py"
    script.write_text(FSDP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    settings = ["train.ema=null", "train.keep=2", "data.val.limit=3"]  # one process evaluates an image more
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [str(recipe_file), str(tmp_path), *settings]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    train(load_recipe(recipe_file, [f"output={tmp_path / 'whole'}", *settings]))
    whole, sharded, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "sharded", "again"))
    assert sharded.keys() == whole.keys()
    for name, tensor in whole.items():
        assert (tensor - sharded[name]).abs().max() < 2e-3, name
        assert torch.equal(sharded[name], again[name]), name


STOPPED = """
import os
import signal
import sys

from hpetr.inference import processes
from hpetr.training.recipe import load_recipe
from hpetr.training.run import Interrupted
from hpetr.training.train import train
from hpetr.training.trainer import PoseTrainer

step = PoseTrainer.training_step


def training_step(self, *args, **kwargs):
    if processes.rank() == 1 and self.state.global_step == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, *args, **kwargs)


PoseTrainer.training_step = training_step
processes.join(training=True)
try:
    train(load_recipe(sys.argv[1], ["train.epochs=10"]))
except Interrupted as stop:
    print(f"process {processes.rank()} received {stop.signal}", flush=True)
"""


@pytest.mark.slow
def test_all_processes_stop_after_the_same_step(recipe_file: Path, tmp_path: Path) -> None:
    """The signal comes to one of two in the first step; both know of it at the end of the second."""
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, str(recipe_file)], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert sorted(line for line in result.stdout.splitlines() if line.startswith("process")) == [
        "process 0 received 15",
        "process 1 received 15",
    ]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.slow
def test_bad_input_is_one_line_of_all_processes(recipe_file: Path) -> None:
    result = torchrun(2, recipe_file, "train.total_batch_size=3")
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: train.total_batch_size is 3, expected a multiple of 2 processes x 1 images",
    ]
    result = torchrun(2, recipe_file, "data.train.0.limit=1", "train.total_batch_size=2")
    assert "error: data.train: 1 images for 2 processes, expected at least one each" in result.stderr
    assert result.stderr.count("error: data.train") == 1
