"""``paca-lightning bench``: time and memory of fine-tuning methods, measured side by side on one model.

``command`` has the function :func:`bench`; ``workload`` says what a step is, ``methods`` how a model is trained
(``lora``: by PEFT), ``step_runner`` takes steps and times them, ``measure`` compares methods step by step, ``peak``
measures memory in fresh processes (``processes``), and ``results`` prints and writes.
May import all that ``tools`` may; uses the tracer of ``tools.memory`` to count saved bytes.
Limits: causal language models of Hugging Face, random tokens, one device a process (DDP, no sharding).
"""
