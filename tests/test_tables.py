"""Tables made of columns: what each writer shows of the same rows."""

import csv

from compression.tables import Column, at, columns_of, markdown_table, text_table, write_csv

ROWS = [
    {"name": "A", "size": {"bytes": 2_500_000}, "auc": None},
    {"name": "Long name", "size": {"bytes": 70}, "auc": 1},
]
COLUMNS = [
    Column("Model", at("name")),
    Column("MB", at("size", "bytes", per=1e6), "{:.1f}"),
    Column("AUC", at("auc"), "{:.2f}", missing="undefined"),
    Column("both", lambda row: (row["name"], row["size"]["bytes"]), "{} ({})"),
]


def test_markdown():
    assert markdown_table(COLUMNS, ROWS).splitlines() == [
        "| Model | MB | AUC | both |",
        "| --- | ---: | ---: | ---: |",
        "| A | 2.5 | undefined | A (2500000) |",
        "| Long name | 0.0 | 1.00 | Long name (70) |",
    ]
    assert markdown_table(COLUMNS[:2], [], align="---") == "| Model | MB |\n| --- | --- |"


def test_text_is_aligned():
    assert text_table(COLUMNS[:3], ROWS).splitlines() == [
        "Model       MB        AUC",
        "A          2.5  undefined",
        "Long name  0.0       1.00",
    ]
    assert text_table(COLUMNS[:2], ROWS, transposed=True).splitlines() == [
        "Model    A  Long name",
        "MB     2.5        0.0",
    ]


def test_csv_holds_the_values_unrounded(tmp_path):
    write_csv(tmp_path / "table.csv", COLUMNS[:3], ROWS)
    with (tmp_path / "table.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["Model", "MB", "AUC"], ["A", "2.5", ""], ["Long name", "7e-05", "1"]]
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    write_csv(tmp_path / "table.csv", columns_of(ROWS), [])
    assert (tmp_path / "table.csv").read_bytes() == b"name,size,auc\r\n"
