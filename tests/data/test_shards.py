"""Tokenized once: shards that a kill, a new file or another split leave alone."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import forked
import numpy as np
import pytest
from data_helpers import BODY, held_out, prepare, start_prepare, tokens_of, write
from helpers import ROOT, call, command, environment, train, write_tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from smollm import atomic
from smollm.data import documents, learning, shards, token_cache
from smollm.data.corpus import Corpus
from smollm.data.documents import SEPARATOR
from smollm.data.tokenizer import TokenizerFiles
from smollm.data.tokens import Tokens
from smollm.errors import InputError, ResourceError

SHARD = 30_000  # characters, for texts of a few hundred thousand


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of SHARD characters, encoded a third at a time."""
    monkeypatch.setattr(shards, "SHARD", SHARD)
    monkeypatch.setattr(shards, "BATCH", SHARD // 3)


def corpus_of(folder: Path, prose: str, count: int = 3) -> Path:
    """A folder of JSON lines: `count` files of some 100,000 characters each."""
    folder.mkdir()
    documents = prose[: count * 100_000].split(SEPARATOR)
    for number in range(count):
        rows = documents[number::count]
        lines = [json.dumps({"text": f"{number} {row}"}) + "\n" for row in rows]
        (folder / f"part-{number}.jsonl").write_text("".join(lines))
    return folder


def made(cache: Path) -> dict[str, tuple[int, int]]:
    """Every token file of a cache, with what tells whether it was made anew."""
    files = [path for path in cache.glob("tokens-*/shard_*/tokens.npy")]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def kept(before: Iterable, cache: Path) -> set[str]:
    """The token files that are still what they were."""
    now = made(cache)
    return {path for path, identity in before.items() if now.get(path) == identity}


def test_shards_hold_what_one_shard_would(tmp_path, settings, prose, monkeypatch):
    """However small the shards: the same tokens, held out at the same place."""
    folder = corpus_of(tmp_path / "in", prose)
    one = prepare(settings(), folder)
    for size in (200, 7_000, SHARD):
        monkeypatch.setattr(shards, "SHARD", size)
        for fraction in (0.05, 0.31):
            cache = str(tmp_path / f"cache-{size}")
            single = prepare(settings(validation_fraction=fraction), folder)
            many = prepare(settings(validation_fraction=fraction, cache_dir=cache), folder)
            assert len(made(Path(cache))) > 3
            assert tokens_of(many) == tokens_of(one)
            assert len(many.train) == len(single.train)
            assert (many.documents, many.text_bytes) == (one.documents, one.text_bytes)


def test_the_index_has_the_bytes_of_each_document(tmp_path, settings, prose, small_shards):
    """A row for each piece: tokens, bytes and characters, which add up to those of documents."""
    documents = ["caf\u00e9 \U0001f600\n", "word " * 30_000, "end"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    corpus = prepare(settings(), path)
    paths = sorted((tmp_path / "cache").glob("tokens-*/shard_*/pieces.npy"))
    rows = np.concatenate([np.load(path) for path in paths])
    last = np.flatnonzero(rows["ends"])
    names = ("tokens", "bytes", "characters")
    columns = np.stack([rows[name].astype(np.int64) for name in names], axis=1)
    sums = np.add.reduceat(columns, [0, *(last[:-1] + 1)])
    assert len(paths) == 3 and len(last) == 3
    assert sums[:, 1].tolist() == [len(text.encode()) for text in documents]
    assert sums[:, 2].tolist() == [len(text) + len(SEPARATOR) + 1 for text in documents]
    encoded = [corpus.tokenizer.encode(text, add_special_tokens=False).ids for text in documents]
    assert sums[:, 0].tolist() == [len(ids) + 1 for ids in encoded]


@pytest.mark.parametrize("fault", ["batch:full:8", "hashed:error:3", "renamed:error:5"])
def test_finished_shards_survive_a_failure(
    tmp_path, settings, prose, small_shards, monkeypatch, fault
):
    """A disk that fills, an I/O error: the cache is named; what is finished is not made again."""
    folder, cache = corpus_of(tmp_path / "in", prose), tmp_path / "cache"
    reference = prepare(settings(cache_dir=str(tmp_path / "other")), folder)
    monkeypatch.setenv("FAULT", f"cache.{fault}")
    with pytest.raises(InputError, match=r"data.cache_dir .*what is tokenized stays") as caught:
        prepare(settings(), folder)
    assert os.strerror(errno.ENOSPC if "full" in fault else errno.EIO) in str(caught.value)
    monkeypatch.delenv("FAULT")
    before = made(cache)
    assert before
    assert tokens_of(prepare(settings(), folder)) == tokens_of(reference)
    assert kept(before, cache) == set(before) and len(made(cache)) > len(before)
    assert not list(cache.rglob(".tmp-*"))


def test_a_kill_repeats_at_most_one_shard(tmp_path, settings, prose, small_tokenizer, small_shards):
    """kill -9 over and over, each time a shard further: none that was there is made again."""
    folder, cache = corpus_of(tmp_path / "in", prose), tmp_path / "cache"
    source, code = f"tokenizer.source={small_tokenizer}", -signal.SIGKILL
    kills, before = 0, {}
    while code == -signal.SIGKILL:
        kills += 1
        assert kills < 20
        point = ("batch:kill:4", "manifest:kill:1", "renamed:kill:2")[kills % 3]
        started = start_prepare(tmp_path, folder, source, FAULT=f"cache.{point}", SHARD=str(SHARD))
        started.communicate(timeout=60)
        code = started.returncode
        assert kept(before, cache) == set(before)
        before = made(cache)
    assert code == 0 and kills > 5
    corpus = prepare(settings(), folder)
    assert kept(before, cache) == set(before) and not list(cache.rglob(".tmp-*"))
    other = prepare(settings(cache_dir=str(tmp_path / "other")), folder)
    assert tokens_of(corpus) == tokens_of(other)


def test_only_a_new_or_changed_file_is_tokenized(tmp_path, settings, prose, small_shards):
    """A file is added, one is changed, one is renamed, one is removed; another split."""
    folder, cache = corpus_of(tmp_path / "in", prose), tmp_path / "cache"
    prepare(settings(), folder)
    before = made(cache)
    (folder / "part-0b.txt").write_text(BODY * 9)
    corpus = prepare(settings(), folder)
    assert kept(before, cache) == set(before)
    assert len(made(cache)) == len(before) + 2 and corpus.documents == prepare_count(folder)
    before = made(cache)
    with open(folder / "part-1.jsonl", "a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    (folder / "part-2.jsonl").rename(folder / "part-9.jsonl")
    (folder / "part-0.jsonl").unlink()
    corpus = prepare(settings(validation_fraction=0.1), folder)
    new = [path for path in made(cache) if path not in before]
    assert kept(before, cache) == set(before) and len({Path(p).parents[1] for p in new}) == 1
    assert corpus.documents == prepare_count(folder)
    text = corpus.tokenizer.decode(tokens_of(corpus))
    first, _, last = text.partition("one more")
    assert first.startswith("Line 0 of a text") and last.startswith("2 ")


def prepare_count(folder: Path) -> int:
    """The documents of a folder of JSON lines and texts of one document."""
    files = sorted(folder.iterdir())
    return sum(p.read_text().count("\n") if p.suffix == ".jsonl" else 1 for p in files)


def test_a_learned_tokenizer_is_learned_anew_and_said(tmp_path, settings, prose):
    """tokenizer.source train: a file more is another text, and all of it is tokenized again."""
    folder, lines = corpus_of(tmp_path / "in", prose), []
    prepare(settings("train"), folder, log=lines.append)
    assert not [line for line in lines if "learned" in line]
    before = made(tmp_path / "cache")
    (folder / "more.txt").write_text("zumpelfratz quibblewick " * 200)
    corpus = prepare(settings("train"), folder, log=lines.append)
    assert [line for line in lines if "is learned from it, and all of it is tokenized" in line]
    assert len(made(tmp_path / "cache")) == 2 * len(before) + 1
    assert any("zumpelfratz" in entry for entry in corpus.tokenizer.get_vocab())


def test_a_tokenizer_learns_from_a_sample_spread_over_a_long_text(
    tmp_path, settings, prose, monkeypatch
):
    """At most so many bytes, from the beginning to the end of the training part, none after it."""
    monkeypatch.setattr(learning, "LEARN_BYTES", 300_000)
    folder = tmp_path / "in"
    folder.mkdir()
    rng = random.Random(2)
    words = ["".join(rng.choices("abcdefghijklmnop", k=9)) for _ in range(50)]
    for number in range(5):
        rows = [
            f"{words[10 * number + row // 10]} {row} of the text.\n" * 100 for row in range(100)
        ]
        lines = [json.dumps({"text": row}) + "\n" for row in rows]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    corpus = prepare(settings("train", 2000, validation_fraction=0.1), folder)
    entries = {entry.lstrip("\u0120") for entry in corpus.tokenizer.get_vocab()}
    known = [word in entries for word in words]
    assert sum(known[:45]) >= 40 and all(any(known[i : i + 5]) for i in range(0, 45, 5))
    assert not any(known[45:])
    corpus = prepare(settings("train", 2000, validation_fraction=0.5), folder)
    entries = {entry.lstrip("\u0120") for entry in corpus.tokenizer.get_vocab()}
    known = [word in entries for word in words]
    assert sum(known[:25]) >= 22 and not any(known[25:])
    monkeypatch.setattr(learning, "WORD_BYTES", 200)  # of 50 words of 9 letters
    corpus = prepare(settings("train", 1999, validation_fraction=0.1), folder)
    entries = {entry.lstrip("\u0120") for entry in corpus.tokenizer.get_vocab()}
    known = [word in entries for word in words]
    assert 5 <= sum(known) < 25 and any(known[:15]) and any(known[30:])


def test_an_open_run_reads_no_text(tmp_path, settings):
    """A hash is remembered with size, time and inode, once the file has not just been changed."""
    path = tmp_path / "a.txt"
    path.write_text(BODY)
    settled = time.time_ns() - 10**10
    os.utime(path, ns=(settled, settled))
    first = prepare(settings(), path)
    with open(path, "r+") as file:
        file.write("Lime")
    os.utime(path, ns=(settled, settled))
    assert prepare(settings(), path).fingerprint == first.fingerprint  # it was not read
    os.utime(path, ns=(settled + 1, settled + 1))
    assert prepare(settings(), path).fingerprint != first.fingerprint
    with open(path, "r+") as file:  # it was changed just now: another change could look the same
        file.write("Line")
    now = path.stat().st_mtime_ns
    assert prepare(settings(), path).fingerprint == first.fingerprint
    with open(path, "r+") as file:
        file.write("Lime")
    os.utime(path, ns=(now, now))
    assert prepare(settings(), path).fingerprint != first.fingerprint


def test_damaged_remembered_hashes_are_forgotten(tmp_path, settings):
    """Whatever hashes.json holds, nothing breaks and nothing wrong is believed."""
    path = tmp_path / "a.txt"
    path.write_text(BODY)
    good = prepare(settings(), path).fingerprint
    for content in ("", "[]", "{", '{"a": 1}', json.dumps({str(path): [1, 2]}), "[" * 99_999):
        (tmp_path / "cache/hashes.json").write_text(content)
        assert prepare(settings(), path).fingerprint == good
    (tmp_path / "cache/hashes.json").unlink()
    (tmp_path / "cache/hashes.json").mkdir()
    os.utime(path, ns=(1, 1))
    lines = []
    assert prepare(settings(), path, log=lines.append).fingerprint == good
    assert any("the next start hashes the text again" in line for line in lines)


@pytest.mark.parametrize("seed", range(3))
def test_tokens_of_several_files_are_one_array(tmp_path, seed):
    """Any slice, and any part, is that of the concatenated arrays."""
    rng = np.random.default_rng(seed)
    parts, arrays = [], []
    for number in range(12):
        array = rng.integers(0, 60_000, rng.integers(1, 40)).astype(np.uint16)
        np.save(path := tmp_path / f"{number}.npy", array)
        start, stop = sorted(rng.integers(0, len(array) + 1, 2).tolist())
        parts.append((path, start, stop))
        arrays.append(array[start:stop])
    whole, tokens = np.concatenate(arrays), Tokens(parts)
    assert len(tokens) == len(whole) and np.array_equal(tokens[:], whole)
    for _ in range(300):
        a, b = rng.integers(-3, len(whole) + 5, 2).tolist()
        assert np.array_equal(tokens[a:b], whole[a:b])
        a, b = sorted((max(a, 0), max(b, 0)))
        assert np.array_equal(tokens.part(a, b)[:], whole[a:b])
    assert tokens[:1].dtype == np.uint16


def test_another_ending_is_another_text(tmp_path, settings):
    """JSON lines that were first read as a mere text: the tokenizer is learned anew."""
    path = tmp_path / "a.txt"
    path.write_text("".join(json.dumps({"zumpel": i, "text": BODY}) + "\n" for i in range(40)))
    first = prepare(settings("train", 2000), path)
    second = prepare(settings("train", 2000), path.rename(tmp_path / "a.jsonl"))
    assert any("zumpel" in entry for entry in first.tokenizer.get_vocab())
    assert not any("zumpel" in entry for entry in second.tokenizer.get_vocab())


def test_room_is_asked_for_what_is_missing(tmp_path, settings, prose, small_shards, monkeypatch):
    """Before anything is tokenized; the shards that are there need none."""
    folder = corpus_of(tmp_path / "in", prose)
    monkeypatch.setattr(atomic, "free_bytes", lambda directory: 150_000)
    with pytest.raises(ResourceError, match=r"\d\d\d,\d\d\d bytes are needed and 150,000 are free"):
        prepare(settings(), folder)
    assert not made(tmp_path / "cache")
    monkeypatch.undo()
    monkeypatch.setattr(shards, "SHARD", SHARD)
    monkeypatch.setenv("FAULT", "cache.renamed:error:9")
    with pytest.raises(InputError, match="what is tokenized stays"):
        prepare(settings(), folder)
    monkeypatch.delenv("FAULT")
    monkeypatch.setattr(atomic, "free_bytes", lambda directory: 150_000)
    assert prepare(settings(), folder).documents > 100


def test_a_copied_cache_is_verified_once(tmp_path, settings, monkeypatch):
    """Other inodes: the hashes are made again and agree; what was damaged on the way is named."""
    monkeypatch.setattr(token_cache, "VERIFIED", 0)
    path = tmp_path / "a.txt"
    path.write_text(BODY)
    good = prepare(settings(), path)
    shutil.copytree(tmp_path / "cache", tmp_path / "copy")
    settings_of_copy = settings(cache_dir=str(tmp_path / "copy"))
    (file,) = (tmp_path / "copy").glob("tokens-*/file.json")
    before = file.read_text()
    assert prepare(settings_of_copy, path).fingerprint == good.fingerprint
    assert (after := file.read_text()) != before
    assert prepare(settings_of_copy, path).fingerprint == good.fingerprint
    assert file.read_text() == after
    shutil.rmtree(tmp_path / "copy")
    shutil.copytree(tmp_path / "cache", tmp_path / "copy")
    (tokens,) = (tmp_path / "copy").glob("tokens-*/shard_*/tokens.npy")
    tokens.write_bytes(tokens.read_bytes()[:-1] + b"\7")
    lines = []
    again = prepare(settings_of_copy, path, log=lines.append)
    assert tokens_of(again) == tokens_of(good)
    assert any("tokens.npy does not have the sha256" in line for line in lines)


# --- on all cores --------------------------------------------------------------------------------


def prepare_py(directory: Path, *words: str) -> list[str]:
    """The command line of prepare.py for the folder `in`."""
    if not (directory / "tiny.yaml").exists():
        write_tiny(directory)
    script = str(ROOT / "prepare.py")
    return [sys.executable, script, "--config", "tiny.yaml", "--input_file", "in", *words]


def test_several_processes_make_the_same_tokens(tmp_path, prose):
    """--workers 3 and one alone; what a worker finds wrong is named as one alone would."""
    corpus_of(tmp_path / "in", prose, 4)
    (tmp_path / "queue.py").write_text("raise SystemExit('code of the folder with the data')")
    (tmp_path / "in/copy.jsonl").write_bytes((tmp_path / "in/part-1.jsonl").read_bytes())
    three = call(tmp_path, prepare_py(tmp_path, "--workers", "3", "data.cache_dir=three"))
    assert three.returncode == 0, three.stdout
    one = call(tmp_path, prepare_py(tmp_path, "--workers", "1"))
    assert one.stdout == three.stdout.replace("three", "cache")
    digests = [
        sorted(path.read_bytes() for path in (tmp_path / cache).glob("tokens-*/*/tokens.npy"))
        for cache in ("three", "cache")
    ]
    assert digests[0] == digests[1] and len(digests[0]) == 4
    with open(tmp_path / "in/part-2.jsonl", "a") as file:
        file.write("{")
    bad = call(tmp_path, prepare_py(tmp_path, "--workers", "3", "data.cache_dir=bad"))
    assert bad.returncode == 3, bad.stdout
    assert re.fullmatch(
        r"error: in/part-2.jsonl: line \d+ is not JSON .*max_bad_rows\n", bad.stdout
    )


@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_a_killed_process_takes_the_others_along(tmp_path, prose, small_tokenizer, victim):
    """kill -9 of a worker is one line with the way out; of the parent: no worker lives on."""
    corpus_of(tmp_path / "in", prose)
    source = f"tokenizer.source={small_tokenizer}"
    process = subprocess.Popen(
        prepare_py(tmp_path, "--workers", "2", source), cwd=tmp_path,
        env=environment(FAULT="cache.batch:sleep:1+"), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("cache/tokens-*/.tmp-shard_*"))) < 2:
        time.sleep(0.05)
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
    workers = [int(word) for word in children.read_text().split()]
    assert len(workers) == 2
    os.kill(workers[0] if victim == "worker" else process.pid, signal.SIGKILL)
    output = process.communicate(timeout=30)[0]
    if victim == "worker":
        assert process.returncode == 3
        assert output.startswith("error: a process that tokenizes has ended, perhaps"), output
    while any(alive(worker) for worker in workers):
        time.sleep(0.05)
        assert time.monotonic() < deadline
    done = call(tmp_path, prepare_py(tmp_path, source))
    assert done.returncode == 0, done.stdout


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("how", ["removed", "replaced", "edited"])
def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path, small_tokenizer, how):
    """Exit 3, and its half-made tokens are never taken for those of the text as it was."""
    write_tiny(tmp_path)
    path, source = tmp_path / "text.txt", f"tokenizer.source={small_tokenizer}"
    text = path.read_bytes()
    process = forked.Started(
        command("train.py", "--dry_run", source)[1:], tmp_path,
        environment(FAULT="cache.batch:sleep:1"),
    )  # fmt: skip
    while not list(tmp_path.glob("cache/tokens-*/.tmp-shard_*")):
        time.sleep(0.02)
        assert process.poll() is None
    if how == "edited":
        path.write_bytes(text.replace(b"e", b"a"))
    else:
        path.rename(tmp_path / "kept.txt")
        if how == "replaced":
            shutil.copy(tmp_path / "kept.txt", path)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 3 and "error: text.txt: " in output, output
    assert ("removed meanwhile" if how == "removed" else "was changed while") in output
    assert not list(tmp_path.glob("cache/tokens-*/shard_*"))
    path.write_bytes(text)
    again = train(tmp_path, "--dry_run", source)
    fresh = train(tmp_path, "--dry_run", source, "data.cache_dir=fresh")
    rows = [[x for x in done.stdout.splitlines() if x[:5] == "data "] for done in (again, fresh)]
    assert rows[0] == rows[1] != []


def test_a_resume_with_a_grown_folder(tmp_path, prose):
    """Refused as another input; with data.allow_changed_input the checkpoint's tokenizer serves,
    and only the new file is tokenized."""
    write_tiny(tmp_path)
    corpus_of(tmp_path / "in", prose)
    words = ("--input_file", "in", "--resume", "auto", "--train_steps")
    assert train(tmp_path, *words, "2").returncode == 0
    before = made(tmp_path / "cache")
    (tmp_path / "in/more.txt").write_text(BODY)
    refused = train(tmp_path, *words, "4")
    assert refused.returncode == 3 and "was trained on another input" in refused.stdout
    done = train(tmp_path, *words, "4", "data.allow_changed_input=true")
    assert done.returncode == 0, done.stdout
    assert kept(before, tmp_path / "cache") == set(before)
    assert len(made(tmp_path / "cache")) == len(before) + 1


def test_held_out_tokens_are_not_trained_on(tmp_path, settings, prose, small_shards):
    """The training part and the held-out part are disjoint runs of one stream."""
    corpus = prepare(settings(validation_fraction=0.2), corpus_of(tmp_path / "in", prose))
    whole = np.concatenate([np.load(p) for p in sorted_shards(corpus)])
    assert np.array_equal(whole, np.concatenate([corpus.train[:], held_out(corpus)]))


def sorted_shards(corpus) -> list[Path]:
    """The token files of a corpus of one source, each once, in order."""
    paths = [part[0] for part in (*corpus.train.parts, *corpus.parts[0].validation.parts)]
    return list(dict.fromkeys(paths))


def all_tokens(corpus: Corpus) -> Tokens:
    """Every token of a corpus, the training parts first."""
    parts = [each for part in corpus.parts for each in (part.train, part.validation)]
    return Tokens(part for each in parts for part in each.parts)


def test_the_bytes_of_any_stretch_of_tokens(tmp_path, settings, monkeypatch):
    """By the index, and by decoding where a stretch begins or ends within a piece: as many bytes as
    the tokens stand for, separators left out, over shards and documents of every size."""
    monkeypatch.setattr(shards, "SHARD", 400)
    monkeypatch.setattr(documents, "PIECE", 150)
    drawn = random.Random(5)
    words = ["caf\u00e9", "line", "\U0001f600", "of", "a", "text,", "with", "words\n"]
    texts = [" ".join(drawn.choices(words, k=drawn.randrange(1, 90))) for _ in range(12)]
    path = write(tmp_path, f"\n{SEPARATOR}\n".join(texts))
    corpus = prepare(settings(), path)
    made = all_tokens(corpus)
    ids, end = made[:].tolist(), corpus.end
    assert shards.text_bytes(made, corpus.tokenizer) == corpus.text_bytes

    def plain(first: int, last: int) -> int:
        """Bytes of whole characters: a byte-level token has a character for each of its bytes."""
        kept = [corpus.tokenizer.id_to_token(number) for number in ids[first:last] if number != end]
        return sum(len(token) for token in kept)

    for _ in range(200):
        first, last = sorted(drawn.sample(range(len(ids) + 1), 2))
        found = shards.text_bytes(made.part(first, last), corpus.tokenizer)
        # A character that is cut counts where it ends: up to 3 bytes on either side.
        assert abs(found - plain(first, last)) <= 3, (first, last)
    assert len(made.parts) > 3
    cuts = [n for n in range(1, len(ids)) if "\u0120" in corpus.tokenizer.id_to_token(ids[n])]
    for first, last in zip(cuts, cuts[7:], strict=False):
        found = shards.text_bytes(made.part(first, last), corpus.tokenizer)
        assert found == plain(first, last), (first, last)


def test_the_bytes_of_tokens_that_do_not_decode_to_their_text(tmp_path, settings):
    """Unknown characters and normalizers: the index has the bytes of a piece, the decoded text the
    share before a cut."""
    text = "Les \u00e9t\u00e9s \U0001f600 \u65e5\u672c\u8a9e sont l\u00e0.\n" * 300
    for normalizer in (
        None,
        normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()]),
    ):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"],
                                      limit_alphabet=20)  # fmt: skip
        tokenizer.train_from_iterator([text.replace("\U0001f600", "")], trainer)
        given = TokenizerFiles(tokenizer.to_str(), {}, "here")
        corpus = prepare(settings(vocab_size=60), write(tmp_path, text), given=given)
        made = all_tokens(corpus)
        size = len(text.encode())
        assert shards.text_bytes(made, corpus.tokenizer) == size
        for count in (len(made) // 3, len(made) // 2):
            found = shards.text_bytes(made.part(0, count), corpus.tokenizer)
            assert found == pytest.approx(size * count / len(made), rel=0.02)  # it repeats itself
            rest = shards.text_bytes(made.part(count, len(made)), corpus.tokenizer)
            assert found + rest == size
