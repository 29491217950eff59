"""The reference pages, written from what they describe: the spec's models, commands, exports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import typer

import hdnn_dist
from hdnn_dist.cli import app
from hdnn_dist.reader import json_schema

# --- YAML ----------------------------------------------------------------------------------------


def spec_page() -> str:
    """Every section of a spec with every key: what it may be, its default, what it says."""
    schema = json_schema()
    sections = {"Spec": schema, **schema["$defs"]}
    parts = [
        "# YAML",
        "A job is a YAML file with the five sections of [Spec](#spec); all but `topology` have "
        "defaults. Whatever is not listed here is refused, with the name that was perhaps meant. "
        "`hdnn-dist schema` prints the same as a JSON Schema for editors.",
    ]
    for name in _in_order(sections):
        section = sections[name]
        rows = [
            f"| `{key}` | {form(field)} | {_default(key, field, section)} | "
            f"{_cell(description(field, sections))} |"
            for key, field in section["properties"].items()
        ]
        parts += [
            f"## {name}",
            _code(section["description"].split("\n\n    ")[0].partition("::\n")[0].strip(" :\n")),
            "\n".join(["| key | what it may be | default | |", "|---|---|---|---|", *rows]),
        ]
    return "\n\n".join(parts) + "\n"


def _in_order(sections: dict[str, Any]) -> list[str]:
    """The names of sections as a reader meets them from the top."""
    found: list[str] = []

    def visit(name: str) -> None:
        if name in found:
            return
        found.append(name)
        for key in sections[name]["properties"].values():
            for other in _mentioned(key):
                visit(other)

    visit("Spec")
    return found


def _mentioned(schema: Any) -> Iterator[str]:
    if isinstance(schema, list):
        for part in schema:
            yield from _mentioned(part)
    elif isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"].rpartition("/")[2]
        for part in schema.values():
            yield from _mentioned(part)


def description(field: dict[str, Any], sections: dict[str, Any]) -> str:
    """What a key says: its own words, or those of the one section that it holds."""
    if "description" in field:
        return str(field["description"])
    if "const" in field:
        return "Says that it is this."
    held = list(_mentioned(field))
    return str(sections[held[0]]["description"]).split("\n")[0] if len(held) == 1 else ""


def _default(key: str, field: dict[str, Any], section: dict[str, Any]) -> str:
    if key in section.get("required", ()):
        return "needed"
    default = field.get("default")
    return "" if default is None or isinstance(default, dict) else f"`{json.dumps(default)}`"


def form(schema: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            forms = [form(one) for one in schema[choice] if one != {"type": "null"}]
            return " or ".join(dict.fromkeys(forms))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema["type"]
    if kind == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(form(item) for item in schema['prefixItems'])}]"
        return f"list of ({form(schema['items'])})"
    if kind == "object":
        held = schema.get("additionalProperties") or next(
            iter(schema["patternProperties"].values())
        )
        return f"mapping of names to ({form(held)})"
    words = {"string": "text", "boolean": "true or false"}
    return words.get(kind) or _range("whole number" if kind == "integer" else "number", schema)


def _range(what: str, schema: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:,.12g}" for key, sign in signs.items() if key in schema]
    return " ".join([what, ", ".join(bounds)]).strip()


def _cell(text: str) -> str:
    return _code(" ".join(text.split())).replace("|", "\\|")


def _code(text: str) -> str:
    """Docstrings quote code as reStructuredText does."""
    return text.replace("``", "`")


# --- commands ------------------------------------------------------------------------------------


def commands(command: Any = None, path: str = "hdnn-dist") -> Iterator[tuple[str, Any]]:
    """Every command that does something, with the words that call it."""
    command = typer.main.get_command(app) if command is None else command
    if hasattr(command, "commands"):
        for name, own in command.commands.items():
            yield from commands(own, f"{path} {name}")
    else:
        yield path, command


def cli_page() -> str:
    """Every command with its arguments and options."""
    parts = [
        "# Commands",
        "Exit codes: 0 done; 1 the job failed while running; 2 something that you can mend, which "
        "is said in one line; 130 interrupted. `hdnn-dist COMMAND --help` says the same as this "
        "page.",
    ]
    for path, command in commands():
        context = command.context_class(command, info_name=path)
        usage = " ".join(command.collect_usage_pieces(context))
        records = [parameter.get_help_record(context) for parameter in command.params]
        rows = [f"| `{names}` | {_cell(said)} |" for names, said in filter(None, records)]
        parts += [
            f"## {path}",
            f"```text\n{path} {usage}\n```",
            (command.help or "").strip(),
            "\n".join(["| | |", "|---|---|", *rows]),
        ]
    return "\n\n".join(parts) + "\n"


# --- Python --------------------------------------------------------------------------------------


def api_page() -> str:
    """Everything that the package exports, from its docstrings."""
    doc = (hdnn_dist.__doc__ or "").split("\n\n", 1)[1]
    parts = ["# Python", " ".join(doc.split())]
    for name in sorted(set(hdnn_dist.__all__) - {"__version__"}, key=str.lower):
        parts.append(f"::: {getattr(hdnn_dist, name).__module__}.{name}")
    return "\n\n".join(parts) + "\n"


PAGES = {
    "reference/spec.md": spec_page,
    "reference/cli.md": cli_page,
    "reference/api.md": api_page,
}
