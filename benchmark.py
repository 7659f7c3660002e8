"""Measure training, checkpoints, tokenization and generation, beside what others use.

    python benchmark.py --config config_cpu.yaml
    python benchmark.py --config config_cpu.yaml --only train --peer transformers --json out.json \\
        training.optimizer=adamw
    python benchmark.py --gpu_report report     # what only a GPU can show; at most 9 minutes
    python benchmark.py --config config.yaml --only train \\
        --peer transformers,transformers-compile training.batch_size=2 \\
        training.gradient_accumulation_steps=1 data.sequence_length=512

`source env.sh` before that sets the variables that train.sh runs with. The peers run without its
allocator settings, as their documentation has it, unless --same_environment is given. Every
measurement is a process of its own; ours and its peers take turns, --rounds times. The steps
measured are those of the training loop, on random token ids, uniform over the vocabulary. A ratio
above 1 says that ours is faster.

- tokenize: from a text to verified token files; the peer is Tokenizer.encode_batch alone.
- train: a step lasts from the end of one to the end of the next, data included, on either side; the
  peer is Hugging Face Trainer with the same architecture, batch, data shape and precision.
- checkpoint: how long the loop waits, what is lost in all (with the steps that are slower while it
  is written), when it is whole on the disk; resume: how long a fresh process takes to go on.
- generate: 3 samples of 100 tokens; the peer is transformers' generate with the same weights.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from smollm import cli
from smollm.config import Config, to_dict
from smollm.errors import ConfigError, UserError
from smollm.peers import ALLOCATOR, side_environment
from smollm.signals import StopSignals

Result = dict[str, Any]
MEASUREMENTS = ("tokenize", "train", "checkpoint", "generate")
PEERS = ("transformers", "transformers-compile")
DISTURBED = 0.05  # share of the CPUs; on 2 cores one busy neighbour can slow a step tenfold
SETTINGS = ("steps", "warmup", "rounds", "text_mb", "same_environment")
VARIABLES = (*ALLOCATOR, "OMP_", "KMP_", "LD_PRELOAD", "TORCH", "CUDA_", "TOKENIZERS_")


def _busy_seconds() -> float:
    """CPU seconds that everything else on this Linux machine has used so far."""
    with contextlib.suppress(OSError):
        user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
        own = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
        return used - own.ru_utime - own.ru_stime
    return 0.0


def _work(name: str, scratch: Path) -> Result:
    """Run one worker in a process of its own; notes how busy others kept the machine meanwhile."""
    variables = side_environment(
        os.environ, peer="transformers" in name, with_allocator="--same_environment" in sys.argv
    )
    others, began = _busy_seconds(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--worker", name, "--scratch", str(scratch)],
        env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if os.environ.get("DEBUG") == "1":
        print(done.stdout, done.stderr, file=sys.stderr)
    if done.returncode < 0:
        raise UserError(f"{name}: killed by signal {-done.returncode} (out of memory?)")
    if done.returncode:
        message = re.split("^error: ", done.stderr, flags=re.MULTILINE)[-1].strip()
        raise UserError(f"{name}: {message}", done.returncode)
    answer = json.loads((scratch / "answer.json").read_text("utf-8"))
    cores = (time.perf_counter() - began) * (os.cpu_count() or 1)
    answer["others_cpu_share"] = max(0.0, (_busy_seconds() - others) / cores)
    if answer["others_cpu_share"] > DISTURBED:
        cli.warn(
            f"warning: meanwhile other processes used {answer['others_cpu_share']:.0%} of the "
            "CPUs: the figures of this round are not to be trusted"
        )
    return answer


def _summary(rounds: list[Result]) -> Result:
    """One side's figures: the spread of all its seconds, and the median round of the others."""
    seconds = sorted(x for result in rounds for x in result["seconds"])
    quartiles = statistics.quantiles(seconds, method="inclusive") if seconds[1:] else seconds * 3
    others = {
        key: statistics.median(result[key] for result in rounds)
        for key, value in rounds[0].items()
        if isinstance(value, (int, float))
    }
    return {
        "seconds": quartiles[1],
        "minimum_seconds": seconds[0],
        "maximum_seconds": seconds[-1],
        "interquartile_seconds": quartiles[2] - quartiles[0],
        **others,
        "rounds": rounds,
    }


