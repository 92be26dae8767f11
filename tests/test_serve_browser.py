"""The page of `hpetr serve` in a real browser.

Chromium is looked for in the variable HPETR_CHROMIUM, on the path under its usual names, and where `playwright install
chromium` puts it. It does not come by pip: without one the tests are skipped.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hpetr import HPetrConfig, HPetrForPoseEstimation, HPetrImageProcessor
from hpetr.checkpoint import save_checkpoint
from serving import ServerProcess
from training_runs import SMALL_MODEL

pytest.importorskip("fastapi", reason="needs hpetr[serve]")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")

PICTURE = Path(__file__).parents[1] / "examples" / "000000000785.jpg"
NAMES = (
    "chromium-headless-shell",
    "chrome-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
)
ARGUMENTS = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a camera and its permission
MILLISECONDS = 60_000


def find_chromium(downloaded: str) -> str | None:
    candidates = [os.environ.get("HPETR_CHROMIUM"), *map(shutil.which, NAMES), downloaded]
    return next((path for path in candidates if path and Path(path).is_file()), None)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    torch.manual_seed(0)
    model = HPetrForPoseEstimation(HPetrConfig.preset("h-petr-nano", **SMALL_MODEL))
    folder = tmp_path_factory.mktemp("page") / "small"
    save_checkpoint(model, HPetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}), folder)
    with ServerProcess("--checkpoint", folder, "--max-megabytes", 2) as process:
        yield process
        process.process.send_signal(signal.SIGINT)
        assert process.process.wait(60) == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        path = find_chromium(driver.chromium.executable_path)
        if path is None:
            pytest.skip("no Chromium here: install one, or name it in HPETR_CHROMIUM")
        sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # root has none
        opened = driver.chromium.launch(executable_path=path, args=[*ARGUMENTS, *sandbox])
        yield opened
        opened.close()


class Tab:
    """A tab with the server's page; notes its requests and errors."""

    def __init__(self, browser: Any, server: ServerProcess, width: int = 1280, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 844}, **options)
        self.context.set_default_timeout(MILLISECONDS)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(server.url)
        self.page.wait_for_selector("#model:not(:empty)")

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def choose(self, path: Path) -> None:
        self.page.set_input_files("#file", path)

    def wait_for_poses(self) -> str:
        self.page.wait_for_selector("#found:visible")
        return self.page.inner_text("#count")

    def save(self, button: str, folder: Path) -> Path:
        with self.page.expect_download() as download:
            self.page.click(button)
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        return path

    def predictions(self) -> int:
        return sum("/v1/predict" in url for url in self.requests)


@pytest.fixture
def tab(browser: Any, server: ServerProcess) -> Iterator[Tab]:
    with Tab(browser, server) as opened:
        yield opened
        assert opened.errors == []
        assert all(url.startswith((server.url, "blob:", "data:")) for url in opened.requests)


def test_upload_slide_and_save(tab: Tab, tmp_path: Path) -> None:
    tab.choose(PICTURE)
    assert tab.wait_for_poses() == "10 people"
    assert tab.page.inner_text("#status").startswith("000000000785.jpg: 640 x 425 pixels, ")
    whole = json.loads(tab.save("#save-json", tmp_path).read_text())
    assert [len(pose["keypoints"]) for pose in whole["poses"]] == [17] * 10

    middle = round((whole["poses"][2]["score"] + whole["poses"][3]["score"]) / 2, 2)
    tab.page.fill("#threshold", str(middle))
    assert tab.page.inner_text("#count") == "3 people (7 more below the threshold)"
    assert tab.page.locator("#poses > li").count() == 3
    assert tab.predictions() == 1, "the slider needs no other request"
    file = tab.save("#save-json", tmp_path)
    assert file.name == "000000000785-poses.json"
    seen = json.loads(file.read_text())
    assert seen == {**whole, "threshold": middle, "poses": whole["poses"][:3]}

    picture = tab.save("#save-picture", tmp_path)
    assert picture.name == "000000000785-poses.jpg"
    drawn = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    plain = np.asarray(Image.open(PICTURE).convert("RGB")).astype(int)
    assert drawn.shape == plain.shape
    changed = (np.abs(drawn - plain).max(-1) > 60).mean()
    assert 0.005 < changed < 0.5
    knee = whole["poses"][0]["keypoints"][13]
    red, green, blue = drawn[round(knee["y"]), round(knee["x"])]
    assert red > 200, "the best pose is red, and on top"
    assert max(green, blue) < 90


