"""Every EMA of the article's experiment from one run's snapshots, beside the same EMAs tracked.

    python examples/article_sweep.py --out article-sweep

The article trains once and looks at one decay. Here one run stores two power averages, 40 times; from
these snapshots `sweep` makes EMAs of any half-life and judges each by the validation loss. The same
EMAs are tracked in the run as well, so that the table can say how far each one made is from it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import polyak
from polyak import charts
from polyak.study import recipes

STORED = {"0.05": "power(relative_std=0.05)", "0.10": "power(relative_std=0.1)"}
HALF_LIVES = (25, 50, 75, 100, 150, 200, 300, 400, 600, 800)
ARTICLE = recipes()["article"]
DATA = ARTICLE.data(0)

Weights = Mapping[str, Tensor]


def judge(weights: Weights) -> float:
    """The validation loss of weights."""
    x, y = DATA.validation
    with torch.no_grad():
        predicted = functional_call(ARTICLE.model().eval(), dict(weights), x)
    return float(torch.nn.functional.mse_loss(predicted, y))


def train(folder: Path, epochs: int) -> dict[str, Weights]:
    """The article's training, recorded; the EMAs that were tracked."""
    torch.manual_seed(42)
    model = ARTICLE.model().train()
    optimizer = ARTICLE.optimizer(model.parameters(), ARTICLE.learning_rates[0])
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=10)
    loader = DataLoader(TensorDataset(*DATA.train), ARTICLE.batch_size, shuffle=True)
    rules = {str(rule): rule for rule in map(polyak.Exponential.from_half_life, HALF_LIVES)}
    driver = polyak.Averager(model, ARTICLE.arms["article_ema"].rule)
    averager, tracked = polyak.Averager(model, STORED), polyak.Averager(model, rules)
    recorder = polyak.Recorder(averager, folder, every=epochs * len(loader) // 40)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            ARTICLE.loss(model, x, y).backward()
            optimizer.step()
            for each in (driver, averager, tracked, recorder):
                each.update()
        schedule.step(judge(driver.average()))
    recorder.record()
    return {name: tracked.average(name) for name in rules}


def distance(made: Weights, tracked: Weights) -> float:
    """The norm of the difference of two sets of weights, as a share of the second's."""
    pairs = [(made[name].flatten(), tensor.flatten()) for name, tensor in tracked.items()]
    one, two = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    return float((one - two).norm() / two.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("article-sweep"))
    parser.add_argument("--epochs", type=int, default=97, help="97 is where the article stopped")
    options = parser.parse_args()
    snapshots = options.out / "snapshots"
    tracked = train(snapshots, options.epochs)
    found = polyak.sweep(snapshots, list(tracked), judge)
    charts.save(charts.sweep_chart(found), options.out, "sweep")
    table = Table(
        title="validation loss of EMAs, made of snapshots and tracked", title_justify="left"
    )
    for name in ("half-life", "made", "tracked", "difference of the weights", "refused"):
        table.add_column(name, justify="right")
    rows = []
    for point in found.points:
        at = tracked[point.rule]
        made = polyak.synthesize(snapshots, point.rule, max_error=9, max_amplification=1e12)
        difference, loss = distance(made.average(), at), judge(at)
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
