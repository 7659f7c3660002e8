"""From the files of an input to a Corpus: tokens on disk, made once, in `data.cache_dir`.

    tokens-<key>/       the tokens of one file with one tokenizer (shards.py)
    tokenizer-<key>/    a tokenizer that was learned from a text
    counts-<key>.json   what is in a file that is tokens already (token_files.py)
    hashes.json         the sha256 of the files of inputs, while they do not change

Each is named by a hash of what it was made from, and is whole or not there (atomic.py).
"""

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from tokenizers import Tokenizer

from smollm import atomic
from smollm.config import Config
from smollm.data import (
    corpus,
    files,
    formats,
    learning,
    listing,
    parallel,
    shards,
    token_files,
    tokenizer,
)
from smollm.data.corpus import Corpus, HashedFile, check_length
from smollm.data.documents import SEPARATOR
from smollm.data.files import Source
from smollm.data.hashes import Hashes, identity, key
from smollm.data.parallel import Task
from smollm.data.progress import Log, Progress
from smollm.data.remote import AnyFile, ChangedOnServerError, RemoteFile
from smollm.data.shards import FileTokens
from smollm.data.sources import Reader, refusal, text_size
from smollm.data.tokenizer import Chosen, Encoder, TokenizerFiles
from smollm.errors import ConfigError, InputError

# Every start verifies the hashes of the tokens up to so many bytes and files; of more, it takes the
# size, time and inode of a file for its proof, or a start would read them all.
VERIFIED, VERIFIED_FILES = 256_000_000, 1000
LOOKED_INTO = 16  # remote files, for how much text they hold; the others are taken to be like them


def prepare(
    config: Config,
    given: TokenizerFiles | None = None,
    log: Log = print,
    workers: int | None = None,
    commits: Mapping[str, str] | None = None,
) -> Corpus:
    """Tokenize what `data.input_files` names, or find it tokenized already.

    Where that is empty, data.validation_file is all that there is: a text to evaluate on.

    Args:
        given: the tokenizer of a checkpoint or model, which then wins over tokenizer.source.
        log: takes a line for people.
        workers: see `parallel.tokenize`.
        commits: of the sources that lie on the Hub, where a run goes on; see `Corpus.fingerprint`.

    Raises:
        InputError: a file or the tokenizer cannot be used, or the text is too short.
    """
    data, cache = config.data, Path(config.data.cache_dir)
    validation = [data.validation_file] if data.validation_file else []
    entries = [*data.input_files, *validation]
    sources = files.find(entries, cache, log, commits)
    try:
        with _locked(cache, log):
            try:
                found = _prepare(config, sources, given, log, workers)
            except ChangedOnServerError as error:
                log(f"{error}: looking again")
                for source in sources:
                    if source.commit is None:
                        listing.forget(source.name, cache)
                sources = files.find(entries, cache, log, commits)
                try:
                    found = _prepare(config, sources, given, log, workers)
                except ChangedOnServerError as again:
                    raise InputError(f"{again} again; start when it stays as it is") from again
    except OSError as error:
        raise InputError(
            f"data.cache_dir {cache}: {error.strerror or error} ({error.filename or cache}); make "
            "room there or name another directory; what is tokenized stays"
        ) from error
    check_length(found, config)
    return found


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
    config: Config, sources: list[Source], given: TokenizerFiles | None, log: Log,
    workers: int | None,
) -> Corpus:  # fmt: skip
    """The corpus from the cache, where what is missing or damaged is made first."""
    tokens = [source for source in sources if source.is_tokens]
    if tokens and config.tokenizer.source == "train":
        raise ConfigError(
            f"{tokens[0].name}: holds tokens, not a text that a tokenizer could be learned from; "
            "set tokenizer.source to the one that made them, such as gpt2"
        )
    hashed = _hash(sources, Hashes(Path(config.data.cache_dir), log), log)
    chosen = _choose_tokenizer(config, sources, hashed, given, log)
    _check_vocabulary(chosen.tokenizer, config, given, log)
    ready = {Path(path): hashed[path].sha256 for source in tokens for path in source.files}
    texts = {path: file for path, file in hashed.items() if path not in ready}
    in_place = token_files.count(
        ready, chosen.end, chosen.tokenizer, Path(config.data.cache_dir), log
    )
    found = _tokens_of_files(config, texts, chosen.encoder, log, workers)
    _check_rows(found, config.data.max_bad_rows, log)
    return corpus.build(config, sources, hashed, found, in_place, chosen)


def _hash(sources: list[Source], hashes: Hashes, log: Log) -> dict[AnyFile, HashedFile]:
    """The hash of each file, remembered or new; of a remote one what its server says."""
    identities, hashed = {}, {}
    for path in (path for source in sources for path in source.files):
        if isinstance(path, RemoteFile):
            hashed[path] = HashedFile(path.identity, path.version)
            continue
        with formats.reading(path):
            identities[path] = identity(path)
    with Progress("reading", sum(file.size for file in identities.values()), log) as progress:
        for path, file in identities.items():
            with formats.reading(path):
                hashed[path] = HashedFile(file, hashes.sha256(path, file, progress.update))
            progress.file_done(file.size)
    hashes.save()
    return hashed


def _reader(config: Config, path: AnyFile, hashed: dict[AnyFile, HashedFile]) -> Reader:
    if isinstance(path, RemoteFile):
        path.require_unchanged()  # before it is streamed
    data, kind = config.data, formats.kind_of(path)
    return Reader(path, hashed[path].identity, kind, data.text_key, data.max_bad_rows)


