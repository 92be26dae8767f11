"""Recipes: plain values, one base, overrides, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpetr import InputError
from hpetr.training.recipe import load_recipe
from paths import ROOT

RECIPES = ROOT / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.processor.build().size["longest_edge"] == recipe.processor.longest_edge


def test_base_and_overrides() -> None:
    recipe = load_recipe(
        RECIPES / "overfit-16.yaml",
        ["train.lr=1e-5", "data.train.0.limit=3", "model.options.num_queries=50", "data.val.annotations=val.json"],
    )
    assert recipe.train.lr == 1e-5
    assert recipe.data.train[0].limit == 3
    assert recipe.model.preset == "h-petr-nano"  # from the base
    assert recipe.model.options == {"num_queries": 50}
    assert recipe.data.val is not None
    assert recipe.data.val.annotations == Path("val.json")


def test_recipes_of_the_package_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("h-petr-nano") == load_recipe(RECIPES / "h-petr-nano.yaml")
    recipe = load_recipe("overfit-16")
    assert recipe.data.train[0].annotations.is_file(), "the data in the package are found from any folder"
    Path("mine.yaml").write_text("base: h-petr-nano\ntrain: {lr: 0.5}")
    assert load_recipe("mine.yaml").augment == load_recipe("h-petr-nano").augment
    Path("petr-r50").write_text("base: h-petr-nano\noutput: here")
    assert load_recipe("petr-r50").output == Path("here"), "a file comes first"
    with pytest.raises(InputError, match="recipe h-petr-nanno: no such file, did you mean 'h-petr-nano'"):
        load_recipe("h-petr-nanno")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=1", "unknown key 'train.learning_rate', expected one of .*lr"),
        ("train.epoch=1", "unknown key 'train.epoch', did you mean 'epochs'"),
        ("data.train.0.anotations=x", "unknown key 'data.train.0.anotations', did you mean 'annotations'"),
        ("train.lr=-1", "train.lr: input should be greater than 0"),
        ("train.schedule=linear", "train.schedule: input should be 'step' or 'cosine'"),
        ("data.train.7.limit=1", "expected a number below 1"),
        ("train.lr", "expected key=value"),
        ("output.deep.key=1", "output.deep has no keys"),
        ("data.train=[]", "data.train: list should have at least 1 item"),
    ],
)
def test_bad_values_name_the_key(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(RECIPES / "h-petr-nano.yaml", [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "expected a mapping"),
        ("train: [", "not YAML"),
        ("base: missing.yaml", "missing.yaml: cannot read the recipe"),
        ("base: second.yaml", "expected at most one level"),
        ("output: x", "model: field required"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "second.yaml").write_text("base: third.yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_recipe(path)
    assert "\n" not in str(error.value)
