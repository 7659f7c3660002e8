"""Compare what optimizers and schedules learn from the same steps: python benchmarks/learning.py

    python benchmarks/learning.py --quick                      # one comparison, minutes
    python benchmarks/learning.py --changes --output benchmarks/learning_input
    python benchmarks/learning.py --text debian.jsonl --output benchmarks/learning_large \\
        training.train_steps=400 training.batch_size=32        # debian_text.py makes the text

Model, tokenizer and text are the configuration's (config_cpu.yaml), the recipes are written below,
and a step is 16 sequences, for 350 steps, where no words `section.key=value` say otherwise; words
hold for all runs. Each run is train.py, a process of its own. A schedule is stretched to the run's
own length (the warm-up is a tenth of it), and ends are compared, never middles. The rate of each
recipe is the best of a factor-of-two grid on one seed, which grows until its best is inside. What
is done is kept in OUTPUT.json: the same command goes on where it was, and draws OUTPUT.png anew.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from smollm import atomic, cli, config_reader
from smollm.config import Config, to_dict
from smollm.errors import ConfigError, DivergedError, InputError, UserError

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = (  # of the words: the same steps whatever recipe the configuration has
    "training.train_steps=350", "training.batch_size=16",
    "training.gradient_accumulation_steps=1",
)  # fmt: skip
# Keys that words must not set: each run does.
SET_HERE = (
    "training.optimizer", "training.schedule", "training.learning_rate",
    "training.min_learning_rate", "training.adam_beta2", "training.weight_decay",
    "training.warmup_steps", "training.seed", "training.eval_steps", "training.logging_steps",
    "training.save_steps", "training.sample_steps", "generation.num_samples",
)  # fmt: skip
# Keys that make no difference to a run's losses, or are kept beside the settings.
NO_DIFFERENCE = (
    "training.train_steps", "training.continue_steps", "training.compile", "data.cache_dir",
    "data.input_files",
)  # fmt: skip
SEEDS = (42, 43, 44)
QUICK_RATES = {"AdamW, tuned": 2e-3, "Muon, tuned": 4e-3}  # what the whole study found
WARMUP_SHARE = 0.1  # of a run
HORIZONS = (0.25, 0.3, 0.4, 0.5, 0.55, 0.6, 0.7, 0.8)  # of the full length
QUICK_HORIZONS = (0.4, 0.55)

Words = dict[str, Any]  # section.key: value
Wanted = tuple[Words, int, int]  # a run's words, steps and seed


@dataclass(frozen=True)
class Recipe:
    """An optimizer with its schedule."""

    name: str
    words: Words
    first_rate: float  # of the grid that it is tuned on

    def at(self, rate: float) -> Words:
        """All words of the recipe, with a peak rate."""
        return {**self.words, "training.learning_rate": rate}


SPECIFICATION = Recipe(
    "AdamW 5e-4, cosine to a tenth",
    {
        "training.optimizer": "adamw", "training.schedule": "cosine",
        "training.min_learning_rate": 5e-5, "training.adam_beta2": 0.95,
        "training.weight_decay": 0.1,
    },
    5e-4,
)  # fmt: skip
TUNED: Words = {
    "training.schedule": "linear", "training.min_learning_rate": 0.0, "training.adam_beta2": 0.99,
    "training.weight_decay": 0.1,
}  # fmt: skip
ADAMW = Recipe("AdamW, tuned", {"training.optimizer": "adamw", **TUNED}, 2e-3)
MUON = Recipe("Muon, tuned", {"training.optimizer": "muon", **TUNED}, 4e-3)
# One change each, at the tuned rate and on all seeds.
WSD: Words = {"training.schedule": "wsd"}
WSD_HORIZONS = (0.4, 0.5, 0.55)  # of Muon with wsd, to the end of AdamW with wsd
CHANGES: dict[str, Words] = {
    "adam_beta2 0.95": {"training.adam_beta2": 0.95},
    "adam_beta2 0.98": {"training.adam_beta2": 0.98},
    "adam_beta2 0.995": {"training.adam_beta2": 0.995},
    "wsd to zero": WSD,
}


@dataclass
class Study:
    """Runs of one configuration on one text, and where their results are kept."""

    output: Path  # without its suffix
    config: Path
    text: Path
    words: list[str]  # section.key=value, for every run
    steps: int  # of a full run
    about: dict[str, Any]  # what all runs have in common
    jobs: int = 1
    changes: bool = False  # also runs with one change each
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def results(self, wanted: list[Wanted]) -> list[dict[str, Any]]:
        """The results of runs, each (words, steps, seed); those not yet done are done."""
        keys = [key_of(*each) for each in wanted]
        missing = {k: each for k, each in zip(keys, wanted, strict=True) if k not in self.runs}
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(self._run, *each): key for key, each in missing.items()}
            try:
                for future in concurrent.futures.as_completed(futures):
                    self._keep(futures[future], future.result())
            except BaseException:  # those that have begun are waited for, and kept
                pool.shutdown(cancel_futures=True)
                for future, key in futures.items():
                    if not future.cancelled() and future.exception() is None:
                        self.runs[key] = future.result()
                self.save()
                raise
        return [self.runs[key] for key in keys]

    def _keep(self, key: str, result: dict[str, Any]) -> None:
        """Take over a run's result, and say it."""
        self.runs[key] = result
        self.save()
        seconds = f"{result['seconds']:.0f} s" if self.jobs == 1 else ""
        print(f"val_loss {loss_of(result):.4f}  {seconds:>6}  {key}", flush=True)

    def read(self) -> None:
        """Take over what OUTPUT.json holds.

        Raises:
            ConfigError: it is of another study, or none; or it could not be written.
        """
        path = self.output.with_suffix(".json")
        if not path.parent.is_dir():
            raise ConfigError(f"--output {self.output}: {path.parent} is no directory")
        if not path.exists():
            return
        try:
            before = atomic.read_json(path)
            runs = before["runs"]
            changed = [key for key, value in self.about.items() if before[key] != value]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: is not of this program; name another --output") from error
        if changed:
            raise ConfigError(
                f"{path}: holds runs with other {', '.join(changed)}; name another --output"
            )
        self.runs = runs

    def save(self) -> None:
        """Write OUTPUT.json anew."""
        path = self.output.with_suffix(".json")
        with atomic.replacing(path) as temporary:
            runs = dict(sorted(self.runs.items()))
            lines = [f"  {json.dumps(key)}: {json.dumps(run)}" for key, run in runs.items()]
            about = json.dumps({**self.about, "runs": None})
            rows = ",\n".join(lines)
            temporary.write_text(about.replace('"runs": null', f'"runs": {{\n{rows}\n}}') + "\n")

    def _run(self, words: Words, steps: int, seed: int) -> dict[str, Any]:
        """Train once; returns what was measured at the end."""
        given = {
            **words, "training.seed": seed, "training.train_steps": steps,
            "training.warmup_steps": round(WARMUP_SHARE * steps), "training.eval_steps": steps,
            "training.logging_steps": steps, "training.save_steps": 999_999,
            "training.sample_steps": 999_999, "generation.num_samples": 1,
        }  # fmt: skip
        variables = {**os.environ, "WANDB_MODE": "disabled"}
        if self.jobs > 1:
            variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.jobs))
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [
                    sys.executable, str(ROOT / "train.py"), "--config", str(self.config),
                    "--input_file", str(self.text), "--save_dir", f"{folder}/checkpoints",
                    "--log_dir", f"{folder}/logs", *self.words,
                    *(f"{key}={value}" for key, value in given.items()),
                ],
                env=variables, capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode == DivergedError.exit_code:  # the rate was too large
                return {"val_loss": None, "seconds": 0.0, "jobs": self.jobs}
            if done.returncode:
                said = f"{done.stdout}{done.stderr}".strip().splitlines()[-1:]
                raise UserError(f"{key_of(words, steps, seed)}: {' '.join(said)}", done.returncode)
            lines = Path(folder, "logs", "metrics.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        last = {event["event"]: event for event in events}  # of each kind, the one at the end
        return {
            "val_loss": round(last["eval"]["val_loss"], 5),
            "val_bits_per_byte": round(last["eval"]["val_bits_per_byte"], 5),
            "train_loss": round(last["train"]["loss"], 5),
            "seconds": round(last["train"]["elapsed_seconds"], 2),
            "device": next(
                line.split(None, 1)[1] for line in done.stdout.splitlines() if "device " in line
            ),
            "jobs": self.jobs,  # of several at a time the seconds say nothing
        }

    # --- what is compared ---

    def tuned_rate(self, recipe: Recipe) -> float:
        """The best rate of a factor-of-two grid; it grows until the best one is inside."""
        grid = first_grid(recipe)
        while True:
            losses = [loss_of(r) for r in self.results([self.tuning(recipe, g) for g in grid])]
            best = losses.index(min(losses))
            if 0 < best < len(grid) - 1:
                return grid[best]
            grid = [grid[0] / 2, *grid] if best == 0 else [*grid, grid[-1] * 2]

    def tuning(self, recipe: Recipe, rate: float) -> Wanted:
        """One run of the grid."""
        return recipe.at(rate), self.steps, SEEDS[0]

    def grid(self, recipe: Recipe) -> dict[float, float]:
        """The losses of the rates that were tried."""
        rates = [recipe.first_rate * 2.0**power for power in range(-8, 9)]
        found = {rate: self.runs.get(key_of(*self.tuning(recipe, rate))) for rate in rates}
        return {rate: loss_of(result) for rate, result in found.items() if result}

    def horizon(self, share: float) -> int:
        """A share of the full length, in steps."""
        return round(share * self.steps)


def loss_of(result: dict[str, Any]) -> float:
    """The loss at the end of a run; infinite where it diverged."""
    return math.inf if result["val_loss"] is None else result["val_loss"]


def first_grid(recipe: Recipe) -> list[float]:
    """The rates that are tried first."""
    return [recipe.first_rate / 2, recipe.first_rate, recipe.first_rate * 2]


def key_of(words: Words, steps: int, seed: int) -> str:
    """The name of a run: its words without `training.`, its steps and its seed."""
    parts = [f"{k.removeprefix('training.')}={v}" for k, v in sorted(words.items())]
    return " ".join([*parts, f"steps={steps}", f"seed={seed}"])


def about_of(config: Config, text_sha256: str) -> dict[str, Any]:
    """What all runs of a study have in common: settings beside the defaults, text, steps."""
    defaults, values = to_dict(Config()), to_dict(config)
    settings = {
        f"{section}.{key}": value
        for section, keys in values.items()
        for key, value in keys.items()
        if value != defaults[section][key]
    }
    apart = (*SET_HERE, *NO_DIFFERENCE)
    settings = {key: value for key, value in settings.items() if key not in apart}
    steps = config.training.train_steps
    return {"settings": settings, "text_sha256": text_sha256, "steps": steps}


def compare(study: Study) -> dict[str, float]:
    """Tune both optimizers, then train all seeds at every horizon; returns the rates."""
    study.results([study.tuning(r, rate) for r in (ADAMW, MUON) for rate in first_grid(r)])
    rates = {r.name: study.tuned_rate(r) for r in (ADAMW, MUON)}
    study.results(
        [
            (words, steps, seed)
            for words, steps in [
                (SPECIFICATION.at(SPECIFICATION.first_rate), study.steps),
                *(
                    (recipe.at(rates[recipe.name]), study.horizon(share))
                    for recipe in (ADAMW, MUON)
                    for share in (*HORIZONS, 1.0)
                ),
                *(
                    ({**recipe.at(rates[recipe.name]), **change}, study.steps)
                    for change in (CHANGES.values() if study.changes else ())
                    for recipe in (ADAMW, MUON)
                ),
                *(
                    ({**MUON.at(rates[MUON.name]), **WSD}, study.horizon(share))
                    for share in (WSD_HORIZONS if study.changes else ())
                ),
            ]
            for seed in SEEDS
        ]
    )
    return rates


def tune(study: Study) -> str:
    """The grids and the specification's recipe on one seed, as a table; for large models."""
    study.results([study.tuning(r, rate) for r in (ADAMW, MUON) for rate in first_grid(r)])
    for recipe in (ADAMW, MUON):
        study.tuned_rate(recipe)
    study.results([study.tuning(SPECIFICATION, SPECIFICATION.first_rate)])
    rows = [
        f"| {recipe.name} | {rate:g} | {loss:.4f} |"
        for recipe in (SPECIFICATION, ADAMW, MUON)
        for rate, loss in study.grid(recipe).items()
    ]
    title = f"| recipe | learning rate | val_loss after {study.steps} steps |"
    return "\n".join([title, "|---|---|---|", *rows])


@dataclass(frozen=True)
class Ends:
    """The losses at the ends of runs that differ in their seed."""

    losses: list[float]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.mean(self.losses)

    @property
    def spread(self) -> float:
        """The largest minus the smallest."""
        return max(self.losses) - min(self.losses)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.spread:.3f})"


