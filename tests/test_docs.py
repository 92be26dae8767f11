"""The README's and the docs' code runs as it stands there."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hpetr import HPetrConfig, HPetrForPoseEstimation
from hpetr.checkpoint import bundled_checkpoint
from hpetr.cli import app
from hpetr.convert import to_official
from hpetr.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN_DATA = re.compile(r"/path/to/")  # commands on data that a reader has to bring


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[str]:
    """Every `hpetr ...` line of the bash blocks; synopses, in capitals and brackets, are not commands."""
    lines = [
        line.split("  #")[0].strip() for page in PAGES for block in blocks(page, "bash") for line in block.split("\n")
    ]
    found = [line.removeprefix(".venv/bin/") for line in lines]
    return sorted({line for line in found if line.startswith("hpetr ") and "[" not in line and "DIR" not in line})


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the examples name."""
    picture = ROOT / "examples" / "000000000785.jpg"
    for name in ("photo.jpg", "a.jpg", "b.jpg", "holiday/c.jpg", "photos/d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(picture, tmp_path / name)
    shutil.copytree(bundled_checkpoint(), tmp_path / "checkpoint-folder")
    for folder in ("examples", "recipes"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", [c for c in commands() if "hpetr train" not in c])
def test_commands_run(reader: Path, command: str) -> None:
    if OWN_DATA.search(command):
        words = shlex.split(command)
        assert CliRunner().invoke(app, [words[1], "--help"]).exit_code == 0
        return
    if "official.pth" in command:
        model = HPetrForPoseEstimation(HPetrConfig.preset("h-petr-r50"))
        torch.save({"state_dict": to_official(model)}, reader / "official.pth")
    result = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", [c for c in commands() if "hpetr train" in c])
def test_training_commands_are_valid(reader: Path, command: str) -> None:
    """The recipe and all overrides; training itself is tested in test_train.py."""
    _, _, recipe, *rest = shlex.split(command)
    load_recipe(recipe, [word for word in rest if "=" in word])


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_runs(reader: Path, page: Path) -> None:
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), {})
