"""``paca-lightning estimate``: the peak memory of a run, predicted without its weights and devices.

``from_config`` turns a config into a ``traced_run``; ``traced_model`` builds its model without data, ``traced_step``
takes one training step, ``tracing`` records its ``timeline``, and ``extrapolation`` goes from a few blocks to all.
``baselines`` are other methods to compare with, ``search`` finds what fits a budget, ``report`` prints.
May import all that ``tools`` may. Limits: tensors alone; one device, DDP and FSDP2; Hugging Face's causal models.
"""
