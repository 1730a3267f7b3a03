"""What a model divided among processes is to do as a whole one does: the same runs for both, as JSON values.

As a program (`parallel_runs.py FOLDER GROUP`, one process of several) it does the runs of a group on divided models and
writes `FOLDER/GROUP-<rank>.json`; `in_processes` starts them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from chase_job import PAGES, SlowPage
from graph_emulation import EmulatedGraphs
from greedy_runs import calibration, config, greedy, reachable_bytes, scores, text_inputs
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from toy_models import TINY_MINIATURE, toy_inputs, toy_model, toy_processor
from toy_vlms import LANGUAGE_MODELS, TOYS, toy_vlm

import sparsemm
from sparsemm.bench.e2e import make_workloads
from sparsemm.bench.e2e import run as run_e2e
from sparsemm.bench.memory import weight_bytes
from sparsemm.bench.sent import sent_bytes, step_bytes
from sparsemm.bench.shapes import divided_model, random_model
from sparsemm.cache import layer as cache_layer
from sparsemm.calibration import calibrate
from sparsemm.chase import chase
from sparsemm.chase.page import read_page
from sparsemm.decoding import DecodeLoop, loop
from sparsemm.errors import ConfigError, PatchError, SparseMMError, UnsupportedModelError
from sparsemm.experiments.evaluate import evaluate
from sparsemm.experiments.session import PageReader, heldout_pages
from sparsemm.methods import METHODS
from sparsemm.miniatures.architectures import build_model, build_processor
from sparsemm.models import family_of
from sparsemm.models.parallel import check_plan, divide, join, joined
from sparsemm.viz.kept import kept_rows
from sparsemm.viz.reading import read_with_attention

BUDGET, WINDOW = 16, 8
FAMILIES = ["llava-vicuna", "llava-mistral", "qwen2-vl", *TOYS, *LANGUAGE_MODELS]


class Models:
    """Where the runs have their models from: as they are, or divided among the processes of this one's group."""

    def __init__(self, folder: Path, divided: bool) -> None:
        self.folder, self.divided = folder, divided

    def __call__(self, name: str, whole: torch.nn.Module) -> torch.nn.Module:
        place = self.folder / "models" / name.replace(", ", "-")
        if not (place / "config.json").exists() and joined().first:
            whole.save_pretrained(place)
        if self.divided:
            torch.distributed.barrier()
            model = divide(functools.partial(type(whole).from_pretrained, place), joined())
            model.generation_config = whole.generation_config
            return model.eval()
        whole.config._name_or_path = str(place)  # of the same identity
        return whole


def toy(name):
    if name in TOYS or name in LANGUAGE_MODELS:
        model, processor = toy_vlm(name)
        if name in LANGUAGE_MODELS:
            return model, text_inputs(40)
        noise = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        inputs = family_of(model).build_inputs(processor, [Image.fromarray(noise)], ["Compare these, please."])
        return model, dict(inputs)
    model = toy_model(name)
    return model, toy_inputs(model, 2, [30, 45])


def families(models):
    """Full budget, by every family that can be divided: tokens of both loops and logits."""
    found = {}
    for name in FAMILIES:
        whole, inputs = toy(name)
        try:
            check_plan(whole.config, 2)
        except UnsupportedModelError as error:
            found[name] = str(error)
            continue
        try:
            model = models(name, whole)
        except RuntimeError as error:  # of transformers, which cannot load its own plan
            found[name] = f"not loaded: {error}"
            continue
        for rounding in ("exact", "paper"):
            with sparsemm.patch(model, config("snapkv", 2000, rounding=rounding)):
                tokens, logits, _ = greedy(model, inputs, 4)
                own = sparsemm.generate(model, inputs, max_new_tokens=4, do_sample=False)
            found[f"{name} {rounding}"] = [tokens.tolist(), own.new_tokens.tolist(), logits.tolist()]
    return found


