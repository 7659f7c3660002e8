"""The configuration: what is read, what is refused, and how it is said (F1, F2, F3, F4)."""

import contextlib
import dataclasses
import json
import math
import os
import random
import re
import subprocess
import sys
import time
import types
import typing
from pathlib import Path

import pytest
from helpers import ROOT, limit

from smollm import config_reader
from smollm.config import Config, differences, replace_training, sections, to_dict
from smollm.errors import ConfigError

KEYS = [
    (section, field.name)
    for section, kind in sections().items()
    for field in dataclasses.fields(kind)
]

# --- helpers -------------------------------------------------------------------------------------


def write(tmp_path: Path, content: str | bytes, name: str = "run.yaml") -> Path:
    """A configuration file with this content."""
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def problems_of(path: Path, overrides: list[str] | None = None, seconds: float = 10) -> list[str]:
    """The problems of a configuration that must be refused."""
    with limit(seconds), pytest.raises(ConfigError) as caught:
        config_reader.load(path, overrides)
    return caught.value.problems


def value_of(config: Config, name: str):
    """The value of `section.key`."""
    section, _, key = name.partition(".")
    return getattr(getattr(config, section), key)


_KIND = {int: "a whole number from", float: "a number from", bool: "true or false"}
_LINE_SHAPES = [
    re.compile(shape)
    for shape in (
        # a value: the key, what was got, what is expected
        r"(.+: )?[a-z]+\.[a-z_0-9]+: got .+, expected "
        r"(a whole number from|a number from|true or false|one of|a list of|a text).*",
        r"command line: got .+, expected section\.key=value.*",
        # a name: which, and the nearest right one where one is near
        r".+: unknown section .+",
        r".+: unknown key .+",
        r".+: .+ stands twice in .+\(first in line \d+\); keep one",
        # the file as a whole: what it is, and what it should be
        r".+:\d+: .+ is not a mapping of `key: value` lines",
        r".+: not YAML: .+",
        r".+: byte \d+ is not UTF-8; save it as UTF-8",
        r".+: is larger than .+",
        # keys against each other: names both keys
        r"[a-z]+\.[a-z_0-9]+ .*[a-z]+\.[a-z_0-9]+ .+",
    )
]


def assert_clear(problem: str) -> None:
    """A problem is one line of readable length that names key, what was got and expected."""
    assert "\n" not in problem and problem.isprintable(), f"not one printable line: {problem!r}"
    assert len(problem) <= 1000, f"a line of {len(problem)} characters: {problem[:200]!r}..."
    assert any(shape.fullmatch(problem) for shape in _LINE_SHAPES), f"unclear: {problem!r}"


def assert_valid(config: Config) -> None:
    """A configuration that was accepted has every value of its declared type and range."""
    for section, kind in sections().items():
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            value = getattr(getattr(config, section), field.name)
            hint, where = hints[field.name], f"{section}.{field.name} = {value!r}"
            many = typing.get_origin(hint) is tuple
            item = typing.get_args(hint)[0] if many else hint
            assert isinstance(value, tuple) or not many, where
            if isinstance(item, types.UnionType):
                item, none = typing.get_args(item)
                assert none is type(None)
                if value is None:
                    continue
            for one in value if many else (value,):
                assert type(one) is item, where
                if item in (int, float):
                    low, high = field.metadata["minimum"], field.metadata["maximum"]
                    assert math.isfinite(one) and low <= one <= high, where
                if field.metadata["choices"]:
                    assert one in field.metadata["choices"], where
    assert config.model.hidden_size % (2 * config.model.num_attention_heads) == 0
    assert config.model.num_attention_heads % config.model.num_key_value_heads == 0
    json.dumps(to_dict(config), allow_nan=False)
    assert config_reader.from_saved(to_dict(config), "saved") == config


# --- the files of the repository -----------------------------------------------------------------


def test_defaults_are_the_specified_run(tmp_path):
    """An empty file is the 123.6M run: 192 sequences of 2048 tokens a step, and the rest."""
    config = config_reader.load(write(tmp_path, ""))
    assert config == Config()
    assert_valid(config)
    assert config.sequences_per_step == 192
    assert config.tokens_per_step == 192 * 2048
    assert (config.model.vocab_size, config.model.hidden_size) == (50258, 768)
    assert (config.training.learning_rate, config.training.min_learning_rate) == (5e-4, 5e-5)
    assert config.training.schedule == "cosine"
    assert len(config.generation.prompts) == 3


def test_config_yaml_is_the_defaults():
    """config.yaml says exactly what the code does without it."""
    config = config_reader.load(ROOT / "config.yaml")
    assert differences(Config(), config) == []
    assert config == Config()


def test_config_yaml_names_and_explains_every_key():
    """Every section.key stands in config.yaml literally, once, with a comment at or above it."""
    section, previous, explained = "", "", []
    for line in (ROOT / "config.yaml").read_text("utf-8").splitlines():
        if match := re.match(r"([a-z]+):", line):
            section = match[1]
        elif match := re.match(r"  ([a-z_0-9]+):", line):
            commented = re.search(r"\s#\s*\w", line) or re.match(r"\s*#\s*\w", previous)
            assert commented, f"{section}.{match[1]} has no comment"
            explained.append((section, match[1]))
        previous = line
    assert explained == KEYS


