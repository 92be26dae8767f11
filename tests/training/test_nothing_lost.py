"""Runs that die: killed or stopped at any place, out of disk space, with numbers that stop being numbers."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hpetr import HPetrForPoseEstimation, InputError
from hpetr.training.run import Interrupted, own_folder, publish, restore_log
from hpetr.training.train import train
from hpetr.training.trainer import PoseTrainer
from training_runs import TINY, small_recipe

# Where a run dies: the function, and the number of its calls in one process. Reading images and steps come first, then
# the parts of a checkpoint in the order of their writing: weights, optimizer, average, sync to the disk, new names.
DEATHS = (
    ("hpetr.data.dataset.read_image", 2),
    ("hpetr.training.trainer.PoseTrainer.training_step", 2),
    ("hpetr.training.trainer.PoseTrainer._save", 2),
    ("torch.save", 3),
    ("hpetr.training.trainer.save_file", 2),
    ("os.fsync", 5),
    ("pathlib.Path.rename", 1),
    ("hpetr.training.run.log_line", 4),
    ("hpetr.training.trainer.evaluate", 1),
    ("pathlib.Path.rename", 3),
    ("pathlib.Path.replace", 4),
    ("hpetr.training.train.write_report", 1),
)


def die_at(place: str, number: int) -> None:
    """Kill this process, as kill -9 does, at a certain call of a function."""
    module, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(module)
    function, calls = getattr(owner, name), itertools.count(1)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, dying)


def train_in_silence(output: Path, overrides: list[str], death: tuple[str, int] | None = None) -> None:
    """Train in a process of its own; started by a server that has imported everything, so it starts at once."""
    torch.set_num_threads(1)
    with (output.parent / f"{output.name}.txt").open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
        if death is not None:
            die_at(*death)
        train(small_recipe(output, *overrides), resume="auto")


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


@pytest.fixture(scope="module")
def starter() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hpetr.training.train"])
    return context


def log_lines(folder: Path) -> list[dict]:
    """Return the log without its times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "step_seconds"} for line in lines if "train_runtime" not in line]


def assert_same_end(killed: Path, whole: Path) -> None:
    """Same losses, AP and weights, to the last bit; nothing unfinished left."""
    assert log_lines(killed) == log_lines(whole)
    for name in ("model.safetensors", "best/model.safetensors", "checkpoint-12/average.safetensors"):
        expected, got = load_file(whole / name), load_file(killed / name)
        assert expected.keys() == got.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensor, got[key]), (name, key)
    assert not list(killed.glob(".*"))


