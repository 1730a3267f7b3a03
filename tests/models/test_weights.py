"""Weights that do not belong to a configuration are refused, never replaced by random ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_models import TINY_MINIATURE

from sparsemm.errors import DataError
from sparsemm.miniatures.architectures import build_model, build_processor
from sparsemm.models import load_model
from sparsemm.models.identity import checkpoint_identity

KEY = "model.language_model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_model("llava-vicuna", dims=TINY_MINIATURE).save_pretrained(tmp_path)
    build_processor("llava-vicuna", TINY_MINIATURE).save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_files_of_up_to_64_mib_are_read_whole(tmp_path: Path) -> None:
    """Score files hold these digests: another limit would make strangers of the models between."""
    digests = {}
    for size in (64 << 20, (64 << 20) + 1):
        for changed in (False, True):
            folder = tmp_path / f"{size}-{changed}"
            folder.mkdir()
            with open(folder / "model.safetensors", "wb") as handle:
                handle.truncate(size)
                if changed:
                    handle.seek(3_000_001)
                    handle.write(b"x")
            digests[size, changed] = checkpoint_identity(folder).weights
    assert digests[64 << 20, False] != digests[64 << 20, True]
    assert digests[(64 << 20) + 1, False] == digests[(64 << 20) + 1, True]  # the byte lies between two blocks


def test_what_belongs_is_loaded(folder: Path) -> None:
    saved = load_file(folder / "model.safetensors")
    name = next(key for key in saved if key.endswith("layers.0.self_attn.q_proj.weight"))
    rewrite(
        folder, lambda weights: weights.update({name.replace("q_proj.weight", "rotary_emb.inv_freq"): torch.ones(4)})
    )
    model, _ = load_model(folder)
    assert torch.equal(dict(model.named_parameters())[KEY], saved[name])


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mismatched", "truncated"])
def test_what_does_not_belong_is_named(folder: Path, kind: str) -> None:
    names = load_file(folder / "model.safetensors")
    name = next(key for key in names if key.endswith("layers.0.self_attn.q_proj.weight"))
    if kind == "missing":
        rewrite(folder, lambda weights: weights.pop(name))
    elif kind == "unexpected":
        rewrite(folder, lambda weights: weights.update({"model.extra.weight": torch.zeros(2)}))
    elif kind == "mismatched":
        rewrite(folder, lambda weights: weights.update({name: weights[name][:3].clone()}))
    else:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    expected = {"unexpected": "model.extra.weight", "truncated": "damaged"}.get(kind, "q_proj.weight")
    with pytest.raises(DataError, match=expected):
        load_model(folder)
