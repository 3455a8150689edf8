"""Arms, seeds and claims: which runs a page rests on, their table, and the verdict that follows from it."""
