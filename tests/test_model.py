"""The model against Hugging Face's Starcoder2 and Llama and its own promises (M1, E5)."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from collections import Counter

import pytest
import torch
from helpers import SHAPES, SMALL, random_batch, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from model import (
    IGNORE_INDEX,
    CausalLM,
    HeadLoss,
    KVCache,
    apply_rotary,
    attention_function,
    attention_math,
    attention_sdpa,
    count_parameters,
    flops_per_token,
    head_rows,
    initialize,
    linear,
    next_token_loss,
    rotary_table,
)
from smollm import attention as kernels
from smollm.checkpoint import huggingface as hf
from smollm.config import ModelConfig
from smollm.config_reader import model_config

families = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())


def huggingface(model: CausalLM) -> PreTrainedModel:
    """The same weights in Hugging Face's architecture."""
    values = hf.config_json(model.config, {"pad_token": 1})
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).eval()
    assert type(theirs).__name__ == values["architectures"][0]
    missing = theirs.load_state_dict(model.state_dict(), strict=False)
    tied = ["lm_head.weight"] if model.config.tie_word_embeddings else []
    assert missing.missing_keys == tied and not missing.unexpected_keys
    return theirs


def test_parameter_count_is_exactly_the_specification() -> None:
    """123,654,144 parameters, 123,532,800 of them in matrices, 7,087,872 a layer."""
    config = ModelConfig()
    with torch.device("meta"):
        model = CausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == 123_654_144
    assert count_parameters(config) == (123_654_144, 123_532_800)
    assert sum(p.numel() for p in model.model.layers[0].parameters()) == 7_087_872


def test_flops_are_those_of_the_arithmetic() -> None:
    """MFLOP per token at T=1024 and 2048, causal attention at half and in full."""
    config = ModelConfig()
    found = [flops_per_token(config, t, c) / 1e6 for t in (1024, 2048) for c in (True, False)]
    assert found == pytest.approx([797.8, 854.4, 854.4, 967.7], abs=0.05)


@families
@pytest.mark.parametrize("attention", ["math", "sdpa"])
def test_logits_and_loss_equal_hugging_face(config: ModelConfig, attention: str) -> None:
    """Same weights, same logits (1e-5 in fp32), same loss and gradients."""
    ours = CausalLM(config, torch.float32, attention)
    generator = torch.Generator().manual_seed(0)
    initialize(ours, generator)
    with torch.no_grad():  # biases and norms are trivial when fresh: make them count
        for parameter in ours.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    theirs = huggingface(ours)
    input_ids, _ = random_batch(3)
    torch.testing.assert_close(ours(input_ids), theirs(input_ids).logits, atol=1e-5, rtol=1e-5)
    loss = ours(input_ids[:, :-1], input_ids[:, 1:])
    expected = theirs(input_ids, labels=input_ids).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


def test_flops_of_an_untied_model_leave_the_look_up_out() -> None:
    """An embedding that is not the head's is not multiplied with; grouped heads save nothing."""
    shape = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = ModelConfig("llama", 100, **shape, intermediate_size=12, num_key_value_heads=1)
    products = 8 * 8 * 2 + 2 * 8 * 4 + 3 * 8 * 12 + 8 * 100  # q and o; k and v; the MLP; the head
    assert count_parameters(config) == (products + 8 * 100 + 3 * 8, products + 8 * 100)
    assert flops_per_token(config, 10, causal=False) == 6 * products + 12 * 8 * 10


@families
def test_bf16_is_near_fp32(config: ModelConfig) -> None:
    """bf16 compute from the same fp32 masters: logits within 2e-2 of their scale."""
    full, half = small_model(config=config), small_model(config=config)
    half.dtype = torch.bfloat16
    input_ids, labels = random_batch(2)
    logits = half(input_ids)
    assert logits.dtype == torch.bfloat16
    assert half(input_ids, labels).dtype == torch.float32
    torch.testing.assert_close(logits.float(), full(input_ids), atol=2e-2, rtol=2e-2)
    assert all(p.dtype == torch.float32 for p in half.parameters())


