"""The engines, which do the arithmetic of a step, of a prox and of the value of a penalty."""
