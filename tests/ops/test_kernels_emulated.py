"""The CUDA kernel sources, executed on the CPU (tests/support/emulation): the cases of the other operators' tests, and
permuted thread orders."""

from __future__ import annotations

from pathlib import Path

import fused_cases
import pytest
import ragged_cases as cases
import torch
from emulation import ROOT, Emulated, compile_emulation, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler to build the emulation with")

BUILD = ROOT / "build" / "emulation"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIMS = [32, 64, 72, 80, 96, 112, 128, 256]


@pytest.fixture(scope="session")
def library() -> Path:
    return compile_emulation(BUILD)


@pytest.fixture(params=[0, 1, 2])
def emulated(library, request) -> Emulated:
    return Emulated(library, seed=request.param, resident=(7, 1, 40)[request.param])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("strided", [False, True])
def test_compact(emulated, dtype, head_dim, strided):
    kept = [7, 0, 1, 33, 5, 33] if head_dim > 64 else [0, 150, 64, 65, 0, 1]
    case = cases.compact_case(kept, 2, max(kept), head_dim, dtype, seed=head_dim, strided=strided)
    case.check(*case.run(emulated.compact))


def test_compact_ignores_what_lies_outside(emulated):
    case = cases.compact_case([3, 2], 1, 5, 64, torch.float32, seed=0)
    case.positions[1], case.positions[4] = 5, -1
    for item, slot in ((1, int(case.offsets[0]) + 1), (4, int(case.offsets[1]) + 1)):
        case.expected_key[slot] = case.expected_value[slot] = cases.poison(torch.float32)
        assert item < case.positions.shape[0]
    case.check(*case.run(emulated.compact))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("n", "masked"), [(1, False), (1, True), (4, True), (300, True), (300, False)])
def test_append(emulated, dtype, head_dim, n, masked):
    if n > 100 and head_dim not in (32, 72):
        pytest.skip("long appends are tested at two head dims")
    cases.check_append(emulated.append, dtype, head_dim, n, masked)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
def test_decode_of_one_query(emulated, dtype, head_dim, group):
    case = cases.decode_case([0, 1, 63, 64, 65, 210], batch=2, group=group, head_dim=head_dim, dtype=dtype, seed=group)
    cases.check_decode(case, *emulated.varlen_decode(*case.arguments()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "group"), [(2, 1), (3, 4), (5, 7), (19, 2)])
def test_decode_of_several_queries(emulated, dtype, n, group):
    case = cases.decode_case([0, 3, 70, 131], batch=2, group=group, n=n, head_dim=64, dtype=dtype, seed=n)
    cases.check_decode(case, *emulated.varlen_decode(*case.arguments()))


def test_decode_counts_later_rows_as_told(emulated):
    num_later = torch.tensor([[0, 2, 7], [5, 5, 0]], dtype=torch.int32)
    case = cases.decode_case([6, 140, 5, 9], batch=2, group=2, n=3, head_dim=48, dtype=torch.bfloat16,
                             num_later=num_later)  # fmt: skip
    cases.check_decode(case, *emulated.varlen_decode(*case.arguments()))


@pytest.mark.parametrize("lens", [[900, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 640, 0, 0], [64] * 4])
@pytest.mark.parametrize("resident", [1, 2, 3, 5, 17])
def test_decode_of_skewed_lengths_on_any_grid(library, lens, resident):
    for dtype in (torch.float32, torch.bfloat16):
        case = cases.decode_case(lens, group=2, head_dim=40, dtype=dtype, seed=resident)
        cases.check_decode(case, *Emulated(library, 5, resident).varlen_decode(*case.arguments()))


def test_sequences_that_have_ended_see_nothing(emulated):
    cases.check_decode_of_ended(emulated.varlen_decode)


@pytest.mark.parametrize("n", [1, 3])
def test_decode_with_a_block_for_every_list(library, n):
    """Few rows, or more lists than run at once; some lists empty."""
    for lens, resident in (([30, 0, 60, 1], 50), ([900, 0, 3, 70], 2)):
        for dtype in (torch.float32, torch.bfloat16):
            case = cases.decode_case(lens, group=3, n=n, head_dim=40, dtype=dtype, seed=resident)
            cases.check_decode(case, *Emulated(library, 3, resident).varlen_decode(*case.arguments()))


