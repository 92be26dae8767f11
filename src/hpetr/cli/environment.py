"""Settings of libraries that have to be made before torch is imported."""

from __future__ import annotations

import os

# Without effect where the user has set one of them. The profiler's library reports every start on stderr.
DEFAULTS = {"KINETO_LOG_LEVEL": "5"}


def prepare_environment() -> None:
    """Set the defaults of this process and of those that it starts."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
