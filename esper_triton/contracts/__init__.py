"""Models that cross a boundary between rooms, and the errors. Imports pydantic and nothing of Esper."""
