"""What training refuses at its start: nothing on the disk is changed by it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import (
    ROOT,
    call,
    command,
    digest,
    environment,
    events,
    finished_run,
    limit,
    losses,
    reseal,
    step_directory,
    train,
    write_tiny,
)

from smollm import atomic


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a finished phase 1, checkpoints at each second step."""
    return finished_run(tmp_path_factory, "checkpoint.keep_last=9")


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "copy", symlinks=True))


def snapshot(directory: Path) -> dict[str, str]:
    """Every file below a directory, locks apart, with its sha256."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path): atomic.sha256(path) for path in found if path.name != ".lock"}


def assert_refused(directory: Path, code: int, named: str, *words: str, **kinds: str) -> None:
    """The command ends with `code` and one clear error, and changes no file."""
    before = snapshot(directory)
    result = train(directory, *words, **kinds)
    assert result.returncode == code, result.stdout
    assert named in result.stdout and "Traceback" not in result.stdout, result.stdout
    assert "should not happen" not in result.stdout
    assert snapshot(directory) == before


def test_a_continuation_from_below_the_end_is_refused(copy: Path) -> None:
    """Phase 1's later checkpoints are not the continuation's own, and are not overwritten."""
    for steps in ("3", "4", "9"):
        words = ("--start_step", "4", "--train_steps", steps)
        assert_refused(copy, 2, "phase 1 went on", *words, script="continue_training.py")


def test_a_save_dir_inside_a_checkpoint_is_refused(copy: Path) -> None:
    """It would be removed with it; `latest` is the likely slip."""
    for inside in ("latest", "step_000012/new"):
        words = ("--save_dir", f"run/checkpoints/{inside}", "--log_dir", "other")
        assert_refused(copy, 3, "did you mean", *words)
        assert_refused(copy, 3, "did you mean", *words, "--dry_run")


def test_a_renamed_checkpoint_is_named(copy: Path) -> None:
    """Its step is not what its name says: going on from it would never end."""
    step_directory(copy, 12).rename(step_directory(copy, 90))
    assert_refused(copy, 3, "rename it to step_000012", "--resume", "auto", "--train_steps", "99")


def test_another_runs_checkpoints_are_not_pruned(copy: Path) -> None:
    """--resume of one run into the save_dir of another."""
    other = train(copy, "--train_steps", "4", run="other")
    assert other.returncode == 0, other.stdout
    words = ("--resume", "run/checkpoints/step_000008", "--save_dir", "other/checkpoints")
    assert_refused(copy, 2, "is of another run", *words, "--log_dir", "third")


@pytest.mark.parametrize(
    "word",
    [
        "model.num_attention_heads=4",
        "model.rope_theta=500",
        "model.layer_norm_epsilon=0.1",
        "model.num_key_value_heads=1",
        "model.tie_word_embeddings=false",
        "model.architecture=llama",
    ],
)
def test_another_function_of_the_same_shapes_is_refused(copy: Path, word: str) -> None:
    """Heads and rotary base do not show in the weights' shapes."""
    result = train(copy, "--resume", "auto", "--train_steps", "14", word)
    assert result.returncode == 3 and word.partition("=")[0] in result.stdout, result.stdout
    assert not step_directory(copy, 14).exists()


def test_a_save_dir_given_as_the_checkpoint(copy: Path) -> None:
    """Not "damaged": the likely slip is named, with the way out."""
    words = ("--resume", "run/checkpoints", "--save_dir", "new", "--log_dir", "new/logs")
    assert_refused(copy, 3, "name one of them, such as run/checkpoints/step_000012", *words)


def test_files_of_others_are_not_swept(copy: Path) -> None:
    """Temporary names of other programs stay, in save_dir and in the cache; ours go."""
    kept, ours = [], []
    for parent in (copy / "run/checkpoints", copy / "cache"):
        kept += [parent / ".tmp-photos/one.jpg", parent / ".tmp-notes", parent / ".tmp-step_1-2"]
        ours += [parent / ".tmp-step_000002-99", parent / ".tmp-tokens-0a1b-99"]
    for path in kept + ours:
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    result = train(copy, "--resume", "auto", "--train_steps", "14")
    assert result.returncode == 0, result.stdout
    assert all(path.exists() for path in kept) and not any(path.exists() for path in ours)
    assert "after an interruption: .tmp-step_000002-99 removed" in result.stdout  # the cache's
    assert "after an interrupted save: .tmp-step_000002-99 removed" in result.stdout


