"""What computes: the gradient tap and the layers that it trains.

``autograd`` has the maths, ``base`` what all layers share, ``linear`` and ``nf4_linear`` the layers; ``experts`` and
``expert_taps`` do the same for stacked experts. ``nf4`` is the codec, ``linear4bit`` adopts bitsandbytes' layers,
``along`` trains norms and biases, ``rms_norm`` keeps less for norms, ``plain`` serves torch.func, and ``write_watch``
finds stale weights.
May import ``core`` only. bitsandbytes stays in ``bitsandbytes`` and ``linear4bit``, imported at first use.
Limits: a layer takes flat arguments and knows nothing of configs, models or Lightning.
"""
