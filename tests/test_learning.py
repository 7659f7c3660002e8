"""benchmarks/learning.py: its published tables, a comparison run here, and the large text."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import ROOT, call, write_tiny

sys.path.insert(0, str(ROOT / "benchmarks"))
import debian_text
import learning

from smollm.errors import UserError


def run(directory: Path, *words: str, **extra: str):
    """Run benchmarks/learning.py as a user does."""
    return call(directory, [sys.executable, str(ROOT / "benchmarks/learning.py"), *words], **extra)


@pytest.mark.parametrize("name", ["learning_input", "learning_large"])
def test_the_published_tables_are_those_of_the_raw_results(tmp_path: Path, name: str) -> None:
    """The committed results give the tables of docs/learning.md, and a figure; all are there."""
    document = json.loads((ROOT / f"benchmarks/{name}.json").read_text("utf-8"))
    runs = document.pop("runs")
    study = learning.Study(
        tmp_path / name, Path(), Path(), [], document["steps"], document,
        changes=name == "learning_input", runs=dict(runs),
    )  # fmt: skip
    rates = learning.compare(study)
    assert study.runs == runs  # nothing had to be trained
    page = (ROOT / "docs/learning.md").read_text("utf-8")
    rows = [line for line in learning.tables(study, rates).splitlines() if line[:2] == "| "]
    assert len(rows) >= 7
    for row in rows:
        assert row in page, row
    assert learning.draw(study, rates).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_one_comparison_goes_on_where_it_was(tmp_path: Path) -> None:
    """--quick on a tiny model: losses of four runs, kept; the same command trains nothing again."""
    write_tiny(tmp_path)
    words = (
        "--quick", "--config", "tiny.yaml", "--text", "text.txt", "--jobs", "2",
        "training.train_steps=10", "training.batch_size=2",
    )  # fmt: skip
    first = run(tmp_path, *words)
    assert first.returncode == 0, first.stdout
    document = json.loads((tmp_path / "learning.json").read_text())
    assert sorted(key.split("steps=")[1] for key in document["runs"]) == [
        "10 seed=42", "10 seed=42", "4 seed=42", "6 seed=42",
    ]  # fmt: skip
    again = run(tmp_path, *words)
    assert "val_loss 6" not in again.stdout and again.stdout in first.stdout


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["training.batch_sise=4"], 2, "batch_size"),
        (["training.optimizer=adamw"], 2, "training.optimizer: set by the recipes"),
        (["training.batch_size=4"], 2, "learning.json: holds runs with other settings"),
        (["--output", "broken"], 2, "broken.json: is not of this program"),
        (["--output", "no/where"], 2, "no is no directory"),
        (["--text", "none.txt"], 3, "none.txt: No such file"),
        (["--jobs", "0"], 2, "a whole number"),
    ],
)
def test_wrong_usage_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, named: str
) -> None:
    """Before anything is trained."""
    write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "learning.json").write_text(
        json.dumps({"settings": {}, "text_sha256": "", "steps": 1, "runs": {}})
    )
    base = ["--quick", "--config", "tiny.yaml", "--text", "text.txt"]
    with pytest.raises(UserError, match=named) as raised:
        learning.main([*base, *words])
    assert raised.value.exit_code == code and "\n" not in str(raised.value)


def test_what_finished_is_kept_when_a_run_fails(tmp_path: Path) -> None:
    """The second run fails: the first is in the file, those that wait never begin."""
    write_tiny(tmp_path)
    study = learning.Study(
        tmp_path / "s", tmp_path / "tiny.yaml", tmp_path / "text.txt",
        [f"data.cache_dir={tmp_path}/cache"], 2, {}, jobs=1,
    )  # fmt: skip
    good = {"training.optimizer": "muon"}
    with pytest.raises(UserError, match="no_such"):
        bad = ({"training.optimizer": "no_such"}, 2, 2)
        study.results([(good, 2, 1), bad, (good, 2, 3), (good, 2, 4)])
    kept = json.loads((tmp_path / "s.json").read_text())["runs"]
    assert learning.key_of(good, 2, 1) in kept
    assert learning.key_of(good, 2, 4) not in kept


def test_the_text_has_no_html() -> None:
    """Scripts, navigation and tags go; entities, paragraphs and preformatted lines stay."""
    page = """<html><head><title>T</title><style>p {}</style></head><body>
    <div role="navigation"><p>Next</p><br></div><h1>Title<a class="headerlink" href="#">¶</a></h1>
    <p>One &amp; <b>two</b>,
       three.<p>Four<pre>a = 1
    b &lt; 2</pre><script>f()</script><ul><li>x<li>y</ul></body></html>"""
    assert debian_text.strip_html(page).split("\n") == [
        "Title", "", "One & two, three.", "Four", "a = 1", "    b < 2", "", "x", "y",
    ]  # fmt: skip
