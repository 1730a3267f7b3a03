"""The CUDA kernels of csrc/cuda, compiled for the CPU (platform_emulated.h), with the operators' signatures.

`Emulated(library)` has every operator under its name; `seed` draws the order of blocks and threads (0: natural order),
`resident` is how many blocks the imagined device runs at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[2]
CSRC = ROOT / "csrc"
KERNELS = CSRC / "cuda"
_PARTS = {"rows": "emulated.cpp", "fused": "emulated_fused.cpp"}
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_POINTER, _INT, _LONG, _DOUBLE, _SEED = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_uint64
_PROTOTYPES = {
    "emulated_compact": [_POINTER] * 9 + [_LONG] * 7 + [_SEED],
    "emulated_append": [_POINTER] * 10 + [_LONG] * 6 + [_SEED],
    "emulated_decode": [_INT] + [_POINTER] * 9 + [_LONG] * 6 + [_DOUBLE, _LONG, _SEED],
    "emulated_decode_launches": [_LONG] * 3 + [_SEED],
    "emulated_window_scores": [_INT] + [_POINTER] * 7 + [_LONG] * 6 + [_DOUBLE, _SEED],
    "emulated_select": [_POINTER] * 5 + [_LONG] * 4 + [_SEED],
    "emulated_norm": [_INT] + [_POINTER] * 5 + [_LONG] * 2 + [_DOUBLE, _LONG, _SEED],
    "emulated_rope": [_INT] + [_POINTER] * 17 + [_LONG] * 8 + [_DOUBLE] + [_LONG] * 2 + [_SEED],
    "emulated_gated": [_INT] + [_POINTER] * 3 + [_LONG] * 5 + [_SEED],
}


def compiler() -> str | None:
    return next((path for name in ("g++", "clang++") if (path := shutil.which(name))), None)


def compile_emulation(
    target_dir: Path,
    faults: dict[str, list[tuple[str, str]]] | None = None,
    sanitize: bool = False,
    small: bool = False,
    parts: tuple[str, ...] = tuple(_PARTS),
) -> Path:
    """Compiles the kernels, with `faults` planted: {file: [(text in it, replacement)]}; each text must occur.
    `small`: only head dims up to 64, no float16; `parts`: only those over "rows" or the "fused" ones. Kept by a hash of
    command and sources in `target_dir`."""
    faults = faults or {}
    sources = {p.name: p.read_text(encoding="utf-8") for p in sorted(KERNELS.iterdir()) if p.suffix in {".cuh", ".h"}}
    for name, changes in faults.items():
        for old, new in changes:
            if old not in sources[name]:
                raise ValueError(f"{name} has no {old!r} to plant a fault in")
            sources[name] = sources[name].replace(old, new)
    shared = {p.name: p.read_text(encoding="utf-8") for p in sorted(CSRC.glob("*_args.h"))}
    own = {p.name: p.read_text(encoding="utf-8") for p in sorted(FOLDER.iterdir()) if p.suffix in {".h", ".cpp"}}
    flags = ["-std=c++20", "-O0" if small else "-O1", "-fno-strict-aliasing", "-fPIC", "-shared", "-w",
             "-DSPARSEMM_EMULATION"]  # fmt: skip
    if small:
        flags.append("-DSPARSEMM_EMULATION_SMALL")
    if sanitize:
        flags += ["-fsanitize=address", "-g1"]
    key = hashlib.sha256(repr((compiler(), flags, parts, sources, shared, own)).encode()).hexdigest()[:16]
    library = target_dir / f"emulated-{key}.so"
    if library.exists():
        return library
    whole = target_dir / f"{key}.{os.getpid()}"  # several test processes may compile at once
    folder = whole / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    for place, texts in ((folder, {**sources, **own}), (whole, shared)):
        for name, text in texts.items():
            (place / name).write_text(text, encoding="utf-8")
    partial = library.with_suffix(f".{os.getpid()}.so")
    subprocess.run(
        [compiler(), *flags, *(str(folder / _PARTS[part]) for part in parts), "-o", str(partial)], check=True
    )
    os.replace(partial, library)
    shutil.rmtree(whole, ignore_errors=True)
    return library


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _strides(tensor: Tensor) -> ctypes.Array:
    assert tensor.stride(3) == 1
    return (ctypes.c_int64 * 3)(*tensor.stride()[:3])


class EmulationError(RuntimeError):
    """What the emulated device found wrong."""


class Emulated:
    def __init__(self, library: Path, seed: int = 0, resident: int = 7) -> None:
        self._library = ctypes.CDLL(str(library))
        self.seed, self.resident = seed, resident
        for name, arguments in _PROTOTYPES.items():
            if hasattr(self._library, name):  # of the parts compiled
                getattr(self._library, name).argtypes = arguments
                getattr(self._library, name).restype = ctypes.c_char_p

    def _call(self, name: str, *arguments: object) -> None:
        message = getattr(self._library, name)(*arguments, self.seed)
        if message is not None:
            raise EmulationError(message.decode())

    def compact(self, key, value, positions, cu_kept, offsets, key_buffer, value_buffer) -> None:
        batch, heads, columns, head_dim = key.shape
        tensors = (key, value, positions, cu_kept, offsets, key_buffer, value_buffer)
        self._call("emulated_compact", *map(_pointer, tensors), _strides(key), _strides(value), batch * heads, heads,
                   columns, head_dim, key.element_size(), positions.shape[0], key_buffer.shape[0])  # fmt: skip

    def append(self, key, value, offsets, lens, key_buffer, value_buffer, overflow, mask=None) -> None:
        batch, heads, n, head_dim = key.shape
        tensors = (key, value, offsets, lens, key_buffer, value_buffer, overflow, mask)
        self._call("emulated_append", *map(_pointer, tensors), _strides(key), _strides(value), batch * heads, heads, n,
                   head_dim, key.element_size(), key_buffer.shape[0])  # fmt: skip

    def varlen_decode(self, query, key_buffer, value_buffer, offsets, lens, scale, num_later=None):
        batch, query_heads, n, head_dim = query.shape
        heads = lens.shape[0] // batch
        out = torch.full(query.shape, float("nan"), dtype=query.dtype)
        lse = torch.full(query.shape[:3], float("nan"))
        tensors = (query, key_buffer, value_buffer, offsets, lens, num_later, out, lse)
        self._call("emulated_decode", DTYPES[query.dtype], *map(_pointer, tensors), _strides(query), lens.shape[0],
                   heads, query_heads // heads, n, head_dim, key_buffer.shape[0], scale, self.resident)  # fmt: skip
        return out, lse

    def decode_launches(self, lists: int, group: int, n: int) -> None:
        """Launch the kernels of such a decode without running them."""
        self._call("emulated_decode_launches", lists, group, n)

    def window_scores(self, query, key, starts, num_queries, scale):
        batch, query_heads, window, head_dim = query.shape
        heads, columns = key.shape[1:3]
        scores = torch.full((batch, heads, columns), float("nan"))
        tensors = (query, key, starts, num_queries, scores)
        self._call("emulated_window_scores", DTYPES[query.dtype], *map(_pointer, tensors), _strides(query),
                   _strides(key), batch, heads, query_heads // heads, window, columns, head_dim, scale)  # fmt: skip
        return scores

    def select_rows(self, scores, starts, counts, window, cu_kept, total):
        positions = torch.full((total,), -1, dtype=torch.int32)
        tensors = (scores, starts, counts, cu_kept, positions)
        self._call("emulated_select", *map(_pointer, tensors), *scores.shape, window, total)
        return positions

    def add_rms_norm(self, x, residual, weight, eps, unit_offset=False):
        normed = torch.full_like(x, float("nan"))
        total = x.new_empty(0) if residual is None else torch.full_like(x, float("nan"))
        size = x.shape[-1]
        self._call("emulated_norm", DTYPES[x.dtype], *map(_pointer, (x, residual, weight, normed, total)),
                   x.numel() // size, size, eps, unit_offset)  # fmt: skip
        return normed, total

    def rope_append(self, query, key, value, cos, sin, offsets, lens, key_buffer, value_buffer, overflow, mask=None,
                    query_weight=None, key_weight=None, eps=0.0, unit_offset=False, interleaved=False):  # fmt: skip
        batch, query_heads, n, head_dim = query.shape
        out = torch.full(query.shape, float("nan"), dtype=query.dtype)
        tensors = (query, key, value, cos, sin, offsets, lens, key_buffer, value_buffer, overflow, mask, query_weight,
                   key_weight, out)  # fmt: skip
        assert cos.is_contiguous() and sin.is_contiguous() and (mask is None or mask.is_contiguous())
        self._call("emulated_rope", DTYPES[query.dtype], *map(_pointer, tensors), *map(_strides, (query, key, value)),
                   key_buffer.shape[0], batch, query_heads, key.shape[1], n, head_dim, cos.shape[2], cos.shape[0], eps,
                   unit_offset, interleaved)  # fmt: skip
        return out

    def _gated(self, activation, gate, up):
        out = torch.full(gate.shape, float("nan"), dtype=gate.dtype)
        *rows, size = gate.shape
        self._call("emulated_gated", DTYPES[gate.dtype], *map(_pointer, (gate, up, out)), activation, gate.stride(0),
                   up.stride(0), rows[0], size)  # fmt: skip
        return out

    def silu_mul(self, gate, up):
        return self._gated(0, gate, up)

    def gelu_tanh_mul(self, gate, up):
        return self._gated(1, gate, up)
