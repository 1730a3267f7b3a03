"""The CUDA kernel sources, executed on the CPU (tests/support/emulation): the cases of the other operators' tests,
permuted thread orders, planted faults, AddressSanitizer."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import fused_cases
import pytest
import ragged_cases as cases
import torch
from emulation import ROOT, Emulated, EmulationError, compile_emulation, compiler

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
    check_append(emulated, dtype, head_dim, n, masked)


def check_append(emulated, dtype, head_dim, n, masked):
    generator = torch.Generator().manual_seed(n + head_dim)
    batch, heads = 2, 3
    offsets, lens, slots = cases.ragged_layout([4, 0, 9, 1, 2, 0], slack=[n, n + 1, n - 1, 7, n, 0], lead=1)
    slots += n  # rows behind the last list, which nothing may write
    key = torch.randn(batch, n, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
    value = torch.randn(batch, heads, n, head_dim, generator=generator).to(dtype)
    mask = (torch.rand(batch, n, generator=generator) < 0.7) if masked else None
    buffers = [torch.full((slots, head_dim), cases.poison(dtype), dtype=dtype) for _ in range(2)]
    expected, expected_lens, full = [b.clone() for b in buffers], lens.clone(), 0
    for r in range(batch * heads):
        stored = [i for i in range(n) if mask is None or mask[r // heads, i]]
        if int(lens[r]) + len(stored) > int(offsets[r + 1] - offsets[r]):
            full = 1
            continue
        first = int(offsets[r] + lens[r])
        for source, target in zip((key, value), expected, strict=True):
            target[first : first + len(stored)] = source[r // heads, r % heads, stored]
        expected_lens[r] += len(stored)
    overflow = torch.zeros(1, dtype=torch.int32)
    emulated.append(key, value, offsets, lens, *buffers, overflow, mask)
    assert torch.equal(lens, expected_lens)
    assert int(overflow) == full
    assert torch.equal(buffers[0], expected[0]) and torch.equal(buffers[1], expected[1])


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
    check_ended(emulated)


def check_ended(emulated):
    """With lists shared by blocks, and with a block for each."""
    later = torch.tensor([[0], [torch.iinfo(torch.int32).max]], dtype=torch.int32)
    for lens in ([300, 0, 290, 5], [20, 3, 0, 30]):
        case = cases.decode_case(lens, batch=2, group=2, head_dim=32, dtype=torch.bfloat16, num_later=later)
        cases.check_decode(case, *emulated.varlen_decode(*case.arguments()))


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


def check_last_rounding(emulated):
    case = cases.decode_case([400, 400], group=4, head_dim=64, dtype=torch.bfloat16)
    out, _ = emulated.varlen_decode(*case.arguments())
    assert float((out == cases.decode_reference(case)[0].bfloat16()).double().mean()) > 0.99


def test_decode_of_16_bit_rows_loses_only_the_last_rounding(emulated):
    """The weights are not rounded to 16 bits on their way to the tensor cores."""
    check_last_rounding(emulated)


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


# Tests of the tests: each fault, planted into a copy of the kernels, must be noticed.


def exercise(emulated: Emulated) -> None:
    """A short run of the operators over rows; raises (an assertion or EmulationError) where something is wrong."""
    check_last_rounding(emulated)
    case = cases.compact_case([7, 0, 70, 5], 2, 70, 72, torch.bfloat16, seed=1)
    case.check(*case.run(emulated.compact))
    check_append(emulated, torch.bfloat16, 72, 3, True)
    check_append(emulated, torch.float32, 32, 300, True)
    for dtype, head_dim in ((torch.float32, 40), (torch.bfloat16, 64)):
        case = cases.decode_case([0, 1, 330, 65], batch=2, group=3, n=2, head_dim=head_dim, dtype=dtype)
        cases.check_decode(case, *emulated.varlen_decode(*case.arguments()))
    case = cases.decode_case([20, 1400], head_dim=64, dtype=torch.float32, spread=4.0)
    check_ended(emulated)
    wide = copy.copy(emulated)
    wide.resident = 24  # more blocks on one list than warps that merge them
    cases.check_decode(case, *wide.varlen_decode(*case.arguments()))
    arguments = cases.window_case(2, 2, 3, 9, 90, 64, torch.bfloat16, seed=2)
    torch.testing.assert_close(emulated.window_scores(*arguments).double(), cases.window_reference(*arguments),
                               rtol=3e-5, atol=1e-9)  # fmt: skip
    arguments = cases.select_case(4, 900, 8, seed=3, ties=True)
    assert torch.equal(emulated.select_rows(*arguments), cases.select_reference(*arguments))


def exercise_fused(emulated: Emulated) -> None:
    """The same for the operators around attention."""
    for unit_offset in (False, True):
        fused_cases.check_add_rms_norm(emulated.add_rms_norm, torch.bfloat16, 2, 1000, unit_offset)
    fused_cases.check_rope_append(emulated.rope_append, torch.bfloat16, 64, n=3, width=40, masked=True, normed="llama")
    fused_cases.check_rope_append(emulated.rope_append, torch.float32, 32, interleaved=True)
    for name in fused_cases.ACTIVATIONS:
        fused_cases.check_gated(getattr(emulated, name), name, torch.bfloat16, 3, 200)


FAULTS = {
    "no barrier between the warps' results and their merge": (
        "decode.cuh", "row_end);\n    sync_block();", "row_end);"),
    "no barrier before the next list overwrites shared memory": (
        "decode.cuh", "partial);\n    sync_block();  // the results", "partial);  // the results"),
    "no barrier between looking rows up and copying them": (
        "copy.cuh", "    rows[i] = row;\n  }\n  sync_block();", "    rows[i] = row;\n  }"),
    "no barrier before the histogram is read": (
        "select.cuh", "      }\n      sync_block();\n      if (warp == 0)", "      }\n      if (warp == 0)"),
    "no barrier between ballot counts and their use": (
        "copy.cuh", "count_bits(votes);\n    sync_block();", "count_bits(votes);"),
    "partial results of the wrong half are merged": (
        "decode.cuh", "(cta == first ? 1 : 0)", "(cta == first ? 0 : 1)"),
    "a list of its own block ends early": (
        "decode.cuh", "row_end = length;\n    int64_t", "row_end = length - 1;\n    int64_t"),
    "a list of its own block is merged like a shared one": (
        "decode.cuh", "int64_t partial = -1;", "int64_t partial = 0;"),
    "sequences that have ended are read": (
        "decode.cuh", "  const int seen = length - later;", "  const int seen = length - (later > 9999 ? 0 : later);"),
    "one partial result is left out of the merge": ("decode.cuh", "cta <= last; cta", "cta < last; cta"),
    "partial results are added without rescaling": (
        "decode.cuh", "value[v][j] * keep + source[j] * add", "value[v][j] + source[j]"),
    "a running output is not rescaled": ("decode.cuh", "out[e][j][0][1] *= factor;", ""),
    "causality off by one": ("decode.cuh", "a.num_queries - 1 - i;", "a.num_queries - i;"),
    "lanes leave before a shuffle": (
        "decode.cuh", "  sum += shuffle_xor(sum, 1);", "  if (part == 3) return;\n  sum += shuffle_xor(sum, 1);"),
    "a shuffle in one branch only": (
        "window.cuh", "for (int step = 4; step < 32; step *= 2) sum",
        "if (quad < 4) for (int step = 4; step < 32; step *= 2) sum"),
    "a barrier that some threads skip": (
        "select.cuh", "      sync_block();\n      cut |=", "      if (thread != 7) sync_block();\n      cut |="),
    "append into a full list": ("copy.cuh", "length + total > capacity", "length > capacity"),
    "the length moves on before it is read": (
        "copy.cuh", "  sync_block();  // every thread has read the length (and the counts) by now\n", ""),
    "key rows in the wrong order": ("row_math.cuh", "row + tile * 8 + lane / 4;\n      const int present",
                                    "row + (1 - tile) * 8 + lane / 4;\n      const int present"),
    "weights of the second row pair swapped": (
        "row_math.cuh", "join_low(row[2][j / 2], row[3][j / 2])", "join_low(row[3][j / 2], row[2][j / 2])"),
    "the remainder of the weights is dropped": ("row_math.cuh", "        mma<T>(c, remainder, b);\n", ""),
    "ties taken from the top": ("select.cuh", "tie && ties_before < wanted", "tie && ties_before >= wanted"),
    "uncounted queries are averaged in": (
        "window.cuh", "i >= a.window - a.num_queries[b] && sum != 0", "sum != 0"),
    "a norm reads the warps' sums too early": ("fused.cuh", "= squares;\n  sync_block();", "= squares;"),
    "a norm of one warp's share": ("fused.cuh", "w < kNormThreads / 32", "w < 1"),
    "a norm of the sum before it is rounded": (
        "fused.cuh", "from_float<T>(unit_offset ? y * (weight + 1.0f) : weight * rounded<T>(y))",
        "from_float<T>(unit_offset ? y * (weight + 1.0f) : weight * y)"),
    "the weight's offset is forgotten": ("fused.cuh", "y * (weight + 1.0f)", "y * weight"),
    "the sum is not stored": ("fused.cuh", "if (residual) v.store(", "if (residual && thread != 3) v.store("),
    "the rotation turns the other way": ("fused.cuh", "-high * to_float(sin[i])", "high * to_float(sin[i])"),
    "products are added before they are rounded": (
        "fused.cuh", "rounded<T>(low * to_float(cos[i])) + rounded<T>(-high", "(low * to_float(cos[i])) + (-high"),
    "what is not rotated is left out": ("fused.cuh", "d = a.width + lane", "d = a.head_dim + lane"),
    "the length moves on before other warps have read it": (
        "fused.cuh", "  sync_block();  // every thread has read the length by now\n", ""),
    "a full list is rotated into": ("fused.cuh", "begin + length + total > end", "begin + length > end"),
    "columns that are not stored leave gaps": ("fused.cuh", "first + stored_before(i)", "first + i"),
    "keys are normalised by the queries' weight": (
        "fused.cuh", "is_query ? a.query_weight : a.key_weight", "a.query_weight"),
    "neighbours are rotated with the other pairs' angles": (
        "fused.cuh", "const int at = a.interleaved ? i : second", "const int at = second"),
    "gate and up change places": ("fused.cuh", "(a.up) + row * a.up_stride", "(a.gate) + row * a.up_stride"),
    "an activation before its rounding": (
        "fused.cuh", "rounded<T>(activated(a.activation, to_float(gate.value[j])))",
        "activated(a.activation, to_float(gate.value[j]))"),
    "rows of one product lie apart": ("fused.cuh", "row * a.gate_stride + i", "row * a.size + i"),
}  # fmt: skip


def test_the_exercise_passes_without_a_fault(library):
    for seed in range(4):
        emulated = Emulated(library, seed, 5)
        exercise(emulated)
        exercise_fused(emulated)


@pytest.mark.parametrize("fault", list(FAULTS))
def test_planted_faults_are_caught(fault, tmp_path):
    file, old, new = FAULTS[fault]
    part, run = ("fused", exercise_fused) if file == "fused.cuh" else ("rows", exercise)
    emulated = Emulated(compile_emulation(tmp_path, {file: [(old, new)]}, small=True, parts=(part,)), resident=5)
    for seed in range(12):
        emulated.seed = seed
        try:
            run(emulated)
        except (AssertionError, EmulationError):
            return
    pytest.fail(f"nothing noticed: {fault}")


ASAN_RUN = """
import sys
sys.path[:0] = {folders!r}
import test_kernels_emulated as t
from emulation import Emulated
from pathlib import Path
for seed in (0, 1):
    emulated = Emulated(Path({library!r}), seed, 5)
    for exercise in {exercises!r}:
        getattr(t, exercise)(emulated)
