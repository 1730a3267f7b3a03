"""The operators `torch.ops.sparsemm.*`, as this process has them (C++ kernels where built) and their PyTorch twins,
against plain float64 loops."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import ragged_cases as cases
import torch

import sparsemm.ops  # noqa: F401
from sparsemm.ops import library, reference, schemas

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = {"dispatched": torch.ops.sparsemm, "twin": reference}


@pytest.fixture(params=list(OPS))
def ops(request):
    if request.param == "dispatched" and not library.is_loaded("cpu"):
        pytest.skip("the C++ kernels are not built (make kernels); the twin is tested under its own name")
    return OPS[request.param]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("head_dim", [12, 32, 64, 80, 128])
@pytest.mark.parametrize("strided", [False, True])
def test_compact_copies_bit_for_bit_and_leaves_the_slack_alone(ops, dtype, head_dim, strided):
    case = cases.compact_case([7, 0, 1, 33, 5, 33], 2, 33, head_dim, dtype, seed=head_dim, strided=strided)
    case.check(*case.run(ops.compact))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_append_writes_behind_the_rows_and_refuses_a_full_list(ops, dtype, n, masked):
    cases.check_append(ops.append, dtype, 40, n, masked)


def test_append_leaves_the_overflow_flag_as_it_was(ops):
    offsets, lens, slots = cases.ragged_layout([1, 1], slack=2)
    rows = torch.ones(1, 2, 1, 8)
    for before in (0, 1):
        overflow = torch.full((1,), before, dtype=torch.int32)
        ops.append(rows, rows, offsets, lens.clone(), torch.zeros(slots, 8), torch.zeros(slots, 8), overflow)
        assert int(overflow) == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 72, 96, 128])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_decode_of_one_query(ops, dtype, head_dim, group):
    lens = [0, 1, 31, 32, 33, 97] if head_dim < 128 else [5, 0, 200, 1]
    case = cases.decode_case(lens, batch=2, group=group, head_dim=head_dim, dtype=dtype, seed=head_dim + group)
    cases.check_decode(case, *ops.varlen_decode(*case.arguments()))


@pytest.mark.parametrize("n", [2, 5, 37])
@pytest.mark.parametrize("group", [1, 8])
def test_decode_of_several_queries_is_causal_among_the_last(ops, n, group):
    case = cases.decode_case([3, 60, 41, 0], batch=2, group=group, n=n, head_dim=32, seed=n)
    cases.check_decode(case, *ops.varlen_decode(*case.arguments()))


def test_decode_counts_later_rows_as_told(ops):
    num_later = torch.tensor([[0, 2, 7], [5, 5, 0]], dtype=torch.int32)
    case = cases.decode_case([6, 40, 5, 9], batch=2, group=2, n=3, head_dim=48, seed=5, num_later=num_later)
    cases.check_decode(case, *ops.varlen_decode(*case.arguments()))


def test_sequences_that_have_ended_see_nothing(ops):
    later = torch.tensor([[0], [torch.iinfo(torch.int32).max]], dtype=torch.int32)
    case = cases.decode_case([6, 140, 500, 9], batch=2, group=2, head_dim=48, num_later=later)
    out, lse = ops.varlen_decode(*case.arguments())
    cases.check_decode(case, out, lse)
    assert not out[1].any() and torch.all(lse[1] == -math.inf) and out[0].all()


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_of_skewed_lengths(ops, dtype, spread):
    lens = cases.skewed_lens(16, 150, seed=3)
    assert max(lens) > 5 * sorted(lens)[8] and 0 in lens
    case = cases.decode_case(lens, batch=2, group=2, head_dim=64, dtype=dtype, seed=11, spread=spread)
    cases.check_decode(case, *ops.varlen_decode(*case.arguments()))


def test_decode_in_float64_keeps_its_precision(ops):
    case = cases.decode_case([70, 3], group=2, n=2, head_dim=24, dtype=torch.float64)
    exact, _ = cases.decode_reference(case)
    out, _ = ops.varlen_decode(*case.arguments())
    assert float((out - exact).abs().max()) < 1e-14


def test_decode_with_several_threads_equals_one():
    lens = [2000, 3, 0, 700]
    case = cases.decode_case(lens, group=3, head_dim=64, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        cases.check_decode(case, *torch.ops.sparsemm.varlen_decode(*case.arguments()))
    finally:
        torch.set_num_threads(before)


def test_decode_does_not_hide_a_nan(ops):
    case = cases.decode_case([40, 40], head_dim=32)
    case.key_buffer[int(case.offsets[0]) + 7] = math.nan
    out, _ = ops.varlen_decode(*case.arguments())
    assert out[0, 0].isnan().all() and not out[0, 1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 2, 1, 32, 70, 128), (2, 2, 4, 8, 61, 64), (2, 1, 7, 5, 5, 40), (3, 2, 2, 1, 9, 32), (2, 2, 2, 20, 200, 72)],
)
def test_window_scores(ops, dtype, shape):
    arguments = cases.window_case(*shape, dtype, seed=shape[-1])
    exact = cases.window_reference(*arguments)
    scores = ops.window_scores(*arguments)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), exact, rtol=2e-5, atol=1e-9)
    assert torch.all(scores[exact == 0] == 0)


def test_window_scores_of_strided_keys(ops):
    query, key, *rest = cases.window_case(2, 3, 2, 8, 50, 64, torch.float32, seed=0)
    expected = ops.window_scores(query, key, *rest)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    assert torch.equal(ops.window_scores(*strided, *rest), expected)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", [(6, 50, 8), (3, 1, 4), (5, 300, 32), (4, 40, 0)])
def test_select_rows(ops, shape, ties):
    arguments = cases.select_case(*shape, seed=sum(shape), ties=ties)
    assert torch.equal(ops.select_rows(*arguments), cases.select_reference(*arguments))


def test_select_rows_without_columns_before_the_window(ops):
    starts, counts = torch.tensor([0, 2], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    cu_kept = torch.tensor([0, 4, 6], dtype=torch.int32)
    positions = ops.select_rows(torch.empty(2, 0), starts, counts, 4, cu_kept, 6)
    assert positions.tolist() == [0, 1, 2, 3, 2, 3]


def _spoil(name: str, place: int, change):
    """A call of operator `name` with argument `place` changed."""
    offsets, lens, slots = cases.ragged_layout([3, 2], slack=2)
    rows, buffer = torch.ones(1, 2, 1, 16), torch.zeros(slots, 16)
    positions, cu_kept = torch.zeros(2, dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    flag, count = torch.zeros(1, dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    starts = torch.zeros(1, 2, dtype=torch.int32)
    arguments = {
        "compact": [rows, rows, positions, cu_kept, offsets, buffer, buffer.clone()],
        "append": [rows, rows, offsets, lens, buffer, buffer.clone(), flag],
        "varlen_decode": [torch.ones(1, 4, 1, 16), buffer, buffer.clone(), offsets, lens, 0.25],
        "window_scores": [torch.ones(1, 4, 1, 16), rows, starts, count, 0.25],
        "select_rows": [torch.ones(2, 3), starts[0], torch.ones(2, dtype=torch.int32), 1, cu_kept * 2, 4],
    }[name]
    arguments[place] = change(arguments[place])
    return arguments


@pytest.mark.parametrize(
    ("name", "place", "change", "message"),
    [
        ("compact", 2, lambda x: x.long(), "positions must be int32"),
        ("compact", 1, lambda x: x.half(), "one dtype"),
        ("compact", 5, lambda x: x[:, :8].contiguous(), "key_buffer must be"),
        ("compact", 6, lambda x: x[::2], "one shape"),
        ("compact", 4, lambda x: x[:2], "offsets"),
        ("append", 3, lambda x: x.long(), "lens must be int32"),
        ("append", 4, lambda x: x.half(), "rows are"),
        ("append", 6, lambda x: x.bool(), "overflow must be int32"),
        ("varlen_decode", 0, lambda x: x[:, :3], "do not divide"),
        ("varlen_decode", 0, lambda x: x[0], "query must be"),
        ("varlen_decode", 3, lambda x: x[:1], "offsets"),
        ("window_scores", 1, lambda x: x[..., :8], "do not belong together"),
        ("window_scores", 0, lambda x: x.repeat(1, 1, 2, 1), "window queries"),
        ("window_scores", 2, lambda x: x.float(), "starts must be int32"),
        ("select_rows", 0, lambda x: x.double(), "scores must be float32"),
        ("select_rows", 3, lambda x: -1, "must not be negative"),
    ],
)
def test_wrong_arguments_are_named(ops, name, place, change, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(*_spoil(name, place, change))


@pytest.mark.parametrize("name", ["compact", "append", "varlen_decode", "window_scores", "select_rows"])
def test_the_unspoilt_call_is_accepted(ops, name):
    getattr(ops, name)(*_spoil(name, 0, lambda x: x))


@pytest.mark.parametrize("name", schemas.SCHEMAS)
def test_every_device_has_the_twins(name):
    """Also those without compiled kernels, whatever is built here."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsemm::{name}", "CompositeExplicitAutograd")


