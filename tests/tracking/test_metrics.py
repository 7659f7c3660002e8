"""metrics.jsonl, the rotating log, plots and the words of the console."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from smollm.tracking import plots, tracker
from smollm.tracking.metrics import Metrics, write_samples


def metrics(path: Path, step: int, run_id: str = "abc") -> tuple[Metrics, list[str]]:
    """Open metrics.jsonl as a run resumed at `step` does, with what it logged."""
    said: list[str] = []
    return Metrics(path, step, run_id, said.append), said


def steps(path: Path) -> list[int]:
    """The steps in a metrics.jsonl, in order."""
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_each_step_stands_once_after_resumes(tmp_path: Path) -> None:
    """Lines after the resumed step are cut back, and the run writes them again."""
    path = tmp_path / "metrics.jsonl"
    first, _ = metrics(path, 0)
    for step in range(1, 8):
        first.append({"event": "train", "step": step})
    second, said = metrics(path, 4)
    for step in range(5, 9):
        second.append({"event": "train", "step": step})
    assert steps(path) == list(range(1, 9)) and said == []
    assert [event["step"] for event in second.events()] == list(range(1, 9))


def test_a_torn_last_line_is_dropped_and_named(tmp_path: Path) -> None:
    """What a kill in the middle of a write leaves."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "train", "step": 1}\n{"event": "train", "st\xff')
    _, said = metrics(path, 3)
    assert steps(path) == [1]
    assert len(said) == 1 and "torn" in said[0]


def test_a_fresh_run_sets_the_older_file_aside(tmp_path: Path) -> None:
    """Nothing on disk is lost: metrics.jsonl.1, .2, ..."""
    path = tmp_path / "metrics.jsonl"
    for number in range(3):
        metrics(path, 0)[0].append({"event": "train", "step": number})
    assert steps(path) == [2]
    assert steps(path.with_name("metrics.jsonl.1")) == [0]
    assert steps(path.with_name("metrics.jsonl.2")) == [1]


def test_the_log_rotates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """phase1.log is cut at its limit, and the newest files are kept."""
    monkeypatch.setattr(tracker, "LOG_BYTES", 2000)
    logger = tracker.start_logging(tmp_path, phase=1)
    for number in range(500):
        logger.info("line %d of a log that is long enough to rotate", number)
    logging.getLogger("run").handlers[1].close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["phase1.log"] + [f"phase1.log.{n}" for n in range(1, 6)]
    assert all(path.stat().st_size <= 2000 for path in tmp_path.iterdir())
    assert "line 499" in (tmp_path / "phase1.log").read_text()


def test_words_for_numbers() -> None:
    """Counts and durations as people read them."""
    assert [tracker.human(x) for x in (5, 999, 48_300, 1_240_000, 9.83e9, 2.1e12)] == [
        "5", "999", "48.3k", "1.24M", "9.83B", "2.1e+03B",
    ]  # fmt: skip
    assert [tracker.duration(x) for x in (44.6, 200, 7500)] == ["45 s", "3 min 20 s", "2 h 05 min"]


def test_plots_of_nothing_and_of_something(tmp_path: Path) -> None:
    """The plots need no particular event; more events change the pictures."""
    empty = [path.read_bytes() for path in plots.draw([], tmp_path)]
    events = [
        {"event": "train", "step": 1, "loss": 3.0, "learning_rate": 1e-4},
        {"event": "train", "step": 2, "loss": 2.0, "learning_rate": 2e-4},
        {"event": "eval", "step": 2, "val_loss": 2.5},
        {"event": "gradients", "step": 1, "norms": {"embed_tokens": 1.0, "norm": 0.1}},
        {"event": "gradients", "step": 2, "norms": {"embed_tokens": 2.0, "norm": 0.3}},
        {"event": "sample", "step": 2, "generated_tokens": 9, "perplexity": 4.0, "text": "Abc"},
    ]
    full = [path.read_bytes() for path in plots.draw(events, tmp_path)]
    assert len(full) == 4 and all(a != b for a, b in zip(empty, full, strict=True))
    write_samples(events[-1:], tmp_path / "samples.txt")
    assert "Abc" in (tmp_path / "samples.txt").read_text()


def test_line_separators_within_a_text_are_no_line_ends(tmp_path: Path) -> None:
    """U+2028, U+0085 and the like come with texts from the web; a resume keeps their lines."""
    path = tmp_path / "metrics.jsonl"
    first, _ = metrics(path, 0)
    for step in (1, 2):
        first.append({"event": "sample", "step": step, "text": "a\u2028b\u0085c\x1cd"})
    again, said = metrics(path, 2)
    assert said == [] and again.events() == first.events()
    assert len(path.read_bytes().splitlines()) == 2


def test_lines_that_are_no_events_are_dropped_and_named(tmp_path: Path) -> None:
    """Half a line, and JSON that is not ours."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "train", "step": 1}\n{"step": 1}\n[]\n{"event": "tr')
    again, said = metrics(path, 1)
    assert [event["event"] for event in again.events()] == ["train"]
    assert len(said) == 3 and all("was dropped" in line for line in said)


def test_a_directory_that_takes_the_place_gets_nothing(tmp_path: Path) -> None:
    """Between the check and the write: the lines go on in the directory that was moved."""
    place, moved = tmp_path / "logs", tmp_path / "moved"
    place.mkdir()
    ours, _ = metrics(place / "metrics.jsonl", 0)
    place.rename(moved)
    place.mkdir()
    ours.append({"event": "train", "step": 1})
    assert list(place.iterdir()) == []
    assert '"step": 1' in (moved / "metrics.jsonl").read_text("utf-8")
