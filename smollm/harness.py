"""Benchmarks by EleutherAI's lm-evaluation-harness, which opens the directory with transformers.

https://github.com/EleutherAI/lm-evaluation-harness has the tasks, and the form of one's own.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from smollm.errors import ConfigError, InputError, first_line, is_memory_full

if TYPE_CHECKING:
    import torch
    from lm_eval.tasks import TaskManager

KEPT = ("results", "groups", "versions", "n-shot", "n-samples")  # of what the harness returns


def require() -> None:
    """Raise ConfigError where a package is missing."""
    packages = ("lm_eval", "transformers", "accelerate")
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"--tasks: needs {', '.join(missing)}; pip install -r requirements-eval.txt"
        )


def choose(names: list[str], include_path: Path | None) -> tuple[list[str], TaskManager]:
    """The names of tasks, groups and tags that these names or patterns stand for, and their index.

    Args:
        include_path: a directory with the YAML files of further tasks.

    Raises:
        ConfigError: a name is not known, or there is no such directory.
    """
    if include_path:
        _check(include_path)
    for library in ("lm_eval", "datasets", "huggingface_hub"):  # an error says what matters
        logging.getLogger(library).setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path=include_path)
    chosen: list[str] = []
    problems = []
    for name in names:
        found = index.match_tasks([name])
        chosen += (each for each in found if each not in chosen)
        if not found:
            near = difflib.get_close_matches(name, index.all_tasks, 3)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists all"
            if name.endswith(".yaml"):
                hint = "--include_path takes its directory, and --tasks the name in it"
            problems.append(f"--tasks {name}: there is no such task; {hint}")
    if problems:
        raise ConfigError(*problems)
    return chosen, index


def _check(include_path: Path) -> None:
    """Raise ConfigError where a directory of tasks is none, or has a file that lm_eval skips."""
    if not include_path.is_dir():
        raise ConfigError(
            f"--include_path {include_path}: is not a directory; give the one with the YAML files"
        )
    problems = []
    for path in sorted(include_path.rglob("*.yaml")):
        try:
            for _ in yaml.parse(path.read_text("utf-8")):
                pass
        except (OSError, ValueError, yaml.YAMLError) as error:
            problems.append(f"--include_path {path}: {' '.join(str(error).split())}")
    if problems:
        raise ConfigError(*problems)


def run(
    directory: Path, names: list[str], index: TaskManager, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Run tasks on a model's directory; returns what `lm_eval run` reports.

    Args:
        names, index: as `choose` gives them.

    Raises:
        InputError: a task's data set cannot be had, or the harness cannot run the task.
    """
    from lm_eval import simple_evaluate

    try:
        tasks: list[Any] = []
        for name in names:
            loaded = index.load([name])
            is_group = name in loaded["groups"]
            tasks += [loaded["groups"][name]] if is_group else loaded["tasks"].values()
    except Exception as error:  # datasets, huggingface_hub and a task's own code raise anything
        raise InputError(
            f"--tasks {name}: cannot be loaded ({_described(error)}); its data set is downloaded "
            "on first use and then kept: without a network run it once where there is one"
        ) from error
    model = {"pretrained": str(directory), "dtype": str(dtype).removeprefix("torch.")}
    batch_size = "auto" if device.type == "cuda" else 1
    try:
        return simple_evaluate(
            "hf", model, tasks, batch_size=batch_size, device=device.type, task_manager=index,
            log_samples=False,
        )  # fmt: skip
    except Exception as error:
        if is_memory_full(error):
            raise
        raise InputError(
            f"--tasks {','.join(names)}: lm_eval cannot run it ({_described(error)})"
        ) from error


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


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
