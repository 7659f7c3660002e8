#!/usr/bin/env bash
# Makes the tests' environment, then runs pytest with the given arguments.
#
#   tests/run.sh                    what CI runs
#   tests/run.sh --slow -k kill     the long tiers of the tests with "kill" in their names
#   tests/run.sh -m gpu             the tests that need a GPU
#   SEED=7 tests/run.sh -k flip     another seed for flips, fuzz and kills while saving
cd "$(dirname "$0")/.." || exit 1
case " $* " in *" -h "* | *" --help "*)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' tests/run.sh
    exit 0
    ;;
esac
REQUIREMENTS="requirements.txt requirements-dev.txt requirements-eval.txt requirements-export.txt"
source ./env.sh || exit
export WANDB_MODE=${WANDB_MODE:-disabled}
echo "seeds: ${SEED:-as written in the tests; SEED=n sets another for flips, fuzz and kills while saving}"
# One process more than the processors: many tests wait for a timer or a signal.
exec "$PYTHON" -m pytest tests -n $(($(nproc) + 1)) --dist worksteal "$@"
