"""Train the first steps of a study, to find the mistakes of a recipe before the training begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from polyak._checks import require
from polyak._modes import no_grad
from polyak._tensors import versions
from polyak.study._ensembles import MeanPrediction
from polyak.study._errors import is_recipes, placed
from polyak.study._flat import Weights
from polyak.study._judge import finite, remembering
from polyak.study._loop import Run, alone, prepared
from polyak.study._study import Data, Ensemble, Metric, Part, Study
from polyak.study._tracking import tensors_of

T = TypeVar("T")

STEPS = 4
DIGESTED = 1024
WANTED: dict[type, str] = {
    Data: "polyak.study.Data",
    Optimizer: "one torch Optimizer; parts that train apart are its parameter groups",
}


def tried(study: Study) -> dict[str, Any]:
    """The data of seed 0, the losses of its first four steps, and the metrics after them.

    They tell another model, loss, optimizer, metric, ensemble or part of the data: functions cannot be
    compared, but what they do can. Six digits tell a weight decay, and are the same on most machines.

    Raises `ValueError` for a function of the study that raises an error, or gives what cannot be used.
    """
    with alone():
        other = called("model", study.model, gives=nn.Module)
        _require_trainable(other)
        first = Run(0, next(iter(study.schedules)), study.learning_rates[0])
        model, data, batches, optimizer = prepared(study, first, call=called)
        _require_new(model, other)
        _require_rates(study, other)
        identities = {name: list(_identities(name, part)) for name, part in vars(data).items()}
        rows = len(data.train[0])
        wanted = f"at most the {rows} rows of the training part"
        require(study.batch_size <= rows, "batch_size", study.batch_size, wanted)
        losses: list[str] = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = _loss(study, model, next(batches))
            if not losses:
                _require_learning(model, loss)
            called("optimizer", optimizer.step)
            losses.append(f"{float(loss.detach()):.6g}")
        return {
            "data": identities,
            "first losses": losses,
            "first values": _values(study, model, data),
        }


def _identities(name: str, part: Part) -> Iterator[str]:
    """The identity of each tensor of a part. Raise `ValueError` for one whose rows cannot be taken."""
    for number, tensor in enumerate(part):
        try:
            if name == "train":
                _ = tensor[torch.arange(1)].split(1)
            yield _digest(tensor)
        except (RuntimeError, NotImplementedError) as error:
            kind = tensor.dtype if tensor.layout is torch.strided else tensor.layout
            got = f"tensor {number} of its part {name}, of {kind} on {tensor.device}"
            remedy = "wanted a dense tensor on the CPU, such as x.to_dense()"
            raise ValueError(f"the study's data: cannot take rows of {got}; {remedy}") from error


def _digest(tensor: Tensor) -> str:
    """A tensor's shape, and a sum of its entries in which each place has another weight.

    Another entry, or another order of the rows, gives another sum; a difference in rounding hardly ever does.
    """
    total, rows = 0.0, tensor.detach()
    if rows.is_nested:
        rows = rows.to_padded_tensor(0)
    elif rows.layout is not torch.strided:
        rows = rows.to_sparse()  # dense as a whole, a graph of many nodes would not fit
    for first in range(0, len(rows), DIGESTED):
        some = rows.narrow_copy(0, first, min(DIGESTED, len(rows) - first)).to_dense()
        real = torch.view_as_real(some) if some.is_complex() else some
        flat = real.cpu().double().nan_to_num(0.5, 2.0, -2.0).reshape(len(some), -1)
        down = torch.arange(len(flat)) + (first + 1)
        across = torch.arange(flat.shape[1]) + 1
        total += float(down.double().sin() @ flat @ across.double().sin())
    return f"{tuple(rows.shape)} {total:.6g}"


def _require_trainable(model: nn.Module) -> None:
    """Raise `ValueError` for a model without a parameter to train, or with one that has no shape yet."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            remedy = "run one batch through the model before it is returned"
            raise ValueError(f"the study's model has {name}, which has no shape yet: {remedy}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the study's model has no parameter with requires_grad: nothing to train")


def _require_new(model: nn.Module, other: nn.Module) -> None:
    """Raise `ValueError` if two calls gave one trained parameter: each run would go on where another ended."""
    others = {id(parameter) for parameter in other.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) in others:
            wanted = "wanted a new model at each call, such as copy.deepcopy of it"
            raise ValueError(f"the study's model returned the same {name} twice, {wanted}")


def _require_rates(study: Study, model: nn.Module) -> None:
    """Raise `ValueError` if the optimizer does not have the learning rate with which it is called."""
    made = [
        called("optimizer", study.optimizer, model.parameters(), r)
        for r in study.learning_rates[:2]
    ]
    one, *others = ([group["lr"] for group in optimizer.param_groups] for optimizer in made)
    if one in others:
        rates = " and ".join(f"{rate:g}" for rate in study.learning_rates[:2])
        raise ValueError(
            f"the study's optimizer has the same learning rate {one[0]:g} when it is called with {rates}: "
            "use the second argument as lr"
        )


