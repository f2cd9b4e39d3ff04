"""Which learning rate suits which run: ``python -m saelab.bench.learning_rate`` measures it, ``--fit`` fits rules."""
