"""What tests of the cache share: configurations, greedy runs with their logits, how close is close."""

from __future__ import annotations

import copy

import torch

import sparsemm
from sparsemm.head_scores import Curves
from sparsemm.models import family_of
from sparsemm.models.layers import ragged_layers
from sparsemm.plan import Plan

TOLERANCE = 1e-5
NEW = 6


def config(method="snapkv", budget=16, **settings):
    settings.setdefault("window_size", 8)
    return sparsemm.CompressionConfig(method=method, budget=budget, **settings)


def scores(model, seed=0):
    text = model.config.get_text_config()
    generator = torch.Generator().manual_seed(seed)
    shape = (len(ragged_layers(text)), text.num_attention_heads)
    return sparsemm.HeadScores(torch.rand(shape, generator=generator, dtype=torch.float64) ** 4)


def calibration(model, seed=0):
    """Scores with curves that fall from 8 rows to 64, every head's in its own way."""
    table = scores(model, seed)
    rows = torch.tensor([8, 10, 13, 18, 25, 40, 64])
    falling = (1 - (rows - 8) / 56)[None, None].double() ** (1 + 9 * table.values.sqrt()[..., None])
    curves = Curves(rows.tolist(), table.values.flip(0), falling, table.values.flip(1), falling.flip(0))
    return sparsemm.HeadScores(table.values, curves=curves)


def all_configs(model, budget, **settings):
    table = scores(model)
    yield config("fullkv", None, **settings)
    for method in ("snapkv", "pyramidkv", "adakv", "sparsemm", "random"):
        yield config(method, budget, head_scores=table if method == "sparsemm" else None, **settings)


def greedy(model, inputs, tokens=NEW, **kwargs):
    """Generated ids `[B, tokens]` and logits `[tokens, B, vocab]`; no early stop."""
    with torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **kwargs,
        )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits), out.past_key_values


def assert_close(actual, expected):
    limit = TOLERANCE * max(1.0, expected.abs().max().item())
    assert (actual - expected).abs().max().item() <= limit


def text_inputs(length, batch=1, seed=0):
    ids = torch.randint(10, 60, (batch, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def reachable_bytes(root):
    """Bytes of the storages of all tensors that can be reached from an object by its attributes and containers."""
    storages, seen, waiting = {}, set(), [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (type, Plan)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple, set)):
            waiting += item
        elif hasattr(item, "__dict__"):
            waiting += vars(item).values()
    return sum(storages.values())


def without_heads(model, table, share, mode):
    """A copy whose best heads of `table` are edited away: rows (and bias) of the query's projection set to 0
    (zero_query: uniform attention), or columns of the output's (zero_output)."""
    edited = copy.deepcopy(model)
    values = torch.as_tensor(table.values)
    for index in values.flatten().argsort(descending=True)[: int(share * values.numel())].tolist():
        layer_idx, head = divmod(index, values.shape[1])
        text_model = family_of(edited).text_model(edited)
        attention = text_model.layers[ragged_layers(text_model.config)[layer_idx]].self_attn
        rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        query = attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.q_proj
        with torch.no_grad():
            if mode == "zero_output":
                attention.o_proj.weight[:, rows] = 0
                continue
            query.weight[rows] = 0
            if query.bias is not None:
                query.bias[rows] = 0
    return edited
