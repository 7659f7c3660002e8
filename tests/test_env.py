"""env.sh: the Python environment it makes or takes, and the variables it exports."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT


def source(directory: Path, then: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Source the env.sh of a directory in a bare environment, then run a line of bash."""
    bare = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(directory)}
    return subprocess.run(
        ["bash", "-c", f"source {directory}/env.sh || exit; {then}"], cwd="/", text=True,
        env={**bare, **extra}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
    )  # fmt: skip


def exported(**extra: str) -> dict[str, str]:
    """What the project's env.sh exports, beyond what was there."""
    result = source(ROOT, "env -0", NO_INSTALL="1", **extra)
    assert result.returncode == 0, result.stdout
    return dict(line.partition("=")[::2] for line in result.stdout.split("\0") if "=" in line)


SPECIFIED = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1", "WANDB_PROJECT": "smollm2-training",
    "WANDB_WATCH": "gradients", "WANDB_LOG_MODEL": "true", "WANDB_SILENT": "false",
    "WANDB_CONSOLE": "wrap", "WANDB_DISABLE_CODE": "false",
}  # fmt: skip


def test_the_specified_variables_and_their_overrides() -> None:
    """Each has the specification's value, or the one from outside."""
    found = exported()
    assert {name: found.get(name) for name in SPECIFIED} == SPECIFIED
    mine = {name: "mine" for name in SPECIFIED}
    found = exported(**mine)
    assert {name: found.get(name) for name in SPECIFIED} == mine


def test_debugging_variables_only_when_asked() -> None:
    """They make each kernel launch synchronous: only with DEBUG=1."""
    names = {
        "CUDA_LAUNCH_BLOCKING", "TORCH_USE_CUDA_DSA", "PYTORCH_USE_CUDA_DSA",
        "TORCH_SHOW_CPP_STACKTRACES",
    }  # fmt: skip
    assert not names & exported().keys()
    assert names <= exported(DEBUG="1").keys()


def test_the_allocator_settings_of_the_machine() -> None:
    """Without a GPU malloc's, with one PyTorch's; from outside they win."""
    found = exported(MALLOC_TOP_PAD_="5")
    if found["GPUS"] == "0":
        assert found["MALLOC_MMAP_MAX_"] == "0" and found["MALLOC_TOP_PAD_"] == "5"
        assert "PYTORCH_ALLOC_CONF" not in found
    else:
        assert found["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
        assert "MALLOC_MMAP_MAX_" not in found


@pytest.mark.parametrize(
    ("mine", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "a:1"}, "a:1"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "b:1"}, None),
    ],
)
def test_the_allocator_settings_beside_a_gpu(tmp_path: Path, mine: dict, expected: str) -> None:
    """PyTorch's; a user's own stay, under its older name too."""
    python = tmp_path / "python"  # stands for one whose torch counts two GPUs
    python.write_text("#!/bin/sh\necho 2\n")
    python.chmod(0o755)
    found = exported(PATH=f"{tmp_path}:/usr/bin:/bin", GPU_DEVICES="/dev/null", **mine)
    assert found["GPUS"] == "2" and found.get("PYTORCH_ALLOC_CONF") == expected
    assert "MALLOC_MMAP_MAX_" not in found


