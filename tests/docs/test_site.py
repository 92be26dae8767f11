"""The documentation as a site: built without a warning, complete, and independent of other servers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hpetr import PosePredictor
from paths import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return folder


class Loads(HTMLParser):
    """The addresses that a browser loads automatically."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag in ("script", "img", "source", "video", "iframe"):
            self.addresses.append(given.get("src", ""))
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(given.get("href", ""))


def test_nothing_is_loaded_from_other_servers(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 12
    for page in pages:
        for address in Loads(page).addresses:
            assert "//" not in address, f"{page.relative_to(site)} loads {address}"
    for style in site.rglob("*.css"):
        foreign = re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\"']+", style.read_text(encoding="utf-8"))
        assert not foreign, f"{style.relative_to(site)} loads {foreign}"


def section(page: Path, name: str) -> str:
    """Return the text of a name in the reference, without line breaks."""
    html = page.read_text(encoding="utf-8")
    start = html.index(f'id="{name}"')
    text = re.sub(r"<[^>]+>", "", html[start : html.find('class="doc doc-object ', start)])
    return " ".join(unescape(text).split())


def test_the_reference_shows_signatures_and_descriptions(site: Path) -> None:
    text = section(site / "api" / "predict" / "index.html", "hpetr.inference.torch_predictor.PosePredictor")
    assert (PosePredictor.__doc__ or "").splitlines()[0].replace("`", "") in text
    assert "device: str | device = " in text
    assert "post_process_pose_estimation" in (site / "api" / "model" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("page", "name", "shown"),
    [
        ("model", "hpetr.model.config.HPetrConfig", "num_queries: int = 300"),
        ("training", "hpetr.training.recipe.TrainRecipe", "warmup_steps: int = 0"),
    ],
)
def test_the_reference_shows_defaults_as_defaults(site: Path, page: str, name: str, shown: str) -> None:
    """Their parameters are fields, which mkdocstrings does not take for parameters by itself."""
    text = section(site / "api" / page / "index.html", name)
    assert shown in text
    assert text.count("required") == 0


def test_scripts_stay_out_of_the_site(site: Path) -> None:
    assert not list(site.rglob("*.py"))
    assert (site / "notebooks" / "quickstart.ipynb").is_file()
