"""From the files of an input to a Corpus: tokens on disk, made once, in `data.cache_dir`.

    tokens-<key>/       the tokens of one file with one tokenizer (shards.py)
    tokenizer-<key>/    a tokenizer that was learned from a text
    hashes.json         the sha256 of files that did not change since

Each is named by a hash of what it was made from, and is whole or not there (atomic.py).
"""

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from smollm import atomic
from smollm.config import Config
from smollm.data import files, heldout, learning, parallel, shards, tokenizer
from smollm.data.documents import SEPARATOR
from smollm.data.files import Source
from smollm.data.hashes import Hashes, Identity, identity
from smollm.data.parallel import Progress, Task
from smollm.data.shards import FileTokens, Shard, Tokens, key
from smollm.data.sources import Reader, refusal
from smollm.data.tokenizer import Log
from smollm.errors import InputError

VERIFIED = 256_000_000  # bytes of tokens up to which every start reads them to verify them


@dataclass(frozen=True)
class Part:
    """The tokens of one source."""

    name: str  # as it was given
    train: Tokens
    validation: Tokens  # empty where data.validation_file is the held-out text


@dataclass(frozen=True)
class Corpus:
    """A tokenized input: what training reads."""

    train: Tokens  # of all sources, one after the other
    parts: tuple[Part, ...]  # one for each source, and one for data.validation_file
    tokenizer: Tokenizer
    documents: int
    text_bytes: int  # of the documents' texts, in UTF-8
    fingerprint: dict[str, Any]  # of the text, the tokenizer and the split

    @property
    def held_out(self) -> list[Part]:
        """The parts with held-out tokens."""
        return [part for part in self.parts if len(part.validation)]

    @property
    def tokens(self) -> int:
        """All tokens, held out or not."""
        return len(self.train) + sum(len(part.validation) for part in self.parts)

    def conservation(self) -> str:
        """The line that shows that no token was dropped."""
        documents = "1 document" if self.documents == 1 else f"{self.documents:,} documents"
        return (
            f"{self.fingerprint['text_bytes']:,} bytes, {documents}, {self.tokens:,} tokens "
            f"= {len(self.train):,} train + {self.tokens - len(self.train):,} validation"
        )


def prepare(
    config: Config,
    tokenizer_json: str | None = None,
    log: Log = print,
    workers: int | None = None,
) -> Corpus:
    """Tokenize what `data.input_files` names, or find it tokenized already.

    Args:
        tokenizer_json: a checkpoint's tokenizer, which then wins over tokenizer.source.
        log: takes a line for people.
        workers: see `parallel.tokenize`.

    Raises:
        InputError: a file or the tokenizer cannot be used, or the text is too short.
    """
    data, cache = config.data, Path(config.data.cache_dir)
    validation = [data.validation_file] if data.validation_file else []
    sources = files.find([*data.input_files, *validation], log)
    try:
        with _locked(cache, log):
            corpus = _prepare(config, sources, tokenizer_json, log, workers)
    except OSError as error:
        raise InputError(
            f"data.cache_dir {cache}: {error.strerror or error} ({error.filename or 'there'}); "
            "make room there or name another directory; what is tokenized stays"
        ) from error
    _check_length(corpus, config)
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


def _prepare(
    config: Config, sources: list[Source], tokenizer_json: str | None, log: Log,
    workers: int | None,
) -> Corpus:  # fmt: skip
    """The corpus from the cache, where what is missing or damaged is made first."""
    hashes = Hashes(Path(config.data.cache_dir))
    hashed = _hash(sources, hashes, log)
    chosen = _choose_tokenizer(config, sources, hashed, tokenizer_json, log)
    _check_vocabulary(chosen, config, log)
    found = _tokens_of_files(config, hashed, chosen, hashes, log, workers)
    with contextlib.suppress(PermissionError):
        hashes.save()
    _check_rows(found, config.data.max_bad_rows, log)
    return _corpus(config, sources, hashed, found, chosen)


@dataclass(frozen=True)
class _Hashed:
    """A file as it was when it was hashed."""

    identity: Identity
    sha256: str


