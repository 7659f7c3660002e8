"""checkpoint.py export: GGUF that llama.cpp and transformers open, directories for the Hub."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import GPT2
from helpers import ROOT, call, finished_run, made_once, train, write_tiny
from pretrained_helpers import STOP, TEMPLATE, loss_of, write_model
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from smollm.checkpoint import export
from smollm.data.tokenizer import SPECIAL_TOKENS
from smollm.errors import ConfigError, InputError, ResourceError

gguf = pytest.importorskip("gguf", reason="requirements-export.txt is not installed")
FAMILIES = ("llama", "starcoder2")


def exported(directory: Path, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run `checkpoint.py export` in a directory."""
    return call(directory, [sys.executable, str(ROOT / "checkpoint.py"), "export", *words], **extra)


def must_export(directory: Path, *words: str) -> str:
    """`exported`, which must succeed; its output."""
    result = exported(directory, *words)
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module", params=FAMILIES)
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model of another tool, bf16 in several files: `llama` or `starcoder2`.

    The end-of-text token is 509. Llama has an added token that is no special one, 510; Starcoder2
    has none, a padding token, and a matrix with rows of 144 numbers.
    """
    family = request.param

    def make(directory: Path) -> None:
        shape = {} if family == "llama" else {"intermediate_size": 144}
        path = write_model(directory / family, family, initializer_range=0.1, **shape)
        path /= "tokenizer.json"
        content = json.loads(path.read_text("utf-8"))
        vocabulary, added = content["model"]["vocab"], content["added_tokens"]
        last = max(vocabulary, key=vocabulary.get)
        vocabulary[STOP], vocabulary[last] = vocabulary[last], vocabulary[STOP]
        added[0]["id"] = vocabulary[STOP]
        added.append({**added[0], "id": 510, "content": "<think>", "special": False})
        if family == "starcoder2":
            added.clear()
            config = json.loads(path.with_name("tokenizer_config.json").read_text())
            config["pad_token"] = "zq"
            path.with_name("tokenizer_config.json").write_text(json.dumps(config))
        path.write_text(json.dumps(content), encoding="utf-8")

    return made_once(tmp_path_factory, f"exported-{family}", make)


def family_of(directory: Path) -> str:
    """The name of the model in the fixture's directory."""
    return next(name for name in FAMILIES if (directory / name).is_dir())


# --- GGUF ----------------------------------------------------------------------------------------


def test_transformers_computes_the_same_from_gguf(foreign: Path, tmp_path: Path) -> None:
    """The names, the order of the rows and the shape, by a reader that nobody here wrote."""
    model = foreign / family_of(foreign)
    must_export(tmp_path, str(model), "--format", "gguf", "--dtype", "f32", "--output", "m.gguf")
    ids = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    ours = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", export.DTYPES)
def test_gguf_holds_the_weights(foreign: Path, tmp_path: Path, dtype: str) -> None:
    """Each tensor, read back by GGUF's own reader, with the precision of its dtype."""
    family = family_of(foreign)
    words = ["--format", "gguf", "--dtype", dtype, "--output", "m.gguf"]
    shown = must_export(tmp_path, str(foreign / family), *words)
    assert shown.startswith(f"wrote m.gguf (GGUF, {dtype}, ")
    assert shown.endswith(f" MB) from {foreign / family}\n")
    model = AutoModelForCausalLM.from_pretrained(foreign / family, dtype=torch.float32)
    expected = {name: p.detach().numpy() for name, p in model.named_parameters()}
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
    }
    assert len(found) == len(expected)
    pairs = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.2.attn_output.weight": "model.layers.2.self_attn.o_proj.weight",
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
        "blk.0.attn_k.weight": "model.layers.0.self_attn.k_proj.weight",
    }
    if family == "llama":
        pairs["output.weight"] = "lm_head.weight"  # untied
    else:
        pairs["blk.1.ffn_down.bias"] = "model.layers.1.mlp.c_proj.bias"
    tolerance = {"f32": 0.0, "f16": 1e-3, "bf16": 0.0, "q8_0": 0.01}[dtype]  # of the largest
    for theirs, ours in pairs.items():
        right = expected[ours]
        if family == "llama" and ours.endswith("k_proj.weight"):  # 2 heads of 16 rows
            order = [
                head * 16 + half * 8 + i for head in (0, 1) for i in range(8) for half in (0, 1)
            ]
            right = right[order]
        largest = np.abs(right).max()
        np.testing.assert_allclose(found[theirs], right, rtol=0, atol=tolerance * largest)
    kinds = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
    assert kinds["blk.0.ffn_up.weight"] == dtype
    assert kinds["blk.0.attn_norm.weight"] == "f32"
    if family == "starcoder2" and dtype == "q8_0":  # no blocks of 32
        assert kinds["blk.0.ffn_down.weight"] == "f16"


