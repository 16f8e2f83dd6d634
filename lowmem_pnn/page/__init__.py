"""The page of a run, or of several side by side: figures, tables and how to repeat them, in one HTML file."""
