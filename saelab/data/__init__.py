"""Sources of data: text, activation caches, synthetic activations with known features."""
