"""Tokenizers of every source, and those that cannot be used."""

from __future__ import annotations

import re
from pathlib import Path

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
from tokenizers import Tokenizer, processors

from smollm.data import token_cache
from smollm.data.documents import SEPARATOR
from smollm.data.tokenizer import PAD
from smollm.errors import InputError


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path, settings):
    """More entries than model.vocab_size: refused, with the number to set; fewer: a line."""
    path = write(tmp_path, BODY)
    with pytest.raises(InputError, match=r"512 entries.*model\.vocab_size 511.*vocab_size=512"):
        prepare(settings(vocab_size=511), path)
    lines = []
    prepare(settings(vocab_size=600), path, lines.append)
    assert lines == ["the tokenizer has 512 entries; 88 embedding rows stay unused"]
    lines.clear()
    prepare(settings(vocab_size=512), path, lines.append)
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
    """prepare(tokenizer_json=...) uses that one, whatever tokenizer.source says."""
    path = write(tmp_path, BODY)
    text = small_tokenizer.read_text("utf-8")
    corpus = token_cache.prepare(settings("/nowhere.json"), path, text, lambda line: None)
    assert tokens_of(corpus) == tokens_of(prepare(settings(), path))


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (None, "No such file"),
        ("directory", "Is a directory"),
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
    """A tokenizer that ends texts with </s>: each separator line, also the last, is a </s>."""
    content = Path(settings().tokenizer.source).read_text("utf-8")
    source = tmp_path / "tokenizer.json"
    source.write_text(content.replace(SEPARATOR, "</s>"), "utf-8")
    text = f"{SEPARATOR}\n{BODY}{SEPARATOR}\nin {SEPARATOR} a line\n{BODY}{SEPARATOR}"
    corpus = prepare(settings(source, 513), write(tmp_path, text))
    assert tokens_of(corpus) == reference_tokens(text, corpus.tokenizer, "</s>")
    assert tokens_of(corpus).count(corpus.tokenizer.token_to_id("</s>")) == 3


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
def test_gpt2_is_fetched_once(tmp_path, settings):
    """With gpt2 in the cache no network is needed; it has 50,257 entries and `<|pad|>`."""
    (tmp_path / "cache").mkdir()
    cached = tmp_path / "cache" / "tokenizer-gpt2.json"
    cached.write_bytes(GPT2.read_bytes())
    corpus = prepare(settings("gpt2", 50258), write(tmp_path, BODY))
    assert corpus.tokenizer.get_vocab_size() == 50258
    assert corpus.tokenizer.token_to_id(PAD) == 50257


@pytest.mark.parametrize("content", [b"noise", b"\xff\xff"])
def test_a_damaged_gpt2_cache_is_named_or_fetched_again(tmp_path, settings, monkeypatch, content):
    """A cached gpt2 that cannot be read is an InputError with its path, or with the ways out."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "cache").mkdir()
    cached = tmp_path / "cache" / "tokenizer-gpt2.json"
    cached.write_bytes(content)
    with pytest.raises(InputError) as caught:
        prepare(settings("gpt2", 50258), write(tmp_path, BODY))
    assert str(cached) in str(caught.value) or "network" in str(caught.value)
