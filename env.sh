# Sourced by train.sh and tests/run.sh: the Python environment and the environment variables.
# By hand: `source env.sh`, then `python train.py ...`
#
# An active Python environment is used when it has at least the minimum versions that REQUIREMENTS
# names (an image's own PyTorch serves); else .venv is made with the exact versions, by uv where it
# is installed, and filled again when they change. NO_INSTALL=1 takes the active one as it is.

REQUIREMENTS=${REQUIREMENTS:-requirements.txt}
_root=$(unset CDPATH; cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Whether a Python has what REQUIREMENTS asks for: `exact` versions, or the `minimum` ones that
# stand in the comments. Prints a line where the active environment differs from the exact ones.
_has_requirements() {
    "$1" - "$2" $REQUIREMENTS <<'PYTHON' 2>/dev/null
import re, sys
from importlib.metadata import PackageNotFoundError, version

def numbers(text):
    return [int(part) for part in re.findall(r"\d+", text.partition("+")[0])]

mode, others = sys.argv[1], []
for name in sys.argv[2:]:
    for line in open(name):
        line, _, comment = line.partition("#")
        package, _, wanted = line.partition(";")[0].strip().partition("==")
        marker = re.search(r'python_version (<|>=) "3\.(\d+)"', line)
        if 'platform_system == "Linux"' in line and not sys.platform.startswith("linux"):
            continue
        if not package or (marker and (sys.version_info[1] < int(marker[2])) != (marker[1] == "<")):
            continue
        least = re.search(r"minimum (\S+)", comment)
        try:
            found = version(package)
        except PackageNotFoundError:
            if mode == "exact" or not least or least[1] != "none":
                sys.exit(1)
            others.append(f"no {package}")
            continue
        if found.partition("+")[0] != wanted:
            if mode == "exact" or not least:
                sys.exit(1)
            if least[1] != "none" and numbers(found) < numbers(least[1]):
                sys.exit(1)
            others.append(f"{package} {found}")
if others:
    print("using the active Python environment:", ", ".join(others))
PYTHON
}

_make_environment() {
    local python
    python=$(command -v python || command -v python3) || {
        echo "error: there is no python on this machine; install Python 3.10 to 3.14" >&2
        return 3
    }
    if [ "${NO_INSTALL:-0}" = 1 ] || _has_requirements "$python" minimum; then
        PYTHON=$python
        return 0
    fi
    if ! _has_requirements .venv/bin/python exact; then
        # One at a time: several nodes of a cluster may start in one directory.
        (
            if command -v flock >/dev/null; then flock 9; fi
            _fill_environment "$python"
        ) 9>.venv.lock || return
    fi
    PATH="$_root/.venv/bin:$PATH"
    PYTHON=$_root/.venv/bin/python
}

_fill_environment() {
    local python=$1 version file files=() uv=""
    ! command -v uv >/dev/null || uv=1
    if [ ! -x .venv/bin/python ]; then
        version=$("$python" -c 'import sys
print("%d.%d" % sys.version_info[:2])
sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))') || {
            echo "error: $python is Python $version, and 3.10 to 3.14 is needed; activate one" >&2
            return 3
        }
        echo "making the Python environment .venv"
        if [ -n "$uv" ]; then
            uv venv --quiet --python "$python" .venv || return 3
        else
            "$python" -m venv .venv || return 3
        fi
    fi
    if ! _has_requirements .venv/bin/python exact; then
        echo "installing $REQUIREMENTS into .venv"
        for file in $REQUIREMENTS; do files+=(-r "$file"); done
        local install=(.venv/bin/python -m pip install)
        [ -z "$uv" ] || install=(uv pip install --python .venv/bin/python)
        "${install[@]}" --quiet "${files[@]}" || {
            echo "error: the installation failed (no network?); NO_INSTALL=1 uses the active" \
                "Python environment as it is" >&2
            return 3
        }
    fi
}

cd "$_root" || return
_make_environment || return

# The specification's variables; each can be set from outside. FSDP2 overlaps communication only
# with more than one connection: the program then takes back what was set here (smollm/distributed.py).
[ -n "${CUDA_DEVICE_MAX_CONNECTIONS:-}" ] || export DEFAULT_CUDA_DEVICE_MAX_CONNECTIONS=1
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export WANDB_PROJECT=${WANDB_PROJECT:-smollm2-training}
export WANDB_WATCH=${WANDB_WATCH:-gradients}
export WANDB_LOG_MODEL=${WANDB_LOG_MODEL:-true}
export WANDB_SILENT=${WANDB_SILENT:-false}
export WANDB_CONSOLE=${WANDB_CONSOLE:-wrap}
export WANDB_DISABLE_CODE=${WANDB_DISABLE_CODE:-false}

# Debugging aids: they make every kernel launch synchronous or print a lot, so only with DEBUG=1.
if [ "${DEBUG:-0}" = 1 ]; then
    export CUDA_LAUNCH_BLOCKING=${CUDA_LAUNCH_BLOCKING:-1}
    export TORCH_USE_CUDA_DSA=${TORCH_USE_CUDA_DSA:-1}     # the specification's: a flag of the build
    export PYTORCH_USE_CUDA_DSA=${PYTORCH_USE_CUDA_DSA:-1} # what a built PyTorch reads
    export TORCH_SHOW_CPP_STACKTRACES=${TORCH_SHOW_CPP_STACKTRACES:-1}
    export TORCH_DISTRIBUTED_DEBUG=${TORCH_DISTRIBUTED_DEBUG:-INFO}
fi

# Where there is no device file of a GPU (NVIDIA, Jetson, WSL2, AMD), torch need not be imported.
# GPU_DEVICES=none leaves the GPUs alone.
GPUS=0
for _device in ${GPU_DEVICES:-/dev/nvidia* /dev/nvhost* /dev/nvmap /dev/dxg /dev/kfd}; do
    [ ! -e "$_device" ] || GPUS=maybe
done
[ "$GPUS" = 0 ] ||
    GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null || echo 0)
export GPUS PYTHON PATH
if [ "$GPUS" = 0 ]; then
    # Keep freed memory in the process: a 100 MB tensor then costs no page faults each time.
    export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
    export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-17179869184}
    export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-268435456}
    # How long a thread that has finished its part spins before it sleeps. By default so long that
    # a busy process beside ours costs 9 of 10 tokens/s; docs/performance.md has the measurements.
    [ -n "${OMP_WAIT_POLICY:-}" ] || export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-7000}
elif [ -z "${PYTORCH_CUDA_ALLOC_CONF:-}" ]; then # its older name
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
fi
