"""Models for the stress command: a table of small models, and the tensors of any of them by name.

A new kind of model is one line of `KINDS`. Every kind is built twice from one seed: the model that is
averaged, and its twin that nothing but training touches.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations

Source = nn.Module | dict[str, Tensor]


class Entry(NamedTuple):
    """One tensor of a model: its name without wrappers, and the dictionary that holds it."""

    name: str
    holder: MutableMapping[str, Tensor]
    leaf: str
    kind: str
    persistent: bool
    owner: nn.Module | None

    @property
    def tensor(self) -> Tensor:
        return self.holder[self.leaf]


def entries(source: Source) -> list[Entry]:
    """Every tensor under every name, in the model's order."""
    if not isinstance(source, nn.Module):
        return [Entry(name, source, name, "tensor", True, None) for name in source]
    return list(_of_module(source, ""))


def _of_module(module: nn.Module, prefix: str) -> Iterator[Entry]:
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            yield Entry(prefix + leaf, module._parameters, leaf, "parameter", True, module)  # type: ignore[arg-type]
    for leaf, buffer in module._buffers.items():
        if buffer is not None:
            saved = leaf not in module._non_persistent_buffers_set
            yield Entry(prefix + leaf, module._buffers, leaf, "buffer", saved, module)  # type: ignore[arg-type]
    for name, child in module._modules.items():
        if child is not None:
            wraps = name == "_orig_mod" or isinstance(module, nn.DataParallel)
            yield from _of_module(child, prefix if wraps else f"{prefix}{name}.")


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """All that equality bit for bit compares: NaN equals itself, 0 and -0 differ.

    All NaNs of bfloat16 are one: when torch converts to bfloat16, it writes 0x7FC0 for a tensor of
    shape () and 0xFFFF for one of shape (1,), so the bits depend on how many are converted together.
    """
    if is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided:
        return tensor.dtype, (), b""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if plain.dtype == torch.bfloat16:
        plain = plain.masked_fill(plain.isnan(), torch.nan)
    return tensor.dtype, tuple(tensor.shape), plain.view(torch.uint8).numpy().tobytes()


def contents(source: Source) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """The content of every tensor, by name."""
    return {entry.name: bits(entry.tensor) for entry in entries(source)}


def addresses(tensor: Tensor) -> set[int]:
    """The address of the first byte of every element."""
    index = torch.zeros(tensor.shape, dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        shape = [1] * tensor.dim()
        shape[dim] = size
        index = index + (torch.arange(size) * stride).reshape(shape)
    flat: list[int] = (index.reshape(-1) * tensor.element_size() + tensor.data_ptr()).tolist()
    return set(flat)


def _place(tensor: Tensor) -> object:
    """What tensors share that are one tensor under several names."""
    if tensor.numel() == 0 or tensor.layout != torch.strided or tensor.is_meta:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def first_names(found: list[Entry], *, by_storage: bool = True) -> dict[str, str]:
    """name -> the name by which the same tensor is known: a parameter's before a buffer's."""
    firsts: dict[object, str] = {}
    place = _place if by_storage else id
    for entry in sorted(found, key=lambda e: (e.kind == "buffer", not e.persistent)):
        firsts.setdefault(place(entry.tensor), entry.name)
    return {entry.name: firsts[place(entry.tensor)] for entry in found}


def overlaps(found: list[Entry]) -> bool:
    """Whether two tensors that are not one share a byte."""
    firsts = first_names(found)
    storages: dict[int, list[Tensor]] = {}
    for entry in found:
        if firsts[entry.name] == entry.name and entry.tensor.numel():
            storages.setdefault(entry.tensor.untyped_storage().data_ptr(), []).append(entry.tensor)
    for tensors in storages.values():
        if all(tensor.is_contiguous() for tensor in tensors):
            ends = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors)
            if any(start < stop for (_, stop), (start, _) in pairwise(ends)):
                return True
            continue
        taken: set[int] = set()
        for tensor in tensors if len(tensors) > 1 else ():
            size = tensor.element_size()
            mine = {byte + i for byte in addresses(tensor) for i in range(size)}
            if taken & mine:
                return True
            taken |= mine
    return False


@dataclass(frozen=True)
class Kind:
    """A kind of model: how it is built, what its forward pass takes, how often it is drawn.

    `refused` says that no averager may be made of it; `copies` that `deepcopy` takes the model.
    """

    name: str
    build: Callable[[], Source]
    inputs: Callable[[], Tensor] | None = None
    refused: bool = False
    copies: bool = True
    weight: float = 1.0


