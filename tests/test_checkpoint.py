"""Checkpoints: damage is found, kills tear nothing, retention, locks, odd paths (C, K2, D, L3)."""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT, in_child, limit, python_sources

import checkpoint
import data
import files
from checkpoint import Checkpoint, CheckpointError
from config import CheckpointConfig, UserError

FILES = (
    "README.md", "config.json", "model.safetensors", "tokenizer.json", "trainer_state.json",
    "training_state.safetensors",
)  # fmt: skip

# --- helpers -------------------------------------------------------------------------------------


def tiny(step: int, width: int = 100, **state) -> Checkpoint:
    """A checkpoint of 2 x 40 kB whose tensors are a function of its step."""
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        step=step,
        weights={"model.weight": torch.randn(width, width, generator=generator)},
        training_state={
            "optimizer.exp_avg.model.weight": torch.randn(width, width, generator=generator),
            "rng.torch": torch.arange(16, dtype=torch.uint8),
        },
        trainer_state={
            "format_version": 1,
            "step": step,
            "tokens": 9,
            "elapsed_seconds": 1.0,
            "phase": 1,
            "val_loss": 2.5,
            "data": {},
            "config": {},
            **state,
        },
        documents={"config.json": {"a": [1, 2]}, "tokenizer.json": "{}", "README.md": "# A\n"},
    )


def assert_loads(directory: Path, step: int) -> None:
    """A checkpoint loads, and holds what was saved at its step."""
    checkpoint.require_whole(directory)
    loaded, saved = checkpoint.read(directory), tiny(step)
    assert loaded.step == step
    for name in ("weights", "training_state"):
        got, expected = getattr(loaded, name), getattr(saved, name)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.fixture
def root(tmp_path) -> Path:
    """A save_dir with whole checkpoints of steps 10 and 20."""
    for step in (10, 20):
        checkpoint.write(tmp_path / "save", tiny(step))
    return tmp_path / "save"


