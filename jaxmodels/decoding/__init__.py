"""Pure decoding steps and the losses that train them."""
