"""Models as other tools write them, and what transformers says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import ROOT
from transformers import AutoConfig, AutoModelForCausalLM

from smollm.data.tokenizer import learn

STOP = "<|stop|>"  # an end-of-text token that nobody knows by its name
TEMPLATE = "{{ messages }}"  # of a chat
SHAPE = {
    "llama": {
        "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    },
    "starcoder2": {
        "num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True,
        "embedding_dropout": 0.0, "residual_dropout": 0.1, "attention_dropout": 0.0,
    },
}  # fmt: skip


def write_model(
    directory: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16,
    shard_size: str = "150KB", **config: Any,
) -> Path:  # fmt: skip
    """A small model as transformers saves it, with a tokenizer of another tool; its directory."""
    torch.manual_seed(0)
    values = {
        "vocab_size": 520, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
        "max_position_embeddings": 64, "initializer_range": 0.3, **SHAPE[family], **config,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values)).to(dtype)
    model.save_pretrained(directory, max_shard_size=shard_size)
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """A tokenizer.json of 510 entries without `<|endoftext|>` and `<|pad|>`, which
    tokenizer_config.json gives an end-of-text token."""
    text = (ROOT / "input.txt").read_text("utf-8")[:30_000]
    content = json.loads(learn([text], 510).to_str())
    content["added_tokens"] = [{**content["added_tokens"][0], "content": STOP}]
    vocabulary = content["model"]["vocab"]
    vocabulary[STOP] = vocabulary.pop("<|endoftext|>")
    vocabulary["zq"] = vocabulary.pop("<|pad|>")
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    eos = {"content": STOP, "lstrip": False, "rstrip": False}
    config = {"bos_token": "zq", "eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


def loss_of(directory: Path, tokens: np.ndarray, length: int = 64) -> float:
    """The mean loss that transformers computes on tokens, in windows, fp32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    total, ids = 0.0, torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        for start in range(0, len(ids) - 1, length):
            window = ids[start : start + length + 1]
            logits = model(window[None, :-1]).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return total / (len(ids) - 1)
