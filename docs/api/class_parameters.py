"""Parameters of configurations and recipes, for the reference.

Their `__init__` exists at run time alone, made of the annotated attributes. mkdocstrings reads the source: without this
it would show no signature, and every parameter as required.
"""

from __future__ import annotations

import ast
from typing import Any

import griffe

FIELD_CLASSES = {"PreTrainedConfig", "BaseModel"}


def has_fields(cls: griffe.Class) -> bool:
    """Return whether the class, or a class of the package that it is derived from, makes `__init__` of its fields."""
    return any(str(base).rpartition(".")[2] in FIELD_CLASSES for each in (cls, *cls.mro()) for base in each.bases)


def field_options(value: Any) -> dict[str, Any]:
    """Return the default and the description of an attribute's value, where it has them."""
    if not isinstance(value, griffe.ExprCall) or str(value.function) != "Field":
        return {} if value is None else {"default": value}
    return {one.name: one.value for one in value.arguments if isinstance(one, griffe.ExprKeyword)}


def plain_annotation(annotation: Any, module: griffe.Module) -> Any:
    """Return a type without its checks: int of `Size`, where `Size = Annotated[int, Range(...)]`."""
    alias = module.members.get(str(annotation))
    if alias is not None and not alias.is_alias and alias.is_attribute and isinstance(alias.value, griffe.Expr):
        return plain_annotation(alias.value, module)
    if isinstance(annotation, griffe.ExprSubscript) and str(annotation.left) == "Annotated":
        return plain_annotation(annotation.slice.elements[0], module)
    if isinstance(annotation, griffe.ExprBinOp):
        left, right = (plain_annotation(side, module) for side in (annotation.left, annotation.right))
        return griffe.ExprBinOp(left, annotation.operator, right)
    return annotation


class ClassParameters(griffe.Extension):
    """Gives such classes an `__init__`, and a table of the parameters whose descriptions are in the fields."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Visit all classes of a package, once it is loaded completely."""
        modules = [pkg]
        while modules:
            module = modules.pop()
            modules += [one for one in module.modules.values() if not one.is_alias]
            for cls in module.classes.values():
                if not cls.is_alias and "__init__" not in cls.members and has_fields(cls):
                    self.add_parameters(cls)

    def add_parameters(self, cls: griffe.Class) -> None:
        """Add the `__init__`, and to the docstring what the fields say."""
        parameters, lines = [], []
        for name, attribute in cls.attributes.items():
            if attribute.annotation is None or "property" in attribute.labels or name.startswith("_"):
                continue
            options = field_options(attribute.value)
            parameters.append(
                griffe.Parameter(
                    name,
                    annotation=plain_annotation(attribute.annotation, cls.module),
                    kind=griffe.ParameterKind.keyword_only,
                    default=options.get("default"),
                )
            )
            if "description" in options:
                lines.append(f"    {name}: {ast.literal_eval(str(options['description']))}")
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters), parent=cls))
        if lines and cls.docstring:
            cls.docstring.value += "\n\nArgs:\n" + "\n".join(lines)
