"""Predictions that are stopped and go on: nothing is lost, nothing comes twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hpetr.cli.main import app
from paths import EXAMPLES

NAMES = ("000000000885.jpg", "000000239537.jpg")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
# Ends this process in the middle of the work: after the given number of images, with a drawing half written.
KILLED = """
import os, signal, sys
from pathlib import Path
import hpetr.inference.files as files
left = int(sys.argv[1])
write = files.write_bytes
def write_some(path, data):
    global left
    if path.suffix == ".jpg":
        left -= 1
        if left < 0:
            path.with_name(f".{path.name}.{os.getpid()}.tmp").write_bytes(data[:100])
            os.kill(os.getpid(), signal.SIGKILL)
    write(path, data)
files.write_bytes = write_some
from hpetr.cli.main import app
app(sys.argv[2:])
"""


def hpetr(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(9):
        (folder / f"{number}.jpg").write_bytes((EXAMPLES / NAMES[number % 2]).read_bytes())
    (folder / "4.jpg").write_bytes(b"no image")
    return folder


def kill_after(number: int, *arguments: object) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(number), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_killed_predictions_go_on(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    options = ("--checkpoint", checkpoint, "--format", "coco", "--format", "csv")
    assert hpetr("predict", images, *options, "--output", whole).exit_code == 0
    command = ("predict", images, *options, "--output", output)
    kill_after(2, *command)
    journal = output / "predictions.partial.jsonl"
    torn = journal.read_bytes()
    names = [json.loads(line).get("file_name") for line in torn.splitlines()]
    assert names == [None, str(images / "0.jpg"), str(images / "1.jpg")]
    journal.write_bytes(torn + b'{"file_name": "half of a li')
    refused = hpetr(*command)
    assert refused.exit_code == 2
    assert "predictions.partial.jsonl: holds 2 images of a run that was stopped, expected --resume" in refused.stderr
    kill_after(3, *command, "--resume")
    kill_after(1, *command, "--resume")
    done = hpetr(*command, "--resume")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("7 images done before\n80 people in 8 images\n")
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in whole.iterdir())
    for name in ("predictions.json", "predictions.csv"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()
    again = hpetr(*command, "--resume")
    assert again.stdout.startswith("nothing left to do: "), again.output


def test_a_run_goes_on_with_the_same_settings_only(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    command = ("predict", images, "--checkpoint", checkpoint, "--output", tmp_path / "out")
    kill_after(1, *command)
    other = hpetr(*command, "--resume", "--threshold", 0.5)
    assert other.exit_code == 2
    assert "was begun with threshold 0.0, expected the same, not 0.5" in other.stderr
    (tmp_path / "out" / "predictions.partial.jsonl").write_text('{"file_name": "x"}\n')
    broken = hpetr(*command, "--resume")
    assert "predictions.partial.jsonl: line 1 is not one of a prediction" in broken.stderr


def test_resume_without_a_stopped_run_begins(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    done = hpetr("predict", images / "1.jpg", "--checkpoint", checkpoint, "--output", tmp_path / "out", "--resume")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("10 people in 1 image\n")
