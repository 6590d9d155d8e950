"""From a model to a converted one and back."""
