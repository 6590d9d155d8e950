"""Errors, configuration, files, module paths, DTensor helpers, private APIs of other libraries."""
