"""The configuration of a run: frozen dataclasses, and the checks between their keys.

The defaults are those of the 123.6M run; config.yaml spells them out and explains every key.
config_reader.py makes a Config from a file and overrides. Imports no torch, so that a wrong
configuration is reported in well under a second.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from smollm.errors import printable

LAST_STEP = 999_999  # names of checkpoint directories have six digits
MOST_TRACED = 100  # steps: a trace is held in memory until it is written
LONGEST_PERIOD = 100_000  # windows after which a mixture's schedule repeats
GRADIENT_CHECKPOINTING = ("none", "selective", "full")  # each keeps less than the one before


def _setting(
    default: Any, low: float | None = None, high: float | None = None,
    choices: tuple[str, ...] = (), is_path: bool = False,
) -> Any:  # fmt: skip
    """A dataclass field with the range (inclusive) or the words that it accepts."""
    metadata = {"minimum": low, "maximum": high, "choices": choices, "is_path": is_path}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture: Hugging Face's `Starcoder2` or `Llama`.

    What is None when it is constructed takes the family's value.
    """

    architecture: str = _setting("starcoder2", choices=("starcoder2", "llama"))
    vocab_size: int = _setting(50258, 2, 2**24)
    hidden_size: int = _setting(768, 2, 2**16)
    num_hidden_layers: int = _setting(12, 1, 1024)
    num_attention_heads: int = _setting(12, 1, 1024)
    num_key_value_heads: int | None = _setting(None, 1, 1024)  # num_attention_heads
    intermediate_size: int = _setting(3072, 1, 2**18)
    max_position_embeddings: int = _setting(2048, 2, 2**20)
    tie_word_embeddings: bool | None = _setting(None)  # starcoder2: true, llama: false
    rope_theta: float = _setting(10000.0, 1.0, 1e12)
    layer_norm_epsilon: float = _setting(1e-5, 1e-12, 0.1)
    rms_norm_eps: float = _setting(1e-5, 1e-12, 0.1)
    initializer_range: float = _setting(0.02, 0.0, 1.0)
    dropout: float = _setting(0.0, 0.0, 0.9)
    attention: str = _setting("auto", choices=("auto", "flash_attn", "sdpa", "math"))

    def __post_init__(self) -> None:
        """Put the family's value where there is none."""
        family = {
            "num_key_value_heads": self.num_attention_heads,
            "tie_word_embeddings": self.architecture == "starcoder2",
        }
        for name, value in family.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # it is frozen from here on


@dataclass(frozen=True)
class TokenizerConfig:
    """Where the tokenizer comes from: gpt2, train, the path of a tokenizer.json, or the Hub."""

    source: str = _setting("gpt2", is_path=True)


@dataclass(frozen=True)
class DataConfig:
    """How the text becomes windows of tokens."""

    input_files: tuple[str, ...] = _setting(("input.txt",), is_path=True)
    text_key: str = _setting("text")
    weights: tuple[float, ...] = _setting((), 0.0, 1e12)
    max_bad_rows: int = _setting(0, 0, 2**40)
    sequence_length: int = _setting(2048, 1, 2**20)
    validation_file: str | None = _setting(None, is_path=True)
    validation_fraction: float = _setting(0.05, 1e-4, 0.5)
    validation_tokens: int = _setting(10_000_000, 2, 2**40)
    cache_dir: str = _setting(".cache", is_path=True)
    allow_changed_input: bool = _setting(False)


@dataclass(frozen=True)
class TrainingConfig:
    """The optimizer, the schedule, and how often things happen (all in optimizer steps)."""

    train_steps: int = _setting(5000, 1, LAST_STEP)
    continue_steps: int = _setting(50, 1, LAST_STEP)
    batch_size: int = _setting(48, 1, 2**20)
    gradient_accumulation_steps: int = _setting(4, 1, 2**20)
    learning_rate: float = _setting(5e-4, 0.0, 10.0)
    min_learning_rate: float = _setting(5e-5, 0.0, 10.0)
    warmup_steps: int = _setting(100, 0, LAST_STEP)
    schedule: str = _setting("cosine", choices=("cosine", "linear", "wsd", "constant"))
    decay_fraction: float = _setting(0.4, 0.001, 1.0)
    optimizer: str = _setting("adamw", choices=("adamw", "muon"))
    embedding_learning_rate: float | None = _setting(None, 0.0, 10.0)
    weight_decay: float = _setting(0.1, 0.0, 10.0)
    adam_beta1: float = _setting(0.9, 0.0, 0.999999)
    adam_beta2: float = _setting(0.95, 0.0, 0.999999)
    adam_epsilon: float = _setting(1e-8, 1e-16, 0.1)
    max_grad_norm: float = _setting(1.0, 1e-6, 1e6)
    precision: str = _setting("auto", choices=("auto", "bf16", "fp32"))
    gradient_checkpointing: str = _setting("none", choices=GRADIENT_CHECKPOINTING)
    fit_memory: bool = _setting(True)
    compile: str = _setting("auto", choices=("auto", "true", "false", "max"))
    parallel: str = _setting("auto", choices=("auto", "ddp", "fsdp"))
    device: str = _setting("auto", choices=("auto", "cuda", "cpu"))
    seed: int = _setting(42, 0, 2**63 - 1)
    deterministic: bool = _setting(False)
    logging_steps: int = _setting(10, 1, LAST_STEP)
    eval_steps: int = _setting(500, 1, LAST_STEP)
    save_steps: int = _setting(500, 1, LAST_STEP)
    sample_steps: int = _setting(500, 1, LAST_STEP)
    profile: tuple[int, ...] = _setting((), 1, LAST_STEP)


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints stay on disk, besides the ends of the phases."""

    keep_last: int = _setting(3, 1, LAST_STEP)
    keep_best: bool = _setting(True)
    keep_steps: tuple[int, ...] = _setting((), 0, LAST_STEP)


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


def differences(old: Config, new: Config) -> list[str]:
    """One line `section.key: old -> new` for each key in which two configurations differ."""
    before, after = to_dict(old), to_dict(new)
    return [
        f"{section}.{key}: {printable(str(before[section][key]))} -> {printable(str(value))}"
        for section, values in after.items()
        for key, value in values.items()
        if before[section][key] != value
    ]


def replace_section(config: Config, section: str, **changes: Any) -> Config:
    """A copy of the configuration with some keys of a section changed."""
    changed = dataclasses.replace(getattr(config, section), **changes)
    return dataclasses.replace(config, **{section: changed})


def replace_training(config: Config, **changes: Any) -> Config:
    """A copy of the configuration with some keys of its training section changed."""
    return replace_section(config, "training", **changes)


@dataclass(frozen=True)
class FixedModel:
    """A model section that weights have, in place of the file's."""

    model: ModelConfig
    tokenizer_source: str  # whose tokenizer is used, in place of the file's tokenizer.source
    where: str  # in words

    def values(self) -> dict[str, Any]:
        """The keys that the weights fix: all but how the model is computed and trained."""
        values = dataclasses.asdict(self.model)
        return {key: value for key, value in values.items() if key not in ("dropout", "attention")}


