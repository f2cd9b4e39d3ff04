"""Where rows come from: text, activation caches, synthetic ground truth."""
