"""What tests share: data, networks, plain training loops, the command line in process, hypothesis strategies."""
