"""From a YAML file and command-line overrides to a checked Config, all problems at once.

Precedence, lowest first: the defaults, the file, `section.key=value` overrides, flags such as
`--train_steps`.

YAML is read as text and converted by the *declared* type of each key, not by YAML's guess: `5e-4`
is a number, `no` is not a boolean, and octal (`0123`) or sexagesimal (`12:30`) numbers are refused
rather than turned into another value. Tags are refused, so nothing in a file is ever executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
import re
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from smollm import atomic
from smollm.config import (
    Config,
    FixedModel,
    GenerationConfig,
    ModelConfig,
    conflicts,
    model_conflicts,
    sections,
)
from smollm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:  # imported where it is used: --help answers without it
    import yaml

# A leading zero ("0123") would be octal in YAML 1.1; a person may mean either, so it is refused.
_SHAPES = {
    bool: re.compile("true|false", re.IGNORECASE),
    int: re.compile(r"[+-]?(0|[1-9][0-9]*(_[0-9]+)*)"),
    float: re.compile(r"[+-]?(?!0[0-9])([0-9]+(_[0-9]+)*)?\.?[0-9]*([eE][+-]?[0-9]+)?"),
}
_NULLS = ("", "null", "Null", "NULL", "~")
_LARGEST_FILE = 100_000  # bytes
_MOST_PROBLEMS = 100  # of one file; it is hardly a configuration then


def load(
    path: str | Path,
    overrides: list[str] | None = None,
    flags: dict[str, tuple[str, Any]] | None = None,
    fixed: FixedModel | None = None,
) -> Config:
    """Read a configuration file, overrides and flags into a checked Config.

    Args:
        path: a YAML file; it may name any subset of the keys.
        overrides: words `section.key=value`, which win over the file.
        flags: by the name of a flag, the `section.key` that it stands for and the text, or texts,
            that were given; they win over both.
        fixed: replaces the model section; an override that contradicts it is a problem.

    Raises:
        ConfigError: with every problem of the file, of the overrides and between keys.
    """
    reader = _Reader()
    try:
        reader.read_file(Path(path))
        readable = True
    except ConfigError as error:
        reader.problems += error.problems
        readable = False
    reader.read_overrides(overrides or [])
    for flag, (key, value) in (flags or {}).items():
        reader.set(flag, *key.split("."), value)
    if fixed:
        reader.fix_model(fixed)
    config = Config(**{name: kind(**reader.values[name]) for name, kind in sections().items()})
    # A default that stands in for a value that was refused must not conflict with the others.
    problems = reader.problems + [
        conflict
        for conflict in conflicts(config)
        if readable and not any(name in conflict for name in reader.refused)
    ]
    if problems:
        raise ConfigError(*problems)
    return config


def parse_generation(values: dict[str, str]) -> GenerationConfig:
    """Generation settings from the texts of command-line flags, checked like the file's.

    Raises:
        ConfigError: with every problem.
    """
    reader = _Reader()
    for key, text in values.items():
        reader.set(f"--{key}", "generation", key, text)
    if reader.problems:
        raise ConfigError(*reader.problems)
    return GenerationConfig(**reader.values["generation"])


def with_overrides(config: Config, overrides: list[str], fixed: FixedModel) -> Config:
    """A configuration with some keys set by `section.key=value` words.

    Args:
        fixed: what the words must not contradict.

    Raises:
        ConfigError: with every problem.
    """
    reader = _Reader()
    reader.read_overrides(overrides)
    reader.fix_model(fixed)
    parts = {
        name: dataclasses.replace(getattr(config, name), **values)
        for name, values in reader.values.items()
    }
    config = Config(**parts)
    if problems := reader.problems or list(conflicts(config)):
        raise ConfigError(*problems)
    return config


def from_saved(values: dict[str, Any], where: str) -> Config:
    """The configuration that a checkpoint holds, with every value checked like the file's.

    Sections and keys that this version does not know are left out; missing ones take their default.

    Raises:
        CheckpointError: a value is not what its key accepts.
    """
    reader = _Reader()
    for section, kind in sections().items():
        known = {field.name for field in dataclasses.fields(kind)}
        for key, value in values.get(section, {}).items():
            if key in known:
                many = isinstance(value, list)
                texts = [_as_text(item) for item in value] if many else _as_text(value)
                reader.set(where, section, key, texts)
    if reader.problems:
        raise CheckpointError(f"{reader.problems[0]}; it is not one of our checkpoints")
    return Config(**{name: kind(**reader.values[name]) for name, kind in sections().items()})


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """The model section with these values, checked like the file's.

    Raises:
        CheckpointError: with every problem.
    """
    reader = _Reader()
    for key, value in values.items():
        reader.set(where, "model", key, _as_text(value))
    if reader.problems:
        raise CheckpointError("; ".join(reader.problems))
    config = ModelConfig(**reader.values["model"])
    if wrong := list(model_conflicts(config)):
        raise CheckpointError(f"{where}: {'; '.join(wrong)}")
    return config


def _as_text(value: Any) -> str:
    """A JSON value as the file would have it; a text is one, whatever it says."""
    if isinstance(value, str):
        return _Quoted(value)
    return "null" if value is None else str(value)


def _expected(field: dataclasses.Field, kind: Any) -> str:
    """What a key accepts, in words."""
    low, high = field.metadata["minimum"], field.metadata["maximum"]
    if isinstance(kind, types.UnionType):
        inner = typing.get_args(kind)[0]
        return _expected(field, inner) + (" or null" if inner is not str else "")
    if field.metadata["choices"]:
        return "one of " + ", ".join(field.metadata["choices"])
    if kind is bool:
        return "true or false"
    if kind in (int, float):
        noun = "a whole number" if kind is int else "a number"
        return f"{noun} from {low:.12g} to {high:.12g}"
    if kind == tuple[int, ...]:
        return f"a list of whole numbers from {low} to {high}, such as [500, 1000]"
    if kind == tuple[float, ...]:
        return f"a list of numbers from {low:.12g} to {high:.12g}, such as [0.7, 0.3]"
    return (
        "a list of one or more texts, such as [one, two]" if kind == tuple[str, ...] else "a text"
    )


def _parse_scalar(text: str, kind: Any) -> Any:
    """Convert one scalar's text to `kind`; raises ValueError where it is not of that kind."""
    text.encode()  # UnicodeEncodeError, a ValueError: no log or checkpoint could hold it
    is_null = text in _NULLS and not isinstance(text, _Quoted)
    if isinstance(kind, types.UnionType):  # X | None
        if is_null:
            return None
        kind = typing.get_args(kind)[0]
    shape = _SHAPES.get(kind)
    # Longer than 40 is no number that a key accepts, and the pattern takes quadratic time.
    if "\0" in text or (shape and (len(text) > 40 or not shape.fullmatch(text))):
        raise ValueError(text)
    if kind is str and is_null:
        raise ValueError(text)
    return text.lower() == "true" if kind is bool else kind(text) if shape else str(text)


