"""Tokenizers: GPT-2's, one learned from the text, or any tokenizer.json, also of the Hub."""

import contextlib
import functools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from smollm import atomic, hub
from smollm.data.documents import SEPARATOR
from smollm.data.progress import Log
from smollm.errors import NO_THREADS, InputError, ResourceError, UserError, is_threads_exhausted

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"  # which newer versions of transformers write beside them
GPT2 = "tokenizer-gpt2"  # in the cache
PAD = "<|pad|>"
LONGEST_DOCUMENT = 8 * 1024 * 1024  # characters of a document that cannot be cut: tokenized whole
END_TOKENS = (SEPARATOR, "<|end_of_text|>", "</s>", "<eos>")  # the first that a tokenizer knows
SPECIAL_TOKENS = (SEPARATOR, PAD)  # of a learned tokenizer
_LONG_WORD = re.compile(r"\S{4096}")  # learning from longer ones is very slow


def learn(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE (GPT-2's kind) with at most `vocab_size` entries from texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_short_words(texts), trainer)
    return tokenizer


def _short_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, in slices where a text has a word of thousands of characters."""
    for text in texts:
        if _LONG_WORD.search(text):
            yield from (text[at : at + 4096] for at in range(0, len(text), 4096))
        else:
            yield text


class TokenizerFiles(NamedTuple):
    """What a directory says of its tokenizer."""

    content: str  # of tokenizer.json
    config: dict[str, Any]  # tokenizer_config.json, with a chat template of its own file
    where: str  # for errors

    @property
    def eos_token(self) -> str | None:
        """The end-of-text token that the configuration names."""
        return special_token(self.config, "eos_token")


def special_token(config: dict[str, Any], key: str) -> str | None:
    """The text of a special token of a tokenizer_config.json, such as eos_token; None: none."""
    token = config.get(key)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def read_files(directory: Path, where: str | None = None) -> TokenizerFiles:
    """The tokenizer of a model's directory.

    Args:
        where: its name, for errors; the path of the file.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    path = directory / FILE
    if not path.is_file():
        convert = (
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers writes one"
        )
        raise InputError(f"{directory}: has no {FILE}; {convert}")
    try:
        content, config = atomic.read_text(path), {}
        if (directory / CONFIG).is_file():
            config = dict(atomic.read_json(directory / CONFIG))
        if (directory / CHAT_TEMPLATE).is_file():
            config.setdefault("chat_template", atomic.read_text(directory / CHAT_TEMPLATE))
        json.dumps(config, ensure_ascii=False).encode()  # a half of a surrogate pair is no text
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{directory}: its {FILE} or {CONFIG} cannot be read: {error}") from error
    return TokenizerFiles(content, config, where or str(path))


def chat_template(config: dict[str, Any]) -> str | None:
    """The chat template of a tokenizer_config.json, of several the default one; None: none.

    Raises:
        ValueError: it is malformed.
    """
    template = config.get("chat_template")
    try:
        if isinstance(template, list):
            template = {each["name"]: each["template"] for each in template}
        if isinstance(template, dict):
            template = template.get("default")
    except (TypeError, KeyError) as error:
        raise ValueError("its chat_template is malformed") from error
    if not isinstance(template, str | None):
        raise ValueError("its chat_template is no text")
    return template


def parse(text: str, where: str, log: Log = lambda line: None) -> Tokenizer:
    """A tokenizer from a tokenizer.json's text, with nothing truncated.

    Args:
        where: its name, for errors.
        log: takes a line where the tokenizer asks for BPE dropout.

    Raises:
        InputError: it is not a tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{where}: is not a tokenizer.json: {error}") from error
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
        log("the tokenizer's BPE dropout is switched off: a text has the same tokens each time")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def size(tokenizer: Tokenizer) -> int:
    """Rows of an embedding that it needs: the highest id + 1, for ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


class Encoder:
    """A tokenizer for the documents to train on, and what tokenizing needs to know of it.

    It encodes what looks like a special token as ordinary text, so that no document can end itself:
    end-of-text is added where a document ends.

    Args:
        content: of a tokenizer that `parse` gave, as its `to_str` gives it.
        end: the id of its end-of-text token.
    """

    def __init__(self, content: str, end: int) -> None:
        self.content = content
        self.tokenizer = Tokenizer.from_str(content)
        # An end-of-text token that is no special one would be found in texts.
        self.tokenizer.add_special_tokens([self.tokenizer.id_to_token(end)])
        self.tokenizer.encode_special_tokens = True
        self.dtype = np.dtype(np.uint16 if size(self.tokenizer) <= 2**16 else np.uint32)
        self.end = end
        self.longest = longest_piece(self.tokenizer)

    @property
    def unusual_end(self) -> tuple[int, ...]:
        """The end-of-text token where it is none of END_TOKENS: tokens depend on it as well."""
        known = (self.tokenizer.token_to_id(token) for token in END_TOKENS)
        return () if self.end in known else (self.end,)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The tokens of each text, on all cores."""
        with errors_named("the tokenizer"):
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [np.asarray(encoding.ids, self.dtype) for encoding in encodings]


@dataclass(frozen=True)
class Chosen:
    """The tokenizer of a run."""

    tokenizer: Tokenizer
    end: int  # the id of the end-of-text token
    config: dict[str, Any]  # tokenizer_config.json of one that another tool made; else empty

    @functools.cached_property
    def encoder(self) -> Encoder:
        """It, for documents."""
        return Encoder(self.tokenizer.to_str(), self.end)


def longest_piece(tokenizer: Tokenizer) -> int | None:
    """None where a text may be cut between a word and a space without changing a token.

    So it is for a byte-level BPE without a normalizer or a prefix space (GPT-2's, Llama 3's,
    SmolLM2's, ours). Others (Metaspace, SentencePiece) begin each text with a prefix, so a document
    is tokenized whole: the most characters that one may have.
    """
    content = json.loads(tokenizer.to_str())
    steps = content["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    prefix = any(step.get("add_prefix_space") or step.get("prepend_scheme") for step in steps)
    safe = steps[-1].get("type") == "ByteLevel" and not prefix and content["normalizer"] is None
    return None if safe else LONGEST_DOCUMENT


@contextlib.contextmanager
def errors_named(where: str) -> Iterator[None]:
    """What the library raises while it tokenizes, a panic of its Rust code included, as InputError.

    A panic is a BaseException; signals and exits pass.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, UserError, OSError):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or "Panic" in type(error).__name__:
            if is_threads_exhausted(error):
                raise ResourceError(f"{where}: {NO_THREADS}") from error
            first = (str(error).splitlines() or [""])[0]
            raise InputError(
                f"{where}: cannot tokenize: {type(error).__name__}: {first}"
            ) from error
        raise


def end_token(
    tokenizer: Tokenizer, eos_token: str | None = None, where: str = "the tokenizer"
) -> int:
    """The id of the end-of-text token.

    Args:
        eos_token: which it is where the tokenizer knows none of END_TOKENS.
        where: its name, for errors.

    Raises:
        InputError: there is none.
    """
    for token in (*END_TOKENS, eos_token):
        if token is not None and (number := tokenizer.token_to_id(token)) is not None:
            return number
    raise InputError(
        f"{where}: has no end-of-text token (one of {', '.join(END_TOKENS)}, or what {CONFIG} "
        "names as its eos_token); add one"
    )


def special_ids(tokenizer: Tokenizer, end: int, config: dict[str, Any]) -> dict[str, int]:
    """The ids of bos_token, eos_token and pad_token; end-of-text serves where there is none.

    Args:
        end: the id of the end-of-text token.
        config: tokenizer_config.json of a tokenizer that another tool made; else empty.
    """
    bos, pad = (special_token(config, key) for key in ("bos_token", "pad_token"))
    ids = {
        "bos_token": tokenizer.token_to_id(bos) if bos else None,
        "eos_token": end,
        "pad_token": tokenizer.token_to_id(pad or PAD),
    }
    return {key: end if number is None else number for key, number in ids.items()}


def require_rows(tokenizer: Tokenizer, rows: int, where: str, is_models_own: bool = True) -> None:
    """Raise InputError where a tokenizer has more entries than the embedding has rows.

    Args:
        where: its name, for errors.
        is_models_own: whether it came with the weights; else the configuration can be changed.
    """
    if (needed := size(tokenizer)) > rows:
        entries = tokenizer.get_vocab_size()
        gaps = "" if needed == entries else f", the highest id is {needed - 1:,}"
        than = f"model.vocab_size {rows:,}; set model.vocab_size={needed}"
        if is_models_own:
            than = f"the {rows:,} rows of the model's embedding: it is not this model's tokenizer"
        raise InputError(f"{where}: has {entries:,} entries{gaps}, more than {than}")


def fetch_gpt2(cache: Path) -> Tokenizer:
    """GPT-2's tokenizer, with `<|pad|>` added: from the cache, sealed by its hash, or fetched once.

    Raises:
        InputError: it is not cached and cannot be fetched.
    """
    directory = cache / GPT2
    if atomic.problem(directory, (FILE,)):
        try:
            text = Tokenizer.from_pretrained("gpt2").to_str()
        except Exception as error:  # the library raises whatever its HTTP client does
            raise InputError(
                "tokenizer.source gpt2: cannot be fetched (no network?); either connect this "
                "machine to the network once, or set tokenizer.source to the path of a "
                "tokenizer.json, or to train, which learns one from the text "
                f"({type(error).__name__})"
            ) from error
        publish(text, directory)
    tokenizer = parse(atomic.read_text(directory / FILE), str(directory / FILE))
    tokenizer.add_special_tokens([PAD])
    return tokenizer


def publish(text: str, directory: Path, config: str | None = None) -> None:
    """Put a tokenizer.json, and perhaps its configuration, into the cache, with a manifest."""
    temporary = atomic.temporary_directory(directory)
    (temporary / FILE).write_text(text, encoding="utf-8")
    if config is not None:
        (temporary / CONFIG).write_text(config, encoding="utf-8")
    atomic.publish(temporary, directory, "cache")


def read(source: str, cache: Path) -> TokenizerFiles:
    """The tokenizer of `tokenizer.source`: a tokenizer.json's path, its directory, or the Hub's.

    Args:
        cache: keeps what was fetched from the Hub.

    Raises:
        InputError: it cannot be read or fetched.
    """
    if repository := hub.repository(source):
        return _fetched(repository, cache)
    path = Path(source)
    if path.is_dir():
        return read_files(path, f"tokenizer.source {source}")
    try:
        content = atomic.read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise InputError(
            f"tokenizer.source {source}: {reason}; give gpt2, train, the path of a tokenizer.json "
            "or the id of a repository of the Hub (owner/name)"
        ) from error
    config = read_files(path.parent).config if path.name == FILE else {}
    return TokenizerFiles(content, config, source)


def _fetched(repository: str, cache: Path) -> TokenizerFiles:
    """The tokenizer of a repository of the Hub: from the cache, sealed, or fetched once."""
    directory = cache / f"hub-{repository.replace('/', '--')}"
    if atomic.problem(directory, (FILE,)):
        try:
            fetched = hub.fetch(repository, (FILE, CONFIG, CHAT_TEMPLATE))
        except InputError as error:
            raise InputError(f"tokenizer.source {error}") from error
        found = read_files(fetched, f"tokenizer.source {repository}")
        publish(found.content, directory, json.dumps(found.config))
    return read_files(directory, f"tokenizer.source {repository}")
