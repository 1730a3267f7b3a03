"""csrc/build.py and the loader: schema hash, architectures, a real build, libraries that must not be loaded, nvcc for
several architectures where there is one."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsemm.errors import ConfigError
from sparsemm.ops import library, schemas

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("sparsemm_kernel_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def needs_compiler(build):
    try:
        return build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))


def test_build_and_loader_hash_the_same_schemas(build):
    assert build.schema_hash() == library.schema_hash()


def test_schemas_are_what_torch_has():
    for name in schemas.SCHEMAS:
        assert torch.ops.sparsemm.__getattr__(name).default._schema.name == f"sparsemm::{name}"


def test_a_build_is_loaded_by_a_fresh_process(build, needs_compiler, tmp_path):
    """The whole way: compile (objects are cached over runs), check the hash, register, call."""
    (built,) = build.build(tmp_path, ("cpu",))
    code = f"""
import os
os.environ["SPARSEMM_KERNELS"] = "reference"
from pathlib import Path
import torch
from sparsemm.ops import library
assert not library.is_loaded("cpu")
assert library.load_library("cpu", Path({str(built)!r})) and library.is_loaded("cpu")
lens = torch.tensor([3], dtype=torch.int32)
rows = torch.randn(4, 8)
out, _ = torch.ops.sparsemm.varlen_decode(torch.zeros(1, 1, 1, 8), rows, rows, torch.tensor([0, 4]).int(), lens, 1.0)
torch.testing.assert_close(out[0, 0, 0], rows[:3].mean(0))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_building_again_compiles_nothing(build, needs_compiler, tmp_path):
    builder = build.Builder(ROOT / "build" / "kernels")
    build.build_cpu(builder, tmp_path)
    again = build.Builder(ROOT / "build" / "kernels")
    build.build_cpu(again, tmp_path)
    assert again.steps and all(step.cached for step in again.steps)


def test_a_library_for_other_schemas_is_left_out(needs_compiler, tmp_path, caplog):
    source = tmp_path / "stale.cpp"
    path = tmp_path / "_kernels_cpu.so"
    source.write_text(
        'extern "C" const char* sparsemm_schema_hash() { return "old"; }\n'
        'extern "C" int sparsemm_register() { __builtin_trap(); }\n'
    )
    subprocess.run([needs_compiler, "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    with caplog.at_level(logging.WARNING):
        assert not library.load_library("test", path)
    assert "other operator schemas" in caplog.text and not library.is_loaded("test")


def test_a_broken_library_is_left_out(tmp_path, caplog):
    path = tmp_path / "_kernels_cpu.so"
    path.write_bytes(b"not a library")
    with caplog.at_level(logging.WARNING):
        assert not library.load_library("test", path)
    assert "cannot be loaded" in caplog.text and "make kernels" in caplog.text


def test_an_unknown_choice_of_kernels_is_an_error(monkeypatch):
    monkeypatch.setenv("SPARSEMM_KERNELS", "fast")
    with pytest.raises(ConfigError, match="'fast' is unknown; use auto or reference"):
        library.load_libraries()


def test_spills_are_found_in_the_compiler_output(build):
    log = """ptxas info    : Compiling entry function 'good' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
ptxas info    : Compiling entry function 'bad' for 'sm_80'
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers"""
    assert build.spills(log) == ["bad (sm_80): 12 bytes"]
    assert build.register_table(log)[0] == {"kernel": "good", "arch": "sm_90", "registers": 40, "spill_bytes": 0}


def test_a_missing_compiler_is_named(build, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="install g\\+\\+ or clang\\+\\+, or set CXX"):
        build.find_compiler()


def test_a_failing_step_shows_the_command(build, needs_compiler, tmp_path):
    builder = build.Builder(tmp_path)
    with pytest.raises(build.BuildError, match="no-such-file.cpp"):
        builder.run("broken", [needs_compiler, "-c", "no-such-file.cpp"], ".o")


@pytest.fixture(scope="module")
def nvcc(build):
    return build.find_nvcc() or pytest.skip("no nvcc here")


def test_architectures(build, nvcc, monkeypatch):
    monkeypatch.setenv("SPARSEMM_CUDA_ARCHS", "8.0;90")
    assert build.cuda_archs(nvcc) == ["80", "90"]
    monkeypatch.setenv("SPARSEMM_CUDA_ARCHS", "12")
    with pytest.raises(build.BuildError, match="cannot build for \\['12'\\]"):
        build.cuda_archs(nvcc)


def test_gpus_that_are_too_old_are_named(build, nvcc, monkeypatch, tmp_path, caplog):
    """One sentence, not what the compiler has to say about instructions that they lack; the CPU's library is built."""
    monkeypatch.setenv("SPARSEMM_CUDA_ARCHS", "7.5;80")
    with pytest.raises(build.BuildError, match=r"\['75'\] are too old; .* need compute capability 8.0 or newer"):
        build.cuda_archs(nvcc)
    monkeypatch.delenv("SPARSEMM_CUDA_ARCHS")
    smi = tmp_path / "nvidia-smi"
    for seen, archs in (("7.5\n7.0\n", None), ("7.5\n9.0\n", ["90"])):
        smi.write_text(f"#!/bin/sh\nprintf '{seen}'\n")
        smi.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        if archs is not None:
            assert build.cuda_archs(nvcc) == archs
            continue
        with pytest.raises(build.TooOldError, match="no GPU here is new enough"):
            build.cuda_archs(nvcc)
        monkeypatch.setattr(build, "build_cpu", lambda builder, output_dir: output_dir / "_kernels_cpu.so")
        with caplog.at_level(logging.INFO):
            assert build.build(tmp_path / "out") == [tmp_path / "out" / "_kernels_cpu.so"]
        assert "need compute capability 8.0" in caplog.text


def test_the_cuda_library_compiles_without_spills_and_loads_without_a_gpu(build, nvcc, needs_compiler, tmp_path,
                                                                          monkeypatch):  # fmt: skip
    """What users compile, for the release architectures (objects are cached over runs)."""
    monkeypatch.setenv("SPARSEMM_CUDA_ARCHS", ";".join(build.RELEASE_ARCHS))
    builder = build.Builder(ROOT / "build" / "kernels")
    built = build.build_cuda(builder, tmp_path, nvcc)
    log = "\n".join(step.log for step in builder.steps)
    rows = build.register_table(log)
    assert {row["arch"] for row in rows} >= {"sm_80", "sm_90", "sm_100"}
    assert len({row["kernel"] for row in rows}) >= 40 and all(row["registers"] > 0 for row in rows)
    assert build.spills(log) == []
    code = (
        f"import ctypes, torch; l = ctypes.CDLL({str(built)!r}); l.sparsemm_schema_hash.restype = ctypes.c_char_p; "
        "print(l.sparsemm_schema_hash().decode())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == build.schema_hash(), result.stderr


def test_the_register_table_is_kept(build):
    path = ROOT / "build" / "kernels" / "registers.json"
    if not path.exists():
        pytest.skip("the CUDA kernels have not been built here")
    assert {"kernel", "arch", "registers", "spill_bytes"} == set(json.loads(path.read_text())[0])
