"""Models for other programs: a GGUF file for llama.cpp and ollama, a directory for the Hub.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md describes GGUF; its own package writes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smollm import atomic, fault_injection
from smollm.checkpoint import pretrained, store
from smollm.checkpoint.pretrained import Pretrained
from smollm.config import ModelConfig
from smollm.errors import CheckpointError, ConfigError, InputError, ResourceError

if TYPE_CHECKING:  # needed for an export only
    import gguf
    from tokenizers import Tokenizer
    from torch import Tensor

    from smollm.data.tokenizer import TokenizerFiles

DTYPES = ("f16", "f32", "bf16", "q8_0")  # of matrices in a GGUF file; vectors are f32
_LARGEST = {  # that a dtype holds; q8_0: a block of 32 has an f16 scale
    "f16": 65504.0, "q8_0": 127 * 65504.0, "bf16": 3.3895e38, "f32": 3.4028e38,
}  # fmt: skip
_BLOCK = 32
# Of a directory for the Hub, beside the weights.
_DOCUMENTS = (
    *(name for name in store.MODEL_FILES if name != store.WEIGHTS), "special_tokens_map.json",
)  # fmt: skip
# The steps that divide a text before the merges, as tokenizer.json names them, and llama.cpp's name
# for them.
_PRE_TOKENIZERS = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}
# What llama.cpp does in them, with the merges, and with tokens that were added.
_OPTIONS = {
    "ByteLevel": {"add_prefix_space": False, "use_regex": True},
    "Digits": {"individual_digits": True},
    "BPE": {
        "continuing_subword_prefix": "", "end_of_word_suffix": "", "byte_fallback": False,
        "ignore_merges": False,
    },
    "added token": {"lstrip": False, "rstrip": False, "single_word": False},
}  # fmt: skip


def require_new(output: Path) -> None:
    """Raise ConfigError where the target exists, ResourceError where its folder cannot be used."""
    if os.path.lexists(output):
        raise ConfigError(f"{output}: exists already; name another with --output")
    if not os.access(output.parent, os.W_OK | os.X_OK) or not output.parent.is_dir():
        raise ResourceError(
            f"{output}: {output.parent} is no directory that can be written; name another with "
            "--output"
        )


@contextlib.contextmanager
def published(output: Path, needed: int) -> Iterator[Path]:
    """Yield a temporary path; what the block makes there is then flushed and becomes `output`.

    Args:
        needed: its bytes, about.

    Raises:
        ResourceError: there is not enough room.
        ConfigError: `output` exists.
        OSError: anything else that the system says; it names `output`.
    """
    require_new(output)
    atomic.require_space(output.parent, needed)
    folder = None
    try:
        folder = atomic.temporary_directory(output)
        made = folder / output.name
        yield made
        fault_injection.point("export.written")
        for path in (*made.glob("*"), made):  # a directory's files, or a file
            atomic.flush(path)
        try:  # to claim the name: what another process made meanwhile is not replaced
            output.mkdir() if made.is_dir() else output.touch(exist_ok=False)
        except FileExistsError:
            require_new(output)
        os.rename(made, output)
        atomic.flush(output.parent)
    except OSError as error:
        if atomic.is_disk_full(error) or error.errno is None:  # NumPy's: written in part
            raise ResourceError(
                f"{output}: {error.strerror or 'No space left'}; {needed:,} bytes are needed and "
                f"{atomic.free_bytes(output.parent):,} are free there"
            ) from error
        if error.filename is None or atomic.TEMPORARY in str(error.filename):
            raise OSError(error.errno, error.strerror, str(output)) from error
        raise
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


# --- GGUF ----------------------------------------------------------------------------------------


def require_gguf() -> None:
    """Raise ConfigError where the package gguf is missing."""
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            "--format gguf: needs the package gguf; pip install -r requirements-export.txt"
        ) from error


def write_gguf(found: Pretrained, output: Path, dtype: str) -> None:
    """Write a model as one GGUF file.

    Args:
        dtype: of its matrices, one of DTYPES. A matrix whose rows cannot be divided into blocks of
            32 is f16 in place of q8_0.

    Raises:
        InputError: llama.cpp has no such tokenizer.
        CheckpointError: the weights cannot be read, or do not fit into the dtype.
        ConfigError, ResourceError: the target exists, or cannot be written.
    """
    import gguf

    files = found.tokenizer()  # and then the weights: a run may remove a checkpoint, which it
    tokenizer, end = pretrained.load_tokenizer(found, files)  # renames first
    pre = pre_tokenizer(json.loads(tokenizer.to_str()), files.where)
    weights = pretrained.read_weights(found)
    architecture = gguf.MODEL_ARCH[found.model.architecture.upper()]
    names = gguf.get_tensor_name_map(architecture, found.model.num_hidden_layers)
    size = sum(tensor.numel() for tensor in weights.values()) * (4 if dtype == "f32" else 2)
    with published(output, size + (1 << 24)) as path:  # with the tokenizer
        writer = gguf.GGUFWriter(path, found.model.architecture)
        writer.add_name(Path(found.name).resolve().name)
        _add_model(writer, found.model)
        _add_tokenizer(writer, tokenizer, end, files, found.model.vocab_size)
        writer.add_tokenizer_pre(pre)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        file_type = "ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"
        writer.add_file_type(gguf.LlamaFileType[file_type])
        for name, tensor in weights.items():
            kind = _dtype_of(tensor, dtype)
            require_within(f"{found.name}: {name}", tensor, kind)
            rows = _permuted(name, tensor, found.model).float().numpy()
            raw_dtype = gguf.GGMLQuantizationType[kind.upper()]
            theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
            data = gguf.quants.quantize(rows, raw_dtype)
            writer.add_tensor(theirs, data, raw_dtype=raw_dtype)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _add_model(writer: gguf.GGUFWriter, model: ModelConfig) -> None:
    """The shape of the model."""
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_hidden_layers)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_key_value_heads)
    writer.add_rope_dimension_count(model.hidden_size // model.num_attention_heads)
    writer.add_rope_freq_base(model.rope_theta)
    if model.architecture == "llama":
        writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(model.layer_norm_epsilon)


def pre_tokenizer(content: dict[str, Any], where: str) -> str:
    """llama.cpp's name for how a tokenizer divides a text before its merges.

    Args:
        content: of its tokenizer.json.
        where: its name, for errors.

    Raises:
        InputError: llama.cpp has none that does the same, or this is no byte-level BPE.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    step = content["pre_tokenizer"] or {"type": "no pre-tokenizer"}
    steps = step.get("pretokenizers", [step])
    kinds = tuple(each["type"] for each in steps)
    model = content["model"]
    parts = [(part["type"], part) for part in (model, *steps)]
    parts += [("added token", token) for token in content["added_tokens"]]
    other = [
        f"{kind} with {key} {values[key]}"
        for kind, values in parts
        for key, expected in _OPTIONS.get(kind, {}).items()
        if values.get(key) not in (None, expected)
    ]
    if model["type"] != "BPE":
        other.append(model["type"])
    elif model["unk_token"] and not set(ByteLevel.alphabet()) <= model["vocab"].keys():
        other.append("BPE with unk_token, without an entry for each byte")
    if content["normalizer"]:
        other.append(f"normalizer {content['normalizer']['type']}")
    if kinds not in _PRE_TOKENIZERS:
        other.append(", ".join(kinds) or "an empty sequence of pre-tokenizers")
    if other:
        raise InputError(
            f"{where}: is not written as GGUF here ({'; '.join(sorted(set(other)))}); what "
            "tokenizer.source train learns, GPT-2's and SmolLM2's tokenizers are"
        )
    return _PRE_TOKENIZERS[kinds]


