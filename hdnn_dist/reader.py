"""Reading and writing specs: YAML to validated values, with the place of each in the file.

This is the only module that reads YAML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from hdnn_dist.errors import SpecError, did_you_mean
from hdnn_dist.spec import NAME_RULE, Optimizer, Schedule, Section, Spec, Split, kind_of
from hdnn_dist.storage import Place as FilePlace
from hdnn_dist.storage import read_text


class _Loader(yaml.SafeLoader):
    """SafeLoader with the numbers of YAML 1.2: 1e-3 and 010 = 10, but 1:30 and 2020-01-01 text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own attribute)
        first: [
            rule
            for rule in rules
            if not rule[0].endswith((":int", ":float", ":timestamp", ":value"))
        ]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, *args: Any) -> yaml.Node | None:
        """Count the values, and stop before they fill the memory."""
        self.values = getattr(self, "values", 0) + 1
        if self.values > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")
        return super().compose_node(*args)


for _kind, _form in (
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    ("float", r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_form})$"), list("-+.0123456789")
    )


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    digits: str = loader.construct_scalar(node)
    if len(digits) > _MAX_DIGITS:  # Python will not write it
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits, 0 if digits[:2] in ("0o", "0x") else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


class _Dumper(yaml.SafeDumper):
    """Quotes just the text that `_Loader` would read as something else."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def analyze_scalar(self, scalar: str) -> Any:
        """Have U+0085 escaped: PyYAML writes this line break in a form that reads as another."""
        analysis = super().analyze_scalar(scalar)
        analysis.allow_single_quoted &= "\x85" not in scalar
        return analysis


_TAGS = ("map", "seq", "str", "int", "float", "bool", "null", "merge")
MAX_VALUES = 2_000_000  # in a file: PyYAML keeps about 1 KiB for each
_MAX_ALIASED = 10_000  # values repeated by YAML aliases: nested aliases grow exponentially
_MAX_DIGITS = 400
_MAX_DEPTH = 32  # of an override's key
Place = tuple[str | int, ...]


class Source:
    """Where every value of a spec was written."""

    def __init__(self) -> None:
        self._places: dict[Place, str] = {}

    def locate(self, loc: Sequence[str | int]) -> str | None:
        """Say "ring.yaml:7" or "--set topology.d=3" for the value at `loc`, or what encloses it."""
        path = tuple(loc)
        if path and path not in self._places:  # a section that overrides alone have made
            for inside, place in self._places.items():
                if inside[: len(path)] == path:
                    return place
        found = (self._places.get(path[:n]) for n in range(len(path), -1, -1))
        return next((place for place in found if place is not None), None)

    def _record(self, loc: Place, place: str) -> None:
        self._places.setdefault(loc, place)  # a mapping's own key comes before a merged one

    def _forget(self, loc: Place) -> None:
        """Forget `loc` and all below it: the value is about to be replaced."""
        self._places = {p: w for p, w in self._places.items() if p[: len(loc)] != loc}

    def _adopt(self, other: Source, section: Place, loc: Place) -> None:
        """Take over what `other` knows below `section`, as being below `loc`."""
        for path, place in other._places.items():
            if path[: len(section)] == section:
                self._places[loc + path[len(section) :]] = place

    def _error(self, loc: Place, problem: str, mend: str) -> SpecError:
        return SpecError(loc, problem, mend, self.locate(loc))


def read_spec(path: FilePlace | None = None, overrides: Sequence[str] = ()) -> tuple[Spec, Source]:
    """Read a spec file, or the embedded default for None.

    ``topology`` may name another file: its section ``topology``, or the keys bare. Graph files are
    found relative to the file that names them.

    Args:
        path: the YAML file.
        overrides: ``a.b.c=VALUE``, VALUE in YAML; items by position (``topology.agents.0.d=4``).
            Naming another kind of optimizer, schedule, split or edges drops the keys that the file
            gave for the old kind and the new one does not have.

    Raises:
        SpecError: with the line, on anything that is not a spec.
    """
    if path is None:
        text = resources.files("hdnn_dist").joinpath("default.yaml").read_text(encoding="utf-8")
        data, source = _parse_file(text, "default.yaml")
        folder = Path()
    else:
        data, source = _load(path)
        folder = path.parent if isinstance(path, Path) else Path()
    _follow(data, source, folder)
    for override in overrides:
        _override(data, source, override)
        _follow(data, source, Path())
    return _validate(data, source), source


def spec_from_dict(data: Mapping[str, Any]) -> Spec:
    """The spec in `data` (as a YAML file would hold it); files from the working directory.

    Raises:
        SpecError: as `read_spec`.
    """
    try:
        copy = json.loads(json.dumps(data))
    except (TypeError, ValueError, RecursionError) as error:
        raise SpecError((), f"not plain data: {error}", "use what YAML can hold") from error
    source = Source()
    _follow(copy, source, Path())
    return _validate(copy, source)


def dump_spec(spec: Spec) -> str:
    """`spec` as YAML that `read_spec` reads back equal.

    Raises:
        SpecError: it holds more values than would be read back.
    """
    data = spec.model_dump(mode="json")
    if (values := _count(data)) > MAX_VALUES:
        problem = f"written out, the spec has {values} values, more than {MAX_VALUES}"
        raise SpecError((), problem, "use fewer agents, edges or entries of matrices")
    text: str = yaml.dump(
        data,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=100,
    )
    return text


def _count(value: Any) -> int:
    """The values in `value`, with itself, and its keys."""
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(_count, value.values()))
    return 1 + sum(map(_count, value)) if isinstance(value, list) else 1


def json_schema() -> dict[str, Any]:
    """JSON Schema of a spec file, for editors."""
    schema = Spec.model_json_schema()
    topology = schema["properties"]["topology"]
    other = {"type": "string", "description": "Path of another file that holds the topology."}
    schema["properties"]["topology"] = {"anyOf": [topology, other]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _load(path: FilePlace) -> tuple[dict[str, Any], Source]:
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SpecError((), f"cannot read {path}: {reason}", "name a YAML file") from error
    return _parse_file(text, str(path))


def _parse_file(text: str, name: str) -> tuple[dict[str, Any], Source]:
    data, source = _parse(text, name)
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"holds {_show(data)}, not sections"
        raise SpecError((), f"the file {what}", "start with `topology:`", name)
    # Through JSON, so that aliased parts are no longer shared: overrides change them in place.
    return json.loads(json.dumps(data)), source


def _parse(text: str, name: str, lines: bool = True) -> tuple[Any, Source]:
    """The value in one YAML document, and where its parts are: "name:line", or just "name"."""

    def place(mark: yaml.Mark | None) -> str:
        return f"{name}:{mark.line + 1}" if mark and lines else name

    source = Source()
    seen: set[yaml.Node] = set()
    aliased = 0
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None, source
        for loc, mark, node in _walk((), root.start_mark, root):
            source._record(loc, place(mark))
            if _tag(node) not in _TAGS:
                raise source._error(loc, f"the tag {node.tag} is not known here", "drop it")
            aliased += node in seen
            seen.add(node)
            if aliased > _MAX_ALIASED:
                raise source._error(loc, "too many values come from aliases", "write them out")
            if isinstance(node, yaml.MappingNode):
                _check_keys(loc, node, place)
        return loader.construct_document(root), source
    except SpecError:
        raise
    except yaml.MarkedYAMLError as error:
        at = place(error.problem_mark or error.context_mark)
        raise SpecError((), f"not YAML: {error.problem}", "mend that line", at) from error
    except RecursionError as error:
        raise SpecError((), "values are nested too deeply", "write them flat", name) from error
    # Control characters, !!int x, !!bool x, !!float "".
    except (yaml.YAMLError, ValueError, LookupError) as error:
        raise SpecError((), f"not YAML: {' '.join(str(error).split())}", "mend it", name) from error


def _is_text(scalar: str) -> bool:
    """Whether YAML reads the unquoted `scalar` as text."""
    tag = _Loader("").resolve(yaml.ScalarNode, scalar, (True, False))  # type: ignore[no-untyped-call]
    return bool(tag == "tag:yaml.org,2002:str")


def _tag(node: yaml.Node) -> str:
    return node.tag.removeprefix("tag:yaml.org,2002:")


def _walk(
    loc: Place, mark: yaml.Mark, node: yaml.Node
) -> Iterator[tuple[Place, yaml.Mark, yaml.Node]]:
    """Every value below `node` with its path and where it, or its key, starts."""
    yield loc, mark, node
    if isinstance(node, yaml.SequenceNode):
        for k, item in enumerate(node.value):
            yield from _walk((*loc, k), item.start_mark, item)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if _tag(key) == "str":
                yield from _walk((*loc, key.value), key.start_mark, value)
        for key, value in node.value:
            if _tag(key) == "merge":  # one mapping, or several
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    yield from _walk(loc, merged.start_mark, merged)


def _check_keys(loc: Place, node: yaml.MappingNode, place: Callable[[yaml.Mark], str]) -> None:
    """Refuse what YAML lets pass: keys that are there twice, or are not text."""
    seen: set[str] = set()
    for key, _ in node.value:
        if _tag(key) == "str" and key.value in seen:
            where = place(key.start_mark)
            raise SpecError((*loc, key.value), "this key is here twice", "drop one", where)
        if _tag(key) not in ("str", "merge"):
            shown = f"{key.value} " if isinstance(key, yaml.ScalarNode) else ""
            problem = f"the key {shown}reads as {_tag(key)}"
            raise SpecError(loc, problem, "put it in quotes", place(key.start_mark))
        seen.add(key.value)


def _follow(data: dict[str, Any], source: Source, folder: Path) -> None:
    """Put the topology's own file in its place; make graph files in `folder` relative to here."""
    named = data.get("topology")
    if isinstance(named, str):
        path = folder / named
        try:
            found, other = _load(path)
        except SpecError as error:
            where = error.where or source.locate(("topology",))
            raise SpecError(("topology",), error.problem, error.mend, where) from error
        section: Place = ("topology",) if "topology" in found else ()
        topology = data["topology"] = found["topology"] if section else found
        if isinstance(topology, str):
            raise source._error(
                ("topology",), f"{path} names yet another file", f"name {topology} itself"
            )
        source._forget(("topology",))
        source._adopt(other, section, ("topology",))
        _anchor(topology, path.parent)
    else:
        _anchor(data.get("topology"), folder)
    model = data.get("model")
    layers = model.get("layer_graphs") if isinstance(model, dict) else None
    for layer in layers if isinstance(layers, list) else ():
        _anchor(layer, folder)


