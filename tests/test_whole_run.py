"""The pipeline as a user runs it: ./train.sh, what it leaves, and what other tools make of it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import held_out as held_out_of
from data_helpers import prepare
from helpers import (
    LLAMA,
    ROOT,
    SHARED,
    call,
    events,
    made_once,
    step_directory,
    train,
    train_sh,
    write_tiny,
)

from smollm.checkpoint import store
from smollm.config_reader import load

WORDS = ("training.eval_steps=4", "training.sample_steps=6")


def run_train_sh(directory: Path, *words: str, **extra: str):
    """Run ./train.sh with the tiny configuration."""
    return call(directory, train_sh(directory, *WORDS, *words), NO_INSTALL="1", **extra)


PARAMETERS = {"starcoder2": 99_840, "llama": 139_584}


@pytest.fixture(scope="module", params=["starcoder2", "llama"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which ./train.sh has run both phases: in bf16 where the CPU has it, and a
    Llama in fp32."""

    def make(directory: Path) -> None:
        write_tiny(directory)
        words = ("training.precision=fp32", *LLAMA) if request.param == "llama" else ()
        result = run_train_sh(directory, *words)
        assert result.returncode == 0, result.stdout
        (directory / "output").write_text(result.stdout)
        (directory / "family").write_text(request.param)

    return made_once(tmp_path_factory, f"pipeline-{request.param}", make)