def ends(study: Study, words: Words, steps: int) -> Ends:
    """What runs of these words, one for each seed, ended at."""
    return Ends([loss_of(study.runs[key_of(words, steps, seed)]) for seed in SEEDS])


def steps_to(
    study: Study, words: Words, target: float, horizons: tuple[float, ...] = HORIZONS
) -> str:
    """The shortest horizon whose runs end at a loss or below it, as a cell."""
    for share in (*horizons, 1.0):
        found = ends(study, words, study.horizon(share))
        if found.mean <= target:
            return f"{study.horizon(share)} ({share:.2f}x), {found}"
    return "not reached"


def tables(study: Study, rates: dict[str, float]) -> str:
    """What was measured, in Markdown."""
    specification = ends(study, SPECIFICATION.at(SPECIFICATION.first_rate), study.steps)
    adamw, muon = ADAMW.at(rates[ADAMW.name]), MUON.at(rates[MUON.name])
    tuned = ends(study, adamw, study.steps)
    lines = [
        "| recipe | learning rate | val_loss after "
        f"{study.steps} steps: mean of three seeds (spread) |",
        "|---|---|---|",
        f"| {SPECIFICATION.name} | {SPECIFICATION.first_rate:g} | {specification} |",
        f"| {ADAMW.name} | {rates[ADAMW.name]:g} | {tuned} |",
        f"| {MUON.name} | {rates[MUON.name]:g} | {ends(study, muon, study.steps)} |",
        "",
        "| loss to reach | AdamW, tuned | Muon, tuned |",
        "|---|---|---|",
        *(
            f"| {name}: {target.mean:.3f} | {steps_to(study, adamw, target.mean)} | "
            f"{steps_to(study, muon, target.mean)} |"
            for name, target in (("the specification's", specification), ("tuned AdamW's", tuned))
        ),
    ]
    return "\n".join([*lines, *(change_rows(study, rates) if study.changes else [])])


