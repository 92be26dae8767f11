"""What hpetr never does: run code that is in a file, unpack archives, ask the network unasked, need (A)GPL packages."""

from __future__ import annotations

import ast
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hpetr import InputError
from hpetr.cli.main import app
from hpetr.licenses import PackageLicense, installed_licenses, kind_of, to_look_at
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
    refused("trainer_state.json: is not what a training writes")


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
from paths import ROOT
image, data, recipe, checkpoint, output = sys.argv[1:]
for command in (
    ["info"],
    ["info", checkpoint],
    ["info", "--licenses"],
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
    assert [line.rpartition(" ")[2] for line in ends] == ["0", "0", "0", "0", "2", "0", "0", "0"], done.stdout
    attempts = [line for line in log.read_text().splitlines() if "('127.0.0.1', 9)" not in line]
    assert log.read_text(), "the guard does not see connections"
    assert attempts == []


@pytest.fixture(scope="module")
def packages() -> list[PackageLicense]:
    return installed_licenses()


def test_no_dependency_is_gpl(packages: list[PackageLicense]) -> None:
    names = {package.name for package in packages}
    assert {"torch", "transformers", "numpy", "av", "fastapi", "starlette"} <= names
    assert not names & {"pytest", "hypothesis", "ruff", "hpetr"}
    assert [(p.name, p.license) for p in packages if p.kind in ("strong copyleft", "other")] == []
    # PyAV's wheels bring FFmpeg built with these two encoders, which hpetr does not ask for; see docs/safety.md.
    carried = {(p.name, name) for p in packages for name, text in p.carried if kind_of(text) == "strong copyleft"}
    assert carried <= {("av", "libx264"), ("av", "libx265")}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("MIT", "permissive"),
        ("Apache-2.0 AND Apache-2.0 WITH LLVM-exception AND BSD-2-Clause", "permissive"),
        ("GPL-3.0-or-later", "strong copyleft"),
        ("GNU Affero General Public License v3", "strong copyleft"),
        ("BSD-3-Clause AND GPL-2.0-only", "strong copyleft"),
        ("MIT OR GPL-3.0-only", "permissive"),
        ("GNU Lesser General Public License v2 or later (LGPLv2+)", "weak copyleft"),
        ("MPL-2.0 AND MIT", "weak copyleft"),
        ("GPL-3.0-or-later with GCC's exception", "permissive"),
        ("LicenseRef-NVIDIA-Proprietary", "other"),
        ("not stated", "other"),
    ],
)
def test_kinds_of_licences(text: str, kind: str) -> None:
    assert kind_of(text) == kind


def test_licences_are_listed_by_a_command(packages: list[PackageLicense]) -> None:
    result = CliRunner().invoke(app, ["info", "--licenses"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    rows = [line.split() for line in lines[1 : lines.index("")]]
    assert [(row[0], row[1]) for row in rows] == [(package.name, package.version) for package in packages]
    assert lines[lines.index("") + 1 :] == to_look_at(packages)
    assert "certifi (Mozilla Public License 2.0 (MPL 2.0))" in lines[-2]
