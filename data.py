"""Text -> tokens on disk (once) -> batch(step), a pure function of (seed, step).

Documents are separated by lines `<|endoftext|>`; each such line becomes the end-of-text token. The
last `validation_fraction` of the text is held out, cut at a document boundary where there is one.
Tokens live in memory-mapped .npy files in `data.cache_dir`, keyed by what they were made from. The
text is read, tokenized and written as a stream on all cores, so memory does not grow with it.
"""

from __future__ import annotations

import bisect
import codecs
import functools
import io
import itertools
import os
import re
import shlex
import stat
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import faults
import files
from config import Config, UserError, derive_seed

SEPARATOR = "<|endoftext|>"
PAD = "<|pad|>"
END_TOKENS = (SEPARATOR, "<|end_of_text|>", "</s>", "<eos>")  # the first that a tokenizer knows
TOKEN_FILES = ("train.npy", "validation.npy")
FORMAT = 1  # of the token cache
PIECE = 64 * 1024  # characters tokenized as one: pieces are spread over the cores
BATCH = 4 * 1024 * 1024  # characters handed to the tokenizer at once
_SEPARATOR_LINE = re.compile(r"^<\|endoftext\|>\n", re.MULTILINE)
_LAST_SEPARATOR_LINE = re.compile(r"^<\|endoftext\|>(?:\n|\Z)", re.MULTILINE)
_LAST_WORD_END = re.compile(r".*[^\W_](?= )", re.DOTALL)
_LONG_WORD = re.compile(r"\S{4096}")  # learning from longer ones is very slow
_LINE_END = re.compile(r"(?<=\S)\n")
_WORD_END = re.compile(r"(?<=\S)\s")


class InputError(UserError):
    """The text or the tokenizer cannot be used."""

    exit_code = 3


# --- reading -------------------------------------------------------------------------------------


def check_text_file(path: Path) -> None:
    """Raise InputError unless `path` is a regular, readable, non-empty file that is not packed."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: is not a regular file; name a text file with --input_file")
        if status.st_size == 0:
            raise InputError(f"{path}: is empty; it must hold the text to train on")
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a text file with --input_file") from error
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(
            f"{path}: is UTF-16; convert it: "
            f"iconv -f UTF-16 -t UTF-8 {shlex.quote(str(path))} > new"
        )
    for magic, name, tool in (
        (b"\x1f\x8b", "gzip", "gunzip"),
        (b"PK\x03\x04", "zip", "unzip"),
        (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
        (b"BZh", "bzip2", "bunzip2"),
    ):
        if start.startswith(magic):
            raise InputError(f"{path}: is packed with {name}; unpack it first with {tool}")


class Text:
    """A text file as it was when it was hashed: what is made from it is kept under that hash."""

    def __init__(self, path: Path) -> None:
        self.path, self._before = path, self._identity(path)
        self.bytes = self._before[0]
        self.sha256 = files.sha256(path)

    @staticmethod
    def _identity(path: Path) -> tuple[int, int, int]:
        """What changes when a file is edited or replaced: (bytes, time of change in ns, inode)."""
        status = path.stat()
        return status.st_size, status.st_mtime_ns, status.st_ino

    def require_unchanged(self) -> None:
        """Raise InputError if the file was edited or replaced since."""
        if self._identity(self.path) != self._before:
            raise InputError(f"{self.path}: was changed while it was read; start again")


def _blocks(path: Path) -> Iterator[str]:
    """The text in blocks of about 1 MB: UTF-8 checked, BOM dropped, line ends made newlines."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    newlines = io.IncrementalNewlineDecoder(decoder, translate=True)
    with open(path, "rb") as file:
        offset = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(offset)
        while True:
            block = file.read(1 << 20)
            if (nul := block.find(b"\0")) >= 0:
                raise InputError(
                    f"{path}: byte {offset + nul} is NUL; this is not a text file (UTF-16 is read "
                    "after: iconv -f UTF-16 -t UTF-8)"
                )
            waiting = len(decoder.getstate()[0])
            try:
                yield newlines.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = offset - waiting + error.start
                raise InputError(
                    f"{path}: byte {at} is not UTF-8 ({error.reason}); if it is Latin-1, convert "
                    f"it: iconv -f LATIN1 -t UTF-8 {shlex.quote(str(path))} > new"
                ) from error
            if not block:
                return
            offset += len(block)


