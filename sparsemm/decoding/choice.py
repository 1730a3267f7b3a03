"""The next token of every sequence: how it is chosen, told of, and the end of all of them noticed."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import LongTensor, Tensor
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from sparsemm.decoding.step import DecodeStep

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

_OF_SCORES_ALONE = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
_NO_ROW = torch.iinfo(torch.int32).max  # as `num_later`: a query that sees nothing


class Choice:
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
        self.outcome = torch.ones(batch + 1, dtype=torch.long, device=device)  # the tokens; whether any goes on
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
        if self.ends is not None:
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
        column = token[:, None]
        self.step.token.copy_(column)
        self.sequences.index_copy_(1, self.column, column)
        self.column += 1
        self.outcome[:-1] = token


class Monitor:
    """Streams tokens and notices that every sequence has ended.

    On a GPU it reads each step's outcome while the next one runs: waiting for it would leave the device idle after
    every token. Up to one step too many is then run, and taken back (`drain`).
    """

    def __init__(self, choice: Choice, streamer: Any) -> None:
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