def _hash(sources: list[Source], hashes: Hashes, log: Log) -> dict[Path, _Hashed]:
    """The hash of each file, remembered or new."""
    found, done = {}, 0
    paths = [path for source in sources for path in source.files]
    identities = {}
    for path in paths:
        with files.reading(path):
            identities[path] = identity(path)
    with Progress("reading", sum(i.size for i in identities.values()), log) as progress:
        for path in paths:
            with files.reading(path):
                found[path] = _Hashed(identities[path], hashes.sha256(path))
            done += identities[path].size
            progress.update(done)
    return found


def _reader(config: Config, path: Path, hashed: dict[Path, _Hashed]) -> Reader:
    data = config.data
    kind = files.kind_of(path)
    return Reader(path, hashed[path].identity, kind, data.text_key, data.max_bad_rows)


# --- the tokenizer -------------------------------------------------------------------------------


def _choose_tokenizer(
    config: Config, sources: list[Source], hashed: dict[Path, _Hashed],
    tokenizer_json: str | None, log: Log,
) -> Tokenizer:  # fmt: skip
    """The tokenizer that the configuration or a checkpoint asks for."""
    if tokenizer_json is not None:
        return tokenizer.parse(tokenizer_json, "the checkpoint's tokenizer.json", log)
    if config.tokenizer.source == "gpt2":
        return tokenizer.fetch_gpt2(Path(config.data.cache_dir))
    if config.tokenizer.source == "train":
        return _learned_tokenizer(config, sources, hashed, log)
    return tokenizer.read(config.tokenizer.source, log)


def _learned_tokenizer(
    config: Config, sources: list[Source], hashed: dict[Path, _Hashed], log: Log
) -> Tokenizer:
    """A tokenizer learned from the training part of the text, or the cached one."""
    data, fraction = config.data, config.data.validation_fraction
    if data.validation_file:
        sources, fraction = sources[:-1], 0.0
    texts = [[hashed[path].sha256 for path in source.files] for source in sources]
    name = key(texts, data.text_key, config.model.vocab_size, fraction, shards.FORMAT)
    cache = Path(data.cache_dir)
    directory = cache / f"tokenizer-{name}"
    if atomic.problem(directory, (tokenizer.FILE,)):
        if any(cache.glob("tokenizer-*")):
            log(
                "tokenizer.source train: this text is new or was changed, so a tokenizer is "
                "learned from it, and all of it is tokenized with that"
            )
        readers = [[_reader(config, path, hashed) for path in source.files] for source in sources]
        texts = learning.training_texts(readers, fraction, log)
        learned = tokenizer.learn(texts, config.model.vocab_size)
        tokenizer.publish(learned.to_str(), directory)
    path = directory / tokenizer.FILE
    return tokenizer.parse(atomic.read_text(path), str(path))


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


# --- the tokens ----------------------------------------------------------------------------------


def _tokens_of_files(
    config: Config, hashed: dict[Path, _Hashed], chosen: Tokenizer, hashes: Hashes, log: Log,
    workers: int | None,
) -> dict[Path, FileTokens]:  # fmt: skip
    """The tokens of each file from the cache, where what is missing is tokenized first."""
    cache, tokenizer_key = Path(config.data.cache_dir), key(chosen.to_str())
    directories = {}
    for path, file in hashed.items():
        made_from = (shards.FORMAT, file.sha256, files.ending(path), config.data.text_key)
        directories[path] = cache / f"tokens-{key(*made_from, tokenizer_key)}"
    known = {directory: shards.read(directory) for directory in directories.values()}
    whole = [found for found in known.values() if isinstance(found, FileTokens)]
    width = 2 if tokenizer.size(chosen) <= 2**16 else 4
    size = width * sum(shard.tokens for found in whole for shard in found.shards)
    tasks = {}
    for path, directory in directories.items():
        found = known[directory]
        wrong = found if isinstance(found, str) else shards.problem(found, hashes, size > VERIFIED)
        if wrong and directory not in tasks:
            if not isinstance(found, str) or (directory / shards.FILE).exists():
                log(f"{directory}: {wrong}; tokenizing again")
            tasks[directory] = Task(_reader(config, path, hashed), directory)
    if tasks:
        _check_space(list(tasks.values()), cache, width)
        made = parallel.tokenize(list(tasks.values()), chosen, workers, log)
        for found in made.values():
            for shard in found.shards:
                for name, digest in shard.hashes.items():
                    hashes.add(shard.directory / name, digest)
        known.update(made)
    return {path: known[directory] for path, directory in directories.items()}


