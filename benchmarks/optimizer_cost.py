"""What a step of each optimizer costs beside a training step: python benchmarks/optimizer_cost.py

By arithmetic (operations of Newton-Schulz and of forward and backward), and by the clock: gradients
are random, the optimizers take turns, the median of all rounds counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from model import CausalLM, count_parameters, flops_per_token, initialize
from smollm import cli, config_reader, hardware
from smollm.config import Config, replace_training
from smollm.training.muon import NEWTON_SCHULZ_STEPS
from smollm.training.optimizer import build_optimizers, hidden_shapes

ROOT = Path(__file__).resolve().parent.parent


def newton_schulz_flops(config: Config) -> int:
    """Floating-point operations of Muon's matrix products in one optimizer step."""
    shapes = Counter(tuple(sorted(shape)) for shape in hidden_shapes(config.model).elements())
    # Two products with the matrix (short x long) and one of the short side's square.
    return sum(
        count * NEWTON_SCHULZ_STEPS * (4 * short * short * long + 2 * short**3)
        for (short, long), count in shapes.items()
    )


def seconds(config: Config, optimizer: str, model: CausalLM, dtype: torch.dtype) -> float:
    """Time of one update after a warm-up."""
    config = replace_training(config, optimizer=optimizer)
    optimizers = build_optimizers(model, config.training, dtype)
    found_inf = torch.zeros((), device=next(model.parameters()).device)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for each in optimizers:
            each.found_inf = found_inf
            each.step()
        float(found_inf)  # waits for the device
        times.append(time.perf_counter() - began)
    return min(times[1:])


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=ROOT / "config.yaml")
    parser.add_argument("--rounds", type=cli.positive_integer, default=3)
    parser.add_argument("words", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args(argv)
    config = config_reader.load(arguments.config, arguments.words)
    machine = hardware.choose(config)
    model = CausalLM(config.model, machine.dtype)
    initialize(model, torch.Generator().manual_seed(0))
    model.to(machine.device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    times: dict[str, list[float]] = {"adamw": [], "muon": []}
    for _ in range(arguments.rounds):
        for name, found in times.items():
            found.append(seconds(config, name, model, machine.dtype))
    tokens = config.tokens_per_step
    step = tokens * flops_per_token(config.model, config.data.sequence_length, causal=False)
    share = newton_schulz_flops(config) / step
    parameters = count_parameters(config.model).total
    print(f"{hardware.name(machine.device)}, {str(machine.dtype).removeprefix('torch.')}")
    print(f"Newton-Schulz: {newton_schulz_flops(config):.3e} operations, {share:.2%} of those of")
    print(f"forward and backward over a step of {tokens:,} tokens")
    for name, found in times.items():
        median = statistics.median(found)
        rounds = ", ".join(f"{each * 1e3:.1f}" for each in found)
        each = f"{median / parameters * 1e9:.2f} ns a parameter"
        print(f"{name:<6} {median * 1e3:8.1f} ms a step, {each} (rounds: {rounds})")
    return 0


if __name__ == "__main__":
    cli.execute(main)
