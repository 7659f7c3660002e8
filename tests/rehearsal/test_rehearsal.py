"""The CUDA code on a pretended GPU: compiled for it, driven through, its memory counted.

docs/gpu.md says what this shows and what it cannot show.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pretend
import pytest
import torch
from helpers import ROOT, call, events, made_once, step_directory, write_tiny

from smollm.checkpoint import store
from smollm.config_reader import load
from smollm.training.memory import GIB, peak_bytes

FULL = ""
NARROW = (  # two shapes that the estimator was not fitted to
    "model.num_hidden_layers=3 model.hidden_size=512 model.num_attention_heads=8 "
    "model.intermediate_size=2048 model.vocab_size=32000 data.sequence_length=1024"
)
SLIM = (
    "model.num_hidden_layers=2 model.hidden_size=640 model.num_attention_heads=10 "
    "model.intermediate_size=1920 model.vocab_size=16000"
)
LLAMA = (  # two layers of SmolLM2-135M
    "model.architecture=llama model.num_hidden_layers=2 model.hidden_size=576 "
    "model.num_attention_heads=9 model.num_key_value_heads=3 model.intermediate_size=1536 "
    "model.vocab_size=49152 model.tie_word_embeddings=true"
)
WIDE = (  # Llama layers that take more than the logits
    "model.architecture=llama model.num_hidden_layers=4 model.hidden_size=1024 "
    "model.num_attention_heads=16 model.num_key_value_heads=4 model.intermediate_size=2816 "
    "model.vocab_size=2048"
)
STATIC = "model.num_hidden_layers=1 training.batch_size=16"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fake_cuda.cpp, compiled; skips where that, or Triton, cannot be had."""
    if torch.version.cuda:
        pytest.skip("this PyTorch is built with CUDA; tests/run.sh -m gpu runs the real thing")
    if not torch.__version__.startswith("2.13."):
        pytest.skip("the pretended GPU is made for torch 2.13")
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (requirements-dev.txt)")

    def make(directory: Path) -> None:
        directory.mkdir()
        pretend.build(directory)

    return made_once(tmp_path_factory, "library", make) / "fake_cuda.so"


def rehearse(
    library: Path, directory: Path, scenario: str, card: str, *words: str, **extra: str
) -> tuple[dict[str, Any], str]:
    """Run a scenario; returns its result and all that was printed."""
    script = Path(__file__).with_name("scenarios.py")
    command = [sys.executable, str(script), str(library), scenario, card, *words]
    done = call(directory, command, timeout=400, **extra)
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def estimated(case: str, size: str) -> int:
    """What the estimator says of a case of `scenarios.peaks` at a micro-batch."""
    mode, how, *words = case.split()
    config = load(ROOT / "config.yaml", words)
    tokens = int(size) * config.data.sequence_length
    optimizer = config.training.optimizer
    return peak_bytes(config.model, tokens, mode, how != "eager", optimizer=optimizer)


# Whose graphs take minutes, by night: the documented rows of compiled runs, of which two layers are
# compared by day, and further shapes, the eager rows of one of which are.
TWO = "model.num_hidden_layers=2"
NIGHT = ("none, all layers", "selective, all layers", "full, all layers", "slim", "wide")
MODES = ("none", "selective", "full")
# Muon's own step is the peak where the layers' matrices are large and the tokens few.
MUON = "training.optimizer=muon model.vocab_size=1024 model.num_hidden_layers=16"
CASES = {
    "none": [f"none compiled {TWO}"],
    "selective": [f"selective compiled {TWO}"],
    "full": [f"full compiled {TWO}"],
    "none, all layers": [f"none compiled {FULL}"],
    "selective, all layers": [f"selective compiled {FULL}"],
    "full, all layers": [f"full compiled {FULL}"],
    "eager": [*(f"{mode} eager {shape}" for mode in MODES for shape in (FULL, NARROW, SLIM)),
              f"full eager {MUON} data.sequence_length=16", f"full eager {MUON}"],
    "others": [f"none static {NARROW} training.batch_size=24",
               f"none compiled {STATIC}", f"none static {STATIC}"],
    "slim": [f"selective static {SLIM} training.batch_size=48",
             f"full static {SLIM} training.batch_size=12"],
    "wide": [f"{mode} {how} {WIDE}" for mode in MODES for how in ("compiled", "eager")],
    "llama": [f"none static {LLAMA} training.batch_size=24",
              f"selective static {LLAMA} training.batch_size=48",
              f"full static {LLAMA} training.batch_size=12",
              *(f"{mode} eager {LLAMA}" for mode in MODES)],
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in NIGHT else name for name in CASES],
)
@pytest.mark.long
def test_the_memory_is_what_was_estimated(library: Path, tmp_path: Path, name: str) -> None:
    """Two micro-batches on an H100: every peak within 5% of the estimate, and as in docs/gpu.md.

    Compiled, the whole model is one graph (fullgraph) for sm_90; its kernels become binaries.
    """
    binaries = {"cubins": "1"} if name == "none" else {}
    cases = [case.strip() for case in CASES[name]]
    result, output = rehearse(library, tmp_path, "peaks", "H100", *cases, **binaries)
    found = result["peaks"]
    for case, peaks in found.items():
        for size, peak in peaks.items():
            share = estimated(case, size) / peak
            print(f"{case} {size}: {peak / GIB:.2f} GiB, estimated x {share:.3f}")
            assert 0.95 <= share <= 1.05, (case, size, peak, share)
    table = documented()
    for case, peaks in found.items():
        if len(case.split()) == 2:  # of the full model
            mode, how = case.split()
            assert table[how, mode] == {size: f"{peak / GIB:.1f}" for size, peak in peaks.items()}
    if binaries:
        assert len(result["cubins"]) > 20 and min(result["cubins"].values()) > 1000
    if name == "others":  # one graph for all sizes takes what the graph of one size takes
        one = found[f"none static {STATIC}"]["16"]
        assert found[f"none compiled {STATIC}"]["16"] == pytest.approx(one, rel=0.005)


