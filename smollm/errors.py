"""Errors that the user can fix, and the exit code of each.

Such an error is printed as one line that says what is wrong, where, and what to do (`cli.execute`).
Exit codes: 0 done; 1 a bug; 2 wrong usage or configuration; 3 input, checkpoint or machine cannot
be used; 4 training diverged; 5 a directory is in use by another run; 128 + n stopped by signal n.
"""


def printable(text: str, keep: str = "") -> str:
    """Foreign text as it can be shown: control and escape characters are escaped.

    Args:
        keep: characters that stay as they are, such as newlines.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


class UserError(Exception):
    """An error that the user can fix.

    Args:
        message: what, where, and what to do, in one line.
        exit_code: where it is not that of the class.
    """

    exit_code = 1

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(printable(message, keep="\n"))
        self.exit_code = self.exit_code if exit_code is None else exit_code


class ConfigError(UserError):
    """The command line, the environment or the configuration is wrong.

    Args:
        problems: one line for each problem; all that were found are reported together.
    """

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        problems = tuple(printable(problem) for problem in problems)
        self.problems = list(problems)
        lines = "\n  ".join(problems)
        many = f"{len(problems)} problems in the configuration:\n  {lines}"
        super().__init__(lines if len(problems) == 1 else many)


class InputError(UserError):
    """The text or the tokenizer cannot be used. Names of files and keys may hold anything."""

    exit_code = 3

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, of another run or model, or could not be written."""

    exit_code = 3


class ResourceError(UserError):
    """The machine lacks something: disk space, memory, or a directory that can be written."""

    exit_code = 3


class LockedError(UserError):
    """Another process holds the directory."""

    exit_code = 5


class DivergedError(UserError):
    """The loss, a gradient or a weight is not a finite number."""

    exit_code = 4


def first_line(error: BaseException) -> str:
    """The first line of what an error says, which may be nothing."""
    return [*str(error).splitlines(), ""][0]


NO_THREADS = "this user may start no more threads; raise `ulimit -u`"


def is_threads_exhausted(error: BaseException) -> bool:
    """Whether an error says that this user may start no more threads (`ulimit -u`)."""
    words = ("can't start new thread", "failed to spawn thread", "ThreadPoolBuildError")
    return any(word in str(error) for word in words)


def is_memory_full(error: BaseException) -> bool:
    """Whether an error says that the host's memory is full: Python's, torch's or the loader's."""
    words = ("DefaultCPUAllocator", "can't allocate memory", "failed to map segment", "std::bad_al")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)
