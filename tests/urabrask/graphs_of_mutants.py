"""Blueprints of mutants for what no shipped one does."""

GRAPHS = {
    "dropped": """
name = "dropped"
input = "h"
graph = "k = dropout(mul(h, w), 0.25)"
[dims]
d = {}
[parameters]
w = { shape = ["d"] }
""",
}
