"""Kept positions against the float64 reference, padding of every kind, short prompts, ragged later turns."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import reference
import torch
from torch import Tensor

from sparsemm.cache.selection import choose_rows, select_positions
from sparsemm.config import CompressionConfig
from sparsemm.head_scores import HeadScores
from sparsemm.methods import PromptStates, pooled_window_scores
from sparsemm.plan import Plan

NUM_LAYERS = 3
DROPPING = ["snapkv", "pyramidkv", "adakv", "sparsemm", "random"]
SAFE_MARGIN = 1e-5  # below this the float32 scores may order two positions differently


def states(seed: int, heads: tuple[int, int], length: int, batch: int = 1, head_dim: int = 16) -> tuple[Tensor, Tensor]:
    """Random query [B, Hq, T, D] and key [B, Hkv, T, D], peaked enough for heads to differ."""
    generator = torch.Generator().manual_seed(seed)
    query = 1.5 * torch.randn(batch, heads[0], length, head_dim, generator=generator)
    return query, torch.randn(batch, heads[1], length, head_dim, generator=generator)


def config_of(method: str, budget: int, window: int, heads: int, **others: object) -> CompressionConfig:
    scores = torch.rand(NUM_LAYERS, heads, generator=torch.Generator().manual_seed(9), dtype=torch.float64) ** 6
    return CompressionConfig(method, budget, HeadScores(scores), window_size=window, **others)


def expected(
    query: Tensor, key: Tensor, config: CompressionConfig, layer_idx: int, scaling: float | None = None
) -> reference.Kept:
    """The reference for one unpadded prompt, query [Hq, T, D] and key [Hkv, T, D]."""
    scores = Plan(config, NUM_LAYERS, query.shape[0], query.shape[0]).head_scores
    table = None if scores is None else scores.values.numpy()
    more = {"layer_idx": layer_idx, "num_layers": NUM_LAYERS, "scores": table, "scaling": scaling}
    return reference.kept_by(config, query, key, **more)


def as_lists(kept: list[list[Tensor]]) -> list[list[list[int]]]:
    return [[positions.tolist() for positions in row] for row in kept]


@pytest.mark.parametrize("rounding", ["exact", "paper"])
@pytest.mark.parametrize("method", DROPPING)
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("window", [8, 32])
def test_kept_positions_equal_the_reference(method: str, heads: tuple[int, int], window: int, rounding: str) -> None:
    for budget, length, layer_idx in [(48, 150, 0), (96, 150, 1), (128, 300, 2), (64, 70, 1)]:
        config = config_of(method, budget, window, heads[0], rounding=rounding)
        for seed in range(budget, budget + 29):  # the first seed whose cuts are all clear
            query, key = states(seed, heads, length)
            wanted = expected(query[0], key[0], config, layer_idx)
            if wanted.margin >= SAFE_MARGIN:
                break
        else:
            pytest.fail("no seed with clear cuts among 29: the reference or the margin is wrong")
        kept = select_positions(query, key, config, layer_idx=layer_idx, num_layers=NUM_LAYERS)
        assert as_lists(kept) == [wanted.positions]
        if rounding == "exact" and method in ("snapkv", "adakv"):
            assert sum(map(len, kept[0])) == budget * heads[1]


@pytest.mark.parametrize("method", ["snapkv", "adakv"])
def test_scores_are_scaled_as_the_attention_is(method: str) -> None:
    config = config_of(method, 48, 8, 8)
    query, key = states(3, (8, 4), 200)
    kept = {}
    for scaling in (None, 16**-0.5, 1.0, 0.05):
        wanted = expected(query[0], key[0], config, 0, scaling)
        assert wanted.margin >= SAFE_MARGIN
        kept[scaling] = as_lists(
            select_positions(query, key, config, layer_idx=0, num_layers=NUM_LAYERS, scaling=scaling)
        )
        assert kept[scaling] == [wanted.positions]
    assert kept[None] == kept[16**-0.5] != kept[1.0] != kept[0.05]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_are_scored_in_float32(dtype: torch.dtype) -> None:
    config = config_of("snapkv", 48, 8, 8)
    query, key = (tensor.to(dtype) for tensor in states(3, (8, 4), 200))
    wanted = expected(query[0], key[0], config, 0)
    assert wanted.margin >= SAFE_MARGIN
    assert as_lists(select_positions(query, key, config, layer_idx=0, num_layers=NUM_LAYERS)) == [wanted.positions]


def with_padding(tensors: tuple[Tensor, Tensor], columns: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The columns of the tensors spread over `columns` of longer ones, the rest filled with large garbage."""
    spread = []
    for tensor in tensors:
        wide = torch.full((*tensor.shape[:2], length, tensor.shape[3]), 7.0)
        wide[:, :, columns] = tensor
        spread.append(wide)
    return spread[0], spread[1]


