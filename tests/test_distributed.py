"""Several processes on the CPU (gloo): same losses, same files, resumed on another number."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from helpers import (
    LLAMA,
    MUON,
    ROOT,
    call,
    command,
    environment,
    events,
    finished_run,
    losses,
    step_directory,
    train,
    train_sh,
    write_tiny,
)
from pretrained_helpers import write_model
from safetensors.torch import load_file, save_file

from smollm import atomic, distributed

SETTINGS = (
    "training.precision=fp32", "training.gradient_accumulation_steps=4",
    "training.eval_steps=10", "training.save_steps=5",
)  # fmt: skip

# The other family and optimizer; 130 rows on four processes are shards of 33, 33, 33 and 31.
WORDS = {"adamw": (), "muon": (*LLAMA, *MUON, "model.intermediate_size=130")}


def on_ranks(
    directory: Path, processes: int, *words: str, script: Path = ROOT / "train.py", **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run train.py on several processes, forked, with torchrun's variables; rank 0's exit code."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    arguments = command("train.py", "--train_steps", "20", *SETTINGS, *words)[2:]
    ranks = [
        forked.Started(
            [str(script), *arguments], directory,
            environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared, **extra),
        )
        for rank in range(processes)
    ]  # fmt: skip
    output = ranks[0].communicate(120)[0]
    for other in ranks[1:]:
        if ranks[0].returncode != 0:  # as torchrun does
            other.terminate()
        output += other.communicate(30)[0]
    return subprocess.CompletedProcess(words, ranks[0].returncode, output)


def torchrun(directory: Path, processes: int, *words: str, **extra: str):
    """Start train.py on several processes as a user does."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    train_command = command("train.py", "--train_steps", "20", *SETTINGS, *words)
    return call(
        directory, [*launcher, f"--nproc_per_node={processes}", *train_command[1:]], **extra
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run of 20 steps on one process."""
    return finished_run(tmp_path_factory, "--train_steps", "20", *SETTINGS)


@pytest.fixture(scope="module")
def references(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Such a run of each family, one with each optimizer."""
    other = finished_run(tmp_path_factory, "--train_steps", "20", *SETTINGS, *WORDS["muon"])
    return {"adamw": reference, "muon": other}


@pytest.mark.parametrize(
    ("kind", "processes", "optimizer"),
    [("ddp", 2, "adamw"), ("fsdp", 2, "adamw"), ("ddp", 2, "muon"), ("fsdp", 4, "muon")],
)
def test_losses_are_those_of_one_process(
    references: dict[str, Path], tmp_path: Path, kind: str, processes: int, optimizer: str
) -> None:
    """The same sequences make up each step: losses and norms within 1e-4 over 20 steps."""
    reference, words = references[optimizer], WORDS[optimizer]
    write_tiny(tmp_path)
    result = on_ranks(tmp_path, processes, f"training.parallel={kind}", *words)
    assert result.returncode == 0, result.stdout
    assert losses(tmp_path) == pytest.approx(losses(reference), abs=1e-4)
    for ours, theirs in zip(events(tmp_path, "eval"), events(reference, "eval"), strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-4)
        assert ours["val_tokens"] == theirs["val_tokens"]
    norms = {event["step"]: event["grad_norm"] for event in events(reference, "train")}
    found = {event["step"]: event["grad_norm"] for event in events(tmp_path, "train")}
    assert found == pytest.approx(norms, abs=1e-3)
    manifest = atomic.read_json(step_directory(tmp_path, 20) / "manifest.json")
    expected = atomic.read_json(step_directory(reference, 20) / "manifest.json")
    assert set(manifest["files"]) == set(expected["files"])
    for name in ("model.safetensors", "training_state.safetensors"):
        ours, theirs = (load_file(step_directory(d, 20) / name) for d in (tmp_path, reference))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            if not key.startswith("rng."):
                torch.testing.assert_close(ours[key], tensor, atol=1e-4, rtol=1e-3, msg=key)


def test_gradients_are_reduced_while_others_are_computed(tmp_path: Path) -> None:
    """Compiled, DDP: by the trace of a step, reductions begin before the last part of the backward
    pass does. PyTorch's DDPOptimizer divides the graph at the buckets
    (torch/_dynamo/backends/distributed.py); as one graph, none would."""
    write_tiny(tmp_path)
    result = on_ranks(
        tmp_path, 2, "--train_steps", "3", "training.compile=true", "training.parallel=ddp",
        "model.hidden_size=768", "model.num_hidden_layers=2", "model.intermediate_size=3072",
        "training.gradient_accumulation_steps=1", "training.profile=[2,2]",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    (path,) = (tmp_path / "run/logs/profile").iterdir()
    assert path.name == "step_000002-000002.json.gz" and f"profile/{path.name}" in result.stdout
    recorded = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    starts = {
        name: [event["ts"] for event in recorded if event.get("name") == name]
        for name in ("c10d::allreduce_", "CompiledFunctionBackward")
    }
    last = max(starts["CompiledFunctionBackward"])
    before = sum(start < last for start in starts["c10d::allreduce_"])
    assert before >= 2, starts


@pytest.mark.parametrize(("kind", "optimizer"), [("ddp", "adamw"), ("fsdp", "muon")])
def test_killed_and_resumed_on_one_process(
    references: dict[str, Path], tmp_path: Path, kind: str, optimizer: str
) -> None:
    """SIGKILL of a two-process run, then one process: the losses go on as they would have."""
    write_tiny(tmp_path)
    words = ("--resume", "auto", *WORDS[optimizer])
    killed = on_ranks(
        tmp_path, 2, f"training.parallel={kind}", *words, FAULT="step.forward:kill:25"
    )
    assert killed.returncode != 0
    alone = train(tmp_path, "--train_steps", "20", *SETTINGS, *words)
    assert alone.returncode == 0, alone.stdout
    assert "resumed from" in alone.stdout
    assert losses(tmp_path) == pytest.approx(losses(references[optimizer]), abs=1e-4)


@pytest.mark.parametrize("optimizer", WORDS)
def test_one_process_resumed_on_two(
    references: dict[str, Path], tmp_path: Path, optimizer: str
) -> None:
    """The other way round, with FSDP."""
    write_tiny(tmp_path)
    words = WORDS[optimizer]
    stopped = train(
        tmp_path, "--train_steps", "20", *SETTINGS, *words, FAULT="step.forward:term:40"
    )
    assert stopped.returncode == 143, stopped.stdout
    resumed = on_ranks(tmp_path, 2, "training.parallel=fsdp", "--resume", "auto", *words)
    assert resumed.returncode == 0, resumed.stdout
    assert losses(tmp_path) == pytest.approx(losses(references[optimizer]), abs=1e-4)
    state = json.loads((step_directory(tmp_path, 20) / "trainer_state.json").read_text())
    assert state["world_size"] == 2


def test_a_signal_to_two_processes(reference: Path, tmp_path: Path) -> None:
    """One rank gets SIGTERM: both stop at the same step, saved; rank 0's exit code is kept."""
    write_tiny(tmp_path)
    code = tmp_path / "code"
    stopped = torchrun(tmp_path, 2, FAULT="step.forward:term:21", EXIT_CODE_FILE=str(code))
    assert stopped.returncode != 0
    assert "stopped by a signal" in stopped.stdout
    assert code.read_text() == "143"
    assert train(tmp_path, "--train_steps", "20", *SETTINGS, "--resume", "auto").returncode == 0
    assert losses(tmp_path) == pytest.approx(losses(reference), abs=1e-4)


def test_a_signal_during_start_up_keeps_its_exit_code(tmp_path: Path) -> None:
    """torchrun has one exit code of its own; train.sh reads rank 0's from a file."""
    write_tiny(tmp_path)
    code = tmp_path / "code"
    began = time.monotonic()
    stopped = torchrun(tmp_path, 2, FAULT="cache.batch:term:1", EXIT_CODE_FILE=str(code))
    assert stopped.returncode != 0
    assert time.monotonic() - began < 25  # the rank that waits for rank 0 hears the signal too
    assert code.read_text() == "143"


PROBED = """
import os
from smollm import cli
from smollm.training import memory, setup

plain = setup.set_up

def set_up_and_probe(*arguments, **named):  # as on a GPU: fit_memory before the first step
    print("connections:", os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
    run = plain(*arguments, **named)
    memory.fit_memory(run)
    return run

setup.set_up = set_up_and_probe
import train
cli.execute(train.main)
"""


@pytest.mark.parametrize("fault", ["", "probe:memory:1"])
def test_the_memory_probe_leaves_sharded_training_alone(
    reference: Path, tmp_path: Path, fault: str
) -> None:
    """FSDP keeps unshared gradients, and cannot go on after a backward pass that ran out."""
    write_tiny(tmp_path)
    (tmp_path / "probed.py").write_text(PROBED)
    script = tmp_path / "probed.py"
    ours = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "DEFAULT_CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    result = on_ranks(tmp_path, 2, "training.parallel=fsdp", script=script, FAULT=fault, **ours)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("connections: None") == 2, result.stdout
    assert ("it fits; to make that permanent" in result.stdout) == bool(fault), result.stdout
    assert losses(tmp_path) == pytest.approx(losses(reference), abs=1e-4)


@pytest.mark.parametrize("ours", [True, False])
def test_fsdp_takes_back_our_connections(monkeypatch: pytest.MonkeyPatch, ours: bool) -> None:
    """env.sh's CUDA_DEVICE_MAX_CONNECTIONS=1 would keep FSDP2 from overlapping; a user's stays."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.delenv("DEFAULT_CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if ours:
        monkeypatch.setenv("DEFAULT_CUDA_DEVICE_MAX_CONNECTIONS", "1")
    distributed.allow_connections()
    assert ("CUDA_DEVICE_MAX_CONNECTIONS" in os.environ) != ours


@pytest.mark.long
def test_train_sh_with_two_processes_and_a_signal(reference: Path, tmp_path: Path) -> None:
    """SIGUSR1, a cluster's warning, goes through torchrun: saved, 138, nobody left, and resumed."""
    write_tiny(tmp_path)
    words = train_sh(tmp_path, *SETTINGS, "training.train_steps=20")
    settings = {"NO_INSTALL": "1", "NNODES": "1", "NPROC_PER_NODE": "2"}
    process = subprocess.Popen(
        words, cwd=tmp_path, env=environment(**settings, FAULT="step.forward:sleep:16"), text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    output = ""
    for line in process.stdout:
        output += line
        if "step  5/20" in line:
            process.send_signal(signal.SIGUSR1)
            break
    output += process.communicate(timeout=60)[0]
    assert process.returncode == 138, output
    assert "stopped by a signal" in output and "2 processes" in output
    with atomic.lock(tmp_path / "run/checkpoints/.lock"):  # nobody holds it any more
        pass
    again = call(tmp_path, words, **settings)
    assert again.returncode == 0, again.stdout
    found = losses(tmp_path)
    assert {step: found[step] for step in range(1, 21)} == pytest.approx(
        losses(reference), abs=1e-4
    )
    assert step_directory(tmp_path, 24).is_dir()  # phase 2, two processes as well


FAILS = """
import sys
from smollm import cli
from smollm.errors import ConfigError
cli.RANK_0_SECONDS = float(sys.argv[1])
def main():
    print("started", flush=True)
    raise ConfigError("it is wrong")
cli.execute(main)
"""


def test_rank_0_reports_and_the_others_wait_for_it() -> None:
    """torchrun ends all ranks when one leaves: the one that prints must not come second."""
    main = call(ROOT, [sys.executable, "-c", FAILS, "60"], RANK="0")
    assert (main.returncode, main.stdout.count("it is wrong")) == (2, 1)
    waiting = subprocess.Popen(
        [sys.executable, "-c", FAILS, "60"], cwd=ROOT, env=environment(RANK="1"), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert waiting.stdout.readline() == "started\n"
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(1)
    waiting.terminate()  # as torchrun does when rank 0 has left
    assert waiting.wait(5) == -signal.SIGTERM and waiting.stdout.read() == ""
    alone = call(ROOT, [sys.executable, "-c", FAILS, "0.1"], RANK="3")
    assert alone.returncode == 2 and "rank 3: error: " in alone.stdout


def test_an_error_is_said_once(tmp_path: Path) -> None:
    """Two processes and a bad configuration: one line, not two."""
    write_tiny(tmp_path)
    result = torchrun(tmp_path, 2, "training.batch_size=0")
    assert result.stdout.count("training.batch_size: got") == 1


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    """3 processes and 2 x 4 sequences."""
    write_tiny(tmp_path)
    result = torchrun(tmp_path, 3)
    assert "cannot be shared evenly by 3 processes" in result.stdout


DIFFERENT = """
import os, sys
sys.argv = sys.argv[1:]
if os.environ["RANK"] == "1":
    {change}
from smollm import cli
import train
try:
    cli.execute(train.main)
except SystemExit as end:  # this script is not the command's own process
    cli.leave(end.code)
"""


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ("sys.argv.append('training.learning_rate=0.1')", "2", "rank 1: training.learning_rate is"),
        ("sys.argv.append('training.seed=7')", "2", "rank 1: training.seed is 7, and 42 on rank 0"),
        ("sys.argv[sys.argv.index('text.txt')] = 'other.txt'", "3", "rank 1: text_sha256 is"),
        ("os.chdir('other')", "2", "rank 1: the weights is"),
    ],
)
def test_ranks_that_disagree(tmp_path: Path, change: str, code: str, said: str) -> None:
    """Another learning rate, seed, text or weights on rank 1: the rank and the difference in one
    line, nothing saved."""
    write_tiny(tmp_path)
    (tmp_path / "other.txt").write_text((tmp_path / "text.txt").read_text()[:20_000])
    (tmp_path / "different.py").write_text(DIFFERENT.format(change=change))
    words = command("train.py", "--train_steps", "20", *SETTINGS)[1:]
    if "chdir" in change:  # another machine, with other weights of the same name
        write_model(tmp_path / "model", shard_size="1GB")
        write_tiny(tmp_path / "other")
        path = shutil.copytree(tmp_path / "model", tmp_path / "other/model") / "model.safetensors"
        weights = load_file(path)
        weights["model.norm.weight"] *= 3
        save_file(weights, path, {"format": "pt"})
        words += ["--init_from", "model"]
    launcher = [sys.executable, "-m", "smollm.launch", "--standalone", "--nproc_per_node=2"]
    result = call(
        tmp_path, [*launcher, "different.py", *words], PYTHONPATH=str(ROOT),
        EXIT_CODE_FILE=str(tmp_path / "code"),
    )  # fmt: skip
    assert result.returncode == int(code), result.stdout
    assert result.stdout.count(said) == 1 and "Traceback" not in result.stdout, result.stdout
    assert not list((tmp_path / "run").rglob("step_*"))


@pytest.mark.long
def test_rank_0_chooses_the_checkpoint(reference: Path, tmp_path: Path) -> None:
    """After its sweep, for all: killed between the two renames of a save, both ranks go on from
    what rank 0 brings back; and a rank that sees another directory is named."""
    write_tiny(tmp_path)
    shutil.copytree(reference / "run", tmp_path / "run", symlinks=True)
    newest = step_directory(tmp_path, 20)
    newest.rename(newest.with_name(".tmp-replaced-step_000020-99"))
    result = on_ranks(tmp_path, 2, "--resume", "auto", "--train_steps", "21")
    assert result.returncode == 0 and "steps 20 -> 21" in result.stdout, result.stdout
    (tmp_path / "other").mkdir()
    shutil.copytree(step_directory(reference, 15), tmp_path / "other/step_000021")
    change = "sys.argv += ['--save_dir', 'other']"
    (tmp_path / "different.py").write_text(DIFFERENT.format(change=change))
    words = command("train.py", "--train_steps", "22", *SETTINGS, "--resume", "auto")[1:]
    launcher = [sys.executable, "-m", "smollm.launch", "--standalone", "--nproc_per_node=2"]
    again = call(tmp_path, [*launcher, "different.py", *words], PYTHONPATH=str(ROOT))
    assert again.returncode == 0, again.stdout  # both take rank 0's: it says which
    assert "steps 21 -> 22" in again.stdout
    # A save_dir of its own on rank 1's machine: empty, or with another run's step 22.
    foreign = tmp_path / "other/run/checkpoints/step_000022"
    for name in ("tiny.yaml", "text.txt"):
        shutil.copy(tmp_path / name, tmp_path / "other")
    (tmp_path / "different.py").write_text(DIFFERENT.format(change="os.chdir('other')"))
    words = command("train.py", "--train_steps", "23", *SETTINGS, "--resume", "auto")[1:]
    for there in ("None", repr(atomic.sha256(step_directory(reference, 15) / "manifest.json"))):
        if there != "None":
            shutil.copytree(step_directory(reference, 15), foreign)
        result = call(tmp_path, [*launcher, "different.py", *words], PYTHONPATH=str(ROOT))
        said = f"rank 1: the manifest of run/checkpoints/step_000022 is {there}, and"
        assert result.returncode == 3 and said in result.stdout, result.stdout


@pytest.mark.parametrize(
    ("words", "fault", "code", "said"),
    [
        (["training.batch_sise=2"], "", 2, "unknown key training.batch_sise"),
        ([], "step.forward:term:21", 143, "stopped by a signal"),
        ([], "step.forward:kill:21", 137, "was killed by signal 9 (out of memory?)"),
    ],
)
def test_the_launcher_has_our_voice(
    tmp_path: Path, words: list[str], fault: str, code: int, said: str
) -> None:
    """A misspelt key, a clean stop, a killed rank: one line each, and the exit code."""
    write_tiny(tmp_path)
    launcher = [sys.executable, "-m", "smollm.launch", "--standalone", "--nproc_per_node=2"]
    train_command = command("train.py", "--train_steps", "20", *SETTINGS, *words)[1:]
    result = call(
        tmp_path, [*launcher, *train_command], PYTHONPATH=str(ROOT), FAULT=fault,
        EXIT_CODE_FILE=str(tmp_path / "code"),
    )  # fmt: skip
    assert result.returncode == code and said in result.stdout, result.stdout
    assert "Traceback" not in result.stdout and "ChildFailed" not in result.stdout
    if not fault:
        assert len(result.stdout.splitlines()) == 1, result.stdout