def _take_turns(what: str, sides: list[str], scratch: Path, rounds: int) -> Result:
    """Each side's summary after rounds of: ours, the peers, ours, the peers, ...; and ratios."""
    results: dict[str, list[Result]] = {side: [] for side in sides}
    for number in range(1, rounds + 1):
        for side in sides:
            cli.warn(f"{what}: round {number} of {rounds}: {side}")
            results[side].append(_work(f"{what} {side}", scratch))
    section: Result = {side: _summary(found) for side, found in results.items()}
    medians = {
        side: [statistics.median(result["seconds"]) for result in found]
        for side, found in results.items()
    }
    section["ratios"] = {
        peer: {
            "of_medians": section[peer]["seconds"] / section["ours"]["seconds"],
            "per_round": [b / a for a, b in zip(medians["ours"], medians[peer], strict=True)],
        }
        for peer in sides[1:]
    }
    return section


def measure(config: Config, arguments: argparse.Namespace, scratch: Path, result: Result) -> None:
    """Put all measurements that were asked for into `result`, one after the other."""
    turns = functools.partial(_take_turns, scratch=scratch, rounds=arguments.rounds)
    machine = result["machine"] = _work("environment", scratch)
    if "tokenize" in arguments.only:
        _work("text", scratch)
        result["tokenize"] = turns("tokenize", ["ours", "encode_batch"])
        for side in ("ours", "encode_batch"):
            summary = result["tokenize"][side]
            summary["mb_per_second"] = summary["mb"] / summary["seconds"]
    if "train" in arguments.only:
        sides = ["ours", *arguments.peer]
        result["train"] = turns("train", sides)
        for side in sides:
            summary = result["train"][side]
            speed = summary["tokens_per_second"] = config.tokens_per_step / summary["seconds"]
            for way in ("half", "full"):
                share = speed * machine[f"flops_per_token_{way}"] / (machine["peak_flops"] or 1)
                summary[f"mfu_{way}"] = share if machine["peak_flops"] else None
            if products := summary.get("matrix_products_seconds"):
                summary["matrix_products_share"] = products / summary["seconds"]
                summary["matrix_products_tokens_per_second"] = config.tokens_per_step / products
            firsts = [found["time_to_first_step_seconds"] for found in summary["rounds"]]
            summary["time_to_first_step_seconds"] = firsts[0]  # later rounds find compiled code
    if "checkpoint" in arguments.only:
        result["checkpoint"] = turns("checkpoint", ["ours"])
        result["resume"] = turns("resume", ["ours"])
    if "generate" in arguments.only:
        sides = ["ours", "transformers"] if arguments.peer else ["ours"]
        result["generate"] = turns("generate", sides)
        for side in sides:
            summary = result["generate"][side]
            summary["tokens_per_second"] = summary["tokens"] / summary["seconds"]


ROWS = {  # measurement -> (label, key of a side's summary, factor, digits)
    "tokenize": [
        ("MB/s", "mb_per_second", 1, 2),
        ("peak memory, GiB", "peak_memory_gib", 1, 2),
    ],
    "train": [
        ("tokens/s (median step)", "tokens_per_second", 1, 1),
        ("step, ms: median", "seconds", 1e3, 1),
        ("    minimum", "minimum_seconds", 1e3, 1),
        ("    maximum", "maximum_seconds", 1e3, 1),
        ("    interquartile range", "interquartile_seconds", 1e3, 1),
        ("matrix products alone, tokens/s", "matrix_products_tokens_per_second", 1, 1),
        ("    of that, %", "matrix_products_share", 100, 1),
        ("MFU half, %", "mfu_half", 100, 1),
        ("MFU full, %", "mfu_full", 100, 1),
        ("peak memory, GiB", "peak_memory_gib", 1, 2),
        ("start to first step, s", "time_to_first_step_seconds", 1, 2),
        ("waiting for data, % of a step", "data_wait_share", 100, 3),
    ],
    "checkpoint": [
        ("MB", "bytes", 1e-6, 1),
        ("the loop waits, s", "stall_seconds", 1, 3),
        ("training time lost in all, s", "lost_seconds", 1, 3),
        ("until it is on the disk, s", "seconds", 1, 2),
    ],
    "resume": [
        ("find and verify, s", "verify_seconds", 1, 2),
        ("read and load, s", "load_seconds", 1, 2),
        ("in all, until ready, s", "seconds", 1, 2),
        ("then the first step, s", "first_step_seconds", 1, 2),
    ],
    "generate": [("tokens/s", "tokens_per_second", 1, 1)],
}


