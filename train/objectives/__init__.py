"""Objectives: a shared pure function of `jaxmodels` and its reduction over a batch."""
