"""No output of any command replaces an input or a special file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hpetr.cli.main import app
from paths import EXAMPLES, TINY

IMAGE = EXAMPLES / "000000000885.jpg"


def hpetr(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "inputs"
    shutil.copytree(TINY, folder / "data")
    for name in ("1.jpg", "2.jpg"):
        shutil.copy(IMAGE, folder / name)
    (folder / "link.json").symlink_to("data/annotations.json")
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "predict 2.jpg --json 1.jpg 2.jpg",  # a pattern of the shell behind --json
        "predict 1.jpg --no-draw --json 1.jpg",
        "predict 1.jpg --json data/annotations.txt",
        "predict 1.jpg -o .",
        "eval CHECKPOINT data --limit 1 -o data/annotations.json",
        "eval CHECKPOINT data --limit 1 -o link.json",
        "eval CHECKPOINT data --limit 1 --output data/images/000000000790.jpg",
        "eval --zoo . data --limit 1 --output data/annotations.json",
        "benchmark CHECKPOINT --image 1.jpg --repeats 1 --json 1.jpg",
        "predict 1.jpg --no-draw --json CHECKPOINT/config.json",
        "eval CHECKPOINT data --limit 1 -o CHECKPOINT/preprocessor_config.json",
        "benchmark CHECKPOINT --repeats 1 --json CHECKPOINT/config.json",
        "convert CHECKPOINT --to-official 1.jpg",
        "export CHECKPOINT --output 1.jpg",
    ],
)
def test_inputs_stay(command: str, inputs: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs)
    places = [*inputs.rglob("*"), *checkpoint.iterdir()]
    files = {path: path.read_bytes() for path in places if path.is_file()}
    words = command.replace("CHECKPOINT", str(checkpoint)).split()
    done = hpetr(*words, *(("--checkpoint", checkpoint) if words[0] == "predict" else ()))
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: "), done.output
    assert len(done.stderr.splitlines()) == 1
    assert {path: path.read_bytes() for path in files} == files
    assert len([*inputs.rglob("*"), *checkpoint.iterdir()]) == len(places)
    assert (inputs / "link.json").is_symlink()


def test_results_go_to_standard_output_and_pipes(checkpoint: Path, tmp_path: Path) -> None:
    command = ("predict", IMAGE, "--checkpoint", checkpoint, "--no-draw")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "hpetr", *map(str, command), "--json", "-"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["annotations"]) == 10
    assert done.stderr.splitlines() == ["10 people in 1 image", "results: -"]
    assert list(tmp_path.iterdir()) == []
    if hasattr(os, "mkfifo"):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        read: list[str] = []
        reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
        reader.start()
        assert hpetr(*command, "--json", pipe).exit_code == 0
        reader.join()
        assert len(json.loads(read[0])["annotations"]) == 10
        assert pipe.is_fifo()


def test_json_lines_of_images(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    results = tmp_path / "r.jsonl"
    inputs = (IMAGE, tmp_path / "broken.jpg")
    done = hpetr("predict", *inputs, "--checkpoint", checkpoint, "--no-draw", "--json", results)
    assert done.exit_code == 0, done.output
    first, second = map(json.loads, results.read_text().splitlines())
    assert (first["file_name"], len(first["poses"])) == (str(IMAGE), 10)
    assert second["file_name"] == str(inputs[1])
    assert second["unreadable"].startswith(f"{inputs[1]}: ")


def test_results_of_other_images_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    other = EXAMPLES / "000000239537.jpg"
    command = ("--checkpoint", checkpoint, "--output", tmp_path / "out")
    assert hpetr("predict", IMAGE, *command).exit_code == 0
    first = (tmp_path / "out" / "predictions.json").read_bytes()
    assert hpetr("predict", IMAGE, *command).exit_code == 0, "the same image again"
    done = hpetr("predict", other, *command)
    kept = tmp_path / "out" / "predictions.1.json"
    assert f"earlier results of other images: {kept}\n" in done.stdout
    assert kept.read_bytes() == first
    assert sorted(path.name for path in kept.parent.iterdir()) == sorted(
        [IMAGE.name, other.name, "predictions.1.json", "predictions.json"]
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's full device")
def test_full_standard_output_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hpetr", "predict", IMAGE, "--checkpoint", checkpoint, "--output", tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for more in ([], ["--json", "-", "--no-draw"]):
        with open("/dev/full", "w") as full:
            words = [*map(str, command), *more]
            done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
        assert done.returncode == 2
        error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert error == ["error: standard output: cannot be written (No space left on device)"]
        assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [IMAGE.name, "predictions.json"]


def test_quiet_and_verbose(checkpoint: Path, tmp_path: Path) -> None:
    command = ("predict", IMAGE, "--checkpoint", checkpoint, "-o", tmp_path)
    assert hpetr(*command, "-q").output == ""
    assert hpetr("-q", *command).output == ""
    assert "on cpu, float32" in hpetr(*command, "-v").stderr
    assert "Traceback" in hpetr("predict", "nothing.jpg", "-v").stderr
    assert "Traceback" not in hpetr("predict", "nothing.jpg").stderr


def test_files_that_are_no_images_are_named(checkpoint: Path, inputs: Path, tmp_path: Path) -> None:
    for number in range(7):
        (inputs / f"{number}.txt").touch()
    done = hpetr("predict", inputs, "--checkpoint", checkpoint, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith("warning: 8 files passed over, no image by the suffix: ")
    assert done.stderr.endswith(", ...\n")


def test_keypoint_threshold_that_hides_everything_is_named(tmp_path: Path) -> None:
    command = ("predict", IMAGE, "-o", tmp_path)  # the bundled model scores its keypoints
    hidden = hpetr(*command, "--keypoint-threshold", 1)
    assert "no keypoint has a score of 1 or more, so drawings and labels show none" in hidden.stderr
    drawn = (tmp_path / IMAGE.name).read_bytes()
    shown = hpetr(*command, "--keypoint-threshold", 0)
    assert shown.stderr == ""
    assert (tmp_path / IMAGE.name).read_bytes() != drawn


def test_progress_goes_to_a_log_too(capsys: pytest.CaptureFixture[str]) -> None:
    from hpetr.cli.output import progress, set_level

    set_level(0)
    with progress("Predicting", 3, seconds=0) as advance:
        for _ in range(3):
            advance(1)
    assert capsys.readouterr().err == "predicting: 1 of 3\npredicting: 2 of 3\n"


def test_a_preset_is_explained(tmp_path: Path) -> None:
    done = hpetr("predict", IMAGE, "--checkpoint", "petr-r50", "-o", tmp_path)
    assert done.exit_code == 2
    assert "petr-r50: is a preset, a design without trained weights; expected a checkpoint: " in done.stderr


@pytest.mark.parametrize("module", ["hpetr", "hpetr.cli"])
def test_modules_run_the_command_line(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "-V"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("hpetr 0.")


def test_shell_completion_is_offered() -> None:
    # Typer else takes the shell that the tests run in, and refuses make's `sh`.
    shell = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "hpetr", "--show-completion", "bash"],
        capture_output=True,
        text=True,
        check=True,
        env=shell,
    )
    assert "complete" in done.stdout