def test_ignored_labels_and_sums() -> None:
    """IGNORE_INDEX positions count for nothing; "sum" is the mean times the predicted tokens."""
    model = small_model()
    input_ids, labels = random_batch(2)
    labels[:, 5:] = IGNORE_INDEX
    mean, total = model(input_ids, labels), model(input_ids, labels, reduction="sum")
    short = model(input_ids[:, :5], labels[:, :5])
    torch.testing.assert_close(mean, short)
    torch.testing.assert_close(total, mean * 10)


def test_causality() -> None:
    """Changing token t changes no logit before t, and does change those from t on."""
    model = small_model()
    input_ids, _ = random_batch(1)
    before = model(input_ids)
    for t in (0, 7, 15):
        changed = input_ids.clone()
        changed[0, t] = (changed[0, t] + 1) % 130
        difference = (model(changed) - before).abs().amax(dim=-1)[0]
        assert (difference[:t] == 0).all() and (difference[t:] > 0).all()


def test_batch_rows_are_independent() -> None:
    """A row's logits do not depend on the other rows."""
    model = small_model()
    input_ids, _ = random_batch(4)
    torch.testing.assert_close(model(input_ids)[2:3], model(input_ids[2:3]), atol=1e-6, rtol=1e-5)


def test_rotary_scores_depend_on_the_distance_only() -> None:
    """RoPE: shifting both positions leaves q . k as it was."""
    cos, sin = rotary_table(64, 16, 10000.0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def score(m: int, n: int) -> float:
        turned = [
            apply_rotary(x, cos[p : p + 1, None], sin[p : p + 1, None]) for x, p in ((q, m), (k, n))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(5, 3) == pytest.approx(score(45, 43), abs=1e-4)
    assert score(5, 3) != pytest.approx(score(5, 13), abs=1e-3)


@families
def test_key_value_cache_equals_no_cache(config: ModelConfig) -> None:
    """Token by token, in chunks, and with rows of different lengths: the same logits. It holds the
    heads of keys and values only."""
    model = small_model(config=config)
    input_ids, _ = random_batch(2)
    whole = model(input_ids)
    cache = KVCache(config, 2, 16, input_ids.device, torch.float32)
    head_size = config.hidden_size // config.num_attention_heads
    assert cache.keys[0].shape == (2, 16, config.num_key_value_heads, head_size)
    parts = [model(input_ids[:, a:b], cache=cache) for a, b in ((0, 7), (7, 8), (8, 12), (12, 16))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    ragged = KVCache(config, 2, 16, input_ids.device, torch.float32)
    model(input_ids[:, :8], cache=ragged)
    ragged.set_lengths([5, 8])  # the first row's last three tokens never were
    step = model(torch.stack([input_ids[0, 5:6], input_ids[1, 8:9]]), cache=ragged)
    torch.testing.assert_close(step[0, 0], whole[0, 5], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(step[1, 0], whole[1, 8], atol=1e-5, rtol=1e-5)


class CountOperations(TorchDispatchMode):
    """Counts how often each of PyTorch's operations runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("family", "activation"), [("starcoder2", "gelu"), ("llama", "silu")])
def test_what_gradient_checkpointing_computes_again(family: str, activation: str) -> None:
    """Selective: the activation and the MLP's widest products, the others are kept; full: all."""
    config = dataclasses.replace(SHAPES[family], intermediate_size=80)  # no other is as wide
    seen = {}
    for mode in ("none", "selective", "full"):
        model = small_model(config=config)
        model.model.gradient_checkpointing = mode
        with CountOperations() as operations:
            model(*random_batch(2)).backward()
        products = sum(operations.counts[name] for name in ("mm", "addmm", "bmm"))
        seen[mode] = (operations.counts[activation], products)
    layers = SMALL.num_hidden_layers
    assert [seen[mode][0] for mode in seen] == [layers, 2 * layers, 2 * layers]
    widest = layers * (2 if family == "llama" else 1)
    assert seen["none"][1] + widest == seen["selective"][1] < seen["full"][1]


@families
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradient_checkpointing_changes_no_gradient(config: ModelConfig, mode: str) -> None:
    """E5: the same loss and gradients; with full, fewer tensors kept."""
    batch = random_batch(2)
    results = []
    for setting in ("none", mode):
        model = small_model(config=config)
        model.model.gradient_checkpointing = setting
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(*batch)
        loss.backward()
        results.append((loss.item(), kept, [p.grad for p in model.parameters()]))
    (loss, kept, gradients), (other, fewer, others) = results
    assert other == pytest.approx(loss, abs=1e-6)
    assert mode == "selective" or fewer < kept / 2  # selective keeps its own way: see above
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    """Dropout changes training's loss, by the global generator's seed, and never evaluation's."""
    config = dataclasses.replace(SMALL, dropout=0.2)
    model = CausalLM(config)
    initialize(model, torch.Generator().manual_seed(0))
    batch = random_batch(2)
    plain = small_model()(*batch).item()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(*batch).item())
    assert losses[0] == losses[1] != losses[2] != plain
    assert model.eval()(*batch).item() == pytest.approx(plain, abs=1e-6)


def test_initial_weights() -> None:
    """GPT-2's scheme, from the given generator alone; the loss starts at ln(vocabulary)."""
    model = small_model()
    again = small_model()
    layer = model.model.layers[0]
    assert torch.equal(layer.mlp.c_fc.weight, again.model.layers[0].mlp.c_fc.weight)
    assert float(layer.mlp.c_fc.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(layer.mlp.c_proj.weight.detach().std()) == pytest.approx(0.02 / 2, rel=0.1)
    assert float(layer.self_attn.o_proj.weight.detach().std()) == pytest.approx(0.02 / 2, rel=0.1)
    assert (layer.mlp.c_fc.bias == 0).all() and (layer.input_layernorm.weight == 1).all()
    assert float(model(*random_batch(8)).detach()) == pytest.approx(math.log(130), abs=0.05)
    llama = small_model(config=SHAPES["llama"])
    layer, narrow = llama.model.layers[1], {"o_proj", "down_proj"}
    for module in (layer.self_attn, layer.mlp):
        for name, linear_layer in module.named_children():
            std = 0.02 / 2 if name in narrow else 0.02
            assert float(linear_layer.weight.detach().std()) == pytest.approx(std, rel=0.1), name
    assert float(llama.lm_head.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not [name for name, _ in llama.named_parameters() if "bias" in name]


def test_head_is_padded_on_the_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """50,304 rows for the product on a GPU, 50,258 parameters rows; the logits do not change."""
    assert head_rows(50_258, torch.device("cuda")) == 50_304
    assert head_rows(50_304, torch.device("cuda")) == 50_304
    assert head_rows(50_258, torch.device("cpu")) == 50_258
    model, batch = small_model(), random_batch(2)
    plain = model(batch[0]).detach()
    model(*batch).backward()
    gradient = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    monkeypatch.setattr("model.head_rows", lambda rows, device: rows + -rows % 128)
    logits = model(batch[0])
    assert logits.shape == (2, 16, 130)
    torch.testing.assert_close(logits, plain, atol=1e-6, rtol=1e-6)
    next_token_loss(logits.flatten(0, 1), batch[1].flatten(), "mean").backward()
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, gradient)


def test_loss_of_bf16_logits_is_computed_in_fp32() -> None:
    """Training and evaluation see the same loss: no token's loss is rounded to bf16."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4096, 300, generator=generator).bfloat16().requires_grad_()
    labels = torch.randint(0, 300, (4096,), generator=generator)
    expected = torch.nn.functional.cross_entropy(logits.detach().double(), labels).item()
    loss = next_token_loss(logits, labels, "mean")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    with torch.no_grad():
        assert next_token_loss(logits, labels, "mean").item() == loss.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_head_is_the_head_and_the_cross_entropy(dtype: torch.dtype) -> None:
    """`HeadLoss` against autograd through PyTorch's own functions, ignored labels included."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(70, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(301, 24, generator=generator).requires_grad_()
    labels = torch.randint(0, 301, (70,), generator=generator)
    labels[::9] = IGNORE_INDEX
    scale = torch.randn(70, generator=generator)
    logits = (hidden @ weight.to(dtype).T).float()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (expected * scale).sum().backward()
    gradients = [hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    losses = HeadLoss.apply(hidden, weight, labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, atol=2e-6, rtol=1e-6)
    total = (losses * scale).sum()
    total.backward(retain_graph=True)
    assert [hidden.grad.dtype, weight.grad.dtype] == [dtype, torch.float32]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for found, gradient in zip([hidden.grad, weight.grad], gradients, strict=True):
        torch.testing.assert_close(found, gradient, atol=tolerance, rtol=tolerance)
    with pytest.raises(RuntimeError, match="only once"):
        total.backward()


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_few_rows_give_the_same_product(rows: int) -> None:
    """The order that generation takes on the CPU changes no number, with or without a bias."""
    layer = torch.nn.Linear(24, 40)
    x = torch.randn(rows, 24, generator=torch.Generator().manual_seed(rows)).view(1, rows, 24)
    torch.testing.assert_close(linear(x, layer.weight, layer.bias), layer(x))
    torch.testing.assert_close(linear(x, layer.weight), x @ layer.weight.T)


# --- attention dispatch --------------------------------------------------------------------------


def flash_stand_in(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """flash_attn_func by its documentation: (B, T, H, D), and attention by its definition; with
    fewer heads of k and v, head h of q goes with h // (heads of q / heads of k) of theirs."""
    assert causal, "the model must ask for causal attention"
    batch, length, heads, size = q.shape
    assert (length, heads * size) == (16, 32) and heads < 8, f"not (B, T, H, D): {tuple(q.shape)}"
    number = torch.arange(heads) // (heads // k.size(2))
    k, v = k[:, :, number], v[:, :, number]
    out = torch.zeros_like(q)
    for t in range(length):
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, : t + 1]) / math.sqrt(size)
        out[:, t] = torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, : t + 1])
    return out


@families
@pytest.mark.parametrize("version", [2, 3])
def test_flash_attention_layout(
    monkeypatch: pytest.MonkeyPatch, version: int, config: ModelConfig
) -> None:
    """The flash-attn path gives the logits of the others, and takes grouped heads as they are."""
    name = {2: "flash_attn", 3: "flash_attn_interface"}[version]
    module = types.ModuleType(name)
    module.flash_attn_func = flash_stand_in
    monkeypatch.setitem(sys.modules, name, module)
    model = CausalLM(config, torch.float32, f"flash_attn_{version}")
    expected = small_model(config=config)
    model.load_state_dict(expected.state_dict())
    input_ids, labels = random_batch(2)
    torch.testing.assert_close(model(input_ids), expected(input_ids), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(input_ids, labels), expected(input_ids, labels))


@pytest.mark.parametrize("shared", [4, 2, 1])
def test_attention_functions_agree(shared: int) -> None:
    """sdpa and math on the same q, k, v, with as many heads of k and v or fewer."""
    q, k, v = torch.randn(3, 2, 16, 4, 8, generator=torch.Generator().manual_seed(0))
    k, v = k[:, :, :shared], v[:, :, :shared]
    torch.testing.assert_close(
        attention_sdpa(q, k, v), attention_math(q, k, v), atol=1e-6, rtol=1e-5
    )


@families
def test_huggingface_config_round_trip(config: ModelConfig) -> None:
    """config.json gives the architecture back."""
    assert model_config(hf.model_values(hf.config_json(config)), "here") == config


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [4, 2, 1])
@pytest.mark.parametrize("attention", ["sdpa", "math", "auto"])
def test_attention_on_the_gpu(attention: str, shared: int) -> None:
    """Each backend in bf16 on the GPU against fp32 mathematics: 2e-2; grouped heads too."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn(3, 2, 256, 4, 64, device=device, generator=generator)
    k, v = k[:, :, :shared], v[:, :, :shared]
    chosen = kernels.choose(attention, device, torch.bfloat16)
    out = attention_function(chosen.name)(q.bfloat16(), k.bfloat16(), v.bfloat16()).float()
    torch.testing.assert_close(out, attention_math(q, k, v), atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_compiled_step_on_the_gpu_is_near_eager() -> None:
    """torch.compile changes the loss by less than bf16's rounding."""
    model = small_model().cuda()
    model.dtype = torch.bfloat16
    batch = tuple(x.cuda() for x in random_batch(4))
    eager = float(model(*batch))
    model.compile(dynamic=False, fullgraph=True)
    assert float(model(*batch)) == pytest.approx(eager, abs=2e-2)
