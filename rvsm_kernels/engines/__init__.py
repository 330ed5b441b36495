"""The engines: who does the arithmetic of a step, of a prox and of the value of a penalty."""
