"""Reports of benches as text, JSON, CSV and a page."""

import csv
import io
import json
from xml.etree import ElementTree

from lowmem_pnn.contenders.bench_report import BenchReport, BenchRow
from lowmem_pnn.page.bench_page import bench_page
from lowmem_pnn.page.figures import alone, bench_figure

REPORT = BenchReport(
    model="mlp:64-10", data="digits", device="cpu", batch_size=64, steps=10, versions={"torch": "2.14"},
    rows=[
        BenchRow(
            contender="exact", budget_bytes=60_000_000, peak_bytes=34_000_000, predicted_peak_bytes=37_000_000,
            samples_per_second=912.0, speed=0.5, fits=True, bytes_written=8_700_000,
        ),
        BenchRow(contender="backprop", budget_bytes=30_000_000, reason="too little; give more", enough_bytes=50_000_000),
        BenchRow(contender="checkpointing", reason="it needs about 31 GB, and 8 GB are free"),
        BenchRow(contender="plain", peak_bytes=35_000_000, samples_per_second=1824.0, speed=1.0, fits=True),
    ],
)  # fmt: skip


def test_the_table_says_what_fits_and_why_the_others_do_not() -> None:
    lines = str(REPORT).splitlines()
    assert lines[0] == "mlp:64-10 on digits, cpu: 10 steps of 64 samples each"
    assert lines[4].split() == ["exact", "fits", "60.0", "MB", "34.0", "MB", "37.0", "MB", "0.50", "912", "8.7", "MB"]
    assert lines[5].split()[:5] == ["backprop", "does", "not", "fit", "30.0"]
    assert "backprop in 30.0 MB: too little; give more" in lines
    assert "checkpointing: it needs about 31 GB, and 8 GB are free" in lines
    assert max(map(len, REPORT.describe(70).splitlines()[2:7])) <= 70


def test_json_and_csv_have_the_documented_keys() -> None:
    body = json.loads(REPORT.to_json())
    assert body["schema_version"] == 1
    assert set(body["rows"][0]) >= {
        "contender", "budget_bytes", "peak_bytes", "predicted_peak_bytes", "samples_per_second", "fits", "bytes_written",
    }  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(REPORT.to_csv())))
    assert [(row["contender"], row["peak_bytes"], row["fits"]) for row in rows] == [
        ("exact", "34000000", "True"), ("backprop", "", "False"), ("checkpointing", "", "False"), ("plain", "35000000", "True"),
    ]  # fmt: skip


def test_the_page_has_a_picture_and_the_table() -> None:
    page = bench_page(REPORT)
    assert page.count("<svg ") == 1
    for text in ("exact, 60.0 MB", "plain", "too little; give more", "10 steps of 64 samples on cpu; torch 2.14"):
        assert text in page


def test_the_picture_alone_is_a_file_of_its_own() -> None:
    picture = alone(bench_figure(REPORT.rows))
    assert "var(--" not in picture
    ElementTree.fromstring(picture)