def fields(path: Path) -> dict[str, Any]:
    """The key-value pairs of a GGUF file."""
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_gguf_says_what_the_model_is(foreign: Path, tmp_path: Path) -> None:
    """Shape, rotary embedding, context, file type, tokens, types, merges, end, chat template."""
    family = family_of(foreign)
    words = ["--format", "gguf", "--dtype", "q8_0"]
    assert f"wrote {family}-q8_0.gguf (" in must_export(tmp_path, str(foreign / family), *words)
    found = fields(tmp_path / f"{family}-q8_0.gguf")
    config = json.loads((foreign / family / "config.json").read_text())
    tokenizer = json.loads((foreign / family / "tokenizer.json").read_text())
    assert found["general.architecture"] == family
    assert found["general.name"] == family
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    for theirs, ours in (
        ("context_length", "max_position_embeddings"), ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"), ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"), ("vocab_size", "vocab_size"),
        ("attention.head_count_kv", "num_key_value_heads"),
    ):  # fmt: skip
        assert found[f"{family}.{theirs}"] == config[ours], theirs
    heads = config["num_attention_heads"]
    assert found[f"{family}.rope.dimension_count"] == config["hidden_size"] // heads
    assert found[f"{family}.rope.freq_base"] == config["rope_parameters"]["rope_theta"]
    name, ours = (
        ("layer_norm_rms_epsilon", "rms_norm_eps") if family == "llama"
        else ("layer_norm_epsilon", "norm_epsilon")
    )  # fmt: skip
    assert found[f"{family}.attention.{name}"] == pytest.approx(config[ours])
    vocabulary = tokenizer["model"]["vocab"]
    tokens = found["tokenizer.ggml.tokens"]
    types = found["tokenizer.ggml.token_type"]
    assert {tokens[number]: number for number in range(510)} == vocabulary
    kinds = gguf.TokenType
    assert types[509] == kinds.CONTROL
    assert types[vocabulary["zq"]] == types[300] == kinds.NORMAL
    if family == "llama":
        assert (tokens[510], types[510]) == ("<think>", kinds.USER_DEFINED)
    unused = range(511 if family == "llama" else 510, 520)
    assert tokens[unused[0] :] == [f"[PAD{number}]" for number in unused]
    assert types[unused[0] :] == [kinds.UNUSED] * len(unused)
    merges = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    assert found["tokenizer.ggml.merges"] == merges
    ids = [found[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "padding", "bos")]
    pad = 509 if family == "llama" else vocabulary["zq"]
    assert ids == [509, pad, vocabulary["zq"]] and vocabulary[STOP] == 509
    for name in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        assert found[f"tokenizer.ggml.{name}"] is False
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.chat_template"] == TEMPLATE


def byte_level(*before: pre_tokenizers.PreTokenizer, **options: bool) -> Tokenizer:
    """A byte-level BPE with other steps before its own."""
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    text = (ROOT / "input.txt").read_text("utf-8")[:30_000] + " 2026 1984 12 345" * 20
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def smollm2_kind() -> Tokenizer:
    """A tokenizer of SmolLM2's kind: each digit is a token."""
    return byte_level(pre_tokenizers.Digits(individual_digits=True))


