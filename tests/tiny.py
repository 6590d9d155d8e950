"""A tiny random Llama and a tiny tokenizer, built offline in a moment: the stand-ins for real models in every test."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TURN = "<|im_end|>"
PAD = "<|pad|>"
SPECIAL_TOKENS = ["<|im_start|>", END_OF_TURN, PAD]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML without a default system message and without ``{% generation %}`` marks, as SmolLM2's and Qwen's are."""

SENTENCES = [
    "What is the capital of France? The capital of France is Paris.",
    "What is your name? My name is Ada, and I am here to help.",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "user assistant system Question: Answer: A. B. C. D. 0 1 2 3 4 5 6 7 8 9",
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (any text survives a round trip) with a ChatML template; about 350 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TURN, pad_token=PAD, chat_template=CHAT_TEMPLATE
    )


def tiny_config(**overrides: Any) -> LlamaConfig:
    """Settings of a 2-layer Llama with grouped-query attention; about 110,000 parameters."""
    settings: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": SPECIAL_TOKENS.index(END_OF_TURN),
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
    }
    return LlamaConfig(**(settings | overrides))


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A tiny Llama with the same random fp32 weights for a seed, in train mode, whatever the global RNG did."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(**overrides)).train()


def tiny_model_directory(path: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny Llama (config, safetensors) and the tiny tokenizer into a directory, and return it."""
    path.mkdir(parents=True, exist_ok=True)
    tiny_llama(seed, **overrides).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
