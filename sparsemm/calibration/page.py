"""What one page gives: how the answer depends on each head, and what each head loses with fewer rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.cache_utils import Cache, DynamicCache

from sparsemm.calibration.curves import distortions, head_columns, row_grid
from sparsemm.calibration.taps import Attend, constant_weights, fixed_prompt, recomputed_layers, tapped
from sparsemm.decoding.generation import stock_greedy
from sparsemm.errors import DataError, SparseMMError
from sparsemm.methods import METHODS, PromptStates, pooled_window_scores
from sparsemm.models import family_of
from sparsemm.models.images import open_image
from sparsemm.models.layers import ragged_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from sparsemm.methods import Settings

logger = logging.getLogger(__name__)

GATES = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Where the gradient is taken; the trapezoid rule weighs the two ends by half."""

RANKINGS = {"distortions": pooled_window_scores, "distortions_mixkv": METHODS["mixkv"].score_positions}
"""Whose rankings of the rows curves are measured for: SnapKV's and MixKV's."""


class QuestionPage(Protocol):
    """A document image and a question about it. `answer` may be None: the model's own is taken then."""

    image: Any
    prompt: str
    answer: str | None
    task: str


@dataclass
class Prompt:
    """A prompt that has been through the model, which stays as it is behind any answer.

    Attributes:
        length: Tokens.
        memory: Its keys and values.
        logits: `[1, vocab_size]` of its last token.
        rope_deltas: The M-RoPE offset of the tokens behind the prompt, else None.
        rankings: For each of `RANKINGS`, per layer int64 `[num_kv_heads, length - window]`: the columns before the
            window, the best first.
        queries: Per layer `[1, num_query_heads, 1, head_dim]`, of the last token, which predicts the answer's first.
    """

    length: int
    memory: Cache
    logits: Tensor
    rope_deltas: Tensor | None
    rankings: dict[str, list[Tensor]] = field(repr=False)
    queries: list[Tensor] = field(repr=False)


@torch.no_grad()
def read_prompt(model: PreTrainedModel, inputs: dict[str, Tensor], settings: Settings) -> Prompt:
    """Run one unpadded prompt. `settings` gives window_size and kernel_size."""
    length = inputs["input_ids"].shape[1]
    rankings: dict[str, list[Tensor]] = {name: [] for name in RANKINGS}
    queries: list[Tensor] = []

    def ranked(
        attend: Attend, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kwargs: Any
    ) -> Any:
        starts = torch.zeros(key.shape[:2], dtype=torch.int32, device=key.device)
        counted = torch.full((1,), length, dtype=torch.int32, device=key.device)
        prompt = PromptStates(query, key, starts, counted, settings.window_size, kwargs["scaling"], value=value)
        for name, scorer in RANKINGS.items():
            scores = scorer(settings, prompt)
            rankings[name].append(scores[0].sort(dim=-1, descending=True, stable=True).indices)
        queries.append(query[:, :, -1:].clone())
        return attend(module, query, key, value, *rest, **kwargs)

    cache = DynamicCache()
    with tapped(family_of(model).text_model(model), ranked):
        output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    deltas = getattr(model.model, "rope_deltas", None)
    return Prompt(length, fixed_prompt(cache), output.logits[:, -1], deltas, rankings, queries)


def answer_loss(model: PreTrainedModel, prompt: Prompt, answer: Tensor) -> Tensor:
    """Mean negative log-likelihood of the tokens `answer` `[1, n]` behind the prompt, teacher forced."""
    logits = prompt.logits
    if answer.shape[1] > 1:
        if prompt.rope_deltas is not None:
            model.model.rope_deltas = prompt.rope_deltas
        output = model(input_ids=answer[:, :-1], past_key_values=prompt.memory, use_cache=True)
        logits = torch.cat([logits, output.logits[0].to(logits.device)])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits, answer[0].to(logits.device))


