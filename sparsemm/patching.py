"""Installing the evicting cache on a Hugging Face model, and taking it off again without a trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sparsemm.attention import Observer, head_mask_for, sparse_attention
from sparsemm.cache import CacheRecord, CacheStats, SparseCache, adopt
from sparsemm.config import CompressionConfig
from sparsemm.errors import CacheError, ConfigError, PatchError
from sparsemm.models import family_of, merged
from sparsemm.models.instances import Replacement, device_of, forward_name, set_on_instance
from sparsemm.models.layers import mean_rotation
from sparsemm.models.projections import Projections
from sparsemm.models.proof import proved_projections
from sparsemm.plan import GROWTH_ROWS, agreed_plan

# Kept on the text model itself, so that a model that is dropped under its patch is freed with it.
_HANDLE = "_sparsemm_patch"


def patch(
    model: nn.Module,
    config: CompressionConfig,
    *,
    reserve: int = GROWTH_ROWS,
    decode_backend: str = "auto",
    merge_projections: bool = False,
) -> PatchHandle:
    """Give `model` the cache of `config` until the handle is removed.

    `with patch(model, config) as handle: …` or `handle = patch(model, config); …; handle.remove()`. Only instances are
    touched, never classes. The model is meant for inference: no gradient flows through cached rows.

    Args:
        model: The whole model of a family of `sparsemm.models`, or a language model of `AutoModelForCausalLM`.
        config: Method and settings; score files are read and random scores drawn here, once.
        reserve: Slots allocated behind every head's prompt rows; set it to `max_new_tokens` to never grow.
        decode_backend: Who attends to the cached rows: a name of `sparsemm.ops.backends.BACKENDS`.
        merge_projections: Lay the weights of query, key and value, and of gate and up, side by side while the patch
            lasts, for one product each in decode steps. Plain linear layers only; their weights are moved twice.

    Raises:
        ConfigError: An unknown backend, or one that cannot serve this model here.
        UnsupportedModelError: Another class, or a layer that cannot be served (names it and why).
        PatchError: The model is patched already, or the processes that hold it (tensor parallelism) do not agree.
        HeadScoreError: The head scores do not fit the model, belong to another one, or cannot be read.
    """
    return PatchHandle(
        model, config, reserve=reserve, decode_backend=decode_backend, merge_projections=merge_projections
    )


def active_patch(model: nn.Module) -> PatchHandle | None:
    """The handle of the patch that `model` is under, or None. Raises `UnsupportedModelError` as `patch` does."""
    return vars(family_of(model).text_model(model)).get(_HANDLE)


class PatchHandle:
    """An active patch. `stats` describes the most recent prompt, `observer` sees every attention forward; `projections`
    of each layer are as proved, None where a sliding window keeps transformers' own attention."""

    def __init__(
        self,
        model: nn.Module,
        config: CompressionConfig,
        *,
        reserve: int = GROWTH_ROWS,
        decode_backend: str = "auto",
        merge_projections: bool = False,
    ) -> None:
        if not isinstance(config, CompressionConfig):
            raise ConfigError(f"config must be a CompressionConfig, got {type(config).__name__}")
        if isinstance(reserve, bool) or not isinstance(reserve, int) or reserve < 1:
            raise ConfigError(f"reserve={reserve!r} must be a whole number of rows, at least 1")
        self.model, self.config = model, config
        self.text_model = family_of(model).text_model(model)
        if _HANDLE in vars(self.text_model):
            raise PatchError("this model is patched already; remove that handle (or leave its with block) first")
        self.projections = proved_projections(self.text_model)
        own_kv_heads = next(each.num_kv_heads for each in self.projections if each is not None)
        self.plan = agreed_plan(model, self.text_model, config, own_kv_heads, reserve, decode_backend)
        self.observer: Observer | None = None
        self._record: CacheRecord | None = None
        self._columns: Tensor | None = None  # the mask of the forward under way, before the model made others of it
        self._image: Tensor | None = None  # which columns of the forward under way show an image
        self._undo: list[Callable[[], None]] = []
        try:
            self._install()
            for layer in self.text_model.layers if merge_projections else ():
                self._undo += merged.merge_projections(layer)
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
        """What the cache used last kept of its prompts, of all heads: under tensor parallelism every process has to
        ask. Raises `CacheError` before the first prompt."""
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
        self._set(self.text_model, _HANDLE, self)
        masked_heads = iter(self.plan.own_masked_heads)
        for decoder_layer, projections in zip(self.text_model.layers, self.projections, strict=True):
            if projections is not None:
                self._replace_forward(decoder_layer.self_attn, projections, next(masked_heads))
        self._replace(self.text_model, forward_name(self.text_model), self._text_model_forward)
        self._set(self.model, "_get_candidate_generator", _refuse_assisted_decoding)
        inner = self.model.model
        if hasattr(inner, "rope_deltas"):
            self._keep_rope_deltas_with_the_cache()
        if self.plan.sliding_windows and inner is not self.text_model:
            self._replace(inner, forward_name(inner), self._inner_forward)
        if "image" in self.plan.method.sees and inner is not self.text_model:
            self._replace(inner, forward_name(inner), self._with_image_columns)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._undo.append(set_on_instance(owner, name, value))

    def _replace(self, owner: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Let `function(original, *args, **kwargs)` stand in for a method of `owner`."""
        original = getattr(owner, name)
        self._set(owner, name, Replacement(original, functools.partial(function, original)))

    def _replace_forward(self, module: nn.Module, projections: Projections, masked_heads: Tensor) -> None:
        device = device_of(module)
        head_mask = head_mask_for(masked_heads, self.text_model.dtype, "cpu" if device.type == "meta" else device)

        def forward(
            original: Callable[..., Any], *args: Any, past_key_values: SparseCache | None = None, **kwargs: Any
        ) -> Any:
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

        self._replace(module, forward_name(module), forward)

    # -- at every forward -----------------------------------------------------------------------------------------

    def _text_model_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Hand the text model our cache instead of none or an empty one; a forward that breaks off leaves no trace."""
        cache, config = kwargs.get("past_key_values"), self.text_model.config
        use_cache = kwargs.get("use_cache")
        if cache is None and not (getattr(config, "use_cache", True) if use_cache is None else use_cache):
            return original(*args, **kwargs)
        if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
            raise ConfigError(
                "output_attentions is not offered under the patch, where kept rows have no columns; ask for it with "
                "use_cache=False, or look at each layer with PatchHandle.observer"
            )
        cache = adopt(cache, self.plan)
        tokens = _tokens(args, kwargs)
        first = cache.get_seq_length() == 0
        mask = kwargs.get("attention_mask")
        seen = self._what_the_method_sees(cache, tokens, kwargs.get("position_ids"))
        cache.begin_chunk(self._columns if isinstance(mask, dict) else mask, *tokens.shape[:2], **seen)
        self._record = cache.record
        # Later chunks read the ragged rows, for which no dense mask exists; building one would cost T per token.
        mask = {} if first or self.plan.sliding_windows else {"attention_mask": None}
        try:
            output = original(*args, **{**kwargs, "past_key_values": cache, **mask})
            cache.end_chunk(kwargs.get("position_ids") if hasattr(self.model.model, "rope_deltas") else None)
        except BaseException:
            cache.roll_back()
            raise
        return output

    def _inner_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Where the model around makes the masks of each kind of layer, of padding and image blocks."""
        cache, kinds = kwargs.get("past_key_values"), kwargs.get("token_type_ids")
        if isinstance(cache, SparseCache) and cache.get_seq_length() > 0:
            tokens, image = _tokens(args, kwargs), getattr(self.model.config, "image_token_id", None)
            if kinds is not None:
                kinds = kinds[:, -tokens.shape[1] :]
            elif tokens.dim() == 2 and tokens.shape[1] > 1 and image is not None:
                kinds = tokens == image  # some versions of transformers hand no kinds to later chunks of a prompt
            if kinds is not None and bool(kinds.any()):
                raise CacheError(
                    "image tokens attend to each other in both directions, which columns behind a filled cache cannot; "
                    "give all images with the first prompt, in one forward"
                )
        self._columns = kwargs.get("attention_mask")
        try:
            return original(*args, **kwargs)
        finally:
            self._columns = None

    def _with_image_columns(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward that puts image features in the place of image tokens."""
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is not None:
            names = ("image_token_id", "video_token_id")
            kinds = [getattr(self.model.config, name) for name in names if hasattr(self.model.config, name)]
            self._image = torch.isin(tokens, torch.tensor(kinds, device=tokens.device))
        try:
            return original(*args, **kwargs)
        finally:
            self._image = None

    def _what_the_method_sees(self, cache: SparseCache, tokens: Tensor, position_ids: Tensor | None) -> dict[str, Any]:
        """Of the columns that `tokens` `[batch, columns, ...]` are, as `Chunk` has it."""
        batch, columns = tokens.shape[:2]
        method, seen = cache.plan.method, {}
        if columns == 1 and cache.get_seq_length():  # a decode step, in which nothing is chosen
            return seen
        if "image" in method.sees:
            text_only = self.model.model is self.text_model
            none = torch.zeros(batch, columns, dtype=torch.bool, device=tokens.device)
            seen["image"] = none if text_only else self._image
        if "ahead" in method.sees:
            fed = cache.get_seq_length() + columns
            last = torch.full((1, 1), fed - 1) if position_ids is None else position_ids.amax(-1, keepdim=True)
            seen["ahead"] = mean_rotation(self.text_model, last.to(tokens.device), method.positions_ahead)
        return seen

    def _keep_rope_deltas_with_the_cache(self) -> None:
        """The offset of generated tokens in M-RoPE is kept on the model, where two conversations would mix."""
        inner = self.model.model
        before = inner.rope_deltas
        self._undo.append(lambda: setattr(inner, "rope_deltas", before))

        def restore(cache: Any) -> None:
            filled = isinstance(cache, SparseCache) and cache.get_seq_length() > 0
            inner.rope_deltas = cache.rope_deltas if filled else None

        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            restore(kwargs.get("past_key_values"))
            return original(*args, **kwargs)

        def prepare_position_ids(
            original: Callable[..., Tensor], inputs_tensor: Tensor, model_kwargs: dict[str, Any]
        ) -> Tensor:
            restore(model_kwargs.get("past_key_values"))
            return original(inputs_tensor, model_kwargs)

        self._replace(inner, forward_name(inner), forward)
        self._replace(self.model, "_prepare_position_ids_for_generation", prepare_position_ids)


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The ids or embeddings that a forward is given, `[batch, columns, ...]`."""
    embeddings = kwargs.get("inputs_embeds")
    if embeddings is not None:
        return embeddings
    return args[0] if args else kwargs["input_ids"]


def _refuse_assisted_decoding(*args: Any, **kwargs: Any) -> torch.Tensor:
    raise ConfigError(
        "assisted decoding takes back tokens that the compressed prompt was chosen with; "
        "generate without assistant_model and prompt_lookup_num_tokens under the patch"
    )
