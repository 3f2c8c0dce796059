"""How fast a pack runs and why: recorded routing replayed through cache policies, and charts of it."""
