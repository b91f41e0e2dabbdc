"""Exports to the formats of other engines."""

# Letters of several scripts, numbers, spaces, lines, code: where ways to split text differ.
TEXTS = (
    "The river rises in the hills above the town and flows 1234 km to the sea; its mouth is 3.5 km wide.",
    "In 1987, they'd sold 20,000 copies. \"It's all we've got,\" she said, and I'll never forget it!",
    "Un café à Zürich coûte 4,50 €. Привет, мир! こんにちは世界 🙂 naïve façade",
    "def area(r):\n    # two spaces  and\ttabs\n\n    return 3.14159 * r ** 2\n\n\nprint(area(10))  \n",
)
"""What exports are run on before they are kept."""
