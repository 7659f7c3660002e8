"""What the commands have in common: torchrun's variables, the console, the machine's answers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from helpers import ROOT, call, command, step_directory, train, write_tiny

from smollm import ranks
from smollm.errors import ConfigError

LAUNCHED = {
    "RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1",
}  # fmt: skip


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}, {"RANK": "0"}, LAUNCHED])
def test_torchrun_variables_that_agree(environment: dict[str, str]) -> None:
    """None, one process, or all that torchrun sets."""
    ranks.check(environment)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "1"}, "RANK=1 of WORLD_SIZE=1"),
        ({**LAUNCHED, "RANK": "2"}, "RANK=2 of WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2"}, "no RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "no MASTER_ADDR"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        ({"RANK": "x"}, "RANK='x'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
    ],
)
def test_torchrun_variables_left_over(environment: dict[str, str], named: str) -> None:
    """They would make a run wait for ever, or end without a word: refused, and named."""
    with pytest.raises(ConfigError, match="unset them") as error:
        ranks.check(environment)
    assert named in str(error.value)


def test_a_left_over_variable_stops_the_command(tmp_path: Path) -> None:
    """Through train.py: exit 2."""
    write_tiny(tmp_path)
    result = train(tmp_path, "--dry_run", WORLD_SIZE="2")
    assert result.returncode == 2 and "torchrun" in result.stdout, result.stdout


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_console_is_no_error(tmp_path: Path, closed: str) -> None:
    """The run goes on to its end, and no file of its takes the place of the console."""
    write_tiny(tmp_path)
    result = call(tmp_path, ["bash", "-c", f'"$0" "$@" {closed}', *command("train.py")])
    assert result.returncode == 0, result.stdout
    assert step_directory(tmp_path, 12).is_dir()
    assert "phase 1 complete" in (tmp_path / "run/logs/phase1.log").read_text("utf-8")
    listed = [sys.executable, str(ROOT / "checkpoint.py"), "verify", "run/checkpoints"]
    assert call(tmp_path, ["bash", "-c", f'"$0" "$@" {closed}', *listed]).returncode == 0


def test_a_console_of_ascii_shows_every_line() -> None:
    """What it cannot show is escaped, not an error."""
    program = "from smollm import cli; cli.execute(lambda: print('caf\\u00e9 \\u2019') or 0)"
    result = call(ROOT, [sys.executable, "-c", program], PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout) == (0, "caf\\xe9 \\u2019\n")


def test_the_machines_answers_are_no_bugs() -> None:
    """No permission, a name too long, no such module: one line, without `should not happen`."""
    for error, code, said in (
        ("PermissionError(13, 'Permission denied', 'a/b')", 3, "error: a/b: Permission denied"),
        ("OSError(28, 'No space left on device')", 3, "No space left on device"),
        ("ModuleNotFoundError('No module', name='numpy')", 1, "numpy is not installed"),
        ("ValueError('x')", 1, "this should not happen: ValueError: x"),
    ):
        program = f"from smollm import cli\ndef main(): raise {error}\ncli.execute(main)"
        result = call(ROOT, [sys.executable, "-c", program])
        assert result.returncode == code and said in result.stdout, result.stdout
        assert len(result.stdout.splitlines()) == 1
    debug = call(ROOT, [sys.executable, "-c", program], DEBUG="1")
    assert debug.returncode == 1 and "Traceback" in debug.stdout


def test_flags_and_keys_are_named_together(tmp_path: Path) -> None:
    """A wrong flag, a wrong step count and two wrong keys: four lines of one error."""
    write_tiny(tmp_path)
    words = ("--trian_steps=3", "--train_steps", "0", "training.batch_size=0", "model.foo=1")
    result = train(tmp_path, *words)
    assert result.returncode == 2
    for name in ("--trian_steps=3", "training.train_steps", "training.batch_size", "model.foo"):
        assert name in result.stdout, result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [("--save_dir", b"odd\xff"), ("--input_file", b"odd\xff"), (b"wandb.name=caf\xe9",)],
)
def test_words_that_are_not_utf8_are_refused(tmp_path: Path, words: tuple) -> None:
    """Logs and checkpoints could not name them: exit 2, not a run without checkpoints."""
    write_tiny(tmp_path)
    result = train(tmp_path, *(os.fsdecode(word) for word in words))
    assert result.returncode == 2 and "Traceback" not in result.stdout, result.stdout


def test_generate_answers_before_torch_is_imported(tmp_path: Path) -> None:
    """--help and a missing checkpoint need no torch."""
    (tmp_path / "torch.py").write_text("raise SystemExit(99)")
    words = [sys.executable, str(ROOT / "generate.py")]
    assert call(tmp_path, [*words, "--help"], PYTHONPATH=str(tmp_path)).returncode == 0
    missing = call(tmp_path, [*words, "--checkpoint", "none"], PYTHONPATH=str(tmp_path))
    assert missing.returncode == 3 and "there is no such checkpoint" in missing.stdout
