"""What runs on the node: reads one config, writes one run directory."""
