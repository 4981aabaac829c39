"""A device without a GPU: tensors that say they are on CUDA, and compute on the CPU.

The rules are CUDA's.  An operation takes tensors of one device; a number (0-dim) on the CPU may be among those on
CUDA, and so may an index, which the host waits for.  Everything else raises :class:`MixedDevicesError`.  What makes
the host wait is noted, with the place: values that are read, copies that are not from pinned memory and without
waiting, shapes that depend on values.

Not seen: what kernels of CUDA compute differently, memory, streams, and whether a copy without waiting has arrived.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
HERE = Path(__file__).parent
WAITING = {
    "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "masked_select", "nonzero",
    "repeat_interleave", "unique_consecutive", "unique_dim",
}  # fmt: skip
"""Operations whose value, or shape, the host has to know."""
INDEXING = {"_index_put_impl_", "_unsafe_index", "index", "index_put", "index_put_"}


class MixedDevicesError(RuntimeError):
    """Tensors of two devices in one operation."""


class OnDevice(torch.Tensor):
    """A tensor on the device; ``own`` is where it really is."""

    own: torch.Tensor

    @staticmethod
    def __new__(cls, own):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            own.size(),
            strides=own.stride(),
            storage_offset=own.storage_offset(),
            dtype=own.dtype,
            device="cuda:0",
        )
        tensor.own = own
        return tensor

    def __repr__(self):
        return f"OnDevice({self.own!r})"

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} of a tensor that is on the stand-in, which is closed")


class Device(TorchDispatchMode):
    """The device, while it is open.

    Attributes:
        waits: what the host waited for, each as (file, function, operation); of all frames on the way the innermost
            that is the package's own.

    Args:
        package: the folder whose frames are told.
    """

    def __init__(self, package: str = "/nap_decode/") -> None:
        super().__init__()
        self.package, self.waits = package, []

    def __enter__(self):
        self._patches = [
            mock.patch.object(torch.cuda, "_lazy_init"),
            mock.patch.object(torch.Tensor, "pin_memory", _pinned),
        ]
        for patch in self._patches:
            patch.start()
        torch._C._set_only_lift_cpu_tensors(True)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a module's own cannot change their class
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch._C._set_only_lift_cpu_tensors(False)
        for patch in self._patches:
            patch.stop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = kwargs.get("device")
        goes_there = given is not None and torch.device(given).type == "cuda"
        leaves: list[torch.Tensor] = []
        _mapped((*args, *kwargs.values()), lambda x: leaves.append(x) if isinstance(x, torch.Tensor) else None)
        if name in ("_to_copy", "_pin_memory"):
            return self._copied(func, args[0], kwargs, goes_there or (given is None and _is_there(args[0])))
        if name == "copy_":
            target, source = args[:2]
            if _is_there(target) != _is_there(source):
                self._note_copy(source, _is_there(target), len(args) > 2 and args[2])
            _own(target).copy_(_own(source))
            return target
        if not goes_there and not any(map(_is_there, leaves)):
            return func(*args, **kwargs)
        if name == "_fused_sdp_choice":
            return 0  # the one without a kernel of its own
        self._check(name, args, leaves)
        return self._called(func, args, kwargs, on_device=given is None or goes_there)

    def _check(self, name: str, args: tuple[Any, ...], leaves: list[torch.Tensor]) -> None:
        """Raise for tensors of two devices; note what waits."""
        indices = [i for i in args[1] if i is not None] if name in INDEXING else []
        there = list(map(_is_there, leaves))
        for leaf in leaves:
            if any(there) and not _is_there(leaf) and leaf.ndim:
                if not (_is_there(args[0]) and any(leaf is index for index in indices)):
                    sizes = ", ".join(f"{tuple(one.shape)} on {one.device}" for one in leaves)
                    raise MixedDevicesError(f"{name} of tensors on two devices: {sizes}")
                self._note(f"{name} with an index on the host")
        if name in WAITING:
            self._note(name)
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            self._note(f"{name} by a mask")
        # Otherwise it compares all with all.
        if name == "isin" and len(leaves) == 2 and leaves[1].numel() >= 10 * leaves[0].numel() ** 0.145:
            self._note("isin by sorting")

    def _copied(self, func: Any, source: torch.Tensor, kwargs: dict[str, Any], on_device: bool) -> torch.Tensor:
        if _is_there(source) != on_device:
            self._note_copy(source, on_device, kwargs.get("non_blocking"))
        options = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "pin_memory")}
        own = _own(source)
        copy = func(own, **options)
        if copy is own or (copy.numel() and copy.data_ptr() == own.data_ptr()):
            copy = copy.clone()
        return OnDevice(copy) if on_device else copy

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], on_device: bool) -> Any:
        """What it returns on the CPU, brought back."""
        options = {name: _mapped(value, _real) for name, value in kwargs.items() if name != "pin_memory"}
        result = func(*_mapped(args, _real), **options)
        written = [
            args[i] if i < len(args) else kwargs[argument.name]
            for i, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if written and len(func._schema.returns) == 1:
            return written[0]  # the tensor itself, not one beside it
        return _mapped(result, lambda x: OnDevice(x) if on_device and type(x) is torch.Tensor else x)

    def _note_copy(self, source: torch.Tensor, to_device: bool, non_blocking: Any) -> None:
        if not (non_blocking and to_device and getattr(source, "is_pinned_here", False)):
            self._note(f"copy of {tuple(source.shape)} {'to' if to_device else 'from'} the device")

    def _note(self, what: str) -> None:
        frame = sys._getframe(1)
        while frame is not None and (
            self.package not in frame.f_code.co_filename or frame.f_code.co_filename == __file__
        ):
            frame = frame.f_back
        code = None if frame is None else frame.f_code
        self.waits.append(
            ("", "", what) if code is None else (code.co_filename.split(self.package)[-1], code.co_name, what)
        )


def why_not() -> str | None:
    """Why there is no such device here; None if there is."""
    if torch.cuda.is_available():
        return "there is a GPU"
    try:
        _load_guard()
        with Device() as device:
            ones = torch.ones(2, device="cuda")
            is_well = ones.sum().item() == 2 and len(device.waits) == 1
    except (OSError, subprocess.CalledProcessError, AttributeError, RuntimeError) as error:
        return f"no stand-in for a device here: {error}"
    return None if is_well else "this torch does not do what the stand-in for a device needs"


@functools.cache
def _load_guard() -> None:
    """Build and load a device guard for CUDA; a CUDA build of torch has one of its own."""
    if torch.version.cuda is not None:
        return
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "guard.so")
        include, flags = f"-I{root / 'include'}", ["-shared", "-fPIC", "-std=c++20", "-O0"]
        command = ["g++", *flags, include, str(HERE / "guard.cpp"), "-o", str(library), f"-L{root / 'lib'}", "-lc10"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            raise OSError(error.stderr[-500:]) from error
        torch.ops.load_library(str(library))


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """What an operation takes or returns, with everything in it exchanged."""
    if isinstance(value, list | tuple):
        return type(value)([_mapped(one, function) for one in value])
    return function(value)


def _is_there(tensor: Any) -> bool:
    return isinstance(tensor, OnDevice)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.own if isinstance(tensor, OnDevice) else tensor


def _real(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return _own(value)


def _pinned(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    pinned = tensor.clone()
    pinned.is_pinned_here = True
    return pinned