def model_conflicts(model: ModelConfig) -> Iterator[str]:
    """Every problem between keys of the model section, as a line that names the keys."""
    heads = model.num_attention_heads
    head_size, rest = divmod(model.hidden_size, heads)
    if rest:
        size = f"model.hidden_size {model.hidden_size}"
        yield f"{size} is not a multiple of model.num_attention_heads {heads}"
    elif head_size % 2:
        size = f"model.hidden_size / model.num_attention_heads is {head_size}"
        yield f"{size}; rotary embeddings need it even"
    if heads % model.num_key_value_heads:
        shared = f"model.num_key_value_heads {model.num_key_value_heads}"
        yield f"model.num_attention_heads {heads} is not a multiple of {shared}"
    used, other = "layer_norm_epsilon", "rms_norm_eps"
    if model.architecture == "llama":
        used, other = other, used
    if getattr(model, other) != getattr(ModelConfig, other):
        value = f"model.{other} {getattr(model, other)}"
        yield f"{value} is not used by model.architecture {model.architecture}; set model.{used}"


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as the smallest whole numbers of the same proportions: (0.7, 0.3) is (7, 3)."""
    exact = [Fraction(repr(float(weight))) for weight in weights]  # as it was written
    whole = [int(each * math.lcm(*(each.denominator for each in exact))) for each in exact]
    return tuple(each // max(1, math.gcd(*whole)) for each in whole)


def _weight_conflicts(data: DataConfig) -> Iterator[str]:
    """Every problem of data.weights."""
    weights, entries = list(data.weights), len(data.input_files)
    if not weights:
        return
    if len(weights) != entries:
        files = "1 entry" if entries == 1 else f"{entries} entries"
        numbers = "1 number" if len(weights) == 1 else f"{len(weights)} numbers"
        yield (
            f"data.weights has {numbers}, and data.input_files (--input_file) has {files}; give "
            "one for each, or data.weights=[] for none"
        )
    elif not any(weights):
        yield f"data.weights {weights}: all are 0; one at least must be larger"
    elif (period := sum(shares(weights))) > LONGEST_PERIOD:
        total = sum(weights)
        rounded = [max(round(each / total, 4), 1e-4) if each else 0.0 for each in weights]
        yield (
            f"data.weights {weights}: as whole numbers of the same proportions they add up to "
            f"{period:,}, and at most {LONGEST_PERIOD:,} is allowed; use fewer digits, such as "
            f"{rounded}"
        )


def conflicts(config: Config) -> Iterator[str]:
    """Every problem between keys that are each valid alone, as a line that names the keys."""
    model, training = config.model, config.training
    yield from model_conflicts(model)
    yield from _weight_conflicts(config.data)
    longest = model.max_position_embeddings
    for key, length in (
        ("data.sequence_length", config.data.sequence_length),
        ("generation.max_length", config.generation.max_length),
    ):
        if length > longest:
            yield f"{key} {length} is larger than model.max_position_embeddings {longest}"
    if training.min_learning_rate > training.learning_rate:
        low = f"training.min_learning_rate {training.min_learning_rate}"
        yield f"{low} is larger than training.learning_rate {training.learning_rate}"
    if training.embedding_learning_rate is not None and training.learning_rate == 0:
        yield (
            "training.embedding_learning_rate follows the schedule of training.learning_rate, "
            "which is 0"
        )
    if training.train_steps + training.continue_steps > LAST_STEP:
        yield f"training.train_steps + training.continue_steps is larger than {LAST_STEP}"
    steps = training.profile
    if steps and not (len(steps) == 2 and 0 <= steps[1] - steps[0] < MOST_TRACED):
        yield (
            f"training.profile: got {list(steps)}, expected a list of the first and the last of at "
            f"most {MOST_TRACED} steps, such as [20, 23]"
        )
    if config.tokenizer.source == "train" and model.vocab_size < 258:
        yield (
            f"model.vocab_size {model.vocab_size} is smaller than 258, the least that "
            "tokenizer.source train can do (256 bytes and 2 special tokens)"
        )
    if model.attention == "flash_attn" and training.device == "cpu":
        yield "model.attention flash_attn needs a GPU, and training.device is cpu; use auto"
    if model.attention == "flash_attn" and training.precision == "fp32":
        yield "model.attention flash_attn computes in bf16 only, and training.precision is fp32"
