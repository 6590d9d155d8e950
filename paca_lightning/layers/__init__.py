"""What computes: the gradient tap and the layers that it trains.

``autograd`` has the maths and ``base`` what all layers share; ``linear`` holds the dense layers. ``nf4`` is the codec,
``nf4_linear`` its layer, ``linear4bit`` adopts bitsandbytes' layers, and ``columns`` draws indices.
May import ``core`` only. bitsandbytes stays in ``bitsandbytes`` and ``linear4bit``, imported at first use.
Limits: a layer takes flat arguments, and knows nothing of configs, models, optimizers or Lightning.
"""
