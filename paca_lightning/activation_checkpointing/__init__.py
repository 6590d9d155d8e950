"""Activation checkpointing by block."""
