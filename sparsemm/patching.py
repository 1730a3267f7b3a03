"""Installing the evicting cache on a Hugging Face model, and taking it off again without a trace."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from sparsemm.attention import Observer, head_mask_for, sparse_attention
from sparsemm.cache import CacheRecord, CacheStats, SparseCache
from sparsemm.config import CompressionConfig
from sparsemm.errors import CacheError, ConfigError, PatchError
from sparsemm.models import family_of
from sparsemm.models.identity import identity_of
from sparsemm.models.instances import device_of, forward_name, set_on_instance
from sparsemm.models.projections import Projections
from sparsemm.models.proof import proved_projections
from sparsemm.ops.backends import resolve_backend
from sparsemm.plan import GROWTH_ROWS, Plan

_PATCHED: weakref.WeakKeyDictionary[nn.Module, PatchHandle] = weakref.WeakKeyDictionary()


def patch(
    model: nn.Module, config: CompressionConfig, *, reserve: int = GROWTH_ROWS, decode_backend: str = "auto"
) -> PatchHandle:
    """Give `model` the cache of `config` until the handle is removed.

    `with patch(model, config) as handle: …` or `handle = patch(model, config); …; handle.remove()`. Only instances are
    touched, never classes. The model is meant for inference: no gradient flows through cached rows.

    Args:
        model: The whole model of a family of `sparsemm.models`, or a language model of `AutoModelForCausalLM`.
        config: Method and settings; score files are read and random scores drawn here, once.
        reserve: Slots allocated behind every head's prompt rows; set it to `max_new_tokens` to never grow.
        decode_backend: Who attends to the cached rows: a name of `sparsemm.ops.backends.BACKENDS`.

    Raises:
        ConfigError: An unknown backend, or one that cannot serve this model here.
        UnsupportedModelError: Another class, or a layer that cannot be served (names it and why).
        PatchError: The model is patched already.
        HeadScoreError: The head scores do not fit the model, belong to another one, or cannot be read.
    """
    return PatchHandle(model, config, reserve=reserve, decode_backend=decode_backend)


def active_patch(model: nn.Module) -> PatchHandle | None:
    """The handle of the patch that `model` is under, or None. Raises `UnsupportedModelError` as `patch` does."""
    return _PATCHED.get(family_of(model).text_model(model))


def is_stock_cache(cache: Any) -> bool:
    """Whether `cache` is of the kind that `generate` makes where nothing else is asked for."""
    return type(cache) is DynamicCache and not getattr(cache, "offloading", False)


class PatchHandle:
    """An active patch. `stats` describes the most recent prompt, `observer` sees every attention forward; `projections`
    of each layer are as proved."""

    def __init__(
        self, model: nn.Module, config: CompressionConfig, *, reserve: int = GROWTH_ROWS, decode_backend: str = "auto"
    ) -> None:
        if not isinstance(config, CompressionConfig):
            raise ConfigError(f"config must be a CompressionConfig, got {type(config).__name__}")
        if isinstance(reserve, bool) or not isinstance(reserve, int) or reserve < 1:
            raise ConfigError(f"reserve={reserve!r} must be a whole number of rows, at least 1")
        self.model, self.config = model, config
        self.text_model = family_of(model).text_model(model)
        if self.text_model in _PATCHED:
            raise PatchError("this model is patched already; remove that handle (or leave its with block) first")
        self.projections = proved_projections(self.text_model)
        self.plan = _plan(self.text_model, config, reserve, decode_backend)
        if self.plan.method.head_scores == "given":
            self.plan.head_scores.check_model(identity_of(model))
        self.observer: Observer | None = None
        self._record: CacheRecord | None = None
        self._undo: list[Callable[[], None]] = []
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def stats(self) -> CacheStats:
        """What the cache used last kept of its prompts. Raises `CacheError` before the first prompt."""
        if self._record is None:
            raise CacheError("no prompt has been through the model yet; call generate, then read the statistics")
        return self._record.stats()

    def new_cache(self) -> SparseCache:
        """An empty cache of this patch, for loops that hand `past_key_values` to the model themselves."""
        return SparseCache(self.plan)

    def remove(self) -> None:
        """Restore the model: its outputs are then those from before, bit for bit. Calling it again does nothing."""
        while self._undo:
            self._undo.pop()()

    # -- installing -----------------------------------------------------------------------------------------------

    def _install(self) -> None:
        _PATCHED[self.text_model] = self
        self._undo.append(lambda: _PATCHED.pop(self.text_model, None))
        layers = zip(self.text_model.layers, self.projections, self.plan.masked_heads, strict=True)
        for decoder_layer, projections, masked_heads in layers:
            self._replace_forward(decoder_layer.self_attn, projections, masked_heads)
        hook = self.text_model.register_forward_pre_hook(self._before_text_model, with_kwargs=True)
        self._undo.append(hook.remove)
        self._set(self.model, "_get_candidate_generator", _refuse_assisted_decoding)
        if hasattr(self.model.model, "rope_deltas"):
            self._keep_rope_deltas_with_the_cache()

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._undo.append(set_on_instance(owner, name, value))

    def _replace_forward(self, module: nn.Module, projections: Projections, masked_heads: Tensor) -> None:
        name = forward_name(module)
        original = getattr(module, name)
        device = device_of(module)
        head_mask = head_mask_for(masked_heads, self.text_model.dtype, "cpu" if device.type == "meta" else device)

        @functools.wraps(original)
        def forward(*args: Any, past_key_values: SparseCache | None = None, **kwargs: Any) -> Any:
            if past_key_values is None and head_mask is None:
                return original(*args, past_key_values=None, **kwargs)
            on_device = head_mask
            if head_mask is not None:
                hidden_states = args[0] if args else kwargs["hidden_states"]
                on_device = head_mask.to(device=hidden_states.device, dtype=hidden_states.dtype)
            return sparse_attention(
                module,
                projections,
                *args,
                past_key_values=past_key_values,
                head_mask=on_device,
                mask_mode=self.config.mask_mode,
                observer=self.observer,
                **kwargs,
            )

        self._set(module, name, forward)

    # -- at every forward -----------------------------------------------------------------------------------------

    def _before_text_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hand the text model our cache instead of none or an empty one, and announce the coming columns to it."""
        cache = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(module.config, "use_cache", True)
        if cache is None and not use_cache:
            return None
        cache = self._adopt(cache)
        tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            tokens = args[0] if args else kwargs["input_ids"]
        first = cache.get_seq_length() == 0
        cache.begin_chunk(kwargs.get("attention_mask"), *tokens.shape[:2])
        if hasattr(self.model.model, "rope_deltas"):
            cache.rope_deltas = self.model.model.rope_deltas
        self._record = cache.record
        # Later chunks read the ragged rows, for which no dense mask exists; building one would cost T per token.
        mask = {} if first else {"attention_mask": None}
        return args, {**kwargs, "past_key_values": cache, **mask}

    def _adopt(self, cache: Any) -> SparseCache:
        """Our cache, as it is or made of what was handed in. Raises `CacheError` for other kinds of cache."""
        if cache is None:
            return self.new_cache()
        if isinstance(cache, SparseCache):
            mine, its = self.plan, cache.plan
            if (mine.num_layers, mine.num_kv_heads, mine.head_dim) != (its.num_layers, its.num_kv_heads, its.head_dim):
                raise CacheError("past_key_values is the cache of a model of another shape; start without it")
            return cache
        if not is_stock_cache(cache):
            raise CacheError(
                f"past_key_values is a {type(cache).__name__}, which cannot hold a different number of rows per head; "
                "leave cache_implementation and past_key_values unset under the patch"
            )
        if cache.get_seq_length() > 0:
            raise CacheError(
                "past_key_values was filled before the model was patched; start the patched generation without it"
            )
        # `generate` and callers keep a reference to the empty cache they made and expect it filled, so that very
        # object becomes the sparse cache.
        cache.__class__ = SparseCache
        SparseCache.__init__(cache, self.plan)
        return cache

    def _keep_rope_deltas_with_the_cache(self) -> None:
        """Qwen2-VL keeps the M-RoPE offset of generated tokens on the model, where two conversations would mix."""
        inner = self.model.model
        before = inner.rope_deltas
        self._undo.append(lambda: setattr(inner, "rope_deltas", before))

        def restore(cache: Any) -> None:
            if isinstance(cache, SparseCache) and cache.get_seq_length() > 0:
                inner.rope_deltas = cache.rope_deltas

        def before_inner(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            restore(kwargs.get("past_key_values"))

        hook = inner.register_forward_pre_hook(before_inner, with_kwargs=True)
        self._undo.append(hook.remove)
        original = self.model._prepare_position_ids_for_generation

        @functools.wraps(original)
        def prepare_position_ids(inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
            cache = model_kwargs.get("past_key_values")
            restore(cache)
            position_ids = original(inputs_tensor, model_kwargs)
            if isinstance(cache, SparseCache):
                cache.rope_deltas = inner.rope_deltas
            return position_ids

        self._set(self.model, "_prepare_position_ids_for_generation", prepare_position_ids)


def _plan(text_model: nn.Module, config: CompressionConfig, reserve: int, decode_backend: str) -> Plan:
    text_config = text_model.config
    attention = text_model.layers[0].self_attn
    device = device_of(attention)
    if decode_backend != "auto" and device.type != "meta":  # better refused here than in the middle of a prompt
        resolve_backend(decode_backend, device, text_model.dtype, attention.head_dim)
    return Plan(
        config=config,
        num_layers=text_config.num_hidden_layers,
        num_query_heads=text_config.num_attention_heads,
        num_kv_heads=text_config.num_key_value_heads,
        head_dim=attention.head_dim,
        reserve=reserve,
        decode_backend=decode_backend,
    )


def _refuse_assisted_decoding(*args: Any, **kwargs: Any) -> torch.Tensor:
    raise ConfigError(
        "assisted decoding takes back tokens that the compressed prompt was chosen with; "
        "generate without assistant_model and prompt_lookup_num_tokens under the patch"
    )
