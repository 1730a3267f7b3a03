"""Decode backends by name: who computes attention over ragged rows.

cuda          the CUDA kernels of this package
fa3           FlashAttention-3, forward only (package fa3-fwd): bfloat16, Hopper GPUs
flash_attn    the flash-attn package (FlashAttention-2, 2.7 or newer)
torch_varlen  the FlashAttention that comes with torch
cpu           the C++ kernels of this package
reference     plain PyTorch, any device, slow
auto          the first of these that can serve, said in the log

The libraries see each (batch row, kv head) as a sequence of its own and its query heads as the heads of that sequence;
slack behind the rows is skipped by their used-length argument. They compute causal attention among the last n rows
only, so calls with `num_later` go to this package's operator whatever the backend. Filling the rows and scoring
positions are this package's alone (`operators`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsemm.errors import ConfigError
from sparsemm.ops import library, reference

logger = logging.getLogger(__name__)

VarlenDecode = Callable[..., tuple[Tensor, Tensor]]
"""As `torch.ops.sparsemm.varlen_decode`: (query, key_buffer, value_buffer, offsets, lens, scale, num_later=None) ->
(out, lse); shapes in schemas.py."""

_HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class DecodeBackend:
    """A backend that can serve: its name and its `varlen_decode`."""

    name: str
    varlen_decode: VarlenDecode


def _operator(query, key_buffer, value_buffer, offsets, lens, scale, num_later=None):
    decode = operators(query.device, query.dtype, query.shape[-1]).varlen_decode
    return decode(query, key_buffer, value_buffer, offsets, lens, scale, num_later)


def _varlen_backend(attend: Callable[..., tuple[Tensor, Tensor]]) -> VarlenDecode:
    """A backend from `attend(q, k, v, cu_q, cu_k, used_k, max_q, max_k, scale) -> (out, lse)`, which takes sequences
    `[total, heads, D]` and returns out alike and lse `[heads, total]` or its transpose."""

    def varlen_decode(query, key_buffer, value_buffer, offsets, lens, scale, num_later=None):
        if num_later is not None:
            return _operator(query, key_buffer, value_buffer, offsets, lens, scale, num_later)
        (batch, num_query_heads, n, head_dim), lists = query.shape, lens.shape[0]
        num_kv_heads, group = lists // batch, num_query_heads * batch // lists
        packed = query.view(batch, num_kv_heads, group, n, head_dim).transpose(2, 3).reshape(lists * n, group, head_dim)
        cu_query = torch.arange(lists + 1, device=query.device, dtype=torch.int32) * n
        longest = key_buffer.shape[0]  # no list is longer; the true maximum is known to the device only
        out, lse = attend(
            packed, key_buffer[:, None], value_buffer[:, None], cu_query, offsets, lens, n, longest, scale
        )
        if lse.shape != (group, lists * n):
            lse = lse.transpose(0, 1)
        lse = lse.reshape(group, batch, num_kv_heads, n).permute(1, 2, 0, 3).reshape(query.shape[:3])
        out = out.view(batch, num_kv_heads, n, group, head_dim).transpose(2, 3).reshape(query.shape)
        # A query that saw no row gives 0 and -inf, which the libraries write as NaN, 0 or +inf.
        nothing = ~lse.isfinite() & ~lse.isnan()
        return out.masked_fill(nothing[..., None], 0), lse.masked_fill(nothing, float("-inf")).float()

    return varlen_decode


def _fa3() -> VarlenDecode:
    module = importlib.import_module("fa3_fwd_interface")

    def attend(q, k, v, cu_q, cu_k, used_k, max_q, max_k, scale):
        options = dict(softmax_scale=scale, causal=True, num_splits=0, return_attn_probs=True)
        out, lse, *_ = module.flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, seqused_k=used_k, **options)
        return out, lse

    return _varlen_backend(attend)


def _flash_attn() -> VarlenDecode:
    # The public function has no used-length argument.
    forward = importlib.import_module("flash_attn.flash_attn_interface")._flash_attn_varlen_forward

    def attend(q, k, v, cu_q, cu_k, used_k, max_q, max_k, scale):
        out, lse, *_ = forward(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, scale, causal=True, seqused_k=used_k)
        return out, lse

    return _varlen_backend(attend)


def _torch_varlen() -> VarlenDecode:
    try:
        from torch.nn.attention import varlen

        public = "seqused_k" in inspect.signature(varlen.varlen_attn).parameters
    except (ImportError, AttributeError):
        public = False

    def attend(q, k, v, cu_q, cu_k, used_k, max_q, max_k, scale):
        if public:
            options = dict(return_aux=varlen.AuxRequest(lse=True), window_size=(-1, 0), enable_gqa=True)
            return varlen.varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, seqused_k=used_k, **options)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, 0.0, True, False, scale=scale, seqused_k=used_k
        )
        return out, lse

    return _varlen_backend(attend)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def missing_reason(name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the backend cannot serve caches on `device` of `dtype` and `head_dim`, with the remedy; None where it can."""
    if name not in _FACTORIES:
        raise ConfigError(f"decode backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    device = torch.device(device)
    if name == "reference":
        return None
    if name == "cpu":
        if device.type != "cpu":
            return f"it computes on the CPU, the cache is on {device}; use cuda"
        return None if library.is_loaded("cpu") else "the C++ kernels are not built; run `make kernels`"
    if device.type != "cuda":
        return f"it needs a GPU, the cache is on {device}; use cpu or reference"
    if head_dim % 8 != 0 or head_dim > 256:
        return f"head_dim {head_dim} is not a multiple of 8 up to 256; use reference"
    if name == "cuda":
        if dtype not in (*_HALF, torch.float32):
            return f"it computes in float32, float16 or bfloat16, not {dtype}; use reference"
        if not library.is_loaded("cuda"):
            return "the CUDA kernels are not built; run `make kernels` (needs nvcc)"
        major, minor = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (8, 0)
        if major < 8:
            return f"it needs a GPU of compute capability 8.0 or newer, this is {major}.{minor}; use reference"
        return None
    if dtype not in _HALF:
        return f"it computes in float16 or bfloat16, not {dtype}; use cuda or reference"
    if name == "fa3":
        if dtype != torch.bfloat16 or head_dim > 128:
            return f"it computes in bfloat16 with head_dim up to 128, not {dtype} with {head_dim}; use cuda"
        if not _installed("fa3_fwd_interface"):
            return "the package is not installed; pip install fa3-fwd==0.0.3"
        if torch.cuda.get_device_capability(device)[0] != 9:
            return "it needs a Hopper GPU (compute capability 9); use cuda"
    if name == "flash_attn":
        if not _installed("flash_attn"):
            return "the package is not installed; pip install flash-attn (2.7 or newer)"
        interface = importlib.import_module("flash_attn.flash_attn_interface")
        forward = getattr(interface, "_flash_attn_varlen_forward", None)
        if forward is None or "seqused_k" not in inspect.signature(forward).parameters:
            return "the installed flash-attn has no used-length argument; pip install 'flash-attn>=2.7'"
    return None


_FACTORIES: dict[str, Callable[[], VarlenDecode]] = {
    "cuda": lambda: _operator,
    "fa3": _fa3,
    "flash_attn": _flash_attn,
    "torch_varlen": _torch_varlen,
    "cpu": lambda: _operator,
    "reference": lambda: reference.varlen_decode,
}

BACKENDS = (*_FACTORIES, "auto")
"""Names that `resolve_backend` knows, the order in which `auto` tries them, and `auto`."""


@functools.cache
def operators(device: torch.device, dtype: torch.dtype, head_dim: int) -> Any:
    """The operators for rows of such a kind: `torch.ops.sparsemm`, or their PyTorch twins where a GPU's kernels, which
    the dispatcher would choose, cannot serve."""
    kernels_fail = library.is_loaded("cuda") and missing_reason("cuda", device, dtype, head_dim) is not None
    return reference if device.type == "cuda" and kernels_fail else torch.ops.sparsemm


def overload(operator: Any) -> Callable[..., Any]:
    """An operator's only overload, which is called with less ado than the operator; a twin is what it is."""
    return getattr(operator, "default", operator)


def resolve_backend(name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> DecodeBackend:
    """The decode backend called `name` (see `BACKENDS`) for caches on `device` with rows of `dtype` and `head_dim`.

    Raises ConfigError, naming the remedy, for an unknown name or a backend that cannot serve here.
    """
    if name != "auto":
        if reason := missing_reason(name, device, dtype, head_dim):
            raise ConfigError(f"decode backend {name!r} cannot serve: {reason}")
        return DecodeBackend(name, _FACTORIES[name]())
    for candidate, factory in _FACTORIES.items():
        if missing_reason(candidate, device, dtype, head_dim) is None:
            logger.info("decode backend auto: %s for %s rows of %d on %s", candidate, dtype, head_dim, device)
            return DecodeBackend(candidate, factory())
    raise ConfigError(f"no decode backend serves {dtype} rows of {head_dim} on {device}")
