"""evaluate.py: the loss, perplexity and bits per byte of a model on a text."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import GPT2, needs_shared
from helpers import ROOT, call, events, made_once, train, write_tiny
from pretrained_helpers import loss_of, write_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from smollm import harness
from smollm.errors import ConfigError, InputError

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


# --- benchmarks ----------------------------------------------------------------------------------

QUESTIONS = [
    {"text": f"Line {n}", "choices": [f"of caf\u00e9 {n}", "the sea was", "man"], "right": n % 3}
    for n in range(24)
]  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tasks on local JSON: two, a group of them, one of texts that do not fit, one
    without its data."""
    pytest.importorskip("lm_eval", reason="requirements-eval.txt is not installed")

    def make(directory: Path) -> None:
        directory.mkdir()
        long = [{**QUESTIONS[0], "text": "Line " * 200}] * 2
        several = {"first": QUESTIONS[:12], "second": QUESTIONS[12:], "long": long, "gone": []}
        for name, rows in several.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            if rows:
                (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")
            task = {
                "task": f"lines_{name}", "dataset_path": "json", "test_split": "test",
                "dataset_kwargs": {"data_files": {"test": str(directory / f"{name}.jsonl")}},
                "output_type": "multiple_choice", "doc_to_text": "{{text}}",
                "doc_to_choice": "{{choices}}", "doc_to_target": "{{right}}",
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
                "metadata": {"version": 1.0},
            }  # fmt: skip
            (directory / f"{name}.yaml").write_text(json.dumps(task))
        group = {
            "group": "lines", "task": ["lines_first", "lines_second"],
            "aggregate_metric_list": [{"metric": "acc"}],
        }  # fmt: skip
        (directory / "lines.yaml").write_text(json.dumps(group))

    return made_once(tmp_path_factory, "tasks", make)


def scores(directory: Path, rows: list[dict]) -> tuple[float, float]:
    """The shares of right answers, by likelihood and by that per character, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    hits = np.zeros(2)
    for row in rows:
        context, found = tokenizer.encode(row["text"]).ids, []
        for choice in row["choices"]:
            ids = tokenizer.encode(f"{row['text']} {choice}").ids
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            places = range(len(context), len(ids))
            found.append(sum(float(logits[place - 1, ids[place]]) for place in places))
        lengths = [len(choice) for choice in row["choices"]]
        for kind, values in enumerate((found, np.array(found) / lengths)):
            hits[kind] += int(np.argmax(values)) == row["right"]
    return tuple(hits / len(rows))


@pytest.mark.long
def test_tasks_of_the_harness(run: Path, tasks: Path) -> None:
    """A group of two tasks: the scores are what transformers' likelihoods say; table and JSON."""
    words = ["--checkpoint", "run/checkpoints/latest", "--include_path", str(tasks)]
    words += ["training.precision=fp32", "--tasks"]
    expected = {
        "lines_first": scores(run / "run/checkpoints/latest", QUESTIONS[:12]),
        "lines_second": scores(run / "run/checkpoints/latest", QUESTIONS[12:]),
    }
    found = result_of(run, *words, "lines", "--input_file", "held.txt")
    assert found["tokens"] > 0 and found["loss"] > 0, "the text that was named as well"
    results = found["tasks"]["results"]
    for name, (accuracy, by_length) in expected.items():
        assert results[name]["acc,none"] == pytest.approx(accuracy)
        assert results[name]["acc_norm,none"] == pytest.approx(by_length)
        assert found["tasks"]["n-samples"][name]["effective"] == 12
    both = sum(accuracy for accuracy, _ in expected.values()) / 2
    assert found["tasks"]["groups"]["lines"]["acc,none"] == pytest.approx(both)
    shown = evaluate(run, *words, "lines_s*,lines_second,lines_first").stdout
    assert "model          run/checkpoints/latest (llama)\n" in shown and "perplexity" not in shown
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()]
    values = {(row[0], row[4]): row[6] for row in rows if len(row) == 9}
    for name, (accuracy, _) in expected.items():
        assert float(values[name, "acc"]) == pytest.approx(accuracy, abs=1e-4)


def test_tasks_that_cannot_be_run(run: Path, tasks: Path) -> None:
    """Unknown names together, with those that are near; a data set that is not there."""
    words = ["--checkpoint", "run/checkpoints/latest", "--include_path", str(tasks), "--tasks"]
    unknown = evaluate(run, *words, "lines_frist,helaswag")
    assert unknown.returncode == 2
    for name, near in (("lines_frist", "lines_first"), ("helaswag", "hellaswag")):
        line = f"--tasks {name}: there is no such task; did you mean {near}"
        assert line in unknown.stdout
    assert "Traceback" not in unknown.stdout


def test_a_report_of_the_harness(
    run: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A name and a group that has it are one; the dtype is the one that was asked for; groups have
    a table; a text that does not fit is said once; what cannot be loaded is named."""
    import lm_eval.tasks

    own = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)  # thousands of files take seconds
    loaded = harness.load(["lines_*st", "lines", "lines_long"], tasks)
    assert len(loaded.chosen) == 2
    model, cpu = run / "run/checkpoints/latest", torch.device("cpu")
    report = harness.run(model, loaded, cpu, torch.float32)
    assert report["config"]["model_dtype"] == torch.float32
    tables = harness.table(report)
    assert sum(line.startswith("|lines ") for line in tables) == 2, "with that of the groups"
    assert capfd.readouterr().err.count("exceeds model's maximum length") == 1
    with pytest.raises(InputError, match="lines_gone: cannot be loaded .FileNotFoundError: "):
        harness.load(["lines_gone"], tasks)
    (tmp_path / "bad.yaml").write_text("task: bad\n  metric: [\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml: mapping values .* line 2"):
        harness.load(["bad"], tmp_path)
    with pytest.raises(ConfigError, match="no such task; --include_path takes its directory"):
        harness.load(["first.yaml"], tasks)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--tasks", "a,,b"], "argument --tasks: got 'a,,b', expected names with commas between"),
        (["--include_path", "."], "--include_path goes with --tasks"),
        (["--tasks", "a", "--include_path", "held.txt"], "held.txt: is not a directory; give the"),
        (["--task", "a"], "unknown flag --task; did you mean --tasks?"),
        (["--tasks", "a", "b"], "b: only training.device, training.precision can be set here; the"),
        (["--tasks", "a", "data.text_key=x"], "data.text_key=x: only training.device, training.pr"),
    ],
)
def test_errors_of_tasks(run: Path, tasks: Path, words: list[str], line: str) -> None:
    """One line, before the harness is imported."""
    result = evaluate(run, "--checkpoint", "run/checkpoints/latest", *words)
    assert result.returncode == 2 and line in result.stdout, result.stdout
    assert result.stdout.count("\n") == 1


def test_the_harness_is_not_installed(run: Path, tmp_path: Path) -> None:
    """The line says what installs it; figures that are not finite are null in JSON."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['lm_eval'] = None\n")
    words = ["--checkpoint", "run/checkpoints/latest", "--tasks", "hellaswag"]
    result = evaluate(run, *words, PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    assert "--tasks: needs lm_eval; pip install -r requirements-eval.txt" in result.stdout
    report = {"results": {"a": {"acc": np.float64(0.5), "acc_stderr": math.nan}}, "config": {}}
    assert harness.as_json(report) == {"results": {"a": {"acc": 0.5, "acc_stderr": None}}}
