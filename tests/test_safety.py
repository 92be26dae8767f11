"""What hpetr never does: run code that is in a file, unpack archives, ask the network unasked, need (A)GPL packages."""

from __future__ import annotations

import ast
import contextlib
import os
import pickle
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from typer.testing import CliRunner

from hpetr import InputError
from hpetr.cli.main import app
from hpetr.training.recipe import recipe_yaml
from hpetr.training.train import train
from paths import ROOT
from training_runs import TINY, small_recipe

SOURCES = sorted((ROOT / "src" / "hpetr").rglob("*.py"))


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """All calls with their dotted names, `a.b.c`."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_nothing_in_the_code_runs_or_unpacks_a_file(path: Path) -> None:
    forbidden = ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load")
    unpacking = (".extract", ".extractall", "unpack_archive")
    for name, call in calls(ast.parse(path.read_text(encoding="utf-8"))):
        assert name not in forbidden, f"line {call.lineno}: {name}"
        assert not name.endswith(unpacking), f"line {call.lineno}: {name}"
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("trust_remote_code", "False") == "False"
        assert given.get("allow_pickle", "False") == "False"
        if name == "torch.load":
            assert given.get("weights_only") == "True", f"line {call.lineno}"


def test_a_checkpoint_to_resume_runs_no_code(tmp_path: Path) -> None:
    output = tmp_path / "run"
    train(small_recipe(output, "train.epochs=0.5", "train.warmup_steps=0"))
    checkpoint, executed = output / "checkpoint-1", tmp_path / "executed"

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=f"checkpoint-1.*{message}") as error:
            train(small_recipe(output, "train.epochs=1"), resume=checkpoint)
        assert "\n" not in str(error.value)
        assert not executed.exists()

    for name, what in (
        ("rng_state.pth", "random numbers' state"),
        ("scheduler.pt", "optimizer's and schedule's state"),
        ("optimizer.pt", "optimizer's and schedule's state"),
    ):
        whole = (checkpoint / name).read_bytes()
        torch.save(Bomb(executed), checkpoint / name)
        for file in ("training_args.bin", "pytorch_model.bin", "hpetr.pkl"):
            (checkpoint / file).write_bytes(pickle.dumps(Bomb(executed)))
        refused(f"the {what} holds pickled objects other than tensors or is broken; nothing in it was executed")
        (checkpoint / name).write_bytes(whole)
    (checkpoint / "trainer_state.json").write_text('{"log_history": [{"epoch": 1}]}')
    refused("trainer_state.json: is not the state of a training")


def test_names_that_look_like_styles_are_shown_as_they_are(checkpoint: Path, tmp_path: Path) -> None:
    folder, data = tmp_path / "[red]a[" / "red]", tmp_path / "x[" / "bold]"
    shutil.copytree(checkpoint, folder)
    shutil.copytree(TINY.parent, data)
    info = CliRunner().invoke(app, ["info", str(folder)])
    assert info.exit_code == 0, info.output
    assert f"{folder}\n" in info.stdout
    limits = ["--limit", "1", "--output", str(tmp_path / "e.json")]
    evaluation = CliRunner().invoke(app, ["eval", str(folder), str(data), *limits])
    assert evaluation.exit_code == 0, evaluation.output
    assert f"{data / 'annotations.json'}: 1 image" in evaluation.stdout


# Python tells its audit hooks of every name that is looked up and every connection, also of the standard library and of
# packages' Python code. Unix sockets stay: processes of one machine talk through them.
GUARD = """
import os, socket, sys
EVENTS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"}
def guard(event, arguments):
    if event in EVENTS and getattr(arguments[0], "family", None) != getattr(socket, "AF_UNIX", -1):
        with open(os.environ["NETWORK_LOG"], "a") as log:
            log.write(f"{event} {arguments[1:] if event.startswith('socket.s') else arguments}\\n")
        raise ConnectionRefusedError("no network in this test")
sys.addaudithook(guard)
"""
COMMANDS = """
import socket, sys
try:
    socket.socket().connect(("127.0.0.1", 9))
except ConnectionRefusedError:
    pass
from hpetr.cli.main import app
image, data, recipe, checkpoint, output = sys.argv[1:]
for command in (
    ["info"],
    ["info", checkpoint],
    ["predict", image, "--checkpoint", checkpoint, "--output", output],
    ["predict", image, "--checkpoint", "someone/nothing", "--output", output],
    ["eval", checkpoint, data, "--limit", "1", "--output", output + "/eval.json"],
    ["data", "check", data],
    ["train", recipe],
):
    try:
        app(command)
    except SystemExit as end:
        print(command[:2], end.code)
"""


def test_no_network_unless_asked(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(GUARD)
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(small_recipe(tmp_path / "run", "train.epochs=0.5")))
    log = tmp_path / "network.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"PYTHONPATH": str(tmp_path), "NETWORK_LOG": str(log), "OMP_NUM_THREADS": "1"}
    image = ROOT / "examples" / "000000000885.jpg"
    arguments = [image, TINY.parent, tmp_path / "recipe.yaml", checkpoint, tmp_path / "out"]
    command = [sys.executable, "-c", COMMANDS, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ends = [line for line in done.stdout.splitlines() if line.startswith("['")]
    assert [line.rpartition(" ")[2] for line in ends] == ["0", "0", "0", "2", "0", "0", "0"], done.stdout
    attempts = [line for line in log.read_text().splitlines() if "('127.0.0.1', 9)" not in line]
    assert log.read_text(), "the guard does not see connections"
    assert attempts == []


def run_time_packages() -> dict[str, metadata.Distribution]:
    """hpetr's dependencies and theirs that are installed, those of its extras included."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement("hpetr[all]")]
    while waiting:
        needed = waiting.pop()
        if needed.name in found and not needed.extras:
            continue
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[needed.name] = metadata.distribution(needed.name)
            for line in found[needed.name].requires or []:
                requirement = Requirement(line)
                extras = needed.extras | {""}
                if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
                    waiting.append(requirement)
    return found


def test_no_dependency_is_gpl() -> None:
    packages = run_time_packages()
    assert {"torch", "transformers", "numpy", "av", "fastapi", "starlette"} <= packages.keys()
    for name, package in packages.items():
        about = package.metadata
        classifiers = [text for text in about.get_all("Classifier") or [] if text.startswith("License ::")]
        stated = about.get_all("License-Expression") or classifiers or about.get_all("License") or []
        for text in stated:
            first_line = text.strip().split("\n")[0]
            strong = re.search(r"\bA?GPL|Affero|(?<!Lesser )General Public", first_line)
            assert not strong or re.search(r"exception| OR ", first_line), f"{name}: {first_line}"
