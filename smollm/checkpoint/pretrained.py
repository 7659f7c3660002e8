"""Weights to start from, sample from or evaluate: a directory in Hugging Face's form.

One of our checkpoints, what another tool saved (safetensors in one file or several), or a
repository of the Hub. Only tensors and JSON are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from smollm import atomic, hub
from smollm.checkpoint import huggingface, store
from smollm.config import FixedModel, ModelConfig
from smollm.config_reader import model_config
from smollm.errors import CheckpointError, InputError, first_line

if TYPE_CHECKING:  # a command must find its model before torch is imported
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor

    from model import CausalLM
    from smollm.data.tokenizer import TokenizerFiles

INDEX = "model.safetensors.index.json"  # which of several files holds which tensor
FETCHED = ("*.safetensors", "*.json", "*.jinja")  # of a repository of the Hub
PICKLES = ("*.bin", "*.pt", "*.pth", "*.bin.index.json")
Used = TypeVar("Used")
# Tensors that are no weights: older versions of transformers saved the rotary frequencies.
_NO_WEIGHTS = re.compile(r".*\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Pretrained:
    """A model's directory, of which everything was checked that needs no tensors."""

    source: str  # as it was named, without hf://
    name: str  # in errors: a repository's id, or the directory that a link names
    directory: Path
    model: ModelConfig
    files: tuple[Path, ...]  # with its tensors
    dropouts: str  # that its config.json names, in words

    def fixed(self, where: str) -> FixedModel:
        """Its model, in place of a configuration's; `where` is its name there."""
        return FixedModel(self.model, self.source, where)

    def tokenizer(self) -> TokenizerFiles:
        """Its tokenizer.

        Raises:
            InputError: it has none, or one that cannot be read.
        """
        from smollm.data import tokenizer

        return tokenizer.read_files(self.directory, f"{self.name}: its {tokenizer.FILE}")

    def trainer_state(self) -> dict[str, Any] | None:
        """trainer_state.json of one of our checkpoints; None for another's model.

        Raises:
            CheckpointError: it is damaged.
        """
        is_ours = store.is_ours(self.directory)
        return store.read_trainer_state(self.directory) if is_ours else None


def find(source: str, with_weights: bool = True) -> Pretrained:
    """The model of a directory, of a checkpoint that is whole, or of a repository of the Hub.

    Args:
        with_weights: whether they are needed; else config.json alone is fetched and checked.

    Raises:
        CheckpointError: it is none, is incomplete, or computes what ours does not.
        InputError: the repository cannot be fetched.
    """
    if repository := hub.repository(source):
        directory = hub.fetch(repository, FETCHED if with_weights else (store.MODEL_CONFIG,))
    else:
        directory = atomic.follow(Path(source))
        no_model = not directory.is_dir() or store.steps(directory)
        if no_model or (with_weights and store.is_ours(directory)):
            store.require_whole(directory)
    name, of_hub = repository or str(directory), repository is not None
    content, model = _read_config(directory, name, of_hub)
    files = _files(directory, name, of_hub) if with_weights else ()
    dropouts = huggingface.dropouts(content)
    return Pretrained(repository or source, name, directory, model, files, dropouts)


def current(source: str, use: Callable[[Pretrained], Used]) -> Used:
    """What `use` makes of the model that `find` gives.

    Where a run removed it meanwhile, and a link such as `latest` was named, of the one that the
    link names now.

    Raises:
        CheckpointError, InputError: as `find` and `use` do.
    """
    directory = atomic.follow(Path(source))
    while True:
        try:
            return use(find(source))
        except (CheckpointError, InputError):
            tried, directory = directory, atomic.follow(Path(source))
            if directory == tried:
                raise


