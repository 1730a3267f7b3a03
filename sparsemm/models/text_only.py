"""Language models without images, of any type whose attention layers can be proved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from sparsemm.errors import DataError, UnsupportedModelError
from sparsemm.models.family import ModelFamily, refuse_pixel_limits
from sparsemm.models.geometry import ImageLayout, Inputs
from sparsemm.models.messages import Messages

if TYPE_CHECKING:
    from transformers import PretrainedConfig, ProcessorMixin

_AS_IT_IS = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


class TextOnly(ModelFamily):
    name = "text"
    model_class = "AutoModelForCausalLM"
    processor_class = "AutoTokenizer"
    image_tokens = "none"

    def text_model(self, model: nn.Module) -> nn.Module:
        inner = getattr(model, "model", None)
        if not all(hasattr(inner, name) for name in ("layers", "embed_tokens", "norm", "rotary_emb")):
            raise UnsupportedModelError(
                f"{type(model).__name__} is not built of model.layers, model.embed_tokens, model.norm and "
                "model.rotary_emb; no cache of kept rows can be given to it"
            )
        return inner

    def load_processor(
        self, path: str, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> ProcessorMixin:
        """The tokenizer. A checkpoint without a chat template reads prompts as they are."""
        from sparsemm.models.processing import TextProcessor, pad_left

        refuse_pixel_limits(self.name, min_pixels, max_pixels)
        processor = TextProcessor.from_pretrained(path, trust_remote_code=False)
        processor.chat_template = processor.chat_template or _AS_IT_IS
        return pad_left(processor)

    def _conversation(self, entry: Any, prompt: str | Messages) -> tuple[Messages, dict[str, list[Any]]]:
        conversation, media = super()._conversation(entry, prompt)
        if any(media.values()):
            raise DataError("a language model without vision reads text only; leave the image out")
        return [{**message, "content": _text_of(message["content"])} for message in conversation], media

    def image_token_layout(self, config: PretrainedConfig, inputs: Inputs, **sources: Any) -> list[list[ImageLayout]]:
        return [[] for _ in inputs["input_ids"]]


def _text_of(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


TEXT_ONLY = TextOnly()
