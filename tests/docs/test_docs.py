"""The code of the README, the pages in docs/ and the notebook runs as it is printed.

Each page runs from top to bottom in its own folder, as a reader would run it. Files that it shows (the first line of
the block is a comment with the name) are written; commands and Python blocks run. What cannot run here is parsed; see
`doc_commands`.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import doc_commands
import hpetr
import hpetr.data as hpetr_data
from clips import make_clip
from hpetr import HPetrConfig, HPetrForPoseEstimation
from hpetr.checkpoints.folder import bundled_checkpoint
from hpetr.checkpoints.official import to_official
from hpetr.training.recipe import load_recipe, recipe_values
from paths import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
COMMANDS, DATA = {"bash", "console"}, {"yaml", "json"}
# Languages of blocks that another test runs.
ELSEWHERE = {"py": ROOT / "tests" / "server" / "test_serve.py"}
OUR_FILES = re.compile(r"(?<![\w/.-])((?:recipes|benchmarks|examples|tests|docs|src)/[\w./-]*\w)")


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).with_suffix("").as_posix().removeprefix("docs/")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the language and the text of every fenced block."""
    text = page.read_text(encoding="utf-8")
    return [
        (language.strip(), re.sub(f"^{indent}", "", body, flags=re.MULTILINE))
        for indent, language, body in FENCE.findall(text)
    ]


def shown_after_commands(page: Path) -> list[int]:
    """Return the numbers of the text blocks that directly follow commands: the output of these."""
    text = page.read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    return [
        number
        for number, (before, block) in enumerate(pairwise(found), start=1)
        if before[2] in COMMANDS and block[2] == "text" and not text[before.end() : block.start()].strip()
    ]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the files that the examples name."""
    image = ROOT / "examples" / "000000000785.jpg"
    for name in ("photo.jpg", "a.jpg", "b.jpg", "holiday/c.jpg", "photos/d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(image, tmp_path / name)
    make_clip(tmp_path / "clip.mp4", range(3))
    shutil.copytree(bundled_checkpoint(), tmp_path / "checkpoint-folder")
    for folder in ("examples", "recipes"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def write_data(folder: Path, language: str, text: str) -> None:
    """Check that a block is YAML or JSON, and write it if it names a file."""
    if language == "json":
        decoder, rest = json.JSONDecoder(), text.strip()
        while rest:
            _, end = decoder.raw_decode(rest)
            rest = rest[end:].strip()
        return
    assert yaml.safe_load(text) is not None
    if named := re.match(r"# ([\w./-]+\.ya?ml)\b", text):
        path = folder / named[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_page_runs(reader: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "official.pth" in page.read_text(encoding="utf-8"):
        model = HPetrForPoseEstimation(HPetrConfig.preset("h-petr-r50"))
        torch.save({"state_dict": to_official(model)}, reader / "official.pth")
    outputs, printed = shown_after_commands(page), ""
    for number, (language, text) in enumerate(blocks(page)):
        assert language, f"{page.name}: a block without a language: {text[:80]}"
        assert language not in {"sh", "shell", "pycon"}, f"{page.name}: call it bash, console or python"
        if number in outputs:
            for line in text.splitlines():
                assert line in printed, f"{page.name}: {line!r} is not printed"
        if language in COMMANDS:
            commands = doc_commands.commands_of(text, language)
            printed = "\n".join(doc_commands.run(command, monkeypatch) for command in commands)
        elif language == "python":
            exec(compile(text, page.name, "exec"), {})
        elif language in DATA:
            write_data(reader, language, text)
        elif language in ELSEWHERE:
            assert page.name in ELSEWHERE[language].read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_what_the_text_names_exists(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = prose(page)
    for command in re.findall(r"`(python (?:benchmarks|docs)/[^`]+)`", text):
        doc_commands.run(command, monkeypatch)
    for command in re.findall(r"`(hpetr [^`]+)`", text):
        doc_commands.check_synopsis(command)
    for name in OUR_FILES.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{page.name}: no {name}"
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name}: link to {target}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(reader: Path, notebook: Path) -> None:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        tree = ast.parse("".join(cell["source"]))
        exec(compile(tree, f"{notebook.name}, cell {number}", "exec"), names)


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    paths = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    for path in paths:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), f"docs/api: no {path}"
    documented = {path.rpartition(".")[2] for path in paths}
    assert set(hpetr.__all__) - {"__version__"} <= documented
    assert set(hpetr_data.__all__) <= documented


def test_migration_tables_are_true() -> None:
    """Options of the model have the values of petr-r50; recipe keys exist."""
    config = HPetrConfig.preset("petr-r50")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (DOCS / "migration.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    options = rows[rows.index(["official key", "`model.options`", "petr-r50"]) + 2 :]
    options = options[: next(number for number, row in enumerate(options) if row[0] == "official key")]
    assert len(options) > 12
    for _, ours, values in options:
        names = re.findall(r"`(\w+)`", ours)
        known = [getattr(config, name) for name in names]
        assert names
        if names != ["backbone_config"]:
            assert ", ".join(f"{value:g}" if type(value) is float else str(value) for value in known) == values
    keys = {key for row in rows for key in re.findall(r"`((?:data|augment|processor|train)\.[a-z_.0-9]+)", row[1])}
    assert len(keys) > 25
    recipe = recipe_values(load_recipe(ROOT / "recipes" / "petr-r50.yaml"))
    for key in keys:
        node: Any = recipe
        for part in key.split("."):
            node = node[int(part)] if isinstance(node, list) else node[part]


def test_every_command_and_option_is_in_the_docs() -> None:
    pages = {page_name(page): page.read_text(encoding="utf-8") for page in PAGES}
    sections = set(re.findall(r"^## (\w+)", pages["cli"], re.MULTILINE))
    words = set(re.findall(r"--[a-z][a-z-]+", "\n".join(pages.values())))
    for path, command in doc_commands.all_commands():
        assert path[0] in sections, f"docs/cli.md has no section {path[0]!r}"
        for parameter in command.params:
            named = {*parameter.opts, *parameter.secondary_opts}
            if any(name.startswith("--") for name in named):
                assert named & (words | {"--help"}), f"hpetr {' '.join(path)} {parameter.opts[0]}: on no page"