@contextmanager
def gated(model: PreTrainedModel, prompt: Prompt, gates: Tensor, window_size: int) -> Iterator[None]:
    """While the context lasts, every head gives g * o_full + (1 - g) * o_window behind the prompt.

    o_window attends to the window and the generated rows only. Gates `[num_layers, num_query_heads]`, float32 or wider,
    at 1 change no bit. A gradient has to be taken inside the context where layers are recomputed for it.
    """
    begin, text_model = prompt.length - window_size, family_of(model).text_model(model)
    layers = ragged_layers(text_model.config)

    def mixed(
        attend: Attend, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        full, weights = attend(module, query, key, value, mask, **kwargs)
        mask = None if mask is None else mask[..., begin:]
        near, _ = attend(module, query, key[:, :, begin:], value[:, :, begin:], mask, **kwargs)
        gate = gates[layers.index(module.layer_idx)].to(full.device)[:, None]
        return (gate * full + (1 - gate) * near).to(full.dtype), weights

    with tapped(text_model, mixed):
        yield


def integrated_gradients(
    model: PreTrainedModel, prompt: Prompt, answer: Tensor, window_size: int
) -> tuple[Tensor, list[float]]:
    """Mean over the gates' way from 0 to 1 of d(loss) / d(gate): `[num_layers, num_query_heads]`; the losses on it.

    Prompt keys and values are constants; a layer's attention is computed again when the gradient comes to it, so no
    more than one layer's is held.
    """
    text_model = family_of(model).text_model(model)
    shape = (len(ragged_layers(text_model.config)), text_model.config.num_attention_heads)
    dtype = torch.promote_types(model.dtype, torch.float32)
    total, losses = torch.zeros(shape, dtype=torch.float64), []
    for value in GATES:
        gates = torch.full(shape, value, dtype=dtype, device=prompt.logits.device, requires_grad=True)
        with torch.enable_grad(), recomputed_layers(text_model), gated(model, prompt, gates, window_size):
            loss = answer_loss(model, prompt, answer)
            (gradient,) = torch.autograd.grad(loss, gates)
        weight = 0.5 if value in (GATES[0], GATES[-1]) else 1.0
        total += weight * gradient.double().cpu()
        losses.append(float(loss.detach()))
    return total / (len(GATES) - 1), losses


@torch.no_grad()
def distortion_curves(model: PreTrainedModel, prompt: Prompt, answer: Tensor, window_size: int) -> dict[str, Tensor]:
    """What each head's output loses at each number of rows below the prompt's length, over the residual it is added to.

    For each of `RANKINGS` float64 `[num_layers, num_query_heads, points]`: the mean over the answer's tokens that see
    kept rows; points are those of `row_grid`.
    """
    text_model = family_of(model).text_model(model)
    rows = [each for each in row_grid(window_size, prompt.length) if each < prompt.length]
    residuals: dict[int, Tensor] = {}
    curves: dict[str, list[Tensor]] = {name: [] for name in prompt.rankings}

    def measured(
        attend: Attend, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kwargs: Any
    ) -> Any:
        columns = head_columns(module.o_proj, query.shape[1], query.shape[3], query)
        for name, rankings in prompt.rankings.items():
            ranking = rankings[len(curves[name])]
            lost = distortions(query[0], key[0], value[0], ranking, rows, kwargs["scaling"], columns)
            curves[name].append((lost / residuals[module.layer_idx]).double().mean(-1).T.cpu())
        return attend(module, query, key, value, *rest, **kwargs)

    def note(index: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            residuals[index] = hidden[0].to(torch.promote_types(hidden.dtype, torch.float32)).norm(dim=-1)

        return hook

    hooks = [
        layer.register_forward_pre_hook(note(index), with_kwargs=True) for index, layer in enumerate(text_model.layers)
    ]
    try:
        with tapped(text_model, measured):
            answer_loss(model, prompt, answer)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.stack(layers) for name, layers in curves.items()}


@torch.no_grad()
def retrieval_scores(model: PreTrainedModel, prompt: Prompt, answer: Tensor, needle: Tensor) -> Tensor:
    """How much each head looks at the needle, the columns of the prompt that hold the answer: float64
    `[num_layers, num_query_heads]`.

    For every token of the answer but the last, which ends it, the attention weights in the row that predicts it: those
    of the needle that are among the |needle| largest, summed and divided by |needle| (Fu et al., arXiv 2410.19258,
    equation 2, whose needle is text as long as the answer). The mean over the tokens, so that no page counts more.
    """
    scores: list[Tensor] = []
    tokens = max(1, answer.shape[1] - 1)

    def looked_up(
        attend: Attend, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kwargs: Any
    ) -> Any:
        rows = torch.cat([prompt.queries[module.layer_idx].to(query.device), query], dim=2)[0, :, :tokens]
        compute = torch.promote_types(query.dtype, torch.float32)
        rows = rows.to(compute).view(key.shape[1], -1, tokens, query.shape[3])
        logits = rows @ key[0, :, None].to(compute).transpose(-1, -2) * kwargs["scaling"]
        seen = prompt.length + torch.arange(tokens, device=key.device)[:, None]
        weights = logits.masked_fill(torch.arange(key.shape[2], device=key.device) >= seen, float("-inf")).softmax(-1)
        largest = weights.topk(len(needle), dim=-1)
        inside = torch.isin(largest.indices, needle.to(key.device))
        scores.append((largest.values * inside).double().sum(-1).mean(-1).flatten().cpu() / len(needle))
        return attend(module, query, key, value, *rest, **kwargs)

    with tapped(family_of(model).text_model(model), looked_up):
        answer_loss(model, prompt, answer)
    return torch.stack(scores)


def calibrate_page(
    model: PreTrainedModel, processor: ProcessorMixin, page: QuestionPage, settings: Settings, *, max_new_tokens: int
) -> dict[str, Any]:
    """What one page gives, as JSON values; a page that cannot be used gives its reason as `skipped`.

    `task`, numbers of `prompt_tokens` and `answer_tokens`, the `losses` along the gates, `gradients`
    `[num_layers][num_query_heads]`, those of `RANKINGS` `[num_layers][num_query_heads][points]`, and `retrieval`
    `[num_layers][num_query_heads]`, None where the page does not say where its answer stands.
    """
    try:
        image = open_image(page.image)
        inputs = family_of(model).build_inputs(processor, [image], [page.prompt], device=model.device)
        answer = _answer_tokens(model, processor, page, inputs, max_new_tokens)
        length = inputs["input_ids"].shape[1]
        if length <= settings.window_size:
            raise DataError(f"a prompt of {length} tokens is no longer than the window of {settings.window_size}")
        if answer.shape[1] < 2:
            raise DataError("an answer of one token does not depend on the rows kept")
        needle = _needle(model, processor, page, image, inputs)
    except (SparseMMError, OSError, ValueError, SyntaxError) as error:  # what broken images and odd sizes raise
        logger.warning("page skipped: %s", error)
        return {"skipped": str(error)}
    with constant_weights(model):
        prompt = read_prompt(model, inputs, settings)
        curves = distortion_curves(model, prompt, answer, settings.window_size)
        retrieval = None if needle is None else retrieval_scores(model, prompt, answer, needle)
        gradients, losses = integrated_gradients(model, prompt, answer, settings.window_size)
    return {
        "task": page.task,
        "prompt_tokens": length,
        "answer_tokens": answer.shape[1],
        "losses": losses,
        "gradients": _numbers(gradients),
        **{name: _numbers(each) for name, each in curves.items()},
        "retrieval": None if retrieval is None else _numbers(retrieval),
    }


def _needle(
    model: PreTrainedModel, processor: ProcessorMixin, page: QuestionPage, image: Any, inputs: dict[str, Tensor]
) -> Tensor | None:
    """Columns of the image tokens that show the answer, where it is one word of the page, and no other."""
    boxes = [word.box for word in getattr(page, "words", ()) if word.text == page.answer]
    if len(boxes) != 1 or len(page.words) == 1:
        return None
    ((layout,),) = family_of(model).image_token_layout(
        model.config, inputs, processor=processor, image_sizes=[image.size]
    )
    columns = layout.tokens_in_box(boxes[0], image.size)
    return columns if len(columns) else None


def _answer_tokens(
    model: PreTrainedModel, processor: ProcessorMixin, page: QuestionPage, inputs: dict[str, Tensor], limit: int
) -> Tensor:
    """int64 `[1, n]`: the page's answer and the token that ends it, or the model's own, at most `limit` tokens."""
    if page.answer is None:
        return stock_greedy(model, inputs, limit)[0]
    tokenizer = processor.tokenizer
    ids = [*tokenizer(page.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return torch.tensor([ids[:limit]], device=model.device)


def _numbers(values: Tensor) -> Any:
    """As nested lists of seven digits: float32 has no more, and the file of a large model would be twice as long."""
    if values.ndim:
        return [_numbers(each) for each in values]
    return float(f"{float(values):.7g}")
