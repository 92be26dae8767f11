"""Runs that die: killed at random moments, out of disk space, with numbers that stop being numbers."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hpetr import HPetrForPoseEstimation, InputError
from hpetr.training.run import publish, restore_log
from hpetr.training.train import train
from training_runs import TINY, small_recipe

KILLS = 20


def train_in_silence(output: Path, overrides: list[str]) -> None:
    """What a process of its own does; started by a server that has imported everything, so it starts at once."""
    torch.set_num_threads(1)
    with (output.parent / f"{output.name}.txt").open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
        train(small_recipe(output, *overrides), resume="auto")


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


@pytest.fixture(scope="module")
def starter() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hpetr.training.train"])
    return context


def log_lines(folder: Path) -> list[dict]:
    """The log without its times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "step_seconds"} for line in lines if "train_runtime" not in line]


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint, 0 without one."""
    return max((checkpoint_step(path) for path in folder.glob("checkpoint-*")), default=0)


def run_until(process: multiprocessing.process.BaseProcess, folder: Path, step: int) -> None:
    """Wait until the run has published the checkpoint of `step`, or has ended."""
    while process.is_alive() and newest_step(folder) < step:
        time.sleep(0.001)


def same_end(killed: Path, whole: Path) -> None:
    """Same losses, AP and weights, to the last bit; nothing unfinished left."""
    assert log_lines(killed) == log_lines(whole)
    for name in ("model.safetensors", "best/model.safetensors", "checkpoint-20/average.safetensors"):
        expected, got = load_file(whole / name), load_file(killed / name)
        assert expected.keys() == got.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensor, got[key]), (name, key)
    assert not list(killed.glob(".*"))


def test_killed_twenty_times_it_ends_as_if_nothing_had_happened(starter, tmp_path: Path) -> None:
    """kill -9 at random moments: while it starts, within steps, and while checkpoints are being written."""
    settings = ["train.epochs=10", "train.ema=0.9", "train.eval_every=8", f"data.val.annotations={TINY}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = starter.Process(target=train_in_silence, args=(whole, settings))
    process.start()
    started = time.monotonic()
    run_until(process, whole, 1)
    to_first = time.monotonic() - started
    process.join()
    assert process.exitcode == 0, (tmp_path / "whole.txt").read_text()
    per_step = (time.monotonic() - started - to_first) / 19  # evaluations and the report included

    rng, steps, kills = random.Random(0), set(), 0
    while kills < KILLS:
        process = starter.Process(target=train_in_silence, args=(killed, settings))
        process.start()
        if rng.random() < 0.25:
            process.join(rng.uniform(0, to_first))
        else:  # progress is waited for, not timed: other work may slow the machine down at any moment
            run_until(process, killed, newest_step(killed) + 1)
            process.join(rng.uniform(0, per_step))
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / "killed.txt").read_text()
        if newest := newest_step(killed):
            load_file(killed / f"checkpoint-{newest}" / "model.safetensors")
            torch.load(killed / f"checkpoint-{newest}" / "optimizer.pt", weights_only=True)
            steps.add(newest)
        if process.exitcode == 0:  # at its end before the last kill: once more from the start
            same_end(killed, whole)
            shutil.rmtree(killed)
    process = starter.Process(target=train_in_silence, args=(killed, settings))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "killed.txt").read_text()
    same_end(killed, whole)
    assert len(steps) > 3, f"killed only after steps {steps}"


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
