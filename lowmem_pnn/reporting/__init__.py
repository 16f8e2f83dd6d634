"""Output for people and programs: results, plans, and the live display."""
