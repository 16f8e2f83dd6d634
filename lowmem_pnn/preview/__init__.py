"""Previews: what a run would do, by every method and in any budget, before it is begun."""
