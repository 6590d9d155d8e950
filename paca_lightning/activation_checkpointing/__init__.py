"""Activation checkpointing by block: full, offloaded or selective.

``blocks`` replaces the forward of the given blocks; ``selective`` is the policy that keeps GEMMs and attention;
``generators`` repeats random draws. Strategies, tasks and the memory estimate share it. It may import ``core`` and
torch. Limits: eager mode (``torch.compile`` plans recomputation itself), one backward per forward of a selective block.
"""
