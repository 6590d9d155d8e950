"""Fills caches of the process that ranks and runs are forked from, which each of them would fill again.

Nothing is computed: autograd's threads do not survive a fork.
"""

import torch

from paca_lightning.conversion.bypassed import bypassed_linears
from tests.tiny import tiny_llama

with torch.device("meta"):
    for module in tiny_llama().modules():
        list(bypassed_linears(module))  # reads the sources of its classes
