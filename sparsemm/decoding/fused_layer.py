"""A decoder layer over one token of every sequence in a dozen kernels, with what is read off its modules.

What a layer must look like: a norm, attention with `Projections`, a residual addition, a norm, a gated MLP, a residual
addition. `fused_proof` shows that it computes just that; any other layer runs as it is. Where a layer is divided among
processes by whole heads, each computes its part, and the parts are added up behind `o_proj` and `down_proj`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsemm.cache import SparseLayer
from sparsemm.errors import SparseMMError
from sparsemm.models.instances import as_built
from sparsemm.models.merged import joined
from sparsemm.models.parallel import own
from sparsemm.models.products import Product
from sparsemm.models.projections import Projections
from sparsemm.models.rotation import nearly_equal
from sparsemm.ops.backends import operators, overload

ACTIVATIONS = {"silu_mul": nn.functional.silu, "gelu_tanh_mul": lambda x: nn.functional.gelu(x, approximate="tanh")}
"""The gated activations that have an operator."""

ANY_ROW = 8  # a head_dim that every kernel takes: norms know none
_NORMS = ("input_layernorm", "post_attention_layernorm")


class NotRecognisedError(SparseMMError):
    """A layer is built otherwise; says how."""


@dataclass(frozen=True)
class NormRule:
    """`unit_offset`: whether the weight is stored minus one, as `add_rms_norm` takes it."""

    eps: float
    unit_offset: bool


@dataclass(frozen=True)
class LayerRule:
    """How one decoder layer is computed. Holds nothing of the layer itself.

    Attributes:
        norms: Before the attention and before the MLP.
        head_norm: Of queries and keys, or None.
        activation: A name of `ACTIVATIONS`.
        interleaved: Whether neighbours are rotated together.
    """

    norms: tuple[NormRule, NormRule]
    head_norm: NormRule | None
    activation: str
    interleaved: bool


@dataclass(frozen=True)
class StepRules:
    """Of every layer, and of the norm behind them; None for what runs as it is."""

    layers: tuple[LayerRule | None, ...]
    norm: NormRule | None


class Norm:
    """An RMS norm of the sum of a residual and what is added to it."""

    def __init__(self, module: nn.Module, rule: NormRule) -> None:
        weight = own(module.weight)
        self.weight, self.eps, self.unit_offset = weight, rule.eps, rule.unit_offset
        self.operator = overload(operators(weight.device, weight.dtype, ANY_ROW).add_rms_norm)

    def __call__(self, states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The normalised sum, and the sum, of contiguous `[batch, hidden_size]`."""
        normed, total = self.operator(states, residual, self.weight, self.eps, self.unit_offset)
        return normed, states if residual is None else total


