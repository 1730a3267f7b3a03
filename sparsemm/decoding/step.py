"""One decode step: a token of every sequence through the language model, and nothing decided on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsemm.cache import SparseCache
from sparsemm.decoding.fused_layer import FusedLayer, Norm, StepRules
from sparsemm.errors import UnsupportedModelError
from sparsemm.models import family_of
from sparsemm.models.layers import rotary_embeddings
from sparsemm.models.merged import is_plain
from sparsemm.models.products import Product

if TYPE_CHECKING:
    from sparsemm.models.projections import Projections


def rotation_that_reads_positions(rotary_emb: nn.Module) -> str | None:
    """The type of a rotary embedding that looks at the largest position, on the host, before every forward; or None."""
    rope_type = getattr(rotary_emb, "rope_type", "default")
    rope_types = rope_type.values() if isinstance(rope_type, dict) else [rope_type]  # of each type of layer
    return next((each for each in rope_types if "dynamic" in each or "longrope" in each), None)


class DecodeStep:
    """Reads `token` and `positions`, appends to `cache`, writes `logits`, moves `positions` on.

    Calling it runs only device work on tensors that stay where they are: every shape is the same at each step, nothing
    is read back, no allocation depends on a length. So one call can be captured in a CUDA graph and replayed. The
    decoder layers are called directly: the model around them prepares masks and checks arguments on the host. Where it
    does more than that (`verdict.Verdict`, sliding windows), `by_model` makes every step a forward of the model. `fuse`
    lets the layers that are recognised run in fewer kernels.

    Attributes:
        token: int64 `[batch, 1]`, the token to feed; set before each step.
        positions: int64 `[batch, 1]` or, for M-RoPE, `[3, batch, 1]`.
        logits: float32 `[batch, vocab_size]`, written by each step.
        mode: Under which a step runs. Fused layers keep nothing of what they compute, so that they can do without
            autograd's counting of changes; of other modules nobody knows.
        num_later: None, or int32 `[batch, 1]` as for `varlen_decode`: rows that fused layers do not let a token see.
        by_model: Whether steps go through the model's own forward, which is no device work alone.
    """

    def __init__(self, model: nn.Module, cache: SparseCache, prompt_positions: Tensor, logits: Tensor) -> None:
        """
        Args:
            model: A patched model.
            cache: Filled with the prompt. Steps need `cache.room`; `cache.count_steps` accounts for them.
            prompt_positions: `position_ids` of the prompt, `[batch or 1, seq_len]`, or `[3 or 4, batch, seq_len]` where
                a fourth, first axis counts text tokens.
            logits: `[batch, vocab_size]` of the prompt's last column; its copy becomes `self.logits`.

        Raises:
            UnsupportedModelError: The language model's weights are kept elsewhere and loaded as a whole.
        """
        self.model, self.by_model = model, False
        self.mode: type[torch.no_grad | torch.inference_mode] = torch.no_grad
        self.text_model = family_of(model).text_model(model)
        self.lm_head = self._head = model.get_output_embeddings()
        hook = getattr(self.text_model, "_hf_hook", None)
        if getattr(hook, "offload", False):
            raise UnsupportedModelError(
                "the whole language model is offloaded as one piece; let device_map place its layers one by one, or "
                "decode with model.generate under the patch"
            )
        self.cache = cache
        self.batch, device = cache.batch_size, logits.device
        if prompt_positions.dim() == 3 and prompt_positions.shape[0] == 4:
            prompt_positions = prompt_positions[1:]
        last = prompt_positions[..., -1:]
        self.positions = (last + 1).expand(*last.shape[:-2], self.batch, 1).to(device, copy=True).contiguous()
        self.token = torch.zeros(self.batch, 1, dtype=torch.long, device=device)
        self.logits = logits.to(torch.float32, copy=True)
        self.layers: list[tuple[nn.Module, FusedLayer | None]] = [(each, None) for each in self.text_model.layers]
        self.norm: Norm | None = None
        self.num_later: Tensor | None = None
        self._factors: Tensor | None = None  # [steps, 2, batch or 1, dimensions]: cos and sin of the steps to come
        self._turn: Tensor | None = None  # int64 [1], which of them is the next

    def fuse(self, rules: StepRules, projections: tuple[Projections | None, ...]) -> None:
        """Run the layers and the norm that have a rule by it; `projections` of each layer."""
        parts = zip(self.text_model.layers, rules.layers, projections, self.cache.layers, strict=True)
        self.layers = [
            (layer, None if rule is None else FusedLayer(layer, rule, each, rows)) for layer, rule, each, rows in parts
        ]
        self.norm = None if rules.norm is None else Norm(self.text_model.norm, rules.norm)
        if is_plain(self.lm_head):
            self._head = Product.of(self.lm_head).bind()
            if None not in (*rules.layers, rules.norm):
                self.mode = torch.inference_mode

    def prepare(self, steps: int) -> None:
        """Compute the rotations of the coming steps at once: no position depends on a token. 0: forget them."""
        self._factors = None
        if steps == 0 or self.by_model or rotation_that_reads_positions(self.text_model.rotary_emb):
            return
        coming = self.positions + torch.arange(steps, device=self.positions.device)
        first, *others = rotary_embeddings(self.text_model, self.like, coming)
        if all(each is first for each in others):
            factors = torch.stack(first)  # [2, batch or 1, steps, dimensions]
            self._factors = factors.permute(2, 0, 1, 3).contiguous()
            self._turn = torch.zeros(1, dtype=torch.long, device=factors.device)

    @property
    def like(self) -> Tensor:
        """Hidden states without values: rotary embeddings ask for dtype and device."""
        return torch.empty(0, dtype=self.text_model.dtype, device=self.positions.device)

    def rotary_factors(self, hidden_states: Tensor) -> list[tuple[Tensor, Tensor]]:
        """cos and sin of the step's positions for each layer, `[batch or 1, 1, dimensions]`, in the dtype of hidden
        states."""
        if self._factors is None:
            return rotary_embeddings(self.text_model, hidden_states, self.positions)
        return [self._factors.index_select(0, self._turn)[0].unsqueeze(2).unbind(0)] * len(self.layers)

    def __call__(self) -> None:
        with self.mode():
            self.logits.copy_(self.forward_of_model() if self.by_model else self.forward_of_layers(), non_blocking=True)
            self.positions += 1
            if self._factors is not None:
                self._turn += 1

    def forward_of_model(self) -> Tensor:
        """Logits `[batch, vocab_size]` of the token by the model's own forward, which accounts for it in the cache."""
        output = self.model(
            input_ids=self.token,
            attention_mask=self.cache.mask_of_next(1),
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1]

    def forward_of_layers(self) -> Tensor:
        """The same by the decoder layers, after `cache.begin_steps`."""
        embedded = self.text_model.embed_tokens(self.token)
        factors = self.rotary_factors(embedded)
        states, residual = embedded.view(self.batch, -1), None  # the sum of both goes from layer to layer
        for (layer, fused), turned in zip(self.layers, factors, strict=True):
            if fused is None:
                states, residual = self.own_layer(layer, _sum(states, residual), turned), None
            else:
                states, residual = fused(states, residual, turned, self.num_later)
        if self.norm is None:
            states = self.text_model.norm(_sum(states, residual))
        else:
            states, _ = self.norm(states, residual)
        return self._head(states)

    def own_layer(self, layer: nn.Module, states: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
        """`[batch, hidden_size]` through a decoder layer's own forward."""
        out = layer(
            states[:, None],
            attention_mask=None,
            position_embeddings=factors,
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.reshape(self.batch, -1)


def _sum(states: Tensor, residual: Tensor | None) -> Tensor:
    return states if residual is None else residual + states
