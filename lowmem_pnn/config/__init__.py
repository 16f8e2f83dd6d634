"""What a run is asked to do: the options, their checks, and what a command line or a call is made into."""
