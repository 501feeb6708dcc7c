"""Data: labelled texts, how they are read, split over clients and turned into tokens."""

from fedlr.data.partition import Partition
from fedlr.data.placement import split_train_test
from fedlr.data.synthetic import synthetic_text
from fedlr.data.table import LabelledText, load_table
from fedlr.data.tokenise import Share, TokenisedText, collate, micro_batches, tokenise

__all__ = [
    "LabelledText",
    "Partition",
    "Share",
    "TokenisedText",
    "collate",
    "load_table",
    "micro_batches",
    "split_train_test",
    "synthetic_text",
    "tokenise",
]