def _anchor(holder: Any, folder: Path) -> None:
    edges = holder.get("edges") if isinstance(holder, dict) else None
    if isinstance(edges, dict) and isinstance(edges.get("file"), str):
        edges["file"] = str(folder / edges["file"])


def _override(data: dict[str, Any], source: Source, text: str) -> None:
    """Apply ``a.b.c=VALUE`` to `data`; sections on the way are made."""
    place = f"--set {text}"
    key, _, value_text = text.partition("=")
    parts = key.strip().split(".")
    if not all(parts) or not value_text.strip() or len(parts) > _MAX_DEPTH:
        mend = "write section.key=VALUE (null for no value)"
        raise SpecError((), "this is no override", mend, place)
    value, _ = _parse(value_text, place, lines=False)
    here: Any = data
    loc: Place = ()
    for part in parts:
        if loc:  # step into what the last part named
            step: Any = loc[-1]
            child = here[step] if isinstance(here, list) else here.get(step)
            if isinstance(child, str) and loc[:-1] == ("topology", "agents"):
                child = {"name": child}
            here[step] = {} if child is None else child
            here = here[step]
        if isinstance(here, list):
            if not part.isdecimal() or len(part) > 9 or int(part) >= len(here):
                problem = f"no item {part!r} in a list of {len(here)}"
                raise SpecError(loc, problem, "count from 0", place)
            loc = (*loc, int(part))
        elif isinstance(here, dict):
            loc = (*loc, part)
        else:
            raise SpecError(loc, f"{_show(here)} is no section", "set all of it at once", place)
    if isinstance(here, dict):
        for old in _of_otherkind_of(loc, value, here):
            if not (source.locate((*loc[:-1], old)) or "").startswith("--set "):
                del here[old]
    here[loc[-1]] = value
    source._forget(loc)
    source._record(loc, place)


