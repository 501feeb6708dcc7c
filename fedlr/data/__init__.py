"""Data: labelled rows, how they are read and checked, and how they are split over clients."""

from fedlr.data.frame import from_frame
from fedlr.data.partition import Partition
from fedlr.data.placement import split_train_test
from fedlr.data.table import LabelledText, load_table

__all__ = ["LabelledText", "Partition", "from_frame", "load_table", "split_train_test"]