def test_the_pipeline_leaves_what_it_promises(run: Path) -> None:
    """Metrics of each step once, logs of both phases, plots, samples, whole checkpoints."""
    train_events = events(run, "train")
    assert [event["step"] for event in train_events] == list(range(1, 17))
    keys = {
        "event", "step", "loss", "perplexity", "learning_rate", "grad_norm", "tokens", "epoch",
        "tokens_per_second", "mfu", "peak_memory_gib", "elapsed_seconds",
    }  # fmt: skip
    assert all(keys == set(event) for event in train_events)
    for event in train_events:
        assert event["perplexity"] == pytest.approx(math.exp(event["loss"]))
        assert event["tokens"] == event["step"] * 256
    elapsed = [event["elapsed_seconds"] for event in train_events]
    assert elapsed == sorted(elapsed)
    assert [event["step"] for event in events(run, "eval")] == [0, 4, 8, 12, 16]
    assert {event["step"] for event in events(run, "sample")} == {6, 12, 16}
    saved = [event["step"] for event in events(run, "checkpoint")]
    assert saved == [2, 4, 6, 8, 10, 12, 14, 16]
    for kind, wanted in (
        ("eval", {"val_loss", "val_perplexity", "val_bits_per_byte", "val_tokens", "seconds"}),
        ("sample", {"prompt", "text", "generated_tokens", "perplexity", "seconds"}),
        ("checkpoint", {"path", "bytes", "stall_seconds"}),
    ):
        assert all(wanted | {"event", "step"} == set(event) for event in events(run, kind))
    for name in ("phase1.log", "phase2.log", "samples.txt"):
        assert (run / "run/logs" / name).stat().st_size > 0
    for name in ("loss", "learning_rate", "gradient_flow", "sample_lengths"):
        picture = (run / "run/logs/plots" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    for step in (12, 16):
        assert store.problem(step_directory(run, step)) is None
    assert (run / "run/checkpoints/latest").resolve().name == "step_000016"
    output = (run / "output").read_text()
    parameters = f"{PARAMETERS[(run / 'family').read_text()]:,}"
    for word in (parameters, "phase 1 is complete", "phase 2 complete", "tokens per step", "done:"):
        assert word in output


def test_run_again_does_nothing(run: Path) -> None:
    """./train.sh after it finished: says so, exit 0, no byte changed."""
    words = LLAMA if (run / "family").read_text() == "llama" else ()
    before = {path: path.stat().st_mtime_ns for path in (run / "run").rglob("*") if path.is_file()}
    result = run_train_sh(run, *words)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("complete") >= 2
    after = {path: path.stat().st_mtime_ns for path in (run / "run").rglob("*") if path.is_file()}
    assert {p.name for p in after if after[p] != before.get(p)} <= {".lock"}


def test_transformers_opens_the_checkpoint(run: Path) -> None:
    """As its own class; it computes the logged held-out loss: within 1e-4 in fp32, 0.01 in bf16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = step_directory(run, 16)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    family = (run / "family").read_text()
    assert type(model).__name__ == {
        "starcoder2": "Starcoder2ForCausalLM", "llama": "LlamaForCausalLM",
    }[family]  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[family]
    config = load(run / "tiny.yaml", [f"data.cache_dir={run / 'cache'}"])
    held_out = held_out_of(prepare(config, run / "text.txt")).astype(np.int64)
    # The tokenizer makes the held-out tokens from their own text again.
    text = tokenizer.decode(held_out.tolist())
    assert tokenizer(text)["input_ids"] == held_out.tolist()
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(held_out) - 1, 64):
            window = torch.from_numpy(held_out[start : start + 65])
            logits = model(window[None, :-1]).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            count += len(window) - 1
    logged = events(run, "eval")[-1]
    assert count == logged["val_tokens"] == len(held_out) - 1
    bf16 = "bfloat16 compute" in (run / "output").read_text()
    tolerance = 0.01 if bf16 else 1e-4
    assert total / count == pytest.approx(logged["val_loss"], abs=tolerance)
    generated = model.generate(**tokenizer("Once upon", return_tensors="pt"), max_new_tokens=5)
    assert generated.shape[1] > 2


def test_model_card_and_state(run: Path) -> None:
    """trainer_state.json has what a resume and a person need."""
    state = json.loads((step_directory(run, 16) / "trainer_state.json").read_text())
    assert state["step"] == 16 and state["tokens"] == 4096 and state["phase"] == 2
    assert state["config"]["training"]["train_steps"] == 12
    assert set(state["versions"]) >= {"torch", "cuda", "python"}
    assert set(state["data"]) >= {"text_sha256", "tokenizer_sha256"}
    assert (
        f"{PARAMETERS[(run / 'family').read_text()]:,}"
        in (step_directory(run, 16) / "README.md").read_text()
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of test texts is not here")
@pytest.mark.long
def test_the_full_model_takes_two_steps(tmp_path: Path) -> None:
    """The 123,654,144-parameter model, two steps on the CPU, saved whole."""
    write_tiny(tmp_path)
    (tmp_path / "tiny.yaml").write_text((ROOT / "config.yaml").read_text())
    (tmp_path / "text.txt").write_bytes((ROOT / "input.txt").read_bytes())
    result = train(
        tmp_path, "--train_steps", "2", f"tokenizer.source={SHARED / 'gpt2-tokenizer.json'}",
        "data.sequence_length=256", "training.batch_size=2", "wandb.mode=disabled",
        "training.gradient_accumulation_steps=2", f"data.cache_dir={tmp_path / 'cache'}",
        "generation.max_length=20", "data.validation_fraction=0.01", "data.validation_tokens=512",
        timeout=400,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert "123,654,144" in result.stdout and "262,928 tokens" in result.stdout
    first = events(tmp_path, "eval")[0]["val_loss"]
    assert first == pytest.approx(math.log(50258), abs=0.3)
    assert store.problem(step_directory(tmp_path, 2)) is None


@pytest.mark.parametrize(
    ("words", "code", "hint"),
    [
        (["--nonsense", "1"], 2, "--nonsense"),
        (["training.learning_rat=1"], 2, "did you mean training.learning_rate"),
        (["training.batch_size=0", "model.dropout=2", "wandb.mode=maybe"], 2, "3 problems"),
        (["--train_steps", "0"], 2, "from 1 to 999999"),
        (["--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["--input_file", "nowhere.txt"], 3, "nowhere.txt"),
        (["--save_dir", "text.txt"], 3, "text.txt"),
        (["--save_dir", "text.txt/deeper"], 3, "text.txt"),
        (["--log_dir", "text.txt"], 3, "text.txt"),
        (["data.cache_dir=text.txt"], 3, "cache_dir"),
        (["tokenizer.source=nowhere.json"], 3, "nowhere.json"),
        (["tokenizer.source=text.txt"], 3, "not a tokenizer.json"),
        (["data.sequence_length=64", "--input_file", "short.txt"], 3, "65"),
        (["--resume", "nowhere"], 3, "nowhere"),
        (["training.device=cuda"], 2, "no CUDA GPU"),
        (["model.attention=flash_attn"], 2, "use auto"),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path, words: list[str], code: int, hint: str
) -> None:
    """The right exit code, what and where, no traceback, nothing left behind."""
    if torch.cuda.is_available() and code == 2 and "cuda" in words[0] + words[-1]:
        pytest.skip("there is a GPU")
    write_tiny(tmp_path)
    (tmp_path / "short.txt").write_text("too short")
    result = train(tmp_path, *words)
    assert result.returncode == code, result.stdout
    assert hint in result.stdout
    assert "Traceback" not in result.stdout
    assert not list((tmp_path / "run").rglob("step_*"))


def test_odd_paths_work(tmp_path: Path) -> None:
    """L3: the whole pipeline below directories with odd names."""
    directory = tmp_path.joinpath("with space", "ünïcödé", "quote'", "-dash", "semi;colon", "$HOME")
    write_tiny(directory)
    result = run_train_sh(directory, "training.train_steps=2", "training.continue_steps=1")
    assert result.returncode == 0, result.stdout
    assert store.problem(step_directory(directory, 3)) is None


def test_train_sh_answers_for_itself(tmp_path: Path) -> None:
    """--help, unknown flags, Python's exit codes."""
    script = str(ROOT / "train.sh")
    shown = call(tmp_path, [script, "--help"])
    assert shown.returncode == 0 and "DEBUG=1" in shown.stdout
    assert call(tmp_path, [script, "--nonsense"]).returncode == 2
    assert call(tmp_path, [script, "training.x=1"], NO_INSTALL="1").returncode == 2
    write_tiny(tmp_path)
    gone = call(tmp_path, [script, "--config", "tiny.yaml", "--input_file", "no"], NO_INSTALL="1")
    assert gone.returncode == 3
    assert "Traceback" not in gone.stdout


@pytest.mark.long
def test_train_sh_through_a_link_with_paths_of_the_caller(tmp_path: Path) -> None:
    """Every path is relative to where the command was typed, folders and globs too; both forms of
    a flag are known. A URL stays one, and without --input_file data.input_files serves."""
    write_tiny(tmp_path)
    (tmp_path / "my texts").mkdir()
    shutil.copy(ROOT / "README.md", tmp_path / "my texts/a.md")
    (tmp_path / "go").symlink_to(ROOT / "train.sh")
    assert "DEBUG=1" in call(tmp_path, ["./go", "--help"]).stdout
    words = ["./go", "--config=tiny.yaml", "--save_dir=run/checkpoints", "--log_dir=run/logs"]
    words += ["data.cache_dir=mine", "training.train_steps=2"]
    refused = call(tmp_path, [*words, "--input_file", "s3://bucket/a.txt"], NO_INSTALL="1")
    assert (
        refused.returncode == 3
        and "s3://bucket/a.txt: s3:// needs the package s3fs" in refused.stdout
    )
    # There is a directory `docs` in the project, and none here: owner/name of the Hub.
    named = [*words, "--init_from", "docs/model"]
    unknown = call(tmp_path, named, NO_INSTALL="1", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert unknown.returncode == 3 and "docs/model: is no path here" in unknown.stdout
    words += ["--input_file", "my texts", "--input_file=my*/../te*.txt"]
    first = call(tmp_path, words, NO_INSTALL="1")
    assert first.returncode == 0, first.stdout
    assert f"  0            {tmp_path}/my texts: " in first.stdout
    assert f"  1            {tmp_path}/my*/../te*.txt: " in first.stdout
    assert list((tmp_path / "mine").glob("tokens-*")) and step_directory(tmp_path, 6).is_dir()
    shutil.copy(step_directory(tmp_path, 6) / "tokenizer.json", tmp_path / "my.json")
    again = [word.replace("run/", "second/") for word in words[:6]]
    again += ["tokenizer.source=my.json", f"data.input_files=[{tmp_path}/text.txt]"]
    second = call(tmp_path, again, NO_INSTALL="1")
    assert second.returncode == 0, second.stdout
    assert step_directory(tmp_path, 6, "second").is_dir()
