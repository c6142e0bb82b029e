"""A tiny byte-level BPE tokenizer, trained here, whose end token is also its padding token."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qlora_lite.data.chat.template import NAMED_TEMPLATES

SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
)
_CORPUS = [
    "user assistant system the answer is 42",
    "what is the question",
    "two plus two is four\n  yes",
] * 5


def make_tokenizer(
    adds_begin: bool = False, template: str | None = "chatml", special: tuple[str, ...] = SPECIAL_TOKENS
) -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer; adds_begin: put <s> before ordinary text, as Llama and Gemma do."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_CORPUS, trainer)
    if adds_begin:
        begin = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",  # the classic trap: padding and end are one token
    )
    tokenizer.chat_template = NAMED_TEMPLATES[template] if template else None
    return tokenizer
