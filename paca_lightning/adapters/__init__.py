"""What leaves the process: adapter directories, checkpoints' state dicts, exports.

``adapter`` saves and loads an adapter, whose settings ``files`` reads and writes. ``tensors`` reads and checks
its tensors, and ``fitting`` checks them against a model. ``fingerprint`` tells base models apart,
``state_dict`` keeps frozen weights out of checkpoints, and ``export`` writes merged models and LoRA adapters.
May import ``core``, ``layers`` and ``conversion``; transformers only in ``export``.
Limits: safetensors and JSON, no pickle. Nothing here knows a Trainer.
"""
