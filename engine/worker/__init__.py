"""The attention side: weights, KV pool, a step as a program, the step loop."""
