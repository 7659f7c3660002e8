"""Sources behind a URL: the Hub's and others', from a server on loopback that fails as one may."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pytest
from data_helpers import GPT2
from helpers import ROOT, call, command, events, losses, train, write_tiny
from hub_helpers import Hub, serving
from pyarrow import parquet
from test_token_files import encoded, write_llm_c
from tokenizers import Tokenizer

from smollm.data import files, formats, listing, remote
from smollm.data.documents import SEPARATOR
from smollm.data.remote import RemoteFile
from smollm.data.sources import Reader
from smollm.errors import InputError

NEW = "89abcdef0123456789abcdef0123456789abcdef"  # a later commit
ENTRY = "hf://datasets/some/texts/data/*.parquet"
STEPS = ("--train_steps", "6", "training.save_steps=3")


def write_parquet(path: Path, texts: list[str]) -> None:
    """Texts in row groups of 50."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"id": range(len(texts)), "text": texts}
    parquet.write_table(pyarrow.table(columns), path, row_group_size=50)


@pytest.fixture(scope="module")
def texts(prose: str) -> list[str]:
    """The documents of the default text: 422."""
    return prose.split(f"{SEPARATOR}\n")[:-1]


@pytest.fixture
def hub(tmp_path: Path, texts: list[str]) -> Iterator[Hub]:
    """A Hub with one data set of 60 documents, in two files of Parquet, one of JSON lines, a text
    and an archive; and a directory to run in."""
    write_tiny(tmp_path)
    data = tmp_path / "remote/data"
    write_parquet(data / "a.parquet", texts[:30])
    write_parquet(data / "b.parquet", texts[30:60])
    lines = [json.dumps({"text": text}) + "\n" for text in texts[:60]]
    (data / "deeper").mkdir()
    (data / "deeper/all.jsonl").write_text("".join(lines))
    (tmp_path / "remote/README.md").write_text("A card, not what the folder holds.")
    (tmp_path / "remote/tokens.bin").write_bytes(b"\5\0" * 100)
    (tmp_path / "remote/empty.txt").touch()
    with serving({"datasets/some/texts": tmp_path / "remote"}) as server:
        yield server


def run(directory: Path, hub: Hub, *words: str, name: str = "run", **extra: str):
    """train.py, led to the server."""
    home = {"HF_HOME": str(directory / "home"), **hub.environment, **extra}
    return train(directory, *words, run=name, **home)


# --- the same run --------------------------------------------------------------------------------