def test_a_branch_keeps_the_lines_that_it_takes_anew(copy: Path) -> None:
    """--resume of an earlier step into a new save_dir, same log_dir: another run; nothing is
    lost."""
    before = (copy / "run/logs/metrics.jsonl").read_bytes()
    words = ("--resume", "run/checkpoints/step_000008", "--save_dir", "branch")
    result = train(copy, *words)
    assert result.returncode == 0, result.stdout
    assert "metrics.jsonl.1 keeps the metrics of the run" in result.stdout
    assert (copy / "run/logs/metrics.jsonl.1").read_bytes() == before
    assert sorted(losses(copy)) == list(range(9, 13))
    ours, theirs = (
        atomic.read_json(copy / path / "trainer_state.json")
        for path in ("branch/step_000012", "run/checkpoints/step_000012")
    )
    assert ours["wandb_run_id"] != theirs["wandb_run_id"]
    assert ours["parent"] == f"{theirs['wandb_run_id']}, run/checkpoints/step_000008"
    shutil.move(copy / "branch", copy / "moved")
    again = train(copy, "--resume", "auto", "--save_dir", "moved", "--train_steps", "14")
    assert again.returncode == 0, again.stdout
    moved = atomic.read_json(copy / "moved/step_000014/trainer_state.json")
    assert (moved["wandb_run_id"], moved["parent"]) == (ours["wandb_run_id"], ours["parent"])