def _add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: Tokenizer, end: int, files: TokenizerFiles, rows: int
) -> None:
    """The vocabulary, the merges and the special tokens.

    Args:
        rows: of the embedding; those without a token are written as unused ones.
    """
    import gguf

    from smollm.data.tokenizer import chat_template, special_ids

    content = json.loads(tokenizer.to_str())
    special = {token["id"]: token["special"] for token in content["added_tokens"]}
    special[end] = True
    texts = {number: text for text, number in tokenizer.get_vocab(with_added_tokens=True).items()}

    def kind(number: int) -> int:
        """GGUF's type of a token, by its id."""
        if number in special:
            return gguf.TokenType.CONTROL if special[number] else gguf.TokenType.USER_DEFINED
        return gguf.TokenType.NORMAL if number in texts else gguf.TokenType.UNUSED

    numbers = range(rows)
    merges = content["model"]["merges"]
    ids = special_ids(tokenizer, end, files.config)
    writer.add_tokenizer_model("gpt2")  # llama.cpp's word for any byte-level BPE
    writer.add_token_list([texts.get(number, f"[PAD{number}]") for number in numbers])
    writer.add_token_types([kind(number) for number in numbers])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(ids["bos_token"])
    writer.add_eos_token_id(ids["eos_token"])
    writer.add_pad_token_id(ids["pad_token"])
    writer.add_add_bos_token(False)  # a text begins with its first token, as in training
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    try:
        template = chat_template(files.config)
    except ValueError as error:
        raise InputError(f"{files.where}: {error}") from error
    if template:
        writer.add_chat_template(template)