def test_config_cpu_yaml_names_only_what_differs():
    """config_cpu.yaml loads, needs no network, and repeats no default but for clarity's sake."""
    config = config_reader.load(ROOT / "config_cpu.yaml")
    assert_valid(config)
    assert config.tokenizer.source == "train"
    assert differences(Config(), config)
    assert config.model.vocab_size < 50258


# --- overrides -----------------------------------------------------------------------------------


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path):
    """Precedence: defaults, then the file, then the overrides in their order."""
    path = write(tmp_path, "training:\n  batch_size: 6\n  seed: 7\n")
    overrides = ["training.batch_size=8", "training.batch_size=12", "wandb.name=a=b"]
    config = config_reader.load(path, overrides)
    assert (config.training.batch_size, config.training.seed) == (12, 7)
    assert config.wandb.name == "a=b"
    assert differences(Config(), config) == [
        "training.batch_size: 48 -> 12",
        "training.seed: 42 -> 7",
        "wandb.name: None -> a=b",
    ]


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("training.learning_rate=1e-3", "training.learning_rate", 1e-3),
        ("training.learning_rate=.001", "training.learning_rate", 0.001),
        ("training.learning_rate=1", "training.learning_rate", 1.0),
        ("training.train_steps=10_000", "training.train_steps", 10_000),
        ("training.deterministic=true", "training.deterministic", True),
        ("training.deterministic=False", "training.deterministic", False),
        ("wandb.name=null", "wandb.name", None),
        ("wandb.name=", "wandb.name", None),
        ("wandb.name=two words: and # more", "wandb.name", "two words: and # more"),
        ("checkpoint.keep_steps=[500, 1000]", "checkpoint.keep_steps", (500, 1000)),
        ("checkpoint.keep_steps=[]", "checkpoint.keep_steps", ()),
        ('generation.prompts=["a, b", c]', "generation.prompts", ("a, b", "c")),
        ("tokenizer.source=/some dir/tokenizer.json", "tokenizer.source", None),
        ("training.seed=9223372036854775807", "training.seed", 2**63 - 1),
    ],
)
def test_override_is_read_by_the_type_of_its_key(tmp_path, override, name, value):
    """A word section.key=value is converted by the key's declared type."""
    got = value_of(config_reader.load(write(tmp_path, ""), [override]), name)
    expected = override.partition("=")[2] if value is None and name != "wandb.name" else value
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    "override",
    [
        "batch_size=24", "training.batch_size", "training.=24", ".batch_size=24", "=24", "",
        "training batch_size=24", "training.batch_size:24", "training.batch_size=24.5",
        "training.batch_size=", "training.batch_size=0", "training.batch_size=-1",
        "training.learning_rate=fast", "training.learning_rate=nan", "training.learning_rate=inf",
        "training.learning_rate=0x1p3", "training.learning_rate=.", "training.learning_rate=e5",
        "checkpoint.keep_steps=500", "checkpoint.keep_steps=[500", "checkpoint.keep_steps=[a]",
        "checkpoint.keep_steps=[[5]]", "checkpoint.keep_steps=[{a: 5}]", "generation.prompts=[]",
        "generation.prompts=[!!python/name:os.system x]", "training.compile=maybe",
        "training.batch_size.more=24", "training.seed=9223372036854775808",
    ],
)  # fmt: skip
def test_a_wrong_override_is_one_clear_problem(tmp_path, override):
    """Each wrong word is one line that names the word or its key."""
    problems = problems_of(write(tmp_path, ""), [override])
    assert len(problems) == 1
    assert_clear(problems[0])
    assert problems[0].startswith("command line: ")


def test_deeply_nested_override_is_refused(tmp_path):
    """A list of thousands of brackets is a problem of the command line, not a crash."""
    problems = problems_of(write(tmp_path, ""), ["checkpoint.keep_steps=" + "[" * 5000])
    assert len(problems) == 1
    assert_clear(problems[0])


# --- F1: fuzz ------------------------------------------------------------------------------------

NASTY = (
    "", "~", "null", "true", "False", "yes", "no", "on", "0", "-0", "1", "-1", "42", "1e400", ".5",
    "5.", "5e-4", "1e", "0123", "0x10", "0b1", "1_000", "_1", "12:30", ".inf", "-.inf", ".nan",
    "nan", "1e-400", "9" * 30, "9" * 400, "1" * 30 + ".5", "'24'", '"a\\nb"', '"\\0"', "[]", "[1]",
    "[1, [2]]", "[a, b]", "{}", "{a: 1}", "{a: [1, {b: 2}]}", "&a 5", "*a", "&a [*a]", "!!int 5",
    "!!python/object/apply:os.system [id]", "!!python/name:os.system", "!local x", "| x", "> x",
    "- 1", "? 1", "@", "`", "%", "2024-01-01", "auto", "cosine", "cuda", "\u00e9", "\u2028",
    "\U0001f600", "x" * 300, "#", "# comment", "'", '"', ": :", "a: b", "<<", "=", "\t5", "5 # six",
)  # fmt: skip


