"""benchmark.py --gpu_report: every stage on the CPU, as far as it can; on a GPU, each as a test."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import helpers
import pytest

from smollm import atomic, config_reader
from smollm.config import Config
from smollm.errors import ConfigError, UserError
from smollm.gpu_report import document, processes
from smollm.gpu_report.document import STAGES

NEED_A_GPU = ("nccl", "memory", "out_of_memory")
CPU = ("--device", "cpu", "--config", "tiny.yaml", "--input_file", "text.txt", "--steps", "4")


def command(directory: Path, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """benchmark.py --gpu_report out, with further words."""
    script = [str(helpers.ROOT / "benchmark.py"), "--gpu_report", "out", *words]
    return forked.run(script, directory, helpers.environment(**extra), 300)


def found(directory: Path) -> dict:
    """The report that lies there."""
    return json.loads((directory / "out/report.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A directory with a report of all stages, and what was printed."""

    def make(directory: Path) -> None:
        helpers.write_tiny(directory)
        done = command(directory, *CPU)
        assert done.returncode == 0, done.stdout
        (directory / "printed").write_text(done.stdout, "utf-8")

    directory = helpers.made_once(tmp_path_factory, "gpu-report", make)
    return directory, (directory / "printed").read_text("utf-8")


def test_every_stage_is_there(report: tuple[Path, str]) -> None:
    """What the CPU can run has passed its checks; the rest is named, with the reason."""
    directory, printed = report
    document = found(directory)
    assert list(document["stages"]) == list(STAGES)
    page = (directory / "out/report.md").read_text("utf-8")
    for name, stage in document["stages"].items():
        assert f"| {name} | {stage['result']}" in page and f"\n{name} " in f"\n{printed}"
        if stage["result"] == "not run here":
            assert stage["reason"] in page and stage["reason"] in printed
        else:
            assert stage["result"] == ("passed" if stage["checks"] else "measured"), name
            assert stage["checks"] or stage["figures"], name
    absent = {n for n, stage in document["stages"].items() if stage["result"] == "not run here"}
    assert absent - {"trainer"} == {*NEED_A_GPU, "compile_cache"}
    assert "torch" in document["machine"]["versions"] and "driver" in document["machine"]
    assert "python benchmark.py --gpu_report out --device cpu" in page
    assert not list((directory / "cache").glob("benchmark-*"))


def test_figures_are_what_they_are_called(report: tuple[Path, str]) -> None:
    """Speed is tokens of a step by its seconds, at half the length and at the whole."""
    stages = found(report[0])["stages"]
    speed = {each["what"]: each["value"] for each in stages["speed"]["figures"]}
    for length in (32, 64):
        milliseconds = speed[f"T={length}: a step, median of 4"]
        tokens = 2 * 2 * length
        assert speed[f"T={length}: speed"] == pytest.approx(1e3 * tokens / milliseconds)
        assert speed[f"T={length}: MFU, attention counted half"] is None  # of a CPU: not known
    stall = {each["what"]: each["value"] for each in stages["stall"]["figures"]}
    assert 0 < stall["training waits"] <= stall["until it is on the disk"]
    names = [check["what"] for check in stages["resume"]["checks"]]
    assert any("model.safetensors" in name for name in names)


def test_one_stage_again_and_a_stage_that_fails(report: tuple[Path, str], tmp_path: Path) -> None:
    """--only keeps the other stages; one that fails is named, and the others are run: exit 1."""
    directory, _ = report
    helpers.write_tiny(tmp_path)
    (tmp_path / "out").mkdir()
    text = (directory / "out/report.json").read_text("utf-8")
    (tmp_path / "out/report.json").write_text(text, "utf-8")
    before = json.loads(text)
    full = {"FAULT": "save.weights:full:1+"}
    done = command(tmp_path, "--only", "saving,sampling", *CPU, **full)
    assert done.returncode == 1 and "Traceback" not in done.stdout, done.stdout
    assert "error: failed: saving; out/report.md says what was found" in done.stdout
    after = found(tmp_path)
    assert after["stages"]["saving"]["result"] == "failed"
    assert "No space left" in after["stages"]["saving"]["reason"]
    assert after["stages"]["sampling"]["result"] == "passed"
    assert after["stages"]["resume"] == before["stages"]["resume"]
    assert len(after["commands"]) == 2
    refused = command(tmp_path, "--only", "sampling", *CPU, "model.num_hidden_layers=1")
    assert refused.returncode == 2 and "another configuration" in refused.stdout, refused.stdout
    assert found(tmp_path) == after


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", "attention,velocity"), "--only: got 'velocity', expected attention, "),
        (("--gpu_report", "text.txt"), "--gpu_report text.txt: is no directory"),
        (("--device", "gpu"), "--device"),
        (("--json", "out.json"), "leave --json and --peer out"),
    ],
)
def test_bad_words_are_refused(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    """One line and exit code 2, and nothing is written."""
    helpers.write_tiny(tmp_path)
    done = command(tmp_path, *CPU, *words)
    assert done.returncode == 2 and message in done.stdout, done.stdout
    assert not (tmp_path / "out").exists()


def sleep(config: Config, arguments: argparse.Namespace) -> None:
    """Note this process, and take long."""
    arguments.scratch.joinpath("child").write_text(str(os.getpid()))
    time.sleep(60)


def sleep_in_a_child(config: Config, arguments: argparse.Namespace) -> None:
    """The same in a process of its own."""
    processes.in_child(sleep, config, arguments)


def test_a_stage_that_hangs_is_ended(tmp_path: Path) -> None:
    """After its time, with what it has forked."""
    arguments = argparse.Namespace(scratch=tmp_path)
    with pytest.raises(ChildProcessError, match=r"not finished after 1\.5 s"):
        processes.in_child(sleep_in_a_child, Config(), arguments, seconds=1.5)
    status = Path("/proc", (tmp_path / "child").read_text(), "stat")
    with helpers.limit(10):
        while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.05)


