"""The method itself: options, penalties, groups, prox, bases and methods. Plain Python and torch, without an engine."""
