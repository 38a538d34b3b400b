"""Accounting of device memory without a device: every storage of a fake tensor is counted from its birth to its end."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

BLOCK = 512
"""Bytes to which CUDA's allocator rounds."""
REST = "activations and temporaries"


def _leaves(x: Any) -> Iterator[Any]:
    """Arguments or results of an operator. torch's pytree gives them too, in a multiple of the time."""
    if isinstance(x, tuple | list | dict):
        for y in x.values() if isinstance(x, dict) else x:
            yield from _leaves(y)
    else:
        yield x


class Peak(NamedTuple):
    """Largest number of bytes that lived at once in a phase, and the bytes of each part at that time."""

    bytes: int
    parts: dict[str, int]


class Ledger(TorchDispatchMode):
    """Counts the storages of fake tensors while it is active, by part (`part`, `label`), and the peak of each phase.

    No number of a fake tensor is known: what the host reads (`item`) is 1 or True, so that what code checks of its
    numbers holds, and `nonzero` finds all of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Peak] = {}
        self._phase, self._part = "", REST
        self._known: dict[int, list[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for at almost every operator
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        given = [x for x in _leaves((args, kwargs)) if isinstance(x, Tensor | torch.Generator)]
        if given and not any(isinstance(x, FakeTensor) for x in given):
            with unset_fake_temporarily():  # keyed draws, tables and numbers of the host
                return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.nonzero.default:  # of a fake tensor all values count as not 0
            with unset_fake_temporarily():
                indices = torch.ones(args[0].shape).nonzero()
            out = self.fake.from_tensor(indices)
        else:
            out = func(*args, **(kwargs or {}))
        for x in _leaves(out):
            self.add(x)
        return out

    def add(self, x: Any) -> None:
        """Count the storage of a fake tensor, unless it is counted already."""
        if not isinstance(x, FakeTensor):
            return
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        entry = self._known[key] = [self._part, -(-storage.nbytes() // BLOCK) * BLOCK]
        self.live[self._part] += entry[1]
        weakref.finalize(storage, self._end, key)
        peak, total = self.peaks.get(self._phase), self.live.total()
        if self._phase and (peak is None or total > peak.bytes):
            self.peaks[self._phase] = Peak(total, dict(self.live))

    def _end(self, key: int) -> None:
        part, size = self._known.pop(key)
        self.live[part] -= size

    def label(self, tensors: Iterable[Any], part: str) -> None:
        """Move storages to another part."""
        for x in tensors:
            entry = self._known.get(x.untyped_storage()._cdata) if isinstance(x, Tensor) else None
            if entry:
                self.live[entry[0]] -= entry[1]
                self.live[part] += entry[1]
                entry[0] = part

    @contextmanager
    def imagining(self, part: str | None = None) -> Iterator[None]:
        """Context in which new tensors are fake, and those of this part if it is given."""
        before, self._part = self._part, part or self._part
        try:
            with self.fake, self:
                yield
        finally:
            self._part = before

    def phase(self, name: str) -> None:
        """Begin a phase."""
        self._phase = name
        self.peaks[name] = Peak(self.live.total(), dict(self.live))

    def faked(self, module: Any, part: str) -> Any:
        """The module with fake tensors in place of its real ones."""
        with self.imagining(part):
            for inner in module.modules():
                for own in (inner._parameters, inner._buffers):
                    for name, x in own.items():
                        if isinstance(x, Tensor) and not isinstance(x, FakeTensor):
                            found: Any = self.fake.from_tensor(x.detach())
                            self.add(found)
                            own[name] = nn.Parameter(found, x.requires_grad) if isinstance(x, nn.Parameter) else found
        return module


def replaced(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` that replaces parameters: torch cannot convert fake ones in place."""
    for child in self.children() if recurse else ():
        child._apply(function)
    for name, x in self._parameters.items():
        if x is not None:
            with torch.no_grad():
                new = function(x)
            self._parameters[name] = x if new is x else nn.Parameter(new, x.requires_grad)
    for name, buffer in self._buffers.items():
        self._buffers[name] = None if buffer is None else function(buffer)
    return self
