"""Data sets, data roles, client partitions and batched augmentation."""
