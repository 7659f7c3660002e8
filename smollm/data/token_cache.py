"""Tokens on disk, made once: memory-mapped .npy files in `data.cache_dir`.

Each directory of the cache is named by a hash of what it was made from, and is whole or not there
(atomic.py): `tokens-<key>` holds a tokenized text, `tokenizer-<key>` a tokenizer learned from one.
The text is read, tokenized and written as a stream on all cores.
"""

import contextlib
import errno
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from smollm import atomic, fault_injection
from smollm.config import Config
from smollm.data import documents, tokenizer
from smollm.data.documents import Piece, Scan, Text
from smollm.data.tokenizer import Log
from smollm.errors import InputError

FORMAT = 2  # of the cache; 1 kept byte-order marks inside of a text
TRAIN, VALIDATION, COUNTS = "train.npy", "validation.npy", "counts.json"
BATCH = 4 * 1024 * 1024  # characters handed to the tokenizer at once


@dataclass(frozen=True)
class Corpus:
    """A tokenized text: what training reads."""

    train: np.ndarray  # (tokens,) uint16 or uint32, memory-mapped
    validation: np.ndarray  # the same, of the held-out part
    tokenizer: Tokenizer
    documents: int
    fingerprint: dict[str, Any]  # of the text, the tokenizer and the split

    def conservation(self) -> str:
        """The line that shows that no token was dropped."""
        read = len(self.train) + len(self.validation)
        documents = "1 document" if self.documents == 1 else f"{self.documents:,} documents"
        return (
            f"{self.fingerprint['text_bytes']:,} bytes, {documents}, {read:,} tokens "
            f"= {len(self.train):,} train + {len(self.validation):,} validation"
        )


def prepare(
    config: Config, path: Path, tokenizer_json: str | None = None, log: Log = print
) -> Corpus:
    """Tokenize a text, or find it tokenized already.

    Args:
        path: the text (UTF-8).
        tokenizer_json: a checkpoint's tokenizer, which then wins over tokenizer.source.
        log: takes a line for people.

    Raises:
        InputError: the text or the tokenizer cannot be used, or the text is too short.
    """
    documents.check_text_file(path)
    cache = Path(config.data.cache_dir)
    try:
        with _locked(cache, log):
            corpus = _prepare(config, path, tokenizer_json, log)
    except OSError as error:
        raise InputError(
            f"data.cache_dir {cache}: {error.strerror or error} ({error.filename or path}); make "
            "room there or name another directory"
        ) from error
    _check_length(corpus, config, path)
    return corpus


@contextlib.contextmanager
def _locked(cache: Path, log: Log) -> Iterator[None]:
    """Hold the cache, of which one run at a time may make a part; one that is read-only serves."""
    with contextlib.ExitStack() as stack:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            stack.enter_context(atomic.lock(cache / ".lock", wait=log))
            if swept := atomic.sweep(cache):
                log(f"{cache}: after an interruption: {', '.join(swept)}")
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
        yield


def _prepare(config: Config, path: Path, tokenizer_json: str | None, log: Log) -> Corpus:
    """The corpus from the cache, where what is missing or damaged is made first."""
    text = Text(path)

    @functools.cache
    def scan() -> Scan:
        report = documents.progress(text, "reading", log)
        return documents.scan(path, config.data.validation_fraction, report)

    cache = Path(config.data.cache_dir)
    if tokenizer_json is not None:
        chosen = tokenizer.parse(tokenizer_json, "the checkpoint's tokenizer.json", log)
    elif config.tokenizer.source == "gpt2":
        chosen = tokenizer.fetch_gpt2(cache)
    elif config.tokenizer.source == "train":
        chosen = _learned_tokenizer(config, text, scan)
    else:
        chosen = tokenizer.read(config.tokenizer.source, log)
    _check_vocabulary(chosen, config, log)
    fingerprint = {
        "text_sha256": text.sha256,
        "text_bytes": text.bytes,
        "tokenizer_sha256": sha256(chosen.to_str().encode()).hexdigest(),
        "validation_fraction": config.data.validation_fraction,
    }
    directory = cache / f"tokens-{_key(FORMAT, sorted(fingerprint.items()))}"
    wrong = atomic.problem(directory, (COUNTS,))
    if wrong:
        if directory.exists():
            log(f"{directory}: {wrong}; tokenizing again")
        _tokenize(text, chosen, scan(), directory, log)
    sealed = atomic.read_json(directory / atomic.MANIFEST)["files"]
    fingerprint["tokens_sha256"] = _key(sealed[TRAIN]["sha256"], sealed[VALIDATION]["sha256"])
    train, validation = (np.load(directory / name, mmap_mode="r") for name in (TRAIN, VALIDATION))
    count = atomic.read_json(directory / COUNTS)["documents"]
    return Corpus(train, validation, chosen, count, fingerprint)


