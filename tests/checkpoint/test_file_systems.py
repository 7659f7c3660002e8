"""Disks without links, locks or fsync of directories: a run ends, prunes and resumes there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from data_helpers import prepare
from helpers import ROOT, call, digest, finished_run, in_child, train, write_tiny

from smollm import atomic
from smollm.config import Config
from smollm.config_reader import load

SHIMS = {  # what the system calls answer on Google Drive, exFAT, SMB; Lustre, NFS; CIFS
    "links": """
import errno, os
def _refused(*_, **__): raise OSError({code}, "no links")
os.symlink = _refused
""",
    "locks": """
import errno, fcntl
def _refused(*_): raise OSError({code}, "no locks")
fcntl.flock = _refused
""",
    "fsync": """
import errno, os, stat
_fsync = os.fsync
def _files_only(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode): raise OSError({code}, "no fsync")
    _fsync(descriptor)
os.fsync = _files_only
""",
}
CODES = {
    "links": ["EPERM", "EOPNOTSUPP", "ENOSYS"],
    "locks": ["ENOSYS", "EOPNOTSUPP", "ENOLCK"],
    "fsync": ["EINVAL", "EOPNOTSUPP"],
}
NIGHT = [(feature, code) for feature, codes in CODES.items() for code in codes[1:]]
CASES = [(feature, codes[0]) for feature, codes in CODES.items()] + [("all", "EINVAL")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a disk that has everything."""
    return finished_run(tmp_path_factory)


@pytest.mark.parametrize(
    ("feature", "code"), CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in NIGHT]
)
def test_a_run_on_a_disk_that_lacks_it(
    reference: Path, tmp_path: Path, feature: str, code: str
) -> None:
    """One notice, exit 0, pruned, resumed, and all commands follow `latest` and `best`."""
    write_tiny(tmp_path)
    chosen = list(SHIMS) if feature == "all" else [feature]
    shim = "".join(SHIMS[name].format(code=f"errno.{code}") for name in chosen)
    (tmp_path / "sitecustomize.py").write_text(shim)
    here = {"PYTHONPATH": str(tmp_path)}
    stopped = train(tmp_path, FAULT="step.forward:term:15", **here)
    assert stopped.returncode == 143, stopped.stdout
    resumed = train(tmp_path, "--resume", "auto", **here)
    assert resumed.returncode == 0, resumed.stdout
    assert "failed" not in resumed.stdout and "Traceback" not in resumed.stdout
    for name in chosen:
        what = "fsync of directories" if name == "fsync" else name
        assert resumed.stdout.count(f"no {what} here") == 1, resumed.stdout
    assert digest(tmp_path) == digest(reference)
    left = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert left == sorted(path.name for path in (reference / "run/checkpoints").glob("step_*"))
    if "links" in chosen:
        assert (tmp_path / "run/checkpoints/latest").read_text() == "step_000012\n"
    latest = "run/checkpoints/latest"
    for words in (
        ["generate.py", "--checkpoint", latest, "--num_samples", "1"],
        ["checkpoint.py", "verify", latest],
        ["checkpoint.py", "list", "run/checkpoints"],
        [
            "train.py", "--config", "tiny.yaml", "--input_file", "text.txt", "--resume", latest,
            "--save_dir", "branch", "--log_dir", "branch/logs", "--train_steps", "13",
        ],
    ):  # fmt: skip
        shimmed = here if words[0] == "train.py" else {}  # the others write nothing
        done = call(tmp_path, [sys.executable, str(ROOT / words[0]), *words[1:]], **shimmed)
        assert done.returncode == 0, done.stdout


def test_a_lock_that_is_held_is_still_refused(tmp_path: Path) -> None:
    """EWOULDBLOCK is another run, not a missing feature."""
    write_tiny(tmp_path)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with atomic.lock(tmp_path / "run/checkpoints/.lock"):
        assert train(tmp_path).returncode == 5


def test_a_complete_cache_on_a_read_only_place_is_used(open_tmp: Path) -> None:
    """No lock file is wanted to read; an incomplete one is named."""
    write_tiny(open_tmp)
    assert train(open_tmp, "--dry_run").returncode == 0
    for path in [open_tmp, *open_tmp.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    (open_tmp / "cache/.lock").chmod(0o444)
    open_tmp.chmod(0o755)
    cache = f"data.cache_dir={open_tmp / 'cache'}"

    def prepared(config: Config) -> str:
        try:
            corpus = prepare(config, open_tmp / "text.txt")
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return f"{len(corpus.train)} tokens"

    config = load(open_tmp / "tiny.yaml", [cache])
    other = load(open_tmp / "tiny.yaml", [cache, "model.vocab_size=300"])
    assert in_child(lambda: prepared(config), nobody=True).endswith(" tokens")
    missing = in_child(lambda: prepared(other), nobody=True)
    assert missing.startswith("InputError: data.cache_dir"), missing
