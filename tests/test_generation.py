"""Sampling: hand-computed cases, transformers' own filters, and the command line."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    SHAPES,
    call,
    environment,
    finished_run,
    limit,
    made_once,
    reseal,
    small_model,
    train,
    write_tiny,
)  # fmt: skip
from pretrained_helpers import write_model
from safetensors.torch import load_file, save_file
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from smollm import generation, hardware
from smollm.checkpoint import pretrained
from smollm.config import GenerationConfig, ModelConfig
from smollm.errors import printable
from smollm.randomness import derive_seed

PROBABILITIES = torch.tensor([[0.1, 0.4, 0.2, 0.3]])


def pick(uniform: float, **settings: float) -> int:
    """The token that `select` takes from PROBABILITIES."""
    chosen = GenerationConfig(**{"top_k": 0, "top_p": 1.0, **settings})
    return int(generation.select(PROBABILITIES.log(), torch.tensor([uniform]), chosen))


def test_select_by_hand() -> None:
    """The tokens in falling order are 1 (0.4), 3 (0.3), 2 (0.2), 0 (0.1)."""
    assert [pick(u) for u in (0.0, 0.39, 0.41, 0.69, 0.71, 0.89, 0.91, 0.9999)] == [
        1, 1, 3, 3, 2, 2, 0, 0,
    ]  # fmt: skip
    assert pick(0.99, temperature=0) == 1
    assert [pick(u, top_k=2) for u in (0.5, 0.6, 0.9999)] == [1, 3, 3]  # 4/7 and 3/7
    assert [pick(u, top_p=0.4) for u in (0.0, 0.9999)] == [1, 1]
    assert [pick(u, top_p=0.5) for u in (0.5, 0.6)] == [1, 3]  # 0.4 does not reach 0.5
    # Half the temperature squares the odds: 16 : 9 : 4 : 1.
    assert [pick(u, temperature=0.5) for u in (0.53, 0.54, 0.83, 0.84, 0.96, 0.97)] == [
        1, 3, 3, 2, 2, 0,
    ]  # fmt: skip


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("top_k", [0, 1, 7])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_the_distribution_is_that_of_transformers(
    temperature: float, top_k: int, top_p: float
) -> None:
    """The frequencies over a grid of uniforms equal the probabilities after HF's filters."""
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(3))
    settings = GenerationConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    grid = (torch.arange(20_000) + 0.5) / 20_000
    chosen = generation.select(logits.expand(20_000, -1), grid, settings)
    found = torch.bincount(chosen, minlength=20) / 20_000
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    torch.testing.assert_close(found, scores.softmax(-1)[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_greedy_generation_equals_argmax_of_full_forwards(config: ModelConfig) -> None:
    """The KV cache and the ragged batch change nothing: each row alone, without a cache."""
    model = small_model(config=config).eval()
    prompts = [[5, 6, 7], [9], [20, 21, 22, 23, 24, 25]]
    settings = GenerationConfig(max_length=14, temperature=0)
    results = generation.generate_ids(model, prompts, settings, [1, 2, 3], end=0)
    for prompt, found in zip(prompts, results, strict=True):
        ids, expected = list(prompt), 0.0
        while len(ids) < 14 and ids[-1] != 0:
            scores = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
            ids.append(int(scores.argmax()))
            expected += scores.max().item()
        assert found.ids == ids[len(prompt) :]
        assert found.log_likelihood == pytest.approx(expected, abs=1e-3)
        assert found.seconds > 0


def test_seeds_make_samples_and_rows_are_independent() -> None:
    """Same seed, same text, whatever else is in the batch; another seed, another text."""
    model = small_model().eval()
    settings = GenerationConfig(max_length=16)
    prompt = [5, 6, 7]
    alone = generation.generate_ids(model, [prompt], settings, [11], end=0)[0].ids
    batch = generation.generate_ids(model, [[1], prompt, prompt], settings, [4, 11, 12], end=0)
    assert batch[1].ids == alone
    assert batch[2].ids != alone


def test_end_of_text_ends_a_row_only() -> None:
    """A row that draws the end token stops there; the others go on."""
    model = small_model().eval()
    settings = GenerationConfig(max_length=16, temperature=0)
    free = [row.ids for row in generation.generate_ids(model, [[3], [8]], settings, [1, 1], end=-1)]
    end = next(token for token in free[0] if token not in free[1])
    stopped = generation.generate_ids(model, [[3], [8]], settings, [1, 1], end=end)
    assert stopped[0].ids == free[0][: free[0].index(end) + 1]
    assert stopped[1].ids == free[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a finished tiny run."""
    return finished_run(tmp_path_factory)


def generate(run: Path, *words: str, **extra: str):
    """Run generate.py on the newest checkpoint."""
    script = [sys.executable, str(ROOT / "generate.py"), "--checkpoint", "run/checkpoints/latest"]
    return call(run, [*script, *words], **extra)


def test_command_line(run: Path) -> None:
    """JSON lines, seeds that repeat, prompts in turn, max_length as Hugging Face counts it."""
    words = ["--prompt", "The sea", "A", "--num_samples", "3", "--seed", "5", "--json"]
    first, second = (
        generate(run, *words, "--max_length", "20"),
        generate(run, *words, "--max_length", "20"),
    )
    assert first.returncode == 0, first.stdout
    samples = [json.loads(line) for line in first.stdout.splitlines()]
    assert [s["prompt"] for s in samples] == ["The sea", "A", "The sea"]
    assert all(s["text"].startswith(s["prompt"]) for s in samples)
    assert all(0 < s["generated_tokens"] < 20 and s["perplexity"] > 1 for s in samples)
    again = [json.loads(line) for line in second.stdout.splitlines()]
    assert [s["text"] for s in samples] == [s["text"] for s in again]
    plain = generate(run, "--seed", "5")
    assert plain.returncode == 0 and "Once upon a time" in plain.stdout


@pytest.mark.parametrize(
    ("words", "code", "hint"),
    [
        (["--temperature", "hot"], 2, "--temperature"),
        (["--top_p", "1.5", "--top_k", "-1"], 2, "2 problems"),
        (["--max_length", "9999"], 2, "64"),
        (["--prompt", "word " * 200], 2, "the model holds 64"),
        (["--prompt", "the sea and the river", "--max_length", "3"], 2, "generation.max_length 3"),
        (["--prompt", "-The"], 2, "--prompt=-The"),
        (["--nonsense"], 2, "--help"),
        (["--interactive", "--json", "--prompt", "A"], 2, "not go with --prompt, --json"),
        (["--checkpoint", "nowhere"], 3, "nowhere"),
        (["--checkpoint", "text.txt"], 3, "text.txt"),
        (["--checkpoint", "run"], 3, "manifest.json"),
    ],
)
def test_command_line_errors(run: Path, words: list[str], code: int, hint: str) -> None:
    """One clear line and the right exit code."""
    result = generate(run, *words)
    assert result.returncode == code, result.stdout
    assert hint in result.stdout and "Traceback" not in result.stdout


def test_perplexity_is_that_of_the_model(run: Path) -> None:
    """A sample's perplexity, recomputed by transformers on the same tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = run / "run/checkpoints/latest"
    found = pretrained.find(str(directory))
    tokenizer, end = pretrained.load_tokenizer(found)
    model = pretrained.load(found, torch.device("cpu"), torch.float32)
    settings = GenerationConfig(max_length=30, prompts=("The sea was",), num_samples=1)
    sample = generation.generate(model, tokenizer, end, settings, seed=1)[0]
    prompt = tokenizer.encode("The sea was").ids
    found = generation.generate_ids(
        model, [prompt], settings, [derive_seed(1, 0, "sample")],
        end,
    )[0]  # fmt: skip
    new = found.ids
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    assert AutoTokenizer.from_pretrained(directory)("The sea was")["input_ids"] == prompt
    scores = theirs(torch.tensor([prompt + new])).logits[0].log_softmax(-1)
    expected = sum(
        float(scores[len(prompt) - 1 + i, token].detach()) for i, token in enumerate(new)
    )
    assert found.log_likelihood == pytest.approx(expected, abs=1e-3)
    assert sample.perplexity == pytest.approx(math.exp(-expected / len(new)), rel=1e-3)
    assert sample.generated_tokens == len(new)


def test_every_prompt_gets_a_sample(run: Path) -> None:
    """Five words and a repeated flag: none is dropped, with fewer samples asked for; one that
    begins with a dash, and the empty one, are prompts too."""
    words = [
        "--prompt",
        "A",
        "B",
        "--prompt",
        "C",
        "",
        "--prompt=-D",
        "--num_samples",
        "3",
        "--json",
    ]
    result = generate(run, *words)
    assert result.returncode == 0, result.stdout
    samples = [json.loads(line) for line in result.stdout.splitlines()]
    assert [sample["prompt"] for sample in samples] == ["A", "B", "C", "", "-D"]
    again = generate(run, "--prompt", "A", "--num_samples", "4", "--json")
    assert len(again.stdout.splitlines()) == 4


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_json_on_any_console(run: Path, encoding: str) -> None:
    """What the console cannot show is escaped as JSON has it."""
    words = ["--prompt", "caf\u00e9 \u2019", "--json"]
    result = generate(run, *words, PYTHONIOENCODING=encoding)
    assert result.returncode == 0, result.stdout
    for line in result.stdout.splitlines():
        assert json.loads(line)["prompt"] == "caf\u00e9 \u2019"


def test_a_model_directory_of_another_tool(run: Path, tmp_path: Path) -> None:
    """Saved by transformers, or copied without the optimizer: generate.py takes it, the others
    say what it lacks; one without a tokenizer is named as that."""
    from transformers import AutoModelForCausalLM

    source, copy = run / "run/checkpoints/latest", tmp_path / "copy"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(copy)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, copy)
    words = ["--seed", "5", "--json", "--checkpoint"]
    ours, theirs = (generate(run, *words, str(path)) for path in (source, copy))
    assert theirs.returncode == 0, theirs.stdout
    texts = [[json.loads(line)["text"] for line in x.stdout.splitlines()] for x in (ours, theirs)]
    assert texts[0] == texts[1]
    for script, *rest in (
        ("checkpoint.py", "verify", str(copy)),
        ("train.py", "--config", "tiny.yaml", "--input_file", "text.txt", "--save_dir",
         str(tmp_path / "new"), "--log_dir", str(tmp_path / "logs"), "--resume", str(copy)),
    ):  # fmt: skip
        refused = call(run, [sys.executable, str(ROOT / script), *rest])
        assert refused.returncode == 3 and "damaged" not in refused.stdout.lower(), refused.stdout
        assert "without manifest.json and training state" in refused.stdout
    (copy / "tokenizer.json").unlink()
    assert "copy: has no tokenizer.json" in generate(run, "--checkpoint", str(copy)).stdout


def test_transformers_takes_longer_prompts_than_our_samples(run: Path, tmp_path: Path) -> None:
    """generation_config.json describes the model: its pipeline is not held to our 16 tokens, and
    greedy sampling leaves no setting that older transformers refuse."""
    from transformers import pipeline

    directory = run / "run/checkpoints/latest"
    assert "max_length" not in json.loads((directory / "generation_config.json").read_text())
    text = pipeline("text-generation", str(directory))("the sea and " * 6, max_new_tokens=3)
    assert len(text[0]["generated_text"]) > len("the sea and " * 6) - 1
    write_tiny(tmp_path)
    assert train(tmp_path, "generation.temperature=0", "--train_steps", "2").returncode == 0
    path = tmp_path / "run/checkpoints/latest/generation_config.json"
    sampling = {k: v for k, v in json.loads(path.read_text()).items() if not k.endswith("_id")}
    assert sampling == {"do_sample": False}


def test_weights_that_are_not_finite_are_named(run: Path, tmp_path: Path) -> None:
    """Not samples of noise, and no JSON with NaN: exit 3."""
    copy = tmp_path / "step_000012"
    shutil.copytree(run / "run/checkpoints/step_000012", copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    reseal(copy, "model.safetensors")
    result = generate(run, "--checkpoint", str(copy), "--json")
    assert result.returncode == 3, result.stdout
    assert "model.norm.weight holds numbers that are not finite" in result.stdout


# --- as it comes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model`, whose texts take seconds: 4,096 tokens."""
    return made_once(
        tmp_path_factory,
        "long-texts",
        lambda directory: write_model(directory / "model", max_position_embeddings=4096),
    )


def test_pieces_of_a_text_make_the_text(long: Path) -> None:
    """Random tokens, many of them parts of characters: pieces end between characters."""
    found = pretrained.find(str(long / "model"))
    tokenizer, end = pretrained.load_tokenizer(found)
    model = pretrained.load(found, torch.device("cpu"), torch.float32)
    number = parts = 0
    for seed in range(6):
        settings = GenerationConfig(
            max_length=60, temperature=9, top_k=0, top_p=1.0, num_samples=2, prompts=("The sea ",)
        )
        pieces: list[str] = []
        first, _ = generation.generate(model, tokenizer, end, settings, seed, pieces.append)
        assert "".join(pieces) == first.text
        assert pieces[0] == "The sea "
        assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])
        number += len(pieces)
        parts += first.text.count("\ufffd")
    assert number > 60
    assert parts > 20, "the tokens were no parts of characters"


class Terminal:
    """generate.py in a terminal of its own; a context that closes it."""

    def __init__(self, directory: Path, *words: str) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.chdir(directory)
            words = (sys.executable, str(ROOT / "generate.py"), *words)
            os.execve(words[0], words, environment(TERM="dumb"))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.descriptor)

    def type(self, keys: str) -> None:
        """Press keys: \\r is Enter, \\x03 Ctrl-C, \\x04 Ctrl-D."""
        os.write(self.descriptor, keys.encode())

    def until(self, end: str, seconds: float = 60) -> str:
        """What is shown up to a text, this included; TimeoutError where it does not come."""
        shown = b""
        while not shown.replace(b"\r\n", b"\n").endswith(end.encode()):
            if not select.select([self.descriptor], [], [], seconds)[0]:
                raise TimeoutError(f"{end!r} does not come after {shown!r}")
            shown += os.read(self.descriptor, 1)
        return shown.decode("utf-8", "replace").replace("\r\n", "\n")

    def end(self) -> tuple[int, list[str]]:
        """Wait until the command ends: its exit code, and what was shown, as it came."""
        shown = []
        with limit(60), contextlib.suppress(OSError):  # EIO: it has ended
            while piece := os.read(self.descriptor, 4096):
                shown.append(piece.decode("utf-8", "replace").replace("\r\n", "\n"))
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), shown


