"""The files that make a checkpoint a Hugging Face model directory, from our configuration and back.

https://huggingface.co/docs/transformers/model_doc/starcoder2 is the architecture.
"""

from typing import Any

from smollm.checkpoint import store
from smollm.config import GenerationConfig, ModelConfig
from smollm.data.tokenizer import PAD


def config_json(config: ModelConfig, eos: int | None, pad: int | None) -> dict[str, Any]:
    """config.json: the model as Hugging Face's `Starcoder2`.

    Args:
        eos, pad: ids of the end-of-text and the padding token.
    """
    return {
        "architectures": ["Starcoder2ForCausalLM"],
        "model_type": "starcoder2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "norm_epsilon": config.layer_norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "sliding_window": None,
        "attention_dropout": 0.0,
        "residual_dropout": config.dropout,
        "embedding_dropout": config.dropout,
        "use_bias": True,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": eos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "dtype": "float32",
    }


def model_config(values: dict[str, Any]) -> ModelConfig:
    """The inverse of `config_json`.

    Raises:
        ValueError: the config.json is of another architecture than ours.
        KeyError, TypeError: it lacks a key, or is malformed.
    """
    fixed = config_json(ModelConfig(), None, None)
    for key in ("model_type", "hidden_act", "use_bias", "tie_word_embeddings", "sliding_window"):
        if values.get(key, fixed[key]) != fixed[key]:
            raise ValueError(f"{key} is {values[key]!r}, expected {fixed[key]!r}")
    if values.get("num_key_value_heads") != values.get("num_attention_heads"):
        raise ValueError("num_key_value_heads differs from num_attention_heads")
    same = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "intermediate_size", "max_position_embeddings", "initializer_range",
    )  # fmt: skip
    return ModelConfig(
        **{name: values[name] for name in same},
        rope_theta=(values.get("rope_parameters") or values)["rope_theta"],
        layer_norm_epsilon=values["norm_epsilon"],
        dropout=values["residual_dropout"],
    )


def model_documents(
    config: dict[str, Any], generation: GenerationConfig, tokenizer_json: str, end: str
) -> dict[str, Any]:
    """The JSON files beside the weights, by their names.

    Args:
        config: config.json's content.
        end: the end-of-text token's text.
    """
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # It describes the model, not the length of our samples; and with do_sample false transformers
    # warns of settings for sampling, older versions refuse them.
    sampling: dict[str, Any] = {"do_sample": generation.temperature > 0}
    if sampling["do_sample"]:
        names = ("temperature", "top_k", "top_p")
        sampling |= {name: getattr(generation, name) for name in names}
    return {
        store.MODEL_CONFIG: config,
        store.GENERATION_CONFIG: {**ids, **sampling},
        store.TOKENIZER: tokenizer_json,
        store.TOKENIZER_CONFIG: {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end,
            "eos_token": end,
            "pad_token": PAD,
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
    }


def model_card(
    step: int, parameters: int, tokens: int, best_val_loss: float | None, best_step: int | None
) -> str:
    """README.md of a checkpoint: what it is and how transformers opens it."""
    loss = f"{best_val_loss:.4f}" if best_val_loss is not None else "not measured"
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# SmolLM2-135, step {step:,}\n\n"
        f"A decoder-only language model with {parameters:,} parameters, trained on {tokens:,} "
        f"tokens. Lowest validation loss so far: {loss} (step {best_step}).\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/of/this/directory")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/of/this/directory")\n```\n'
    )
