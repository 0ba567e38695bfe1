"""Sequences of different lengths into micro-batches, in C++: integers only, numpy in and out."""