def test_a_single_sample_comes_as_it_is_made(run: Path, long: Path) -> None:
    """On a terminal; it is the text that the same seed gives elsewhere."""
    words = ["--checkpoint", "model", "--prompt", "The sea", "--max_length", "400", "--seed", "5"]
    with Terminal(long, *words, "--num_samples", "1") as terminal:
        code, pieces = terminal.end()
    whole = generate(run, "--checkpoint", str(long / "model"), *words[2:], "--num_samples", "1")
    shown = "".join(pieces)
    assert code == 0
    assert len(pieces) > "".join(pieces).count("\n") + 20, "it came line by line"
    text, figures = shown.rsplit("\n--- ", 1)
    assert whole.stdout.startswith(text + "\n--- ")
    assert figures.split("perplexity")[0] in whole.stdout
    assert shown.endswith("--seed 5 repeats these samples\n")


def test_a_prompt_that_talks_back(long: Path) -> None:
    """--interactive in a terminal: Ctrl-C stops a text or drops a line, Ctrl-D ends."""
    words = ["--checkpoint", "model", "--max_length", "4096", "--temperature", "0"]
    with Terminal(long, *words, "--interactive") as terminal:
        assert "Ctrl-C stops, Ctrl-D on an empty line ends" in terminal.until("> ")
        terminal.type("The sea\r")
        assert terminal.until("\n") == "The sea\n"  # the echo
        begun = terminal.until("The sea") + terminal.until("e")
        terminal.type("\x03")
        begun += terminal.until("\n> ")
        assert len(begun) < 2000 and "Traceback" not in begun
        terminal.type("not this")
        terminal.until("not this")
        terminal.type("\x03")
        try:
            terminal.until("\n> ", seconds=3)
        except (
            TimeoutError
        ):  # so soon after a key, Python looks at a signal after the next key only
            terminal.type("\r")
            terminal.until("\n> ")
        terminal.type("\x04")
        assert terminal.end()[0] == 0


