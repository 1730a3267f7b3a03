"""The one way the kernels are built: `python csrc/build.py`, called by `make kernels` and by setup.py.

Compiles csrc/ with the compilers directly (torch.utils.cpp_extension refuses to build CUDA code under a CPU torch) into
`sparsemm/ops/_kernels_cpu.so` and, where nvcc is found, `sparsemm/ops/_kernels_cuda.so`. Both use torch's stable ABI,
so one
binary serves torch 2.11 and newer. Objects are kept under build/kernels, named by a hash of the command and the
sources: building again without a change costs nothing.

Environment: CXX, NVCC, CUDA_HOME; SPARSEMM_CUDA_ARCHS, e.g. "80;90" (default: the visible GPU, else a release list);
SPARSEMM_BUILD=cpu|cuda|none restricts what is built.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import hashlib
import importlib.util
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

logger = logging.getLogger("sparsemm.build")

SOURCE_DIR = Path(__file__).resolve().parent
ROOT = SOURCE_DIR.parent
TORCH_TARGET_VERSION = "0x020b000000000000"  # torch 2.11
OLDEST_ARCH = 80
_TOO_OLD = "the CUDA kernels need compute capability 8.0 or newer; without them the PyTorch operators serve"
RELEASE_ARCHS = ("80", "90", "100", "120")  # a cubin serves its whole major version from that minor on


class BuildError(RuntimeError):
    """A compiler is missing or failed; the message says which and what to do."""


class TooOldError(BuildError):
    """No visible GPU can run the kernels."""


@dataclasses.dataclass
class Step:
    """One compiler call: `output` from `source`, with what it took."""

    source: str
    seconds: float
    cached: bool
    log: str


def schema_hash() -> str:
    """Hash of the operators' schemas, read from sparsemm/ops/schemas.py without importing it (or torch)."""
    tree = ast.parse((ROOT / "sparsemm" / "ops" / "schemas.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "SCHEMAS":
            text = json.dumps(ast.literal_eval(node.value), sort_keys=True)
            return hashlib.sha256(text.encode()).hexdigest()[:16]
    raise BuildError("sparsemm/ops/schemas.py defines no SCHEMAS")


def torch_paths() -> tuple[Path, Path]:
    """Include and library folder of the installed torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("torch is not installed here: install it first, or pip install --no-build-isolation")
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
        raise BuildError(f"{folder} has no stable-ABI headers; torch 2.11 or newer is needed")
    return folder / "include", folder / "lib"


def find_compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if path := shutil.which(name):
            return path
    raise BuildError("no C++ compiler found: install g++ or clang++, or set CXX")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidates = (os.environ.get("NVCC"), home and str(Path(home) / "bin" / "nvcc"), "nvcc", "/usr/local/cuda/bin/nvcc")
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def cuda_archs(nvcc: str) -> list[str]:
    """Architectures to build, as nvcc writes them ("80", "90", …): asked for, of the visible GPUs, or for a release.

    Raises BuildError for one that nvcc or the kernels do not know, TooOldError where no visible GPU is new enough.
    """
    known = set(re.findall(r"compute_(\d+)", subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True,
                                                            check=True).stdout))  # fmt: skip
    asked = os.environ.get("SPARSEMM_CUDA_ARCHS", "").replace(",", ";").replace(".", "")
    if asked:
        archs = [arch for arch in asked.split(";") if arch]
        if unknown := [arch for arch in archs if arch not in known]:
            raise BuildError(
                f"SPARSEMM_CUDA_ARCHS: {nvcc} cannot build for {unknown}; it knows {sorted(known, key=int)}"
            )
        if old := [arch for arch in archs if int(arch) < OLDEST_ARCH]:
            raise BuildError(f"SPARSEMM_CUDA_ARCHS: {old} are too old; {_TOO_OLD}")
        return archs
    if smi := shutil.which("nvidia-smi"):
        query = subprocess.run(
            [smi, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True
        )
        seen = {line.strip().replace(".", "") for line in query.stdout.splitlines()} if query.returncode == 0 else set()
        if seen and all(arch.isdigit() and int(arch) < OLDEST_ARCH for arch in seen):
            raise TooOldError(f"no GPU here is new enough; {_TOO_OLD}")
        if visible := sorted((arch for arch in seen & known if int(arch) >= OLDEST_ARCH), key=int):
            return visible
    return [arch for arch in RELEASE_ARCHS if arch in known]


def with_includes(sources: list[Path]) -> list[Path]:
    """The sources and every file of csrc/ that they include, directly or not."""
    found: dict[Path, None] = {}
    waiting = list(sources)
    while waiting:
        path = waiting.pop().resolve()
        if path in found:
            continue
        found[path] = None
        if path.exists():
            names = re.findall(r'^#include "([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
            waiting += [candidate for name in names if (candidate := path.parent / name).exists()]
    return list(found)


class Builder:
    """Runs compiler steps, keeping objects by the hash of command and sources."""

    def __init__(self, build_dir: Path, force: bool = False) -> None:
        self.build_dir = build_dir
        self.force = force
        self.steps: list[Step] = []
        build_dir.mkdir(parents=True, exist_ok=True)

    def run(self, label: str, command: list[str], suffix: str) -> Path:
        """Runs `command` + ["-o", output] unless its output is there already; returns the output."""
        sources = [Path(word) for word in command if Path(word).suffix in {".cpp", ".cu"}]
        texts = [path.read_text(encoding="utf-8") for path in with_includes(sources) if path.exists()]
        key = hashlib.sha256("\0".join([*texts, *command]).encode()).hexdigest()[:16]
        output = self.build_dir / f"{label.replace('/', '_')}-{key}{suffix}"
        log = output.with_suffix(output.suffix + ".log")
        if output.exists() and log.exists() and not self.force:
            self.steps.append(Step(label, 0.0, True, log.read_text()))
            return output
        began = time.monotonic()
        partial = output.with_suffix(f".{os.getpid()}{suffix}")
        result = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        text = result.stdout + result.stderr
        if result.returncode != 0:
            partial.unlink(missing_ok=True)
            raise BuildError(f"{label} does not compile: {' '.join(command)}\n{text[-4000:]}")
        log.write_text(text)
        os.replace(partial, output)
        self.steps.append(Step(label, time.monotonic() - began, False, text))
        logger.info("%-28s %6.1f s", label, self.steps[-1].seconds)
        return output


def install(library: Path, target: Path) -> Path:
    """Copies a built library to its place in one step, so that nobody loads half a file."""
    partial = target.with_suffix(f".{os.getpid()}.part")
    shutil.copyfile(library, partial)
    os.replace(partial, target)
    return target


def binding_flags(include: Path) -> list[str]:
    return [
        "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
        f"-DSPARSEMM_SCHEMA_HASH={schema_hash()}", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        "-isystem", str(include),
    ]  # fmt: skip


def build_cpu(builder: Builder, output_dir: Path) -> Path:
    """Builds `_kernels_cpu.so`: the kernels once per x86-64 level (chosen when they run), and the binding."""
    compiler = find_compiler()
    include, lib = torch_paths()
    levels = {"baseline": []}
    defines = []
    if platform.machine().lower() in {"x86_64", "amd64"}:
        levels = {name: [f"-march={arch}"] for name, arch in
                  (("baseline", "x86-64"), ("v3", "x86-64-v3"), ("v4", "x86-64-v4"))}  # fmt: skip
        defines = ["-DSPARSEMM_X86_LEVELS"]
    # No -fwrapv: with it the inner loops are four times slower (every index must be allowed to wrap).
    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", *defines]
    objects = [
        builder.run(f"cpu/kernels_{name}", [compiler, *flags, *march, f"-DSPARSEMM_TABLE=kernels_{name}", "-c",
                                            str(SOURCE_DIR / "cpu" / "kernels.cpp")], ".o")
        for name, march in levels.items()
    ]  # fmt: skip
    objects.append(
        builder.run("binding_cpu", [compiler, *binding_flags(include), *defines, "-c",
                                    str(SOURCE_DIR / "binding_cpu.cpp")], ".o")
    )  # fmt: skip
    link = [compiler, "-shared", *map(str, objects), f"-L{lib}", "-ltorch_cpu"]
    if sys.platform.startswith("linux"):
        link += ["-Wl,--no-undefined", "-Wl,--as-needed"]
    return install(builder.run("link_cpu", link, ".so"), output_dir / "_kernels_cpu.so")


CUDA_SOURCES = ("kernels_copy", "kernels_decode", "kernels_window", "kernels_fused")


def spills(log: str) -> list[str]:
    """Kernels for which ptxas reports register spills, from its `-v` output: "name (architecture): bytes"."""
    found, kernel = [], "?"
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            kernel = f"{match[1]} ({match[2]})"
        elif (match := re.search(r"(\d+) bytes spill stores", line)) and match[1] != "0":
            found.append(f"{kernel}: {match[1]} bytes")
    return found


def register_table(log: str) -> list[dict[str, str | int]]:
    """One row a kernel and architecture: mangled name, architecture, registers, bytes of spill stores."""
    rows: list[dict[str, str | int]] = []
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            rows.append({"kernel": match[1], "arch": match[2], "registers": 0, "spill_bytes": 0})
        elif rows and (match := re.search(r"(\d+) bytes spill stores", line)):
            rows[-1]["spill_bytes"] = int(match[1])
        elif rows and (match := re.search(r"Used (\d+) registers", line)):
            rows[-1]["registers"] = int(match[1])
    return rows


def build_cuda(builder: Builder, output_dir: Path, nvcc: str) -> Path:
    """Builds `_kernels_cuda.so`: kernels by nvcc for every architecture asked for, the binding by the C++ compiler.
    Links the CUDA runtime statically and nothing of torch's CUDA part, so that it also loads under a CPU torch."""
    compiler = find_compiler()
    include, lib = torch_paths()
    archs = cuda_archs(nvcc)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = max(archs, key=int)
    targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")  # PTX for what comes after
    flags = ["-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-ccbin", compiler]
    objects = [
        builder.run(f"cuda/{name}", [nvcc, *flags, *targets, "-c", str(SOURCE_DIR / "cuda" / f"{name}.cu")], ".o")
        for name in CUDA_SOURCES
    ]
    log = "\n".join(step.log for step in builder.steps if step.source.startswith("cuda/"))
    for spill in spills(log):
        logger.warning("register spill in %s", spill)
    (builder.build_dir / "registers.json").write_text(json.dumps(register_table(log), indent=1))
    objects.append(
        builder.run(
            "binding_cuda", [compiler, *binding_flags(include), "-c", str(SOURCE_DIR / "binding_cuda.cpp")], ".o"
        )
    )
    toolkit = Path(nvcc).resolve().parent.parent
    folders = [
        p for p in (toolkit / "lib64", toolkit / "targets" / "x86_64-linux" / "lib", toolkit / "lib",
                    Path("/usr/local/cuda/lib64")) if (p / "libcudart_static.a").exists()
    ]  # fmt: skip
    link = [compiler, "-shared", *map(str, objects), *(f"-L{p}" for p in (*folders, lib)), "-ltorch_cpu",
            "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--no-undefined", "-Wl,--as-needed",
            "-Wl,--exclude-libs,ALL"]  # fmt: skip
    logger.info("CUDA architectures: %s, and PTX for newer ones", ", ".join(archs))
    return install(builder.run("link_cuda", link, ".so"), output_dir / "_kernels_cuda.so")


def build(output_dir: Path, parts: tuple[str, ...] = ("cpu", "cuda"), force: bool = False) -> list[Path]:
    """Builds the asked parts into `output_dir` and returns the libraries. Without nvcc, "cuda" is skipped with a line.

    Raises BuildError where a compiler or torch is missing or a step fails.
    """
    builder = Builder(ROOT / "build" / "kernels", force)
    output_dir.mkdir(parents=True, exist_ok=True)
    began, built = time.monotonic(), []
    if "cpu" in parts:
        built.append(build_cpu(builder, output_dir))
    if "cuda" in parts:
        if nvcc := find_nvcc():
            try:
                built.append(build_cuda(builder, output_dir, nvcc))
            except TooOldError as error:
                if parts == ("cuda",):
                    raise
                logger.info("kernels: %s", error)
        elif parts == ("cuda",):
            raise BuildError("nvcc is not found: install the CUDA toolkit or set CUDA_HOME")
        else:
            logger.info("kernels: no nvcc here, CUDA kernels skipped")
    logger.info("kernels: %s in %.1f s", ", ".join(p.name for p in built) or "nothing", time.monotonic() - began)
    return built


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "sparsemm" / "ops", help="where the libraries go")
    parser.add_argument("--only", choices=["cpu", "cuda"], help="build one of the two libraries")
    parser.add_argument("--force", action="store_true", help="compile even what has not changed")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    wanted = arguments.only or os.environ.get("SPARSEMM_BUILD", "")
    if wanted == "none":
        logger.info("kernels: not built (SPARSEMM_BUILD=none); the PyTorch operators serve")
        return 0
    try:
        build(arguments.output, (wanted,) if wanted else ("cpu", "cuda"), arguments.force)
    except BuildError as error:
        logger.error("kernels: not built: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
