"""What to fine-tune on: a causal language model, instruction data and MMLU, as Lightning modules and callbacks."""