def _check_space(tasks: list[Task], cache: Path, width: int) -> None:
    """There must be room for the tokens: of `width` bytes, some three bytes of text each."""
    text = sum(
        task.reader.identity.size * (4 if files.is_compressed(task.reader.path) else 1)
        for task in tasks
    )
    atomic.require_space(cache, text * width // 3)


def _check_rows(found: dict[Path, FileTokens], most: int, log: Log) -> None:
    """Raise InputError where too many rows have no text; say what was left out."""
    findings = {path: file.findings for path, file in found.items()}
    bad = sum(file.bad_rows for file in findings.values())
    empty = sum(file.empty for file in findings.values())
    for path, file in findings.items():
        if bad > most and file.bad_rows:
            raise InputError(refusal(path, bad, file.first_bad, most))
        if file.bad_rows:
            log(f"{path}: {file.bad_rows:,} rows left out; the first: {file.first_bad}")
        if file.inside:
            log(
                f"{path}: {file.inside:,} lines contain the separator {SEPARATOR}, but not alone: "
                "they divide nothing"
            )
    if empty:
        log(f"{empty:,} empty documents left out")


# --- the corpus ----------------------------------------------------------------------------------


def _corpus(
    config: Config, sources: list[Source], hashed: dict[Path, _Hashed],
    found: dict[Path, FileTokens], chosen: Tokenizer,
) -> Corpus:  # fmt: skip
    """The tokens of all files as one training part and the held-out parts."""
    encoder = tokenizer.for_documents(chosen)
    parts, made_of = [], []
    for source in sources:
        all_shards, tokens = _tokens_of_source(source, found)
        cut = len(tokens)
        if not config.data.validation_file:
            cut = heldout.offset(all_shards, config.data.validation_fraction, encoder)
        elif source is sources[-1]:
            cut = 0
        parts.append(Part(source.name, tokens.part(0, cut), tokens.part(cut, len(tokens))))
        made_of.append(([shard.hashes[shards.TOKENS] for shard in all_shards], len(tokens), cut))
    texts = [[hashed[path].sha256 for path in source.files] for source in sources]
    is_one = len(hashed) == 1  # as fingerprints were when an input was one file
    fingerprint = {
        "text_sha256": texts[0][0] if is_one else key(texts),
        "text_bytes": sum(file.identity.size for file in hashed.values()),
        "tokenizer_sha256": sha256(chosen.to_str().encode()).hexdigest(),
        "validation_fraction": config.data.validation_fraction,
        "tokens": key(made_of),
    }
    every = [shard for path in hashed for shard in found[path].shards]
    return Corpus(
        train=Tokens(part for each in parts for part in each.train.parts),
        parts=tuple(parts),
        tokenizer=chosen,
        documents=sum(shard.documents for shard in every),
        text_bytes=sum(shard.bytes for shard in every),
        fingerprint=fingerprint,
    )


def _tokens_of_source(source: Source, found: dict[Path, FileTokens]) -> tuple[list[Shard], Tokens]:
    """The shards and the tokens of all files of a source.

    Its last document gets no end-of-text where it is a text's that has no separator at its end.
    """
    in_order = [found[path] for path in source.files if found[path].shards]
    every = [shard for file in in_order for shard in file.shards]
    tokens = Tokens((shard.directory / shards.TOKENS, 0, shard.tokens) for shard in every)
    is_open = bool(in_order) and in_order[-1].open_end
    return every, tokens.part(0, len(tokens) - is_open)


def _check_length(corpus: Corpus, config: Config) -> None:
    """The training part must hold a window, each held-out part a prediction."""
    least, given = config.data.sequence_length + 1, ", ".join(config.data.input_files)
    if len(corpus.train) < least:
        raise InputError(
            f"{given}: has {len(corpus.train):,} training tokens, fewer than one window of "
            f"data.sequence_length + 1 = {least:,}; use a longer text or a shorter window"
        )
    of_file = config.data.validation_file is not None
    for part in corpus.parts[-1:] if of_file else corpus.parts:
        if len(part.validation) < 2:
            larger = "" if of_file else " or a larger data.validation_fraction"
            raise InputError(
                f"{part.name}: leaves {len(part.validation)} held-out tokens, and 2 are needed; "
                f"use a longer text{larger}"
            )