def _read_config(directory: Path, name: str, of_hub: bool) -> tuple[dict[str, Any], ModelConfig]:
    """config.json, and what it makes of our model section.

    Args:
        name: of the model, for errors.
        of_hub: whether that is a repository's id.
    """
    where = f"{name}: its {store.MODEL_CONFIG}"
    try:
        content = atomic.read_json(directory / store.MODEL_CONFIG)
        values = huggingface.model_values(content)
    except FileNotFoundError as error:
        if of_hub:
            raise CheckpointError(
                f"{name}: is not a model's repository, or was fetched in part only: there is no "
                f"{store.MODEL_CONFIG}"
            ) from error
        raise CheckpointError(
            f"{name}: is neither a checkpoint (it has no {atomic.MANIFEST}) nor a model's "
            f"directory (it has no {store.MODEL_CONFIG})"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: is malformed: {type(error).__name__}: {error}") from error
    return content, model_config(values, where)


def _files(directory: Path, name: str, of_hub: bool) -> tuple[Path, ...]:
    """The files of a model's tensors; CheckpointError where there are none or one is missing.

    Where there is one file it wins over an index, as it does for transformers. `name` and `of_hub`
    as for `_read_config`.
    """
    if (directory / store.WEIGHTS).is_file():
        return (directory / store.WEIGHTS,)
    if not (directory / INDEX).is_file():
        pickles = [path.name for glob in PICKLES for path in sorted(directory.glob(glob))]
        in_what = f"in {pickles[0]}, a pickle" if pickles else "in .bin files, pickles"
        convert = (
            f"has its weights {in_what}, which can execute anything when it is opened; where you "
            "trust it, transformers converts it: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
        if pickles:
            raise CheckpointError(f"{name}: {convert}")
        perhaps = f"; perhaps it {convert}" if of_hub else ""
        raise CheckpointError(f"{name}: holds no weights ({store.WEIGHTS} or {INDEX}){perhaps}")
    try:
        names = set(atomic.read_json(directory / INDEX)["weight_map"].values())
        wrong = [file for file in names if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{name}: its {INDEX} is malformed: {error!r}") from error
    if wrong or not names:
        raise CheckpointError(f"{name}: its {INDEX} names {wrong or 'no files'}")
    if missing := sorted(file for file in names if not (directory / file).is_file()):
        raise CheckpointError(
            f"{name}: {missing[0]} is missing, of {len(names)} files with its weights; copy "
            "or fetch it again"
        )
    return tuple(directory / file for file in sorted(names))


def require_usable(found: Pretrained) -> None:
    """Read the weights and the tokenizer once, before anything is written for a run.

    Raises:
        CheckpointError, InputError: as `read_weights` and `load_tokenizer` do.
    """
    load_tokenizer(found)
    read_weights(found)


def load(found: Pretrained, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """The model with its weights in the compute dtype, in evaluation mode; see `read_weights`."""
    from model import CausalLM

    model = CausalLM(found.model, dtype)
    model.load_state_dict(read_weights(found))
    return model.to(device, dtype).eval()


def load_tokenizer(found: Pretrained, files: TokenizerFiles | None = None) -> tuple[Tokenizer, int]:
    """The tokenizer and the id of its end-of-text token.

    Args:
        files: what `found.tokenizer()` gave already.

    Raises:
        InputError: there is none, or it cannot be used.
    """
    from smollm.data import tokenizer

    files = files or found.tokenizer()
    parsed = tokenizer.parse(files.content, files.where)
    tokenizer.require_rows(parsed, found.model.vocab_size, files.where)
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
        head = weights.pop("lm_head.weight")  # which may stand for both
        if not torch.equal(head, weights.setdefault("model.embed_tokens.weight", head)):
            raise CheckpointError(
                f"{found.name}: lm_head.weight is not the embedding, and "
                f"{store.MODEL_CONFIG} says tie_word_embeddings: true"
            )
    for what, names in (
        ("lacks", expected.keys() - weights.keys()),
        (f"holds what is not {found.model.architecture}'s:", weights.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{found.name}: {what} {min(names)}{more}")
    return weights


def _check(found: Pretrained, name: str, tensor: Tensor, shape: tuple[int, ...] | None) -> None:
    """Raise CheckpointError where a tensor is no weight of this shape (None: any)."""
    problem = ""
    if shape and tuple(tensor.shape) != shape:
        problem = f"has the shape {tuple(tensor.shape)}, and {store.MODEL_CONFIG} makes it {shape}"
    elif not tensor.is_floating_point() or tensor.itemsize < 2:
        dtype = str(tensor.dtype).removeprefix("torch.")
        problem = f"is {dtype}; weights are needed in bf16, fp16, fp32 or fp64"
    elif not tensor.isfinite().all():
        problem = "holds numbers that are not finite"
    if problem:
        raise CheckpointError(f"{found.name}: {name} {problem}")


def _tensors(found: Pretrained) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the files, mapped into memory."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for path in found.files:
        try:
            yield from load_file(path).items()
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"{found.name}: {path.name} cannot be read: {first_line(error)}"
            ) from error
