"""Rows as `tables`, `figures` and a `page`; `build` writes them all. Tables need no matplotlib."""
