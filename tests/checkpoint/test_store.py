"""What a checkpoint is, and the command that lists and verifies them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import time

import pytest
import torch
from checkpoint_helpers import (
    FILES,
    MODEL,
    agree,
    assert_loads,
    assert_refused,
    entry,
    plant,
    run_command,
    tiny,
    zero_page,
)
from helpers import in_child, small_model

import checkpoint as command
from smollm.checkpoint import state, store
from smollm.config import CheckpointConfig, TrainingConfig
from smollm.errors import CheckpointError, ResourceError
from smollm.training.optimizer import build_optimizers


def test_a_checkpoint_has_its_files_and_loads(root):
    """Every file is in the manifest with its true size and sha256; links point at the newest."""
    directory = root / "step_000020"
    names = sorted(path.name for path in directory.iterdir())
    assert names == sorted([*FILES, "manifest.json"])
    manifest = json.loads((directory / "manifest.json").read_text())
    assert sorted(manifest["files"]) == sorted(FILES)
    for name, said in manifest["files"].items():
        assert said == entry(directory / name)
    assert store.problem(directory) is None
    assert store.newest_whole(root, pytest.fail) == directory
    assert store.newest_whole(root, pytest.fail, last=19) == root / "step_000010"
    assert store.newest_whole(root, pytest.fail, first=21) is None
    assert store.newest_whole(root / "none", pytest.fail) is None
    assert_loads(directory, 20)
    assert os.readlink(root / "latest") == "step_000020"
    assert sorted(os.listdir(root)) == ["latest", "step_000010", "step_000020"]


def test_every_file_of_a_checkpoint_can_be_read_by_those_whom_the_umask_allows(tmp_path):
    """The weights are as readable as the rest: mode 0644 with the usual umask, 0640 with 027."""
    for step, umask in ((10, 0o022), (20, 0o027)):
        before = os.umask(umask)
        try:
            store.write(tmp_path, tiny(step))
        finally:
            os.umask(before)
        for path in store.directory_of(tmp_path, step).iterdir():
            assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name


def test_a_directory_of_checkpoints_can_be_moved(root):
    """The links are relative: they hold after the directory was moved."""
    store.prune(root, CheckpointConfig())
    moved = root.rename(root.parent / "moved elsewhere")
    assert_loads(moved / "latest", 20)
    assert (moved / "best").resolve() == moved / "step_000010"  # equal losses: the earlier one


def test_a_copy_in_place_of_the_link_does_not_stop_saving(root):
    """Where a copy (cp -rL, object storage) made `latest` a directory, saving goes on."""
    (root / "latest").unlink()
    shutil.copytree(root / "step_000020", root / "latest")
    store.write(root, tiny(30))
    assert store.newest_whole(root, pytest.fail) == root / "step_000030"


def test_a_newer_format_is_refused(root):
    """A checkpoint of a later version of this code is named as that."""
    directory = root / "step_000020"
    (directory / "trainer_state.json").write_text('{"format_version": 99, "step": 20}')
    agree(directory)
    with pytest.raises(CheckpointError, match="has format 99, and this code knows 1"):
        store.read(directory)


def test_list_says_what_is_there_and_why(root):
    """`checkpoint.py list`: a line for each checkpoint with its reason; damaged ones are named."""
    plant(root, 30, val_loss=1.25, phase_end=True)
    os.truncate(root / "step_000010" / MODEL, 3)
    done = run_command("checkpoint.py", "list", root)
    assert done.returncode == 0 and done.stderr == ""
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert list(rows) == ["checkpoint", "step_000010", "step_000020", "step_000030"]
    assert "DAMAGED" in rows["step_000010"]
    assert "2.5000" in rows["step_000020"] and "newest" in rows["step_000020"]
    for word in ("1.2500", "newest", "best", "end of phase 1"):
        assert word in rows["step_000030"]


def test_verify_checks_every_file_of_every_checkpoint(root):
    """`checkpoint.py verify`: 0 when all are whole; 3 when one is damaged, and which file."""
    for target in (root, root / "step_000020", root / "latest"):
        done = run_command("checkpoint.py", "verify", target)
        assert done.returncode == 0, done.stderr
        assert "whole" in done.stdout and "DAMAGED" not in done.stdout
    zero_page(root / "step_000010" / MODEL)
    done = run_command("checkpoint.py", "verify", root)
    assert_refused(done, 3, f"{root}/step_000010: DAMAGED: {MODEL}", f"{root}/step_000020: whole")
    done = run_command("checkpoint.py", "verify", root / "step_000010")
    assert_refused(done, 3, "step_000010: damaged: ", MODEL, "there are: step_000020")


@pytest.mark.parametrize(
    ("words", "code", "fragment"),
    [
        ((), 2, "error: "),
        (("list",), 2, "error: "),
        (("check", "."), 2, "invalid choice"),
        (("list", ".", "--all"), 2, "unrecognized arguments"),
        (("list", "/nowhere"), 3, "/nowhere: holds no checkpoints"),
        (("verify", "/nowhere"), 3, "/nowhere: there is no such checkpoint"),
        (("verify", "checkpoint.py"), 3, "checkpoint.py: is not a checkpoint directory"),
        (("verify", "tests"), 3, "tests: holds no checkpoints and is none"),
        (("verify", "/dev/zero"), 3, "is not a checkpoint directory"),
    ],
)
def test_a_wrong_use_of_the_command_is_answered_at_once(words, code, fragment):
    """`checkpoint.py`: 2 for usage, 3 for what is no checkpoint; one line; torch is not waited
    for."""
    began = time.monotonic()
    done = run_command("checkpoint.py", *words)
    assert time.monotonic() - began < 3
    assert_refused(done, code, fragment)
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1


def test_what_is_pruned_meanwhile_is_no_damage(tmp_path):
    """verify and latest while a run saves and prunes as fast as it can: never DAMAGED."""
    root = tmp_path / "save"
    store.write(root, tiny(1))
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            for step in range(2, 9999):
                store.write(root, tiny(step))
                store.prune(root, CheckpointConfig(keep_last=1, keep_best=False))
        os._exit(1)
    try:
        for _ in range(40):
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                assert command.verify(root) == 0, output.getvalue()
            assert "DAMAGED" not in output.getvalue()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_best_is_removed_when_it_is_not_kept(root):
    """keep_best=false after true: the link does not dangle."""
    store.prune(root, CheckpointConfig(keep_last=1))
    assert (root / "best").is_dir()
    for step in (30, 40):
        store.write(root, tiny(step, val_loss=9.0))
        store.prune(root, CheckpointConfig(keep_last=1, keep_best=False))
    assert not os.path.lexists(root / "best") and store.steps(root) == [40]


def test_what_macos_leaves_in_a_checkpoint_is_no_damage(root):
    """`._*` and `.DS_Store`."""
    for name in ("._model.safetensors", ".DS_Store", "._config.json"):
        (root / "step_000020" / name).write_bytes(b"mac")
    assert store.problem(root / "step_000020") is None


def test_a_checkpoint_that_cannot_be_read_is_not_passed_over(open_tmp):
    """EACCES on the newest: exit 3, instead of training again from an older one."""
    root = open_tmp / "save"
    for step in (10, 20):
        store.write(root, tiny(step))
    root.chmod(0o755)
    (root / "step_000020" / "model.safetensors").chmod(0)

    def attempt() -> str:
        try:
            return str(store.newest_whole(root, lambda line: None))
        except ResourceError as error:
            return f"{error.exit_code} {error}"

    said = in_child(attempt, nobody=True)
    assert said.startswith("3 ") and "step_000020/model.safetensors: cannot be read" in said, said


def test_an_error_of_the_host_buffers_is_reported(monkeypatch):
    """The thread that allocates them has nobody to tell: the first save raises what it met."""
    model = small_model()
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory")

    def refuse(*arguments, **named):
        raise full

    monkeypatch.setattr(torch, "empty", refuse)
    copy = state.HostCopy(model, build_optimizers(model, TrainingConfig()), True, print)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        copy.take()


def test_the_first_weight_that_is_not_finite_is_found():
    """On the device, before anything is copied."""
    model = small_model()
    assert state.first_nonfinite(model) is None
    with torch.no_grad():
        model.model.layers[1].mlp.c_fc.bias[3] = float("inf")
        model.model.norm.weight[0] = float("nan")
    assert state.first_nonfinite(model) == "model.layers.1.mlp.c_fc.bias"
