"""E7: checkpoints of every released format are read for ever, and their runs go on.

tests/format_N/ holds what format N wrote beside its tensors. The tensors are made here by a rule,
names, shapes and meaning as that format had them, without any of the code under test: weights do
not belong into a repository, and what must not change is how they are understood.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, call, losses, step_directory, train, write_tiny
from safetensors.torch import save_file

LAYER = {  # shapes of the tiny model: width 64, 128 in the middle
    "input_layernorm": (64,),
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 64),
    "self_attn.v_proj": (64, 64),
    "self_attn.o_proj": (64, 64),
    "post_attention_layernorm": (64,),
    "mlp.c_fc": (128, 64),
    "mlp.c_proj": (64, 128),
}
FORMAT_1_LOSSES = {5: 6.633063, 6: 6.396410, 7: 6.293855, 8: 6.309475}  # as its own code had them


def waves(shape: tuple[int, ...], phase: float, scale: float) -> torch.Tensor:
    """A tensor that needs no random generator to be the same everywhere."""
    count = torch.Size(shape).numel()
    wave = torch.sin(torch.arange(count, dtype=torch.float64) * 0.7391 + phase)
    return (scale * wave).float().reshape(shape)


def format_1_weights() -> dict[str, torch.Tensor]:
    """model.safetensors: Starcoder2's names under `model.`, no head of its own (it is tied)."""
    shapes = {"model.embed_tokens.weight": (512, 64), "model.norm.weight": (64,)}
    shapes["model.norm.bias"] = (64,)
    for layer in range(2):
        for name, shape in LAYER.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
    weights = {name: waves(shape, len(name), 0.05) for name, shape in sorted(shapes.items())}
    for name in weights:
        if "norm.weight" in name:
            weights[name] += 1
    return weights


def json_bytes(value: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def format_1_training_state(step: int) -> dict[str, torch.Tensor]:
    """training_state.safetensors: AdamW's three slots of each parameter, and the generators."""
    state = {}
    for name, weight in format_1_weights().items():
        state[f"optimizer.step.{name}"] = torch.tensor(float(step))
        state[f"optimizer.exp_avg.{name}"] = waves(tuple(weight.shape), 1.0, 1e-3)
        state[f"optimizer.exp_avg_sq.{name}"] = waves(tuple(weight.shape), 2.0, 1e-3) ** 2 + 1e-6
    numpy_state = np.random.RandomState(3).get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    state["rng.torch"] = torch.Generator().manual_seed(1).get_state()
    state["rng.python"] = json_bytes(random.Random(2).getstate())
    state["rng.numpy"] = json_bytes(numpy_state)
    return state


def write_format_1(directory: Path) -> None:
    """One checkpoint directory of format 1, step 4, with its manifest."""
    directory.parent.mkdir(parents=True)
    shutil.copytree(ROOT / "tests" / "format_1", directory)
    save_file(format_1_weights(), directory / "model.safetensors", metadata={"format": "pt"})
    save_file(format_1_training_state(4), directory / "training_state.safetensors")
    entries = {
        path.name: {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(directory.iterdir())
    }
    manifest = {"format_version": 1, "files": entries}
    (directory / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_format_1_goes_on(tmp_path: Path) -> None:
    """It is whole, it generates, and its run goes on with the losses of then."""
    write_tiny(tmp_path)
    directory = step_directory(tmp_path, 4)
    write_format_1(directory)
    for words in (
        ["checkpoint.py", "verify", str(directory)],
        ["generate.py", "--checkpoint", str(directory), "--max_length", "16", "--num_samples", "1"],
    ):
        result = call(tmp_path, [sys.executable, str(ROOT / words[0]), *words[1:]])
        assert result.returncode == 0, result.stdout
    result = train(tmp_path, "--resume", "auto", "--train_steps", "8", "training.precision=fp32")
    assert result.returncode == 0, result.stdout
    assert "steps 4 -> 8" in result.stdout
    assert losses(tmp_path) == pytest.approx(FORMAT_1_LOSSES, abs=1e-4)
    state = json.loads((step_directory(tmp_path, 8) / "trainer_state.json").read_text())
    assert state["wandb_run_id"] == "0f0f0f0f"  # still the same run
