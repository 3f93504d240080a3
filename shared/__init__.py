"""What the coordinator and the edge daemon agree on; imports neither."""
