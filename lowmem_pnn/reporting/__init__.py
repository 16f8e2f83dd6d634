"""What people read: results, plans, and the live display."""
