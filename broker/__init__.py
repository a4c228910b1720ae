"""The broker, its supervisor, embedding, and the command line."""
