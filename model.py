"""The transformer, function for function Hugging Face's `Starcoder2` or `Llama`.

- a pre-norm decoder of one of two families:
  starcoder2: LayerNorm, MLP with GELU (tanh approximation), biases on every linear layer
  llama:      RMSNorm, MLP with SwiGLU, no biases
- grouped query attention: several heads share one head of keys and values
- rotary position embeddings (RoPE), half-rotation as in Hugging Face
- embeddings tied to the head or not; the head's matrix is padded to a multiple of 128 rows inside
  forward only
- fp32 master weights; compute in bf16 by explicit casts in the layers, the residual stream in bf16
- attention by flash-attn, PyTorch's SDPA, or its definition ("math")
- gradient checkpointing none / selective / full; dropout; a KV cache for generation

Parameter names are Hugging Face's, so a state_dict saved as model.safetensors *is* a checkpoint of
`Starcoder2ForCausalLM` or `LlamaForCausalLM`. Dimensions in comments: B batch, T sequence, C width,
H heads, K heads of keys and values, D head size, V vocabulary.
"""

import functools
import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

FEW_ROWS = 8  # up to here the CPU computes weight @ x.T, which oneDNN does faster
HEAD_MULTIPLE = 128  # rows of the head's matrix: a multiple keeps its matrix products aligned
IGNORE_INDEX = -100  # the label of a position that is not predicted (PyTorch's default)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class ModelConfig(Protocol):
    """What the model reads of a configuration, by Hugging Face's names."""

    architecture: str  # starcoder2 or llama
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_theta: float
    layer_norm_epsilon: float  # of starcoder2
    rms_norm_eps: float  # of llama
    initializer_range: float
    dropout: float


# --- attention: q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D), causal ----------------------


def attention_math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax(q k^T / sqrt(D)) v, softmax in fp32. The reference for the others."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D), (B, K, T, D)
    k, v = repeat_heads(q, k, v)
    scores = (q @ k.transpose(-2, -1)).float() / math.sqrt(q.size(-1))
    future = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1).to(q.dtype)
    return (weights @ v).transpose(1, 2)


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by `torch.nn.functional.scaled_dot_product_attention`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # SDPA takes (B, H, T, D)
    if q.is_cuda and (q.dtype == torch.float32 or q.size(-1) > 256):
        # No kernel but the memory-efficient one takes these, and it takes no grouped heads.
        k, v = repeat_heads(q, k, v)
    grouped = q.size(1) != k.size(1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)


def repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k, v (B, K, T, D) -> (B, H, T, D): a copy for each of the H heads of q (B, H, T, D)."""
    groups = q.size(1) // k.size(1)
    if groups == 1:
        return k, v
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


def attention_function(name: str) -> Attention:
    """The function of a name: math, sdpa, flash_attn_2 or flash_attn_3.

    Raises:
        ImportError: the flash-attn package is not installed in that version.
    """
    if name == "flash_attn_2":
        return partial(importlib.import_module("flash_attn").flash_attn_func, causal=True)
    if name == "flash_attn_3":
        flash = importlib.import_module("flash_attn_interface").flash_attn_func

        def attention_flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = flash(q, k, v, causal=True)
            return out[0] if isinstance(out, tuple) else out  # early versions add the lse

        return attention_flash3
    return {"math": attention_math, "sdpa": attention_sdpa}[name]


# --- layers --------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """nn.Linear with fp32 weights that computes in the dtype of its input."""

    def reset_parameters(self) -> None:
        """Draw nothing: `initialize` or a checkpoint sets every weight."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in x's dtype."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear in x's dtype: x (..., in), weight (out, in), bias (out,) -> (..., out)."""
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if x.device.type != "cpu" or x.numel() > FEW_ROWS * x.size(-1):
        return F.linear(x, weight, bias)
    # Generation, a token for each sequence at a time: oneDNN is faster with the weight first.
    out = (weight @ x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


class Embedding(nn.Embedding):
    """nn.Embedding without its own random start."""

    def reset_parameters(self) -> None:
        """Draw nothing: `initialize` or a checkpoint sets every weight."""


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm with fp32 weights and the dtype of its input; statistics are in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C), in x's dtype."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm (arXiv 1910.07467), the same way: fp32 weights and statistics, x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C), in x's dtype."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def norm_layer(config: ModelConfig) -> LayerNorm | RMSNorm:
    """The norm of the family."""
    if config.architecture == "llama":
        return RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    return LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)


