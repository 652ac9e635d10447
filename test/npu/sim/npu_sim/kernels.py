"""Make the real torch_npu compute: every PrivateUse1 kernel of torch_npu runs for real down to the (empty) fake CANN
operators, so its argument checks, shape and dtype inference apply; the values are then computed on the CPU from the
same memory and written to the outputs.  Needs the fake CANN libraries on LD_LIBRARY_PATH and ASCEND_LAUNCH_BLOCKING=1."""
import collections, contextlib, threading, warnings
import torch
from npu_sim.memory import alias, to_cpu, is_npu
from npu_sim.meters import note_call, note_mismatch, read_runtime, charge as account
from npu_sim.references import _handlers

CPU = torch.device('cpu')
_set = torch.ops.aten.set_.source_Storage_storage_offset
_kern = {}
# fake_cann_stat of the fake runtime: 0 device-to-host copies, 2 waits, 3 fp64 tensors at the ACL boundary
_libs = []
_tls = threading.local()
NOREAL = {'aten::bincount'}
HEAVY = {'convolution', '_convolution', 'convolution_backward', 'convolution_overrideable', 'convolution_backward_overrideable', 'mm', 'addmm', 'bmm', 'baddbmm', 'matmul', 'matmul_backward', 'linear', 'npu_conv2d', 'npu_conv2d_backward', 'npu_convolution', 'npu_convolution_backward', 'npu_linear'}

def _npu_tensors(args):
    return [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if is_npu(t)]

def _half_retry(op, args, kw):
    up = lambda x: x.float() if isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16) else ([up(i) for i in x] if isinstance(x, list) else x)
    dts = [x.dtype for x in args if isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16)]
    r = op(*[up(a) for a in args], **{k: up(v) for k, v in kw.items()})
    dn = lambda x: x.to(dts[0]) if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x
    return tuple(map(dn, r)) if isinstance(r, tuple) else dn(r)

SYNC = {'aten::_local_scalar_dense', 'aten::nonzero', 'aten::masked_select', 'aten::_unique2', 'aten::unique_dim', 'aten::unique_consecutive', 'aten::_unique', 'aten::equal', 'aten::nonzero.out', 'aten::bincount', 'aten::masked_select.out','aten::repeat_interleave.Tensor'}
NATIVE = {'aten::empty.memory_format', 'aten::empty_strided', 'aten::_local_scalar_dense', 'aten::resize_', 'aten::record_stream', 'aten::is_pinned', 'aten::_pin_memory', 'aten::is_set_to', 'aten::_resize_output_', 'aten::_copy_from_and_resize', 'aten::new_empty_strided', 'aten::empty_like', 'npu::npu_change_data_ptr', 'npu::get_npu_format', 'npu::get_storage_size', 'npu::_npu_storage_resize','npu::copy_memory_', 'npu::_allocate_swapped_memory'}

AUTOGRAD = {'aten::one_hot', 'aten::argsort', 'aten::argsort.stable', 'aten::contiguous', 'aten::where', 'aten::repeat_interleave.self_int', 'aten::repeat_interleave.self_Tensor'}

