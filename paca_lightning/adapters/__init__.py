"""What leaves the process: adapter directories, checkpoints' state dicts, exports.

``adapter`` saves and loads an adapter, whose settings ``files`` reads and writes. ``tensors`` reads and checks
its tensors, and ``fitting`` checks them against a model. ``fingerprint`` tells base models apart,
``foreign`` reads adapters of PEFT's PaCA and of its authors' fork, whose columns ``absolute`` makes updates of.
``state_dict`` keeps frozen weights out of checkpoints. ``export`` writes merged models and LoRA adapters, and
``peft_paca`` adapters for PEFT's PaCA.
May import ``core``, ``layers`` and ``conversion``; transformers only in ``export``.
Limits: safetensors and JSON, no pickle. Nothing here knows a Trainer.
"""
