"""The report of an evaluation: table, JSON and picture."""

import io
import json

import pytest
from rich.console import Console

from jaxspec.evaluate import report

ROWS = [
    {"row": "recordings", "wer": 0.1, "wer_interval": (0.08, 0.12), "cer": 0.05, "similarity": 0.9, "dnsmos": 3.125},
    {"row": "autoregressive", "wer": 0.2, "wer_interval": (0.17, 0.22), "cer": 0.1, "speed_up": 1.0, "tokens_per_round": 1.0},
    {"row": "exact", "wer": 0.2, "wer_interval": (0.17, 0.22), "cer": 0.1, "speed_up": 1.25, "tokens_per_round": 1.8},
]


def test_the_table_has_a_line_for_each_row_and_empty_cells_for_absent_values():
    lines = report.markdown(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert len({line.count("|") for line in lines}) == 1
    assert "| recordings | 10.0% | 8.0% to 12.0% | 5.0% | 0.900 | 3.12 |  |" in lines[2]
    assert lines[4].endswith("| 1.25x |")


def test_a_column_without_a_value_is_left_out():
    older = [{name: value for name, value in row.items() if name != "dnsmos"} for row in ROWS]
    assert "DNSMOS" in report.markdown(ROWS)
    assert "MOS" not in report.markdown(older)
    assert "| 0.900 |  |" in report.markdown(older)
    assert report.table(ROWS)["speedup"] == ["", "1.00x", "1.25x"]


def test_the_terminal_shows_the_same_table():
    text = io.StringIO()
    report.show(ROWS, Console(file=text, width=240))
    lines = text.getvalue().splitlines()
    assert any("speaker similarity" in line for line in lines)
    assert any("exact" in line and "1.25x" in line for line in lines)


def test_the_report_is_three_files(tmp_path):
    report.save(tmp_path / "out", {"rows": ROWS, "seeds": 3})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["evaluation.json", "evaluation.md", "evaluation.png"]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["seeds"] == 3
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_and_the_picture_are_rendered_from_the_json_alone(tmp_path):
    report.save(tmp_path, {"rows": ROWS})
    before = (tmp_path / "evaluation.md").read_text()
    for name in ("evaluation.md", "evaluation.png"):
        (tmp_path / name).unlink()
    report.render(tmp_path)
    assert (tmp_path / "evaluation.md").read_text() == before
    assert (tmp_path / "evaluation.png").exists()
    with pytest.raises(OSError, match=r"evaluation\.json"):
        report.render(tmp_path / "nothing")
