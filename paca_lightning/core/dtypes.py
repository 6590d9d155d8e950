"""Names of dtypes: ``bf16`` and ``bfloat16`` are one."""

LONG = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""PyTorch's names by the short ones."""

SHORT = {long: short for short, long in LONG.items()}


def long_dtype(name: str) -> str:
    """PyTorch's name of a dtype; any other name as it is."""
    return LONG.get(name, name)


def short_dtype(name: str) -> str:
    """The short name of a dtype; any other name as it is."""
    return SHORT.get(name, name)
