"""Options as people write them down: files, commands, and texts KEY=VALUE."""