@pytest.mark.parametrize("rounding", ["exact", "paper"])
@pytest.mark.parametrize("method", [*DROPPING, "fullkv"])
def test_padding_anywhere_changes_nothing(method: str, rounding: str) -> None:
    """Left, right, scattered padding, a short row and an unpadded one in one batch: each row as it is alone."""
    config = config_of(method, 48, 8, 8, rounding=rounding)
    total = 160
    generator = torch.Generator().manual_seed(1)
    columns = [
        torch.arange(60, 160),
        torch.arange(0, 90),
        torch.randperm(total, generator=generator)[:120].sort().values,
        torch.arange(total),
        torch.arange(155, 160),  # shorter than the window
        torch.arange(20, 68),  # as long as the budget
    ]
    rows = [states(seed + 1, (8, 4), len(row)) for seed, row in enumerate(columns)]
    padded = [with_padding(row, where, total) for row, where in zip(rows, columns, strict=True)]
    mask = torch.zeros(len(columns), total, dtype=torch.long)
    for index, where in enumerate(columns):
        mask[index, where] = 1
    together = select_positions(
        torch.cat([query for query, _ in padded]),
        torch.cat([key for _, key in padded]),
        config,
        layer_idx=1,
        num_layers=NUM_LAYERS,
        attention_mask=mask,
    )
    for (query, key), where, kept in zip(rows, columns, together, strict=True):
        wanted = expected(query[0], key[0], config, 1)
        assert wanted.margin >= SAFE_MARGIN
        assert as_lists([kept]) == [[where[positions].tolist() for positions in wanted.positions]]
        assert all(positions.dtype == torch.long for positions in kept)


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_dtype(kind: torch.dtype) -> None:
    query, key = states(0, (4, 2), 80)
    mask = torch.ones(1, 80, dtype=kind)
    mask[0, 3] = 0
    kept = select_positions(
        query, key, config_of("snapkv", 79, 8, 4), layer_idx=0, num_layers=NUM_LAYERS, attention_mask=mask
    )
    assert as_lists(kept)[0] == [[column for column in range(80) if column != 3]] * 2


def test_a_row_without_any_token_keeps_nothing() -> None:
    query, key = states(0, (4, 2), 60, batch=2)
    mask = torch.ones(2, 60)
    mask[1] = 0
    for method in DROPPING:
        kept = select_positions(
            query, key, config_of(method, 16, 8, 4), layer_idx=0, num_layers=NUM_LAYERS, attention_mask=mask
        )
        assert [len(positions) for positions in kept[1]] == [0, 0] and len(kept[0][0]) >= 8


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31])
@pytest.mark.parametrize("method", [*DROPPING, "fullkv", "mask", "mask_random"])
def test_short_prompts_are_kept_whole(method: str, length: int) -> None:
    query, key = states(0, (4, 2), length)
    for rounding in ("exact", "paper"):
        config = config_of(method, 32, 8, 4, rounding=rounding)
        kept = select_positions(query, key, config, layer_idx=2, num_layers=NUM_LAYERS)
        assert as_lists(kept) == [[list(range(length))] * 2]


@pytest.mark.parametrize("method", DROPPING)
def test_exact_totals_over_the_model(method: str) -> None:
    """min(budget, T) * L * Hkv rows, on both sides of T = budget, and with nothing but the window."""
    for budget, length in itertools.product([8, 24, 40], [39, 40, 41, 90]):
        config = config_of(method, budget, 8, 4)
        total = 0
        for layer_idx in range(NUM_LAYERS):
            query, key = states(layer_idx, (4, 2), length)
            kept = select_positions(query, key, config, layer_idx=layer_idx, num_layers=NUM_LAYERS)[0]
            for positions in kept:
                assert positions.tolist() == sorted(set(positions.tolist()))
                assert set(range(length - 8, length)) <= set(positions.tolist())
            total += sum(map(len, kept))
        assert total == min(budget, length) * NUM_LAYERS * 2


