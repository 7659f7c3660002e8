"""Tokenizers: GPT-2's, one learned from the text, or any tokenizer.json."""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from smollm import atomic
from smollm.data.documents import SEPARATOR
from smollm.data.progress import Log
from smollm.errors import NO_THREADS, InputError, ResourceError, UserError, is_threads_exhausted

FILE = "tokenizer.json"
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


def parse(text: str, where: str, log: Log = lambda line: None) -> Tokenizer:
    """A tokenizer from a tokenizer.json's text, with `<|pad|>` added and nothing truncated.

    Args:
        where: its name, for errors.
        log: takes a line where the tokenizer asks for BPE dropout.

    Raises:
        InputError: it is not a tokenizer, or has no end-of-text token.
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
    if tokenizer.token_to_id(PAD) is None:
        tokenizer.add_special_tokens([PAD])
        ids = list(tokenizer.get_vocab().values())
        if ids.count(tokenizer.token_to_id(PAD)) > 1:
            raise InputError(
                f"{where}: its ids have gaps, and {PAD} would share one with another entry; add "
                f"{PAD} to it with an id of its own"
            )
    end_token(tokenizer, where)
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
    """

    def __init__(self, content: str) -> None:
        self.tokenizer = Tokenizer.from_str(content)
        self.tokenizer.encode_special_tokens = True
        self.dtype = np.dtype(np.uint16 if size(self.tokenizer) <= 2**16 else np.uint32)
        self.end = end_token(self.tokenizer)
        self.longest = longest_piece(self.tokenizer)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The tokens of each text, on all cores."""
        with errors_named("the tokenizer"):
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [np.asarray(encoding.ids, self.dtype) for encoding in encodings]


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


def end_token(tokenizer: Tokenizer, where: str = "the tokenizer") -> int:
    """The id of the end-of-text token; InputError where there is none."""
    for token in END_TOKENS:
        if (number := tokenizer.token_to_id(token)) is not None:
            return number
    raise InputError(f"{where}: has no end-of-text token (one of {', '.join(END_TOKENS)}); add one")


def fetch_gpt2(cache: Path) -> Tokenizer:
    """GPT-2's tokenizer: from the cache, sealed by its hash, or fetched once by the library.

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
    return parse(atomic.read_text(directory / FILE), str(directory / FILE))


def publish(text: str, directory: Path) -> None:
    """Put a tokenizer.json into the cache, as a directory with a manifest."""
    temporary = atomic.temporary_directory(directory)
    (temporary / FILE).write_text(text, encoding="utf-8")
    atomic.publish(temporary, directory, "cache")


def read(source: str, log: Log) -> Tokenizer:
    """The tokenizer.json at a path; `log` as for `parse`.

    Raises:
        InputError: it cannot be read, or is no tokenizer.
    """
    try:
        return parse(atomic.read_text(Path(source)), source, log)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise InputError(
            f"tokenizer.source {source}: {reason}; give gpt2, train or the path of a tokenizer.json"
        ) from error
