"""W&B: everything is in the offline files, and it can never stop, stall or change a run (W1-W4)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import (
    ROOT,
    command,
    digest,
    environment,
    finished_run,
    losses,
    python_sources,
    train,
    write_tiny,
)

from smollm.config import WandbConfig
from smollm.tracking import wandb_run

SETTINGS = ("training.eval_steps=6", "training.sample_steps=6", "generation.num_samples=3")
KEY = "0123456789abcdef0123456789abcdef01234567"


def read_records(path: Path) -> Iterator:
    """The records of a .wandb file: LevelDB's log format around protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    data, position, whole = path.read_bytes(), 7, b""  # after the file's own header
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # the rest of a block is filled up
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, or last
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def records_of(directory: Path) -> list:
    """All records of the offline runs below a directory."""
    paths = sorted(directory.glob("run/logs/wandb/offline-run-*/*.wandb"))
    return [record for path in paths for record in read_records(path)]


def artifacts_of(records: list) -> list:
    """The artifacts that were logged."""
    found = []
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind == "artifact":
            found.append(record.artifact)
        elif kind == "request" and record.request.HasField("log_artifact"):
            found.append(record.request.log_artifact.artifact)
    return found


def history_of(records: list) -> list[dict]:
    """The logged rows."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            rows.append({key: json.loads(value) for key, value in items.items()})
    return rows


def test_offline_files_hold_everything(tmp_path: Path) -> None:
    """Metrics, the samples table, histograms, plots, artifacts and code, one run in both phases."""
    write_tiny(tmp_path)
    (tmp_path / "temporary").mkdir()
    home = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home/cache")}
    home |= {"TMPDIR": str(tmp_path / "temporary"), "PLOTS": "1"}
    words = ("wandb.mode=auto", *SETTINGS)
    first = train(tmp_path, *words, **home)
    assert first.returncode == 0, first.stdout
    assert "offline" in first.stdout and "wandb sync" in first.stdout
    second = train(tmp_path, *words, script="continue_training.py", **home)
    assert second.returncode == 0, second.stdout
    left = [path.name for path in (tmp_path / "temporary").iterdir()]
    assert not [name for name in left if not name.startswith("torchinductor")]  # PyTorch's cache
    assert not (tmp_path / "run/logs/wandb/tmp").exists()
    records = records_of(tmp_path)
    rows = history_of(records)
    trained = {row["step"]: row for row in rows if "train/loss" in row}
    assert sorted(trained) == list(range(1, 17))
    assert {step: row["train/loss"] for step, row in trained.items()} == losses(tmp_path)
    for key in ("train/learning_rate", "train/perplexity", "train/grad_norm", "train/tokens"):
        assert all(key in row for row in trained.values())
    keys = {key for row in rows for key in row}
    expected = {
        "eval/val_loss", "eval/val_perplexity", "sample/seconds", "sample/perplexity",
        "sample/generated_tokens", "samples", "sample_lengths", "plots/loss",
        "plots/learning_rate", "plots/gradient_flow", "plots/sample_lengths",
        "gradients/norms/layers.0", "gradients/model.layers.0.mlp.c_fc.weight",
    }  # fmt: skip
    found = {name for name in expected if any(k == name or k.startswith(name + "/") for k in keys)}
    assert found == expected, expected - found
    assert not any(key.startswith("parameters/") for key in keys)  # watch is gradients
    runs = {r.run.run_id for r in records if r.WhichOneof("record_type") == "run"}
    assert len(runs) == 1
    assert runs == {(tmp_path / "run/checkpoints/wandb_run_id").read_text().strip()}
    artifacts = artifacts_of(records)
    kinds = {artifact.type for artifact in artifacts}
    assert {"model", "logs", "code", "run_table"} <= kinds
    code = {entry.path for a in artifacts if a.type == "code" for entry in a.manifest.contents}
    sources = {str(path.relative_to(ROOT)) for path in python_sources()}
    assert {name for name in sources if not name.startswith("benchmarks/")} <= code
    assert {"config.yaml", "train.sh", "requirements.txt"} <= code
    models = [a for a in artifacts if a.type == "model"]
    assert any("final" in a.aliases for a in models)
    names = {entry.path for a in models for entry in a.manifest.contents}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert "training_state.safetensors" not in names
    tables = list(tmp_path.glob("run/logs/wandb/offline-run-*/files/media/table/samples_*.json"))
    newest = json.loads(max(tables, key=lambda path: path.stat().st_size).read_text())
    assert newest["columns"][:3] == ["step", "prompt", "text"]
    assert len(newest["data"]) >= 6
    size = (tmp_path / "run/checkpoints/latest/model.safetensors").stat().st_size
    same = [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size == size]
    assert {p.name for p in same} == {"model.safetensors"}  # W&B keeps no copies of the weights
    assert all("checkpoints" in p.parts for p in same)


@pytest.mark.parametrize(
    ("log_model", "aliases"),
    [
        ("false", []),
        ("true", [{"final", "phase-1"}]),  # the last checkpoint is the best one too
        ("all", [{"step-6"}, {"step-12"}]),
    ],
)
def test_which_models_are_logged(tmp_path: Path, log_model: str, aliases: list[set]) -> None:
    """Of none, of best and final, of each checkpoint."""
    write_tiny(tmp_path)
    home = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home/cache")}
    words = ("wandb.mode=offline", f"wandb.log_model={log_model}", "training.save_steps=6")
    result = train(tmp_path, *SETTINGS, *words, **home)
    assert result.returncode == 0, result.stdout
    models = [a for a in artifacts_of(records_of(tmp_path)) if a.type == "model"]
    assert [set(artifact.aliases) - {"latest"} for artifact in models] == aliases


@pytest.mark.parametrize(
    ("environment", "config", "expected"),
    [
        ({}, {}, ("smollm2-training", "gradients", "true")),
        ({"WANDB_WATCH": "false"}, {}, ("smollm2-training", "false", "true")),
        ({"WANDB_WATCH": "gradients"}, {"watch": "false"}, ("smollm2-training", "false", "true")),
        ({"WANDB_LOG_MODEL": "checkpoint"}, {}, ("smollm2-training", "gradients", "all")),
        ({"WANDB_LOG_MODEL": "no"}, {}, ("smollm2-training", "gradients", "false")),
        ({"WANDB_PROJECT": "mine"}, {"project": "other"}, ("mine", "gradients", "true")),
    ],
)
def test_environment_variables(
    monkeypatch: pytest.MonkeyPatch, environment: dict, config: dict, expected: tuple
) -> None:
    """A variable that differs from the specification's value wins over the configuration."""
    for name in ("WANDB_PROJECT", "WANDB_WATCH", "WANDB_LOG_MODEL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = wandb_run.settings(WandbConfig(**config))
    assert (settings.project, settings.watch, settings.log_model) == expected


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "off"}, "disabled"),
        ({"WANDB_MODE": "False"}, "disabled"),
        ({"WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_MODE": "online", "WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_MODE": "run"}, "online"),
        ({"WANDB_MODE": ""}, "online"),
    ],
)
def test_an_opt_out_is_never_misread(
    monkeypatch: pytest.MonkeyPatch, environment: dict, mode: str
) -> None:
    """With an API key: every word that W&B ever had for "do not upload" is honoured."""
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WANDB_API_KEY": KEY, **environment}.items():
        monkeypatch.setenv(name, value)
    assert wandb_run.choose_mode(WandbConfig())[0] == mode


