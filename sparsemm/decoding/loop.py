"""The decoding loop that `model.generate` runs in place of its own: prompt, then one replayed step per token.

transformers prepares everything else: positions, special tokens, logits processors and stopping criteria are its own,
so that sampling follows the very distribution, and stopping the very rules, of `model.generate`.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import LongTensor, Tensor, nn
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from sparsemm.cache import SparseCache, SparseLayer
from sparsemm.decoding.clock import Clock
from sparsemm.decoding.graph import CudaGraphs, StepRunner, why_no_graph
from sparsemm.decoding.step import DecodeStep
from sparsemm.decoding.tiling import PROMPT_TILE, tiled_prompt
from sparsemm.decoding.verdict import verdict_on
from sparsemm.errors import ConfigError
from sparsemm.plan import Plan

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    from sparsemm.patching import PatchHandle


class DecodeLoop:
    """Greedy search and sampling over a patched model; pass it to `model.generate` as `custom_generate`.

    Attributes:
        cache: Of the last call; continue it with `past_key_values`.
        prompt_columns: Columns of the prompt in what the last call returned, padding included; 0 where it was embedded
            by the caller.
        runner: Of the last call; None when the first token was the last.
        step: The forward of one token that the runner repeats.
        prefill_seconds: From the call to the first token, of the last call.
        decode_seconds: From the first token to the last.
        step_seconds: Of each decode step, when `time_steps` is on.
    """

    def __init__(
        self,
        handle: PatchHandle,
        *,
        reserve: int | None = None,
        graph: bool | None = None,
        prompt_tile: int | None = PROMPT_TILE,
        streamer: Any = None,
        time_steps: bool = False,
    ) -> None:
        """Arguments as for `sparsemm.generate`, whose `exact_prompt` is `prompt_tile=None`; `time_steps` notes when
        each step ended.

        Raises `ConfigError` when a graph is insisted on and cannot be had.
        """
        obstacle = why_no_graph(handle.text_model, handle.plan.decode_backend)
        if obstacle is None and handle.observer is not None:
            obstacle = "an observer is to see every attention forward"
        if graph and obstacle is not None:
            raise ConfigError(f"graph=True, but {obstacle}; leave graph unset to decode without one")
        self.handle, self.reserve, self.prompt_tile, self.streamer = handle, reserve, prompt_tile, streamer
        self.graph = obstacle is None if graph is None else graph
        self.cache: SparseCache | None = None
        self.prompt_columns = 0
        self.step: DecodeStep | None = None
        self.runner: StepRunner | None = None
        self.time_steps = time_steps
        self.prefill_seconds = self.decode_seconds = 0.0
        self.step_seconds: list[float] = []

    def __call__(
        self,
        model: nn.Module,
        input_ids: LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> LongTensor:
        """Called by `model.generate`. Returns int64 `[batch, prompt + new tokens]`."""
        _refuse_other_modes(generation_config, model_kwargs)
        max_length, self.prompt_columns = stopping_criteria.max_length, input_ids.shape[1]
        clock = Clock(input_ids.device)
        position_ids = model_kwargs["position_ids"]
        plan = self.handle.plan.with_reserve(self.reserve or max(1, max_length - self.prompt_columns))
        cache = self.make_cache(model_kwargs.get("past_key_values"), plan)
        if plan.parallel.size > 1 and generation_config.max_time is not None:
            raise ConfigError(
                f"max_time={generation_config.max_time} would end each process of a divided model at its own time; "
                "bound it with max_new_tokens"
            )
        if generation_config.do_sample:
            plan.parallel.share_generator(input_ids.device)
        with tiled_prompt(self.handle.text_model, self.prompt_tile):
            outputs = model._prefill(input_ids, generation_config, {**model_kwargs, "past_key_values": cache})
        step = DecodeStep(model, cache, position_ids, outputs.logits[:, -1].to(input_ids.device))
        del outputs
        choose = _Choice(step, input_ids, max_length, logits_processor, stopping_criteria, generation_config)
        monitor = _Monitor(choose, self.streamer)
        choose()
        self.cache, self.step, self.runner = cache, step, None
        remaining = max_length - self.prompt_columns - 1
        if remaining > 0:
            self._judge(step)
        clock.mark()
        monitor.note()
        if remaining > 0 and not monitor.finished():
            if cache.room < min(remaining, cache.plan.reserve):  # a later turn
                cache.grow(min(remaining, cache.plan.reserve))
            body = _one_after_the_other(step, choose) if choose.on_device else step
            graphs = CudaGraphs(input_ids.device) if self.graph and not step.by_model else None
            watched = self.handle.observer is not None
            self.runner = StepRunner(body, cache, graphs, watched=watched, prepare=step.prepare)
            try:
                for _ in range(remaining):
                    self.runner()
                    choose.advance() if choose.on_device else choose()
                    if self.time_steps:
                        clock.mark()
                    monitor.note()
                    if monitor.finished():
                        break
            finally:  # an interrupted generation leaves a cache that can be continued
                self.runner.finish()
                step.prepare(0)
        clock.mark()
        surplus = monitor.drain()
        if surplus:
            cache.crop(-surplus)
        self.prefill_seconds, *steps = clock.seconds()
        self.decode_seconds, self.step_seconds = sum(steps), steps[:-1]
        return choose.sequences[:, : choose.length - surplus]

    def make_cache(self, given: Any, plan: Plan) -> SparseCache:
        """The cache of an earlier turn, or the empty one given with room for the whole answer."""
        return self.handle.adopt(given, plan)

    def _judge(self, step: DecodeStep) -> None:
        """Let the step go through the model where its layers do not serve, and through fused layers where they do."""
        handle = self.handle
        if handle.plan.sliding_windows:  # layers with a cache of transformers' own, which moves at every token
            step.by_model = True
            return
        observer, handle.observer = handle.observer, None  # is to see every token once
        try:
            verdict = verdict_on(step)
            step.by_model = not verdict.layers_serve
            own_attention = (
                observer is not None
                or bool(handle.plan.masked_heads.any())
                or any(type(layer) is not SparseLayer for layer in step.cache.layers)
            )
            if verdict.layers_serve and not own_attention:
                step.fuse(verdict.rules_of(step, handle.projections), handle.projections)
        finally:
            handle.observer = observer


_OF_SCORES_ALONE = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
_NO_ROW = torch.iinfo(torch.int32).max  # as `num_later`: a query that sees nothing


class _Choice:
    """Picks the next token of every sequence from the step's logits and hands it to the step.

    Greedy search and sampling with temperature, top-k, top-p and repetition penalty that stop at a length or an end
    token touch the device only, so they are part of the captured step (`on_device`). Other logits processors and
    stopping criteria run after it. Sequences that have ended attend to nothing from then on.
    """

    def __init__(
        self,
        step: DecodeStep,
        input_ids: LongTensor,
        max_length: int,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ) -> None:
        batch, self.length = input_ids.shape
        device = input_ids.device
        self.step, self.processors, self.criteria, self.sample = step, processors, criteria, config.do_sample
        self.sequences = input_ids.new_zeros(batch, max_length)
        self.sequences[:, : self.length] = input_ids
        self.column = torch.full((1,), self.length, device=device)  # the same as `length`, where a graph can read it
        self.unfinished = torch.ones(batch, dtype=torch.bool, device=device)
        self.outcome = torch.zeros(batch + 1, dtype=torch.long, device=device)  # the tokens; whether any goes on
        ends = [each.eos_token_id for each in criteria if hasattr(each, "eos_token_id")]
        self.ends = torch.cat([each.view(-1).to(device) for each in ends]) if ends else None
        self.pad = config._pad_token_tensor.to(device) if ends else None
        self._penalised: Tensor | None = None  # bool [batch, vocabulary + 1]: tokens that a penalty holds against
        processing = [self._on_device(each) for each in processors]
        known = all(type(each) in (EosTokenCriteria, MaxLengthCriteria) for each in criteria)
        self.on_device = known and None not in processing
        self.processing = processing if self.on_device else []
        if self.on_device and self.ends is not None and batch > 1:
            step.num_later = torch.zeros(batch, 1, dtype=torch.int32, device=device)

    def _on_device(self, processor: Any) -> Callable[[Tensor], Tensor] | None:
        """The processor as a function of the scores, where it is one that asks nothing of the host; else None."""
        if type(processor) in _OF_SCORES_ALONE:
            return functools.partial(processor, None)
        if type(processor) is not RepetitionPenaltyLogitsProcessor:
            return None
        vocab_size, tokens = self.step.logits.shape[-1], self.sequences[:, : self.length]
        ignored = getattr(processor, "prompt_ignore_length", None)  # first columns, of each sequence or of all
        if ignored is not None:
            if int(torch.as_tensor(ignored).max()) > self.length:
                return None
            ignored = torch.as_tensor(ignored, device=tokens.device).view(-1, 1)
            columns = torch.arange(self.length, device=tokens.device)
            tokens = tokens.masked_fill(columns < ignored, vocab_size)
        seen = torch.zeros(len(tokens), vocab_size + 1, dtype=torch.bool, device=tokens.device)
        self._penalised = seen.scatter_(1, tokens.clamp(max=vocab_size), True)

        def penalise(scores: Tensor) -> Tensor:
            lowered = torch.where(scores < 0, scores * processor.penalty, scores / processor.penalty)
            return torch.where(seen[:, :-1], lowered, scores)

        return penalise

    @torch.no_grad()
    def __call__(self) -> None:
        self.choose_on_device() if self.on_device else self._choose()
        self.advance()

    def advance(self) -> None:
        """Account on the host for a choice made on the device."""
        self.length += 1

    def choose_on_device(self) -> None:
        scores = self.step.logits
        for process in self.processing:
            scores = process(scores)
        token = self._draw(scores)
        if self.ends is not None:
            token = torch.where(self.unfinished, token, self.pad)
            self.unfinished.logical_and_((token[:, None] != self.ends).all(-1))
            if self.step.num_later is not None:
                self.step.num_later.copy_(torch.where(self.unfinished, 0, _NO_ROW)[:, None])
        if self._penalised is not None:
            self._penalised.scatter_(1, token[:, None].clamp(max=self._penalised.shape[1] - 1), True)
        self._hand_over(token)
        self.outcome[-1] = self.unfinished.any()

    def _choose(self) -> None:
        token = self._draw(self.processors(self.sequences[:, : self.length], self.step.logits.clone()))
        if self.ends is not None:
            token = torch.where(self.unfinished, token, self.pad)
        self._hand_over(token)
        stopped = self.criteria(self.sequences[:, : self.length + 1], None)
        self.unfinished.logical_and_(~stopped)
        self.outcome[-1] = self.unfinished.any()

    def _draw(self, scores: Tensor) -> Tensor:
        """int64 `[batch]`. On a GPU from its default generator, whose state a captured graph moves on."""
        if not self.sample:
            return scores.argmax(-1)
        probabilities = scores.softmax(-1)
        if probabilities.device.type == "cpu":
            return torch.multinomial(probabilities, num_samples=1).squeeze(1)  # as transformers draws
        # The same distribution; multinomial would wait for the device to check its input.
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)

    def _hand_over(self, token: Tensor) -> None:
        self.step.token.copy_(token[:, None])
        self.sequences.index_copy_(1, self.column, token[:, None])
        self.column += 1
        self.outcome[:-1] = token


def _one_after_the_other(step: DecodeStep, choose: _Choice) -> Callable[[], None]:
    def body() -> None:
        step()
        choose.choose_on_device()

    return torch.no_grad()(body)


class _Monitor:
    """Streams tokens and notices that every sequence has ended.

    On a GPU it reads each step's outcome while the next one runs: waiting for it would leave the device idle after
    every token. Up to one step too many is then run, and taken back (`drain`).
    """

    def __init__(self, choice: _Choice, streamer: Any) -> None:
        self.choice, self.streamer = choice, streamer
        self.lag = 1 if choice.sequences.device.type == "cuda" else 0
        self.pending: deque[tuple[Tensor, Any]] = deque()
        self.done = False
        self.surplus = 0
        if streamer is not None and hasattr(streamer, "put"):
            streamer.put(choice.sequences[:, : choice.length].cpu())

    def note(self) -> None:
        """Queue the outcome of the choice just made."""
        outcome = self.choice.outcome
        if self.lag == 0:
            self.pending.append((outcome.clone(), None))
            return
        host = torch.empty(outcome.shape, dtype=outcome.dtype, pin_memory=True)
        host.copy_(outcome, non_blocking=True)
        event = torch.cuda.Event(blocking=True)
        event.record()
        self.pending.append((host, event))

    def finished(self) -> bool:
        self._read(self.lag)
        return self.done

    def drain(self) -> int:
        """Wait for the last outcomes; the number of tokens chosen after every sequence had ended."""
        self._read(0)
        if self.streamer is not None and hasattr(self.streamer, "end"):
            self.streamer.end()
        return self.surplus

    def _read(self, keep: int) -> None:
        while len(self.pending) > keep:
            outcome, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            if self.done:
                self.surplus += 1
                continue
            if self.streamer is not None:
                getattr(self.streamer, "put", self.streamer)(outcome[:-1].clone())
            self.done = not bool(outcome[-1])


def _refuse_other_modes(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Raise `ConfigError` for what this loop does not do; `model.generate` under the patch does."""
    mode = config.get_generation_mode().value
    wanted = {
        f"generation mode {mode!r}": mode not in ("greedy_search", "sample"),
        "use_cache=False": not model_kwargs.get("use_cache", True),
        "output_scores": config.output_scores,
        "output_logits": config.output_logits,
        "output_attentions": config.output_attentions,
        "output_hidden_states": config.output_hidden_states,
    }
    for name, asked in wanted.items():
        if asked:
            raise ConfigError(
                f"{name} is not offered by sparsemm.generate, which does greedy search and sampling and returns "
                "tokens; use model.generate under sparsemm.patch"
            )
