"""One file per subcommand: options, one call, and what is printed."""
