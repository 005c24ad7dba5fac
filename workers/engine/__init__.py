"""Run, loop, checkpoint, distributed, optimizers, probes: what every worker shares."""
