"""Errors, configuration, files, module paths, DTensor helpers."""