def with_model(**options: Any) -> Tokenizer:
    """A byte-level BPE whose tokenizer.json says other things of the model."""
    content = json.loads(byte_level().to_str())
    return Tokenizer.from_str(json.dumps({**content, "model": {**content["model"], **options}}))


def with_added(**options: bool) -> Tokenizer:
    """A byte-level BPE with an added token that takes more, or less, than itself."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("cat", **options)])
    return tokenizer


def without_a_byte() -> Tokenizer:
    """A byte-level BPE that has a token for a byte that it does not know."""
    content = json.loads(byte_level().to_str())
    content["model"]["unk_token"] = "<|pad|>"
    vocabulary = content["model"]["vocab"]
    vocabulary["\u0142\u0142"] = vocabulary.pop("\u0142")
    return Tokenizer.from_str(json.dumps(content))


def with_normalizer() -> Tokenizer:
    """A byte-level BPE of normalized texts."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def test_pre_tokenizers_of_llama_cpp(foreign: Path, tmp_path: Path) -> None:
    """Known by what tokenizer.json says, not by a hash."""
    model = shutil.copytree(foreign / family_of(foreign), tmp_path / "model")
    (model / "tokenizer_config.json").unlink()
    for tokenizer, name in ((byte_level(), "gpt-2"), (smollm2_kind(), "smollm")):
        tokenizer.save(str(model / "tokenizer.json"))
        must_export(tmp_path, "model", "--format", "GGUF", "--output", f"{name}.gguf")
        assert fields(tmp_path / f"{name}.gguf")["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: byte_level(add_prefix_space=True), "ByteLevel with add_prefix_space True"),
        (lambda: byte_level(use_regex=False), "ByteLevel with use_regex False"),
        (lambda: byte_level(pre_tokenizers.Digits(False)), "Digits with individual_digits False"),
        (lambda: byte_level(pre_tokenizers.Split("x", "isolated")), "Split, ByteLevel"),
        (lambda: byte_level(*[pre_tokenizers.Digits(True)] * 2), "Digits, Digits, ByteLevel"),
        (with_normalizer, "normalizer NFC"),
        (lambda: with_added(lstrip=True), "added token with lstrip True"),
        (lambda: with_added(rstrip=True), "added token with rstrip True"),
        (lambda: with_added(single_word=True), "added token with single_word True"),
        (without_a_byte, "BPE with unk_token, without an entry for each byte"),
        (lambda: with_model(ignore_merges=True), "BPE with ignore_merges True"),
        (lambda: with_model(byte_fallback=True), "BPE with byte_fallback True"),
        (lambda: with_model(end_of_word_suffix="</w>"), "BPE with end_of_word_suffix </w>"),
        (lambda: Tokenizer(models.BPE()), "no pre-tokenizer"),
        (lambda: Tokenizer(models.WordLevel({"a": 0}, "a")), "WordLevel; no pre-tokenizer"),
        (lambda: Tokenizer(models.Unigram([("a", 0.0)])), "Unigram; no pre-tokenizer"),
    ],
)
def test_other_tokenizers_are_refused_by_name(make: Callable[[], Tokenizer], reason: str) -> None:
    """llama.cpp would divide a text at other places."""
    with pytest.raises(InputError) as caught:
        export.pre_tokenizer(json.loads(make().to_str()), "its tokenizer.json")
    assert f"its tokenizer.json: is not written as GGUF here ({reason}); " in str(caught.value)


# --- a directory for the Hub ---------------------------------------------------------------------


