"""Muon against torch.optim.Muon, against singular values, and what it trains and keeps."""

from __future__ import annotations

import pytest
import torch
from helpers import SHAPES, SMALL
from torch import Tensor, nn

from model import CausalLM, ModelConfig, initialize
from smollm.checkpoint.state import optimizer_tensors
from smollm.config import TrainingConfig
from smollm.training import muon, optimizer

# Square, tall and wide; several of a shape, and one alone.
MATRICES = [(48, 48), (96, 48), (48, 96), (48, 48), (96, 48), (48, 96), (48, 48), (16, 48)]
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)


def matrices(device: str = "cpu") -> list[nn.Parameter]:
    """Parameters of every shape, drawn from one seed."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(shape, generator=generator) * 0.02 for shape in MATRICES)
    return [nn.Parameter(values.to(device)) for values in drawn]


def against_pytorch(device: str) -> None:
    """Ten steps beside torch.optim.Muon: each update differs by bf16's rounding at most.

    An update's matrix products are rounded to 8 bits fifteen times; half a percent of its norm is
    what one such rounding does.
    """
    ours, theirs = matrices(device), matrices(device)
    settings = {"lr": 0.02, "weight_decay": 0.1}
    mine = muon.Muon(ours, dtype=torch.bfloat16, **settings)
    reference = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        before = [p.detach().clone() for p in theirs]
        for a, b in zip(ours, theirs, strict=True):
            with torch.no_grad():
                a.copy_(b)  # compare one step, not the sum of roundings
            b.grad = torch.randn(b.shape, generator=generator).to(device)
            a.grad = b.grad.clone()
        mine.step()
        reference.step()
        for a, b, old in zip(ours, theirs, before, strict=True):
            assert float((a - b).detach().norm() / (b - old).detach().norm()) < 0.01


@pytest.mark.parametrize("largest", [2**25, 5000, 1])
def test_step_equals_pytorchs_muon(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    """The oracle, which takes one matrix after the other; in one batch, in two, and one by one."""
    monkeypatch.setattr(muon, "LARGEST_BATCH", largest)
    against_pytorch("cpu")


@pytest.mark.gpu
def test_step_equals_pytorchs_muon_on_the_gpu() -> None:
    """The same with the GPU's kernels."""
    against_pytorch("cuda")


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 24, 8), (1, 8, 24)])
def test_orthogonalize_maps_singular_values(shape: tuple[int, int, int]) -> None:
    """U S V^T becomes U p(S) V^T, p the polynomial applied five times; and p(S) is near 1."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = (u * s.unsqueeze(-2)) @ vh
    found = muon.orthogonalize(x, torch.float32)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    large = s[s > 0.1]  # the smallest singular values of a square matrix stay small
    assert float(large.min()) > 0.5 and float(large.max()) < 1.3


def test_orthogonalize_takes_a_matrix_of_zeros() -> None:
    """A gradient of zeros (nothing of a batch reached the matrix) gives an update of zeros."""
    assert not muon.orthogonalize(torch.zeros(2, 8, 16), torch.bfloat16).any()


def test_the_updates_size_is_adamws() -> None:
    """The root mean square of an update is about 0.2 of the rate, whatever the matrix's shape."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((64, 64), (256, 64), (64, 256))]
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    muon.Muon(parameters, lr=1.0, weight_decay=0.0, dtype=torch.float32).step()
    for parameter in parameters:
        assert float(parameter.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)


@shapes
def test_muon_trains_the_layers_matrices_only(config: ModelConfig) -> None:
    """Neither the embedding nor a head of its own, nor norms and biases; each is trained once."""
    model = CausalLM(config)
    first, adamw = optimizer.build_optimizers(model, TrainingConfig(optimizer="muon"))
    assert isinstance(first, muon.Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {parameter: name for name, parameter in model.named_parameters()}
    taken = {names[p] for group in first.param_groups for p in group["params"]}
    expected = {n for p, n in names.items() if n.startswith("model.layers.") and p.ndim == 2}
    assert taken == expected and any("q_proj" in name for name in taken)
    rest = [names[p] for group in adamw.param_groups for p in group["params"]]
    assert sorted([*taken, *rest]) == sorted(names.values())


@shapes
def test_state_is_one_buffer(config: ModelConfig) -> None:
    """A checkpoint holds momentum_buffer for Muon's matrices; the estimate knows the bytes."""
    model = CausalLM(config)
    for name in ("adamw", "muon"):
        built = optimizer.build_optimizers(model, TrainingConfig(optimizer=name))
        state = dict(optimizer_tensors(model, built))
        matrix = "model.layers.0.self_attn.q_proj.weight"
        slots = {key.split(".")[1] for key in state if key.endswith(matrix)}
        expected = {"momentum_buffer"} if name == "muon" else {"step", "exp_avg", "exp_avg_sq"}
        assert slots == expected
        size = sum(4 * v.numel() for k, v in state.items() if ".step." not in k)
        assert size == optimizer.optimizer_bytes(config, name)


def test_the_buffers_in_a_checkpoint_are_the_ones_in_use() -> None:
    """What is copied into the named state is what the next step reads."""
    model = CausalLM(SMALL)
    initialize(model, torch.Generator().manual_seed(0))
    built = optimizer.build_optimizers(model, TrainingConfig(optimizer="muon"))
    state: dict[str, Tensor] = dict(optimizer_tensors(model, built))
    buffer = state["optimizer.momentum_buffer.model.layers.1.mlp.c_fc.weight"]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    old, weight = buffer.clone(), model.model.layers[1].mlp.c_fc.weight
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = weight.detach().clone()
    for each in built:
        each.step()
    torch.testing.assert_close(buffer, 0.95 * old)
    assert not torch.equal(weight, before)
