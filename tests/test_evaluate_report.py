"""The comparison as a table, as JSON and as a picture."""

import json

from jaxspec.evaluate import report

ROWS = [
    {"row": "recordings", "wer": 0.1, "wer_interval": (0.08, 0.12), "cer": 0.05, "similarity": 0.9},
    {"row": "autoregressive", "wer": 0.2, "wer_interval": (0.17, 0.22), "cer": 0.1, "speed_up": 1.0, "tokens_per_round": 1.0},
    {"row": "exact", "wer": 0.2, "wer_interval": (0.17, 0.22), "cer": 0.1, "speed_up": 1.25, "tokens_per_round": 1.8},
]


def test_the_table_has_a_line_a_row_and_leaves_open_what_was_not_measured():
    lines = report.markdown(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert len({line.count("|") for line in lines}) == 1
    assert "| recordings | 10.0% | 8.0% to 12.0% | 5.0% | 0.900 |" in lines[2]
    assert lines[4].endswith("| 1.25x |")


def test_files_are_written_together(tmp_path):
    report.save(tmp_path / "out", {"rows": ROWS, "seeds": 3})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["evaluation.json", "evaluation.md", "evaluation.png"]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["seeds"] == 3
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