def test_one_log_dir_for_two_runs(copy: Path) -> None:
    """One after the other: the first one's file is set aside. At once: the second exits 5."""
    before = (copy / "run/logs/metrics.jsonl").read_bytes()
    words = ("--save_dir", "second", "--log_dir", "run/logs", "--train_steps", "4")
    assert train(copy, *words).returncode == 0
    assert (copy / "run/logs/metrics.jsonl.1").read_bytes() == before
    back = train(copy, "--resume", "auto", "--train_steps", "14")
    assert back.returncode == 0, back.stdout
    assert [event["step"] for event in events(copy, "train")] == [13, 14]
    assert len((copy / "run/logs/metrics.jsonl.2").read_text().splitlines()) > 4

    long = command("train.py", "--resume", "auto", "--train_steps", "9999")
    with subprocess.Popen(
        long, cwd=copy, env=environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        for line in process.stdout:
            if "step   15/9999" in line:
                break
        refused = train(copy, "--save_dir", "third")
        process.kill()
    assert refused.returncode == 5, refused.stdout
    assert f"run/logs: is in use by another run (pid {process.pid}" in refused.stdout


def test_one_directory_for_checkpoints_and_logs(tmp_path: Path) -> None:
    """The run does not lock itself out, and goes on in it."""
    write_tiny(tmp_path)
    for words in (("--train_steps", "4"), ("--resume", "auto")):
        result = train(tmp_path, "--save_dir", "all", "--log_dir", "./all", *words)
        assert result.returncode == 0, result.stdout
    assert (tmp_path / "all/step_000012").is_dir() and (tmp_path / "all/metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["logs/metrics.jsonl", "checkpoints/wandb_run_id"])
def test_a_directory_in_the_place_of_a_file(copy: Path, name: str) -> None:
    """The disk's state, not a bug: exit 3, the path is named."""
    (copy / "run" / name).unlink()
    (copy / "run" / name).mkdir()
    (copy / "run" / name / "x").touch()
    result = train(copy, "--resume", "auto", "--train_steps", "14")
    assert result.returncode == 3, result.stdout
    assert name in result.stdout and "should not happen" not in result.stdout


def test_a_prompt_that_leaves_no_room_is_refused_at_the_start(tmp_path: Path) -> None:
    """Not at the first sample, hours later: exit 2, also by the dry run."""
    write_tiny(tmp_path)
    for words in ((), ("--dry_run",)):
        result = train(tmp_path, "generation.max_length=4", *words)
        assert result.returncode == 2, result.stdout
        assert "the prompt 'Once upon a time' has 9 tokens" in result.stdout
        assert "step 0/" not in result.stdout


@pytest.mark.parametrize("visit", [2, 3])
def test_an_interrupted_evaluation_is_made_up_for(tmp_path: Path, visit: int) -> None:
    """SIGTERM in the evaluation of step 6 or 12: the same command evaluates, samples and ends."""
    settings = ("training.eval_steps=6", "training.sample_steps=6")
    quiet, stopped = tmp_path / "quiet", tmp_path / "stopped"
    write_tiny(quiet)
    assert train(quiet, *settings).returncode == 0
    write_tiny(stopped)
    first = train(stopped, *settings, FAULT=f"evaluate:term:{visit}")
    assert first.returncode == 143, first.stdout
    assert "phase 1 complete" not in first.stdout
    again = train(stopped, "--resume", "auto", *settings)
    assert again.returncode == 0 and "phase 1 complete" in again.stdout, again.stdout
    assert digest(stopped) == digest(quiet)
    for kind, value in (("eval", "val_loss"), ("sample", "text")):
        ours = [(event["step"], event[value]) for event in events(stopped, kind)]
        assert ours == [(event["step"], event[value]) for event in events(quiet, kind)]
    state = atomic.read_json(step_directory(stopped, 12) / "trainer_state.json")
    assert state["val_loss"] is not None and state["phase_end"] and state["phase"] == 1
    for directory in (quiet, stopped):  # the last samples are on the page too
        assert "--- step 12" in (directory / "run/logs/samples.txt").read_text("utf-8")


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
@pytest.mark.parametrize("which", ["checkpoints", "logs"])
def test_a_directory_that_is_replaced_under_a_run(tmp_path: Path, how: str, which: str) -> None:
    """`rm -rf` or `mv`, perhaps a second run there: the first one stops, and overwrites nothing."""
    write_tiny(tmp_path)
    words = command("train.py", "--train_steps", "99999", "training.save_steps=20")
    with subprocess.Popen(
        words, cwd=tmp_path, env=environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        for line in process.stdout:
            if "saved run/checkpoints/step_000020" in line:
                break
        place = tmp_path / "run" / which
        shutil.move(place, tmp_path / "aside")
        if how == "removed":
            shutil.rmtree(tmp_path / "aside")
        if how == "replaced":
            (place / "step_000040").mkdir(parents=True)
            (place / ".lock").touch()
            (place / "mine").write_text("mine")
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 5, output
    assert f"run/{which}: was removed, moved or replaced" in output and "Traceback" not in output
    if how == "replaced":
        assert sorted(p.name for p in place.iterdir()) == [".lock", "mine", "step_000040"]
        assert list((place / "step_000040").iterdir()) == []


def test_one_directory_for_everything(tmp_path: Path) -> None:
    """The cache in the save_dir or the log_dir: the run does not wait for itself."""
    write_tiny(tmp_path)
    words = ("--save_dir", "all", "--log_dir", "all", "data.cache_dir=all", "--train_steps", "4")
    for more in ((), ("--resume", "auto", "--train_steps", "6")):
        result = train(tmp_path, *words, *more)
        assert result.returncode == 0 and "waiting" not in result.stdout, result.stdout
    (tmp_path / "again").symlink_to("all")
    words = ("--save_dir", "all", "--log_dir", "logs", "data.cache_dir=again", "--resume", "auto")
    assert train(tmp_path, *words, "--train_steps", "8").returncode == 0


def test_a_log_dir_inside_a_checkpoint_is_refused(copy: Path) -> None:
    """It would be pruned with it."""
    words = ("--resume", "auto", "--log_dir", "run/checkpoints/latest/logs", "--train_steps", "14")
    for more in ((), ("--dry_run",)):
        assert_refused(copy, 3, "--log_dir run/checkpoints/latest/logs: lies in", *words, *more)


@pytest.mark.parametrize("name", ["checkpoints/.lock", "logs/.lock", "logs/metrics.jsonl"])
def test_a_link_in_the_place_of_our_file(tmp_path: Path, name: str) -> None:
    """What it points at, outside, is not overwritten: exit 3."""
    write_tiny(tmp_path)
    (tmp_path / "precious").write_text("precious")
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "precious")
    result = train(tmp_path)
    assert result.returncode == 3 and "Traceback" not in result.stdout, result.stdout
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_link_in_the_place_of_the_run_id(tmp_path: Path) -> None:
    """It is replaced, not followed."""
    write_tiny(tmp_path)
    (tmp_path / "precious").write_text("precious\nerror: forged")
    for where in ("checkpoints", "logs"):
        (tmp_path / "run" / where).mkdir(parents=True)
        (tmp_path / "run" / where / "wandb_run_id").symlink_to(tmp_path / "precious")
    result = train(tmp_path, "--train_steps", "2")
    assert result.returncode == 0 and "error: forged" not in result.stdout, result.stdout
    assert (tmp_path / "precious").read_text() == "precious\nerror: forged"


@pytest.mark.parametrize("flag", ["--save_dir", "--log_dir", "--config", "--input_file"])
def test_an_empty_path_is_refused(tmp_path: Path, flag: str) -> None:
    """`--save_dir "$UNSET"` does not mean the current directory, in train.sh neither."""
    write_tiny(tmp_path)
    before = sorted(tmp_path.iterdir())
    for words in ((flag, ""), (f"{flag}=",)):
        result = train(tmp_path, *words)
        assert result.returncode == 2 and "empty path" in result.stdout, result.stdout
        shell = call(tmp_path, [str(ROOT / "train.sh"), *words], NO_INSTALL="1")
        assert shell.returncode == 2 and "empty path" in shell.stdout, shell.stdout
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", "12"), ("tokens", "x"), ("data", None), ("config", {"model": 5}), ("config", []),
        ("wandb_run_id", 7), ("wandb_run_id", "x\nerror: forged"), ("best_val_loss", "low"),
        ("elapsed_seconds", float("nan")), ("elapsed_seconds", -1), ("val_loss", float("inf")),
        ("phase", 3), ("step", True), ("tokens", -1), ("position", {"epoch": 0}),
        ("config", {"training": {"train_steps": None}}),
        ("config", {"training": {"seed": "x", "learning_rate": [1]}}),
        ("config", {"model": {"hidden_size": 1e99}}),
    ],
)  # fmt: skip
def test_every_key_that_is_read_is_checked(copy: Path, key: str, value: object) -> None:
    """Resealed with a wrong type, range or pattern: exit 3 at the start, nothing trained."""
    directory = step_directory(copy, 12)
    state = atomic.read_json(directory / "trainer_state.json")
    atomic.write_json(directory / "trainer_state.json", {**state, key: value})
    reseal(directory, "trainer_state.json")
    words = ("--resume", "auto", "--train_steps", "14")
    assert_refused(copy, 3, "is not one of our checkpoints", *words)