def test_connections_of_a_user_are_not_marked_as_ours() -> None:
    """FSDP2 takes back what env.sh has set, and only that."""
    assert exported()["DEFAULT_CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    found = exported(CUDA_DEVICE_MAX_CONNECTIONS="1")
    assert "DEFAULT_CUDA_DEVICE_MAX_CONNECTIONS" not in found


def write_wheel(directory: Path, version: str) -> None:
    """A wheel of a package that has nothing but a version."""
    info = f"smollm_test-{version}.dist-info"
    with zipfile.ZipFile(directory / f"smollm_test-{version}-py3-none-any.whl", "w") as wheel:
        metadata = f"Metadata-Version: 2.1\nName: smollm-test\nVersion: {version}\n"
        wheel.writestr(f"{info}/METADATA", metadata)
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", tags)
        wheel.writestr(f"{info}/RECORD", "")


def write_project(directory: Path) -> Path:
    """Put env.sh and a requirements.txt that can be met without a network into a directory."""
    shutil.copy(ROOT / "env.sh", directory)
    (directory / "requirements.txt").write_text("# a comment\nsmollm-test==1.0\n")
    for version in ("1.0", "2.0"):
        write_wheel(directory, version)
    return directory


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project in which no environment was made yet."""
    return write_project(tmp_path)


def test_the_environment_is_made_and_follows_the_requirements(project: Path) -> None:
    """Made when it is missing, left alone when it is right, filled again when they change."""
    local = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(project)}
    asked = "python -c 'import importlib.metadata as m; print(m.version(\"smollm-test\"))'"
    first = source(project, asked, **local)
    assert first.returncode == 0 and "making the Python environment .venv" in first.stdout
    assert first.stdout.endswith("\n1.0\n"), first.stdout
    assert source(project, asked, **local).stdout == "1.0\n"  # nothing is said, nothing installed
    (project / "requirements.txt").write_text("smollm-test==2.0\n")
    changed = source(project, asked, **local)
    assert "making" not in changed.stdout and changed.stdout.endswith("\n2.0\n"), changed.stdout
    active = {"PATH": f"{project}/.venv/bin:/usr/bin:/bin"}  # has it: taken as it is
    (project / "elsewhere").mkdir()
    shutil.copy(project / "env.sh", project / "elsewhere")
    shutil.copy(project / "requirements.txt", project / "elsewhere")
    assert source(project / "elsewhere", asked, **local, **active).stdout == "2.0\n"
    assert not (project / "elsewhere/.venv").exists()


def test_two_starts_make_one_environment(project: Path) -> None:
    """Several nodes of a cluster start train.sh in one directory at once."""
    local = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(project)}
    bare = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(project), **local}
    started = [
        subprocess.Popen(
            ["bash", "-c", f"source {project}/env.sh"], env=bare, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert sum("making" in output for output in outputs) == 1


def test_what_cannot_be_installed_is_said(project: Path) -> None:
    """No such version, or no network: one line with the way out, and exit code 3."""
    (project / "requirements.txt").write_text("smollm-test==9.9\n")
    failed = source(project, "true", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(project))
    assert failed.returncode == 3 and "NO_INSTALL=1" in failed.stdout, failed.stdout


def test_a_python_that_is_too_old_or_too_new_is_named(project: Path) -> None:
    """Before anything is installed."""
    (project / "bin").mkdir()
    fake = project / "bin/python"
    fake.write_text('#!/bin/sh\necho "3.9"; exit 1\n')
    fake.chmod(0o755)
    refused = source(project, "true", PATH=f"{project}/bin:/usr/bin:/bin")
    assert refused.returncode == 3 and "3.10 to 3.14" in refused.stdout, refused.stdout
    assert not (project / ".venv").exists()


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Environments with smollm-test 1.0 and 2.0, by its version, as env.sh makes them."""
    made = {}
    for version in ("1.0", "2.0"):
        directory = write_project(tmp_path_factory.mktemp("environment"))
        (directory / "requirements.txt").write_text(f"smollm-test=={version}\n")
        local = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(directory)}
        assert source(directory, "true", **local).returncode == 0
        made[version] = directory / ".venv"
    return made


@pytest.mark.parametrize(
    ("line", "taken"),
    [
        ("smollm-test==2.0  # minimum 1.0", True),
        ("smollm-test==2.0  # minimum 0.9.9", True),
        ("smollm-test==2.0  # minimum 1.0.1", False),
        ("smollm-test==2.0", False),
        ('smollm-test==2.0 ; python_version < "3.5"  # minimum 7', True),
        ("smollm-test==1.0\nsmollm-other==1.0  # minimum none", True),
        ("smollm-test==1.0\nsmollm-other==1.0  # minimum 0.1", False),
    ],
)
def test_an_active_environment_is_taken_from_the_minimum_on(
    project: Path, environments: dict[str, Path], line: str, taken: bool
) -> None:
    """An image's own PyTorch is not replaced; what is too old, or missing, is not taken."""
    (project / "requirements.txt").write_text(line + "\n")
    (project / ".venv").symlink_to(environments["2.0"])
    active = environments["1.0"] / "bin"
    result = source(
        project, 'echo "$PYTHON"', PATH=f"{active}:/usr/bin:/bin", PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(project),
    )  # fmt: skip
    assert (f"{active}/python" in result.stdout) == taken, result.stdout
    if taken and "2.0  # minimum" in line:
        assert "using the active Python environment: smollm-test 1.0" in result.stdout
    if not taken and "other" not in line:
        assert result.stdout.endswith(f"{project}/.venv/bin/python\n"), result.stdout


def test_uv_is_used_where_it_is_installed(project: Path) -> None:
    """To make the environment and to fill it (a stand-in that does the same with venv and pip)."""
    (project / "bin").mkdir()
    uv = project / "bin/uv"
    python = sys.executable
    uv.write_text(
        f"""#!/bin/bash
echo "uv $*" >> {project}/calls
if [ "$1" = venv ]; then exec {python} -m venv "${{@: -1}}"; fi
shift 4; exec .venv/bin/python -m pip install "$@"
"""
    )
    uv.chmod(0o755)
    path = f"{project}/bin:{Path(sys.executable).parent}:/usr/bin:/bin"
    local = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(project), "PATH": path}
    asked = "python -c 'import importlib.metadata as m; print(m.version(\"smollm-test\"))'"
    result = source(project, asked, **local)
    assert result.returncode == 0 and result.stdout.endswith("\n1.0\n"), result.stdout
    made, filled = (project / "calls").read_text().splitlines()
    assert made.startswith("uv venv --quiet --python") and made.endswith(".venv")
    assert filled == ("uv pip install --python .venv/bin/python --quiet -r requirements.txt")


def test_what_is_pinned_has_a_minimum() -> None:
    """One list: each exact version stands beside the oldest one that was seen to work."""
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            assert re.fullmatch(
                r"[a-z_]+==[\d.]+( ; python_version .*\"3.14\")? +# minimum \S+", line
            )