@pytest.mark.parametrize("name", ["WANDB_MODE", "WANDB_LOG_MODEL", "WANDB_WATCH"])
def test_a_word_that_nobody_knows_is_an_error(tmp_path: Path, name: str) -> None:
    """It may have been meant as an opt-out: exit 2, before anything is tokenized or uploaded."""
    write_tiny(tmp_path)
    result = train(tmp_path, "wandb.mode=auto", WANDB_API_KEY=KEY, **{name: "nope"})
    assert result.returncode == 2, result.stdout
    assert f"{name}='nope': expected one of" in result.stdout and "Traceback" not in result.stdout
    assert not (tmp_path / "cache").exists()


def test_mode_is_chosen_without_asking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """auto: online with a key in the environment or in netrc, else offline."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_run.choose_mode(WandbConfig())[0] == "offline"
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    (tmp_path / "netrc").chmod(0o600)
    assert wandb_run.choose_mode(WandbConfig())[0] == "online"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert wandb_run.choose_mode(WandbConfig())[0] == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_run.choose_mode(WandbConfig())[0] == "disabled"
    monkeypatch.delenv("WANDB_MODE")
    assert wandb_run.choose_mode(WandbConfig(mode="offline"))[0] == "offline"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run without W&B."""
    return finished_run(tmp_path_factory, *SETTINGS)


