"""Feature pyramid layouts: which nodes a cell has, at which level, and what each one sums.

A layout is `nodes`, a list of {'feat_level', 'inputs_offsets', 'weight_method'} in the order of computation. An offset
counts the cell's inputs first (0 is the finest level), then the nodes. The last `num_levels` nodes are the cell's
outputs, finest first. `weight_method` is 'fastattn' (learned, ReLU then normalised), 'attn' (softmax) or 'sum'.
"""

from collections.abc import Callable

from omegaconf import DictConfig, OmegaConf


class _Layout:
    """The nodes made so far, and for each level the offsets of everything at that level, oldest first."""

    def __init__(self, min_level: int, max_level: int, weight_method: str | None) -> None:
        self.weight_method = weight_method or "fastattn"
        self.at_level = {level: [level - min_level] for level in range(min_level, max_level + 1)}
        self.next_offset = max_level - min_level + 1
        self.nodes: list[dict] = []

    def first(self, level: int) -> int:
        return self.at_level[level][0]

    def last(self, level: int) -> int:
        return self.at_level[level][-1]

    def add(self, level: int, *inputs_offsets: int) -> None:
        """Append a node at `level` that sums the given offsets."""
        self.nodes.append(
            {"feat_level": level, "inputs_offsets": list(inputs_offsets), "weight_method": self.weight_method}
        )
        self.at_level[level].append(self.next_offset)
        self.next_offset += 1

    def to_config(self) -> DictConfig:
        return OmegaConf.create({"nodes": self.nodes})


def bifpn_config(min_level: int, max_level: int, weight_method: str | None = None) -> DictConfig:
    """Lay out a BiFPN cell: a top-down path, then a bottom-up path that also sees the cell's inputs.

    Args:
        min_level: level of the finest feature map, whose stride is 2**min_level.
        max_level: level of the coarsest.
        weight_method: how a node weighs its inputs: 'attn', 'fastattn' or 'sum'; None is 'fastattn'.

    Source: EfficientDet, https://arxiv.org/abs/1911.09070, section 3.2 and figure 2d.
    """
    layout = _Layout(min_level, max_level, weight_method)
    for level in range(max_level - 1, min_level - 1, -1):
        layout.add(level, layout.last(level), layout.last(level + 1))
    for level in range(min_level + 1, max_level + 1):
        layout.add(level, *layout.at_level[level], layout.last(level - 1))
    return layout.to_config()


def panfpn_config(min_level: int, max_level: int, weight_method: str | None = None) -> DictConfig:
    """Lay out a PAN cell: top-down over all levels, then bottom-up over all levels.

    Source: Path Aggregation Network, https://arxiv.org/abs/1803.01534 (the layout only).
    """
    layout = _Layout(min_level, max_level, weight_method)
    layout.add(max_level, layout.last(max_level))
    for level in range(max_level - 1, min_level - 1, -1):
        layout.add(level, layout.last(level), layout.last(level + 1))
    layout.add(min_level, layout.last(min_level))
    for level in range(min_level + 1, max_level + 1):
        layout.add(level, layout.last(level), layout.last(level - 1))
    return layout.to_config()


def qufpn_config(min_level: int, max_level: int, weight_method: str | None = None) -> DictConfig:
    """Lay out a Quad-FPN cell: down then up, and up then down, summed per level.

    Source: Dynamic quadruple feature pyramid, https://ieeexplore.ieee.org/document/9225379.
    """
    layout = _Layout(min_level, max_level, weight_method)
    first, last = layout.first, layout.last

    for level in range(max_level - 1, min_level - 1, -1):  # down
        layout.add(level, last(level), last(level + 1))
    down = {level: last(level) for level in range(min_level, max_level + 1)}

    down_up = {min_level: down[min_level]}  # ... then up; the top level sees its input and the path only
    for level in range(min_level + 1, max_level + 1):
        own = layout.at_level[level] if level < max_level else [first(level)]
        layout.add(level, *own, down_up[level - 1])
        down_up[level] = last(level)

    up = {min_level: first(min_level)}  # up, from the cell's inputs
    for level in range(min_level + 1, max_level + 1):
        layout.add(level, first(level), up[level - 1])
        up[level] = last(level)

    up_down = {max_level: up[max_level]}  # ... then down
    for level in range(max_level - 1, min_level - 1, -1):
        own = [first(level), up[level]] if level > min_level else [first(level)]
        layout.add(level, *own, up_down[level + 1])
        up_down[level] = last(level)

    layout.weight_method = "fastattn"
    for level in range(min_level, max_level + 1):
        layout.add(level, down_up[level], up_down[level])
    return layout.to_config()


_LAYOUTS: dict[str, tuple[Callable[..., DictConfig], str]] = {
    "bifpn_sum": (bifpn_config, "sum"),
    "bifpn_attn": (bifpn_config, "attn"),
    "bifpn_fa": (bifpn_config, "fastattn"),
    "pan_sum": (panfpn_config, "sum"),
    "pan_fa": (panfpn_config, "fastattn"),
    "qufpn_sum": (qufpn_config, "sum"),
    "qufpn_fa": (qufpn_config, "fastattn"),
}


def get_fpn_config(fpn_name: str | None, min_level: int = 3, max_level: int = 7) -> DictConfig:
    """Return the layout called `fpn_name` (None or '': 'bifpn_fa') for the levels min_level..max_level.

    Raises:
        ValueError: there is no layout of that name.
    """
    name = fpn_name or "bifpn_fa"
    if name not in _LAYOUTS:
        raise ValueError(f"Unknown FPN layout '{name}': choose one of {', '.join(_LAYOUTS)}.")
    build, weight_method = _LAYOUTS[name]
    return build(min_level, max_level, weight_method)
