"""Independent references for methods of other papers: plain loops in float64, nothing of `sparsemm` is imported."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import numpy as np
import torch
from reference import (
    pooled_scores,
    rate_distortion_budgets,
    round_by_largest_fraction,
    score_targets,
    top_positions,
)

# -- position scores of one unpadded prompt: query [Hq, T, D], key and value [Hkv, T, D] -> [Hkv, T] -------------------


def mixkv(query: np.ndarray, key: np.ndarray, value: np.ndarray, window: int, scaling: float) -> np.ndarray:
    attention = pooled_scores(query, key, window, 5, scaling)
    scores = np.zeros_like(attention)
    length, before = key.shape[1], attention.shape[1]
    for head in range(len(key)):
        directions = [row / math.sqrt(row @ row) for row in key[head]]
        mean = sum(directions) / length
        pairs = [directions[i] @ directions[j] for i in range(length) for j in range(length) if i != j]
        redundancy = sum(pairs) / len(pairs)
        level = attention[head].mean()

        def scaled(values: list[float], level: float = level) -> np.ndarray:
            spread = (np.array(values) - min(values)) / (max(values) - min(values))
            return spread * level / spread.mean()

        diversity = scaled([-(direction @ mean) for direction in directions[:before]])
        strength = scaled([math.sqrt(row @ row) for row in value[head, :before]])
        scores[head] = (1 - redundancy) * (attention[head] + strength) + redundancy * diversity
    return scores


def mean_rotation(head_dim: int, theta: float, begin: int, count: int = 512) -> np.ndarray:
    """The mean of the rotation matrices of `count` positions: each turns the pairs (i, i + head_dim / 2)."""
    half, total = head_dim // 2, np.zeros((head_dim, head_dim))
    for position in range(begin, begin + count):
        for i in range(half):
            angle = position * theta ** (-2 * i / head_dim)
            total[i, i] += math.cos(angle)
            total[i + half, i + half] += math.cos(angle)
            total[i, i + half] -= math.sin(angle)
            total[i + half, i] += math.sin(angle)
    return total / count


def expected(
    unrotated: np.ndarray, key: np.ndarray, value: np.ndarray, rotation: np.ndarray, scaling: float, left_out: int = 4
) -> np.ndarray:
    """`unrotated` [Hq, T, D]: the queries before RoPE, of which the first are sinks and left out."""
    (num_kv_heads, length, _), group = key.shape, len(unrotated) // len(key)
    scores = np.full((num_kv_heads, length), math.inf)
    for head in range(num_kv_heads):
        weights = np.zeros(length - 4)
        for query in unrotated[head * group : (head + 1) * group, left_out:]:
            mean = rotation @ query.mean(0)
            covariance = rotation @ np.cov(query.T, bias=True) @ rotation.T
            exponents = np.array(
                [scaling * (row @ mean) + scaling**2 / 2 * (row @ covariance @ row) for row in key[head, 4:]]
            )
            each = np.exp(exponents - exponents.max())
            weights += each / each.sum() / group
        norms = np.array([math.sqrt(row @ row) for row in value[head, 4:]])
        scores[head, 4:] = (weights + 0.02) * norms
    return scores


def behind_the_image(query: np.ndarray, key: np.ndarray, image: np.ndarray, scaling: float) -> tuple[np.ndarray, float]:
    """Accumulated attention of the tokens behind the last image token, and the share of weights that reach 1 %."""
    (num_query_heads, length, _), group = query.shape, len(query) // len(key)
    begin = int(image.nonzero()[0].max()) + 1 if image.any() else 0
    scores, reached, entries = np.zeros((len(key), length)), 0, 0
    for head in range(num_query_heads):
        for token in range(begin, length):
            logits = scaling * (key[head // group, : token + 1] @ query[head, token])
            weights = np.exp(logits - logits.max())
            weights /= weights.sum()
            scores[head // group, : token + 1] += weights / group
            reached += int((weights >= 0.01 * weights.max()).sum())
            entries += token + 1
    return scores, reached / entries


# -- budgets -----------------------------------------------------------------------------------------------------------


def vl_cache_rows(densities: list[float], budget: int, window: int, length: int) -> list[int]:
    """Rows of each layer: window + a share of the rest by density, no more than the prompt."""
    if budget >= length:
        return [length] * len(densities)
    targets = score_targets([Fraction(density) for density in densities], budget, window, Fraction(0), length)
    return round_by_largest_fraction(targets, budget * len(densities))


def head_kv_rows(scores: np.ndarray, num_kv_heads: int, budget: int, window: int, length: int) -> np.ndarray:
    """Rows [L, Hkv] for retrieval scores [L, Hq]: b / 1.2 of every head's rows beyond the window go by score."""
    if budget >= length:
        return np.full((len(scores), num_kv_heads), length)
    summed = [sum(map(Fraction, group)) for group in scores.reshape(-1, scores.shape[1] // num_kv_heads).tolist()]
    targets = score_targets(summed, budget, window, 1 - Fraction(10, 12), length)
    return np.array(round_by_largest_fraction(targets, budget * len(summed))).reshape(len(scores), num_kv_heads)


# -- the masked full-size twin -----------------------------------------------------------------------------------------


class BaselineTwin:
    """An attention function for one generation of batch 1: all keys stay; rows that the method drops are masked.

    What it drops is settled when the prompt has been through all layers, as one of these methods has to.
    """

    def __init__(self, model, settings, image, curves=None):
        self.model, self.settings, self.image, self.curves = model, settings, image, curves
        self.states, self.unrotated, self.kept, self.dropped = {}, {}, None, {}
        self.margin = math.inf
        text_model = getattr(model.model, "language_model", model.model)
        self.num_layers = len(text_model.layers)
        for index, layer in enumerate(text_model.layers):
            layer.self_attn.q_proj.register_forward_hook(functools.partial(self.note_queries, index))

    def note_queries(self, layer, module, args, out):
        self.unrotated.setdefault(layer, out)

    def __call__(self, module, query, key, value, attention_mask, scaling, **kwargs):
        layer, columns = module.layer_idx, query.shape[2]
        if layer not in self.states:
            self.states[layer] = [each[0].double().numpy() for each in (query, key, value)]
            self.scaling = scaling
        elif self.kept is None:
            self.settle()
        group = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
        future = torch.arange(key.shape[2]) > (key.shape[2] - columns + torch.arange(columns))[:, None]
        logits = logits.masked_fill(future, float("-inf"))
        if self.kept is not None:
            for head, positions in enumerate(self.kept[layer].positions):
                dropped = torch.ones(key.shape[2], dtype=torch.bool)
                dropped[positions] = dropped[self.length :] = False
                logits[:, head * group : (head + 1) * group].masked_fill_(dropped, float("-inf"))
        return (logits.softmax(-1) @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None

    def settle(self):
        settings, (query, key, _) = self.settings, self.states[0]
        (num_kv_heads, self.length, head_dim), window = key.shape, settings.window_size
        alike = [[min(settings.budget, self.length)] * num_kv_heads] * self.num_layers
        found = [self.scores(settings.method, layer, head_dim) for layer in range(self.num_layers)]
        if settings.method == "vl_cache":
            rows = vl_cache_rows([density for _, density in found], settings.budget, window, self.length)
            rows, found = [[each] * num_kv_heads for each in rows], [scores for scores, _ in found]
        elif settings.method == "head_kv":
            retrieval = self.curves.retrieval.numpy()
            rows = head_kv_rows(retrieval, num_kv_heads, settings.budget, window, self.length).tolist()
        elif settings.method == "rate_distortion_mixkv":
            group = query.shape[0] // num_kv_heads
            distortions = np.where(
                self.by_mixkv(num_kv_heads).repeat(group, 1)[..., None],
                self.curves.distortions_mixkv.numpy(),
                self.curves.distortions.numpy(),
            )
            tables = self.curves.sensitivities.numpy(), distortions, self.curves.rows
            rows = rate_distortion_budgets(*tables, num_kv_heads, settings.budget, window, self.length).tolist()
        else:
            rows = alike
        before = self.length - window
        self.kept = [
            top_positions(scores[:, :before], each, window, self.length)
            for scores, each in zip(found, rows, strict=True)
        ]
        self.margin = min(kept.margin for kept in self.kept if not math.isnan(kept.margin))

    def by_mixkv(self, num_kv_heads):
        """Of `rate_distortion_mixkv`, the kv heads [L, Hkv] with the smaller mean error under MixKV's ranking."""
        of_query_heads = self.curves.sensitivities.numpy() * (
            self.curves.distortions_mixkv.numpy() - self.curves.distortions.numpy()
        ).sum(-1)
        return of_query_heads.reshape(self.num_layers, num_kv_heads, -1).sum(-1) < 0

    def scores(self, method, layer, head_dim):
        query, key, value = self.states[layer]
        if method == "head_kv":
            return pooled_scores(query, key, self.settings.window_size, 5, self.scaling)
        if method in ("mixkv", "rate_distortion_mixkv"):
            mixed = mixkv(query, key, value, self.settings.window_size, self.scaling)
            if method == "mixkv":
                return mixed
            pooled = pooled_scores(query, key, self.settings.window_size, 5, self.scaling)
            before, chosen = pooled.shape[1], self.by_mixkv(len(key))[layer]
            return np.where(chosen[:, None], mixed[:, :before], pooled)
        if method == "vl_cache":
            return behind_the_image(query, key, self.image, self.scaling)
        unrotated = self.unrotated[layer][0].double().numpy().reshape(self.length, -1, head_dim).transpose(1, 0, 2)
        deltas = getattr(self.model.model, "rope_deltas", None)
        begin = self.length + (0 if deltas is None else int(deltas))
        theta = self.model.config.get_text_config().rope_parameters["rope_theta"]
        return expected(unrotated, key, value, mean_rotation(head_dim, theta, begin), self.scaling)
