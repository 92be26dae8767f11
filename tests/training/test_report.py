"""The training report: complete for a real log, sound for short and broken ones, and one file with nothing outside."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pytest

from hpetr import InputError
from hpetr.checkpoints.folder import load_checkpoint
from hpetr.data.dataset import open_dataset
from hpetr.training.recipe import Recipe, load_recipe
from hpetr.training.report import draw_samples, read_log, remake_report, write_report
from hpetr.training.run import write_recipe
from paths import ROOT

TINY = ROOT / "examples" / "tiny-coco" / "annotations.json"
METRICS = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")


def make_recipe(folder: Path, *overrides: str) -> Recipe:
    values = [f"output={folder}", f"data.train.0.annotations={TINY}", *overrides]
    return load_recipe(ROOT / "recipes" / "h-petr-nano.yaml", values)


def training_line(step: int, **more: float) -> dict[str, float]:
    terms = {"proposal.class": 2 / step, "decoder.0.class": 1.0, "decoder.0.l1": 3.0, "heatmap": 500 / step}
    return {"step": step, "loss": 900 / step, "grad_norm": 10.0, "learning_rate": 1e-4, **terms, "epoch": step, **more}


def write_log(folder: Path, *lines: dict[str, float], tail: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def images(page: str, css_class: str) -> dict[str, np.ndarray]:
    """Alternative text and decoded image of every figure of a class."""
    found = re.findall(rf'<figure class={css_class}><img src="data:image/\w+;base64,([^"]+)" alt="([^"]+)">', page)
    decoded = {alt: cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), -1) for data, alt in found}
    assert all(image is not None for image in decoded.values())
    return decoded


def cell(page: str, head: str) -> list[str]:
    row = re.search(rf"<tr><th>{re.escape(head)}</th>(.*?)</tr>", page)
    assert row is not None, head
    return re.findall(r"<td>(.*?)</td>", row[1])


def test_report_is_remade_from_a_runs_folder(checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run)
    metrics = {name: 0.01 * (i + 1) for i, name in enumerate(METRICS)}
    lines = [training_line(step, step_seconds=0.5 * step) for step in (1, 2, 3)]
    evaluations = [{"step": 2, **metrics, "AP": 0.5}, {"step": 3, **metrics, "APM": -1.0}]
    write_log(run, *lines, *evaluations, {"step": 3, "train_runtime": 4020.0, "epoch": 3.0})
    recipe = make_recipe(run, f"data.val={{annotations: {TINY}, limit: 2}}", "data.train.0.repeat=3")
    write_recipe(recipe)

    page = remake_report(run).read_text()
    assert cell(page, "training data") == [f"{TINY}: {open_dataset(TINY).report}, each 3 times an epoch"]
    assert cell(page, "validation data") == [f"{TINY}: {open_dataset(TINY, limit=2).report}"]
    assert cell(page, "steps") == ["3 of 4 images each, 3 epochs"]
    assert cell(page, "time per step") == ["1 s median, 0.75 to 1.25 s quartiles"]
    assert cell(page, "time since the last start") == ["1 h 7 min"]
    assert "<th>final, step 3</th><th>best, step 2</th>" in page
    assert cell(page, "AP") == ["0.0100", "0.5000"]
    assert cell(page, "APM") == ["-", "0.0400"]
    assert cell(page, "ARL") == ["0.1000", "0.1000"]
    assert list(images(page, "curve")) == [
        "loss, all terms",
        "loss: class",
        "loss: l1",
        "loss: heatmap",
        "average precision",
        "learning rate",
        "gradient norm before clipping",
        "seconds per step",
    ]
    assert len(images(page, "wide")) == 2
    assert "total_batch_size: 4" in page
    # Nothing outside the file, and no script.
    assert not re.search(r"<script|https?://|<link|url\(|@import", page)
    assert set(re.findall(r'src="(.{11})', page)) == {"data:image/"}
    assert [path.name for path in run.iterdir() if path.name.endswith(".tmp")] == []


def test_short_and_broken_logs(tmp_path: Path) -> None:
    recipe, data = make_recipe(tmp_path), [open_dataset(TINY)]

    write_log(tmp_path, training_line(1), tail='{"step": 2, "lo')
    page = write_report(tmp_path, recipe, data, None, []).read_text()
    assert cell(page, "log.jsonl") == ["1 unreadable line left out"]
    assert cell(page, "validation data") == ["none"]
    assert "Not evaluated: the recipe has no data.val." in page
    curves = images(page, "curve")
    assert "average precision" not in curves
    assert curves["loss, all terms"][..., 3].max() == 255  # a single point is a visible mark
    assert "Samples" not in page

    write_log(tmp_path)
    page = write_report(tmp_path, recipe, data, data[0], []).read_text()
    assert "Nothing was logged." in page
    assert "Not evaluated yet." in page
    assert cell(page, "time per step") == ["not logged"]

    crowdpose = {"AP": 0.5, "AP50": 0.6, "AP(easy)": 0.7, "AP(hard)": -1.0}
    write_log(tmp_path, {"step": 5, **crowdpose, "epoch": 1.0}, {"step": 9, **crowdpose, "AP": 0.4, "epoch": 2.0})
    page = write_report(tmp_path, recipe, data, data[0], []).read_text()
    assert cell(page, "AP") == ["0.4000", "0.5000"]
    assert cell(page, "AP(easy)") == ["0.7000", "0.7000"]
    assert cell(page, "AP(hard)") == ["-", "-"]
    assert "<th>APM</th>" not in page

    write_log(tmp_path, {"step": 5, "train_runtime": 10.0, "train_steps_per_second": 0.5, "epoch": 1.0})
    page = write_report(tmp_path, recipe, data, None, []).read_text()
    assert cell(page, "steps") == ["5 of 4 images each, 1 epochs"]
    assert cell(page, "time per step") == ["2 s on average, evaluations included"]

    with pytest.raises(InputError, match=r"none.log\.jsonl: cannot be read"):
        write_report(tmp_path / "none", recipe, data, None, [])


def test_long_log_is_averaged_and_text_is_escaped(tmp_path: Path) -> None:
    write_log(tmp_path, *(training_line(step) for step in range(1, 1002)))
    recipe = make_recipe(tmp_path, "model.weights='<b>&'")
    page = write_report(tmp_path, recipe, [open_dataset(TINY)], None, [('"<i>', np.zeros((4, 6, 3), np.uint8))])
    text = page.read_text()
    assert plt.get_fignums() == []  # a program's own figures are left alone
    assert "mean of 6 lines" in text
    assert cell(text, "starts from") == ["&lt;b&gt;&amp;"]
    assert "<i>" not in text
    assert images(text, "wide")["&quot;&lt;i&gt;"].shape == (4, 6, 3)


def test_read_log_of_a_real_run() -> None:
    """The log of the bundled checkpoint's training."""
    log = read_log(ROOT / "src" / "hpetr" / "weights" / "h-petr-nano" / "training_log.jsonl")
    assert (len(log.training), len(log.evaluations), len(log.summaries), log.unreadable) == (102, 0, 1, 0)
    assert log.training[-1]["step"] == 2040
    for line in log.training:  # the terms are exactly what the loss is the sum of
        assert sum(line[name] for name in log.terms) == pytest.approx(line["loss"], rel=1e-3)