def make(name, schema, kern=None):
    mut_pos = [i for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]
    mut_names = {schema.arguments[i].name for i in mut_pos}
    mut_pos = set(mut_pos)
    fresh = [i for i, r in enumerate(schema.returns) if not r.alias_info]
    ns, rest = name.split('::'); base, _, ov = rest.partition('.')
    op = getattr(getattr(getattr(torch.ops, ns), base), ov or 'default')
    nret = len(schema.returns)
    tens = {i for i, a in enumerate(schema.arguments) if str(a.type) in ('Tensor', 'Optional[Tensor]')}
    is_npu_ns = ns == 'npu'
    def write(out, c):
        if isinstance(out, (list, tuple)):
            return type(out)(write(o, ci) for o, ci in zip(out, c))
        if not isinstance(out, torch.Tensor) or c is None: return out if c is None else c
        if out.shape != c.shape:
            if name not in SYNC: note_mismatch(f'{name} shape {tuple(out.shape)} != cpu {tuple(c.shape)}')
            new = torch.empty_strided(c.size(), c.stride(), dtype=out.dtype, device=out.device) if c.numel() else torch.empty(c.size(), dtype=out.dtype, device=out.device)
            if c.numel(): alias(new).copy_(c)
            return new
        if out.dtype != c.dtype: note_mismatch(f'{name} dtype {out.dtype} != cpu {c.dtype}')
        if out.numel(): alias(out).copy_(c)
        return out
    def impl(ks, *args, **kw):
        note_call(name, _npu_tensors(args))
        depth = getattr(_tls, 'd', 0)
        if depth and base in HEAVY: return (kern or _kern[name]).call_boxed(ks, *args, **kw)      # inside another kernel, whose outputs are overwritten
        cargs = [to_cpu(a, i in mut_pos) for i, a in enumerate(args)]
        ckw = {k: to_cpu(v, k in mut_names) for k, v in kw.items()}
        if 'pin_memory' in ckw: ckw['pin_memory'] = None
        h = _handlers.get(name)
        if h is None and is_npu_ns:
            if not depth: raise NotImplementedError(f'no reference implementation for {name}')
            return (kern or _kern[name]).call_boxed(ks, *args, **kw)      # a helper inside another kernel, whose outputs are overwritten
        try: cout = _half_retry(h or op, cargs, ckw) if base in HEAVY and any(isinstance(a, torch.Tensor) and a.dtype in (torch.float16, torch.bfloat16) for a in cargs) else (h or op)(*cargs, **ckw)
        except (RuntimeError, NotImplementedError) as e:
            if h is None and ('not implemented for' in str(e) or 'Half' in str(e)): cout = _half_retry(op, cargs, ckw)
            else: cout = e
        if any(isinstance(a, (int, float)) for i, a in enumerate(args) if i in tens):     # a wrapped number arrives unwrapped
            ref = next((a for a in args if isinstance(a, torch.Tensor)), None)
            args = [torch.tensor(a, dtype=torch.result_type(ref, a)) if i in tens and isinstance(a, (int, float)) else a for i, a in enumerate(args)]
        _tls.d = depth + 1; before = None if depth else read_runtime()
        try: out = cout if name in NOREAL else (kern or _kern[name]).call_boxed(ks, *args, **kw)
        finally: _tls.d = depth
        if not depth: account(name, before)
        if name in NOREAL: return cout.npu()
        if isinstance(cout, Exception): raise cout
        for i in mut_pos:
            if i < len(args): _back(args[i], cargs[i])
        for k in mut_names:
            if k in kw: _back(kw[k], ckw[k])
        if nret == 0: return None
        if nret == 1: return write(out, cout) if fresh else out
        return tuple(write(o, c) if i in fresh and (name, i) not in OPAQUE else o for i, (o, c) in enumerate(zip(out, cout)))
    def _back(dst, src):
        if isinstance(dst, (list, tuple)):
            for d, s in zip(dst, src): _back(d, s)
        elif isinstance(dst, torch.Tensor) and dst.numel():
            if dst.shape != src.shape: note_mismatch(f'{name} out shape {tuple(dst.shape)} != cpu {tuple(src.shape)}'); dst.resize_(src.shape)
            (alias(dst) if dst.device.type == 'npu' else dst).copy_(src)
        if isinstance(dst, torch.Tensor) and dst.dtype != src.dtype: note_mismatch(f'{name} out dtype')
    return impl

# outputs whose layout on the NPU is private (int8 masks, packed bits): left as torch_npu allocates them
OPAQUE = {('aten::max_pool2d_with_indices', 1), ('aten::native_dropout', 1), ('npu::_npu_dropout', 1)}

def install(skip=()):
    H = torch._C._dispatch_has_kernel_for_dispatch_key
    libs = {}
    schemas = {}
    for s in torch._C._jit_get_all_schemas():
        n = s.name + ('.' + s.overload_name if s.overload_name else '')
        if n.split('::')[0] in ('aten', 'npu') and n not in NATIVE: schemas[n] = s
    count = 0
    for n, s in sorted(schemas.items()):
        if not (torch._C._dispatch_has_kernel(n) and H(n, 'PrivateUse1')): continue
        if any(r.alias_info and not r.alias_info.is_write for r in s.returns): continue        # views
        if n.startswith('aten::set_') or not any('Tensor' in str(a.type) for a in list(s.arguments) + list(s.returns)): continue
        if any(str(a.type) in ('Storage', 'Stream') for a in s.arguments): continue
        ns, rest = n.split('::')
        if ns not in libs: libs[ns] = torch.library.Library(ns, 'IMPL')
        try: _kern[n] = torch.library.get_kernel(n, 'PrivateUse1')
        except Exception as e: print('no kernel', n, e); continue
        libs[ns].impl(rest, make(n, s), 'PrivateUse1', with_keyset=True, allow_override=True)
        count += 1
        # composite ops torch_npu replaces outright are registered (and run) at the autograd key as well
        if n in AUTOGRAD and H(n, 'AutogradPrivateUse1'):
            k = torch.library.get_kernel(n, 'AutogradPrivateUse1'); libs[ns].impl(rest, make(n, s, k), 'AutogradPrivateUse1', with_keyset=True, allow_override=True)
    k = torch.library.get_kernel('aten::_local_scalar_dense', 'PrivateUse1')
    def item(ks, x):
        before = read_runtime(); note_call('aten::_local_scalar_dense', [x]); r = k.call_boxed(ks, x)
        if not getattr(_tls, 'd', 0): account('aten::_local_scalar_dense', before)
        return r
    libs['aten'].impl('_local_scalar_dense', item, 'PrivateUse1', with_keyset=True, allow_override=True)
    _libs.append(libs)
    return count

