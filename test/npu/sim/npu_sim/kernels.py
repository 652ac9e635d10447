"""Make the real torch_npu compute: each of its kernels is wrapped by one that fills in the values.

Lives here: which kernels are wrapped, and what a wrapper does. The operators in the fake CANN libraries are empty, so a
real kernel of torch_npu checks its arguments, infers shapes and dtypes, allocates results, and leaves them unwritten.
The wrapper computes the same operator with the CPU kernel on the same memory, calls the real kernel, compares shape and
dtype, and copies the values in. Operators without a CPU kernel have theirs in references.py.
Must not live here: what an operator computes.

Both calls use public interfaces: `torch.library.get_kernel` for the kernel below, `Library.impl(allow_override=True)`
for the one above it.

Limits: a kernel that decides on the host by a value its own unwrapped helpers should have computed decides by what lay
in memory. Random numbers come from the CPU's generator. Private memory layouts (NC1HWC0) count as plain ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from npu_sim import queues, references, rounding, runtime, saturation, ties
from npu_sim.memory import alias, is_npu, npu_tensors, to_cpu
from npu_sim.meters import charge, note_call, note_mismatch

# Kernels that do their whole work on the fake device, and are left alone: they allocate (and leave memory unwritten,
# which should show), pin, describe or exchange memory, or ask the flag that the fake CANN keeps.
REAL = {
    "aten::empty.memory_format",
    "aten::empty_strided",
    "aten::empty_like",
    "aten::new_empty_strided",
    "aten::resize_",
    "aten::is_pinned",
    "aten::_pin_memory",
    "aten::is_set_to",
    "npu::npu_change_data_ptr",
    "npu::get_npu_format",
    "npu::get_storage_size",
    "npu::npu_get_float_status",
    "npu::npu_clear_float_status",
}
# Results whose shape may differ without being a mismatch. Where it depends on values, the real kernel returns the
# largest possible one; log_sigmoid's second result is a buffer for the CPU's backward that the NPU leaves empty.
SHAPE_MAY_DIFFER = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::index.Tensor",
    "aten::log_sigmoid_forward",
}
# Their kernels take the result's size from values that helpers inside them should have computed: refused.
REFUSED = {"aten::bincount", "aten::repeat_interleave.self_Tensor"}
# Results in a layout of torch_npu's own (a mask). They stay as allocated, and nothing here reads them.
PRIVATE_RESULTS = {("aten::max_pool2d_with_indices", 1)}
_libraries: dict[str, torch.library.Library] = {}  # a Library takes its kernels back when it is collected
_thread = threading.local()  # .depth: how many wrapped kernels this thread is inside


class Wrapper:
    """The kernel that takes the place of torch_npu's for one operator.

    Args:
        schema: the operator's.
        kernel: torch_npu's.
    """

    def __init__(self, schema: torch.FunctionSchema, kernel: Any) -> None:
        self.name = _full_name(schema)
        self.kernel = kernel
        namespace, _, base = schema.name.partition("::")
        self.reference: Callable | None = references.REFERENCES.get(self.name)
        if self.reference is None and _has_cpu_kernel(self.name):
            self.reference = getattr(getattr(getattr(torch.ops, namespace), base), schema.overload_name or "default")
        # Products over large tensors. Inside another kernel their values are not computed: that kernel's results are
        # written afterwards anyway, and no kernel reads these to decide. It saves computing every convolution twice.
        # And in half precision they are computed in float32 and rounded once, as the device's cube unit does (and the
        # CPU faster).
        self.base = base
        self.is_product = base in rounding.PRODUCTS
        arguments = schema.arguments
        self.written = {
            i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write
        }
        self.written_names = {arguments[i].name for i in self.written}
        self.tensor_positions = {
            i for i, argument in enumerate(arguments) if str(argument.type) in ("Tensor", "Optional[Tensor]")
        }
        self.gives_tensors = all("Tensor" in str(result.type) for result in schema.returns)
        self.fresh = [result.alias_info is None for result in schema.returns]  # not one of the arguments

    def __call__(self, keyset: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        inside = getattr(_thread, "depth", 0) > 0
        if inside and (self.is_product or self.reference is None):
            return self.kernel.call_boxed(keyset, *args, **kwargs)
        if self.name in REFUSED:
            raise NotImplementedError(
                f"the simulated NPU cannot run {self.name}: the size of its result depends on "
                "values. It would make the host wait; better do without it."
            )
        tensors = npu_tensors((args, kwargs))
        if not inside:
            note_call(self.name, tensors)
        device = tensors[0].device.index if tensors else None
        before = runtime.counts()
        if runtime.is_lazy():
            result = self._call_lazily(keyset, args, kwargs, tensors, inside)
        else:
            computed = self._evaluate(args, kwargs, {tensor.dtype for tensor in tensors}, device, inside)
            # The computed error after the real kernel, whose own complaint would be the better one.
            result = self._write(self._call_real(keyset, args, kwargs), args, kwargs, computed)
        if not inside:
            charge(self.name, before, sum(t.dtype == torch.float64 for t in (*tensors, *npu_tensors(result))))
        return result

    def _call_lazily(
        self, keyset: torch.DispatchKeySet, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor], inside: bool
    ) -> Any:
        """Put the values into the stream's queue, in two entries: kernels called by the real one come in between."""
        device = tensors[0].device.index if tensors else torch.npu.current_device()
        stream = queues.current_stream(device)
        found_args, found_kwargs = queues.at_address(list(args)), {k: queues.at_address(v) for k, v in kwargs.items()}
        dtypes, computed = {tensor.dtype for tensor in tensors}, []

        def compute() -> None:
            computed.extend(self._evaluate(found_args, found_kwargs, dtypes, device if tensors else None, inside))

        queues.queue(stream, compute)
        reads_values = self.name in SHAPE_MAY_DIFFER or not self.gives_tensors
        if reads_values:
            runtime.run_stream(stream)
        waits = runtime.counts().waits
        result = self._call_real(keyset, args, kwargs)
        if reads_values:
            queues.raise_errors()
            return self._write(result, args, kwargs, computed)
        written_args, written_kwargs = (
            queues.at_address(list(args)),
            {k: queues.at_address(v) for k, v in kwargs.items()},
        )
        for i in self.written & set(range(len(args))):  # what is not pinned the host has waited for
            written_args[i] = to_cpu(args[i])
        written_kwargs |= {name: to_cpu(kwargs[name]) for name in self.written_names & kwargs.keys()}
        places = to_cpu(result)

        queues.queue(stream, lambda: self._write(places, written_args, written_kwargs, computed))
        if runtime.counts().waits > waits:
            runtime.run_stream(stream)
            queues.raise_errors()
        return result

    def _evaluate(self, args: Sequence, kwargs: dict[str, Any], dtypes: set, device: int | None, inside: bool) -> tuple:
        """Return the CPU's results, or the error it raises, and the arguments they were computed from and into."""
        cpu_args = [to_cpu(arg, copy=i in self.written) for i, arg in enumerate(args)]
        cpu_kwargs = {name: to_cpu(arg, copy=name in self.written_names) for name, arg in kwargs.items()}
        values = self._compute(cpu_args, cpu_kwargs, device)
        if runtime.saturates() and not inside and not isinstance(values, Exception):
            written = [cpu_args[i] for i in self.written if i < len(cpu_args)]
            saturation.saturate(self.name, dtypes, device, values, written)
        return values, cpu_args, cpu_kwargs

    def _write(self, result: Any, args: Sequence, kwargs: dict[str, Any], computed: Sequence) -> Any:
        """Write what `_evaluate` gave into arguments and results, and return the results; or raise its error."""
        values, cpu_args, cpu_kwargs = computed
        if isinstance(values, Exception):
            raise values
        for i in self.written:
            if i < len(args):
                self._write_back(args[i], cpu_args[i])
        for name in self.written_names & kwargs.keys():
            self._write_back(kwargs[name], cpu_kwargs[name])
        return self._fill(result, values)

    def _compute(self, args: list, kwargs: dict[str, Any], device: int | None) -> Any:
        """Return the CPU's results, or the error it raises."""
        args = rounding.round_arguments(self.base, args, device)
        args, order = ties.shuffle(self.base, args, kwargs)
        if self.reference is None:
            return NotImplementedError(f"the simulated NPU has no reference implementation of {self.name}")
        try:
            if self.is_product and references.has_half(args):
                return references.in_float32(self.reference, args, kwargs)
            result = rounding.round_result(self.base, self.reference(*args, **kwargs), device)
            return ties.unshuffle(result, order)
        except (RuntimeError, NotImplementedError) as error:
            if "not implemented for" in str(error):  # in half precision the CPU lacks what the device has
                return ties.unshuffle(references.in_float32(self.reference, args, kwargs), order)
            return error

    def _call_real(self, keyset: torch.DispatchKeySet, args: tuple, kwargs: dict[str, Any]) -> Any:
        # A number in a tensor's place (x + 1.5) reaches a Python kernel as a plain number; a C++ kernel wants a tensor.
        first = next((arg for arg in args if isinstance(arg, Tensor)), None)
        args = [
            torch.tensor(arg, dtype=torch.result_type(first, arg))
            if i in self.tensor_positions and isinstance(arg, (int, float))
            else arg
            for i, arg in enumerate(args)
        ]
        _thread.depth = getattr(_thread, "depth", 0) + 1
        try:
            return self.kernel.call_boxed(keyset, *args, **kwargs)
        finally:
            _thread.depth -= 1

    def _write_back(self, argument: Any, value: Any) -> None:
        """Write an argument that the operator changes in place, or its `out`."""
        if isinstance(argument, (list, tuple)):
            for one, its_value in zip(argument, value, strict=True):
                self._write_back(one, its_value)
        elif isinstance(argument, Tensor):
            if self._differs("out", argument, value):
                argument.resize_(value.shape)
            (alias(argument) if is_npu(argument) else argument).copy_(value)

    def _fill(self, result: Any, values: Any) -> Any:
        """Copy the values into the real kernel's results; return the results."""
        if len(self.fresh) == 1:
            return self._fill_one(result, values) if self.fresh[0] else result
        if not self.fresh:
            return None
        return tuple(
            self._fill_one(one, value) if fresh and (self.name, i) not in PRIVATE_RESULTS else one
            for i, (one, value, fresh) in enumerate(zip(result, values, self.fresh, strict=True))
        )

    def _fill_one(self, result: Any, value: Any) -> Any:
        if isinstance(result, (list, tuple)):
            return type(result)(self._fill_one(one, its) for one, its in zip(result, value, strict=True))
        if not isinstance(result, Tensor):
            return result if value is None else value
        if value is None or not value.numel():  # nothing wanted, or statistics the CPU does without
            return result
        if self._differs("result", result, value):
            if not is_npu(result):  # an address of the lazy mode
                raise RuntimeError(f"{self.name}: in lazy mode a result cannot get another shape, {value.shape}")
            result = torch.empty(value.shape, dtype=result.dtype, device=result.device)
        elif any(size > 1 and stride == 0 for size, stride in zip(result.shape, result.stride(), strict=True)):
            # An expanded result has no place for each value.
            result = torch.empty_like(result, memory_format=torch.contiguous_format)
        (alias(result) if is_npu(result) else result).copy_(value)
        return result

    def _differs(self, what: str, real: Tensor, value: Tensor) -> bool:
        """Tell whether the shapes differ; count shapes and dtypes that should be equal and are not."""
        if real.dtype != value.dtype:
            note_mismatch(f"{self.name}: {what} is {real.dtype}, on the CPU {value.dtype}")
        if real.shape != value.shape and self.name not in SHAPE_MAY_DIFFER:
            note_mismatch(f"{self.name}: {what} has shape {tuple(real.shape)}, on the CPU {tuple(value.shape)}")
        return real.shape != value.shape


