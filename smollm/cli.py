"""What the commands have in common: flags, how an error is printed, how a command ends.

Imports no torch, so that a wrong command line is answered in well under a second. errors.py has the
exit codes.
"""

import argparse
import contextlib
import difflib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smollm import ranks, signals
from smollm.config import LAST_STEP, Config, FixedModel
from smollm.config_reader import load
from smollm.errors import (
    NO_THREADS,
    ConfigError,
    UserError,
    is_memory_full,
    is_threads_exhausted,
    printable,
)

RANK_0_SECONDS = 10.0  # how long the other ranks leave it to rank 0 to report an error


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with one line for an error and no abbreviations of flags."""

    def __init__(self, **kwargs) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )

    def error(self, message: str) -> None:
        """Raise the problem as a ConfigError that says where help is."""
        for word in sys.argv[1:]:  # argparse takes a value that begins with - for a flag
            unknown = word.startswith("-") and word.split("=")[0] not in self._option_string_actions
            if unknown and re.search("expected (at least )?one argument", message):
                flag = message.split()[1].rstrip(":")
                message += f"; a value that begins with - is written {flag}={word}"
        raise ConfigError(f"{message} (see {self.prog} --help)")


def positive_integer(word: str) -> int:
    """An argparse type: a whole number from 1 to 999999."""
    digits = word.isascii() and word.isdigit() and len(word) < 8
    if not (digits and 1 <= int(word) <= LAST_STEP):
        expected = f"a whole number from 1 to {LAST_STEP}"
        raise argparse.ArgumentTypeError(f"got {word!r}, expected {expected}")
    return int(word)


def text(word: str) -> str:
    """An argparse type: a word of the command line that is valid UTF-8."""
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"got {word!r}, expected UTF-8") from error
    return word


def path(word: str) -> Path:
    """An argparse type: a path, in UTF-8 because logs and checkpoints have to name it.

    `~` is the home directory, as in a shell, which does not expand it everywhere.
    """
    if not word:  # "$UNSET": the current directory is hardly meant
        raise argparse.ArgumentTypeError("got an empty path")
    try:
        return Path(text(word)).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"got {word!r}: there is no such home") from error


def source(word: str) -> str:
    """An argparse type: a file, a folder, a glob or a URL, as text."""
    return word if "://" in word else str(path(word))


def model(word: str) -> str:
    """An argparse type: a model's directory, or owner/name of the Hub, as text."""
    if word.startswith("~"):
        return str(path(word))
    path(word)  # not empty, UTF-8
    return word  # as it is: "./owner/name" is a path


def training_parser(description: str) -> ArgumentParser:
    """A parser with the flags that both phases of training have."""
    parser = ArgumentParser(description=description)
    add_inputs(parser)
    for name, default, meaning in (
        ("--save_dir", "checkpoints", "checkpoints, of one run"),
        ("--log_dir", "logs", "metrics, logs, plots and samples, of one run"),
    ):
        parser.add_argument(name, type=path, default=Path(default), help=f"{meaning} ({default})")
    parser.add_argument("--train_steps", metavar="N", help="optimizer steps of this phase")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser


def add_inputs(parser: ArgumentParser) -> None:
    """Add the flags that name the configuration and the text."""
    parser.add_argument(
        "--config", type=path, default=Path("config.yaml"), help="YAML file (config.yaml)"
    )
    add_input_file(parser)


def add_input_file(parser: ArgumentParser) -> None:
    """Add the flag that names texts."""
    parser.add_argument(
        "--input_file", type=source, action="append", metavar="FILE",
        help="a text, JSON lines, Parquet, CSV or token file, a folder or a quoted glob of such, "
        "or a URL (hf://datasets/...); may be given several times (data.input_files)",
    )  # fmt: skip


