"""Shapes, textures and backgrounds of the embedded data set, as pure numpy functions of a random generator.

Every kind of object is a signed distance (shape) and an albedo (texture); one light falls on all of them. Distances are
exact, so edges are antialiased by their coverage and no oversampling is needed. Geometry is float64, which keeps masks
and therefore boxes the same from machine to machine. Composing images and writing files is dataset.py's part.

Source: distance to a polygon after Inigo Quilez, "2D distance functions"; the rest is ours.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

KINDS = ("ball", "box", "star", "ring", "cross", "triangle")

# Towards the light, in image axes (x right, y down, z to the viewer): from the upper left, in front.
_LIGHT = np.array([-0.48, -0.58, 0.66]) / np.linalg.norm([-0.48, -0.58, 0.66])
_HALFWAY = (_LIGHT + [0, 0, 1]) / np.linalg.norm(_LIGHT + [0, 0, 1])


@dataclass(frozen=True)
class Patch:
    """Hold the geometry of one object on its own square of pixels, before it has a place or colours.

    All arrays are [n, n] float64 with n odd and the object's centre in the middle pixel. `u`, `v` are the object's own
    turned axes in units of its radius; `distance` is signed, in the same units, negative inside; `slope_x`, `slope_y`
    are its gradient along the image axes. `form` in 0..1 is the kind's one free proportion.
    """

    kind: str
    radius_px: float
    form: float
    u: np.ndarray
    v: np.ndarray
    distance: np.ndarray
    slope_x: np.ndarray
    slope_y: np.ndarray

    @property
    def coverage(self) -> np.ndarray:
        """Return the share of each pixel that the object covers, 0..1."""
        return np.clip(0.5 - self.distance * self.radius_px, 0, 1)


def make_patch(kind: str, radius_px: float, angle: float, form: float) -> Patch:
    """Make the geometry of one object.

    Args:
        kind: one of KINDS.
        radius_px: radius of the circle around the object.
        angle: rotation in radians.
        form: the kind's free proportion, 0..1 (box: elongation, star: depth, ring: thickness, cross: arm width, ...).

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of object {kind!r}; the kinds are {', '.join(KINDS)}")
    half = int(np.ceil(radius_px)) + 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1] / radius_px
    u = x * np.cos(angle) + y * np.sin(angle)
    v = y * np.cos(angle) - x * np.sin(angle)
    distance = _distance(kind, form, u, v)
    slope_y, slope_x = np.gradient(distance * radius_px)
    return Patch(kind, radius_px, form, u, v, distance, slope_x, slope_y)


def paint_patch(patch: Patch, base: np.ndarray, accent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the lit colours of an object, float64 [n, n, 3] in 0..1; outside its coverage they mean nothing."""
    texture: Callable[..., np.ndarray] = _TEXTURES[patch.kind]
    albedo = texture(patch, base, accent, rng)
    outline_px = max(1.0, 0.045 * patch.radius_px)
    edge = np.clip(1.5 + (patch.distance * patch.radius_px) / outline_px, 0, 1)
    albedo = _mix(albedo, base * 0.38, 0.85 * edge)

    # The surface bends down towards the edge over `bevel`: all of a ball, the tube of a ring, a rim of the flat kinds.
    bevel = {"ball": 1.0, "ring": _ring_half(patch.form)}.get(patch.kind, 0.13)
    tilt = np.clip(1 + patch.distance / bevel, 0, 1)
    normal_z = np.sqrt(1 - tilt**2)
    towards = tilt * (patch.slope_x * _LIGHT[0] + patch.slope_y * _LIGHT[1]) + normal_z * _LIGHT[2]
    halfway = tilt * (patch.slope_x * _HALFWAY[0] + patch.slope_y * _HALFWAY[1]) + normal_z * _HALFWAY[2]
    light = 0.42 + 0.88 * np.clip(towards, 0, None)
    gloss = 0.55 * np.clip(halfway, 0, 1) ** 48 * (patch.kind in ("ball", "ring"))
    return np.clip(albedo * light[..., None] + gloss[..., None], 0, 1)


def make_colours(kind: str, behind: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a base and an accent colour that stand out from what they will cover.

    Four of five objects have the usual hue of their kind, more or less; the others any hue, so that colour alone does
    not tell kinds apart.

    Args:
        kind: one of KINDS.
        behind: mean colour [3] of what the object will cover, 0..1.
        rng: draws the colours.

    Returns:
        Two colours [3], 0..1.
    """

    def draw(usual_hue: float | None) -> np.ndarray:
        hues = [rng.random() if usual_hue is None else (usual_hue + rng.normal(0, 0.035)) % 1 for _ in range(4)]
        drawn = [np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.5, 0.9), rng.uniform(0.6, 0.98))) for hue in hues]
        return max(drawn, key=lambda colour: float(np.abs(colour - behind).sum()))

    base = draw(KINDS.index(kind) / len(KINDS) if rng.random() < 0.8 else None)
    while np.abs(base - behind).sum() < 0.4:  # the usual hue of this kind is that of the background
        base = draw(None)
    if rng.random() < 0.6:
        return base, base * 0.12 + np.array([0.98, 0.96, 0.9]) * 0.88
    hue, saturation, value = colorsys.rgb_to_hsv(*base)
    return base, np.array(colorsys.hsv_to_rgb((hue + rng.uniform(0.35, 0.65)) % 1, saturation * 0.8, 1.3 - 0.6 * value))


