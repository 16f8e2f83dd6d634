"""Bytes on disk: tensor files written in place, boundary activations in shards, weights by generation, the run directory."""
