"""Tokenizers of every source, and those that cannot be used."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from data_helpers import (
    BODY,
    GPT2,
    needs_shared,
    prepare,
    reference_tokens,
    start_prepare,
    tokens_of,
    write,
)
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from smollm import generation
from smollm.data import documents
from smollm.data import tokenizer as tokenizer_module
from smollm.data.documents import SEPARATOR
from smollm.data.tokenizer import PAD, TokenizerFiles, errors_named, learn, parse, publish
from smollm.errors import InputError, ResourceError


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path, settings):
    """More entries than model.vocab_size: refused, with the number to set; fewer: a line."""
    path = write(tmp_path, BODY)
    with pytest.raises(InputError, match=r"512 entries.*model\.vocab_size 511.*vocab_size=512"):
        prepare(settings(vocab_size=511), path)
    lines = []
    prepare(settings(vocab_size=600), path, log=lines.append)
    assert lines == ["the tokenizer has 512 entries; 88 embedding rows stay unused"]
    lines.clear()
    prepare(settings(vocab_size=512), path, log=lines.append)
    assert lines == []


def test_what_a_tokenizer_file_asks_for_drops_and_adds_no_tokens(tmp_path, settings):
    """Truncation, padding and begin-of-text templates of a tokenizer.json do not touch the text."""
    path = write(tmp_path, f"{BODY}{SEPARATOR}\n{BODY}")
    plain = tokens_of(prepare(settings(), path))
    tokenizer = Tokenizer.from_file(settings().tokenizer.source)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    end = tokenizer.token_to_id(SEPARATOR)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A", special_tokens=[(SEPARATOR, end)]
    )
    odd = tmp_path / "odd tokenizer.json"
    tokenizer.save(str(odd))
    assert tokens_of(prepare(settings(odd), path)) == plain


def test_a_checkpoints_tokenizer_wins(tmp_path, settings, small_tokenizer):
    """prepare(given=...) uses that one, whatever tokenizer.source says."""
    path = write(tmp_path, BODY)
    text = small_tokenizer.read_text("utf-8")
    given = TokenizerFiles(text, {}, "the checkpoint's tokenizer.json")
    corpus = prepare(settings("/nowhere.json"), path, given=given)
    assert tokens_of(corpus) == tokens_of(prepare(settings(), path))


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (None, "No such file"),
        ("directory", "has no tokenizer.json"),
        (b"noise", "is not a tokenizer.json"),
        (b"{}", "is not a tokenizer.json"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"\x80\x04\x95", "is not UTF-8"),
    ],
)
def test_a_tokenizer_file_that_cannot_be_used_is_named(tmp_path, settings, content, hint):
    """tokenizer.source with a wrong path or file: one line with the path."""
    source = tmp_path / "tokenizer.json"
    if content == "directory":
        source.mkdir()
    elif content is not None:
        source.write_bytes(content)
    with pytest.raises(InputError, match=hint) as caught:
        prepare(settings(source), write(tmp_path, BODY))
    assert str(source) in str(caught.value)


def test_a_tokenizer_without_an_end_of_text_token_is_refused(tmp_path, settings):
    """Without an end-of-text token documents would run together: refused, and it is said."""
    content = Path(settings().tokenizer.source).read_text("utf-8")
    source = tmp_path / "tokenizer.json"
    source.write_text(content.replace(SEPARATOR, "<|something|>"), "utf-8")
    with pytest.raises(InputError, match=f"{re.escape(str(source))}: has no end-of-text token"):
        prepare(settings(source), write(tmp_path, BODY))


def test_separator_lines_become_the_tokenizers_own_end_of_text_token(tmp_path, settings):
    """A tokenizer that ends texts with </s>: each document ends with a </s>."""
    content = Path(settings().tokenizer.source).read_text("utf-8")
    source = tmp_path / "tokenizer.json"
    source.write_text(content.replace(SEPARATOR, "</s>"), "utf-8")
    text = f"{SEPARATOR}\n{BODY}{SEPARATOR}\nin {SEPARATOR} a line\n{BODY}{SEPARATOR}"
    corpus = prepare(settings(source, 513), write(tmp_path, text))
    assert tokens_of(corpus) == reference_tokens(text, corpus.tokenizer, "</s>")
    assert tokens_of(corpus).count(corpus.tokenizer.token_to_id("</s>")) == 2


def test_gpt2_without_network_names_both_ways_out(tmp_path):
    """No network and no cached gpt2: exit 3, and a line that names what can be done."""
    process = start_prepare(
        tmp_path,
        write(tmp_path, BODY),
        "tokenizer.source=gpt2",
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "empty"),
        HF_HUB_CACHE=str(tmp_path / "empty" / "hub"),
    )
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 3, output
    assert "Traceback" not in output
    message = output.strip().splitlines()[-1]
    for fragment in ("tokenizer.source gpt2", "network", "path of a tokenizer.json", "train"):
        assert fragment in message, output


@needs_shared
def test_gpt2_is_fetched_once_and_sealed(tmp_path, settings, monkeypatch):
    """With gpt2 in the cache no network is needed; it has 50,257 entries and `<|pad|>`. One in
    which two merges were swapped is not used."""
    directory = tmp_path / "cache/tokenizer-gpt2"
    directory.parent.mkdir()
    publish(GPT2.read_text("utf-8"), directory)
    corpus = prepare(settings("gpt2", 50258), write(tmp_path, BODY))
    assert corpus.tokenizer.get_vocab_size() == 50258
    assert corpus.tokenizer.token_to_id(PAD) == 50257
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read at its import
    content = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    merges = content["model"]["merges"]
    merges[300], merges[301] = merges[301], merges[300]
    for damaged in (json.dumps(content), "noise", ""):
        (directory / "tokenizer.json").write_text(damaged)
        with pytest.raises(InputError, match="cannot be fetched"):
            prepare(settings("gpt2", 50258), write(tmp_path, BODY))


def test_dropout_of_a_tokenizer_is_switched_off(tmp_path, settings):
    """BPE dropout would give other tokens at each tokenization: said, and the same each time."""
    content = json.loads(learn([BODY], 400).to_str())
    content["model"]["dropout"] = 0.5
    source = tmp_path / "tokenizer.json"
    source.write_text(json.dumps(content))
    path, found = write(tmp_path, BODY), []
    for cache in ("one", "other"):
        lines = []
        corpus = prepare(
            settings(source, 600, cache_dir=str(tmp_path / cache)), path, log=lines.append
        )
        found.append((tokens_of(corpus), corpus.fingerprint))
        assert any("dropout is switched off" in line for line in lines)
    assert found[0] == found[1] and "tokens" in found[0][1]
    content["model"]["dropout"] = None
    assert found[0][0] == reference_tokens(BODY, Tokenizer.from_str(json.dumps(content)))


def test_a_tokenizer_that_fails_at_a_text_is_named(tmp_path, settings):
    """WordLevel without an unknown token raises: exit 3 that names the tokenizer."""
    tokenizer = Tokenizer(models.WordLevel({"Line": 0, "</s>": 1}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    source = tmp_path / "tokenizer.json"
    tokenizer.save(str(source))
    with pytest.raises(InputError, match="the tokenizer: cannot tokenize"):
        prepare(settings(source, 600), write(tmp_path, BODY))


def test_a_panic_in_the_library_is_an_error() -> None:
    """Its Rust code panics with a BaseException; a signal is none."""
    panic = type("PanicException", (BaseException,), {})
    with (
        pytest.raises(InputError, match="here: cannot tokenize: PanicException: index out"),
        errors_named("here"),
    ):
        raise panic("index out of range")
    with (
        pytest.raises(ResourceError, match="no more threads; raise `ulimit -u`"),
        errors_named("x"),
    ):
        raise panic("ThreadPoolBuildError { kind: IOError(Os { code: 11 }) }")
    for passed in (KeyboardInterrupt, SystemExit):
        with pytest.raises(passed), errors_named("here"):
            raise passed


def metaspace(vocabulary: int = 400) -> Tokenizer:
    """A SentencePiece-like tokenizer: spaces are prefixes, and each text begins with one."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<unk>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([BODY], trainer)
    return tokenizer


