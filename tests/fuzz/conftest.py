"""How many inputs were tried, under `make fuzz`."""

from __future__ import annotations

from typing import Any

from mutations import LONG, refused, tried


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if LONG:
        for what, count in sorted(tried.items()):
            terminalreporter.write_line(f"{what}: {count:,} inputs, {refused[what]:,} of them refused in one line")
        terminalreporter.write_line(f"all: {sum(tried.values()):,} inputs")
