"""The tokens of an input as training reads them: one training part, and what is held out."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from smollm.config import Config
from smollm.data import heldout, shards, tokenizer
from smollm.data.files import Source
from smollm.data.hashes import Identity
from smollm.data.shards import FileTokens, Shard, Tokens, key
from smollm.errors import InputError


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

    def rows(self) -> list[tuple[str, str]]:
        """The rows of a table for people: all of it, and where there are several each part."""
        rows = [("data", self.conservation())]
        for number, part in enumerate(self.parts if len(self.parts) > 1 else ()):
            train, validation = len(part.train), len(part.validation)
            text = f"{part.name}: {train:,} train + {validation:,} validation tokens"
            rows.append((f"  {number}", text))
        return rows


@dataclass(frozen=True)
class HashedFile:
    """A file as it was when it was hashed."""

    identity: Identity
    sha256: str


def build(
    config: Config, sources: list[Source], hashed: dict[Path, HashedFile],
    found: dict[Path, FileTokens], chosen: Tokenizer,
) -> Corpus:  # fmt: skip
    """The tokens of all files as one training part and the held-out parts."""
    encoder = tokenizer.for_documents(chosen)
    parts, made_of, validation_file = [], [], config.data.validation_file
    for source in sources:
        all_shards, tokens = _tokens_of_source(source, found)
        cut = len(tokens)
        if not validation_file:
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
        "validation_fraction": None if validation_file else config.data.validation_fraction,
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


def check_length(corpus: Corpus, config: Config) -> None:
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
