"""What torch_npu's own operators compute, written in plain CPU torch."""
import torch

_handlers = {}


def handler(*names):
    def d(f):
        for n in names:
            _handlers[n if '::' in n else 'npu::' + n] = f
        return f
    return d


# ---- reference semantics of torch_npu's own operators
@handler('npu_dtype_cast', '_npu_dtype_cast')
def _(x, dtype, *a, **k): return x.to(dtype)
@handler('npu_dtype_cast_backward')
def _(g, dtype, *a, **k): return g.to(dtype)
@handler('npu_format_cast', '_npu_format_cast', '_npu_format_cast.aclnn', 'npu_format_cast.Tensor')
def _(x, *a, **k): return x.clone()
@handler('npu_format_cast_')
def _(x, *a, **k): return x
@handler('npu_silu')
def _(x): return torch.nn.functional.silu(x)
@handler('npu_silu_')
def _(x): return x.copy_(torch.nn.functional.silu(x))
@handler('npu_silu_backward')
def _(g, x0, x1): return torch.ops.aten.silu_backward(g, x0)
def _conv(x, w, b, stride, padding, dilation, groups): return torch.ops.aten.convolution(x, w, b, stride, padding, dilation, False, [0] * len(stride), groups)
_handlers['npu::npu_conv2d'] = _handlers['npu::npu_convolution'] = _conv
@handler('npu_conv2d_backward', 'npu_convolution_backward')
def _(x, g, w, stride, padding, dilation, groups, mask): return torch.ops.aten.convolution_backward(g, x, w, [w.shape[0]], stride, padding, dilation, False, [0] * len(stride), groups, mask)
@handler('npu_one_hot')
def _(x, num_classes=-1, depth=1, on_value=1, off_value=0):
    d = num_classes if num_classes != -1 else depth
    r = torch.full((*x.shape, d), float(off_value)); i = x.long(); ok = (i >= 0) & (i < d)
    return r.scatter_(-1, i.clamp(0, d - 1)[..., None], torch.where(ok, float(on_value), float(off_value))[..., None])