def _parse(field: dataclasses.Field, kind: Any, value: Any) -> Any:
    """Convert a text, or a list of texts, to the type of a key and check its range.

    Raises:
        ValueError: the value is not what the key accepts.
    """
    many = typing.get_origin(kind) is tuple
    item = typing.get_args(kind)[0] if many else kind
    if not isinstance(value, list if many else str) or (item is str and value == []):
        raise ValueError(value)
    results = [_parse_scalar(text, item) for text in (value if many else [value])]
    low, high, choices = (field.metadata[name] for name in ("minimum", "maximum", "choices"))
    if low is not None and not all(
        number is None or (math.isfinite(number) and low <= number <= high) for number in results
    ):
        raise ValueError(value)
    if field.metadata["is_path"]:
        results = [text and os.path.expanduser(text) for text in results]  # `~`, as in a shell
    if choices:
        results = [text.lower() for text in results]
        if results[0] not in choices:
            raise ValueError(value)
    return tuple(results) if many else results[0]


def _suggestion(word: str, section: str | None = None) -> str:
    """` (did you mean ...?)`: the nearest name, or nothing where none is near.

    Args:
        word: an unknown section, or an unknown key of `section`.
    """
    full = {
        f"{owner}.{field.name}": field.name
        for owner, kind in sections().items()
        for field in dataclasses.fields(kind)
    }
    own = {key: name for name, key in full.items() if name.startswith(f"{section}.")}
    near = own if section else {name: name for name in sections()}
    elsewhere = {name: name for name in full} | {key: name for name, key in full.items()}
    for names, cutoff in ((near, 0.65), (elsewhere, 0.75)):
        for match in difflib.get_close_matches(word, names, 1, cutoff):
            return f" (did you mean {names[match]}?)"
    return ""


class _Quoted(str):
    """A text that was written in quotes: "null" and "" are no nulls then."""


class _Unreadable(NamedTuple):
    """Stands for a YAML value that no key accepts."""

    what: str


def _quoted(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."


def _plain(node: yaml.Node) -> str | list[str] | _Unreadable:
    """A scalar's text, a flat list's texts, or _Unreadable for what no key accepts.

    Looks one level deep only: aliases can make a list of lists endless.
    """
    import yaml

    if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":str"):
        return _Quoted(node.value) if node.style in ("'", '"') else node.value
    if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
        if all(isinstance(i, yaml.ScalarNode) and i.tag.endswith(":str") for i in node.value):
            return [_plain(item) for item in node.value]
        return _Unreadable("a list of what is not plain text")
    tag = f"the tag {_quoted(node.tag)}"
    return _Unreadable("a mapping" if node.tag.endswith(":map") else tag)


