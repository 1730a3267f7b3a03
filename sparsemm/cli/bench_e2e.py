"""`sparsemm bench e2e` and `sparsemm bench host`: whole models, and what the method costs on the host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsemm.cli.common import (
    DEFAULT_MODEL,
    DeviceOption,
    DtypeOption,
    HeadScoresOption,
    load,
    parse_integers,
    parse_list,
    resolve_model,
    short_name,
)

_GPU_PROMPTS = "2048,4096,8192,16384,32768,65536,131072"
_CPU_PROMPTS = "256,512,1024,2048"
_METHODS = "hf,fullkv,sparsemm,snapkv,pyramidkv,adakv,original"


def e2e(
    model: Annotated[
        str | None,
        typer.Option(
            help="vicuna-7b, mistral-7b, qwen2-vl-7b, tiny; a folder or hub id [default: vicuna-7b, CPU: tiny]."
        ),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Methods; hf, kvpress and original are baselines (kvpress where installed).")
    ] = _METHODS,
    budgets: Annotated[str | None, typer.Option(help="Rows per kv head [default: 256, CPU: 64].")] = None,
    prompts: Annotated[
        str | None, typer.Option(help=f"Prompt lengths in tokens [default: {_GPU_PROMPTS}; CPU: {_CPU_PROMPTS}].")
    ] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1",
    throughput_prompts: Annotated[
        str, typer.Option(help="Prompt lengths at which the largest batch is looked for.")
    ] = "8192,32768",
    memory_limit: Annotated[
        float | None, typer.Option(help="GB that the largest batch may fill [default: the GPU's; none on a CPU].")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps timed; their median counts.")] = 100,
    warmup: Annotated[int, typer.Option(min=0, help="Decode steps before those.")] = 5,
    window_size: Annotated[int, typer.Option(min=1, help="Last prompt tokens, always kept.")] = 32,
    head_scores: HeadScoresOption = None,
    attn_implementation: Annotated[
        str, typer.Option(help="Prefill attention: sdpa, flash_attention_2, eager.")
    ] = "sdpa",
    graph: Annotated[
        bool | None, typer.Option("--graph/--no-graph", help="CUDA graphs [default: where possible].")
    ] = None,
    decode_backend: Annotated[
        str, typer.Option(help="auto, cuda, fa3, flash_attn, torch_varlen, cpu or reference.")
    ] = "auto",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    output: Annotated[Path, typer.Option(help="Folder of results.json, table.md and efficiency.png.")] = Path(
        "results/speed_and_memory"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what the folder holds.")] = False,
) -> None:
    """Time to the first token, time per token and memory of whole models, by method and prompt length.

    Finished cells are kept: a second run measures what is missing.
    """
    import torch

    from sparsemm.bench import e2e as bench
    from sparsemm.bench.baselines import kvpress_is_installed
    from sparsemm.bench.efficiency import format_tables, plot_efficiency
    from sparsemm.bench.shapes import SHAPES, random_model
    from sparsemm.errors import DataError
    from sparsemm.io import write_bytes_atomic
    from sparsemm.models.loading import _resolve_dtype

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = place.type == "cuda"
    name = model or ("vicuna-7b" if on_gpu else "tiny")
    names = parse_list(methods)
    if methods == _METHODS and kvpress_is_installed():
        names.append("kvpress")
    workloads = bench.make_workloads(
        names,
        parse_integers(budgets or ("256" if on_gpu else "64"), "budgets"),
        parse_integers(prompts or (_GPU_PROMPTS if on_gpu else _CPU_PROMPTS), "prompts"),
        parse_integers(batches, "batches"),
        parse_integers(throughput_prompts, "throughput-prompts"),
    )
    if name in SHAPES:
        kind = _resolve_dtype(dtype, on_cpu=not on_gpu)
        network = random_model(name, device=place, dtype=kind, attn_implementation=attn_implementation)
    else:
        network, _ = load(name, device=device, dtype=dtype, attn_implementation=attn_implementation)
    document = bench.run(
        network,
        workloads,
        model_name=short_name(name),
        steps=steps,
        warmup=warmup,
        head_scores=head_scores,
        window_size=window_size,
        graph=graph,
        decode_backend=decode_backend,
        limit_bytes=None if memory_limit is None else int(1e9 * memory_limit),
        output=output / "results.json",
        fresh=fresh,
    )
    table = format_tables(document)
    write_bytes_atomic(output / "table.md", (table + "\n").encode())
    try:
        plot_efficiency(document, output / "efficiency.png")
    except DataError as error:  # only other batch sizes were measured
        typer.echo(f"no figure: {error}", err=True)
    typer.echo(table)
    typer.echo(f"\n{output / 'results.json'}, {output / 'table.md'}, {output / 'efficiency.png'}", err=True)


def host(
    model: Annotated[
        str, typer.Option(help="Miniature, folder or `tiny` whose Python time per token is measured.")
    ] = DEFAULT_MODEL,
    prompt_tokens: Annotated[int, typer.Option(min=64, help="Prompt of one layer's compression.")] = 4096,
    budget: Annotated[int, typer.Option(min=32, help="Rows per kv head.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the time per token.")] = 7,
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Ratios that need no GPU: one layer against the plain way at the Vicuna shape, and Python's time per token."""
    import torch

    from sparsemm.bench.host import VICUNA, layer_costs, token_overhead
    from sparsemm.bench.shapes import SHAPES, random_model
    from sparsemm.io import write_json_atomic
    from sparsemm.runs.results import environment

    if model in SHAPES:
        network = random_model(model, device=torch.device("cpu"), dtype=torch.float32)
    else:
        network, _ = load(resolve_model(model), device="cpu", dtype="float32")
    with torch.no_grad():
        figures = {
            "layer": layer_costs(**{**VICUNA, "prompt_tokens": prompt_tokens, "budget": budget}),
            "token": {"model": short_name(model), **token_overhead(network, rounds=rounds)},
            "environment": environment(),
        }
    if output is not None:
        write_json_atomic(output, figures)
    typer.echo(json.dumps(figures, indent=2))
