"""A made-up Llama of 1.1 billion weights in bfloat16: as large as it takes to see what a base costs."""

from __future__ import annotations

from pathlib import Path

VOCABULARY, LAYERS, HIDDEN = 49152, 20, 2048


def save(folder: Path, tokenizer: str) -> int:
    """Save the model, and the tokenizer that lies in another folder, and return how many weights it has."""
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=5632, num_hidden_layers=LAYERS,
        num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=True, dtype="bfloat16",
    )
    try:
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())