def test_the_same_losses_from_the_hub_from_shards_and_from_a_text(tmp_path: Path, texts) -> None:
    """The 422 documents as one text, as Parquet on the Hub and as llm.c's shard: the same losses of
    ten steps and the same evaluations, bits per byte included; evaluate.py finds the text again."""
    write_tiny(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"{text}{SEPARATOR}\n" for text in texts))
    write_parquet(tmp_path / "remote/texts.parquet", texts)
    source = GPT2
    if not source.is_file():  # of the shared data; else one that is learned here
        assert train(tmp_path, "--train_steps", "1", run="learned").returncode == 0
        source = tmp_path / "learned/checkpoints/step_000001/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(source))
    end = tokenizer.token_to_id(SEPARATOR)
    ids = [token for each in encoded(texts, tokenizer) for token in (end, *each)]
    write_llm_c(tmp_path / "text.bin", ids)
    inputs = {
        "text": "text.txt", "hub": "hf://datasets/some/texts/*.parquet", "shard": "text.bin"
    }  # fmt: skip
    found = {}
    with serving({"datasets/some/texts": tmp_path / "remote"}) as hub:
        for name, entry in inputs.items():
            done = run(
                tmp_path, hub, "--input_file", entry, "--train_steps", "10",
                f"tokenizer.source={source}", "model.vocab_size=50257", "training.save_steps=10",
                "data.validation_fraction=0.01", name=name,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout
            assert "422 documents, " in done.stdout
            evaluations = events(tmp_path, "eval", name)
            values = [(e["val_loss"], e["val_bits_per_byte"]) for e in evaluations]
            found[name] = (losses(tmp_path, name), values)
    assert found["text"] == found["hub"] == found["shard"] and len(found["text"][0]) == 10
    # Without the server: what is tokenized, and the list of the files, are there.
    words = ["--checkpoint", "hub/checkpoints/latest", "--json"]
    done = call(tmp_path, [*command("evaluate.py")[:2], *words], HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout
    loss = json.loads(done.stdout.splitlines()[-1])["loss"]
    assert loss == pytest.approx(found["text"][1][-1][0], abs=1e-6)


def reader(url: str, cache: Path) -> Reader:
    """Of a file that is found anew."""
    shutil.rmtree(cache, ignore_errors=True)
    (file,) = files.find([url], cache, print)[0].files
    return Reader(file, file.identity(), formats.kind_of(file), "text", 0)


def test_an_interruption_of_the_hub(tmp_path: Path, hub: Hub) -> None:
    """A connection that breaks: the same tokens."""
    words = ["--input_file", ENTRY, "--dry_run"]
    hub.faults = ["cut"]
    done = run(tmp_path, hub, *words)
    assert done.returncode == 0 and ", 60 documents, " in done.stdout, done.stdout
    assert hub.faults == []


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("block", [1 << 23, 5000])
def test_interruptions(tmp_path: Path, hub: Hub, monkeypatch, ranges: bool, block: int) -> None:
    """A web server that is busy, and connections that break: the same documents, whether it gives
    parts of files or whole ones only, in one block or several."""
    monkeypatch.setattr(remote, "WAITS", (0.01,) * 4)
    monkeypatch.setattr(remote, "FETCHED", block)
    monkeypatch.setattr(remote, "BUFFER", 3000)
    path = tmp_path / "remote/data/deeper/all.jsonl"
    url = f"{hub.address}/datasets/some/texts/resolve/main/data/deeper/all.jsonl"
    wanted = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    for faults in ([], ["503", "cut", "", "cut"], ["", "", "503", "cut"]):
        hub.ranges, hub.faults = ranges, list(faults)
        found = [piece.text for piece in reader(url, tmp_path / "cache").pieces()]
        assert found == wanted


def test_a_server_that_stays_broken(tmp_path: Path, hub: Hub, monkeypatch) -> None:
    """Given up after some tries, with the way out; what it said is shown."""
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.01))
    url = f"{hub.address}/datasets/some/texts/resolve/main/data/deeper/all.jsonl"
    file = reader(url, tmp_path / "cache").path
    hub.faults = ["503"] * 3
    with pytest.raises(InputError, match=r"cannot be read \(.*503.*no network\? Start again"):
        file.open().read(10)
    assert hub.faults == []
    hub.faults = ["cut", "503"]
    assert file.open().read(9) == b'{"text": '


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, hub: Hub) -> None:
    """Refused, as a file of this machine is."""
    path = tmp_path / "remote/data/deeper/all.jsonl"
    url = f"{hub.address}/datasets/some/texts/resolve/main/data/deeper/all.jsonl"
    found = reader(url, tmp_path / "cache")
    found.require_unchanged()
    path.write_text(path.read_text().replace("a", "e"))
    with pytest.raises(InputError, match="was changed while it was read"):
        found.require_unchanged()


def test_parquet_from_a_server_that_gives_whole_files_only(
    tmp_path: Path, hub: Hub, texts, monkeypatch
) -> None:
    """It is read in parts: refused with the way out."""
    monkeypatch.setattr(remote, "FETCHED", 5000)
    hub.ranges = False
    url = f"{hub.address}/datasets/some/texts/resolve/main/data/a.parquet"
    with pytest.raises(InputError, match="gives whole files only, and this format is read in par"):
        list(reader(url, tmp_path / "cache").pieces())


# --- revisions -----------------------------------------------------------------------------------


