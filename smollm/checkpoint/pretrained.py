"""Weights to start from, sample from or evaluate: a directory in Hugging Face's form.

One of our checkpoints, what another tool saved (safetensors in one file or several), or a
repository of the Hub. Only tensors and JSON are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smollm import atomic, hub
from smollm.checkpoint import huggingface, store
from smollm.config import FixedModel, ModelConfig
from smollm.config_reader import model_config
from smollm.errors import CheckpointError, first_line

if TYPE_CHECKING:  # a command must find its model before torch is imported
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor

    from model import CausalLM
    from smollm.data.tokenizer import TokenizerFiles

INDEX = "model.safetensors.index.json"  # which of several files holds which tensor
FETCHED = ("*.safetensors", "*.json")  # of a repository of the Hub
PICKLES = ("*.bin", "*.pt", "*.pth")
# Tensors that are no weights: older versions of transformers saved the rotary frequencies.
_NO_WEIGHTS = re.compile(r".*\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Pretrained:
    """A model's directory, of which everything was checked that needs no tensors."""

    source: str  # as it was named
    directory: Path
    model: ModelConfig
    files: tuple[Path, ...]  # with its tensors
    dropouts: str  # that its config.json names, in words

    def fixed(self) -> FixedModel:
        """Its model, in place of a configuration's."""
        return FixedModel(self.model, f"--init_from {self.source}")

    def tokenizer(self) -> TokenizerFiles:
        """Its tokenizer.

        Raises:
            InputError: it has none, or one that cannot be read.
        """
        from smollm.data import tokenizer

        return tokenizer.read_files(self.directory)

    def trainer_state(self) -> dict[str, Any] | None:
        """trainer_state.json of one of our checkpoints; None for another's model.

        Raises:
            CheckpointError: it is damaged.
        """
        if not (self.directory / store.TRAINER_STATE).is_file():
            return None
        return store.read_trainer_state(self.directory)


def find(source: str) -> Pretrained:
    """The model of a directory, of a checkpoint that is whole, or of a repository of the Hub.

    Raises:
        CheckpointError: it is none, is incomplete, or computes what ours does not.
        InputError: the repository cannot be fetched.
    """
    directory = atomic.follow(Path(source))
    if hub.is_id(source):
        directory = hub.fetch(source, FETCHED)
    ours = (atomic.MANIFEST, store.TRAINER_STATE, store.TRAINING_STATE)
    if (
        not directory.is_dir()
        or store.steps(directory)
        or any((directory / name).exists() for name in ours)
    ):
        store.require_whole(directory)
    try:
        content = atomic.read_json(directory / store.MODEL_CONFIG)
        values = huggingface.model_values(content)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{source}: is neither a checkpoint (it has no {atomic.MANIFEST}) nor a model's "
            f"directory (it has no {store.MODEL_CONFIG})"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{directory}/{store.MODEL_CONFIG}: {error}") from error
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{directory}/{store.MODEL_CONFIG}: is malformed: {type(error).__name__}: {error}"
        ) from error
    model = model_config(values, f"{directory}/{store.MODEL_CONFIG}")
    return Pretrained(source, directory, model, _files(directory), huggingface.dropouts(content))


def _files(directory: Path) -> tuple[Path, ...]:
    """The files of a model's tensors; CheckpointError where there are none or one is missing."""
    if (directory / INDEX).is_file():
        try:
            names = set(atomic.read_json(directory / INDEX)["weight_map"].values())
            wrong = [name for name in names if Path(name).name != name]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{directory}/{INDEX}: is malformed: {error!r}") from error
        if wrong or not names:
            raise CheckpointError(f"{directory}/{INDEX}: names {wrong or 'no files'}")
    elif (directory / store.WEIGHTS).is_file():
        names = {store.WEIGHTS}
    elif pickles := [path.name for glob in PICKLES for path in sorted(directory.glob(glob))]:
        raise CheckpointError(
            f"{directory}: has its weights in {pickles[0]}, a pickle, which can execute anything "
            "when it is opened; where you trust it, transformers converts it: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    else:
        raise CheckpointError(f"{directory}: holds no weights ({store.WEIGHTS} or {INDEX})")
    if missing := sorted(name for name in names if not (directory / name).is_file()):
        raise CheckpointError(
            f"{directory}: {missing[0]} is missing, of {len(names)} files with its weights; copy "
            "or fetch it again"
        )
    return tuple(directory / name for name in sorted(names))


def load(found: Pretrained, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """The model with its weights in the compute dtype, in evaluation mode; see `read_weights`."""
    from model import CausalLM

    model = CausalLM(found.model, dtype)
    model.load_state_dict(read_weights(found))
    return model.to(device, dtype).eval()


def load_tokenizer(found: Pretrained) -> tuple[Tokenizer, int]:
    """The tokenizer and the id of its end-of-text token.

    Raises:
        InputError: there is none, or it cannot be used.
    """
    from smollm.data import tokenizer

    files = found.tokenizer()
    parsed = tokenizer.parse(files.content, files.where)
    return parsed, tokenizer.end_token(parsed, files.eos_token, files.where)


def read_weights(found: Pretrained) -> dict[str, Tensor]:
    """The weights of a model by their names, on the host, in the dtype of its files.

    Raises:
        CheckpointError: a tensor is missing, of another shape or not of this architecture, or holds
            numbers that are not finite.
    """
    import torch

    from model import CausalLM

    with torch.device("meta"):
        model = CausalLM(found.model)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    weights: dict[str, Tensor] = {}
    for name, tensor in _tensors(found):
        if not _NO_WEIGHTS.fullmatch(name):
            _check(found, name, tensor, expected.get(name))
            weights[name] = tensor
    if found.model.tie_word_embeddings and "lm_head.weight" in weights:
        head, embedding = weights.pop("lm_head.weight"), weights.get("model.embed_tokens.weight")
        if embedding is not None and not torch.equal(head, embedding):
            raise CheckpointError(
                f"{found.directory}: lm_head.weight is not the embedding, and "
                f"{store.MODEL_CONFIG} says tie_word_embeddings: true"
            )
    for what, names in (
        ("lacks", expected.keys() - weights.keys()),
        (f"holds what is not {found.model.architecture}'s:", weights.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{found.directory}: {what} {min(names)}{more}")
    return weights


def _check(found: Pretrained, name: str, tensor: Tensor, shape: tuple[int, ...] | None) -> None:
    """Raise CheckpointError where a tensor is no weight of this shape (None: any)."""
    problem = ""
    if shape and tuple(tensor.shape) != shape:
        problem = f"has the shape {tuple(tensor.shape)}, and {store.MODEL_CONFIG} makes it {shape}"
    elif not tensor.is_floating_point() or tensor.itemsize < 2:
        dtype = str(tensor.dtype).removeprefix("torch.")
        problem = f"is {dtype}; weights are needed in fp32, bf16 or fp16"
    elif not tensor.isfinite().all():
        problem = "holds numbers that are not finite"
    if problem:
        raise CheckpointError(f"{found.directory}: {name} {problem}")


def _tensors(found: Pretrained) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the files, mapped into memory."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for path in found.files:
        try:
            yield from load_file(path).items()
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {first_line(error)}") from error
