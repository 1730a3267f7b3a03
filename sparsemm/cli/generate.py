"""`sparsemm generate`: a model's answer about one's own picture, under any method."""

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
    MaskMode,
    MaskModeOption,
    MaskRatioOption,
    ModelOption,
    RatioOption,
    Rounding,
    RoundingOption,
    WindowOption,
    find_head_scores,
    load,
    short_name,
    window_for,
)
from sparsemm.errors import DataError


def generate(
    image: Annotated[Path, typer.Option(help="Picture to ask about.")],
    prompt: Annotated[str | None, typer.Option(help="Question or instruction [default: read everything].")] = None,
    model: ModelOption = DEFAULT_MODEL,
    method: Annotated[str, typer.Option(help="fullkv, snapkv, pyramidkv, adakv, sparsemm, random, mask…")] = "sparsemm",
    budget: Annotated[int | None, typer.Option(help="Mean prompt rows kept per kv head, window included.")] = None,
    head_scores: HeadScoresOption = None,
    window_size: WindowOption = None,
    ratio: RatioOption = 0.1,
    rounding: RoundingOption = Rounding.exact,
    mask_ratio: MaskRatioOption = 0.1,
    mask_mode: MaskModeOption = MaskMode.zero_query,
    seed: Annotated[int, typer.Option(help="Seed of random heads and of sampling.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    max_pixels: Annotated[int | None, typer.Option(help="Largest image area (Qwen2-VL).")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    temperature: Annotated[
        float | None, typer.Option(min=1e-6, help="Sample at this temperature [default: greedy].")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=1e-6, max=1.0, help="Sample from the likeliest tokens of this total.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from so many likeliest tokens.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(min=1e-6, help="Above 1 repeats less.")] = None,
    graph: Annotated[
        bool | None, typer.Option("--graph/--no-graph", help="CUDA graphs [default: where possible].")
    ] = None,
    decode_backend: Annotated[
        str, typer.Option(help="auto, cuda, fa3, flash_attn, torch_varlen, cpu or reference.")
    ] = "auto",
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print text, figures and settings as JSON.")] = False,
) -> None:
    """Answer a question about a picture. The text goes to standard output, the cache's figures to standard error."""
    import torch

    import sparsemm
    from sparsemm.chase import READ_PROMPT
    from sparsemm.methods import get_method
    from sparsemm.models import family_of

    if not image.is_file():
        raise DataError(f"image {image} does not exist; check the path")  # before a model is loaded for nothing
    question = READ_PROMPT if prompt is None else prompt
    needs_scores = get_method(method).head_scores == "given"
    config = sparsemm.CompressionConfig(
        method=method,
        budget=budget,
        head_scores=find_head_scores(model, head_scores) if needs_scores else None,
        window_size=window_for(model, window_size),
        ratio=ratio,
        rounding=rounding.value,
        mask_ratio=mask_ratio,
        mask_mode=mask_mode.value,
        seed=seed,
    )
    limits = {} if max_pixels is None else {"max_pixels": max_pixels}
    network, processor = load(model, device=device, dtype=dtype, **limits)
    inputs = family_of(network).build_inputs(processor, [image], [question], device=network.device)
    streamer = None
    if stream and not as_json:
        from transformers import TextStreamer

        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    sample = any(value is not None for value in given.values())
    if sample:
        torch.manual_seed(seed)
        given = {name: value for name, value in given.items() if value is not None}
    output = sparsemm.generate(
        network,
        inputs,
        config,
        max_new_tokens=max_new_tokens,
        do_sample=sample,
        num_beams=1,
        # Greedy: a checkpoint's settings of sampling are without effect, but warned about unless unset.
        **given,
        **({} if repetition_penalty is None else {"repetition_penalty": repetition_penalty}),
        graph=graph,
        decode_backend=decode_backend,
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
        "prefill_ms": 1000 * output.prefill_seconds,
        "ms_per_token": output.ms_per_token,
        "graph": output.graph,
    }
    if as_json:
        report = {"model": short_name(model), "prompt": question, "text": text, **figures, "config": config.to_dict()}
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    if streamer is None:
        typer.echo(text)
    share = 100 * stats.effective_budget / max(1, stats.prompt_tokens[0])
    speed = "" if figures["ms_per_token"] is None else f", {figures['ms_per_token']:.1f} ms/token"
    typer.echo(
        f"[{method}] {stats.effective_budget:.2f} of {stats.prompt_tokens[0]} prompt rows ({share:.0f} %) kept per kv "
        f"head; cache {stats.cache_bytes:,} bytes with its room for {max_new_tokens} new tokens{speed}",
        err=True,
    )
