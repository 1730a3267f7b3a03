"""Tests of the tests of the CUDA kernels: each fault, planted into a copy of their sources, must be noticed; and
AddressSanitizer over them."""

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


def exercise(emulated: Emulated) -> None:
    """A short run of the operators over rows; raises (an assertion or EmulationError) where something is wrong."""
    cases.check_last_rounding(emulated.varlen_decode)
    case = cases.compact_case([7, 0, 70, 5], 2, 70, 72, torch.bfloat16, seed=1)
    case.check(*case.run(emulated.compact))
    cases.check_append(emulated.append, torch.bfloat16, 72, 3, True)
    cases.check_append(emulated.append, torch.float32, 32, 300, True)
    for dtype, head_dim in ((torch.float32, 40), (torch.bfloat16, 64)):
        case = cases.decode_case([0, 1, 330, 65], batch=2, group=3, n=2, head_dim=head_dim, dtype=dtype)
        cases.check_decode(case, *emulated.varlen_decode(*case.arguments()))
    case = cases.decode_case([20, 1400], head_dim=64, dtype=torch.float32, spread=4.0)
    cases.check_decode_of_ended(emulated.varlen_decode)
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


def test_the_exercise_passes_without_a_fault():
    library = compile_emulation(BUILD)
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
import test_planted_faults as t
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
