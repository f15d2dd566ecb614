"""Corpora, splits, tokenizers, packing, data order, generated tasks and the assets that package registries carry.

Import from the files (`from trialist.data.corpora import load_documents`): this room's `__init__` imports nothing, so that
`trialist.data.assets` needs neither torch nor datasets.
"""