@contextlib.contextmanager
def noting_rows(noted):
    """Note the positions that each of this process's heads keeps, of every prompt and layer."""
    choose, choose_late = cache_layer.choose_rows, cache_layer.keep_best

    def choose_rows(plan, layer_idx, states, *rest):
        return note(states.key, choose(plan, layer_idx, states, *rest))

    def keep_best(key, starts, window_size, budgets, *rest):
        rows = choose_late(key, starts, window_size, budgets, *rest)
        return rows if all(each is None for each in budgets) else note(key, rows)

    def note(key, rows):
        from_the_end = rows.positions - key.shape[2]  # kept rows lie right-aligned in as many columns as are needed
        lists = [each.tolist() for each in from_the_end.split(rows.kept.flatten().tolist())]
        heads = rows.kept.shape[1]
        noted.append([lists[begin : begin + heads] for begin in range(0, len(lists), heads)])
        return rows

    cache_layer.choose_rows, cache_layer.keep_best = choose_rows, keep_best
    try:
        yield
    finally:
        cache_layer.choose_rows, cache_layer.keep_best = choose, choose_late


def methods(models):
    """Every method: what `compressed` finds."""
    found = {}
    for name in ("llava-vicuna", "qwen2-vl"):
        whole = toy_model(name)
        model, inputs = models(name, whole), toy_inputs(whole, 2, [30, 45])
        for method, turns in itertools.product(METHODS, ("first", "every")):
            if turns == "every" and method not in ("adakv", "sparsemm"):
                continue
            found[f"{name} {method} {turns}"] = compressed(model, inputs, settings_of(whole, method, turns))
    return found


def settings_of(whole, method, turns="first"):
    kinds = ("calibrated", "calibrated_mixkv", "retrieval")
    tables = {"given": scores(whole)} | dict.fromkeys(kinds, calibration(whole))
    row = METHODS[method]
    budget, table = BUDGET if row.compresses else None, tables.get(row.head_scores)
    return config(method, budget, head_scores=table, mask_ratio=0.25, compress_turns=turns)


def compressed(model, inputs, settings):
    """Kept positions of this process's heads, tokens of both loops, statistics, bytes."""
    turns, noted = settings.compress_turns, []
    with sparsemm.patch(model, settings, reserve=8) as handle, noting_rows(noted):
        tokens, logits, cache = greedy(model, inputs, 4)
        if turns == "every":
            more = text_inputs(20, 2)["input_ids"]
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 23, dtype=torch.long)], 1)
            model(input_ids=torch.cat([tokens[:, -1:], more], 1)[:, -20:], attention_mask=mask, past_key_values=cache)
        stats = handle.stats
        own = sparsemm.generate(model, inputs, max_new_tokens=5, do_sample=False)
    return {
        "positions": noted[: len(noted) if turns == "every" else 2],
        "tokens": tokens.tolist(),
        "logits": logits.tolist(),
        "own loop": own.new_tokens.tolist(),
        "kept": stats.kept_rows.tolist(),
        "full bytes": stats.full_cache_bytes,
        "bytes": stats.bytes_by_rank,
        "held": own.cache.memory_bytes(),
        "reachable": reachable_bytes(own.cache),
        "rows": int(sum(layer.offsets[-1] for layer in own.cache.layers)),
        "masked": handle.plan.masked_heads.tolist(),
    }


def sampling(models):
    """Tokens drawn with other seeds in each process, by steps that run and by steps that are captured and replayed."""
    whole = toy_model("llava-mistral")
    model, inputs = models("llava-mistral", whole), toy_inputs(whole)
    limited = _said(lambda: sparsemm.generate(model, inputs, config(), max_new_tokens=6, max_time=1.0))
    assert models.divided == (limited is not None and "max_time=1.0 would end each process" in limited)
    found = {}
    graphs = mock.patch.multiple(loop, CudaGraphs=EmulatedGraphs, why_no_graph=lambda *_: None)
    for name, context in {"run": contextlib.nullcontext(), "replayed": graphs}.items():
        torch.manual_seed(5 + joined().rank)
        with context:
            output = sparsemm.generate(model, inputs, config(), max_new_tokens=6, do_sample=True, temperature=1.5)
        assert output.graph == (name == "replayed")
        found[name] = output.new_tokens.tolist()
    return found


def sending(models):
    """What a decode step of each family hands to collectives: by formula, as counted, and as the profiler lists it."""
    return {name: sent(models(name, toy_model(name)), 2) for name in ("llava-vicuna", "qwen2-vl")}