def test_lines_of_a_pipe(run: Path) -> None:
    """Each has a seed of its own; one that is too long or not UTF-8 stops nothing, and nothing but
    the texts is printed, with control characters escaped."""
    lines = [b"The sea", b"", b"word " * 200, b"caf\xe9", b"The sea", b"\x1b[2JA man"]
    words = ["generate.py", "--checkpoint", "run/checkpoints/latest", "--seed", "7"]
    result = subprocess.run(
        [sys.executable, str(ROOT / words[0]), *words[1:], "--interactive"], cwd=run, timeout=120,
        env=environment(), input=b"\n".join(lines), capture_output=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr.decode().count("error: ") == 1
    assert "the model holds 64" in result.stderr.decode()
    found = pretrained.find(str(run / "run/checkpoints/latest"))
    cpu = torch.device("cpu")
    model = pretrained.load(found, cpu, hardware.choose_dtype("auto", cpu))
    expected = ""
    for number in (0, 3, 4, 5):
        line = lines[number].decode("utf-8", "replace")
        settings = GenerationConfig(max_length=64, prompts=(line,), num_samples=1)
        seed = derive_seed(7, number, "line")
        sample = generation.generate(model, *pretrained.load_tokenizer(found), settings, seed)[0]
        expected += printable(sample.text, keep="\n\t") + "\n\n"
    assert result.stdout.decode() == expected