def typo(rng: random.Random, word: str) -> str:
    """A word with one letter dropped, doubled, swapped with the next, or made upper case."""
    at = rng.randrange(len(word))
    return rng.choice(
        (
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + word[at : at + 2][::-1] + word[at + 2 :],
            word[:at] + word[at].upper() + word[at + 1 :],
        )
    )


def random_bytes(rng: random.Random) -> bytes:
    """A file of noise, some of it printable."""
    alphabet = rng.choice((range(256), range(32, 127), b" \n:-[]{}&*!|>#'\"%@`,?ab01\t"))
    return bytes(rng.choice(alphabet) for _ in range(rng.randrange(200)))


def broken_text(rng: random.Random, text: str) -> bytes:
    """config.yaml with a few bytes or lines changed."""
    data = bytearray(text.encode())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + rng.randint(1, 40)]
            case 2:
                data[at:at] = rng.choice(NASTY).encode()
            case 3:
                data[at:at] = rng.choice((b"\n", b"  ", b":", b"\t", b"- ", b"\r", b"\0", b"\xff"))
            case 4:
                lines = bytes(data).split(b"\n")
                lines.insert(rng.randrange(len(lines)), rng.choice(lines))
                data = bytearray(b"\n".join(lines))
    return bytes(data)


def random_structure(rng: random.Random) -> bytes:
    """Sections and keys, right, misspelt or repeated, with values of every kind."""
    lines = []
    for _ in range(rng.randint(1, 4)):
        section = rng.choice([*sections(), "modle", "x", "1", "?", "<<"])
        lines.append(f"{section}:{rng.choice(('', '', '', ' 5', ' [a]', ' {}', ' ~'))}")
        for _ in range(rng.randrange(6)):
            key = rng.choice(KEYS)[1]
            if rng.random() < 0.2:
                key = typo(rng, key) or "x"
            lines.append(f"  {key}: {rng.choice(NASTY)}")
    return "\n".join(lines).encode()


def random_overrides(rng: random.Random) -> list[str]:
    """Words for the command line, from right to hopeless."""
    words = []
    for _ in range(rng.randint(1, 6)):
        section, key = rng.choice(KEYS)
        if rng.random() < 0.2:
            section, key = rng.choice(((typo(rng, section), key), (section, typo(rng, key))))
        form = rng.choice(("{}.{}={}",) * 8 + ("{}.{}", "{}={}{}", "--{}.{}={}", "{} {} {}"))
        words.append(form.format(section, key, rng.choice(NASTY)))
    return words


def right_values(rng: random.Random) -> list[str]:
    """Overrides that are each within their key's range."""
    words = []
    for section, key in rng.sample(KEYS, 6):
        kind = sections()[section]
        field = {field.name: field for field in dataclasses.fields(kind)}[key]
        hint, data = typing.get_type_hints(kind)[key], field.metadata
        if isinstance(hint, types.UnionType):
            hint = typing.get_args(hint)[0]
        if data["choices"]:
            value = rng.choice(data["choices"])
        elif hint is bool:
            value = rng.choice(("true", "false", "True"))
        elif hint is int:
            value = rng.choice((data["minimum"], data["maximum"], rng.randint(1, 4096)))
        elif hint is float:
            value = rng.uniform(data["minimum"], data["maximum"])
        elif hint == tuple[int, ...]:
            value = [rng.randint(0, 5000) for _ in range(3)]
        else:
            value = "[a, b]" if key == "prompts" else "text"
        words.append(f"{section}.{key}={value}")
    return words


def test_fuzzed_configurations_are_read_or_refused_clearly(tmp_path, request):
    """F1: whatever is in the file and on the command line, load returns a valid Config or raises
    ConfigError with clear lines, in under a second."""
    count = 50_000 if request.config.getoption("--slow", default=False) else 2_000
    seed = int(os.environ.get("SEED", "20240607"))
    print(f"seed {seed} (SEED=... repeats another), {count} configurations")
    full = re.split(r"\n(?=\w)", (ROOT / "config.yaml").read_text("utf-8"))
    accepted = refused = 0
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        content, overrides = b"", []
        match number % 5:
            case 0:
                content = random_bytes(rng)
            case 1:
                content = broken_text(rng, "\n".join(rng.sample(full, 2)))
            case 2:
                content = random_structure(rng)
            case 3:
                overrides = random_overrides(rng)
            case 4:
                content = random_structure(rng) if rng.random() < 0.3 else b""
                overrides = right_values(rng)
        path = write(tmp_path, content)
        began = time.process_time()
        try:
            with limit(10):
                assert_valid(config_reader.load(path, overrides))
            accepted += 1
        except ConfigError as error:
            refused += 1
            assert error.problems
            for problem in error.problems:
                assert_clear(problem)
        except Exception as error:
            pytest.fail(f"case {number} of seed {seed}: {error!r}\n{content!r}\n{overrides!r}")
        assert time.process_time() - began < 1, f"case {number}: {content!r} {overrides!r}"
    print(f"{accepted} accepted, {refused} refused")
    assert accepted > count / 20 and refused > count / 4  # the fuzz reaches both sides


