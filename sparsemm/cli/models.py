"""`sparsemm models`: the families, and what is tested of them."""

from __future__ import annotations

import typer

_TESTED = """\
Also every language model without images whose attention layers can be proved when it is patched. Layers with a sliding
window beside others keep transformers' own attention and cache; where all slide, or heads are capped, the model is
refused by a sentence.

Tested of every family, on small random models with its real processor: the patched model at full budget gives the
stock model's logits; eviction equals a masked full cache; a painted box changes the image tokens that the layout
names; the chase counts, and pictures show, what whole attention matrices hold. Families that need torchvision are
tested on tensors."""


def models() -> None:
    """List the families of models that can be patched, and what the tests show of each."""
    from sparsemm.cli.common import MINIATURES, checkout
    from sparsemm.io import read_json
    from sparsemm.models import FAMILIES
    from sparsemm.runs.markdown import markdown_table

    trained: dict[str, list[str]] = {}
    for name in MINIATURES:
        config = checkout() / "assets" / "miniatures" / name / "config.json"
        if config.is_file():
            trained.setdefault(read_json(config)["model_type"], []).append(name)
    rows = [
        [name, family.model_class, family.image_tokens, family.needs, ", ".join(trained.get(name, []))]
        for name, family in FAMILIES.items()
    ]
    typer.echo(markdown_table(["model_type", "class", "image tokens", "needs", "miniatures"], rows, left=5))
    typer.echo(f"\n{_TESTED}")
