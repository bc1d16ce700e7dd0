"""Benchmarks of every stem, of the network and of the decompositions that they stand in for."""
