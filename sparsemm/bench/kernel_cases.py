"""What the kernel benchmark runs on: attention shapes, skewed and uniform row counts, tensors, counted bytes."""

from __future__ import annotations

import dataclasses
import random

import torch
from torch import Tensor

import sparsemm
from sparsemm.head_scores import HeadScores


@dataclasses.dataclass(frozen=True)
class Shape:
    """Attention of one model: layers, query heads, kv heads, head dim."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int


SHAPES = {
    "vicuna-7b": Shape(32, 32, 32, 128),
    "mistral-7b": Shape(32, 32, 8, 128),
    "qwen2-vl-7b": Shape(28, 28, 4, 128),
    "tiny": Shape(2, 4, 2, 32),
}


def synthetic_head_scores(layers: int, heads: int, seed: int = 0) -> HeadScores:
    """Head scores as concentrated as those of the original release: 5 % of the heads hold 55 % of the mass, the top
    head is 26 times the mean, 1 % of the heads have none.

    The top heads fall off geometrically, the rest are exponential; positions are drawn. Python's generator keeps its
    sequence over versions, so the table is the same everywhere.
    """
    generator = random.Random(seed)
    count = layers * heads
    top, zeros = max(1, round(0.05 * count)), round(0.01 * count)
    share = 0.55 * count  # in units of the mean
    peak = min(26.0, share)
    low, high = 0.0, 1.0
    for _ in range(60):  # ratio of neighbours such that the top heads sum to their share
        ratio = (low + high) / 2
        low, high = (ratio, high) if peak * sum(ratio**i for i in range(top)) < share else (low, ratio)
    weights = [peak * high**i for i in range(top)]
    rest = [min(generator.expovariate(1.0), 6.0) for _ in range(count - top - zeros)]
    scale = (count - sum(weights)) / max(sum(rest), 1e-9)
    weights += [value * scale for value in rest] + [0.0] * zeros
    generator.shuffle(weights)
    return HeadScores(torch.tensor(weights, dtype=torch.float64).view(layers, heads))


def row_counts(shape: Shape, budget: int | None, prompt: int, distribution: str, scores: HeadScores) -> list[int]:
    """Rows per kv head in one layer: `skewed` as SparseMM gives them in the layer whose total is closest to the mean,
    `uniform` the same total spread evenly; `budget` None keeps the whole prompt."""
    if budget is None or budget >= prompt:
        return [prompt] * shape.kv_heads
    config = sparsemm.CompressionConfig("sparsemm", budget, head_scores=scores, window_size=min(32, budget))
    rows = sparsemm.head_budgets(
        config,
        num_layers=shape.layers,
        num_query_heads=shape.query_heads,
        num_kv_heads=shape.kv_heads,
        prompt_length=prompt,
    )
    totals = rows.sum(1)
    counts = rows[int((totals - budget * shape.kv_heads).abs().argmin())].tolist()
    if distribution == "skewed":
        return counts
    total = sum(counts)
    return [total // shape.kv_heads + (i < total % shape.kv_heads) for i in range(shape.kv_heads)]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the grid; `budget` None is the full cache."""

    shape: str
    prompt: int
    budget: int | None
    batch: int
    distribution: str
    operation: str

    def label(self) -> str:
        budget = "full" if self.budget is None else str(self.budget)
        return f"{self.shape} T={self.prompt} b={budget} B={self.batch} {self.distribution} {self.operation}"


@dataclasses.dataclass
class Rows:
    """A ragged cache of one layer: buffers `[slots, D]`, offsets, lens as in ops/schemas.py."""

    key_buffer: Tensor
    value_buffer: Tensor
    offsets: Tensor
    lens: Tensor

    @property
    def stored_bytes(self) -> int:
        """Bytes of the rows held, slack excluded."""
        return 2 * int(self.lens.sum()) * self.key_buffer.shape[1] * self.key_buffer.element_size()


def ragged_rows(counts: list[int], head_dim: int, dtype: torch.dtype, device: torch.device, slack: int = 64) -> Rows:
    """Random rows, `counts[r]` per list, with `slack` free slots each."""
    lens = torch.tensor(counts, dtype=torch.int32)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int32), (lens + slack).cumsum(0).int()])
    slots = int(offsets[-1])
    key_buffer, value_buffer = (torch.randn(slots, head_dim, device=device, dtype=dtype) for _ in range(2))
    return Rows(key_buffer, value_buffer, offsets.to(device), lens.to(device))


def random_selection(counts: list[int], prompt: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """positions int32 `[total]` (sorted within each list) and cu_kept int32 `[lists + 1]`, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randperm(prompt, generator=generator)[:count].sort().values for count in counts]
    cu_kept = torch.tensor([0, *counts]).cumsum(0).int()
    return torch.cat(chosen).int().to(device), cu_kept.to(device)