def test_a_lean_directory_for_the_hub(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """bf16 weights, configuration, tokenizer and card: transformers' loss is within 0.01."""
    step = (finished_run(tmp_path_factory) / "run/checkpoints/latest").resolve()
    shown = must_export(tmp_path, str(step), "--format", "safetensors-bf16")
    made = tmp_path / f"{step.name}-bf16"
    assert shown.startswith(f"wrote {made.name} (safetensors, bf16, ")
    assert {path.name for path in made.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "README.md",
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == [made.name]
    modes = {path.stat().st_mode for path in made.iterdir()}
    assert len(modes) == 1, "safetensors makes files that nobody else can read"
    before, after = (load_file(path / "model.safetensors") for path in (step, made))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in before)
    assert AutoModelForCausalLM.from_pretrained(made).dtype == torch.bfloat16
    text = (ROOT / "input.txt").read_text("utf-8")[:10_000]
    tokens = np.array(AutoTokenizer.from_pretrained(made)(text).input_ids)
    assert loss_of(made, tokens) == pytest.approx(loss_of(step, tokens), abs=0.01)
    words = ["generate.py", "--checkpoint", made.name, "--prompt", "The sea", "--num_samples", "1"]
    result = call(tmp_path, [sys.executable, str(ROOT / words[0]), *words[1:]])
    assert result.returncode == 0, result.stdout


def test_what_another_tool_says_stays(foreign: Path, tmp_path: Path) -> None:
    """The chat template, the end-of-text token, a dtype under its older name."""
    model = shutil.copytree(foreign / family_of(foreign), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (model / "config.json").write_text(json.dumps({**config, "mine": 1}))
    must_export(tmp_path, "model", "--format", "safetensors-bf16", "--output", "made")
    found = json.loads((tmp_path / "made/config.json").read_text())
    assert found.pop("dtype") == "bfloat16"
    assert found == {**{k: v for k, v in config.items() if k != "torch_dtype"}, "mine": 1}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "made" / name).read_bytes() == (model / name).read_bytes()


# --- errors --------------------------------------------------------------------------------------


def test_errors_of_an_export(foreign: Path, tmp_path: Path) -> None:
    """Each says what to do, and nothing is written or overwritten."""
    model = str(foreign / family_of(foreign))
    (tmp_path / "there.gguf").write_text("mine")
    (tmp_path / "there").mkdir()
    (tmp_path / "dangling").symlink_to("nothing")
    shim = tmp_path / "shim"
    shim.mkdir()
    missing = "raise ModuleNotFoundError(\"No module named 'gguf'\", name='gguf')\n"
    (shim / "gguf.py").write_text(missing)
    before = sorted(tmp_path.rglob("*"))
    gguf_words = [model, "--format", "gguf"]
    for code, words, line, extra in (
        (2, [*gguf_words, "--output", "there.gguf"], "there.gguf: exists already; name", {}),
        (2, [*gguf_words, "--output", "dangling"], "dangling: exists already; name another", {}),
        (2, [model, "--format", "safetensors-bf16", "--output", "there"], "there: exists", {}),
        (2, [model, "--format", "safetensors-bf16", "--output", "x.gguf"], "as a directory", {}),
        (2, [*gguf_words, "--output", "-x.gguf"], "is written --output=-x.gguf", {}),
        (3, [*gguf_words, "--output", "x" * 300], f"{'x' * 300}: File name too long", {}),
        (3, [*gguf_words, "--output", "no/x.gguf"], "no/x.gguf: no is no directory that can", {}),
        (2, [*gguf_words, "--dtype", "f64"], "argument --dtype: invalid choice: 'f64'", {}),
        (2, [model], "the following arguments are required: --format", {}),
        (2, [model, "--format", "safetensors-bf16", "--dtype", "f16"], "--dtype goes with", {}),
        (3, ["nothing", "--format", "gguf"], "nothing: there is no such checkpoint", {}),
        (2, gguf_words, "pip install -r requirements-export.txt", {"PYTHONPATH": str(shim)}),
    ):  # fmt: skip
        result = exported(tmp_path, *words, fork="PYTHONPATH" not in extra, **extra)
        assert result.returncode == code, result.stdout
        assert result.stdout.startswith("error: ") and line in result.stdout
        assert result.stdout.count("\n") == 1
    left = sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts)
    assert left == before