# --- the tokenizer -------------------------------------------------------------------------------


def _choose_tokenizer(
    config: Config, sources: list[Source], hashed: dict[AnyFile, HashedFile],
    given: TokenizerFiles | None, log: Log,
) -> Chosen:  # fmt: skip
    """The tokenizer that was given or that the configuration asks for."""
    if given is None and config.tokenizer.source in ("gpt2", "train"):
        if config.tokenizer.source == "gpt2":
            chosen = tokenizer.fetch_gpt2(Path(config.data.cache_dir))
        else:
            chosen = _learned_tokenizer(config, sources, hashed, log)
        return Chosen(chosen, tokenizer.end_token(chosen), {})
    found = given or tokenizer.read(config.tokenizer.source, Path(config.data.cache_dir))
    chosen = tokenizer.parse(found.content, found.where, log)
    end = tokenizer.end_token(chosen, found.eos_token, found.where)
    return Chosen(chosen, end, found.config)


def _learned_tokenizer(
    config: Config, sources: list[Source], hashed: dict[AnyFile, HashedFile], log: Log
) -> Tokenizer:
    """A tokenizer learned from the training part of the text, or the cached one."""
    data, fraction = config.data, config.data.validation_fraction
    if data.validation_file:
        sources, fraction = sources[:-1], 0.0
    texts = [[(hashed[p].sha256, formats.ending(p)) for p in source.files] for source in sources]
    name = key(texts, data.text_key, config.model.vocab_size, fraction, shards.FORMAT)
    cache = Path(data.cache_dir)
    directory = cache / f"tokenizer-{name}"
    if atomic.problem(directory, (tokenizer.FILE,)):
        if any(path.name != tokenizer.GPT2 for path in cache.glob("tokenizer-*")):
            log(
                "tokenizer.source train: this text is new or was changed, so a tokenizer is "
                "learned from it, and all of it is tokenized with that"
            )
        readers = [[_reader(config, path, hashed) for path in source.files] for source in sources]
        learned = learning.learn(readers, fraction, config.model.vocab_size, log)
        tokenizer.publish(learned.to_str(), directory)
    path = directory / tokenizer.FILE
    return tokenizer.parse(atomic.read_text(path), str(path))


def _check_vocabulary(
    chosen: Tokenizer, config: Config, given: TokenizerFiles | None, log: Log
) -> None:
    """The tokenizer must fit the embedding; a smaller one is worth a line."""
    entries, rows = chosen.get_vocab_size(), config.model.vocab_size
    where = given.where if given else f"tokenizer.source {config.tokenizer.source}"
    tokenizer.require_rows(chosen, rows, where, is_models_own=given is not None)
    if entries < rows:
        log(f"the tokenizer has {entries:,} entries; {rows - entries:,} embedding rows stay unused")


# --- the tokens ----------------------------------------------------------------------------------


def _tokens_of_files(
    config: Config, hashed: dict[AnyFile, HashedFile], encoder: Encoder, log: Log,
    workers: int | None,
) -> dict[AnyFile, FileTokens]:  # fmt: skip
    """The tokens of each file from the cache, where what is missing is tokenized first."""
    cache = Path(config.data.cache_dir)
    made_with = (shards.FORMAT, config.data.text_key, key(encoder.content), *encoder.unusual_end)
    directories = {
        path: cache / f"tokens-{key(_name(path, file), formats.ending(path), *made_with)}"
        for path, file in hashed.items()
    }
    known = {directory: shards.read(directory) for directory in directories.values()}
    width = encoder.dtype.itemsize
    size = width * sum(
        shard.tokens for found in known.values() if isinstance(found, FileTokens)
        for shard in found.shards
    )  # fmt: skip
    trust = size > VERIFIED or len(known) > VERIFIED_FILES
    tasks = {}
    for path, directory in directories.items():
        wrong = found = known[directory]
        if isinstance(found, FileTokens):
            wrong = shards.problem(directory, found, trust)
        if wrong and directory not in tasks:
            if os.path.lexists(directory / shards.FILE) or directory.is_file():
                log(f"{directory}: {wrong}; tokenizing again")
            tasks[directory] = Task(_reader(config, path, hashed), directory)
    if tasks:
        _check_space(tasks, cache, width)
        known.update(parallel.tokenize(list(tasks.values()), encoder, workers, log))
    return {path: known[directory] for path, directory in directories.items()}


def _name(path: AnyFile, file: HashedFile) -> str:
    """What the tokens of a file are found by; the hash of a remote one is its server's word."""
    return f"remote {file.sha256}" if isinstance(path, RemoteFile) else file.sha256


def _check_space(tasks: dict[Path, Task], cache: Path, width: int) -> None:
    """There must be room for the tokens: of `width` bytes, some three bytes of text each."""
    needed, seen = 0, [(0, 0)]  # of the remote files that were looked into: bytes, and of text
    for directory, task in tasks.items():
        size, is_remote = task.reader.identity.size, isinstance(task.reader.path, RemoteFile)
        if is_remote and len(seen) > LOOKED_INTO:
            text = size * sum(text for _, text in seen) // sum(size for size, _ in seen)
        else:
            text = text_size(task.reader)
            seen += [(size, text)] if is_remote else []
        made = sum(path.stat().st_size for path in directory.glob(f"shard_*/{shards.TOKENS}"))
        needed += max(0, text * width // 3 - made)
    atomic.require_space(cache, needed)


def _check_rows(found: dict[AnyFile, FileTokens], most: int, log: Log) -> None:
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