def parse(parser: ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The flags of a command line; what is not known of it waits for `configuration`.

    Args:
        argv: the words of the command line; None: the process's own.

    Raises:
        ConfigError: a flag has a wrong value, or torchrun's variables do not agree.
    """
    ranks.check(os.environ)
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    arguments.unknown = []
    for word in (*unknown, *(w for w in arguments.overrides if w.startswith("-"))):
        near = difflib.get_close_matches(word.split("=")[0], parser._option_string_actions, 1)
        arguments.unknown.append(word + (f"; did you mean {near[0]}?" if near else ""))
    return arguments


def unknown_flags(arguments: argparse.Namespace) -> list[str]:
    """A problem for each flag that is not known, of what `parse` gave."""
    return [f"command line: unknown flag {word}" for word in arguments.unknown]


def configuration(
    arguments: argparse.Namespace, steps_key: str | None = None, fixed: FixedModel | None = None
) -> Config:
    """The configuration that a command line names; every problem is reported together.

    Args:
        arguments: as `parse` gives them.
        steps_key: the key of the training section that --train_steps stands for, if it is a flag.
        fixed: the model of the weights that the command line names, if it names any.

    Raises:
        ConfigError: something is wrong with the configuration, or a flag is not known.
    """
    words = [word for word in arguments.overrides if not word.startswith("-")]
    flags: dict[str, tuple[str, Any]] = {}
    if steps_key and arguments.train_steps is not None:
        flags["--train_steps"] = (f"training.{steps_key}", arguments.train_steps)
    if arguments.input_file:
        flags["--input_file"] = ("data.input_files", arguments.input_file)
    if getattr(arguments, "device", None):
        flags["--device"] = ("training.device", arguments.device)
    problems = unknown_flags(arguments)
    try:
        config = load(arguments.config, words, flags, fixed)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return config


def say(line: str) -> None:
    """Print a line on stdout, on rank 0; a console that was closed is no error."""
    if ranks.is_main():
        with contextlib.suppress(OSError):
            print(printable(line, keep="\n"), flush=True)


def show(text: str, end: str = "\n") -> None:
    """Print a part of a command's result, at once; unlike `say`'s lines, none may be lost.

    Raises:
        OSError: it cannot be written; standard output is named.
    """
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def warn(line: str) -> None:
    """Print a line on stderr, on rank 0; a console that was closed is no error."""
    if ranks.is_main():
        with contextlib.suppress(OSError):
            print(printable(line, keep="\n"), file=sys.stderr, flush=True)


def execute(main: Callable[[], int]) -> None:
    """Run a command and exit with its code; an error becomes one line, without a traceback.

    With DEBUG=1 in the environment the traceback is shown. Where the process is not the command's
    own (a notebook), it ends by SystemExit and the process lives on.
    """
    _open_streams()
    try:
        code = main()
    except UserError as error:
        code = error.exit_code
        _report(f"error: {error}")
    except SystemExit as end:  # argparse, or a signal while there was nothing to save
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output was closed: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except ModuleNotFoundError as error:
        code = 2
        _report(
            f"error: {error.name} is not installed for {sys.executable}; ./train.sh installs what "
            "is needed, and `source env.sh` makes it the shell's Python; or: "
            f"{sys.executable} -m pip install -r requirements.txt"
        )
    except Exception as error:
        code = _unexpected(error)
    if not signals.is_own_process():
        raise SystemExit(code)
    leave(code)


def _unexpected(error: Exception) -> int:
    """Report an error that is none of ours: the machine's answer, or a bug; returns the code."""
    if is_memory_full(error):
        _report(
            "error: this machine's memory is full; lower training.batch_size and raise "
            f"training.gradient_accumulation_steps, or use a smaller model ({error})"
        )
        return 3
    if is_threads_exhausted(error):
        _report(f"error: {NO_THREADS} ({error})")
        return 3
    if isinstance(error, OSError):
        _report(f"error: {error.filename or 'the system'}: {error.strerror or error}")
        return 3
    hint = "" if os.environ.get("DEBUG") == "1" else " (DEBUG=1 shows where; please report it)"
    _report(f"error: this should not happen: {type(error).__name__}: {error}{hint}")
    return 1


def _open_streams() -> None:
    """Have a stdout and a stderr that take every line, also where they are closed or ASCII."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # `>&-`: the next open() would take its descriptor
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for the whole process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _report(line: str) -> None:
    """Print an error on stderr, once for a whole torchrun.

    Ranks usually meet the same error, and torchrun ends all when the first of them leaves. So the
    others give rank 0 time to print it, and print it themselves if they still run after that.
    """
    if os.environ.get("DEBUG") == "1":
        traceback.print_exc()
    if ranks.is_main():
        warn(line)
        return
    for number in signals.NUMBERS:
        signal.signal(number, signal.SIG_DFL)
    time.sleep(RANK_0_SECONDS)
    with contextlib.suppress(OSError):
        print(f"rank {os.environ['RANK']}: {line}", file=sys.stderr, flush=True)


def leave(code: int) -> None:
    """Exit with `code` at once, without exit handlers and teardown of the interpreter.

    Everything is on the disk by now. W&B's exit handlers wait for a server that does not answer,
    and gloo's threads can abort a process during its teardown
    (https://github.com/pytorch/pytorch/pull/179291). torchrun has one exit code of its own, so
    train.sh reads ours from the file that EXIT_CODE_FILE names.
    """
    for number in signals.NUMBERS:  # a late one must not change the exit code
        signal.signal(number, signal.SIG_IGN)
    code_file = os.environ.get("EXIT_CODE_FILE")
    if code_file and code and ranks.is_main():
        Path(code_file).write_text(str(code), encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a console that is closed
            stream.flush()
    os._exit(code)