def _key(*made_from: Any) -> str:
    return sha256(repr(made_from).encode()).hexdigest()[:24]


def _learned_tokenizer(config: Config, text: Text, scan: Callable[[], Scan]) -> Tokenizer:
    """A tokenizer learned from the training part of the text, or the cached one."""
    key = _key(text.sha256, config.model.vocab_size, config.data.validation_fraction, FORMAT)
    directory = Path(config.data.cache_dir) / f"tokenizer-{key}"
    if atomic.problem(directory, (tokenizer.FILE,)):
        parts = documents.split_pieces(text.path, scan().cut)
        texts = (part.text for part in parts if not (part.is_separator or part.held_out))
        learned = tokenizer.learn(texts, config.model.vocab_size)
        text.require_unchanged()
        tokenizer.publish(learned.to_str(), directory)
    path = directory / tokenizer.FILE
    return tokenizer.parse(atomic.read_text(path), str(path))


class _TokenWriter:
    """Writes a one-dimensional .npy file whose length is known only at the end."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.file = open(path, "wb")  # noqa: SIM115 (closed by close)
        self.dtype, self.count = np.dtype(dtype), 0
        self._write_header()

    def _write_header(self) -> None:
        # NumPy pads the header so that it can be rewritten in place when the length has grown.
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.count,)}
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, header)

    def write(self, tokens: list[int]) -> None:
        """Append tokens."""
        self.file.write(np.asarray(tokens, dtype=self.dtype).tobytes())
        self.count += len(tokens)

    def close(self) -> None:
        """Finish the header and the file."""
        self._write_header()
        self.file.close()


def _tokenize(text: Text, chosen: Tokenizer, scan: Scan, final: Path, log: Log) -> None:
    """Tokenize the text as a stream into the two token files of the directory `final`."""
    if scan.inside:
        count = "1 document" if scan.documents == 1 else f"{scan.documents:,} documents"
        log(
            f"{text.path}: {count}; {scan.inside:,} lines contain the separator "
            f"{documents.SEPARATOR}, but not alone: they divide nothing"
        )
    small = tokenizer.size(chosen) <= 2**16
    dtype = np.dtype(np.uint16 if small else np.uint32)
    temporary = atomic.temporary_directory(final)
    # At most one token a byte; a byte-level BPE makes far fewer, so ask for room for half of that.
    atomic.require_space(temporary, text.bytes * dtype.itemsize // 2)
    writers = [_TokenWriter(temporary / name, dtype) for name in (TRAIN, VALIDATION)]
    end = tokenizer.end_token(chosen)
    batch: list[Piece] = []

    def write_batch() -> None:
        texts = [piece.text for piece in batch if not piece.is_separator]
        with tokenizer.errors_named("the tokenizer"):
            encoded = iter(chosen.encode_batch_fast(texts, add_special_tokens=False))
        for piece in batch:
            writers[piece.held_out].write([end] if piece.is_separator else next(encoded).ids)
        batch.clear()
        fault_injection.point("cache.batch")

    size = 0
    longest = tokenizer.longest_piece(chosen)
    report = documents.progress(text, "tokenizing", log)
    for piece in documents.split_pieces(text.path, scan.cut, longest, report):
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH or len(batch) >= 65536:
            write_batch()
            size = 0
    write_batch()
    for writer in writers:
        writer.close()
    atomic.write_json(temporary / COUNTS, {"documents": scan.documents})
    text.require_unchanged()
    atomic.publish(temporary, final, "cache")


def _check_vocabulary(chosen: Tokenizer, config: Config, log: Log) -> None:
    """The tokenizer must fit the embedding; a smaller one is worth a line."""
    entries, rows, needed = chosen.get_vocab_size(), config.model.vocab_size, tokenizer.size(chosen)
    if needed > rows:
        gaps = "" if needed == entries else f", the highest id is {needed - 1:,}"
        raise InputError(
            f"tokenizer.source {config.tokenizer.source}: has {entries:,} entries{gaps}, more than "
            f"model.vocab_size {rows:,}; set model.vocab_size={needed}"
        )
    if entries < rows:
        log(f"the tokenizer has {entries:,} entries; {rows - entries:,} embedding rows stay unused")


def _check_length(corpus: Corpus, config: Config, path: Path) -> None:
    """The training part must hold a window, the held-out part a prediction."""
    least = config.data.sequence_length + 1
    if len(corpus.train) < least:
        raise InputError(
            f"{path}: has {len(corpus.train):,} training tokens, fewer than one window of "
            f"data.sequence_length + 1 = {least:,}; use a longer text or a shorter window"
        )
    if len(corpus.validation) < 2:
        raise InputError(
            f"{path}: leaves {len(corpus.validation)} held-out tokens, and 2 are needed; use a "
            "longer text or a larger data.validation_fraction"
        )
