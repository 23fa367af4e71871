"""Names that torch keeps private and polyak needs. No other module uses them.

Each function says since which torch version its names exist, as read in the releases 2.4 to 2.15. A
torch that has another layout is refused with an error that names what is missing. It is never passed
over: a model whose weights FSDP2 has gathered in part would be averaged wrongly, without a word.

Importing this module loads no part of torch.distributed.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from types import CodeType
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

# DTensor._local_tensor: 2.5 (before, DTensor was in torch.distributed._tensor). The public `to_local()`
# makes a new view of a parameter at each call, so its identity would mean nothing, and it is slower.
local_part = operator.attrgetter("_local_tensor")


def local_parts(tensors: Sequence[Any]) -> list[Tensor]:
    """This rank's parts of DTensors. A `map` of `local_part` takes half as long again, at every update."""
    return [tensor._local_tensor for tensor in tensors]


def as_dtensor(part: Tensor, like: DTensor) -> DTensor:
    """Make a DTensor of this rank's part, spread like another one, that shares the part's memory.

    DTensor(...), DTensor._spec, TensorMeta: 2.5. The public `from_local` would move a part that rests in
    the host's memory (CPUOffloadPolicy) to the mesh's device.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import TensorMeta

    # The global shape and stride are taken over: from uneven parts they would be guessed wrong.
    meta = TensorMeta(like.shape, like.stride(), part.dtype)
    spec = replace(_get(like, "_spec", "2.5"), tensor_meta=meta)
    return DTensor(part, spec, requires_grad=False)


def stored_chunks(tensor: DTensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and shapes under which torch.distributed.checkpoint stores this rank's part.

    DTensor.__create_chunk_list__: 2.5.
    """
    chunks = _get(tensor, "__create_chunk_list__", "2.5")()
    return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]


def time_out(group: ProcessGroup) -> timedelta:
    """How long a rank of a group waits for another.

    ProcessGroup._get_backend and _device_types: 2.4; Backend.options._timeout: 2.5.
    """
    backend = _get(group, "_get_backend", "2.4")(_get(group, "_device_types", "2.4")[0])
    found: timedelta = _get(_get(backend, "options", "2.5"), "_timeout", "2.5")
    return found


def state_makers() -> set[CodeType]:
    """The code that steps an optimizer to make its state, with learning rate 0; none until it is imported.

    torch.distributed.checkpoint.state_dict._init_optim_state: 2.4.
    """
    module = sys.modules.get("torch.distributed.checkpoint.state_dict")
    return set() if module is None else {_get(module, "_init_optim_state", "2.4").__code__}


def fsdp_groups() -> list[Any]:
    """All parameter groups of FSDP2 in this process.

    _module_state_mapping holds weak references since 2.6, before that the states themselves.
    FSDPState._fsdp_param_groups: 2.12; before that there is one, FSDPState._fsdp_param_group.
    """
    try:
        from torch.distributed._composable_state import _module_state_mapping
    except ImportError:
        raise _unknown("torch.distributed._composable_state._module_state_mapping", "2.4") from None
    groups: list[Any] = []
    for found in list(_module_state_mapping.values()):
        state: Any = found() if isinstance(found, ref) else found
        if hasattr(state, "_fsdp_param_groups"):
            groups += state._fsdp_param_groups
        elif hasattr(state, "_fsdp_param_group"):
            groups += [state._fsdp_param_group] if state._fsdp_param_group is not None else []
        elif type(state).__module__.startswith("torch.distributed.fsdp"):
            raise _unknown(f"{type(state).__name__}._fsdp_param_groups", "2.12")
    return groups


def fsdp_parameters(group: Any) -> list[Any]:
    """The parameters of a group. FSDPParamGroup.fsdp_params: 2.6."""
    found: list[Any] = _get(group, "fsdp_params", "2.6")
    return found


def reshard_group(group: Any) -> None:
    """Make a group have its shards again. FSDPParamGroup.wait_for_unshard, _to_sharded: 2.6.

    Weights that are being gathered ahead (prefetching, `unshard(async_op=True)`) arrive first: they
    would take the place of the shards afterwards.

    Raises `RuntimeError` before torch 2.7: there FSDP2 itself fails on the CPU, so nothing was tested.
    """
    if TorchVersion(torch.__version__) < "2.7":
        raise RuntimeError(
            f"torch {torch.__version__}: averaging weights of FSDP2 (fully_shard) needs torch 2.7 or "
            "newer"
        )
    _get(group, "wait_for_unshard", "2.6")()
    _get(group, "_to_sharded", "2.6")()


def holders_of(parameter: Any) -> list[object]:
    """The modules that have a parameter of FSDP2, and the nn.Parameter that has its shard.

    FSDPParam._module_info, sharded_param: 2.6.
    """
    info = _get(parameter, "_module_info", "2.6")
    return [info.module, *info.shared_modules, _get(parameter, "sharded_param", "2.6")]


def gathered_weight(parameter: Any) -> object:
    """The whole tensor that FSDP2 gathers a parameter into; None before the first time.

    FSDPParam._unsharded_param: 2.6, set when it is first gathered.
    """
    return getattr(parameter, "_unsharded_param", None)


def _get(holder: Any, name: str, since: str) -> Any:
    try:
        return getattr(holder, name)
    except AttributeError:
        raise _unknown(f"{type(holder).__name__}.{name}", since) from None


def _unknown(name: str, since: str) -> RuntimeError:
    return RuntimeError(
        f"torch {torch.__version__} has no {name}, which polyak needs for sharded weights and which "
        f"torch had since {since}: use a torch version that polyak supports"
    )