def rotary_table(length: int, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE (arXiv 2104.09864), each (length, head_size / 2), fp32."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of each head. x (B, T, H, D); cos, sin (B or 1, T, 1, D/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class KVCache:
    """Keys and values of the tokens seen so far, for each layer, and each row's own length.

    Rows may differ in length: a key at index j of a row takes part when j <= the query's position,
    so what lies beyond a row's length is never seen. On the CPU attention goes over the longest
    row only; on CUDA over the whole cache, whose shape does not change from token to token: a
    kernel is planned once, and nothing waits for the device to know a length.
    """

    def __init__(
        self, config: ModelConfig, rows: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        head_size = config.hidden_size // config.num_attention_heads
        shape = (rows, length, config.num_key_value_heads, head_size)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.set_lengths([0] * rows)

    def set_lengths(self, lengths: list[int]) -> None:
        """Note how many tokens of each row count."""
        self.lengths = torch.tensor(lengths, device=self.keys[0].device)  # (B,), int64
        self.longest = max(lengths)

    def advance(self, count: int) -> None:
        """Note that each row has `count` more tokens."""
        self.lengths += count
        self.longest += count

    def reopen_full_rows(self) -> None:
        """Have a row that is full write its next token over its last one."""
        last = self.keys[0].size(1) - 1
        self.lengths.clamp_(max=last)
        self.longest = min(self.longest, last)

    def positions(self, count: int) -> Tensor:
        """The positions (B, count) of the next `count` tokens of each row."""
        return self.lengths[:, None] + torch.arange(count, device=self.lengths.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v (B, T, K, D) at each row's next positions; attend with q (B, T, H, D)."""
        positions = self.positions(q.size(1))
        rows = torch.arange(q.size(0), device=q.device)[:, None]
        keys, values = self.keys[layer], self.values[layer]
        keys[rows, positions], values[rows, positions] = k, v
        end = self.longest + q.size(1) if q.device.type == "cpu" else keys.size(1)
        visible = torch.arange(end, device=q.device) <= positions[..., None]  # (B, T, end)
        q, k, v = (x.transpose(1, 2) for x in (q, keys[:, :end], values[:, :end]))
        # The heads that share keys and values are taken as further queries of those: every kernel
        # takes that, and nothing is repeated.
        groups = q.size(1) // k.size(1)
        q = q.unflatten(1, (-1, groups)).flatten(2, 3)  # (B, K, groups x T, D)
        mask = visible[:, None].repeat(1, 1, groups, 1)  # (B, 1, groups x T, end)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.unflatten(2, (groups, -1)).flatten(1, 2).transpose(1, 2)


class SelfAttention(nn.Module):
    """Grouped causal self-attention with RoPE (arXiv 2305.13245); multi-head where H = K."""

    def __init__(self, config: ModelConfig, attention: Attention, layer: int) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.architecture == "starcoder2"
        self.head_size = width // config.num_attention_heads
        self.attention, self.layer = attention, layer
        narrow = config.num_key_value_heads * self.head_size
        self.q_proj = Linear(width, width, bias)
        self.k_proj = Linear(width, narrow, bias)
        self.v_proj = Linear(width, narrow, bias)
        self.o_proj = Linear(width, width, bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if cache is None:
            # One matrix product: three parameters (Hugging Face's names), joined here.
            weight = torch.cat([p.weight for p in projections])
            biased = self.q_proj.bias is not None
            bias = torch.cat([p.bias for p in projections]) if biased else None
            q, k, v = linear(x, weight, bias).split([p.out_features for p in projections], dim=-1)
        else:  # for one token, joining the weights would cost more than it gains
            q, k, v = (project(x) for project in projections)
        # (B, T, H, D), (B, T, K, D), (B, T, K, D)
        q, k, v = (part.unflatten(-1, (-1, self.head_size)) for part in (q, k, v))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is None:
            # A copy: the backward pass keeps v, and a view would keep the whole joint product.
            out = self.attention(q, k, v.contiguous())
        else:
            out = cache.attend(self.layer, q, k, v)
        return self.o_proj(out.flatten(2))


class MLP(nn.Module):
    """Of starcoder2: two linear layers with GELU (tanh approximation) between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.hidden_size, config.intermediate_size)
        self.c_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class GatedMLP(nn.Module):
    """Of llama: SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, attention: Attention, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.input_layernorm = norm_layer(config)
        self.self_attn = SelfAttention(config, attention, layer)
        self.post_attention_layernorm = norm_layer(config)
        self.mlp = GatedMLP(config) if config.architecture == "llama" else MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        drop = partial(F.dropout, p=self.dropout, training=self.training)
        x = x + drop(self.self_attn(self.input_layernorm(x), cos, sin, cache))
        return x + drop(self.mlp(self.post_attention_layernorm(x)))


def _save_narrow_products(
    intermediate_size: int, context: Any, op: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    """Selective checkpointing: save attention and the matrix products, but for the MLP's widest.

    Those (c_fc, or gate_proj and up_proj) are a third of a layer's products, and more than 40% of
    what it would keep.
    """
    name = str(op)
    saved = "attention" in name or "flash" in name or name.startswith("aten.bmm")
    if name.startswith(("aten.mm", "aten.addmm")):
        saved = args[-1].size(1) != intermediate_size  # (..., in) x (in, out)
    elif name.startswith("aten.linear"):
        saved = args[1].size(0) != intermediate_size  # the weight is (out, in)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


class Transformer(nn.Module):
    """Embedding, the layers, and the final norm."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = "none"
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(Block(config, attention, layer) for layer in layers)
        self.norm = norm_layer(config)
        head_size = config.hidden_size // config.num_attention_heads
        cos, sin = rotary_table(config.max_position_embeddings, head_size, config.rope_theta)
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)

    def forward(self, input_ids: Tensor, dtype: torch.dtype, cache: KVCache | None) -> Tensor:
        """Token ids (B, T) -> hidden states (B, T, C) in the compute dtype."""
        x = F.embedding(input_ids, self.embed_tokens.weight).to(dtype)
        x = F.dropout(x, p=self.config.dropout, training=self.training)
        count = input_ids.size(1)
        at = slice(count) if cache is None else cache.positions(count)  # (T,) or (B, T)
        cos = self.rotary_cos[at].unsqueeze(-2).to(dtype)  # (T, 1, D/2) or (B, T, 1, D/2)
        sin = self.rotary_sin[at].unsqueeze(-2).to(dtype)
        for layer in self.layers:
            if self.gradient_checkpointing == "none" or not self.training:
                x = layer(x, cos, sin, cache)
            elif self.gradient_checkpointing == "full":
                x = checkpoint(layer, x, cos, sin, cache, use_reentrant=False)
            else:
                policy = partial(_save_narrow_products, self.config.intermediate_size)
                contexts = partial(create_selective_checkpoint_contexts, policy)
                x = checkpoint(layer, x, cos, sin, cache, use_reentrant=False, context_fn=contexts)
        if cache is not None:
            cache.advance(count)
        return self.norm(x)


class CausalLM(nn.Module):
    """The language model: a Transformer and a head, which may share the embedding's matrix.

    Args:
        dtype: of the computation; the parameters stay as they are (fp32 for training).
        attention: a name that `attention_function` knows.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
    ) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.model = Transformer(config, attention_function(attention))
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The head's matrix (V, C)."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., vocab_size) in the compute dtype."""
        weight = self.head
        missing = head_rows(weight.size(0), hidden.device) - weight.size(0)
        if missing == 0:
            return linear(hidden, weight)
        return linear(hidden, F.pad(weight, (0, 0, 0, missing)))[..., : weight.size(0)]

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, cache: KVCache | None = None,
        reduction: str = "mean",
    ) -> Tensor:  # fmt: skip
        """Logits (B, T, V), or with labels the loss in nats, fp32.

        Args:
            input_ids: (B, T), int64.
            labels: (B, T), int64: the *next* token of each position (already shifted), or
                IGNORE_INDEX where nothing is predicted.
            cache: keys and values of earlier tokens; the new ones are added to it.
            reduction: of the loss: "mean" over the predicted positions, or "sum".
        """
        hidden = self.model(input_ids, self.dtype, cache)
        if labels is None:
            return self.logits(hidden)
        labels = labels.flatten()
        if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
            total = HeadLoss.apply(hidden.flatten(0, 1), self.head, labels).sum()
            return total / (labels != IGNORE_INDEX).sum() if reduction == "mean" else total
        return next_token_loss(self.logits(hidden).flatten(0, 1), labels, reduction)


def head_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of the head's matrix product: aligned on a GPU; on the CPU the copy costs more."""
    return vocab_size if device.type == "cpu" else vocab_size + -vocab_size % HEAD_MULTIPLE


def next_token_loss(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """Cross-entropy in nats, fp32; positions labelled IGNORE_INDEX count for nothing.

    The softmax is in fp32: with bf16 logits each token's loss would be rounded and their mean
    biased. Under torch.compile the cast is fused and costs nothing; in eager mode see `HeadLoss`.

    Args: logits (N, V) fp32 or bf16; labels (N,) int64; reduction "mean" or "sum".
    """
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction=reduction)


class HeadLoss(torch.autograd.Function):
    """The head and the cross-entropy of each position as one operation, for the CPU's eager mode.

    Computes what the head followed by `next_token_loss` does: logits in the compute dtype, softmax
    in fp32. It makes no fp32 copy of all logits (206 MB for 1,024 tokens): it converts a few rows
    at a time, which stay in the processor's cache, and the backward pass overwrites the logits with
    their gradient. `torch.compile` does the same by itself.
    """

    ROWS = 16  # x 50,258 x 4 bytes = 3.2 MB

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Hidden (N, C), weight (V, C), labels (N,) -> losses in nats (N,) fp32, 0 if ignored."""
        ctx.weight_dtype, weight = weight.dtype, weight.to(hidden.dtype)
        logits = F.linear(hidden, weight)
        log_sums = torch.empty(hidden.size(0), dtype=torch.float32)
        for part, out in zip(*(x.split(HeadLoss.ROWS) for x in (logits, log_sums)), strict=True):
            torch.logsumexp(part.float(), -1, out=out)
        ignored = labels == IGNORE_INDEX
        targets = labels.masked_fill(ignored, 0)[:, None]
        chosen = logits.gather(1, targets).squeeze(1).float()
        ctx.save_for_backward(hidden, weight, log_sums, targets, ignored)
        ctx.logits = logits
        return (log_sums - chosen).masked_fill_(ignored, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of hidden and weight; a second pass raises: the logits are overwritten."""
        hidden, weight, log_sums, targets, ignored = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, None
        if logits is None:
            raise RuntimeError("HeadLoss: backward can be called only once")
        grad = grad.masked_fill(ignored, 0.0)[:, None]
        by_rows = (x.split(HeadLoss.ROWS) for x in (logits, targets, grad, log_sums[:, None]))
        for part, target, scale, log_sum in zip(*by_rows, strict=True):
            # d loss / d logits = softmax - one-hot
            softmax = part.float().sub_(log_sum).exp_()
            part.copy_(softmax.mul_(scale).scatter_add_(1, target, -scale))
        return logits @ weight, (logits.T @ hidden).to(ctx.weight_dtype), None


def initialize(model: CausalLM, generator: torch.Generator) -> None:
    """Draw fresh weights, as GPT-2 did.

    | weight                                   | value                                   |
    | embedding, head, q, k, v, c_fc, gate, up | normal, std initializer_range           |
    | o_proj, c_proj, down_proj                | the same / sqrt(2 x layers): they write |
    |                                          | to the residual stream                  |
    | norms                                    | 1                                       |
    | every bias                               | 0                                       |
    """
    config = model.config
    residual = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                ends = ("o_proj.weight", "c_proj.weight", "down_proj.weight")
                writes_residual = name.endswith(ends)
                std = residual if writes_residual else config.initializer_range
                parameter.normal_(0.0, std, generator=generator)


class ParameterCount(NamedTuple):
    """Numbers of parameters."""

    total: int
    matrices: int  # in matrices, which are weight-decayed


@functools.cache
def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of the model: 123,654,144 for the default architecture. Allocates none.

    Args:
        config: hashable.
    """
    with torch.device("meta"):
        parameters = list(CausalLM(config).parameters())
    matrices = sum(p.numel() for p in parameters if p.ndim >= 2)
    return ParameterCount(sum(p.numel() for p in parameters), matrices)


def flops_per_token(config: ModelConfig, sequence_length: int, causal: bool = True) -> int:
    """Floating-point operations of forward and backward for one token of training.

    6 per matrix parameter, but for an embedding that is not the head's: tokens are looked up in it.
    Plus attention: 12 x layers x width x sequence_length, of which a causal mask needs half (the
    convention of arXiv 2204.02311, appendix B); grouped heads save memory, not operations.
    """
    attention = 12 * config.num_hidden_layers * config.hidden_size * sequence_length
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    multiplied = count_parameters(config).matrices - looked_up
    return 6 * multiplied + (attention // 2 if causal else attention)
