"""evaluate.py: the loss, perplexity and bits per byte of a model on a text."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_helpers import GPT2, needs_shared
from helpers import ROOT, call, events, made_once, train, write_tiny
from pretrained_helpers import loss_of, write_model
from tokenizers import Tokenizer

SEPARATOR = "<|endoftext|>"
HELD_OUT = "".join(f"Line {n} of caf\u00e9 {n % 7} \U0001f600.\n" for n in range(60))
LLAMA = (
    "model.architecture=llama", "model.num_key_value_heads=1", "training.precision=fp32",
    "training.eval_steps=3",
)  # fmt: skip


def evaluate(directory: Path, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run evaluate.py in a directory."""
    return call(directory, [sys.executable, str(ROOT / "evaluate.py"), *words], **extra)


def result_of(directory: Path, *words: str) -> dict:
    """What `evaluate.py --json` prints."""
    result = evaluate(directory, *words, "--json")
    assert result.returncode == 0, result.stdout
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run of a Llama on two texts, and a held-out text, `held.txt`."""

    def make(directory: Path) -> None:
        write_tiny(directory)
        (directory / "held.txt").write_text(f"{HELD_OUT}{SEPARATOR}\n{HELD_OUT[:300]}", "utf-8")
        (directory / "other.jsonl").write_text(json.dumps({"body": HELD_OUT * 9}) + "\n", "utf-8")
        words = ["--input_file", "text.txt", "--input_file", "other.jsonl", "data.text_key=body"]
        result = train(directory, *LLAMA, *words, "--train_steps", "6")
        assert result.returncode == 0, result.stdout

    return made_once(tmp_path_factory, "evaluated", make)


def test_it_is_what_the_run_said(run: Path) -> None:
    """Without a text: the held-out one of the checkpoint, to the last bit, and each source."""
    logged = events(run, "eval")[-1]
    found = result_of(run, "--checkpoint", "run/checkpoints/latest")
    for ours, theirs in (
        ("loss", "val_loss"), ("perplexity", "val_perplexity"), ("tokens", "val_tokens"),
        ("bits_per_byte", "val_bits_per_byte"),
    ):  # fmt: skip
        assert found[ours] == logged[theirs], ours
    assert [part["loss"] for part in found["each"]] == [logged["val_loss/0"], logged["val_loss/1"]]
    assert [part["name"] for part in found["each"]] == [
        "held out of text.txt", "held out of other.jsonl",
    ]  # fmt: skip
    bits = found["loss"] * found["tokens"] / (math.log(2) * found["bytes"])
    assert found["bits_per_byte"] == pytest.approx(bits)
    shown = evaluate(run, "--checkpoint", "run/checkpoints/latest")
    assert f"loss           {found['loss']:.4f} nats per token" in shown.stdout
    assert f"bits per byte  {found['bits_per_byte']:.4f}" in shown.stdout
    assert "  1            held out of other.jsonl: loss" in shown.stdout


def test_a_run_shows_bits_per_byte(run: Path) -> None:
    """In the events and on the console, and in the plot's right axis."""
    first, *_, last = events(run, "eval")
    ratios = [event["val_bits_per_byte"] / event["val_loss"] for event in (first, last)]
    assert ratios[0] == pytest.approx(ratios[1])
    log = (run / "run/logs/phase1.log").read_text("utf-8")
    assert f"val_bits_per_byte {last['val_bits_per_byte']:.4f}" in log


