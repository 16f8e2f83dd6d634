"""A run from beginning to end: set up, check, train, finish, export."""
