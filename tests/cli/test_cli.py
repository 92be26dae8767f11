"""The command line as a user meets it: exit codes, one clear line on bad input, and files that are whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from typer.testing import CliRunner, Result

from hpetr import HPetrConfig, HPetrForPoseEstimation, HPetrImageProcessor, __version__
from hpetr.checkpoints.folder import load_checkpoint, save_checkpoint
from hpetr.cli.main import app
from paths import EXAMPLES

TINY = EXAMPLES / "tiny-coco"
IMAGES = ["000000000885.jpg", "000000239537.jpg"]


def hpetr(*arguments: object) -> Result:
    """A command in this process: quick, as torch is imported already."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_bad_input(result: Result, message: str) -> None:
    """Check that stderr has one line with the message, and that the exit code is 2."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in IMAGES:
        shutil.copy(EXAMPLES / name, folder)
    return folder


def test_help_and_version_do_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from hpetr.cli.main import app\n"
        "for arguments in (['--help'], ['predict', '--help'], ['train', '--help'], ['--version']):\n"
        "    try: app(arguments)\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'cv2', 'supervision'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("predict", "eval", "train", "convert", "info"):
        assert command in done.stdout
    assert f"hpetr {__version__}" in done.stdout


def test_installed_command_predicts_a_folder(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hpetr", "predict", str(images), "--checkpoint", str(checkpoint)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "20 people in 2 images",
        "drawings: outputs",
        f"results: {Path('outputs') / 'predictions.json'}",
    ]
    assert done.stderr == ""
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == [*IMAGES, "predictions.json"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupt_ends_with_130(checkpoint: Path, tmp_path: Path) -> None:
    images = tmp_path / "many"
    images.mkdir()
    first = Path(shutil.copy(EXAMPLES / IMAGES[0], images))
    for number in range(2000):
        (images / f"{number}.jpg").hardlink_to(first)
    command = [sys.executable, "-m", "hpetr", "predict", str(images), "--checkpoint", str(checkpoint)]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in a shell's background inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "outputs").glob("*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert not (tmp_path / "outputs" / "predictions.json").exists()


def test_predict_writes_a_coco_file_and_drawings(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = hpetr("predict", images, "--checkpoint", checkpoint, "--output", output)
    assert result.exit_code == 0, result.output
    coco = COCO(str(output / "predictions.json"))
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == [str(images / n) for n in IMAGES]
    assert len(coco.getAnnIds()) == 20
    pose = coco.loadAnns(coco.getAnnIds())[0]
    assert len(pose["keypoints"]) == 51
    assert 0 < pose["score"] < 1
    assert coco.loadCats([1])[0]["keypoints"][0] == "nose"
    for name in IMAGES:
        drawn, original = (np.asarray(Image.open(folder / name)) for folder in (output, images))
        assert drawn.shape == original.shape
        assert np.abs(drawn.astype(int) - original).max() > 100


def test_predict_without_drawings_and_with_a_named_json(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    results, output = tmp_path / "deep" / "r.json", tmp_path / "out"
    result = hpetr(
        "predict", images / "*.jpg", "--checkpoint", checkpoint, "--output", output, "--json", results, "--no-draw"
    )
    assert result.exit_code == 0, result.output
    assert len(json.loads(results.read_text())["images"]) == 2
    assert not output.exists()


def test_threshold_and_batch_size_reach_the_model(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ("--checkpoint", checkpoint, "--output", output, "--threshold", 1, "--batch-size", 2)
    result = hpetr("predict", images, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("0 people in 2 images")
    assert json.loads((output / "predictions.json").read_text())["annotations"] == []


def test_equal_names_from_two_folders_are_both_kept(checkpoint: Path, tmp_path: Path) -> None:
    for folder, name in zip(("x", "y"), IMAGES, strict=True):
        (tmp_path / folder).mkdir()
        shutil.copy(EXAMPLES / name, tmp_path / folder / "same.jpg")
    output = tmp_path / "out"
    result = hpetr("predict", tmp_path / "x", tmp_path / "y", "--checkpoint", checkpoint, "--output", output)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in output.iterdir()) == ["predictions.json", "same.jpg", "y_same.jpg"]


def test_bad_image_in_a_folder_is_counted_and_the_others_done(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    (images / "a-broken.jpg").write_bytes((images / IMAGES[0]).read_bytes()[:4000])
    output = tmp_path / "out"
    result = hpetr("predict", images, "--checkpoint", checkpoint, "--output", output, "--batch-size", 3)
    assert result.exit_code == 0, result.output
    assert "20 people in 2 images" in result.stdout
    assert f"1 of 3 images could not be read: {images / 'a-broken.jpg'}" in result.stderr
    written = json.loads((output / "predictions.json").read_text())
    assert [entry["file_name"] for entry in written["unreadable"]] == [str(images / "a-broken.jpg")]
    assert sorted(path.name for path in output.iterdir()) == [*IMAGES, "predictions.json"]


def test_single_bad_image_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    assert_bad_input(hpetr("predict", broken, "--checkpoint", checkpoint, "--output", tmp_path / "out"), str(broken))
    assert not (tmp_path / "out" / "predictions.json").exists()


def test_missing_image_is_found_before_any_work(images: Path, tmp_path: Path) -> None:
    result = hpetr("predict", images, tmp_path / "nope.jpg", "--checkpoint", "nowhere", "--output", tmp_path / "out")
    assert_bad_input(result, "nope.jpg: no such file or folder")
    assert not (tmp_path / "out").exists()


def test_unwritable_output_is_found_before_the_model_is_loaded(images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = hpetr("predict", images, "--checkpoint", "nowhere", "--output", tmp_path / "file" / "out")
    assert_bad_input(result, "cannot be used as output folder")


def test_images_are_never_replaced_by_their_drawings(checkpoint: Path, images: Path) -> None:
    before = (images / IMAGES[0]).read_bytes()
    result = hpetr("predict", images, "--checkpoint", checkpoint, "--output", images)
    assert_bad_input(result, "is one of the images")
    assert (images / IMAGES[0]).read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [["predict"], ["predict", "x.jpg", "--treshold", "0.5"], ["predict", "x.jpg", "--threshold", "2"], ["frobnicate"]],
)
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    assert hpetr(*arguments).exit_code == 2


def test_eval_prints_the_ten_figures_and_writes_them(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "eval.json"
    result = hpetr("eval", checkpoint, TINY, "--output", output, "--limit", 3)
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "eval.metrics.json").read_text())
    assert metrics["images"] == 3
    assert len({pose["image_id"] for pose in json.loads(output.read_text())}) == 3
    for name in ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL"):
        assert f"{name} " in result.stdout
        assert -1 <= metrics[name] <= 1


def test_eval_takes_annotations_and_images_from_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    moved = tmp_path / "people.json"
    shutil.copy(TINY / "annotations.json", moved)
    options = ("--images", TINY / "images", "--limit", 1, "--output", tmp_path / "eval.json")
    direct = hpetr("eval", checkpoint, moved, *options)
    assert direct.exit_code == 0, direct.output
    named = hpetr("eval", checkpoint, TINY, "--annotations", moved, "--limit", 1, "--output", tmp_path / "eval.json")
    assert named.exit_code == 0, named.output
    assert_bad_input(hpetr("eval", checkpoint, moved, "--output", tmp_path / "eval.json"), "no such folder")


def test_eval_of_an_unreadable_image_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "data")
    (tmp_path / "data" / "images" / "000000442450.jpg").write_bytes(b"no image")
    result = hpetr("eval", checkpoint, tmp_path / "data", "--output", tmp_path / "eval.json")
    assert_bad_input(result, "000000442450.jpg")
    assert not (tmp_path / "eval.json").exists()


def test_convert_to_official_and_back(tmp_path: Path) -> None:
    model = HPetrForPoseEstimation(HPetrConfig.preset("petr-r50"))
    save_checkpoint(model, HPetrImageProcessor(), tmp_path / "own")
    forth = hpetr("convert", tmp_path / "own", "--to-official", tmp_path / "official.pth")
    assert forth.exit_code == 0, forth.output
    wrong = hpetr("convert", tmp_path / "official.pth", "--preset", "h-petr-r50", "--output", tmp_path / "back")
    assert_bad_input(wrong, "official.pth: ")
    back = ("convert", tmp_path / "official.pth", "--output", tmp_path / "back")  # the preset is found by the tensors
    assert hpetr(*back).exit_code == 0
    again, processor = load_checkpoint(tmp_path / "back", "cpu")
    assert processor.size == {"shortest_edge": 800, "longest_edge": 1333}
    weights = again.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert_bad_input(hpetr(*back), "exists already")


def test_convert_to_half_the_size(tmp_path: Path, checkpoint: Path) -> None:
    assert hpetr("convert", checkpoint, "--half", "--output", tmp_path / "half").exit_code == 0
    whole, half = (folder / "model.safetensors" for folder in (checkpoint, tmp_path / "half"))
    assert half.stat().st_size < 0.52 * whole.stat().st_size
    model, _ = load_checkpoint(tmp_path / "half", "cpu")
    assert model.dtype == HPetrForPoseEstimation.from_pretrained(tmp_path / "half").dtype == torch.float32
    before = load_checkpoint(checkpoint, "cpu")[0].state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=1e-4, rtol=1e-3)


def test_convert_of_a_model_that_is_not_official(tmp_path: Path, checkpoint: Path) -> None:
    result = hpetr("convert", checkpoint, "--to-official", tmp_path / "official.pth")
    assert_bad_input(result, "no official model has a movenet backbone")
    assert not (tmp_path / "official.pth").exists()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--preset", "petr-r50"],
        ["--preset", "petr-r50", "--output", "y", "--to-official", "z"],
        ["--preset", "petr-r50", "--output", "y", "--half"],
        ["--to-official", "z", "--half"],
    ],
)
def test_convert_wants_one_direction(options: list[str]) -> None:
    expected = "convert: expected --output (with --preset or --half, or neither), or --to-official"
    assert_bad_input(hpetr("convert", "x.pth", *options), expected)


def test_convert_of_a_missing_file(tmp_path: Path) -> None:
    missing = hpetr("convert", tmp_path / "x.pth", "--preset", "petr-r50", "--output", tmp_path / "y")
    assert_bad_input(missing, "x.pth: no such file")


def test_info_of_a_preset_and_a_checkpoint(checkpoint: Path) -> None:
    preset = hpetr("info", "h-petr-r50", "--size", "256x320")
    assert preset.exit_code == 0, preset.output
    assert "46,719,073" in preset.stdout
    assert "1,280, 320, 80, 20" in preset.stdout
    own = hpetr("info", checkpoint)
    assert own.exit_code == 0, own.output
    model, _ = load_checkpoint(checkpoint, "cpu")
    assert f"{sum(p.numel() for p in model.parameters()):,}" in own.stdout


def test_info_alone_shows_the_versions() -> None:
    result = hpetr("info")
    assert result.exit_code == 0, result.output
    for word in (__version__, torch.__version__, "sampling kernel", "CPU threads"):
        assert word in result.stdout


def test_info_of_nothing_known() -> None:
    assert_bad_input(hpetr("info", "petr-r5000"), "expected one of petr-r50")
    assert_bad_input(hpetr("info", "petr-r50", "--size", "640"), "expected HEIGHTxWIDTH")


def test_train_reports_a_bad_recipe_in_one_line(tmp_path: Path) -> None:
    assert_bad_input(hpetr("train", tmp_path / "nope.yaml", "--resume"), "nope.yaml")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("frobnicate: 1\n")
    assert_bad_input(hpetr("train", recipe, "--resume", "train.lr=1"), "recipe.yaml")
