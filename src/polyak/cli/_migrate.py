"""`polyak migrate`: our rule for another library's call."""

from __future__ import annotations

from typing import Annotated

import typer

from polyak.cli._options import Json
from polyak.cli._output import print_json, say


def migrate(
    call: Annotated[
        str, typer.Argument(metavar="CALL", help='A call, such as "ema_pytorch.EMA(beta=0.995)".')
    ],
    json: Json = False,
) -> None:
    """Translate another library's average to polyak.

    \b
    Examples:
      polyak migrate "ema_pytorch.EMA(beta=0.995, update_every=2)"
      polyak migrate "torch.optim.swa_utils.AveragedModel(model)"
    """
    from polyak import theory

    found = theory.from_library(call)
    if json:
        print_json(found.as_dict())
    else:
        say(str(found))
