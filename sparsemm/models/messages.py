"""Conversations in the chat-template form: which images they hold, and the text that a model reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sparsemm.errors import DataError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

Messages = list[dict[str, Any]]
"""A conversation in the chat-template form: `[{"role": "user", "content": [{"type": "image", "image": …}, …]}]`."""


def is_conversation(value: Any) -> bool:
    """Whether `value` is a list of messages, each of which has a role."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "role" in item for item in value)


def media_items(conversation: Messages) -> Iterator[dict[str, Any]]:
    """The images and videos of a conversation, in order."""
    for message in conversation:
        content = message.get("content")
        for item in content if isinstance(content, list) else []:
            if item.get("type") in ("image", "image_url", "video"):
                yield item


def source_of(item: dict[str, Any]) -> Any:
    """What an image entry of a message names: an image, a path or an address, under any of the names in use."""
    source = next((item[key] for key in ("image", "image_url", "url", "path") if key in item), None)
    return source.get("url") if isinstance(source, dict) else source


def render(processor: ProcessorMixin, conversation: Messages) -> str:
    """The prompt that the checkpoint's template makes of a conversation. Raises `DataError` where there is none."""
    template = processor.chat_template or processor.tokenizer.chat_template
    if not template:
        raise DataError("the checkpoint has no chat template; put a chat_template.jinja into its folder")
    # Left alone, a processor does not ask its tokenizer, and only it knows the one of several that is the default.
    return processor.apply_chat_template(
        conversation, template if isinstance(template, str) else None, add_generation_prompt=True, tokenize=False
    )
