"""`polyak advise`: which average for a run."""

from __future__ import annotations

from typing import Annotated

import typer

from polyak.cli._options import ChartFolder, Json
from polyak.cli._output import print_equivalents, print_json, save_chart, say


def advise(
    steps: Annotated[int, typer.Option(help="Steps of the run.")],
    schedule: Annotated[
        str, typer.Option(help="constant, inverse_sqrt, cosine, linear or wsd (20 % cooldown).")
    ],
    batch: Annotated[
        float | None,
        typer.Option(help="Batch size in the model; 1 is very noisy.", show_default="1, 10, 100"),
    ] = None,
    final: Annotated[
        float, typer.Option(help="Final learning rate, as a share of the peak.")
    ] = 0.0,
    warmup: Annotated[
        float, typer.Option(help="Share of the run in which the rate warms up.")
    ] = 0.01,
    lr: Annotated[
        float | None, typer.Option(help="AdamW's learning rate; shows AdamW's own average.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's weight decay.")] = None,
    out: ChartFolder = None,
    json: Json = False,
) -> None:
    """Advise which average a run needs.

    The advice comes from an exact model of SGD on a quadratic, and from published results.

    \b
    Examples:
      polyak advise --steps 20000 --schedule cosine --lr 1e-3 --weight-decay 0.1
      polyak advise --steps 3000 --schedule constant --batch 10 --out advice
    """  # fmt: skip
    from polyak import theory

    advice = theory.advise(
        steps,
        schedule=schedule,
        batch=batch,
        final=final,
        warmup=warmup,
        lr=lr,
        weight_decay=weight_decay,
    )
    if json:
        print_json(advice.as_dict())
    else:
        say(str(advice))
        if advice.worth:
            print_equivalents(advice.rule)
    if out is not None:
        from polyak import charts

        save_chart(charts.advice_chart(advice), out, "advice", err=json)
