"""The tokens of an input as training reads them: one training part, and what is held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from smollm.config import Config, DataConfig
from smollm.data import heldout, shards, token_files
from smollm.data.files import Source
from smollm.data.hashes import Identity, key
from smollm.data.remote import AnyFile
from smollm.data.shards import FileTokens
from smollm.data.token_files import Counts
from smollm.data.tokenizer import Chosen
from smollm.data.tokens import Tokens
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
    end: int  # the id of the end-of-text token
    tokenizer_config: dict[str, Any]  # see `tokenizer.Chosen`
    documents: int
    text_bytes: int | None  # of the documents' texts, in UTF-8; None where a source holds tokens
    fingerprint: dict[str, Any]  # of the text, the tokenizer and the split

    @property
    def tokens(self) -> int:
        """All tokens, held out or not."""
        return len(self.train) + sum(len(part.validation) for part in self.parts)

    def sources(self, data: DataConfig) -> list[Tokens]:
        """What training draws windows from: each source where they are mixed, else all in one."""
        return [part.train for part in self.parts[: len(data.weights)]] or [self.train]

    def held_out(self, most: int) -> dict[int, Tokens]:
        """The held-out tokens by the number of their part; at most so many, shared out by size."""
        parts = {n: part.validation for n, part in enumerate(self.parts) if len(part.validation)}
        return at_most(most, parts)

    def conservation(self) -> str:
        """The line that shows that no token was dropped."""
        documents = "1 document" if self.documents == 1 else f"{self.documents:,} documents"
        return (
            f"{self.fingerprint['text_bytes']:,} bytes, {documents}, {self.tokens:,} tokens "
            f"= {len(self.train):,} train + {self.tokens - len(self.train):,} validation"
        )

    def rows(self, mixed: Sequence[str] = ()) -> list[tuple[str, str]]:
        """The rows of a table for people: all of it, and where there are several each part.

        Args:
            mixed: what a mixture makes of each source, if there is one.
        """
        rows = [("data", self.conservation())]
        commits = self.fingerprint.get("commits", {})
        for number, part in enumerate(self.parts if len(self.parts) > 1 or commits else ()):
            train, validation = len(part.train), len(part.validation)
            at = f" (commit {commits[part.name][:12]})" if part.name in commits else ""
            text = f"{part.name}{at}: {train:,} train + {validation:,} validation tokens"
            more = f"; {mixed[number]}" if number < len(mixed) else ""
            rows.append((f"  {number}", text + more))
        return rows


def at_most(most: int, parts: dict[int, Tokens]) -> dict[int, Tokens]:
    """The beginnings of parts, at most so many tokens together, shared out by their sizes."""
    share = min(1.0, most / sum(len(tokens) for tokens in parts.values()))
    return {n: tokens.part(0, max(2, int(len(tokens) * share))) for n, tokens in parts.items()}


@dataclass(frozen=True)
class HashedFile:
    """A file as it was when it was hashed."""

    identity: Identity
    sha256: str


def build(
    config: Config, sources: list[Source], hashed: dict[AnyFile, HashedFile],
    found: dict[AnyFile, FileTokens], in_place: dict[Path, Counts], chosen: Chosen,
) -> Corpus:  # fmt: skip
    """The corpus of tokens that are on the disk.

    Args:
        sources: of the input; where there is a data.validation_file it is the last.
        found: the tokens of each file, which the `chosen` tokenizer made.
        in_place: what is in the files that are tokens already.
    """
    of_file, fraction = config.data.validation_file, config.data.validation_fraction
    parts, made_of = [], []
    for source in sources:
        split = fraction if not of_file else float(source is sources[-1])  # all of it, or nothing
        if source.is_tokens:
            tokens = token_files.stream(source.files, chosen.end)
            cut = token_files.held_out_offset(tokens, split, chosen.end)
            made = [hashed[path].sha256 for path in source.files]
        else:
            tokens, cut, made = _text_tokens([found[path] for path in source.files], split, chosen)
        parts.append(Part(source.name, tokens.part(0, cut), tokens.part(cut, len(tokens))))
        made_of.append((made, len(tokens), cut))
    every = [shard for file in found.values() for shard in file.shards]
    return Corpus(
        train=Tokens(part for each in parts for part in each.train.parts),
        parts=tuple(parts),
        tokenizer=chosen.tokenizer,
        end=chosen.end,
        tokenizer_config=chosen.config,
        documents=sum(shard.documents for shard in every)
        + sum(max(1, counts.ends) for counts in in_place.values()),
        text_bytes=None if in_place else sum(shard.bytes for shard in every),
        fingerprint={
            **_text_fingerprint(sources, hashed),
            "tokenizer_sha256": sha256(chosen.tokenizer.to_str().encode()).hexdigest(),
            "validation_fraction": None if of_file else fraction,
            "tokens": key(made_of),
        },
    )


def _text_tokens(
    files: Sequence[FileTokens], fraction: float, chosen: Chosen
) -> tuple[Tokens, int, list[str]]:
    """The tokens of a source of texts, how many are not held out, and what they were made of."""
    in_order = [file for file in files if file.shards]
    every = [shard for file in in_order for shard in file.shards]
    count = sum(shard.tokens for shard in every)
    if fraction in (0.0, 1.0):
        cut = 0 if fraction else count
    else:
        cut = heldout.offset(every, fraction, chosen.encoder)
    # A text that has no separator at its end has no end-of-text there, unless another follows.
    if cut < count and in_order[-1].open_end:
        count -= 1
    tokens = Tokens((shard.directory / shards.TOKENS, 0, shard.tokens) for shard in every)
    return tokens.part(0, count), cut, [shard.files[shards.TOKENS][-1] for shard in every]


def _text_fingerprint(sources: list[Source], hashed: dict[AnyFile, HashedFile]) -> dict[str, Any]:
    """What tells one text from another; of one file as it was when an input was one file.

    With the commit of each source that lies on the Hub.
    """
    texts = [[hashed[path].sha256 for path in source.files] for source in sources]
    commits = {source.name: source.commit for source in sources if source.commit}
    return {
        **({"commits": commits} if commits else {}),
        "text_sha256": texts[0][0] if len(hashed) == 1 else key(texts),
        "text_bytes": sum(file.identity.size for file in hashed.values()),
    }


def check_length(corpus: Corpus, config: Config) -> None:
    """The training part, if there is one, must hold a window, each held-out part a prediction."""
    least, given = config.data.sequence_length + 1, ", ".join(config.data.input_files)
    if given and len(corpus.train) < least:
        raise InputError(
            f"{given}: has {len(corpus.train):,} training tokens, fewer than one window of "
            f"data.sequence_length + 1 = {least:,}; use a longer text or a shorter window"
        )
    weights = config.data.weights if given else ()
    for part, weight in zip(corpus.parts, weights, strict=False):  # data.validation_file has none
        if weight and len(part.train) < least:
            raise InputError(
                f"{part.name}: has {len(part.train):,} training tokens, fewer than one window of "
                f"data.sequence_length + 1 = {least:,}, which its weight {weight} in data.weights "
                "needs; use a longer text, or the weight 0"
            )
    of_file = config.data.validation_file is not None
    for part in corpus.parts[-1:] if of_file else corpus.parts:
        if len(part.validation) < 2:
            larger = "" if of_file else " or a larger data.validation_fraction"
            raise InputError(
                f"{part.name}: leaves {len(part.validation)} held-out tokens, and 2 are needed; "
                f"use a longer text{larger}"
            )