def test_decode_of_more_lists_than_threads(library):
    lens = cases.skewed_lens(300, 40, seed=1)
    assert max(lens) > 6 * sorted(lens)[150]
    case = cases.decode_case(lens, batch=3, group=1, head_dim=32, dtype=torch.bfloat16)
    cases.check_decode(case, *Emulated(library, 9, 50).varlen_decode(*case.arguments()))


@pytest.mark.parametrize(("lists", "group", "n"), [(8, 7, 131072), (64, 8, 65536), (70000, 1, 1), (4, 4, 1 << 20)])
def test_decode_of_more_query_blocks_than_a_grid_counts_in_y(library, lists, group, n):
    Emulated(library).decode_launches(lists, group, n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [5.0, 60.0])
def test_decode_of_peaked_attention(emulated, dtype, spread):
    case = cases.decode_case([300, 150], group=4, head_dim=64, dtype=dtype, spread=spread)
    cases.check_decode(case, *emulated.varlen_decode(*case.arguments()))


def test_decode_of_16_bit_rows_loses_only_the_last_rounding(emulated):
    """The weights are not rounded to 16 bits on their way to the tensor cores."""
    cases.check_last_rounding(emulated.varlen_decode)


def test_decode_does_not_hide_a_nan(emulated):
    case = cases.decode_case([200, 40], head_dim=32, dtype=torch.bfloat16)
    case.key_buffer[int(case.offsets[0]) + 130] = float("nan")
    out, _ = emulated.varlen_decode(*case.arguments())
    assert out[0, 0].isnan().all() and not out[0, 1].isnan().any()


def test_decode_result_does_not_depend_on_the_order_of_threads(library):
    case = cases.decode_case([300, 2, 0, 77], group=4, head_dim=64, dtype=torch.bfloat16)
    first = Emulated(library, 0, 5).varlen_decode(*case.arguments())
    for seed in (1, 2, 3):
        again = Emulated(library, seed, 5).varlen_decode(*case.arguments())
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("shape", [(1, 2, 1, 32, 70), (2, 2, 4, 8, 61), (2, 1, 7, 5, 5), (3, 2, 2, 1, 9)])
def test_window_scores(emulated, dtype, head_dim, shape):
    arguments = cases.window_case(*shape, head_dim, dtype, seed=head_dim)
    exact = cases.window_reference(*arguments)
    scores = emulated.window_scores(*arguments)
    torch.testing.assert_close(scores.double(), exact, rtol=3e-5, atol=1e-9)
    assert torch.all(scores[exact == 0] == 0)


def test_window_scores_over_several_chunks(emulated):
    arguments = cases.window_case(1, 1, 2, 16, 2100, 32, torch.bfloat16, seed=3)
    scores = emulated.window_scores(*arguments)
    torch.testing.assert_close(scores.double(), cases.window_reference(*arguments), rtol=3e-5, atol=1e-9)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", [(6, 50, 8), (3, 1, 4), (5, 700, 32), (4, 1100, 0), (3, 513, 600)])
def test_select_rows(emulated, shape, ties):
    arguments = cases.select_case(*shape, seed=sum(shape), ties=ties)
    assert torch.equal(emulated.select_rows(*arguments), cases.select_reference(*arguments))


def test_select_rows_ranks_nan_first(emulated):
    scores = torch.tensor([[0.5, float("nan"), 0.1, float("inf"), -1.0]])
    one = torch.ones(1, dtype=torch.int32)
    cu_kept = torch.tensor([0, 2], dtype=torch.int32)
    assert emulated.select_rows(scores, 0 * one, 2 * one, 0, cu_kept, 2).tolist() == [1, 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("size", [8, 1000, 4104])
def test_add_rms_norm(emulated, dtype, unit_offset, size):
    fused_cases.check_add_rms_norm(emulated.add_rms_norm, dtype, 2, size, unit_offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", fused_cases.ROPE_CASES)
def test_rope_append(emulated, dtype, case):
    fused_cases.check_rope_append(emulated.rope_append, dtype, **case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(fused_cases.ACTIVATIONS))
@pytest.mark.parametrize("size", [8, 2504])
def test_gated_activations(emulated, dtype, name, size):
    fused_cases.check_gated(getattr(emulated, name), name, dtype, 3, size)
