"""What a layer costs, in bytes and seconds."""
