"""Benchmarks by EleutherAI's lm-evaluation-harness, which opens the directory with transformers.

https://github.com/EleutherAI/lm-evaluation-harness has the tasks, and the form of one's own.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from smollm.errors import ConfigError, InputError, first_line, is_memory_full

if TYPE_CHECKING:
    import torch
    from lm_eval.tasks import TaskManager

KEPT = ("results", "groups", "versions", "n-shot", "n-samples")  # of what the harness returns


class Tasks(NamedTuple):
    """Tasks and groups of tasks that were loaded, with their data sets."""

    chosen: list[Any]
    index: TaskManager


def require() -> None:
    """Raise ConfigError where a package is missing."""
    packages = ("lm_eval", "transformers", "accelerate")
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"--tasks: needs {', '.join(missing)}; pip install -r requirements-eval.txt"
        )


def load(names: list[str], include_path: Path | None) -> Tasks:
    """The tasks and groups of tasks that names stand for: of tasks, groups and tags, or patterns.

    Args:
        include_path: a directory with the YAML files of further tasks.

    Raises:
        ConfigError: a name is not known, or the directory cannot be used.
        InputError: a task cannot be loaded, as where its data set cannot be had.
    """
    if include_path and not include_path.is_dir():
        raise ConfigError(
            f"--include_path {include_path}: is not a directory; give the one with the YAML files"
        )
    _set_up_logging()
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path=include_path)
    found = {name: index.match_tasks([name]) for name in names}
    if unknown := [name for name in names if not found[name]]:
        problems = [_unknown(name, index.all_tasks) for name in unknown]
        raise ConfigError(*problems, *(_skipped(include_path) if include_path else ()))
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    inside: set[str] = set()  # tasks and groups of a group
    for name in dict.fromkeys(each for several in found.values() for each in several):
        try:
            loaded = index.load([name])
        except Exception as error:  # datasets, huggingface_hub and a task's own code raise anything
            raise InputError(f"--tasks {name}: cannot be loaded ({_described(error)})") from error
        if name in loaded["groups"]:
            groups[name] = loaded["groups"][name]
            inside |= (loaded["tasks"].keys() | loaded["groups"].keys()) - {name}
        else:
            tasks |= loaded["tasks"]
    chosen = {name: each for name, each in (groups | tasks).items() if name not in inside}
    return Tasks(list(chosen.values()), index)


def _unknown(name: str, known: list[str]) -> str:
    """The problem of a name that stands for nothing."""
    near = difflib.get_close_matches(name, known, 3)
    hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists all"
    if name.endswith(".yaml"):
        hint = "--include_path takes its directory, and --tasks the name in it"
    return f"--tasks {name}: there is no such task; {hint}"


def _set_up_logging() -> None:
    """Show each kind of warning of the harness once, and no retries: their error follows."""
    handler, seen = logging.StreamHandler(), set()

    def is_new(record: logging.LogRecord) -> bool:
        place = (record.pathname, record.lineno)
        return place not in seen and not seen.add(place)

    handler.addFilter(is_new)
    logger = logging.getLogger("lm_eval")
    logger.handlers, logger.propagate = [handler], False
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _skipped(include_path: Path) -> list[str]:
    """The files of a directory of tasks that are no YAML, which the harness skips."""
    problems = []
    for path in sorted(include_path.rglob("*.yaml")):
        try:
            for _ in yaml.parse(path.read_text("utf-8")):
                pass
        except (OSError, ValueError, yaml.YAMLError) as error:
            problems.append(f"--include_path {path}: {' '.join(str(error).split())}")
    return problems


def run(directory: Path, tasks: Tasks, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Run tasks on a model's directory; returns what `lm_eval run` reports.

    Raises:
        InputError: the harness cannot run a task.
    """
    from lm_eval import simple_evaluate

    model = {"pretrained": str(directory), "dtype": str(dtype).removeprefix("torch.")}
    batch_size = "auto" if device.type == "cuda" else 1
    try:
        return simple_evaluate(
            "hf", model, tasks.chosen, batch_size=batch_size, device=device.type,
            task_manager=tasks.index, log_samples=False,
        )  # fmt: skip
    except Exception as error:
        if is_memory_full(error):
            raise
        raise InputError(f"--tasks: lm_eval cannot run them ({_described(error)})") from error


def _described(error: Exception) -> str:
    """An error of the harness, and what to do."""
    said = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, ConnectionError):
        return f"{said}; data sets are downloaded on first use, which needs a network"
    return f"{said}; DEBUG=1 shows where"


def as_json(report: dict[str, Any]) -> dict[str, Any]:
    """What of a report has JSON's types: scores, versions, shots and samples of each task."""
    return {key: _plain(report[key]) for key in KEPT if key in report}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if hasattr(value, "item"):  # of NumPy
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(report: dict[str, Any]) -> list[str]:
    """The harness's table of a report, and that of its groups, in lines."""
    from lm_eval.utils import make_table

    columns = ["results", *(["groups"] if report.get("groups") else [])]
    return "\n".join(make_table(report, column).rstrip() for column in columns).splitlines()
