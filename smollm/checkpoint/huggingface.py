"""The files that make a checkpoint a Hugging Face model directory, from our configuration and back.

https://huggingface.co/docs/transformers/model_doc/starcoder2 and .../llama are the architectures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from smollm.checkpoint import store
from smollm.config import GenerationConfig, ModelConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FAMILIES = {"starcoder2": "Starcoder2ForCausalLM", "llama": "LlamaForCausalLM"}
# What a family has in common: keys of config.json that have one value here. transformers takes the
# same where a key is missing.
_FIXED = {
    "starcoder2": {"hidden_act": "gelu_pytorch_tanh", "use_bias": True},
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
}
# And what transformers takes where one of the others is missing.
_MISSING = {
    "starcoder2": {
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "norm_epsilon": 1e-5,
        "initializer_range": 0.018042, "tie_word_embeddings": True,
    },
    "llama": {
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
_SAME = (  # names that config.json and our configuration share
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "max_position_embeddings", "initializer_range", "tie_word_embeddings",
)  # fmt: skip
_EPSILON = {  # of the norms: our name, and config.json's
    "starcoder2": ("layer_norm_epsilon", "norm_epsilon"),
    "llama": ("rms_norm_eps", "rms_norm_eps"),
}
SPECIAL = ("bos_token", "eos_token", "pad_token")
_DROPOUTS = ("attention_dropout", "residual_dropout", "embedding_dropout")


def config_json(config: ModelConfig, special_ids: dict[str, int] | None = None) -> dict[str, Any]:
    """config.json: the model as Hugging Face's `Starcoder2` or `Llama`.

    Args:
        special_ids: of bos_token, eos_token and pad_token, if there is a tokenizer.
    """
    family = config.architecture
    ours, theirs = _EPSILON[family]
    residual = {"residual_dropout": config.dropout, "embedding_dropout": config.dropout}
    starcoder2 = {"sliding_window": None, **residual} if family == "starcoder2" else {}
    return {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        **{name: getattr(config, name) for name in _SAME},
        **_FIXED[family],
        theirs: getattr(config, ours),
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_dropout": 0.0,
        **starcoder2,
        "use_cache": True,
        **{f"{key}_id": (special_ids or {}).get(key) for key in SPECIAL},
        "dtype": "float32",
    }


def model_values(values: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says of our configuration's model section, unchecked.

    Raises:
        ValueError: the model computes something that ours does not; it is named.
        KeyError, TypeError, AttributeError: a key is missing or malformed.
    """
    family = values.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type is {family!r}, and only starcoder2 and llama are known")
    values = {**_MISSING[family], **{k: v for k, v in values.items() if v is not None}}
    for key, expected in _FIXED[family].items():
        if values.get(key, expected) != expected:
            raise ValueError(f"{key} is {values[key]!r}, and only {expected!r} is computed here")
    for what in _not_computed(values):
        raise ValueError(f"{what} is not computed here")
    ours, theirs = _EPSILON[family]
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    rope = values.get("rope_parameters") or {}
    return {
        "architecture": family,
        **{name: values[name] for name in _SAME},
        ours: values[theirs],
        "rope_theta": rope.get("rope_theta", values.get("rope_theta", 10000.0)),
    }


def _not_computed(values: dict[str, Any]) -> list[str]:
    """The features of a model of our families that ours lacks."""
    found = []
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or any(isinstance(value, dict) for value in rope.values()):
            found.append(f"{key} {kind if kind != 'default' else 'by layer'}")
    rotated = (values.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
    if (rotated or 1.0) != 1.0 or (values.get("partial_rotary_factor") or 1.0) != 1.0:
        found.append("partial_rotary_factor")
    window = values.get("sliding_window")
    if window is not None and window < values["max_position_embeddings"]:
        found.append(f"sliding_window {window}")
    kinds = set(values.get("layer_types") or ()) - {"full_attention"}
    found += [f"layer_types {kind}" for kind in sorted(kinds)]
    head_size = values["hidden_size"] // max(1, values["num_attention_heads"])
    if values.get("head_dim") not in (None, head_size):
        found.append(f"head_dim {values['head_dim']} (hidden_size / heads is {head_size})")
    if values.get("quantization_config"):
        found.append("quantization_config")
    return found


def dropouts(values: dict[str, Any]) -> str:
    """The dropout probabilities of a config.json that are not 0, in words; else empty."""
    return ", ".join(f"{key} {values[key]}" for key in _DROPOUTS if values.get(key))


def model_documents(
    config: dict[str, Any],
    generation: GenerationConfig,
    tokenizer: Tokenizer,
    tokenizer_config: dict[str, Any],
) -> dict[str, Any]:
    """The JSON files beside the weights, by their names.

    Args:
        config: config.json's content.
        tokenizer_config: of a tokenizer that another tool made; else empty. What it says beside the
            special tokens, such as a chat template, stays.
    """
    ids = {f"{key}_id": config[f"{key}_id"] for key in SPECIAL}
    texts = {key: tokenizer.id_to_token(config[f"{key}_id"]) for key in SPECIAL}
    # It describes the model, not the length of our samples; and with do_sample false transformers
    # warns of settings for sampling, older versions refuse them.
    sampling: dict[str, Any] = {"do_sample": generation.temperature > 0}
    if sampling["do_sample"]:
        names = ("temperature", "top_k", "top_p")
        sampling |= {name: getattr(generation, name) for name in names}
    return {
        store.MODEL_CONFIG: config,
        store.GENERATION_CONFIG: {**ids, **sampling},
        store.TOKENIZER: tokenizer.to_str(),
        store.TOKENIZER_CONFIG: {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **tokenizer_config,
            **texts,
            "model_max_length": config["max_position_embeddings"],
        },
    }


def model_card(state: dict[str, Any], parameters: int) -> str:
    """README.md of a checkpoint: what it is and how transformers opens it.

    Args:
        state: its trainer_state.json.
    """
    loss = "not measured" if (best := state["best_val_loss"]) is None else f"{best:.4f}"
    origin = ""
    if state["init_from"]:
        origin = f" It began with the weights of {state['init_from']}."
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# SmolLM2-135, step {state['step']:,}\n\n"
        f"A decoder-only language model with {parameters:,} parameters, trained on "
        f"{state['tokens']:,} tokens.{origin} Lowest validation loss so far: {loss} (step "
        f"{state['best_step']}).\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/of/this/directory")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/of/this/directory")\n```\n'
    )
