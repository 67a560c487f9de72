"""What training and judging the shipped demonstration models share: their corpus, and what a good completion
is."""
