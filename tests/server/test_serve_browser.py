"""The page of `hpetr serve` in a real browser.

Chromium is searched in the variable HPETR_CHROMIUM, on the path under its usual names, and where `playwright install
chromium` puts it. Without one the tests are skipped.
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
from PIL import Image, ImageOps
from playwright.sync_api import sync_playwright

from paths import EXAMPLES
from serving import SECONDS, ServerProcess, save_small_checkpoint

IMAGE = EXAMPLES / "000000000785.jpg"
NAMES = (
    "chromium-headless-shell",
    "chrome-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
)
CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # with the permission to use it
# Chromium sends requests to servers of its makers.
ALONE = ["--disable-quic", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
MILLISECONDS = 600_000


def find_chromium() -> str | None:
    with sync_playwright() as driver:
        downloaded = driver.chromium.executable_path
    candidates = [os.environ.get("HPETR_CHROMIUM"), *map(shutil.which, NAMES), downloaded]
    return next((path for path in candidates if path and Path(path).is_file()), None)


CHROMIUM = find_chromium()
if CHROMIUM is None:
    pytest.skip(
        "no Chromium: `make browser` as root installs Debian's; or name one in HPETR_CHROMIUM", allow_module_level=True
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("page") / "small"
    save_small_checkpoint(folder, threshold=0.1)
    with ServerProcess("--checkpoint", folder, "--max-megabytes", 2) as process:
        yield process
        process.process.send_signal(signal.SIGINT)
        assert process.process.wait(SECONDS) == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as driver:
        sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # root has none
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=[*CAMERA, *ALONE, *sandbox])
        yield opened
        opened.close()


class Tab:
    """A tab with the server's page, with a record of its requests and errors."""

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
    tab.choose(IMAGE)
    assert tab.wait_for_poses() == "10 people"
    assert tab.page.inner_text("#status").startswith("000000000785.jpg: 640 x 425 pixels, ")
    whole = json.loads(tab.save("#save-json", tmp_path).read_text())
    assert [len(pose["keypoints"]) for pose in whole["poses"]] == [17] * 10

    scores = np.array([pose["score"] for pose in whole["poses"]])
    above = 2 + int(np.argmax(scores[1:9] - scores[2:]))  # the slider has two digits: where the scores are well apart
    middle = round(float(scores[above - 1] + scores[above]) / 2, 2)
    tab.page.fill("#threshold", str(middle))
    assert tab.page.inner_text("#count") == f"{above} people ({10 - above} more below the threshold)"
    assert tab.page.locator("#poses > li").count() == above
    assert tab.predictions() == 1, "the slider needs no other request"
    file = tab.save("#save-json", tmp_path)
    assert file.name == "000000000785-poses.json"
    seen = json.loads(file.read_text())
    assert seen == {**whole, "threshold": middle, "poses": whole["poses"][:above]}

    image = tab.save("#save-image", tmp_path)
    assert image.name == "000000000785-poses.jpg"
    drawn = np.asarray(Image.open(image).convert("RGB")).astype(int)
    plain = np.asarray(Image.open(IMAGE).convert("RGB")).astype(int)
    assert drawn.shape == plain.shape
    changed = (np.abs(drawn - plain).max(-1) > 60).mean()
    assert 0.005 < changed < 0.5
    knee = whole["poses"][0]["keypoints"][13]
    red, green, blue = drawn[round(knee["y"]), round(knee["x"])]
    assert red > 200, "the best pose is red, and on top"
    assert max(green, blue) < 90


def test_names_and_scores_by_pointer_and_keys(tab: Tab) -> None:
    tab.choose(IMAGE)
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


def test_a_model_with_keypoint_scores_has_a_slider_for_them(tab: Tab) -> None:
    """The server's answer with scores as a model may give them."""

    def with_scores(route: Any) -> None:
        answer = route.fetch()
        prediction = answer.json()
        for pose in prediction["poses"]:
            for number, joint in enumerate(pose["keypoints"]):
                joint["score"] = number / 17
        route.fulfill(response=answer, json=prediction)

    tab.choose(IMAGE)
    tab.wait_for_poses()
    assert not tab.page.is_visible("#keypoint-slider"), "all keypoints score 1"
    tab.page.route("**/v1/predict*", with_scores)
    tab.choose(IMAGE)
    tab.page.wait_for_selector("#keypoint-slider:visible")
    tab.page.fill("#keypoints", "0.6")
    tab.page.focus("#canvas")
    tab.page.keyboard.press("ArrowLeft")
    assert tab.page.inner_text("#tip").startswith("nose 0.00, person 1")
    tab.page.click("#poses summary >> nth=0")
    tab.page.wait_for_selector("#poses tr.unseen >> nth=10", state="attached")  # the page redraws later
    assert tab.page.locator("#poses tr.unseen").count() == 11


def test_errors_are_shown_and_the_next_image_works(tab: Tab, tmp_path: Path) -> None:
    text, large = tmp_path / "notes.txt", tmp_path / "large.png"
    text.write_text("not an image")
    large.write_bytes(bytes(3_000_000))
    tab.choose(text)
    tab.page.wait_for_selector("#message:visible")
    said = tab.page.inner_text("#message")
    assert said == "notes.txt: The upload is not an image, expected JPEG, PNG, WebP, GIF, BMP or TIFF."
    tab.choose(large)
    tab.page.wait_for_selector("text=The file has 3.0 MB, the server takes at most 2 MB.")
    assert tab.predictions() == 1, "a file over the limit is not sent"
    tab.choose(IMAGE)
    tab.wait_for_poses()
    assert not tab.page.is_visible("#message")