def _loss(study: Study, model: nn.Module, batch: Part) -> Tensor:
    """The loss of a batch, of which the gradients are computed."""
    loss = called("loss", study.loss, model, *batch, gives=Tensor)
    if loss.numel() != 1:
        wanted = "wanted a scalar: the mean over the batch"
        raise ValueError(f"the study's loss returned a tensor {tuple(loss.shape)}, {wanted}")
    if not loss.requires_grad:
        wanted = "wanted one without detach(), item() and no_grad()"
        raise ValueError(f"the study's loss returned a tensor without a gradient, {wanted}")
    called("loss", loss.backward)
    return loss


def _require_learning(model: nn.Module, loss: Tensor) -> None:
    """Raise `ValueError` if a loss is not a number before any step, or changes no parameter."""
    if finite(loss.detach()) is None:
        raise ValueError(
            f"the study's loss is {float(loss.detach())} on the first batch, before any step; "
            "look for NaN and infinity in the data"
        )
    if all(parameter.grad is None for parameter in model.parameters()):
        raise ValueError("the study's loss does not depend on a parameter of the model")


@no_grad
def _values(study: Study, model: nn.Module, data: Data) -> dict[str, list[str]]:
    """Every metric on the validation part, twice, and on the test part; one that draws anew has no figures."""
    values = {}
    for name, metric in study.metrics.items():
        first, again, test = (
            _value(f"metric {name!r} on the {part} part", metric, model, getattr(data, part))
            for part in ("validation", "validation", "test")
        )
        known = [first, test, *_of_ensembles(study, name, model, data)]
        values[name] = known if first == again else ["random"]
    return values


def _of_ensembles(study: Study, name: str, model: nn.Module, data: Data) -> list[str]:
    """A metric of the model's ensembles, on the validation part; their networks are shares of the model."""
    values, part = [], data.validation
    for arm, spec in study.arms.items():
        if isinstance(spec, Ensemble):
            what = f"metric {name!r} of arm {arm!r} on the validation part"
            networks = [_share(model, k) for k in range(1, spec.size + 1)]
            mean = MeanPrediction(model, spec.combine, networks, [{}] * spec.size, part)
            values.append(_value(what, study.metrics[name], mean, part))
    return values


def _share(model: nn.Module, whole: int) -> Weights:
    """The tensors of a model, those of fractions divided by a number."""
    tensors = tensors_of(model).items()
    return {n: t / whole if t.is_floating_point() or t.is_complex() else t for n, t in tensors}


def _value(what: str, metric: Metric, model: nn.Module, part: Part) -> str:
    """A metric's value as text.

    Raises `ValueError` if it raises an error, writes into the data, changes a weight, or its value is not a scalar.
    """
    watched = [tensor for tensor in part if not tensor.is_inference()]
    before, weights = versions(watched), _weights(model)
    kept = {name: weight.clone() for name, weight in weights.items()}
    with remembering(model):
        value = called(what, metric.function, model.eval(), *part)
    if versions(watched) != before:
        remedy = "every later value would be of other data; wanted a clone of what it changes"
        raise ValueError(
            f"the study's {what}, or a layer that it calls, writes into the data: {remedy}"
        )
    now = dict(model.named_parameters())
    if name := next(
        (n for n, w in weights.items() if now.get(n) is not w or _differ(w, kept[n])), ""
    ):
        remedy = "every later value would be of other weights; wanted a copy.deepcopy of the model"
        raise ValueError(f"the study's {what}, or a layer that it calls, changes {name}: {remedy}")
    try:
        number = finite(value)
    except TypeError as error:
        raise ValueError(f"the study's {what}: {error}") from None
    return "none" if number is None else f"{number:.4g}"


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have other values; NaN is a value."""
    return one.shape != other.shape or not torch.isclose(one, other, 0, 0, equal_nan=True).all()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, without those that a layer itself keeps below its `max_norm`."""
    layers = (layer for layer in model.modules() if getattr(layer, "max_norm", None) is not None)
    bounded = {id(weight) for layer in layers for weight in layer.parameters(recurse=False)}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {name: weight for name, weight in trained.items() if id(weight) not in bounded}


def called(name: str, function: Callable[..., T], *inputs: Any, gives: type[T] | None = None) -> T:
    """Call a function of a recipe, and return its checked result.

    Raises `ValueError` with the name of the field, and with the line of the recipe, if the function raises
    an error or returns another type than `gives`.
    """
    try:
        value = function(*inputs)
    except BaseException as error:
        if not is_recipes(error):
            raise
        raise ValueError(f"the study's {name} raised {placed(error)}") from error
    if gives and not isinstance(value, gives):
        wanted = WANTED.get(gives, gives.__name__)
        raise ValueError(f"the study's {name} returned {type(value).__name__}, wanted {wanted}")
    return value