def word_pieces() -> Tokenizer:
    """A BERT-like tokenizer."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([BODY], trainer)
    return tokenizer


def prefixed() -> Tokenizer:
    """A byte-level BPE that begins each text with a space, as RoBERTa's does."""
    tokenizer = learn([BODY], 400)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def digits() -> Tokenizer:
    """A byte-level BPE with a sequence of pre-tokenizers, as SmolLM2's."""
    tokenizer = learn([BODY], 400)
    steps = [pre_tokenizers.Digits(individual_digits=True)]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


def lower_case() -> Tokenizer:
    """A byte-level BPE behind a normalizer."""
    tokenizer = learn([BODY], 400)
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


SLOW = pytest.mark.slow
KINDS = [metaspace, word_pieces, prefixed, digits, lower_case]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trial", [0, *(pytest.param(n, marks=SLOW) for n in range(1, 21))])
def test_no_token_depends_on_where_a_text_is_cut(tmp_path, settings, kind, trial, monkeypatch):
    """Of tokenizers of other kinds: documents longer than a piece, token for token."""
    monkeypatch.setattr(documents, "PIECE", 1000)
    source = tmp_path / "tokenizer.json"
    kind().save(str(source))
    rng = random.Random(trial)
    text = f"\n{SEPARATOR}\n".join(BODY[: rng.randrange(500, len(BODY))] for _ in range(6))
    corpus = prepare(settings(source, 600, validation_fraction=0.2), write(tmp_path, text))
    end = "</s>" if corpus.tokenizer.token_to_id("</s>") is not None else SEPARATOR
    assert tokens_of(corpus) == reference_tokens(text, corpus.tokenizer, end)


