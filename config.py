"""Configuration: frozen dataclasses, a strict YAML reader, overrides, and every check in one place.

Precedence, lowest first: the defaults below (the 123.6M run), the YAML file, `section.key=value`
overrides from the command line, and flags such as `--train_steps`.

YAML is read as text and converted by the *declared* type of each key, not by YAML's guess: so
`5e-4` is a number, `no` is not a boolean, and octal (`0123`) or sexagesimal (`12:30`) numbers are
refused rather than turned into something else. Tags are refused, so nothing is ever executed.

Imports no torch: a wrong configuration is reported in well under a second.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import re
import stat
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


class UserError(Exception):
    """An error that the user can mend: printed as one clear line, with its exit code."""

    exit_code = 1


class ConfigError(UserError):
    """The command line or the configuration is wrong. `problems` holds one line for each."""

    exit_code = 2

    def __init__(self, problems: list[str]):
        self.problems = problems
        count = len(problems)
        title = "1 problem" if count == 1 else f"{count} problems"
        super().__init__(f"{title} in the configuration:\n  " + "\n  ".join(problems))


def _setting(
    default: Any,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field with the range (inclusive) or the words that it accepts."""
    metadata = {"minimum": minimum, "maximum": maximum, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture (Hugging Face's `Starcoder2`); config.yaml explains each key."""

    vocab_size: int = _setting(50258, 2, 2**24)
    hidden_size: int = _setting(768, 2, 2**16)
    num_hidden_layers: int = _setting(12, 1, 1024)
    num_attention_heads: int = _setting(12, 1, 1024)
    intermediate_size: int = _setting(3072, 1, 2**18)
    max_position_embeddings: int = _setting(2048, 2, 2**20)
    rope_theta: float = _setting(10000.0, 1.0, 1e12)
    layer_norm_epsilon: float = _setting(1e-5, 1e-12, 0.1)
    initializer_range: float = _setting(0.02, 0.0, 1.0)
    dropout: float = _setting(0.0, 0.0, 0.9)
    attention: str = _setting("auto", choices=("auto", "flash_attn", "sdpa", "math"))


@dataclass(frozen=True)
class TokenizerConfig:
    """Where the tokenizer comes from: gpt2, train, or the path of a tokenizer.json."""

    source: str = _setting("gpt2")


@dataclass(frozen=True)
class DataConfig:
    """How the text becomes windows of tokens."""

    sequence_length: int = _setting(2048, 1, 2**20)
    validation_fraction: float = _setting(0.05, 1e-4, 0.5)
    cache_dir: str = _setting(".cache")
    allow_changed_input: bool = _setting(False)


@dataclass(frozen=True)
class TrainingConfig:
    """The optimizer, the schedule, and how often things happen (all in optimizer steps)."""

    train_steps: int = _setting(5000, 1, 999_999)
    continue_steps: int = _setting(50, 1, 999_999)
    batch_size: int = _setting(48, 1, 2**20)
    gradient_accumulation_steps: int = _setting(4, 1, 2**20)
    learning_rate: float = _setting(5e-4, 0.0, 10.0)
    min_learning_rate: float = _setting(5e-5, 0.0, 10.0)
    warmup_steps: int = _setting(100, 0, 999_999)
    schedule: str = _setting("cosine", choices=("cosine", "linear", "constant"))
    weight_decay: float = _setting(0.1, 0.0, 10.0)
    adam_beta1: float = _setting(0.9, 0.0, 0.999999)
    adam_beta2: float = _setting(0.95, 0.0, 0.999999)
    adam_epsilon: float = _setting(1e-8, 1e-16, 0.1)
    max_grad_norm: float = _setting(1.0, 1e-6, 1e6)
    precision: str = _setting("auto", choices=("auto", "bf16", "fp32"))
    gradient_checkpointing: str = _setting("none", choices=("none", "selective", "full"))
    fit_memory: bool = _setting(True)
    compile: str = _setting("auto", choices=("auto", "true", "false", "max"))
    parallel: str = _setting("auto", choices=("auto", "ddp", "fsdp"))
    device: str = _setting("auto", choices=("auto", "cuda", "cpu"))
    seed: int = _setting(42, 0, 2**63 - 1)
    deterministic: bool = _setting(False)
    logging_steps: int = _setting(10, 1, 999_999)
    eval_steps: int = _setting(500, 1, 999_999)
    save_steps: int = _setting(500, 1, 999_999)
    sample_steps: int = _setting(500, 1, 999_999)


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints stay on disk, besides the ends of the phases."""

    keep_last: int = _setting(3, 1, 999_999)
    keep_best: bool = _setting(True)
    keep_steps: tuple[int, ...] = _setting((), 0, 999_999)


@dataclass(frozen=True)
class GenerationConfig:
    """How text is sampled."""

    max_length: int = _setting(100, 2, 2**20)
    temperature: float = _setting(1.0, 0.0, 100.0)
    top_k: int = _setting(50, 0, 2**24)
    top_p: float = _setting(0.95, 1e-6, 1.0)
    num_samples: int = _setting(3, 1, 1024)
    prompts: tuple[str, ...] = _setting(
        ("Once upon a time", "In a world where", "The most interesting thing about")
    )


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases."""

    mode: str = _setting("auto", choices=("auto", "online", "offline", "disabled"))
    project: str = _setting("smollm2-training")
    entity: str | None = _setting(None)
    name: str | None = _setting(None)
    watch: str = _setting("gradients", choices=("gradients", "parameters", "all", "false"))
    log_model: str = _setting("true", choices=("true", "false", "all"))


@dataclass(frozen=True)
class Config:
    """One run's complete configuration, checked."""

    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    generation: GenerationConfig = GenerationConfig()
    wandb: WandbConfig = WandbConfig()

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one optimizer step, over all processes."""
        return self.training.batch_size * self.training.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens predicted in one optimizer step, over all processes."""
        return self.sequences_per_step * self.data.sequence_length


def sections() -> dict[str, type]:
    """The sections of a configuration and their dataclasses, in order."""
    return dict(typing.get_type_hints(Config))


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The configuration as plain nested dictionaries (JSON and YAML can hold them)."""
    return {
        section: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        for section, values in dataclasses.asdict(config).items()
    }


def from_dict(values: dict[str, dict[str, Any]]) -> Config:
    """The inverse of `to_dict`, for a configuration that a checkpoint holds.

    Keys that this version does not know are left out; missing ones take their default.
    """
    parts = {}
    for section, kind in sections().items():
        known = {field.name for field in dataclasses.fields(kind)}
        given = {k: v for k, v in values.get(section, {}).items() if k in known}
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        parts[section] = kind(**given)
    return Config(**parts)


def differences(old: Config, new: Config) -> list[str]:
    """One line `section.key: old -> new` for each key in which two configurations differ."""
    before, after = to_dict(old), to_dict(new)
    return [
        f"{section}.{key}: {before[section][key]} -> {value}"
        for section, values in after.items()
        for key, value in values.items()
        if before[section][key] != value
    ]


# --- from text to typed values -------------------------------------------------------------------

_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]*(_[0-9]+)*)")
_NUMBER = re.compile(r"[+-]?([0-9]+(_[0-9]+)*)?\.?[0-9]*([eE][+-]?[0-9]+)?")
_NULLS = ("", "null", "Null", "NULL", "~")


def _expected(field: dataclasses.Field, kind: Any) -> str:
    """What a key accepts, in words, for an error message."""
    low, high = field.metadata["minimum"], field.metadata["maximum"]
    if field.metadata["choices"]:
        return "one of " + ", ".join(field.metadata["choices"])
    if kind is bool:
        return "true or false"
    if kind in (int, float):
        noun = "a whole number" if kind is int else "a number"
        return f"{noun} from {low:.12g} to {high:.12g}"
    if kind == tuple[int, ...]:
        return f"a list of whole numbers from {low} to {high}, such as [500, 1000]"
    if kind == tuple[str, ...]:
        return "a list of one or more texts"
    return "a text"


def _parse_scalar(text: str, kind: Any) -> Any:
    """Convert one scalar's text to `kind`; raises ValueError where it is not of that kind."""
    text.encode()  # UnicodeEncodeError, a ValueError: no log or checkpoint could hold it
    if "\0" in text:
        raise ValueError(text)
    if kind == str | None:
        return None if text in _NULLS else text
    if kind is str:
        if text in _NULLS:
            raise ValueError(text)
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if len(text) > 40:  # longer than any number that a key accepts; _NUMBER is quadratic
        raise ValueError(text)
    if kind is int:
        if not _INTEGER.fullmatch(text):
            raise ValueError(text)
        return int(text)
    # A leading zero ("0123") would be octal in YAML 1.1; a person may mean either, so ask.
    if not _NUMBER.fullmatch(text) or re.match(r"[+-]?0[0-9]", text):
        raise ValueError(text)
    return float(text)


def _parse(field: dataclasses.Field, kind: Any, value: Any) -> Any:
    """Convert a text, or a list of texts, to the type of a key and check its range.

    Raises:
        ValueError: the value is not what the key accepts.
    """
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(value)
        item = typing.get_args(kind)[0]
        result = tuple(_parse_scalar(text, item) for text in value)
        if item is str and not result:
            raise ValueError(value)
    else:
        if not isinstance(value, str):
            raise ValueError(value)
        result = _parse_scalar(value, kind)
    for number in result if isinstance(result, tuple) else (result,):
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            low, high = field.metadata["minimum"], field.metadata["maximum"]
            if not (math.isfinite(number) and low <= number <= high):
                raise ValueError(value)
    if field.metadata["choices"]:
        result = result.lower()  # `True` is a word like any other here
        if result not in field.metadata["choices"]:
            raise ValueError(value)
    return result


def _suggestion(section: str | None, key: str) -> str:
    """` (did you mean ...?)` for an unknown section or key, or nothing where nothing is near."""
    everything = {
        f"{name}.{field.name}": field.name
        for name, kind in sections().items()
        for field in dataclasses.fields(kind)
    }
    if section is None:
        owners = [full for full, name in everything.items() if name == key]
        near = owners or difflib.get_close_matches(key, [*sections(), *everything], 1)
    else:
        own = [name for full, name in everything.items() if full.startswith(section + ".")]
        near = [f"{section}.{name}" for name in difflib.get_close_matches(key, own, 1, 0.65)]
        near = near or [full for full, name in everything.items() if name == key]
        # The key's own part decides: a section in common is no likeness.
        names = difflib.get_close_matches(key, list(everything.values()), 1, 0.75)
        near = near or [full for full, name in everything.items() if name in names]
    return f" (did you mean {near[0]}?)" if near else ""


@dataclass(frozen=True)
class _Unfit:
    """What stands in for a value that no key accepts."""

    what: str


def _shown(text: str) -> str:
    """A name that someone gave, as part of one line of readable length."""
    return text if text.isprintable() and len(text) <= 80 else _quoted(text)


def _quoted(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."


class _Reader:
    """Collects values and problems from the file and from the overrides."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, Any]] = {name: {} for name in sections()}
        self.problems: list[str] = []
        self.unread = False  # the file could not be read at all
        self.bad: set[str] = set()  # keys whose value was refused

    def set(self, where: str, section: str, key: str, value: Any) -> None:
        """Take one value (a text or a list of texts), or note what is wrong with it."""
        kind = sections().get(section)
        if kind is None:
            hint = _suggestion(None, section)
            self.problems.append(f"{where}: unknown section {_quoted(section)}{hint}")
            return
        fields = {field.name: field for field in dataclasses.fields(kind)}
        if key not in fields:
            hint = _suggestion(section, key)
            self.problems.append(f"{where}: unknown key {section}.{_shown(key)}{hint}")
            return
        hint = typing.get_type_hints(kind)[key]
        try:
            self.values[section][key] = _parse(fields[key], hint, value)
        except ValueError:
            shown = _quoted(value) if isinstance(value, (str, list)) else value.what
            expected = _expected(fields[key], hint)
            self.bad.add(f"{section}.{key}")
            self.problems.append(f"{where}: {section}.{key}: got {shown}, expected {expected}")

    def read_file(self, path: Path) -> None:
        """Read a YAML file, section by section, with the line of each problem."""
        root = _compose(path)
        if root is None:  # an empty file: all defaults
            return
        for section, line, node in self._items(path, root, "the file"):
            if section not in sections():
                hint = _suggestion(None, section)
                self.problems.append(f"{path}:{line}: unknown section {_quoted(section)}{hint}")
            elif isinstance(node, yaml.ScalarNode) and node.value in _NULLS:
                continue  # a section with nothing in it
            else:
                for key, at, value in self._items(path, node, f"section {section}"):
                    if len(self.problems) >= 100:
                        self.problems.append(f"{path}: and more; the rest was not read")
                        return
                    self.set(f"{path}:{at}", section, key, self._plain(value))

    def _items(self, path: Path, node: yaml.Node, what: str) -> list[tuple[str, int, yaml.Node]]:
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

    @staticmethod
    def _plain(node: yaml.Node) -> Any:
        """A scalar's text, a flat list's texts, or _Unfit for what no key accepts.

        Looks one level deep only: aliases can make a list of lists endless.
        """
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":str"):
            return node.value
        if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
            if all(isinstance(i, yaml.ScalarNode) and i.tag.endswith(":str") for i in node.value):
                return [item.value for item in node.value]
            return _Unfit("a list of what is not plain text")
        return _Unfit("a mapping" if node.tag.endswith(":map") else f"the tag {_quoted(node.tag)}")

    def read_overrides(self, overrides: list[str]) -> None:
        """Read `section.key=value` words; a list is written as YAML writes it: `[a, b]`."""
        for word in overrides:
            name, equals, text = word.partition("=")
            section, dot, key = name.partition(".")
            if not (equals and dot and section and key):
                self.problems.append(
                    f"command line: got {_quoted(word)}, expected section.key=value, "
                    "such as training.batch_size=24"
                )
                continue
            value: Any = text
            if text.startswith("["):
                try:
                    value = self._plain(yaml.compose(text, Loader=yaml.BaseLoader))
                except (yaml.YAMLError, RecursionError):
                    value = text
            self.set("command line", section, key, value)


def _compose(path: Path) -> yaml.Node | None:
    """Parse a YAML file into nodes, with nothing constructed.

    Raises:
        ConfigError: the file is missing, is no regular file, is not UTF-8 or is not YAML.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError([f"{path}: is not a regular file; name a YAML file with --config"])
        if path.stat().st_size > 100_000:
            raise ConfigError([f"{path}: is larger than 100 kB; is it a configuration?"])
        return yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}; name a YAML file with --config"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: byte {error.start} is not UTF-8; save it as UTF-8"]) from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise ConfigError([f"{path}{line}: not YAML: {problem}"]) from error


