"""The subcommands of ``saelab``, one module each, imported when called."""
