"""The verb `report`: what it writes, what it refuses, and what it does not load."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from deltakd.__main__ import main
from tests.report.made import make_evaluation, make_many, make_run

REPOSITORY = Path(__file__).parents[2]


def test_help_loads_neither_plotly_nor_jinja():
    code = (
        "import sys; from deltakd.__main__ import parser; parser().format_help(); "
        "print(sorted({'plotly', 'jinja2', 'pyarrow', 'msgspec', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_table_is_written_for_a_readme_and_for_anything_else(tmp_path):
    make_evaluation(tmp_path / "evaluation", ["sft", "delta"], "sft")
    page, table, metrics = (str(tmp_path / name) for name in ("report.html", "table.md", "metrics.csv"))
    assert main(["report", str(tmp_path), "-o", page, "--markdown", table, "--csv", metrics]) == 0
    lines = Path(table).read_text().splitlines()
    assert lines[0] == "| model | ROUGE-L | cross-entropy |"
    assert lines[3] == "| delta | 63.3 **(+10.0 [+9.0, +11.0])** | 0.167 (+0.050 [-0.150, +0.250]) |"
    assert "\nProtocol paper. 3 held-out prompts. " in Path(table).read_text()
    assert "Protocol paper. 3 held-out prompts. " in Path(page).read_text()
    rows = list(csv.DictReader(Path(metrics).read_text().splitlines()))
    assert [row["model"] for row in rows] == ["sft", "delta"] and rows[0]["rougeL difference"] == ""
    assert float(rows[1]["rougeL mean"]) == pytest.approx(1.9 / 3) and rows[1]["rougeL difference_low"][:4] == "0.09"
    assert float(rows[1]["rougeL low"]) <= float(rows[1]["rougeL mean"]) <= float(rows[1]["rougeL high"])


@pytest.mark.parametrize("paths", [["nowhere"], ["."]])
def test_what_cannot_be_reported_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys, paths):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *paths]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not Path("report.html").exists()


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    make_run(tmp_path / "runs" / "one")
    (tmp_path / "file").write_text("")
    assert main(["report", str(tmp_path / "runs"), "-o", str(tmp_path / "file" / "report.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-o", "."], "-o: . is a folder. Write the name of a file."),
        (["--csv", "runs"], "--csv: runs is a folder. Write the name of a file."),
        (["--markdown", "./report.html"], "--markdown: report.html is where -o goes. Write another file."),
        (["--csv", "a.txt", "--markdown", "a.txt"], "--csv: a.txt is where --markdown goes. Write another file."),
    ],
)
def test_a_folder_and_one_place_of_two_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, words, said
):
    make_run(tmp_path / "runs" / "one")
    monkeypatch.chdir(tmp_path)
    assert main(["report", "runs", *words]) == 2
    assert capsys.readouterr().err == f"deltakd: {said}\n" and [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_run_without_evaluation_and_an_evaluation_without_runs_are_reports_too(tmp_path):
    run = make_run(tmp_path / "one")
    evaluation = make_evaluation(tmp_path / "evaluation", ["sft"], "sft")
    for number, folder in enumerate((run, evaluation)):
        out = tmp_path / f"{number}.html"
        assert main(["report", str(folder), "-o", str(out)]) == 0 and "Not measured" in out.read_text()


def test_a_page_of_many_runs_stays_small(tmp_path):
    """40 runs of 3,000 steps: 21 MB of records, and beside plotly's 4.8 MB less than 4 of curves."""
    make_many(tmp_path / "runs", 40, 3000)
    assert main(["report", str(tmp_path / "runs"), "-o", str(tmp_path / "report.html")]) == 0
    assert (tmp_path / "report.html").stat().st_size < 9e6