@pytest.mark.skipif(not library.is_loaded("cpu"), reason="the C++ kernels are not built")
def test_rows_outside_the_buffers_are_refused():
    case = cases.decode_case([5, 5])
    with pytest.raises(RuntimeError, match="outside the buffers"):
        torch.ops.sparsemm.varlen_decode(*case.arguments()[:3], case.offsets + 1000, case.lens, case.scale)
    compact = cases.compact_case([2, 2], 1, 5, 32, torch.float32, seed=0)
    compact.positions[0] = 5
    with pytest.raises(RuntimeError, match="position 5"):
        compact.run(torch.ops.sparsemm.compact)


@pytest.mark.parametrize("name", ["compact", "append", "varlen_decode", "window_scores", "select_rows"])
def test_opcheck(name):
    """Schema (mutation and aliasing), fake, autograd registration and tracing with dynamic shapes."""
    torch.library.opcheck(getattr(torch.ops.sparsemm, name).default, cases.opcheck_arguments()[name])


def test_compiled_graph_equals_eager():
    case = cases.decode_case([5, 9], group=2, head_dim=32)
    rows = torch.randn(1, 2, 1, 32)

    def step(query, key_buffer, value_buffer, lens):
        overflow = torch.zeros(1, dtype=torch.int32)
        torch.ops.sparsemm.append(rows, rows, case.offsets, lens, key_buffer, value_buffer, overflow)
        out, lse = torch.ops.sparsemm.varlen_decode(query, key_buffer, value_buffer, case.offsets, lens, case.scale)
        return out * 2, lse, overflow

    def arguments():
        return case.query, case.key_buffer.clone(), case.value_buffer.clone(), case.lens.clone()

    eager_arguments, compiled_arguments = arguments(), arguments()
    eager = step(*eager_arguments)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled_arguments)
    for expected, found in zip((*eager, *eager_arguments), (*compiled, *compiled_arguments), strict=True):
        assert torch.equal(expected, found)


def test_the_environment_can_force_the_twins():
    code = "import sparsemm.ops.library as l; import sys; sys.exit(l.is_loaded('cpu') or l.is_loaded('cuda'))"
    environment = {**os.environ, "SPARSEMM_KERNELS": "reference"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
