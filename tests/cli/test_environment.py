"""Settings that are made before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hpetr.cli.environment import WAITING

SCRIPT = """
import os, sys
from hpetr.cli import main
main.app = lambda: print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
main.main()
"""


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, WAITING["GOMP_SPINCOUNT"]), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_wait_briefly_unless_the_user_has_chosen(chosen: dict[str, str], expected: str) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | chosen
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [expected, "False"]
