"""What a key means."""
