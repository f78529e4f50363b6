"""What makes the method fast: each module takes a pipeline or a part of one and returns it faster."""
