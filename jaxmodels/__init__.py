"""Models: weights, forward passes and every pure function that both loops need."""