class _Reader:
    """Collects values and problems from the file and from the overrides."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, Any]] = {name: {} for name in sections()}
        self.problems: list[str] = []
        self.refused: set[str] = set()  # keys whose value was refused
        self.overridden: set[str] = set()  # keys that the command line names

    def set(self, where: str, section: str, key: str, value: Any) -> None:
        """Take one value (a text or a list of texts), or note what is wrong with it."""
        kind = sections().get(section)
        if kind is None:
            self.problems.append(
                f"{where}: unknown section {_quoted(section)}{_suggestion(section)}"
            )
            return
        fields = {field.name: field for field in dataclasses.fields(kind)}
        if key not in fields:
            hint = _suggestion(key, section)
            shown = key if key.isprintable() and len(key) <= 80 else _quoted(key)
            self.problems.append(f"{where}: unknown key {section}.{shown}{hint}")
            return
        hint = typing.get_type_hints(kind)[key]
        try:
            self.values[section][key] = _parse(fields[key], hint, value)
        except ValueError:
            shown = _quoted(value) if isinstance(value, (str, list)) else value.what
            expected = _expected(fields[key], hint)
            self.refused.add(f"{section}.{key}")
            self.problems.append(f"{where}: {section}.{key}: got {shown}, expected {expected}")

    def read_file(self, path: Path) -> None:
        """Read a YAML file, section by section, with the line of each problem."""
        import yaml

        root = _compose(path)
        if root is None:  # an empty file: all defaults
            return
        for section, line, node in self._items(path, root, "the file"):
            if section not in sections():
                self.set(f"{path}:{line}", section, "", "")
            elif isinstance(node, yaml.ScalarNode) and node.value in _NULLS:
                continue  # a section with nothing in it
            else:
                for key, at, value in self._items(path, node, f"section {section}"):
                    if len(self.problems) >= _MOST_PROBLEMS:
                        self.problems.append(f"{path}: and more; the rest was not read")
                        return
                    self.set(f"{path}:{at}", section, key, _plain(value))

    def _items(self, path: Path, node: yaml.Node, what: str) -> list[tuple[str, int, yaml.Node]]:
        """The (key, line, value) of a mapping; notes a node that is none, and keys given twice."""
        import yaml

        if not isinstance(node, yaml.MappingNode) or not node.tag.endswith(":map"):
            line = node.start_mark.line + 1
            self.problems.append(f"{path}:{line}: {what} is not a mapping of `key: value` lines")
            return []
        seen: dict[str, int] = {}
        items = []
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            if key in seen:
                self.problems.append(
                    f"{path}:{line}: {_quoted(key)} stands twice in {what} (first in line "
                    f"{seen[key]}); keep one"
                )
            seen.setdefault(key, line)
            items.append((key, line, value_node))
        return items

    def read_overrides(self, overrides: list[str]) -> None:
        """Read `section.key=value` words; a list is written as YAML writes it: `[a, b]`."""
        import yaml

        for word in overrides:
            name, equals, text = word.partition("=")
            section, dot, key = name.partition(".")
            if not (equals and dot and section and key):
                glob = " (a glob for --input_file stands in quotes)" if os.path.exists(word) else ""
                self.problems.append(
                    f"command line: got {_quoted(word)}, expected section.key=value, "
                    f"such as training.batch_size=24{glob}"
                )
                continue
            value: Any = text
            if text.startswith("["):
                with contextlib.suppress(yaml.YAMLError, RecursionError):  # it stays a text then
                    value = _plain(yaml.compose(text, Loader=yaml.BaseLoader))
            self.set("command line", section, key, value)
            self.overridden.add(f"{section}.{key}")

    def fix_model(self, fixed: FixedModel) -> None:
        """Take the model section and tokenizer of weights; note overrides that contradict them."""
        given = self.values["model"]
        for key, value in fixed.values().items():
            if f"model.{key}" in self.overridden and given.get(key) not in (None, value):
                self.problems.append(
                    f"command line: model.{key}={given[key]} contradicts {fixed.where}, which has "
                    f"{value}; leave it out"
                )
            given[key] = value
        source = self.values["tokenizer"].get("source")
        self.values["tokenizer"]["source"] = fixed.tokenizer_source
        if "tokenizer.source" in self.overridden and source != fixed.tokenizer_source:
            self.problems.append(
                f"command line: tokenizer.source has no effect: {fixed.where} has a tokenizer of "
                "its own, which is used; leave it out"
            )


def _compose(path: Path) -> yaml.Node | None:
    """Parse a YAML file into nodes, without constructing any object.

    Raises:
        ConfigError: the file is missing, is no regular file or too large, is not UTF-8 or is not
            YAML.
    """
    import yaml

    try:
        text = atomic.read_text(path, _LARGEST_FILE).removeprefix("\ufeff")  # a byte-order mark
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a YAML file with --config") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise ConfigError(f"{path}{line}: not YAML: {problem}") from error
