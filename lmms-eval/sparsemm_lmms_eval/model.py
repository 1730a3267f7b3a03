"""The models: any checkpoint that `sparsemm.load_model` loads, any method, through lmms-eval's chat interface."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

import sparsemm
from sparsemm.errors import ConfigError, UnsupportedModelError
from sparsemm.models.parallel import ALONE, join
from sparsemm.runs.journal import Journal
from sparsemm_lmms_eval.answers import RECORD_VERSION, count_tokens, cut, figures_of, log_speed, result_of

DEFAULT_NEW_TOKENS = 1024
"""Longest answer where a task sets none (TextVQA): its answers end by themselves long before."""


@dataclass(frozen=True)
class _Question:
    """A request by what it asks; every process that holds the model has the document."""

    owner: int  # rank of the process that lmms-eval handed it to
    task: str
    split: str
    document: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class _Loaded:
    """Keeps the network out of lmms-eval's sight, which deletes a model's modules after each run."""

    network: Any
    processor: Any


class SparseMMModel(lmms):
    """A checkpoint of any family; where `family` is set, of that one alone.

    Args:
        pretrained: Checkpoint folder or hub id.
        method, budget, ratio, rounding, head_scores, window_size, seed, mask_ratio, mask_mode: Fields of
            `sparsemm.CompressionConfig`, with its defaults.
        decode_backend: Who attends to the cached rows, a name of `sparsemm.ops.backends.BACKENDS`.
        attn_implementation: transformers' attention for the prompt.
        min_pixels, max_pixels: Bounds of the area images are resized to, where a family resizes to any size.
        batch_size: Prompts generated together, left padded.
        device: `cpu`, `cuda`, ...; `auto` (or `device_map=auto`) spreads a large model over the GPUs.
        dtype: As for `sparsemm.load_model`.
        tensor_parallel: So many processes of the launcher in a row hold one model and answer the requests of all of
            them together; each `tensor_parallel` processes more are data parallel.
        progress: Folder of journals from which an interrupted run goes on.
        any_head_scores: Take scores that were chased on another model.

    Raises:
        ConfigError: A setting is unknown or does not hold.
        UnsupportedModelError: The checkpoint is of the other family.
    """

    is_simple = False
    family: str | None = None

    def __init__(
        self,
        pretrained: str,
        *,
        decode_backend: str = "auto",
        attn_implementation: str = "sdpa",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # lmms-eval passes it to every model
        device: str | None = None,
        device_map: str | None = None,
        dtype: str | None = None,
        tensor_parallel: int | str = 1,
        progress: str | os.PathLike[str] | None = None,
        any_head_scores: bool = False,
        **config: Any,
    ) -> None:
        super().__init__()
        from sparsemm.models import family_of
        from sparsemm.ops.backends import BACKENDS

        self.batch_size = _whole("batch_size", batch_size)
        self.any_head_scores = any_head_scores
        self.use(progress=progress, **config)
        if decode_backend not in BACKENDS:
            raise ConfigError(f"decode_backend={decode_backend!r} is unknown; use one of {', '.join(BACKENDS)}")
        self.decode_backend = decode_backend
        wanted = device_map or device
        processes = _whole("tensor_parallel", tensor_parallel)
        self.parallel = join(processes) if processes > 1 else ALONE
        # Told nothing where there is no GPU, accelerate knows of the other processes and yet gathers nothing from them.
        self.accelerator = Accelerator(cpu=wanted == "cpu" or not torch.cuda.is_available())
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self.parallel.size > 1:
            wanted = None
        elif self._world_size > 1:
            if wanted == "auto":
                raise ConfigError("device_map=auto needs all GPUs in one process; run without torchrun or accelerate")
            own = self.accelerator.device
            wanted = "cpu" if own.type == "cpu" else str(own)  # accelerate numbers CPUs, for which torch has one name
        loaded = sparsemm.load_model(
            pretrained,
            device=wanted,
            dtype=dtype,
            attn_implementation=attn_implementation,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            tensor_parallel=processes if processes > 1 else False,
        )
        self.loaded = _Loaded(*loaded)
        self._family = family_of(self.loaded.network)
        if self.family not in (None, self._family.name):
            raise UnsupportedModelError(f"{pretrained} is no checkpoint for {type(self).__name__}; use model sparsemm")

    def use(self, *, progress: str | os.PathLike[str] | None = None, **config: Any) -> None:
        """Take other settings; the weights stay loaded. Raises `ConfigError` when one does not hold."""
        try:
            settings = {name: value for name, value in config.items() if value not in (None, "None")}
            if self.any_head_scores and "head_scores" in settings:
                settings["head_scores"] = sparsemm.HeadScores.load(settings["head_scores"], any_model=True)
            self.compression = sparsemm.CompressionConfig(**settings)
        except TypeError as error:
            raise ConfigError(f"unknown or missing model argument ({error})") from None
        self.progress = None if progress is None else Path(progress)
        self._warm = False

    @property
    def device(self) -> torch.device:
        """Where gathered numbers live: this process's device."""
        return self.accelerator.device

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Greedy answers, in the order of the requests. An error ends the run: an empty answer would pass for one."""
        with ExitStack() as stack:
            journals = self._open_journals(requests, stack)
            handle = stack.enter_context(
                sparsemm.patch(self.loaded.network, self.compression, decode_backend=self.decode_backend)
            )
            bar = stack.enter_context(tqdm(total=len(requests), desc="answers", disable=self._rank != 0))
            missing = {}
            for request in requests:  # a request may come twice: ranks are padded to the same number of them
                _, _, settings, document, task, split = request.args
                if document not in journals[task].records:
                    missing[task, document] = _Question(self._rank, task, split, document, dict(settings))
            bar.update(len(requests) - len(missing))
            to_messages = {request.args[4]: request.args[1] for request in requests}
            asked = [question for each in self.parallel.collect(list(missing.values())) for question in each]
            for batch in self._batches(asked):
                for question, record in zip(batch, self._answer(batch, to_messages, handle), strict=True):
                    if question.owner == self._rank:
                        journals[question.task].append(question.document, record)
                        bar.update()
        records = [journals[request.args[4]].records[request.args[3]] for request in requests]
        log_speed(records)
        config = self.compression.to_dict()
        return [result_of(record, config) for record in records]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("SparseMM models generate text; choose tasks of type generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("SparseMM models answer one question a document; choose tasks of one round")

    def _open_journals(self, requests: list[Instance], stack: ExitStack) -> dict[str, Journal]:
        """One journal a task for this process, filled with what earlier runs on any number of processes noted."""
        config = self.compression.to_dict()
        if isinstance(config["head_scores"], str):  # the same file may be reached by another path next time
            config["head_scores"] = Path(config["head_scores"]).name
        journals = {}
        for task in {request.args[4] for request in requests}:
            settings = {"task": task, "config": config, "record": RECORD_VERSION}
            path = None
            earlier: dict[int, dict[str, Any]] = {}
            if self.progress is not None:
                path = self.progress / f"{task}-{self._rank}-of-{self._world_size}.jsonl"
                for file in sorted(self.progress.glob(f"{task}-*-of-*.jsonl")):
                    earlier |= Journal(file, settings).records
            journals[task] = stack.enter_context(Journal(path, settings))
            journals[task].records = {**earlier, **journals[task].records}
        return journals

    def _batches(self, questions: list[_Question]) -> Iterator[list[_Question]]:
        """Up to `batch_size` questions with the same generation settings each."""
        groups: dict[str, list[_Question]] = {}
        for question in questions:
            groups.setdefault(json.dumps(question.settings, sort_keys=True, default=str), []).append(question)
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _answer(
        self, batch: list[_Question], to_messages: dict[str, Callable[[Any], Any]], handle: sparsemm.PatchHandle
    ) -> list[dict[str, Any]]:
        """Text and figures of each question of a batch, as JSON values; `to_messages` of each task."""
        from sparsemm.decoding.generation import generate_greedy

        network, processor = self.loaded.network, self.loaded.processor
        conversations = []
        for question in batch:
            document = self.task_dict[question.task][question.split][question.document]
            messages = to_messages[question.task](document)
            conversations.append(ChatMessages(messages=messages).to_hf_messages())
        settings = batch[0].settings
        if settings.get("do_sample") or settings.get("temperature") or settings.get("num_beams", 1) != 1:
            raise ConfigError(f"generation settings {settings} ask for sampling or beams; answers are greedy here")
        inputs = self._family.build_inputs(processor, None, conversations, device=network.device)
        limit = int(settings.get("max_new_tokens", DEFAULT_NEW_TOKENS))
        with torch.inference_mode():
            if not self._warm:  # lazy set-up, of the process or of the method, is no document's cost
                generate_greedy(network, inputs, min(3, limit))
                self._warm = True
            tokens, clock = generate_greedy(network, inputs, limit)
        texts = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        ends = network.generation_config.eos_token_id
        counts = count_tokens(tokens, [] if ends is None else ends)
        figures = figures_of(handle.stats, clock, limit)
        return [
            {"text": cut(text, settings.get("until")), "output_tokens": count, **own}
            for text, count, own in zip(texts, counts, figures, strict=True)
        ]


class SparseMMLlavaNext(SparseMMModel):
    """LLaVA-NeXT with a Vicuna/Llama or Mistral language model."""

    family = "llava_next"


class SparseMMQwen2VL(SparseMMModel):
    """Qwen2-VL."""

    family = "qwen2_vl"


def _whole(name: str, value: Any) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ConfigError(f"{name}={value!r} is not a whole number of at least 1")
    return int(value)
