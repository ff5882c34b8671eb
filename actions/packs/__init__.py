"""The shipped action definitions. A package, so that its files are installed with it."""
