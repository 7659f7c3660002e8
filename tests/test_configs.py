"""The files of configs/: shapes and recipes beside config.yaml."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import ROOT, train, write_tiny
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from model import count_parameters
from smollm.checkpoint import huggingface
from smollm.config import Config, differences
from smollm.config_reader import load

FILES = sorted((ROOT / "configs").glob("*.yaml"))


def keys_of(path: Path) -> set[str]:
    """The `section.key` names that stand in a file."""
    section, found = "", set()
    for line in path.read_text("utf-8").splitlines():
        if match := re.match(r"([a-z]+):", line):
            section = match[1]
        elif match := re.match(r"  ([a-z_0-9]+):", line):
            found.add(f"{section}.{match[1]}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_holds_what_differs_and_counts_its_parameters(path: Path) -> None:
    """No key repeats the default that it would have; the parameters that its comment names are
    those of transformers' model of the shape."""
    config = load(path)
    changed = {line.partition(":")[0] for line in differences(Config(), config)}
    assert changed <= keys_of(path) <= changed | {"model.tie_word_embeddings"}
    values = huggingface.config_json(config.model)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert count_parameters(config.model).total == count
    assert f"{count:,}" in path.read_text("utf-8").split("\n\n")[0]


@pytest.mark.long
def test_smollm2_takes_a_step(tmp_path: Path) -> None:
    """The published shape, with a learned tokenizer, one step on the CPU: 134,515,008 weights in
    the file."""
    write_tiny(tmp_path, 200_000)
    result = train(
        tmp_path, "--config", str(ROOT / "configs/smollm2-135m.yaml"), "--train_steps", "1",
        "tokenizer.source=train", "data.sequence_length=64", "training.batch_size=1",
        "training.gradient_accumulation_steps=1", f"data.cache_dir={tmp_path / 'cache'}",
        "data.validation_tokens=64", "generation.max_length=12", "generation.num_samples=1",
        "wandb.mode=disabled", timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    path = tmp_path / "run/checkpoints/step_000001/model.safetensors"
    with safe_open(path, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 134_515_008
    assert shapes["model.layers.29.self_attn.k_proj.weight"] == [192, 576]