class FusedLayer:
    """A decoder layer as its rule has it, on a cache's layer."""

    def __init__(self, layer: nn.Module, rule: LayerRule, projections: Projections, rows: SparseLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.rows, self.scaling, self.head_dim = rows, projections.scaling, projections.head_dim
        self.rotates = projections.rotary is not None
        self.before_attention, self.before_mlp = (
            Norm(getattr(layer, name), each) for name, each in zip(_NORMS, rule.norms, strict=True)
        )
        parts, self.widths = _products(attention, ("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
        if projections.fused is not None:
            self.widths = list(projections.fused)
        gates, _ = _products(mlp, ("gate_proj", "up_proj"), ("gate_up_proj",))
        self.projections, self.gates = [each.bind() for each in parts], [each.bind() for each in gates]
        self.output, self.down = _product(attention.o_proj).bind(), _product(mlp.down_proj).bind()
        weight = own(attention.o_proj.weight)
        place = (weight.device, weight.dtype, projections.head_dim)
        self.activate = overload(getattr(operators(*place), rule.activation))
        self.rotation: tuple[Any, ...] = (None, None, 0.0, False, rule.interleaved)
        if rule.head_norm is not None:
            weights, norm = (own(attention.q_norm.weight), own(attention.k_norm.weight)), rule.head_norm
            self.rotation = (*weights, norm.eps, norm.unit_offset, rule.interleaved)

    def __call__(
        self, states: Tensor, residual: Tensor | None, factors: tuple[Tensor, Tensor], num_later: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """From a layer's output, as the sum of `states` and `residual` `[batch, hidden_size]`, to this one's, alike.

        `factors`: cos and sin `[batch or 1, 1, dimensions]`. `num_later`: as for `varlen_decode`.
        """
        normed, residual = self.before_attention(states, residual)
        if len(self.projections) == 1:
            parts = self.projections[0](normed).split(self.widths, dim=-1)
        else:
            parts = [project(normed) for project in self.projections]
        batch = normed.shape[0]
        query, key, value = [part.view(batch, -1, 1, self.head_dim) for part in parts]
        cos, sin = factors if self.rotates else [each[..., :0] for each in factors]
        query = self.rows.append_rotated(query, key, value, cos, sin, rotation=self.rotation)
        out, _ = self.rows.decode(query, self.scaling, num_later)
        normed, residual = self.before_mlp(self.output(out.view(batch, -1)), residual)
        if len(self.gates) == 1:
            gate, up = self.gates[0](normed).chunk(2, dim=-1)
        else:
            gate, up = [project(normed) for project in self.gates]
        return self.down(self.activate(gate, up)), residual


def read_layer(layer: nn.Module, projections: Projections | None) -> LayerRule:
    """The rule of a layer, its norms and activation tried on random numbers; rotation in halves.

    Raises:
        NotRecognisedError: It is built otherwise, its weights are no ordinary tensors, or something is hooked to it.
    """
    if projections is None:
        raise NotRecognisedError("its attention has no cache of rows")
    parts = {name: part for name, part in layer.named_children() if not isinstance(part, (nn.Dropout, nn.Identity))}
    if set(parts) != {"self_attn", "mlp", *_NORMS}:
        raise NotRecognisedError(f"its parts are {', '.join(sorted(parts))}")
    for part in layer.modules():
        if not as_built(part):
            raise NotRecognisedError(f"its {type(part).__name__} has hooks or another forward")
    tensors = [own(each) for each in (*layer.parameters(), *layer.buffers())]
    if any(type(each) not in (nn.Parameter, Tensor) or each.is_meta for each in tensors):
        raise NotRecognisedError("its weights are no ordinary tensors")
    if len({(each.device, each.dtype) for each in tensors}) != 1:
        raise NotRecognisedError("its weights are of several dtypes or on several devices")
    attention, mlp = parts["self_attn"], parts["mlp"]
    _products(attention, ("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
    _products(mlp, ("gate_proj", "up_proj"), ("gate_up_proj",))
    for linear in (attention.o_proj, mlp.down_proj):
        _product(linear)
    head_norm = None
    if projections.norms == "head":
        head_norm, other = (norm_rule(getattr(attention, name)) for name in ("q_norm", "k_norm"))
        if head_norm != other:
            raise NotRecognisedError("queries and keys are normalised by different rules")
    elif projections.norms is not None:
        raise NotRecognisedError("its norms of queries and keys take all heads at once")
    return LayerRule(tuple(norm_rule(parts[name]) for name in _NORMS), head_norm, activation_of(mlp), interleaved=False)


def norm_rule(module: nn.Module) -> NormRule:
    """What `add_rms_norm` needs to compute `module`. Raises `NotRecognisedError` where it cannot."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if [name for name, _ in module.named_parameters()] != ["weight"] or eps is None or not as_built(module):
        raise NotRecognisedError(f"{type(module).__name__} is no RMS norm as it reads")
    weight = own(module.weight)
    x = torch.randn(8, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    for unit_offset in (False, True):
        rule = NormRule(float(eps), unit_offset)
        try:
            found, _ = Norm(module, rule)(x, None)
        except RuntimeError as error:  # sizes that the kernels refuse
            raise NotRecognisedError(f"{type(module).__name__}: {error}") from error
        if nearly_equal(found, module(x)):
            return rule
    raise NotRecognisedError(f"{type(module).__name__} normalises otherwise")


def activation_of(mlp: nn.Module) -> str:
    """The name in `ACTIVATIONS` of the one that a gated MLP has. Raises `NotRecognisedError` for another."""
    others = [part for _, part in mlp.named_children() if not isinstance(part, (nn.Linear, nn.Dropout, nn.Identity))]
    x = torch.linspace(-12, 12, 64)
    if len(others) == 1 and not any(True for _ in others[0].parameters()):
        for name, function in ACTIVATIONS.items():
            if torch.equal(others[0](x), function(x)):
                return name
    raise NotRecognisedError("its activation has no operator")


def _products(module: nn.Module, apart: tuple[str, ...], together: tuple[str, ...]) -> tuple[list[Product], list[int]]:
    """The projections of one input, a single one where one product computes them all; and their widths."""
    names = apart if all(hasattr(module, name) for name in apart) else together
    found = [_product(getattr(module, name, None)) for name in names]
    widths = [each.weight.shape[0] for each in found]
    weight, bias = joined([each.weight for each in found]), joined([each.bias for each in found])
    if weight is not None and (bias is not None or found[0].bias is None):
        found = [Product(weight, bias)]
    return found, widths


def _product(module: Any) -> Product:
    if type(module) is not nn.Linear:
        found = "missing" if module is None else f"a {type(module).__name__}"
        raise NotRecognisedError(f"one of its projections is {found}")
    return Product.of(module)