def _of_otherkind_of(loc: Place, value: Any, section: dict[str, Any]) -> set[str]:
    """Keys of `section` that have no meaning once `value` is at `loc`, which may name its kind."""
    *above, key = loc
    if above[-1:] == ["edges"]:
        others = {"generator": {"file"}, "file": {"generator", "args"}}
        return others.get(str(key), set()).intersection(section)
    for path, union, chosen_by in _UNIONS:
        if loc == (*path, chosen_by):
            for cls in (get_args(member)[0] for member in get_args(get_args(union)[0])):
                if kind_of(cls, chosen_by) == value:
                    return set(section).difference(cls.model_fields)
    return set()


_UNIONS: tuple[tuple[Place, Any, str], ...] = (
    (("data", "split"), Split, "kind"),
    (("training", "optimizer"), Optimizer, "name"),
    (("training", "schedule"), Schedule, "name"),
)


# --- pydantic's errors as one line ---------------------------------------------------------------


def _validate(data: dict[str, Any], source: Source) -> Spec:
    try:
        # Strict as JSON: lists may become tuples, text may not become numbers.
        return Spec.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise _explain(error.errors(include_url=False), data, source) from error


def _explain(errors: Sequence[ErrorDetails], data: Any, source: Source) -> SpecError:
    """The first error, in the user's terms; an unknown key goes first, as it explains others."""
    places: dict[Place, list[ErrorDetails]] = {}
    for error in errors:
        places.setdefault(_user_path(error, data), []).append(error)
    loc = min(places, key=lambda place: places[place][0]["type"] != "extra_forbidden")
    problem, mend = _say(places[loc])
    if more := len(places) - 1:
        mend += f" (and {more} more)"
    return source._error(loc, problem, mend)


