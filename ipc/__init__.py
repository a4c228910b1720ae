"""The contract between processes: arena, lifeline, messages, settings, errors, and the client."""
