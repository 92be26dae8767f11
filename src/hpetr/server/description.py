"""The description of the API as a page, made from its OpenAPI form, without scripts and other servers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

STYLE = """
  :root { color-scheme: light dark; }
  body { max-width: 960px; margin: 0 auto; padding: 12px 16px; font: 16px/1.45 system-ui, sans-serif; }
  h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2em; } h3 { font-size: 1rem; margin-bottom: 4px; }
  code { font-family: ui-monospace, monospace; }
  table { border-collapse: collapse; width: 100%; }
  tr { border-top: 1px solid #8886; }
  td { vertical-align: top; padding: 4px 12px 4px 0; }
  @media (max-width: 600px) { tr, td { display: block; } td { padding: 2px 0; } }
"""


def description_page(openapi: dict[str, Any]) -> str:
    """Return HTML with every operation and every schema of an OpenAPI description."""
    title = f"API of {escape(openapi['info']['title'])} {escape(openapi['info']['version'])}"
    parts = [f'<h1>{title}</h1><p><a href="./">Try it</a>, or read the <a href="openapi.json">OpenAPI form</a>.</p>']
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>{_text(operation)}")
            parameters = operation.get("parameters", ())
            parts.append(_table("Parameters", ((_code(p["name"]), _type(p["schema"]), _text(p)) for p in parameters)))
            body = operation.get("requestBody", {})
            parts.append(_table("Body", ((_code(kind), _text(body)) for kind in body.get("content", ()))))
            answers = operation["responses"].items()
            parts.append(_table("Answers", ((status, _content(a), _text(a)) for status, a in answers)))
    for name, schema in openapi["components"]["schemas"].items():
        parts.append(f'<h2 id="{escape(name)}"><code>{escape(name)}</code></h2>{_text(schema)}')
        fields = schema.get("properties", {}).items()
        parts.append(_table("Fields", ((_code(field), _type(s), _text(s)) for field, s in fields)))
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f'{meta}<link rel="icon" href="data:,"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'


def _table(title: str, rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<h3>{title}</h3><table>{cells}</table>" if cells else ""


def _text(described: dict[str, Any]) -> str:
    """Return a description, its `code` marked."""
    return re.sub(r"`(.+?)`", r"<code>\1</code>", escape(described.get("description", "")))


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _content(answer: dict[str, Any]) -> str:
    """Return the types that an answer can have."""
    kinds = answer["content"].items()
    return ", ".join(_type(each["schema"]) if kind.endswith("json") else _code(kind) for kind, each in kinds)


def _type(schema: dict[str, Any]) -> str:
    """Return a schema in words, with a link to its name."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:  # a parameter that may be left out
        return " or ".join(_type(each) for each in schema["anyOf"] if each.get("type") != "null")
    if "items" in schema:
        count = f" of {schema['minItems']}" if schema.get("minItems") == schema.get("maxItems", 0) else ""
        return f"list{count}: {_type(schema['items'])}"
    if "enum" in schema:
        return " or ".join(map(_code, schema["enum"]))
    limits = f" {schema['minimum']:g}..{schema['maximum']:g}" if "maximum" in schema else ""
    return f"{escape(schema.get('type', 'any'))}{limits}"