def _user_path(error: ErrorDetails, data: Any) -> Place:
    """The error's place as a path in the file: pydantic's loc without the tags of unions."""
    path: Place = ()
    for part in error["loc"]:
        if isinstance(data, dict) and part in data:
            data, path = data[str(part)], (*path, part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data, path = data[part], (*path, part)
    match error["type"]:
        case "missing":
            return (*path, error["loc"][-1])
        case "kind":  # the key that chooses, as an override may have set it alone
            return (*path, error["ctx"]["key"])
    return path


def _say(errors: Sequence[ErrorDetails]) -> tuple[str, str]:
    """Problem and mend for the errors of one value (several where a union has no tags)."""
    first = errors[0]
    if first["type"] == "json_invalid":  # half a surrogate pair, or more than 200 levels
        return f"not plain data: {first['ctx']['error']}", "use plain text, and few levels"
    value, context = first["input"], first.get("ctx", {})
    key = str(first["loc"][-1])
    match first["type"]:
        case "extra_forbidden":
            known = _section_at(first["loc"][:-1]).model_fields
            return "unknown key", did_you_mean(key, known, f"the keys here are {', '.join(known)}")
        case "missing":
            return "missing", "add it"
        case "kind":
            given, kinds = value.get(context["key"]), first["msg"].split(" or ")
            return f"unknown {context['key']} {_show(given)}", did_you_mean(str(given), kinds)
        case "string_pattern_mismatch" | "string_too_long":
            return f"{_show(value)} cannot name an agent", NAME_RULE
    expected = " or ".join(dict.fromkeys(_expected(error) for error in errors))
    problem, mend = f"{_show(value)} given", f"write {expected}"
    if first["type"] == "string_type" and isinstance(value, bool | int | float):
        mend += "; on, off, yes, no and numbers are text only in quotes"
    elif isinstance(value, str) and not _is_text(value):
        mend += ", without quotes"
    return problem, mend


def _expected(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    match error["type"]:
        case "int_type" | "int_from_float":
            return "a whole number"
        case "float_type" | "finite_number":
            return "a number"
        case "bool_type":
            return "true or false"
        case "string_type":
            return "text"
        case "list_type" | "tuple_type":
            return "a list"
        case "dict_type":
            return "a section"
        case "model_type":
            return f"a section with {', '.join(_SECTIONS[context['class_name']].model_fields)}"
        case "literal_error":
            return str(context["expected"]).replace("'", "")
        case "greater_than":
            return f"a number above {context['gt']:.12g}"
        case "greater_than_equal":
            return f"a number from {context['ge']:.12g} up"
        case "less_than":
            return f"a number below {context['lt']:.12g}"
        case "less_than_equal":
            return f"a number up to {context['le']:.12g}"
        case "too_long":
            return f"at most {context['max_length']} values"
        case "too_short":
            return f"at least {context['min_length']} values"
        case _:
            return error["msg"]


_SECTIONS = {cls.__name__: cls for cls in Section.__subclasses__()}


def _section_at(loc: Sequence[str | int]) -> type[Section]:
    """The class at pydantic's `loc`: the last one named, as a union's tag or a field's type."""
    cls: type[Section] = Spec
    for part in loc:
        field = cls.model_fields.get(str(part))
        if part in _SECTIONS:
            cls = _SECTIONS[str(part)]
        elif field is not None:
            cls = _SECTIONS.get(getattr(field.annotation, "__name__", ""), cls)
    return cls


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