FOREIGN = {
    "FIFO": os.mkfifo,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "directory": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize(
    "name",
    [
        "checkpoints/step_000012/manifest.json", "checkpoints/step_000012/trainer_state.json",
        "logs/metrics.jsonl", "logs/phase1.log", "checkpoints/wandb_run_id", "logs/wandb_run_id",
    ],
)  # fmt: skip
def test_what_has_no_end_is_not_read(copy: Path, monkeypatch, name: str, kind: str) -> None:
    """In the place of a file of ours: named, or passed over for the checkpoint before; no hang."""
    path = copy / "run" / name
    path.unlink()
    monkeypatch.chdir(path.parent)  # a socket's path is short
    FOREIGN[kind](Path(path.name))
    with limit(60):
        result = train(copy, "--resume", "auto", "--train_steps", "14", timeout=50)
    if "step_000012" in name:
        assert result.returncode == 0 and "steps 10 -> 14" in result.stdout, result.stdout
    elif (name.endswith("phase1.log") and kind == "endless device") or (
        name == "checkpoints/wandb_run_id" and kind != "directory"  # it is replaced, not read
    ):
        assert result.returncode == 0, result.stdout
    else:
        assert result.returncode == 3, result.stdout
        assert path.name in result.stdout and "should not happen" not in result.stdout


def test_escape_codes_are_shown_escaped(tmp_path: Path) -> None:
    """In prompts, configuration and samples, on the console and in the logs; the text itself is
    kept in metrics.jsonl."""
    write_tiny(tmp_path)
    bell = "\x1b]0;owned\x07"
    words = (f'generation.prompts=["{bell}The"]', f"wandb.name={bell}x", "training.sample_steps=2")
    words = tuple(word.replace("\x1b", "\\e").replace("\x07", "\\a") if "prompts" in word else word
                  for word in words)  # fmt: skip
    first = train(tmp_path, *words, "--train_steps", "2")
    assert first.returncode == 0, first.stdout
    again = train(tmp_path, "--resume", "auto", "--train_steps", "4")
    assert "changed since the checkpoint: wandb.name" in again.stdout, again.stdout
    log = (tmp_path / "run/logs/phase1.log").read_text("utf-8")
    for shown in (first.stdout, again.stdout, log):
        assert "\x1b" not in shown and "\x07" not in shown and "\\x1b]0;owned\\x07" in shown
    assert events(tmp_path, "sample")[0]["prompt"] == f"{bell}The"
    words = ["generate.py", "--checkpoint", "run/checkpoints/latest", "--prompt", f"{bell}The"]
    shown = call(tmp_path, [sys.executable, str(ROOT / words[0]), *words[1:]]).stdout
    assert "\x1b" not in shown and "\\x1b]0;owned" in shown