def test_a_run_keeps_the_commit_that_it_started_with(tmp_path: Path, hub: Hub, texts) -> None:
    """While main goes on: resumed with its cache, without a network, with an empty cache, the run
    is the same; a new run sees the new text once the list is removed; a commit that is gone."""
    words = ["--input_file", ENTRY, *STEPS, "data.cache_dir=cache"]
    whole = run(tmp_path, hub, *words, name="whole")
    assert whole.returncode == 0, whole.stdout
    assert f"{ENTRY}: 2 files, 0." in whole.stdout and "at commit 0123456789ab" in whole.stdout
    state = json.loads((tmp_path / "whole/checkpoints/step_000006/trainer_state.json").read_text())
    assert state["data"]["commits"] == {ENTRY: hub.commit}
    first, old = hub.commit, Path(shutil.copytree(tmp_path / "remote", tmp_path / "old"))
    write_parquet(tmp_path / "remote/data/b.parquet", texts[100:140])
    hub.commit, hub.earlier = NEW, {first: old}
    resume = [*words, "--resume", "whole/checkpoints/step_000003"]
    for name, cache, extra in (
        ("kept", "cache", {"HF_HUB_OFFLINE": "1"}),
        ("empty", "other", {}),
    ):
        done = run(tmp_path, hub, *resume, f"data.cache_dir={cache}", name=name, **extra)
        assert done.returncode == 0, done.stdout
        expected = {step: loss for step, loss in losses(tmp_path, "whole").items() if step > 3}
        assert losses(tmp_path, name) == expected
    again = run(tmp_path, hub, *words, name="again")
    assert losses(tmp_path, "again") == losses(tmp_path, "whole") and again.returncode == 0
    for memory in (tmp_path / "cache").glob("remote-*.json"):
        memory.unlink()
    fresh = run(tmp_path, hub, *words, name="fresh")
    assert losses(tmp_path, "fresh") != losses(tmp_path, "whole"), fresh.stdout
    assert f"at commit {NEW[:12]}" in fresh.stdout
    hub.earlier.clear()
    gone = run(tmp_path, hub, *resume, "data.cache_dir=third", name="gone")
    assert gone.returncode == 3, gone.stdout
    assert f"{ENTRY}: there is no such revision (any more)" in gone.stdout


def test_a_revision_that_is_named(tmp_path: Path, hub: Hub) -> None:
    """After an @: a branch, or a commit."""
    for revision, code in (("main", 0), (hub.commit, 0), ("v9", 3)):
        entry = f"hf://datasets/some/texts@{revision}/data/a.parquet"
        done = run(tmp_path, hub, "--input_file", entry, "--dry_run")
        assert done.returncode == code, done.stdout
    assert f"{entry}: there is no such revision" in done.stdout


# --- refusals ------------------------------------------------------------------------------------


def test_a_login(tmp_path: Path, hub: Hub) -> None:
    """The token of `hf auth login` is used; without it the way out is named."""
    hub.token = "hf_something"
    words = ["--input_file", ENTRY, "--dry_run"]
    done = run(tmp_path, hub, *words)
    assert done.returncode == 3, done.stdout
    assert "accepted its terms only; accept them" in done.stdout and "hf auth login" in done.stdout
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home/token").write_text("hf_something")
    done = run(tmp_path, hub, *words)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            "hf://datasets/some/texts/data/c*.parquet",
            "c*.parquet: matches no file; data has b.parquet, a.parquet",
        ),
        ("hf://datasets/some/texts/dat/a.parquet", "no file; the repository has data/a.parquet, "),
        ("hf://datasets/some/other/*.parquet", "is no repository of the Hub that you may read"),
        ("hf://datasets", "is not hf://datasets/OWNER/NAME/PATTERN (Repository id must be"),
        ("hf://datasets/some/texts/tokens.bin", "tokens.bin: is a file of tokens, which are used"),
        ("hf://datasets/some/texts/empty.txt", "empty.txt: is empty; it must hold the text"),
        ("s3://bucket/a.txt", "s3://bucket/a.txt: s3:// needs the package s3fs"),
        ("oss2://bucket/a.txt", "oss2://bucket/a.txt: Protocol not known: oss2; name a file"),
        ("file:///nowhere/a.txt", "file:///nowhere/a.txt: matches no file; mind the spelling"),
    ],
)  # fmt: skip
def test_what_cannot_be_found(tmp_path: Path, hub: Hub, entry: str, said: str) -> None:
    """Exit 3, one line, with what is there or what to do."""
    done = run(tmp_path, hub, "--input_file", entry, "--dry_run")
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert done.returncode == 3 and len(errors) == 1 and said in errors[0], done.stdout


def test_no_network(tmp_path: Path, hub: Hub, monkeypatch) -> None:
    """The user wants none, or nobody answers; and aiohttp is not installed."""
    done = run(tmp_path, hub, "--input_file", ENTRY, "--dry_run", HF_HUB_OFFLINE="1")
    assert done.returncode == 3 and f"{ENTRY}: cannot be read (Offline" in done.stdout, done.stdout
    monkeypatch.setattr(listing, "FIRST_WAITS", (0.01,))
    with pytest.raises(InputError, match=r"no network\? Start again when there is one"):
        reader("http://127.0.0.1:9/a.txt", tmp_path / "cache")
    (tmp_path / "shim").mkdir()
    missing = "raise ModuleNotFoundError(\"No module named 'aiohttp'\", name='aiohttp')\n"
    (tmp_path / "shim/aiohttp.py").write_text(missing)
    url = "https://127.0.0.1:9/a.txt"
    done = run(tmp_path, hub, "--input_file", url, "--dry_run", PYTHONPATH=str(tmp_path / "shim"))
    assert done.returncode == 3, done.stdout
    assert f"{url}: https:// needs the package aiohttp" in done.stdout
    assert "pip install aiohttp" in done.stdout