def _conflicts(config: Config) -> list[str]:
    """Every problem between keys that are each fine alone."""
    model, training = config.model, config.training
    head, rest = divmod(model.hidden_size, model.num_attention_heads)
    checks = [
        (
            rest != 0,
            f"model.hidden_size {model.hidden_size} is not a multiple of "
            f"model.num_attention_heads {model.num_attention_heads}",
        ),
        (
            rest == 0 and head % 2 != 0,
            f"model.hidden_size / model.num_attention_heads is {head}; rotary embeddings need it "
            "even",
        ),
        (
            config.data.sequence_length > model.max_position_embeddings,
            f"data.sequence_length {config.data.sequence_length} is larger than "
            f"model.max_position_embeddings {model.max_position_embeddings}",
        ),
        (
            config.generation.max_length > model.max_position_embeddings,
            f"generation.max_length {config.generation.max_length} is larger than "
            f"model.max_position_embeddings {model.max_position_embeddings}",
        ),
        (
            training.min_learning_rate > training.learning_rate,
            f"training.min_learning_rate {training.min_learning_rate} is larger than "
            f"training.learning_rate {training.learning_rate}",
        ),
        (
            training.train_steps + training.continue_steps > 999_999,
            "training.train_steps + training.continue_steps is larger than 999999",
        ),
        (
            config.tokenizer.source == "train" and model.vocab_size < 258,
            f"model.vocab_size {model.vocab_size} is smaller than 258, the least that "
            "tokenizer.source train can do (256 bytes and 2 special tokens)",
        ),
        (
            model.attention == "flash_attn" and training.device == "cpu",
            "model.attention flash_attn needs a GPU, and training.device is cpu; use auto",
        ),
        (
            model.attention == "flash_attn" and training.precision == "fp32",
            "model.attention flash_attn computes in bf16 only, and training.precision is fp32",
        ),
    ]
    return [message for wrong, message in checks if wrong]


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a configuration file and overrides into a checked Config.

    Args:
        path: a YAML file; it may name any subset of the keys.
        overrides: words `section.key=value`, which win over the file.

    Raises:
        ConfigError: with every problem of the file, of the overrides and between keys.
    """
    reader = _Reader()
    try:
        reader.read_file(Path(path))
    except ConfigError as error:
        reader.problems += error.problems
        reader.unread = True
    reader.read_overrides(overrides or [])
    config = Config(**{name: kind(**reader.values[name]) for name, kind in sections().items()})
    # A default that stands in for a value that was refused must not quarrel with the others.
    problems = reader.problems + [
        conflict
        for conflict in _conflicts(config)
        if not reader.unread and not any(name in conflict for name in reader.bad)
    ]
    if problems:
        raise ConfigError(problems)
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
        raise ConfigError(reader.problems)
    return GenerationConfig(**reader.values["generation"])


def replace_training(config: Config, **changes: Any) -> Config:
    """A copy of the configuration with some keys of its training section changed."""
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))


def derive_seed(seed: int, step: int, purpose: str) -> int:
    """A 63-bit seed for one purpose at one step: all randomness of a run comes from these."""
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
