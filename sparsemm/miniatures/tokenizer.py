"""The miniatures' tokenizer: one token a character, and one for each fixed phrase of the prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsemm.documents.words import ALPHABET

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PUNCTUATION = " \n.,:;?!-/+*%&@#$'\"()"
PHRASES = ("Provide all", " the OCR", " results", " of this image.", "What is", " the ")
"""Parts of the fixed questions. They are matched before anything else and occur in no word of a page."""

QWEN = ("qwen2-vl", "qwen3-vl", "qwen3-vl-wide")
"""The families with Qwen's chat template, special tokens and M-RoPE positions."""
CHAT_PHRASES = {
    "llava-vicuna": ("USER: ", " ASSISTANT:"),
    "llava-mistral": ("[INST] ", " [/INST]"),
    **dict.fromkeys(QWEN, ("user\n", "assistant\n")),
}
SPECIAL = {
    "llava": ("<pad>", "<s>", "</s>", "<unk>", "<image>"),
    "qwen": (
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>",
        "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    ),
}  # fmt: skip


def build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer for `family`. Text is lower-cased; `decode(encode(x)) == x` for lower-case answers.

    The characters come first, in the same order for every family, so that all share one table of embeddings.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    special = SPECIAL["qwen" if family in QWEN else "llava"]
    vocabulary = {character: index for index, character in enumerate(ALPHABET + PUNCTUATION)}
    vocabulary["<unk>"] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=False))
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    core.decoder = decoders.Fuse()
    core.add_tokens([AddedToken(phrase, normalized=False) for phrase in (*PHRASES, *CHAT_PHRASES[family])])
    core.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    if family in QWEN:
        names = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
        extra = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    else:
        names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        extra = {"image_token": "<image>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        extra_special_tokens=extra,
        **names,
    )


def _content(image: str) -> str:
    """The part of a chat template that writes a message's text, and `image` where an image stands."""
    return (
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '" + image + "' }}"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
    )


# BOS is written by the templates, so that text made by `apply_chat_template` is tokenized as it stands.
CHAT_TEMPLATES = {
    "llava-vicuna": (
        "{{ '<s>' }}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ 'USER: ' }}{% else %}{{ ' ASSISTANT:' }}{% endif %}"
        + _content("<image>\\n")
        + "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
    ),
    "llava-mistral": (
        "{{ '<s>' }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}{% endif %}"
        + _content("<image>\\n")
        + "{% if message['role'] == 'user' %}{{ ' [/INST]' }}{% else %}{{ '</s>' }}{% endif %}{% endfor %}"
    ),
}
CHAT_TEMPLATES |= dict.fromkeys(
    QWEN,
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    + _content("<|vision_start|><|image_pad|><|vision_end|>")
    + "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
)
