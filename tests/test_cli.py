"""What the commands have in common: torchrun's variables, the console, the machine's answers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from helpers import ROOT, call, command, finished_run, step_directory, train, train_sh, write_tiny

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


@pytest.mark.parametrize("left", [{"WORLD_SIZE": "2"}, {"RANK": ""}, {"RANK": "0x"}])
def test_a_left_over_variable_stops_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: dict[str, str]
) -> None:
    """Through train.py: exit 2, though RANK itself says who may print."""
    write_tiny(tmp_path)
    short = "import sys; from smollm import cli; import train; cli.RANK_0_SECONDS = 0.1; "
    program = short + "sys.argv[0] = '-c'; cli.execute(train.main)"
    words = [sys.executable, "-c", program, *command("train.py", "--dry_run")[2:]]
    result = call(tmp_path, words, PYTHONPATH=str(ROOT), **left)
    assert result.returncode == 2 and "torchrun" in result.stdout, result.stdout
    assert "Traceback" not in result.stdout


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


def test_a_result_that_cannot_be_written_is_an_error(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """What a command was asked for is not lost with exit code 0."""
    run = finished_run(tmp_path_factory)
    for script, *words in (
        ("checkpoint.py", "list", "run/checkpoints"),
        ("checkpoint.py", "verify", "run/checkpoints/latest"),
        ("generate.py", "--checkpoint", "run/checkpoints/latest", "--json"),
        ("evaluate.py", "--checkpoint", "run/checkpoints/latest"),
    ):
        command_line = [sys.executable, str(ROOT / script), *words]
        full = call(run, ["bash", "-c", '"$0" "$@" > /dev/full', *command_line])
        assert full.returncode == 3, full.stdout
        assert full.stdout.startswith("error: standard output: No space left on device\n")


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
        ("ModuleNotFoundError('No module', name='numpy')", 2, "numpy is not installed"),
        ('RuntimeError("can\'t start new thread")', 3, "no more threads; raise `ulimit -u`"),
        ("MemoryError()", 3, "memory is full; lower training.batch_size"),
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
    bare = {"fork": False, "PYTHONPATH": str(tmp_path)}
    assert call(tmp_path, [*words, "--help"], **bare).returncode == 0
    missing = call(tmp_path, [*words, "--checkpoint", "none"], **bare)
    assert missing.returncode == 3 and "there is no such checkpoint" in missing.stdout


NOTEBOOK = """
import runpy, signal, sys

handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
words = sys.argv[1:]
import train
print("main returned", train.main(words))
sys.argv = ["train.py", *words, "--resume", "auto"]
try:
    runpy.run_path(train.__file__, run_name="__main__")
except SystemExit as end:
    print("ended with", end.code)
sys.argv = ["train.py", "--nonsense"]
try:
    runpy.run_path(train.__file__, run_name="__main__")
except SystemExit as end:
    print("ended with", end.code)
