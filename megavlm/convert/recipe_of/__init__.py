"""Reads ``config.json`` files: what they say of a model, as the fields of a recipe's model part.

One file for each part of a model, and one for whole models. Only what a file states comes out (a tree of plain values),
so that a recipe can be compared with it. What MegaVLM has no counterpart for is an error that names each such value,
never left out in silence. Values that files leave to their default come from the configuration classes of
``transformers``; no code of a folder is run.
"""
