"""benchmark.py by its command line: figures are there and sensible; none is held to a speed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

import benchmark
from smollm.errors import ConfigError, UserError
from smollm.signals import StopSignals

SIDES = {
    "tokenize": ["ours", "encode_batch"],
    "train": ["ours", "transformers"],
    "checkpoint": ["ours"],
    "resume": ["ours"],
    "generate": ["ours", "transformers"],
}


def call(directory: Path, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """benchmark.py on the tiny model, as a person runs it."""
    fixed = ["--config", "tiny.yaml", "--input_file", "text.txt", "--rounds", "1", "--warmup", "1"]
    script = str(helpers.ROOT / "benchmark.py")
    return helpers.call(directory, [sys.executable, script, *fixed, *words], **extra)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Everything measured once: (directory, JSON, what was printed)."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def make(directory: Path) -> None:
        helpers.write_tiny(directory)
        done = call(
            directory, "--steps", "3", "--text_mb", "1", "--peer", "transformers", "--json",
            "all.json", "data.sequence_length=32",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        (directory / "printed").write_text(done.stdout, "utf-8")

    directory = helpers.made_once(tmp_path_factory, "benchmark", make)
    result, printed = ((directory / name).read_text("utf-8") for name in ("all.json", "printed"))
    return directory, json.loads(result), printed


@pytest.mark.long
def test_every_measurement_has_every_side(measured):
    _, result, _ = measured
    for name, sides in SIDES.items():
        assert [side for side in result[name] if side != "ratios"] == sides
        for side in sides:
            found = result[name][side]
            assert len(found["rounds"]) == 1
            raw = found["rounds"][0]["seconds"]
            assert raw and all(isinstance(x, float) and x > 0 for x in raw)
            low, middle, high = (found[f"{x}seconds"] for x in ("minimum_", "", "maximum_"))
            assert 0 < low <= middle <= high
            assert found["interquartile_seconds"] >= 0


def test_training_figures(measured):
    _, result, _ = measured
    for side in SIDES["train"]:
        found = result["train"][side]
        assert len(found["rounds"][0]["seconds"]) == 3  # --steps, without the warm-up
        assert found["tokens_per_second"] == pytest.approx(2 * 2 * 32 / found["seconds"])
        assert found["peak_memory_gib"] > 0.05
        assert found["time_to_first_step_seconds"] > found["minimum_seconds"]
        assert found["mfu_half"] is None and found["mfu_full"] is None  # of a CPU: not known
        assert found["micro_batch"] == 2
    ours = result["train"]["ours"]
    assert 0 < ours["data_wait_share"] < 1
    # Random tokens, a fresh model: both sides start near ln 512 = 6.24.
    assert ours["rounds"][0]["last_loss"] == pytest.approx(6.24, abs=0.3)
    peer = result["train"]["transformers"]["rounds"][0]
    assert peer["mean_loss"] == pytest.approx(6.24, abs=0.3)
    assert "fused" in peer["optimizer"].lower()


def test_ratios_are_of_the_medians(measured):
    _, result, _ = measured
    for name, sides in SIDES.items():
        assert list(result[name]["ratios"]) == sides[1:]
        for peer, ratio in result[name]["ratios"].items():
            expected = result[name][peer]["seconds"] / result[name]["ours"]["seconds"]
            assert ratio["of_medians"] == pytest.approx(expected)
            assert ratio["per_round"] == pytest.approx([expected])  # there is one round


def test_checkpoint_and_resume_figures(measured):
    _, result, _ = measured
    saved, resumed = result["checkpoint"]["ours"], result["resume"]["ours"]
    assert 0 < saved["stall_seconds"] <= saved["seconds"]
    assert isinstance(saved["lost_seconds"], float)
    assert saved["bytes"] > 12 * result["machine"]["parameters"]
    assert resumed["verify_seconds"] + resumed["load_seconds"] == pytest.approx(resumed["seconds"])
    assert resumed["first_step_seconds"] > 0


def test_tokenizing_and_generating_the_same_amount(measured):
    _, result, _ = measured
    sides = [result["tokenize"][side] for side in SIDES["tokenize"]]
    assert sides[0]["mb"] == sides[1]["mb"] >= 1
    assert all(side["mb_per_second"] > 0 and side["peak_memory_gib"] > 0 for side in sides)
    # encode_batch is given the text between the separators, ours has a token for each of these.
    assert 0 < sides[0]["tokens"] - sides[1]["tokens"] < 0.02 * sides[0]["tokens"]
    for side in SIDES["generate"]:
        assert result["generate"][side]["tokens"] == 3 * (64 - 8)  # as many as the model has room
        assert result["generate"][side]["tokens_per_second"] > 0


def test_the_json_says_what_was_measured_where(measured):
    _, result, _ = measured
    assert result["command"].startswith("python benchmark.py --config tiny.yaml")
    assert result["config"]["data"]["sequence_length"] == 32
    assert result["settings"] == {"steps": 3, "warmup": 1, "rounds": 1, "text_mb": 1} | {
        "same_environment": False
    }
    assert result["environment"]["OMP_NUM_THREADS"] == "1"
    machine = result["machine"]
    assert {"torch", "python", "cuda", "cudnn", "transformers"} <= machine["versions"].keys()
    assert machine["device"] and machine["attention"] and machine["parameters"] > 0
    assert machine["flops_per_token_full"] > machine["flops_per_token_half"] > 0


def test_peers_run_without_our_allocator_settings_unless_told(monkeypatch, tmp_path):
    seen = {}

    def run(command, env, **_):
        seen[command[command.index("--worker") + 1]] = env
        (tmp_path / "answer.json").write_text("{}")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("MALLOC_TOP_PAD_", "7")
    for words, expected in (([], None), (["--same_environment"], "7")):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
        for name in ("train ours", "train transformers"):
            benchmark._work(name, tmp_path)
        assert seen["train ours"]["MALLOC_TOP_PAD_"] == "7"
        assert seen["train transformers"].get("MALLOC_TOP_PAD_") == expected


def test_the_table_is_printed_and_nothing_is_left(measured):
    directory, _, printed = measured
    for text in ("tokens/s (median step)", "x transformers (rounds:", "the loop waits", "MB/s"):
        assert text in printed
    assert "Traceback" not in printed
    assert not list((directory / "cache").glob("benchmark-*"))
    assert not helpers.left_overs(directory)


def test_a_failing_measurement_is_one_line_and_keeps_the_others(tmp_path):
    helpers.write_tiny(tmp_path)
    left = tmp_path / "cache/benchmark-999999999-x"  # of a benchmark that was killed
    (left / "scratch").mkdir(parents=True)
    words = ("--only", "tokenize", "--json", "part.json", "tokenizer.source=nowhere.json")
    done = call(tmp_path, *words)
    assert done.returncode == 3
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "nowhere.json" in errors[0]
    assert "machine" in json.loads((tmp_path / "part.json").read_text("utf-8"))
    assert not list((tmp_path / "cache").glob("benchmark-*"))


# --- without starting processes ------------------------------------------------------------------


def start(monkeypatch, tmp_path, *words: str) -> None:
    """main() in this process, up to where the first worker would be started."""

    def no_worker(*_):
        raise AssertionError("a worker was started")

    helpers.write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StopSignals, "__enter__", lambda self: self)
    monkeypatch.setattr(benchmark, "_work", no_worker)
    fixed = ["--config", "tiny.yaml", "--input_file", "text.txt"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *fixed, *words])
    benchmark.main()


@pytest.mark.parametrize(
    "words, named",
    [
        (("--peer", "megatron"), "megatron"),
        (("--only", "train,speed"), "speed"),
        (("--steps", "0"), "--steps"),
        (("--faster",), "--faster"),
    ],
)
def test_wrong_usage_exits_2(monkeypatch, tmp_path, words, named):
    with pytest.raises(UserError) as stopped:
        start(monkeypatch, tmp_path, *words)
    assert stopped.value.exit_code == 2 and named in str(stopped.value)


@pytest.mark.parametrize(
    "words, kind, code, named",
    [
        (("training.batch_sise=2",), ConfigError, 2, "batch_size"),
        (("--config", "none.yaml"), ConfigError, 2, "none.yaml"),
        (("--json", "no/where.json"), ConfigError, 2, "no/where.json"),
        (("--json", "."), ConfigError, 2, "is a directory"),
        (("--input_file", "none.txt"), UserError, 3, "none.txt"),
        (("--peer", "transformers", "training.optimizer=muon"), ConfigError, 2, "with AdamW"),
    ],
)
def test_what_cannot_work_is_said_before_measuring(monkeypatch, tmp_path, words, kind, code, named):
    with pytest.raises(kind, match=named) as raised:
        start(monkeypatch, tmp_path, *words)
    assert raised.value.exit_code == code


def test_a_peer_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as raised:
        start(monkeypatch, tmp_path, "--peer", "transformers")
    assert raised.value.exit_code == 2
    message = str(raised.value)
    assert "transformers" in message and "pip install" in message and "\n" not in message


def test_torchrun_is_refused(monkeypatch, tmp_path):
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "a", "MASTER_PORT": 1}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match="torchrun"):
        start(monkeypatch, tmp_path)


def test_rounds_take_turns_and_ratios_by_hand(monkeypatch, tmp_path):
    answers = {
        "train ours": [{"seconds": [1.0, 2.0]}, {"seconds": [2.0, 3.0]}],
        "train transformers": [{"seconds": [3.0, 3.0]}, {"seconds": [5.0, 5.0]}],
    }
    order = []

    def work(name, scratch):
        order.append(name)
        return answers[name].pop(0)

    monkeypatch.setattr(benchmark, "_work", work)
    section = benchmark._take_turns("train", ["ours", "transformers"], tmp_path, 2)
    assert order == ["train ours", "train transformers"] * 2
    assert section["ours"]["seconds"] == 2.0
    assert section["ours"]["interquartile_seconds"] == pytest.approx(0.5)  # of 1, 2, 2, 3
    assert section["ratios"]["transformers"]["of_medians"] == 2.0  # 4 / 2
    assert section["ratios"]["transformers"]["per_round"] == [2.0, 2.0]  # 3 / 1.5, 5 / 2.5
