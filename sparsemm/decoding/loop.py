"""The decoding loop that `model.generate` runs in place of its own: prompt, then one replayed step per token.

transformers prepares everything else: positions, special tokens, logits processors and stopping criteria are its own,
so that sampling follows the very distribution, and stopping the very rules, of `model.generate`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import LongTensor, Tensor, nn

from sparsemm.cache import SparseCache, SparseLayer, adopt
from sparsemm.decoding.choice import Choice, Monitor
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
    """Greedy search and sampling over a patched model, by `generate`, or by `model.generate(…, custom_generate=loop)`.

    Attributes:
        cache: Of the last call; continue it with `past_key_values`.
        prompt_columns: Columns of the prompt in what the last call returned, padding included; 0 where it was embedded
            by the caller.
        runner: Of the last call; None when the first token was the last.
        step: The forward of one token that the runner repeats.
        prefill_seconds: To the first token of the last call; from that of `generate`, or else from where transformers
            called the loop, which may be behind the vision tower.
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
        self._clock: Clock | None = None
        self.step_seconds: list[float] = []

    def generate(self, **inputs: Any) -> LongTensor:
        """`model.generate` with this loop: int64 `[batch, prompt + new tokens]`."""
        model = self.handle.model
        # Where the prompt lies, the work begins; weights may lie elsewhere.
        self._clock = Clock(next((each.device for each in inputs.values() if isinstance(each, Tensor)), model.device))
        try:
            return model.generate(**inputs, custom_generate=self)
        finally:
            self._clock = None

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
        clock = self._clock or Clock(input_ids.device)
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
        choose = Choice(step, input_ids, max_length, logits_processor, stopping_criteria, generation_config)
        monitor = Monitor(choose, self.streamer)
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
        return adopt(given, plan)

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


def _one_after_the_other(step: DecodeStep, choose: Choice) -> Callable[[], None]:
    def body() -> None:
        step()
        choose.choose_on_device()

    return step.mode()(body)


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
