"""What a measurement leaves: tables on the terminal, and the files that were asked for, after every comparison."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from .terminal import note

Write = Callable[[str], None]


class Report:
    """Shows each comparison as it is done, and writes all of them so far.

    Args:
        write_json (`Callable`), write_markdown (`Callable`), write_csv (`Callable`):
            Take the whole text of a file, every time it is longer.
        plots (`Path`, *optional*):
            Folder for pictures.
    """

    def __init__(self, write_json: Write, write_markdown: Write, write_csv: Write, plots: Path | None = None):
        self.write_json, self.write_markdown, self.write_csv, self.plots = write_json, write_markdown, write_csv, plots

    def add(self, record: dict[str, Any]) -> None:
        """Show the latest comparison of a record, and write the record.

        Args:
            record (`dict`):
                What [`~hf_treeflash.bench.pairs.describe_pair`] says of the pair, and `results`.
        """
        from ..bench.tables import conditions, csv_rows, markdown_table, remarks, text_table

        results = record["results"]
        typer.echo(f"\n{conditions(results[-1])}\n\n{text_table(results[-1])}")
        for remark in remarks(results[-1]):
            note(remark)
        self.write_json(json.dumps(record, indent=2) + "\n")
        tables = [f"{conditions(result)}\n\n{markdown_table(result)}\n" for result in results]
        self.write_markdown("\n".join(tables))
        rows = csv_rows(results)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.write_csv(text.getvalue())

    def draw(self, record: dict[str, Any], stages: Callable[[], dict[str, dict[str, float]]]) -> None:
        """Draw the pictures, if a folder for them was given.

        Args:
            record (`dict`):
                As for [`Report.add`].
            stages (`Callable`):
                Measures where the time of a round goes, arm by arm.
        """
        if self.plots is None:
            return
        from ..bench.plots import plot_acceptance, plot_budgets, plot_stages

        results = record["results"]
        plot_budgets(results, self.plots / "budgets.png")
        plot_acceptance(results, self.plots / "acceptance.png")
        where = results[0]["environment"]
        plot_stages(stages(), self.plots / "stages.png", f"{where['device']}, {where['threads']} threads")
        note(f"pictures: budgets.png, acceptance.png and stages.png in {self.plots}")