def test_what_is_not_finite_passes_no_check(tmp_path: Path) -> None:
    """A bound holds for finite numbers only; what was found is in the file at once, as JSON."""
    findings = processes.Findings(tmp_path / "findings.json")
    for value in (1.0, 2.0, math.nan, math.inf):
        findings.at_most("a number", value, 1.5)
    assert [check["passed"] for check in findings.checks] == [True, False, False, False]
    text = findings.path.read_text("utf-8")
    assert json.loads(text, parse_constant=pytest.fail)["checks"] == findings.checks


def half_way(config: Config, arguments: argparse.Namespace, found: processes.Findings) -> None:
    """A stage that passes a check, fails another one, and is then killed."""
    found.at_most("a first number", 1.0, 2.0)
    found.holds("a second thing", os.environ["WANDB_MODE"] != "disabled")
    os.write(1, b"its last words\n")
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_stage_found_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checks, the failed one among them, the reason and its last lines; the next one runs."""
    monkeypatch.setitem(document.STAGES, "attention", half_way)
    monkeypatch.setenv("WANDB_MODE", "online")
    config = config_reader.load(helpers.ROOT / "config_cpu.yaml", ["training.device=cpu"])
    arguments = argparse.Namespace(scratch=tmp_path, steps=2, warmup=1)
    with pytest.raises(UserError, match="failed: attention; ") as stopped:
        document.write(tmp_path / "out", ["attention", "nccl"], "a command", config, arguments)
    assert stopped.value.exit_code == 1
    stages = found(tmp_path)["stages"]
    assert [check["passed"] for check in stages["attention"]["checks"]] == [True, False]
    assert stages["attention"]["reason"] == "killed by signal 9"
    assert stages["attention"]["log"] == ["its last words"]
    page = (tmp_path / "out/report.md").read_text("utf-8")
    assert "| a second thing | no **FAILED** | yes |" in page and "its last words" in page
    assert stages["nccl"]["result"] == "not run here" and "nccl" in capsys.readouterr().out
    monkeypatch.setattr(document, "REPORT_SECONDS", 0)
    document.write(tmp_path / "out", ["sampling"], "a command", config, arguments)
    assert "no time is left: --only sampling runs it" in capsys.readouterr().out
    assert found(tmp_path)["stages"] == stages
    (tmp_path / "out/report.json").write_text("[]")
    with pytest.raises(ConfigError, match="is no report"):
        document.write(tmp_path / "out", ["nccl"], "a command", config, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("name", STAGES)
def test_each_stage_on_the_gpu(tmp_path: Path, name: str) -> None:
    """The same checks, on four layers of the default shape."""
    words = ["--device", "cuda", "--config", str(helpers.ROOT / "config.yaml"), "--only", name]
    words += ["--input_file", str(helpers.ROOT / "input.txt"), "tokenizer.source=train"]
    words += ["model.num_hidden_layers=4", "training.batch_size=16", "--steps", "4"]
    done = helpers.call(
        tmp_path,
        [sys.executable, str(helpers.ROOT / "benchmark.py"), "--gpu_report", "out", *words],
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    stage = atomic.read_json(tmp_path / "out/report.json")["stages"][name]
    assert stage["result"] in ("passed", "measured") or (
        name == "trainer" and stage["result"] == "not run here"
    ), stage
