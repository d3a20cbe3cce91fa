"""Other ways to compute what an operation computes: a module each, with a table from operation to callable."""
