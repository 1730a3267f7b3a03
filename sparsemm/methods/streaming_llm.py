"""StreamingLLM: the first tokens, to which attention flows for want of anything else, and the last ones."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsemm.methods.method import Method, PromptStates, Settings
from sparsemm.methods.snapkv import uniform_budgets

NUM_SINKS = 4
"""Initial tokens that are kept (Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024,
arXiv 2309.17453, section 3.2 and Table 2: four suffice, one or two do not)."""


def sinks_then_recent(settings: Settings, states: PromptStates) -> Tensor:
    """Infinity for the sinks, else the position. As `sparsemm.methods.method.PositionScorer` says.

    Keys keep the positions of their RoPE, as in every method here; the paper's section 3.2 numbers positions within the
    cache, which matters for streams longer than the model was trained for.
    """
    place = torch.arange(states.columns, device=states.key.device) - states.starts[..., None]
    return torch.where(place < NUM_SINKS, torch.inf, place.float())


STREAMING_LLM = Method(
    name="streaming_llm", model_budgets=uniform_budgets, score_positions=sinks_then_recent, paper_rounding=False
)
