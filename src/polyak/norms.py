"""Running statistics of BatchNorm for averaged weights, estimated from data.

In eval mode BatchNorm normalises by running statistics of the activations. Averaged weights have
activations of their own. Neither the mean of past statistics nor the latest statistics belong to them,
and the wider the window of the average, the worse they fit. One pass over training data corrects that.

    averager.copy_to(model)                         permanently
    polyak.recalibrate(model, batches)

    with averager.applied():                        in the block: statistics are buffers, and the
        polyak.recalibrate(model, batches)          live ones come back with the live weights
        evaluate(model)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from polyak._checks import report
from polyak._engine import open_swaps, signals
from polyak._engine.tracking import STATISTICS, is_statistic
from polyak._modes import no_grad
from polyak._norm_statistics import Norm, find_norms
from polyak._ranks.agreement import agree, together_or_alone

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["names", "recalibrate", "statistics"]

Call = Callable[[nn.Module, Any], object]


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    call: Call | None = None,
    device: torch.device | str | None = None,
    group: ProcessGroup | None = None,
) -> None:
    """Set the running statistics of norms to the mean of the statistics of these batches.

    `running_mean = mean of batch means`, `running_var = mean of unbiased batch variances`. Every batch
    has the same weight, as with momentum=None in torch, so leave out a smaller last batch. The sums are
    made in float32 if the statistics are narrower. `num_batches_tracked` becomes the number of batches;
    a norm that is called several times in a forward pass counts each call.

    Only the norms are in train mode, so dropout is off and draws no random numbers. No gradients are
    computed, and compiled models run eagerly. Afterwards every `training` flag and momentum is as
    before. If it raises, also from a signal handler (Ctrl-C), the statistics are as before too.

    Args:
        model: a module, wrapped or not. Every norm that `names` lists is estimated, even if it is in
            eval mode. For a model without norms nothing is done, and `batches` is not read.
        batches: tensors, called as `model(batch)`; mappings, `model(**batch)`; tuples and lists
            such as (inputs, targets), `model(batch[0])`.
        call: for other batches, or a model that needs more: `lambda model, batch: ...`.
        device: where the tensors of a batch are moved before the call; by default the device of the
            model's first parameter. Tuples, lists and mappings are searched (a mapping becomes a
            dict). Any other object with a method `to` is moved by that.
        group: torch.distributed ranks that all have the model, and each give other batches. The mean is
            over the batches of all ranks, and all ranks get it. Every rank of the group calls this; an
            error of one rank is raised on all. Without a group, each process uses its own batches.

    A norm that runs only in train mode, in an auxiliary head, is not reached: set the head's `training`
    in `call`, or leave the norm out with `norm.track_running_stats = False`. SyncBatchNorm uses the
    batches of all processes, so give each process the same number of batches.

    >>> model = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout())
    >>> recalibrate(model, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [8.0]])])
    >>> model[0].running_mean, model[0].running_var, model[0].num_batches_tracked
    (tensor([3.5000]), tensor([5.]), tensor(2))

    Raises `TypeError` for norms in a scripted part and for a batch of another kind; `ValueError` if
    there are no batches, and for norms that no batch reached, that have no content yet, or whose
    momentum does not mean what it means in torch; `FloatingPointError` for a batch whose statistics
    are not finite. Each error names the norm or the batch. Source: SWA (arXiv 1803.05407); arXiv
    2411.18704, section 3.4.
    """
    with together_or_alone("recalibrate", group):
        _require_arguments(model, batches)
        norms = [Norm(name, module) for name, module in find_norms(model)]
    if group is not None:
        shapes = {norm.label: tuple(norm.buffers["running_mean"].shape) for norm in norms}
        agree("recalibrate", shapes, group, "give all ranks the same model")
    if not norms:
        return
    first = next(model.parameters(), norms[0].buffers["running_mean"])
    place = first.device if device is None else torch.device(device)
    with _statistics_kept(norms):
        with together_or_alone("recalibrate", group):
            moved = ((number, _moved(batch, place)) for number, batch in _numbered(batches))
            _estimate(model, norms, moved, call or _call)
        for norm in norms:
            if group is not None:
                norm.pool(group)
            norm.write(norm.estimate())


def names(model: nn.Module) -> list[str]:
    """List the canonical names of the norms that `recalibrate` estimates.

    These are all modules, torch's or not, with buffers `running_mean` and `running_var` and a number or
    None as `momentum`. A module without a momentum (a frozen norm), or with `track_running_stats` False,
    is left alone. The name of a model that is itself a norm is "".

    >>> names(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.LayerNorm(3)))
    ['1']
    """
    return [name for name, _ in find_norms(model)]


def statistics(names: Iterable[str]) -> list[str]:
    """Find norms with running statistics by the names of tensors alone, as files have them.

    A norm has both `<norm>.running_mean` and `<norm>.running_var`. Frozen norms look the same.

    >>> statistics(["0.weight", "1.weight", "1.running_mean", "1.running_var"])
    ['1']
    """
    given = dict.fromkeys(names)
    mean, variance = STATISTICS
    split = (name.rpartition(".") for name in given)
    return [norm for norm, dot, leaf in split if leaf == mean and norm + dot + variance in given]


@no_grad
def _estimate(
    model: nn.Module, norms: list[Norm], batches: Iterable[tuple[int, Any]], call: Call
) -> None:
    """Run the model on numbered batches, so that every norm has the mean of its statistics."""
    with _training(model, norms) as called:
        for norm in norms:
            norm.mark()
        for number, batch in batches:
            _run(call, model, batch, number)
            for norm in called:
                norm.check(number)
            called.clear()
    _require_reached(norms)


def _require_arguments(model: object, batches: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, wanted a torch.nn.Module")
    scripted = [part for part in model.modules() if isinstance(part, torch.jit.ScriptModule)]
    if any(is_statistic(name) for part in scripted for name, _ in part.named_buffers()):
        raise TypeError(
            "model has norms in a scripted or traced part, which have no mode and momentum to set: "
            "recalibrate the module that it was made from, then script that"
        )
    if isinstance(batches, (Tensor, Mapping)):
        kind = type(batches).__name__
        raise TypeError(
            f"batches is {kind}, wanted an iterable of batches; for a single batch give [batch]"
        )


@contextmanager
def _statistics_kept(norms: list[Norm]) -> Iterator[None]:
    """Restore the statistics if the block raises."""

    def put_back() -> None:
        for norm in norms:
            norm.write(norm.before)

    try:
        yield
    except BaseException:
        _surely(put_back)
        raise


@contextmanager
def _training(model: nn.Module, norms: list[Norm]) -> Iterator[list[Norm]]:
    """Set only the norms to train mode, with a momentum of 1; they add themselves to a list when called."""
    flags = [(module, module.training) for module in model.modules()]
    called: list[Norm] = []
    handles: list[Any] = []

    def put_back() -> None:
        for handle in handles:
            handle.remove()
        for module, flag in flags:
            module.training = flag
        for norm in norms:
            norm.module.momentum = norm.momentum

    try:
        # Set one by one: the `train()` of some modules merges weights, or keeps norms frozen.
        for module, _ in flags:
            module.training = False
        for norm in norms:
            norm.module.training, norm.module.momentum = True, 1.0
            handles.append(norm.module.register_forward_hook(partial(norm.take, called)))
        # A compiled graph has the modes and momenta of its tracing in it.
        with torch.compiler.set_stance("force_eager"):
            yield called
    finally:
        _surely(put_back)


@signals.critical
def _surely(restore: Callable[[], object]) -> None:
    """Restore while signal handlers wait; from the start again if one raised before it had to wait."""
    try:
        signals.hold()
        restore()
    except BaseException:
        restore()
        raise
    finally:
        open_swaps.hear_signals()


def _numbered(batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Batches with their numbers from 1; raises `ValueError` if there is no batch."""
    number = 0
    for number, batch in enumerate(batches, 1):
        yield number, batch
    if not number:
        raise ValueError("batches has no batch, wanted at least one (an iterator runs only once)")


def _run(call: Call, model: nn.Module, batch: Any, number: int) -> None:
    try:
        call(model, batch)
    except Exception as error:
        error.add_note(f"recalibrate: in batch {number}; the model is as it was before")
        raise


def _call(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (Tensor, PackedSequence)):
        return model(batch)
    if isinstance(batch, (tuple, list)) and batch:
        return model(batch[0])
    raise TypeError(
        f"a batch is {type(batch).__name__}, wanted a tensor, a mapping of keyword arguments or a "
        "tuple or list that begins with the input; for others give call=lambda model, batch: ..."
    )


def _moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        make = getattr(batch, "_make", type(batch))
        return make(_moved(value, device) for value in batch)
    return batch


def _require_reached(norms: list[Norm]) -> None:
    if missed := [norm.label for norm in norms if not norm.calls]:
        title = (
            "no batch reached these norms: if they run in train mode only, set `training` of their "
            "parent in `call`; to leave a norm out, set its track_running_stats = False"
        )
        raise ValueError(report(title, missed))
