"""What every other folder stands on: errors, configuration, files, paths and tensors.

``errors`` and ``config`` are the standard library's only. ``files`` writes aside and renames, ``paths`` names modules,
``dtensor`` treats sharded tensors, ``evaluating`` runs forwards beside training, and ``private`` holds every private
API of other libraries.
May import torch, the standard library, xxhash and regex; ``private`` imports other libraries inside its functions.
Limits: knows no layer, no model and no run.
"""