def _pieces(path: Path) -> Iterator[tuple[str, bool]]:
    """The text in order: (text, False) for at most PIECE characters, ("", True) for a separator.

    A long document is cut between a letter or digit and a space, where a byte-level BPE cannot
    have a token across the cut; where there is none in half a PIECE, before a newline or anywhere.
    """
    buffer, line_start = "", True
    for block in itertools.chain(_blocks(path), [None]):
        buffer += block or ""
        pattern = _LAST_SEPARATOR_LINE if block is None else _SEPARATOR_LINE
        begin = 0
        for match in pattern.finditer(buffer):
            if match.start() > 0 or line_start:
                yield from ((text, False) for text in _cut(buffer[begin : match.start()]) if text)
                yield "", True
                begin, line_start = match.end(), True
        *ready, buffer = _cut(buffer[begin:])
        line_start = line_start and not ready
        yield from ((text, False) for text in ready)
    if buffer:
        yield buffer, False


def _cut(text: str) -> list[str]:
    """Cut a text into pieces of at most PIECE characters; the last one may be empty."""
    pieces = []
    while len(text) > PIECE:
        word_end = _LAST_WORD_END.match(text, PIECE // 2, PIECE)
        # Before a newline, so that a separator line that is not read whole keeps its line start.
        newline = text.rfind("\n", PIECE // 2, PIECE)
        end = word_end.end() if word_end else newline if newline > 0 else PIECE
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text]


@dataclass(frozen=True)
class Scan:
    """What one pass over the text found."""

    documents: int
    cut: int  # the character at which the held-out part begins


def _scan(path: Path, validation_fraction: float) -> Scan:
    """Read the whole text once: check it, and find where the held-out part begins.

    The cut is the document boundary nearest to the asked fraction, if one lies where between half
    and twice of it would be held out; else the asked place, moved to the next line or word end
    when the text is split.
    """
    total, boundaries = 0, array("Q")
    for text, separator in _pieces(path):
        total += len(SEPARATOR) + 1 if separator else len(text)
        if separator:
            boundaries.append(total)
    documents = len(boundaries) + (not boundaries or boundaries[-1] < total)
    held_out = total * validation_fraction
    target = total - held_out
    at = bisect.bisect_left(boundaries, target)
    around = boundaries[max(at - 1, 0) : at + 1]
    near = [cut for cut in around if held_out / 2 <= total - cut <= 2 * held_out]
    return Scan(documents, min(near, key=lambda cut: abs(cut - target), default=int(target)))


def _parts(path: Path, scan: Scan) -> Iterator[tuple[str, bool, bool]]:
    """The pieces of the text with a third word: whether it belongs to the held-out part."""
    position, held_out = 0, False
    for text, separator in _pieces(path):
        length = len(SEPARATOR) + 1 if separator else len(text)
        held_out = held_out or position >= scan.cut
        if not held_out and text and position + length > scan.cut:
            after = scan.cut - position
            match = _LINE_END.search(text, after) or _WORD_END.search(text, after)
            # Without white space in sight, cut inside of the "word" rather than hold out nothing.
            end = match.start() if match else length if length - after < 100 else after
            yield text[:end], False, False
            text, held_out = text[end:], True
        if text or separator:
            yield text, separator, held_out
        position += length


# --- tokenizers ----------------------------------------------------------------------------------


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE (GPT-2's kind) with at most `vocab_size` entries from texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def parse_tokenizer(text: str, where: str) -> Tokenizer:
    """A tokenizer from a tokenizer.json's text, with `<|pad|>` added and nothing truncated.

    Raises:
        InputError: it is not a tokenizer, or has no end-of-text token.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{where}: is not a tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.token_to_id(PAD) is None:
        tokenizer.add_special_tokens([PAD])
    end_token(tokenizer, where)
    return tokenizer


def end_token(tokenizer: Tokenizer, where: str = "the tokenizer") -> int:
    """The id of the end-of-text token; InputError where there is none."""
    for token in END_TOKENS:
        if (number := tokenizer.token_to_id(token)) is not None:
            return number
    raise InputError(f"{where}: has no end-of-text token (one of {', '.join(END_TOKENS)}); add one")


def _fetch_gpt2(cache: Path) -> Tokenizer:
    """GPT-2's tokenizer: from our cache, or fetched once by the tokenizers library."""
    path = cache / "tokenizer-gpt2.json"
    if not path.exists():
        try:
            text = Tokenizer.from_pretrained("gpt2").to_str()
        except Exception as error:  # the library raises whatever its HTTP client does
            raise InputError(
                "tokenizer.source gpt2: cannot be fetched (no network?); either connect this "
                "machine to the network once, or set tokenizer.source to the path of a "
                "tokenizer.json, or to train, which learns one from the text "
                f"({type(error).__name__})"
            ) from error
        _write_text(path, text)
    return parse_tokenizer(path.read_text(encoding="utf-8", errors="replace"), str(path))


def _learned_tokenizer(config: Config, text: Text, scan: Callable[[], Scan]) -> Tokenizer:
    """A tokenizer learned from the training part of the text, from the cache if it is there."""
    made_from = (text.sha256, config.model.vocab_size, config.data.validation_fraction, FORMAT)
    cached = Path(config.data.cache_dir) / f"tokenizer-{_key(*made_from)}.json"
    if cached.exists():
        digest, _, content = cached.read_bytes().partition(b"\n")
        if sha256(content).hexdigest().encode() == digest:
            return parse_tokenizer(content.decode(), str(cached))
    parts = _parts(text.path, scan())
    pieces = (
        piece
        for part, separator, held_out in parts
        if not (separator or held_out)
        for piece in (_slices(part, 4096) if _LONG_WORD.search(part) else [part])
    )
    tokenizer = train_tokenizer(pieces, config.model.vocab_size)
    text.require_unchanged()
    content = tokenizer.to_str()
    _write_text(cached, sha256(content.encode()).hexdigest() + "\n" + content)
    return tokenizer


def _slices(text: str, length: int) -> list[str]:
    return [text[at : at + length] for at in range(0, len(text), length)]


def _load_tokenizer(config: Config, text: Text, scan: Callable[[], Scan]) -> Tokenizer:
    """The tokenizer that tokenizer.source names."""
    source = config.tokenizer.source
    if source == "gpt2":
        return _fetch_gpt2(Path(config.data.cache_dir))
    if source == "train":
        return _learned_tokenizer(config, text, scan)
    file = Path(source)
    try:
        if file.exists() and not (file.is_file() or file.is_dir()):  # a device or FIFO has no end
            raise InputError(f"tokenizer.source {source}: is not a regular file")
        return parse_tokenizer(file.read_text(encoding="utf-8"), source)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise InputError(
            f"tokenizer.source {source}: {reason}; give gpt2, train or the path of a tokenizer.json"
        ) from error


def _write_text(path: Path, text: str) -> None:
    """Write a small file of the cache atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{files.TEMPORARY}{path.name}-{os.getpid()}"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# --- tokens on disk ------------------------------------------------------------------------------


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


def _tokenize(text: Text, tokenizer: Tokenizer, scan: Scan, final: Path) -> None:
    """Tokenize the text as a stream into final/train.npy and final/validation.npy."""
    small = tokenizer.get_vocab_size() <= 2**16
    dtype = np.dtype(np.uint16 if small else np.uint32)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = files.temporary_directory(final)
    # At most one token a byte; a byte-level BPE makes far fewer, so ask for room for half of that.
    files.require_space(temporary, text.bytes * dtype.itemsize // 2)
    writers = [_TokenWriter(temporary / name, dtype) for name in TOKEN_FILES]
    end = end_token(tokenizer)
    batch: list[tuple[str, bool, bool]] = []

    def flush_batch() -> None:
        texts = [text for text, separator, _ in batch if not separator]
        encoded = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        for _, separator, held_out in batch:
            writers[held_out].write([end] if separator else next(encoded).ids)
        batch.clear()
        faults.point("cache.batch")

    size = 0
    for part in _parts(text.path, scan):
        batch.append(part)
        size += len(part[0])
        if size >= BATCH or len(batch) >= 65536:
            flush_batch()
            size = 0
    flush_batch()
    for writer in writers:
        writer.close()
    counts = {name: writer.count for name, writer in zip(TOKEN_FILES, writers, strict=True)}
    files.write_json(temporary / "counts.json", {**counts, "documents": scan.documents})
    text.require_unchanged()
    files.publish(temporary, final, "cache")


def _key(*made_from: Any) -> str:
    return sha256(repr(made_from).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Corpus:
    """A tokenized text: what training reads."""

    train: np.ndarray  # (tokens,) uint16 or uint32, memory-mapped
    validation: np.ndarray
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
    config: Config,
    path: Path,
    tokenizer_json: str | None = None,
    log: Callable[[str], None] = print,
) -> Corpus:
    """Tokenize a text, or find it tokenized already.

    Args:
        path: the text (UTF-8).
        tokenizer_json: a checkpoint's tokenizer, which then wins over tokenizer.source.
        log: takes a line for people.

    Raises:
        InputError: the text or the tokenizer cannot be used, or the text is too short.
    """
    check_text_file(path)
    cache = Path(config.data.cache_dir)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with files.lock(cache / ".lock", wait=log):  # two runs on one cache: one tokenizes
            if left := files.sweep(cache):
                log(f"{cache}: after an interruption: {', '.join(left)}")
            tokenizer, fingerprint, directory = _prepare(config, path, tokenizer_json, log)
        counts = files.read_json(directory / "counts.json")
        parts = [np.load(directory / name, mmap_mode="r") for name in TOKEN_FILES]
    except OSError as error:
        raise InputError(
            f"data.cache_dir {cache}: {error.strerror or error} ({error.filename or path}); make "
            "room there or name another directory"
        ) from error
    corpus = Corpus(parts[0], parts[1], tokenizer, counts["documents"], fingerprint)
    _check_length(corpus, config, path)
    return corpus


def _prepare(
    config: Config, path: Path, tokenizer_json: str | None, log: Callable[[str], None]
) -> tuple[Tokenizer, dict[str, Any], Path]:
    """The tokenizer, the fingerprint, and the directory of the tokens, made where it is missing."""
    text = Text(path)
    scan = functools.cache(lambda: _scan(path, config.data.validation_fraction))
    if tokenizer_json is not None:
        tokenizer = parse_tokenizer(tokenizer_json, "the checkpoint's tokenizer.json")
    else:
        tokenizer = _load_tokenizer(config, text, scan)
    _check_vocabulary(tokenizer, config, log)
    fingerprint = {
        "text_sha256": text.sha256,
        "text_bytes": text.bytes,
        "tokenizer_sha256": sha256(tokenizer.to_str().encode()).hexdigest(),
        "validation_fraction": config.data.validation_fraction,
    }
    key = _key(FORMAT, sorted(fingerprint.items()))
    directory = Path(config.data.cache_dir) / f"tokens-{key}"
    wrong = files.problem(directory)
    if wrong:
        if directory.exists():
            log(f"{directory}: {wrong}; tokenizing again")
        _tokenize(text, tokenizer, scan(), directory)
    return tokenizer, fingerprint, directory


def _check_vocabulary(tokenizer: Tokenizer, config: Config, log: Callable[[str], None]) -> None:
    """The tokenizer must fit the embedding; a smaller one is worth a line."""
    entries, rows = tokenizer.get_vocab_size(), config.model.vocab_size
    if entries > rows:
        raise InputError(
            f"tokenizer.source {config.tokenizer.source}: has {entries:,} entries, more than "
            f"model.vocab_size {rows:,}; set model.vocab_size={entries}"
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


# --- batches -------------------------------------------------------------------------------------


class TokenDataset:
    """The training windows, in an order that is a pure function of the seed.

    The tokens are taken as a ring. Epoch e is a seeded permutation of the non-overlapping windows
    that start at a seeded offset: no token is predicted twice in an epoch, and all but a rest of
    less than one window are, a different rest each time.

    Args:
        tokens: (N,) the training tokens, N > sequence_length.
        sequence_length: T, the tokens predicted in a window.
        sequences_per_step: windows in one optimizer step, over all processes.
        seed: of the order.
    """

    def __init__(
        self, tokens: np.ndarray, sequence_length: int, sequences_per_step: int, seed: int
    ) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.sequences_per_step = sequences_per_step
        self.seed = seed
        self.windows_per_epoch = len(tokens) // sequence_length
        self._epoch_starts = functools.lru_cache(maxsize=2)(self._make_epoch_starts)

    def _make_epoch_starts(self, epoch: int) -> np.ndarray:
        """Where each window of an epoch starts, in the order of training."""
        key = derive_seed(self.seed, epoch, "epoch")
        random = np.random.Generator(np.random.Philox(key))
        offset = random.integers(len(self.tokens))
        order = random.permutation(self.windows_per_epoch)
        return (offset + order * self.sequence_length) % len(self.tokens)

    def epoch(self, step: int) -> float:
        """Epochs done after `step` optimizer steps."""
        return step * self.sequences_per_step / self.windows_per_epoch

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The windows of optimizer step `step` (from 1) that fall to one process.

        The processes' shares, one after the other, are the same windows for every world size.

        Returns:
            input_ids and labels, each (sequences_per_step / world_size, T), in the dtype of the
            tokens; labels are the next tokens.
        """
        share = self.sequences_per_step // world_size
        first = (step - 1) * self.sequences_per_step + rank * share
        starts = np.empty(share, dtype=np.int64)
        for row, number in enumerate(range(first, first + share)):
            epoch, window = divmod(number, self.windows_per_epoch)
            starts[row] = self._epoch_starts(epoch)[window]
        span = np.arange(self.sequence_length + 1)
        windows = self.tokens[(starts[:, None] + span) % len(self.tokens)]
        return windows[:, :-1], windows[:, 1:]


def validation_batches(
    tokens: np.ndarray,
    sequence_length: int,
    batch_size: int,
    ignore_index: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The whole held-out text in consecutive windows: each token but the first predicted once.

    Batches are spread over the processes, each gets as many, and all have the same shape: what is
    missing at the end is filled with token 0 and labels `ignore_index`.

    Yields:
        input_ids and labels, each (batch_size, sequence_length), int64.
    """
    starts = range(0, len(tokens) - 1, sequence_length)
    rounds = -(-len(starts) // (batch_size * world_size))
    for number in range(rounds):
        first = (number * world_size + rank) * batch_size
        inputs = np.zeros((batch_size, sequence_length), dtype=np.int64)
        labels = np.full((batch_size, sequence_length), ignore_index, dtype=np.int64)
        for row, start in enumerate(starts[first : first + batch_size]):
            window = tokens[start : start + sequence_length + 1]
            inputs[row, : len(window) - 1] = window[:-1]
            labels[row, : len(window) - 1] = window[1:]
        yield inputs, labels
