"""The benchmark of a GPU: parity, speed, rivals and a whole training run, within a budget of time."""
