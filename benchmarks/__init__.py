"""Measurements of edgeinfer against stock llama.cpp, and the made models they need."""