def _train_and_compare(reference: Path, directory: Path, seconds: float, **extra: str) -> str:
    write_tiny(directory)
    began = time.monotonic()
    result = train(directory, *SETTINGS, "wandb.mode=online", **extra)
    assert result.returncode == 0, result.stdout
    assert time.monotonic() - began < seconds
    assert digest(directory) == digest(reference)
    assert losses(directory) == losses(reference)
    assert "Traceback" not in result.stdout
    return result.stdout


def test_wandb_is_not_installed(reference: Path, tmp_path: Path) -> None:
    """W1: a line, and the run goes on."""
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow/wandb.py").write_text("raise ImportError('No module named wandb')\n")
    output = _train_and_compare(reference, tmp_path, 60, PYTHONPATH=str(tmp_path / "shadow"))
    assert output.count("W&B: ImportError") == 1


def test_no_key_never_prompts(reference: Path, tmp_path: Path) -> None:
    """W1: online without a key: no question, a line, the run goes on."""
    output = _train_and_compare(
        reference, tmp_path, 60, HOME=str(tmp_path), WANDB_BASE_URL="http://127.0.0.1:9"
    )
    assert "the run goes on without it" in output


class _Fails(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        """Answer every request with an internal error."""
        self.send_response(500)
        self.end_headers()

    do_GET = do_POST  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


class _Dies(BaseHTTPRequestHandler):
    """Takes a run in as W&B's server does, and is gone from its first metrics on."""

    protocol_version = "HTTP/1.1"
    metrics = threading.Event()
    bucket = {
        "id": "r", "name": "n", "displayName": "d", "config": "{}", "historyLineCount": 0,
        "project": {"id": "p", "name": "smollm2-training", "entity": {"id": "e", "name": "e"}},
    }  # fmt: skip
    answer = {
        "viewer": {"id": "v", "entity": "e", "username": "u", "flags": "{}"},
        "serverInfo": {"features": []},
        "upsertBucket": {"bucket": bucket, "inserted": True},
        "model": {"bucket": None},
        "createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []},
    }

    def do_POST(self) -> None:
        """Answer every question with all that is known."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "file_stream" in self.path:
            self.metrics.set()
            self.close_connection = True
            return
        document = json.dumps({"data": self.answer}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(document)))
        self.end_headers()
        self.wfile.write(document)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize("returns", [False, True])
@pytest.mark.long
def test_a_server_that_dies_half_way(reference: Path, tmp_path: Path, returns: bool) -> None:
    """W2: W&B works at first; its server is killed in mid-run, and perhaps comes back."""
    died = threading.Event()
    handler = type("Handler", (_Dies,), {"metrics": threading.Event()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda request, address: None  # connections break: that is the point

    def die() -> None:
        handler.metrics.wait(60)
        server.shutdown()
        server.server_close()
        died.set()
        if returns:
            time.sleep(2)
            again = ThreadingHTTPServer(server.server_address, handler)
            again.handle_error = server.handle_error
            threading.Thread(target=again.serve_forever, daemon=True).start()

    threading.Thread(target=server.serve_forever, daemon=True).start()
    threading.Thread(target=die, daemon=True).start()
    output = _train_and_compare(
        reference, tmp_path, 75, HOME=str(tmp_path), WANDB_API_KEY=KEY,
        WANDB_BASE_URL=f"http://127.0.0.1:{server.server_address[1]}",
        FAULT="evaluate:sleep:2",
    )  # fmt: skip
    assert died.is_set(), output
    assert "Tracking run" in output


@pytest.mark.long
def test_servers_that_do_not_work(reference: Path, tmp_path: Path) -> None:
    """W2: one refuses, one hangs, one answers 500, the three runs at once (they mostly wait): the
    losses are bitwise those without W&B, and each ends within 75 s."""
    failing = ThreadingHTTPServer(("127.0.0.1", 0), _Fails)
    threading.Thread(target=failing.serve_forever, daemon=True).start()
    hanging, refusing = (socket.create_server(("127.0.0.1", 0), backlog=50) for _ in range(2))
    ports = {
        "refuses": refusing.getsockname()[1],
        "hangs": hanging.getsockname()[1],
        "answers 500": failing.server_address[1],
    }
    refusing.close()
    began, started = time.monotonic(), {}
    for name, port in ports.items():
        directory = tmp_path / name
        write_tiny(directory)
        url = {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": KEY}
        started[name] = subprocess.Popen(
            command("train.py", *SETTINGS, "wandb.mode=online"), cwd=directory, text=True,
            env=environment(HOME=str(directory), **url), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    for name, process in started.items():
        output = process.communicate(timeout=75)[0]
        assert process.returncode == 0 and time.monotonic() - began < 75, (name, output)
        assert "the run goes on without it" in output and "Traceback" not in output, (name, output)
        assert digest(tmp_path / name) == digest(reference)
        assert losses(tmp_path / name) == losses(reference)
    failing.shutdown()


def _services(process: subprocess.Popen[str]) -> list[int]:
    """W&B's own processes below a run's process, from Linux's /proc."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, parent = re.fullmatch(
                r"\d+ \((.*)\) \S (\d+) .*", status.read_text(), re.S
            ).groups()
            if parent == str(process.pid) and "wandb" in name:
                found.append(int(status.parent.name))
    return found


