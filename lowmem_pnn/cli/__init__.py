"""The command line: its options, its commands, and the supervisor that runs training in a worker process."""