def test_the_papers_adakv_jumps_where_the_prompt_is_as_long_as_the_budget() -> None:
    """One token shorter is kept whole; at T = budget heads are rounded on their own: 8 + 0.8 * 44 = 43.2."""
    config = config_of("adakv", 52, 8, 4, rounding="paper")
    sizes = {
        length: [
            len(kept) for kept in select_positions(*states(0, (4, 2), length), config, layer_idx=0, num_layers=3)[0]
        ]
        for length in (51, 52)
    }
    assert sizes == {51: [51, 51], 52: [51, 51]}


def test_every_layer_of_random_follows_one_draw() -> None:
    config = config_of("random", 24, 8, 4)
    sizes = [
        [len(kept) for kept in select_positions(*states(0, (4, 2), 90), config, layer_idx=layer, num_layers=3)[0]]
        for layer in range(3)
    ]
    plan = Plan(config, 3, 4, 2)
    assert sizes == plan.budgets(90).tolist()


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("before", [1, 2, 4, 50])
def test_pooled_scores(kernel: int, before: int) -> None:
    """Zero padding is counted in the mean, and no window column leaks into its neighbours."""
    query, key = states(4, (6, 3), before + 8)
    config = config_of("snapkv", 16, 8, 6, kernel_size=kernel)
    starts, num_queries = torch.zeros(1, 3, dtype=torch.int32), torch.tensor([8], dtype=torch.int32)
    scores = pooled_window_scores(config, PromptStates(query, key, starts, num_queries, 8, 0.3))
    wanted = reference.pooled_scores(query[0].numpy(), key[0].numpy(), 8, kernel, 0.3)
    torch.testing.assert_close(scores[0].double(), torch.from_numpy(wanted), rtol=1e-5, atol=1e-9)


# -- what the cache asks -----------------------------------------------------------------------------------------------


def ragged_lists(rows: object) -> list[list[int]]:
    ends = rows.cu_kept.tolist()
    return [rows.positions[begin:end].tolist() for begin, end in itertools.pairwise(ends)]


@pytest.mark.parametrize("method", [*DROPPING, "fullkv"])
def test_metadata_is_per_kv_head_and_known_to_the_host(method: str) -> None:
    query, key = states(0, (8, 2), 100, batch=3)
    config = config_of(method, 24, 8, 8)
    plan = Plan(config, NUM_LAYERS, 8, 2)
    lengths = torch.tensor([100, 30, 5])
    starts = (100 - lengths).int()[:, None].expand(-1, 2)
    rows = choose_rows(plan, 0, PromptStates(query, key, starts, lengths.int(), 8, 0.3), lengths.tolist())
    assert rows.kept.shape == (3, 2) and rows.cu_kept.shape == (7,) and rows.positions.shape == (rows.total,)
    assert {rows.kept.dtype, rows.cu_kept.dtype, rows.positions.dtype} == {torch.int32}
    assert rows.cu_kept.tolist() == [0, *itertools.accumulate(rows.kept.flatten().tolist())]
    assert isinstance(rows.total, int) and rows.total == int(rows.kept.sum())


