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
only, so calls with `num_later` go to this package's operator whatever the backend.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable

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
    return torch.ops.sparsemm.varlen_decode(query, key_buffer, value_buffer, offsets, lens, scale, num_later)


def _as_sequences(query: Tensor, lists: int) -> tuple[Tensor, Tensor]:
    """query `[B, Hq, n, D]` as `[lists * n, group, D]`, and where each sequence begins, int32 `[lists + 1]`."""
    batch, num_query_heads, n, head_dim = query.shape
    num_kv_heads = lists // batch
    group = num_query_heads // num_kv_heads
    packed = query.view(batch, num_kv_heads, group, n, head_dim).transpose(2, 3).reshape(lists * n, group, head_dim)
    return packed, torch.arange(lists + 1, device=query.device, dtype=torch.int32) * n


def _from_sequences(out: Tensor, lse: Tensor, query: Tensor, lists: int) -> tuple[Tensor, Tensor]:
    """The inverse for out `[lists * n, group, D]` and lse `[group, lists * n]` (or its transpose). A query that saw no
    row gives 0 and -inf, which the libraries write as NaN, 0 or +inf."""
    batch, num_query_heads, n, head_dim = query.shape
    num_kv_heads = lists // batch
    group = num_query_heads // num_kv_heads
    if lse.shape != (group, lists * n):
        lse = lse.transpose(0, 1)
    lse = lse.reshape(group, batch, num_kv_heads, n).permute(1, 2, 0, 3).reshape(batch, num_query_heads, n)
    out = out.view(batch, num_kv_heads, n, group, head_dim).transpose(2, 3).reshape(query.shape)
    nothing = ~lse.isfinite() & ~lse.isnan()
    return out.masked_fill(nothing[..., None], 0), lse.masked_fill(nothing, float("-inf")).float()


def _varlen_backend(attend: Callable[..., tuple[Tensor, Tensor]]) -> VarlenDecode:
    """A backend from `attend(q, k, v, cu_q, cu_k, used_k, max_q, max_k, scale) -> (out, lse)`."""

    def varlen_decode(query, key_buffer, value_buffer, offsets, lens, scale, num_later=None):
        if num_later is not None:
            return _operator(query, key_buffer, value_buffer, offsets, lens, scale, num_later)
        lists = lens.shape[0]
        packed, cu_query = _as_sequences(query, lists)
        out, lse = attend(
            packed,
            key_buffer[:, None],
            value_buffer[:, None],
            cu_query,
            offsets,
            lens,
            query.shape[2],
            key_buffer.shape[0],  # no list is longer; the true maximum is known to the device only
            scale,
        )
        return _from_sequences(out, lse, query, lists)

    return varlen_decode


def _fa3() -> VarlenDecode:
    module = importlib.import_module("fa3_fwd_interface")

    def attend(q, k, v, cu_q, cu_k, used_k, max_q, max_k, scale):
        out, lse, *_ = module.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_q,
            cu_k,
            max_q,
            max_k,
            seqused_k=used_k,
            softmax_scale=scale,
            causal=True,
            num_splits=0,
            return_attn_probs=True,
        )
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
            return varlen.varlen_attn(
                q,
                k,
                v,
                cu_q,
                cu_k,
                max_q,
                max_k,
                return_aux=varlen.AuxRequest(lse=True),
                scale=scale,
                window_size=(-1, 0),
                enable_gqa=True,
                seqused_k=used_k,
            )
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, 0.0, True, False, scale=scale, seqused_k=used_k
        )
        return out, lse

    return _varlen_backend(attend)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _why_not(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why backend `name` cannot serve, with the remedy; None where it can."""
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
        return None if library.is_loaded("cuda") else "the CUDA kernels are not built; run `make kernels` (needs nvcc)"
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


def _own_kernels() -> VarlenDecode:
    return _operator


def _reference() -> VarlenDecode:
    return reference.varlen_decode


_FACTORIES: dict[str, Callable[[], VarlenDecode]] = {
    "cuda": _own_kernels,
    "fa3": _fa3,
    "flash_attn": _flash_attn,
    "torch_varlen": _torch_varlen,
    "cpu": _own_kernels,
    "reference": _reference,
}

BACKENDS = (*_FACTORIES, "auto")
"""Names that `resolve_backend` knows, the order in which `auto` tries them, and `auto`."""


def missing_reason(name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the backend cannot serve caches on `device` of `dtype` and `head_dim`, with the remedy; None where it can."""
    if name not in _FACTORIES:
        raise ConfigError(f"decode backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    return _why_not(name, torch.device(device), dtype, head_dim)


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
