"""Tensors of a file of torch.save, before they are read."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from polyak._lazy import Elements, Place, TensorSpec
from polyak.checkpoints._open.files import FileSpan
from polyak.checkpoints._torch_save.pickles import Inert


class Storage(Inert):
    """A storage as a pickle describes it, and its place in the file once that is known."""

    __slots__ = ("archive", "dtype", "key", "nbytes", "span")

    def __init__(self, key: str, nbytes: int, dtype: torch.dtype) -> None:
        self.key = key
        self.nbytes = nbytes
        self.dtype = dtype
        self.span: FileSpan
        self.archive: tuple[int, int] | None = None


class StoredTensor(Inert):
    """A tensor of a file of torch.save, before it is read."""

    __slots__ = ("_flags", "_offset", "_storage", "_stride", "spec")

    def __init__(
        self,
        spec: TensorSpec,
        storage: Storage,
        offset: int,
        stride: tuple[int, ...],
        flags: Mapping[str, bool],
    ) -> None:
        self.spec = spec
        self._storage = storage
        self._offset = offset
        self._stride = stride
        self._flags = {name for name, is_set in flags.items() if is_set}

    def read(self) -> Tensor:
        """The tensor, a view of the file; its storage is compared with its checksum first."""
        shape, dtype = self.spec
        if self.spec.numel == 0:
            return torch.empty(shape, dtype=dtype)
        holds = TensorSpec((self._storage.nbytes // dtype.itemsize,), dtype)
        tensor = self._storage.span.tensor(holds).as_strided(shape, self._stride, self._offset)
        tensor = tensor.conj() if "conj" in self._flags else tensor
        return torch._neg_view(tensor) if "neg" in self._flags else tensor

    def release(self) -> None:
        """Give back the pages of the storage."""
        if self.spec.numel:
            self._storage.span.release()

    def elements(self) -> Elements | None:
        """The elements, if the tensor fills its storage row by row."""
        shape, dtype = self.spec
        layout = torch.empty_strided(shape, self._stride, dtype=dtype, device="meta")
        fills = self._offset == 0 and self.spec.nbytes == self._storage.nbytes > 0
        plain = fills and layout.is_contiguous() and not self._flags
        return self._storage.span.elements(self.spec) if plain else None

    def place(self) -> Place | None:
        """Where it lies in its file, if its elements are stored as they are."""
        span, archive = self._storage.span, self._storage.archive
        at = Place(span.file.path, span.start, span.nbytes, self._offset, self._stride, (), archive)
        return None if self._flags else at

    @property
    def identity(self) -> Hashable:
        """Equal for tensors with elements that are the same part of the same storage."""
        place = (id(self._storage), self._offset, self.spec, self._stride)
        return place if self.spec.numel else id(self)