def test_a_document_that_cannot_be_cut_and_is_too_long(tmp_path, settings, monkeypatch):
    """With such a tokenizer: exit 3, and what to do."""
    monkeypatch.setattr(tokenizer_module, "LONGEST_DOCUMENT", 100_000)
    source = tmp_path / "tokenizer.json"
    metaspace().save(str(source))
    with pytest.raises(InputError, match="more than 100,000 characters.*divide it by lines"):
        prepare(settings(source, 600), write(tmp_path, BODY * 400))


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_keeps_its_first_space(kind):
    """What decoders do at the start of a text does not happen at the start of a continuation."""
    tokenizer = parse(kind().to_str(), "here")
    text = "line 7 of a text, with words in it; 49 is a square."
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    for at in range(1, len(ids)):
        before = tokenizer.decode(ids[:at], skip_special_tokens=True)
        assert before + generation._continuation(tokenizer, ids[:at], ids[at:]) == whole


def test_an_end_that_is_no_special_token_ends_no_text(tmp_path, settings):
    """An eos_token that the tokenizer's author did not mark: a text that holds it is mere text."""
    tokenizer = Tokenizer.from_str(learn([BODY], 300).to_str())
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token.update(special=False)
    content = json.dumps(content).replace(SEPARATOR, "[END]")
    given = TokenizerFiles(content, {"eos_token": "[END]"}, "here")
    path = write(tmp_path, f"a[END]b\n{SEPARATOR}\n{BODY}")
    corpus = prepare(settings(vocab_size=300), path, given=given)
    end = Tokenizer.from_str(content).token_to_id("[END]")
    assert corpus.end == end and tokens_of(corpus).count(end) == 1


def test_ids_with_gaps_need_rows_up_to_the_highest(tmp_path, settings):
    """301 entries, highest id 511: 512 rows; and an id over 65,535 in a small vocabulary."""
    path = write(tmp_path, BODY)
    content = json.loads(learn([BODY], 300).to_str())
    for highest in (511, 70_000):
        content["added_tokens"] = [
            {**token, "id": {SEPARATOR: 0, PAD: highest}[token["content"]]}
            for token in content["added_tokens"]
        ]
        content["model"]["vocab"] = {
            word: highest if word == PAD else number
            for word, number in content["model"]["vocab"].items()
        }
        source = tmp_path / "gaps.json"
        source.write_text(json.dumps(content))
        with pytest.raises(
            InputError, match=f"highest id is {highest:,}.*vocab_size={highest + 1}"
        ):
            prepare(settings(source, highest), path)
        corpus = prepare(settings(source, highest + 1), path)
        assert tokens_of(corpus) == reference_tokens(BODY, corpus.tokenizer)
        assert corpus.train[:].dtype == (np.uint16 if highest < 65_536 else np.uint32)
