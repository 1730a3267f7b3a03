"""`sparsemm bench e2e` and `sparsemm bench host`: whole models, and what the method costs on the host."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemm.cli.common import DEFAULT_MODEL, parse_integers, parse_list, warn_of_positions
from sparsemm.cli.options import BackendOption, DividedModel, FreshOption, GraphOption, JsonOption, Scores
from sparsemm.cli.outputs import claim

_GPU_PROMPTS = "2048,4096,8192,16384,32768,65536,131072"
_CPU_PROMPTS = "256,512,1024,2048"
_METHODS = "hf,fullkv,sparsemm,snapkv,pyramidkv,adakv,original"


@dataclass(frozen=True)
class Shape(DividedModel):
    """A model of random weights, or a checkpoint."""

    model: Annotated[
        str | None,
        typer.Option(help="A shape with random weights, a folder or hub id [default: vicuna-7b, CPU: tiny]."),
    ] = None

    def build(self, **options: Any) -> Any:
        """The model, without its processor; `options` of its attention."""
        import torch

        from sparsemm.bench.shapes import SHAPES, divided_model, random_model
        from sparsemm.models.loading import resolve_device, resolve_dtype
        from sparsemm.models.parallel import joined

        if self.model not in SHAPES:
            return self.load(**options)[0]
        place = torch.device(resolve_device(None if self.device == "auto" else self.device))
        dtype = resolve_dtype(self.dtype, on_cpu=place.type == "cpu")
        if place.type == "cpu" and self.model != "tiny":
            typer.echo(f"warning: {self.model} on a CPU fills tens of gigabytes and takes minutes a token", err=True)
        if self.processes > 1:
            return divided_model(self.model, joined(), device=place, dtype=dtype, **options)
        return random_model(self.model, device=place, dtype=dtype, **options)


def e2e(
    *,
    model: Shape,
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
    scores: Scores,
    attn_implementation: Annotated[
        str, typer.Option(help="Prefill attention: sdpa, flash_attention_2, eager.")
    ] = "sdpa",
    graph: GraphOption = None,
    decode_backend: BackendOption = "auto",
    output: Annotated[Path, typer.Option(help="Folder of results.json, table.md and efficiency.png.")] = Path(
        "results/speed_and_memory"
    ),
    fresh: FreshOption = False,
) -> None:
    """Time to the first token, time per token and memory of whole models, by method and prompt length.

    Finished cells are kept: a second run measures what is missing.
    """
    import torch

    from sparsemm.bench import e2e as bench
    from sparsemm.bench.baselines import kvpress_is_installed
    from sparsemm.bench.efficiency import format_tables, plot_efficiency
    from sparsemm.errors import DataError
    from sparsemm.io import write_bytes_atomic
    from sparsemm.models.parallel import joined

    claim(output / "results.json", output / "table.md", output / "efficiency.png")
    on_gpu = (model.device or ("cuda" if torch.cuda.is_available() else "cpu")) != "cpu"
    model = replace(model, model=model.model or ("vicuna-7b" if on_gpu else "tiny"))
    names = parse_list(methods, "--methods")
    if methods == _METHODS and kvpress_is_installed():
        names.append("kvpress")
    workloads = bench.make_workloads(
        names,
        parse_integers(budgets or ("256" if on_gpu else "64"), "--budgets"),
        parse_integers(prompts or (_GPU_PROMPTS if on_gpu else _CPU_PROMPTS), "--prompts"),
        parse_integers(batches, "--batches"),
        [] if model.processes > 1 else parse_integers(throughput_prompts, "--throughput-prompts"),
    )
    if scores.head_scores is not None:
        scores.table(model.model)
    network = model.build(attn_implementation=attn_implementation)
    warn_of_positions(network, max((place["prompt_tokens"] for place in workloads), default=0) + steps)
    results = bench.run(
        network,
        workloads,
        model_name=model.name,
        steps=steps,
        warmup=warmup,
        head_scores=scores.head_scores,
        window_size=window_size,
        graph=graph,
        decode_backend=decode_backend,
        limit_bytes=None if memory_limit is None else int(1e9 * memory_limit),
        output=output / "results.json",
        fresh=fresh,
        report=functools.partial(typer.echo, err=True),
    )
    if not joined().first:
        return
    table = format_tables(results)
    write_bytes_atomic(output / "table.md", (table + "\n").encode())
    try:
        plot_efficiency(results, output / "efficiency.png")
    except DataError as error:  # only other batch sizes were measured
        typer.echo(f"no figure: {error}", err=True)
    typer.echo(table)
    typer.echo(f"\n{output / 'results.json'}, {output / 'table.md'}, {output / 'efficiency.png'}", err=True)


def host(
    *,
    model: Annotated[
        str, typer.Option(help="Miniature, folder or `tiny` whose Python time per token is measured.")
    ] = DEFAULT_MODEL,
    prompt_tokens: Annotated[int, typer.Option(min=64, help="Prompt of one layer's compression.")] = 4096,
    budget: Annotated[int, typer.Option(min=32, help="Rows per kv head.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the time per token.")] = 7,
    output: JsonOption = None,
) -> None:
    """Ratios that need no GPU: one layer against the plain way at the Vicuna shape, and Python's time per token."""
    from sparsemm.bench.host import run

    claim(output)
    shape = Shape(model, device="cpu", dtype="float32")
    results = run(
        shape.build(), model_name=shape.name, prompt_tokens=prompt_tokens, budget=budget, rounds=rounds, output=output
    )
    typer.echo(json.dumps({cell.place["part"]: {**cell.times, **cell.figures} for cell in results.runs}, indent=2))
