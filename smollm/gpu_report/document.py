"""The report: its stages run one after the other, as JSON and as a Markdown page."""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from smollm import atomic, benchmarking, cli, cuda
from smollm.benchmarking import Result
from smollm.config import Config, to_dict
from smollm.errors import ConfigError, UserError
from smollm.gpu_report import checks, runs
from smollm.gpu_report.processes import (
    STAGE_SECONDS,
    CannotRunError,
    Findings,
    in_child,
    replace_file,
)
from smollm.peers import side_environment
from smollm.training.setup import code_version

Stage = Callable[[Config, argparse.Namespace, Findings], None]
STAGES: dict[str, Stage] = {
    "attention": checks.check_attention,
    "optimizer": checks.check_optimizer,
    "recomputation": checks.check_recomputation,
    "dropout": checks.check_dropout,
    "sampling": checks.check_sampling,
    "nccl": checks.check_nccl,
    "memory": runs.check_memory,
    "out_of_memory": runs.check_out_of_memory,
    "speed": runs.measure_speed,
    "compile_cache": runs.measure_compile_cache,
    "saving": runs.check_saving,
    "stall": runs.measure_stall,
    "resume": runs.check_resume,
    "trainer": runs.measure_trainer,
}
REPORT_SECONDS, LEAST_SECONDS = 530, 10  # for all stages, and for one: then the rest is not run
PASSED, MEASURED, FAILED, NOT_HERE = "passed", "measured", "failed", "not run here"


def _run_stage(name: str, config: Config, arguments: argparse.Namespace, seconds: float) -> Result:
    """One stage's part of the report.

    Args:
        seconds: that are left for it.
    """
    arguments = copy.copy(arguments)
    arguments.scratch = arguments.scratch / name
    arguments.scratch.mkdir()
    findings = Findings(arguments.scratch / "findings.json")
    began, reason = time.perf_counter(), None
    stage = functools.partial(STAGES[name], found=findings)
    environment = side_environment(os.environ, peer=False)
    try:
        in_child(stage, config, arguments, environment, min(seconds, STAGE_SECONDS))
        result = PASSED
    except CannotRunError as error:
        result, reason = NOT_HERE, str(error)
    except ChildProcessError as error:
        result, reason = FAILED, str(error)
    found: Result = {"checks": [], "figures": []}
    if findings.path.exists():  # what was found until then
        found = atomic.read_json(findings.path)
    if result == PASSED and not found["checks"]:
        result = MEASURED
    if not all(check["passed"] for check in found["checks"]):
        result = FAILED
    if reason is not None:
        found["reason"] = reason
    if result == FAILED:
        found["log"] = _logs(arguments.scratch)
    shutil.rmtree(arguments.scratch, ignore_errors=True)  # checkpoints of gigabytes among it
    return {
        "result": result, "seconds": time.perf_counter() - began,
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "steps": arguments.steps,
        "code": code_version(), **found,
    }  # fmt: skip


def _logs(scratch: Path, lines: int = 40) -> list[str]:
    """The last lines that a stage's processes printed."""
    texts = [path.read_text("utf-8", "replace") for path in sorted(scratch.rglob("answer-*.log"))]
    return "".join(texts).splitlines()[-lines:]


def _machine(config: Config, arguments: argparse.Namespace) -> Result:
    """The machine and the versions."""
    facts = benchmarking.environment(config, arguments)
    driver = cuda.driver()
    return {**facts, "driver": driver.version if driver else None}


def _opened(out: Path, machine: Result, command: str, config: Config) -> Result:
    """The report in `out`, whose other stages stay; an empty one where there is none.

    Raises:
        ConfigError: it is of another machine or configuration, or cannot be read.
    """
    document: Result = {
        "machine": machine, "config": to_dict(config), "commands": [command], "stages": {}
    }  # fmt: skip
    if (out / "report.json").exists():
        try:
            earlier = atomic.read_json(out / "report.json")
            earlier["commands"], earlier["stages"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{out / 'report.json'}: is no report ({error!r}); move it away"
            ) from error
        for key, words in (("config", "configuration"), ("machine", "machine")):
            if earlier.get(key) != json.loads(json.dumps(document[key])):
                raise ConfigError(
                    f"--gpu_report {out}: holds the report of another {words}; name another "
                    "directory, or move it away"
                )
        document["commands"] = [*earlier["commands"], command]
        document["stages"] = earlier["stages"]
    return document


def write(
    out: Path, stages: list[str], command: str, config: Config, arguments: argparse.Namespace
) -> None:
    """Run stages and write the report, each stage as soon as it ends.

    Raises:
        ConfigError: the directory holds another machine's report.
        UserError: a stage failed; the others were run.
    """
    try:
        machine = in_child(_machine, config, arguments)
    except ChildProcessError as error:
        raise UserError(f"the machine cannot be used: {error}", 2) from error
    out.mkdir(parents=True, exist_ok=True)
    document = _opened(out, machine, command, config)
    end, failed = time.monotonic() + REPORT_SECONDS, []
    for name in stages:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            cli.say(f"{name:<16}no time is left: --only {name} runs it")
            continue
        found = document["stages"][name] = _run_stage(name, config, arguments, left)
        replace_file(out / "report.json", json.dumps(document, indent=2, ensure_ascii=False))
        replace_file(out / "report.md", "\n".join(markdown(document)))
        reason = f": {found['reason']}" if "reason" in found else ""
        cli.say(f"{name:<16}{found['result']}{reason} ({found['seconds']:.0f} s)")
        if found["result"] == FAILED:
            failed.append(name)
    cli.say(f"{out / 'report.md'}, {out / 'report.json'}")
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; {out / 'report.md'} says what was found")


def _cell(value: Any) -> str:
    """A value as it stands in a table."""
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|")


def markdown(document: Result) -> Iterator[str]:
    """The report as lines of Markdown."""
    machine, config = document["machine"], document["config"]
    data, training = config["data"], config["training"]
    yield f"# {machine['device']}"
    yield ""
    versions = {"driver": machine["driver"], **machine["versions"]}
    yield (
        f"{', '.join(f'{name} {value}' for name, value in versions.items() if value)}; "
        f"{machine['cores']} CPU cores; {machine['parameters']:,} parameters, "
        f"{training['batch_size']} x {training['gradient_accumulation_steps']} x "
        f"{data['sequence_length']:,} tokens a step, {machine['precision']}."
    )
    yield from ("", "```bash", *document["commands"], "```", "")
    yield from ("| stage | result | s | code |", "|---|---|---|---|")
    for name, found in document["stages"].items():
        reason = f": {_cell(found['reason'])}" if "reason" in found else ""
        yield f"| {name} | {found['result']}{reason} | {found['seconds']:.0f} | {found['code']} |"
    for name, found in document["stages"].items():
        if found["checks"] or found["figures"]:
            yield from ("", f"## {name}", "", "| what | found | must be |", "|---|---|---|")
        for check in found["checks"]:
            bound = "yes" if check["bound"] is True else f"at most {_cell(check['bound'])}"
            mark = "" if check["passed"] else " **FAILED**"
            yield f"| {check['what']} | {_cell(check['found'])}{mark} | {bound} |"
        for figure in found["figures"]:
            unit = "" if figure["value"] is None else figure["unit"]
            yield f"| {figure['what']} | {_cell(figure['value'])} {unit}".rstrip() + " | |"
        if "log" in found:
            yield from ("", f"## {name}: its last lines", "", "```", *found["log"], "```")