@pytest.mark.slow
def test_killed_at_any_place_it_ends_as_if_nothing_had_happened(starter, tmp_path: Path) -> None:
    """kill -9 while it starts, within steps, and while each part of a checkpoint is being written."""
    settings = ["train.epochs=6", "train.ema=0.9", "train.eval_every=6", f"data.val.annotations={TINY}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(small_recipe(whole, *settings))
    steps = []
    for death in DEATHS:
        process = starter.Process(target=train_in_silence, args=(killed, settings, death))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (death, (tmp_path / "killed.txt").read_text())
        steps.append(max(map(checkpoint_step, killed.glob("checkpoint-*")), default=0))
        if steps[-1]:
            load_file(killed / f"checkpoint-{steps[-1]}" / "model.safetensors")
            torch.load(killed / f"checkpoint-{steps[-1]}" / "optimizer.pt", weights_only=True)
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 12)
    train(small_recipe(killed, *settings), resume="auto")
    assert_same_end(killed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_a_checkpoint_and_goes_on(tmp_path: Path, monkeypatch, number: int) -> None:
    """The signal comes within the third step of a run that would save its first checkpoint after the fourth."""
    settings = ["train.save_every=4", "train.workers=1"]
    whole, stopped = train(small_recipe(tmp_path / "whole", *settings)), tmp_path / "stopped"
    step, calls = PoseTrainer.training_step, itertools.count(1)

    def training_step(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:
            os.kill(os.getpid(), number)
        return step(*args, **kwargs)

    monkeypatch.setattr(PoseTrainer, "training_step", training_step)
    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    with pytest.raises(
        Interrupted, match=r"checkpoint-3 is saved; the same command with --resume continues there"
    ) as stop:
        train(small_recipe(stopped, *settings))
    assert stop.value.signal == number
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers
    assert {path.name for path in stopped.iterdir()} == {"checkpoint-3", "log.jsonl", "recipe.yaml"}
    train(small_recipe(stopped, *settings), resume="auto")
    expected, got = (load_file(folder / "model.safetensors") for folder in (whole, stopped))
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())


def test_a_run_keeps_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No run writes over the checkpoints, the model or the unfinished work of another, and none does so in silence."""
    output = tmp_path / "run"
    recipe = small_recipe(output, "train.epochs=0.5")
    output.mkdir()
    (output / "log.jsonl").touch()
    with own_folder(output, active=True), pytest.raises(InputError, match="run: another run is writing there"):
        train(recipe)
    train(recipe)
    assert "the log of a run without checkpoints is replaced" in capsys.readouterr().out
    model = (output / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds checkpoints of a run; pass --resume, or choose another output"):
        train(recipe)
    shutil.rmtree(output / "checkpoint-1")
    with pytest.raises(InputError, match=r"holds the model of a run \(model.safetensors\); choose another output"):
        train(recipe)
    with pytest.raises(InputError, match="holds a trained model and no checkpoint to resume from"):
        train(recipe, resume="auto")
    assert (output / "model.safetensors").read_bytes() == model
    train(small_recipe(tmp_path / "other", "train.epochs=0.5"), resume="auto")
    assert f"resume: no checkpoint in {tmp_path / 'other'}" in capsys.readouterr().out


def train_until_the_disk_is_full(output: Path) -> None:
    """No file may grow beyond 100 kB once the first checkpoint is there: what a full disk does to a process."""

    def fill() -> None:
        while not (output / "checkpoint-1").exists():
            time.sleep(0.001)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    threading.Thread(target=fill, daemon=True).start()
    try:
        train(small_recipe(output, "train.epochs=100"))
    except InputError as error:
        (output.parent / "error.txt").write_text(str(error))


def test_full_disk_leaves_the_last_good_checkpoint(starter, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = starter.Process(target=train_until_the_disk_is_full, args=(output,))
    process.start()
    process.join()
    error = (tmp_path / "error.txt").read_text()
    assert "the checkpoint cannot be written (" in error
    assert "File too large" in error
    assert "\n" not in error
    last = max(output.glob("checkpoint-*"), key=checkpoint_step)
    load_file(last / "model.safetensors")
    assert not list((output / ".unfinished").glob("checkpoint-*"))
    train(small_recipe(output, f"train.epochs={checkpoint_step(last) // 2 + 1}"), resume="auto")


def test_output_that_cannot_be_written_any_more(tmp_path: Path) -> None:
    """Also root meets this error: where the unfinished checkpoints go there is a file."""
    output = tmp_path / "run"

    def occupy() -> None:
        while not (output / "checkpoint-1").exists():
            time.sleep(0.001)
        while True:  # until the run gives up
            with contextlib.suppress(OSError):
                shutil.rmtree(output / ".unfinished")
                (output / ".unfinished").touch()
                return

    thread = threading.Thread(target=occupy, daemon=True)
    thread.start()
    with pytest.raises(InputError, match="checkpoint cannot be written"):
        train(small_recipe(output, "train.epochs=100"))
    thread.join()
    load_file(max(output.glob("checkpoint-*"), key=checkpoint_step) / "model.safetensors")


def test_infinite_loss_stops_with_a_sentence_and_without_a_checkpoint(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run", f"model.weights={tmp_path / 'broken'}")
    train(small_recipe(tmp_path / "start", "train.epochs=0.5"))
    model = HPetrForPoseEstimation.from_pretrained(tmp_path / "start")
    with torch.no_grad():
        model.heatmap_encoder.layers[0].ffn.linear2.bias.fill_(3e38)  # its norm overflows
    model.save_pretrained(tmp_path / "broken")
    shutil.copy(tmp_path / "start" / "preprocessor_config.json", tmp_path / "broken")
    with pytest.raises(FloatingPointError, match=r"images \d+, \d+: .*not finite.*heatmap = nan"):
        train(recipe)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_the_log_goes_back_to_the_checkpoint(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": 2}\n{"step": 1, "AP": 0.5}\n{"step": 2, "loss": 3}\n{"step": 3, "lo')
    history = [{"loss": 2, "step": 1}, {"eval_AP": 0.5, "step": 1}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    restore_log(tmp_path, tmp_path)
    assert log.read_text() == '{"step": 1, "loss": 2}\n{"step": 1, "AP": 0.5}\n'


def test_publishing_replaces_a_whole_folder(tmp_path: Path) -> None:
    for name, text in (("old", "1"), ("new", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(text)
    publish(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "new"]
    assert (tmp_path / "old" / "new").read_text() == "2"
