"""What computes: the tap, PaCA layers, NF4."""
