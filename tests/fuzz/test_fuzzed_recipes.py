"""Recipes of any content, up to the point where training would start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mutations import TEXTS, VALUES, inputs, mutated, mutated_bytes, success_or_one_line

from hpetr.training.recipe import load_recipe, recipe_values, recipe_yaml
from hpetr.training.train import prepare
from training_runs import small_recipe

RECIPE = recipe_values(small_recipe(Path("run"), "data.train.0.limit=2", "train.arguments.adam_beta1=0.9"))
TEXT = yaml.safe_dump(RECIPE).encode()
KEYS = ["train.lr", "train.epochs", "data.train.0.limit", "data.train.9", "model.options.d_model", "train", "", "a.b.c"]


@pytest.fixture(autouse=True)
def deep_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe may name any folder as its output, and any text as a repository of the hub."""
    folder = tmp_path / "a" / "b" / "c" / "d"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@inputs(30, 30_000)
@given(content=mutated(RECIPE), data=st.data())
def test_values(content: Any, data: st.DataObject) -> None:
    path = Path("recipe.yaml")
    path.write_text(yaml.safe_dump(content))
    with success_or_one_line("recipe, values"):
        recipe = load_recipe(path)
        path.write_text(recipe_yaml(recipe), encoding="utf-8")
        assert recipe_values(load_recipe(path)) == recipe_values(recipe)


@inputs(15, 20_000)
@given(content=mutated_bytes(TEXT, 3, letters=True))
def test_bytes(content: bytes) -> None:
    path = Path("recipe.yaml")
    path.write_bytes(content)
    with success_or_one_line("recipe, bytes"):
        load_recipe(path)


@inputs(15, 20_000)
@given(key=st.sampled_from(KEYS) | TEXTS, value=VALUES.map(str) | TEXTS, equals=st.booleans())
def test_overrides(key: str, value: str, equals: bool) -> None:
    path = Path("recipe.yaml")
    path.write_bytes(TEXT)
    with success_or_one_line("recipe, overrides"):
        load_recipe(path, [f"{key}={value}" if equals else key + value])


@inputs(5, 2_000)
@given(content=mutated(RECIPE, 2))
def test_up_to_the_first_step(content: Any) -> None:
    path = Path("recipe.yaml")
    path.write_text(yaml.safe_dump(content))
    with success_or_one_line("recipe, everything before the first step"):
        prepare(load_recipe(path), None)


@inputs(8, 3_000)
@given(options=mutated(RECIPE["model"]["options"], 2))
def test_options_of_the_model(options: Any) -> None:
    path = Path("recipe.yaml")
    path.write_text(yaml.safe_dump({**RECIPE, "model": {**RECIPE["model"], "options": options}}))
    with success_or_one_line("recipe, options of the model"):
        prepare(load_recipe(path), None)
