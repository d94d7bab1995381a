"""The report of the papers' tables, drawn from a small result; the measurements themselves are `evaluate`'s and `bench`'s."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import reproduce


@pytest.fixture
def result():
    """A result with every row that the plans ask for; the figures are made up."""

    def row(name, number):
        made = {"row": name, "wer": 0.05 + number / 100, "wer_interval": (0.04, 0.2), "cer": 0.03, "similarity": 0.95}
        if name.startswith("swapped"):
            return made | {"group_size": 4.5, "swapped": 0.75}
        return made | ({} if name == "recordings" else {"speed_up": 1 + number / 10, "tokens_per_round": 1 + number / 5})

    quality = {}
    for kind, plan in reproduce.plans(quick=True).items():
        names = ["recordings", *plan.settings(), *(f"swapped in group {threshold:g}" for threshold in plan.thresholds)]
        asked = {"sentences": 24, "seeds": 1, "recognizer": "moonshine", "jax": "0", "python": "3", "device": "cpu"}
        quality[kind] = {"rows": [row(name, i) for i, name in enumerate(names)], **asked}
    lengths = (0, *reproduce.LENGTHS)
    cases = [{"rule": rule, "draft_length": k, "speed_up": 1.25} for rule in ("exact", "coarse-grained") for k in lengths]
    return {"quality": quality, "speed": {"rows": cases, "commit": "abc", "processor": "a processor"}}


def test_the_report_has_every_table_and_the_picture(result, tmp_path, monkeypatch):
    (tmp_path / "papers.json").write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--quick", "--render", "--out", str(tmp_path)])
    reproduce.main()
    text = (tmp_path / "papers.md").read_text()
    assert text.count("## ") == 5
    assert "commit abc" in text
    for name in (
        "| autoregressive |",
        "| tolerance 0.3 |",
        "| coarse-grained 0.85 |",
        "| block-exact |",
        "| 4.5 | 75.0% |",
        "1.25",
    ):
        assert name in text
    assert (tmp_path / "papers.png").stat().st_size > 10_000


def test_a_size_must_be_chosen(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reproduce.py"])
    with pytest.raises(SystemExit) as stopped:
        reproduce.main()
    assert stopped.value.code == 2