@pytest.mark.parametrize("kind", ["learned", pytest.param("gpt2", marks=needs_shared)])
def test_bits_per_byte_of_two_tokenizers(run: Path, tmp_path: Path, kind: str) -> None:
    """The same held-out file: the nats of transformers' loss on the library's own tokens, over the
    bytes of the documents without the line that divides them."""
    model = run / "run/checkpoints/latest"
    if kind == "gpt2":
        model = write_model(tmp_path / "gpt2", vocab_size=50257)
        shutil.copy(GPT2, model / "tokenizer.json")
    tokenizer, tokens = Tokenizer.from_file(str(model / "tokenizer.json")), []
    documents = (run / "held.txt").read_text("utf-8").split(f"{SEPARATOR}\n")
    for document in documents:
        tokens += [*tokenizer.encode(document).ids, tokenizer.token_to_id(SEPARATOR)]
    tokens = np.array(tokens[:-1])  # nothing ends the last document
    nats = loss_of(model, tokens) * (len(tokens) - 1)
    size = sum(len(document.encode()) for document in documents)
    words = ["--checkpoint", str(model), "--input_file", "held.txt", "training.precision=fp32"]
    found = result_of(run, *words)
    assert (found["tokens"], found["bytes"]) == (len(tokens) - 1, size)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, abs=1e-4)
    assert found["loss"] == pytest.approx(nats / (len(tokens) - 1), abs=1e-4)
    assert found["text_tokens"] == len(tokens)
    limited = result_of(run, *words, "data.validation_tokens=65")
    assert (limited["tokens"], limited["text_tokens"]) == (64, len(tokens))
    assert limited["tokens"] == 64 and limited["bytes"] == len(
        tokenizer.decode(tokens[:65].tolist()).rstrip("\ufffd").encode()
    )


def test_a_part_of_a_text_is_said_to_be_one(run: Path) -> None:
    """All of a named text is evaluated; data.validation_tokens takes the first tokens of it."""
    words = ["--checkpoint", "run/checkpoints/latest", "--input_file", "held.txt"]
    assert "the first" not in evaluate(run, *words).stdout
    shown = evaluate(run, *words, "data.validation_tokens=30").stdout
    assert re.search(r"^ +the first 30 of [\d,]+ tokens \(data.validation_tokens\)$", shown, re.M)


def test_variables_of_torchrun_are_refused(run: Path) -> None:
    """Each process would evaluate a share of the text: no number is better than a wrong one."""
    several = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    result = evaluate(run, "--checkpoint", "run/checkpoints/latest", MASTER_PORT="29999", **several)
    assert result.returncode == 2 and "start it without torchrun" in result.stdout


def test_a_text_that_is_not_the_checkpoints_is_refused(run: Path, tmp_path: Path) -> None:
    """Changed, or not here: named, with the way out; a model of another tool has none."""
    copy = Path(shutil.copytree(run, tmp_path / "copy", symlinks=True))
    with open(copy / "text.txt", "a") as file:
        file.write("more")
    words = ("--checkpoint", "run/checkpoints/latest")
    changed = evaluate(copy, *words)
    assert changed.returncode == 3 and "is not what run/checkpoints/latest" in changed.stdout
    assert "give --input_file to evaluate on this one" in changed.stdout
    (copy / "text.txt").unlink()
    gone = evaluate(copy, *words)
    assert gone.returncode == 3 and "type the command where the run was started" in gone.stdout
    write_model(copy / "foreign")
    foreign = evaluate(copy, "--checkpoint", "foreign")
    assert foreign.returncode == 2 and "does not say what text it was" in foreign.stdout
    for result in (changed, gone, foreign):
        assert "Traceback" not in result.stdout and result.stdout.count("\n") == 1, result.stdout


@pytest.mark.parametrize(
    ("words", "code", "hint"),
    [
        (["--nonsense"], 2, "unknown flag --nonsense"),
        (["data.text_kye=a"], 2, "did you mean data.text_key?"),
        (["model.rope_theta=5"], 2, "only data.*, training.device, training.precision can"),
        (["tokenizer.source=gpt2"], 2, "only data.*, training.device"),
        (["--input_file", "nowhere.txt"], 3, "nowhere.txt"),
        (["--input_file", "other.jsonl", "data.text_key=text"], 3, "has no key 'text'"),
        (["--checkpoint", "nowhere"], 3, "nowhere: there is no such checkpoint"),
        (["--checkpoint", "run/checkpoints"], 3, "name one of them, such as"),
    ],
)
def test_bad_input_is_one_clear_line(run: Path, words: list[str], code: int, hint: str) -> None:
    """The right exit code, what and where, no traceback."""
    result = evaluate(run, "--checkpoint", "run/checkpoints/latest", *words)
    assert result.returncode == code, result.stdout
    assert hint in result.stdout and "Traceback" not in result.stdout, result.stdout
