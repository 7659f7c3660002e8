"""Runs that start with weights: of other tools, of the Hub, of our own checkpoints; and what is
refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from data_helpers import held_out, prepare, tokens_of
from helpers import (
    ROOT,
    call,
    digest,
    events,
    finished_run,
    made_once,
    step_directory,
    train,
    write_tiny,
)  # fmt: skip
from hub_helpers import serving
from pretrained_helpers import STOP, TEMPLATE, loss_of, write_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from smollm import hub as hub_of
from smollm.checkpoint import huggingface as hf
from smollm.checkpoint import pretrained
from smollm.config_reader import load, model_config
from smollm.data.corpus import Corpus
from smollm.errors import CheckpointError, InputError

FP32 = "training.precision=fp32"


def corpus_of(directory: Path, model: Path) -> Corpus:
    """The text of a tiny run, by the tokenizer of a model's directory."""
    found = pretrained.find(str(model))
    config = load(
        directory / "tiny.yaml",
        [f"data.cache_dir={directory / 'cache'}"],
        fixed=found.fixed("the model"),
    )
    return prepare(config, directory / "text.txt", given=found.tokenizer())


def test_a_model_that_is_pruned_while_it_is_used(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """`latest` is taken again, where it names another now; else the error stands."""
    steps = finished_run(tmp_path_factory) / "run/checkpoints"
    for step in ("step_000010", "step_000012"):
        shutil.copytree(steps / step, tmp_path / step)
    latest = tmp_path / "latest"
    latest.symlink_to("step_000010")
    tried = []

    def use(found: pretrained.Pretrained) -> int:
        tried.append(found.directory.name)
        shutil.rmtree(found.directory)
        if tried == ["step_000010"]:
            latest.unlink()
            latest.symlink_to("step_000012")
        return len(pretrained.read_weights(found)) + len(pretrained.load_tokenizer(found))

    with pytest.raises(CheckpointError):
        pretrained.current(str(latest), use)
    assert tried == ["step_000010", "step_000012"]


# --- starting ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "starcoder2"])
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model of another tool, `foreign`, and a run of 4 steps from it."""

    def make(directory: Path) -> None:
        write_tiny(directory)
        is_llama = request.param == "llama"
        dtype, size = (torch.bfloat16, "150KB") if is_llama else (torch.float32, "1GB")
        write_model(directory / "foreign", request.param, dtype, size)
        result = train(directory, "--init_from", "foreign", "--train_steps", "4", FP32)
        assert result.returncode == 0, result.stdout
        (directory / "output").write_text(result.stdout)
        (directory / "family").write_text(request.param)

    return made_once(tmp_path_factory, f"started-{request.param}", make)


def test_a_run_starts_with_the_weights_of_another_tool(started: Path) -> None:
    """The first val_loss, before step 1, is the one that transformers computes of the directory;
    the last one that of the checkpoint, which it opens as the same architecture."""
    output, foreign = (started / "output").read_text(), started / "foreign"
    llama = (foreign / "model.safetensors.index.json").exists()
    kind = r"llama, \d files" if llama else "starcoder2, 1 file"
    assert re.search(rf"^weights +foreign \({kind}\)$", output, re.M), output
    assert "(a fresh optimizer, seed 42)" in output
    assert ("its config.json has residual_dropout 0.1; model.dropout 0.0 is" in output) != llama
    first, last = events(started, "eval")
    assert (first["step"], last["step"]) == (0, 4)
    tokens = held_out(corpus_of(started, foreign))
    assert first["val_loss"] == pytest.approx(loss_of(foreign, tokens), abs=1e-4)
    newest = step_directory(started, 4)
    assert last["val_loss"] == pytest.approx(loss_of(newest, tokens), abs=1e-4)
    assert last["val_loss"] < first["val_loss"]
    names = AutoConfig.from_pretrained(newest).architectures
    assert names == AutoConfig.from_pretrained(foreign).architectures
    state = json.loads((newest / "trainer_state.json").read_text())
    assert state["init_from"] == state["parent"] == "foreign"
    assert "It began with the weights of foreign." in (newest / "README.md").read_text("utf-8")


def test_its_tokenizer_is_used_as_it_is(started: Path) -> None:
    """End-of-text as tokenizer_config.json names it; no pad token is added, end-of-text serves."""
    newest = step_directory(started, 4)
    saved = json.loads((newest / "tokenizer_config.json").read_text("utf-8"))
    assert (saved["bos_token"], saved["chat_template"]) == ("zq", TEMPLATE)
    ours, theirs = (
        json.loads((path / "tokenizer.json").read_text("utf-8"))
        for path in (newest, started / "foreign")
    )
    assert ours["model"]["vocab"] == theirs["model"]["vocab"]
    assert [token["content"] for token in ours["added_tokens"]] == [STOP]
    tokenizer = AutoTokenizer.from_pretrained(newest)
    assert tokenizer.eos_token == tokenizer.pad_token == STOP
    config = json.loads((newest / "config.json").read_text())
    assert config["eos_token_id"] == config["pad_token_id"] == tokenizer.eos_token_id
    assert config["bos_token_id"] == tokenizer.convert_tokens_to_ids("zq")
    tokens = tokens_of(corpus_of(started, started / "foreign"))
    assert tokens.count(tokenizer.eos_token_id) == 11  # of 12 documents; the last one is cut


def test_it_goes_on_by_its_checkpoint(started: Path, tmp_path: Path) -> None:
    """Without --init_from, whatever shapes the file has; --init_from beside it is not used. Both
    give the same bytes. Phase 2 goes on too, and generate.py takes the model and the checkpoint."""
    for name, words in (("plain", []), ("again", ["--init_from", "not/there"])):
        copy = Path(shutil.copytree(started, tmp_path / name, symlinks=True))
        words += ["--resume", "auto", "--train_steps", "6", FP32]
        result = train(copy, *words)
        assert result.returncode == 0, result.stdout
        assert ("--init_from not/there is not used" in result.stdout) == (name == "again")
        assert "weights        the run began with those of foreign" in result.stdout
    assert digest(tmp_path / "plain", 6) == digest(tmp_path / "again", 6)
    words = ["--start_step", "6", "--train_steps", "1", FP32]
    result = train(copy, *words, script="continue_training.py")
    assert result.returncode == 0, result.stdout
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):  # as at the start
        content = (step_directory(copy, 7) / name).read_text("utf-8")
        assert content == (step_directory(copy, 4) / name).read_text("utf-8"), name
    for path in ("foreign", "run/checkpoints/latest"):
        words = [sys.executable, str(ROOT / "generate.py"), "--checkpoint", path, "--seed", "1"]
        shown = call(copy, words)
        assert shown.returncode == 0 and "Once upon a time" in shown.stdout, shown.stdout


def test_a_checkpoint_of_ours_is_a_start(started: Path, tmp_path: Path) -> None:
    """A new run: step 0, its own id, the loss where the old one left it; by `latest` too."""
    copy = Path(shutil.copytree(started, tmp_path / "copy", symlinks=True))
    words = ["--init_from", "run/checkpoints/latest", "--train_steps", "1", FP32]
    result = train(copy, *words, run="new")
    assert result.returncode == 0, result.stdout
    first, before = events(copy, "eval", run="new")[0], events(copy, "eval")[-1]
    assert first["step"] == 0
    assert first["val_loss"] == pytest.approx(before["val_loss"], abs=1e-6)
    old, new = (
        json.loads((step_directory(copy, step, run) / "trainer_state.json").read_text())
        for step, run in ((4, "run"), (1, "new"))
    )
    assert new["wandb_run_id"] != old["wandb_run_id"]
    assert new["parent"] == f"{old['wandb_run_id']}, run/checkpoints/latest"


def test_a_run_that_was_killed_before_its_first_checkpoint(tmp_path: Path) -> None:
    """The same command, as train.sh types it, starts with the weights again."""
    write_tiny(tmp_path)
    write_model(tmp_path / "foreign")
    words = ["--init_from", "foreign", "--resume", "auto", "--train_steps", "2"]
    killed = train(tmp_path, *words, FAULT="step.forward:kill:1")
    assert killed.returncode == -9, killed.stdout
    again = train(tmp_path, *words)
    assert again.returncode == 0, again.stdout
    assert "weights        foreign (llama" in again.stdout
    assert len(events(tmp_path, "eval")) == 2


@pytest.mark.parametrize(
    ("words", "code", "hint"),
    [
        (["model.hidden_size=64"], 2, "model.hidden_size=64 contradicts --init_from foreign, which "
         "has 96"),
        (["model.num_key_value_heads=6"], 2, "which has 2; leave it out"),
        (["tokenizer.source=gpt2"], 2, "has a tokenizer of its own"),
        (["data.sequence_length=65"], 2, "is larger than model.max_position_embeddings 64"),
        (["--resume", "run/checkpoints/step_000002"], 2, "give one of them"),
        (["--init_from", "nowhere"], 3, "nowhere: there is no such"),
        (["--init_from", "text.txt"], 3, "text.txt: is not a checkpoint directory"),
        (["--init_from", ""], 2, "got an empty path"),
        (["--save_dir", "foreign"], 2, "holds the weights to start with; name another"),
    ],
)  # fmt: skip
def test_bad_words_are_refused(
    started: Path, tmp_path: Path, words: list[str], code: int, hint: str
) -> None:
    """One line, nothing written; overrides that agree with the weights pass."""
    write_tiny(tmp_path)
    (tmp_path / "foreign").symlink_to(started / "foreign")
    words = ["--init_from", "foreign", "model.num_hidden_layers=3", *words]
    result = train(tmp_path, *words)
    assert result.returncode == code and "Traceback" not in result.stdout, result.stdout
    if "foreign" in hint or (started / "family").read_text() == "llama":
        assert hint in result.stdout
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


# --- what is refused -----------------------------------------------------------------------------


def change(name: str, **values) -> Callable[[Path], None]:
    """Damage: keys of a JSON file that have other values, or none."""

    def apply(directory: Path) -> None:
        content = {**json.loads((directory / name).read_text()), **values}
        kept = {key: value for key, value in content.items() if value is not ...}
        (directory / name).write_text(json.dumps(kept))

    return apply


def config(**values) -> Callable[[Path], None]:
    """Damage to config.json."""
    return change("config.json", **values)


def tensors(edit: Callable[[dict], None]) -> Callable[[Path], None]:
    """Damage to the tensors of the first file."""

    def apply(directory: Path) -> None:
        path = min(directory.glob("*.safetensors"))
        found = load_file(path)
        edit(found)
        save_file(found, path, {"format": "pt"})

    return apply


def spoil(found: dict) -> None:
    """A NaN."""
    found["model.embed_tokens.weight"][3, 4] = float("nan")


def cut(found: dict) -> None:
    """Another shape."""
    found["model.embed_tokens.weight"] = found["model.embed_tokens.weight"][:500].clone()


def shard(directory: Path) -> Path:
    """The second file of several."""
    return sorted(directory.glob("model-*.safetensors"))[1]


def pickled(directory: Path) -> None:
    """Weights as a pickle alone."""
    for path in directory.glob("model*"):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04")


def overfill(directory: Path) -> None:
    """A tokenizer with more entries than the embedding has rows."""
    content = json.loads((directory / "tokenizer.json").read_text())
    content["model"]["vocab"].update({f"word{n}": 510 + n for n in range(20)})
    (directory / "tokenizer.json").write_text(json.dumps(content))


DAMAGE = {
    "no config": (lambda d: (d / "config.json").unlink(), "it has no config.json"),
    "no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json: Expecting"),
    "a list": (lambda d: (d / "config.json").write_text("[]"), "config.json: is malformed"),
    "no width": (config(hidden_size=...), "config.json: is malformed: KeyError: 'hidden_size'"),
    "no heads": (config(num_attention_heads=0, head_dim=None), "heads: got '0', expected a"),
    "odd heads": (config(num_key_value_heads=4, head_dim=None), "is not a multiple of"),
    "mistral": (config(model_type="mistral"), "'mistral', and only starcoder2 and llama are"),
    "ReLU": (config(hidden_act="relu"), "hidden_act is 'relu', and only 'silu' is computed"),
    "bias": (config(attention_bias=True), "attention_bias is True"),
    "llama3": (config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5}), "llama3 is not"),
    "scaling": (config(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling linear is"),
    "by layer": (config(rope_parameters={"full_attention": {"a": 1e4}}), "by layer is not"),
    "partial": (config(partial_rotary_factor=0.5), "partial_rotary_factor is not computed here"),
    "window": (config(sliding_window=32), "sliding_window 32 is not computed here"),
    "layers": (config(layer_types=["sliding_attention"] * 3), "layer_types sliding_attention is"),
    "head_dim": (config(head_dim=32), "head_dim 32 (hidden_size / heads is 16) is not computed"),
    "quantized": (config(quantization_config={"bits": 4}), "quantization_config is not computed"),
    "pickle": (pickled, "pytorch_model.bin, a pickle, which can execute anything"),
    "no weights": (lambda d: [p.unlink() for p in d.glob("model*")], "holds no weights"),
    "no shard": (lambda d: shard(d).unlink(), "safetensors is missing, of 5 files"),
    "torn": (lambda d: shard(d).write_bytes(b"\x08"), ".safetensors cannot be read"),
    "outside": (change("model.safetensors.index.json", weight_map={"a": "../a.safetensors"}),
                "names ['../a.safetensors']"),
    "no map": (change("model.safetensors.index.json", weight_map=...), "is malformed"),
    "NaN": (tensors(spoil), "model.embed_tokens.weight holds numbers that are not finite"),
    "shape": (tensors(cut), "has the shape (500, 96), and config.json makes it (520, 96)"),
    "lacking": (tensors(lambda t: t.pop("model.embed_tokens.weight")),
                "lacks model.embed_tokens.weight"),
    "foreign": (tensors(lambda t: t.update({"model.lora_A": torch.zeros(2)})),
                "holds what is not llama's: model.lora_A"),
    "int8": (tensors(lambda t: t.update({"model.norm.weight": torch.zeros(96, dtype=torch.int8)})),
             "model.norm.weight is int8; weights are needed in"),
    "tied": (config(tie_word_embeddings=True), "lm_head.weight is not the embedding"),
    "tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json; Auto"),
    "no end": (lambda d: (d / "tokenizer_config.json").unlink(), "has no end-of-text token"),
    "overfull": (overfill, "has 530 entries, more than the 520 rows of the model's embedding"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as transformers writes it, in four files."""
    return made_once(tmp_path_factory, "foreign-model", write_model)


def opened(directory: Path, work: Path) -> None:
    """Everything that a run does with a model before it trains."""
    found = pretrained.find(str(directory))
    pretrained.read_weights(found)
    write_tiny(work)
    corpus_of(work, directory)
    pretrained.load_tokenizer(found)


@pytest.mark.parametrize("name", DAMAGE)
def test_what_cannot_be_used_is_named(model: Path, tmp_path: Path, name: str) -> None:
    """One line that names the directory and what is wrong with it."""
    damage, hint = DAMAGE[name]
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    damage(copy)
    with pytest.raises((CheckpointError, InputError)) as caught:
        opened(copy, tmp_path)
    message = str(caught.value)
    assert hint in message and str(copy) in message and "\n" not in message, message


@pytest.mark.parametrize("name", ["NaN", "shape", "no shard", "overfull"])
def test_train_refuses_it_before_anything_is_written(
    model: Path, tmp_path: Path, name: str
) -> None:
    """Exit 3; not even a lock or an empty log file."""
    damage, hint = DAMAGE[name]
    damage(Path(shutil.copytree(model, tmp_path / "copy")))
    write_tiny(tmp_path)
    result = train(tmp_path, "--init_from", "copy")
    assert result.returncode == 3 and "Traceback" not in result.stdout, result.stdout
    assert hint in result.stdout
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_weights_that_are_none_are_left_out(model: Path, tmp_path: Path) -> None:
    """The rotary frequencies of older versions; a head beside the embedding that it is tied to."""
    copy = Path(shutil.copytree(model, tmp_path / "copy"))

    def edit(found: dict) -> None:
        found["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
        found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()

    expected = pretrained.read_weights(pretrained.find(str(model)))
    tensors(edit)(copy)
    for path in copy.glob("*.safetensors"):
        found = load_file(path)
        if "lm_head.weight" in found and "model.embed_tokens.weight" not in found:
            found.pop("lm_head.weight")
            save_file(found or {"x.rotary_emb.inv_freq": torch.zeros(1)}, path, {"format": "pt"})
    config(tie_word_embeddings=True)(copy)
    weights = pretrained.read_weights(pretrained.find(str(copy)))
    assert weights.keys() == expected.keys() - {"lm_head.weight"}


def test_directories_as_other_tools_leave_them(model: Path, tmp_path: Path) -> None:
    """A trainer_state.json of Hugging Face's Trainer or a foreign manifest.json make no checkpoint
    of ours. One file wins over an index that was left, as for transformers; tied weights may be
    saved as the head alone."""
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    (copy / "trainer_state.json").write_text('{"global_step": 5, "log_history": []}')
    (copy / "manifest.json").write_text('{"files": ["model-00001-of-00005.safetensors"]}')
    opened(copy, tmp_path)
    found = pretrained.find(str(copy))
    assert found.trainer_state() is None and len(found.files) == 5
    weights = pretrained.read_weights(found)
    config(tie_word_embeddings=True)(copy)
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    for path in copy.glob("model-*"):
        path.unlink()
    found = pretrained.find(str(copy))
    assert [path.name for path in found.files] == ["model.safetensors"]
    tied = pretrained.read_weights(found)["model.embed_tokens.weight"]
    assert torch.equal(tied, weights["lm_head.weight"])


@pytest.mark.parametrize("family", ["llama", "starcoder2"])
def test_a_key_that_is_missing_has_the_value_of_transformers(family: str) -> None:
    """config.json with the shape alone: what transformers makes of it is what we make of it."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    values = {"model_type": family, "num_attention_heads": 4, **shape}
    values |= {"attention_bias": None, "use_bias": None} if family == "llama" else {}
    known = {key: value for key, value in values.items() if value is not None}
    theirs = hf.model_values(AutoConfig.for_model(**known).to_dict())
    assert model_config(hf.model_values(values), "here") == model_config(theirs, "there")


# --- the Hub -------------------------------------------------------------------------------------


def test_a_model_of_the_hub(model: Path, tmp_path: Path) -> None:
    """By owner/name: safetensors, JSON and tokenizer files only; the second time also without a
    network. `tokenizer.source` takes such a name too. One that is not there is named."""
    write_tiny(tmp_path)
    remote = Path(shutil.copytree(model, tmp_path / "remote"))
    for name in ("pytorch_model.bin", "README.md", "train.py"):
        (remote / name).write_bytes(b"no")
    words = ["--init_from", "some-owner/some.model", "--dry_run", FP32]
    (tmp_path / "empty").mkdir()
    with serving({"some-owner/some.model": remote}) as hub:
        asked, there = hub.asked, {**hub.environment, "HF_HOME": str(tmp_path / "empty")}
        wrong = train(tmp_path, *words, "training.batch_size=0", **there)
        assert wrong.returncode == 2 and set(asked) == {"config.json"}, wrong.stdout
        asked.clear()
        words[1] = "hf://some-owner/some.model"  # the same, and never a path
        result = train(tmp_path, *words, **there)
        assert result.returncode == 0, result.stdout
        assert "weights        some-owner/some.model (llama, 5 files)" in result.stdout
        wanted = {path.name for path in model.iterdir()} - {"config.json"}
        assert set(asked) == wanted and "pytorch_model.bin" not in asked
        words[1] = "some-owner/other"
        missing = train(tmp_path, *words, **there)
        assert missing.returncode == 3 and "some-owner/other: is neither a path" in missing.stdout
        source = ["tokenizer.source=some-owner/some.model", "model.vocab_size=520", "--dry_run"]
        shutil.rmtree(tmp_path / "empty/hub")
        taken = train(tmp_path, *source, **there)
        assert taken.returncode == 0, taken.stdout
        assert set(asked[len(wanted) :]) >= {"tokenizer.json", "tokenizer_config.json"}
    offline = train(tmp_path, *source, **there)  # from our own cache
    assert offline.returncode == 0, offline.stdout
    words[1] = "some-owner/some.model"
    gone = train(tmp_path, *words, **there)
    assert gone.returncode == 3 and "no network?" in gone.stdout, gone.stdout


def test_what_was_fetched_serves_without_a_network(model: Path, tmp_path: Path) -> None:
    """The library's own cache, as another program left it; what lacks is named by its id, also
    where a directory `owner` is here."""
    (tmp_path / "owner").mkdir()
    for name in ("whole", "pickle", "part"):
        cache = tmp_path / f"hub/models--owner--{name}"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs/main").write_text("0" * 40)
        snapshot = Path(shutil.copytree(model, cache / "snapshots" / ("0" * 40)))
        gone = {"whole": "nothing", "pickle": "model*", "part": "*"}[name]
        for path in snapshot.glob(gone):
            path.unlink()
    there = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": f"{tmp_path}/hub"}
    for name, hint in (
        ("whole", ""),
        ("pickle", "owner/pickle: holds no weights (model.safetensors or model.safetensors.index"),
        ("part", "owner/part: is not a model's repository, or was fetched in part only"),
    ):
        words = [sys.executable, str(ROOT / "generate.py"), "--checkpoint", f"hf://owner/{name}"]
        result = call(tmp_path, [*words, "--json"], **there)
        assert result.returncode == (3 if hint else 0) and hint in result.stdout, result.stdout
        assert ("perhaps it has its weights in .bin files, pickles" in result.stdout) == (
            name == "pickle"
        )
        assert hint or json.loads(result.stdout.splitlines()[0])


def test_what_is_an_id_and_what_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt path is not looked for in the network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    ids = ("HuggingFaceTB/SmolLM2-135M", "a/b.c_d", "hf://checkpoints/model", "hf://a/latest")
    paths = (
        "checkpoints/lastest", "somewhere/latest", "a/best", "b/step_005000", "./a/b", "../a/b",
        "a", "a/b/c", "/a/b", "~/a", "a/", "", "a/b c", "a/../b", ".hidden/a", "hf://a", "hf://a/b/c",
    )  # fmt: skip
    assert [hub_of.repository(word) for word in ids] == [w.removeprefix("hf://") for w in ids]
    assert [word for word in paths if hub_of.repository(word)] == []
