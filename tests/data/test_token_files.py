"""Token files of other tools, used in place: llm.c's with a header, nanoGPT's without one (I6)."""

from __future__ import annotations

import gzip
import os
import random
from pathlib import Path

import numpy as np
import pytest
from data_helpers import held_out, prepare, tokens_of
from tokenizers import Tokenizer, models

from smollm.data import shards, token_files, tokens
from smollm.data.documents import SEPARATOR
from smollm.data.tokens import OPEN, Tokens
from smollm.errors import ConfigError, InputError


def write_llm_c(path: Path, ids: list[int], count: int | None = None, **header: int) -> Path:
    """A shard as llm.c's data_common.py writes it."""
    numbers = np.zeros(256, "<i4")
    numbers[0], numbers[1] = header.get("magic", 20240520), header.get("version", 1)
    numbers[2] = len(ids) if count is None else count
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(numbers.tobytes() + np.array(ids, "<u2").tobytes())
    return path


def write_nano(path: Path, ids: list[int]) -> Path:
    """A file as nanoGPT's prepare.py writes it."""
    np.array(ids, "<u2").tofile(path)
    return path


def encoded(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of each document."""
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.fixture(scope="module")
def documents(prose: str) -> list[str]:
    """The first 60 of the default text."""
    return prose.split(f"{SEPARATOR}\n")[:60]


def test_the_same_tokens_from_a_text_and_from_shards(
    tmp_path, settings, small_tokenizer, documents
):
    """As a text, as llm.c's shards that divide a document, and as nanoGPT's file: token for token
    the same, with the same held-out part, and with one line at the start."""
    tokenizer = Tokenizer.from_file(str(small_tokenizer))
    end = tokenizer.token_to_id(SEPARATOR)
    each = encoded(documents, tokenizer)
    before = [token for ids in each for token in (end, *ids)]
    after = [token for ids in each for token in (*ids, end)]
    (tmp_path / "text.txt").write_text("".join(f"{text}{SEPARATOR}\n" for text in documents))
    cut = len(before) // 3
    write_llm_c(tmp_path / "shards/train_000.bin", before[:cut])
    write_llm_c(tmp_path / "shards/train_001.bin", before[cut:])
    (tmp_path / "shards/README.md").touch()  # empty: left out
    inputs = (
        tmp_path / "text.txt", tmp_path / "shards", write_nano(tmp_path / "train.bin", after)
    )  # fmt: skip
    made = [prepare(settings(validation_fraction=0.1), path) for path in inputs]
    for corpus in made[1:]:
        assert corpus.documents == made[0].documents == 60
        assert tokens_of(corpus) == tokens_of(made[0]) == after
        assert len(corpus.train) == len(made[0].train)
        assert corpus.conservation().partition(", ")[2] == made[0].conservation().partition(", ")[2]
    cache = tmp_path / "cache"
    assert len(list(cache.glob("tokens-*"))) == 1 and len(list(cache.glob("counts-*"))) == 3
    assert all(path.name == "train.bin" for path, *_ in made[2].train.parts)  # not copied


def test_bytes_of_what_is_only_tokens(tmp_path, settings, small_tokenizer, documents):
    """Bits per byte are those of the text."""
    tokenizer = Tokenizer.from_file(str(small_tokenizer))
    end = tokenizer.token_to_id(SEPARATOR)
    ids = [token for each in encoded(documents, tokenizer) for token in (end, *each)]
    corpus = prepare(settings(), write_llm_c(tmp_path / "a.bin", ids))
    size = sum(
        shards.text_bytes(part, corpus.tokenizer)
        for part in (corpus.train, corpus.parts[0].validation)
    )
    assert size == sum(len(text.encode()) for text in documents)
    assert corpus.text_bytes is None


def test_the_held_out_part_of_tokens() -> None:
    """At the boundary nearest to the fraction, else at the fraction: against a plain search."""
    seed = 4
    rng = random.Random(seed)
    for _ in range(300):
        ids = np.array([rng.choice([0] + [7] * 40) for _ in range(rng.randint(20, 600))], np.uint16)
        fraction = rng.choice([0.05, 0.1, 0.3])
        found = token_files.held_out_offset(ids, fraction, end=0)
        wanted = len(ids) * (1 - fraction)
        boundaries = [
            at for at in (np.flatnonzero(ids == 0) + 1).tolist()
            if len(ids) * fraction / 2 <= len(ids) - at <= 2 * len(ids) * fraction
        ]  # fmt: skip
        if boundaries:
            assert abs(found - wanted) == min(abs(at - wanted) for at in boundaries)
            assert found in boundaries
        else:
            assert found == int(wanted)
    assert token_files.held_out_offset(ids, 0.0, 0) == len(ids)
    assert token_files.held_out_offset(ids, 1.0, 0) == 0


def test_a_validation_file_of_tokens(tmp_path, settings, small_tokenizer):
    """llm.c's layout: shards to train on, and one to evaluate on."""
    end = Tokenizer.from_file(str(small_tokenizer)).token_to_id(SEPARATOR)
    write_llm_c(tmp_path / "train_0.bin", [end, 5, 6, 7] * 20)
    write_llm_c(tmp_path / "val_0.bin", [end, 8, 9] * 4)
    config = settings(validation_file=str(tmp_path / "val_0.bin"))
    corpus = prepare(config, tmp_path / "train_*.bin")
    assert corpus.train[:].tolist() == [5, 6, 7, end] * 20
    assert held_out(corpus).tolist() == [8, 9, end] * 4


def _refused(tmp_path, settings, path: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        prepare(settings(), path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


GOOD = [5, 6, 7] * 20


@pytest.mark.parametrize(
    ("header", "content", "said"),
    [
        ({"count": 61}, GOOD, "a.bin: its header says 61 tokens, and it holds 60 of 16 bits"),
        ({"count": 0}, [], "a.bin: holds no tokens"),
        ({"version": 2}, GOOD, "a.bin: is a shard of version 2; only 1 is read"),
        ({"magic": 20240801}, GOOD, "a.bin: is a shard of 32-bit tokens (of Llama 3's"),
        ({"magic": 20240522}, GOOD, "a.bin: is an evaluation set of llm.c"),
        ({}, [*GOOD, 600, 700], "a.bin: token 60 (from 0) is 600, and the tokenizer's highest"),
    ],
)  # fmt: skip
def test_shards_that_cannot_be_used(tmp_path, settings, header, content, said):
    """Exit 3: what, and where in the file."""
    path = write_llm_c(tmp_path / "a.bin", content, **header)
    assert said in _refused(tmp_path, settings, path)


def test_files_without_a_header_that_cannot_be_used(tmp_path, settings):
    """An odd size, a vocabulary of its own (never opened), one that is compressed."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"\5\0\6")
    assert "has 3 bytes, an odd number" in _refused(tmp_path, settings, path)
    write_nano(path, GOOD)
    (tmp_path / "meta.pkl").mkdir()  # opening it would fail
    assert "a vocabulary of its own, in the meta.pkl" in _refused(tmp_path, settings, path)
    (tmp_path / "b").mkdir()
    packed = tmp_path / "b/a.bin.gz"
    packed.write_bytes(gzip.compress(b"\5\0" * 100))
    assert "is compressed; tokens are used in place" in _refused(tmp_path, settings, packed)


def test_a_file_that_is_cut_while_a_run_uses_it(tmp_path, settings):
    """An error that names it, where a memory map would end the process."""
    path = write_llm_c(tmp_path / "a.bin", GOOD)
    corpus = prepare(settings(), path)
    assert corpus.train[:3].tolist() == GOOD[:3]
    path.write_bytes(path.read_bytes()[:-80])
    assert corpus.train[:3].tolist() == GOOD[:3]
    with pytest.raises(InputError, match=r"a\.bin: was cut short while it was in use"):
        corpus.train[:]


def test_a_file_that_is_replaced_while_a_run_uses_it(tmp_path):
    """The open one is read on; where it is opened again, that is an error, and not other ids."""
    path = write_nano(tmp_path / "a.bin", GOOD)
    used = token_files.stored(path)
    assert used[:3].tolist() == [5, 6, 7]
    path.unlink()
    write_nano(path, [900] * 60)
    assert used[:3].tolist() == [5, 6, 7]
    tokens._opened.cache_clear()  # as when many other files were read meanwhile
    with pytest.raises(InputError, match=r"a\.bin: was replaced while it was in use"):
        used[:3]
    assert token_files.stored(path)[:3].tolist() == [900, 900, 900]


def test_kinds_of_files_in_a_folder(tmp_path, settings):
    """A .bin without a header may be anything: it is left out of a folder, and that is said; texts
    and tokens are not one source."""
    said = []
    (tmp_path / "folder").mkdir()
    write_nano(tmp_path / "folder/a.bin", GOOD)
    (tmp_path / "folder/b.txt").write_text("Some text, long enough for a window. " * 20)
    corpus = prepare(settings(), tmp_path / "folder", log=said.append)
    assert any(
        "left out: 1 .bin without a header, to be named by themselves (a.bin)" in s for s in said
    )
    assert corpus.documents == 1
    write_llm_c(tmp_path / "folder/c.bin", GOOD)
    assert "holds tokens (c.bin) and texts (b.txt)" in _refused(
        tmp_path, settings, tmp_path / "folder"
    )


def test_what_is_hardly_tokens_of_16_bits(tmp_path, settings):
    """Tokens of 32 bits, a text under the wrong name, a tokenizer with more entries."""
    path = tmp_path / "a.bin"
    path.write_bytes(np.array([5, 6, 7, 500] * 20, "<u4").tobytes())
    assert "a.bin: looks like tokens of 32 bits; convert" in _refused(tmp_path, settings, path)
    path.write_text("It is a text, after all.\n" * 20)
    assert "a.bin: looks like a text; give it a name" in _refused(tmp_path, settings, path)
    large = Tokenizer(models.WordLevel({str(number): number for number in range(70_000)}, "0"))
    with pytest.raises(InputError, match="holds tokens of 16 bits, and this tokenizer has 70,000"):
        token_files.count({write_nano(path, GOOD): "a"}, 0, large, tmp_path, print)


def test_tokens_without_one_end_of_text(tmp_path, settings):
    """They may be of another tokenizer: a warning; what is remembered of them is checked."""
    for content in (None, "{}", '{"tokens": 60, "ends": null, "highest": "x"}'):
        for memory in (tmp_path / "cache").glob("counts-*.json"):
            memory.write_text(content)
        said = []
        prepare(settings(), write_nano(tmp_path / "a.bin", GOOD), log=said.append)
        assert any("has no end-of-text token (id 0)" in line for line in said)


def test_files_of_all_sources_that_are_open(tmp_path):
    """No more than a user may have open: 600 files in three sources, of which 256 are kept."""
    paths = [write_nano(tmp_path / f"{number}.bin", [number, 1]) for number in range(600)]
    before = len(os.listdir("/proc/self/fd"))
    sources = [Tokens([(path, 0, 2) for path in paths[first::3]]) for first in range(3)]
    for first, source in enumerate(sources):
        assert source[:][::2].tolist() == list(range(first, 600, 3))
    assert len(os.listdir("/proc/self/fd")) - before <= OPEN


def test_a_learned_tokenizer_has_no_text_to_learn_from(tmp_path: Path, settings) -> None:
    """Exit 2."""
    path = write_llm_c(tmp_path / "a.bin", GOOD)
    with pytest.raises(ConfigError, match="holds tokens, not a text"):
        prepare(settings("train"), path)
