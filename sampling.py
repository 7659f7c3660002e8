"""Text from a model: one batch with a KV cache, each sample with a seed of its own.

Sampling follows Hugging Face's order: temperature, then top-k, then top-p. A sample does not depend
on the others of its batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer

import checkpoint
import config as configuration
import data
import files
from config import GenerationConfig, UserError
from model import CausalLM, KVCache, from_huggingface_config

LEAST_TEMPERATURE = 1e-6  # below it the limit is taken: dividing by less would overflow


class PromptError(UserError):
    """A prompt does not fit."""

    exit_code = 2


@dataclass(frozen=True)
class Sample:
    """One generated text and what is measured of it."""

    prompt: str
    text: str  # prompt and continuation
    generated_tokens: int  # an end-of-text token included
    perplexity: float  # of the generated tokens, under the unfiltered distribution
    seconds: float  # from the start of the batch to this sample's last token


def select(logits: torch.Tensor, uniform: torch.Tensor, settings: GenerationConfig) -> torch.Tensor:
    """Choose the next tokens.

    Args:
        logits: (B, V) fp32.
        uniform: (B,) numbers from [0, 1), one for each row: all the randomness there is.
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
    # Nucleus: the fewest tokens that reach top_p, so a token counts if those before it do not.
    probabilities = probabilities.masked_fill(cumulative - probabilities >= settings.top_p, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    choice = (cumulative <= target).sum(dim=-1, keepdim=True)
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1  # rounding must not pass the nucleus
    return ids.gather(-1, choice.minimum(last)).squeeze(-1)


@torch.no_grad()
def generate_ids(
    model: CausalLM,
    prompts: list[list[int]],
    settings: GenerationConfig,
    seeds: list[int],
    end: int,
) -> list[tuple[list[int], float, float]]:
    """Continue token sequences as one batch.

    Args:
        model: in evaluation mode; its parameters may be in any dtype.
        prompts: B sequences of token ids, none empty.
        seeds: one for each sequence.
        end: the token that ends a sequence.

    Returns:
        For each sequence the new ids, their summed log-likelihood (nats) and the seconds taken.
    """
    started = time.perf_counter()
    device = model.model.embed_tokens.weight.device
    lengths = [len(prompt) for prompt in prompts]
    limit = min(settings.max_length, model.config.max_position_embeddings)
    rooms = [limit - length for length in lengths]
    uniforms = torch.stack(
        [torch.rand(max(rooms), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    ).to(device)
    cache = KVCache(model.config, len(prompts), limit, device, model.dtype)
    # Prompts are filled up on the right: what is there is overwritten before it can be seen.
    padded = [prompt + [end] * (max(lengths) - len(prompt)) for prompt in prompts]
    hidden = model.model(torch.tensor(padded, device=device), model.dtype, cache)
    cache.lengths = torch.tensor(lengths, device=device)
    hidden = hidden[torch.arange(len(prompts), device=device), cache.lengths - 1]
    new: list[list[int]] = [[] for _ in prompts]
    likelihood = [0.0] * len(prompts)
    seconds = [0.0] * len(prompts)
    going = set(range(len(prompts)))
    for position in range(max(rooms)):
        logits = model.logits(hidden).float()
        chosen = select(logits, uniforms[:, position], settings)
        scores = logits.log_softmax(dim=-1).gather(-1, chosen[:, None]).squeeze(-1)
        for row, (token, score) in enumerate(zip(chosen.tolist(), scores.tolist(), strict=True)):
            if row in going:
                new[row].append(token)
                likelihood[row] += score
                if token == end or len(new[row]) == rooms[row]:
                    going.discard(row)
                    seconds[row] = time.perf_counter() - started
        if not going:
            break
        # A row that is done goes on at its last place: its results are not looked at any more.
        cache.lengths.clamp_(max=limit - 1)
        hidden = model.model(chosen[:, None], model.dtype, cache)[:, -1]
    return list(zip(new, likelihood, seconds, strict=True))


def encode(
    tokenizer: Tokenizer, prompts: Sequence[str], settings: GenerationConfig
) -> list[list[int]]:
    """Each prompt's token ids; those of an empty one are the end-of-text token.

    Raises:
        PromptError: a prompt leaves no room below max_length.
    """
    end = data.end_token(tokenizer)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids or [end] for text in prompts]
    for text, tokens in zip(prompts, ids, strict=True):
        if len(tokens) >= settings.max_length:
            shown = text if len(text) <= 60 else text[:57] + "..."
            raise PromptError(
                f"the prompt {shown!r} has {len(tokens)} tokens, and generation.max_length "
                f"{settings.max_length} counts prompt and continuation; raise it or shorten it"
            )
    return ids


def generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: list[str],
    settings: GenerationConfig,
    seeds: list[int],
) -> list[Sample]:
    """Continue texts; sample i takes prompt i.

    Raises:
        PromptError: a prompt leaves no room below max_length.
    """
    end = data.end_token(tokenizer)
    ids = encode(tokenizer, prompts, settings)
    samples = []
    for text, (new, likelihood, seconds) in zip(
        prompts, generate_ids(model, ids, settings, seeds, end), strict=True
    ):
        words = tokenizer.decode(new[:-1] if new[-1] == end else new, skip_special_tokens=True)
        perplexity = math.exp(min(-likelihood / len(new), 700))
        samples.append(Sample(text, text + words, len(new), perplexity, seconds))
    return samples


def sample_prompts(
    model: CausalLM, tokenizer: Tokenizer, settings: GenerationConfig, seed: int
) -> list[Sample]:
    """`num_samples` texts; sample i continues prompt i mod n with the i-th seed of `seed`."""
    prompts = [settings.prompts[i % len(settings.prompts)] for i in range(settings.num_samples)]
    seeds = [configuration.derive_seed(seed, i, "sample") for i in range(settings.num_samples)]
    return generate(model, tokenizer, prompts, settings, seeds)


def load(directory: Path, device: torch.device, dtype: torch.dtype) -> tuple[CausalLM, Tokenizer]:
    """The model of a checkpoint that `require_whole` has just found whole, and its tokenizer.

    Returns:
        The model with its parameters in the compute dtype, in evaluation mode; the tokenizer.

    Raises:
        CheckpointError: the checkpoint is not one of ours.
    """
    try:
        model_config = from_huggingface_config(files.read_json(directory / "config.json"))
        model = CausalLM(model_config, dtype)
        model.load_state_dict(load_file(directory / "model.safetensors"))
        text = (directory / "tokenizer.json").read_text(encoding="utf-8")
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RuntimeError,
        SafetensorError,
    ) as error:  # fmt: skip
        raise checkpoint.CheckpointError(
            f"{directory}: is not one of our checkpoints: {error}"
        ) from error
    tokenizer = data.parse_tokenizer(text, str(directory / "tokenizer.json"))
    return model.to(device, dtype).eval(), tokenizer