def _permuted(name: str, tensor: Tensor, model: ModelConfig) -> Tensor:
    """The rows of a Llama's queries and keys in the order of llama.cpp's rotary embedding.

    Here, as in transformers, the two numbers of a rotated pair are half a head apart; there they
    are neighbours.
    """
    heads = {
        "q_proj": model.num_attention_heads, "k_proj": model.num_key_value_heads,
    }.get(name.split(".")[-2])  # fmt: skip
    if model.architecture != "llama" or heads is None:
        return tensor
    rows, columns = tensor.shape
    return tensor.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _dtype_of(tensor: Tensor, dtype: str) -> str:
    """How a tensor is written in a file of `dtype`."""
    if tensor.ndim == 1:
        return "f32"
    return "f16" if dtype == "q8_0" and tensor.shape[-1] % _BLOCK else dtype


def require_within(name: str, tensor: Tensor, dtype: str) -> None:
    """Raise CheckpointError where a tensor, of that name, holds more than its dtype can."""
    largest = float(tensor.abs().max())
    if largest > _LARGEST[dtype]:
        hint = "; bf16 and f32 hold more" if dtype in ("f16", "q8_0") else ""
        raise CheckpointError(
            f"{name} holds {largest:g}, and {dtype} ends at {_LARGEST[dtype]:g}{hint}"
        )


# --- a directory for the Hub ---------------------------------------------------------------------


def write_bf16(found: Pretrained, output: Path) -> None:
    """Write a directory in Hugging Face's form: bf16 weights, configuration, tokenizer, card.

    Raises:
        InputError: the tokenizer cannot be used.
        CheckpointError: the weights cannot be read.
        ConfigError, ResourceError: the target exists, or cannot be written.
    """
    import torch

    from smollm.data.tokenizer import CHAT_TEMPLATE

    # The weights last: a run may remove a checkpoint, which it renames first.
    paths = (found.directory / name for name in (*_DOCUMENTS, CHAT_TEMPLATE))
    documents = {path.name: path.read_bytes() for path in paths if path.is_file()}
    pretrained.load_tokenizer(found)
    weights = pretrained.read_weights(found)
    for name, tensor in weights.items():
        require_within(f"{found.name}: {name}", tensor, "bf16")
    config = json.loads(documents.pop(store.MODEL_CONFIG))
    config.pop("torch_dtype", None)  # the older name
    bf16 = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    size = sum(tensor.nbytes for tensor in bf16.values())
    with published(output, size + (1 << 24)) as directory:
        directory.mkdir()
        for name, content in documents.items():
            (directory / name).write_bytes(content)
        atomic.write_json(directory / store.MODEL_CONFIG, {**config, "dtype": "bfloat16"})
        store.save_tensors(bf16, directory / store.WEIGHTS)
