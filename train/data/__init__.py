"""Training data: documents from local files, a tokeniser, an indexed row store on disk, and its iterator."""

from train.data.batches import batches, evaluation_batches
from train.data.rows import RowStore, StoreConfig, build_store, open_or_build
from train.data.sources import Document, find_sources, read_documents

__all__ = [
    "Document",
    "RowStore",
    "StoreConfig",
    "batches",
    "build_store",
    "evaluation_batches",
    "find_sources",
    "open_or_build",
    "read_documents",
]