def entry(path: Path) -> dict:
    """What a manifest says of a file."""
    return {
        "size": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def agree(directory: Path) -> None:
    """Rewrite a directory's manifest such that it agrees with every file that is there."""
    entries = {p.name: entry(p) for p in directory.iterdir() if p.name != files.MANIFEST}
    text = json.dumps({"format_version": 1, "files": entries})
    (directory / files.MANIFEST).write_text(text)


def plant(root: Path, step: int, **state) -> Path:
    """A small whole checkpoint directory, made without the code under test and without fsync."""
    directory = root / f"step_{step:06d}"
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(step.to_bytes(4, "big") * 50)
    state = {"format_version": 1, "step": step, "phase": 1, **state}
    (directory / "trainer_state.json").write_text(json.dumps(state))
    agree(directory)
    return directory


def flip(path: Path, at: int, bit: int) -> None:
    """Flip one bit of a file, in place."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))


def door(*words: object) -> subprocess.CompletedProcess:
    """Run a script of the repository."""
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def assert_refused(done: subprocess.CompletedProcess, code: int, *fragments: object) -> None:
    """A script ended with `code` and one clear message, without a traceback."""
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert "Traceback" not in output and "should not happen" not in output
    for fragment in fragments:
        assert str(fragment) in output, output


# --- what a checkpoint is ------------------------------------------------------------------------


def test_a_checkpoint_has_its_files_and_loads(root):
    """Every file is in the manifest with its true size and sha256; links point at the newest."""
    directory = root / "step_000020"
    names = sorted(path.name for path in directory.iterdir())
    assert names == sorted([*FILES, "manifest.json"])
    manifest = json.loads((directory / "manifest.json").read_text())
    assert sorted(manifest["files"]) == sorted(FILES)
    for name, said in manifest["files"].items():
        assert said == entry(directory / name)
    assert files.problem(directory) is None
    assert checkpoint.newest_whole(root, pytest.fail) == directory
    assert checkpoint.newest_whole(root, pytest.fail, last=19) == root / "step_000010"
    assert checkpoint.newest_whole(root, pytest.fail, first=21) is None
    assert checkpoint.newest_whole(root / "none", pytest.fail) is None
    assert_loads(directory, 20)
    assert os.readlink(root / "latest") == "step_000020"
    assert sorted(os.listdir(root)) == ["latest", "step_000010", "step_000020"]


def test_every_file_of_a_checkpoint_can_be_read_by_those_whom_the_umask_allows(tmp_path):
    """The weights are as readable as the rest: mode 0644 with the usual umask, 0640 with 027."""
    for step, umask in ((10, 0o022), (20, 0o027)):
        before = os.umask(umask)
        try:
            checkpoint.write(tmp_path, tiny(step))
        finally:
            os.umask(before)
        for path in checkpoint.directory_of(tmp_path, step).iterdir():
            assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name


def test_a_directory_of_checkpoints_can_be_moved(root):
    """The links are relative: they hold after the directory was moved."""
    checkpoint.prune(root, CheckpointConfig())
    moved = root.rename(root.parent / "moved elsewhere")
    assert_loads(moved / "latest", 20)
    assert (moved / "best").resolve() == moved / "step_000010"  # equal losses: the earlier one


def test_a_copy_in_place_of_the_link_does_not_stop_saving(root):
    """Where a copy (cp -rL, object storage) made `latest` a directory, saving goes on."""
    (root / "latest").unlink()
    shutil.copytree(root / "step_000020", root / "latest")
    checkpoint.write(root, tiny(30))
    assert checkpoint.newest_whole(root, pytest.fail) == root / "step_000030"


def test_a_newer_format_is_refused(root):
    """A checkpoint of a later version of this code is named as that."""
    directory = root / "step_000020"
    (directory / "trainer_state.json").write_text('{"format_version": 99, "step": 20}')
    agree(directory)
    with pytest.raises(CheckpointError, match="has format 99, and this code knows 1"):
        checkpoint.read(directory)


# --- C1: bit flips -------------------------------------------------------------------------------


def test_random_bit_flips_are_all_found(root, request):
    """C1: a flipped bit anywhere in the newest checkpoint: found, file and step named, the previous
    checkpoint taken."""
    count = 5000 if request.config.getoption("--slow", default=False) else 200
    seed = int(os.environ.get("SEED", "1"))
    rng = random.Random(seed)
    print(f"seed {seed}, {count} flips")
    newest = root / "step_000020"
    sizes = {name: (newest / name).stat().st_size for name in [*FILES, "manifest.json"]}
    for number in range(count):
        # Every other flip anywhere by size (most bytes are weights), else in any of the files.
        weights = list(sizes.values()) if number % 2 else [1] * len(sizes)
        name = rng.choices(list(sizes), weights)[0]
        at, bit = rng.randrange(sizes[name]), rng.randrange(8)
        flip(newest / name, at, bit)
        wrong = files.problem(newest)
        case = f"{name}, byte {at}, bit {bit}"
        assert wrong is not None, case
        assert name in wrong or name == "manifest.json", (case, wrong)
        lines: list[str] = []
        assert checkpoint.newest_whole(root, lines.append) == root / "step_000010", case
        assert len(lines) == 1 and str(newest) in lines[0] and wrong in lines[0], lines
        flip(newest / name, at, bit)
    assert checkpoint.newest_whole(root, pytest.fail) == newest


def test_every_byte_of_the_manifest_is_watched(root):
    """C1 for the manifest itself: no bit of the proof can be flipped unseen."""
    newest = root / "step_000020"
    seed = 2
    rng = random.Random(seed)
    print(f"seed {seed}")
    content = (newest / "manifest.json").read_bytes()
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << rng.randrange(7)
        (newest / "manifest.json").write_bytes(damaged)
        assert files.problem(newest) is not None, bytes(damaged[max(at - 20, 0) : at + 20])


# --- C2: truncations -----------------------------------------------------------------------------

TRUNCATIONS = {
    **{f"to {size} bytes": lambda n, size=size: size for size in (0, 1, 512, 4096)},
    **{
        f"to {share} %": lambda n, share=share: int(n * share / 100)
        for share in (10, 50, 90, 99, 99.9, 99.99)
    },
    "by the last byte": lambda n: n - 1,
}


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.safetensors"])
@pytest.mark.parametrize("case", TRUNCATIONS)
def test_truncations_are_found(root, case, name):
    """C2: a file cut short: both sizes are said, the previous checkpoint is taken."""
    newest = root / "step_000020"
    before = (newest / name).stat().st_size
    after = TRUNCATIONS[case](before)
    os.truncate(newest / name, after)
    lines: list[str] = []
    assert checkpoint.newest_whole(root, lines.append) == root / "step_000010"
    (line,) = lines
    assert f"{newest}: {name} has {after:,} bytes, expected {before:,}" in line
    with pytest.raises(CheckpointError, match="step_000020: damaged.*there are: step_000010"):
        checkpoint.require_whole(newest)


# --- C3: other damage ----------------------------------------------------------------------------


def zero_page(path: Path) -> None:
    """Overwrite 4 kB with zeros, as a disk that lost a page does."""
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))


def edit(directory: Path, change: Callable[[dict], object]) -> None:
    """Change a manifest's content."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def swap(one: Path, other: Path) -> None:
    """Exchange the contents of two files."""
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def omit(directory: Path) -> None:
    """A manifest without the weights, which are then changed."""
    edit(directory, lambda manifest: manifest["files"].pop("model.safetensors"))
    zero_page(directory / "model.safetensors")


def replace(path: Path, target: Path | str) -> None:
    """A symbolic link in place of a file."""
    path.unlink()
    path.symlink_to(target)


MODEL, MANIFEST, STATE = "model.safetensors", "manifest.json", "trainer_state.json"
OTHER = "../step_000010/model.safetensors"
DAMAGE = {
    "zeroed page": (lambda d: zero_page(d / MODEL), MODEL),
    "all zeros": (lambda d: (d / MODEL).write_bytes(bytes((d / MODEL).stat().st_size)), MODEL),
    "another step's file": (lambda d: shutil.copy(d / OTHER, d / MODEL), MODEL),
    "two files swapped": (lambda d: swap(d / MODEL, d / "training_state.safetensors"), MODEL),
    "empty file": (lambda d: (d / MODEL).write_bytes(b""), MODEL),
    "one byte more": (lambda d: os.truncate(d / MODEL, (d / MODEL).stat().st_size + 1), MODEL),
    "missing file": (lambda d: (d / MODEL).unlink(), MODEL),
    "missing state": (lambda d: (d / STATE).unlink(), STATE),
    "directory for a file": (lambda d: ((d / MODEL).unlink(), (d / MODEL).mkdir()), MODEL),
    "dangling link": (lambda d: replace(d / MODEL, "nowhere"), MODEL),
    "link to another file": (lambda d: replace(d / MODEL, OTHER), MODEL),
    "link to an equal file": (
        lambda d: (shutil.copy(d / MODEL, d / "../copy"), replace(d / MODEL, "../copy")),
        MODEL,
    ),
    "link to itself": (lambda d: replace(d / MODEL, MODEL), MODEL),
    "FIFO for a file": (lambda d: ((d / MODEL).unlink(), os.mkfifo(d / MODEL)), MODEL),
    "manifest missing": (lambda d: (d / MANIFEST).unlink(), MANIFEST),
    "manifest empty": (lambda d: (d / MANIFEST).write_text(""), MANIFEST),
    "manifest is noise": (lambda d: (d / MANIFEST).write_bytes(bytes(range(256))), MANIFEST),
    "manifest is a list": (lambda d: (d / MANIFEST).write_text("[]"), MANIFEST),
    "manifest is nested": (lambda d: (d / MANIFEST).write_text("[" * 200_000), MANIFEST),
    "manifest is a directory": (
        lambda d: ((d / MANIFEST).unlink(), (d / MANIFEST).mkdir()),
        MANIFEST,
    ),
    "manifest names nothing": (lambda d: edit(d, lambda m: m["files"].clear()), MANIFEST),
    "manifest without sizes": (lambda d: edit(d, lambda m: m["files"][MODEL].clear()), MANIFEST),
    "manifest lies on a hash": (
        lambda d: edit(d, lambda m: m["files"][MODEL].update(sha256="0" * 64)),
        MODEL,
    ),
    "manifest leaves out a file": (omit, MODEL),
    "manifest leads outside": (
        lambda d: edit(d, lambda m: m["files"].update({OTHER: entry(d / OTHER)})),
        "outside",
    ),
    "manifest of another step": (
        lambda d: shutil.copy(d / "../step_000010" / MANIFEST, d / MANIFEST),
        MODEL,
    ),
    "empty directory": (lambda d: [path.unlink() for path in d.iterdir()], MANIFEST),
    "file for the directory": (lambda d: (shutil.rmtree(d), d.write_text("x")), "step_000020"),
    "dangling link for the directory": (
        lambda d: (shutil.rmtree(d), d.symlink_to("nowhere")),
        "step_000020",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_the_previous_checkpoint_taken(root, capsys, case):
    """C3: each kind of damage: file and step named, the one before taken; list and verify say so
    too; and the same when every checkpoint is damaged: CheckpointError, never a fresh start."""
    damage, name = DAMAGE[case]
    newest = root / "step_000020"
    damage(newest)
    lines: list[str] = []
    with limit(5):
        assert checkpoint.newest_whole(root, lines.append) == root / "step_000010"
        (line,) = lines
        assert str(newest) in line and name in line, line
        with pytest.raises(CheckpointError, match="step_000020"):
            checkpoint.require_whole(newest)
        assert checkpoint._verify(root) == 3
        output = capsys.readouterr().out
        assert f"{root / 'step_000010'}: whole" in output and f"{newest}: DAMAGED: " in output
        assert checkpoint._list(root) == 0
        assert "step_000020" in capsys.readouterr().out
        checkpoint.prune(root, CheckpointConfig(keep_last=1))
        assert_loads(root / "step_000010", 10)
        zero_page(root / "step_000010" / MODEL)
        with pytest.raises(CheckpointError, match="every checkpoint is damaged") as caught:
            checkpoint.newest_whole(root, lines.append)
    assert caught.value.exit_code == 3
    assert "step_000010" in str(caught.value) and "step_000020" in str(caught.value)


def test_a_damaged_checkpoint_can_be_saved_again(root):
    """The run that took the previous checkpoint writes the damaged step anew, whole."""
    zero_page(root / "step_000020" / MODEL)
    checkpoint.write(root, tiny(20))
    assert checkpoint.newest_whole(root, pytest.fail) == root / "step_000020"
    assert_loads(root / "step_000020", 20)


def test_all_damaged_is_never_a_silent_fresh_start(root):
    """C3 through the door: --resume auto with only damaged checkpoints exits 3 and names them."""
    for step in (10, 20):
        zero_page(checkpoint.directory_of(root, step) / MODEL)
    done = door("train.py", "--config", "config_cpu.yaml", "--save_dir", root, "--resume", "auto")
    assert_refused(done, 3, "every checkpoint is damaged", "step_000010", "step_000020", MODEL)
    assert sorted(checkpoint.steps(root)) == [10, 20]


# --- C4: hostile files ---------------------------------------------------------------------------


class Hostile:
    """An object that makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def hostile_bytes(marker: Path, archive: bool) -> bytes:
    """A hostile pickle, plain or in torch.save's archive."""
    buffer = io.BytesIO()
    if archive:
        torch.save({"model.weight": Hostile(marker)}, buffer)
    else:
        pickle.dump(Hostile(marker), buffer)
    return buffer.getvalue()


def test_the_hostile_pickles_are_hostile(tmp_path):
    """The check of the checks: loading one with pickle does execute it."""
    pickle.loads(hostile_bytes(tmp_path / "executed", archive=False))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("archive", [False, True], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("name", ["training_state.safetensors", MODEL, STATE, "tokenizer.json"])
def test_hostile_files_are_refused_and_execute_nothing(root, tmp_path, name, archive):
    """C4: a pickle in place of any file, with a manifest that agrees: refused, nothing executed."""
    marker, newest = tmp_path / "executed", root / "step_000020"
    (newest / name).write_bytes(hostile_bytes(marker, archive))
    agree(newest)
    assert files.problem(newest) is None
    with pytest.raises(CheckpointError, match="is not one of our checkpoints"):
        checkpoint.read(newest)
    assert checkpoint._list(root) == 0
    assert not marker.exists()


def test_planted_pickles_are_never_opened(root, tmp_path):
    """C4: pickles beside our files, in the manifest or not: the tensors are ours, nothing runs."""
    marker, newest = tmp_path / "executed", root / "step_000020"
    for name in ("training_state.pt", "pytorch_model.bin", "optimizer.pt"):
        (newest / name).write_bytes(hostile_bytes(marker, archive=True))
    with contextlib.suppress(CheckpointError):  # it may be refused for the files it does not name
        checkpoint.require_whole(newest)
    agree(newest)
    assert_loads(newest, 20)
    assert not marker.exists()


def test_a_hostile_checkpoint_is_refused_by_the_door(root, tmp_path):
    """C4 through generate.py: exit 3, one line, nothing executed."""
    marker, newest = tmp_path / "executed", root / "step_000020"
    (newest / MODEL).write_bytes(hostile_bytes(marker, archive=True))
    agree(newest)
    assert_refused(door("generate.py", "--checkpoint", newest), 3, newest)
    assert not marker.exists()


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['touch executed']", "__import__('os')", "{}", ""]
)
def test_a_hostile_tokenizer_is_refused(text, tmp_path, monkeypatch):
    """C4: a tokenizer.json that is no tokenizer is an error with its name; nothing is executed."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.InputError, match=r"tokenizer\.json: is not a tokenizer"):
        data.parse_tokenizer(text, "the checkpoint's tokenizer.json")
    assert os.listdir(tmp_path) == []


def test_no_module_can_execute_what_it_reads():
    """No module unpickles, evaluates, or loads YAML or PyTorch files in a way that can run code."""
    forbidden = re.compile(
        r"import pickle|torch\.load\((?![^)]*weights_only=True)|(?<![.\w])(eval|exec)\(|"
        r"yaml\.(unsafe_|full_)?load\(|trust_remote_code=True|np\.load\([^)]*allow_pickle=True"
    )
    for path in python_sources():
        assert not forbidden.search(path.read_text("utf-8")), path


# --- K2: kill -9 while saving --------------------------------------------------------------------


def save_for_ever(root: Path, report: int) -> None:
    """Save and prune, step after step, and report the start and each step that is on the disk."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (the process is killed)
    with checkpoint.lock(root):
        step = checkpoint.steps(root)[-1]
        os.write(report, step.to_bytes(4, "big"))
        while True:
            step += 1
            checkpoint.write(root, tiny(step))
            os.write(report, step.to_bytes(4, "big"))
            checkpoint.prune(root, CheckpointConfig(keep_last=2, keep_best=False))


def test_kill_9_while_saving_never_tears_a_checkpoint(tmp_path, request):
    """K2: SIGKILL at random times of a loop that saves every step: the newest checkpoint always
    loads, no step that was reported as saved is lost, and left-overs are swept."""
    count = 500 if request.config.getoption("--slow", default=False) else 100
    seed = int(os.environ.get("SEED", "3"))
    rng = random.Random(seed)
    root = tmp_path / "save"
    checkpoint.write(root, tiny(1))
    began = time.perf_counter()
    for step in range(2, 5):
        checkpoint.write(root, tiny(step))
    span = time.perf_counter() - began  # of three saves
    inside, saved = 0, 4
    for number in range(count):
        read, report = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                save_for_ever(root, report)
            os._exit(1)
        os.close(report)
        assert len(os.read(read, 4)) == 4, "the saving process did not start"
        time.sleep(rng.uniform(0, span))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        with open(read, "rb") as pipe:
            reported = pipe.read()
        assert os.WTERMSIG(status) == signal.SIGKILL, "the saving process died by itself"
        if reported:
            saved = int.from_bytes(reported[-4:], "big")
        inside += any(path.name.startswith(".tmp-") for path in root.iterdir())
        newest = checkpoint.newest_whole(root, pytest.fail)  # nothing is even named damaged
        assert newest is not None, f"kill {number} of seed {seed}"
        step = int(newest.name[5:])
        assert step >= saved, f"kill {number} of seed {seed}: step {saved} was saved and is lost"
        assert_loads(newest, step)
        checkpoint.require_whole(root / "latest")
    with checkpoint.lock(root):  # the kernel freed the lock of the killed process
        assert not list(root.glob(".tmp-*"))
    print(f"seed {seed}: {count} kills, {inside} of them inside a save, {saved} saves, none torn")
    assert inside >= count / 10 and saved >= count / 10  # the kills fall where they are meant to


POINTS = (
    "save.begin", "save.weights", "save.files", "save.hashed", "save.manifest", "remove.renamed",
    "save.renamed", "save.linked", "prune.begin",
)  # fmt: skip


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("step", [20, 30], ids=["same step", "next step"])
def test_a_crash_at_any_point_leaves_a_whole_checkpoint(tmp_path, step, point):
    """A kill between any two operations of saving step 20 again, or of saving step 30, where step
    20 is the only checkpoint: one of them is whole afterwards, and `latest` is not dangling."""
    root = tmp_path / "save"
    checkpoint.write(root, tiny(20))

    def save() -> str:
        os.environ["FAULT"] = f"{point}:kill"
        checkpoint.write(root, tiny(step))
        checkpoint.prune(root, CheckpointConfig(keep_last=1))
        return "done"

    ended = in_child(save)
    if not (point == "remove.renamed" and step == 30 and ended == "done"):
        assert ended == f"child ended with status {signal.SIGKILL}"
    with checkpoint.lock(root):
        newest = checkpoint.newest_whole(root, pytest.fail)
    assert newest is not None, "the only checkpoint is gone"
    assert_loads(newest, int(newest.name[5:]))
    checkpoint.require_whole(root / "latest")
    assert not list(root.glob(".tmp-*"))


# --- D4: retention -------------------------------------------------------------------------------


def random_save_dir(rng: random.Random, root: Path, hidden: bool) -> dict[int, dict]:
    """Fill a save_dir; returns for each truly whole step its val_loss and phase_end.

    With `hidden` some checkpoints have damage that only a hash can see.
    """
    whole: dict[int, dict] = {}
    for step in sorted(rng.sample(range(1, 400), rng.randint(1, 9))):
        state = {"val_loss": rng.choice((None, rng.uniform(1, 9))), "phase_end": rng.random() < 0.1}
        directory = plant(root, step, **state)
        kind = rng.choice(("whole",) * 6 + ("short", "bare", "empty") + ("flip",) * 6 * hidden)
        if kind == "short":
            os.truncate(directory / MODEL, 7)
        elif kind == "bare":
            (directory / MANIFEST).unlink()
        elif kind == "empty":
            shutil.rmtree(directory)
            directory.mkdir()
        elif kind == "flip":
            flip(directory / MODEL, rng.randrange(200), rng.randrange(8))
        else:
            whole[step] = state
    if not whole:
        whole[500] = {"val_loss": 5.0, "phase_end": False}
        plant(root, 500, **whole[500])
    for name in rng.sample(["step_12", "step_0000012", "step_000050.bak", "backup", "step_x"], 2):
        shutil.copytree(checkpoint.directory_of(root, max(whole)), root / name)
    for name in rng.sample(["notes.txt", "step_000401", "wandb_run_id", "step_000402.tar"], 2):
        (root / name).write_text("mine")
    for path in root.rglob("*"):
        moment = rng.uniform(0, 2**31)
        os.utime(path, (moment, moment))
    return whole


def expected_steps(whole: dict[int, dict], keep: CheckpointConfig) -> tuple[set[int], int | None]:
    """The steps that stay, and the best one, by the promise and not by the code."""
    stay = set(sorted(whole)[-keep.keep_last :]) | (set(whole) & set(keep.keep_steps))
    stay |= {step for step, state in whole.items() if state["phase_end"]}
    losses = sorted((s["val_loss"], step) for step, s in whole.items() if s["val_loss"] is not None)
    best = losses[0][1] if losses and keep.keep_best else None
    return stay | ({best} if best else set()), best


@pytest.mark.parametrize("number", range(50))
def test_retention_keeps_what_it_promises(tmp_path, number):
    """D4: newest k by step and not by time, best, phase ends and asked-for steps stay; nothing
    foreign or damaged is touched; never without a whole checkpoint."""
    print(f"seed {number}")
    rng = random.Random(number)
    root = tmp_path / "save"
    root.mkdir()
    whole = random_save_dir(rng, root, hidden=False)
    steps = tuple(rng.choices([*whole, 7, 13], k=rng.randrange(3)))
    keep = CheckpointConfig(number % 5 + 1, rng.random() < 0.7, steps)
    stay, best = expected_steps(whole, keep)
    before = set(os.listdir(root))
    gone = {f"step_{step:06d}" for step in set(whole) - stay}
    for _ in range(2):  # the second time nothing is left to do
        checkpoint.prune(root, keep)
        assert set(os.listdir(root)) - {"best"} == before - gone
    assert best is None or os.readlink(root / "best") == f"step_{best:06d}"
    for step in stay:
        assert files.problem(checkpoint.directory_of(root, step)) is None
    assert checkpoint.newest_whole(root, lambda line: None).name == f"step_{max(whole):06d}"


@pytest.mark.parametrize("number", range(25))
def test_retention_is_not_deceived_by_hidden_damage(tmp_path, number):
    """D4: checkpoints that only look whole never push out the last one that is."""
    print(f"seed {number}")
    rng = random.Random(f"hidden/{number}")
    root = tmp_path / "save"
    root.mkdir()
    whole = random_save_dir(rng, root, hidden=True)
    checkpoint.prune(root, CheckpointConfig(number % 2 + 1, rng.random() < 0.5))
    newest = checkpoint.newest_whole(root, lambda line: None)
    assert newest.name == f"step_{max(whole):06d}"


def test_a_run_that_passed_over_a_damaged_checkpoint_keeps_what_it_saves(tmp_path):
    """Resumed from 10 because 30 is damaged, saved at 20: 20 is not pruned in favour of 30."""
    for step in (10, 30):
        checkpoint.write(tmp_path, tiny(step))
    zero_page(tmp_path / "step_000030" / MODEL)
    assert checkpoint.newest_whole(tmp_path, lambda line: None).name == "step_000010"
    checkpoint.write(tmp_path, tiny(20))
    checkpoint.prune(tmp_path, CheckpointConfig(keep_last=1, keep_best=False))
    assert checkpoint.newest_whole(tmp_path, lambda line: None).name == "step_000020"


def test_a_loss_that_is_not_a_number_is_never_the_best(tmp_path):
    """Retention and `best` pass over val_loss NaN, infinity, text and null."""
    for step, loss in enumerate((math.nan, 3.0, math.inf, 2.0, math.nan, None, "1.0", 4.0), 1):
        plant(tmp_path, step, val_loss=loss)
    checkpoint.prune(tmp_path, CheckpointConfig(keep_last=1))
    assert checkpoint.steps(tmp_path) == [4, 8]
    assert os.readlink(tmp_path / "best") == "step_000004"


def test_best_moves_on(tmp_path):
    """`best` follows the lowest loss, and the former best is pruned."""
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, 1.0), (50, 1.5)):
        checkpoint.write(tmp_path, tiny(step, val_loss=loss))
        checkpoint.prune(tmp_path, CheckpointConfig(keep_last=1))
        assert_loads(tmp_path / "latest", step)
    assert checkpoint.steps(tmp_path) == [40, 50]
    assert (tmp_path / "best").resolve().name == "step_000040"
    assert (tmp_path / "latest").resolve().name == "step_000050"


# --- no room -------------------------------------------------------------------------------------


def test_too_little_room_is_said_before_writing(root, monkeypatch):
    """DiskFullError with the needed and the free bytes; nothing is written."""
    monkeypatch.setattr(files, "free_bytes", lambda directory: 12_345)
    with pytest.raises(files.DiskFullError) as caught:
        checkpoint.write(root, tiny(30))
    numbers = [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]{3,}", str(caught.value))]
    assert 12_345 in numbers and any(80_000 < number < 2_000_000 for number in numbers)
    assert str(root) in str(caught.value) and caught.value.exit_code == 3
    assert checkpoint.steps(root) == [10, 20] and not list(root.glob(".tmp-*"))


@pytest.mark.parametrize("bytes_allowed", [0, 1_000, 39_000])
def test_no_room_while_writing_leaves_the_previous_checkpoint(root, bytes_allowed):
    """D1: RLIMIT_FSIZE in a process of its own: DiskFullError with both figures, the previous
    checkpoint whole, no left-overs; and the next save works when there is room again."""

    def save() -> str:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_allowed, hard))
        try:
            checkpoint.write(root, tiny(30))
            message = "no error"
        except files.DiskFullError as error:
            message = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        left = sorted(os.listdir(root))
        checkpoint.write(root, tiny(31))
        return json.dumps([message, left])

    message, left = json.loads(in_child(save))
    assert re.search(r"step_000030: File too large; [\d,]+ bytes are needed and [\d,]+ ", message)
    assert left == ["latest", "step_000010", "step_000020"]
    assert_loads(checkpoint.newest_whole(root, pytest.fail), 31)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MB."""
    path = tmp_path / "small disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"mount: {error}")
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("checked", [True, False], ids=["before", "while writing"])
def test_a_full_disk_leaves_the_previous_checkpoint(small_disk, monkeypatch, checked):
    """D1: a file system with room for one checkpoint: the second is refused with the figures, and
    saved when the room returns."""
    ballast = small_disk / "ballast"
    checkpoint.write(small_disk, tiny(10))
    ballast.write_bytes(bytes(files.free_bytes(small_disk) - 50_000))
    if not checked:
        monkeypatch.setattr(files, "require_space", lambda directory, needed: None)

    def save() -> str:
        try:
            checkpoint.write(small_disk, tiny(20))
            return "no error"
        except files.DiskFullError as error:
            return str(error)

    message = in_child(save)  # in a process of its own: a write by mmap would die of SIGBUS
    assert re.search(r"[\d,]+ bytes are needed and [\d,]+ are free", message), message
    assert not list(small_disk.glob(".tmp-*"))
    assert_loads(checkpoint.newest_whole(small_disk, pytest.fail), 10)
    ballast.unlink()
    assert in_child(save) == "no error"
    assert_loads(checkpoint.newest_whole(small_disk, pytest.fail), 20)


def test_the_writer_goes_on_after_a_failed_save(root, monkeypatch):
    """D1: Writer logs a failed save and goes on; the next one works; only wait(final) raises."""
    lines: list[str] = []
    saved: list[int] = []
    writer = checkpoint.Writer(
        root, CheckpointConfig(), lines.append, lambda point, path, size: saved.append(point.step)
    )
    with monkeypatch.context() as patch:
        patch.setattr(files, "free_bytes", lambda directory: 0)
        writer.save(tiny(30))
        writer.wait()
        with pytest.raises(CheckpointError, match="could not be written"):
            writer.wait(final=True)
    assert len(lines) == 1 and "step 30" in lines[0] and "0 are free" in lines[0]
    writer.save(tiny(40))
    writer.wait(final=True)
    assert saved == [40] and checkpoint.steps(root) == [10, 20, 40]


# --- the order of system calls -------------------------------------------------------------------


def traced(function: Callable[[], None], log: Path) -> list[str]:
    """The system calls that `function` makes on files, in order, as strace writes them."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    read, go = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.read(read, 1)
            function()
            os._exit(0)
        os._exit(1)
    calls = "openat,write,pwrite64,writev,ftruncate,fsync,fdatasync,rename,renameat,renameat2,"
    command = ["strace", "-f", "-y", "-s", "0", "-o", str(log), "-p", str(child)]
    tracer = subprocess.Popen(
        [*command, "-e", f"trace={calls}symlink,symlinkat,unlink,unlinkat"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(200):
        status = Path(f"/proc/{child}/status").read_text()
        if "TracerPid:\t0\n" not in status or tracer.poll() is not None:
            break
        time.sleep(0.02)
    attached = tracer.poll() is None
    os.write(go, b"x")
    ended = os.waitpid(child, 0)[1]
    error = tracer.communicate(timeout=20)[1]
    if not attached:
        pytest.skip(f"strace cannot attach here: {error.strip()}")
    assert ended == 0
    return log.read_text().splitlines()


def test_everything_is_flushed_before_it_is_renamed(tmp_path):
    """kill -9 cannot test fsync, so the order of system calls is asserted: each file is flushed
    after its last write, then the manifest, then the directory, then the rename, then the parent;
    then the link."""
    root = tmp_path / "save"
    checkpoint.write(root, tiny(10))
    lines = traced(lambda: checkpoint.write(root, tiny(20)), tmp_path / "strace.log")

    def last(pattern: str) -> int:
        found = [number for number, line in enumerate(lines) if re.search(pattern, line)]
        assert found, f"no {pattern} in:\n" + "\n".join(lines)
        return found[-1]

    temporary = rf"{re.escape(str(root))}/\.tmp-step_000020-\d+"
    rename = last(rf'rename\w*\(.*"{temporary}".*"[^"]*step_000020"')
    flushed = [last(rf"fsync\(\d+<{temporary}/{re.escape(name)}>\)") for name in FILES]
    for name, flush in zip(FILES, flushed, strict=True):
        # safetensors itself writes to a temporary name, and renames that.
        move = re.compile(rf'rename[^"]*"[^"]*/([^/"]+)"[^"]*"[^"]*/{re.escape(name)}"')
        moves = (move.search(line) for line in lines)
        names = "|".join(re.escape(n) for n in [name, *(move[1] for move in moves if move)])
        assert last(rf"(write\w*|pwrite64|ftruncate)\(\d+<{temporary}/({names})>") < flush, name
    manifest = last(rf"fsync\(\d+<{temporary}/manifest\.json>\)")
    assert max(flushed) < manifest
    assert last(rf"write\w*\(\d+<{temporary}/manifest\.json>") < manifest
    directory = last(rf"fsync\(\d+<{temporary}>\)")
    assert manifest < directory < rename
    parent = last(rf"fsync\(\d+<{re.escape(str(root))}>\)")
    assert rename < parent
    link = last(r'rename\w*\(.*"[^"]*\.tmp-link-latest[^"]*".*"[^"]*/latest"')
    assert rename < link and last(r"symlink\w*\(.*step_000020") < link


# --- the door ------------------------------------------------------------------------------------


def test_list_says_what_is_there_and_why(root):
    """`checkpoint.py list`: a line for each checkpoint with its reason; damaged ones are named."""
    plant(root, 30, val_loss=1.25, phase_end=True)
    os.truncate(root / "step_000010" / MODEL, 3)
    done = door("checkpoint.py", "list", root)
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
        done = door("checkpoint.py", "verify", target)
        assert done.returncode == 0, done.stderr
        assert "whole" in done.stdout and "DAMAGED" not in done.stdout
    zero_page(root / "step_000010" / MODEL)
    done = door("checkpoint.py", "verify", root)
    assert_refused(done, 3, f"{root}/step_000010: DAMAGED: {MODEL}", f"{root}/step_000020: whole")
    done = door("checkpoint.py", "verify", root / "step_000010")
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
def test_a_wrong_use_of_the_door_is_answered_at_once(words, code, fragment):
    """`checkpoint.py`: 2 for usage, 3 for what is no checkpoint; one line; torch is not waited
    for."""
    began = time.monotonic()
    done = door("checkpoint.py", *words)
    assert time.monotonic() - began < 3
    assert_refused(done, code, fragment)
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1


# --- the lock ------------------------------------------------------------------------------------


def test_a_second_run_is_refused_with_pid_and_host(root):
    """L1: the lock is held by one; the other gets LockedError (exit 5) with the holder's pid and
    host, at once; the kernel frees it when the holder is killed."""

    def attempt() -> str:
        try:
            with checkpoint.lock(root):
                return "free"
        except files.LockedError as error:
            assert error.exit_code == 5
            return str(error)

    with checkpoint.lock(root):
        message = in_child(attempt)
        assert str(root) in message
        assert f"pid {os.getpid()} on host {socket.gethostname()}" in message
        done = door("train.py", "--config", "config_cpu.yaml", "--save_dir", root)
        assert_refused(done, 5, f"pid {os.getpid()} on host {socket.gethostname()}", root)
    assert in_child(attempt) == "free"
    read, held = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), checkpoint.lock(root):
            os.write(held, b"x")
            time.sleep(60)
        os._exit(1)
    os.read(read, 1)
    assert f"pid {child} on host" in in_child(attempt)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert in_child(attempt) == "free"


def test_left_overs_are_swept_and_reported(root, capsys):
    """What dead writers left is removed at the next start, and only that."""
    for name in (".tmp-step_000030-999", ".tmp-removed-step_000005-999"):
        (root / name).mkdir()
        (root / name / "part").write_text("x")
    (root / ".tmp-link-latest-999").symlink_to("step_000030")
    (root / ".keep").write_text("mine")
    (root / "step_000010").rename(root / ".tmp-replaced-step_000010-999")
    with checkpoint.lock(root):
        error = capsys.readouterr().err
    assert error.count("\n") == 1 and "step_000010 brought back" in error
    for name in ("step_000030-999", "step_000005-999", "latest-999"):
        assert f"{name} removed" in error
    assert {".keep", ".lock", "latest", "step_000010", "step_000020"} == set(os.listdir(root))


# --- L3: odd paths -------------------------------------------------------------------------------


@pytest.fixture
def open_tmp() -> Iterator[Path]:
    """A directory that other users can reach (pytest's own are closed to them)."""
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


GOOD_PATHS = [
    "new", "a/b/c/new", "with spaces", " leading", "\u00fcml\u00e4ut/\u6df1\u3044", "-dash",
    "quo'te", "glob[*]?", "$HOME", "percent%s{}", "x" * 200, "link",
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD_PATHS)
def test_odd_directories_are_used(tmp_path, name):
    """L3: spaces, unicode, quotes, patterns, links: saved, pruned, listed and found again."""
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    root = tmp_path / name
    with checkpoint.lock(root):
        for step in (10, 20, 30):
            checkpoint.write(root, tiny(step))
            checkpoint.prune(root, CheckpointConfig(keep_last=1))
        assert_loads(checkpoint.newest_whole(root, pytest.fail), 30)
        assert_loads(root / "latest", 30)
    assert checkpoint._list(root) == checkpoint._verify(root) == 0


def make_read_only(path: Path, lock: bool) -> Path:
    """A directory that cannot be written, perhaps with the lock file of an earlier run."""
    path.mkdir()
    if lock:
        (path / ".lock").touch()
        (path / ".lock").chmod(0o666)
    path.chmod(0o555)
    return path


def with_left_over(path: Path) -> Path:
    """A directory with another user's left-over, which cannot be removed."""
    (path / ".tmp-step_000030-999").mkdir(parents=True)
    (path / ".tmp-step_000030-999" / "part").touch()
    path.chmod(0o777)
    return path


def with_lock_directory(path: Path) -> Path:
    """A directory in which everything is allowed, and `.lock` is a directory."""
    (path / ".lock").mkdir(parents=True)
    path.chmod(0o777)
    (path / ".lock").chmod(0o777)
    return path


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """A path after `make(path)`."""
    make(path)
    return path


BAD_PATHS = {
    "file": lambda t: made(t / "file", Path.touch),
    "below a file": lambda t: made(t / "file", Path.touch) / "save",
    "dangling link": lambda t: made(t / "link", lambda p: p.symlink_to("nowhere")),
    "link to itself": lambda t: made(t / "link", lambda p: p.symlink_to(p)),
    "link to a file": lambda t: made(
        t / "link", lambda p: ((t / "f").touch(), p.symlink_to(t / "f"))
    ),
    "FIFO": lambda t: made(t / "fifo", os.mkfifo),
    "device": lambda t: Path("/dev/null"),
    "below a device": lambda t: Path("/dev/null/save"),
    "kernel's directory": lambda t: Path("/proc/save"),
    "name too long": lambda t: t / ("x" * 256),
    "lock is a directory": lambda t: with_lock_directory(t / "save"),
    "read-only": lambda t: make_read_only(t / "save", lock=False),
    "read-only, used before": lambda t: make_read_only(t / "save", lock=True),
    "below read-only": lambda t: make_read_only(t / "save", lock=False) / "new",
    "closed": lambda t: made(t / "save", lambda p: p.mkdir(mode=0)),
    "another user's left-over": lambda t: with_left_over(t / "save"),
}


@pytest.mark.parametrize("case", BAD_PATHS)
def test_a_directory_that_cannot_be_used_is_named_before_any_work(open_tmp, case):
    """L3: one line with the path, exit code 3, when the lock is taken: not after hours of work."""
    root = BAD_PATHS[case](open_tmp)

    def attempt() -> str:
        try:
            with checkpoint.lock(root):
                return "taken"
        except UserError as error:
            return f"{error.exit_code} {error}"

    with limit(10):
        message = in_child(attempt, nobody=True)
    assert message.startswith(f"3 --save_dir {root}: "), message
    assert "\n" not in message


@pytest.mark.parametrize("words", [("--resume", "auto"), ("--resume", "{}/step_000005"), ()])
def test_the_door_names_a_wrong_save_dir_at_once(tmp_path, words):
    """L3 through train.py: a file in place of the directory: exit 3 within seconds."""
    (tmp_path / "file").touch()
    words = [word.format(tmp_path / "file") for word in words]
    began = time.monotonic()
    save = tmp_path / "file"
    done = door("train.py", "--config", "config_cpu.yaml", "--save_dir", save, *words)
    assert time.monotonic() - began < 3
    assert_refused(done, 3, f"--save_dir {save}: {save} is not a directory")
    assert len(done.stderr.splitlines()) == 1


def test_configuration_of_retention_is_what_these_tests_use():
    """keep_last, keep_best, keep_steps: the fields in the order in which they are given here."""
    names = [field.name for field in dataclasses.fields(CheckpointConfig)]
    assert names == ["keep_last", "keep_best", "keep_steps"]
