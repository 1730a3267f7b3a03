"""`sparsemm generate`: a model's answer about one's own picture, under any method."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemm.cli.common import LARGE, SMALL, warn_of_positions
from sparsemm.cli.options import (
    BackendOption,
    DividedModel,
    GraphOption,
    MethodOption,
    NewTokensOption,
    PixelsOption,
    Settings,
)
from sparsemm.errors import DataError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; greedily unless one of the first three is given."""

    temperature: Annotated[
        float | None, typer.Option(min=1e-6, help="Sample at this temperature [default: greedy].")
    ] = None
    top_p: Annotated[
        float | None, typer.Option(min=1e-6, max=1.0, help="Sample from the likeliest tokens of this total.")
    ] = None
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from so many likeliest tokens.")] = None
    repetition_penalty: Annotated[float | None, typer.Option(min=1e-6, help="Above 1 repeats less.")] = None

    def arguments(self) -> dict[str, Any]:
        """Of `generate`. Greedy decoding unsets a checkpoint's settings of sampling, which would be warned about."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if given.keys() - {"repetition_penalty"}:
            return {"do_sample": True, **given}
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **given}


def generate(
    *,
    image: Annotated[Path, typer.Option(help="Picture to ask about.")],
    prompt: Annotated[str | None, typer.Option(help="Question or instruction [default: read everything].")] = None,
    model: DividedModel,
    method: MethodOption = "sparsemm",
    budget: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Mean prompt rows kept per kv head [default: {LARGE.budget}, miniatures {SMALL.budget}]."
        ),
    ] = None,
    settings: Settings,
    max_new_tokens: NewTokensOption = 256,
    max_pixels: PixelsOption = None,
    sampling: Sampling,
    graph: GraphOption = None,
    decode_backend: BackendOption = "auto",
    exact_prompt: Annotated[
        bool, typer.Option("--exact-prompt", help="The model's own norms and MLPs for the prompt: stock bits, slower.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print text, figures and settings as JSON.")] = False,
) -> None:
    """Answer a question about a picture. The text goes to standard output, the cache's figures to standard error."""
    import torch

    import sparsemm
    from sparsemm.chase import READ_PROMPT
    from sparsemm.models import family_of

    if not image.is_file():
        raise DataError(f"image {image} does not exist; check the path")  # before a model is loaded for nothing
    question = READ_PROMPT if prompt is None else prompt
    config = settings.config(model.model, method, budget or model.defaults.budget)
    network, processor = model.load(max_pixels=max_pixels)
    inputs = family_of(network).build_inputs(processor, [image], [question], device=network.device)
    warn_of_positions(network, inputs["input_ids"].shape[1] + max_new_tokens)
    streamer = None
    if stream and not as_json:
        from transformers import TextStreamer

        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(settings.seed)
    output = sparsemm.generate(
        network,
        inputs,
        config,
        max_new_tokens=max_new_tokens,
        num_beams=1,
        **sampling.arguments(),
        graph=graph,
        decode_backend=decode_backend,
        exact_prompt=exact_prompt,
        streamer=streamer,
    )
    tokens, stats = output.new_tokens, output.stats
    text = processor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    figures = {
        "prompt_tokens": stats.prompt_tokens[0],
        "new_tokens": tokens.shape[1],
        "nominal_budget": stats.nominal_budget,
        "effective_budget": stats.effective_budget,
        "cache_bytes": stats.cache_bytes,
        "full_cache_bytes": stats.full_cache_bytes,
        "sliding_bytes": stats.sliding_bytes,
        "prefill_ms": 1000 * output.prefill_seconds,
        "ms_per_token": output.ms_per_token,
        "graph": output.graph,
    }
    if as_json:
        report = {"model": model.name, "prompt": question, "text": text, **figures, "config": config.to_dict()}
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    if streamer is None:
        typer.echo(text)
    share = 100 * stats.effective_budget / max(1, stats.prompt_tokens[0])
    speed = "" if output.ms_per_token is None else f", {output.ms_per_token:.1f} ms/token"
    beside = f" beside {stats.sliding_bytes:,} of sliding windows" if stats.sliding_bytes else ""
    typer.echo(
        f"[{method}] {stats.effective_budget:.2f} of {stats.prompt_tokens[0]} prompt rows ({share:.0f} %) kept per kv "
        f"head; cache {stats.cache_bytes:,} bytes with its room for {max_new_tokens} new tokens{beside}{speed}",
        err=True,
    )
