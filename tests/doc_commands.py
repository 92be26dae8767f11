"""Run the commands of a page; parse those that need other machines."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import tomllib
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import typer
from torch.distributed.run import get_args_parser as torchrun_parser
from typer.testing import CliRunner

from hpetr.cli.main import app
from hpetr.runtime.__main__ import main as run_exported
from hpetr.training.recipe import load_recipe
from paths import ROOT

# Files of the reader. A command that names one, itself or by its recipe, may fail because the file does not exist.
READERS_OWN = re.compile(
    r"/path/to/|data/(coco|crowdpose)/|people\.json|resnet\w*\.safetensors|weights/resnet|\bzoo\b|runs/"
)
NOT_THERE = re.compile(r"no such|cannot be read|cannot read|is missing|not found")
PLACEHOLDER = re.compile(r"\[|<|\.\.\.|(?<![\w-])[A-Z][A-Z_]{2,}")  # DIR, [--option N], INPUTS...: a synopsis
# Programs that are not checked.
OTHERS = {"cd", "export", "git", "hf", "pip-licenses"}


def commands_of(block: str, language: str) -> list[str]:
    """Return the commands, without comments and with continued lines joined; of a console block, those after `$`."""
    lines = block.replace("\\\n", " ").split("\n")
    if language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    # A synopsis goes on in indented lines.
    joined: list[str] = []
    for line in lines:
        if line.startswith(" ") and joined:
            joined[-1] += line
        else:
            joined.append(line)
    commands = [re.split(r"(?:^|\s)#(?:\s|$)", line)[0].strip() for line in joined]
    return [part.strip() for command in commands if command for part in command.split(" && ")]


def is_synopsis(command: str) -> bool:
    return PLACEHOLDER.search(re.sub(r"'[^']*'|\"[^\"]*\"", "", command)) is not None


def split(command: str) -> list[str]:
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables for one command
        words.pop(0)
    return [words[0].removeprefix(".venv/bin/"), *words[1:]]


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """Return the command of `hpetr` that the words name, and its arguments."""
    command, rest = typer.main.get_command(app), list(words)
    while hasattr(command, "commands") and rest:
        if rest[0].startswith("-"):
            break
        assert rest[0] in command.commands, f"hpetr has no command {rest[0]!r}"
        command = command.commands[rest.pop(0)]
    return command, rest


def all_commands() -> list[tuple[list[str], Any]]:
    """Return every command of `hpetr` with the words that name it."""
    found, groups = [], [([], typer.main.get_command(app))]
    while groups:
        path, group = groups.pop()
        for name, command in group.commands.items():
            where = groups if hasattr(command, "commands") else found
            where.append(([*path, name], command))
    return found


def check_synopsis(command: str) -> None:
    """Check that the command exists, and so do all options that are named."""
    words = command.replace("[", " ").replace("]", " ").replace("|", " ").split()
    words = words[words.index("hpetr") + 1 :]
    found, rest = find_command([word for word in words if word not in ("OPTIONS", "COMMAND")])
    known = {option for parameter in found.params for option in [*parameter.opts, *parameter.secondary_opts]}
    named = {word.rstrip(".,") for word in rest if re.match(r"--?[a-z]", word)}
    assert named <= known | {"--help", "-h"}, f"{command}: no option {sorted(named - known)}"


def parse(words: list[str]) -> None:
    """Parse the arguments of an `hpetr` command without running it; of a training, the recipe with its overrides."""
    command, rest = find_command(words)
    if command.name == "train":
        recipe, *overrides = [word for word in rest if not word.startswith("-") and word != "auto"]
        load_recipe(ROOT / recipe if (ROOT / recipe).exists() else recipe, overrides)
    command.make_context(command.name, rest, resilient_parsing=False).close()


def run_hpetr(words: list[str]) -> str:
    """Run a command and return its output; `serve`, cameras and streams, which do not end, are only parsed."""
    endless = any(word.isdigit() or "://" in word for word in words[1:2])
    if words[0] == "serve" or (words[0] == "predict" and endless):
        parse(words)
        return ""
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    if result.exit_code == 2 and READERS_OWN.search(result.stderr) and NOT_THERE.search(result.stderr):
        return ""
    assert result.exit_code == 0, f"hpetr {shlex.join(words)}: {result.output}"
    return result.output


def _torchrun(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = torchrun_parser().parse_args(words)
    assert arguments.module
    assert arguments.training_script == "hpetr"
    parse(arguments.training_script_args)


class _Parsed(Exception):
    """Raised once a script's arguments are parsed, before its work begins."""


def _python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "-c":
        compile(words[1], "-c", "exec")
        return
    if words[0] == "-m":
        if words[1] == "hpetr.runtime":
            assert run_exported(words[2:]) == 0
            return
        assert words[1] == "hpetr"
        parse(words[2:])
        return
    script = ROOT / words[0]
    assert script.is_file(), f"no file {words[0]}"
    original = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        raise _Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr("sys.argv", [str(script), *words[1:]])
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(_Parsed):
        runpy.run_path(str(script), run_name="__main__")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", original)


def _pytest(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [word for word in words if not word.startswith("-")]
    assert paths
    assert all((ROOT / path).exists() for path in paths)


def _make(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words) <= set(targets)


def _pip(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the extras and the files that are named exist."""
    assert words[0] == "install"
    assert not [word for word in words if word.startswith("hpetr")], "hpetr is on no package index"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for option, word in zip(["", *words], words, strict=False):
        if option in ("-c", "-r"):
            assert (ROOT / word).is_file()
        if wanted := re.fullmatch(r"\.\[(.+)\]", word):
            assert set(wanted[1].split(",")) <= set(extras), word


def _sbatch(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script, *arguments = words
    content = (ROOT / script).read_text()
    (ours,) = re.findall(r"-m hpetr (.*)", content)
    parse(shlex.split(ours.replace('"$@"', shlex.join(arguments))))


@cache
def _routes() -> dict[str, set[str]]:
    """Return the methods by path of `hpetr serve`."""
    from hpetr import PosePredictor
    from hpetr.server.app import Service, create_app

    routes = create_app(Service(PosePredictor(device="cpu"), "model")).routes
    return {route.path: route.methods for route in routes if hasattr(route, "methods")}


def _curl(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (url,) = [word for word in words if word.startswith("http://127.0.0.1:8000")]
    path = url.removeprefix("http://127.0.0.1:8000").partition("?")[0]
    method = "POST" if {"-F", "--data-binary", "-T"} & set(words) else "GET"
    assert method in _routes().get(path, set()), f"no route {method} {path}"


PROGRAMS: dict[str, Callable[[list[str], pytest.MonkeyPatch], None]] = {
    "torchrun": _torchrun,
    "python": _python,
    "pytest": _pytest,
    "make": _make,
    "pip": _pip,
    "sbatch": _sbatch,
    "curl": _curl,
}


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run or parse a command, and return the output of `hpetr`."""
    if is_synopsis(command):
        if re.search(r"\bhpetr ", command):
            check_synopsis(command)
        return ""
    program, *rest = split(command)
    if program == "hpetr":
        return run_hpetr(rest)
    if program not in OTHERS:
        assert program in PROGRAMS, f"{command}: the tests do not know what to do with {program!r}"
        PROGRAMS[program](rest, monkeypatch)
    return ""
