"""Settings of libraries that have to be made before torch is imported."""

from __future__ import annotations

import os

# The profiler's library reports every start on stderr.
PROFILER = {"KINETO_LOG_LEVEL": "5"}
# How long a thread without work spins before it sleeps, in GNU's OpenMP, which torch's Linux wheels bring. Its default,
# 300,000 turns, takes the cores from threads with work if other programs run: benchmarks/busy_machine.py.
WAITING = {"GOMP_SPINCOUNT": "1000"}
USERS_CHOICE = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def prepare_environment() -> None:
    """Set the defaults of this process and of those that it starts, unless the user has chosen."""
    is_chosen = any(name in os.environ for name in USERS_CHOICE)
    for name, value in (PROFILER if is_chosen else PROFILER | WAITING).items():
        os.environ.setdefault(name, value)