COMMAND_LINES = {
    "missing file": (None, ["--config", "there/is/none.yaml"]),
    "directory": (None, ["--config", "."]),
    "noise": (bytes(range(256)), []),
    "utf-16": ("model:\n".encode("utf-16"), []),
    "list at top level": (b"- model\n- data\n", []),
    "unclosed": (b"model: {vocab_size: 5\n", []),
    "tab": (b"model:\n\tvocab_size: 512\n", []),
    "duplicate key": (b"data:\n  cache_dir: a\n  cache_dir: b\n", []),
    "tag": (b"model: !!python/object/apply:os.abort []\n", []),
    "unknown section": (b"modell:\n  vocab_size: 5\n", []),
    "unknown key": (b"model:\n  vocabsize: 5\n", []),
    "wrong type": (b"training:\n  batch_size: many\n", []),
    "against each other": (b"model:\n  hidden_size: 770\n", []),
    "override": (b"", ["training.batch_size=none"]),
    "flag": (b"", ["--batch_size", "24"]),
    "not a word": (b"", ["batch size"]),
    "steps": (b"", ["--train_steps", "0"]),
}


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_a_wrong_command_line_exits_2_at_once(tmp_path, case):
    """F1 through the command: exit 2, `error:`, no traceback, before torch is imported."""
    content, words = COMMAND_LINES[case]
    if content is not None:
        words = ["--config", str(write(tmp_path, content)), *words]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "train.py", "--dry_run", "--save_dir", str(tmp_path / "save"), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=30,
    )
    seconds = time.monotonic() - began
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stdout == ""
    assert seconds < 3, f"{seconds:.2f} s"
    assert not (tmp_path / "save").exists()


