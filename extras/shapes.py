"""Drawn images of ten shapes, for training without any download."""
from math import cos, hypot, pi, sin

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = ["circle", "ring", "ellipse", "triangle", "square", "hexagon", "star", "cross", "crescent", "heart"]


def draw(count: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """uint8 images (count, 3, size, size) and labels (count,), indices in SHAPES, equally many of each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count)[torch.randperm(count, generator=generator)] % len(SHAPES)
    return torch.cat([draw_batch(batch, size, generator) for batch in labels.split(1000)]), labels


def draw_batch(labels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """labels (B,) -> uint8 images (B, 3, size, size): anti-aliased, in random positions, sizes and textures."""
    def uniform(low: float, high: float, shape: tuple[int, ...] = (1, 1)) -> Tensor:
        return low + (high - low) * torch.rand(len(labels), *shape, generator=generator)

    x = (torch.arange(size) + 0.5) / size * 2 - 1  # -1 to 1
    y = x[:, None]

    def rotate(angle: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y

    def texture() -> Tensor:
        """(B, 3, size, size) in [0, 1]: two colours mixed by a gradient, stripes or checks."""
        u, v = rotate(uniform(0, 2 * pi), x, y)
        frequency, phase = uniform(3, 12), uniform(0, 2 * pi)
        kind = torch.randint(4, (len(labels), 1, 1), generator=generator)
        waves = (frequency * u + phase).sin()
        mix = torch.where(kind == 0, waves, torch.where(kind == 1, waves * (frequency * v).sin(), u * 0.7))
        first, second = uniform(0, 1, (3, 1, 1)), uniform(0, 1, (3, 1, 1))
        return first + (second - first) * (mix[:, None] + 1) / 2

    scale = uniform(0.45, 0.75)
    u, v = rotate(uniform(0, 2 * pi), x - uniform(-0.2, 0.2), y - uniform(-0.2, 0.2))
    u, v = u / scale, v / scale
    distance = torch.empty(len(labels), size, size)  # to the outline, in radii; negative inside
    for label, shape in enumerate(SHAPES):
        of_kind = labels == label
        distance[of_kind] = outline_distance(shape, u[of_kind], v[of_kind])
    coverage = (0.5 - distance * scale * size / 2).clamp(0, 1)[:, None]  # the outline is one pixel wide
    background = texture()
    dark = background.mean((1, 2, 3), keepdim=True) < 0.5
    foreground = texture() / 2 + dark / 2  # bright on dark, dark on bright
    noise = F.interpolate(uniform(-0.15, 0.15, (3, 5, 5)), size, mode="bicubic", align_corners=True)
    return ((background + noise) * (1 - coverage) + foreground * coverage).clamp(0, 1).mul(255).round().byte()


def outline_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance of points to the outline of a shape of radius 1, exact near it (roughly for the ellipse)."""
    radius, angle = (x**2 + y**2).sqrt(), torch.atan2(y, x)

    def box(width: float, height: float) -> Tensor:
        return torch.maximum(x.abs() - width, y.abs() - height)

    if shape == "circle":
        return radius - 1
    if shape == "ring":
        return (radius - 0.75).abs() - 0.25
    if shape == "ellipse":
        return (x**2 + (2.2 * y) ** 2).sqrt() - 1
    if sides := {"triangle": 3, "square": 4, "hexagon": 6}.get(shape):
        sector = 2 * pi / sides
        return radius * (angle % sector - sector / 2).cos() - cos(sector / 2)
    if shape == "star":  # the line from a tip (1, 0) to the next notch, mirrored into ten sectors
        folded = pi / 5 - (angle % (pi / 2.5) - pi / 5).abs()
        px, py = radius * folded.cos(), radius * folded.sin()
        notch = 0.42 * cos(pi / 5), 0.42 * sin(pi / 5)
        return ((px - 1) * notch[1] + py * (1 - notch[0])) / hypot(1 - notch[0], notch[1])
    if shape == "cross":
        return torch.minimum(box(1, 0.33), box(0.33, 1))
    if shape == "crescent":
        return torch.maximum(radius - 1, 0.8 - ((x - 0.5) ** 2 + y**2).sqrt())
    lobes = torch.minimum(((x - 0.5) ** 2 + y**2).sqrt(), (x**2 + (y - 0.5) ** 2).sqrt()) - 0.5
    return torch.minimum(box(0.5, 0.5), lobes)  # heart: a square with a half disc on two sides