def change_rows(study: Study, rates: dict[str, float]) -> list[str]:
    """A table of single changes; a difference below twice the spread is not claimed."""
    lines = ["", f"| one change, {study.steps} steps | AdamW | Muon |", "|---|---|---|"]
    for name, change in CHANGES.items():
        cells = []
        for recipe in (ADAMW, MUON):
            words = recipe.at(rates[recipe.name])
            base = ends(study, words, study.steps)
            found = ends(study, {**words, **change}, study.steps)
            difference = found.mean - base.mean
            claimed = abs(difference) >= 2 * max(found.spread, base.spread)
            verdict = ("better" if difference < 0 else "worse") if claimed else "no difference"
            cells.append(f"{found}: {difference:+.3f}, {verdict}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    adamw, muon = ({**r.at(rates[r.name]), **WSD} for r in (ADAMW, MUON))
    target = ends(study, adamw, study.steps).mean
    cells = [
        steps_to(study, MUON.at(rates[MUON.name]), target),
        steps_to(study, muon, target, WSD_HORIZONS),
    ]
    return [
        *lines, "", "| loss to reach | Muon, linear | Muon, wsd |", "|---|---|---|",
        f"| AdamW's with wsd: {target:.3f} | {' | '.join(cells)} |",
    ]  # fmt: skip


def draw(study: Study, rates: dict[str, float]) -> Path:
    """Two panels: the grid that the rates were tuned on, and the ends at each horizon."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for recipe, color in ((ADAMW, "tab:blue"), (MUON, "tab:red")):
        grid = study.grid(recipe)
        left.plot(grid.keys(), grid.values(), "o-", color=color, label=recipe.name)
        words, shares = recipe.at(rates[recipe.name]), (*HORIZONS, 1.0)
        found = [ends(study, words, study.horizon(share)) for share in shares]
        steps = [study.horizon(share) for share in shares]
        means = [each.mean for each in found]
        below = [each.mean - min(each.losses) for each in found]
        above = [max(each.losses) - each.mean for each in found]
        right.errorbar(steps, means, [below, above], fmt="o-", color=color, label=recipe.name)
        right.axhline(means[-1], color=color, linewidth=0.8, linestyle=":")
    target = ends(study, SPECIFICATION.at(SPECIFICATION.first_rate), study.steps)
    right.axhline(target.mean, color="gray", linestyle="--", label=SPECIFICATION.name)
    left.set(
        xscale="log", xlabel="peak learning rate", ylabel=f"val_loss after {study.steps} steps",
        title="Tuning (one seed)",
    )  # fmt: skip
    right.set(
        xlabel="steps of the run, and of its schedule", ylabel="val_loss at its end",
        title="Ends (three seeds: mean, smallest, largest)",
    )  # fmt: skip
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    path = study.output.with_suffix(".png")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    return path


def quick(study: Study) -> str:
    """One comparison, one seed, without tuning."""
    seed, steps = SEEDS[0], study.steps
    plan = [
        (SPECIFICATION.name, SPECIFICATION.at(SPECIFICATION.first_rate), steps),
        (ADAMW.name, ADAMW.at(QUICK_RATES[ADAMW.name]), steps),
        *((MUON.name, MUON.at(QUICK_RATES[MUON.name]), study.horizon(s)) for s in QUICK_HORIZONS),
    ]
    results = study.results([(words, count, seed) for _, words, count in plan])
    rows = [
        f"| {name} | {count} | {result['val_loss']:.4f} | {result['seconds']:.0f} |"
        for (name, _, count), result in zip(plan, results, strict=True)
    ]
    return "\n".join(["| recipe | steps | val_loss | seconds |", "|---|---|---|---|", *rows])


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then print tables and draw the figure; returns the exit code."""
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=cli.path, default=Path("learning"), help="without a suffix"
    )
    parser.add_argument("--config", type=cli.path, default=ROOT / "config_cpu.yaml")
    parser.add_argument("--text", type=cli.path, default=ROOT / "input.txt", help="to train on")
    parser.add_argument(
        "--jobs", type=cli.positive_integer, default=1, help="runs at the same time (a GPU: 8)"
    )
    parser.add_argument("--quick", action="store_true", help="one comparison, one seed")
    parser.add_argument("--changes", action="store_true", help="also runs with one change each")
    parser.add_argument("--tune", action="store_true", help="only the grids of rates, one seed")
    parser.add_argument("words", nargs="*", metavar="section.key=value", help="for every run")
    arguments = parser.parse_args(argv)
    words = [*DEFAULTS, *arguments.words]
    if taken := sorted({word.partition("=")[0] for word in words} & set(SET_HERE)):
        raise ConfigError(f"{', '.join(taken)}: set by the recipes in {__file__}")
    config = config_reader.load(arguments.config, words)  # raises for a misspelt one
    try:
        digest = atomic.sha256(arguments.text)
    except OSError as error:
        raise InputError(f"--text {arguments.text}: {error.strerror}") from error
    study = Study(
        arguments.output, arguments.config, arguments.text, words, config.training.train_steps,
        about_of(config, digest), arguments.jobs, arguments.changes,
    )  # fmt: skip
    study.read()
    if arguments.quick:
        print(quick(study))
        return 0
    if arguments.tune:
        print(tune(study))
        return 0
    rates = compare(study)
    print(tables(study, rates))
    print(draw(study, rates))
    return 0


if __name__ == "__main__":
    cli.execute(main)