def test_a_target_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    """And one that has no room is refused; nothing else is left."""
    output = tmp_path / "m.gguf"
    with pytest.raises(ConfigError, match="exists already"), export.published(output, 10) as path:
        path.write_text("ours")
        output.write_text("mine")
    assert output.read_text() == "mine"
    with (
        pytest.raises(ResourceError, match="bytes are needed"),
        export.published(tmp_path / "n.gguf", 1 << 60),
    ):
        pass
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("form", ["gguf", "safetensors-bf16"])
def test_an_export_that_is_interrupted_leaves_nothing(
    foreign: Path, tmp_path: Path, form: str
) -> None:
    """SIGTERM, Ctrl-C, and a disk that is full half-way."""
    words = [str(foreign / family_of(foreign)), "--format", form, "--output", "made"]
    for fault, code in (("term", 143), ("int", 130)):
        result = exported(tmp_path, *words, FAULT=f"export.written:{fault}:1")
        assert result.returncode == code, result.stdout
    script = [sys.executable, str(ROOT / "checkpoint.py"), "export", *words]
    full = call(tmp_path, ["bash", "-c", 'ulimit -f 64; "$0" "$@"', *script])
    assert full.returncode == 3, full.stdout
    assert full.stdout.startswith("error: made: ") and "bytes are needed" in full.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (5, "its chat_template is no text"),
        (["a"], "its chat_template is malformed"),
        ([{"name": "rag"}], "its chat_template is malformed"),
        ("\ud800", "surrogates not allowed"),
        ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], "d"),
        ({"default": "d", "rag": "r"}, "d"),
    ],
)
def test_chat_templates(foreign: Path, tmp_path: Path, template: object, line: str) -> None:
    """The default one of several; one that is none is named."""
    model = shutil.copytree(foreign / family_of(foreign), tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**config, "chat_template": template}))
    result = exported(tmp_path, "model", "--format", "gguf", "--output", "m.gguf")
    if line != "d":
        assert result.returncode == 3 and line in result.stdout, result.stdout
        return
    assert fields(tmp_path / "m.gguf")["tokenizer.chat_template"] == line