def test_names_and_scores_under_the_pointer_and_by_keys(tab: Tab) -> None:
    tab.choose(PICTURE)
    tab.wait_for_poses()
    tab.page.focus("#canvas")
    tab.page.keyboard.press("ArrowRight")
    first = tab.page.inner_text("#tip")
    assert first.startswith("nose, person 1: 0.")
    place = tab.page.locator("#ring").bounding_box()
    tab.page.mouse.move(5, 5)
    tab.page.keyboard.press("Escape")
    tab.page.wait_for_selector("#tip", state="hidden")
    tab.page.mouse.move(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
    assert tab.page.inner_text("#tip") == first
    tab.page.keyboard.press("ArrowDown")
    assert tab.page.inner_text("#tip").startswith("nose, person 2: 0.")
    tab.page.click("#poses summary >> nth=0")
    assert "left wrist" in tab.page.inner_text("#poses table")


def test_a_model_that_scores_joints_has_a_slider_for_them(tab: Tab) -> None:
    """The server's answer with confidences as a model may give them."""

    def with_scores(route: Any) -> None:
        answer = route.fetch()
        prediction = answer.json()
        for pose in prediction["poses"]:
            for number, joint in enumerate(pose["keypoints"]):
                joint["score"] = number / 17
        route.fulfill(response=answer, json=prediction)

    assert tab.page.is_visible("#joint-slider")
    tab.choose(PICTURE)
    tab.wait_for_poses()
    assert not tab.page.is_visible("#joint-slider"), "all joints score 1"
    tab.page.route("**/v1/predict*", with_scores)
    tab.choose(PICTURE)
    tab.page.wait_for_selector("#joint-slider:visible")
    tab.page.fill("#joints", "0.6")
    tab.page.focus("#canvas")
    tab.page.keyboard.press("ArrowLeft")
    assert tab.page.inner_text("#tip").startswith("nose 0.00, person 1")
    tab.page.click("#poses summary >> nth=0")
    tab.page.wait_for_selector("#poses tr.unseen >> nth=10", state="attached")  # the page redraws in its own time
    assert tab.page.locator("#poses tr.unseen").count() == 11


def test_errors_are_said_and_the_next_picture_works(tab: Tab, tmp_path: Path) -> None:
    text, large = tmp_path / "notes.txt", tmp_path / "large.png"
    text.write_text("not a picture")
    large.write_bytes(bytes(3_000_000))
    tab.choose(text)
    tab.page.wait_for_selector("#message:visible")
    said = tab.page.inner_text("#message")
    assert said == "notes.txt: The upload is not a picture, expected JPEG, PNG, WebP, GIF, BMP or TIFF."
    tab.choose(large)
    tab.page.wait_for_selector("text=The file has 3.0 MB, at most 2 MB are taken here.")
    assert tab.predictions() == 1, "what is too large is not sent"
    tab.choose(PICTURE)
    tab.wait_for_poses()
    assert not tab.page.is_visible("#message")


def test_a_picture_that_the_browser_cannot_show_has_poses_too(tab: Tab, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.open(PICTURE).save(buffer, "TIFF")
    file = tmp_path / "scan.tiff"
    file.write_bytes(buffer.getvalue())
    tab.choose(file)
    assert tab.wait_for_poses() == "10 people"
    assert "This browser cannot show the picture" in tab.page.inner_text("#status")


def test_drop_on_a_dark_phone_and_its_camera(browser: Any, server: ServerProcess) -> None:
    with Tab(browser, server, width=390, color_scheme="dark", has_touch=True) as tab:
        drop = """async () => {
            const files = new DataTransfer();
            const ground = new OffscreenCanvas(300, 200);
            ground.getContext("2d").fillRect(50, 50, 100, 100);
            const picture = await ground.convertToBlob();
            files.items.add(new File([picture], "dropped.png", {type: "image/png"}));
            document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true}));
        }"""
        tab.page.evaluate(drop)
        assert tab.wait_for_poses() == "10 people"
        assert tab.page.inner_text("#status").startswith("dropped.png: 300 x 200 pixels")
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
        tab.page.click("#camera")
        tab.page.wait_for_selector("#video:visible")
        tab.page.click("#live")
        for count in (2, 3):
            while tab.predictions() < count:
                tab.page.wait_for_timeout(20)
        tab.page.click("#live")
        tab.page.click("#shoot")
        tab.page.wait_for_selector("#canvas:visible")
        tab.page.wait_for_selector("#video", state="hidden")
        tab.page.wait_for_selector("text=camera.jpg: 1280 x 720 pixels")
        assert tab.errors == []