def documented() -> dict[tuple[str, str], dict[str, str]]:
    """The memory table of docs/gpu.md: GiB by micro-batch, for each way to compute."""
    text = (ROOT / "docs/gpu.md").read_text("utf-8")
    sizes = re.search(r"^\| +micro-batch +\|(.*)\|$", text, re.M)[1].replace(" ", "").split("|")
    rows = re.findall(r"^\| (compiled|eager), (\w+) +\|(.*)\|$", text, re.M)
    return {
        (how, mode): dict(zip(sizes, cells.replace(" ", "").split("|"), strict=True))
        for how, mode, cells in rows
    }


def train(library: Path, directory: Path, card: str, *words: str, **extra: str) -> tuple[dict, str]:
    """Three steps of a tiny model by train.py's own main, on a card."""
    write_tiny(directory)
    paths = ["--config", "tiny.yaml", "--input_file", "text.txt"]
    paths += ["--save_dir", "run/checkpoints", "--log_dir", "run/logs", "--train_steps", "3"]
    result, output = rehearse(library, directory, "train", card, *paths, *words, **extra)
    assert result["code"] == 0 and "Traceback" not in output, output
    assert [event["step"] for event in events(directory, "train")] == [1, 2, 3]
    assert len(events(directory, "eval")) == 2 and len(events(directory, "sample")) == 3
    assert all(store.problem(step_directory(directory, step)) is None for step in (2, 3))
    return result, output


@pytest.mark.long
def test_a_compiled_run_on_an_h100(library: Path, tmp_path: Path) -> None:
    """Set-up, probe, steps, evaluation, samples and saving, compiled, with full checkpointing: no
    seed is drawn from the global generator, which a resumed run would draw again."""
    result, output = train(library, tmp_path, "H100", "training.gradient_checkpointing=full")
    assert result["graphs"] == 3 and result["drawn"] == 0, result
    assert re.search(r"^device +NVIDIA H100", output, re.M)
    assert re.search(r"^attention +sdpa, cuDNN 9\.19\.0 \(preferred", output, re.M)
    assert re.search(r"^memory +about 0\.0 GiB at the peak, of 80\.0 GiB$", output, re.M)
    assert all(event["mfu"] is not None for event in events(tmp_path, "train"))
    assert "no memory could be pinned" not in output


LARGE = (  # 48 windows of 2,048 tokens, whose logits fill a card in eager mode
    "training.compile=false", "model.vocab_size=50258", "training.batch_size=48",
    "training.gradient_accumulation_steps=1", "data.sequence_length=2048",
    "model.max_position_embeddings=2048",
)  # fmt: skip


@pytest.mark.parametrize(
    ("card", "family", "attention", "size", "micro_batch"),
    [
        ("A100", "starcoder2", "flash (PyTorch's own)", 40, 24),
        ("4090", "llama", "flash (PyTorch's own)", 24, 16),
        ("T4", "llama", "memory-efficient (fp32)", 15, 8),
    ],
)
def test_an_eager_run_on_a_card(
    library: Path, tmp_path: Path, card: str, family: str, attention: str, size: int,
    micro_batch: int,
) -> None:  # fmt: skip
    """Kernels and first try go by the card; on a T4 no bf16, and nothing pinned: each is said. A
    Llama with one head of keys and values is computed by the same kernels."""
    fault = {"FAULT": "host.pin:error:1"} if card == "T4" else {}
    grouped = "model.num_key_value_heads=1" if family == "llama" else "model.dropout=0"
    words = (f"model.architecture={family}", grouped, "model.tie_word_embeddings=true")
    result, output = train(library, tmp_path, card, *LARGE, *words, **fault)
    kernel = "efficient" if card == "T4" else "flash"
    heads = 1 if card == "4090" else 2  # the memory-efficient kernel takes no grouped ones
    seen = [shapes for shapes in result["attention"] if "2048, 32)" in shapes]
    assert seen, result["attention"]
    for shapes in seen:
        assert f"_{kernel}_attention" in shapes and f", {heads}, 2048, 32)]" in shapes, shapes
    assert ("float32 compute, float32 weights (Tesla T4 has no bf16" in output) == (card == "T4")
    assert re.search(rf"^attention +sdpa, {re.escape(attention)}$", output, re.M)
    assert re.search(rf"^memory +about .* of {size}\.0 GiB$", output, re.M)
    assert output.count("no memory could be pinned (") == len(fault)
    assert f"starting with micro-batches of {micro_batch} with none gradient" in output
    settings = f"training.batch_size={micro_batch} training.gradient_accumulation_steps="
    assert f"{settings}{48 // micro_batch}" in output


def test_generation_keeps_its_shapes(library: Path, tmp_path: Path) -> None:
    """On CUDA: two shapes of attention, for the prompts and for a token; the host waits once a
    token."""
    result, _ = rehearse(library, tmp_path, "generate", "H100")
    for family, heads in (("starcoder2", 12), ("llama", 3)):
        found = result[family]
        assert len(found["attention"]) == 2 and found["reads"] == max(found["tokens"]) == 99
        assert all("efficient_attention" in shapes for shapes in found["attention"])
        assert all(f"(3, {heads}, 100, 64)]" in shapes for shapes in found["attention"])
