"""The documentation as a site: built without a warning, complete, and asking no other server for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

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
    """The addresses that a browser loads by itself, and all text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag in ("script", "img", "source", "video", "iframe"):
            self.addresses.append(given.get("src", ""))
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(given.get("href", ""))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_nothing_is_loaded_from_other_servers(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 12
    for page in pages:
        for address in Loads(page).addresses:
            assert "//" not in address, f"{page.relative_to(site)} loads {address}"
    for style in site.rglob("*.css"):
        foreign = re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\"']+", style.read_text(encoding="utf-8"))
        assert not foreign, f"{style.relative_to(site)} loads {foreign}"


def test_the_reference_shows_signatures_and_descriptions(site: Path) -> None:
    text = " ".join(Loads(site / "api" / "index.html").text)
    assert "A model that takes images and gives poses." in text  # PosePredictor's docstring
    assert "post_process_pose_estimation" in text


def test_scripts_stay_out_of_the_site(site: Path) -> None:
    assert not list(site.rglob("*.py"))
    assert (site / "notebooks" / "quickstart.ipynb").is_file()