def test_an_image_that_the_browser_cannot_show_has_poses_too(tab: Tab, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.open(IMAGE).save(buffer, "TIFF")
    file = tmp_path / "scan.tiff"
    file.write_bytes(buffer.getvalue())
    tab.choose(file)
    assert tab.wait_for_poses() == "10 people"
    assert "This browser cannot show the image" in tab.page.inner_text("#status")


def test_paste_by_key_and_by_button(browser: Any, server: ServerProcess) -> None:
    copy = """async () => {
        const ground = new OffscreenCanvas(300, 200);
        ground.getContext("2d").fillRect(50, 50, 100, 100);
        await navigator.clipboard.write([new ClipboardItem({"image/png": ground.convertToBlob()})]);
    }"""
    with Tab(browser, server, permissions=["clipboard-read", "clipboard-write"]) as tab:
        tab.page.evaluate(copy)
        tab.page.keyboard.press("Control+V")
        tab.wait_for_poses()
        assert "300 x 200 pixels" in tab.page.inner_text("#status")
        tab.page.reload()
        tab.page.wait_for_selector("#model:not(:empty)")
        tab.page.click("#paste")
        tab.wait_for_poses()
        assert tab.page.inner_text("#status").startswith("pasted image: 300 x 200 pixels")
        tab.page.evaluate("navigator.clipboard.writeText('words')")
        tab.page.click("#paste")
        tab.page.wait_for_selector("text=There is no image in the clipboard.")
        assert tab.errors == []


def test_an_image_with_exif_orientation_is_drawn_upright(tab: Tab, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate to the right
    file = tmp_path / "phone.jpg"
    with Image.open(IMAGE) as image:
        image.save(file, exif=exif, quality=95)
    tab.choose(file)
    tab.wait_for_poses()
    tab.page.fill("#threshold", "0.99")  # no pose covers the image
    assert tab.page.inner_text("#count").startswith("0 people")
    saved = np.asarray(Image.open(tab.save("#save-image", tmp_path)).convert("RGB")).astype(int)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB")).astype(int)
    assert saved.shape == upright.shape == (640, 425, 3)
    assert np.abs(saved - upright).mean() < 5


def drop_image(tab: Tab, name: str) -> None:
    tab.page.evaluate(
        """async (name) => {
            const files = new DataTransfer();
            const ground = new OffscreenCanvas(300, 200);
            ground.getContext("2d").fillRect(50, 50, 100, 100);
            const image = await ground.convertToBlob();
            files.items.add(new File([image], name, {type: "image/png"}));
            document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true}));
        }""",
        name,
    )


def test_drop_on_a_dark_phone_and_touch_a_keypoint(browser: Any, server: ServerProcess) -> None:
    with Tab(browser, server, width=390, color_scheme="dark", has_touch=True) as tab:
        name = f"{'long' * 30}.png"
        drop_image(tab, name)
        assert tab.wait_for_poses() == "10 people"
        assert tab.page.inner_text("#status").startswith(f"{name}: 300 x 200 pixels")
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
        tab.page.focus("#canvas")
        tab.page.keyboard.press("ArrowRight")
        place = tab.page.locator("#ring").bounding_box()
        tab.page.keyboard.press("Escape")
        tab.page.touchscreen.tap(place["x"] + place["width"] / 2 + 3, place["y"] + place["height"] / 2)
        assert tab.page.inner_text("#tip").startswith("nose, person 1: 0.")
        tab.page.set_viewport_size({"width": 390, "height": 700})  # as when a phone's bars come and go
        assert tab.page.is_visible("#tip")
        assert tab.errors == []


def test_camera_image_by_image_and_continuous(browser: Any, server: ServerProcess) -> None:
    with Tab(browser, server, width=390) as tab:
        drop_image(tab, "dropped.png")
        tab.wait_for_poses()
        tab.page.click("#camera")
        tab.page.wait_for_selector("#video:visible")
        assert not tab.page.is_visible("#found"), "the list belongs to an image that is not visible"
        assert tab.page.is_disabled("#save-json")
        tab.page.fill("#threshold", "0.02")
        assert not tab.page.is_visible("#found")
        tab.page.click("#live")
        for count in (2, 3):
            while tab.predictions() < count:
                tab.page.wait_for_timeout(20)
        tab.wait_for_poses()
        tab.page.click("#live")
        tab.page.wait_for_selector("#found", state="hidden")
        tab.page.click("#shoot")
        tab.page.wait_for_selector("#canvas:visible")
        tab.page.wait_for_selector("#video", state="hidden")
        tab.page.wait_for_selector("text=camera.jpg: 1280 x 720 pixels")
        assert tab.page.is_enabled("#save-json")
        tab.page.click("#camera")
        tab.page.wait_for_selector("#video:visible")
        tab.page.click("#camera")
        tab.page.wait_for_selector("text=camera.jpg: 1280 x 720 pixels")
        tab.wait_for_poses()
        assert tab.errors == []


@pytest.mark.parametrize("width", [390, 1280])
def test_the_description_of_the_api_is_a_page_of_its_own(browser: Any, server: ServerProcess, width: int) -> None:
    with Tab(browser, server, width=width) as tab:
        tab.page.click("text=API")
        tab.page.wait_for_selector("text=POST /v1/predict")
        assert "keypoint_threshold" in tab.page.inner_text("table >> nth=0")
        tab.page.click("a:has-text('Prediction') >> nth=0")
        assert tab.page.url.endswith("/docs#Prediction")
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
        assert all(url.startswith((server.url, "data:")) for url in tab.requests)
        assert tab.errors == []