assert handlers == {number: signal.getsignal(number) for number in handlers}
print("alive")
"""


def test_in_a_notebook(tmp_path: Path) -> None:
    """main returns its code; runpy (%run) ends with SystemExit; handlers are restored, and the
    process that called lives on."""
    write_tiny(tmp_path)
    words = command("train.py", "--train_steps", "2")[2:]
    result = call(tmp_path, [sys.executable, "-c", NOTEBOOK, *words], PYTHONPATH=str(ROOT))
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and lines[-1] == "alive", result.stdout
    assert "main returned 0" in lines
    assert [line for line in lines if line.startswith("ended")] == ["ended with 0", "ended with 2"]
    assert "is complete: run/checkpoints/step_000002" in result.stdout


def test_the_memory_of_the_machine_is_full(tmp_path: Path) -> None:
    """A limit on the address space: exit 3 that names batch_size, not "should not happen"."""
    write_tiny(tmp_path)
    large = ("model.hidden_size=512", "model.intermediate_size=8192", "training.batch_size=512")
    large += ("training.compile=false", "data.sequence_length=64")
    words = ["bash", "-c", 'ulimit -v 4000000; exec "$0" "$@"', *command("train.py", *large)]
    result = call(tmp_path, words, MALLOC_ARENA_MAX="1")
    assert result.returncode == 3, result.stdout
    assert "memory is full" in result.stdout and "training.batch_size" in result.stdout
    assert "Traceback" not in result.stdout


def test_a_home_directory_is_expanded_everywhere(tmp_path: Path) -> None:
    """`~` in flags and keys, as a shell that did not see it; no directory `~` is made."""
    write_tiny(tmp_path)
    words = [sys.executable, str(ROOT / "train.py"), "--config=~/tiny.yaml"]
    words += ["--input_file=~/text.txt", "--save_dir=~/my/checkpoints", "--log_dir=~/my/logs"]
    words += ["data.cache_dir=~/cached", "--train_steps=2"]
    (tmp_path / "elsewhere").mkdir()
    result = call(tmp_path / "elsewhere", words, HOME=str(tmp_path))
    assert result.returncode == 0, result.stdout
    assert (tmp_path / "my/checkpoints/step_000002").is_dir() and (tmp_path / "cached").is_dir()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    nobody = [*words[:2], "--config=~no_such_user/x.yaml"]
    refused = call(tmp_path, nobody, HOME=str(tmp_path))
    assert refused.returncode == 2 and "there is no such home" in refused.stdout


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone")
def test_a_clone_with_crlf_has_line_feeds(tmp_path: Path) -> None:
    """core.autocrlf=true, as on Windows: scripts and texts keep their line ends."""
    clone = ["git", "-c", "core.autocrlf=true", "clone", "--quiet", str(ROOT), "clone"]
    assert call(tmp_path, clone).returncode == 0
    for name in ("train.sh", "env.sh", "input.txt", "config.yaml", "tests/run.sh"):
        assert b"\r" not in (tmp_path / "clone" / name).read_bytes(), name


COMMANDS = ("train.py", "continue_training.py", "generate.py", "checkpoint.py", "benchmark.py")


@pytest.mark.parametrize("script", COMMANDS)
def test_a_bare_python_is_told_what_to_install(tmp_path: Path, script: str) -> None:
    """No yaml, no torch: --help answers, or exit 2 with the command that installs; and with
    PYTHONSAFEPATH the project is found."""
    for name in ("yaml", "torch", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no', name='{name}')")
    words = [sys.executable, str(ROOT / script)]
    shown = call(tmp_path, [*words, "--help"], fork=False, PYTHONPATH=str(tmp_path))
    assert "Traceback" not in shown.stdout, shown.stdout
    assert shown.returncode == 0 or (
        shown.returncode == 2 and "pip install -r requirements.txt" in shown.stdout
    )
    safe = call(tmp_path, [*words, "--help"], fork=False, PYTHONSAFEPATH="1")
    assert safe.returncode == 0 and "usage:" in safe.stdout, safe.stdout


def test_train_sh_from_other_shells(tmp_path: Path) -> None:
    """`sh train.sh`, and with CDPATH set."""
    write_tiny(tmp_path)
    words = train_sh(tmp_path, "training.train_steps=2", "training.continue_steps=1")
    result = call(tmp_path, ["sh", *words], NO_INSTALL="1", CDPATH="/usr:/tmp")
    assert result.returncode == 0 and "done: checkpoints" in result.stdout, result.stdout


def test_plots_and_metrics_that_are_odd(tmp_path: Path) -> None:
    """MPLBACKEND=nonsense, and JSON nested too deep in metrics.jsonl: a line, and the run ends."""
    write_tiny(tmp_path)
    assert train(tmp_path, "--train_steps", "2").returncode == 0
    with open(tmp_path / "run/logs/metrics.jsonl", "a") as file:
        file.write("[" * 200_000 + "\n")
    words = ("--resume", "auto", "--train_steps", "4")
    result = train(tmp_path, *words, fork=False, MPLBACKEND="nonsense")
    assert result.returncode == 0 and "should not happen" not in result.stdout, result.stdout


def test_without_matplotlib_there_are_no_plots(tmp_path: Path) -> None:
    """Said once, however many evaluations; samples.txt is written, and the run ends."""
    write_tiny(tmp_path)
    (tmp_path / "matplotlib.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'matplotlib'\", name='matplotlib')"
    )
    words = ("--train_steps", "4", "training.eval_steps=2", "training.sample_steps=4")
    result = train(tmp_path, *words, fork=False, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0 and "Traceback" not in result.stdout, result.stdout
    assert result.stdout.count("there will be no plots: No module named 'matplotlib'") == 1
    assert "Once upon a time" in (tmp_path / "run/logs/samples.txt").read_text("utf-8")
