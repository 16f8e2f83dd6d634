"""How good a model is: samples through all partitions, scores, early exits, and what a language model says."""
