"""The operators around attention, as this process has them and as PyTorch twins, against transformers' own modules."""

from __future__ import annotations

import inspect

import fused_cases as cases
import pytest
import torch
from torch._subclasses import FakeTensorMode

import sparsemm.ops  # noqa: F401
from sparsemm.ops import library, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPS = {"dispatched": torch.ops.sparsemm, "twin": reference}


@pytest.fixture(params=list(OPS))
def ops(request):
    if request.param == "dispatched" and not library.is_loaded("cpu"):
        pytest.skip("the C++ kernels are not built (make kernels); the twin is tested under its own name")
    return OPS[request.param]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("size", [8, 96, 1000, 4096])
def test_add_rms_norm(ops, dtype, unit_offset, size):
    cases.check_add_rms_norm(ops.add_rms_norm, dtype, 3, size, unit_offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.ROPE_CASES)
def test_rope_append(ops, dtype, case):
    cases.check_rope_append(ops.rope_append, dtype, **case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(cases.ACTIVATIONS))
@pytest.mark.parametrize("size", [8, 100, 5000])
def test_gated_activations(ops, dtype, name, size):
    cases.check_gated(getattr(ops, name), name, dtype, 3, size)


def test_no_rows(ops):
    empty = torch.empty(0, 16)
    assert all(each.numel() == 0 for each in ops.add_rms_norm(empty, empty, torch.ones(16), 1e-6))
    assert ops.silu_mul(empty, empty).shape == (0, 16)


def test_a_nan_is_not_hidden(ops):
    row = torch.ones(2, 40)
    row[0, 37] = float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        bad = row.to(dtype)
        normed, _ = ops.add_rms_norm(bad, bad, bad[1], 1e-6)
        assert normed[0].isnan().all() and not normed[1].isnan().any()
        assert ops.silu_mul(bad, bad)[0].isnan().sum() == 1


def test_several_threads_give_what_one_gives():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        cases.check_add_rms_norm(torch.ops.sparsemm.add_rms_norm, torch.float32, 50, 4096, False)
        cases.check_gated(torch.ops.sparsemm.silu_mul, "silu_mul", torch.float32, 40, 9000)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "place", "change", "message"),
    [
        ("add_rms_norm", 0, lambda x: x.transpose(0, 2), "x must be contiguous"),
        ("add_rms_norm", 1, lambda x: x[:1], "shape of x"),
        ("add_rms_norm", 1, lambda x: x.half(), "residual is"),
        ("add_rms_norm", 2, lambda x: x[:8], "weight must be"),
        ("rope_append", 0, lambda x: x[..., :8], "do not belong together"),
        ("rope_append", 0, lambda x: x.half(), "query is"),
        ("rope_append", 3, lambda x: x[..., :15], "even number"),
        ("rope_append", 3, lambda x: x.repeat(1, 2, 1), "cos must be"),
        ("rope_append", 4, lambda x: x[..., :8], "one shape"),
        ("rope_append", 5, lambda x: x.long(), "offsets must be int32"),
        ("rope_append", 11, lambda x: None, "go together"),
        ("rope_append", 12, lambda x: x[:8], "key_weight must be"),
        ("silu_mul", 1, lambda x: x[:1], "one shape"),
        ("gelu_tanh_mul", 1, lambda x: x.half(), "one dtype"),
    ],
)
def test_wrong_arguments_are_named(ops, name, place, change, message):
    arguments = list(cases.opcheck_arguments()[name])
    getattr(ops, name)(*arguments)
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(*arguments)


@pytest.mark.parametrize("name", list(cases.opcheck_arguments()))
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.sparsemm, name).default, cases.opcheck_arguments()[name])


def test_opcheck_of_a_norm_without_a_residual():
    """The sum is an empty tensor then, of the fake, too."""
    row, _, *rest = cases.opcheck_arguments()["add_rms_norm"]
    torch.library.opcheck(torch.ops.sparsemm.add_rms_norm.default, (row, None, *rest))
    with FakeTensorMode() as fake:
        normed, total = torch.ops.sparsemm.add_rms_norm(fake.from_tensor(row), None, fake.from_tensor(rest[0]), 1e-6)
    assert normed.shape == row.shape and total.shape == (0,)


def test_a_norm_of_one_row(ops):
    row, weight = torch.randn(2, 32), torch.randn(32)
    normed, total = ops.add_rms_norm(row[0], None, weight, 1e-6)
    assert normed.shape == (32,) and total.shape == (0,)
    expected = row[0].double() * (row[0].double().square().mean() + 1e-6).rsqrt() * weight.double()
    torch.testing.assert_close(normed.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["add_rms_norm", "rope_append", "silu_mul", "gelu_tanh_mul"])
def test_twins_have_the_defaults_of_the_schema(name):
    declared = {
        argument.name: argument.default_value
        for argument in getattr(torch.ops.sparsemm, name).default._schema.arguments
        if argument.has_default_value()
    }
    parameters = inspect.signature(getattr(reference, name)).parameters.values()
    assert declared == {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