def test_samples_show_labels_and_predictions(checkpoint: Path) -> None:
    model, processor = load_checkpoint(checkpoint, "cpu")
    dataset = open_dataset(TINY)
    model.train()
    samples = draw_samples(model, processor, dataset, count=1)
    assert model.training
    ((caption, image),) = samples
    source = dataset[0]
    assert caption == f"{source.path.name}: {len(source.keypoints)} labelled, 10 found with a score above 0"
    width = (image.shape[1] - 8) // 2
    left, right = image[:, :width], image[:, -width:]
    assert left.shape == source.image.shape  # 640 x 480 or smaller stays as it is
    # The labels' joints are covered by the drawing on the left, the rest of the image is as it was.
    x, y = source.keypoints[source.keypoints[..., 2] > 0][:, :2].round().astype(int).T
    inside = (x < source.image.shape[1]) & (y < source.image.shape[0])
    assert (left[y, x][inside] != source.image[y, x][inside]).any(-1).mean() > 0.9
    assert (left == source.image).all(-1).mean() > 0.7
    assert (left != right).any()
    # No pose is above 1: the right half is the image.
    ((caption, image),) = draw_samples(model, processor, dataset, count=1, threshold=1.0)
    assert caption.endswith("0 found with a score above 1")
    np.testing.assert_array_equal(image[:, -width:], source.image)