def sent(model, size):
    """Of a step: `step_bytes`, `sent_bytes`, the collectives that the profiler saw with the shapes of what they were
    handed, the operators on DTensors, and how many layers are fused."""
    with sparsemm.patch(model, config()) as handle, torch.no_grad():
        decoding = DecodeLoop(handle, reserve=8)
        model.generate(**toy_inputs(model, 2, [30, 45]), max_new_tokens=3, do_sample=False, custom_generate=decoding)
        decoding.cache.begin_steps()
        step = decoding.step
        counted = sent_bytes(step)
        with torch.profiler.profile(record_shapes=True) as profile:
            step()
        with _OnDTensors() as on_dtensors:
            step()
    collectives = [[each.name, each.input_shapes[0]] for each in profile.events() if each.name.startswith("gloo:")]
    return {
        "formula": step_bytes(model, 2, size),
        "counted": counted,
        "collectives": collectives,
        "on dtensors": on_dtensors.names,
        "fused": sum(fused is not None for _, fused in step.layers),
        "weights": weight_bytes(model),
    }


class _OnDTensors(TorchDispatchMode):
    """Notes the names of operators that DTensors have to take apart."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any("DTensor" in kind.__name__ for kind in types):
            self.names.append(func._schema.name)
            return NotImplemented
        return func(*args, **(kwargs or {}))


def benchmark(models):
    """Figures of `bench e2e`, with random weights that are divided as they are made."""
    options = {"device": torch.device("cpu"), "dtype": torch.float32}
    model = divided_model("tiny", joined(), **options) if models.divided else random_model("tiny", **options)
    workloads = make_workloads(["hf", "fullkv", "sparsemm"], [16], [64], [2], [])
    results = run_e2e(model, workloads, model_name="tiny", window_size=8, steps=2, warmup=0, progress=False)
    return {cell.place["method"]: {**cell.figures, "status": cell.status} for cell in results.runs}


def reading(models):
    """The chase's file, and the columns that heads look at."""
    whole = toy_model("qwen2-vl")
    model = models("qwen2-vl", whole)
    output = models.folder / f"chase-{models.divided}.json"
    chase(
        model, toy_processor("qwen2-vl"), [SlowPage(index, 0.0) for index in range(PAGES)], match="unique",
        max_new_tokens=6, least_read=0.0, output=output, model_name="toy", dataset="noise", progress=False,
    )  # fmt: skip
    _, columns = read_page(model, toy_inputs(whole), max_new_tokens=5)
    return {
        "file": output.read_text(),
        "columns": columns.tolist(),
        "left": sorted(map(str, output.parent.glob("*part*"))),
    }


def pictures(models):
    """What is drawn: positions kept of an image, and the attention of heads of both processes."""
    model, processor = models("qwen2-vl", toy_model("qwen2-vl")), toy_processor("qwen2-vl")
    image = SlowPage(0, 0.0).image
    kept = kept_rows(model, processor, image, config("adakv", BUDGET))
    seen = read_with_attention(model, processor, image, [(0, 0), (1, 1), (1, 3)], max_new_tokens=3)
    return {"kept": [[head.tolist() for head in layer] for layer in kept.positions], "rows": seen.weights.tolist()}


def answers(models):
    """Cells of an evaluation, all but what is measured."""
    model = build_model("qwen2-vl", dims=TINY_MINIATURE).eval()
    model.generation_config.eos_token_id = None
    model, processor = models("miniature", model), build_processor("qwen2-vl", TINY_MINIATURE)
    table = sparsemm.HeadScores(torch.arange(1.0, 9.0).view(2, 4), source="test")
    output = models.folder / f"results-{models.divided}.json"
    reader = PageReader(
        model, processor, heldout_pages(3, num_words=(1, 2)), batch_size=2, max_new_tokens=4, output=output,
        progress=False,
    )  # fmt: skip
    cells = evaluate(
        reader, methods=["fullkv", "adakv", "sparsemm", "mask"], budgets=[16], head_scores=table, window_size=4,
        mask_ratio=0.25,
    )  # fmt: skip
    measured = ("ms_per_token", "prefill_ms", "environment", "cache_bytes", "slack_bytes")
    values = [{name: value for name, value in cell.to_dict().items() if name not in measured} for cell in cells]
    return {"cells": json.loads(json.dumps(values)), "written": len(json.loads(output.read_text())["cells"])}


