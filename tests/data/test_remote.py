"""Sources behind a URL: the Hub's and others', from a server on loopback that also fails (I5)."""

from __future__ import annotations

import functools
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import huggingface_hub
import numpy as np
import pyarrow
import pytest
from data_helpers import GPT2, prepare, tokens_of
from helpers import ROOT, call, command, events, losses, train, write_tiny
from hub_helpers import Hub, serving
from huggingface_hub import hf_file_system
from pyarrow import parquet
from test_token_files import encoded, write_llm_c
from tokenizers import Tokenizer

from smollm.data import files, formats, listing, remote, sources
from smollm.data.documents import SEPARATOR
from smollm.data.hashes import key
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


@pytest.fixture
def hub_here(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The server, for what hf:// means in this process."""
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.address})
    huggingface_hub.HfFileSystem.clear_instance_cache()
    return hub


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
                "training.batch_size=1", "training.gradient_accumulation_steps=1",
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
    return Reader(file, file.identity, formats.kind_of(file), "text", 0)


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
    with pytest.raises(InputError, match=r"does not answer as it should \(.*503.*look at the net"):
        remote.opened(file).read(10)
    assert hub.faults == []
    hub.faults = ["cut", "503"]
    assert remote.opened(file).read(9) == b'{"text": '


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, hub: Hub) -> None:
    """Refused, as a file of this machine is."""
    path = tmp_path / "remote/data/deeper/all.jsonl"
    url = f"{hub.address}/datasets/some/texts/resolve/main/data/deeper/all.jsonl"
    found = reader(url, tmp_path / "cache")
    found.require_unchanged()
    path.write_text(path.read_text().replace("a", "e"))
    with pytest.raises(InputError, match="was changed on its server"):
        found.require_unchanged()


def test_a_file_that_was_changed_before_it_was_tokenized(
    tmp_path: Path, hub: Hub, settings
) -> None:
    """The list of the first start is made anew; what is tokenized already stays."""
    path, said = tmp_path / "remote/data/deeper/all.jsonl", []
    url = f"{hub.address}/datasets/some/texts/resolve/main/data/deeper/all.jsonl"
    first = tokens_of(prepare(settings(), url))
    path.write_text(path.read_text().replace("a", "e"))
    assert tokens_of(prepare(settings(), url, log=said.append)) == first and not said
    for tokens in (tmp_path / "cache").glob("tokens-*"):
        shutil.rmtree(tokens)
    assert tokens_of(prepare(settings(), url, log=said.append)) != first
    assert f"{url}: was changed on its server: looking again" in said


def test_a_file_that_never_stays_as_it_is(tmp_path: Path, hub: Hub, settings) -> None:
    """It is looked for once more, not for ever."""
    hub.restless = True
    url = f"{hub.address}/datasets/some/texts/resolve/main/data/deeper/all.jsonl"
    with pytest.raises(InputError, match="changed on its server again; start when it stays as it"):
        prepare(settings(), url)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(
    ("announced", "said"), [(2.0, r"ends after [\d,]+ bytes"), (0.5, "has more")]
)
def test_a_server_that_lies_about_a_size(
    tmp_path: Path, hub: Hub, announced: float, said: str, ranges: bool
) -> None:
    """Refused: neither read twice nor cut short."""
    hub.announced, hub.ranges = announced, ranges
    url = f"{hub.address}/datasets/some/texts/resolve/main/data/deeper/all.jsonl"
    with pytest.raises(InputError, match=said + r", and its server announced [\d,]+ bytes"):
        list(reader(url, tmp_path / "cache").pieces())