print("finished")
"""


def run_under_asan(library: Path, *exercises: str) -> subprocess.CompletedProcess:
    runtime = subprocess.run([compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("this compiler has no AddressSanitizer runtime")
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": options, "SPARSEMM_KERNELS": "reference"}
    folders = [str(ROOT / "tests" / name) for name in ("ops", "support")]
    code = ASAN_RUN.format(folders=folders, library=str(library), exercises=exercises)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


def test_address_sanitizer_finds_nothing(tmp_path):
    result = run_under_asan(compile_emulation(BUILD, sanitize=True, small=True), "exercise", "exercise_fused")
    assert result.returncode == 0 and "finished" in result.stdout, result.stderr[-3000:]


@pytest.mark.parametrize(
    "fault",
    [
        ("copy.cuh", "(begin + length + rank) * a.row_bytes", "(a.slots - begin + length + rank) * a.row_bytes"),
        ("fused.cuh", "first = begin + length;", "first = a.slots + length;"),
        ("decode.cuh", "constexpr int kCombineShared = (", "constexpr int kCombineShared = -64 + ("),
    ],
    ids=["overrun append", "overrun rotation", "too little shared memory"],
)  # fmt: skip
def test_address_sanitizer_bites(fault, tmp_path):
    file, old, new = fault
    part, run = ("fused", "exercise_fused") if file == "fused.cuh" else ("rows", "exercise")
    library = compile_emulation(tmp_path, {file: [(old, new)]}, sanitize=True, small=True, parts=(part,))
    result = run_under_asan(library, run)
    assert result.returncode != 0 and "AddressSanitizer" in result.stderr, result.stderr[-3000:]