def test_a_folder_of_the_hub(tmp_path: Path, hub: Hub) -> None:
    """Every file below it that is a text by its name, but no README; and files by fsspec's file."""
    for entry, documents in (
        ("hf://datasets/some/texts", 120),
        ("hf://datasets/some/texts/data/deeper", 60),
        (f"file://{tmp_path}/remote/data/*.parquet", 60),
    ):
        done = run(tmp_path, hub, "--input_file", entry, "--dry_run")
        assert done.returncode == 0 and f", {documents} documents, " in done.stdout, done.stdout


def test_a_list_that_is_damaged_is_made_again(tmp_path: Path, hub: Hub) -> None:
    """What is in the cache is checked, as everything that is read."""
    words = ["--input_file", ENTRY, "--dry_run", "data.cache_dir=cache"]
    assert run(tmp_path, hub, *words).returncode == 0
    (memory,) = (tmp_path / "cache").glob("remote-*.json")
    good = memory.read_text()
    for bad in (
        "",
        "[]",
        '{"revision": 1, "files": [[1, 2, 3]]}',
        '{"revision": null, "files": []}',
    ):
        memory.write_text(bad)
        done = run(tmp_path, hub, *words)
        assert done.returncode == 0 and memory.read_text() == good, done.stdout


def test_a_place_in_a_stream() -> None:
    """What reading forth and back gives is what the content has there."""
    content = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8).tobytes()
    fsspec.filesystem("memory").pipe_file("/content", content)
    stream = RemoteFile("memory://content", len(content), "").open()
    rng = np.random.default_rng(1)
    for _ in range(200):
        place, count = int(rng.integers(len(content))), int(rng.integers(100_000))
        stream.seek(place)
        assert stream.read(count) == content[place : place + count]
        assert stream.tell() == min(place + count, len(content))
    assert stream.seek(-5, 2) == len(content) - 5 and stream.read() == content[-5:]


# --- recipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("tinystories", {
            "datasets/roneneldan/TinyStories": [
                "data/train-00000-of-00004-2d5a1467fff1081b.parquet",
                "data/train-00001-of-00004-5852b56a2bd28fd9.parquet",
                "data/validation-00000-of-00001-869c898b519ad725.parquet",
            ],
        }),
        ("fineweb-edu", {
            "datasets/HuggingFaceFW/fineweb-edu": [
                "sample/10BT/000_00000.parquet", "sample/10BT/013_00000.parquet",
                "sample/100BT/000_00000.parquet",
            ],
        }),
    ],
)  # fmt: skip
def test_the_recipes_find_their_data(tmp_path: Path, texts, name: str, files) -> None:
    """configs/ that name data sets of the Hub, by the names that they have there: dry runs with a
    small model."""
    write_tiny(tmp_path)
    assert train(tmp_path, "--train_steps", "1").returncode == 0  # a tokenizer to use
    repositories = {}
    for repository, names in files.items():
        repositories[repository] = tmp_path / repository
        for number, file in enumerate(names):
            write_parquet(tmp_path / repository / file, texts[number * 100 : number * 100 + 100])
    small = [
        "model.hidden_size=32", "model.num_attention_heads=2", "model.num_hidden_layers=1",
        "model.intermediate_size=64", "tokenizer.source=run/checkpoints/step_000001",
        f"data.cache_dir={tmp_path / 'cache'}", "data.sequence_length=64", "wandb.mode=disabled",
    ]  # fmt: skip
    if name == "fineweb-edu":
        small.append("data.validation_fraction=0.05")  # of so small a text
    with serving(repositories) as hub:
        done = call(
            tmp_path,
            [
                *command("train.py")[:2], "--config", str(ROOT / f"configs/{name}.yaml"),
                "--dry_run", "--save_dir", "new", *small,
            ],
            **hub.environment, HF_HOME=str(tmp_path / "home"),
        )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert ": 2 files, " in done.stdout and "dry run: everything is fine" in done.stdout
    assert ("300" if name == "tinystories" else "200") + " documents" in done.stdout