def refusals(models):
    """What each process says where they do not agree, and where something is not offered."""
    whole = toy_model("qwen2-vl")
    model, rank = models("qwen2-vl", whole), joined().rank
    version = sparsemm.__version__
    other = {"seed": {"seed": rank}, "head_scores": {"head_scores": scores(whole, rank)}, "sparsemm": {}}
    found = {}
    for name, settings in other.items():
        given = {"head_scores": scores(whole), **settings}
        try:
            sparsemm.__version__ = f"{version}+{rank}" if name == "sparsemm" else version
            with sparsemm.patch(model, config("sparsemm", **given)):
                pass
        except PatchError as error:
            found[name] = str(error)
        finally:
            sparsemm.__version__ = version
    table = scores(whole) if rank else sparsemm.HeadScores(torch.ones(3, 4))
    found["one"] = _said(lambda: sparsemm.patch(model, config("sparsemm", head_scores=table)))
    found["calibrate"] = _said(lambda: calibrate(model, toy_processor("qwen2-vl"), []))
    with sparsemm.patch(model, config()) as handle:  # the model is as it was
        tokens, _, _ = greedy(model, toy_inputs(whole))
        if rank:  # one process alone would not fuse this layer
            handle.text_model.layers[0].mlp.register_forward_hook(lambda *_: None)
        decoding = DecodeLoop(handle)
        same = model.generate(**toy_inputs(whole), max_new_tokens=tokens.shape[1], custom_generate=decoding)
    fused = [each is not None for _, each in decoding.step.layers]
    return {**found, "tokens": tokens.tolist(), "same": same[:, -tokens.shape[1] :].tolist(), "fused": fused}


def three(models):
    """Three processes, among which heads and tokens divide: what `compressed` and `sent` find."""
    found = {}
    shapes = {"llava-mistral": {"num_heads": 6, "num_kv_heads": 3}, "qwen2-vl": {"num_heads": 12, "num_kv_heads": 6}}
    for name, heads in shapes.items():
        whole = toy_model(name, **heads, vocab_size=129)
        model, inputs = models(name, whole), toy_inputs(whole, 2, [30, 45])
        for method in ("fullkv", "adakv", "sparsemm", "mask"):
            found[f"{name} {method} first"] = compressed(model, inputs, settings_of(whole, method))
        found[f"{name} sent"] = sent(model, 3)
    return found


def many(models):
    """Four processes: a model on all of them; heads that do not divide; two models on two each."""
    whole = toy_model("llava-vicuna")
    settings = config("adakv", BUDGET)
    found = {}
    for size in (4, 2):
        if models.divided:
            join(size)
        model = models("llava-vicuna", whole)
        noted = []
        with sparsemm.patch(model, settings), noting_rows(noted):
            tokens, logits, _ = greedy(model, toy_inputs(whole, 2, [30, 45]), 4)
            own = sparsemm.generate(model, toy_inputs(whole, 2, [30, 45]), max_new_tokens=4, do_sample=False)
        assert own.new_tokens.tolist() == tokens.tolist()
        found[str(size)] = {"positions": noted[:2], "tokens": tokens.tolist(), "logits": logits.tolist()}
        if models.divided and size == 4:
            found["uneven"] = _said(lambda: sparsemm.patch(models("qwen2-vl", toy_model("qwen2-vl")), settings))
            found["plan"] = _said(lambda: check_plan(toy_model("qwen2-vl").config, 4))
            found["join"] = _said(lambda: join(3))
    return found


def _said(call) -> str | None:
    try:
        call()
    except (SparseMMError, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    return None


GROUPS = {
    "two": (families, methods, sampling, sending, benchmark, reading, pictures, answers, refusals),
    "three": (three,),
    "four": (many,),
}


def in_processes(count: int, folder: Path, group: str) -> list[dict]:
    """What each of `count` processes found. Their launcher holds the port at which they meet from the beginning: one
    that is merely looked up can be another program's a moment later."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    done = subprocess.run(
        [*launcher, __file__, str(folder), group],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(f"one of {count} processes failed:\n{done.stderr[-6000:]}")
    return [json.loads((folder / f"{group}-{rank}.json").read_text()) for rank in range(count)]


def main(folder: Path, group: str) -> None:
    torch.set_num_threads(1)
    join()
    models = Models(folder, divided=True)
    found = {}
    for run in GROUPS[group]:
        begin = time.perf_counter()
        found[run.__name__] = run(models)
        print(f"{run.__name__}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    rank = torch.distributed.get_rank()
    (folder / f"{group}-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