def test_the_hub_is_asked_again_by_us_too(
    tmp_path: Path, hub_here: Hub, texts, monkeypatch
) -> None:
    """When its own library gives up: busy, and broken in the middle; text and Parquet."""
    hub = hub_here
    monkeypatch.setattr(remote, "HUB_WAITS", (0.01,) * 6)
    monkeypatch.setattr(
        hf_file_system, "http_backoff",
        lambda method, url, headers=None, **options: huggingface_hub.utils.get_session().request(
            method, url, headers=headers, follow_redirects=True
        ),
    )  # fmt: skip
    for entry in ("hf://datasets/some/texts/data/a.parquet", "hf://datasets/some/texts/a.txt"):
        text = "".join(f"{text}{SEPARATOR}\n" for text in texts[:30])
        (tmp_path / "remote/a.txt").write_text(text)
        huggingface_hub.HfFileSystem.clear_instance_cache()
        hub.faults = ["503", "cut", "503"]
        found = "".join(piece.text for piece in reader(entry, tmp_path / "cache").pieces())
        assert found == "".join(texts[:30]) and hub.faults == []


def test_a_plain_web_server(tmp_path: Path, texts: list[str]) -> None:
    """One that lists its files: a glob finds them; a page for people is no text."""
    write_tiny(tmp_path / "www")
    handler = functools.partial(Quiet, directory=str(tmp_path / "www"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        (source,) = files.find([f"{url}/*.txt"], tmp_path / "cache", print)
        assert [file.url for file in source.files] == [f"{url}/text.txt"]
        assert source.files[0].size == (tmp_path / "www/text.txt").stat().st_size
        with pytest.raises(InputError, match="is a web page; give the URL of a file of text"):
            files.find([f"{url}/"], tmp_path / "cache", print)
    finally:
        server.shutdown()
        server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    """A web server that says nothing."""

    def log_message(self, *arguments: object) -> None:
        """Nobody reads it."""


def test_the_ending_of_a_name() -> None:
    """A folder may be named c#; only the web has queries."""
    assert RemoteFile("hf://datasets/a/b@main/c#/d?.csv.gz", 1, "").suffixes == [".csv", ".gz"]
    assert RemoteFile("https://a.b/c.csv?download=true.txt", 1, "").suffixes == [".csv"]


def test_parquet_from_a_server_that_gives_whole_files_only(
    tmp_path: Path, hub: Hub, texts, monkeypatch
) -> None:
    """It is read in parts: refused with the way out."""
    monkeypatch.setattr(sources, "FETCHED", 5000)
    hub.ranges = False
    url = f"{hub.address}/datasets/some/texts/resolve/main/data/a.parquet"
    with pytest.raises(InputError, match="gives whole files only, and this format is read in par"):
        list(reader(url, tmp_path / "cache").pieces())


# --- revisions -----------------------------------------------------------------------------------


def test_a_run_keeps_the_commit_that_it_started_with(tmp_path: Path, hub: Hub, texts) -> None:
    """While main goes on: resumed with its cache and no network, with an empty cache, with one of a
    newer run, it is the same; what it finds is not what a new run sees; a commit that is gone."""
    words = ["--input_file", ENTRY, *STEPS, "data.cache_dir=cache"]
    whole = run(tmp_path, hub, *words, name="whole")
    assert whole.returncode == 0, whole.stdout
    assert f"{ENTRY}: 2 files, 0.1 MB, commit 0123456789ab (kept in cache/rem" in whole.stdout
    assert f"  0            {ENTRY} (commit 0123456789ab): " in whole.stdout
    state = json.loads((tmp_path / "whole/checkpoints/step_000006/trainer_state.json").read_text())
    assert state["data"]["commits"] == {ENTRY: hub.commit}
    first, old = hub.commit, Path(shutil.copytree(tmp_path / "remote", tmp_path / "old"))
    write_parquet(tmp_path / "remote/data/b.parquet", texts[100:140])
    hub.commit, hub.earlier = NEW, {first: old}
    resume = [*words, "--resume", "whole/checkpoints/step_000003"]
    fresh = run(tmp_path, hub, *words, "data.cache_dir=new", name="fresh")
    assert f", commit {NEW[:12]} (kept in" in fresh.stdout, fresh.stdout
    assert losses(tmp_path, "fresh") != losses(tmp_path, "whole")
    expected = {step: loss for step, loss in losses(tmp_path, "whole").items() if step > 3}
    for name, cache, extra in (
        ("kept", "cache", {"HF_HUB_OFFLINE": "1"}),
        ("empty", "other", {}),
        ("newer", "new", {}),
    ):
        done = run(tmp_path, hub, *resume, f"data.cache_dir={cache}", name=name, **extra)
        assert done.returncode == 0, done.stdout
        assert losses(tmp_path, name) == expected
    for cache, commit in (("cache", first), ("new", NEW)):  # a new run sees what a new run saw
        found = json.loads((tmp_path / cache / f"remote-{key(ENTRY)}.json").read_text())
        assert found["commit"] == commit
    assert not (tmp_path / "other" / f"remote-{key(ENTRY)}.json").exists()
    hub.earlier.clear()
    gone = run(tmp_path, hub, *resume, "data.cache_dir=third", name="gone")
    assert gone.returncode == 3, gone.stdout
    assert "@0123456789ab/data/*.parquet: the Hub no longer has this commit" in gone.stdout
    resume.append("data.allow_changed_input=true")
    taken = run(tmp_path, hub, *resume, "data.cache_dir=third", name="gone")
    assert taken.returncode == 0 and f"commit {NEW[:12]}" in taken.stdout, taken.stdout


def test_a_revision_that_is_named(tmp_path: Path, hub_here: Hub) -> None:
    """After an @: a branch, or a commit."""
    for revision in ("main", hub_here.commit):
        entry = f"hf://datasets/some/texts@{revision}/data/a.parquet"
        (source,) = files.find([entry], tmp_path / "cache", print)
        assert source.commit == hub_here.commit
    with pytest.raises(InputError, match=r"@v9/data/a\.parquet: there is no such revision"):
        files.find(["hf://datasets/some/texts@v9/data/a.parquet"], tmp_path / "cache", print)


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
            "c*.parquet: matches no file; the folder data has: a.parquet, b.parquet",
        ),
        ("hf://datasets/some/texts/dat/a.parquet", "file; the repository has: data/a.parquet, d"),
        ("hf://datasets/some/other/*.parquet", "is no repository of the Hub that you may read"),
        ("hf://datasets", "is not hf://datasets/OWNER/NAME/PATTERN (Repository id must be"),
        ("hf://datasets/some/texts/tokens.bin", "hf download some/texts tokens.bin --repo-type"),
        ("hf://datasets/some/texts/empty.txt", "empty.txt: is empty; it must hold the text"),
        ("s3://bucket/a.txt", "s3://bucket/a.txt: s3:// needs the package s3fs"),
        ("oss2://bucket/a.txt", "oss2://bucket/a.txt: Protocol not known: oss2; name a file"),
        ("github://a/b.txt", "github://a/b.txt: GithubFileSystem.__init__() missing 2 required"),
        ("zip://a.txt::file:///b.zip", "chains of URLs are not read; download it"),
        ("hf:/datasets/a/b/*.txt", "hf:/datasets/a/b/*.txt: is no file; did you mean hf://data"),
        ("file:///nowhere/a.txt", "file:///nowhere/a.txt: matches no file; mind the spelling"),
    ],
)  # fmt: skip
def test_what_cannot_be_found(tmp_path: Path, hub_here: Hub, entry: str, said: str) -> None:
    """One line, with what is there or what to do."""
    with pytest.raises(InputError) as caught:
        files.find([entry], tmp_path / "cache", print)
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_no_network(tmp_path: Path, hub: Hub, monkeypatch) -> None:
    """The user wants none, or nobody answers; and aiohttp is not installed."""
    done = run(tmp_path, hub, "--input_file", ENTRY, "--dry_run", HF_HUB_OFFLINE="1")
    assert done.returncode == 3 and "cannot be read: HF_HUB_OFFLINE is set" in done.stdout, (
        done.stdout
    )
    monkeypatch.setattr(listing, "FIRST_WAITS", (0.01,))
    with pytest.raises(
        InputError, match=r"does not answer as it should \(Connection.*look at the n"
    ):
        reader("http://127.0.0.1:9/a.txt", tmp_path / "cache")
    (tmp_path / "shim").mkdir()
    missing = "raise ModuleNotFoundError(\"No module named 'aiohttp'\", name='aiohttp')\n"
    (tmp_path / "shim/aiohttp.py").write_text(missing)
    url = "https://127.0.0.1:9/a.txt"
    done = run(tmp_path, hub, "--input_file", url, "--dry_run", PYTHONPATH=str(tmp_path / "shim"))
    assert done.returncode == 3, done.stdout
    assert f"{url}: https:// needs the package aiohttp" in done.stdout
    assert "pip install aiohttp" in done.stdout


