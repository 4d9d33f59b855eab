"""The progress bar of training; plain lines if standard output is not a terminal."""

import sys
import time
from collections.abc import Mapping, Sequence

from rich import progress
from rich.table import Column

from transformer.console import console
from transformer.metrics import PRINTED
from transformer.parallel.replicas import format_replicas
from transformer.training.metrics import TRAIN_METRICS

SILENCE = 30.0  # at most so many seconds between lines if there is no bar


class ProgressBar(progress.Progress):
    """Shows the step of `steps`, the metrics that declare a text for it, and the time left."""

    def __init__(self, start: int, steps: int):
        self.steps, self.printed = steps, time.monotonic()
        super().__init__(
            progress.TextColumn("[bold]train"),
            progress.BarColumn(bar_width=28),
            # Never truncated, as the bar may be.
            progress.MofNCompleteColumn(table_column=Column(min_width=2 * len(str(steps)) + 1)),
            progress.TextColumn("{task.fields[figures]}"),
            progress.TimeRemainingColumn(compact=True),
            progress.TextColumn("left"),
            console=console,
            disable=not sys.stdout.isatty(),
        )
        self.task = self.add_task("train", total=steps, completed=start, figures="")

    def show_step(self, step: int) -> None:
        """Shows the step; without a bar, prints a line if the last one is `SILENCE` old."""
        self.update(self.task, completed=step)
        if self.disable and time.monotonic() - self.printed > SILENCE:
            self.print_line(step)

    def print_line(self, step: int, *figures: str) -> None:
        """Prints a line, above the bar if there is one."""
        self.printed = time.monotonic()
        self.console.print("  ".join((f"step {step}/{self.steps}", *figures)))

    def log_interval(self, step: int, metrics: Sequence[Mapping[str, float]]) -> None:
        """Shows the training metrics of the interval that ends at `step`."""
        figures = []
        for name, metric in TRAIN_METRICS.items():
            values = [each[f"train/{name}"] for each in metrics if f"train/{name}" in each]
            if metric.bar and any(values):
                shown = sum(values) / (len(values) if metric.per_replica else 1)
                figures.append(metric.bar.format(shown))
        self.update(self.task, completed=step, figures="  ".join(figures))
        if self.disable:
            left = (self.steps - step) / metrics[0]["train/steps_per_second"]
            self.print_line(step, *figures, f"{left:.0f} s left")

    def log_validation(self, step: int, metrics: Sequence[Mapping[str, float]]) -> None:
        """Prints the validation metrics of `step`."""
        figures = [
            f"{name.replace('_', ' ')} "
            + format_replicas([each[f"validation/{name}"] for each in metrics], metric.format)
            for name, metric in PRINTED.items()
        ]
        self.print_line(step, f"validation {'  '.join(figures)}")