@handler('_npu_dropout')
def _(x, p):
    m = torch.rand(x.shape) >= p
    return x * m / (1 - p), torch.zeros((x.numel() + 127) // 128 * 128 // 8, dtype=torch.uint8)
@handler('npu_bmmV2')
def _(a, b, s): return a @ b

@handler('aten::max_pool2d_with_indices_backward')
def _(g, x, k, st, pad, dil, ceil, idx):
    i = torch.ops.aten.max_pool2d_with_indices(x.float(), k, st, pad, dil, ceil)[1]
    return torch.ops.aten.max_pool2d_with_indices_backward(g, x, k, st, pad, dil, ceil, i)
@handler('npu_batch_nms')
def _(boxes, scores, score_thr, iou_thr, max_per_class, max_total, change_coordinate_frame=False, transpose_box=False):
    """boxes [B,N,q,4], scores [B,N,C]; per class greedy NMS, then the best max_total over all classes, zero padded."""
    assert boxes.dim() == 4 and scores.dim() == 3 and boxes.shape[2] in (1, scores.shape[2]), (boxes.shape, scores.shape)
    assert boxes.dtype == scores.dtype and boxes.dtype in (torch.float16, torch.float32) and 1 <= max_per_class <= 1000 and 1 <= max_total <= 1000 and 0 <= iou_thr <= 1 and not transpose_box and not change_coordinate_frame
    dt = boxes.dtype; B, N, C = scores.shape; b = boxes.float(); s = scores.float()
    ob, os_, oc, on = torch.zeros(B, max_total, 4), torch.zeros(B, max_total), torch.zeros(B, max_total), torch.zeros(B, dtype=torch.int32)
    for i in range(B):
        res = []
        for c in range(C):
            bb = b[i, :, min(c, b.shape[2] - 1)]; keep = []
            order = [j for j in torch.argsort(s[i, :, c], descending=True).tolist() if s[i, j, c] > score_thr and bb[j, 2] > bb[j, 0] and bb[j, 3] > bb[j, 1]]
            while order and len(keep) < max_per_class:
                j = order.pop(0); keep.append(j)
                if order:
                    o = bb[order]; lt = torch.maximum(o[:, :2], bb[j, :2]); rb = torch.minimum(o[:, 2:], bb[j, 2:]); wh = (rb - lt).clamp(min=0); inter = wh[:, 0] * wh[:, 1]
                    ar = lambda z: (z[..., 2] - z[..., 0]) * (z[..., 3] - z[..., 1])
                    iou = inter / (ar(o) + ar(bb[j]) - inter).clamp(min=1e-12)
                    order = [q for q, v in zip(order, iou.tolist()) if v <= iou_thr]
            res += [(s[i, j, c].item(), c, bb[j]) for j in keep]
        res.sort(key=lambda r: -r[0]); res = res[:max_total]; on[i] = len(res)
        for k, (sc, c, bx) in enumerate(res): ob[i, k], os_[i, k], oc[i, k] = bx, sc, c
    return ob.to(dt), os_.to(dt), oc.to(dt), on
@handler('npu_clear_float_status')
def _(x, *a): return torch.zeros(8)
@handler('npu_get_float_status')
def _(x, *a): return torch.zeros(8)
@handler('npu_alloc_float_status')
def _(x): return torch.zeros(8)
# ---- synchronised batch norm (torch_npu/utils/syncbatchnorm.py)
def _c(v, x): return v.view(1, -1, *[1] * (x.dim() - 2))
def _red(x): return [d for d in range(x.dim()) if d != 1]
@handler('batch_norm_reduce')
def _(x, eps): return x.float().sum(_red(x)), x.float().square().sum(_red(x))
@handler('batch_norm_gather_stats_update')
def _(x, s, sq, rm, rv, momentum, eps, counts):
    n = counts.sum(); mean = s.sum(0) / n; var = sq.sum(0) / n - mean ** 2
    if rm is not None: rm.mul_(1 - momentum).add_(mean, alpha=momentum); rv.mul_(1 - momentum).add_(var * n / (n - 1), alpha=momentum)
    return mean, (var + eps).rsqrt()
@handler('aten::batch_norm_elemt')
def _(x, w, b, mean, invstd, eps):
    y = (x.float() - _c(mean, x)) * _c(invstd, x)
    return (y * _c(w, x) + _c(b, x) if w is not None else y).to(x.dtype)
@handler('aten::batch_norm_backward_reduce')
def _(g, x, mean, invstd, w, ig, wg, bg):
    sd = g.float().sum(_red(x)); sx = (g.float() * (x.float() - _c(mean, x))).sum(_red(x))
    return sd, sx, sx * invstd, sd.clone()
@handler('aten::batch_norm_backward_elemt')
def _(g, x, mean, invstd, w, sd, sx, count):
    n = count.sum(); r = (g.float() - _c(sd / n, x) - (x.float() - _c(mean, x)) * _c(invstd ** 2 * sx / n, x)) * _c(invstd, x)
    return (r * _c(w, x) if w is not None else r).to(x.dtype)
@handler('aten::batch_norm_stats')
def _(x, eps): m = x.float().mean(_red(x)); return m, (x.float().var(_red(x), unbiased=False) + eps).rsqrt()
@handler('aten::batch_norm_gather_stats_with_counts')
def _(x, mean, invstd, rm, rv, momentum, eps, counts):
    c = counts.view(-1, 1); n = c.sum(); m = (mean * c).sum(0) / n
    var = (((invstd ** -2 - eps) + (mean - m) ** 2) * c).sum(0) / n
    if rm is not None: rm.mul_(1 - momentum).add_(m, alpha=momentum); rv.mul_(1 - momentum).add_(var * n / (n - 1), alpha=momentum)
    return m, (var + eps).rsqrt()
@handler('npu_binary_cross_entropy_with_logits_backward')
def _(g, x, t, w, pw, reduction):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = torch.ops.aten.binary_cross_entropy_with_logits(x, t, w, pw, reduction)
        return torch.autograd.grad(y, x, g)[0]