class _Parts(nn.Module):
    """A module with the parameters and buffers that it is given; it has no forward pass."""

    def __init__(
        self,
        parameters: dict[str, Tensor] | None = None,
        buffers: dict[str, Tensor] | None = None,
        unsaved: dict[str, Tensor] | None = None,
        **modules: nn.Module,
    ) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        for name, tensor in (parameters or {}).items():
            floats = tensor.is_floating_point() or tensor.is_complex()
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=floats))
        for name, tensor in (buffers or {}).items():
            self.register_buffer(name, tensor)
        for name, tensor in (unsaved or {}).items():
            self.register_buffer(name, tensor, persistent=False)


def _mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def _rows() -> Tensor:
    return torch.randn(4, 3)


def _convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
    )


def _tied() -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False))
    model[2].weight = model[0].weight
    return model


def _tied_by_storage() -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False))
    weight = model[0].get_parameter("weight")
    model[2].weight = nn.Parameter(weight)
    return model


def _parameter_and_buffer() -> nn.Sequential:
    model = _mlp()
    model.register_buffer("same", model[0].get_parameter("weight").detach())
    return model


def _flat() -> nn.Module:
    """Parameters that are slices of one buffer which the model does not hold."""
    model, offset = _mlp(), 0
    flat = torch.randn(sum(p.numel() for p in model.parameters()))
    for parameter in model.parameters():
        parameter.data = flat[offset : offset + parameter.numel()].view(parameter.shape)
        offset += parameter.numel()
    return model


def _flat_and_slices() -> nn.Module:
    flat = torch.randn(12)
    return _Parts({"weight": flat[:8].view(2, 4), "bias": flat[8:]}, {"flat": flat})


def _sliding() -> nn.Module:
    flat = torch.randn(12)
    return _Parts({"first": flat[:8], "second": flat[4:]})


def _as_integers() -> nn.Module:
    weight = torch.randn(6)
    return _Parts({"weight": weight}, {"integers": weight.view(torch.int32)})


def _frozen() -> nn.Module:
    model = _mlp()
    model[0].requires_grad_(False)
    return model


def _buffers() -> nn.Module:
    return _Parts(
        {"weight": torch.randn(3)},
        {
            "counter": torch.tensor(0),
            "mask": torch.tensor([True, False]),
            "scale": torch.rand(2),
            "bytes": torch.zeros(3, dtype=torch.uint8),
        },
        {"cache": torch.randn(2)},
        norm=nn.BatchNorm1d(2),
    )


def _causal() -> nn.Module:
    mask = torch.full((3, 3), -torch.inf).triu(1)
    limits = torch.tensor([torch.inf, -torch.inf, 1.0])
    return _Parts({"weight": torch.randn(3), "limits": limits}, {"mask": mask}, body=_mlp())


def _lists() -> nn.Module:
    model = _Parts(
        inner=_Parts(layers=nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2)])),
        scales=nn.ParameterList([torch.randn(2), torch.randn(())]),
        named=nn.ParameterDict({"a": torch.randn(2), "b": torch.randn(1, 2)}),
    )
    model.register_parameter("absent", None)
    return model


def _strange_shapes() -> nn.Module:
    return _Parts(
        {
            "scalar": torch.randn(()),
            "empty": torch.randn(0, 3),
            "none": torch.randn(0),
            "row": torch.randn(1, 4),
            "turned": torch.randn(3, 4).t(),
            "spread": torch.randn(4, 6)[:, ::2],
            "channels": torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last),
        }
    )


def _columns() -> nn.Module:
    """Disjoint parameters whose elements lie between each other."""
    both = torch.randn(4, 6)
    return _Parts({"even": both[:, ::2], "odd": both[:, 1::2]})


def _mixed() -> nn.Module:
    return _Parts(
        {
            "wide": torch.randn(3, dtype=torch.float64),
            "plain": torch.randn(3),
            "brain": torch.randn(3).bfloat16(),
            "short": torch.randn(3).half(),
            "phase": torch.randn(2, dtype=torch.complex64),
            "other": torch.randn(2, 2),
        }
    )


def _complex() -> nn.Module:
    wide = torch.randn(2, dtype=torch.complex128)
    return _Parts({"a": torch.randn(3, dtype=torch.complex64), "b": wide, "c": torch.randn(2)})


def _conjugate() -> nn.Module:
    return _Parts({"a": torch.randn(3, dtype=torch.complex64).conj(), "b": torch.randn(2)})


def _shared_module() -> nn.Module:
    shared = nn.Linear(3, 3)
    return nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(3, 2))


def _mapping() -> dict[str, Tensor]:
    return {
        "w": torch.randn(3, 2),
        "b": torch.randn(2).bfloat16(),
        "steps": torch.tensor(3),
        "s": torch.randn(()),
    }


def _old_norm(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(norm(nn.Linear(3, 3)), nn.Linear(3, 2))


def _lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))


