"""Mutations of what users give: of trees of plain values, such as JSON and YAML hold, and of bytes."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from hpetr import InputError

# `make fuzz` sets it, to the share of the long runs to do; the suite tries few inputs, always the same ones.
LONG = float(os.environ.get("HPETR_FUZZ", 0))
tried: Counter[str] = Counter()  # inputs by what was fuzzed; `conftest` shows it
refused: Counter[str] = Counter()  # those of them that ended in an InputError


def inputs(quick: int, long: int) -> settings:
    """How many inputs a test tries in the suite, and in `make fuzz`."""
    return settings(
        max_examples=max(1, round(LONG * long)) if LONG else quick,
        deadline=None,
        derandomize=not LONG,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def success_or_one_line(what: str) -> Iterator[None]:
    """Whatever the input is, the product may refuse it in one line, and nothing else may happen."""
    tried[what] += 1
    try:
        yield
    except InputError as error:
        refused[what] += 1
        if len(str(error).splitlines()) != 1:
            raise AssertionError(f"not one line: {error}") from error


NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, -1, 17, 2**31, 2**63, -(2**63) - 1, 10**30, 1e308, 1e-320, -0.0, 0.5]),
    st.integers(-5, 100),
    st.floats(),
)
TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "0", "nan", "1e999", "a\nb", "[red]", "[/]", "../../x", "\x00", "\ud800", "é", "<b>", "x" * 300]
    ),
    st.text(max_size=5),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)


@st.composite
def mutated(draw: st.DrawFn, tree: Any, changes: int = 3) -> Any:
    """A copy of a tree with one to `changes` of its nodes replaced, removed, repeated or moved."""
    tree = {"": copy.deepcopy(tree)}
    for _ in range(draw(st.integers(1, changes))):
        parent, key = draw(st.sampled_from(_places(tree)))
        kind = draw(st.sampled_from(["replace", "replace", "scalar", "remove", "repeat", "other"]))
        if kind == "remove" and key != "":
            del parent[key]
        elif kind == "repeat" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif kind == "repeat" and key != "":
            parent[draw(TEXTS)] = parent[key]
        elif kind == "other":
            other, at = draw(st.sampled_from(_places(tree)))
            parent[key] = copy.deepcopy(other[at])
        else:
            parent[key] = draw(SCALARS if kind == "scalar" else VALUES)
    return tree[""]


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """All containers with the keys or indices of their parts; the root is the value of the outer dict."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        parts = list(node) if isinstance(node, dict) else range(len(node))
        for key in parts:
            found.append((node, key))
            if isinstance(node[key], dict | list):
                waiting.append(node[key])
    return found


@st.composite
def mutated_bytes(
    draw: st.DrawFn, data: bytes, changes: int = 8, first: int | None = None, letters: bool = False
) -> bytes:
    """A copy of some bytes with some replaced, removed, repeated, inserted, or with the end cut off.

    Args:
        first: half of the changes are in so many bytes of the beginning, where formats have their headers.
        letters: most changes are to one of the characters that texts of numbers are made of.
    """
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, changes))):
        limit = len(changed) if first is None or draw(st.booleans()) else min(first, len(changed))
        place = draw(st.integers(0, max(limit - 1, 0)))
        kinds = ["byte", "byte", "bit", "special", "cut", "remove", "insert", "repeat", *["letter"] * (8 * letters)]
        kind = draw(st.sampled_from(kinds))
        if not changed:
            changed += draw(st.binary(max_size=8))
        elif kind == "byte":
            changed[place] = draw(st.integers(0, 255))
        elif kind == "letter":
            changed[place] = draw(st.sampled_from(b'0123456789-+.eE \n"[]{},:nax'))
        elif kind == "bit":
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "special":
            width = draw(st.sampled_from([1, 2, 4, 8]))
            fill = draw(st.sampled_from([b"\x00", b"\xff", b"\x7f", b"\x80"]))
            changed[place : place + width] = fill * width
        elif kind == "cut":
            del changed[place:]
        elif kind == "remove":
            del changed[place : place + draw(st.integers(1, 64))]
        elif kind == "insert":
            changed[place:place] = draw(st.binary(min_size=1, max_size=16))
        else:
            changed[place:place] = changed[place : place + draw(st.integers(1, 64))]
    return bytes(changed)
