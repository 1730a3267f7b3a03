"""The compiled CUDA kernels on a GPU: the cases of the other operators' tests, CUDA graphs, streams, no host waits."""

from __future__ import annotations

import fused_cases
import pytest
import ragged_cases as cases
import torch

from sparsemm.ops import backends, library

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and library.is_loaded("cuda")), reason="needs a GPU and the CUDA kernels"
    ),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIMS = [32, 64, 72, 80, 96, 112, 128, 256]
OPS = torch.ops.sparsemm


def check_decode(case: cases.DecodeCase) -> None:
    out, lse = OPS.varlen_decode(*case.arguments("cuda"))
    cases.check_decode(case, out, lse)


def test_small_run_of_every_operator():
    """What compute-sanitizer watches."""
    case = cases.compact_case([7, 0, 70, 5], 2, 70, 72, torch.bfloat16, seed=1)
    case.check(*case.run(OPS.compact, "cuda"))
    cases.check_append(OPS.append, torch.bfloat16, 72, 3, True, "cuda")
    cases.check_append(OPS.append, torch.float32, 32, 300, True, "cuda")
    for dtype, head_dim in ((torch.float32, 40), (torch.bfloat16, 96), (torch.float16, 256)):
        check_decode(cases.decode_case([0, 1, 330, 65], batch=2, group=3, n=2, head_dim=head_dim, dtype=dtype))
    arguments = cases.window_case(2, 2, 3, 9, 90, 64, torch.bfloat16, seed=2)
    scores = OPS.window_scores(*(x.cuda() for x in arguments[:4]), arguments[4]).cpu()
    torch.testing.assert_close(scores.double(), cases.window_reference(*arguments), rtol=3e-5, atol=1e-9)
    arguments = cases.select_case(4, 900, 8, seed=3, ties=True)
    found = OPS.select_rows(*(x.cuda() if torch.is_tensor(x) else x for x in arguments)).cpu()
    assert torch.equal(found, cases.select_reference(*arguments))
    fused_cases.check_add_rms_norm(OPS.add_rms_norm, torch.bfloat16, 2, 1000, False, "cuda")
    fused_cases.check_rope_append(OPS.rope_append, torch.bfloat16, 64, n=3, masked=True, normed="llama", device="cuda")
    fused_cases.check_gated(OPS.silu_mul, "silu_mul", torch.bfloat16, 3, 200, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("size", [8, 1000, 4096, 8200])
def test_add_rms_norm(dtype, unit_offset, size):
    fused_cases.check_add_rms_norm(OPS.add_rms_norm, dtype, 3, size, unit_offset, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", fused_cases.ROPE_CASES)
def test_rope_append(dtype, case):
    fused_cases.check_rope_append(OPS.rope_append, dtype, **case, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(fused_cases.ACTIVATIONS))
def test_gated_activations(dtype, name):
    fused_cases.check_gated(getattr(OPS, name), name, dtype, 3, 2504, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("strided", [False, True])
def test_compact(dtype, head_dim, strided):
    case = cases.compact_case([7, 0, 1, 33, 150, 64], 2, 150, head_dim, dtype, seed=head_dim, strided=strided)
    case.check(*case.run(OPS.compact, "cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("n", "masked"), [(1, False), (4, True), (300, True), (300, False)])
def test_append(dtype, head_dim, n, masked):
    cases.check_append(OPS.append, dtype, head_dim, n, masked, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
def test_decode_of_one_query(dtype, head_dim, group):
    check_decode(cases.decode_case([0, 1, 63, 64, 65, 210], batch=2, group=group, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "group"), [(2, 1), (3, 4), (5, 7), (19, 2)])
def test_decode_of_several_queries(dtype, n, group):
    check_decode(cases.decode_case([0, 3, 70, 131], batch=2, group=group, n=n, head_dim=64, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_decode_of_skewed_lengths(dtype, spread):
    lens = cases.skewed_lens(64, 600, seed=3)
    check_decode(cases.decode_case(lens, batch=2, group=2, head_dim=128, dtype=dtype, spread=spread))
    check_decode(cases.decode_case([20000, 0, 1, 3], group=1, head_dim=64, dtype=dtype, spread=spread))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("shape", [(1, 2, 1, 32, 70), (2, 2, 4, 8, 61), (2, 1, 7, 5, 5), (1, 1, 2, 16, 2100)])
def test_window_scores(dtype, head_dim, shape):
    arguments = cases.window_case(*shape, head_dim, dtype, seed=head_dim)
    scores = OPS.window_scores(*(x.cuda() for x in arguments[:4]), arguments[4]).cpu()
    exact = cases.window_reference(*arguments)
    torch.testing.assert_close(scores.double(), exact, rtol=5e-5, atol=1e-9)
    assert torch.all(scores[exact == 0] == 0)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", [(6, 50, 8), (3, 1, 4), (40, 3000, 32), (4, 1100, 0)])
def test_select_rows(shape, ties):
    arguments = cases.select_case(*shape, seed=sum(shape), ties=ties)
    found = OPS.select_rows(*(x.cuda() if torch.is_tensor(x) else x for x in arguments)).cpu()
    assert torch.equal(found, cases.select_reference(*arguments))


def test_a_captured_step_follows_the_lengths_on_the_device():
    case = cases.decode_case([70, 3, 0, 200], group=2, head_dim=64, dtype=torch.bfloat16)
    query, key_buffer, value_buffer, offsets, lens, scale, _ = case.arguments("cuda")
    new = torch.randn(1, 4, 1, 64, device="cuda", dtype=torch.bfloat16)
    overflow = torch.zeros(1, dtype=torch.int32, device="cuda")

    def step():
        OPS.append(new, new, offsets, lens, key_buffer, value_buffer, overflow)
        return OPS.varlen_decode(query, key_buffer, value_buffer, offsets, lens, scale)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    case.key_buffer, case.value_buffer, case.lens = key_buffer.cpu(), value_buffer.cpu(), lens.cpu()
    assert case.lens.tolist() == [74, 7, 4, 204] and int(overflow) == 0
    cases.check_decode(case, out, lse)


def test_no_operator_waits_for_the_device():
    case = cases.decode_case([70, 3, 0, 200], group=2, head_dim=64, dtype=torch.bfloat16)
    arguments = case.arguments("cuda")
    new, overflow = torch.randn(1, 4, 1, 64, device="cuda", dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int32)
    overflow = overflow.cuda()
    window = [x.cuda() if torch.is_tensor(x) else x for x in cases.window_case(1, 4, 2, 8, 90, 64, torch.bfloat16, 0)]
    select = [x.cuda() if torch.is_tensor(x) else x for x in cases.select_case(4, 90, 8, seed=3)]
    query, cos = arguments[0], torch.randn(1, 1, 64, device="cuda", dtype=torch.bfloat16)
    states, weight = cos.expand(3, 1, 64).reshape(3, 64), cos.flatten()
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        OPS.append(new, new, *arguments[3:5], *arguments[1:3], overflow)
        OPS.varlen_decode(*arguments)
        OPS.window_scores(*window)
        OPS.select_rows(*select)
        normed, total = OPS.add_rms_norm(states, states, weight, 1e-6)
        OPS.rope_append(query, new, new, cos, cos, *arguments[3:5], *arguments[1:3], overflow)
        OPS.silu_mul(normed, total)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_operators_run_on_the_current_stream():
    case = cases.decode_case([500, 300], head_dim=64, dtype=torch.bfloat16)
    arguments = case.arguments("cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)  # what is enqueued elsewhere would overtake this
        arguments[1].mul_(0)
        out, _ = OPS.varlen_decode(*arguments)
    side.synchronize()
    case.key_buffer.mul_(0)
    torch.testing.assert_close(out.cpu().float(), cases.decode_reference(case)[0].float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["cuda", "fa3", "flash_attn", "torch_varlen", "reference"])
@pytest.mark.parametrize(("n", "group"), [(1, 1), (1, 4), (3, 7)])
def test_every_backend_that_serves_agrees(name, n, group):
    if reason := backends.missing_reason(name, "cuda", torch.bfloat16, 128):
        pytest.skip(f"{name}: {reason}")
    case = cases.decode_case([70, 3, 0, 200, 900, 1], batch=2, group=group, n=n, head_dim=128, dtype=torch.bfloat16)
    decode = backends.resolve_backend(name, "cuda", torch.bfloat16, 128).varlen_decode
    out, lse = decode(*case.arguments("cuda"))
    exact, exact_lse = cases.decode_reference(case)
    torch.testing.assert_close(out.double().cpu(), exact, rtol=3e-2, atol=2e-2)
    torch.testing.assert_close(lse.double().cpu(), exact_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float64, 64), (torch.float32, 20), (torch.bfloat16, 36)])
def test_rows_that_the_kernels_refuse_are_served_by_the_twins(dtype, head_dim):
    served = backends.operators(torch.device("cuda:0"), dtype, head_dim)
    case = cases.decode_case([70, 3, 0, 200], batch=2, group=2, n=3, head_dim=head_dim, dtype=dtype)
    cases.check_decode(case, *served.varlen_decode(*case.arguments("cuda")))
    arguments = cases.window_case(2, 2, 3, 9, 90, head_dim, dtype, seed=2)
    scores = served.window_scores(*(x.cuda() for x in arguments[:4]), arguments[4]).cpu()
    torch.testing.assert_close(scores.double(), cases.window_reference(*arguments), rtol=3e-5, atol=1e-9)
    compact = cases.compact_case([7, 0, 70, 5], 2, 70, head_dim, dtype, seed=1)
    compact.check(*compact.run(served.compact, "cuda"))


def test_decode_of_more_query_blocks_than_a_grid_counts_in_y():
    case = cases.decode_case([5], group=8, n=65536, head_dim=8, dtype=torch.bfloat16)
    check_decode(case)


@pytest.mark.parametrize("name", ["compact", "append", "varlen_decode", "window_scores", "select_rows"])
def test_opcheck_on_the_device(name):
    arguments = [x.cuda() if torch.is_tensor(x) else x for x in cases.opcheck_arguments()[name]]
    torch.library.opcheck(getattr(OPS, name).default, arguments)


def test_arguments_of_another_device_are_refused():
    case = cases.decode_case([5, 5])
    arguments = list(case.arguments("cuda"))
    arguments[4] = arguments[4].cpu()
    with pytest.raises(RuntimeError, match="lens is on another device"):
        OPS.varlen_decode(*arguments)
