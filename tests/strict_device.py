"""A device made of wrapped CPU tensors that computes like a CPU and refuses what makes a host wait for a real one.

Refused inside `no_waiting()`: reading a value back, results whose size depends on values, copies that are not
non_blocking or not from or to page-locked memory. Refused always: tensors of host and device in one operation. Triton's
kernels run on it in the interpreter. It takes the place of torch's one backend for devices that torch does not know, so
it is to be used in a process of its own.
"""

import contextlib

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("strict")
DEVICE = torch.device("strict", 0)
aten = torch.ops.aten
READ_BACK = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
SIZED_BY_VALUES = {
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
    aten.repeat_interleave.Tensor, aten.bincount.default,
}  # fmt: skip
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
MASKS = (torch.bool, torch.uint8)
MIXES = {aten.copy_.default, aten._to_copy.default}


class Waits(AssertionError):
    """The host would wait for the device."""


class Mixed(AssertionError):
    """Tensors of host and device in one operation."""


class Strict(torch.Tensor):
    """What lies on the device."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def data_ptr(self):
        return self.inner.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of StrictMode")


class StrictMode(TorchDispatchMode):
    """Everything on DEVICE, or moved there, is computed here."""

    def __init__(self):
        super().__init__()
        self.may_wait = True
        self.pinned = set()  # addresses of page-locked storages

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **kwargs)
        flat = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        strict = any(isinstance(x, Strict) for x in flat)
        target = kwargs.get("device")
        here = strict if target is None else torch.device(target).type == DEVICE.type
        self._check(func, args, kwargs, flat, here)
        pinned = kwargs.get("pin_memory")
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        if here and target is not None:
            kwargs["device"] = torch.device("cpu")
        inner = pytree.tree_map_only(Strict, lambda x: x.inner, (args, kwargs))
        out = func(*inner[0], **inner[1])
        if pinned:
            self.pinned.add(out.untyped_storage().data_ptr())
        if _writes_first(func):
            return args[0]
        if not here:
            return out
        return pytree.tree_map_only(torch.Tensor, Strict, out)

    def _check(self, func, args, kwargs, flat, here):
        host = [x for x in flat if not isinstance(x, Strict) and x.dim()]
        device = [x for x in flat if isinstance(x, Strict)]
        if func not in MIXES and host and device:
            shapes = [[tuple(x.shape) for x in each] for each in (host, device)]
            raise Mixed(f"{func} of {shapes[0]} on the host and {shapes[1]} on the device")
        if self.may_wait:
            return
        if device and func in READ_BACK | SIZED_BY_VALUES:
            raise Waits(str(func))
        if device and func in INDEXED and any(x is not None and x.dtype in MASKS for x in args[1]):
            raise Waits(f"{func} with a mask")
        if func in MIXES:
            self._check_copy(func, args, kwargs, flat, here)

    def _check_copy(self, func, args, kwargs, flat, here):
        if func is aten.copy_.default:
            target, source = args[:2]
            crosses = isinstance(target, Strict) != isinstance(source, Strict)
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            of_host = source if isinstance(target, Strict) else target
        else:
            crosses = isinstance(args[0], Strict) != here
            non_blocking, of_host = kwargs.get("non_blocking", False), None if isinstance(args[0], Strict) else args[0]
        if not crosses or (of_host is not None and not of_host.numel()):
            return
        if not non_blocking:
            raise Waits(f"a copy of {tuple(args[0].shape)} that is not non_blocking")
        if of_host is None or of_host.untyped_storage().data_ptr() not in self.pinned:
            raise Waits(f"a copy of {tuple(args[0].shape)} between the device and memory that is not page-locked")

    @contextlib.contextmanager
    def no_waiting(self):
        self.may_wait = False
        try:
            yield
        finally:
            self.may_wait = True


make = torch.tensor


def make_on_host_first(data, *, device=None, **options):
    """As torch does it, which for this device it cannot."""
    made = make(data, **options)
    return made if device is None else made.to(device)


torch.tensor = make_on_host_first


def _writes_first(func):
    schema = func._schema
    first = schema.arguments[0] if schema.arguments else None
    return first is not None and first.alias_info is not None and first.alias_info.is_write and len(schema.returns) == 1


def run_kernels_here():
    """Triton's interpreter takes what lies on DEVICE as it takes CPU tensors."""
    from triton.runtime import interpreter

    call = interpreter.GridExecutor.__call__

    def unwrapped(executor, *args, **options):
        bare = pytree.tree_map_only(Strict, lambda x: x.inner, (args, options))
        with torch._C._DisableTorchDispatch():
            return call(executor, *bare[0], **bare[1])

    interpreter.GridExecutor.__call__ = unwrapped