def test_a_folder_that_is_named_as_a_protocol(tmp_path: Path, monkeypatch) -> None:
    """hf/*.txt is a glob where a folder hf is."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "hf")
    (source,) = files.find(["hf/*.txt"], tmp_path / "cache", print)
    assert [str(path) for path in source.files] == ["hf/text.txt"]
    with pytest.raises(InputError, match=r"s3/\*\.txt: is no file; did you mean s3://\*\.txt"):
        files.find(["s3/*.txt"], tmp_path / "cache", print)


def test_a_folder_of_the_hub(tmp_path: Path, hub_here: Hub) -> None:
    """Every file below it that is a text by its name; what is left out is said."""
    (tmp_path / "remote/data/.hidden.txt").write_text("no")
    (tmp_path / "remote/data/.old").mkdir()
    shutil.copy(tmp_path / "remote/data/a.parquet", tmp_path / "remote/data/.old/a.parquet")
    for entry, names in (
        ("hf://datasets/some/texts", ["a.parquet", "b.parquet", "all.jsonl"]),
        ("hf://datasets/some/texts/data/deeper", ["all.jsonl"]),
        (f"file://{tmp_path}/remote/data/*.parquet", ["a.parquet", "b.parquet"]),
    ):
        said = []
        (source,) = files.find([entry], tmp_path / "cache", said.append)
        assert [file.url.rpartition("/")[2] for file in source.files] == names
        assert (source.commit is not None) == entry.startswith("hf")
        assert said[0].startswith(f"{entry}: {len(names)} file")
        assert said[1:] == [
            f"{entry}: left out: 1 empty (empty.txt); 2 hidden (.hidden.txt, ...); "
            "2 of other kinds (README.md, ...)"
        ] * entry.endswith("texts")


def test_a_list_that_is_damaged_is_made_again(tmp_path: Path, hub_here: Hub) -> None:
    """What is in the cache is checked, as everything that is read."""
    cache, said = tmp_path / "cache", []
    wanted = files.find([ENTRY], cache, said.append)
    assert files.find([ENTRY], cache, said.append) == wanted and len(said) == 1
    (kept,) = cache.glob("remote-*.json")
    good = kept.read_text()
    for bad in ("", "[]", '{"commit": 1, "files": [[1, 2, 3]]}', '{"commit": null, "files": []}'):
        kept.write_text(bad)
        assert files.find([ENTRY], cache, said.append) == wanted and kept.read_text() == good


def test_a_place_in_a_stream() -> None:
    """What reading forth and back gives is what the content has there."""
    content = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8).tobytes()
    fsspec.filesystem("memory").pipe_file("/content", content)
    stream = remote.opened(RemoteFile("memory://content", len(content), ""), block=50_000)
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
def test_the_recipes_find_their_data(
    tmp_path: Path, texts, small_tokenizer: Path, name: str, files
) -> None:
    """configs/ that name data sets of the Hub, by the names that they have there: dry runs with a
    small model."""
    write_tiny(tmp_path)
    repositories = {}
    for repository, names in files.items():
        repositories[repository] = tmp_path / repository
        for number, file in enumerate(names):
            write_parquet(tmp_path / repository / file, texts[number * 100 : number * 100 + 100])
    small = [
        "model.hidden_size=32", "model.num_attention_heads=2", "model.num_hidden_layers=1",
        "model.intermediate_size=64", f"tokenizer.source={small_tokenizer}",
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
