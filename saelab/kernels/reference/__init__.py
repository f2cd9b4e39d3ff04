"""The definition of every op in plain PyTorch: the test oracle, and the fallback of the other backends."""
