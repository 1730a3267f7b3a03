"""Decode backends by name. The FlashAttention libraries need a GPU; here plain PyTorch functions with their signatures
and conventions stand in, so that what is tested is how they are called and how their results are read."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import ragged_cases as cases
import torch

from sparsemm.errors import ConfigError
from sparsemm.ops import backends, library, reference


def plain_varlen(q, k, v, cu_q, cu_k, max_q, max_k, used_k, scale, empty_lse):
    """Causal (aligned to the end) attention per sequence; out `[total, group, D]`, lse `[group, total]`."""
    assert max_q >= int(cu_q.diff().max()) and max_k >= int(used_k.max())  # kernels leave out what lies beyond
    out = torch.full_like(q, float("nan"))
    lse = torch.full((q.shape[1], q.shape[0]), empty_lse)
    for r in range(len(cu_q) - 1):
        begin, n, used = int(cu_q[r]), int(cu_q[r + 1] - cu_q[r]), int(used_k[r])
        for i in range(n):
            seen = used - (n - 1 - i)
            if seen <= 0:
                continue
            rows = slice(int(cu_k[r]), int(cu_k[r]) + seen)
            for head in range(q.shape[1]):
                logits = k[rows, 0].float() @ q[begin + i, head].float() * scale
                out[begin + i, head] = torch.softmax(logits, 0) @ v[rows, 0].float()
                lse[head, begin + i] = torch.logsumexp(logits, 0)
    return out, lse


@pytest.fixture
def stand_ins(monkeypatch):
    """flash_attn and fa3-fwd as modules, with the argument names that the real ones have."""

    def fa3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
            softmax_scale=None, causal=False, num_splits=1, return_attn_probs=False):  # fmt: skip
        assert causal and return_attn_probs and seqused_q is None
        return plain_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                            seqused_k, softmax_scale, float("-inf"))  # fmt: skip

    def fa2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
            window_size_left=-1, window_size_right=-1, seqused_k=None):  # fmt: skip
        assert causal and dropout_p == 0
        out, lse = plain_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                seqused_k, softmax_scale, float("inf"))  # fmt: skip
        return out, lse, None, None

    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward = fa2
    package = types.ModuleType("flash_attn")
    package.flash_attn_interface = interface
    three = types.ModuleType("fa3_fwd_interface")
    three.flash_attn_varlen_func = fa3
    for name, module in {"flash_attn": package, "flash_attn.flash_attn_interface": interface,
                         "fa3_fwd_interface": three}.items():  # fmt: skip
        module.__spec__ = types.SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, module)

    def aten(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=None, scale=None, window_size=(-1, -1),
             enable_gqa=False, seqused_k=None):  # fmt: skip
        assert window_size == (-1, 0) and return_aux.lse
        out, lse = plain_varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, seqused_k, scale, float("-inf"))
        return out, lse if lse.shape[0] == lse.shape[1] else lse.T  # either way round is taken, told by the shape

    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", aten)


@pytest.mark.parametrize("name", ["_fa3", "_flash_attn", "_torch_varlen"])
@pytest.mark.parametrize(("n", "group"), [(1, 1), (1, 4), (3, 2)])
def test_libraries_are_called_with_each_row_list_as_a_sequence(stand_ins, name, n, group):
    case = cases.decode_case([5, 0, 1, 40], batch=2, group=group, n=n, head_dim=32)
    decode = getattr(backends, name)()
    cases.check_decode(case, *decode(*case.arguments()))


def test_told_numbers_of_later_rows_go_to_the_own_operator(stand_ins):
    num_later = torch.tensor([[3, 0]], dtype=torch.int32)
    case = cases.decode_case([5, 9], n=2, head_dim=32, num_later=num_later)
    cases.check_decode(case, *backends._fa3()(*case.arguments()))


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_backends_of_the_cpu(name):
    if name == "cpu" and not library.is_loaded("cpu"):
        pytest.skip("the C++ kernels are not built")
    backend = backends.resolve_backend(name, "cpu", torch.float32, 32)
    case = cases.decode_case([5, 9], group=2, head_dim=32)
    assert backend.name == name
    cases.check_decode(case, *backend.varlen_decode(*case.arguments()))


def test_auto_says_in_the_log_what_it_took(caplog):
    with caplog.at_level(logging.INFO, logger="sparsemm.ops.backends"):
        backend = backends.resolve_backend("auto", "cpu", torch.bfloat16, 64)
    assert backend.name == ("cpu" if library.is_loaded("cpu") else "reference")
    assert backend.name in caplog.text


@pytest.mark.parametrize(
    ("name", "device", "dtype", "head_dim", "message"),
    [
        ("flashinfer", "cpu", torch.float32, 64, "unknown; choose one of cuda"),
        ("cuda", "cpu", torch.float32, 64, "needs a GPU.*use cpu or reference"),
        ("cuda", "cuda", torch.float32, 100, "head_dim 100 is not a multiple of 8"),
        ("cuda", "cuda", torch.float64, 64, "not torch.float64; use reference"),
        ("cpu", "cuda", torch.float32, 64, "use cuda"),
        ("flash_attn", "cuda", torch.float32, 64, "not torch.float32; use cuda"),
        ("fa3", "cuda", torch.float16, 64, "computes in bfloat16"),
        ("fa3", "cuda", torch.bfloat16, 136, "head_dim up to 128"),
        ("torch_varlen", "cpu", torch.bfloat16, 64, "needs a GPU"),
    ],
)
def test_a_backend_that_cannot_serve_names_the_remedy(name, device, dtype, head_dim, message):
    with pytest.raises(ConfigError, match=message):
        backends.resolve_backend(name, device, dtype, head_dim)


def test_rows_that_the_kernels_of_a_gpu_refuse_are_served_by_the_twins(monkeypatch):
    """Whatever attends: rows are filled and positions scored by operators that the dispatcher would send to them."""
    monkeypatch.setattr(library, "is_loaded", lambda part: True)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    backends.operators.cache_clear()
    try:
        assert backends.operators(gpu, torch.bfloat16, 128) is torch.ops.sparsemm
        assert backends.operators(gpu, torch.float64, 64) is reference
        assert backends.operators(gpu, torch.float32, 20) is reference
        assert backends.operators(cpu, torch.float64, 20) is torch.ops.sparsemm
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        backends.operators.cache_clear()
        assert backends.operators(gpu, torch.float16, 64) is reference
        with pytest.raises(ConfigError, match="compute capability 8.0 or newer, this is 7.5; use reference"):
            backends.resolve_backend("cuda", gpu, torch.float16, 64)
    finally:
        backends.operators.cache_clear()


@pytest.mark.parametrize(("name", "module"), [("fa3", "fa3-fwd"), ("flash_attn", "flash-attn")])
def test_a_missing_package_is_named(monkeypatch, name, module):
    monkeypatch.setattr(backends, "_installed", lambda module: False)
    with pytest.raises(ConfigError, match=f"pip install {module}"):
        backends.resolve_backend(name, "cuda", torch.bfloat16, 128)


def test_every_backend_says_why_or_serves_here():
    for name in backends.BACKENDS[:-1]:
        reason = backends.missing_reason(name, "cpu", torch.float32, 64)
        assert reason is None or ";" in reason