# ---------------------------------------------------------------------------------------------------------- shapes
def _distance(kind: str, form: float, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    if kind == "ball":
        return np.hypot(u, v) - 1
    if kind == "ring":
        half = _ring_half(form)
        return np.abs(np.hypot(u, v) - (1 - half)) - half
    if kind == "box":
        long, short = _box_halves(form)
        return _polygon([(-long, -short), (long, -short), (long, short), (-long, short)], u, v) - 0.04
    if kind == "triangle":
        return _polygon(_circle_points([0.93] * 3), u, v) - 0.07
    if kind == "star":
        return _polygon(_circle_points([0.95, 0.40 + 0.08 * form] * 5), u, v) - 0.05
    arm = 0.26 + 0.06 * form
    corners = [(arm, arm), (arm, 0.9), (-arm, 0.9), (-arm, arm), (-0.9, arm), (-0.9, -arm)]
    corners += [(-x, -y) for x, y in corners]
    return _polygon(corners, u, v) - 0.06


def _ring_half(form: float) -> float:
    return 0.24 + 0.06 * form


def _box_halves(form: float) -> tuple[float, float]:
    short = 0.68 - 0.2 * form  # from square to about 1.75 : 1, corners always on the unit circle
    return float(np.sqrt(0.96**2 - short**2)) - 0.02, short - 0.02


def _circle_points(radii: list[float]) -> list[tuple[float, float]]:
    turn = 2 * np.pi / len(radii)
    return [(r * np.sin(i * turn), -r * np.cos(i * turn)) for i, r in enumerate(radii)]


def _polygon(corners: list[tuple[float, float]], u: np.ndarray, v: np.ndarray) -> np.ndarray:
    nearest = np.full(u.shape, np.inf)
    inside = np.zeros(u.shape, bool)
    for (u0, v0), (u1, v1) in zip(corners, corners[1:] + corners[:1], strict=True):
        du, dv = u1 - u0, v1 - v0
        along = np.clip(((u - u0) * du + (v - v0) * dv) / (du * du + dv * dv), 0, 1)
        nearest = np.minimum(nearest, (u - u0 - along * du) ** 2 + (v - v0 - along * dv) ** 2)
        if dv != 0:  # even-odd rule; a level edge crosses no level ray
            inside ^= ((v0 > v) != (v1 > v)) & (u < u0 + du * (v - v0) / dv)
    return np.sqrt(nearest) * np.where(inside, -1, 1)


# -------------------------------------------------------------------------------------------------------- textures
def _beach_ball(patch: Patch, base: np.ndarray, accent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    depth = np.sqrt(np.clip(1 - patch.u**2 - patch.v**2, 0, None))
    lean = rng.uniform(0.5, 1.1)  # how far the pole, where the panels meet, leans away from the viewer
    across = patch.v * np.cos(lean) + depth * np.sin(lean)
    pole = depth * np.cos(lean) - patch.v * np.sin(lean)
    ray = np.hypot(patch.u, across)
    panels = np.sin(3 * np.arctan2(across, patch.u)) * ray / 3
    albedo = _mix(base, accent, _step(panels, patch))
    return _mix(albedo, base * 0.75, _step(0.2 - ray, patch) * (pole > 0))


def _striped(patch: Patch, base: np.ndarray, accent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    count = rng.integers(3, 5)
    long, _ = _box_halves(patch.form)
    wave = 2 * np.pi * count / (2 * long)
    stripes = np.cos(wave * patch.u) / wave
    return _mix(_mix(base, accent, _step(stripes, patch)), base * 0.8, _step(patch.distance + 0.14, patch))


def _facets(patch: Patch, base: np.ndarray, accent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side = np.sin(5 * np.arctan2(patch.u, -patch.v)) * np.hypot(patch.u, patch.v) / 5
    bright = np.clip(base * 0.8 + 0.28, 0, 1)
    return _mix(bright, base * 0.72, _step(side, patch))


def _sprinkled(patch: Patch, base: np.ndarray, accent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    albedo = np.broadcast_to(base, (*patch.u.shape, 3))
    hues = [accent, np.array([1, 0.97, 0.9]), base * 0.35]
    count = 13
    for i in range(count):
        turn = 2 * np.pi * (i + rng.uniform(-0.3, 0.3)) / count
        middle = 1 - _ring_half(patch.form) + rng.uniform(-0.4, 0.4) * _ring_half(patch.form)
        lie = rng.uniform(0, np.pi)
        u, v = patch.u - middle * np.cos(turn), patch.v - middle * np.sin(turn)
        along = np.clip(u * np.cos(lie) + v * np.sin(lie), -0.07, 0.07)
        away = np.hypot(u - along * np.cos(lie), v - along * np.sin(lie))
        albedo = _mix(albedo, hues[i % 3], _step(0.042 - away, patch))
    return albedo


def _dotted(patch: Patch, base: np.ndarray, accent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    pitch = 0.36
    u, v = ((axis + pitch / 2) % pitch - pitch / 2 for axis in (patch.u, patch.v))
    on_arms = np.minimum(np.abs(patch.u), np.abs(patch.v)) < pitch / 2
    return _mix(base, accent, _step(0.105 - np.hypot(u, v), patch) * on_arms)


def _bricks(patch: Patch, base: np.ndarray, accent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    tall, wide = 0.25, 0.5
    row = np.floor(patch.v / tall)
    shifted = patch.u + wide / 2 * (row % 2)
    to_level = tall / 2 - np.abs(patch.v - (row + 0.5) * tall)
    to_upright = wide / 2 - np.abs((shifted % wide) - wide / 2)
    tints = rng.uniform(0.82, 1.12, (16, 16))
    tint = tints[row.astype(int) % 16, np.floor(shifted / wide).astype(int) % 16]
    bricks = np.clip(base * tint[..., None], 0, 1)
    return _mix(bricks, accent, _step(0.028 - np.minimum(to_level, to_upright), patch))


_TEXTURES = {
    "ball": _beach_ball,
    "box": _striped,
    "star": _facets,
    "ring": _sprinkled,
    "cross": _dotted,
    "triangle": _bricks,
}


def _step(inside: np.ndarray, patch: Patch) -> np.ndarray:
    """Return an antialiased 0/1 edge where `inside`, a distance in radii, changes sign."""
    return np.clip(0.5 + inside * patch.radius_px, 0, 1)


def _mix(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    return first + (second - first) * share[..., None]


# ----------------------------------------------------------------------------------------------------- backgrounds
# Three muted colours each, dark to light, so that saturated objects stay readable on all of them.
_PALETTES = (
    ("2b3a42", "5b7580", "b8c9cc"),
    ("3d3a4b", "7c7a99", "cfcde0"),
    ("40342b", "8c7460", "d9c9b4"),
    ("2f3e2e", "6f8a67", "cad8bd"),
    ("4a3338", "99757b", "e3ced0"),
    ("28323f", "667a91", "c3cfdc"),
    ("59554c", "a39d8f", "ece7dc"),
    ("1f2a33", "3f5666", "8aa3b0"),
    ("6b5a3c", "b8a47c", "efe3c6"),
    ("35463f", "7fa194", "d5e6de"),
)


def make_background(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return an image without objects, float64 [height, width, 3] in 0..1."""
    palette = _PALETTES[rng.integers(len(_PALETTES))]
    colours = np.array([[int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)] for code in palette])
    pattern = _PATTERNS[rng.integers(len(_PATTERNS))]
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    tone = pattern(x, y, rng)
    image = np.stack([np.interp(tone, [0, 0.5, 1], colours[:, channel]) for channel in range(3)], axis=-1)
    corner = np.hypot(x - x.max() / 2, y - y.max() / 2)
    image *= (1.03 - 0.28 * corner**2)[..., None]
    return np.clip(image + rng.normal(0, 0.012, (height, width, 1)), 0, 1)


def _smooth_noise(x: np.ndarray, cells: int, rng: np.random.Generator) -> np.ndarray:
    """Return noise of about 0..1 shaped like `x`, with `cells` hills along each side."""
    coarse = Image.fromarray(rng.random((cells + 1, cells + 1)).astype(np.float32))
    return np.asarray(coarse.resize(x.shape[::-1], Image.Resampling.BICUBIC), dtype=np.float64)


def _turned(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    return (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)


def _gradient(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(0.5 + _turned(x, y, rng) * rng.uniform(0.6, 1.2), 0, 1)


def _clouds(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return sum(_smooth_noise(x, cells, rng) * share for cells, share in ((3, 0.55), (7, 0.3), (17, 0.15)))


def _stripes(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    wave = np.sin(_turned(x, y, rng) * rng.uniform(40, 110)) * rng.uniform(0.06, 0.14)
    return rng.uniform(0.3, 0.7) + wave + 0.25 * (_smooth_noise(x, 3, rng) - 0.5)


def _checker(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    angle, pitch = rng.uniform(0, np.pi / 2), rng.uniform(20, 50)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    squares = np.clip(np.sin(u * pitch) * np.sin(v * pitch) * 6, -1, 1) * rng.uniform(0.05, 0.12)
    return rng.uniform(0.3, 0.7) + squares + 0.25 * (_smooth_noise(x, 3, rng) - 0.5)


def _blobs(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    tone = np.full(x.shape, 0.5)
    for _ in range(rng.integers(8, 16)):
        size = rng.uniform(0.08, 0.25)
        away = ((x - rng.random()) ** 2 + (y - rng.random()) ** 2) / size**2
        tone += rng.uniform(-0.35, 0.35) * np.exp(-away)
    return tone


def _hills(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    tone = 0.95 - 0.25 * y
    for layer in range(4):
        crest = 0.3 + 0.16 * layer + rng.uniform(-0.04, 0.04)
        for wave in (rng.uniform(4, 9), rng.uniform(12, 22)):
            crest = crest + 0.22 / wave * np.sin(wave * x + rng.uniform(0, 6))
        tone = tone + (0.62 - 0.16 * layer - tone) * np.clip((y - crest) * 200 + 0.5, 0, 1)
    return tone


def _wood(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    bent = _turned(x, y, rng) * rng.uniform(8, 14) + 2.2 * _smooth_noise(x, 3, rng)
    rings = np.abs((bent % 1) * 2 - 1)
    return rng.uniform(0.35, 0.6) + 0.22 * (rings - 0.5) + 0.1 * (_smooth_noise(x, 40, rng) - 0.5)


_PATTERNS = (_gradient, _clouds, _stripes, _checker, _blobs, _hills, _wood)