@pytest.mark.parametrize("chunk", [3, 8, 20])
@pytest.mark.parametrize("method", DROPPING)
def test_later_turns_let_ragged_rows_compete(method: str, chunk: int) -> None:
    """Heads hold different numbers of rows; few queries may rank them; budgets are those of all tokens seen."""
    seen, window, budget = [140, 90], 8, 32
    config = config_of(method, budget, window, 4, compress_turns="every")
    plan = Plan(config, NUM_LAYERS, 4, 2)
    available = torch.tensor([[30, 75], [62, 20]])
    query, key = states(11, (4, 2), 75, batch=2)
    num_queries = min(window, chunk)
    counted = torch.tensor([num_queries, min(num_queries, 2)], dtype=torch.int32)
    scaling = query.shape[-1] ** -0.5
    held = PromptStates(query[:, :, 75 - chunk :], key, (75 - available).int(), counted, window, scaling)
    rows = choose_rows(plan, 1, held, seen)
    for index, kept in enumerate(ragged_lists(rows)):
        b, head = divmod(index, 2)
        has = int(available[b, head])
        used = num_queries if b == 0 else min(num_queries, 2)
        group = query[b, 2 * head : 2 * head + 2, 75 - used :].numpy()
        pooled = reference.pooled_scores(group, key[b, head : head + 1, 75 - has :].numpy(), window, 5)
        count = len(kept) if method == "adakv" else min(int(plan.budgets(seen[b])[1, head]), has)
        wanted = reference.top_positions(pooled, [count], window, has)
        assert wanted.margin >= SAFE_MARGIN
        assert kept == [75 - has + position for position in wanted.positions[0]]
    if method == "adakv":
        kept = rows.kept.long()
        assert (kept <= available).all() and (kept >= window).all() and (kept.sum(1) <= 2 * budget).all()


@pytest.mark.parametrize("method", [*DROPPING, "fullkv"])
def test_nothing_is_read_back_from_the_device(method: str) -> None:
    """Tensors on the meta device have no values: whatever asks for one raises. The total is known all the same."""
    query, key = (tensor.to("meta") for tensor in states(0, (8, 2), 100, batch=2))
    config = config_of(method, 24, 8, 8)
    plan = Plan(config, NUM_LAYERS, 8, 2)
    starts, lengths = torch.tensor([[0, 0], [40, 40]], dtype=torch.int32), torch.tensor([100, 60], dtype=torch.int32)
    rows = choose_rows(plan, 0, PromptStates(query, key, starts, lengths, 8, 0.3), [100, 60])
    assert rows.positions.device.type == "meta" and rows.positions.shape == (rows.total,)
    if method in ("snapkv", "adakv"):
        assert rows.total == 2 * 2 * 24


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", [*DROPPING, "fullkv"])
def test_the_device_is_not_waited_for(method: str) -> None:
    query, key = (tensor.cuda() for tensor in states(0, (8, 2), 100, batch=2))
    config = config_of(method, 24, 8, 8)
    plan = Plan(config, NUM_LAYERS, 8, 2)
    lengths = torch.tensor([100, 60])
    starts = (100 - lengths).int()[:, None].expand(-1, 2)
    held = PromptStates(query, key, starts, lengths.int(), 8, 0.3)
    choose_rows(plan, 0, held, lengths.tolist())  # libraries set themselves up on first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = choose_rows(plan, 0, held, lengths.tolist())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    held = dataclasses.replace(held, query=query.cpu(), key=key.cpu())
    on_cpu = choose_rows(plan, 0, held, lengths.tolist())
    assert rows.kept.tolist() == on_cpu.kept.tolist() and rows.positions.tolist() == on_cpu.positions.tolist()


def test_tensors_that_do_not_belong_together() -> None:
    config = config_of("snapkv", 48, 8, 4)
    query, key = states(0, (4, 2), 60)
    layers = {"layer_idx": 0, "num_layers": NUM_LAYERS}
    for bad_query, bad_key, others, message in [
        (query[0], key, layers, "must be"),
        (query, key[:, :, :-1], layers, "differ"),
        (query[:, :3], key, layers, "do not divide"),
        (query, key[..., :8], layers, "differ"),
        (query, key, {"layer_idx": 3, "num_layers": 3}, "layer_idx=3"),
        (query, key, {**layers, "attention_mask": torch.ones(1, 59)}, "attention_mask"),
    ]:
        with pytest.raises(ValueError, match=message):
            select_positions(bad_query, bad_key, config, **others)


@pytest.mark.parametrize("rounding", ["exact", "paper"])
@pytest.mark.parametrize("length", [3, 8, 9])
def test_adakv_where_the_window_is_all_there_is(rounding: str, length: int) -> None:
    """budget = window_size, and prompts shorter than it, as long, and one token longer."""
    config = CompressionConfig("adakv", 8, window_size=8, rounding=rounding)
    query, key = torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8)
    (kept,) = select_positions(query, key, config, layer_idx=0, num_layers=1)
    assert [positions.tolist() for positions in kept] == [list(range(max(0, length - 8), length))] * 2
