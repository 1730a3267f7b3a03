"""One decode step: a token of every sequence through the language model, and nothing decided on the host."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsemm.cache import SparseCache
from sparsemm.errors import UnsupportedModelError
from sparsemm.models import family_of
from sparsemm.models.layers import rotary_embeddings


class DecodeStep:
    """Reads `token` and `positions`, appends to `cache`, writes `logits`, moves `positions` on.

    Calling it runs only device work on tensors that stay where they are: every shape is the same at each step, nothing
    is read back, no allocation depends on a length. So one call can be captured in a CUDA graph and replayed. The
    decoder layers are called directly: the model around them prepares masks and checks arguments on the host. Where it
    does more than that (`verdict.layers_serve`, sliding windows), `by_model` makes every step a forward of the model.

    Attributes:
        token: int64 `[batch, 1]`, the token to feed; set before each step.
        positions: int64 `[batch, 1]` or, for M-RoPE, `[3, batch, 1]`.
        logits: float32 `[batch, vocab_size]`, written by each step.
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
        self.text_model = family_of(model).text_model(model)
        self.lm_head = model.get_output_embeddings()
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

    @torch.no_grad()
    def __call__(self) -> None:
        self.logits.copy_(self.forward_of_model() if self.by_model else self.forward_of_layers(), non_blocking=True)
        self.positions += 1

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
        hidden_states = self.text_model.embed_tokens(self.token)
        embeddings = rotary_embeddings(self.text_model, hidden_states, self.positions)
        for layer, position_embeddings in zip(self.text_model.layers, embeddings, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=None,
                position_embeddings=position_embeddings,
                past_key_values=self.cache,
                use_cache=True,
            )
        return self.lm_head(self.text_model.norm(hidden_states))[:, -1]
