"""Text from a model: one batch with a KV cache, each sample with a seed of its own.

Sampling follows Hugging Face's order: temperature, then top-k, then top-p. A sample does not depend
on the others of its batch.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import CausalLM, KVCache
from smollm.config import GenerationConfig
from smollm.data.tokenizer import errors_named
from smollm.errors import ConfigError
from smollm.randomness import derive_seed
from smollm.tracking.metrics import perplexity

LEAST_TEMPERATURE = 1e-6  # below it the most likely token is taken: dividing by less would overflow


@dataclass
class Continuation:
    """What was generated after one prompt."""

    ids: list[int]
    log_likelihood: float  # of the ids, in nats, under the unfiltered distribution
    seconds: float  # from the start of the batch to the last id


@dataclass(frozen=True)
class Sample:
    """One generated text and what is measured of it."""

    prompt: str
    text: str  # prompt and continuation
    generated_tokens: int  # an end-of-text token included
    perplexity: float  # of the generated tokens, under the unfiltered distribution
    seconds: float  # from the start of the batch to this sample's last token


def select(logits: Tensor, uniform: Tensor, settings: GenerationConfig) -> Tensor:
    """Choose the next tokens.

    Args:
        logits: (B, V) fp32.
        uniform: (B,) numbers from [0, 1), one for each row: the only source of randomness.
        settings: temperature (0: the most likely token), top_k (0: off), top_p (1: off).

    Returns:
        (B,) token ids.
    """
    if settings.temperature < LEAST_TEMPERATURE:
        return logits.argmax(dim=-1)
    count = min(settings.top_k or logits.size(-1), logits.size(-1))
    ordered, ids = logits.topk(count, dim=-1)  # the largest first
    probabilities = (ordered / settings.temperature).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    # Nucleus: a token is kept if the probability before it is below top_p.
    probabilities = probabilities.masked_fill(cumulative - probabilities >= settings.top_p, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    choice = (cumulative <= target).sum(dim=-1, keepdim=True)
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1  # rounding must not leave the nucleus
    return ids.gather(-1, choice.minimum(last)).squeeze(-1)


def _hidden(model: CausalLM, input_ids: Tensor, cache: KVCache) -> Tensor:
    """Hidden states (B, T, C) of new tokens. On CUDA by the kernels of SDPA that take a mask, which
    FlashAttention does not."""
    if not input_ids.is_cuda:
        return model.model(input_ids, model.dtype, cache)
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True):
        return model.model(input_ids, model.dtype, cache)


@torch.no_grad()
def generate_ids(
    model: CausalLM,
    prompts: list[list[int]],
    settings: GenerationConfig,
    seeds: list[int],
    end: int,
    on_token: Callable[[int, int], None] = lambda row, token: None,
) -> list[Continuation]:
    """Continue token sequences as one batch.

    Args:
        model: in evaluation mode; its parameters may be in any dtype.
        prompts: B sequences of token ids, none empty.
        seeds: one for each sequence.
        end: the token that ends a sequence.
        on_token: takes the number of a sequence and each new token of it, as it comes.
    """
    started = time.perf_counter()
    device = model.model.embed_tokens.weight.device
    lengths = [len(prompt) for prompt in prompts]
    limit = min(settings.max_length, model.config.max_position_embeddings)
    most_new = [limit - length for length in lengths]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    uniforms = torch.stack([torch.rand(max(most_new), generator=g) for g in generators]).to(device)
    cache = KVCache(model.config, len(prompts), limit, device, model.dtype)
    # Prompts are padded on the right: padding is overwritten before any query attends to it.
    padded = [prompt + [end] * (max(lengths) - len(prompt)) for prompt in prompts]
    hidden = _hidden(model, torch.tensor(padded, device=device), cache)
    cache.set_lengths(lengths)
    hidden = hidden[torch.arange(len(prompts), device=device), cache.lengths - 1]
    results = [Continuation([], 0.0, 0.0) for _ in prompts]
    unfinished = set(range(len(prompts)))
    for position in range(max(most_new)):
        logits = model.logits(hidden).float()
        chosen = select(logits, uniforms[:, position], settings)
        scores = logits.log_softmax(dim=-1).gather(-1, chosen[:, None]).squeeze(-1)
        found = torch.stack([chosen.double(), scores.double()], dim=-1)  # one wait for the device
        for row, (token, score) in enumerate(found.tolist()):
            if row in unfinished:
                result = results[row]
                result.ids.append(int(token))
                result.log_likelihood += score
                on_token(row, int(token))
                if token == end or len(result.ids) == most_new[row]:
                    unfinished.discard(row)
                    result.seconds = time.perf_counter() - started
        if not unfinished:
            break
        cache.reopen_full_rows()  # they are finished; what they get is ignored
        hidden = _hidden(model, chosen[:, None], cache)[:, -1]
    return results


def encode_prompts(
    tokenizer: Tokenizer, end: int, prompts: Sequence[str], settings: GenerationConfig, limit: int
) -> list[list[int]]:
    """Each prompt's token ids; those of an empty one are the end-of-text token.

    Args:
        end: the end-of-text token.
        limit: the tokens that the model can hold.

    Raises:
        ConfigError: a prompt leaves no room below max_length or in the model.
    """
    with errors_named("the tokenizer"):
        ids = [tokenizer.encode(text, add_special_tokens=False).ids or [end] for text in prompts]
    for text, tokens in zip(prompts, ids, strict=True):
        shown = text if len(text) <= 60 else text[:57] + "..."
        what = f"the prompt {shown!r} has {len(tokens)} tokens, and "
        if len(tokens) >= limit:
            raise ConfigError(
                f"{what}the model holds {limit}, the continuation included; shorten it"
            )
        if len(tokens) >= settings.max_length:
            raise ConfigError(
                f"{what}generation.max_length {settings.max_length} counts prompt and "
                f"continuation; raise it, up to {limit}, or shorten the prompt"
            )
    return ids


def generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    end: int,
    settings: GenerationConfig,
    seed: int,
    on_text: Callable[[str], None] | None = None,
) -> list[Sample]:
    """Texts, `num_samples` or one for each of n prompts; sample i continues prompt i mod n.

    Args:
        end: the end-of-text token, which ends a text.
        on_text: takes the first text, prompt included, piece by piece as it comes.

    Raises:
        ConfigError: a prompt leaves no room below max_length.
    """
    numbers = range(max(settings.num_samples, len(settings.prompts)))
    prompts = [settings.prompts[i % len(settings.prompts)] for i in numbers]
    seeds = [derive_seed(seed, i, "sample") for i in numbers]
    limit = model.config.max_position_embeddings
    ids = encode_prompts(tokenizer, end, prompts, settings, limit)
    shown, first = prompts[0], []  # what on_text has got, and the tokens of the first continuation
    if on_text:
        on_text(shown)

    def on_token(row: int, token: int) -> None:
        nonlocal shown
        if on_text and row == 0 and token != end:
            first.append(token)
            text = prompts[0] + _continuation(tokenizer, ids[0], first)
            # A character of several tokens is U+FFFD, the replacement, until the last is there.
            if text.startswith(shown) and not text.endswith("\ufffd"):
                on_text(text[len(shown) :])
                shown = text

    samples = []
    found = generate_ids(model, ids, settings, seeds, end, on_token)
    for prompt, prompt_ids, new in zip(prompts, ids, found, strict=True):
        words = new.ids[:-1] if new.ids[-1] == end else new.ids
        text = prompt + _continuation(tokenizer, prompt_ids, words)
        mean = -new.log_likelihood / len(new.ids)
        samples.append(Sample(prompt, text, len(new.ids), perplexity(mean), new.seconds))
    if on_text and len(samples[0].text) > len(shown):
        on_text(samples[0].text[len(shown) :])
    return samples


def _continuation(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> str:
    """The text of new tokens after a prompt's: decoded together, since decoders that write spaces
    as prefixes (Metaspace) drop the first one of a text."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    both = tokenizer.decode(prompt + new, skip_special_tokens=True)
    if both.startswith(before):
        return both[len(before) :]
    return tokenizer.decode(new, skip_special_tokens=True)