KINDS: tuple[Kind, ...] = (
    Kind("mlp", _mlp, _rows, weight=3),
    Kind("convnet", _convnet, lambda: torch.randn(3, 1, 3, 3), weight=3),
    Kind("tied", _tied, lambda: torch.randint(5, (4,)), weight=2),
    Kind("tied by storage", _tied_by_storage, lambda: torch.randint(5, (4,)), weight=2),
    Kind("parameter and buffer", _parameter_and_buffer, _rows),
    Kind("flat", _flat, _rows, weight=2),
    Kind("columns", _columns),
    Kind("bfloat16", lambda: _mlp(torch.bfloat16), lambda: _rows().bfloat16()),
    Kind("float16", lambda: _mlp(torch.float16), lambda: _rows().half()),
    Kind("float64", lambda: _mlp(torch.float64), lambda: _rows().double()),
    Kind("complex", _complex),
    Kind("mixed dtypes", _mixed, weight=2),
    Kind("frozen", _frozen, _rows),
    Kind("buffers", _buffers, weight=2),
    Kind("infinities", _causal, weight=2),
    Kind("lists", _lists),
    Kind("shapes", _strange_shapes, weight=2),
    Kind("shared module", _shared_module, _rows),
    Kind("mapping", _mapping, weight=2),
    Kind("wrapped as compiled", lambda: _Parts(_orig_mod=_mlp()), weight=0.5),
    Kind("data parallel", lambda: nn.DataParallel(_convnet()), weight=0.5),
    Kind("weight norm", lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3))), _rows),
    Kind("spectral norm", lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3))), _rows),
    Kind("old weight norm", lambda: _old_norm(nn.utils.weight_norm), _rows, copies=False, weight=0.5),
    Kind("old spectral norm", lambda: _old_norm(nn.utils.spectral_norm), _rows, copies=False, weight=0.5),
    Kind("orthogonal", lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3))), _rows, weight=0.3),
    Kind("many", lambda: nn.ParameterList([torch.randn(2) for _ in range(20)]), weight=0.5),
    Kind("above a mebibyte", lambda: _Parts({"big": torch.randn(530, 500), "small": torch.randn(3)}), weight=0.05),
    Kind("tied above a mebibyte", lambda: _big_tied(), weight=0.05),
    Kind("flat and slices", _flat_and_slices, refused=True, weight=0.2),
    Kind("sliding", _sliding, refused=True, weight=0.2),
    Kind("as integers", _as_integers, refused=True, weight=0.2),
    Kind("expanded", lambda: _Parts({"a": torch.randn(3, 1).expand(3, 4), "b": torch.randn(2)}), refused=True, weight=0.2),
    Kind("strided over itself", lambda: _Parts({"a": torch.randn(8).as_strided((3, 4), (2, 1)), "b": torch.randn(2)}), refused=True, weight=0.2),
    Kind("conjugate", _conjugate, refused=True, weight=0.2),
    Kind("negative", lambda: {"a": torch.randn(3, dtype=torch.complex64).conj().imag, "b": torch.randn(2)}, refused=True, weight=0.2),
    Kind("integer keys", lambda: {0: torch.randn(3), 1: torch.randn(2)}, refused=True, weight=0.2),  # type: ignore[dict-item]
    Kind("no floats", lambda: {"steps": torch.tensor(3)}, refused=True, weight=0.1),
    Kind("lazy", _lazy, refused=True, weight=0.1),
    Kind("meta", lambda: nn.Linear(2, 2, device="meta"), refused=True, weight=0.1),
    Kind("sparse", lambda: {"w": torch.eye(2).to_sparse()}, refused=True, weight=0.1),
)  # fmt: skip


def faithful_copy(source: Source) -> Source:
    """A deep copy in which tensors lie in memory as they do in the source.

    torch's own makes two storages of one that two parameters share, and closes the gaps of views: fused
    optimizers of torch do not step those as they step dense tensors.
    """
    made = copy.deepcopy(source)
    found = {entry.name: entry.tensor for entry in entries(made)}
    storages: dict[int, torch.UntypedStorage] = {}
    for entry in entries(source):
        if entry.tensor.layout == torch.strided and entry.tensor.numel():
            data = entry.tensor.data
            held = data.untyped_storage()
            copied = storages.setdefault(held.data_ptr(), held.clone())
            there = data.storage_offset(), data.size(), data.stride()
            new = torch.empty(0, dtype=data.dtype).set_(copied, *there)
            new = new.conj() if data.is_conj() else new
            found[entry.name].data = torch._neg_view(new) if data.is_neg() else new
    return made


def _big_tied() -> nn.Module:
    weight = torch.randn(530, 500)
    return _Parts({"first": weight, "second": weight, "small": torch.randn(3)})


def build(kind: Kind, seed: int) -> Source:
    """A model of a kind; the same seed gives the same content."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind.build()