def test_the_service_is_killed_half_way(reference: Path, tmp_path: Path) -> None:
    """W2: SIGKILL of W&B's own process in mid-run: the run ends as it would have, and in time."""
    write_tiny(tmp_path)
    home = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home/cache")}
    process = subprocess.Popen(
        command("train.py", *SETTINGS, "wandb.mode=offline"), cwd=tmp_path, text=True,
        env=environment(PYTHONUNBUFFERED="1", FAULT="evaluate:sleep:2", **home),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    output, services = "", []
    for line in process.stdout:
        output += line
        if "Run data is saved" in line:  # W&B is up, while the run sleeps in its second evaluation
            services = _services(process)
            for service in services:
                os.kill(service, signal.SIGKILL)
            began = time.monotonic()
    assert process.wait() == 0, output
    assert services, "W&B's process was not found"
    assert time.monotonic() - began < 60
    assert "Traceback" not in output
    assert losses(tmp_path) == losses(reference)
    assert digest(tmp_path) == digest(reference)


def test_five_resumes_from_earlier_steps_are_one_run(tmp_path: Path) -> None:
    """W4: one run id, and metrics.jsonl has each step once."""
    write_tiny(tmp_path)
    ids = []
    for fault in [*["step.forward:kill:6"] * 5, ""]:
        code = train(tmp_path, "--resume", "auto", FAULT=fault).returncode
        assert code == (-9 if fault else 0)
        ids.append((tmp_path / "run/checkpoints/wandb_run_id").read_text().strip())
    assert sorted(losses(tmp_path)) == list(range(1, 13))
    state = json.loads((tmp_path / "run/checkpoints/latest/trainer_state.json").read_text())
    assert set(ids) == {state["wandb_run_id"]}


@pytest.mark.parametrize(
    ("content", "url"),
    [(b"machine caf\xe9 login x password y\n", "https://api.wandb.ai"), (b"", "http://[broken")],
)
def test_a_broken_discovery_ends_nothing(tmp_path: Path, content: bytes, url: str) -> None:
    """A Latin-1 byte in ~/.netrc, a broken WANDB_BASE_URL: not logged in, and the run goes on."""
    write_tiny(tmp_path)
    (tmp_path / ".netrc").write_bytes(content)
    words = ("--dry_run", "wandb.mode=auto")
    result = train(tmp_path, *words, HOME=str(tmp_path), WANDB_BASE_URL=url)
    assert result.returncode == 0 and "offline (not logged in" in result.stdout, result.stdout