def test_the_commands_answer_without_torch():
    """What reads the command line does not import torch or NumPy, which take seconds."""
    code = (
        "import sys, train, continue_training, checkpoint, generate; "
        "sys.exit(bool({'torch', 'numpy', 'tokenizers', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_train_steps_flag_is_checked_against_the_other_keys(tmp_path):
    """--train_steps is checked like training.train_steps: steps have six digits at most."""
    for words in (["--train_steps", "999999"], ["training.train_steps=999999"]):
        done = subprocess.run(
            [sys.executable, "train.py", "--dry_run", "--config", "config_cpu.yaml"]
            + ["--input_file", str(tmp_path / "none"), "--save_dir", str(tmp_path / "s"), *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2, (words, done.stderr)
        assert "training.continue_steps" in done.stderr


# --- F2: typos -----------------------------------------------------------------------------------


def one_letter_typos(rng: random.Random, name: str, taken: set[str]) -> list[str]:
    """Three typos of a name: a letter dropped, one doubled, two neighbours swapped."""
    drops = [name[:i] + name[i + 1 :] for i in range(len(name))]
    doubles = [name[:i] + name[i] + name[i:] for i in range(len(name))]
    swaps = [name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in range(len(name) - 1)]
    return [
        rng.choice([word for word in words if word and word not in taken])
        for words in (drops, doubles, swaps)
    ]


def test_a_typo_of_a_key_is_answered_with_the_right_key(tmp_path):
    """F2: for one-letter typos of every key the suggestion is right in at least 95%."""
    seed = 7
    rng = random.Random(seed)
    wanted, words = [], []
    for section, key in KEYS:
        taken = {other for owner, other in KEYS if owner == section}
        for wrong in one_letter_typos(rng, key, taken):
            words.append(f"{section}.{wrong}=1")
            wanted.append(f"(did you mean {section}.{key}?)")
    problems = problems_of(write(tmp_path, ""), words, seconds=20)
    assert len(problems) == len(words) == 3 * len(KEYS)
    wrong = [
        (word, problem)
        for word, problem, right in zip(words, problems, wanted, strict=True)
        if not problem.endswith(right)
    ]
    print(f"seed {seed}: {len(words) - len(wrong)} of {len(words)} right; wrong: {wrong}")
    assert len(wrong) <= 0.05 * len(words), wrong


def test_a_typo_of_a_section_is_answered_with_the_right_section(tmp_path):
    """The same for the sections' names, in the file and on the command line."""
    seed = 8
    rng = random.Random(seed)
    print(f"seed {seed}")
    taken = {name for pair in KEYS for name in pair}
    for section, key in dict(KEYS).items():
        for wrong in one_letter_typos(rng, section, taken):
            from_file = problems_of(write(tmp_path, f"{wrong}:\n  {key}: 1\n"))
            assert from_file[0].endswith(f"unknown section {wrong!r} (did you mean {section}?)")
            from_words = problems_of(write(tmp_path, ""), [f"{wrong}.{key}=1"])
            assert f"did you mean {section}" in from_words[0]


def test_a_key_in_the_wrong_section_is_answered_with_its_section(tmp_path):
    """A key that exists elsewhere, or that stands outside of any section, is pointed home."""
    path = write(tmp_path, "model:\n  batch_size: 24\nlearning_rate: 1e-3\n")
    assert problems_of(path) == [
        f"{path}:2: unknown key model.batch_size (did you mean training.batch_size?)",
        f"{path}:3: unknown section 'learning_rate' (did you mean training.learning_rate?)",
    ]


def test_no_key_is_suggested_where_none_is_near(tmp_path):
    """A name like no other gets no misleading suggestion."""
    for word in ("training.zebra=1", "training.xyz=1", "model.wonderful=1", "zebra.xyz=1"):
        assert "did you mean" not in problems_of(write(tmp_path, ""), [word])[0]


# --- F3: YAML traps ------------------------------------------------------------------------------

ACCEPTED = {
    "exponent without a dot": ("training:\n  learning_rate: 5e-4\n", "learning_rate", 5e-4),
    "integer for a float": ("training:\n  learning_rate: 1\n", "learning_rate", 1.0),
    "quoted number": ('training:\n  batch_size: "24"\n', "batch_size", 24),
    "true in capitals": ("training:\n  deterministic: TRUE\n", "deterministic", True),
    "CRLF": ("training:\r\n  seed: 5\r\n", "seed", 5),
    "byte-order mark": ("\ufefftraining:\n  seed: 5\n", "seed", 5),
    "flow style": ("training: {seed: 5, compile: 'false'}", "seed", 5),
    "alias of a scalar": ("training:\n  batch_size: &n 6\n  seed: *n\n", "seed", 6),
    "comments only": ("# nothing\n", "seed", 42),
    "empty section": ("training:\nmodel: {}\n", "seed", 42),
    "document marker": ("---\ntraining:\n  seed: 5\n", "seed", 5),
    "underscores": ("training:\n  seed: 1_000\n", "seed", 1000),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_yaml_that_is_read_as_meant(tmp_path, case):
    """F3: what a person plainly means is accepted, with the declared type."""
    text, key, expected = ACCEPTED[case]
    got = getattr(config_reader.load(write(tmp_path, text)).training, key)
    assert got == expected and type(got) is type(expected)


def test_quoted_texts_are_texts(tmp_path):
    """An empty prompt and the word "null" in quotes, from the file and the command line."""
    text = 'generation:\n  prompts: ["", The, "null"]\nwandb:\n  name: "null"\n'
    config = config_reader.load(write(tmp_path, text))
    assert config.generation.prompts == ("", "The", "null") and config.wandb.name == "null"
    config = config_reader.load(write(tmp_path, ""), ["generation.prompts=['', null x, \"~\"]"])
    assert config.generation.prompts == ("", "null x", "~")
    assert all(type(prompt) is str for prompt in config.generation.prompts)
    for plain in ("[~]", "[null]", "[a, ]", "[]"):
        if plain != "[a, ]":
            problems_of(write(tmp_path, ""), [f"generation.prompts={plain}"])


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("training.beta1=0.9", "training.adam_beta1"),
        ("training.warmup=9", "training.warmup_steps"),
        ("model.vocab=9", "model.vocab_size"),
        ("trainer.seed=9", "training"),
    ],
)
def test_a_short_name_is_answered_with_the_key(tmp_path, word, hint):
    """What people write from memory of other tools."""
    assert f"did you mean {hint}?" in problems_of(write(tmp_path, ""), [word])[0]


def training(line: str) -> str:
    """A file with one line in the training section."""
    return f"training:\n  {line}\n"


REFUSED = {
    "octal": (training("batch_size: 0123"), ":2: training.batch_size: got '0123'"),
    "octal float": ("model:\n  rope_theta: 01234\n", ":2: model.rope_theta: got '01234'"),
    "octal of YAML 1.2": (training("seed: 0o17"), "training.seed: got '0o17'"),
    "sexagesimal": (training("save_steps: 12:30"), "training.save_steps: got '12:30'"),
    "hexadecimal": (training("seed: 0x10"), "training.seed: got '0x10'"),
    "no for false": (training("deterministic: no"), "got 'no', expected true or false"),
    "on for true": (training("deterministic: on"), "got 'on', expected true or false"),
    "one for true": (training("deterministic: 1"), "got '1', expected true or false"),
    "infinity": (training("learning_rate: .inf"), "training.learning_rate: got '.inf'"),
    "not a number": (training("learning_rate: .nan"), "training.learning_rate: got '.nan'"),
    "overflow": (training("learning_rate: 1e999"), "training.learning_rate: got '1e999'"),
    "float for an integer": (training("batch_size: 4.0"), "training.batch_size: got '4.0'"),
    "null for a number": (training("batch_size: null"), "training.batch_size: got 'null'"),
    "nothing for a number": (training("batch_size:"), "training.batch_size: got ''"),
    "date": (training("train_steps: 2024-01-01"), "training.train_steps: got '2024-01-01'"),
    "list for a scalar": (training("batch_size: [4]"), "training.batch_size: got ['4']"),
    "mapping for a scalar": (training("batch_size: {a: 4}"), "training.batch_size: got "),
    "scalar for a list": ("generation:\n  prompts: Once\n", "generation.prompts: got 'Once'"),
    "nested list": ("checkpoint:\n  keep_steps: [[5]]\n", "checkpoint.keep_steps: got "),
    "duplicate key": (training("seed: 1\n  seed: 2"), ":3: 'seed' stands twice"),
    "duplicate section": ("model:\ntraining:\nmodel:\n", ":3: 'model' stands twice"),
    "python object": (training("seed: !!python/object:os.system {}"), "training.seed: got "),
    "python apply": (training("seed: !!python/object/apply:os.getpid []"), "training.seed: got "),
    "python name": (training("seed: !!python/name:os.getpid"), "training.seed: got "),
    "integer tag": (training("seed: !!int 5"), "training.seed: got "),
    "tagged section": ("training: !!python/dict {seed: 5}", ":1: section training is not a map"),
    "merge key": ("data: &d\n  cache_dir: a\ntraining:\n  <<: *d\n", ":4: unknown key training.<<"),
    "undefined alias": (training("seed: *none"), ":2: not YAML: "),
    "two documents": ("training:\n  seed: 5\n---\nmodel:\n", ":3: not YAML: "),
    "tab indentation": ("training:\n\tseed: 5\n", ":2: not YAML: "),
    "list at top level": ("- training\n", ":1: the file is not a mapping"),
    "scalar at top level": ("training", ":1: the file is not a mapping"),
    "section is a scalar": ("training: 5\n", ":1: section training is not a mapping"),
    "section is a list": ("training:\n  - seed\n", ":2: section training is not a mapping"),
    "NUL": ("training:\n  seed: \0\n", ": not YAML: "),
    "line break in a key": (training('"a\\nb": 1'), ":2: unknown key training."),
    "line break in a section": ('"a\\nb":\n', ":1: unknown section "),
    "nested too deep": ("training: " + "[" * 3000, ": not YAML: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_yaml_trap_is_refused_with_its_key(tmp_path, case):
    """F3: what YAML would quietly turn into something else is one clear problem."""
    text, expected = REFUSED[case]
    path = write(tmp_path, text)
    problems = problems_of(path)
    assert len(problems) == 1, problems
    assert problems[0].startswith(f"{path}:") and expected in problems[0], problems[0]
    assert_clear(problems[0])


def test_what_was_got_is_said_as_it_is(tmp_path):
    """A nested list or a tagged number is not called something that it is not."""
    path = write(tmp_path, "checkpoint:\n  keep_steps: [[5]]\ntraining:\n  seed: !!int 5\n")
    for problem in problems_of(path):
        assert "mapping" not in problem, problem


def test_yaml_tags_execute_nothing(tmp_path):
    """F3: python tags at every place, in the file and in overrides: nothing is run."""
    marker = tmp_path / "executed"
    tag = f"!!python/object/apply:os.system ['touch {marker}']"
    new = f"!!python/object/new:os.system ['touch {marker}']"
    texts = [
        tag, f"- {tag}", f"training: {tag}", training(f"seed: {new}"), f"? {tag}\n: 5\n",
        f"training:\n  ? {tag}\n  : 5\n", f"generation:\n  prompts: [{tag}]\n",
        f"wandb:\n  name: {tag}\n", f"wandb:\n  name: &a {new}\n  entity: *a\n",
    ]  # fmt: skip
    for text in texts:
        problems_of(write(tmp_path, text))
    for key in ("generation.prompts", "checkpoint.keep_steps", "wandb.name"):
        with contextlib.suppress(ConfigError):  # a text may well begin with !!
            config_reader.load(write(tmp_path, ""), [f"{key}=[{tag}]"])
            config_reader.load(write(tmp_path, ""), [f"{key}={tag}"])
    assert not marker.exists()


LAUGHS = ["a: &a [x, x, x, x, x, x, x, x, x]"] + [
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
]
HUNGRY = {
    "billion laughs, top level": "\n".join(LAUGHS),
    "billion laughs, in a section": "training:\n" + "\n".join("  " + line for line in LAUGHS),
    "billion laughs, as a value": "generation:\n  prompts:\n"
    + "\n".join("    - " + line.partition(": ")[2] for line in LAUGHS),
    "a list in itself": training("batch_size: &a [*a]"),
    "a list in a list in itself": training("batch_size: &a [[*a]]"),
    "a mapping in itself": "training: &a\n  batch_size: *a\n",
    "30,000 digits": training("learning_rate: " + "1" * 30_000 + "x"),
    "30,000 digits and underscores": training("learning_rate: " + "1_" * 15_000 + "x"),
    "a name of 50,000 letters": training("batch_size" * 5_000 + ": 1"),
    "a value of 50,000 letters": training("batch_size: " + "many" * 12_500),
    "a hundred unknown keys": "training:\n" + "".join(f"  key{i}: 1\n" for i in range(100)),
}


@pytest.mark.parametrize("case", HUNGRY)
def test_yaml_that_would_eat_time_or_memory_is_refused_in_a_second(tmp_path, case):
    """F3: entity bombs, cycles and monstrous scalars are refused at once, in readable lines."""
    path = write(tmp_path, HUNGRY[case])
    began = time.process_time()
    problems = problems_of(path)
    assert time.process_time() - began < 1
    for problem in problems:
        assert_clear(problem)


@pytest.mark.parametrize(
    "text",
    [
        (ROOT / "input.txt").read_text("utf-8")[:900_000],
        "training:\n" + "".join(f"  some_key_{i}: a value\n" for i in range(35_000)),
        "checkpoint:\n  keep_steps:\n" + "    - 500\n" * 90_000,
    ],
    ids=["prose", "unknown keys", "a list"],
)
def test_a_large_file_that_is_no_configuration_is_answered_in_a_second(tmp_path, text):
    """A file of nearly a megabyte (the text, or data, by mistake) is refused at once."""
    began = time.process_time()
    with limit(10), contextlib.suppress(ConfigError):
        config_reader.load(write(tmp_path, text))
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "is not a regular file"),
        (lambda path: os.mkfifo(path), "is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (lambda path: path.write_bytes("training:\n".encode("utf-16")), "byte 0 is not UTF-8"),
        (lambda path: path.write_bytes(b"wandb:\n  name: Ren\xe9\n"), "byte 18 is not UTF-8"),
        (lambda path: path.write_bytes(b"#" * 1_000_001), "larger than"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "not YAML"),
    ],
)  # fmt: skip
def test_what_is_no_configuration_file_is_named(tmp_path, make, hint):
    """Missing, a directory, a FIFO, an endless device, UTF-16, Latin-1: one line with the path."""
    path = tmp_path / "run.yaml"
    make(path)
    problems = problems_of(path)
    assert len(problems) == 1
    assert problems[0].startswith(str(path)) and hint in problems[0]


# --- F4: fields against each other ---------------------------------------------------------------

HEADS = "model.hidden_size 770 is not a multiple of model.num_attention_heads 12"
ODD = "model.hidden_size / model.num_attention_heads is 5"
LENGTH = "data.sequence_length 4096 is larger than model.max_position_embeddings 2048"
RATES = "training.min_learning_rate 0.5 is larger than training.learning_rate 0.0005"
FLASH_CPU = "model.attention flash_attn needs a GPU, and training.device is cpu"
FLASH_FP32 = "model.attention flash_attn computes in bf16 only, and training.precision is fp32"
STEPS = "training.train_steps + training.continue_steps"
SAMPLES = "generation.max_length 4096 is larger than model.max_position_embeddings 2048"
SMALL = "model.vocab_size 257 is smaller than 258"

TOGETHER = [
    (["model.hidden_size=770"], [HEADS]),
    (["model.num_attention_heads=13"], ["model.hidden_size 768 is not a multiple"]),
    (["model.hidden_size=60"], [ODD]),
    (["model.hidden_size=12"], ["is 1; rotary"]),
    (["model.hidden_size=6"], ["model.hidden_size 6 is not a multiple"]),
    (["data.sequence_length=4096"], [LENGTH]),
    (["data.sequence_length=2049"], ["data.sequence_length 2049"]),
    (["model.max_position_embeddings=1024"], ["data.sequence_length 2048"]),
    (["model.max_position_embeddings=64"], ["data.sequence_length", "generation.max_length 100"]),
    (["generation.max_length=4096"], [SAMPLES]),
    (["training.min_learning_rate=0.5"], [RATES]),
    (["training.learning_rate=1e-5"], ["training.min_learning_rate 5e-05"]),
    (["training.learning_rate=0"], ["training.min_learning_rate 5e-05"]),
    (
        [
            "training.learning_rate=0",
            "training.min_learning_rate=0",
            "training.embedding_learning_rate=1e-3",
        ],
        ["training.embedding_learning_rate follows the schedule of training.learning_rate"],
    ),
    (["training.train_steps=999999"], [STEPS]),
    (["training.continue_steps=999999"], [STEPS]),
    (["training.train_steps=500000", "training.continue_steps=500000"], [STEPS]),
    (["tokenizer.source=train", "model.vocab_size=257"], [SMALL]),
    (["model.attention=flash_attn", "training.device=cpu"], [FLASH_CPU]),
    (["model.attention=flash_attn", "training.precision=fp32"], [FLASH_FP32]),
    (
        ["model.attention=flash_attn", "training.precision=fp32", "training.device=cpu"],
        [FLASH_CPU, FLASH_FP32],
    ),
    (["model.hidden_size=770", "data.sequence_length=4096"], [HEADS, LENGTH]),
    (["model.hidden_size=60", "training.min_learning_rate=0.5"], [ODD, RATES]),
    (["data.sequence_length=4096", "generation.max_length=4096"], [LENGTH, SAMPLES]),
    (["training.batch_size=0", "model.hidden_size=770"], ["training.batch_size: got '0'", HEADS]),
    (["training.batchsize=4", "model.hidden_size=770"], ["unknown key training.batchsize", HEADS]),
    (["nonsense", "model.hidden_size=770"], ["got 'nonsense', expected section.key", HEADS]),
    (["x.y=1", "data.sequence_length=4096"], ["unknown section 'x'", LENGTH]),
    (
        ["model.dropout=1", "model.dropout=2", "training.seed=-1"],
        ["model.dropout: got '1'", "model.dropout: got '2'", "training.seed: got '-1'"],
    ),
    (
        ["training.compile=maybe", "wandb.mode=of", "training.train_steps=999999"],
        ["training.compile: got 'maybe', expected one of", "wandb.mode: got 'of'", STEPS],
    ),
    (
        ["model.hidden_size=770", "data.sequence_length=4096", "generation.max_length=4096"]
        + ["training.min_learning_rate=0.5", "training.train_steps=999999"]
        + ["model.attention=flash_attn", "training.device=cpu", "training.precision=fp32"]
        + ["training.batch_size=many", "training.seeed=5"],
        [HEADS, LENGTH, SAMPLES, RATES, STEPS, FLASH_CPU, FLASH_FP32]
        + ["training.batch_size: got 'many'", "did you mean training.seed?"],
    ),
]


def assert_exactly(problems: list[str], fragments: list[str]) -> None:
    """Each fragment stands in exactly one problem, and there are no other problems."""
    for fragment in fragments:
        assert sum(fragment in problem for problem in problems) == 1, (fragment, problems)
    assert len(problems) == len(fragments), problems


@pytest.mark.parametrize("number", range(len(TOGETHER)))
def test_all_problems_are_reported_in_one_go(tmp_path, number):
    """F4: every problem between fields is found, with both keys and values, and all together;
    the same from the command line and from the file."""
    overrides, fragments = TOGETHER[number]
    assert_exactly(problems_of(write(tmp_path, ""), overrides), fragments)
    pairs = [word.partition("=")[::2] for word in overrides]
    if all("." in name for name, _ in pairs) and len(dict(pairs)) == len(pairs):
        by_section: dict[str, list[str]] = {}
        for name, value in pairs:
            section, _, key = name.partition(".")
            by_section.setdefault(section, []).append(f"  {key}: {value}\n")
        text = "".join(f"{name}:\n{''.join(lines)}" for name, lines in by_section.items())
        assert len(problems_of(write(tmp_path, text))) == len(fragments)


def test_file_overrides_and_conflicts_are_reported_together(tmp_path):
    """Problems of the file, of the command line and between both come in one message."""
    text = "model:\n  hidden_size: 770\n  vocab: 5\ntraining:\n  batch_size: x\n  batch_size: 4\n"
    problems = problems_of(write(tmp_path, text), ["data.sequence_length=4096", "a.b"])
    expected = ["unknown key model.vocab", "stands twice", "training.batch_size: got 'x'"]
    assert_exactly(problems, [*expected, "got 'a.b', expected section.key=value", HEADS, LENGTH])


def test_no_problem_is_invented_from_a_value_that_nobody_gave(tmp_path):
    """A value that was refused is not replaced by a default that then quarrels with the rest."""
    both = ["model.hidden_size=abc", "model.num_attention_heads=10"]
    assert_exactly(problems_of(write(tmp_path, ""), both), ["model.hidden_size: got 'abc'"])
    missing = problems_of(tmp_path / "none.yaml", ["model.max_position_embeddings=1024"])
    assert_exactly(missing, ["No such file"])


def test_replace_training_and_generation_flags_are_checked():
    """generate.py's flags are read like the file's keys, and all their problems are named."""
    assert config_reader.parse_generation({"top_k": "0", "temperature": "0.5"}).top_k == 0
    with pytest.raises(ConfigError) as caught:
        config_reader.parse_generation({"top_k": "-1", "temperature": "hot", "top_p": "0.9"})
    assert [line.split(":")[0] for line in caught.value.problems] == ["--top_k", "--temperature"]
    assert replace_training(Config(), train_steps=7).training.train_steps == 7
    assert Config().training.train_steps == 5000


def test_a_configuration_of_another_version_can_be_read():
    """from_saved leaves out what it does not know and fills in what is missing (checkpoints)."""
    values = to_dict(replace_training(Config(), seed=7))
    values["training"]["of_the_future"] = 1
    values["future"] = {"key": 1}
    del values["wandb"], values["model"]["attention"]
    assert config_reader.from_saved(values, "saved") == replace_training(Config(), seed=7)
