"""Every EMA of the article's experiment from one run's snapshots, beside the same EMAs tracked.

    python examples/article_sweep.py --out article-sweep

The article trains once and looks at one decay. Here one run stores two power averages, 40 times; from
these snapshots `sweep` makes EMAs of any half-life and judges each by the validation loss. The same
EMAs are tracked in the run as well, so that the table can say how far each one made is from it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import polyak
from polyak import charts
from polyak.study._data import make_data
from polyak.study._live import Live
from polyak.study._model import Probe
from polyak.study._settings import Settings
from polyak.study._trainer import alone

STORED = {"0.05": "power(relative_std=0.05)", "0.10": "power(relative_std=0.1)"}
HALF_LIVES = (25, 50, 75, 100, 150, 200, 300, 400, 600, 800)


def train(folder: Path, settings: Settings, epochs: int) -> tuple[Probe, dict[str, torch.Tensor]]:
    """The article's training, recorded; how to judge weights, and the EMAs that were tracked."""
    rules = {str(rule): rule for rule in map(polyak.Exponential.from_half_life, HALF_LIVES)}
    with alone():
        torch.manual_seed(settings.data_seed)
        live = Live(settings, make_data(settings))
        probe = Probe(live.shapes, make_data(settings))
        weights = {"weights": live.flat}
        driver = polyak.Averager(weights, settings.article_rule())
        averager, tracked = polyak.Averager(weights, STORED), polyak.Averager(weights, rules)
        steps = epochs * -(
            -int(settings.rows * (1 - settings.validation_share)) // settings.batch_size
        )
        recorder = polyak.Recorder(averager, folder, every=steps // 40)

        def after_step() -> None:
            for each in (driver, averager, tracked, recorder):
                each.update()

        for _ in range(epochs):
            live.train_epoch(after_step)
            live.judged(probe.evaluate(driver.average()["weights"])["mse"])
        recorder.record()
        return probe, {name: tracked.average(name)["weights"] for name in rules}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("article-sweep"))
    parser.add_argument("--epochs", type=int, default=97, help="97 is where the article stopped")
    options = parser.parse_args()
    probe, tracked = train(options.out / "snapshots", Settings(), options.epochs)
    found = polyak.sweep(
        options.out / "snapshots",
        list(tracked),
        lambda weights: probe.evaluate(weights["weights"])["mse"],
    )
    charts.save(charts.sweep_chart(found), options.out, "sweep")
    table = Table(
        title="validation loss of EMAs, made of snapshots and tracked", title_justify="left"
    )
    for name in ("half-life", "made", "tracked", "difference of the weights", "refused"):
        table.add_column(name, justify="right")
    rows = []
    for point in found.points:
        at = tracked[point.rule]
        made = polyak.synthesize(
            options.out / "snapshots", point.rule, max_error=9, max_amplification=1e12
        )
        difference = float((made.average()["weights"] - at).norm() / at.norm())
        loss = probe.evaluate(at)["mse"]
        rows.append(
            {
                "half_life": point.half_life,
                "made": point.quality,
                "tracked": loss,
                "difference": difference,
            }
        )
        quality = "" if point.quality is None else f"{point.quality:.6f}"
        reason = "" if point.quality else f"error {point.relative_error:.2g}"
        table.add_row(f"{point.half_life:.0f}", quality, f"{loss:.6f}", f"{difference:.1e}", reason)
    Console().print(table)
    (options.out / "sweep.json").write_text(
        json.dumps({**found.as_dict(), "tracked": rows}, indent=2)
    )
    best = "none was compared" if found.best is None else found.best.rule
    print(f"best: {best}; chart: {options.out}/sweep.html")


if __name__ == "__main__":
    main()
