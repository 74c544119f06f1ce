"""Looking after a store: budgets, garbage collection, checks, warming."""