def test_a_damaged_checkpoint_is_not_exported(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """It is named, and so is a number that the dtype cannot hold."""
    step = (finished_run(tmp_path_factory) / "run/checkpoints/latest").resolve()
    damaged = shutil.copytree(step, tmp_path / "step_000012")
    with open(damaged / "model.safetensors", "r+b") as file:
        file.seek(3000)
        file.write(b"\xff")
    for form in ("gguf", "safetensors-bf16"):
        result = exported(tmp_path, "step_000012", "--format", form)
        assert result.returncode == 3
        assert "step_000012: damaged: model.safetensors does not have the sha256" in result.stdout
    shutil.rmtree(damaged)
    made = tmp_path / "large"
    must_export(tmp_path, str(step), "--format", "safetensors-bf16", "--output", "large")
    weights = load_file(made / "model.safetensors")
    weights["model.layers.1.mlp.c_fc.weight"][3, 5] = -70_000.0
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    result = exported(tmp_path, "large", "--format", "gguf", "--output", "x.gguf")
    assert result.returncode == 3
    line = "large: model.layers.1.mlp.c_fc.weight holds 70144, and f16 ends at 65504; bf16 and f32"
    assert line in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["large"], "a part was left"
    must_export(tmp_path, "large", "--format", "gguf", "--dtype", "bf16", "--output", "x.gguf")
    for value, dtype, *words in (
        (1e7, "q8_0", "gguf", "--dtype", "q8_0"),
        (3.4e38, "bf16", "gguf", "--dtype", "bf16"),
        (3.4e38, "bf16", "safetensors-bf16"),
        (1e300, "f32", "gguf", "--dtype", "f32"),
    ):
        weights = {name: tensor.double() for name, tensor in weights.items()}
        weights["model.layers.1.mlp.c_fc.weight"][3, 5] = value
        save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
        result = exported(tmp_path, "large", "--format", *words, "--output", "y")
        assert result.returncode == 3
        assert f"holds {value:g}, and {dtype} ends at" in result.stdout


# --- llama.cpp -----------------------------------------------------------------------------------

TEXTS = (  # what tokenizers divide: digits, short forms, capitals, spaces, other scripts
    "The sea was calm in the year 1984, and 27 small boats lay at the old stone pier until noon.",
    "It's what they've said, isn't it: we'll see \u4e2d\u6587 and a caf\u00e9 \U0001f600 on a day.",
    "    def answer(self):  # forty-two\n        return 6 * 7 + len(names) - 12345.678 // 9\n\n\n",
)
PROMPTS = (
    "The sea was calm in",
    "It's what they've said, isn't it: we'll",
    "    def answer(self):",
)
NODE_LLAMA_CPP = "3.22.1"  # of npm: a llama.cpp that is built already


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with continue.mjs and what it needs."""
    if not shutil.which("npm"):
        pytest.skip("there is no npm, which brings llama.cpp")
    machine = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    packages = ("node-llama-cpp", f"@node-llama-cpp/linux-{machine}")

    def make(directory: Path) -> None:
        directory.mkdir()
        shutil.copy(Path(__file__).with_name("continue.mjs"), directory)
        words = ["npm", "install", "--no-audit", "--no-fund", "--omit=optional"]
        result = call(directory, [*words, *(f"{p}@{NODE_LLAMA_CPP}" for p in packages)], 300)
        assert result.returncode == 0, result.stdout

    return made_once(tmp_path_factory, "node-llama-cpp", make)


def tokenizer_words(kind: str, directory: Path) -> list[str]:
    """The words that give a run a tokenizer: learned, GPT-2's, or one of SmolLM2's kind."""
    if kind == "learned":
        return []
    if kind == "gpt2":
        if not GPT2.is_file():
            pytest.skip(f"{GPT2} is not there")
        return [f"tokenizer.source={GPT2}", "model.vocab_size=50257"]
    smollm2_kind().save(str(directory / "tokenizer.json"))
    return ["tokenizer.source=tokenizer.json"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["learned", "gpt2", "SmolLM2's kind"])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_goes_on_word_for_word(
    llama_cpp: Path, tmp_path: Path, family: str, kind: str
) -> None:
    """20 tokens after each of three prompts are those of generate.py at temperature 0.

    The model knows its text by heart, so that rounding decides nothing.
    """
    write_tiny(tmp_path)
    text = "<|endoftext|>\n".join(f"{line}\n" for line in TEXTS * 20)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    result = train(
        tmp_path, f"model.architecture={family}", "model.num_key_value_heads=1",
        "model.rope_theta=50000", "model.max_position_embeddings=160", "data.sequence_length=128",
        "training.learning_rate=5e-3", "--train_steps", "150", "training.save_steps=999",
        "generation.max_length=64",
        *tokenizer_words(kind, tmp_path), timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    checkpoint = "run/checkpoints/latest"
    must_export(tmp_path, checkpoint, "--format", "gguf", "--dtype", "f32", "--output", "m.gguf")
    words = ["node", "continue.mjs", str(tmp_path / "m.gguf"), "20", *PROMPTS]
    theirs = call(llama_cpp, words, 300)
    assert theirs.returncode == 0, theirs.stdout
    tokenizer = Tokenizer.from_file(str(tmp_path / checkpoint / "tokenizer.json"))
    found = [json.loads(line) for line in theirs.stdout.splitlines() if line.startswith("{")]
    for text, prompt, continued in zip(TEXTS, PROMPTS, found, strict=True):
        ids = tokenizer.encode(prompt).ids
        assert continued["prompt"] == ids
        words = ["--prompt", prompt, "--max_length", str(len(ids) + 20), "--temperature", "0"]
        words += ["--checkpoint", checkpoint, "--num_samples", "1", "--json"]
        ours = call(tmp_path, [sys.executable, str(ROOT / "generate.py"), *words])
        ours = json.loads(ours.stdout.splitlines()[0])["text"]
        assert prompt + continued["text"] == ours
        assert text.startswith(ours[: len(prompt) + 10]), "it was not learned"