def install() -> int:
    """Wrap torch_npu's kernels; return how many."""
    count = 0
    for schema in torch._C._jit_get_all_schemas():
        name = _full_name(schema)
        if not _is_wrapped(name, schema):
            continue
        for key in ("PrivateUse1", "AutogradPrivateUse1") if _replaced_at_autograd(name) else ("PrivateUse1",):
            namespace, _, rest = name.partition("::")
            library = _libraries.setdefault(namespace, torch.library.Library(namespace, "IMPL"))
            library.impl(
                rest, Wrapper(schema, torch.library.get_kernel(name, key)), key, with_keyset=True, allow_override=True
            )
            count += 1
    return count


def _is_wrapped(name: str, schema: torch.FunctionSchema) -> bool:
    if not name.startswith(("aten::", "npu::")) or name in REAL or not torch._C._dispatch_has_kernel(name):
        return False
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1"):
        return False
    is_view = any(result.alias_info and not result.alias_info.is_write for result in schema.returns)
    types = [str(argument.type) for argument in (*schema.arguments, *schema.returns)]
    about_storage = any(kind in ("Storage", "Stream") for kind in types) or name.startswith("aten::set_")
    return not is_view and not about_storage and any("Tensor" in kind for kind in types)


def _has_cpu_kernel(name: str) -> bool:
    keys = ("CPU", "CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)


def _replaced_at_autograd(name: str) -> bool:
    """Tell whether torch_npu's kernel at the autograd key does the work itself, past the one at the device's key.

    So it is with some composite operators (one_hot, argsort, where). The others at that key, from generated files named
    VariableType, add a derivative and call on. Where a kernel was registered is known from the dispatcher's dump only.
    """
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutogradPrivateUse1"):
        return False
    lines = torch._C._dispatch_dump(name).splitlines()
    return any(line.startswith("AutogradPrivateUse1") and "RegisterAutogradNPU" in line for line in lines)


def _full_name(schema: torch.FunctionSchema) -> str:
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
