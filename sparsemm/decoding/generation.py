"""Generation: the fast loop of this package, transformers' own with a clock in it, image features computed once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import LongTensor, Tensor, nn
from transformers import StoppingCriteriaList

from sparsemm.cache import CacheStats, SparseCache
from sparsemm.config import CompressionConfig
from sparsemm.decoding import DecodeLoop
from sparsemm.decoding.clock import StepClock
from sparsemm.decoding.tiling import PROMPT_TILE
from sparsemm.errors import CacheError, ConfigError, PatchError
from sparsemm.patching import active_patch, patch

if TYPE_CHECKING:
    from transformers.generation import BaseStreamer


@dataclass(frozen=True)
class GenerationOutput:
    """What `sparsemm.generate` returns.

    Attributes:
        sequences: int64 `[batch, prompt + new tokens]`, as `model.generate` returns them.
        prompt_columns: Columns of the prompt in `sequences`, padding included.
        cache: Holds everything but the last token; hand it on as `past_key_values` to continue.
        stats: What the cache kept of the prompts.
        captures: CUDA graphs captured; more than one when the buffers had to grow.
        prefill_seconds: Until the first token was chosen, vision tower included.
        decode_seconds: From the first token to the last.
    """

    sequences: LongTensor
    prompt_columns: int
    cache: SparseCache
    stats: CacheStats
    captures: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def graph(self) -> bool:
        """Whether decode steps were replayed from a CUDA graph."""
        return self.captures > 0

    @property
    def new_tokens(self) -> LongTensor:
        """int64 `[batch, new tokens]`."""
        return self.sequences[:, self.prompt_columns :]

    @property
    def ms_per_token(self) -> float | None:
        """Milliseconds of one decode step of the whole batch; None when the first token was the last."""
        steps = self.new_tokens.shape[1] - 1
        return 1000 * self.decode_seconds / steps if steps > 0 else None


def generate(
    model: nn.Module,
    inputs: Mapping[str, Any],
    config: CompressionConfig | None = None,
    *,
    reserve: int | None = None,
    graph: bool | None = None,
    prompt_tile: int = PROMPT_TILE,
    exact_prompt: bool = False,
    decode_backend: str | None = None,
    streamer: BaseStreamer | Callable[[LongTensor], None] | None = None,
    **options: Any,
) -> GenerationOutput:
    """Greedy search or sampling, one replayed CUDA graph per token; without CUDA the same step runs as it is.

    Gives the tokens of `model.generate` under the same patch, whose preparation, logits processors and stopping
    criteria it uses. The prompt goes through the layers one at a time, each layer's keys and values freed once it is
    compressed, norms and MLPs in tiles and by fused operators; logits exist for its last column only. The host waits
    for the device once a token, for the stop check of the step before; never for a layer. Decoder layers that are
    recognised and proved run in a dozen kernels. A sequence that has ended attends to nothing: what is cached of its
    padding means nothing. Where several processes hold the model, all of them call this alike and get the same tokens.

    Args:
        model: A supported model; patched for the duration of the call when `config` is given.
        inputs: What the processor (or `ModelFamily.build_inputs`) made: `input_ids`, `attention_mask`, images.
        config: Method and settings; None uses the patch that is active.
        reserve: Rows allocated for generated tokens; by default as many as may be generated. When they are full the
            buffers grow and the graph is captured anew.
        graph: True insists on a CUDA graph, False does without; by default one is used where possible.
        prompt_tile: Prompt tokens that norms and MLPs take at a time; 0 for all at once.
        exact_prompt: Run the prompt through the model's own norms and MLPs, all at once: logits of an uncompressed one
            are then the stock model's bit for bit, not but for rounding. Costs time and memory.
        decode_backend: As for `sparsemm.patch`, when `config` is given; otherwise the patch has it.
        streamer: A transformers streamer, or a function that is called with the tokens `[batch]` of every step, on the
            CPU. On a GPU tokens come one step late.
        **options: For `model.generate`: `max_new_tokens`, `do_sample`, `temperature`, `top_p`, `top_k`,
            `repetition_penalty`, `eos_token_id`, `stopping_criteria`, `logits_processor`, `past_key_values`, …

    Raises:
        PatchError: Neither is `config` given nor the model patched, or both.
        ConfigError: A setting of beam search, assisted decoding or collected outputs; a graph that cannot be had.
        CacheError: A cache of another kind is asked for or handed in.
    """
    for name, value, least in (("reserve", reserve, 1), ("prompt_tile", prompt_tile, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ConfigError(f"{name}={value!r} must be a whole number, at least {least}")
    if "custom_generate" in options or options.get("assistant_model") is not None:
        raise ConfigError("sparsemm.generate runs its own loop; use model.generate under sparsemm.patch for others")
    if options.get("cache_implementation") is not None:  # refused before transformers allocates it
        raise CacheError(
            f"cache_implementation={options['cache_implementation']!r} cannot hold a different number of rows per "
            "head; leave it unset"
        )
    active = active_patch(model)
    if config is None and active is None:
        raise PatchError("the model is not patched: give a config, or call this inside `with sparsemm.patch(…)`")
    if config is None and decode_backend is not None:
        raise ConfigError("decode_backend belongs to the patch: give it to sparsemm.patch, or a config here")
    made = nullcontext(active) if config is None else patch(model, config, decode_backend=decode_backend or "auto")
    with made as handle:
        tile = None if exact_prompt else prompt_tile
        loop = DecodeLoop(handle, reserve=reserve, graph=graph, prompt_tile=tile, streamer=streamer)
        device = handle.text_model.embed_tokens.weight.device
        device = model.device if device.type == "meta" else device
        if device.type == "meta" and not hasattr(model, "hf_device_map"):  # accelerate brings no weights at need
            raise ConfigError("the model is on the meta device, without weights; load it with sparsemm.load_model")
        tensors = {name: each.to(device) if isinstance(each, Tensor) else each for name, each in inputs.items()}
        sequences = loop.generate(**tensors, **options)
        return GenerationOutput(
            sequences=sequences,
            prompt_columns=loop.prompt_columns,
            cache=loop.cache,
            stats=loop.cache.record.stats(),
            captures=0 if loop.runner is None else loop.runner.captures,
            prefill_seconds=loop.prefill_seconds,
            decode_seconds=loop.decode_seconds,
        )


@dataclass(frozen=True)
class Timing:
    """Seconds until the first token, from it to the last, and the decode steps between them."""

    prefill_seconds: float
    decode_seconds: float
    decode_steps: int


def generate_greedy(
    model: nn.Module, inputs: Mapping[str, Tensor], max_new_tokens: int, **options: Any
) -> tuple[Tensor, Timing]:
    """Greedy continuation `[batch, new tokens]`, prompts cut off, and how long it took.

    By `generate` where a patch is active, else by `model.generate`; `options` go on to it, a `streamer` for instance.
    """
    if active_patch(model) is None:
        tokens, (prefill, *steps) = stock_greedy(model, inputs, max_new_tokens, **options)
        return tokens, Timing(prefill, sum(steps), len(steps))
    output = generate(model, inputs, max_new_tokens=max_new_tokens, **_GREEDY, **options)
    return output.new_tokens, Timing(output.prefill_seconds, output.decode_seconds, output.new_tokens.shape[1] - 1)


def stock_greedy(
    model: nn.Module, inputs: Mapping[str, Tensor], max_new_tokens: int, **options: Any
) -> tuple[Tensor, list[float]]:
    """`generate_greedy` by transformers' own loop, patched or not, and the seconds until each token: from the call for
    the first, from the one before for others."""
    clock = StepClock(model.device)
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        stopping_criteria=StoppingCriteriaList([clock]),
        **_GREEDY,
        **options,
    )
    return output[:, inputs["input_ids"].shape[1] :], clock.clock.seconds()


# A checkpoint's settings of sampling have no effect on greedy search, but are warned about unless unset.
_GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


@contextmanager
def remember_image_features(model: nn.Module, *, capacity: int) -> Iterator[None]:
    """Encode each `pixel_values` tensor once while the context lasts; the vision tower does not depend on the cache.

    At most `capacity` results are held. Only the instance is touched, and put back at the end.
    """
    inner = model.model
    original = inner.get_image_features
    on_instance = "get_image_features" in vars(inner)
    known: dict[tuple[Any, ...], tuple[Tensor, Any]] = {}

    @functools.wraps(original)  # transformers reads the names of its parameters
    def get_image_features(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        # The tensor is held beside its features, so that no other one can come to lie at its address.
        key = (pixel_values.data_ptr(), tuple(pixel_values.shape), pixel_values.dtype)
        if key not in known:
            while len(known) >= capacity:
                known.pop(next(iter(known)))
            known[key] = (pixel_values, original(pixel_values, *args, **kwargs))
        return known[key][1]

    inner.get_image_features = get_image_features
    try:
        yield
    finally:
        if on_instance:
            inner.get_image_features = original
        else:
            del inner.get_image_features