def report(result: Result) -> Iterator[str]:
    """The result as lines for people."""
    if "machine" not in result:
        return
    machine, settings = result["machine"], result["config"]["training"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    yield f"device      {machine['device']}, {machine['cores']} cores; {versions}"
    length = result["config"]["data"]["sequence_length"]
    yield (
        f"run         {machine['parameters']:,} parameters, {machine['precision']}, compile "
        f"{settings['compile']}, {settings['batch_size']} x "
        f"{settings['gradient_accumulation_steps']} x {length:,} tokens a step"
    )
    yield f"attention   {machine['attention']}"
    allocator = [f"{k}={v}" for k, v in result["environment"].items() if k.startswith(ALLOCATOR)]
    peers = "; the peers too" if result["settings"]["same_environment"] else "; not for the peers"
    yield f"allocator   {' '.join(allocator) + peers if allocator else 'default'}"
    for name, rows in ROWS.items():
        if name not in result:
            continue
        sides = {side: found for side, found in result[name].items() if side != "ratios"}
        yield f"{name:<34}" + "".join(f"{side:>22}" for side in sides)
        for label, key, factor, digits in rows:
            values = [side.get(key) for side in sides.values()]
            shown = ["-" if value is None else f"{value * factor:,.{digits}f}" for value in values]
            yield f"  {label:<32}" + "".join(f"{value:>22}" for value in shown)
        for peer, ratio in result[name]["ratios"].items():
            rounds = ", ".join(f"{value:.2f}" for value in ratio["per_round"])
            yield f"  {ratio['of_medians']:.2f}x {peer} (rounds: {rounds})"


def _split(text: str) -> list[str]:
    """An argparse type: words, separated by commas, each of them once."""
    return list(dict.fromkeys(text.split(",")))


def _known(flag: str, words: Iterable[str], known: Iterable[str]) -> list[str]:
    """The words; raises ConfigError for one that is not among the known."""
    for word in words:
        if word not in known:
            raise ConfigError(f"{flag}: got {word!r}, expected {', '.join(known)}")
    return list(words)


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    number = cli.positive_integer
    cli.add_inputs(parser)
    parser.add_argument("--steps", type=number, default=20, help="timed steps a round (20)")
    parser.add_argument("--warmup", type=number, default=3, help="steps before these (3)")
    parser.add_argument("--rounds", type=number, default=3, help="(3)")
    parser.add_argument("--text_mb", type=number, default=20, help="text to tokenize (20)")
    parser.add_argument("--peer", type=_split, default=[], help=", ".join(PEERS) + " (none)")
    parser.add_argument(
        "--same_environment", action="store_true", help="env.sh's allocator settings for peers too"
    )
    parser.add_argument(
        "--only", type=_split, default=(), metavar="NAME,...",
        help=f"measurements ({', '.join(MEASUREMENTS)}), or stages of the report: see docs/gpu.md",
    )  # fmt: skip
    parser.add_argument(
        "--gpu_report",
        type=cli.path,
        metavar="DIR",
        help="check and measure what only a GPU can show, stage by stage: DIR/report.json and .md",
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), help="training.device")
    parser.add_argument(
        "--json", type=cli.path, metavar="FILE", help="write everything, raw times too"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser


def _check(arguments: argparse.Namespace, config: Config) -> None:
    """Raise ConfigError for what would otherwise fail after minutes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("benchmark.py measures one process; start it without torchrun")
    if arguments.gpu_report:
        if arguments.gpu_report.exists() and not arguments.gpu_report.is_dir():
            raise ConfigError(f"--gpu_report {arguments.gpu_report}: is no directory; name one")
        if arguments.json or arguments.peer:
            raise ConfigError(
                "--gpu_report has files and a peer of its own; leave --json and --peer out"
            )
        return
    missing = [n for n in ("transformers", "accelerate") if importlib.util.find_spec(n) is None]
    if arguments.peer and missing:
        raise ConfigError(
            f"--peer {','.join(arguments.peer)}: {' and '.join(missing)} cannot be imported; "
            "pip install -r requirements-eval.txt, or leave --peer out"
        )
    if arguments.peer and "train" in arguments.only and config.training.optimizer != "adamw":
        raise ConfigError(
            f"training.optimizer {config.training.optimizer}: the peers train with AdamW; add "
            "training.optimizer=adamw, or leave --peer out"
        )
    if "tokenize" in arguments.only:
        from smollm.data import files, formats  # what it needs may be missing: `execute` says so

        sources = files.find(config.data.input_files, Path(config.data.cache_dir), print)
        given = [path for source in sources for path in source.files]
        plain = len(given) == 1 and str(given[0]) == config.data.input_files[0]
        plain = plain and isinstance(given[0], Path) and not sources[0].is_tokens
        if not plain or formats.is_compressed(given[0]) or formats.kind_of(given[0]) != "text":
            raise ConfigError("--input_file: copies of one text file are tokenized; name one")
    if arguments.json and arguments.json.is_dir():
        raise ConfigError(f"--json {arguments.json}: is a directory; name a file")
    if arguments.json and not arguments.json.parent.is_dir():
        raise ConfigError(f"--json {arguments.json}: {arguments.json.parent} is no directory")


@contextlib.contextmanager
def _scratch(config: Config) -> Iterator[Path]:
    """A temporary directory, and an empty compiler's cache: the first round of a side fills it."""
    cache = Path(config.data.cache_dir)  # on the disk that training uses, not in a /tmp in memory
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob("benchmark-*-*"):  # of one that was killed
        if not Path(f"/proc/{left.name.split('-')[1]}").exists():
            shutil.rmtree(left, ignore_errors=True)
    temporary = functools.partial(tempfile.TemporaryDirectory, prefix=f"benchmark-{os.getpid()}-")
    with temporary(dir=cache.resolve()) as scratch, temporary() as compiled:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled
        yield Path(scratch)


def _command() -> str:
    """This command, as one would type it."""
    return shlex.join(["python", "benchmark.py", *sys.argv[1:]])


def main() -> int:
    """Measure what the command line asks for, each part in a process of its own.

    With --worker, which is added for these processes, make one measurement.
    """
    with StopSignals():
        return _main()


def _main() -> int:
    arguments = cli.parse(_parser(), None)
    config = cli.configuration(arguments)
    if arguments.worker:
        from smollm.benchmarking import WORKERS  # imports torch

        answer = WORKERS[arguments.worker](config, arguments)
        (arguments.scratch / "answer.json").write_text(json.dumps(answer), encoding="utf-8")
        return 0
    if not arguments.gpu_report:
        arguments.only = _known("--only", arguments.only, MEASUREMENTS) or MEASUREMENTS
    arguments.peer = [p for p in _known("--peer", arguments.peer, (*PEERS, "none")) if p != "none"]
    _check(arguments, config)
    if arguments.gpu_report:
        from smollm.gpu_report import document  # imports torch

        stages = _known("--only", arguments.only, document.STAGES) or [*document.STAGES]
        with _scratch(config) as arguments.scratch:
            document.write(arguments.gpu_report, stages, _command(), config, arguments)
        return 0
    result: Result = {
        "command": _command(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "settings": {k: getattr(arguments, k) for k in SETTINGS},
        "environment": {k: v for k, v in os.environ.items() if k.startswith(VARIABLES)},
        "config": to_dict(config),
    }
    try:
        with _scratch(config) as scratch:
            measure(config, arguments, scratch, result)
    finally:  # what was measured before an error or Ctrl-C is not lost
        if arguments.json and "machine" in result:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        for line in report(result):
            print(line)
    return 0


if __name__ == "__main__":
    cli.execute(main)
