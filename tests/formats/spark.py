"""The example's queries in Spark and in DuckDB, on the same files: `make spark`.

PySpark is half a gigabyte and needs Java, so this is not one of the tests that always run.
"""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.formats.test_tables import FLEET, make_fleet, query, statements


def main() -> None:
    """Run each query in both, print the rows, and compare them."""
    sessions: Any = import_module("pyspark.sql").SparkSession
    with tempfile.TemporaryDirectory() as scratch:
        directory = make_fleet(Path(scratch))
        spark = (
            sessions.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
        )
        spark.sparkContext.setLogLevel("ERROR")
        spark.read.parquet(f"{directory}/fleet").createOrReplaceTempView("runs")
        for number, text in enumerate(statements(FLEET.read_text())[1:]):
            frame = spark.sql(text)
            frame.show(truncate=False)
            rows = [_plain(row) for row in frame.collect()]
            wanted = [_plain(row) for row in query(directory, number)]
            assert rows == wanted, (rows, wanted)
        print(f"Spark {spark.version} and DuckDB agree")
        spark.stop()


def _plain(row: Any) -> list[Any]:
    return [value if isinstance(value, str | float | None) else _number(value) for value in row]


def _number(value: Any) -> Any:
    try:
        return int(value)
    except (TypeError, ValueError):
        return str(value)


if __name__ == "__main__":
    main()
