"""What the command line does, one module a command; each can be called from Python just as well."""
