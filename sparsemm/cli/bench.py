"""`sparsemm bench`: time what runs on this machine."""

from __future__ import annotations

from sparsemm.cli import bench_chase, bench_e2e, bench_kernels
from sparsemm.cli.program import Program

app = Program(help="Time the operators of this package, the chase and whole models.")
for command in (bench_chase.chase, bench_kernels.kernels, bench_e2e.e2e, bench_e2e.host):
    app.command()(command)
