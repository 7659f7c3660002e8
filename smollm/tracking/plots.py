"""The plots of a run, drawn from its events in metrics.jsonl."""

from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smollm import atomic

Event = dict[str, Any]


def draw(events: list[Event], log_dir: Path) -> list[Path]:
    """Draw the plots into log_dir/plots; returns their paths."""
    directory = log_dir / "plots"
    directory.mkdir(parents=True, exist_ok=True)
    by_kind: dict[str, list[Event]] = {}
    for event in events:
        by_kind.setdefault(event["event"], []).append(event)
    train = by_kind.get("train", [])
    paths = [
        _save(_loss(train, by_kind.get("eval", [])), directory / "loss.png"),
        _save(_learning_rate(train), directory / "learning_rate.png"),
        _save(_gradient_flow(by_kind.get("gradients", [])), directory / "gradient_flow.png"),
        _save(_sample_lengths(by_kind.get("sample", [])), directory / "sample_lengths.png"),
    ]
    return paths


def _figure(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.5))
    figure.subplots_adjust(left=0.1, right=0.97, bottom=0.12, top=0.92)
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return path


def _loss(train: list[Event], evaluations: list[Event]) -> Figure:
    figure, axes = _figure("Loss", "optimizer step", "nats per token")
    axes.plot([e["step"] for e in train], [e["loss"] for e in train], label="train", linewidth=1)
    steps, losses = [e["step"] for e in evaluations], [e["val_loss"] for e in evaluations]
    axes.plot(steps, losses, "o-", label="validation", color="tab:red", markersize=4)
    for key in sorted({key for e in evaluations for key in e if key.startswith("val_loss/")}):
        points = [(e["step"], e[key]) for e in evaluations if key in e]
        label = f"validation, source {key.partition('/')[2]}"
        axes.plot(*zip(*points, strict=True), ".--", label=label, linewidth=1, markersize=4)
    if ratio := _bits_per_nat(evaluations):
        figure.subplots_adjust(right=0.9)
        right = axes.secondary_yaxis("right", functions=(lambda y: y * ratio, lambda y: y / ratio))
        right.set_ylabel("validation: bits per byte")
    axes.legend()
    return figure


def _bits_per_nat(evaluations: list[Event]) -> float | None:
    """What the validation loss is multiplied with for bits per byte; None where that is not one
    number, because the text was changed on the way."""
    pairs = [(e.get("val_bits_per_byte"), e["val_loss"]) for e in evaluations]
    ratios = [bits / loss if bits and loss else 0.0 for bits, loss in pairs]
    one = ratios and min(ratios) > 0.999 * max(ratios)
    return ratios[-1] if one and ratios[-1] else None


def _learning_rate(train: list[Event]) -> Figure:
    figure, axes = _figure("Learning rate", "optimizer step", "learning rate")
    axes.plot([e["step"] for e in train], [e["learning_rate"] for e in train])
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return figure


def _gradient_flow(gradients: list[Event]) -> Figure:
    figure, axes = _figure("Gradient flow", "optimizer step", "gradient norm (before clipping)")
    names = list(gradients[-1]["norms"]) if gradients else []
    for number, name in enumerate(names):
        points = [(e["step"], e["norms"][name]) for e in gradients if name in e["norms"]]
        color = colormaps["viridis"](number / max(len(names) - 1, 1))
        axes.plot(*zip(*points, strict=True), label=name, color=color, linewidth=1)
    if names:
        figure.subplots_adjust(right=0.82)  # room for the legend
        axes.set_yscale("log")
        axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _sample_lengths(samples: list[Event]) -> Figure:
    figure, axes = _figure("Sample lengths", "generated tokens", "samples")
    axes.hist([e["generated_tokens"] for e in samples], bins=20)
    return figure
